"""Trains a classifier of handwritten digits with DistributedDataParallel, gradients compressed to 4 bits both ways.

torchrun --nproc-per-node 2 examples/ddp_digits.py
torchrun --nproc-per-node 2 examples/ddp_digits.py --compression none      # to compare
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ds_horovod import DoubleSqueeze
from ds_horovod.ddp import register

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--compression", choices=["default", "none"], default="default")
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

dist.init_process_group("gloo")
torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(torch.tensor(pixels).float() / 16, torch.tensor(digits), random_state=0)
data = TensorDataset(train_x, train_y)
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=32, sampler=sampler)

network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
model = DistributedDataParallel(network)
if args.compression == "default":
    compression = register(model, DoubleSqueeze())  # the only line that compression takes
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

correct = (model(test_x).argmax(1) == test_y).float().mean()
if dist.get_rank() == 0:
    print(f"accuracy {correct:.3f}")
    if args.compression == "default":
        print(compression.explain())
        print(f"{compression.stats().get('compression_ratio', 1.0):.1f} times fewer bytes sent")
dist.destroy_process_group()
