"""Every element, rounded to 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..kernels.formats import CastFormat, align
from ..layout import Layout
from .base import FusedCompressor

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
    family = "cast"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"Cast: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def format(self, layout: Layout) -> CastFormat:
        return _format(self, layout)


@lru_cache(maxsize=1024)
def _format(compressor: Cast, layout: Layout) -> CastFormat:
    return CastFormat(compressor.dtype, align(2 * layout.shard_numel))
