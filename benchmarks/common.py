"""What the benchmarks share: flags and their checks, tables, and JSON that says where and how it was measured."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import horovod.torch as hvd
import torch

Number = TypeVar("Number", int, float)


def use_threads(threads: int | None = None) -> None:
    """Gives torch that many threads; by default what OMP_NUM_THREADS says, or the rank's share of the cores.

    Torch would take all cores in every rank, and ranks on one machine would wait for each other's threads.
    """
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // hvd.local_size()))


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
    ranks = {
        "ranks": hvd.size(),
        "ranks_per_machine": hvd.local_size(),
        "threads_per_rank": torch.get_num_threads(),
    }
    path.write_text(json.dumps({**provenance(args), **ranks, "results": results}, indent=2) + "\n")


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """When, how and where something is measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "horovod", "ds_horovod")},
        },
    }


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
