"""The same exchange for n workers in one process: for tests, and for simulating far more workers than there are cores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import Exchange, Options
from .layout import Layout


class _Ticket(NamedTuple):
    name: str
    round: int
    """How often this rank has used the name before."""
    kind: str


@dataclass
class _Mailbox:
    """What the ranks of a group have sent. An entry goes once all ranks have taken theirs."""

    sent: dict[tuple[str, int], dict[int, Tensor | None]] = field(default_factory=lambda: defaultdict(dict))
    taken: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))


class InProcessTransport:
    """One worker's end of a group of `size` workers in this process; `group` makes all of them."""

    def __init__(self, rank: int, size: int, server: int | None, mailbox: _Mailbox) -> None:
        self.rank, self.size, self.server = rank, size, server
        self.shards = size if server is None else 1
        self.serves = rank if server is None else (0 if server == rank else None)
        self._mailbox = mailbox
        self._rounds: dict[str, int] = defaultdict(int)

    @classmethod
    def group(cls, size: int, server: int | None = None) -> list[InProcessTransport]:
        """Transports of `size` workers that reach each other; `server` as in `HorovodTransport`."""
        mailbox = _Mailbox()
        return [cls(rank, size, server, mailbox) for rank in range(size)]

    def _send(self, tensor: Tensor | None, name: str, kind: str) -> _Ticket:
        ticket = _Ticket(name, self._rounds[name], kind)
        self._rounds[name] += 1
        self._mailbox.sent[ticket.name, ticket.round][self.rank] = tensor
        return ticket

    def push(self, payload: Tensor, name: str) -> _Ticket:
        return self._send(payload, name, "push")

    def pull(self, reply: Tensor | None, nbytes: int, name: str) -> _Ticket:
        return self._send(reply, name, "pull")

    def poll(self, handle: _Ticket) -> bool:
        return len(self._mailbox.sent[handle.name, handle.round]) == self.size

    def wait(self, handle: _Ticket) -> Tensor:
        key = handle.name, handle.round
        sent = self._mailbox.sent[key]
        if len(sent) < self.size:
            missing = sorted(set(range(self.size)) - set(sent))
            raise RuntimeError(f"rank {self.rank} would wait for ever: ranks {missing} have not sent {handle.name}")
        if handle.kind == "push":
            chunks = [] if self.serves is None else [sent[rank][self.serves] for rank in range(self.size)]  # type: ignore[index]
        else:
            chunks = [reply for _, reply in sorted(sent.items()) if reply is not None]
        self._mailbox.taken[key] += 1
        if self._mailbox.taken[key] == self.size:
            del self._mailbox.sent[key], self._mailbox.taken[key]
        return torch.stack(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


class Simulation:
    """n workers exchanging one bucket, step after step.

    Parameters
    ----------
    layout
        Of the bucket, with as many shards as there are servers.
    options
        As on every rank of a real run.
    workers
        How many.
    server
        The rank that serves all of the bucket; None: every rank its shard.
    """

    def __init__(self, layout: Layout, options: Options, workers: int, server: int | None = None) -> None:
        self.exchanges = [
            Exchange("simulation", layout, options, transport, torch.device("cpu"))
            for transport in InProcessTransport.group(workers, server)
        ]

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """One exchange; gradients are by worker and tensor, contiguous, read and written in place."""
        flights = [exchange.begin(g) for exchange, g in zip(self.exchanges, gradients, strict=True)]
        for _ in ("serve", "land"):
            for flight in flights:
                flight.poll()
