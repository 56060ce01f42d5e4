"""What the benchmarks share: flags and their checks, the compressions by name, bytes on the wire, and where it ran."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from torch import nn

from ds_horovod import DoubleSqueeze, OneBit, TopK

Number = TypeVar("Number", int, float)


def compression(name: str, ratio: float = 0.01) -> Any:
    """A new value for ``compression=`` of ``hvd.DistributedOptimizer``: each optimizer needs its own."""
    return {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "onebit": lambda: DoubleSqueeze(OneBit()),
        "topk": lambda: DoubleSqueeze(TopK(ratio)),
    }[name]()


def ring_bytes(model: nn.Module) -> float:
    """Bytes that each rank sends in one step for an uncompressed ring allreduce: ``2 (n-1)/n |gradients|``."""
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 2 * (hvd.size() - 1) / hvd.size() * gradients


def bytes_sent(method: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes that this rank has sent per step: counted for DoubleSqueeze, else by `ring_bytes`, also for Adasum."""
    if method == "noop":
        return 0.0
    if not hasattr(optimizer, "double_squeeze"):
        return ring_bytes(model) / (2 if method == "fp16" else 1)
    stats = optimizer.double_squeeze.stats()  # empty for one rank
    return stats.get("compressed_bytes_sent", 0.0) + stats.get("dense_bytes_sent", 0.0)


def reduction(sent: float, model: nn.Module) -> float | None:
    """How many times fewer bytes than uncompressed. None where nothing is sent."""
    return ring_bytes(model) / sent if sent else None


def use_threads(threads: int | None = None) -> None:
    """Gives torch that many threads; by default the rank's share of the cores.

    Torch would take all cores in every rank, and ranks on one machine would wait for each other's threads.
    """
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
    """Writes results with all that one needs to judge and repeat them."""
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "ranks": hvd.size(),
        "ranks_per_machine": hvd.local_size(),
        "threads_per_rank": torch.get_num_threads(),
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
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


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


def share(text: str) -> float:
    """For ``type=``: a number over zero, at most one."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, got {text}")
    return value


def new_file(text: str) -> Path:
    """For ``type=``: a file that can be written, found out before the run rather than after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text}")
    return path


def method_list(parser: argparse.ArgumentParser, flag: str, words: Sequence[str], allowed: Collection[str]) -> list[str]:
    """The methods that words separated by commas or spaces name; an error of the parser for others."""
    methods = " ".join(words).replace(",", " ").split()
    unknown = [method for method in methods if method not in allowed]
    if unknown or not methods:
        parser.error(f"argument {flag}: must name some of {', '.join(allowed)}; got {', '.join(unknown) or 'none of them'}")
    return methods
