"""Tile registers (AMX): emulated in plain C++ everywhere, and as they are where this CPU has any."""
import random
import shutil
import subprocess
from ctypes import addressof
from dataclasses import replace

import pytest
import torch
from test_native import (HEADS, ROOT, X86, broken_source, check_attention, check_gelu, exact, model_directory,  # noqa
                         random_batch, random_layer, write_model)

import infer_cpu
from bench import benchmark
from formats import int8
from model import InputError
from native import build, weights
from native.weights import GATHERED_TILES, SCATTERED, STRIPES, WHOLE_TILES, WORDS, NativeError

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
EMULATED = ["-DPORTABLE", "-DEMULATED", "-DACTIVATION_BITS=8", "-O1",
            "-include", str(ROOT / "tests" / "emulated_tiles.h")]
TILES = (WHOLE_TILES, GATHERED_TILES)


@pytest.fixture(scope="module", params=["emulated", "real"])
def on_tiles(request, tmp_path_factory):
    """The library as it is on a CPU with tile registers: these in plain C++; and as they are, where this CPU has any."""
    if request.param == "real":
        try:
            library = build.native_library(8, pytest.fail, tiles=True)
        except NativeError as error:
            pytest.skip(str(error))
    else:
        library = build.open_native(build.compile_native(tmp_path_factory.mktemp("emulated"), "kernel", EMULATED))
        build.check_sums(library, 8, pytest.fail)
        build.use_tiles(library, 8, pytest.fail)
    assert weights.instructions(library) == "AMX"
    return library


@pytest.mark.parametrize("form", TILES)
@pytest.mark.parametrize("out, columns, tokens", [(1, 1, 1), (4, 4, 2), (7, 13, 65), (97, 801, 33), (200, 36, 129),
                                                  (3, 1540, 64), (96, 768, 16), (100, 770, 47), (388, 16, 1)])
def test_sums_on_tiles_are_exact_for_every_shape(on_tiles, form, out, columns, tokens):
    for sparsity in (0.0, 0.5, 0.8, 0.99, 1.0):
        assert exact(on_tiles, random_layer(out, columns, sparsity), tokens, form), sparsity


def test_sums_on_tiles_of_layers_at_random(on_tiles):
    generator = random.Random(0)
    for seed in range(150):
        block = generator.choice([(1, 1), (1, 4), (4, 1), (4, 4), (16, 4), (32, 4), (16, 1), (3, 5)])
        layer = random_layer(generator.randint(1, 150), generator.randint(1, 300), generator.random(), block,
                             zero_point=generator.randint(0, 255), seed=seed)
        assert exact(on_tiles, layer, generator.randint(1, 200), generator.choice(TILES), seed), (seed, block)


def test_on_tiles_only_what_lives_is_held_and_blocks_of_16x4_are_gathered(on_tiles):
    for block, form in (((1, 1), WHOLE_TILES), ((1, 4), WHOLE_TILES), ((4, 1), WHOLE_TILES), ((16, 4), GATHERED_TILES),
                        ((32, 4), GATHERED_TILES)):
        layer = random_layer(192, 512, 0.8, block)
        assert weights.native_weights(on_tiles, [layer]).form == form and exact(on_tiles, layer, 70, None)
        _, size = weights.native_linear(on_tiles, layer)
        lives, steps = int((layer.values != 0).sum()), 192 * 512 / 1024
        assert size <= lives + (128 + (form == GATHERED_TILES) * 32) * steps * (1 if form == WHOLE_TILES else 0.5) + 6e3
    assert weights.native_weights(on_tiles, [random_layer(64, 512, 0.0)]).form == WHOLE_TILES


@pytest.mark.parametrize("form", TILES)
@pytest.mark.parametrize("columns, tokens", [(100, 150), (64, 33), (132, 1), (16, 64)])
def test_after_gelu_levels_are_those_of_the_vectors(on_tiles, form, columns, tokens):
    """Bit by bit: what follows a sum does not depend on who made it."""
    generator = torch.Generator().manual_seed(4)
    first = replace(random_layer(96, columns, 0.7), weight_scale=torch.full((96,), 3e-4),
                    bias=torch.randn(96, generator=generator))
    second = replace(random_layer(8, 96), input_scale=torch.tensor(0.02), input_zero_point=torch.tensor(20).int())
    x = torch.randint(-37, 218, (tokens, columns), generator=generator).float()
    tile, following, found = on_tiles.tokens_of_tile(), weights.native_weights(on_tiles, [second], WORDS), []
    tiles = weights.to_tiles(x, tile)
    for layout in (WORDS, form):
        own = weights.native_weights(on_tiles, [first], layout)
        q, levels = (torch.empty(len(tiles) * tile * size, dtype=torch.uint8) for size in (columns, 96))
        on_tiles.quantize(tokens, tiles.data_ptr(), q.data_ptr(), addressof(own))
        on_tiles.linear(addressof(own), tokens, q.data_ptr(), None, levels.data_ptr(), addressof(following))
        found.append(levels.view(len(tiles), 24, tile, 4).transpose(1, 2).reshape(-1, 96)[:tokens])
    assert torch.equal(*found) and (tokens == 1 or found[0].unique().numel() > 50)


@pytest.mark.parametrize("heads, hidden", [(3, 48), (2, 40), (1, 64), (4, 128)])
@pytest.mark.parametrize("kind", ["classification", "span"])
@pytest.mark.parametrize("block, sparsity", [((1, 4), 0.8), ((1, 1), 0.9), ((8, 4), 0.8), ((1, 1), 0.0)])
def test_a_model_on_tiles_gives_what_it_gives_without(tmp_path, on_tiles, monkeypatch, kind, block, sparsity, heads,
                                                      hidden):
    """One library, its integers from vectors and from tiles, where only attention is not the same bit by bit."""
    directory = write_model(tmp_path, kind, block=block, sparsity=sparsity, num_attention_heads=heads,
                            hidden_size=hidden)
    plain, expected, others = build.open_native(on_tiles._name), [], []
    for library, found in ((plain, expected), (on_tiles, others)):
        model, packed, _ = int8.read_int8(directory)
        engine = infer_cpu.native_engine(directory, model, packed, library)
        found += [engine(random_batch(model.config, rows, seed=rows)) for rows in (2, 3, 23)]
    assert engine.name == "tiles" and "in tiles by AMX; there zeros save bytes, not multiplications" in engine.layout
    monkeypatch.setattr(benchmark, "ceiling", lambda library, form: float(form))
    parts = benchmark.where_time_goes(engine, random_batch(model.config, 2))
    assert {parts[name][3] for name in ("intermediate", "output")} <= set(TILES) and parts["intermediate"][2] > 0
    for one, other in zip(expected, others):
        one, other = torch.stack([*one]), torch.stack([*other])
        deviation = (one - other).abs()
        assert deviation.mean() < 0.05 * one.std() and deviation.max() < 0.5 * one.std()


def test_no_tile_registers_are_a_plain_refusal(model_directory, monkeypatch):
    library = build.native_library(8, print)
    if "amx_int8" not in " ".join(build.processor()).split():
        with pytest.raises(InputError, match="engine tiles needs tile registers.*use engine native"):
            infer_cpu.load(model_directory, "tiles", say=pytest.fail)
    monkeypatch.setattr(library, "request_tiles", lambda: 1, raising=False)
    with pytest.raises(NativeError, match="Operation not permitted"):
        build.use_tiles(library, 8, pytest.fail)


@pytest.mark.parametrize("right, wrong, word", [("_tile_dpbsud(3, 5, 7);", "_tile_dpbsud(3, 5, 6);", "(tiles, attention)"),
                                                ("_tile_loadd(5, b + 3 * STEP, ROW);", "", "(tiles, gathered tiles, attention)"),
                                                ("(int64_t)ROW, ROW);", "(int64_t)ROW, ROW / 2);", "(gathered tiles)"),
                                                ("_tile_loadd(7, low + SIDE", "_tile_loadd(7, low", "(attention)"),
                                                ("t >= end - lowest * BLOCK", "false", "(attention)")])
def test_wrong_sums_on_tiles_are_found_out_and_vectors_stay(right, wrong, word, tmp_path, monkeypatch):
    broken_source(monkeypatch, tmp_path, (right, wrong))
    library, said = build.open_native(build.compile_native(tmp_path, "kernel", EMULATED)), []
    build.use_tiles(library, 8, said.append)
    assert library.tiles == 0 and "wrong results" in said[0] and word in said[0]
    assert weights.native_weights(library, [random_layer(8, 8)]).form in (WORDS, STRIPES, SCATTERED)


@pytest.mark.skipif(not X86, reason="instructions of x86")
def test_the_real_instructions_compile(tmp_path):
    try:
        path = build.compile_native(tmp_path, "kernel", ["-march=sapphirerapids", "-DACTIVATION_BITS=8", "-O1"])
    except NativeError:
        pytest.skip("this compiler does not know them")
    if shutil.which("objdump"):
        text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
        assert text.count("tdpbsud") >= 8 and "tileloadd" in text and "vpexpandb" in text and "ldtilecfg" in text


@pytest.mark.parametrize("form", TILES)
def test_gelu_on_tiles(on_tiles, form):
    check_gelu(on_tiles, form)


@pytest.mark.parametrize("heads, size, lengths", HEADS)
def test_attention_on_tiles(on_tiles, heads, size, lengths):
    check_attention(on_tiles, heads, size, lengths, 5e-5)
