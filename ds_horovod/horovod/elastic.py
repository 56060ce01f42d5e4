"""Elastic Horovod: ranks come and go, and errors stay with the ranks that do."""

from __future__ import annotations

import secrets
import weakref

import horovod.torch as hvd
from horovod.torch.elastic import state as stock

from ..checkpoint import full_state_of_one, load
from ..double_squeeze import DoubleSqueeze, reducer_of
from ..snapshot import rebind, snapshot
from .transport import HorovodTransport

_handled: weakref.WeakSet[DoubleSqueeze] = weakref.WeakSet()


class DoubleSqueezeStateHandler(stock.StateHandler):  # type: ignore[misc]
    """What ``hvd.elastic.TorchState(..., compression=...)`` does with a DoubleSqueeze.

    A commit keeps the residuals of this rank, where the errors are. When ranks have come or gone, each of those that are
    still there goes on with its own residuals, new ones with none, and all with the first rank's compressors, step and
    units. The residuals of a rank that failed are lost with it, as its gradient is.
    """

    def __init__(self, value: DoubleSqueeze) -> None:
        super().__init__(value)
        _handled.add(value)
        self.save()

    def save(self) -> None:
        """`TorchState.commit`."""
        self._saved = snapshot(reducer_of(self.value))
        self._restored = False

    def restore(self) -> None:
        """`TorchState.restore`: back to the last commit. Horovod has failed; `sync` comes next."""
        self._restored = True

    def sync(self) -> None:
        """`TorchState.sync`: ranks have come or gone, or training begins."""
        reducer = reducer_of(self.value)
        own = self._saved if self._restored else snapshot(reducer)
        # What rank 0 alone may have loaded, as Horovod's examples do.
        of_all = not self._restored and reducer.loaded is not None and reducer.loaded.of_all
        loaded = full_state_of_one(reducer) if of_all and hvd.rank() == 0 else None
        # It pickles, as Horovod's elastic states do on their way from rank 0 anyway: newcomers need compressors of any class.
        everyones = own.shared, loaded, secrets.token_hex(4)
        shared, loaded, era = hvd.broadcast_object(everyones, root_rank=0, name="doublesqueeze.elastic")
        transport = HorovodTransport(reducer.options.server, hierarchical=reducer.options.hierarchical)
        rebind(reducer, transport, own._replace(shared=shared), era)
        if loaded is not None:
            load(reducer, loaded)
        self.save()


def install() -> None:
    """Registers the handler with Horovod; to be called once."""
    stock.get_handler_registry().append((DoubleSqueeze, DoubleSqueezeStateHandler))


def require_handler(squeeze: DoubleSqueeze) -> None:
    """Raises RuntimeError unless an elastic state knows this instance: ranks that come would wait for the others for ever."""
    if squeeze not in _handled:
        raise RuntimeError(
            "DoubleSqueeze: in an elastic job pass compression=optimizer.double_squeeze to hvd.elastic.TorchState, beside "
            "model and optimizer, so that errors are committed, restored and taken over when ranks come or go"
        )
