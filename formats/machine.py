"""The machine that a run or a measurement has: its name, its cores, what it multiplies fast, timing on it; and the one
global switch of torch's quantized operators."""
import contextlib
import ctypes
import os
import platform
import statistics
import threading
import time
from functools import cache, partial
from pathlib import Path

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


def saturates():
    """True if this CPU's uint8 x int8 product may saturate: x86 without VNNI adds two products in 16 bits, and
    2 * 255 * 127 does not fit. Seven-bit activations (2 * 127 * 127) do. True as well where torch cannot tell."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False                # ARM's dot product accumulates in 32 bits
    try:
        capabilities = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):          # another torch: it cannot tell
        return True
    return not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def default_activation_bits():
    """7 on a CPU that saturates, else 8."""
    return 7 if saturates() else 8


def keep_freed_memory():
    """Ask glibc to keep freed memory, in this whole process: a step of training, or a batch through torch's operators,
    frees and takes the same large tensors, and fresh pages cost up to a third of its time. Elsewhere there is no such
    call, and nothing is lost but that time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(-3, 1 << 30)           # M_MMAP_THRESHOLD
        set_option(-1, (1 << 31) - 1)     # M_TRIM_THRESHOLD


@cache
def survive_fork():
    """Let a process go on computing after os.fork, in the child as well: a web server loads a model and then forks.

    OpenMP's threads do not exist in the child, which would wait for them for ever. They are dismissed before the fork,
    and both processes start new ones. Where this OpenMP cannot do that, the child computes with one thread.
    """
    if not hasattr(os, "register_at_fork"):                 # Windows has no fork
        return
    with contextlib.suppress(OSError, AttributeError, StopIteration):
        torchs = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        dismiss, hard = torchs.omp_pause_resource_all, 2    # omp_pause_hard, OpenMP 5.0, section 3.2.44
        os.register_at_fork(before=partial(dismiss, hard))
        return
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


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


ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def quantized_engine(name):
    """torch's old quantized operators look at one global setting, and QNNPACK's work in one buffer: threads take turns.
    RuntimeError where torch was built without it."""
    with ONE_AT_A_TIME:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
