"""Two process sets that train at once, and an optimizer of all ranks: run with ``horovodrun -np 4``."""

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ds_horovod
from ds_horovod import DoubleSqueeze, NoCompression, OneBit, TopK

low, high = hvd.ProcessSet([0, 1]), hvd.ProcessSet([2, 3])
hvd.init(process_sets=[low, high])
torch.set_num_threads(1)
mine, other = (low, high) if hvd.rank() < 2 else (high, low)


def train(compression, process_set, steps):
    """Weights after some steps."""
    torch.manual_seed((process_set.ranks or [9])[0])
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 7))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        process_set=process_set,
    )
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + hvd.rank())
        optimizer.zero_grad()
        x, y = torch.randn(16, 33, generator=generator), torch.randint(0, 7, (16,), generator=generator)
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def assert_identical(weights, process_set):
    rows = hvd.allgather(weights.unsqueeze(0), name="weights", process_set=process_set)
    assert len(rows) == process_set.size() and all(torch.equal(rows[0], row) for row in rows)


def squeeze(*args, **options):
    return DoubleSqueeze(*args, min_numel=64, **options)


# One set has made more optimizers than the other before all ranks make one together; the sets take unequal numbers of steps.
for round in range(1 + (mine is high)):
    assert_identical(train(squeeze(OneBit(64)), mine, 3 + round), mine)
exact = train(squeeze(NoCompression()), mine, 4)
torch.testing.assert_close(exact, train(hvd.Compression.none, mine, 4), rtol=1e-5, atol=1e-6)
everybody = train(squeeze(TopK(0.1), server=3), hvd.global_process_set, 3)
assert_identical(everybody, hvd.global_process_set)

# The server is named as hvd.rank counts, and must be in the set.
assert_identical(train(squeeze(OneBit(64), server=mine.ranks[1]), mine, 3), mine)
try:
    train(squeeze(OneBit(64), server=other.ranks[0]), mine, 1)
except ValueError as error:
    expected = f"server must be one of the ranks {mine.ranks[0]}, {mine.ranks[1]}; got {other.ranks[0]}"
    assert expected in str(error), error
else:
    raise AssertionError("a server outside of the set was taken")

# A rank that is not in an optimizer's process set trains alone, as it does in stock Horovod.
alone = train(squeeze(OneBit(64)), low, 3)
if mine is high:
    torch.testing.assert_close(alone, train(hvd.Compression.none, low, 3))
else:
    train(hvd.Compression.none, low, 3)

value = torch.full((40,), float(hvd.rank()))
mean = ds_horovod.allreduce(value, name="of a set", compression=DoubleSqueeze(NoCompression()), process_set=mine)
assert torch.equal(mean, torch.full((40,), sum(mine.ranks) / 2))
hvd.barrier()  # whoever leaves first ends Horovod for the others
print("process sets: ok")
