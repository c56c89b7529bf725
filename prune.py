"""Which weights live: magnitude masks, the gradual ramp, learning-rate rewinding, and the pattern lock.

Everything about time is a pure function of the optimizer step, so that a resumed run needs nothing but its step number.
Sources: arXiv 2111.05754 (Prune Once for All), arXiv 1710.01878 (cubic ramp), arXiv 2003.02389 (learning-rate
rewinding); and beside the paper, arXiv 2401.02938 (a layer's outputs kept).
"""
import math
import re
from dataclasses import dataclass

import torch

from model import InputError, linears


# ---------------------------------------------------------------------------------------------------------------------
# Patterns

@dataclass(frozen=True)
class Pattern:
    """What is kept or pruned together. A weight matrix is (out, in), so `1x4` is four consecutive inputs of one output
    row.

    rows, columns   block size; 1 x 1 = unstructured
    keep, group     N:M patterns: `keep` of every `group` consecutive inputs live; otherwise 0, 0
    """
    rows: int = 1
    columns: int = 1
    keep: int = 0
    group: int = 0

    def __str__(self):
        if self.group:
            return f"{self.keep}:{self.group}"
        return "unstructured" if self.rows == self.columns == 1 else f"{self.rows}x{self.columns}"


def parse_pattern(text):
    """'unstructured', 'RxC' such as '1x4', or 'N:M' such as '2:4' -> Pattern. InputError otherwise."""
    if text == "unstructured":
        return Pattern()
    block, n_of_m = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text), re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if block and int(block[1]) > 0 and int(block[2]) > 0:
        return Pattern(int(block[1]), int(block[2]))
    if n_of_m and 0 < int(n_of_m[1]) <= int(n_of_m[2]):
        return Pattern(keep=int(n_of_m[1]), group=int(n_of_m[2]))
    raise InputError(f"--pattern {text!r} is not a pattern; give 'unstructured', a block like '1x4' (outputs x "
                     f"inputs), or N:M like '2:4' (2 of every 4 inputs kept)")


def resolve_sparsity(sparsity, pattern):
    """The target share of zeros, in [0, 1). None means 0.85, or what an N:M pattern implies. InputError otherwise."""
    if pattern.group:
        implied = 1 - pattern.keep / pattern.group
        if sparsity is not None and abs(sparsity - implied) > 1e-5:
            raise InputError(f"--pattern {pattern} has a sparsity of exactly {implied:g}, and --sparsity asks for "
                             f"{sparsity:g}; leave --sparsity out or choose another pattern")
        return implied
    sparsity = 0.85 if sparsity is None else sparsity
    if not 0 <= sparsity < 1:
        raise InputError(f"--sparsity {sparsity:g} is outside [0, 1); give the share of zeros, for example 0.85")
    return sparsity


def check_pattern(model, pattern):
    """InputError unless the pattern's block or group divides every prunable layer."""
    rows, columns = pattern.rows, pattern.group or pattern.columns
    for name, layer in prunable(model):
        out_features, in_features = layer.weight.shape
        if out_features % rows or in_features % columns:
            raise InputError(f"--pattern {pattern} does not divide layer '{name}', which has {out_features} outputs "
                             f"and {in_features} inputs; choose a pattern that does")


def prunable(model):
    """[(name, layer)]: encoder and pooler Linears (arXiv 2111.05754, section 4); the layers say it themselves."""
    return [(name, layer) for name, layer in linears(model) if layer.prunable]


# ---------------------------------------------------------------------------------------------------------------------
# Masks

def magnitude_mask(weight, sparsity, pattern=Pattern()):
    """A bool mask like `weight` (out, in), False on exactly floor(sparsity * units) units of least magnitude.

    A unit is a weight, or a block scored by its mean |w|. With N:M it is one weight of a group of M inputs, and every
    group loses the same number. Ranked, not thresholded: among equals the first in row order is pruned.
    """
    out_features, in_features = weight.shape
    score = weight.detach().abs().float()
    if pattern.group:
        count = math.floor(sparsity * pattern.group + 1e-6)
        order = score.view(-1, pattern.group).argsort(dim=1, stable=True)
        mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :count], False)
        return mask.view(out_features, in_features)
    rows, columns = pattern.rows, pattern.columns
    blocks = score.view(out_features // rows, rows, in_features // columns, columns).mean((1, 3))
    mask = keep_largest(blocks.flatten(),
                        math.floor(sparsity * blocks.numel() + 1e-6)).view_as(blocks)      # 1e-6: 0.29 * 100
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def keep_largest(score, count):
    """score: float (n,) -> bool (n,), False on exactly the `count` smallest; of equal scores the first ones go."""
    mask = torch.ones_like(score, dtype=torch.bool)
    if count == 0:
        return mask
    threshold = score.kthvalue(count).values
    smaller = score < threshold
    ties = (score == threshold).nonzero()[:, 0]
    mask[smaller] = False
    mask[ties[:count - int(smaller.sum())]] = False
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Time. A step is the 0-based number of an optimizer step.

@dataclass(frozen=True)
class Ramp:
    """When and how far to prune, in optimizer steps. The reference run of 100,000 steps has 0.9, 0, 50000, 80000,
    1000."""
    target: float         # final share of zeros
    begin: int            # the cubic ramp starts ...
    end: int              # ... and reaches the target
    update_end: int       # masks are re-selected until here (inclusive), after that they are frozen
    every: int            # optimizer steps between two selections, and between two rewinds of the learning rate


def sparsity_at(step, ramp):
    """s(t) = s_f - s_f (1 - (t - t_s) / (t_e - t_s))^3, 0 before t_s and s_f after t_e (arXiv 1710.01878,
    equation 1)."""
    progress = (step - ramp.begin) / max(1, ramp.end - ramp.begin)
    return ramp.target - ramp.target * (1 - min(1.0, max(0.0, progress))) ** 3


def updates_at(step, ramp):
    """Are masks selected anew after this optimizer step?"""
    return ramp.begin <= step <= ramp.update_end and (step - ramp.begin) % ramp.every == 0


def learning_rate_factor(step, steps, warmup, ramp=None):
    """The factor on the peak learning rate: linear warm-up, linear decay to 0 at `steps`; with a ramp, rewinding.

    While sparsity rises, the rate is put back to its value at the ramp's begin every `ramp.every` steps, and after the
    ramp it decays to 0 (arXiv 2111.05754, section 3.2, as its reference code computes it). The decay is stretched over
    the steps that are left outside the ramp, so the factor begins up to 2 % above 1 in the paper's run.
    """
    if step < warmup:
        return step / warmup
    if ramp is None:
        return max(0.0, (steps - step) / max(1, steps - warmup))
    decaying = steps - (ramp.end - ramp.begin)
    if step < ramp.begin:
        position = decaying - step
    elif step < ramp.end:
        position = decaying - ramp.begin - (step - ramp.begin) % ramp.every
    else:
        position = steps - step
    return max(0.0, position / max(1, decaying - warmup))


# ---------------------------------------------------------------------------------------------------------------------
# In place of the ramp: all zeros at once, the weights that live set anew

ROUNDS, LAST_CUT, DAMPING, PENALTY = 30, 20, 0.05, 1.0


def reconstruct(weight, gram, cross, sparsity, pattern=Pattern()):
    """The mask and the weights W that change a layer's outputs little: min ||W_0 X_0 - W X||^2 with W = mask * W, by
    the alternating direction method of multipliers (arXiv 2401.02938, whose X_0 is X).

    weight      W_0 (out, in), dense
    gram, cross float64 (in, in): X X^T and X_0 X^T of the inputs (in, tokens) that the layer has in the pruned model
                and in the dense one
    Returns (W like weight, mask bool): a mask has exactly as many zeros as `magnitude_mask`'s, which chooses it from
    the weights of inputs that are scaled to one length, ever more of them in the first LAST_CUT of ROUNDS.
    """
    eye, weight_0 = torch.eye(len(gram), dtype=gram.dtype), weight.detach().to(gram.dtype)
    ridge = DAMPING * gram.diagonal().mean().clamp_min(1e-12) * eye         # an input that is hardly ever there stays
    gram, cross = gram + ridge, cross + ridge                               # as it was
    scale = gram.diagonal().sqrt()
    target, inverse = weight_0 @ cross / scale, torch.linalg.inv(gram / scale / scale[:, None] + PENALTY * eye)
    free, dual = weight_0 * scale, torch.zeros_like(weight_0)               # for inputs that are scaled
    ramp = Ramp(sparsity, 0, LAST_CUT, LAST_CUT, 1)
    for number in range(ROUNDS):
        if number < LAST_CUT:
            mask = magnitude_mask(free + dual, sparsity_at(number + 1, ramp), pattern)
        pruned = mask * (free + dual)
        dual += free - pruned
        free = (target + PENALTY * (pruned - dual)) @ inverse
    return (mask * (free + dual) / scale).to(weight.dtype), mask


# ---------------------------------------------------------------------------------------------------------------------
# Acting on a model

@torch.no_grad()
def update_masks(model, step, ramp, pattern):
    """After optimizer step `step`: select every layer's mask anew from its latent weights, if the ramp says so.

    Each layer gets the same sparsity (uniform). Latent weights under a False mask keep their value, so they can return.
    """
    if updates_at(step, ramp):
        for _, layer in prunable(model):
            layer.mask.copy_(magnitude_mask(layer.weight, sparsity_at(step, ramp), pattern))


@torch.no_grad()
def lock(model, pattern=None):
    """Pattern lock (arXiv 2111.05754, section 3.3): M = 1 where W != 0, so no gradient reaches a zero.

    A stored mask is taken as it is; a layer without one (a model from elsewhere) gets its mask from its zeros.
    pattern: what these are made of (formats/patterns.py finds it). In a model of blocks, a single zero inside a living
    block is a weight that was rounded to zero, and stays free.
    """
    for _, layer in prunable(model):
        if bool(layer.mask.all()):
            layer.mask.copy_(layer.weight != 0)
        if pattern and pattern.rows * pattern.columns > 1:
            tiles(layer.mask, pattern)[:] = tiles(layer.mask, pattern).amax((1, 3), keepdim=True)
    burn_in(model)


@torch.no_grad()
def burn_in(model):
    """W <- W * M: make the zeros real. Latent values are gone after this."""
    for _, layer in prunable(model):
        layer.weight *= layer.mask


# ---------------------------------------------------------------------------------------------------------------------
# Counting what is there

KINDS = ("query", "key", "value", "attention_output", "intermediate", "output", "pooler")       # of prunable layers


def tiles(mask, pattern):
    """(out, in) -> a view (out / R, R, in / C, C), with R x C the pattern's block or 1 x its group."""
    rows, columns = pattern.rows, pattern.group or pattern.columns
    return mask.view(mask.shape[0] // rows, rows, mask.shape[1] // columns, columns)


def report(model):
    """[(layer name, weights, zeros)] of the prunable layers, recounted from the tensors as the forward pass uses
    them."""
    return [(name, layer.weight.numel(), int((layer.weight * layer.mask == 0).sum()))
            for name, layer in prunable(model)]


def measured_sparsity(model):
    """Share of zeros in the prunable layers, 0 to 1."""
    rows = report(model)
    return sum(zeros for _, _, zeros in rows) / max(1, sum(weights for _, weights, _ in rows))
