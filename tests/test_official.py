"""The five tasks as published: files as they are downloaded, metrics and predictions as the official scripts take them.
"""

import csv
import itertools
import json
import random
import string
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from data import DataError
from data import text as text_module
from data.metrics import accuracy, answer_f1, binary_f1, normalize_answer, squad_scores
from data.tasks import TASKS, TaskData, read_table

# ---------------------------------------------------------------- the official downloads

PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI = f"index promptID pairID genre {PARSES} sentence1 sentence2"
HEADERS = {         # the first lines of the files in GLUE's archives
    "sst2": {"train.tsv": "sentence label", "dev.tsv": "sentence label", "test.tsv": "index sentence"},
    "mnli": {"train.tsv": f"{MNLI} label1 gold_label",
             **dict.fromkeys(("dev_matched.tsv", "dev_mismatched.tsv"),
                             f"{MNLI} label1 label2 label3 label4 label5 gold_label"),
             **dict.fromkeys(("test_matched.tsv", "test_mismatched.tsv"), MNLI)},
    "qqp": {"train.tsv": "id qid1 qid2 question1 question2 is_duplicate",
            "dev.tsv": "id qid1 qid2 question1 question2 is_duplicate", "test.tsv": "id question1 question2"},
    "qnli": {"train.tsv": "index question sentence label", "dev.tsv": "index question sentence label",
             "test.tsv": "index question sentence"},
}
WIDTHS = {"sst2": (2, 2, 2), "mnli": (12, 16, 10), "qqp": (6, 6, 3), "qnli": (4, 4, 3)}     # train, dev, test
TEXTS = ["it 's a \"charming journey", '"', "who wrote ''it'' ? ", "50 % , or 7 \u2028 of them", "a, b; c", "'",
         "d\xe9j\xe0 vu \u2014 na\xefve", "plain words", "x" * 40, "12 \u4e2d\u6587", "no end"]


def write_official(folder, name, rows=23, end="\n"):
    """Files with the official header lines; every column that is not read says so."""
    generator = random.Random(name)
    task = TASKS[name]
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for file, header in HEADERS[name].items():
        columns = header.split()
        lines = ["\t".join(columns)]
        for number in range(rows):
            label = "-" if name == "mnli" and number % 7 == 3 else generator.choice(task.labels)
            values = {"index": str(number), "id": str(number + 1000), task.label_column: label}
            values.update({column: generator.choice(TEXTS) for column in task.text_columns})
            lines.append("\t".join(values.get(column, "n/a") for column in columns))
        (folder / task.folder / file).write_bytes((end.join(lines) + end).encode())
    return folder


def read_as_csv(path):
    """[{column: field}] by Python's own reader, told to leave quotes alone."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return list(csv.DictReader((line.rstrip("\r\n") for line in file), delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", HEADERS)
def test_every_official_layout_is_read(name, end, tmp_path):
    task, found = TASKS[name], []
    write_official(tmp_path, name, end=end)
    for file in HEADERS[name]:
        path = tmp_path / task.folder / file
        rows, labelled = read_as_csv(path), not file.startswith("test")
        found.append(len(rows[0]))
        left_out = [number for number, row in enumerate(rows) if labelled and row[task.label_column] == "-"]
        kept = [row for number, row in enumerate(rows) if number not in left_out]
        texts, labels, gone = read_table(path, task, labelled)
        assert texts == [[row[column] for row in kept] for column in task.text_columns]
        assert [task.labels[label] for label in labels] == [row[task.label_column] for row in kept if labelled]
        assert gone == left_out and len(gone) == (3 if name == "mnli" and labelled else 0)
    assert tuple(dict.fromkeys(found)) == tuple(dict.fromkeys(WIDTHS[name]))
    with pytest.raises(DataError, match=f"there is no column '{task.label_column}'"):
        read_table(path, task)                          # a test file in the place of a labelled one


def test_qqp_lines_that_are_broken_are_joined_or_left_out_and_counted(tmp_path, tokenizer):
    """A question with a line break before its closing quote, as in the first published QQP; and lines cut short."""
    head = HEADERS["qqp"]["dev.tsv"].replace(" ", "\t")
    good = "{}\t1\t2\tWhy {}?\tHow {}?\t{}"
    lines = [head, good.format(0, "a", "b", 1), '1\t1\t2\t"Was he real?', '"\tIs there proof?\t0',
             good.format(2, "c", "d", 0), "3\t1\t2\tWhat is this?\tcut", good.format(4, "e", "f", 1), "5\t1\t2\tOne?",
             "6\t1\t2\tTwo?"]                                              # two that are cut are no row together
    (tmp_path / "QQP").mkdir()
    (tmp_path / "QQP" / "dev.tsv").write_text("\n".join(lines) + "\n")
    assert read_table(tmp_path / "QQP" / "dev.tsv", TASKS["qqp"]) == (
        [["Why a?", '"Was he real? "', "Why c?", "Why e?"], ["How b?", "Is there proof?", "How d?", "How f?"]],
        [1, 0, 0, 1], [3, 5, 6])
    data = TaskData("qqp", tmp_path, tokenizer, 32, splits=("dev",))
    assert data.notes() == ["dev: left out 3 rows that are cut short"]
    written = data.prediction_files({"dev": ["1", "0", "0", "1"]})
    assert written == {"QQP.tsv": "index\tprediction\n0\t1\n1\t0\n2\t0\n4\t1\n"}


# ---------------------------------------------------------------- predictions, scored from their files alone

@pytest.fixture(scope="module")
def tokenizer():
    return text_module.bert_tokenizer({token: number for number, token in enumerate(
        [*text_module.SPECIAL_TOKENS, *string.ascii_lowercase, *string.digits, *string.punctuation,
         *(f"##{letter}" for letter in string.ascii_lowercase + string.digits)])})


def guesser(classes):
    """A model whose logits are a sum over the row's tokens, so that the company a row is in does not matter."""
    head = torch.randn(60, classes, generator=torch.Generator().manual_seed(1))
    return lambda batch: (head[batch["input_ids"] % 60] * batch["attention_mask"][..., None]).sum(1)


@pytest.mark.parametrize("name", HEADERS)
def test_glue_files_score_as_reported(name, tmp_path, tokenizer):
    """Each line of a written file is put beside the line of the dev file with its number, as a scoring script would."""
    task = TASKS[name]
    data = TaskData(name, write_official(tmp_path, name), tokenizer, 48, splits=("dev",))
    assert data.notes() == [f"{split}: left out 3 rows without an agreed label" for split in task.dev
                            if name == "mnli"]
    metrics, predictions = data.evaluate(guesser(len(task.labels)))
    written = data.prediction_files(predictions)
    assert list(written) == {"mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"]}.get(name, [f"{task.folder}.tsv"])
    for content, file, suffix in zip(written.values(), task.dev.values(), ("", "_mismatched")):
        rows = list(csv.reader(content.splitlines(), delimiter="\t"))
        truth = [row[task.label_column] for row in read_as_csv(tmp_path / task.folder / file)]
        assert rows[0] == ["index", "prediction"] and len({prediction for _, prediction in rows[1:]}) > 1
        numbers = [int(number) for number, _ in rows[1:]]
        assert numbers == [number for number, label in enumerate(truth) if label != "-"]
        pairs = Counter((prediction, truth[int(number)]) for number, prediction in rows[1:])
        right = sum(count for (a, b), count in pairs.items() if a == b)
        assert metrics["accuracy" + suffix] == float(Fraction(right, pairs.total()))
        if name == "qqp":
            wrong = pairs["1", "0"] + pairs["0", "1"]
            assert metrics["f1"] == float(Fraction(2 * pairs["1", "1"], 2 * pairs["1", "1"] + wrong))


@pytest.mark.parametrize("name", HEADERS)
def test_test_sets_have_predictions_and_no_metrics(name, tmp_path, tokenizer):
    write_official(tmp_path, name)
    data = TaskData(name, tmp_path, tokenizer, 48, splits=("test",))
    predict = guesser(len(data.labels))
    metrics, predictions = data.evaluate(predict, batch_size=5)
    assert metrics == {} and data.notes() == []
    for (split, found), content in zip(predictions.items(), data.prediction_files(predictions).values()):
        rows = read_as_csv(tmp_path / data.task.folder / data.task.test[split])
        assert content.splitlines()[1:] == [f"{number}\t{label}" for number, label in enumerate(found)]
        for row, label in zip(rows, found, strict=True):            # one at a time, without padding
            texts = [[row[column]] for column in data.task.text_columns]
            assert data.labels[int(predict(data.collate(data.encode(*texts))).argmax())] == label
    assert len(predictions) == len(data.task.test)


def test_squad_predictions_score_as_reported(tmp_path, tokenizer):
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [
        {"context": f"The {word} of caf\xe9 \u2014 \"B\"\n was a {word}.", "qas": [
            {"id": f"56be{number}{word}", "question": f"what {word}?", "answers": [
                {"text": answer, "answer_start": 0}
                for answer in ("The " + word, word, "caf\xe9 \u2014 \"B\"")[number:]]} for number in range(3)]}
        for word in ("lamp", "ox", "end")]}]}
    (tmp_path / "SQuAD").mkdir()
    (tmp_path / "SQuAD" / "dev-v1.1.json").write_text(json.dumps(content))
    data = TaskData("squad", tmp_path, tokenizer, 48, splits=("dev",))
    table = torch.randn(2, 60, 48, generator=torch.Generator().manual_seed(5))

    def predict(batch):
        ids, positions = batch["input_ids"] % 60, torch.arange(batch["input_ids"].shape[1])
        return table[0][ids, positions], table[1][ids, positions]

    metrics, predictions = data.evaluate(predict)
    (file, written), = data.prediction_files(predictions).items()
    assert file == "predictions.json" and written.isascii()
    written = json.loads(written)
    exact, f1 = official_squad(written, {entry["id"]: [answer["text"] for answer in entry["answers"]] for paragraph in
                                         content["data"][0]["paragraphs"] for entry in paragraph["qas"]})
    assert len(written) == 9 and 0 < f1 < 1
    assert (metrics["exact_match"], metrics["f1"]) == (exact, f1)
    with pytest.raises(DataError, match="test set of SQuAD is not published"):
        TaskData("squad", tmp_path, tokenizer, 48, splits=("test",))


def test_lengths_of_berts_scripts():
    assert {name: task.max_length for name, task in TASKS.items()} == {
        "sst2": 128, "mnli": 128, "qqp": 128, "qnli": 128, "squad": 384}


# ---------------------------------------------------------------- metrics, to the last digit

def official_words(text):
    """SQuAD's normalization, letter by letter: small letters, no ASCII punctuation, no runs of letters and digits that
    are an article, split at white space. (A dash that is not ASCII stays, and ends a run.)"""
    letters = [letter for letter in text.lower() if letter not in string.punctuation]
    runs = ["".join(run) for _, run in itertools.groupby(letters, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def official_squad(predictions, answers):
    """(exact match, F1) as SQuAD's script for version 1.1 adds them up: precision and recall first, 0 for no common
    word, even where prediction and answer are both empty."""
    exact, f1 = [], []
    for identifier, accepted in answers.items():
        found = official_words(predictions[identifier])
        scores = []
        for words in map(official_words, accepted):
            common = sum(min(found.count(word), words.count(word)) for word in set(found))
            precision, recall = common / max(1, len(found)), common / max(1, len(words))
            scores.append((2 * precision * recall) / (precision + recall) if common else 0)
        exact.append(any(found == official_words(answer) for answer in accepted))
        f1.append(max(scores))
    return sum(exact) / len(exact), sum(f1) / len(f1)


PIECES = ["the", "The", "a", "an", "An", "theatre", "cat", "cat", "Cat", "U.S.", "1,000", "don't", "--", "...", "$5",
          "%", "_the_", "\u2014", "caf\xe9", "\u0130stanbul", "stra\xdfe", "na\xefve", "\u4e2d\u6587", "\u2019s",
          "\xa0", "\u201cthe\u201d", "\u2028", "\u0301", "a\u2013b", "the\u2019", *string.punctuation]


def random_answer(generator):
    return "".join(generator.choice(PIECES) + generator.choice(["", " ", " ", "  ", "\n", "\t", "-"])
                   for _ in range(generator.choice([0, 1, 1, 2, 3, 5, 9])))


def test_squad_metrics_equal_the_official_ones_to_the_last_digit():
    generator = random.Random(0)
    for trial in range(100):
        answers = {f"q{number}": [random_answer(generator) for _ in range(generator.randint(1, 4))]
                   for number in range(generator.randint(1, 20))}
        predictions = {identifier: random_answer(generator) if generator.random() < 0.7 else
                       generator.choice(accepted).swapcase() for identifier, accepted in answers.items()}
        for identifier, accepted in answers.items():
            assert normalize_answer(predictions[identifier]).split() == official_words(predictions[identifier])
        exact, f1 = official_squad(predictions, answers)
        assert squad_scores(predictions, answers) == {"exact_match": exact, "f1": f1}, trial
    assert normalize_answer("The \u201ca\u201d b\u2014an") == "\u201c \u201d b\u2014"
    for prediction, answer in (("", ""), ("the", "A"), ("...", "--"), ("", "cat"), ("cat", "the")):
        assert answer_f1(prediction, answer) == 0.0          # version 1.1, unlike 2.0, knows no F1 of nothing
    assert squad_scores({"q": "the"}, {"q": ["a", "cat"]}) == {"exact_match": 1.0, "f1": 0.0}


def test_glue_metrics_are_the_nearest_floats():
    """Accuracy and F1 are fractions of whole numbers; the float nearest to the fraction is what every script prints."""
    generator = random.Random(1)
    for _ in range(300):
        count, share = generator.randint(1, 60), generator.random()
        predicted, expected = ([str(int(generator.random() < share)) for _ in range(count)] for _ in range(2))
        table = Counter(zip(predicted, expected))
        errors = table["0", "1"] + table["1", "0"]
        assert accuracy(predicted, expected) == float(Fraction(count - errors, count))
        assert np.mean(np.array(predicted) == np.array(expected)) == accuracy(predicted, expected)
        hits = table["1", "1"]
        assert binary_f1(predicted, expected, "1") == (float(Fraction(2 * hits, 2 * hits + errors)) if hits else 0.0)
