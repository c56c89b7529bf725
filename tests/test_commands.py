"""Every command of README and of the pages under docs/, typed: in a small world, with a few steps, page by page in the
order in which a reader meets them."""
import bz2
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from test_corpus import dump
from test_readme import PAGES, lines_of

import infer_cpu
import model as network
import prune
import train
from bench import benchmark, measure_sparsities, measure_spread, measure_tiny
from data import text, tiny
from data.tasks import TASKS
from formats import model_directory, report

# What a reader would put in the places of names; models that take minutes, or a network, as small ones.
FILES = {"TEXT_DIR": "text", "TASKS_DIR": "world", "LINES.txt": "lines.txt", "MODEL_DIR": "minilm",
         "CLASSIFIER_DIR": "classifier",
         "enwiki-latest-pages-articles.xml.bz2": "enwiki.xml.bz2", "google-bert/bert-base-uncased": "base",
         "Intel/bert-base-uncased-sparse-90-unstructured-pruneofa": "sparse"}
LESS = {"train.py": ["--steps", "6", "--batch-size", "4", "--max-len", "64", "--threads", "1"],
        "bench.measure_tiny": ["--seeds", "0", "--json", "tiny.json"],
        "bench.measure_spread": ["--models", "1", "--seeds", "0", "--json", "spread.json"],
        "bench.measure_sparsities": ["--seeds", "0", "--tasks", "qqp", "--json", "sparsities.json"],
        "bench.measure_sizes": ["--json", "size.json"]}
LESS |= dict.fromkeys(("bench.memory", "bench.step_time"), LESS["train.py"])

# Commands that are not typed here: why, and where a small form of them is.
ELSEWHERE = {
    "pytest": "it is this", "data/download.py": "asks the network; test_download.py", "bench.walk": "test_walk.py",
    "bench.measure_minilm": "test_hidden.py", "bench.measure_encoder": "test_embed.py",
    "bench.measure_speed": "wants other people's packages", "bench.measure_training": "the same",
}


def small(program, arguments):
    """The arguments as typed, and after them, where they count, those of a small run."""
    arguments = list(arguments)
    if "help" in arguments or "evaluate" in arguments:
        return arguments
    if "--epochs" in arguments:                                     # steps take their place
        place = arguments.index("--epochs")
        del arguments[place:place + 2]
    return [*arguments, *LESS.get(program, [])]


def call(program, arguments):
    """The program's main, as `python program arguments` calls it, without the seconds that importing torch takes."""
    importlib.import_module(program.removesuffix(".py").replace("/", ".")).main(small(program, arguments))


def parts_of(line):
    """(program, arguments) of a command."""
    words = shlex.split(line)[1:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def write_model(folder, config, tokenizer):
    """A random model: 'encoder' has no heads, 'classifier' one for SST-2, 'sparse' 90 % zeros."""
    config = replace(config, vocab_size=text.vocabulary_rows(tokenizer))
    model = network.build(config, {"encoder": "encoder", "classifier": "classification"}.get(folder.name, "pretraining"))
    for _, layer in network.linears(model):
        if layer.prunable and folder.name == "sparse":
            layer.mask = prune.magnitude_mask(layer.weight, 0.9, prune.parse_pattern("unstructured"))
    prune.burn_in(model)
    model_directory.save(model, folder, TASKS["sst2"].labels if folder.name == "classifier" else None)
    text.save_tokenizer(tokenizer, folder)


@pytest.fixture
def newcomer(tmp_path, chain, monkeypatch):
    """An empty folder to work in, a small world in place of the bundled one, the files that commands name; children are
    called in this process, and nothing is timed for long."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "world", rounds=1, train=24, dev=12)
    monkeypatch.setattr(tiny, "ensure", lambda folder=None, seed=0: tmp_path / "world")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "corpus.txt").write_bytes((tmp_path / "world" / "corpus.txt").read_bytes())
    (tmp_path / "lines.txt").write_text("The sofa was red.\nWho bought the car?\n")
    articles = [(f"t{number}", 0, "", "wikitext", f"Article {number} is short. It ends here.") for number in range(9)]
    (tmp_path / "enwiki.xml.bz2").write_bytes(bz2.compress(dump(articles).encode()))
    for preset, layers in (("minilm-l6", 1), ("bert-base", 2), ("bert-large", 4)):
        monkeypatch.setitem(network.PRESETS, preset, replace(network.PRESETS["tiny"], num_hidden_layers=layers))
    for folder, preset in (("minilm", "minilm-l6"), ("encoder", "minilm-l6"), ("classifier", "minilm-l6"),
                           ("base", "bert-base"), ("sparse", "bert-base")):
        write_model(tmp_path / folder, network.PRESETS[preset], train.tokenizer_of(chain / "pretrain"))

    started = subprocess.run
    monkeypatch.setattr(report.subprocess, "run", lambda command, *rest, **options: (
        in_this_process(command) if command[0] == sys.executable else started(command, *rest, **options)))
    monkeypatch.setattr(benchmark, "medians_in_turn",
                        lambda engines, batch: infer_cpu.medians_in_turn(engines, batch, least=1, budget=0))
    for module in (measure_tiny, measure_spread, measure_sparsities):
        monkeypatch.setattr(module, "run", lambda log, program, *arguments: call(program, arguments))
        monkeypatch.setattr(module, "in_parallel", lambda jobs, function, items: list(map(function, items)))
    return tmp_path


def in_this_process(command):
    infer_cpu.main(command[2:])
    return subprocess.CompletedProcess(command, 0)


@pytest.mark.parametrize("page", [path for path in PAGES if lines_of(PAGES[path])], ids=lambda path: path.name)
def test_commands_of_a_page_run(page, newcomer, capsys):
    if page.name == "training.md":                          # it speaks to those who have done the first stage
        call("train.py", ["--stage", "pretrain"])
    files = FILES | ({"MODEL_DIR": "encoder"} if page.name == "sentence_encoders.md" else {})
    for line in lines_of(PAGES[page]):
        program, arguments = parts_of(line)
        if program in ELSEWHERE:
            continue
        capsys.readouterr()
        call(program, [files.get(word, word) for word in arguments])
        assert capsys.readouterr().out.strip() or (newcomer / arguments[-1]).is_file(), line
        for name in LESS.get(program, [])[-1:]:
            assert not name.endswith(".json") or (newcomer / name).is_file(), line


def test_what_is_not_typed_here_is_there():
    programs = {parts_of(line)[0] for page in PAGES.values() for line in lines_of(page)}
    assert set(ELSEWHERE) < programs
    for name in re.findall(r"test_\w+\.py", " ".join(ELSEWHERE.values())):
        assert (ROOT / "tests" / name).is_file(), name
