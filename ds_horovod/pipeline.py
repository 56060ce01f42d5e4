"""The exchanges that are under way, in the order in which they began."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from torch import Tensor

from .exchange import Exchange, InFlight, Totals
from .transport import Handle, Transport

_SHORTEST_NAP, _LONGEST_NAP = 5e-5, 1e-3  # seconds


class Pipeline(Generic[Handle]):
    """Polls and drains the exchanges of an optimizer, of one step or of several.

    Once one has failed, as where a rank is gone, all have, and nothing else may begin before `cancel`.

    Parameters
    ----------
    transport
        The transport of the exchanges. Where it matches collectives by their order, an exchange begins its next collective
        only after all earlier exchanges have begun theirs: so each kind has one order, that of `add`, on all ranks.
    totals
        Receives the seconds of waiting.
    """

    def __init__(self, transport: Transport[Handle], totals: Totals) -> None:
        self.in_flight: list[InFlight[Handle]] = []
        self._transport = transport
        self._totals = totals
        self._done: list[Exchange[Handle]] = []  # whose destinations the current stream may not read yet
        self._failure: BaseException | None = None

    def add(self, work: InFlight[Handle]) -> None:
        """Takes over an exchange that has begun."""
        self.in_flight.append(work)

    def poll(self) -> None:
        """Does what can be done without waiting. Raises what has failed, then and later."""
        with self._unless_failed():
            stages = sys.maxsize
            for work in self.in_flight:
                if work.poll(stages):
                    self._done.append(work.exchange)
                elif self._transport.in_order:
                    stages = min(stages, work.stage)
            self.in_flight = [work for work in self.in_flight if not work.done]

    @contextlib.contextmanager
    def _unless_failed(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            self.in_flight.clear()  # there is nothing to wait for
            raise

    def settle(self, works: Sequence[InFlight[Handle]], skipped: bool) -> None:
        """Goes on with what is held; see `InFlight.settle`."""
        for work in works:
            work.settle(skipped)
        self.poll()

    def drain(self, works: Sequence[InFlight[Handle]]) -> None:
        """Returns when no collective of these exchanges is under way.

        It naps where hvd.synchronize would spin on the core that Horovod needs: the longer it has waited, the longer,
        so that looking costs little and a late look delays the step by a few per cent of the wait at most.
        """
        start = time.perf_counter()
        passes = self._totals.pass_seconds
        self._nap_until_done(lambda: self._polled(works))
        for exchange in self._done:
            exchange.streams.wait_for_side()
        self._done.clear()
        self._totals.wait_seconds += time.perf_counter() - start - (self._totals.pass_seconds - passes)

    def wait_for(self, handle: Handle, name: str) -> Tensor:
        """What has arrived of one more collective; polls the exchanges meanwhile."""
        self._nap_until_done(lambda: [] if self._transport.poll(handle) else [name, *self._polled(self.in_flight)])
        with self._unless_failed():
            return self._transport.wait(handle)

    def _polled(self, works: Sequence[InFlight[Handle]]) -> list[str]:
        """The names of the collectives of some exchanges that are pending."""
        self.poll()
        return [work.pending for work in works if work.pending is not None]

    def _nap_until_done(self, pending: Callable[[], list[str]]) -> None:
        start = time.perf_counter()
        told = 0.0
        while names := pending():
            waited = time.perf_counter() - start
            with self._unless_failed():
                if waited > told + 1.0:
                    told = waited
                    self._transport.waiting(waited, names)
                time.sleep(min(max(waited / 16, _SHORTEST_NAP), _LONGEST_NAP))

    @property
    def failed(self) -> bool:
        """Whether nothing may begin before `cancel`."""
        return self._failure is not None

    def cancel(self, works: Sequence[InFlight[Handle]]) -> None:
        """Leaves the destinations of some exchanges alone, and returns when none of them is under way."""
        self._failure = None
        for work in works:
            work.cancelled = True
        self.drain(works)
        self.settle([work for work in works if not work.done], False)  # what is held from before

    def drop(self, works: Sequence[InFlight[Handle]]) -> None:
        """Forgets exchanges that are held: nobody will ask for what they bring."""
        self.in_flight = [work for work in self.in_flight if work not in works]
