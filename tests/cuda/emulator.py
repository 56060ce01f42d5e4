"""Runs the CUDA kernels' own sources on a CPU: a device for `ds_horovod.kernels.launch`, by way of emulation.h and g++.

Tensors lie on the CPU. Everything but compiling and streams is what runs with a GPU: the launcher's arithmetic, arguments and
tables of addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_horovod.kernels import launch

if platform.machine() != "x86_64":
    pytest.skip("the emulator's fibers are those of x86-64", allow_module_level=True)

HEADER = Path(__file__).parent / "emulation.h"
SCHEDULES = {
    "in turns": 0,
    "in turns, backwards": 1,
    "greedy": 2,
    "greedy, backwards": 3,
    "greedy, warps at random": 6,
}
"""Who goes on when several threads can; what the numbers are stands in emulation.h."""
SANITIZED = "DS_HOROVOD_EMULATE_SANITIZED"
"""Environment variable: kernels are compiled with AddressSanitizer and UBSan, which `sanitized` loads first."""
# Without optimization: compiling it takes longer than running it.
_SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fsanitize-sections=emulated_shared", "-fno-sanitize-recover=all")


def sanitized(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command whose emulated kernels may not touch what is not theirs, nor do what C++ leaves undefined."""
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name=lib{name}.so"], text=True).strip() for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        SANITIZED: "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:symbolize=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


class EmulationError(RuntimeError):
    """A kernel did what CUDA does not allow."""


@functools.cache
def _compiler() -> str:
    return subprocess.check_output(["g++", "--version"], text=True)


def compiled(command: Sequence[str], content: str, source: str | None = None) -> Path:
    """The shared library that ``g++ command -o LIBRARY`` makes, kept for other processes and for later runs.

    Parameters
    ----------
    content
        Of all files that go into it: should one change, so does the library.
    source
        What the compiler reads from its standard input.
    """
    digest = hashlib.sha256("\0".join([_compiler(), *command, content, source or ""]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ds_horovod-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    with open(folder / f"{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait rather than compile it too
        if not library.exists():
            written = folder / f"{digest}.{os.getpid()}.so"
            command = ["g++", *command, "-o", str(written)]
            result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
            if result.returncode:
                raise EmulationError(result.stderr[-4000:])
            written.rename(library)
    return library


def compile_shared(source: str, flags: tuple[str, ...] = ()) -> Path:
    """A shared library with ``emulated_<kernel>`` for each kernel of the source."""
    names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(', source)
    code = source + "".join(f"\nEMULATE({name})" for name in names) + "\n"
    command = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", "-w", *flags]
    return compiled([*command, "-include", str(HEADER), "-x", "c++", "-"], HEADER.read_text(), code)


class EmulatedKernel:
    """Called as a ``cupy.RawKernel`` is."""

    def __init__(self, device: EmulatedDevice, name: str, function: ctypes._CFuncPtr) -> None:
        self._device, self._name, self._function = device, name, function
        function.restype = ctypes.c_char_p

    def __call__(self, grid, block, args, *, stream=None) -> None:
        dims = [(ctypes.c_uint * 3)(*(*d, 1, 1)[:3]) for d in (grid, block)]
        values = [np.ascontiguousarray(a) for a in args]
        for value in values:
            if value.dtype == object or value.size != 1:
                raise EmulationError(f"{self._name}: an argument of {value.dtype} {value.shape}, which CuPy would not take")
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        self._device.launches.append(self._name)
        error = self._function(*dims, pointers, len(values), self._device.schedule)
        if error:
            raise EmulationError(f"{self._name}: {error.decode()}")


class EmulatedDevice:
    """A device of `launch`.

    Parameters
    ----------
    schedule
        One of `SCHEDULES`.
    flags
        More of g++'s.
    mutate
        Of tests that plant faults: what becomes of a family's source.
    """

    def __init__(self, schedule: str = "in turns", flags: tuple[str, ...] = (), mutate=lambda family, source: source) -> None:
        self.schedule = SCHEDULES[schedule]
        self.launches: list[str] = []
        """Names of the kernels, in order."""
        self._flags, self._mutate = flags + (_SANITIZE if os.environ.get(SANITIZED) else ()), mutate
        self._libraries: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}

    def kernel(self, family: str, name: str, options: tuple[str, ...] = ()) -> EmulatedKernel:
        library = self._libraries.get((family, options))
        if library is None:
            source = self._mutate(family, launch.sources(family))
            library = ctypes.CDLL(str(compile_shared(source, (*self._flags, *options))))
            self._libraries[family, options] = library
        return EmulatedKernel(self, name, getattr(library, f"emulated_{name}"))

    def stream(self):
        return contextlib.nullcontext()

    def upload(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.copy())
