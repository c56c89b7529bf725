"""The evidence for MiniLM-L6 on real text and tasks, by recipe minilm-l6-hidden: dense, pruned while fine-tuning (the
paper's baseline), from the paper's upstream, and from hidden states, with and without them beside a task's logits; each
at 1x4 80 % and unstructured 85 %, then INT8.

    python -m bench.measure_minilm --init MODEL_DIR --corpus TEXT --data TASKS           hours on two cores; goes on
    python -m bench.measure_minilm ... --device cuda --jobs 8                            where it was killed

Every run is a directory of train.py below --out, and is done once; --tasks, --patterns and --upstream choose some. What
is finished is written to --json after every run: settings, commit, machine, seconds and tokens of each.
"""
import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.collect_runs import record, typed_command
from data.tasks import TASKS
from formats.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = {"1x4": "0.8", "unstructured": "0.85"}
PAPER = ["--kd-target", "all", "--criterion", "magnitude", "--steps", "2000"]  # longer than the recipe's own upstream
TEACHER_STEPS = "2000"


@dataclass
class Job:
    name: str
    directory: Path
    flags: list
    needs: list = field(default_factory=list)           # names of jobs
    engines: tuple = ()                                 # to evaluate the directory with, on the CPU
    task: str = ""


def plan(options):
    """The jobs, each behind those that it needs."""
    out, jobs = Path(options.out), []
    common = ["--recipe", "minilm-l6-hidden", "--preset", "minilm-l6", "--device", options.device]

    def job(name, folder, written, flags, needs=(), engines=(), task=""):
        jobs.append(Job(name, out / folder / written, [*common, "--out", str(out / folder), *flags], list(needs),
                        engines, task))
        return str(jobs[-1].directory)

    model, text = ["--init", options.init], ["--corpus", options.corpus]
    if "paper" in options.upstream:
        paper = job("paper teacher", "paper", "pretrain",
                    ["--stage", "pretrain", *model, *text, "--steps", TEACHER_STEPS])
    for pattern in options.patterns:
        zeros = ["--pattern", pattern, "--sparsity", PATTERNS[pattern]]
        if {"hidden", "both"} & set(options.upstream):
            job(f"hidden {pattern}", "hidden", f"prune-{pattern}-{PATTERNS[pattern]}",
                ["--stage", "prune", *model, *text, *zeros])
        if "paper" in options.upstream:
            job(f"paper {pattern}", "paper", f"prune-{pattern}-{PATTERNS[pattern]}",
                ["--stage", "prune", "--init", paper, "--teacher", paper, *text, *zeros, *PAPER], ["paper teacher"])
    dense = {task: job(f"{task} dense", "dense", f"{task}/teacher",
                       ["--stage", "finetune", "--sparsity", "0", *model, "--task", task, "--data", options.data])
             for task in options.tasks}
    ways = [(way, seed) for way in options.upstream
            for seed in (range(options.seeds) if way in ("hidden", "both") else (0,))]
    for (way, seed), task, pattern in itertools.product(ways, options.tasks, options.patterns):
        ends, folder = f"{pattern}-{PATTERNS[pattern]}", f"{way}/seed-{seed}"
        name = f"{task} {way} {pattern} seed {seed}"
        taught = ["--pattern", pattern, "--sparsity", PATTERNS[pattern], "--task", task, "--data", options.data,
                  "--teacher", dense[task], "--seed", str(seed)]
        if way == "gradual":
            sparse = job(name, folder, f"{task}/gradual-{ends}",
                         ["--stage", "finetune", "--mask", "gradual", *model, *taught], [f"{task} dense"])
        else:
            upstream = "hidden" if way == "both" else way
            taught += ["--kd-hidden", "1"] if way == "both" else []
            sparse = job(name, folder, f"{task}/sparse-{ends}",
                         ["--stage", "finetune", "--init", str(out / upstream / f"prune-{ends}"), *taught],
                         [f"{task} dense", f"{upstream} {pattern}"])
        job(f"{name} int8", folder, f"{task}/int8-{ends}", ["--stage", "quantize", "--init", sparse, *taught], [name],
            options.engines, task)
    return jobs


def run(job, options):
    """Train one directory unless it is finished, then evaluate it with the engines. What is printed goes to a file."""
    job.directory.mkdir(parents=True, exist_ok=True)
    log = job.directory.with_name(job.directory.name + ".out")
    commands = [] if (job.directory / "metrics.json").is_file() else [
        ["train.py", *job.flags, *(["--steps", options.steps] if options.steps else []), "--resume", "--threads",
         str(options.threads)]]
    for engine in job.engines:
        report = job.directory / f"infer-{engine}.json"
        if not report.is_file():
            commands.append(["infer_cpu.py", str(job.directory), "--evaluate", "--task", job.task, "--data",
                             options.data, "--engine", engine, "--threads", str(options.threads), "--json", str(report),
                             *(["--agreement"] if engine == "native" else [])])
    for command in commands:
        with open(log, "a", encoding="utf-8") as file:
            done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file)
        if done.returncode:
            raise RuntimeError(f"{job.name}: {' '.join(command)} ended with {done.returncode}; see {log}")


def tokens_of(directory):
    """How many tokens a run was trained on, from the rows of its log."""
    with open(directory / "log.csv", newline="") as file:
        rows = [(float(row["seconds"]), float(row["tokens_per_second"])) for row in csv.DictReader(file)]
    before = [0.0, *(seconds for seconds, _ in rows)]
    return round(sum((seconds - start) * speed for start, (seconds, speed) in zip(before, rows)))


def collect(jobs):
    """{name: what is known of a finished run}."""
    found = {}
    for job in (job for job in jobs if (job.directory / "metrics.json").is_file()):
        engines = {engine: json.loads((job.directory / f"infer-{engine}.json").read_text()) for engine in job.engines
                   if (job.directory / f"infer-{engine}.json").is_file()}
        found[job.name] = {**record(job.directory), "tokens": tokens_of(job.directory), "engines": engines}
    return found


WAYS = {"hidden": "pruned once, by hidden states", "both": "pruned once, by hidden states, these also on the task",
        "paper": "pruned once, by the paper's recipe",
        "gradual": "pruned while fine-tuning"}


def table(runs):
    """Lines of Markdown: the dense models, then each way of pruning and its INT8 models, in the first engine that they
    were measured with; a column per task, its metric in percent, the mean over seeds; and the mean of a row that has
    them all."""
    tasks, rows = [task for task in TASKS if f"{task} dense" in runs], {}

    def add(title, task, metrics):
        rows.setdefault(title, {}).setdefault(task, []).append(100 * metrics[TASKS[task].metric])
    for (way, words), pattern, task in itertools.product(WAYS.items(), PATTERNS, tasks):
        title, start = f"{pattern} {100 * float(PATTERNS[pattern]):.0f} %, {words}", f"{task} {way} {pattern} seed "
        for name in (name for name in runs if name.startswith(start)):
            if not name.endswith("int8"):
                add(title, task, runs[name]["metrics"])
            elif runs[name]["engines"]:
                add(f"{title}, INT8", task, next(iter(runs[name]["engines"].values()))["metrics"])
    rows = {"dense": {task: [100 * runs[f"{task} dense"]["metrics"][TASKS[task].metric]] for task in tasks}, **rows}
    lines = [f"| MiniLM-L6, dev sets | {' | '.join(TASKS[task].folder for task in tasks)} | mean |",
             "|---" * (len(tasks) + 2) + "|"]
    for title, row in rows.items():
        means = [statistics.mean(row[task]) if task in row else None for task in tasks]
        whole = [] if None in means else [statistics.mean(means)]
        cells = ["" if mean is None else f"{mean:.1f}" for mean in (*means, *(whole or [None]))]
        lines.append(f"| {title} | {' | '.join(cells)} |".replace("  ", " "))
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="the folder of MiniLM-L6")
    parser.add_argument("--corpus", required=True, help="text for the upstream stages")
    parser.add_argument("--data", required=True, help="the folder of the tasks")
    parser.add_argument("--out", default="out/measure-minilm", help="where the runs go")
    parser.add_argument("--json", default=str(ROOT / "bench" / "minilm.json"), help="the file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--steps", help="of every run, in place of the recipe's: to try it out")
    parser.add_argument("--seeds", type=int, default=1, help="of the transfer from the hidden-state upstream")
    for name, choices in (("tasks", tuple(TASKS)), ("patterns", tuple(PATTERNS)), ("engines", ("native", "int8")),
                          ("upstream", ("hidden", "both", "gradual", "paper"))):
        parser.add_argument(f"--{name}", type=lambda value: tuple(value.split(",")), default=choices)
    typed = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(typed)
    jobs = plan(options)
    waiting, done, running, failed, lock = list(jobs), set(), {}, [], threading.Lock()

    def work(job):
        try:
            run(job, options)
            with lock:
                done.add(job.name)
                write_json(options.json, {"command": typed_command("bench.measure_minilm", typed),
                                          "runs": collect(jobs)})
        except Exception as error:
            failed.append(str(error))
        finally:
            running.pop(job.name)

    while waiting or running:
        for job in [job for job in waiting if set(job.needs) <= done][:options.jobs - len(running)]:
            waiting.remove(job)
            running[job.name] = threading.Thread(target=work, args=(job,))
            running[job.name].start()
            print(f"{time.strftime('%H:%M:%S')} {len(done)} of {len(jobs)} done; starts {job.name}", flush=True)
        if failed and not running:
            sys.exit("\n".join(failed))
        time.sleep(0.2)
        if not running and not any(set(job.needs) <= done for job in waiting):
            break
    print("\n".join([*table(collect(jobs)), f"{len(done)} of {len(jobs)} runs; wrote {options.json}"]))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
