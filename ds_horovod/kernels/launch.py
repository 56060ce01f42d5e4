"""From Python to a CUDA kernel: compiling, addresses of many tensors, streams. The only file that knows CuPy.

CuPy is imported when the first CUDA tensor arrives. It compiles and launches, and does nothing else: memory and streams are
torch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

THREADS = 256
"""Of a block, in every launch: kThreads in csrc/cuda/common.cuh."""
FEW = 128
"""Tensors whose addresses travel among a kernel's arguments (kFew); of more, they are copied to the device."""
OPTIONS = ("--std=c++17", "--fmad=false")
"""CuPy adds -ftz=true, which cannot be switched off."""
_OLDEST = (7, 0)  # compute capability; before it the lanes of a warp could not diverge freely


class Kernel(Protocol):
    """As ``cupy.RawKernel`` is called. Arguments by value are NumPy scalars, or structured arrays of one element."""

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, stream: Any) -> None: ...


class Device(Protocol):
    """What a launch needs of a device."""

    def kernel(self, family: str, name: str, options: tuple[str, ...] = ()) -> Kernel:
        """A kernel of ``csrc/cuda/<family>.cu``, compiled with more options, once for each family and options."""

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the current one, and gives its current stream as `Kernel` takes it."""

    def upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device, in the order of its current stream, for which the host does not wait."""


def sources(family: str) -> str:
    """What is compiled for a family."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "csrc", here.parents[2] / "csrc"):  # installed, or a checkout
        if folder.is_dir():
            parts = "shared/half.h", "shared/philox.h", "cuda/common.cuh", f"cuda/{family}.cu"
            return "".join((folder / part).read_text() for part in parts)
    raise FileNotFoundError("ds_horovod's CUDA sources are missing; install the package (pip install .)")


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The device of a tensor.

    Raises
    ------
    ImportError
        No CuPy, or one for another CUDA than torch's: what to install.
    ValueError
        The device is too old, or none of CUDA.
    """
    return _CudaDevice(device)


class _CudaDevice:
    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"DoubleSqueeze has no kernels for tensors on {device}; it supports cpu and cuda")
        self._cupy = _import_cupy()
        self._device = device
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            raise ValueError(
                f"DoubleSqueeze needs a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or later, "
                f"{torch.cuda.get_device_name(device)} ({device}) has {capability[0]}.{capability[1]}"
            )
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._kernels: dict[tuple[str, tuple[str, ...], str], Any] = {}

    def kernel(self, family: str, name: str, options: tuple[str, ...] = ()) -> Kernel:
        found = self._kernels.get((family, options, name))
        if found is None:
            with torch.cuda.device(self._device):
                module = self._modules.get((family, options))
                if module is None:
                    module = self._cupy.RawModule(code=sources(family), options=(*OPTIONS, *options))
                    module.compile()
                    self._modules[family, options] = module
                found = self._kernels[family, options, name] = module.get_function(name)
        return found  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def stream(self) -> Iterator[Any]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if hasattr(stream, "__cuda_stream__") and hasattr(self._cupy.cuda.Stream, "from_external"):
                yield self._cupy.cuda.Stream.from_external(stream)
            else:
                yield self._cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)

    def upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        # torch keeps the pinned memory until the copy is over.
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)


def _import_cupy() -> Any:
    if torch.version.cuda is None:
        raise ImportError("DoubleSqueeze's kernels for GPUs need CUDA; this torch was built without it")
    major = torch.version.cuda.split(".")[0]
    install = f"pip install 'ds-horovod[cuda{major}]'"
    try:
        import cupy  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(f"DoubleSqueeze needs CuPy for tensors on GPUs, which cannot be imported: {install}") from error
    found = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if str(found) != major:
        raise ImportError(
            f"CuPy is for CUDA {found}, torch {torch.__version__} for CUDA {major}: "
            f"pip uninstall cupy-cuda{found}x, then {install}"
        )
    return cupy


# ---- arguments


def struct(*fields: tuple[Any, ...]) -> np.dtype[Any]:
    """The twin of a C struct."""
    return np.dtype(list(fields), align=True)


def by_value(dtype: np.dtype[Any], *values: Any) -> np.ndarray[Any, Any]:
    """A struct as an argument."""
    return np.array([values], dtype=dtype)


_TENSORS = struct(("dtype", np.int64), ("many", np.uint64), ("few", np.uint64, (FEW,)))


def tensors_argument(device: Device, dtype: int, addresses: Sequence[int]) -> tuple[np.ndarray[Any, Any], torch.Tensor | None]:
    """The struct Tensors, and what must live until the launch."""
    few = np.zeros(FEW, dtype=np.uint64)
    if len(addresses) <= FEW:
        few[: len(addresses)] = addresses
        return by_value(_TENSORS, dtype, 0, few), None
    table = device.upload(np.array(addresses, dtype=np.int64))
    return by_value(_TENSORS, dtype, table.data_ptr(), few), table


def launch(device: Device, kernel: Kernel, blocks: tuple[int, int], *args: Any) -> None:
    """Starts a kernel on the device's current stream: a grid of blocks of `THREADS` threads.

    Raises
    ------
    ValueError
        A grid that CUDA cannot start.
    """
    if not blocks[0] or not blocks[1]:
        return
    if blocks[0] >= 2**31 or blocks[1] >= 2**16:
        raise ValueError(f"a grid of {blocks} blocks; CUDA starts at most (2147483647, 65535)")
    with device.stream() as stream:
        kernel(blocks, (THREADS,), args, stream=stream)
