"""The C++ sources as a shared library for this CPU: compiled once, kept in a cache, checked whenever it is loaded."""
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import quant
from native.engine import Norm
from native.weights import (FORMS, INTEGER, POINTER, SCATTERED, SMALL, STRIPES, WORDS, NativeError, from_tiles,
                            instructions, native_linear, native_weights, to_tiles)

HOME = Path(__file__).resolve().parent
SOURCES = ("vectors.h", "products.h", "encoder.cpp")        # the last one is compiled, and includes the others
SIGNATURES = {
    "linear": [POINTER, INTEGER, POINTER, POINTER, POINTER, POINTER],
    "quantize": [INTEGER, POINTER, POINTER, POINTER],
    "layer_norm": [INTEGER, INTEGER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER],
    "attention": [POINTER, INTEGER, POINTER, INTEGER, POINTER, INTEGER, INTEGER, SMALL, POINTER, POINTER],
    "encode": [POINTER, INTEGER, POINTER, POINTER, SMALL, POINTER, POINTER],
    "set_threads": [SMALL],
}


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
    """Compile the sources to the shared library `path`, whole or not at all. NativeError if that fails."""
    command = [*compiler(), "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *options, str(HOME / SOURCES[-1])]
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:       # nobody else writes there
            partly = Path(folder) / path.name
            subprocess.run([*command, "-o", str(partly)], check=True, capture_output=True, text=True, timeout=600)
            os.replace(partly, path)
    except (OSError, subprocess.SubprocessError) as error:
        messages = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        lines = (messages or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise NativeError(f"engine native: {compiler()[0]} cannot compile {SOURCES[-1]}: {reason}") from None


def open_native(path):
    """A compiled library -> its functions. NativeError if it cannot be loaded or brings its own threads."""
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
    return [platform.processor() or platform.machine()]


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
    recipe = repr(([(HOME / source).read_text() for source in SOURCES], compiler(), version, options, processor()))
    name = f"native-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "prune-once-for-all"
    with tempfile.TemporaryDirectory(prefix="native-") as temporary:
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
