"""The two passes over one bucket: the algorithm. It knows layouts, compressors and a transport, and nothing of Horovod.

One step of DoubleSqueeze (Tang et al. 2019, arXiv 1905.05957, algorithm 1), for n workers and a server that is sharded
over them, or one of them:

    worker i   v_i = g_i + e_i            push Q[v_i]     e_i <- v_i - Q[v_i]
    server     v = mean_i Q[v_i] + E      reply Q'[v]     E   <- v - Q'[v]
    worker     g_i <- Q'[v]

so that, element by element and for every Q, ``mean_i(g_i + e_i) + E == Q'[v] + mean_i(e_i') + E'``. With momentum
correction a worker's velocity u_i = m u_i + g_i takes the place of g_i (`feedback.py`).

In two levels, a worker is a host: its L ranks add up their gradients, each of them a slice of the bucket, which it
exchanges with the ranks of other hosts that have the same slice. Then they hand each other what was replied.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from .compressors import Compressor, NoCompression
from .feedback import FeedbackState
from .kernels.fallback import decoded, restore_sent
from .layout import Layout
from .options import Options
from .streams import Streams
from .transport import Handle, Transport
from .uncompressed import put_rescaled
from .units import rescaled

_UNCOMPRESSED = NoCompression()


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
    """One bucket: its layout, its feedback states, and the algorithm.

    The feedback states hold the only arrays of full size: the worker's float32 ``(layout.numel,)``, and the server's
    ``(layout.shard_numel,)`` on ranks that serve. `layout` is that of the slice which this rank exchanges: all of the bucket,
    or in two levels a part.
    """

    bucket: int
    """Its index."""
    name: str
    whole: Layout
    """Of the bucket, over the shards of all servers."""
    options: Options
    weight: float
    """1 / workers for an average, 1 for a sum."""
    transport: Transport[Handle]
    device: torch.device
    totals: Totals = field(default_factory=Totals)
    layout: Layout = field(init=False)
    steps: int = field(init=False, default=0)
    """Steps that have begun."""
    worker: FeedbackState = field(init=False)
    server: FeedbackState = field(init=False)
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        options, transport = self.options, self.transport
        host = transport.host
        self.local_size = 1 if host is None else host.size
        """Ranks of this host that share a bucket; 1 in one level."""
        shards = self.whole.shards // self.local_size
        first = 0 if host is None else host.rank * shards
        self.layout = self.whole if host is None else self.whole.slice(first, shards)
        self.span = slice(first * self.whole.shard_numel, (first + shards) * self.whole.shard_numel)
        """Where the slice lies in the whole."""
        self.tensors = [
            i
            for i, (offset, numel) in enumerate(zip(self.whole.offsets, self.whole.numels, strict=True))
            if offset < self.span.stop and offset + numel > self.span.start
        ]
        """Which tensors lie in the slice, or parts of them."""
        self.worker = FeedbackState(
            error=self._zeros(self.layout.numel) if options.worker_error else None,
            velocity=self._zeros(self.layout.numel) if options.momentum else None,
            momentum=options.momentum,
            bucket=self.bucket,
            sender=2 * transport.rank,
            first_shard=first,
        )
        self.server = FeedbackState(bucket=self.bucket, sender=2 * transport.rank + 1)
        self.shard = None
        if transport.serves is not None:
            self.shard = self.layout.shard(transport.serves)
            self.server.first_shard = first + transport.serves
            if options.server_error:
                self.server.error = self._zeros(self.layout.shard_numel)
        used = [options.compressor, options.reply_compressor]
        for compressor in used + [_UNCOMPRESSED] * (options.warmup_steps > 0):
            compressor.prepare(self.whole, self.device)
            compressor.prepare(self.layout, self.device)
            if self.shard is not None:
                compressor.prepare(self.shard, self.device)
        self.streams = Streams(self.device)
        # Payload buffers of exchanges that are done, for the next: freed and allocated anew, they would fragment the heap.
        self._buffers: dict[tuple[int, ...], list[Tensor]] = {}

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

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=torch.float32, device=self.device)

    def step(self, work: InFlight[Handle]) -> Generator[tuple[str, Handle] | None, Any, None]:
        """One step of the algorithm.

        It yields the name and the handle of each collective, and is resumed with what has arrived; and None where it waits
        for `InFlight.settle`, which says what it is to be written to if that is not known before.
        """
        layout, transport, streams = self.layout, self.transport, self.streams
        compressor, reply_compressor = self.compressors()
        self.steps += 1
        # Sizes under a name never change: Horovod keeps what it has agreed on for each.
        name = self.name + (".uncompressed" if compressor is _UNCOMPRESSED else "") + work.label
        dtype, host = work.source[0].dtype, transport.host

        if host is not None:
            slices, work.source = streams.record_stream(self._by_slice(work.source)), ()
            slices = yield name + ".reduce", host.scatter(slices, name + ".reduce")
            work.source = self._summed(slices, dtype)

        with self.timed("worker_pass"):
            payload = streams.record_stream(self.acquire(layout.shards, compressor.chunk_nbytes(layout)))
            compressor.encode(layout, work.source, self.worker, payload)
        self.worker.step += 1
        if work.late:
            work.sent = Sent(compressor, payload)
            work.source = ()  # the optimizer has the gradients from here on
        reply, reply_nbytes = None, reply_compressor.chunk_nbytes(layout)
        self._count_traffic(payload.shape[1], reply_nbytes)
        pushed = yield name + ".push", transport.push(payload, name + ".push")

        restores = work.held and not work.late
        before = self.server.error.clone() if restores and self.server.error is not None else None
        if self.shard is not None:
            with self.timed("server_pass"), self._in_units_of(work):
                reply = self.acquire(reply_nbytes)
                reply_compressor.serve(self.shard, pushed, compressor, self.weight, self.server, reply)
                if dtype == torch.float16:
                    reply_compressor.keep_overflow(self.shard, reply, self.server, torch.finfo(torch.float16).max)
            self.server.step += 1
        replies = yield name + ".pull", transport.pull(reply, reply_nbytes, name + ".pull", self.device)
        own = replies  # of the slice
        if host is not None:
            replies = yield name + ".share", host.share(own, name + ".share")

        if work.held and not work.cancelled:
            work.replied = Replied(Sent(compressor, payload), reply_compressor, own, replies)
            yield None
            if work.skipped and before is not None and self.server.error is not None:
                self.server.error.copy_(before)

        if not work.cancelled:
            with self.timed("decode"):
                if work.late:
                    self._decode_late(work)
                else:
                    if self.worker.error is not None:
                        mask = self._everything() if work.skipped else reply_compressor.nonfinite_mask(layout, own)
                        if mask is not None:
                            compressor.rollback(layout, payload, mask, work.source, self.worker)
                    reply_compressor.decode(self.whole, replies, work.destination)

        work.sent = None
        if compressor is not _UNCOMPRESSED:  # the warm-up's buffers are large, and soon not needed
            self.release(payload)
            if reply is not None:
                self.release(reply)

    @contextlib.contextmanager
    def _in_units_of(self, work: InFlight[Handle]) -> Iterator[None]:
        """The server error in the units that what was pushed is in: others may have come since, where a step is late."""
        error, factors = self.server.error, work.factors
        if error is None or all(factor == 1.0 for factor in factors):
            yield
            return
        parts = [
            (error[piece.offset :][: piece.numel], factors[piece.tensor])
            for piece in self.whole.pieces[self.server.first_shard]
        ]
        for part, factor in parts:
            rescaled(part, 1 / factor)
        yield
        for part, factor in parts:
            rescaled(part, factor)

    def _decode_late(self, work: InFlight[Handle]) -> None:
        """Writes the replies of a step that is long over.

        Where they are not finite, what was sent goes back into the error. A `rollback` would take the gradient out of it, which
        is not there any more; and other steps have changed the velocity since.
        """
        layout, replied = self.layout, work.replied
        assert replied is not None and self.worker.error is not None
        mask = replied.reply_compressor.nonfinite_mask(layout, replied.own)
        if mask is not None:
            factors = [work.factors[i] for i in self.tensors]
            restore_sent(layout, replied.sent.values(layout), mask, factors, self.worker.error)
        replied.reply_compressor.decode(self.whole, replied.replies, work.destination)
        for gradient, factor in zip(work.destination, work.factors, strict=True):
            if factor != 1.0:
                put_rescaled(gradient, gradient, factor)
        work.replied = None

    def residual_of(self, work: InFlight[Handle]) -> Tensor:
        """This rank's part of what a late step will bring: an equal part of the reply, or what it sent where none is finite.

        Returns
        -------
        Tensor
            float32, ``(layout.numel,)``; of all ranks together, what the step adds to the residual if it is dropped.
        """
        layout, replied = self.layout, work.replied
        assert replied is not None
        result = self._zeros(layout.numel)
        factors = [work.factors[i] for i in self.tensors]
        rows = zip(layout.offsets, replied.replied(layout), replied.sent.values(layout), factors, strict=True)
        for offset, values, own, factor in rows:
            own = own.where(own.isfinite(), 0.0) * self.weight
            part = torch.where(values.isfinite(), values / self.workers, own)
            result[offset : offset + len(part)] = part * factor
        return result

    @property
    def workers(self) -> int:
        """How many exchange what this rank does: all ranks, or in two levels one of each host."""
        return self.transport.size // self.local_size

    def _by_slice(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients as ``uint8 (local_size, nbytes)``, a row for each slice; padding is zero."""
        flat = torch.zeros(self.whole.numel, dtype=gradients[0].dtype, device=self.device)
        for offset, gradient in zip(self.whole.offsets, gradients, strict=True):
            flat[offset : offset + gradient.numel()] = gradient.view(-1)
        return flat.view(torch.uint8).view(self.local_size, -1)

    def _summed(self, slices: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The sum of what `_by_slice` gave on the ranks of this host, in their order: float32, by tensor of the layout."""
        total = slices.view(dtype).view(self.local_size, -1).sum(0, dtype=torch.float32)
        return [total[offset : offset + numel] for offset, numel in zip(self.layout.offsets, self.layout.numels, strict=True)]

    def _everything(self) -> Tensor:
        """A mask of all elements, as `Compressor.nonfinite_mask` gives them."""
        return torch.full((self.layout.numel // 32,), -1, dtype=torch.int32, device=self.device)

    def compressors(self) -> tuple[Compressor, Compressor]:
        """The worker's and the server's for the coming step."""
        if self.steps < self.options.warmup_steps:
            return _UNCOMPRESSED, _UNCOMPRESSED
        return self.options.compressor, self.options.reply_compressor

    def begin(self, source: Sequence[Tensor], destination: Sequence[Tensor]) -> InFlight[Handle]:
        """Runs the worker pass and begins the push of one step; see `InFlight`."""
        return InFlight(self, source, destination)

    def acquire(self, *shape: int) -> Tensor:
        """Bytes for a payload, all zero."""
        spare = self._buffers.get(shape)
        return spare.pop().zero_() if spare else torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def release(self, buffer: Tensor) -> None:
        """Gives a buffer to the next `acquire` of its shape."""
        self._buffers.setdefault(tuple(buffer.shape), []).append(buffer)

    def _count_traffic(self, push_nbytes: int, reply_nbytes: int) -> None:
        """Adds a step's bytes to the totals: of what crosses the network, a chunk to and from each other rank."""
        serves, others = int(self.shard is not None), self.workers - 1
        to_others, from_others = self.layout.shards - serves, serves * others
        self.totals.bytes_sent += to_others * push_nbytes + from_others * reply_nbytes
        self.totals.bytes_received += from_others * push_nbytes + to_others * reply_nbytes

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds inside to ``totals.{what}_seconds``, and shows them to a profiler, if one is on."""
        start = time.perf_counter()
        # A range costs microseconds also where nobody looks.
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        with record_function(f"{self.name}.{what}") if profiled else contextlib.nullcontext():
            yield
        seconds = getattr(self.totals, f"{what}_seconds") + time.perf_counter() - start
        setattr(self.totals, f"{what}_seconds", seconds)


class Sent(NamedTuple):
    """What a worker has pushed."""

    compressor: Compressor
    payload: Tensor

    def values(self, layout: Layout) -> list[Tensor]:
        """A float32 tensor for each of the layout's."""
        return decoded(layout, self.payload, partial(self.compressor.decode, layout))


class Replied(NamedTuple):
    """The payloads of a step whose replies are there."""

    sent: Sent
    reply_compressor: Compressor
    own: Tensor
    """The replies of the slice that this rank exchanges."""
    replies: Tensor
    """All of them."""

    def replied(self, layout: Layout) -> list[Tensor]:
        """What the servers of the slice replied, alike."""
        return decoded(layout, self.own, partial(self.reply_compressor.decode, layout))


class InFlight(Generic[Handle]):
    """One step of one bucket under way: drives `Exchange.step`, and never blocks.

    Parameters
    ----------
    exchange
        The bucket's. The worker pass runs and the push begins at once.
    source
        The gradients: contiguous tensors, in the order of the layout. They are read now, and again where the reply is not
        finite.
    destination
        Contiguous tensors, alike, which receive the aggregated gradients. They may be those of the source. None: the step is
        late, and `settle` is told of them; the source is read only now.
    held
        Whether nothing is decoded before `settle`.
    label
        Part of the names of collectives, for steps of one bucket that are under way at the same time.
    """

    def __init__(
        self,
        exchange: Exchange[Handle],
        source: Sequence[Tensor],
        destination: Sequence[Tensor] | None,
        held: bool = False,
        label: str = "",
    ) -> None:
        self.exchange, self.source, self.label = exchange, source, label
        self.late = destination is None
        self.held = held or self.late
        self.destination: Sequence[Tensor] = destination or ()
        self.sent: Sent | None = None
        """Of a step that is late."""
        self.replied: Replied | None = None
        """Of a step that is held, once it is `arrived`."""
        self.skipped: bool | None = None
        """As `settle` says."""
        self.cancelled = False
        """Whether the destination is left alone. The collectives go on, since other ranks take part in them."""
        self.done = False
        self.stage = 0
        """Collectives that are done."""
        self.pending: str | None = None
        """The name of the collective under way."""
        self._steps = exchange.step(self)
        self._wait_for(next(self._steps))

    @property
    def factors(self) -> Sequence[float]:
        """By what to multiply what a late step brings of each tensor, since units have changed after it was sent."""
        return [1.0] * len(self.exchange.whole.numels)

    def poll(self, stages: int) -> bool:
        """Goes on as far as possible without blocking, until so many collectives are done. Returns whether all are."""
        exchange, transport = self.exchange, self.exchange.transport
        while not self.arrived and self.stage < stages and transport.poll(self._handle):
            with exchange.streams.side():
                arrived = exchange.streams.record_stream(transport.wait(self._handle), transport.stream_ordered)
                self.stage += 1
                self._resume(arrived)
        return self.done

    def overflows(self) -> bool:
        """Whether a reply of a held step is not finite. On a GPU the host waits for the answer, as a GradScaler does."""
        layout, replied = self.exchange.whole, self.replied
        assert replied is not None
        if replied.reply_compressor.is_within(layout, replied.replies):
            return False
        mask = replied.reply_compressor.nonfinite_mask(layout, replied.replies)
        return mask is not None and bool(mask.any())

    @property
    def arrived(self) -> bool:
        """Whether all collectives are done, and the rest as well, or waits for `settle`."""
        return self.pending is None

    def settle(self, skipped: bool) -> None:
        """Goes on with an exchange that is held, once its replies are there.

        Parameters
        ----------
        skipped
            Whether the optimizer will not take this step, since a gradient is not finite somewhere. The feedback states become
            what they were before it, up to rounding; the destination is written all the same.
        """
        self.skipped = skipped
        with self.exchange.streams.side():
            self._resume(None)

    def _resume(self, value: Tensor | None) -> None:
        try:
            self._wait_for(self._steps.send(value))
        except StopIteration:
            self.pending = None
            self.finish()
            self.done = True

    def _wait_for(self, collective: tuple[str, Handle] | None) -> None:
        if collective is None:
            self.pending = None
        else:
            self.pending, self._handle = collective

    def finish(self) -> None:
        """Is called on the side stream once the destination is written."""
