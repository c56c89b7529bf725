"""What measures training: where a step's time goes, how much memory it takes, how a run stands, its curves."""
import json
import re
from xml.etree import ElementTree

import pytest
from conftest import DIRECTORIES, ROOT, commands

import model as network
import train
from bench import measure_training, memory, step_time, watch
from data.batches import batches_of
from formats import curves, run
from formats.config import read_config


def test_memory_kept_by_a_layer():
    """In float32 without dropout, per token: eight arrays of H numbers (inputs, query, key, value, context, two sums
    and a norm), two of F, a number per head and four of the norms; and of each weight its product with the mask."""
    model = network.build(network.PRESETS["tiny"], "pretraining")
    network.set_dropout(model, 0.0)
    H, F, A = model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads
    tokens, weights = 8 * 64, 4 * H * H + 2 * H * F
    kept = memory.kept_by_layer(train.Settings(precision="fp32"), model, (8, 64, H))
    assert kept == pytest.approx(4 * (tokens * (8 * H + 2 * F + A + 4) + weights), rel=0.002)
def test_memory_grows_with_what_a_forward_pass_keeps(monkeypatch):
    """AdamW's two numbers and a gradient for each weight, the layers' insides, and three arrays beside them."""
    monkeypatch.setattr(memory, "memory_now", lambda: 0)         # the trial itself may leave freed memory behind
    model = network.build(network.PRESETS["tiny"], "classification")
    for rows in (256, 512):
        s = train.Settings(precision="fp32", batch_size=4096, micro_batch=rows, max_len=128)
        layer = memory.kept_by_layer(s, model, (rows, 128, model.config.hidden_size))
        forward = 3 * 4 * rows * 128 * model.config.hidden_size + model.config.num_hidden_layers * layer
        weights = 4 * network.count_parameters(model)
        assert memory.estimate_memory(s, model, None) == pytest.approx(memory.HEAP * (3 * weights + forward), rel=1e-6)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_our_side_of_the_training_table(positions, monkeypatch):
    """The prune stage through train.py's own loop with masks that stay: it runs, and gives a time for all but one
    step."""
    monkeypatch.setitem(measure_training.SIZES, "tiny", 2)
    monkeypatch.setattr(measure_training, "THREADS", 1)
    monkeypatch.setattr(run, "LOG_EVERY", 1)
    seconds = measure_training.pretrain_ours("tiny", "fp32", 3, positions)
    assert len(seconds) == 2 and min(seconds) > 0


def test_memory_command(chain, world, capsys):
    memory.main(commands(world, chain)["prune"])
    assert float(re.fullmatch(r"about ([0-9.]+) GB at its peak.*\n", capsys.readouterr().out)[1]) > 0.1
    for arguments, words in ((["--stage", "prune", "--out", str(chain / "nowhere")], "no finished run"),
                             ([], "one training stage")):
        with pytest.raises(SystemExit) as stopped:
            memory.main(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_profile_accounts_for_the_time_and_writes_nothing(stage, chain, world, capsys):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    step_time.main(commands(world, chain)[stage])
    printed = capsys.readouterr().out
    rows = {line[:36].strip(): float(line.split()[-2]) for line in printed.splitlines() if line.endswith("%")}
    parts = {"student, forward", "teacher, forward", "backward, without the vocabulary", "gradient norm", "AdamW",
             "waiting for data"} | ({"mask update", "vocabulary, its loss and gradient"} if stage == "prune" else set())
    assert set(rows) == parts | {"the rest", "a step"}
    assert all(value >= 0 for value in rows.values())
    assert rows["backward, without the vocabulary"] > rows["gradient norm"]
    step, reached, fastest = (float(found.replace(",", "")) for found in
                              re.findall(r"([0-9.,]+) GFLOP", printed.splitlines()[-1]))
    assert step > 0 and 0 < reached < fastest
    assert before == {path: path.stat().st_mtime_ns for path in chain.rglob("*")}


def test_profile_counts_the_products_of_a_step(chain, world, capsys):
    """Against the sizes of the layers: three products of each in training, the teacher's one more."""
    settings = commands(world, chain)["prune"]
    step_time.main(settings)
    step = float(re.search(r"([0-9.,]+) GFLOP a step", capsys.readouterr().out)[1])
    s = train.resolve(train.parse_settings(settings))
    data = train.build_model_and_data(s, chain / "pretrain", print)[2]
    config = read_config(chain / "pretrain")[0]
    tokens, real = 0, 0
    for number in range(step_time.STEPS):
        for batch in batches_of(data, number, s.batch_size, s.micro_batch):
            tokens += batch["input_ids"].numel()
            real += int(batch["attention_mask"].sum())
    hidden = config.hidden_size
    layers = config.num_hidden_layers * (4 * hidden ** 2 + 2 * hidden * config.intermediate_size)
    expected = 2 * 4 * (tokens * layers + real * hidden * (hidden + config.vocab_size)) / step_time.STEPS / 1e9
    assert step == pytest.approx(expected, rel=0.05, abs=0.06)          # pooler and next sentence; one decimal printed


def test_it_wants_one_stage(capsys):
    for arguments in ([], ["--stage", "evaluate"]):
        with pytest.raises(SystemExit) as stopped:
            step_time.main(arguments)
        assert stopped.value.code == 2 and "one training stage" in capsys.readouterr().err


def test_bars():
    assert watch.bars([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert watch.bars([3.0]) == "▁" and watch.bars([5, 5]) == "▁▁"
    falling = watch.bars(list(range(1000, 0, -1)))
    assert len(falling) == 60 and list(falling) == sorted(falling, reverse=True) and falling[0] + falling[-1] == "█▁"


def test_watch_shows_a_finished_run(chain, capsys):
    watch.main([str(chain / DIRECTORIES["prune"])])
    printed = capsys.readouterr().out
    assert "step 12 of 12 (100%)" in printed and "finished" in printed
    assert re.search(r"^sparsity +▁\S+█\S* +0 to 0\.8[45]", printed, re.M)
    for name in ("loss", "mlm", "kd", "learning_rate", "tokens_per_second"):
        assert re.search(rf"^{name} ", printed, re.M)


def test_watch_while_a_run_writes(tmp_path, capsys):
    """No log yet; then one whose last line is half written: what is there is shown."""
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"stage": "prune", "steps": 100}}))
    watch.main([str(tmp_path)])
    assert "no step logged yet" in capsys.readouterr().out
    (tmp_path / "log.csv").write_text("step,loss,seconds\n10,4.5,60\n20,3.5,120\n30,2")
    watch.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "step 20 of 100 (20%) after 2.0 minutes, about 8.0 to go" in printed and "4.5 to 3.5" in printed


def test_watch_needs_a_run(tmp_path, capsys):
    for content in (None, '{"settings": []}'):
        if content:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            watch.main([str(tmp_path)])
        assert stopped.value.code == 2 and "run.json" in capsys.readouterr().err


def test_committed_curves_are_drawn_from_the_committed_log():
    log = curves.read_log(ROOT / "bench" / "tiny_prune.csv")
    picture = curves.draw(log)
    assert picture == (ROOT / "docs" / "tiny_prune.svg").read_text()
    tree = ElementTree.fromstring(picture)
    lines = [element.get("points").split() for element in tree.iter() if element.tag.endswith("polyline")]
    assert [len(points) for points in lines] == [len(log["step"])] * 5            # loss, mlm, kd; sparsity; rate
    heights = [float(point.split(",")[1]) for point in lines[3]]
    assert heights == sorted(heights, reverse=True)                             # sparsity only rises, y points down
    zeros = (heights[0] - heights[-1]) / curves.HEIGHT * max(log["sparsity"])
    assert zeros == pytest.approx(log["sparsity"][-1] - log["sparsity"][0], abs=0.01)
