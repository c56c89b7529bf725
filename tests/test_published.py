"""The published models: files of their size and with their oddities, found zeros, the hub, and the recipes."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from test_model import (assert_same, error_of, every_published_class, make, make_batch, make_published, our_outputs,
                        their_outputs)

import prune
import train
from formats import report, safetensors, sentence
from formats.hub import fetch, locate
from formats.model_directory import load, save
from formats.names import published_name
from formats.patterns import find_pattern, pattern_of
from model import PRESETS, build
from prune import Pattern, lock, magnitude_mask, prunable

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# ---------------------------------------------------------------------------------------------------------------------
# Full size

@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied at once: pytest would keep gigabytes of it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def full_size(name, monkeypatch):
    """A `transformers` model of the published size, quickly: in every parameter pieces of one random row."""
    for init in ("kaiming_uniform_", "uniform_", "normal_"):         # seconds, for numbers that are overwritten
        monkeypatch.setattr(torch.nn.init, init, lambda tensor, *_, **__: tensor)
    config = transformers.DistilBertConfig() if name.startswith("Distil") else transformers.BertConfig()
    published = getattr(transformers, name)(config)
    noise = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for i, (parameter_name, parameter) in enumerate(published.named_parameters()):
            for piece in parameter.view(-1).split(3_000_000):
                piece.copy_(noise[4999 * i:][:len(piece)])
            if "norm" in parameter_name.lower() and parameter_name.endswith("weight"):
                parameter += 1
    return published.eval()


FULL_BATCH = {"input_ids": torch.randint(30522, (2, 14), generator=torch.Generator().manual_seed(1)),
              "attention_mask": (torch.arange(14) < torch.tensor([[14], [9]])).long(),
              "token_type_ids": (torch.arange(14) > torch.tensor([[6], [3]])).long()}


@torch.no_grad()
@pytest.mark.parametrize("name, preset, kind", [
    ("BertForPreTraining", "bert-base", "pretraining"), ("BertForMaskedLM", "bert-base", "pretraining"),
    ("BertForSequenceClassification", "bert-base", "classification"), ("BertForQuestionAnswering", "bert-base", "span"),
    ("DistilBertForMaskedLM", "distilbert-base", "pretraining"),
    ("DistilBertForSequenceClassification", "distilbert-base", "classification"),
    ("DistilBertForQuestionAnswering", "distilbert-base", "span")])
def test_full_size(name, preset, kind, folder, monkeypatch):
    """What `transformers` saves at the published size we compute with, to 1e-5; and once a size the other way round."""
    published, notes = full_size(name, monkeypatch), []
    expected = their_outputs(published, FULL_BATCH)
    assert float(expected[0].std()) > 0.01                                # logits of a live network, not of zeros
    published.save_pretrained(folder)
    del published
    model = load(folder, kind, fresh_head=name == "BertForMaskedLM", say=notes.append).eval()
    assert model.config == PRESETS[preset] and len(notes) == (name == "BertForMaskedLM")
    assert_same(our_outputs(model, FULL_BATCH)[:len(expected)], expected)
    if name in ("BertForMaskedLM", "DistilBertForMaskedLM"):
        save(model, folder)
        del model
        again = getattr(transformers, name).from_pretrained(folder).eval()
        assert_same(their_outputs(again, FULL_BATCH), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Oddities of the files

def shard(tensors, folder, ending, parts=3):
    """Write tensors as `transformers` does when they are too many for one file: numbered files and an index."""
    stem, files = {"safetensors": "model", "bin": "pytorch_model"}[ending], {}
    for i in range(parts):
        file = f"{stem}-{i + 1:05}-of-{parts:05}.{ending}"
        piece = {name: tensors[name].clone() for name in list(tensors)[i::parts]}
        if ending == "bin":
            torch.save(piece, folder / file)
        else:
            safetensors.write_safetensors(folder / file, piece)
        files.update(dict.fromkeys(piece, file))
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@every_published_class
def test_shards_of_transformers(name, model_type, kind, tmp_path):
    published, batch = make_published(name), make_batch()
    published.save_pretrained(tmp_path, max_shard_size="12KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()
    assert_same(our_outputs(load(tmp_path, kind, say=pytest.fail).eval(), batch), their_outputs(published, batch))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_and_what_can_be_wrong_with_them(ending, tmp_path):
    published, batch = make_published("BertForPreTraining"), make_batch()
    published.config.save_pretrained(tmp_path)
    index = shard(published.state_dict(), tmp_path, ending)
    assert_same(our_outputs(load(tmp_path, "pretraining", say=pytest.fail).eval(), batch),
                their_outputs(published, batch))
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    whole["weight_map"]["bert.pooler.dense.more"] = files[0]
    index.write_text(json.dumps(whole))
    assert "bert.pooler.dense.more" in error_of(load, tmp_path, "pretraining")
    for other in ("../" + files[0], 3, None):
        index.write_text(json.dumps({"weight_map": {"bert.pooler.dense.bias": other}}))
        assert "weight_map" in error_of(load, tmp_path, "pretraining")
    index.write_text("{}")
    assert "weight_map" in error_of(load, tmp_path, "pretraining")
    del whole["weight_map"]["bert.pooler.dense.more"]
    index.write_text(json.dumps(whole))
    (tmp_path / files[1]).unlink()
    assert f"{files[1]} is missing" in error_of(load, tmp_path, "pretraining")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_published_class
def test_half_precision_files(name, model_type, kind, dtype, tmp_path):
    published, batch, notes = make_published(name).to(dtype), make_batch(), []
    published.save_pretrained(tmp_path)
    model = load(tmp_path, kind, say=notes.append).eval()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_same(our_outputs(model, batch), their_outputs(published.float(), batch))
    assert len(notes) == 1 and str(dtype).removeprefix("torch.") in notes[0] and "float32" in notes[0]


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    save(make(), tmp_path)
    tensors, _ = safetensors.read_safetensors(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    safetensors.write_safetensors(tmp_path / "model.safetensors", {**tensors, name: tensors[name].to(torch.int8)})
    message = error_of(load, tmp_path, "pretraining")
    assert name in message and "int8" in message


def reference_state(published, sparsity=0.7):
    """(state as the paper's reference code saves it while it prunes, state with the zeros burned in)."""
    state, burned = {}, dict(published.state_dict())
    generator = torch.Generator().manual_seed(3)
    for name, tensor in published.state_dict().items():
        state["_teacher.teacher." + name] = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2 and name.startswith(("bert.encoder", "bert.pooler", "distilbert.transformer")):
            mask = (torch.rand(tensor.shape, generator=generator) > sparsity).float()
            state[name + "_original"], state[name + "_mask"] = tensor, mask
            burned[name] = tensor * mask
        else:
            state[name] = tensor
    return state, burned


@pytest.mark.parametrize("name", ["BertForPreTraining", "DistilBertForMaskedLM"])
def test_a_model_in_the_middle_of_pruning(name, tmp_path):
    published, batch, notes = make_published(name), make_batch(), []
    published.config.save_pretrained(tmp_path)
    state, burned = reference_state(published)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load(tmp_path, "pretraining", say=notes.append).eval()
    published.load_state_dict(burned)
    assert_same(our_outputs(model, batch), their_outputs(published, batch))
    assert len(notes) == 2 and "_teacher.teacher." in notes[0] and "while it was being pruned" in notes[1]
    count = len([key for key in state if key.endswith("_mask")])
    assert f"{count} weights" in notes[1] and f"{len(burned)} tensors" in notes[0]
    lock(model)
    for name, layer in prunable(model):
        assert torch.equal(layer.mask, burned[published_name(model.config.model_type, name + ".weight")] != 0), name
    stem = next(key for key in state if key.endswith("_mask")).removesuffix("_mask")
    for change in ({stem + "_mask": state[stem + "_mask"] * 2}, {stem + "_mask": state[stem + "_mask"][:3]}):
        torch.save({**state, **change}, tmp_path / "pytorch_model.bin")
        assert stem + "_mask" in error_of(load, tmp_path, "pretraining", say=notes.append)
    torch.save({key: tensor for key, tensor in state.items() if key != stem + "_original"},
               tmp_path / "pytorch_model.bin")
    assert stem + "_mask" in error_of(load, tmp_path, "pretraining", say=notes.append)
    torch.save({key: tensor for key, tensor in state.items() if key != stem + "_mask"}, tmp_path / "pytorch_model.bin")
    assert stem in error_of(load, tmp_path, "pretraining", say=notes.append)


def test_known_leftovers_are_reported_and_unknown_tensors_are_fatal(tmp_path):
    published, batch = make_published("BertForSequenceClassification"), make_batch()
    published.config.save_pretrained(tmp_path)
    layer = "bert.encoder.layer.1.output.dense."
    known = {layer + "weight_fake_quant.scale": torch.ones(1), layer + "input_fake_quant.zero_point": torch.zeros(1),
             layer + "output_fake_quant.activation_post_process.min_val": torch.zeros(()),
             layer + "fake_quant_enabled": torch.ones(1, dtype=torch.uint8), layer + "_step": torch.zeros(1)}
    notes = []
    torch.save({**published.state_dict(), **known}, tmp_path / "pytorch_model.bin")
    model = load(tmp_path, "classification", say=notes.append).eval()
    assert_same(our_outputs(model, batch), their_outputs(published, batch))
    assert len(notes) == 1 and "5 tensors" in notes[0] and layer + "weight_fake_quant.scale" in notes[0]
    notes.clear()
    torch.save({**published.state_dict(), layer + "weight_mask": torch.ones(24, 40)}, tmp_path / "pytorch_model.bin")
    load(tmp_path, "classification", say=notes.append)              # a mask beside a weight that is burned in already
    assert len(notes) == 1 and "1 weights" in notes[0]
    for unknown in (layer + "adapter.weight", "classifier2.weight", "bert.pooler.dense2.weight", "student.weight",
                    "bert.encoder.layer.2.output.dense.weight"):
        torch.save({**published.state_dict(), unknown: torch.zeros(24, 40)}, tmp_path / "pytorch_model.bin")
        message = error_of(load, tmp_path, "classification", fresh_head=True)
        assert unknown in message and "no place" in message


@pytest.mark.parametrize("name, decoder", [("BertForPreTraining", "cls.predictions.decoder.weight"),
                                           ("DistilBertForMaskedLM", "vocab_projector.weight")])
def test_a_decoder_of_its_own_is_no_hindrance_to_a_task(name, decoder, tmp_path):
    """A reference run that pruned the decoder too has parted it from the word embeddings."""
    published, notes = make_published(name), []
    published.config.save_pretrained(tmp_path)
    state = {**published.state_dict(), decoder: torch.zeros(67, 24)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert decoder in error_of(load, tmp_path, "pretraining")
    model = load(tmp_path, "span", fresh_head=True, say=notes.append)
    assert torch.equal(model.encoder.word.weight, state[published_name(model.config.model_type, "encoder.word.weight")])
    assert "leaves out" in notes[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The zeros that a model comes with

PATTERNS = [Pattern(), Pattern(1, 4), Pattern(4, 1), Pattern(2, 4), Pattern(1, 8), Pattern(keep=2, group=4)]


def make_sparse(pattern, kind="pretraining", model_type="bert", sparsity=0.75):
    """A small model pruned in the pattern, its zeros burned in and its masks forgotten: a model from elsewhere."""
    model = make(kind, model_type)
    for _, layer in prunable(model):
        layer.mask.copy_(magnitude_mask(layer.weight, 0.5 if pattern.group else sparsity, pattern))
    prune.burn_in(model)
    for _, layer in prunable(model):
        layer.mask.fill_(True)
    return model


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_pattern_is_found_and_exactly_the_zeros_are_locked(pattern):
    model = make_sparse(pattern)
    zeros = {name: layer.weight == 0 for name, layer in prunable(model)}
    masks = [~zero for zero in zeros.values()]
    assert find_pattern(masks, [pattern]) == pattern
    found = find_pattern(masks)                                       # without a hint: 1x4, 4x1 or unstructured
    assert found == {Pattern(2, 4): Pattern(1, 4), Pattern(1, 8): Pattern(1, 4)}.get(
        pattern, Pattern() if pattern.group else pattern)
    assert find_pattern(masks, [Pattern(), Pattern(8, 8), Pattern(1, 5)]) == found        # hints that do not fit
    lock(model, pattern)
    for name, layer in prunable(model):
        assert torch.equal(layer.mask, ~zeros[name]), name
    sum((logits ** 2).sum() for logits in our_outputs(model, make_batch())).backward()
    for name, layer in prunable(model):
        assert layer.weight.grad.any() and not layer.weight.grad[zeros[name]].any()


def test_dense_layers_say_nothing_and_mixed_ones_are_unstructured():
    across, along = (magnitude_mask(torch.randn(16, 16), 0.75, pattern) for pattern in (Pattern(1, 4), Pattern(4, 1)))
    full = torch.ones(16, 16, dtype=torch.bool)
    assert find_pattern([full, full]) is None and find_pattern([]) is None
    assert find_pattern([full, across]) == Pattern(1, 4) and find_pattern([across, along]) == Pattern()
    odd = torch.rand(6, 6) > 0.5
    assert find_pattern([odd, across]) == Pattern()                   # 4 does not divide it
    assert find_pattern([magnitude_mask(torch.randn(8, 8), 0.25, Pattern(keep=3, group=4))],
                        [Pattern(keep=2, group=4)]) == Pattern()
    rounded = magnitude_mask(torch.randn(64, 64), 0.5, Pattern(keep=2, group=4))        # a weight became 0 in 16 bits
    rounded[rounded.nonzero()[0].unbind()] = False
    assert find_pattern([rounded], [Pattern(keep=2, group=4)]) == Pattern(keep=2, group=4)
    rounded[0, :4] = True                                             # and none may have too many
    assert find_pattern([rounded], [Pattern(keep=2, group=4)]) == Pattern()
    for sparsity in (0.0002, 0.002, 0.99, 0.9998):                    # nearly all blocks are whole, by chance
        assert find_pattern([magnitude_mask(torch.randn(400, 400), sparsity)]) == Pattern()


def test_a_weight_rounded_to_zero_does_not_hide_the_blocks():
    torch.manual_seed(0)
    layer = build(PRESETS["tiny"], "span").encoder.layers[0]
    for linear in (layer.query, layer.key, layer.value, layer.attention_output, layer.intermediate, layer.output):
        linear.mask.copy_(magnitude_mask(linear.weight, 0.8, Pattern(1, 4)))
        linear.weight.data *= linear.mask
    blocks = layer.output.mask.clone()
    row, column = (int(index) for index in blocks.nonzero()[100])
    layer.output.weight.data[row, column] = 0.0
    layer.output.mask.fill_(True)
    lock(layer, pattern_of(layer))
    assert torch.equal(layer.output.mask, blocks)
    layer.output.weight.data[blocks.nonzero()[:3000:70].unbind(1)] = 0.0      # too many to be an accident
    layer.output.mask.fill_(True)
    lock(layer, pattern_of(layer))
    assert torch.equal(layer.output.mask, layer.output.weight != 0)


@pytest.mark.parametrize("pattern, whole", [(Pattern(1, 4), "100.00%"), (Pattern(4, 1), "100.00%"), (Pattern(), "")],
                         ids=str)
def test_zeros_are_counted_per_kind_of_layer(pattern, whole):
    model = make_sparse(pattern)
    head, *lines = report.format_kinds(model)
    assert [line.split()[0] for line in lines] == list(prune.KINDS)
    for line in lines:
        kind, weights, zeros, sparsity, across, along = line.split()
        layers = [layer for name, layer in prunable(model) if name.endswith("." + kind)]
        assert int(weights.replace(",", "")) == sum(layer.weight.numel() for layer in layers)
        assert int(zeros.replace(",", "")) == sum(int((layer.weight == 0).sum()) for layer in layers)
        assert float(sparsity.rstrip("%")) == pytest.approx(75, abs=0.5)
        masks = [layer.weight.detach() != 0 for layer in layers]
        for column, shown in (((0, 1), across), ((1, 0), along)):     # by hand: the sum over four neighbours is 0 or 4
            tiles = torch.cat([torch.stack([mask if column == (0, 1) else mask.T]).reshape(-1, 4) for mask in masks])
            share = float(((tiles.sum(1) == 0) | (tiles.sum(1) == 4)).float().mean())
            assert float(shown.rstrip("%")) == pytest.approx(100 * share, abs=0.006)
        if whole:
            assert (across, along)[pattern.rows == 4] == whole != (across, along)[pattern.rows != 4]


@pytest.fixture
def sparse_folder(tmp_path):
    """A function: pattern -> folder of a small sparse model as `transformers` leaves it, with a vocabulary."""
    def make_folder(pattern, model_type="bert", **options):
        folder = tmp_path / f"published-{str(pattern).replace(':', 'of')}"
        save(make_sparse(pattern, model_type=model_type, **options), folder)
        (folder / "compression.safetensors").unlink()
        words = [f"word{i}" for i in range(67 - len(SPECIAL_TOKENS))]
        (folder / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS + words) + "\n")
        return folder
    return make_folder


def finetune(folder, **typed):
    return train.resolve({"stage": "finetune", "task": "sst2", "preset": "tiny", "init": str(folder), **typed})


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(1, 4), Pattern(4, 1)], ids=str)
def test_a_locked_stage_takes_what_is_there(pattern, sparse_folder):
    folder = sparse_folder(pattern)
    for stage in ("finetune", "quantize"):
        settings = finetune(folder, stage=stage)
        assert (settings.pattern, settings.sparsity) == (str(pattern), 0.75)
    assert finetune(folder, pattern=str(pattern), sparsity=0.745).sparsity == 0.745
    other = "1x4" if pattern != Pattern(1, 4) else "unstructured"
    for typed in ({"pattern": other}, {"sparsity": 0.9}, {"recipe": "bert-base-90-unstructured", "data": "-"}):
        message = error_of(finetune, folder, **typed)
        assert str(folder) in message and str(pattern) in message and "75.0%" in message
        assert str(typed.get("pattern", typed.get("sparsity", "--recipe"))) in message
    assert finetune(folder, sparsity=0.0).mask == "dense"             # who asks for a dense model gets one


def test_a_recorded_pattern_is_believed_only_if_it_fits(sparse_folder):
    folder = sparse_folder(Pattern(keep=2, group=4))
    assert finetune(folder).pattern == "unstructured"
    config = json.loads((folder / "config.json").read_text())
    for recorded, expected in (({"pattern": "2:4"}, "2:4"), ({"pattern": "1x4"}, "unstructured"),
                               ({"pattern": ["2:4"]}, "unstructured"), ("2:4", "unstructured"),
                               ({"pattern": "dense"}, "unstructured")):
        (folder / "config.json").write_text(json.dumps({**config, "compression": recorded}))
        settings = finetune(folder)
        assert (settings.pattern, settings.sparsity) == (expected, 0.5)


def test_finetune_locks_and_records_what_it_found(sparse_folder, tmp_path, capsys):
    """The command a person types for a published model, on a small one: nothing of its pattern is said."""
    folder, out = sparse_folder(Pattern(4, 1)), tmp_path / "out"
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "dev"):
        rows = "".join(f"word{i} word{i + 1}\t{i % 2}\n" for i in range(12))
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    train.main(["--stage", "finetune", "--task", "sst2", "--data", str(tmp_path), "--init", str(folder), "--preset",
                "tiny", "--teacher", "none", "--steps", "2", "--max-len", "12", "--threads", "1", "--out", str(out),
                "--batch-size", "4"])
    printed = capsys.readouterr().out
    assert "whole 4x1" in printed and "attention_output" in printed
    directory = out / "sst2" / "sparse-4x1-0.75"
    compression = json.loads((directory / "config.json").read_text())["compression"]
    assert compression["pattern"] == "4x1" and compression["sparsity"] == pytest.approx(0.75, abs=0.005)
    before, _ = safetensors.read_safetensors(folder / "model.safetensors")
    after, _ = safetensors.read_safetensors(directory / "model.safetensors")
    pruned = [name for name in before if ".layer." in name and before[name].ndim == 2]
    for name in pruned:
        assert torch.equal(before[name] == 0, after[name] == 0)
    assert any(not torch.equal(before[name], after[name]) for name in pruned)
    train.main(["--stage", "evaluate", "--task", "sst2", "--data", str(tmp_path), "--init", str(directory), "--preset",
                "tiny"])
    assert "whole 4x1" in capsys.readouterr().out


def test_a_dense_model_is_not_locked_for_its_few_zeros(sparse_folder):
    folder = sparse_folder(Pattern(), sparsity=0.005)
    settings = finetune(folder)
    assert settings.sparsity == 0.85                                  # as if nothing had been found
    model = load(folder, "classification", num_labels=2, fresh_head=True, say=lambda line: None)
    assert "next to none" in error_of(train.prepare_layers, settings, model)


# ---------------------------------------------------------------------------------------------------------------------
# The hub

NAME = "Intel/bert-base-uncased-sparse-90-unstructured-pruneofa"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for huggingface_hub: one model, whose files it 'downloads' when asked for."""

    def __init__(self, source, cache):
        self.source, self.snapshot, self.asked = source, cache / "snapshots" / COMMIT, []

    def download(self, name, file, revision=None):
        assert name == NAME and revision == (None if file == "config.json" else COMMIT)     # all of one commit
        self.asked.append(file)
        if not (self.source / file).is_file():
            raise EntryNotFoundError(f"404: {file}")
        (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.source / file, self.snapshot / file)
        return str(self.snapshot / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an empty model; its files are what a test writes into hub.source."""
    (tmp_path / "source").mkdir()
    hub = Hub(tmp_path / "source", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.chdir(tmp_path)
    fetch.cache_clear()
    yield hub
    fetch.cache_clear()


def publish(model, hub, how):
    """Fill the hub's model: weights as `how` says, a vocabulary, and files that nobody needs."""
    save(model, hub.source)
    tensors, _ = safetensors.read_safetensors(hub.source / "model.safetensors")
    (hub.source / "compression.safetensors").unlink()
    if how != "safetensors":
        (hub.source / "model.safetensors").unlink()
    if how == "pickle":
        torch.save(tensors, hub.source / "pytorch_model.bin")
    elif how.startswith("shards"):
        shard(tensors, hub.source, how.split()[1])
    for name in ("README.md", "flax_model.msgpack", "tf_model.h5", "raw_pytorch_model.bin"):
        (hub.source / name).write_text("not needed")
    if how == "safetensors":
        (hub.source / "pytorch_model.bin").write_text("not needed")
    (hub.source / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS) + "\n")


@pytest.mark.parametrize("how", ["safetensors", "pickle", "shards safetensors", "shards bin"])
def test_a_model_is_fetched_by_name_and_only_what_is_needed(how, hub):
    model = make()
    publish(model, hub, how)
    folder = locate(NAME)
    assert torch.equal(load(folder, "pretraining", say=pytest.fail).bias, model.bias)
    here = {path.name for path in hub.snapshot.iterdir()}
    weights = {path.name for path in hub.source.glob("*model*") if path.read_bytes() != b"not needed"}
    assert folder == hub.snapshot and here == {"config.json", "vocab.txt"} | weights
    asked = len(hub.asked)
    assert locate(NAME) == folder and len(hub.asked) == asked          # one conversation a run
    (hub.source.parent / NAME).mkdir(parents=True)
    assert locate(NAME) == Path(NAME)                                  # a folder of that name comes first
    for name in ("out", "/no/such/model", "./here", "../there", "a/b/c", "a b/c"):
        assert locate(name) == Path(name)


def test_what_sentence_transformers_wrote_is_fetched_too(hub):
    publish(make(), hub, "safetensors")
    wanted = sentence.Sentence("cls", True, 77, "dot")
    sentence.write_sentence(wanted, 16, hub.source)
    assert sentence.read_sentence(locate(NAME)) == wanted
    assert "2_Normalize/config.json" in hub.asked and not (hub.snapshot / "README.md").exists()


@pytest.mark.parametrize("lost", ["modules.json", "tokenizer_config.json"])
def test_a_hub_that_stops_answering_is_no_hub_without_a_file(lost, hub, monkeypatch, capsys):
    """Else an encoder would be pooled in another way, or a text cut in another, without a word."""
    def download(name, file, revision=None):
        if file == lost:
            raise LocalEntryNotFoundError("the connection broke")
        return hub.download(name, file, revision)
    publish(make(), hub, "safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = one_sentence(capsys, "--stage", "finetune", "--task", "sst2", "--init", NAME)
    assert lost in message and "cannot be reached" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)      # who says so is told what is not looked for
    assert locate(NAME) == hub.snapshot and f"offline, taken as not in {NAME}: {lost}\n" in capsys.readouterr().out


def test_every_stage_takes_a_name_for_init_and_teacher(hub, monkeypatch):
    publish(make_sparse(Pattern(1, 4)), hub, "pickle")
    settings = finetune(NAME)
    assert (settings.pattern, settings.sparsity, settings.init) == ("1x4", 0.75, NAME)
    settings = finetune(NAME, teacher=NAME)
    assert train.parents_of(settings) == (hub.snapshot, hub.snapshot)
    unknown = {"stage": "finetune", "task": "sst2", "init": NAME}
    assert "no preset" in error_of(train.resolve, unknown)                                 # its size was looked up
    assert train.resolve({"stage": "evaluate", "init": NAME}).preset == "tiny"             # has no recipe, needs no size


def one_sentence(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        train.main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


def test_offline_and_unknown_models_end_in_one_sentence(hub, capsys, monkeypatch, tmp_path):
    command = ["--stage", "finetune", "--task", "sst2", "--init", NAME]
    for error, words in ((LocalEntryNotFoundError("no connection\nat all"), "cannot be reached"),
                         (type("RepositoryNotFoundError", (Exception,), {})("404\nlong"), "no public model"),
                         (OSError("disk full.\nreally"), "(disk full)"), (ValueError(), "(ValueError)")):
        def refuse(*_, **__):
            raise error
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        message = one_sentence(capsys, *command)
        assert words in message and str(tmp_path / NAME) in message and "config.json" in message
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    publish(make(), hub, "shards bin")
    next(hub.source.glob("*00002*")).unlink()
    assert "00002" in one_sentence(capsys, *command)
    publish(make(), hub, "safetensors")
    (hub.source / "vocab.txt").unlink()
    (hub.snapshot / "vocab.txt").unlink()
    assert "vocabulary" in one_sentence(capsys, *command)


def test_the_hubs_own_cache_serves_offline(tmp_path, monkeypatch, capsys):
    """The real library, offline as conftest.py makes it: what lies in its cache is found, what does not is named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    fetch.cache_clear()
    assert str(Path(NAME).absolute()) in one_sentence(capsys, "--stage", "prune", "--init", NAME)
    cache = tmp_path / ("models--" + NAME.replace("/", "--"))
    save(make(), cache / "snapshots" / COMMIT)
    (cache / "snapshots" / COMMIT / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS) + "\n")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    assert locate(NAME) == cache / "snapshots" / COMMIT
    fetch.cache_clear()
