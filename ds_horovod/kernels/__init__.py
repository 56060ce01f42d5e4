"""Fused passes over a bucket, one module a device, all with the functions of `reference`.

The worker pass is `*_encode` with gradients, the server pass is `*_accumulate` for every worker and then `*_encode` of
the error alone, or both at once in `*_serve`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, cuda


def for_device(device: torch.device) -> ModuleType:
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
