"""The buckets of one optimizer, and what they hold between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Generic

from torch import Tensor

from . import residual
from .exchange import Exchange, Totals
from .options import Options
from .residual import Frozen, Residual
from .selection import Plan, Selection
from .step import Bucket
from .transport import GroupTransport, Handle
from .units import LARGEST


class Buckets(Generic[Handle]):
    """Parameters of one optimizer in buckets, each with its exchange.

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
    own_name
        Whether the name is but the beginning of a name of its own, on which the ranks agree before their first collective.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        selection: Selection,
        weight: float,
        transport: GroupTransport[Handle],
        own_name: bool = False,
    ) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.selection = selection
        self.weight = weight
        self.transport = transport
        self.totals = Totals()
        self.frozen = Frozen()
        self._wants_own_name = own_name
        self._changes = 0  # of compressors
        Buckets.adopt(self, frozenset(), self.fill(frozenset()))

    @property
    def options(self) -> Options:
        """As the user chose them."""
        return self.selection.options

    @property
    def step(self) -> int:
        """How many have been taken, since training began."""
        return max((bucket.exchange.steps for bucket in self.buckets), default=0)

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

    def adopt(self, sparse: Set[str], buckets: list[Bucket[Handle]]) -> None:
        """Goes on with the buckets that `fill` made."""
        self.sparse = frozenset(sparse)
        self.buckets = buckets
        self.frozen.forget()
        self.bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}

    def covers(self, p: Tensor) -> bool:
        """Whether the gradient of a parameter goes through the exchange."""
        return p in self.bucket_of

    def export_residual(self, of_all: bool = False) -> dict[str, Residual]:
        """The residual of this rank, or of all ranks together, which all call it, for each parameter that is compressed."""
        self.restore_frozen()
        if of_all:
            self.agree_on_name()
        result: dict[str, Residual] = {}
        for bucket in self.buckets:
            error, velocity = residual.export_residual(bucket.exchange)
            in_flight = self.residual_in_flight(bucket)
            if in_flight is not None:
                error[bucket.exchange.span] += in_flight
                error.clamp_(-LARGEST, LARGEST)
            if of_all:
                name = bucket.exchange.name
                error = self.transport.sum(error, name + ".residual")
                velocity = velocity if velocity is None else self.transport.sum(velocity, name + ".velocity")
            result |= residual.by_parameter(bucket, error, velocity)
        return result

    def residual_in_flight(self, bucket: Bucket[Handle]) -> Tensor | None:
        """What `export_residual` has to add to what a bucket holds."""
        return None

    def import_residual(self, residuals: Mapping[str, Residual], step: int, alike: bool = False) -> None:
        """Takes over residuals of these parameters from other buckets or ranks. What is not there is zero.

        In two levels a rank holds what all ranks of its host are given of its slice, so that all ranks must call this.

        Parameters
        ----------
        residuals
            Of this rank, by name of parameter.
        step
            How many have been taken.
        alike
            Whether all ranks are given the same, and no collective is needed.
        """
        for bucket in self.buckets:
            error, velocity = residual.by_bucket(bucket, residuals)
            error = self._of_host(error, bucket.exchange.name + ".error", alike)
            if velocity is not None:
                velocity = self._of_host(velocity, bucket.exchange.name + ".velocity", alike)
            residual.import_residual(bucket.exchange, error, velocity, step)

    def _of_host(self, array: Tensor, name: str, alike: bool) -> Tensor:
        host = self.transport.host
        if host is None:
            return array
        return array * host.size if alike else host.sum(array, name + ".host")

    def restart(self, options: Options) -> None:
        """Goes on with other compressors, in new buckets whose errors are zero, between two steps."""
        self.selection = replace(self.selection, options=options)
        self._changes += 1
        self.adopt(self.sparse, self.fill(self.sparse))

    def restore_frozen(self) -> None:
        """What is held of frozen parameters lies with all the rest until the next step."""
        self.frozen.restore_all()
