"""Whether ranks hold the same bits: 64-bit checksums of tensors, the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 2**18  # elements: temporaries have the size of a chunk, not that of the tensor
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF_PLACES, _OF_CHUNKS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # large and odd


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A checksum of each tensor, by name. It depends on the place of an element too, and on a single one always."""
    result = {}
    for name, tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        result[name] = f"{_checksum(tensor.detach(), _weights(tensor.device)):016x}"
    return result


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One checksum of all tensors and their names."""
    return hashlib.sha256(repr(sorted(checksums(tensors).items())).encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """One for each place in a chunk, as if at random; odd, so that modulo 2**64 they multiply no difference away."""
    places = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * _OF_PLACES
    return ((places ^ (places >> 29)) * _OF_CHUNKS) | 1


def _checksum(tensor: Tensor, weights: Tensor) -> int:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in real.reshape(-1).view(_INTEGERS[real.element_size()]).split(_CHUNK):
        total = total * _OF_CHUNKS + (chunk * weights[: len(chunk)]).sum()
    return int(total) % 2**64
