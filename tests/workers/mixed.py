"""Mixed precision and schedules on a real Horovod: see checking.py."""

import math
from contextlib import nullcontext

import horovod.torch as hvd
import torch
from checking import (
    assert_identical,
    batch,
    check,
    distributed,
    errors_in_gradient_order,
    flat,
    main,
    raises,
    small_model,
    squeeze,
    train_step,
)
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from ds_horovod import NoCompression, OneBit, TopK


def scaled_step(model, optimizer, scaler, step, overflows=False, autocast=None):
    """Trains a step as docs/guide.md says. The loss of the last rank alone may overflow."""
    x, y = batch(step)
    optimizer.zero_grad()
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        loss = cross_entropy(model(x).float(), y)
    if overflows and hvd.rank() == hvd.size() - 1:
        loss = loss * math.inf
    scaler.scale(loss).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)  # as users do here; large enough to change nothing
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    return float(loss.detach())


def kept(optimizer):
    """What waits in all errors, in units of gradients that are not scaled."""
    scale = optimizer.double_squeeze._reducer.units.scale
    return flat([worker + server for worker, server in errors_in_gradient_order(optimizer).values()]) / scale


SCALED = {
    "signs, momentum": {"momentum": 0.5},
    "clipped, one server": {"max_norm": 0.5, "server": 0},
    "warm-up, one-way": {"warmup_steps": 2, "server_compressor": NoCompression()},
}


@check
def a_loss_scale_changes_nothing():
    """Bit for bit what training without one does, while the scale grows."""
    for options in SCALED.values():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        plain, scaled = small_model(), small_model()
        own = distributed(plain, squeeze(TopK(0.1, values="sign"), **options))
        theirs = distributed(scaled, squeeze(TopK(0.1, values="sign"), grad_scaler=scaler, **options))
        for step in range(6):
            train_step(plain, own, step)
            scaled_step(scaled, theirs, scaler, step)
            assert_identical(scaled)
        assert scaler.get_scale() == 2.0**13
        compressed = [i for i, p in enumerate(plain.parameters()) if p.dim() > 1]
        for i, (p, q) in enumerate(zip(plain.parameters(), scaled.parameters(), strict=True)):
            if i in compressed:
                torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)  # biases are summed in any order


@check
def overflow_on_one_rank_is_skipped_on_all_and_leaves_no_trace():
    for compressor in (OneBit(64), TopK(0.1)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        model = small_model()
        optimizer = distributed(model, squeeze(compressor, grad_scaler=scaler))
        scales = []
        for step in range(9):
            weights, before = flat(model.parameters()), None
            overflows = step in (2, 3, 6)
            if overflows:
                before = kept(optimizer)
            scaled_step(model, optimizer, scaler, step, overflows)
            assert_identical(model)
            assert torch.equal(weights, flat(model.parameters())) == overflows
            if before is not None:
                torch.testing.assert_close(kept(optimizer), before, rtol=1e-3, atol=1e-5)
                assert before.abs().max() > 1e-3
            scales.append(math.log2(scaler.get_scale()))
        assert scales == [12, 12, 11, 10, 10, 10, 9, 9, 9], scales
        assert all(hvd.allgather_object(scales, name="scales")[rank] == scales for rank in range(hvd.size()))


@check
def errors_without_the_scaler_are_in_units_of_another_scale():
    """What the option is for: its absence is seen."""
    results = []
    for given in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1, growth_factor=16.0)
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.02), grad_scaler=scaler if given else None))
        for step in range(3):
            scaled_step(model, optimizer, scaler, step)
        results.append(flat(model.parameters()))
    plain = small_model()
    optimizer = distributed(plain, squeeze(TopK(0.02)))
    for step in range(3):
        train_step(plain, optimizer, step)
    distances = [float((result - flat(plain.parameters())).norm()) for result in results]
    assert distances[0] < 1e-4 < 1e-2 < distances[1], distances


@check
def autocast():
    for dtype in (torch.float16, torch.bfloat16):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.2), grad_scaler=scaler))
        losses = []
        for _ in range(12):
            losses.append(scaled_step(model, optimizer, scaler, 0, autocast=dtype))
            assert_identical(model)
        assert losses[-1] < losses[0] - 0.05, losses


@check
def unscaling_before_synchronize_is_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), grad_scaler=scaler))
    scaled_step(model, optimizer, scaler, 0)
    x, y = batch(1)
    optimizer.zero_grad()
    scaler.scale(cross_entropy(model(x), y)).backward()
    with raises(RuntimeError, "was changed after backward() and before synchronize()", "optimizer.synchronize() first"):
        scaler.step(optimizer)


@check
def a_learning_rate_that_falls_and_rises():
    """lr * gradient of all steps is what the weights have moved and what waits, in each group with its own rate."""
    model = small_model()
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    groups = [{"params": list(model[:3].parameters()), "lr": 0.2}, {"params": list(model[3:].parameters()), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer = hvd.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=squeeze(TopK(0.1), server_compressor=OneBit(64), lr_aware=True)
    )
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 1.0, 0.3, 0.3, 1.7, 0.01][min(step, 5)])
    total = dict.fromkeys(start, 0.0)
    rate_of = {}
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        copy = small_model()
        copy.load_state_dict(model.state_dict())
        cross_entropy(copy(x), y).backward()
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for (name, p), q in zip(model.named_parameters(), copy.parameters(), strict=True):
            rate_of[name] = group_of[p]["lr"]
            mean = hvd.allreduce(q.grad, name=f"mean.{name}").double()
            total[name] = total[name] + rate_of[name] * mean
        cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        assert_identical(model)
        if step == 0:  # a rate of zero moves nothing: what has been sent is lost, and what waits is not worth anything yet
            for bucket in optimizer.double_squeeze._reducer.session.buckets:
                bucket.exchange.worker_error.zero_()
                bucket.exchange.server_error.zero_()
    for name, (worker, server) in errors_in_gradient_order(optimizer).items():
        moved = start[name] - dict(model.named_parameters())[name].detach().double()
        waits = rate_of[name] * (worker + server).view(moved.shape)
        torch.testing.assert_close(moved + waits, total[name], rtol=1e-3, atol=1e-6)


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=6),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
}


@check
def schedules_momentum_and_weight_decay_are_those_of_torch():
    """With nothing taken away by compression, training is what it is without, whatever the schedule."""
    for make in SCHEDULES.values():
        results = []
        for compression in (hvd.Compression.none, squeeze(NoCompression()), squeeze(NoCompression(), lr_aware=True)):
            model = small_model()
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
            optimizer = distributed(model, compression, options=options)
            schedule = make(optimizer)
            for step in range(6):
                train_step(model, optimizer, step)
                schedule.step()
                assert_identical(model)
            results.append(flat(model.parameters()))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
