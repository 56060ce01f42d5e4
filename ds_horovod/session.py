"""The buckets of one optimizer, step after step: when a bucket leaves, and when its gradients are back."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol

import torch
from torch import Tensor

from .agreement import require_agreement
from .exchange import Exchange, Flight, Handle, Options, Totals, Transport
from .selection import Plan, Selection
from .uncompressed import clip, require_dense
from .units import Change, Units

_SHORTEST_NAP, _LONGEST_NAP = 5e-5, 1e-3  # seconds


def changed_too_early(what: str) -> RuntimeError:
    """For gradients that are no longer those that left."""
    return RuntimeError(
        f"DoubleSqueeze: {what} was changed after backward() and before synchronize(), while it may have been under way. "
        "Call optimizer.synchronize() first, then change gradients (scaler.unscale_, clip_grad_norm_), then step inside "
        "`with optimizer.skip_synchronize()`"
    )


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(t.norm()) ** 2 for t in tensors if t is not None))


def combine_stats(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several sessions: means over all their steps, norms as norms add up, the ratio by what was sent."""
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


class GroupTransport(Transport[Handle], Protocol[Handle]):
    """A transport that can also compare notes."""

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, by rank. Blocks."""

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""


class Owed(NamedTuple):
    """What a rank owes to the gradient of a parameter, of its shape: see `Exchange.owed`."""

    error: Tensor
    velocity: Tensor | None


def share(owed: Mapping[str, Owed], ranks: int) -> dict[str, Owed]:
    """What each of some ranks takes over of what all of them owe together."""
    return {n: Owed(o.error / ranks, None if o.velocity is None else o.velocity / ranks) for n, o in owed.items()}


@dataclass(eq=False)
class Bucket(Generic[Handle]):
    """Parameters that travel together."""

    names: list[str]
    parameters: list[Tensor]
    exchange: Exchange[Handle]
    missing: int = field(init=False)
    """Parameters whose gradients are not there yet in this step."""

    def __post_init__(self) -> None:
        self.missing = len(self.parameters)


@dataclass(eq=False)
class _Journey(Generic[Handle]):
    exchange: Exchange[Handle]
    parameters: list[Tensor]
    flight: Flight[Handle]
    copies: list[tuple[Tensor, Tensor]]
    """Gradients that are not contiguous, and the contiguous tensors that travel for them."""


class Session(Generic[Handle]):
    """All buckets of one optimizer.

    In the first step nothing leaves before all gradients are there: only then is it known which are sparse, and the
    ranks have compared what they hold. From the second step on a bucket leaves as soon as it is full. There is no
    thread: `ready` polls what is under way, `finish` waits for it. Where gradients are clipped, nothing leaves before
    all are there in any step.

    Parameters
    ----------
    name
        Prefix of all names of collectives, the same on all ranks.
    parameters
        Names and parameters in the order of registration.
    options, selection
        As the user chose them. Without a server compressor a bucket's replies are compressed as what is pushed.
    transport
        To the other ranks.
    units
        Of the gradients.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        options: Options,
        selection: Selection,
        transport: GroupTransport[Handle],
        units: Units | None = None,
    ) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.options = options
        self.selection = selection
        self.transport = transport
        self.units = Units() if units is None else units
        self.totals = Totals()
        self.dense_bytes = 0
        """Bytes of gradients that have stayed with Horovod's own allreduce."""
        self.started = False
        self.clips = options.max_norm is not None
        """Whether no gradient may leave before all are there."""
        self._names = {p: n for n, p in self.parameters}
        self._aside: dict[Tensor, list[Tensor]] = {}  # what is kept of frozen parameters
        self._changes = 0  # of compressors
        self._gradients_met = 0
        self._met: list[Tensor] = []  # in this step, where they are to be clipped
        self._arrived: set[Tensor] = set()  # and not yet under way
        self._noted: dict[Tensor, tuple[Tensor, int]] = {}  # gradients of this step as they were last seen
        self._journeys: list[_Journey[Handle]] = []
        self._landed: list[Exchange[Handle]] = []  # whose gradients the current stream may not read yet
        self.adopt(frozenset(), self.fill(frozenset()))

    def plan(self, sparse: Set[str]) -> list[Plan]:
        """The buckets, without the parameters whose gradients are sparse."""
        options = self.options
        return self.selection.plan(
            self.parameters, options.compressor, options.server_compressor, self.transport.shards, sparse
        )

    def fill(self, sparse: Set[str]) -> list[Bucket[Handle]]:
        """New buckets, with errors of zero, without the parameters whose gradients are sparse."""
        buckets = []
        name = f"{self.name}.change{self._changes}" if self._changes else self.name  # sizes under a name never change
        for b, plan in enumerate(self.plan(sparse)):
            options = replace(self.options, compressor=plan.compressor, server_compressor=plan.server_compressor)
            device = plan.parameters[0].device
            exchange = Exchange(b, f"{name}.bucket{b}", plan.layout, options, self.transport, device, self.totals)
            buckets.append(Bucket(plan.names, plan.parameters, exchange))
        return buckets

    def adopt(self, sparse: Set[str], buckets: list[Bucket[Handle]], hold_errors: bool = False) -> None:
        """Goes on with the buckets that `fill` made, which may hold errors already."""
        self._hold_errors = hold_errors
        self.sparse = frozenset(sparse)
        self.buckets = buckets
        self._aside.clear()
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}

    def covers(self, p: Tensor) -> bool:
        """Whether the gradient of a parameter goes through the exchange."""
        return p in self._bucket_of

    def meet(self, p: Tensor) -> bool:
        """Is told of each gradient, once a step. Returns whether it goes through the exchange.

        Raises
        ------
        ValueError
            A sparse gradient of a parameter that has had dense gradients, and an error to compensate, until now; or with
        momentum or clipping.
        """
        self._gradients_met += 1
        gradient = p.grad
        assert gradient is not None
        if self.options.momentum:
            require_dense(self._names[p], gradient, "momentum", self.options.momentum)
        if self.options.max_norm is not None:
            require_dense(self._names[p], gradient, "max_norm", self.options.max_norm)
            self._met.append(p)
        if gradient.is_sparse and self.covers(p):
            if self._hold_errors:
                raise ValueError(
                    f"DoubleSqueeze: the gradient of {self._names[p]} has become sparse after steps with dense gradients; "
                    "a parameter must have one or the other"
                )
            sparse = self.sparse | {self._names[p]}
            self.adopt(sparse, self.fill(sparse))
        if self.covers(p):
            if not p.requires_grad and p not in self._aside:
                self._put_aside(p)
            elif p.requires_grad and p in self._aside:
                self._put_back(p)
            return True
        if gradient.is_sparse:
            gradient = gradient._values()
        self.dense_bytes += gradient.numel() * gradient.element_size()
        return False

    @property
    def step(self) -> int:
        """How many have been taken, since training began."""
        return max((bucket.exchange.worker.step for bucket in self.buckets), default=0)

    def owed(self, by_all: bool = False) -> dict[str, Owed]:
        """What this rank owes to each parameter that is compressed, by name, or all ranks together, all of which call it.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        if self._arrived or self._journeys:
            raise RuntimeError(
                "DoubleSqueeze: gradients are under way; errors can be taken over between optimizer.step() and backward() alone"
            )
        self.put_back()
        result = {}
        for bucket in self.buckets:
            error, velocity = bucket.exchange.owed()
            if by_all:
                error = self.transport.sum(error, bucket.exchange.name + ".owed")
                velocity = velocity if velocity is None else self.transport.sum(velocity, bucket.exchange.name + ".velocity")
            for name, p, offset in zip(bucket.names, bucket.parameters, bucket.exchange.layout.offsets, strict=True):
                here = slice(offset, offset + p.numel())
                result[name] = Owed(error[here].view(p.shape), None if velocity is None else velocity[here].view(p.shape))
        return result

    def owe(self, owed: Mapping[str, Owed], step: int) -> None:
        """Takes over what `owed` said, of these parameters in other buckets or among other ranks. What is not there: zero."""
        for bucket in self.buckets:
            layout, device = bucket.exchange.layout, bucket.exchange.device
            error = torch.zeros(layout.numel, device=device)
            velocity = None if bucket.exchange.velocity is None else torch.zeros(layout.numel, device=device)
            for name, offset, numel in zip(bucket.names, layout.offsets, layout.numels, strict=True):
                if name in owed:
                    error[offset : offset + numel] = owed[name].error.to(device).view(-1)
                    u = owed[name].velocity
                    if velocity is not None and u is not None:
                        velocity[offset : offset + numel] = u.to(device).view(-1)
            bucket.exchange.owe(error, velocity, step)

    def level(self, owed: Mapping[str, Owed]) -> dict[str, Owed]:
        """Errors that are the same on all ranks, each a share of what they owe together; all of them call it."""
        result = {}
        for name, p in [(n, p) for n, p in self.parameters if self.covers(p)]:
            own = owed[name].error if name in owed else torch.zeros(p.shape, device=p.device)
            result[name] = Owed(self.transport.sum(own, f"{self.name}.{name}.owed") / self.transport.size, None)
        return result

    def change(self, options: Options) -> None:
        """Goes on with other compressors, in new buckets that owe what the old ones did; all ranks call it between two steps.

        The next step begins as the first one did: the ranks compare what they hold.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        owed, step = self.owed(), self.step
        if not options.worker_error:
            owed = self.level(owed)
        self.options = options
        self._changes += 1
        self.started = False
        self.adopt(self.sparse, self.fill(self.sparse), hold_errors=True)
        self.owe(owed, step)

    def rescale(self, change: Change) -> None:
        """Multiplies what is kept of each parameter, between two steps."""
        self.put_back()
        for bucket in self.buckets:
            bucket.exchange.rescale(change.scale, [change.rates.get(name, 1.0) for name in bucket.names])

    def _put_aside(self, p: Tensor) -> None:
        """What is kept of a parameter that is frozen now, and must not move, until it is trained again."""
        kept = self._kept(p)
        self._aside[p] = [part.clone() for part in kept]
        for part in kept:
            part.zero_()
        self._bucket_of[p].exchange.written()

    def _put_back(self, p: Tensor) -> None:
        for part, was in zip(self._kept(p), self._aside.pop(p), strict=True):
            part.copy_(was)
        self._bucket_of[p].exchange.written()

    def put_back(self) -> None:
        """What is kept of frozen parameters lies with all the rest until the next step."""
        for p in list(self._aside):
            self._put_back(p)

    def _kept(self, p: Tensor) -> list[Tensor]:
        bucket = self._bucket_of[p]
        i = next(i for i, q in enumerate(bucket.parameters) if q is p)
        return bucket.exchange.kept(i)

    def ready(self, p: Tensor) -> None:
        """The gradient of p is there. Sends its bucket if that was the last one, and never waits."""
        self._note(p)
        self._arrived.add(p)
        self._bucket_of[p].exchange.produced()
        if self.started and not self.clips:
            self._fill_up(p)
            self.poll()

    def _fill_up(self, p: Tensor) -> None:
        bucket = self._bucket_of[p]
        bucket.missing -= 1
        if not bucket.missing:
            self._launch(bucket)

    def poll(self) -> None:
        """Does what can be done without waiting."""
        for journey in self._journeys:
            if journey.flight.poll():
                with journey.exchange.beside():
                    for gradient, copy in journey.copies:
                        gradient.copy_(copy)
                self._landed.append(journey.exchange)
                for p in journey.parameters:  # its gradient has been written to
                    if p in self._noted:
                        self._noted[p] = self._noted[p][0], self._noted[p][0]._version
        self._journeys = [journey for journey in self._journeys if not journey.flight.landed]

    def finish(self, p: Tensor) -> Tensor:
        """The aggregated gradient of p. All parameters must have been `ready`."""
        self.depart()
        self.drain()
        if p in self._arrived:
            bucket = self._bucket_of[p]
            waits_for = [n for n, q in zip(bucket.names, bucket.parameters, strict=True) if q not in self._arrived]
            raise RuntimeError(f"DoubleSqueeze: the bucket of {self._names[p]} still waits for gradients of {waits_for}")
        assert p.grad is not None
        if p in self._aside:  # frozen, it must not move; 1-bit scales that it shares with others leave no zeros
            p.grad.zero_()
        return p.grad

    def depart(self) -> None:
        """Backward has ended: sends what has waited for that, all in the first step, and all where gradients are clipped.

        Raises
        ------
        ValueError
            In the first step: the ranks do not agree; the same on all of them.
        RuntimeError
            A gradient has been changed since it was `ready`.
        """
        self._require_untouched()
        self._noted.clear()  # from here on nobody but us has them
        waiting = []
        if not self.started:
            require_agreement(self.transport.gather_objects(self._description(), self.name + ".agreement"))
            self.started = self._hold_errors = True
            waiting = [p for bucket in self.buckets for p in bucket.parameters if p in self._arrived]
        if self._met:
            waiting = [p for p in self._met if p in self._arrived]
            assert self.options.max_norm is not None
            max_norm = self.options.max_norm * self.units.scale
            clip([(self._names[p], p.grad) for p in self._met if p.grad is not None], max_norm)
            self._met.clear()
        for p in waiting:
            self._fill_up(p)
            self.poll()

    def _note(self, p: Tensor) -> None:
        if p.grad is not None:
            self._noted[p] = p.grad, p.grad._version

    def _require_untouched(self) -> None:
        for p, (gradient, version) in self._noted.items():
            if p.grad is not gradient or gradient._version != version:
                raise changed_too_early(f"the gradient of {self._names[p]}")

    def drain(self) -> None:
        """Returns when nothing is under way.

        It naps where hvd.synchronize would spin on the core that Horovod needs: the longer it has waited, the longer,
        so that looking costs little and a late look delays the step by a few per cent of the wait at most.
        """
        start = time.perf_counter()
        passes = self.totals.pass_seconds
        told = 0.0
        try:
            while self._journeys:
                self.poll()
                if self._journeys:
                    waited = time.perf_counter() - start
                    if waited > told + 1.0:
                        told = waited
                        self.transport.waiting(waited, [journey.flight.awaited for journey in self._journeys])
                    time.sleep(min(max(waited / 16, _SHORTEST_NAP), _LONGEST_NAP))
        except BaseException:
            self._journeys.clear()  # a collective has failed: there is nothing to wait for
            raise
        for exchange in self._landed:
            exchange.join()
        self._landed.clear()
        self.totals.wait_seconds += time.perf_counter() - start - (self.totals.pass_seconds - passes)

    def abandon(self) -> None:
        """Forgets the step under way, as Horovod has: ``optimizer.load_state_dict`` in mid-step.

        Collectives that have begun are finished, since other ranks take part in them, and what they bring is dropped.
        """
        for journey in self._journeys:
            journey.flight.drop()
            journey.copies.clear()
        self.drain()
        self._arrived.clear()
        self._noted.clear()
        self._met.clear()
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def stats(self) -> dict[str, float]:
        """As `DoubleSqueeze.stats` says."""
        steps = self._gradients_met // max(1, len(self.parameters))
        ring = 2 * (self.transport.size - 1) / self.transport.size
        uncompressed = ring * (self.dense_bytes + steps * sum(
            p.numel() * p.element_size() for bucket in self.buckets for p in bucket.parameters
        ))  # fmt: skip
        sent = self.totals.bytes_sent + ring * self.dense_bytes
        per_step = {
            "compressed_bytes_sent": self.totals.bytes_sent,
            "compressed_bytes_received": self.totals.bytes_received,
            "dense_bytes_sent": ring * self.dense_bytes,
            "dense_bytes_received": ring * self.dense_bytes,
            "worker_pass_seconds": self.totals.worker_pass_seconds,
            "server_pass_seconds": self.totals.server_pass_seconds,
            "decode_seconds": self.totals.decode_seconds,
            "wait_seconds": self.totals.wait_seconds,
        }
        return {
            "steps": steps,
            **{key: value / max(1, steps) for key, value in per_step.items()},
            "compression_ratio": uncompressed / sent if sent else 1.0,
            "worker_error_norm": _norm([bucket.exchange.worker_error for bucket in self.buckets]),
            "server_error_norm": _norm([bucket.exchange.server_error for bucket in self.buckets]),
        }

    def _description(self) -> dict[str, Any]:
        return {
            "compressor": repr(self.options.compressor),
            "server_compressor": repr(self.options.server_compressor or self.options.compressor),
            "worker_error": self.options.worker_error,
            "server_error": self.options.server_error,
            "server": self.transport.server,
            "weight": self.options.weight,
            "momentum": self.options.momentum,
            "warmup_steps": self.options.warmup_steps,
            "max_norm": self.options.max_norm,
            "min_numel": self.selection.min_numel,
            "bucket_cap_mb": self.selection.bucket_cap_mb,
            "groups": [" ".join(names) for names in self.selection.groups],
            "loss scale": self.units.scale,
            "lr_aware": self.units.lr_aware,
            "parameters": [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self.parameters],
            "choice": [
                f"{name}: {self.selection.compressor(name, p, self.options.compressor)!r}"
                for name, p in (self.parameters if self.selection.choose is not None else [])
            ],
            "sparse parameters": sorted(self.sparse),
        }

    def _launch(self, bucket: Bucket[Handle]) -> None:
        travelling, copies = [], []
        bucket.exchange.gather([p.grad for p in bucket.parameters if p.grad is not None])
        for name, p in zip(bucket.names, bucket.parameters, strict=True):
            gradient = p.grad
            if gradient is None or gradient.device != bucket.exchange.device:
                found = "none" if gradient is None else str(gradient.device)
                raise ValueError(
                    f"DoubleSqueeze: expected a gradient of {name} on {bucket.exchange.device}, found {found}; "
                    "move the model before making the optimizer"
                )
            gradient = gradient.detach()
            travelling.append(gradient.contiguous())
            if not gradient.is_contiguous():
                copies.append((gradient, bucket.exchange.lend(travelling[-1])))
        self._journeys.append(_Journey(bucket.exchange, bucket.parameters, bucket.exchange.begin(travelling), copies))
        self._arrived.difference_update(bucket.parameters)
        bucket.missing = len(bucket.parameters)
