"""The committed results: each names its commit and its settings, and these are what today's recipes lead to."""
import json
import re
from dataclasses import asdict

import pytest
from conftest import ROOT

import train
from bench import collect_runs, measure_spread, measure_tiny

FILES = ("tiny.json", "spread.json")
CHOSEN = ("stage", "task", "sparsity", "threads", "precision", "seed")     # what a command line says; a recipe the rest


def read(name):
    return json.loads((ROOT / "bench" / name).read_text())


def complete(settings):
    """AssertionError unless settings hold all that train.py would set for such a run, and the same values."""
    typed = {name: settings[name] for name in CHOSEN if name in settings}
    typed |= {"init": "random"} if settings.get("init") == "random" else {}
    typed |= {"mask": "gradual"} if settings["mask"] == "gradual" else {}
    expected = collect_runs.settings_of(asdict(train.resolve({"threads": 1, "precision": "fp32", **typed})))
    for left_open in ("precision", "threads", "activation_bits", *(() if "steps" in expected else ("steps",))):
        expected[left_open] = settings.get(left_open)           # of the machine, or of the number of rows
    assert {name: value for name, value in expected.items() if value is not None} == settings


@pytest.mark.parametrize("name", FILES)
def test_a_results_file_says_where_it_comes_from(name):
    content = read(name)
    assert re.fullmatch("[0-9a-f]{40}", content["git_commit"])
    assert content["processor"] and content["torch"] and content["command"].startswith("python -m bench.")
    assert len(content["settings"]) >= 5
    for settings in content["settings"].values():
        complete(settings)


def test_settings_that_are_left_out_are_noticed():
    settings = read("tiny.json")["settings"]["mnli/teacher"]
    complete(settings)
    for name in ("dropout", "epochs", "lr", "beta2"):
        with pytest.raises(AssertionError):
            complete({key: value for key, value in settings.items() if key != name})
        with pytest.raises(AssertionError):
            complete({**settings, name: 0.123})


def test_figures_of_two_machines_or_settings_make_no_table():
    entry = dict.fromkeys((*collect_runs.SAME_IN_ALL, "git_commit"), "a")
    assert collect_runs.common([entry, entry]) == {**entry, "runs_of_commits": {"a": 2}}
    found = collect_runs.common([entry, {**entry, "git_commit": "b"}, {**entry, "git_commit": "b"}])
    assert found["git_commit"] == "b" and found["runs_of_commits"] == {"b": 2, "a": 1}
    with pytest.raises(SystemExit, match="differ in torch: a, b"):
        collect_runs.common([entry, {**entry, "torch": "b"}])
    one, other = ({"x": {"settings": {"lr": rate, "seed": seed}}} for rate, seed in ((0.1, 0), (0.2, 1)))
    assert measure_tiny.settings_without_seed([one, one]) == {"x": {"lr": 0.1}}
    with pytest.raises(SystemExit, match="other settings"):
        measure_tiny.settings_without_seed([one, other])
    with pytest.raises(SystemExit, match="other settings"):
        measure_spread.settings_by_kind([("dense 0", one["x"]), ("dense 1", other["x"])])


def test_record_of_a_run(chain):
    """Of a finished run: all settings but the defaults, and no path."""
    entry = collect_runs.record(chain / "pretrain")
    assert str(chain) not in json.dumps(entry) and entry["metrics"] and entry["file_bytes"]["model.safetensors"] > 0
    defaults = train.Settings()
    run = json.loads((chain / "pretrain" / "run.json").read_text())["settings"]
    for name, value in run.items():
        if value != getattr(defaults, name) and name not in (*collect_runs.PLACES, "out", "resume"):
            assert entry["settings"].pop(name) == value
    assert set(entry["settings"]) <= set(collect_runs.PLACES)


def test_the_spread_of_the_tiny_world():
    """What README says of luck: the summary is that of the rows, and no seed falls through."""
    content = read("spread.json")
    rows = content["runs"]
    models = {tuple(row["upstream"]) for row in rows}
    assert len({(*row["upstream"], row["seed"]) for row in rows}) == len(rows) == 8 * len(models)
    assert {model[0] for model in models} == {0, 1}
    for kind, named in content["summary"].items():
        for name, value in named.items():
            assert value["worst"] == min(row[kind][name] for row in rows)
    assert min(row["dense"]["accuracy"] for row in rows) > 0.88
    worst = max(row["dense"]["accuracy"] - row["int8"]["accuracy"] for row in rows)
    assert worst == pytest.approx(content["summary"]["int8"]["accuracy"]["most below its dense model"], abs=1e-9)
    for seed in read("tiny.json")["seeds"].values():
        for task in set(measure_tiny.TASKS) - {"mnli"}:
            assert min(seed[kind][task] for kind in ("dense", "sparse", "int8")) > 0.90
