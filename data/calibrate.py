"""What layers read while some text goes through a dense encoder and through the one that is pruned, layer by layer; and
the zeros and weights that follow from it (prune.reconstruct)."""
import copy
import time

import torch
from tqdm import tqdm

import prune
from formats.processes import as_in_the_first, rank

TOKENS = 2 ** 16            # of text to look at
ROWS_AT_ONCE = 32
ORDER = (("query", "key", "value"), ("attention_output",), ("intermediate",), ("output",))      # these read one input


@torch.no_grad()
def cut(model, data, sparsity, pattern, say):
    """Bring every prunable layer of a dense model to its sparsity at once, before it is trained; what it says of that
    goes to `say`. data: a text.PretrainingData, whose first training rows are looked at."""
    begun, encoder, device = time.monotonic(), model.encoder, next(model.parameters()).device
    was_training = model.training
    model.eval()
    dense = copy.deepcopy(encoder)
    batches, count, step = [], 0, 0
    while count < TOKENS:
        batch = data.collate(data.rows(step, ROWS_AT_ONCE))
        count, step = count + int(batch["attention_mask"].sum()), step + 1
        batches.append((batch["attention_mask"].bool().to(device), *[encoder.embedded(
            batch["input_ids"].to(device), batch["token_type_ids"].to(device))] * 2))
    with tqdm(total=len(encoder.layers) * len(ORDER), desc="reconstruction", unit="product", disable=rank() > 0) as bar:
        for layer, old in zip(encoder.layers, dense.layers):
            for names in ORDER:
                pairs = [(getattr(layer, name), getattr(old, name)) for name in names]
                replace(pairs, *products(layer, old, *pairs[0], batches), sparsity, pattern)
                bar.update()
            batches = [(real, layer(ours, real[:, None, None]), old(theirs, real[:, None, None]))
                       for real, ours, theirs in batches]
    errors = [((ours - theirs)[real].square().sum(), theirs[real].square().sum()) for real, ours, theirs in batches]
    if encoder.pooler is not None:
        firsts = [torch.cat([hidden[i][:, 0] for hidden in batches]).cpu().double() for i in (1, 2)]
        replace([(encoder.pooler, dense.pooler)], firsts[0].T @ firsts[0], firsts[1].T @ firsts[0], sparsity, pattern)
    model.train(was_training)
    share = sum(float(error) for error, _ in errors) / sum(float(size) for _, size in errors)
    say(f"all zeros at once, of {count:,} tokens of text: the squared error of the last hidden states is {share:.1%} of "
        f"their square, before any training; {time.monotonic() - begun:,.0f} s")


def products(layer, old, reader, old_reader, batches):
    """X X^T and X_0 X^T, float64 (in, in) on the CPU, of what the Linear `reader` of a layer reads and `old_reader` in
    the old one, over all real tokens."""
    gram, cross = 0.0, 0.0
    for real, ours, theirs in batches:
        inputs = [read_by(each, linear, hidden, real) for each, linear, hidden in
                  ((layer, reader, ours), (old, old_reader, theirs))]
        gram, cross = (total + (each.T @ inputs[0]).cpu().double() for total, each in zip((gram, cross), inputs))
    return gram, cross


def read_by(layer, linear, hidden, real):
    """The inputs (tokens, in) that one Linear of a layer reads, caught in its slot."""
    caught = []

    def catch(x, weight, _):
        caught.append(x)
        return x, weight
    linear.fake_quant = catch
    layer(hidden, real[:, None, None])
    linear.fake_quant = None
    return caught[0][real].float()


def replace(pairs, gram, cross, sparsity, pattern):
    """Set mask and weights of the first Linear of each pair to what keeps the outputs of the second."""
    for linear, old in pairs:
        weight, mask = prune.reconstruct((old.weight * old.mask).cpu(), gram, cross, sparsity, pattern)
        linear.weight.copy_(weight)
        linear.mask.copy_(mask)
        as_in_the_first(linear.weight)          # sums are rounded in another way on another machine
        as_in_the_first(linear.mask)
