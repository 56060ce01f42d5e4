"""No compression: the values themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..feedback import FeedbackState
from ..kernels.formats import CastFormat
from ..kernels.reference import put
from ..layout import Layout
from .base import LARGEST, Compressor, FusedCompressor


@dataclass(frozen=True)
class NoCompression(FusedCompressor):
    """Q[v] = v as float32, so that nothing is left for the error.

    As the server's compressor it makes the exchange one-way: error feedback for the workers alone (MEM-SGD).
    """

    def format(self, layout: Layout) -> CastFormat:
        return CastFormat("fp32", self.chunk_nbytes(layout))

    def chunk_nbytes(self, layout: Layout) -> int:
        return 4 * -(-layout.shard_numel // 4) * 4

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor) -> None:
        device = kernels.for_device(chunks.device)
        if not device.HOST:
            return device.cast_encode(self.format(layout), layout, gradients, memory, chunks)  # type: ignore[no-any-return]
        for shard, pieces in enumerate(layout.pieces):
            values = chunks[shard].view(torch.float32)
            for piece in pieces:
                start = shard * layout.shard_numel + piece.offset
                here = slice(start, start + piece.numel)
                out = values[piece.offset : piece.offset + piece.numel]
                if memory.error is not None:
                    out.copy_(memory.error[here])
                velocity = None
                if gradients is not None:
                    gradient = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
                    if memory.velocity is not None:
                        gradient = velocity = memory.velocity[here] * memory.momentum + gradient
                    out += gradient
                finite = slice(None) if device.all_within(out) else out.isfinite()
                if memory.error is not None:
                    memory.error[here][finite] = 0.0
                if velocity is not None and memory.velocity is not None:
                    memory.velocity[here][finite] = velocity[finite]

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        device = kernels.for_device(chunks.device)
        if not device.HOST:
            return device.cast_decode(self.format(layout), layout, chunks, gradients)  # type: ignore[no-any-return]
        self._require_size(layout, chunks)
        for pieces, chunk in zip(layout.pieces, chunks, strict=True):
            values = chunk.view(torch.float32)
            for piece in pieces:
                put(gradients, piece, values[piece.offset : piece.offset + piece.numel])

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        device = kernels.for_device(chunk.device)
        if not device.HOST:
            return device.cast_accumulate(self.format(layout), layout, chunk, weight, total)  # type: ignore[no-any-return]
        self._require_size(layout, chunk.unsqueeze(0))
        total.add_(chunk.view(torch.float32)[: layout.shard_numel], alpha=weight)

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, memory: FeedbackState, chunk: Tensor
    ) -> None:
        device = kernels.for_device(chunk.device)
        if pusher != self or device.HOST:
            return super().serve(layout, pushed, pusher, weight, memory, chunk)
        device.cast_serve(self.format(layout), layout, pushed, weight, memory.error, chunk)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        return bool(kernels.for_device(chunks.device).all_within(chunks.view(-1).view(torch.float32), limit))
