"""Model directories in HuggingFace's layout, against `transformers`; masks and ranges beside them; config.json."""
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from test_model import (CONFIGS, assert_same, error_of, every_published_class, make, make_batch, make_published,
                        our_outputs, their_outputs)

import quant
from formats import names
from formats.config import read_config
from formats.model_directory import load, save
from formats.safetensors import read_safetensors, write_safetensors
from model import NO_RANGE, PRESETS, linears
from quant import pack_bits, unpack_bits

# ---------------------------------------------------------------------------------------------------------------------
# Model directories, against `transformers`

@every_published_class
def test_transformers_opens_what_we_save(name, model_type, kind, tmp_path):
    model, batch = make(kind, model_type), make_batch()
    for _, linear in linears(model):
        linear.mask.copy_(torch.rand(linear.mask.shape, generator=torch.Generator().manual_seed(2)) > 0.4)
    save(model, tmp_path, compression={"pattern": "unstructured"})
    published, notes = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same(our_outputs(model, batch), their_outputs(published.eval(), batch))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [name] and written["compression"] == {"pattern": "unstructured"}
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(published.config)


@every_published_class
def test_we_open_what_transformers_saves(name, model_type, kind, tmp_path):
    published, batch, notes = make_published(name), make_batch(), []
    published.save_pretrained(tmp_path)
    model = load(tmp_path, kind, say=notes.append).eval()
    assert model.config == CONFIGS[model_type]
    assert_same(our_outputs(model, batch), their_outputs(published, batch))
    assert notes == [] and all(parameter.dtype == torch.float32 for parameter in model.parameters())


@every_published_class
def test_a_directory_of_ours_comes_back_bitwise(name, model_type, kind, tmp_path):
    model = make(kind, model_type)
    save(model, tmp_path, labels=["no", "perhaps", "yes"] if kind == "classification" else None)
    again = load(tmp_path, kind, say=pytest.fail)
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compression.safetensors", "config.json",
                                                                 "model.safetensors"]
    if kind == "classification":
        labels = transformers.AutoConfig.from_pretrained(tmp_path)
        assert labels.id2label == {0: "no", 1: "perhaps", 2: "yes"} and labels.label2id["yes"] == 2


def test_masked_language_model_directories_lack_pooler_and_sentence_head(tmp_path):
    published, batch, notes = make_published("BertForMaskedLM"), make_batch(), []
    published.save_pretrained(tmp_path)
    message = error_of(load, tmp_path, "pretraining")
    assert "bert.pooler.dense.weight" in message and "cls.seq_relationship.bias" in message
    model = load(tmp_path, "pretraining", fresh_head=True, say=notes.append).eval()
    assert len(notes) == 1 and "fresh" in notes[0] and "bert.pooler.dense.weight" in notes[0]
    assert_same(our_outputs(model, batch)[:1], their_outputs(published, batch))


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_bare_encoders(name, tmp_path):
    published, batch = make_published(name), make_batch()
    published.save_pretrained(tmp_path)
    names = read_safetensors(tmp_path / "model.safetensors")[0]
    assert not any(key.startswith(("bert.", "distilbert.")) for key in names)
    model = load(tmp_path, "classification", num_labels=5, fresh_head=True, say=lambda line: None).eval()
    assert model.classifier.out_features == 5
    hidden, real = model.encoder(**batch), batch["attention_mask"].bool()
    if name == "BertModel":
        expected = published(**batch)
        assert_same([model.encoder.pooled(hidden)], [expected.pooler_output])
    else:
        expected = published(batch["input_ids"], batch["attention_mask"])
    assert_same([hidden[real]], [expected.last_hidden_state[real]])
    assert "classifier" in error_of(load, tmp_path, "classification", num_labels=5)
    assert "fine-tuned" in error_of(load, tmp_path, "classification")


@pytest.mark.parametrize("decoder", ["alias", "copy", "missing"])
@pytest.mark.parametrize("name", ["BertForPreTraining", "DistilBertForMaskedLM"])
def test_old_pickles_and_the_tied_decoder(name, decoder, tmp_path):
    """pytorch_model.bin as published years ago: LayerNorm.gamma and .beta, a position_ids buffer, the tied decoder as
    an alias of the word embeddings, as a copy, or not at all."""
    published, batch, notes = make_published(name), make_batch(), []
    published.config.save_pretrained(tmp_path)
    old = {}
    for key, tensor in published.state_dict().items():
        if name.startswith("Bert"):
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[key] = tensor
    tied = [key for key in old if "decoder" in key or key == "vocab_projector.weight"]
    assert tied
    for key in tied:
        if decoder == "copy":
            old[key] = old[key].clone()
        elif decoder == "missing":
            del old[key]
    if name.startswith("Bert"):
        old["bert.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    model = load(tmp_path, "pretraining", say=notes.append).eval()
    assert_same(our_outputs(model, batch), their_outputs(published, batch))
    assert notes == []


def test_decoder_bias_under_its_other_name(tmp_path):
    save(make(), tmp_path)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert torch.equal(load(tmp_path, "pretraining").bias, make().bias)


@pytest.mark.parametrize("model_type, name", [("bert", "cls.predictions.decoder.weight"),
                                              ("distilbert", "vocab_projector.weight")])
def test_an_untied_decoder_is_refused(model_type, name, tmp_path):
    save(make("pretraining", model_type), tmp_path)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    tensors[name] = make("pretraining", model_type, seed=9).encoder.word.weight.detach()
    write_safetensors(tmp_path / "model.safetensors", tensors)
    message = error_of(load, tmp_path, "pretraining")
    assert name in message and "ties" in message


class Malicious:
    """Unpickled without care, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    save(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    trace = tmp_path / "executed"
    path = tmp_path / "pytorch_model.bin"
    for write in (lambda: path.write_bytes(pickle.dumps(Malicious(str(trace)), protocol=2)),
                  lambda: torch.save({"bert.pooler.dense.weight": Malicious(str(trace))}, path)):
        write()
        assert str(path) in error_of(load, tmp_path, "pretraining")
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()                                       # the pickle is what the test takes it for


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {3: torch.zeros(1)}, {"state_dict": {"a": torch.zeros(1)}}])
def test_pickles_that_hold_something_else(content, tmp_path):
    save(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in error_of(load, tmp_path, "pretraining")
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:50])
    assert "pytorch_model.bin" in error_of(load, tmp_path, "pretraining")
    (tmp_path / "pytorch_model.bin").unlink()
    assert "neither" in error_of(load, tmp_path, "pretraining")


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    save(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole, _ = read_safetensors(path)
    lost = "bert.encoder.layer.1.output.dense.weight"

    def changed(**changes):
        tensors = {**whole, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        write_safetensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
        return [error_of(load, tmp_path, "pretraining", fresh_head=fresh) for fresh in (False, True)]

    for message in changed(**{lost: None}):
        assert str(path) in message and lost in message and "lacks 1" in message
    for message in changed(bert__encoder__layer__2__output__dense__weight=torch.zeros(24, 40)):
        assert "bert.encoder.layer.2.output.dense.weight" in message and "no place" in message
    for message in changed(bert__encoder__layer__0__intermediate__dense__weight=torch.zeros(24, 40)):
        assert "bert.encoder.layer.0.intermediate.dense.weight" in message
        assert "[24, 40]" in message and "[40, 24]" in message
    write_safetensors(path, {name: tensor for name, tensor in whole.items() if "transform" not in name})
    assert "cls.predictions.transform.dense.weight" in error_of(load, tmp_path, "pretraining")


def test_another_tasks_head_starts_fresh_and_says_so(tmp_path):
    model, notes = make("classification", num_labels=2), []
    for _, linear in linears(model):
        linear.mask.copy_(torch.rand(linear.mask.shape, generator=torch.Generator().manual_seed(2)) > 0.4)
        linear.act_range.copy_(torch.tensor([-1.5, 2.5]))
    save(model, tmp_path)
    assert "classifier.weight" in error_of(load, tmp_path, "classification", num_labels=3)
    other = load(tmp_path, "classification", num_labels=3, fresh_head=True, say=notes.append)
    assert len(notes) == 1 and "fresh" in notes[0] and "classifier.weight" in notes[0]
    assert other.classifier.weight.shape == (3, 24)
    assert other.classifier.mask.all() and other.classifier.act_range.tolist() == list(NO_RANGE)
    assert torch.equal(other.encoder.pooler.mask, model.encoder.pooler.mask)
    same = load(tmp_path, "classification", num_labels=2, fresh_head=True, say=pytest.fail)
    assert torch.equal(same.classifier.mask, model.classifier.mask)
    assert load(tmp_path, "classification").classifier.out_features == 2
    notes.clear()
    span = load(tmp_path, "span", fresh_head=True, say=notes.append)
    assert torch.equal(span.encoder.word.weight, model.encoder.word.weight)
    assert "qa_outputs.weight" in notes[0] and "leaves out" in notes[1] and "bert.pooler.dense.weight" in notes[1]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and ranges on disk

@pytest.mark.parametrize("model_type", CONFIGS)
def test_masks_and_ranges_survive_and_zeros_are_burned_in(model_type, tmp_path):
    model = make("classification", model_type)
    generator = torch.Generator().manual_seed(2)
    for _, linear in linears(model):
        linear.mask.copy_(torch.rand(linear.mask.shape, generator=generator) > 0.7)
        linear.act_range.copy_(torch.randn(2, generator=generator).sort().values)
    kept = model.encoder.layers[0].query
    with torch.no_grad():
        kept.weight[kept.mask] = 0.0                          # zeros that no mask asks for
    latent = {name: linear.weight.detach().clone() for name, linear in linears(model)}
    quant.prepare(model, 8)
    save(model, tmp_path)
    again = load(tmp_path, "classification")
    for (name, before), (_, after) in zip(linears(model), linears(again)):
        assert torch.equal(before.mask, after.mask) and torch.equal(before.act_range, after.act_range), name
        assert torch.equal(before.weight, latent[name])         # saving leaves the model as it was
        assert not after.weight[~before.mask].any()
        assert torch.equal(after.weight[before.mask], latent[name][before.mask])
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, linear in linears(model):
        zeros = int((stored[names.published_name(model_type, name + ".weight")] == 0).sum())
        assert zeros >= int((~linear.mask).sum()) > 0


def test_compression_file_that_does_not_fit(tmp_path):
    model = make("classification")
    for _, linear in linears(model):
        linear.act_range.copy_(torch.tensor([-1.0, 2.0]))
    quant.prepare(model, 8)
    save(model, tmp_path)
    path = tmp_path / "compression.safetensors"
    whole, _ = read_safetensors(path)
    assert sum(name.endswith("act_range") for name in whole) == len(linears(model))
    for name in list(whole):
        write_safetensors(path, {key: tensor for key, tensor in whole.items() if key != name})
        if name.endswith("mask_bits"):
            assert name in error_of(load, tmp_path, "classification")
        else:
            load(tmp_path, "classification", say=pytest.fail)
            for wrong in ([2.0, 1.0], [0.0, float("nan")], [-1.0, float("inf")]):
                write_safetensors(path, {**whole, name: torch.tensor(wrong)})
                assert name in error_of(load, tmp_path, "classification")
        write_safetensors(path, {**whole, name: torch.cat([whole[name], whole[name]])})
        assert name.rpartition(".")[0] in error_of(load, tmp_path, "classification")
    write_safetensors(path, {name: tensor for name, tensor in whole.items() if "encoder.layer.1.output" not in name})
    assert "bert.encoder.layer.1.output.dense.mask_bits" in error_of(load, tmp_path, "classification")
    write_safetensors(path, {name: tensor for name, tensor in whole.items() if "encoder.layer." in name})
    load(tmp_path, "classification", say=pytest.fail)           # heads and pooler may be new
    path.unlink()
    assert all(linear.mask.all() for _, linear in linears(load(tmp_path, "classification")))
    path.write_bytes(b"nonsense")
    assert str(path) in error_of(load, tmp_path, "classification")


def test_pack_bits():
    generator = np.random.default_rng(0)
    for size in [0, *range(1, 40), 1000]:
        mask = torch.from_numpy(generator.random(size) > 0.5)
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
        assert torch.equal(unpack_bits(packed, mask.shape), mask)
    mask = torch.from_numpy(generator.random((7, 11)) > 0.5)
    assert torch.equal(unpack_bits(pack_bits(mask), (7, 11)), mask)


# ---------------------------------------------------------------------------------------------------------------------
# config.json

@pytest.mark.parametrize("changes, said", [
    ({"hidden_size": "24"}, "hidden_size"), ({"hidden_size": 24.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"), ({"hidden_size": [24]}, "hidden_size"),
    ({"hidden_size": -24}, "hidden_size"), ({"vocab_size": 10 ** 12}, "vocab_size"),
    ({"vocab_size": 0}, "vocab_size"), ({"num_hidden_layers": {}}, "num_hidden_layers"),
    ({"num_attention_heads": 5}, "multiple of 5"), ({"num_attention_heads": 0}, "multiple of 0"),
    ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob"), ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
    ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
    ({"model_type": "gpt2"}, "gpt2"), ({"model_type": None, "architectures": ["GPT2Model"]}, "bert, distilbert"),
    ({"model_type": ["bert"]}, "model_type"),
    ({"hidden_act": "relu"}, "relu"), ({"hidden_act": ["gelu"]}, "gelu"), ({"hidden_act": None}, "None"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
])
def test_config_that_this_network_cannot_be(changes, said, tmp_path):
    save(make(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = error_of(load, tmp_path, "pretraining")
    assert str(path) in message and said in message


@pytest.mark.parametrize("name, value", [("intermediate_size", 2 ** 31), ("num_hidden_layers", 2 ** 31),
                                         ("vocab_size", 2 ** 31), ("max_position_embeddings", 2 ** 31)])
def test_config_that_claims_more_than_the_file_holds(name, value, tmp_path):
    """It is refused at once: no memory or time is spent on what cannot be there."""
    save(make(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert "do not belong together" in error_of(load, tmp_path, "pretraining")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"bert"', b"\xff\xfe{}", b'{"model_type": "\xe9"}',
                                     b"[" * 100_000, b"\xef\xbb\xbf{}"])
def test_config_that_is_not_json(content, tmp_path):
    save(make(), tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path / "config.json") in error_of(load, tmp_path, "pretraining")


def test_config_missing(tmp_path):
    assert "config.json is missing" in error_of(read_config, tmp_path)
    assert "is not a folder" in error_of(load, tmp_path / "nowhere", "pretraining")


def test_config_defaults(tmp_path):
    """What old files leave out, or write as null, is what BERT-Base has."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert", "classifier_dropout": null, "hidden_dropout_prob": 0.3}')
    assert read_config(tmp_path)[0] == replace(PRESETS["bert-base"], hidden_dropout_prob=0.3, classifier_dropout=0.3)
    path.write_text('{"model_type": "distilbert", "tie_weights_": true}')
    assert read_config(tmp_path)[0] == PRESETS["distilbert-base"]
