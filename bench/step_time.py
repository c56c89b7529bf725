"""Where the time of a training step goes, and how fast its matrix products are. Takes the flags of train.py, for one
stage; writes nothing.

    python -m bench.step_time --stage prune
"""
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.profiler import profile, record_function

import prune
import train
from bench.memory import build_stage, stage_of
from data import DataError
from formats.run import Log
from model import InputError

STEPS = 6
PHASES = {"waiting for data": "waiting for data", "student": "student, forward", "teacher": "teacher, forward",
          "VocabularyLoss": "vocabulary, its loss and gradient", "backward": "backward, without the vocabulary",
          "gradient norm": "gradient norm", "Optimizer.step#AdamW.step": "AdamW", "mask update": "mask update"}


def timed(name, function):
    """The function, under a name that torch.profiler shows."""
    def call(*arguments, **named):
        with record_function(name):
            return function(*arguments, **named)
    return call


def measure(s):
    """Run a few steps of a stage and print where a step's time goes, and how fast its matrix products are next to the
    fastest that this machine can do."""
    torch.set_num_threads(s.threads)
    model, teacher, data = build_stage(s)
    model.forward = timed("student", model.forward)
    if teacher:
        teacher.forward = timed("teacher", teacher.forward)
    # One mask update falls into the steps; a real run has one in every --update-every of its steps.
    s = replace(s, steps=STEPS, epochs=None, ramp_end=0.4, update_every=0.5)
    train.train(s, model, teacher, data, {}, Log(None), None, None)           # to warm up
    with (patch.object(Future, "result", timed("waiting for data", Future.result)),
          patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
          patch.object(torch.nn.utils, "clip_grad_norm_", timed("gradient norm", torch.nn.utils.clip_grad_norm_)),
          patch.object(prune, "update_masks", timed("mask update", prune.update_masks)),
          profile(with_flops=True) as profiler):
        started = time.monotonic()
        train.train(s, model, teacher, data, {}, Log(None), None, None)
        seconds = time.monotonic() - started
    print(format_profile(profiler.key_averages(), seconds, STEPS))
    work, fastest = sum(event.flops for event in profiler.key_averages()), fastest_product(s)
    print(f"matrix products, attention aside: {work / STEPS / 1e9:,.1f} GFLOP a step, "
          f"{work / seconds / 1e9:,.1f} GFLOP/s; a large one alone in {s.precision}: {fastest / 1e9:,.1f} GFLOP/s; the "
          f"step reaches {work / seconds / fastest:.0%} of that")


def format_profile(events, seconds, steps):
    """A table of PHASES: milliseconds of a step and share of the time. events: what torch.profiler averaged."""
    spent = {PHASES[event.key]: event.cpu_time_total / 1e6 for event in events if event.key in PHASES}
    lines = [f"{'':<36}{'ms a step':>10}{'share':>8}"]
    for phase, part in [*spent.items(), ("the rest", seconds - sum(spent.values())), ("a step", seconds)]:
        lines.append(f"{phase:<36}{1e3 * part / steps:>10,.1f}{part / seconds:>8.1%}")
    return "\n".join(lines)


def fastest_product(s, rows=2048, inner=1024, columns=4096):
    """Operations a second of a large matrix product in the settings' precision, the fastest of five."""
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    left, right = (torch.ones(shape, dtype=dtype, device=s.device) for shape in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(5):
        started = time.monotonic()
        float((left @ right)[0, 0])                       # on a GPU: wait for it
        times.append(time.monotonic() - started)
    return 2 * rows * inner * columns / min(times)


def main(arguments=None):
    try:
        measure(stage_of(arguments))
    except (InputError, DataError) as error:
        print(f"bench.step_time: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
