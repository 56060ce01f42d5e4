"""The exchange that DoubleSqueeze replaces: every rank sends its compressed gradients to every other, which averages them.

One pass, one compression, no server error; but what each rank receives and decodes grows with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from ds_horovod import Compressor, DoubleSqueeze, NoCompression
from ds_horovod.horovod.transport import HorovodTransport
from ds_horovod.snapshot import rebind, snapshot


class _OnePassTransport(HorovodTransport):
    """Every rank is the only server, for itself: all hear all payloads, and a reply is there as soon as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shards, self.serves = 1, 0

    def push(self, payload: Tensor, name: str) -> Any:
        return hvd.allgather_async(payload, name=name)

    def pull(self, reply: Tensor | None, nbytes: int, name: str, device: torch.device) -> Any:
        return reply

    def poll(self, handle: Any) -> bool:
        return isinstance(handle, Tensor) or super().poll(handle)

    def wait(self, handle: Any) -> Tensor:
        return handle.unsqueeze(0) if isinstance(handle, Tensor) else super().wait(handle)


def one_pass(compressor: Compressor) -> DoubleSqueeze:
    """For ``compression=``, before `use_one_pass`, which also gives the bytes: `stats` counts as if there were servers."""
    return DoubleSqueeze(compressor, server_compressor=NoCompression(), server_error=False)


def use_one_pass(optimizer: Any) -> Callable[[], float]:
    """Exchanges an optimizer's gradients in one pass from now on.

    Returns
    -------
    callable
        Gives the bytes that each rank sends per step: an allgather hands every payload on to all others.
    """
    squeeze = optimizer.double_squeeze
    reducer = squeeze._reducer
    if reducer.session is None:
        return lambda: 0.0
    rebind(reducer, _OnePassTransport(), snapshot(reducer))

    def bytes_sent() -> float:
        payloads = sum(squeeze.options.compressor.chunk_nbytes(bucket.exchange.layout) for bucket in reducer.session.buckets)
        return float((hvd.size() - 1) * payloads + squeeze.stats()["dense_bytes_sent"])

    return bytes_sent
