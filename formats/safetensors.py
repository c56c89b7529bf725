"""The safetensors format: u64 length of the header, a JSON header, raw little-endian bytes."""
import json
import math
import os
from pathlib import Path

import torch

from formats.files import demand_content, whole_file
from model import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def safetensors_header(tensors, metadata=None):
    """(the bytes that stand before the tensors, the names in the order of their bytes). The tensors may be on torch's
    'meta' device: nothing but their dtypes and shapes is read."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, names, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, [], 0
    # Widest elements first, so that every tensor starts at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
        names.append(name)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, names


def write_safetensors(path, tensors, metadata=None):
    """tensors: dict name -> tensor of any dtype in DTYPES; metadata: dict of strings."""
    head, names = safetensors_header(tensors, metadata)
    with whole_file(path) as file:
        file.write(head)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Returns (tensors, metadata). Every length, offset and shape is checked before it is used.

    Raises InputError naming the file when it is missing, truncated or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing")
    demand_content(path)
    damaged = f"{path} is not a whole safetensors file: "
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(damaged + f"it has {size} bytes, and its header alone claims {length}")
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    (begin, end), shape = entry["data_offsets"], entry["shape"]
                    # The product without zeros: torch computes strides even of a tensor without elements.
                    if (type(shape) is not list or len(shape) > 8
                            or any(type(number) is not int or not 0 <= number < 2 ** 62
                                   for number in (begin, end, *shape))
                            or math.prod(number or 1 for number in shape) >= 2 ** 62):
                        raise ValueError(f"tensor '{name}' has shape {shape} and offsets {begin}, {end}")
                    if entry["dtype"] not in DTYPES:
                        raise ValueError(f"tensor '{name}' holds {entry['dtype']}, and read are {', '.join(DTYPES)}")
                    entries[name] = DTYPES[entry["dtype"]], shape, begin, end
            metadata = dict(header.get("__metadata__") or {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(damaged + f"its header cannot be read ({type(error).__name__}: {error})") from None
        data = bytearray(size - 8 - length)
        file.readinto(data)             # into place: read() and a copy would take twice the memory
    expected = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if end - begin != math.prod(shape) * dtype.itemsize or begin != expected:
            raise InputError(damaged + f"tensor '{name}' of shape {shape} claims bytes {begin} to {end}")
        expected = end
    if expected != len(data):
        raise InputError(damaged + f"{expected} bytes of tensors are announced, {len(data)} are there")
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end or begin % dtype.itemsize == 0:
            raw = (torch.frombuffer(data, dtype=torch.uint8)[begin:end] if end > begin else
                   torch.empty(0, dtype=torch.uint8))
        else:
            raw = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)
        if dtype == torch.bool and bool((raw > 1).any()):
            raise InputError(damaged + f"tensor '{name}' holds bytes that are neither 0 nor 1")
        tensors[name] = raw.view(dtype).view(shape)
    return tensors, metadata
