"""Rounding to 8 bits: fake in training, real at inference, side by side, and one layer packed in memory.

    weights       symmetric int8    q = round(w / s),                s = max|w| / 127 of an output row, q in [-127, 127]
    activations   asymmetric uint8  q = clamp(round(x / s) + z),     s, z from the layer's range, q in [0, 2^bits - 1]
    a product     y[row] = s_x s_w[row] * sum_k (q_x[k] - z) q_w[row, k] + bias[row]

Zero is a level of both grids, so pruned weights stay exactly zero. The fake path (quantization-aware training,
arXiv 1712.05877, 1910.06188) and the integer path call the same functions for scales and levels: they are the same
arithmetic by construction. Every Linear is rounded, the pooler and the task head too, and the rows of the embeddings,
once, before training; layer norms, softmax and GELU stay float32. The paper's reference code also rounds the outputs of
query, key, intermediate and pooler once more; we do not: a product leaves in float32.

Shapes as in model.py, and: out, in = sizes of a Linear; R x C = pruning block, R outputs by C inputs.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from model import NO_RANGE, InputError, linears

AVERAGING = 0.01            # share of a new step in the running activation range
MAX_INPUTS = 2 ** 31 // (255 * 128)     # of a layer: with more, a sum may not fit into an int32


# ---------------------------------------------------------------------------------------------------------------------
# Scales and levels, for both paths

def activation_parameters(act_range, bits):
    """float32 (2,) minimum and maximum -> (scale, zero_point), tensors () of float32 and int32.

    The range is widened to hold 0, which is then a level. An empty range gets the smallest scale, 2^-23.
    """
    low, high = act_range[0].clamp(max=0.0), act_range[1].clamp(min=0.0)
    scale = ((high - low) / (2 ** bits - 1)).clamp(min=torch.finfo(torch.float32).eps)
    zero_point = (-torch.round(low / scale)).clamp(0, 2 ** bits - 1)
    return scale, zero_point.to(torch.int32)


def weight_parameters(weight, scales="row"):
    """float32 (out, in) -> (scale, lowest level, highest level); scale is float32 (out, 1).

    'row'      one scale per output row, max|w| / 127, levels -127 to 127; a row of zeros has scale 1
    'tensor'   one for all rows, max|w| / 127.5, levels -128 to 127, as the paper's reference has it (there max|w| is
               the largest ever seen in training, here the current one)
    """
    if scales == "row":
        peak, steps, low = weight.abs().amax(dim=1, keepdim=True), 127.0, -127
    elif scales == "tensor":
        peak, steps, low = weight.abs().max().expand(len(weight), 1), 127.5, -128
    else:
        raise InputError(f"weight scales are 'row' or 'tensor', not {scales!r}")
    return torch.where(peak > 1e-20, peak / steps, torch.ones_like(peak)), low, 127


def levels(x, scale, zero_point):
    """Nearest levels of float32 x before clamping, in float32: round half to even, then add the zero point."""
    return torch.mul(x, 1.0 / scale).round_().add_(zero_point)


def quantize_activation(x, scale, zero_point, bits):
    """float32 (..., in) -> uint8 of the same shape, in [0, 2^bits - 1]."""
    # By way of int8, 128 lower: torch turns float32 into int8 several times faster than into uint8. 128 is the top bit.
    low = levels(x, scale, zero_point - 128).clamp_(-128, 2 ** bits - 129).to(torch.int8)
    return low.view(torch.uint8).bitwise_xor_(128)


def quantize_weight(weight, scales="row"):
    """float32 (out, in) -> (int8 (out, in), float32 scale (out,))."""
    scale, low, high = weight_parameters(weight, scales)
    return levels(weight, scale, 0).clamp_(low, high).to(torch.int8), scale.flatten()


# ---------------------------------------------------------------------------------------------------------------------
# Fake quantization, for training

class FakeQuantize(torch.autograd.Function):
    """x -> (q - zero_point) * scale. Gradient: 1 where the level lies in [low, high], 0 where it was clipped."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high):
        q = levels(x, scale, zero_point)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp_(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        inside, = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def fake_quant(x, weight, layer, bits=8, scales="row", observed=None):
    """The slot `Linear.fake_quant`: x (..., in) and the masked weight (out, in) -> both rounded, in float32.

    x is rounded by layer.act_range, which `update_ranges` moves after every optimizer step; until it did so for the
    first time, x stays as it is. In training mode layer.seen takes in the batch's minimum and maximum.
    observed: {"real": int64 places of the tokens that are no padding, in rows of T laid end to end, or None for all}.
    Raises InputError if a layer that never trained this way is evaluated.
    """
    x, weight = x.float(), weight.float()
    unset = bool(layer.act_range[0] > layer.act_range[1])
    if layer.training:
        real = (observed or {}).get("real") if x.ndim == 3 else None
        low, high = torch.aminmax(x.detach() if real is None else x.detach().flatten(0, 1)[real])
        layer.seen.copy_(torch.stack([torch.minimum(layer.seen[0], low), torch.maximum(layer.seen[1], high)]))
    elif unset:
        raise InputError("a layer has no activation range yet; train at least one step with fake quantization "
                         "(python train.py --stage quantize) before evaluating")
    scale, zero_point = activation_parameters(layer.act_range, bits)
    weight_scale, low, high = weight_parameters(weight.detach(), scales)
    return (x if unset else FakeQuantize.apply(x, scale, zero_point, 0, 2 ** bits - 1),
            FakeQuantize.apply(weight, weight_scale, 0, low, high))


def update_ranges(model):
    """After the micro-batches of an optimizer step: each layer's act_range moves towards the step's minimum and maximum
    over all real tokens and all processes (exponential average, constant 0.01; the first step sets it)."""
    layers = [layer for _, layer in linears(model) if layer.fake_quant is not None]
    ranges = torch.stack([layer.act_range for layer in layers]).T                           # (2, layers): low, high
    low, high = torch.stack([layer.seen for layer in layers]).T.contiguous()
    if dist.is_initialized():
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    seen = torch.stack([low, high])
    moved = torch.where(ranges[0] > ranges[1], seen, ranges + AVERAGING * (seen - ranges))
    for layer, act_range in zip(layers, torch.where(low > high, ranges, moved).T):
        layer.act_range.copy_(act_range)
        layer.seen.copy_(layer.seen.new_tensor(NO_RANGE))


def prepare(model, bits, scales="row"):
    """Set the fake_quant slot of every Linear: encoder, pooler and task head. bits: of the activations, 2 to 8."""
    if not 2 <= bits <= 8:
        raise InputError(f"activations take 2 to 8 bits, not {bits}")
    observed = {}

    def note_padding(attention_mask):
        mask = attention_mask.flatten().bool()
        observed["real"] = None if bool(mask.all()) else mask.nonzero()[:, 0]

    model.encoder.observe = note_padding
    for _, layer in linears(model):
        layer.fake_quant = functools.partial(fake_quant, bits=bits, scales=scales, observed=observed)


# ---------------------------------------------------------------------------------------------------------------------
# Integers: one packed layer, and the slow exact product that every engine is held against

@dataclass
class PackedLinear:
    """One Linear in integers: everything its product needs."""
    shape: tuple                    # (out, in)
    values: torch.Tensor            # int8: the surviving blocks (n, R, C) in row order; or all weights (out, in)
    mask_bits: torch.Tensor         # uint8: one bit per block, the first in the lowest bit; None where all weights live
    weight_scale: torch.Tensor      # float32 (out,)
    bias: torch.Tensor              # float32 (out,)
    input_scale: torch.Tensor       # float32 ()
    input_zero_point: torch.Tensor  # int32 ()
    bits: int                       # of the input

    @property
    def pattern(self):
        """'dense', 'unstructured', or a block such as '1x4'."""
        if self.mask_bits is None:
            return "dense"
        rows, columns = self.values.shape[1:]
        return "unstructured" if rows == columns == 1 else f"{rows}x{columns}"


def blocks(matrix, rows, columns):
    """(out, in) -> a view (out / R, in / C, R, C)."""
    return matrix.view(len(matrix) // rows, rows, -1, columns).transpose(1, 2)


def find_block(mask):
    """The largest block (R, C) that a mask bool (out, in) is made of, 1x1 = single weights; None if all live.

    A row (column) can start a block wherever it differs from the one before; the block's height (width) divides all
    those places. An N:M mask is one of single weights: its groups have no common fate.
    """
    if bool(mask.all()):
        return None
    if not bool(mask.any()):
        return 1, 1                 # every block would do; this one has a name that says nothing false
    rows = (mask[1:] != mask[:-1]).any(1).nonzero()[:, 0] + 1
    columns = (mask[:, 1:] != mask[:, :-1]).any(0).nonzero()[:, 0] + 1
    return math.gcd(len(mask), *rows.tolist()), math.gcd(mask.shape[1], *columns.tolist())


def pack(layer):
    """A Linear prepared for rounding -> PackedLinear. InputError without an activation range, or with a NaN or Inf."""
    if layer.fake_quant is None or layer.act_range[0] > layer.act_range[1]:
        raise InputError("it was not trained with fake quantization; run python train.py --stage quantize first")
    bits, scales = layer.fake_quant.keywords["bits"], layer.fake_quant.keywords["scales"]
    with torch.no_grad():
        mask = layer.mask.cpu()
        weight = layer.weight.detach().float().cpu() * mask
        act_range, bias = layer.act_range.float().cpu(), layer.bias.detach().float().cpu()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (weight, bias, act_range)):
            raise InputError("it holds a NaN or an Inf")
        values, weight_scale = quantize_weight(weight, scales)
        scale, zero_point = activation_parameters(act_range, bits)
        block, mask_bits = find_block(mask), None
        if block is not None:
            keep = blocks(mask, *block).amax((2, 3))
            values, mask_bits = blocks(values, *block)[keep], pack_bits(keep)
    return PackedLinear(tuple(weight.shape), values, mask_bits, weight_scale, bias, scale, zero_point, bits)


def pack_bits(mask):
    """bool tensor -> uint8 (ceil(numel / 8),), the first element in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack_bits(packed, shape):
    """The inverse of pack_bits, for a tensor on the CPU."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(shape)


def unpack_mask(packed):
    """bool (out / R, in / C), True on the blocks that live; None where all do."""
    if packed.mask_bits is None:
        return None
    rows, columns = packed.values.shape[1:]
    return unpack_bits(packed.mask_bits, (packed.shape[0] // rows, packed.shape[1] // columns))


def unpack(packed):
    """PackedLinear -> all its weights, int8 (out, in)."""
    keep = unpack_mask(packed)
    if keep is None:
        return packed.values
    dense = torch.zeros(packed.shape, dtype=torch.int8)
    blocks(dense, *packed.values.shape[1:])[keep] = packed.values
    return dense


def integer_linear(x_uint8, weight_int8, zero_point):
    """Exact int32 sums of (x - zero_point) * w: uint8 (..., in), int8 (out, in) -> int32 (..., out).

    In float64, where every sum below 2^53 is exact; an int32 cannot overflow up to MAX_INPUTS inputs.
    """
    return ((x_uint8.double() - int(zero_point)) @ weight_int8.double().T).to(torch.int32)


def integer_forward(x, packed):
    """The oracle of one quantized Linear: float32 (..., in) -> float32 (..., out)."""
    x_uint8 = quantize_activation(x, packed.input_scale, packed.input_zero_point, packed.bits)
    sums = integer_linear(x_uint8, unpack(packed), packed.input_zero_point)
    return sums * (packed.input_scale * packed.weight_scale) + packed.bias


def exact_in_float32(packed):
    """Can no sum of (q_x - z) q_w leave the integers that float32 holds exactly, whatever the input?"""
    zero_point = int(packed.input_zero_point)
    largest = max(zero_point, 2 ** packed.bits - 1 - zero_point)
    return largest * int(unpack(packed).int().abs().sum(1).max()) <= 2 ** 24


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings: int8 rows, as the packed file holds them

class Int8Embedding(nn.Module):
    """int64 ids (...) -> float32 (..., H): row `id` of values, int8 (rows, H), times its scale, float32 (rows,)."""

    def __init__(self, values, scale):
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def weight(self):
        """All rows, float32: what the positions and the tied decoder ask for."""
        return self.values * self.scale[:, None]

    def forward(self, ids):
        return self.values[ids] * self.scale[ids][..., None]


def embeddings(model):
    """[(name, nn.Embedding)]: words, positions and, in BERT, token types."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def round_embeddings(model):
    """Put every embedding's rows on the grid of int8.safetensors, in float32 and in place, and freeze them there: the
    rest of the network is then trained on what the file will hold."""
    with torch.no_grad():
        for _, module in embeddings(model):
            module.weight.copy_(Int8Embedding(*quantize_weight(module.weight)).weight)
            module.weight.requires_grad_(False)
