"""DistributedDataParallel with the hook, on real ranks: ``torchrun --nproc-per-node N tests/workers/ddp.py FILE``.

As checking.py, without Horovod.
"""

import copy
import io
import os
import pickle
import sys
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from registry import check, raises, run_checks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ds_horovod import DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, TopK
from ds_horovod.ddp import double_squeeze_hook, register
from ds_horovod.scaling import active_scaler

WAYS = {
    "as it is": {}, "views": {"gradient_as_bucket_view": True}, "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
}  # fmt: skip
SHAPES = {"a": (33, 65), "b": (65,), "c": (47, 65), "d": (7, 47), "e": (70, 8), "f": (7,)}


class Given(nn.Module):
    """Its gradients are what it is called with: a tensor for each parameter; None: the parameter is not used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, gradients):
        used = ((p, gradients[name]) for name, p in self.named_parameters() if gradients[name] is not None)
        return sum((p * gradient.to(p.dtype)).sum() for p, gradient in used)


def gradients(step, rank=None, unused=()):
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if rank is None else rank))
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: None if name in unused else gradient for name, gradient in drawn.items()}


def everyones(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor.contiguous())
    return rows


def assert_identical(tensors):
    rows = everyones(torch.cat([t.detach().flatten().double() for t in tensors]))
    assert all(torch.equal(rows[0], row) for row in rows), "replicas differ"


def make(squeeze=None, module=None, plain=False, optimizer=None, **ways):
    """A model in torch's small buckets, and the state."""
    model = DistributedDataParallel(Given() if module is None else module, **{"bucket_cap_mb": 0.005, **ways})
    squeeze = small(OneBit(64)) if squeeze is None else squeeze
    if plain:
        model.register_comm_hook(squeeze, double_squeeze_hook)
    else:
        register(model, squeeze, optimizer=optimizer)
    return model, squeeze


def small(*args, **kwargs):
    return DoubleSqueeze(*args, **{"min_numel": 64, "bucket_cap_mb": 0.01, **kwargs})


def grads(model):
    return {name: p.grad for name, p in model.module.named_parameters()}


def mean(step):
    size = dist.get_world_size()
    drawn = [gradients(step, rank) for rank in range(size)]
    return {name: sum(given[name].double() for given in drawn) / size for name in SHAPES}


@check
def nothing_is_lost_whatever_torch_does_with_its_buckets():
    """The sum of what was given is what has arrived and what waits: mean_i(e_i) + E, by names, for each parameter."""
    for compressor, options in (
        (OneBit(64), {}), (Quantize(4, 64), {"server": 0}), (TopK(0.1), {}),
        (RandomK(0.2), {"warmup_steps": 1}), (OneBit(64), {"server_compressor": NoCompression()}),
    ):  # fmt: skip
        for ways in WAYS.values():
            for plain in (False, True):
                model, squeeze = make(small(compressor, **options), plain=plain, **ways)
                total = {name: torch.zeros(p.shape).double() for name, p in model.module.named_parameters()}
                for step in range(4):
                    model.zero_grad(set_to_none=step != 2)
                    model(gradients(step)).backward()
                    assert_identical(grads(model).values())
                    for name, average in mean(step).items():
                        total[name] += average - grads(model)[name].double()
                errors = squeeze.full_state_dict()["errors"]
                names = {name: f"parameter {i}" if plain else name for i, name in enumerate(total)}
                assert set(errors) == {names[name] for name in "acde"}, errors.keys()
                for name, missing in total.items():
                    waits = errors.get(names[name], torch.zeros(())).double()
                    assert (missing - waits).abs().max() < 1e-4, (compressor, ways, plain, name)
                assert squeeze.stats()["steps"] == 4


@check
def whatever_torch_does_with_its_buckets_the_bits_are_the_same():
    results = []
    for ways in ({}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1}, {"static_graph": True}):
        for plain in (False, True):
            model, _ = make(plain=plain, **ways)
            for step in range(3):
                model.zero_grad()
                model(gradients(step)).backward()
            results.append(torch.cat([grads(model)[name].flatten() for name in "acde"]))
    assert all(torch.equal(results[0], result) for result in results)


@check
def parameters_that_no_rank_uses_keep_what_waits():
    """torch gives the optimizer no gradient of them, so nothing must arrive. One rank, or the first, has servers alone."""
    for compressor, options in (
        (OneBit(64), {}),
        (OneBit(64), {"warmup_steps": 1}),
        (NoCompression(), {"server_compressor": OneBit(64), "worker_error": False}),
        (NoCompression(), {"server_compressor": OneBit(64), "worker_error": False, "server": 0}),
    ):
        model, squeeze = make(small(compressor, **options), find_unused_parameters=True)
        total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
        for step in range(6):
            everywhere, here = {3: "a", 4: "ce"}.get(step, ""), "d" if dist.get_rank() == 0 and step == 2 else ""
            model.zero_grad()
            model(gradients(step, unused=everywhere + here)).backward()
            for name, gradient in grads(model).items():
                assert (gradient is None) == (name in everywhere), (step, name)
                users = range(1 if step == 2 and name == "d" else 0, dist.get_world_size())
                if gradient is not None:
                    given = sum(gradients(step, rank)[name].double() for rank in users) / dist.get_world_size()
                    total[name] += given - gradient.double()
        errors = squeeze.full_state_dict()["errors"]
        assert set(errors) == set("acde"), errors.keys()
        for name, error in errors.items():
            off = (total[name] - error.double()).abs().max()
            assert off < 1e-4, (options, name, off)


@check
def parameters_that_no_rank_uses_stay_clear_of_what_is_not_finite():
    """They share a bucket, and a scale, with one that is not."""
    model, squeeze = make(small(OneBit(granularity="bucket"), bucket_cap_mb=1), find_unused_parameters=True)
    for step in range(4):
        given = gradients(step, unused="c" if step == 1 else "")
        if step == 1 and dist.get_rank() == 0:
            given["a"][0, 0] = float("nan")
        model.zero_grad()
        model(given).backward()
        if step != 1:
            assert all(gradient.isfinite().all() for gradient in grads(model).values()), step
        for name, error in squeeze.full_state_dict()["errors"].items():
            assert error.isfinite().all(), (step, name)


@check
def passes_without_synchronization_add_up():
    model, squeeze = make(small(NoCompression()))
    for i in range(3):
        with model.no_sync() if i < 2 else nullcontext():
            model(gradients(i)).backward()
    for name, gradient in grads(model).items():
        torch.testing.assert_close(gradient.double(), sum(mean(i)[name] for i in range(3)), rtol=1e-5, atol=1e-5)
    assert squeeze.stats()["steps"] == 1


@check
def ranks_with_fewer_batches_join_with_zeros():
    model, squeeze = make(small(OneBit(64)))
    size, total = dist.get_world_size(), {name: torch.zeros(()).double() for name in Given().state_dict()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone().double() for name, p in model.module.named_parameters()}
    with Join([model]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            model(gradients(step)).backward()
            optimizer.step()
    moved = {name: before[name] - p.detach().double() for name, p in model.module.named_parameters()}
    assert_identical(model.parameters())  # Join has given all the weights of the last one
    for rank in range(size):
        for step in range(2 + rank):
            for name, gradient in gradients(step, rank).items():
                total[name] = total[name] + gradient.double() / size
    for name, error in squeeze.full_state_dict()["errors"].items():
        assert (total[name] - moved[name] - error.double()).abs().max() < 1e-3, name


@check
def a_loss_that_is_scaled_is_learned_of():
    """As tutorials write it: after a skipped step the errors are what they were, and a growing scale changes nothing."""
    results = []
    for scaled in (False, True):
        model, squeeze = make(small(OneBit(64), max_norm=5.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2, enabled=scaled)
        for step in range(6):
            given = gradients(step)
            overflows = scaled and step in (0, 3)
            if overflows and dist.get_rank() == 0:
                given["a" if step else "b"][0] = float("inf")
            if overflows:
                errors, weights = _errors(squeeze), [p.detach().clone() for p in model.parameters()]
            elif not scaled and step in (0, 3):
                continue
            optimizer.zero_grad()
            scaler.scale(model(given)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_identical(model.parameters())
            if overflows:
                assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
                for name, error in _errors(squeeze).items():
                    assert step == 0 or (error - errors[name]).abs().max() < 1e-5, (step, name)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def _errors(squeeze):
    state = squeeze.full_state_dict()
    return {name: error / state["units"]["scale"] for name, error in state["errors"].items()}


@check
def training_goes_on_without_a_scaler():
    """Residuals are in units of its scale, and gradients are not any more; in the same run, and in another one."""
    model, squeeze = make(small(OneBit(64)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    resumed, other = make(small(OneBit(64)))
    total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for step in range(5):
        again = step == 4
        model.zero_grad()
        if step == 2:
            other.load_state_dict(squeeze.full_state_dict())
        loss = (resumed if again else model)(gradients(step))
        (scaler.scale(loss) if step < 2 else loss).backward()
        scale = 2.0**10 if step < 2 else 1.0
        for name, average in mean(step).items():
            if not again:
                total[name] += average - grads(model)[name].double() / scale
            else:
                assert grads(resumed)[name].norm() < 4 * SHAPES[name][0] ** 0.5 * SHAPES[name][-1] ** 0.5, name
        if step == 3:
            state = squeeze.full_state_dict()
            assert state["units"]["scale"] == 1.0
            for name, error in state["errors"].items():
                assert (total[name] - error.double()).abs().max() < 1e-4, name


@check
def ranks_that_have_ended_a_join_follow_the_scale_of_the_others():
    for first in (2, 0):
        model, squeeze = make(small(OneBit(64)))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = {name: p.detach().clone().double() for name, p in model.module.named_parameters()}
        batches = first + 5 * dist.get_rank()
        with Join([model]):
            for step in range(batches):
                optimizer.zero_grad()
                scaler.scale(model(gradients(step))).backward()
                scaler.step(optimizer)
                scaler.update()
        state, size = squeeze.full_state_dict(), dist.get_world_size()
        for name, error in state["errors"].items():
            p = dict(model.module.named_parameters())[name]
            given = [gradients(step, rank)[name].double() for rank in range(size) for step in range(first + 5 * rank)]
            missing = sum(given) / size - (before[name] - p.detach().double()) - error.double() / state["units"]["scale"]
            assert missing.abs().max() < 1e-3, (first, name, missing.abs().max())


@check
def static_graphs_of_several_dtypes():
    """In the first step torch says of each bucket that it is the first, and of none that it is the last."""

    class Mixed(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Embedding(50, 32, sparse=True) if sparse else nn.Linear(50, 32).bfloat16()
            self.second = nn.Linear(32, 7)

        def forward(self, x):
            return self.second(self.first(x).float())

    for sparse in (False, True):
        x = torch.randint(50, (8,)) if sparse else torch.randn(8, 50).bfloat16()
        model, squeeze = make(small(NoCompression()), Mixed(sparse), static_graph=True)
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
            assert_identical(p.grad.to_dense() for p in model.parameters())
        assert squeeze.stats()["steps"] == 3
        model, _ = make(small(NoCompression()), Mixed(sparse), plain=True, static_graph=True)
        with raises(ValueError, "static_graph=True", "ds_horovod.ddp.register"):
            model(x).sum().backward()


@check
def parameters_that_are_not_contiguous():
    """Errors have the shape of the parameter, whatever its memory looks like."""

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.convolution = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last))
            self.transposed = nn.Parameter(torch.randn(40, 30).t())

        def forward(self, given):
            return sum((p * gradient).sum() for p, gradient in zip(self.parameters(), given, strict=True))

    def given(step, rank):
        generator = torch.Generator().manual_seed(10 * step + rank)
        return [torch.randn(shape, generator=generator) for shape in ((16, 8, 3, 3), (30, 40))]

    size = dist.get_world_size()
    for ways in WAYS.values():
        model, squeeze = make(small(OneBit(64)), Images(), **ways)
        total = {name: torch.zeros(p.shape).double() for name, p in model.module.named_parameters()}
        for step in range(3):
            model.zero_grad()
            model(given(step, dist.get_rank())).backward()
            for i, (name, gradient) in enumerate(grads(model).items()):
                total[name] += sum(given(step, rank)[i].double() for rank in range(size)) / size - gradient.double()
        for name, error in squeeze.full_state_dict()["errors"].items():
            assert (total[name] - error.double()).abs().max() < 1e-4, (ways, name)


@check
def parameters_that_are_frozen_on_some_ranks_or_early():
    """As torch has it: what any rank trains moves alike on all, and what none trains does not move."""
    for plain in (False, True):
        for frozen_on in ([0], list(range(dist.get_world_size()))):
            model = DistributedDataParallel(Given(), find_unused_parameters=True, bucket_cap_mb=0.005)
            squeeze = small(OneBit(64))
            model.module.e.requires_grad_(False)  # after it was wrapped, and before the hook is there
            if plain:
                model.register_comm_hook(squeeze, double_squeeze_hook)
            else:
                register(model, squeeze)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            before = {name: p.detach().clone().double() for name, p in model.module.named_parameters()}
            total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
            for step in range(5):
                freezes = step in (1, 2)
                if dist.get_rank() in frozen_on:
                    model.module.c.requires_grad_(not freezes)
                was = model.module.c.detach().clone()
                optimizer.zero_grad()
                model(gradients(step)).backward()
                optimizer.step()
                assert_identical(model.parameters())
                assert len(frozen_on) == 1 or not freezes or torch.equal(was, model.module.c), step
                for name in total:
                    ranks = [
                        r
                        for r in range(dist.get_world_size())
                        if name != "e" and not (name == "c" and freezes and r in frozen_on)
                    ]
                    total[name] += (
                        sum((gradients(step, r)[name].double() for r in ranks), torch.zeros(())) / dist.get_world_size()
                    )
            errors = squeeze.full_state_dict()["errors"]
            for i, (name, p) in enumerate(model.module.named_parameters()):
                error = errors.get(f"parameter {i}" if plain else name, torch.zeros(()))
                missing = total[name] - (before[name] - p.detach().double()) - error.double()
                assert missing.abs().max() < 1e-4, (plain, frozen_on, name)


@check
def many_models_one_after_the_other():
    """torch frees no process groups, so they share them."""

    def open_files():
        return len(os.listdir("/proc/self/fd"))

    for i in range(8):
        model, _ = make()
        model(gradients(0)).backward()
        if i == 0:
            before = open_files()
    assert open_files() <= before + 4, (before, open_files())


@check
def copies_of_a_model():
    model, squeeze = make()
    model(gradients(0)).backward()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average(gradients(1))
    for twin in (copy.deepcopy(squeeze), pickle.loads(pickle.dumps(squeeze))):
        assert repr(twin) == repr(squeeze) and twin.stats() == {}
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    again.module.double()
    again(gradients(1))


@check
def what_is_not_compressed_does_not_overflow_in_half_precision():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(64, 64).half()), nn.Parameter(torch.zeros(8).half())

        def forward(self):
            return (self.weight.float() * 40000).sum() + (self.bias.float() * 40000).sum()

    model, _ = make(small(NoCompression()), Half())
    model().backward()
    assert torch.equal(model.module.bias.grad, torch.full((8,), 40000.0).half()), model.module.bias.grad


@check
def a_scaler_is_forgotten_with_its_backward():
    """Whether it ends or fails."""
    model, squeeze = make(small(OneBit(64)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    lost = torch.ones(3, requires_grad=True)
    lost.register_hook(lambda gradient: 1 / 0)
    with raises(ZeroDivisionError):
        scaler.scale(lost.sum()).backward()
    assert active_scaler() is None
    model(gradients(0)).backward()
    assert squeeze.full_state_dict()["units"]["scale"] == 1.0
    model.zero_grad()
    scaler.scale(model(gradients(1))).backward()
    assert squeeze.full_state_dict()["units"]["scale"] == 2.0**6
    assert active_scaler() is None


@check
def momentum_clipping_and_rates():
    module = Given()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    model, squeeze = make(small(TopK(0.1), momentum=0.5, max_norm=1.0, lr_aware=True), module, optimizer=optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(gradients(step)).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        assert_identical(model.parameters())
    state = squeeze.full_state_dict()
    assert set(state["velocities"]) == set("abcdef") and state["units"]["learning_rates"]["a"] == 0.0625
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Given()
        make(small(TopK(0.1), momentum=0.5), module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    assert any("Give the optimizer momentum=0" in str(warning.message) for warning in caught)


@check
def training_goes_on_from_a_file_as_if_it_had_not_stopped():
    for plain in (False, True):
        model, squeeze = make(plain=plain)
        again, other = make(plain=plain)
        for step in range(5):
            model.zero_grad()
            model(gradients(step)).backward()
            if step == 2:
                other.load_state_dict(copy.deepcopy(squeeze.state_dict()))
            if step > 2:
                again.zero_grad()
                again(gradients(step)).backward()
                assert all(torch.equal(grads(model)[name], grads(again)[name]) for name in "acde")
            elif plain and step == 2:  # loaded before the first backward: at which it is adopted
                assert other.stats() == {}
        own, theirs = squeeze.full_state_dict(), other.full_state_dict()
        assert own["step"] == theirs["step"] == 5
        assert all(torch.equal(own["errors"][name], theirs["errors"][name]) for name in own["errors"])
        new, third = make(plain=plain)
        third.load_state_dict(own)
        new(gradients(9)).backward()
        third.change_compressor(NoCompression())
        arrived = {name: gradient.double() for name, gradient in grads(new).items()}
        new.zero_grad()
        new(gradients(10)).backward()
        for i, name in enumerate(arrived):
            waited = own["errors"].get(f"parameter {i}" if plain else name, torch.zeros(())).double()
            total = arrived[name] + grads(new)[name].double()
            assert (total - waited - mean(9)[name] - mean(10)[name]).abs().max() < 1e-4, name
        with raises(ValueError, "errors of z"):
            third.load_state_dict({**own, "errors": {"z": torch.zeros(3, 3)}})


@check
def real_models():
    """Convolutions in channels_last, batch norm, embeddings with sparse gradients, several dtypes, recomputed activations."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.embedding = nn.Embedding(50, 16, sparse=True)
            self.convolution = nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
            self.norm = nn.BatchNorm2d(16)
            self.narrow = nn.Linear(16, 32).bfloat16()
            self.wide = nn.Linear(32, 4).double()

        def forward(self, images, words):
            x = self.norm(self.convolution(images)).mean((2, 3)) + self.embedding(words).mean(1)
            x = checkpoint(self.narrow, x.bfloat16(), use_reentrant=False)
            return self.wide(x.double())

    model, squeeze = make(small(Quantize(4, 64), choose={"narrow.bias": True}), Mixed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        images = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        words = torch.randint(50, (4, 5), generator=generator)
        optimizer.zero_grad()
        model(images, words).square().mean().backward()
        assert model.module.embedding.weight.grad.is_sparse
        optimizer.step()
        assert_identical(model.parameters())
    assert set(squeeze.full_state_dict()["errors"]) == {"convolution.weight", "narrow.weight", "narrow.bias"}
    assert "embedding.weight (50, 16): sparse gradients" in squeeze.explain()


@check
def a_compiled_model():
    module = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    torch.manual_seed(0)
    model, squeeze = make(small(NoCompression()), module, bucket_cap_mb=25)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        model.zero_grad()
        compiled(x).sum().backward()
        assert_identical(p.grad for p in model.parameters())
    assert squeeze.stats()["steps"] == 2


@check
def some_of_the_ranks():
    """A process group of all but the last; torch makes one of theirs."""
    ranks = list(range(dist.get_world_size() - 1))
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        model, squeeze = make(small(OneBit(64)), process_group=group)
        model(gradients(0)).backward()
        assert squeeze.stats().get("steps", 0) == (1 if len(ranks) > 1 else 0)
        with raises(ValueError, "server must be one of the ranks", f"got {len(ranks)}"):
            make(small(server=len(ranks)), process_group=group)
    dist.barrier()


@check
def what_cannot_be_is_refused():
    model, squeeze = make()
    with raises(ValueError, "in use already; make one for each"):
        make(squeeze)
    with raises(TypeError, "model must be a DistributedDataParallel, got Given"):
        register(Given())
    with raises(TypeError, "state must be a DoubleSqueeze or a compressor, got 3"):
        register(model, 3)
    with raises(RuntimeError, "has a communication hook already"):
        register(model, small())
    with raises(ValueError, "lr_aware=True needs the optimizer of the model"):
        make(small(lr_aware=True), optimizer=torch.optim.SGD(Given().parameters(), lr=0.1))
    with raises(RuntimeError, "register_comm_hook"):
        model.register_comm_hook(squeeze, double_squeeze_hook)
    with raises(ValueError, "lr_aware=True needs the optimizer"):
        make(small(lr_aware=True))
    with raises(ValueError, "'z*'", "matches no parameter"):
        make(small(choose={"z*": True}))
    with raises(ValueError, "server must be one of the ranks", "got 99"):
        make(small(server=99))
    for options, part in ({"choose": {"a": True}}, "choose needs the names"), ({"lr_aware": True}, "lr_aware needs the"):
        model, _ = make(small(**options), plain=True)
        with raises(ValueError, part, "ds_horovod.ddp.register"):
            model(gradients(0)).backward()
    model, _ = make(DoubleSqueeze, plain=True)
    with raises(TypeError, "write DoubleSqueeze()"):
        model(gradients(0)).backward()
    with raises(ValueError, "in use already"):
        first, squeeze = make(plain=True)
        first(gradients(0)).backward()
        register(DistributedDataParallel(Given()), squeeze)
    with raises(ValueError, "is not one of the model that this instance belongs to"):
        second = DistributedDataParallel(Given())
        second.register_comm_hook(squeeze, double_squeeze_hook)
        second(gradients(0)).backward()
    moved, _ = make()
    moved(gradients(0)).backward()
    moved.module.double()
    with raises(RuntimeError, "parameter a was torch.float32 on cpu, and is torch.float64"):
        moved(gradients(1))


@check
def ranks_that_do_not_agree_are_told():
    model, _ = make(small(TopK(0.1 if dist.get_rank() else 0.2)))
    with raises(ValueError, "compressor: TopK(ratio=0.2", "on rank 0", "the ranks do not agree"):
        model(gradients(0)).backward()
    model, _ = make()
    if dist.get_rank():
        with torch.no_grad():
            model.module.a[0] += 1
    with raises(ValueError, "weights"):
        model(gradients(0)).backward()


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    run_checks(dist.get_rank())
    dist.destroy_process_group()


@check
def ranks_of_one_node_share_what_they_hold():
    nodes, size = int(os.environ["GROUP_WORLD_SIZE"]), dist.get_world_size()
    model, squeeze = make()
    _, flat = make(small(OneBit(64), hierarchical=False))
    model(gradients(0)).backward()
    exchanges = [bucket.exchange for bucket in squeeze._reducer.session.buckets]
    local = size // nodes if nodes > 1 else 1
    says = f"two levels: {nodes} hosts with {local} ranks each" if nodes > 1 else f"one level: one host, with {size} ranks"
    assert squeeze.explain().startswith(says), squeeze.explain()
    assert flat.explain().startswith("one level: ")
    for exchange in exchanges:
        assert exchange.worker_error.numel() == exchange.whole.numel // local
    if nodes == 1:
        with raises(ValueError, "hierarchical=True needs several hosts", f"got one host, with {size} ranks"):
            make(small(OneBit(64), hierarchical=True))
    squeeze.change_compressor(Quantize(4, 96))  # other blocks: slices lie elsewhere
    total = {name: mean(0)[name] - grads(model)[name].double() for name in SHAPES}
    for name, error in squeeze.full_state_dict()["errors"].items():
        assert (total[name] - error.double()).abs().max() < 1e-5, name


if __name__ == "__main__":
    assert "horovod" not in sys.modules, os.environ
    main()
