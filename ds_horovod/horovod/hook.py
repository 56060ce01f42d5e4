"""The seam with Horovod: the only file that touches its optimizer class.

Stock Horovod gives ``compression.compress(tensor)`` no name, no parameter and no say in the collective. So five methods
are extended, for a DoubleSqueeze only; every other compression runs through the original code.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import horovod
import horovod.torch as hvd
import torch
from horovod.common.util import split_list
from horovod.torch import optimizer as stock
from torch import Tensor

from ..compressors import Compressor
from ..double_squeeze import DoubleSqueeze, bind
from ..reducer import Reducer
from ..step import changed_too_early
from ..uncompressed import clip
from .elastic import require_handler
from .transport import HorovodTransport, require_horovod_for

_SUPPORTED = "0.28.1"
_SMALL_NBYTES = 2**16  # such gradients cost latency rather than bandwidth
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
"""All that Horovod has made and that are still there, with any compression."""


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
        "_DistributedOptimizer.zero_grad": ["self"],
        "_DistributedAdasumOptimizer.__init__": [
            "self", "params", "named_parameters", "compression", "backward_passes_per_step",
        ],
    }  # fmt: skip
    for path, parameters in expected.items():
        class_name, method_name = path.split(".")
        method = getattr(getattr(stock, class_name, None), method_name, None)
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
    optimizer.zero_grad = _zero_grad(optimizer.zero_grad)
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
    self._double_squeeze_late = _LateGradients()
    self._double_squeeze_reducer = None  # of a rank that is not in the process set
    self._double_squeeze_parameters = parameters
    if process_set.included():
        transport = HorovodTransport(squeeze.options.server, process_set)
        reducer = self._double_squeeze_reducer = bind(squeeze, "doublesqueeze", parameters, average, transport, grouped)
        self._parameter_names = _CollectiveNames(reducer, parameters)
        if reducer.session is not None and not reducer.session.buckets:
            _warn_of_nothing_to_compress(reducer)
    if squeeze.options.momentum:
        _warn_of_two_momenta(squeeze.options.momentum, self.param_groups)


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
        reducer.session.pipeline.in_flight.clear()  # without waiting for ranks that may not take part any more
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
    members = [p for group in groups for p in group] if isinstance(groups, list) else [None]
    if any(not isinstance(p, Tensor) or p not in name_of for p in members) or len(set(members)) < len(members):
        raise ValueError(
            "DoubleSqueeze: groups must be a number of groups, 0 or more, or a list of lists of the optimizer's parameters, "
            f"each at most once; got {groups!r}"
        )
    return [[name_of[p] for p in group] for group in groups if group]


def _warn_of_nothing_to_compress(reducer: Reducer) -> None:
    warnings.warn(
        f"DoubleSqueeze: none of the {len(reducer.parameters)} parameters is compressed: training is as without it. "
        f"By default those of two dimensions and {reducer.options.min_numel} elements (min_numel) or more are, in float32, "
        "float16 or bfloat16; choose= changes that, and print(optimizer.double_squeeze.explain()) says why each is not.",
        stacklevel=5,
    )


def _warn_of_two_momenta(momentum: float, groups: list[dict[str, Any]]) -> None:
    """Momentum correction takes the place of the optimizer's own."""
    for group in groups:
        beta1 = group["betas"][0] if "betas" in group else 0.0
        own = "momentum=0" if group.get("momentum") else "betas=(0.0, ...)" if beta1 else None
        if own:
            warnings.warn(
                f"DoubleSqueeze: momentum={momentum} is on, and the optimizer's own too "
                f"({group.get('momentum') or beta1}): gradients would be averaged twice. Give the optimizer {own}.",
                stacklevel=5,
            )
            return


class _LateGradients:
    """Gradients that are not compressed and wait for the end of backward: small ones, and all that are to be clipped.

    They leave together, and Horovod fuses them. One after the other, each small one would cost as much latency as a large
    one.
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._handles: dict[Tensor, Any] = {}

    def add(self, p: Tensor) -> None:
        self._waiting.append(p)

    def flush(self, send: Callable[[Tensor], Any]) -> None:
        self._handles.update((p, send(p)) for p in self._waiting)
        self._waiting.clear()

    def result(self, p: Tensor) -> Any:
        return _result(self._handles.pop(p))

    def forget(self) -> None:
        self._waiting.clear()
        self._handles.clear()


def _result(handle: Any) -> Any:
    return handle() if callable(handle) else hvd.synchronize(handle)


def _reducer(self: Any) -> Reducer | None:
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
        reducer = _reducer(self)
        if reducer is None:
            return original(self, p)  # type: ignore[no-any-return]
        # A new step. Passes of a step that only accumulate gradients have left handles of None.
        if all(handle is None for handle, _ in self._handles.values()):
            _begin_step(self, reducer)
        session, late = reducer.session, self._double_squeeze_late
        if session is None:
            return original(self, p)  # type: ignore[no-any-return]
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # as Horovod does: another rank may have a gradient
        sparse_dim = p.grad.sparse_dim() if self.sparse_as_dense and p.grad.is_sparse else None
        if sparse_dim is not None:
            p.grad = p.grad.to_dense()
        compressed = session.admit(p)
        dense = None
        if compressed:
            session.ready(p)
        elif session.held or (not p.grad.is_sparse and p.grad.numel() * p.grad.element_size() <= _SMALL_NBYTES):
            late.add(p)
        else:
            dense = _dense(self, p, original)

        def result() -> Any:
            session.flush()
            late.flush(lambda q: _dense(self, q, original))
            session.drain()
            aggregated = session.finish(p) if compressed else late.result(p) if dense is None else _result(dense)
            if sparse_dim is not None:  # as it was: some optimizers take no other
                p.grad = aggregated.to_sparse(sparse_dim)
                return p.grad.clone()
            return aggregated

        return result, None

    return _allreduce_grad_async


def _synchronize(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def synchronize(self: Any) -> None:
        reducer = _reducer(self)
        if reducer is None:
            return original(self)  # type: ignore[no-any-return]
        options, session, named = reducer.options, reducer.session, self._double_squeeze_parameters
        # step() after synchronize(): what has been averaged must not be compressed again. Where a step was skipped, as
        # GradScaler does, and the gradients are gone, this is the next one, in which other ranks may have gradients.
        if session is not None and self._synchronized and not self._handles and any(p.grad is not None for _, p in named):
            return None
        if session is not None:
            _require_scaled(self, options.grad_scaler)
            _require_hooked(self)
        else:
            _follow_rates(self, reducer)
            if options.max_norm is not None:
                clip([(name, p.grad) for name, p in named if p.grad is not None], options.max_norm * reducer.units.scale)
        original(self)
        for name, p in named:
            if p.grad is not None and (session is None or not session.covers(p)):
                reducer.velocities.add(name, p.grad)
        reducer.add_carried_over((name, p.grad) for name, p in named if p.grad is not None)
        return None

    return synchronize


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


def _require_scaled(self: Any, grad_scaler: Any) -> None:
    """Raises RuntimeError where gradients have been divided by the loss scale already, of which their versions tell nothing."""
    state = getattr(grad_scaler, "_per_optimizer_states", {}).get(id(self))
    if state is not None and getattr(state.get("stage"), "name", None) == "UNSCALED":
        raise changed_too_early("each gradient")


def _begin_step(self: Any, reducer: Reducer) -> None:
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        require_handler(self.double_squeeze)
        # Where ranks have only left, Horovod does not synchronize states.
        if reducer.transport.size != self.process_set.size():
            reducer.rebind(HorovodTransport(reducer.options.server, self.process_set), reducer.snapshot())
    if reducer.session is not None:
        reducer.session.cancel()  # what is still under way was dropped by optimizer.load_state_dict
    self._double_squeeze_late.forget()
    _follow_rates(self, reducer)


def _follow_rates(self: Any, reducer: Reducer) -> None:
    """A step begins: tells the reducer the learning rate that each parameter has now."""
    rates: dict[str, float] = {}
    if reducer.options.lr_aware:
        names = {p: name for name, p in self._double_squeeze_parameters}
        rates = {names[p]: float(group["lr"]) for group in self.param_groups for p in group["params"] if p in names}
    reducer.begin_step(rates)


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


def _dense(self: Any, p: Tensor, original: Callable[..., Any]) -> Any:
    """Sends a gradient on Horovod's own path; by way of a copy what that refuses: bfloat16, or not contiguous."""
    gradient = p.grad
    assert gradient is not None
    if gradient.is_sparse or (gradient.dtype != torch.bfloat16 and gradient.is_contiguous()):
        return original(self, p)[0]
    copy = gradient.detach().to(torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype)
    handle = hvd.allreduce_async_(copy.contiguous(), name=self._parameter_names[p], op=self.op, process_set=self.process_set)
    return lambda: gradient.copy_(hvd.synchronize(handle))


def _refuse_adasum(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if as_double_squeeze(signature.bind(self, *args, **kwargs).arguments["compression"]):
            raise ValueError("DoubleSqueeze: op must be hvd.Average or hvd.Sum, got hvd.Adasum")
        original(self, *args, **kwargs)

    return __init__
