"""The rooms of the project: how large they may be, and that imports point one way."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = {"model": 330, "prune": 280, "distill": 240, "quant": 300, "train": 550, "infer_cpu": 400}     # lines, at most
# A room may import those before it; native and formats do not know each other.
ORDER = ["model", "prune", "distill", "quant", "formats", "native", "data", "train", "infer_cpu", "bench"]
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in (
    "tests", *ORDER, *(name + ".py" for name in METHOD))]


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_method_can_be_read_in_an_afternoon():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in METHOD}
    assert all(lines[name] <= METHOD[name] for name in METHOD), lines
    assert sum(lines.values()) <= 2000


def test_no_file_and_no_function_is_too_long():
    sources = [*FILES, *(ROOT / "native").glob("*.h"), *(ROOT / "native").glob("*.cpp")]
    assert len(sources) > 50
    for path in sources:
        assert len(path.read_text().splitlines()) <= 600, path
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno - node.lineno < 60, (path, node.name)


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room):
    """Only where a flag hands over does one of the six import bench, inside a function."""
    for path in (path for path in FILES if room_of(path) == room):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            for other in (name.split(".")[0] for name in names):
                if other in ORDER and other != room:
                    handed_over = other == "bench" and node not in tree.body and room in ("train", "infer_cpu")
                    assert handed_over or ORDER.index(other) < ORDER.index(room), (path, other)
                    assert {room, other} != {"native", "formats"}, path
