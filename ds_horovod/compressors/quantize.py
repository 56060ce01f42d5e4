"""A few levels an element, evenly spaced up to a scale of its block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..kernels.formats import QuantizeFormat, align
from ..layout import Layout
from .base import FusedCompressor
from .checks import check_block, check_name, check_number, check_seed

Rounding = Literal["nearest", "stochastic"]
Scale = Literal["absmax", "l2"]
_BITS = (2, 3, 4, 8)
_TERNARY_BITS = 0  # base 3


@dataclass(frozen=True)
class _Levels(FusedCompressor):
    """What `Quantize` and `Ternary` share."""

    family = "quantize"

    def _check(self, rounding: str, scale: str) -> None:
        check_block(self)
        check_name(self, "rounding", Rounding)
        check_name(self, "scale", Scale)
        if scale == "l2" and rounding != "stochastic":
            name = type(self).__name__
            raise ValueError(f'{name}: scale="l2" needs rounding="stochastic": nearly all would be nearest to zero')
        check_seed(self)

    def format(self, layout: Layout) -> QuantizeFormat:
        return _format(self, layout)


@dataclass(frozen=True)
class Quantize(_Levels):
    """Q[v] = the nearest of 2**bits - 1 levels from -scale to scale, including zero.

    A block whose scale is not finite becomes NaN on every rank.

    Parameters
    ----------
    bits
        Bits per element: 2, 3, 4 or 8.
    block
        Elements that share a scale, a positive multiple of 32. Scales cost 32 / block more bits per element.
    rounding
        "nearest", or "stochastic": up or down at random, which is unbiased (QSGD, Alistarh et al. 2017, arXiv 1610.02132).
        Every rank and server uses its own random numbers.
    scale
        "absmax": the largest magnitude. "l2": the norm of the block, as in QSGD, with stochastic rounding only. It is made
        for training without errors: rounding to multiples of so large a scale makes errors grow without bound, unless blocks
        are smaller than ``4 * (2 ** (bits - 1) - 1) ** 2``, so other ones need ``worker_error=False`` and
        ``server_error=False``.
    seed
        Selects the random numbers: the same seed and gradients give the same payloads.

    Raises
    ------
    ValueError
        An option out of range.
    """

    bits: int = 4
    block: int = 256
    rounding: Rounding = "nearest"
    scale: Scale = "absmax"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "bits", _BITS)
        self._check(self.rounding, self.scale)

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """With 2 bits, half of the range becomes zero; with more bits, nearly every element is sent."""
        return self.bits == 2

    @property
    def contracts(self) -> bool:  # type: ignore[override]
        """Not where the scale is the norm of a block of many elements for so few levels."""
        return _contracts(self.block, self.bits, self.scale)


@dataclass(frozen=True)
class Ternary(_Levels):
    """Q[v] = -scale, 0 or scale, whichever is nearest: five elements in a byte, 1.6 bits each.

    The levels of ``Quantize(bits=2)``, and the parameters of `Quantize`, where they are explained. Each block is packed into
    whole bytes.

    Raises
    ------
    ValueError
        An option out of range.
    """

    block: int = 256
    rounding: Rounding = "nearest"
    scale: Scale = "absmax"
    seed: int = 0
    sparse = True

    def __post_init__(self) -> None:
        self._check(self.rounding, self.scale)

    @property
    def contracts(self) -> bool:  # type: ignore[override]
        """As that of `Quantize`."""
        return _contracts(self.block, _TERNARY_BITS, self.scale)


def _levels(bits: int) -> int:
    """From zero to the scale, zero not counted."""
    return 2 ** (bits - 1) - 1 if bits else 1


def _contracts(block: int, bits: int, scale: Scale) -> bool:
    """Rounding at random adds (scale / levels)**2 / 4 to an element's squared error, at most.

    Where the scale is the norm, that may be more, over a block, than the square of the norm. Where it is the largest
    magnitude, no error exceeds it, and few come near.
    """
    return scale == "absmax" or block < 4 * _levels(bits) ** 2


@lru_cache(maxsize=1024)
def _format(compressor: Quantize | Ternary, layout: Layout) -> QuantizeFormat:
    bits = compressor.bits if isinstance(compressor, Quantize) else _TERNARY_BITS
    blocks = layout.shard_numel // compressor.block
    codes_at = align(4 * blocks)
    stochastic, l2 = compressor.rounding == "stochastic", compressor.scale == "l2"
    format = QuantizeFormat(compressor.block, bits, _levels(bits), stochastic, l2, codes_at, 0, compressor.seed)
    return format._replace(nbytes=align(codes_at + blocks * format.block_nbytes))
