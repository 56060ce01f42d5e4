"""Who takes part in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from .pipeline import Pipeline
from .transport import GroupTransport, Handle


class Attendance(Generic[Handle]):
    """Which ranks take part in a step, and what they have frozen: a small sum, on its way while backward runs.

    Parameters
    ----------
    transport, pipeline
        Of the session.
    name
        Of the sum.
    parameters
        Those that are compressed, in an order that is the same on all ranks.
    may_freeze
        Whether ``requires_grad`` says what is frozen.
    ask
        Whether the others are asked; otherwise they are taken to be like this rank until `frozen_everywhere` is told.
    """

    def __init__(
        self,
        transport: GroupTransport[Handle],
        pipeline: Pipeline[Handle],
        name: str,
        parameters: Sequence[Tensor],
        may_freeze: bool,
        ask: bool,
    ) -> None:
        self.ranks = transport.size
        """How many take part, once that is known: those that have called hvd.join() do not."""
        self.frozen_everywhere = {p for p in parameters if may_freeze and not p.requires_grad}
        """Parameters that are frozen on all ranks that take part, once that is known."""
        self._transport, self._pipeline, self._name, self._parameters = transport, pipeline, name, parameters
        self._sum = None
        if ask:
            own = torch.tensor([1.0, *(float(p in self.frozen_everywhere) for p in parameters)], dtype=torch.float32)
            self._sum = transport.begin_sum(own, name)

    @property
    def pending(self) -> bool:
        """Whether it is not known yet."""
        return self._sum is not None

    @property
    def complete(self) -> bool:
        """Whether all ranks take part."""
        return self.ranks == self._transport.size

    def poll(self) -> bool:
        """Whether `learn` would return at once."""
        return self._sum is None or self._transport.poll(self._sum)

    def learn(self) -> None:
        """Returns once it is known."""
        if self._sum is not None:
            total, self._sum = self._sum, None
            ranks, *frozen = self._pipeline.wait_for(total, self._name).tolist()
            self.ranks = round(ranks)
            self.frozen_everywhere = {p for p, n in zip(self._parameters, frozen, strict=True) if n == ranks}
