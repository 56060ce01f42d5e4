"""Seconds and bytes of a training step with several methods, one after the other: what `bandwidth.py` runs on every host.

Each method trains a new model, so that memory holds one at a time. Rank 0 prints a line of JSON for each measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import zlib
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from cluster import bytes_on_the_wire
from common import HelpFormatter, positive, use_threads
from methods import NAMES, distribute, method_list
from models import MODELS, make
from torch import nn

WARMUP_STEPS = 2
"""DDP fills its buckets anew after the first step, Horovod's cache knows all names from the second on."""
LEAST_STEPS = 2


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Seconds and bytes of a training step.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("methods", nargs="+", metavar="METHOD", help=f"some of {', '.join(NAMES)}".replace("%", "%%"))
    add("--model", choices=MODELS, default="mlp", help="what to train")
    add("--batch-size", type=positive(int), default=32, help="samples of one rank in a step")
    add("--seconds", type=positive(float), default=3.0, help="how long to measure each method, roughly")
    add("--max-steps", type=positive(int), default=20, help="even if they take less time than that")
    add("--rounds", type=positive(int), default=1, help="the first goes through the methods in order, the next in reverse, ...")
    args = parser.parse_args()
    args.methods = method_list(parser, "METHOD", args.methods)
    return args


def require_same(model: nn.Module, method: str) -> None:
    """Raises RuntimeError unless the parameters of all ranks are equal, bit by bit."""
    checksum = 0
    for p in model.parameters():
        checksum = zlib.crc32(p.detach().numpy(), checksum)
    checksums = hvd.allgather_object(checksum, name="benchmark.checksum")
    if len(set(checksums)) > 1:
        raise RuntimeError(f"{method}: replicas differ between ranks: checksums {checksums}")


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times one method.

    Returns
    -------
    dict
        ``method``; ``seconds_per_step``: median over the steps of all ranks; ``steps``: as many were timed;
        ``bytes_sent``: per step, as the method counts them; ``wire_bytes_sent``: per step, as the network interfaces
        count them, or None outside a cluster; both the mean of all ranks. ``wire_seconds``: per step, in which the
        interfaces counted, for all ranks to be done.
    """
    torch.manual_seed(0)
    model, batch = make(args.model)
    training = distribute(method, model, torch.optim.SGD(model.parameters(), lr=0.01), silent_start=True)
    x, y = batch(args.batch_size, torch.Generator().manual_seed(hvd.rank()))

    def step() -> float:
        start = time.perf_counter()
        training.optimizer.zero_grad()
        F.cross_entropy(training.model(x), y).backward()
        training.optimizer.step()
        return time.perf_counter() - start

    took = [step() for _ in range(WARMUP_STEPS)][-1]
    steps = min(max(LEAST_STEPS, round(args.seconds / took)), args.max_steps)
    steps = hvd.broadcast_object(steps, name="benchmark.steps")
    hvd.barrier()
    before, began = bytes_on_the_wire(), time.perf_counter()
    seconds = [step() for _ in range(steps)]
    hvd.barrier()  # when the others are done, what this rank has sent has left
    after, ended = bytes_on_the_wire(), time.perf_counter()
    if method != "noop":
        require_same(model, method)
    sent = None if before is None or after is None else (after - before) / steps
    everywhere = hvd.allgather_object((seconds, training.bytes_sent(), sent), name="benchmark.result")
    return {
        "method": method,
        "seconds_per_step": statistics.median(itertools.chain.from_iterable(seconds for seconds, _, _ in everywhere)),
        "steps": steps,
        "bytes_sent": statistics.fmean(counted for _, counted, _ in everywhere),
        "wire_seconds": (ended - began) / steps,
        "wire_bytes_sent": None if sent is None else statistics.fmean(sent for _, _, sent in everywhere),
    }


def main() -> None:
    """Measures what the command line asks for."""
    args = parse_arguments()
    hvd.init()
    use_threads()
    for i in range(args.rounds):
        for method in reversed(args.methods) if i % 2 else args.methods:
            result = measure(method, args)
            if hvd.rank() == 0:
                print(json.dumps({"round": i, **result}), flush=True)


if __name__ == "__main__":
    main()
