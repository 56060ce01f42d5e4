"""Trains while ranks come and go, under elastic Horovod. What compression has not sent yet stays with the ranks that stay.

    horovodrun -np 2 --min-np 1 --max-np 4 --host-discovery-script ./hosts.sh python examples/horovod_elastic.py

and the same with --compression none, to compare. hosts.sh prints a line for each host that is there now, such as localhost:2;
change what it prints while the job runs. On a single host add --network-interfaces lo, or Horovod waits for a second one.
"""

import argparse

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ds_horovod import DoubleSqueeze

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--compression", choices=["default", "none"], default="default")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batches-per-commit", type=int, default=10)
args = parser.parse_args()

hvd.init()
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(pixels).float() / 16, torch.tensor(digits))
sampler = hvd.elastic.ElasticSampler(data)
loader = DataLoader(data, batch_size=16, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
lr_of_one = 0.01
squeeze = DoubleSqueeze() if args.compression == "default" else None
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=lr_of_one * hvd.size(), momentum=0.9),
    model.named_parameters(),
    compression=squeeze or hvd.Compression.none,
)
# The state is what survives a change of ranks; with compression its errors belong to it.
more = {"compression": squeeze} if squeeze else {}
state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0, **more)


def on_reset():
    optimizer.param_groups[0]["lr"] = lr_of_one * hvd.size()


state.register_reset_callbacks([on_reset])


@hvd.elastic.run
def train(state):
    while state.epoch < args.epochs:
        state.sampler.set_epoch(state.epoch)
        for batch, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            state.sampler.record_batch(batch, loader.batch_size)
            state.batch += 1
            if state.batch % args.batches_per_commit == 0:
                state.commit()  # a rank that dies takes the others back to here
        mean = hvd.allreduce(loss.detach(), name="loss").item()
        if hvd.rank() == 0:
            print(f"epoch {state.epoch + 1}: loss {mean:.4f} on {hvd.size()} ranks", flush=True)
        state.epoch += 1
        state.commit()


train(state)
