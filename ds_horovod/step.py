"""The gradients of one step: which are there, and which buckets have left."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor

from .attendance import Attendance
from .checksum import digest
from .exchange import Exchange, InFlight
from .pipeline import Pipeline
from .transport import Handle
from .units import Change, Units


@dataclass(eq=False)
class Bucket(Generic[Handle]):
    """Parameters that travel together."""

    names: list[str]
    parameters: list[Tensor]
    exchange: Exchange[Handle]


def changed_too_early(what: str) -> RuntimeError:
    """The error for gradients that are no longer those that left."""
    return RuntimeError(
        f"DoubleSqueeze: {what} was changed after backward() and before synchronize(), while it may have been under way. "
        "Call optimizer.synchronize() first, then change gradients (scaler.unscale_, clip_grad_norm_), then step inside "
        "`with optimizer.skip_synchronize()`"
    )


class Uncompressed(Protocol):
    """The gradients of a step that no exchange takes, on their way."""

    def averages(self) -> Mapping[Tensor, Tensor]:
        """The aggregated gradient of each parameter; waits for them."""


class Step(Generic[Handle]):
    """One step of an optimizer. Its exchanges are in the pipeline, where those of earlier steps may still be.

    Parameters
    ----------
    buckets
        All of them, in an order that is the same on all ranks.
    pipeline
        Where exchanges go.
    in_order
        Whether buckets must leave in their order, as `Transport.in_order` says.
    held
        Whether no bucket leaves before `release`.
    units
        Of the gradients: where a scaler of the loss may skip the step, nothing is decoded before it is known whether.
    attendance
        Who takes part in it.
    checks_values
        Whether a change of a gradient is found by its values too, which costs a pass: through ``p.grad.data`` no version tells.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket[Handle]],
        pipeline: Pipeline[Handle],
        in_order: bool,
        held: bool,
        units: Units,
        attendance: Attendance[Handle],
        checks_values: bool = False,
    ) -> None:
        self.gradients: dict[Tensor, Tensor] = {}
        """The gradient of each parameter that has one, as it was handed over."""
        self.admitted: list[Tensor] = []
        """Parameters with a gradient, whether it is compressed or not."""
        self.flushed = False
        """Whether backward has ended."""
        self.queued = False
        """Whether it waits for the step that gets its results, or has been that one itself."""
        self.late = False
        """Whether what it brings is written to the gradients of a later step, by `deliver`."""
        self.label = ""
        """As for `InFlight`."""
        self.works: list[_BucketInFlight[Handle]] = []
        """Its exchanges, once they have begun."""
        self.estimate: dict[Tensor, Tensor] = {}
        """Of the averages that it will bring, of a step that is late; see `keep_estimate`."""
        self._scale_then = 1.0
        self.uncompressed: Uncompressed | None = None
        """The rest, of a step that is late."""
        self.attendance = attendance
        self.scale = 1.0
        """By what the loss scale has changed since: new over old."""
        self.rates: dict[str, float] = {}
        """By what to multiply what it brings of a parameter for the sake of its learning rate."""
        self._pipeline = pipeline
        self._in_order = in_order
        self._held = held
        self._units = units
        self.settled = False
        """Whether it is known if a scaler of the loss will skip the step."""
        self._checks_values = checks_values
        self._values: dict[Tensor, str] = {}
        self._seen: dict[Tensor, int] = {}  # the versions of gradients that nobody else may change
        self.arrange(buckets)

    def arrange(self, buckets: Sequence[Bucket[Handle]]) -> None:
        """Goes on with other buckets; only before any has left."""
        self.gradients = {p: self.gradients[p] for bucket in buckets for p in bucket.parameters if p in self.gradients}
        self._missing = {bucket: {p for p in bucket.parameters if p not in self.gradients} for bucket in buckets}

    def ready(self, p: Tensor, gradient: Tensor, bucket: Bucket[Handle]) -> None:
        """Takes over the gradient of a parameter. Sends its bucket if that was the last one, and never waits."""
        self.gradients[p] = gradient
        if gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size():  # slices share their version
            self._seen[p] = gradient._version
        if self._checks_values:
            self._values[p] = digest([("", gradient)])
        bucket.exchange.streams.mark_ready()
        self._missing[bucket].discard(p)
        if not self._held:
            self._launch_full(bucket)

    def release(self) -> None:
        """Sends all buckets that are full."""
        self._held = False
        for bucket in list(self._missing):
            self._launch_full(bucket)

    def _launch_full(self, bucket: Bucket[Handle]) -> None:
        bucket = next(iter(self._missing), bucket) if self._in_order else bucket
        while self._missing.get(bucket, True) == set():  # full, and not under way already
            self._launch(bucket)
            self._pipeline.poll()
            bucket = next(iter(self._missing), bucket) if self._in_order else bucket

    def _launch(self, bucket: Bucket[Handle]) -> None:
        self._pipeline.poll()  # nothing may begin where something has failed
        gradients = [self.gradients[p] for p in bucket.parameters]
        device = bucket.exchange.device
        for name, gradient in zip(bucket.names, gradients, strict=True):
            if gradient.device != device:
                raise ValueError(
                    f"DoubleSqueeze: expected a gradient of {name} on {device}, found {gradient.device}; "
                    "move the model before making the optimizer"
                )
        del self._missing[bucket]
        bucket.exchange.streams.wait_for_producers(gradients)
        work = _BucketInFlight(self, bucket, gradients, self._units.may_skip)
        self.works.append(work)
        self._pipeline.add(work)

    def deliver(self, gradients: Mapping[Tensor, Tensor], writer: Step[Handle]) -> None:
        """Says where what it brings is to be written to: to the gradients of the step that is its `writer`."""
        for work in self.works:
            work.write_to(writer, [gradients[p] for p in work.bucket.parameters])

    def rescale(self, change: Change) -> None:
        """Units have changed while it is under way."""
        self.scale *= change.scale
        for name, rate in change.rates.items():
            self.rates[name] = self.rates.get(name, 1.0) * rate

    def factors(self, names: Sequence[str]) -> list[float]:
        """By what to multiply what it brings of some parameters."""
        return [self.scale * self.rates.get(name, 1.0) for name in names]

    def keep_estimate(self, gradient_of: Callable[[Tensor], Tensor | None], but: Container[Tensor] = ()) -> None:
        """Takes this rank's gradients, unscaled, but some, for what their averages will be; none where one is not finite."""
        self._scale_then = self._units.scale
        gradients = [(p, gradient_of(p)) for p in self.admitted if p not in but]
        own = {p: gradient.detach() / self._units.scale for p, gradient in gradients if gradient is not None}
        norms = torch._foreach_norm(list(own.values())) if own else ()
        self.estimate = own if all(bool(norm.isfinite()) for norm in norms) else {}

    def pushed(self) -> dict[Tensor, Tensor]:
        """What this rank has pushed, unscaled, by parameter; nothing where it is not finite."""
        result = {}
        for work in self.works:
            if work.sent is not None:
                for p, values in zip(work.bucket.parameters, work.sent.values(work.exchange.whole), strict=True):
                    finite = values.where(values.isfinite(), 0.0) / self._scale_then
                    result[p] = finite.view(p.shape).to(p.dtype)
        return result

    def changed(self, gradient_of: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """A parameter whose gradient is no longer what was handed over; from here on nobody else may have them."""
        for p, gradient in self.gradients.items():
            if gradient_of(p) is not gradient or gradient._version != self._seen.get(p, gradient._version):
                return p
        for p, values in self._values.items():
            if digest([("", self.gradients[p])]) != values:
                return p
        self._seen.clear()
        self._values.clear()
        return None

    def note_written(self, bucket: Bucket[Handle]) -> None:
        """The aggregated gradients of a bucket have been written."""
        for p in bucket.parameters:
            if p in self._seen:
                self._seen[p] = self.gradients[p]._version

    def waits_for(self, bucket: Bucket[Handle]) -> list[str]:
        """The names of parameters without which a bucket cannot leave; none if it has left."""
        missing = self._missing.get(bucket, set())
        return [name for name, p in zip(bucket.names, bucket.parameters, strict=True) if p in missing]


class _BucketInFlight(InFlight[Handle]):
    """The exchange of a bucket of parameters, whose gradients may not be contiguous."""

    def __init__(self, step: Step[Handle], bucket: Bucket[Handle], gradients: Sequence[Tensor], held: bool) -> None:
        self.bucket = bucket
        self._sent_by = self._written_by = step
        self._gradients = [] if step.late else gradients
        dense = self._contiguous(gradients)
        super().__init__(bucket.exchange, dense, None if step.late else dense, held, step.label)

    def _contiguous(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        dense = [gradient.detach().contiguous() for gradient in gradients]
        for gradient, copy in zip(gradients, dense, strict=True):
            if not gradient.is_contiguous():
                self.bucket.exchange.streams.record_stream(copy)
        return dense

    @property
    def factors(self) -> Sequence[float]:
        return self._sent_by.factors(self.bucket.names)

    def write_to(self, step: Step[Handle], gradients: Sequence[Tensor]) -> None:
        """Says to which gradients of which step a late step is to be written."""
        self._written_by, self._gradients = step, gradients
        self.destination = self._contiguous(gradients)

    def finish(self) -> None:
        if self.cancelled:
            return
        for gradient, result in zip(self._gradients, self.destination, strict=True):
            if not gradient.is_contiguous():
                gradient.detach().copy_(result)
        self._written_by.note_written(self.bucket)
