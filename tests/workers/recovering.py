"""Trains in short steps until one rank is left. See soak.py, which kills the others.

Its argument is "ours" or "stock": with DoubleSqueeze and its defaults, or without ds_horovod.
"""

import faulthandler
import os
import signal
import sys

import horovod.torch as hvd
import torch

compressed = sys.argv[1] == "ours"
if compressed:
    import ds_horovod

faulthandler.register(signal.SIGUSR1)
hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [layer for _ in range(6) for layer in (torch.nn.Linear(200, 200), torch.nn.LayerNorm(200), torch.nn.ReLU())]
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
options = {"compression": ds_horovod.DoubleSqueeze(bucket_cap_mb=0.2)} if compressed else {}
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, **options)
assert ("ds_horovod" in sys.modules) == compressed


@hvd.elastic.run
def train(state):
    for step in range(10**9):
        optimizer.zero_grad()
        model(torch.randn(4, 200)).square().mean().backward()
        optimizer.step()
        state.step += 1
        if step == 1:
            print(f"rank {hvd.rank()} of {hvd.size()}: process {os.getpid()}", flush=True)
        if step % 5 == 0:
            state.commit()
        if step == 5 and hvd.size() == 1:
            return


train(state)
