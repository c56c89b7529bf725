"""Hidden states in place of the vocabulary: the loss by hand and by finite differences, an encoder without heads pruned
from raw text, and what it transfers to. Vocabulary heads that start on an encoder that has none."""
import copy
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHORT, commands, fails, save_every
from test_distill import BERT, DISTILBERT, assert_same_gradients, gradients, inputs_of, make_batch

import distill
import infer_cpu
import model as network
import prune
import train
from bench import measure_minilm
from data import calibrate, text
from data.corpus import read_documents
from data.settings import start_vocabulary
from formats import model_directory, sentence
from formats.safetensors import read_safetensors, write_safetensors


def make(seed=0, config=BERT):
    torch.manual_seed(seed)
    return network.build(config, "encoder").eval()


def states_by_hooks(model, batch):
    """What each layer returns and what the pooler makes of the last, float64 arrays, without `Encoder.states`."""
    found = []
    hooks = [layer.register_forward_hook(lambda *arguments: found.append(arguments[2]))
             for layer in model.encoder.layers]
    with torch.no_grad():
        hidden = model(*inputs_of(batch))
    [hook.remove() for hook in hooks]
    pooled = None if model.encoder.pooler is None else np.tanh(
        hidden[:, 0].double().numpy() @ model.encoder.pooler.weight.detach().double().numpy().T
        + model.encoder.pooler.bias.detach().double().numpy())
    return [state.double().numpy() for state in found], pooled


@pytest.mark.parametrize("config", [BERT, DISTILBERT])
def test_the_loss_by_hand(config):
    student, teacher, batch = make(0, config), make(1, config), make_batch("classification")
    (ours, pooled), (theirs, taught), real = (*(states_by_hooks(model, batch) for model in (student, teacher)),
                                              batch["attention_mask"].bool().numpy())
    expected = 0.0
    for one, other in zip(ours, theirs, strict=True):
        shares = ((one - other) ** 2).sum(-1) / (other ** 2).sum(-1)
        expected += shares[real].mean()
    total, parts = distill.loss(student, teacher, batch, distill.denominators([batch]))
    assert parts["hidden"] == pytest.approx(expected, rel=1e-5) and len(ours) == 2
    if config is BERT:
        shares = ((pooled - taught) ** 2).sum(-1) / (taught ** 2).sum(-1)
        assert parts["pooled"] == pytest.approx(shares.mean(), rel=1e-5)
    assert float(total.detach()) == pytest.approx(sum(parts.values()), rel=1e-6) and len(parts) == 1 + (config is BERT)
    assert distill.loss(teacher, teacher, batch, distill.denominators([batch]))[1]["hidden"] == 0


@pytest.mark.parametrize("pooling", sentence.POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sentence_encoders_vector_is_learnt_too(pooling, normalize):
    student, teacher, batch = make(0), make(1), make_batch("classification")
    without = distill.loss(student, teacher, batch, distill.denominators([batch]))[1]
    student.sentence = sentence.Sentence(pooling, normalize)
    total, parts = distill.loss(student, teacher, batch, distill.denominators([batch]))
    expected = []
    for ours, theirs, mask in zip(*(states_by_hooks(model, batch)[0][-1] for model in (student, teacher)),
                                  batch["attention_mask"].bool().numpy()):
        one, other = ({"mean": states[mask].mean(0), "cls": states[0], "max": states[mask].max(0)}[pooling]
                      for states in (ours, theirs))
        if normalize:
            one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
            assert ((one - other) ** 2).sum() == pytest.approx(2 - 2 * one @ other)         # the cosine, in other words
        expected.append(((one - other) ** 2).sum() / (other ** 2).sum())
    assert parts["vector"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert {**parts, "vector": 0} == pytest.approx({**without, "vector": 0})
    assert float(total.detach()) == pytest.approx(sum(parts.values()), rel=1e-6)


def test_padding_and_labels_do_not_count():
    student, teacher, batch = make(0), make(1), make_batch("pretraining")
    count = distill.denominators([batch])
    expected = distill.loss(student, teacher, batch, count)[1]
    other = {**batch, "labels": torch.full_like(batch["labels"], -100),
             "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    found = distill.loss(student, teacher, other, count)[1]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_gradient_by_finite_differences():
    """Along its own direction, for every parameter together and for some alone."""
    student, teacher, batch = make(0).double(), make(1).double(), make_batch("classification")
    count, parameters = distill.denominators([batch]), dict(student.named_parameters())
    float_type = torch.Tensor.float
    torch.Tensor.float = lambda tensor: tensor                  # in float64 the differences are exact enough
    try:
        def value():
            return distill.loss(student, teacher, batch, count)[0]

        value().backward()
        slopes = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
        assert slopes.keys() == parameters.keys()
        for names in (slopes, ["encoder.word.weight"], ["encoder.layers.0.query.weight"], ["encoder.pooler.weight"]):
            size = math.sqrt(sum(float(slopes[name].square().sum()) for name in names))
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for name in names:
                        parameters[name] += sign * 1e-5 * slopes[name] / size
                    sides.append(float(value()))
                    for name in names:
                        parameters[name] -= sign * 1e-5 * slopes[name] / size
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(size, rel=1e-4), names
    finally:
        torch.Tensor.float = float_type


def test_micro_batches_add_up():
    whole = make_batch("classification")
    found = []
    for size in (6, 2, 1):
        student, teacher = make(0), make(1)
        pieces = [{name: tensor[i:i + size] for name, tensor in whole.items()} for i in range(0, 6, size)]
        count = distill.denominators(pieces)
        parts = [distill.loss(student, teacher, piece, count) for piece in pieces]
        sum(loss for loss, _ in parts).backward()
        found.append((gradients(student), {name: sum(part[name] for _, part in parts) for name in parts[0][1]}))
    for other, parts in found[1:]:
        assert_same_gradients(other, found[0][0])
        assert parts == pytest.approx(found[0][1], rel=1e-5)


# ---------------------------------------------------------------- the stage

@pytest.fixture(scope="module")
def bare(chain, tmp_path_factory):
    """An encoder without any head, as sentence-transformers publishes one."""
    folder = tmp_path_factory.mktemp("bare")
    model = model_directory.load(chain / "pretrain", "encoder", say=lambda line: None)
    model_directory.save(model, folder)
    (folder / "compression.safetensors").unlink()
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chain / "pretrain" / name, folder)
    return folder


def test_a_bare_encoder_in_transformers(bare):
    transformers = pytest.importorskip("transformers")
    assert model_directory.kind_of(bare)[0] == "encoder"
    theirs, info = transformers.BertModel.from_pretrained(bare, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = model_directory.load(bare, "encoder", say=pytest.fail).eval()
    with torch.no_grad():
        expected = theirs.eval()(ids)
        hidden = ours(ids, torch.ones_like(ids), torch.zeros_like(ids))
        assert torch.allclose(hidden, expected.last_hidden_state, atol=1e-5)
        assert torch.allclose(ours.encoder.pooled(hidden), expected.pooler_output, atol=1e-5)


def upstream(bare, world, out, *flags):
    train.main([str(flag) for flag in (
        "--stage", "prune", *SHORT, "--corpus", world / "corpus.txt", "--init", bare, "--kd-target", "hidden",
        "--pattern", "1x4", "--sparsity", "0.8", "--out", out, *flags)])
    return out / "prune-1x4-0.8"


def test_an_encoder_without_heads_is_pruned_and_transfers(bare, world, tmp_path, capsys):
    directory = upstream(bare, world, tmp_path, "--steps", "40")
    result = json.loads((directory / "metrics.json").read_text())
    rows = (directory / "log.csv").read_text().splitlines()
    losses = [float(dict(zip(rows[0].split(","), row.split(",")))["hidden"]) for row in rows[1:]]
    assert losses[0] == pytest.approx(0, abs=1e-3)              # step 0 prunes nothing yet: the student is the teacher
    assert result["metrics"].keys() == {"validation_hidden_loss", "validation_pooled_loss"}
    assert 0.01 < result["metrics"]["validation_hidden_loss"] < 2.5
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-3) and result["layers"]["encoder.pooler"][1] > 0
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["BertModel"]
    assert json.loads((directory / "run.json").read_text())["teacher"] == str(bare)
    kept = read_safetensors(directory / "model.safetensors")[0]
    assert not any(name.startswith("cls.") for name in kept)
    for task in ("sst2", "squad"):
        train.main(["--stage", "finetune", "--init", str(directory), "--teacher", "none", "--data", str(world), "--task",
                    task, "--steps", "3", *SHORT, "--max-len", "64", "--out", str(tmp_path)])
        after = read_safetensors(tmp_path / task / "sparse-1x4-0.8" / "model.safetensors")[0]
        for name in (name for name in kept if name in after and kept[name].ndim == 2 and "embeddings" not in name):
            assert bool((after[name][kept[name] == 0] == 0).all()), name
        assert prune.measured_sparsity(model_directory.load(
            tmp_path / task / "sparse-1x4-0.8", "span" if task == "squad" else "classification")) > 0.79
    with pytest.raises(SystemExit):
        infer_cpu.main([str(directory), "--text", "good"])
    assert "without a task" in capsys.readouterr().err


def test_what_a_layer_reads_is_what_reaches_its_linears(chain):
    """Held against torch's own hooks, with padding in the rows; the slot is empty again afterwards."""
    model = model_directory.load(chain / "pretrain", "encoder", say=lambda line: None).eval()
    old, layer = (torch.nn.ModuleList(copy.deepcopy(model.encoder.layers))[0] for _ in range(2))
    ids = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.arange(12) < torch.tensor([[12], [5], [9]])
    with torch.no_grad():
        layer.query.weight *= 0.5
        ours = model.encoder.embedded(ids, torch.zeros_like(ids))
        theirs = ours + 0.1
        for name in ("query", "attention_output", "intermediate", "output"):
            caught = []
            for each, hidden in ((layer, ours), (old, theirs)):
                hook = getattr(each, name).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][real]))
                each(hidden, real[:, None, None])
                hook.remove()
            gram, cross = calibrate.products(layer, old, getattr(layer, name), getattr(old, name),
                                             [(real, ours, theirs)])
            assert torch.allclose(gram, (caught[0].T @ caught[0]).double(), rtol=1e-5, atol=1e-4)
            assert torch.allclose(cross, (caught[1].T @ caught[0]).double(), rtol=1e-5, atol=1e-4)
            assert getattr(layer, name).fake_quant is None is getattr(old, name).fake_quant


def test_a_weight_under_a_mask_is_no_output_to_keep():
    """Its latent value, whatever it is, was never part of a product."""
    gram, found = torch.eye(8, dtype=torch.float64), []
    for latent in (0.0, 100.0):
        torch.manual_seed(0)
        ours, old = network.Linear(8, 4), network.Linear(8, 4)
        with torch.no_grad():
            old.mask[:, 3] = False
            old.weight[:, 3] = latent
            calibrate.replace([(ours, old)], gram, gram, 0.5, prune.Pattern())
        found.append((ours.weight.detach(), ours.mask))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_all_zeros_at_once_start_nearer_than_by_magnitude(bare, world, tmp_path, capsys):
    """After two steps, with the share of zeros that was asked for in every layer, the pooler's too."""
    errors = {}
    for name, flags in (("reconstruction", ["--criterion", "reconstruction"]),
                        ("magnitude", ["--ramp-end", "0", "--update-end", "0"])):
        result = json.loads((upstream(bare, world, tmp_path / name, "--steps", "2", *flags)
                             / "metrics.json").read_text())
        errors[name] = sum(result["metrics"].values())
        assert all(zeros == 4 * int(0.8 * weights / 4) for weights, zeros in result["layers"].values())
    assert errors["reconstruction"] < 0.8 * errors["magnitude"], errors
    assert "all zeros at once, of 2," in capsys.readouterr().out


def test_the_zeros_of_reconstruction_stay_and_a_killed_run_goes_on(bare, world, tmp_path, monkeypatch):
    """To the same bits; and text is looked at once, in the first session."""
    whole = upstream(bare, world, tmp_path / "whole", "--steps", "6", "--criterion", "reconstruction")
    save_every(monkeypatch, 3)
    real, looked = train.run.save_checkpoint, []

    def stop(*arguments):
        real(*arguments)
        if arguments[4] == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.run, "save_checkpoint", stop)
    with pytest.raises(SystemExit):
        upstream(bare, world, tmp_path / "parts", "--steps", "6", "--criterion", "reconstruction")
    monkeypatch.setattr(train.run, "save_checkpoint", real)
    monkeypatch.setattr(train, "cut", lambda *_: looked.append(True))
    parts = upstream(bare, world, tmp_path / "parts", "--steps", "6", "--criterion", "reconstruction", "--resume")
    first, second = (read_safetensors(path / "model.safetensors")[0] for path in (whole, parts))
    assert not looked and all(torch.equal(first[name], second[name]) for name in first)


def test_reconstruction_with_the_papers_loss_and_where_it_cannot_be(chain, world, tmp_path, capsys):
    arguments = [*commands(world, chain)["prune"], "--init", str(chain / "pretrain"), "--teacher",
                 str(chain / "pretrain"), "--criterion", "reconstruction", "--out", str(tmp_path)]
    train.main(arguments)
    result = json.loads((tmp_path / "prune-1x4-0.85" / "metrics.json").read_text())
    assert result["sparsity"] == pytest.approx(0.85, abs=1e-3)
    assert "--stage prune" in fails(capsys, "--stage", "finetune", "--mask", "gradual", "--criterion", "reconstruction",
                                    "--task", "sst2", "--data", world, *SHORT, "--init", chain / "pretrain")


def test_distilling_beats_pruning_alone(bare, world, tmp_path):
    """The same zeros, with and without learning: what the loss is for."""
    losses = {}
    for rate in ("2e-3", "1e-12"):
        directory = upstream(bare, world, tmp_path / rate, "--steps", "60", "--lr", rate)
        losses[rate] = json.loads((directory / "metrics.json").read_text())["metrics"]["validation_hidden_loss"]
    assert losses["2e-3"] < 0.8 * losses["1e-12"]


def test_without_a_pooler(bare, world, tmp_path):
    shutil.copytree(bare, tmp_path / "mlm")
    tensors, _ = read_safetensors(bare / "model.safetensors")
    write_safetensors(tmp_path / "mlm" / "model.safetensors",
                      {name: tensor for name, tensor in tensors.items() if "pooler" not in name})
    directory = upstream(tmp_path / "mlm", world, tmp_path, "--steps", "4")
    assert json.loads((directory / "metrics.json").read_text())["metrics"].keys() == {"validation_hidden_loss"}
    train.main(["--stage", "finetune", "--init", str(directory), "--teacher", "none", "--data", str(world), "--task",
                "sst2", "--steps", "2", *SHORT, "--out", str(tmp_path)])       # the pooler starts fresh


def test_a_pooler_that_nothing_would_teach(bare, world, tmp_path, capsys):
    shutil.copytree(bare, tmp_path / "mlm")
    tensors, _ = read_safetensors(bare / "model.safetensors")
    write_safetensors(tmp_path / "mlm" / "model.safetensors",
                      {name: tensor for name, tensor in tensors.items() if "pooler" not in name})
    for stage in (["prune"], ["quantize", "--sparsity", "0"]):
        assert "has no pooler" in fails(capsys, "--stage", *stage, "--kd-target", "hidden", *SHORT, "--corpus",
                                        world / "corpus.txt", "--init", bare, "--teacher", tmp_path / "mlm", "--steps",
                                        "4", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_hidden_states_do_not_look_at_may_differ(bare, world, tmp_path):
    upstream(bare, world, tmp_path, "--steps", "2")
    upstream(bare, world, tmp_path, "--steps", "2", "--resume", "--temperature", "7", "--kd-weight", "0.1")


def test_where_hidden_states_cannot_be_distilled(bare, world, tmp_path, capsys):
    common = ["--kd-target", "hidden", *SHORT, "--corpus", world / "corpus.txt", "--init", bare, "--out", tmp_path,
              "--steps", "4"]
    assert "--stage prune" in fails(capsys, "--stage", "pretrain", *common)
    assert "--teacher none" in fails(capsys, "--stage", "prune", "--teacher", "none", *common)
    config = train.replace(model_directory.read_config(bare)[0], num_hidden_layers=2)
    model_directory.save(network.build(config, "encoder"), tmp_path / "smaller")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bare / name, tmp_path / "smaller")
    assert "3 layers" in fails(capsys, "--stage", "prune", "--teacher", tmp_path / "smaller", *common)


def test_the_whole_chain_needs_no_teacher_preparation(bare, world, tmp_path, capsys):
    train.main(["--stage", "all", "--kd-target", "hidden", *SHORT, "--corpus", str(world / "corpus.txt"), "--data",
                str(world), "--task", "sst2", "--init", str(bare), "--steps", "4", "--out", str(tmp_path)])
    assert not (tmp_path / "pretrain").exists() and "sst2" in (tmp_path / "table.txt").read_text()
    parents = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in (
        "prune-unstructured-0.85", "sst2/teacher", "sst2/sparse-unstructured-0.85", "sst2/int8-unstructured-0.85")}
    assert [run["parent"] for run in parents.values()] == [str(bare), str(bare), *(
        str(tmp_path / name) for name in ("prune-unstructured-0.85", "sst2/sparse-unstructured-0.85"))]


# ---------------------------------------------------------------- a vocabulary head on an encoder that has none

def test_a_fresh_vocabulary_head_knows_how_frequent_words_are(bare, world, tmp_path):
    model = model_directory.load(bare, "pretraining", fresh_head=True, say=lambda line: None)
    assert torch.equal(model.transform.weight, torch.eye(128))
    assert not model.transform.bias.any() and not model.bias.any()
    tokenizer = text.load_tokenizer(bare)
    data = text.PretrainingData(read_documents(world / "corpus.txt"), tokenizer, 48)
    start_vocabulary(model, data)
    counts = np.ones(len(model.bias))
    for shard in data.shards:
        np.add.at(counts, shard.tokens.astype(np.int64), 1)
    assert torch.allclose(model.bias.exp(), torch.from_numpy(counts / counts.sum()).float(), rtol=1e-4)
    before = model.bias.clone()
    start_vocabulary(model, data)                               # one that is there is left alone
    assert torch.equal(model.bias, before)


def test_a_fresh_head_starts_below_the_uniform_guess(bare, world, tmp_path):
    """As it was, the loss began above log V."""
    train.main(["--stage", "pretrain", *SHORT, "--corpus", str(world / "corpus.txt"), "--init", str(bare), "--steps",
                "1", "--lr", "1e-12", "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "pretrain" / "metrics.json").read_text())["metrics"]
    rows = model_directory.read_config(bare)[0].vocab_size
    assert metrics["validation_mlm_loss"] < math.log(rows) - 0.3


# ---------------------------------------------------------------- beside the logits of a task

@pytest.mark.parametrize("config", [BERT, DISTILBERT])
@pytest.mark.parametrize("kind", ["classification", "span"])
def test_hidden_states_beside_the_logits(kind, config):
    """By how much they change the loss, against the layers' own outputs; the rest of it stays as it was."""
    models, batch = [], make_batch(kind)
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(network.build(config, kind, 3).eval())
    student, teacher = models[0], network.freeze(models[1], torch.float32)
    count, expected, real = distill.denominators([batch]), 0.0, batch["attention_mask"].bool()
    found = {id(model): [] for model in models}
    hooks = [layer.register_forward_hook(lambda _, __, output, model=model: found[id(model)].append(output.double()))
             for model in models for layer in model.encoder.layers]
    without, parts = distill.loss(student, teacher, batch, count, kd_weight=0.8)
    [hook.remove() for hook in hooks]
    for one, other in zip(*found.values(), strict=True):
        expected += float(((one - other).square().sum(-1) / other.square().sum(-1))[real].mean().detach())
    total, with_hidden = distill.loss(student, teacher, batch, count, kd_weight=0.8, kd_hidden=2.5)
    assert with_hidden.pop("hidden") == pytest.approx(2.5 * expected, rel=1e-5)
    assert with_hidden == pytest.approx(parts, rel=1e-6)
    assert float(total.detach()) == pytest.approx(float(without.detach()) + 0.8 * 2.5 * expected, rel=1e-5)
    assert "hidden" not in distill.loss(student, None, batch, count, kd_hidden=2.5)[1]          # nobody to learn from
    (gradient,) = torch.autograd.grad(total - without, student.encoder.layers[0].query.weight)
    (other,) = torch.autograd.grad(2.0 * sum(
        (distill.relative_error(*pair) * real).sum() / count["tokens"] for pair in zip(
            student.encoder.states(*inputs_of(batch)), teacher.encoder.states(*inputs_of(batch)), strict=True)),
        student.encoder.layers[0].query.weight)
    assert torch.allclose(gradient, other, atol=1e-6)


def test_a_task_teacher_of_other_sizes_has_no_hidden_states_to_show(chain, world, tmp_path, capsys):
    config, tokenizer = network.PRESETS["tiny"], text.load_tokenizer(chain / "pretrain")
    small = replace(config, num_hidden_layers=2, vocab_size=text.vocabulary_rows(tokenizer))
    model_directory.save(network.build(small, "classification"), tmp_path / "two", ("0", "1"))
    text.save_tokenizer(tokenizer, tmp_path / "two")
    flags = ["--stage", "finetune", "--task", "sst2", "--data", str(world), "--init", str(chain / "prune-1x4-0.85"),
             "--teacher", str(tmp_path / "two"), "--out", str(tmp_path / "out"), "--steps", "2", *SHORT, "--max-len", "32"]
    assert "--kd-hidden 0.5 needs a teacher of the student's 3 layers" in fails(capsys, *flags, "--kd-hidden", "0.5")
    train.main(flags)                                                   # its logits are enough otherwise


# ---------------------------------------------------------------- the evidence

def test_the_evidence_for_minilm_in_a_small_form(bare, world, tmp_path, capsys):
    """Every way and pattern of one task, in a few steps each; a second call finds all of it done."""
    (tmp_path / "tasks").mkdir()
    shutil.copytree(world / "SST-2", tmp_path / "tasks" / "SST-2")
    lines = (world / "SST-2" / "train.tsv").read_text().splitlines()
    (tmp_path / "tasks/SST-2/train.tsv").write_text("\n".join([lines[0], *(lines[1:] * 3)]) + "\n")    # a batch of 128
    arguments = ["--init", str(bare), "--corpus", str(world / "corpus.txt"), "--data", str(tmp_path / "tasks"),
                 "--tasks", "sst2", "--patterns", "1x4", "--engines", "int8", "--steps", "2", "--threads", "1", "--out",
                 str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]
    measure_minilm.main(arguments)
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert {name.removeprefix("sst2 ") for name in runs} == {
        "paper teacher", "hidden 1x4", "paper 1x4", "dense", *(f"{way} 1x4 seed 0{end}" for way in (
            "hidden", "both", "paper", "gradual") for end in ("", " int8"))}
    for name, found in runs.items():
        assert found["settings"]["steps"] == 2 and found["tokens"] > 0 and "git_commit" in found
        assert ("int8" in found["engines"]) == name.endswith("int8")
    assert [runs[f"{way} 1x4"]["settings"].get("kd_target", "all") for way in ("hidden", "paper")] == ["hidden", "all"]
    capsys.readouterr()
    measure_minilm.main(arguments)
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == runs
    lines = measure_minilm.table(runs)
    assert "\n".join(lines) in capsys.readouterr().out and len(lines) == 2 + 9
    assert [runs[f"sst2 {way} 1x4 seed 0"]["settings"].get("kd_hidden") for way in ("hidden", "both")] == [None, 1.0]
    expected = 100 * runs["sst2 hidden 1x4 seed 0 int8"]["engines"]["int8"]["metrics"]["accuracy"]
    assert f"| 1x4 80 %, pruned once, by hidden states, INT8 | {expected:.1f} | {expected:.1f} |" in lines


def test_the_table_of_the_evidence():
    """Means over seeds and over tasks; no mean for a row without all tasks."""
    def run(value, engine=None):
        return {"metrics": {"accuracy": value}, "engines": {"native": {"metrics": {"accuracy": engine}}} if engine else {}}
    runs = {"sst2 dense": run(0.9), "qnli dense": run(0.7), "hidden 1x4": run(0.0),
            "sst2 hidden 1x4 seed 0": run(0.8), "sst2 hidden 1x4 seed 1": run(0.9), "qnli hidden 1x4 seed 0": run(0.6),
            "sst2 hidden 1x4 seed 0 int8": run(0.1, 0.85), "sst2 gradual unstructured seed 0": run(0.5)}
    assert measure_minilm.table(runs)[2:] == [
        "| dense | 90.0 | 70.0 | 80.0 |", "| 1x4 80 %, pruned once, by hidden states | 85.0 | 60.0 | 72.5 |",
        "| 1x4 80 %, pruned once, by hidden states, INT8 | 85.0 | | |",
        "| unstructured 85 %, pruned while fine-tuning | 50.0 | | |"]
