"""Every engine side by side, on random batches: `infer_cpu.py --benchmark`."""
import ctypes
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

import model as network
import prune
import quant
from data.encode import random_batch
from formats.command import to_stderr
from formats.config import config_json
from formats.files import write_file
from formats.int8 import write_int8
from formats.machine import default_activation_bits, medians_in_turn, processor_name, saturates, seconds
from formats.model_directory import kind_of, save
from infer_cpu import ENGINES, load
from model import InputError, linears
from native.engine import PARTS
from native.weights import native_weights


def write_random(directory, preset, sparsity, pattern, plain=True):
    """A classifier of this size with random weights, pruned and quantized, written as train.py would leave it.

    plain: the float32 file too.
    """
    torch.manual_seed(0)
    model = network.build(network.PRESETS[preset], "classification")
    pattern = prune.parse_pattern(pattern)
    sparsity = prune.resolve_sparsity(sparsity, pattern)
    prune.check_pattern(model, pattern)
    quant.prepare(model, default_activation_bits())
    for _, layer in linears(model):
        layer.act_range.copy_(torch.tensor([-4.0, 4.0]))
        if layer.prunable:
            layer.mask.copy_(prune.magnitude_mask(layer.weight, sparsity, pattern))
    if plain:
        save(model, directory)
    else:
        labels = ["LABEL_0", "LABEL_1"]
        write_file(directory / "config.json", json.dumps(config_json(model.config, model.kind, labels)))
    write_int8(model, directory)
    print(f"random weights: {preset}, {network.count_parameters(model):,} parameters, encoder sparsity {sparsity:g}, "
          f"pattern {pattern}, {default_activation_bits()}-bit activations")


def machine():
    """One line: processor, cores, threads in use, torch."""
    exact = "7-bit activations only" if saturates() else "8-bit activations"
    return (f"{processor_name()}, {exact} are exact, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}")


def run_benchmark(settings):
    if settings.random:
        with tempfile.TemporaryDirectory(prefix="infer_cpu-") as directory:
            write_random(Path(directory), settings.random, settings.sparsity, settings.pattern)
            return benchmark(settings, Path(directory))
    return benchmark(settings, Path(settings.model))


def benchmark(settings, directory):
    """Every engine that can run, on the same random batches; prints a table, returns the figures."""
    kind, config, _ = kind_of(directory)
    if kind in ("encoder", "pretraining"):
        raise InputError(f"{directory} is a pre-trained model without a task head; benchmark a fine-tuned one, or "
                         f"--random")
    length = settings.max_len or 128
    if length > config.max_position_embeddings:
        raise InputError(f"--max-len {length} is longer than the model's {config.max_position_embeddings} positions")
    engines, unavailable = [], {}
    for name in ENGINES:
        try:
            engines.append(load(directory, name, settings.threads, say=to_stderr))
        except InputError as error:
            unavailable[name] = str(error)
    if not engines:
        raise InputError("; ".join(unavailable.values()))
    report = {"machine": machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "max_len": length,
              "unavailable": unavailable, "rows": []}
    print(report["machine"])
    for batch_size in settings.batch_size:
        times = medians_in_turn(engines, random_batch(config, batch_size, length))
        print(f"\n{batch_size} x {length} tokens    ms  sequences/s  x fp32  disk MB  memory MB")
        for engine in engines:
            row = {"engine": engine.name, "layout": engine.layout, "batch_size": batch_size,
                   "ms": 1e3 * times[engine.name], "sequences_per_second": batch_size / times[engine.name],
                   "times_fp32": times["fp32"] / times[engine.name] if "fp32" in times else None,
                   "disk_mb": engine.disk_bytes / 1e6, "memory_mb": engine.memory_bytes / 1e6}
            report["rows"].append(row)
            ratio = f"{row['times_fp32']:.2f}" if row["times_fp32"] else "-"
            print(f"{engine.name:<10}{row['ms']:>12.2f}  {row['sequences_per_second']:>11.1f}  {ratio:>6}  "
                  f"{row['disk_mb']:>7.1f}  {row['memory_mb']:>9.1f}")
        print("\n".join(verdicts(times)))
        for engine, row in zip(engines, report["rows"][-len(engines):]):
            if engine.name in ("native", "tiles"):
                row["parts"] = where_time_goes(engine, random_batch(config, batch_size, length))
    print()
    for engine in engines:
        print(f"{engine.name}: {engine.layout}")
    for name, reason in unavailable.items():
        print(f"{name} is not available: {reason}")
    return report


def where_time_goes(engine, batch):
    """Prints the parts of engine native or tiles: {part: (ms, share, G operations/s, by the kernel at its best)}.

    Operations are a multiplication and an addition per weight that lives and token; in attention, in float32 or nearly so, per pair
    of tokens and feature, for scores and for values. At its best, a kernel finds its activations in the first cache
    (`ceiling`).
    """
    encoder, whole, rounds = engine.model.encoder.kernel, [], []
    for _ in range(15):
        whole.append(seconds(partial(engine, batch)))
        rounds.append({})
        encoder(**batch, times=rounds[-1])
    lengths, hidden = batch["attention_mask"].sum(1), encoder.config.hidden_size
    all_tokens = int(lengths.sum())
    tokens, pairs = ([value] * len(encoder.weights) for value in (all_tokens, int((lengths ** 2).sum())))
    if encoder.first_token_only:                # in the last layer only these ask, and only they go on
        tokens[-1], pairs[-1] = len(lengths), all_tokens
    products = (PARTS[0], *PARTS[2:5])
    operations = {name: sum(2 * int(layer[index].nonzero.sum()) * (count if index else all_tokens)
                            for layer, count in zip(encoder.weights, tokens)) for index, name in enumerate(products)}
    operations["attention"] = 4 * hidden * sum(pairs)
    times = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
    times["heads, Python"] = max(statistics.median(whole) - sum(times.values()), 0.0)
    parts, ceilings = {}, {form: ceiling(encoder.library, form) for form in
                           {weights.form for layer in encoder.weights for weights in layer}}
    print(f"{engine.name + ', part':<20}      ms   share  G operations/s  at best")
    for part, value in times.items():
        rate = operations.get(part, 0) / value / 1e9 if value else 0.0
        best = ceilings[encoder.weights[0][products.index(part)].form] if part in products else 0.0
        parts[part] = (1e3 * value, value / sum(times.values()), rate, best)
        print(f"{part:<20}{1e3 * value:>8.2f}  {value / sum(times.values()):>5.1%}"
              + (f"  {rate:>14.0f}" if rate else "") + (f"  {best:>7.0f}" if best else ""))
    return parts


def ceiling(library, form):
    """G operations/s of a kernel of engine native on a dense layer of 256 -> 96, whose tiles fit the first cache."""
    rows, columns, tokens = 96, 256, 16 * library.tokens_of_tile()
    weight = torch.randint(1, 128, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weights = native_weights(library, [quant.PackedLinear(
        (rows, columns), weight, None, torch.ones(rows), torch.zeros(rows), torch.tensor(1.0),
        torch.tensor(0, dtype=torch.int32), 7)], form)
    levels, y = torch.zeros(tokens * columns, dtype=torch.uint8), torch.empty(tokens * rows)
    call = partial(library.linear, ctypes.addressof(weights), tokens, levels.data_ptr(), y.data_ptr(), None, None)
    return 2 * rows * columns * tokens / min(seconds(call) for _ in range(200)) / 1e9


def verdicts(times):
    """Where an engine gives nothing, in words."""
    lines = [f"no gain: {name} takes {times[name] / times['fp32']:.2f} times as long as dense fp32"
             for name in times if "fp32" in times and name != "fp32" and times[name] > 0.95 * times["fp32"]]
    if {"sparse", "int8"} <= times.keys() and times["sparse"] > 0.95 * times["int8"]:
        lines.append(f"the zeros save no time here: sparse takes {times['sparse'] / times['int8']:.2f} times as long "
                     f"as dense int8")
    return lines
