"""What the exercises of docs/walk.md lead to: short prunings on the tiny world, one change each.

    python -m bench.measure_exercises --threads 1            a quarter of an hour on one core

One dense model of 600 steps, pruned in 300 for each exercise; the loss of masked words on held-out text, and for the
scales how much of the weights is rounded away. Written to --json with every run's settings; runs already under --out
are not run again.
"""
import argparse
import shutil
import sys
from pathlib import Path

import torch

import prune
import quant
from bench.collect_runs import common, record
from bench.forks import ROOT, change, copy_with, run_in
from data import tiny
from formats import model_directory
from formats.files import write_json
from formats.page import first_query

PAGE = ROOT / "docs" / "walk.md"
HALF = ("--sparsity", "0.5")
RUNS = {                                        # name: (heading of the diff to apply or "", what is typed beside)
    "as it is": ("", ()),
    "zeroed": ("Exercise 1: zero the weights", ()),
    "no rewinding": ("Exercise 2: no rewinding", ()),
    "no teacher": ("", ("--teacher", "none")),
    "half": ("", HALF),
    "2:4": ("", (*HALF, "--pattern", "2:4")),
    "blocks": ("", ("--pattern", "1x4")),
}
DRAWN, CORNER = ("as it is", "blocks"), 64      # whose mask is kept for a picture: so many rows and columns of it


def corner_of(directory):
    """The first rows of the first layer's query mask, a text of 0 and 1 each."""
    living = first_query(directory)[1][:CORNER, :CORNER] != 0
    return ["".join(map(str, row)) for row in living.int().tolist()]


def rounding_errors(directory):
    """{scales: ||W - rounded W||^2 / ||W||^2 over all pruned layers} of a model directory."""
    model = model_directory.load(directory, "pretraining")
    errors = {}
    for scales in ("row", "tensor"):
        lost = total = 0.0
        for _, layer in prune.prunable(model):
            weight = (layer.weight * layer.mask).detach()
            values, scale = quant.quantize_weight(weight, scales)
            lost += float((weight - values * scale[:, None]).square().sum())
            total += float(weight.square().sum())
        errors[scales] = lost / total
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="of each pruning; the dense model has twice as many")
    parser.add_argument("--out", type=Path, default=Path("out/exercises"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "exercises.json")
    arguments = parser.parse_args()
    out, corpus = arguments.out.resolve(), tiny.ensure() / "corpus.txt"
    base = ["--threads", arguments.threads, "--corpus", corpus, "--resume"]
    run_in(ROOT, "train.py", "--stage", "pretrain", "--steps", 2 * arguments.steps, "--out", out, *base)
    dense, records, masks = out / "pretrain", {"pretrain": record(out / "pretrain")}, {}
    for name, (title, typed) in RUNS.items():
        folder = out / name.replace(" ", "-").replace(":", "of")
        code = ROOT
        if title:
            shutil.rmtree(folder / "code", ignore_errors=True)
            code = copy_with(folder / "code", [change(PAGE, title)])
        run_in(code, "train.py", "--stage", "prune", "--steps", arguments.steps, "--init", dense, "--teacher", dense,
               "--out", folder, *base, *typed)
        pruned = next(folder.glob("prune-*"))
        records[name] = record(pruned)
        if name in DRAWN:
            masks[name] = corner_of(pruned)
        print(f"{name:<14} {records[name]['metrics']['validation_mlm_loss']:.3f}", flush=True)
    torch.set_num_threads(arguments.threads)
    errors = rounding_errors(next((out / "as-it-is").glob("prune-*")))
    print("rounded away:", ", ".join(f"{scales} {value:.1e}" for scales, value in errors.items()))
    write_json(arguments.json, {"command": "python -m bench.measure_exercises " + " ".join(sys.argv[1:]),
                                **common(list(records.values())), "rounded_away": errors, "masks": masks,
                                "runs": records})


if __name__ == "__main__":
    main()
