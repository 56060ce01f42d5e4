"""Trains a classifier of handwritten digits under Horovod, and goes on from its checkpoint when it is run again.

    horovodrun -np 2 python examples/horovod_digits.py
    horovodrun -np 2 python examples/horovod_digits.py --compression none --checkpoint none.pt      # to compare

It shows warm-up of the learning rate, metrics that are averaged over ranks, and a checkpoint from which any number of ranks
can go on. Lines with `squeeze` are all that compression adds.
"""

import argparse
from pathlib import Path

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ds_horovod
from ds_horovod import DoubleSqueeze

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--compression", choices=["default", "none"], default="default")
parser.add_argument("--checkpoint", type=Path, default=Path("digits.pt"), help="written by rank 0 after every epoch")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--warmup-epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=0.01, help="for one rank; it is multiplied by their number")
args = parser.parse_args()

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(torch.tensor(pixels).float() / 16, torch.tensor(digits), random_state=0)
data = TensorDataset(train_x, train_y)
sampler = DistributedSampler(data, hvd.size(), hvd.rank())
loader = DataLoader(data, batch_size=16, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

squeeze = DoubleSqueeze() if args.compression == "default" else None
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=squeeze or hvd.Compression.none)

# Rank 0 reads the checkpoint, and everybody gets epoch, weights, optimizer and errors from it. This comes after the line above:
# hvd.DistributedOptimizer makes a new optimizer, and leaves the state of the old one behind.
saved = {"epoch": 0}
if hvd.rank() == 0 and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if squeeze and "errors" in saved:  # what compression has not sent yet is part of the state of training, too
        squeeze.load_state_dict(saved["errors"])
first_epoch = hvd.broadcast_object(saved["epoch"], root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # last, since the line before may change weights
if squeeze:
    squeeze.broadcast_state(root_rank=0)


def mean(value: torch.Tensor, name: str) -> float:
    """Over all ranks. Metrics go through Horovod's own allreduce, uncompressed."""
    return hvd.allreduce(value.detach().double(), name=name).item()


for epoch in range(first_epoch, args.epochs):
    sampler.set_epoch(epoch)
    for i, (x, y) in enumerate(loader):
        progress = epoch + (i + 1) / len(loader)
        optimizer.param_groups[0]["lr"] = args.lr * (1 + (hvd.size() - 1) * min(1.0, progress / max(1, args.warmup_epochs)))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # each rank tests with a part of the data
        correct = (model(test_x[hvd.rank() :: hvd.size()]).argmax(1) == test_y[hvd.rank() :: hvd.size()]).sum()
    accuracy, train_loss = hvd.size() * mean(correct, "correct") / len(test_y), mean(loss, "loss")
    state = {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if squeeze:
        state["errors"] = squeeze.full_state_dict()  # all ranks call it, and one of them writes it
    if hvd.rank() == 0:
        ds_horovod.save(state, args.checkpoint)
        print(f"epoch {epoch + 1}: loss {train_loss:.4f}, accuracy {accuracy:.3f}", flush=True)

if squeeze and hvd.rank() == 0:
    print(squeeze.explain())
    print(f"{squeeze.stats().get('compression_ratio', 1.0):.1f} times fewer bytes sent")
