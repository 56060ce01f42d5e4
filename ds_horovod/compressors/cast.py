"""Rounding to 16-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..kernels.formats import CastFormat, align
from ..layout import Layout
from .base import FusedCompressor
from .checks import check_name

CastDtype = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class Cast(FusedCompressor):
    """Q[v] = v rounded to the nearest 16-bit float, which halves the bytes of float32.

    The error keeps what rounding removes. Values beyond the largest 16-bit float are clipped to it, so that finite values
    never become infinite, and the error keeps the excess. Elements that are not finite are sent as NaN.

    Parameters
    ----------
    dtype
        "fp16": 11 significant bits, magnitudes from 3e-8 to 65504. "bf16": 8 significant bits, the range of float32.

    Raises
    ------
    ValueError
        Another dtype.
    """

    dtype: CastDtype = "fp16"
    family = "cast"

    def __post_init__(self) -> None:
        check_name(self, "dtype", CastDtype)

    def format(self, layout: Layout) -> CastFormat:
        return _format(self, layout)


@lru_cache(maxsize=1024)
def _format(compressor: Cast, layout: Layout) -> CastFormat:
    return CastFormat(compressor.dtype, align(2 * layout.shard_numel))
