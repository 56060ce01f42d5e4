"""No compression: the values themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..layout import Layout
from .base import LARGEST, FusedCompressor


@dataclass(frozen=True)
class NoCompression(FusedCompressor):
    """Q[v] = v as float32, so that nothing is left for the error.

    As the server's compressor it makes the exchange one-way: error feedback for the workers alone (MEM-SGD).
    """

    def chunk_nbytes(self, layout: Layout) -> int:
        return 4 * -(-layout.shard_numel // 4) * 4

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, error: Tensor | None, chunks: Tensor) -> None:
        for shard, pieces in enumerate(layout.pieces):
            values = chunks[shard].view(torch.float32)
            for piece in pieces:
                out = values[piece.offset : piece.offset + piece.numel]
                kept = None if error is None else error[shard * layout.shard_numel + piece.offset :][: piece.numel]
                if kept is not None:
                    out.copy_(kept)
                if gradients is not None:
                    out += gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
                if kept is not None:
                    if kernels.for_device(out.device).all_within(out):
                        kept.zero_()
                    else:
                        kept[out.isfinite()] = 0.0

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        self._require_size(layout, chunks)
        for pieces, chunk in zip(layout.pieces, chunks, strict=True):
            values = chunk.view(torch.float32)
            for piece in pieces:
                target = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
                target.copy_(values[piece.offset : piece.offset + piece.numel])

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        self._require_size(layout, chunk.unsqueeze(0))
        total.add_(chunk.view(torch.float32)[: layout.shard_numel], alpha=weight)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        return bool(kernels.for_device(chunks.device).all_within(chunks.view(-1).view(torch.float32), limit))
