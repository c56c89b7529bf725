"""The machine that a run or a measurement has: its name, its cores, what it multiplies fast, timing on it; and the one
global switch of torch's quantized operators."""
import contextlib
import ctypes
import os
import platform
import statistics
import time
from functools import partial

import torch


def processor_name():
    """The CPU's name, for the records that go with a measurement."""
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_bf16(device):
    """Does the device multiply bf16 faster than float32?"""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory():
    """Ask glibc to keep freed memory, in this whole process: a step of training, or a batch through torch's operators,
    frees and takes the same large tensors, and fresh pages cost up to a third of its time. Elsewhere there is no such
    call, and nothing is lost but that time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(-3, 1 << 30)           # M_MMAP_THRESHOLD
        set_option(-1, (1 << 31) - 1)     # M_TRIM_THRESHOLD


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def medians_in_turn(engines, batch, least=7, budget=20.0):
    """Median seconds of a batch per engine: warmed up twice, then in turn, so that a busy moment hits all alike.

    At least `least` rounds, more (to 50) while `budget` seconds last.
    """
    for engine in engines * 2:
        engine(batch)
    times, begin = {engine.name: [] for engine in engines}, time.perf_counter()
    for number in range(50):
        if number >= least and time.perf_counter() - begin > budget:
            break
        for engine in engines:
            times[engine.name].append(seconds(partial(engine, batch)))
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def quantized_engine(name):
    """torch's old quantized operators look at one global setting. RuntimeError where torch was built without it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
