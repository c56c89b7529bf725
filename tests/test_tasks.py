"""The five tasks in their published file formats: reading, batches, evaluation, metrics."""

import collections
import dataclasses
import gzip
import json
import random
import re

import numpy as np
import pytest
import torch
from test_text import CLS, PAD, SEP, WORDS, message, same_rows, tokenizer  # noqa: F401, F811

from data import tasks as tasks_module
from data.metrics import accuracy, answer_f1, best_span, binary_f1, normalize_answer, squad_scores
from data.tasks import TASKS, TaskData, read_table
from data.text import save_tokenizer

# ---------------------------------------------------------------- task files

HEADERS = {"sst2": "sentence\tlabel", "qnli": "index\tquestion\tsentence\tlabel",
           "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "mnli": "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\tgold_label"}


def glue_line(name, number, label, generator):
    a, b = (" ".join(generator.choices(WORDS, k=generator.randint(1, 20))) for _ in range(2))
    return {"sst2": f"{a}\t{label}", "qnli": f"{number}\t{a}\t{b}\t{label}",
            "qqp": f"{number}\t1\t2\t{a}\t{b}\t{label}",
            "mnli": f"{number}\t\t\tfiction\t.\t.\t.\t.\t{a}\t{b}\t{label}\t{label}"}[name]


def write_glue(folder, name, rows=120, dev_rows=37, seed=0):
    task, generator = TASKS[name], random.Random(seed)
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for file, count in ((task.train, rows), *((file, dev_rows) for file in task.dev.values())):
        lines = [glue_line(name, number, generator.choice(task.labels), generator) for number in range(count)]
        (folder / task.folder / file).write_text("\n".join([HEADERS[name], *lines]) + "\n")
    return folder


def write_squad(folder, articles=4, seed=0, compress=False, long=60):
    """Contexts of 5 to `long` words; the answers are 1 to 4 words of it, each context word is used as an answer."""
    generator, data, identifier = random.Random(seed), [], 0
    for _ in range(articles):
        context = "".join(generator.choice(WORDS).capitalize() + generator.choice(("  ", "-"))
                          for _ in range(generator.randint(5, long)))
        words, entries = [(match.start(), match.end()) for match in re.finditer(r"\w+", context)], []
        for number, (start, _) in enumerate(words):
            end = words[min(number + generator.randint(0, 3), len(words) - 1)][1]
            entries.append({"id": f"q{identifier}", "question": f"Where is d{identifier}s0?",
                            "answers": [{"text": context[start:end], "answer_start": start}]})
            identifier += 1
        data.append({"title": "t", "paragraphs": [{"context": context, "qas": entries}]})
    (folder / "SQuAD").mkdir(parents=True, exist_ok=True)
    content = json.dumps({"version": "1.1", "data": data})
    (folder / "SQuAD" / "dev-v1.1.json").write_text(content)
    if compress:
        (folder / "SQuAD" / "train-v1.1.json.gz").write_bytes(gzip.compress(content.encode()))
    else:
        (folder / "SQuAD" / "train-v1.1.json").write_text(content)
    return folder


def test_glue_order_of_the_labels():
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["sst2"].labels == TASKS["qqp"].labels == ("0", "1")
    assert [task.folder for task in TASKS.values()] == ["SST-2", "MNLI", "QQP", "QNLI", "SQuAD"]


def table(tmp_path, content, name="qqp"):
    path = tmp_path / "train.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path, TASKS[name]


def test_tables_are_cut_at_tabs_only_and_columns_found_by_name(tmp_path):
    path, task = table(tmp_path, "\ufeffis_duplicate\textra\tquestion2\tquestion1\r\n"
                                 '1\tx\tsay "b\ta \u2028\u0085c\r\n0\t\t\t"q\r\n')
    texts, labels, left_out = read_table(path, task)
    assert texts == [["a \u2028\u0085c", '"q'], ['say "b', ""]] and labels == [1, 0] and left_out == []
    lines = [f"{n}{8 * chr(9)}a{n}\tb{n}\tx\t{label}\n" for n, label in enumerate(("neutral", "-", "entailment"))]
    path, task = table(tmp_path, "".join([HEADERS["mnli"] + "\n", *lines]), "mnli")
    assert read_table(path, task) == ([["a0", "a2"], ["b0", "b2"]], [1, 0], [1])


def test_a_line_break_inside_a_field_is_healed_but_a_short_line_is_not(tmp_path):
    head, good = HEADERS["qqp"] + "\n", "1\t2\t3\tfine\tok\t0\n"
    path, task = table(tmp_path, head + good + '7\t8\t9\t"one\n"two\tthree\t1\n' + good)
    assert read_table(path, task) == ([["fine", '"one "two', "fine"], ["ok", "three", "ok"]], [0, 1, 0], [])
    path, task = table(tmp_path, head + good + "7\t8\t9\tone\tthree\t1\tmore\n" + good)
    assert message(read_table, path, task).startswith(f"{path}:3: found 7 tab-separated fields, expected 6")
    head, good = HEADERS["qnli"] + "\n", "1\tfine\tok\tentailment\n"
    for bad in ("7\tone\tthree\n", "7\tone\tthree\tentailment\tmore\n", "\n", "7\tone\nx\n"):
        path, task = table(tmp_path, head + good + bad + good, "qnli")
        found = bad.split("\n")[0].count("\t") + 1
        assert message(read_table, path, task).startswith(
            f"{path}:3: found {found} tab-separated field{'s' * (found > 1)}, expected 4")
        if bad != "\n":                 # the same at the end of the file
            path, task = table(tmp_path, head + good + bad, "qnli")
            assert f"{path}:3: found" in message(read_table, path, task)
    path, task = table(tmp_path, "sentence\tlabel\nno label here\ngood\t1\n", "sst2")
    assert f"{path}:2: found 1 tab-separated field, expected 2" in message(read_table, path, task)


def test_tables_that_cannot_be_used_are_named(tmp_path):
    path, task = table(tmp_path, "sentence\tlabel\na\t1\nb\tgood\n", "sst2")
    found = message(read_table, path, task)
    assert found.startswith(f"{path}:3: the label in column 'label' is 'good', expected one of 0, 1")
    path, task = table(tmp_path, "sentence\tlabel\na\t-\n", "sst2")
    assert "is '-'" in message(read_table, path, task)
    path, task = table(tmp_path, "text\tlabel\na\t1\n", "sst2")
    found = message(read_table, path, task)
    assert found.startswith(f"{path}:1: there is no column 'sentence'; found 'text', 'label'")
    for empty in ("", "sentence\tlabel\n"):
        path, task = table(tmp_path, empty, "sst2")
        assert str(path) in message(read_table, path, task)
    path, task = table(tmp_path, b"sentence\tlabel\n\xff\t1\n", "sst2")
    assert message(read_table, path, task).startswith(f"{path}:2: the byte 0xff")


def test_missing_task_files_are_named_but_mismatched_mnli_may_lack(tmp_path, tokenizer):
    assert message(TaskData, "sst2", tmp_path, tokenizer, 32).startswith(f"{tmp_path / 'SST-2'}: this is missing")
    write_glue(tmp_path, "sst2")
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    assert f"{tmp_path / 'SST-2' / 'dev.tsv'}: this is missing" in message(TaskData, "sst2", tmp_path, tokenizer, 32)
    assert len(TaskData("sst2", tmp_path, tokenizer, 32, splits=("train",))) == 120
    write_glue(tmp_path, "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    metrics_, predictions = TaskData("mnli", tmp_path, tokenizer, 32).evaluate(constant(0, 3))
    assert list(metrics_) == ["accuracy"] and list(predictions) == ["dev_matched"]
    (tmp_path / "MNLI" / "dev_matched.tsv").unlink()
    assert "dev_matched.tsv: this is missing" in message(TaskData, "mnli", tmp_path, tokenizer, 32)
    unknown = message(TaskData, "cola", tmp_path, tokenizer, 32)
    assert "no task 'cola'; expected one of sst2, mnli, qqp, qnli, squad" in unknown
    assert "max_length is 3" in message(TaskData, "sst2", tmp_path, tokenizer, 3, splits=())


def squad_file(tmp_path, **changes):
    entry = {"id": "q", "question": "Who?", "answers": [{"text": "Bob", "answer_start": 4}]} | changes
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Now Bob saw Bob run.", "qas": [
        {key: value for key, value in entry.items() if value is not None}]}]}]}))
    return path


def test_squad_files_that_cannot_be_used_are_named(tmp_path, tokenizer):
    def refused(path):
        return message(tasks_module.read_questions, path)

    place = "data[0].paragraphs[0].qas[0]; expected the structure of SQuAD v1.1"
    assert refused(squad_file(tmp_path, question=None)).endswith(f"found no field 'question' in {place}")
    assert refused(squad_file(tmp_path, answers=[])).endswith(f"SQuAD v1.1 does not have, in {place}")
    assert refused(squad_file(tmp_path, answers=7)).endswith(f"found a value of the wrong type in {place}")
    assert refused(squad_file(tmp_path, question=5)).endswith(f"found a value of the wrong type in {place}")
    assert refused(squad_file(tmp_path, answers=[{"text": "Bob", "answer_start": "4"}])).endswith(place)
    path = squad_file(tmp_path)
    path.write_text(path.read_text().replace('"Now Bob saw Bob run."', "17"))
    assert refused(path).endswith(f"found a value of the wrong type in {place}")
    nowhere = refused(squad_file(tmp_path, answers=[{"text": "Eve", "answer_start": 4}]))
    assert "the answer 'Eve', which does not occur in its context" in nowhere and place in nowhere
    path = tmp_path / "x.json"
    for content, part in (('{"data": [\n}', f"{path}:2: this is not JSON"), ("[]", "in the top level"),
                          ("{}", "no field 'data'"), ('{"data": []}', "no questions"),
                          ('{"data": [{}]}', "no field 'paragraphs' in data[0];")):
        path.write_text(content)
        assert part in refused(path)
    twice = json.loads(squad_file(tmp_path).read_text())
    path.write_text(json.dumps({"data": twice["data"] * 2}))
    assert "the id 'q' for a second time in data[1].paragraphs[0].qas[0]" in refused(path)
    zipped = tmp_path / "train-v1.1.json.gz"
    for broken in (b"not gzip", gzip.compress(b"{}" * 999)[:-9]):
        zipped.write_bytes(broken)
        assert f"{zipped}: this is not a whole gzip file" in refused(zipped)


def test_a_wrong_answer_start_moves_to_the_nearest_place(tmp_path):
    for start, expected in ((4, 4), (12, 12), (0, 4), (9, 12), (-3, 4), (99, 12)):
        path = squad_file(tmp_path, answers=[{"text": "Bob", "answer_start": start}])
        assert tasks_module.read_questions(path)[0].answers == (("Bob", expected),)


# ---------------------------------------------------------------- task batches

def constant(winner, classes):
    return lambda batch: torch.nn.functional.one_hot(torch.full((len(batch["input_ids"]),), winner), classes)


def answers_from_labels(batch):
    """A model that knows: logits from the collated labels."""
    if "labels" in batch:
        return torch.nn.functional.one_hot(batch["labels"], 3).float()
    length = batch["input_ids"].shape[1]
    logits = [torch.nn.functional.one_hot(batch[name], length).float() for name in ("start_positions", "end_positions")]
    return tuple(torch.where(batch["start_positions"][:, None] > 0, 10 * logit, -10 + 0 * logit) for logit in logits)


@pytest.mark.parametrize("name", ["sst2", "mnli", "qqp", "qnli", "squad"])
def test_task_rows_are_pure_and_no_row_comes_twice_in_an_epoch(tmp_path, tokenizer, name):
    folder = write_squad(tmp_path) if name == "squad" else write_glue(tmp_path, name)
    data = TaskData(name, folder, tokenizer, 40, seed=5, stride=8)
    whole = data.rows(4, 8)
    assert same_rows(whole, data.rows(4, 8, 0, 3) + data.rows(4, 8, 3, 8))
    data.rows(999, 8), data.rows(0, 4)
    assert same_rows(whole, data.rows(4, 8))
    assert same_rows(whole, TaskData(name, folder, tokenizer, 40, seed=5, stride=8).rows(4, 8))
    assert not same_rows(whole, TaskData(name, folder, tokenizer, 40, seed=6, stride=8).rows(4, 8))
    per_epoch, epochs = len(data) // 7, []
    for epoch in range(2):
        used = [id(row) for step in range(per_epoch) for row in data.rows(epoch * per_epoch + step, 7)]
        assert len(used) == len(set(used)) == per_epoch * 7
        epochs.append(used)
    assert epochs[0] != epochs[1]
    assert "fewer than one batch" in message(data.rows, 0, len(data) + 1)


def test_rows_of_similar_length_share_a_batch_but_batches_come_in_any_order(tmp_path, tokenizer):
    data = TaskData("sst2", write_glue(tmp_path, "sst2", rows=400), tokenizer, 64)
    lengths = [[len(row["input_ids"]) for row in data.rows(step, 8)] for step in range(50)]
    assert max(max(batch) - min(batch) for batch in lengths) <= 3       # of lengths 3 to 22
    firsts = [batch[0] for batch in lengths]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_pairs_are_encoded_and_the_longer_text_is_cut(tokenizer):
    data = TaskData("qqp", "unused", tokenizer, 10, splits=())
    row, = data.encode(["apple bread"], ["chair"])
    assert tokenizer.decode(row["input_ids"].tolist(), False) == "[CLS] apple bread [SEP] chair [SEP]"
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    row, = data.encode([" ".join(WORDS)], ["chair dream"])
    decoded = tokenizer.decode(row["input_ids"].tolist(), False)
    assert decoded == "[CLS] apple bread chair dream eagle [SEP] chair dream [SEP]"
    row, = data.encode([" ".join(WORDS)])
    assert tokenizer.decode(row["input_ids"].tolist(), False) == f"[CLS] {' '.join(WORDS[:8])} [SEP]"
    assert not row["token_type_ids"].any()
    batch = data.collate(data.encode(["apple", " ".join(WORDS)]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"} and batch["input_ids"].shape == (2, 10)
    assert batch["input_ids"][0].tolist()[3:] == [PAD] * 7 and batch["attention_mask"][0].sum() == 3


@pytest.mark.parametrize("name", ["sst2", "mnli", "qqp", "qnli"])
def test_evaluation_restores_the_order_and_knows_its_metrics(tmp_path, tokenizer, name):
    data = TaskData(name, write_glue(tmp_path, name), tokenizer, 32)
    measured, predictions = data.evaluate(answers_from_labels, batch_size=4)
    expected_metrics = {"mnli": ["accuracy", "accuracy_mismatched"], "qqp": ["accuracy", "f1"]}.get(name, ["accuracy"])
    assert list(measured) == expected_metrics and set(measured.values()) == {1.0}
    for set_name, file in data.task.dev.items():
        column = {"sst2": 1, "mnli": 11, "qqp": 5, "qnli": 3}[name]
        lines = (tmp_path / data.task.folder / file).read_text().splitlines()[1:]
        assert predictions[set_name] == [line.split("\t")[column] for line in lines]
    limited, predictions = data.evaluate(constant(0, len(data.labels)), limit=10)
    first = next(iter(data.task.dev))
    truth = [line.split("\t")[column] for line in
             (tmp_path / data.task.folder / data.task.dev[first]).read_text().splitlines()[1:11]]
    assert predictions[first] == [data.labels[0]] * 10
    assert limited["accuracy"] == pytest.approx(truth.count(data.labels[0]) / 10)
    if name == "qqp":       # "1" every time: precision is its share p, recall 1
        share = truth.count("1") / 10
        f1 = data.evaluate(constant(1, 2), limit=10)[0]["f1"]
        assert share != 0.5 and f1 == pytest.approx(2 * share / (1 + share))


def test_windows_cover_the_context_overlap_by_the_stride_and_hold_the_answers(tmp_path, tokenizer):
    data = TaskData("squad", write_squad(tmp_path, compress=True), tokenizer, 40, stride=8, splits=("train",))
    questions = {q.question: q for q in tasks_module.read_questions(tmp_path / "SQuAD" / "train-v1.1.json.gz")}
    groups = collections.defaultdict(list)
    for row in data._split_rows("train"):
        groups[row["example"]].append(row)
    assert len(groups) == len(questions) and max(map(len, groups.values())) > 2
    found = 0
    for windows, question in zip(groups.values(), questions.values()):
        context = tokenizer.encode(question.context, add_special_tokens=False)
        question_ids = tokenizer.encode(question.question, add_special_tokens=False).ids
        position = 0
        for number, row in enumerate(windows):
            ids, begin = row["input_ids"].tolist(), row["context_begin"]
            inside = ids[begin:-1]
            assert ids[:begin] == [CLS, *question_ids, SEP] and ids[-1] == SEP and len(ids) <= 40
            assert row["token_type_ids"].tolist() == [0] * begin + [1] * (len(inside) + 1)
            position -= 8 * (number > 0)
            assert inside == context.ids[position:position + len(inside)]
            assert row["offsets"].tolist() == [[*pair] for pair in context.offsets[position:position + len(inside)]]
            assert number == len(windows) - 1 or len(ids) == 40
            position += len(inside)
            text, start = question.answers[0]
            whole = row["offsets"][0, 0] <= start and start + len(text) <= row["offsets"][-1, 1]
            assert bool(row["start_position"]) == bool(row["end_position"]) == whole
            if whole:
                found += 1
                first = row["offsets"][row["start_position"] - begin, 0]
                last = row["offsets"][row["end_position"] - begin, 1]
                assert (first, question.context[first:last]) == (start, text)
        assert position == len(context.ids)
    assert found >= len(questions)


def test_windows_equal_those_of_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    data = TaskData("squad", "unused", tokenizer, 32, stride=10, splits=())
    for length in (1, 5, 20, 21, 22, 23, 31, 32, 33, 90):
        context = " ".join(random.Random(length).choices(WORDS, k=length))
        expected = theirs("where is apple", context, truncation="only_second", max_length=32, stride=10,
                          return_overflowing_tokens=True)
        windows = data.encode_question("where is apple", context)
        assert [row["input_ids"].tolist() for row in windows] == expected["input_ids"]
        assert [row["token_type_ids"].tolist() for row in windows] == expected["token_type_ids"]


def test_squad_without_room_is_refused(tokenizer):
    data = TaskData("squad", "unused", tokenizer, 32, stride=20, splits=())
    assert len(data.encode_question("where", " ".join(WORDS))) == 1         # fits, so no overlap is needed
    refusal = message(data.encode_question, "where is the apple ? " * 3, " ".join(WORDS * 4))
    assert "max_length 32 is too short" in refusal and "more than the 20" in refusal
    long_question = TaskData("squad", "unused", tokenizer, 100, splits=()).encode_question("apple " * 90, "bread chair")
    assert long_question[0]["context_begin"] == 66                          # [CLS], 64 word pieces, [SEP]


def test_squad_evaluation_finds_every_answer_again(tmp_path, tokenizer):
    data = TaskData("squad", write_squad(tmp_path), tokenizer, 40, stride=8)
    measured, predictions = data.evaluate(answers_from_labels, batch_size=5)
    questions = tasks_module.read_questions(tmp_path / "SQuAD" / "dev-v1.1.json")
    assert predictions == {"dev": {q.identifier: q.answers[0][0] for q in questions}}
    assert measured == {"exact_match": 1.0, "f1": 1.0}
    measured, predictions = data.evaluate(answers_from_labels, limit=3)
    assert list(predictions["dev"]) == ["q0", "q1", "q2"] and measured["f1"] == 1.0
    batch = data.collate(data.rows(0, 4))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
    assert batch["start_positions"].shape == (4,) and all(tensor.dtype == torch.int64 for tensor in batch.values())


# ---------------------------------------------------------------- metrics

def test_accuracy_and_f1_against_counting():
    generator = random.Random(0)
    for _ in range(20):
        predicted, expected = (generator.choices(["0", "1"], k=30) for _ in range(2))
        table_ = collections.Counter(zip(predicted, expected))
        precision = table_["1", "1"] / (table_["1", "1"] + table_["1", "0"])
        recall = table_["1", "1"] / (table_["1", "1"] + table_["0", "1"])
        assert binary_f1(predicted, expected, "1") == pytest.approx(2 * precision * recall / (precision + recall))
        assert accuracy(predicted, expected) == pytest.approx((table_["1", "1"] + table_["0", "0"]) / 30)
    assert binary_f1(["0", "0"], ["1", "0"], "1") == 0.0
    with pytest.raises(ValueError):
        accuracy([1], [1, 2])


def test_squad_scores_by_hand():
    assert normalize_answer("The  Quick, brown-fox; an A.B!") == "quick brownfox ab"
    assert normalize_answer("theatre anna a") == "theatre anna"
    assert answer_f1("the cat sat", "cat sat down") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert answer_f1("dog dog", "dog") == pytest.approx(2 * 0.5 * 1 / 1.5)      # a repeated word counts once
    assert answer_f1("cat", "dog") == 0.0
    scores = squad_scores({"a": "The Cat", "b": "big dog", "c": "x"}, {
        "a": ["cow", "cat!"], "b": ["dog", "a big red dog"], "c": ["y"]})
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 0.8 + 0) / 3})


def test_best_span_against_trying_all(tokenizer):
    data = TaskData("squad", "unused", tokenizer, 48, stride=8, splits=())
    context = "  ".join(random.Random(1).choices([word.title() for word in WORDS], k=70))
    windows = data.encode_question("Where is apple?", context)
    generator, longest_seen = np.random.default_rng(0), 0
    for trial in range(30):
        starts, ends = ([generator.normal(size=48).astype(np.float32) for _ in windows] for _ in range(2))
        if trial % 2:       # a start at the very beginning and an end at the very end: only short enough spans count
            starts[0][windows[0]["context_begin"]] += 9
            ends[0][len(windows[0]["input_ids"]) - 2] += 9
        for logits in (starts, ends):
            for window, values in zip(windows, logits):
                values[:window["context_begin"]] += 50          # the question, [CLS] and padding must not be chosen
                values[len(window["input_ids"]) - 1:] += 50
        candidates = [(starts[w][first] + ends[w][last], w, first, last) for w, window in enumerate(windows)
                      for first in range(window["context_begin"], len(window["input_ids"]) - 1)
                      for last in range(first, min(first + 30, len(window["input_ids"]) - 1))]
        score, w, first, last = max(candidates)
        longest_seen = max(longest_seen, last - first + 1)
        offsets, begin = windows[w]["offsets"], windows[w]["context_begin"]
        expected = int(offsets[first - begin, 0]), int(offsets[last - begin, 1])
        text, start, end, found = best_span(windows, starts, ends)
        assert (start, end) == expected and text == context[start:end] and found == pytest.approx(float(score))
    assert longest_seen > 10
    assert best_span(windows, starts, ends, longest=1)[0] in context.split()
    for last, expected in ((29, 30), (30, 1)):              # 30 tokens may be an answer, 31 may not
        starts, ends = np.zeros((len(windows), 48)), np.zeros((len(windows), 48))
        starts[0, windows[0]["context_begin"]], ends[0, windows[0]["context_begin"] + last] = 5, 4
        assert len(best_span(windows, starts, ends)[0].split()) == expected


def test_a_task_of_ones_own_whose_metric_is_f1(tmp_path, tokenizer):  # noqa: F811
    """It need not stand in TASKS, and is measured by what it quotes."""
    task = dataclasses.replace(TASKS["qqp"], name="own", metric="f1")
    data = TaskData(task, write_glue(tmp_path, "qqp"), tokenizer, 32)
    metrics, _ = data.evaluate(lambda batch: torch.tensor([[0.0, 1.0]]).expand(len(batch["input_ids"]), 2))
    share = metrics["accuracy"]
    assert metrics["f1"] == pytest.approx(2 * share / (1 + share))
