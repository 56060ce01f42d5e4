"""The state of one rank for all: what ``hvd.broadcast_optimizer_state`` does, for errors and velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .agreement import require_agreement
from .checkpoint import full_state_of_one, load, require_fits
from .reducer import Reducer

_KINDS = ("errors", "velocities", "late")


def broadcast(reducer: Reducer, root_rank: Any) -> None:
    """Gives each rank its share of what one of them holds; see `DoubleSqueeze.broadcast_state`, whose errors it raises."""
    transport, session = reducer.transport, reducer.session
    if session is None:
        _require_root([root_rank], transport.ranks)
        return
    session.agree_on_name()
    name, state, problem = f"{session.name}.state", None, ""
    try:
        session.require_between_steps()
        state = full_state_of_one(reducer) if root_rank == transport.ranks[transport.rank] else None
    except RuntimeError as error:
        problem = str(error)
    own = {"root_rank": root_rank if isinstance(root_rank, int) else repr(root_rank), "problem": problem, "head": _head(state)}
    everyones = transport.gather_objects(own, name + ".head")
    _require_root([theirs["root_rank"] for theirs in everyones], transport.ranks)
    _raise_first(RuntimeError, [theirs["problem"] for theirs in everyones], transport.ranks)

    head = everyones[transport.ranks.index(root_rank)]["head"]
    tensors = {kind: {n: _zeros(*what) for n, what in head[kind].items()} for kind in _KINDS}
    try:
        require_fits({**head, **tensors}, reducer.parameters, reducer.selection)
    except ValueError as error:
        problem = str(error)
    _raise_first(ValueError, transport.gather_objects(problem, name + ".fits"), transport.ranks)
    for kind in _KINDS:
        for n, zeros in tensors[kind].items():  # a sum whose other terms are zero
            tensors[kind][n] = transport.sum(zeros if state is None else state[kind][n], f"{name}.{kind}.{n}")
    load(reducer, {**head, **tensors})


def _require_root(root_ranks: Sequence[Any], ranks: Sequence[int]) -> None:
    require_agreement([{"root_rank": root_rank} for root_rank in root_ranks])
    if root_ranks[0] not in ranks:
        allowed = ", ".join(map(str, ranks))
        raise ValueError(f"DoubleSqueeze: root_rank must be one of the ranks {allowed}; got {root_ranks[0]}")


def _head(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A state with shapes and dtypes in place of tensors."""
    if state is None:
        return None
    return {**state, **{kind: {n: [list(t.shape), str(t.dtype)] for n, t in state[kind].items()} for kind in _KINDS}}


def _zeros(shape: list[int], dtype: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))


def _raise_first(kind: type[Exception], problems: Sequence[str], ranks: Sequence[int]) -> None:
    for rank, problem in zip(ranks, problems, strict=True):
        if problem:
            raise kind(f"{problem} (on rank {rank})")
