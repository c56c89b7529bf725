"""Every option that reaches the loop does something: a few steps with it changed give other weights."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import DIRECTORIES, commands

import model as network
import train
from data import settings
from data.batches import dropout_seed
from formats.machine import default_activation_bits
from formats.safetensors import read_safetensors

STEPS = 4
OTHER_BITS = str(15 - default_activation_bits())        # of 7 and 8, that which is not this CPU's default
COMMON = [("--seed", "1"), ("--steps", "5"), ("--batch-size", "4"), ("--max-len", "8"), ("--lr", "0.005"),
          ("--beta2", "0.9"), ("--warmup", "0.25"), ("--weight-decay", "0.5"), ("--dropout", "0.3")]
TAUGHT = [("--temperature", "7"), ("--kd-weight", "0.1"), ("--teacher", "none")]
OPTIONS = {
    "pretrain": [*COMMON, ("--precision", "fp32")],
    "prune": [*COMMON, *TAUGHT, ("--kd-target", "masked"), ("--sparsity", "0.5"), ("--pattern", "4x1"),
              ("--ramp-end", "0.25"), ("--update-end", "0.5"), ("--update-every", "0.5"), ("--init", "teacher"),
              ("--criterion", "reconstruction")],
    "teacher": [*COMMON, ("--init", "random")],
    "finetune": [*COMMON, *TAUGHT, ("--kd-hidden", "2")],
    "gradual": [*COMMON, *TAUGHT, ("--sparsity", "0.5"), ("--pattern", "1x4"), ("--ramp-end", "0.25"),
               ("--kd-hidden", "2")],
    "quantize": [*COMMON, *TAUGHT, ("--kd-hidden", "2"), ("--activation-bits", OTHER_BITS), ("--weight-scales", "tensor")],
}
DOES_NOT_REACH_IT = {"stage", "preset", "recipe", "resume", "out", "data", "corpus", "task", "mask", "epochs",
                     "micro_batch", "threads", "device"}       # chosen before it, or held to change nothing elsewhere


def weights_of(stage, world, chain, out, *changes):
    """The weights after a few steps of a stage that starts from the finished chain."""
    given = dict(zip(changes[::2], changes[1::2]))
    start = {"pretrain": (), "prune": ("pretrain", "pretrain"), "teacher": ("pretrain",),
             "finetune": ("prune", "teacher"), "gradual": ("pretrain", "teacher"), "quantize": ("finetune", "teacher")}
    flags = dict(zip(("--init", "--teacher"), (str(chain / DIRECTORIES[name]) for name in start[stage])))
    flags = {**flags, **given}
    if flags.get("--init") == "teacher":
        flags["--init"] = str(chain / DIRECTORIES["teacher"])
    arguments = commands(world, out, steps=STEPS)[stage]
    # warm-up would make the first of so few steps one without effect
    typed = [each for pair in flags.items() for each in pair]
    train.main([*arguments, "--warmup", "0", "--update-every", "0.25", *typed])
    directory, = (path.parent for path in out.rglob("metrics.json"))
    return read_safetensors(directory / "model.safetensors")[0]


@pytest.fixture(scope="module")
def plain(world, chain, tmp_path_factory):
    return {stage: weights_of(stage, world, chain, tmp_path_factory.mktemp("plain")) for stage in OPTIONS}


@pytest.mark.parametrize("stage", OPTIONS)
def test_the_same_options_give_the_same_weights(stage, plain, world, chain, tmp_path):
    again = weights_of(stage, world, chain, tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain[stage].items())


@pytest.mark.parametrize("stage, flag, value", [(stage, *option) for stage, options in OPTIONS.items()
                                                for option in options])
def test_every_option_reaches_the_loop(stage, flag, value, plain, world, chain, tmp_path):
    if flag == "--precision" and train.has_bf16("cpu") is False:
        pytest.skip("this CPU trains in fp32 anyway")
    changed = weights_of(stage, world, chain, tmp_path, flag, value)
    assert any(not torch.equal(changed[name], tensor) for name, tensor in plain[stage].items())


IDLE = {"criterion": "reconstruction", "corpus": "nowhere", "data": "nowhere", "pattern": "4x1", "ramp_end": "0.25", "update_end": "0.5",
        "update_every": "0.5", "temperature": "7", "kd_weight": "0.1", "kd_target": "masked", "kd_hidden": "3", "activation_bits": OTHER_BITS,
        "weight_scales": "tensor"}


@pytest.mark.parametrize("stage", OPTIONS)
def test_what_a_stage_does_not_look_at_changes_nothing_and_may_differ_on_resume(stage, plain, world, chain, tmp_path):
    """So a dense teacher is kept when --stage all goes on with another pattern."""
    started = json.loads((chain / DIRECTORIES[stage] / "run.json").read_text())
    s = train.Settings(**started["settings"])
    init, teacher = (Path(started[name]) if started[name] else None for name in ("parent", "teacher"))
    idle, decided = settings.not_looked_at(s, init, teacher), settings.deciding(s, init, teacher)["settings"]
    changes = [each for name in idle for each in ("--" + name.replace("_", "-"), IDLE[name])]
    assert not set(idle) & set(decided) and len(idle) + len(decided) >= len(dataclasses.fields(s)) - 4
    changed = weights_of(stage, world, chain, tmp_path, *changes)
    assert all(torch.equal(changed[name], tensor) for name, tensor in plain[stage].items())
    used = {flag.lstrip("-").replace("-", "_") for flag, _ in OPTIONS[stage]} - {"init", "teacher", "steps"}
    assert used <= set(decided)                       # and what is seen to change the weights decides


def test_no_option_is_left_out():
    tried = {flag.lstrip("-").replace("-", "_") for options in OPTIONS.values() for flag, _ in options}
    assert tried | DOES_NOT_REACH_IT == {field.name for field in dataclasses.fields(train.Settings)}


def test_the_largest_gradient_reaches_the_loop(plain, world, chain, tmp_path, monkeypatch):
    """AdamW does not see the size of a gradient, but one that is cut in some steps only."""
    monkeypatch.setattr(train, "LARGEST_GRADIENT", 1e-3)
    changed = weights_of("teacher", world, chain, tmp_path)
    assert any(not torch.equal(changed[name], tensor) for name, tensor in plain["teacher"].items())


def test_every_forward_pass_has_a_seed_of_its_own(world, chain, tmp_path, monkeypatch):
    """Of dropout: by the step and the first row, whatever the process."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    weights_of("teacher", world, chain, tmp_path, "--micro-batch", "2", "--seed", "3")
    s = train.Settings(seed=3, batch_size=8, micro_batch=2)
    assert seeds[-4 * STEPS:] == [dropout_seed(s, step, number) for step in range(STEPS) for number in range(4)]
    assert len({dropout_seed(dataclasses.replace(s, seed=seed), step, number) for seed in (0, 1, 2 ** 31 - 1)
                for step in (0, 1, 99_999) for number in range(4)}) == 36
    assert all(0 <= dropout_seed(dataclasses.replace(s, seed=2 ** 31 - 1), 10 ** 9, n) < 2 ** 63 for n in range(4))


def test_dropout_differs_from_step_to_step(chain):
    model = network.ClassificationModel(train.read_config(chain / "pretrain")[0])
    ids = torch.ones(2, 8, dtype=torch.int64)
    found = []
    for step in range(3):
        torch.manual_seed(dropout_seed(train.Settings(batch_size=8, micro_batch=8), step, 0))
        found.append(model.train()(ids, ids, ids * 0))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
