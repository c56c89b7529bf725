"""The command line of infer_cpu.py: its flags, which of them go together, and how it ends."""
import contextlib
import os
import sys

from data.tasks import TASKS
from formats.command import Parser, positive_int, positive_ints, thread_count
from formats.run import reason_of
from model import PRESETS, InputError

OF_VECTORS = ("retrieval", "stsb")         # what --evaluate measures of an encoder's vectors
MODES = {                                  # with which of the five a flag goes, where not with all
    "max_len": ("text", "embed", "evaluate", "benchmark"), "text_pair": ("text",), "context": ("text",),
    "to": ("embed",), "engine": ("text", "embed", "evaluate", "size"),
    "task": ("evaluate",), "against": ("evaluate",), "data": ("evaluate",), "split": ("evaluate",),
    "predictions": ("evaluate",), "limit": ("evaluate",), "agreement": ("evaluate",), "batch_size": ("benchmark",),
    "random": ("benchmark", "size"), "sparsity": ("benchmark", "size"), "pattern": ("benchmark", "size"),
}


def parse(arguments, description, engines):
    """Command line -> settings. Exits with code 2 on an unknown flag or value. engines: what --engine may be."""
    parser = Parser("infer_cpu.py", description=description)
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="a directory that train.py wrote")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--text", action="append", help="a text to classify, or a question; may be given several times")
    mode.add_argument("--embed", metavar="FILE", help="a vector for every line of a file, or of - (standard input)")
    mode.add_argument("--evaluate", action="store_true", help="metrics on the task's dev set")
    mode.add_argument("--benchmark", action="store_true", help="time every engine")
    mode.add_argument("--size", action="store_true", help="count the bytes, layer kind by layer kind")
    parser.add_argument("--engine", choices=engines, default="auto")
    parser.add_argument("--threads", type=thread_count, help="default: torch's own choice")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--max-len", type=positive_int, help="tokens of a row; default: as trained, "
                        "else the task's 128 or 384, else all the model takes; with --benchmark 128")
    parser.add_argument("--text-pair", action="append", default=[], help="tasks on pairs: the second text, per --text")
    parser.add_argument("--context", action="append", default=[], help="questions: the passage, once or per --text")
    parser.add_argument("--to", metavar="FILE", help="with --embed: a .npy, or .jsonl as on standard output by default")
    parser.add_argument("--task", choices=(*TASKS, *OF_VECTORS), help="with --evaluate; default: what the model was "
                        "trained on; of an encoder: retrieval (SQuAD's paragraphs by its questions), stsb (likeness)")
    parser.add_argument("--against", metavar="DIR", help="with --task retrieval or stsb: another encoder, to compare")
    parser.add_argument("--data", metavar="DIR", help="with --evaluate: the task folders; default: the tiny world")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="with --evaluate; test has no labels")
    parser.add_argument("--predictions", metavar="FOLDER", help="with --evaluate: write them there, as GLUE's server "
                        "and SQuAD's script take them")
    parser.add_argument("--limit", type=positive_int, help="with --evaluate: only so many examples of a dev set")
    parser.add_argument("--agreement", action="store_true", help="with --evaluate: compare with the fake-quant model")
    parser.add_argument("--batch-size", type=positive_ints, default=[1, 16], help="with --benchmark: for example 1,16")
    parser.add_argument("--random", choices=tuple(PRESETS), help="with --benchmark, --size: random weights")
    parser.add_argument("--sparsity", type=float, help="with --random: share of zeros; default 0.85")
    parser.add_argument("--pattern", default="unstructured", help="with --random: unstructured, 1x4, RxC or N:M")
    settings = parser.parse_args(arguments)
    if (settings.model is None) != bool(settings.random):
        parser.error("give either MODEL_DIR or --random PRESET")
    mode = next(name for name in ("text", "embed", "evaluate", "benchmark", "size")
                if getattr(settings, name) not in (None, False))
    for name, modes in MODES.items():
        if mode not in modes and getattr(settings, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} goes with {' or '.join('--' + each for each in modes)}, not with "
                         f"--{mode}")
    if settings.split == "test" and not settings.predictions:
        parser.error("--split test has no labels, so that there is nothing but predictions; give --predictions FOLDER")
    if settings.to and not settings.to.endswith((".npy", ".jsonl")):
        parser.error(f"--to {settings.to} names no .npy or .jsonl file")
    if not settings.random and (settings.sparsity is not None or settings.pattern != parser.get_default("pattern")):
        parser.error("--sparsity and --pattern go with --random; a model has its own")
    if settings.task in OF_VECTORS and (settings.predictions or settings.agreement):
        parser.error(f"--predictions and --agreement go with a task for classes or answers; beside --task "
                     f"{settings.task}, --against DIR compares")
    if settings.against and settings.task not in OF_VECTORS:
        parser.error("--against goes with --task retrieval or stsb")
    return settings


@contextlib.contextmanager
def in_one_sentence():
    """Runs a block: what a person can mend ends it with one sentence and exit code 2, Ctrl-C with 130; a reader of the
    standard output who has enough (`| head`) ends it quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # Python flushes it once more at its end
    except KeyboardInterrupt:
        print("infer_cpu.py: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else reason_of(
            error, "--max-len, or with --benchmark a smaller --batch-size", then="")
        if reason is None:
            raise
        print(f"infer_cpu.py: {reason}", file=sys.stderr)
        sys.exit(2)
