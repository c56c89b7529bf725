"""The README is code too: its commands parse and its files exist."""
import re
import shlex
from pathlib import Path

import infer_cpu
import train

ROOT = Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text()


def command_lines():
    """Every line of the README's code blocks that runs one of our programs."""
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", README, re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("#")[0].split("&&")
            if part.strip().startswith("python ")]


def test_commands_parse():
    lines = command_lines()
    assert len(lines) >= 8
    for line in lines:
        program, *arguments = shlex.split(line)[1:]
        if program == "train.py":
            typed = train.parse_settings(arguments)
            if typed.get("stage") not in ("all", "evaluate", None):
                train.resolve({name: value for name, value in typed.items() if name not in ("init", "precision")})
        elif program == "infer_cpu.py":
            infer_cpu.parse(arguments)
        else:
            assert program == "-m" or (ROOT / program).is_file(), line


def test_named_files_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([a-z_]+\.(?:py|txt|json))`", README):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"*/{name}")) or name in {
            "config.json", "run.json", "metrics.json", "table.txt"}, name
