"""Files of text and of tasks in, batches of tensors out.

    text.py       sentences, tokenized documents, batches for masked-word pre-training
    wordpiece.py  the WordPiece tokenizer: learnt, read from a model directory as transformers reads it, written
    corpus.py     text files, WikiExtractor's output and Wikipedia dumps, read as a stream of documents
    shards.py     a corpus of any size as token shards, memory-mapped
    tasks.py      SST-2, MNLI, QQP, QNLI and SQuAD in their published formats, batches for fine-tuning, evaluation
    metrics.py    accuracy, F1, SQuAD exact match and F1, the best answer span
    tiny.py       a small invented world: text and all five tasks, so that everything runs without a download
    download.py   the published task files and Wikipedia's dump, fetched, verified and unpacked for the readers
    batches.py    a step's rows, shared among processes, made while the step before it computes
    calibrate.py  what layers read, for pruning all at once
    evaluate.py   the metrics of a model
    encode.py     what a person types, or a task's files, as batches for the model in a directory
    embed.py      texts and lines as vectors, by an encoder; retrieval
    recipes.py    hyper-parameters, with the source of each number
    settings.py   what the settings of train.py lead to, and which of them cannot be
    flags.py      the flags of infer_cpu.py

One rule holds for every batch: row r of step s is a pure function of (seed, s, r). One process with 16 rows, four
micro-batches of 4, and two machines with 8 each therefore train on the same rows, and a run resumed at step s goes on
exactly as if it had never stopped. Nothing has to be saved for that.
"""

from pathlib import Path

from formats.files import demand_content
from model import InputError


class DataError(InputError):
    """A mistake in a file, not in the program. The message is the one sentence the person at the keyboard reads:
    which file and line, what was found there, what was expected, and what to do."""


def decode(content: bytes, path: Path, line: int = 1) -> str:
    """The content of the file `path` from `line` on as text with "\\n" line ends; DataError names the line that is not
    UTF-8.

    Callers cut it into lines with split("\\n"), not splitlines(), which also cuts at U+2028, form feeds and other signs
    that occur inside the fields of published task files.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")     # the byte order mark some editors put first
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: the byte 0x{content[error.start]:02x} is not UTF-8 text; "
                        "save the file as UTF-8 and start again") from None
    return text.replace("\r\n", "\n")


def read_text(path: str | Path) -> str:
    """The whole UTF-8 text file at `path`; DataError if there is no such file or it is not UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; check the path")
    try:
        demand_content(path)
    except InputError as error:
        raise DataError(str(error)) from None
    return decode(path.read_bytes(), path)
