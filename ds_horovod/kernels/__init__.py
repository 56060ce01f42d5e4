"""Fused passes over a bucket: `backend` states what they are, `cpu` and `cuda` provide them.

Where a layout or a compressor has none, `fallback` has them in plain torch.
"""

from __future__ import annotations

import torch

from . import cpu, cuda
from .backend import Backend, Passes

__all__ = ["Backend", "Passes", "for_device", "passes"]


def for_device(device: torch.device) -> Backend:
    """The kernels for tensors on this device.

    Raises
    ------
    ValueError
        There are none.
    """
    if device.type == "cpu":
        return cpu
    if device.type == "cuda":
        return cuda
    raise ValueError(f"DoubleSqueeze has no kernels for tensors on {device}; it supports cpu and cuda")


def passes(family: str, device: torch.device) -> Passes:
    """The passes of a family on this device.

    Raises
    ------
    ValueError
        There are no kernels for the device.
    """
    return for_device(device).FAMILIES[family]
