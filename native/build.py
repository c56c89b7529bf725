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
from native.weights import (FORMS, GATHERED_TILES, INTEGER, POINTER, SCATTERED, SMALL, STRIPES, WHOLE_TILES, WORDS,
                            NativeError, from_tiles, instructions, native_linear, native_weights, to_tiles)

try:
    import pwd
except ImportError:         # Windows: HOME or XDG_CACHE_HOME says where the cache is
    pwd = None

HOME = Path(__file__).resolve().parent
SOURCES = ("vectors.h", "functions.h", "tiles.h", "products.h", "attention.h", "encoder.cpp")     # the last is compiled
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


def compile_native(folder, name, options):
    """Compile the sources to a shared library in `folder`, whole, on the disk, or not at all. Returns its path, `name`
    and the hash of its content. NativeError if that fails."""
    command = [*compiler(), "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *options, str(HOME / SOURCES[-1])]
    try:
        with tempfile.TemporaryDirectory(dir=folder) as inside:            # nobody else writes there
            partly = Path(inside) / "library.so"
            subprocess.run([*command, "-o", str(partly)], check=True, capture_output=True, text=True, timeout=600)
            path = folder / f"{name}-{content_hash(partly)}.so"
            with open(partly, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partly, path)
            return path
    except (OSError, subprocess.SubprocessError) as error:
        messages = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        lines = (messages or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise NativeError(f"engine native: {compiler()[0]} cannot compile {SOURCES[-1]}: {reason}") from None


def content_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def cached_native(folder, name):
    """The library of that name in a folder, None if there is none whose content is still what it was: to load a file
    that lost its end, or a page, would kill the process."""
    with contextlib.suppress(OSError):
        return next((path for path in sorted(folder.glob(name + "-*.so")) if path.stem.endswith(content_hash(path))),
                    None)


def cache_folder():
    """(where compiled libraries are kept: prune-once-for-all in $XDG_CACHE_HOME or ~/.cache, made if need be; None). Or
    (None, why there is none). It is absolute, and a folder of this user that nobody else may write to: what lies there
    is loaded and run."""
    place = os.environ.get("XDG_CACHE_HOME") or ""
    folder = Path(place if os.path.isabs(place) else os.path.join(home_folder(), ".cache")) / "prune-once-for-all"
    if not folder.is_absolute():
        return None, "this user has no home folder; name a folder for it in XDG_CACHE_HOME"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        return None, f"its cache {folder} cannot be used: {error.strerror}"
    if hasattr(os, "getuid") and (facts.st_uid != os.getuid() or facts.st_mode & 0o022):
        return None, f"its cache {folder} is not this user's, or others may write to it, and what lies there is run"
    return folder, None


def home_folder():
    """Of this user, "" where there is none: in a container a user need not have a name."""
    if os.environ.get("HOME"):
        return os.environ["HOME"]
    with contextlib.suppress(KeyError, AttributeError):
        return pwd.getpwuid(os.getuid()).pw_dir
    return ""


def open_native(path):
    """A compiled library -> its functions. OSError if it cannot be loaded, NativeError if it brings its own threads."""
    library = ctypes.CDLL(str(path))
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
    library.tiles = 0                                               # 1: lay weights out for tile registers
    return library


def processor():
    """What the compiler's `native` stands for on this machine, as far as Linux tells it."""
    with contextlib.suppress(OSError):
        return sorted({line for line in open("/proc/cpuinfo")
                       if line.startswith(("model name", "flags", "Features", "CPU implementer", "CPU part"))})
    return [platform.processor() or platform.machine()]


def native_library(bits, say, tiles=False):
    """The library for this CPU and activations of so many bits, from the cache or compiled now, and checked. tiles: to
    use tile registers; None: where there are any.

    A cached file's name is the hash of all that it was made from, and that of its content. Without a usable cache, the
    library is compiled anew in a temporary folder. Raises NativeError, one sentence, where the engine cannot be had;
    `say` is told what is not as it should be.
    """
    name, options = made_from(bits)
    library = library_from_cache(name, options, say)
    if library is None:
        try:
            with tempfile.TemporaryDirectory(prefix="native-") as folder:
                library = open_native(compile_native(Path(folder), name, options))
        except OSError as error:
            raise NativeError(f"engine native: there is no folder to compile it in and to run it from ({error}); name "
                              f"one in XDG_CACHE_HOME or TMPDIR") from None
    check_sums(library, bits, say)
    wrong = wrong_floats(library)
    if wrong:
        raise NativeError(f"engine native computes wrong {' and '.join(wrong)} on this machine; use another engine")
    if tiles is not False:
        with contextlib.suppress(NativeError) if tiles is None else contextlib.nullcontext():
            use_tiles(library, bits, say)
    return library


def use_tiles(library, bits, say):
    """Ask the system for tile registers, and check what they compute; if it is wrong, the vectors stay in use and `say`
    is told. NativeError if there are none, or none for us."""
    error = library.request_tiles()
    if error:
        reason = os.strerror(error) if error > 0 else f"{instructions(library)} is what this CPU and its compiler know"
        raise NativeError(f"engine tiles needs tile registers (AMX), and there are none: {reason}; use engine native")
    library.tiles, wrong = 1, ["all"]
    try:
        wrong = wrong_forms(library, bits, (WHOLE_TILES, GATHERED_TILES)) + wrong_floats(library)
    finally:
        library.tiles = int(not wrong)
    if wrong:
        say(f"engine tiles: tile registers give wrong results here ({', '.join(wrong)}) and are not used")


def made_from(bits):
    """(name of the library, a hash of all that it is made from; the compiler's options). NativeError without a compiler
    that runs."""
    options = ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
               f"-DACTIVATION_BITS={bits}"]
    try:
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"engine native: the compiler {compiler()[0]} does not run: {error}") from None
    sources = [(HOME / source).read_text(encoding="utf-8") for source in SOURCES]
    everything = repr((sources, compiler(), version, options, processor()))
    return f"native-{hashlib.sha256(everything.encode()).hexdigest()[:24]}", options


def library_from_cache(name, options, say):
    """The library from the cache, compiled into it if it is not there. None if there is no cache that it can be run
    from, and `say` is told why."""
    folder, reason = cache_folder()
    try:
        path = folder and cached_native(folder, name)
        if folder and not path:
            tempfile.TemporaryFile(dir=folder).close()          # may we write there?
            path = compile_native(folder, name, options)
            for damaged in set(folder.glob(name + "*.so")) - {path}:
                damaged.unlink()
        if path:
            return open_native(path)
    except OSError as error:
        reason = f"its cache {folder} cannot be used: {error.strerror or error}"
    say(f"engine native is compiled anew each time: {reason}")


def check_sums(library, bits, say):
    """The products of vectors against the oracle. Where the instructions for this CPU are wrong, plain C++ takes their
    place, and `say` is told; NativeError if that is wrong too."""
    for library.portable in (0, 1):
        wrong = wrong_forms(library, bits, (WORDS, STRIPES, SCATTERED))
        if not wrong:
            return
        say(f"engine native: {instructions(library)} gives wrong sums here ({', '.join(wrong)}) and is not used")
    raise NativeError("engine native gives wrong sums on this machine; use another engine")


def wrong_forms(library, bits, forms):
    """The names of those forms whose products, on random and extreme levels, are not the oracle's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (104, 900), generator=generator, dtype=torch.int8)
    weight *= torch.rand(weight.shape, generator=generator) > 0.6
    one = torch.tensor(1.0, dtype=torch.float32)                        # whatever torch's default is
    layer = quant.PackedLinear((104, 900), weight, None, one.new_ones(104), one.new_zeros(104), one,
                               torch.tensor(2 ** bits // 3, dtype=torch.int32), bits)
    levels = torch.randint(0, 2 ** bits, (2 * library.tokens_of_tile() + 5, 900), generator=generator)
    levels[0], levels[1] = 2 ** bits - 1, 0
    x = (levels - layer.input_zero_point).float()
    expected = quant.integer_forward(x, layer)
    return [FORMS[form] for form in forms if not torch.equal(native_linear(library, layer, form)[0](x), expected)]


def wrong_floats(library):
    """Which of attention (of two sequences) and layer norms are not torch's."""
    heads, size, tile = 2, 12, library.tokens_of_tile()
    lengths, width, generator = [tile + 3, 5], heads * size, torch.Generator().manual_seed(0)
    tokens, starts = sum(lengths), torch.tensor([0, lengths[0], sum(lengths)])
    weight = torch.randint(-9, 10, (3 * width, width), generator=generator, dtype=torch.int8)
    one = torch.tensor(1.0, dtype=torch.float32)
    layer = quant.PackedLinear((3 * width, width), weight, None, one.new_full((3 * width,), 0.003),
                               one.new_zeros(3 * width), one, torch.tensor(50, dtype=torch.int32), 7)
    x = torch.randint(-50, 78, (tokens, width), generator=generator).float()
    weights, tiles = native_weights(library, [layer]), to_tiles(x, tile)
    q, context, normed = torch.empty(tiles.shape, dtype=torch.uint8), torch.empty_like(tiles), torch.empty_like(tiles)
    library.quantize(tokens, tiles.data_ptr(), q.data_ptr(), ctypes.addressof(weights))
    library.attention(ctypes.addressof(weights), tokens, q.data_ptr(), 2, starts.data_ptr(), heads, size, 0,
                      context.data_ptr(), (ctypes.c_double * 2)())
    rows = quant.integer_forward(x, layer)
    expected = torch.cat([F.scaled_dot_product_attention(*part.view(-1, 3, heads, size).permute(1, 2, 0, 3))
                          .transpose(0, 1).reshape(-1, width) for part in rows.split(lengths)])
    gain, bias = torch.rand(2, width, generator=generator, dtype=torch.float32)
    norm = Norm(gain, bias, 1e-12)
    library.layer_norm(tokens, width, context.data_ptr(), None, ctypes.addressof(norm), normed.data_ptr(), None, None)
    results = {"attention": (context, expected),
               "layer norms": (normed, F.layer_norm(from_tiles(context, tokens), (width,), gain, bias, 1e-12))}
    return [name for name, (found, right) in results.items()
            if not torch.allclose(from_tiles(found, tokens), right, atol=1e-4 * float(right.abs().max()))]
