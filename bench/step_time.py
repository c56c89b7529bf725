"""Where the time of a training step goes, and how fast its matrix products are. Takes the flags of train.py, for one
stage; writes nothing.

    python -m bench.step_time --stage prune
"""
import sys
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

import distill
import prune
import train
from bench.memory import build_stage, stage_of
from formats.run import Log
from model import InputError

STEPS = 6
PHASES = {"waiting for data": (Future, "result"), "vocabulary, its loss and gradient": (distill, "vocabulary_loss"),
          "hidden states of both, forward": (distill, "hidden_loss"),
          "backward, without the vocabulary": (torch.Tensor, "backward"),
          "gradient norm": (torch.nn.utils, "clip_grad_norm_"), "AdamW": (torch.optim.AdamW, "step"),
          "mask update": (prune, "update_masks")}


def wait(device):
    """Until a GPU has done what it was given: its work goes on behind the program's back."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, phase, spent, device):
    """The function, whose seconds are added to spent[phase]."""
    def call(*arguments, **named):
        wait(device)
        begun = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            wait(device)
            spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - begun
    return call


def measure(s):
    """Run a few steps of a stage and print where a step's time goes, and how fast its matrix products are next to the
    fastest that this machine can do. On a GPU every phase is waited for, which a real run does not do."""
    torch.set_num_threads(s.threads)
    model, teacher, data = build_stage(s)
    # One mask update falls into the steps; a real run has one in every --update-every of its steps.
    s = replace(s, steps=STEPS, epochs=None, ramp_end=0.4, update_every=0.5)
    arguments, spent = (s, model, teacher, data, {}, Log(None), None, None), {}
    train.train(*arguments)                               # to warm up
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        train.train(*arguments)
    work = sum(event.flops for event in profiler.key_averages())
    with ExitStack() as patches:
        for module, phase in ((model, "student, forward"), (teacher, "teacher, forward")):
            if module:
                patches.enter_context(patch.object(module, "forward", timed(module.forward, phase, spent, s.device)))
        for phase, (owner, name) in PHASES.items():
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), phase, spent, s.device)))
        begun = time.perf_counter()
        train.train(*arguments)
        wait(s.device)
        seconds = time.perf_counter() - begun
    print(format_phases(spent, seconds, STEPS))
    fastest = fastest_product(s)
    print(f"matrix products, attention aside: {work / STEPS / 1e9:,.1f} GFLOP a step, "
          f"{work / seconds / 1e9:,.1f} GFLOP/s; a large one alone in {s.precision}: {fastest / 1e9:,.1f} GFLOP/s; the "
          f"step reaches {work / seconds / fastest:.0%} of that")


def format_phases(spent, seconds, steps):
    """A table of milliseconds of a step and share of the time. spent: {phase: seconds of all steps}."""
    lines = [f"{'':<36}{'ms a step':>10}{'share':>8}"]
    for phase, part in [*spent.items(), ("the rest", seconds - sum(spent.values())), ("a step", seconds)]:
        lines.append(f"{phase:<36}{1e3 * part / steps:>10,.1f}{part / seconds:>8.1%}")
    return "\n".join(lines)


def fastest_product(s):
    """Operations a second of a large matrix product in the settings' precision, the fastest of five. A GPU is given a
    larger one, ten times, so that it is not waited for most of the time."""
    rows, inner, columns, repeats = (8192, 8192, 8192, 10) if s.device == "cuda" else (2048, 1024, 4096, 1)
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    left, right = (torch.ones(shape, dtype=dtype, device=s.device) for shape in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(5):
        wait(s.device)
        begun = time.perf_counter()
        for _ in range(repeats):
            left @ right
        wait(s.device)
        times.append(time.perf_counter() - begun)
    return 2 * rows * inner * columns * repeats / min(times)


def main(arguments=None):
    try:
        measure(stage_of(arguments))
    except InputError as error:
        print(f"bench.step_time: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
