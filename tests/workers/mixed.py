"""Mixed precision and schedules on a real Horovod: see checking.py."""

import math
import warnings
from contextlib import nullcontext

import horovod.torch as hvd
import torch
from checking import (
    assert_identical,
    batch,
    distributed,
    errors_in_gradient_order,
    flat,
    main,
    small_model,
    squeeze,
    train_step,
)
from registry import check, raises
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from ds_horovod import NoCompression, OneBit, Quantize, RandomK, TopK


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


def total_error(optimizer):
    """mean_i(e_i) + E of all parameters, in units of gradients that are not scaled."""
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
                before = total_error(optimizer)
            scaled_step(model, optimizer, scaler, step, overflows)
            assert_identical(model)
            assert torch.equal(weights, flat(model.parameters())) == overflows
            if before is not None:
                torch.testing.assert_close(total_error(optimizer), before, rtol=1e-3, atol=1e-5)
                assert before.abs().max() > 1e-3
            scales.append(math.log2(scaler.get_scale()))
        assert scales == [12, 12, 11, 10, 10, 10, 9, 9, 9], scales
        assert all(hvd.allgather_object(scales, name="scales")[rank] == scales for rank in range(hvd.size()))


def _spoiled(gradient):
    gradient = gradient.clone()
    gradient.view(-1)[3] = math.inf
    return gradient


def tutorial_step(model, optimizer, scaler, step, bad=None):
    """Trains a step as torch's documentation does, and knows nothing of Horovod. A parameter of one rank may overflow."""
    x, y = batch(step)
    optimizer.zero_grad()
    handle = None
    if bad is not None and hvd.rank() == hvd.size() - 1:
        handle = dict(model.named_parameters())[bad].register_hook(_spoiled)
    scaler.scale(cross_entropy(model(x).float(), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    if handle is not None:
        handle.remove()


KINDS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
}


@check
def amp_as_tutorials_write_it_is_training_without_it():
    """No argument says that there is a scaler, whose scale grows."""
    for kind, options in KINDS.values():
        for compression in (
            squeeze(TopK(0.1, values="sign")),
            squeeze(TopK(0.1), momentum=0.5),
            squeeze(OneBit(64), max_norm=0.5),
        ):
            more = compression.options
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
            plain, scaled = small_model(), small_model()
            own = distributed(plain, squeeze(more.compressor, momentum=more.momentum, max_norm=more.max_norm), kind, options)
            theirs = distributed(scaled, compression, kind, options)
            for step in range(6):
                train_step(plain, own, step)
                tutorial_step(scaled, theirs, scaler, step)
                assert_identical(scaled)
            assert scaler.get_scale() == 2.0**19
            compressed = [i for i, p in enumerate(plain.parameters()) if p.dim() > 1]
            for i, (p, q) in enumerate(zip(plain.parameters(), scaled.parameters(), strict=True)):
                if i in compressed:
                    torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)  # biases are summed in any order


@check
def amp_with_unscale_and_clipping_needs_no_argument():
    for synchronizes in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        plain, scaled = small_model(), small_model()
        own, theirs = distributed(plain, squeeze(TopK(0.1))), distributed(scaled, squeeze(TopK(0.1)))
        for step in range(5):
            train_step(plain, own, step)
            x, y = batch(step)
            theirs.zero_grad()
            scaler.scale(cross_entropy(scaled(x), y)).backward()
            if synchronizes:
                theirs.synchronize()
            scaler.unscale_(theirs)
            torch.nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scaler.step(theirs)
            scaler.update()
            assert_identical(scaled)
        torch.testing.assert_close(flat(scaled.parameters()), flat(plain.parameters()), rtol=1e-4, atol=1e-5)


@check
def one_scaler_for_two_optimizers():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    models = [small_model(seed) for seed in (0, 1)]
    optimizers = [distributed(model, squeeze(TopK(0.1))) for model in models]
    for step in range(3):
        x, y = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(sum(cross_entropy(model(x), y) for model in models)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for model, optimizer in zip(models, optimizers, strict=True):
            assert_identical(model)
            assert optimizer.double_squeeze._reducer.units.scale == 2.0**12


@check
def a_skipped_step_leaves_the_residuals_as_they_were():
    """Whatever overflowed: a matrix or a bias; in the first step and later; with a scaler that is given, or learned of."""
    for compressor, options in (
        (OneBit(64), {}), (TopK(0.1), {}), (Quantize(4, 64), {}), (TopK(0.1, values="sign"), {"momentum": 0.5}),
        (RandomK(0.1), {}), (OneBit(64), {"server_compressor": TopK(0.2)}), (Quantize(4, 64), {"server": 0}),
    ):  # fmt: skip
        for bad in ("0.weight", "4.weight", "2.bias"):
            for given in (True, False) if bad == "2.bias" else (bad == "0.weight",):
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
                model = small_model()
                optimizer = distributed(model, squeeze(compressor, grad_scaler=scaler if given else None, **options))
                for step in range(6):
                    overflows = step in (0, 3, 4)
                    weights, before = flat(model.parameters()), residuals(optimizer)
                    tutorial_step(model, optimizer, scaler, step, bad if overflows else None)
                    assert_identical(model)
                    assert torch.equal(weights, flat(model.parameters())) == overflows
                    if overflows and step:
                        assert before.abs().max() > 1e-3
                    if overflows:
                        off = (residuals(optimizer) - before).abs().max()
                        assert off < 1e-5, f"{compressor}, {options}, {bad}, {given}, step {step}: off by {off}"


def residuals(optimizer):
    """The errors of all ranks, and what momentum will make of the velocities, in units of gradients that are not scaled."""
    reducer = optimizer.double_squeeze._reducer
    errors = flat([worker + server for worker, server in errors_in_gradient_order(optimizer).values()])
    momentum = reducer.options.momentum
    if momentum:
        state = optimizer.double_squeeze.full_state_dict()["velocities"]
        errors = errors + momentum * flat([state[name] for name in errors_in_gradient_order(optimizer)])
        dense = {"0.bias", "2.bias", "4.bias"} & state.keys()
        errors = torch.cat([errors, flat([state[n] for n in sorted(dense)]) if dense else torch.zeros(65 + 47 + 7).double()])
    return errors / reducer.units.scale


@check
def training_goes_on_without_a_scaler():
    """Residuals are in units of its scale, and gradients are not any more."""
    results = []
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.1, values="sign")))
        for step in range(6):
            if step < 3:
                tutorial_step(model, optimizer, scaler, step)
            else:
                train_step(model, optimizer, step)
        assert optimizer.double_squeeze.full_state_dict()["units"]["scale"] == 1.0
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


@check
def a_scaler_that_comes_late_is_followed():
    """What is held of gradients that were not scaled is scaled when the scaler begins."""
    results = []
    for late in (True, False):
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64)))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            if late and step >= 2:
                tutorial_step(model, optimizer, scaler, step)
            else:
                train_step(model, optimizer, step)
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@check
def a_loss_that_is_scaled_by_hand_is_refused_where_it_comes_late():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(2):
        train_step(model, optimizer, step)
    weights = flat(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))
    x, y = batch(2)
    optimizer.zero_grad()
    (cross_entropy(model(x), y) * scaler.get_scale()).backward()
    with raises(RuntimeError, "scales the loss by 1024", "scaled by 1", "scaler.scale(loss)"):
        scaler.step(optimizer)
    assert torch.equal(weights, flat(model.parameters()))
    optimizer.synchronize()


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


@check
def the_default_dtype_changes_nothing():
    """Weights and errors are bit for bit what they are with float32: for models of any dtype, with all that has a state."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for default in (torch.float32, torch.bfloat16, torch.float64):
            results.append([])
            for compressor, options in (
                (TopK(0.1, values="sign"), {"momentum": 0.5, "max_norm": 1.0}), (OneBit(64), {"warmup_steps": 1}),
                (Quantize(4, 64), {"server": 0}), (RandomK(0.1), {"server_compressor": NoCompression()}),
            ):  # fmt: skip
                model = small_model(dtype=dtype)
                optimizer = distributed(model, squeeze(compressor, **options))
                torch.set_default_dtype(default)
                try:
                    _train_with_states(model, optimizer, dtype)
                finally:
                    torch.set_default_dtype(torch.float32)
                assert_identical(model)
                errors = [e for bucket in optimizer.double_squeeze.state_dict()["buckets"] for e in _arrays(bucket)]
                assert all(e.dtype == torch.float32 for e in errors)
                results[-1] += [flat(model.parameters()), flat(errors)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _arrays(bucket):
    return [value for value in bucket.values() if isinstance(value, torch.Tensor)]


def _train_with_states(model, optimizer, dtype):
    gradients = torch.Generator().manual_seed(hvd.rank())

    def step():
        optimizer.zero_grad()
        outputs = []
        for p in model.parameters():
            outputs.append((p * torch.randn(p.shape, generator=gradients, dtype=torch.float32).to(dtype)).sum())
        torch.stack(outputs).sum().backward()
        optimizer.step()

    step()
    squeeze = optimizer.double_squeeze
    squeeze.load_state_dict(squeeze.full_state_dict())
    step()
    squeeze.broadcast_state(root_rank=hvd.size() - 1)
    step()
    squeeze.load_state_dict(squeeze.state_dict())
    squeeze.change_compressor(squeeze.options.compressor)
    step()


@check
def a_guard_that_skips_an_absurd_batch_skips_no_other():
    """The spike would wait in the errors of the workers and of the server, and the guard would skip most later steps."""
    for compression in (
        squeeze(TopK(0.01)), squeeze(OneBit(64)), squeeze(TopK(0.01, values="sign"), momentum=0.5),
        squeeze(Quantize(4, 64), server=0),
    ):  # fmt: skip
        model = small_model()
        optimizer = distributed(model, compression)
        skipped, first = [], None
        for step in range(30):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            (loss * (1e6 if (step, hvd.rank()) == (3, hvd.size() - 1) else 1)).backward()
            optimizer.synchronize()
            if float(flat([p.grad for p in model.parameters()]).norm()) > 20:
                skipped.append(step)
                optimizer.double_squeeze.reset_errors()
                assert not any(e.any() for pair in errors_in_gradient_order(optimizer).values() for e in pair)
                continue
            with optimizer.skip_synchronize():
                optimizer.step()
            assert_identical(model)
            first = loss.item() if first is None else first
        assert skipped == [3], f"{compression}: {skipped}"


@check
def max_norm_keeps_an_absurd_batch_out():
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.01), max_norm=1.0))
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        (cross_entropy(model(x), y) * (1e30 if (step, hvd.rank()) == (3, hvd.size() - 1) else 1)).backward()
        optimizer.synchronize()
        assert float(flat([p.grad for p in model.parameters()]).norm()) < 10
        with optimizer.skip_synchronize():
            optimizer.step()


@check
def errors_are_dropped_between_two_steps_alone():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    optimizer.double_squeeze.reset_errors()  # before the first step, too
    train_step(model, optimizer, 0)
    x, y = batch(1)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    with raises(RuntimeError, "gradients are under way"):
        optimizer.double_squeeze.reset_errors()
    optimizer.step()
    assert_identical(model)


if __name__ == "__main__":
    main()
