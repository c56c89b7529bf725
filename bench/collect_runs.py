"""What train.py and infer_cpu.py left in the directories of runs, as records for a results file.

    python -m bench.collect_runs out/minilm-l6 --json FILE
"""
import argparse
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

from formats.files import write_json
from train import Settings

PLACES = ("init", "teacher", "corpus", "data")       # a name says enough: where they lay is nobody's business
SAME_IN_ALL = ("processor", "cores", "torch", "python")


def settings_of(settings):
    """{setting: value} of all that differ from the defaults of train.Settings, places by their last name. settings:
    dict as in run.json."""
    defaults = {field.name: field.default for field in fields(Settings)}
    return {name: Path(value).name if name in PLACES else value for name, value in settings.items()
            if value != defaults[name] and name not in ("out", "resume")}


def record(directory):
    """Of one finished run: settings, commit, machine, metrics, seconds, bytes; what the INT8 engine measured."""
    directory = Path(directory)
    run, result = (json.loads((directory / name).read_text()) for name in ("run.json", "metrics.json"))
    engine = directory / "infer.json"
    return {"settings": settings_of(run["settings"]),
            **{name: run[name] for name in ("git_commit", *SAME_IN_ALL)},
            **{name: result[name] for name in ("metrics", "sparsity", "training_seconds")},
            "file_bytes": {file.name: file.stat().st_size for file in sorted(directory.glob("*.safetensors"))},
            **({"engine": json.loads(engine.read_text())} if engine.is_file() else {})}


def collect(root):
    """{run's folder below root: its record}"""
    return {str(path.parent.relative_to(root)): record(path.parent)
            for path in sorted(Path(root).rglob("metrics.json"))}


def typed_command(module, words):
    """The command line that started a module, with names for the places on this machine."""
    names = {"--init": "MODEL_DIR", "--model": "MODEL_DIR", "--tokenizer": "MODEL_DIR", "--corpus": "TEXT_DIR",
             "--data": "TASKS_DIR", "--peers": "PEERS/bin/python", "--deepsparse": "DEEPSPARSE/bin/python",
             "--out": "OUT", "--work": "OUT", "--json": "FILE"}
    return " ".join([f"python -m {module}", *(names.get(before, word) for before, word in zip(["", *words], words))])


def common(records):
    """What all records share of machine and versions, SystemExit where they differ; and their commits, each with how
    many runs it made, the one that made most first."""
    for name in SAME_IN_ALL:
        values = {entry[name] for entry in records}
        if len(values) > 1:
            raise SystemExit(f"these runs differ in {name}: {', '.join(map(str, sorted(values)))}; give another --out")
    commits = Counter(entry["git_commit"] for entry in records).most_common()
    return {"git_commit": commits[0][0], "runs_of_commits": dict(commits),
            **{name: records[0][name] for name in SAME_IN_ALL}}


def shared_settings(named, apart_from):
    """{kind of run: its settings but for those in `apart_from`}. named: [(kind, record)]; SystemExit where two runs of
    one kind differ."""
    shared = {}
    for kind, entry in named:
        settings = {name: value for name, value in entry["settings"].items() if name not in apart_from}
        if shared.setdefault(kind, settings) != settings:
            raise SystemExit(f"the runs '{kind}' have other settings than each other; give another --out")
    return shared


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="the folder that --out named")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    write_json(arguments.json, collect(arguments.runs))
