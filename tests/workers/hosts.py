"""Several ranks a host, on a real Horovod: see checking.py. Each host is a name of this machine."""

import horovod.torch as hvd
import torch
from checking import assert_identical, batch, distributed, everyones, flat, main, small_model, squeeze, train_step
from registry import check, raises
from torch import nn
from torch.nn.functional import cross_entropy

import ds_horovod
from ds_horovod import NoCompression, OneBit, Quantize, RandomK, TopK

HOSTS, LOCAL = hvd.cross_size, hvd.local_size


def exchanges(optimizer):
    return [bucket.exchange for bucket in optimizer.double_squeeze._reducer.session.buckets]


def gradients(model, step):
    """The mean over all ranks of their gradients, float64, by name."""
    x, y = batch(step)
    own = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    named = zip(model.named_parameters(), own, strict=True)
    return {name: hvd.allreduce(gradient.double(), name=f"mean.{name}") for (name, _), gradient in named}


def waits(optimizer):
    state = optimizer.double_squeeze.full_state_dict()
    held = {name: error.double() for name, error in state["errors"].items()}
    for name, average in state["late"].items():
        held[name] = held.get(name, 0.0) + average.double()
    return held


def assert_law(total, optimizer):
    held = waits(optimizer)
    for name, missing in total.items():
        off = (missing - held.get(name, torch.zeros(()))).abs().max()
        assert off < 2e-5, (name, off)


def step_of(model, optimizer, step, total):
    """A step, whose gradients and results go into what should wait."""
    for name, gradient in gradients(model, step).items():
        total[name] = total.get(name, 0.0) + gradient
    x, y = batch(step)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.synchronize()
    for name, p in model.named_parameters():
        total[name] = total[name] - p.grad.double()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_identical(model)


@check
def two_levels_are_the_default_and_keep_the_law():
    for compressor, options in (
        (OneBit(64), {}), (Quantize(4, 64), {"staleness": 1}), (TopK(0.1), {"max_norm": 100.0}), (RandomK(0.2), {}),
        (TopK(0.2, values="sign"), {"warmup_steps": 1}), (NoCompression(), {"server_compressor": OneBit(64)}),
    ):  # fmt: skip
        model, total = small_model(), {}
        optimizer = distributed(model, squeeze(compressor, **options))
        assert f"two levels: {HOSTS()} hosts with {LOCAL()} ranks each" in optimizer.double_squeeze.explain()
        for step in range(5):
            step_of(model, optimizer, step, total)
            assert_law(total, optimizer)
        for exchange in exchanges(optimizer):
            assert exchange.worker_error.numel() == exchange.whole.numel // LOCAL()


@check
def momentum_and_tentative_steps():
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.1), momentum=0.5))
    late_model = small_model()
    options = {"lr": 0.1, "momentum": 0.9}
    late = distributed(late_model, squeeze(Quantize(4, 64), staleness=1, model=late_model), torch.optim.SGD, options)
    for step in range(6):
        train_step(model, optimizer, step)
        train_step(late_model, late, step)
        assert_identical(model)
        assert_identical(late_model)


@check
def what_changes_the_layout_loses_nothing():
    """Other blocks cut a bucket elsewhere: each rank hands what it held to the rank of its host that has it now."""
    model, total = small_model(), {}
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(3):
        step_of(model, optimizer, step, total)
    for step, compressor in ((3, Quantize(4, 96)), (4, TopK(0.1)), (5, OneBit(1024))):
        optimizer.double_squeeze.change_compressor(compressor)
        assert_law(total, optimizer)
        step_of(model, optimizer, step, total)
    assert_law(total, optimizer)
    late = distributed(model, squeeze(OneBit(64), staleness=2))
    total = {}
    for step in range(4):
        step_of(model, late, step, total)
    late.double_squeeze.flush()
    assert_law(total, late)
    late.double_squeeze.change_compressor(Quantize(4, 96))
    assert_law(total, late)
    step_of(model, late, 5, total)
    assert_law(total, late)


@check
def training_goes_on_from_files():
    model, total = small_model(), {}
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(3):
        step_of(model, optimizer, step, total)
    of_all, own = optimizer.double_squeeze.full_state_dict(), optimizer.double_squeeze.state_dict()
    own = {
        **own,
        "buckets": [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in own["buckets"]],
    }
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step_of(model, optimizer, 3, dict(total))
    expected = flat(model.parameters())
    for state, hierarchical, exact in ((own, None, True), (of_all, None, False), (of_all, False, False)):
        again = small_model()
        again.load_state_dict(weights)
        other = distributed(again, squeeze(OneBit(64), hierarchical=hierarchical))
        other.double_squeeze.load_state_dict(state)
        assert_law(total, other)
        step_of(again, other, 3, dict(total))
        assert not exact or torch.equal(flat(again.parameters()), expected)
    flat_model = small_model()
    one_level = distributed(flat_model, squeeze(OneBit(64), hierarchical=False))
    with raises(ValueError, "of another layout", "slice"):
        one_level.double_squeeze.load_state_dict(own)
    again.load_state_dict(weights)
    other = distributed(again, squeeze(OneBit(64)))
    if hvd.rank() == 1:
        other.double_squeeze.load_state_dict(of_all)
    other.double_squeeze.broadcast_state(root_rank=1)
    assert_law(total, other)


@check
def what_is_not_finite_on_one_rank_and_a_step_that_is_skipped():
    model, total = small_model(), {}
    optimizer = distributed(model, squeeze(OneBit(64)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        x, y = batch(step)
        if step == 3 and hvd.rank() == hvd.size() - 1:
            x[0, 0] = float("inf")
        before = flat(model.parameters())
        held = waits(optimizer) if step else {}
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_identical(model)
        assert torch.equal(before, flat(model.parameters())) == (step == 3)
        if step == 3:
            for name, error in waits(optimizer).items():
                assert error.isfinite().all()
                assert torch.allclose(error, held[name], rtol=1e-4, atol=1e-5), name
    assert not total


@check
def sparse_gradients_that_only_some_ranks_have_seen():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(50, 64, sparse=True), nn.Linear(64, 64)])
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(3):
        optimizer.zero_grad()
        x = torch.full((2, 64), float(hvd.rank() + step))
        if hvd.rank() > 0 or step:
            x = x + model[0](torch.tensor([step, hvd.rank()]))
        model[1](x).square().sum().backward()
        optimizer.step()
        assert_identical(model)


@check
def ranks_that_have_run_out_of_data():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    if hvd.rank() > 0:
        train_step(model, optimizer, 1)
    hvd.join()


@check
def bytes_between_hosts_are_those_of_one_rank_over_the_ranks_of_a_host():
    sent = {}
    for hierarchical in (None, False):
        model = nn.Sequential(nn.Linear(512, 512, bias=False))
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = distributed(model, squeeze(OneBit(64), hierarchical=hierarchical))
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 512)).square().sum().backward()
            optimizer.step()
        stats = optimizer.double_squeeze.stats()
        sent[hierarchical] = stats["compressed_bytes_sent"]
        assert f"{stats['compression_ratio']:.1f} times less" in optimizer.double_squeeze.explain()
    n, h, local = hvd.size(), HOSTS(), LOCAL()
    assert abs(sent[None] / sent[False] - (h - 1) / h / local / ((n - 1) / n)) < 1e-3


@check
def tensors_outside_an_optimizer():
    total = torch.zeros(100, 64)
    for step in range(3):
        tensor = torch.randn(100, 64, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        mean = hvd.allreduce(tensor, name="plain")
        result = ds_horovod.allreduce(tensor, name="t", compression=_eager)
        rows = everyones(result.view(-1))
        assert all(torch.equal(rows[0], row) for row in rows)
        total += mean - result
    held = _eager.full_state_dict()["errors"]["t"]
    torch.testing.assert_close(total, held, rtol=0, atol=1e-4)


@check
def what_cannot_be_in_two_levels():
    with raises(ValueError, "hierarchical=True needs several hosts", "got server=0, which serves all of every bucket"):
        distributed(small_model(), squeeze(OneBit(64), server=0, hierarchical=True))
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64), server=0))
    assert "one level: server=0" in optimizer.double_squeeze.explain()
    train_step(model, optimizer, 0)
    optimizer = distributed(small_model(), squeeze(OneBit(64), hierarchical=False if hvd.rank() else None))
    with raises(ValueError, "hierarchical: None on rank 0, False on rank", "the ranks do not agree"):
        optimizer.step()


_eager = squeeze(OneBit(64))

if __name__ == "__main__":
    main()
