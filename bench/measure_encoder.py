"""A sentence encoder pruned and rounded without labels: what it finds, how fast it is, what it takes; writes
bench/encoder.json.

    python -m bench.measure_encoder --init MODEL_DIR --corpus TEXT --data TASKS             hours on two cores; goes on
    python -m bench.measure_encoder ... --peers PEERS/bin/python                            where it was killed

For 1x4 80 % and unstructured 85 %: train.py prunes and rounds by the recipe minilm-l6-hidden; infer_cpu.py looks for
SQuAD's paragraphs beside the dense model, orders STS-B where its file is there, and embeds --lines lines in a file. Then
all contenders embed the same questions and the same paragraphs in turn, each in a process of its own. The peers, in an
environment of their own:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 sentence-transformers onnx onnxruntime openvino nncf
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))           # a peer's process is started as a file
from bench import measure_speed  # noqa: E402
from bench.measure_speed import NAMES  # noqa: E402

PATTERNS = {"1x4": "0.8", "unstructured": "0.85"}
BATCH = 32                              # sentence-transformers' own


# ---------------------------------------------------------------------------------------------------------------------
# Contenders. Each function loads a model and returns encode(list of str) -> float32 (texts, H) of length 1.

def ours(directory, threads):
    import infer_cpu
    return infer_cpu.load(directory, threads=threads, say=lambda line: print(line, file=sys.stderr)).embed


def package(directory, threads):
    import torch
    from sentence_transformers import SentenceTransformer
    torch.set_num_threads(threads)
    return partial(SentenceTransformer(directory, device="cpu").encode, batch_size=BATCH, show_progress_bar=False)


def onnxruntime(folder, threads):
    run = measure_speed.onnxruntime(f"{folder}/dense-int8.onnx", "", threads)
    return partial(encode, lambda batch: run(batch)[0], folder)


def openvino(folder, threads):
    """Compiled once, for rows of any length: a shape of its own for each would be compiled anew all the time."""
    import openvino as runtime
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = runtime.Core().compile_model(f"{folder}/dense-int8.xml", "CPU", options)
    return partial(encode, lambda batch: compiled(batch)[0], folder)


def batches(texts, folder):
    """Yields (places, inputs) of texts sorted by length, as sentence-transformers makes batches."""
    import numpy as np
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    rows = tokenizer.encode_batch(texts)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for begin in range(0, len(order), BATCH):
        places = order[begin:begin + BATCH]
        ids = np.zeros((len(places), len(rows[places[0]].ids)), np.int64)
        for row, i in zip(ids, places):
            row[:len(rows[i].ids)] = rows[i].ids
        mask = (np.arange(ids.shape[1]) < np.array([[len(rows[i].ids)] for i in places])).astype(np.int64)
        yield places, dict(zip(NAMES, (ids, mask, np.zeros_like(ids))))


def encode(run, folder, texts):
    """Vectors by run(batch) -> hidden states: their mean, of length 1."""
    import numpy as np
    vectors = [None] * len(texts)
    for places, batch in batches(texts, folder):
        mask = batch["attention_mask"][..., None]
        means = (run(batch) * mask).sum(1) / mask.sum(1)
        for i, vector in zip(places, means / np.linalg.norm(means, axis=1, keepdims=True)):
            vectors[i] = vector
    return np.stack(vectors)


def export(directory, folder, texts):
    """Write dense-int8.onnx and dense-int8.xml of a BERT encoder, calibrated on texts; run among the peers."""
    import nncf
    import openvino as runtime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = AutoModel.from_pretrained(directory, attn_implementation="eager")

        def forward(self, *inputs):
            return self.encoder(**dict(zip(NAMES, inputs))).last_hidden_state

    path, ids = f"{folder}/dense.onnx", torch.randint(0, 1000, (2, 16))
    torch.onnx.export(States().eval(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), path,
                      input_names=list(NAMES), output_names=["hidden"],
                      dynamic_axes={key: {0: "b", 1: "s"} for key in NAMES}, opset_version=14, dynamo=False)
    quantize_dynamic(path, f"{folder}/dense-int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    rows = [batch for _, batch in batches(texts, folder)]
    quantized = nncf.quantize(runtime.convert_model(path), nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER,
                              subset_size=len(rows))
    runtime.save_model(quantized, f"{folder}/dense-int8.xml")


def work(contender, path, threads, texts):
    """A contender's process: the number of a group of texts in; its seconds, or at first its vectors, out."""
    answers, encode_texts = os.dup(1), globals()[contender](path, int(threads))
    os.dup2(2, 1)                                   # what a library prints is no answer
    groups = json.loads(Path(texts).read_text())
    vectors = [[[round(float(x), 6) for x in row] for row in encode_texts(group)] for group in groups]
    os.write(answers, (json.dumps(vectors) + "\n").encode())
    while line := sys.stdin.readline():
        start = time.perf_counter()
        encode_texts(groups[int(line)])
        os.write(answers, f"{time.perf_counter() - start}\n".encode())


# ---------------------------------------------------------------------------------------------------------------------
# The measurement

def typed(program, *arguments):
    """One command of ours, its output with ours; SystemExit where it fails."""
    if subprocess.run([sys.executable, str(HOME / program), *map(str, arguments)]).returncode:
        raise SystemExit(f"measure_encoder.py: {program} failed; its message is above")


def made(options, pattern):
    """(the INT8 directory, {stage: its record}) of one pattern."""
    from bench.collect_runs import record
    zeros = ["--pattern", pattern, "--sparsity", PATTERNS[pattern], "--recipe", "minilm-l6-hidden", "--preset",
             "minilm-l6", "--corpus", options.corpus, "--out", options.out, "--threads", options.threads, "--resume"]
    own = [("--steps", options.steps), ("--batch-size", options.batch_size), ("--lr", options.lr),
           ("--criterion", options.criterion)]
    typed("train.py", "--stage", "prune", "--init", options.init, *zeros,
          *itertools.chain(*((flag, value) for flag, value in own if value)))
    rounding = ["--steps", options.rounding_steps] if options.rounding_steps else []
    typed("train.py", "--stage", "quantize", "--teacher", options.init, *zeros, *rounding)
    folders = {"prune": f"prune-{pattern}-{PATTERNS[pattern]}", "quantize": f"int8-{pattern}-{PATTERNS[pattern]}"}
    return Path(options.out, folders["quantize"]), {stage: record(Path(options.out, folder))
                                                    for stage, folder in folders.items()}


def judged(options, directory):
    """{task: its metrics, the dense model's and the cosines beside them} by the commands a person would type."""
    found = {}
    for task, file in (("retrieval", "SQuAD/dev-v1.1.json"), ("stsb", "STS-B/dev.tsv")):
        if Path(options.data, file).is_file():
            path = directory / f"infer-{task}.json"
            typed("infer_cpu.py", directory, "--evaluate", "--task", task, "--data", options.data, "--against",
                  options.init, "--threads", options.threads, "--json", path)
            found[task] = json.loads(path.read_text())["metrics"]
    return found


def embedded(options, directory, texts, count):
    """{lines, seconds, peak MB of the process} of --embed over so many lines."""
    lines, vectors = Path(options.out, "lines.txt"), Path(options.out, "lines.npy")
    with open(lines, "w", encoding="utf-8") as file:
        file.writelines(text.replace("\n", " ") + "\n" for text in itertools.islice(itertools.cycle(texts), count))
    done = subprocess.run([sys.executable, __file__, "--embed", str(directory), str(lines), str(vectors),
                           str(options.threads)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("measure_encoder.py: embedding a file failed; its message is above")
    found = {"lines": count, **json.loads(done.stdout)}
    lines.unlink(), vectors.unlink()
    return found


def embed_file(directory, lines, vectors, threads):
    """In a process of its own: infer_cpu.py --embed, then {seconds, peak MB} on standard output."""
    import infer_cpu
    from bench.measure_shards import peak_memory
    start = time.perf_counter()
    infer_cpu.main([directory, "--embed", lines, "--to", vectors, "--threads", threads])
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_memory() / 2 ** 20}))


def speeds(options, directories, groups, rounds):
    """{contender: {texts a second of each group, medians over rounds in turn; mean cosine to the first's vectors}}"""
    import numpy as np
    folder = Path(options.out, "peers").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").write_text(json.dumps(groups))
    (folder / "tokenizer.json").write_bytes(Path(options.init, "tokenizer.json").read_bytes())
    contenders = {"dense, fp32 engine": (sys.executable, "ours", options.init)}
    if options.peers:
        if not (folder / "dense-int8.xml").is_file():
            subprocess.run([options.peers, __file__, "--export", options.init, str(folder)], check=True)
        contenders |= {"sentence-transformers, fp32": (options.peers, "package", options.init),
                       "ONNX Runtime, dynamic INT8": (options.peers, "onnxruntime", folder),
                       "OpenVINO, INT8": (options.peers, "openvino", folder)}
    contenders |= {f"native, {directory.name.removeprefix('int8-')}": (sys.executable, "ours", directory)
                   for directory in directories}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    workers = {name: subprocess.Popen([python, "-W", "ignore", __file__, "--work", contender, str(path),
                                       str(options.threads), str(folder / "texts.json")], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True, env=environment)
               for name, (python, contender, path) in contenders.items()}
    vectors = {name: np.concatenate([np.array(group) for group in measure_speed.ask(name, worker, None)])
               for name, worker in workers.items()}
    times = {name: [[] for _ in groups] for name in workers}
    for _, number, name in itertools.product(range(rounds), range(len(groups)), workers):
        times[name][number].append(measure_speed.ask(name, workers[name], number))
    measure_speed.dismiss(workers)
    first = next(iter(vectors.values()))
    return {name: {"texts_a_second": [round(len(group) / statistics.median(seconds), 1)
                                      for group, seconds in zip(groups, times[name])],
                   "cosine_to_dense": round(float((first * vectors[name]).sum(1).mean()), 4)} for name in workers}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="the folder of the dense encoder")
    parser.add_argument("--corpus", required=True, help="text to prune and round with")
    parser.add_argument("--data", required=True, help="the folder with SQuAD and maybe STS-B")
    parser.add_argument("--out", default="out/measure-encoder", help="where the runs go")
    parser.add_argument("--json", default=str(HOME / "bench" / "encoder.json"), help="the file to write")
    parser.add_argument("--patterns", type=lambda value: value.split(","), default=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", help="of pruning, in place of the recipe's: to try it out, or for less time")
    parser.add_argument("--batch-size", help="of pruning, in place of the recipe's")
    parser.add_argument("--lr", help="of pruning, in place of the recipe's")
    parser.add_argument("--criterion", help="of pruning, in place of the recipe's")
    parser.add_argument("--rounding-steps", help="in place of the recipe's")
    parser.add_argument("--speed-only", action="store_true", help="of models pruned in a few steps")
    parser.add_argument("--lines", type=int, default=1_000_000, help="to embed in one file")
    parser.add_argument("--texts", type=int, default=512, help="of each kind, to time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="the Python of the environment above")
    typed_here = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(typed_here)
    if options.speed_only:
        options.steps, options.rounding_steps = options.steps or "12", options.rounding_steps or "6"
    from bench.collect_runs import common, typed_command
    from data.tasks import read_questions
    from formats.files import write_json
    questions = read_questions(Path(options.data, "SQuAD", "dev-v1.1.json"))
    groups = [[question.question for question in questions],
              list(dict.fromkeys(question.context for question in questions))]
    result = {"command": typed_command("bench.measure_encoder", typed_here), "models": {}}
    directories, records = [], []
    for pattern in options.patterns:
        directory, runs = made(options, pattern)
        directories.append(directory)
        records += runs.values()
        result["models"][directory.name] = {**({} if options.speed_only else judged(options, directory)), "runs": runs}
    groups = [group[:options.texts] for group in groups]
    result["speeds"] = {"threads": options.threads, "groups": ["questions", "paragraphs"],
                        "peers": measure_speed.peer_versions(options.peers),
                        "contenders": speeds(options, directories, groups, options.rounds)}
    result["memory"] = [embedded(options, directories[0], groups[0], count)
                        for count in (options.lines // 100 or 1, options.lines)]
    write_json(options.json, {**result, **common(records)})
    print(json.dumps({name: result[name] for name in ("speeds", "memory")}, indent=1))


if __name__ == "__main__":
    if "--work" in sys.argv:
        work(*sys.argv[-4:])
    elif "--embed" in sys.argv:
        embed_file(*sys.argv[-4:])
    elif "--export" in sys.argv:
        folder_of_peers = sys.argv[-1]
        export(*sys.argv[-2:], json.loads(Path(folder_of_peers, "texts.json").read_text())[1][:300])
    else:
        main()
