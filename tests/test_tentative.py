"""Tentative steps: where the weights are, who sees them there, and that they are put back bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_horovod import DoubleSqueeze
from ds_horovod.tentative import Tentative, TentativeSteps


class Plain(torch.optim.Optimizer):
    """A user's own: its state depends on all parameters together, and its group changes with each step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "taken": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            norm = sum(p.grad.norm() for p in group["params"] if p.grad is not None)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["sum"] = state.get("sum", 0) + p.grad / norm
                    p -= group["lr"] / group["taken"] * state["sum"]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "own": lambda p: Plain(p, lr=0.1),
}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()}


def apply(model, optimizer, seed):
    for p, gradient in gradients(model, seed).items():
        p.grad = gradient
    optimizer.step()


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_weights_are_led_where_the_optimizer_takes_them(name, updates, dtype):
    model = net(dtype)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # counts the calls of step
    for seed in range(2):
        apply(model, optimizer, seed)
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    twin, twins = copy.deepcopy((model, optimizer))
    for seed in range(10, 10 + updates):
        apply(twin, twins, seed)
    counted = optimizer._opt_called
    optimizer._opt_called = "as it was"
    steps = Tentative(optimizer)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the user's hook has run"))
    steps.lead([gradients(model, seed) for seed in range(10, 10 + updates)])
    assert same(bits(model), before)
    for _ in range(2):
        steps.toggle()
        assert same(bits(model), bits(twin)) and not same(before, bits(twin))
        steps.toggle()
        assert same(bits(model), before)
    assert counted and optimizer._opt_called == "as it was"
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"] and after["state"].keys() == state["state"].keys()
    for i, own in state["state"].items():
        for key, value in own.items():
            assert torch.equal(torch.as_tensor(after["state"][i][key]), torch.as_tensor(value)), (i, key)


def test_parts_of_a_large_model_are_led_alike(monkeypatch):
    monkeypatch.setattr("ds_horovod.tentative._PART_NBYTES", 64)
    test_the_weights_are_led_where_the_optimizer_takes_them("adamw", 2, torch.float32)


def test_a_parameter_without_an_estimate_stays():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, (first, *_), before = Tentative(optimizer), model.parameters(), bits(model)
    steps.lead([{first: torch.ones_like(first)}])
    steps.toggle()
    after = bits(model)
    assert torch.equal(after[0], before[0] - 0.1) and same(after[1:], before[1:])


class Seen:
    """A model that is attached, and where its weights were in each forward."""

    def __init__(self, forward=None, wrap=lambda model: model):
        self.model = net()
        self.true = bits(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.updates = 1
        ones = lambda: [{p: torch.ones_like(p) for p in self.model.parameters()}]  # noqa: E731
        self.steps = TentativeSteps(Tentative(self.optimizer), ones, lambda: self.updates)
        self.led = [p - 0.1 for p in self.true]
        self.called = wrap(self.model)
        self.steps.attach(self.called)
        self.x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

    def where(self):
        own = bits(self.model)
        assert same(own, self.true) or same(own, self.led)
        return "true" if same(own, self.true) else "led"

    def gradient(self, at):
        """Of the sum of squares of what the model returns, at weights."""
        twin = net()
        with torch.no_grad():
            for p, value in zip(twin.parameters(), at, strict=True):
                p.copy_(value)
        twin(self.x).square().sum().backward()
        return [p.grad for p in twin.parameters()]

    def own(self):
        return [p.grad for p in self.model.parameters()]


def test_forward_and_backward_see_the_weights_elsewhere_and_nobody_else_does():
    seen = Seen()
    out = seen.called(seen.x)
    assert seen.where() == "led"
    out.square().sum().backward()
    assert seen.where() == "true" and same(seen.own(), seen.gradient(seen.led))


def test_several_forwards_and_backwards_in_one_step():
    """Accumulation, and two models' outputs in one loss: the weights are the same in each."""
    seen = Seen()
    for _ in range(2):
        loss = seen.called(seen.x).square().sum() / 2 + seen.called(seen.x).square().sum() / 2
        loss.backward()
        assert seen.where() == "true"
    torch.testing.assert_close(seen.own(), [2 * g for g in seen.gradient(seen.led)])
    seen.updates += 1  # new estimates: the same again
    seen.called(seen.x)
    assert seen.where() == "led"


@pytest.mark.parametrize("output", [lambda y: y, lambda y: {"logits": [y]}], ids=["tensor", "dictionary"])
def test_a_graph_that_is_kept_sees_its_own_weights_twice(output):
    seen = Seen()
    seen.model.register_forward_hook(lambda module, args, y: output(y))
    out = seen.called(seen.x)
    out = out if isinstance(out, torch.Tensor) else out["logits"][0]
    loss = out.square().sum()
    loss.backward(retain_graph=True)
    assert seen.where() == "true"
    loss.backward()
    assert seen.where() == "true"
    torch.testing.assert_close(seen.own(), [2 * g for g in seen.gradient(seen.led)])


def test_a_gradient_of_an_input_does_not_end_it():
    """A gradient penalty differentiates twice; the weights stay for the second backward."""
    seen = Seen()
    x = seen.x.clone().requires_grad_()
    (inner,) = torch.autograd.grad(seen.called(x).square().sum(), x, create_graph=True)
    assert seen.where() == "led"
    inner.square().sum().backward()
    assert seen.where() == "true"


def test_evaluation_and_statistics_without_gradients():
    seen = Seen()
    with torch.no_grad():
        seen.called(seen.x)
        assert seen.where() == "true"
    seen.called.eval()
    seen.called(seen.x).square().sum().backward()
    assert seen.where() == "true" and same(seen.own(), seen.gradient(seen.true))
    seen.called.train()
    seen.called(seen.x)
    assert seen.where() == "led"
    seen.called.eval()(seen.x)  # the forward before has had no backward
    assert seen.where() == "true"


def test_whoever_asks_for_the_state_gets_the_weights():
    seen = Seen()
    for module in (seen.model, seen.model[0]):
        seen.called(seen.x)
        assert seen.where() == "led"
        module.state_dict()
        assert seen.where() == "true"
    out = seen.called(seen.x)
    seen.model.load_state_dict(dict(zip(seen.model.state_dict(), seen.true, strict=True)))
    assert seen.where() == "true"
    del out


def test_a_forward_or_backward_that_fails_puts_them_back():
    seen = Seen()
    with pytest.raises(RuntimeError, match="shapes"):
        seen.called(torch.ones(4, 6))
    assert seen.where() == "true"
    out = seen.called(seen.x)
    handle = seen.model[0].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.square().sum().backward()
    assert seen.where() == "true"
    handle.remove()
    seen.model.zero_grad()
    seen.called(seen.x).square().sum().backward()
    assert same(seen.own(), seen.gradient(seen.led))


def test_copies_and_files_of_the_model_know_nothing_of_it():
    seen = Seen()
    copied = copy.deepcopy(seen.model)
    buffer = io.BytesIO()
    torch.save(seen.model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    average = torch.optim.swa_utils.AveragedModel(seen.model)
    for other in (copied, loaded, average, pickle.loads(pickle.dumps(seen.model))):
        other(seen.x).square().sum().backward()
        assert seen.where() == "true" and same(bits(other), seen.true)


def test_checkpointed_and_compiled_modules():
    def checkpointed(model):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=False)

        return Outer()

    for wrap in (checkpointed, lambda model: torch.compile(model, backend="eager")):
        seen = Seen(wrap=wrap)
        out = seen.called(seen.x)
        assert seen.where() == "led"
        out.square().sum().backward()
        assert seen.where() == "true"
        torch.testing.assert_close(seen.own(), seen.gradient(seen.led))


@pytest.mark.parametrize("change", [lambda p: p.detach().mul_(2), lambda p: p.data.mul_(2)], ids=["in place", "data"])
def test_weights_that_somebody_changes_meanwhile(change):
    """They stay as they were made, never a mixture of bits; and the next step is as always."""
    seen = Seen()
    seen.called(seen.x)
    first = seen.model[0].weight
    change(first)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        seen.steps.leave()
    assert torch.equal(first, 2 * seen.led[0]) and same(bits(seen.model)[1:], seen.true[1:])
    seen.steps.leave()


def test_code_without_a_module():
    seen = Seen()
    with seen.steps.entered_here():
        assert seen.where() == "led"
    assert seen.where() == "true"
    with pytest.raises(ZeroDivisionError), seen.steps.entered_here():
        raise ZeroDivisionError
    assert seen.where() == "true"


def test_bad_input():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, or None; got 3"):
        DoubleSqueeze(staleness=1, model=3)
    with pytest.raises(ValueError, match=r"model= needs staleness, from 1 to 4; got 0"):
        DoubleSqueeze(model=net())
    squeeze = DoubleSqueeze(staleness=1)
    with pytest.raises(TypeError, match="model must be"):
        squeeze.attach("net")
    squeeze.attach(net())
    assert repr(squeeze) == "DoubleSqueeze(staleness=1, model=Sequential)"
    assert copy.deepcopy(squeeze).options.model is None
    with pytest.raises(ValueError, match="needs staleness"):
        DoubleSqueeze().attach(net())
    with DoubleSqueeze().tentative():
        pass
