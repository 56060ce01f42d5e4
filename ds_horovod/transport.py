"""Horovod's collectives behind the verbs of the exchange."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor


def require_horovod_for(devices: Iterable[torch.device]) -> None:
    """Raises ValueError unless the installed Horovod takes tensors on these devices."""
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is not None and not hvd.cuda_built():
        raise ValueError(
            f"DoubleSqueeze: got tensors on {cuda}, but this Horovod was built without CUDA. Build it where nvcc is "
            "(scripts/install_horovod.sh; HOROVOD_GPU_OPERATIONS=NCCL for collectives between GPUs), or train on the cpu"
        )


class HorovodTransport:
    """Horovod between the ranks of a process set: one alltoall to push, one allgather to pull.

    Splits are equal, sizes and names fixed: that keeps Horovod's response cache and its fastest paths. With one server
    the alltoall sends everything to that rank, which broadcasts its reply.

    Parameters
    ----------
    server
        The rank that serves all of every bucket, as `hvd.rank` counts. None: every rank serves its shard.
    process_set
        This rank must be in it. `rank` and `size` are those within it.

    Raises
    ------
    ValueError
        The server is not in the process set.
    """

    def __init__(self, server: int | None = None, process_set: Any = hvd.global_process_set) -> None:
        ranks = process_set.ranks or list(range(hvd.size()))
        if server is not None and server not in ranks:
            raise ValueError(f"DoubleSqueeze: server must be one of the ranks {', '.join(map(str, ranks))}; got {server}")
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.server = server
        self.shards = self.size if server is None else 1
        # Horovod says then that a collective is done when the default stream has been told to wait for it.
        self.stream_ordered = _is_set("HOROVOD_ENABLE_ASYNC_COMPLETION") or _is_set("HOROVOD_ENABLE_XLA_OPS")
        self.serves = self.rank if server is None else (0 if server == hvd.rank() else None)
        self._process_set = process_set
        self._splits = None
        if server is not None:
            self._splits = torch.tensor([int(rank == server) for rank in ranks], dtype=torch.int32)

    def push(self, payload: Tensor, name: str) -> int:
        return int(hvd.alltoall_async(payload, splits=self._splits, name=name, process_set=self._process_set))

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> int:
        if self.server is None:
            assert reply is not None
            return int(hvd.allgather_async(reply.unsqueeze(0), name=name, process_set=self._process_set))
        buffer = torch.empty(1, nbytes, dtype=torch.uint8, device=device) if reply is None else reply.unsqueeze(0)
        return int(hvd.broadcast_async_(buffer, root_rank=self.server, name=name, process_set=self._process_set))

    def poll(self, handle: int) -> bool:
        return bool(hvd.poll(handle))

    def wait(self, handle: int) -> Tensor:
        result = hvd.synchronize(handle)
        tensor: Tensor = result[0] if isinstance(result, tuple) else result  # alltoall also returns the splits
        return tensor

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, by rank. Blocks."""
        # hvd.allgather_object knows no process sets.
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = hvd.allgather(torch.tensor([len(own)]), name=name + ".sizes", process_set=self._process_set)
        everyones = hvd.allgather(own, name=name, process_set=self._process_set)
        return [pickle.loads(part.numpy().tobytes()) for part in everyones.split(sizes.tolist())]

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""
        total: Tensor = hvd.allreduce(tensor, op=hvd.Sum, name=name, process_set=self._process_set)
        return total


def _is_set(variable: str) -> bool:
    """As Horovod reads its variables: a whole number over zero, and what follows is ignored."""
    digits = re.match(r"\s*\+?(\d+)", os.environ.get(variable, ""))
    return digits is not None and int(digits[1]) > 0
