"""The WordPiece tokenizer of BERT: learnt from text, read from a model directory, written to one.

What a directory means is what transformers makes of it, down to the ids: the options of tokenizer_config.json count
more than tokenizer.json, and every file that adds tokens is read. What cannot be read that way is refused by name.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import DataError, read_text
from formats.files import write_file

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer")         # with or without Fast behind them
PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")    # transformers then takes tokenizer.json as it is
NAMED = {name + "_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}     # what they must be
MOST_UNUSED = 1000          # ids that no token has; a line that stands twice in vocab.txt leaves one
NEUTRAL = {"truncation_side": "right", "split_special_tokens": False}       # of tokenizer_config.json
OPTIONS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}       # and their defaults


def bert_tokenizer(vocabulary: dict[str, int], lowercase=True, strip_accents=None, chinese=True,
                   added: tuple[AddedToken | str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """BERT's tokenizer (greedy longest-match WordPiece) over a vocabulary {token: id}. added: tokens that are found in
    a text before it is cut into words; those that the vocabulary lacks get the ids behind it."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if all(token in vocabulary for token in SPECIAL_TOKENS):
        tokenizer.add_tokens([AddedToken(token, special=True) if isinstance(token, str) else token for token in added])
        tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """How many rows an embedding needs for it: the largest id + 1. A file that names a token twice leaves ids unused,
    so that there are fewer tokens than that."""
    return max(tokenizer.get_vocab().values()) + 1


def train_tokenizer(documents: list[list[str]], vocab_size: int) -> Tokenizer:
    """Learn a lower-cased WordPiece vocabulary of at most `vocab_size` tokens; ids 0..4 are SPECIAL_TOKENS.

    The same documents always give the same vocabulary. The library alone does not promise that: it numbers the
    word-inner letters ("##e") in the order of a hash table, and equally frequent merges are ranked by those numbers
    (huggingface/tokenizers issue 1794). So a first pass, which merges nothing, only collects the letters, and the
    second pass is handed them sorted. `documents` are gone through three times, and need not be in memory (see
    corpus.Documents). Raises DataError if vocab_size does not even hold the letters.
    """
    def trained(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = bert_tokenizer({})
        tokenizer.train_from_iterator(itertools.chain.from_iterable(documents), trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False,
            initial_alphabet=alphabet, limit_alphabet=len(alphabet)))
        return tokenizer.get_vocab()

    normalizer, counts = normalizers.BertNormalizer(), Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(" ".join(document)))
    ranked = sorted((-count, letter) for letter, count in counts.items() if not letter.isspace())
    alphabet = sorted(letter for _, letter in ranked[:1000])        # rarer signs become [UNK]
    letters = sorted(set(trained(0, list(SPECIAL_TOKENS))) - set(SPECIAL_TOKENS), key=lambda t: (len(t), t))
    if vocab_size < len(SPECIAL_TOKENS) + len(letters):
        raise DataError(f"vocab_size {vocab_size} is too small for this text: its {len(letters)} letters and "
                        f"{len(SPECIAL_TOKENS)} special tokens need at least {len(SPECIAL_TOKENS) + len(letters)}")
    return bert_tokenizer(trained(vocab_size, [*SPECIAL_TOKENS, *letters]))


# ---------------------------------------------------------------- reading

def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, from tokenizer.json or vocab.txt, tokenizer_config.json and the files that
    add tokens. `directory` may also be a vocab.txt itself.

    Truncation and padding stored in the file are switched off. Raises DataError if neither file is there, if one
    is damaged, if it is no tokenizer of BERT's kind, or if one of SPECIAL_TOKENS is missing from the vocabulary.
    """
    directory = Path(directory)
    places = [directory] if directory.is_file() else [directory / "tokenizer.json", directory / "vocab.txt"]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise DataError(f"{directory}: there is neither tokenizer.json nor vocab.txt in it; give a model directory")
    tokenizer = _read_tokenizer(path)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(f"{path}: the vocabulary lacks {' '.join(missing)}; expected a BERT vocabulary with "
                        f"{' '.join(SPECIAL_TOKENS)}")
    if vocabulary_rows(tokenizer) > len(vocabulary) + MOST_UNUSED:
        raise DataError(f"{path}: the vocabulary has {len(vocabulary)} tokens but the id {max(vocabulary.values())}; "
                        "expected the ids 0, 1, 2, … with few left out")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the directory in which `path` lies, tokenizer.json or a vocab.txt."""
    directory = path.parent
    config = _read_object(directory / "tokenizer_config.json")
    name = str((config or {}).get("tokenizer_class") or (_read_object(directory / "config.json") or {}).get(
        "tokenizer_class") or BERT_CLASSES[0])
    for option, neutral in NEUTRAL.items():
        if (config or {}).get(option, neutral) not in (neutral, None):
            raise DataError(f"{directory}: its tokenizer_config.json says {option} = {config[option]!r}, and here is "
                            f"only {neutral!r}; take another model")
    plain = name.removesuffix("Fast") in PLAIN_CLASSES and path.name == "tokenizer.json"
    if not plain and name.removesuffix("Fast") not in BERT_CLASSES:
        raise DataError(f"{directory}: its tokenizer is a {name}, and expected is one of {', '.join(BERT_CLASSES)}; "
                        "take another model")
    if path.name != "tokenizer.json":
        return _from_vocabulary(read_vocabulary(path), directory, config, added_tokens(directory, config or {}, []))
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
    except DataError:
        raise
    except Exception as error:      # the library raises bare Exception
        raise DataError(f"{path}: this is not a tokenizer file ({error}); restore it, or delete it to use "
                        "vocab.txt beside it") from None
    content = json.loads(tokenizer.to_str())
    added = added_tokens(directory, config or {}, content["added_tokens"])
    if plain or config is None:     # without options, what the file itself says
        if not isinstance(content["model"].get("vocab"), dict):
            raise DataError(f"{path}: its model is {content['model']['type']}, and expected is a vocabulary of word "
                            "pieces, each with its id; take another model")
        tokenizer.add_tokens([token for _, token in added])
        if plain:
            _demand_berts_rows(path, tokenizer)
        return _with_ids_as_said(directory, tokenizer, added)
    if content["model"]["type"] != "WordPiece":
        raise DataError(f"{path}: its model is {content['model']['type']}, and a {name} has WordPiece; they do not "
                        "belong together")
    return _from_vocabulary(content["model"]["vocab"], directory, config, added)


def _demand_berts_rows(path: Path, tokenizer: Tokenizer) -> None:
    """DataError unless the file itself makes [CLS] A [SEP] and [CLS] A [SEP] B [SEP], as rows are made here."""
    pair = tokenizer.encode("", "")
    if (tokenizer.encode("").tokens, pair.tokens, pair.type_ids) != (
            ["[CLS]", "[SEP]"], ["[CLS]", "[SEP]", "[SEP]"], [0, 0, 1]):
        raise DataError(f"{path}: its rows are not [CLS] A [SEP] B [SEP], as BERT's are, but {' '.join(pair.tokens)} "
                        f"around A and B, of the types {pair.type_ids}; take another model")


def _read_object(path: Path) -> dict | None:
    """The object in a JSON file, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: this is not JSON ({error.msg}); restore or delete it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not JSON ({error}); restore or delete it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(value).__name__}; restore or delete it")
    return value


def read_vocabulary(path: Path) -> dict[str, int]:
    """vocab.txt -> {token: id}: the number of its line from 0, of its last one if it stands in several."""
    return {token.rstrip(): number for number, token in enumerate(read_text(path).removesuffix("\n").split("\n"))}


def _from_vocabulary(vocabulary: dict[str, int], directory: Path, config: dict | None, added: list) -> Tokenizer:
    """BERT's tokenizer with the options of tokenizer_config.json and the tokens that `added_tokens` found. Without that
    file, case is kept where the vocabulary has capitals: so a vocabulary that Google published is read."""
    options = {name: (config or {}).get(name, default) for name, default in OPTIONS.items()}
    if config is None:
        options["do_lower_case"] = not any(token != token.lower() and not re.fullmatch(r"\[.*\]", token)
                                           for token in vocabulary)
    try:
        tokenizer = bert_tokenizer(vocabulary, *options.values(), tuple(token for _, token in added))
    except (TypeError, OverflowError):
        raise DataError(f"{directory / 'tokenizer_config.json'}: expected that {', '.join(OPTIONS)} are true or false, "
                        f"found {options}; restore or delete it") from None
    return _with_ids_as_said(directory, tokenizer, added)


def _with_ids_as_said(directory: Path, tokenizer: Tokenizer, added: list[tuple[int | None, AddedToken]]) -> Tokenizer:
    """The tokenizer, or DataError if an added token did not get the id that its file says."""
    for number, token in added:
        if number not in (None, tokenizer.token_to_id(token.content)) and "[SEP]" in tokenizer.get_vocab():
            raise DataError(f"{directory}: the token {token.content!r} is said to have the id {number}, and behind "
                            f"this vocabulary it gets {tokenizer.token_to_id(token.content)}; restore the tokenizer's "
                            "files")
    return tokenizer


def added_tokens(directory: Path, config: dict, stored: list[dict]) -> list[tuple[int | None, AddedToken]]:
    """[(id or None, token)] that a directory adds to its vocabulary, in the order in which transformers adds them:
    those with an id, in its order; the special ones that have a name; the rest.

    stored: those in tokenizer.json. Where tokenizer_config.json has an added_tokens_decoder, that alone counts, else
    added_tokens.json, special_tokens_map.json and `stored`. DataError if one of them is not as it should be.
    """
    try:
        named = dict(NAMED)
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named.update((name, value) for name, value in config.items() if _names_a_token(name, value))
        if "added_tokens_decoder" in config:
            found = {int(number): _added(entry) for number, entry in config["added_tokens_decoder"].items()}
        else:
            listed = _read_object(directory / "special_tokens_map.json") or {}
            named.update((name, value) for name, value in listed.items() if _names_a_token(name, value))
            extra = _joined(extra, listed.get("extra_special_tokens") or [])
            marked = {*map(_content, named.values()), *map(_content, extra)}
            found = {int(number): AddedToken(_content(content), special=content in marked, normalized=content not in marked)
                     for content, number in (_read_object(directory / "added_tokens.json") or {}).items()}
            found.update({int(entry["id"]): _added(entry) for entry in stored})
            extra = extra or listed.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            named, extra = {**named, **extra}, []
        special = [*dict.fromkeys(map(_content, [*named.values(), *extra]))]
        named = {name: _content(named[name]) for name in NAMED}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{directory}: the tokens that its tokenizer files add cannot be read "
                        f"({type(error).__name__}: {error}); restore or delete these files") from None
    for name, expected in NAMED.items():
        if named[name] != expected:
            raise DataError(f"{directory}: its {name} is {named[name]!r}, and expected is {expected!r}; take another "
                            "model")
    tokens = [(number, found[number]) for number in sorted(found)]
    known = {token.content for _, token in tokens}
    return tokens + [(None, AddedToken(content, special=True)) for content in special if content not in known]


def _names_a_token(name: str, value) -> bool:
    return name.endswith("_token") and isinstance(value, (str, dict))


def _joined(first, second):
    """Two lists of tokens as one, without doubles; of objects with names, both."""
    if isinstance(first, dict) or isinstance(second, dict):
        return {**dict(first), **dict(second)}
    return [*first, *(token for token in second if token not in first)]


def _content(entry) -> str:
    content = entry["content"] if isinstance(entry, dict) else entry
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no token")
    content.encode()                            # half of a surrogate pair is none either: UnicodeEncodeError
    return content


def _added(entry: dict) -> AddedToken:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(_content(entry), **{name: bool(entry[name]) for name in names if name in entry})


# ---------------------------------------------------------------- writing

def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, longest: int | None = None) -> None:
    """Write vocab.txt, tokenizer.json and tokenizer_config.json, which transformers' BertTokenizer reads too, each whole
    or not at all. longest: how many tokens of a row it is to keep where it is asked to truncate."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    normalizer = content.get("normalizer") or {}
    bert = normalizer.get("type") == "BertNormalizer" and content["model"]["type"] == "WordPiece"
    config = {"tokenizer_class": "BertTokenizer" if bert else "PreTrainedTokenizerFast",
              "do_lower_case": normalizer.get("lowercase", True),
              "strip_accents": normalizer.get("strip_accents"),
              "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
              **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
              **({"model_max_length": longest} if longest else {})}
    lines = [tokens.get(number, f"[unused id {number}]") for number in range(max(tokens) + 1)]
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in content["added_tokens"]}
    files = {"vocab.txt": "".join(line + "\n" for line in lines),
             "tokenizer.json": tokenizer.to_str(),
             "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    for name, content in files.items():
        write_file(directory / name, content)
