"""config.json: HuggingFace's field names, and one `compression` object of ours."""
from dataclasses import replace
from pathlib import Path

from formats.files import read_json
from formats.names import ARCHITECTURES, NAMES
from model import PRESETS, InputError


def read_config(directory):
    """config.json -> (ModelConfig, the whole JSON object)."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is not a folder; expected a model directory with config.json and "
                         f"model.safetensors")
    raw = read_json(path)
    if raw.get("model_type") not in list(NAMES):        # a list, because what stands there need not be hashable
        raise InputError(f"{path} says model_type {raw.get('model_type')!r}; expected one of {', '.join(NAMES)}")
    if raw["model_type"] == "bert":
        keys = {name: name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                        "type_vocab_size", "hidden_dropout_prob", "layer_norm_eps")}
        keys.update(attention_dropout_prob="attention_probs_dropout_prob", classifier_dropout="classifier_dropout")
        activation = raw.get("hidden_act", "gelu")
    else:
        keys = dict(hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads",
                    intermediate_size="hidden_dim", hidden_dropout_prob="dropout",
                    attention_dropout_prob="attention_dropout", classifier_dropout="seq_classif_dropout")
        activation = raw.get("activation", "gelu")
    keys.update({name: name for name in ("vocab_size", "max_position_embeddings", "initializer_range")})
    defaults = replace(PRESETS["bert-base" if raw["model_type"] == "bert" else "distilbert-base"])
    values = {ours: raw[theirs] for ours, theirs in keys.items() if raw.get(theirs) is not None}
    for name, value in values.items():
        default = getattr(defaults, name)
        kinds, limit = ((int,), 2 ** 31) if isinstance(default, int) else ((int, float), 1)
        if type(value) not in kinds or not 0 <= value <= limit:
            raise InputError(f"{path} says {keys[name]} = {value!r}; expected a number like {default!r}")
    config = replace(defaults, **values)
    if raw["model_type"] == "bert" and raw.get("classifier_dropout") is None:
        config = replace(config, classifier_dropout=config.hidden_dropout_prob)
    if activation != "gelu" or raw.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{path} asks for activation {activation!r} and "
                         f"{raw.get('position_embedding_type', 'absolute')} positions; this network has 'gelu' and "
                         f"'absolute'")
    if not config.num_attention_heads or config.hidden_size % config.num_attention_heads or not config.vocab_size:
        raise InputError(f"{path}: hidden_size {config.hidden_size} must be a multiple of "
                         f"{config.num_attention_heads} heads, and vocab_size {config.vocab_size} positive")
    return config, raw


def config_json(config, kind, labels=None, compression=None):
    """The object written to config.json: HuggingFace's field names, and one `compression` object of ours."""
    values = dict(model_type=config.model_type, architectures=[ARCHITECTURES[config.model_type, kind]],
                  vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings,
                  initializer_range=config.initializer_range, pad_token_id=0, tie_word_embeddings=True)
    if config.model_type == "bert":
        values.update(hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
                      num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
                      type_vocab_size=config.type_vocab_size, hidden_dropout_prob=config.hidden_dropout_prob,
                      attention_probs_dropout_prob=config.attention_dropout_prob, hidden_act="gelu",
                      layer_norm_eps=config.layer_norm_eps, classifier_dropout=config.classifier_dropout,
                      position_embedding_type="absolute")
    else:
        values.update(dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
                      hidden_dim=config.intermediate_size, dropout=config.hidden_dropout_prob, activation="gelu",
                      attention_dropout=config.attention_dropout_prob, seq_classif_dropout=config.classifier_dropout,
                      qa_dropout=0.1, sinusoidal_pos_embds=False)
    if labels is not None:
        values.update(id2label={str(i): label for i, label in enumerate(labels)},
                      label2id={label: i for i, label in enumerate(labels)})
    if compression:
        values["compression"] = compression
    return values


def kind_of(directory):
    """(kind, ModelConfig, the JSON object) of a model directory; kind as in model.build."""
    config, raw = read_config(directory)
    kinds = {architecture: kind for (_, kind), architecture in ARCHITECTURES.items()}
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(kinds):
        raise InputError(f"{Path(directory) / 'config.json'} says architectures {architectures!r}; expected one of "
                         f"{', '.join(kinds)}")
    return kinds[architectures[0]], config, raw


def preset_of(directory):
    """The preset whose shape a model directory has; InputError if there is none."""
    config, _ = read_config(directory)
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name, preset in PRESETS.items():
        if all(getattr(config, field) == getattr(preset, field) for field in shape):
            return name
    raise InputError(f"{directory} has {config.num_hidden_layers} layers of {config.hidden_size}: the shape of no "
                     f"preset; name the recipe to use with --preset {'|'.join(PRESETS)}")


def compression_of(directory):
    """What config.json records of the training: task, max_len, pattern, ... ; {} for a model from elsewhere."""
    value = kind_of(directory)[2].get("compression") or {}
    if not isinstance(value, dict):
        raise InputError(f"{Path(directory) / 'config.json'} says compression {value!r}; expected an object")
    return value
