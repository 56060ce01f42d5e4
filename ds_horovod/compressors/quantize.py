"""A few levels an element, evenly spaced up to a scale of its block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..kernels.formats import QuantizeFormat, align
from ..layout import Layout
from .base import FusedCompressor

_BITS = (2, 3, 4, 8)
_ROUNDINGS = ("nearest", "stochastic")
_SCALES = ("absmax", "l2")
_TERNARY_BITS = 0  # base 3


@dataclass(frozen=True)
class _Levels(FusedCompressor):
    """What `Quantize` and `Ternary` share."""

    family = "quantize"

    def _check(self, block: object, rounding: str, scale: str, seed: object) -> None:
        name = type(self).__name__
        if not isinstance(block, int) or block <= 0 or block % 32:
            raise ValueError(f"{name}: block must be a positive multiple of 32, got {block!r}")
        if rounding not in _ROUNDINGS:
            raise ValueError(f"{name}: rounding must be one of {', '.join(_ROUNDINGS)}, got {rounding!r}")
        if scale not in _SCALES:
            raise ValueError(f"{name}: scale must be one of {', '.join(_SCALES)}, got {scale!r}")
        if scale == "l2" and rounding != "stochastic":
            raise ValueError(f'{name}: scale="l2" needs rounding="stochastic": nearly all would be nearest to zero')
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"{name}: seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")

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
        "absmax": the largest magnitude. "l2": the norm of the block, as in QSGD, with stochastic rounding only.
    seed
        Selects the random numbers: the same seed and gradients give the same payloads.

    Raises
    ------
    ValueError
        An option out of range.
    """

    bits: int = 4
    block: int = 256
    rounding: str = "nearest"
    scale: str = "absmax"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"Quantize: bits must be one of {', '.join(map(str, _BITS))}, got {self.bits!r}")
        self._check(self.block, self.rounding, self.scale, self.seed)

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """With 2 bits, half of the range becomes zero; with more bits, nearly every element is sent."""
        return self.bits == 2


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
    rounding: str = "nearest"
    scale: str = "absmax"
    seed: int = 0
    sparse = True

    def __post_init__(self) -> None:
        self._check(self.block, self.rounding, self.scale, self.seed)


@lru_cache(maxsize=1024)
def _format(compressor: Quantize | Ternary, layout: Layout) -> QuantizeFormat:
    bits = compressor.bits if isinstance(compressor, Quantize) else _TERNARY_BITS
    blocks = layout.shard_numel // compressor.block
    codes_at = align(4 * blocks)
    levels = 2 ** (bits - 1) - 1 if bits else 1
    stochastic, l2 = compressor.rounding == "stochastic", compressor.scale == "l2"
    format = QuantizeFormat(compressor.block, bits, levels, stochastic, l2, codes_at, 0, compressor.seed)
    return format._replace(nbytes=align(codes_at + blocks * format.block_nbytes))
