"""Layers as the C++ reads them: tiles of activations, blocks of weights, and one product.

The forms, which four weights make a block, are drawn in vectors.h; those for tile registers in tiles.h.
"""
import ctypes

import numpy as np
import torch
import torch.nn.functional as F

import quant
from model import InputError

WORDS, STRIPES, SCATTERED, WHOLE_TILES, GATHERED_TILES = range(5)      # drawn in vectors.h and tiles.h
FORMS = ("words", "stripes", "scattered", "tiles", "gathered tiles")
COSTS = (1.0, 2.9, 1.4,                     # of a block, of four on one interleaving, of one on its own; by AVX-512
         1.0, 2.5)                          # of 64 inputs for 16 outputs, and of 64 gathered (1.9 to 3.4); by AMX
SIDE, STEP = 16, 64                         # outputs and inputs of a tile register
RANGE = 768                                 # inputs of a tile that are taken together: 48 KB with AVX-512, 24 with AVX2
POINTER, INTEGER, SMALL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class NativeError(InputError):
    """Why there is no engine native for this model on this machine."""


class Weights(ctypes.Structure):
    """struct Weights of products.h. `arrays` keeps alive what it points to; `nonzero`: weights of each output."""
    _fields_ = [("outputs", INTEGER), ("inputs", INTEGER), ("chunks", INTEGER), ("form", SMALL), ("portable", SMALL),
                *((name, POINTER) for name in ("starts", "columns", "blocks", "alive", "sums", "scales", "bias")),
                ("reciprocal", ctypes.c_float), ("zero_point", SMALL), ("highest", SMALL)]


def to_tiles(rows, tile, features=None):
    """float32 (tokens, F) -> (ceil(tokens / tile), F, tile), with zeros after the last token, and feature."""
    tokens, count = rows.shape
    padded = rows.new_zeros(-(-tokens // tile), tile, features or count)
    padded.view(-1, features or count)[:tokens, :count] = rows
    return padded.transpose(1, 2).contiguous()


def from_tiles(tiles, tokens):
    """The inverse: (tiles, F, tile) -> (tokens, F)."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:tokens]


def native_weights(library, layers, form=None):
    """PackedLinears that read the same input -> one Weights, their outputs one after another.

    form: of FORMS by number; the cheapest by COSTS if not given. NativeError if the layers round their input
    differently, or have more than 65,536 inputs.
    """
    layer = layers[0]
    if any((other.input_scale, other.input_zero_point) != (layer.input_scale, layer.input_zero_point)
           for other in layers):
        raise NativeError("engine native: query, key and value each round their common input in another way")
    if layer.shape[1] > 2 ** 16:
        raise NativeError(f"engine native takes layers of at most 65536 inputs, not {layer.shape[1]}")
    weight = torch.cat([quant.unpack(layer) for layer in layers])
    weight = F.pad(weight, (0, -weight.shape[1] % 4, 0, -weight.shape[0] % 4)).numpy()
    outputs, inputs = weight.shape
    if form is None:
        forms = (WHOLE_TILES, GATHERED_TILES) if library.tiles else (WORDS, STRIPES, SCATTERED)
        form = min(forms, key=lambda form: COSTS[form] * units(weight, form))
    scale = torch.cat([layer.input_scale * layer.weight_scale for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    arrays = [*(tile_arrays(weight, form) if form in (WHOLE_TILES, GATHERED_TILES) else
                block_arrays(weight, form, library.tokens_of_tile())), weight.sum(1, dtype=np.int32),
              *(F.pad(vector, (0, outputs - len(vector))).numpy() for vector in (scale, bias))]
    weights = Weights(outputs, inputs, -(-inputs // RANGE), form, library.portable,
                      *(array.ctypes.data for array in arrays), float(1.0 / layer.input_scale),
                      int(layer.input_zero_point), 2 ** layer.bits - 1)
    weights.arrays, weights.nonzero = arrays, np.count_nonzero(weight, axis=1)
    return weights


def units(weight, form):
    """How many of what COSTS prices an int8 (outputs, inputs) has in a form."""
    if form == WORDS:
        return np.count_nonzero(weight.view(np.int32))
    if form in (STRIPES, SCATTERED):
        rows = (weight.reshape(-1, 4 if form == STRIPES else 1, weight.shape[1]) != 0).any(1)
        return np.sum((rows.sum(1) + 3) // 4)
    living = living_groups(weight)[1]
    return living.size / SIDE if form == WHOLE_TILES else np.sum(-(-living.sum(1) // SIDE))


def block_arrays(weight, form, tile):
    """int8 (outputs, inputs) -> (starts, columns, blocks, nothing), int32, uint16, int32, as products.h has them. tile:
    its tokens. WORDS have no columns, and two numbers a block."""
    starts, columns, blocks, total = [], [], [], 0
    for begin in range(0, weight.shape[1], RANGE):
        part, unit = np.ascontiguousarray(weight[:, begin:begin + RANGE]), 1
        if form == WORDS:                       # (outputs, inputs / 4): four inputs
            part, unit = part.view(np.int32), 4
        elif form == STRIPES:                   # (outputs / 4, inputs): four outputs
            part = np.ascontiguousarray(part.reshape(len(part) // 4, 4, -1).transpose(0, 2, 1)).view(np.int32)[..., 0]
        place = np.flatnonzero(part != 0)
        row, column = np.divmod(place, part.shape[1])
        values = part.ravel()[place]
        counts = np.bincount(row, minlength=len(part))
        if form != WORDS:                       # every row is filled up to a multiple of four with zeros
            missing = -counts % 4
            place = np.arange(len(row)) + (np.cumsum(missing) - missing)[row]
            counts = counts + missing
            filled = np.zeros(counts.sum(), np.int64), np.zeros(counts.sum(), part.dtype)
            filled[0][place], filled[1][place] = column, values
            (column, values), counts = filled, counts // 4
            if form == STRIPES:                 # four inputs by four outputs -> four outputs by four inputs
                values = np.ascontiguousarray(values.view(np.int8).reshape(-1, 4, 4).transpose(0, 2, 1))
        starts.append(total + np.cumsum(counts) - counts)
        total, column, values = total + counts.sum(), column + begin // unit, values.view(np.int32).ravel()
        if form == WORDS:                       # the row of a word is 4 * tile bytes long
            values = np.stack([(4 * tile * column).astype(np.uint32).view(np.int32), values], axis=1).ravel()
        columns.append(column.astype(np.uint16) if form != WORDS else np.zeros(0, np.uint16))
        blocks.append(values)
    return (np.append(np.concatenate(starts), total).astype(np.int32), np.concatenate(columns), np.concatenate(blocks),
            np.zeros(0, np.uint64))


def tile_arrays(weight, form):
    """int8 (outputs, inputs) -> (starts, columns, survivors, alive), int32, uint16, int8, uint64, as products.h has
    them. Only GATHERED_TILES have columns."""
    groups, living = living_groups(weight)
    living |= form == WHOLE_TILES
    steps = -(-living.sum(1) // SIDE)
    registers = np.zeros((steps.sum(), SIDE, STEP // 4, 4), np.int8)
    columns, starts = np.zeros((steps.sum(), STEP // 4), np.uint16), np.append(0, np.cumsum(steps))
    for rows, live, begin, end in zip(groups, living, starts, starts[1:]):
        column = np.flatnonzero(live)
        columns[begin:end].reshape(-1)[:len(column)] = column       # what is left reads the first, and has no weight
        part = np.zeros((SIDE, (end - begin) * STEP // 4, 4), np.int8)
        part[:, :len(column)] = rows[:, column]
        registers[begin:end] = part.reshape(SIDE, end - begin, STEP // 4, 4).swapaxes(0, 1)
    registers = registers.reshape(-1, SIDE, STEP)
    survivors = np.append(0, np.cumsum(np.count_nonzero(registers, axis=(1, 2))))[starts]
    return (np.concatenate([starts, survivors]).astype(np.int32),
            columns.ravel() if form == GATHERED_TILES else np.zeros(0, np.uint16),
            np.append(registers[registers != 0], np.zeros(STEP, np.int8)),              # `expand` reads beyond its row
            np.packbits(registers != 0, axis=2, bitorder="little").view(np.uint64).ravel())


def living_groups(weight):
    """int8 (outputs, inputs) -> (itself (blocks of SIDE outputs, SIDE, inputs / 4, 4), filled up with zeros to whole
    registers; bool (blocks, inputs / 4): does any output of a block read these four?)"""
    outputs, inputs = weight.shape
    groups = np.pad(weight, ((0, -outputs % SIDE), (0, -inputs % STEP))).reshape(-(-outputs // SIDE), SIDE, -1, 4)
    return groups, groups.any((1, 3))


def native_linear(library, packed, form=None):
    """(function x -> y of one layer, float32 (..., in) -> (..., out); bytes of weights it holds)."""
    weights, (out, columns) = native_weights(library, [packed], form), packed.shape
    tile = library.tokens_of_tile()

    def product(x):
        rows = x.reshape(-1, columns)
        tiles = to_tiles(rows, tile, weights.inputs)
        levels = torch.empty_like(tiles, dtype=torch.uint8)
        y = tiles.new_empty(len(tiles), weights.outputs, tile)
        library.set_threads(torch.get_num_threads())
        library.quantize(len(rows), tiles.data_ptr(), levels.data_ptr(), ctypes.addressof(weights))
        library.linear(ctypes.addressof(weights), len(rows), levels.data_ptr(), y.data_ptr(), None, None)
        return from_tiles(y, len(rows))[:, :out].reshape(*x.shape[:-1], out)
    return product, sum(array.nbytes for array in weights.arrays)


def instructions(library):
    return "AMX" if library.tiles else "plain C++" if library.portable else library.instructions().decode()
