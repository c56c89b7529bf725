"""How fast a corpus becomes token shards, against the bare tokenizer on the same cores, and in how much memory.

    python -m bench.measure_shards --megabytes 20 [--text FILE_OR_FOLDER] [--json FILE]

The text (by default that of the tiny world) is repeated up to the wanted size. Every measurement runs in its own
process; bare is encode_batch_fast on the same sentences, cut beforehand, in batches of the same size, its result thrown
away. Seconds are those of the clock; CPU seconds hardly depend on what else the machine does. Peak memory is the
process's own, torch and the rest of the program included.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def peak_memory():
    """Bytes, at most, that this process has had in memory so far."""
    status = Path("/proc/self/status")          # on Linux ru_maxrss begins with the memory of the parent
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_text(source, path, size):
    """`size` bytes of the source's text, again and again, as plain text."""
    from data.corpus import Documents
    documents = Documents(source, size)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for document in documents:
                file.write("\n".join(document) + "\n\n")
                if file.tell() >= size:
                    break


def bare(path, tokenizer):
    """Seconds, CPU seconds, tokens of encode_batch_fast alone."""
    from data import shards
    batches = [[sentence for document in batch.documents for sentence in document]
               for batch in shards.batches([path], 1 << 60)]
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
    return time.perf_counter() - started, time.process_time() - cpu, tokens


def prepared(path, tokenizer):
    """Seconds, CPU seconds, tokens of the whole way to the shards."""
    from data import shards
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shards.prepare(path, tokenizer, folder)
        seconds = time.perf_counter() - started, time.process_time() - cpu
        return *seconds, sum(len(shard.tokens) for shard in shards.map_shards(folder, tokenizer))


def rows(path, tokenizer):
    """Seconds, CPU seconds, spans: from shards to the first batch of training."""
    from data import shards, text
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shards.prepare(path, tokenizer, folder)
        started, cpu = time.perf_counter(), time.process_time()
        data = text.PretrainingData(shards.map_shards(folder, tokenizer), tokenizer, 128)
        data.rows(0, 32)
        return time.perf_counter() - started, time.process_time() - cpu, len(data) + len(data.validation_spans)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from data import shards, text, tiny
    if arguments.child:
        name, path, model = arguments.child
        seconds, cpu, count = globals()[name](Path(path), text.load_tokenizer(model))
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "count": count, "peak_bytes": peak_memory()}))
        return
    measured = {"bare": [], "prepared": [], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "text.txt", Path(folder) / "model"
        source = arguments.text or tiny.ensure() / "corpus.txt"
        write_text(source, path, arguments.megabytes << 20)
        text.save_tokenizer(text.train_tokenizer(shards.Documents(path, 2 << 20), arguments.vocab_size), model)
        for _ in range(arguments.rounds):           # in turn, so that a busy minute hits them all
            for name, results in measured.items():
                command = [sys.executable, __file__, "--child", name, str(path), str(model)]
                results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        size = path.stat().st_size
    best = {name: {key: min(result[key] for result in results) for key in results[0]}
            for name, results in measured.items()}
    for result in (best["bare"], best["prepared"]):
        result |= {"bytes_per_second": size / result["seconds"], "bytes_per_cpu_second": size / result["cpu_seconds"]}
    report = {"bytes": size, "tokens": best["prepared"]["count"], **best,
              "prepared_of_bare": best["bare"]["seconds"] / best["prepared"]["seconds"],
              "prepared_of_bare_cpu": best["bare"]["cpu_seconds"] / best["prepared"]["cpu_seconds"],
              "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
              "rayon_threads": os.environ.get("RAYON_NUM_THREADS"), "machine": platform.machine()}
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
