"""Kill training with SIGKILL at random moments, resume, and compare the weights with those of a run left in peace.

    python tests/kill_and_resume.py --kills 30              30 kills of every stage, some ten minutes on one core

Every third kill waits for a checkpoint that is being written; the others fall anywhere, from the first import to the
last file. A run is killed three times, then finishes. All files of weights must then be the same, to the bit.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import DIRECTORIES, commands, exit_code, make_world, start  # noqa: E402

from formats import run

WEIGHTS = ("model.safetensors", "compression.safetensors", "int8.safetensors")


def save_every_second_step():
    run.Progress.save_is_due = lambda progress: progress.bar.n % 2 == 0


def finish(arguments, scratch):
    """Run to the end."""
    printed = Path(scratch) / "printed.txt"
    code = exit_code(start(arguments, printed, save_every_second_step))
    if code:
        raise RuntimeError(f"train.py {' '.join(arguments)} failed with code {code}: {printed.read_text()[-2000:]}")


def kill(arguments, directory, steps, generator, while_writing):
    """Start, wait for a random moment, SIGKILL. Returns what was hit: 'writing' if half a file is left, 'steps' if a
    checkpoint is, 'start' before the first, 'end' after the last step, or None if the run was faster."""
    child, log = start(arguments, prepare=save_every_second_step), directory / "log.csv"
    moment, seen, reached = generator.randrange(steps + 2), set(), None
    writings, delay = generator.randrange(1, 4), generator.uniform(0, 0.05 if moment else 2)
    while not os.waitpid(child, os.WNOHANG)[0]:
        if while_writing:
            seen.update(path.name for path in directory.glob(".train-*.tmp"))
        elif reached is None and (moment == 0 or log.is_file() and log.read_text().count("\n") > moment):
            reached = time.monotonic()                              # more, because the header is a line too
        if len(seen) >= writings or reached is not None and time.monotonic() > reached + delay:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.0002 if while_writing else 0.005)
    else:
        return None
    if list(directory.glob(".*.tmp")):
        return "writing"
    if not run.checkpoints(directory):
        return "start"
    return "end" if log.read_text().count("\n") > steps else "steps"


def torture(stage, chain, world, kills, seed, steps, scratch):
    """Kill one stage so many times. Returns {what was hit: how often}; RuntimeError if a resumed run ends otherwise
    than the one in `chain`."""
    generator, hits, done = random.Random(f"{stage} {seed}"), {}, 0
    while done < kills:
        out = Path(tempfile.mkdtemp(dir=scratch))
        for parent in ("pretrain", "prune-1x4-0.85", "sst2"):
            shutil.copytree(chain / parent, out / parent)
        directory = out / DIRECTORIES[stage]
        shutil.rmtree(directory)
        arguments = [*commands(world, out, steps)[stage], "--resume"]
        for _ in range(min(3, kills - done)):
            what = kill(arguments, directory, steps, generator, while_writing=done % 3 == 0)
            if what is None:
                break
            hits[what] = hits.get(what, 0) + 1
            done += 1
        finish(arguments, scratch)
        for name in WEIGHTS:
            one, other = directory / name, chain / DIRECTORIES[stage] / name
            if one.exists() != other.exists() or one.exists() and one.read_bytes() != other.read_bytes():
                raise RuntimeError(f"{stage}: {name} differs after {done} kills; look at {directory}")
        if run.checkpoints(directory) or list(directory.glob(".*.tmp")):
            raise RuntimeError(f"{stage}: {directory} was not cleared away")
        shutil.rmtree(out)
    return hits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of every stage [30]")
    parser.add_argument("--steps", type=int, default=12, help="of every run [12]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=DIRECTORIES, help="only this one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        world, chain = Path(scratch) / "world", Path(scratch) / "chain"
        make_world(world)
        for command in commands(world, chain, arguments.steps).values():
            finish(command, scratch)
        for stage in [arguments.stage] if arguments.stage else DIRECTORIES:
            hits = torture(stage, chain, world, arguments.kills, arguments.seed, arguments.steps, scratch)
            print(f"{stage:<9} {arguments.kills} kills, the same bits after every resume; hit: "
                  + ", ".join(f"{name} {count}" for name, count in sorted(hits.items())), flush=True)


if __name__ == "__main__":
    main()
