"""What the settings of training cost and give: tokens a second, peak memory, and what bench/memory.py foretold.

    python -m bench.measure_training_settings                                    MiniLM-L6 at 16 x 128, three settings
    python -m bench.measure_training_settings --preset bert-base --rows 4        BERT-Base at 4 x 128
    python -m bench.measure_training_settings --preset bert-large --rows 1 --length 512 --only bf16 --steps 2

The prune stage with its teacher, all positions distilled, through the loop of train.py itself; random weights, and text
of random word pieces, which cost what words cost. All start from the same weights and read the same text, so that their
losses differ by rounding; smaller micro-batches draw other word pieces. Every setting has a process of its own. The
first step is not timed.
"""
import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import model as network  # noqa: E402
import train  # noqa: E402
from bench.memory import estimate_memory  # noqa: E402
from formats import model_directory, run  # noqa: E402
from formats.machine import cores, has_bf16, keep_freed_memory, processor_name  # noqa: E402
from formats.run import Log  # noqa: E402

SETTINGS = {
    "fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"},
    "bf16, micro-batch of a quarter": {"precision": "bf16", "micro_batch": 4},       # a divisor, here and there a row
}


class RandomRows:
    """In place of data.text: batches of random word pieces, 15 % of them masked, all of full length."""

    def __init__(self, config, length):
        self.config, self.length = config, length
        self.generator = torch.Generator().manual_seed(0)           # not the global one: batches are made on a thread

    def rows(self, step, batch_size, begin, end):
        return range(begin, end)

    def collate(self, rows):
        shape, generator = (len(rows), self.length), self.generator
        tokens = torch.randint(5, self.config.vocab_size, shape, generator=generator)
        labels = torch.where(torch.rand(shape, generator=generator) < 0.15, tokens, -100)
        return {"input_ids": torch.where(labels == -100, tokens, 4), "attention_mask": torch.ones_like(tokens),
                "token_type_ids": (torch.arange(self.length) >= self.length // 2).long().expand(shape),
                "labels": labels, "next_sentence_label": torch.randint(2, shape[:1], generator=generator)}


def measure(preset, rows, length, steps, setting):
    """One setting in this process: {tokens_per_second, estimated_gb, peak_gb, loss of the last step}."""
    keep_freed_memory()
    run.LOG_EVERY = 1
    changes = dict(SETTINGS[setting])
    if "micro_batch" in changes:
        changes["micro_batch"] = max(1, rows // 4)
    s = train.resolve({"preset": preset, "stage": "prune", "batch_size": rows, "max_len": length, "steps": steps,
                       "update_every": 0.5, "ramp_end": 0.4, **changes})
    torch.set_num_threads(s.threads)
    config = network.PRESETS[preset]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        model_directory.save(network.build(config, "pretraining"), folder)
        student, teacher = (model_directory.load(folder, "pretraining") for _ in range(2))
        network.freeze(teacher, torch.bfloat16 if s.precision == "bf16" else torch.float32)
        train.prepare_layers(s, student)
        estimate = estimate_memory(s, student, teacher)
        train.train(s, student, teacher, RandomRows(config, length), {}, Log(folder), folder, None)
        with open(folder / "log.csv") as file:
            log = list(csv.DictReader(file))
    speeds = [float(row["tokens_per_second"]) for row in log]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"tokens_per_second": max(speeds[1:], default=speeds[0]), "estimated_gb": estimate / 1e9,
            "peak_gb": peak / 1e9, "loss": float(log[-1]["loss"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minilm-l6", choices=sorted(network.PRESETS))
    parser.add_argument("--rows", type=int, default=16, help="of a batch [16]")
    parser.add_argument("--length", type=int, default=128, help="word pieces of a row [128]")
    parser.add_argument("--steps", type=int, default=6, help="the fastest counts, the first does not [6]")
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.preset, arguments.rows, arguments.length, arguments.steps, arguments.only)))
        return
    print(f"{arguments.preset}, {arguments.rows} x {arguments.length}, {cores()} cores, "
          f"{processor_name()}, torch {torch.__version__}")
    print(f"{'':<32}{'tokens/s':>10}{'peak GB':>10}{'foretold':>10}{'error':>8}{'loss':>10}")
    for setting in [arguments.only] if arguments.only else SETTINGS:
        if setting.startswith("bf16") and not has_bf16("cpu"):
            continue
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", setting, "--child"],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{setting:<32}{found['tokens_per_second']:>10,.0f}{found['peak_gb']:>10.2f}"
              f"{found['estimated_gb']:>10.2f}"
              f"{found['estimated_gb'] / found['peak_gb'] - 1:>8.0%}{found['loss']:>10.4f}", flush=True)


if __name__ == "__main__":
    main()
