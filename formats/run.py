"""A training run on disk, so that it can be followed, stopped and gone on with.

    run.json            the settings, the parents, the machine
    log.txt, log.csv    what was said; a row of figures every LOG_EVERY steps
    train-STEP.pt       checkpoints, until the stage is finished
    metrics.json        written last: the stage is finished
"""
import contextlib
import csv
import hashlib
import math
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy
import tokenizers
import torch
import torch.distributed as dist
from tqdm import tqdm

from formats.files import lock_folder, read_json, unlock, whole_file, write_file, write_json
from formats.machine import cores, processor_name
from formats.processes import processes, rank
from model import InputError, linears

LOG_EVERY = 10                  # steps between two rows of log.csv
SAVE_SECONDS = 300              # between two checkpoints
CHECKPOINTS_KEPT = 2            # the newest ones
FINGERPRINT_BYTES = 32 << 20    # read of a file's beginning, and again of its end, to know it again


# ---------------------------------------------------------------------------------------------------------------------
# What a run says goes to the screen and to a file

class Log:
    """`say` prints a line and appends it to log.txt; `row` appends a line to log.csv. Without a directory, silent.

    lock: of `lock_folder`, which `close` gives up. begin_step: rows after it belong to steps that run again, and are
    removed.
    """

    def __init__(self, directory, begin_step=0, lock=None):
        self.directory, self.header, self.lock = directory, False, lock
        if not directory:
            return
        self.table = directory / "log.csv"
        if begin_step and self.table.is_file():
            first, *rows = self.table.read_text(errors="replace").splitlines() or [""]
            kept = [row for row in rows if row.count(",") == first.count(",") and row.split(",")[0].isdigit()
                    and int(row.split(",")[0]) <= begin_step]
            write_file(self.table, "".join(line + "\n" for line in (first, *kept) if line))
            self.header = bool(first)
        else:
            write_file(self.table, "")
            write_file(directory / "log.txt", "")

    def say(self, line=""):
        if self.directory:
            tqdm.write(line)
            with open(self.directory / "log.txt", "a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")

    def row(self, values):
        if not self.directory:
            return
        with open(self.table, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self.header:
                writer.writerow(values)
                self.header = True
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in values.values())


    def close(self):
        """Let others into the directory."""
        unlock(self.lock)
        self.lock = None


class Progress:
    """The bar on the screen, the rows of log.csv, and the clock: how fast, how long, when to save.

    name: of the stage. first, steps: where it begins and ends. earlier: seconds of the sessions before this one.
    """

    def __init__(self, name, first, steps, log, earlier):
        self.log, self.steps, self.earlier, self.tokens = log, steps, earlier, 0
        self.started = self.saved = self.window = time.monotonic()
        # On a terminal the bar moves all the time; in a file a line now and then is enough.
        self.bar = tqdm(total=steps, initial=first, desc=name, unit="step", smoothing=0.05, disable=rank() > 0,
                        mininterval=0.2 if sys.stderr.isatty() else 20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def seconds(self):
        """Of training, earlier sessions included."""
        return self.earlier + time.monotonic() - self.started

    def show(self, done, tokens, figures):
        """After each step. done: steps; tokens: of this step; figures: what a row of log.csv holds of it."""
        self.tokens += tokens
        if done % LOG_EVERY == 0 or done == self.steps:
            now = time.monotonic()
            speed, self.tokens, self.window = self.tokens / (now - self.window), 0, now
            self.log.row({"step": done, **figures, "tokens_per_second": speed, "seconds": self.seconds()})
            self.bar.set_postfix_str(f"loss {figures['loss']:.3f}, lr {figures['learning_rate']:.1e}, sparsity "
                                     f"{figures['sparsity']:.1%}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def save_is_due(self):
        return time.monotonic() - self.saved > SAVE_SECONDS

    def note_save(self):
        """After a checkpoint is written: a slow disk does not shorten the time to the next one."""
        self.saved = time.monotonic()


def versions(root):
    """What made a figure: the commit of the program in the folder `root` (None outside git), packages, machine."""
    commit = ""
    with contextlib.suppress(OSError):                  # there may be no git
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    return {"git_commit": commit.strip() or None, "python": platform.python_version(),
            "torch": torch.__version__, "numpy": numpy.__version__, "tokenizers": tokenizers.__version__,
            "machine": platform.machine(), "processor": processor_name(), "cores": cores(),
            "system": platform.platform()}


def describe_run(settings, decided, init, teacher, root):
    """What run.json holds. settings: all of them; decided: as in `save_checkpoint`; root: the folder of the program."""
    return {"settings": {**settings, **decided["settings"]}, "parent": str(init) if init else None,
            "teacher": str(teacher) if teacher else None, "fingerprints": decided["inputs"], "processes": processes(),
            **versions(root)}


def begin_directory(out, state, description):
    """Make the stage's directory and keep other runs out of it, clear away what a killed process left half-written,
    write run.json, return a Log. InputError if another run is at work there."""
    if rank() > 0:
        return Log(None)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(out)
    except BlockingIOError:
        raise InputError(f"{out} is being written to by another run; wait for its end, or write elsewhere with "
                         f"--out") from None
    try:
        if demand_free(out, resume=state is not None):
            raise InputError(f"{out} was finished by another run meanwhile; keep it with --resume")
        for path in out.glob(".*.tmp"):
            path.unlink()
        write_json(out / "run.json", description)
        return Log(out, state["step"] if state else 0, lock)
    except BaseException:
        unlock(lock)
        raise


def fingerprint(paths):
    """16 digits that name the content of some files, to notice that they changed between two sessions of a run. Names,
    sizes and bytes count; of a file above 64 MB the first and the last 32 MB."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(file.tell(), size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: train-STEP.pt, in the stage's directory until it is finished

def checkpoints(directory):
    """Their paths, newest first."""
    return sorted(directory.glob("train-[0-9]*.pt"), reverse=True)


def clear_checkpoints(directory):
    """Remove them all, once the stage is finished."""
    for path in checkpoints(directory):
        path.unlink()


def demand_free(directory, resume):
    """InputError if the directory holds a run, finished or not, that this one would overwrite. True if it holds a
    finished one to be kept."""
    if (directory / "metrics.json").is_file():
        if resume:
            return True
        raise InputError(f"{directory} holds a finished run; keep it with --resume, write elsewhere with --out, or "
                         f"remove it")
    if checkpoints(directory) and not resume:
        raise InputError(f"{directory} holds a run that has got as far as {checkpoints(directory)[0].name}; go on with "
                         f"--resume, write elsewhere with --out, or remove it")
    return False


def demand_same_result(directory, settings, inputs):
    """InputError unless the finished run in a directory had these settings and these files, as `newest_checkpoint` has
    them."""
    made = read_json(directory / "run.json")
    if not isinstance(made.get("settings"), dict) or not isinstance(made.get("fingerprints"), dict):
        raise InputError(f"{directory / 'run.json'} does not say with which settings it was made; write elsewhere with "
                         f"--out, or remove {directory}")
    demand_same_run(directory, {"settings": made["settings"], "inputs": made["fingerprints"]}, settings, inputs)


def save_checkpoint(directory, decided, model, optimizer, step, seconds):
    """Latent weights, masks, activation ranges, optimizer, step, and `decided`, the `settings` and `inputs` that
    `newest_checkpoint` will compare; then remove all but the newest checkpoints, and those
    of later steps, which only a run that could not use them leaves behind."""
    layers = linears(model)
    state = {**decided, "step": step, "seconds": seconds, "model": model.state_dict(),
             "mask": {name: layer.mask for name, layer in layers},
             "act_range": {name: layer.act_range for name, layer in layers}, "optimizer": optimizer.state_dict()}
    path = directory / f"train-{step:09}.pt"
    with whole_file(path) as file:
        torch.save(state, file)
    present = checkpoints(directory)
    place = present.index(path)
    for old in present[:place] + present[place + CHECKPOINTS_KEPT:]:
        old.unlink()


def newest_checkpoint(directory, settings, inputs, say):
    """The content of the newest whole checkpoint, or None where there is none. `say` is told which one, and which are
    damaged and skipped.

    settings: dict of those that decide what is computed; inputs: fingerprints by setting. InputError if all are
    damaged, or if the run had other settings or other files.
    """
    paths, reason = checkpoints(directory), ""
    for path in paths:
        try:
            state = read_checkpoint(path)
        except Exception as error:                        # zipfile and torch raise many kinds for a damaged file
            if out_of_memory(error):
                raise
            reason = f"{path} is damaged ({first_line(error)}) and is skipped"
            say(reason)
            continue
        demand_same_run(path, state, settings, inputs)
        say(f"resuming after step {state['step']} of {settings['steps']}, from {path}")
        return state
    if paths:
        raise InputError(f"none of the {len(paths)} checkpoints in {directory} is whole ({reason}); remove it to "
                         f"start the stage again")


def read_checkpoint(path):
    with zipfile.ZipFile(path) as file:                   # torch.save writes a checksum (CRC-32) with every tensor,
        damaged = file.testzip()                          # and torch.load does not compare it
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not {"settings", "inputs", "step", "model"} <= state.keys():
        raise KeyError("it is no checkpoint")
    return state


def demand_same_run(path, state, settings, inputs):
    """InputError unless a checkpoint, or a finished directory, was made with these settings and these files."""
    place = path if path.is_dir() else path.parent
    for name, value in settings.items():
        if name == ("epochs" if settings["steps"] else "steps"):            # of the two, one counts
            continue
        if state["settings"].get(name) != value:
            raise InputError(f"{path} was made with --{name.replace('_', '-')} {state['settings'].get(name)}, and now "
                             f"it is {value}; resume with the same settings, or remove {place} to start again")
    for name, value in inputs.items():
        if state["inputs"].get(name) != value:
            raise InputError(f"{path} was made with other files than --{name} {settings[name]} leads to now; put the "
                             f"old ones back, or remove {place} to start again")


def restore(model, optimizer, state):
    """Put a checkpoint's tensors back. Returns (steps done, seconds spent); (0, 0.0) without a checkpoint."""
    if state is None:
        return 0, 0.0
    model.load_state_dict(state["model"])
    for name, layer in linears(model):
        layer.mask.copy_(state["mask"][name])
        layer.act_range.copy_(state["act_range"][name])
    optimizer.load_state_dict(state["optimizer"])
    for copied in ("model", "mask", "act_range", "optimizer"):          # the caller holds the dict as long as it trains
        del state[copied]
    return state["step"], state["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong around the program

@contextlib.contextmanager
def interrupts():
    """Collects SIGINT and SIGTERM in a list, so that the step under way can end and be saved; a second one stops at
    once, but under torchrun, which passes on what the terminal has already sent."""
    seen = []

    def note(number, frame):
        if seen and processes() == 1:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def demand_finite(loss, norm, step, rate, out):
    """InputError once a step's loss or the norm of its gradient is no number. rate: the peak learning rate."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        kept = f"; the last checkpoint is kept in {out}" if checkpoints(out) else ""
        raise InputError(f"the loss became {loss} and its gradient {norm} at step {step}{kept}; try a lower --lr than "
                         f"{rate:g}")


def first_line(error):
    """The first line of an exception's message, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def out_of_memory(error):
    """Does this exception say so? Python, PyTorch on the CPU and on CUDA, and C++ below them, each in its own words."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory|bad_alloc|start new thread", str(error))))


def reason_of(error, smaller="--micro-batch or --max-len", then="; --resume goes on from the last checkpoint"):
    """One sentence for what went wrong around the program; None for a fault of its own. smaller: the flags that lower
    the memory; then: what to do afterwards."""
    if out_of_memory(error):
        return f"there is not enough memory; give a smaller {smaller}{then}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}{then}"
    torn = re.compile("gloo|NCCL|distributed|timeout|timed out|pair closure|connection", re.IGNORECASE)
    if dist.is_initialized() and isinstance(error, RuntimeError) and torn.search(str(error)):
        return f"another process of this run has stopped or is silent{then}"
