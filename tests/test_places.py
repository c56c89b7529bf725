"""Where it runs: forks, caches that are damaged, foreign, missing or not to be run from, terminals that are not UTF-8,
two runs in one folder; and settings that are said to change nothing."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import DIRECTORIES, ROOT, SHORT, commands, exit_code, fails, save_every, start
from test_elsewhere import foreign, pack

import infer_cpu
import model as network
import quant
import train
from data import settings
from data.encode import longest_row
from formats import files, model_directory, run
from formats.machine import survive_fork
from formats.safetensors import read_safetensors
from native import build

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
              pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")]
compiled = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")


# ---------------------------------------------------------------- forks

FORK = """
import os, sys, time
import torch, infer_cpu
from data.encode import random_batch
engine = infer_cpu.load(sys.argv[1], sys.argv[2], threads=2, say=lambda line: None)
batch = random_batch(engine.model.config, 8, 60)
expected = engine(batch)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(engine(batch), expected) and torch.get_num_threads() == 2 else 3)
for _ in range(300):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert torch.equal(engine(batch), expected)         # and the parent goes on as well
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("engine", ["fp32", "int8", "sparse", "native"])
def test_an_engine_goes_on_in_a_child_process(engine, chain, tmp_path):
    """As under a web server that loads before it forks."""
    if engine == "native" and not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, str(chain / DIRECTORIES["quantize"]), engine],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr


def test_where_threads_cannot_be_dismissed_a_child_has_one(monkeypatch):
    hooks = []
    monkeypatch.setattr(os, "register_at_fork", lambda **named: hooks.append(named))
    survive_fork.__wrapped__()
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")        # no library to ask
    survive_fork.__wrapped__()
    assert hooks[0].keys() == {"before"} and hooks[1].keys() == {"after_in_child"}
    assert hooks[1]["after_in_child"].args == (1,)


# ---------------------------------------------------------------- the cache of the compiled library

@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A cache of its own, and a compiler that is not asked to optimize. Returns the cache's folder."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in build.SOURCES:
        (sources / name).write_text('#pragma GCC optimize("O0")\n' + (ROOT / "native" / name).read_text())
    monkeypatch.setattr(build, "HOME", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prune-once-for-all"


@compiled
@pytest.mark.parametrize("damage", ["cut", "zeroed page", "empty", "another byte"])
def test_a_damaged_library_is_never_loaded(damage, quick):
    build.native_library(8, pytest.fail)
    path, = quick.iterdir()
    whole = path.read_bytes()
    content = {"cut": whole[:len(whole) // 2], "zeroed page": whole[:4096] + bytes(4096) + whole[8192:], "empty": b"",
               "another byte": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]}[damage]
    path.unlink()                                           # this process has it open
    path.write_bytes(content)
    assert build.cached_native(quick, path.name.rpartition("-")[0]) is None
    build.native_library(8, pytest.fail)                    # compiled again, without a word
    again, = quick.iterdir()
    assert again.read_bytes() != content and build.content_hash(again) in again.name


@compiled
def test_a_cache_that_programs_may_not_be_run_from(quick, monkeypatch):
    """Mounted noexec: the library cannot be mapped from there, and is made in a folder from which it can."""
    load = build.ctypes.CDLL

    def refuse(path, *arguments):
        if str(quick) in str(path):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path, *arguments)

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    said = []
    build.native_library(8, said.append)
    assert len(said) == 1 and "failed to map segment" in said[0] and "compiled anew" in said[0]


@compiled
def test_without_a_temporary_folder(chain, tmp_path, monkeypatch):
    """A read-only machine: what is cached is used; without that, auto falls back and native says what is missing."""
    directory = chain / DIRECTORIES["quantize"]
    monkeypatch.setattr(build.tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    infer_cpu.load(directory, "native", say=pytest.fail)                        # compiled by the tests before
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    said = []
    with pytest.raises(network.InputError, match="no folder to compile it in"):
        infer_cpu.load(directory, "native", say=said.append)
    assert infer_cpu.load(directory, "auto", say=said.append).name in ("int8", "sparse")
    assert all("compiled anew" in line or "torch take over" in line or "engine" in line for line in said)


def test_the_cache_is_a_folder_of_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for value in ("relative", "", "~/x"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert build.cache_folder() == (home / ".cache" / "prune-once-for-all", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert (home / ".cache" / "prune-once-for-all").stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o777):
        (home / ".cache" / "prune-once-for-all").chmod(mode)
        folder, reason = build.cache_folder()
        assert folder is None and "others may write" in reason
    (home / ".cache" / "prune-once-for-all").chmod(0o755)
    assert build.cache_folder()[0]
    monkeypatch.setattr(os, "getuid", lambda: 12345, raising=False)
    assert build.cache_folder()[0] is None
    for value in (None, ""):                                # no home, and no entry in the list of users
        monkeypatch.delenv("HOME", raising=False) if value is None else monkeypatch.setenv("HOME", value)
        folder, reason = build.cache_folder()
        assert folder is None and "XDG_CACHE_HOME" in reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


# ---------------------------------------------------------------- terminals and files that are not UTF-8

def test_letters_that_a_terminal_lacks(chain, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    for command in ((str(ROOT / "infer_cpu.py"), str(chain / "sst2/teacher"), "--text", "Фильм ✓"),
                    ("-m", "bench.watch", str(chain / "sst2/teacher"))):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0 and b"?" in done.stdout and b"Traceback" not in done.stderr, done.stderr
    assert "Фильм".encode("cp1252", "replace") in subprocess.run(
        [sys.executable, str(ROOT / "infer_cpu.py"), str(chain / "sst2/teacher"), "--text", "Фильм"], env=environment,
        capture_output=True, timeout=120).stdout


def test_the_log_is_utf8_whatever_the_machine_says(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *a, encoding=None, **k: real(
        path, mode, *a, encoding=encoding or (None if "b" in mode else "ascii"), **k))
    run.Log(tmp_path).say("Ω \ud800")
    assert (tmp_path / "log.txt").read_bytes() == "Ω ?\n".encode()


def test_a_number_that_is_none_is_null_in_json(tmp_path):
    value = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": (float("inf"), "x"), "d": None, "e": True}
    files.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None, {"b": None}], "c": [None, "x"], "d": None, "e": True}


@pytest.mark.parametrize("threads", ["99999999999", "1025", "0", "-1"])
def test_no_machine_has_so_many_threads(threads, chain, capsys):
    with pytest.raises(SystemExit) as stopped:
        infer_cpu.main([str(chain / "sst2/teacher"), "--text", "x", "--threads", threads])
    assert stopped.value.code == 2 and "--threads" in capsys.readouterr().err
    assert "--threads" in fails(capsys, "--stage", "pretrain", "--threads", threads)


def test_too_large_a_batch_is_a_sentence(chain, capsys):
    with pytest.raises(SystemExit) as stopped:
        infer_cpu.main([str(chain / DIRECTORIES["quantize"]), "--benchmark", "--batch-size", "2147483647"])
    assert stopped.value.code == 2 and "not enough memory" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- one run in a folder

def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_alive(world, tmp_path, capsys, monkeypatch):
    arguments = commands(world, tmp_path / "out", steps=6)["pretrain"]
    (tmp_path / "out" / "pretrain").mkdir(parents=True)
    lock = files.lock_folder(tmp_path / "out" / "pretrain")
    if lock is None:
        pytest.skip("no locks here")
    child = start(arguments, tmp_path / "second.txt")
    assert exit_code(child) == 2
    assert "another run" in (tmp_path / "second.txt").read_text().splitlines()[-1]
    assert list((tmp_path / "out" / "pretrain").iterdir()) == []                # nothing of the second one
    os.close(lock)
    train.main(arguments)
    assert (tmp_path / "out" / "pretrain" / "metrics.json").is_file()


def test_the_lock_dies_with_its_process(world, tmp_path, monkeypatch):
    save_every(monkeypatch, 1)
    arguments = commands(world, tmp_path, steps=400)["pretrain"]
    child = start(arguments, tmp_path / "first.txt")
    for _ in range(600):
        if run.checkpoints(tmp_path / "pretrain"):
            break
        time.sleep(0.05)
    assert exit_code(start(arguments, tmp_path / "second.txt")) == 2
    assert exit_code(start([*arguments, "--resume"], tmp_path / "third.txt")) == 2
    assert "another run" in (tmp_path / "third.txt").read_text().splitlines()[-1]
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    os.close(files.lock_folder(tmp_path / "pretrain"))


def test_what_another_run_finished_meanwhile_is_kept(chain, tmp_path):
    shutil.copytree(chain / "pretrain", tmp_path / "pretrain")
    with pytest.raises(network.InputError, match="finished"):
        run.begin_directory(tmp_path / "pretrain", None, {})
    with pytest.raises(network.InputError, match="finished by another run"):
        run.begin_directory(tmp_path / "pretrain", {"step": 3}, {})


# ---------------------------------------------------------------- settings of a finished run

@pytest.mark.parametrize("flag, value, said", [("--seed", "5", "--seed 0"), ("--lr", "0.5", "--lr 0.002"),
                                               ("--steps", "13", "--steps 12"), ("--max-len", "40", "--max-len 48")])
def test_a_finished_run_is_kept_for_the_same_settings_only(flag, value, said, world, chain, tmp_path, capsys):
    shutil.copytree(chain / "pretrain", tmp_path / "pretrain")
    arguments = [*commands(world, tmp_path)["pretrain"], "--resume"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "pretrain").iterdir()}
    train.main(arguments)
    assert "kept as it is" in capsys.readouterr().out
    message = fails(capsys, *arguments, flag, value)
    assert said in message and value in message
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "pretrain").iterdir()}
    train.main([*arguments, "--threads", "2", "--micro-batch", "4"])        # neither is part of a run without dropout


def test_a_finished_run_of_other_files_is_not_kept(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "world")
    arguments = commands(tmp_path / "world", tmp_path, steps=2)["pretrain"]
    train.main(arguments)
    with open(tmp_path / "world" / "corpus.txt", "a") as file:
        file.write("\n\nOne more.")
    assert "other files than --corpus" in fails(capsys, *arguments, "--resume")


def test_epochs_of_a_finished_run(world, chain, tmp_path, capsys):
    common = ["--stage", "finetune", "--sparsity", "0", "--task", "sst2", "--data", str(world), "--init",
              str(chain / "pretrain"), *SHORT, "--out", str(tmp_path)]
    train.main([*common, "--epochs", "0.5"])                                    # 4 steps of 8 of 64 rows
    for same in (["--epochs", "0.5"], ["--steps", "4"]):
        train.main([*common, *same, "--resume"])
    for other in (["--epochs", "1"], ["--steps", "8"]):
        assert other[0] in fails(capsys, *common, *other, "--resume")


def test_the_final_table_says_on_what_its_runs_were_made(tmp_path, capsys):
    from formats.report import format_table
    for name, seed in (("a", 3), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({
            "settings": {"threads": 1 if name == "a" else 2, "seed": seed}, "processor": "P", "torch": "T"}))
        (tmp_path / name / "metrics.json").write_text(json.dumps({"training_seconds": 50}))
    assert format_table([], [tmp_path / "a", tmp_path / "b"], 7).splitlines()[-1] == (
        "7 s in all, 100 s of training, 1 and 2 threads, seed 3, P, torch T")


def test_a_line_of_the_final_table_has_each_models_own_figure(tmp_path):
    from formats.report import TABLE_HEAD, table_line
    for name, accuracy, sparsity, size in (("dense", 0.91, 0.0, 8e6), ("sparse", 0.82, 0.8, 7e6),
                                           ("int8", 0.5, 0.7, 6e6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({
            "metrics": {"accuracy": accuracy}, "sparsity": sparsity,
            "file_bytes": {"model.safetensors": size, "int8.safetensors": size / 4}}))
    line = table_line("qnli", "accuracy", tmp_path / "dense", tmp_path / "sparse", tmp_path / "int8",
                      {"metrics": {"accuracy": 0.73}, "engine": "native"})
    assert line.split() == ["qnli", "accuracy", "91.00%", "82.00%", "73.00%", "70.00%", "8.00", "1.50", "native"]
    assert TABLE_HEAD.split() == ["task", "metric", "dense", "sparse", "INT8", "sparsity", "dense", "MB", "INT8", "MB",
                                  "engine"]


# ---------------------------------------------------------------- what is said to change nothing

def trained(arguments, directory):
    train.main([str(argument) for argument in arguments])
    return {name: tensor for name, tensor in read_safetensors(directory / "model.safetensors")[0].items()
            if not name.endswith("key.bias")}               # of those the gradient is nothing but rounding


def ranges(directory):
    return {name: tensor for name, tensor in read_safetensors(directory / "compression.safetensors")[0].items()
            if name.endswith("act_range")}


def test_activation_ranges_do_not_depend_on_the_micro_batch(world, chain, tmp_path):
    """Padding counts for none of them, and every step moves them once."""
    found = {}
    for rows in (8, 2, 1):
        directory = tmp_path / str(rows) / "sst2" / "int8-1x4-0.85"
        weights = trained([*commands(world, tmp_path / str(rows), steps=5)["quantize"], "--init",
                           chain / DIRECTORIES["finetune"], "--teacher", chain / "sst2/teacher", "--micro-batch", rows],
                          directory)
        found[rows] = weights, ranges(directory)
    for rows in (2, 1):
        for name, expected in found[8][1].items():
            width = float(expected[1] - expected[0])
            assert (found[rows][1][name] - expected).abs().max() <= 1e-4 * width, name
        assert all(torch.allclose(found[rows][0][name], tensor, atol=1e-4) for name, tensor in found[8][0].items())


@pytest.mark.parametrize("kind", ["classification", "encoder"])
def test_padding_is_not_seen(kind, chain):
    """Of an encoder, whose hidden states are distilled one after the other, neither."""
    model = model_directory.load(chain / "sst2/teacher", kind, say=lambda line: None)
    network.set_dropout(model, 0.0)
    ids = torch.randint(5, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 9:], mask[3, 2:] = 0, 0
    seen = {}
    for name, length in (("padded", 20), ("row by row", None)):
        quant.prepare(model, 8)
        model.train()
        for row in [slice(0, 4)] if length else range(4):
            part = (ids[row], mask[row], types[row]) if length else [
                each[row:row + 1, :int(mask[row].sum())] for each in (ids, mask, types)]
            model(*part) if kind == "classification" else model.encoder.pooled([*model.encoder.states(*part)][-1])
        seen[name] = {key: layer.seen.clone() for key, layer in network.linears(model)}
        for _, layer in network.linears(model):
            layer.seen.copy_(torch.tensor(network.NO_RANGE))
    for key, expected in seen["row by row"].items():
        assert torch.allclose(seen["padded"][key], expected, atol=1e-5), key


def test_with_dropout_the_micro_batch_is_part_of_the_run(world, tmp_path, capsys, monkeypatch):
    """Without, it changes the rounding; with it, random numbers are drawn for each forward pass."""
    def weights(name, *flags):
        return trained([*commands(world, tmp_path / name, steps=4)["pretrain"], "--precision", "fp32", *flags],
                       tmp_path / name / "pretrain")

    def distance(one, other):
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    plain = weights("plain")
    assert distance(plain, weights("plain-2", "--micro-batch", "2")) < 1e-4
    dropped = weights("dropped", "--dropout", "0.1")
    assert distance(dropped, weights("dropped-2", "--dropout", "0.1", "--micro-batch", "2")) > 1e-3 < distance(
        plain, dropped)
    message = fails(capsys, *commands(world, tmp_path / "dropped", steps=4)["pretrain"], "--precision", "fp32",
                    "--dropout", "0.1", "--micro-batch", "2", "--resume")
    assert "--micro-batch 8" in message and "now it is 2" in message
    save_every(monkeypatch, 1)
    arguments = [*commands(world, tmp_path / "stopped", steps=60)["pretrain"], "--dropout", "0.1"]
    child = start(arguments, tmp_path / "stopped.txt")
    for _ in range(600):
        if run.checkpoints(tmp_path / "stopped" / "pretrain"):
            break
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    assert "--micro-batch 8" in fails(capsys, *arguments, "--micro-batch", "2", "--resume")


def test_a_layer_whose_input_is_always_zero_has_a_range(chain, world, tmp_path):
    """A head that never fires: 0 to 0 is what it saw."""
    config = model_directory.read_config(chain / "pretrain")[0]
    config = train.replace(config, model_type="distilbert", type_vocab_size=0)
    torch.manual_seed(0)
    model = network.build(config, "classification")
    with torch.no_grad():
        model.pre_classifier.bias -= 100
    model_directory.save(model, tmp_path / "dead")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chain / "pretrain" / name, tmp_path / "dead")
    train.main(["--stage", "quantize", *SHORT, "--sparsity", "0", "--task", "sst2", "--data", str(world), "--init",
                str(tmp_path / "dead"), "--teacher", "none", "--out", str(tmp_path / "out"), "--steps", "3"])
    directory = tmp_path / "out/sst2/int8-dense"
    assert ranges(directory)["classifier.act_range"].tolist() == [0, 0]
    with contextlib.redirect_stdout(None):
        answers = infer_cpu.load(directory, "int8", say=lambda line: None).answer(["a film", "good"])
    assert len(answers) == 2 and all(0 <= share <= 1 for _, share in answers)


def test_ranges_of_a_model_that_was_never_rounded_are_not_read(tmp_path):
    """Earlier versions wrote 0, 0 for a layer without a range."""
    foreign(tmp_path)
    model = model_directory.load(tmp_path, "classification")
    for _, layer in network.linears(model):
        layer.act_range.zero_()
    model_directory.save(model, tmp_path)                   # what no rounding looks at is not written at all
    assert not any(name.endswith("act_range") for name in read_safetensors(tmp_path / "compression.safetensors")[0])
    quant.prepare(model, 8)
    model_directory.save(model, tmp_path)
    assert all(layer.act_range.tolist() == list(network.NO_RANGE)
               for _, layer in network.linears(model_directory.load(tmp_path, "classification")))
    model_directory.save(model, tmp_path, compression={"activation_bits": 8})
    assert all(layer.act_range.tolist() == [0, 0]
               for _, layer in network.linears(model_directory.load(tmp_path, "classification")))
    pack(tmp_path)


@pytest.mark.parametrize("changes, typed, expected", [
    ({}, None, True), ({}, 0.0, False), ({}, 0.2, True), ({"classifier_dropout": 0.1}, None, True),
    (dict.fromkeys(("hidden_dropout_prob", "attention_dropout_prob", "classifier_dropout"), 0.0), None, False),
    ({**dict.fromkeys(("hidden_dropout_prob", "attention_dropout_prob", "classifier_dropout"), 0.0),
      "model_type": "distilbert", "type_vocab_size": 0}, None, True)])
def test_what_counts_as_dropout(changes, typed, expected, tmp_path):
    foreign(tmp_path, "span", **changes)
    assert settings.has_dropout(train.Settings(dropout=typed), tmp_path) == expected
    assert settings.has_dropout(train.Settings(preset="tiny", dropout=typed), None) == (typed != 0.0)


def test_the_chain_goes_on_with_another_pattern_and_keeps_its_teachers(world, tmp_path, capsys):
    """README's second line for real data: --stage all, and again with other zeros and --resume."""
    arguments = ["--stage", "all", *SHORT, "--corpus", str(world / "corpus.txt"), "--data", str(world), "--task",
                 "sst2", "--steps", "4", "--out", str(tmp_path)]
    train.main(arguments)
    kept = {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in ("pretrain", "sst2/teacher")}
    capsys.readouterr()
    train.main([*arguments, "--pattern", "1x4", "--sparsity", "0.8", "--resume"])
    assert capsys.readouterr().out.count("kept as it is") == 2
    assert kept == {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in kept}
    assert (tmp_path / "sst2/int8-1x4-0.8/metrics.json").is_file()


# ---------------------------------------------------------------- places that are no files; settings nobody looks at

def test_a_device_is_refused_and_a_link_is_written_through(chain, tmp_path, capsys):
    assert "/dev/null is no file" in exit_words(capsys, chain, "--json", "/dev/null")
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in exit_words(capsys, chain, "--json", str(tmp_path / "pipe"))
    assert "is a folder" in exit_words(capsys, chain, "--json", str(tmp_path))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "found.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "found.json")
    files.write_json(tmp_path / "link.json", {"new": 1})
    assert (tmp_path / "link.json").is_symlink() and "new" in (tmp_path / "there" / "found.json").read_text()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(network.InputError, match="can be written to"):
        files.check_place("--json", tmp_path / "found.json")


def exit_words(capsys, chain, *arguments):
    with pytest.raises(SystemExit) as end:
        infer_cpu.main([str(chain / DIRECTORIES["quantize"]), "--evaluate", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_real_model_is_not_trained_on_the_tiny_world(chain, tmp_path, capsys):
    folder = tmp_path / "real"
    shutil.copytree(chain / "pretrain", folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = vars(network.PRESETS["minilm-l6"])
    (folder / "config.json").write_text(json.dumps({**config, **{name: sizes[name] for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}}))
    for stage, flag in ((["finetune", "--task", "sst2", "--sparsity", "0"], "--data FOLDER"),
                        (["quantize", "--task", "sst2", "--teacher", "none"], "--data FOLDER"),
                        (["pretrain"], "--corpus TEXT"), (["prune", "--teacher", str(folder)], "--corpus TEXT")):
        words = fails(capsys, "--stage", *stage, "--init", str(folder), "--out", str(tmp_path / "out"))
        assert flag in words and "tiny world" in words and "minilm-l6" in words
    words = fails(capsys, "--stage", "finetune", "--task", "sst2", "--preset", "minilm-l6", "--out", str(tmp_path / "out"))
    assert "a minilm-l6, of --out, is for real text" in words and "--data FOLDER" in words


def test_what_evaluate_does_not_look_at_is_refused(chain, world, capsys):
    for name, words, *flags in (("pretrain", "give --corpus", "--data", str(world)),
                                ("teacher", "give --data", "--corpus", str(world / "corpus.txt")),
                                ("teacher", "no use of --seed", "--seed", "3")):
        assert words in fails(capsys, "--stage", "evaluate", "--init", str(chain / DIRECTORIES[name]), *flags)


def test_a_checkpoint_is_promised_only_where_there_is_one(tmp_path):
    with pytest.raises(network.InputError, match="at step 3; try a lower"):
        run.demand_finite(float("nan"), 1.0, 3, 0.1, tmp_path)
    (tmp_path / "train-000000002.pt").touch()
    with pytest.raises(network.InputError, match="at step 3; the last checkpoint is kept"):
        run.demand_finite(float("nan"), 1.0, 3, 0.1, tmp_path)


def test_the_tokenizer_says_how_long_a_row_may_be(chain, tmp_path):
    """As many tokens as there are positions, or fewer where the model that it came from said so."""
    def said(folder):
        return json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    positions = network.PRESETS["tiny"].max_position_embeddings
    assert said(chain / "pretrain") == said(chain / DIRECTORIES["teacher"]) == positions
    tokenizer = transformers.AutoTokenizer.from_pretrained(chain / DIRECTORIES["quantize"])
    assert len(tokenizer("a " * 1000, truncation=True)["input_ids"]) == positions
    for length, expected in ((100, 100), (10 ** 30, positions), (None, positions)):
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({} if length is None else {"model_max_length": length}))
        assert longest_row(tmp_path, network.PRESETS["tiny"]) == expected
