"""The exchange that DoubleSqueeze replaces: every rank sends its compressed gradients to every other, which averages them.

One pass, one compression, no server error; but what each rank receives and decodes grows with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from ds_horovod import Compressor, DoubleSqueeze, NoCompression
from ds_horovod.session import Session
from ds_horovod.transport import HorovodTransport


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


class OnePass(DoubleSqueeze):
    """For ``compression=``. Its `stats` count bytes as if there were servers: see `bytes_sent` instead.

    Parameters
    ----------
    compressor
        Of what every rank sends.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__(compressor, server_compressor=NoCompression(), server_error=False)

    def bind(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        average: bool,
        transport: HorovodTransport,
        groups: Sequence[Sequence[str]] = (),
    ) -> Session[Any] | None:
        self._session = super().bind(name, parameters, average, _OnePassTransport(), groups)
        return self._session

    def bytes_sent(self) -> float:
        """By each rank, per step: an allgather hands every payload on to all others."""
        if self._session is None:
            return 0.0
        payloads = sum(self.compressor.chunk_nbytes(bucket.exchange.layout) for bucket in self._session.buckets)
        return (hvd.size() - 1) * payloads + self.stats()["dense_bytes_sent"]
