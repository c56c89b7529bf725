"""What is shown of a run: the live view in the terminal, and the curves."""
import json
import re
import sys
from xml.etree import ElementTree

import pytest

import train
from conftest import DIRECTORIES, ROOT, fails

sys.path.insert(0, str(ROOT / "docs"))

import draw_curves  # noqa: E402


def test_bars():
    assert train.bars([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert train.bars([3.0]) == "▁" and train.bars([5, 5]) == "▁▁"
    falling = train.bars(list(range(1000, 0, -1)))
    assert len(falling) == 60 and list(falling) == sorted(falling, reverse=True) and falling[0] + falling[-1] == "█▁"


def test_watch_shows_a_finished_run(chain, capsys):
    train.main(["--watch", str(chain / DIRECTORIES["prune"])])
    printed = capsys.readouterr().out
    assert "step 12 of 12 (100%)" in printed and "finished" in printed
    assert re.search(r"^sparsity +▁\S+█\S* +0 to 0\.8[45]", printed, re.M)
    for name in ("loss", "mlm", "kd", "learning_rate", "tokens_per_second"):
        assert re.search(rf"^{name} ", printed, re.M)


def test_watch_while_a_run_writes(tmp_path, capsys):
    """No log yet; then one whose last line is half written: what is there is shown."""
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"stage": "prune", "steps": 100}}))
    train.main(["--watch", str(tmp_path)])
    assert "no step logged yet" in capsys.readouterr().out
    (tmp_path / "log.csv").write_text("step,loss,seconds\n10,4.5,60\n20,3.5,120\n30,2")
    train.main(["--watch", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "step 20 of 100 (20%) after 2.0 minutes, about 8.0 to go" in printed and "4.5 to 3.5" in printed


def test_watch_needs_a_run(tmp_path, capsys):
    assert "run.json" in fails(capsys, "--watch", tmp_path)
    (tmp_path / "run.json").write_text('{"settings": []}')
    assert "run.json" in fails(capsys, "--watch", tmp_path)


def test_committed_curves_are_drawn_from_the_committed_log():
    log = draw_curves.read_log(ROOT / "bench" / "tiny_prune.csv")
    picture = draw_curves.draw(log)
    assert picture == (ROOT / "bench" / "tiny_prune.svg").read_text()
    tree = ElementTree.fromstring(picture)
    lines = [element.get("points").split() for element in tree.iter() if element.tag.endswith("polyline")]
    assert [len(points) for points in lines] == [len(log["step"])] * 5            # loss, mlm, kd; sparsity; rate
    heights = [float(point.split(",")[1]) for point in lines[3]]
    assert heights == sorted(heights, reverse=True)                             # sparsity only rises, y points down
    zeros = (heights[0] - heights[-1]) / draw_curves.HEIGHT * max(log["sparsity"])
    assert zeros == pytest.approx(log["sparsity"][-1] - log["sparsity"][0], abs=0.01)
