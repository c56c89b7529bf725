"""How much of the tiny world's result is luck: MNLI, its hardest task, fine-tuned from many seeds.

    python -m bench.measure_spread --models 2 --jobs 2                     half an hour on 2 cores
    python -m bench.measure_spread                                         two hours

Models pre-trained from two seeds, with one thread in bf16 (fp32 where the CPU does not multiply bf16) and with two in
fp32; from each of these four, dense, sparse and INT8 models (as fake quantization) by eight seeds. All scores, the worst
and the mean go to --json, with the settings of every run. Runs already under --out are not run again.
"""
import argparse
import statistics
import sys
from pathlib import Path

from bench.collect_runs import PLACES, common, record, shared_settings
from bench.measure_tiny import ROOT, in_parallel, run
from formats.files import write_json
from formats.machine import has_bf16

FAST = "bf16" if has_bf16("cpu") else "fp32"
UPSTREAM = ((0, 1, FAST), (1, 1, FAST), (0, 2, "fp32"), (1, 2, "fp32"))              # seed, threads, precision
RUNS = {"dense": "teacher", "sparse": "sparse-unstructured-0.85", "int8": "int8-unstructured-0.85"}


def measure(upstream, out, task, seeds):
    """[{upstream, seed, and per kind of model its metrics}], {what a run is: its record} of one pre-trained model."""
    seed, threads, precision = upstream
    folder = out / f"seed-{seed}-{threads}-threads-{precision}"
    log, base = folder.with_name(folder.name + ".log"), ["--threads", str(threads), "--precision", precision]
    for stage in ("pretrain", "prune"):
        run(log, "train.py", "--stage", stage, "--seed", str(seed), "--out", str(folder), *base, "--resume")
    records = {stage: record(folder / name) for stage, name in (("pretrain", "pretrain"),
                                                                ("prune", "prune-unstructured-0.85"))}
    rows = []
    for tuned in seeds:
        ends = ["--task", task, "--seed", str(tuned), "--out", str(folder / str(tuned)), *base, "--resume"]
        run(log, "train.py", "--stage", "finetune", "--sparsity", "0", "--init", str(folder / "pretrain"), *ends)
        run(log, "train.py", "--stage", "finetune", "--init", str(folder / "prune-unstructured-0.85"), *ends)
        run(log, "train.py", "--stage", "quantize", *ends)
        found = {kind: record(folder / str(tuned) / task / name) for kind, name in RUNS.items()}
        rows.append({"upstream": list(upstream), "seed": tuned,
                     **{kind: entry["metrics"] for kind, entry in found.items()}})
        records.update({f"{kind} {tuned}": entry for kind, entry in found.items()})
    return rows, records


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnli")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--models", type=int, default=len(UPSTREAM), help="how many pre-trained models")
    parser.add_argument("--jobs", type=int, default=1, help="pre-trained models at a time")
    parser.add_argument("--out", type=Path, default=Path("out/spread"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "spread.json")
    typed = sys.argv[1:] if arguments is None else arguments
    arguments = parser.parse_args(typed)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    measured = in_parallel(arguments.jobs, lambda one: measure(one, arguments.out, arguments.task, seeds),
                           UPSTREAM[:arguments.models])
    rows, records = [row for part, _ in measured for row in part], [pair for _, part in measured
                                                                   for pair in part.items()]
    scores = {kind: {name: [row[kind][name] for row in rows] for name in rows[0][kind]} for kind in RUNS}
    summary = {kind: {name: {"worst": min(values), "mean": statistics.mean(values)} for name, values in named.items()}
               for kind, named in scores.items()}
    for name, dense in scores["dense"].items():
        below = [before - after for before, after in zip(dense, scores["int8"][name])]
        summary["int8"][name]["most below its dense model"] = max(below)
    settings = shared_settings([(name.split()[0], entry) for name, entry in records],
                               ("seed", "threads", "precision", *PLACES))
    write_json(arguments.json, {"command": "python -m bench.measure_spread " + " ".join(typed),
                                "task": arguments.task, **common([entry for _, entry in records]),
                                "settings": settings, "summary": summary, "runs": rows})
    for row in rows:
        print(row["upstream"], row["seed"], *(f"{kind} " + " ".join(f"{value:.1%}" for value in row[kind].values())
                                              for kind in RUNS), sep="  ")
    for kind, named in summary.items():
        print(kind, *(f"{name}: " + ", ".join(f"{what} {value:.1%}" for what, value in values.items())
                      for name, values in named.items()), sep="  ")


if __name__ == "__main__":
    main()
