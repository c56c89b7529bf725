"""The stages as a person runs them, on small files made here: chain, resume, settings, errors, what is left on disk."""
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DIRECTORIES, ROOT, SHORT, commands, fails, save_every

import model as network
import prune
import train
from data import DataError, batches, encode, recipes, tasks
from formats import machine, model_directory, run, safetensors

# ---------------------------------------------------------------------------------------------------------------------
# What a stage leaves

def test_every_stage_leaves_a_whole_directory(chain):
    for stage, name in DIRECTORIES.items():
        directory = chain / name
        files = {path.name for path in directory.iterdir()}
        expected = {"config.json", "model.safetensors", "compression.safetensors", "vocab.txt", "tokenizer.json",
                    "run.json", "log.csv", "log.txt", "metrics.json"} | (
                        {"int8.safetensors"} if stage == "quantize" else set())
        assert expected <= files and not [file for file in files if file.endswith((".tmp", ".pt"))]
        run = json.loads((directory / "run.json").read_text())
        assert run["settings"]["steps"] == 12 and run["torch"] == torch.__version__


def test_quantized_model_was_trained_on_the_embeddings_of_its_file(chain):
    directory = chain / "sst2" / "int8-1x4-0.85"
    weights, _ = safetensors.read_safetensors(directory / "model.safetensors")
    packed, _ = safetensors.read_safetensors(directory / "int8.safetensors")
    for kind in ("word", "position", "token_type"):
        stem = f"bert.embeddings.{kind}_embeddings."
        rows = packed[stem + "values"] * packed[stem + "weight_scale"][:, None]
        assert torch.allclose(weights[stem + "weight"], rows, rtol=1e-6, atol=0), kind


def test_the_first_rounded_step_knows_its_ranges(chain, world, tmp_path, monkeypatch):
    """Before anything is learnt, they are those of the whole first batch, in however many pieces it comes."""
    def learns(model, teacher, batch, *others):
        if len(others) > 1:                                                 # look_at_ranges gives the counts alone
            found.append({name: layer.act_range.tolist() for name, layer in network.linears(model)})
            raise KeyboardInterrupt
        return real(model, teacher, batch, *others)
    found, real = [], train.distill.loss
    monkeypatch.setattr(train.distill, "loss", learns)
    for pieces in ("8", "2"):
        with pytest.raises(SystemExit):
            train.main([*commands(world, chain)["quantize"], "--out", str(tmp_path / pieces), "--micro-batch", pieces,
                        "--init", str(chain / "sst2/sparse-1x4-0.85"), "--teacher", str(chain / "sst2/teacher"),
                        "--dropout", "0"])
    assert all(low < high for low, high in found[0].values())
    assert all(found[1][name] == pytest.approx(values, rel=1e-4) for name, values in found[0].items())


def test_sparsity_is_exact_and_locked(chain):
    """Zeros counted in the stored tensors: exactly floor(0.85 blocks) per layer after pruning, never fewer later."""
    weights, _ = safetensors.read_safetensors(chain / "prune-1x4-0.85" / "model.safetensors")
    pruned = {name: tensor for name, tensor in weights.items()
              if (".layer." in name or "pooler" in name) and tensor.ndim == 2}
    assert len(pruned) == 6 * network.PRESETS["tiny"].num_hidden_layers + 1
    for name, tensor in pruned.items():
        blocks = tensor.view(tensor.shape[0], -1, 4)
        assert int((blocks == 0).all(2).sum()) == int(0.85 * blocks.shape[0] * blocks.shape[1])
        assert bool(((blocks == 0).all(2) | (blocks != 0).all(2)).all())
    for later in ("sst2/sparse-1x4-0.85", "sst2/int8-1x4-0.85"):
        after, _ = safetensors.read_safetensors(chain / later / "model.safetensors")
        moved = 0
        for name, tensor in pruned.items():
            assert bool((after[name][tensor == 0] == 0).all()), name
            moved += int((after[name][tensor != 0] != tensor[tensor != 0]).sum())
        assert moved > 0                                  # the kept weights did train
    kept = json.loads((chain / "sst2/int8-1x4-0.85" / "metrics.json").read_text())
    assert kept["sparsity"] == pytest.approx(
        prune.measured_sparsity(model_directory.load(chain / "prune-1x4-0.85", "pretraining")))


def test_the_log_follows_the_schedule(chain):
    """log.csv holds one row per step, with the learning rate and the sparsity that the pure functions give."""
    settings = train.Settings(**json.loads((chain / "prune-1x4-0.85" / "run.json").read_text())["settings"])
    ramp = train.ramp_of(settings)
    with open(chain / "prune-1x4-0.85" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    for row in rows:
        step = int(row["step"]) - 1
        factor = prune.learning_rate_factor(step, 12, round(settings.warmup * 12), ramp)
        assert float(row["learning_rate"]) == pytest.approx(settings.lr * factor, rel=1e-5)
        assert abs(float(row["sparsity"]) - prune.sparsity_at(min(step, ramp.end), ramp)) < 1e-3
        assert {"loss", "mlm", "kd", "nsp", "kd_nsp", "tokens_per_second"} <= set(row)


def test_fine_tune_pruning_reaches_its_target(chain):
    metrics = json.loads((chain / "sst2/gradual-unstructured-0.85" / "metrics.json").read_text())
    for weights, zeros in metrics["layers"].values():
        assert zeros == int(0.85 * weights + 1e-6)


def test_directories_open_in_transformers(chain):
    """Every stage's directory gives the same outputs there, within 1e-5."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(5, 300, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    types = torch.randint(0, 2, ids.shape)
    for stage, name in DIRECTORIES.items():
        kind = "pretraining" if stage in ("pretrain", "prune") else "classification"
        ours = model_directory.load(chain / name, kind).eval()
        theirs_class = "BertForPreTraining" if kind == "pretraining" else "BertForSequenceClassification"
        theirs, info = getattr(transformers, theirs_class).from_pretrained(chain / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            expected = theirs.eval()(ids, attention_mask=mask, token_type_ids=types)
            if kind == "classification":
                assert torch.allclose(ours(ids, mask, types), expected.logits, atol=1e-5)
            else:
                features, sentence = ours(ids, mask, types, mask.bool())
                weight, bias = ours.vocabulary()
                assert torch.allclose(features @ weight.T + bias, expected.prediction_logits[mask.bool()], atol=1e-5)
                assert torch.allclose(sentence, expected.seq_relationship_logits, atol=1e-5)
        tokenizer = transformers.AutoTokenizer.from_pretrained(chain / name)
        assert tokenizer("Anna bought a red hat.")["input_ids"] == \
            train.text.load_tokenizer(chain / name).encode("Anna bought a red hat.").ids


def test_evaluate_reads_what_the_stage_wrote(chain, world, capsys):
    """--stage evaluate on a directory prints the metrics that its stage stored: rounding, masks and head come back."""
    def stored(name):
        return json.loads((chain / name / "metrics.json").read_text())["metrics"]
    for name in ("sst2/sparse-1x4-0.85", "sst2/int8-1x4-0.85"):
        train.main(["--stage", "evaluate", "--init", str(chain / name), "--task", "sst2", "--data", str(world)])
        assert f"accuracy {stored(name)['accuracy']:.4f}" in capsys.readouterr().out
    train.main(["--stage", "evaluate", "--init", str(chain / "pretrain"), "--corpus", str(world / "corpus.txt")])
    printed = {name: float(value) for name, value in re.findall(r"(validation_\w+) ([\d.]+)", capsys.readouterr().out)}
    assert printed == pytest.approx(stored("pretrain"), abs=5.1e-5, rel=1e-3 * machine.has_bf16("cpu"))


def test_evaluate_takes_rows_as_typed_or_as_trained_or_as_published(chain, world, tmp_path, monkeypatch, capsys):
    """And for a model that records no length, BERT's own: 128, for SQuAD 384, if it has so many positions."""
    lengths, TaskData = [], encode.TaskData
    monkeypatch.setattr(encode, "TaskData", lambda *a, **k: lengths.append(a[3]) or TaskData(*a, **k))
    trained, foreign = chain / "sst2" / "teacher", tmp_path / "foreign"
    shutil.copytree(trained, foreign)
    config = json.loads((foreign / "config.json").read_text())
    assert config.pop("compression")["max_len"] == 48 and config["max_position_embeddings"] == 128
    (foreign / "config.json").write_text(json.dumps(config))
    for directory, typed, expected in ((trained, [], 48), (trained, ["--max-len", "40"], 40), (foreign, [], 128)):
        train.main(["--stage", "evaluate", "--init", str(directory), "--task", "sst2", "--data", str(world), *typed])
        assert lengths[-1] == expected
    assert "rows of 129 tokens" in fails(capsys, "--stage", "evaluate", "--init", trained, "--task", "sst2", "--data",
                                         world, "--max-len", "129")
    assert [train.tasks.TASKS[task].max_length for task in ("mnli", "squad")] == [128, 384]


def test_squad_and_pairs_run_through_the_chain(world, chain, tmp_path):
    """A span task and a pair task, starting from the same sparse model; the sparse span model has no pooler."""
    for task in ("squad", "qnli"):
        common = [*SHORT, "--out", str(tmp_path), "--steps", "3", "--data", str(world), "--task", task, "--max-len",
                  "64"]
        train.main(["--stage", "finetune", "--sparsity", "0", "--init", str(chain / "pretrain"), *common])
        train.main(["--stage", "finetune", "--pattern", "1x4", "--init", str(chain / "prune-1x4-0.85"), *common])
        train.main(["--stage", "quantize", "--pattern", "1x4", *common])
        metrics = json.loads((tmp_path / task / "int8-1x4-0.85" / "metrics.json").read_text())
        assert metrics["sparsity"] == pytest.approx(0.85, abs=0.001)
        assert set(metrics["metrics"]) == ({"exact_match", "f1"} if task == "squad" else {"accuracy"})


# ---------------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("stage", DIRECTORIES)
def test_interrupted_and_resumed_equals_uninterrupted(stage, world, chain, tmp_path, monkeypatch):
    """A crash in step 8, after a checkpoint at step 5, then --resume: the same bytes on disk as without the crash."""
    for parent in ("pretrain", "prune-1x4-0.85", "sst2"):
        shutil.copytree(chain / parent, tmp_path / parent)
    shutil.rmtree(tmp_path / DIRECTORIES[stage])
    save_every(monkeypatch, 5)
    arguments = commands(world, tmp_path)[stage]
    calls, denominators = [], train.distill.denominators

    def crash(batches):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("power cut")
        return denominators(batches)

    monkeypatch.setattr(train.distill, "denominators", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main(arguments)
    monkeypatch.undo()
    directory = tmp_path / DIRECTORIES[stage]
    assert [path.name for path in run.checkpoints(directory)] == ["train-000000005.pt"]
    assert not (directory / "model.safetensors").exists()
    train.main([*arguments, "--resume"])
    names = ["model.safetensors", "compression.safetensors"] + (["int8.safetensors"] if stage == "quantize" else [])
    for name in names:
        assert (directory / name).read_bytes() == (chain / DIRECTORIES[stage] / name).read_bytes(), name
    with open(directory / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 13)]


def test_interrupt_finishes_the_step_and_says_how_to_go_on(world, chain, tmp_path):
    arguments = commands(world, tmp_path, steps=400)["pretrain"]
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "pretrain" / "log.csv"
    deadline = time.monotonic() + 60
    while (not log.is_file() or log.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in printed.strip().splitlines()[-1]
    assert run.checkpoints(tmp_path / "pretrain")


def test_resume_refuses_other_settings_and_damaged_checkpoints(world, chain, tmp_path, monkeypatch, capsys):
    save_every(monkeypatch, 2)
    arguments = commands(world, tmp_path)["pretrain"]
    monkeypatch.setattr(train.prune, "learning_rate_factor", lambda step, *rest: 1 / (7 - step))
    with pytest.raises(ZeroDivisionError):
        train.main(arguments)
    monkeypatch.undo()
    message = fails(capsys, *arguments, "--resume", "--lr", "0.5")
    assert "--lr" in message and "0.5" in message


def test_finished_runs_are_not_overwritten(world, chain, capsys):
    before = (chain / "pretrain" / "model.safetensors").read_bytes()
    assert "--resume" in fails(capsys, *commands(world, chain)["pretrain"])
    left = chain / "pretrain" / "train-000000012.pt"          # by a process that was killed at its very end
    left.write_bytes(b"")
    train.main([*commands(world, chain)["pretrain"], "--resume"])
    assert "already finished" in capsys.readouterr().out and not left.exists()
    assert (chain / "pretrain" / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def test_accumulation_trains_the_same_model(world, chain, tmp_path):
    """8 rows at once and 4 micro-batches of 2 end within float rounding of each other (dropout off). Not so the biases
    of the keys: softmax does not feel them, their gradient is rounding alone, and Adam steps as far on that."""
    ends = []
    for micro in (8, 2):
        out = tmp_path / str(micro)
        train.main([*commands(world, out, steps=4)["prune"], "--init", str(chain / "pretrain"), "--teacher",
                    str(chain / "pretrain"), "--precision", "fp32", "--dropout", "0", "--micro-batch", str(micro),
                    "--update-every", "0.25"])
        ends.append(safetensors.read_safetensors(out / "prune-1x4-0.85" / "model.safetensors")[0])
    for name in ends[0]:
        assert name.endswith("key.bias") or torch.allclose(ends[0][name], ends[1][name], atol=3e-5), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_teacher_teaches_the_same(precision, chain):
    """Masked and cast once, it gives the bits of a model that does both in every step. Its word embeddings, which are
    the decoder's weights, are cast too."""
    model, teacher = (model_directory.load(chain / DIRECTORIES["prune"], "pretraining").eval() for _ in range(2))
    assert prune.measured_sparsity(model) > 0.8
    for _, layer in network.linears(teacher):
        layer.weight.data[~layer.mask] = 7.0                    # latent weights, which no teacher shows
    network.freeze(teacher, torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "bf16":
        model.encoder.word.weight.data = model.encoder.word.weight.data.bfloat16().float()
    batch = {"input_ids": torch.arange(40).view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.bool),
             "token_type_ids": torch.zeros(2, 20, dtype=torch.long)}
    everywhere = batch["attention_mask"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        for ours, expected in zip(teacher(**batch, positions=everywhere), model(**batch, positions=everywhere)):
            assert torch.equal(ours, expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_optimizer_decays_matrices_only():
    model = network.build(network.PRESETS["tiny"], "pretraining")
    optimizer = train.make_optimizer(train.Settings(weight_decay=0.25), model)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.25 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name


def test_a_loss_that_is_not_finite_stops_the_run(world, chain, tmp_path, monkeypatch, capsys):
    loss = train.distill.loss
    monkeypatch.setattr(train.distill, "loss", lambda *a, **k: (loss(*a, **k)[0] * float("nan"), {}))
    message = fails(capsys, *commands(world, tmp_path)["pretrain"])
    assert "nan" in message and "--lr" in message


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_precedence_default_recipe_command_line():
    recipe = recipes.RECIPES["tiny"]["pretrain"]
    resolved = train.resolve({"stage": "pretrain"})
    assert resolved.lr == recipe["lr"] != train.Settings.lr                       # recipe over default
    assert "temperature" not in recipe                                            # default where the recipe is silent
    assert resolved.temperature == train.Settings.temperature
    assert train.resolve({"stage": "pretrain", "lr": 0.5}).lr == 0.5              # command line over both
    assert train.resolve({"stage": "pretrain", "epochs": 2.0}).steps is None      # --epochs replaces the recipe's steps


def test_every_recipe_resolves():
    for preset, recipe in recipes.RECIPES.items():
        for stage in ("pretrain", "prune"):
            assert train.resolve({"preset": preset, "stage": stage, "corpus": "text"}).steps > 0
        for task in train.tasks.TASKS:
            dense, sparse = (train.resolve({"preset": preset, "stage": "finetune", "task": task, "data": "tasks", **zeros})
                             for zeros in ({"sparsity": 0.0}, {}))
            assert dense.mask == "dense" and sparse.mask == "locked"
        kinds = {key.split()[0] for key in recipe} - {"model", "published"}
        assert kinds == {"pretrain", "prune", "dense", "finetune", "quantize"}


def test_ramp_scales_with_the_steps():
    """The reference's 50k / 80k / 1k of 100k steps; and at any length the target is reached by an update."""
    assert train.ramp_of(train.resolve({"stage": "prune", "preset": "bert-base", "sparsity": 0.9})) == \
        prune.Ramp(0.9, 0, 50_000, 80_000, 1_000)
    for steps in (12, 77, 300, 1001):
        for typed in ({}, {"ramp_end": 0.0}, {"ramp_end": 0.0, "update_end": 0.0}):         # the last two: in one shot
            ramp = train.ramp_of(train.resolve({"stage": "prune", "steps": steps, **typed}))
            assert any(prune.updates_at(t, ramp) and prune.sparsity_at(t, ramp) == 0.85 for t in range(steps))


def test_a_ramp_that_no_number_of_steps_helps_says_so(chain, world, tmp_path, capsys):
    for flags in (["--ramp-end", "1"], ["--ramp-end", "0.95", "--update-every", "0.3"]):
        message = fails(capsys, *commands(world, chain)["prune"], *flags, "--init", chain / "pretrain", "--teacher",
                        chain / "pretrain", "--out", tmp_path)
        assert "--ramp-end" in message and "more --steps" not in message
    assert not [*tmp_path.iterdir()]                                    # and nothing is left behind


@pytest.mark.parametrize("flags, words", [
    (["--warmup", "0.3"], "--warmup 0.3"), (["--ramp-end", "1"], "--ramp-end 1"), (["--data", "nowhere"], "nowhere"),
    (["--data", "WORLD", "--task", "mnli"], "MNLI"), (["--batch-size", "72", "--data", "WORLD"], "64 rows"),
    (["--max-len", "4096", "--data", "WORLD"], "positions"),
    (["--preset", "minilm-l6", "--corpus", "CORPUS"], "is for real text, and the default is the bundled tiny world; give --data")])
def test_the_whole_chain_looks_ahead(flags, words, world, tmp_path, capsys):
    """What would stop a later stage is said before the first has begun."""
    places = {"WORLD": world, "CORPUS": world / "corpus.txt"}
    task = [] if "--task" in flags else ["--task", "sst2"]
    assert words in fails(capsys, "--stage", "all", *SHORT, "--steps", "12", *task,
                          *(places.get(flag, flag) for flag in flags), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_too_large_for_a_share_of_zeros(chain, world, tmp_path, capsys):
    start = [*commands(world, chain)["prune"], "--init", chain / "pretrain", "--teacher", chain / "pretrain", "--out",
             tmp_path]
    assert "makes 1 blocks" in fails(capsys, *start, "--pattern", "128x128", "--sparsity", "0.4")
    assert not [*tmp_path.iterdir()]
    train.main([str(argument) for argument in [*start, "--pattern", "64x64", "--sparsity", "0.85"]])
    assert "fewer zeros than --sparsity 0.85 come out: 75.0% of 'encoder.layers.0.query'" in capsys.readouterr().out


def test_evaluating_takes_no_flags_of_training(chain, capsys):
    for flag, value in (("--lr", "3"), ("--activation-bits", "7"), ("--teacher", "nowhere")):
        assert f"no use of {flag}" in fails(capsys, "--stage", "evaluate", "--init", chain / "pretrain", flag, value)


def test_other_files_beside_a_tasks_are_nothing_to_a_finished_run(chain, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    arguments = [*commands(world, chain)["teacher"], "--data", str(tmp_path / "world"), "--init",
                 str(chain / "pretrain"), "--out", str(tmp_path / "out"), "--steps", "2"]
    train.main(arguments)
    for name in (".DS_Store", "test.tsv"):
        (tmp_path / "world" / "SST-2" / name).write_text("x")
    train.main([*arguments, "--resume"])


def test_the_peak_of_a_rewound_rate_stays_near_the_one_asked_for():
    for warmup in (0.0, 0.1, 0.25):
        s = train.resolve({"stage": "prune", "warmup": warmup})
        ramp, steps = train.ramp_of(s), round(warmup * s.steps)
        assert max(prune.learning_rate_factor(t, s.steps, steps, ramp) for t in range(s.steps)) <= 2
    with pytest.raises(network.InputError, match="--warmup 0.3 takes more than half of the 500 steps"):
        train.ramp_of(train.resolve({"stage": "prune", "warmup": 0.3}))


def test_the_whole_chain_takes_no_teacher_for_an_answer(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "run_stage", lambda s: seen.append(s) or tmp_path)
    monkeypatch.setattr(train, "engine_report", lambda *_: pytest.fail("not reached") if not seen else sys.exit(0))
    with pytest.raises(SystemExit):
        train.main(["--stage", "all", "--teacher", "none", "--task", "sst2", "--out", str(tmp_path)])
    assert [s.stage for s in seen] == ["pretrain", "prune", "finetune", "finetune", "quantize"]
    assert {s.teacher for s in seen} == {"none"}


def test_quantize_never_runs_in_bf16(monkeypatch):
    monkeypatch.setattr("data.settings.has_bf16", lambda device: True)          # a CPU without it refuses the flag
    assert train.resolve({"stage": "quantize", "task": "sst2", "precision": "bf16"}).precision == "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("arguments, named", [
    (["--sparsty", "0.8"], ["--sparsty", "--sparsity"]),
    (["--stage", "pretrane"], ["pretrane", "quantize"]),
    (["--preset", "bert-huge"], ["bert-huge", "bert-large"]),
    (["--stage", "finetune", "--task", "cola"], ["cola", "squad"]),
    (["--stage", "prune", "--pattern", "1by4"], ["1by4", "1x4"]),
    (["--stage", "prune", "--pattern", "0x4"], ["0x4"]),
    (["--stage", "prune", "--pattern", "2:4", "--sparsity", "0.85"], ["2:4", "0.5"]),
    (["--stage", "prune", "--sparsity", "1"], ["--sparsity", "1"]),
    (["--stage", "prune", "--sparsity", "-0.1"], ["--sparsity", "-0.1"]),
    (["--stage", "all", "--sparsity", "1"], ["--sparsity", "1"]),
    (["--stage", "pretrain", "--sparsity", "0.8"], ["--sparsity 0.8", "prune"]),
    (["--stage", "prune", "--sparsity", "nan"], ["--sparsity", "nan"]),
    (["--stage", "pretrain", "--lr", "fast"], ["--lr", "fast"]),
    (["--stage", "pretrain", "--lr", "0"], ["--lr", "above 0"]),
    (["--stage", "pretrain", "--steps", "0"], ["--steps", "above 0"]),
    (["--stage", "pretrain", "--batch-size", "10", "--micro-batch", "3"], ["--micro-batch", "divisor"]),
    (["--stage", "pretrain", "--steps", "5", "--epochs", "1"], ["--steps", "--epochs"]),
    (["--stage", "pretrain", "--kd-weight", "1.5"], ["--kd-weight", "0 to 1"]),
    (["--stage", "pretrain", "--max-len", "4096"], ["--max-len", "128"]),
    (["--stage", "finetune"], ["--task"]),
    (["--stage", "evaluate"], ["--init"]),
    (["--stage", "pretrain", "--init", "/no/such/model"], ["/no/such/model"]),
    (["--stage", "pretrain", "--corpus", "/no/such/corpus"], ["/no/such/corpus"]),
    (["--stage", "prune", "--init", "random"], ["random"]),
    (["--stage", "prune", "--mask", "dense"], ["--mask", "dense", "gradual"]),
    (["--stage", "pretrain", "--mask", "gradual"], ["--mask", "gradual", "dense"]),
    (["--stage", "finetune", "--task", "sst2", "--mask", "dense"], ["--mask", "dense", "locked"]),
    (["--stage", "prune", "--task", "sst2"], ["--task sst2", "finetune"]),
    (["--stage", "pretrain", "--epochs", "inf"], ["--epochs", "above 0"]),
    (["--stage", "all", "--teacher", "/some/model"], ["--teacher /some/model"]),
    (["--stage", "finetune", "--task", "sst2", "--mask", "locked", "--sparsity", "0"], ["--mask", "locked", "dense"]),
])
def test_bad_settings(arguments, named, capsys, tmp_path):
    out = tmp_path / "out"
    message = fails(capsys, *arguments, "--out", out)
    for word in named:
        assert word in message, message
    assert not out.exists()                              # nothing half-written


def test_missing_parent_names_its_command(capsys, tmp_path):
    out = tmp_path / "out"
    assert "--stage pretrain" in fails(capsys, "--stage", "prune", "--out", out)
    assert "--stage prune --pattern 1x4 --sparsity 0.8" in fails(
        capsys, "--stage", "finetune", "--task", "sst2", "--pattern", "1x4", "--sparsity", "0.8", "--out", out)
    assert "--stage finetune --task qqp" in fails(capsys, "--stage", "quantize", "--task", "qqp", "--out", out)
    assert "--init random" in fails(capsys, "--stage", "finetune", "--task", "qqp", "--mask", "gradual", "--init",
                                    "random", "--out", out)
    assert not out.exists()


def test_missing_task_teacher_names_its_command(chain, world, capsys, tmp_path):
    message = fails(capsys, "--stage", "finetune", "--task", "qnli", "--init", chain / "prune-1x4-0.85", "--data",
                    world, "--out", tmp_path / "out", "--pattern", "1x4")
    assert "--task qnli --sparsity 0" in message


def test_what_cannot_be_evaluated_is_said_before_the_first_step(world, chain, tmp_path, capsys):
    """A question of the dev set that leaves no room for its context."""
    shutil.copytree(world / "SQuAD", tmp_path / "SQuAD")
    path = tmp_path / "SQuAD" / "dev-v1.1.json"
    content = json.loads(path.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = "who " * 60
    path.write_text(json.dumps(content))
    message = fails(capsys, "--stage", "finetune", "--task", "squad", "--sparsity", "0", *SHORT, "--init",
                    chain / "pretrain", "--steps", "3", "--max-len", "64", "--data", tmp_path, "--out", tmp_path / "out")
    assert "--max-len 384" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, words", [({"max_position_embeddings": 40}, "40 positions of the teacher"),
                                           ({"type_vocab_size": 1}, "one token type")])
def test_a_teacher_takes_the_students_rows(change, words, chain, world, tmp_path, capsys):
    shutil.copytree(chain / "pretrain", tmp_path / "teacher")
    config = dataclasses.replace(model_directory.load(chain / "pretrain", "pretraining").config, **change)
    model_directory.save(network.build(config, "pretraining"), tmp_path / "teacher")
    message = fails(capsys, "--stage", "prune", *SHORT, "--steps", "12", "--init", chain / "pretrain", "--teacher",
                    tmp_path / "teacher", "--corpus", world / "corpus.txt", "--out", tmp_path / "out")
    assert words in message and not (tmp_path / "out").exists()


def test_damaged_model_directories(chain, world, tmp_path, capsys):
    """Each damage to the parent's files gives a sentence that names the file, and leaves no output."""
    def damage(name, change):
        parent, out = tmp_path / "parent", tmp_path / "out"
        shutil.rmtree(parent, ignore_errors=True)
        shutil.copytree(chain / "prune-1x4-0.85", parent)
        change(parent / name)
        message = fails(capsys, *SHORT, "--stage", "finetune", "--task", "sst2", "--data", world, "--init", parent,
                        "--teacher", "none", "--pattern", "1x4", "--steps", "2", "--out", out)
        assert name.split(".")[0] in message and not out.exists(), message
        return message

    def cut(path):
        path.write_bytes(path.read_bytes()[:-10])

    def garble(path):
        path.write_bytes(path.read_bytes()[:8] + b"\xff\xfe" + path.read_bytes()[10:])

    for name in ("model.safetensors", "compression.safetensors"):
        damage(name, cut)
        damage(name, garble)
    damage("config.json", garble)
    damage("config.json", lambda path: path.write_text("[]"))
    damage("config.json", Path.unlink)
    damage("model.safetensors", Path.unlink)

    def no_vocabulary(path):
        path.unlink()
        (path.parent / "tokenizer.json").unlink()
    damage("vocab.txt", no_vocabulary)


@pytest.mark.parametrize("content, named", [
    (b"sentence\tlabel\ngood film\t1\nbad film\n", ":3"),
    (b"sentence\tlabel\ngood film\t1\nbad film\tawful\n", "awful"),
    (b"", "train.tsv"), (b"sentence\tlabel\n", "train.tsv"),
    (b"sentence\tlabel\ngood \xff\xfe film\t1\n", "UTF-8"),
    (b"text\tlabel\ngood film\t1\n", "sentence"),
])
def test_bad_task_files(content, named, chain, capsys, tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(content)
    (tmp_path / "SST-2" / "dev.tsv").write_bytes(b"sentence\tlabel\ngood film\t1\n")
    message = fails(capsys, *SHORT, "--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data", tmp_path,
                    "--init", chain / "pretrain", "--steps", "2", "--out", tmp_path / "out")
    assert named in message and "train.tsv" in message and not (tmp_path / "out").exists()


def test_missing_task_folder(chain, capsys, tmp_path):
    message = fails(capsys, *SHORT, "--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data",
                    tmp_path / "none", "--init", chain / "pretrain", "--out", tmp_path / "out")
    assert str(tmp_path / "none") in message


def test_block_that_does_not_divide_a_layer(chain, world, capsys, tmp_path):
    message = fails(capsys, *SHORT, "--stage", "prune", "--pattern", "3x5", "--init", chain / "pretrain",
                    "--teacher", "none", "--corpus", world / "corpus.txt", "--steps", "2", "--out", tmp_path / "out")
    assert "3x5" in message and "query" in message and not (tmp_path / "out").exists()


def test_locking_a_dense_model_is_refused(chain, world, capsys, tmp_path):
    message = fails(capsys, *SHORT, "--stage", "finetune", "--task", "sst2", "--data", world, "--init",
                    chain / "pretrain", "--teacher", "none", "--steps", "2", "--out", tmp_path / "out")
    assert "none" in message and not (tmp_path / "out").exists()


def test_the_program_itself_exits_with_2():
    done = subprocess.run([sys.executable, "train.py", "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: ") and "Traceback" not in done.stderr


def test_help_lists_every_setting():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for field in dataclasses.fields(train.Settings):
        assert "--" + field.name.replace("_", "-") in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Data made in the background

def test_batches_are_made_ahead_one_step_and_an_error_in_them_is_one_sentence(world, tmp_path, monkeypatch, capsys):
    """Each step's batch once, in order, none after the last; a mistake found in the background is said as elsewhere."""
    asked, real = [], batches.batches_of

    def note(data, step, *sizes):
        asked.append(step)
        if step == 4:
            raise DataError("the corpus is gone")
        return real(data, step, *sizes)

    monkeypatch.setattr(batches, "batches_of", note)
    arguments = commands(world, tmp_path)["pretrain"]
    train.main([*arguments, "--steps", "3"])
    assert asked == [0, 1, 2]
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(tmp_path / "other")])
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith("\ntrain.py: the corpus is gone\n")
    assert asked[3:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_is_kept_in_the_precision_of_the_run(precision, dtype, chain):
    settings = train.Settings(stage="finetune", task="sst2", precision=precision)
    directory = chain / "sst2/teacher"
    model = model_directory.load(directory, "classification")
    data = tasks.TaskData("sst2", "", encode.tokenizer_of(directory), 48, splits=())
    teacher = train.load_teacher(settings, directory, model, data, print)
    weights = [layer.weight for _, layer in network.linears(teacher)] + [teacher.encoder.word.weight]
    assert all(weight.dtype == dtype and not weight.requires_grad for weight in weights) and not teacher.training
