"""data/corpus.py and data/shards.py: what is read, what is kept, what a killed run leaves. All text is made here."""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import DataError, shards
from data.corpus import Documents, read_documents
from data.text import CUTS, SPECIAL_TOKENS, PretrainingData, Shard, bert_tokenizer, save_tokenizer, tokenize
from formats import files

ROOT = Path(train.__file__).resolve().parent
WORDS = "apple bread chair dream eagle forest garden honey island jungle".split()


def make_tokenizer(size=0):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *WORDS, ".", *letters, *(f"##{letter}" for letter in letters),
                            *(f"x{number}" for number in range(size))])
    return bert_tokenizer({token: number for number, token in enumerate(tokens)})


TOKENIZER = make_tokenizer()


def make_documents(count, seed=0):
    generator = random.Random(seed)
    return [[" ".join([f"D{d}s{s}", *generator.choices(WORDS, k=generator.randint(1, 12))]) + "."
             for s in range(generator.randint(1, 9))] for d in range(count)]


@pytest.fixture
def text(tmp_path):
    """Three files of 40 documents each; a document has all its sentences on one line, or each on its own."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        documents = make_documents(40, seed=number)
        (folder / f"{number}.txt").write_text("\n\n".join(
            (" " if d % 2 else "\n").join(document) for d, document in enumerate(documents)))
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3000)
    monkeypatch.setattr(shards, "BATCH", 700)


def message(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- shards

@pytest.mark.parametrize("size", [0, 70_000])
def test_shards_hold_every_sentence_of_every_document(text, small_shards, size):
    tokenizer = make_tokenizer(size)
    folder = shards.prepare(text, tokenizer)
    assert folder == text.with_name("text.tokens")
    mapped = shards.map_shards(folder, tokenizer)
    expected = [document for number in range(3) for document in make_documents(40, seed=number)]
    position = 0
    for shard in mapped:
        assert shard.tokens.dtype == (np.uint32 if size else np.uint16)
        assert isinstance(shard.tokens.base.base, np.memmap)
        characters = 0
        for first, last in zip(shard.documents, shard.documents[1:]):
            found = [shard.tokens[shard.sentences[s]:shard.sentences[s + 1]].tolist() for s in range(first, last)]
            assert characters < 3000        # the document that reaches it is the last
            assert found == [tokenizer.encode(s, add_special_tokens=False).ids for s in expected[position]]
            characters += sum(map(len, expected[position]))
            position += 1
        assert characters >= 3000 or shard is mapped[-1]
    assert position == 120 and len(mapped) > 5
    assert sorted(content(folder)) == [*(f"{n:05}.bin" for n in range(len(mapped))), "index.json", "tokenizer.json",
                                       "tokenizer_config.json", "vocab.txt"]


def same_rows(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(left, right))


@pytest.mark.parametrize("next_sentence", [True, False])
def test_shards_give_the_samples_of_the_text_in_memory(text, small_shards, next_sentence):
    def data(documents):
        return PretrainingData(documents, TOKENIZER, 32, next_sentence=next_sentence, seed=5, short_probability=0.3)

    memory, whole = data(read_documents(text)), data(shards.open_corpus(text, TOKENIZER))
    mapped = data(shards.map_shards(shards.prepare(text, TOKENIZER), TOKENIZER))
    assert len(memory.shards) == len(whole.shards) == 1 and len(mapped.shards) > 5
    for other in (whole, mapped):
        assert list(other.training_spans) == list(memory.training_spans) and len(other) == len(memory)
        assert same_rows(memory.rows(3, len(memory) // 2), other.rows(3, len(memory) // 2))     # into a second epoch
        for left, right in zip(memory.validation_batches(8), other.validation_batches(8), strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("next_sentence", [True, False])
def test_spans_are_cut_as_counting_sentence_by_sentence_cuts_them(next_sentence):
    generator = np.random.default_rng(0)        # with runs of sentences in which no span begins, and long documents
    documents = [generator.integers(1, 9 if d % 3 else 200, size=generator.integers(1, 1500)) for d in range(40)]
    pieces = []
    for group in (documents[:7], documents[7:8], documents[8:]):
        lengths = np.concatenate(group)
        pieces.append(Shard(np.zeros(lengths.sum(), np.uint16), np.cumsum([0, *lengths]).astype(np.uint32),
                            np.cumsum([0, *map(len, group)]).astype(np.uint32)))
    data = PretrainingData(pieces, TOKENIZER, 4000, next_sentence=next_sentence, seed=2, short_probability=0.4,
                           validation_share=0.25)
    sentence, longest = 0, 4000 - (3 if next_sentence else 1)
    for found, group, seed in ((data.validation_spans, documents[:10], 0), (data.training_spans, documents[10:], 2)):
        random_numbers, expected = np.random.default_rng((seed, CUTS)), []
        for document in group:
            begin = length = target = 0
            for number, tokens in enumerate(document):
                if not target:
                    short = random_numbers.random() < 0.4
                    target = int(random_numbers.integers(2, longest + 1)) if short else longest
                length += tokens + (not next_sentence)
                if length >= target or number == len(document) - 1:
                    expected.append((sentence + begin, sentence + number + 1, target))
                    begin, length, target = number + 1, 0, 0
            sentence += len(document)
        assert list(found) == expected and len(found) == len(expected) > 10


def test_the_first_documents_are_for_validation_across_shards(text, small_shards):
    data = PretrainingData(shards.map_shards(shards.prepare(text, TOKENIZER), TOKENIZER), TOKENIZER, 32,
                           validation_share=0.4)
    expected = [document for number in range(3) for document in make_documents(40, seed=number)]
    assert (data.validation_split, data.training_split) == ((0, 48), (48, 120))
    boundary = sum(map(len, expected[:48]))
    assert data.first_sentence[1] < boundary < data.first_sentence[-2]          # within a shard that is not the first
    assert data.validation_spans[len(data.validation_spans) - 1][1] == data.training_spans[0][0] == boundary
    ends = set(np.cumsum([len(document) for document in expected]))
    for begin, end, _ in data.training_spans:
        assert not any(begin < bound < end for bound in ends)
    tokens = {TOKENIZER.decode(row["input_ids"][:4].tolist()) for row in data.rows(0, len(data))}
    assert len(tokens) > 50


def test_spans_take_few_bytes_each():
    """A hundred million of them, and an epoch's order, must fit in less than a gigabyte."""
    sentences, count = 10_000, 10
    piece = Shard(np.zeros(sentences * 10, np.uint16), np.arange(0, sentences * 10 + 1, 10, dtype=np.uint32),
                  np.arange(0, sentences + 1, 100, dtype=np.uint32))
    tracemalloc.start()
    try:
        data = PretrainingData([piece] * count, TOKENIZER, 23)      # 20 tokens, two sentences
        data._training_order(0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) > 45_000 and kept / len(data) < 8 and peak / len(data) < 14


# ---------------------------------------------------------------- stopped and gone on

STOPPED = """
import os, signal, sys
from data import shards, text
shards.SHARD, shards.BATCH, replace = 9000, 2000, os.replace
tokenizer, folder = text.load_tokenizer(sys.argv[2]), sys.argv[3]
for last in range(100):
    for way in ("before", "after"):
        child = os.fork()
        if not child:
            calls = 0
            def stop_at(source, target):
                global calls
                calls += 1
                if calls > last and way == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)
                if calls > last:
                    os.kill(os.getpid(), signal.SIGKILL)
            os.replace = stop_at
            shards.prepare(sys.argv[1], tokenizer, f"{folder}/{last} {way}")
            os._exit(0)
        if not os.waitpid(child, 0)[1]:
            sys.exit()
"""


def resume(text, out, expected):
    """Goes on in `out`, where a run was stopped; what was whole must not be made a second time."""
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    if (out / "progress.json").is_file():
        listed = [entry["file"] for entry in json.loads((out / "progress.json").read_text())["shards"]]
        times = {path: time for path, time in times.items() if path.name in listed}
        if listed:
            assert "not finished" in message(shards.open_corpus, out, TOKENIZER)
    assert content(shards.prepare(text, TOKENIZER, out)) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    return len(times)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_run_goes_on_and_gives_the_same_bytes(text, tmp_path, small_shards, monkeypatch):
    """SIGKILL before and after each file gets its name."""
    monkeypatch.setattr(shards, "SHARD", 9000)
    monkeypatch.setattr(shards, "BATCH", 2000)
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "killed").mkdir()
    subprocess.run([sys.executable, "-c", STOPPED, text, tmp_path / "tokenizer", tmp_path / "killed"], cwd=ROOT,
                   check=True)
    expected = content(shards.prepare(text, TOKENIZER, tmp_path / "whole"))
    count = len([name for name in expected if name.endswith(".bin")])
    kept = [resume(text, out, expected) for out in (tmp_path / "killed").iterdir()]
    assert count == 4 and set(kept) == {0, 1, 2, 3, 4}
    assert len(kept) == 2 * (1 + 2 * count + 3 + 1) + 1     # progress.json, then twice a shard, vocabulary, index.json


class Stopped(BaseException):
    pass


def test_a_run_that_is_stopped_politely_goes_on(text, tmp_path, small_shards, monkeypatch):
    """As after Ctrl-C, after every step of writing a shard."""
    monkeypatch.setattr(shards, "SHARD", 9000)
    expected = content(shards.prepare(text, TOKENIZER, tmp_path / "whole"))
    for last in range(18):                      # progress.json, then each of four shards and progress.json again
        left = itertools.count(last, -1)

        def stopping(call):
            def stop_after(*arguments):
                call(*arguments)
                if not next(left):
                    raise Stopped
            return stop_after

        out = tmp_path / str(last)
        with monkeypatch.context() as patch:
            patch.setattr(shards.os, "fsync", stopping(os.fsync))
            patch.setattr(shards.os, "replace", stopping(os.replace))
            with pytest.raises(Stopped):
                shards.prepare(text, TOKENIZER, out)
        assert not list(tmp_path.glob("*/*.tmp")) and out.exists() == (last > 3)
        assert resume(text, out, expected) == max(0, (last - 1) // 4)


def test_a_full_disk_is_one_sentence_and_leaves_whole_shards(text, tmp_path, small_shards, monkeypatch):
    out, expected = tmp_path / "out", content(shards.prepare(text, TOKENIZER, tmp_path / "whole"))
    for room in (0, 1, 6):
        left = itertools.count(room, -1)

        def full(descriptor):
            if next(left) <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards.os, "fsync", full)
        assert message(shards.prepare, text, TOKENIZER, out).startswith(
            f"{out}: cannot be written (No space left on device)")
        found = content(out) if out.exists() else {}
        assert found.keys() <= {"progress.json", "00000.bin", "00001.bin", "00002.bin"} and bool(found) == (room > 1)
        assert all(expected[name] == raw for name, raw in found.items() if name != "progress.json")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD", 3000)
    assert content(shards.prepare(text, TOKENIZER, out)) == expected
    (tmp_path / "file").write_text("")
    assert "cannot be written (" in message(shards.prepare, text, TOKENIZER, tmp_path / "file" / "out")


def test_two_processes_share_the_work_of_one(text, small_shards, monkeypatch):
    made, begun, tokenized = [], threading.Barrier(2), shards.tokenized
    monkeypatch.setattr(shards, "tokenized", lambda *arguments: made.append(1) or tokenized(*arguments))

    def prepare():
        begun.wait()
        shards.prepare(text, TOKENIZER)

    threads = [threading.Thread(target=prepare) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    if files.fcntl:
        assert made == [1]
    assert sum(len(shard.documents) - 1 for shard in shards.map_shards(text.with_name("text.tokens"), TOKENIZER)) == 120


# ---------------------------------------------------------------- folders that do not fit

def test_tokens_of_another_text_or_tokenizer_are_refused_and_kept(text, tmp_path, small_shards, monkeypatch):
    folder = shards.prepare(text, TOKENIZER)
    expected, other = content(folder), make_tokenizer(1)
    for call in (lambda: shards.prepare(text, other), lambda: shards.map_shards(folder, other),
                 lambda: shards.open_corpus(folder, other)):
        assert message(call).startswith(f"{folder}: these tokens were made with another tokenizer; remove the folder")
    facts = (text / "1.txt").stat()
    os.utime(text / "1.txt", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert "from another text, or the text has changed" in message(shards.prepare, text, TOKENIZER)
    assert len(shards.open_corpus(folder, TOKENIZER)) > 5           # the folder itself is used without its text
    os.utime(text / "1.txt", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    shards.prepare(text, TOKENIZER)
    (text / "3.txt").write_text("More.")
    assert "from another text" in message(shards.prepare, text, TOKENIZER)
    (text / "3.txt").unlink()
    monkeypatch.setattr(shards, "VERSION", 2)
    assert "by another version" in message(shards.prepare, text, TOKENIZER)
    assert "by another version" in message(shards.open_corpus, folder, TOKENIZER)
    assert content(folder) == expected
    assert "already holds tokens" in message(shards.prepare, folder, TOKENIZER)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "holds other files" in message(shards.prepare, text, TOKENIZER, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_the_same_tokenizer_from_other_files_fits(text, tmp_path, small_shards):
    folder = shards.prepare(text, TOKENIZER)
    save_tokenizer(TOKENIZER, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    for source in (folder, tmp_path / "model", tmp_path / "model" / "vocab.txt"):
        assert shards.map_shards(folder, shards.load_tokenizer(source))


def test_damaged_folders_are_noticed(text, small_shards):
    folder = shards.prepare(text, TOKENIZER)
    shard, index = folder / "00002.bin", folder / "index.json"
    whole, listed = shard.read_bytes(), index.read_bytes()
    for raw in (whole[:-1], whole + b"\0", b"", bytes(len(whole))):
        shard.write_bytes(raw)
        assert message(shards.open_corpus, folder, TOKENIZER).startswith(f"{shard}: this shard of tokens is damaged")
    shard.unlink()
    assert "damaged or missing" in message(shards.open_corpus, folder, TOKENIZER)
    shard.write_bytes(whole)
    for raw in (listed[:-9], b"[]", b"\xff", listed.replace(b'"shards"', b'"shard"'),
                listed.replace(b'"tokens"', b'""')):
        index.write_bytes(raw)
        assert message(shards.open_corpus, folder, TOKENIZER).startswith(f"{index}: this file is damaged")
    index.write_bytes(listed)
    assert shards.open_corpus(folder, TOKENIZER)


def test_an_unfinished_folder_goes_on_before_a_damaged_shard(text, small_shards):
    folder = shards.prepare(text, TOKENIZER)
    expected = content(folder)
    os.replace(folder / "index.json", folder / "progress.json")
    (folder / "00003.bin").write_bytes(b"half")
    shards.prepare(text, TOKENIZER)
    assert content(folder) == expected


# ---------------------------------------------------------------- small and large, train.py, the command

def test_only_large_corpora_are_kept_on_disk(text, small_shards, monkeypatch):
    size = sum(path.stat().st_size for path in text.iterdir())
    monkeypatch.setattr(shards, "SMALL", size + 1)
    memory, = shards.open_corpus(text, TOKENIZER)
    assert not text.with_name("text.tokens").exists()
    for ours, theirs in zip(memory, tokenize(read_documents(text), TOKENIZER), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    monkeypatch.setattr(shards, "SMALL", size)
    assert len(shards.open_corpus(text, TOKENIZER)) > 5
    monkeypatch.setattr(shards, "tokenized", None)
    assert len(shards.open_corpus(text, TOKENIZER)) == len(shards.open_corpus(text.with_name("text.tokens"), TOKENIZER))


def test_a_tokenizer_learns_from_the_beginning_of_every_file(text):
    for limit in (1, 2000, 9000):
        sample = list(Documents(text, limit))
        taken = sum(len(sentence) for document in sample for sentence in document)
        assert limit <= taken < limit + 9 * 90      # and one document at most
        files = {number: [document for document in sample if document in make_documents(40, seed=number)]
                 for number in range(3)}
        assert sum(map(len, files.values())) == len(sample)
        for number, found in files.items():
            assert found == make_documents(40, seed=number)[:len(found)] and (found or limit == 1)
    assert list(Documents(text, 64 << 20)) == list(Documents(text)) == read_documents(text)


def test_train_uses_shards_of_a_large_corpus_and_their_tokenizer(text, small_shards, monkeypatch):
    monkeypatch.setattr(shards, "SMALL", 0)

    def build(path):
        settings = train.resolve({"stage": "pretrain", "corpus": str(path), "max_len": 32, "threads": 1})
        return train.build_model_and_data(settings, None, print)[1:3]

    tokenizer, data = build(text)
    assert len(data.shards) > 5 and tokenizer.get_vocab_size() > 50
    again, from_folder = build(text.with_name("text.tokens"))
    assert again.get_vocab() == tokenizer.get_vocab() and same_rows(data.rows(0, 50), from_folder.rows(0, 50))


def test_the_command_prepares_and_explains(text, tmp_path, small_shards, capsys):
    save_tokenizer(TOKENIZER, tmp_path / "model")
    shards.main([str(text), "--tokenizer", str(tmp_path / "model" / "vocab.txt"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'out'}: 120 documents, ") and "tokens/s" in printed.err
    assert "100%" in printed.err
    (text / "4.txt").write_bytes(b"\xff")
    for arguments in ([str(text), "--tokenizer", str(tmp_path / "model")], [str(text), "--tokenizer", str(tmp_path)]):
        with pytest.raises(SystemExit) as caught:
            shards.main(arguments)
        assert caught.value.code == 2
        error = capsys.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
        assert error.startswith("data.shards: ")
    with pytest.raises(SystemExit) as caught:
        shards.main([str(text)])
    assert caught.value.code == 2


MEMORY = """
import resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from data import shards
def peak():
    status = Path("/proc/self/status")      # there ru_maxrss would begin with the memory of the parent
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"[{n}]": n for n in range(1, 9)}}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
shards.SHARD = shards.BATCH = 1 << 18
line = ("x" * 99 + " ") * 20 + "\\n"
for name, megabytes in (("small", 2), ("large", 32)):
    with open(folder / name, "w") as file:
        for _ in range(megabytes * 10):
            file.write(line * 50 + "\\n")
    shards.prepare(folder / name, tokenizer)
    documents = sum(1 for document in shards.Documents(folder / name))
    mapped = shards.map_shards(folder / f"{name}.tokens", tokenizer)
    print(documents, sum(len(shard.tokens) for shard in mapped), peak())
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    process = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    small, large = (list(map(int, line.split())) for line in process.stdout.splitlines())
    assert (tmp_path / "large").stat().st_size > 32e6
    assert small[:2] == [20, 20_000] and large[:2] == [320, 320_000]
    assert large[2] - small[2] < 10e6
