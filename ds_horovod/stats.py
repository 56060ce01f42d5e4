"""What the exchanges of an optimizer have cost, as numbers to log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from .session import Session


def stats_of(session: Session[Any]) -> dict[str, float]:
    """As `DoubleSqueeze.stats` says."""
    totals = session.totals
    steps = session.admitted // max(1, len(session.parameters))
    ring = 2 * (session.transport.size - 1) / session.transport.size
    uncompressed = ring * (
        session.dense_bytes + steps * sum(p.numel() * p.element_size() for bucket in session.buckets for p in bucket.parameters)
    )
    sent = totals.bytes_sent + ring * session.dense_bytes
    per_step = {
        "compressed_bytes_sent": totals.bytes_sent,
        "compressed_bytes_received": totals.bytes_received,
        "dense_bytes_sent": ring * session.dense_bytes,
        "dense_bytes_received": ring * session.dense_bytes,
        "worker_pass_seconds": totals.worker_pass_seconds,
        "server_pass_seconds": totals.server_pass_seconds,
        "decode_seconds": totals.decode_seconds,
        "wait_seconds": totals.wait_seconds,
    }
    return {
        "steps": steps,
        **{key: value / max(1, steps) for key, value in per_step.items()},
        "compression_ratio": uncompressed / sent if sent else 1.0,
        "worker_error_norm": _norm([bucket.exchange.worker_error for bucket in session.buckets]),
        "server_error_norm": _norm([bucket.exchange.server_error for bucket in session.buckets]),
    }


def reset(session: Session[Any]) -> None:
    """Counts bytes and seconds from here on."""
    session.admitted = session.dense_bytes = 0
    for total in fields(session.totals):
        setattr(session.totals, total.name, total.default)


def combine_stats(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """The stats of several sessions as one: means over all their steps, norms as norms add up, the ratio by what was sent."""
    if len(stats) <= 1:
        return dict(stats[0]) if stats else {}
    steps = sum(s["steps"] for s in stats)
    total = {key: sum(s["steps"] * s[key] for s in stats) / max(1, steps) for key in stats[0]}
    total["steps"] = steps
    for key in ("worker_error_norm", "server_error_norm"):
        total[key] = math.sqrt(sum(s[key] ** 2 for s in stats))
    sent = [s["steps"] * (s["compressed_bytes_sent"] + s["dense_bytes_sent"]) for s in stats]
    ratios = [s["compression_ratio"] for s in stats]
    total["compression_ratio"] = sum(r * b for r, b in zip(ratios, sent, strict=True)) / sum(sent) if sum(sent) else 1.0
    return total


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(t.norm()) ** 2 for t in tensors if t is not None))
