"""The ways to train on several ranks that the benchmarks compare, by name, each as a user of it would set it up.

====================  ================================================================================
none, fp16            Horovod, with its own compressions
onebit                Horovod with DoubleSqueeze(OneBit())
onebit-server         the same with one server, as in the paper, instead of a share of it on every rank
onebit-allgather      one pass instead of two: all ranks send their payloads to all others
topk-P%               Horovod with DoubleSqueeze(TopK): topk-0.1% sends a thousandth; topk is topk-1%
sign-P%               Horovod with DoubleSqueeze(TopK(values="sign")) and momentum correction
quantize-B            Horovod with DoubleSqueeze(Quantize) of B bits
late-quantize-B       the same with staleness=1; late-onebit, late-sign-P% and late-topk-P% likewise
flat-quantize-B       the same with hierarchical=False; flat-onebit and so on likewise
tentative-quantize-B  the same with staleness=1 and tentative steps; tentative-onebit and so on likewise
ddp, ddp-fp16         torch.distributed's DistributedDataParallel (DDP), with its own fp16 hook
ddp-powersgd-R        DDP with its PowerSGD hook of rank R
ddp-onebit and so on  DDP with DoubleSqueeze as its hook: ddp-quantize-B, ddp-sign-P%, ddp-topk-P% too
noop                  no gradient travels: the most that any compression could give
====================  ================================================================================
"""

from __future__ import annotations

import argparse
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from one_pass import one_pass, use_one_pass
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ds_horovod import DoubleSqueeze, OneBit, Quantize, TopK
from ds_horovod.ddp import register

NAMES = (
    "none",
    "fp16",
    "onebit",
    "onebit-server",
    "onebit-allgather",
    "topk",
    "topk-P%",
    "sign-P%",
    "quantize-B",
    "late-onebit",
    "late-topk-P%",
    "late-sign-P%",
    "late-quantize-B",
    "flat-onebit",
    "flat-topk-P%",
    "flat-sign-P%",
    "flat-quantize-B",
    "tentative-onebit",
    "tentative-topk-P%",
    "tentative-sign-P%",
    "tentative-quantize-B",
    "ddp",
    "ddp-fp16",
    "ddp-powersgd-R",
    "ddp-onebit",
    "ddp-topk-P%",
    "ddp-sign-P%",
    "ddp-quantize-B",
    "noop",
)


@dataclass(frozen=True)
class Training:
    """A model and an optimizer that exchange gradients."""

    model: nn.Module
    """For the forward pass."""
    optimizer: torch.optim.Optimizer
    bytes_sent: Callable[[], float]
    """Bytes that this rank has sent per step: counted by DoubleSqueeze and PowerSGD, else by `ring_bytes`."""


def ring_bytes(model: nn.Module) -> float:
    """Bytes that each rank sends in one step for an uncompressed ring allreduce: ``2 (n-1)/n |gradients|``."""
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 2 * (hvd.size() - 1) / hvd.size() * gradients


def reduction(sent: float, model: nn.Module) -> float | None:
    """How many times fewer bytes than uncompressed. None where nothing is sent."""
    return ring_bytes(model) / sent if sent else None


def is_known(method: str) -> bool:
    """Whether `distribute` knows the method."""
    variable = method.endswith(("-P%", "-B", "-R"))
    return (method in NAMES and not variable) or _number(method) is not None or _number(_squeezed(method)) is not None


_NUMBERED = {"topk-": ("%", 0, 100), "sign-": ("%", 0, 100), "quantize-": ("", 1, 4), "ddp-powersgd-": ("", 0, math.inf)}
"""Beginnings of methods, what follows their number, and between what it must be; the first is excluded."""


def _squeezed(method: str) -> str:
    """The method that one of DDP has in its hook, or that another option changes; empty where there is none."""
    name = re.sub("^(ddp|flat|late|tentative)-", "", method)
    return name if name != method and (name == "onebit" or name.startswith(("topk-", "sign-", "quantize-"))) else ""


def _number(method: str) -> float | None:
    """The number in a method such as ``topk-0.1%``; None in any other."""
    if method == "topk":
        return 1.0
    for prefix, (suffix, least, most) in _NUMBERED.items():
        text = method.removeprefix(prefix).removesuffix(suffix)
        if method == f"{prefix}{text}{suffix}":
            try:
                number = float(text)
            except ValueError:
                return None
            whole = suffix or (number.is_integer() and text.isdecimal())
            return number if least < number <= most and whole else None
    return None


def distribute(
    method: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Iterable[tuple[str, nn.Parameter]] | None = None,
    op: Any = hvd.Average,
    silent_start: bool = False,
) -> Training:
    """Makes a model and its optimizer exchange gradients. The model must be the same on all ranks already.

    Parameters
    ----------
    method
        One of the table above.
    model, optimizer
        As for one process.
    names
        For Horovod, where the names in the model are not enough: several optimizers in one process.
    op
        For Horovod.
    silent_start
        For PowerSGD, whose first two steps send gradients as they are: they send nothing, which saves minutes over a
        slow network where nobody looks at those steps.
    """
    if method == "noop":
        return Training(model, optimizer, lambda: 0.0)
    if method.startswith("ddp"):
        return _ddp(method, model, optimizer, silent_start)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=names or model.named_parameters(), compression=_compression(method), op=op
    )
    if method.startswith("tentative-"):
        optimizer.double_squeeze.attach(model)
    if method == "onebit-allgather":
        return Training(model, optimizer, use_one_pass(optimizer))

    def bytes_sent() -> float:
        if not hasattr(optimizer, "double_squeeze"):
            return ring_bytes(model) / (2 if method == "fp16" else 1)
        return _bytes_sent(optimizer.double_squeeze)

    return Training(model, optimizer, bytes_sent)


def _bytes_sent(squeeze: DoubleSqueeze) -> float:
    stats = squeeze.stats()  # empty for one rank
    return float(stats.get("compressed_bytes_sent", 0.0) + stats.get("dense_bytes_sent", 0.0))


def _compression(method: str) -> Any:
    if method.startswith(("flat-", "late-", "tentative-")):
        options = _compression(_squeezed(method)).options
        more = {"hierarchical": False} if method.startswith("flat-") else {"staleness": 1}
        return DoubleSqueeze(**{**{f.name: getattr(options, f.name) for f in fields(options)}, **more})
    number = _number(method)
    if number is not None:
        if method.startswith("quantize-"):
            return DoubleSqueeze(Quantize(int(number)))
        if method.startswith("sign-"):
            return DoubleSqueeze(TopK(number / 100, values="sign"), momentum=0.9)
        return DoubleSqueeze(TopK(number / 100))
    return {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "onebit": lambda: DoubleSqueeze(OneBit()),
        "onebit-server": lambda: DoubleSqueeze(OneBit(), server=0),
        "onebit-allgather": lambda: one_pass(OneBit()),
    }[method]()


def _ddp(method: str, model: nn.Module, optimizer: torch.optim.Optimizer, silent_start: bool) -> Training:
    _join_torch()
    rank = _number(method)
    squeezed = _squeezed(method)
    if squeezed:
        # Views of torch's buckets save a copy of all gradients.
        ddp = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True)
        state = register(ddp, _compression(squeezed))
        return Training(ddp, optimizer, lambda: _bytes_sent(state))
    # With several buckets PowerSGD hangs on Gloo: its allreduces are not launched in the same order everywhere.
    one_bucket = {"bucket_cap_mb": 1 + sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20} if rank else {}
    # Horovod leaves batch statistics alone, so DDP does here.
    ddp = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, **one_bucket)
    if method == "ddp-fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if rank is None:
        return Training(ddp, optimizer, lambda: ring_bytes(model) / (2 if method == "ddp-fp16" else 1))

    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=int(rank), start_powerSGD_iter=2)

    def hook(state, bucket):  # DDP looks at annotations, and does not understand those of postponed evaluation
        if not silent_start or state.iter >= state.start_powerSGD_iter:
            return powerSGD_hook.powerSGD_hook(state, bucket)
        state.maybe_increase_iter(bucket)
        nothing = torch.futures.Future()
        nothing.set_result(bucket.buffer().zero_())
        return nothing

    def bytes_sent() -> float:
        _, before, after = state.compression_stats()
        return ring_bytes(model) * after / max(1, before)

    ddp.register_comm_hook(state, hook)
    return Training(ddp, optimizer, bytes_sent)


def _join_torch() -> None:
    """Makes torch.distributed's group of Horovod's ranks, once."""
    if dist.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("", 0))
        meeting_point = f"tcp://{os.environ.get('HOROVOD_HOSTNAME', 'localhost')}:{free.getsockname()[1]}"
    meeting_point = hvd.broadcast_object(meeting_point, name="benchmark.meeting_point")
    dist.init_process_group("gloo", init_method=meeting_point, rank=hvd.rank(), world_size=hvd.size())


def method_list(parser: argparse.ArgumentParser, flag: str, words: Sequence[str]) -> list[str]:
    """The methods that words separated by commas or spaces name; an error of the parser for others."""
    methods = " ".join(words).replace(",", " ").split()
    unknown = [method for method in methods if not is_known(method)]
    if unknown or not methods:
        parser.error(f"argument {flag}: must name some of {', '.join(NAMES)}; got {', '.join(unknown) or 'none of them'}")
    return methods
