"""The kernels on GPUs: checks the tensors and launches ``csrc/cuda``.

Nothing here waits for the device, and no pass needs an answer from it. So payloads that no encoder writes do not raise, as they
do on a CPU: they are decoded to NaN, or to some values, and nothing is read or written out of bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout
from . import launch as launching
from .backend import Passes
from .formats import RUN, CastFormat, OneBitFormat, QuantizeFormat, RandomKFormat, TopKFormat
from .launch import THREADS, by_value, struct

_Format = TypeVar("_Format", OneBitFormat, QuantizeFormat, CastFormat, RandomKFormat, TopKFormat)
_Argument: TypeAlias = np.ndarray[Any, Any]

_ROW = 32  # kRow in csrc/cuda/common.cuh, and so on
_TILE = 2048
_WARPS = THREADS // 32
_QUADS = 4 * THREADS  # elements of a block of threads that take four each
_ROWS = _ROW * THREADS
_DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_TRAVELLING = {"fp32": 1, "fp16": 2, "bf16": 3}

# The twins of the structs in csrc/cuda.
_LAYOUT = struct(
    ("offset", np.uint64), ("numel", np.uint64), ("tensor_at", np.uint64),
    ("tensors", np.int64), ("shards", np.int64), ("shard_numel", np.int64),
)  # fmt: skip
_FEEDBACK_STATE = struct(
    ("error", np.uint64), ("velocity", np.uint64), ("total", np.uint64), ("momentum", np.float32)
)  # fmt: skip
_PHILOX = struct(("key", np.uint32, (2,)), ("counter", np.uint32, (3,)))
_ONE_BIT = struct(*((name, np.int64) for name in ("block", "l2", "granularity", "team", "bits_at", "chunk_bytes")))
_REGIONS = struct(("first_block", np.uint64), ("first_tensor", np.uint64), ("region", np.uint64))
_QUANTIZE = struct(
    ("codes_at", np.int64), ("chunk_bytes", np.int64),
    ("block", np.int32), ("columns", np.int32), ("block_bytes", np.int32), ("team", np.int32),
)  # fmt: skip
_CAST = struct(("dtype", np.int64), ("chunk_bytes", np.int64))
_RANDOM_K = struct(("k", np.int64), ("half", np.int64), ("chunk_bytes", np.int64), ("key", np.uint32, (2,)))
_HEADER = struct(*((name, np.uint32) for name in ("step", "bucket", "shard", "k")))
_TOP_K = struct(
    *((name, np.int64) for name in ("k", "values", "low_bits", "scales_at", "upper_at", "low_at", "values_at", "chunk_bytes"))
)
_TOP_K_WORDS = {  # uint32 words of each part of the struct Work, for each of what
    "shards": 9, "coarse": 2048, "fine": 8192,
    "tiles": 3, "runs": 7, "positions": 1, "values": 1, "not_finite": 1, "sorted_offsets": 1, "sorted_values": 1,
}  # fmt: skip
_TOP_K_WORK = struct(("elements", np.uint64), *((name, np.uint64) for name in _TOP_K_WORDS), ("capacity", np.int64))


# ---- what is on a device for as long as a layout is used


class _Table(NamedTuple):
    """Arrays that a struct points to, and the struct."""

    argument: _Argument
    arrays: Tensor


def _upload(device: torch.device, *arrays: Any) -> tuple[Tensor, list[int]]:
    """Arrays of whole numbers on the device, and where each begins. Waits, so that every stream may use them."""
    parts = [np.asarray(array, dtype=np.int64) for array in arrays]
    there = torch.from_numpy(np.concatenate(parts)).to(device)
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    return there, [there.data_ptr() + 8 * int(start) for start in starts]


@lru_cache(maxsize=1024)
def _layout(layout: Layout, device: torch.device) -> _Table:
    if layout.shard_numel >= 2**32:
        raise ValueError(f"a shard of {layout.shard_numel} elements; kernels take fewer than {2**32}")
    tiles = np.arange(0, max(layout.numel, 1), _TILE)
    tensor_at = np.searchsorted(np.array(layout.offsets, dtype=np.int64), tiles, side="right") - 1
    tensor_at = np.resize(tensor_at.clip(0).astype(np.int32), len(tiles) + len(tiles) % 2).view(np.int64)
    arrays, starts = _upload(device, layout.offsets, layout.numels, tensor_at)
    return _Table(by_value(_LAYOUT, *starts, len(layout.offsets), layout.shards, layout.shard_numel), arrays)


class _Regions(NamedTuple):
    """Which blocks share a scale, where that is not one alone."""

    argument: _Argument
    arrays: Tensor
    blocks: int
    regions: int


@lru_cache(maxsize=1024)
def _regions(block: int, granularity: str, layout: Layout, device: torch.device) -> _Regions:
    if granularity == "block":
        return _Regions(by_value(_REGIONS, 0, 0, 0), torch.empty(0, dtype=torch.int64), 0, 0)
    blocks = [-(-numel // block) for numel in layout.numels]
    first_block = np.cumsum([0, *blocks])
    first_tensor = [pieces[0].tensor if pieces else 0 for pieces in layout.pieces]
    regions: list[list[int]] = []
    for shard, pieces in enumerate(layout.pieces):
        for slot, piece in enumerate(pieces):
            first, here = int(first_block[piece.tensor]) + piece.first // block, -(-piece.numel // block)
            if granularity == "bucket" and slot:  # one region for all of the shard
                regions[-1][1] += here
                regions[-1][2] += piece.numel
            else:
                regions.append([first, here, piece.numel, shard, slot])
    arrays, starts = _upload(device, first_block, first_tensor, np.array(regions).reshape(-1))
    return _Regions(by_value(_REGIONS, *starts), arrays, int(first_block[-1]), len(regions))


class _Kernels(NamedTuple):
    """How the kernels of a format are found and launched."""

    source: str  # csrc/cuda/<source>.cu
    prefix: str  # of the kernels' names
    options: tuple[str, ...]
    argument: _Argument  # the format, which is their first one
    block: int  # elements: tensors start on multiples
    encodes: int  # elements that a block of threads encodes
    decodes: int  # and that it decodes


def _team(elements: int) -> int:
    """Warps that share so many elements, 8 a thread, as far as there are warps."""
    team = 1
    while team < _WARPS and 8 * 32 * team < elements:
        team *= 2
    return team


# ---- one pass


class _Call:
    """A pass over a layout on a device: its arguments, checked."""

    def __init__(self, kernels: _Kernels, nbytes: int, layout: Layout, where: torch.device) -> None:
        self.kernels, self.nbytes, self.layout, self.where = kernels, nbytes, layout, where
        self.device = launching.device_of(where)
        block = kernels.block
        if layout.shard_numel % block or any(offset % block for offset in layout.offsets) or block >= 2**31:
            raise ValueError(f"tensors and shards must start on blocks of {block} elements")
        self.common: tuple[Any, ...] = (kernels.argument, _layout(layout, where).argument)
        self._kept: list[Tensor | None] = []

    def kernel(self, name: str) -> launching.Kernel:
        return self.device.kernel(self.kernels.source, f"{self.kernels.prefix}_{name}", self.kernels.options)

    def launch(self, name: str, per_block: int, *args: Any, things: int | None = None) -> None:
        """Starts a kernel with a row of blocks for each shard; a block takes so many elements, or things, of the shard."""
        if self.layout.numels:
            things = self.layout.shard_numel if things is None else things
            launching.launch(self.device, self.kernel(name), (-(-things // per_block), self.layout.shards), *self.common, *args)

    def flat(self, values: Tensor | None) -> Any:
        """Where a float32 array of the layout is; 0 where there is none."""
        if values is None:
            return np.uint64(0)
        self._require_here(values)
        if values.dtype != torch.float32 or values.numel() != self.layout.numel or not values.is_contiguous():
            raise ValueError(
                f"expected {self.layout.numel} contiguous float32 values, got {values.dtype} {tuple(values.shape)} "
                f"with strides {values.stride()}"
            )
        return np.uint64(self._aligned(values, 16))

    def state(self, state: FeedbackState, gradients: Sequence[Tensor] | None) -> _Argument:
        if gradients is None and state.error is None and state.total is None:
            raise ValueError("nothing to encode")
        if state.velocity is not None and (gradients is None or state.error is None):
            raise ValueError("a velocity needs gradients and an error")
        flat = (self.flat(state.error), self.flat(state.velocity), self.flat(state.total))
        return by_value(_FEEDBACK_STATE, *flat, state.momentum)

    def tensors(self, tensors: Sequence[Tensor] | None) -> _Argument:
        """The tensors of the layout; None: there are none."""
        dtype, addresses = 0, []
        if tensors:
            dtype = _DTYPES.get(tensors[0].dtype, 0)
            if not dtype:
                raise ValueError(f"expected tensors of {', '.join(map(str, _DTYPES))}, got {tensors[0].dtype}")
            for tensor, numel in zip(tensors, self.layout.numels, strict=True):
                self._require_here(tensor)
                if tensor.numel() != numel or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
                    raise ValueError(
                        f"expected a contiguous {tensors[0].dtype} tensor of {numel} elements, "
                        f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
                    )
                addresses.append(self._aligned(tensor, tensor.element_size()))
        argument, table = launching.tensors_argument(self.device, dtype, addresses)
        self._kept.append(table)
        return argument

    def payload(self, payload: Tensor, chunks: int) -> Any:
        self._require_here(payload)
        if payload.dtype != torch.uint8 or not payload.is_contiguous():
            raise ValueError(f"expected a contiguous uint8 payload, got {payload.dtype} with strides {payload.stride()}")
        rows, width = payload.shape if payload.dim() == 2 else (1, payload.numel())
        if (rows, width) != (chunks, self.nbytes):  # as many bytes in other rows would count as other workers
            raise ValueError(f"a payload of {tuple(payload.shape)} bytes, expected ({chunks}, {self.nbytes}): truncated?")
        return np.uint64(self._aligned(payload, 16))

    def pushed(self, pushed: Tensor, weight: float) -> tuple[Any, Any, Any]:
        """One chunk, or a row of them, one a worker, and what they count."""
        if self.layout.shards != 1:
            raise ValueError(f"a server has one shard, got a layout of {self.layout.shards}")
        workers = pushed.shape[0] if pushed.dim() == 2 else 1
        return self.payload(pushed, workers), np.int64(workers), np.float32(weight)

    def mask(self, mask: Tensor) -> Any:
        self._require_here(mask)
        if mask.dtype != torch.int32 or mask.numel() * _ROW != self.layout.numel or not mask.is_contiguous():
            raise ValueError(f"expected {self.layout.numel // _ROW} words of bits, got {mask.dtype} {tuple(mask.shape)}")
        return np.uint64(self._aligned(mask, 4))

    def _require_here(self, tensor: Tensor) -> None:
        if tensor.device != self.where:
            raise ValueError(f"expected tensors on {self.where} only, got one on {tensor.device}")

    def _aligned(self, tensor: Tensor, nbytes: int) -> int:
        address = tensor.data_ptr()
        if address % nbytes:
            raise ValueError(f"expected memory aligned to {nbytes} bytes, got {tensor.dtype} at {address:#x}")
        return address


# ---- the families


class _Family(ABC, Generic[_Format]):
    """The passes of a family, as `backend.Passes` says."""

    @abstractmethod
    def kernels(self, format: _Format) -> _Kernels:
        """Those of a format."""

    def call(self, format: _Format, layout: Layout, where: torch.device) -> _Call:
        return _Call(_kernels(self, format), format.nbytes, layout, where)

    def prepare(self, format: _Format, layout: Layout, device: torch.device) -> None:
        """Compiles a format's kernels and copies a layout to a device. That may wait; passes do not then.

        Raises
        ------
        ImportError, ValueError
            The device cannot be used: why, and what to install.
        """
        self.call(format, layout, device).kernel("nonfinite_mask")

    def encode(
        self, format: _Format, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        call = self.call(format, layout, chunks.device)
        tensors, kept, payload = call.tensors(gradients), call.state(state, gradients), call.payload(chunks, layout.shards)
        call.launch("encode", call.kernels.encodes, tensors, kept, *self.drawn(format, state), payload)

    def drawn(self, format: _Format, state: FeedbackState) -> tuple[_Argument, ...]:
        """The argument that says which random numbers are drawn, if any."""
        return ()

    def decode(self, format: _Format, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        call = self.call(format, layout, chunks.device)
        call.launch("decode", call.kernels.decodes, call.payload(chunks, layout.shards), call.tensors(gradients))

    def accumulate(self, format: _Format, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        call = self.call(format, layout, pushed.device)
        call.launch("accumulate", call.kernels.decodes, *call.pushed(pushed, weight), call.flat(total))

    def is_within(self, format: _Format, layout: Layout, chunks: Tensor, limit: float) -> bool:
        """The host does not wait to know."""
        return False

    def serve(
        self, format: _Format, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> bool:
        call = self.call(format, layout, chunk.device)
        workers, error, payload = call.pushed(pushed, weight), call.flat(state.error), call.payload(chunk, 1)
        call.launch("serve", call.kernels.encodes, *workers, error, *self.drawn(format, state), payload)
        return True

    def nonfinite_mask(self, format: _Format, layout: Layout, chunks: Tensor) -> Tensor | None:
        """Never None: only the device knows."""
        call = self.call(format, layout, chunks.device)
        bits = torch.empty(layout.numel // _ROW, dtype=torch.int32, device=chunks.device)
        call.launch("nonfinite_mask", _ROWS, call.payload(chunks, layout.shards), call.mask(bits))
        return bits

    def rollback(
        self,
        format: _Format,
        layout: Layout,
        payload: Tensor,
        mask: Tensor,
        gradients: Sequence[Tensor],
        state: FeedbackState,
        sparse: bool,
    ) -> None:
        call = self.call(format, layout, mask.device)
        call.launch(
            "rollback", _ROWS, call.payload(payload, layout.shards), call.mask(mask), call.tensors(gradients),
            call.state(state, gradients), np.int64(sparse),
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _kernels(family: _Family[Any], format: Any) -> _Kernels:
    return family.kernels(format)


class _OneBitCall(_Call):
    def __init__(self, format: OneBitFormat, kernels: _Kernels, layout: Layout, where: torch.device) -> None:
        super().__init__(kernels, format.nbytes, layout, where)
        self.regions = _regions(format.block, format.granularity, layout, where)
        self.common += (self.regions.argument,)

    def scales(self, sums: Tensor, chunks: Any) -> None:
        """The second of three launches: a block of threads for each region."""
        if self.layout.numels:
            args = np.uint64(sums.data_ptr()), chunks
            launching.launch(self.device, self.kernel("scales"), (self.regions.regions, 1), *self.common, *args)


class _OneBit(_Family[OneBitFormat]):
    def kernels(self, format: OneBitFormat) -> _Kernels:
        team = _team(format.block)
        granularity = ("block", "parameter", "bucket").index(format.granularity)
        argument = by_value(
            _ONE_BIT, format.block, format.scale == "l2", granularity, team, format.bits_at, format.nbytes
        )  # fmt: skip
        return _Kernels("one_bit", "one_bit", (), argument, format.block, format.block * (_WARPS // team), _QUADS)

    def call(self, format: OneBitFormat, layout: Layout, where: torch.device) -> _OneBitCall:
        return _OneBitCall(format, _kernels(self, format), layout, where)

    def encode(
        self, format: OneBitFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        if state.velocity is not None:
            raise ValueError("signs of all elements leave no velocity")
        if format.granularity == "block":
            return super().encode(format, layout, gradients, state, chunks)
        call = self.call(format, layout, chunks.device)
        tensors, kept, payload = call.tensors(gradients), call.state(state, gradients), call.payload(chunks, layout.shards)
        sums = torch.empty(call.regions.blocks, dtype=torch.float32, device=chunks.device)
        call.launch("sums", call.kernels.encodes, tensors, kept, np.uint64(sums.data_ptr()))
        call.scales(sums, payload)
        call.launch("signs", call.kernels.encodes, tensors, kept, payload)

    def serve(
        self, format: OneBitFormat, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> bool:
        if format.granularity == "block":
            return super().serve(format, layout, pushed, weight, state, chunk)
        call = self.call(format, layout, chunk.device)
        workers, payload = call.pushed(pushed, weight), call.payload(chunk, 1)
        sums = torch.empty(call.regions.blocks, dtype=torch.float32, device=chunk.device)
        total = torch.empty(layout.numel, dtype=torch.float32, device=chunk.device)
        flat = call.flat(state.error), call.flat(total)
        call.launch("serve_sums", call.kernels.encodes, *workers, *flat, np.uint64(sums.data_ptr()))
        call.scales(sums, payload)
        kept = call.state(FeedbackState(state.error, total=total), None)
        call.launch("signs", call.kernels.encodes, call.tensors(None), kept, payload)
        return True


class _Quantize(_Family[QuantizeFormat]):
    def kernels(self, format: QuantizeFormat) -> _Kernels:
        columns = format.block_nbytes // (3 if format.bits == 3 else 1)
        team = _team(8 * columns // {0: 2, 2: 2, 3: 1, 4: 4, 8: 8}[format.bits])  # a thread takes that many columns
        options = (f"-DBITS={format.bits}", f"-DSTOCHASTIC={int(format.stochastic)}", f"-DL2={int(format.l2)}")
        argument = by_value(
            _QUANTIZE, format.codes_at, format.nbytes, format.block, columns, format.block_nbytes, team
        )  # fmt: skip
        elements = format.block * (_WARPS // team)
        return _Kernels("quantize", "quantize", options, argument, format.block, elements, elements)

    def drawn(self, format: QuantizeFormat, state: FeedbackState) -> tuple[_Argument, ...]:
        key = format.seed & 0xFFFFFFFF, format.seed >> 32
        return (by_value(_PHILOX, key, (state.step, state.bucket, state.sender)),)


class _Cast(_Family[CastFormat]):
    def kernels(self, format: CastFormat) -> _Kernels:
        argument = by_value(_CAST, _TRAVELLING[format.dtype], format.nbytes)
        return _Kernels("elements", "cast", (), argument, _ROW, _QUADS, _QUADS)


class _RandomK(_Family[RandomKFormat]):
    def kernels(self, format: RandomKFormat) -> _Kernels:
        key = format.seed & 0xFFFFFFFF, format.seed >> 32
        argument = by_value(_RANDOM_K, format.k, format.values == "fp16", format.nbytes, key)
        return _Kernels("elements", "random_k", (), argument, _ROW, _QUADS, _QUADS)

    def header(self, format: RandomKFormat, state: FeedbackState) -> _Argument:
        return by_value(_HEADER, state.step, state.bucket, state.first_shard, format.k)

    def encode(
        self, format: RandomKFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        call = self.call(format, layout, chunks.device)
        tensors, kept, payload = call.tensors(gradients), call.state(state, gradients), call.payload(chunks, layout.shards)
        nonfinite, nonfinite_at = None, np.uint64(0)
        if gradients is not None and state.error is not None:
            nonfinite = torch.empty(layout.numel // 4, dtype=torch.uint8, device=chunks.device)
            nonfinite_at = np.uint64(nonfinite.data_ptr())
        call.launch("collect", _QUADS, tensors, kept, nonfinite_at, payload)
        if state.error is not None:
            call.launch("finish", _QUADS, tensors, kept, nonfinite_at, payload)
        call.launch("send", _QUADS, self.header(format, state), tensors, kept, payload, things=format.k)

    def serve(
        self, format: RandomKFormat, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> bool:
        call = self.call(format, layout, chunk.device)
        args = self.header(format, state), *call.pushed(pushed, weight), call.flat(state.error), call.payload(chunk, 1)
        call.launch("serve_check", _QUADS, *args, things=format.k)
        call.launch("serve", _QUADS, *args, things=format.k)
        return True

    def decode(self, format: RandomKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        call = self.call(format, layout, chunks.device)
        payload, tensors = call.payload(chunks, layout.shards), call.tensors(gradients)
        call.launch("fill", _QUADS, payload, tensors)
        call.launch("scatter", _QUADS, payload, tensors, things=format.k)

    def accumulate(self, format: RandomKFormat, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        call = self.call(format, layout, pushed.device)
        call.launch("accumulate", _QUADS, *call.pushed(pushed, weight), call.flat(total), things=format.k)


class _TopK(_Family[TopKFormat]):
    def kernels(self, format: TopKFormat) -> _Kernels:
        values = ("fp32", "fp16", "sign").index(format.values)
        return _Kernels("top_k", "top_k", (), by_value(_TOP_K, format.k, values, *format[2:]), _ROW, _TILE, RUN)

    def encode(
        self, format: TopKFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        call = self.call(format, layout, chunks.device)
        tensors, kept, payload = call.tensors(gradients), call.state(state, gradients), call.payload(chunks, layout.shards)
        work = _top_k_work(format, layout, chunks.device, state).argument
        call.launch("gather", _TILE, tensors, kept, work)
        for level in range(3):
            call.launch("narrow", RUN, tensors, kept, work, np.int64(level == 0))
        call.launch("place", RUN, tensors, kept, work, payload)
        call.launch("emit", RUN, tensors, kept, work, payload)

    def serve(
        self, format: TopKFormat, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> bool:
        """The selection needs the whole sum first."""
        return False


@lru_cache(maxsize=1024)
def _elements(layout: Layout, device: torch.device) -> tuple[Tensor, int]:
    """Of each shard, padding not counted."""
    there, (start,) = _upload(device, [sum(piece.numel for piece in pieces) for pieces in layout.pieces])
    return there, start


class _Work(NamedTuple):
    argument: _Argument
    arrays: tuple[Tensor, Tensor]


def _top_k_work(format: TopKFormat, layout: Layout, device: torch.device, state: FeedbackState) -> _Work:
    """What a state's passes keep on the device: the threshold they guess next, and room for candidates and entries."""
    key = format, layout, device
    found: _Work | None = state.scratch.get(key)
    if found is None:
        # Candidates are half as many again to twice what is sent; of a large share the guess would save nothing.
        capacity = 3 * format.k + _TILE if 8 * format.k < layout.shard_numel else 0
        tiles, runs = -(-layout.shard_numel // _TILE), -(-layout.shard_numel // RUN)
        counts = [1, 1, 1, tiles, runs, capacity, capacity, format.k, format.k, format.k]
        sizes = [layout.shards * n * words for n, words in zip(counts, _TOP_K_WORDS.values(), strict=True)]
        words = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        starts = words.data_ptr() + 4 * np.cumsum([0, *sizes[:-1]])
        elements, elements_at = _elements(layout, device)
        found = _Work(by_value(_TOP_K_WORK, elements_at, *starts, capacity), (words, elements))
        state.scratch[key] = found
    return found


FAMILIES: dict[str, Passes] = {
    "one_bit": _OneBit(),
    "top_k": _TopK(),
    "quantize": _Quantize(),
    "cast": _Cast(),
    "random_k": _RandomK(),
}


def all_within(values: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    """As `Backend.all_within`, for compressors without kernels."""
    return bool((values.abs() <= limit).all())
