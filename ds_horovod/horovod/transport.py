"""Horovod's collectives behind the verbs of the exchange."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor

from ..transport import Host, two_levels

_log = logging.getLogger("ds_horovod")
_SHORTEST_NAP, _LONGEST_NAP = 5e-5, 1e-3  # seconds
_names = 0
"""How many numbers of names this rank has used or left out."""


def require_horovod_for(devices: Iterable[torch.device]) -> None:
    """Raises ValueError unless the installed Horovod takes tensors on these devices."""
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is not None and not hvd.cuda_built():
        raise ValueError(
            f"DoubleSqueeze: got tensors on {cuda}, but this Horovod was built without CUDA. Build it where nvcc is "
            "(scripts/install_horovod.sh; HOROVOD_GPU_OPERATIONS=NCCL for collectives between GPUs), or train on the cpu"
        )


def pin(tensor: Tensor) -> Tensor:
    """Keeps a tensor that Horovod gets as long as the result lives.

    Where Python alone is left with a tensor that it has seen, torch (2.10 and later) takes the GIL to say so. Horovod's thread
    must not come to that: when a rank has failed, it drops all tensors under a lock which every new collective wants while it
    holds the GIL, and both would wait for ever. A reference from Python does not help, one from another tensor does.
    """
    holder = tensor.detach()
    holder.grad = tensor
    return holder


def hosts_of(ranks: Sequence[int]) -> list[list[int]]:
    """Some ranks by host, where those of a host follow each other, as horovodrun places them. Empty where they do not, or
    where hosts have unequal numbers of ranks."""
    local_size = hvd.local_size()
    if not mpi_ops.is_homogeneous() or hvd.rank() != hvd.cross_rank() * local_size + hvd.local_rank():
        return []
    hosts: dict[int, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(rank // local_size, []).append(rank)
    return list(hosts.values())


class _HorovodHost:
    """See `Host`. Horovod's alltoall sends nothing to other hosts.

    Parameters
    ----------
    transport
        Of all ranks.
    members
        The ranks of this host, counted within the process set.
    """

    def __init__(self, transport: HorovodTransport, members: list[int]) -> None:
        self.size, self.rank = len(members), members.index(transport.rank)
        self._transport, self._members = transport, members

    def scatter(self, rows: Tensor, name: str) -> int:
        return self._transport.alltoall(rows, name, self._members, 1)

    def share(self, rows: Tensor, name: str) -> int:
        return self._transport.alltoall(rows.repeat(self.size, 1), name, self._members, len(rows))

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        handle = self.share(tensor.contiguous().view(torch.uint8).view(1, -1), name)
        rows = self._transport.result(handle, name)
        return rows.view(tensor.dtype).view(self.size, *tensor.shape).sum(0)


class HorovodTransport:
    """Horovod between the ranks of a process set: one alltoall to push, one allgather to pull.

    Splits are equal, sizes and names fixed: that keeps Horovod's response cache and its fastest paths. With one server
    the alltoall sends everything to that rank, which broadcasts its reply. In two levels all are alltoalls, which send nothing
    to ranks that take no part.

    Parameters
    ----------
    server
        The rank that serves all of every bucket, as `hvd.rank` counts. None: every rank serves its shard.
    process_set
        This rank must be in it. `rank` and `size` are those within it, `ranks` are counted as `hvd.rank` does.
    hierarchical
        See `two_levels`.

    Raises
    ------
    ValueError
        The server is not in the process set, or there cannot be two levels.
    """

    def __init__(
        self, server: int | None = None, process_set: Any = hvd.global_process_set, hierarchical: bool | None = False
    ) -> None:
        ranks = process_set.ranks or list(range(hvd.size()))
        if server is not None and server not in ranks:
            raise ValueError(f"DoubleSqueeze: server must be one of the ranks {', '.join(map(str, ranks))}; got {server}")
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.ranks: list[int] = ranks
        self.server = server
        self.shards = self.size if server is None else 1
        # Horovod says then that a collective is done when the default stream has been told to wait for it.
        self.stream_ordered = any(
            _number(variable, 0) for variable in ("HOROVOD_ENABLE_ASYNC_COMPLETION", "HOROVOD_ENABLE_XLA_OPS")
        )
        self.serves = self.rank if server is None else (0 if server == hvd.rank() else None)
        self.in_order = False  # Horovod matches collectives by their names
        self._process_set = process_set
        self._warnings = 0  # of the wait that goes on
        equal = server is None
        self._splits = torch.tensor([] if equal else [int(rank == server) for rank in ranks], dtype=torch.int32, device="cpu")
        # By handle. What belongs to a handle that has failed stays until Horovod has been shut down: it tells of the failure
        # first, and drops tensors then.
        self._pins: dict[int, list[Tensor]] = {}
        self.host: Host[int] | None = None
        self._peers: list[int] = []  # in two levels: those of other hosts that have the same slice, and this one
        hosts, self.levels = two_levels(hierarchical, server, hosts_of(ranks))
        hosts = [[ranks.index(rank) for rank in host] for host in hosts]
        for at, host in enumerate(hosts):
            if self.rank in host:
                self.host, self.serves = _HorovodHost(self, host), at
                self._peers = [other[host.index(self.rank)] for other in hosts]

    def push(self, payload: Tensor, name: str) -> int:
        if self.host is not None:
            return self.alltoall(payload, name, self._peers, 1)
        return self._alltoall(payload, self._splits, name)

    def alltoall(self, rows: Tensor, name: str, members: Sequence[int], count: int) -> int:
        """Begins to send `count` rows to each of some members, one after the other, and none to others."""
        splits = torch.zeros(self.size, dtype=torch.int32, device="cpu")
        splits[list(members)] = count
        return self._alltoall(rows, splits, name)

    def _alltoall(self, rows: Tensor, splits: Tensor, name: str) -> int:
        # As hvd.alltoall_async, whose outputs could only be pinned once they are under way.
        output, received = rows.new_empty(0), torch.empty(0, dtype=torch.int32, device="cpu")
        arguments = rows, splits, output, received, name, self._process_set
        return self._begin(lambda: mpi_ops._alltoall_async(*arguments), rows, splits, output, received)

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> int:
        if self.host is not None:
            assert reply is not None
            return self.alltoall(reply.repeat(len(self._peers), 1), name, self._peers, 1)
        if self.server is None:
            assert reply is not None
            row, output = reply.unsqueeze(0), reply.new_empty(0)
            return self._begin(lambda: mpi_ops._allgather_async(row, output, name, self._process_set), row, output)
        buffer = torch.empty(1, nbytes, dtype=torch.uint8, device=device) if reply is None else reply.unsqueeze(0)
        broadcast = lambda: hvd.broadcast_async_(buffer, self.server, name, self._process_set)  # noqa: E731
        return self._begin(broadcast, buffer)

    def _begin(self, collective: Callable[[], int], *tensors: Tensor) -> int:
        pins = [pin(tensor) for tensor in tensors]
        handle = int(collective())
        self._pins[handle] = pins
        return handle

    def poll(self, handle: int) -> bool:
        return bool(hvd.poll(handle))

    def wait(self, handle: int) -> Tensor:
        result = hvd.synchronize(handle)
        self._pins.pop(handle, None)
        tensor: Tensor = result[0] if isinstance(result, tuple) else result  # alltoall also returns the splits
        return tensor

    def waiting(self, seconds: float, names: Sequence[str]) -> None:
        """Warns of ranks that stall, and gives up, after the seconds that Horovod's own variables say.

        Horovod's stall inspector does that with MPI; with Gloo it knows of no ranks that could be missing, and is silent.

        Raises
        ------
        HorovodInternalError
            After HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, if that is set; or when Horovod has ended: a collective that began just
            then is in no queue any more, and no thread will ever say that it has failed.
        """
        if _has_ended():
            raise HorovodInternalError(f"DoubleSqueeze: Horovod has been shut down before {', '.join(names)} could begin")
        if _number("HOROVOD_STALL_CHECK_DISABLE", 0):
            return
        often, last = _number("HOROVOD_STALL_CHECK_TIME_SECONDS", 60), _number("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0)
        message = (
            f"rank {self.rank} of {self.size} has waited {seconds:.0f} seconds for {', '.join(map(_with_call, names))}: "
            "another rank has not begun that, or cannot be reached"
        )
        if last and seconds > last:
            raise HorovodInternalError(f"DoubleSqueeze: {message}")
        warnings = int(seconds // max(1, often))
        if warnings > self._warnings:
            _log.warning("DoubleSqueeze: %s", message)
        self._warnings = warnings

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, by rank: what JSON holds, and nothing that runs where it is read. Blocks."""
        # hvd.allgather_object knows no process sets, and pickles.
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(own)], dtype=torch.int64)
        handle = hvd.allgather_async(length, name=name + ".sizes", process_set=self._process_set)
        sizes = self.result(handle, name)
        everyones = self.result(hvd.allgather_async(own, name=name, process_set=self._process_set), name)
        return [json.loads(part.numpy().tobytes()) for part in everyones.split(sizes.tolist())]

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""
        return self.result(hvd.allreduce_async(tensor, op=hvd.Sum, name=name, process_set=self._process_set), name)

    def begin_sum(self, tensor: Tensor, name: str) -> int | None:
        # In place, and of what an allreduce takes alone: ranks that have called hvd.join() take part with zeros.
        return self._begin(lambda: hvd.allreduce_async_(tensor, op=hvd.Sum, name=name, process_set=self._process_set), tensor)

    def unique_name(self, prefix: str) -> str:
        """A name for collectives that begins so, is the same on all ranks, and stands for nothing else. Blocks.

        A rank may have made optimizers, of this process set or of others, in which the others have no part, so the ranks
        take the first number that none of them has used. In elastic jobs newcomers take part in that, too.
        """
        global _names
        number = _names if self.size == 1 else max(self.gather_objects(_names, f"{prefix}.name"))
        _names = number + 1
        return f"{prefix}.{number}"

    def result(self, handle: int, name: str) -> Tensor:
        """What arrives, waited for here: hvd.synchronize would say nothing of ranks that stall."""
        start = time.perf_counter()
        while not self.poll(handle):
            waited = time.perf_counter() - start
            self.waiting(waited, [name])
            time.sleep(min(max(waited / 16, _SHORTEST_NAP), _LONGEST_NAP))  # as `Pipeline.drain`
        return self.wait(handle)


def _has_ended() -> bool:
    """Whether Horovod's thread has ended, as it does when a rank has failed: there are no ranks any more."""
    ranks = (ctypes.c_int * hvd.size())()
    return bool(mpi_ops._basics.MPI_LIB_CTYPES.horovod_process_set_ranks(ctypes.c_int(0), ranks))


_CALLS = {
    r"doublesqueeze\.tensor\.(.+)\.(agreement|bucket0(\.\w+)*\.(reduce|push|pull|share))": r"allreduce(name='\1')",
    r".*\.agreement": "the first step's comparison, of what ranks hold",
    r".*\.name": "the optimizer's first step or first collective call",
    r".*\.reset": "reset_errors()",
    r".*\.state\..*": "broadcast_state()",
    r".*\.bucket\d+\.(residual|velocity)": "full_state_dict()",
    r".*\.residual": "change_compressor()",
}


def _with_call(name: str) -> str:
    """The name of a collective, and the call of the user's that another rank has not made; gradients have none but step()."""
    call = next((found.expand(call) for pattern, call in _CALLS.items() if (found := re.fullmatch(pattern, name))), None)
    return name if call is None else f"{name} ({call})"


def _number(variable: str, default: int) -> int:
    """As Horovod reads its variables: a whole number, and what follows is ignored."""
    digits = re.match(r"\s*\+?(\d+)", os.environ.get(variable, ""))
    return default if digits is None else int(digits[1])
