"""Training side by side with what people use: tokens or examples a second and peak memory, in one interleaved run.

    python -m bench.measure_training                                             two sizes of the prune stage
    python -m bench.measure_training --data TASKS_DIR --model MODEL_DIR          and fine-tuning on SST-2

Pre-training: the prune stage with its teacher, through the loop of train.py itself, against BertForMaskedLM of
`transformers` in a plain loop: torch.nn.utils.prune masks, AdamW, cross-entropy at the masked positions and
temperature-scaled KL at every position. (Ours also predicts the next sentence.) Text is random word pieces without
padding, 15 % of them masked; half of the weights are zero; dropout is what our recipe of that size says, in both.
Fine-tuning: real SST-2 rows, batches of 32, MODEL_DIR's weights and tokenizer, against transformers' Trainer with
dynamic padding; both tokenize before the clock starts.

Every contender has a process of its own; they take turns, and the medians over the rounds are shown. What is finished
stands in --json, and the same command goes on from there. It needs tests/requirements.txt and, for Trainer,
`pip install accelerate`.
"""
import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import model as network  # noqa: E402
import prune  # noqa: E402
import train  # noqa: E402
from bench.collect_runs import typed_command  # noqa: E402
from bench.measure_shards import peak_memory  # noqa: E402
from bench.measure_training_settings import RandomRows  # noqa: E402
from data import tasks, text  # noqa: E402
from formats import run  # noqa: E402
from formats.files import write_file  # noqa: E402
from formats.machine import has_bf16, keep_freed_memory  # noqa: E402

SIZES = {"minilm-l6": 16, "bert-base": 4}           # rows of a batch; each of 128 word pieces
LENGTH, TASK_ROWS, THREADS = 128, 32, 2
PRETRAINING = ("ours, all positions", "ours, masked positions", "transformers, all positions")
FINE_TUNING = ("ours", "transformers Trainer")
TARGETS = {"ours, all positions": 2, "ours, masked positions": 4, "ours": 1.5}      # times the speed of theirs in fp32


def our_settings(preset, precision, steps, **more):
    return train.resolve({"preset": preset, "precision": precision, "steps": steps, "threads": THREADS,
                          **more})


def our_seconds(s, student, teacher, data):
    """Seconds of every step but the first, of train.py's own loop."""
    with tempfile.TemporaryDirectory() as folder:
        train.train(s, student, teacher, data, {}, run.Log(Path(folder)), Path(folder), None)
        with open(Path(folder) / "log.csv") as file:
            ends = [float(row["seconds"]) for row in csv.DictReader(file)]
    return [after - before for before, after in zip(ends, ends[1:])]


def pretrain_ours(preset, precision, steps, positions):
    """Seconds per step, with masks that stay as they are, as theirs do."""
    keep_freed_memory()
    s = our_settings(preset, precision, steps, stage="prune", sparsity=0.5, batch_size=SIZES[preset], max_len=LENGTH,
                     kd_target=positions)
    config = network.PRESETS[preset]
    student, teacher = (network.build(config, "pretraining") for _ in range(2))
    for _, layer in prune.prunable(student):
        layer.mask.copy_(prune.magnitude_mask(layer.weight, s.sparsity))
    train.prepare_layers(s, student)
    s.mask = "locked"                       # from here on
    network.freeze(teacher, torch.bfloat16 if s.precision == "bf16" else torch.float32)
    return our_seconds(s, student, teacher, RandomRows(config, LENGTH))


def pretrain_theirs(preset, precision, steps):
    """Seconds per step, as one would write it."""
    from torch.nn.utils import prune as masks
    from transformers import BertConfig, BertForMaskedLM
    s = our_settings(preset, precision, steps, stage="prune", sparsity=0.5)
    config = network.PRESETS[preset]
    dropout = config.hidden_dropout_prob if s.dropout is None else s.dropout
    theirs = BertConfig(vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
                        intermediate_size=config.intermediate_size, hidden_dropout_prob=dropout,
                        attention_probs_dropout_prob=dropout)
    student, teacher = BertForMaskedLM(theirs).train(), BertForMaskedLM(theirs).eval()
    for module in student.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            masks.l1_unstructured(module, "weight", amount=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    data, seconds = RandomRows(config, LENGTH), []
    for step in range(steps):
        started = time.monotonic()
        batch = data.collate(data.rows(step, SIZES[preset], 0, SIZES[preset]))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = student(**inputs, labels=batch["labels"])
            with torch.no_grad():
                taught = teacher(**inputs).logits
            soft = F.kl_div(F.log_softmax(output.logits / s.temperature, -1), F.log_softmax(taught / s.temperature, -1),
                            reduction="sum", log_target=True) * s.temperature ** 2 / batch["labels"].numel()
            loss = (1 - s.kd_weight) * output.loss + s.kd_weight * soft
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), train.LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - started)
    return seconds[1:]


def fine_tune_ours(precision, steps, folder, directory):
    """Seconds per step, from the published rows of SST-2."""
    keep_freed_memory()
    s = our_settings("", precision, steps, stage="finetune", task="sst2", sparsity=0.0, data=folder, init=directory,
                     batch_size=TASK_ROWS, dropout=0.1)
    model, _, data = train.build_model_and_data(s, Path(directory), print)
    train.prepare_layers(s, model)
    len(data)                                       # tokenizes
    return our_seconds(s, model, None, data)


def fine_tune_theirs(precision, steps, folder, directory):
    """Seconds per step of Trainer, on the rows that ours reads."""
    from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    data = tasks.TaskData("sst2", folder, text.load_tokenizer(directory), 128, splits=("train",))
    rows = [{"input_ids": torch.from_numpy(row["input_ids"]).long(), "labels": row["label"]}
            for row in data._split_rows("train")]
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.monotonic())

    def collate(chosen):
        """What DataCollatorWithPadding does: as long as the longest."""
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in chosen], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(),          # [PAD] is word piece 0
                "labels": torch.tensor([row["labels"] for row in chosen])}

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(output_dir=out, per_device_train_batch_size=TASK_ROWS, max_steps=steps,
                                      learning_rate=5e-5, weight_decay=0.01, use_cpu=True, bf16=precision == "bf16",
                                      report_to=[], save_strategy="no", disable_tqdm=True,
                                      train_sampling_strategy="group_by_length")        # as ours does
        Trainer(BertForSequenceClassification.from_pretrained(directory), arguments, train_dataset=rows,
                data_collator=collate, callbacks=[Clock()]).train()
    return [after - before for before, after in zip(ends, ends[1:])]


def measure(what, contender, precision, steps, arguments):
    """One contender in this process: {per_second, peak_gb}. Pre-training counts tokens, fine-tuning examples."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    run.LOG_EVERY = 1
    if what == "sst2":
        fine_tune = fine_tune_ours if contender == "ours" else fine_tune_theirs
        seconds, items = fine_tune(precision, steps, arguments.data, arguments.model), TASK_ROWS
        typical = statistics.mean(seconds)          # lengths differ from batch to batch
    else:
        if contender.startswith("ours"):
            seconds = pretrain_ours(what, precision, steps, "masked" if "masked" in contender else "all")
        else:
            seconds = pretrain_theirs(what, precision, steps)
        items, typical = SIZES[what] * LENGTH, statistics.median(seconds)
    return {"per_second": items / typical, "peak_gb": peak_memory() / 1e9}


def show(what, contenders, precisions, found):
    """The rows of one table, medians over the rounds; ratios to theirs in fp32 and in the same precision."""
    unit = "examples/s" if what == "sst2" else "tokens/s"
    print(f"\n{what:<36}{unit:>11}{'x fp32':>8}{'x same':>8}{'peak GB':>9}{'x fp32':>8}{'rounds':>8}{'target':>8}")
    medians = {key: {name: statistics.median(run[name] for run in runs) for name in ("per_second", "peak_gb")}
               for key, runs in found.items() if key.startswith(what + "|")}
    for contender in contenders:
        for precision in precisions:
            key = f"{what}|{contender}|{precision}"
            plain, same = (medians.get(f"{what}|{contenders[-1]}|{other}") for other in ("fp32", precision))
            if key in medians and plain and same:
                speed, peak = medians[key]["per_second"], medians[key]["peak_gb"]
                print(f"{contender:<30}{precision:<6}{speed:>11,.1f}{speed / plain['per_second']:>8.2f}"
                      f"{speed / same['per_second']:>8.2f}{peak:>9.2f}{peak / plain['peak_gb']:>8.2f}"
                      f"{len(found[key]):>8}{TARGETS.get(contender, ''):>8}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of pre-training, the first is not counted [5]")
    parser.add_argument("--task-steps", type=int, default=40, help="of fine-tuning, the first is not counted [40]")
    parser.add_argument("--only", choices=[*SIZES, "sst2"], help="one table")
    parser.add_argument("--data", default="", help="folder that holds SST-2, for fine-tuning")
    parser.add_argument("--model", default="", help="BERT directory, for fine-tuning")
    parser.add_argument("--json", default=str(ROOT / "bench" / "training.json"), help="[bench/training.json]")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        steps = arguments.task_steps if arguments.child[0] == "sst2" else arguments.steps
        print(json.dumps(measure(*arguments.child, steps, arguments)))
        return
    if bool(arguments.data) != bool(arguments.model) or arguments.only == "sst2" and not arguments.data:
        sys.exit("fine-tuning takes both --data and --model")
    tables = {**{size: PRETRAINING for size in SIZES}, **({"sst2": FINE_TUNING} if arguments.data else {})}
    if arguments.only:
        tables = {arguments.only: tables[arguments.only]}
    precisions = ("fp32", "bf16") if has_bf16("cpu") else ("fp32",)
    path = Path(arguments.json)
    found = json.loads(path.read_text()) if path.is_file() else {}
    others = ("transformers", "accelerate") if arguments.data else ("transformers",)
    here = {"threads": THREADS, **run.versions(ROOT), "peers": {name: importlib.metadata.version(name) for name in others}}
    if found and found.get("made_with") != here:
        sys.exit(f"{path} has figures of another machine, commit or package; give another --json")
    found |= {"made_with": here, "command": typed_command("bench.measure_training", sys.argv[1:])}
    for done in range(1, arguments.rounds + 1):
        for what, contenders in tables.items():
            for key in [f"{what}|{contender}|{precision}" for contender in contenders for precision in precisions]:
                if len(found.get(key, [])) >= done:
                    continue
                print(f"round {done}: {key}", flush=True)
                command = [sys.executable, __file__, *sys.argv[1:], "--child", *key.split("|")]
                child = subprocess.run(command, capture_output=True, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
                if child.returncode:
                    sys.exit(child.stderr)
                found.setdefault(key, []).append(json.loads(child.stdout.splitlines()[-1]))
                write_file(path, json.dumps(found, indent=1) + "\n")
    print(here["processor"], THREADS, "threads, torch", here["torch"])
    for what, contenders in tables.items():
        show(what, contenders, precisions, found)


if __name__ == "__main__":
    main()
