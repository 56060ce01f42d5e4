"""In what units errors and velocities are kept, and what is to be done when those change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


class Change(NamedTuple):
    """By what to multiply what is kept."""

    scale: float
    """Of errors and velocities: the loss scale, new over old."""
    rates: Mapping[str, float]
    """Of the errors of a parameter, by name: its learning rate, old over new. None for those that have kept theirs."""


def rescaled(array: Tensor, factor: float, largest: float = LARGEST / 4) -> Tensor:
    """Multiplies an array in place; what grows ends at a limit.

    An infinite error would never go away, where the loss scale grew too far or the learning rate fell to next to nothing.
    """
    array.mul_(min(factor, LARGEST))  # zero times infinity would be NaN
    return array.clamp_(-largest, largest) if factor > 1 else array


class Units:
    """Gradients, and so errors and velocities, are in units of the loss scale; with `lr_aware` errors follow the learning rate.

    An error is added to a later gradient. Where the loss scale has changed from s to s' meanwhile, it is multiplied by
    s' / s, which is exact, since both are powers of two, as `torch.amp.GradScaler` has them by default. Where the learning
    rate has changed from a to a', an error is worth what it was worth when multiplied by a / a' (Zheng et al. 2019,
    arXiv 1905.10936).

    Parameters
    ----------
    grad_scaler
        A ``torch.amp.GradScaler`` or anything with ``get_scale()``. None: gradients are not scaled.
    lr_aware
        Whether errors follow the learning rate.
    """

    def __init__(self, grad_scaler: Any = None, lr_aware: bool = False) -> None:
        self.grad_scaler = grad_scaler
        self.given = grad_scaler
        """The scaler of losses that none has been seen to scale: the user's, or one that has touched the optimizer."""
        self.skips_elsewhere = False
        """Whether other ranks have a scaler."""
        self.lr_aware = lr_aware
        self.scale = 1.0
        """The loss scale of what is kept."""
        self._rates: dict[str, float] = {}

    @property
    def may_skip(self) -> bool:
        """Whether a scaler skips the steps in which a gradient is not finite."""
        own = self.grad_scaler is not None and getattr(self.grad_scaler, "is_enabled", lambda: True)()
        return own or self.skips_elsewhere

    def adopt(self, scaler: Any) -> None:
        """From now on this scaler scales the loss, if no other one is seen to."""
        self.grad_scaler = self.given = scaler

    def begin_step(self, rates: Mapping[str, float], scale: float | None = None) -> Change | None:
        """Reads the loss scale, at the beginning of a step.

        Parameters
        ----------
        rates
            The learning rate of each parameter, by name. One that is not positive and finite leaves the last.
        scale
            The loss scale. None: as the scaler says, and as it was where there is none.

        Returns
        -------
        Change or None
            None where nothing has changed.
        """
        if scale is None:
            scale = self.scale if self.grad_scaler is None else float(self.grad_scaler.get_scale())
        scale = scale if 0 < scale < math.inf else self.scale
        of_scale = scale / self.scale
        self.scale = scale
        before = self._rates
        if self.lr_aware:
            self._rates = before | {name: float(rate) for name, rate in rates.items() if 0 < rate < math.inf}
        if of_scale == 1.0 and self._rates == before:
            return None
        return Change(of_scale, {n: before[n] / a for n, a in self._rates.items() if n in before and before[n] != a})

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {"scale": self.scale, "learning_rates": dict(self._rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.scale = state["scale"]
        self._rates = dict(state["learning_rates"])
