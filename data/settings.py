"""What the settings of train.py lead to, and which of them cannot be. `s` is a train.Settings throughout."""
import contextlib
import math
from dataclasses import asdict
from pathlib import Path

import torch

import prune
from data import corpus, shards, tasks, text, tiny
from data.batches import rows_at_once
from data.encode import check_pairs, tiny_world, tokenizer_of
from data.recipes import RECIPES
from formats import model_directory
from formats.command import MOST_THREADS
from formats.config import preset_of, read_config
from formats.hub import locate
from formats.machine import has_bf16
from formats.names import published_name
from formats.patterns import find_pattern
from formats.run import fingerprint
from formats.sentence import LENGTH_FILES
from model import PRESETS, InputError

LEAST_SPARSITY = 0.01      # a model with fewer zeros than that is dense: some weights of any model are rounded to zero

EVALUATED = {"stage", "preset", "init", "task", "data", "corpus", "max_len", "batch_size", "micro_batch", "threads",
             "device"}                                                       # what --stage evaluate may be given

# May differ when a run is resumed: none of these changes what is computed, but for the rounding of sums. --micro-batch
# does where there is dropout, whose random numbers are drawn per forward pass: see `deciding`.
NOT_PART_OF_THE_RUN = ("resume", "out", "micro_batch", "threads")


def preset_for(s):
    """The size that the recipe is for, or that --init has; else tiny. InputError if these two differ."""
    wanted = RECIPES[s.recipe]["model"]["preset"] if s.recipe else ""
    shape = preset_of(locate(s.init)) if s.init not in ("", "random") else ""
    if shape is None and s.stage == "evaluate":             # which has no recipe
        return "tiny"
    if shape is None:
        raise InputError(f"{s.init} has the shape of no preset; name the recipe to use with --preset "
                         f"{'|'.join(PRESETS)}")
    if wanted and shape and shape != wanted:
        raise InputError(f"--recipe {s.recipe} is for {wanted}, and {s.init} is a {shape}; take another of the two, or "
                         f"give --preset {shape} as well")
    return wanted or shape or "tiny"


def recipe_for(s, typed):
    """{setting: value} of what the recipe says about this stage and task. Typed --steps replace its --epochs."""
    recipe = RECIPES[s.recipe or s.preset]
    kind = "dense" if s.stage == "finetune" and s.sparsity == 0 else s.stage
    chosen = {**recipe.get("model", {}), **recipe.get(kind, {}),
              **recipe.get(f"{kind} {s.task or 'text'}", {})}
    if "steps" in typed or "epochs" in typed:
        chosen = {name: value for name, value in chosen.items() if name not in ("steps", "epochs")}
    return chosen


def ramp_of(s):
    """The settings' shares of the run as optimizer steps, or None where the stage does not prune. InputError if the run
    ends before the ramp does."""
    if s.mask != "gradual" or s.criterion == "reconstruction":
        return None
    whole = math.ceil(s.ramp_end / s.update_every) * s.update_every if s.update_every else s.ramp_end
    if whole >= 1:
        raise InputError(f"--ramp-end {s.ramp_end:g} in updates of --update-every {s.update_every:g} leaves no step "
                         f"behind the ramp, over which the learning rate falls; give less")
    every = max(1, round(s.update_every * s.steps))
    # The last update falls on a multiple of `every` at or after the ramp's end, so that the target is always reached.
    end = max(1, math.ceil(s.ramp_end * s.steps / every)) * every
    if end >= s.steps:
        raise InputError(f"{s.steps} steps are too few to prune in: the ramp ends after step {end}; give more --steps")
    if 2 * round(s.warmup * s.steps) > s.steps - end:
        raise InputError(f"--warmup {s.warmup:g} takes more than half of the {s.steps - end} steps behind the ramp, "
                         f"over which the learning rate falls, and its peak would be far above --lr; give less")
    return prune.Ramp(s.sparsity, 0, end, max(end, math.floor(s.update_end * s.steps)), every)


def check_ahead(stages, init):
    """InputError for what would stop a later one of these stages (a list of Settings), before the first is trained:
    ramps, row lengths, the tasks' files, and whether they fill a batch. init: what the first one starts from, or ""."""
    config, read = read_config(locate(init))[0] if init not in ("", "random") else None, {}
    for s in stages:
        check_length(s.max_len, config or PRESETS[s.preset])
        if s.steps:
            ramp_of(s)
        if not s.task:
            continue
        if s.task not in read:
            read[s.task] = tasks.TaskData(s.task, data_folder(s), None, s.max_len)
        read[s.task].demand_a_batch(s.batch_size)


def check_blocks(s, model, say):
    """A stage that prunes leaves floor(sparsity * blocks) of a layer: InputError where that is none, and `say` is told
    where blocks are so large that a layer misses its share by more than a hundredth."""
    pattern, missed = prune.parse_pattern(s.pattern), {}
    for name, layer in prune.prunable(model) if s.mask == "gradual" and not pattern.group else ():
        blocks = layer.weight.numel() // (pattern.rows * pattern.columns)
        share = math.floor(s.sparsity * blocks + 1e-6) / blocks
        if not share:
            raise InputError(f"--pattern {s.pattern} makes {blocks} blocks of layer '{name}', and --sparsity "
                             f"{s.sparsity:g} prunes none of so few; give smaller blocks or more zeros")
        if s.sparsity - share > 0.01:
            missed[name] = f"{share:.1%} of '{name}'"
    if missed:
        say(f"blocks of {s.pattern} are so large that fewer zeros than --sparsity {s.sparsity:g} come out: "
            f"{next(iter(missed.values()))}, of {len(missed)} layers")


def follow_zeros(s, chosen):
    """Set pattern and sparsity of a locked stage to those of the zeros in --init. chosen: dict of what recipe and
    command line say; InputError where that is something else."""
    masks, recorded = encoder_masks(locate(s.init))
    sparsity = 1 - sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))
    if sparsity < LEAST_SPARSITY:
        return                                        # prepare_layers says that there is nothing to lock
    hints = []
    for name in (chosen.get("pattern"), recorded):
        with contextlib.suppress(InputError, TypeError):
            hints.append(prune.parse_pattern(name))
    found, share = find_pattern(masks, hints), chosen.get("sparsity")
    other_pattern = "pattern" in chosen and found != hints[0]
    other_sparsity = share is not None and abs(share - sparsity) > 0.01
    if other_pattern or other_sparsity:
        words = [f"--{name} {chosen[name]}" for name in ("pattern", "sparsity") if chosen.get(name) is not None]
        source = f" (of --recipe {s.recipe})" if s.recipe else ""
        raise InputError(f"the zeros of {s.init} are {found} and {sparsity:.1%} of its encoder, and {' '.join(words)}"
                         f"{source} is something else; leave that out to lock what is there, or give another --init")
    s.pattern = str(found)
    s.sparsity = share or (prune.resolve_sparsity(None, found) if found.group else round(sparsity, 2))


def encoder_masks(directory):
    """([bool (out, in) of each encoder layer: where a weight is not zero], the pattern written down there or None)."""
    config, raw = read_config(directory)
    weights, _ = model_directory.read_weights(directory, say=lambda line: None)
    names = [published_name(config.model_type, f"encoder.layers.{i}.{kind}.weight")
             for i in range(config.num_hidden_layers) for kind in prune.KINDS if kind != "pooler"]
    record = raw.get("compression")
    return ([weights[name] != 0 for name in names if name in weights and weights[name].ndim == 2],
            record.get("pattern") if isinstance(record, dict) else None)


def free_zeros(model, say):
    """A dense stage trains all weights: masks that lay beside the model are laid off, and `say` is told of zeros."""
    for _, layer in prune.prunable(model):
        layer.mask.fill_(True)
    sparsity = prune.measured_sparsity(model)
    if sparsity >= LEAST_SPARSITY:
        say(f"{sparsity:.1%} of the weights it starts from are zero, and are trained like all others; leave out "
            f"--sparsity 0 to keep them zero")


def has_dropout(s, init):
    """Is anything dropped in training? init: the directory to start from, or None."""
    config = read_config(init)[0] if init else PRESETS[s.preset]
    own = (config.hidden_dropout_prob, config.attention_dropout_prob, config.classifier_dropout,
           config.span_dropout if config.model_type == "distilbert" else 0.0)
    return (max(own) if s.dropout is None else s.dropout) > 0


def check_teacher(s, directory, model, data, say):
    """InputError unless the teacher in `directory` takes the student's rows, and an id means the same to both; `say` is
    told of a term of the loss that this teacher does not have. data: a text.PretrainingData or tasks.TaskData."""
    theirs, ours = tokenizer_of(directory).get_vocab(), data.tokenizer.get_vocab()
    if theirs != ours:
        other = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
                    key=lambda token: (ours.get(token, 2 ** 31), token))
        raise InputError(f"the teacher {directory} has another vocabulary than the student: {other!r} is "
                         f"{theirs.get(other, 'not in it')}, and {ours.get(other, 'not in it')} in the student's; give "
                         f"a teacher of the same vocabulary, or --teacher none")
    config = read_config(directory)[0]
    check_length(data.max_length, config, f"of the teacher {directory}")
    check_pairs(config, data.pairs, directory)
    if model.kind == "pretraining" and config.vocab_size != model.config.vocab_size:
        raise InputError(f"the teacher {directory} predicts {config.vocab_size} tokens and the student "
                         f"{model.config.vocab_size}; give a teacher of the same vocabulary, or --teacher none")
    sizes, wanted = ((each.num_hidden_layers, each.hidden_size, each.model_type) for each in (config, model.config))
    flag = "--kd-target hidden" if model.kind == "encoder" else f"--kd-hidden {s.kd_hidden:g}" if s.kd_hidden else ""
    if flag and model.kind != "pretraining" and sizes != wanted:
        raise InputError(f"{flag} needs a teacher of the student's {wanted[0]} layers of {wanted[1]} "
                         f"({wanted[2]}), and {directory} has {sizes[0]} of {sizes[1]} ({sizes[2]})")
    if model.kind == "pretraining" and config.model_type == "distilbert" != model.config.model_type:
        say(f"the teacher {directory} has no next-sentence head: that term comes from the labels alone")


def check_numbers(s):
    """InputError for a number outside its range."""
    def demand(good, name, expected):
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)} is out of range; give {expected}")

    demand(0 < s.threads <= MOST_THREADS, "threads", f"1 to {MOST_THREADS}")
    for name in ("steps", "epochs", "batch_size", "micro_batch"):
        demand(getattr(s, name) is None or 0 < getattr(s, name) < 2 ** 31, name, "a number above 0, below 2147483648")
    for name in ("lr", "temperature"):
        demand(0 < getattr(s, name) < math.inf, name, "a number above 0")
    demand(0 < s.beta2 < 1, "beta2", "a number between 0 and 1")
    for name in ("kd_weight", "ramp_end", "update_end", "update_every", "warmup"):
        demand(0 <= getattr(s, name) <= 1, name, "a share from 0 to 1")
    demand(s.dropout is None or 0 <= s.dropout < 1, "dropout", "a probability from 0 to below 1")
    demand(0 <= s.weight_decay < math.inf, "weight_decay", "0 or more")
    demand(s.max_len is None or s.max_len >= 8, "max_len", "8 tokens or more")
    demand(0 <= s.seed < 2 ** 31, "seed", "a whole number from 0 to 2147483647")
    demand(s.batch_size % s.micro_batch == 0, "micro_batch", f"a divisor of the batch size {s.batch_size}")


def check_stage(s, allowed_masks, typed):
    """InputError for settings that do not go together. allowed_masks: list of what --mask may be here; typed: dict of
    what the command line named."""
    if s.stage == "evaluate" and not s.init:
        raise InputError("--stage evaluate needs --init DIR, the model directory to evaluate")
    idle = sorted(typed.keys() - EVALUATED) if s.stage == "evaluate" else ()
    if idle:
        raise InputError(f"--stage evaluate trains nothing, and makes no use of --{idle[0].replace('_', '-')}; leave "
                         f"it out")
    if s.steps and s.epochs:
        raise InputError("--steps and --epochs were both given; choose one")
    encoder = s.stage == "quantize" and s.kd_target == "hidden" and not s.task
    if s.stage in ("finetune", "quantize") and not (s.task or encoder):
        raise InputError(f"--stage {s.stage} needs --task {'|'.join(tasks.TASKS)}"
                         + ", or for an encoder without a task --kd-target hidden" * (s.stage == "quantize"))
    if encoder and not s.teacher:
        raise InputError("--stage quantize --kd-target hidden needs --teacher, the dense encoder whose hidden states "
                         "are to be kept")
    if s.stage in ("pretrain", "prune") and s.task:
        raise InputError(f"--stage {s.stage} trains on the text of --corpus; leave out --task {s.task}, and give it to "
                         f"--stage finetune")
    if s.stage == "pretrain" and s.sparsity:
        raise InputError(f"--stage pretrain trains a dense model; leave out --sparsity {s.sparsity:g}, and give it to "
                         f"--stage prune")
    upstream = s.stage in ("pretrain", "prune") or not s.task
    real = s.stage != "evaluate" and s.preset != "tiny" and s.init != "random" and (s.init or not upstream)
    if (s.recipe or real) and (s.corpus == "tiny" if upstream else not s.data):
        raise InputError((f"--recipe {s.recipe}" if s.recipe else f"a {s.preset}, {s.init or 'of --out'},") + " is for "
                         "real text, and the default is the bundled tiny world; give "
                         + ("--corpus TEXT, in the paper English Wikipedia" if upstream else "--data FOLDER"))
    if s.criterion == "reconstruction" and s.stage == "finetune" and s.mask == "gradual":
        raise InputError("--criterion reconstruction looks at the text of --corpus, in --stage prune; leave it out with "
                         "--mask gradual")
    if s.stage == "prune" and not s.sparsity:
        raise InputError("--stage prune needs a --sparsity above 0, for example 0.85")
    if s.kd_target == "hidden" and (s.stage == "pretrain" or s.teacher == "none"):
        raise InputError(f"--kd-target hidden distils an encoder in --stage prune or quantize from its teacher; leave it "
                         f"out with --stage {s.stage}" + " --teacher none" * (s.teacher == "none"))
    if s.mask not in allowed_masks:
        raise InputError(f"--mask {s.mask} does not go with --stage {s.stage} at --sparsity {s.sparsity:g}; it takes "
                         f"{' or '.join(allowed_masks)}")


def directory_of(s, row):
    """The directory that a row of train.STAGES writes under these settings."""
    zeros = f"{s.pattern.replace(':', 'of')}-{s.sparsity:g}"
    return Path(s.out) / row.writes.format(zeros=zeros, task=s.task,
                                           teacher="random" if s.init == "random" else "teacher")


def command_of(s, row):
    """What to type for a row of train.STAGES."""
    task = f" --task {s.task}" if row.data == "task" else ""
    zeros = f" --pattern {s.pattern} --sparsity {s.sparsity:g}"
    if row.mask == "dense":
        zeros = " --sparsity 0" * bool(task) + " --init random" * (s.init == "random" and row.stage != "quantize")
    return (f"python train.py --stage {row.stage}{task}{zeros} " + (f"--recipe {s.recipe} " if s.recipe else "")
            + f"--preset {s.preset} --out {s.out}")


def check_device(s):
    """InputError for a device or precision that this machine does not have."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[s.device]:
        raise InputError(f"--device {s.device} is not available to this PyTorch; leave it out to run on the CPU")
    if s.precision == "bf16" and not has_bf16(s.device):
        raise InputError(f"--precision bf16: this {s.device} does not multiply bf16 in hardware; use --precision fp32")


def not_looked_at(s, init, teacher):
    """Settings that this stage makes no use of. init, teacher: its directories, or None."""
    return [*(("pattern",) if s.mask == "dense" else ()),
            *(("criterion",) if s.mask != "gradual" else ()),
            *(("ramp_end", "update_end", "update_every") if s.mask != "gradual" or s.criterion != "magnitude" else ()),
            *(("temperature", "kd_weight") if teacher is None or s.kd_target == "hidden" and not s.task else ()),
            *(("kd_target",) if teacher is None or s.task else ()),
            *(("activation_bits", "weight_scales") if s.stage != "quantize" else ()),
            *(("corpus",) if s.task and init else ()), *(("data",) if not s.task else ())]


def deciding(s, init, teacher):
    """What decides what is computed: {"settings": {setting: value}, "inputs": {setting: fingerprint of its files}}, of
    those that the stage looks at: a dense teacher is the same for every --pattern. Where there is dropout, the settings
    include the rows of a forward pass; else these change the rounding alone."""
    idle = {*NOT_PART_OF_THE_RUN, *not_looked_at(s, init, teacher)}
    settings = {name: value for name, value in asdict(s).items() if name not in idle}
    if has_dropout(s, init):
        settings["micro_batch"] = rows_at_once(s)
    return {"settings": settings, "inputs": {name: fingerprint(paths) for name, paths in
                                             files_of(s, init, teacher).items()}}


def files_of(s, init, teacher):
    """{setting: the files that it leads to}, whose content decides what is computed."""
    def of_model(directory):
        paths = [*directory.iterdir(), *directory.glob("*_Pooling/config.json")]
        return [path for path in paths if path.suffix in (".safetensors", ".bin")
                or path.name in ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json",
                                 "added_tokens.json", "special_tokens_map.json", "modules.json", *LENGTH_FILES)]

    files = {name: of_model(directory) for name, directory in (("init", init), ("teacher", teacher)) if directory}
    if s.task:
        files["data"] = [*tasks.files_of(data_folder(s), tasks.TASKS[s.task], ("train", "dev")).values()]
    if not s.task or init is None:                        # which a new tokenizer is learnt from, too
        tokens = corpus_path(s) / "index.json"            # of a folder of tokens: it names the text they come from
        files["corpus"] = [tokens] if tokens.is_file() else corpus.corpus_files(corpus_path(s))
    return files


def data_folder(s):
    """Folder of the task files, made first if it is the tiny world."""
    return Path(s.data) if s.data else tiny.ensure()


def corpus_path(s):
    if s.corpus != "tiny":
        return Path(s.corpus)
    folder = tiny_world(locate(s.init), "--corpus TEXT") if s.stage == "evaluate" else tiny.ensure()
    return folder / "corpus.txt"


def pretraining_data(s, tokenizer, length, config):
    """Text as rows. Where hidden states are distilled nothing is masked, and half of the rows are one text, half pairs:
    what comes of it may meet either."""
    return text.PretrainingData(shards.open_corpus(corpus_path(s), tokenizer), tokenizer, length,
                                next_sentence=config.model_type == "bert", seed=s.seed,
                                **(dict(mask_probability=0.0, single_share=0.5) if s.kd_target == "hidden" else {}))


@torch.no_grad()
def start_vocabulary(model, data):
    """A vocabulary head that was not trained yet, on an encoder that was, starts with the logarithm of how frequent
    each token is in the text: AdamW could not move the bias that far in a short run."""
    if model.kind == "pretraining" and not bool(model.bias.any()):
        known = data.log_frequencies()
        model.bias.fill_(known.min())                       # an embedding may have more rows than the vocabulary
        model.bias[:len(known)] = known


def check_length(length, config, whose="of the model"):
    """InputError if the model has no position embeddings for rows of `length` tokens."""
    if length > config.max_position_embeddings:
        raise InputError(f"--max-len {length} is more than the {config.max_position_embeddings} positions {whose}")
