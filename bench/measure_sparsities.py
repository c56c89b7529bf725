"""How much accuracy each share of zeros costs, by three ways of pruning; writes bench/sparsities.json.

    python -m bench.measure_sparsities --jobs 2               about an hour and a half a seed and core

On the tiny world, per seed: a dense model; pruned once by the paper's recipe (arXiv 2111.05754) and by hidden states
(docs/real_data.md), each then fine-tuned for the tasks with its zeros locked; and pruned while fine-tuning, as the
paper's baseline is. Runs already under --out are not run again.
"""
import argparse
import statistics
import sys
from pathlib import Path

from bench.collect_runs import common, record, shared_settings
from bench.measure_tiny import ROOT, SCORES, in_parallel, run
from formats.files import write_json

SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
WAYS = {"paper": [], "hidden": ["--kd-target", "hidden"], "gradual": None}      # what is typed in the pruning stage


def measure_seed(seed, out, tasks, threads):
    """({way: {sparsity: {task: metric}}}, 0 % under every way; {run: its record}) of one seed."""
    log, base = out.with_name(out.name + ".log"), ["--seed", str(seed), "--threads", str(threads), "--resume"]
    dense, found, records = out / "pretrain", {way: {} for way in WAYS}, {}

    def tune(task, folder, kind, *typed):
        run(log, "train.py", "--stage", "finetune", "--task", task, "--out", str(folder), *typed, *base)
        entry = record(folder / task / kind)
        records[f"{folder.relative_to(out)}/{task}/{kind}"] = entry
        return entry["metrics"][SCORES[task][1]]

    run(log, "train.py", "--stage", "pretrain", "--out", str(out), *base)
    records["pretrain"] = record(dense)
    teachers = {task: tune(task, out, "teacher", "--sparsity", "0") for task in tasks}
    for way, typed in WAYS.items():
        found[way][0] = teachers
        for sparsity in SPARSITIES:
            folder, share, suffix = out / way, ["--sparsity", str(sparsity)], f"unstructured-{sparsity:g}"
            if typed is None:
                ends, kind = ["--mask", "gradual", "--init", str(dense)], f"gradual-{suffix}"
            else:
                run(log, "train.py", "--stage", "prune", "--out", str(folder), "--init", str(dense), "--teacher",
                    str(dense), *share, *typed, *base)
                records[f"{way}/prune-{suffix}"] = record(folder / f"prune-{suffix}")
                ends, kind = [], f"sparse-{suffix}"
            found[way][sparsity] = {task: tune(task, folder, kind, *share, *ends, "--teacher",
                                               str(out / task / "teacher")) for task in tasks}
    return found, records


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default="mnli,qqp,qnli")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--out", type=Path, default=Path("out/sparsities"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "sparsities.json")
    typed = sys.argv[1:] if arguments is None else arguments
    arguments = parser.parse_args(typed)
    names, tasks = arguments.seeds.split(","), arguments.tasks.split(",")
    measured = in_parallel(arguments.jobs, lambda seed: measure_seed(
        int(seed), (arguments.out / f"seed-{seed}").resolve(), tasks, arguments.threads), names)
    records = [pair for _, found in measured for pair in sorted(found.items())]
    write_json(arguments.json, {
        "command": "python -m bench.measure_sparsities " + " ".join(typed),
        **common([entry for _, entry in records]), "settings": shared_settings(records, ("seed",)),
        "scores": {way: {f"{sparsity:g}": {seed: found[way][sparsity] for seed, (found, _) in zip(names, measured)}
                         for sparsity in (0, *SPARSITIES)} for way in WAYS}})
    print(f"{'zeros':<8}" + "".join(f"{way:>12}" for way in WAYS) + f"   mean of {', '.join(tasks)}")
    for sparsity in (0, *SPARSITIES):
        means = [statistics.mean(value for found, _ in measured for value in found[way][sparsity].values())
                 for way in WAYS]
        print(f"{sparsity:<8.0%}" + "".join(f"{mean:>12.1%}" for mean in means))


if __name__ == "__main__":
    main()
