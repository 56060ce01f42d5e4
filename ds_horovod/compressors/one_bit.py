"""One bit per element: signs, and a scale for each block, parameter or bucket."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..kernels.formats import OneBitFormat, align
from ..layout import Layout
from .base import FusedCompressor
from .checks import check_block, check_name

Scale = Literal["l1", "l2"]
Granularity = Literal["block", "parameter", "bucket"]


@dataclass(frozen=True)
class OneBit(FusedCompressor):
    """Q[v] = scale * sign(v), with 32 times fewer bytes than float32.

    A block of zeros has scale 0 and remains zero, but a single zero does not: embedding rows that share a scale with rows that
    have gradients move a little in every step. If a scale is not finite (because of NaN, infinity or overflow), its whole
    block, parameter or bucket becomes NaN on every rank.

    Parameters
    ----------
    block
        Elements that share a scale, a positive multiple of 32. Smaller blocks follow the gradient more closely, and cost
        32 / block more bits per element.
    scale
        "l1": mean |v|, the least-squares scale, always a contraction. "l2": ||v||_2 / sqrt(count), the paper's
        (Tang et al. 2019, section 5), which keeps the norm but is no contraction for heavy tails.
    granularity
        What shares a scale: "block", "parameter" or "bucket". A scale never spans two shards; with ``server=RANK`` the shard
        is the whole bucket. The latter two read the memory twice instead of once.

    Raises
    ------
    ValueError
        An option out of range.
    """

    block: int = 2048
    scale: Scale = "l1"
    granularity: Granularity = "block"
    family = "one_bit"

    def __post_init__(self) -> None:
        check_block(self)
        check_name(self, "scale", Scale)
        check_name(self, "granularity", Granularity)

    def format(self, layout: Layout) -> OneBitFormat:
        return _format(self, layout)


@lru_cache(maxsize=1024)
def _format(compressor: OneBit, layout: Layout) -> OneBitFormat:
    scales = {
        "block": layout.shard_numel // compressor.block,
        "parameter": layout.most_pieces,
        "bucket": 1,
    }[compressor.granularity]
    bits_at = align(4 * scales)
    return OneBitFormat(
        compressor.block, compressor.scale, compressor.granularity, scales, bits_at, align(bits_at + layout.shard_numel // 8)
    )
