"""The tiny world's story, measured over seeds: what bench/tiny.json holds and the README quotes.

    python -m bench.measure_tiny --jobs 2 --threads 1         25 to 40 minutes a seed and core

For each seed and task, through the commands a person would type: dense; the same without pre-training; Prune OFA;
pruning while fine-tuning (the paper's baseline); INT8, as fake quantization and through the real engine, and how often
the two agree. The mean, the standard deviation and the worst over seeds go to --json, with the settings of every run.
Runs already under --out are not run again.
"""
import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.collect_runs import common, record, shared_settings
from formats.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SCORES = {"sst2": ("sst2", "accuracy"), "mnli": ("mnli", "accuracy"), "mnli-mm": ("mnli", "accuracy_mismatched"),
          "qqp": ("qqp", "accuracy"), "qnli": ("qnli", "accuracy"), "squad": ("squad", "f1")}
TASKS = ("sst2", "mnli", "qqp", "qnli", "squad")        # what is averaged: MNLI by its matched dev set
COLUMNS = ("guessing", "no_pretraining", "dense", "gradual", "sparse", "int8_fake", "int8", "agreement")


def run(log, *arguments):
    """One command, what it prints added to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        if subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], stdout=file,
                          stderr=file).returncode:
            raise SystemExit(f"{' '.join(arguments)} failed; see {log}")


def in_parallel(jobs, function, items):
    """[function(item), …], `jobs` at a time, for functions that wait for commands."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, items))


def guessing(folder, name):
    """The better of two guesses that know nothing of the input: the commonest training label; for spans the commonest
    (start, length) in words of the training answers."""
    from data import metrics, tasks
    task = SCORES[name][0]
    folder = folder / tasks.TASKS[task].folder
    if task == "squad":
        train, dev = (tasks.read_questions(folder / f"{split}-v1.1.json") for split in ("train", "dev"))
        begin, length = statistics.mode((len(q.context[:q.answers[0][1]].split()), len(q.answers[0][0].split()))
                                        for q in train)
        return metrics.squad_scores({q.identifier: " ".join(q.context.split()[begin:begin + length]) for q in dev},
                                    {q.identifier: [text for text, _ in q.answers] for q in dev})["f1"]

    def labels(file):
        lines = (folder / file).read_text().splitlines()
        column = lines[0].split("\t").index(tasks.TASKS[task].label_column)
        return [line.split("\t")[column] for line in lines[1:]]
    common = statistics.mode(labels("train.tsv"))
    dev = labels({"mnli": "dev_matched.tsv", "mnli-mm": "dev_mismatched.tsv"}.get(name, "dev.tsv"))
    return dev.count(common) / len(dev)


def measure_seed(seed, out, sparsity, threads):
    """({column: {task: metric}} of one seed, {run: its record}); what is already finished under `out` is kept."""
    from data import tiny
    base = ["--seed", str(seed), "--out", str(out), "--threads", str(threads), "--resume"]
    log = out.with_name(out.name + ".log")
    # what the quick start does, with the same files as its result
    run(log, "train.py", "--stage", "all", "--sparsity", str(sparsity), *base)
    folder, suffix = tiny.ensure(), f"unstructured-{sparsity:g}"
    results = {column: {} for column in COLUMNS}
    for task in TASKS:
        one = ["--stage", "finetune", "--task", task, *base]
        run(log, "train.py", *one, "--sparsity", "0", "--init", "random")
        run(log, "train.py", *one, "--sparsity", str(sparsity), "--mask", "gradual")
    for name, (task, metric) in SCORES.items():
        results["guessing"][name] = guessing(folder, name)
        for column, path in (("no_pretraining", "random/metrics.json"), ("dense", "teacher/metrics.json"),
                             ("gradual", f"gradual-{suffix}/metrics.json"), ("sparse", f"sparse-{suffix}/metrics.json"),
                             ("int8_fake", f"int8-{suffix}/metrics.json"), ("int8", f"int8-{suffix}/infer.json")):
            results[column][name] = json.loads((out / task / path).read_text())["metrics"][metric]
        agreement = json.loads((out / task / f"int8-{suffix}/infer.json").read_text())["agreement"]
        results["agreement"][name] = min(agreement["equal_predictions"].values())
    return results, {str(path.parent.relative_to(out)): record(path.parent) for path in out.rglob("metrics.json")}


def summarize(seeds):
    """({column: {task or 'average': [mean, standard deviation over seeds]}}, the same with the worst of the seeds)"""
    summary, worst = {}, {}
    for column in COLUMNS:
        rows = {name: [seed[column][name] for seed in seeds.values()] for name in SCORES}
        rows["average"] = [statistics.mean(seed[column][task] for task in TASKS) for seed in seeds.values()]
        summary[column] = {name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
                           for name, values in rows.items()}
        worst[column] = {name: min(values) for name, values in rows.items()}
    return summary, worst


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--out", type=Path, default=Path("out/measure"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "tiny.json")
    typed = sys.argv[1:] if arguments is None else arguments
    arguments = parser.parse_args(typed)
    names = arguments.seeds.split(",")
    measured = in_parallel(arguments.jobs, lambda seed: measure_seed(
        int(seed), arguments.out / f"seed-{seed}", arguments.sparsity, arguments.threads), names)
    seeds, records = {seed: result for seed, (result, _) in zip(names, measured)}, [found for _, found in measured]
    summary, worst = summarize(seeds)
    write_json(arguments.json, {
        "command": "python -m bench.measure_tiny " + " ".join(typed), "sparsity": arguments.sparsity,
        **common([entry for found in records for entry in found.values()]),
        "training_seconds": {seed: sum(entry["training_seconds"] for entry in found.values())
                             for seed, found in zip(names, records)},
        "settings": shared_settings([pair for found in records for pair in sorted(found.items())], ("seed",)),
        "mean_and_deviation": summary, "worst": worst, "seeds": seeds})
    print(f"{'':<15}" + "".join(f"{name:>14}" for name in (*SCORES, "average")))
    for column, row in summary.items():
        print(f"{column:<15}" + "".join(f"{mean:>8.1%} ±{deviation:>4.1%}" for mean, deviation in row.values()))


if __name__ == "__main__":
    main()
