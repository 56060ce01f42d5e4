"""Trains until the last rank kills itself in backward; the others must end with Horovod's error."""

import os
import signal
import sys

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from ds_horovod import DoubleSqueeze

hvd.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.ReLU(), torch.nn.Linear(300, 200))
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.01),
    named_parameters=model.named_parameters(),
    compression=DoubleSqueeze(bucket_cap_mb=0.1),
)


def die(gradient):
    if hvd.rank() == hvd.size() - 1 and step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


model[0].weight.register_hook(die)  # the bucket of the last layer is under way by then
try:
    for step in range(1000):  # noqa: B007 (the hook reads it)
        optimizer.zero_grad()
        model(torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
except HorovodInternalError as error:
    print(f"rank {hvd.rank()} at step {step}: HorovodInternalError: {error}")
    sys.exit(7)
