"""What a user may choose: every option once, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from .compressors import Compressor, Quantize
from .compressors.checks import is_whole

Choice = Compressor | bool | None
Choose = Mapping[str, Choice] | Callable[[str, Tensor], Choice]

MOST_STALE = 4
"""Steps by which an aggregated gradient may come late."""
_BY_DEFAULT = Quantize(bits=4)


@dataclass(frozen=True, repr=False)
class Options:
    """The arguments of `DoubleSqueeze`, which documents them. Each exchange holds them, with the compressors of its bucket.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong type or out of range: its name, its value and what is allowed.
    """

    compressor: Compressor = _BY_DEFAULT
    _: KW_ONLY
    server_compressor: Compressor | None = None
    worker_error: bool = True
    server_error: bool = True
    momentum: float = 0.0
    warmup_steps: int = 0
    max_norm: float | None = None
    grad_scaler: Any = None
    lr_aware: bool = False
    staleness: int = 0
    sync_steps: int = 0
    model: nn.Module | None = None
    server: int | None = None
    hierarchical: bool | None = None
    bucket_cap_mb: float | None = 25.0
    min_numel: int = 4096
    choose: Choose | None = None

    def __post_init__(self) -> None:
        if self.compressor is None:
            object.__setattr__(self, "compressor", _BY_DEFAULT)
        for name in ("worker_error", "server_error", "lr_aware"):
            self._check(name, bool, "must be True or False,", lambda value: True)
        self._check("hierarchical", bool, "must be True, False or None,", lambda value: True)
        self._check("momentum", float, "must be at least 0 and under 1,", lambda value: 0 <= value < 1)
        self._check("warmup_steps", int, "must be a whole number, 0 or more;", lambda value: value >= 0)
        self._check("staleness", int, f"must be a whole number from 0 to {MOST_STALE},", lambda value: 0 <= value <= MOST_STALE)
        self._check("sync_steps", int, "must be a whole number, 0 or more;", lambda value: value >= 0)
        self._check("max_norm", float, "must be positive and finite, or None;", lambda value: 0 < value < math.inf)
        self._check("server", int, "must be a rank, or None for all ranks;", lambda value: value >= 0)
        self._check("bucket_cap_mb", float, "must be positive, or None for one bucket;", lambda value: value > 0)
        self._check("min_numel", int, "must be a positive whole number,", lambda value: value >= 1)
        self.require_compressor("compressor", self.compressor)
        if self.server_compressor is not None:
            require_compressor("server_compressor", self.server_compressor)
            if self.server_error:
                require_contraction("server_compressor", self.server_compressor, "server_error")
        self._check_choose()
        if self.grad_scaler is not None and not callable(getattr(self.grad_scaler, "get_scale", None)):
            raise TypeError(f"DoubleSqueeze: grad_scaler must be a torch.amp.GradScaler, got {self.grad_scaler!r}")
        if self.momentum and not self.worker_error:
            raise ValueError(f"DoubleSqueeze: momentum={self.momentum!r} needs worker_error=True, got {self.worker_error!r}")
        if self.staleness and not self.worker_error:  # what is under way goes back into it, so that nothing is ever lost
            raise ValueError(f"DoubleSqueeze: staleness={self.staleness!r} needs worker_error=True, got {self.worker_error!r}")
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"DoubleSqueeze: model must be a torch.nn.Module, or None; got {self.model!r}")
        if self.model is not None and not self.staleness:
            raise ValueError(f"DoubleSqueeze: model= needs staleness, from 1 to {MOST_STALE}; got 0")
        if self.sync_steps and not self.staleness:
            raise ValueError(f"DoubleSqueeze: sync_steps={self.sync_steps!r} needs staleness, from 1 to {MOST_STALE}; got 0")

    def _check(self, name: str, kind: type, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
        """Makes an option a plain value of its kind."""
        value = getattr(self, name)
        if value is None and name in ("max_norm", "server", "hierarchical", "bucket_cap_mb"):
            return
        kinds = {bool: (bool, np.bool_), int: (Integral,), float: (Real,)}[kind]
        if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool | np.bool_)) or not is_allowed(value):
            raise ValueError(f"DoubleSqueeze: {name} {allowed} got {value!r}")
        object.__setattr__(self, name, kind(value))

    def _check_choose(self) -> None:
        if self.choose is not None and not isinstance(self.choose, Mapping) and not callable(self.choose):
            raise TypeError(f"DoubleSqueeze: choose must map patterns to choices, or be a function; got {self.choose!r}")
        for pattern, choice in self.choose.items() if isinstance(self.choose, Mapping) else ():
            if not isinstance(pattern, str):
                raise TypeError(f"DoubleSqueeze: choose must have patterns of names, got {pattern!r}")
            if choice is not None and not isinstance(choice, bool):
                self.require_compressor(f"choose[{pattern!r}]", choice)

    def require_compressor(self, option: str, value: Any) -> None:
        """Raises TypeError or ValueError unless a value can be what workers push with, and servers reply with if need be."""
        require_compressor(option, value, self.momentum)
        if self.worker_error:
            require_contraction(option, value, "worker_error")
        if self.server_error and self.server_compressor is None:
            require_contraction(option, value, "server_error")

    @property
    def reply_compressor(self) -> Compressor:
        """The compressor of the replies."""
        return self.compressor if self.server_compressor is None else self.server_compressor

    def __repr__(self) -> str:
        """The call that makes them, with only what differs from the defaults."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        shown = {"model": type(self.model).__name__}
        arguments = [repr(value) if name == "compressor" else f"{name}={shown.get(name, repr(value))}" for name, value in given]
        return f"DoubleSqueeze({', '.join(arguments)})"

    def description(self) -> dict[str, Any]:
        """What ranks compare, as plain values. Choices are compared parameter by parameter, since functions have no value."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("choose", "grad_scaler", "model")}
        return plain | {"compressor": repr(self.compressor), "server_compressor": repr(self.reply_compressor)}


def require_compressor(option: str, value: Any, momentum: float = 0.0) -> None:
    """Raises TypeError or ValueError unless an option is a compressor, and under momentum one that leaves elements out."""
    if not isinstance(value, Compressor):
        hint = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
        raise TypeError(f"DoubleSqueeze: {option} must be a ds_horovod Compressor, got {value!r}{hint}")
    if not is_whole(value.block) or value.block <= 0 or value.block % 32:
        raise ValueError(f"DoubleSqueeze: {option}.block must be a positive multiple of 32, got {value.block!r}")
    if momentum and not value.sparse:
        raise ValueError(
            f"DoubleSqueeze: momentum={momentum!r} needs a compressor that leaves elements out, as TopK does; "
            f"{value!r} sends all of them, so leave the momentum to the optimizer"
        )


def require_contraction(option: str, value: Compressor, error: str) -> None:
    """Raises ValueError if what a compressor leaves would grow without bound in an error."""
    if not value.contracts:
        raise ValueError(
            f"DoubleSqueeze: {option} must be a contraction where an error is kept, and {value!r} is none: the error would "
            f'grow without bound. Pass {error}=False, or use scale="absmax", more bits or smaller blocks'
        )
