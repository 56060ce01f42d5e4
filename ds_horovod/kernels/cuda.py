"""The kernels on GPUs: checks the tensors and launches ``csrc/cuda``. What the functions do stands in `reference`.

Nothing here waits for the device, and no pass needs an answer from it. So payloads that no encoder writes do not raise, as they
do on a CPU: they are decoded to NaN, or to some values, and nothing is read or written out of bounds. Functions that accumulate
take the chunks of several workers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout
from . import launch as launching
from .formats import RUN, CastFormat, OneBitFormat, QuantizeFormat, RandomKFormat, TopKFormat
from .launch import THREADS, by_value, struct

HOST = False
"""Whether the host may look at results without waiting for them."""

Format: TypeAlias = OneBitFormat | QuantizeFormat | CastFormat | RandomKFormat | TopKFormat
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
_MEMORY = struct(
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
        return _Regions(by_value(_REGIONS, 0, 0, 0), torch.empty(0), 0, 0)
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


class _Codec(NamedTuple):
    """How a format's kernels are found, and the first of their arguments."""

    family: str  # csrc/cuda/<family>.cu
    prefix: str  # of the kernels' names
    options: tuple[str, ...]
    argument: _Argument
    block: int  # elements: tensors start on multiples
    elements: int  # that a block of threads encodes


@lru_cache(maxsize=1024)
def _codec(format: Format) -> _Codec:
    if isinstance(format, OneBitFormat):
        team = _team(format.block)
        granularity = ("block", "parameter", "bucket").index(format.granularity)
        argument = by_value(
            _ONE_BIT, format.block, format.scale == "l2", granularity, team, format.bits_at, format.nbytes
        )  # fmt: skip
        return _Codec("one_bit", "one_bit", (), argument, format.block, format.block * (_WARPS // team))
    if isinstance(format, QuantizeFormat):
        columns = format.block_nbytes // (3 if format.bits == 3 else 1)
        team = _team(8 * columns // {0: 2, 2: 2, 3: 1, 4: 4, 8: 8}[format.bits])  # a thread takes that many columns
        options = (f"-DBITS={format.bits}", f"-DSTOCHASTIC={int(format.stochastic)}", f"-DL2={int(format.l2)}")
        argument = by_value(
            _QUANTIZE, format.codes_at, format.nbytes, format.block, columns, format.block_nbytes, team
        )  # fmt: skip
        return _Codec("quantize", "quantize", options, argument, format.block, format.block * (_WARPS // team))
    if isinstance(format, CastFormat):
        argument = by_value(_CAST, _TRAVELLING[format.dtype], format.nbytes)
        return _Codec("elements", "cast", (), argument, _ROW, _QUADS)
    if isinstance(format, TopKFormat):
        values = ("fp32", "fp16", "sign").index(format.values)
        return _Codec("top_k", "top_k", (), by_value(_TOP_K, format.k, values, *format[2:]), _ROW, _TILE)
    key = format.seed & 0xFFFFFFFF, format.seed >> 32
    argument = by_value(_RANDOM_K, format.k, format.values == "fp16", format.nbytes, key)
    return _Codec("elements", "random_k", (), argument, _ROW, _QUADS)


def _team(elements: int) -> int:
    """Warps that share so many elements, 8 a thread, as far as there are warps."""
    team = 1
    while team < _WARPS and 8 * 32 * team < elements:
        team *= 2
    return team


def prepare(format: Format, layout: Layout, device: torch.device) -> None:
    """Compiles a format's kernels and copies a layout to a device. That may wait; passes do not then.

    Raises
    ------
    ImportError, ValueError
        The device cannot be used: why, and what to install.
    """
    call = _call(format, layout, device)
    call.device.kernel(call.codec.family, f"{call.codec.prefix}_lost", call.codec.options)


# ---- one pass


class _Call:
    """A pass over a layout on a device: its arguments, checked."""

    def __init__(self, format: Format, layout: Layout, where: torch.device) -> None:
        self.format, self.layout, self.where = format, layout, where
        self.codec = _codec(format)
        self.device = launching.device_of(where)
        block = self.codec.block
        if layout.shard_numel % block or any(offset % block for offset in layout.offsets) or block >= 2**31:
            raise ValueError(f"tensors and shards must start on blocks of {block} elements")
        self.common: tuple[Any, ...] = (self.codec.argument, _layout(layout, where).argument)
        self._kept: list[Tensor | None] = []

    def launch(self, name: str, per_block: int, *args: Any, things: int | None = None) -> None:
        """Starts a kernel with a row of blocks for each shard; a block takes so many elements, or things, of the shard."""
        if self.layout.numels:
            things = self.layout.shard_numel if things is None else things
            kernel = self.device.kernel(self.codec.family, f"{self.codec.prefix}_{name}", self.codec.options)
            launching.launch(self.device, kernel, (-(-things // per_block), self.layout.shards), *self.common, *args)

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

    def memory(self, memory: FeedbackState, gradients: Sequence[Tensor] | None) -> _Argument:
        if gradients is None and memory.error is None and memory.total is None:
            raise ValueError("nothing to encode")
        if memory.velocity is not None and (gradients is None or memory.error is None):
            raise ValueError("a velocity needs gradients and an error")
        flat = (self.flat(memory.error), self.flat(memory.velocity), self.flat(memory.total))
        return by_value(_MEMORY, *flat, memory.momentum)

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
        if payload.numel() != chunks * self.format.nbytes:
            raise ValueError(
                f"a payload of {payload.numel()} bytes, expected {chunks} chunks of {self.format.nbytes}: truncated?"
            )
        return np.uint64(self._aligned(payload, 16))

    def pushed(self, pushed: Tensor, weight: float) -> tuple[Any, Any, Any]:
        """One chunk, or a row of them, one a worker, and what they count."""
        if self.layout.shards != 1:
            raise ValueError(f"a server has one shard, got a layout of {self.layout.shards}")
        workers = pushed.shape[0] if pushed.dim() == 2 else 1
        return self.payload(pushed, workers), np.int64(workers), np.float32(weight)

    def lost(self, lost: Tensor) -> Any:
        self._require_here(lost)
        if lost.dtype != torch.int32 or lost.numel() * _ROW != self.layout.numel or not lost.is_contiguous():
            raise ValueError(f"expected {self.layout.numel // _ROW} words of bits, got {lost.dtype} {tuple(lost.shape)}")
        return np.uint64(self._aligned(lost, 4))

    def _require_here(self, tensor: Tensor) -> None:
        if tensor.device != self.where:
            raise ValueError(f"expected tensors on {self.where} only, got one on {tensor.device}")

    def _aligned(self, tensor: Tensor, nbytes: int) -> int:
        address = tensor.data_ptr()
        if address % nbytes:
            raise ValueError(f"expected memory aligned to {nbytes} bytes, got {tensor.dtype} at {address:#x}")
        return address


def _call(format: Format, layout: Layout, where: torch.device) -> _Call:
    return (_OneBitCall if isinstance(format, OneBitFormat) else _Call)(format, layout, where)


def nonfinite_mask(format: Format, layout: Layout, chunks: Tensor) -> Tensor:
    """As `Compressor.nonfinite_mask`, but never None: only the device knows."""
    call = _call(format, layout, chunks.device)
    bits = torch.empty(layout.numel // _ROW, dtype=torch.int32, device=chunks.device)
    call.launch("lost", _ROWS, call.payload(chunks, layout.shards), call.lost(bits))
    return bits


def rollback(
    format: Format,
    layout: Layout,
    payload: Tensor,
    lost: Tensor,
    gradients: Sequence[Tensor],
    memory: FeedbackState,
    sparse: bool,
) -> None:
    """As `Compressor.rollback`."""
    call = _call(format, layout, lost.device)
    call.launch(
        "take_back", _ROWS, call.payload(payload, layout.shards), call.lost(lost), call.tensors(gradients),
        call.memory(memory, gradients), np.int64(sparse),
    )  # fmt: skip


# ---- one bit


class _OneBitCall(_Call):
    def __init__(self, format: Any, layout: Layout, where: torch.device) -> None:
        super().__init__(format, layout, where)
        self.regions = _regions(format.block, format.granularity, layout, where)
        self.common += (self.regions.argument,)

    def scales(self, sums: Tensor, chunks: Any) -> None:
        """The second of three launches: a block of threads for each region."""
        if self.layout.numels:
            kernel = self.device.kernel("one_bit", "one_bit_scales")
            launching.launch(self.device, kernel, (self.regions.regions, 1), *self.common, np.uint64(sums.data_ptr()), chunks)


def one_bit_encode(
    format: OneBitFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    call = _OneBitCall(format, layout, chunks.device)
    if memory.velocity is not None:
        raise ValueError("signs of all elements leave no velocity")
    tensors, kept, payload = call.tensors(gradients), call.memory(memory, gradients), call.payload(chunks, layout.shards)
    if format.granularity == "block":
        return call.launch("encode", call.codec.elements, tensors, kept, payload)
    sums = torch.empty(call.regions.blocks, device=chunks.device)
    call.launch("sums", call.codec.elements, tensors, kept, np.uint64(sums.data_ptr()))
    call.scales(sums, payload)
    call.launch("signs", call.codec.elements, tensors, kept, payload)


def one_bit_serve(
    format: OneBitFormat, layout: Layout, pushed: Tensor, weight: float, error: Tensor | None, chunk: Tensor
) -> None:
    call = _OneBitCall(format, layout, chunk.device)
    workers, payload = call.pushed(pushed, weight), call.payload(chunk, 1)
    if format.granularity == "block":
        return call.launch("serve", call.codec.elements, *workers, call.flat(error), payload)
    sums = torch.empty(call.regions.blocks, device=chunk.device)
    total = torch.empty(layout.numel, device=chunk.device)
    flat = call.flat(error), call.flat(total)
    call.launch("serve_sums", call.codec.elements, *workers, *flat, np.uint64(sums.data_ptr()))
    call.scales(sums, payload)
    call.launch("signs", call.codec.elements, call.tensors(None), call.memory(FeedbackState(error, total=total), None), payload)


def one_bit_decode(format: OneBitFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _OneBitCall(format, layout, chunks.device)
    call.launch("decode", _QUADS, call.payload(chunks, layout.shards), call.tensors(gradients))


def one_bit_accumulate(format: OneBitFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _OneBitCall(format, layout, chunk.device)
    call.launch("accumulate", _QUADS, *call.pushed(chunk, weight), call.flat(total))


# ---- levels


def _philox(seed: int, memory: FeedbackState) -> _Argument:
    return by_value(_PHILOX, (seed & 0xFFFFFFFF, seed >> 32), (memory.step, memory.bucket, memory.sender))


def quantize_encode(
    format: QuantizeFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    call = _Call(format, layout, chunks.device)
    call.launch(
        "encode", call.codec.elements, call.tensors(gradients), call.memory(memory, gradients), _philox(format.seed, memory),
        call.payload(chunks, layout.shards),
    )  # fmt: skip


def quantize_serve(
    format: QuantizeFormat, layout: Layout, pushed: Tensor, weight: float, memory: FeedbackState, chunk: Tensor
) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch(
        "serve", call.codec.elements, *call.pushed(pushed, weight), call.flat(memory.error), _philox(format.seed, memory),
        call.payload(chunk, 1),
    )  # fmt: skip


def quantize_decode(format: QuantizeFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _Call(format, layout, chunks.device)
    call.launch("decode", call.codec.elements, call.payload(chunks, layout.shards), call.tensors(gradients))


def quantize_accumulate(format: QuantizeFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch("accumulate", call.codec.elements, *call.pushed(chunk, weight), call.flat(total))


# ---- element by element


def cast_encode(
    format: CastFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    call = _Call(format, layout, chunks.device)
    kept, payload = call.memory(memory, gradients), call.payload(chunks, layout.shards)
    call.launch("encode", _QUADS, call.tensors(gradients), kept, payload)


def cast_serve(format: CastFormat, layout: Layout, pushed: Tensor, weight: float, error: Tensor | None, chunk: Tensor) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch("serve", _QUADS, *call.pushed(pushed, weight), call.flat(error), call.payload(chunk, 1))


def cast_decode(format: CastFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _Call(format, layout, chunks.device)
    call.launch("decode", _QUADS, call.payload(chunks, layout.shards), call.tensors(gradients))


def cast_accumulate(format: CastFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch("accumulate", _QUADS, *call.pushed(chunk, weight), call.flat(total))


def cast_is_within(format: CastFormat, chunks: Tensor, limit: float) -> bool:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format.dtype]
    return all_within(chunks.view(-1).view(dtype).float(), limit)


def _header(format: RandomKFormat, memory: FeedbackState) -> _Argument:
    return by_value(_HEADER, memory.step, memory.bucket, memory.first_shard, format.k)


def random_k_encode(
    format: RandomKFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    call = _Call(format, layout, chunks.device)
    tensors, kept, payload = call.tensors(gradients), call.memory(memory, gradients), call.payload(chunks, layout.shards)
    odd, odd_at = None, np.uint64(0)
    if gradients is not None and memory.error is not None:
        odd = torch.empty(layout.numel // 4, dtype=torch.uint8, device=chunks.device)
        odd_at = np.uint64(odd.data_ptr())
    call.launch("collect", _QUADS, tensors, kept, odd_at, payload)
    if memory.error is not None:
        call.launch("settle", _QUADS, tensors, kept, odd_at, payload)
    call.launch("send", _QUADS, _header(format, memory), tensors, kept, payload, things=format.k)


def random_k_serve(
    format: RandomKFormat, layout: Layout, pushed: Tensor, weight: float, memory: FeedbackState, chunk: Tensor
) -> None:
    call = _Call(format, layout, chunk.device)
    args = _header(format, memory), *call.pushed(pushed, weight), call.flat(memory.error), call.payload(chunk, 1)
    call.launch("serve_check", _QUADS, *args, things=format.k)
    call.launch("serve", _QUADS, *args, things=format.k)


def random_k_decode(format: RandomKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _Call(format, layout, chunks.device)
    payload, tensors = call.payload(chunks, layout.shards), call.tensors(gradients)
    call.launch("fill", _QUADS, payload, tensors)
    call.launch("scatter", _QUADS, payload, tensors, things=format.k)


def random_k_accumulate(format: RandomKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch("accumulate", _QUADS, *call.pushed(chunk, weight), call.flat(total), things=format.k)


# ---- the largest


@lru_cache(maxsize=1024)
def _elements(layout: Layout, device: torch.device) -> tuple[Tensor, int]:
    """Of each shard, padding not counted."""
    there, (start,) = _upload(device, [sum(piece.numel for piece in pieces) for pieces in layout.pieces])
    return there, start


class _Work(NamedTuple):
    argument: _Argument
    arrays: tuple[Tensor, Tensor]


def _top_k_work(format: TopKFormat, layout: Layout, device: torch.device, memory: FeedbackState) -> _Work:
    """What a memory's passes keep on the device: the threshold they guess next, and room for candidates and entries."""
    key = format, layout, device
    found: _Work | None = memory.scratch.get(key)
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
        memory.scratch[key] = found
    return found


def top_k_encode(
    format: TopKFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    call = _Call(format, layout, chunks.device)
    tensors, kept, payload = call.tensors(gradients), call.memory(memory, gradients), call.payload(chunks, layout.shards)
    work = _top_k_work(format, layout, chunks.device, memory).argument
    call.launch("gather", _TILE, tensors, kept, work)
    for level in range(3):
        call.launch("narrow", RUN, tensors, kept, work, np.int64(level == 0))
    call.launch("place", RUN, tensors, kept, work, payload)
    call.launch("emit", RUN, tensors, kept, work, payload)


def top_k_decode(format: TopKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    call = _Call(format, layout, chunks.device)
    call.launch("decode", RUN, call.payload(chunks, layout.shards), call.tensors(gradients))


def top_k_accumulate(format: TopKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    call = _Call(format, layout, chunk.device)
    call.launch("accumulate", RUN, *call.pushed(chunk, weight), call.flat(total))


def all_within(values: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    """Waits for the device: for compressors without kernels."""
    return bool((values.abs() <= limit).all())
