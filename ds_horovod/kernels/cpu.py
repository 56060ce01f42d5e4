"""The kernels on CPUs: checks the tensors and calls the C++ extension, ``csrc/cpu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout
from . import fallback
from .backend import Passes
from .formats import TopKFormat

try:
    from .. import _cpu
except ImportError as error:
    raise ImportError(
        f"ds_horovod was imported from its sources, {Path(__file__).parent.parent}, which hold no compiled kernels. "
        "Where it is installed, run Python in another folder; otherwise install it with pip install ."
    ) from error

LARGEST = torch.finfo(torch.float32).max
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


def _native(state: FeedbackState, error: Tensor | None, numel: int) -> _cpu.FeedbackState:
    return _cpu.FeedbackState(
        _flat(error, numel), _flat(state.velocity, numel), state.momentum, state.bucket, state.sender, state.first_shard,
        state.step,
    )  # fmt: skip


def _bytes(payload: Tensor, nbytes: int, chunks: int | None = None) -> tuple[int, int]:
    """Where some chunks are, and how many bytes they take; one chunk may come without a row of its own.

    Their total alone would not do: half as many chunks of twice the width would count as other workers.
    """
    rows, width = payload.shape if payload.dim() == 2 else (1, payload.numel())
    if width != nbytes or chunks not in (None, rows):
        expected = f"({'any' if chunks is None else chunks}, {nbytes})"
        raise ValueError(f"a payload of {tuple(payload.shape)} bytes, expected {expected}: truncated?")
    if payload.dtype != torch.uint8 or not payload.is_contiguous():
        raise ValueError(f"expected a contiguous uint8 payload, got {payload.dtype} with strides {payload.stride()}")
    return payload.data_ptr(), payload.numel()


class _Family:
    """The passes of a family, as `backend.Passes` says. Which it is, only the native class knows."""

    def __init__(self, native: Any) -> None:
        self._native = lru_cache(maxsize=1024)(lambda format: native(*format))

    def prepare(self, format: Any, layout: Layout, device: torch.device) -> None:
        """Nothing takes long."""

    def encode(
        self, format: Any, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        encoded = state.error if state.total is None else state.total
        self._native(format).encode(
            _layout(layout), *_tensors(layout, gradients), _native(state, encoded, layout.numel),
            *_bytes(chunks, format.nbytes, layout.shards),
            _threads(layout),
        )  # fmt: skip
        if state.total is not None and state.error is not None:
            replied = fallback.decoded(layout, chunks, partial(self.decode, format, layout))
            fallback.replace_where_finite(layout, replied, state.total, state.error)

    def decode(self, format: Any, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        payload = _bytes(chunks, format.nbytes, layout.shards)
        self._native(format).decode(_layout(layout), *_tensors(layout, gradients), *payload, _threads(layout))

    def accumulate(self, format: Any, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        to, threads = _flat(total, layout.numel), _threads(layout)
        _bytes(pushed, format.nbytes)
        for chunk in pushed if pushed.dim() == 2 else (pushed,):
            self._native(format).accumulate(_layout(layout), *_bytes(chunk, format.nbytes), weight, to, threads)

    def is_within(self, format: Any, layout: Layout, chunks: Tensor, limit: float) -> bool:
        return bool(self._native(format).is_within(_layout(layout), *_bytes(chunks, format.nbytes), len(chunks), limit))

    def serve(self, format: Any, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor) -> bool:
        return bool(
            self._native(format).serve(
                _layout(layout), *_bytes(pushed, format.nbytes), len(pushed), weight,
                _native(state, state.error, layout.numel), *_bytes(chunk, format.nbytes, 1), _threads(layout),
            )
        )  # fmt: skip

    def nonfinite_mask(self, format: Any, layout: Layout, chunks: Tensor) -> Tensor | None:
        _bytes(chunks, format.nbytes, layout.shards)
        if self.is_within(format, layout, chunks, LARGEST):
            return None
        return fallback.nonfinite_mask(layout, fallback.decoded(layout, chunks, partial(self.decode, format, layout)))

    def rollback(
        self,
        format: Any,
        layout: Layout,
        payload: Tensor,
        mask: Tensor,
        gradients: Sequence[Tensor],
        state: FeedbackState,
        sparse: bool,
    ) -> None:
        sent = fallback.decoded(layout, payload, partial(self.decode, format, layout))
        if isinstance(format, TopKFormat):  # a shard that travels as NaN altogether sends nothing of its finite elements
            sent = [own.nan_to_num(nan=0.0) for own in sent]
        fallback.rollback(layout, sent, mask, gradients, state, sparse)


FAMILIES: dict[str, Passes] = {name: _Family(native) for name, native in _cpu.families.items()}


def all_within(values: Tensor, limit: float = LARGEST) -> bool:
    """As `Backend.all_within`."""
    return bool(_cpu.all_within(_flat(values, values.numel()), values.numel(), limit))
