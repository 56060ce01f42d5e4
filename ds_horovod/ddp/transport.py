"""Process groups of torch behind the verbs of the exchange."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..transport import Host, two_levels

_log = logging.getLogger("ds_horovod")
# torch 2.13 has given it another name, and warns of the old one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Sent(NamedTuple):
    """A collective under way."""

    work: Any
    output: Tensor
    input: Tensor | None
    """What must live as long."""


class _Groups(NamedTuple):
    """In two levels, one for each kind of collective."""

    reduce: dist.ProcessGroup
    pushes: dist.ProcessGroup
    pulls: dist.ProcessGroup
    share: dist.ProcessGroup


class _GroupHost:
    """See `Host`."""

    def __init__(self, groups: _Groups, size: int, rank: int) -> None:
        self._groups, self.size, self.rank = groups, size, rank

    def scatter(self, rows: Tensor, name: str) -> Sent:
        received = torch.empty_like(rows)
        return Sent(dist.all_to_all_single(received, rows, group=self._groups.reduce, async_op=True), received, rows)

    def share(self, rows: Tensor, name: str) -> Sent:
        received = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        work = _all_gather(received, rows.contiguous(), group=self._groups.share, async_op=True)
        return Sent(work, received, rows)

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        rows = tensor.new_empty((self.size * len(tensor),))
        _all_gather(rows, tensor.contiguous(), group=self._groups.reduce)
        return rows.view(self.size, -1).sum(0)


class ProcessGroupTransport:
    """Process groups between the ranks of one: an all-to-all to push, an all-gather to pull.

    Process groups match collectives by their order. When a push is done differs between ranks, and so does the order of pushes
    and pulls: each kind has a group of its own. What ranks compare and add up beside goes with the pushes, or in two levels has
    the group to itself.

    All ranks make one at the same point.

    Parameters
    ----------
    server
        The rank that serves all of every bucket, as ``torch.distributed.get_rank`` counts. None: every rank serves its shard.
    group
        Of all ranks that train together. None: the default group.
    hierarchical
        See `two_levels`. Ranks are on one host if torchrun has started them together, or where it has not, by its name.

    Raises
    ------
    RuntimeError
        There is no process group.
    ValueError
        This rank is not in the group, or the server is not; or the backend has no all-to-all.
    """

    def __init__(
        self, server: int | None = None, group: dist.ProcessGroup | None = None, hierarchical: bool | None = False
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("DoubleSqueeze: call torch.distributed.init_process_group() before training")
        parent = dist.group.WORLD if group is None else group
        if parent is None or dist.get_rank(parent) < 0:
            raise ValueError(f"DoubleSqueeze: rank {dist.get_rank()} is not in the process group")
        ranks = dist.get_process_group_ranks(parent)
        if server is not None and server not in ranks:
            raise ValueError(f"DoubleSqueeze: server must be one of the ranks {', '.join(map(str, ranks))}; got {server}")
        self.rank: int = dist.get_rank(parent)
        self.size: int = len(ranks)
        self.ranks: list[int] = ranks
        self.server = server
        self.shards = self.size if server is None else 1
        self.serves = self.rank if server is None else (0 if server == dist.get_rank() else None)
        self.in_order = True
        self.host: Host[Sent] | None = None
        self.levels = ""
        self._exchanges: _Groups | None = None
        self.stream_ordered = False
        self._warnings = 0  # of the wait that goes on
        backend = str(dist.get_backend(parent))
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")  # of what is not on any
        if self.size > 1:
            self._pushes, self._pulls = _groups_like(parent, ranks, backend)
            hosts, self.levels = two_levels(hierarchical, server, self._by_host())
            for at, host in enumerate(hosts):
                if self.rank in host:
                    own = host.index(self.rank)
                    neighbours, peers = [ranks[i] for i in host], [ranks[other[own]] for other in hosts]
                    self._exchanges = _groups_of(parent, neighbours, peers, backend)
                    self.host, self.serves = _GroupHost(self._exchanges, len(host), own), at

    def _by_host(self) -> list[list[int]]:
        """The ranks of each host, counted within the group."""
        hosts: dict[str, list[int]] = {}
        for rank, host in enumerate(self.gather_objects(os.environ.get("GROUP_RANK", socket.gethostname()), "hosts")):
            hosts.setdefault(host, []).append(rank)
        return list(hosts.values())

    def push(self, payload: Tensor, name: str) -> Sent:
        if self.server is None:
            received = torch.empty_like(payload)
            group = self._pushes if self._exchanges is None else self._exchanges.pushes
            work = dist.all_to_all_single(received, payload, group=group, async_op=True)
            return Sent(work, received, payload)
        counts = self.size if self.serves is not None else 0
        received = payload.new_empty((counts, *payload.shape[1:]))
        to_server = [int(rank == self.server) for rank in self.ranks]
        from_all = [int(self.serves is not None)] * self.size
        work = dist.all_to_all_single(received, payload, from_all, to_server, group=self._pushes, async_op=True)
        return Sent(work, received, payload)

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> Sent:
        if self.server is None:
            assert reply is not None
            group = self._pulls if self._exchanges is None else self._exchanges.pulls
            received = reply.new_empty(group.size() * nbytes)
            work = _all_gather(received, reply, group=group, async_op=True)
            return Sent(work, received.view(group.size(), nbytes), reply)
        buffer = torch.empty(1, nbytes, dtype=torch.uint8, device=device) if reply is None else reply.unsqueeze(0)
        return Sent(dist.broadcast(buffer, self.server, group=self._pulls, async_op=True), buffer, None)

    def poll(self, handle: Sent) -> bool:
        return bool(handle.work.is_completed())

    def wait(self, handle: Sent) -> Tensor:
        handle.work.wait()  # raises what has failed, and on a GPU makes the current stream wait
        return handle.output

    def waiting(self, seconds: float, names: Sequence[str]) -> None:
        """Warns every minute. The process group gives up after its own timeout: that of ``init_process_group``."""
        warnings = int(seconds // 60)
        if warnings > self._warnings:
            _log.warning(
                "DoubleSqueeze: rank %d of %d has waited %.0f seconds for %s: another rank has not begun that, or cannot be "
                "reached",
                self.rank, self.size, seconds, ", ".join(names),
            )  # fmt: skip
        self._warnings = warnings

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, by rank: what JSON holds, and nothing that runs where it is read. Blocks."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)
        sizes = self._gather(torch.tensor([len(own)], device=self._device)).flatten().tolist()
        rows = self._gather(torch.nn.functional.pad(own, (0, max(sizes) - len(own)))).cpu()
        return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, own: Tensor) -> Tensor:
        rows = own.new_empty(self.size * len(own))
        _all_gather(rows, own, group=self._pushes)
        return rows.view(self.size, len(own))

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""
        total = tensor.to(tensor.device if self._device.type == "cpu" else self._device, copy=True)
        return self.wait(self.begin_total(total)).to(tensor.device)

    def begin_total(self, tensor: Tensor) -> Sent:
        """Begins to put the sum of all ranks' tensors, dense or sparse, in their place; at the same point on all ranks."""
        return Sent(dist.all_reduce(tensor, group=self._pushes, async_op=True), tensor, None)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of all ranks, one by one; at the same point on all ranks. Blocks."""
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self._pushes)
        return own.tolist()

    def begin_sum(self, tensor: Tensor, name: str) -> None:
        """Nothing: DistributedDataParallel calls its hook on all ranks, for all parameters alike."""

    def unique_name(self, prefix: str) -> str:
        """The prefix: nothing is matched by names."""
        return prefix


def _groups_like(parent: dist.ProcessGroup, ranks: Sequence[int], backend: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Two groups of the same ranks, for pushes and pulls. All models of a process group share them: torch frees none."""
    for gone in [group for group in _groups if dist.distributed_c10d._world.pg_map.get(group) is None]:
        del _groups[gone]  # torch.distributed has been ended since
    if parent not in _groups:
        _groups[parent] = _like(parent, ranks, backend), _like(parent, ranks, backend)
    return _groups[parent]


_groups: dict[dist.ProcessGroup, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
_groups_in_two_levels: dict[dist.ProcessGroup, _Groups] = {}


def _groups_of(parent: dist.ProcessGroup, neighbours: list[int], peers: list[int], backend: str) -> _Groups:
    """As `_groups_like`, in two levels: of the ranks of this host, and of those of other hosts that have the same slice."""
    for gone in [group for group in _groups_in_two_levels if group not in _groups]:
        del _groups_in_two_levels[gone]
    if parent not in _groups_in_two_levels:
        kinds = [(neighbours, "reduce"), (peers, "pushes"), (peers, "pulls"), (neighbours, "share")]
        _groups_in_two_levels[parent] = _Groups(**{kind: _like(parent, ranks, backend) for ranks, kind in kinds})
    return _groups_in_two_levels[parent]


def _like(parent: dist.ProcessGroup, ranks: Sequence[int], backend: str) -> dist.ProcessGroup:
    """One group of the same ranks, which alone make it."""
    try:
        timeout = parent._get_backend(torch.device("cuda" if backend == "nccl" else "cpu")).options._timeout
    except (AttributeError, RuntimeError):
        timeout = None  # of the backend's own
    everyone = len(ranks) == dist.get_world_size()
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=not everyone)
    assert isinstance(group, dist.ProcessGroup)
    return group
