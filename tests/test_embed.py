"""Encoders as sentence encoders: vectors against transformers and sentence-transformers, files and streams of lines,
retrieval by brute force, and an encoder pruned and rounded without a task."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, SHORT, fails
from transformers import AutoModel, AutoTokenizer

import infer_cpu
import model as network
import train
from bench import measure_encoder
from data import embed, encode
from data.metrics import spearman
from formats import model_directory, sentence
from formats.safetensors import read_safetensors
from model import InputError

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
            for similarity in sentence.SIMILARITIES:
                written = sentence.Sentence(pooling, normalize, 77, similarity)
                sentence.write_sentence(written, 8, tmp_path)
                assert sentence.read_sentence(tmp_path) == written
    (tmp_path / "modules.json").unlink()
    assert sentence.read_sentence(tmp_path) is None


def test_an_encoder_that_says_nothing_is_taken_as_sentence_transformers_takes_it(folder):
    """The mean, of as many tokens as its tokenizer says."""
    import sentence_transformers as package
    for path in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / path).unlink()
    change(folder / "tokenizer_config.json", model_max_length=9)
    expected = package.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert infer_cpu.load(folder, say=lambda line: None).embed(TEXTS) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("file, values, words", [
    ("modules.json", [[1, ""], ["Pooling", "1_Pooling"]], "no list of modules"),
    ("modules.json", None, "no list of modules"),
    ("modules.json", [["Transformer", ""], ["Dense", "2_Dense"]], "Transformer, Dense"),
    ("modules.json", [["Transformer", "0_Transformer"], ["Pooling", "1_Pooling"]], "lies in 0_Transformer"),
    ("modules.json", [["Transformer", ""], ["Pooling", 1]], "no list of modules"),
    ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pooling"),
    ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}, "query: "),
    ("sentence_bert_config.json", {"do_lower_case": True}, "small letters"),
    ("modules.json", [["Transformer", ""]], "and perhaps a Normalize"),
    ("modules.json", [["mine.Transformer", ""], ["Pooling", "1_Pooling"]], "mine.Transformer"),
    ("config_sentence_transformers.json", {"truncate_dim": 64}, "of 64 numbers"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "euclidean"),
    ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length"),
])
def test_what_we_do_not_have_is_refused_by_name(file, values, words, folder, capsys):
    path = folder / file
    if isinstance(values, list):
        path.write_text(json.dumps([{"type": kind if "." in str(kind) or kind == 1 else f"sentence_transformers.models.{kind}",
                                     "path": place} for kind, place in values]))
        if "0_Transformer" in str(values):
            (folder / "0_Transformer").mkdir()
            (folder / "config.json").rename(folder / "0_Transformer" / "config.json")
    elif file == "sentence_bert_config.json" and "do_lower_case" in values:
        change(path, **values)
        change(folder / "tokenizer_config.json", do_lower_case=False)
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
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    change(folder / "tokenizer_config.json", model_max_length=20)
    assert sentence.read_sentence(folder).max_length == 20
    (folder / "sentence_bert_config.json").rename(folder / "sentence_distilbert_config.json")      # its older name
    change(folder / "sentence_distilbert_config.json", max_seq_length=30)
    assert sentence.read_sentence(folder).max_length == 30


def test_order_and_batches_do_not_matter(folder, monkeypatch):
    engine = infer_cpu.load(folder, say=lambda line: None)
    texts = [" ".join(["sofa"] * (7 * i % 31)) for i in range(60)]
    alone = np.concatenate([engine.embed([text]) for text in texts])
    for tokens in (8, 100, 2048):
        monkeypatch.setattr(embed, "TOKENS_AT_ONCE", tokens)
        assert engine.embed(texts) == pytest.approx(alone, abs=1e-5)
    assert engine.embed([]).shape == (0, 128)
    monkeypatch.setattr(embed, "LINES_AT_ONCE", 7)
    assert engine.embed(text for text in texts) == pytest.approx(alone, abs=1e-5)


def test_what_is_no_list_of_texts_is_refused(folder, chain):
    engine, classifier = (infer_cpu.load(path, say=lambda line: None) for path in (folder, chain / "sst2/teacher"))
    for texts, words in (("a film", "is one text"), ([1, None], "no str")):
        with pytest.raises(InputError, match=words):
            engine.embed(texts)
        with pytest.raises(InputError, match=words):
            classifier.answer(texts)
    with pytest.raises(InputError, match="2 texts and 3 pairs"):
        classifier.answer(["a", "b"], ["c", "d", "e"])


def embedded(arguments, capsysbinary):
    infer_cpu.main([str(argument) for argument in arguments])
    return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]


def test_lines_become_rows(folder, tmp_path, capsysbinary, monkeypatch):
    """From a file and a stream, to both formats, in pieces that are shorter than the file."""
    monkeypatch.setattr(embed, "LINES_AT_ONCE", 2)
    expected = infer_cpu.load(folder, say=lambda line: None).embed(TEXTS)
    content = "\r\n".join(TEXTS).encode()
    (tmp_path / "long.txt").write_bytes(content)
    monkeypatch.setattr(embed, "BYTES_AT_ONCE", 30)
    assert [len(lines) for lines in embed.lines_of(tmp_path / "long.txt")] == [2, 2, 1]
    monkeypatch.setattr(embed, "BYTES_AT_ONCE", 10)
    assert [len(lines) for lines in embed.lines_of(tmp_path / "long.txt")] == [1, 2, 1, 1]
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
    (tmp_path / "endless.txt").write_bytes(b"a" * 50)
    monkeypatch.setattr(embed, "LONGEST_LINE", 50)
    (tmp_path / "numbers" / "STS-B").mkdir(parents=True)
    (tmp_path / "numbers" / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\tmuch\n")
    for arguments, words in (
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "v.npy"], "line 2 of"),
            ([folder, "--embed", tmp_path / "nothing.txt", "--to", tmp_path / "v.npy"], "No such file"),
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "none" / "v.npy"], "--to"),
            ([folder, "--embed", tmp_path / "bad.txt", "--to", tmp_path / "v.txt"], ".npy or .jsonl"),
            ([folder, "--text", "a", "--to", tmp_path / "v.npy"], "--to goes with --embed, not with --text"),
            ([folder, "--embed", tmp_path / "bad.txt", "--limit", "3"], "--limit goes with --evaluate"),
            ([folder, "--embed", tmp_path / "bad.txt", "--text-pair", "a"], "--text-pair goes with --text"),
            ([folder, "--embed", ""], "--embed :"),
            ([folder, "--embed", tmp_path / "endless.txt", "--to", tmp_path / "v.npy"], "line 1 of"),
            ([folder, "--evaluate", "--task", "stsb", "--data", tmp_path], "STS-B"),
            ([folder, "--evaluate", "--task", "stsb", "--data", tmp_path / "numbers"], "no number"),
            ([folder, "--evaluate", "--against", folder], "--task retrieval"),
            ([folder, "--evaluate", "--task", "retrieval", "--agreement"], "--against DIR"),
            ([folder, "--text", "a"], "--embed FILE"),
            ([chain / "sst2/teacher", "--embed", tmp_path / "bad.txt"], "has a head for a task"),
            ([folder, "--evaluate", "--task", "retrieval", "--data", tmp_path], "SQuAD")):
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and words in printed and "Traceback" not in printed, arguments
    assert {path.name for path in tmp_path.iterdir()} == {"bad.txt", "endless.txt", "numbers", "model"}


def test_stopped_it_leaves_nothing_behind(folder, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(embed.Embedder, "fill", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    (tmp_path / "lines.txt").write_text("a\nb\n")
    try:
        with pytest.raises(SystemExit) as stopped:
            infer_cpu.main([str(folder), "--embed", str(tmp_path / "lines.txt"), "--to", str(tmp_path / "v.npy")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 130 and "stopped" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"lines.txt", "model"}


def test_a_reader_may_have_enough(folder, tmp_path):
    (tmp_path / "lines.txt").write_text("a film\n" * 3000)
    command = f"{sys.executable} {ROOT / 'infer_cpu.py'} {folder} --embed {tmp_path / 'lines.txt'} | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(json.loads(found.stdout)) == 128 and found.returncode == 0
    assert "Broken pipe" not in found.stderr and "Traceback" not in found.stderr


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


def test_vectors_that_are_all_alike_find_nothing(world):
    texts, measure = embed.retrieval(world, 9)
    assert measure(torch.ones(len(texts), 4)) == {"recall_at_1": 0.0, "recall_at_10": 1.0}       # of twelve paragraphs
    own = torch.eye(len(texts))
    own[:9] = own[[texts.index(paragraph) for paragraph in contexts_of(world)[:9]]]
    assert measure(own) == {"recall_at_1": 1.0, "recall_at_10": 1.0}


def contexts_of(world):
    """The paragraph of every question."""
    return [paragraph["context"] for article in json.loads((world / "SQuAD" / "dev-v1.1.json").read_text())["data"]
            for paragraph in article["paragraphs"] for _ in paragraph["qas"]]


def test_likeness_of_sentences(folder, tmp_path, capsys):
    """STS-B's published columns; the rank correlation by scipy; another encoder beside ours, of another size refused."""
    pairs = [("The film was superb.", "A superb film.", "4.5"), ("The sofa was red.", "Who bought the car?", "0.0"),
             ("A dull novel.", "The song was dull.", "3.0"), ("The sofa was red.", "The couch was red.", "4.5")]
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "dev.tsv").write_text("index\tgenre\tsentence1\tsentence2\tscore\n" + "".join(
        f"{number}\tx\t" + "\t".join(pair) + "\n" for number, pair in enumerate(pairs)))
    common = ["--evaluate", "--task", "stsb", "--data", str(tmp_path)]
    infer_cpu.main([str(folder), *common, "--json", str(tmp_path / "s.json"), "--against", str(folder)])
    engine = infer_cpu.load(folder, say=lambda line: None)
    cosines = (engine.embed([pair[0] for pair in pairs]) * engine.embed([pair[1] for pair in pairs])).sum(1)
    expected = scipy.stats.spearmanr(cosines, [float(pair[2]) for pair in pairs]).statistic
    metrics = json.loads((tmp_path / "s.json").read_text())["metrics"]
    assert metrics["spearman"] == metrics["against_spearman"] == pytest.approx(expected)
    assert metrics["cosine_mean"] == pytest.approx(1, abs=1e-5)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0.0 and spearman([1, 1, 2, 9], [3, 4, 5, 6]) == pytest.approx(
        scipy.stats.spearmanr([1, 1, 2, 9], [3, 4, 5, 6]).statistic)
    config = replace(engine.model.config, hidden_size=64)
    model_directory.save(network.build(config, "encoder"), tmp_path / "small")
    shutil.copy(folder / "tokenizer.json", tmp_path / "small")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        infer_cpu.main([str(folder), *common, "--against", str(tmp_path / "small")])
    assert "its vectors have 64 numbers" in capsys.readouterr().err


def test_cross_encoders_answer_as_theirs(encoder, tmp_path, capsys):
    """One logit for a question and a document: its sigmoid, of documents as long as the model takes."""
    import sentence_transformers as package
    config = model_directory.load(encoder, "encoder", say=lambda line: None).config
    torch.manual_seed(3)
    model = network.build(replace(config, max_position_embeddings=300), "classification", 1)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model_directory.save(model, tmp_path / "ranker", ["relevant"])
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, tmp_path / "ranker")
    queries, documents = ["Who bought the sofa?"] * 3, ["A dull novel.", "the car was clean. " * 40 + "Clara bought it.",
                                                        "the car was clean. " * 40]
    theirs = package.CrossEncoder(str(tmp_path / "ranker"), device="cpu", max_length=300).predict(
        list(zip(queries, documents)))
    found = infer_cpu.load(tmp_path / "ranker", say=lambda line: None).answer(queries, documents)
    assert [value for _, value in found] == pytest.approx(list(theirs), abs=1e-5) and theirs[1] != theirs[2]
    infer_cpu.main([str(tmp_path / "ranker"), *(word for pair in zip(queries, documents) for word in (
        "--text", pair[0], "--text-pair", pair[1]))])
    assert capsys.readouterr().out.splitlines()[0].split("\t") == ["relevant", f"{theirs[0]:.4f}", queries[0],
                                                                   documents[0]]


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
            "validation_hidden_loss", "validation_pooled_loss", "validation_vector_loss"}
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


def test_the_evidence_for_an_encoder(encoder, world, tmp_path, monkeypatch):
    """Made, judged, timed and embedded in a small form; and then only what is not there yet."""
    sentence.write_sentence(sentence.Sentence("mean", True, 40), 128, encoder)
    arguments = ["--init", str(encoder), "--corpus", str(world / "corpus.txt"), "--data", str(world), "--out",
                 str(tmp_path / "out"), "--json", str(tmp_path / "encoder.json"), "--patterns", "1x4", "--steps", "12",
                 "--rounding-steps", "6", "--batch-size", "16", "--lr", "2e-3", "--threads", "1",
                 "--lines", "200", "--texts", "6", "--rounds", "1"]
    programs = {"train.py": train, "infer_cpu.py": infer_cpu}             # without the seconds that importing torch takes
    monkeypatch.setattr(measure_encoder, "typed", lambda program, *typed: programs[program].main([*map(str, typed)]))
    measure_encoder.main(arguments)
    found = json.loads((tmp_path / "encoder.json").read_text())
    model = found["models"]["int8-1x4-0.8"]
    assert model["retrieval"].keys() == {
        "recall_at_1", "recall_at_10", "against_recall_at_1", "against_recall_at_10", "cosine_mean",
        "cosine_worst_percentile"} and model["runs"]["prune"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    pruning = model["runs"]["prune"]["settings"]
    assert (pruning["steps"], pruning["batch_size"], pruning["lr"]) == (12, 16, 2e-3)
    assert model["runs"]["quantize"]["settings"]["kd_target"] == "hidden" and found["git_commit"]
    assert found["command"].startswith("python -m bench.measure_encoder --init MODEL_DIR --corpus TEXT_DIR")
    assert str(tmp_path) not in json.dumps(found)
    dense, ours = (found["speeds"]["contenders"][name] for name in ("dense, fp32 engine", "native, 1x4-0.8"))
    assert dense["cosine_to_dense"] == pytest.approx(1, abs=1e-4) and 0.3 < ours["cosine_to_dense"] < 0.9999
    assert len(ours["texts_a_second"]) == 2 and min(ours["texts_a_second"]) > 0
    assert [entry["lines"] for entry in found["memory"]] == [2, 200] and found["memory"][1]["peak_mb"] > 50
    assert not list((tmp_path / "out").glob("lines.*"))
    monkeypatch.setattr(measure_encoder, "speeds", lambda *_: {})
    monkeypatch.setattr(measure_encoder, "embedded", lambda *_: {})
    made = (tmp_path / "out" / "int8-1x4-0.8" / "metrics.json").stat().st_mtime_ns
    measure_encoder.main(arguments)
    assert (tmp_path / "out" / "int8-1x4-0.8" / "metrics.json").stat().st_mtime_ns == made


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
