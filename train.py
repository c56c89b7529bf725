"""Train, prune, fine-tune and quantize: every stage of Prune Once for All (arXiv 2111.05754) through one loop.

    python train.py --stage all                                  the whole method on the bundled tiny world
    python train.py --stage pretrain                             teacher preparation: MLM + next sentence
    python train.py --stage prune --pattern 1x4 --sparsity 0.8   prune a copy of it while distilling from it
    python train.py --stage finetune --task sst2 --sparsity 0    a dense task teacher
    python train.py --stage finetune --task sst2                 the sparse model, its zeros locked, distilling from the
                                                                 teacher
    python train.py --stage quantize --task sst2                 quantization-aware training, then real INT8
    python train.py --stage evaluate --task sst2 --init DIR      the task's metrics of a finished directory
    torchrun --nproc_per_node=8 train.py --stage prune ...       one stage in eight processes, the same batches in all
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy
import tokenizers
import torch
import torch.distributed as dist
from torch.profiler import profile, record_function
from tqdm import tqdm

import distill
import model as network
import prune
import quant
from data import DataError, corpus, shards, tasks, text, tiny
from model import InputError

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Settings: field default < recipe < command line. The trailing comments are what --help prints.

@dataclass
class Settings:
    stage: str = "all"                # which stage to run
    preset: str = ""                  # size and recipe; default: the size of --init, else tiny
    recipe: str = ""                  # size, pattern and hyper-parameters of a published model; 'help' lists them
    init: str = ""                    # model to start from: folder, owner/name on the hub, or 'random'; default: parent
    teacher: str = ""                 # model to distil from: folder, owner/name on the hub, or 'none'; default: parent
    out: str = ""                     # folder under which the stages' directories lie; default: out/PRESET
    resume: bool = False              # go on from the last checkpoint; finished stages are kept as they are
    corpus: str = "tiny"              # text for pretrain and prune: 'tiny', a file or folder of text, a Wikipedia dump
    task: str = ""                    # one task; default for --stage all: all five
    data: str = ""                    # folder that holds SST-2 MNLI QQP QNLI SQuAD; default: the bundled tiny world
    sparsity: float | None = None     # share of zeros in a pruned layer; 0 with finetune: the dense model; default 0.85
    pattern: str = "unstructured"     # unstructured, RxC blocks (1x4: four inputs of one output), or N:M
    mask: str = ""                    # dense, locked, or gradual (pruning during the task); default: the stage's own
    steps: int | None = None          # optimizer steps
    epochs: float | None = None       # passes over the training rows, in place of --steps
    batch_size: int = 32              # rows per optimizer step
    micro_batch: int | None = None    # rows per forward pass of a process; default: all of its share of the batch
    activation_checkpointing: bool = False  # compute each layer again in the backward pass: less memory, more time
    compile: bool = False             # let torch.compile fuse each layer; needs a C++ compiler on a CPU
    max_len: int | None = None        # tokens per row, at most; default of evaluate: as trained, else 384 or 128
    lr: float = 1e-4                  # peak learning rate
    beta2: float = 0.999              # AdamW's memory of squared gradients
    warmup: float = 0.01              # share of the steps with rising learning rate
    weight_decay: float = 0.01        # AdamW's decay of matrices; biases and LayerNorm have none
    clip: float = 1.0                 # largest gradient norm
    dropout: float | None = None      # of attention, residual sums and heads; default: what the configuration says
    temperature: float = 2.0          # of the distillation's softmax
    kd_weight: float = 0.5            # share of the loss that comes from the teacher, 0 to 1
    kd_positions: str = "all"         # where pre-training distils: all (not padding) or masked (cheaper)
    ramp_end: float = 0.5             # share of the steps after which the target sparsity is reached
    update_end: float = 0.8           # share of the steps after which masks are frozen
    update_every: float = 0.01        # share of the steps between two mask updates and learning-rate rewinds
    activation_bits: int | None = None  # 7 or 8; default: 7 where this CPU's INT8 product would saturate, else 8
    weight_scales: str = "row"        # INT8 scales of weights: row (one per output) or tensor (the paper's reference)
    precision: str = "auto"           # fp32, bf16 (autocast), or auto: bf16 if the device multiplies it; QAT is fp32
    seed: int = 0                     # of weights, batches, dropout and masking
    threads: int | None = None        # CPU threads of a process; default: all cores it may use, shared with its like
    device: str = "cpu"               # cpu, cuda or mps
    save_every: int | None = None     # steps between checkpoints, in place of --save-minutes
    save_minutes: float = 5.0         # minutes between checkpoints
    keep: int = 2                     # newest checkpoints to keep
    log_every: int = 10               # steps between two lines of log.csv
    profile: bool = False             # time a few steps of the stage, show where the time goes, and write nothing
    watch: str = ""                   # show how the run in this directory stands, from its log; nothing else is done


LEAST_SPARSITY = 0.01      # a model with fewer zeros than that is dense: some weights of any model are rounded to zero
# May differ when a run is resumed: none of these changes what is computed, but for the rounding of sums.
NOT_PART_OF_THE_RUN = ("resume", "out", "micro_batch", "activation_checkpointing", "compile", "threads", "save_every",
                       "save_minutes", "keep", "log_every", "profile", "watch")
FINGERPRINT_BYTES = 32 << 20      # read of a file's beginning, and again of its end, to know it again
SILENCE = datetime.timedelta(minutes=30)    # how long processes wait for one another before they give up

# What differs from the field defaults, per recipe and kind of training. 'dense' is the fine-tuning of a task teacher;
# 'dense squad' and the like are laid over it. Where the numbers come from:
#   [1] arXiv 2111.05754, the paper; the appendix with its hyper-parameters was not to be found
#   [2] IntelLabs/Model-Compression-Research-Package: research/prune-once-for-all/teacher_preparation.sh and
#       student_pruning.sh, and the config/iterative_unstructured_magnitude_90_config.json that they name
#   [3] intel/neural-compressor 1.14: optimization_pipeline/prune_once_for_all/fx/README.md under question-answering and
#       text-classification; Intel's reproduction for BERT-Base 90 %, all five tasks
#   [4] huggingface/optimum-intel 73640b1b0: examples/neural_compressor, README.md of question-answering and
#       text-classification; the same for DistilBERT 90 %, SQuAD and SST-2
#   [5] neuralmagic/mlperf_inference_results_v2.1: open/NeuralMagic/prune-ofa_large.md; BERT-Large 80 % 1x4
#   [6] arXiv 1810.04805 (BERT), appendix A.3: the ranges for fine-tuning a dense model
PAPER = {
    # 100,000 steps of 256 rows, 1 % warm-up, decay 0.01 [2]; rows as long as the model takes them [1]. The learning
    # rate is not published: [2] leaves it at its library's 5e-5, oBERT (arXiv 2203.07259) takes 1e-4 for its teacher.
    "pretrain": dict(steps=100_000, batch_size=256, max_len=512, lr=1e-4, warmup=0.01, weight_decay=0.01),
    # The same again, half the loss from the teacher at temperature 2; of 100,000 steps the ramp takes 50,000, masks are
    # re-selected until 80,000, every 1,000 [2]. BERT-Large: "the same hyper-parameters" [5]; DistilBERT: not published.
    "prune": dict(steps=100_000, batch_size=256, max_len=512, lr=1e-4, warmup=0.01, weight_decay=0.01, kd_weight=0.5,
                  temperature=2.0, ramp_end=0.5, update_end=0.8, update_every=0.01),
    # Task teachers: not published ([3] and [4] download theirs). Epochs, rows and lengths: [2]'s examples; rate: [6].
    "dense": dict(epochs=3, batch_size=32, max_len=128, lr=2e-5, warmup=0.1),
    "dense squad": dict(epochs=2, batch_size=12, max_len=384, lr=3e-5),
    # Everything [3], at 85 % and 1x4 not published; no decay or warm-up there, and only the teacher counts.
    "finetune": dict(epochs=9, batch_size=32, max_len=128, lr=1e-4, warmup=0.0, weight_decay=0.0, kd_weight=1.0,
                     temperature=2.0),
    "finetune squad": dict(epochs=8, batch_size=12, max_len=384, lr=1.5e-4),
    "quantize": dict(epochs=3, batch_size=32, max_len=128, lr=1e-5, warmup=0.0, weight_decay=0.0, kd_weight=1.0,
                     temperature=2.0),
    "quantize squad": dict(epochs=2, batch_size=12, max_len=384),
}
DISTILBERT = {
    **PAPER,
    # [4] for SST-2 and SQuAD; for the other tasks nothing is published, so they have SST-2's numbers. The teacher's
    # share is not published either: [3]'s.
    "finetune": dict(epochs=9, batch_size=32, max_len=128, lr=1.5e-4, warmup=0.0, weight_decay=0.0, kd_weight=1.0),
    "finetune squad": dict(epochs=8, batch_size=12, max_len=384, lr=1.8e-4, warmup=0.05, weight_decay=0.01),
    "quantize": dict(epochs=3, batch_size=32, max_len=128, lr=1e-6, warmup=0.01, weight_decay=0.01, kd_weight=1.0),
    "quantize squad": dict(epochs=2, batch_size=12, max_len=384, lr=1e-5, warmup=0.1, weight_decay=0.0),
}
RECIPES = {
    "tiny": {
        "pretrain": dict(steps=1700, batch_size=64, max_len=48, lr=3e-3, beta2=0.98, warmup=0.05, dropout=0.0),
        "prune": dict(steps=1000, batch_size=64, max_len=48, lr=2e-3, beta2=0.98, warmup=0.05, dropout=0.0),
        "dense": dict(epochs=8, max_len=64, lr=4e-4, beta2=0.98, warmup=0.1, dropout=0.0),
        "finetune": dict(epochs=4, max_len=64, lr=8e-4, beta2=0.98, warmup=0.1, dropout=0.0, kd_weight=0.8),
        "finetune squad": dict(epochs=8, lr=1e-3),
        "quantize": dict(epochs=1, max_len=64, lr=1e-4, beta2=0.98, warmup=0.1, dropout=0.0, kd_weight=0.8),
    },
    "minilm-l6": {
        "pretrain": dict(dropout=0.0, steps=1000, batch_size=32, max_len=128, lr=2e-4),
        "prune": dict(dropout=0.0, steps=500, batch_size=32, max_len=128, lr=5e-4, kd_positions="masked"),
        "dense": dict(epochs=1, max_len=128, lr=5e-5, warmup=0.06),
        "dense squad": dict(epochs=1, max_len=384, lr=1e-4),
        "finetune": dict(epochs=1, max_len=128, lr=1e-4, warmup=0.02, kd_weight=1.0),
        "finetune squad": dict(epochs=1, max_len=384, lr=1.5e-4),
        "quantize": dict(epochs=0.25, max_len=128, lr=1e-5, warmup=0.02, kd_weight=1.0),
        "quantize squad": dict(epochs=0.25, max_len=384),
    },
    "distilbert-base": DISTILBERT, "bert-base": PAPER, "bert-large": PAPER,

    # The published models. 'model' holds for every stage; 'pretrain' prepares the dense model that was published [1].
    "bert-base-85-unstructured": {
        **PAPER, "model": dict(preset="bert-base", pattern="unstructured", sparsity=0.85),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-85-unstructured-pruneofa"]},
    "bert-base-90-unstructured": {
        **PAPER, "model": dict(preset="bert-base", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-90-unstructured-pruneofa"]},
    # After the paper, of which nothing is published but the models: the numbers are those of the unstructured one.
    "bert-base-80-1x4": {
        **PAPER, "model": dict(preset="bert-base", pattern="1x4", sparsity=0.8),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-base-uncased"),
        "published": ["bert-base-uncased-sparse-80-1x4-block-pruneofa",
                      "bert-base-uncased-squadv1.1-sparse-80-1x4-block-pruneofa"]},
    # Wikipedia and BookCorpus [5]. SQuAD: 32 rows as 4 x 8 of 384 tokens [5]; epochs and rate not published (a recipe
    # that [5] downloads), so [3]'s for BERT-Base.
    "bert-large-80-1x4": {
        **PAPER, "model": dict(preset="bert-large", pattern="1x4", sparsity=0.8),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-large-uncased"),
        "finetune squad": dict(epochs=8, batch_size=32, micro_batch=8, max_len=384, lr=1.5e-4),
        "quantize squad": dict(epochs=2, batch_size=32, micro_batch=8, max_len=384),
        "published": ["bert-large-uncased-sparse-80-1x4-block-pruneofa",
                      "bert-large-uncased-squadv1.1-sparse-80-1x4-block-pruneofa"]},
    # Transfer: not published, so [3]'s for BERT-Base.
    "bert-large-90-unstructured": {
        **PAPER, "model": dict(preset="bert-large", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="google-bert/bert-large-uncased"),
        "published": ["bert-large-uncased-sparse-90-unstructured-pruneofa"]},
    "distilbert-base-85-unstructured": {
        **DISTILBERT, "model": dict(preset="distilbert-base", pattern="unstructured", sparsity=0.85),
        "pretrain": dict(**PAPER["pretrain"], init="distilbert/distilbert-base-uncased"),
        "published": ["distilbert-base-uncased-sparse-85-unstructured-pruneofa"]},
    "distilbert-base-90-unstructured": {
        **DISTILBERT, "model": dict(preset="distilbert-base", pattern="unstructured", sparsity=0.9),
        "pretrain": dict(**PAPER["pretrain"], init="distilbert/distilbert-base-uncased"),
        "published": ["distilbert-base-uncased-sparse-90-unstructured-pruneofa"]},
}
CHOICES = {
    "stage": ("pretrain", "prune", "finetune", "quantize", "evaluate", "all"), "preset": tuple(network.PRESETS),
    "recipe": (*(name for name in RECIPES if "published" in RECIPES[name]), "help"),
    "task": tuple(tasks.TASKS), "mask": ("dense", "locked", "gradual"), "kd_positions": ("all", "masked"),
    "weight_scales": ("row", "tensor"), "precision": ("auto", "fp32", "bf16"), "device": ("cpu", "cuda", "mps"),
    "activation_bits": (7, 8),
}


class Parser(argparse.ArgumentParser):
    """argparse whose error is one sentence."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {close[0]}?" if close else
                                                      "; python train.py --help lists them all")
        print(f"train.py: {message}", file=sys.stderr)
        sys.exit(2)


def parse_settings(arguments):
    """Command line -> (Settings with defaults, dict of what was typed). Exits with code 2 on an unknown flag or
    value."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.M))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=comments[field.name])
            continue
        kind = next(kind for kind in (int, float, str)
                    if kind is field.type or kind in getattr(field.type, "__args__", ()))
        default = "" if field.default in ("", None) else f" [{field.default}]"
        parser.add_argument(flag, type=kind, choices=CHOICES.get(field.name), metavar=None if field.name in CHOICES else
                            kind.__name__.upper(), help=comments[field.name].replace("%", "%%") + default)
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def resolve(typed, stage=None):
    """Lay recipe and command line over the defaults, fill in what depends on other settings, check every value.

    typed: dict of what the command line named. Returns Settings. Raises InputError.
    """
    s = Settings(**{**typed, "stage": stage or typed.get("stage", "all")})
    model = RECIPES[s.recipe]["model"] if s.recipe else {}
    if not s.preset:
        shape = preset_of(network.locate(s.init)) if s.init not in ("", "random") else ""
        s.preset = model.get("preset") or shape or "tiny"
        if shape not in ("", s.preset):
            raise InputError(f"--recipe {s.recipe} is for {s.preset}, and {s.init} is a {shape}; take another of the "
                             f"two, or give --preset {shape} as well")
    kind = "dense" if s.stage == "finetune" and s.sparsity == 0 else s.stage
    recipe = RECIPES[s.recipe or s.preset]
    recipe = {**model, **recipe.get(kind, {}), **recipe.get(f"{kind} {s.task}", {})}
    if "steps" in typed or "epochs" in typed:
        recipe = {name: value for name, value in recipe.items() if name not in ("steps", "epochs")}
    s = replace(s, **{name: value for name, value in recipe.items() if name not in typed})
    s.out = s.out or str(Path("out") / s.preset)
    pattern = prune.parse_pattern(s.pattern)
    if s.stage == "pretrain" and typed.get("sparsity") is None:
        s.sparsity = 0.0
    if s.sparsity != 0:
        s.sparsity = prune.resolve_sparsity(s.sparsity, pattern)
    s.mask = s.mask or allowed_masks(s)[0]
    s.micro_batch = s.micro_batch or s.batch_size
    s.activation_bits = s.activation_bits or quant.default_activation_bits()
    s.threads = s.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    check(s)
    if s.mask == "locked" and s.init not in ("", "random"):
        follow_zeros(s, {**recipe, **typed})
    if s.stage in ("quantize", "evaluate"):
        s.precision = "fp32"              # bf16 would round the very grid of a quantized model
    elif s.precision == "auto":
        s.precision = "bf16" if has_bf16(s.device) else "fp32"
    return s


def deciding(s):
    """{setting: value} of those that decide what is computed."""
    return {name: value for name, value in asdict(s).items() if name not in NOT_PART_OF_THE_RUN}


def allowed_masks(s):
    """What --mask may be for this stage and sparsity, the default first."""
    locked = ("locked",) if s.sparsity else ("dense",)
    return {"pretrain": ("dense",), "prune": ("gradual",), "quantize": locked,
            "finetune": (*locked, "gradual") if s.sparsity else locked}.get(s.stage, ("",))


def preset_of(directory):
    """The preset whose shape a model directory has; InputError if there is none."""
    config, _ = network.read_config(directory)
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name, preset in network.PRESETS.items():
        if all(getattr(config, field) == getattr(preset, field) for field in shape):
            return name
    raise InputError(f"{directory} has {config.num_hidden_layers} layers of {config.hidden_size}: the shape of no "
                     f"preset; name the recipe to use with --preset {'|'.join(network.PRESETS)}")


def follow_zeros(s, chosen):
    """Set pattern and sparsity of a locked stage to those of the zeros in --init, from the encoder's weights there.

    chosen: dict of what recipe and command line say; InputError where that is something else.
    """
    directory = network.locate(s.init)
    config, raw = network.read_config(directory)
    weights, _ = network.read_weights(directory, say=lambda line: None)
    names = [network.published_name(config.model_type, f"encoder.layers.{i}.{kind}.weight")
             for i in range(config.num_hidden_layers) for kind in prune.KINDS if kind != "pooler"]
    masks = [weights[name] != 0 for name in names if name in weights and weights[name].ndim == 2]
    sparsity = 1 - sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))
    if not masks or sparsity < LEAST_SPARSITY:
        return                                        # prepare_layers says that there is nothing to lock
    recorded, hints = raw.get("compression"), []      # an earlier stage of ours wrote down its pattern, say 2:4
    for name in (chosen.get("pattern"), recorded.get("pattern") if isinstance(recorded, dict) else None):
        with contextlib.suppress(InputError, TypeError):
            hints.append(prune.parse_pattern(name))
    found = prune.find_pattern(masks, hints)
    share = chosen.get("sparsity")
    if "pattern" in chosen and found != hints[0] or share is not None and abs(share - sparsity) > 0.01:
        words = [f"--{name} {chosen[name]}" for name in ("pattern", "sparsity") if chosen.get(name) is not None]
        source = f" (of --recipe {s.recipe})" if s.recipe else ""
        raise InputError(f"the zeros of {s.init} are {found} and {sparsity:.1%} of its encoder, and {' '.join(words)}"
                         f"{source} is something else; leave that out to lock what is there, or give another --init")
    s.pattern = str(found)
    s.sparsity = share or (prune.resolve_sparsity(None, found) if found.group else round(sparsity, 2))


def check(s):
    """InputError for a value outside its range."""
    def demand(good, name, expected):
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)} is out of range; give {expected}")

    for name in ("steps", "epochs", "batch_size", "micro_batch", "threads", "save_every", "keep", "log_every"):
        demand(getattr(s, name) is None or getattr(s, name) > 0, name, "a number above 0")
    for name in ("lr", "clip", "temperature", "save_minutes"):
        demand(0 < getattr(s, name) < math.inf, name, "a number above 0")
    demand(0 < s.beta2 < 1, "beta2", "a number between 0 and 1")
    for name in ("kd_weight", "ramp_end", "update_end", "update_every", "warmup"):
        demand(0 <= getattr(s, name) <= 1, name, "a share from 0 to 1")
    demand(s.dropout is None or 0 <= s.dropout < 1, "dropout", "a probability from 0 to below 1")
    demand(0 <= s.weight_decay < math.inf, "weight_decay", "0 or more")
    demand(s.max_len is None or s.max_len >= 8, "max_len", "8 tokens or more")
    demand(0 <= s.seed < 2 ** 31, "seed", "a whole number from 0 to 2147483647")
    demand(s.batch_size % s.micro_batch == 0, "micro_batch", f"a divisor of the batch size {s.batch_size}")
    if s.steps and s.epochs:
        raise InputError("--steps and --epochs were both given; choose one")
    if s.stage in ("finetune", "quantize") and not s.task:
        raise InputError(f"--stage {s.stage} needs --task {'|'.join(tasks.TASKS)}")
    if s.stage == "pretrain" and s.sparsity:
        raise InputError(f"--stage pretrain trains a dense model; leave out --sparsity {s.sparsity:g}, and give it to "
                         f"--stage prune")
    upstream = s.stage in ("pretrain", "prune") or not s.task
    if s.activation_checkpointing and s.stage == "quantize":
        raise InputError("--activation-checkpointing does not go with --stage quantize, whose activation ranges follow "
                         "every forward pass; give a smaller --micro-batch to save memory")
    if s.recipe and (s.corpus == "tiny" if upstream else not s.data):
        raise InputError(f"--recipe {s.recipe} is for real text, and the default is the bundled tiny world; give "
                         + ("--corpus TEXT, in the paper English Wikipedia" if upstream else "--data FOLDER"))
    if s.stage == "prune" and not s.sparsity:
        raise InputError("--stage prune needs a --sparsity above 0, for example 0.85")
    if s.mask not in allowed_masks(s):
        raise InputError(f"--mask {s.mask} does not go with --stage {s.stage} at --sparsity {s.sparsity:g}; it takes "
                         f"{' or '.join(allowed_masks(s))}")
    if (s.device == "cuda" and not torch.cuda.is_available()
            or s.device == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {s.device} is not available to this PyTorch; leave it out to run on the CPU")
    if s.precision == "bf16" and not has_bf16(s.device):
        raise InputError(f"--precision bf16: this {s.device} does not multiply bf16 in hardware; use --precision fp32")


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_bf16(device):
    """Does the device multiply bf16 faster than float32?"""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---------------------------------------------------------------------------------------------------------------------
# Where things lie: out/PRESET/ pretrain, prune-PATTERN-SPARSITY, TASK/teacher, TASK/sparse-..., TASK/int8-...

def directory_of(s, stage=None):
    """The directory that a stage of these settings writes, or (with `stage`) that another one wrote."""
    stage = stage or ("teacher" if s.stage == "finetune" and s.mask == "dense" else s.stage)
    suffix = f"{s.pattern.replace(':', 'of')}-{s.sparsity:g}"
    names = {"pretrain": "pretrain", "prune": f"prune-{suffix}",
             "teacher": f"{s.task}/{'random' if s.init == 'random' else 'teacher'}",
             "finetune": f"{s.task}/{'gradual' if s.mask == 'gradual' else 'sparse'}-{suffix}",
             "quantize": f"{s.task}/int8-{suffix if s.sparsity else 'dense'}"}
    return Path(s.out) / names[stage]


def parents_of(s):
    """(directory to start from or None, directory of the teacher or None). A missing parent names its command."""
    suffix = f" --pattern {s.pattern} --sparsity {s.sparsity:g}" if s.sparsity else ""
    commands = {"pretrain": "--stage pretrain", "prune": f"--stage prune{suffix}",
                "teacher": f"--stage finetune --task {s.task} --sparsity 0",
                "finetune": f"--stage finetune --task {s.task}{suffix}"}

    def parent(stage, given, flag):
        if given:
            network.read_config(network.locate(given))
            return network.locate(given)
        directory = directory_of(s, stage)
        if not (directory / "metrics.json").is_file():
            common = (f"--recipe {s.recipe} " if s.recipe else "") + f"--preset {s.preset} --out {s.out}"
            raise InputError(f"{directory} has no finished run, which --stage {s.stage} starts from; make it with "
                             f"'python train.py {commands[stage]} {common}', or name another with --{flag}")
        return directory

    start = {"pretrain": None, "prune": "pretrain", "quantize": "finetune" if s.sparsity else "teacher",
             "finetune": "prune" if s.mask == "locked" else "pretrain"}[s.stage]
    random = s.init == "random" or (s.stage == "pretrain" and not s.init)
    if random and s.stage in ("prune", "quantize"):
        raise InputError(f"--stage {s.stage} cannot start from random weights; give --init a trained model")
    init = None if random else parent(start, s.init, "init")
    alone = s.stage == "pretrain" or (s.stage == "finetune" and s.mask == "dense")
    if s.teacher == "none" or (alone and not s.teacher):
        return init, None
    return init, parent("pretrain" if s.stage == "prune" else "teacher", s.teacher, "teacher")


def data_folder(s):
    """Folder of the task files, made first if it is the tiny world."""
    return Path(s.data) if s.data else tiny.ensure(HERE / "data" / "tiny")


def corpus_path(s):
    return tiny.ensure(HERE / "data" / "tiny") / "corpus.txt" if s.corpus == "tiny" else Path(s.corpus)


def fingerprints(s, init, teacher):
    """{setting: 16 digits that name the content of the files it leads to}, to notice that they changed between two
    sessions of a run. Names, sizes and bytes count; of a file above 64 MB the first and the last 32 MB."""
    files = {name: [path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin") or path.name in
                    ("config.json", "tokenizer.json", "vocab.txt")]
             for name, directory in (("init", init), ("teacher", teacher)) if directory}
    if s.task:
        files["data"] = [path for path in (data_folder(s) / tasks.TASKS[s.task].folder).iterdir() if path.is_file()]
    else:
        tokens = corpus_path(s) / "index.json"            # of a folder of tokens: it names the text they come from
        files["corpus"] = [tokens] if tokens.is_file() else corpus.corpus_files(corpus_path(s))
    found = {}
    for name, paths in files.items():
        digest = hashlib.sha256()
        for path in sorted(paths):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(file.tell(), size - FINGERPRINT_BYTES))
                digest.update(file.read(FINGERPRINT_BYTES))
        found[name] = digest.hexdigest()[:16]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun. Each takes its share of every batch and comes to the same sums, so that their
# models stay the same; the first, rank 0, alone writes and speaks.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(s):
    """Meet the other processes, if torchrun started several; nothing otherwise. InputError where that cannot train."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return
    if s.batch_size % count:
        raise InputError(f"--batch-size {s.batch_size} cannot be shared by {count} processes; give a multiple of them")
    if s.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if s.device == "cuda" else "gloo", timeout=SILENCE)


def demand_agreement(facts):
    """InputError unless every process found the same: another file, CPU or checkpoint would train another model."""
    if not dist.is_initialized():
        return
    found = [None] * processes()
    dist.all_gather_object(found, facts)
    for number, others in enumerate(found):
        for name, value in others.items():
            if value != found[0][name]:
                raise InputError(f"process {number} has {name} {value}, and process 0 has {found[0][name]}; every "
                                 f"machine needs the same command, files and --out folder")


def summed(numbers, device):
    """A dict of numbers, each added up over all processes."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist()))


def add_gradients(model):
    """Replace every gradient by its sum over all processes. Each loss was divided by the counts of all of them."""
    if dist.is_initialized():
        under_way = [dist.all_reduce(parameter.grad, async_op=True) for parameter in model.parameters()
                     if parameter.grad is not None]
        for exchange in under_way:
            exchange.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What a run says goes to the screen and to a file

class Log:
    """`say` prints a line and appends it to log.txt; `row` appends a line to log.csv. Without a directory, silent."""

    def __init__(self, directory, begin_step):
        self.directory, self.header = directory, False
        if not directory:
            return
        self.table = directory / "log.csv"
        if begin_step and self.table.is_file():           # rows after the checkpoint belong to steps that run again
            first, *rows = self.table.read_text(errors="replace").splitlines() or [""]
            kept = [row for row in rows if row.count(",") == first.count(",") and row.split(",")[0].isdigit()
                    and int(row.split(",")[0]) <= begin_step]
            network.write_file(self.table, "".join(line + "\n" for line in (first, *kept) if line))
            self.header = bool(first)
        else:
            network.write_file(self.table, "")
            network.write_file(directory / "log.txt", "")

    def say(self, line=""):
        if self.directory:
            tqdm.write(line)
            with open(self.directory / "log.txt", "a") as file:
                file.write(line + "\n")

    def row(self, values):
        if not self.directory:
            return
        with open(self.table, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self.header:
                writer.writerow(values)
                self.header = True
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in values.values())


def bars(numbers, width=60):
    """Numbers as a line of at most `width` bars, from the least to the largest; each the mean of its share of them."""
    shares = [numbers[len(numbers) * i // width:len(numbers) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares if share]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def run_state(directory):
    """(text that tells how the run in a directory stands, whether it is finished), from run.json and log.csv, which may
    be growing meanwhile: a line that is no row of numbers is passed over. InputError if there is no such run."""
    settings = network.read_json(directory / "run.json").get("settings")
    if not isinstance(settings, dict) or type(settings.get("steps")) is not int or settings["steps"] < 1:
        raise InputError(f"{directory / 'run.json'} does not say how many steps the run has")
    table = directory / "log.csv"
    names, *lines = (table.read_text(errors="replace").splitlines() if table.is_file() else []) or [""]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(dict(zip(names.split(","), map(float, line.split(",")), strict=True)))
    rows = [row for row in rows if {"step", "seconds"} <= row.keys()
            and all(abs(value) < 1e30 for value in row.values())]
    finished = (directory / "metrics.json").is_file()
    if not rows:
        return f"{directory}: {settings.get('stage')}, no step logged yet", finished
    steps, last = settings["steps"], rows[-1]
    left = last["seconds"] / max(1, last["step"]) * (steps - last["step"])
    state = [f"{directory}: {settings.get('stage')}, step {last['step']:,.0f} of {steps:,} "
            f"({last['step'] / steps:.0%}) after {last['seconds'] / 60:,.1f} minutes, "
            + ("finished" if finished else f"about {left / 60:,.1f} to go")
            + f"; last logged {time.time() - table.stat().st_mtime:,.0f} s ago"]
    for name in last:
        numbers = [row[name] for row in rows if name in row]
        if name not in ("step", "seconds"):
            state.append(f"{name:<18}{bars(numbers):<60}  {numbers[0]:>10.4g} to {numbers[-1]:<10.4g}")
    return "\n".join(state), finished


def watch(directory):
    """Print the state of a run: once into a file, on a terminal every two seconds until the run is finished."""
    finished = False
    while not finished:
        state, finished = run_state(directory)
        print("\033[H\033[2J" * sys.stdout.isatty() + state, flush=True)
        if not sys.stdout.isatty():
            return
        time.sleep(0 if finished else 2)


def describe_run(s, init, teacher, inputs):
    """What run.json holds beside the settings. inputs: what `fingerprints` found."""
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"settings": asdict(s), "parent": str(init) if init else None,
            "teacher": str(teacher) if teacher else None, "fingerprints": inputs, "processes": processes(),
            "git_commit": commit.stdout.strip() or None, "python": platform.python_version(),
            "torch": torch.__version__, "numpy": numpy.__version__, "tokenizers": tokenizers.__version__,
            "machine": platform.machine(), "processor": network.processor_name(), "cores": cores(),
            "system": platform.platform()}


# ---------------------------------------------------------------------------------------------------------------------
# One stage

def run_stage(s):
    """Everything that differs between stages is chosen here; then comes the one loop. Returns the directory written."""
    init, teacher_directory = parents_of(s)
    out = directory_of(s)
    if (out / "metrics.json").is_file():
        if s.resume:
            print(f"{out}: already finished, kept as it is")
            return out
        raise InputError(f"{out} holds a finished run; keep it with --resume, write elsewhere with --out, or remove it")
    if checkpoints(out) and not s.resume:
        raise InputError(f"{out} holds a run that has got as far as {checkpoints(out)[0].name}; go on with --resume, "
                         f"write elsewhere with --out, or remove it")
    join_processes(s)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    model, tokenizer, data, notes = build_model_and_data(s, init)
    teacher = load_teacher(s, teacher_directory, model, data, notes.append)
    prepare_layers(s, model)
    if init and prune.measured_sparsity(model) >= LEAST_SPARSITY:
        notes += prune.format_kinds(model)
    s.steps = s.steps or max(1, round(s.epochs * len(data) / s.batch_size))
    s.epochs = None
    inputs = fingerprints(s, init, teacher_directory)
    state = newest_checkpoint(s, inputs, out, notes)
    demand_agreement({**deciding(s), "files": inputs, "checkpoint": state and state["step"]})
    log = begin_directory(s, out, state, describe_run(s, init, teacher_directory, inputs))
    for line in [*notes, *wrapped_settings(s)]:
        log.say("  " + line)
    log.say(f"  {network.count_parameters(model):,} parameters, {s.steps:,} steps of {s.batch_size} rows, "
            f"{len(data):,} rows an epoch; starts from {init or 'random weights'}, "
            f"teacher: {teacher_directory or 'none'}" + f"; {processes()} processes" * (processes() > 1))
    memory = estimate_memory(s, model.to(s.device), teacher)
    log.say(f"  will take about {memory / 1e9:.2f} GB of memory at its peak" + " in each process" * (processes() > 1)
            + f", with rows of {s.max_len} tokens; shorter ones take less" * (model.kind != "pretraining"))
    seconds = train(s, model, teacher, data, inputs, log, out, state)
    if dist.is_initialized():
        dist.destroy_process_group()                      # the rest is for one
    if log.directory:
        finish_stage(s, model, tokenizer, data, log, seconds)
        for path in checkpoints(out):
            path.unlink()
    return out


def begin_directory(s, out, state, description):
    """Make the stage's directory, clear away what a killed process left half-written, and return its Log."""
    if rank() > 0:
        return Log(None, 0)
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(".*.tmp"):
        path.unlink()
    network.write_file(out / "run.json", json.dumps(description, indent=1))
    log = Log(out, state["step"] if state else 0)
    log.say(f"{s.stage}: {out}")
    return log


def wrapped_settings(s):
    """The resolved settings as lines of at most 110 characters."""
    lines = [""]
    for name, value in asdict(s).items():
        word = f"{name}={value}"
        if value in ("", None):
            continue
        if len(lines[-1]) + len(word) > 110:
            lines.append("")
        lines[-1] += word + "  "
    return lines


def build_model_and_data(s, init):
    """(model, tokenizer, data, what there is to say about them), for any stage."""
    notes = []
    pretraining = s.stage in ("pretrain", "prune")
    config = network.read_config(init)[0] if init else network.PRESETS[s.preset]
    if init:
        tokenizer = text.load_tokenizer(init)
    else:
        tokenizer = shards.corpus_tokenizer(corpus_path(s), config.vocab_size)
        config = replace(config, vocab_size=tokenizer.get_vocab_size())
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(f"{init}: the vocabulary has {tokenizer.get_vocab_size()} entries and the model "
                         f"{config.vocab_size}")
    check_length(s.max_len, config)
    if pretraining:
        data = text.PretrainingData(shards.open_corpus(corpus_path(s), tokenizer), tokenizer, s.max_len,
                                    next_sentence=config.model_type == "bert", seed=s.seed)
        kind, num_labels = "pretraining", None
    else:
        data = tasks.TaskData(s.task, data_folder(s), tokenizer, s.max_len, seed=s.seed)
        kind, num_labels = data.kind, len(data.labels) if data.kind == "classification" else None
        notes += data.notes()
    if init:
        model = network.load(init, kind, num_labels, fresh_head=s.stage != "quantize", say=notes.append)
    else:
        model = network.build(config, kind, num_labels or 2)
    return model, tokenizer, data, notes


def check_length(length, config):
    """InputError if the model has no position embeddings for rows of `length` tokens."""
    if length > config.max_position_embeddings:
        raise InputError(f"--max-len {length} is more than the model's {config.max_position_embeddings} positions")


def load_teacher(s, directory, model, data, say):
    """The model to distil from, frozen; None without a directory."""
    if directory is None:
        return None
    classes = {"num_labels": len(data.labels)} if model.kind == "classification" else {}
    return freeze(s, network.load(directory, model.kind, **classes, say=say))


def freeze(s, teacher):
    """Make a model a teacher, in place, and return it. Nothing of it changes any more, so its weights are masked and
    cast to the type of the products once, not in every step."""
    teacher.to(s.device).eval().requires_grad_(False)
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    for _, layer in network.linears(teacher):
        layer.freeze(dtype)
    teacher.encoder.word.to(dtype)
    return teacher


def prepare_layers(s, model):
    """Bring the slots of every Linear, and dropout, into the state that the stage begins with."""
    if s.dropout is not None:
        network.set_dropout(model, s.dropout)
    prune.check_pattern(model, prune.parse_pattern(s.pattern))
    if s.mask == "locked":
        prune.lock(model, [prune.parse_pattern(s.pattern)])
        if prune.measured_sparsity(model) < LEAST_SPARSITY:
            raise InputError(f"--stage {s.stage} locks the zeros of the model it starts from, and {s.init or 'that'} "
                             f"has next to none; prune it first, or give --sparsity 0 for a dense model")
    if s.stage == "quantize":
        quant.prepare(model, s.activation_bits, s.weight_scales)
        quant.round_embeddings(model)
    model.encoder.recompute = s.activation_checkpointing
    if s.compile:
        for layer in model.encoder.layers:
            layer.compile()


def ramp_of(s):
    """The settings' shares of the run as optimizer steps, or None where the stage does not prune. InputError if the run
    ends before the ramp does."""
    if s.mask != "gradual":
        return None
    every = max(1, round(s.update_every * s.steps))
    # The last update falls on a multiple of `every` at or after the ramp's end, so that the target is always reached.
    end = math.ceil(s.ramp_end * s.steps / every) * every
    if end >= s.steps:
        raise InputError(f"{s.steps} steps are too few to prune in: the ramp ends after step {end}; give more --steps")
    return prune.Ramp(s.sparsity, 0, end, max(end, math.floor(s.update_end * s.steps)), every)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, before it is needed

# Measured with docs/measure_training_settings.py: what the C library takes for each byte in use, for the gaps between
# tensors. On a GPU nobody has measured it.
HEAP = 1.35


def memory_now():
    """Bytes that this process uses, once the C library has given back what was freed; 0 where the system does not tell
    (only Linux does)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def kept_by_layer(s, model, shape):
    """Bytes that autograd keeps of one layer's forward pass, weights and masks aside: a copy of the layer is run on an
    input of that shape (rows, tokens, hidden size)."""
    layer, kept = copy.deepcopy(model.encoder.layers[0]).train(), {}
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.zeros(shape, device=s.device, requires_grad=True)
    mask = torch.ones(shape[0], 1, 1, shape[1], dtype=torch.bool, device=s.device)
    with (torch.autocast(s.device, dtype=torch.bfloat16, enabled=s.precision == "bf16"),
          torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)):
        output = layer.forward(x, mask)
    del output
    return sum(size for address, size in kept.items() if address not in own)


def estimate_memory(s, model, teacher):
    """The peak of the training to come, in bytes of a process (on a GPU: of its memory), from what is there now: the
    models, data and libraries. To that come AdamW's two numbers for each weight, and then either the gradients, or what
    a forward pass keeps and the logits in flight; both where micro-batches add up gradients."""
    now = torch.cuda.memory_allocated() if s.device == "cuda" else memory_now()      # before a layer is tried below
    rows = min(s.micro_batch, s.batch_size // processes())
    shape = (rows, s.max_len, model.config.hidden_size)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layer, layers, hidden = kept_by_layer(s, model, shape), len(model.encoder.layers), 4 * math.prod(shape)
    # A layer that is run again has its gradients beside it; without that, earlier layers' room takes them.
    forward = 3 * hidden + (layers * hidden + 2 * layer if s.activation_checkpointing else layers * layer)
    if model.kind == "pretraining":
        words = model.encoder.word.weight
        positions = rows * s.max_len * (1 if teacher and s.kd_positions == "all" else 0.15)
        forward += 3 * 4 * words.numel()                # their gradient: as decoder, as input table, and the sum
        logits, number = positions * len(words), 2 if s.precision == "bf16" else 4
        chunks = min(2, math.ceil(logits / distill.CHUNK_ELEMENTS))                     # the next, before the last goes
        forward += int(number * (1 + bool(teacher)) * chunks * min(distill.CHUNK_ELEMENTS, logits))
    return now + int(HEAP * (2 * weights + (weights + forward if rows * processes() < s.batch_size
                                            else max(weights, forward))))


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def train(s, model, teacher, data, inputs, log, out, state):
    """Optimizer steps from the checkpoint's to s.steps. Batches, dropout, learning rate and sparsity are pure functions
    of (seed, step), so a resumed run ends with the same bits. Returns seconds spent training, earlier sessions
    included."""
    ramp, pattern, warmup = ramp_of(s), prune.parse_pattern(s.pattern), round(s.warmup * s.steps)
    optimizer = make_optimizer(s, model)
    first, earlier = restore(model, optimizer, state) if state else (0, 0.0)
    autocast = torch.autocast(s.device, dtype=torch.bfloat16, enabled=s.precision == "bf16")
    model.train()
    started = saved = window = time.monotonic()
    tokens, sparsity = 0, prune.measured_sparsity(model)
    with interrupts() as interrupted, progress_bar(s, first) as bar, ThreadPoolExecutor(1) as background:
        coming = background.submit(batches_of, s, data, first)
        for step in range(first, s.steps):
            torch.manual_seed((s.seed * 1_000_003 + step) * 64 + rank())
            rate = s.lr * prune.learning_rate_factor(step, s.steps, warmup, ramp)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with record_function("waiting for data"):
                batches = [to_device(batch, s.device) for batch in coming.result()]
            if step + 1 < s.steps:                        # made while this step computes
                coming = background.submit(batches_of, s, data, step + 1)
            count, total, parts = summed(distill.counts(batches), s.device), 0.0, {}
            for batch in batches:
                with autocast:
                    loss, terms = distill.loss(model, teacher, batch, count, s.temperature, s.kd_weight, s.kd_positions)
                with record_function("backward"):
                    loss.backward()
                total += float(loss.detach())
                parts = {name: parts.get(name, 0.0) + value for name, value in terms.items()}
            add_gradients(model)
            with record_function("gradient norm"):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            parts = summed({"loss": total, **parts, "interrupts": len(interrupted)}, s.device)
            total, stop = parts.pop("loss"), parts.pop("interrupts")
            if not math.isfinite(total) or not math.isfinite(float(norm)):
                raise InputError(f"the loss became {total} and its gradient {float(norm)} at step {step}; the last "
                                 f"checkpoint is kept in {out}; try a lower --lr than {s.lr:g}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ramp and prune.updates_at(step, ramp):
                with record_function("mask update"):
                    prune.update_masks(model, step, ramp, pattern)
                sparsity = prune.measured_sparsity(model)

            # Everything below only reports and saves.
            tokens += count["tokens"]
            done = step + 1
            if done % s.log_every == 0 or done == s.steps:
                now = time.monotonic()
                speed, tokens, window = tokens / (now - window), 0, now
                log.row({"step": done, "loss": total, **parts, "learning_rate": rate, "sparsity": sparsity,
                         "gradient_norm": float(norm), "tokens_per_second": speed, "seconds": earlier + now - started})
                bar.set_postfix_str(f"loss {total:.3f}, lr {rate:.1e}, sparsity {sparsity:.1%}, {speed:,.0f} tokens/s",
                                    refresh=False)
            bar.update()
            due = done % s.save_every == 0 if s.save_every else time.monotonic() - saved > 60 * s.save_minutes
            if (due or stop) and log.directory:
                save_checkpoint(s, inputs, out, model, optimizer, done, earlier + time.monotonic() - started)
                saved = time.monotonic()
            if stop:
                bar.close()
                log.say(f"stopped after step {done} of {s.steps}; go on with the same command and --resume")
                sys.exit(130)
    return earlier + time.monotonic() - started


def progress_bar(s, first):
    """On a terminal it moves all the time, in a file a line now and then is enough."""
    return tqdm(total=s.steps, initial=first, desc=s.stage, unit="step", smoothing=0.05, disable=rank() > 0,
                mininterval=0.2 if sys.stderr.isatty() else 20)


def batches_of(s, data, step):
    """This process's share of the step's rows, as a list of micro-batches."""
    share = s.batch_size // processes()
    rows = data.rows(step, s.batch_size, rank() * share, (rank() + 1) * share)
    return [data.collate(rows[i:i + s.micro_batch]) for i in range(0, len(rows), s.micro_batch)]


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def make_optimizer(s, model):
    """AdamW; biases and LayerNorm (all that is not a matrix) are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": s.weight_decay},
                              {"params": others, "weight_decay": 0.0}],
                             lr=s.lr, betas=(0.9, s.beta2), fused=s.device != "mps")


@contextlib.contextmanager
def interrupts():
    """Collects SIGINT and SIGTERM in a list, so that the step under way can end and be saved; a second one stops at
    once, but under torchrun, which passes on what the terminal has already sent."""
    seen = []

    def note(number, frame):
        if seen and processes() == 1:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: train-STEP.pt, in the stage's directory until it is finished

def checkpoints(directory):
    """Their paths, newest first."""
    return sorted(directory.glob("train-[0-9]*.pt"), reverse=True)


def save_checkpoint(s, inputs, directory, model, optimizer, step, seconds):
    """Latent weights, masks, activation ranges, optimizer, step; then remove all but the newest s.keep checkpoints, and
    those of later steps, which only a run that could not use them leaves behind."""
    layers = network.linears(model)
    state = {"settings": asdict(s), "inputs": inputs, "step": step, "seconds": seconds, "model": model.state_dict(),
             "mask": {name: layer.mask for name, layer in layers},
             "act_range": {name: layer.act_range for name, layer in layers}, "optimizer": optimizer.state_dict()}
    path = directory / f"train-{step:09}.pt"
    with network.whole_file(path) as file:
        torch.save(state, file)
    present = checkpoints(directory)
    place = present.index(path)
    for old in present[:place] + present[place + s.keep:]:
        old.unlink()


def newest_checkpoint(s, inputs, directory, notes):
    """The content of the newest whole checkpoint, or None where there is none. What is damaged is skipped, with a line
    in `notes`. InputError if all are damaged, or if the run had other settings or other files than s and inputs."""
    paths = checkpoints(directory)
    for path in paths:
        try:
            with zipfile.ZipFile(path) as file:           # torch.save writes a checksum (CRC-32) with every tensor,
                damaged = file.testzip()                  # and torch.load does not compare it
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, files = state["settings"], state["inputs"]
        except Exception as error:                        # zipfile and torch raise many kinds for a damaged file
            if out_of_memory(error):
                raise
            notes.append(f"{path} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}) "
                         f"and is skipped")
            continue
        for name, value in deciding(s).items():
            if saved.get(name) != value:
                raise InputError(f"{path} was made with --{name.replace('_', '-')} {saved.get(name)}, and now it is "
                                 f"{value}; resume with the same settings, or remove {directory} to start again")
        for name, value in inputs.items():
            if files.get(name) != value:
                raise InputError(f"{path} was made with other files than --{name} {getattr(s, name)} leads to now; put "
                                 f"the old ones back, or remove {directory} to start again")
        notes.append(f"resuming after step {state['step']} of {s.steps}, from {path}")
        return state
    if paths:
        raise InputError(f"none of the {len(paths)} checkpoints in {directory} is whole ({notes[-1]}); remove it to "
                         f"start the stage again")


def restore(model, optimizer, state):
    """Put a checkpoint's tensors back. Returns (steps done, seconds spent)."""
    model.load_state_dict(state["model"])
    for name, layer in network.linears(model):
        layer.mask.copy_(state["mask"][name])
        layer.act_range.copy_(state["act_range"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# After the loop

def finish_stage(s, model, tokenizer, data, log, seconds):
    """Burn the zeros in, recount them, evaluate, and write the model directory; metrics.json comes last."""
    out = directory_of(s)
    prune.burn_in(model)
    metrics = evaluate(s, model, data)
    rows = prune.report(model)
    compression = {"pattern": s.pattern if s.mask != "dense" else "dense", "sparsity": prune.measured_sparsity(model)}
    if s.task:
        compression.update(task=s.task, max_len=s.max_len)
    if s.stage == "quantize":
        compression.update(activation_bits=s.activation_bits, weight_scales=s.weight_scales)
    labels = data.labels if model.kind == "classification" else None
    model.to("cpu")
    network.save(model, out, labels, compression)
    text.save_tokenizer(tokenizer, out)
    if s.stage == "quantize":
        quant.write_int8(model, out)
    if s.mask != "dense":
        log.say(prune.format_report(rows))
    sizes = {name: (out / name).stat().st_size for name in ("model.safetensors", "int8.safetensors")
             if (out / name).exists()}
    result = {"stage": s.stage, **({"task": s.task} if s.task else {}), "metrics": metrics,
              "sparsity": prune.measured_sparsity(model),
              "layers": {name: [weights, zeros] for name, weights, zeros in rows},
              "file_bytes": sizes, "steps": s.steps, "training_seconds": seconds}
    log.say(format_metrics(metrics) + f", sparsity {result['sparsity']:.4%}, {seconds:,.0f} s of training; wrote {out}")
    network.write_file(out / "metrics.json", json.dumps(result, indent=1))


@torch.no_grad()
def evaluate(s, model, data):
    """Metrics of the task, or the losses on the held-out documents."""
    model.eval()
    with torch.autocast(s.device, dtype=torch.bfloat16, enabled=s.precision == "bf16"):
        if model.kind != "pretraining":
            def predict(batch):
                batch = to_device(batch, s.device)
                return model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            return data.evaluate(predict)[0]
        batches = [to_device(batch, s.device) for batch in data.validation_batches(s.batch_size, limit=50)]
        count, sums = distill.counts(batches), {}
        for batch in batches:
            for name, value in distill.loss(model, None, batch, count)[1].items():
                sums[name] = sums.get(name, 0.0) + value
    return {f"validation_{name}_loss": value for name, value in sums.items()}


def format_metrics(metrics):
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def run_evaluate(s):
    """--stage evaluate: load a finished directory as it is stored (rounding included) and print its metrics."""
    if not s.init:
        raise InputError("--stage evaluate needs --init DIR, the model directory to evaluate")
    torch.set_num_threads(s.threads)
    init = network.locate(s.init)
    config, raw = network.read_config(init)
    compression = raw.get("compression", {})
    tokenizer = text.load_tokenizer(init)
    usual = tasks.TASKS[s.task].max_length if s.task else 128
    length = s.max_len or compression.get("max_len") or min(usual, config.max_position_embeddings)
    check_length(length, config)
    if s.task:
        data = tasks.TaskData(s.task, data_folder(s), tokenizer, length, splits=("dev",))
        for note in data.notes():
            print(note)
        model = network.load(init, data.kind)
        if "activation_bits" in compression:
            quant.prepare(model, compression["activation_bits"], compression["weight_scales"])
    else:
        data = text.PretrainingData(shards.open_corpus(corpus_path(s), tokenizer), tokenizer, length,
                                    next_sentence=config.model_type == "bert", seed=s.seed)
        model = network.load(init, "pretraining")
    if prune.measured_sparsity(model) >= LEAST_SPARSITY:
        print("\n".join(prune.format_kinds(model)))
    metrics = evaluate(s, model.to(s.device), data)
    print(f"{s.init}: {format_metrics(metrics)}, sparsity {prune.measured_sparsity(model):.4%}")


# ---------------------------------------------------------------------------------------------------------------------
# --profile

PROFILED_STEPS = 6
PHASES = {"waiting for data": "waiting for data", "student": "student, forward", "teacher": "teacher, forward",
          "VocabularyLoss": "vocabulary, its loss and gradient", "backward": "backward, without the vocabulary",
          "gradient norm": "gradient norm", "Optimizer.step#AdamW.step": "AdamW", "mask update": "mask update"}


def run_profile(s):
    """Run a few steps of a stage and print where a step's time goes, and how fast its matrix products are next to the
    fastest that this machine can do. Nothing is written."""
    init, teacher_directory = parents_of(s)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    model, _, data, notes = build_model_and_data(s, init)
    teacher = load_teacher(s, teacher_directory, model, data, notes.append)
    prepare_layers(s, model)
    # One mask update falls into the steps; a real run has one in every --update-every of its steps.
    s = replace(s, steps=PROFILED_STEPS, epochs=None, ramp_end=0.4, update_every=0.5)
    train(s, model.to(s.device), teacher, data, {}, Log(None, 0), None, None)           # to warm up
    with profile(with_flops=True) as profiler:
        started = time.monotonic()
        train(s, model, teacher, data, {}, Log(None, 0), None, None)
        seconds = time.monotonic() - started
    print(format_profile(profiler.key_averages(), seconds, PROFILED_STEPS))
    work, fastest = sum(event.flops for event in profiler.key_averages()), fastest_product(s)
    print(f"matrix products, attention aside: {work / PROFILED_STEPS / 1e9:,.1f} GFLOP a step, "
          f"{work / seconds / 1e9:,.1f} GFLOP/s; a large one alone in {s.precision}: {fastest / 1e9:,.1f} GFLOP/s; the "
          f"step reaches {work / seconds / fastest:.0%} of that")


def format_profile(events, seconds, steps):
    """A table of PHASES: milliseconds of a step and share of the time. events: what torch.profiler averaged."""
    spent = {PHASES[event.key]: event.cpu_time_total / 1e6 for event in events if event.key in PHASES}
    lines = [f"{'':<36}{'ms a step':>10}{'share':>8}"]
    for phase, part in [*spent.items(), ("the rest", seconds - sum(spent.values())), ("a step", seconds)]:
        lines.append(f"{phase:<36}{1e3 * part / steps:>10,.1f}{part / seconds:>8.1%}")
    return "\n".join(lines)


def fastest_product(s, rows=2048, inner=1024, columns=4096):
    """Operations a second of a large matrix product in the settings' precision, the fastest of five."""
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    left, right = (torch.ones(shape, dtype=dtype, device=s.device) for shape in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(5):
        started = time.monotonic()
        float((left @ right)[0, 0])                       # on a GPU: wait for it
        times.append(time.monotonic() - started)
    return 2 * rows * inner * columns / min(times)


# ---------------------------------------------------------------------------------------------------------------------
# The whole chain

def run_all(typed):
    """Every stage in turn for every task, then the INT8 engine on the files they left, then one table."""
    started = time.monotonic()
    base = resolve({**typed, "task": "", "sparsity": None}, "pretrain")
    later = {name: value for name, value in typed.items() if name not in ("init", "teacher")}
    later.update(preset=base.preset, out=base.out)
    pruned = resolve({**later, "task": ""}, "prune")            # every mistake in the settings shows before step 0
    chains = [(resolve({**later, "task": task, "sparsity": 0.0}, "finetune"),
               *(resolve({**later, "task": task}, stage) for stage in ("finetune", "quantize")))
              for task in ([typed["task"]] if "task" in typed else tasks.TASKS)]
    run_stage(base)
    run_stage(pruned)
    lines = []
    for chain in chains:
        dense, sparse, int8 = (run_stage(s) for s in chain)
        lines.append(table_line(chain[-1].task, dense, sparse, int8, run_engine(chain[-1], int8)))
    table = "\n".join([TABLE_HEAD, *lines, f"{time.monotonic() - started:,.0f} s in all, {base.threads} threads, "
                       f"seed {base.seed}, {network.processor_name()}, torch {torch.__version__}"])
    print("\n" + table)
    network.write_file(Path(base.out) / "table.txt", table + "\n")


def run_engine(s, directory):
    """The task's metrics through the real INT8 engine: what a person would type, in its own process."""
    report = directory / "infer.json"
    command = [sys.executable, str(HERE / "infer_cpu.py"), str(directory), "--engine", "auto", "--evaluate", "--task",
               s.task, "--threads", str(s.threads), "--agreement", "--json", str(report)] + (
                   ["--data", s.data] if s.data else [])
    if subprocess.run(command).returncode:
        raise InputError(f"the INT8 engine could not evaluate {directory}; its message stands above")
    return json.loads(report.read_text())


TABLE_HEAD = (f"{'task':<6} {'metric':<12} {'dense':>7} {'sparse':>7} {'INT8':>7}  {'sparsity':>8}  "
              f"{'dense MB':>8} {'INT8 MB':>8}  engine")


def table_line(task, dense, sparse, int8, engine):
    """One line of the final table, from what the stages and the engine left in their files."""
    name = tasks.TASKS[task].metric
    before, pruned, rounded = (json.loads((path / "metrics.json").read_text()) for path in (dense, sparse, int8))
    megabytes = [before["file_bytes"]["model.safetensors"] / 1e6, rounded["file_bytes"]["int8.safetensors"] / 1e6]
    return (f"{task:<6} {name:<12} {before['metrics'][name]:>7.2%} {pruned['metrics'][name]:>7.2%} "
            f"{engine['metrics'][name]:>7.2%}  {rounded['sparsity']:>8.2%}  {megabytes[0]:>8.2f} {megabytes[1]:>8.2f}  "
            f"{engine['engine']}")


# ---------------------------------------------------------------------------------------------------------------------
# --recipe help

# Rows to train on: GLUE (arXiv 1804.07461), and SQuAD 1.1 cut into pieces of 384 word pieces, 128 apart.
TRAINING_ROWS = {"sst2": 67_349, "mnli": 392_702, "qqp": 363_846, "qnli": 104_743, "squad": 88_524}
GPU = {"bf16": 0.4 * 312e12, "fp32": 0.4 * 19.5e12}       # operations a second: 40 % of what an A100's data sheet says


def operations(s):
    """Floating-point operations of one stage on the full data, as many as there could be: every row --max-len long.

    A multiply and an add are two. Backward counts as two forward passes, the teacher adds one. Zeros are multiplied
    too: a mask saves nothing in training.
    """
    config = network.PRESETS[s.preset]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    forward = layers * (2 * (4 * hidden ** 2 + 2 * hidden * config.intermediate_size) + 4 * hidden * s.max_len)
    if not s.task:                  # the vocabulary: at every token where a teacher is asked about all, else at 15 %
        everywhere = s.stage == "prune" and s.kd_positions == "all"
        forward += 2 * hidden * (hidden + config.vocab_size) * (1 if everywhere else 0.15)
    rows = s.steps * s.batch_size if s.steps else s.epochs * TRAINING_ROWS[s.task]
    return (3 if s.stage == "pretrain" or s.mask == "dense" else 4) * forward * rows * s.max_len


def recipe_table():
    """What --recipe help prints: every recipe's stages with their hyper-parameters, operations and GPU-days."""
    glue = [task for task in tasks.TASKS if task != "squad"]
    stages = [("pretrain", "pretrain", [""], None), ("prune", "prune", [""], None)] + [
        (f"{word} {name}", stage, names, sparsity)
        for word, stage, sparsity in (("teacher", "finetune", 0.0), ("finetune", "finetune", None),
                                      ("quantize", "quantize", None))
        for name, names in (("GLUE", glue), ("SQuAD", ["squad"]))]
    lines = []
    for recipe in CHOICES["recipe"][:-1]:
        size = RECIPES[recipe]["model"]
        lines += [f"{recipe}: {size['preset']}, {size['pattern']}, {size['sparsity']:.0%} zeros; published as",
                  *(f"    Intel/{name}" for name in RECIPES[recipe]["published"]),
                  f"  {'stage':<15}{'how long':>14}{'rows':>6}{'tokens':>8}{'rate':>9}{'warm-up':>9}{'decay':>7}"
                  f"{'operations':>12}{'GPU-days':>10}"]
        days = 0.0
        for label, stage, names, sparsity in stages:
            typed = {"recipe": recipe, "stage": stage, "corpus": "-", "data": "-"}
            typed.update({} if sparsity is None else {"sparsity": sparsity})
            runs = [resolve({**typed, "task": name}) for name in names]
            s, work = runs[0], sum(operations(run) for run in runs)
            days += (cost := work / GPU["fp32" if stage == "quantize" else "bf16"] / 86_400)
            length = f"{s.steps:,} steps" if s.steps else f"{s.epochs:g} epochs"
            lines.append(f"  {label:<15}{length:>14}{s.batch_size:>6}{s.max_len:>8}{s.lr:>9.1e}{s.warmup:>9.0%}"
                         f"{s.weight_decay:>7g}{work:>12.1e}{cost:>10.2g}")
        lines.append(f"  {'all of it':<79}{days:>11.2g}\n")
    return "\n".join(lines) + RECIPE_NOTES


RECIPE_NOTES = """
Operations: two for a multiply and an add; three forward passes a step and one for the teacher; every row as long as it
may be, so real runs, whose rows are shorter, take less. GLUE is SST-2, MNLI, QQP and QNLI together. GPU-days: one A100
at 40 % of its 312e12 operations a second in bf16, and of 19.5e12 in float32, in which quantize trains; the 40 % are an
assumption, nobody has run these here. Which numbers are published, by whom, and which are not stands beside each of
them in RECIPES in train.py; the learning rate of pretrain and prune is not.
"""


def out_of_memory(error):
    """Does this exception say so? Python, PyTorch on the CPU and on CUDA, and C++ below them, each in its own words."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory|bad_alloc|start new thread", str(error))))


def plain_reason(error):
    """One sentence for what went wrong around the program; None for a fault of its own."""
    if isinstance(error, (InputError, DataError)):
        return str(error)
    if out_of_memory(error):
        return ("there is not enough memory; give a smaller --micro-batch or --max-len, and --resume to go on from the "
                "last checkpoint")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}; --resume goes on from the last checkpoint"
    torn = re.compile("gloo|NCCL|distributed|timeout|timed out|pair closure|connection", re.IGNORECASE)
    if dist.is_initialized() and isinstance(error, RuntimeError) and torn.search(str(error)):
        return "another process of this run has stopped or is silent; --resume goes on from the last checkpoint"


def main(arguments=None):
    typed = parse_settings(arguments)
    network.keep_freed_memory()
    try:
        stage = typed.get("stage", "all")
        if typed.get("recipe") == "help":
            print(recipe_table())
        elif "watch" in typed:
            watch(Path(typed["watch"]))
        elif typed.get("profile") and (stage in ("all", "evaluate") or int(os.environ.get("WORLD_SIZE", 1)) > 1):
            raise InputError("--profile takes one training stage, in one process; name it with --stage")
        elif typed.get("profile"):
            run_profile(resolve(typed))
        elif stage in ("all", "evaluate") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"--stage {stage} runs in one process; under torchrun, give one training stage at a time")
        elif stage == "all":
            run_all(typed)
        elif stage == "evaluate":
            run_evaluate(resolve(typed))
        else:
            run_stage(resolve(typed))
    except Exception as error:
        reason = plain_reason(error)
        if reason is None:
            raise
        print(f"train.py: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
