"""Steps whose results come late: what is under way between the step that sent it and the one that gets it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Generic

import torch
from torch import Tensor

from .pipeline import Pipeline
from .step import Bucket, Step
from .transport import Handle
from .units import Change


class LateSteps(Generic[Handle]):
    """The steps of an optimizer whose results are not due yet, in their order.

    What they will bring is part of the residual: a state change exports it with what the buckets hold, and drops it.

    Parameters
    ----------
    staleness
        By how many steps results come late.
    pipeline
        Where their exchanges are.
    names
        Of the parameters.
    momentum
        Of momentum correction: averages are sparse then, and hold what many steps have added up, so that this rank's push is
        the better estimate of them.
    """

    def __init__(self, staleness: int, pipeline: Pipeline[Handle], names: Mapping[Tensor, str], momentum: float = 0.0) -> None:
        self._staleness = staleness
        self._momentum = momentum
        self._pipeline = pipeline
        self._names = names
        self._steps: deque[Step[Handle]] = deque()
        self.keeps_estimates = False
        """Whether each step keeps this rank's gradients, as an estimate of the averages that it will bring."""
        self.changes = 0
        """How often a step has come or gone."""

    def __len__(self) -> int:
        return len(self._steps)

    def label(self, step: int) -> str:
        """Part of the names of collectives of a step, by its number: those of several are under way at once."""
        return f".{step % (self._staleness + 1)}" if self._staleness else ""

    def queue(self, step: Step[Handle]) -> Step[Handle] | None:
        """Takes a step whose buckets have left. Returns the one whose results are due now, if any."""
        step.queued = True
        self.changes += 1
        self._steps.append(step)
        return self._steps.popleft() if len(self._steps) > (self._staleness if step.late else 0) else None

    def has(self, work: object) -> bool:
        """Whether an exchange is that of a step here."""
        return any(work is own for step in self._steps for own in step.works)

    def estimates(self) -> list[dict[Tensor, Tensor]]:
        """Of the averages that are under way, unscaled; by step. Only that of the step that is due next may be used up."""
        is_due = len(self._steps) == self._staleness
        found = [step.estimate if i == 0 and is_due else dict(step.estimate) for i, step in enumerate(self._steps)]
        if self._momentum:
            found = [estimate | step.pushed() for estimate, step in zip(found, self._steps, strict=True)]
        return [estimate for estimate in found if estimate]

    def wait(self) -> None:
        """Returns once all is there."""
        for step in self._steps:
            self._pipeline.drain(step.works)

    def residual_of(self, bucket: Bucket[Handle]) -> Tensor | None:
        """This rank's part of what they will bring of a bucket, float32 ``(layout.numel,)``; None where none is."""
        works = [work for step in self._steps for work in step.works if work.bucket is bucket]
        if not works:
            return None
        self.wait()
        bucket.exchange.streams.wait_for_side()
        return torch.stack([bucket.exchange.residual_of(work) for work in works]).sum(0)

    def uncompressed(self) -> dict[str, Tensor]:
        """What they will bring of parameters that no exchange takes, by name, the same on all ranks; waits for it."""
        result: dict[str, Tensor] = {}
        for step in self._steps:
            for p, average in ({} if step.uncompressed is None else step.uncompressed.averages()).items():
                name = self._names[p]
                (factor,) = step.factors([name])
                wide = average.to(torch.promote_types(average.dtype, torch.float32))
                part = torch.where(wide.isfinite(), wide, 0.0) * factor
                result[name] = result[name] + part if name in result else part
        return result

    @property
    def arrived(self) -> bool:
        """Whether `drop` would return at once."""
        return all(step.attendance.poll() and all(work.arrived for work in step.works) for step in self._steps)

    def rescale(self, change: Change) -> None:
        """Units have changed."""
        for step in self._steps:
            step.rescale(change)

    def drop(self) -> None:
        """Forgets them, between two steps: their residual is somebody else's from here on."""
        for step in self._steps:
            self._pipeline.drain(step.works)
            self._pipeline.drop(step.works)
            step.attendance.learn()
        self.abandon()

    def abandon(self) -> None:
        """Forgets them without waiting for other ranks."""
        self._steps.clear()
        self.changes += 1
