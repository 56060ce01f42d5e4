"""What the benchmarks share: flags and their checks, tables, and JSON that says where and how it was measured."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

Number = TypeVar("Number", int, float)


def use_threads(threads: int | None = None) -> None:
    """Gives torch that many threads; by default what OMP_NUM_THREADS says, or the rank's share of the cores.

    Torch would take all cores in every rank, and ranks on one machine would wait for each other's threads.
    """
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // _ranks()[1]))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_json(path: Path, args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Writes results of ranks, from one of them, with all that one needs to judge and repeat them."""
    size, local_size = _ranks()
    ranks = {"ranks": size, "ranks_per_machine": local_size, "threads_per_rank": torch.get_num_threads()}
    path.write_text(json.dumps({**provenance(args), **ranks, "results": results}, indent=2) + "\n")


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """When, how and where something is measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "plot")},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "horovod", "ds_horovod")},
        },
    }


def _ranks() -> tuple[int, int]:
    """How many ranks there are, and how many of them on this machine: one where Horovod is not in use."""
    hvd = sys.modules.get("horovod.torch")
    return (hvd.size(), hvd.local_size()) if hvd is not None and hvd.is_initialized() else (1, 1)


def _version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the working tree, with a plus where it has changes; None where it is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed.returncode)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Cells:
    """A file of results, one entry for each cell of an experiment, to which several processes may add.

    It is read anew before each look and each addition, and written as a whole: what one process adds, the others keep.

    Parameters
    ----------
    path
        Of the JSON.
    settings
        What the results of one file have in common.
    key
        The entries of a cell that tell it from the others.

    Raises
    ------
    ValueError
        The file is something else, or holds results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], key: Sequence[str]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))  # as it will be read
        self._key = tuple(key)
        self.read()

    def read(self) -> list[dict[str, Any]]:
        """All cells so far."""
        if not self._path.exists() or not self._path.stat().st_size:
            return []
        try:
            content = json.loads(self._path.read_text())
            before, cells = content["settings"], list(content["cells"])
            different = [key for key in {**before, **self._settings} if before.get(key) != self._settings.get(key)]
            for cell in cells:
                self._name(cell)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path} holds no results of this benchmark: {error!r}; name another file") from error
        if different:
            found = ", ".join(f"{key} {before.get(key)!r} there, {self._settings.get(key)!r} here" for key in different)
            raise ValueError(f"{self._path} cannot be continued: {found}; name another file")
        return cells

    def has(self, **key: Any) -> bool:
        """Whether a cell is there."""
        return self._name(key) in map(self._name, self.read())

    def add(self, **cell: Any) -> None:
        """Writes a cell, in place of an older one."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            cells = [other for other in self.read() if self._name(other) != self._name(cell)]
            cells = sorted([*cells, cell], key=lambda cell: json.dumps(self._name(cell)))
            # A line for each cell: some hold long lists.
            lines = ",\n".join(json.dumps(cell) for cell in cells)
            text = f'{{\n"settings": {json.dumps(self._settings, indent=1)},\n"cells": [\n{lines}\n]\n}}\n'
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, prefix=self._path.name, delete=False) as file:
                file.write(text)
            os.chmod(file.name, 0o644)
            os.replace(file.name, self._path)
        finally:
            os.close(folder)

    def _name(self, cell: Mapping[str, Any]) -> list[Any]:
        return [cell[name] for name in self._key]


# ---- for argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """For ``type=``: a finite number over zero."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be over 0 and finite, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


def count(text: str) -> int:
    """For ``type=``: a whole number, zero or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def new_file(text: str) -> Path:
    """For ``type=``: a file that can be written, found out before the run rather than after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text}")
    return path


class _Lines:
    """A stream that is no terminal, for tqdm: each state of a bar becomes a line, since horovodrun prefixes lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm; where stderr is no terminal, as under horovodrun, a line every half minute."""
    from tqdm import tqdm  # which what runs on GPUs does without

    if not sys.stderr.isatty():
        options = {"ncols": 79, "ascii": True, **options, "file": _Lines(sys.stderr), "mininterval": 30, "miniters": 1}
    return tqdm(*args, **options)
