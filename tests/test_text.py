"""data/: what is read, what becomes a batch, what a prediction scores. Every file used here is made on the spot."""

import collections
import random
import string

import numpy as np
import pytest
import torch

from data import DataError
from data import text as text_module
from data.corpus import read_documents
from data.text import (IGNORED, SPECIAL_TOKENS, PretrainingData, fit_pair, load_tokenizer, save_tokenizer,
                       split_sentences, train_tokenizer)

WORDS = "apple bread chair dream eagle forest garden honey island jungle kitten lemon monkey needle orange".split()
PAD, UNKNOWN, CLS, SEP, MASK = range(5)


def make_documents(count=60, seed=0):
    """Documents 1 to 12 sentences long; every sentence begins with a word that names its document and number."""
    generator = random.Random(seed)
    return [[f"d{d}s{s} " + " ".join(generator.choices(WORDS, k=generator.randint(2, 14)))
             for s in range(generator.randint(1, 12))] for d in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    """Whole words only, so that tokens can be read back: document and sentence names included."""
    names = sorted({word for document in make_documents() for sentence in document for word in sentence.split()})
    names += [*string.ascii_lowercase, *string.digits, *string.punctuation]
    names += [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *WORDS, *names])
    return text_module.bert_tokenizer({token: number for number, token in enumerate(vocabulary)})


@pytest.fixture(scope="module")
def pretraining(tokenizer):
    return PretrainingData(make_documents(), tokenizer, 64, seed=3)


def original_ids(row):
    """The tokens before masking."""
    return np.where(row["labels"] == IGNORED, row["input_ids"], row["labels"])


def same_rows(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(left, right))


def message(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- documents

@pytest.mark.parametrize("line, sentences", [
    ("Mr. Smith met Dr. J. R. Jones. They ate.", ["Mr. Smith met Dr. J. R. Jones.", "They ate."]),
    ("The U.S. Army left, e.g. Monday. Why? No!", ["The U.S. Army left, e.g. Monday.", "Why?", "No!"]),
    ('"Go!" she said. (It was late.) Then he left.', ['"Go!" she said.', "(It was late.)", "Then he left."]),
    ("See No. 5 and Fig. 3. No. He did not.", ["See No. 5 and Fig. 3.", "No.", "He did not."]),
    ("So did I. Pi is 3.14 or so. www.x.org is up.", ["So did I.", "Pi is 3.14 or so. www.x.org is up."]),
    ("He waited... Then 7 came.", ["He waited...", "Then 7 came."]),
    ("Zoë sang. Émile danced.", ["Zoë sang.", "Émile danced."]),
    ("  no stop at all ", ["no stop at all"]), ("", [])])
def test_sentences_are_cut_where_a_reader_would(line, sentences):
    assert split_sentences(line) == sentences


def test_documents_are_parted_by_blank_lines_and_by_files(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffThird one.\r\n \r\n\r\nFourth. Here\u2028still.\r\n".encode())
    (tmp_path / "a.txt").write_text("\n\nFirst. It goes on.\nAnd on.\n\n\nSecond.")
    (tmp_path / "c.md").write_text("Not this.")
    expected = [["First.", "It goes on.", "And on."], ["Second."], ["Third one."], ["Fourth.", "Here\u2028still."]]
    assert read_documents(tmp_path) == expected
    assert read_documents(tmp_path / "a.txt") == expected[:2]


def test_text_that_cannot_be_used_is_named(tmp_path):
    assert "no such file or folder" in message(read_documents, tmp_path / "none.txt")
    assert "holds no .txt file" in message(read_documents, tmp_path)
    (tmp_path / "a.txt").write_text(" \n\n")
    assert "no text" in message(read_documents, tmp_path)
    (tmp_path / "a.txt").write_bytes(b"Good.\nStill good.\nBad \xe9 byte.\n")
    assert message(read_documents, tmp_path).startswith(f"{tmp_path / 'a.txt'}:3: the byte 0xe9 is not UTF-8")


# ---------------------------------------------------------------- tokenizer

def random_words(seed=0):
    generator = random.Random(seed)
    return [["".join(generator.choices("ABCDefgh", k=generator.randint(2, 6))) for _ in range(8)] for _ in range(60)]


def test_training_a_tokenizer_twice_gives_the_same_ids():
    # Many equally frequent pairs: the library's own trainer gives another vocabulary nearly every time here.
    documents = [[" ".join(words)] for words in random_words()]
    vocabularies = [train_tokenizer(documents, 100).get_vocab() for _ in range(6)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sorted(vocabularies[0].values()) == list(range(100))
    assert [vocabularies[0][token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    learned = "".join(set(vocabularies[0]) - set(SPECIAL_TOKENS))
    assert learned.islower() and " " not in learned


def test_trained_tokenizer_learns_frequent_words_and_knows_its_text():
    documents = make_documents()
    tokenizer = train_tokenizer(documents, 400)
    assert set(WORDS) <= tokenizer.get_vocab().keys()
    assert all(UNKNOWN not in tokenizer.encode(sentence).ids for document in documents for sentence in document)
    assert tokenizer.encode("Apple BREAD").tokens == ["[CLS]", "apple", "bread", "[SEP]"]
    assert "vocab_size 10 is too small for this text" in message(train_tokenizer, documents, 10)


def test_saved_tokenizer_gives_the_same_ids_everywhere(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([[" ".join(words)] for words in random_words()] + make_documents(), 300)
    texts = ["Apple BREAD, chair!", "abcdefgh Crème brûlée 中文 d1s2", "", "the [MASK] stays",
             *map(" ".join, random_words(1))]
    expected = [tokenizer.encode(text).ids for text in texts]
    save_tokenizer(tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert [load_tokenizer(tmp_path).encode(text).ids for text in texts] == expected
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in texts] == expected
    (tmp_path / "tokenizer.json").unlink()
    assert [load_tokenizer(tmp_path).encode(text).ids for text in texts] == expected
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in texts] == expected


def test_loaded_tokenizer_neither_truncates_nor_pads_and_keeps_its_case(tmp_path, tokenizer):
    saved = text_module.bert_tokenizer(tokenizer.get_vocab())
    saved.enable_truncation(4)
    saved.enable_padding(length=4)
    save_tokenizer(saved, tmp_path)
    assert len(load_tokenizer(tmp_path).encode("apple bread chair dream").ids) == 6
    assert len(load_tokenizer(tmp_path).encode("").ids) == 2
    cased = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "apple", "Apple", "é", "e"])}
    for lowercase, accents, expected in ((False, None, ["Apple", "é"]), (True, None, ["apple", "e"]),
                                         (True, False, ["apple", "é"])):
        save_tokenizer(text_module.bert_tokenizer(cased, lowercase, accents), tmp_path)
        for file in ("tokenizer.json", "vocab.txt"):
            assert load_tokenizer(tmp_path).encode("Apple é").tokens[1:-1] == expected
            (tmp_path / file).unlink()


def test_damaged_tokenizers_are_named(tmp_path):
    assert "neither tokenizer.json nor vocab.txt" in message(load_tokenizer, tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    assert "lacks [SEP] [MASK]" in message(load_tokenizer, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS))
    (tmp_path / "tokenizer_config.json").write_text("{\n oops")
    assert message(load_tokenizer, tmp_path).startswith(f"{tmp_path / 'tokenizer_config.json'}:2: this is not JSON")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a tokenizer file" in message(load_tokenizer, tmp_path)
    gap = {**{token: number for number, token in enumerate(SPECIAL_TOKENS)}, "a": 1006}
    (tmp_path / "tokenizer.json").write_text(text_module.bert_tokenizer(gap).to_str())
    assert "6 tokens but the id 1006" in message(load_tokenizer, tmp_path)


# ---------------------------------------------------------------- pre-training

def sentence_names(tokenizer, ids):
    return [token for token in (tokenizer.id_to_token(int(i)) for i in ids) if token[0] == "d" and "s" in token
            and token[1:2].isdigit()]


def test_rows_are_the_same_however_a_batch_is_cut(pretraining, tokenizer):
    whole = pretraining.rows(7, 16, 0, 16)
    assert same_rows(whole, pretraining.rows(7, 16))
    assert same_rows(whole, pretraining.rows(7, 16, 0, 8) + pretraining.rows(7, 16, 8, 16))
    fresh = PretrainingData(make_documents(), tokenizer, 64, seed=3)     # as if resumed at step 7
    assert same_rows(whole, fresh.rows(7, 16))
    fresh.rows(1000, 16)
    assert same_rows(whole, fresh.rows(7, 16))
    assert not same_rows(whole, pretraining.rows(8, 16))
    assert not same_rows(whole, PretrainingData(make_documents(), tokenizer, 64, seed=4).rows(7, 16))


def test_an_epoch_visits_every_training_span_once_in_its_own_order(tokenizer):
    data = PretrainingData(make_documents(), tokenizer, 64, next_sentence=False, short_probability=0)
    epochs = []
    for epoch in range(2):
        rows = [data.rows(n, 1)[0] for n in range(epoch * len(data), (epoch + 1) * len(data))]
        assert max(len(row["input_ids"]) for row in rows) == 64
        epochs.append([tuple(sentence_names(tokenizer, original_ids(row))) for row in rows])
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    seen = [name for names in epochs[0] for name in names]
    everything = [sentence.split()[0] for document in make_documents()[3:] for sentence in document]
    assert len(seen) == len(set(seen)) and set(seen) <= set(everything)
    assert len(seen) > 0.8 * len(everything)        # the rest fell off the ends of rows that were too long


def test_a_pair_row_is_two_segments_of_one_or_two_documents(pretraining, tokenizer):
    rows = [row for step in range(40) for row in pretraining.rows(step, 16)]
    for row in rows:
        ids, types = original_ids(row), row["token_type_ids"]
        first, second = ids[types == 0], ids[types == 1]
        assert len(ids) <= 64 and np.all(np.diff(types) >= 0)
        assert first[0] == CLS and first[-1] == SEP and second[-1] == SEP and len(first) > 2 and len(second) > 1
        assert CLS not in ids[1:] and np.count_nonzero(ids == SEP) == 2
        names = [[tuple(map(int, name[1:].split("s"))) for name in sentence_names(tokenizer, part)]
                 for part in (first, second)]
        if all(names):
            (document, last), (other, following) = names[0][-1], names[1][0]
            assert (document != other) == bool(row["next_sentence_label"])
            if not row["next_sentence_label"] and len(ids) < 64:
                assert following == last + 1
        assert all(a[0] == b[0] for part in names for a, b in zip(part, part[1:]))
        assert all(document >= 3 for part in names for document, _ in part)         # 0, 1, 2 are for validation
    assert len(rows) == 640 and sum(len(row["input_ids"]) == 64 for row in rows) > 100


@pytest.mark.parametrize("next_sentence", [True, False])
def test_a_share_of_the_rows_is_one_text(next_sentence, tokenizer):
    """[CLS] text [SEP] of all lengths; the others are as ever, and without a share nothing is drawn for it."""
    documents = make_documents()

    def make(share):
        return PretrainingData(documents, tokenizer, 48, next_sentence=next_sentence, mask_probability=0.0,
                               single_share=share)
    rows = make(0.5).rows(0, 400)
    separator = tokenizer.token_to_id("[SEP]")
    single = [row for row in rows if (row["input_ids"] == separator).sum() == 1 and not row["token_type_ids"].any()]
    if next_sentence:
        assert 150 < len(single) < 250 and {row["next_sentence_label"] for row in single} == {0}
    else:
        assert len(single) > 150
    lengths = {len(row["input_ids"]) for row in single}
    assert min(lengths) < 20 and max(lengths) > 30 and all(len(row["input_ids"]) <= 48 for row in rows)
    words = [tokenizer.encode(" ".join(document), add_special_tokens=False).ids for document in documents]
    starts = {tuple(ids[begin:begin + 3]) for ids in words for begin in range(len(ids))}
    assert all(tuple(row["input_ids"][1:4]) in starts for row in single if len(row["input_ids"]) >= 5)
    for one, other in zip(make(0.0).rows(0, 9), PretrainingData(documents, tokenizer, 48, next_sentence=next_sentence,
                                                                mask_probability=0.0).rows(0, 9)):
        assert np.array_equal(one["input_ids"], other["input_ids"])


def test_random_next_sentences_come_half_the_time_and_always_after_a_lone_sentence(tokenizer):
    pairs = [[f"d{d}s0 apple", f"d{d}s1 bread"] for d in range(60)]
    data = PretrainingData(pairs, tokenizer, 64, short_probability=0)
    labels = [row["next_sentence_label"] for step in range(100) for row in data.rows(step, 20)]
    assert abs(np.mean(labels) - 0.5) < 0.05        # 2000 draws: 4.5 standard deviations
    lone = PretrainingData([[sentence] for sentence, _ in pairs], tokenizer, 64)
    assert all(row["next_sentence_label"] == 1 for row in lone.rows(0, 100))


def test_short_targets_are_as_frequent_as_asked(tokenizer):
    documents = [["apple"] * 2000 for _ in range(22)]    # one token a sentence: a span is exactly as long as its target
    for share in (0.0, 0.1, 1.0):
        data = PretrainingData(documents, tokenizer, 64, short_probability=share)
        lengths = np.array([end - begin for begin, end, _ in data.training_spans])
        short = lengths[lengths < 61]
        assert abs(len(short) / len(lengths) - share * 59 / 60) < 0.05      # about 700 spans; 20 more end a document
        assert lengths.min() >= 1 and lengths.max() == 61
        if share == 1:
            assert abs(short.mean() - 31) < 3 and short.min() < 6
        if share == 0:      # a random second segment is as long as the target leaves it
            assert np.mean([len(row["input_ids"]) == 64 for row in data.rows(0, 200)]) > 0.8


def test_the_longer_segment_loses_tokens_at_both_ends(tokenizer):
    for first, second, room in ((5, 5, 10), (9, 2, 8), (2, 9, 8), (9, 9, 8), (9, 9, 7), (30, 1, 5), (1, 30, 5)):
        left, right = first, second
        while left + right > room:
            left, right = (left - 1, right) if left > right else (left, right - 1)
        assert fit_pair(first, second, room) == (left, right)
    fronts, backs = 0, 0
    documents = [[" ".join([f"d{d}s0"] + WORDS * 8 + [f"d{d}s1"])] for d in range(60)]
    for row in PretrainingData(documents, tokenizer, 200).rows(0, 200):
        names = [name[-2:] for name in sentence_names(tokenizer, original_ids(row))]
        fronts, backs = fronts + names.count("s0"), backs + names.count("s1")
    assert fronts + backs == 0                      # 244 tokens lose 46: both ends of both segments are touched

def test_whole_document_rows_join_sentences_with_separators(tokenizer):
    documents = [[f"d{d}s{s} apple bread" for s in range(4)] for d in range(4)]
    data = PretrainingData(documents, tokenizer, 24, next_sentence=False, short_probability=0)
    row = data.rows(0, 1)[0]
    assert "next_sentence_label" not in row and not row["token_type_ids"].any()
    tokens = [tokenizer.id_to_token(int(i)) for i in original_ids(row)]
    document = tokens[1][:-2]
    assert tokens == ["[CLS]"] + [token for s in range(4) for token in (f"{document}s{s}", "apple", "bread", "[SEP]")]


def test_masking_is_15_percent_split_80_10_10(tokenizer):
    documents = [[" ".join(WORDS)] * 40 for _ in range(20)]
    data = PretrainingData(documents, tokenizer, 128, seed=1)
    chosen = candidates = 0
    kinds, replacements, places = collections.Counter(), collections.Counter(), collections.Counter()
    for row in data.rows(0, 1500):
        selected, ids = row["labels"] != IGNORED, original_ids(row)
        assert not selected[np.isin(ids, (CLS, SEP))].any() and selected.any()
        assert np.array_equal(row["input_ids"][~selected], ids[~selected])
        chosen, candidates = chosen + selected.sum(), candidates + (~np.isin(ids, (CLS, SEP))).sum()
        for new, old in zip(row["input_ids"][selected], ids[selected]):
            kinds["mask" if new == MASK else "kept" if new == old else "random"] += 1
            if new not in (MASK, old):
                replacements[int(new)] += 1
        if len(ids) == 128:
            places.update(np.flatnonzero(selected).tolist())
    assert chosen > 20_000 and abs(chosen / candidates - 0.15) < 0.003
    for kind, share in (("mask", 0.8), ("random", 0.1), ("kept", 0.1)):
        assert abs(kinds[kind] / chosen - share) < 0.01, kind        # 4 standard deviations or more
    assert min(replacements) >= len(SPECIAL_TOKENS) and len(replacements) > 0.9 * (tokenizer.get_vocab_size() - 5)
    assert min(places[place] for place in range(1, 60)) > 0.6 * np.mean([places[place] for place in range(1, 60)])


def test_masking_selects_at_least_one_token_and_never_a_written_special_one(tokenizer):
    data = PretrainingData([["[SEP] apple [MASK]"]] * 8, tokenizer, 16, next_sentence=False)
    for row in data.rows(0, 20):
        assert np.flatnonzero(row["labels"] != IGNORED).tolist() == [2]


def test_masks_are_drawn_afresh_in_every_epoch(tokenizer):
    data = PretrainingData(make_documents(4), tokenizer, 64, next_sentence=False)
    seen = collections.defaultdict(set)
    for row in data.rows(0, 10 * len(data)):
        seen[original_ids(row).tobytes()].add(row["labels"].tobytes())
    assert all(len(masks) > 1 for ids, masks in seen.items() if len(ids) > 4 * 20)


def test_collated_pretraining_batches(pretraining):
    rows = pretraining.rows(0, 16)
    batch = pretraining.collate(rows)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (16, -(-longest // 8) * 8) and batch["next_sentence_label"].shape == (16,)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        for name, filler in (("input_ids", PAD), ("token_type_ids", 0), ("labels", IGNORED)):
            assert batch[name][number, :length].tolist() == row[name].tolist()
            assert batch[name][number, length:].eq(filler).all()
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert batch["next_sentence_label"][number] == row["next_sentence_label"]


def test_a_length_that_is_no_multiple_of_8_caps_the_padding(tokenizer):
    data = PretrainingData([[" ".join(WORDS * 3)] * 3] * 8, tokenizer, 30, short_probability=0)
    assert data.collate(data.rows(0, 4))["input_ids"].shape == (4, 30)
    rows = [{key: value[:17] for key, value in row.items() if key != "next_sentence_label"} for row in data.rows(0, 2)]
    data.next_sentence = False
    assert {tensor.shape for tensor in data.collate(rows).values()} == {(2, 24)}


def test_validation_is_fixed_and_holds_the_first_documents(tokenizer):
    documents = make_documents()
    batches = list(PretrainingData(documents, tokenizer, 64, seed=0).validation_batches(4))
    again = PretrainingData(documents, tokenizer, 64, seed=9)
    again.rows(5, 8)
    for left, right in zip(batches, again.validation_batches(4), strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert len(batches) > 1 and len(list(again.validation_batches(4, limit=1))) == 1
    assert sum(len(batch["labels"]) for batch in batches) == len(again.validation_spans)
    ids = torch.cat([torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"]).flatten()
                     for batch in batches])
    assert {name.split("s")[0] for name in sentence_names(tokenizer, ids)} == {"d0", "d1", "d2"}    # 5 % of 60


def test_too_little_text_is_refused(tokenizer):
    assert "holds 3 documents; expected at least 4" in message(PretrainingData, make_documents(3), tokenizer, 64)
    assert len(PretrainingData(make_documents(4), tokenizer, 64)) > 0
    one = message(PretrainingData, make_documents(1), tokenizer, 64, next_sentence=False)
    assert "holds 1 document; expected at least 2" in one
    assert len(PretrainingData(make_documents(2), tokenizer, 64, next_sentence=False)) > 0
    assert "max_length is 7" in message(PretrainingData, make_documents(9), tokenizer, 7)
