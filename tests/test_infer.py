"""infer_cpu.py: kernels bit for bit against the integer oracle, engines against the fake-quantized model, commands."""
import functools
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import infer_cpu
import model as network
import quant
from bench import agreement, benchmark
from data import encode, tiny
from data.corpus import read_documents
from data.metrics import squad_scores
from data.tasks import TASKS, TaskData, read_questions
from data.text import load_tokenizer, save_tokenizer, train_tokenizer
from formats import config, int8, machine, model_directory
from model import InputError, ModelConfig

ROOT = Path(infer_cpu.__file__).parent
# pytest resets the filters of infer_cpu.py, which silence torch's two remarks.
pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
              pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")]
KERNELS = {**infer_cpu.DENSE_KERNELS, **infer_cpu.SPARSE_KERNELS}


def packed_layer(out, columns, block=(1, 4), sparsity=0.8, bits=7, zero_point=None, seed=0):
    """A quantized layer with random integers; 7 bits, so that it is exact on every CPU."""
    generator = torch.Generator().manual_seed(seed)
    layer = network.Linear(columns, out)
    layer.weight.data = torch.randn(out, columns, generator=generator)
    layer.bias.data = torch.randn(out, generator=generator)
    layer.act_range.copy_(torch.tensor([-2.0, 3.0]))
    keep = torch.rand(out // block[0], columns // block[1], generator=generator) >= sparsity
    layer.mask.copy_(keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
    layer.mask[:block[0]] = False                                       # an empty row
    layer.fake_quant = functools.partial(quant.fake_quant, bits=bits, scales="row")
    packed = quant.pack(layer)
    if zero_point is None:
        return packed
    return replace(packed, input_zero_point=torch.tensor(zero_point, dtype=torch.int32))


def usable(kernel, packed):
    """The product of a kernel; skips one that this build of torch does not have, and hides no other error."""
    needs = {infer_cpu.onednn: "onednn", infer_cpu.fbgemm: "fbgemm", infer_cpu.qnnpack: "qnnpack"}.get(kernel)
    if needs and needs not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch was built without {needs}")
    if kernel is infer_cpu.qnnpack and not len(packed.values):
        pytest.skip("a layer without any weight has no blocks")
    return kernel(packed)[0]


# ---------------------------------------------------------------- kernels

@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("out, columns, tokens", [(48, 64, 33), (7, 12, 1), (33, 20, 129), (1, 4, 2), (2, 768, 70)])
def test_kernel_gives_the_oracles_integers(name, bits, out, columns, tokens):
    if bits == 8 and machine.saturates() and name != "CSR":
        pytest.skip("8-bit products saturate on this CPU")
    packed = packed_layer(out, columns, bits=bits, zero_point=37)
    probe = replace(packed, weight_scale=torch.ones(out), bias=torch.zeros(out), input_scale=torch.tensor(1.0))
    levels = torch.randint(0, 2 ** bits, (tokens, columns), generator=torch.Generator().manual_seed(1))
    levels[0] = 2 ** bits - 1                                           # the sum that saturates first
    x = (levels - 37).float()
    y = usable(KERNELS[name], probe)(x)
    brute = (levels - 37) @ quant.unpack(packed).long().T               # int64
    assert y.dtype == torch.float32 and torch.equal(y.long(), brute) and torch.equal(y, brute.float())


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_rounds_like_the_oracle_and_keeps_the_shape(name):
    packed = packed_layer(24, 32)
    product = usable(KERNELS[name], packed)
    x = 2 * torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2))      # some out of range, to be clipped
    expected = quant.integer_forward(x, packed)
    assert torch.allclose(product(x), expected, rtol=1e-6, atol=2e-6)
    assert torch.allclose(product(x[:, 0]), expected[:, 0], rtol=1e-6, atol=2e-6)   # a strided view, as the pooler's
    unrounded = torch.nn.functional.linear(x, quant.unpack(packed) * packed.weight_scale[:, None], packed.bias)
    assert (expected - unrounded).abs().max() > 0.1                     # so the comparison above means something


@pytest.mark.parametrize("block, sparsity",
                         [((1, 1), 0.9), ((4, 1), 0.5), ((1, 1), 0.0), ((1, 1), 1.0), ((1, 4), 0.99)])
def test_csr_takes_every_pattern(block, sparsity):
    packed = packed_layer(16, 24, block, sparsity)
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    product, size = infer_cpu.csr(packed)
    assert torch.allclose(product(x), quant.integer_forward(x, packed), rtol=1e-6, atol=2e-6)
    assert size == 8 * int((quant.unpack(packed) != 0).sum()) + 4 * 17 + 8 * 16


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_takes_a_bias_at_any_address(name):
    packed = packed_layer(16, 32)
    shifted = torch.cat([torch.zeros(1), packed.bias])[1:]              # 4 bytes off an aligned address
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    y = usable(KERNELS[name], replace(packed, bias=shifted))(x)
    assert torch.allclose(y, quant.integer_forward(x, packed), rtol=1e-6, atol=2e-6)


def test_float32_exactness_is_judged_by_the_worst_input():
    packed = packed_layer(4, 8, (1, 1), 0.0)
    assert quant.exact_in_float32(packed)
    wide = replace(packed, shape=(1, 4096), values=torch.full((1, 4096), 127, dtype=torch.int8), mask_bits=None)
    assert not quant.exact_in_float32(wide)
    narrow = replace(wide, shape=(1, 512), values=wide.values[:, :512])
    assert quant.exact_in_float32(narrow)


def test_a_wrong_or_missing_kernel_is_never_chosen():
    packed = packed_layer(48, 64)

    def off_by_one(packed):
        product, size = infer_cpu.csr(packed)
        return lambda x: product(x) + 1, size

    def slow(packed):
        product, size = infer_cpu.csr(packed)
        return lambda x: (time.sleep(0.02), product(x))[1], size

    def missing(packed):
        raise RuntimeError("no such operator\nand more")
    kernels = {"slow": slow, "wrong": off_by_one, "CSR": infer_cpu.csr, "missing": missing}
    chosen, note = infer_cpu.fastest(kernels, packed)
    assert chosen is infer_cpu.csr and note.startswith("CSR")
    with pytest.raises(InputError, match="wrong is not exact; missing: no such operator"):
        infer_cpu.fastest({"wrong": off_by_one, "missing": missing}, packed)


def test_blocks_operator_refuses_other_patterns_and_leaves_torchs_setting_alone():
    names = torch.backends.quantized.supported_engines
    before = next(name for name in names if name not in ("qnnpack", "none"))
    torch.backends.quantized.engine = before
    with pytest.raises(RuntimeError, match="1x4"):
        infer_cpu.qnnpack(packed_layer(8, 16, (4, 1)))
    usable(infer_cpu.qnnpack, packed_layer(8, 16))(torch.randn(2, 16))
    for block in ((4, 4), (2, 8)):                                      # made of 1x4
        packed, x = packed_layer(24, 32, block, 0.5), torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
        product, size = infer_cpu.qnnpack(packed)
        assert torch.allclose(product(x), quant.integer_forward(x, packed), rtol=1e-6, atol=2e-6)
        assert packed.pattern == f"{block[0]}x{block[1]}" and size == 2 * packed.values.numel() + 4 * 25 + 8 * 24
    assert torch.backends.quantized.engine == before


# ---------------------------------------------------------------- model directories

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world and a tokenizer of it."""
    folder = tiny.ensure(tmp_path_factory.mktemp("world") / "tiny")
    return folder, train_tokenizer(read_documents(folder / "corpus.txt")[:300], 400)


def write_model(directory, world, task, block=(1, 4), bits=None, quantized=True, steps=30):
    """A small real model, trained for a moment on the task with fake quantization, as train.py leaves it."""
    folder, tokenizer = world
    bits = bits or machine.default_activation_bits()
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=200, initializer_range=0.3)
    data = TaskData(task, folder, tokenizer, 192 if task == "squad" else 48)
    model = network.build(config, data.kind, len(data.labels) or 2)
    for number, (_, layer) in enumerate(network.linears(model)):
        if layer.prunable and block:
            keep = torch.rand(layer.out_features // block[0], layer.in_features // block[1]) >= 0.8
            layer.mask.copy_(keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
    quant.prepare(model, bits)
    quant.round_embeddings(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = data.collate(data.rows(step, 16))
        output = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        if data.kind == "span":
            loss = sum(torch.nn.functional.cross_entropy(logits, batch[name]) for logits, name in
                       zip(output, ("start_positions", "end_positions")))
        else:
            loss = torch.nn.functional.cross_entropy(output, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quant.update_ranges(model)
    record = {"task": task, "max_len": data.max_length}
    if quantized:
        record.update(activation_bits=bits, weight_scales="row")
        int8.write_int8(model, directory)
    model_directory.save(model, directory, list(data.labels) or None, record)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory, world):
    root = tmp_path_factory.mktemp("models")
    for name in ("blocks", "unstructured", "dense", "plain", "pairs", "squad"):
        (root / name).mkdir()
    return {"blocks": write_model(root / "blocks", world, "sst2"),
            "unstructured": write_model(root / "unstructured", world, "mnli", (1, 1)),
            "dense": write_model(root / "dense", world, "sst2", None, steps=5),
            "plain": write_model(root / "plain", world, "sst2", quantized=False, steps=5),
            "pairs": write_model(root / "pairs", world, "qqp"),
            "squad": write_model(root / "squad", world, "squad", (4, 1))}


def silent(_):
    pass


@pytest.mark.parametrize("name", ["blocks", "unstructured", "squad"])
def test_engines_agree_with_the_fake_quantized_model_on_the_dev_set(directories, world, name):
    directory, folder = directories[name], world[0]
    task = json.loads((directory / "config.json").read_text())["compression"]["task"]
    data = encode.encoder_for(directory, TASKS[task].kind, None, task, folder)
    for engine_name in ("int8", "sparse", "native"):
        engine = infer_cpu.load(directory, engine_name, say=silent)
        metrics, predictions, figures = agreement.compare(data, engine, 200)
        predictions = predictions.popitem()[1]
        assert data.kind == "span" or min(predictions.count(label) for label in set(predictions)) >= 5    # it does vary
        assert figures["examples"] >= 200
        assert min(figures["equal_predictions"].values()) >= 0.995
        assert figures["mean_logit_difference"] < 2e-3 * figures["logit_standard_deviation"]
        assert figures["largest_logit_difference"] < 0.2 * figures["logit_standard_deviation"]
        assert metrics.keys() == figures["fake_quant_metrics"].keys()


def test_the_old_operators_take_turns(monkeypatch):
    """They look at one global setting, and two threads in QNNPACK spoil the heap."""
    inside, most = [], []

    def enter(name):
        with machine.quantized_engine(name):
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.01)
            assert torch.backends.quantized.engine == name
            inside.remove(name)

    names = torch.backends.quantized.supported_engines[:2] * 3
    before, threads = torch.backends.quantized.engine, [threading.Thread(target=enter, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and torch.backends.quantized.engine == before


def test_both_layouts_of_a_block_model_agree(directories, monkeypatch):
    batch = encode.random_batch(config.read_config(directories["blocks"])[0], 3, 40)
    expected = infer_cpu.load(directories["blocks"], "int8", say=silent)(batch)
    for name, kernel in infer_cpu.SPARSE_KERNELS.items():
        usable(kernel, packed_layer(8, 16))
        monkeypatch.setattr(infer_cpu, "SPARSE_KERNELS", {name: kernel})
        engine = infer_cpu.load(directories["blocks"], "sparse", say=silent)
        assert name in engine.layout
        assert torch.allclose(engine(batch), expected, atol=1e-2)


def test_fp32_engine_is_the_plain_model_and_int8_is_not(directories):
    directory = directories["blocks"]
    batch = encode.random_batch(config.read_config(directory)[0], 3, 40)
    model = model_directory.load(directory, "classification").eval()
    with torch.no_grad():
        plain = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    engine = infer_cpu.load(directory, "fp32")
    assert torch.allclose(engine(batch), plain, atol=1e-6)
    assert engine.memory_bytes == 4 * network.count_parameters(model)
    int8 = infer_cpu.load(directory, "int8", say=silent)
    assert not torch.allclose(int8(batch), plain, atol=1e-6)
    layers = [layer for _, layer in network.linears(model)]             # int8: a byte a weight, and one scale a row
    layers += [model.encoder.word, model.encoder.position, model.encoder.token_type]
    saved = sum(3 * layer.weight.numel() - 4 * len(layer.weight) for layer in layers)
    assert int8.memory_bytes == engine.memory_bytes - saved and int8.disk_bytes < engine.disk_bytes


def test_packed_file_alone_is_enough(directories, tmp_path):
    for name in ("config.json", "int8.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((directories["blocks"] / name).read_bytes())
    batch = encode.random_batch(config.read_config(tmp_path)[0], 2, 20)
    said = []
    engine = infer_cpu.load(tmp_path, say=said.append)
    assert engine.name in ("int8", "sparse", "native", "tiles") and f"engine {engine.name}" in said[-1]
    assert torch.isfinite(engine(batch)).all()
    assert torch.allclose(engine(batch), infer_cpu.load(directories["blocks"], "int8", say=silent)(batch), atol=1e-2)


def test_engines_that_a_model_does_not_have(directories):
    for engine in ("int8", "sparse", "native"):
        with pytest.raises(InputError, match="python train.py --stage quantize"):
            infer_cpu.load(directories["plain"], engine)
    with pytest.raises(InputError, match="--engine int8"):
        infer_cpu.load(directories["dense"], "sparse", say=silent)
    said = []
    assert infer_cpu.load(directories["plain"], say=said.append).name == "fp32" and "not quantized" in said[0]
    assert infer_cpu.load(directories["dense"], say=silent).name in ("int8", "native", "tiles")


def test_a_saturating_cpu_is_warned_about(directories, monkeypatch, world, tmp_path):
    write_model(tmp_path, world, "sst2", bits=8, steps=2)
    monkeypatch.setattr(infer_cpu, "saturates", lambda: True)
    said = []
    infer_cpu.load(tmp_path, "int8", say=said.append)
    assert len(said) == 1 and said[0].startswith("warning") and "7" in said[0]


def test_answers_equal_one_text_at_a_time(directories, world):
    texts = ["the film was good", "a slow and dull story that nobody liked"]
    engine = infer_cpu.load(directories["blocks"], "int8", say=silent)
    answers = engine.answer(texts)
    assert [label in ("0", "1") and 0.5 <= probability <= 1 for label, probability in answers] == [True, True]
    data = TaskData("sst2", ".", load_tokenizer(directories["blocks"]), 48, splits=())
    logits = engine(data.collate(data.encode([texts[1]])))
    assert answers[1][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-3)
    squad = infer_cpu.load(directories["squad"], "sparse", say=silent)
    (span, score), = squad.answer(["who wrote it?"], contexts=["Ada wrote it."])
    assert span and span in "Ada wrote it." and isinstance(score, float)


def test_a_long_context_goes_through_in_pieces(directories, monkeypatch):
    """Its windows, that is; a span whose logits are no numbers is no answer."""
    squad, rows = infer_cpu.load(directories["squad"], "int8", say=silent), []
    context = " ".join(f"Ada wrote number {number} of them." for number in range(40))
    whole = squad.answer(["who wrote it?"], contexts=[context])
    monkeypatch.setattr(encode, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(infer_cpu.Engine, "__call__", lambda self, batch, call=infer_cpu.Engine.__call__: (
        rows.append(len(batch["input_ids"])) or call(self, batch)))
    (span, score), = squad.answer(["who wrote it?"], contexts=[context])
    assert span == whole[0][0] and score == pytest.approx(whole[0][1], abs=1e-4)
    assert len(rows) > 2 and set(rows) <= {1, 2}
    monkeypatch.setattr(infer_cpu.Engine, "__call__", lambda self, batch: 2 * [
        torch.full(batch["input_ids"].shape, torch.nan)])
    with pytest.raises(InputError, match="no number"):
        squad.answer(["who wrote it?"], contexts=[context])


# ---------------------------------------------------------------- the command

def run(*arguments):
    """infer_cpu.py in its own process."""
    return subprocess.run([sys.executable, str(ROOT / "infer_cpu.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def test_text_command(directories, tmp_path):
    done = run(directories["blocks"], "--text", "a good film", "--text", "a bad film", "--threads", 1,
               "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == ["a good film", "a bad film"]
    assert all(line[0] in ("0", "1") and 0.5 <= float(line[1]) <= 1 for line in lines)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["engine"] in ("int8", "sparse", "native", "tiles") and len(report["answers"]) == 2
    assert "Warning" not in done.stderr


def test_evaluate_command(directories, world, tmp_path):
    done = run(directories["unstructured"], "--evaluate", "--data", world[0], "--limit", 40, "--agreement",
               "--threads", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mnli, engine ") and "same prediction" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert 0 <= report["metrics"]["accuracy"] <= 1 and report["agreement"]["examples"] == 80        # two dev sets
    assert set(report["agreement"]["equal_predictions"]) == {"dev_matched", "dev_mismatched"}


def test_written_predictions_score_as_reported(directories, world, tmp_path, capsys):
    """The files alone, beside the dev files, give the metrics that were printed; and --split test gives the same lines
    for a file without labels."""
    folder, reports = world[0], {}
    for name, extra in (("blocks", ["--agreement"]), ("unstructured", []), ("squad", [])):
        infer_cpu.main([str(directories[name]), "--evaluate", "--data", str(folder), "--limit", "60", "--engine",
                        "int8", "--predictions", str(tmp_path / "new" / name), "--json", str(tmp_path / "out.json"),
                        *extra])
        reports[name] = json.loads((tmp_path / "out.json").read_text())["metrics"]
    written = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.*")}
    assert written == {"blocks/SST-2.tsv", "unstructured/MNLI-m.tsv", "unstructured/MNLI-mm.tsv",
                       "squad/predictions.json"}
    for file, dev, report in (("blocks/SST-2.tsv", "SST-2/dev.tsv", reports["blocks"]["accuracy"]),
                              ("unstructured/MNLI-m.tsv", "MNLI/dev_matched.tsv", reports["unstructured"]["accuracy"]),
                              ("unstructured/MNLI-mm.tsv", "MNLI/dev_mismatched.tsv",
                               reports["unstructured"]["accuracy_mismatched"])):
        lines = (tmp_path / "new" / file).read_text().splitlines()
        truth = [line.split("\t")[-1] for line in (folder / dev).read_text().splitlines()[1:61]]
        assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [*map(str, range(60))]
        assert sum(line.split("\t")[1] == label for line, label in zip(lines[1:], truth)) / 60 == report
    answers = json.loads((tmp_path / "new" / "squad" / "predictions.json").read_text())
    truth = {question.identifier: [text for text, _ in question.answers]
             for question in read_questions(folder / "SQuAD" / "dev-v1.1.json")[:60]}
    assert answers.keys() == truth.keys() and squad_scores(answers, truth) == reports["squad"]
    (tmp_path / "SST-2").mkdir()
    rows = [line.rpartition("\t")[0] for line in (folder / "SST-2" / "dev.tsv").read_text().splitlines()]
    (tmp_path / "SST-2" / "test.tsv").write_text("index\t" + "\n".join(
        [rows[0], *(f"{number}\t{row}" for number, row in enumerate(rows[1:]))]) + "\n")
    capsys.readouterr()
    infer_cpu.main([str(directories["blocks"]), "--evaluate", "--data", str(tmp_path), "--limit", "60", "--split",
                    "test", "--engine", "int8", "--predictions", str(tmp_path / "test")])
    assert "no labels" in capsys.readouterr().out
    assert (tmp_path / "test" / "SST-2.tsv").read_text() == (tmp_path / "new" / "blocks" / "SST-2.tsv").read_text()


def test_benchmark_of_random_weights_command():
    done = run("--benchmark", "--random", "tiny", "--sparsity", 0.5, "--pattern", "2:4", "--batch-size", 1,
               "--max-len", 8, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "pattern 2:4" in done.stdout and "sparse" in done.stdout and "Warning" not in done.stderr


def test_benchmark_puts_every_engine_side_by_side(directories, tmp_path, capsys):
    infer_cpu.main([str(directories["blocks"]), "--benchmark", "--batch-size", "1,2", "--max-len", "16",
                    "--threads", "1", "--json", str(tmp_path / "out.json")])
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert set(report["unavailable"]) <= {"tiles"}
    assert [(row["engine"], row["batch_size"]) for row in report["rows"]] == [
        (engine, size) for size in (1, 2) for engine in infer_cpu.ENGINES if engine not in report["unavailable"]]
    assert all(row["ms"] > 0 and row["disk_mb"] > 0 and row["memory_mb"] > 0 for row in report["rows"])
    assert report["threads"] == 1 and torch.__version__ in printed and "1 threads" in printed
    infer_cpu.main([str(directories["plain"]), "--benchmark", "--batch-size", "1", "--max-len", "16"])
    assert "int8 is not available: " in capsys.readouterr().out


def test_gains_that_are_none_are_called_so():
    assert benchmark.verdicts({"fp32": 1.0, "int8": 0.5, "sparse": 0.3}) == []
    lines = benchmark.verdicts({"fp32": 1.0, "int8": 0.5, "sparse": 1.5})
    assert len(lines) == 2 and "sparse takes 1.50" in lines[0] and "3.00" in lines[1]
    assert benchmark.verdicts({"int8": 0.5}) == []


def bad_commands(directories, world, tmp_path):
    """(arguments, a word of the sentence) of every kind of mistake."""
    blocks, squad, folder = directories["blocks"], directories["squad"], world[0]
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((blocks / name).read_bytes())
    (broken / "int8.safetensors").write_bytes((blocks / "int8.safetensors").read_bytes()[:-7])
    return [
        ([], "one of the arguments"), (["--text", "x"], "MODEL_DIR"), ([blocks], "one of the arguments"),
        ([tmp_path / "nowhere", "--text", "x"], "nowhere"), ([tmp_path, "--text", "x"], "config.json"),
        ([broken, "--text", "x"], "int8.safetensors"), ([broken, "--benchmark"], "int8.safetensors"),
        ([blocks, "--text", "x", "--engine", "magic"], "invalid choice"),
        ([directories["plain"], "--text", "x", "--engine", "int8"], "--stage quantize"),
        ([directories["plain"], "--evaluate", "--agreement", "--data", folder], "--stage quantize"),
        ([blocks, "--text", "x", "--text-pair", "y"], "--text-pair"),
        ([directories["pairs"], "--text", "x"], "--text-pair"),
        ([blocks, "--text", "x", "--context", "y"], "--context"), ([squad, "--text", "x"], "--context"),
        ([blocks, "--text", "x", "--max-len", 4], "--max-len"),
        ([blocks, "--text", "x", "--max-len", 4000], "--max-len"),
        ([blocks, "--evaluate", "--data", tmp_path / "none"], "none"),
        ([blocks, "--evaluate", "--task", "squad"], "span model"),
        ([blocks, "--evaluate", "--task", "mnli", "--data", folder], "mnli"),
        ([blocks, "--text", "x", "--predictions", tmp_path], "--evaluate"),
        ([blocks, "--text", "x", "--batch-size", 7], "--batch-size goes with --benchmark"),
        ([blocks, "--text", "x", "--pattern", "1x4"], "--pattern goes with --benchmark or --size"),
        ([blocks, "--size", "--sparsity", 0.5], "go with --random"),
        ([blocks, "--benchmark", "--engine", "int8"], "--engine goes with --text or --embed or --evaluate or --size"),
        ([blocks, "--evaluate", "--split", "test"], "--predictions"),
        ([blocks, "--evaluate", "--data", folder, "--predictions", blocks / "config.json"], "--predictions"),
        ([squad, "--evaluate", "--data", folder, "--split", "test", "--predictions", tmp_path], "not published"),
        ([blocks, "--evaluate", "--data", folder, "--split", "test", "--predictions", tmp_path / "p"], "test.tsv"),
        ([blocks, "--text", "x", "--threads", 0], "--threads"), ([blocks, "--benchmark", "--batch-size", "1,x"], "x"),
        ([blocks, "--benchmark", "--max-len", 9999], "9999"), ([blocks, "--text", "x", "--json", tmp_path], "--json"),
        ([blocks, "--text", "x", "--json", tmp_path / "no" / "x.json"], "--json"),
        ([blocks, "--benchmark", "--random", "tiny"], "--random"), (["--random", "tiny", "--text", "x"], "--random"),
        (["--benchmark", "--random", "huge"], "bert-base"), (["--benchmark", "--random", "tiny", "--sparsity", 2], "2"),
        (["--benchmark", "--random", "tiny", "--pattern", "oval"], "oval"),
        (["--benchmark", "--random", "tiny", "--pattern", "5x7"], "5x7"),
    ]


def test_bad_input_is_one_sentence_and_exit_code_2(directories, world, tmp_path, capsys):
    for arguments, word in bad_commands(directories, world, tmp_path):
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and word in message.splitlines()[-1], (arguments, message)
        assert len([line for line in message.splitlines() if "infer_cpu.py: " in line or "error: " in line]) == 1
    done = run(tmp_path / "nowhere", "--text", "x")                     # and once through a real process
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
