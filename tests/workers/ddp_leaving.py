"""Rank 1 dies or stalls in mid-training: ``torchrun --nproc-per-node 2 tests/workers/ddp_leaving.py die|stall``."""

import datetime
import os
import sys
import time

import torch.distributed as dist
from ddp import gradients, make

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
model, _ = make()
start = time.monotonic()
try:
    for step in range(1000):
        if dist.get_rank() == 1 and step == 3:
            if sys.argv[1] == "die":
                os._exit(0)  # as a success, or torchrun would end the other one
            time.sleep(60)
        model(gradients(step)).backward()
except RuntimeError as error:
    assert step == 3 and time.monotonic() - start < 50, error
    print(f"left: ok ({error})", flush=True)
    os._exit(3)
