"""docs/walk.md: its numbers are what the command prints, its exercises apply and do what they say, and their results
are the measured ones."""
import json
import re

import pytest
from conftest import ROOT, SHORT

from bench import forks, measure_exercises, walk

PAGE = ROOT / "docs" / "walk.md"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def test_the_page_shows_what_the_command_prints(capsys):
    """Words and counts to the letter; measured numbers, which another CPU rounds otherwise, nearly."""
    walk.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line[:2] != "# " and line[:7] != "warning"]
    shown = "".join(re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.M | re.S)).splitlines()
    assert [NUMBER.sub("0", line) for line in printed] == [NUMBER.sub("0", line) for line in shown]
    for ours, theirs in zip(printed, shown):
        for first, second in zip(NUMBER.findall(ours), NUMBER.findall(theirs)):
            assert float(first) == pytest.approx(float(second), rel=0.02, abs=2 if "levels" in ours else 0.02), ours


def test_results_of_the_exercises_are_the_measured_ones():
    found = json.loads((ROOT / "bench" / "exercises.json").read_text())
    runs = found["runs"]
    assert set(runs) == {"pretrain", *measure_exercises.RUNS}
    assert {run["git_commit"] for run in runs.values()} == set(found["runs_of_commits"])
    values = {name: f"{runs[name]['metrics']['validation_mlm_loss']:.3f}" for name in measure_exercises.RUNS}
    values.update({name: f"{value:.1e}" for name, value in found["rounded_away"].items()})
    assert dict(re.findall(r"<!-- ([^>]*) -->([\d.e-]*\d)", PAGE.read_text())) == values


def fork(tmp_path, number):
    title = re.search(rf"^## (Exercise {number}: .*)$", PAGE.read_text(), re.M).group(1)
    return forks.copy_with(tmp_path / "code", [forks.change(PAGE, title)])


def test_a_zeroed_weight_is_gone(tmp_path):
    look = ("import prune, model; m = model.build(model.PRESETS['tiny'], 'encoder'); "
            "prune.update_masks(m, 10, prune.Ramp(0.5, 0, 10, 20, 10), prune.Pattern()); "
            "print(int((m.encoder.layers[0].query.weight == 0).sum()))")
    assert forks.run_in(fork(tmp_path, 1), "-c", look) == "8192\n"
    assert forks.run_in(ROOT, "-c", look) == "0\n"


def test_without_rewinding_the_rate_only_falls(tmp_path, chain, world):
    forks.run_in(fork(tmp_path, 2), "train.py", "--stage", "prune", *SHORT, "--steps", "40", "--init",
                 chain / "pretrain", "--teacher", chain / "pretrain", "--corpus", world / "corpus.txt", "--out",
                 tmp_path)
    lines = (tmp_path / "prune-unstructured-0.85" / "log.csv").read_text().splitlines()
    column = lines[0].split(",").index("learning_rate")
    rates = [float(line.split(",")[column]) for line in lines[1:]]
    assert len(rates) == 4 and rates == sorted(rates, reverse=True)


def test_the_measurement_in_a_small_form(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_exercises, "RUNS", {"as it is": measure_exercises.RUNS["2:4"]})
    monkeypatch.setattr("sys.argv", ["measure_exercises", "--steps", "4", "--out", str(tmp_path), "--json",
                                     str(tmp_path / "found.json")])
    measure_exercises.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["runs"]["as it is"]["sparsity"] == 0.5 and found["runs"]["as it is"]["settings"]["steps"] == 4
    groups = [row[i:i + 4].count("1") for row in found["masks"]["as it is"] for i in range(0, len(row), 4)]
    assert set(groups) == {2} and len(groups) == 64 * 16
    assert found["rounded_away"]["row"] < found["rounded_away"]["tensor"] < 0.01


def test_a_diff_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 times"):
        forks.copy_with(tmp_path / "code", [("prune.py", "no such line\n", "")])
