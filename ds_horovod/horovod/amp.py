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
            _adopt(scaler, reducer, exchanged=not optimizer._double_squeeze_open)
        else:  # without backward on this rank, the step begins in synchronize
            reducer.units.adopt(scaler)
    if optimizer._should_synchronize:
        optimizer.synchronize()


def _adopt(scaler: Any, reducer: Reducer, exchanged: bool) -> None:
    """The reducer learns, in mid-step, which scaler scales a loss that was not scaled by its ``scale``.

    Parameters
    ----------
    scaler
        A ``torch.amp.GradScaler``.
    reducer
        Of the optimizer.
    exchanged
        Whether the gradients of this step have been exchanged already.

    Raises
    ------
    RuntimeError
        Gradients of this scale have been added to errors of another one.
    """
    units, session, scale = reducer.units, reducer.session, float(scaler.get_scale())
    if session is not None and scale != units.scale and (session.step > 1 if exchanged else not session.held):
        raise RuntimeError(
            f"DoubleSqueeze: a GradScaler scales the loss by {scale:g}, but the errors are those of gradients scaled by "
            f"{units.scale:g}, and gradients of this step have been added to them. Scale the loss with scaler.scale(loss)"
        )
    units.adopt(scaler)
    if not exchanged:
        reducer.begin_step({})
        return
    units.scale = scale  # of all that has been exchanged, since that was the first step
    gradients = [reducer.gradient_of(p) for _, p in reducer.parameters]
    if session is not None and not all(bool(g.isfinite().all()) for g in gradients if g is not None):
        session.import_residual({}, session.step, alike=True)  # the step will be skipped, and before it there was nothing
        reducer.velocities.load_state_dict({})
