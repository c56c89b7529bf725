"""model.py: the network against PyTorch's layer and `transformers`, and its files against `safetensors` and damage."""
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from formats.model_directory import load
from model import (NO_RANGE, PRESETS, Encoder, InputError, Layer, Linear, ModelConfig, build, count_parameters,
                   linears, set_dropout)

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
            assert not module.bias.any() and module.mask.all() and module.act_range.tolist() == list(NO_RANGE)
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
