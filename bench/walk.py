"""One batch's way through a step of pruning, and one sentence's through the INT8 engine, with shapes and numbers.

    python -m bench.walk            seconds, on the tiny world, from random weights of seed 0

docs/walk.md shows what this prints and says what it means.
"""
import copy
import tempfile
from pathlib import Path

import torch

import distill
import infer_cpu
import model as network
import prune
import quant
from data import recipes, shards, tasks, text, tiny
from data.corpus import read_documents
from formats import model_directory
from formats.int8 import write_int8

RECIPE = recipes.RECIPES["tiny"]["prune"]
STEPS, STEP, RATE = RECIPE["steps"], 300, RECIPE["lr"]
WARMUP = round(RECIPE["warmup"] * STEPS)
RAMP = prune.Ramp(target=0.85, begin=0, end=500, update_end=800, every=10)
BITS = 7                        # of the activations: exact on every CPU, 8 where it has VNNI
SENTENCE = "The film was superb and moving."


def shape(tensor):
    return "x".join(map(str, tensor.shape))


def show_batch(data, tokenizer):
    """The step's batch, its first row as words."""
    batch = data.collate(data.rows(STEP, 16))
    for name, tensor in batch.items():
        print(f"{name:<20} {shape(tensor)}")
    words = [tokenizer.id_to_token(i) for i in batch["input_ids"][0].tolist()]
    print("first row:", " ".join(words[:20]), "…")
    count = distill.denominators([batch])
    print(f"rows {count['rows']}, tokens {count['tokens']}, words to predict {count['masked']}")
    return batch, count


def show_forward(student, batch):
    """The hidden states and what the heads make of them."""
    inputs = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    for number, hidden in enumerate(student.encoder.states(*inputs)):
        print(f"hidden states after layer {number}: {shape(hidden)}")
    features, next_sentence = student(*inputs, batch["labels"] != -100)
    weight, _ = student.vocabulary()
    print(f"features at the words to predict: {shape(features)}, vocabulary: {shape(weight)}")
    print(f"next sentence: {shape(next_sentence)}")


def show_step(student, teacher, batch, count):
    """Loss, gradient, optimizer step, new masks."""
    loss, parts = distill.loss(student, teacher, batch, count)
    print("loss", f"{float(loss.detach()):.3f}:", ", ".join(f"{name} {value:.3f}" for name, value in parts.items()))
    loss.backward()
    layer = student.encoder.layers[0].query
    dead = layer.weight.grad[~layer.mask]
    print(f"weights masked in the first query {len(dead)}, the largest gradient among them {float(dead.abs().max()):g}")
    factors = [prune.learning_rate_factor(step, STEPS, WARMUP, RAMP) for step in (299, 300, 309, 310, 499, 500, 900)]
    print("learning rate at steps 299, 300, 309, 310, 499, 500, 900:",
          " ".join(f"{RATE * factor:.6f}" for factor in factors))
    before = layer.mask.clone()
    torch.optim.AdamW(student.parameters(), lr=RATE * factors[1]).step()
    prune.update_masks(student, STEP, RAMP, prune.Pattern())
    print(f"sparsity {prune.sparsity_at(STEP - RAMP.every, RAMP):.4f} -> {prune.sparsity_at(STEP, RAMP):.4f}, "
          f"measured {prune.measured_sparsity(student):.4f}")
    print(f"in the first query {int((before & ~layer.mask).sum())} weights go, {int((~before & layer.mask).sum())} "
          f"come back")


def show_rounding(classifier, data):
    """The slots prepared, one batch seen; then the first query layer's product in integers."""
    quant.prepare(classifier, bits=BITS)
    quant.round_embeddings(classifier)
    batch = data.collate(data.rows(0, 32))
    inputs = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    classifier.train()
    with torch.no_grad():
        classifier(*inputs)
    quant.update_ranges(classifier)
    classifier.eval()
    layer, seen = classifier.encoder.layers[0].query, []
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        classifier(*inputs)
        fake = layer(seen[0])
    handle.remove()
    packed, x = quant.pack(layer), seen[0]
    integers = quant.quantize_activation(x, packed.input_scale, packed.input_zero_point, BITS)
    sums = quant.integer_linear(integers, quant.unpack(packed), packed.input_zero_point)
    print(f"input {shape(x)}: scale {float(packed.input_scale):.4f}, zero point {int(packed.input_zero_point)}")
    print("first numbers", " ".join(f"{value:.2f}" for value in x[0, 0, :5].tolist()),
          "-> levels", " ".join(map(str, integers[0, 0, :5].tolist())))
    print(f"weights kept {len(packed.values)} of {layer.weight.numel()}, a bit for each, "
          f"{len(packed.weight_scale)} scales")
    print(f"integer sums {shape(sums)}; scaled, they differ from fake quantization by less than 1e-4:",
          "yes" if (quant.integer_forward(x, packed) - fake).abs().max() < 1e-4 else "no")


def show_engine(classifier, tokenizer):
    """A sentence through the stored INT8 file and through fake quantization."""
    data = tasks.TaskData("sst2", "", tokenizer, 32, splits=())
    with tempfile.TemporaryDirectory() as folder:
        model_directory.save(classifier, Path(folder), data.labels,
                             {"task": "sst2", "max_len": 32, "activation_bits": BITS, "weight_scales": "row"})
        text.save_tokenizer(tokenizer, Path(folder))
        write_int8(classifier, Path(folder))
        engine = infer_cpu.load(folder, "int8")
        ids = torch.tensor([tokenizer.encode(SENTENCE).ids])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        print(" ".join(tokenizer.id_to_token(i) for i in ids[0].tolist()), "->", shape(ids))
        logits = engine(batch)
        with torch.no_grad():
            fake = classifier(*batch.values())
        print("logits", " ".join(f"{value:.2f}" for value in logits[0].tolist()), "by the engine,",
              " ".join(f"{value:.2f}" for value in fake[0].tolist()), "by fake quantization")
        print("answer:", engine.answer([SENTENCE])[0][0])


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    world = tiny.ensure()
    config = network.PRESETS["tiny"]
    tokenizer = shards.corpus_tokenizer(world / "corpus.txt", config.vocab_size)
    data = text.PretrainingData(read_documents(world / "corpus.txt"), tokenizer, 48)
    student = network.build(config, "pretraining")
    network.set_dropout(student, 0.0)
    teacher = network.freeze(copy.deepcopy(student), torch.float32)

    print("# 1. The batch")
    batch, count = show_batch(data, tokenizer)
    print("# 2. Forward")
    prune.update_masks(student, STEP - RAMP.every, RAMP, prune.Pattern())
    show_forward(student, batch)
    print("# 3. A step of pruning")
    show_step(student, teacher, batch, count)
    print("# 4. Rounding")
    classifier = network.build(config, "classification")
    classifier.encoder.load_state_dict(student.encoder.state_dict())
    prune.update_masks(classifier, RAMP.update_end, RAMP, prune.Pattern())
    prune.burn_in(classifier)
    show_rounding(classifier, tasks.TaskData("sst2", world, tokenizer, 32, splits=("train",)))
    print("# 5. A sentence")
    show_engine(classifier, tokenizer)


if __name__ == "__main__":
    main()
