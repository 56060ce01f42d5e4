"""The seam with Horovod: the only file that touches its optimizer class.

Stock Horovod gives ``compression.compress(tensor)`` no name, no parameter and no say in the collective. So five methods
are extended, for a DoubleSqueeze only; every other compression runs through the original code.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import horovod
import horovod.torch as hvd
import torch
from horovod.common.util import split_list
from horovod.torch import mpi_ops
from horovod.torch import optimizer as stock
from torch import Tensor

from ..compressors import Compressor
from ..double_squeeze import DoubleSqueeze, bind
from ..reducer import Reducer
from ..session import Session
from ..snapshot import rebind, snapshot
from ..tentative import Tentative
from ..uncompressed import put_rescaled, warn_of_two_momenta
from .elastic import require_handler
from .transport import HorovodTransport, pin, require_horovod_for

_SUPPORTED = "0.28.1"
_NAP = 5e-4  # seconds
_SMALL_NBYTES = 2**16  # such gradients cost latency rather than bandwidth
_stock_allreduce: Callable[..., Any] = getattr(stock._DistributedOptimizer, "_allreduce_grad_async", None)  # type: ignore[assignment]
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
"""All that Horovod has made and that are still there, with any compression."""
_left_behind: list[Session[Any]] = []
"""Of optimizers that are gone, with late steps under way, whose collectives other ranks wait for."""


def install() -> None:
    """Extends Horovod's optimizers; to be called once.

    Raises
    ------
    ImportError
        This Horovod is not the one whose methods are known.
    """
    expected = {
        "_DistributedOptimizer.__init__": [
            "self", "params", "named_parameters", "compression", "backward_passes_per_step", "op",
            "gradient_predivide_factor", "groups", "sparse_as_dense", "process_set",
        ],
        "_DistributedOptimizer._make_hook": ["self", "p"],
        "_DistributedOptimizer._allreduce_grad_async": ["self", "p"],
        "_DistributedOptimizer.synchronize": ["self"],
        "_DistributedOptimizer.step": ["self", "closure"],
        "_DistributedOptimizer.zero_grad": ["self"],
        "_DistributedAdasumOptimizer.__init__": [
            "self", "params", "named_parameters", "compression", "backward_passes_per_step",
        ],
        "_alltoall_async": ["tensor", "splits", "output", "output_received_splits", "name", "process_set"],
        "join": ["device"],
        "_allgather_async": ["tensor", "output", "name", "process_set"],
    }  # fmt: skip
    for path, parameters in expected.items():
        class_name, _, method_name = path.rpartition(".")
        method = getattr(getattr(stock, class_name, None) if class_name else mpi_ops, method_name, None)
        if method is None or list(inspect.signature(method).parameters) != parameters:
            raise ImportError(
                f"ds_horovod supports Horovod {_SUPPORTED}; in the installed {horovod.__version__} {path} is another one. "
                f"Install horovod=={_SUPPORTED}."
            )
    optimizer, adasum = stock._DistributedOptimizer, stock._DistributedAdasumOptimizer
    optimizer.__init__ = _init(optimizer.__init__)
    optimizer._make_hook = _make_hook(optimizer._make_hook)
    optimizer._allreduce_grad_async = _allreduce_grad_async(optimizer._allreduce_grad_async)
    optimizer.synchronize = _synchronize(optimizer.synchronize)
    optimizer.step = _step(optimizer.step)
    optimizer.zero_grad = _zero_grad(optimizer.zero_grad)
    hvd.join = mpi_ops.join = _join(mpi_ops.join)
    adasum.__init__ = _refuse_adasum(adasum.__init__)


def as_double_squeeze(compression: Any) -> DoubleSqueeze | None:
    """The class stands for an instance with defaults, and a compressor for one that has it; None for another compression.

    Raises
    ------
    TypeError
        What is no compression at all, and what to write in its place.
    """
    if isinstance(compression, DoubleSqueeze):
        return compression
    if isinstance(compression, type) and issubclass(compression, DoubleSqueeze):
        return compression()
    if isinstance(compression, Compressor):
        return DoubleSqueeze(compression)
    hint = "DoubleSqueeze, DoubleSqueeze(...), a compressor such as OneBit(), or one of hvd.Compression"
    if isinstance(compression, type) and issubclass(compression, Compressor):
        hint = f"{compression.__name__}(...)"
    elif getattr(compression, "__func__", None) is DoubleSqueeze.paper.__func__:  # type: ignore[attr-defined]
        hint = "DoubleSqueeze.paper()"
    elif compression is None or hasattr(compression, "compress"):
        return None  # as stock Horovod takes it
    raise TypeError(f"DoubleSqueeze: compression must be a compression, got {compression!r}; write {hint}")


def is_average(op: Any) -> bool:
    """Whether op is Average rather than Sum.

    Raises
    ------
    ValueError
        It is neither.
    """
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(f"DoubleSqueeze: op must be hvd.Average or hvd.Sum, got {op!r}")
    return bool(op == hvd.Average)


def _init(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        squeeze = as_double_squeeze(call.arguments["compression"])
        if squeeze is None:
            original(self, *args, **kwargs)
            _replace_others(self, of_stock=False)
            return
        try:
            _bind(self, squeeze, call, original)
        except BaseException:
            self.__dict__.get("_double_squeeze_hooks", {}).clear()
            raise
        _replace_others(self, of_stock=True)

    return __init__


def _bind(self: Any, squeeze: DoubleSqueeze, call: inspect.BoundArguments, original: Callable[..., None]) -> None:
    if squeeze.options.lr_aware and any("lr" not in group for group in call.arguments["params"]):
        raise ValueError("DoubleSqueeze: lr_aware=True needs a learning rate in each of the optimizer's parameter groups")
    if squeeze.options.staleness:
        _require_may_be_late(self, squeeze.options.staleness)
    average = is_average(call.arguments["op"])
    groups, process_set = call.arguments["groups"], call.arguments["process_set"]
    call.arguments["compression"] = hvd.Compression.none  # for what stays on Horovod's own path
    call.arguments["groups"] = None  # they are our buckets; what is not compressed Horovod fuses anyway
    self.double_squeeze = squeeze
    original(*call.args, **call.kwargs)
    parameters = [(self._parameter_names[p], p) for group in self.param_groups for p in group["params"]]
    if process_set.included() and process_set.size() > 1:
        require_horovod_for(p.device for _, p in parameters if p.requires_grad)
    grouped = _named_groups(groups, parameters)
    self._double_squeeze_lock = threading.RLock()
    self._double_squeeze_handles, self._double_squeeze_open = self._handles, False  # of the step under way
    self._double_squeeze_averaged = {}  # identities of gradients, by parameter
    self._double_squeeze_reducer = None  # of a rank that is not in the process set
    self._double_squeeze_parameters = parameters
    if process_set.included():
        transport = HorovodTransport(squeeze.options.server, process_set, squeeze.options.hierarchical)
        reducer = self._double_squeeze_reducer = bind(squeeze, "doublesqueeze", parameters, average, transport, grouped)
        self._parameter_names = _CollectiveNames(reducer, parameters)
        if reducer.session is not None and not reducer.session.buckets:
            _warn_of_nothing_to_compress(reducer)
        self._double_squeeze_dense = _new_dense(self, reducer)
        if squeeze.options.staleness:
            reducer.take_tentative_steps(Tentative(self, type(self).__base__))
            weakref.finalize(self, _leave_behind, reducer.sessions)
    if squeeze.options.momentum:
        warn_of_two_momenta(squeeze.options.momentum, self.param_groups, stacklevel=4)


def _require_may_be_late(self: Any, staleness: int) -> None:
    if isinstance(self, torch.optim.LBFGS):
        raise ValueError(f"DoubleSqueeze: staleness={staleness} cannot work with LBFGS, which needs the gradient of this step")
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise ValueError(f"DoubleSqueeze: staleness={staleness} cannot work in an elastic job; leave it out")


class _CollectiveNames(Mapping[Tensor, str]):
    """Of gradients that stay on Horovod's own path: two optimizers with equal names of parameters may be under way at once."""

    def __init__(self, reducer: Reducer, parameters: Sequence[tuple[str, Tensor]]) -> None:
        self._reducer = reducer
        self._labels = {p: label for label, p in parameters}

    def __getitem__(self, p: Tensor) -> str:
        return f"{self._reducer.name}.{self._labels[p]}"

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


def _make_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _make_hook(self: Any, p: Tensor) -> Callable[..., None]:
        """As Horovod's, until the optimizer is switched off: the hook outlives that, but need not keep it in memory."""
        hooks = self.__dict__.setdefault("_double_squeeze_hooks", {})
        hooks[p] = original(self, p)

        def hook(*ignored: Any) -> None:
            if p in hooks:
                hooks[p](*ignored)

        return hook

    return _make_hook


def _replace_others(self: Any, of_stock: bool) -> None:
    """Switches off the optimizers that had any of these parameters before: each gradient would be sent twice.

    Parameters
    ----------
    self
        The new optimizer.
    of_stock
        Whether optimizers with other compressions are meant too.
    """
    for other in list(_optimizers):
        both = self._requires_update & other._requires_update
        if both and (of_stock or hasattr(other, "double_squeeze")):
            first = next(name for p, name in self._parameter_names.items() if p in both)
            _switch_off(other, f"a later one trains its parameter {first.rpartition('doublesqueeze.')[2]}")
    _optimizers.add(self)


def _switch_off(self: Any, why: str) -> None:
    self._double_squeeze_switched_off = why
    self._double_squeeze_hooks.clear()
    reducer = _reducer_of(self)
    if reducer is not None and reducer.session is not None:
        reducer.session.drop()
    for key in self._handles:  # Horovod may still write to these gradients
        for p in key if isinstance(key, tuple) else (key,):
            p.grad = None
    self._handles.clear()


def _named_groups(groups: Any, parameters: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    """What ``groups=`` of ``hvd.DistributedOptimizer`` says, by names.

    Raises
    ------
    ValueError
        It is neither a number nor lists of the optimizer's parameters, each at most once.
    """
    if groups is None or (isinstance(groups, int) and groups == 0):
        return []
    trained = [name for name, p in parameters if p.requires_grad]
    if isinstance(groups, int) and groups > 0:
        return [part for part in split_list(trained, groups) if part]
    name_of = {p: name for name, p in parameters}
    lists = isinstance(groups, list) and all(isinstance(group, Iterable) for group in groups)
    members = [p for group in groups for p in group] if lists else [None]
    if any(not isinstance(p, Tensor) or p not in name_of for p in members) or len(set(members)) < len(members):
        raise ValueError(
            "DoubleSqueeze: groups must be a number of groups, 0 or more, or a list of lists of the optimizer's parameters, "
            f"each at most once; got {_shown(groups, name_of)}"
        )
    return [[name_of[p] for p in group] for group in groups if group]


def _shown(groups: Any, name_of: Mapping[Tensor, str]) -> str:
    """Groups for an error: parameters by their names, other tensors by their shapes."""
    if isinstance(groups, Tensor):
        return name_of.get(groups, f"a tensor of shape {tuple(groups.shape)}")
    if isinstance(groups, Iterable) and not isinstance(groups, str):
        return f"[{', '.join(_shown(group, name_of) for group in groups)}]"
    return repr(groups)


def _warn_of_nothing_to_compress(reducer: Reducer) -> None:
    warnings.warn(
        f"DoubleSqueeze: none of the {len(reducer.parameters)} parameters is compressed: training is as without it. "
        f"By default those of two dimensions and {reducer.options.min_numel} elements (min_numel) or more are, in float32, "
        "float16 or bfloat16; choose= changes that, and print(optimizer.double_squeeze.explain()) says why each is not.",
        stacklevel=5,
    )


class _Sent(NamedTuple):
    """A gradient on Horovod's own path."""

    name: str
    handle: Any
    """Horovod's; of a sparse gradient a function that waits."""
    copied_from: Tensor | None
    """The gradient, where a copy of it was sent."""
    pinned: Tensor
    """What keeps the tensor that was sent; see `pin`."""


class _DenseGradients:
    """The gradients of one optimizer that are not compressed, in one step.

    Small ones, and all that are to be clipped, wait for the end of backward: they leave together, and Horovod fuses them. One
    after the other, each small one would cost as much latency as a large one. Once one has failed, no other leaves in this
    step: Horovod is ending then.

    Parameters
    ----------
    send
        Sends the gradient of a parameter.
    wait
        Returns the aggregated gradient, once it is there.
    """

    def __init__(self, send: Callable[[Tensor], _Sent], wait: Callable[[_Sent], Tensor]) -> None:
        self._send, self._wait_for = send, wait
        self.flushed = False
        """Whether all are on their way."""
        self._waiting: dict[Tensor, None] = {}
        self._under_way: dict[Tensor, _Sent] = {}
        self._results: dict[Tensor, Tensor] = {}
        self._failure: Exception | None = None
        # Of a step that failed or was dropped, until the next: Horovod may still have these tensors.
        self._dropped: list[_Sent] = []

    def add(self, p: Tensor, late: bool) -> None:
        """Sends a gradient now, or once backward has ended."""
        with self._unless_failed():
            if late:
                self._waiting[p] = None
            else:
                self._under_way[p] = self._send(p)

    def __contains__(self, p: object) -> bool:
        return p in self._waiting or p in self._under_way or p in self._results

    def flush(self) -> None:
        """Backward has ended."""
        if self._waiting:
            for p in [p for p, sent in self._under_way.items() if not callable(sent.handle) and hvd.poll(sent.handle)]:
                self._wait(p)
        with self._unless_failed():
            self._under_way.update((p, self._send(p)) for p in self._waiting)
        self._waiting.clear()
        self.flushed = True

    def averages(self) -> dict[Tensor, Tensor]:
        """The aggregated gradient of each parameter; waits for them."""
        return {p: self._wait(p) for p in [*self._under_way, *self._results]}

    def are_finite(self) -> bool:
        """Whether all aggregated gradients are finite; waits for them."""
        return all(bool(_values(result).isfinite().all()) for result in self.averages().values())

    def result(self, p: Tensor) -> Tensor:
        """The aggregated gradient of a parameter; waits for it."""
        self._wait(p)
        return self._results.pop(p)

    def _wait(self, p: Tensor) -> Tensor:
        if p in self._under_way:
            with self._unless_failed():
                self._results[p] = self._wait_for(self._under_way[p])
            del self._under_way[p]
        return self._results[p]

    @contextlib.contextmanager
    def _unless_failed(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except Exception as error:
            self._failure = error
            raise

    def forget(self) -> None:
        """Drops the step."""
        self._dropped = list(self._under_way.values())
        self._waiting.clear()
        self._under_way.clear()
        self._results.clear()
        self._failure = None
        self.flushed = False


def _new_dense(self: Any, reducer: Reducer) -> _DenseGradients:
    optimizer = weakref.ref(self)  # which may be gone before what is late has come
    return _DenseGradients(lambda p: _send_dense(optimizer(), p), lambda sent: _wait_for_dense(reducer, sent))


def reducer_of_optimizer(self: Any) -> Reducer | None:
    """The reducer of an optimizer; None where the compression is another one, or the rank takes no part.

    Raises
    ------
    RuntimeError
        The optimizer must not be used any more.
    """
    why = getattr(self, "_double_squeeze_switched_off", None)
    if why is not None:
        raise RuntimeError(
            f"DoubleSqueeze: this optimizer has been switched off, since {why}. A parameter has one optimizer at a time: use "
            "the latest, or make a new one"
        )
    return _reducer_of(self)


def _reducer_of(self: Any) -> Reducer | None:
    return getattr(self, "_double_squeeze_reducer", None)


def _allreduce_grad_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _allreduce_grad_async(self: Any, p: Tensor) -> tuple[Any, Any]:
        if reducer_of_optimizer(self) is None:
            return original(self, p)  # type: ignore[no-any-return]
        with self._double_squeeze_lock:  # autograd has a thread for each device, and users may have more
            return _hand_over(self, p, original)

    return _allreduce_grad_async


def _hand_over(self: Any, p: Tensor, original: Callable[..., Any]) -> tuple[Any, Any]:
    """Takes over a gradient. Returns what Horovod calls in `synchronize`, and no context."""
    if self._double_squeeze_handles is not self._handles or not self._double_squeeze_open:
        _begin_step(self)
    session = self._double_squeeze_reducer.session
    if session is None:
        return original(self, p)  # type: ignore[no-any-return]
    if p.grad is None:
        p.grad = session.missing_gradient(p)  # as Horovod does: another rank may have a gradient
        known = False
    else:
        known = True
    # What is sparse only after training began without a gradient of it is compressed too: other ranks do not know of it.
    came_late = session.started and session.covers(p) and p in session.unknown
    sparse_dim = p.grad.sparse_dim() if p.grad.is_sparse and (self.sparse_as_dense or came_late) else None
    if sparse_dim is not None:
        p.grad = p.grad.to_dense()
    elif known:
        session.unknown.discard(p)
    dense: _DenseGradients = self._double_squeeze_dense
    is_compressed = session.admit(p)
    session.attach(dense)
    if is_compressed:
        session.ready(p)
    else:
        small = not p.grad.is_sparse and p.grad.numel() * p.grad.element_size() <= _SMALL_NBYTES
        dense.add(p, late=session.held or small)

    def result() -> Tensor:
        aggregated: Tensor
        session.flush()
        for q in session.unsent():
            dense.add(q, late=False)
        if not session.covers(p) and p not in dense:  # another rank has told in the first step that it is sparse
            p.grad = session.missing_gradient(p)
            dense.add(p, late=False)
        dense.flush()
        session.drain()
        due = dense if session.due is None else session.due.uncompressed
        assert isinstance(due, _DenseGradients)
        session.settle(due.are_finite)
        if session.covers(p) and p not in dense:
            aggregated = session.finish(p)
        elif session.due is None:
            aggregated = p.grad.zero_()  # type: ignore[union-attr]
        elif session.due.late:
            assert p.grad is not None
            aggregated = put_rescaled(p.grad, due.result(p), *session.due.factors([session.name_of(p)]))
        else:
            aggregated = due.result(p)
        if sparse_dim is not None:  # as it was: some optimizers take no other
            p.grad = aggregated.to_sparse(sparse_dim)
            return p.grad.clone()
        return aggregated

    return result, None


def _synchronize(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def synchronize(self: Any) -> None:
        reducer = reducer_of_optimizer(self)
        if reducer is None:
            return original(self)  # type: ignore[no-any-return]
        if reducer.tentative is not None:
            reducer.tentative.leave()
        if not self._handles and are_averaged(self):
            return None
        if reducer.session is not None:
            _require_hooked(self)
        else:
            _follow_rates(self, reducer)
            reducer.clip_alone()
        original(self)
        self._double_squeeze_open = False
        reducer.end_step()
        gradients = {p: p.grad for _, p in self._double_squeeze_parameters if p.grad is not None}
        self._double_squeeze_averaged = {p: _identity(gradient) for p, gradient in gradients.items()}
        return None

    return synchronize


def _identity(gradient: Tensor) -> tuple[int, ...]:
    """What tells a gradient from others, and from itself after a change, without holding on to it."""
    return id(gradient), _values(gradient).data_ptr(), gradient._version


def are_averaged(self: Any) -> bool:
    """Whether the gradients are those of the last `synchronize`, as they came or as the user has clipped them.

    It is asked where backward has handed over nothing since, as for ``step()`` after ``synchronize()``. Gradients that are
    gone, zeroed or assigned by the user belong to the next step, in which other ranks may have gradients: this rank must
    take part. Horovod's own flag does not tell: it stays where a step was skipped.
    """
    if not self._synchronized:
        return False
    averaged = self._double_squeeze_averaged
    gradients = {p: p.grad for _, p in self._double_squeeze_parameters if p.grad is not None}
    if any(p not in averaged or _identity(gradient)[:2] != averaged[p][:2] for p, gradient in gradients.items()):
        return False
    return any(_identity(g) == averaged[p] or bool(_values(g).any()) for p, g in gradients.items())


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _require_hooked(self: Any) -> None:
    """Raises RuntimeError for a trained parameter whose gradients Horovod does not see: replicas would drift apart."""
    strangers = [
        p for group in self.param_groups for p in group["params"] if p.requires_grad and p not in self._requires_update
    ]
    if strangers:
        shapes = ", ".join(str(tuple(p.shape)) for p in strangers[:5])
        raise RuntimeError(
            f"DoubleSqueeze: parameters of shapes {shapes} were added or unfrozen after hvd.DistributedOptimizer was made, "
            "so their gradients are not exchanged. Make it with all that will ever be trained, and freeze them afterwards, "
            "or make a new one"
        )


def _begin_step(self: Any) -> None:
    reducer: Reducer = self._double_squeeze_reducer
    _finish_left_behind(wait=False)
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        require_handler(self.double_squeeze)
        # Where ranks have only left, Horovod does not synchronize states.
        if reducer.transport.size != self.process_set.size():
            options = reducer.options
            transport = HorovodTransport(options.server, self.process_set, options.hierarchical)
            rebind(reducer, transport, snapshot(reducer))
    if reducer.session is not None:
        reducer.session.cancel()  # what is still under way was dropped by optimizer.load_state_dict
    if reducer.options.staleness and self._double_squeeze_dense.flushed:  # it is on its way until its step is due
        self._double_squeeze_dense = _new_dense(self, reducer)
    self._double_squeeze_dense.forget()
    self._double_squeeze_handles, self._double_squeeze_open = self._handles, True
    _follow_rates(self, reducer)


def _follow_rates(self: Any, reducer: Reducer) -> None:
    """A step begins: tells the reducer the learning rate that each parameter has now."""
    rates: dict[str, float] = {}
    if reducer.options.lr_aware:
        names = {p: name for name, p in self._double_squeeze_parameters}
        rates = {names[p]: float(group["lr"]) for group in self.param_groups for p in group["params"] if p in names}
    reducer.begin_step(rates)


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, closure: Callable[..., Any] | None = None) -> Any:
        """As Horovod's. With staleness, the optimizer does not take a step for which nothing is due."""
        reducer = reducer_of_optimizer(self)
        if reducer is None or not reducer.options.staleness:
            return original(self, closure)
        if closure is not None:
            raise ValueError(
                f"DoubleSqueeze: staleness={reducer.options.staleness} cannot work with a closure; got {closure!r}"
            )
        if self._should_synchronize:
            self.synchronize()
        if not reducer.is_due:
            self._synchronized = False
            return None
        if reducer.tentative is not None and not reducer.tentative.entered:
            _warn_of_delay(reducer)
        with self.skip_synchronize():
            return original(self)

    return step


def _warn_of_delay(reducer: Reducer) -> None:
    assert reducer.tentative is not None
    reducer.tentative.entered = True  # once is enough
    warnings.warn(
        f"DoubleSqueeze: with staleness={reducer.options.staleness} each step gets the gradient of an older one, and no "
        "tentative step makes up for it, which trains far worse with momentum or Adam. Pass model=, or run forward and "
        "backward inside `with optimizer.double_squeeze.tentative()`; see docs/guide.md",
        stacklevel=3,
    )


def _join(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def join(*args: Any, **kwargs: Any) -> int:
        """As Horovod's. Other ranks take it for granted that this one takes part while late steps are under way."""
        if _late():
            gc.collect()  # optimizers that nobody has any more
        _finish_left_behind(wait=True)  # as on the other ranks: Horovod cannot join in the middle of an exchange
        for staleness in _late():
            raise RuntimeError(
                f"DoubleSqueeze: hvd.join() while gradients are under way, with staleness={staleness}; call "
                "optimizer.double_squeeze.flush() on all ranks first. A rank that has run out of data calls optimizer.step() "
                "without backward instead"
            )
        return original(*args, **kwargs)

    return join


def _leave_behind(sessions: Sequence[Session[Any]]) -> None:
    _left_behind.extend(session for session in sessions if session.late)


def _finish_left_behind(wait: bool) -> None:
    """Goes on with the collectives of optimizers that are gone: with all of them, since ranks may lose them in any order."""
    start, told = time.perf_counter(), 1.0
    while True:
        for session in list(_left_behind):
            arrived = True  # also where it has failed: nobody will ask for what it brings
            with contextlib.suppress(Exception):
                session.poll()
                arrived = session.late.arrived
                if arrived:
                    session.late.drop()
            if arrived:
                _left_behind.remove(session)
        if not wait or not _left_behind:
            return
        waited = time.perf_counter() - start
        if waited > told:
            told = waited + 1.0
            pending = [work.pending for session in _left_behind for work in session.pipeline.in_flight]
            _left_behind[0].transport.waiting(waited, [name for name in pending if name is not None])
        time.sleep(_NAP)


def _late() -> list[int]:
    """The staleness of optimizers with steps under way whose results are not due yet."""
    reducers = [reducer for reducer in map(_reducer_of, list(_optimizers)) if reducer is not None]
    return [r.options.staleness for r in reducers if r.session is not None and r.session.late]


def _zero_grad(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        """As torch's: stock Horovod takes no ``set_to_none``."""
        if getattr(self, "double_squeeze", None) is None:
            return original(self, *args, **kwargs)
        if self._handles:
            original(self)  # raises
        super(self.__class__, self).zero_grad(*args, **kwargs)
        return None

    return zero_grad


def _send_dense(self: Any, p: Tensor) -> _Sent:
    """Sends a gradient on Horovod's own path; by way of a copy what that refuses: bfloat16, or not contiguous."""
    session = self._double_squeeze_reducer.session
    gradient, name, late = p.grad, self._parameter_names[p] + session.label, session.options.staleness > 0
    assert gradient is not None
    if gradient.is_sparse or (gradient.dtype != torch.bfloat16 and gradient.is_contiguous() and not late):
        pinned = pin(gradient)
        return _Sent(name, _stock_allreduce(self, p)[0], None, pinned)
    copy = gradient.detach().to(torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype).contiguous()
    if late:
        copy = copy.clone()
    pinned = pin(copy)
    handle = hvd.allreduce_async_(copy, name=name, op=self.op, process_set=self.process_set)
    return _Sent(name, handle, None if late else gradient, pinned)  # what is late is for another gradient


def _wait_for_dense(reducer: Reducer, sent: _Sent) -> Tensor:
    if callable(sent.handle):
        return sent.handle()  # type: ignore[no-any-return]
    result: Tensor = reducer.transport.result(sent.handle, sent.name)  # type: ignore[attr-defined]
    return result if sent.copied_from is None else sent.copied_from.copy_(result)


def _refuse_adasum(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if as_double_squeeze(signature.bind(self, *args, **kwargs).arguments["compression"]):
            raise ValueError("DoubleSqueeze: op must be hvd.Average or hvd.Sum, got hvd.Adasum")
        original(self, *args, **kwargs)

    return __init__
