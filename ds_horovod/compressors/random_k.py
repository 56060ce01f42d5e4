"""A few elements at random positions, the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import kernels
from ..feedback import FeedbackState
from ..kernels.formats import RANDOM_K_HEADER, RandomKFormat, align
from ..layout import Layout
from .base import LARGEST, Compressor, FusedCompressor

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class RandomK(FusedCompressor):
    """Q[v] keeps k elements of v at random positions and makes the rest zero.

    A shard is divided into k equal strata, and in each one position is drawn anew in every step. All ranks and the server
    draw the same, so no positions travel, and the sum of what arrives has no more elements than each of its terms. Values
    are not scaled up by 1 / ratio: Q is biased, a contraction by 1 - ratio on average, and error feedback makes up for it.

    Where v is not finite, its shard travels as NaN altogether, and takes its step back.

    Parameters
    ----------
    ratio
        Share of the elements that is sent, over 0 and at most 1.
    values
        How they travel: "fp32" or "fp16". What that takes away stays in the error.
    seed
        Of the positions: the same seed, step and bucket draw the same ones.

    Raises
    ------
    ValueError
        An option out of range.
    """

    ratio: float = 0.01
    values: str = "fp32"
    seed: int = 0
    sparse = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"RandomK: ratio must be over 0 and at most 1, got {self.ratio!r}")
        if self.values not in _DTYPES:
            raise ValueError(f"RandomK: values must be one of {', '.join(_DTYPES)}, got {self.values!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"RandomK: seed must be a whole number from 0 to 2**64 - 1, got {self.seed!r}")

    def format(self, layout: Layout) -> RandomKFormat:
        return _format(self, layout)

    def chunk_nbytes(self, layout: Layout) -> int:
        return self.format(layout).nbytes

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor) -> None:
        kernels.for_device(chunks.device).random_k_encode(_format(self, layout), layout, gradients, memory, chunks)

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        kernels.for_device(chunks.device).random_k_decode(_format(self, layout), layout, chunks, gradients)

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        kernels.for_device(chunk.device).random_k_accumulate(_format(self, layout), layout, chunk, weight, total)

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, memory: FeedbackState, chunk: Tensor
    ) -> None:
        device = kernels.for_device(chunk.device)
        if pusher != self or device.HOST:
            return super().serve(layout, pushed, pusher, weight, memory, chunk)
        device.random_k_serve(_format(self, layout), layout, pushed, weight, memory, chunk)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        dtype = _DTYPES[self.values]
        end = RANDOM_K_HEADER + dtype.itemsize * _format(self, layout).k
        values = chunks[:, RANDOM_K_HEADER:end].contiguous().view(-1).view(dtype)
        return bool(kernels.for_device(chunks.device).all_within(values.float(), limit))


@lru_cache(maxsize=1024)
def _format(codec: RandomK, layout: Layout) -> RandomKFormat:
    k = min(max(1, math.ceil(round(codec.ratio * layout.shard_numel, 6))), layout.shard_numel)
    return RandomKFormat(k, codec.values, codec.seed, align(RANDOM_K_HEADER + _DTYPES[codec.values].itemsize * k))
