"""The packed sparse model, int8.safetensors. Beside config.json and the tokenizer it is all that inference needs.

Per Linear, under its HuggingFace name:
    values int8        (n, R, C) surviving blocks; or (out, in), all of them, without a mask
    mask_bits uint8    (ceil(blocks / 8),), or mask_gaps uint8 (bytes,) where that is shorter
    weight_scale float32 (out,)   bias float32 (out,)   input_scale float32 ()   input_zero_point int32 ()
Per embedding values int8 (rows, H) and weight_scale float32 (rows,), or weight float32 (rows, H); every other tensor
of the model in float32. Header metadata: format_version, activation_bits, weight_scales, embeddings (int8 or
float32), pattern (the kinds that occur) and what the writer adds.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from formats.files import names_in_short
from formats.model_directory import kind_of
from formats.names import published_name
from formats.safetensors import read_safetensors, write_safetensors
from formats.sentence import read_sentence
from model import InputError, build, linears
from quant import (MAX_INPUTS, Int8Embedding, PackedLinear, embeddings, pack, pack_bits, quantize_weight, unpack_bits,
                   unpack_mask)

FORMAT_VERSION = "2"        # of int8.safetensors


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
# Writing


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class SkipRandomWeights(torch.overrides.TorchFunctionMode):
    """Skips random initial weights: where there is no memory, torch would import 800 modules (a second) to fill it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.Tensor.normal_, nn.init.normal_):
            return function(*args, **(kwargs or {}))


def empty_model(config, kind, num_labels=2):
    """model.build on torch's 'meta' device, in evaluation mode: names, shapes and functions, and no memory."""
    with torch.device("meta"), SkipRandomWeights():
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
    check_header(config, tensors, metadata, path)
    bias = tensors.get("classifier.bias")
    classes = len(bias) if kind == "classification" and bias is not None and bias.dim() == 1 and len(bias) else 2
    model = empty_model(config, kind, classes)
    if kind == "encoder":
        model.sentence = read_sentence(directory)
        if not any("pooler" in name for name in tensors):
            model.encoder.pooler = None
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


def check_header(config, tensors, metadata, path):
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


def unpacked_bytes(model):
    """Bytes in memory of what read_int8 leaves in the model itself: embeddings, norms, biases."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta)
