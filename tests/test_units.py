"""Errors keep their worth when the loss scale, or the learning rate, changes."""

import math

import pytest
import torch
from support import assert_same_bits, generator

from ds_horovod import DoubleSqueeze, OneBit, TopK
from ds_horovod.double_squeeze import bind
from ds_horovod.in_process import InProcessTransport, Workers
from ds_horovod.units import Units

SHAPES = {"a": (30, 40), "b": (50, 20), "bias": (50,)}


class Scaler:
    def __init__(self, scale=1.0):
        self.scale = scale

    def get_scale(self):
        return self.scale


def named():
    return [(name, torch.zeros(shape, requires_grad=True)) for name, shape in SHAPES.items()]


def make(**options):
    return lambda: DoubleSqueeze(TopK(0.2, values="sign"), server_compressor=OneBit(32), min_numel=1, **options)


def gradients(g, workers=2):
    return [[torch.randn(shape, generator=g) for shape in SHAPES.values()] for _ in range(workers)]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"max_norm": 3.0}, {"warmup_steps": 2}], ids=str)
def test_training_is_the_same_bit_for_bit_whatever_the_loss_scale_does(options):
    scales = [1.0, 1.0, 2.0**16, 2.0**16, 2.0**15, 2.0**17, 1.0]
    scaler = Scaler()
    plain = Workers(make(**options), named(), 2)
    scaled = Workers(make(grad_scaler=scaler, **options), named(), 2)
    g = generator(0)
    for scale in scales:
        scaler.scale = scale
        own = gradients(g)
        times = [[x * scale for x in worker] for worker in own]
        for squeeze in scaled.squeezes:
            squeeze._reducer.begin_step({})
        for expected, result in zip(plain.exchange(own), scaled.exchange(times), strict=True):
            assert_same_bits(result / scale, expected)


def test_without_the_scaler_it_is_not():
    plain, scaled, g = Workers(make(), named(), 2), Workers(make(), named(), 2), generator(0)
    for scale in (1.0, 2.0**10):
        own = gradients(g)
        times = [[x * scale for x in worker] for worker in own]
        results = plain.exchange(own), scaled.exchange(times)
    assert not torch.allclose(results[0][0], results[1][0] / scale)


def test_errors_are_worth_what_they_were_when_the_learning_rate_changes():
    """What was applied and what waits add up to lr * gradient of each step, with the rates of those steps."""
    workers, g = Workers(make(lr_aware=True), named(), 2), generator(1)
    rates = [{"a": 0.1, "b": 0.2}, {"a": 0.05, "b": 0.2}, {"a": 0.05, "b": 0.7}, {"a": 0.011, "b": 0.001}]
    total = {name: torch.zeros(SHAPES[name]).double() for name in "ab"}
    applied = {name: torch.zeros(SHAPES[name]).double() for name in "ab"}
    for lr in rates:
        own = gradients(g)
        for i, name in enumerate("ab"):
            total[name] += lr[name] * torch.stack([worker[i] for worker in own]).double().mean(0)
        for squeeze in workers.squeezes:
            squeeze._reducer.begin_step(lr)
        for name, result in zip("ab", workers.exchange(own), strict=False):
            applied[name] += lr[name] * result
    for b, bucket in enumerate(workers.sessions[0].buckets):
        exchanges = [session.buckets[b].exchange for session in workers.sessions]
        kept = torch.stack([x.worker_error for x in exchanges]).double().mean(0) + torch.cat(
            [x.server_error for x in exchanges]
        )
        layout = bucket.exchange.layout
        for name, offset, numel in zip(bucket.names, layout.offsets, layout.numels, strict=True):
            waits = rates[-1][name] * kept[offset : offset + numel].view(SHAPES[name])
            torch.testing.assert_close(applied[name] + waits, total[name], rtol=1e-4, atol=1e-6)


def test_velocities_follow_the_loss_scale_alone():
    scaler = Scaler()
    workers = Workers(make(grad_scaler=scaler, lr_aware=True, momentum=0.9), named(), 2)
    squeeze, exchange = workers.squeezes[0], workers.sessions[0].buckets[0].exchange
    squeeze._reducer.begin_step({"a": 1.0, "b": 1.0})
    workers.exchange(gradients(generator(0)))
    velocity, bias = exchange.velocity.clone(), squeeze._reducer.velocities.state_dict()["bias"].clone()
    squeeze._reducer.begin_step({"a": 0.5, "b": 0.5})
    assert_same_bits(exchange.velocity, velocity)
    scaler.scale = 4.0
    squeeze._reducer.begin_step({"a": 0.5, "b": 0.5})
    assert_same_bits(exchange.velocity, velocity * 4)
    assert_same_bits(squeeze._reducer.velocities.state_dict()["bias"], bias * 4)


def test_residuals_carried_over_to_one_rank_follow_too():
    """A file of several ranks, written at another loss scale and learning rate, and loaded by one."""
    scaler = Scaler(2.0)
    squeeze = make(grad_scaler=scaler, lr_aware=True)()
    assert bind(squeeze, "alone", named(), True, InProcessTransport.group(1)[0]).session is None
    workers = Workers(make(), named(), 2)
    workers.exchange(gradients(generator(0)))
    state = workers.squeezes[0].full_state_dict()
    state["units"] = {"scale": 1.0, "learning_rates": {"a": 0.5, "b": 0.5}}
    squeeze.load_state_dict(state)
    squeeze._reducer.begin_step({"a": 0.25, "b": 0.5})
    own = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    squeeze._reducer.add_carried_over(own.items())
    assert_same_bits(own["a"], state["errors"]["a"] * 4)
    assert_same_bits(own["b"], state["errors"]["b"] * 2)


def test_units():
    scaler = Scaler(8.0)
    units = Units(scaler, lr_aware=True)
    assert units.begin_step({"a": 0.5}) == (8.0, {})
    assert units.begin_step({"a": 0.5}) is None
    assert units.begin_step({"a": 0.25}) == (1.0, {"a": 2.0})
    for nothing in (0.0, -1.0, math.nan, math.inf):
        assert units.begin_step({"a": nothing}) is None
        scaler.scale = nothing
        assert units.begin_step({"a": 0.25}) is None and units.scale == 8.0
    scaler.scale = 2.0
    other = Units(scaler, lr_aware=True)
    other.load_state_dict(units.state_dict())
    assert other.begin_step({"a": 1.0}) == (0.25, {"a": 0.25})
    assert Units().begin_step({"a": 1.0}) is None


def test_what_is_no_scaler():
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler, got 65536"):
        DoubleSqueeze(grad_scaler=65536)


# ---- a gradient belongs to the exchange between backward() and synchronize()


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("change", ["in place", "another"])
def test_a_gradient_that_is_changed_in_flight(change, started):
    workers, g = Workers(make(), named(), 2), generator(0)
    if started:
        workers.exchange(gradients(g))
    session = workers.sessions[0]
    for (_, p), gradient in zip(session.parameters, gradients(g)[0], strict=True):
        p.grad = gradient
        if session.admit(p):
            session.ready(p)
    p = session.parameters[1][1]
    if change == "in place":
        p.grad.mul_(0.5)
    else:
        p.grad = p.grad * 0.5
    with pytest.raises(RuntimeError, match=r"the gradient of b was changed after backward\(\) and before synchronize"):
        session.flush()
