"""The kernels on GPUs: checks the tensors and launches ``csrc/cuda``. What the functions do stands in `reference`.

Nothing here waits for the device, and nothing needs an answer from it. So payloads that no encoder writes do not raise, as
they do on a CPU: they are decoded to NaN, or to some values, and never read or write out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
from ..memory import Memory
from . import launch
from .formats import CastFormat
from .launch import THREADS, Device, by_value, struct

HOST = False
"""Whether the host may look at results without waiting for them."""

_TILE = 2048  # kTile in csrc/cuda/common.cuh
_QUADS = 4 * THREADS  # elements of a block whose threads take four each
_DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# The twins of the structs in common.cuh.
_LAYOUT = struct(
    [("offset", np.uint64), ("numel", np.uint64), ("tensor_at", np.uint64)]
    + [("tensors", np.int64), ("shards", np.int64), ("shard_numel", np.int64)]
)
_MEMORY = struct(
    [("error", np.uint64), ("velocity", np.uint64), ("total", np.uint64), ("momentum", np.float32), ("decay", np.float32)]
)
_CAST = struct([("dtype", np.int64), ("chunk_bytes", np.int64)])


class _Tables(NamedTuple):
    """A layout on a device."""

    argument: np.ndarray[Any, Any]
    arrays: Tensor  # what it points to


@lru_cache(maxsize=1024)
def _tables(layout: Layout, device: torch.device) -> _Tables:
    tiles = np.arange(0, max(layout.numel, 1), _TILE)
    tensor_at = np.searchsorted(np.array(layout.offsets, dtype=np.int64), tiles, side="right") - 1
    tensors = len(layout.offsets)
    arrays = np.concatenate([
        np.array(layout.offsets + layout.numels, dtype=np.int64).view(np.uint8),
        tensor_at.clip(0).astype(np.int32).view(np.uint8),
    ])  # fmt: skip
    there = torch.from_numpy(arrays).to(device)
    start = there.data_ptr()
    pointers = start, start + 8 * tensors, start + 16 * tensors
    return _Tables(by_value(_LAYOUT, *pointers, tensors, layout.shards, layout.shard_numel), there)


def prepare(family: str, layout: Layout, device: torch.device) -> None:
    """Compiles a family's kernels and copies a layout to a device, which may wait; passes do not then.

    Raises
    ------
    ImportError, ValueError
        The device cannot be used: why, and what to install.
    """
    launch.device_of(device).kernel(family, _ENCODERS[family])
    _tables(layout, device)


_ENCODERS = {"elements": "cast_encode"}


class _Call:
    """One pass over a layout on a device: its arguments, checked."""

    def __init__(self, family: str, layout: Layout, device: torch.device) -> None:
        self.family, self.layout, self.tensor_device = family, layout, device
        self.device: Device = launch.device_of(device)
        self.tables = _tables(layout, device)
        self._kept: list[Any] = []

    def flat(self, values: Tensor | None, numel: int | None = None) -> int:
        """Where a float32 array is; 0 where there is none."""
        if values is None:
            return 0
        numel = self.layout.numel if numel is None else numel
        self._require_here(values)
        if values.dtype != torch.float32 or values.numel() != numel or not values.is_contiguous():
            raise ValueError(f"expected {numel} contiguous float32 values, got {values.dtype} {tuple(values.shape)}")
        return self._aligned(values, 16)

    def memory(self, memory: Memory, gradients: Sequence[Tensor] | None) -> np.ndarray[Any, Any]:
        if gradients is None and memory.error is None and memory.total is None:
            raise ValueError("nothing to encode")
        if memory.velocity is not None and (gradients is None or memory.error is None):
            raise ValueError("a velocity needs gradients and an error")
        flat = (self.flat(memory.error), self.flat(memory.velocity), self.flat(memory.total))
        return by_value(_MEMORY, *flat, memory.momentum, memory.decay)

    def tensors(self, tensors: Sequence[Tensor] | None) -> np.ndarray[Any, Any]:
        """The tensors of the layout; None: there are none."""
        dtype, addresses = 0, []
        if tensors:
            if tensors[0].dtype not in _DTYPES:
                raise ValueError(f"expected tensors of {', '.join(map(str, _DTYPES))}, got {tensors[0].dtype}")
            dtype = _DTYPES[tensors[0].dtype]
            for tensor, numel in zip(tensors, self.layout.numels, strict=True):
                self._require_here(tensor)
                if tensor.numel() != numel or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
                    raise ValueError(
                        f"expected a contiguous {tensors[0].dtype} tensor of {numel} elements, "
                        f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
                    )
                addresses.append(self._aligned(tensor, tensor.element_size()))
        argument, table = launch.tensors_argument(self.device, dtype, addresses)
        self._kept.append(table)
        return argument

    def payload(self, payload: Tensor, chunks: int, chunk_nbytes: int) -> Any:
        self._require_here(payload)
        if payload.dtype != torch.uint8 or not payload.is_contiguous():
            raise ValueError(f"expected a contiguous uint8 payload, got {payload.dtype} with strides {payload.stride()}")
        if payload.numel() != chunks * chunk_nbytes:
            raise ValueError(f"a payload of {payload.numel()} bytes, expected {chunks} chunks of {chunk_nbytes}: truncated?")
        return np.uint64(self._aligned(payload, 16))

    def launch(self, name: str, elements: int, *args: Any) -> None:
        """Starts a kernel with a row of blocks for each shard; one block takes so many elements."""
        if self.layout.numels:
            blocks = -(-self.layout.shard_numel // elements), self.layout.shards
            launch.launch(self.device, self.family, name, blocks, *args)

    def _require_here(self, tensor: Tensor) -> None:
        if tensor.device != self.tensor_device:
            raise ValueError(f"expected tensors on {self.tensor_device} only, got one on {tensor.device}")

    def _aligned(self, tensor: Tensor, nbytes: int) -> int:
        address = tensor.data_ptr()
        if address % nbytes:
            raise ValueError(f"expected memory aligned to {nbytes} bytes, got {tensor.dtype} at {address:#x}")
        return address


def _workers(call: _Call, pushed: Tensor, chunk_nbytes: int) -> tuple[Any, Any]:
    """One chunk, or a row of them, one a worker."""
    workers = pushed.shape[0] if pushed.dim() == 2 else 1
    return call.payload(pushed, workers, chunk_nbytes), np.int64(workers)


def _total(call: _Call, total: Tensor) -> Any:
    if call.layout.shards != 1:
        raise ValueError(f"a server has one shard, got a layout of {call.layout.shards}")
    return np.uint64(call.flat(total))


# ---- element by element


def _cast(format: CastFormat) -> np.ndarray[Any, Any]:
    return by_value(_CAST, {"fp16": 2, "bf16": 3}[format.dtype], format.nbytes)


def cast_encode(format: CastFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: Memory, chunks: Tensor) -> None:
    call = _Call("elements", layout, chunks.device)
    call.launch(
        "cast_encode", _QUADS, _cast(format), call.tables.argument, call.tensors(gradients), call.memory(memory, gradients),
        call.payload(chunks, layout.shards, format.nbytes),
    )  # fmt: skip


def cast_decode(format: CastFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _Call("elements", layout, chunks.device)
    payload = call.payload(chunks, layout.shards, format.nbytes)
    call.launch("cast_decode", _QUADS, _cast(format), call.tables.argument, payload, call.tensors(gradients))


def cast_accumulate(format: CastFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _Call("elements", layout, chunk.device)
    call.launch(
        "cast_accumulate", _QUADS, _cast(format), call.tables.argument, *_workers(call, chunk, format.nbytes),
        np.float32(weight), _total(call, total),
    )  # fmt: skip


def cast_serve(format: CastFormat, layout: Layout, pushed: Tensor, weight: float, error: Tensor | None, chunk: Tensor) -> None:
    call = _Call("elements", layout, chunk.device)
    call.launch(
        "cast_serve", _QUADS, _cast(format), call.tables.argument, *_workers(call, pushed, format.nbytes),
        np.float32(weight), np.uint64(call.flat(error)), call.payload(chunk, 1, format.nbytes),
    )  # fmt: skip
