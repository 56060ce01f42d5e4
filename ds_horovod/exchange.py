"""The two passes over one bucket. It knows buckets, compressors and a transport, and nothing of Horovod.

One step of DoubleSqueeze (Tang et al. 2019, arXiv 1905.05957, algorithm 1), for n workers and a server that is sharded
over them, or one of them:

    worker i   v_i = g_i + e_i            push Q[v_i]     e_i <- v_i - Q[v_i]
    server     v = mean_i Q[v_i] + E      reply Q'[v]     E   <- v - Q'[v]
    worker     g_i <- Q'[v]

so that, element by element and for every Q, ``mean_i(g_i + e_i) + E == Q'[v] + mean_i(e_i') + E'``. With momentum
correction a worker's velocity u_i = m u_i + g_i takes the place of g_i (`feedback.py`).
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from .compressors import Compressor, NoCompression
from .feedback import FeedbackState
from .layout import Layout

Handle = TypeVar("Handle")
_UNCOMPRESSED = NoCompression()


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where servers and decoders work while backward goes on: a stream of high priority for each GPU."""
    return torch.cuda.Stream(device, priority=-1)


class Transport(Protocol[Handle]):
    """The collectives that an exchange needs. Names are the same on all ranks, and so are the sizes under a name.

    On a GPU they take tensors that the current stream makes, and give tensors that belong to the device's default stream.
    """

    rank: int
    size: int
    server: int | None
    """The rank that serves all of every bucket. None: every rank serves its shard."""
    shards: int
    """As many as there are servers: `size`, or 1."""
    serves: int | None
    """The shard that this rank serves, or None."""

    def push(self, payload: Tensor, name: str) -> Handle:
        """Sends chunk s of ``uint8 (shards, nbytes)`` to the server of shard s, which gets ``(size, nbytes)``."""

    stream_ordered: bool
    """Whether what arrives on a GPU is there only once the device's default stream is so far."""

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> Handle:
        """Sends each server's ``uint8 (nbytes,)`` to every rank, which gets ``(shards, nbytes)`` on a device."""

    def poll(self, handle: Handle) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, handle: Handle) -> Tensor:
        """What arrived; to be called once for each handle, when `poll` says so."""

    def waiting(self, seconds: float, names: Sequence[str]) -> None:
        """Is told, every second or so, of collectives that have been awaited for long."""


@dataclass(frozen=True)
class Options:
    """What the exchange does with a bucket; equal on all ranks."""

    compressor: Compressor
    """Of what the workers push."""
    server_compressor: Compressor | None
    """Of what the servers reply. None: the same."""
    worker_error: bool
    server_error: bool
    weight: float
    """1 / workers for an average, 1 for a sum."""
    momentum: float = 0.0
    """Of the workers' momentum correction."""
    warmup_steps: int = 0
    """First steps in which everything travels uncompressed."""
    max_norm: float | None = None
    """To which each worker clips its gradients before it compresses them."""


@dataclass
class Totals:
    """What all exchanges of an optimizer have cost so far."""

    bytes_sent: int = 0
    bytes_received: int = 0
    worker_pass_seconds: float = 0.0
    server_pass_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def pass_seconds(self) -> float:
        """Of all passes."""
        return self.worker_pass_seconds + self.server_pass_seconds + self.decode_seconds


@dataclass
class Exchange(Generic[Handle]):
    """One bucket: its layout, its memories, and how to send it.

    The memories hold the only state of full size: the worker's float32 ``(layout.numel,)`` arrays, and the server's
    ``(layout.shard_numel,)`` on ranks that serve.
    """

    bucket: int
    """Its index."""
    name: str
    layout: Layout
    options: Options
    transport: Transport[Handle]
    device: torch.device
    totals: Totals = field(default_factory=Totals)
    worker: FeedbackState = field(init=False)
    server: FeedbackState = field(init=False)

    def __post_init__(self) -> None:
        options, transport, numel = self.options, self.transport, self.layout.numel
        self.worker = FeedbackState(
            error=torch.zeros(numel, device=self.device) if options.worker_error else None,
            velocity=torch.zeros(numel, device=self.device) if options.momentum else None,
            momentum=options.momentum,
            bucket=self.bucket,
            sender=2 * transport.rank,
        )
        self.server = FeedbackState(bucket=self.bucket, sender=2 * transport.rank + 1)
        self.shard = None
        if transport.serves is not None:
            self.shard = self.layout.shard(transport.serves)
            self.server.first_shard = transport.serves
            if options.server_error:
                self.server.error = torch.zeros(self.layout.shard_numel, device=self.device)
        used = [options.compressor, options.server_compressor or options.compressor]
        for compressor in used + [_UNCOMPRESSED] * (options.warmup_steps > 0):
            compressor.prepare(self.layout, self.device)
            if self.shard is not None:
                compressor.prepare(self.shard, self.device)
        self._side = _side_stream(self.device) if self.device.type == "cuda" else None
        self._producers: set[torch.cuda.Stream] = set()
        # Buffers of flights that have landed, for the next: freed and allocated anew, they would fragment the heap.
        self.spare_buffers: dict[tuple[int, ...], list[Tensor]] = {}

    @property
    def worker_error(self) -> Tensor | None:
        """e: float32, ``(layout.numel,)``; None where workers do not compensate."""
        return self.worker.error

    @property
    def server_error(self) -> Tensor | None:
        """E: float32, ``(layout.shard_numel,)``; None where this rank does not compensate as a server."""
        return self.server.error

    @property
    def velocity(self) -> Tensor | None:
        """u: float32, ``(layout.numel,)``; None without momentum correction."""
        return self.worker.velocity

    def compressors(self) -> tuple[Compressor, Compressor]:
        """The worker's and the server's for the coming step."""
        if self.worker.step < self.options.warmup_steps:
            return _UNCOMPRESSED, _UNCOMPRESSED
        return self.options.compressor, self.options.server_compressor or self.options.compressor

    def zeros(self, *shape: int) -> Tensor:
        """Bytes for a payload, all zero."""
        spare = self.spare_buffers.get(shape)
        return spare.pop().zero_() if spare else torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def put_back(self, buffer: Tensor) -> None:
        """For the next `zeros` of its shape."""
        self.spare_buffers.setdefault(tuple(buffer.shape), []).append(buffer)

    def owed(self) -> tuple[Tensor, Tensor | None]:
        """What this rank still owes to the gradients, between two steps.

        Returns
        -------
        error, velocity
            ``weight * e``, and E where this rank serves; ``weight * u``, or None. Both float32, ``(layout.numel,)``, new. Over
            all ranks they add up to what the law counts, ``mean_i(e_i) + E``, whatever the layout and the ranks are.
        """
        self.join()
        weight, error, velocity = self.options.weight, self.worker.error, self.worker.velocity
        owed = torch.zeros(self.layout.numel, device=self.device) if error is None else error * weight
        if self.server.error is not None:
            owed[self._served] += self.server.error
        return owed, None if velocity is None else velocity * weight

    def owe(self, error: Tensor, velocity: Tensor | None, step: int) -> None:
        """Takes over what other exchanges have `owed`, in place of what this one holds.

        Parameters
        ----------
        error, velocity
            The share of this rank, as `owed` gives it. Where workers do not compensate it must be the same on all ranks.
        step
            How many have been taken.
        """
        if self.worker.error is not None:
            torch.div(error, self.options.weight, out=self.worker.error)
        if self.server.error is not None:
            self.server.error.zero_()
            if self.worker.error is None:
                self.server.error.add_(error[self._served], alpha=self.transport.size)
        if self.worker.velocity is not None:
            if velocity is None:
                self.worker.velocity.zero_()
            else:
                torch.div(velocity, self.options.weight, out=self.worker.velocity)
        self.worker.step = self.server.step = step
        self.written()

    @property
    def _served(self) -> slice:
        start = self.server.first_shard * self.layout.shard_numel
        return slice(start, start + self.layout.shard_numel)

    def kept(self, tensor: int) -> list[Tensor]:
        """What this rank keeps of one tensor of the layout, of both errors, then of the velocity: to change between steps."""
        self.join()
        flat = slice(self.layout.offsets[tensor], self.layout.offsets[tensor] + self.layout.numels[tensor])
        parts = [] if self.worker.error is None else [self.worker.error[flat]]
        if self.server.error is not None:  # at most one piece of a tensor lies in a shard
            pieces = self.layout.pieces[self.server.first_shard]
            at = bisect_left(pieces, tensor, key=lambda piece: piece.tensor)
            if at < len(pieces) and pieces[at].tensor == tensor:
                parts.append(self.server.error[pieces[at].offset : pieces[at].offset + pieces[at].numel])
        return parts if self.worker.velocity is None else [*parts, self.worker.velocity[flat]]

    def rescale(self, factor: float, of_tensors: Sequence[float]) -> None:
        """Multiplies errors and velocity by a factor, and the errors of each tensor by another one; between two steps."""
        self.join()
        if factor != 1.0:
            for array in (self.worker.error, self.server.error, self.worker.velocity):
                if array is not None:
                    array *= factor
        for tensor, more in enumerate(of_tensors):
            if more != 1.0:
                parts = self.kept(tensor)
                for error in parts if self.worker.velocity is None else parts[:-1]:
                    error *= more
        self.written()

    def written(self) -> None:
        """What is kept has been changed on the current stream: passes on other ones wait for it."""
        self.produced()
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """Adds the seconds inside to ``totals.{what}_seconds``, and shows them to a profiler, if one is on."""
        start = time.perf_counter()
        # A range costs microseconds also where nobody looks.
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        with record_function(f"{self.name}.{what}") if profiled else contextlib.nullcontext():
            yield
        seconds = getattr(self.totals, f"{what}_seconds") + time.perf_counter() - start
        setattr(self.totals, f"{what}_seconds", seconds)

    # ---- streams of a GPU: the worker pass runs on the stream that backward is on, all that follows on another one

    def produced(self) -> None:
        """A gradient of the bucket has been made, on the current stream."""
        if self._side is not None:
            self._producers.add(torch.cuda.current_stream(self.device))

    def gather(self, gradients: Sequence[Tensor]) -> None:
        """The current stream waits for all gradients that have been `produced`."""
        if self._side is None:
            return
        current = torch.cuda.current_stream(self.device)
        for stream in self._producers - {current}:
            current.wait_stream(stream)
            for gradient in gradients:  # made by one of them, and read by this one
                gradient.record_stream(current)
        self._producers.clear()

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Inside, everything is queued on the side stream."""
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def lend(self, tensor: Tensor, after_default: bool = False) -> Tensor:
        """A tensor of another stream that is used on the side stream; there once the default stream is so far, or already."""
        if self._side is not None:
            if after_default:
                self._side.wait_stream(torch.cuda.default_stream(self.device))
            tensor.record_stream(self._side)
        return tensor

    def join(self) -> None:
        """The current stream waits for what the side stream has been given."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def begin(self, gradients: Sequence[Tensor]) -> Flight[Handle]:
        """The worker pass, and off with the payload.

        Parameters
        ----------
        gradients
            Contiguous tensors, in the order of the layout. They are read now and written when the flight lands.
        """
        return Flight(self, gradients)


class Flight(Generic[Handle]):
    """One bucket under way: pushing, then pulling, then landed. Nothing here waits."""

    def __init__(self, exchange: Exchange[Handle], gradients: Sequence[Tensor]) -> None:
        self._exchange = exchange
        self._gradients: Sequence[Tensor] | None = gradients
        self._dtype = gradients[0].dtype
        self._pulling = False
        self.landed = False
        self._compressor, self._server_compressor = exchange.compressors()
        shards = exchange.layout.shards
        self._reply_nbytes = self._server_compressor.chunk_nbytes(exchange.layout)
        self._reply: Tensor | None = None
        with exchange.counted("worker_pass"):
            # Kept until the reply is there, for rollback.
            self._payload = exchange.lend(exchange.zeros(shards, self._compressor.chunk_nbytes(exchange.layout)))
            self._compressor.encode(exchange.layout, gradients, exchange.worker, self._payload)
        exchange.worker.step += 1
        # Sizes under a name never change: Horovod keeps what it has agreed on for each.
        self._name = exchange.name + (".uncompressed" if self._compressor is _UNCOMPRESSED else "")
        self._handle = exchange.transport.push(self._payload, self._name + ".push")
        exchange.totals.bytes_sent += (shards - (exchange.transport.serves is not None)) * self._payload.shape[1]

    @property
    def awaited(self) -> str:
        """The name of the collective that is under way."""
        return self._name + (".pull" if self._pulling else ".push")

    def poll(self) -> bool:
        """Does what can be done without waiting. Returns whether the flight has landed."""
        while not self.landed and self._exchange.transport.poll(self._handle):
            self._advance()
        return self.landed

    def drop(self) -> None:
        """Leaves the gradients alone when the flight lands. It must land still: the other ranks take part in it."""
        self._gradients = None

    def _advance(self) -> None:
        exchange = self._exchange
        with exchange.beside():
            arrived = exchange.lend(exchange.transport.wait(self._handle), exchange.transport.stream_ordered)
            if self._pulling:
                self._land(arrived)
            else:
                self._serve(arrived)
                self._pulling = True

    def _serve(self, pushed: Tensor) -> None:
        exchange, others = self._exchange, self._exchange.transport.size - 1
        if exchange.shard is not None:
            with exchange.counted("server_pass"):
                self._reply = exchange.zeros(self._reply_nbytes)
                self._server_compressor.serve(
                    exchange.shard, pushed, self._compressor, exchange.options.weight, exchange.server, self._reply
                )
                if self._dtype == torch.float16:
                    limit = torch.finfo(torch.float16).max
                    self._server_compressor.keep_overflow(exchange.shard, self._reply, exchange.server, limit)
            exchange.server.step += 1
            exchange.totals.bytes_received += others * self._payload.shape[1]
            exchange.totals.bytes_sent += others * self._reply_nbytes
        self._handle = exchange.transport.pull(self._reply, self._reply_nbytes, self._name + ".pull", exchange.device)

    def _land(self, replies: Tensor) -> None:
        exchange = self._exchange
        if self._gradients is not None:
            with exchange.counted("decode"):
                if exchange.worker.error is not None:
                    lost = self._server_compressor.nonfinite_mask(exchange.layout, replies)
                    if lost is not None:
                        self._compressor.rollback(exchange.layout, self._payload, lost, self._gradients, exchange.worker)
                self._server_compressor.decode(exchange.layout, replies, self._gradients)
        own = exchange.transport.serves is not None
        exchange.totals.bytes_received += (exchange.layout.shards - own) * self._reply_nbytes
        self._gradients = None
        if self._compressor is not _UNCOMPRESSED:  # the warm-up's are large, and soon not needed
            exchange.put_back(self._payload)
            if self._reply is not None:
                exchange.put_back(self._reply)
        self.landed = True
