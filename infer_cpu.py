"""The payoff: run a sparse INT8 model on a CPU, and measure what it gains.

    python infer_cpu.py MODEL_DIR --text "a warm and funny film"                      label and probability
    python infer_cpu.py MODEL_DIR --text "Who wrote it?" --context "Ada wrote it."    answer and score (SQuAD models)
    python infer_cpu.py ENCODER_DIR --embed lines.txt --to vectors.npy                a vector for every line
    python infer_cpu.py MODEL_DIR --evaluate --agreement                              the task's metrics, on its dev set
    python infer_cpu.py MODEL_DIR --evaluate --predictions FOLDER                     and files for the official scripts
    python infer_cpu.py MODEL_DIR --benchmark --batch-size 1,16                       every engine side by side
    python infer_cpu.py MODEL_DIR --size                                              bytes, counted four ways
    python infer_cpu.py --benchmark --random bert-base --sparsity 0.8 --pattern 1x4   without training; --size too

Every engine is the network of model.py with functions set into its slots: `Linear.kernel`, or for native and tiles
`Encoder.kernel`. Attention, layer norms, softmax and GELU are float32 for all, but that tiles multiplies in attention by
pairs of bfloat16.

    fp32     dense float32 weights, zeros included
    int8     dense int8 weights, uint8 activations on the trained scale and zero point, exact int32 sums, float32 output
    sparse   only the weights that live, in integers too: the same numbers as int8
    native   the same numbers by native/, compiled for this CPU on first use; padding is not computed
    tiles    native on tile registers (AMX), where this CPU has any; products in attention to 2^-16
    auto     the fastest of int8, sparse and (with a compiler) tiles or else native here; fp32 if it is not quantized
"""
import contextlib
import math
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import quant
from data.embed import Embedder, evaluate_vectors, run_embed
from data.encode import answer, as_inputs, evaluation_data, match_classes, random_batch, run_text, write_predictions
from data.flags import OF_VECTORS, in_one_sentence, parse
from formats import model_directory
from formats.command import show_any_letter, to_stderr
from formats.config import compression_of
from formats.files import check_place, make_folder, write_json
from formats.int8 import read_int8, unpacked_bytes
from formats.machine import (default_activation_bits, keep_freed_memory, medians_in_turn, quantized_engine, saturates,
                             seconds, survive_fork)
from formats.model_directory import kind_of
from model import InputError, linears
from native.build import native_library
from native.engine import take_over
from native.weights import NativeError

# torch says so once per process; both are what we rely on, in the version that requirements.txt pins.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*are deprecated")

ENGINES = ("fp32", "int8", "sparse", "native", "tiles")
TILE = 32               # tokens per CSR product: a tile of 3072 inputs (384 KB) stays in the second-level cache


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Each takes a quant.PackedLinear and returns (function x -> y, bytes of weights it holds):
#     x float32 (..., in),  y float32 (..., out) = s_x s_w[row] * sum_k (q_x[k] - z) q_w[row, k] + bias[row]
# with the sum exact in integers, as in quant.integer_forward. They raise RuntimeError where torch has no such operator.

def onednn(packed):
    """Dense, oneDNN: int8 weights in its own layout. Uses VNNI and AMX where there are any."""
    out, columns = packed.shape
    weight = torch.ops.onednn.qlinear_prepack(quant.unpack(packed), None)
    scale, zero_point, zeros = float(packed.input_scale), int(packed.input_zero_point), torch.zeros(out).long()

    def product(x):
        q = quant.quantize_activation(x.reshape(-1, columns), packed.input_scale, zero_point, packed.bits)
        y = torch.ops.onednn.qlinear_pointwise(q, scale, zero_point, weight, packed.weight_scale, zeros, packed.bias,
                                               1.0, 0, torch.float32, "none", [], "")
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

    Every integer up to 2^24 is exact in float32, so the sums are too: see `quant.exact_in_float32`.
    """
    out, columns = packed.shape
    weight = quant.unpack(packed).to_sparse_csr()
    weight = torch.sparse_csr_tensor(weight.crow_indices().int(), weight.col_indices().int(), weight.values().float(),
                                     size=(out, columns), check_invariants=True)
    scale = packed.input_scale * packed.weight_scale

    def product(x):
        centred = centred_levels(x, packed)[0].view(-1, columns)
        y = centred.new_empty(len(centred), out)
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


def is_exact(kernel, packed):
    """Does the kernel give the oracle's integers, on random and extreme levels? Scales 1 and bias 0 leave only those.

    On a CPU whose products saturate only 7-bit inputs are tried: more is known to fail there, and warned about.
    """
    probe = replace(packed, weight_scale=torch.ones(packed.shape[0]), bias=torch.zeros(packed.shape[0]),
                    input_scale=torch.tensor(1.0))
    highest = 2 ** min(packed.bits, default_activation_bits()) - 1
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
    tokenizer: object = None    # read when the first text comes

    def __call__(self, batch):
        """(B, T) input_ids, attention_mask and token_type_ids -> float32 logits (B, C), or the pair of start and end
        logits, each (B, T). InputError for a batch that the model does not take; see encode.as_inputs."""
        with torch.inference_mode():
            return self.model(*as_inputs(batch, self.model))

    def answer(self, texts, pairs=(), contexts=(), max_len=None):
        """[(label, probability)] of texts, or of pairs of texts; [(span, score)] of questions and their contexts, the
        score being the sum of start and end logit.

        texts, pairs, contexts: lists of str, the second or third one as long as the first or empty. max_len: tokens of
        a row, as trained by default. A head with one output, or whose classes do not exclude each other, answers with
        the likeliest label and its own probability. Raises InputError for a length the model does not have, a context
        without words, or no tokenizer.
        """
        return answer(self, texts, pairs, contexts, max_len)

    def embed(self, texts, max_len=None):
        """float32 numpy (texts, hidden): a vector for each str of a list, by an encoder without a head; pooled as its
        sentence-transformers files say. Raises InputError as `answer` does."""
        return Embedder(self, max_len)(texts)


def load(directory, engine="auto", threads=None, say=print):
    """Open a model directory with an engine of ENGINES or 'auto'; `say` is told what auto chose, and of trouble.

    Raises InputError: no such directory, a damaged file, an engine that this model or machine does not have.
    """
    if threads:
        torch.set_num_threads(threads)
    survive_fork()
    directory = Path(directory)
    kind_of(directory)                    # is it a model directory at all?
    if engine == "fp32":
        return load_fp32(directory, say)
    if (directory / "int8.safetensors").is_file():
        if engine in ("native", "tiles"):
            model, packed, metadata = read_int8(directory)
            library = native_library(int(metadata["activation_bits"]), say, tiles=engine == "tiles")
            return native_engine(directory, model, packed, library)
        return load_auto(directory, say) if engine == "auto" else load_integer(directory, engine, say)
    if engine == "auto":
        say(f"engine fp32: {directory} is not quantized (it has no int8.safetensors)")
        return load_fp32(directory, say)
    raise InputError(f"engine {engine} needs a quantized model, and {directory} has no int8.safetensors; run python "
                     f"train.py --stage quantize --task TASK --init {directory} first, or use --engine fp32")


def load_fp32(directory, say=print):
    """Engine fp32: the plain weights, masked once."""
    keep_freed_memory()
    kind, *_ = kind_of(directory)
    model = model_directory.load(directory, kind, say=say).eval().requires_grad_(False)
    for _, layer in linears(model):
        layer.weight *= layer.mask
        layer.mask = None                       # not read any more
        layer.kernel = partial(F.linear, weight=layer.weight, bias=layer.bias)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Engine(directory, "fp32", model, "dense float32", size, model_directory.weight_bytes(directory))


def load_integer(directory, name, say=print):
    """Engine int8 or sparse, from int8.safetensors. Kernels are chosen by timing the largest layer of each pattern."""
    keep_freed_memory()
    model, packed, metadata = read_int8(directory)
    if metadata["activation_bits"] == "8" and saturates():
        say("warning: this CPU has no VNNI, and 8-bit activations may saturate its INT8 product; quantize with "
            "--activation-bits 7 for exact results here")
    if name == "sparse" and all(layer.pattern == "dense" for layer in packed.values()):
        raise InputError(f"engine sparse needs pruned layers, and {directory} has none; use --engine int8")
    kinds = {layer_name: layer.pattern if name == "sparse" and quant.exact_in_float32(layer) else "dense"
             for layer_name, layer in packed.items()}
    chosen, notes = {}, []
    for kind in sorted(set(kinds.values()), key=lambda kind: kind == "dense"):
        largest = max((packed[key] for key in kinds if kinds[key] == kind), key=lambda layer: math.prod(layer.shape))
        chosen[kind], note = fastest(DENSE_KERNELS if kind == "dense" else SPARSE_KERNELS, largest)
        notes.append(f"{list(kinds.values()).count(kind)} {kind} layers by {note}")
    size = unpacked_bytes(model)
    for layer_name, layer in linears(model):
        layer.kernel, layer_bytes = chosen[kinds[layer_name]](packed[layer_name])
        size += layer_bytes
    return Engine(directory, name, model, "; ".join(notes), size, (directory / "int8.safetensors").stat().st_size)


def native_engine(directory, model, packed, library):
    """Engine native or tiles of what read_int8 returns. InputError if the model has sizes that it does not take."""
    layout, native_bytes = take_over(model, packed, library)
    return Engine(directory, "tiles" if library.tiles else "native", model, layout,
                  unpacked_bytes(model) + native_bytes, (directory / "int8.safetensors").stat().st_size)


def load_auto(directory, say=print):
    """The fastest of native (tiles, where there are any), sparse and int8 on one row of 128 tokens (or as many as the
    model has positions).

    Where native takes less than the products of torch's engines alone would, these are not even loaded.
    """
    model, packed, metadata = read_int8(directory)
    tokens, engines = min(128, model.config.max_position_embeddings), []
    batch = random_batch(model.config, 1, tokens)
    try:
        library = native_library(int(metadata["activation_bits"]), say, tiles=None)
        products, note = products_of_torch(packed, tokens)          # before native takes the layers over
        engines.append(native_engine(directory, model, packed, library))
        whole = medians_in_turn(engines, batch, least=5, budget=0.1)[engines[0].name]
        if whole < products:
            say(f"engine {engines[0].name}: {1e3 * whole:.1f} ms for a row of {tokens} tokens here, where {note}")
            return engines[0]
    except NativeError as error:
        say(f"{error}; the engines of torch take over")
    for name, listener in (("int8", say), ("sparse", lambda _: None)):
        with contextlib.suppress(InputError) if engines else contextlib.nullcontext():     # a dense model has no sparse
            engines.append(load_integer(directory, name, listener))
    times = medians_in_turn(engines, batch, least=5, budget=1.0)
    best = min(engines, key=lambda engine: times[engine.name])
    say(f"engine {best.name}: the fastest one here on a row of {tokens} tokens, "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items()))
    return best


def products_of_torch(packed, tokens):
    """(seconds that all products of a model would take by torch's fastest kernel, judged by the largest layer; that in
    words). Infinite where torch has no exact kernel."""
    sizes = {name: math.prod(layer.shape) for name, layer in packed.items()}
    largest = packed[max(sizes, key=sizes.get)]
    sparse = largest.pattern != "dense" and quant.exact_in_float32(largest)
    try:
        kernel, note = fastest({**DENSE_KERNELS, **(SPARSE_KERNELS if sparse else {})}, largest)
    except InputError as error:
        return math.inf, str(error)
    product = partial(kernel(largest)[0], torch.randn(tokens, largest.shape[1]))
    total = min(seconds(product) for _ in range(5)) * sum(sizes.values()) / max(sizes.values())
    return total, f"the products alone take {1e3 * total:.1f} ms by the best of torch's, {note}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def run_evaluate(settings):
    kind, *_ = kind_of(settings.model)
    task, data = evaluation_data(settings.model, kind, settings.task, settings.data, settings.max_len, settings.split)
    engine = load(settings.model, settings.engine, settings.threads, say=to_stderr)
    match_classes(data, engine.model, settings.model)
    predictions_folder = make_folder(settings.predictions) if settings.predictions else None
    report = {"engine": engine.name, "layout": engine.layout, "task": task}
    if settings.agreement:
        from bench import agreement
        report["metrics"], predictions, report["agreement"] = agreement.compare(data, engine, settings.limit)
    else:
        report["metrics"], predictions = data.evaluate(engine, limit=settings.limit)
    print("\n".join([*data.notes(), f"{task}, engine {engine.name}: " + (
        ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items()) or "no labels to compare with")]))
    if predictions_folder:
        write_predictions(data, predictions, predictions_folder)
    if settings.agreement:
        print(agreement.sentence(report["agreement"]))
    return report


def run(settings):
    """Do what was typed; returns all figures."""
    if settings.text:
        return run_text(settings, load)
    if settings.embed is not None or settings.evaluate and settings.task in OF_VECTORS:
        opened = [load(path, engine, settings.threads, say=to_stderr) for path, engine in
                  ((settings.model, settings.engine), (settings.against, "auto")) if path]
        return (run_embed if settings.embed is not None else evaluate_vectors)(settings, *opened)
    if settings.evaluate:
        return run_evaluate(settings)
    from bench import benchmark, size
    return size.run_size(settings) if settings.size else benchmark.run_benchmark(settings)


def main(arguments=None):
    show_any_letter()
    settings = parse(arguments, __doc__, ("auto", *ENGINES))
    with in_one_sentence():
        check_place("--json", settings.json)
        report = run(settings)
        if settings.json:
            write_json(settings.json, report)


if __name__ == "__main__":
    main()
