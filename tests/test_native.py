"""Engine native: its sums against brute force, its floats against torch, its compiler, cache and threads."""
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
from ctypes import addressof
from dataclasses import replace
from pathlib import Path

import mutate_packed
import pytest
import torch
import torch.nn.functional as F

import infer_cpu
import model as network
import quant
from bench import agreement, benchmark
from formats import int8
from formats.model_directory import load, save
from model import InputError, ModelConfig
from native import build, weights
from native.weights import SCATTERED, STRIPES, WORDS, NativeError

ROOT = Path(infer_cpu.__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    return build.native_library(8, print)


def random_layer(out, columns, sparsity=0.8, block=(1, 1), bits=8, zero_point=37, seed=0):
    """A layer whose outputs are its integer sums: scales 1, bias 0; weights -128 to 127."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, columns), generator=generator, dtype=torch.int8)
    keep = torch.rand(-(-out // block[0]), -(-columns // block[1]), generator=generator) >= sparsity
    keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out, :columns]
    return quant.PackedLinear((out, columns), weight * keep, None, torch.ones(out), torch.zeros(out), torch.tensor(1.0),
                              torch.tensor(zero_point, dtype=torch.int32), bits)


def exact(library, layer, tokens, form, seed=1):
    """Are the sums those of int64? Two rows are extreme, and the inputs beyond the levels are clipped."""
    highest = 2 ** layer.bits - 1
    levels = torch.randint(0, highest + 1, (tokens, layer.shape[1]), generator=torch.Generator().manual_seed(seed))
    levels[0], levels[-1] = highest, 0
    x = (levels - layer.input_zero_point).float()
    x[levels == highest] = 1e30
    brute = (levels - layer.input_zero_point) @ layer.values.long().T
    y = weights.native_linear(library, layer, form)[0](x)
    return y.shape == brute.shape and torch.equal(y, brute.float())         # float32 of an integer: rounded alike


# ---------------------------------------------------------------- sums

@pytest.mark.parametrize("form", (WORDS, STRIPES, SCATTERED, None))
@pytest.mark.parametrize("out, columns, tokens", [(1, 1, 1), (4, 4, 2), (7, 13, 65), (97, 801, 33), (200, 36, 129),
                                                  (3, 1540, 64), (96, 768, 16), (100, 770, 47), (388, 16, 1)])
def test_sums_are_exact_for_every_shape(library, form, out, columns, tokens):
    for sparsity in (0.0, 0.5, 0.8, 0.99):
        assert exact(library, random_layer(out, columns, sparsity), tokens, form), sparsity


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (4, 4), (2, 1), (1, 2), (8, 8)])
def test_every_pattern_is_exact_in_the_form_that_is_chosen(library, block):
    layer = random_layer(96, 104, 0.8, block)
    assert exact(library, layer, 70, None)
    form = weights.native_weights(library, [layer]).form
    assert form == {(1, 4): WORDS, (1, 2): form}.get(block, STRIPES)
    assert weights.native_weights(library, [random_layer(96, 800, 0.9)]).form == SCATTERED


@pytest.mark.parametrize("form", (WORDS, STRIPES, SCATTERED))
@pytest.mark.parametrize("bits, zero_point", [(8, 0), (8, 255), (7, 127), (2, 1)])
def test_extreme_weights_levels_and_zero_points(library, form, bits, zero_point):
    layer = random_layer(12, 2000, 0.0, bits=bits, zero_point=zero_point)
    for value in (-128, 127):
        assert exact(library, replace(layer, values=torch.full((12, 2000), value, dtype=torch.int8)), 20, form)
    assert exact(library, replace(layer, values=torch.zeros(12, 2000, dtype=torch.int8)), 20, form)     # nothing lives
    rows = layer.values.clone()
    rows[::2] = 0
    assert exact(library, replace(layer, values=rows), 20, form)                                        # empty rows


def test_scale_bias_and_rounding_are_the_oracles(library):
    layer = replace(random_layer(24, 36, 0.5), weight_scale=torch.rand(24) + 0.01, bias=torch.randn(24),
                    input_scale=torch.tensor(0.013))
    x = 2 * torch.randn(3, 11, 36, generator=torch.Generator().manual_seed(2))
    for form in range(3):
        product, size = weights.native_linear(library, layer, form)
        assert torch.allclose(product(x), quant.integer_forward(x, layer), rtol=1e-6, atol=1e-5)
        assert torch.equal(product(x[:, 0]), product(x)[:, 0])
        assert size > 24 * 12
    ties = (torch.arange(-8, 28) + 0.5).float() * 1.0                        # half to even, as torch rounds
    whole = replace(random_layer(4, 36, 0.0, zero_point=10))
    assert torch.equal(weights.native_linear(library, whole)[0](ties[None]), quant.integer_forward(ties[None], whole))


@pytest.mark.parametrize("form", (WORDS, STRIPES, SCATTERED))
def test_gelu_and_the_next_layers_levels(library, form):
    check_gelu(library, form)


def check_gelu(library, form):
    """linear -> GELU -> levels, as the intermediate layer has it, against torch: at most one level off, and rarely."""
    tile, tokens = library.tokens_of_tile(), 150
    first = replace(random_layer(64, 32, 0.5), weight_scale=torch.full((64,), 2e-4), bias=torch.randn(64))
    second = replace(random_layer(8, 64), input_scale=torch.tensor(0.01), input_zero_point=torch.tensor(20).int())
    x = torch.randint(-37, 218, (tokens, 32), generator=torch.Generator().manual_seed(3)).float()
    expected = quant.quantize_activation(F.gelu(quant.integer_forward(x, first)), second.input_scale, 20, 8).long()
    own, following = (weights.native_weights(library, [layer], form) for layer in (first, second))
    tiles = weights.to_tiles(x, tile)
    q, levels = (torch.empty(len(tiles) * tile * size, dtype=torch.uint8) for size in (32, 64))
    library.quantize(tokens, tiles.data_ptr(), q.data_ptr(), addressof(own))
    library.linear(addressof(own), tokens, q.data_ptr(), None, levels.data_ptr(), addressof(following))
    # What the levels are is read by a layer of ones and zeros that hands each of them through.
    identity = replace(second, shape=(64, 64), values=torch.eye(64, dtype=torch.int8), weight_scale=torch.ones(64),
                       bias=torch.zeros(64), input_scale=torch.tensor(1.0))
    reader = weights.native_weights(library, [identity], form)
    y = torch.empty(len(tiles), 64, tile)
    library.linear(addressof(reader), tokens, levels.data_ptr(), y.data_ptr(), None, None)
    found = weights.from_tiles(y, tokens).long() + 20
    assert expected.unique().numel() > 100
    assert (found - expected).abs().max() <= 1 and (found != expected).float().mean() < 1e-3



HEADS = [(2, 12, [67, 5]), (3, 40, [1, 33, 7, 100, 64, 2]), (1, 64, [130]), (2, 32, [25, 9, 60]), (1, 4, [1]),
         (1, 100, [3, 31, 32, 65])]


@pytest.mark.parametrize("heads, size, lengths", HEADS)
def test_attention(library, heads, size, lengths):
    check_attention(library, heads, size, lengths, 1e-5)


def check_attention(library, heads, size, lengths, error):
    """Against float64, of all tokens and of each first one; `error` as a share of the largest number."""
    width, tokens = heads * size, sum(lengths)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    layer = replace(random_layer(3 * width, width, 0.5, zero_point=128),
                    weight_scale=torch.full((3 * width,), 5e-4 / width ** 0.5))
    x = torch.randint(-128, 128, (tokens, width), generator=torch.Generator().manual_seed(1)).float()
    own, tiles = weights.native_weights(library, [layer]), weights.to_tiles(x, library.tokens_of_tile())
    q = torch.empty(tiles.shape, dtype=torch.uint8)
    library.quantize(tokens, tiles.data_ptr(), q.data_ptr(), addressof(own))
    rows = quant.integer_forward(x, layer).double().view(-1, 3, heads, size)
    expected = torch.cat([F.scaled_dot_product_attention(*part.permute(1, 2, 0, 3)).transpose(0, 1).reshape(-1, width)
                          for part in rows.split(lengths)])
    assert tokens == 1 or 1 < (rows[:, 0, 0] @ rows[:, 1, 0].T / size ** 0.5).std() < 10           # scores that matter
    for first_only, places in ((0, torch.arange(tokens)), (1, starts[:-1])):
        context = torch.full_like(tiles, 7.0)
        library.attention(addressof(own), tokens, q.data_ptr(), len(lengths), starts.data_ptr(), heads, size, first_only,
                          context.data_ptr(), (ctypes.c_double * 2)())
        found = weights.from_tiles(context, tokens).double()[places]
        assert (found - expected[places]).abs().max() < error * expected.abs().max()


# ---------------------------------------------------------------- instruction sets

SETS = {"AVX2, 7 bits": (["-mavx2", "-mfma", "-DACTIVATION_BITS=7"], "avx2", 7),
        "AVX2, 8 bits": (["-mavx2", "-mfma", "-DACTIVATION_BITS=8"], "avx2", 8),
        "AVX-VNNI": (["-mavx2", "-mfma", "-mavxvnni", "-DACTIVATION_BITS=8"], "avx_vnni", 8),
        "AVX-512 VNNI": (["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mfma", "-DACTIVATION_BITS=8"], "avx512_vnni", 8),
        "plain C++": (["-DPORTABLE", "-DACTIVATION_BITS=8"], "", 8)}


@pytest.mark.skipif(not X86, reason="instruction sets of x86")
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_compiles_and_those_of_this_cpu_are_exact(name, tmp_path):
    options, flag, bits = SETS[name]
    path = build.compile_native(tmp_path, "kernel", [*options, "-O0"])
    if flag not in " ".join(build.processor()).split() and flag:
        pytest.skip(f"compiled; this CPU has no {flag}")
    library = build.open_native(path)
    assert library.instructions().decode() == name.partition(",")[0]
    assert build.wrong_floats(library) == []
    for library.portable in (0, 1):
        for form in range(3):
            assert exact(library, random_layer(39, 803, 0.5, bits=bits), 70, form), (library.portable, form)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler for ARM")
@pytest.mark.parametrize("extension", ["dotprod", "dotprod+i8mm", "nodotprod"])
def test_it_compiles_for_arm(extension, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    build.compile_native(tmp_path, "kernel", [f"-march=armv8.2-a+{extension}", "-DACTIVATION_BITS=8", "-O0"])


# ---------------------------------------------------------------- compiler, cache, self check

def test_it_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.native_library(8, pytest.fail)
    file, = (tmp_path / "prune-once-for-all").iterdir()
    monkeypatch.setattr(build, "compile_native", lambda *_: pytest.fail("compiled again"))
    build.native_library(8, pytest.fail)
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setattr(build, "processor", lambda: ["another CPU"])
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        build.native_library(8, pytest.fail)


@pytest.mark.parametrize("edited", build.SOURCES)
def test_an_edit_of_any_source_compiles_anew(edited, library, tmp_path, monkeypatch):
    for name in build.SOURCES:
        (tmp_path / name).write_text((ROOT / "native" / name).read_text() + "// edited\n" * (name == edited))
    monkeypatch.setattr(build, "HOME", tmp_path)
    monkeypatch.setattr(build, "compile_native", lambda *_: pytest.fail("compiled again"))
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        build.native_library(8, pytest.fail)


def test_every_source_is_named():
    """What is compiled includes no file of ours that the library's name does not cover."""
    included = {line.split('"')[1] for name in build.SOURCES
                for line in (ROOT / "native" / name).read_text().splitlines() if line.startswith('#include "')}
    assert included | {build.SOURCES[-1]} == set(build.SOURCES) == {
        path.name for path in (ROOT / "native").iterdir() if path.suffix in (".h", ".cpp")}


def test_without_a_cache_it_says_so_and_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = []
    library = build.native_library(8, said.append)
    assert len(said) == 1 and "cache" in said[0] and exact(library, random_layer(8, 8), 3, None)


@pytest.mark.parametrize("compiler, word", [("no-such-compiler", "no no-such-compiler"), ("false", "false"),
                                            ('c++ "', "is no command"),
                                            ("sh -c 'echo error: it is broken >&2; exit 1'", "it is broken")])
def test_without_a_compiler_torch_takes_over(model_directory, tmp_path, monkeypatch, compiler, word):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(InputError, match=word):
        infer_cpu.load(model_directory, "native", say=pytest.fail)
    said = []
    engine = infer_cpu.load(model_directory, "auto", say=said.append)
    assert engine.name in ("int8", "sparse") and word in said[0] and "torch take over" in said[0]
    assert list((tmp_path / "prune-once-for-all").glob("*")) == []                      # nothing half-written


def broken_source(monkeypatch, tmp_path, *replacements):
    """The sources with something wrong in them, where they will be looked for."""
    sources = {name: (ROOT / "native" / name).read_text() for name in build.SOURCES}
    for right, wrong in replacements:
        assert sum(right in source for source in sources.values()) == 1
        sources = {name: source.replace(right, wrong) for name, source in sources.items()}
    for name, source in sources.items():
        (tmp_path / name).write_text('#pragma GCC optimize("O0")\n' + source)                  # compiles sooner
    monkeypatch.setattr(build, "HOME", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_wrong_instructions_are_found_out_and_plain_cpp_takes_their_place(tmp_path, monkeypatch):
    broken_source(monkeypatch, tmp_path, ("M::dot(s[o][v], x[v]", "dot_of<M>(s[o][v], x[v]"),
                  ("// Linear layers.", "template <class M> static ints dot_of(ints s, ints x, ints w) { return "
                   "M::dot(s, x, w) + (std::is_same<M, Portable>::value ? 0 : 1); }\n// Linear layers."))
    said = []
    library = build.native_library(8, said.append)
    assert said and "wrong sums" in said[0] and "stripes" in said[0] and "words" not in said[0]
    assert library.portable == 1 and exact(library, random_layer(40, 60), 20, STRIPES)


@pytest.mark.parametrize("right, wrong, word", [
    ("for (int o = 0; o < 4; o++)\n            for (int v = 0; v < N; v++) s[o][v] = M",
     "for (int o = 0; o < 3; o++)\n            for (int v = 0; v < N; v++) s[o][v] = M", "sums"),
    ("total[v] += *p;", "total[v] += 2.0f * *p;", "attention"),
    ("sum[v] /= (float)features;", "sum[v] /= (float)(features + 1);", "layer norms")])
def test_what_is_wrong_in_plain_cpp_too_is_not_used(tmp_path, monkeypatch, right, wrong, word):
    broken_source(monkeypatch, tmp_path, (right, wrong))
    with pytest.raises(NativeError, match=f"wrong {word}"):
        build.native_library(8, lambda line: None)


def test_threads_beside_those_of_torch_are_refused(tmp_path, monkeypatch):
    broken_source(monkeypatch, tmp_path, ("// Linear layers.", 'extern "C" int omp_get_max_threads() { return 2; }\n'
                                          '//'))
    with pytest.raises(NativeError, match="beside torch's own"):
        build.native_library(8, pytest.fail)


# ---------------------------------------------------------------- whole models

def write_model(directory, kind="classification", model_type="bert", block=(1, 4), sparsity=0.8, **sizes):
    """A quantized model with random weights and honest activation ranges."""
    torch.manual_seed(0)
    config = ModelConfig(**{"model_type": model_type, "vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 3,
                            "num_attention_heads": 3, "intermediate_size": 104, "max_position_embeddings": 160,
                            "type_vocab_size": 2 * (model_type == "bert"), "initializer_range": 0.2, **sizes})
    model = network.build(config, kind, 3)
    for _, layer in network.linears(model):
        torch.nn.init.normal_(layer.bias, std=0.1)
        if layer.prunable and sparsity:
            keep = torch.rand(layer.out_features // block[0], layer.in_features // block[1]) >= sparsity
            layer.mask.copy_(keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
    quant.prepare(model, 8)
    quant.round_embeddings(model)
    batch = random_batch(config)
    model.train()
    network.set_dropout(model, 0.0)
    model(**batch)
    quant.update_ranges(model)
    directory.mkdir(exist_ok=True)
    save(model, directory, None, {"activation_bits": 8, "weight_scales": "row"})
    int8.write_int8(model, directory)
    return directory


def random_batch(config, rows=9, length=70, seed=5):
    """Rows of 1 to `length` tokens, one of them full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = length, 1
    mask = (torch.arange(length) < lengths[:, None]).long()
    types = torch.randint(0, max(config.type_vocab_size, 1), (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("native") / "model")


@pytest.mark.parametrize("kind", ["classification", "span"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("block, sparsity", [((1, 4), 0.8), ((4, 1), 0.8), ((1, 1), 0.9), ((1, 1), 0.0)])
def test_it_computes_what_the_fake_quantized_model_computes(tmp_path, kind, model_type, block, sparsity):
    directory = write_model(tmp_path, kind, model_type, block, sparsity)
    engine = infer_cpu.load(directory, "native", say=pytest.fail)
    batch = random_batch(engine.model.config)
    real = batch["attention_mask"].bool()
    found, expected = engine(batch), agreement.fake_quant_model(directory)(batch)
    if kind == "span":
        assert found[0].shape == real.shape
        found, expected = (torch.stack(pair)[:, real] for pair in (found, expected))
    deviation = (found - expected).abs()
    assert found.shape == expected.shape and expected.std() > 0.1
    assert deviation.mean() < 0.02 * expected.std() and deviation.max() < 0.3 * expected.std()


def test_embeddings_in_float32_and_other_layouts_of_a_batch(tmp_path, model_directory):
    directory = write_model(tmp_path)
    model = load(directory, "classification")
    quant.prepare(model, 8)
    int8.write_int8(model, directory, embedding_rows="float32")
    batch = random_batch(model.config)
    first, second = (infer_cpu.load(path, "native", say=pytest.fail) for path in (model_directory, directory))
    assert torch.allclose(first(batch), second(batch), atol=1e-3)
    strided = {name: tensor.t().contiguous().t() for name, tensor in batch.items()}
    assert torch.equal(first(strided), first(batch))


def test_a_row_does_not_depend_on_its_batch_or_on_padding(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batch = random_batch(engine.model.config)
    together = engine(batch)
    for row in range(len(together)):
        length = int(batch["attention_mask"][row].sum())
        alone = engine({name: tensor[row:row + 1, :length] for name, tensor in batch.items()})
        assert torch.equal(alone[0], together[row])


def test_the_last_layer_of_a_classifier_for_first_tokens_alone(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batch, encoder = random_batch(engine.model.config), engine.model.encoder.kernel
    short = encoder(**batch)
    encoder.first_token_only = False
    whole = encoder(**batch)
    real = batch["attention_mask"].bool()
    assert torch.allclose(short[:, 0], whole[:, 0], atol=1e-6) and not whole[~real].any() and whole[real].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_defaults_are_not_its(model_directory, tmp_path, dtype):
    """Whatever number is the default of a process, in which an engine is loaded or called."""
    spans = write_model(tmp_path, "span")
    engines = [infer_cpu.load(directory, "native", say=pytest.fail) for directory in (model_directory, spans)]
    batch = random_batch(engines[0].model.config)
    expected = [engine(batch) for engine in engines]
    torch.set_default_dtype(dtype)
    try:
        found = [engine(batch) for engine in engines]
        assert build.wrong_floats(engines[0].model.encoder.kernel.library) == []
        assert not build.wrong_forms(engines[0].model.encoder.kernel.library, 7, (WORDS, STRIPES))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1]))


def test_odd_batches(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batch = random_batch(engine.model.config)
    assert engine({name: tensor[:0] for name, tensor in batch.items()}).shape == (0, 3)
    for name, value, word in (("input_ids", 200, "200"), ("input_ids", -1, "-1"), ("token_type_ids", 2, "2")):
        wrong = {**batch, name: batch[name].clone()}
        wrong[name][0, 3] = value
        with pytest.raises(InputError, match=word):
            engine(wrong)
    with pytest.raises(InputError, match="first token"):
        engine({**batch, "attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(InputError, match="positions"):
        engine({name: tensor.repeat(1, 3) for name, tensor in batch.items()})
    with pytest.raises(InputError, match="rows of tokens"):
        engine({name: tensor[:, :0] for name, tensor in batch.items()})


def test_sizes_it_does_not_take_are_left_to_torch(tmp_path):
    directory = write_model(tmp_path, hidden_size=42, num_attention_heads=3, sparsity=0.8, block=(1, 1))
    with pytest.raises(NativeError, match="multiples of four"):
        infer_cpu.load(directory, "native", say=pytest.fail)
    said = []
    assert infer_cpu.load(directory, "auto", say=said.append).name in ("int8", "sparse") and "four" in said[0]


def test_layers_that_round_a_common_input_differently_are_left_to_torch(library):
    layer = random_layer(8, 8)
    with pytest.raises(NativeError, match="query, key and value"):
        weights.native_weights(library, [layer, replace(layer, input_scale=torch.tensor(2.0))])


def test_auto_says_what_it_measured(model_directory):
    said = []
    engine = infer_cpu.load(model_directory, "auto", say=said.append)
    assert said[-1].startswith(f"engine {engine.name}: ") and " ms" in said[-1]


def ours():
    """Which of the two auto takes."""
    return "tiles" if build.native_library(8, print, tiles=None).tiles else "native"


@pytest.mark.parametrize("best", ["ours", "int8", "sparse"])
def test_auto_takes_the_fastest(model_directory, monkeypatch, best):
    """Whole engines are timed, where native alone does not beat torch's bare products."""
    best = ours() if best == "ours" else best
    monkeypatch.setattr(infer_cpu, "products_of_torch", lambda *_: (0.0, "no time at all"))
    monkeypatch.setattr(infer_cpu, "medians_in_turn", lambda engines, *_, **__: {
        engine.name: 0.001 if engine.name == best else 0.002 for engine in engines})
    said = []
    assert infer_cpu.load(model_directory, "auto", say=said.append).name == best
    assert said[-1].startswith(f"engine {best}: the fastest one here") and f"{best} 1.0 ms" in said[-1]


def test_auto_does_not_need_the_engines_of_torch(model_directory, monkeypatch):
    def fastest(*_):
        raise InputError("torch has no exact INT8 product for this machine")

    monkeypatch.setattr(infer_cpu, "fastest", fastest)
    said = []
    assert infer_cpu.load(model_directory, "auto", say=said.append).name == ours()
    assert len(said) == 1 and said[0].startswith(f"engine {ours()}: ") and "torch has no exact INT8 product" in said[0]


# ---------------------------------------------------------------- threads and memory

def test_results_do_not_depend_on_the_number_of_threads(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batch, before = random_batch(engine.model.config), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(engine(batch))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_two_threads_may_call_one_engine(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batches = [random_batch(engine.model.config, rows, seed=rows) for rows in (3, 8)]
    expected, wrong = [engine(batch) for batch in batches], []

    def call(batch, result):
        wrong.extend(number for number in range(40) if not torch.equal(engine(batch), result))
    threads = [threading.Thread(target=call, args=pair) for pair in zip(batches, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_calls_leak_nothing(model_directory):
    engine = infer_cpu.load(model_directory, "native", say=pytest.fail)
    batch = random_batch(engine.model.config, 2, 20)

    def resident_after(calls):
        for _ in range(calls):
            engine(batch)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before = resident_after(50)
    calls = int(os.environ.get("CALLS", 300))                           # CALLS=10000 for the long run
    assert resident_after(calls) - before < 2 ** 20


def test_it_runs_in_torchs_own_threads(model_directory):
    """In a fresh process: one OpenMP library, also after both have worked."""
    program = ("import sys; sys.path.insert(0, sys.argv[1]); import infer_cpu, torch; from native import build; "
               "engine = infer_cpu.load(sys.argv[2], 'native'); torch.randn(500, 500) @ torch.randn(500, 500); "
               "build.open_native(engine.model.encoder.kernel.library._name)")
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(model_directory)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- damaged files

def test_a_damaged_file_is_an_error_and_never_a_crash(tmp_path):
    """The same with 10,000 files: python tests/mutate_packed.py --count 10000"""
    counts = mutate_packed.run(tmp_path, count=60)
    assert sum(counts.values()) == 60 and counts["refused"] > 20 and counts["ran"] > 0
