"""int8.safetensors: what it holds, in how many bytes, and that nothing damaged gets in; --size against a recount."""
import contextlib
import functools
import gc
import json
import math
import random
import re
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import infer_cpu
import model as network
import prune
import quant
from formats import files, int8, model_directory, safetensors
from model import InputError, ModelConfig


def recount(path):
    """(header object, bytes of the header, {tensor: its bytes}) from nothing but the file's bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    parts = {name: content[8 + length + entry["data_offsets"][0]:8 + length + entry["data_offsets"][1]]
             for name, entry in header.items() if name != "__metadata__"}
    assert sum(map(len, parts.values())) + 8 + length == len(content)
    return header, 8 + length, parts


def ready(config, kind="classification", masks=None, bits=8, seed=0):
    """A model with random weights, prepared; masks: function of a prunable layer and its number -> bool mask."""
    torch.manual_seed(seed)
    model = network.build(config, kind)
    quant.prepare(model, bits)
    for number, (_, layer) in enumerate(network.linears(model)):
        torch.nn.init.normal_(layer.bias)
        layer.act_range.copy_(torch.tensor([-2.0 - 0.1 * number, 3.0]))
        if layer.prunable and masks:
            layer.mask.copy_(masks(layer, number))
    return model.eval()


def written(directory, model, **options):
    """The model's directory; float32 file included."""
    model_directory.save(model, directory)
    int8.write_int8(model, directory, **options)
    return directory


def magnitude(pattern, sparsity):
    pattern = prune.parse_pattern(pattern)
    return lambda layer, number: prune.magnitude_mask(layer.weight, sparsity, pattern)


def batch(vocabulary=37, length=9):
    ids = torch.randint(0, vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask, (torch.arange(length) > 4).long().expand(3, length)


def integer_logits(directory):
    """Logits of a packed model with the integer oracle in every kernel slot."""
    model, packed, _ = int8.read_int8(directory)
    for name, layer in network.linears(model):
        layer.kernel = functools.partial(quant.integer_forward, packed=packed[name])
    with torch.inference_mode():
        return model(*batch())


SMALL = ModelConfig(vocab_size=37, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
                    max_position_embeddings=11, initializer_range=0.3)
ODD = ModelConfig(vocab_size=37, hidden_size=9, num_hidden_layers=2, num_attention_heads=3, intermediate_size=15,
                  max_position_embeddings=11, initializer_range=0.3)


# ---------------------------------------------------------------- masks as distances

def slow_gaps(packed):
    """The documented meaning of mask_gaps, bit by bit -> list of 0 and 1, the imagined last block included."""
    width, bits = packed[0], [byte >> place & 1 for byte in packed[1:] for place in range(8)]
    keep = []
    for begin in range(0, len(bits) - width + 1, width):
        number = sum(bit << place for place, bit in enumerate(bits[begin:begin + width]))
        keep += [0] * number + ([1] if number < 2 ** width - 1 else [])
    return keep[:1 + max(place for place, alive in enumerate(keep) if alive)]


@pytest.mark.parametrize("sparsity", [0, 0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1])
def test_gaps_and_back(sparsity):
    generator, widths = np.random.default_rng(int(100 * sparsity)), set()
    for size in [0, *range(1, 40), 255, 256, 257, 3000]:
        keep = torch.from_numpy(generator.random(size) >= sparsity)
        packed = int8.write_gaps(keep)
        widths.add(int(packed[0]))
        assert packed.dtype == torch.uint8 and torch.equal(int8.read_gaps(packed, size), keep)
        assert slow_gaps(packed.tolist()) == [*keep.int().tolist(), 1]
        for wrong in (size - 1, size + 1, 0 if size else 5, 10 ** 15):
            assert int8.read_gaps(packed, wrong) is None
        for broken in (packed[:0], packed[:1], packed[:-1], torch.cat([packed, packed[-1:]]),
                       torch.cat([torch.tensor([1], dtype=torch.uint8), packed[1:]]),
                       torch.cat([torch.tensor([9], dtype=torch.uint8), packed[1:]])):
            assert int8.read_gaps(broken, size) is None
    assert widths <= set(range(2, 9))


@pytest.mark.parametrize("sparsity, most", [(0.8, 0.80), (0.85, 0.67), (0.9, 0.51), (0.95, 0.32), (0.99, 0.09)])
def test_gaps_are_close_to_the_entropy(sparsity, most):
    keep = torch.from_numpy(np.random.default_rng(0).random(400_000) >= sparsity)
    bits = 8 * len(int8.write_gaps(keep)) / len(keep)
    entropy = -sparsity * math.log2(sparsity) - (1 - sparsity) * math.log2(1 - sparsity)
    assert entropy < bits < most and bits < 1.12 * entropy


# ---------------------------------------------------------------- round trips

@pytest.mark.parametrize("config, pattern, sparsity", [
    *[(ODD, "unstructured", sparsity) for sparsity in (0, 0.01, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99)],
    *[(ODD, pattern, 0.6) for pattern in ("3x1", "1x3", "3x3")], (ODD, "1:3", None), (ODD, "2:3", None),
    *[(SMALL, pattern, sparsity) for pattern in ("1x4", "4x1", "4x4", "2x2") for sparsity in (0.3, 0.8)],
    (SMALL, "2:4", None), (SMALL, "1:4", None)])
def test_what_is_read_is_what_was_packed(tmp_path, config, pattern, sparsity):
    share = prune.resolve_sparsity(sparsity, prune.parse_pattern(pattern))
    model = ready(config, masks=magnitude(pattern, share), bits=7)
    layers = dict(network.linears(model))
    layers["encoder.layers.1.query"].mask.zero_()                       # a layer of nothing but zeros
    layers["encoder.layers.1.key"].mask[:6] = False                     # rows of them
    read, packed, metadata = int8.read_int8(written(tmp_path, model))
    assert packed.keys() == layers.keys() and metadata["format_version"] == "2"
    x = torch.randn(5, config.hidden_size)
    for name, layer in layers.items():
        exact, found = quant.pack(layer), packed[name]
        assert (found.shape, found.bits, found.pattern) == (exact.shape, 7, exact.pattern)
        for field in ("values", "weight_scale", "bias", "input_scale", "input_zero_point"):
            assert torch.equal(getattr(found, field), getattr(exact, field)), (name, field)
        dense, _ = quant.quantize_weight((layer.weight * layer.mask).detach())
        assert torch.equal(quant.unpack(found), dense)
        keep = quant.unpack_mask(found)
        if keep is None:
            assert layer.mask.all()
        else:
            assert torch.equal(torch.kron(keep.int(), torch.ones(found.values.shape[1:], dtype=torch.int)).bool(),
                               layer.mask)
        if layer.in_features == config.hidden_size:
            assert torch.equal(quant.integer_forward(x, found), quant.integer_forward(x, exact))
    expected = "dense" if share in (0, 0.01) else pattern if "x" in pattern else "unstructured"
    assert packed["encoder.layers.0.intermediate"].pattern == expected or share == 0.01
    assert packed["encoder.layers.1.query"].values.numel() == 0


@pytest.mark.parametrize("model_type, kind", [("bert", "pretraining"), ("distilbert", "pretraining"),
                                              ("distilbert", "classification"), ("bert", "span")])
def test_every_kind_of_model_comes_back(tmp_path, model_type, kind):
    config = ModelConfig(**{**vars(SMALL), "model_type": model_type, "type_vocab_size": 2 * (model_type == "bert")})
    model = ready(config, kind, magnitude("1x4", 0.8))
    read, packed, _ = int8.read_int8(written(tmp_path, model))
    assert type(read) is type(model) and len(packed) == len(network.linears(model))
    if kind == "pretraining":
        weight, bias = read.vocabulary()
        quant.round_embeddings(model)
        assert torch.equal(weight, model.encoder.word.weight) and torch.equal(bias, model.bias)


def test_embeddings_are_rows_of_int8_and_outputs_stay_close(tmp_path):
    config = ModelConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=128, max_position_embeddings=40, initializer_range=0.1)
    model = ready(config, masks=magnitude("unstructured", 0.85))
    directories = [tmp_path / "int8", tmp_path / "float32"]
    for directory in directories:
        written(directory, model, embedding_rows=directory.name)
    rounded, plain = (int8.read_int8(directory)[0].encoder for directory in directories)
    for name in ("word", "position", "token_type"):
        before, after = getattr(model.encoder, name).weight, getattr(rounded, name)
        assert torch.equal(getattr(plain, name).weight, before)
        assert after.values.dtype == torch.int8 and after.values.shape == before.shape
        step = before.detach().abs().amax(1, keepdim=True) / 127
        assert ((after.weight - before).abs() <= 0.5001 * step).all() and not torch.equal(after.weight, before)
        ids = torch.tensor([[0, len(before) - 1], [1, 0]])
        assert torch.equal(after(ids), after.weight[ids])
    rounded, plain = (integer_logits(directory) for directory in directories)
    assert 0 < (rounded - plain).abs().mean() < 0.05 * plain.std()
    parts = [recount(directory / "int8.safetensors")[2] for directory in directories]
    sizes = [sum(len(part) for name, part in found.items() if "embeddings.w" in name or "_embeddings" in name)
             for found in parts]
    assert sizes == [542 * (64 + 4), 542 * 64 * 4]
    with pytest.raises(InputError, match="float16"):
        int8.write_int8(model, tmp_path, embedding_rows="float16")
    model.encoder.word.weight.data[3, 3] = float("nan")
    with pytest.raises(InputError, match="word_embeddings.weight.*NaN"):
        int8.write_int8(model, tmp_path)


# ---------------------------------------------------------------- how many bytes

@pytest.fixture(scope="module")
def wide():
    """One layer of BERT-Base's sizes."""
    return ready(ModelConfig(vocab_size=30, num_hidden_layers=1, max_position_embeddings=16))


@pytest.mark.parametrize("pattern, sparsity, mask", [
    ("unstructured", 0.85, "mask_gaps"), ("unstructured", 0.9, "mask_gaps"), ("1x4", 0.8, "mask_gaps"),
    ("4x4", 0.8, "mask_gaps"), ("2:4", 0.5, "mask_bits"), ("unstructured", 0.0, None)])
def test_encoder_is_within_5_percent_of_mask_bits_and_value_bytes(wide, tmp_path, pattern, sparsity, mask):
    parsed, bound = prune.parse_pattern(pattern), 0
    for name, layer in network.linears(wide):
        layer.mask.fill_(True)
        if layer.prunable:
            layer.mask.copy_(prune.magnitude_mask(layer.weight, sparsity, parsed))
        if name.startswith("encoder.layers"):
            bound += int(layer.mask.sum())
            bound += layer.mask.numel() // (8 * parsed.rows * parsed.columns) if sparsity else 0
    int8.write_int8(wide, tmp_path)
    header, _, parts = recount(tmp_path / "int8.safetensors")
    # Everything of those layers but their norms, the header's words about them too.
    stored = sum(len(part) + len(json.dumps({name: header[name]})) for name, part in parts.items()
                 if "encoder.layer." in name and "LayerNorm" not in name)
    assert stored <= 1.05 * bound
    assert {name.rpartition(".")[2] for name in parts if "mask" in name} == ({mask} if mask else set())
    assert stored < 0.91 * bound or pattern != "unstructured" or not mask       # distances are much shorter than bits


@contextlib.contextmanager
def at_most(megabytes):
    """AssertionError if this process comes to hold more than so much beside what it holds now (on Linux, which can
    forget an earlier peak)."""
    def peak():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    status = Path("/proc/self/status")
    if not status.is_file():
        yield
        return
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert peak() - before < megabytes


def test_reading_is_fast_and_takes_little_memory(wide, tmp_path):
    for _, layer in network.linears(wide):
        layer.mask.copy_(prune.magnitude_mask(layer.weight, 0.9))
    written(tmp_path, wide)
    int8.read_int8(tmp_path)                                           # what torch imports the first time
    begin = time.process_time()
    with at_most(20):
        model, packed, _ = int8.read_int8(tmp_path)
    assert time.process_time() - begin < 0.5                            # 0.03 s; a loop over 700,000 weights: 10
    assert all(layer.weight.is_meta for _, layer in network.linears(model))
    held = sum(getattr(layer, name).nbytes for layer in packed.values() for name in ("values", "mask_bits"))
    assert held < 0.25 * sum(math.prod(layer.shape) for layer in packed.values())


# ---------------------------------------------------------------- damage

@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A directory whose file has a mask of bits, of distances, none, and int8 embeddings."""
    def masks(layer, number):
        if number == 1:
            return torch.ones_like(layer.mask)
        return prune.magnitude_mask(layer.weight, 0.4 if number == 0 else 0.9)
    directory = written(tmp_path_factory.mktemp("victim"), ready(SMALL, masks=masks))
    parts = recount(directory / "int8.safetensors")[2]
    assert {name.rpartition(".")[2] for name in parts} >= {"mask_bits", "mask_gaps", "values", "weight_scale"}
    return directory


HUGE = (-1, 0, 1, 3, 255, 2 ** 31, 2 ** 40, 2 ** 61, 2 ** 63, 10 ** 30, 1.5, True, None, "4", [], {}, [4])


def mutate_header(header, generator):
    """Change one entry of a header: a number, a dtype, a name, a list's length, or the metadata."""
    names = [name for name in header if name != "__metadata__"]
    entry, choice = header[generator.choice(names)], generator.randrange(8)
    if choice == 0:
        entry["shape"] = generator.choice([[generator.choice(HUGE)], [2 ** 31, 2 ** 31, 0], [2 ** 61, 0, 1],
                                           entry["shape"] + [1], entry["shape"][1:], entry["shape"][::-1] + [1, 1],
                                           "", {}, None, 7, [1] * 70 + entry["shape"]])
    elif choice == 1 and entry["shape"]:
        entry["shape"][generator.randrange(len(entry["shape"]))] = generator.choice(HUGE)
    elif choice == 2:
        entry["data_offsets"][generator.randrange(2)] = generator.choice(HUGE)
    elif choice == 3:
        entry["data_offsets"] = generator.choice([[], [0], [0, 0, 0], [0, 0], "ab", None, {"a": 1, "b": 2}])
    elif choice == 4:
        entry["dtype"] = generator.choice([*safetensors.DTYPES, "F8", "", None, [], {}])
    elif choice == 5:
        header[generator.choice(["x", "", *names])] = header.pop(generator.choice(names))
    elif choice == 6:
        header["__metadata__"] = generator.choice([None, [], "x", 3, {}, {"format_version": 2},
                                                   {**header["__metadata__"], "activation_bits": [8]}])
    else:
        entry.pop(generator.choice(list(entry)))


def mutate(content, generator):
    """One seeded mutation of a file: its header's JSON, a few bytes, its length, or a piece moved."""
    length, choice = int.from_bytes(content[:8], "little"), generator.randrange(6)
    if choice <= 2:
        header = json.loads(content[8:8 + length])
        mutate_header(header, generator)
        head = json.dumps(header).encode()
        return len(head).to_bytes(8, "little") + head + content[8 + length:]
    changed = bytearray(content)
    if choice == 3:
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(8 + length)] = generator.randrange(256)
    elif choice == 4:
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    else:
        begin = generator.randrange(len(changed))
        changed[begin:begin + generator.randint(1, 60)] = bytes(generator.randint(0, 20))
    return bytes(changed)


def test_no_mutation_crashes_the_reader_or_takes_memory(victim, tmp_path):
    content = (victim / "int8.safetensors").read_bytes()
    path, generator, refused = tmp_path / "int8.safetensors", random.Random(0), 0
    (tmp_path / "config.json").write_bytes((victim / "config.json").read_bytes())
    with at_most(20):
        for number in range(400):
            path.write_bytes(mutate(content, generator))
            try:
                _, packed, _ = int8.read_int8(tmp_path)
            except InputError as error:
                refused += 1
                assert "int8.safetensors" in str(error) and "\n" not in str(error), number
            else:       # a change that a file cannot show: of a weight's value, or of nothing
                assert all(quant.unpack(layer).shape == layer.shape for layer in packed.values()), number
    assert 270 < refused < 400


@pytest.mark.parametrize("shape", [[2 ** 61, 2 ** 61, 0], [0, 2 ** 61, 4], [0, 2 ** 40, 2 ** 40], [0] * 70, "", {}, 0])
def test_an_empty_tensor_of_a_strange_shape(victim, tmp_path, shape):
    content = (victim / "int8.safetensors").read_bytes()
    header, length, parts = recount(victim / "int8.safetensors")
    end = sum(map(len, parts.values()))
    header["more"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    head = json.dumps(header).encode()
    (tmp_path / "int8.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + content[length:])
    (tmp_path / "config.json").write_bytes((victim / "config.json").read_bytes())
    with pytest.raises(InputError, match="int8.safetensors.*'more'"):
        int8.read_int8(tmp_path)


@pytest.mark.parametrize("key, value, word", [
    ("num_hidden_layers", 2 ** 31, "tensors"), ("num_hidden_layers", 3, "layer.2"), ("num_hidden_layers", 1, "layer.1"),
    ("hidden_size", 2 ** 31, "overflow"), ("hidden_size", 60_000, "expected"),
    ("intermediate_size", 2 ** 30, "overflow"),
    ("vocab_size", 2 ** 31, "word_embeddings"), ("max_position_embeddings", 2 ** 31, "position_embeddings"),
    ("type_vocab_size", 2 ** 31, "token_type"), ("architectures", [{}], "architectures"),
    ("architectures", ["BertForQuestionAnswering"], "qa_outputs")])
def test_a_config_that_claims_something_else(victim, tmp_path, key, value, word):
    (tmp_path / "int8.safetensors").write_bytes((victim / "int8.safetensors").read_bytes())
    config = json.loads((victim / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    begin = time.process_time()
    with pytest.raises(InputError, match=word):
        int8.read_int8(tmp_path)
    assert time.process_time() - begin < 1


def test_an_older_version_is_one_sentence(victim, tmp_path, capsys):
    tensors, metadata = safetensors.read_safetensors(victim / "int8.safetensors")
    safetensors.write_safetensors(tmp_path / "int8.safetensors", tensors, {**metadata, "format_version": "1"})
    (tmp_path / "config.json").write_bytes((victim / "config.json").read_bytes())
    with pytest.raises(SystemExit) as stopped:
        infer_cpu.main([str(tmp_path), "--size"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert "format_version '1'" in message and "--stage quantize" in message


# ---------------------------------------------------------------- --size

KIND_OF = [         # of a published name, in BERT and in DistilBERT; the first that fits
    (r"LayerNorm|layer_norm|bias$", "norms and biases"), (r"embeddings\.", "embeddings"),
    (r"attention\.(self\.query|q_lin)\.", "query"), (r"attention\.(self\.key|k_lin)\.", "key"),
    (r"attention\.(self\.value|v_lin)\.", "value"), (r"attention\.(output\.dense|out_lin)\.", "attention output"),
    (r"(intermediate\.dense|lin1)\.", "intermediate"), (r"(output\.dense|lin2)\.", "output"),
    (r"pooler", "pooler"), (r"", "heads")]
ENCODER = ["query", "key", "value", "attention output", "intermediate", "output"]


def kind_of(name):
    return next(kind for pattern, kind in KIND_OF if re.search(pattern, name))


def report_of(directory, capsys, *flags):
    """The JSON that --size writes; its table must name the same numbers."""
    infer_cpu.main([*map(str, flags or [directory]), "--size", "--json", str(directory / "size.json")])
    printed, report = capsys.readouterr().out, json.loads((directory / "size.json").read_text())
    for row in [*report["kinds"].values(), report["encoder"], report["tensors"]]:
        assert all(f" {value:,}" in printed for value in row.values())
    for key in ("file_bytes", "header_bytes", "zip_bytes", "dense_file_bytes"):
        assert f" {report[key]:,}" in printed
    return report, printed


def check_against(report, path):
    """Every figure of a report on an int8 file, recounted from the file's bytes."""
    header, head, parts = recount(path)
    totals = {}
    for name, part in parts.items():
        leaf = name.rpartition(".")[2]
        row = totals.setdefault(kind_of(name), dict.fromkeys(("value", "mask", "scale", "stored"), 0))
        row["mask" if "mask" in leaf else "scale" if "scale" in leaf or "point" in leaf else "value"] += len(part)
        row["stored"] += len(part)
    assert totals.keys() == report["kinds"].keys()
    for kind, row in totals.items():
        assert {part: report["kinds"][kind][part + "_bytes"] for part in row} == row
    assert report["header_bytes"] == head and report["file_bytes"] == path.stat().st_size
    assert report["file_bytes"] == head + sum(row["stored"] for row in totals.values())
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, "x")
    with zipfile.ZipFile(archive) as file:
        assert report["zip_bytes"] == file.getinfo("x").compress_size
    archive.unlink()
    return {kind: row["value"] for kind, row in totals.items()}


@pytest.mark.parametrize("model_type, kind, pattern, sparsity", [
    ("bert", "classification", "unstructured", 0.9), ("distilbert", "classification", "1x4", 0.8),
    ("bert", "span", "2:4", 0.5), ("bert", "pretraining", "unstructured", 0.85), ("bert", "span", "unstructured", 0)])
def test_report_equals_a_recount(tmp_path, capsys, model_type, kind, pattern, sparsity):
    config = ModelConfig(model_type=model_type, vocab_size=61, hidden_size=40, num_hidden_layers=3,
                         num_attention_heads=2, intermediate_size=80, max_position_embeddings=20,
                         type_vocab_size=2 * (model_type == "bert"))
    model = ready(config, kind, magnitude(pattern, sparsity))
    directory = written(tmp_path, model)
    report, _ = report_of(directory, capsys)
    values = check_against(report, directory / "int8.safetensors")
    dense = recount(directory / "model.safetensors")[2]                 # what training left: the same, in float32
    for name, row in report["kinds"].items():
        assert row["dense_bytes"] == sum(len(part) for tensor, part in dense.items() if kind_of(tensor) == name)
        assert row["weights"] == row["dense_bytes"] // 4
    assert report["dense_file_bytes"] == (directory / "model.safetensors").stat().st_size
    weights = sum(layer.weight.numel() for name, layer in network.linears(model) if name.startswith("encoder.layers"))
    alive = sum(int(layer.mask.sum()) for name, layer in network.linears(model) if name.startswith("encoder.layers"))
    assert sum(values[name] for name in ENCODER) == alive == report["encoder"]["surviving"]
    assert report["ratios"]["values_only"] == 4 * weights / alive == pytest.approx(4 / (1 - sparsity))
    masks = sum(len(part) for name, part in recount(directory / "int8.safetensors")[2].items()
                if "mask" in name and "pooler" not in name)
    assert report["ratios"]["with_masks"] == 4 * weights / (alive + masks)
    assert report["ratios"]["whole_file"] == report["dense_file_bytes"] / report["file_bytes"]
    assert report["ratios"]["zip"] == report["dense_file_bytes"] / report["zip_bytes"]
    assert report["quantized"] and sum(row["weights"] for row in report["kinds"].values()) == sum(
        parameter.numel() for parameter in model.parameters())


def test_random_weights_show_the_papers_40(tmp_path, capsys):
    report, printed = report_of(tmp_path, capsys, "--random", "tiny", "--sparsity", "0.9")
    tiny = network.PRESETS["tiny"]
    sizes = tiny.num_hidden_layers * (4 * [tiny.hidden_size ** 2] + 2 * [tiny.hidden_size * tiny.intermediate_size])
    alive = sum(size - math.floor(0.9 * size) for size in sizes)
    assert report["encoder"]["surviving"] == report["encoder"]["value_bytes"] == alive
    assert report["ratios"]["values_only"] == 4 * sum(sizes) / alive == pytest.approx(40, abs=0.02)
    line = next(line for line in printed.splitlines() if "paper" in line)
    assert line.split()[-1] == "40.0" and line.split()[-3:-1] == [f"{4 * sum(sizes):,}", f"{alive:,}"]
    assert 5 < report["ratios"]["whole_file"] < report["ratios"]["zip"] < report["ratios"]["with_masks"] < 40
    large = network.PRESETS["bert-large"]           # the same count for BERT-Large, without its 1.3 GB
    sizes = [large.hidden_size ** 2] * 4 + [large.hidden_size * large.intermediate_size] * 2
    assert round(4 * sum(sizes) / sum(size - math.floor(0.9 * size) for size in sizes), 1) == 40.0


def test_float32_directories_are_counted_and_called_so(tmp_path, capsys):
    model = ready(SMALL, masks=magnitude("unstructured", 0.75))
    model_directory.save(model, tmp_path)
    report, printed = report_of(tmp_path, capsys)
    _, head, parts = recount(tmp_path / "model.safetensors")
    nonzero = sum(int(np.count_nonzero(np.frombuffer(part, "<f4"))) for name, part in parts.items()
                  if kind_of(name) in ENCODER)
    assert not report["quantized"] and "not quantized" in printed and report["header_bytes"] == head
    assert report["encoder"]["surviving"] == nonzero and report["encoder"]["value_bytes"] == 4 * nonzero
    assert report["ratios"]["values_only"] == pytest.approx(4, rel=0.01)
    assert report["ratios"]["with_masks"] == report["ratios"]["whole_file"] == 1
    assert report["encoder"]["stored_bytes"] == report["encoder"]["dense_bytes"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert report_of(tmp_path, capsys)[0] == report
    files.write_file(tmp_path / "config.json", json.dumps(config))
    int8.write_int8(model, tmp_path)
    assert report_of(tmp_path, capsys)[0]["quantized"]
    infer_cpu.main([str(tmp_path), "--size", "--engine", "fp32"])
    assert "not quantized" in capsys.readouterr().out


def test_half_precision_and_pickled_files_are_counted_at_their_width(tmp_path, capsys):
    model = ready(SMALL, masks=magnitude("unstructured", 0.75))
    model_directory.save(model, tmp_path)
    tensors, _ = safetensors.read_safetensors(tmp_path / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    safetensors.write_safetensors(tmp_path / "model.safetensors", tensors)
    half, _ = report_of(tmp_path, capsys)
    assert half["ratios"]["values_only"] == pytest.approx(8, rel=0.01) and half["ratios"]["with_masks"] == 2
    (tmp_path / "model.safetensors").unlink()
    tensors["cls.predictions.decoder.weight"] = torch.zeros(3)          # not tied
    tensors["surplus.weight"] = torch.zeros(5)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    pickled, _ = report_of(tmp_path, capsys)
    assert pickled["encoder"] == half["encoder"] and pickled["kinds"]["other"]["weights"] == 5
    assert pickled["kinds"]["heads"]["weights"] == half["kinds"]["heads"]["weights"] + 3
    assert pickled["file_bytes"] == (tmp_path / "pytorch_model.bin").stat().st_size


def test_a_model_in_several_files_is_counted_whole(tmp_path, capsys):
    model_directory.save(ready(SMALL), tmp_path)
    whole, _ = report_of(tmp_path, capsys)
    tensors, names = safetensors.read_safetensors(tmp_path / "model.safetensors")[0], {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        names.update(dict.fromkeys(part, f"part-{number}.safetensors"))
        safetensors.write_safetensors(tmp_path / f"part-{number}.safetensors", part)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    parts, _ = report_of(tmp_path, capsys)
    files = ["model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"]
    assert parts["file_bytes"] == sum((tmp_path / name).stat().st_size for name in files)
    assert parts["zip_bytes"] == sum(len(zlib.compress((tmp_path / name).read_bytes(), wbits=-15)) for name in files)
    assert parts["kinds"] == whole["kinds"] and parts["dense_file_bytes"] == whole["dense_file_bytes"]
    assert infer_cpu.load(tmp_path, "fp32").disk_bytes == parts["file_bytes"]


def test_size_of_what_is_not_there(victim, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((victim / "config.json").read_bytes())
    (tmp_path / "broken" / "int8.safetensors").write_bytes((victim / "int8.safetensors").read_bytes()[:-9])
    for flags, word in (([tmp_path / "nowhere"], "nowhere"), ([tmp_path], "config.json"),
                        ([tmp_path / "broken"], "int8.safetensors"), ([victim, "--random", "tiny"], "--random"),
                        (["--random", "tiny", "--pattern", "5x7"], "5x7"), ([], "MODEL_DIR")):
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([*map(str, flags), "--size"])
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and word in message and message.count("\n") == 1
