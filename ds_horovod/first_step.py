"""The first step of an optimizer: its ranks compare what they hold, and learn what only some of them have seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .agreement import require_agreement

if TYPE_CHECKING:
    from .session import Session

WAYS_OUT = {
    "weights": "Replicas must start with equal weights. With Horovod, call hvd.broadcast_parameters(model.state_dict(), "
    "root_rank=0) on all ranks, as the last thing before training: hvd.broadcast_optimizer_state may change weights, where "
    "weight decay is on. DistributedDataParallel broadcasts them when it is made: change them before that. What is meant to "
    "differ must not be among the optimizer's parameters.",
    "loaded state": "Where one rank has loaded a state, call optimizer.double_squeeze.broadcast_state(root_rank=...) on all "
    "ranks, once the optimizer is made; or load on all ranks.",
}
"""What to do where ranks do not agree."""


def compare(
    session: Session[Any], more: Mapping[str, Any], unknown: Collection[str], frozen: Collection[str]
) -> tuple[frozenset[str], frozenset[str], bool]:
    """What holds on all ranks, which all call it.

    Parameters
    ----------
    session
        Of this rank.
    more
        What ranks compare beside what `describe` says.
    unknown, frozen
        Names of parameters that have had no gradient on this rank, and of those that are frozen on it.

    Returns
    -------
    sparse, frozen, news
        Names of parameters with sparse gradients on any rank, and of those that are frozen on all ranks; whether some rank has
        not known all of the former.

    Raises
    ------
    ValueError
        The ranks do not agree; the same on all of them.
    """
    own = {**describe(session), **more, "unknown": sorted(unknown), "frozen": sorted(frozen)}
    everyones = session.transport.gather_objects(own, session.name + ".agreement")
    everywhere = frozenset(own["frozen"]).intersection(*(other.pop("frozen") for other in everyones))
    sparse = sorted({name for other in everyones for name in other["sparse parameters"]})
    news = any(set(other["sparse parameters"]) != set(sparse) for other in everyones)
    for other in everyones:  # what has no gradient on a rank is sparse there if it is elsewhere
        not_seen = other.pop("unknown")
        other["sparse parameters"] = [n for n in sparse if n in other["sparse parameters"] or n in not_seen]
    require_agreement(everyones, WAYS_OUT)
    return frozenset(sparse), everywhere, news


def describe(session: Session[Any]) -> dict[str, Any]:
    """What ranks compare before their first exchange, as plain values."""
    options, selection = session.options, session.selection
    choices = session.parameters if options.choose is not None else []
    return {
        **options.description(),
        "server": session.transport.server,
        "ranks on a host": 1 if session.transport.host is None else session.transport.host.size,
        "weight": session.weight,
        "groups": [" ".join(names) for names in selection.groups],
        "loss scale": session.units.scale,
        "parameters": [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in session.parameters],
        "choice": [f"{name}: {selection.compressor(name, p)!r}" for name, p in choices],
        "sparse parameters": sorted(session.sparse),
        "step": session.step,
    }
