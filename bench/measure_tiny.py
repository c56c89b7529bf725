"""The tiny world's story, measured over seeds: what bench/tiny.json holds and the README quotes.

    python -m bench.measure_tiny --seeds 0,1,2 --out out/measure          about 12 minutes a seed on 2 cores

For each seed and task, through the commands a person would type: dense; the same without pre-training; Prune OFA;
pruning while fine-tuning (the paper's baseline); INT8, as fake quantization and through the real engine, and how often
the two agree. The mean and the standard deviation over seeds go to --json. Runs already under --out are not run again.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCORES = {"sst2": ("sst2", "accuracy"), "mnli": ("mnli", "accuracy"), "mnli-mm": ("mnli", "accuracy_mismatched"),
          "qqp": ("qqp", "accuracy"), "qnli": ("qnli", "accuracy"), "squad": ("squad", "f1")}
TASKS = ("sst2", "mnli", "qqp", "qnli", "squad")        # what is averaged: MNLI by its matched dev set
COLUMNS = ("guessing", "no_pretraining", "dense", "gradual", "sparse", "int8_fake", "int8", "agreement")


def run(*arguments):
    subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], check=True)


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


def measure_seed(seed, out, sparsity):
    """{column: {task: metric}} of one seed; what is already finished under `out` is kept."""
    from data import tiny
    base = ["--seed", str(seed), "--out", str(out), "--resume"]
    # what the quick start does, with the same files as its result
    run("train.py", "--stage", "all", "--sparsity", str(sparsity), *base)
    folder, suffix = tiny.ensure(), f"unstructured-{sparsity:g}"
    results = {column: {} for column in COLUMNS}
    for task in TASKS:
        one = ["--stage", "finetune", "--task", task, *base]
        run("train.py", *one, "--sparsity", "0", "--init", "random")
        run("train.py", *one, "--sparsity", str(sparsity), "--mask", "gradual")
    for name, (task, metric) in SCORES.items():
        results["guessing"][name] = guessing(folder, name)
        for column, path in (("no_pretraining", "random/metrics.json"), ("dense", "teacher/metrics.json"),
                             ("gradual", f"gradual-{suffix}/metrics.json"), ("sparse", f"sparse-{suffix}/metrics.json"),
                             ("int8_fake", f"int8-{suffix}/metrics.json"), ("int8", f"int8-{suffix}/infer.json")):
            results[column][name] = json.loads((out / task / path).read_text())["metrics"][metric]
        agreement = json.loads((out / task / f"int8-{suffix}/infer.json").read_text())["agreement"]
        results["agreement"][name] = min(agreement["equal_predictions"].values())
    return results


def summarize(seeds):
    """{column: {task or 'average': [mean, standard deviation over seeds]}}"""
    summary = {}
    for column in COLUMNS:
        rows = {name: [seed[column][name] for seed in seeds.values()] for name in SCORES}
        rows["average"] = [statistics.mean(seed[column][task] for task in TASKS) for seed in seeds.values()]
        summary[column] = {name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
                           for name, values in rows.items()}
    return summary


def main():
    import torch

    from formats.machine import cores, processor_name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--out", type=Path, default=Path("out/measure"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "tiny.json")
    arguments = parser.parse_args()
    seeds = {seed: measure_seed(int(seed), arguments.out / f"seed-{seed}", arguments.sparsity)
             for seed in arguments.seeds.split(",")}
    summary = summarize(seeds)
    content = {"command": "python -m bench.measure_tiny --seeds " + arguments.seeds, "sparsity": arguments.sparsity,
               "processor": processor_name(), "cores": cores(), "torch": torch.__version__,
               "python": platform.python_version(), "mean_and_deviation": summary, "seeds": seeds}
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'':<15}" + "".join(f"{name:>14}" for name in (*SCORES, "average")))
    for column, row in summary.items():
        print(f"{column:<15}" + "".join(f"{mean:>8.1%} ±{deviation:>4.1%}" for mean, deviation in row.values()))


if __name__ == "__main__":
    main()
