"""The recipes of the published models: their stages, hyper-parameters, operations and GPU-days.

    python train.py --recipe help
"""
import train
from data import tasks
from data.recipes import RECIPES
from model import PRESETS

# Rows to train on: GLUE (arXiv 1804.07461), and SQuAD 1.1 cut into pieces of 384 word pieces, 128 apart.
TRAINING_ROWS = {"sst2": 67_349, "mnli": 392_702, "qqp": 363_846, "qnli": 104_743, "squad": 88_524}
GPU = {"bf16": 0.4 * 312e12, "fp32": 0.4 * 19.5e12}       # operations a second: 40 % of what an A100's data sheet says


def operations(s):
    """Floating-point operations of one stage on the full data, as many as there could be: every row --max-len long.

    A multiply and an add are two. Backward counts as two forward passes, the teacher adds one. Zeros are multiplied
    too: a mask saves nothing in training.
    """
    config = PRESETS[s.preset]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    forward = layers * (2 * (4 * hidden ** 2 + 2 * hidden * config.intermediate_size) + 4 * hidden * s.max_len)
    if not s.task and s.kd_target != "hidden":      # the vocabulary: at every token if a teacher is asked about all, or 15 %
        everywhere = s.stage == "prune" and s.kd_target == "all"
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
    for recipe in [name for name in RECIPES if "published" in RECIPES[name]]:
        size = RECIPES[recipe]["model"]
        lines += [f"{recipe}: {size['preset']}, {size['pattern']}, {size['sparsity']:.0%} zeros; published as",
                  *(f"    Intel/{name}" for name in RECIPES[recipe]["published"]),
                  f"  {'stage':<15}{'how long':>14}{'rows':>6}{'tokens':>8}{'rate':>9}{'warm-up':>9}{'decay':>7}"
                  f"{'operations':>12}{'GPU-days':>10}"]
        days = 0.0
        for label, stage, names, sparsity in stages:
            typed = {"recipe": recipe, "stage": stage, "corpus": "-", "data": "-"}
            typed.update({} if sparsity is None else {"sparsity": sparsity})
            runs = [train.resolve({**typed, "task": name}) for name in names]
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
them in data/recipes.py; the learning rate of pretrain and prune is not. There is one more, of ours, minilm-l6-hidden:
hidden states in place of the vocabulary, for a budget of hours (python -m bench.measure_minilm).
"""
