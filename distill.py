"""The loss: what the labels say and what the teacher says.

    L = (1 - kd_weight) * L_hard + kd_weight * L_kd
    L_kd = T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))

(arXiv 2111.05754, section 3.2, with both weights 0.5 in pre-training; distillation as in arXiv 1503.02531.)

Every term is a sum divided by a count over the whole batch of the optimizer step, not by the micro-batch's own count,
so that 1 x 16 rows and 4 x 4 rows have the same gradient. They come from `denominators`.
"""
import torch
import torch.nn.functional as F

from model import product_type

CHUNK_ELEMENTS = 2 ** 24         # logits in flight at once: 64 MB in float32, whatever batch, length and vocabulary are
CACHED_ELEMENTS = 2 ** 18        # of those, what is turned into loss and gradient at once: 1 MB each


def denominators(batches):
    """How many things each term averages over, summed over the micro-batches of one optimizer step.

    Returns dict of ints: rows; tokens (not padding); masked (positions with a label), the last for pre-training only.
    """
    return {"rows": sum(len(batch["input_ids"]) for batch in batches),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "masked": sum(int((batch["labels"] != -100).sum()) for batch in batches if "labels" in batch)}


def loss(student, teacher, batch, count, temperature=2.0, kd_weight=0.5, kd_target="all", kd_hidden=0.0):
    """One micro-batch through student and teacher.

    student     one of the models of model.py; its `kind` says which loss
    teacher     a frozen model of the same kind in eval mode, or None: labels only
    batch       dict of int64 tensors as data.collate makes it
    count       what `denominators` returned for the whole optimizer step
    kd_hidden   of a task: L_kd has hidden_error so many times as one more term (arXiv 2310.06927, equation 2)
    Returns (loss, parts): a scalar to call backward on, and its terms as floats, each a share of the step's mean.
    """
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    if student.kind == "encoder":
        return hidden_loss(student, teacher, inputs, count)
    if student.kind == "pretraining":
        return pretraining_loss(student, teacher, inputs, batch, count, temperature, kd_weight, kd_target)
    soft = {}
    if teacher and kd_hidden:
        error, ours, theirs = hidden_error(student, teacher, inputs, count)
        logits, teacher_logits, soft["hidden"] = student.head(ours), teacher.head(theirs), kd_hidden * error
    else:
        logits = student(*inputs)
        with torch.no_grad():
            teacher_logits = teacher(*inputs) if teacher else None
    if student.kind == "classification":
        hard = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
        kd = soft_loss(logits, teacher_logits, temperature) if teacher else None
    else:
        hard, kd = span_loss(logits, teacher_logits, batch, temperature)
    return combine({"hard": hard / count["rows"]}, {**soft, "kd": kd / count["rows"]} if teacher else {}, kd_weight)


def hidden_error(student, teacher, inputs, count):
    """The sum over layers of the mean over real tokens of ||h_student - h_teacher||^2 / ||h_teacher||^2 (arXiv
    1909.10351, equation 8, and 2310.06927, equation 1), and the last states of both, (B, T, H)."""
    real, error = inputs[1].bool(), 0.0
    for ours, theirs in zip(student.encoder.states(*inputs), teacher.encoder.states(*inputs), strict=True):
        error = error + (relative_error(ours, theirs) * real).sum() / count["tokens"]
    return error, ours, theirs


def hidden_loss(student, teacher, inputs, count):
    """L = hidden_error, the pooled first token and, of a sentence encoder, the text's vector counting as one layer more
    each: neither labels nor the vocabulary."""
    hidden, ours, theirs = hidden_error(student, teacher, inputs, count)
    terms, pairs = {"hidden": hidden}, {}
    if student.encoder.pooler is not None and teacher.encoder.pooler is not None:       # DistilBERT has none
        pairs["pooled"] = student.encoder.pooled(ours), teacher.encoder.pooled(theirs)
    if student.sentence:
        pairs["vector"] = [student.sentence.pool(states, inputs[1]) for states in (ours, theirs)]
    terms |= {name: relative_error(*pair).sum() / count["rows"] for name, pair in pairs.items()}
    return combine(terms, {}, 0.0)


def relative_error(ours, theirs):
    """(..., H), (..., H) -> float32 (...): the squared distance as a share of the second one's square."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1)


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


def pretraining_loss(student, teacher, inputs, batch, count, temperature, kd_weight, kd_target):
    """Masked language model + next sentence, and the same two for the teacher.

    kd_target: 'all' distils at every position that is not padding (the paper); 'masked' only where a token was
    selected for prediction, about an eighth of the vocabulary-sized work.
    """
    masked = batch["labels"] != -100
    everywhere = teacher is not None and kd_target == "all"
    positions = batch["attention_mask"].bool() if everywhere else masked
    features, next_sentence = student(*inputs, positions)
    with torch.no_grad():
        teacher_features, teacher_next_sentence = teacher(*inputs, positions) if teacher else (None, None)
    masked_count = max(1, count["masked"])                  # where there is no word to predict, the term is 0
    kd_count = count["tokens"] if everywhere else masked_count
    total, mlm, kd = vocabulary_loss(student, teacher, features, teacher_features, batch["labels"][positions],
                                     (1 - kd_weight if teacher else 1.0) / masked_count, kd_weight / kd_count,
                                     temperature)
    parts = {"mlm": mlm / masked_count, **({"kd": kd / kd_count} if teacher else {})}
    if next_sentence is not None:
        hard = F.cross_entropy(next_sentence.float(), batch["next_sentence_label"], reduction="sum") / count["rows"]
        soft = {} if teacher_next_sentence is None else {                   # DistilBERT has none
            "kd_nsp": soft_loss(next_sentence, teacher_next_sentence, temperature) / count["rows"]}
        sentence_total, sentence_parts = combine({"nsp": hard}, soft, kd_weight)
        total, parts = total + sentence_total, {**parts, **sentence_parts}
    return total, parts


def vocabulary_loss(student, teacher, features, teacher_features, labels, hard_scale, kd_scale, temperature):
    """hard_scale * (cross-entropy summed over labelled positions) + kd_scale * (T^2 KL summed over all N positions).

    features, teacher_features (N, H); labels int64 (N,), -100 where there is none. The (N, V) logits never exist as a
    whole: see VocabularyLoss. Returns (scalar with gradient, cross-entropy sum, KL sum), the last two floats.
    """
    taught = (teacher_features, *teacher.vocabulary()) if teacher else None
    total, hard, kd = VocabularyLoss.apply(features, *student.vocabulary(), taught, labels, hard_scale, kd_scale,
                                           temperature, torch.is_grad_enabled())
    return total, float(hard), float(kd)


class VocabularyLoss(torch.autograd.Function):
    """vocabulary_loss over chunks of rows. Each chunk's gradient is taken with its value, by hand, and written over its
    logits: they can then be freed, nothing is computed twice, and no other array is as large. What lies between the
    products goes, on a CPU, over a few rows at a time, which its cache holds."""

    @staticmethod
    def forward(ctx, features, weight, bias, taught, labels, hard_scale, kd_scale, temperature, wants_grad):
        words, size = len(bias), max(1, CHUNK_ELEMENTS // len(bias))
        cached_rows = max(1, CACHED_ELEMENTS // len(bias)) if features.device.type == "cpu" else size
        features, weight, bias = product_inputs(features, weight, bias)
        if taught is not None:
            taught_features, *taught_vocabulary = product_inputs(*taught)
        gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (features, weight, bias) if wants_grad]
        hard, kd = torch.zeros(2, device=features.device)
        for begin in range(0, len(features), size):
            rows = slice(begin, begin + size)
            logits = F.linear(features[rows], weight, bias)                                 # (rows, V)
            taught_logits = None if taught is None else F.linear(taught_features[rows], *taught_vocabulary)
            for first in range(0, len(logits), cached_rows):
                part = slice(first, first + cached_rows)
                hard_value, kd_value, gradient = rows_loss(
                    logits[part], None if taught is None else taught_logits[part], labels[rows][part], hard_scale,
                    kd_scale, temperature)
                hard, kd = hard + hard_value, kd + kd_value
                if wants_grad:
                    gradients[2] += gradient.sum(0)
                    logits[part] = gradient
            if wants_grad:
                gradients[0][rows] = logits @ weight
                gradients[1] += logits.T @ features[rows]
        ctx.save_for_backward(*(gradients and (gradients[0], gradients[1][:words], gradients[2][:words])))
        ctx.mark_non_differentiable(hard, kd)
        return hard * hard_scale + kd * kd_scale, hard, kd

    @staticmethod
    def backward(ctx, grad, *_):
        return *(gradient.mul_(grad) for gradient in ctx.saved_tensors), *[None] * 6


def rows_loss(logits, taught, labels, hard_scale, kd_scale, temperature):
    """Of a few rows of vocabulary_loss: (cross-entropy sum, KL sum, float32 (rows, V) gradient of the scaled total for
    the logits). logits, taught (or None): (rows, V) as the products left them; labels: int64 (rows,), -100 for none."""
    logits = logits.float()
    labelled = (labels != -100).nonzero()[:, 0]
    hard, hard_gradient = cross_entropy_and_gradient(logits[labelled], labels[labelled])
    kd, gradient = (0.0, torch.zeros_like(logits)) if taught is None else divergence_and_gradient(
        logits, taught.float(), temperature)
    return hard, kd, gradient.mul_(kd_scale).index_add_(0, labelled, hard_gradient, alpha=hard_scale)


def product_inputs(features, weight, bias):
    """features (N, H) and a decoder (V, H), (V,) in the type that products are taken in, V made a multiple of 16 by
    word pieces of probability 0: where a row of logits begins in the middle of a cache line, as with BERT's 30,522,
    float32 products take 1.4 times as long."""
    dtype, missing = product_type(features), -len(bias) % 16
    weight, bias = F.pad(weight.to(dtype), (0, 0, 0, missing)), F.pad(bias.to(dtype), (0, missing), value=-1e9)
    return features.to(dtype), weight, bias


def cross_entropy_and_gradient(logits, labels):
    """Cross-entropy of float32 logits (rows, V) with labels int64 (rows,), summed, and its gradient for the logits,
    softmax(z) - onehot(label)."""
    log_probability = logits.log_softmax(-1)
    chosen = torch.arange(len(labels), device=labels.device), labels
    value, gradient = -log_probability[chosen].sum(), log_probability.exp_()
    gradient[chosen] -= 1
    return value, gradient


def divergence_and_gradient(logits, taught, temperature):
    """soft_loss of float32 logits (rows, V), which are overwritten, and its gradient for the student's, T (q - p): p is
    the teacher's softmax at temperature T and q the student's.

    The exponential is what costs, so each is taken once: KL = sum p (log p - log q) = sum p (z_p - z_q) - log Z_p +
    log Z_q, and log Z = z - log q at any word; we take the likeliest.
    """
    logits, taught = logits.div_(temperature), taught.div_(temperature)
    q, p = logits.softmax(-1), taught.softmax(-1)
    log_sums = [z.amax(-1) - probability.amax(-1).log() for z, probability in ((logits, q), (taught, p))]
    value = (log_sums[0] - log_sums[1]).sum() + taught.sub_(logits).mul_(p).sum()
    return value * temperature ** 2, q.sub_(p).mul_(temperature)
