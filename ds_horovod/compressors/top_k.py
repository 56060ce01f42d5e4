"""The few largest elements, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..kernels.formats import ENTRIES, READ_AHEAD, RUN, TopKFormat, align
from ..layout import Layout
from .base import FusedCompressor

_VALUE_NBYTES = {"fp32": 4, "fp16": 2, "sign": 0}


@dataclass(frozen=True, init=False)
class TopK(FusedCompressor):
    """Q[v] keeps the largest magnitudes of v and makes the rest zero.

    The selection runs over a whole shard (a bucket's n-th part, or the bucket with ``server=RANK``), is exact, and gives
    ties to the lowest index. Zeros stay zeros: where fewer are not, fewer are sent. Where v is not finite, its shard
    sends those elements as NaN and nothing else (all as NaN, where they are more than it may send); the others wait in
    the error.

    Parameters
    ----------
    ratio
        Share of the elements that is kept, over 0 and at most 1. Default 0.01.
    k
        Elements that are kept of each shard, instead of a ratio.
    values
        How an element that is sent travels: "fp32"; "fp16"; or "sign", with the mean magnitude of each 64 of them. What
        that takes away stays in the error. Where it is takes 2 + log2(1 / ratio) bits beside, at most one bit an element
        of the gradient.

    Raises
    ------
    ValueError
        An option out of range, or both ratio and k.
    """

    ratio: float | None
    k: int | None
    values: str
    family = "top_k"
    sparse = True

    def __init__(self, ratio: float | None = None, *, k: int | None = None, values: str = "fp32") -> None:
        if ratio is not None and k is not None:
            raise ValueError(f"TopK: give ratio or k, not both; got ratio={ratio!r} and k={k!r}")
        if k is None:
            ratio = 0.01 if ratio is None else ratio
            if not 0 < ratio <= 1:
                raise ValueError(f"TopK: ratio must be over 0 and at most 1, got {ratio!r}")
        elif not isinstance(k, int) or k < 1:
            raise ValueError(f"TopK: k must be a positive whole number, got {k!r}")
        if values not in _VALUE_NBYTES:
            raise ValueError(f"TopK: values must be one of {', '.join(_VALUE_NBYTES)}, got {values!r}")
        for name, value in (("ratio", ratio), ("k", k), ("values", values)):
            object.__setattr__(self, name, value)

    def format(self, layout: Layout) -> TopKFormat:
        return _format(self, layout)


def runs_of(shard_numel: int) -> int:
    """Runs in a shard."""
    return -(-shard_numel // RUN)


def most_scales(k: int, shard_numel: int) -> int:
    """Magnitudes of k entries at most, since each run begins a new one."""
    return -(-k // ENTRIES) + runs_of(shard_numel)


@lru_cache(maxsize=1024)
def _format(compressor: TopK, layout: Layout) -> TopKFormat:
    k = (
        compressor.k if compressor.ratio is None else math.ceil(round(compressor.ratio * layout.most_elements, 6))
    )  # 7 of 100 are 0.07
    assert k is not None
    k, values = min(k, layout.most_elements), compressor.values
    # Of all ways to divide an offset into upper and lower bits the shortest, for which elements and k are enough to know.
    return min((_divided(k, values, layout.shard_numel, b) for b in range(16)), key=lambda format: format.nbytes)


def _divided(k: int, values: str, numel: int, low_bits: int) -> TopKFormat:
    sign = values == "sign"
    runs = runs_of(numel)  # each of which may leave 7 bits of a byte unused
    scales_at = align(4 * runs)
    upper_at = align(scales_at + (2 * most_scales(k, numel) if sign else 0))
    low_at = align(upper_at + (-(-numel >> low_bits) + (k if low_bits else 0) + 7 * runs) // 8)
    values_at = align(low_at + (k * (low_bits + sign) + 7 * runs) // 8 + READ_AHEAD)
    return TopKFormat(k, values, low_bits, scales_at, upper_at, low_at, values_at, align(values_at + _VALUE_NBYTES[values] * k))
