"""Measure our engines against what a user would run instead, in turn on one machine; writes bench/speed.json.

    python -m bench.measure_speed --peers PEERS/bin/python --deepsparse DEEPSPARSE/bin/python --data TASKS_DIR \
        --tokenizer MODEL_DIR [--part base]

The peers live in environments of their own, and each may be left out:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers onnx onnxruntime openvino nncf
    python3.10 -m venv DEEPSPARSE && DEEPSPARSE/bin/pip install deepsparse==1.8.0

Every contender is a process that loads its model once and then waits. In every round each of them is told to run for a
moment while all others sleep, so that a busy moment of the machine hits all alike; what is kept is the median over the
rounds. Weights are random, of the published shapes. The file has a set of parts for each kind of CPU; a part that is in
the set of this one already is skipped (--again repeats it).
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
NAMES = ("input_ids", "attention_mask", "token_type_ids")
SPARSE = {"1x4-0.8": (0.8, 1, 4), "unstructured-0.9": (0.9, 1, 1)}      # exported to ONNX: sparsity, block


# ---------------------------------------------------------------------------------------------------------------------
# Contenders. Each function loads a model and returns run(batch of numpy int64 arrays); torch and the rest are imported
# here, for no environment has them all.

def ours(path, engine, threads):
    sys.path.insert(0, str(HOME))
    import torch

    import infer_cpu
    loaded = infer_cpu.load(path, engine, threads, say=lambda line: print(line, file=sys.stderr))
    return lambda batch: loaded({name: torch.from_numpy(array) for name, array in batch.items()})


def transformers_model():
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=2, attn_implementation="sdpa")).eval()


def eager(path, engine, threads):
    """transformers, dense, in the type that `engine` names."""
    import torch
    torch.set_num_threads(threads)
    model = transformers_model().to(getattr(torch, engine))

    def run(batch):
        with torch.inference_mode():
            model(**{name: torch.from_numpy(array) for name, array in batch.items()})
    return run


def onnxruntime(path, engine, threads):
    import onnxruntime as runtime
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, batch)


def openvino(path, engine, threads):
    """Compiled for each shape. engine: 'sparse' lets it keep weights packed that are half zeros, where it can."""
    import openvino as runtime
    core, compiled = runtime.Core(), {}
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
               **({"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5} if engine == "sparse" else {})}

    def run(batch):
        shape = batch["input_ids"].shape
        if shape not in compiled:
            model = core.read_model(path)
            model.reshape({name: list(shape) for name in NAMES})
            compiled.clear()
            compiled[shape] = core.compile_model(model, "CPU", options)
        compiled[shape](batch)
    return run


def deepsparse(path, engine, threads):
    """Its engine wants the shape beforehand, or it runs ONNX Runtime's dense code without a word; and it writes that
    shape into the file, so that it gets a copy."""
    from deepsparse import Engine
    engines, folder = {}, tempfile.TemporaryDirectory()
    path = shutil.copy(path, folder.name)

    def run(batch):
        shape = batch["input_ids"].shape
        if shape not in engines:
            engines.clear()
            engines[shape] = Engine(str(path), batch_size=shape[0], num_cores=threads, input_shapes=[list(shape)] * 3)
        engines[shape].run([batch[name] for name in NAMES])
    run.folder = folder                             # as long as the engine
    return run


def export(folder):
    """Write dense.onnx, dense-int8.onnx, the pruned models and two INT8 ones of OpenVINO; run in the peers'
    environment."""
    import nncf
    import openvino
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import BertConfig, BertForSequenceClassification
    ids = torch.randint(0, 30000, (1, 128))
    for name in ("dense", *SPARSE):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_labels=2, attn_implementation="eager")).eval()
        for layer in model.bert.encoder.modules() if name in SPARSE else ():
            if isinstance(layer, torch.nn.Linear):
                sparsity, rows, columns = SPARSE[name]
                keep = torch.rand(layer.out_features // rows, layer.in_features // columns) >= sparsity
                layer.weight.data *= keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        path = str(folder / f"{name}.onnx")
        torch.onnx.export(model, (ids, torch.ones_like(ids), torch.zeros_like(ids)), path, input_names=list(NAMES),
                          output_names=["logits"], dynamic_axes={key: {0: "b", 1: "s"} for key in NAMES},
                          opset_version=14, dynamo=False)
    quantize_dynamic(str(folder / "dense.onnx"), str(folder / "dense-int8.onnx"), weight_type=QuantType.QInt8,
                     per_channel=True)
    rows = [dict(zip(NAMES, (ids.numpy(), torch.ones_like(ids).numpy(), torch.zeros_like(ids).numpy())))
            for ids in torch.randint(0, 30000, (8, 1, 128))]
    for name in ("dense", "unstructured-0.9"):
        model = nncf.quantize(openvino.convert_model(folder / f"{name}.onnx"), nncf.Dataset(rows),
                              model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
        openvino.save_model(model, folder / f"{name}-int8.xml")


def work(contender, path, engine, threads):
    """A contender's process: a line {batch, length, seconds} in, a line of milliseconds out."""
    import numpy as np
    answers, run, known = os.dup(1), globals()[contender](path, engine, threads), set()
    os.dup2(2, 1)                                   # what a library prints is no answer
    while line := sys.stdin.readline():
        batch, length, duration = json.loads(line)
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        inputs = dict(zip(NAMES, (ids, np.ones_like(ids), np.zeros_like(ids))))
        for _ in range(0 if (batch, length) in known else 2):
            run(inputs)
        known.add((batch, length))
        times, begin = [], time.perf_counter()
        while not times or time.perf_counter() - begin < duration:
            start = time.perf_counter()
            run(inputs)
            times.append(1e3 * (time.perf_counter() - start))
        os.write(answers, (json.dumps(statistics.median(times)) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the measurement

def start(contender, path="", engine="", threads=2, python=sys.executable):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([python, "-W", "ignore", __file__, "--worker", contender, str(path), engine, str(threads)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(name, worker, question):
    """What a contender's process answers to a line of JSON; None: to none, what it says first."""
    if question is not None:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} stopped; its message is above")
    return json.loads(line)


def dismiss(workers):
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def in_turn(workers, shapes, rounds=7, duration=0.6):
    """{name: process} and [(batch, length)] -> rows of {shape, name: median ms}. The processes end."""
    rows = []
    for batch, length in shapes:
        times = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                times[name].append(ask(name, worker, [batch, length, duration]))
        rows.append({"batch": batch, "length": length,
                     "ms": {name: round(statistics.median(values), 3) for name, values in times.items()}})
        print(json.dumps(rows[-1]), flush=True)
    dismiss(workers)
    return rows


def random_model(settings, preset, sparsity, pattern, plain=False):
    """The directory of a random model of ours, made once, with a tokenizer if there is one to copy."""
    sys.path.insert(0, str(HOME))
    from bench.benchmark import write_random
    path = settings.work / f"{preset}-{pattern}-{sparsity}"
    if not (path / "int8.safetensors").is_file() or plain and not (path / "model.safetensors").is_file():
        path.mkdir(parents=True, exist_ok=True)
        write_random(path, preset, sparsity, pattern, plain)
    if settings.tokenizer:
        for file in ("vocab.txt", "tokenizer.json"):
            if (settings.tokenizer / file).is_file():
                (path / file).write_bytes((settings.tokenizer / file).read_bytes())
    return path


def has_tiles():
    sys.path.insert(0, str(HOME))
    from formats.machine import default_activation_bits
    from native.build import native_library
    return native_library(default_activation_bits(), print, tiles=None).tiles


def base(settings):
    """BERT-Base, 128 tokens, 2 threads: all contenders."""
    sys.path.insert(0, str(HOME))
    from formats.machine import has_bf16
    model = partial(random_model, settings, "bert-base")
    workers = {"native, 1x4 80 %": start("ours", model(0.8, "1x4", plain=True), "native"),
               "native, 4x1 80 %": start("ours", model(0.8, "4x1"), "native"),
               "native, unstructured 90 %": start("ours", model(0.9, "unstructured"), "native"),
               "torch sparse, unstructured 90 %": start("ours", model(0.9, "unstructured"), "sparse"),
               "torch int8": start("ours", model(0.8, "1x4"), "int8"),
               "torch fp32": start("ours", model(0.8, "1x4"), "fp32")}
    if has_tiles():
        workers |= {f"tiles, {pattern} {100 * sparsity:.0f} %": start("ours", model(sparsity, pattern), "tiles")
                    for pattern, sparsity in (("1x4", 0.8), ("16x4", 0.8), ("unstructured", 0.9))}
    folder = settings.work / "onnx"
    if settings.peers:
        if not (folder / "unstructured-0.9-int8.xml").is_file():
            folder.mkdir(exist_ok=True)
            subprocess.run([settings.peers, "-W", "ignore", __file__, "--export", str(folder)], check=True)
        peer = partial(start, python=settings.peers)
        fast = {"torch eager bf16 (transformers)": peer("eager", engine="bfloat16")} if has_bf16("cpu") else {}
        workers |= {"torch eager fp32 (transformers)": peer("eager", engine="float32"), **fast,
                    "ONNX Runtime fp32": peer("onnxruntime", folder / "dense.onnx"),
                    "ONNX Runtime dynamic int8": peer("onnxruntime", folder / "dense-int8.onnx"),
                    "OpenVINO int8": peer("openvino", folder / "dense-int8.xml"),
                    "OpenVINO int8, unstructured 90 %": peer("openvino", folder / "unstructured-0.9-int8.xml",
                                                             "sparse")}
    if settings.deepsparse and (folder / "dense.onnx").is_file():
        peer = partial(start, "deepsparse", python=settings.deepsparse)
        workers |= {f"DeepSparse fp32, {name}": peer(folder / f"{name}.onnx") for name in ("dense", *SPARSE)}
    return in_turn(workers, [(1, 128), (16, 128)])


def models(settings):
    """The other sizes: native against our fp32 engine."""
    rows = []
    for preset in ("distilbert-base", "bert-large"):
        path = random_model(settings, preset, 0.8, "1x4", plain=True)
        workers = {f"{preset}, {engine}": start("ours", path, engine) for engine in ("native", "fp32")}
        path = random_model(settings, preset, 0.9, "unstructured")
        workers[f"{preset}, native, unstructured 90 %"] = start("ours", path, "native")
        rows += in_turn(workers, [(1, 128), (16, 128)], rounds=5)
    return rows


def lengths(settings):
    path = random_model(settings, "bert-base", 0.8, "1x4", plain=True)
    engines = ("native", *(["tiles"] if has_tiles() else []), "int8", "fp32")
    workers = {engine: start("ours", path, engine) for engine in engines}
    return in_turn(workers, [(batch, length) for batch in (1, 16) for length in (32, 128, 384)], rounds=5)


def threads(settings):
    path = random_model(settings, "bert-base", 0.8, "1x4")
    workers = {f"native, {count} threads": start("ours", path, "native", count) for count in (1, 2)}
    return in_turn(workers, [(1, 128), (16, 128)])


def layers(settings):
    """One product, 1x4 80 %. Levels in: ours, FBGEMM's static one (levels out, a quarter of the bytes) and oneDNN's
    (float32 out); float32 in and out: ours, which rounds with a given scale, and FBGEMM's dynamic one."""
    sys.path.insert(0, str(HOME))
    import ctypes

    import torch

    import quant
    from formats.machine import quantized_engine, seconds
    from native.build import native_library
    from native.weights import native_weights
    torch.set_num_threads(2)
    library, rows = native_library(8, print), []
    for out, columns in ((768, 768), (3072, 768), (768, 3072)):
        keep = torch.rand(out, columns // 4) >= 0.8
        weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8) * keep.repeat_interleave(4, 1)
        layer = quant.PackedLinear((out, columns), weight, None, torch.ones(out), torch.zeros(out), torch.tensor(1.0),
                                   torch.tensor(100, dtype=torch.int32), 8)
        weights = native_weights(library, [layer])
        with quantized_engine("fbgemm"):
            prepacked = torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(
                weight, torch.ones(out).double(), torch.zeros(out, dtype=torch.int64), 0), layer.bias)
        onednn, zeros = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(out, dtype=torch.int64)
        for tokens in (128, 2048):
            q = torch.zeros(tokens * columns, dtype=torch.uint8)
            y = torch.empty(tokens * out)
            plain = torch.randn(tokens, columns)            # in rows or in tiles: here only the time counts
            x = torch.quantize_per_tensor(plain, 0.05, 100, torch.quint8)
            levels = x.int_repr()

            def rounded_and_multiplied():
                library.quantize(tokens, plain.data_ptr(), q.data_ptr(), ctypes.addressof(weights))
                library.linear(ctypes.addressof(weights), tokens, q.data_ptr(), y.data_ptr(), None, None)
            calls = {"native": lambda: library.linear(ctypes.addressof(weights), tokens, q.data_ptr(), y.data_ptr(),
                                                      None, None),
                     "FBGEMM": lambda: torch.ops.quantized.linear(x, prepacked, 1.0, 0),
                     "native, float32 in": rounded_and_multiplied,
                     "FBGEMM, float32 in": lambda: torch.ops.quantized.linear_dynamic(plain, prepacked),
                     "oneDNN": lambda: torch.ops.onednn.qlinear_pointwise(
                         levels, 0.05, 100, onednn, layer.weight_scale, zeros, layer.bias, 1.0, 0, torch.float32,
                         "none", [], "")}
            times = {name: [] for name in calls}
            for _ in range(60):
                for name, call in calls.items():
                    times[name].append(1e3 * seconds(call))
            rows.append({"inputs": columns, "outputs": out, "tokens": tokens, "ms": {
                name: round(statistics.median(values[5:]), 4) for name, values in times.items()}})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def packed(settings):
    """The SST-2 dev set in batches of 32, as it is and with every row padded to 128 real tokens."""
    if not (settings.data and settings.tokenizer):
        raise SystemExit("measure_speed.py: part packed needs --data and --tokenizer")
    path = random_model(settings, "bert-base", 0.8, "1x4")
    import torch

    import infer_cpu
    from data.encode import encoder_for, random_batch
    from formats.machine import seconds
    engine = infer_cpu.load(path, "native", 2)
    data = encoder_for(path, "classification", 128, "sst2", settings.data)
    rows = data.encode([line.split("\t")[0] for line in
                        (settings.data / "SST-2" / "dev.tsv").read_text().splitlines()[1:]])
    batches = [data.collate(rows[begin:begin + 32]) for begin in range(0, len(rows), 32)]
    times = {"packed": [], "padded to 128": []}
    for _ in range(3):
        for batch in batches:
            times["packed"].append(seconds(partial(engine, batch)))
            full = random_batch(engine.model.config, len(batch["input_ids"]), 128)
            times["padded to 128"].append(seconds(partial(engine, full)))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert torch.get_num_threads() == 2
    return [{"sentences": len(rows), "tokens": tokens, "sequences_per_second": {
        name: round(3 * len(rows) / sum(values), 1) for name, values in times.items()}}]


def startup(settings):
    """From the start of the process to the answer, and the most memory it had: infer_cpu.py --text, 2 threads."""
    if not settings.tokenizer:
        raise SystemExit("measure_speed.py: part startup needs --tokenizer")
    path, rows = random_model(settings, "bert-base", 0.8, "1x4", plain=True), []
    answer = "import sys, infer_cpu; infer_cpu.main(sys.argv[1:]); from bench.measure_shards import peak_memory; " \
             "print(peak_memory())"
    for engine in ("native", "auto", "fp32") * 3:
        begin = time.perf_counter()
        child = subprocess.run([sys.executable, "-c", answer, str(path.resolve()), "--engine", engine, "--text",
                                "a warm and funny film", "--threads", "2"], stdout=subprocess.PIPE, text=True, cwd=HOME)
        if child.returncode:
            raise SystemExit(f"measure_speed.py: engine {engine} failed; its message is above")
        rows.append({"engine": engine, "seconds": round(time.perf_counter() - begin, 2),
                     "peak_mb": round(int(child.stdout.split()[-1]) / 2 ** 20, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


PARTS = (base, models, lengths, threads, layers, packed, startup)


def peer_versions(python):
    """{package: version} of what an environment of peers has, {} without one."""
    names = ("sentence-transformers", "transformers", "torch", "onnxruntime", "openvino", "nncf", "deepsparse")
    code = "import importlib.metadata as m, json, sys; have = {d.name.lower().replace('_', '-'): d.version for d in " \
           "m.distributions()}; print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
    return json.loads(subprocess.run([python, "-c", code, *names], check=True, text=True,
                                     stdout=subprocess.PIPE).stdout) if python else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[part.__name__ for part in PARTS], help="only this one")
    parser.add_argument("--peers", help="python with torch, transformers, onnx, onnxruntime, openvino, nncf")
    parser.add_argument("--deepsparse", help="python with deepsparse")
    parser.add_argument("--data", type=Path, help="the task folders, for part packed")
    parser.add_argument("--tokenizer", type=Path, help="a model directory with a BERT vocabulary")
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="folder for the random models")
    parser.add_argument("--json", type=Path, default=HOME / "bench" / "speed.json")
    parser.add_argument("--again", action="store_true", help="measure parts that are in the file already")
    parser.add_argument("--worker", nargs=4, metavar=("CONTENDER", "PATH", "ENGINE", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.export:
        return export(settings.export)
    if settings.worker:
        contender, path, engine, count = settings.worker
        return work(contender, path, engine, int(count))
    if settings.deepsparse and not settings.peers and not (settings.work / "onnx" / "dense.onnx").is_file():
        parser.error("--deepsparse needs --peers too, whose packages write the models that it runs")
    sys.path.insert(0, str(HOME))
    from bench.benchmark import machine
    from bench.collect_runs import typed_command
    from formats.machine import default_activation_bits, processor_name
    from formats.run import versions
    from native.build import native_library
    from native.weights import instructions
    settings.work.mkdir(parents=True, exist_ok=True)
    figures = json.loads(settings.json.read_text()) if settings.json.is_file() else {}
    cpu = f"{processor_name()}, {instructions(native_library(default_activation_bits(), print, tiles=None))}"
    here = figures.setdefault(cpu, {})
    for part in PARTS:
        if settings.part not in (None, part.__name__):
            continue
        if part.__name__ in here and not settings.again:
            print(f"--- {part.__name__}: {settings.json} has it for this CPU; --again measures it again", flush=True)
            continue
        print(f"--- {part.__name__}", flush=True)
        here[part.__name__] = {"command": typed_command("bench.measure_speed", sys.argv[1:]), **versions(HOME),
                               "peers": {**peer_versions(settings.peers), **peer_versions(settings.deepsparse)},
                               "machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": part(settings)}
        settings.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
