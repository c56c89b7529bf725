"""Bytes, counted four ways, each as a multiple of dense float32: `infer_cpu.py --size`.

    values only      the encoder's weights; what survives, at its stored width (arXiv 2111.05754's 40x: 4 / 0.1)
    values, masks    the encoder's weights; what the file holds of them, scales left out
    whole file       everything: scales, embeddings, heads, norms, biases, header
    whole file, zip  the same after deflate
"""
import re
import tempfile
import zlib
from pathlib import Path

import torch

from bench.benchmark import write_random
from formats.command import to_stderr
from formats.config import read_config
from formats.int8 import empty_model, read_int8
from formats.model_directory import kind_of, read_weights, weight_files
from formats.names import NAMES, is_head, published_name
from formats.safetensors import read_safetensors, safetensors_header
from infer_cpu import ENGINES

ENCODER = ("query", "key", "value", "attention output", "intermediate", "output")
KINDS = (*ENCODER, "pooler", "heads", "embeddings", "norms and biases", "other")
SIZES = ("weights", "surviving", "dense_bytes", "value_bytes", "mask_bytes", "scale_bytes", "stored_bytes")


def tensor_kind(model_type, name):
    """'bert.encoder.layer.3.attention.self.query.values' -> 'query'; one of KINDS for every published name."""
    ours = {theirs: ours for ours, theirs in NAMES[model_type].items()}
    generic = re.sub(r"\.\d+\.", ".{}.", name)
    found = ours.get(generic) or ours.get(generic.rpartition(".")[0])
    if found is None:
        return "heads" if is_head(name, model_type) else "other"       # a decoder of its own
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
    model, packed, _ = read_int8(directory)
    kind, config, _ = kind_of(directory)
    plain = empty_model(config, kind, model.classifier.out_features if kind == "classification" else 2)
    shapes = {published_name(config.model_type, name): tensor for name, tensor in plain.state_dict().items()}
    entries = []
    for name, tensor in read_safetensors(directory / "int8.safetensors")[0].items():
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
    tensors, path = read_weights(directory, say=to_stderr)
    model_type = read_config(directory)[0].model_type
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
    config, _ = read_config(directory)          # of any architecture: a bare backbone has a size too
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
    # What model_directory.save would write of the same model, dense and in float32.
    header, _ = safetensors_header({name: torch.empty(tensor.shape, device="meta")
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
