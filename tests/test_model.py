"""model.py: the network against PyTorch's layer and `transformers`, and its files against `safetensors` and damage."""
import json
import os
import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from formats import names
from formats.config import read_config
from formats.files import write_file
from formats.model_directory import load, save
from formats.safetensors import DTYPES, read_safetensors, write_safetensors
from model import (
    PRESETS,
    Encoder,
    InputError,
    Layer,
    Linear,
    ModelConfig,
    build,
    count_parameters,
    linears,
    set_dropout,
)
from quant import pack_bits, unpack_bits

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CONFIGS = {
    "bert": ModelConfig(vocab_size=67, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                        max_position_embeddings=20, hidden_dropout_prob=0.15, attention_dropout_prob=0.25,
                        classifier_dropout=0.3),
    "distilbert": ModelConfig(model_type="distilbert", vocab_size=67, hidden_size=24, num_hidden_layers=2,
                              num_attention_heads=3, intermediate_size=40, max_position_embeddings=20,
                              type_vocab_size=0, hidden_dropout_prob=0.15, attention_dropout_prob=0.25,
                              classifier_dropout=0.3),
}
PUBLISHED = [("BertForPreTraining", "bert", "pretraining"),
             ("BertForSequenceClassification", "bert", "classification"),
             ("BertForQuestionAnswering", "bert", "span"),
             ("DistilBertForMaskedLM", "distilbert", "pretraining"),
             ("DistilBertForSequenceClassification", "distilbert", "classification"),
             ("DistilBertForQuestionAnswering", "distilbert", "span")]
every_published_class = pytest.mark.parametrize("name, model_type, kind", PUBLISHED)


def randomize(model, seed):
    """Every parameter at random, norms and biases too, so that no two tensors can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def make(kind="pretraining", model_type="bert", seed=0, num_labels=3):
    return randomize(build(CONFIGS[model_type], kind, num_labels), seed)


def make_published(name, seed=1):
    """A `transformers` model of the same small size."""
    if name.startswith("Distil"):
        config = transformers.DistilBertConfig(
            vocab_size=67, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=20, dropout=0.15,
            attention_dropout=0.25, seq_classif_dropout=0.3, num_labels=2 if "Question" in name else 3)
    else:
        config = transformers.BertConfig(
            vocab_size=67, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=20, hidden_dropout_prob=0.15, attention_probs_dropout_prob=0.25,
            classifier_dropout=0.3, num_labels=2 if "Question" in name else 3)
    return randomize(getattr(transformers, name)(config), seed)


def make_batch(seed=0, length=11):
    """Rows of all lengths from one token to full, ids and token types at random."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, 6, 1])
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.randint(67, (3, length), generator=generator), "attention_mask": attention_mask,
            "token_type_ids": torch.randint(2, (3, length), generator=generator)}


def our_outputs(model, batch):
    """The logits of a model of ours, in a fixed order; per-token logits only where there is no padding."""
    real = batch["attention_mask"].bool()
    if model.kind == "classification":
        return [model(**batch)]
    if model.kind == "span":
        return [logits[real] for logits in model(**batch)]
    features, next_sentence = model(**batch, positions=real)
    return [F.linear(features, *model.vocabulary())] + ([] if next_sentence is None else [next_sentence])


def their_outputs(published, batch):
    """The same from a `transformers` model."""
    if "Distil" in type(published).__name__:
        batch = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    output, real = published(**batch), batch["attention_mask"].bool()
    if "start_logits" in output:
        return [output.start_logits[real], output.end_logits[real]]
    if "prediction_logits" in output:
        return [output.prediction_logits[real], output.seq_relationship_logits]
    return [output.logits[real] if output.logits.dim() == 3 else output.logits]


def assert_same(left, right, tolerance=1e-5):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def error_of(call, *arguments, **options):
    """The message of the InputError that the call must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The network

def test_linear_masks_then_rounds_then_multiplies():
    torch.manual_seed(0)
    layer, x = Linear(6, 4), torch.randn(5, 6)
    layer.mask.copy_(torch.rand(4, 6) > 0.5)
    latent = layer.weight.detach().clone()
    seen = []

    def fake_quant(x, weight, linear):
        seen.append((x, weight, linear))
        return x + 1, weight * 2

    torch.testing.assert_close(layer(x), x @ (latent * layer.mask).T + layer.bias)
    layer.fake_quant = fake_quant
    torch.testing.assert_close(layer(x), (x + 1) @ (latent * layer.mask * 2).T + layer.bias)
    assert torch.equal(seen[0][1], latent * layer.mask) and seen[0][2] is layer
    assert torch.equal(layer.weight, latent)
    layer.kernel = lambda x: x[..., :4] * 10
    assert torch.equal(layer(x), x[..., :4] * 10)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_layer_equals_pytorchs_own_layer():
    """nn.TransformerEncoderLayer, post-norm with GELU, is written by others from the same papers."""
    config = replace(CONFIGS["bert"], hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
    ours = randomize(Layer(config), 3)
    for _, linear in linears(ours):
        linear.mask.copy_(torch.rand(linear.mask.shape, generator=torch.Generator().manual_seed(4)) > 0.3)
    theirs = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, activation="gelu", batch_first=True,
                                        layer_norm_eps=1e-12)
    with torch.no_grad():
        attention = theirs.self_attn
        projections = (ours.query, ours.key, ours.value)
        attention.in_proj_weight.copy_(torch.cat([linear.weight * linear.mask for linear in projections]))
        attention.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))
        for mine, other in ((ours.attention_output, attention.out_proj), (ours.intermediate, theirs.linear1),
                            (ours.output, theirs.linear2), (ours.attention_norm, theirs.norm1),
                            (ours.output_norm, theirs.norm2)):
            other.weight.copy_(mine.weight * mine.mask if isinstance(mine, Linear) else mine.weight)
            other.bias.copy_(mine.bias)
    real = make_batch()["attention_mask"].bool()
    x = torch.randn(3, 11, 24, generator=torch.Generator().manual_seed(5))
    expected = theirs.train()(x, src_key_padding_mask=~real)
    assert_same([ours(x, real[:, None, None, :])[real]], [expected[real]])


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("kind", ["pretraining", "classification", "span"])
def test_padding_never_leaks(model_type, kind):
    """Whatever stands in the padding, and however much of it there is, real tokens see none of it."""
    model, batch = make(kind, model_type), make_batch()
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": torch.where(padding, (batch["input_ids"] + 5) % 67, batch["input_ids"]),
             "token_type_ids": torch.where(padding, 1 - batch["token_type_ids"], batch["token_type_ids"])}
    for left, right in zip(our_outputs(model, batch), our_outputs(model, other)):
        assert torch.equal(left, right)
    alone = our_outputs(model, {name: tensor[1:2, :6] for name, tensor in batch.items()})
    padded = our_outputs(model, {name: tensor[1:2] for name, tensor in batch.items()})
    assert_same(alone, padded)


def test_published_parameter_counts():
    with torch.device("meta"):
        counts = {name: count_parameters(Encoder(PRESETS[name])) for name in PRESETS}
        heads = {kind: count_parameters(build(PRESETS["bert-base"], kind)) for kind in ("pretraining", "span")}
    del counts["tiny"]
    assert counts == {"bert-base": 109_482_240, "bert-large": 335_141_888, "distilbert-base": 66_362_880,
                      "minilm-l6": 22_713_216}
    assert heads == {"pretraining": 110_106_428, "span": 108_893_186}     # tied decoder once; no pooler in SQuAD models


def test_fresh_weights():
    torch.manual_seed(0)
    config = replace(CONFIGS["bert"], hidden_size=96, intermediate_size=192, initializer_range=0.05)
    model = build(config, "pretraining")
    for module in model.modules():
        if isinstance(module, Linear):
            assert not module.bias.any() and module.mask.all() and not module.act_range.any()
        if isinstance(module, (Linear, nn.Embedding)) and module.weight.numel() > 5000:
            assert abs(float(module.weight.detach().std()) - 0.05) < 0.003
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_layers_say_what_may_be_pruned(model_type):
    for kind in ("pretraining", "classification", "span"):
        for name, linear in linears(make(kind, model_type)):
            assert linear.prunable == name.startswith("encoder."), name


def test_vocabulary_features_only_where_asked():
    model, batch = make(), make_batch()
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    some = torch.zeros_like(everywhere)
    some[0, [2, 9]] = some[1, 0] = True
    whole, sentence = model(**batch, positions=everywhere)
    features, same_sentence = model(**batch, positions=some)
    assert features.shape == (3, 24)
    torch.testing.assert_close(features, whole.view(3, 11, 24)[some])
    assert torch.equal(sentence, same_sentence)
    hidden = model.encoder(**batch)
    expected = model.transform_norm(F.gelu(F.linear(hidden[0, 9], model.transform.weight, model.transform.bias)))
    torch.testing.assert_close(features[1], expected)
    weight, bias = model.vocabulary()
    assert weight is model.encoder.word.weight and bias is model.bias


@pytest.mark.parametrize("kind", ["pretraining", "classification", "span"])
def test_set_dropout(kind):
    model, batch = make(kind), make_batch()
    quiet = our_outputs(model, batch)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(our_outputs(model, batch)[0], quiet[0])
    set_dropout(model, 0.0)
    for left, right in zip(our_outputs(model, batch), quiet):
        torch.testing.assert_close(left, right)
    set_dropout(model, 0.37)
    assert all(module.p == 0.37 for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(layer.attention_dropout == 0.37 for layer in model.encoder.layers)


@every_published_class
def test_dropout_falls_where_the_published_models_have_it(name, model_type, kind, tmp_path):
    """The same seed drops the same values only if place, order and probability of every dropout agree."""
    published = make_published(name)
    published.save_pretrained(tmp_path)
    model, batch = load(tmp_path, kind).train(), make_batch()
    torch.manual_seed(11)
    ours = our_outputs(model, batch)
    torch.manual_seed(11)
    assert_same(ours, their_outputs(published.train(), batch))


def test_a_row_longer_than_the_positions():
    model = make("span")
    message = error_of(model, **make_batch(length=21))
    assert "21 tokens" in message and "20" in message and "--max-len" in message
    model(**make_batch(length=20))


@pytest.mark.parametrize("kind", ["pretraining", "classification", "span"])
def test_bfloat16_autocast_is_close_to_float32(kind):
    def run(precision):
        model = make(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = our_outputs(model, make_batch())
        sum((logits.float() ** 2).mean() for logits in outputs).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([logits.detach().float().flatten() for logits in outputs]), torch.cat(gradients), outputs

    outputs, gradients, _ = run("fp32")
    rounded, rounded_gradients, logits = run("bf16")
    assert logits[0].dtype == torch.bfloat16                    # it did run in the short type
    assert float((rounded - outputs).norm() / outputs.norm()) < 0.03
    assert gradients.dtype == rounded_gradients.dtype == torch.float32
    assert float(F.cosine_similarity(rounded_gradients, gradients, dim=0)) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_linear_is_the_product_with_the_masked_weight(precision):
    """Values and gradients, bit for bit in the type of the products; also once the layer is frozen."""
    generator = torch.Generator().manual_seed(3)
    layer, x = Linear(24, 40), torch.randn(2, 7, 24, generator=generator)
    layer.mask.copy_(torch.rand(40, 24, generator=generator) > 0.6)
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        ours, expected = layer(x), F.linear(x, weight * layer.mask, bias)
    assert ours.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert torch.equal(ours, expected)
    ours.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad) and torch.equal(layer.bias.grad, bias.grad)
    assert layer.weight.grad.dtype == torch.float32 and not layer.weight.grad[~layer.mask].any()
    layer.freeze(torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        assert torch.equal(layer(x), ours)
    assert not layer.weight.requires_grad


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
    assert other.classifier.mask.all() and not other.classifier.act_range.any()
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
        linear.act_range.copy_(torch.randn(2, generator=generator))
    kept = model.encoder.layers[0].query
    with torch.no_grad():
        kept.weight[kept.mask] = 0.0                          # zeros that no mask asks for
    latent = {name: linear.weight.detach().clone() for name, linear in linears(model)}
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
    save(make("classification"), tmp_path)
    path = tmp_path / "compression.safetensors"
    whole, _ = read_safetensors(path)
    for name in list(whole):
        write_safetensors(path, {key: tensor for key, tensor in whole.items() if key != name})
        assert path.name in error_of(load, tmp_path, "classification") and name
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
# safetensors

def tensors_of_every_dtype():
    """Random bytes (not-a-number included) in every type and in awkward shapes."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for code, dtype in DTYPES.items():
        for shape in ((3, 5), (7,), (), (0,), (2, 0, 3), (1, 1, 1)):
            count = int(np.prod(shape))
            raw = torch.randint(2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
            tensors[f"{code}/{list(shape)} é"] = raw.to(torch.uint8).view(dtype).view(shape)
    return tensors


def assert_bitwise(left, right):
    def raw(tensor):
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()

    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape and tensor.dtype == right[name].dtype, name
        assert raw(tensor) == raw(right[name]), name


def test_files_are_the_librarys(tmp_path):
    """Ours read by the `safetensors` library, and its files read by us, for every type, empty tensors included."""
    tensors, path = tensors_of_every_dtype(), tmp_path / "file.safetensors"
    write_safetensors(path, tensors, {"who": "us"})
    assert_bitwise(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "us"}
    read, metadata = read_safetensors(path)
    assert_bitwise(read, tensors)
    assert metadata == {"format": "pt", "who": "us"}
    safetensors.torch.save_file(tensors, path, {"who": "them"})
    read, metadata = read_safetensors(path)
    assert_bitwise(read, tensors)
    assert metadata == {"who": "them"}
    write_safetensors(path, {"sliced": torch.arange(24).view(4, 6)[:, ::2], "weight": nn.Parameter(torch.ones(3))})
    assert torch.equal(read_safetensors(path)[0]["sliced"], torch.arange(24).view(4, 6)[:, ::2])
    write_safetensors(path, {})
    assert read_safetensors(path)[0] == safetensors.torch.load_file(path) == {}


def raw_file(path, header, data):
    """A safetensors file with whatever header: an object, or bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_odd_alignment(tmp_path):
    """A wide element may begin at any byte."""
    numbers = np.array([1.5, -2.0], np.float32)
    path = raw_file(tmp_path / "odd.safetensors", {"a": entry("U8", [3], 0, 3), "b": entry("F32", [2], 3, 11),
                                                   "c": entry("I64", [1], 11, 19)},
                    bytes([1, 2, 3]) + numbers.tobytes() + (-7).to_bytes(8, "little", signed=True))
    tensors, metadata = read_safetensors(path)
    assert tensors["a"].tolist() == [1, 2, 3] and tensors["b"].tolist() == [1.5, -2.0] and tensors["c"].tolist() == [-7]
    assert metadata == {}


FLAT = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty file": b"", "seven bytes": b"1234567",
    "header longer than the file": (10 ** 6).to_bytes(8, "little") + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not JSON": (b"{", b""), "not UTF-8": (b'{"\xff\xfe": 1}', b""), "a list": (b"[]", b""), "a number": (b"12", b""),
    "deep nesting": (b"[" * 100_000, b""),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, bytes(8)),
    "dtype no string": ({"a": entry(["F32"], [2], 0, 8)}, bytes(8)),
    "entry no object": ({"a": 3}, bytes(8)),
    "too few bytes": ({"a": FLAT}, bytes(7)), "too many bytes": ({"a": FLAT}, bytes(9)),
    "bytes of nobody": ({}, bytes(1)),
    "shape too large": ({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "shape negative": ({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)),
    "shape of fractions": ({"a": entry("F32", [2.0], 0, 8)}, bytes(8)),
    "shape of text": ({"a": entry("F32", "2", 0, 8)}, bytes(8)),
    "shape infinite": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8)),
    "huge and empty": ({"a": entry("F32", [0, 10 ** 30], 0, 0)}, b""),
    "huge count": ({"a": entry("F32", [2 ** 40, 2 ** 40], 0, 2 ** 82)}, bytes(8)),
    "overflowing count": ({"a": entry("F32", [2 ** 32, 2 ** 32], 0, 0)}, b""),
    "offset negative": ({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "offsets reversed": ({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "offsets infinite": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "beyond the end": ({"a": entry("F32", [2], 8, 16)}, bytes(8)),
    "overlap": ({"a": FLAT, "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "same bytes twice": ({"a": FLAT, "b": FLAT}, bytes(8)),
    "a hole": ({"a": FLAT, "b": entry("F32", [1], 12, 16)}, bytes(16)),
    "a bool of 2": ({"a": entry("BOOL", [2], 0, 2)}, bytes([1, 2])),
    "metadata no object": ({"__metadata__": 5, "a": FLAT}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    path, damage = tmp_path / "file.safetensors", DAMAGED[name]
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        raw_file(path, *damage)
    assert str(path) in error_of(read_safetensors, path)


def test_missing_file_is_named(tmp_path):
    assert "nothing.safetensors is missing" in error_of(read_safetensors, tmp_path / "nothing.safetensors")
    assert "is missing" in error_of(read_safetensors, tmp_path)


NUMBERS = [b"0", b"1", b"-1", b"1e3", b"2.5", b"NaN", b"1e999", b"99999999999999999999", b"4611686018427387903",
           b"null", b"[]", b'"8"', b"true", *(str(number).encode() for number in range(2, 90, 3))]


def damage(whole, kind, generator):
    """A copy of the file's bytes with one random damage of five kinds."""
    damaged, head = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    if kind == 0:                                               # one bit of the length or the header
        damaged[generator.randrange(head)] ^= 1 << generator.randrange(8)
    elif kind == 1:                                             # some bytes, anywhere
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
    elif kind == 2:                                             # cut short
        del damaged[generator.randrange(len(damaged)):]
    else:                                                       # the header's length corrected for what changes in it:
        if kind == 3:                                           # another number
            begin, end = generator.choice([match.span() for match in re.finditer(rb"\d+", whole[8:head])])
            damaged[8 + begin:8 + end] = generator.choice(NUMBERS)
        else:                                                   # a piece twice, or away
            begin = generator.randrange(8, head - 12)
            end = begin + generator.randint(1, 12)
            damaged[begin:end] = damaged[begin:end] * generator.choice([0, 2])
        damaged[:8] = (head - 8 + len(damaged) - len(whole)).to_bytes(8, "little")
    return damaged


def test_thousands_of_random_damages_end_in_an_input_error_or_a_valid_read(tmp_path):
    path, generator, refused = tmp_path / "file.safetensors", random.Random(0), 0
    write_safetensors(path, {"a": torch.randn(4, 3), "b": torch.ones(3, 3, dtype=torch.bool), "c": torch.zeros(0, 2),
                             "d": torch.arange(5), "e": torch.randn(3).to(torch.bfloat16)})
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:                # one open file: opening to write is what takes time
        for trial in range(4000):
            damaged = damage(whole, trial % 5, generator)
            file.seek(0)
            file.write(damaged)
            file.truncate()
            try:
                tensors, _ = read_safetensors(path)
            except InputError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                data = len(damaged) - 8 - int.from_bytes(damaged[:8], "little")
                assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) == data
                assert all(len(tensor.flatten().tolist()) == tensor.numel() for tensor in tensors.values())
    assert 2000 < refused < 4000


def test_damage_in_a_model_directory_is_an_input_error(tmp_path):
    save(make(), tmp_path)
    for name in ("model.safetensors", "compression.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert str(path) in error_of(load, tmp_path, "pretraining")
        path.write_bytes(whole[:8] + b"[" + whole[9:])
        assert str(path) in error_of(load, tmp_path, "pretraining")
        path.write_bytes(whole)
    load(tmp_path, "pretraining", say=pytest.fail)


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\ud800 cannot be encoded")             # fails after the temporary file is open
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="directory"):
        write_file(folder, "a folder cannot be replaced by a file")
    assert sorted(tmp_path.iterdir()) == [path, folder]


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
    ({"model_type": "gpt2"}, "gpt2"), ({"model_type": None}, "bert, distilbert"),
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
