"""Tensors outside an optimizer, each with an error of its own: what a `DoubleSqueeze` is once an allreduce uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .checkpoint import is_of_one_rank, load_buckets, require_fits, require_format
from .options import Options
from .residual import Residual, split
from .selection import Selection
from .session import Session
from .transport import GroupTransport
from .uncompressed import Velocities
from .units import Units


class TensorReducer:
    """A session for each name, made at its first use, whose only parameter stands for the tensor.

    Parameters
    ----------
    options
        As the user chose them.
    loaded
        A state for tensors that have not been seen yet.

    Raises
    ------
    ValueError
        An option that only an optimizer can follow.
    """

    def __init__(self, options: Options, loaded: Mapping[str, Any] | None = None) -> None:
        for option in ("momentum", "warmup_steps", "max_norm", "grad_scaler", "lr_aware", "staleness", "choose"):
            if getattr(options, option):
                raise ValueError(f"allreduce: {option} is for optimizers; got a compression with {getattr(options, option)!r}")
        self.options = options
        self.units = Units()
        self.velocities = Velocities(0.0)
        self.place = -1, -1
        """How many ranks there are, and which one this is."""
        self._loaded: dict[str, Any] = dict(loaded or {})  # for tensors that have not been seen yet
        self._sessions: dict[str, Session[Any]] = {}

    @property
    def sessions(self) -> list[Session[Any]]:
        """In the order in which their names were first used."""
        return list(self._sessions.values())

    @property
    def steps(self) -> int:
        """The most that any tensor has taken."""
        return max((session.step for session in self.sessions), default=0)

    def late(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def residuals(self, of_all: bool = False) -> dict[str, Residual]:
        """By name of tensor, as `Session.export_residual` says."""
        return {n: r for session in self.sessions for n, r in session.export_residual(of_all).items()}

    def session(self, prefix: str, name: str, tensor: Tensor, average: bool, transport: GroupTransport[Any]) -> Session[Any]:
        """The session of one tensor.

        Raises
        ------
        ValueError
            The tensor is another than the name stood for, or the loaded state is not its.
        """
        weight = 1.0 / transport.size if average else 1.0
        session = self._sessions.get(name)
        if session is None:
            self.place = transport.size, transport.rank
            stand_in = torch.empty_like(tensor).requires_grad_()
            selection = Selection(replace(self.options, min_numel=1, bucket_cap_mb=None), min_dim=0)
            session = Session(f"{prefix}.{name}", [(name, stand_in)], selection, weight, transport)
            if self._loaded:
                self._load_session(self._loaded, session)
                self._loaded = _without(self._loaded, name)
            self._sessions[name] = session
        ((_, stand_in),) = session.parameters
        now, then = ((x.dtype, tuple(x.shape), x.device) for x in (tensor, stand_in))
        if (now, weight) != (then, session.weight):
            raise ValueError(
                f"allreduce: {name!r} stood for {then[0]} {then[1]} on {then[2]} with weight {session.weight}, "
                f"now for {now[0]} {now[1]} on {now[2]} with weight {weight}; "
                "its error belongs to one tensor and op: give another name"
            )
        return session

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back a state, of tensors that have not been seen yet at their first use; nothing has changed if it raises."""
        require_format(state, self.options, self.place)
        if is_of_one_rank(state):
            if any(len(b["parameters"]) > 1 for b in state["buckets"]):
                raise ValueError("DoubleSqueeze: the state is of an optimizer, this instance is used by allreduce")
            known = [b for b in state["buckets"] if b["parameters"][0] in self._sessions]
            load_buckets(known, [self._sessions[b["parameters"][0]].buckets[0] for b in known])
        else:
            for session in self.sessions:
                self._load_session(state, session)
        self._loaded = dict(state)
        for name in self._sessions:
            self._loaded = _without(self._loaded, name)

    def _load_session(self, state: Mapping[str, Any], session: Session[Any]) -> None:
        ((name, _),) = session.parameters
        require_format(state, self.options, self.place)
        if is_of_one_rank(state):
            saved = [b for b in state["buckets"] if b["parameters"] == [name]]
            load_buckets(saved, session.buckets if saved else [])
        elif name in state["errors"]:
            own = {**state, "errors": {name: state["errors"][name]}}
            require_fits(own, session.parameters, session.selection)
            residuals = {name: Residual(state["errors"][name], None)}
            session.import_residual(split(residuals, session.transport.size), state["step"], alike=True)


def _without(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is left of a state once a tensor has taken over its part, which need not stay in memory."""
    if is_of_one_rank(state):
        return {**state, "buckets": [bucket for bucket in state["buckets"] if bucket["parameters"] != [name]]}
    return {**state, "errors": {other: error for other, error in state["errors"].items() if other != name}}
