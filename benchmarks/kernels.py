"""How close the compressors' passes over memory come to the least that any code could take, and what memory they need.

Time. The least a worker pass could do is to read the gradient and to read and write the error, which is what an in-place
``error += gradient`` does: that loop, in torch and over the same arrays, is the floor, 12 bytes an element.

* worker pass: `encode`, from fp32 gradients and error to the payload and the new error; the payload is zeroed before.
* decode: `decode`, from a reply to fp32 gradients.
* server pass: `serve`, of 4 workers' chunks into the error of one shard, a quarter of the elements, and the reply. One
  worker's 4 chunks stand for 4 workers' chunks of a shard.
* worker pass, momentum: the same with a velocity, which is read and written too: 20 bytes an element.
* bytes an element: what the pass cannot avoid to read and write: the arrays, and the payload, by its size. For the server
  pass, it is an element of the shard.
* ratio: (time / bytes) / (time / bytes of the floor in the same round), and of that the median over the rounds. The table's
  ms is the median time. In each round every pass runs once, one after the other, each from the same gradient and error.
* naive: what one writes without fused kernels, a few rounds of it: numpy.packbits with one scale, or torch.topk, a gather,
  and zeroing by index. Its ratio is taken with the bytes of the worker pass that it stands for.

Correctness. The last timed call of each worker pass and server pass must conserve, in float32: decoded + error after ==
gradient (or mean of the decoded pushes) + error before, within the rounding of the largest element. If not, the exit status
is 1. Bounds are compared, and never change the exit status.

Memory. A fresh process makes the gradients of 4 workers, notes its resident size, and runs some steps of an in-process
exchange of all 4. Extra is the highest resident size less the one noted. Needed is the errors, 4 * (L + L / 4) bytes for each
worker, L being the elements with padding, and the payloads that are live at once: 4 pushed payloads, 4 replies, and what one
worker has received, pushes or replies, since the workers take turns. The gradients are in neither. Bound on extra / needed:
1.05. It is measured with glibc's malloc as it is, which keeps some of the payloads that were freed in the steps before, and
with a malloc that returns at once what is freed, which shows what the exchange itself holds.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch
from common import new_file, positive, table, write_json
from torch import Tensor
from tqdm import tqdm

from ds_horovod.compressors import Cast, Compressor, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.in_process import Simulation
from ds_horovod.layout import pack
from ds_horovod.options import Options

WORKERS = 4
MOMENTUM = 0.9
CODECS: dict[str, Compressor] = {
    "OneBit": OneBit(block=2048),
    "TopK 0.1 %": TopK(0.001),
    "TopK 1 %": TopK(0.01),
    "TopK 4.5 % signs": TopK(0.045, values="sign"),
    "Ternary": Ternary(),
    "Quantize 3": Quantize(3),
    "Quantize 4": Quantize(4),
    "Quantize 8": Quantize(8),
    "Quantize 4 stochastic": Quantize(4, rounding="stochastic"),
    "RandomK 1 %": RandomK(0.01),
    "Cast bf16": Cast("bf16"),
}
WITH_MOMENTUM = ("TopK 1 %", "TopK 4.5 % signs", "Ternary")
BOUNDS = {
    25_000_000: {
        "OneBit worker": 1.3,
        "OneBit decode": 1.05,
        "OneBit server": 1.6,
        "TopK 0.1 % worker": 1.4,
        "TopK 1 % worker": 1.6,
    },
    100_000_000: {
        "OneBit worker": 1.25,
        "OneBit decode": 1.05,
        "OneBit server": 1.6,
        "TopK 0.1 % worker": 1.25,
        "TopK 1 % worker": 1.4,
    },
}
"""The ratios to reach, by elements."""
MEMORY_BOUND = 1.05
MEMORY_CODECS = ("OneBit", "TopK 1 %")
MEMORY_STEPS = 5  # after which the heap does not grow any more
LEAST_ELEMENTS = 100_000


# ---- time


class Arrays:
    """The memory that all passes of one size share."""

    def __init__(self, elements: int) -> None:
        torch.manual_seed(0)
        self.elements = elements
        self.gradient = torch.randn(elements)
        self.padded = max(pack([elements], codec.block, WORKERS).numel for codec in CODECS.values())
        self.before = torch.randn(self.padded)
        self.error = self.before.clone()
        self.velocity_before = torch.randn(self.padded)
        self.velocity = self.velocity_before.clone()
        self.out = torch.zeros(elements)
        # A sum of a few terms, none larger than the largest gradient and error together, is off by a few of its last bits.
        largest = self.gradient.abs().max() + self.before.abs().max() + self.velocity.abs().max()
        self.tolerance = 4 * torch.finfo().eps * float(largest)


@dataclass
class Pass:
    """Something to time."""

    name: str
    run: Callable[[], object]
    elements: int
    bytes_per_element: float
    clear: Tensor | None = None
    """Zeroed before each call."""
    gap: Callable[[], Tensor] | None = None
    """By how much the last call does not conserve, at most."""
    rounds: int | None = None
    """Slow passes run in the first few rounds only."""


def fused(name: str, codec: Compressor, arrays: Arrays) -> list[Pass]:
    """The passes of one compressor."""
    layout = pack([arrays.elements], codec.block, WORKERS)
    shard = layout.shard(0)
    gradient, out = arrays.gradient, arrays.out
    error, before = arrays.error[: layout.numel], arrays.before[: layout.numel]
    server_error, server_before = error[: layout.shard_numel], before[: layout.shard_numel]
    payload = torch.zeros(WORKERS, codec.chunk_nbytes(layout), dtype=torch.uint8)
    reply = torch.zeros(codec.chunk_nbytes(shard), dtype=torch.uint8)
    served = shard.numels[0]

    def worker_gap() -> Tensor:
        codec.decode(layout, payload, [out])
        n = arrays.elements
        return out.add_(error[:n]).sub_(gradient).sub_(before[:n]).abs_().max()

    def server_gap() -> Tensor:
        total, pushed = out[:served], out[served : 2 * served]
        codec.decode(shard, reply.unsqueeze(0), [total])
        total.add_(server_error[:served]).sub_(server_before[:served])
        for chunk in payload:
            codec.decode(shard, chunk.unsqueeze(0), [pushed])
            total.sub_(pushed, alpha=1 / WORKERS)
        return total.abs_().max()

    def worker() -> None:
        codec.encode(layout, [gradient], FeedbackState(error), payload)

    velocity = arrays.velocity[: layout.numel]

    def worker_with_momentum() -> None:
        codec.encode(layout, [gradient], FeedbackState(error, velocity, momentum=MOMENTUM), payload)

    def momentum_gap() -> Tensor:
        codec.decode(layout, payload, [out])
        n = arrays.elements
        out.add_(error[:n]).sub_(gradient).sub_(before[:n])
        return out.sub_(arrays.velocity_before[:n], alpha=MOMENTUM).abs_().max()

    def decode() -> None:
        codec.decode(layout, payload, [out])

    def server() -> None:
        codec.serve(shard, payload, codec, 1 / WORKERS, FeedbackState(server_error), reply)

    entry = payload.numel() / layout.numel
    passes = [
        Pass(f"{name} worker", worker, arrays.elements, 12 + entry, payload, worker_gap),
        Pass(f"{name} decode", decode, arrays.elements, 4 + entry),
        Pass(f"{name} server", server, served, 8 + (WORKERS + 1) * entry, reply, server_gap),
    ]
    if name in WITH_MOMENTUM:
        # After `decode`, which times what `worker` has sent.
        passes.append(
            Pass(f"{name} worker, momentum", worker_with_momentum, arrays.elements, 20 + entry, payload, momentum_gap)
        )
    return passes


def naive(arrays: Arrays) -> list[Pass]:
    """Worker passes as one writes them without kernels."""
    n = arrays.elements
    gradient, error = arrays.gradient, arrays.error[:n]
    rounds = 1 if n > 50_000_000 else 3

    def packbits() -> object:
        g, e = gradient.numpy(), error.numpy()
        v = g + e
        bits = numpy.packbits(v < 0, bitorder="little")
        scale = numpy.abs(v).mean()
        numpy.subtract(v, scale * numpy.sign(v), out=e)
        return bits

    def topk(ratio: float) -> object:
        error.add_(gradient)
        indices = error.abs().topk(round(ratio * n), sorted=False).indices
        values = error[indices]
        error[indices] = 0.0
        return indices, values

    result = [Pass("OneBit naive", packbits, n, 12 + 1 / 8, rounds=rounds)]
    for name, ratio in ("TopK 0.1 %", 0.001), ("TopK 1 %", 0.01):
        result.append(Pass(f"{name} naive", lambda r=ratio: topk(r), n, 12 + 6 * ratio, rounds=rounds))
    return result


def time_passes(arrays: Arrays, threads: int, rounds: int, progress: tqdm) -> dict[str, object]:
    """The figures of every pass at one size and number of threads."""
    torch.set_num_threads(threads)
    n = arrays.elements
    floor = Pass("floor", lambda: arrays.error[:n].add_(arrays.gradient), n, 12)
    passes = [floor, *(p for name, codec in CODECS.items() for p in fused(name, codec, arrays)), *naive(arrays)]
    seconds: dict[str, list[float]] = {p.name: [] for p in passes}
    gaps = {}
    for round_ in range(-1, rounds):  # the first one, which warms up, is not counted
        for p in passes:
            if p.rounds is not None and not 0 <= round_ < p.rounds:
                continue
            progress.set_description(f"{n / 1e6:g}M elements, {threads} threads, {p.name}")
            arrays.error.copy_(arrays.before)
            if "momentum" in p.name:
                arrays.velocity.copy_(arrays.velocity_before)
            if p.clear is not None:
                p.clear.zero_()
            start = time.perf_counter()
            p.run()
            took = time.perf_counter() - start
            if round_ >= 0:
                seconds[p.name].append(took)
            if p.gap is not None and round_ == rounds - 1:
                gaps[p.name] = float(p.gap())
        progress.update()

    rows = []
    for p in passes:
        taken = zip(seconds[p.name], seconds["floor"], strict=p.rounds is None)
        ratios = [(t / (p.elements * p.bytes_per_element)) / (f / (12 * n)) for t, f in taken]
        ratio, bound = statistics.median(ratios), BOUNDS.get(n, {}).get(p.name)
        rows.append(
            {
                "name": p.name,
                "ms": 1e3 * statistics.median(seconds[p.name]),
                "rounds": len(ratios),
                "elements": p.elements,
                "bytes_per_element": p.bytes_per_element,
                "ratio": ratio,
                "bound": bound,
                "within_bound": None if bound is None else ratio <= bound,
                "conservation_gap": gaps.get(p.name),
            }
        )
    correct = all(gap <= arrays.tolerance for gap in gaps.values())  # not so for NaN
    return {
        "kind": "time",
        "elements": n,
        "threads": threads,
        "tolerance": arrays.tolerance,
        "correct": correct,
        "passes": rows,
    }


def print_times(result: dict) -> None:
    floor = result["passes"][0]
    speed = 12 * result["elements"] / floor["ms"] / 1e6
    print(f"\n{result['elements'] / 1e6:g}M elements, {result['threads']} threads; the floor moves {speed:.1f} GB/s")
    rows = [("pass", "ms", "B/element", "ratio", "bound", "")]
    for row in result["passes"]:
        bound, verdict = (
            ("", "") if row["bound"] is None else (f"{row['bound']:.2f}", "met" if row["within_bound"] else "MISSED")
        )
        figures = f"{row['ms']:.2f}", f"{row['bytes_per_element']:.3f}", f"{row['ratio']:.2f}"
        rows.append((row["name"], *figures, bound, verdict))
    print(table(rows))
    worst = max(row["conservation_gap"] or 0.0 for row in result["passes"])
    verdict = "conserved" if result["correct"] else "NOT CONSERVED"
    print(f"{verdict}: largest gap {worst:.1e}, tolerance {result['tolerance']:.1e}", flush=True)


# ---- memory


@dataclass
class Footprint:
    """Memory of one exchange; sizes in bytes."""

    codec: str
    malloc: str
    elements: int
    extra: int
    errors: int
    payloads: int
    ratio: float
    bound: float
    within_bound: bool


def resident(key: str) -> int:
    """Bytes: VmRSS is the resident size of this process, VmHWM the highest so far, counted from its exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure_memory(name: str, malloc: str, elements: int, threads: int) -> Footprint:
    """To be called in a process of its own, once; malloc is "default" or "returning"."""
    if malloc == "returning":
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 << 10)  # the initial value, but no longer adjusted
    torch.set_num_threads(threads)
    codec = CODECS[name]
    layout = pack([elements], codec.block, WORKERS)
    gradients = [[torch.randn(elements)] for _ in range(WORKERS)]
    before = resident("VmRSS")
    simulation = Simulation(layout, Options(codec), WORKERS)
    for _ in range(MEMORY_STEPS):
        simulation.step(gradients)
    extra = resident("VmHWM") - before
    errors = WORKERS * 4 * (layout.numel + layout.shard_numel)
    received = WORKERS * codec.chunk_nbytes(layout)  # replies are as large as pushes, since both sides compress alike
    payloads = WORKERS * (layout.shards + 1) * codec.chunk_nbytes(layout) + received
    ratio = extra / (errors + payloads)
    return Footprint(name, malloc, elements, extra, errors, payloads, ratio, MEMORY_BOUND, ratio <= MEMORY_BOUND)


def print_memory(memories: Sequence[Footprint]) -> None:
    print(f"{memories[0].elements / 1e6:g}M elements, {WORKERS} workers in one process: memory of a whole exchange in MB")
    rows = [("codec", "malloc", "extra", "errors", "payloads", "ratio", "bound", "")]
    for m in memories:
        sizes = (f"{size / 1e6:.1f}" for size in (m.extra, m.errors, m.payloads))
        rows.append((m.codec, m.malloc, *sizes, f"{m.ratio:.3f}", f"{m.bound:.2f}", "met" if m.within_bound else "MISSED"))
    print(table(rows), flush=True)


# ---- the program


def elements(text: str) -> int:
    """For ``type=``: a whole number, also as 25e6."""
    value = float(text)
    if not value.is_integer() or value < LEAST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {LEAST_ELEMENTS}, got {text}")
    return int(value)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the passes of the compressors, and measures their memory.")
    parser.add_argument("--elements", type=elements, nargs="+", default=[25_000_000, 100_000_000], metavar="N",
                        help="gradient elements, as 25e6 (default: 25e6 100e6); memory is measured at the fewest")  # fmt: skip
    parser.add_argument("--threads", type=positive(int), nargs="+", default=[1, 2], metavar="T", help="default: 1 2")
    parser.add_argument("--rounds", type=positive(int), default=11, metavar="R", help="how often each pass runs (default: 11)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write all figures")
    args = parser.parse_args()

    memories = []
    for name in MEMORY_CODECS:
        for malloc in "default", "returning":
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a forked process would begin with what this one holds
                memories.append(pool.submit(measure_memory, name, malloc, min(args.elements), max(args.threads)).result())
    print_memory(memories)

    times = []
    total = len(args.elements) * len(args.threads) * (args.rounds + 1)
    with tqdm(total=total, disable=None, leave=False) as progress:
        for n in args.elements:
            arrays = Arrays(n)
            for threads in args.threads:
                times.append(time_passes(arrays, threads, args.rounds, progress))
                progress.clear()
                print_times(times[-1])
            del arrays

    if args.json:
        write_json(args.json, args, [*({"kind": "memory", **asdict(m)} for m in memories), *times])
    return 0 if all(result["correct"] for result in times) else 1


if __name__ == "__main__":
    sys.exit(main())
