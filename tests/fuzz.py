"""Bad input in bulk: seeded mutations of every kind of file and of command lines. Each must be read, or be refused with
an InputError, a DataError or exit code 2; within a minute and 2 GB, and without running anything that a file holds.

    python tests/fuzz.py --cases 5000                    some minutes; a failing case prints the command that repeats it
    python tests/fuzz.py --only squad:17                 that one case again, with its traceback
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import DIRECTORIES, commands, make_world  # noqa: E402

import infer_cpu  # noqa: E402
import train  # noqa: E402
from bench import watch
from data import DataError, shards, tasks, text  # noqa: E402
from formats import model_directory, safetensors
from formats.config import NEUTRAL
from formats.run import checkpoints, demand_same_result, newest_checkpoint, save_checkpoint

SECONDS, MEMORY = 60, 2 << 30          # of a case; of waiting, because others may use the same machine
NASTY = [b"\x00", b"\xff\xfe", b"\r", b"\n\n", b"\t", b"\"", b"'", b"\\", b"{", b"[[[[", b"]", b"</doc>", b"<doc id=",
         b"<mediawiki>", b"<?xml", b"{\"text\": 3}", b"\xef\xbb\xbf", "\u2028".encode(), b"\xed\xa0\x80", b"-1", b"NaN",
         b"1e999", b"9" * 25, b"__import__('os')", b"%s%n", b"[MASK]", b"[PAD]", "é한\U0001f600".encode()]
NUMBERS = [0, -1, 1, 2, 7, 2 ** 15, 2 ** 31, 2 ** 31 - 1, 2 ** 63, 10 ** 30, 0.5, -0.0, 1e308, float("nan"),
           float("inf")]
VALUES = [None, True, "", "x", "\x00", "\ud800", [], {}, [[]], {"a": []}, *NUMBERS]


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

def mutate_bytes(content, generator):
    """One to four edits: flip, cut, repeat, move, insert; mostly near the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        near = min(len(content), generator.choice([16, 300, 5000, 10 ** 9]))
        begin = generator.randrange(near + 1)
        end = min(len(content), begin + generator.choice([0, 1, 8, 100, 10 ** 9]))
        kind = generator.randrange(6)
        if kind == 0 and begin < len(content):
            content[begin] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del content[begin:end]
        elif kind == 2:
            content[begin:begin] = content[begin:min(end, begin + 500)] * generator.randint(1, 3)
        elif kind == 3:
            content[begin:begin] = generator.choice(NASTY)
        elif kind == 4:
            content[begin:begin + 8] = generator.randbytes(8)
        else:
            content[begin:begin] = str(generator.choice(NUMBERS)).encode()
    return bytes(content)


def mutate_json(value, generator):
    """The same object with one thing somewhere inside replaced, removed, added or wrapped."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.85:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = generator.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.15 and isinstance(value, dict):
            value[generator.choice(["x", "", "__class__", key + " "])] = generator.choice(VALUES)
        else:
            value[key] = mutate_json(value[key], generator)
        return value
    return generator.choice([*VALUES, [value], {"x": value}])


def mutate(content, generator):
    """Bytes of a file -> other bytes; JSON half of the time as JSON."""
    if content[:1] == b"{" and generator.random() < 0.6:
        value = json.loads(content)
        for _ in range(generator.randint(1, 3)):
            value = mutate_json(value, generator)
        return json.dumps(value).encode()
    return mutate_bytes(content, generator)


class Trap:
    """Unpickled without care, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# ---------------------------------------------------------------------------------------------------------------------
# What is read. Each takes (folder for this case, the finished chain, the world, generator).

def mutated_copy(source, folder, names, generator):
    """A copy of a model directory with one of the named files mutated, or now and then removed."""
    copy = folder / "model"
    shutil.copytree(source, copy)
    path = copy / generator.choice(names)
    if generator.random() < 0.03:
        path.unlink()
    else:
        path.write_bytes(mutate(path.read_bytes(), generator))
    return copy


def read_table(folder, chain, world, generator):
    task, name = generator.choice([("sst2", "SST-2"), ("qnli", "QNLI")])
    (folder / name).mkdir()
    for file in ("train.tsv", "dev.tsv"):
        content = (world / name / file).read_bytes()
        (folder / name / file).write_bytes(mutate(content, generator) if file == "train.tsv" else content)
    data = tasks.TaskData(task, folder, text.load_tokenizer(chain / "pretrain"), 48)
    data.collate(data.rows(0, 4))


def read_questions(folder, chain, world, generator):
    (folder / "SQuAD").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        content = (world / "SQuAD" / name).read_bytes()
        (folder / "SQuAD" / name).write_bytes(mutate(content, generator) if name.startswith("train") else content)
    data = tasks.TaskData("squad", folder, text.load_tokenizer(chain / "pretrain"), 64)
    data.collate(data.rows(0, 4))


def read_corpus(folder, chain, world, generator):
    plain = (world / "corpus.txt").read_text()[:20_000]
    lines = [line for line in plain.split("\n") if line][:40]
    content = generator.choice([
        plain, "".join(f"<doc id={i}>\n{line}\n</doc>\n" for i, line in enumerate(lines)),
        "".join(json.dumps({"id": i, "text": line}) + "\n" for i, line in enumerate(lines)),
        "<mediawiki>" + "".join(f"<page><ns>0</ns><revision><text>{line} [[a|b]] {{{{c|{{{{d}}}}}}}} ''e''</text>"
                                f"</revision></page>\n" for line in lines) + "</mediawiki>"]).encode()
    path = folder / generator.choice(["corpus.txt", "corpus.jsonl", "corpus.xml"])
    path.write_bytes(mutate_bytes(content, generator))
    tokenizer = text.load_tokenizer(chain / "pretrain")
    data = text.PretrainingData(shards.open_corpus(path, tokenizer), tokenizer, 48)
    data.collate(data.rows(0, 4))


def read_model(folder, chain, world, generator):
    """config.json, weights and masks."""
    directory = mutated_copy(chain / "prune-1x4-0.85", folder, ["config.json", "model.safetensors",
                                                                "compression.safetensors"], generator)
    if generator.random() < 0.3:
        changes = {generator.choice([*NEUTRAL, "architectures", "model_type", "qa_dropout"]): generator.choice(VALUES)}
        with contextlib.suppress(ValueError, TypeError, OSError):
            raw = json.loads((directory / "config.json").read_bytes())
            (directory / "config.json").write_text(json.dumps({**raw, **changes}))
    if generator.random() < 0.3:
        with contextlib.suppress(train.InputError):
            tensors = safetensors.read_safetensors(directory / "model.safetensors")[0]
            name = generator.choice([*tensors])
            tensors[name].view(-1)[0] = generator.choice([float("nan"), float("inf"), 1e38])
            prefix = generator.choice(["", "module.", "_orig_mod."])
            safetensors.write_safetensors(directory / "model.safetensors",
                                          {prefix + name: tensor for name, tensor in tensors.items()})
    model_directory.kind_of(directory)
    model = model_directory.load(directory, generator.choice(["pretraining", "classification", "span"]), num_labels=2,
                                 fresh_head=True, say=lambda line: None)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise RuntimeError("weights that are no numbers were read")


def read_pickle(folder, chain, world, generator):
    """pytorch_model.bin in place of model.safetensors: mutated, or with a trap inside."""
    tensors, _ = safetensors.read_safetensors(chain / "pretrain" / "model.safetensors")
    directory, trap = folder / "model", folder / "trapped"
    directory.mkdir()
    shutil.copy(chain / "pretrain" / "config.json", directory)
    path = directory / "pytorch_model.bin"
    if generator.random() < 0.3:
        path.write_bytes(pickle.dumps({"x": Trap(trap)}, protocol=generator.randint(0, 4)))
    elif generator.random() < 0.5:
        torch.save({**dict(list(tensors.items())[:3]), "x": Trap(trap)}, path)
    else:
        torch.save(tensors, path)
        path.write_bytes(mutate_bytes(path.read_bytes(), generator))
    try:
        model_directory.load(directory, "pretraining", say=lambda line: None)
    finally:
        if trap.exists():
            raise RuntimeError("a file was executed")


def read_checkpoint(folder, chain, world, generator):
    settings, model = train.asdict(train.Settings()), torch.nn.Linear(4, 3)
    save_checkpoint(folder, {"settings": settings, "inputs": {}}, model, torch.optim.AdamW(model.parameters()), 1, 1.0)
    path, trap = checkpoints(folder)[0], folder / "trapped"
    if generator.random() < 0.2:
        torch.save({"settings": Trap(trap)}, path)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), generator))
    try:
        newest_checkpoint(folder, settings, {}, [].append)
    finally:
        if trap.exists():
            raise RuntimeError("a file was executed")


def read_vocabulary(folder, chain, world, generator):
    names = ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json"]
    for name in names:
        shutil.copy(chain / "pretrain" / name, folder)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    for name, content in (("added_tokens.json", {"<e1>": len(words), "[E2]": len(words) + 1}),
                          ("special_tokens_map.json", {"cls_token": "[CLS]", "additional_special_tokens": ["<e3>"]})):
        if generator.random() < 0.5:
            (folder / name).write_text(json.dumps(content))
            names.append(name)
    if generator.random() < 0.5:                # a name twice, blank lines
        words[generator.randrange(5, len(words))] = generator.choice(["", "the", " ", *words[5:9]])
        (folder / "vocab.txt").write_text("\n".join(words) + generator.choice(["", "\n", "\n\n\n"]), encoding="utf-8")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options.pop("added_tokens_decoder") if generator.random() < 0.7 else None
    options[generator.choice(["do_lower_case", "tokenizer_class", "cls_token", "extra_special_tokens", "x_token"])] = (
        generator.choice([*VALUES, True, "BertTokenizer", "PreTrainedTokenizerFast", ["<e4>"], {"content": "<e5>"}]))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    name = generator.choice(names)
    if name != "tokenizer.json" and generator.random() < 0.7:
        (folder / "tokenizer.json").unlink()
    if generator.random() < 0.7:
        (folder / name).write_bytes(mutate((folder / name).read_bytes(), generator))
    tokenizer = text.load_tokenizer(folder)
    for _ in range(2):                          # and again, as it is written
        [*text.token_ids(tokenizer, ["A film, which [MASK] héroes saw.", "<e1>", "\ud800 <e5>", ""])]
        text.save_tokenizer(tokenizer, folder / "saved")
        tokenizer = text.load_tokenizer(folder / "saved")


def read_int8(folder, chain, world, generator):
    """A packed model, as a person would use it."""
    directory = mutated_copy(chain / DIRECTORIES["quantize"], folder, ["config.json", "int8.safetensors"], generator)
    infer_cpu.main([str(directory), "--text", "A good film.", "--engine", generator.choice(["auto", "int8"])])


def read_head(folder, chain, world, generator):
    """A classifier whose config.json says something of its classes, for a task of two classes."""
    directory = folder / "model"
    shutil.copytree(chain / DIRECTORIES["quantize"], directory)
    raw = json.loads((directory / "config.json").read_text())
    name = generator.choice(["id2label", "problem_type", "compression", "num_labels", "label2id"])
    names = {str(i): generator.choice([*VALUES, "LABEL_0", "LABEL_1", "0", "1", "Positive", "negative"]) for i in range(
        generator.choice([1, 2, 2, 2, 3]))}
    raw[name] = mutate_json(raw.get(name) or {}, generator)
    if name == "id2label" and generator.random() < 0.8:
        raw[name] = names
    (directory / "config.json").write_text(json.dumps(raw))
    if generator.random() < 0.5:
        model_directory.load(directory, "classification", task=tasks.TASKS["sst2"], say=lambda line: None,
                             fresh_head=generator.random() < 0.5)
    infer_cpu.main([str(directory), "--evaluate", "--task", "sst2", "--data", str(world), "--engine", "int8", "--limit",
                    "8"] if generator.random() < 0.5 else [str(directory), "--text", "good", "--engine", "fp32"])


@functools.cache
def engines(chain):
    return [infer_cpu.load(chain / DIRECTORIES["quantize"], name, say=lambda line: None)
            for name in ("fp32", "int8", "sparse")]


def read_batch(folder, chain, world, generator):
    """A batch with odd numbers, shapes and types. All engines take it, or none does."""
    rows, length = generator.choice([0, 1, 3]), generator.choice([0, 1, 5, 128, 129])
    batch = {"input_ids": torch.randint(5, 200, (rows, length)), "attention_mask": torch.ones(rows, length),
             "token_type_ids": torch.zeros(rows, length, dtype=torch.int32)}
    for _ in range(generator.randint(0, 2)):
        name = generator.choice(list(batch))
        kind = generator.random()
        if kind < 0.5 and batch[name].numel():
            number = generator.choice([-1, 0, 2, 7, 199, 10 ** 6, 2 ** 31 - 1])
            batch[name].view(-1)[generator.randrange(batch[name].numel())] = number
        elif kind < 0.7:
            batch[name] = batch[name][..., :-1]
        elif kind < 0.8 and name != "input_ids":
            del batch[name]
            break
        else:
            batch[name] = batch[name].flip(-1) if kind < 0.9 else torch.zeros_like(batch[name])
    outcomes = []
    for engine in engines(chain):
        try:
            outcomes.append(engine(dict(batch)))
        except train.InputError as error:
            outcomes.append(str(error))
    if len({type(outcome) for outcome in outcomes}) > 1 or any(
            torch.is_tensor(outcome) and not bool(outcome.isfinite().all()) for outcome in outcomes):
        raise RuntimeError(f"the engines do not agree: {outcomes}")
    if isinstance(outcomes[0], str):
        raise train.InputError(outcomes[0])


def read_answer(folder, chain, world, generator):
    """Any text, as a person or a program may pass it."""
    letters = [*"abc ,.!?é\u0301\u0323한\U0001f600\x00\r\n\t\u200b\ufeff\ud800\udfff東", "[MASK]", "[SEP]", "the film"]
    text = "".join(generator.choices(letters, k=generator.choice([0, 1, 3, 20, 500])))
    infer_cpu.main([str(chain / DIRECTORIES["quantize"]), "--text", text, "--engine", "int8", "--json",
                    str(folder / "answer.json")])
    json.loads((folder / "answer.json").read_bytes(), parse_constant=int)       # no NaN, no Infinity


def read_finished(folder, chain, world, generator):
    """--resume of a finished run whose run.json says something else."""
    copy = mutated_copy(chain / "pretrain", folder, ["run.json"], generator)
    settings = train.resolve(train.parse_settings(commands(world, folder)["pretrain"]))
    demand_same_result(copy, **train.deciding(settings, None, None))


def read_log(folder, chain, world, generator):
    mutated_copy(chain / "pretrain", folder, ["log.csv", "run.json"], generator)
    watch.main([str(folder / "model")])


def read_command(folder, chain, world, generator):
    """Flags of train.py with good and bad values, as far as the settings go; a missing file is the usual end."""
    whole = list(generator.choice(list(commands(world, folder / "out").values())))
    arguments = generator.choice([whole, ["--out", str(folder / "out")]])
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Settings)]
    for _ in range(generator.randint(1, 5)):
        name = generator.choice(flags + ["--sparsty", "-x", "--", "", "\ud800", "--lr=", "--Stage"])
        choices = train.CHOICES.get(name.lstrip("-").replace("-", "_"), ())
        value = str(generator.choice([*NUMBERS, *choices, "", "x", "\x00", "0.85", "1x4", "2:4", "9" * 5000, "../..",
                                      "a/b", str(chain / "pretrain"), str(world), "--lr", "²", "1_0", "0x10", " 3 "]))
        arguments[len(arguments):] = [name] if generator.random() < 0.15 else [name, value]
    typed = train.parse_settings(arguments)
    if typed.get("recipe") == "help":                     # a table, and nothing to resolve
        return
    settings = train.resolve(typed)
    if settings.stage not in ("all", "evaluate"):
        init, teacher = train.parents_of(settings)
        train.directory_of(settings, train.row_of(settings))
        train.build_model_and_data(settings, init, lambda line: None)


READERS = {"command": read_command, "table": read_table, "squad": read_questions, "corpus": read_corpus,
           "model": read_model, "pickle": read_pickle, "checkpoint": read_checkpoint, "vocabulary": read_vocabulary,
           "int8": read_int8, "log": read_log, "head": read_head, "batch": read_batch, "answer": read_answer,
           "finished": read_finished}


# ---------------------------------------------------------------------------------------------------------------------

def run(name, number, chain, world):
    """One case. Returns 'read', 'refused', or the traceback of anything else."""
    def too_slow(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    folder, printed = Path(tempfile.mkdtemp(dir=chain.parent)), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            READERS[name](folder, chain, world, random.Random(f"{name} {number}"))
        return "read"
    except (train.InputError, DataError) as error:
        return "refused" if re.search(r"\S", str(error)) else "an empty message"
    except SystemExit as stop:
        clean = stop.code in (0, 2) and "Traceback" not in printed.getvalue()
        return "refused" if clean else f"exit code {stop.code}: {printed.getvalue()}"
    except BaseException:                       # a panic of the tokenizers' Rust is no Exception
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder)


def run_all(cases, chain, world):
    """That many cases, evenly over all kinds of input. Returns ({kind: {outcome: count}}, [failures])."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    counts, failures = {name: {"read": 0, "refused": 0} for name in READERS}, []
    try:
        for case in range(cases):
            name, number = list(READERS)[case % len(READERS)], case // len(READERS)
            outcome = run(name, number, chain, world)
            if outcome in counts[name]:
                counts[name][outcome] += 1
            else:
                failures.append(f"{outcome}\npython tests/fuzz.py --only {name}:{number}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        world, chain = Path(scratch) / "world", Path(scratch) / "chain"
        make_world(world)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for command in commands(world, chain).values():
                train.main(command)
        if arguments.only:
            name, number = arguments.only.split(":")
            print(run(name, int(number), chain, world))
            return
        counts, failures = run_all(arguments.cases, chain, world)
    for name, outcomes in counts.items():
        print(f"{name:<11}" + "  ".join(f"{outcome} {count:>4}" for outcome, count in outcomes.items()))
    print(*failures, sep="\n", file=sys.stderr)
    print(f"{arguments.cases} cases, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
