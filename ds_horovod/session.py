"""The buckets of one optimizer, step after step: when a bucket leaves, and when its gradients are back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .agreement import require_agreement
from .buckets import Buckets, GroupTransport
from .exchange import Handle
from .options import Options
from .pipeline import Pipeline
from .residual import Residual, rescale
from .selection import COMPRESSIBLE, Selection
from .step import Bucket, Step, Uncompressed, changed_too_early
from .uncompressed import clip, require_dense
from .units import Change, Units

GradientOf = Callable[[Tensor], Tensor | None]
"""Where the gradient of a parameter is to be found."""


class Session(Buckets[Handle]):
    """The buckets of one optimizer, step after step.

    A step is `admit` and `ready` for each gradient, `flush` at the end of backward, and `finish` for each. In the first
    step nothing leaves before all gradients are there: only then is it known which are sparse, and the ranks have compared
    what they hold. From the second step on a bucket leaves as soon as it is full. There is no thread: `ready` polls what is
    under way, `finish` waits for it. Where gradients are clipped, nothing leaves before all are there in any step.

    With ``staleness`` s, a step gets what the step s before it has sent: `finish` waits for that one, which has had the time
    of s steps. In the first s steps nothing is due.

    Parameters
    ----------
    name, parameters, selection, weight, transport
        As for `Buckets`.
    units
        Of the gradients.
    more_to_compare
        Of an optimizer: what ranks compare before their first exchange beside what `describe` says. The name is but a prefix
        then, of one that the ranks agree on, since they may have made unequal numbers of optimizers.
    gradient_of
        Where the gradient of a parameter is to be found.
    may_freeze
        Whether ``requires_grad`` says what must not move; otherwise the caller does, by `put_back`.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        selection: Selection,
        weight: float,
        transport: GroupTransport[Handle],
        units: Units | None = None,
        more_to_compare: Callable[[], Mapping[str, Any]] | None = None,
        gradient_of: GradientOf = attrgetter("grad"),
        may_freeze: bool = True,
    ) -> None:
        self.gradient_of = gradient_of
        self._may_freeze = may_freeze
        self.units = Units() if units is None else units
        self.admitted = 0
        """Gradients so far, compressed or not."""
        self.dense_bytes = 0
        """Bytes of gradients that have stayed with the dense allreduce."""
        self.started = False
        """Whether the ranks have agreed, so that buckets may leave during backward."""
        self.skipped = False
        """Whether the last step is one that a scaler of the loss skips."""
        self._names = {p: n for n, p in parameters}
        self._more_to_compare = more_to_compare
        self.complete = True
        """Whether all ranks take part in the step: those that have called hvd.join() do not."""
        self.unknown: set[Tensor] = {p for _, p in parameters}
        """Parameters that have had no gradient yet on this rank."""
        self._taking_part: Handle | None = None  # the sum of who takes part, under way, without which nothing leaves
        self._step: Step[Handle] | None = None
        self._late: deque[Step[Handle]] = deque()  # whose results are not due yet, in their order
        self._due: Step[Handle] | None = None  # whose results the step under way gets
        super().__init__(name, parameters, selection, weight, transport, own_name=more_to_compare is not None)
        self.pipeline = Pipeline(transport, self.totals)

    @property
    def held(self) -> bool:
        """Whether no gradient may leave before all are there: where they are clipped, and before the ranks have agreed."""
        return self.options.max_norm is not None or not self.started

    def adopt(self, sparse: Set[str], buckets: list[Bucket[Handle]], hold_errors: bool = False) -> None:
        """Goes on with the buckets that `fill` made, which may hold errors already. What late steps will bring is dropped."""
        self.drop_late_steps()
        super().adopt(sparse, buckets)
        self._hold_errors = hold_errors
        if self._step is not None and not self._step.flushed:
            self._step.arrange(buckets)

    def admit(self, p: Tensor) -> bool:
        """Is told of each gradient, once a step. Returns whether it goes through the exchange.

        Raises
        ------
        ValueError
            A sparse gradient of a parameter that has had dense gradients, and an error to compensate, until now; or with
            momentum or clipping.
        """
        name, gradient, options = self._names[p], self.gradient_of(p), self.options
        assert gradient is not None
        if options.momentum:
            require_dense(name, gradient, "momentum", options.momentum)
        if options.max_norm is not None:
            require_dense(name, gradient, "max_norm", options.max_norm)
        if options.staleness:
            require_dense(name, gradient, "staleness", options.staleness)
        if self.covers(p):
            _require_dtype(name, gradient.dtype, self.bucket_of[p].parameters[0].dtype)
        if gradient.is_sparse and self.covers(p):
            if self._hold_errors:
                raise ValueError(
                    f"DoubleSqueeze: the gradient of {name} has become sparse after steps with dense gradients; "
                    "a parameter must have one or the other"
                )
            sparse = self.sparse | {name}
            self.adopt(sparse, self.fill(sparse))
        if self._step is None or self._step.flushed:
            self._step = self._begin_step()
        self._step.admitted.append(p)
        self.admitted += 1
        if self.covers(p):
            if self._may_freeze:
                self.frozen.update(p, self.bucket_of[p])
            return True
        if gradient.is_sparse:
            gradient = gradient._values()
        self.dense_bytes += gradient.numel() * gradient.element_size()
        return False

    def _begin_step(self) -> Step[Handle]:
        """From the second step on, ranks say first that they take part, and what is frozen; nothing leaves before.

        While late steps are under way all ranks take part (`hvd.join` is refused), so nobody waits for the others to say so.
        """
        self.complete, self._taking_part, self._due = True, None, None
        taking_part, label = None, self._label()
        if self.started:
            own = torch.tensor([1.0, *(float(not p.requires_grad) for p in self.bucket_of)], dtype=torch.float32)
            taking_part = self.transport.begin_sum(own, f"{self.name}.ranks{label}")
        if not self._late:
            self._taking_part, taking_part = taking_part, None
        held = self.held or self._taking_part is not None
        checks_values = self.options.max_norm is None and not self.started
        late = bool(self.options.staleness and self.buckets) and self.step >= self.options.sync_steps
        step = Step(self.buckets, self.pipeline, self.transport.in_order, held, self.units, checks_values, late, label)
        step.taking_part = taking_part
        step.frozen_everywhere = {p for p in self.bucket_of if self._may_freeze and not p.requires_grad}
        return step

    def _label(self) -> str:
        """Part of the names of collectives of the coming step: with staleness, those of several are under way at once."""
        staleness = self.options.staleness
        return f".{self.step % (staleness + 1)}" if staleness else ""

    def _await_who_takes_part(self, handle: Handle, step: Step[Handle]) -> float:
        """How many ranks take part in a step, which learns what is frozen."""
        ranks, *frozen = self.pipeline.wait_for(handle, self.name + ".ranks").tolist()
        step.frozen_everywhere = {p for p, count in zip(self.bucket_of, frozen, strict=True) if count == ranks}
        return float(ranks)

    def _note_who_takes_part(self) -> None:
        handle, self._taking_part = self._taking_part, None
        assert handle is not None and self._step is not None
        ranks = self._await_who_takes_part(handle, self._step)
        self.complete = ranks == self.transport.size
        if not self.complete and self.options.momentum:
            raise RuntimeError(
                f"DoubleSqueeze: {self.transport.size - ranks:.0f} ranks have called hvd.join() while others still train, "
                f"which momentum={self.options.momentum} cannot follow; call optimizer.step() on them, without backward()"
            )
        if not self.complete:
            self._step.late = False  # an allreduce takes its gradients, and they are there when it ends
        elif not self.held:
            self._step.release()

    def unsent(self) -> list[Tensor]:
        """Parameters whose gradients no exchange takes in this step, since ranks are missing; each is given once."""
        left = [] if self.complete or self._step is None else list(self._step.gradients)
        for p in left:
            gradient = self._step.gradients.pop(p)  # type: ignore[union-attr]
            self.dense_bytes += gradient.numel() * gradient.element_size()
        return left

    def missing_gradient(self, p: Tensor) -> Tensor:
        """A gradient of zeros, of the layout that the gradients of a parameter have."""
        if self._names[p] not in self.sparse:
            return torch.zeros_like(p)
        rows = torch.empty(1, 0, dtype=torch.int64, device=p.device)
        return torch.sparse_coo_tensor(rows, p.new_empty((0, *p.shape[1:])), p.shape)

    def ready(self, p: Tensor) -> None:
        """Takes over the gradient of an admitted parameter. Sends its bucket if that was the last one, and never waits."""
        gradient = self.gradient_of(p)
        assert self._step is not None and gradient is not None
        self._step.ready(p, gradient, self.bucket_of[p])
        if not self.held:
            self.poll()

    def poll(self) -> None:
        """Does what can be done without waiting."""
        if self._taking_part is not None and self.transport.poll(self._taking_part):
            self._note_who_takes_part()
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
        changed = step.changed(self.gradient_of)
        if changed is not None:
            raise changed_too_early(f"the gradient of {self._names[changed]}")
        if self._taking_part is not None:
            self._note_who_takes_part()
        if not self.started:
            self._agree()
        if self.options.max_norm is not None:
            found = ((self._names[p], self.gradient_of(p)) for p in step.admitted)
            gradients = [(name, gradient) for name, gradient in found if gradient is not None]
            clip(gradients, self.options.max_norm * self.units.scale)
        step.flushed = True
        if self.complete:
            step.release()

    def _agree(self) -> None:
        """In the first step: the ranks compare what they hold, and learn what only some of them have seen."""
        self.agree_on_name()
        own = describe(self) | dict(self._more_to_compare() if self._more_to_compare else {})
        own["unknown"] = sorted(self._names[p] for p in self.unknown)
        assert self._step is not None
        own["frozen"] = sorted(self._names[p] for p in self._step.frozen_everywhere)
        everyones = self.transport.gather_objects(own, self.name + ".agreement")
        frozen = set(own["frozen"]).intersection(*(other.pop("frozen") for other in everyones))
        sparse = sorted({name for other in everyones for name in other["sparse parameters"]})
        for other in everyones:  # what has no gradient on a rank is sparse there if it is elsewhere
            unknown = other.pop("unknown")
            other["sparse parameters"] = [n for n in sparse if n in other["sparse parameters"] or n in unknown]
        require_agreement(everyones, WAYS_OUT)
        self.started = True
        if self.sparse != set(sparse):
            residuals, step = Buckets.export_residual(self), self.step
            self.adopt(frozenset(sparse), self.fill(frozenset(sparse)))
            self.import_residual(residuals, step)
        self._hold_errors = True
        self._step.frozen_everywhere = {p for p in self.bucket_of if self._names[p] in frozen}

    def drain(self) -> None:
        """Returns when what is due in this step has arrived."""
        step = self._step
        if step is not None and step.flushed and not step.queued:
            step.queued = True
            self._late.append(step)
            if len(self._late) > (self.options.staleness if step.late else 0):
                self._due = self._late.popleft()
        due = self._due
        if due is not None:
            self.pipeline.drain(due.works)
            handle, due.taking_part = due.taking_part, None
            if handle is not None:
                self._await_who_takes_part(handle, due)

    def name_of(self, p: Tensor) -> str:
        """Of a parameter."""
        return self._names[p]

    def attach(self, uncompressed: Uncompressed) -> None:
        """Is told of the gradients of the step under way that no exchange takes, whose averages may come late."""
        assert self._step is not None
        self._step.uncompressed = uncompressed

    @property
    def label(self) -> str:
        """Part of the names of all collectives of the step under way."""
        return "" if self._step is None else self._step.label

    @property
    def late_steps(self) -> int:
        """How many are under way whose results are not due yet."""
        return len(self._late)

    @property
    def due(self) -> Step[Handle] | None:
        """The step whose results the step under way gets; None: nothing is due, and its gradients become zero."""
        return self._due

    def settle(self, others_finite: Callable[[], bool] = lambda: True) -> None:
        """Decodes what has waited until it is known whether a scaler of the loss will skip the step.

        Parameters
        ----------
        others_finite
            Whether all aggregated gradients are finite that no exchange takes; the same on all ranks.
        """
        step, due = self._step, self._due
        if step is None or step.settled:
            return
        step.settled, self.skipped = True, False
        if due is None:
            return
        held = [work for work in due.works if not work.done]
        self.skipped = self.units.may_skip and (any(work.overflows() for work in held) or not others_finite())
        if due.late:
            due.deliver(step.gradients, step)
        if held:
            self.pipeline.settle(held, self.skipped)
            self.pipeline.drain(held)
        due.works.clear()  # they hold on to gradients
        if due.late and self.skipped:
            for p, gradient in step.gradients.items():
                self._keep(p, gradient)

    def finish(self, p: Tensor) -> Tensor:
        """The aggregated gradient of p. All parameters must have been `ready`."""
        self.flush()
        self.drain()
        self.settle()
        assert self._step is not None
        waits_for = self._step.waits_for(self.bucket_of[p])
        if waits_for:
            raise RuntimeError(f"DoubleSqueeze: the bucket of {self._names[p]} still waits for gradients of {waits_for}")
        gradient = self._step.gradients.pop(p)  # from here on it is the optimizer's, which may free it
        if self._due is None or p in self._due.frozen_everywhere:
            # What is frozen must not move; 1-bit scales that it shares with others leave no zeros.
            gradient.zero_()
        return gradient

    def put_back(self, p: Tensor) -> None:
        """Makes what has arrived for a parameter wait, where its optimizer is given no gradient; on all ranks.

        Each rank adds it to its error, so that the mean of all is larger by just that. The gradient becomes zero. What is not
        finite is left out: the exchange has kept those elements in the errors.
        """
        gradient = self.finish(p)
        self._keep(p, gradient)
        gradient.zero_()

    def _keep(self, p: Tensor, gradient: Tensor) -> None:
        """Adds an aggregated gradient, the same on all ranks, to the errors, where it is finite."""
        bucket = self.bucket_of[p]
        exchange = bucket.exchange
        layout, own = exchange.layout, gradient.detach().reshape(-1).float()
        start, own = layout.offsets[bucket.names.index(self._names[p])], own.where(own.isfinite(), 0.0)
        if exchange.worker_error is not None:
            exchange.worker_error[start : start + own.numel()] += own / (self.weight * self.transport.size)
        elif exchange.server_error is not None:
            assert self.transport.serves is not None
            at = self.transport.serves * layout.shard_numel - start  # of the shard, in the parameter
            first, last = max(at, 0), min(at + layout.shard_numel, own.numel())
            if first < last:
                exchange.server_error[first - at : last - at] += own[first:last]
        exchange.streams.publish()

    def cancel(self) -> None:
        """Drops the step under way, as Horovod has: ``optimizer.load_state_dict`` in mid-step.

        Collectives that have begun are finished, since other ranks take part in them, and what they bring is dropped.
        """
        if self._taking_part is not None:
            self._note_who_takes_part()  # buckets leave then, as they have on ranks that have been quicker to learn it
        if self.pipeline.failed:
            self._late.clear()  # they will never arrive
        step = None if self._step is None or self._step.queued else self._step
        self.pipeline.cancel([] if step is None else step.works)
        if step is not None and step.taking_part is not None:
            self._await_who_takes_part(step.taking_part, step)
        self._step = None

    def drop(self) -> None:
        """Drops the step under way without waiting for other ranks, which may not take part any more."""
        self.pipeline.in_flight.clear()
        self._late.clear()
        self._step = self._taking_part = self._due = None

    # ---- between two steps

    def require_between_steps(self) -> None:
        """Raises RuntimeError while gradients are under way, but for those of steps that are late."""
        step, late = self._step, [work for step in self._late for work in step.works]
        if (step is not None and not step.flushed) or any(work not in late for work in self.pipeline.in_flight):
            raise RuntimeError(
                "DoubleSqueeze: gradients are under way; errors can be read or replaced between optimizer.step() and "
                "backward() alone"
            )

    def export_residual(self, of_all: bool = False) -> dict[str, Residual]:
        """As `Buckets.export_residual`, with what late steps will bring. Raises RuntimeError while a step is under way."""
        self.require_between_steps()
        self._await_late()
        return super().export_residual(of_all)

    def residual_in_flight(self, bucket: Bucket[Handle]) -> Tensor | None:
        """This rank's part of what late steps will bring of a bucket, float32 ``(layout.numel,)``; None where none is."""
        works = [work for step in self._late for work in step.works if work.bucket is bucket]
        if not works:
            return None
        self._await_late()
        bucket.exchange.streams.wait_for_side()
        return torch.stack([bucket.exchange.residual_of(work) for work in works]).sum(0)

    def uncompressed_in_flight(self) -> dict[str, Tensor]:
        """What late steps will bring of parameters that no exchange takes, by name, the same on all ranks; waits for it."""
        result: dict[str, Tensor] = {}
        for step in self._late:
            for p, average in ({} if step.uncompressed is None else step.uncompressed.averages()).items():
                name = self._names[p]
                (factor,) = step.factors([name])
                wide = average.to(torch.promote_types(average.dtype, torch.float32))
                part = torch.where(wide.isfinite(), wide, 0.0) * factor
                result[name] = result[name] + part if name in result else part
        return result

    def _await_late(self) -> None:
        for step in self._late:
            self.pipeline.drain(step.works)
            step.set_factors()

    def drop_late_steps(self) -> None:
        """Between two steps: forgets what has been sent and has not been due; its residual is somebody else's from here on."""
        for step in self._late:
            self.pipeline.drain(step.works)
            self.pipeline.drop(step.works)
            if step.taking_part is not None:
                self._await_who_takes_part(step.taking_part, step)
        self._late.clear()

    def import_residual(self, residuals: Mapping[str, Residual], step: int) -> None:
        """As `Buckets.import_residual`, in place of what late steps will bring, too."""
        self.drop_late_steps()
        super().import_residual(residuals, step)

    def restart(self, options: Options) -> None:
        """As `Buckets.restart`. The next step begins as the first one did: the ranks compare what they hold."""
        super().restart(options)
        self.started, self._hold_errors = False, True

    def rescale(self, change: Change) -> None:
        """Multiplies what is held of each parameter; before a bucket of the step has left."""
        self.restore_frozen()
        for bucket in self.buckets:
            rates = [change.rates.get(name, 1.0) for name in bucket.names]
            rescale(bucket, change.scale, rates, self.units.scale)
        for step in self._late:
            step.rescale(change)
        if self._may_freeze and self._step is not None and not self._step.flushed:
            for p in self._step.gradients:
                self.frozen.update(p, self.bucket_of[p])


def _require_dtype(name: str, dtype: torch.dtype, of_bucket: torch.dtype) -> None:
    if dtype not in COMPRESSIBLE or dtype != of_bucket:
        raise ValueError(
            f"DoubleSqueeze: the gradient of {name} is {dtype}, which it was not when the optimizer was made, and cannot "
            "be compressed; convert the model, as model.double() does, before making the optimizer"
        )


WAYS_OUT = {
    "weights": "Replicas must start with equal weights. With Horovod, call hvd.broadcast_parameters(model.state_dict(), "
    "root_rank=0) on all ranks, as the last thing before training: hvd.broadcast_optimizer_state may change weights, where "
    "weight decay is on. DistributedDataParallel broadcasts them when it is made: change them before that. What is meant to "
    "differ must not be among the optimizer's parameters.",
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
