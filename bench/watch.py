"""How a training run stands, from its log; also while it runs, and from another terminal.

    python -m bench.watch out/tiny/prune-unstructured-0.85
"""
import argparse
import contextlib
import sys
import time
from pathlib import Path

from formats.command import show_any_letter
from formats.files import read_json
from model import InputError


def bars(numbers, width=60):
    """Numbers as a line of at most `width` bars, from the least to the largest; each the mean of its share of them."""
    shares = [numbers[len(numbers) * i // width:len(numbers) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares if share]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def run_state(directory):
    """(text that tells how the run in a directory stands, whether it is finished), from run.json and log.csv, which may
    be growing meanwhile: a line that is no row of numbers is passed over. InputError if there is no such run."""
    settings = read_json(directory / "run.json").get("settings")
    if not isinstance(settings, dict) or type(settings.get("steps")) is not int or settings["steps"] < 1:
        raise InputError(f"{directory / 'run.json'} does not say how many steps the run has")
    table = directory / "log.csv"
    names, *lines = (table.read_text(errors="replace").splitlines() if table.is_file() else []) or [""]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(dict(zip(names.split(","), map(float, line.split(",")), strict=True)))
    rows = [row for row in rows if {"step", "seconds"} <= row.keys()
            and all(abs(value) < 1e30 for value in row.values())]
    finished = (directory / "metrics.json").is_file()
    if not rows:
        return f"{directory}: {settings.get('stage')}, no step logged yet", finished
    steps, last = settings["steps"], rows[-1]
    left = last["seconds"] / max(1, last["step"]) * (steps - last["step"])
    state = [f"{directory}: {settings.get('stage')}, step {last['step']:,.0f} of {steps:,} "
            f"({last['step'] / steps:.0%}) after {last['seconds'] / 60:,.1f} minutes, "
            + ("finished" if finished else f"about {left / 60:,.1f} to go")
            + f"; last logged {time.time() - table.stat().st_mtime:,.0f} s ago"]
    for name in last:
        numbers = [row[name] for row in rows if name in row]
        if name not in ("step", "seconds"):
            state.append(f"{name:<18}{bars(numbers):<60}  {numbers[0]:>10.4g} to {numbers[-1]:<10.4g}")
    return "\n".join(state), finished


def watch(directory):
    """Print the state of a run: once into a file, on a terminal every two seconds until the run is finished."""
    finished = False
    while not finished:
        state, finished = run_state(directory)
        print("\033[H\033[2J" * sys.stdout.isatty() + state, flush=True)
        if not sys.stdout.isatty():
            return
        time.sleep(0 if finished else 2)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a stage's directory")
    show_any_letter()
    try:
        watch(parser.parse_args(arguments).directory)
    except InputError as error:
        print(f"bench.watch: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
