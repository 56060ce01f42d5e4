"""The seam with DistributedDataParallel: a communication hook."""

# Annotations are evaluated here: torch compares those of a hook with types.

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..compressors import Compressor
from ..double_squeeze import DoubleSqueeze, bind
from ..reducer import Reducer
from ..uncompressed import warn_of_two_momenta
from .transport import ProcessGroupTransport, Sent

_PROBED = 64  # elements that tell at once that a gradient is not zero

_steps: weakref.WeakKeyDictionary[DoubleSqueeze, "_Steps"] = weakref.WeakKeyDictionary()


def double_squeeze_hook(state: DoubleSqueeze, bucket: GradBucket) -> Future[Tensor]:
    """Averages a bucket of gradients through the two compressed passes: for ``DistributedDataParallel.register_comm_hook``.

    ::

        model.register_comm_hook(DoubleSqueeze(), double_squeeze_hook)

    It is for the default process group, and names parameters by their number: "parameter 0" and so on. `register` knows their
    names, the process group and, if it is told, the optimizer.

    Buckets of DistributedDataParallel are but the form in which gradients come: parameters travel in the buckets of the
    exchange, which never change, and so errors stay with their parameters where torch makes new buckets. Nothing waits before
    the last bucket is there.

    Parameters
    ----------
    state
        One for each model.
    bucket
        As torch gives it.

    Returns
    -------
    torch.futures.Future
        Of the bucket's buffer with the averaged gradients; it is done when the hook has been called for the last bucket.

    Raises
    ------
    TypeError
        The state is not a `DoubleSqueeze`.
    ValueError
        It is in use by another model, or cannot work with this one; or the ranks do not agree, in the first step.
    """
    if not isinstance(state, DoubleSqueeze):
        hint = "DoubleSqueeze()" if state is DoubleSqueeze else "DoubleSqueeze(...)"
        raise TypeError(f"DoubleSqueeze: the state of double_squeeze_hook must be a DoubleSqueeze, got {state!r}; write {hint}")
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            f"DoubleSqueeze: double_squeeze_hook needs the buckets of torch's reducer, got {type(bucket).__name__}; "
            "set torch._dynamo.config.optimize_ddp to True or False"
        )
    if state not in _steps:
        _require_on_time(state)
        _steps[state] = _Steps(state)
    return _steps[state].take(bucket)


def register(
    model: DistributedDataParallel,
    state: DoubleSqueeze | type[DoubleSqueeze] | Compressor = DoubleSqueeze,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> DoubleSqueeze:
    """Registers the hook with a model; all ranks of its process group call it, before training.

    Parameters
    ----------
    model
        Whose gradients are exchanged. Errors, and ``choose=``, have the names of ``model.module.named_parameters()``.
    state
        The compression: an instance, the class for its defaults, or a compressor.
    optimizer
        Of the model: for ``lr_aware=True``, and to be told of momentum that would be applied twice.

    Returns
    -------
    DoubleSqueeze
        The state, for `stats`, `explain` and checkpoints.

    Raises
    ------
    TypeError
        The model is not a DistributedDataParallel, or the state is no compression.
    ValueError
        The state is in use by another model or optimizer, or cannot work with this model.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"DoubleSqueeze: model must be a DistributedDataParallel, got {type(model).__name__}; wrap it first")
    if isinstance(state, type) and issubclass(state, DoubleSqueeze):
        state = state()
    elif isinstance(state, Compressor):
        state = DoubleSqueeze(state)
    elif not isinstance(state, DoubleSqueeze):
        raise TypeError(f"DoubleSqueeze: state must be a DoubleSqueeze or a compressor, got {state!r}")
    _require_on_time(state)
    if state.options.lr_aware and optimizer is None:
        raise ValueError("DoubleSqueeze: lr_aware=True needs the optimizer: register(model, state, optimizer=optimizer)")
    if model._comm_hooks:
        raise RuntimeError("DoubleSqueeze: the model has a communication hook already, and register_comm_hook takes but one")
    exchanged = _exchanged(model)
    named = [(name, p) for name, p in model.module.named_parameters() if p in exchanged]
    if (
        state.options.lr_aware
        and optimizer is not None
        and not exchanged.intersection(p for group in optimizer.param_groups for p in group["params"])
    ):
        raise ValueError("DoubleSqueeze: lr_aware=True needs the optimizer of the model, got one that trains none of it")
    steps = _Steps(state, model, optimizer)
    steps.bind(named, model.process_group)
    if state.options.momentum and optimizer is not None:
        warn_of_two_momenta(state.options.momentum, optimizer.param_groups, stacklevel=2)
    model.register_comm_hook(state, double_squeeze_hook)
    model.register_forward_pre_hook(_RequireUnchanged({name: (p.dtype, p.device) for name, p in named}))
    _steps[state] = steps
    return state


def _require_on_time(state: DoubleSqueeze) -> None:
    if state.options.staleness:
        raise ValueError(
            f"DoubleSqueeze: staleness={state.options.staleness} works with Horovod, and not yet with DistributedDataParallel"
        )


def _exchanged(model: DistributedDataParallel) -> set[Tensor]:
    """The parameters that torch exchanges: those that were trained when it wrapped the model, whatever is frozen now."""
    try:
        return {p for bucket in model.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
    except RuntimeError:  # some have sparse gradients, of which torch makes no such buckets
        ignored = set(getattr(model, "parameters_to_ignore", ()))
        return {p for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored}


class _RequireUnchanged:
    """A hook that finds parameters which were moved or cast: torch would go on, and never call the communication hook again.

    Parameters
    ----------
    expected
        Dtype and device of each parameter, by name.
    """

    def __init__(self, expected: Mapping[str, tuple[torch.dtype, torch.device]]) -> None:
        self._expected = expected

    def __reduce__(self) -> Any:
        """A copy of the model has no communication hook, and may be anywhere."""
        return _RequireUnchanged, ({},)

    def __call__(self, model: DistributedDataParallel, *ignored: Any) -> None:
        for name, p in model.module.named_parameters() if self._expected else ():
            dtype, device = self._expected.get(name, (p.dtype, p.device))
            if p.dtype != dtype or p.device != device:
                raise RuntimeError(
                    f"DoubleSqueeze: parameter {name} was {dtype} on {device}, and is {p.dtype} on {p.device} now; move and "
                    "cast a model before making the DistributedDataParallel"
                )


class _Taken(NamedTuple):
    """A bucket of torch that waits for its gradients."""

    buffer: Tensor
    parameters: list[Tensor]
    gradients: list[Tensor]
    """Views of the buffer."""
    future: Future[Tensor]


class _Steps:
    """The steps of one model.

    Parameters
    ----------
    state
        What the user passed.
    model
        None where it is not known.
    optimizer
        None where it is not known.
    """

    def __init__(
        self,
        state: DoubleSqueeze,
        model: DistributedDataParallel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._state = weakref.ref(state)
        self._model = None if model is None else weakref.ref(model)
        # torch gives the optimizer no gradient of a parameter that no rank has used, and the hook is not told which those are.
        self._skips_unused = model is None or model.find_unused_parameters or model.static_graph
        self._optimizer = optimizer
        self._reducer: Reducer | None = None
        self._names: dict[Tensor, str] = {}
        self._taken: list[_Taken] = []
        self._gradients: dict[Tensor, Tensor] = {}  # of the step under way
        self._zero: dict[Tensor, Tensor] = {}  # whether those that are compressed were, where that is to be known

    def bind(self, named: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup | None = None) -> None:
        """Ties the state to the parameters of the model; all ranks call it."""
        state = self._state()
        assert state is not None
        self._transport = ProcessGroupTransport(state.options.server, group, state.options.hierarchical)
        self._reducer = bind(state, "doublesqueeze", named, True, self._transport, (), self._gradients.get, may_freeze=False)
        self._names = {p: name for name, p in named}

    def take(self, bucket: GradBucket) -> Future[Tensor]:
        """Takes over the gradients of a bucket. Returns a future of its buffer, which is done after the last one.

        In the first step of a static graph torch says of every bucket that it is the first and not the last. So the last one is
        that with which all parameters are there.
        """
        buffer = bucket.buffer()
        parameters = list(bucket.parameters())
        if bucket.index() == 0 and self._taken and self._reducer is None:
            self._forget()
            raise ValueError(
                "DoubleSqueeze: the first step began twice: with static_graph=True and several dtypes, or a sparse embedding, "
                "call ds_horovod.ddp.register(model, ...) in place of register_comm_hook"
            )
        if parameters[0] in self._gradients:  # the last step has failed
            self._forget()
        gradients = (
            [buffer] if buffer.is_sparse else [_in_place(g, p) for g, p in zip(bucket.gradients(), parameters, strict=True)]
        )
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._taken.append(_Taken(buffer, parameters, gradients, future))
        if self._reducer is None and bucket.is_last():
            self._bind_by_number()
        if self._reducer is not None:
            for taken in [t for t in self._taken if t.parameters[0] not in self._gradients]:
                self._hand_over(taken)
            if len(self._gradients) == len(self._names):
                self._finish()
        return future

    def _bind_by_number(self) -> None:
        state = self._state()
        assert state is not None
        if state.options.lr_aware or state.options.choose is not None:
            option = "lr_aware" if state.options.lr_aware else "choose"
            why = "the optimizer" if option == "lr_aware" else "the names of parameters"
            raise ValueError(f"DoubleSqueeze: {option} needs {why}; call ds_horovod.ddp.register(model, ...) instead")
        # The first buckets hold parameters in the order of registration, and come from the last to the first.
        parameters = [p for taken in reversed(self._taken) for p in taken.parameters]
        self.bind([(f"parameter {i}", p) for i, p in enumerate(parameters)])

    def _hand_over(self, taken: _Taken) -> None:
        reducer = self._reducer
        assert reducer is not None
        if not self._gradients:
            self._begin(reducer)
        session = reducer.session
        for p, gradient in zip(taken.parameters, taken.gradients, strict=True):
            if p not in self._names:
                raise ValueError(
                    f"DoubleSqueeze: a bucket holds a parameter of shape {tuple(p.shape)} that is not one of the model that "
                    "this instance belongs to; make one for each model"
                )
            self._gradients[p] = gradient
            if session is not None and session.admit(p):
                if self._skips_unused:  # now: an exchange overwrites it
                    self._zero[p] = _is_zero(gradient)
                session.ready(p)

    def _begin(self, reducer: Reducer) -> None:
        rates = {}
        if self._optimizer is not None and reducer.options.lr_aware:
            groups = self._optimizer.param_groups
            rates = {self._names[p]: float(g["lr"]) for g in groups for p in g["params"] if p in self._names}
        reducer.begin_step(rates, self._scale_everywhere if reducer.session is not None else lambda own: own)

    def _scale_everywhere(self, own: float) -> float:
        """Of the loss. A rank that has ended a `Join` has none, and its scaler is not updated: it takes that of the others."""
        assert self._reducer is not None
        units, model = self._reducer.units, None if self._model is None else self._model()
        if model is None or not model._join_config.enable:
            if own == 0.0 and units.may_skip:
                raise RuntimeError(
                    "DoubleSqueeze: a GradScaler under torch's Join needs ds_horovod.ddp.register(model, ...) in place of "
                    "register_comm_hook"
                )
            return own
        scale, skips = self._transport.largest([own, float(own != 0.0 and units.may_skip)])
        units.skips_elsewhere = bool(skips)
        return scale

    def _finish(self) -> None:
        """All gradients of the step are there."""
        reducer = self._reducer
        assert reducer is not None
        session = reducer.session
        if session is None:
            reducer.clip_alone()
        else:
            session.flush()
            rest = [gradient for p, gradient in self._gradients.items() if not session.covers(p)]
            uncompressed = _Uncompressed(rest, list(self._zero.values()), self._transport, session.weight)
            session.drain()
            zero_everywhere = uncompressed.finish()
            session.settle(lambda: all(bool(_values(gradient).isfinite().all()) for gradient in rest))
            back = {p for p, zero in zip(self._zero, zero_everywhere, strict=True) if zero and not session.skipped}
            for p in [p for p in self._gradients if session.covers(p)]:
                if p in back:
                    session.put_back(p)
                else:
                    session.finish(p)
        reducer.end_step()
        for taken in self._taken:
            taken.future.set_result(taken.buffer)
        self._forget()

    def _forget(self) -> None:
        self._taken.clear()
        self._gradients.clear()
        self._zero.clear()


def _in_place(gradient: Tensor, p: Tensor) -> Tensor:
    """A gradient as its parameter has it: torch lays it out so in the bucket, and says nothing of that.

    Parameters
    ----------
    gradient
        A contiguous view of the bucket, of the parameter's shape.
    """
    strides = sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1)
    numel = 1
    for stride, size in strides:
        if stride != numel:
            return gradient  # it overlaps, or has gaps
        numel *= size
    return gradient.as_strided(p.shape, p.stride(), gradient.storage_offset())


def _is_zero(gradient: Tensor) -> Tensor:
    """Whether all elements are: 1 or 0, of no dimension. On a CPU, where reading all costs time, a few often tell."""
    if gradient.is_cpu and bool(gradient.as_strided((min(_PROBED, gradient.numel()),), (1,), gradient.storage_offset()).any()):
        return gradient.new_zeros((), dtype=torch.float32)
    return (~gradient.any()).float()


class _Uncompressed:
    """Averages gradients that are not compressed, in place, as one tensor for each dtype and device, beside the exchanges.

    Parameters
    ----------
    gradients
        Dense and sparse ones.
    flags
        Of no dimension, float32: each rank's own.
    transport
        To the other ranks.
    weight
        1 / ranks.
    """

    def __init__(
        self, gradients: Sequence[Tensor], flags: Sequence[Tensor], transport: ProcessGroupTransport, weight: float
    ) -> None:
        self._weight, self._flags = weight, list(flags)
        together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for part in [*(g for g in gradients if not g.is_sparse), *flags]:
            together.setdefault((part.dtype, part.device), []).append(part)
        self._under_way: list[tuple[Sent, list[Tensor]]] = []
        for (dtype, _), parts in together.items():
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            wide = flat.float() if dtype in (torch.bfloat16, torch.float16) else flat
            self._under_way.append((transport.begin_total(wide), parts))
        for gradient in gradients:
            if gradient.is_sparse:
                self._under_way.append((transport.begin_total(gradient.detach().coalesce()), [gradient]))
        self._transport = transport

    def finish(self) -> list[bool]:
        """Waits for them. Returns of each flag whether it is set on all ranks."""
        for sent, parts in self._under_way:
            total = self._transport.wait(sent)
            if total.is_sparse:
                parts[0].copy_(total.coalesce() * self._weight)
                continue
            for part, average in zip(parts, (total * self._weight).split([part.numel() for part in parts]), strict=True):
                part.detach().copy_(average.view(part.shape))
        return (torch.stack(self._flags) > 1 - 0.5 * self._weight).tolist() if self._flags else []


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
