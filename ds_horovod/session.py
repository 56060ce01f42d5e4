"""The buckets of one optimizer, step after step: when a bucket leaves, and when its gradients are back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .attendance import Attendance
from .buckets import Buckets
from .first_step import compare
from .late import LateSteps
from .options import Options
from .pipeline import Pipeline
from .residual import Residual, keep, rescale
from .selection import COMPRESSIBLE, Selection
from .step import Bucket, Step, Uncompressed, changed_too_early
from .transport import GroupTransport, Handle
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
        self.unknown: set[Tensor] = {p for _, p in parameters}
        """Parameters that have had no gradient yet on this rank."""
        self.waits_for_ranks = False
        """Whether it is not known yet which ranks take part in the step, without which nothing leaves."""
        self.due: Step[Handle] | None = None
        """The step whose results the step under way gets; None: nothing is due, and its gradients become zero."""
        self._step: Step[Handle] | None = None
        super().__init__(name, parameters, selection, weight, transport, own_name=more_to_compare is not None)
        self.pipeline = Pipeline(transport, self.totals)
        self._hold_errors = False
        self.late: LateSteps[Handle] = LateSteps(self.options.staleness, self.pipeline, self._names, self.options.momentum)

    @property
    def held(self) -> bool:
        """Whether no gradient may leave before all are there: where they are clipped, and before the ranks have agreed."""
        return self.options.max_norm is not None or not self.started

    def adopt(self, sparse: Set[str], buckets: list[Bucket[Handle]], hold_errors: bool = False) -> None:
        """Goes on with the buckets that `fill` made, which may hold errors already. What late steps will bring is dropped."""
        self.late.drop()
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
        name, gradient = self._names[p], self.gradient_of(p)
        assert gradient is not None
        self._require_fits(name, gradient, self.bucket_of.get(p))
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
                if p.requires_grad == (p in self.frozen):
                    self.late.wait()  # what has been sent before is served with all of the errors
                self.frozen.update(p, self.bucket_of[p])
            return True
        if gradient.is_sparse:
            gradient = gradient._values()
        self.dense_bytes += gradient.numel() * gradient.element_size()
        return False

    def _require_fits(self, name: str, gradient: Tensor, bucket: Bucket[Handle] | None) -> None:
        """Raises ValueError for a gradient that an option, or its bucket, cannot take."""
        for option in ("momentum", "max_norm", "staleness"):
            value = getattr(self.options, option)
            if value:
                require_dense(name, gradient, option, value)
        if bucket is not None and (gradient.dtype not in COMPRESSIBLE or gradient.dtype != bucket.parameters[0].dtype):
            raise ValueError(
                f"DoubleSqueeze: the gradient of {name} is {gradient.dtype}, which it was not when the optimizer was made, and "
                "cannot be compressed; convert the model, as model.double() does, before making the optimizer"
            )

    def _begin_step(self) -> Step[Handle]:
        """From the second step on, ranks say first that they take part, and what is frozen; nothing leaves before.

        While late steps are under way all ranks take part (`hvd.join` is refused), so nobody waits for the others to say so.
        """
        label = self.late.label(self.step)
        name, parameters = f"{self.name}.ranks{label}", list(self.bucket_of)
        attendance = Attendance(self.transport, self.pipeline, name, parameters, self._may_freeze, ask=self.started)
        self.waits_for_ranks, self.due = attendance.pending and not self.late, None
        held = self.held or self.waits_for_ranks
        checks_values = self.options.max_norm is None and not self.started
        late = bool(self.options.staleness and self.buckets) and self.step >= self.options.sync_steps
        step = Step(self.buckets, self.pipeline, self.transport.in_order, held, self.units, attendance, checks_values)
        step.late, step.label = late, label
        return step

    def _learn_who_takes_part(self) -> None:
        step = self._step
        assert step is not None
        step.attendance.learn()
        self.waits_for_ranks = False
        complete = step.attendance.complete
        if not complete and self.options.momentum:
            missing = self.transport.size - step.attendance.ranks
            raise RuntimeError(
                f"DoubleSqueeze: {missing} ranks have called hvd.join() while others still train, which "
                f"momentum={self.options.momentum} cannot follow; call optimizer.step() on them, without backward()"
            )
        if not complete:
            step.late = False  # an allreduce takes its gradients, and they are there when it ends
        elif not self.held:
            step.release()

    def unsent(self) -> list[Tensor]:
        """Parameters whose gradients no exchange takes in this step, since ranks are missing; each is given once."""
        step = self._step
        if step is None or step.attendance.complete:
            return []
        left = list(step.gradients)
        for p in left:
            gradient = step.gradients.pop(p)
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
        if self.waits_for_ranks and self._step is not None and self._step.attendance.poll():
            self._learn_who_takes_part()
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
        if self.waits_for_ranks:
            self._learn_who_takes_part()
        if not self.started:
            self._begin(step)
        if self.options.max_norm is not None:
            found = ((self._names[p], self.gradient_of(p)) for p in step.admitted)
            gradients = [(name, gradient) for name, gradient in found if gradient is not None]
            clip(gradients, self.options.max_norm * self.units.scale)
        step.flushed = True
        if step.attendance.complete:
            step.release()

    def _begin(self, step: Step[Handle]) -> None:
        """In the first step: from the next one on, buckets leave during backward."""
        self.agree_on_name()
        more = self._more_to_compare() if self._more_to_compare else {}
        unknown = [self._names[p] for p in self.unknown]
        sparse, frozen, news = compare(self, more, unknown, [self._names[p] for p in step.attendance.frozen_everywhere])
        self.started = True
        if news:  # on all ranks alike: those of a host hand each other what they hold
            residuals, steps = Buckets.export_residual(self), self.step
            self.adopt(sparse, self.fill(sparse))
            self.import_residual(residuals, steps)
        self._hold_errors = True
        step.attendance.frozen_everywhere = {p for p in self.bucket_of if self._names[p] in frozen}

    def drain(self) -> None:
        """Returns when what is due in this step has arrived."""
        step = self._step
        if step is not None and step.flushed and not step.queued:
            if step.late and self.late.keeps_estimates:
                step.keep_estimate(self.gradient_of, but=self.bucket_of if self.options.momentum else ())
            self.due = self.late.queue(step)
        if self.due is not None:
            self.pipeline.drain(self.due.works)
            self.due.attendance.learn()

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

    def settle(self, others_finite: Callable[[], bool] = lambda: True) -> None:
        """Decodes what has waited until it is known whether a scaler of the loss will skip the step.

        Parameters
        ----------
        others_finite
            Whether all aggregated gradients are finite that no exchange takes; the same on all ranks.
        """
        step, due = self._step, self.due
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
                keep(self.bucket_of[p], p, gradient)

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
        if self.due is None or p in self.due.attendance.frozen_everywhere:
            # What is frozen must not move; 1-bit scales that it shares with others leave no zeros.
            gradient.zero_()
        return gradient

    def put_back(self, p: Tensor) -> None:
        """Makes what has arrived for a parameter wait, where its optimizer is given no gradient; on all ranks.

        Each rank adds it to its error, so that the mean of all is larger by just that. The gradient becomes zero. What is not
        finite is left out: the exchange has kept those elements in the errors.
        """
        gradient = self.finish(p)
        keep(self.bucket_of[p], p, gradient)
        gradient.zero_()

    def cancel(self) -> None:
        """Drops the step under way, as Horovod has: ``optimizer.load_state_dict`` in mid-step.

        Collectives that have begun are finished, since other ranks take part in them, and what they bring is dropped.
        """
        if self.waits_for_ranks:
            self._learn_who_takes_part()  # buckets leave then, as they have on ranks that have been quicker to learn it
        if self.pipeline.failed:
            self.late.abandon()  # they will never arrive
        step, self._step = self._step, None
        if step is not None and step.queued:
            step = None
        self.pipeline.cancel([] if step is None else step.works)
        if step is not None:
            step.attendance.learn()

    def drop(self) -> None:
        """Drops the step under way without waiting for other ranks, which may not take part any more."""
        self.pipeline.in_flight.clear()
        self.late.abandon()
        self._step = self.due = None
        self.waits_for_ranks = False

    # ---- between two steps

    def require_between_steps(self) -> None:
        """Raises RuntimeError while gradients are under way, but for those of steps that are late."""
        step = self._step
        if (step is not None and not step.flushed) or not all(self.late.has(work) for work in self.pipeline.in_flight):
            raise RuntimeError(
                "DoubleSqueeze: gradients are under way; errors can be read or replaced between optimizer.step() and "
                "backward() alone"
            )

    def export_residual(self, of_all: bool = False) -> dict[str, Residual]:
        """As `Buckets.export_residual`, with what late steps will bring. Raises RuntimeError while a step is under way."""
        self.require_between_steps()
        self.late.wait()
        return super().export_residual(of_all)

    def residual_in_flight(self, bucket: Bucket[Handle]) -> Tensor | None:
        """This rank's part of what late steps will bring of a bucket."""
        return self.late.residual_of(bucket)

    def import_residual(self, residuals: Mapping[str, Residual], step: int, alike: bool = False) -> None:
        """As `Buckets.import_residual`, in place of what late steps will bring, too."""
        self.late.drop()
        super().import_residual(residuals, step, alike)

    def restore_frozen(self) -> None:
        """As `Buckets.restore_frozen`. What has been sent of frozen parameters is served without their errors."""
        if self.frozen:
            self.late.wait()
        super().restore_frozen()

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
        self.late.rescale(change)
        if self._may_freeze and self._step is not None and not self._step.flushed:
            for p in self._step.gradients:
                self.frozen.update(p, self.bucket_of[p])
