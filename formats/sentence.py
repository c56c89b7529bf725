"""What sentence-transformers writes beside an encoder: how its hidden states become one vector for a text."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from formats.files import read_json, write_file, write_json
from model import InputError

SIMILARITIES = ("cosine", "dot")
LENGTH_FILES = ("sentence_bert_config.json", "sentence_distilbert_config.json")
POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}


@dataclass(frozen=True)
class Sentence:
    """How a text's vector is made of its hidden states. The defaults are what sentence-transformers does with an
    encoder that says nothing."""
    pooling: str = "mean"               # of POOLINGS, over the real tokens
    normalize: bool = False             # to length 1
    max_length: int | None = None       # tokens of a row, [CLS] and [SEP] included; None: as many as the model takes
    similarity: str = "cosine"          # of SIMILARITIES, by which two vectors are compared

    def pool(self, hidden, mask):
        """Hidden states (B, T, H) and their mask (B, T), not 0 for what is real -> vectors (B, H)."""
        real = mask.bool()[..., None]
        if self.pooling == "cls":
            vectors = hidden[:, 0]
        elif self.pooling == "max":
            vectors = hidden.masked_fill(~real, -torch.inf).amax(1)
        else:
            vectors = (hidden * real).sum(1) / real.sum(1)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def read_sentence(directory):
    """The Sentence of a folder that sentence-transformers wrote, None of any other. InputError names what this project
    does not have: other modules, poolings or similarities, prompts, shortened vectors."""
    directory = Path(directory)
    path = directory / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = [(module["type"], Path(module["path"])) for module in json.loads(path.read_bytes())]
        kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind, _ in modules]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path} is no list of modules, each with its type and path") from None
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{path} asks for {', '.join(kinds) or 'nothing'}; this project has a Transformer, a Pooling "
                         f"and perhaps a Normalize of sentence_transformers, in that order; give another model")
    if modules[0][1] != Path():
        raise InputError(f"{path}: its encoder lies in {modules[0][1]}; move what is in there beside {path.name}, and "
                         f"set its path to \"\"")
    own, general, tokens = (read_json(directory / name) if (directory / name).is_file() else {} for name in
                            (next((name for name in LENGTH_FILES if (directory / name).is_file()), LENGTH_FILES[0]),
                             "config_sentence_transformers.json", "tokenizer_config.json"))
    prompts, similarity = general.get("prompts") or {}, general.get("similarity_fn_name") or "cosine"
    if not isinstance(prompts, dict) or any(prompts.values()):
        raise InputError(f"{directory} has prompts to put before texts: {json.dumps(prompts)}; this project embeds a "
                         f"text as it is; put them there yourself, and take them out of config_sentence_transformers.json")
    if own.get("do_lower_case") and not tokens.get("do_lower_case", True):      # the tokenizer's default
        raise InputError(f"{directory} makes small letters of a text's before its tokenizer does; this project embeds "
                         f"a text as it is; make them small yourself, and set do_lower_case to false")
    if general.get("truncate_dim") is not None or similarity not in list(SIMILARITIES):
        raise InputError(f"{directory / 'config_sentence_transformers.json'} asks for the similarity {similarity!r} of "
                         f"vectors of {general.get('truncate_dim') or 'all'} numbers; this project has "
                         f"{' and '.join(SIMILARITIES)}, of all")
    length = tokens.get("model_max_length") if own.get("max_seq_length") is None else own["max_seq_length"]
    return Sentence(pooling_of(directory / modules[1][1] / "config.json"), len(modules) == 3,
                    row_length(length, directory), similarity)


def sentence_of_encoder(directory):
    """What sentence-transformers makes of an encoder without modules.json: the mean, of as long rows as its tokenizer
    says."""
    path = Path(directory) / "tokenizer_config.json"
    said = read_json(path) if path.is_file() else {}
    return Sentence(max_length=row_length(said.get("model_max_length"), directory))


def row_length(length, directory):
    """What a file says of the longest row, as a number or None. InputError for what is neither."""
    if length is not None and (type(length) not in (int, float) or length < 3):
        raise InputError(f"{directory}: max_seq_length is {length!r}; expected a number of tokens")
    return None if length is None else int(min(length, 2 ** 20))


def pooling_of(path):
    """'mean', 'cls' or 'max', as the configuration of a Pooling has it. InputError for another one."""
    raw = read_json(path)
    names = raw.get("pooling_mode")
    if names is None:
        kinds = {name: kind for kind, name in POOLINGS.items()}
        names = [kinds.get(name, name) for name, value in raw.items() if name.startswith("pooling_mode_") and value]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or len(names) != 1 or names[0] not in list(POOLINGS):
        raise InputError(f"{path} asks for the pooling {names}; this project has one of {', '.join(POOLINGS)}")
    return names[0]


def write_sentence(sentence, hidden_size, directory):
    """The same beside an encoder that is written to `directory`, as every version of sentence-transformers reads it."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")][:2 + sentence.normalize]
    for _, path in modules[1:]:
        (directory / path).mkdir(exist_ok=True)
    write_file(directory / "modules.json", json.dumps(
        [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
         for i, (kind, path) in enumerate(modules)], indent=1))
    write_json(directory / "1_Pooling" / "config.json", {
        "word_embedding_dimension": hidden_size,
        **{name: kind == sentence.pooling for kind, name in POOLINGS.items()}})
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": sentence.max_length, "do_lower_case": False})
    write_json(directory / "config_sentence_transformers.json", {"similarity_fn_name": sentence.similarity})
