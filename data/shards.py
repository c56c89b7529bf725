"""Token shards: a corpus too large for memory, tokenized once, on all cores, and memory-mapped from then on.

    python -m data.shards CORPUS --tokenizer DIR [--out DIR]       prepares without training; train.py does it by itself

CORPUS is anything that corpus.py reads. Less than 64 MB of it are tokenized in memory whenever they are used. More are
kept in the folder CORPUS.tokens beside it (--out names another). CORPUS may itself be such a folder, which is then used
as it is, without the text. It holds

    00000.bin, 00001.bin, ...   whole documents: the arrays `documents`, `sentences` and `tokens` of text.Shard in turn
    vocab.txt and so on         the tokenizer
    index.json                  what it was made from (names, sizes and times of the files, hash of the tokenizer) and
                                how long the arrays are; written last, and called progress.json until then

Killed at any moment, the same command goes on after the last whole shard, and the bytes are the same. A folder made
from another text or by another tokenizer is refused, never overwritten. All this takes less than 1 GB however long the
text is; the shards are mapped, so the system may keep them in whatever memory nobody else wants.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data import DataError
from data.corpus import Documents, corpus_files, no_text, sentences, stored_documents
from data.text import Shard, load_tokenizer, save_tokenizer, token_type, tokenize, train_tokenizer
from formats.files import lock_folder, unlock

VERSION = 1                 # of the folder; raised when the same text would give other bytes
SMALL = 64 << 20            # bytes of text from which on it is kept in shards
SHARD = 64 << 20            # characters in a shard, but at least bytes of the corpus / 128: each keeps a file open
BATCH = 1 << 20             # characters handed to the tokenizer at a time
SAMPLE = 64 << 20           # characters that a new tokenizer learns from: the memory for that grows with them
HINT = "prepare another folder with python -m data.shards CORPUS --tokenizer DIR --out FOLDER, and name it as --corpus"


# ---------------------------------------------------------------- sentences to tokens

class Batch(NamedTuple):
    documents: list[list[str]]          # of sentences
    place: tuple[int, int, int]         # behind them: number of the file, documents read of it, bytes read of all files
    ends_shard: bool


def batches(files: list[Path], characters: int, place: Iterable[int] = (0, 0, 0)) -> Iterator[Batch]:
    """The documents behind `place`; a shard ends with the document that makes it `characters` long."""
    begin, skipped, _ = place
    documents, size, shard_size, before = [], 0, 0, sum(file.stat().st_size for file in files[:begin])
    for number, file in enumerate(files[begin:], begin):
        for count, (document, position) in enumerate(stored_documents(file), 1):
            if count <= skipped:
                continue
            documents.append(sentences(document))
            length = sum(map(len, documents[-1]))
            size, shard_size = size + length, shard_size + length
            if size >= BATCH or shard_size >= characters:
                yield Batch(documents, (number, count, before + position), shard_size >= characters)
                documents, size, shard_size = [], 0, shard_size if shard_size < characters else 0
        skipped, before = 0, before + file.stat().st_size
    if documents or shard_size:
        yield Batch(documents, (len(files), 0, before), True)


def tokenized(stream: Iterable[Batch], tokenizer: Tokenizer) -> Iterator[tuple[Shard, Batch]]:
    """Each batch with its tokens, in order. The library uses all cores, but for the beginning and the end of a batch;
    a second one under way fills these gaps, and meanwhile this thread reads on."""
    waiting = deque()
    with ThreadPoolExecutor(2) as pool:
        for batch in stream:
            waiting.append((pool.submit(tokenize, batch.documents, tokenizer), batch))
            if len(waiting) > 2:
                future, batch = waiting.popleft()
                yield future.result(), batch
        for future, batch in waiting:
            yield future.result(), batch


def joined_offsets(pieces: list[Shard], name: str) -> np.ndarray:
    """The array `sentences` or `documents` of the pieces one after the other."""
    offsets = [getattr(piece, name) for piece in pieces]
    begins = np.cumsum([0] + [int(part[-1]) for part in offsets])
    return np.concatenate([np.zeros(1, np.int64), *(part[1:] + begin for part, begin in zip(offsets, begins))],
                          dtype=np.uint32, casting="unsafe")


# ---------------------------------------------------------------- the folder

def is_folder_of_shards(corpus: Path) -> bool:
    """DataError if it is one, but not finished."""
    if (corpus / "progress.json").is_file() and (corpus / "00000.bin").is_file():
        raise DataError(f"{corpus}: these tokens are not finished; give the command again that began them")
    return (corpus / "index.json").is_file() and (corpus / "tokenizer.json").is_file()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Names what decides about the tokens of a sentence."""
    parts = json.loads(tokenizer.to_str())
    deciding = {name: parts[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def read_index(path: Path, expected: dict) -> dict:
    """The content of index.json or progress.json; DataError if it is damaged or differs from `expected`."""
    try:
        index = json.loads(path.read_bytes())
        differing = [name for name, value in expected.items() if index[name] != value]
        for shard in index["shards"]:
            shard["file"] + "", *shard["place"], shard["documents"] + shard["sentences"] + shard["tokens"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: this file is damaged; remove its folder, and it is made again") from None
    if differing:
        reason = {"version": "by another version of this program", "tokenizer": "with another tokenizer",
                  "text": "from another text, or the text has changed"}[differing[0]]
        raise DataError(f"{path.parent}: these tokens were made {reason}; remove the folder, or {HINT}")
    return index


def shard_is_whole(path: Path, entry: dict, itemsize: int) -> bool:
    size = 4 * (entry["documents"] + 1 + entry["sentences"] + 1) + itemsize * entry["tokens"]
    return path.is_file() and path.stat().st_size == size


def map_shards(folder: str | Path, tokenizer: Tokenizer) -> list[Shard]:
    """The shards of a finished folder, mapped: hardly anything is read. DataError if one is damaged or missing, or if
    they were made with another tokenizer."""
    folder, dtype, shards = Path(folder), token_type(tokenizer), []
    index = read_index(folder / "index.json", {"version": VERSION, "tokenizer": tokenizer_hash(tokenizer)})
    for entry in index["shards"]:
        path = folder / entry["file"]
        good = shard_is_whole(path, entry, dtype.itemsize)
        if good:
            content = np.asarray(np.memmap(path, mode="r"))
            first, second = 4 * (entry["documents"] + 1), 4 * (entry["documents"] + entry["sentences"] + 2)
            documents, sentence_ends = content[:first].view(np.uint32), content[first:second].view(np.uint32)
            shards.append(Shard(content[second:].view(dtype), sentence_ends, documents))
            good = ((documents[0], documents[-1], sentence_ends[0], sentence_ends[-1])
                    == (0, entry["sentences"], 0, entry["tokens"]))
        if not good:
            raise DataError(f"{path}: this shard of tokens is damaged or missing; remove its folder, and it is made "
                            "again")
    return shards


def write_whole(path: Path, parts: Iterable) -> None:
    """Write bytes or arrays, so that a reader finds the old file, the new one or none, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path):
    """Waits until no other process writes into the folder."""
    try:
        descriptor = lock_folder(folder)
    except BlockingIOError:
        print(f"{folder}: waiting for another process that prepares the same text", file=sys.stderr)
        descriptor = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        unlock(descriptor)


def prepare(corpus: str | Path, tokenizer: Tokenizer, folder: str | Path | None = None) -> Path:
    """Tokenize a corpus into `folder`, by default CORPUS.tokens, going on where an earlier call was stopped.

    Returns the folder. Raises DataError if the text is damaged or empty, or if the folder cannot be written or holds
    something else. The shards that are whole stay, unless there is none: then nothing stays.
    """
    corpus = Path(corpus)
    if is_folder_of_shards(corpus):
        raise DataError(f"{corpus}: this folder already holds tokens; give the text they are to be made from")
    files, folder = corpus_files(corpus), Path(folder or f"{os.path.abspath(corpus)}.tokens")
    root, facts = corpus if corpus.is_dir() else corpus.parent, [file.stat() for file in files]
    text = [[file.relative_to(root).as_posix(), fact.st_size, fact.st_mtime_ns] for file, fact in zip(files, facts)]
    index = {"version": VERSION, "tokenizer": tokenizer_hash(tokenizer), "text": text}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if (folder / "index.json").is_file():
                read_index(folder / "index.json", index)
                return folder
            if (folder / "progress.json").is_file():
                index = read_index(folder / "progress.json", index)
            elif any(file.suffix != ".tmp" for file in folder.iterdir()):
                raise DataError(f"{folder}: this folder holds other files; remove it, or {HINT}")
            else:
                index["shards"] = []
            for left in folder.glob(".*.tmp"):                              # by a process that was killed
                left.unlink()
            try:
                _write_shards(files, tokenizer, folder, index)
                if not sum(shard["documents"] for shard in index["shards"]):
                    raise no_text(corpus)
                save_tokenizer(tokenizer, folder)
                os.replace(folder / "progress.json", folder / "index.json")
            finally:
                if not index["shards"]:
                    for name in ("00000.bin", "progress.json"):
                        (folder / name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):
                        folder.rmdir()
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); see to the disk, or {HINT}") from None
    return folder


def _write_shards(files: list[Path], tokenizer: Tokenizer, folder: Path, index: dict) -> None:
    """Write the shards that are missing and add them to `index`, which progress.json follows."""
    itemsize, total = token_type(tokenizer).itemsize, sum(size for _, size, _ in index["text"])
    index["shards"] = list(itertools.takewhile(
        lambda entry: shard_is_whole(folder / entry["file"], entry, itemsize), index["shards"]))
    write_whole(folder / "progress.json", [json.dumps(index, indent=1).encode()])
    place = index["shards"][-1]["place"] if index["shards"] else (0, 0, 0)
    pieces, tokens = [], 0
    with tqdm(total=total, initial=place[2], unit="B", unit_scale=True, desc=folder.name, mininterval=0.5) as bar:
        for piece, batch in tokenized(batches(files, max(SHARD, total // 128), place), tokenizer):
            tokens += len(piece.tokens)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)
            bar.update(batch.place[2] - bar.n)
            pieces.append(piece)
            if batch.ends_shard:
                name, offsets = f"{len(index['shards']):05}.bin", [joined_offsets(pieces, "documents"),
                                                                   joined_offsets(pieces, "sentences")]
                write_whole(folder / name, [*offsets, *(piece.tokens for piece in pieces)])
                index["shards"].append({"file": name, "documents": len(offsets[0]) - 1, "place": batch.place,
                                        "sentences": len(offsets[1]) - 1, "tokens": int(offsets[1][-1])})
                write_whole(folder / "progress.json", [json.dumps(index, indent=1).encode()])
                pieces = []


# ---------------------------------------------------------------- what train.py calls

def open_corpus(corpus: str | Path, tokenizer: Tokenizer) -> list[Shard]:
    """The tokens of a corpus, for text.PretrainingData: in memory if it is small, else mapped from its folder of
    shards, which is made first if there is none. Raises DataError."""
    corpus = Path(corpus)
    if is_folder_of_shards(corpus):
        return map_shards(corpus, tokenizer)
    files = corpus_files(corpus)
    if sum(file.stat().st_size for file in files) >= SMALL:
        return map_shards(prepare(corpus, tokenizer), tokenizer)
    pieces = [piece for piece, _ in tokenized(batches(files, SMALL), tokenizer)]
    if not sum(len(piece.tokens) for piece in pieces):
        raise no_text(corpus)
    return [Shard(np.concatenate([piece.tokens for piece in pieces]), joined_offsets(pieces, "sentences"),
                  joined_offsets(pieces, "documents"))]


def corpus_tokenizer(corpus: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder of shards; or one learnt from a corpus, from 64 MB of it if it is larger. Raises
    DataError."""
    corpus = Path(corpus)
    if is_folder_of_shards(corpus):
        return load_tokenizer(corpus)
    documents = Documents(corpus, SAMPLE)
    if next(iter(documents), None) is None:
        raise no_text(corpus)
    return train_tokenizer(documents, vocab_size)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m data.shards", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", help="a text file, a Wikipedia dump, or a folder")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a model directory, or a vocab.txt")
    parser.add_argument("--out", metavar="DIR", help="folder of the shards; default: CORPUS.tokens")
    arguments = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        folder = prepare(arguments.corpus, tokenizer, arguments.out)
        shards = map_shards(folder, tokenizer)
    except DataError as error:
        print(f"data.shards: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.shards: stopped; the same command goes on after the last whole shard", file=sys.stderr)
        sys.exit(130)
    print(f"{folder}: {sum(len(shard.documents) - 1 for shard in shards):,} documents, "
          f"{sum(len(shard.tokens) for shard in shards):,} tokens, {len(shards)} shards")


if __name__ == "__main__":
    main()
