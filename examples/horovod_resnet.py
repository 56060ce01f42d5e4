"""Times a ResNet-50 on synthetic images under Horovod: mixed precision, a schedule with warm-up, accumulation of gradients.

    horovodrun -np 2 python examples/horovod_resnet.py
    horovodrun -np 2 python examples/horovod_resnet.py --compression none                            # to compare
    horovodrun -np 2 python examples/horovod_resnet.py --blocks 1 1 1 1 --width 16 --image-size 64   # without a GPU

The data are noise, so the loss says nothing; replace `batch` to train with images.
"""

import argparse
import time

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from ds_horovod import DoubleSqueeze

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--compression", choices=["default", "fp16", "none"], default="default")
parser.add_argument("--blocks", type=int, nargs=4, default=[3, 4, 6, 3], help="of each stage; the default is ResNet-50")
parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
parser.add_argument("--image-size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=32, help="images of one rank in a backward pass")
parser.add_argument("--accumulate", type=int, default=2, help="backward passes for a step")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--warmup-steps", type=int, default=5, help="of the learning rate")
args = parser.parse_args()

hvd.init()
device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)


class Bottleneck(nn.Module):
    """Three convolutions, and a way past them."""

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        channels = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.past = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.past = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return relu(self.past(x) + self.branch(x))


def resnet(blocks, width, classes=1000):
    layers = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            layers.append(Bottleneck(channels, width << stage, stride=2 if stage and not i else 1))
            channels = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def batch():
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    return images, torch.randint(1000, (args.batch_size,), device=device)


torch.manual_seed(hvd.rank())
model = resnet(args.blocks, args.width).to(device)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
peak = 0.0125 * hvd.size() * args.accumulate
optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-5)
compression = {"default": DoubleSqueeze(), "fp16": hvd.Compression.fp16, "none": hvd.Compression.none}[args.compression]
optimizer = hvd.DistributedOptimizer(
    optimizer, model.named_parameters(), compression=compression, backward_passes_per_step=args.accumulate
)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=args.warmup_steps)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - args.warmup_steps))
schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [args.warmup_steps])
scaler = torch.amp.GradScaler(device.type)  # recognized by the compression, whose residual follows its scale

seconds = []
for step in range(args.steps):
    start = time.perf_counter()
    optimizer.zero_grad()
    for _ in range(args.accumulate):  # what has accumulated is compressed once, in the last pass
        images, labels = batch()
        with torch.autocast(device.type, torch.float16):
            loss = cross_entropy(model(images), labels) / args.accumulate
        scaler.scale(loss).backward()
    scale = scaler.get_scale()
    if args.compression == "default":
        scaler.step(optimizer)
    else:  # stock Horovod asks for this before a scaler looks at the gradients
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:  # the scaler has not skipped the step
        schedule.step()
    seconds.append(time.perf_counter() - start)
    if step == 0 and args.compression == "default":
        compression.reset_stats()  # the first step compares all weights, so it is slower than the others

if hvd.rank() == 0:
    median = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
    images = hvd.size() * args.accumulate * args.batch_size
    print(f"{args.compression}: {images / median:.1f} images a second on {hvd.size()} ranks")
    if args.compression == "default":
        for key, value in compression.stats().items():
            print(f"  {key}: {value:.6g}")
