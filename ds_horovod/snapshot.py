"""What a rank needs to go on among any number of ranks: where they come and go, in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from .compressors import Compressor
from .reducer import Reducer, averaged
from .residual import Residual
from .transport import GroupTransport


class Shared(NamedTuple):
    """The part of a snapshot that is the same on all ranks."""

    compressors: tuple[Compressor, Compressor | None]
    """Of pushes and of replies, None where they are the same."""
    step: int
    sparse: list[str]
    """Names of parameters with sparse gradients."""
    velocities: dict[str, Tensor]
    """Of what is not compressed."""
    late: dict[str, Tensor]
    """As `Reducer.late`."""
    units: dict[str, Any]


class Snapshot(NamedTuple):
    """What a rank needs to go on among any number of ranks."""

    residuals: dict[str, Residual]
    """Its own, by name of parameter."""
    shared: Shared


def snapshot(reducer: Reducer) -> Snapshot:
    """Of what this rank holds. Raises RuntimeError while a step is under way."""
    sparse = [] if reducer.session is None else sorted(reducer.session.sparse)
    velocities = {name: velocity.clone() for name, velocity in reducer.velocities.state_dict().items()}
    compressors = reducer.options.compressor, reducer.options.server_compressor
    shared = Shared(compressors, reducer.steps, sparse, velocities, reducer.late(), reducer.units.state_dict())
    return Snapshot(reducer.residuals(), shared)


def rebind(reducer: Reducer, transport: GroupTransport[Any], before: Snapshot, era: str = "") -> None:
    """Goes on among other ranks, with what this one has held before; all of them call it.

    The residuals of the ranks that are still there are those of all from now on.

    Parameters
    ----------
    reducer
        Of this rank.
    transport
        To the other ranks.
    before
        What this rank has held, and all hold.
    era
        Part of names that no rank has ever used: of a collective that began when a rank failed, Horovod may keep the name
        and the tensor. Empty: as before.
    """
    residuals, shared = before
    compressor, server_compressor = shared.compressors
    options = replace(reducer.options, compressor=compressor, server_compressor=server_compressor)
    reducer.selection = replace(reducer.selection, options=options)
    reducer.enter(transport, era)
    if reducer.session is not None and not options.worker_error and options.server_error:  # servers take it over
        residuals = averaged(reducer.session, residuals)
    reducer.import_all(residuals, shared.step, shared.sparse, shared.velocities, shared.late)
    reducer.units.load_state_dict(shared.units)
