"""A few elements at random positions, the same on all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..kernels.formats import RANDOM_K_HEADER, RandomKFormat, align
from ..layout import Layout
from .base import FusedCompressor
from .checks import check_name, check_seed, set_option, share

Values = Literal["fp32", "fp16"]
_VALUE_NBYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class RandomK(FusedCompressor):
    """Q[v] keeps k elements of v at random positions and makes the rest zero.

    Each shard is divided into k equal strata, and every step draws a new position in each of them. All ranks and the server
    draw the same positions, which therefore need not be sent, and the sum of several payloads has no more elements than one.
    Values are not scaled by 1 / ratio: Q is biased, on average a contraction by 1 - ratio, and error feedback compensates.

    A shard of v with non-finite values is sent as NaN, and its error and velocity keep what they held, up to rounding.

    Parameters
    ----------
    ratio
        Fraction of the elements that is sent, greater than 0 and at most 1.0: 0.01 for 1 %.
    values
        Precision of the values: "fp32" or "fp16". Rounding goes to the error.
    seed
        Selects the positions: the same seed, step and bucket draw the same ones.

    Raises
    ------
    ValueError
        An option out of range.
    """

    ratio: float = 0.01
    values: Values = "fp32"
    seed: int = 0
    family = "random_k"
    sparse = True

    def __post_init__(self) -> None:
        set_option(self, "ratio", share(self, self.ratio))
        check_name(self, "values", Values)
        check_seed(self)

    def format(self, layout: Layout) -> RandomKFormat:
        return _format(self, layout)


@lru_cache(maxsize=1024)
def _format(compressor: RandomK, layout: Layout) -> RandomKFormat:
    k = min(max(1, math.ceil(round(compressor.ratio * layout.shard_numel, 6))), layout.shard_numel)
    return RandomKFormat(k, compressor.values, compressor.seed, align(RANDOM_K_HEADER + _VALUE_NBYTES[compressor.values] * k))
