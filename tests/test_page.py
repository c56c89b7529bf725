"""The report of a whole run: a page that opens without a network and shows what the files hold."""
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import torch

from formats.page import CORNER, draw_mask, first_query, write_results

VOID = {"meta"}


class Tags(HTMLParser):
    """Every tag, and whether each was closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_square_is_a_living_weight():
    living = torch.tensor([[True, False, True], [False, False, True]])
    picture = ElementTree.fromstring(draw_mask(living))
    squares = re.findall(r"M(\d+) (\d+)\.5h1", next(path for path in picture if path.tag.endswith("path")).get("d"))
    assert {(int(row), int(column)) for column, row in squares} == {(0, 0), (0, 2), (1, 2)}


def test_the_report_is_whole_and_asks_for_nothing(chain, tmp_path):
    directories = [chain / name for name in ("pretrain", "prune-1x4-0.85", "sst2/teacher", "sst2/int8-1x4-0.85")]
    report = write_results(chain, "a <table> & more", chain / "prune-1x4-0.85", directories)
    try:
        page, tags = report.read_text(), Tags()
        tags.feed(page)
        assert not tags.open and "a &lt;table&gt; &amp; more" in page
        assert (chain / "table.txt").read_text() == "a <table> & more\n"
        assert [tag for tag, _ in tags.seen].count("details") == len(directories)
        assert [attributes for tag, attributes in tags.seen if "open" in attributes] == [{"open": None}]
        assert not [attributes for _, attributes in tags.seen if {"src", "href"} & set(attributes)]
        assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
        name, weight = first_query(chain / "prune-1x4-0.85")
        assert f"<code>{name}</code>" in page
        assert len(re.findall(r"M\d+ \d+\.5h1", page)) == int((weight[:CORNER, :CORNER] != 0).sum()) > 0
    finally:
        report.unlink()
        (chain / "table.txt").unlink()


def test_a_stage_without_a_row_in_its_log_has_no_curves(chain, tmp_path):
    for name in ("prune", "short", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "prune" / "model.safetensors").write_bytes((chain / "prune-1x4-0.85/model.safetensors").read_bytes())
    (tmp_path / "short" / "log.csv").write_text("step,loss\n")
    page = write_results(tmp_path, "", tmp_path / "prune", [tmp_path / name for name in ("prune", "short", "none")])
    assert "<details" not in page.read_text()
