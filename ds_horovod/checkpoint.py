"""What is kept, as plain tensors and values, and back: of one rank exactly, or of all ranks for any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .compressors import Compressor
from .exchange import Options
from .selection import Selection
from .session import Bucket, Owed

FORMAT = 4
_ARRAYS = ("worker_error", "server_error", "velocity")


class Shared(NamedTuple):
    """What is the same on all ranks."""

    compressors: tuple[Compressor, Compressor | None]
    """Of pushes and of replies, None where they are the same."""
    step: int
    sparse: list[str]
    """Names of parameters with sparse gradients."""
    velocities: dict[str, Tensor]
    """Of what is not compressed."""
    units: dict[str, Any]


class Snapshot(NamedTuple):
    """What a rank needs to go on among any number of ranks."""

    owed: dict[str, Owed]
    """Its own, by name of parameter."""
    shared: Shared


def require_fits(
    state: Mapping[str, Any],
    parameters: Sequence[tuple[str, Tensor]],
    selection: Selection,
    compressor: Compressor,
    options: Options,
) -> None:
    """Raises ValueError unless all that a `DoubleSqueeze.full_state_dict` holds has a place here: nothing may get lost."""
    known = dict(parameters)
    if state["errors"] and not (options.worker_error or options.server_error):
        raise _unfit("errors, but neither worker_error nor server_error is on")
    if state["velocities"] and not options.momentum:
        raise _unfit(f"velocities, of {next(iter(state['velocities']))} first, but momentum is 0")
    for kind in ("errors", "velocities"):
        for name, tensor in state[kind].items():
            if name not in known:
                raise _unfit(f"{kind} of {name}, which is not a parameter here")
            if tensor.shape != known[name].shape:
                raise _unfit(f"{kind} of {name} of shape {tuple(tensor.shape)}, here {tuple(known[name].shape)}")
    for name in state["errors"]:
        if name in state["sparse"] or selection.compressor(name, known[name], compressor) is None:
            raise _unfit(f"errors of {name}, which is not compressed here")


def _unfit(what: str) -> ValueError:
    return ValueError(f"DoubleSqueeze: the state holds {what}")


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
