"""Every element, rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .. import kernels
from ..feedback import FeedbackState
from ..kernels.formats import CastFormat, align
from ..layout import Layout
from .base import LARGEST, Compressor, FusedCompressor

_DTYPES = ("fp16", "bf16")


@dataclass(frozen=True)
class Cast(FusedCompressor):
    """Q[v] = v rounded to the nearest 16-bit float, half of the bytes of float32.

    What rounding takes away stays in the error. So does what lies beyond the largest 16-bit float, which travels in its
    place: finite values never become infinite. What is not finite travels as NaN, element by element.

    Parameters
    ----------
    dtype
        "fp16": 11 significant bits, up to 65504, nothing under 3e-8. "bf16": 8 of them, over the range of float32.

    Raises
    ------
    ValueError
        Another dtype.
    """

    dtype: str = "fp16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"Cast: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def format(self, layout: Layout) -> CastFormat:
        return _format(self, layout)

    def chunk_nbytes(self, layout: Layout) -> int:
        return self.format(layout).nbytes

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor) -> None:
        kernels.for_device(chunks.device).cast_encode(_format(self, layout), layout, gradients, memory, chunks)

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        kernels.for_device(chunks.device).cast_decode(_format(self, layout), layout, chunks, gradients)

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        kernels.for_device(chunk.device).cast_accumulate(_format(self, layout), layout, chunk, weight, total)

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, memory: FeedbackState, chunk: Tensor
    ) -> None:
        device = kernels.for_device(chunk.device)
        if pusher != self or device.HOST:
            return super().serve(layout, pushed, pusher, weight, memory, chunk)
        device.cast_serve(_format(self, layout), layout, pushed, weight, memory.error, chunk)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        return bool(kernels.for_device(chunks.device).cast_is_within(_format(self, layout), chunks, limit))


@lru_cache(maxsize=1024)
def _format(codec: Cast, layout: Layout) -> CastFormat:
    return CastFormat(codec.dtype, align(2 * layout.shard_numel))
