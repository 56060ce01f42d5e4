"""What is done to gradients that no exchange takes: momentum, and on one rank clipping too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .units import rescaled


def require_dense(name: str, gradient: Tensor, option: str, value: float) -> None:
    """Raises ValueError for the sparse gradient of a parameter, which an option cannot treat."""
    if gradient.is_sparse:
        raise ValueError(
            f"DoubleSqueeze: {option}={value} needs dense gradients, got a sparse one of {name}; "
            f"make the embedding with sparse=False, or leave {option} out"
        )


def put_rescaled(gradient: Tensor, values: Tensor, factor: float) -> Tensor:
    """gradient = factor * values, rounded to its dtype; what is finite stays finite. Returns the gradient."""
    largest = torch.finfo(gradient.dtype).max
    scaled = values.to(torch.promote_types(values.dtype, torch.float32)) * factor
    return gradient.copy_(torch.where(values.isfinite(), scaled.clamp(-largest, largest), values))


def clip(gradients: Sequence[tuple[str, Tensor]], max_norm: float) -> None:
    """Scales gradients so that their l2 norm, over all of them, is `max_norm` at most; where it is not finite, not at all.

    Parameters
    ----------
    gradients
        By name, scaled in place.

    Raises
    ------
    ValueError
        A sparse gradient.
    """
    for name, gradient in gradients:
        require_dense(name, gradient, "max_norm", max_norm)
    if not gradients:
        return
    home = gradients[0][1].device
    norm = _norm(gradients, None if home.type == "cpu" else torch.float64)
    if home.type == "cpu" and norm.isinf():  # a square may have overflowed, of values that are far from that
        norm = _norm(gradients, torch.float64)
    if home.type != "cpu":  # nobody waits for the norm
        factor = torch.where((norm > max_norm) & norm.isfinite(), max_norm / norm, 1.0)
        for _, gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
    elif max_norm < float(norm) < math.inf:
        for _, gradient in gradients:
            gradient.mul_(max_norm / float(norm))


def _norm(gradients: Sequence[tuple[str, Tensor]], dtype: torch.dtype | None) -> Tensor:
    norms = [torch.linalg.vector_norm(g, dtype=dtype) for _, g in gradients]
    home = gradients[0][1].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(home, dtype or torch.float32) for norm in norms]))
    return norm


def warn_of_two_momenta(momentum: float, groups: Sequence[Mapping[str, Any]], stacklevel: int) -> None:
    """Momentum correction takes the place of the optimizer's own: warns where that is on too, `stacklevel` calls above."""
    for group in groups:
        beta1 = group["betas"][0] if "betas" in group else 0.0
        own = "momentum=0" if group.get("momentum") else "betas=(0.0, ...)" if beta1 else None
        if own:
            warnings.warn(
                f"DoubleSqueeze: momentum={momentum} is on, and the optimizer's own too "
                f"({group.get('momentum') or beta1}): gradients would be averaged twice. Give the optimizer {own}.",
                stacklevel=stacklevel + 1,
            )
            return


class Velocities:
    """Momentum of the parameters that momentum correction does not reach, in place of the optimizer's own, which is off.

    u = m * u + g, g being the averaged gradient, which is the same on all ranks, and so is u. A parameter has as much momentum
    then whether it is compressed or not, and whether there are several ranks or one.

    Parameters
    ----------
    momentum
        m, in [0, 1). With 0 nothing is done.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._of: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """gradient = the velocity u of a parameter, after u = m * u + gradient. Where it is not finite, both stay as they are.

        Raises
        ------
        ValueError
            A sparse gradient: its velocity would be dense.
        """
        if not self._momentum:
            return
        require_dense(name, gradient, "momentum", self._momentum)
        u = self._of.get(name)
        if u is None:
            u = self._of[name] = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        finite, largest, of_gradient = gradient.isfinite(), torch.finfo(u.dtype).max, torch.finfo(gradient.dtype).max
        # An infinite velocity would never go away.
        u.copy_(torch.where(finite, (u * self._momentum + gradient).clamp_(-largest, largest), u))
        gradient.copy_(torch.where(finite, u.clamp(-of_gradient, of_gradient), gradient))

    def rescale(self, factor: float) -> None:
        """Multiplies all of them, because gradients are in other units from now on."""
        for velocity in self._of.values():
            rescaled(velocity, factor)

    def state_dict(self) -> dict[str, Tensor]:
        """By name, not copied."""
        return dict(self._of)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self._of = {name: velocity.clone() for name, velocity in state.items()}
