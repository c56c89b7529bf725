"""Runs that are hit: killed, out of disk, memory, files; and runs in several processes."""
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import DIRECTORIES, ROOT, commands, exit_code, fails, save_every, start
from kill_and_resume import torture

import model as network
import train
from formats import model_directory, processes, run, safetensors
from model import InputError


def stop_after(steps, arguments, out):
    """Train until the checkpoint of that step, in a child process that is then told to stop, as Ctrl-C does."""
    def interrupt():
        save = run.save_checkpoint

        def save_and_stop(directory, decided, model, optimizer, step, seconds):
            save(directory, decided, model, optimizer, step, seconds)
            if step == steps:
                os.kill(os.getpid(), signal.SIGINT)
        run.save_checkpoint = save_and_stop

    child = start(arguments, out, interrupt)
    assert exit_code(child) == 130, out.read_text()


def weights(directory):
    """All but the biases of keys: softmax does not see those, so that their gradient is nothing but rounding, which
    AdamW makes as large as any."""
    tensors, _ = safetensors.read_safetensors(directory / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("key.bias")}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def test_newest_whole_checkpoint_is_taken(world, chain, tmp_path, capsys, monkeypatch):
    """Of four checkpoints the newest two are damaged: the run goes on from the third, says so, and ends as ever."""
    save_every(monkeypatch, 1, kept=4)
    arguments = commands(world, tmp_path)["pretrain"]
    stop_after(7, arguments, tmp_path / "out.txt")
    directory = tmp_path / "pretrain"
    paths = run.checkpoints(directory)
    assert [path.name for path in paths] == [f"train-00000000{step}.pt" for step in (8, 7, 6, 5)]
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 2] ^= 1                                   # one bit
    paths[0].write_bytes(content)
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    (directory / ".train-000000009.pt.1.tmp").write_bytes(b"half")
    train.main([*arguments, "--resume"])
    printed = capsys.readouterr().out
    assert f"{paths[0]} is damaged" in printed and f"{paths[1]} is damaged" in printed
    assert f"resuming after step 6 of 12, from {paths[2]}" in printed
    assert (directory / "model.safetensors").read_bytes() == (chain / "pretrain" / "model.safetensors").read_bytes()
    assert not run.checkpoints(directory) and not list(directory.glob(".*"))
    with open(directory / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 13)]


def test_log_of_a_resumed_run(tmp_path):
    """Rows after the checkpoint and half rows go, the header is written once, also where the first session had none."""
    table = tmp_path / "log.csv"
    for before, after in (("", ["step,loss", "7,0.5"]), ("step,loss\n2,1.5\n4,1.25\n6,1\n8", ["step,loss", "2,1.5",
                                                                                               "4,1.25", "7,0.5"])):
        table.write_text(before)
        run.Log(tmp_path, 5).row({"step": 7, "loss": 0.5})
        assert table.read_text().splitlines() == after


def test_the_wait_for_a_checkpoint_begins_when_the_last_is_written(world, tmp_path, monkeypatch):
    """A disk that takes ten minutes for each: a checkpoint every five minutes of training, not one after every step; and
    the last step's."""
    clock, save, steps = [0.0], run.save_checkpoint, []
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    update = train.prune.learning_rate_factor

    def step_of_a_minute(*arguments):
        clock[0] += 60
        return update(*arguments)

    def slow(directory, decided, model, optimizer, step, seconds):
        clock[0] += 600
        steps.append(step)
        save(directory, decided, model, optimizer, step, seconds)

    monkeypatch.setattr(train.prune, "learning_rate_factor", step_of_a_minute)
    monkeypatch.setattr(run, "save_checkpoint", slow)
    train.main([*commands(world, tmp_path, steps=13)["pretrain"]])
    assert steps == [6, 12, 13]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """A checkpoint with one bit changed is refused, or (where the bit means nothing) read as it was."""
    settings, model = train.asdict(train.Settings()), torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_checkpoint(tmp_path, {"settings": settings, "inputs": {}}, model, optimizer, 3, 1.5)
    path = tmp_path / "train-000000003.pt"
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    expected = run.newest_checkpoint(tmp_path, settings, {}, [].append)
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            found = run.newest_checkpoint(tmp_path, settings, {}, [].append)
        except train.InputError:
            refused += 1
        else:
            assert found["step"] == 3 and all(torch.equal(found["model"][name], tensor)
                                              for name, tensor in expected["model"].items())
    assert refused > 200


def test_a_run_is_never_lost_to_a_second_one(world, tmp_path, capsys, monkeypatch):
    save_every(monkeypatch, 2, kept=1)
    arguments = commands(world, tmp_path)["pretrain"]
    stop_after(4, arguments, tmp_path / "out.txt")
    directory = tmp_path / "pretrain"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert "--resume" in (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert "train-000000005.pt" in fails(capsys, *arguments) and "--resume" in fails(capsys, *arguments)
    message = fails(capsys, *arguments, "--resume", "--seed", "4")
    assert "--seed 0" in message and "4" in message
    (world / "corpus.txt").write_text((world / "corpus.txt").read_text().replace("the", "teh", 1))
    try:
        assert "--corpus" in fails(capsys, *arguments, "--resume")
        (world / "corpus.txt").rename(world / "gone.txt")
        assert "corpus.txt" in fails(capsys, *arguments, "--resume")
        (world / "gone.txt").rename(world / "corpus.txt")
    finally:
        (world / "corpus.txt").write_text((world / "corpus.txt").read_text().replace("teh", "the", 1))
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}
    path, = run.checkpoints(directory)
    path.write_bytes(b"")
    assert "none of the 1 checkpoints" in fails(capsys, *arguments, "--resume")


def test_another_model_to_start_from_is_noticed(world, chain, tmp_path, capsys, monkeypatch):
    shutil.copytree(chain / "pretrain", tmp_path / "pretrain")
    save_every(monkeypatch, 1)
    arguments = commands(world, tmp_path)["prune"]
    stop_after(2, arguments, tmp_path / "out.txt")
    path = tmp_path / "pretrain" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "--init" in fails(capsys, *arguments, "--resume")


@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_killed_runs_end_with_the_same_bits(stage, world, chain, tmp_path):
    """A taste of tests/kill_and_resume.py."""
    torture(stage, chain, world, kills=2, seed=0, steps=12, scratch=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What the machine does

def last_line(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and "step/s]" not in line]
    assert "Traceback" not in path.read_text(), path.read_text()
    return lines[-1]


def test_what_fails_after_the_last_step_costs_no_step(world, chain, tmp_path, capsys, monkeypatch):
    arguments = [*commands(world, tmp_path)["prune"], "--init", str(chain / "pretrain"), "--teacher",
                 str(chain / "pretrain")]
    with monkeypatch.context() as broken:
        broken.setattr(train, "finish_stage", lambda *_: (_ for _ in ()).throw(InputError("the disk is gone")))
        assert "the disk is gone" in fails(capsys, *arguments)
    monkeypatch.setattr(train.distill, "denominators", lambda batches: pytest.fail("a step was done again"))
    monkeypatch.setattr(train, "evaluate", lambda *_: {})
    train.main([*arguments, "--resume"])
    out = tmp_path / DIRECTORIES["prune"]
    found, expected = weights(out), weights(chain / DIRECTORIES["prune"])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()) and not list(out.glob("*.pt"))


def test_without_git_no_commit_is_named(monkeypatch):
    def nothing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "git")
    assert run.versions(ROOT)["git_commit"]
    monkeypatch.setattr(run.subprocess, "run", nothing)
    assert run.versions(ROOT)["git_commit"] is None


def test_a_cluster_that_counts_processes_but_starts_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert processes.started_together() == 1
    monkeypatch.setenv("RANK", "0")
    assert processes.started_together() == 4


def test_a_restored_checkpoint_is_let_go(chain):
    """The caller holds the dict as long as it trains; tensors in it would be held twice."""
    model = model_directory.load(chain / "pretrain", "pretraining", say=lambda line: None)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.state_dict(), "mask": {}, "act_range": {}, "optimizer": optimizer.state_dict(), "step": 7,
             "seconds": 1.5}
    for name, layer in network.linears(model):
        state["mask"][name], state["act_range"][name] = layer.mask, layer.act_range
    assert run.restore(model, optimizer, state) == (7, 1.5) and state == {"step": 7, "seconds": 1.5}


def test_full_disk(world, chain, tmp_path, monkeypatch):
    """No file may grow beyond 3 MB, so that the write of a checkpoint fails halfway, as on a full disk."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    save_every(monkeypatch, 5)
    arguments, printed = commands(world, tmp_path)["pretrain"], tmp_path / "out.txt"
    stop_after(5, arguments, printed)
    kept = {path: path.read_bytes() for path in run.checkpoints(tmp_path / "pretrain")}
    assert exit_code(start([*arguments, "--resume"], printed, limit)) == 2
    assert "train-000000010.pt cannot be written (File too large)" in last_line(printed)
    assert kept == {path: path.read_bytes() for path in run.checkpoints(tmp_path / "pretrain")}
    assert not list((tmp_path / "pretrain").glob(".*"))
    train.main([*arguments, "--resume"])
    assert ((tmp_path / "pretrain" / "model.safetensors").read_bytes()
            == (chain / "pretrain" / "model.safetensors").read_bytes())


def test_read_only_folder(world, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    mounted = os.geteuid() == 0         # root may write anywhere but on a file system without writing
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if mounted and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root, and not allowed to mount")
    try:
        message = fails(capsys, *commands(world, folder)["pretrain"])
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
    assert str(folder) in message and ("ead-only" in message or "ermission denied" in message)


def test_not_enough_memory(world, chain, tmp_path, monkeypatch):
    """All memory but 100 MB is taken before the loop of a resumed run, which asks for larger forward passes."""
    def limit():
        loop = train.train

        def limited(*arguments):
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            most = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (size, most))
            taken = []                      # what earlier tests have freed, this process may still hold
            with contextlib.suppress(RuntimeError):
                while True:
                    taken.append(torch.empty(2 ** 20))
            resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, most))
            return loop(*arguments)
        train.train = limited

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("address space is measured on Linux")
    arguments = [*commands(world, tmp_path, steps=3)["pretrain"], "--batch-size", "1024", "--max-len", "16"]
    save_every(monkeypatch, 1)
    stop_after(1, [*arguments, "--micro-batch", "128"], tmp_path / "out.txt")
    kept = run.checkpoints(tmp_path / "pretrain")
    assert exit_code(start([*arguments, "--resume"], tmp_path / "out.txt", limit)) == 2
    assert "not enough memory" in last_line(tmp_path / "out.txt")
    assert "--micro-batch" in last_line(tmp_path / "out.txt") and run.checkpoints(tmp_path / "pretrain") == kept


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def start_together(arguments, folder, count=2, prepare=None):
    """What torchrun does: `count` children that know of each other. Output in folder/RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(arguments, folder / f"{number}.txt", prepare, RANK=str(number), LOCAL_RANK=str(number),
                  WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for number in range(count)]


def together(arguments, folder, count=2, code=0, prepare=None):
    for number, child in enumerate(start_together(arguments, folder, count, prepare)):
        assert exit_code(child) == code, (folder / f"{number}.txt").read_text()


@pytest.mark.parametrize("stage, more", [*((stage, []) for stage in DIRECTORIES),
                                         ("prune", ["--criterion", "reconstruction"])])
def test_two_processes_train_the_same_model(stage, more, world, chain, tmp_path):
    """Dropout off, float32, 4 steps: the weights agree to float rounding, the masks and zeros exactly, and so does what
    is logged; process 1 writes and says nothing."""
    ends = []
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        for parent in ("pretrain", "prune-1x4-0.85", "sst2"):
            shutil.copytree(chain / parent, out / parent)
        shutil.rmtree(out / DIRECTORIES[stage])
        arguments = [*commands(world, out, steps=4)[stage], "--precision", "fp32", "--dropout", "0", "--update-every",
                     "0.25", "--lr", "1e-3", *more]
        together(arguments, out, count)
        ends.append(out / DIRECTORIES[stage])
    assert (tmp_path / "2" / "1.txt").read_text() == ""
    one, two = map(weights, ends)
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, two[name] == 0) or stage == "pretrain", name
        assert torch.allclose(tensor, two[name], atol=2e-5), (name, float((tensor - two[name]).abs().max()))
    one, two = (safetensors.read_safetensors(end / "compression.safetensors")[0] for end in ends)
    for name, tensor in one.items():
        if name.endswith("act_range"):
            assert torch.allclose(tensor, two[name], atol=1e-4), name
    one, two = (list(csv.DictReader(open(end / "log.csv"))) for end in ends)
    assert one[0].keys() == two[0].keys() and len(one) == len(two) == 4
    for before, after in zip(one, two):
        assert all(float(before[name]) == pytest.approx(float(after[name]), rel=1e-3, abs=1e-6)
                   for name in before if name not in ("tokens_per_second", "seconds")), (before, after)
    assert json.loads((ends[1] / "run.json").read_text())["processes"] == 2


def test_dropout_does_not_depend_on_the_number_of_processes(world, tmp_path):
    """Its random numbers belong to a forward pass and its first row, whichever process computes it."""
    ends = {}
    for name, count, rows in (("one", 1, 4), ("two", 2, 4), ("whole", 1, 8)):
        (tmp_path / name).mkdir()
        together([*commands(world, tmp_path / name, steps=4)["pretrain"], "--precision", "fp32", "--dropout", "0.2",
                  "--micro-batch", str(rows)], tmp_path / name, count)
        ends[name] = weights(tmp_path / name / "pretrain")
    for name, tensor in ends["one"].items():
        assert torch.allclose(tensor, ends["two"][name], atol=2e-5), name
    assert any(not torch.allclose(tensor, ends["whole"][name], atol=2e-5) for name, tensor in ends["one"].items())


def test_processes_divide_their_rows_evenly(world, tmp_path):
    together([*commands(world, tmp_path)["pretrain"], "--batch-size", "12", "--micro-batch", "4"], tmp_path, 2, 2)
    assert "--micro-batch 4" in last_line(tmp_path / "0.txt") and "6 rows" in last_line(tmp_path / "0.txt")


def test_resume_with_another_number_of_processes(world, chain, tmp_path, monkeypatch):
    """Two processes stop after step 3, three go on: as one process does it all, but for rounding."""
    save_every(monkeypatch, 3)
    ends = []
    for name in ("one", "many"):
        out = tmp_path / name
        out.mkdir()
        arguments = [*commands(world, out, steps=6)["pretrain"], "--precision", "fp32", "--batch-size", "12",
                     "--lr", "1e-3"]
        if name == "one":
            train.main(arguments)
        else:
            stop_all = lambda: setattr(run, "interrupts", three_steps_then_stop)          # noqa: E731
            together(arguments, out, 2, 130, stop_all)
            assert [path.name for path in run.checkpoints(out / "pretrain")] == ["train-000000003.pt"]
            together([*arguments, "--resume"], out, 3)
        ends.append(weights(out / "pretrain"))
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=2e-5), name


class three_steps_then_stop(list):
    """In place of run.interrupts: process 1, and only it, gets a signal in its third step."""

    def __enter__(self):
        self.asked = 0
        return self

    def __exit__(self, *error):
        pass

    def __len__(self):
        self.asked += 1
        return int(processes.rank() == 1 and self.asked == 3)


def test_who_stops_waits_for_the_first_ones_checkpoint(world, tmp_path):
    """A launcher kills what is left soon after one process has ended."""
    save = run.save_checkpoint

    def slowly(*arguments):
        time.sleep(2)
        save(*arguments)

    def prepare():
        run.interrupts, run.save_checkpoint = three_steps_then_stop, slowly
    children = start_together(commands(world, tmp_path, steps=6)["pretrain"], tmp_path, prepare=prepare)
    assert exit_code(children[1]) == 130
    assert [path.name for path in run.checkpoints(tmp_path / "pretrain")] == ["train-000000003.pt"]
    assert exit_code(children[0]) == 130


def test_a_dying_process_ends_the_run(world, tmp_path, monkeypatch):
    """SIGKILL to process 1: process 0 says one sentence and exits with 2, its checkpoint whole."""
    save_every(monkeypatch, 1)
    arguments = commands(world, tmp_path, steps=4000)["pretrain"]
    children = start_together(arguments, tmp_path)
    deadline = time.monotonic() + 60
    while len(run.checkpoints(tmp_path / "pretrain")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(children[1], signal.SIGKILL)
    killed = time.monotonic()
    assert exit_code(children[1]) == -signal.SIGKILL and exit_code(children[0]) == 2
    assert time.monotonic() - killed < 10
    assert "another process" in last_line(tmp_path / "0.txt") and "--resume" in last_line(tmp_path / "0.txt")
    assert run.checkpoints(tmp_path / "pretrain")


@pytest.mark.parametrize("message", [
    "Application timeout caused pair closure", "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId, but got: wait timeout", 
    "Timed out waiting 1000ms"])
def test_a_lost_process_is_told_in_a_sentence(message, monkeypatch):
    assert run.reason_of(RuntimeError(message)) is None                # of one process it is a fault of ours
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    assert "another process" in run.reason_of(RuntimeError(message))
    assert run.reason_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_silent_process_ends_the_run(world, tmp_path, monkeypatch):
    """SIGSTOP to process 1: process 0 waits as long as processes.SILENCE says, here a second, and gives up."""
    def be_impatient():
        processes.SILENCE = processes.datetime.timedelta(seconds=1)

    save_every(monkeypatch, 1)
    children = start_together(commands(world, tmp_path, steps=4000)["pretrain"], tmp_path, prepare=be_impatient)
    deadline = time.monotonic() + 60
    while len(run.checkpoints(tmp_path / "pretrain")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(children[1], signal.SIGSTOP)
    assert exit_code(children[0]) == 2 and "is silent" in last_line(tmp_path / "0.txt")
    os.kill(children[1], signal.SIGKILL)
    exit_code(children[1])


def test_processes_that_disagree_do_not_start(world, tmp_path):
    def another_seed_in_one():
        resolve = train.resolve
        train.resolve = lambda typed: resolve({**typed, "seed": int(os.environ["RANK"])})

    together(commands(world, tmp_path)["pretrain"], tmp_path, 2, 2, another_seed_in_one)
    assert "process 1 has seed 1, and process 0 has 0" in last_line(tmp_path / "0.txt") == last_line(tmp_path / "1.txt")
    assert not (tmp_path / "pretrain").exists()


def test_what_several_processes_cannot_do(world, chain, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert "--stage all" in fails(capsys, "--stage", "all", "--out", tmp_path / "out")
    assert "--stage evaluate" in fails(capsys, "--stage", "evaluate", "--init", chain / "pretrain")
    assert "multiple" in fails(capsys, *commands(world, tmp_path / "out")["pretrain"])
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    three = [*commands(world, tmp_path / "out")["pretrain"], "--batch-size", "9"]
    assert "no LOCAL_RANK and no MASTER_ADDR and no MASTER_PORT" in fails(capsys, *three)
    for name, value in (("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "none")):
        monkeypatch.setenv(name, value)
    assert "3 processes did not find one another" in fails(capsys, *three)
    assert not (tmp_path / "out").exists()


def test_torchrun(world, tmp_path):
    """The command of the README itself."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           "train.py", *commands(world, tmp_path, steps=2)["pretrain"]], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1 and (tmp_path / "pretrain" / "metrics.json").is_file()
