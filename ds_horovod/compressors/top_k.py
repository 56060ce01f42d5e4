"""The few largest elements, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..kernels.formats import ENTRIES, READ_AHEAD, RUN, TopKFormat, align
from ..layout import Layout
from .base import FusedCompressor
from .checks import check_name, is_whole, set_option, share

Values = Literal["fp32", "fp16", "sign"]
_VALUE_NBYTES = {"fp32": 4, "fp16": 2, "sign": 0}


@dataclass(frozen=True, init=False)
class TopK(FusedCompressor):
    """Q[v] keeps the largest magnitudes of v and makes the rest zero.

    The selection covers a whole shard (1 / n of a bucket, or the bucket with ``server=RANK``). It is exact, and resolves ties
    in favour of the lowest index. Zeros are never sent, so a shard with fewer nonzero elements sends fewer. A shard with
    non-finite elements sends those alone, as NaN, and the other elements remain in the error; if they exceed what it may
    send, the whole shard is sent as NaN.

    Parameters
    ----------
    ratio
        Fraction of the elements that is kept, greater than 0 and at most 1.0. Default 0.01, which is 1 %.
    k
        Number of elements kept in each shard, instead of a ratio.
    values
        How the elements are sent: as "fp32", as "fp16", or as "sign", with one mean magnitude for each 64 of them. Rounding
        goes to the error. The position of an element takes another 2 + log2(1 / ratio) bits, and all positions together at
        most one bit for each element of the gradient.

    Raises
    ------
    ValueError
        An option out of range, or both ratio and k.
    """

    ratio: float | None
    k: int | None
    values: Values
    family = "top_k"
    sparse = True

    def __init__(self, ratio: float | None = None, *, k: int | None = None, values: Values = "fp32") -> None:
        if ratio is not None and k is not None:
            raise ValueError(f"TopK: give ratio or k, not both; got ratio={ratio!r} and k={k!r}")
        if k is None:
            ratio = share(self, 0.01 if ratio is None else ratio)
        elif not is_whole(k) or k < 1:
            raise ValueError(f"TopK: k must be a positive whole number, got {k!r}")
        for name, value in (("ratio", ratio), ("k", None if k is None else int(k)), ("values", values)):
            set_option(self, name, value)
        check_name(self, "values", Values)

    def format(self, layout: Layout) -> TopKFormat:
        return _format(self, layout)


def runs_of(shard_numel: int) -> int:
    """Runs in a shard."""
    return -(-shard_numel // RUN)


def most_scales(k: int, shard_numel: int) -> int:
    """The largest number of magnitudes for k entries, since each run begins a new one."""
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
