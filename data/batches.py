"""The batches of a run: a step's rows, shared among processes, cut into micro-batches, made while the step before it
computes. `data` is a text.PretrainingData or a tasks.TaskData.
"""
from concurrent.futures import ThreadPoolExecutor

from formats.processes import processes, rank, started_together


def batches_ahead(data, first, steps, batch_size, micro_batch, device):
    """Yields (step, its micro-batches on the device), each made on a thread while the step before it computes."""
    with ThreadPoolExecutor(1) as background:
        coming = background.submit(batches_of, data, first, batch_size, micro_batch)
        for step in range(first, steps):
            batches = coming.result()
            if step + 1 < steps:
                coming = background.submit(batches_of, data, step + 1, batch_size, micro_batch)
            yield step, [to_device(batch, device) for batch in batches]


def batches_of(data, step, batch_size, micro_batch):
    """This process's share of the step's rows, as a list of micro-batches."""
    share = batch_size // processes()
    rows = data.rows(step, batch_size, rank() * share, (rank() + 1) * share)
    return [data.collate(rows[i:i + micro_batch]) for i in range(0, len(rows), micro_batch)]


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def rows_at_once(s):
    """Rows of a forward pass under these settings, a train.Settings."""
    return min(s.micro_batch, s.batch_size // started_together())


def dropout_seed(s, step, number):
    """The seed of a forward pass's dropout, from its first row's place in the batch: it does not matter which process
    computes it. number: of this process's micro-batches."""
    first = rank() * (s.batch_size // processes()) + number * s.micro_batch
    return ((s.seed * 1_000_003 + step) * 1_000_003 + first) % 2 ** 63
