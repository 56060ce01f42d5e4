"""The few largest elements, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import kernels
from ..kernels.formats import RUN, TopKFormat, align
from ..layout import Layout
from .base import LARGEST, FusedCompressor

_VALUES = ("fp32", "fp16")


@dataclass(frozen=True, init=False)
class TopK(FusedCompressor):
    """Q[v] keeps the largest magnitudes of v and makes the rest zero.

    The selection runs over a whole shard (a bucket's n-th part, or the bucket with ``server=RANK``), is exact, and gives
    ties to the lowest index. Where v is not finite, its shard sends those elements as NaN and nothing else (all as NaN,
    where they are more than it may send); the others wait in the error.

    Parameters
    ----------
    ratio
        Share of the elements that is kept, over 0 and at most 1. Default 0.01.
    k
        Elements that are kept of each shard, instead of a ratio.
    values
        "fp32", or "fp16" for 4 instead of 6 bytes an element that is sent; what rounding takes away stays in the error.

    Raises
    ------
    ValueError
        An option out of range, or both ratio and k.
    """

    ratio: float | None
    k: int | None
    values: str

    def __init__(self, ratio: float | None = None, *, k: int | None = None, values: str = "fp32") -> None:
        if ratio is not None and k is not None:
            raise ValueError(f"TopK: give ratio or k, not both; got ratio={ratio!r} and k={k!r}")
        if k is None:
            ratio = 0.01 if ratio is None else ratio
            if not 0 < ratio <= 1:
                raise ValueError(f"TopK: ratio must be over 0 and at most 1, got {ratio!r}")
        elif not isinstance(k, int) or k < 1:
            raise ValueError(f"TopK: k must be a positive whole number, got {k!r}")
        if values not in _VALUES:
            raise ValueError(f"TopK: values must be one of {', '.join(_VALUES)}, got {values!r}")
        for name, value in (("ratio", ratio), ("k", k), ("values", values)):
            object.__setattr__(self, name, value)

    def chunk_nbytes(self, layout: Layout) -> int:
        return _format(self, layout).nbytes

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, error: Tensor | None, chunks: Tensor) -> None:
        kernels.for_device(chunks.device).top_k_encode(_format(self, layout), layout, gradients, error, chunks)

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        kernels.for_device(chunks.device).top_k_decode(_format(self, layout), layout, chunks, gradients)

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        kernels.for_device(chunk.device).top_k_accumulate(_format(self, layout), layout, chunk, weight, total)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        format = _format(self, layout)
        values = chunks[:, format.values_at : format.values_at + format.k * (2 if format.half else 4)].contiguous()
        values = values.view(-1).view(torch.float16 if format.half else torch.float32)
        return bool(kernels.for_device(chunks.device).all_within(values.float(), limit))


@lru_cache(maxsize=1024)
def _format(codec: TopK, layout: Layout) -> TopKFormat:
    k = codec.k if codec.ratio is None else math.ceil(round(codec.ratio * layout.most_elements, 6))  # 7 of 100 are 0.07
    assert k is not None
    k = min(k, layout.most_elements)
    half = codec.values == "fp16"
    offsets_at = align(4 * -(-layout.shard_numel // RUN))
    values_at = align(offsets_at + 2 * k)
    return TopKFormat(k, half, offsets_at, values_at, align(values_at + (2 if half else 4) * k))
