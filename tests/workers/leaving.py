"""Rank 1 is killed while a collective of rank 0 is under way, and rank 0 begins another. See test_failures.py.

Python keeps the GIL meanwhile, as it does between two hooks, but for longer. Horovod's thread is ending and drops its tensors,
under a lock that the other collective wants.
"""

import sys
import time

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from ds_horovod import OneBit
from ds_horovod.horovod.transport import HorovodTransport

kind = sys.argv[1]
hvd.init()
model = torch.nn.Linear(300, 300)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=OneBit()
)
bytes_ = torch.zeros(2, 8, dtype=torch.uint8)


def begin(number):
    if kind == "dense":  # a layer that is large, and not compressed
        p = [model.weight, model.bias][number]
        p.grad = torch.ones_like(p)
        optimizer._double_squeeze_dense.add(p, late=False)
    elif kind == "push":
        transport.push(bytes_, f"push.{number}")
    else:
        transport.pull(bytes_[0], 8, f"pull.{number}", torch.device("cpu"))


transport = HorovodTransport(server=0 if kind == "broadcast" else None)
if hvd.rank() == 1:
    time.sleep(1000)
begin(0)
transport.waiting(1.0, ["this"])
sys.setswitchinterval(1000)
print("begun", flush=True)
end = time.perf_counter() + 4
while time.perf_counter() < end:
    pass
try:
    begin(1)
except HorovodInternalError as error:
    told = str(error)
try:  # what has begun too late to be told
    transport.waiting(1.0, ["another"])
except HorovodInternalError as error:
    print(f"told: {told}\n{error}", flush=True)
