"""What an exchange asks of the network: Horovod's, torch's, or other workers in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Handle = TypeVar("Handle")
"""Of a collective under way."""
HandleOfHost = TypeVar("HandleOfHost", covariant=True)


class Host(Protocol[HandleOfHost]):
    """The ranks of one host, and what they send each other. `Transport.poll` and `Transport.wait` end it."""

    size: int
    """How many there are."""
    rank: int
    """Which of them this is, and so which slice of a bucket is its own."""

    def scatter(self, rows: Tensor, name: str) -> HandleOfHost:
        """Sends row i of ``uint8 (size, nbytes)`` to rank i, and gets ``(size, nbytes)``, a row of each."""

    def share(self, rows: Tensor, name: str) -> HandleOfHost:
        """Sends ``uint8 (n, nbytes)`` to all, and gets ``(size * n, nbytes)``, those of one rank after those of another."""

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all tensors, in the order of ranks. Blocks."""


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
    """The shard that this rank serves, of its slice, or None."""
    host: Host[Handle] | None
    """In two levels the ranks of this host, each with a slice of every bucket, which it exchanges with one rank of every other
    host, its `workers`. None: every rank exchanges all of a bucket with all others."""
    in_order: bool
    """Whether collectives are matched by their order instead of their names. Pushes are matched with pushes then, and pulls
    with pulls, and all ranks must begin each kind in one order."""
    stream_ordered: bool
    """Whether what arrives on a GPU is there only once the device's default stream has come so far."""

    def push(self, payload: Tensor, name: str) -> Handle:
        """Sends chunk s of ``uint8 (shards of the slice, nbytes)`` to the server of shard s: ``(workers, nbytes)`` there."""

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> Handle:
        """Sends each server's ``uint8 (nbytes,)`` to every worker, which gets ``(shards of the slice, nbytes)`` on a device."""

    def poll(self, handle: Handle) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, handle: Handle) -> Tensor:
        """What arrived; to be called once for each handle, when `poll` says so."""

    def waiting(self, seconds: float, names: Sequence[str]) -> None:
        """Is told, every second or so, of collectives that have been pending for long."""


class GroupTransport(Transport[Handle], Protocol[Handle]):
    """A transport that can also compare notes."""

    ranks: list[int]
    """All ranks of the group, as the user counts them."""
    levels: str
    """What there is to say of hosts."""

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's plain value, by rank. Blocks."""

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""

    def begin_sum(self, tensor: Tensor, name: str) -> Handle | None:
        """Begins a sum of small tensors over the ranks that take part in this step, which `poll` and `wait` end.

        None: all ranks always take part, and are alike.
        """

    def unique_name(self, prefix: str) -> str:
        """A name for collectives that begins so, is the same on all ranks, and stands for nothing else. Blocks."""


def two_levels(hierarchical: bool | None, server: int | None, hosts: list[list[int]]) -> tuple[list[list[int]], str]:
    """Whether each bucket is exchanged in two levels.

    Parameters
    ----------
    hierarchical, server
        As the user chose them.
    hosts
        The ranks of each host; none, where that cannot be told.

    Returns
    -------
    hosts, description
        The ranks of each host; none, where there is one level. And what there is to say of that.

    Raises
    ------
    ValueError
        The user wants two levels, and that cannot be: why.
    """
    sizes = {len(host) for host in hosts}
    if len(hosts) == 1 and sizes == {1}:
        return [], "one rank"
    problem = None
    if server is not None:
        problem = f"server={server}, which serves all of every bucket"
    elif not hosts:
        problem = "hosts of different numbers of ranks, or ranks in another order than horovodrun's"
    elif len(sizes) > 1:
        problem = f"different numbers of ranks on hosts, {hosts}"
    elif sizes == {1}:
        problem = "one rank on each host"
    elif len(hosts) == 1:
        problem = f"one host, with {len(hosts[0])} ranks"
    if problem is None and hierarchical is False:
        problem = "hierarchical=False"
    elif hierarchical and problem is not None:
        raise ValueError(
            f"DoubleSqueeze: hierarchical=True needs several hosts with the same number of ranks, more than one; got {problem}"
        )
    if problem is not None:
        return [], f"one level: {problem}"
    return hosts, f"two levels: {len(hosts)} hosts with {len(hosts[0])} ranks each, which add up their gradients first"
