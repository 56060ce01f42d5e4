"""What the scripts of checks share: run by ``horovodrun -np N python tests/workers/SCRIPT.py FILE``.

Every rank runs every check of a script: see registry.py. test_horovod.py makes a test of each.
"""

import os
import time

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from registry import run_checks
from torch import nn
from torch.nn.functional import cross_entropy

from ds_horovod import DoubleSqueeze


def _wait_and_clear(handle, original=mpi_ops.mpi_lib.horovod_torch_wait_and_clear):
    while not mpi_ops.mpi_lib.horovod_torch_poll(handle):
        time.sleep(0.0003)
    original(handle)


# Horovod's own spins. With two ranks to a core, a collective takes five times as long then.
mpi_ops.mpi_lib.horovod_torch_wait_and_clear = _wait_and_clear


# ---- helpers


def small_model(seed=0, dtype=torch.float32):
    """Parameters of odd sizes, several to a bucket, biases that stay dense."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 47), nn.Tanh(), nn.Linear(47, 7)).to(dtype)


def batch(step, dtype=torch.float32):
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + hvd.rank())
    return torch.randn(16, 33, generator=generator).to(dtype), torch.randint(0, 7, (16,), generator=generator)


def distributed(model, compression, kind=torch.optim.SGD, options=None, **kwargs):
    optimizer = kind(model.parameters(), **({"lr": 0.1} if options is None else options))
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=compression, **kwargs)


def squeeze(*args, **kwargs):
    """Compresses small parameters too, in small buckets."""
    return DoubleSqueeze(*args, **{"min_numel": 64, "bucket_cap_mb": 0.01, **kwargs})


def accumulate(model, step, passes):
    for i in range(passes):
        x, y = batch(10 * step + i)
        cross_entropy(model(x), y).backward()


def train_step(model, optimizer, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    optimizer.zero_grad()
    cross_entropy(model(x).float(), y).backward()
    optimizer.step()


def flat(tensors):
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def everyones(values):
    """Rank by rank."""
    return hvd.allgather(values.unsqueeze(0).contiguous(), name="everyones")


def assert_identical(model):
    """Bit for bit, on all ranks."""
    own = torch.cat([p.detach().contiguous().view(-1).view(torch.uint8) for p in model.parameters()])
    rows = everyones(own)
    assert all(torch.equal(rows[0], row) for row in rows), "replicas differ"


def errors_in_gradient_order(optimizer):
    """(mean_i e_i, E) over all ranks for each compressed parameter, as dense float64 tensors by name."""
    buckets = optimizer.double_squeeze._reducer.session.buckets
    own = []
    for exchange in (bucket.exchange for bucket in buckets):
        layout = exchange.layout
        both = torch.zeros(2, layout.numel, dtype=torch.float64)
        if exchange.worker_error is not None:
            both[0] = exchange.worker_error
        if exchange.server_error is not None:
            start = exchange.transport.serves * layout.shard_numel
            both[1, start : start + layout.shard_numel] = exchange.server_error
        own.append(both)
    if not own:
        return {}
    # One collective for all buckets: with several ranks to a core, collectives are what the checks take their time for.
    rows = everyones(torch.cat(own, 1))
    result, start = {}, 0
    for bucket in buckets:
        layout = bucket.exchange.layout
        for name, offset, numel in zip(bucket.names, layout.offsets, layout.numels, strict=True):
            own = rows[..., start + offset : start + offset + numel]
            result[name] = own[:, 0].mean(0), own[:, 1].sum(0)
        start += layout.numel
    return result


def main(process_sets=None):
    # Which tensors Horovod joins for one sum depends on when they come, and so does the order in which it adds their elements.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    hvd.init(process_sets=process_sets)
    torch.set_num_threads(1)
    run_checks(hvd.rank())
