"""Speed on synthetic data: the counterpart of Horovod's pytorch_synthetic_benchmark.py, with its flags and its output lines.

Run it with ``horovodrun -np 2 python benchmarks/synthetic.py --compression onebit``. Horovod's lines come first, so that
they can be compared with those of Horovod's own script; lines of ours follow.

``--compare none,onebit`` times several methods in one run. Each has its model and optimizer; they take turns, in one
order and then in the other, so that whatever slows the machine down meets them all alike.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from cluster import bytes_on_the_wire
from common import HelpFormatter, count, new_file, positive, table, use_threads, write_json
from methods import NAMES, distribute, method_list, reduction
from models import MODELS, make


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Speed of training on synthetic data.", formatter_class=HelpFormatter)
    add = parser.add_argument
    names = ", ".join(NAMES).replace("%", "%%")
    add("--fp16-allreduce", action="store_true", help="use fp16 compression during allreduce: --compression fp16")
    add("--model", choices=MODELS, default="mlp", help="model to benchmark")
    add("--batch-size", type=positive(int), default=32, help="input batch size of each rank")
    add("--num-warmup-batches", type=count, default=10, help="batches before the benchmark, which do not count")
    add("--num-batches-per-iter", type=positive(int), default=10, help="batches in a benchmark iteration")
    add("--num-iters", type=positive(int), default=10, help="benchmark iterations")
    add("--no-cuda", action="store_true", help="train on the CPU even where there is a GPU")
    add("--use-adasum", action="store_true", help="reduce with the Adasum algorithm")
    add(
        "--compression",
        metavar="METHOD",
        help=f"one of {names}; noop sends nothing, the most that any compression could give (default: none)",
    )
    add("--compare", nargs="+", metavar="METHOD", help=f"time several of {names} by turns, against the first")
    add("--threads", type=positive(int), help="threads of each rank (default: its share of the cores)")
    add("--json", type=new_file, metavar="FILE", help="write the results to FILE too")
    args = parser.parse_args()

    if args.fp16_allreduce and (args.compare or args.compression not in (None, "fp16")):
        other = "--compare" if args.compare else f"--compression {args.compression}"
        parser.error(f"--fp16-allreduce is --compression fp16; it conflicts with {other}")
    if args.compare and args.compression:
        parser.error("--compare and --compression conflict: give all methods to --compare")
    if not args.compare:
        args.compression = "fp16" if args.fp16_allreduce else args.compression or "none"
        if len(method_list(parser, "--compression", [args.compression])) > 1:
            parser.error(f"argument --compression: must name one method, got {args.compression}; see --compare")
    else:
        args.compare = method_list(parser, "--compare", args.compare)
        if args.num_iters % 2:
            parser.error(
                f"argument --num-iters: must be even with --compare, for as many turns in each order; got {args.num_iters}"
            )
    if args.use_adasum:
        unfit = [method for method in args.compare or [args.compression] if method not in ("none", "fp16")]
        if unfit:
            parser.error(f"--use-adasum conflicts with {', '.join(unfit)}: only none and fp16 go with it")
        if not (hvd.mpi_built() or hvd.nccl_built()):
            parser.error("--use-adasum needs a Horovod that was built with MPI or NCCL")
    return args


def log(line: str) -> None:
    """Prints on rank 0."""
    if hvd.rank() == 0:
        print(line, flush=True)


class Contender:
    """One method with a model and an optimizer of its own.

    Parameters
    ----------
    label
        Prefix of the names of its collectives, since contenders take turns in one process.
    method
        As `methods.py` names it.
    args
        The command line.
    device
        Where to train.
    """

    def __init__(self, label: str, method: str, args: argparse.Namespace, device: torch.device) -> None:
        self.method = method
        self.turns: list[list[float]] = []
        """Seconds of the steps that count, by turn."""
        self.wire_bytes: float | None = None
        """What left this host in a step of the last turn, headers included. None where its interface is not its own."""
        torch.manual_seed(0)
        self.model, batch = make(args.model)
        self.model.to(device)
        generator = torch.Generator().manual_seed(hvd.rank())
        self.input, self.target = (tensor.to(device) for tensor in batch(args.batch_size, generator))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01 * _rate_factor(args, device))
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        names = [(f"{label}.{name}", p) for name, p in self.model.named_parameters()]
        self.training = distribute(method, self.model, optimizer, names, hvd.Adasum if args.use_adasum else hvd.Average)
        hvd.broadcast_optimizer_state(self.training.optimizer, root_rank=0)

    def step(self) -> None:
        """One training step, to the end."""
        self.training.optimizer.zero_grad()
        F.cross_entropy(self.training.model(self.input), self.target).backward()
        self.training.optimizer.step()
        if self.input.is_cuda:
            torch.cuda.synchronize()

    def run(self, steps: int) -> list[float]:
        """A turn of some steps, which begins and ends on all ranks together. Returns the seconds of each step."""
        hvd.barrier()
        before = bytes_on_the_wire()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        hvd.barrier()  # what has been sent has left when the others are done
        after = bytes_on_the_wire()
        if before is not None and after is not None and steps:
            self.wire_bytes = (after - before) / steps
        return seconds

    def result(self) -> dict[str, Any]:
        """What has been measured on this rank.

        Returns
        -------
        dict
            ``method``; ``seconds_per_step``: median; ``seconds_by_turn``: medians, which show how quiet the machine was;
            ``bytes_sent``: per step; ``compression_ratio``: how many times fewer than uncompressed; ``wire_bytes``.
        """
        sent = self.training.bytes_sent()
        return {
            "method": self.method,
            "seconds_per_step": statistics.median(itertools.chain(*self.turns)),
            "seconds_by_turn": [statistics.median(turn) for turn in self.turns],
            "bytes_sent": sent,
            "compression_ratio": reduction(sent, self.model),
            "wire_bytes": self.wire_bytes,
        }


def _rate_factor(args: argparse.Namespace, device: torch.device) -> int:
    """By how much the learning rate grows with the ranks: Adasum adapts the size of its steps to them itself."""
    if not args.use_adasum:
        return hvd.size()
    return hvd.local_size() if device.type == "cuda" and hvd.nccl_built() else 1


def benchmark(args: argparse.Namespace, device: torch.device, unit: str) -> list[dict[str, Any]]:
    """Times one method; the lines are those of Horovod's script, then ours."""
    contender = Contender(args.compression, args.compression, args, device)
    log("Running warmup...")
    contender.run(args.num_warmup_batches)
    log("Running benchmark...")
    rates = []
    for i in range(args.num_iters):
        seconds = contender.run(args.num_batches_per_iter)
        contender.turns.append(seconds)
        rates.append(args.batch_size * len(seconds) / sum(seconds))
        log(f"Iter #{i}: {rates[-1]:.1f} img/sec per {unit}")
    # 1.96 standard deviations: Horovod's script prints that as the confidence of the mean.
    mean, confidence = statistics.fmean(rates), 1.96 * statistics.pstdev(rates)
    n = hvd.size()
    log(f"Img/sec per {unit}: {mean:.1f} +-{confidence:.1f}")
    log(f"Total img/sec on {n} {unit}(s): {n * mean:.1f} +-{n * confidence:.1f}")

    result = contender.result()
    log(f"Compression: {args.compression}")
    log(f"Median seconds per step: {result['seconds_per_step']:.5f}")
    log(f"Bytes sent per rank and step: {result['bytes_sent']:,.0f}")
    if result["wire_bytes"] is not None:
        log(f"Bytes on the wire per rank and step: {result['wire_bytes']:,.0f}")
    log(f"Compression ratio: {_times(result['compression_ratio'])}")
    return [result]


def compare(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Times several methods by turns: first to last in one round, last to first in the next."""
    contenders = [Contender(f"{i}.{method}", method, args, device) for i, method in enumerate(args.compare)]
    log("Running warmup...")
    for contender in contenders:
        contender.run(args.num_warmup_batches)
    log("Running benchmark...")
    for i in range(args.num_iters):
        for contender in reversed(contenders) if i % 2 else contenders:
            contender.turns.append(contender.run(args.num_batches_per_iter))

    results = [contender.result() for contender in contenders]
    first = results[0]["seconds_per_step"]
    rows = [
        [
            "method",
            "seconds per step",
            f"of {args.compare[0]}",
            "bytes sent per rank and step",
            "on the wire",
            "compression ratio",
        ]
    ]
    for result in results:
        result["time_ratio"] = result["seconds_per_step"] / first
        rows.append(
            [
                result["method"],
                f"{result['seconds_per_step']:.5f}",
                f"{result['time_ratio']:.1%}",
                f"{result['bytes_sent']:,.0f}",
                "-" if result["wire_bytes"] is None else f"{result['wire_bytes']:,.0f}",
                _times(result["compression_ratio"]),
            ]
        )
    log(table(rows))
    return results


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def main() -> None:
    """Times what the command line asks for."""
    args = parse_arguments()
    hvd.init()
    use_threads(args.threads)
    on_gpu = torch.cuda.is_available() and not args.no_cuda
    device, unit = torch.device("cpu"), "CPU"
    if on_gpu:
        device, unit = torch.device("cuda", hvd.local_rank()), "GPU"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    log(f"Model: {args.model}")
    log(f"Batch size: {args.batch_size}")
    log(f"Number of {unit}s: {hvd.size()}")
    results = compare(args, device) if args.compare else benchmark(args, device, unit)
    if args.json and hvd.rank() == 0:
        write_json(args.json, args, results)


if __name__ == "__main__":
    main()
