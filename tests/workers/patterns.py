"""What users of Horovod do with its optimizer, and graphs that differ between ranks: see checking.py."""

import sys
import warnings
from functools import partial

import horovod.torch as hvd
import torch
import torch.distributed as dist
from checking import (
    accumulate,
    assert_identical,
    batch,
    distributed,
    errors_in_gradient_order,
    everyones,
    flat,
    main,
    small_model,
    squeeze,
    train_step,
)
from registry import check, raises
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ds_horovod import NoCompression, OneBit, Quantize, RandomK, TopK
from ds_horovod.ddp import register

NOTHING_LOST = partial(squeeze, NoCompression())
OPTIMIZERS = {
    "Adam": {"amsgrad": True}, "RMSprop": {"momentum": 0.5}, "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}  # fmt: skip
"""Options that are not the defaults."""
OTHERS = {
    "Optimizer": "their base class",
    "LBFGS": "see a_closure",
    "Muon": "see matrices_alone",
    "SparseAdam": "takes sparse gradients alone: see checks.py",
}


@check
def every_optimizer_of_torch_even_where_no_rank_has_a_gradient():
    """Gradients of half of the model come one step in two; the others are zeros then, and their residuals still arrive."""
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in OTHERS}
    assert len(kinds) >= 12 and set(OPTIMIZERS) <= set(kinds)
    for name, kind in kinds.items():
        results = []
        for compression in (hvd.Compression.none, NOTHING_LOST(), squeeze(Quantize(4, 64))):
            model = small_model()
            optimizer = distributed(model, compression, kind, OPTIMIZERS.get(name, {}))
            for step in range(3):
                x, y = batch(step)
                optimizer.zero_grad()
                hidden = model[1](model[0](x))
                loss = cross_entropy(model[4](model[3](model[2](hidden))), y) if step % 2 == 0 else hidden.square().mean()
                loss.backward()
                optimizer.step()
                assert_identical(model)
            results.append(flat(model.parameters()))
        if name != "Rprop":  # which goes by signs, of nothing but rounding too
            # Sums in another order; where a gradient is next to nothing, dividing by its size makes that large.
            torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=5e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert torch.isfinite(results[2]).all() and not torch.equal(results[2], results[0])


@check
def matrices_alone():
    """As Muon wants them, where torch has it."""
    if not hasattr(torch.optim, "Muon"):
        return
    results = []
    for compression in (hvd.Compression.none, NOTHING_LOST(), squeeze(Quantize(4, 64))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 65, bias=False), nn.Tanh(), nn.Linear(65, 7, bias=False))
        optimizer = distributed(model, compression, torch.optim.Muon, {"lr": 0.01})
        for step in range(3):
            train_step(model, optimizer, step)
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(results[2]).all() and not torch.equal(results[2], results[0])


@check
def a_closure():
    """LBFGS evaluates it several times a step; it synchronizes, and gives the same loss on all ranks."""
    kinds = ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 4}))
    for kind, options in kinds:
        results = []
        for compression in (hvd.Compression.none, NOTHING_LOST(), squeeze(OneBit(64))):
            model = small_model()
            optimizer = distributed(model, compression, kind, options)
            for step in range(3):
                x, y = batch(step)
                calls = []

                def closure():
                    optimizer.zero_grad()  # noqa: B023
                    loss = cross_entropy(model(x), y)  # noqa: B023
                    loss.backward()
                    optimizer.synchronize()  # noqa: B023
                    calls.append(None)  # noqa: B023
                    return hvd.allreduce(loss.detach(), name="loss")

                with optimizer.skip_synchronize():
                    optimizer.step(closure)
                assert len(calls) == 1 if kind is torch.optim.SGD else len(calls) > 1
                assert_identical(model)
            results.append(flat(model.parameters()))
        # Sums in another order; LBFGS divides by differences of gradients, which makes their rounding large.
        rtol, atol = (1e-5, 1e-6) if kind is torch.optim.SGD else (1e-3, 5e-4)
        torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)
        assert torch.isfinite(results[2]).all() and not torch.equal(results[2], results[0])


@check
def parameters_that_horovod_does_not_know_of_are_refused():
    """Stock Horovod leaves their gradients as they are on each rank, and says nothing."""
    model, late = small_model(), nn.Linear(33, 65)
    model[0].weight.requires_grad_(False)
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    model[0].weight.requires_grad_(True)
    with raises(RuntimeError, "added or unfrozen after", "(65, 33)"):
        train_step(model, optimizer, 1)
    optimizer = distributed(small_model(), squeeze(OneBit(64)))
    optimizer.add_param_group({"params": list(late.parameters())})
    with raises(RuntimeError, "added or unfrozen after", "(65, 33), (65,)"):
        optimizer.step()


@check
def two_networks_against_each_other():
    """Each is frozen while the other learns, and does not move then, whatever its errors hold."""
    torch.manual_seed(0)
    maker, judge = (
        nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 33)),
        nn.Sequential(nn.Linear(33, 40), nn.Linear(40, 1)),
    )
    optimizers = [distributed(net, squeeze(OneBit(64)), options={"lr": 0.05}) for net in (maker, judge)]
    for step in range(6):
        learns, rests = (maker, judge) if step % 2 else (judge, maker)
        for net in (learns, rests):
            for p in net.parameters():
                p.requires_grad_(net is learns)
        before = flat(rests.parameters())
        noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
        optimizer = optimizers[0] if learns is maker else optimizers[1]
        optimizer.zero_grad()
        judge(maker(noise)).square().mean().backward()
        optimizer.step()
        assert_identical(maker)
        assert_identical(judge)
        assert torch.equal(flat(rests.parameters()), before)


@check
def layers_that_are_frozen_for_a_while():
    """They do not move, whatever their errors hold, and what they hold counts when they are trained again."""
    shared = OneBit(64, granularity="bucket")
    for compressor, options in (
        (OneBit(64), {}),
        (shared, {"bucket_cap_mb": None}),
        (TopK(0.1), {"momentum": 0.5, "server": 0}),
    ):
        model = small_model()
        optimizer = distributed(model, squeeze(compressor, **options))
        for step in range(3):
            train_step(model, optimizer, step)
        kept = errors_in_gradient_order(optimizer)["0.weight"]
        assert max(float(part.abs().max()) for part in kept) > 0
        model[0].requires_grad_(False)
        still = model[0].weight.detach().clone()
        for step in range(3, 6):
            train_step(model, optimizer, step)
            assert_identical(model)
            assert torch.equal(model[0].weight, still)
            if step == 4:  # what is saved meanwhile is whole
                state = optimizer.double_squeeze.full_state_dict()
                torch.testing.assert_close(
                    state["errors"]["0.weight"].view(-1).double(), kept[0] + kept[1], rtol=1e-5, atol=1e-7
                )
                optimizer.double_squeeze.load_state_dict(optimizer.double_squeeze.state_dict())
        model[0].requires_grad_(True)
        optimizer.double_squeeze.state_dict()
        for part, was in zip(errors_in_gradient_order(optimizer)["0.weight"], kept, strict=True):
            assert torch.equal(part, was)
        train_step(model, optimizer, 6)
        assert_identical(model)
        assert not torch.equal(model[0].weight, still)


@check
def zero_grad_takes_what_torchs_does():
    for arguments in ({}, {"set_to_none": True}, {"set_to_none": False}):
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64)))
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad(**arguments)
            assert step == 0 or all((p.grad is None) == arguments.get("set_to_none", True) for p in model.parameters())
            cross_entropy(model(x), y).backward()
            with raises(AssertionError, "zero_grad() was called after loss.backward()"):
                optimizer.zero_grad(**arguments)
            optimizer.step()
            assert_identical(model)
    stock = distributed(small_model(), hvd.Compression.none)
    with raises(TypeError, "set_to_none"):
        stock.zero_grad(set_to_none=True)


@check
def several_passes_are_one_of_their_mean():
    """backward_passes_per_step, one graph used twice (retain_graph), and predivision change nothing of the sum."""
    results = []
    for passes, retain, options in (
        (1, False, {}),
        (2, False, {}),
        (2, True, {}),
        (1, False, {"gradient_predivide_factor": 2.0}),
    ):
        model = small_model()
        optimizer = distributed(model, NOTHING_LOST(), backward_passes_per_step=passes, **options)
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(step)
            if retain:
                loss = cross_entropy(model(x), y) / 2
                loss.backward(retain_graph=True)
                loss.backward()
            elif passes == 2:
                for half in (slice(0, 8), slice(8, 16)):
                    (cross_entropy(model(x[half]), y[half]) / 2).backward()
            else:
                cross_entropy(model(x), y).backward()
            optimizer.step()
            assert_identical(model)
        results.append(flat(model.parameters()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-6)


@check
def clipping_the_average_loses_what_is_cut_off_and_max_norm_does_not():
    lr, bound = 1.0, 0.05
    for within in (True, False):
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.1), **({"max_norm": bound} if within else {})), options={"lr": lr})
        start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for step in range(3):
            copy = small_model()
            copy.load_state_dict(model.state_dict())
            x, y = batch(step)
            cross_entropy(copy(x), y).backward()
            if within:
                torch.nn.utils.clip_grad_norm_(copy.parameters(), bound)
            for name, p in copy.named_parameters():
                total[name] += everyones(p.grad).mean(0)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.synchronize()
            if not within:
                torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
            with optimizer.skip_synchronize():
                optimizer.step()
            assert_identical(model)
        worst = 0.0
        for name, (worker, server) in errors_in_gradient_order(optimizer).items():
            moved = (start[name] - dict(model.named_parameters())[name].detach().double()).view(-1) / lr
            worst = max(worst, float((moved + worker + server - total[name].view(-1)).abs().max()))
        assert (worst < 1e-4) == within, worst


@check
def synchronize_twice_is_warned_of():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    accumulate(model, 0, 1)
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("skip_synchronize" in str(w.message) for w in caught)
    assert_identical(model)


# ---- graphs that differ between ranks


class Branches(nn.Module):
    """Some of which are used, in an order that may be any."""

    def __init__(self, branches=5):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(33, 40 + i) for i in range(branches))

    def forward(self, x, order):
        total = x.new_zeros(())
        for i in order:
            total = total + self.branches[i](x * (1 + total.tanh())).square().mean()  # one after the other
        return total


def branches(order_of, steps=6):
    """Weights with and without compression that takes nothing away, and the law with one that does."""
    results = []
    for compression in (hvd.Compression.none, NOTHING_LOST(), squeeze(TopK(0.1))):
        model = Branches()
        optimizer = distributed(model, compression, options={"lr": 0.1})
        start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for step in range(steps):
            x = torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
            copy = Branches()
            copy.load_state_dict(model.state_dict())
            copy(x, order_of(step)).backward()
            for name, p in copy.named_parameters():
                total[name] += everyones(torch.zeros_like(p) if p.grad is None else p.grad).mean(0)
            optimizer.zero_grad()
            model(x, order_of(step)).backward()
            optimizer.step()
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    for name, (worker, server) in errors_in_gradient_order(optimizer).items():
        moved = (start[name] - dict(model.named_parameters())[name].detach().double()).view(-1) / 0.1
        torch.testing.assert_close(moved + worker + server, total[name].view(-1), rtol=1e-3, atol=1e-5)


@check
def another_set_of_unused_parameters_on_each_rank():
    branches(lambda step: [i for i in range(5) if (i + step + hvd.rank()) % 3])


@check
def gradients_come_in_another_order_on_each_rank():
    branches(lambda step: torch.randperm(5, generator=torch.Generator().manual_seed(10 * step + hvd.rank())).tolist())


@check
def one_rank_has_no_gradients_at_all():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(4):
        optimizer.zero_grad()
        if hvd.rank() != step % hvd.size():
            accumulate(model, step, 1)
        optimizer.step()
        assert_identical(model)


@check
def distributed_data_parallel_gives_the_same_bits():
    """The two transports carry the same payloads: weights and errors are the same after every step."""
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.store", rank=hvd.rank(), world_size=hvd.size())
    for compressor, options in (
        (OneBit(64), {}), (Quantize(4, 64), {"server": 1}), (TopK(0.1, values="sign"), {"momentum": 0.5, "max_norm": 1.0}),
        (RandomK(0.1), {"warmup_steps": 1}),
    ):  # fmt: skip
        # Of biases, sums of more than two ranks are added up in another order.
        networks = [nn.Sequential(nn.Linear(33, 65, bias=False), nn.Tanh(), nn.Linear(65, 7, bias=False)) for _ in range(2)]
        networks[1].load_state_dict(networks[0].state_dict())
        for network in networks:
            hvd.broadcast_parameters(network.state_dict(), root_rank=0)
        optimizer = distributed(networks[0], squeeze(compressor, **options))
        wrapped = DistributedDataParallel(networks[1], bucket_cap_mb=0.005)
        state = register(wrapped, squeeze(compressor, **options))
        plain = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(4):
            train_step(networks[0], optimizer, step)
            train_step(wrapped, plain, step)
            assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True))
            own, theirs = optimizer.double_squeeze.state_dict(), state.state_dict()
            for bucket, other in zip(own["buckets"], theirs["buckets"], strict=True):
                assert all(torch.equal(v, other[k]) for k, v in bucket.items() if isinstance(v, torch.Tensor))
        sent = "compressed_bytes_sent"
        assert optimizer.double_squeeze.stats()[sent] == state.stats()[sent] > 0
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
