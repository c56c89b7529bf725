"""Encoders as sentence encoders: vectors against transformers and sentence-transformers, files and streams of lines,
retrieval by brute force, and an encoder pruned and rounded without a task."""
import io
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, fails
from transformers import AutoModel, AutoTokenizer

import infer_cpu
import train
from data import embed, encode
from formats import model_directory, sentence
from formats.safetensors import read_safetensors

TEXTS = ["The film was superb.", "", "Who bought the sofa?", "the car was clean, so it shone. " * 30, "A dull novel."]


@pytest.fixture(scope="session")
def encoder(chain, tmp_path_factory):
    """The chain's pre-trained model as a bare encoder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder") / "dense"
    shutil.copytree(chain / "pretrain", folder)
    model = model_directory.load(chain / "pretrain", "encoder", say=lambda line: None)
    model_directory.save(model, folder)
    return folder


@pytest.fixture
def folder(encoder, tmp_path):
    """A copy that may be changed, with what sentence-transformers puts beside it."""
    shutil.copytree(encoder, tmp_path / "model")
    sentence.write_sentence(sentence.Sentence("mean", True, 40), 128, tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))


def by_transformers(folder, text, pooling, normalize, length):
    """One vector, of one text alone, by transformers and numpy."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].double().numpy()
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0)}[pooling]
    return vector / np.linalg.norm(vector) if normalize else vector


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_transformers(pooling, normalize, folder):
    shutil.rmtree(folder / "2_Normalize")
    sentence.write_sentence(sentence.Sentence(pooling, normalize, 40), 128, folder)
    found = infer_cpu.load(folder, say=lambda line: None).embed(TEXTS)
    assert found.dtype == np.float32 and found.shape == (5, 128)
    for row, text in zip(found, TEXTS):
        assert row == pytest.approx(by_transformers(folder, text, pooling, normalize, 40), abs=2e-5)


def test_vectors_and_files_are_those_of_sentence_transformers(folder, tmp_path):
    """In the layout that we write, in the one that it writes itself, and from a model that we wrote out again."""
    import sentence_transformers as package
    theirs = package.SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(TEXTS)
    assert theirs.max_seq_length == 40
    theirs.save(str(tmp_path / "theirs"))
    model = model_directory.load(tmp_path / "theirs", "encoder", say=lambda line: None)
    assert model.sentence == sentence.Sentence("mean", True, 40)
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "1_Pooling")
    model_directory.save(model, tmp_path / "again")
    for path in (folder, tmp_path / "theirs", tmp_path / "again"):
        assert infer_cpu.load(path, say=lambda line: None).embed(TEXTS) == pytest.approx(expected, abs=2e-5)
    assert package.SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS) == pytest.approx(
        expected, abs=2e-5)


def test_what_is_written_is_read_again(tmp_path):
    for pooling in sentence.POOLINGS:
        for normalize in (False, True):
            written = sentence.Sentence(pooling, normalize, 77)
            sentence.write_sentence(written, 8, tmp_path)
            assert sentence.read_sentence(tmp_path) == written
    (tmp_path / "modules.json").unlink()
    assert sentence.read_sentence(tmp_path) is None


@pytest.mark.parametrize("file, values, words", [
    ("modules.json", None, "no list of modules"),
    ("modules.json", [["Transformer", ""], ["Dense", "2_Dense"]], "Transformer, Dense"),
    ("modules.json", [["Transformer", "0_Transformer"]], "0_Transformer"),
    ("modules.json", [["Transformer", ""], ["Pooling", 1]], "no list of modules"),
    ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pooling"),
    ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}, "query: "),
    ("sentence_bert_config.json", {"do_lower_case": True}, "letters"),
    ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length"),
])
def test_what_we_do_not_have_is_refused_by_name(file, values, words, folder, capsys):
    path = folder / file
    if isinstance(values, list):
        path.write_text(json.dumps([{"type": f"a.b.{kind}", "path": place} for kind, place in values]))
    elif values is None:
        path.write_text("[1]")
    else:
        change(path, **values)
    with pytest.raises(SystemExit) as stopped:
        infer_cpu.main([str(folder), "--embed", str(folder / "vocab.txt")])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_lengths_are_the_models(folder):
    long = TEXTS[3]
    engine = infer_cpu.load(folder, say=lambda line: None)
    assert not np.allclose(engine.embed([long]), engine.embed([long], max_len=12), atol=1e-3)
    change(folder / "sentence_bert_config.json", max_seq_length=5000)          # the model has 128 positions
    assert np.isfinite(infer_cpu.load(folder, say=lambda line: None).embed([long * 20])).all()


def test_order_and_batches_do_not_matter(folder, monkeypatch):
    engine = infer_cpu.load(folder, say=lambda line: None)
    texts = [" ".join(["sofa"] * (7 * i % 31)) for i in range(60)]
    alone = np.concatenate([engine.embed([text]) for text in texts])
    for tokens in (8, 100, 2048):
        monkeypatch.setattr(embed, "TOKENS_AT_ONCE", tokens)
        assert engine.embed(texts) == pytest.approx(alone, abs=1e-5)
    assert engine.embed([]).shape == (0, 128)


def embedded(arguments, capsysbinary):
    infer_cpu.main([str(argument) for argument in arguments])
    return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]


def test_lines_become_rows(folder, tmp_path, capsysbinary, monkeypatch):
    """From a file and a stream, to both formats, in pieces that are shorter than the file."""
    monkeypatch.setattr(embed, "LINES_AT_ONCE", 2)
    expected = infer_cpu.load(folder, say=lambda line: None).embed(TEXTS)
    content = "\r\n".join(TEXTS).encode()
    (tmp_path / "lines.txt").write_bytes(content)
    assert embedded([folder, "--embed", tmp_path / "lines.txt"], capsysbinary) == pytest.approx(expected, abs=1e-5)
    for name in ("v.npy", "v.jsonl"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content + b"\n")))
        assert embedded([folder, "--embed", "-", "--to", tmp_path / name], capsysbinary) == []
    assert np.load(tmp_path / "v.npy") == pytest.approx(expected, abs=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert rows == pytest.approx(expected, abs=1e-5)
    (tmp_path / "lines.txt").write_bytes(b"")
    embedded([folder, "--embed", tmp_path / "lines.txt", "--to", tmp_path / "none.npy"], capsysbinary)
    assert np.load(tmp_path / "none.npy").shape == (0, 128)


def test_bad_input_leaves_nothing_behind(folder, tmp_path, capsys, monkeypatch, chain):
    monkeypatch.setattr(embed, "LINES_AT_ONCE", 1)
    (tmp_path / "bad.txt").write_bytes(b"good\nb\xffd\n")
    for arguments, words in (
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "v.npy"], "line 2 of"),
            ([folder, "--embed", tmp_path / "nothing.txt", "--to", tmp_path / "v.npy"], "No such file"),
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "none" / "v.npy"], "--to"),
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "v.txt"], ".npy or .jsonl"),
            ([folder, "--text", "a", "--to", tmp_path / "v.npy"], "--to goes with --embed"),
            ([folder, "--evaluate", "--against", folder], "--task retrieval"),
            ([folder, "--evaluate", "--task", "retrieval", "--agreement"], "--against DIR"),
            ([folder, "--text", "a"], "--embed FILE"),
            ([chain / "sst2/teacher", "--embed", tmp_path / "bad.txt"], "has a head for a task"),
            ([folder, "--evaluate", "--task", "retrieval", "--data", tmp_path], "SQuAD")):
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and words in printed and "Traceback" not in printed, arguments
    assert {path.name for path in tmp_path.iterdir()} == {"bad.txt", "model"}


def test_retrieval_by_brute_force(folder, world, tmp_path, capsys):
    dense = infer_cpu.load(folder, say=lambda line: None)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    sentence.write_sentence(sentence.Sentence("cls", True, 40), 128, other)
    infer_cpu.main([str(folder), "--evaluate", "--task", "retrieval", "--data", str(world), "--against", str(other),
                    "--json", str(tmp_path / "r.json"), "--limit", "9"])
    paragraphs, pairs = [], []
    for article in json.loads((world / "SQuAD" / "dev-v1.1.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            paragraphs.append(paragraph["context"])
            pairs += [(entry["question"], paragraph["context"]) for entry in paragraph["qas"]]
    paragraphs, pairs = list(dict.fromkeys(paragraphs)), pairs[:9]
    found, hits = dense.embed(paragraphs), {1: 0, 10: 0}
    for question, context in pairs:
        order = np.argsort(-(found @ dense.embed([question])[0]))
        place = [paragraphs[i] for i in order].index(context)
        hits = {k: hits[k] + (place < k) for k in hits}
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics["recall_at_1"] == hits[1] / 9 and metrics["recall_at_10"] == hits[10] / 9
    texts = [question for question, _ in pairs] + paragraphs
    cosines = (dense.embed(texts) * infer_cpu.load(other, say=lambda line: None).embed(texts)).sum(1)
    assert metrics["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert metrics["cosine_worst_percentile"] == pytest.approx(np.quantile(cosines, 0.01), abs=1e-5)


class FakeQuant:
    """An engine that rounds as training does."""

    def __init__(self, directory, model):
        self.directory, self.model, self.tokenizer = directory, model, None

    def __call__(self, batch):
        return self.model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])


@pytest.fixture(scope="module")
def rounded(encoder, world, tmp_path_factory):
    """Pruned and rounded from raw text, by the commands that README has."""
    out = tmp_path_factory.mktemp("rounded")
    sentence.write_sentence(sentence.Sentence("mean", True, 40), 128, encoder)
    common = [*SHORT, "--out", str(out), "--steps", "12", "--kd-target", "hidden", "--corpus",
              str(world / "corpus.txt"), "--pattern", "1x4"]
    train.main(["--stage", "prune", *common, "--init", str(encoder)])
    train.main(["--stage", "quantize", *common, "--teacher", str(encoder)])
    train.main(["--stage", "quantize", *common, "--init", str(encoder), "--teacher", str(encoder), "--sparsity", "0"])
    return out


def test_pruned_and_rounded_without_a_task(rounded):
    """The INT8 file is an encoder with the same zeros, its vectors those of fake quantization, in every engine."""
    for name in ("int8-1x4-0.85", "int8-dense"):
        directory = rounded / name
        assert json.loads((directory / "metrics.json").read_text())["metrics"].keys() == {
            "validation_hidden_loss", "validation_pooled_loss"}
        tensors, metadata = read_safetensors(directory / "int8.safetensors")
        assert metadata["activation_bits"] in ("7", "8") and any("pooler" in key for key in tensors)
        model = model_directory.load(directory, "encoder", say=lambda line: None)
        assert model.sentence == sentence.Sentence("mean", True, 40)
        sparsity = json.loads((directory / "metrics.json").read_text())["sparsity"]
        assert sparsity == pytest.approx(0.0 if name == "int8-dense" else 0.85, abs=0.01)
        train.quant.prepare(model.eval(), int(metadata["activation_bits"]), "row")
        with torch.no_grad():
            expected = embed.Embedder(FakeQuant(directory, model))(TEXTS)
        for engine in ("int8", "native", *(("sparse",) if name != "int8-dense" else ())):
            found = infer_cpu.load(directory, engine, say=lambda line: None).embed(TEXTS)
            assert (found * expected).sum(1).min() > 0.9999, engine


def test_quantize_without_a_task_says_what_it_needs(encoder, tmp_path, world, capsys):
    common = [*SHORT, "--out", tmp_path, "--stage", "quantize"]
    assert "--kd-target hidden" in fails(capsys, *common)
    assert "needs --teacher" in fails(capsys, *common, "--kd-target", "hidden")
    assert "prune-unstructured-0.85 has no finished run" in fails(
        capsys, *common, "--kd-target", "hidden", "--teacher", encoder)
    assert "--init" in fails(capsys, *common, "--kd-target", "hidden", "--teacher", encoder, "--sparsity", "0")


def test_the_tokenizer_is_read_once(folder, chain, monkeypatch):
    """Also where texts come one by one."""
    read = []
    monkeypatch.setattr(encode, "tokenizer_of", lambda path, real=encode.tokenizer_of: read.append(path) or real(path))
    engine = infer_cpu.load(folder, say=lambda line: None)
    assert np.array_equal(engine.embed(TEXTS[:1]), engine.embed(TEXTS[:1])) and read == [folder]
    classifier = infer_cpu.load(chain / "sst2/teacher", say=lambda line: None)
    assert classifier.answer(TEXTS[:1]) == classifier.answer(TEXTS[:1]) and len(read) == 2
