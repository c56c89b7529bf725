"""Text for pre-training: sentences, tokenized documents, and masked sentence pairs (BERT, arXiv 1810.04805).

    documents = read_documents("articles/")                    # corpus.py: documents, each a list of sentences
    tokenizer = train_tokenizer(documents, vocab_size=8000)
    data = PretrainingData(documents, tokenizer, max_length=128)
    batch = data.collate(data.rows(step=0, batch_size=32))     # dict of int64 tensors
"""

import itertools
import re
from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from data import DataError
from data.wordpiece import (SPECIAL_TOKENS, bert_tokenizer, load_tokenizer, save_tokenizer,  # noqa: F401, for callers
                            train_tokenizer, vocabulary_rows)

LOOKED_AT = 10_000_000      # tokens of a text that are looked at for what it is like
IGNORED = -100      # the label of a position without a loss: what torch's cross_entropy leaves out


# ---------------------------------------------------------------- sentences

# Words whose full stop does not end a sentence, and words for which that holds only before a number ("No. 5").
ABBREVIATIONS = frozenset("""mr mrs ms dr prof rev hon st sr jr gen col lt sgt capt cpt maj cmdr adm gov sen rep pres
    mt ft vs cf al approx est ca inc ltd co corp bros dept univ viz jan feb mar apr jun jul aug sep sept oct nov
    dec mon tue wed thu fri sat sun""".split())
NUMBERED = frozenset("no nos vol vols ch fig figs eq sec art p pp op".split())
DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")          # U.S  e.g  a.m  Ph.D: dots inside short letters
BOUNDARY = re.compile(r"""([.!?](?<![.!?]{2})[.!?]*)["'”’)\]]*\s+(?=["'“‘(\[]*([^\W_a-z]))""")


def split_sentences(line: str) -> list[str]:
    """Cut one line of running text into sentences by rule.

    A sentence ends at . ! or ? (with any closing quotes and brackets), followed by space and a capital or a digit,
    unless the single full stop belongs to an abbreviation (Mr.), to an initial (J. Smith), to a dotted
    abbreviation (U.S., e.g.) or to a numbered word (No. 5). A dotted abbreviation never ends a sentence, so "in the
    U.S. He left." stays in one piece: that is the rarer case, and a missed cut does less harm than a false one.
    """
    sentences, begin = [], 0
    for match in BOUNDARY.finditer(line):
        marks, following = match.groups()
        word = line[line.rfind(" ", 0, match.start()) + 1:match.start()].lstrip("\"'“‘([")
        if marks == "." and (word.lower() in ABBREVIATIONS or DOTTED.fullmatch(word)
                             or (len(word) == 1 and word.isupper() and word != "I")
                             or (word.lower() in NUMBERED and following.isdigit())):
            continue
        sentences.append(line[begin:match.end()].strip())
        begin = match.end()
    sentences.append(line[begin:].strip())
    return [sentence for sentence in sentences if sentence]


# ---------------------------------------------------------------- tokenized documents

class Shard(NamedTuple):
    """Tokenized documents, all tokens in one flat array; the arrays may be memory-mapped (see shards.py).

    Sentence s is tokens[sentences[s]:sentences[s + 1]], document d the sentences documents[d] … documents[d + 1] - 1.
    None is empty.
    """
    tokens: np.ndarray          # uint16, or uint32 for a vocabulary of more than 65,536 tokens: (tokens,)
    sentences: np.ndarray       # uint32 (sentences + 1,)
    documents: np.ndarray       # uint32 (documents + 1,)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocabulary_rows(tokenizer) <= 2 ** 16 else np.uint32)


def tokenize(documents: list[list[str]], tokenizer: Tokenizer) -> Shard:
    """Documents, lists of sentences, as one Shard; what holds no token is left out."""
    pieces = _encoded(tokenizer, [sentence for document in documents for sentence in document])
    tokens, sentences, ends = array(token_type(tokenizer).char), array("I", [0]), array("I", [0])
    for document in documents:
        for ids in itertools.islice(pieces, len(document)):
            if ids:
                tokens.fromlist(ids)
                sentences.append(len(tokens))
        if len(sentences) - 1 > ends[-1]:
            ends.append(len(sentences) - 1)
    return Shard(np.array(tokens), np.array(sentences), np.array(ends))


# ---------------------------------------------------------------- sequences, shared with tasks.py

def token_ids(tokenizer: Tokenizer, texts: list[str]):
    """Yield the word-piece ids of each text, an int32 array without [CLS] and [SEP]."""
    for ids in _encoded(tokenizer, texts):
        yield np.array(ids, dtype=np.int32)


def _encoded(tokenizer: Tokenizer, texts: list[str]):
    for begin in range(0, len(texts), 10_000):          # in pieces: the library's result objects are large
        piece = [without_surrogates(text) for text in texts[begin:begin + 10_000]]
        for encoding in tokenizer.encode_batch_fast(piece, add_special_tokens=False):
            yield encoding.ids


def without_surrogates(text: str) -> str:
    """A text that UTF-8 can hold, of the same length: halves of surrogate pairs, as JSON and command lines may bring
    them, become U+FFFD."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def fit_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths left of two segments when the longer one loses a token (the second, if equal) until both fit `room`."""
    return min(first, max(room - second, (room + 1) // 2)), min(second, max(room - first, room // 2))


def sequence(tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """[CLS] first [SEP] or [CLS] first [SEP] second [SEP]: `input_ids` int32, `token_type_ids` int8, both (length,)."""
    separator, boundary = tokenizer.token_to_id("[SEP]"), len(first) + 2
    input_ids = np.full(boundary if second is None else boundary + len(second) + 1, separator, dtype=np.int32)
    input_ids[0] = tokenizer.token_to_id("[CLS]")
    input_ids[1:boundary - 1] = first
    if second is not None:
        input_ids[boundary:-1] = second
    token_type_ids = np.zeros(len(input_ids), dtype=np.int8)
    token_type_ids[boundary:] = 1
    return {"input_ids": input_ids, "token_type_ids": token_type_ids}


def pad(arrays: list[np.ndarray], value: int, max_length: int) -> torch.Tensor:
    """Stack 1-d arrays as int64 (rows, longest rounded up to a multiple of 8 but not over max_length)."""
    longest = max(len(array) for array in arrays)
    padded = np.full((len(arrays), min(-(-longest // 8) * 8, max_length)), value, dtype=np.int64)
    for row, array in zip(padded, arrays):
        row[:len(array)] = array
    return torch.from_numpy(padded)


def pad_rows(rows: list[dict], padding: int, max_length: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` (1 = token, 0 = padding) and `token_type_ids` of rows made by `sequence`."""
    return {"input_ids": pad([row["input_ids"] for row in rows], padding, max_length),
            "attention_mask": pad([np.ones_like(row["input_ids"]) for row in rows], 0, max_length),
            "token_type_ids": pad([row["token_type_ids"] for row in rows], 0, max_length)}


# ---------------------------------------------------------------- pre-training

# Random numbers come from independent streams: default_rng((seed, stream, …)).
CUTS, ORDERS, SAMPLES = range(3)
VALIDATION_SEED = 0     # whatever the seed of the run, so that runs with different seeds are comparable


def _order(count: int, *seed: int) -> np.ndarray:
    """A random order of 0 … count - 1, uint32: half the memory of Generator.permutation, and the same numbers."""
    order = np.arange(count, dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)
    return order


def _place(begins: np.ndarray, number: int) -> int:
    """Which of the runs that begin at `begins`, rising, holds `number`."""
    return int(begins.searchsorted(begins.dtype.type(number), side="right")) - 1    # another type would copy them all


class Spans:
    """The spans of a split, a sequence of (first sentence, end sentence, target tokens), sentences numbered through all
    shards.

    English Wikipedia has some thirty million spans, so they are kept small: a bit per sentence, set where a span
    begins (each ends where the next begins), and two bytes per span for its target.
    """

    BLOCK = 512     # sentences, between two entries of the table that leads to the n-th bit set

    def __init__(self, begins: np.ndarray, targets: array, first: int):
        """begins: bool (sentences of the split + 1,), the last one True; targets: array("H"), one per span; first:
        number of the split's first sentence."""
        packed = np.packbits(begins)
        self.bits = np.zeros((-(-len(begins) // self.BLOCK), self.BLOCK // 8), dtype=np.uint8)
        self.bits.ravel()[:len(packed)] = packed
        self.before = np.concatenate([[0], np.cumsum(np.bitwise_count(self.bits).sum(1, dtype=np.int64))])
        self.targets, self.first = targets, first

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        target = self.targets[number]       # IndexError past the end
        return self._begin(number), self._begin(number + 1), target

    def _begin(self, number: int) -> int:
        block = int(np.searchsorted(self.before, number, side="right")) - 1
        places = np.flatnonzero(np.unpackbits(self.bits[block]))
        return self.first + block * self.BLOCK + int(places[number - self.before[block]])


class PretrainingData:
    """Masked-word samples from documents, as in BERT (arXiv 1810.04805).

    Documents are cut once into spans of consecutive sentences, about as long as the target: max_length less the
    special tokens, or with `short_probability` a uniformly random shorter one. An epoch visits every span once, in an
    order of its own. Each visit draws afresh what is made of the span:

    * with next_sentence: the span is cut in two at a random sentence, [CLS] A [SEP] B [SEP]. With probability 0.5,
      and always if it has only one sentence, B comes from a random place in another document of the same split
      (next_sentence_label 1) instead of being A's own continuation (0). What is too long is cut token by token from
      the front or back of the longer segment. (BERT's script draws once, in advance, and hands the sentences that B
      replaced to the next span. Here they wait for another epoch: the cost of a fixed number of spans.)
    * without (DistilBERT, arXiv 1910.01108): [CLS] sentence [SEP] sentence [SEP] …, all of token type 0.
    * for a share of the rows, single_share: the span's first sentences, a random number of them, as one text,
      [CLS] text [SEP], such as a task of one text or a sentence encoder reads (next_sentence_label 0).
    * the mask: 15 % of the tokens that are not special, at least one (none at 0 %), become labels; of these 80 % turn
      into [MASK], 10 % into a random token and 10 % stay.

    The first 5 % of the documents are for validation. `documents` are lists of sentences, or Shards of them: where the
    cuts between shards fall changes nothing. For English Wikipedia on disk this takes some 0.3 GB, and the cutting a
    minute. Raises DataError if there are too few documents.
    """

    def __init__(self, documents, tokenizer, max_length, next_sentence=True, seed=0, short_probability=0.1,
                 mask_probability=0.15, validation_share=0.05, single_share=0.0):
        self.tokenizer, self.max_length, self.next_sentence = tokenizer, max_length, next_sentence
        self.seed, self.short_probability, self.mask_probability = seed, short_probability, mask_probability
        self.single_share, self.pairs = single_share, next_sentence
        if not 8 <= max_length < 2 ** 16:
            raise DataError(f"max_length is {max_length}; expected 8 tokens, three of which are special, to 65535")

        # Documents and sentences are numbered through all shards; these are the numbers of each shard's first.
        tokenized = documents and isinstance(documents[0], Shard)
        self.shards = documents if tokenized else [tokenize(documents, tokenizer)]
        self.first_document = np.cumsum([0] + [len(shard.documents) - 1 for shard in self.shards])
        self.first_sentence = np.cumsum([0] + [len(shard.sentences) - 1 for shard in self.shards])

        fewest = 2 if next_sentence else 1      # a random next sentence needs another document in each split
        count = int(self.first_document[-1])
        validation = max(fewest, int(validation_share * count))
        if count < validation + fewest:
            raise DataError(f"the text holds {count} document{'s' * (count != 1)}; expected at least {2 * fewest}, "
                            "half of them for validation: put blank lines between documents")
        self.validation_split, self.training_split = (0, validation), (validation, count)
        self.validation_spans = self._cut(self.validation_split, VALIDATION_SEED)
        self.training_spans = self._cut(self.training_split, seed)

        special = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        self.padding, _, _, self.separator, self.mask = special
        self.is_special = np.zeros(vocabulary_rows(tokenizer), dtype=bool)
        self.is_special[special] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        self._epoch, self._order = -1, None     # a cache, no state: see _training_order

    def log_frequencies(self) -> torch.Tensor:
        """float32 (ids,): the logarithm of each token's share of the text, every token counted once more; of a long
        text, of what `notes` looks at."""
        counts = np.ones(len(self.is_special))
        for shard in self.shards:
            counts += np.bincount(shard.tokens[:LOOKED_AT // len(self.shards)], minlength=len(counts))
        return torch.from_numpy(np.log(counts / counts.sum())).float()

    def notes(self) -> list[str]:
        """A line that says what of the text teaches nothing: documents of one sentence, which have no next one, and
        tokens that the vocabulary lacks. Of a long text's shards, each one's beginning is looked at. DataError if no
        word is known."""
        lengths = np.concatenate([np.diff(shard.documents) for shard in self.shards])
        looked_at = [shard.tokens[:LOOKED_AT // len(self.shards)] for shard in self.shards]
        known = sum(int((~self.is_special[tokens]).sum()) for tokens in looked_at)
        if not known:
            raise DataError("the vocabulary knows no word of this text: each of its tokens is [UNK]; give a model, or "
                            "a text, of another language")
        unknown = 1 - known / sum(map(len, looked_at))
        note = f"text: {len(lengths):,} documents, {unknown:.2%} of their tokens [UNK]"
        if self.next_sentence:
            note += (f"; {np.mean(lengths == 1):.1%} of the documents have one sentence, and next-sentence prediction "
                     "learns nothing from them")
        return [note]

    def _cut(self, split: tuple[int, int], seed: int) -> Spans:
        """The spans of the documents split[0] … split[1] - 1."""
        generator = np.random.default_rng((seed, CUTS))
        longest = self.max_length - (3 if self.next_sentence else 1)
        first, last = map(self._first_sentence_of, split)
        marks, targets = np.zeros(last - first + 1, dtype=bool), array("H")
        marks[-1] = True
        for number, shard in enumerate(self.shards):
            low, high = (max(0, document - int(self.first_document[number])) for document in split)
            bounds = memoryview(np.array(shard.documents[low:high + 1]))    # indexing it is faster than an array, and
            if len(bounds) < 2:                                             # it is smaller than a list
                continue
            ends = np.array(shard.sentences)
            ends = memoryview(ends if self.next_sentence else ends + np.arange(len(ends)))  # + 1 each for its [SEP]
            begins = array("I")
            for begin, end in zip(bounds, bounds[1:]):
                while begin < end:
                    short = generator.random() < self.short_probability
                    target = int(generator.integers(2, longest + 1)) if short else longest
                    begins.append(begin)
                    targets.append(target)
                    begin = bisect_left(ends, ends[begin] + target, begin + 1, end)     # `end`, if it is not reached
            marks[np.array(begins, dtype=np.int64) + (int(self.first_sentence[number]) - first)] = True
        return Spans(marks, targets, first)

    def _first_sentence_of(self, document: int) -> int:
        number = min(_place(self.first_document, document), len(self.shards) - 1)   # at most: the end of the last
        local = self.shards[number].documents[document - self.first_document[number]]
        return int(self.first_sentence[number]) + int(local)

    def __len__(self) -> int:
        """Training rows in one epoch, the same in every epoch."""
        return len(self.training_spans)

    def rows(self, step: int, batch_size: int, begin: int = 0, end: int | None = None) -> list[dict]:
        """Rows begin … end - 1 of the batch of `step`, a pure function of (seed, step, row, batch_size): dicts of
        `input_ids` and `labels` int32, `token_type_ids` int8, all (length,), and maybe `next_sentence_label`.

        Rows are numbered through all steps; row n of the run is place n % len(self) in the order of epoch
        n // len(self), so every span comes once in an epoch.
        """
        numbers = range(step * batch_size + begin, step * batch_size + (batch_size if end is None else end))
        return [self._sample(self.training_spans[int(self._training_order(number // len(self))[number % len(self)])],
                             self.training_split, np.random.default_rng((self.seed, SAMPLES, number)))
                for number in numbers]

    def _training_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _order(len(self), self.seed, ORDERS, epoch)
        return self._order

    def validation_batches(self, batch_size: int, limit: int | None = None):
        """Yield at most `limit` collated batches of the validation documents: always the same, masked the same."""
        order = _order(len(self.validation_spans), VALIDATION_SEED, ORDERS)
        for begin in range(0, len(order), batch_size)[:limit]:
            yield self.collate([self._sample(self.validation_spans[int(span)], self.validation_split,
                                             np.random.default_rng((VALIDATION_SEED, SAMPLES, int(span))))
                                for span in order[begin:begin + batch_size]])

    def _sample(self, span: tuple[int, int, int], split: tuple[int, int], generator: np.random.Generator) -> dict:
        """One row from one span; everything random comes from `generator`."""
        begin, end, target = span
        number = _place(self.first_sentence, begin)
        begin, end = begin - int(self.first_sentence[number]), end - int(self.first_sentence[number])
        if self.single_share and generator.random() < self.single_share:
            text = self._sentences(number, begin, int(generator.integers(begin, end)) + 1)
            row = sequence(self.tokenizer, text[:self.max_length - 2]) | {"next_sentence_label": 0}
        elif self.next_sentence:
            first, second, is_random = self._segments(number, begin, end, target, split, generator)
            row = sequence(self.tokenizer, first, second) | {"next_sentence_label": is_random}
        else:
            sentences = self.shards[number].sentences
            ends = sentences[begin + 1:end].astype(np.int64) - sentences[begin]     # all but the last: it ends the row
            joined = np.insert(self._sentences(number, begin, end), ends, self.separator)
            row = sequence(self.tokenizer, joined[:self.max_length - 2])
        return self._masked(row, generator)

    def _sentences(self, number: int, begin: int, end: int) -> np.ndarray:
        """The tokens of sentences begin … end - 1 of a shard."""
        shard = self.shards[number]
        return shard.tokens[shard.sentences[begin]:shard.sentences[end]]

    def _segments(self, number, begin, end, target, split, generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Segments A and B of a span in a shard, cut to fit, and whether B is random."""
        middle = begin + 1 if end - begin == 1 else begin + int(generator.integers(1, end - begin))
        first = self._sentences(number, begin, middle)
        is_random = end - begin == 1 or generator.random() < 0.5
        if is_random:
            document = int(self.first_document[number]) + _place(self.shards[number].documents, begin)
            other = int(generator.integers(split[0], split[1] - 1))
            other += other >= document                              # any document of the split but this one
            number = _place(self.first_document, other)
            _, sentences, documents = self.shards[number]
            other -= int(self.first_document[number])
            start, end = int(generator.integers(documents[other], documents[other + 1])), int(documents[other + 1])
            wanted = sentences[start] + max(1, target - len(first))
            stop = start + int(np.searchsorted(sentences[start:end], wanted))   # the first sentence end at or after it
            second = self._sentences(number, start, stop)
        else:
            second = self._sentences(number, middle, end)
        lengths = fit_pair(len(first), len(second), self.max_length - 3)
        segments = []
        for segment, length in zip((first, second), lengths):
            front = int(generator.binomial(len(segment) - length, 0.5))     # each cut falls on either end
            segments.append(segment[front:front + length])
        return *segments, int(is_random)

    def _masked(self, row: dict, generator: np.random.Generator) -> dict:
        """Add `labels` to the row and mask its `input_ids`."""
        input_ids, labels = row["input_ids"], np.full_like(row["input_ids"], IGNORED)
        candidates = np.flatnonzero(~self.is_special[input_ids])
        count = min(len(candidates), max(int(self.mask_probability > 0), round(self.mask_probability * len(candidates))))
        chosen = generator.permutation(candidates)[:count]
        labels[chosen] = input_ids[chosen]
        draw = generator.random(count)
        input_ids[chosen[draw < 0.8]] = self.mask
        replaced = chosen[(draw >= 0.8) & (draw < 0.9)]
        input_ids[replaced] = self.ordinary[generator.integers(len(self.ordinary), size=len(replaced))]
        return row | {"labels": labels}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """int64 tensors `input_ids`, `attention_mask`, `token_type_ids`, `labels` (IGNORED where not selected), all
        (rows, longest row rounded up to a multiple of 8), and with next_sentence `next_sentence_label` (rows,)."""
        batch = pad_rows(rows, self.padding, self.max_length)
        batch["labels"] = pad([row["labels"] for row in rows], IGNORED, self.max_length)
        if self.next_sentence:
            batch["next_sentence_label"] = torch.tensor([row["next_sentence_label"] for row in rows])
        return batch
