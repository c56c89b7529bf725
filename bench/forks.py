"""Copies of the project with one change: a diff that a page under docs/ shows.

A diff is a code block whose first line is `--- FILE`; the lines after it are unchanged (' '), out ('-') or in ('+').
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model.py", "prune.py", "distill.py", "quant.py", "train.py", "infer_cpu.py")


def change(page, title):
    """(file, lines before, lines after) of the first diff under the heading `title` of a page, a path."""
    section = re.split(rf"^#+ {re.escape(title)}\n", page.read_text(encoding="utf-8"), flags=re.M)[1]
    file, *lines = re.search(r"```diff\n--- (.*?)```", section, re.S).group(1).rstrip("\n").split("\n")
    return file, *("\n".join(line[1:] for line in lines if line[0] in marks) + "\n" for marks in (" -", " +"))


def copy_with(folder, changes=()):
    """Copy what runs to `folder`, a path, and apply changes, as `change` returns them. ValueError where one does
    not fit exactly one place."""
    for name in ("formats", "data", "native", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tiny", "build"))
    for name in ROOMS:
        shutil.copy(ROOT / name, folder)
    for file, before, after in changes:
        source = (folder / file).read_text(encoding="utf-8")
        if source.count(before) != 1:
            raise ValueError(f"{file} holds {source.count(before)} times what the diff takes out:\n{before}")
        (folder / file).write_text(source.replace(before, after), encoding="utf-8")
    return folder


def run_in(folder, *arguments):
    """What `python ARGUMENTS` prints in a folder. RuntimeError with its messages if it fails."""
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout
