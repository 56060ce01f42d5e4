"""One process: DoubleSqueeze changes nothing, but takes care of what it was asked to instead of the optimizer."""

import horovod.torch as hvd
import torch

import ds_horovod
from ds_horovod import DoubleSqueeze, TopK

hvd.init()
assert hvd.size() == 1
results = []
for compression in (hvd.Compression.none, DoubleSqueeze(TopK(0.01))):
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=compression)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 100)).square().sum().backward()
        optimizer.step()
    results.append(model.weight.detach().clone())
assert torch.equal(*results)
assert optimizer.double_squeeze.stats() == {}
state = optimizer.double_squeeze.state_dict()
assert state["buckets"] == []
optimizer.double_squeeze.load_state_dict(state)

# Momentum and clipping are the same with one rank as with several.
weights = []
for momentum, own in ((0.9, hvd.Compression.none), (0.0, DoubleSqueeze(TopK(0.01), momentum=0.9, max_norm=0.5))):
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=own)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 100)).square().sum().backward()
        if own is hvd.Compression.none:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    weights.append(model.weight.detach().clone())
torch.testing.assert_close(*weights)
state = optimizer.double_squeeze.state_dict()
assert sorted(state["velocities"]) == ["bias", "weight"]

assert optimizer.double_squeeze.explain().startswith(
    "one rank: nothing is exchanged, and so nothing compressed; with workers=2:"
)
optimizer.double_squeeze.broadcast_state()

# Nothing is sent, so that optimizers may share a model, as they may without compression.
other = torch.optim.SGD(model.parameters(), lr=0.1)
other = hvd.DistributedOptimizer(other, named_parameters=model.named_parameters(), compression=TopK(0.01))
for one in (optimizer, other):
    model(torch.randn(4, 100)).square().sum().backward()
    one.step()

value = torch.randn(10)
assert torch.equal(ds_horovod.allreduce(value, name="alone"), value)
print("alone: ok")
