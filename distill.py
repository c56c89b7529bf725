"""The loss: what the labels say and what the teacher says.

    L = (1 - kd_weight) * L_hard + kd_weight * L_kd
    L_kd = T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))

(arXiv 2111.05754, section 3.2, with both weights 0.5 in pre-training; distillation as in arXiv 1503.02531.)

Every term is a sum divided by a count over the whole batch of the optimizer step, not by the micro-batch's own count,
so that 1 x 16 rows and 4 x 4 rows have the same gradient. The counts come from `counts`.
"""
import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 2 ** 24         # logits in flight at once: 64 MB in float32, whatever batch, length and vocabulary are


def counts(batches):
    """How many things each term averages over, summed over the micro-batches of one optimizer step.

    Returns dict of ints: rows; tokens (not padding); masked (positions with a label), the last for pre-training only.
    """
    return {"rows": sum(len(batch["input_ids"]) for batch in batches),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "masked": sum(int((batch["labels"] != -100).sum()) for batch in batches if "labels" in batch)}


def loss(student, teacher, batch, count, temperature=2.0, kd_weight=0.5, kd_positions="all"):
    """One micro-batch through student and teacher.

    student     one of the three models of model.py; its `kind` says which loss
    teacher     a frozen model of the same kind in eval mode, or None: labels only
    batch       dict of int64 tensors as data.collate makes it
    count       what `counts` returned for the whole optimizer step
    Returns (loss, parts): a scalar to call backward on, and its terms as floats, each a share of the step's mean.
    """
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    if student.kind == "pretraining":
        return pretraining_loss(student, teacher, inputs, batch, count, temperature, kd_weight, kd_positions)
    logits = student(*inputs)
    with torch.no_grad():
        teacher_logits = teacher(*inputs) if teacher else None
    if student.kind == "classification":
        hard = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
        kd = soft_loss(logits, teacher_logits, temperature) if teacher else None
    else:
        hard, kd = span_loss(logits, teacher_logits, batch, temperature)
    return combine({"hard": hard / count["rows"]}, {"kd": kd / count["rows"]} if teacher else {}, kd_weight)


def combine(hard, soft, kd_weight):
    """Weigh the two groups of terms (dicts of scalars) into (loss, parts)."""
    total = sum(hard.values())
    if soft:
        total = (1 - kd_weight) * total + kd_weight * sum(soft.values())
    return total, {name: float(value.detach()) for name, value in {**hard, **soft}.items()}


def soft_loss(student_logits, teacher_logits, temperature):
    """T^2 KL(teacher || student) over the last dimension, summed over all others; a float32 scalar.

    T^2 keeps the gradient's size the same at every temperature (arXiv 1503.02531, section 2).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature ** 2


def span_loss(logits, teacher_logits, batch, temperature):
    """Start and end, half each: cross-entropy and, with a teacher, KL over the real positions. Padding gets no
    probability. logits, teacher_logits: pairs of (B, T). Returns two sums over rows, the second None without a
    teacher."""
    padding = batch["attention_mask"] == 0
    hard, kd = 0.0, 0.0
    for i, name in enumerate(("start_positions", "end_positions")):
        student = logits[i].float().masked_fill(padding, -1e9)
        hard = hard + F.cross_entropy(student, batch[name], reduction="sum") / 2
        if teacher_logits is not None:
            kd = kd + soft_loss(student, teacher_logits[i].float().masked_fill(padding, -1e9), temperature) / 2
    return hard, kd if teacher_logits is not None else None


def pretraining_loss(student, teacher, inputs, batch, count, temperature, kd_weight, kd_positions):
    """Masked language model + next sentence, and the same two for the teacher.

    kd_positions: 'all' distils at every position that is not padding (the paper); 'masked' only where a token was
    selected for prediction, about an eighth of the vocabulary-sized work.
    """
    masked = batch["labels"] != -100
    everywhere = teacher is not None and kd_positions == "all"
    positions = batch["attention_mask"].bool() if everywhere else masked
    features, next_sentence = student(*inputs, positions)
    teacher_features = None
    if teacher is not None:
        with torch.no_grad():
            teacher_features, teacher_next_sentence = teacher(*inputs, positions)
    kd_count = count["tokens"] if everywhere else count["masked"]
    total, mlm, kd = vocabulary_loss(student, teacher, features, teacher_features, batch["labels"][positions],
                                     (1 - kd_weight if teacher else 1.0) / count["masked"], kd_weight / kd_count,
                                     temperature)
    parts = {"mlm": mlm / count["masked"], **({"kd": kd / kd_count} if teacher else {})}
    if next_sentence is not None:
        hard = F.cross_entropy(next_sentence.float(), batch["next_sentence_label"], reduction="sum") / count["rows"]
        soft = {}
        if teacher is not None:
            soft = {"kd_nsp": soft_loss(next_sentence, teacher_next_sentence, temperature) / count["rows"]}
        sentence_total, sentence_parts = combine({"nsp": hard}, soft, kd_weight)
        total, parts = total + sentence_total, {**parts, **sentence_parts}
    return total, parts


def vocabulary_loss(student, teacher, features, teacher_features, labels, hard_scale, kd_scale, temperature):
    """hard_scale * (cross-entropy summed over labelled positions) + kd_scale * (T^2 KL summed over all N positions).

    features, teacher_features (N, H); labels int64 (N,), -100 where there is none. The (N, V) logits never exist as a
    whole: see ChunkedLoss. Returns (scalar with gradient, cross-entropy sum, KL sum), the last two floats.
    """
    sums = [0.0, 0.0]

    def chunk_loss(rows, chunk, weight, bias):
        logits = F.linear(chunk, weight, bias)                                              # (rows, V)
        selected = labels[rows] != -100
        hard = F.cross_entropy(logits[selected].float(), labels[rows][selected], reduction="sum")
        sums[0] += float(hard.detach())
        if teacher is None:
            return hard * hard_scale
        with torch.no_grad():
            teacher_logits = F.linear(teacher_features[rows], *teacher.vocabulary())
        kd = soft_loss(logits, teacher_logits, temperature)
        sums[1] += float(kd.detach())
        return hard * hard_scale + kd * kd_scale

    weight, bias = student.vocabulary()
    total = ChunkedLoss.apply(features, weight, bias, chunk_loss, max(1, CHUNK_ELEMENTS // len(bias)),
                              torch.is_grad_enabled())
    return total, *sums


class ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over chunks of rows. Each chunk's gradient is taken at once, so that its logits can be freed:
    memory is one chunk's, and nothing is computed twice. `chunk_loss(rows, features, weight, bias)` returns a
    scalar."""

    @staticmethod
    def forward(ctx, features, weight, bias, chunk_loss, size, wants_grad):
        total = torch.zeros((), device=features.device)
        gradients = [torch.zeros_like(tensor) for tensor in (features, weight, bias)] if wants_grad else []
        weight, bias = weight.detach().requires_grad_(wants_grad), bias.detach().requires_grad_(wants_grad)
        for begin in range(0, len(features), size):
            rows = slice(begin, begin + size)
            chunk = features[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                value = chunk_loss(rows, chunk, weight, bias)
            total += value.detach()
            if wants_grad:
                for whole, part in zip((gradients[0][rows], *gradients[1:]),
                                       torch.autograd.grad(value, (chunk, weight, bias))):
                    whole += part
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(gradient * grad for gradient in ctx.saved_tensors), None, None, None
