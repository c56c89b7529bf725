"""config.json: HuggingFace's field names, and one `compression` object of ours."""
from dataclasses import replace
from pathlib import Path

from formats.files import read_json
from formats.names import ARCHITECTURES, NAMES
from formats.sentence import read_sentence
from model import PRESETS, InputError


# Settings of BertConfig and DistilBertConfig that would change what is computed, with the values that do not. All
# others are read below, or change nothing here once weights are loaded: they steer HuggingFace's own training,
# generation and outputs.
NEUTRAL = {"is_decoder": (False, None), "add_cross_attention": (False, None), "is_encoder_decoder": (False, None),
           "cross_attention_hidden_size": (None,), "pruned_heads": ({}, None), "quantization_config": ({}, None),
           "position_embedding_type": ("absolute",), "hidden_act": ("gelu", "gelu_python"),
           "activation": ("gelu", "gelu_python")}
BERT_KEYS = {name: name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                     "type_vocab_size", "hidden_dropout_prob", "layer_norm_eps", "classifier_dropout")}
BERT_KEYS.update(attention_dropout_prob="attention_probs_dropout_prob")
DISTILBERT_KEYS = dict(hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads",
                       intermediate_size="hidden_dim", hidden_dropout_prob="dropout",
                       attention_dropout_prob="attention_dropout", classifier_dropout="seq_classif_dropout",
                       span_dropout="qa_dropout")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")      # transformers also takes these for DistilBERT
COMMON_KEYS = {name: name for name in ("vocab_size", "max_position_embeddings", "initializer_range")}


def read_config(directory):
    """config.json -> (ModelConfig, the whole JSON object). InputError names what is wrong in it, or what this network
    does not have."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is not a folder; expected a model directory with config.json and "
                         f"model.safetensors")
    if not path.is_file():
        read_sentence(directory)            # says where an encoder lies that is not here
    raw = read_json(path)
    model_type = model_type_of(raw)
    if model_type not in list(NAMES):                   # a list, because what stands there need not be hashable
        raise InputError(f"{path} says model_type {model_type!r}; expected one of {', '.join(NAMES)}")
    for name, values in NEUTRAL.items():
        if raw.get(name, values[0]) not in values:
            raise InputError(f"{path} asks for {name} = {raw[name]!r}, and this network has only {values[0]!r}; take "
                             f"another model")
    keys = {**(BERT_KEYS if model_type == "bert" else DISTILBERT_KEYS), **COMMON_KEYS}
    defaults = PRESETS["bert-base" if model_type == "bert" else "distilbert-base"]
    given = {ours: raw.get(theirs, raw.get(ours) if ours in SIZES else None) for ours, theirs in keys.items()}
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        default = getattr(defaults, name)
        kinds, limit = ((int,), 2 ** 31) if isinstance(default, int) else ((int, float), 1)
        if type(value) not in kinds or not 0 <= value <= limit:
            raise InputError(f"{path} says {keys[name]} = {value!r}; expected a number like {default!r}")
    config = replace(defaults, **values)
    if not config.num_hidden_layers:
        raise InputError(f"{path} says {keys['num_hidden_layers']} = 0; expected at least one layer")
    if model_type == "bert" and raw.get("classifier_dropout") is None:
        config = replace(config, classifier_dropout=config.hidden_dropout_prob)
    if not config.num_attention_heads or config.hidden_size % config.num_attention_heads or not config.vocab_size:
        raise InputError(f"{path}: hidden_size {config.hidden_size} must be a multiple of "
                         f"{config.num_attention_heads} heads, and vocab_size {config.vocab_size} positive")
    return config, raw


def model_type_of(raw):
    """What config.json says, or where it says nothing, what its architecture or the names of its sizes tell."""
    if raw.get("model_type") is not None:
        return raw["model_type"]
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and architectures:
        return {"Bert": "bert", "Dist": "distilbert"}.get(str(architectures[0])[:4])
    return "distilbert" if "n_layers" in raw else "bert" if "num_hidden_layers" in raw else None


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
                      qa_dropout=config.span_dropout, sinusoidal_pos_embds=False)
    if labels is not None:
        values.update(id2label={str(i): label for i, label in enumerate(labels)},
                      label2id={label: i for i, label in enumerate(labels)})
    if compression:
        values["compression"] = compression
    return values


def rounding_of(directory):
    """(activation bits, 'row' or 'tensor') with which a model was trained. InputError for one that was not rounded."""
    record = compression_of(directory)
    bits, scales = record.get("activation_bits"), record.get("weight_scales")
    if bits not in range(2, 9) or scales not in ("row", "tensor"):
        raise InputError(f"{Path(directory) / 'config.json'} has no activation_bits from 2 to 8 and weight_scales; run "
                         f"python train.py --stage quantize first")
    return bits, scales


def preset_of(directory):
    """The preset whose shape a model directory has, None if there is none."""
    config, _ = read_config(directory)
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return next((name for name, preset in PRESETS.items()
                 if all(getattr(config, field) == getattr(preset, field) for field in shape)), None)


def compression_of(directory):
    """What config.json records of the training: task, max_len, pattern, ... ; {} for a model from elsewhere."""
    value = read_config(directory)[1].get("compression") or {}
    if (not isinstance(value, dict) or not isinstance(value.get("task", ""), str)
            or type(value.get("max_len", 8)) is not int):
        raise InputError(f"{Path(directory) / 'config.json'} says compression {value!r}; expected an object, whose "
                         f"task is a name and whose max_len is a number of tokens")
    return value
