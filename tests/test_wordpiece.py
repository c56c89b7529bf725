"""Tokenizers that others made, whose ids must be those of transformers or be refused; and text that teaches nothing, or
that no encoding holds."""
import json

import pytest
import transformers
from conftest import SHORT, fails
from test_elsewhere import BERT, TEXTS, VOCABULARY, answers, edit, error_of, foreign
from tokenizers import AddedToken

import infer_cpu
import train
from data import text
from data.tasks import TaskData
from data.wordpiece import SPECIAL_TOKENS, bert_tokenizer, load_tokenizer, save_tokenizer, vocabulary_rows

# ---------------------------------------------------------------- tokenizer files

ODD = ["the <e1> film", "Ada in Paris, café", "École 中文 [E1] the [MASK] film", "[e1] <E1> x", " <e1>  the ", "[Cls] a"]
CASED = [*VOCABULARY, "Ada", "Paris", "é", "##é", "café", "cafe", "中", "文", "École", "ecole", "E"]


def write_tokenizer(folder, words=CASED, stored=None, json_options=None, **files):
    """vocab.txt, or with json_options tokenizer.json, to which `stored` tokens are added, and JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    edit(folder / "config.json", model_type="bert")
    if json_options is None:
        (folder / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    else:
        tokenizer = bert_tokenizer({word: number for number, word in enumerate(words)}, **json_options)
        tokenizer.add_tokens(stored or [])
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(content, number=len(CASED), **flags):
    return {str(number): {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
                          "normalized": False, "special": False, **flags}}


SPECIAL = {str(i): {"content": token, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
                    "special": True} for i, token in enumerate(SPECIAL_TOKENS)}
TOKENIZERS = {
    "vocab.txt alone says nothing of case": dict(words=VOCABULARY, tokenizer_config=BERT),
    "the options win over tokenizer.json": dict(json_options={"lowercase": True},
                                                tokenizer_config={**BERT, "do_lower_case": False}),
    "so do their defaults": dict(json_options={"lowercase": False, "strip_accents": False}, tokenizer_config=BERT),
    "accents": dict(json_options={}, tokenizer_config={**BERT, "do_lower_case": True, "strip_accents": False}),
    "Chinese": dict(json_options={}, tokenizer_config={**BERT, "tokenize_chinese_chars": False}),
    "DistilBERT, fast": dict(json_options={}, tokenizer_config={"tokenizer_class": "DistilBertTokenizerFast"}),
    "tokenizer.json as it is": dict(json_options={"lowercase": False}, stored=["<e1>"],
                                    tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}),
    "as it is, and one token more": dict(json_options={}, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["[E1]"]}),
    "added_tokens.json": dict(tokenizer_config=BERT, added_tokens={"<e1>": len(CASED), "[E1]": len(CASED) + 1}),
    "special ones": dict(tokenizer_config=BERT, added_tokens={"<e1>": len(CASED)},
                         special_tokens_map={"extra_special_tokens": ["<e1>"]}),
    "special_tokens_map.json": dict(tokenizer_config=BERT, special_tokens_map={"additional_special_tokens": ["[E1]"]}),
    "tokens of tokenizer.json": dict(json_options={}, stored=["<e1>"], tokenizer_config=BERT),
    "added_tokens_decoder": dict(tokenizer_config={**BERT, "added_tokens_decoder": {**SPECIAL, **added("<e1>")}}),
    "its flags": dict(tokenizer_config={**BERT, "added_tokens_decoder": {
        **SPECIAL, **added("<e1>", lstrip=True, rstrip=True, normalized=True)}}),
    "it alone counts": dict(tokenizer_config={**BERT, "added_tokens_decoder": SPECIAL}, added_tokens={"<e1>": 400}),
    "a token with a name": dict(tokenizer_config={**BERT, "bos_token": "[E1]"}),
    "a line twice": dict(words=[*CASED[:60], "film", *CASED[60:]], tokenizer_config=BERT),
    "blank lines": dict(words=[*CASED, "", ""], tokenizer_config=BERT),
    "nothing said beside tokenizer.json": dict(json_options={}, added_tokens={"<e1>": len(CASED)}),
    "Windows": dict(words=[word + "\r" for word in CASED], tokenizer_config=BERT),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_are_those_of_transformers(name, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", **TOKENIZERS[name])
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in [*TEXTS, *ODD]]
    assert [ours.encode(text, add_special_tokens=False).ids for text in [*TEXTS, *ODD]] == expected
    save_tokenizer(ours, tmp_path / "saved")                # and they survive being written
    for file in ("nothing", "tokenizer.json"):
        (tmp_path / "saved" / file).unlink(missing_ok=True)
        again = load_tokenizer(tmp_path / "saved")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert [again.encode(text, add_special_tokens=False).ids for text in [*TEXTS, *ODD]] == expected, file
        assert [theirs(text, add_special_tokens=False)["input_ids"] for text in [*TEXTS, *ODD]] == expected, file


@pytest.mark.parametrize("options, word", [
    (dict(tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"}), "BertJapaneseTokenizer"),
    (dict(tokenizer_config={}, config={"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"}),
     "BertJapaneseTokenizer"),
    (dict(tokenizer_config={"tokenizer_class": "RobertaTokenizerFast"}, json_options={}), "RobertaTokenizerFast"),
    (dict(tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}), "PreTrainedTokenizerFast"),
    (dict(tokenizer_config={**BERT, "cls_token": "<s>"}), "'<s>'"),
    (dict(tokenizer_config=BERT, added_tokens={"<e1>": len(CASED) + 3}), f"{len(CASED) + 3}"),
    (dict(tokenizer_config=BERT, added_tokens={"<e1>": None}), "add"), (dict(added_tokens=[]), "JSON object"),
    (dict(tokenizer_config={**BERT, "do_lower_case": "yes"}), "do_lower_case"),
    (dict(tokenizer_config={**BERT, "truncation_side": "left"}), "truncation_side = 'left'"),
    (dict(tokenizer_config={**BERT, "split_special_tokens": True}), "split_special_tokens"),
    (dict(tokenizer_config={**BERT, "added_tokens_decoder": {"7": {}}}), "content")])
def test_tokenizers_that_cannot_be_honoured_are_refused(options, word, tmp_path):
    message = error_of(load_tokenizer, write_tokenizer(tmp_path, **options))
    assert str(tmp_path) in message and word in message


def test_what_tokenizer_json_says_alone_has_to_be_berts(tmp_path):
    """Rows of another shape, and a vocabulary whose ids are the order of a list, are refused when they are read."""
    folder = write_tokenizer(tmp_path, json_options={}, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    load_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for wrong in (None, {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[SEP]", 3]}):
        edited = {**content, "post_processor": wrong}
        (folder / "tokenizer.json").write_text(json.dumps(edited))
        assert "[CLS] A [SEP] B [SEP]" in error_of(load_tokenizer, folder)
    pieces = [[word, -1.0] for word in CASED]
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": {
        "type": "Unigram", "unk_id": 1, "vocab": pieces, "byte_fallback": False}}))
    assert "Unigram" in error_of(load_tokenizer, folder)


def test_a_cased_vocabulary_keeps_its_case(tmp_path):
    """Google's zip files and BioBERT hold a vocab.txt and nothing that says how it is used."""
    for words, expected in ((CASED, ["Ada", "in", "Paris"]), (VOCABULARY, ["ada", "in", "paris"])):
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        for place in (tmp_path, tmp_path / "vocab.txt"):
            assert load_tokenizer(place).encode("Ada in Paris", add_special_tokens=False).tokens == expected
    save_tokenizer(load_tokenizer(write_tokenizer(tmp_path / "cased")), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["do_lower_case"] is False


def test_ids_that_no_token_has_keep_their_rows(tmp_path):
    words = [*VOCABULARY[:60], "film", *VOCABULARY[60:]]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, words=words, tokenizer_config=BERT))
    assert vocabulary_rows(tokenizer) == len(words) > tokenizer.get_vocab_size()
    data = text.PretrainingData([["the film was good"], ["rain in paris"]] * 30, tokenizer, 16)
    assert data.collate(data.rows(0, 8))["input_ids"].max() < len(words)


# ---------------------------------------------------------------- text

def test_halves_of_surrogate_pairs_become_unknown_letters(tmp_path, capsys):
    foreign(tmp_path / "classifier")
    foreign(tmp_path / "span", "span")
    for half in ("\ud800", "\udcff", "\udfff"):
        found, expected = (answers(tmp_path / "classifier", [f"the {letter} film"]) for letter in (half, "\ufffd"))
        assert found == expected
        engine = infer_cpu.load(tmp_path / "span", "fp32", say=lambda line: None)
        found, _ = engine.answer([f"who {half}"], (), [f"ada wrote{half} it"])[0]
        assert found in f"ada wrote{half} it"
    infer_cpu.main([str(tmp_path / "classifier"), "--text", "the \udcff film"])
    data, context = TaskData("squad", ".", load_tokenizer(tmp_path / "classifier"), 32, splits=()), "ada \ud800 it"
    row, = data.encode_question("who", context)
    assert [context[begin:end] for begin, end in row["offsets"]] == ["ada", "it"]           # the letters did not move


@pytest.mark.parametrize("context, answer", [
    ("Zoe\u0301 met Ame\u0301lie\u0301 at noon.", "Ame\u0301lie\u0301"), ("the cafe\u0301", "cafe\u0301"),
    ("cafe\u0301\u0323 in paris", "cafe\u0301\u0323"), ("Amélie in paris", "Amélie"), ("the film", "film")])
def test_an_answer_keeps_the_accent_at_its_end(context, answer, tmp_path):
    (tmp_path / "SQuAD").mkdir()
    content = {"data": [{"paragraphs": [{"context": context, "qas": [{
        "id": "1", "question": "who", "answers": [{"text": answer, "answer_start": context.index(answer)}]}]}]}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "SQuAD" / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", words=VOCABULARY, tokenizer_config=BERT))
    row, = TaskData("squad", tmp_path, tokenizer, 40).rows(0, 1)
    first, last = (row[name] - row["context_begin"] for name in ("start_position", "end_position"))
    assert row["context"][row["offsets"][first, 0]:row["offsets"][last, 1]] == answer


def test_marks_that_are_tokens_of_their_own_are_not_taken_twice(tmp_path):
    words = [*VOCABULARY, "cafe\u0301", "##\u0301"]
    options = {**BERT, "strip_accents": False}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, words=words, tokenizer_config=options))
    tokenizer.add_tokens([AddedToken("\u0302")])
    row, = TaskData("squad", ".", tokenizer, 40, splits=()).encode_question("who", "film\u0302 was")
    ends = row["offsets"].tolist()
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:]))


def documents(*counts):
    """A document of so many sentences each."""
    return [["the film was good ."] * count for count in counts]


def test_what_teaches_nothing_is_said(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, words=VOCABULARY, tokenizer_config=BERT))
    note, = text.PretrainingData(documents(*[1] * 30, *[3] * 10), tokenizer, 16).notes()
    assert "40 documents" in note and "75.0% of the documents have one sentence" in note and "0.00% of their" in note
    half = [["the film 東 京"], ["rain 東"]] * 20
    assert "50.00% of their tokens [UNK]" in text.PretrainingData(half, tokenizer, 16).notes()[0]
    assert "one sentence" not in text.PretrainingData(half, tokenizer, 16, next_sentence=False).notes()[0]
    assert "knows no word" in error_of(text.PretrainingData([["東 京"], ["日"]] * 20, tokenizer, 16).notes)


def test_batches_without_a_word_to_predict(chain, tmp_path, capsys):
    """Text of which the vocabulary knows one word in four documents: most batches of one row have nothing to mask."""
    known, unknown = "the film was good.", "東京 大阪 名古屋。"
    mixed = "\n\n".join([unknown] * 3 + [f"{known if n % 4 == 0 else unknown}" for n in range(60)])
    (tmp_path / "mixed.txt").write_text(mixed, encoding="utf-8")
    (tmp_path / "only.txt").write_text("\n\n".join([unknown] * 30), encoding="utf-8")
    for teacher in ([], ["--teacher", str(chain / "pretrain"), "--kd-target", "masked"]):
        train.main(["--stage", "pretrain", "--init", str(chain / "pretrain"), "--corpus", str(tmp_path / "mixed.txt"),
                    *SHORT[:2], "--batch-size", "1", "--max-len", "16", "--steps", "12", *teacher, "--out",
                    str(tmp_path / f"out{len(teacher)}")])
        metrics = json.loads((tmp_path / f"out{len(teacher)}/pretrain/metrics.json").read_text())["metrics"]
        assert "validation_nsp_loss" in metrics and "validation_mlm_loss" not in metrics
    assert "knows no word" in fails(capsys, "--stage", "evaluate", "--init", chain / "pretrain", "--corpus",
                                    tmp_path / "only.txt")
