"""The metrics of a model: of its task, or the losses on text that was held out. `s` is a train.Settings."""
import torch

import distill
import prune
import quant
from data.batches import rows_at_once, to_device
from data.encode import evaluation_data, match_classes, tokenizer_of
from data.settings import LEAST_SPARSITY, check_length, pretraining_data
from formats import model_directory
from formats.config import compression_of, rounding_of
from formats.hub import locate
from formats.model_directory import kind_of
from formats.report import format_kinds, format_metrics
from model import InputError

VALIDATION_ROWS = 3200     # of the held-out text that are looked at, at most


def autocast(s):
    return torch.autocast(s.device, dtype=torch.bfloat16, enabled=s.precision == "bf16")


@torch.no_grad()
def evaluate(s, model, data, teacher=None):
    """Metrics of the task, or the losses on the held-out documents: the labels' alone, but for an encoder's."""
    model.eval()
    with autocast(s):
        if model.kind in ("classification", "span"):
            def predict(batch):
                batch = to_device(batch, s.device)
                return model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            return data.evaluate(predict, batch_size=min(32, rows_at_once(s)))[0]
        rows = rows_at_once(s)
        batches = [to_device(batch, s.device) for batch in data.validation_batches(rows, -(-VALIDATION_ROWS // rows))]
        denominators, sums = distill.denominators(batches), {}
        for batch in batches:
            for name, value in distill.loss(model, teacher if model.kind == "encoder" else None, batch,
                                            denominators)[1].items():
                sums[name] = sums.get(name, 0.0) + value
    if not denominators["masked"]:
        sums.pop("mlm", None)                                   # there was no word to predict
    return {f"validation_{name}_loss": value for name, value in sums.items()}


def run_evaluate(s):
    """--stage evaluate: load a finished directory as it is stored (rounding included) and print its metrics."""
    torch.set_num_threads(s.threads)
    init = locate(s.init)
    (kind, config, _), compression = kind_of(init), compression_of(init)
    on_text = kind == "pretraining" and not s.task
    if s.data if on_text else s.corpus != "tiny":
        raise InputError(f"{s.init} is evaluated on " + ("text, and makes no use of --data; give --corpus TEXT" if on_text
                                                         else "a task, and makes no use of --corpus; give --data FOLDER"))
    if on_text:
        length = s.max_len or compression.get("max_len") or min(128, config.max_position_embeddings)
        check_length(length, config)
        data = pretraining_data(s, tokenizer_of(init), length, config)
    else:
        s.task, data = evaluation_data(init, kind, s.task, s.data, s.max_len)
    for note in data.notes():
        print(note)
    model = model_directory.load(init, kind)
    match_classes(data, model, init)
    if "activation_bits" in compression:
        quant.prepare(model, *rounding_of(init))
    if prune.measured_sparsity(model) >= LEAST_SPARSITY:
        print("\n".join(format_kinds(model)))
    metrics = evaluate(s, model.to(s.device), data)
    print(f"{s.init}: {format_metrics(metrics)}, sparsity {prune.measured_sparsity(model):.4%}")
