"""Trains for some steps. `--at PHASE` ends the last rank in the third step, as `--how` says.

Phases: push (before it), serve (between push and pull), decode, dense (in Horovod's allreduce), agreement (of the first step),
sum (of the residuals of all ranks, for a checkpoint that any number of ranks may load).
A checkpoint is written before each step. Ranks that end with Horovod's error say so, with exit status 7.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

import ds_horovod
from ds_horovod import DoubleSqueeze
from ds_horovod.compressors import Quantize
from ds_horovod.horovod.transport import HorovodTransport

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--at", choices=["push", "serve", "decode", "dense", "agreement", "sum"])
parser.add_argument("--how", choices=["kill", "raise", "stall"], default="kill")
parser.add_argument("--server", type=int)
parser.add_argument("--checkpoint", type=Path)
arguments = parser.parse_args()

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.ReLU(), torch.nn.Linear(300, 200))
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.01),
    named_parameters=model.named_parameters(),
    compression=DoubleSqueeze(bucket_cap_mb=0.1, server=arguments.server),
)
step = 0


def end():
    if arguments.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if arguments.how == "raise":
        raise RuntimeError("the last rank gives up")
    time.sleep(10**6)


def ends_before(owner, method, in_step=2):
    """The last rank ends when it calls a method in that step."""
    original = getattr(owner, method)

    def call(*args, **kwargs):
        if step == in_step and hvd.rank() == hvd.size() - 1:
            end()
        return original(*args, **kwargs)

    setattr(owner, method, call)


if arguments.at == "agreement":
    ends_before(HorovodTransport, "gather_objects", in_step=0)
elif arguments.at == "sum":
    ends_before(HorovodTransport, "sum")
elif arguments.at == "dense":
    ends_before(hvd.optimizer, "allreduce_async_")
elif arguments.at is not None:
    owner, method = {"push": (HorovodTransport, "push"), "serve": (Quantize, "serve"), "decode": (Quantize, "decode")}[
        arguments.at
    ]
    ends_before(owner, method)

print(f"rank {hvd.rank()}: process {os.getpid()}", flush=True)
try:
    for step in range(arguments.steps):
        if arguments.checkpoint and hvd.rank() == 0:
            state = {"step": step, "model": model.state_dict(), "errors": optimizer.double_squeeze.state_dict()}
            ds_horovod.save(state, arguments.checkpoint)
        if arguments.at == "sum":
            optimizer.double_squeeze.full_state_dict()
        optimizer.zero_grad()
        model(torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
except HorovodInternalError as error:
    print(f"rank {hvd.rank()} at step {step}: HorovodInternalError: {error}", flush=True)
    sys.exit(7)
