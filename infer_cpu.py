"""The payoff: run a sparse INT8 model on a CPU, and measure what it gains.

    python infer_cpu.py MODEL_DIR --text "a warm and funny film"                      label and probability
    python infer_cpu.py MODEL_DIR --text "Who wrote it?" --context "Ada wrote it."    answer and score (SQuAD models)
    python infer_cpu.py MODEL_DIR --evaluate --agreement                              the task's metrics, on its dev set
    python infer_cpu.py MODEL_DIR --evaluate --predictions FOLDER                     and files for the official scripts
    python infer_cpu.py MODEL_DIR --benchmark --batch-size 1,16                       every engine side by side
    python infer_cpu.py --benchmark --random bert-base --sparsity 0.8 --pattern 1x4   the same without training
    python infer_cpu.py MODEL_DIR --size                                              bytes, counted four ways
    python infer_cpu.py --size --random bert-large --sparsity 0.9                     the same without training

Every engine is the network of model.py with functions set into its slots: `Linear.kernel`, or for native
`Encoder.kernel`. Attention, layer norms, softmax and GELU are float32 for all.

    fp32     dense float32 weights, zeros included
    int8     dense int8 weights, uint8 activations on the trained scale and zero point, exact int32 sums, float32 output
    sparse   only the weights that live, in integers too: the same numbers as int8
    native   the same numbers again by infer_cpu.cpp, which a C++ compiler makes for this CPU on first use; padding is
             not computed
    auto     the fastest of int8, sparse and (where there is a compiler) native for this model on this machine; fp32 for
             a model that is not quantized

From Python:

    engine = load("out/tiny/sst2/int8-1x4-0.8")
    engine.answer(["a warm and funny film", "dull"])                [(label, probability), ...]; or (span, score) with
                                                                    contexts=[...], one per question
    engine(dict(input_ids=..., attention_mask=..., token_type_ids=...))         logits
"""
import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as network
import quant
from data import DataError, tiny
from data.metrics import best_span
from data.tasks import TASKS, TaskData
from data.text import load_tokenizer
from model import InputError, linears

# torch says so once per process; both are what we rely on, in the version that requirements.txt pins.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*are deprecated")

ENGINES = ("fp32", "int8", "sparse", "native")
TILE = 32               # tokens per CSR product: a tile of 3072 inputs (384 KB) stays in the second-level cache
HOME = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Each takes a quant.PackedLinear and returns (function x -> y, bytes of weights it holds):
#     x float32 (..., in),  y float32 (..., out) = s_x s_w[row] * sum_k (q_x[k] - z) q_w[row, k] + bias[row]
# with the sum exact in integers, as in quant.integer_forward. They raise RuntimeError where torch has no such operator.

def onednn(packed):
    """Dense, oneDNN: int8 weights in its own layout. Uses VNNI and AMX where there are any."""
    out, columns = packed.shape
    weight = torch.ops.onednn.qlinear_prepack(quant.unpack(packed), None)
    scale, zero_point = float(packed.input_scale), int(packed.input_zero_point)
    weight_zero_points = torch.zeros(out, dtype=torch.int64)

    def product(x):
        q = quant.quantize_activation(x.reshape(-1, columns), packed.input_scale, zero_point, packed.bits)
        y = torch.ops.onednn.qlinear_pointwise(q, scale, zero_point, weight, packed.weight_scale, weight_zero_points,
                                               packed.bias, 1.0, 0, torch.float32, "none", [], "")
        return y.view(*x.shape[:-1], out)
    return product, out * columns + 8 * out


def fbgemm(packed):
    """Dense, FBGEMM: int8 weights in its own layout. The fast one on x86 with AVX2 but without VNNI."""
    out, columns = packed.shape
    scale = (packed.input_scale * packed.weight_scale).double()
    with quantized_engine("fbgemm"):
        weight = torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(
            quant.unpack(packed), scale, torch.zeros(out, dtype=torch.int64), 0), packed.bias)

    def product(x):
        # The operator rounds its input itself. Given the integers q - z and a step of 1, its rounding changes nothing.
        centred, zero_point = centred_levels(x, packed)
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(centred, 1.0, zero_point, weight)
    return product, out * columns + 8 * out


def csr(packed):
    """Sparse, any pattern: compressed rows in float32, times the activations transposed, a tile of tokens at a time.

    Every integer up to 2^24 is exact in float32, so the sums are too: see `exact_in_float32`.
    """
    out, columns = packed.shape
    weight = quant.unpack(packed).to_sparse_csr()
    weight = torch.sparse_csr_tensor(weight.crow_indices().int(), weight.col_indices().int(), weight.values().float(),
                                     size=(out, columns), check_invariants=True)
    scale = packed.input_scale * packed.weight_scale

    def product(x):
        centred = centred_levels(x, packed)[0].view(-1, columns)
        y = torch.empty(len(centred), out)
        for tokens, result in zip(centred.split(TILE), y.split(TILE)):
            result.copy_((weight @ tokens.t().contiguous()).t())        # (out, tile) -> (tile, out)
        return y.mul_(scale).add_(packed.bias).view(*x.shape[:-1], out)
    return product, 8 * weight.values().numel() + 4 * (out + 1) + 8 * out


def qnnpack(packed):
    """Sparse 1x4 blocks: torch.ops.sparse, the operator under torch.ao.nn.sparse.quantized.dynamic.Linear.

    It is dynamic: it takes scale and zero point from the smallest and largest input. The inputs are the integers q - z,
    and one more row holds the two ends -z and 255 - z, so that what it finds is scale 1 and zero point z, exactly.
    (The static operator, FBGEMM's torch.ops.sparse.qlinear, only returns 8-bit outputs.)
    """
    out, columns = packed.shape
    if packed.mask_bits is None or packed.values.shape[2] % 4:
        raise RuntimeError("it takes 1x4 blocks only, and what is made of them, such as 4x4")
    scale = (packed.input_scale * packed.weight_scale).double()
    bias = packed.bias.clone()          # the operator crashes on a bias that does not start at a multiple of 16 bytes
    with quantized_engine("qnnpack"):
        weight = torch.ops.sparse.qlinear_prepack(torch._make_per_channel_quantized_tensor(
            quant.unpack(packed), scale, torch.zeros(out, dtype=torch.int64), 0), bias, 1, 4)

    def product(x):
        centred, zero_point = centred_levels(x, packed)
        rows = F.pad(centred.view(-1, columns), (0, 0, 0, 1))
        rows[-1, 0], rows[-1, 1] = -zero_point, 255 - zero_point
        with quantized_engine("qnnpack"):
            y = torch.ops.sparse.qlinear_dynamic(rows, weight)
        return y[:-1].view(*x.shape[:-1], out)
    return product, 2 * packed.values.numel() + 4 * (out + 1) + 8 * out


DENSE_KERNELS = {"oneDNN": onednn, "FBGEMM": fbgemm}
SPARSE_KERNELS = {"CSR": csr, "1x4 blocks": qnnpack}


def centred_levels(x, packed):
    """float32 (..., in) -> (its integers q - zero_point, still float32 (..., in), contiguous; zero_point)."""
    zero_point = int(packed.input_zero_point)
    q = quant.levels(x, packed.input_scale, 0)
    return q.clamp_(-zero_point, 2 ** packed.bits - 1 - zero_point).contiguous(), zero_point


def exact_in_float32(packed):
    """Can no sum of (q_x - z) q_w leave the integers that float32 holds exactly, whatever the input?"""
    zero_point = int(packed.input_zero_point)
    largest = max(zero_point, 2 ** packed.bits - 1 - zero_point)
    return largest * int(quant.unpack(packed).int().abs().sum(1).max()) <= 2 ** 24


class quantized_engine:
    """`with quantized_engine("qnnpack"):` torch's old quantized operators look at one global setting."""
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.name         # RuntimeError where torch was built without it

    def __exit__(self, *_):
        torch.backends.quantized.engine = self.before


def is_exact(kernel, packed):
    """Does the kernel give the oracle's integers, on random and extreme levels? Scales 1 and bias 0 leave only those.

    On a CPU whose products saturate only 7-bit inputs are tried: more is known to fail there, and warned about.
    """
    probe = replace(packed, weight_scale=torch.ones(packed.shape[0]), bias=torch.zeros(packed.shape[0]),
                    input_scale=torch.tensor(1.0))
    highest = 2 ** min(packed.bits, quant.default_activation_bits()) - 1
    levels = torch.randint(0, highest + 1, (33, packed.shape[1]), generator=torch.Generator().manual_seed(0))
    levels[0], levels[1] = highest, 0
    x = (levels - packed.input_zero_point).float()
    return torch.equal(kernel(probe)[0](x), quant.integer_forward(x, probe))


def fastest(kernels, packed):
    """Try every kernel of a dict on one layer, 128 tokens -> (the fastest one that is exact, a note with the times)."""
    x, times, refused = torch.randn(128, packed.shape[1]), {}, []
    for name, kernel in kernels.items():
        try:
            if not is_exact(kernel, packed):
                refused.append(f"{name} is not exact")
                continue
            product, _ = kernel(packed)
            times[name] = min(seconds(partial(product, x)) for _ in range(7))
        except RuntimeError as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
    if not times:
        raise InputError(f"torch has no exact INT8 product for this machine: {'; '.join(refused)}")
    best = min(times, key=times.get)
    others = [f"{name} {1e3 * value:.2f}" for name, value in times.items()]
    return kernels[best], f"{best} ({', '.join(others)} ms for {packed.shape[1]} -> {packed.shape[0]}, 128 tokens)"


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# ---------------------------------------------------------------------------------------------------------------------
# Engine native: infer_cpu.cpp, compiled and called through ctypes

WORDS, STRIPES, SCATTERED = range(3)        # which four weights make a block; drawn in infer_cpu.cpp
FORMS = ("words", "stripes", "scattered")
COSTS = (1.0, 2.9, 1.4)                     # of a block, of four on one interleaving, of one on its own; by AVX-512
RANGE = 768                                 # inputs of a tile that are taken together: 48 KB with AVX-512, 24 with AVX2
POINTER, INTEGER, SMALL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SIGNATURES = {
    "linear": [POINTER, INTEGER, POINTER, POINTER, POINTER, POINTER],
    "quantize": [INTEGER, POINTER, POINTER, POINTER],
    "layer_norm": [INTEGER, INTEGER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER],
    "attention": [POINTER, INTEGER, POINTER, INTEGER, POINTER, INTEGER, INTEGER, SMALL, POINTER, POINTER],
    "encode": [POINTER, INTEGER, POINTER, POINTER, SMALL, POINTER, POINTER],
    "set_threads": [SMALL],
}
# The parts of `encode` that are timed, in the order of enum Part in infer_cpu.cpp; the first, and the third to fifth,
# are the products of a layer.
PARTS = ("query, key, value", "attention", "attention output", "intermediate", "output", "embeddings", "quantize",
         "layer norm")


def compiler():
    """The C++ compiler's command, a list: $CXX, else the first of c++, g++ and clang++. NativeError without one."""
    try:
        command = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++"))
    except ValueError as error:
        raise NativeError(f"engine native: CXX={os.environ['CXX']} is no command: {error}") from None
    if not command or not shutil.which(command[0]):
        raise NativeError(f"engine native needs a C++ compiler, and there is no {' '.join(command)}; install one "
                          f"(Debian: apt install g++) or name one in CXX")
    return command


def compile_native(path, options):
    """Compile infer_cpu.cpp to the shared library `path`, whole or not at all. NativeError if that fails."""
    command = [*compiler(), "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *options, str(HOME / "infer_cpu.cpp")]
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:       # nobody else writes there
            partly = Path(folder) / path.name
            subprocess.run([*command, "-o", str(partly)], check=True, capture_output=True, text=True, timeout=600)
            os.replace(partly, path)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        lines = (said or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise NativeError(f"engine native: {compiler()[0]} cannot compile infer_cpu.cpp: {reason}") from None


def open_native(path):
    """A compiled infer_cpu.cpp -> the ctypes library. NativeError if it cannot be loaded or brings its own threads."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"engine native: {path} cannot be loaded ({error}); delete it") from None
    with contextlib.suppress(OSError, AttributeError, StopIteration):           # a torch without OpenMP has no threads
        torchs = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        pools = {ctypes.cast(each.omp_get_max_threads, POINTER).value for each in (library, torchs)}
        if len(pools) > 1:
            raise NativeError("engine native would run threads beside torch's own, from another OpenMP library; name a "
                              "compiler in CXX that uses torch's: g++ on Linux")
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = types, None
    library.instructions.restype = ctypes.c_char_p
    library.portable = 0                                            # 1: use the plain C++ in it
    return library


def processor():
    """What the compiler's `native` stands for on this machine, as far as Linux tells it."""
    with contextlib.suppress(OSError):
        return sorted({line for line in open("/proc/cpuinfo")
                       if line.startswith(("model name", "flags", "Features", "CPU implementer", "CPU part"))})
    return [network.processor_name()]


def native_library(bits, say):
    """The library for this CPU and activations of so many bits, from the cache or compiled now, and checked.

    The cache is prune-once-for-all in $XDG_CACHE_HOME or ~/.cache; a file's name is the hash of all it was made from.
    Raises NativeError, one sentence, where the engine cannot be had; `say` is told what is not as it should be.
    """
    options = ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
               f"-DACTIVATION_BITS={bits}"]
    try:
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"engine native: the compiler {compiler()[0]} does not run: {error}") from None
    recipe = repr(((HOME / "infer_cpu.cpp").read_text(), compiler(), version, options, processor()))
    name = f"infer_cpu-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "prune-once-for-all"
    with tempfile.TemporaryDirectory(prefix="infer_cpu-") as temporary:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).is_file():
                tempfile.TemporaryFile(dir=folder).close()          # may we write there?
        except OSError as error:
            say(f"engine native is compiled anew each time, for its cache {folder} cannot be used: {error.strerror}")
            folder = Path(temporary)
        if not (folder / name).is_file():
            compile_native(folder / name, options)
        library = open_native(folder / name)
    check_sums(library, bits, say)
    check_floats(library)
    return library


def check_sums(library, bits, say):
    """The products in all three forms, on random and extreme levels, against the oracle. Where the instructions for
    this CPU are wrong, plain C++ takes their place, and `say` is told; NativeError if that is wrong too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (104, 900), generator=generator, dtype=torch.int8)
    weight *= torch.rand(weight.shape, generator=generator) > 0.6
    layer = quant.PackedLinear((104, 900), weight, None, torch.ones(104), torch.zeros(104), torch.tensor(1.0),
                               torch.tensor(2 ** bits // 3, dtype=torch.int32), bits)
    levels = torch.randint(0, 2 ** bits, (2 * library.tokens_of_tile() + 5, 900), generator=generator)
    levels[0], levels[1] = 2 ** bits - 1, 0
    x = (levels - layer.input_zero_point).float()
    expected = quant.integer_forward(x, layer)
    for library.portable in (0, 1):
        wrong = [FORMS[form] for form in (WORDS, STRIPES, SCATTERED)
                 if not torch.equal(native_linear(library, layer, form)[0](x), expected)]
        if not wrong:
            return
        say(f"engine native: {instructions(library)} gives wrong sums here ({', '.join(wrong)}) and is not used")
    raise NativeError("engine native gives wrong sums on this machine; use another engine")


def check_floats(library):
    """Attention of two sequences, and the layer norm, against torch. NativeError if they differ."""
    heads, size, tile = 2, 12, library.tokens_of_tile()
    lengths, width, generator = [tile + 3, 5], heads * size, torch.Generator().manual_seed(0)
    tokens, starts = sum(lengths), torch.tensor([0, lengths[0], sum(lengths)])
    weight = torch.randint(-9, 10, (3 * width, width), generator=generator, dtype=torch.int8)
    layer = quant.PackedLinear((3 * width, width), weight, None, torch.full((3 * width,), 0.01), torch.zeros(3 * width),
                               torch.tensor(1.0), torch.tensor(50, dtype=torch.int32), 7)
    x = torch.randint(-50, 78, (tokens, width), generator=generator).float()
    weights, tiles = native_weights(library, [layer]), to_tiles(x, tile)
    q, context, normed = torch.empty(tiles.shape, dtype=torch.uint8), torch.empty_like(tiles), torch.empty_like(tiles)
    library.quantize(tokens, tiles.data_ptr(), q.data_ptr(), ctypes.addressof(weights))
    library.attention(ctypes.addressof(weights), tokens, q.data_ptr(), 2, starts.data_ptr(), heads, size, 0,
                      context.data_ptr(), (ctypes.c_double * 2)())
    rows = quant.integer_forward(x, layer)
    expected = torch.cat([F.scaled_dot_product_attention(*part.view(-1, 3, heads, size).permute(1, 2, 0, 3))
                          .transpose(0, 1).reshape(-1, width) for part in rows.split(lengths)])
    gain, bias = torch.rand(2, width, generator=generator)
    norm = Norm(gain, bias, 1e-12)
    library.layer_norm(tokens, width, context.data_ptr(), None, ctypes.addressof(norm), normed.data_ptr(), None, None)
    for name, found, right in (("attention", context, expected), (
            "layer norms", normed, F.layer_norm(from_tiles(context, tokens), (width,), gain, bias, 1e-12))):
        if not torch.allclose(from_tiles(found, tokens), right, atol=1e-4 * float(right.abs().max())):
            raise NativeError(f"engine native computes wrong {name} on this machine; use another engine")


def instructions(library):
    return "plain C++" if library.portable else library.instructions().decode()


def to_tiles(rows, tile, features=None):
    """float32 (tokens, F) -> (ceil(tokens / tile), F, tile), with zeros after the last token, and feature."""
    tokens, count = rows.shape
    padded = torch.zeros(-(-tokens // tile), tile, features or count)
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
    alive = weight != 0
    blocks = [np.count_nonzero(weight.view(np.int32)), (alive.reshape(-1, 4, inputs).any(1).sum(1) + 3) // 4,
              (alive.sum(1) + 3) // 4]
    if form is None:
        form = min(range(3), key=lambda form: COSTS[form] * np.sum(blocks[form]))
    scale = torch.cat([layer.input_scale * layer.weight_scale for layer in layers])
    arrays = [*block_arrays(weight, form, library.tokens_of_tile()), weight.sum(1, dtype=np.int32),
              *(F.pad(vector, (0, outputs - len(vector))).numpy() for vector in
                (scale, torch.cat([layer.bias for layer in layers])))]
    weights = Weights(outputs, inputs, -(-inputs // RANGE), form, library.portable,
                      *(array.ctypes.data for array in arrays), float(1.0 / layer.input_scale),
                      int(layer.input_zero_point), 2 ** layer.bits - 1)
    weights.arrays, weights.nonzero = arrays, alive.sum(1)
    return weights


def block_arrays(weight, form, tile):
    """int8 (outputs, inputs) -> (starts, columns, blocks), int32, uint16, int32, as infer_cpu.cpp has them. tile: its
    tokens. WORDS have no columns, and two numbers a block."""
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
    return np.append(np.concatenate(starts), total).astype(np.int32), np.concatenate(columns), np.concatenate(blocks)


def native_linear(library, packed, form=None):
    """A kernel like those above, by infer_cpu.cpp."""
    weights, (out, columns) = native_weights(library, [packed], form), packed.shape
    tile = library.tokens_of_tile()

    def product(x):
        rows = x.reshape(-1, columns)
        tiles = to_tiles(rows, tile, weights.inputs)
        levels = torch.empty(tiles.shape, dtype=torch.uint8)
        y = torch.empty(len(tiles), weights.outputs, tile)
        library.set_threads(torch.get_num_threads())
        library.quantize(len(rows), tiles.data_ptr(), levels.data_ptr(), ctypes.addressof(weights))
        library.linear(ctypes.addressof(weights), len(rows), levels.data_ptr(), y.data_ptr(), None, None)
        return from_tiles(y, len(rows))[:, :out].reshape(*x.shape[:-1], out)
    return product, sum(array.nbytes for array in weights.arrays)


class NativeError(InputError):
    """Why there is no engine native for this model on this machine."""


class Weights(ctypes.Structure):
    """struct Weights of infer_cpu.cpp. `arrays` keeps alive what it points to; `nonzero`: weights of each output."""
    _fields_ = [("outputs", INTEGER), ("inputs", INTEGER), ("chunks", INTEGER), ("form", SMALL), ("portable", SMALL),
                *((name, POINTER) for name in ("starts", "columns", "blocks", "sums", "scales", "bias")),
                ("reciprocal", ctypes.c_float), ("zero_point", SMALL), ("highest", SMALL)]


class Table(ctypes.Structure):
    """struct Table of infer_cpu.cpp: an embedding, float32 or int8. It keeps alive what it points to."""
    _fields_ = [("values", POINTER), ("scales", POINTER), ("plain", POINTER)]

    def __init__(self, module):
        if isinstance(module, quant.Int8Embedding):
            super().__init__(module.values.data_ptr(), module.scale.data_ptr(), None)
        else:
            super().__init__(None, None, module.weight.data_ptr())
        self.module = module


class Norm(ctypes.Structure):
    """struct Norm of infer_cpu.cpp."""
    _fields_ = [("gain", POINTER), ("bias", POINTER), ("epsilon", ctypes.c_float)]

    def __init__(self, gain, bias, epsilon):
        super().__init__(gain.data_ptr(), bias.data_ptr(), epsilon)
        self.tensors = gain, bias


class Layer(ctypes.Structure):
    """struct Layer of infer_cpu.cpp."""
    _fields_ = [*((name, POINTER) for name in ("query_key_value", "attention_output", "intermediate", "output")),
                ("attention_norm", Norm), ("output_norm", Norm)]


class EncoderStructure(ctypes.Structure):
    """struct Encoder of infer_cpu.cpp."""
    _fields_ = [*((name, INTEGER) for name in ("hidden", "heads", "tables", "layers")), ("table", POINTER),
                ("norm", Norm), ("layer", POINTER), ("first_only", SMALL)]


class NativeEncoder:
    """Embeddings and layers by infer_cpu.cpp: the slot `Encoder.kernel`. Several threads may call it at once.

    Called with int64 (B, T) input_ids, attention_mask and token_type_ids it returns hidden states (B, T, H), zeros at
    padding, which is never computed. A classifier reads only the first token of a row: for one they are (B, 1, H), and
    the last layer is computed for those tokens alone. InputError for an id that an embedding does not have.
    """

    def __init__(self, library, model, packed):
        config, encoder = model.config, model.encoder
        if (config.hidden_size % (4 * config.num_attention_heads) or config.intermediate_size % 4
                or not config.num_hidden_layers):
            raise NativeError("engine native takes layers whose heads and inner sizes are multiples of four")
        self.library, self.config = library, config
        self.first_token_only = model.kind == "classification"
        self.tables = [Table(table) for table in (encoder.word, encoder.position, encoder.token_type)
                       if table is not None]
        self.rows = [len(table.module.values if table.values else table.module.weight) for table in self.tables]
        self.weights, self.norms, layers = [], [], []
        for number, layer in enumerate(encoder.layers):
            groups = [[packed.pop(f"encoder.layers.{number}.{name}") for name in names] for names in
                      (("query", "key", "value"), ("attention_output",), ("intermediate",), ("output",))]
            self.weights.append([native_weights(library, group) for group in groups])
            self.norms.append([Norm(module.weight, module.bias, module.eps) for module in
                               (layer.attention_norm, layer.output_norm)])
            layers.append(Layer(*map(ctypes.addressof, self.weights[-1]), *self.norms[-1]))
        self.arrays = (Table * len(self.tables))(*self.tables), (Layer * len(layers))(*layers)
        self.norm = Norm(encoder.norm.weight, encoder.norm.bias, encoder.norm.eps)

    def __call__(self, input_ids, attention_mask, token_type_ids, times=None):
        """times: a dict to which the seconds of each of PARTS are added."""
        real = attention_mask.bool()
        if not real.shape[1]:
            raise InputError("a batch whose rows have no tokens")
        if self.first_token_only and not bool(real[:, 0].all()):
            raise InputError("a row of the batch begins with padding, and the classifier reads its first token")
        ids = torch.stack([input_ids[real], real.nonzero()[:, 1], token_type_ids[real]][:len(self.tables)])
        for count, column in zip(self.rows, ids):
            if column.numel() and not 0 <= int(column.min()) <= int(column.max()) < count:
                raise InputError(f"the ids of a batch, {int(column.min())} to {int(column.max())}, are not all in an "
                                 f"embedding of {count} rows")
        starts, (table, layer) = F.pad(real.sum(1).cumsum(0), (1, 0)), self.arrays
        encoder = EncoderStructure(self.config.hidden_size, self.config.num_attention_heads, len(table), len(layer),
                                   ctypes.addressof(table), self.norm, ctypes.addressof(layer), self.first_token_only)
        hidden = torch.empty(len(real) if self.first_token_only else ids.shape[1], self.config.hidden_size)
        seconds = (ctypes.c_double * len(PARTS))()
        self.library.encode(ctypes.addressof(encoder), len(real), starts.data_ptr(), ids.data_ptr(),
                            torch.get_num_threads(), hidden.data_ptr(), seconds)
        if times is not None:
            times.update({part: times.get(part, 0.0) + value for part, value in zip(PARTS, seconds)})
        if self.first_token_only:
            return hidden[:, None]
        padded = torch.zeros(*real.shape, hidden.shape[1])
        padded[real] = hidden
        return padded


# ---------------------------------------------------------------------------------------------------------------------
# Engines

@dataclass
class Engine:
    """A model ready to run: call it with a batch, or let it answer texts."""
    directory: Path
    name: str                   # one of ENGINES
    model: torch.nn.Module
    layout: str                 # how it holds and multiplies its weights
    memory_bytes: int           # all weights as it holds them
    disk_bytes: int             # the file they came from

    def __call__(self, batch):
        """Int64 (B, T) input_ids, attention_mask and token_type_ids -> float32 logits (B, C), or the pair of start and
        end logits, each (B, T)."""
        with torch.inference_mode():
            return self.model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])

    def answer(self, texts, pairs=(), contexts=(), max_len=None):
        """[(label, probability)] of texts, or of pairs of texts; [(span, score)] of questions and their contexts, the
        score being the sum of start and end logit.

        texts, pairs, contexts: lists of str, the second or third one as long as the first or empty. max_len: tokens of
        a row, as trained by default. Raises InputError for a length the model does not have, or no tokenizer.
        """
        encoder = encoder_for(self.directory, self.model.kind, max_len)
        results = []
        if self.model.kind == "span":
            for question, context in zip(texts, contexts, strict=True):
                rows = encoder.encode_question(question, context)
                start, end = self(encoder.collate(rows))
                text, _, _, score = best_span(rows, list(start.numpy()), list(end.numpy()))
                results.append((text, score))
            return results
        rows = encoder.encode(list(texts), list(pairs) or None)
        for begin in range(0, len(rows), 32):
            probabilities = self(encoder.collate(rows[begin:begin + 32])).softmax(1)
            names = label_names(self.directory, probabilities.shape[1])
            results += [(names[int(row.argmax())], float(row.max())) for row in probabilities]
        return results


def load(directory, engine="auto", threads=None, say=print):
    """Open a model directory with an engine of ENGINES or 'auto'; `say` is told what auto chose, and of trouble.

    Raises InputError: no such directory, a damaged file, an engine that this model or machine does not have.
    """
    if threads:
        torch.set_num_threads(threads)
    directory = Path(directory)
    quant.kind_of(directory)                    # is it a model directory at all?
    if engine == "fp32":
        return load_fp32(directory)
    if (directory / "int8.safetensors").is_file():
        if engine == "native":
            model, packed, metadata = quant.read_int8(directory)
            return native_engine(directory, model, packed, native_library(int(metadata["activation_bits"]), say))
        return load_auto(directory, say) if engine == "auto" else load_integer(directory, engine, say)
    if engine == "auto":
        say(f"engine fp32: {directory} is not quantized (it has no int8.safetensors)")
        return load_fp32(directory)
    raise InputError(f"engine {engine} needs a quantized model, and {directory} has no int8.safetensors; run python "
                     f"train.py --stage quantize --task TASK --init {directory} first, or use --engine fp32")


def load_fp32(directory):
    """Engine fp32: the plain weights, masked once."""
    network.keep_freed_memory()
    kind, *_ = quant.kind_of(directory)
    model = network.load(directory, kind).eval().requires_grad_(False)
    for _, layer in linears(model):
        layer.weight *= layer.mask
        layer.mask = None                       # not read any more
        layer.kernel = partial(F.linear, weight=layer.weight, bias=layer.bias)
    size = sum(parameter.nbytes for parameter in model.parameters())
    path = next(path for name in network.WEIGHT_FILES if (path := directory / name).is_file())
    disk = sum(file.stat().st_size for file in weight_files(path))
    return Engine(directory, "fp32", model, "dense float32", size, disk)


def weight_files(path):
    """One of network.WEIGHT_FILES -> [it], or an index and all the files that it lists."""
    listed = network.read_json(path)["weight_map"].values() if path.suffix == ".json" else ()
    return [path, *(path.with_name(name) for name in sorted(set(listed)))]


def load_integer(directory, name, say=print):
    """Engine int8 or sparse, from int8.safetensors. Kernels are chosen by timing the largest layer of each pattern."""
    network.keep_freed_memory()
    model, packed, metadata = quant.read_int8(directory)
    if metadata["activation_bits"] == "8" and quant.saturates():
        say("warning: this CPU has no VNNI, and 8-bit activations may saturate its INT8 product; quantize with "
            "--activation-bits 7 for exact results here")
    if name == "sparse" and all(layer.pattern == "dense" for layer in packed.values()):
        raise InputError(f"engine sparse needs pruned layers, and {directory} has none; use --engine int8")
    kinds = {layer_name: layer.pattern if name == "sparse" and exact_in_float32(layer) else "dense"
             for layer_name, layer in packed.items()}
    chosen, notes = {}, []
    for kind in sorted(set(kinds.values()), key=lambda kind: kind == "dense"):
        largest = max((packed[key] for key in kinds if kinds[key] == kind), key=lambda layer: math.prod(layer.shape))
        chosen[kind], note = fastest(DENSE_KERNELS if kind == "dense" else SPARSE_KERNELS, largest)
        notes.append(f"{list(kinds.values()).count(kind)} {kind} layers by {note}")
    tensors = [*model.parameters(), *model.buffers()]           # buffers: int8 embeddings
    size = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    for layer_name, layer in linears(model):
        layer.kernel, layer_bytes = chosen[kinds[layer_name]](packed[layer_name])
        size += layer_bytes
    return Engine(directory, name, model, "; ".join(notes), size, (directory / "int8.safetensors").stat().st_size)


def native_engine(directory, model, packed, library):
    """Engine native of what quant.read_int8 returns. InputError if the model has sizes that it does not take."""
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    model.encoder.kernel = encoder = NativeEncoder(library, model, packed)
    for name, layer in linears(model):
        if name in packed:                          # the heads: the encoder has taken its own
            layer.kernel, layer_bytes = native_linear(library, packed[name])
            size += layer_bytes
    weights = [each for layer in encoder.weights for each in layer]
    counts = ((sum(each.form == form for each in weights), FORMS[form]) for form in range(3))
    layout = ", ".join(f"{count} products in {form}" for count, form in counts if count)
    size += sum(array.nbytes for each in weights for array in each.arrays)
    return Engine(directory, "native", model, f"{layout} by {instructions(library)}", size,
                  (directory / "int8.safetensors").stat().st_size)


def load_auto(directory, say=print):
    """The fastest of native, sparse and int8 on one row of 128 tokens (or as many as the model has positions).

    Where native takes less than the products of torch's engines alone would, these are not even loaded.
    """
    model, packed, metadata = quant.read_int8(directory)
    batch, engines, tokens = random_batch(model.config, 1, 128), [], min(128, model.config.max_position_embeddings)
    sizes = {name: math.prod(layer.shape) for name, layer in packed.items()}
    largest = packed[max(sizes, key=sizes.get)]
    try:
        engines.append(native_engine(directory, model, packed, native_library(int(metadata["activation_bits"]), say)))
        sparse = largest.pattern != "dense" and exact_in_float32(largest)
        kernel, note = fastest({**DENSE_KERNELS, **(SPARSE_KERNELS if sparse else {})}, largest)
        product = partial(kernel(largest)[0], torch.randn(tokens, largest.shape[1]))
        products = min(seconds(product) for _ in range(5)) * sum(sizes.values()) / max(sizes.values())
        whole = measure(engines, batch, least=5, budget=0.1)["native"]
        if whole < products:
            say(f"engine native: {1e3 * whole:.1f} ms for a row of {tokens} tokens here, where the products alone take "
                f"{1e3 * products:.1f} ms by the best of torch's, {note}")
            return engines[0]
    except NativeError as error:
        say(f"{error}; the engines of torch take over")
    except InputError as error:
        say(f"engine native: {error}")
        return engines[0]
    for name, listener in (("int8", say), ("sparse", lambda _: None)):
        with contextlib.suppress(InputError) if engines else contextlib.nullcontext():     # a dense model has no sparse
            engines.append(load_integer(directory, name, listener))
    times = measure(engines, batch, least=5, budget=1.0)
    best = min(engines, key=lambda engine: times[engine.name])
    say(f"engine {best.name}: the fastest one here on a row of {tokens} tokens, "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items()))
    return best


def random_batch(config, batch_size, length):
    """A full batch of random tokens."""
    length = min(length, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def measure(engines, batch, least=7, budget=20.0):
    """Median seconds of a batch per engine: warmed up twice, then in turn, so that a busy moment hits all alike.

    At least `least` rounds, more (to 50) while `budget` seconds last.
    """
    for engine in engines * 2:
        engine(batch)
    times, begin = {engine.name: [] for engine in engines}, time.perf_counter()
    for number in range(50):
        if number >= least and time.perf_counter() - begin > budget:
            break
        for engine in engines:
            times[engine.name].append(seconds(partial(engine, batch)))
    return {name: statistics.median(values) for name, values in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# --text

def compression_of(directory):
    """What config.json records of the training: task, max_len, pattern, ... ; {} for a model from elsewhere."""
    value = quant.kind_of(directory)[2].get("compression") or {}
    if not isinstance(value, dict):
        raise InputError(f"{Path(directory) / 'config.json'} says compression {value!r}; expected an object")
    return value


def encoder_for(directory, kind, max_len, task=None, folder=None, split="dev"):
    """A TaskData of the model's tokenizer and row length: with `folder` it has the split, without it only encodes."""
    config = network.read_config(directory)[0]
    name = task or ("squad" if kind == "span" else "sst2")
    length = max_len or compression_of(directory).get("max_len") or min(TASKS[name].max_length,
                                                                         config.max_position_embeddings)
    if not isinstance(length, int) or not 8 <= length <= config.max_position_embeddings:
        raise InputError(f"rows of {length} tokens do not fit {directory}, which takes 8 to "
                         f"{config.max_position_embeddings}; give another --max-len")
    tokenizer = load_tokenizer(directory)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} tokens and the model "
                         f"{config.vocab_size}; they do not belong together")
    return TaskData(name, folder or ".", tokenizer, length, splits=(split,) if folder else ())


def label_names(directory, count):
    """The names of the classes, from config.json's id2label; their numbers if it has none."""
    names = quant.kind_of(directory)[2].get("id2label")
    return [str(names.get(str(number), number)) if isinstance(names, dict) else str(number) for number in range(count)]


def check_texts(settings, kind, task):
    """InputError unless --text-pair or --context go with --text as this model wants them."""
    texts, pairs, contexts = len(settings.text), len(settings.text_pair), len(settings.context)
    if kind == "span":
        if pairs or contexts not in (1, texts):
            raise InputError(f"this model answers questions: --text is the question, --context its passage, once or "
                             f"once per --text; found {contexts} for {texts}, and {pairs} --text-pair")
        return
    if contexts:
        raise InputError("--context is for a model that answers questions, and this one classifies; use --text-pair")
    allowed = (0, texts) if task not in TASKS else (texts,) if len(TASKS[task].text_columns) == 2 else (0,)
    if pairs not in allowed:
        raise InputError(f"this model{f' ({task})' if task in TASKS else ''} wants {' or '.join(map(str, allowed))} "
                         f"--text-pair for {texts} --text, the n-th to go with the n-th; found {pairs}")


def run_text(settings):
    kind, *_ = quant.kind_of(settings.model)
    if kind == "pretraining":
        raise InputError(f"{settings.model} is a pre-trained model without a task; fine-tune it first: python train.py "
                         f"--stage finetune --task TASK")
    check_texts(settings, kind, compression_of(settings.model).get("task"))
    engine = load(settings.model, settings.engine, settings.threads, say=to_stderr)
    contexts = settings.context * (len(settings.text) if len(settings.context) == 1 else 1)
    results = engine.answer(settings.text, settings.text_pair, contexts, settings.max_len)
    for text, (answer, value) in zip(settings.text, results):
        print(f"{answer}\t{value:.4f}\t{text}")
    return {"engine": engine.name, "answers": [{"text": text, "answer": answer,
                                                "score" if kind == "span" else "probability": value}
                                               for text, (answer, value) in zip(settings.text, results)]}


# ---------------------------------------------------------------------------------------------------------------------
# --evaluate

def fake_quant_model(directory):
    """The quantized model as it was trained: float32 arithmetic with fake quantization. A function of a batch."""
    kind, _, raw = quant.kind_of(directory)
    record = raw.get("compression") or {}
    bits, scales = record.get("activation_bits"), record.get("weight_scales")
    if bits not in range(2, 9) or scales not in ("row", "tensor"):
        raise InputError(f"--agreement compares with the fake-quantized model, and {Path(directory) / 'config.json'} "
                         f"has no activation_bits and weight_scales; run python train.py --stage quantize first")
    model = network.load(directory, kind).eval()
    quant.prepare(model, bits, scales)
    return Engine(directory, "fake-quant", model, "", 0, 0)


def recorded(engine, logits):
    """The engine as `predict`, which also keeps the logits of every real token or row."""
    def predict(batch):
        result = engine(batch)
        tokens = batch["attention_mask"].bool()
        logits.extend([part[tokens] for part in result] if isinstance(result, tuple) else [result])
        return result
    return predict


def agreement(data, engine, reference, limit):
    """(metrics and predictions of engine, figures): the share of equal predictions on every dev set, the largest logit
    difference."""
    ours, theirs = [], []
    metrics, predictions = data.evaluate(recorded(engine, ours), limit=limit)
    reference_metrics, expected = data.evaluate(recorded(reference, theirs), limit=limit)
    shares, count = {}, 0
    for name, found in predictions.items():
        pairs = [(found[key], expected[name][key]) for key in (found if isinstance(found, dict) else range(len(found)))]
        shares[name] = sum(a == b for a, b in pairs) / len(pairs)
        count += len(pairs)
    ours, theirs = torch.cat([part.flatten() for part in ours]), torch.cat([part.flatten() for part in theirs])
    figures = {"examples": count, "equal_predictions": shares, "fake_quant_metrics": reference_metrics,
               "largest_logit_difference": float((ours - theirs).abs().max()),
               "mean_logit_difference": float((ours - theirs).abs().mean()),
               "logit_standard_deviation": float(theirs.std())}
    return metrics, predictions, figures


def make_folder(path):
    """The folder of --predictions, made if it is not there; InputError if nothing can be written to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"--predictions {path}: {error.strerror}; give a folder that can be written to") from None


def run_evaluate(settings):
    kind, *_ = quant.kind_of(settings.model)
    task = settings.task or compression_of(settings.model).get("task")
    if task not in TASKS:
        raise InputError(f"{settings.model} does not say which task it was trained on; give --task, one of "
                         f"{', '.join(TASKS)}")
    if TASKS[task].kind != kind:
        raise InputError(f"--task {task} needs a {TASKS[task].kind} model, and {settings.model} is a {kind} model")
    folder = settings.data or tiny.ensure(HOME / "data" / "tiny")
    data = encoder_for(settings.model, kind, settings.max_len, task, folder, settings.split)
    engine = load(settings.model, settings.engine, settings.threads, say=to_stderr)
    classes = engine.model.classifier.out_features if kind == "classification" else len(data.labels)
    if classes != len(data.labels):
        raise InputError(f"--task {task} has {len(data.labels)} labels, and {settings.model} tells {classes} apart")
    reference = fake_quant_model(settings.model) if settings.agreement else None
    predictions_folder = make_folder(settings.predictions) if settings.predictions else None
    report = {"engine": engine.name, "layout": engine.layout, "task": task}
    if settings.agreement:
        report["metrics"], predictions, figures = agreement(data, engine, reference, settings.limit)
        report["agreement"] = figures
    else:
        report["metrics"], predictions = data.evaluate(engine, limit=settings.limit)
    print("\n".join([*data.notes(), f"{task}, engine {engine.name}: " + (
        ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items()) or "no labels to compare with")]))
    if predictions_folder:
        for name, content in data.prediction_files(predictions).items():
            network.write_file(predictions_folder / name, content)
            print(f"wrote {predictions_folder / name}")
    if settings.agreement:
        shares = ", ".join(f"{share:.2%} of {name}" for name, share in figures["equal_predictions"].items())
        print(f"same prediction as the fake-quantized model on {shares}; logits differ by at most "
              f"{figures['largest_logit_difference']:.4f}, {figures['mean_logit_difference']:.5f} on average (their "
              f"standard deviation is {figures['logit_standard_deviation']:.2f})")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# --benchmark

def write_random(directory, preset, sparsity, pattern, plain=True):
    """A classifier of this size with random weights, pruned and quantized, written as train.py would leave it.

    plain: the float32 file too.
    """
    import prune
    torch.manual_seed(0)
    model = network.build(network.PRESETS[preset], "classification")
    pattern = prune.parse_pattern(pattern)
    sparsity = prune.resolve_sparsity(sparsity, pattern)
    prune.check_pattern(model, pattern)
    quant.prepare(model, quant.default_activation_bits())
    for _, layer in linears(model):
        layer.act_range.copy_(torch.tensor([-4.0, 4.0]))
        if layer.prunable:
            layer.mask.copy_(prune.magnitude_mask(layer.weight, sparsity, pattern))
    if plain:
        network.save(model, directory)
    else:
        labels = ["LABEL_0", "LABEL_1"]
        network.write_file(directory / "config.json", json.dumps(network.config_json(model.config, model.kind, labels)))
    quant.write_int8(model, directory)
    print(f"random weights: {preset}, {network.count_parameters(model):,} parameters, encoder sparsity {sparsity:g}, "
          f"pattern {pattern}, {quant.default_activation_bits()}-bit activations")


def machine():
    """One line: processor, cores, threads in use, torch."""
    exact = "7-bit activations only" if quant.saturates() else "8-bit activations"
    return (f"{network.processor_name()}, {exact} are exact, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}")


def run_benchmark(settings):
    if settings.random:
        with tempfile.TemporaryDirectory(prefix="infer_cpu-") as directory:
            write_random(Path(directory), settings.random, settings.sparsity, settings.pattern)
            return benchmark(settings, Path(directory))
    return benchmark(settings, Path(settings.model))


def benchmark(settings, directory):
    """Every engine that can run, on the same random batches; prints a table, returns the figures."""
    kind, config, _ = quant.kind_of(directory)
    if kind == "pretraining":
        raise InputError(f"{directory} is a pre-trained model without a task head; benchmark a fine-tuned one, or "
                         f"--random")
    length = settings.max_len or 128
    if length > config.max_position_embeddings:
        raise InputError(f"--max-len {length} is longer than the model's {config.max_position_embeddings} positions")
    engines, unavailable = [], {}
    for name in ENGINES:
        try:
            engines.append(load(directory, name, settings.threads, say=to_stderr))
        except InputError as error:
            unavailable[name] = str(error)
    if not engines:
        raise InputError("; ".join(unavailable.values()))
    report = {"machine": machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "max_len": length,
              "unavailable": unavailable, "rows": []}
    print(report["machine"])
    for batch_size in settings.batch_size:
        times = measure(engines, random_batch(config, batch_size, length))
        print(f"\n{batch_size} x {length} tokens    ms  sequences/s  x fp32  disk MB  memory MB")
        for engine in engines:
            row = {"engine": engine.name, "layout": engine.layout, "batch_size": batch_size,
                   "ms": 1e3 * times[engine.name], "sequences_per_second": batch_size / times[engine.name],
                   "times_fp32": times["fp32"] / times[engine.name] if "fp32" in times else None,
                   "disk_mb": engine.disk_bytes / 1e6, "memory_mb": engine.memory_bytes / 1e6}
            report["rows"].append(row)
            ratio = f"{row['times_fp32']:.2f}" if row["times_fp32"] else "-"
            print(f"{engine.name:<10}{row['ms']:>12.2f}  {row['sequences_per_second']:>11.1f}  {ratio:>6}  "
                  f"{row['disk_mb']:>7.1f}  {row['memory_mb']:>9.1f}")
        print("\n".join(verdicts(times)))
        if engines[-1].name == "native":
            report["rows"][-1]["parts"] = where_time_goes(engines[-1], random_batch(config, batch_size, length))
    print()
    for engine in engines:
        print(f"{engine.name}: {engine.layout}")
    for name, reason in unavailable.items():
        print(f"{name} is not available: {reason}")
    return report


def where_time_goes(engine, batch):
    """Prints the parts of engine native: {part: (ms, share, G operations/s, the same by the kernel at its best)}.

    Operations are a multiplication and an addition per weight that lives and token; in attention, in float32, per pair
    of tokens and feature, for scores and for values. At its best, a kernel finds its activations in the first cache
    (`ceiling`).
    """
    encoder, whole, rounds = engine.model.encoder.kernel, [], []
    for _ in range(15):
        whole.append(seconds(partial(engine, batch)))
        rounds.append({})
        encoder(**batch, times=rounds[-1])
    lengths, hidden = batch["attention_mask"].sum(1), encoder.config.hidden_size
    all_tokens = int(lengths.sum())
    tokens, pairs = ([value] * len(encoder.weights) for value in (all_tokens, int((lengths ** 2).sum())))
    if encoder.first_token_only:                # in the last layer only these ask, and only they go on
        tokens[-1], pairs[-1] = len(lengths), all_tokens
    products = (PARTS[0], *PARTS[2:5])
    operations = {name: sum(2 * int(layer[index].nonzero.sum()) * (count if index else all_tokens)
                            for layer, count in zip(encoder.weights, tokens)) for index, name in enumerate(products)}
    operations["attention"] = 4 * hidden * sum(pairs)
    times = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
    times["heads, Python"] = max(statistics.median(whole) - sum(times.values()), 0.0)
    parts, ceilings = {}, {form: ceiling(encoder.library, form) for form in
                           {weights.form for layer in encoder.weights for weights in layer}}
    print("native, part              ms   share  G operations/s  at best")
    for part, value in times.items():
        rate = operations.get(part, 0) / value / 1e9 if value else 0.0
        best = ceilings[encoder.weights[0][products.index(part)].form] if part in products else 0.0
        parts[part] = (1e3 * value, value / sum(times.values()), rate, best)
        print(f"{part:<20}{1e3 * value:>8.2f}  {value / sum(times.values()):>5.1%}"
              + (f"  {rate:>14.0f}" if rate else "") + (f"  {best:>7.0f}" if best else ""))
    return parts


def ceiling(library, form):
    """G operations/s of a kernel of engine native on a dense layer of 256 -> 96, whose tiles fit the first cache."""
    rows, columns, tokens = 96, 256, 16 * library.tokens_of_tile()
    weight = torch.randint(1, 128, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weights = native_weights(library, [quant.PackedLinear(
        (rows, columns), weight, None, torch.ones(rows), torch.zeros(rows), torch.tensor(1.0),
        torch.tensor(0, dtype=torch.int32), 7)], form)
    levels, y = torch.zeros(tokens * columns, dtype=torch.uint8), torch.empty(tokens * rows)
    call = partial(library.linear, ctypes.addressof(weights), tokens, levels.data_ptr(), y.data_ptr(), None, None)
    return 2 * rows * columns * tokens / min(seconds(call) for _ in range(200)) / 1e9


def verdicts(times):
    """Where an engine gives nothing, in words."""
    lines = [f"no gain: {name} takes {times[name] / times['fp32']:.2f} times as long as dense fp32"
             for name in times if "fp32" in times and name != "fp32" and times[name] > 0.95 * times["fp32"]]
    if {"sparse", "int8"} <= times.keys() and times["sparse"] > 0.95 * times["int8"]:
        lines.append(f"the zeros save no time here: sparse takes {times['sparse'] / times['int8']:.2f} times as long "
                     f"as dense int8")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# --size. Four ways of counting, each as a multiple of dense float32:
#     values only      the encoder's weights; what survives, at its stored width (arXiv 2111.05754's 40x: 4 / 0.1)
#     values, masks    the encoder's weights; what the file holds of them, scales left out
#     whole file       everything: scales, embeddings, heads, norms, biases, header
#     whole file, zip  the same after deflate

ENCODER = ("query", "key", "value", "attention output", "intermediate", "output")
KINDS = (*ENCODER, "pooler", "heads", "embeddings", "norms and biases", "other")
SIZES = ("weights", "surviving", "dense_bytes", "value_bytes", "mask_bytes", "scale_bytes", "stored_bytes")


def tensor_kind(model_type, name):
    """'bert.encoder.layer.3.attention.self.query.values' -> 'query'; one of KINDS for every published name."""
    ours = {theirs: ours for ours, theirs in network.NAMES[model_type].items()}
    generic = re.sub(r"\.\d+\.", ".{}.", name)
    found = ours.get(generic) or ours.get(generic.rpartition(".")[0])
    if found is None:
        return "heads" if network.is_head(name, model_type) else "other"       # a decoder of its own
    group, _, last = found.rpartition(".")
    if last.endswith("norm") or name.endswith("bias"):
        return "norms and biases"
    if last in ("word", "position", "token_type"):
        return "embeddings"
    return last.replace("_", " ") if group == "encoder.layers.{}" else last if last == "pooler" else "heads"


def packed_tensors(directory):
    """[(published name, figures)] of int8.safetensors, and {published name: shape} of the model as it was before.

    figures: a dict with some of SIZES. The file is read strictly first: a damaged one has no size worth telling.
    """
    model, packed, _ = quant.read_int8(directory)
    kind, config, _ = quant.kind_of(directory)
    plain = quant.empty_model(config, kind, model.classifier.out_features if kind == "classification" else 2)
    shapes = {network.published_name(config.model_type, name): tensor for name, tensor in plain.state_dict().items()}
    entries = []
    for name, tensor in network.read_safetensors(directory / "int8.safetensors")[0].items():
        stem, _, leaf = name.rpartition(".")
        column = {"mask_bits": "mask_bytes", "mask_gaps": "mask_bytes"}.get(
            leaf, "scale_bytes" if "scale" in leaf or leaf == "input_zero_point" else "value_bytes")
        figures = {column: tensor.nbytes, "stored_bytes": tensor.nbytes}
        if column == "value_bytes":
            count = shapes[stem + ".weight" if leaf == "values" else name].numel()
            figures.update(weights=count, surviving=tensor.numel(), dense_bytes=4 * count)
        entries.append((name, figures))
    return entries, shapes


def plain_tensors(directory):
    """The same of model.safetensors or pytorch_model.bin, and the file. Zeros are counted in the layers that pruning
    may touch or has beside it; they are stored, and their bytes are told."""
    tensors, path = network.read_weights(directory, say=to_stderr)
    model_type = network.read_config(directory)[0].model_type
    entries = []
    for name, tensor in tensors.items():
        countable = tensor_kind(model_type, name) in (*ENCODER, "pooler", "heads")
        surviving = int(tensor.count_nonzero()) if countable else tensor.numel()
        entries.append((name, {"weights": tensor.numel(), "surviving": surviving, "dense_bytes": 4 * tensor.numel(),
                               "value_bytes": surviving * tensor.element_size(), "stored_bytes": tensor.nbytes}))
    return entries, tensors, path


def deflated_bytes(path):
    """How long a file is as a zip holds it."""
    compressor, size = zlib.compressobj(wbits=-15), 0
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            size += len(compressor.compress(chunk))
    return size + len(compressor.flush())


def size_report(directory, engine="auto"):
    """Every figure of --size, exact, in bytes. engine fp32 means the plain file, also where there is a packed one."""
    directory = Path(directory)
    config, _ = network.read_config(directory)          # of any architecture: a bare backbone has a size too
    quantized = engine in ENGINES[1:] or engine == "auto" and (directory / "int8.safetensors").is_file()
    if quantized:
        entries, shapes = packed_tensors(directory)
        path = directory / "int8.safetensors"
    else:
        entries, shapes, path = plain_tensors(directory)
    rows = {name: dict.fromkeys(SIZES, 0) for name in KINDS}
    for name, figures in entries:
        row = rows[tensor_kind(config.model_type, name)]
        for column, value in figures.items():
            row[column] += value
    rows = {name: row for name, row in rows.items() if row["stored_bytes"]}
    total = {column: sum(row[column] for row in rows.values()) for column in SIZES}
    encoder = {column: sum(rows[name][column] for name in ENCODER if name in rows) for column in SIZES}
    # What network.save would write of the same model, dense and in float32.
    header, _ = network.safetensors_header({name: torch.empty(tensor.shape, device="meta")
                                            for name, tensor in shapes.items()})
    dense, files = len(header) + total["dense_bytes"], weight_files(path)
    size, zipped = sum(file.stat().st_size for file in files), sum(map(deflated_bytes, files))
    return {"file": str(path), "quantized": quantized, "kinds": rows, "encoder": encoder, "tensors": total,
            "header_bytes": size - total["stored_bytes"], "file_bytes": size, "zip_bytes": zipped,
            "dense_file_bytes": dense,
            "ratios": {"values_only": ratio(encoder["dense_bytes"], encoder["value_bytes"]),
                       "with_masks": ratio(encoder["dense_bytes"], encoder["stored_bytes"] - encoder["scale_bytes"]),
                       "whole_file": ratio(dense, size), "zip": ratio(dense, zipped)}}


def ratio(dense, stored):
    """dense / stored; None where nothing is stored."""
    return dense / stored if stored else None


def print_size(report):
    """The report as a table and the four ways of counting below it."""
    names = ("weights", "surviving", "dense fp32", "values", "masks", "scales", "stored", "x fp32")
    print(f"{report['file']}, bytes\n{'':<17}" + "".join(f"{name:>14}" for name in names))
    for name, row in [*report["kinds"].items(), ("encoder's layers", report["encoder"]), ("all", report["tensors"])]:
        print(f"{name:<17}" + "".join(f"{row[column]:>14,}" for column in SIZES)
              + f"{times_smaller(ratio(row['dense_bytes'], row['stored_bytes'])):>14}")
    print(f"{'header, rest':<17}{report['header_bytes']:>98,}\n{'whole file':<17}{report['file_bytes']:>98,}\n")
    encoder, ratios = report["encoder"], report["ratios"]
    dense, file = encoder["dense_bytes"], report["dense_file_bytes"]
    lines = [("values_only", "encoder, values only (the paper's count)", dense, encoder["value_bytes"]),
             ("with_masks", "encoder, values and masks", dense, encoder["stored_bytes"] - encoder["scale_bytes"]),
             ("whole_file", "whole file", file, report["file_bytes"]),
             ("zip", "whole file after zip", file, report["zip_bytes"])]
    print(f"{'':<41}{'dense fp32':>15}{'this':>15}{'x smaller':>12}")
    for key, title, before, after in lines:
        print(f"{title:<41}{before:>15,}{after:>15,}{times_smaller(ratios[key]):>12}")
    if not report["quantized"]:
        print("\nit is not quantized: zeros lie in the file as any other weight; the paper's count alone omits them")


def times_smaller(value):
    return "-" if value is None else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def run_size(settings):
    if not settings.random:
        report = size_report(settings.model, settings.engine)
    else:
        with tempfile.TemporaryDirectory(prefix="infer_cpu-") as directory:
            write_random(Path(directory), settings.random, settings.sparsity, settings.pattern, plain=False)
            report = {**size_report(directory), "file": f"int8.safetensors of a random {settings.random}"}
    print_size(report)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def to_stderr(line):
    print(line, file=sys.stderr)


def count(text):
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def counts(text):
    """argparse type: '1,16' -> [1, 16]."""
    return [count(part) for part in text.split(",")]


class Parser(argparse.ArgumentParser):
    """argparse whose error is one sentence."""

    def error(self, message):
        print(f"infer_cpu.py: {message}; python infer_cpu.py --help lists all flags", file=sys.stderr)
        sys.exit(2)


def parse(arguments=None):
    """Command line -> settings. Exits with code 2 on an unknown flag or value."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="a directory that train.py wrote")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--text", action="append", help="a text to classify, or a question; may be given several times")
    mode.add_argument("--evaluate", action="store_true", help="metrics on the task's dev set")
    mode.add_argument("--benchmark", action="store_true", help="time every engine")
    mode.add_argument("--size", action="store_true", help="count the bytes, layer kind by layer kind")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    parser.add_argument("--threads", type=count, help="default: torch's own choice")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--max-len", type=count, help="tokens per row; default: as trained, or 128")
    parser.add_argument("--text-pair", action="append", default=[], help="tasks on pairs: the second text, per --text")
    parser.add_argument("--context", action="append", default=[], help="questions: the passage, once or per --text")
    parser.add_argument("--task", choices=tuple(TASKS), help="with --evaluate; default: what the model was trained on")
    parser.add_argument("--data", metavar="DIR", help="with --evaluate: the task folders; default: the tiny world")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="with --evaluate; test has no labels")
    parser.add_argument("--predictions", metavar="FOLDER", help="with --evaluate: write them there, as GLUE's server "
                        "and SQuAD's script take them")
    parser.add_argument("--limit", type=count, help="with --evaluate: only so many examples of a dev set")
    parser.add_argument("--agreement", action="store_true", help="with --evaluate: compare with the fake-quant model")
    parser.add_argument("--batch-size", type=counts, default=[1, 16], help="with --benchmark: for example 1,16")
    parser.add_argument("--random", choices=tuple(network.PRESETS), help="with --benchmark, --size: random weights")
    parser.add_argument("--sparsity", type=float, help="with --random: share of zeros; default 0.85")
    parser.add_argument("--pattern", default="unstructured", help="with --random: unstructured, 1x4, RxC or N:M")
    settings = parser.parse_args(arguments)
    if (settings.model is None) != bool(settings.random):
        parser.error("give either MODEL_DIR or --random PRESET")
    if settings.predictions and not settings.evaluate:
        parser.error("--predictions goes with --evaluate")
    if settings.split == "test" and not settings.predictions:
        parser.error("--split test has no labels, so that there is nothing but predictions; give --predictions FOLDER")
    if settings.random and not (settings.benchmark or settings.size):
        parser.error("--random has random weights: it goes with --benchmark and --size only")
    return settings


def main(arguments=None):
    settings = parse(arguments)
    try:
        if settings.json and (Path(settings.json).is_dir() or not Path(settings.json).resolve().parent.is_dir()):
            raise InputError(f"--json {settings.json} is a folder, or in a folder that is not there; give a file name")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        run = (run_text if settings.text else run_evaluate if settings.evaluate else run_size if settings.size else
               run_benchmark)
        report = run(settings)
        if settings.json:
            network.write_file(settings.json, json.dumps(report, indent=1))
    except (InputError, DataError) as error:
        print(f"infer_cpu.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
