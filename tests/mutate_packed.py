"""Damage packed files in every way and run them: each is refused in one sentence, or runs; nothing crashes.

    python tests/mutate_packed.py --count 10000

Under AddressSanitizer, which sees every wrong read of native/:

    export XDG_CACHE_HOME=$(mktemp -d) CXX="env -u LD_PRELOAD g++ -fsanitize=address" ASAN_OPTIONS=detect_leaks=0
    LD_PRELOAD=$(g++ -print-file-name=libasan.so) python tests/mutate_packed.py --count 10000
"""
import argparse
import collections
import json
import random
import struct
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer_cpu  # noqa: E402
import model as network  # noqa: E402
import quant  # noqa: E402
from data import encode
from formats import int8, model_directory
from model import InputError, ModelConfig  # noqa: E402
from native import build

NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 8, 12, 31, 64, 255, 2 ** 16, 2 ** 31, 2 ** 40, 2 ** 63, 1.5, "4", None, [], True)


def write_models(directory):
    """Small models of every pattern -> [their directories]."""
    torch.manual_seed(0)
    paths = []
    for block in ((1, 4), (4, 1), (1, 1), None):
        config = ModelConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=24, max_position_embeddings=16)
        model = network.build(config, "classification")
        for _, layer in network.linears(model):
            layer.act_range.copy_(torch.tensor([-2.0, 3.0]))
            if layer.prunable and block:
                keep = torch.rand(layer.out_features // block[0], layer.in_features // block[1]) >= 0.8
                layer.mask.copy_(keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
        quant.prepare(model, 8)
        paths.append(directory / f"model-{len(paths)}")
        paths[-1].mkdir()
        model_directory.save(model, paths[-1])
        int8.write_int8(model, paths[-1])
    return paths


def damaged(data, config, chance):
    """(bytes of int8.safetensors, object of config.json) -> the same with something wrong."""
    data, config = bytearray(data), dict(config)
    length, = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    kind = chance.choice(("bits", "header bits", "cut", "bytes", "tensor", "swap", "metadata", "config", "length"))
    if kind in ("bits", "header bits"):
        for _ in range(chance.choice((1, 1, 3, 30))):
            data[chance.randrange(8 + length if kind == "header bits" else len(data))] ^= 1 << chance.randrange(8)
        return data, config
    if kind == "cut":
        return data[:chance.randrange(len(data))], config
    if kind == "length":
        return struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2 ** 31, 2 ** 63))) + data[8:], config
    if kind == "config":
        numbers = [name for name, value in config.items() if isinstance(value, (int, float))]
        config[chance.choice(numbers)] = chance.choice(NUMBERS)
        return data, config
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    if kind == "bytes":
        begin, end = header[name]["data_offsets"]
        value = chance.choice((0, 255, 127, 128))
        for place in range(begin, end):
            if chance.random() < 0.5:
                body[place] = value if chance.random() < 0.5 else chance.randrange(256)
    elif kind == "tensor":
        entry, field = header[name], chance.choice(("shape", "dtype", "data_offsets"))
        if field == "dtype":
            entry["dtype"] = chance.choice(("F32", "I8", "U8", "I32", "I64", "F16", "F64", "Q9", 3))
        else:
            entry[field] = [chance.choice((value, value + 1, value * 2, *NUMBERS)) for value in entry[field]] or [1]
    elif kind == "swap":
        other = chance.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        field = chance.choice(list(header["__metadata__"]))
        header["__metadata__"][field] = chance.choice((*NUMBERS, "7", "8", "float32", "tensor"))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body, config


def run(directory, count, seed=0, tiles=False):
    """Damage, open and run so many files -> how many were refused, and how many ran. Anything else is an exception."""
    models = write_models(directory)
    library = build.native_library(8, print, tiles=tiles)
    broken, counts = directory / "broken", collections.Counter()
    broken.mkdir()
    for number in range(seed, seed + count):
        chance = random.Random(number)
        source = chance.choice(models)
        data, config = damaged((source / "int8.safetensors").read_bytes(),
                               json.loads((source / "config.json").read_text()), chance)
        (broken / "int8.safetensors").write_bytes(data)
        (broken / "config.json").write_text(json.dumps(config))
        try:
            model, packed, _ = int8.read_int8(broken)
            engine = infer_cpu.native_engine(broken, model, packed, library)
            engine(encode.random_batch(model.config, 2, 12))
            counts["ran"] += 1
        except InputError as error:
            if not str(error) or "\n" in str(error):
                raise AssertionError(f"file {number}: not one sentence: {error}") from None
            counts["refused"] += 1
        except BaseException:
            print(f"file {number} of {source}", file=sys.stderr)
            raise
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first file")
    parser.add_argument("--tiles", action="store_true", help="on tile registers")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(Path(directory), settings.count, settings.seed, settings.tiles)
    print(f"{settings.count} damaged files: {counts['refused']} refused in one sentence, {counts['ran']} ran")


if __name__ == "__main__":
    main()
