"""How close the kernels on a GPU come to the least that any code could take, and how far they are ahead of others.

One call measures everything in a few minutes: ``python benchmarks/gpu.py --json FILE``. It needs a GPU, CuPy, and nothing from
other ranks: 8 workers' chunks for a shard are the 8 chunks of one worker.

Floor. A copy of one fp32 array of 100M elements to another, 8 bytes an element, in the same run: its GB/s are what memory
gives. A pass's floor is the bytes that it cannot avoid to read and write over that; its ratio is its time over that floor.

* worker pass: `encode`, from fp32 gradients and error to payload and new error: 12 bytes an element and the payload.
* decode: `decode`, from a reply to fp32 gradients: 4 bytes an element and the reply.
* server pass: `serve`, of 8 workers' chunks into the error of one shard, and the reply: 8 bytes an element of the shard, the
  chunks and the reply.
* exchange: the three one after the other, which is all that a GPU does for a bucket but to communicate.

Times are those between two events on the stream, the median over the rounds; in each round every pass runs once, one after the
other. Errors live on from round to round, as they do in training.

Beside them: torch.topk alone (1 %), cupy.packbits of the signs alone, and the error-compensated 1-bit allreduce of 1-bit Adam
(Tang et al. 2021, arXiv 2102.02888), operation by operation in torch and CuPy as DeepSpeed's compressed_allreduce does it,
without its communication, for the same 8 workers: what it takes over what the exchange of OneBit takes.

Launch overhead is the host's time for a pass over a tensor of 1024 elements, per launch, and what an event sees of one such
pass.

Correctness, in one more round after the timed ones, with the errors they left: at every size decoded + error after == gradient
+ error before, within the rounding of the largest element; at the least size payload and error have the bits of the CPU's. If
not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import new_file, positive, table, write_json
from torch import Tensor

from ds_horovod.compressors import Cast, Compressor, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.layout import pack

WORKERS = 8
COPIED = 100_000_000  # elements of the floor
LEAST_ELEMENTS = 1_000_000
CODECS: dict[str, Compressor] = {
    "OneBit": OneBit(block=2048),
    "TopK 1 %": TopK(0.01),
    "TopK 5 %": TopK(0.05),
    "TopK 4.5 % signs": TopK(0.045, values="sign"),
    "Ternary": Ternary(),
    "Quantize 4": Quantize(4),
    "Cast bf16": Cast("bf16"),
    "RandomK 1 %": RandomK(0.01),
}


def milliseconds(run: Callable[[], object]) -> float:
    """Of the device, from the beginning of the first kernel to the end of the last."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@dataclass
class Pass:
    """Something to time."""

    name: str
    run: Callable[[], object]
    bytes_per_call: float | None = None
    """That it cannot avoid; None: it is shown for its time."""
    clear: Tensor | None = None
    """Zeroed before each call."""
    times: list[float] = field(default_factory=list)


def measure(passes: list[Pass], rounds: int) -> None:
    for i in range(rounds + 2):  # two to warm up, in which kernels are compiled and thresholds found
        for p in passes:
            if p.clear is not None:
                p.clear.zero_()
            ms = milliseconds(p.run)
            if i >= 2:
                p.times.append(ms)


class Bucket:
    """One tensor, compressed by one codec for 8 servers, and one of the servers."""

    def __init__(self, codec: Compressor, gradient: Tensor) -> None:
        self.codec, self.gradients, device = codec, [gradient], gradient.device
        self.layout = pack([gradient.numel()], codec.block, WORKERS)
        self.shard = self.layout.shard(0)
        self.worker = FeedbackState(torch.zeros(self.layout.numel, dtype=torch.float32, device=device))
        self.server = FeedbackState(torch.zeros(self.layout.shard_numel, dtype=torch.float32, device=device))
        self.payload = torch.zeros(WORKERS, codec.chunk_nbytes(self.layout), dtype=torch.uint8, device=device)
        self.reply = torch.zeros(codec.chunk_nbytes(self.layout), dtype=torch.uint8, device=device)
        self.out = [torch.empty_like(gradient)]

    def encode(self) -> None:
        self.codec.encode(self.layout, self.gradients, self.worker, self.payload)

    def serve(self) -> None:
        self.codec.serve(self.shard, self.payload, self.codec, 1 / WORKERS, self.server, self.reply)

    def decode(self) -> None:
        self.codec.decode(self.layout, self.payload, self.out)

    def exchange(self) -> None:
        self.payload.zero_()
        self.reply.zero_()
        self.encode()
        self.serve()
        self.decode()

    def passes(self) -> list[Pass]:
        numel, payload, reply = self.layout.numel, self.payload.numel(), self.reply.numel()
        served = 8 * self.layout.shard_numel + payload + reply
        return [
            Pass("worker pass", self.encode, 12 * numel + payload, self.payload),
            Pass("server pass", self.serve, served, self.reply),
            Pass("decode", self.decode, 4 * numel + payload),
            Pass("exchange", self.exchange, 16 * numel + 2 * payload + served),
        ]

    def is_correct(self, on_cpu: bool) -> bool:
        """Whether one more round conserves and, where the CPU is asked too, has its bits."""
        before = self.worker.error.clone()  # type: ignore[union-attr]
        self.payload.zero_()
        self.encode()
        self.decode()
        (gradient,), (out,), error, numel = self.gradients, self.out, self.worker.error, self.gradients[0].numel()
        assert error is not None
        largest = float(gradient.abs().max() + before.abs().max())
        gap = out.add_(error[:numel]).sub_(gradient).sub_(before[:numel]).abs_().max()
        if not float(gap) <= 4 * torch.finfo().eps * largest:
            return False
        if not on_cpu:
            return True
        memory, payload = FeedbackState(before.cpu()), torch.zeros(self.payload.shape, dtype=torch.uint8)
        self.codec.encode(self.layout, [gradient.cpu()], memory, payload)
        assert memory.error is not None
        return torch.equal(payload, self.payload.cpu()) and torch.equal(memory.error, error.cpu())


class OperationByOperation:
    """The 1-bit allreduce with error compensation at both ends as a chain of whole-tensor operations, one scale a chunk."""

    def __init__(self, arrays: Any, gradient: Tensor) -> None:
        self.arrays, device = arrays, gradient.device
        self.gradient = gradient[: gradient.numel() // (8 * WORKERS) * 8 * WORKERS]
        self.shard_numel = self.gradient.numel() // WORKERS
        self.worker_error = torch.zeros(self.gradient.numel(), dtype=torch.float32, device=device)
        self.server_error = torch.zeros(self.shard_numel, dtype=torch.float32, device=device)

    def compress(self, values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Packed signs and scale; the error is replaced."""
        values = values + error
        scale = values.norm() / values.numel() ** 0.5
        signs = values.sign().add_(1).bool()
        error.copy_(values - scale * signs.float().sub_(0.5).mul_(2.0))
        return torch.from_dlpack(self.arrays.packbits(self.arrays.from_dlpack(signs.view(torch.uint8)))), scale

    def signs(self, packed: Tensor) -> Tensor:
        return torch.from_dlpack(self.arrays.unpackbits(self.arrays.from_dlpack(packed))).float().sub_(0.5).mul_(2.0)

    def exchange(self) -> None:
        packed, scale = self.compress(self.gradient, self.worker_error)
        received = self.signs(packed).view(WORKERS, -1) * scale  # each worker's signs of this shard, in place of each shard's
        reply, reply_scale = self.compress(received.mean(0), self.server_error)
        replies = self.signs(reply.repeat(WORKERS)).mul_(reply_scale)
        self.out = replies


def sizes_of(text: str) -> int:
    """For ``type=``: a whole number, also as 25e6."""
    value = float(text)
    if not value.is_integer() or value < LEAST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {LEAST_ELEMENTS}, got {text}")
    return int(value)


def time_codec(name: str, gradient: Tensor, rounds: int, on_cpu: bool) -> tuple[list[Pass], bool]:
    bucket = Bucket(CODECS[name], gradient)
    passes = bucket.passes()
    measure(passes, rounds)
    return passes, bucket.is_correct(on_cpu)


def peers(arrays: Any, gradient: Tensor) -> list[Pass]:
    k, chain = gradient.numel() // 100, OperationByOperation(arrays, gradient)
    signs = (gradient < 0).view(torch.uint8)
    return [
        Pass("torch.topk 1 %", lambda: torch.topk(gradient.abs(), k)),
        Pass("cupy.packbits of signs", lambda: arrays.packbits(arrays.from_dlpack(signs))),
        Pass("1-bit, op by op: exchange", chain.exchange),
    ]


def launch_overhead(device: torch.device, calls: int = 200) -> dict[str, float]:
    """Microseconds of a pass that has nothing to do: of the host, and of the device."""
    bucket = Bucket(OneBit(block=32), torch.randn(1024, device=device))
    for _ in range(3):
        bucket.encode()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        bucket.encode()
    host = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    return {"host_us": 1e6 * host, "device_us": 1e3 * statistics.median(milliseconds(bucket.encode) for _ in range(calls))}


def run(args: argparse.Namespace, arrays: Any, device: torch.device) -> list[dict[str, Any]]:
    one, other = torch.randn(COPIED, device=device), torch.empty(COPIED, device=device)
    results: list[dict[str, Any]] = [{"kind": "launch", **launch_overhead(device)}]
    print("launch overhead of a pass: {host_us:.1f} us of the host, {device_us:.1f} us of the device".format(**results[0]))
    for elements in args.elements:
        gradient = torch.randn(elements, device=device)
        rows = [("", "ms", "GB/s", "over the floor", "")]
        copied = Pass("copy", lambda: other.copy_(one), 8 * COPIED)
        measure([copied], args.rounds)
        gbs = 8 * COPIED / statistics.median(copied.times) / 1e6
        rows.append(("copy of 100M", f"{statistics.median(copied.times):.3f}", f"{gbs:.0f}", "1.00", ""))
        exchange_ms = {}
        for name in CODECS:
            passes, correct = time_codec(name, gradient, args.rounds, elements == min(args.elements))
            for p in passes:
                ms = statistics.median(p.times)
                assert p.bytes_per_call is not None
                achieved = p.bytes_per_call / ms / 1e6
                rows.append(
                    (f"{name} {p.name}", f"{ms:.3f}", f"{achieved:.0f}", f"{gbs / achieved:.2f}", "" if correct else "WRONG")
                )
                results.append({
                    "kind": "pass", "codec": name, "pass": p.name, "elements": elements, "ms": p.times,
                    "bytes": p.bytes_per_call, "gb_per_s": achieved, "copy_gb_per_s": gbs, "over_floor": gbs / achieved,
                    "correct": correct,
                })  # fmt: skip
                exchange_ms[name] = ms  # the last
            torch.cuda.empty_cache()
        try:
            others = peers(arrays, gradient)
            measure(others, max(3, args.rounds // 4))
        except torch.OutOfMemoryError:
            rows.append(("others", "out of memory", "", "", ""))
            others = []
        for p in others:
            ms = statistics.median(p.times)
            rows.append((p.name, f"{ms:.3f}", "", "", ""))
            results.append({"kind": "peer", "name": p.name, "elements": elements, "ms": p.times})
        if others:
            faster = statistics.median(others[-1].times) / exchange_ms["OneBit"]
            rows.append(("OneBit's exchange is faster than op by op", f"{faster:.1f}x", "", "", ""))
        print(f"\n{elements / 1e6:g}M elements")
        print(table(rows), flush=True)
        del gradient, others
        torch.cuda.empty_cache()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the kernels on a GPU against a copy, and against others.")
    parser.add_argument("--elements", type=sizes_of, nargs="+", default=[25_000_000, 100_000_000, 1_000_000_000], metavar="N",
                        help="gradient elements, as 25e6 (default: 25e6 100e6 1e9)")  # fmt: skip
    parser.add_argument("--rounds", type=positive(int), default=21, metavar="R", help="how often each pass runs (default: 21)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write all figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU, and there is nothing here to measure without one")
    try:
        import cupy
    except ImportError:
        parser.error(f"CuPy is needed: pip install 'ds-horovod[cuda{str(torch.version.cuda).split('.')[0]}]'")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}")
    results = run(args, cupy, torch.device("cuda"))
    if args.json:
        write_json(args.json, args, results)
    return 0 if all(result.get("correct", True) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
