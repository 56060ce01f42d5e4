"""The kernels on CPUs: checks the tensors and calls the C++ extension. What the functions do stands in `reference`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout
from .formats import CastFormat, OneBitFormat, QuantizeFormat, RandomKFormat, TopKFormat

try:
    from .. import _cpu
except ImportError as error:
    raise ImportError(
        "ds_horovod's compiled kernels are missing; install the package (pip install .) instead of importing its sources"
    ) from error

HOST = True
"""Whether the host may look at results without waiting for them."""

_ELEMENTS_PER_THREAD = 1 << 20  # some tenths of a millisecond: less is not worth waking a thread
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _use_torch_openmp() -> None:
    """Runs the kernels on the threads that torch has already.

    Torch's OpenMP threads go on spinning for milliseconds after each parallel loop; other threads would compete with them.
    """
    with open("/proc/self/maps") as maps:
        names = {line.split(maxsplit=5)[-1].strip() for line in maps}
    libraries = [name for name in names if "libgomp" in name or "libiomp" in name or "libomp" in name]
    for path in sorted(libraries, key=lambda name: ("/torch/" not in name, name)):  # others may have brought theirs
        try:
            library = ctypes.CDLL(path)
            functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        _cpu.use_openmp(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions))
        return


_use_torch_openmp()


@lru_cache(maxsize=1024)
def _layout(layout: Layout) -> _cpu.Layout:
    return _cpu.Layout(list(layout.offsets), list(layout.numels), layout.shards, layout.shard_numel)


@lru_cache(maxsize=1024)
def _one_bit(format: OneBitFormat) -> _cpu.OneBit:
    return _cpu.OneBit(*format)


@lru_cache(maxsize=1024)
def _top_k(format: TopKFormat) -> _cpu.TopK:
    return _cpu.TopK(*format)


@lru_cache(maxsize=1024)
def _quantize(format: QuantizeFormat) -> _cpu.Quantize:
    return _cpu.Quantize(*format)


@lru_cache(maxsize=1024)
def _cast(format: CastFormat) -> _cpu.Cast:
    return _cpu.Cast(*format)


@lru_cache(maxsize=1024)
def _random_k(format: RandomKFormat) -> _cpu.RandomK:
    return _cpu.RandomK(*format)


def _threads(layout: Layout) -> int:
    return max(1, min(torch.get_num_threads(), layout.numel // _ELEMENTS_PER_THREAD))


def _tensors(layout: Layout, tensors: Sequence[Tensor] | None) -> tuple[str, list[int]]:
    """The name of the tensors' dtype, and where they are."""
    if tensors is None:
        return "none", []
    if tensors and tensors[0].dtype not in _DTYPES:
        raise ValueError(f"expected tensors of {', '.join(map(str, _DTYPES))}, got {tensors[0].dtype}")
    for tensor, numel in zip(tensors, layout.numels, strict=True):
        if tensor.numel() != numel or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"expected a contiguous {tensors[0].dtype} tensor of {numel} elements, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    return (_DTYPES[tensors[0].dtype] if tensors else "none"), [tensor.data_ptr() for tensor in tensors]


def _flat(values: Tensor | None, numel: int) -> int:
    """Where a float32 array is; 0 where there is none."""
    if values is None:
        return 0
    if values.dtype != torch.float32 or values.numel() != numel or not values.is_contiguous():
        raise ValueError(f"expected {numel} contiguous float32 values, got {values.dtype} {tuple(values.shape)}")
    return values.data_ptr()


def _memory(memory: FeedbackState, numel: int) -> _cpu.Memory:
    return _cpu.Memory(
        _flat(memory.error, numel), _flat(memory.velocity, numel), memory.momentum, memory.bucket, memory.sender,
        memory.first_shard, memory.step,
    )  # fmt: skip


def _bytes(payload: Tensor) -> tuple[int, int]:
    if payload.dtype != torch.uint8 or not payload.is_contiguous():
        raise ValueError(f"expected a contiguous uint8 payload, got {payload.dtype} with strides {payload.stride()}")
    return payload.data_ptr(), payload.numel()


def prepare(format: NamedTuple, layout: Layout, device: torch.device) -> None:
    """Makes ready what takes long: nothing."""


def _encode(
    native: Any, codec: Any, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    native(
        codec, _layout(layout), *_tensors(layout, gradients), _memory(memory, layout.numel), *_bytes(chunks), _threads(layout)
    )


def _decode(native: Any, codec: Any, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    native(codec, _layout(layout), *_tensors(layout, gradients), *_bytes(chunks), _threads(layout))


def _accumulate(native: Any, codec: Any, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    native(codec, _layout(layout), *_bytes(chunk), weight, _flat(total, layout.numel), _threads(layout))


def _serve(
    native: Any, codec: Any, layout: Layout, pushed: Tensor, weight: float, memory: FeedbackState, chunk: Tensor
) -> None:
    native(codec, _layout(layout), *_bytes(pushed), weight, _memory(memory, layout.numel), *_bytes(chunk), _threads(layout))


def one_bit_encode(
    format: OneBitFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    _encode(_cpu.one_bit_encode, _one_bit(format), layout, gradients, memory, chunks)


def one_bit_decode(format: OneBitFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    _decode(_cpu.one_bit_decode, _one_bit(format), layout, chunks, gradients)


def one_bit_accumulate(format: OneBitFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    _accumulate(_cpu.one_bit_accumulate, _one_bit(format), layout, chunk, weight, total)


def one_bit_serve(
    format: OneBitFormat, layout: Layout, pushed: Tensor, weight: float, error: Tensor | None, chunk: Tensor
) -> None:
    _serve(_cpu.one_bit_serve, _one_bit(format), layout, pushed, weight, FeedbackState(error), chunk)


def top_k_encode(
    format: TopKFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    _encode(_cpu.top_k_encode, _top_k(format), layout, gradients, memory, chunks)


def top_k_decode(format: TopKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    _decode(_cpu.top_k_decode, _top_k(format), layout, chunks, gradients)


def top_k_accumulate(format: TopKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    _accumulate(_cpu.top_k_accumulate, _top_k(format), layout, chunk, weight, total)


def quantize_encode(
    format: QuantizeFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    _encode(_cpu.quantize_encode, _quantize(format), layout, gradients, memory, chunks)


def quantize_decode(format: QuantizeFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    _decode(_cpu.quantize_decode, _quantize(format), layout, chunks, gradients)


def quantize_accumulate(format: QuantizeFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    _accumulate(_cpu.quantize_accumulate, _quantize(format), layout, chunk, weight, total)


def quantize_serve(
    format: QuantizeFormat, layout: Layout, pushed: Tensor, weight: float, memory: FeedbackState, chunk: Tensor
) -> None:
    _serve(_cpu.quantize_serve, _quantize(format), layout, pushed, weight, memory, chunk)


def cast_encode(
    format: CastFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    _encode(_cpu.cast_encode, _cast(format), layout, gradients, memory, chunks)


def cast_decode(format: CastFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    _decode(_cpu.cast_decode, _cast(format), layout, chunks, gradients)


def cast_accumulate(format: CastFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    _accumulate(_cpu.cast_accumulate, _cast(format), layout, chunk, weight, total)


def cast_is_within(format: CastFormat, chunks: Tensor, limit: float) -> bool:
    return bool(_cpu.cast_is_within(_cast(format), *_bytes(chunks), limit))


def random_k_encode(
    format: RandomKFormat, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor
) -> None:
    _encode(_cpu.random_k_encode, _random_k(format), layout, gradients, memory, chunks)


def random_k_decode(format: RandomKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    _decode(_cpu.random_k_decode, _random_k(format), layout, chunks, gradients)


def random_k_accumulate(format: RandomKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    _accumulate(_cpu.random_k_accumulate, _random_k(format), layout, chunk, weight, total)


def all_within(values: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    return bool(_cpu.all_within(_flat(values, values.numel()), values.numel(), limit))
