"""What goes into a results file: every run's commit, machine and settings, and no two kinds of runs in one table."""
import json
import re
from dataclasses import asdict

import pytest
from conftest import ROOT

import train
from bench import collect_runs, measure_tiny
from data.tasks import TASKS

FILES = ("tiny.json", "spread.json", "spread_bf16.json")
CHOSEN = ("stage", "task", "sparsity", "threads", "seed")          # what a command line says; a recipe the rest


def read(name):
    return json.loads((ROOT / "bench" / name).read_text())


def complete(settings):
    """AssertionError unless settings hold all that train.py would set for such a run, and the same values."""
    typed = {name: settings[name] for name in CHOSEN if name in settings}
    typed |= {"init": "random"} if settings.get("init") == "random" else {}
    typed |= {"mask": "gradual"} if settings["mask"] == "gradual" else {}
    expected = collect_runs.settings_of(asdict(train.resolve({"threads": 1, "precision": "fp32", **typed})))
    for left_open in ("init", "precision", "threads", "activation_bits", *(() if "steps" in expected else ("steps",))):
        expected[left_open] = settings.get(left_open)           # of the machine, a place, or of the number of rows
    assert {name: value for name, value in expected.items() if value is not None} == settings


def test_the_quick_start_names_its_commit_and_todays_settings():
    runs = read("quick_start.json")
    assert len(runs) == 2 + 3 * len(TASKS) and collect_runs.common([*runs.values()])
    for run in runs.values():
        assert re.fullmatch("[0-9a-f]{40}", run["git_commit"]) and run["processor"] and run["torch"]
        complete(run["settings"])
    settings = runs["mnli/teacher"]["settings"]
    for name in ("dropout", "epochs", "lr", "beta2"):           # and what is left out, or is another, is noticed
        with pytest.raises(AssertionError):
            complete({key: value for key, value in settings.items() if key != name})
        with pytest.raises(AssertionError):
            complete({**settings, name: 0.123})


@pytest.mark.parametrize("name", FILES)
def test_the_tiny_worlds_files_name_their_commit_and_todays_settings(name):
    content = read(name)
    assert re.fullmatch("[0-9a-f]{40}", content["git_commit"])
    assert content["processor"] and content["torch"] and content["command"].startswith("python -m bench.")
    assert len(content["settings"]) >= 5
    for settings in content["settings"].values():
        complete(settings)


def test_the_evidence_on_real_data_names_its_commits_and_todays_recipe():
    """Every run is one that its recipe and what was typed beside it would make today."""
    runs = read("minilm.json")["runs"]
    assert len(runs) >= 8
    for name, run in runs.items():
        assert re.fullmatch("[0-9a-f]{40}", run["git_commit"]) and run["processor"] and run["torch"], name
        settings = run["settings"]
        typed = {key: settings[key] for key in (*CHOSEN, "recipe", "preset", "pattern", "precision", "kd_hidden", "corpus",
                                                "data") if key in settings}
        expected = collect_runs.settings_of(asdict(train.resolve({"mask": settings["mask"], "micro_batch": settings[
            "micro_batch"], "activation_bits": 8, **typed, "precision": "fp32"})))
        expected |= {key: settings[key] for key in ("steps", "precision", "init", "teacher") if key in settings}
        assert expected == settings, name


def test_luck_is_small_on_the_tiny_world():
    """Of every seed and of every fine-tuning: no task falls through, and INT8 follows its dense model."""
    rows, seeds = read("spread.json")["runs"], read("tiny.json")["seeds"]
    models = {tuple(row["upstream"]) for row in rows}
    assert len({(*row["upstream"], row["seed"]) for row in rows}) == len(rows) == 8 * len(models) == 32
    assert min(row["dense"]["accuracy"] for row in rows) > 0.88
    assert max(row["dense"]["accuracy"] - row["int8"]["accuracy"] for row in rows) < 0.04
    assert len(seeds) >= 5
    for seed in seeds.values():
        assert seed["dense"]["mnli"] > 0.88 and seed["dense"]["mnli"] - seed["int8"]["mnli"] < 0.04
        assert min(seed[kind][task] for kind in ("dense", "sparse", "int8") for task in measure_tiny.TASKS) >= 0.98
    for kind, named in read("spread.json")["summary"].items():
        for name, value in named.items():
            assert value["worst"] == min(row[kind][name] for row in rows)


def test_luck_in_bfloat16_is_what_the_page_says():
    content = read("spread_bf16.json")
    worst = {name: ", ".join(f"{100 * min(row[kind][name] for row in content['runs']):.1f}"
                             for kind in ("dense", "sparse", "int8")) for name in ("accuracy", "accuracy_mismatched")}
    text = " ".join((ROOT / "docs" / "tiny_world.md").read_text().split())
    for values, words in ((worst["accuracy"], "the worst on the matched set are 100.0 dense, 98.7 sparse and 98.2 INT8"),
                          (worst["accuracy_mismatched"], "95.4, 88.7 and 86.2")):
        assert re.findall(r"[\d.]+\d", words) == values.split(", ") and words in text
    assert {tuple(row["upstream"]) for row in content["runs"]} == {(0, 1, "bf16"), (1, 1, "bf16")}


def test_figures_of_two_machines_or_settings_make_no_table():
    entry = dict.fromkeys((*collect_runs.SAME_IN_ALL, "git_commit"), "a")
    assert collect_runs.common([entry, entry]) == {**entry, "runs_of_commits": {"a": 2}}
    found = collect_runs.common([entry, {**entry, "git_commit": "b"}, {**entry, "git_commit": "b"}])
    assert found["git_commit"] == "b" and found["runs_of_commits"] == {"b": 2, "a": 1}
    with pytest.raises(SystemExit, match="differ in torch: a, b"):
        collect_runs.common([entry, {**entry, "torch": "b"}])
    one, other = ({"settings": {"lr": rate, "seed": seed}} for rate, seed in ((0.1, 0), (0.2, 1)))
    same = {"settings": {"lr": 0.1, "seed": 7}}
    assert collect_runs.shared_settings([("x", one), ("y", other), ("x", same)], ("seed",)) == {
        "x": {"lr": 0.1}, "y": {"lr": 0.2}}
    with pytest.raises(SystemExit, match="the runs 'x' have other settings"):
        collect_runs.shared_settings([("x", one), ("x", other)], ("seed",))


def test_summary_of_seeds():
    seeds = {str(seed): {column: dict.fromkeys(measure_tiny.SCORES, value) for column in measure_tiny.COLUMNS}
             for seed, value in ((0, 0.5), (1, 0.7))}
    summary, worst = measure_tiny.summarize(seeds)
    assert summary["dense"]["average"] == pytest.approx([0.6, 0.02 ** 0.5]) and worst["dense"]["mnli"] == 0.5


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
