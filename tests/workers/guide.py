"""Runs recipes of docs/guide.md, each from a fresh start: ``horovodrun -np N python tests/workers/guide.py RECIPE ..``."""

import os
import sys
import tempfile
from pathlib import Path

import horovod.torch as hvd
import torch

given, *recipes = (Path(file).read_text() for file in sys.argv[1:])
hvd.init()
torch.set_num_threads(1)
folder = hvd.broadcast_object(tempfile.mkdtemp(), name="folder") if hvd.size() > 1 else tempfile.mkdtemp()
os.chdir(folder)
for file, recipe in zip(sys.argv[2:], recipes, strict=True):
    names = {"__name__": "__main__"}
    exec(compile(given, sys.argv[1], "exec"), names)
    start = torch.cat([p.detach().view(-1) for p in names["model"].parameters()])
    exec(compile(recipe, file, "exec"), names)
    weights = torch.cat([p.detach().view(-1) for p in names["model"].parameters()])
    rows = hvd.allgather(weights.unsqueeze(0), name="weights")
    assert all(torch.equal(rows[0], row) for row in rows), f"{file}: replicas differ"
    assert not torch.equal(weights, start), f"{file}: nothing was learned"
    hvd.barrier()
    print(f"rank {hvd.rank()}: {Path(file).stem}: ok", flush=True)
