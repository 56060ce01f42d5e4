"""State to and from files, as plain tensors and values: of one rank exactly, or of all ranks for any number of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .checksum import digest
from .compressors.checks import is_whole
from .options import Options
from .reducer import Loaded, Reducer
from .residual import Residual, split
from .selection import Selection
from .session import Session
from .step import Bucket
from .uncompressed import Velocities
from .units import LARGEST, Units

FORMAT = 4
_ARRAYS = ("worker_error", "server_error", "velocity")


class Holder(Protocol):
    """Whatever holds the state of one `DoubleSqueeze`: that of an optimizer, or of tensors outside one."""

    units: Units
    velocities: Velocities

    @property
    def sessions(self) -> list[Session[Any]]:
        """All of them."""

    @property
    def place(self) -> tuple[int, int]:
        """How many ranks there are, and which one this is."""

    @property
    def steps(self) -> int:
        """How many have been taken."""

    def residuals(self, of_all: bool = False) -> dict[str, Residual]:
        """Those of this rank, or of all ranks together, by name."""

    def late(self) -> dict[str, Tensor]:
        """What waits of parameters that no exchange takes, by name."""


def rank_state(options: Options, holder: Holder | None) -> dict[str, Any]:
    """The value of `DoubleSqueeze.state_dict`; without a holder that of an instance that is not in use yet."""
    sessions = [] if holder is None else holder.sessions
    for session in sessions:
        session.restore_frozen()
    size, rank = (-1, -1) if holder is None else holder.place
    return {
        "format": FORMAT,
        "size": size,
        "rank": rank,
        "server": options.server,
        "sparse": sorted(name for session in sessions for name in session.sparse),
        "buckets": [
            _save_bucket(bucket, session.residual_in_flight(bucket)) for session in sessions for bucket in session.buckets
        ],
        "velocities": {} if holder is None else holder.velocities.state_dict(),
        "late": {} if holder is None else holder.late(),
        "units": (Units() if holder is None else holder.units).state_dict(),
    }


def full_state(options: Options, holder: Holder | None) -> dict[str, Any]:
    """The value of `DoubleSqueeze.full_state_dict`; all ranks call it."""
    return _full(options, holder, {} if holder is None else holder.residuals(of_all=True))


def full_state_of_one(reducer: Reducer) -> dict[str, Any]:
    """As `full_state`, of what one rank holds: what it has loaded since its last step, if that is of all ranks, or its own."""
    loaded, residuals = reducer.loaded, reducer.residuals()
    if loaded is not None and loaded.of_all:
        n = reducer.transport.size
        residuals = {k: Residual(e * n, None if u is None else u * n) for k, (e, u) in residuals.items()}
    state = _full(reducer.options, reducer, residuals)
    return state if loaded is None or loaded.whole is None else {**state, **loaded.whole}


def _full(options: Options, holder: Holder | None, residuals: Mapping[str, Residual]) -> dict[str, Any]:
    errors, velocities = {}, {}
    if holder is not None:
        velocities = {name: velocity.to("cpu", copy=True) for name, velocity in holder.velocities.state_dict().items()}
    for name, (error, velocity) in residuals.items():
        if options.worker_error or options.server_error:
            errors[name] = error.to("cpu", copy=True)
        if velocity is not None:
            velocities[name] = velocity.to("cpu", copy=True)
    return {
        "format": FORMAT,
        "step": 0 if holder is None else holder.steps,
        "sparse": [] if holder is None else sorted(name for session in holder.sessions for name in session.sparse),
        "errors": errors,
        "velocities": velocities,
        "late": {} if holder is None else {name: average.to("cpu", copy=True) for name, average in holder.late().items()},
        "units": (Units() if holder is None else holder.units).state_dict(),
    }


def load(reducer: Reducer, state: Mapping[str, Any]) -> None:
    """Takes back what `rank_state` or `full_state` gave of an optimizer; raises as `DoubleSqueeze.load_state_dict` does."""
    require_format(state, reducer.options, reducer.place)
    late = state.get("late", {})  # which states of earlier versions do not have
    if is_of_one_rank(state):
        _require_known(state, "velocities", reducer.parameters)
        _require_known({"late": late}, "late", reducer.parameters)
    session, options = reducer.session, reducer.options
    description, whole = "a state_dict()", None
    if not is_of_one_rank(state):
        tensors = [(f"{kind}.{name}", tensor) for kind in ("errors", "velocities") for name, tensor in state[kind].items()]
        description = f"the full_state_dict() of step {state['step']} with checksum {digest(tensors)}"
        if (options.server_error and not options.worker_error) or reducer.transport.host is not None:
            whole = {kind: dict(state[kind]) for kind in ("errors", "velocities")}
        require_fits(state, reducer.parameters, reducer.selection)
        residuals = split({name: Residual(error, None) for name, error in state["errors"].items()}, reducer.transport.size)
        reducer.import_all(residuals, state["step"], state["sparse"], state["velocities"], late, alike=True)
    elif session is None:
        load_buckets(state["buckets"], [])
        reducer.velocities.load_state_dict(state["velocities"])
        reducer.load_late(late)
    else:
        sparse = set(state["sparse"])
        buckets = session.buckets if session.started or sparse == session.sparse else session.fill(sparse)
        load_buckets(state["buckets"], buckets)
        session.adopt(sparse, buckets, hold_errors=True)
        reducer.velocities.load_state_dict(state["velocities"])
        reducer.load_late(late)
    reducer.units.load_state_dict(state["units"])
    reducer.loaded = Loaded(description, reducer.steps, not is_of_one_rank(state), whole)


def is_of_one_rank(state: Mapping[str, Any]) -> bool:
    """Whether a state is one of `rank_state` rather than `full_state`."""
    return "buckets" in state


def require_format(state: Mapping[str, Any], options: Options, place: tuple[int, int] | None) -> None:
    """Raises ValueError unless a state is of this format, well formed and, if it is of one rank, of this place.

    Parameters
    ----------
    state, options
        The state, and the options of the instance that is to hold it.
    place
        How many ranks there are and which one this is; None where that is not known yet.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"DoubleSqueeze: a state must be what state_dict() or full_state_dict() gave, got {type(state).__name__}"
        )
    if not is_of_one_rank(state):
        if state.get("format") != FORMAT:
            raise ValueError(f"DoubleSqueeze: the state is of format {state.get('format')}, this is format {FORMAT}")
        _require_well_formed(state)
        return
    expected: dict[str, Any] = {"format": FORMAT, "server": options.server}
    if place is not None:
        expected |= {"world size": place[0], "rank": place[1]}
    for label, value in expected.items():
        found = state.get("size" if label == "world size" else label)
        if found != value:
            raise ValueError(f"DoubleSqueeze: the state is of {label} {found}, this is {label} {value}")
    _require_well_formed(state)


def _require_well_formed(state: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the key, for what no `rank_state` or `full_state` has, and for values that are not finite."""
    _require(state, "sparse", _is_list_of(str), "a list of names")
    _require(state, "velocities", _is_mapping_to(_is_tensor), "floating-point tensors by name")
    if "late" in state:
        _require(state, "late", _is_mapping_to(_is_tensor), "floating-point tensors by name")
        for name, average in state["late"].items():
            _require_finite(average, f"late gradients of {name}")
    _require(state, "units", lambda units: isinstance(units, Mapping), "a dict")
    _require(state["units"], "scale", lambda scale: _is_number(scale) and scale > 0, "positive and finite", "units.")
    _require(state["units"], "learning_rates", _is_mapping_to(_is_number), "numbers by name", "units.")
    for name, velocity in state["velocities"].items():
        _require_finite(velocity, f"velocities of {name}")
    if not is_of_one_rank(state):
        _require(state, "step", lambda step: is_whole(step) and step >= 0, "a whole number, 0 or more")
        _require(state, "errors", _is_mapping_to(_is_tensor), "floating-point tensors by name")
        for name, error in state["errors"].items():
            _require_finite(error, f"errors of {name}")
        return
    _require(state, "buckets", _is_list_of(Mapping), "a list of dicts")
    for b, bucket in enumerate(state["buckets"]):
        at = f"buckets[{b}]."
        _require(bucket, "parameters", _is_list_of(str), "a list of names", at)
        for key in ("numels", "offsets"):
            _require(bucket, key, _is_list_of(int), "a list of whole numbers", at)
        _require(bucket, "weight", _is_number, "a number", at)
        _require(bucket, "step", lambda step: is_whole(step) and step >= 0, "a whole number, 0 or more", at)
        for key in _ARRAYS:
            _require(bucket, key, lambda array: array is None or _is_tensor(array), "a floating-point tensor, or None", at)
            if bucket[key] is not None:
                _require_finite(bucket[key], f"{key} of bucket {b}, of {bucket['parameters'][0]} and others,")


def _require(state: Mapping[str, Any], key: str, is_allowed: Callable[[Any], bool], allowed: str, at: str = "") -> None:
    if key not in state:
        raise ValueError(f"DoubleSqueeze: the state is malformed: {at}{key} is missing")
    if not is_allowed(state[key]):
        found = type(state[key]).__name__ if isinstance(state[key], Tensor | Mapping | list | tuple) else repr(state[key])
        raise ValueError(f"DoubleSqueeze: the state is malformed: {at}{key} must be {allowed}, got {found}")


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise _unfit(f"{what} that are not finite")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _is_mapping_to(is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(k, str) and is_allowed(item) for k, item in value.items())
    )


def require_fits(state: Mapping[str, Any], parameters: Sequence[tuple[str, Tensor]], selection: Selection) -> None:
    """Raises ValueError unless all that a `full_state` holds has a place here: nothing may get lost."""
    known, options = dict(parameters), selection.options
    if state["errors"] and not (options.worker_error or options.server_error):
        raise _unfit("errors, but neither worker_error nor server_error is on")
    if state["velocities"] and not options.momentum:
        raise _unfit(f"velocities, of {next(iter(state['velocities']))} first, but momentum is 0")
    for kind in ("errors", "velocities", "late"):
        _require_known(state, kind, parameters)
    for name in state["errors"]:
        if name in state["sparse"] or selection.compressor(name, known[name]) is None:
            raise _unfit(f"errors of {name}, which is not compressed here")


def _require_known(state: Mapping[str, Any], kind: str, parameters: Sequence[tuple[str, Tensor]]) -> None:
    known = dict(parameters)
    for name, tensor in state.get(kind, {}).items():
        if name not in known:
            raise _unfit(f"{kind} of {name}, which is not a parameter here")
        if tensor.shape != known[name].shape:
            raise _unfit(f"{kind} of {name} of shape {tuple(tensor.shape)}, here {tuple(known[name].shape)}")


def _unfit(what: str) -> ValueError:
    return ValueError(f"DoubleSqueeze: the state holds {what}")


def _save_bucket(bucket: Bucket[Any], in_flight: Tensor | None = None) -> dict[str, Any]:
    """The layout of a bucket, its errors and velocity (not copied), and how many steps it has taken.

    What late steps will bring, the same on all ranks, is part of the worker error: training goes on without any under way.
    """
    layout = bucket.exchange.whole
    arrays = {key: getattr(bucket.exchange, key) for key in _ARRAYS}
    if in_flight is not None:
        arrays["worker_error"] = (arrays["worker_error"] + in_flight / bucket.exchange.weight).clamp_(-LARGEST, LARGEST)
    return {
        "parameters": list(bucket.names),
        "numels": list(layout.numels),
        "offsets": list(layout.offsets),
        "slice": [bucket.exchange.span.start, bucket.exchange.span.stop],
        "weight": bucket.exchange.weight,
        "step": bucket.exchange.steps,
        **arrays,
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
    own = [_save_bucket(bucket) for bucket in buckets]
    for b, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        for key in ("parameters", "numels", "offsets", "slice", "weight"):
            if theirs.get(key, ours[key]) != ours[key]:  # states of earlier versions have no slice
                raise _another_layout(f"bucket {b} has {key} {theirs[key]}, here {ours[key]}")
        for key in _ARRAYS:
            shapes = [None if state[key] is None else tuple(state[key].shape) for state in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise _another_layout(f"bucket {b} has a {key} of shape {shapes[0]}, here {shapes[1]}")
    for theirs, ours, bucket in zip(saved, own, buckets, strict=True):
        for key in _ARRAYS:
            if ours[key] is not None:
                ours[key].copy_(theirs[key])
        exchange = bucket.exchange
        exchange.steps = exchange.worker.step = exchange.server.step = theirs["step"]


def _another_layout(difference: str) -> ValueError:
    return ValueError(f"DoubleSqueeze: the state is of another layout: {difference}")
