"""How much memory a training stage will take at its peak, before it is needed. Takes the flags of train.py.

    python -m bench.memory --stage prune --batch-size 64 --micro-batch 8
"""
import contextlib
import copy
import ctypes
import math
import resource
import sys
from pathlib import Path

import torch

import distill
import train
from formats.processes import processes
from model import InputError

# Measured with bench/measure_training_settings.py: what the C library takes for each byte in use, for the gaps between
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
    forward = 3 * hidden + layers * layer
    if model.kind == "pretraining":
        words = model.encoder.word.weight
        positions = rows * s.max_len * (1 if teacher and s.kd_target == "all" else 0.15)
        forward += 3 * 4 * words.numel()                # their gradient: as decoder, as input table, and the sum
        logits, number = positions * len(words), 2 if s.precision == "bf16" else 4
        chunks = min(2, math.ceil(logits / distill.CHUNK_ELEMENTS))                     # the next, before the last goes
        forward += int(number * (1 + bool(teacher)) * chunks * min(distill.CHUNK_ELEMENTS, logits))
    return now + int(HEAP * (2 * weights + (weights + forward if rows * processes() < s.batch_size
                                            else max(weights, forward))))


def stage_of(arguments):
    """Flags of train.py -> Settings. InputError unless they name one training stage."""
    typed = train.parse_settings(arguments)
    if typed.get("stage", "all") in ("all", "evaluate"):
        raise InputError("it takes one training stage; name it with --stage")
    return train.resolve(typed)


def build_stage(s):
    """(model, teacher or None, data) as the stage has them before its first step."""
    init, teacher_directory = train.parents_of(s)
    torch.manual_seed(s.seed)
    model, _, data = train.build_model_and_data(s, init, lambda line: None)
    teacher = train.load_teacher(s, teacher_directory, model, data, lambda line: None)
    train.prepare_layers(s, model)
    return model.to(s.device), teacher, data


def main(arguments=None):
    try:
        s = stage_of(arguments)
        model, teacher, _ = build_stage(s)
    except InputError as error:
        print(f"bench.memory: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"about {estimate_memory(s, model, teacher) / 1e9:.2f} GB at its peak, with rows of {s.max_len} tokens"
          + "; shorter ones take less" * (model.kind != "pretraining"))


if __name__ == "__main__":
    main()
