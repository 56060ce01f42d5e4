"""No compression: the values themselves."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.formats import CastFormat, align
from ..layout import Layout
from .base import FusedCompressor


@dataclass(frozen=True)
class NoCompression(FusedCompressor):
    """Q[v] = v as float32, so that nothing is left for the error.

    As the server's compressor it makes the exchange one-way, with error feedback for the workers alone (MEM-SGD). Elements
    that are not finite are sent as NaN.
    """

    family = "cast"

    def format(self, layout: Layout) -> CastFormat:
        return CastFormat("fp32", align(4 * layout.shard_numel))
