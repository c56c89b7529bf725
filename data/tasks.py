"""The five tasks: their published files, training batches, and evaluation.

    data = TaskData("sst2", "path/to/folder", tokenizer, max_length=128)   # the folder that holds SST-2/, MNLI/, …
    batch = data.collate(data.rows(step=0, batch_size=32))                 # dict of int64 tensors
    metrics, predictions = data.evaluate(predict)                          # predict(batch) returns logits
    files = data.prediction_files(predictions)                             # as GLUE and SQuAD's script take them

SST-2, MNLI, QQP and QNLI come as GLUE's tab-separated files (arXiv 1804.07461), SQuAD v1.1 as JSON (arXiv 1606.05250).
"""

import gzip
import itertools
import json
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from data import DataError, decode
from data.metrics import accuracy, best_span, binary_f1, squad_scores
from data.text import fit_pair, pad_rows, sequence, token_ids, without_surrogates


@dataclass(frozen=True)
class Task:
    """What one task looks like on disk and how it is measured."""
    name: str
    folder: str
    kind: str                           # "classification" or "span"
    metric: str                         # the one to quote
    labels: tuple[str, ...] = ()        # as written in the file; the position is the class number (GLUE's order)
    also: tuple[str, ...] = ()          # what published models call the same classes
    text_columns: tuple[str, ...] = ()
    label_column: str = ""
    train: str = "train.tsv"
    dev: dict[str, str] = field(default_factory=lambda: {"dev": "dev.tsv"})     # the first is required
    test: dict[str, str] = field(default_factory=lambda: {"test": "test.tsv"})  # published without labels
    submissions: tuple[str, ...] = ()   # what the official scripts call the predictions of the dev or test files
    max_length: int = 128               # tokens per row where nobody says otherwise, as in BERT's scripts

    @property
    def pairs(self) -> bool:
        """Are rows two texts? SQuAD's are: a question and its context."""
        return len(self.text_columns) != 1

    @property
    def classes(self) -> tuple[tuple[str, ...], ...]:
        """Per class the names that it goes by."""
        return tuple(zip(self.labels, self.also)) if self.also else tuple(zip(self.labels))


TASKS = {task.name: task for task in (
    Task("sst2", "SST-2", "classification", "accuracy", ("0", "1"), ("negative", "positive"), ("sentence",), "label",
         submissions=("SST-2.tsv",)),
    Task("mnli", "MNLI", "classification", "accuracy", ("entailment", "neutral", "contradiction"), (),
         ("sentence1", "sentence2"), "gold_label",
         dev={"dev_matched": "dev_matched.tsv", "dev_mismatched": "dev_mismatched.tsv"},
         test={"test_matched": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"},
         submissions=("MNLI-m.tsv", "MNLI-mm.tsv")),
    Task("qqp", "QQP", "classification", "accuracy", ("0", "1"), ("not_duplicate", "duplicate"),
         ("question1", "question2"), "is_duplicate", submissions=("QQP.tsv",)),
    Task("qnli", "QNLI", "classification", "accuracy", ("entailment", "not_entailment"), (),
         ("question", "sentence"), "label", submissions=("QNLI.tsv",)),
    Task("squad", "SQuAD", "span", "f1", train="train-v1.1.json", dev={"dev": "dev-v1.1.json"}, test={},
         submissions=("predictions.json",), max_length=384),
)}
NO_LABEL = "-"              # MNLI: the annotators did not agree
LONGEST_QUESTION = 64       # word pieces, as in BERT's SQuAD script


# ---------------------------------------------------------------- files

def _read(path: Path) -> str:
    """The text of a file, which may be gzipped (.gz)."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: this is not a whole gzip file ({error}); fetch it again") from None
    return decode(content, path)


class MissingFile(DataError):
    """A file of a task that is not there."""


def file_of(folder: Path, task: Task, file: str) -> Path:
    """Where one of a task's files lies, maybe gzipped (.gz). MissingFile if it does not."""
    path = folder / task.folder / file
    for found in (path, path.with_name(file + ".gz")):
        if found.is_file():
            return found
    raise MissingFile(f"{path if path.parent.is_dir() else path.parent}: this is missing; give (--data) the folder "
                      f"that holds {task.folder}/ with {file} in it")


def files_of(folder: Path, task: Task, splits: tuple[str, ...]) -> dict[str, Path]:
    """The files of a task's splits that are there, by the name of the split; MissingFile if one's first is not."""
    known = {"train": {"train": task.train}, "dev": task.dev, "test": task.test}
    if "test" in splits and not task.test:
        raise DataError(f"the test set of {task.folder} is not published; take the dev set")
    files = {}
    for split in splits:
        for number, (name, file) in enumerate(known[split].items()):
            try:
                files[name] = file_of(folder, task, file)
            except MissingFile:
                if not number:
                    raise
    return files


def read_table(path: Path, task: Task, labelled: bool = True) -> tuple[list[list[str]], list[int], list[int]]:
    """Read a GLUE file: one list of texts per text column, the class of each row, and the numbers of the rows left out.

    Fields are split at tabs only, never at quotes, and columns are found by the names in the first line, so further
    columns do no harm. Rows are counted from 0. Left out are rows whose label is "-" (MNLI: no agreement) and, of QQP,
    rows cut short, which some of its published files have. Every other line with a wrong number of fields, or with an
    unknown label, raises DataError. A test file is not `labelled`: it has no column for labels, and no classes.
    """
    lines = _read(path).removesuffix("\n").split("\n")
    header = lines[0].split("\t")
    wanted = (*task.text_columns, task.label_column) if labelled else task.text_columns
    for column in wanted:
        if column not in header:
            raise DataError(f"{path}:1: there is no column {column!r}; found {', '.join(map(repr, header))}, expected "
                            f"the tab-separated names {', '.join(wanted)}")
    columns, classes = [header.index(column) for column in wanted], {label: i for i, label in enumerate(task.labels)}
    texts, labels, left_out = [[] for _ in task.text_columns], [], []
    for number, (line, fields) in enumerate(_records(lines, len(header))):
        if len(fields) != len(header):
            found = lines[line - 1].count("\t") + 1
            if task.name == "qqp" and found < len(header):
                left_out.append(number)
                continue
            raise DataError(f"{path}:{line}: found {found} tab-separated field{'s' * (found != 1)}, expected "
                            f"{len(header)} as in line 1; correct or remove the line")
        if labelled:
            label = fields[columns[-1]]
            if label == NO_LABEL and task.name == "mnli":
                left_out.append(number)
                continue
            if label not in classes:
                raise DataError(f"{path}:{line}: the label in column {task.label_column!r} is {label!r}, expected one "
                                f"of {', '.join(task.labels)}; correct the line")
            labels.append(classes[label])
        for column, values in zip(columns, texts):
            values.append(fields[column])
    if not texts[0]:
        raise DataError(f"{path}: there are no examples in it, only a header; expected one example a line")
    return texts, labels, left_out


def _records(lines: list[str], width: int) -> Iterator[tuple[int, list[str]]]:
    """Every row below the header: the number of its first line, as people count them, and its fields.

    A line break inside a field (the first published QQP has some) leaves neighbouring lines that are all too short and
    together just long enough: they are joined again.
    """
    number = 1
    while number < len(lines):
        fields, first = lines[number].split("\t"), number + 1
        number += 1
        while len(fields) < width and number < len(lines):
            following = lines[number].split("\t")
            if len(following) >= width or len(fields) + len(following) - 1 > width:     # the next row, whole or cut short
                break
            fields = [*fields[:-1], f"{fields[-1]} {following[0]}", *following[1:]]
            number += 1
        yield first, fields


@dataclass(frozen=True)
class Question:
    """One SQuAD question; `answers` are the accepted (text, first character in the context)."""
    identifier: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read_questions(path: Path) -> list[Question]:
    """Read a SQuAD v1.1 file. An answer_start that does not fit is moved to the nearest place where the answer does
    occur in the context. Raises DataError for broken JSON, another structure, or an answer that occurs nowhere."""
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: this is not JSON ({error.msg}, column {error.colno}); "
                        "expected the SQuAD v1.1 file as published") from None
    questions, place = {}, "the top level"
    try:
        for a, article in enumerate(content["data"]):
            place = f"data[{a}]"
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                context = paragraph["context"]
                for q, entry in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    question = _question(entry, context)
                    if question.identifier in questions:
                        raise LookupError(f"the id {question.identifier!r} for a second time")
                    questions[question.identifier] = question
    except LookupError as error:
        found = f"no field {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: found {found} in {place}; expected the structure of SQuAD v1.1") from None
    except TypeError:
        raise DataError(f"{path}: found a value of the wrong type in {place}; expected the structure of SQuAD "
                        "v1.1") from None
    if not questions:
        raise DataError(f"{path}: there are no questions in it; expected the SQuAD v1.1 file as published")
    return list(questions.values())


def _question(entry: dict, context: str) -> Question:
    """One element of `qas`; LookupError or TypeError if it is not as it should be."""
    if not all(isinstance(value, str) for value in (entry["id"], entry["question"], context)):
        raise TypeError
    answers = tuple((answer["text"], _answer_start(context, answer["text"], answer["answer_start"]))
                    for answer in entry["answers"])
    if not answers:
        raise LookupError("a question without answers, which SQuAD v1.1 does not have,")
    return Question(entry["id"], entry["question"], context, answers)


def _answer_start(context: str, text: str, start: int) -> int:
    """`start` if `text` stands there in the context, else the nearest place where it does."""
    if text and context.startswith(text, max(start, 0)):
        return max(start, 0)
    places = [place for place in range(len(context)) if text and context.startswith(text, place)]
    if not places:
        raise LookupError(f"the answer {text!r}, which does not occur in its context,")
    return min(places, key=lambda place: abs(place - start))


def whole_offsets(context: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """int32 (tokens, 2): first and end character of each token, whose end takes along the combining marks behind it
    that the tokenizer strips, up to the next token: the second half of a decomposed é belongs to the answer."""
    ends = np.array(offsets, dtype=np.int32).reshape(-1, 2)
    if not context.isascii():
        for token, limit in enumerate([*ends[1:, 0], len(context)]):
            while ends[token, 1] < limit and unicodedata.category(context[ends[token, 1]]) == "Mn":
                ends[token, 1] += 1
    return ends


# ---------------------------------------------------------------- batches and evaluation

class TaskData:
    """One task's examples as rows of tokens, in training batches and in evaluation.

    task        a name in TASKS, or a Task
    folder      holds the task folders SST-2/, MNLI/, …; not used if `splits` is empty
    splits      any of "train", "dev" and "test" (whose labels nobody has); () for a TaskData that only encodes texts
    stride      SQuAD: tokens by which neighbouring windows of a long context overlap; default: a third of
                max_length, the published 128 at 384

    Attributes: task (a Task), kind, labels, pairs, max_length, left_out {split: numbers of the rows left out, see read_table},
    and class_order, the output of the model that is class 0, class 1, ...: to be set where it has another order.
    MNLI's dev_mismatched.tsv and test_mismatched.tsv may be missing; they are then just not evaluated. Files are read,
    and DataError raised, at once; a split is tokenized when it is first used.
    """

    def __init__(self, task: str | Task, folder: str | Path, tokenizer: Tokenizer, max_length: int, seed: int = 0,
                 stride: int | None = None, splits: tuple[str, ...] = ("train", "dev")):
        if not isinstance(task, Task) and task not in TASKS:
            raise DataError(f"there is no task {task!r}; expected one of {', '.join(TASKS)}")
        self.task = task if isinstance(task, Task) else TASKS[task]
        self.kind, self.labels, self.pairs = self.task.kind, self.task.labels, self.task.pairs
        self.class_order = [*range(len(self.labels))]
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed
        self.stride = max_length // 3 if stride is None else stride
        self.left_out: dict[str, list[int]] = {}
        self._examples, self._tokenized = {}, {}        # by split: what was read, and the rows made of it
        self._epoch, self._batches = None, None         # a cache, no state: see _epoch_batches
        if max_length < 8:
            raise DataError(f"max_length is {max_length}; expected at least 8 tokens, three of which are special")
        for name, file in files_of(Path(folder), self.task, splits).items():
            if self.kind == "span":
                self._examples[name] = read_questions(file)
            else:
                labelled = name not in self.task.test
                *self._examples[name], self.left_out[name] = read_table(file, self.task, labelled)

    # ---- rows

    def _split_rows(self, split: str) -> list[dict]:
        """All rows of a split, tokenized at the first call; SQuAD's carry the number of their question, `example`."""
        if split not in self._examples:
            raise ValueError(f"the split {split!r} was not loaded; loaded are {sorted(self._examples)}")
        if split not in self._tokenized:
            if self.kind == "span":
                self._tokenized[split] = self._encode_questions(self._examples[split])
            else:
                texts, labels = self._examples[split]
                rows = self.encode(*texts)
                self._tokenized[split] = ([row | {"label": label} for row, label in zip(rows, labels, strict=True)]
                                          if labels else rows)
        return self._tokenized[split]

    def encode(self, texts_a: list[str], texts_b: list[str] | None = None) -> list[dict]:
        """Rows `input_ids` int32 and `token_type_ids` int8, both (length,), of texts or pairs of texts.

        [CLS] a [SEP] or [CLS] a [SEP] b [SEP]; of a pair that is too long, the longer text is cut at its end.
        """
        first_ids = token_ids(self.tokenizer, texts_a)
        if texts_b is None:
            return [sequence(self.tokenizer, first[:self.max_length - 2]) for first in first_ids]
        rows = []
        for first, second in zip(first_ids, token_ids(self.tokenizer, texts_b), strict=True):
            first_length, second_length = fit_pair(len(first), len(second), self.max_length - 3)
            rows.append(sequence(self.tokenizer, first[:first_length], second[:second_length]))
        return rows

    def encode_question(self, question: str, context: str) -> list[dict]:
        """The windows of one question, as rows for `collate` and `best_span`."""
        return self._encode_questions([Question("", question, context, ())])

    def _encode_questions(self, questions: list[Question]) -> list[dict]:
        contexts = list(dict.fromkeys(question.context for question in questions))      # many questions share one
        encoded = {}
        for begin in range(0, len(contexts), 1000):
            piece = contexts[begin:begin + 1000]
            encodings = self.tokenizer.encode_batch([*map(without_surrogates, piece)], add_special_tokens=False)
            for context, encoding in zip(piece, encodings):
                encoded[context] = np.array(encoding.ids, dtype=np.int32), whole_offsets(context, encoding.offsets)
        question_ids = token_ids(self.tokenizer, [question.question for question in questions])
        rows = []
        for example, (question, ids) in enumerate(zip(questions, question_ids)):
            rows += self._windows(example, question, ids[:LONGEST_QUESTION], *encoded[question.context])
        return rows

    def _windows(self, example: int, question: Question, question_ids: np.ndarray, context_ids: np.ndarray,
                 offsets: np.ndarray) -> list[dict]:
        """[CLS] question [SEP] window [SEP] for windows that cover the context and overlap by `stride` tokens.

        Besides the rows of `sequence`: `context`; `offsets` int32 (tokens, 2), the characters each token of the window
        stands for; `context_begin`, the position of the first one; and where the first answer lies in the sequence,
        `start_position` and `end_position`, both 0 ([CLS]) if the window does not hold all of it.
        """
        room = self.max_length - len(question_ids) - 3
        if room < 1 or (len(context_ids) > room and room <= self.stride):
            raise DataError(f"max_length {self.max_length} is too short for SQuAD: the question "
                            f"{question.question!r} leaves room for {room} tokens of the text, expected more than the "
                            f"{self.stride} by which windows overlap; give --max-len 384")
        first_token, last_token = -1, -1
        if question.answers:
            text, start = question.answers[0]
            first_token = int(np.searchsorted(offsets[:, 1], start, side="right"))      # first to end after the start
            last_token = int(np.searchsorted(offsets[:, 0], start + len(text))) - 1     # last to begin before the end
        context_begin, rows = len(question_ids) + 2, []
        # The last window is the first to reach the end of the context.
        begins = range(0, len(context_ids) - self.stride, room - self.stride) if len(context_ids) > room else (0,)
        for begin in begins:
            end = min(begin + room, len(context_ids))
            inside = begin <= first_token <= last_token < end
            rows.append(sequence(self.tokenizer, question_ids, context_ids[begin:end]) | {
                "example": example, "context": question.context, "offsets": offsets[begin:end],
                "context_begin": context_begin,
                "start_position": first_token - begin + context_begin if inside else 0,
                "end_position": last_token - begin + context_begin if inside else 0})
        return rows

    # ---- training

    def __len__(self) -> int:
        """Training rows (SQuAD: windows)."""
        return len(self._split_rows("train"))

    def demand_a_batch(self, batch_size: int) -> None:
        """DataError if the training rows are fewer than a batch. Before SQuAD's are tokenized, each of its questions,
        which make a window or more, counts as enough."""
        if self.kind == "span":
            count = len(self._tokenized["train"]) if "train" in self._tokenized else batch_size
        else:
            count = len(self._examples["train"][1])
        if count < batch_size:
            raise DataError(f"{self.task.folder}/{self.task.train} gives {count} rows, fewer than one batch of "
                            f"{batch_size}; use a smaller --batch-size")

    def rows(self, step: int, batch_size: int, begin: int = 0, end: int | None = None) -> list[dict]:
        """Rows begin … end - 1 of the training batch of `step`: a pure function of (seed, step, row, batch_size).

        Every epoch has its own order, in which rows of similar length share a batch, to save padding. No row comes
        twice in an epoch; the len(self) % batch_size rows left over at its end are dropped, others in each epoch.
        """
        rows = self._split_rows("train")
        self.demand_a_batch(batch_size)
        per_epoch = len(rows) // batch_size
        batch = self._epoch_batches(step // per_epoch, batch_size)[step % per_epoch]
        return [rows[row] for row in batch[begin:end]]

    def _epoch_batches(self, epoch: int, batch_size: int) -> np.ndarray:
        """Row numbers of one epoch, int64 (batches, batch_size): shuffle, sort pools of 50 batches, shuffle batches."""
        if self._epoch != (epoch, batch_size):
            generator = np.random.default_rng((self.seed, epoch))
            lengths = np.array([len(row["input_ids"]) for row in self._split_rows("train")])
            order = generator.permutation(len(lengths))[:len(lengths) // batch_size * batch_size]
            pools = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
            order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
            self._epoch = (epoch, batch_size)
            self._batches = generator.permutation(order.reshape(-1, batch_size))
        return self._batches

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """int64 `input_ids`, `attention_mask`, `token_type_ids`, all (rows, longest rounded up to a multiple of 8),
        and, as far as the rows have them, `labels` or `start_positions` and `end_positions`, all (rows,)."""
        batch = pad_rows(rows, self.tokenizer.token_to_id("[PAD]"), self.max_length)
        for name, column in (("label", "labels"), ("start_position", "start_positions"),
                             ("end_position", "end_positions")):
            if name in rows[0]:
                batch[column] = torch.tensor([row[name] for row in rows])
        return batch

    # ---- evaluation

    def evaluate(self, predict, batch_size: int = 32, limit: int | None = None) -> tuple[dict, dict]:
        """Run `predict` over the first `limit` (default: all) examples of every dev set, or of every test set.

        predict(batch) gets a batch of `collate` and returns float logits: (rows, classes), or for SQuAD the pair
        start_logits, end_logits, both (rows, length). Returns (metrics, predictions): metrics {name: fraction 0 … 1},
        predictions {dev set: [label, …] in the order of the file, or {question id: text}}. A test set has no metrics.
        """
        metrics, predictions = {}, {}
        for number, name in enumerate(name for name in self._examples if name != "train"):
            if self.kind == "span":
                questions = self._examples[name][:limit]
                predictions[name] = self._answers(predict, questions, self._split_rows(name), batch_size)
                metrics |= squad_scores(predictions[name], {question.identifier: [text for text, _ in question.answers]
                                                            for question in questions})
                continue
            rows = self._split_rows(name)[:limit]
            predictions[name] = [self.labels[output[self.class_order].argmax()]
                                 for output, in self._outputs(predict, rows, batch_size)]
            if name in self.task.test:
                continue
            expected = [self.labels[row["label"]] for row in rows]
            suffix = name.removeprefix("dev") if number else ""
            metrics["accuracy" + suffix] = accuracy(predictions[name], expected)
            if self.task.name == "qqp" or self.task.metric == "f1":
                metrics["f1" + suffix] = binary_f1(predictions[name], expected, positive=self.labels[1])
        return metrics, predictions

    def prediction_files(self, predictions: dict) -> dict[str, str]:
        """{file name: content} of the predictions that `evaluate` returned, for GLUE's server and SQuAD's script.

        SQuAD: an object {question id: text}. GLUE: the lines `index<TAB>prediction`, the index being the number of the
        row in its file, from 0, so that a row that was left out leaves a gap.
        """
        files = {}
        for file, (name, answers) in zip(self.task.submissions, predictions.items()):
            if self.kind == "span":
                files[file] = json.dumps(answers, indent=1)
                continue
            numbers = (number for number in itertools.count() if number not in self.left_out[name])
            files[file] = "index\tprediction\n" + "".join(f"{number}\t{answer}\n"
                                                          for answer, number in zip(answers, numbers))
        return files

    def notes(self) -> list[str]:
        """A line for every split with rows that were left out; none is left out in silence. All splits are tokenized
        here at the latest: what does not fit shows before the first step."""
        for split in self._examples:
            self._split_rows(split)
        reason = "without an agreed label" if self.task.name == "mnli" else "that are cut short"
        return [f"{split}: left out {len(rows)} rows {reason}" for split, rows in self.left_out.items() if rows]

    def _answers(self, predict, questions: list[Question], rows: list[dict], batch_size: int) -> dict[str, str]:
        rows = [row for row in rows if row["example"] < len(questions)]
        windows: list[list] = [[] for _ in questions]
        for row, (start, end) in zip(rows, self._outputs(predict, rows, batch_size)):
            windows[row["example"]].append((row, start, end))
        return {question.identifier: best_span(*zip(*group))[0] for question, group in zip(questions, windows)}

    def _outputs(self, predict, rows: list[dict], batch_size: int) -> list[tuple[np.ndarray, ...]]:
        """What `predict` returns for each row, in the order of `rows`, though rows of similar length share a batch."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        outputs: list = [None] * len(rows)
        for begin in range(0, len(order), batch_size):
            chosen = order[begin:begin + batch_size]
            with torch.no_grad():
                result = predict(self.collate([rows[row] for row in chosen]))
            arrays = [tensor.float().cpu().numpy() for tensor in (result if isinstance(result, tuple) else (result,))]
            for row, *values in zip(chosen, *arrays):
                outputs[row] = tuple(values)
        return outputs
