"""The buckets of one optimizer, step after step: when a bucket leaves, and when its gradients are back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from . import residual
from .agreement import require_agreement
from .exchange import Exchange, Handle, Totals, Transport
from .options import Options
from .pipeline import Pipeline
from .residual import Frozen, Residual
from .selection import COMPRESSIBLE, Plan, Selection
from .step import Bucket, Step, changed_too_early
from .uncompressed import clip, require_dense
from .units import Change, Units


class GroupTransport(Transport[Handle], Protocol[Handle]):
    """A transport that can also compare notes."""

    ranks: list[int]
    """All ranks of the group, as the user counts them."""

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's plain value, by rank. Blocks."""

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Of all ranks' tensors. Blocks."""

    def unique_name(self, prefix: str) -> str:
        """A name for collectives that begins so, is the same on all ranks, and stands for nothing else. Blocks."""


class Session(Generic[Handle]):
    """All buckets of one optimizer.

    A step is `admit` and `ready` for each gradient, `flush` at the end of backward, and `finish` for each. In the first
    step nothing leaves before all gradients are there: only then is it known which are sparse, and the ranks have compared
    what they hold. From the second step on a bucket leaves as soon as it is full. There is no thread: `ready` polls what is
    under way, `finish` waits for it. Where gradients are clipped, nothing leaves before all are there in any step.

    Parameters
    ----------
    name
        Prefix of all names of collectives, the same on all ranks.
    parameters
        Names and parameters in the order of registration.
    selection
        What is compressed, and how, as the user chose.
    weight
        1 / ranks for an average, 1 for a sum.
    transport
        To the other ranks.
    units
        Of the gradients.
    own_name
        Whether the name is but the beginning of a name of its own, on which the ranks agree before their first collective.
    more_to_compare
        What ranks compare before their first exchange beside what `describe` says.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        selection: Selection,
        weight: float,
        transport: GroupTransport[Handle],
        units: Units | None = None,
        own_name: bool = False,
        more_to_compare: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.selection = selection
        self.weight = weight
        self.transport = transport
        self.units = Units() if units is None else units
        self.totals = Totals()
        self.pipeline = Pipeline(transport, self.totals)
        self.admitted = 0
        """Gradients so far, compressed or not."""
        self.dense_bytes = 0
        """Bytes of gradients that have stayed with the dense allreduce."""
        self.started = False
        """Whether the ranks have agreed, so that buckets may leave during backward."""
        self.skipped = False
        """Whether the last step is one that a scaler of the loss skips."""
        self._names = {p: n for n, p in self.parameters}
        self._frozen = Frozen()
        self._changes = 0  # of compressors
        self._wants_own_name = own_name
        self._more_to_compare = more_to_compare
        self._step: Step[Handle] | None = None
        self.adopt(frozenset(), self.fill(frozenset()))

    @property
    def options(self) -> Options:
        """As the user chose them."""
        return self.selection.options

    @property
    def held(self) -> bool:
        """Whether no gradient may leave before all are there: where they are clipped, and before the ranks have agreed."""
        return self.options.max_norm is not None or not self.started

    @property
    def step(self) -> int:
        """How many have been taken, since training began."""
        return max((bucket.exchange.worker.step for bucket in self.buckets), default=0)

    # ---- buckets

    def plan(self, sparse: Set[str]) -> list[Plan]:
        """The buckets, without the parameters whose gradients are sparse."""
        return self.selection.plan(self.parameters, self.transport.shards, sparse)

    def fill(self, sparse: Set[str]) -> list[Bucket[Handle]]:
        """New buckets, with errors of zero, without the parameters whose gradients are sparse."""
        buckets = []
        for b, plan in enumerate(self.plan(sparse)):
            device, name = plan.parameters[0].device, self._name_of(b)
            exchange = Exchange(b, name, plan.layout, plan.options, self.weight, self.transport, device, self.totals)
            buckets.append(Bucket(plan.names, plan.parameters, exchange))
        return buckets

    def _name_of(self, bucket: int) -> str:
        change = f".change{self._changes}" if self._changes else ""  # sizes under a name never change
        return f"{self.name}{change}.bucket{bucket}"

    def agree_on_name(self) -> None:
        """Before the first collective: the ranks may have made unequal numbers of optimizers. All ranks call it."""
        if self._wants_own_name:
            self.name = self.transport.unique_name(self.name)
            self._wants_own_name = False
            for bucket in self.buckets:
                bucket.exchange.name = self._name_of(bucket.exchange.bucket)

    def adopt(self, sparse: Set[str], buckets: list[Bucket[Handle]], hold_errors: bool = False) -> None:
        """Goes on with the buckets that `fill` made, which may hold errors already."""
        self._hold_errors = hold_errors
        self.sparse = frozenset(sparse)
        self.buckets = buckets
        self._frozen.forget()
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}
        if self._step is not None and not self._step.flushed:
            self._step.arrange(buckets)

    def covers(self, p: Tensor) -> bool:
        """Whether the gradient of a parameter goes through the exchange."""
        return p in self._bucket_of

    # ---- one step

    def admit(self, p: Tensor) -> bool:
        """Is told of each gradient, once a step. Returns whether it goes through the exchange.

        Raises
        ------
        ValueError
            A sparse gradient of a parameter that has had dense gradients, and an error to compensate, until now; or with
            momentum or clipping.
        """
        name, gradient, options = self._names[p], p.grad, self.options
        assert gradient is not None
        if options.momentum:
            require_dense(name, gradient, "momentum", options.momentum)
        if options.max_norm is not None:
            require_dense(name, gradient, "max_norm", options.max_norm)
        if self.covers(p):
            self._require_dtype(name, gradient.dtype, self._bucket_of[p].parameters[0].dtype)
        if gradient.is_sparse and self.covers(p):
            if self._hold_errors:
                raise ValueError(
                    f"DoubleSqueeze: the gradient of {name} has become sparse after steps with dense gradients; "
                    "a parameter must have one or the other"
                )
            sparse = self.sparse | {name}
            self.adopt(sparse, self.fill(sparse))
        if self._step is None or self._step.flushed:
            self._step = Step(self.buckets, self.pipeline, self.transport.in_order, self.held, self.units)
        self._step.admitted.append(p)
        self.admitted += 1
        if self.covers(p):
            self._frozen.update(p, self._bucket_of[p])
            return True
        if gradient.is_sparse:
            gradient = gradient._values()
        self.dense_bytes += gradient.numel() * gradient.element_size()
        return False

    def _require_dtype(self, name: str, dtype: torch.dtype, of_bucket: torch.dtype) -> None:
        if dtype not in COMPRESSIBLE or dtype != of_bucket:
            raise ValueError(
                f"DoubleSqueeze: the gradient of {name} is {dtype}, which it was not when the optimizer was made, and cannot "
                "be compressed; convert the model, as model.double() does, before making the optimizer"
            )

    def ready(self, p: Tensor) -> None:
        """Takes over the gradient of an admitted parameter. Sends its bucket if that was the last one, and never waits."""
        assert self._step is not None
        self._step.ready(p, self._bucket_of[p])
        if not self.held:
            self.poll()

    def poll(self) -> None:
        """Does what can be done without waiting."""
        self.pipeline.poll()

    def flush(self) -> None:
        """Backward has ended: sends what has waited for that, all in the first step, and all where gradients are clipped.

        Raises
        ------
        ValueError
            In the first step: the ranks do not agree; the same on all of them.
        RuntimeError
            A gradient has been changed since it was `ready`.
        """
        step = self._step
        if step is None or step.flushed:
            return
        changed = step.changed()
        if changed is not None:
            raise changed_too_early(f"the gradient of {self._names[changed]}")
        if not self.started:
            self.agree_on_name()
            own = {**describe(self), **self._more_to_compare()}
            require_agreement(self.transport.gather_objects(own, self.name + ".agreement"), WAYS_OUT)
            self.started = self._hold_errors = True
        if self.options.max_norm is not None:
            gradients = [(self._names[p], p.grad) for p in step.admitted if p.grad is not None]
            clip(gradients, self.options.max_norm * self.units.scale)
        step.flushed = True
        step.release()

    def drain(self) -> None:
        """Returns when no collective is under way."""
        self.pipeline.drain()

    def settle(self, others_finite: Callable[[], bool] = lambda: True) -> None:
        """Decodes what has waited until it is known whether a scaler of the loss will skip the step.

        Parameters
        ----------
        others_finite
            Whether all aggregated gradients are finite that no exchange takes; the same on all ranks.
        """
        step, held = self._step, self.pipeline.in_flight
        if step is None or step.settled:
            return
        step.settled = True
        self.skipped = self.units.may_skip and (any(work.overflows for work in held) or not others_finite())
        if held:
            self.pipeline.settle(self.skipped)
            self.drain()

    def finish(self, p: Tensor) -> Tensor:
        """The aggregated gradient of p. All parameters must have been `ready`."""
        self.flush()
        self.drain()
        self.settle()
        assert self._step is not None
        waits_for = self._step.waits_for(self._bucket_of[p])
        if waits_for:
            raise RuntimeError(f"DoubleSqueeze: the bucket of {self._names[p]} still waits for gradients of {waits_for}")
        gradient = self._step.gradients.pop(p)  # from here on it is the optimizer's, which may free it
        if p in self._frozen:  # it must not move; 1-bit scales that it shares with others leave no zeros
            gradient.zero_()
        return gradient

    @property
    def has_left(self) -> bool:
        """Whether a bucket of the step under way has left."""
        return self._step is not None and not self._step.flushed and self._step.launched

    def cancel(self) -> None:
        """Drops the step under way, as Horovod has: ``optimizer.load_state_dict`` in mid-step.

        Collectives that have begun are finished, since other ranks take part in them, and what they bring is dropped.
        """
        self.pipeline.cancel()
        self._step = None

    def abandon(self) -> None:
        """Drops the step under way without waiting for other ranks, which may not take part any more."""
        self.pipeline.in_flight.clear()
        self._step = None

    # ---- between two steps

    def require_between_steps(self) -> None:
        """Raises RuntimeError while gradients are under way."""
        step = self._step
        if self.pipeline.in_flight or (step is not None and not step.flushed):
            raise RuntimeError(
                "DoubleSqueeze: gradients are under way; errors can be read or replaced between optimizer.step() and "
                "backward() alone"
            )

    def export_residual(self, of_all: bool = False) -> dict[str, Residual]:
        """The residual of this rank, or of all ranks together, which all call it, for each parameter that is compressed.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        self.require_between_steps()
        self.restore_frozen()
        if of_all:
            self.agree_on_name()
        result: dict[str, Residual] = {}
        for bucket in self.buckets:
            error, velocity = residual.export_residual(bucket.exchange)
            if of_all:
                name = bucket.exchange.name
                error = self.transport.sum(error, name + ".residual")
                velocity = velocity if velocity is None else self.transport.sum(velocity, name + ".velocity")
            result |= residual.by_parameter(bucket, error, velocity)
        return result

    def import_residual(self, residuals: Mapping[str, Residual], step: int) -> None:
        """Takes over residuals of these parameters from other buckets or ranks. What is not there is zero."""
        for bucket in self.buckets:
            residual.import_residual(bucket.exchange, *residual.by_bucket(bucket, residuals), step)

    def restart(self, options: Options) -> None:
        """Goes on with other compressors, in new buckets whose errors are zero, between two steps.

        The next step begins as the first one did: the ranks compare what they hold.
        """
        self.selection = replace(self.selection, options=options)
        self._changes += 1
        self.started = False
        self.adopt(self.sparse, self.fill(self.sparse), hold_errors=True)

    def rescale(self, change: Change) -> None:
        """Multiplies what is held of each parameter; before a bucket of the step has left."""
        self.restore_frozen()
        for bucket in self.buckets:
            rates = [change.rates.get(name, 1.0) for name in bucket.names]
            residual.rescale(bucket, change.scale, rates, self.units.scale)
        if self._step is not None and not self._step.flushed:
            for p in self._step.gradients:
                self._frozen.update(p, self._bucket_of[p])

    def restore_frozen(self) -> None:
        """What is held of frozen parameters lies with all the rest until the next step."""
        self._frozen.restore_all()


WAYS_OUT = {
    "weights": "Replicas must start with equal weights. Call hvd.broadcast_parameters(model.state_dict(), root_rank=0) on all "
    "ranks, as the last thing before training: hvd.broadcast_optimizer_state may change weights, where weight decay is on. "
    "What is meant to differ must not be among the optimizer's parameters.",
    "loaded state": "Where one rank has loaded a state, call optimizer.double_squeeze.broadcast_state(root_rank=...) on all "
    "ranks, once the optimizer is made; or load on all ranks.",
}
"""What to do where ranks do not agree."""


def describe(session: Session[Any]) -> dict[str, Any]:
    """What ranks compare before their first exchange, as plain values."""
    options, selection = session.options, session.selection
    choices = session.parameters if options.choose is not None else []
    return {
        **options.description(),
        "server": session.transport.server,
        "weight": session.weight,
        "groups": [" ".join(names) for names in selection.groups],
        "loss scale": session.units.scale,
        "parameters": [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in session.parameters],
        "choice": [f"{name}: {selection.compressor(name, p)!r}" for name, p in choices],
        "sparse parameters": sorted(session.sparse),
        "step": session.step,
    }
