"""Models and tokenizers that others made: what cannot be honoured is refused by name, and nothing is silently wrong."""
import functools
import json
import shutil

import pytest
import torch
import transformers
from conftest import SHORT, fails

import infer_cpu
import model as network
import prune
import quant
import train
from data import DataError
from data.encode import evaluation_data, match_classes
from data.tasks import TASKS, TaskData
from data.wordpiece import SPECIAL_TOKENS, load_tokenizer, save_tokenizer
from formats import heads, int8, model_directory
from formats.config import read_config
from formats.safetensors import read_safetensors, write_safetensors
from model import InputError, ModelConfig

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
LETTERS = "abcdefghijklmnopqrstuvwxyz.,?!'[]<>/0123456789"
WORDS = "the film was good bad very not it is who wrote book ada in london paris rain river".split()
VOCABULARY = [*SPECIAL_TOKENS, *LETTERS, *("##" + letter for letter in LETTERS if letter.isalnum()), *WORDS]
BERT = {"tokenizer_class": "BertTokenizer"}
TEXTS = ["the film was good", "rain in paris", "very bad"]


def error_of(function, *arguments, **named):
    with pytest.raises((InputError, DataError)) as caught:
        function(*arguments, **named)
    return str(caught.value)


def edit(path, **changes):
    """Change a JSON file; ... removes a field."""
    value = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({name: each for name, each in value.items() if each is not ...}))


def foreign(folder, kind="classification", labels=3, words=VOCABULARY, seed=0, **sizes):
    """A small model in a folder, with the vocabulary in vocab.txt, as from elsewhere: nothing of ours beside it."""
    torch.manual_seed(seed)
    config = ModelConfig(**{**dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                   intermediate_size=64, max_position_embeddings=64, initializer_range=0.3), **sizes})
    model = network.build(config, kind, labels)
    model_directory.save(model, folder)
    (folder / "compression.safetensors").unlink()
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    edit(folder / "tokenizer_config.json", **BERT)
    return model.eval()


def answers(folder, texts=TEXTS, pairs=(), engine="fp32"):
    return infer_cpu.load(folder, engine, say=lambda line: None).answer(texts, pairs)


def pack(folder, sparsity=0.0):
    """Quantize the model in a folder, so that the integer engines run it."""
    model = model_directory.load(folder, model_directory.kind_of(folder)[0])
    for _, layer in prune.prunable(model) if sparsity else ():
        layer.mask.copy_(prune.magnitude_mask(layer.weight, sparsity))
    quant.prepare(model, 7)
    quant.round_embeddings(model)
    encode = TaskData("sst2", ".", load_tokenizer(folder), 32, splits=())
    batch = encode.collate(encode.encode(TEXTS))
    model.train()
    network.set_dropout(model, 0.0)
    model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    quant.update_ranges(model)
    int8.write_int8(model, folder)


# ---------------------------------------------------------------- classes by name

PUBLISHED = {"0": "CONTRADICTION", "1": "Entailment", "2": "neutral"}


@pytest.mark.parametrize("names, order", [
    (None, [0, 1, 2]), ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, [0, 1, 2]),
    ({"0": "2", "1": "0", "2": "1"}, [1, 2, 0]), (PUBLISHED, [1, 2, 0]),
    ({"0": "neutral", "1": "contradiction", "2": "entailment"}, [2, 0, 1])])
def test_classes_are_found_by_their_names(names, order):
    assert heads.class_order({"id2label": names}, 3, TASKS["mnli"], "somewhere") == order


def test_published_names_of_every_task():
    for task, names, order in (("sst2", ["NEGATIVE", "POSITIVE"], [0, 1]), ("sst2", ["positive", "negative"], [1, 0]),
                               ("sst2", ["1", "0"], [1, 0]), ("qqp", ["Duplicate", "not duplicate"], [1, 0]),
                               ("qnli", ["not-entailment", "entailment"], [1, 0])):
        raw = {"id2label": {str(i): name for i, name in enumerate(names)}}
        assert heads.class_order(raw, 2, TASKS[task], "somewhere") == order


@pytest.mark.parametrize("changes, count, words", [
    ({"id2label": {"0": "joy", "1": "anger", "2": "fear"}}, 3, ["joy, anger, fear", "entailment"]),
    ({"id2label": {"0": "entailment", "1": "entailment", "2": "neutral"}}, 3, ["entailment, entailment"]),
    ({"id2label": {"0": "entailment", "1": "neutral"}}, 3, ["id2label"]),
    ({"id2label": {"0": None, "1": 5, "2": "x"}}, 3, ["None, 5, x"]),
    ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_3"}}, 3, ["LABEL_3"]),
    ({}, 2, ["3 classes", "2 outputs"]), ({}, 1, ["1 output"]),
    ({"problem_type": "multi_label_classification"}, 3, ["multi_label"]), ({"problem_type": "regression"}, 3, ["regr"]),
    ({"compression": {"task": "sst2"}}, 3, ["sst2", "mnli"])])
def test_classes_that_are_not_the_tasks_are_refused(changes, count, words):
    message = error_of(heads.class_order, changes, count, TASKS["mnli"], "somewhere")
    assert "somewhere" in message and all(word in message for word in words)


def nli(folder, answers_with):
    """A task folder MNLI whose dev sets say what a model in MNLI's own order answers."""
    (folder / "MNLI").mkdir(parents=True)
    lines = ["sentence1\tsentence2\tgold_label", *(f"{text}\tgood\t{answer}" for text, answer in answers_with)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        (folder / "MNLI" / f"{name}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def published_order(tmp_path):
    """A folder with a model in MNLI's own order, `ours`, the same one with the published order of its head, `theirs`,
    and `tasks`, files that both answer without a mistake."""
    model = foreign(tmp_path / "ours", seed=3)
    texts = [f"{first} {second}" for first in WORDS for second in WORDS[::3]]
    encode = TaskData("mnli", ".", load_tokenizer(tmp_path / "ours"), 32, splits=())
    batch = encode.collate(encode.encode(texts, ["good"] * len(texts)))
    with torch.no_grad():                                           # every class is the answer to some
        model.classifier.bias -= model(*batch.values()).mean(0)
    names, theirs = TASKS["mnli"].labels, [2, 0, 1]                 # contradiction, entailment, neutral
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    for folder, order in (("ours", [0, 1, 2]), ("theirs", theirs)):
        tensors = {**read_safetensors(tmp_path / folder / "model.safetensors")[0],
                   "classifier.weight": model.classifier.weight.detach()[order],
                   "classifier.bias": model.classifier.bias.detach()[order]}
        write_safetensors(tmp_path / folder / "model.safetensors", tensors)
        edit(tmp_path / folder / "config.json", id2label={str(i): names[place] for i, place in enumerate(order)})
    said = answers(tmp_path / "ours", texts, ["good"] * len(texts))
    assert len({label for label, _ in said}) == 3
    nli(tmp_path / "tasks", zip(texts, (label for label, _ in said)))
    return tmp_path


@pytest.mark.parametrize("engine", ["fp32", "int8"])
def test_evaluation_and_predictions_go_by_name(published_order, engine, capsys):
    if engine == "int8":
        pack(published_order / "theirs")
    infer_cpu.main([str(published_order / "theirs"), "--evaluate", "--task", "mnli", "--engine", engine, "--data",
                    str(published_order / "tasks"), "--max-len", "32", "--predictions", str(published_order / "out"),
                    "--json", str(published_order / "report.json")])
    metrics = json.loads((published_order / "report.json").read_text())["metrics"]
    assert metrics["accuracy"] >= (1.0 if engine == "fp32" else 0.9) and metrics["accuracy"] == metrics[
        "accuracy_mismatched"]
    predicted = [line.split("\t")[1] for line in (published_order / "out" / "MNLI-m.tsv").read_text().splitlines()[1:]]
    right = [line.split("\t")[2] for line in
             (published_order / "tasks" / "MNLI" / "dev_matched.tsv").read_text().splitlines()[1:]]
    assert sum(a == b for a, b in zip(predicted, right)) / len(right) == pytest.approx(metrics["accuracy"])


def test_stage_evaluate_goes_by_name(published_order, capsys):
    train.main(["--stage", "evaluate", "--preset", "tiny", "--task", "mnli", "--init", str(published_order / "theirs"),
                "--data", str(published_order / "tasks"), "--max-len", "32"])
    assert "accuracy 1.0000, accuracy_mismatched 1.0000" in capsys.readouterr().out


def test_a_loaded_head_is_put_into_the_tasks_order(published_order):
    ours, theirs = (model_directory.load(published_order / name, "classification", task=TASKS["mnli"], say=pytest.fail)
                    for name in ("ours", "theirs"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_teacher_init_and_quantize_go_by_name(published_order, capsys):
    """Whichever order the head has, what is trained from it is the same, and carries the task's names."""
    common = [*SHORT, "--task", "mnli", "--data", str(published_order / "tasks"), "--max-len", "32", "--steps", "2",
              "--precision", "fp32"]
    results = {}
    for name in ("ours", "theirs"):
        out, start = published_order / f"out-{name}", published_order / name
        train.main(["--stage", "finetune", "--sparsity", "0", "--init", str(published_order / "ours"), "--teacher",
                    str(start), *common, "--out", str(out / "teacher")])
        train.main(["--stage", "finetune", "--sparsity", "0", "--init", str(start), *common, "--out",
                    str(out / "init")])
        train.main(["--stage", "quantize", "--sparsity", "0", "--init", str(start), "--teacher", "none", *common,
                    "--out", str(out / "quantize")])
        results[name] = [read_safetensors(path / "mnli" / leaf / "model.safetensors")[0] for path, leaf in
                         ((out / "teacher", "teacher"), (out / "init", "teacher"), (out / "quantize", "int8-dense"))]
        written = json.loads((out / "quantize/mnli/int8-dense/config.json").read_text())
        assert list(written["id2label"].values()) == list(TASKS["mnli"].labels)
    for a, b in zip(results["ours"], results["theirs"]):
        assert all(torch.equal(a[key], b[key]) for key in a)
    edit(published_order / "theirs" / "config.json", id2label={"0": "joy", "1": "anger", "2": "fear"})
    start = ["--init", str(published_order / "theirs"), *common, "--out", str(published_order / "other")]
    assert "joy, anger, fear" in fails(capsys, "--stage", "quantize", "--sparsity", "0", "--teacher", "none", *start)
    assert "joy, anger, fear" in fails(capsys, "--stage", "finetune", "--sparsity", "0", *start, "--teacher",
                                       published_order / "theirs")
    train.main(["--stage", "finetune", "--sparsity", "0", *start])       # a new task for that encoder: a fresh head
    assert "joy, anger, fear" in capsys.readouterr().out


def test_a_head_of_two_classes_belongs_to_its_own_task(chain, world, tmp_path, capsys):
    """SST-2 and QQP both call their classes 0 and 1: what config.json records of the training tells them apart."""
    notes = {}
    for task in ("qqp", "sst2"):
        model_directory.load(chain / "sst2/teacher", "classification", task=TASKS[task], fresh_head=True,
                             say=notes.setdefault(task, []).append)
    assert "trained on sst2" in notes["qqp"][0] and "fresh" in notes["qqp"][1] and notes["sst2"] == []
    assert "trained on sst2" in fails(capsys, "--stage", "evaluate", "--task", "qnli", "--init", chain / "sst2/teacher",
                                      "--data", world)


def test_both_programs_refuse_another_number_of_classes(tmp_path, world, capsys):
    for labels, task in ((3, "sst2"), (2, "mnli")):
        foreign(tmp_path / task, labels=labels)
    nli(tmp_path / "tasks", [("good", "neutral")])
    shutil.copytree(world / "SST-2", tmp_path / "tasks" / "SST-2")
    for task, words in (("sst2", "2 classes"), ("mnli", "3 classes")):
        arguments = ["--task", task, "--data", str(tmp_path / "tasks")]
        assert words in fails(capsys, "--stage", "evaluate", "--preset", "tiny", "--init", tmp_path / task, *arguments)
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([str(tmp_path / task), "--evaluate", *arguments])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and words in printed.splitlines()[-1]


def test_without_its_own_files_a_model_is_not_measured_on_the_tiny_world(tmp_path, capsys):
    foreign(tmp_path / "model", labels=2)
    foreign(tmp_path / "encoder", "pretraining")
    start = ["--stage", "evaluate", "--preset", "tiny", "--init"]
    assert "give --task" in fails(capsys, *start, tmp_path / "model")
    assert "--data FOLDER" in fails(capsys, *start, tmp_path / "model", "--task", "sst2")
    assert "--corpus TEXT" in fails(capsys, *start, tmp_path / "encoder")
    assert "needs a classification model" in fails(capsys, *start, tmp_path / "encoder", "--task", "sst2")
    assert "--data FOLDER" in error_of(evaluation_data, tmp_path / "model", "classification", "sst2", "", None)


def test_the_recorded_task_is_the_default_of_both_programs(chain, world, capsys):
    train.main(["--stage", "evaluate", "--init", str(chain / "sst2/teacher"), "--data", str(world)])
    assert "accuracy" in capsys.readouterr().out


# ---------------------------------------------------------------- the head's kind

@pytest.mark.parametrize("labels, changes", [
    (1, {}), (1, {"problem_type": "regression"}), (3, {"problem_type": "multi_label_classification"}), (3, {}),
    (3, {"problem_type": "single_label_classification"}), (2, {"id2label": {"0": "bad", "1": "good"}})])
def test_answers_are_those_of_transformers_pipeline(labels, changes, tmp_path):
    foreign(tmp_path, labels=labels)
    edit(tmp_path / "config.json", **changes, **({"label2id": ...} if "id2label" in changes else {}))
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    for (label, share), expected in zip(answers(tmp_path), pipeline(TEXTS)):
        assert label == expected["label"] and share == pytest.approx(expected["score"], abs=1e-5)


def test_the_int8_engines_answer_by_the_heads_kind_too(tmp_path):
    foreign(tmp_path, labels=1)
    pack(tmp_path)
    for (label, share), (_, exact) in zip(answers(tmp_path, engine="int8"), answers(tmp_path)):
        assert label == "LABEL_0" and 0 < share < 1 and share == pytest.approx(exact, abs=0.1)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "5" * 64 + "\nsize 1\n"
    foreign(tmp_path)
    pack(tmp_path)
    for name in ("vocab.txt", "model.safetensors", "int8.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(pointer)
        assert "git-LFS" in error_of(answers, tmp_path, engine="int8" if name.startswith("int8") else "fp32")
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text(pointer)
    assert "git-LFS" in error_of(answers, tmp_path)


# ---------------------------------------------------------------- configurations and weights

@pytest.mark.parametrize("changes, word", [
    ({"is_decoder": True}, "is_decoder"), ({"add_cross_attention": True}, "add_cross_attention"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"), ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"hidden_act": "gelu_new"}, "gelu_new"),
    ({"hidden_act": "silu"}, "silu"), ({"position_embedding_type": "relative_key_query"}, "relative_key_query"),
    ({"cross_attention_hidden_size": 32}, "cross_attention"),
    ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
    ({"architectures": ["BertForSequenceClassification", "BertForQuestionAnswering"]}, "BertForQuestionAnswering")])
def test_settings_that_change_the_mathematics_are_refused(changes, word, tmp_path):
    foreign(tmp_path)
    edit(tmp_path / "config.json", **changes)
    message = error_of(answers, tmp_path)
    assert str(tmp_path / "config.json") in message and word in message


@pytest.mark.parametrize("changes", [
    {"model_type": ...}, {"architectures": ...}, {"model_type": ..., "architectures": ...},
    {"hidden_act": "gelu_python"},
    {"architectures": ["BertForSequenceClassification", "BertModel"]}, {"is_decoder": False, "pruned_heads": {}},
    {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}, {"pad_token_id": 3}, {"use_cache": True},
    {"layer_norm_eps": 1e-3}, {"chunk_size_feed_forward": 0, "output_attentions": True}])
def test_settings_that_transformers_opens_too(changes, tmp_path):
    foreign(tmp_path)
    edit(tmp_path / "config.json", **changes)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(1).amax(1)
    assert [share for _, share in answers(tmp_path)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_distilberts_names_and_its_span_dropout(tmp_path):
    foreign(tmp_path, "span", model_type="distilbert", type_vocab_size=0, span_dropout=0.25)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["qa_dropout"] == 0.25 and model_directory.load(tmp_path, "span").dropout.p == 0.25
    edit(tmp_path / "config.json", dim=..., n_heads=..., n_layers=..., hidden_size=32, num_hidden_layers=2,
         num_attention_heads=4)                             # transformers takes these names as well
    assert read_config(tmp_path)[0].hidden_size == 32
    edit(tmp_path / "config.json", activation="relu")
    assert "relu" in error_of(read_config, tmp_path)
    edit(tmp_path / "config.json", activation="gelu", model_type=..., architectures=...)
    assert model_directory.kind_of(tmp_path)[0] == "span"


def test_a_decoder_that_need_not_be_tied_is_refused(tmp_path):
    foreign(tmp_path, "pretraining")
    edit(tmp_path / "config.json", tie_word_embeddings=False)
    assert "ties" in error_of(model_directory.load, tmp_path, "pretraining")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("binary", [False, True])
def test_wrappers_leave_a_prefix_before_every_name(prefix, binary, tmp_path):
    foreign(tmp_path)
    expected, path = answers(tmp_path), tmp_path / "model.safetensors"
    tensors = {prefix + name: tensor for name, tensor in read_safetensors(path)[0].items()}
    tensors[prefix + "bert.embeddings.token_type_ids"] = torch.zeros(1, 64, dtype=torch.int64)       # a buffer
    if binary:
        path.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        write_safetensors(path, tensors)
    assert answers(tmp_path) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value, tmp_path, world, chain, capsys):
    foreign(tmp_path / "model", labels=2)
    path, name = tmp_path / "model" / "model.safetensors", "bert.encoder.layer.1.intermediate.dense.weight"
    tensors, _ = read_safetensors(path)
    tensors[name][3, 5] = value
    write_safetensors(path, {key: tensor.half() for key, tensor in tensors.items()})
    message = error_of(answers, tmp_path / "model")
    assert str(path) in message and name in message
    shutil.copytree(chain / "sst2/teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    tensors, _ = read_safetensors(path)
    tensors[name][3, 5] = value
    write_safetensors(path, tensors)
    message = fails(capsys, "--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data", world, "--init",
                    chain / "pretrain", "--teacher", tmp_path / "teacher", "--out", tmp_path / "out", "--steps", "2")
    assert str(path) in message and name in message and "--lr" not in message


def test_answers_that_are_no_numbers_are_refused(tmp_path):
    """Every weight is a number, and their sums are not."""
    foreign(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, _ = read_safetensors(path)
    tensors["classifier.weight"].fill_(3e38)
    write_safetensors(path, tensors)
    assert "overflow" in error_of(answers, tmp_path)


def test_numbers_of_a_kind_that_is_not_read_are_named(tmp_path):
    foreign(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F8X"'))
    assert "F8X" in error_of(answers, tmp_path)


# ---------------------------------------------------------------- what an engine is asked

@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    foreign(folder)
    pack(folder, 0.5)
    return folder


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("engine", infer_cpu.ENGINES)
def test_every_engine_takes_and_refuses_the_same_batches(engine, quantized):
    try:
        engine = infer_cpu.load(quantized, engine, say=lambda line: None)
    except InputError as error:                             # no compiler, no tile registers
        if engine not in ("native", "tiles"):
            raise
        pytest.skip(str(error))
    rows = len(VOCABULARY)
    ids = torch.randint(5, rows, (3, 12), generator=torch.Generator().manual_seed(0))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    expected = engine(batch)
    for same in ({name: tensor.int() for name, tensor in batch.items()},
                 {name: tensor.numpy() for name, tensor in batch.items()},
                 {**batch, "attention_mask": mask.bool()}, {**batch, "attention_mask": mask.float()},
                 {"input_ids": ids, "attention_mask": mask}):
        assert torch.equal(engine(same), expected)
    assert torch.allclose(engine({"input_ids": ids[:1]}), expected[:1], atol=1e-5)
    assert engine({name: tensor[:0] for name, tensor in batch.items()}).shape == (0, 3)
    alone, left = mask.clone(), mask.flip(1)
    alone[1] = 0
    for wrong, word in (({"input_ids": ids - rows}, "-"), ({"input_ids": ids + rows}, str(rows)),
                        ({"token_type_ids": types + 7}, "type"), ({"attention_mask": alone}, "padding alone"),
                        ({"attention_mask": left}, "begins with padding"), ({"attention_mask": mask[:2]}, "shapes"),
                        ({"input_ids": ids[0]}, "shapes"),
                        ({name: each[:, :0] for name, each in batch.items()}, "shapes")):
        assert word in error_of(engine, {**batch, **wrong})
    ids = ids.clone()
    ids[0, 0] = -1
    assert "-1" in error_of(engine, {**batch, "input_ids": ids})


def test_lists_that_a_model_has_no_use_for_are_refused(tmp_path):
    for kind, others in (("classification", {"contexts": ["the film"]}), ("span", {"pairs": ["the film"]})):
        foreign(tmp_path / kind, kind)
        engine = infer_cpu.load(tmp_path / kind, "fp32", say=lambda line: None)
        assert "alone" in error_of(functools.partial(engine.answer, **others), ["the film was good"])


def test_configurations_of_nothing_are_named(tmp_path, capsys):
    foreign(tmp_path)
    for entry, words in (({"num_hidden_layers": 0}, "at least one layer"), ({"compression": {"max_len": "64"}}, "max_len")):
        before = (tmp_path / "config.json").read_text()
        edit(tmp_path / "config.json", **entry)
        assert words in error_of(answers, tmp_path)
        (tmp_path / "config.json").write_text(before)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": ""}}))
    assert "weight_map" in error_of(answers, tmp_path)


def test_a_context_without_words_is_refused_and_json_holds_numbers(tmp_path, capsys):
    foreign(tmp_path, "span")
    for context in ("", " \n", "\x00"):
        assert "no word" in error_of(infer_cpu.load(tmp_path, "fp32").answer, ["who"], (), [context])
    with pytest.raises(SystemExit) as stopped:
        infer_cpu.main([str(tmp_path), "--text", "who", "--context", "", "--json", str(tmp_path / "answer.json")])
    assert stopped.value.code == 2 and not (tmp_path / "answer.json").exists()
    infer_cpu.main([str(tmp_path), "--text", "who", "--context", "ada wrote", "--json", str(tmp_path / "answer.json")])
    assert json.loads((tmp_path / "answer.json").read_text())["answers"][0]["score"] is not None


def test_pairs_need_two_token_types(tmp_path, world, capsys):
    foreign(tmp_path / "model", labels=2, type_vocab_size=1)
    assert len(answers(tmp_path / "model")) == 3
    assert "one token type" in error_of(answers, tmp_path / "model", TEXTS, TEXTS)
    (tmp_path / "model" / "vocab.txt").write_text("".join(word + "\n" for word in VOCABULARY))
    common = ["--stage", "finetune", "--sparsity", "0", "--init", tmp_path / "model", "--data", world, "--out",
              tmp_path / "out", *SHORT, "--steps", "1"]
    assert "one token type" in fails(capsys, *common, "--task", "qnli")
    assert "one token type" in fails(capsys, "--stage", "evaluate", "--preset", "tiny", "--task", "qnli", "--init",
                                     tmp_path / "model", "--data", world)
    foreign(tmp_path / "encoder", "pretraining", type_vocab_size=1)
    assert "one token type" in fails(capsys, "--stage", "pretrain", "--init", tmp_path / "encoder", "--corpus",
                                     world / "corpus.txt", "--out", tmp_path / "out", *SHORT, "--steps", "1")


# ---------------------------------------------------------------- teachers

def test_a_teacher_of_another_vocabulary_is_refused(chain, world, tmp_path, capsys):
    """A smaller one, and one of the same size in another order, which would teach nonsense in silence."""
    whole = (chain / "pretrain" / "vocab.txt").read_text().splitlines()
    smaller = whole[:-10]
    moved = [*whole[:100], whole[101], whole[100], *whole[102:]]
    for words, other in ((smaller, whole[-10]), (moved, whole[100])):
        teacher = tmp_path / str(len(words))
        shutil.copytree(chain / "sst2/teacher", teacher)
        (teacher / "tokenizer.json").unlink()
        (teacher / "vocab.txt").write_text("".join(word + "\n" for word in words))
        message = fails(capsys, "--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data", world, "--init",
                        chain / "pretrain", "--teacher", teacher, "--out", tmp_path / "out", *SHORT, "--steps", "2")
        assert "vocabulary" in message and str(teacher) in message and repr(other) in message


def test_distilbert_teaches_bert_without_its_sentences(chain, world, tmp_path, capsys):
    config = read_config(chain / "pretrain")[0]
    torch.manual_seed(1)
    teacher = network.build(train.replace(config, model_type="distilbert", type_vocab_size=0), "pretraining")
    model_directory.save(teacher, tmp_path / "distil")
    save_tokenizer(load_tokenizer(chain / "pretrain"), tmp_path / "distil")
    train.main(["--stage", "prune", *SHORT, "--corpus", str(world / "corpus.txt"), "--init", str(chain / "pretrain"),
                "--teacher", str(tmp_path / "distil"), "--out", str(tmp_path / "out"), "--steps", "4"])
    assert "no next-sentence head" in capsys.readouterr().out
    head, *_ = (tmp_path / "out/prune-unstructured-0.85/log.csv").read_text().splitlines()
    assert "kd," in head and ",nsp" in head and "kd_nsp" not in head
    wider = network.build(train.replace(config, vocab_size=config.vocab_size + 8), "pretraining")
    model_directory.save(wider, tmp_path / "wider")
    save_tokenizer(load_tokenizer(chain / "pretrain"), tmp_path / "wider")
    assert "predicts" in fails(capsys, "--stage", "prune", *SHORT, "--corpus", world / "corpus.txt", "--init",
                               chain / "pretrain", "--teacher", tmp_path / "wider", "--out", tmp_path / "other",
                               "--steps", "4")


# ---------------------------------------------------------------- zeros

@pytest.mark.parametrize("with_masks", [True, False])
def test_a_dense_stage_trains_all_weights_of_a_sparse_model(with_masks, chain, world, tmp_path, capsys):
    """Whether its masks lie beside it or not; and it is said."""
    shutil.copytree(chain / "prune-1x4-0.85", tmp_path / "sparse")
    if not with_masks:
        (tmp_path / "sparse" / "compression.safetensors").unlink()
    train.main(["--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data", str(world), "--init",
                str(tmp_path / "sparse"), "--out", str(tmp_path / "out"), *SHORT, "--steps", "3"])
    assert "85.0% of the weights it starts from are zero, and are trained like all others" in capsys.readouterr().out
    model = model_directory.load(tmp_path / "out/sst2/teacher", "classification")
    assert prune.measured_sparsity(model) < 0.01
    assert json.loads((tmp_path / "out/sst2/teacher/config.json").read_text())["compression"]["pattern"] == "dense"


def test_match_classes_leaves_span_models_alone(tmp_path):
    model = foreign(tmp_path, "span")
    data = TaskData("squad", ".", load_tokenizer(tmp_path), 32, splits=())
    match_classes(data, model, tmp_path)
    assert data.class_order == []
