"""The largest step there is, measured: BERT-Large in the prune stage at length 512, with its teacher and full
distillation, and one evaluation; how long each takes and the peak memory.

    python -m bench.measure_large                          9 GB, a minute of one core
    python -m bench.measure_large --preset bert-base       3 GB

The weights are random, written to a file of the published shape first, so that loading is part of what is measured; the
text is random word pieces, which cost what words cost.
"""
import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import distill  # noqa: E402
import model as network  # noqa: E402
import prune  # noqa: E402
import train  # noqa: E402
from formats import model_directory  # noqa: E402
from formats.machine import keep_freed_memory, processor_name  # noqa: E402


class Stopwatch:
    """`say` prints what has just been done, how long it took, and the peak memory of the process up to here."""

    def __init__(self):
        self.before = time.monotonic()

    def say(self, what):
        now = time.monotonic()
        unit = 1 if sys.platform == "darwin" else 1024           # bytes there, kilobytes on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(f"{what:<42} {now - self.before:>6.1f} s   peak {peak / 1e9:>5.2f} GB", flush=True)
        self.before = now


def random_batch(config, rows, length):
    """A batch as data.text collates it: 15 % of the word pieces masked, no padding."""
    tokens = torch.randint(5, config.vocab_size, (rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.15, tokens, -100)
    return {"input_ids": torch.where(labels == -100, tokens, 4), "attention_mask": torch.ones_like(tokens),
            "token_type_ids": (torch.arange(length) >= length // 2).long().expand(rows, -1), "labels": labels,
            "next_sentence_label": torch.randint(2, (rows,))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bert-large", choices=sorted(network.PRESETS))
    parser.add_argument("--rows", type=int, default=1, help="of 512 word pieces, in one forward pass [1]")
    parser.add_argument("--precision", default="auto", choices=train.CHOICES["precision"])
    arguments = parser.parse_args()
    keep_freed_memory()
    settings = train.resolve({"preset": arguments.preset, "stage": "prune", "batch_size": arguments.rows,
                              "precision": arguments.precision})
    config, watch = network.PRESETS[arguments.preset], Stopwatch()
    length = min(512, config.max_position_embeddings)
    print(f"{arguments.preset}, {arguments.rows} x {length} word pieces, {settings.precision}, "
          f"{torch.get_num_threads()} threads, {processor_name()}")
    with tempfile.TemporaryDirectory() as folder:
        model_directory.save(network.build(config, "pretraining"), folder)
        watch.say("random weights, written to a file")
        student = model_directory.load(folder, "pretraining").train()
        teacher = network.freeze(model_directory.load(folder, "pretraining"),
                                 torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        watch.say("student and teacher read from it")
    ramp = prune.Ramp(target=0.8, begin=0, end=1, update_end=1, every=1)
    optimizer = train.make_optimizer(settings, student)
    batch = random_batch(config, arguments.rows, length)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
        loss, parts = distill.loss(student, teacher, batch, distill.denominators([batch]))
        watch.say("forward: words, sentences, both distilled")
        loss.backward()
    watch.say("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.say("AdamW")
    prune.update_masks(student, 1, ramp, prune.Pattern(1, 4))
    watch.say(f"masks of 1x4: {prune.measured_sparsity(student):.4%} zeros")
    student.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
        _, held_out = distill.loss(student, None, batch, distill.denominators([batch]))
    watch.say("evaluation")
    print("  ".join(f"{name} {value:.3f}" for name, value in parts.items()) + "   evaluation: "
          + "  ".join(f"{name} {value:.3f}" for name, value in held_out.items()))


if __name__ == "__main__":
    main()
