"""The safetensors format, against the library of that name, and what damaged files end in."""
import json
import random
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from test_model import error_of, make

from formats.files import write_file
from formats.model_directory import load, save
from formats.safetensors import DTYPES, read_safetensors, write_safetensors
from model import InputError

# ---------------------------------------------------------------------------------------------------------------------
# safetensors

def tensors_of_every_dtype():
    """Random bytes (not-a-number included) in every type and in awkward shapes."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for code, dtype in DTYPES.items():
        for shape in ((3, 5), (7,), (), (0,), (2, 0, 3), (1, 1, 1)):
            count = int(np.prod(shape))
            raw = torch.randint(2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
            tensors[f"{code}/{list(shape)} é"] = raw.to(torch.uint8).view(dtype).view(shape)
    return tensors


def assert_bitwise(left, right):
    def raw(tensor):
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()

    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape and tensor.dtype == right[name].dtype, name
        assert raw(tensor) == raw(right[name]), name


def test_files_are_the_librarys(tmp_path):
    """Ours read by the `safetensors` library, and its files read by us, for every type, empty tensors included."""
    tensors, path = tensors_of_every_dtype(), tmp_path / "file.safetensors"
    write_safetensors(path, tensors, {"who": "us"})
    assert_bitwise(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "us"}
    read, metadata = read_safetensors(path)
    assert_bitwise(read, tensors)
    assert metadata == {"format": "pt", "who": "us"}
    safetensors.torch.save_file(tensors, path, {"who": "them"})
    read, metadata = read_safetensors(path)
    assert_bitwise(read, tensors)
    assert metadata == {"who": "them"}
    write_safetensors(path, {"sliced": torch.arange(24).view(4, 6)[:, ::2], "weight": nn.Parameter(torch.ones(3))})
    assert torch.equal(read_safetensors(path)[0]["sliced"], torch.arange(24).view(4, 6)[:, ::2])
    write_safetensors(path, {})
    assert read_safetensors(path)[0] == safetensors.torch.load_file(path) == {}


def raw_file(path, header, data):
    """A safetensors file with whatever header: an object, or bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_odd_alignment(tmp_path):
    """A wide element may begin at any byte."""
    numbers = np.array([1.5, -2.0], np.float32)
    path = raw_file(tmp_path / "odd.safetensors", {"a": entry("U8", [3], 0, 3), "b": entry("F32", [2], 3, 11),
                                                   "c": entry("I64", [1], 11, 19)},
                    bytes([1, 2, 3]) + numbers.tobytes() + (-7).to_bytes(8, "little", signed=True))
    tensors, metadata = read_safetensors(path)
    assert tensors["a"].tolist() == [1, 2, 3] and tensors["b"].tolist() == [1.5, -2.0] and tensors["c"].tolist() == [-7]
    assert metadata == {}


FLAT = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty file": b"", "seven bytes": b"1234567",
    "header longer than the file": (10 ** 6).to_bytes(8, "little") + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not JSON": (b"{", b""), "not UTF-8": (b'{"\xff\xfe": 1}', b""), "a list": (b"[]", b""), "a number": (b"12", b""),
    "deep nesting": (b"[" * 100_000, b""),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, bytes(8)),
    "dtype no string": ({"a": entry(["F32"], [2], 0, 8)}, bytes(8)),
    "entry no object": ({"a": 3}, bytes(8)),
    "too few bytes": ({"a": FLAT}, bytes(7)), "too many bytes": ({"a": FLAT}, bytes(9)),
    "bytes of nobody": ({}, bytes(1)),
    "shape too large": ({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "shape negative": ({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)),
    "shape of fractions": ({"a": entry("F32", [2.0], 0, 8)}, bytes(8)),
    "shape of text": ({"a": entry("F32", "2", 0, 8)}, bytes(8)),
    "shape infinite": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8)),
    "huge and empty": ({"a": entry("F32", [0, 10 ** 30], 0, 0)}, b""),
    "huge count": ({"a": entry("F32", [2 ** 40, 2 ** 40], 0, 2 ** 82)}, bytes(8)),
    "overflowing count": ({"a": entry("F32", [2 ** 32, 2 ** 32], 0, 0)}, b""),
    "offset negative": ({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "offsets reversed": ({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "offsets infinite": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "beyond the end": ({"a": entry("F32", [2], 8, 16)}, bytes(8)),
    "overlap": ({"a": FLAT, "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "same bytes twice": ({"a": FLAT, "b": FLAT}, bytes(8)),
    "a hole": ({"a": FLAT, "b": entry("F32", [1], 12, 16)}, bytes(16)),
    "a bool of 2": ({"a": entry("BOOL", [2], 0, 2)}, bytes([1, 2])),
    "metadata no object": ({"__metadata__": 5, "a": FLAT}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    path, damage = tmp_path / "file.safetensors", DAMAGED[name]
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        raw_file(path, *damage)
    assert str(path) in error_of(read_safetensors, path)


def test_missing_file_is_named(tmp_path):
    assert "nothing.safetensors is missing" in error_of(read_safetensors, tmp_path / "nothing.safetensors")
    assert "is missing" in error_of(read_safetensors, tmp_path)


NUMBERS = [b"0", b"1", b"-1", b"1e3", b"2.5", b"NaN", b"1e999", b"99999999999999999999", b"4611686018427387903",
           b"null", b"[]", b'"8"', b"true", *(str(number).encode() for number in range(2, 90, 3))]


def damage(whole, kind, generator):
    """A copy of the file's bytes with one random damage of five kinds."""
    damaged, head = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    if kind == 0:                                               # one bit of the length or the header
        damaged[generator.randrange(head)] ^= 1 << generator.randrange(8)
    elif kind == 1:                                             # some bytes, anywhere
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
    elif kind == 2:                                             # cut short
        del damaged[generator.randrange(len(damaged)):]
    else:                                                       # the header's length corrected for what changes in it:
        if kind == 3:                                           # another number
            begin, end = generator.choice([match.span() for match in re.finditer(rb"\d+", whole[8:head])])
            damaged[8 + begin:8 + end] = generator.choice(NUMBERS)
        else:                                                   # a piece twice, or away
            begin = generator.randrange(8, head - 12)
            end = begin + generator.randint(1, 12)
            damaged[begin:end] = damaged[begin:end] * generator.choice([0, 2])
        damaged[:8] = (head - 8 + len(damaged) - len(whole)).to_bytes(8, "little")
    return damaged


def test_thousands_of_random_damages_end_in_an_input_error_or_a_valid_read(tmp_path):
    path, generator, refused = tmp_path / "file.safetensors", random.Random(0), 0
    write_safetensors(path, {"a": torch.randn(4, 3), "b": torch.ones(3, 3, dtype=torch.bool), "c": torch.zeros(0, 2),
                             "d": torch.arange(5), "e": torch.randn(3).to(torch.bfloat16)})
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:                # one open file: opening to write is what takes time
        for trial in range(4000):
            damaged = damage(whole, trial % 5, generator)
            file.seek(0)
            file.write(damaged)
            file.truncate()
            try:
                tensors, _ = read_safetensors(path)
            except InputError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                data = len(damaged) - 8 - int.from_bytes(damaged[:8], "little")
                assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) == data
                assert all(len(tensor.flatten().tolist()) == tensor.numel() for tensor in tensors.values())
    assert 2000 < refused < 4000


def test_damage_in_a_model_directory_is_an_input_error(tmp_path):
    save(make(), tmp_path)
    for name in ("model.safetensors", "compression.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert str(path) in error_of(load, tmp_path, "pretraining")
        path.write_bytes(whole[:8] + b"[" + whole[9:])
        assert str(path) in error_of(load, tmp_path, "pretraining")
        path.write_bytes(whole)
    load(tmp_path, "pretraining", say=pytest.fail)


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\ud800 cannot be encoded")             # fails after the temporary file is open
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="directory"):
        write_file(folder, "a folder cannot be replaced by a file")
    assert sorted(tmp_path.iterdir()) == [path, folder]
