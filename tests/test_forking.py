"""docs/forking.md: every diff applies to today's code, runs, and does what the page says."""
import json
import re

import pytest
from conftest import ROOT, SHORT

from bench import forks

PAGE = ROOT / "docs" / "forking.md"


@pytest.fixture
def fork(tmp_path, request):
    """A function that runs a line of Python in a copy of the project with one change."""
    code = forks.copy_with(tmp_path / "fork", [forks.change(PAGE, request.param)])
    return lambda *arguments: forks.run_in(code, *arguments)


def changed(title):
    return pytest.mark.parametrize("fork", [title], indirect=True)


def prune_command(chain, world, out, *more):
    return ["train.py", "--stage", "prune", *SHORT, "--steps", "12", "--init", chain / "pretrain", "--teacher",
            chain / "pretrain", "--corpus", world / "corpus.txt", "--out", out, *more]


def zeros(directory):
    """{layer: share of zeros} of a finished directory, and that of all."""
    metrics = json.loads((directory / "metrics.json").read_text())
    return {name: zeros / weights for name, (weights, zeros) in metrics["layers"].items()}, metrics["sparsity"]


def test_every_change_is_tested():
    titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.M)
    source = (ROOT / "tests" / "test_forking.py").read_text()
    assert len(titles) == 6 and all(f'@changed("{title}")' in source for title in titles)


@changed("Another criterion")
def test_no_output_loses_all_its_inputs(fork, chain, world, tmp_path):
    look = ("import torch, prune; torch.manual_seed(0); weight = torch.rand(2, 40); weight[0] *= 1000; "
            "print((~prune.magnitude_mask(weight, 0.5)).sum(1).tolist())")
    first, second = json.loads(fork("-c", look))
    assert first + second == 40 and min(first, second) >= 10
    assert forks.run_in(ROOT, "-c", look) == "[0, 40]\n"
    fork(*prune_command(chain, world, tmp_path))
    assert zeros(tmp_path / "prune-unstructured-0.85")[1] == pytest.approx(0.85, abs=1e-4)


@changed("Another share for each layer")
def test_layers_differ_and_the_total_stays(fork, chain, world, tmp_path):
    fork(*prune_command(chain, world, tmp_path, "--pattern", "1x4"))
    layers, total = zeros(tmp_path / "prune-1x4-0.85")
    assert total == pytest.approx(0.85, abs=1e-4)
    assert max(layers.values()) - min(layers.values()) > 0.01
    ours, _ = zeros(chain / "prune-1x4-0.85")
    assert max(ours.values()) - min(ours.values()) < 1e-3


@changed("Another pattern")
def test_groups_over_outputs(fork, chain, world, tmp_path):
    fork(*prune_command(chain, world, tmp_path, "--pattern", "2:4", "--sparsity", "0.5"))
    out = next(tmp_path.glob("prune-*"))
    look = (f"from formats.page import first_query; from pathlib import Path; w = first_query(Path({str(out)!r}))[1]; "
            f"print((w.T.reshape(-1, 4) == 0).sum(1).unique().tolist(), "
            f"len((w.reshape(-1, 4) == 0).sum(1).unique()))")
    assert fork("-c", look) == "[2] 5\n"


@changed("Another loss")
def test_logits_are_compared(fork, chain, world, tmp_path):
    look = "import torch, distill; print(float(distill.soft_loss(torch.tensor([[1., 2.]]), torch.zeros(1, 2), 7.0)))"
    assert float(fork("-c", look)) == 5.0
    fork("train.py", "--stage", "finetune", *SHORT, "--steps", "3", "--task", "sst2", "--data", world, "--init",
         chain / "prune-1x4-0.85", "--teacher", chain / "sst2/teacher", "--out", tmp_path)
    assert (tmp_path / "sst2/sparse-1x4-0.85/metrics.json").is_file()


@changed("Another task")
def test_the_task_is_trained_and_evaluated(fork, chain, world, tmp_path):
    (tmp_path / "RTE").mkdir()
    rows = [f"{i}\tthe cup was red.\tthe mug was {word}.\t{label}" for i in range(8)
            for word, label in (("red", "entailment"), ("blue", "not_entailment"))]
    for name in ("train", "dev"):
        (tmp_path / "RTE" / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    fork("train.py", "--stage", "finetune", *SHORT, "--steps", "3", "--task", "rte", "--data", tmp_path, "--sparsity",
         "0", "--init", chain / "pretrain", "--out", tmp_path)
    assert "accuracy" in fork("infer_cpu.py", tmp_path / "rte/teacher", "--engine", "fp32", "--evaluate", "--data",
                              tmp_path)


@changed("Another encoder")
def test_the_layer_takes_the_other_function(fork, chain, world, tmp_path):
    look = ("import torch, model; layer = model.Layer(model.PRESETS['tiny']).eval(); seen = []; "
            "layer.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])); "
            "layer(torch.randn(1, 4, 128), None); print(float(seen[0].min()))")
    assert float(fork("-c", look)) == 0.0
    fork(*prune_command(chain, world, tmp_path, "--pattern", "1x4"))
    assert zeros(tmp_path / "prune-1x4-0.85")[1] == pytest.approx(0.85, abs=1e-4)
