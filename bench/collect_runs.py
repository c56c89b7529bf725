"""The results of a folder of runs (what train.py and infer_cpu.py left there) as one small file.

    python -m bench.collect_runs out/minilm-l6 --json bench/sst2.json
"""
import argparse
import json
from pathlib import Path

SETTINGS = ("stage", "task", "pattern", "sparsity", "steps", "batch_size", "max_len", "lr", "kd_weight", "kd_target",
            "precision", "seed", "threads")


def collect(root):
    """{run's folder below root: its settings, machine, metrics, seconds, bytes; what the INT8 engine measured}"""
    runs = {}
    for path in sorted(Path(root).rglob("metrics.json")):
        run, result = json.loads((path.parent / "run.json").read_text()), json.loads(path.read_text())
        runs[str(path.parent.relative_to(root))] = entry = {
            "settings": {name: run["settings"][name] for name in SETTINGS if run["settings"][name] not in ("", None)},
            **{name: run[name] for name in ("processor", "cores", "torch", "git_commit")},
            **{name: result[name] for name in ("metrics", "sparsity", "training_seconds")},
            "file_bytes": {file.name: file.stat().st_size for file in sorted(path.parent.glob("*.safetensors"))}}
        engine = path.parent / "infer.json"
        if engine.is_file():
            entry["engine"] = json.loads(engine.read_text())
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="the folder that --out named")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    arguments.json.write_text(json.dumps(collect(arguments.runs), indent=1) + "\n")
