"""Tentative steps: a gradient is computed where the updates that are under way will have led the weights.

With staleness, the weights of a step lack the updates of the last steps, whose averages are still to come. A gradient that is
computed there is applied elsewhere, which ruins training with momentum or Adam. So each worker moves its weights for forward
and backward, by steps of its optimizer with estimates of those averages, and puts them back.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

Estimate = dict[Tensor, Tensor]
"""Of the averaged gradient of each parameter in a step to come."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART_NBYTES = 2**24  # of weights that are led together; their copies and those of their state are in memory meanwhile
_BY_PARAMETER = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop")
"""torch's optimizers that treat each parameter by itself, and so some of them at a time."""


class _Moved(NamedTuple):
    """The weights of one parameter that are led elsewhere."""

    parameter: Tensor
    difference: Tensor
    """The bits in which both kinds of weights differ: integers, of the shape of the parameter."""
    samples: tuple[Tensor, Tensor]
    """Some of the weights, as they are and as they are led."""
    version: int


class Tentative:
    """The weights of an optimizer, and where the updates lead that are under way.

    A copy of the optimizer says where: it takes its steps with estimates of the averaged gradients, on copies of weights and
    state. What is kept is the difference of the bits of both kinds of weights, as large as the weights: one pass over it
    leads from the ones to the others and back, exactly, as often as need be.

    Parameters
    ----------
    optimizer
        Of torch. Nothing of it is changed but the weights.
    kind
        Its class, whose ``step`` is taken. Default: ``type(optimizer)``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer] | None = None) -> None:
        self._optimizer = weakref.ref(optimizer)  # which holds on to this
        self._kind = type(optimizer) if kind is None else kind
        self._led: list[_Moved] = []
        self.moved = False
        """Whether the weights are where updates lead."""

    def lead(self, estimates: Sequence[Estimate]) -> None:
        """Finds where coming updates lead the weights; `toggle` moves them there.

        Parameters
        ----------
        estimates
            One for each update; used up.
        """
        assert not self.moved
        self._led = []
        for group, parameters in self._parts(estimates):
            self._lead(group, parameters, estimates)

    def _parts(self, estimates: Sequence[Estimate]) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        apart = self._kind.__module__.startswith("torch.optim.") and self._kind.__name__ in _BY_PARAMETER
        optimizer = self._optimizer()
        for group in [] if optimizer is None else optimizer.param_groups:
            part: list[Tensor] = []
            for p in group["params"]:
                if any(p in estimate for estimate in estimates):
                    part.append(p)
                if apart and sum(q.numel() * q.element_size() for q in part) >= _PART_NBYTES:
                    yield group, part
                    part = []
            if part:
                yield group, part

    def _lead(self, group: dict[str, Any], parameters: list[Tensor], estimates: Sequence[Estimate]) -> None:
        copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
        optimizer = self._optimizer()
        assert optimizer is not None
        shadow = object.__new__(self._kind)
        shadow.__dict__.update(optimizer.__dict__)
        shadow.__dict__.pop("step", None)  # which schedulers replace
        shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        state = optimizer.state
        shadow.state = defaultdict(dict, {c: _copied(state[p]) for p, c in zip(parameters, copies, strict=True) if p in state})
        shadow.param_groups = [{**group, "params": copies}]
        step = getattr(self._kind.step, "__wrapped__", self._kind.step)  # without the hooks of all optimizers
        for estimate in estimates:
            for p, copy in zip(parameters, copies, strict=True):
                copy.grad = estimate.get(p)
            step(shadow)
        for p, copy in zip(parameters, copies, strict=True):
            samples = _sample(p), _sample(copy)
            bits = _bits(copy.detach())
            self._led.append(_Moved(p, bits.bitwise_xor_(_bits(p.detach())), samples, p._version))
            for estimate in estimates:
                estimate.pop(p, None)

    def toggle(self) -> None:
        """Moves the weights where `lead` found that they are led; or back, bit for bit.

        Raises
        ------
        RuntimeError
            Somebody else has changed them since. They are where they should be.
        """
        changed = False
        for p, difference, samples, version in self._led:
            if p._version == version and torch.equal(_sample(p), samples[self.moved]):
                # Autograd must not take it for a change: the weights of a backward are those of its forward.
                _bits(p.data).bitwise_xor_(difference)
            else:
                changed = True
        self.moved = not self.moved
        if changed:
            self._led, self.moved = [], False
            raise RuntimeError(
                "DoubleSqueeze: weights have been changed between forward and backward, while they were where a tentative step "
                "had led them; change them between two steps, or leave model= out"
            )


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_INTEGERS[tensor.element_size()])


def _sample(tensor: Tensor) -> Tensor:
    bits = _bits(tensor.detach())
    return bits[..., 0].clone() if bits.dim() else bits.clone()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(own) for key, own in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(own) for own in value)
    return value


class TentativeSteps:
    """Takes the tentative steps of one optimizer: from a forward of its model in training to the end of backward.

    Parameters
    ----------
    tentative
        The weights.
    estimates
        Of the updates under way; see `Tentative.lead`.
    updates
        Tells the updates under way from others: a number that is another one once they have changed.
    """

    def __init__(self, tentative: Tentative, estimates: Callable[[], list[Estimate]], updates: Callable[[], int]) -> None:
        self._tentative, self._estimates, self._updates = tentative, estimates, updates
        self._led_by: int | None = None
        self._backward: weakref.ref[_Backward] | None = None
        self.entered = False
        """Whether any has been asked for."""

    def enter(self) -> None:
        """Moves the weights, unless they are moved."""
        self.entered = True
        if self._tentative.moved:
            return
        updates = self._updates()
        if self._led_by != updates:
            self._led_by = updates
            estimates = self._estimates()
            with torch.no_grad():
                self._tentative.lead(estimates)
        self._tentative.toggle()

    def leave(self) -> None:
        """Puts the weights back, bit for bit, if they are moved."""
        if self._tentative.moved:
            self._tentative.toggle()

    def leave_after_backward(self) -> None:
        """Puts the weights back once the backward that runs has ended, or failed."""
        if self._tentative.moved and (self._backward is None or self._backward() is None):
            backward = _Backward(self)
            self._backward = weakref.ref(backward)
            Variable._execution_engine.queue_callback(backward.end)

    def enter_again(self) -> None:
        """A backward reaches what a forward has computed, for the second time: with the weights of that forward."""
        if not self._tentative.moved and self._led_by == self._updates():
            self._tentative.toggle()
            self.leave_after_backward()

    @contextmanager
    def entered_here(self) -> Iterator[None]:
        """Moves the weights for a forward and its backward."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def attach(self, model: nn.Module) -> None:
        """Moves the weights in each forward of a model in training, and puts them back where anybody asks for them."""
        model.register_forward_pre_hook(_Hook(self, model, _before_forward))
        model.register_forward_hook(_Hook(self, model, _after_forward), always_call=True)
        for module in model.modules():
            module.register_state_dict_pre_hook(_Hook(self, module, _before_state))
            module.register_load_state_dict_pre_hook(_Hook(self, module, _before_state))
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(functools.partial(_after_gradient, weakref.ref(self)))


class _Backward:
    """A backward that runs. Autograd alone holds it, and so forgets it where the backward fails, too."""

    def __init__(self, steps: TentativeSteps) -> None:
        self._steps = steps

    def end(self) -> None:
        self._steps.leave()

    def __del__(self) -> None:
        self._steps.leave()


class _Hook:
    """A hook of a module. Copies of the module, and files, have one that does nothing."""

    def __init__(self, steps: TentativeSteps | None, module: nn.Module | None, run: Callable[..., None]) -> None:
        self._steps = None if steps is None else weakref.ref(steps)
        self._module = None if module is None else weakref.ref(module)
        self._run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, None, self._run)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *args: Any) -> None:
        steps = None if self._steps is None else self._steps()
        if steps is not None and self._module is not None and self._module() is module:
            self._run(steps, module, *args)


def _before_forward(steps: TentativeSteps, module: nn.Module, args: Any) -> None:
    if not module.training:
        steps.leave()
    elif torch.is_grad_enabled():
        steps.enter()


def _after_forward(steps: TentativeSteps, module: nn.Module, args: Any, output: Any) -> None:
    if output is None and sys.exc_info()[0] is not None:  # it has failed
        steps.leave()
    elif module.training and torch.is_grad_enabled():
        again = functools.partial(_enter_again, weakref.ref(steps))
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(again)


def _before_state(steps: TentativeSteps, module: nn.Module, *args: Any) -> None:
    steps.leave()


def _enter_again(steps: weakref.ref[TentativeSteps], gradient: Tensor) -> None:
    own = steps()
    if own is not None:
        own.enter_again()


def _after_gradient(steps: weakref.ref[TentativeSteps], p: Tensor) -> None:
    own = steps()
    if own is not None:
        own.leave_after_backward()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from _tensors(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _tensors(own)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
