"""What every test needs: the repository on the path, one thread (the models are tiny), no look at the network, a small
world, and one finished chain of all stages in it."""
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"            # `transformers`, which some tests compare with, must not ask for anything
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from data import calibrate, tiny  # noqa: E402
from formats import run  # noqa: E402

torch.set_num_threads(1)
run.LOG_EVERY = 1
calibrate.TOKENS = 2048

SHORT = ["--preset", "tiny", "--batch-size", "8", "--max-len", "48", "--threads", "1"]


def make_world(folder):
    """A slice of the tiny world: 60 documents, 64 training and 32 dev rows of a task."""
    folder.mkdir(exist_ok=True)
    whole = tiny.ensure()
    documents = (whole / "corpus.txt").read_text().split("\n\n")[:60]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    for task, files in {"SST-2": {"train.tsv": 64, "dev.tsv": 32}, "QNLI": {"train.tsv": 64, "dev.tsv": 32}}.items():
        (folder / task).mkdir()
        for name, rows in files.items():
            lines = (whole / task / name).read_text().splitlines()[:rows + 1]
            (folder / task / name).write_text("\n".join(lines) + "\n")
    (folder / "SQuAD").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        content = json.loads((whole / "SQuAD" / name).read_text())
        content["data"] = content["data"][:1]
        content["data"][0]["paragraphs"] = content["data"][0]["paragraphs"][:12]
        (folder / "SQuAD" / name).write_text(json.dumps(content))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def commands(world, out, steps=12):
    """The arguments of each stage of one chain, in order; each needs the ones before it."""
    common = [*SHORT, "--out", str(out), "--steps", str(steps)]
    corpus, task = ["--corpus", str(world / "corpus.txt")], ["--data", str(world), "--task", "sst2"]
    return {
        "pretrain": ["--stage", "pretrain", *common, *corpus],
        "prune": ["--stage", "prune", *common, *corpus, "--pattern", "1x4"],
        "teacher": ["--stage", "finetune", *common, *task, "--sparsity", "0"],
        "finetune": ["--stage", "finetune", *common, *task, "--pattern", "1x4"],
        "gradual": ["--stage", "finetune", *common, *task, "--mask", "gradual"],
        "quantize": ["--stage", "quantize", *common, *task, "--pattern", "1x4"],
    }


DIRECTORIES = {"pretrain": "pretrain", "prune": "prune-1x4-0.85", "teacher": "sst2/teacher",
               "finetune": "sst2/sparse-1x4-0.85", "gradual": "sst2/gradual-unstructured-0.85",
               "quantize": "sst2/int8-1x4-0.85"}


@pytest.fixture(scope="session")
def chain(world, tmp_path_factory):
    """One finished chain."""
    out = tmp_path_factory.mktemp("chain")
    for arguments in commands(world, out).values():
        train.main(arguments)
    return out


def save_every(monkeypatch, steps, kept=2):
    """Checkpoints by the number of the step, and how many stay; also in children that are forked from here."""
    monkeypatch.setattr(run.Progress, "save_is_due", lambda progress: progress.bar.n % steps == 0)
    monkeypatch.setattr(run, "CHECKPOINTS_KEPT", kept)


def fails(capsys, *arguments):
    """Run main, demand exit code 2 and one line on stderr without a traceback; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip() and "step/s" not in line]      # without the bar
    assert stopped.value.code == 2 and "Traceback" not in printed.err and len(lines) == 1, printed.err
    return lines[0]


def start(arguments, output=os.devnull, prepare=None, **environment):
    """train.py in a child process, its output in a file; returns the child's id. A fork, because importing torch would
    take most of the time. prepare: a function to call in the child first."""
    child = os.fork()
    if child == 0:
        code = 1
        with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                os.environ.update(environment)
                if prepare:
                    prepare()
                train.main([str(argument) for argument in arguments])
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                file.flush()
                os._exit(code)
    return child


def exit_code(child):
    """Wait for a child process; its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
