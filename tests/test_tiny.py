"""The tiny world: same bytes for a seed, published formats, balanced labels, and nothing to be had from the surface."""
import csv
import json
import re
from collections import Counter, defaultdict

import pytest

from data import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder, seed=0)
    return folder


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def questions(path):
    return [(paragraph["context"], entry) for article in json.loads(path.read_text())["data"]
            for paragraph in article["paragraphs"] for entry in paragraph["qas"]]


TABLES = {"SST-2": ("label", ("sentence",)), "QQP": ("is_duplicate", ("question1", "question2")),
          "QNLI": ("label", ("question", "sentence")), "MNLI": ("gold_label", ("sentence1", "sentence2"))}
DEV = {"SST-2": "dev.tsv", "QQP": "dev.tsv", "QNLI": "dev.tsv", "MNLI": "dev_matched.tsv"}


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def test_bytes_depend_on_the_seed_alone(world, tmp_path):
    for seed, equal in ((0, True), (1, False)):
        tiny.write(tmp_path / str(seed), seed)
        for path in sorted(path for path in world.rglob("*") if path.is_file()):
            other = tmp_path / str(seed) / path.relative_to(world)
            assert (other.read_bytes() == path.read_bytes()) == equal, path


def test_sizes(world):
    assert 1e6 <= (world / "corpus.txt").stat().st_size <= 3e6
    assert len({word for word in words((world / "corpus.txt").read_text())}) < 1000
    for folder in TABLES:
        assert 2000 <= len(table(world / folder / "train.tsv")) <= 4000
        for name in [DEV[folder]] + (["dev_mismatched.tsv"] if folder == "MNLI" else []):
            assert 500 <= len(table(world / folder / name)) <= 1000
    assert 2000 <= len(questions(world / "SQuAD" / "train-v1.1.json")) <= 4000
    assert 500 <= len(questions(world / "SQuAD" / "dev-v1.1.json")) <= 1000


def test_labels_are_balanced(world):
    for folder, (label, _) in TABLES.items():
        for name in ("train.tsv", DEV[folder]):
            counts = Counter(row[label] for row in table(world / folder / name))
            assert len(counts) == (3 if folder == "MNLI" else 2) and max(counts.values()) == min(counts.values())


def test_answers_stand_where_they_are_said_to(world):
    for name in ("train", "dev"):
        for context, entry in questions(world / "SQuAD" / f"{name}-v1.1.json"):
            text, start = entry["answers"][0]["text"], entry["answers"][0]["answer_start"]
            assert context[start:start + len(text)] == text
            before, after = context[:start][-1:], context[start + len(text)]
            assert not before.isalpha() and not after.isalpha()          # whole words


def test_held_words_are_in_the_corpus_and_never_in_training(world):
    corpus = Counter(words((world / "corpus.txt").read_text()))
    things = {name for names in tiny.THINGS for name in tiny.held(names)}
    poles = {name for dimension in tiny.DIMENSIONS for names in dimension for name in tiny.held(names)}
    feelings = set(tiny.held(tiny.PRAISE)) | set(tiny.held(tiny.BLAME))
    for folder, unseen in (("SST-2", feelings), ("QQP", things), ("QNLI", things), ("MNLI", poles)):
        columns = TABLES[folder][1]
        train = {word for row in table(world / folder / "train.tsv")
                 for column in columns for word in words(row[column])}
        dev = Counter(word for row in table(world / folder / DEV[folder])
                      for column in columns for word in words(row[column]))
        for word in unseen:
            assert word not in train and corpus[word] >= 100 and dev[word] > 0, (folder, word)
    train = {word for context, entry in questions(world / "SQuAD" / "train-v1.1.json")
             for word in words(context + entry["question"])}
    assert not things & train


def bag_accuracy(train, dev):
    """Dev accuracy of naive Bayes over the set of features of each example: (features, label) pairs."""
    seen, totals = defaultdict(Counter), Counter(label for _, label in train)
    for features, label in train:
        for feature in set(features):
            seen[label][feature] += 1
    import math

    def score(features, label):
        return sum(math.log((seen[label][f] + 1) / (totals[label] + 2)) for f in set(features))
    return sum(max(totals, key=lambda guess: score(features, guess)) == label for features, label in dev) / len(dev)


@pytest.mark.parametrize("folder", TABLES)
def test_the_surface_gives_no_label_away(world, folder):
    """Under 60 %: words of either side, words of the second side alone, and how many words the two share."""
    label, columns = TABLES[folder]

    def features(row, kind):
        if kind == "overlap":
            shared = set(words(row[columns[0]])) & set(words(row[columns[-1]]))
            return [f"{len(shared)} shared", f"{len(words(row[columns[-1]]))} long"]
        chosen = columns[-1:] if kind == "second" else columns
        return [f"{column}:{word}" for column in chosen for word in words(row[column])]

    for kind in ("both", "second", "overlap"):
        train, dev = ([(features(row, kind), row[label]) for row in table(world / folder / name)]
                      for name in ("train.tsv", DEV[folder]))
        assert bag_accuracy(train, dev) < 0.60, (folder, kind)


def test_ensure_writes_once_and_whole(tmp_path, monkeypatch):
    def fails(folder, seed):
        (folder / "corpus.txt").write_text("half")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "write", fails)
        with pytest.raises(KeyboardInterrupt):
            tiny.ensure(tmp_path / "world")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tiny, "write", lambda folder, seed: (folder / "corpus.txt").write_text(str(seed)))
    assert (tiny.ensure(tmp_path / "world", 7) / "corpus.txt").read_text() == "7"
    assert (tiny.ensure(tmp_path / "world", 8) / "corpus.txt").read_text() == "7"
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
