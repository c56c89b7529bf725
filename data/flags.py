"""The command line of infer_cpu.py: its flags, which of them go together, and how it ends."""
import contextlib
import os
import sys

from data import DataError
from data.tasks import TASKS
from formats.command import Parser, positive_int, positive_ints, thread_count
from formats.run import reason_of
from model import PRESETS, InputError

OF_VECTORS = ("retrieval", "stsb")         # what --evaluate measures of an encoder's vectors


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
    parser.add_argument("--max-len", type=positive_int, help="tokens per row; default: as trained, or 128")
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
    if settings.predictions and not settings.evaluate:
        parser.error("--predictions goes with --evaluate")
    if settings.split == "test" and not settings.predictions:
        parser.error("--split test has no labels, so that there is nothing but predictions; give --predictions FOLDER")
    if settings.to and not (settings.embed and settings.to.endswith((".npy", ".jsonl"))):
        parser.error("--to goes with --embed, and names a .npy or .jsonl file")
    if settings.task in OF_VECTORS and (settings.predictions or settings.agreement):
        parser.error(f"--predictions and --agreement go with a task for classes or answers; beside --task "
                     f"{settings.task}, --against DIR compares")
    if settings.against and not (settings.evaluate and settings.task in OF_VECTORS):
        parser.error("--against goes with --evaluate --task retrieval or stsb")
    if (settings.text_pair or settings.context) and not settings.text:
        parser.error("--text-pair and --context go with --text")
    if settings.limit and not settings.evaluate:
        parser.error("--limit goes with --evaluate")
    if settings.random and not (settings.benchmark or settings.size):
        parser.error("--random has random weights: it goes with --benchmark and --size only")
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
        reason = str(error) if isinstance(error, (InputError, DataError)) else reason_of(
            error, "--batch-size or --max-len", then="")
        if reason is None:
            raise
        print(f"infer_cpu.py: {reason}", file=sys.stderr)
        sys.exit(2)
