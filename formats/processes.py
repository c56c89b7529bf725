"""Several processes that train one model, started by torchrun. Each takes its share of every batch and comes to the
same sums, so that their models stay the same. The first, rank 0, alone writes and speaks. Alone, nothing happens here.
"""
import datetime
import os
import sys

import torch
import torch.distributed as dist

from model import InputError

SILENCE = datetime.timedelta(minutes=30)    # how long processes wait for one another before they give up


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def started_together():
    """How many processes torchrun started, before they have met; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1     # some clusters set the first alone


def join_processes(batch_size, micro_batch, device):
    """Meet the other processes, if torchrun started several. InputError where they cannot share a batch."""
    count = started_together()
    if count == 1:
        return
    if batch_size % count:
        raise InputError(f"--batch-size {batch_size} cannot be shared by {count} processes; give a multiple of them")
    share = batch_size // count
    if share % min(micro_batch, share):
        raise InputError(f"--micro-batch {micro_batch} does not divide the {share} rows of each of {count} processes; "
                         f"give a divisor of them")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is {count}, and there is no {' and no '.join(missing)} in the environment; start "
                         f"the processes with torchrun, or take RANK and WORLD_SIZE out of it")
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU of its own, there are "
                             f"{torch.cuda.device_count()}; give torchrun a --nproc_per_node of at most that")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:             # torch's DistStoreError and its like are RuntimeErrors
        raise InputError(f"the {count} processes did not find one another ({str(error).splitlines()[0]}); start all of "
                         f"them with one torchrun command a machine, at the same --rdzv_endpoint") from None


def leave_processes():
    """The first process goes on alone; the others have nothing left to do and end here. They end at once, because a
    crash while Python and torch take themselves apart (seen once: exit code -6) makes torchrun kill the first one,
    which is writing the result."""
    if not dist.is_initialized():
        return
    dist.barrier()
    if rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()


def wait_for_the_first():
    """Before all end: the first process may still be writing a checkpoint."""
    if dist.is_initialized():
        dist.barrier()


def demand_agreement(facts):
    """InputError unless every process found the same: another file, CPU or checkpoint would train another model.
    facts: dict of what is to be the same."""
    if not dist.is_initialized():
        return
    found = [None] * processes()
    dist.all_gather_object(found, facts)
    for number, others in enumerate(found):
        for name, value in others.items():
            if value != found[0][name]:
                raise InputError(f"process {number} has {name} {value}, and process 0 has {found[0][name]}; every "
                                 f"machine needs the same command, files and --out folder")


def summed(numbers, device):
    """A dict of numbers, each added up over all processes."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist()))


def as_in_the_first(tensor):
    """Fill a tensor, in every process, with what it holds in the first."""
    if dist.is_initialized():
        dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, 0)


def add_gradients(model):
    """Replace every gradient by its sum over all processes. Each loss was divided by the counts of all of them."""
    if dist.is_initialized():
        under_way = [dist.all_reduce(parameter.grad, async_op=True) for parameter in model.parameters()
                     if parameter.grad is not None]
        for exchange in under_way:
            exchange.wait()
