"""The network: BERT (arXiv 1810.04805) and DistilBERT (arXiv 1910.01108) from one set of modules, the one `Linear` that
pruning and quantization act on, and the reading and writing of model directories in the HuggingFace layout.

Shapes, everywhere in this project:
    B = batch size          T = tokens per row, padding included        H = hidden_size     V = vocab_size
    A = attention heads     D = H / A, size of one head                 N = number of positions a loss asks for
    C = number of classes   F = intermediate_size
"""
import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """A person's mistake (flag, file, folder); its message is the one sentence they read before exit code 2."""


def processor_name():
    """The CPU's name, for the records that go with a measurement."""
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def keep_freed_memory():
    """Ask glibc to keep freed memory, in this whole process: a step of training, or a batch through torch's operators,
    frees and takes the same large tensors, and fresh pages cost up to a third of its time. Elsewhere there is no such
    call, and nothing is lost but that time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(-3, 1 << 30)           # M_MMAP_THRESHOLD
        set_option(-1, (1 << 31) - 1)     # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

@dataclass(frozen=True)
class ModelConfig:
    model_type: str = "bert"              # bert, or distilbert: no token types, no pooler, no next-sentence head
    vocab_size: int = 30522               # word pieces
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512    # longest row, in tokens
    type_vocab_size: int = 2              # 0 in DistilBERT
    hidden_dropout_prob: float = 0.1
    attention_dropout_prob: float = 0.1
    classifier_dropout: float = 0.1       # before a task head (0.2 in DistilBERT's classifier)
    initializer_range: float = 0.02       # standard deviation of fresh weights
    layer_norm_eps: float = 1e-12


PRESETS = {
    "tiny": ModelConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=256, max_position_embeddings=128, initializer_range=0.05),
    "minilm-l6": ModelConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "distilbert-base": ModelConfig(model_type="distilbert", num_hidden_layers=6, type_vocab_size=0,
                                   classifier_dropout=0.2),
    "bert-base": ModelConfig(),
    "bert-large": ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network

def product_type(x):
    """The type that matrix products of x are taken in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """y = x (W * mask)^T + b, with the slots that the other rooms write to.

    mask        bool (out, in), True where a weight lives; written only by prune.py. The latent weight under a False
                entry is kept, so that a pruned weight can return at a later mask update (arXiv 1710.01878). None in a
                frozen layer, whose weight is masked already.
    act_range   float (2,), running minimum and maximum of the input; written only by quant.py.
    fake_quant  None, or a function (x, weight, layer) -> (x, weight) that rounds both; set only by quant.py.
    prunable    False for heads: the layer says what may be pruned, never a pattern over names.
    kernel      None, or a function x -> y that replaces the product at inference; set only by infer_cpu.py.

    Input (..., in), output (..., out), both of the weight's dtype (or autocast's).
    """

    def __init__(self, in_features, out_features, prunable=True):
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool), persistent=False)
        self.register_buffer("act_range", torch.zeros(2), persistent=False)
        self.prunable = prunable
        self.fake_quant = None
        self.kernel = None

    def forward(self, x):
        if self.kernel is not None:
            return self.kernel(x)
        weight = self.weight
        if self.fake_quant is None:
            weight = weight.to(product_type(x))                 # now, so that the mask goes over half as many bytes
        if self.mask is not None:
            weight = weight * self.mask.view(torch.uint8)       # twice as fast as with bool
        if self.fake_quant is not None:
            x, weight = self.fake_quant(x, weight, self)
        return F.linear(x, weight, self.bias)

    def freeze(self, dtype):
        """For a teacher, which never changes: the mask goes into the weight once, and the weight stays in the type that
        products are taken in."""
        self.weight = nn.Parameter((self.weight * self.mask).to(dtype), requires_grad=False)
        self.mask = None


class Layer(nn.Module):
    """One post-norm transformer layer. Input and output (B, T, H); `mask` is bool (B, 1, 1, T), True on real tokens."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = Linear(hidden, hidden), Linear(hidden, hidden), Linear(hidden, hidden)
        self.attention_output = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.intermediate = Linear(hidden, config.intermediate_size)
        self.output = Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.attention_dropout = config.attention_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # DistilBERT has no dropout between attention and its residual sum.
        self.attention_output_dropout = (nn.Dropout(config.hidden_dropout_prob) if config.model_type == "bert" else
                                         nn.Identity())

    def forward(self, x, mask):
        B, T, H = x.shape
        inputs = x.to(product_type(x))                                                  # once for all three
        query, key, value = (linear(inputs).view(B, T, self.heads, H // self.heads).transpose(1, 2)     # (B, A, T, D)
                             for linear in (self.query, self.key, self.value))
        if x.device.type == "cpu":       # PyTorch's CPU attention: its backward is twice as slow in bf16 as in float32
            query, key, value = query.float(), key.float(), value.float()
        with torch.autocast(x.device.type, enabled=x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)):
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                                     dropout_p=self.attention_dropout if self.training else 0.0)
        context = context.transpose(1, 2).reshape(B, T, H)
        x = self.attention_norm(x + self.attention_output_dropout(self.attention_output(context)))
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Encoder(nn.Module):
    """Embeddings, layers and, where the model has one, the pooler.

    recompute   True: in training, keep only what goes into each layer, and compute its inside again in the backward
                pass (arXiv 1604.06174): the same bits, less memory, a third more time. Not with activation ranges,
                which would follow the same input twice.
    kernel      None, or a function that replaces `forward` at inference; set only by infer_cpu.py.
    """

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.recompute = False
        self.kernel = None
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler and config.model_type == "bert" else None

    def forward(self, input_ids, attention_mask, token_type_ids):
        """input_ids, attention_mask, token_type_ids: int64 (B, T). Returns hidden states (B, T, H)."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise InputError(f"a row of {length} tokens is longer than the model's "
                             f"{self.config.max_position_embeddings} positions; give --max-len "
                             f"{self.config.max_position_embeddings} or less")
        if self.kernel is not None:
            return self.kernel(input_ids, attention_mask, token_type_ids)
        x = self.word(input_ids) + self.position.weight[:length]
        if self.token_type is not None:
            x = x + self.token_type(token_type_ids)
        x = self.dropout(self.norm(x))
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.recompute and self.training else layer(x, mask)
        return x

    def pooled(self, hidden):
        """The first token through the pooler's tanh layer: (B, T, H) -> (B, H)."""
        return torch.tanh(self.pooler(hidden[:, 0]))


class PretrainingModel(nn.Module):
    """Masked language model with a decoder tied to the word embeddings and, in BERT, next-sentence prediction.

    `forward` returns (features, next_sentence): `features` (N, H) only at the positions asked for, where the vocabulary
    logits are features @ word^T + bias (see `vocabulary`); next_sentence (B, 2), or None in DistilBERT. The (N, V)
    product is left to the loss, which takes it in chunks (distill.py).
    """
    kind = "pretraining"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.transform = Linear(config.hidden_size, config.hidden_size, prunable=False)
        self.transform_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.next_sentence = Linear(config.hidden_size, 2, prunable=False) if config.model_type == "bert" else None

    def forward(self, input_ids, attention_mask, token_type_ids, positions):
        """positions: bool (B, T), the N places where predictions are wanted."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        features = self.transform_norm(F.gelu(self.transform(hidden[positions])))
        if self.next_sentence is None:
            return features, None
        return features, self.next_sentence(self.encoder.pooled(hidden))

    def vocabulary(self):
        """(weight (V, H), bias (V,)) of the tied decoder."""
        return self.encoder.word.weight, self.bias


class ClassificationModel(nn.Module):
    """Sentence or sentence-pair classification: logits (B, C)."""
    kind = "classification"

    def __init__(self, config, num_labels=2):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        distil = config.model_type == "distilbert"
        self.pre_classifier = Linear(config.hidden_size, config.hidden_size, prunable=False) if distil else None
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, num_labels, prunable=False)

    def forward(self, input_ids, attention_mask, token_type_ids):
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        if self.pre_classifier is None:
            summary = self.encoder.pooled(hidden)
        else:
            summary = F.relu(self.pre_classifier(hidden[:, 0]))
        return self.classifier(self.dropout(summary))


class SpanModel(nn.Module):
    """Extractive question answering: (start logits, end logits), each (B, T). It has no pooler."""
    kind = "span"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, pooler=False)
        self.dropout = nn.Dropout(0.1) if config.model_type == "distilbert" else nn.Identity()      # as published
        self.span = Linear(config.hidden_size, 2, prunable=False)

    def forward(self, input_ids, attention_mask, token_type_ids):
        logits = self.span(self.dropout(self.encoder(input_ids, attention_mask, token_type_ids)))
        return logits[..., 0], logits[..., 1]


def build(config, kind, num_labels=2):
    """A model with fresh weights: kind is 'pretraining', 'classification' or 'span'."""
    if kind == "classification":
        model = ClassificationModel(config, num_labels)
    else:
        model = PretrainingModel(config) if kind == "pretraining" else SpanModel(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    return model


def set_dropout(model, probability):
    """One dropout probability for embeddings, attention, residual sums and heads, in place of the configuration's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, Layer):
            module.attention_dropout = probability


def linears(model):
    """[(name, Linear)] in forward order: the layers that pruning and quantization look at."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


# ---------------------------------------------------------------------------------------------------------------------
# Names: ours -> HuggingFace's. `{}` is the layer number.

NAMES = {
    "bert": {
        "encoder.word": "bert.embeddings.word_embeddings",
        "encoder.position": "bert.embeddings.position_embeddings",
        "encoder.token_type": "bert.embeddings.token_type_embeddings",
        "encoder.norm": "bert.embeddings.LayerNorm",
        "encoder.layers.{}.query": "bert.encoder.layer.{}.attention.self.query",
        "encoder.layers.{}.key": "bert.encoder.layer.{}.attention.self.key",
        "encoder.layers.{}.value": "bert.encoder.layer.{}.attention.self.value",
        "encoder.layers.{}.attention_output": "bert.encoder.layer.{}.attention.output.dense",
        "encoder.layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layers.{}.intermediate": "bert.encoder.layer.{}.intermediate.dense",
        "encoder.layers.{}.output": "bert.encoder.layer.{}.output.dense",
        "encoder.layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "encoder.pooler": "bert.pooler.dense",
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "next_sentence": "cls.seq_relationship",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    "distilbert": {
        "encoder.word": "distilbert.embeddings.word_embeddings",
        "encoder.position": "distilbert.embeddings.position_embeddings",
        "encoder.norm": "distilbert.embeddings.LayerNorm",
        "encoder.layers.{}.query": "distilbert.transformer.layer.{}.attention.q_lin",
        "encoder.layers.{}.key": "distilbert.transformer.layer.{}.attention.k_lin",
        "encoder.layers.{}.value": "distilbert.transformer.layer.{}.attention.v_lin",
        "encoder.layers.{}.attention_output": "distilbert.transformer.layer.{}.attention.out_lin",
        "encoder.layers.{}.attention_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
        "encoder.layers.{}.intermediate": "distilbert.transformer.layer.{}.ffn.lin1",
        "encoder.layers.{}.output": "distilbert.transformer.layer.{}.ffn.lin2",
        "encoder.layers.{}.output_norm": "distilbert.transformer.layer.{}.output_layer_norm",
        "transform": "vocab_transform",
        "transform_norm": "vocab_layer_norm",
        "bias": "vocab_projector.bias",
        "pre_classifier": "pre_classifier",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
}
ARCHITECTURES = {
    ("bert", "pretraining"): "BertForPreTraining", ("distilbert", "pretraining"): "DistilBertForMaskedLM",
    ("bert", "classification"): "BertForSequenceClassification",
    ("distilbert", "classification"): "DistilBertForSequenceClassification",
    ("bert", "span"): "BertForQuestionAnswering", ("distilbert", "span"): "DistilBertForQuestionAnswering",
}
TIED_DECODER = {"bert": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
                "distilbert": ("vocab_projector.weight", None)}


def published_name(model_type, ours):
    """'encoder.layers.3.query.weight' -> 'bert.encoder.layer.3.attention.self.query.weight'."""
    number = re.search(r"\.(\d+)\.", ours)
    generic = re.sub(r"\.\d+\.", ".{}.", ours)
    stem, _, leaf = generic.rpartition(".")
    theirs = NAMES[model_type][stem] + "." + leaf if stem else NAMES[model_type][leaf]
    return theirs.format(number.group(1)) if number else theirs


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: u64 length of the header, a JSON header, raw little-endian bytes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which stands under `path` only once the block is through and the bytes are on the
    disk: a reader finds the old file or the new one, never half of it. InputError where that cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # Of a full disk, torch.save tells by an error of its own, in whose context the system's stands.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path} cannot be written ({reason.strerror}); make room there, or write elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path, content):
    """Write bytes or text, whole or not at all (see whole_file)."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def safetensors_header(tensors, metadata=None):
    """(the bytes that stand before the tensors, the names in the order of their bytes). The tensors may be on torch's
    'meta' device: nothing but their dtypes and shapes is read."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, names, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, [], 0
    # Widest elements first, so that every tensor starts at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
        names.append(name)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, names


def write_safetensors(path, tensors, metadata=None):
    """tensors: dict name -> tensor of any dtype in DTYPES; metadata: dict of strings."""
    head, names = safetensors_header(tensors, metadata)
    with whole_file(path) as file:
        file.write(head)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Returns (tensors, metadata). Every length, offset and shape is checked before it is used.

    Raises InputError naming the file when it is missing, truncated or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing")
    damaged = f"{path} is not a whole safetensors file: "
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(damaged + f"it has {size} bytes, and its header alone claims {length}")
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    (begin, end), shape = entry["data_offsets"], entry["shape"]
                    # The product without zeros: torch computes strides even of a tensor without elements.
                    if (type(shape) is not list or len(shape) > 8
                            or any(type(number) is not int or not 0 <= number < 2 ** 62
                                   for number in (begin, end, *shape))
                            or math.prod(number or 1 for number in shape) >= 2 ** 62):
                        raise ValueError(f"tensor '{name}' has shape {shape} and offsets {begin}, {end}")
                    entries[name] = DTYPES[entry["dtype"]], shape, begin, end
            metadata = dict(header.get("__metadata__") or {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(damaged + f"its header cannot be read ({type(error).__name__}: {error})") from None
        data = bytearray(size - 8 - length)
        file.readinto(data)             # into place: read() and a copy would take twice the memory
    expected = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if end - begin != math.prod(shape) * dtype.itemsize or begin != expected:
            raise InputError(damaged + f"tensor '{name}' of shape {shape} claims bytes {begin} to {end}")
        expected = end
    if expected != len(data):
        raise InputError(damaged + f"{expected} bytes of tensors are announced, {len(data)} are there")
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end or begin % dtype.itemsize == 0:
            raw = (torch.frombuffer(data, dtype=torch.uint8)[begin:end] if end > begin else
                   torch.empty(0, dtype=torch.uint8))
        else:
            raw = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)
        if dtype == torch.bool and bool((raw > 1).any()):
            raise InputError(damaged + f"tensor '{name}' holds bytes that are neither 0 nor 1")
        tensors[name] = raw.view(dtype).view(shape)
    return tensors, metadata


# ---------------------------------------------------------------------------------------------------------------------
# Model directories

def read_json(path):
    """The object in a JSON file; InputError names a file that is missing or is not a JSON object."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, and holds a {type(value).__name__}")
    return value


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


def save(model, directory, labels=None, compression=None):
    """Write config.json, model.safetensors (zeros burned in) and compression.safetensors (masks, activation ranges).

    The masks are stored as bits, eight to a byte, row after row: the name of the weight with `mask_bits` in place of
    `weight`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if model.kind == "classification" and labels is None:      # without names, HuggingFace's tools expect two classes
        labels = [f"LABEL_{i}" for i in range(model.classifier.out_features)]
    masked = {name + ".weight": layer for name, layer in linears(model)}
    weights, extra = {}, {}
    for name, tensor in model.state_dict().items():
        theirs = published_name(model.config.model_type, name)
        weights[theirs] = tensor * masked[name].mask if name in masked else tensor
        if name in masked:
            stem = theirs.removesuffix("weight")
            extra[stem + "mask_bits"] = pack_bits(masked[name].mask)
            extra[stem + "act_range"] = masked[name].act_range
    write_safetensors(directory / "model.safetensors", weights)
    write_safetensors(directory / "compression.safetensors", extra)
    write_file(directory / "config.json",
               json.dumps(config_json(model.config, model.kind, labels, compression), indent=1))


def pack_bits(mask):
    """bool tensor -> uint8 (ceil(numel / 8),), the first element in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack_bits(packed, shape):
    """The inverse of pack_bits, for a tensor on the CPU."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(shape)


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",       # the first that is there is read
                "pytorch_model.bin", "pytorch_model.bin.index.json")


@functools.lru_cache
def fetch(name):
    """A model of the HuggingFace hub, 'owner/name' -> the folder where the hub's own cache keeps it.

    Only what is read here is fetched, with the hub's progress bars: config.json, the tokenizer, and the first of
    WEIGHT_FILES. InputError, one sentence, for a person who is offline or mistyped the name.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()         # its five retries without a network are no news

        print(f"asking the HuggingFace hub for {name}", flush=True)         # offline it takes half a minute to give up
        config = Path(hf_hub_download(name, "config.json"))
        revision = config.parent.name         # the commit, so that every file is of the same one

        def get(file):
            with contextlib.suppress(EntryNotFoundError):          # not in this model; offline: not in the cache
                return Path(hf_hub_download(name, file, revision=revision))

        tokenizer = [get(file) for file in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")]
        weights = next(filter(None, map(get, WEIGHT_FILES)), None)
        if weights is None or not any(tokenizer[1:]):
            raise FileNotFoundError("its weights or its vocabulary are not there")
        if weights.suffix == ".json":
            for file in sorted(set(read_json(weights)["weight_map"].values())):
                hf_hub_download(name, file, revision=revision)
    except Exception as error:                # network, hub and cache raise many kinds, and all mean: it is not here
        kind, first_line = type(error).__name__, str(error).strip().split("\n")[0].rstrip(".")
        reason = {"RepositoryNotFoundError": "it has no public model of that name",
                  "LocalEntryNotFoundError": "it cannot be reached"}.get(kind, first_line or kind)
        raise InputError(f"{name} is no folder here and could not be fetched from the HuggingFace hub ({reason}); "
                         f"check the name, or put its config.json, vocab.txt and model.safetensors or "
                         f"pytorch_model.bin into the folder {Path(name).absolute()} and type the same command "
                         f"again") from None
    return config.parent


def locate(name):
    """A model as a person names it, a folder or 'owner/name' of the HuggingFace hub -> its folder (Path)."""
    if Path(name).is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return Path(name)
    return fetch(str(name))


def read_tensors(directory):
    """The tensors of the first of WEIGHT_FILES that is there, by the names they have in it; an index stands for all the
    files that it lists. Returns (dict, path). InputError names what is missing or damaged."""
    path = next((path for path in (Path(directory) / name for name in WEIGHT_FILES) if path.is_file()), None)
    if path is None:
        raise InputError(f"{directory} holds neither model.safetensors nor pytorch_model.bin, whole or with an index")
    if path.suffix != ".json":
        return read_weight_file(path), path
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file
                                              for file in files.values()):
        raise InputError(f"{path} has no weight_map from names of tensors to files of its own folder")
    tensors = {}
    for file in sorted(set(files.values())):
        tensors.update(read_weight_file(path.with_name(file)))
    lost = [name for name in files if name not in tensors]
    if lost:
        raise InputError(f"{path} lists {len(lost)} tensors that its files do not hold: {names_in_short(lost)}")
    return tensors, path


def read_weight_file(path):
    """A .safetensors file, or one that torch.save wrote, as a dict of tensors; of a pickle nothing else is loaded."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()):
            raise TypeError("not every entry is a tensor with a name")
    except Exception as error:          # torch raises many kinds here, and all mean: no plain checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a dictionary of tensors: {reason}") from None
    return tensors


# What training with the paper's reference code leaves in a file beside the model: its teacher (distiller.py there), and
# the state of its fake quantization (quantization/qat.py).
LEFTOVERS = re.compile(r"_?teacher\.|.*\.(weight|input|output)_fake_quant\.|.*\.(_step|fake_quant_enabled)$")


def read_weights(directory, say=print):
    """All weights of a model directory by their published names: backbone prefix and old spellings normalized, masks
    multiplied in, what training left there, buffers and copies of the tied decoder removed.

    say: told what was left out or changed. Returns (dict, path of the file).
    """
    model_type = read_config(directory)[0].model_type
    tensors, path = read_tensors(directory)
    prefix = model_type + "."
    bare = not any(name.startswith(prefix) for name in tensors)
    found, leftovers = {}, []
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if bare and name.split(".")[0] in ("embeddings", "encoder", "transformer", "pooler"):
            name = prefix + name
        if LEFTOVERS.match(name):
            leftovers.append(name)
        elif not name.endswith("position_ids"):
            found[name] = tensor
    if leftovers:
        say(f"{path}: leaves out {len(leftovers)} tensors that training left there: {names_in_short(leftovers, 3)}")
    strange = [name for name, tensor in found.items() if tensor.layout != torch.strided
               or not (tensor.is_floating_point() or name.endswith("_mask"))]
    if strange:
        raise InputError(f"{path}: {names_in_short(strange)} should hold floating-point numbers, and '{strange[0]}' "
                         f"holds {found[strange[0]].dtype}")
    multiply_masks(found, path, say)
    drop_tied_copies(found, model_type)
    others = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.values()} - {"float32"})
    if others:
        say(f"{path}: holds {' and '.join(others)} numbers; the model computes with them in float32")
    return found, path


def multiply_masks(found, path, say):
    """W = W_original * W_mask: so the paper's reference code stores a weight while it is being pruned
    (pruning/methods/method.py there). In place. A mask beside a plain W is multiplied into that."""
    masked = [name.removesuffix("_mask") for name in found if name.endswith("_mask")]
    for name in masked:
        mask = found.pop(name + "_mask")
        weight = found.pop(name + "_original", found.get(name))
        if weight is None or weight.shape != mask.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"{path}: '{name}_mask' does not hold a 0 or 1 for each number of '{name}'")
        found[name] = weight * mask
    if masked:
        say(f"{path}: was saved while it was being pruned; {len(masked)} weights are taken times their masks")


def drop_tied_copies(found, model_type):
    """Remove the decoder's copies of the word embeddings and of the bias. In place; a decoder that differs stays."""
    word = found.get(published_name(model_type, "encoder.word.weight"))
    bias = published_name(model_type, "bias")
    weight_copy, bias_copy = TIED_DECODER[model_type]
    if weight_copy in found and word is not None and torch.equal(found[weight_copy], word):
        del found[weight_copy]
    if bias_copy in found:
        found.setdefault(bias, found.pop(bias_copy))


def is_head(name, model_type):
    """Is this published name one of a task's own layers, which a model for another task has no place for? The pooler
    and a decoder of its own count as such."""
    heads = ("encoder.pooler", "transform", "transform_norm", "bias", "next_sentence", "pre_classifier", "classifier",
             "span")
    published = [NAMES[model_type][ours] for ours in heads if ours in NAMES[model_type]]
    return name in (*published, TIED_DECODER[model_type][0]) or name.startswith(tuple(head + "." for head in published))


def load(directory, kind, num_labels=None, fresh_head=False, say=print):
    """Read a model directory into a model of the given kind, on the CPU, in float32.

    Strict: every tensor of the encoder must be there with its shape, and nothing unknown may be; only heads (and the
    pooler, which masked-language-model files leave out) may be missing, if fresh_head, and then `say` is told.
    num_labels: classes of a classification head; None takes the directory's.
    Raises InputError naming the file and the tensors.
    """
    config, _ = read_config(directory)
    found, path = read_weights(directory, say)
    check_claims(config, found, path)
    decoder = TIED_DECODER[config.model_type][0]
    if decoder in found and kind == "pretraining":
        raise InputError(f"{path}: '{decoder}' differs from the word embeddings; this network ties the two")
    if kind == "classification" and num_labels is None:
        head = found.get("classifier.weight")
        if head is None or head.ndim != 2:
            raise InputError(f"{path} has no classifier; give a directory that was fine-tuned on a classification task")
        num_labels = head.shape[0]
    model = build(config, kind, num_labels or 2)
    wanted = {published_name(config.model_type, name): tensor for name, tensor in model.state_dict().items()}
    if fresh_head:                              # a head for another task (another shape) counts as missing
        found = {name: tensor for name, tensor in found.items()
                 if not (name in wanted and name.startswith("classifier.") and tensor.shape != wanted[name].shape)}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    fatal = [name for name in missing if not (fresh_head and is_head(name, config.model_type))]
    if fatal:
        raise InputError(f"{path} lacks {len(fatal)} of the model's {len(wanted)} tensors: {names_in_short(fatal)}")
    strange = [name for name in unexpected if not is_head(name, config.model_type)]
    if strange:
        raise InputError(f"{path} holds {len(strange)} tensors that this model has no place for: "
                         f"{names_in_short(strange)}")
    for name in (name for name in wanted if name in found):
        if found[name].shape != wanted[name].shape:
            raise InputError(f"{path}: '{name}' has shape {list(found[name].shape)}; the configuration asks for "
                             f"{list(wanted[name].shape)}")
        wanted[name].copy_(found[name])         # state_dict shares its memory with the model
    if missing:
        say(f"{path}: starts with fresh weights for {names_in_short(missing)}")
    if unexpected:
        say(f"{path}: leaves out {names_in_short(unexpected)}")
    load_compression(model, directory, fresh=missing)
    return model


def check_claims(config, found, path):
    """InputError if config.json asks for far more than the file holds, before memory is taken for that. What merely
    lacks some tensors passes: `load` will name them."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    wanted = hidden * (layers * (4 * hidden + 2 * config.intermediate_size) + config.vocab_size
                       + config.max_position_embeddings)
    held = sum(tensor.numel() for tensor in found.values())
    if layers > len(found) or wanted > 10 * held + 2 ** 20:
        raise InputError(f"{path} holds {held:,} numbers in {len(found)} tensors, and config.json asks for {layers:,} "
                         f"layers with {wanted:,}; they do not belong together")


def load_compression(model, directory, fresh=()):
    """Masks and activation ranges from compression.safetensors, where a directory has that file.

    fresh: published names of the weights that were not loaded; those layers keep the slots of a new layer. Heads and
    the pooler may lack an entry, the encoder's layers may not.
    """
    path = Path(directory) / "compression.safetensors"
    if not path.is_file():
        return
    tensors, _ = read_safetensors(path)
    for name, layer in linears(model):
        stem = published_name(model.config.model_type, name + ".")
        bits, act_range = tensors.get(stem + "mask_bits"), tensors.get(stem + "act_range")
        if stem + "weight" in fresh or (bits is None and act_range is None and not name.startswith("encoder.layers.")):
            continue
        if bits is None or act_range is None:
            raise InputError(f"{path} lacks '{stem}mask_bits' or '{stem}act_range'")
        if bits.dtype != torch.uint8 or bits.shape != ((layer.mask.numel() + 7) // 8,) or act_range.shape != (2,):
            raise InputError(f"{path}: '{stem}mask_bits' or '{stem}act_range' does not fit the layer's shape "
                             f"{list(layer.weight.shape)}")
        layer.mask.copy_(unpack_bits(bits, layer.mask.shape))
        layer.act_range.copy_(act_range)


def names_in_short(names, limit=6):
    """'a, b, c and 4 more'."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
