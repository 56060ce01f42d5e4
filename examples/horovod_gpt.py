"""Trains a small GPT on bytes with AdamW under Horovod, by the recipe for slow networks: about a third of a bit for a gradient.

    horovodrun -np 2 python examples/horovod_gpt.py
    horovodrun -np 2 python examples/horovod_gpt.py --compression default     # 4 bits, AdamW as it is
    horovodrun -np 2 python examples/horovod_gpt.py --compression none        # to compare

The text is Python's standard library, or that of --file.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ds_horovod import DoubleSqueeze, TopK

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--compression", choices=["slow-network", "default", "none"], default="slow-network")
parser.add_argument("--file", type=Path, help="text to train with")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--warmup-steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=8, help="sequences of one rank")
parser.add_argument("--context", type=int, default=64)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--lr", type=float, default=2e-3)
args = parser.parse_args()

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int, layers: int, context: int):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens):
        time = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        return self.head(self.blocks(self.token(tokens) + self.position[:time], mask=mask, is_causal=True))


def text() -> torch.Tensor:
    files = [args.file] if args.file else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


windows = text().unfold(0, args.context + 1, 1)  # all stretches of a context and the byte after it, as views
cut = int(0.9 * len(windows))


def batch(generator: torch.Generator, first: int, last: int):
    chosen = windows[torch.randint(first, last, (args.batch_size,), generator=generator)].long()
    return chosen[:, :-1], chosen[:, 1:]


def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


model = GPT(args.width, args.layers, args.context)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
# Momentum moves into the compression, which forgets it where it has sent something: beta1 of AdamW must be 0 then.
# max_norm: each rank clips its own gradient before it is compressed, so that nothing that is cut off waits to be sent.
squeeze, beta1 = {
    "slow-network": (DoubleSqueeze(TopK(0.045, values="sign"), momentum=0.6, max_norm=1.0), 0.0),
    "default": (DoubleSqueeze(max_norm=1.0), 0.9),
    "none": (None, 0.9),
}[args.compression]
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(beta1, 0.95), weight_decay=0.01)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=squeeze or hvd.Compression.none)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda i: min(1, (i + 1) / args.warmup_steps) * (1 + math.cos(math.pi * i / args.steps)) / 2
)

generator = torch.Generator().manual_seed(hvd.rank())  # each rank reads other text
for step in range(args.steps):
    optimizer.zero_grad()
    loss = loss_of(*batch(generator, 0, cut))
    loss.backward()
    if squeeze is None:
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    else:
        optimizer.step()
    schedule.step()
    if hvd.rank() == 0 and (step + 1) % 50 == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

with torch.no_grad():
    held_out = torch.stack([loss_of(*batch(generator, cut, len(windows))) for _ in range(10)]).mean() / math.log(2)
held_out = hvd.allreduce(held_out, name="held_out").item()
if hvd.rank() == 0:
    ratio = squeeze.stats().get("compression_ratio", 1.0) if squeeze else 1.0
    print(f"{args.compression}: {held_out:.3f} bits per byte of text that was held out, {ratio:.1f} times fewer bytes sent")
