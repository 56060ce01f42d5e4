"""Gradients that come late, on a real Horovod: see checking.py."""

import copy
import gc
import warnings
import weakref

import horovod.torch as hvd
import torch
from checking import assert_identical, batch, distributed, flat, main, small_model, squeeze, train_step
from registry import check, raises
from torch.nn.functional import cross_entropy

from ds_horovod import NoCompression, OneBit, Quantize, RandomK, TopK
from ds_horovod.exchange import InFlight
from ds_horovod.uncompressed import clip


def backward(model, optimizer, step, scaler=None):
    """Returns this rank's gradients by name."""
    optimizer.zero_grad()
    x, y = batch(step)
    loss = cross_entropy(model(x).float(), y)
    own = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return {name: gradient.double() for (name, _), gradient in zip(model.named_parameters(), own, strict=True)}


def mean(gradients):
    return {name: hvd.allreduce(gradient, name=f"mean.{name}") for name, gradient in gradients.items()}


def waits(optimizer):
    """All that has not arrived, by name, in units of gradients that are not scaled."""
    state = optimizer.double_squeeze.full_state_dict()
    held = {name: error.double() / state["units"]["scale"] for name, error in state["errors"].items()}
    for name, average in state["late"].items():
        held[name] = held.get(name, 0.0) + average.double() / state["units"]["scale"]
    return held


@check
def nothing_is_lost_however_late():
    """The sum of mean gradients is what has arrived and what waits, in errors and under way; with flushes in between."""
    for compressor, staleness, options in (
        (OneBit(64), 1, {}), (Quantize(4, 64), 2, {"server": 0}), (TopK(0.1), 4, {}), (RandomK(0.2), 1, {"sync_steps": 3}),
        (NoCompression(), 1, {"server_compressor": OneBit(64), "warmup_steps": 2}),
    ):  # fmt: skip
        model = small_model()
        optimizer = distributed(model, squeeze(compressor, staleness=staleness, **options))
        total = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
        not_taken = 0
        for step in range(9):
            before = flat(model.parameters())
            for name, average in mean(backward(model, optimizer, step)).items():
                total[name] += average
            optimizer.synchronize()
            due = optimizer._double_squeeze_reducer.is_due
            for name, p in model.named_parameters():
                total[name] -= p.grad.double()
                assert due or not p.grad.any()
            with optimizer.skip_synchronize():
                optimizer.step()
            not_taken += not due
            assert due or torch.equal(before, flat(model.parameters()))
            assert_identical(model)
            if step == 5:
                optimizer.double_squeeze.flush()
            held = waits(optimizer)
            for name, missing in total.items():
                off = (missing - held.get(name, torch.zeros(()))).abs().max()
                assert off < 1e-5, (compressor, staleness, step, name, off)
        assert not_taken == min(staleness, 6 - options.get("sync_steps", 0)) + min(staleness, 3), not_taken


@check
def it_is_the_synchronous_exchange_one_step_later():
    """Without compression: the same gradients, a step later, and no trace of the first steps in the optimizer."""
    for kind, options in ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})):
        late_model, model = small_model(), small_model()
        late = distributed(late_model, squeeze(NoCompression(), staleness=2), kind, options)
        optimizer = kind(model.parameters(), **options)
        pending = []
        for step in range(7):
            pending.append(mean(backward(late_model, late, step)))
            late.step()
            if step >= 2:
                for (_, p), gradient in zip(model.named_parameters(), pending.pop(0).values(), strict=True):
                    p.grad = gradient.float()
                optimizer.step()
            torch.testing.assert_close(flat(late_model.parameters()), flat(model.parameters()), rtol=1e-4, atol=1e-6)
        for _ in range(2):  # what is under way is applied by steps without backward
            late.zero_grad()
            late.step()
            for (_, p), gradient in zip(model.named_parameters(), pending.pop(0).values(), strict=True):
                p.grad = gradient.float()
            optimizer.step()
        torch.testing.assert_close(flat(late_model.parameters()), flat(model.parameters()), rtol=1e-4, atol=1e-6)
        assert_identical(late_model)


@check
def a_scaler_with_steps_that_it_skips():
    """Steps under way follow the scale, and what arrives in a skipped step goes back into the errors."""
    for staleness in (1, 2):
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64), staleness=staleness))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        total = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
        for step in range(9):
            given = backward(model, optimizer, step, scaler)
            before = flat(model.parameters())
            for name, average in mean(given).items():
                total[name] += average
            scale = scaler.get_scale()
            scaler.unscale_(optimizer)
            arrived = {name: p.grad.double().clone() for name, p in model.named_parameters()}
            scaler.step(optimizer)
            scaler.update()
            assert step >= staleness or torch.equal(before, flat(model.parameters()))
            assert_identical(model)
            for name in total:
                total[name] -= arrived[name]
            held = waits(optimizer)
            for name, missing in total.items():
                off = (missing - held.get(name, torch.zeros(()))).abs().max()
                assert off < 1e-4, (staleness, step, name, off, scale)
        assert scaler.get_scale() > 2.0**8


@check
def what_is_not_finite_on_one_rank():
    """The scaler skips the step in which it arrives; the rest of that step goes back into the errors."""
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skipped = []
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(step)
        if step == 2 and hvd.rank() == 0:
            x[0, 0] = float("inf")
        before = flat(model.parameters())
        scaler.scale(cross_entropy(model(x).float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(before, flat(model.parameters())))
        assert_identical(model)
        assert all(error.isfinite().all() for error in waits(optimizer).values())
    assert skipped == [True, False, False, True, False, False], skipped


@check
def a_skipped_step_keeps_what_arrives():
    """A bias overflows on one rank; what comes with it of other layers is finite, and no optimizer takes it."""
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    total = {name: torch.zeros(p.shape).double() for name, p in weights.items()}
    skipped = []
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(step)
        loss = cross_entropy(model(x), y)
        own = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        for name, average in mean({name: g.double() for name, g in zip(weights, own, strict=True)}).items():
            total[name] += average
        if step == 2 and hvd.rank() == 0:
            loss = loss + (model[4].bias * float("inf")).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before, arrived = flat(model.parameters()), {name: p.grad.double().clone() for name, p in weights.items()}
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(before, flat(model.parameters())))
        held = waits(optimizer)
        for name in total:
            if not skipped[-1]:
                total[name] -= arrived[name]
            assert (total[name] - held[name]).abs().max() < 1e-5, (step, name)
    assert skipped == [True, False, False, True, False, False], skipped


@check
def training_goes_on_from_a_file():
    """What was under way is part of the errors then."""
    for full in (False, True):
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.1), staleness=2, momentum=0.5))
        for step in range(5):
            train_step(model, optimizer, step)
        held = waits(optimizer)
        state = optimizer.double_squeeze.full_state_dict() if full else optimizer.double_squeeze.state_dict()
        other = distributed(small_model(), squeeze(TopK(0.1), staleness=2, momentum=0.5))
        other.double_squeeze.load_state_dict(state)
        for name, error in waits(other).items():
            assert (error - held[name]).abs().max() < 1e-5, (full, name)
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    for step in range(4):
        train_step(model, optimizer, step)
    held = waits(optimizer)
    optimizer.double_squeeze.change_compressor(Quantize(4, 64))
    for name, error in waits(optimizer).items():
        assert (error - held[name]).abs().max() < 1e-5, name
    train_step(model, optimizer, 4)
    assert_identical(model)


@check
def ranks_that_join_while_gradients_are_under_way_are_told():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    train_step(model, optimizer, 0)
    with raises(RuntimeError, "hvd.join() while gradients are under way", "staleness=1", "flush()"):
        hvd.join()
    optimizer.double_squeeze.flush()
    if hvd.rank() > 0:  # uneven data: an allreduce takes the gradients of those that still train
        before = flat(model.parameters())
        train_step(model, optimizer, 1)
        assert not torch.equal(before, flat(model.parameters()))
    hvd.join()


@check
def ranks_that_join_once_the_optimizer_is_gone():
    """Its last exchange is finished first: Horovod's process crashes where one rank joins and another has begun a reply."""
    for _ in range(3):
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
        for step in range(2):
            train_step(model, optimizer, step)
        session = optimizer.double_squeeze._reducer.session
        while hvd.rank() > 0 and any(work.stage < 1 for work in session.pipeline.in_flight):
            session.poll()
        gone = weakref.ref(optimizer)
        del optimizer, session
        gc.collect()
        assert gone() is None
        hvd.join()


@check
def optimizers_that_ranks_lose_in_different_orders():
    models = [small_model() for _ in range(2)]
    optimizers = [distributed(model, squeeze(OneBit(64), staleness=1)) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(2):
            train_step(model, optimizer, step)
    del optimizer
    for _ in range(2):
        del optimizers[hvd.rank() % len(optimizers)]
        gc.collect()
    hvd.join()


@check
def a_step_that_is_dropped_and_one_without_backward():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    for step in range(3):
        train_step(model, optimizer, step)
    x, y = batch(3)
    cross_entropy(model(x), y).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    for step in range(4, 6):
        train_step(model, optimizer, step)
        assert_identical(model)
    if hvd.rank() == 0:
        optimizer.zero_grad()
        optimizer.step()
    else:
        train_step(model, optimizer, 6)
    assert_identical(model)


@check
def late_gradients_of_layers_that_are_frozen_for_a_while():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    for step in range(8):
        if step in (2, 5):
            optimizer.double_squeeze.flush()
            model[0].weight.requires_grad_(step == 5)
        before = model[0].weight.detach().clone()
        train_step(model, optimizer, step)
        assert_identical(model)
        assert not 2 <= step < 5 or torch.equal(before, model[0].weight)


def led(model, optimizer, kind, options, estimates):
    """Where the optimizer would take the weights with estimates of coming averages, by a plain one of its kind."""
    twin = copy.deepcopy(model)
    plain = kind(twin.parameters(), **options)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for estimate in estimates:
        for p, gradient in zip(twin.parameters(), estimate, strict=True):
            p.grad = gradient
        plain.step()
    return [p.detach() for p in twin.parameters()]


@check
def tentative_steps():
    """Gradients are those at weights that this rank's own pending gradients lead to, and nothing else is another one: a twin
    that moves its weights by hand stays bit for bit the same, on all ranks."""
    for kind, options, how, scaled in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"staleness": 1}, False),
        (torch.optim.AdamW, {"lr": 0.01}, {"staleness": 2}, False),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"staleness": 1, "sync_steps": 2}, True),
        (torch.optim.SGD, {"lr": 0.1}, {"staleness": 1, "max_norm": 0.5, "warmup_steps": 2}, False),
    ):
        model, other = small_model(), small_model()
        optimizer = distributed(model, squeeze(Quantize(4, 64), model=model, **how), kind, options)
        by_hand = distributed(other, squeeze(Quantize(4, 64), **how), kind, options)
        scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, enabled=scaled) for _ in range(2)]
        schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in (optimizer, by_hand)]
        pending, moved = [], 0
        for step in range(7):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            there = flat(led(other, by_hand, kind, options, pending))
            assert torch.equal(flat(model.parameters()), there), (kind, how, step)
            moved += not torch.equal(flat(other.parameters()), there)
            scalers[0].scale(loss).backward()
            assert torch.equal(flat(model.parameters()), flat(other.parameters())), (kind, how, step)

            by_hand.zero_grad()
            true = [p.detach().clone() for p in other.parameters()]
            for p, value in zip(other.parameters(), led(other, by_hand, kind, options, pending), strict=True):
                p.data.copy_(value)
            scalers[1].scale(cross_entropy(other(x), y)).backward()
            for p, value in zip(other.parameters(), true, strict=True):
                p.data.copy_(value)
            own = [p.grad / scalers[1].get_scale() for p in other.parameters()]
            if "max_norm" in how:
                clip([("", gradient) for gradient in reversed(own)], how["max_norm"])  # in the order of backward
            if step >= how.get("sync_steps", 0):
                pending.append(own)
            for o, scaler, schedule in zip((optimizer, by_hand), scalers, schedules, strict=True):
                scaler.step(o)
                scaler.update()
                schedule.step()
            if len(pending) > how["staleness"]:
                pending.pop(0)
            assert torch.equal(flat(model.parameters()), flat(other.parameters())), (kind, how, step)
            assert_identical(model)
        assert moved == 6 - how.get("sync_steps", 0), moved


@check
def tentative_steps_with_accumulation_and_by_hand():
    model, other = small_model(), small_model()
    kind = {"kind": torch.optim.SGD, "options": {"lr": 0.1, "momentum": 0.9}, "backward_passes_per_step": 2}
    first = distributed(model, squeeze(OneBit(64), staleness=1, model=model), **kind)
    second = distributed(other, squeeze(OneBit(64), staleness=1), **kind)
    for step in range(5):
        for i in range(2):
            x, y = batch(2 * step + i)
            cross_entropy(model(x), y).backward()
            with second.double_squeeze.tentative():
                cross_entropy(other(x), y).backward()
            assert torch.equal(flat(model.parameters()), flat(other.parameters()))
        for optimizer in first, second:
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:
            for optimizer in first, second:
                optimizer.double_squeeze.flush()  # nothing leads anywhere now
            model(batch(0)[0])
            assert torch.equal(flat(model.parameters()), flat(other.parameters()))
        assert_identical(model)
        assert torch.equal(flat(model.parameters()), flat(other.parameters())), step


@check
def staleness_without_tentative_steps_is_told_once():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            train_step(model, optimizer, step)
    told = [str(w.message) for w in caught if "no tentative step makes up for it" in str(w.message)]
    assert len(told) == 1, told
    with raises(ValueError, "model must have parameters of the optimizer; Sequential has none"):
        optimizer.double_squeeze.attach(small_model())
    optimizer.double_squeeze.attach(model)
    train_step(model, optimizer, 4)
    x, _ = batch(5)
    before = flat(model.parameters())
    model(x)
    assert not torch.equal(before, flat(model.parameters()))
    assert torch.equal(before, flat(model.state_dict().values()))  # as they are, for whoever asks
    optimizer.zero_grad()
    optimizer.step()


@check
def what_was_sent_before_a_layer_froze_is_not_lost():
    """On a slow network, server passes come after a layer has been frozen, and after it is trained again."""
    poll, held_back = InFlight.poll, [None]
    InFlight.poll = lambda work, stages: work.done if work.label == held_back[0] else poll(work, stages)
    try:
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.2), staleness=1))
        total = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
        for step in range(9):
            frozen = 2 <= step < 5
            model[2].requires_grad_(not frozen)
            optimizer.zero_grad(set_to_none=False)
            held_back[0] = f".{step % 2}" if step % 3 else None
            x, y = batch(step)
            loss = cross_entropy(model(x), y)
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            own = torch.autograd.grad(loss, [p for _, p in trained], retain_graph=True)
            loss.backward()
            for name, average in mean({name: g.double() for (name, _), g in zip(trained, own, strict=True)}).items():
                total[name] += average
            optimizer.step()
            for name, p in model.named_parameters():
                total[name] -= p.grad.double() if p.grad is not None else 0.0
            held_back[0] = None if step == 3 else held_back[0]
            if step == 3:
                optimizer.double_squeeze.state_dict()
        held_back[0] = None
        held = waits(optimizer)
        for name, missing in total.items():
            assert (missing - held.get(name, torch.zeros(()))).abs().max() < 1e-5, name
    finally:
        InFlight.poll = poll


@check
def what_cannot_be_late_is_refused():
    with raises(ValueError, "staleness=1 cannot work with LBFGS"):
        distributed(small_model(), squeeze(staleness=1), torch.optim.LBFGS)
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), staleness=1))
    with raises(ValueError, "staleness=1 cannot work with a closure"):
        optimizer.step(lambda: 0.0)
    optimizer = distributed(small_model(), squeeze(OneBit(64), staleness=1 + (hvd.rank() == 0)))
    with raises(ValueError, "staleness: 2 on rank 0", "the ranks do not agree"):
        optimizer.step()


if __name__ == "__main__":
    main()
