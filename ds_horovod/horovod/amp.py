"""Mixed precision as torch's tutorials write it: a GradScaler that touches an optimizer whose gradients are under way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..reducer import Reducer
from .hook import are_averaged, reducer_of_optimizer


def install() -> None:
    """Extends torch's GradScaler for optimizers with a DoubleSqueeze; to be called once."""
    scaler: Any = torch.amp.GradScaler
    scaler.unscale_ = _unscale_(scaler.unscale_)
    scaler.step = _step(scaler.step)


def _unscale_(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def unscale_(self: Any, optimizer: Any) -> None:
        reducer = reducer_of_optimizer(optimizer)
        if reducer is not None and self.is_enabled():
            _synchronize(self, optimizer, reducer)
        return original(self, optimizer)

    return unscale_


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        reducer = reducer_of_optimizer(optimizer)
        if reducer is None or not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        if self._per_optimizer_states[id(optimizer)]["stage"].name == "READY":  # unscale_ has not synchronized
            _synchronize(self, optimizer, reducer)
        with optimizer.skip_synchronize():
            result = original(self, optimizer, *args, **kwargs)
        optimizer._synchronized = False  # the step is over, whether it was taken or skipped
        return result

    return step


def _synchronize(scaler: Any, optimizer: Any, reducer: Reducer) -> None:
    """Averages the gradients before they are unscaled, unless that is done. Errors follow this scaler from now on."""
    if reducer.units.grad_scaler is not scaler:
        if optimizer._double_squeeze_open or are_averaged(optimizer):
            reducer.adopt_scaler(scaler, exchanged=not optimizer._double_squeeze_open)
        else:  # without backward on this rank, the step begins in synchronize
            reducer.units.adopt(scaler)
    if optimizer._should_synchronize:
        optimizer.synchronize()
