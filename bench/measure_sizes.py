"""Where the bytes of three published sizes lie, dense and as sparse INT8; writes bench/size.json.

    python -m bench.measure_sizes               two minutes, 2 GB of memory

Weights are random: how many bytes they take depends on their number and on where the zeros lie alone.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace

from bench.size import run_size
from formats.files import write_json
from formats.run import versions

ROOT = Path(__file__).resolve().parent.parent
MODELS = (("bert-large", 0.9, "unstructured"), ("bert-base", 0.85, "unstructured"), ("bert-base", 0.8, "1x4"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "size.json")
    arguments = parser.parse_args(arguments)
    models = {f"{preset} {sparsity:.0%} {pattern}":
              run_size(SimpleNamespace(random=preset, sparsity=sparsity, pattern=pattern))
              for preset, sparsity, pattern in MODELS}
    write_json(arguments.json, {"command": "python -m bench.measure_sizes", **versions(ROOT), "models": models})


if __name__ == "__main__":
    main()
