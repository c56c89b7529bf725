"""distill.py: losses against the paper's reference code and a float64 computation by hand; the chunked vocabulary."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from model import ModelConfig, build

BERT = ModelConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                   max_position_embeddings=16, hidden_dropout_prob=0.0, attention_dropout_prob=0.0,
                   classifier_dropout=0.0, initializer_range=0.3)
DISTILBERT = replace(BERT, model_type="distilbert", type_vocab_size=0)
KINDS = ["pretraining", "classification", "span"]


def make(kind="pretraining", seed=0, config=BERT, num_labels=3):
    torch.manual_seed(seed)
    model = build(config, kind, num_labels)
    if kind == "pretraining":
        torch.nn.init.normal_(model.bias)
    return model.eval()                                         # (no dropout: micro-batches draw different numbers)


def make_batch(kind="pretraining", rows=6, length=10, seed=5):
    """Rows of different lengths; every label of every kind, none of them in the padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    real = torch.arange(length) < lengths[:, None]
    batch = {"input_ids": torch.randint(97, (rows, length), generator=generator), "attention_mask": real.long(),
             "token_type_ids": torch.randint(2, (rows, length), generator=generator)}
    if kind == "pretraining":
        chosen = real & (torch.rand(rows, length, generator=generator) < 0.4)
        chosen[:, 0] = True
        batch["labels"] = torch.where(chosen, torch.randint(97, (rows, length), generator=generator), -100)
        batch["next_sentence_label"] = torch.randint(2, (rows,), generator=generator)
    elif kind == "classification":
        batch["labels"] = torch.randint(3, (rows,), generator=generator)
    else:
        for name in ("start_positions", "end_positions"):
            batch[name] = (torch.rand(rows, generator=generator) * lengths).long()
    return batch


def inputs_of(batch):
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def loss_of(student, teacher, batch, **options):
    return distill.loss(student, teacher, batch, distill.denominators([batch]), **options)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(left, right, tolerance=2e-6):
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] is None) == (right[name] is None), name
        if left[name] is not None:
            difference, size = float((left[name] - right[name]).abs().max()), float(right[name].abs().max())
            assert difference <= tolerance * max(1, size), name


# ---------------------------------------------------------------------------------------------------------------------
# By hand, in float64

def softened(logits, temperature):
    """Log-probabilities over the last dimension."""
    logits = np.asarray(logits, np.float64) / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(student, teacher, temperature):
    """T^2 sum p (log p - log q), one number for each row."""
    p, q = softened(teacher, temperature), softened(student, temperature)
    return temperature ** 2 * (np.exp(p) * (p - q)).sum(-1)


def cross_entropy(logits, labels):
    return -np.take_along_axis(softened(logits, 1), np.asarray(labels)[..., None], -1)[..., 0]


def all_logits(model, batch):
    """Every logit of the model as float64 arrays; a pre-training model's at every position."""
    with torch.no_grad():
        if model.kind != "pretraining":
            outputs = model(*inputs_of(batch))
            return [out.double().numpy() for out in (outputs if model.kind == "span" else [outputs])]
        everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        features, sentence = model(*inputs_of(batch), everywhere)
        weight, bias = model.vocabulary()
        logits = (features.double() @ weight.double().T + bias.double()).view(*everywhere.shape, -1)
        return [logits.numpy(), None if sentence is None else sentence.double().numpy()]


def span_by_hand(student, teacher, batch, temperature):
    """Mean over rows of (hard, soft), start and end half each, every row cut to its real tokens."""
    hard = soft = 0.0
    lengths = batch["attention_mask"].sum(1).tolist()
    for i, name in enumerate(("start_positions", "end_positions")):
        for row, length in enumerate(lengths):
            hard += cross_entropy(student[i][row, :length], int(batch[name][row])) / 2 / len(lengths)
            if teacher is not None:
                soft += divergence(student[i][row, :length], teacher[i][row, :length], temperature) / 2 / len(lengths)
    return float(hard), float(soft)


def terms_by_hand(student, teacher, batch, temperature, kd_target="all"):
    """The parts that distill.loss should report."""
    logits = all_logits(student, batch)
    taught = all_logits(teacher, batch) if teacher else None
    if student.kind == "span":
        hard, soft = span_by_hand(logits, taught, batch, temperature)
        return {"hard": hard, **({"kd": soft} if teacher else {})}
    if student.kind == "classification":
        terms = {"hard": cross_entropy(logits[0], batch["labels"]).mean()}
        return {**terms, **({"kd": divergence(logits[0], taught[0], temperature).mean()} if teacher else {})}
    labels = batch["labels"].numpy()
    masked, real = labels != -100, batch["attention_mask"].numpy().astype(bool)
    terms = {"mlm": cross_entropy(logits[0][masked], labels[masked]).mean()}
    if teacher:
        where = real if kd_target == "all" else masked
        terms["kd"] = divergence(logits[0][where], taught[0][where], temperature).mean()
    if logits[1] is not None:
        terms["nsp"] = cross_entropy(logits[1], batch["next_sentence_label"].numpy()).mean()
        if teacher:
            terms["kd_nsp"] = divergence(logits[1], taught[1], temperature).mean()
    return terms


def total_of(terms, kd_weight):
    """L = (1 - kd_weight) L_hard + kd_weight L_kd; labels only where there is no teacher."""
    soft = sum(value for name, value in terms.items() if name.startswith("kd"))
    hard = sum(value for name, value in terms.items() if not name.startswith("kd"))
    return (1 - kd_weight) * hard + kd_weight * soft if any(name.startswith("kd") for name in terms) else hard


def assert_loss(result, terms, kd_weight):
    total, parts = result
    assert parts.keys() == terms.keys() and all(type(value) is float for value in parts.values())
    for name, value in terms.items():
        assert parts[name] == pytest.approx(float(value), rel=2e-5, abs=2e-6), name
    assert float(total.detach()) == pytest.approx(float(total_of(terms, kd_weight)), rel=2e-5, abs=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss

@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_computation_by_hand(kind, temperature, kd_weight):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    result = loss_of(student, teacher, batch, temperature=temperature, kd_weight=kd_weight)
    assert_loss(result, terms_by_hand(student, teacher, batch, temperature), kd_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_teacher_only_labels_count(kind):
    student, batch = make(kind), make_batch(kind)
    for kd_weight in (0.0, 0.5, 1.0):
        assert_loss(loss_of(student, None, batch, kd_weight=kd_weight), terms_by_hand(student, None, batch, 2.0), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_papers(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    assert_loss(loss_of(student, teacher, batch), terms_by_hand(student, teacher, batch, 2.0), 0.5)


def test_distillation_at_the_masked_positions_only():
    student, teacher, batch = make(seed=0), make(seed=1), make_batch()
    everywhere = terms_by_hand(student, teacher, batch, 2.0, "all")
    masked = terms_by_hand(student, teacher, batch, 2.0, "masked")
    assert_loss(loss_of(student, teacher, batch, kd_target="all"), everywhere, 0.5)
    assert_loss(loss_of(student, teacher, batch, kd_target="masked"), masked, 0.5)
    assert abs(everywhere["kd"] - masked["kd"]) > 1e-3 and everywhere["mlm"] == masked["mlm"]


@pytest.mark.parametrize("kind", KINDS)
def test_distilbert_has_no_next_sentence(kind):
    student, teacher, batch = make(kind, 0, DISTILBERT), make(kind, 1, DISTILBERT), make_batch(kind)
    total, parts = loss_of(student, teacher, batch)
    assert "nsp" not in parts and "kd_nsp" not in parts
    assert_loss((total, parts), terms_by_hand(student, teacher, batch, 2.0), 0.5)
    total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())
    assert_loss(loss_of(student, None, batch), terms_by_hand(student, None, batch, 2.0), 0.0)


def direct_loss(student, teacher, batch, temperature, kd_weight, kd_target):
    """Pre-training as one would write it with memory to spare: all logits at once, and autograd."""
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def run(model):
        features, sentence = model(*inputs_of(batch), everywhere)
        weight, bias = model.vocabulary()
        return features @ weight.T + bias, sentence

    logits, sentence = run(student)
    hard = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)
    hard = hard + F.cross_entropy(sentence, batch["next_sentence_label"])
    taught, taught_sentence = (tensor.detach() for tensor in run(teacher))
    where = (batch["attention_mask"] == 1 if kd_target == "all" else batch["labels"] != -100).flatten()

    def soft(student_logits, teacher_logits):
        p = (teacher_logits / temperature).softmax(-1)
        return temperature ** 2 * (p * (p.log() - (student_logits / temperature).log_softmax(-1))).sum(-1).mean()

    return (1 - kd_weight) * hard + kd_weight * (soft(logits[where], taught[where]) + soft(sentence, taught_sentence))


@pytest.mark.parametrize("rows_per_chunk", [4, 1000])         # other sizes: test_chunks_equal_the_whole
@pytest.mark.parametrize("kd_target", ["all", "masked"])
def test_gradients_equal_plain_autograd(kd_target, rows_per_chunk, monkeypatch):
    """Of every parameter; the word embeddings are input table and decoder at once."""
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", rows_per_chunk * 97)
    teacher, batch = make(seed=1), make_batch()
    student, other = make(seed=0), make(seed=0)
    loss_of(student, teacher, batch, temperature=3.0, kd_weight=0.3, kd_target=kd_target)[0].backward()
    direct_loss(other, teacher, batch, 3.0, 0.3, kd_target).backward()
    assert_same_gradients(gradients(student), gradients(other))
    assert student.encoder.word.weight.grad.abs().max() > 0 and student.bias.grad.abs().max() > 0


def test_nothing_to_learn_from_oneself():
    """KL is 0, and so is its gradient, when teacher and student agree."""
    for kind in KINDS:
        student, teacher, batch = make(kind, 0), make(kind, 0), make_batch(kind)
        total, parts = loss_of(student, teacher, batch, kd_weight=1.0, temperature=2.0)
        assert abs(float(total.detach())) < 1e-5 and abs(parts["kd"]) < 1e-5
        total.backward()
        assert max(float(grad.abs().max()) for grad in gradients(student).values() if grad is not None) < 1e-5, kind


@pytest.mark.filterwarnings("ignore:There is a performance drop")        # of vmap: it takes the steps one by one
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_distillation_is_the_closed_form_at_every_step_of_the_papers_run(temperature):
    """100,000 steps in which a student comes from far away to its teacher: T^2 sum p log(p / q) of each, in float64,
    and for two classes the same from the logits' difference alone."""
    generator = np.random.default_rng(0)
    way = np.linspace(1, 0, 100_000)[:, None]                   # what is left of it
    for classes in (2, 7):
        teacher = generator.normal(0, 3, (1, classes)) + generator.normal(0, 0.5, (100_000, classes))
        student = teacher + way * generator.normal(0, 4, (100_000, classes))
        student, teacher = (logits.astype(np.float32) for logits in (student, teacher))
        ours = torch.vmap(lambda a, b: distill.soft_loss(a, b, temperature))(*map(torch.from_numpy, (student, teacher)))
        q, p = (np.exp(logits.astype(np.float64) / temperature) for logits in (student, teacher))
        q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
        expected = temperature ** 2 * (p * np.log(p / q)).sum(1)
        assert np.abs(ours.numpy() - expected).max() < 1e-4 and abs(float(ours[-1])) < 1e-5
        if classes == 2:
            a, b = (np.subtract(*logits.T.astype(np.float64)) / temperature for logits in (student, teacher))
            two = np.logaddexp(0, -a) - np.logaddexp(0, -b) + (a - b) / (1 + np.exp(b))
            assert np.abs(ours.numpy() - temperature ** 2 * two).max() < 1e-4


def test_temperature_squared_keeps_the_gradients_size():
    """At a high temperature T^2 KL tends to half the squared distance of centred logits over C: its gradient stays."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 9, generator=generator)
    difference = student.detach() - teacher
    limit = (difference - difference.mean(1, keepdim=True)) / 9
    sizes = []
    for temperature in (1.0, 2.0, 5.0, 20.0, 500.0):
        gradient, = torch.autograd.grad(distill.soft_loss(student, teacher, temperature), student)
        sizes.append(float(gradient.norm()))
    torch.testing.assert_close(gradient, limit, atol=2e-3, rtol=2e-2)
    assert max(sizes) / min(sizes) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Chunks

def plain_vocabulary_loss(features, weight, bias, teacher_logits, labels, hard_scale, kd_scale, temperature):
    logits = features @ weight.T + bias
    p = (teacher_logits / temperature).softmax(-1)
    kd = temperature ** 2 * (p * (p.log() - (logits / temperature).log_softmax(-1))).sum()
    return hard_scale * F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + kd_scale * kd


@pytest.mark.parametrize("rows_at_once", [0.5, 3, 100])
@pytest.mark.parametrize("rows_per_chunk", [0.5, 1, 2, 3, 5, 9, 10, 11, 100])
def test_chunks_equal_the_whole(rows_per_chunk, rows_at_once, monkeypatch):
    """Ten rows in chunks that do and do not divide them: value, and gradient for features, weight and bias."""
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", int(rows_per_chunk * 97))
    monkeypatch.setattr(distill, "CACHED_ELEMENTS", int(rows_at_once * 97))
    student, teacher, generator = make(seed=0), make(seed=1), torch.Generator().manual_seed(2)
    features = torch.randn(10, 24, generator=generator, requires_grad=True)
    teacher_features = torch.randn(10, 24, generator=generator)
    labels = torch.tensor([3, -100, 96, -100, -100, 0, 5, -100, -100, -100])
    total, hard, kd = distill.vocabulary_loss(student, teacher, features, teacher_features, labels, 0.7, 0.2, 2.0)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, *student.vocabulary())]
    taught = (teacher_features @ teacher.encoder.word.weight.T + teacher.bias).detach()
    expected = plain_vocabulary_loss(*leaves, taught, labels, 0.7, 0.2, 2.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert 0.7 * hard + 0.2 * kd == pytest.approx(float(expected.detach()), rel=1e-5)
    (3 * total).backward()
    (3 * expected).backward()
    for ours, plain in zip((features, *student.vocabulary()), leaves):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        quiet = distill.vocabulary_loss(student, teacher, features, teacher_features, labels, 0.7, 0.2, 2.0)
    assert not quiet[0].requires_grad
    torch.testing.assert_close(quiet[0], total.detach())
    assert quiet[1:] == pytest.approx((hard, kd))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 60.0])
def test_closed_forms_equal_float64_autograd(spread, temperature):
    """Value and gradient of both terms, up to logits of which most have a probability that float32 cannot hold."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (spread * torch.randn(7, 500, generator=generator) for _ in range(2))
    labels = torch.randint(500, (7,), generator=generator)
    leaf = student.double().requires_grad_()
    hard = F.cross_entropy(leaf, labels, reduction="sum")
    soft = temperature ** 2 * F.kl_div(
        (leaf / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1), reduction="sum",
        log_target=True)
    for expected, (value, gradient) in (
            (hard, distill.cross_entropy_and_gradient(student, labels)),
            (soft, distill.divergence_and_gradient(student.clone(), teacher.clone(), temperature))):
        rounding = 7 * 1e-6 * temperature ** 2              # of log Z in float32, in each of seven rows
        assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5, abs=rounding)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_labels_and_no_positions(with_teacher):
    """A micro-batch may happen to have no masked token; the others of the step have."""
    student, teacher, batch = make(seed=0), make(seed=1) if with_teacher else None, make_batch()
    count = distill.denominators([batch])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for kd_target in ("all", "masked"):
        total, parts = distill.loss(student, teacher, batch, count, kd_target=kd_target)
        total.backward()
        assert parts["mlm"] == 0 and torch.isfinite(total)
        assert all(torch.isfinite(grad).all() for grad in gradients(student).values() if grad is not None)


class Shapes(TorchDispatchMode):
    """The shapes of everything that any operation returns, backward passes included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.append(tuple(tensor.shape))
        return result

    def logits(self):
        """Rows of the tensors as wide as the vocabulary, 97 or, as products take it, 112 (24 rows: the decoder itself,
        transposed)."""
        wide = [shape for shape in self.seen if len(shape) > 1 and shape[-1] in (97, 112)]
        return [int(np.prod(shape[:-1])) for shape in wide if shape[0] != 24]


def test_no_more_logits_than_one_chunk_ever_exist(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 5 * 97 + 96)
    student, teacher, batch = make(seed=0), make(seed=1), make_batch()
    assert int(batch["attention_mask"].sum()) > 3 * 5
    with Shapes() as forward:
        total, _ = loss_of(student, teacher, batch)
    with Shapes() as backward:
        total.backward()
    assert max(forward.logits()) == 5                           # 5 rows fit, and are taken
    assert backward.logits() == []                              # no logits were kept: the gradients are there already
    with Shapes() as evaluation, torch.no_grad():
        loss_of(student, None, batch)
    assert max(evaluation.logits()) <= 5


# ---------------------------------------------------------------------------------------------------------------------
# What must not matter

@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_excluded(kind):
    """Other tokens in the padding, or more padding, change neither loss nor gradient."""
    teacher, batch = make(kind, 1), make_batch(kind)
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": torch.where(padding, (batch["input_ids"] + 7) % 97, batch["input_ids"]),
             "token_type_ids": torch.where(padding, 1 - batch["token_type_ids"], batch["token_type_ids"])}
    longer = {name: F.pad(tensor, (0, 3), value=-100 if name == "labels" else 0) if tensor.dim() == 2 else tensor
              for name, tensor in batch.items()}
    results = []
    for variant in (batch, other, longer):
        student = make(kind, 0)
        total, _ = loss_of(student, teacher, variant)
        total.backward()
        results.append((float(total.detach()), gradients(student)))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        assert_same_gradients(gradient, results[0][1])


def test_span_logits_in_the_padding_get_no_gradient():
    batch = make_batch("span")
    padding, generator = batch["attention_mask"] == 0, torch.Generator().manual_seed(0)
    draw = lambda: tuple(torch.randn(6, 10, generator=generator) for _ in range(2))      # noqa: E731
    logits, taught = draw(), draw()
    values, grads = [], []
    for shift in (0.0, 50.0):
        leaves = [(tensor + shift * padding).requires_grad_() for tensor in logits]
        hard, kd = distill.span_loss(leaves, [tensor - shift * padding for tensor in taught], batch, 2.0)
        values.append((float(hard.detach()), float(kd.detach())))
        grads.append(torch.autograd.grad(hard + kd, leaves))
    assert values[0] == values[1]
    for before, after in zip(*grads):
        assert torch.equal(before, after) and not before[padding].any() and before[~padding].any()


@pytest.mark.parametrize("kd_target", ["all", "masked"])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_of_sixteen_equals_four_of_four(kind, with_teacher, kd_target):
    """The micro-batches hold different numbers of tokens and labels, so a mean of their means would differ."""
    batch, teacher = make_batch(kind, rows=16), make(kind, 1) if with_teacher else None
    pieces = [{name: tensor[i:i + 4] for name, tensor in batch.items()} for i in range(0, 16, 4)]
    assert len({int(piece["attention_mask"].sum()) for piece in pieces}) > 1
    results = []
    for batches in ([batch], pieces):
        student, count, total, sums = make(kind, 0), distill.denominators(batches), 0.0, {}
        for piece in batches:
            value, parts = distill.loss(student, teacher, piece, count, kd_target=kd_target)
            value.backward()
            total += float(value.detach())
            sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
        results.append((total, sums, gradients(student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-6)
    assert_same_gradients(results[0][2], results[1][2], tolerance=1e-6)


def test_counts():
    batches = [make_batch(seed=1), make_batch(rows=3, seed=2)]
    assert distill.denominators(batches) == {
        "rows": 9, "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "masked": sum(int(np.sum(batch["labels"].numpy() >= 0)) for batch in batches)}
    assert distill.denominators([make_batch("span")])["rows"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_left_alone(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    names = set(student.state_dict())
    optimizer = torch.optim.AdamW([*student.parameters(), *teacher.parameters()], lr=0.1)
    total, _ = loss_of(student, teacher, batch)
    total.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert set(student.state_dict()) == names and not teacher.training
    fresh = make(kind, 0).state_dict()
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_towards_a_teacher_gets_closer_to_it(kind):
    student, teacher, batch = make(kind, 0), make(kind, 1), make_batch(kind)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        total, _ = loss_of(student, teacher, batch, kd_weight=1.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert history[-1] < 0.6 * history[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_close_to_float32(kind, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 4 * 97)       # several chunks share the weight's bfloat16 copy
    teacher, batch, results = make(kind, 1), make_batch(kind), []
    for enabled in (False, True):
        student = make(kind, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total, _ = loss_of(student, teacher, batch)
        total.backward()
        assert total.dtype == torch.float32
        found = [grad.flatten() for grad in gradients(student).values() if grad is not None]
        results.append((float(total.detach()), torch.cat(found)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert float(F.cosine_similarity(results[0][1], results[1][1], dim=0)) > 0.99


@pytest.mark.parametrize("masked", [0, 1, 2])
def test_the_term_of_masked_words_is_a_mean_over_however_few(masked):
    """None of them: the term is zero, and so is what it adds to the gradient."""
    student, batch = make(), make_batch()
    places = [(0, 1), (2, 2)][:masked]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for row, token in places:
        batch["labels"][row, token] = 5
    logits = all_logits(student, batch)[0]
    expected = sum(float(cross_entropy(logits[place], 5)) for place in places) / max(1, masked)
    total, parts = loss_of(student, None, batch)
    total.backward()
    assert parts["mlm"] == pytest.approx(expected, rel=1e-5)
    assert bool(student.transform.weight.grad.any()) == (masked > 0)
