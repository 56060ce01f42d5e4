"""What one rank keeps, as plain tensors and values, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .session import Bucket

FORMAT = 4
_ARRAYS = ("worker_error", "server_error", "velocity")


def save_bucket(bucket: Bucket[Any]) -> dict[str, Any]:
    """The layout of a bucket, its errors and velocity (not copied), and how many steps it has taken."""
    layout = bucket.exchange.layout
    return {
        "parameters": list(bucket.names),
        "numels": list(layout.numels),
        "offsets": list(layout.offsets),
        "weight": bucket.exchange.options.weight,
        "step": bucket.exchange.worker.step,
        **{key: getattr(bucket.exchange, key) for key in _ARRAYS},
    }


def load_buckets(saved: Sequence[Mapping[str, Any]], buckets: Sequence[Bucket[Any]]) -> None:
    """Copies everything back, once all layouts are found to be equal.

    Raises
    ------
    ValueError
        They are not: which one, and what was expected. Nothing has changed then.
    """
    if len(saved) != len(buckets):
        raise _another_layout(f"{len(saved)} buckets, here {len(buckets)}")
    own = [save_bucket(bucket) for bucket in buckets]
    for b, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        for key in ("parameters", "numels", "offsets", "weight"):
            if theirs[key] != ours[key]:
                raise _another_layout(f"bucket {b} has {key} {theirs[key]}, here {ours[key]}")
        for key in _ARRAYS:
            shapes = [None if state[key] is None else tuple(state[key].shape) for state in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise _another_layout(f"bucket {b} has a {key} of shape {shapes[0]}, here {shapes[1]}")
    for theirs, ours, bucket in zip(saved, own, buckets, strict=True):
        for key in _ARRAYS:
            if ours[key] is not None:
                ours[key].copy_(theirs[key])
        bucket.exchange.worker.step = bucket.exchange.server.step = theirs["step"]


def _another_layout(difference: str) -> ValueError:
    return ValueError(f"DoubleSqueeze: the state is of another layout: {difference}")
