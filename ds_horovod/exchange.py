"""The two passes over one bucket. It knows buckets, compressors and a transport, and nothing of Horovod.

One step of DoubleSqueeze (Tang et al. 2019, arXiv 1905.05957, algorithm 1), for n workers and a server that is sharded
over them, or one of them:

    worker i   v_i = g_i + e_i            push Q[v_i]     e_i <- v_i - Q[v_i]
    server     v = mean_i Q[v_i] + E      reply Q'[v]     E   <- v - Q'[v]
    worker     g_i <- Q'[v]

so that, element by element and for every Q, ``mean_i(g_i + e_i) + E == Q'[v] + mean_i(e_i') + E'``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .compressors import Compressor
from .layout import Layout

Handle = TypeVar("Handle")


class Transport(Protocol[Handle]):
    """The collectives that an exchange needs. Names are the same on all ranks, and so are the sizes under a name."""

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

    def pull(self, reply: Tensor | None, nbytes: int, name: str) -> Handle:
        """Sends each server's ``uint8 (nbytes,)`` to every rank, which gets ``(shards, nbytes)``."""

    def poll(self, handle: Handle) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, handle: Handle) -> Tensor:
        """What arrived; to be called once for each handle, when `poll` says so."""


@dataclass(frozen=True)
class Options:
    """What the exchange does with a bucket; equal on all ranks."""

    compressor: Compressor
    """Of what the workers push."""
    server_compressor: Compressor
    """Of what the servers reply."""
    worker_error: bool
    server_error: bool
    weight: float
    """1 / workers for an average, 1 for a sum."""


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
    """One bucket: its layout, its errors, and how to send it.

    The errors are the only state of full size: `worker_error` float32 ``(layout.numel,)``, `server_error` float32
    ``(layout.shard_numel,)`` on ranks that serve; None where there is no compensation.
    """

    name: str
    layout: Layout
    options: Options
    transport: Transport[Handle]
    device: torch.device
    totals: Totals = field(default_factory=Totals)
    worker_error: Tensor | None = field(init=False, default=None)
    server_error: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.options.worker_error:
            self.worker_error = torch.zeros(self.layout.numel, device=self.device)
        if self.options.server_error and self.transport.serves is not None:
            self.server_error = torch.zeros(self.layout.shard_numel, device=self.device)
        self.shard = None if self.transport.serves is None else self.layout.shard(self.transport.serves)
        self.push_nbytes = self.options.compressor.chunk_nbytes(self.layout)
        self.reply_nbytes = self.options.server_compressor.chunk_nbytes(self.layout)
        # Buffers of flights that have landed, for the next: freed and allocated anew, they would fragment the heap.
        self.spare_payloads: list[Tensor] = []
        self.spare_replies: list[Tensor] = []

    def begin(self, gradients: Sequence[Tensor]) -> Flight[Handle]:
        """The worker pass, and off with the payload.

        Parameters
        ----------
        gradients
            Contiguous tensors, in the order of the layout. They are read now and written when the flight lands.
        """
        return Flight(self, gradients)


def _zeros(spare: list[Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return spare.pop().zero_() if spare else torch.zeros(shape, dtype=torch.uint8, device=device)


class Flight(Generic[Handle]):
    """One bucket under way: pushing, then pulling, then landed. Nothing here waits."""

    def __init__(self, exchange: Exchange[Handle], gradients: Sequence[Tensor]) -> None:
        self._exchange = exchange
        self._gradients: Sequence[Tensor] | None = gradients
        self._pulling = False
        self.landed = False
        start = time.perf_counter()
        shards = exchange.layout.shards
        # Kept until the reply is there: see _undo.
        self._payload = _zeros(exchange.spare_payloads, (shards, exchange.push_nbytes), exchange.device)
        self._reply: Tensor | None = None
        exchange.options.compressor.encode(exchange.layout, gradients, exchange.worker_error, self._payload)
        exchange.totals.worker_pass_seconds += time.perf_counter() - start
        self._handle = exchange.transport.push(self._payload, exchange.name + ".push")
        exchange.totals.bytes_sent += (shards - (exchange.transport.serves is not None)) * exchange.push_nbytes

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
        arrived = exchange.transport.wait(self._handle)
        if self._pulling:
            self._land(arrived)
        else:
            self._serve(arrived)
            self._pulling = True

    def _serve(self, pushed: Tensor) -> None:
        exchange, others = self._exchange, self._exchange.transport.size - 1
        if exchange.shard is not None:
            start = time.perf_counter()
            options = exchange.options
            self._reply = _zeros(exchange.spare_replies, (exchange.reply_nbytes,), exchange.device)
            options.server_compressor.serve(
                exchange.shard, pushed, options.compressor, options.weight, exchange.server_error, self._reply
            )
            exchange.totals.server_pass_seconds += time.perf_counter() - start
            exchange.totals.bytes_received += others * exchange.push_nbytes
            exchange.totals.bytes_sent += others * exchange.reply_nbytes
        self._handle = exchange.transport.pull(self._reply, exchange.reply_nbytes, exchange.name + ".pull")

    def _land(self, replies: Tensor) -> None:
        exchange = self._exchange
        start = time.perf_counter()
        if self._gradients is not None:
            compressor = exchange.options.server_compressor
            if exchange.worker_error is not None and not compressor.is_within(exchange.layout, replies):
                self._undo(replies, exchange.worker_error)
            compressor.decode(exchange.layout, replies, self._gradients)
        exchange.totals.decode_seconds += time.perf_counter() - start
        own = exchange.transport.serves is not None
        exchange.totals.bytes_received += (exchange.layout.shards - own) * exchange.reply_nbytes
        self._gradients = None
        exchange.spare_payloads.append(self._payload)
        if self._reply is not None:
            exchange.spare_replies.append(self._reply)
        self.landed = True

    def _undo(self, replies: Tensor, worker_error: Tensor) -> None:
        """Takes this step back from the worker error where the reply is not finite: e = e' + Q[v] - g.

        What this rank sent there is lost through no fault of its own, and an overflow step, which a GradScaler skips,
        must not leave a trace. This is rare, so it may take full-size temporaries.
        """
        assert self._gradients is not None
        layout, options = self._exchange.layout, self._exchange.options
        arrived = [torch.empty(n, device=replies.device) for n in layout.numels]
        sent = [torch.empty(n, device=replies.device) for n in layout.numels]
        options.server_compressor.decode(layout, replies, arrived)
        options.compressor.decode(layout, self._payload, sent)
        for offset, gradient, got, own in zip(layout.offsets, self._gradients, arrived, sent, strict=True):
            error = worker_error[offset : offset + len(got)]
            lost = ~got.isfinite() & own.isfinite() & gradient.view(-1).isfinite()
            error[lost] += own[lost] - gradient.view(-1)[lost]
