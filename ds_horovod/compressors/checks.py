"""What the options of compressors are checked with. An error names the option, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np


def is_whole(value: object) -> bool:
    """Whether a value is an integer, NumPy's too; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def set_option(compressor: Any, option: str, value: object) -> None:
    """Of a frozen dataclass."""
    object.__setattr__(compressor, option, value)


def check_block(compressor: Any) -> None:
    """Makes ``block`` a plain integer."""
    block = compressor.block
    if not is_whole(block) or block <= 0 or block % 32:
        raise _error(compressor, "block must be a positive multiple of 32", block)
    set_option(compressor, "block", int(block))


def check_seed(compressor: Any) -> None:
    """Makes ``seed`` a plain integer."""
    if not is_whole(compressor.seed) or not 0 <= compressor.seed < 2**64:
        raise _error(compressor, "seed must be a whole number from 0 to 2**64 - 1", compressor.seed)
    set_option(compressor, "seed", int(compressor.seed))


def check_name(compressor: Any, option: str, names: Any) -> None:
    """One of the names of a ``Literal`` type."""
    value = getattr(compressor, option)
    if not isinstance(value, str) or value not in get_args(names):
        raise _error(compressor, f"{option} must be one of {', '.join(get_args(names))}", value)


def check_number(compressor: Any, option: str, numbers: Sequence[int]) -> None:
    """One of some whole numbers, as a plain integer."""
    value = getattr(compressor, option)
    if not is_whole(value) or value not in numbers:
        raise _error(compressor, f"{option} must be one of {', '.join(map(str, numbers))}", value)
    set_option(compressor, option, int(value))


def share(compressor: Any, ratio: object) -> float:
    """A ratio. No integer is one: 1 may be meant as 1 %, as one element, or as all."""
    if isinstance(ratio, bool | np.bool_ | Integral) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        error = _error(compressor, "ratio must be over 0 and at most 1", ratio)
        raise ValueError(f"{error}: a share, 0.01 for 1 % and 1.0 for all")
    return float(ratio)


def _error(compressor: Any, what: str, value: object) -> ValueError:
    return ValueError(f"{type(compressor).__name__}: {what}, got {value!r}")
