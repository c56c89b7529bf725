"""Rounding to 8 bits: fake in training, real at inference, side by side, and the packed sparse INT8 file.

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
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from model import (ARCHITECTURES, InputError, build, linears, names_in_short, pack_bits, published_name, read_config,
                   read_safetensors, unpack_bits, write_safetensors)

AVERAGING = 0.01            # share of a new batch in the running activation range
FORMAT_VERSION = "2"        # of int8.safetensors
MAX_INPUTS = 2 ** 31 // (255 * 128)     # of a layer: with more, a sum may not fit into an int32


def saturates():
    """True if this CPU's uint8 x int8 product may saturate: x86 without VNNI adds two products in 16 bits, and
    2 * 255 * 127 does not fit. Seven-bit activations (2 * 127 * 127) do. True as well where torch cannot tell."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False                # ARM's dot product accumulates in 32 bits
    try:
        capabilities = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):          # another torch: it cannot tell
        return True
    return not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def default_activation_bits():
    """7 on a CPU that saturates, else 8."""
    return 7 if saturates() else 8


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


def fake_quant(x, weight, layer, bits=8, scales="row"):
    """The slot `Linear.fake_quant`: x (..., in) and the masked weight (out, in) -> both rounded, in float32.

    In training mode layer.act_range follows the batch's minimum and maximum (exponential average, constant 0.01, the
    first batch sets it; padding tokens count, as in the reference). In evaluation it is only read.
    Raises InputError if a layer that never trained this way is evaluated.
    """
    x, weight = x.float(), weight.float()
    if layer.training:
        seen = torch.stack(torch.aminmax(x.detach()))
        if dist.is_initialized():                       # the batch is that of all processes
            dist.all_reduce(seen[0], dist.ReduceOp.MIN)
            dist.all_reduce(seen[1], dist.ReduceOp.MAX)
        layer.act_range.copy_(torch.where((layer.act_range == 0).all(), seen,
                                          layer.act_range + AVERAGING * (seen - layer.act_range)))
    elif not layer.act_range.any():
        raise InputError("a layer has no activation range yet; train at least one step with fake quantization "
                         "(python train.py --stage quantize) before evaluating")
    scale, zero_point = activation_parameters(layer.act_range, bits)
    weight_scale, low, high = weight_parameters(weight.detach(), scales)
    return (FakeQuantize.apply(x, scale, zero_point, 0, 2 ** bits - 1),
            FakeQuantize.apply(weight, weight_scale, 0, low, high))


def prepare(model, bits, scales="row"):
    """Set the fake_quant slot of every Linear: encoder, pooler and task head. bits: of the activations, 2 to 8."""
    if not 2 <= bits <= 8:
        raise InputError(f"activations take 2 to 8 bits, not {bits}")
    for _, layer in linears(model):
        layer.fake_quant = functools.partial(fake_quant, bits=bits, scales=scales)


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
    if layer.fake_quant is None or not layer.act_range.any():
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


# ---------------------------------------------------------------------------------------------------------------------
# A mask in the fewest bytes: its bits, or the distances between the blocks that live

def write_gaps(keep):
    """bool (n,) -> uint8 (bytes,): the width w, 2 to 8, whichever is shortest; then numbers of w bits, low bits first.

    A number below top = 2^w - 1 is so many dead blocks and then a living one; top is `top` dead blocks. An imagined
    living block n ends the list. With 90 % dead this takes half the bytes of a bit per block, and 8 % more than the
    least possible (the binary entropy); with w = 1 it would be the bit per block.
    """
    living = np.flatnonzero(np.append(keep.numpy(), True))
    dead = np.diff(living, prepend=-1) - 1                          # before every living block
    bits = {width: width * int((dead // (2 ** width - 1) + 1).sum()) for width in range(2, 9)}
    width = min(bits, key=bits.get)
    top = 2 ** width - 1
    numbers = np.full(bits[width] // width, top, dtype=np.uint8)
    numbers[np.cumsum(dead // top + 1) - 1] = dead % top
    unpacked = np.unpackbits(numbers[:, None], axis=1, count=width, bitorder="little").ravel()
    padding = np.ones(-len(unpacked) % 8, dtype=np.uint8)           # ones: where that makes a number, it is top
    packed = np.packbits(np.concatenate([unpacked, padding]), bitorder="little")
    return torch.from_numpy(np.insert(packed, 0, width))


def read_gaps(packed, count):
    """The inverse: uint8 (bytes,) -> bool (count,). None if it is no such list, or not one of exactly `count` blocks.

    It is measured before anything of size `count` is made, so that a false count costs no memory.
    """
    width = int(packed[0]) if len(packed) else 0
    if not 2 <= width <= 8:
        return None
    bits = np.unpackbits(packed[1:].numpy(), bitorder="little")
    bits = bits[:len(bits) // width * width].reshape(-1, width)
    numbers = np.zeros(len(bits), dtype=np.uint8)
    for place in range(width):
        numbers |= bits[:, place] << place
    living = numbers < 2 ** width - 1
    ends = np.cumsum(numbers + living, dtype=np.int64)[living]      # number of blocks up to each living one
    if not len(ends) or ends[-1] != count + 1:
        return None
    used = (len(living) - int(living[::-1].argmax())) * width       # bits, to the last living one: block `count`
    if (used + 7) // 8 != len(packed) - 1:
        return None
    keep = np.zeros(count, dtype=bool)
    keep[ends[:-1] - 1] = True
    return torch.from_numpy(keep)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings: int8 rows in the file

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


# ---------------------------------------------------------------------------------------------------------------------
# The packed file, int8.safetensors. Per Linear, under its HuggingFace name:
#     values int8        (n, R, C) surviving blocks; or (out, in), all of them, without a mask
#     mask_bits uint8    (ceil(blocks / 8),), or mask_gaps uint8 (bytes,) where that is shorter
#     weight_scale float32 (out,)   bias float32 (out,)   input_scale float32 ()   input_zero_point int32 ()
# Per embedding values int8 (rows, H) and weight_scale float32 (rows,), or weight float32 (rows, H); every other tensor
# of the model in float32. Header metadata: format_version, activation_bits, weight_scales, embeddings (int8 or
# float32), pattern (the kinds that occur) and what the writer adds. Beside config.json and the tokenizer it is all that
# inference needs.

def layer_tensors(layer, stem):
    """One Linear under `prepare` -> ({published name: tensor}, its pattern). stem: its name with the dot."""
    try:
        packed = pack(layer)
    except InputError as error:
        raise InputError(f"layer '{stem[:-1]}' cannot be written as INT8: {error}") from None
    tensors = {stem + leaf: getattr(packed, leaf)
               for leaf in ("values", "weight_scale", "bias", "input_scale", "input_zero_point")}
    if packed.mask_bits is not None:
        gaps = write_gaps(unpack_mask(packed).flatten())
        shorter = len(gaps) < len(packed.mask_bits)
        tensors[stem + ("mask_gaps" if shorter else "mask_bits")] = gaps if shorter else packed.mask_bits
    return tensors, packed.pattern


def write_int8(model, directory, metadata=None, embedding_rows="int8"):
    """Write directory/int8.safetensors from a model under `prepare`. metadata: more strings for the header.

    embedding_rows: 'int8', a quarter of the bytes, or 'float32'. InputError if a layer never trained, or for a NaN.
    """
    if embedding_rows not in ("int8", "float32"):
        raise InputError(f"embedding rows are 'int8' or 'float32', not {embedding_rows!r}")
    model_type, tensors, patterns = model.config.model_type, {}, set()
    layers, rounded = dict(linears(model)), dict(embeddings(model) if embedding_rows == "int8" else ())
    for name, layer in layers.items():
        found, pattern = layer_tensors(layer, published_name(model_type, name + "."))
        tensors.update(found)
        patterns.add(pattern)
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner not in layers and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"'{published_name(model_type, name)}' cannot be written as INT8: it holds a NaN or an "
                             f"Inf")
        if owner in rounded:
            stem = published_name(model_type, owner + ".")
            tensors[stem + "values"], tensors[stem + "weight_scale"] = quantize_weight(tensor.float().cpu())
        elif owner not in layers:
            tensors[published_name(model_type, name)] = tensor.float()
    write_safetensors(Path(directory) / "int8.safetensors", tensors, {
        "format_version": FORMAT_VERSION, "activation_bits": str(layer.fake_quant.keywords["bits"]),
        "weight_scales": layer.fake_quant.keywords["scales"], "embeddings": embedding_rows,
        "pattern": " ".join(sorted(patterns)), **(metadata or {})})


def kind_of(directory):
    """(kind, ModelConfig, the JSON object) of a model directory; kind as in model.build."""
    config, raw = read_config(directory)
    kinds = {architecture: kind for (_, kind), architecture in ARCHITECTURES.items()}
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(kinds):
        raise InputError(f"{Path(directory) / 'config.json'} says architectures {architectures!r}; expected one of "
                         f"{', '.join(kinds)}")
    return kinds[architectures[0]], config, raw


class NoFilling(torch.overrides.TorchFunctionMode):
    """Skips random initial weights: where there is no memory, torch would import 800 modules (a second) to fill it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.Tensor.normal_, nn.init.normal_):
            return function(*args, **(kwargs or {}))


def empty_model(config, kind, num_labels=2):
    """model.build on torch's 'meta' device, in evaluation mode: names, shapes and functions, and no memory."""
    with torch.device("meta"), NoFilling():
        return build(config, kind, num_labels).eval()


def read_int8(directory):
    """Open a packed model: (model, {name of Linear: PackedLinear}, metadata).

    The model's Linears stay on torch's 'meta' device, without weights: whoever runs it sets their `kernel`. Embeddings
    stay in int8, if the file has them so.
    Raises InputError naming the file and the tensor when anything is missing, surplus, of another shape or dtype, out
    of range, or when a mask does not count as many blocks as there are values.
    """
    kind, config, _ = kind_of(directory)
    path = Path(directory) / "int8.safetensors"
    tensors, metadata = read_safetensors(path)
    check_claims(config, tensors, metadata, path)
    bias = tensors.get("classifier.bias")
    classes = len(bias) if kind == "classification" and bias is not None and bias.dim() == 1 and len(bias) else 2
    model = empty_model(config, kind, classes)
    layers, packed = dict(linears(model)), {}
    for name, layer in layers.items():
        stem = published_name(config.model_type, name + ".")
        packed[name] = read_layer(tensors, stem, tuple(layer.weight.shape), int(metadata["activation_bits"]), path)
    for name, module in embeddings(model):
        stem = published_name(config.model_type, name + ".")
        if stem + "values" in tensors:
            model.set_submodule(name, read_embedding(tensors, stem, tuple(module.weight.shape), path))
    rest = {name: take(tensors, published_name(config.model_type, name), torch.float32, tensor.shape, path)
            for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    if tensors:
        raise InputError(f"{path} holds tensors that this model has no place for: {names_in_short(sorted(tensors))}")
    model.load_state_dict(rest, strict=False, assign=True)
    return model, packed, metadata


def check_claims(config, tensors, metadata, path):
    """InputError unless the header is of this format, and config.json asks for no more than a file of so many tensors
    can hold: building even an empty model takes time for every layer."""
    version, bits = metadata.get("format_version"), metadata.get("activation_bits")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} says format_version {version!r}, and this program reads {FORMAT_VERSION!r}; write it "
                         f"again with python train.py --stage quantize")
    if bits not in tuple("2345678"):
        raise InputError(f"{path} says activation_bits {bits!r}; expected 2 to 8")
    if config.num_hidden_layers > len(tensors):
        raise InputError(f"{path} holds {len(tensors)} tensors, too few for the {config.num_hidden_layers} layers of "
                         f"config.json")
    widest = max(config.hidden_size, config.intermediate_size)
    if widest > MAX_INPUTS:
        raise InputError(f"{path}: sums over {widest} inputs, as config.json has it, may overflow an int32; "
                         f"{MAX_INPUTS} are possible")


def take(tensors, name, dtype, shape, path):
    """Remove tensors[name] and return a copy, once its dtype and shape are as expected and its numbers finite.

    A copy lets go of the file's buffer, and starts at an aligned address, which some of torch's kernels need.
    """
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise InputError(f"{path} lacks '{name}'")
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
        raise InputError(f"{path}: '{name}' is {tensor.dtype} of shape {list(tensor.shape)}; expected {dtype} of shape "
                         f"{list(shape)}")
    if dtype == torch.float32 and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: '{name}' holds a NaN or an Inf")
    return tensor.clone()


def read_embedding(tensors, stem, shape, path):
    """Remove one embedding's tensors and return them, checked, as an Int8Embedding. shape: (rows, H)."""
    values = take(tensors, stem + "values", torch.int8, shape, path)
    scale = take(tensors, stem + "weight_scale", torch.float32, shape[:1], path)
    if not bool((scale > 0).all()):
        raise InputError(f"{path}: '{stem}weight_scale' has a scale that is not positive")
    return Int8Embedding(values, scale)


def read_mask(tensors, stem, count, path):
    """Remove a Linear's mask_bits or mask_gaps and return mask_bits, uint8 (ceil(count / 8),), and how many live."""
    gaps = tensors.get(stem + "mask_gaps")
    if gaps is not None:
        gaps = take(tensors, stem + "mask_gaps", torch.uint8, (gaps.numel(),), path)
        keep = read_gaps(gaps, count)
        if keep is None:
            raise InputError(f"{path}: '{stem}mask_gaps' is not a list of distances that ends after {count} blocks")
        return pack_bits(keep), int(keep.count_nonzero())
    mask_bits = take(tensors, stem + "mask_bits", torch.uint8, ((count + 7) // 8,), path)
    bits = unpack_bits(mask_bits, (len(mask_bits) * 8,))
    if bool(bits[count:].any()):
        raise InputError(f"{path}: '{stem}mask_bits' marks blocks beyond the last of {count}")
    return mask_bits, int(bits.count_nonzero())


def read_layer(tensors, stem, shape, bits, path):
    """Remove one Linear's tensors and return them, checked, as a PackedLinear. stem: its name with the dot."""
    out, columns = shape
    # The rows first: once their number is that of the file, `shape` is known to be no idle claim.
    weight_scale = take(tensors, stem + "weight_scale", torch.float32, (out,), path)
    bias = take(tensors, stem + "bias", torch.float32, (out,), path)
    found, mask_bits = tensors.get(stem + "values"), None
    if found is not None and found.dim() == 3:
        block = tuple(found.shape[1:])
        if min(block) < 1 or out % block[0] or columns % block[1]:
            raise InputError(f"{path}: '{stem}values' has blocks of {block[0]}x{block[1]}, which do not divide "
                             f"{out}x{columns}")
        count = math.prod(shape) // math.prod(block)
        mask_bits, alive = read_mask(tensors, stem, count, path)
        if alive != len(found):
            raise InputError(f"{path}: the mask of '{stem[:-1]}' marks {alive} of {count} blocks, and '{stem}values' "
                             f"holds {len(found)}")
        values = take(tensors, stem + "values", torch.int8, (alive, *block), path)
    else:
        values = take(tensors, stem + "values", torch.int8, shape, path)
    scale = take(tensors, stem + "input_scale", torch.float32, (), path)
    zero_point = take(tensors, stem + "input_zero_point", torch.int32, (), path)
    if not bool((weight_scale > 0).all()) or not bool(scale > 0) or not 0 <= int(zero_point) < 2 ** bits:
        raise InputError(f"{path}: '{stem[:-1]}' has a scale that is not positive, or a zero point, "
                         f"{int(zero_point)}, that is not in 0 to {2 ** bits - 1}")
    return PackedLinear(shape, values, mask_bits, weight_scale, bias, scale, zero_point, bits)
