"""Which GradScaler, if any, has scaled the loss of the backward that runs now."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class _Backward:
    """A backward that has reached a scaled loss. Autograd alone holds it, and so forgets it where the backward fails, too."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    def end(self) -> None:
        self.scaler = None


_latest: weakref.ref[_Backward] | None = None
"""The last backward that has reached a scaled loss."""


@functools.cache
def watch_scalers() -> None:
    """Extends torch's GradScaler, at the first call, so that `active_scaler` knows."""
    scaler: Any = torch.amp.GradScaler
    scaler.scale = _scale(scaler.scale)


def active_scaler() -> Any:
    """The GradScaler whose ``scale(loss).backward()`` runs now; None where the loss is not scaled, or not with `scale`."""
    backward = None if _latest is None else _latest()
    return None if backward is None else backward.scaler


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if self.is_enabled():
            _mark(self, scaled)
        return scaled

    return scale


def _mark(scaler: Any, scaled: Any) -> None:
    if not isinstance(scaled, Tensor):
        for part in scaled:
            _mark(scaler, part)
    elif scaled.requires_grad:
        scaled.register_hook(lambda gradient: _begin(scaler))


def _begin(scaler: Any) -> None:
    """Is called where a backward reaches a scaled loss, which is where it begins."""
    global _latest
    backward = _Backward(scaler)
    _latest = weakref.ref(backward)
    Variable._execution_engine.queue_callback(backward.end)
