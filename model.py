"""The network: BERT (arXiv 1810.04805) and DistilBERT (arXiv 1910.01108) from one set of modules, and the one `Linear`
that pruning and quantization act on.

Shapes, everywhere in this project:
    B = batch size          T = tokens per row, padding included        H = hidden_size     V = vocab_size
    A = attention heads     D = H / A, size of one head                 N = number of positions a loss asks for
    C = number of classes   F = intermediate_size
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """A person's mistake (flag, file, folder); its message is the one sentence they read before exit code 2."""


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
    span_dropout: float = 0.1             # before DistilBERT's span head; BERT's has none
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

NO_RANGE = (float("inf"), float("-inf"))


def product_type(x):
    """The type that matrix products of x are taken in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """y = x (W * mask)^T + b, with the slots that the other rooms write to.

    mask        bool (out, in), True where a weight lives; written only by prune.py. The latent weight under a False
                entry is kept, so that a pruned weight can return at a later mask update (arXiv 1710.01878). None in a
                frozen layer, whose weight is masked already.
    act_range   float (2,), running minimum and maximum of the input; written only by quant.py. NO_RANGE, whose minimum
                is above its maximum, until something was seen.
    seen        float (2,), the same of the optimizer step under way.
    fake_quant  None, or a function (x, weight, layer) -> (x, weight) that rounds both; set by quant.py, and, to see
                inputs, by data/calibrate.py while a text goes through.
    prunable    False for heads: the layer says what may be pruned, never a pattern over names.
    kernel      None, or a function x -> y that replaces the product at inference; set by infer_cpu.py and native/.

    Input (..., in), output (..., out), both of the weight's dtype (or autocast's).
    """

    def __init__(self, in_features, out_features, prunable=True):
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool), persistent=False)
        self.register_buffer("act_range", torch.tensor(NO_RANGE), persistent=False)
        self.register_buffer("seen", torch.tensor(NO_RANGE), persistent=False)
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
        context = context.transpose(1, 2).reshape(B, T, H)                                      # from (B, A, T, D)
        x = self.attention_norm(x + self.attention_output_dropout(self.attention_output(context)))  # (B, T, H)
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))    # (B, T, H)


class Encoder(nn.Module):
    """Embeddings, layers and, where the model has one, the pooler.

    kernel      None, or a function that replaces `forward` at inference; set only by native/.
    observe     None, or a function that is given the attention mask of every batch; set only by quant.prepare.
    """

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.kernel = self.observe = None
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler and config.model_type == "bert" else None

    def forward(self, input_ids, attention_mask, token_type_ids):
        """input_ids, attention_mask, token_type_ids: int64 (B, T). Returns hidden states (B, T, H)."""
        if self.kernel is not None:
            self.check_length(input_ids.shape[1])
            return self.kernel(input_ids, attention_mask, token_type_ids)
        for x in self.states(input_ids, attention_mask, token_type_ids):
            pass
        return x

    def check_length(self, length):
        """InputError for rows of more tokens than there are position embeddings."""
        most = self.config.max_position_embeddings
        if length > most:
            raise InputError(f"a row of {length} tokens is longer than the model's {most} positions; give --max-len "
                             f"{most} or less")

    def states(self, input_ids, attention_mask, token_type_ids):
        """Yields the hidden states (B, T, H) after each layer in turn."""
        self.check_length(input_ids.shape[1])
        if self.observe is not None:
            self.observe(attention_mask)
        x = self.embedded(input_ids, token_type_ids)
        mask = attention_mask.bool()[:, None, None, :]                                          # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, mask)                                                                  # (B, T, H)
            yield x

    def embedded(self, input_ids, token_type_ids):
        """What the first layer reads, (B, T, H)."""
        x = self.word(input_ids) + self.position.weight[:input_ids.shape[1]]                    # (B, T, H) + (T, H)
        if self.token_type is not None:
            x = x + self.token_type(token_type_ids)                                             # (B, T, H)
        return self.dropout(self.norm(x))

    def pooled(self, hidden):
        """The first token through the pooler's tanh layer: (B, T, H) -> (B, H)."""
        return torch.tanh(self.pooler(hidden[:, 0]))                                            # (B, H)


class EncoderModel(nn.Module):
    """The encoder alone, without a task: hidden states (B, T, H)."""
    kind = "encoder"
    sentence = None         # a formats.sentence.Sentence, if its hidden states are pooled into one vector of a text

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, pooler)

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.encoder(input_ids, attention_mask, token_type_ids)


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
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)                        # (B, T, H)
        features = self.transform_norm(F.gelu(self.transform(hidden[positions])))               # (N, H)
        if self.next_sentence is None:
            return features, None
        return features, self.next_sentence(self.encoder.pooled(hidden))                        # (N, H), (B, 2)

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
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids))               # (B, C)

    def head(self, hidden):
        """Of the encoder's last states (B, T, H)."""
        if self.pre_classifier is None:
            summary = self.encoder.pooled(hidden)                                               # (B, H)
        else:
            summary = F.relu(self.pre_classifier(hidden[:, 0]))                                 # (B, H)
        return self.classifier(self.dropout(summary))                                           # (B, C)


class SpanModel(nn.Module):
    """Extractive question answering: (start logits, end logits), each (B, T). It has no pooler."""
    kind = "span"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, pooler=False)
        self.dropout = nn.Dropout(config.span_dropout) if config.model_type == "distilbert" else nn.Identity()
        self.span = Linear(config.hidden_size, 2, prunable=False)

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.head(self.encoder(input_ids, attention_mask, token_type_ids))               # (B, T) each

    def head(self, hidden):
        """Of the encoder's last states (B, T, H)."""
        logits = self.span(self.dropout(hidden))                                                # (B, T, 2)
        return logits[..., 0], logits[..., 1]                                                   # (B, T) each


def build(config, kind, num_labels=2):
    """A model with fresh weights: kind is 'encoder', 'pretraining', 'classification' or 'span'."""
    if kind == "classification":
        model = ClassificationModel(config, num_labels)
    else:
        model = {"encoder": EncoderModel, "pretraining": PretrainingModel, "span": SpanModel}[kind](config)
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


def freeze(teacher, dtype):
    """Make a model a teacher, in place, and return it. Nothing of it changes any more, so its weights are masked and
    cast to the type of the products, dtype, once and not in every step."""
    teacher.eval().requires_grad_(False)
    for _, layer in linears(teacher):
        layer.freeze(dtype)
    teacher.encoder.word.to(dtype)
    return teacher


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
