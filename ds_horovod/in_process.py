"""The same exchange for n workers in one process: for tests, and for simulating far more workers than there are cores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .double_squeeze import DoubleSqueeze, bind
from .exchange import Exchange
from .layout import Layout
from .options import Options
from .session import Session
from .step import Step
from .transport import Host


class _Ticket(NamedTuple):
    key: str
    """What collectives are matched by: the name, or the kind."""
    round: int
    """How often this rank has used the key before."""
    kind: str
    members: Sequence[int]
    """The ranks that take part."""


class _Sent(NamedTuple):
    tensor: Tensor | None
    made: torch.cuda.Event | None
    """After which it is there, on a GPU."""


@dataclass
class _Mailbox:
    """What the ranks of a group have sent. An entry goes once all ranks have taken theirs."""

    sent: dict[tuple[str, int], dict[int, _Sent]] = field(default_factory=lambda: defaultdict(dict))
    taken: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))


class _InProcessHost:
    """See `Host`."""

    def __init__(self, transport: InProcessTransport, members: list[int]) -> None:
        self._transport, self._members = transport, members
        self.size, self.rank = len(members), members.index(transport.rank)

    def scatter(self, rows: Tensor, name: str) -> _Ticket:
        return self._transport.send(rows, name, "scatter", self._members)

    def share(self, rows: Tensor, name: str) -> _Ticket:
        return self._transport.send(rows, name, "share", self._members)

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """This worker's alone: the others would have to run to give theirs."""
        return tensor


class InProcessTransport:
    """One worker's end of a group of `size` workers in this process; `group` makes all of them."""

    def __init__(
        self, rank: int, size: int, server: int | None, mailbox: _Mailbox, in_order: bool = False, local_size: int = 1
    ) -> None:
        self.rank, self.size, self.server = rank, size, server
        self.shards = size if server is None else 1
        host, place = divmod(rank, local_size)
        self.serves = host if server is None else (0 if server == rank else None)
        self.in_order = in_order
        self.stream_ordered = False
        self.ranks = list(range(size))
        self._mailbox = mailbox
        self._rounds: dict[str, int] = defaultdict(int)
        self._peers = self.ranks[place::local_size]
        neighbours = self.ranks[host * local_size : (host + 1) * local_size]
        self.levels = ""
        self.host: Host[_Ticket] | None = None if local_size == 1 else _InProcessHost(self, neighbours)

    @classmethod
    def group(
        cls, size: int, server: int | None = None, in_order: bool = False, local_size: int = 1
    ) -> list[InProcessTransport]:
        """Transports of `size` workers that reach each other.

        Parameters
        ----------
        size, server
            How many workers there are, and which of them serves everything; None: each its shard.
        in_order
            Whether pushes are matched with pushes and pulls with pulls by their order, as process groups of torch do it.
        local_size
            How many of them are on one host and share each bucket, in two levels; 1: they do not.
        """
        if server is not None and not 0 <= server < size:
            raise ValueError(f"InProcessTransport: server must be None or from 0 to {size - 1}, got {server}")
        if size % local_size or (server is not None and local_size > 1):
            raise ValueError(f"InProcessTransport: {size} workers, server {server} cannot be on hosts of {local_size}")
        mailbox = _Mailbox()
        return [cls(rank, size, server, mailbox, in_order, local_size) for rank in range(size)]

    def send(self, tensor: Tensor | None, name: str, kind: str, members: Sequence[int]) -> _Ticket:
        """Begins a collective of some members, which `poll` and `wait` end."""
        key = f"{kind if self.in_order else name} of {members}"
        ticket = _Ticket(key, self._rounds[key], kind, members)
        self._rounds[key] += 1
        made = torch.cuda.current_stream(tensor.device).record_event() if tensor is not None and tensor.is_cuda else None
        self._mailbox.sent[ticket.key, ticket.round][self.rank] = _Sent(tensor, made)
        return ticket

    def push(self, payload: Tensor, name: str) -> _Ticket:
        return self.send(payload, name, "push", self._peers)

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> _Ticket:
        return self.send(reply, name, "pull", self._peers)

    def poll(self, handle: _Ticket) -> bool:
        return len(self._mailbox.sent[handle.key, handle.round]) == len(handle.members)

    def wait(self, handle: _Ticket) -> Tensor:
        key = handle.key, handle.round
        sent = self._mailbox.sent[key]
        if len(sent) < len(handle.members):
            missing = sorted(set(handle.members) - set(sent))
            raise RuntimeError(f"rank {self.rank} would wait for ever: ranks {missing} have not sent {handle.key}")
        tensors = [tensor for _, (tensor, _) in sorted(sent.items()) if tensor is not None]
        for _, made in sent.values():
            if made is not None:
                made.wait()
        self._mailbox.taken[key] += 1
        if self._mailbox.taken[key] == len(handle.members):
            del self._mailbox.sent[key], self._mailbox.taken[key]
        if handle.kind == "share":
            return torch.cat(tensors)
        chunks = tensors
        if handle.kind == "scatter":
            chunks = [rows[handle.members.index(self.rank)] for rows in tensors]
        elif handle.kind == "push":
            chunks = [] if self.serves is None else [payload[self.serves] for payload in tensors]
        return torch.stack(chunks) if chunks else torch.empty(0, dtype=torch.uint8)

    def waiting(self, seconds: float, names: Sequence[str]) -> None:
        """Raises RuntimeError: in one process nobody will send while this worker waits."""
        raise RuntimeError(f"rank {self.rank} would wait for ever for {', '.join(names)}")

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """This worker's alone: the others would have to run to give theirs, and `Workers` makes them all alike."""
        return [value]

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """This worker's alone, for the same reason."""
        return tensor

    def begin_sum(self, tensor: Tensor, name: str) -> None:
        """Nothing, for the same reason."""

    def unique_name(self, prefix: str) -> str:
        """The prefix: a group has one user."""
        return prefix


def _are_finite(due: Step[Any] | None) -> bool:
    averages = {} if due is None or due.uncompressed is None else due.uncompressed.averages()
    return all(bool(average.isfinite().all()) for average in averages.values())


class _Averages:
    """As `Uncompressed`, of what is there already."""

    def __init__(self, averages: dict[Tensor, Tensor]) -> None:
        self._averages = averages

    def averages(self) -> dict[Tensor, Tensor]:
        return self._averages


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
    device
        Of gradients and errors.
    average
        Whether gradients are averaged rather than added up.
    local_size
        In two levels: workers on each host.
    """

    def __init__(
        self,
        layout: Layout,
        options: Options,
        workers: int,
        server: int | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        average: bool = True,
        local_size: int = 1,
    ) -> None:
        weight = 1.0 / workers if average else 1.0
        self.exchanges = [
            Exchange(0, "simulation", layout, options, weight, transport, device)
            for transport in InProcessTransport.group(workers, server, local_size=local_size)
        ]

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """One exchange; gradients are by worker and tensor, contiguous, read and written in place."""
        under_way = [exchange.begin(g, g) for exchange, g in zip(self.exchanges, gradients, strict=True)]
        for stage in range(1, 5):  # in two levels: reduce, push, pull, share
            for work in under_way:
                work.poll(stage)
        for exchange in self.exchanges:
            exchange.streams.wait_for_side()


class Workers:
    """n workers that train one model together, step after step, with all that they would have under Horovod.

    Parameters
    ----------
    make
        Makes a DoubleSqueeze, one for each worker.
    parameters
        Names and parameters of the model, which stand for every worker's replica.
    workers
        How many, two at least.
    local_size
        In two levels: workers on each host.
    """

    def __init__(
        self, make: Callable[[], DoubleSqueeze], parameters: Sequence[tuple[str, Tensor]], workers: int, local_size: int = 1
    ) -> None:
        self.squeezes = [make() for _ in range(workers)]
        if workers < 2:
            raise ValueError(f"Workers: workers must be at least 2, got {workers}")
        transports = InProcessTransport.group(workers, self.squeezes[0].options.server, local_size=local_size)
        self.reducers = []
        for squeeze, transport in zip(self.squeezes, transports, strict=True):
            own = [(name, p.detach().clone().requires_grad_(p.requires_grad)) for name, p in parameters]
            self.reducers.append(bind(squeeze, "workers", own, True, transport))

        for session in self.sessions:
            session.late.keeps_estimates = True

    def estimates(self, worker: int) -> list[dict[str, Tensor]]:
        """What a worker expects of the averages that are under way, by step and name of parameter: its own gradients."""
        session = self.sessions[worker]
        return [{session.name_of(p): own for p, own in estimate.items()} for estimate in session.late.estimates()]

    @property
    def sessions(self) -> list[Session[Any]]:
        """One for each worker."""
        return [reducer.session for reducer in self.reducers if reducer.session is not None]

    def begin_step(self, rate: float) -> None:
        """A step begins, at this learning rate of all parameters."""
        for reducer in self.reducers:
            reducer.begin_step({name: rate for name, _ in reducer.parameters})

    def exchange(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
        """The aggregated gradient of each parameter, as every worker gets it; None where nothing is due in this step.

        Parameters
        ----------
        gradients
            By worker and parameter, of those that are trained; overwritten.
        """
        for session, own in zip(self.sessions, gradients, strict=True):
            for (_, p), gradient in zip(session.parameters, own, strict=True):
                p.grad = gradient
                if session.admit(p):
                    session.ready(p)
            session.flush()
        for _ in range(4):  # in two levels: reduce, push, pull, share
            for session in self.sessions:
                session.poll()
        self._attach_averages()
        for session in self.sessions:
            session.drain()
            session.settle(partial(_are_finite, session.due))
        reducer, session, due = self.reducers[0], self.sessions[0], self.sessions[0].due
        if due is None:
            return None
        assert due.uncompressed is not None
        result, averages = [], due.uncompressed.averages()
        for name, p in session.parameters:
            if session.covers(p):
                result.append(session.finish(p))
            else:
                result.append(averages[p].mul_(*due.factors([name])))
                if not session.skipped:
                    reducer.velocities.add(name, result[-1])  # the same for all
        if not session.skipped:
            reducer.add_carried_over((name, gradient) for (name, _), gradient in zip(session.parameters, result, strict=True))
        return result

    def _attach_averages(self) -> None:
        """The gradients that no exchange takes, averaged at once."""
        rows = zip(*(session.parameters for session in self.sessions), strict=True)
        rest = [[p for _, p in row] for row in rows if not self.sessions[0].covers(row[0][1])]
        averages = [torch.stack([p.grad for p in replicas if p.grad is not None]).mean(0) for replicas in rest]
        for worker, session in enumerate(self.sessions):
            own = [replicas[worker] for replicas in rest]
            session.attach(_Averages({p: average.clone() for p, average in zip(own, averages, strict=True)}))
