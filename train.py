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
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import distill
import model as network
import prune
import quant
from data import shards, tasks, text
from data.batches import batches_ahead, dropout_seed
from data.calibrate import cut
from data.encode import check_pairs, longest_row, tokenizer_of
from data.evaluate import autocast, evaluate, run_evaluate
from data.recipes import RECIPES
from data.settings import (LEAST_SPARSITY, check_ahead, check_blocks, check_device, check_length, check_numbers,
                           check_stage, check_teacher, command_of, corpus_path, data_folder, deciding, directory_of,
                           follow_zeros, free_zeros, preset_for, pretraining_data, ramp_of, recipe_for,
                           start_vocabulary)
from formats import model_directory, page, run
from formats.command import Parser, add_settings, show_any_letter
from formats.config import read_config
from formats.files import write_json
from formats.hub import locate
from formats.int8 import write_int8
from formats.machine import cores, default_activation_bits, has_bf16, keep_freed_memory
from formats.patterns import pattern_of
from formats.processes import (add_gradients, demand_agreement, join_processes, leave_processes, processes,
                               started_together, summed, wait_for_the_first)
from formats.report import (engine_report, format_kinds, format_metrics, format_report, format_table, table_line,
                            wrapped_settings)
from model import InputError

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Settings: field default < recipe < command line. The comments are what --help prints.

@dataclass
class Settings:
    # what to run
    stage: str = "all"                # which stage to run
    preset: str = ""                  # size and recipe; default: the size of --init, else tiny
    recipe: str = ""                  # size, pattern and hyper-parameters of a published model; 'help' lists them
    seed: int = 0                     # of weights, batches, dropout and masking
    resume: bool = False              # go on from the last checkpoint; finished stages are kept as they are
    # files
    init: str = ""                    # model to start from: folder, owner/name on the hub, or 'random'; default: parent
    teacher: str = ""                 # model to distil from: folder, owner/name on the hub, or 'none'; default: parent
    out: str = ""                     # folder under which the stages' directories lie; default: out/PRESET
    corpus: str = "tiny"              # text for pretrain and prune: 'tiny', a file or folder of text, a Wikipedia dump
    task: str = ""                    # one task; default for --stage all: all five
    data: str = ""                    # folder that holds SST-2 MNLI QQP QNLI SQuAD; default: the bundled tiny world
    # pruning
    sparsity: float | None = None     # share of zeros in a pruned layer; 0 with finetune: the dense model; default 0.85
    criterion: str = "magnitude"      # magnitude: the least weights, on a ramp; reconstruction: all at once, see prune.py
    pattern: str = "unstructured"     # unstructured, RxC blocks (1x4: four inputs of one output), or N:M
    mask: str = ""                    # dense, locked, or gradual (pruning during the task); default: the stage's own
    ramp_end: float = 0.5             # share of the steps after which the target sparsity is reached
    update_end: float = 0.8           # share of the steps after which masks are frozen, the ramp's end at the earliest
    update_every: float = 0.01        # share of the steps between two mask updates and learning-rate rewinds
    # distillation
    temperature: float = 2.0          # of the distillation's softmax
    kd_weight: float = 0.5            # share of the loss that comes from the teacher, 0 to 1
    kd_target: str = "all"            # of pre-training: the vocabulary at all or at masked tokens, or hidden states
    kd_hidden: float = 0.0            # of a task: how many times the error of hidden states counts beside the logits'
    # quantization
    activation_bits: int | None = None  # 7 or 8; default: 7 where this CPU's INT8 product would saturate, else 8
    weight_scales: str = "row"        # INT8 scales of weights: row (one per output) or tensor (the paper's reference)
    # optimization
    steps: int | None = None          # optimizer steps
    epochs: float | None = None       # passes over the training rows, in place of --steps
    batch_size: int = 32              # rows per optimizer step
    max_len: int | None = None        # tokens per row, at most; default of evaluate: as trained, else 384 or 128
    lr: float = 1e-4                  # peak learning rate
    beta2: float = 0.999              # AdamW's memory of squared gradients
    warmup: float = 0.01              # share of the steps with rising learning rate
    weight_decay: float = 0.01        # AdamW's decay of matrices; biases and LayerNorm have none
    dropout: float | None = None      # of attention, residual sums and heads; default: what the configuration says
    # machine
    micro_batch: int | None = None    # rows per forward pass of a process; default: all of its share of the batch
    precision: str = "auto"           # fp32, bf16 (autocast), or auto: bf16 if the device multiplies it; QAT is fp32
    threads: int | None = None        # CPU threads of a process; default: all cores it may use, shared with its like
    device: str = "cpu"               # cpu, cuda or mps


CHOICES = {
    "stage": ("pretrain", "prune", "finetune", "quantize", "evaluate", "all"), "preset": tuple(network.PRESETS),
    "recipe": (*(name for name in RECIPES if name not in network.PRESETS), "help"),
    "task": tuple(tasks.TASKS), "criterion": ("magnitude", "reconstruction"), "mask": ("dense", "locked", "gradual"),
    "kd_target": ("all", "masked", "hidden"), "activation_bits": (7, 8), "weight_scales": ("row", "tensor"),
    "precision": ("auto", "fp32", "bf16"), "device": ("cpu", "cuda", "mps"),
}
LARGEST_GRADIENT = 1.0     # its norm is cut down to that, as in BERT's own training (arXiv 1810.04805, its code)


def parse_settings(arguments):
    """Command line -> dict of what was typed. Exits with code 2 on an unknown flag or value."""
    parser = Parser("train.py", description=__doc__)
    add_settings(parser, Settings, CHOICES)
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def resolve(typed, stage=None):
    """Lay recipe and command line over the defaults, fill in what depends on other settings, check every value.

    typed: dict of what the command line named. Returns Settings. Raises InputError.
    """
    s = Settings(**{**typed, "stage": stage or typed.get("stage", "all")})
    s.preset = s.preset or preset_for(s)
    recipe = recipe_for(s, typed)
    s = replace(s, **{name: value for name, value in recipe.items() if name not in typed})
    s.out = s.out or str(Path("out") / s.preset)
    if s.stage == "pretrain" and typed.get("sparsity") is None:
        s.sparsity = 0.0
    if s.sparsity != 0:
        s.sparsity = prune.resolve_sparsity(s.sparsity, prune.parse_pattern(s.pattern))
    s.mask = s.mask or allowed_masks(s)[0]
    defaults = {"micro_batch": s.batch_size, "activation_bits": default_activation_bits(),
                "threads": max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))}
    s = replace(s, **{name: value for name, value in defaults.items() if getattr(s, name) is None})
    check_numbers(s)
    check_stage(s, allowed_masks(s), typed)
    check_device(s)
    if s.mask == "locked" and s.init not in ("", "random"):
        follow_zeros(s, {**recipe, **typed})
    if s.stage in ("quantize", "evaluate"):
        s.precision = "fp32"              # bf16 would round the very grid of a quantized model
    elif s.precision == "auto":
        s.precision = "bf16" if has_bf16(s.device) else "fp32"
    return s


# ---------------------------------------------------------------------------------------------------------------------
# The stages (arXiv 2111.05754, figure 1)

@dataclass(frozen=True)
class Stage:
    """What differs between the stages."""
    stage: str                # --stage
    mask: str                 # dense; gradual: the ramp, with learning-rate rewinding; locked: the zeros it starts from
    start: str                # of STAGES: where the weights come from; "" = random weights. --init replaces it
    teacher: str              # of STAGES: what to distil from; "" = nothing. --teacher replaces it
    data: str                 # text: masked words and next sentences; task: --task
    writes: str               # directory below --out


STAGES = {
    "pretrain": Stage("pretrain", "dense", "", "", "text", "pretrain"),
    "prune": Stage("prune", "gradual", "pretrain", "pretrain", "text", "prune-{zeros}"),
    "teacher": Stage("finetune", "dense", "pretrain", "", "task", "{task}/{teacher}"),
    "finetune": Stage("finetune", "locked", "prune", "teacher", "task", "{task}/sparse-{zeros}"),
    "gradual": Stage("finetune", "gradual", "pretrain", "teacher", "task", "{task}/gradual-{zeros}"),
    "quantize": Stage("quantize", "locked", "finetune", "teacher", "task", "{task}/int8-{zeros}"),
    "quantize dense": Stage("quantize", "dense", "teacher", "teacher", "task", "{task}/int8-dense"),
    "quantize encoder": Stage("quantize", "locked", "prune", "", "text", "int8-{zeros}"),
    "quantize dense encoder": Stage("quantize", "dense", "", "", "text", "int8-dense"),
}


def row_of(s):
    """The row of STAGES that these settings run."""
    return next(row for row in STAGES.values() if (row.stage, row.mask) == (s.stage, s.mask)
                and (s.task or row.data == "text"))


def allowed_masks(s):
    """What --mask may be for this stage and sparsity, the default first; [""] where nothing is trained."""
    rows = (row for row in STAGES.values() if row.stage == s.stage and (row.mask == "dense") == (s.sparsity == 0))
    return [*dict.fromkeys(row.mask for row in rows)] or [""]


def parents_of(s):
    """(directory to start from or None, directory of the teacher or None). A missing parent names its command."""
    def parent(name, given, flag):
        if given:
            read_config(locate(given))
            return locate(given)
        directory = directory_of(s, STAGES[name])
        if not (directory / "metrics.json").is_file():
            raise InputError(f"{directory} has no finished run, which --stage {s.stage} starts from; make it with "
                             f"'{command_of(s, STAGES[name])}', or name another with --{flag}")
        return directory

    row = row_of(s)
    random = s.init == "random" or not (row.start or s.init)
    if random and s.stage in ("prune", "quantize"):
        raise InputError(f"--stage {s.stage} cannot start from random weights; give --init a trained model")
    init = None if random else parent(row.start, s.init, "init")
    if s.teacher == "none" or not (row.teacher or s.teacher):
        return init, None
    # The hidden states to keep are those of the very model that is pruned.
    given = s.init if s.stage == "prune" and s.kd_target == "hidden" else ""
    return init, parent(row.teacher, s.teacher or given, "teacher")


# ---------------------------------------------------------------------------------------------------------------------
# From a row of the table to objects

def run_stage(s):
    """Everything that differs between stages is chosen here; then comes the one loop. Returns the directory written."""
    init, teacher_directory = parents_of(s)
    out = directory_of(s, row_of(s))
    if run.demand_free(out, s.resume):
        run.demand_same_result(out, **deciding(s, init, teacher_directory))
        run.clear_checkpoints(out)                        # a process killed at its very end leaves them
        print(f"{out}: already finished, kept as it is")
        return out
    join_processes(s.batch_size, s.micro_batch, s.device)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    notes = []
    model, tokenizer, data = build_model_and_data(s, init, notes.append)
    longest = longest_row(init, model.config)
    teacher = load_teacher(s, teacher_directory, model, data, notes.append)
    prepare_layers(s, model, notes.append)
    if init and prune.measured_sparsity(model) >= LEAST_SPARSITY:
        notes += format_kinds(model)
    s.steps = s.steps or max(1, round(s.epochs * len(data) / s.batch_size))
    ramp_of(s)                                            # InputError before anything is written
    if s.task:
        data.demand_a_batch(s.batch_size)
    decided = deciding(s, init, teacher_directory)
    state = run.newest_checkpoint(out, **decided, say=notes.append)
    demand_agreement({**decided["settings"], "files": decided["inputs"], "checkpoint": state and state["step"]})
    log = run.begin_directory(out, state, run.describe_run(asdict(s), decided, init, teacher_directory, HERE))
    log.say(f"{s.stage}: {out}")
    for line in [*notes, *wrapped_settings(asdict(s))]:
        log.say("  " + line)
    log.say(f"  {network.count_parameters(model):,} parameters, {s.steps:,} steps of {s.batch_size} rows, "
            f"{len(data):,} rows an epoch; starts from {init or 'random weights'}, "
            f"teacher: {teacher_directory or 'none'}" + f"; {processes()} processes" * (processes() > 1))
    try:
        if s.mask == "gradual" and s.criterion == "reconstruction" and state is None:
            cut(model.to(s.device), data, s.sparsity, prune.parse_pattern(s.pattern), log.say)
        seconds = train(s, model.to(s.device), teacher, data, decided, log, out, state)
        leave_processes()                                 # the rest is for one
        if log.directory:
            finish_stage(s, model, teacher, tokenizer, data, log, seconds, longest)
    finally:
        log.close()
    return out


def build_model_and_data(s, init, say):
    """(model, tokenizer, data) of any stage; `say` is told what there is to say about them."""
    config = read_config(init)[0] if init else network.PRESETS[s.preset]
    if init:
        tokenizer = tokenizer_of(init)
    else:
        tokenizer = shards.corpus_tokenizer(corpus_path(s), config.vocab_size)
        config = replace(config, vocab_size=text.vocabulary_rows(tokenizer))
    check_length(s.max_len, config)
    if row_of(s).data == "text":
        data = pretraining_data(s, tokenizer, s.max_len, config)
        kind, task = "encoder" if s.kd_target == "hidden" else "pretraining", None
    else:
        data = tasks.TaskData(s.task, data_folder(s), tokenizer, s.max_len, seed=s.seed)
        kind, task = data.kind, data.task
    check_pairs(config, data.pairs, init)
    for note in data.notes():
        say(note)
    if init:
        model = model_directory.load(init, kind, fresh_head=s.stage != "quantize", say=say, task=task)
        start_vocabulary(model, data)
        return model, tokenizer, data
    return network.build(config, kind, len(data.labels) if kind == "classification" else 2), tokenizer, data


def load_teacher(s, directory, model, data, say):
    """The model to distil from, frozen; None without a directory."""
    if directory is None:
        return None
    check_teacher(s, directory, model, data, say)
    teacher = model_directory.load(directory, model.kind, say=say, task=getattr(data, "task", None))
    if model.kind == "encoder" and model.encoder.pooler is not None and teacher.encoder.pooler is None:
        raise InputError(f"the teacher {directory} has no pooler, and the student has one, which nothing would teach; "
                         f"give the very encoder that the student was made of")
    return network.freeze(teacher.to(s.device), torch.bfloat16 if s.precision == "bf16" else torch.float32)


def prepare_layers(s, model, say=print):
    """Bring the slots of every Linear, and dropout, into the state that the stage begins with."""
    if s.dropout is not None:
        network.set_dropout(model, s.dropout)
    prune.check_pattern(model, prune.parse_pattern(s.pattern))
    check_blocks(s, model, say)
    if s.mask == "locked":
        prune.lock(model, pattern_of(model, [prune.parse_pattern(s.pattern)]))
        if prune.measured_sparsity(model) < LEAST_SPARSITY:
            raise InputError(f"--stage {s.stage} locks the zeros of the model it starts from, and {s.init or 'that'} "
                             f"has next to none; prune it first, or give --sparsity 0 for a dense model")
    elif s.mask == "dense":
        free_zeros(model, say)
    if s.stage == "quantize":
        quant.prepare(model, s.activation_bits, s.weight_scales)
        quant.round_embeddings(model)


def make_optimizer(s, model):
    """AdamW; biases and LayerNorm (all that is not a matrix) are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": s.weight_decay},
                              {"params": others, "weight_decay": 0.0}],
                             lr=s.lr, betas=(0.9, s.beta2), fused=s.device != "mps")


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def train(s, model, teacher, data, decided, log, out, state):
    """Optimizer steps from the checkpoint's to s.steps. Batches, dropout, learning rate and sparsity are pure functions
    of (seed, step), so a resumed run ends with the same bits. Returns seconds spent training, earlier sessions
    included."""
    ramp, pattern, warmup = ramp_of(s), prune.parse_pattern(s.pattern), round(s.warmup * s.steps)
    rounded = s.stage == "quantize"
    optimizer = make_optimizer(s, model)
    first, earlier = run.restore(model, optimizer, state)
    sparsity = prune.measured_sparsity(model)
    model.train()
    with run.interrupts() as interrupted, run.Progress(s.stage, first, s.steps, log, earlier) as progress:
        for step, batches in batches_ahead(data, first, s.steps, s.batch_size, s.micro_batch, s.device):
            if rounded and step == 0:
                look_at_ranges(s, model, teacher, batches)
            rate = s.lr * prune.learning_rate_factor(step, s.steps, warmup, ramp)
            for group in optimizer.param_groups:
                group["lr"] = rate
            denominators = summed(distill.denominators(batches), s.device)
            total, terms = 0.0, {}
            for number, batch in enumerate(batches):
                torch.manual_seed(dropout_seed(s, step, number))
                with autocast(s):
                    loss, parts = distill.loss(model, teacher, batch, denominators, s.temperature, s.kd_weight,
                                               s.kd_target, s.kd_hidden)
                loss.backward()
                total += float(loss.detach())
                terms = {name: terms.get(name, 0.0) + value for name, value in parts.items()}
            add_gradients(model)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT))
            figures = summed({"loss": total, **terms, "interrupts": len(interrupted)}, s.device)
            stop = figures.pop("interrupts")
            run.demand_finite(figures["loss"], norm, step, s.lr, out)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if rounded:
                quant.update_ranges(model)
            if ramp and prune.updates_at(step, ramp):
                prune.update_masks(model, step, ramp, pattern)
                sparsity = prune.measured_sparsity(model)

            progress.show(step + 1, denominators["tokens"],
                          {**figures, "learning_rate": rate, "sparsity": sparsity, "gradient_norm": norm})
            if (progress.save_is_due() or stop or step + 1 == s.steps) and log.directory:
                run.save_checkpoint(out, decided, model, optimizer, step + 1, progress.seconds())
                progress.note_save()
            if stop:
                wait_for_the_first()
                progress.bar.close()
                log.say(f"stopped after step {step + 1} of {s.steps}; go on with the same command and --resume")
                sys.exit(130)
        return progress.seconds()


@torch.no_grad()
def look_at_ranges(s, model, teacher, batches):
    """Before the first step, which is rounded too: the activation ranges over its whole batch."""
    for number, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(s, 0, number))
        distill.loss(model, teacher, batch, distill.denominators([batch]))
    quant.update_ranges(model)


# ---------------------------------------------------------------------------------------------------------------------
# After the loop

def finish_stage(s, model, teacher, tokenizer, data, log, seconds, longest):
    """Burn the zeros in, recount them, evaluate, and write the model directory; metrics.json comes last. longest: row
    of tokens that the tokenizer is to keep."""
    out = directory_of(s, row_of(s))
    prune.burn_in(model)
    metrics, layers, sparsity = evaluate(s, model, data, teacher), prune.report(model), prune.measured_sparsity(model)
    compression = {"pattern": s.pattern if s.mask != "dense" else "dense", "sparsity": sparsity, "max_len": s.max_len}
    if s.task:
        compression["task"] = s.task
    if s.stage == "quantize":
        compression.update(activation_bits=s.activation_bits, weight_scales=s.weight_scales)
    model.to("cpu")
    model_directory.save(model, out, data.labels if model.kind == "classification" else None, compression)
    text.save_tokenizer(tokenizer, out, longest)
    if s.stage == "quantize":
        write_int8(model, out)
    if s.mask != "dense":
        log.say(format_report(layers))
    files = [out / name for name in ("model.safetensors", "int8.safetensors") if (out / name).exists()]
    result = {"stage": s.stage, **({"task": s.task} if s.task else {}), "metrics": metrics, "sparsity": sparsity,
              "layers": {name: [weights, zeros] for name, weights, zeros in layers},
              "file_bytes": {path.name: path.stat().st_size for path in files}, "steps": s.steps,
              "training_seconds": seconds}
    log.say(format_metrics(metrics) + f", sparsity {sparsity:.4%}, {seconds:,.0f} s of training; wrote {out}")
    write_json(out / "metrics.json", result)
    run.clear_checkpoints(out)


# ---------------------------------------------------------------------------------------------------------------------
# The whole chain

def run_all(typed):
    """Every stage in turn for every task, then the INT8 engine on the files they left, then one table."""
    started = time.monotonic()
    pruned = resolve({**typed, "task": ""}, "prune")            # every mistake in the settings shows before step 0
    dropped = ("init",) if typed.get("teacher") == "none" else ("init", "teacher")
    later = {**{name: value for name, value in typed.items() if name not in dropped},
             "preset": pruned.preset, "out": pruned.out}
    if pruned.kd_target == "hidden":                            # both upstream and task teachers start from --init
        upstream, dense = [pruned], {"init": pruned.init} if pruned.init else {}
    else:
        if pruned.teacher not in ("", "none"):
            raise InputError(f"--stage all makes its teachers itself; leave out --teacher {pruned.teacher}")
        teacher = resolve({**typed, "task": "", "sparsity": None}, "pretrain")
        upstream, dense = [teacher, resolve({**later, "task": ""}, "prune")], {}
    chains = [(resolve({**later, **dense, "task": task, "sparsity": 0.0}, "finetune"),
               *(resolve({**later, "task": task}, stage) for stage in ("finetune", "quantize")))
              for task in ([typed["task"]] if "task" in typed else tasks.TASKS)]
    check_ahead([*upstream, *(s for chain in chains for s in chain)], typed.get("init", ""))
    directories, lines = [run_stage(s) for s in upstream], []
    for chain in chains:
        task, own = chain[-1].task, [run_stage(s) for s in chain]
        engine = engine_report(HERE / "infer_cpu.py", own[-1], task, chain[-1].data, chain[-1].threads)
        lines.append(table_line(task, tasks.TASKS[task].metric, *own, engine))
        directories += own
    table = format_table(lines, directories, time.monotonic() - started)
    report = page.write_results(Path(pruned.out), table, directories[len(upstream) - 1], directories)
    print(f"\n{table}\nThe same with curves and a mask: {report}")


def start(typed):
    """Do what was typed."""
    stage = typed.get("stage", "all")
    if typed.get("recipe") == "help":
        from bench.recipe_costs import recipe_table
        print(recipe_table())
    elif stage in ("all", "evaluate") and started_together() > 1:
        raise InputError(f"--stage {stage} runs in one process; under torchrun, give one training stage at a time")
    elif stage == "all":
        run_all(typed)
    elif stage == "evaluate":
        run_evaluate(resolve(typed))
    else:
        run_stage(resolve(typed))


def main(arguments=None):
    show_any_letter()
    typed = parse_settings(arguments)
    keep_freed_memory()
    try:
        start(typed)
    except Exception as error:
        ended = {"then": ""} if typed.get("stage") == "evaluate" else {}
        reason = str(error) if isinstance(error, InputError) else run.reason_of(error, **ended)
        if reason is None:
            raise
        print(f"train.py: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
