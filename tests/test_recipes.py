"""The recipes of the published models: their numbers, their precedence, what they cost."""

import pytest
from test_model import CONFIGS, error_of, make

import prune
import train
from bench import recipe_costs
from data import recipes
from formats.model_directory import save
from model import PRESETS, build, linears
from prune import measured_sparsity

# ---------------------------------------------------------------------------------------------------------------------
# Recipes

RECIPES = [name for name in recipes.RECIPES if "published" in recipes.RECIPES[name]]


def resolved(recipe, stage, task="", **typed):
    return train.resolve({"recipe": recipe, "stage": stage, "task": task, "corpus": "-", "data": "-", **typed})


def test_there_is_a_recipe_for_every_published_model():
    assert train.CHOICES["recipe"] == (*RECIPES, "minilm-l6-hidden", "help")
    published = [name for recipe in RECIPES for name in recipes.RECIPES[recipe]["published"]]
    assert len(published) == len(set(published)) == 9                  # eight, and the paper's BERT-Large 90 %
    for recipe in RECIPES:
        size, _, rest = recipe.rpartition("-")[0].rpartition("-")
        settings = resolved(recipe, "prune")
        assert settings.preset == size and settings.pattern == recipe.split("-")[-1]
        assert settings.sparsity == int(rest) / 100
        for name in recipes.RECIPES[recipe]["published"]:
            assert f"sparse-{rest}-{settings.pattern}" in name and name.startswith(size + "-uncased")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_hold_the_published_numbers(recipe):
    """arXiv 2111.05754's scripts for both upstream stages, Intel's two reproductions for the tasks."""
    def numbers(settings):
        return (settings.epochs, settings.batch_size, settings.max_len, settings.lr, settings.warmup,
                settings.weight_decay, settings.kd_weight, settings.temperature)

    for stage in ("pretrain", "prune"):
        s = resolved(recipe, stage)
        assert (s.steps, s.batch_size, s.max_len, s.warmup, s.weight_decay) == (100_000, 256, 512, 0.01, 0.01)
    assert (s.kd_weight, s.temperature, s.kd_target) == (0.5, 2.0, "all")
    assert train.ramp_of(s) == prune.Ramp(s.sparsity, 0, 50_000, 80_000, 1_000)
    assert resolved(recipe, "pretrain").init.endswith(s.preset + "-uncased") and not s.init
    distil, rows = s.preset == "distilbert-base", 32 if recipe == "bert-large-80-1x4" else 12
    for task in ("sst2", "mnli", "qqp", "qnli"):
        assert numbers(resolved(recipe, "finetune", task)) == (9, 32, 128, 1.5e-4 if distil else 1e-4, 0, 0, 1, 2)
        assert numbers(resolved(recipe, "quantize", task)) == (
            (3, 32, 128, 1e-6, 0.01, 0.01, 1, 2) if distil else (3, 32, 128, 1e-5, 0, 0, 1, 2))
    assert numbers(resolved(recipe, "finetune", "squad")) == (
        (8, 12, 384, 1.8e-4, 0.05, 0.01, 1, 2) if distil else (8, rows, 384, 1.5e-4, 0, 0, 1, 2))
    assert numbers(resolved(recipe, "quantize", "squad")) == (
        (2, 12, 384, 1e-5, 0.1, 0, 1, 2) if distil else (2, rows, 384, 1e-5, 0, 0, 1, 2))
    dense = resolved(recipe, "finetune", "squad", sparsity=0.0)
    assert dense.mask == "dense" and dense.batch_size == 12


def test_default_recipe_command_line_in_this_order(tmp_path):
    s = resolved("bert-large-80-1x4", "prune", lr=3e-4, sparsity=0.7)
    assert (s.lr, s.sparsity) == (3e-4, 0.7) and (s.pattern, s.steps) == ("1x4", 100_000)
    assert s.beta2 == train.Settings.beta2 and s.out == "out/bert-large"
    assert resolved("bert-base-90-unstructured", "prune", preset="tiny", max_len=64).preset == "tiny"
    save(build(PRESETS["tiny"], "span"), tmp_path)
    message = error_of(resolved, "bert-base-90-unstructured", "prune", init=str(tmp_path))
    assert "bert-base" in message and "tiny" in message and "--preset" in message
    for stage, task, flag in (("pretrain", "", "--corpus"), ("prune", "", "--corpus"), ("finetune", "sst2", "--data")):
        assert flag in error_of(train.resolve, {"recipe": RECIPES[0], "stage": stage, "task": task})
    message = error_of(train.parents_of, resolved(RECIPES[0], "finetune", "sst2", out=str(tmp_path / "none")))
    assert f"--stage prune --pattern unstructured --sparsity 0.85 --recipe {RECIPES[0]}" in message


def test_operations_by_hand():
    """BERT-Base: 85 million encoder weights, 512 x 512 scores and as many sums a layer, 24 million for words."""
    weights, vocabulary = 12 * (4 * 768 * 768 + 2 * 768 * 3072), 768 * (768 + 30522)
    token = 2 * weights + 12 * 2 * 2 * 512 * 768
    tokens = 100_000 * 256 * 512
    assert recipe_costs.operations(resolved("bert-base-90-unstructured", "prune")) == pytest.approx(
        4 * tokens * (token + 2 * vocabulary))
    assert recipe_costs.operations(resolved("bert-base-90-unstructured", "pretrain")) == pytest.approx(
        3 * tokens * (token + 2 * vocabulary * 0.15))
    short = 2 * weights + 12 * 2 * 2 * 128 * 768
    for typed, passes, epochs in (({}, 4, 9), ({"sparsity": 0.0}, 3, 3)):
        settings = resolved("bert-base-90-unstructured", "finetune", "sst2", **typed)
        assert recipe_costs.operations(settings) == pytest.approx(passes * epochs * 67_349 * 128 * short)


def test_hidden_states_cost_no_vocabulary():
    token = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 6 * 2 * 2 * 128 * 384
    settings = resolved("minilm-l6-hidden", "prune")
    assert (settings.kd_target, settings.preset, settings.dropout) == ("hidden", "minilm-l6", 0.0)
    assert settings.criterion == "reconstruction"
    assert recipe_costs.operations(settings) == pytest.approx(4 * token * 2400 * 32 * 128)
    for task in ("sst2", "mnli", "qqp", "qnli", "squad"):
        settings = resolved("minilm-l6-hidden", "finetune", task)
        assert settings.kd_weight == 1.0 and settings.max_len == (384 if task == "squad" else 128)


def test_recipe_help_is_a_table(capsys):
    train.main(["--recipe", "help"])
    printed = capsys.readouterr().out
    for recipe in RECIPES:
        assert f"\n{recipe}:" in "\n" + printed
        assert all("Intel/" + name in printed for name in recipes.RECIPES[recipe]["published"])
    assert printed.count("quantize SQuAD") == printed.count("all of it") == len(RECIPES)
    assert "A100" in printed and "assumption" in printed and "1.2e+19" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_linears_are_those_of_the_kinds():
    """prune.KINDS names every prunable layer, so that no zeros go uncounted."""
    for model_type in CONFIGS:
        model = make("classification", model_type)
        assert {name.split(".")[-1] for name, layer in linears(model) if layer.prunable} <= set(prune.KINDS)
        assert measured_sparsity(model) == 0
