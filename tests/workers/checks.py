"""What must hold on a real Horovod: see checking.py."""

import math
import tempfile
import time
import warnings
from functools import partial
from threading import Thread

import horovod.torch as hvd
import torch
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

import ds_horovod
from ds_horovod import DoubleSqueeze, NoCompression, OneBit, TopK
from ds_horovod.horovod import transport as transport_module

CONFIGURATIONS = {
    "defaults": lambda: DoubleSqueeze,
    "1-bit": lambda: squeeze(OneBit(64)),
    "1-bit l2 parameter": lambda: squeeze(OneBit(64, "l2", "parameter")),
    "top-k": lambda: squeeze(TopK(0.05)),
    "top-k fp16": lambda: squeeze(TopK(k=3, values="fp16")),
    "signs with momentum": lambda: squeeze(TopK(0.05, values="sign"), momentum=0.5, server_compressor=TopK(0.1)),
    "warm-up, clipped": lambda: squeeze(TopK(0.05), momentum=0.5, warmup_steps=2, max_norm=0.5),
    "dense": lambda: squeeze(NoCompression()),
    "one-way": lambda: squeeze(OneBit(64), server_compressor=NoCompression()),
    "mixed": lambda: squeeze(OneBit(96), server_compressor=TopK(0.2)),
    "no compensation": lambda: squeeze(TopK(0.05), worker_error=False, server_error=False),
    "the paper": lambda: squeeze(OneBit(64, scale="l2", granularity="bucket"), server=0, bucket_cap_mb=None),
    "last rank serves": lambda: squeeze(TopK(0.1), server=hvd.size() - 1),
}


# ---- the exchange


@check
def replicas_are_identical_after_every_step():
    for make in CONFIGURATIONS.values():
        model = small_model(seed=hvd.rank())
        optimizer = distributed(model, make(), options={"lr": 0.1, "momentum": 0.9})
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        for step in range(5):
            train_step(model, optimizer, step)
            assert_identical(model)


def _add_to(total, gradient):
    total += gradient.double()


LAWLESS = ("no compensation", "signs with momentum", "warm-up, clipped")  # or with a law of their own: see below


def law(make, op, steps=6):
    """x_0 - x_T == lr * (sum_t mean_i g_i - mean_i e_i,T - E_T), parameter by parameter."""
    lr = 0.25
    model = small_model()
    optimizer = distributed(model, make(), options={"lr": lr}, op=op)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for name, p in model.named_parameters():
        p.register_hook(partial(_add_to, total[name]))
    for step in range(steps):
        train_step(model, optimizer, step)
    errors = errors_in_gradient_order(optimizer)
    for name, p in model.named_parameters():
        gradients = everyones(total[name]).mean(0).view(-1)
        worker, server = errors.get(name, (0.0, 0.0))
        moved = (start[name] - p.detach().double()).view(-1) / lr
        if op == hvd.Sum:  # the server error is in units of the sum
            gradients, worker = gradients * hvd.size(), worker * hvd.size()
        worst = (moved - (gradients - worker - server)).abs().max()
        assert worst < 2e-5 * hvd.size(), f"{name}: off by {worst}"


@check
def conservation_law_of_an_average():
    for name, make in CONFIGURATIONS.items():
        if name not in LAWLESS:
            law(make, hvd.Average)


@check
def conservation_law_of_a_sum():
    for name in ("1-bit", "top-k", "the paper"):
        law(CONFIGURATIONS[name], hvd.Sum)


@check
def conservation_law_with_momentum():
    """Step by step: lr * out == mean_i(m u_i + g_i + e_i) + E - mean_i e_i' - E'."""
    momentum, lr = 0.5, 0.25
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.05, values="sign"), momentum=momentum), options={"lr": lr})

    def residual():
        return {name: worker + server for name, (worker, server) in errors_in_gradient_order(optimizer).items()}

    def velocities():
        found = {}
        for bucket in optimizer.double_squeeze._reducer.session.buckets:
            layout, mean = bucket.exchange.layout, everyones(bucket.exchange.velocity.double()).mean(0)
            found |= {n: mean[o : o + c] for n, o, c in zip(bucket.names, layout.offsets, layout.numels, strict=True)}
        return found

    local = {}
    for name, p in model.named_parameters():
        p.register_hook(partial(local.__setitem__, name))
    for step in range(6):
        before, velocity = residual(), velocities()
        start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        train_step(model, optimizer, step)
        after = residual()
        for name, p in model.named_parameters():
            if name in before:
                gradient = everyones(local[name].double()).mean(0).view(-1)
                moved = (start[name] - p.detach().double()).view(-1) / lr
                rest = momentum * velocity[name] + gradient + before[name] - after[name] - moved
                assert rest.abs().max() < 2e-5, f"{name}: off by {rest.abs().max()}"


@check
def two_momenta_are_warned_of():
    for kind, options, cure in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "momentum=0"),
        (torch.optim.AdamW, {"lr": 0.1}, "betas=(0.0, ...)"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distributed(small_model(), squeeze(TopK(), momentum=0.9), kind, options)
        assert [w for w in caught if cure in str(w.message) and "momentum=0.9" in str(w.message)], caught
        assert any(w.filename == distributed.__code__.co_filename for w in caught), caught[0].filename
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distributed(small_model(), squeeze(TopK(), momentum=0.9))
        distributed(small_model(), squeeze(TopK()), options={"lr": 0.1, "momentum": 0.9})
        distributed(small_model(), squeeze(TopK(), momentum=0.9), torch.optim.AdamW, {"lr": 0.1, "betas": (0.0, 0.95)})
    assert not caught, caught


@check
def each_worker_clips_its_own_gradient():
    """As torch's clip_grad_norm_ before a dense exchange: biases, small and large gradients alike."""
    for max_norm in (0.1, 1e6):
        results = []
        for ours in (True, False):
            model = small_model()
            if ours:
                optimizer = distributed(model, squeeze(NoCompression(), max_norm=max_norm))
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(4):
                x, y = batch(step)
                optimizer.zero_grad()
                (5 * cross_entropy(model(x), y)).backward()
                if not ours:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                    for i, p in enumerate(model.parameters()):
                        p.grad = hvd.allreduce(p.grad, name=f"clipped.{i}")
                optimizer.step()
            results.append(flat(model.parameters()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for name, compression in (("max_norm=1.0", squeeze(max_norm=1.0)), ("momentum=0.9", squeeze(TopK(0.1), momentum=0.9))):
        model = nn.Embedding(400, 8, sparse=True)
        distributed(model, compression)
        with raises(ValueError, name, "needs dense gradients, got a sparse one of weight", "sparse=False"):
            model(torch.tensor([1, 2])).sum().backward()


@check
def dense_exchange_equals_stock():
    for op in (hvd.Average, hvd.Sum):
        results = []
        for compression in (squeeze(NoCompression()), hvd.Compression.none):
            model = small_model()
            optimizer = distributed(model, compression, op=op)
            for step in range(4):
                train_step(model, optimizer, step)
            results.append(flat(model.parameters()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@check
def bytes_handed_to_horovod_equal_the_formula():
    handed = {"alltoall": 0, "allgather": 0}
    ops = transport_module.mpi_ops
    originals = ops._alltoall_async, ops._allgather_async

    def counting(kind, original):
        def call(tensor, *args):
            if any(".bucket" in name for name in args if isinstance(name, str)):  # and not the agreement of the first step
                handed[kind] += tensor.numel() * tensor.element_size()
            return original(tensor, *args)

        return call

    n, steps, block = hvd.size(), 3, 64
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(block), bucket_cap_mb=None))
    ops._alltoall_async, ops._allgather_async = counting("alltoall", originals[0]), counting("allgather", originals[1])
    try:
        for step in range(steps):
            train_step(model, optimizer, step)
    finally:
        ops._alltoall_async, ops._allgather_async = originals
    blocks = sum(math.ceil(p.numel() / block) for p in model.parameters() if p.dim() > 1)
    in_shard = math.ceil(blocks / n)
    chunk = 16 * math.ceil((16 * math.ceil(4 * in_shard / 16) + in_shard * block / 8) / 16)
    assert handed == {"alltoall": steps * n * chunk, "allgather": steps * chunk}, (handed, chunk)
    stats = optimizer.double_squeeze.stats()
    assert stats["steps"] == steps
    assert stats["compressed_bytes_sent"] == stats["compressed_bytes_received"] == 2 * (n - 1) * chunk
    dense = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 1)
    assert math.isclose(stats["dense_bytes_sent"], 2 * (n - 1) / n * dense)


@check
def a_single_server_bears_the_traffic():
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.1), server=0))
    train_step(model, optimizer, 0)
    exchanges = [bucket.exchange for bucket in optimizer.double_squeeze._reducer.session.buckets]
    chunk = sum(exchange.options.compressor.chunk_nbytes(exchange.layout) for exchange in exchanges)
    stats = optimizer.double_squeeze.stats()
    expected = (hvd.size() - 1) * chunk if hvd.rank() == 0 else chunk
    assert stats["compressed_bytes_sent"] == stats["compressed_bytes_received"] == expected, (stats, chunk)


@check
def every_bucket_leaves_before_the_step_ends():
    """From the second step on, buckets are in flight when backward returns: nothing waits for step()."""
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    x, y = batch(1)
    optimizer.zero_grad()
    model[2].weight.register_hook(lambda _: time.sleep(0.2))  # ranks have said by then that they take part
    cross_entropy(model(x), y).backward()
    session = optimizer.double_squeeze._reducer.session
    assert len(session.buckets) > 1 and not any(session._step.waits_for(bucket) for bucket in session.buckets)
    assert session.step == 2 and not session._step.flushed
    optimizer.step()


@check
def ranks_that_have_joined_take_part_with_nothing():
    """As with stock Horovod, whose averages those of the ranks are that still train; then all go on together."""
    results = []
    for compression in (hvd.Compression.none, squeeze(NoCompression()), squeeze(TopK(0.1))):
        model = small_model()
        optimizer = distributed(model, compression)
        for _ in range(2):
            for step in range(3 + 2 * hvd.rank()):
                train_step(model, optimizer, step)
            residuals = None if compression is hvd.Compression.none else optimizer.double_squeeze.state_dict()["buckets"]
            assert hvd.join() == hvd.size() - 1
            hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)
        for step in range(2):
            train_step(model, optimizer, step)
        assert_identical(model)
        if residuals is not None:
            assert optimizer.double_squeeze._reducer.session.step == 8, "steps without all ranks are no exchanges"
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert hvd.join() >= 0  # as a barrier, with nothing under way
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.1)))
    train_step(model, optimizer, 0)
    hvd.join()
    train_step(model, optimizer, 1)
    assert_identical(model)


@check
def momentum_and_join_do_not_go_together():
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.1), momentum=0.5))
    train_step(model, optimizer, 0)
    if hvd.rank() == 0:
        with raises(RuntimeError, "ranks have called hvd.join() while others still train", "momentum=0.5"):
            train_step(model, optimizer, 1)
    hvd.join()


@check
def a_layer_that_is_frozen_on_some_ranks():
    """Replicas stay alike, as with stock Horovod; what is frozen everywhere stays where it is."""
    for compressor in (NoCompression(), OneBit(64), TopK(0.1), OneBit(64, granularity="bucket")):
        model = small_model()
        optimizer = distributed(model, squeeze(compressor, bucket_cap_mb=None))
        for step in range(6):
            model[0].requires_grad_((step + hvd.rank()) % 2 == 0)
            model[2].requires_grad_(step not in (0, 3, 4))
            before = flat(model[2].parameters())
            train_step(model, optimizer, step)
            assert_identical(model)
            assert torch.equal(before, flat(model[2].parameters())) == (step in (0, 3, 4)), (compressor, step)


@check
def gradients_that_are_slices_of_one_tensor():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ParameterList(nn.Parameter(torch.randn(20, 33) / 6) for _ in range(3))
            self.head = nn.Linear(60, 7)

        def forward(self, x):
            return self.head(torch.tanh(nn.functional.linear(x, torch.cat(list(self.parts)))))

    results = []
    for compression in (hvd.Compression.none, squeeze(NoCompression()), squeeze(TopK(0.1))):
        for flat_buffer in (False, True):
            model = Joined()
            own = compression if compression is hvd.Compression.none else squeeze(compression.options.compressor)
            optimizer = distributed(model, own, backward_passes_per_step=2)
            buffer = torch.zeros(sum(p.numel() for p in model.parameters()))
            for step in range(4):
                if flat_buffer:
                    buffer.zero_()
                    for p, part in zip(model.parameters(), buffer.split([q.numel() for q in model.parameters()]), strict=True):
                        p.grad = part.view(p.shape)
                else:
                    optimizer.zero_grad()
                accumulate(model, step, 2)
                optimizer.step()
                assert_identical(model)
            results.append(flat(model.parameters()))
    for result in results[1:4]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@check
def clipping_through_data_is_refused_in_the_first_step():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    accumulate(model, 0, 1)
    for p in model.parameters():
        p.grad.data.clamp_(-1e-4, 1e-4)
    with raises(RuntimeError, "was changed after backward() and before synchronize()"):
        optimizer.step()


class Words(nn.Module):
    """An embedding that a batch may not use, before a layer that it does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(50, 40, sparse=True), nn.Linear(40, 7)

    def forward(self, rows):
        x = self.words(rows) if rows is not None else torch.ones(16, 40)
        return self.head(x)


@check
def sparse_embeddings_that_are_not_always_used():
    """By nobody at first; by some ranks at first; by some ranks later: a gradient that is missing counts as zero."""
    patterns = {
        "by nobody at first": lambda step, rank: step > 0,
        "by some at first": lambda step, rank: step > 0 or rank == 0,
        "by some later": lambda step, rank: step != 2 or rank == 0,
        "by one in turn": lambda step, rank: step % hvd.size() == rank,
    }
    for name, uses in patterns.items():
        results = []
        for compression in (None, squeeze(NoCompression()), squeeze(TopK(0.2))):
            model = Words()
            optimizer = distributed(model, compression) if compression else torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(4):
                g = torch.Generator().manual_seed(10 * step + hvd.rank())
                rows = torch.randint(0, 50, (16,), generator=g)
                y = torch.randint(0, 7, (16,), generator=g)
                optimizer.zero_grad()
                cross_entropy(model(rows if uses(step, hvd.rank()) else None), y).backward()
                if compression is None:
                    for i, p in enumerate(model.parameters()):
                        own = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                        p.grad = hvd.allreduce(own, name=f"words.{i}")
                optimizer.step()
                assert_identical(model)
            results.append(flat(model.parameters()))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6, msg=name)


@check
def steps_after_a_skipped_one_are_told_by_what_was_handed_over():
    """Zeroed in place, gone, or assigned by hand: it is another step, and not the skipped one again."""
    for zero in (False, True):
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64)))
        train_step(model, optimizer, 0)
        optimizer.zero_grad()
        accumulate(model, 1, 1)
        optimizer.synchronize()  # and no step(): skipped
        model.zero_grad(set_to_none=zero)
        if hvd.rank() == 0:
            accumulate(model, 2, 1)
        optimizer.step()
        assert_identical(model)
    results = []
    for compression in (hvd.Compression.none, squeeze(NoCompression())):
        model = small_model()
        optimizer = distributed(model, compression)
        for step in range(3):
            x, y = batch(step)
            gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
            optimizer.synchronize()
            if step != 1:
                with optimizer.skip_synchronize():
                    optimizer.step()
        assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@check
def backward_in_two_threads():
    model = nn.ModuleList([small_model(0), small_model(1)])
    optimizer = distributed(model, squeeze(TopK(0.1)))
    for step in range(30):
        x, y = batch(step)
        optimizer.zero_grad()
        threads = [Thread(target=lambda m=m, x=x, y=y: cross_entropy(m(x), y).backward()) for m in model]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        optimizer.step()
    assert_identical(model)


# ---- Horovod's ways


@check
def backward_passes_per_step():
    results = []
    for compression in (squeeze(NoCompression()), hvd.Compression.none):
        model = small_model()
        optimizer = distributed(model, compression, backward_passes_per_step=3)
        for step in range(2):
            optimizer.zero_grad()
            for part in range(3):
                x, y = batch(10 * step + part)
                cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@check
def step_before_all_backward_passes():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)), backward_passes_per_step=2)
    for step in range(2):
        train_step(model, optimizer, step)
        assert_identical(model)


@check
def named_parameters_may_be_left_out():
    model = small_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=squeeze(TopK(0.1)))
    for step in range(3):
        train_step(model, optimizer, step)
    assert_identical(model)
    assert optimizer.double_squeeze.stats()["compressed_bytes_sent"] > 0


@check
def clipping_between_synchronize_and_step():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(3):
        before = flat(model.parameters())
        x, y = batch(step)
        optimizer.zero_grad()
        (100 * cross_entropy(model(x), y)).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        assert_identical(model)
        moved = (flat(model.parameters()) - before).norm() / 0.1
        assert moved < 1.001, f"clipping came too early: {moved}"


class Branches(nn.Module):
    """Each rank may take another way through, so that other parameters get no gradient, in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(33, 33) for _ in range(4))
        self.unused = nn.Linear(33, 33)
        self.head = nn.Linear(33, 7)

    def forward(self, x, order):
        for i in order:
            x = torch.tanh(self.branches[i](x))
        return self.head(x)


@check
def parameters_without_gradients_on_some_or_all_ranks():
    results = []
    for compression in (squeeze(NoCompression()), hvd.Compression.none, squeeze(OneBit(64)), squeeze(TopK(0.1))):
        model = Branches()
        optimizer = distributed(model, compression)
        for step in range(5):
            x, y = batch(step)
            order = [(hvd.rank() + step + j) % 4 for j in range(1 + (hvd.rank() + step) % 3)]
            optimizer.zero_grad()
            cross_entropy(model(x, order), y).backward()
            optimizer.step()
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@check
def two_optimizers_with_equal_names():
    models = [small_model(seed) for seed in (0, 1)]
    optimizers = [distributed(model, squeeze(OneBit(64))) for model in models]
    for step in range(3):
        x, y = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(cross_entropy(model(x), y) for model in models).backward()
        for optimizer in reversed(optimizers):
            optimizer.step()
        for model in models:
            assert_identical(model)


@check
def gradients_that_are_not_contiguous():
    """Stock Horovod refuses them, so it gets the same model with contiguous ones."""
    results = []
    for compression, memory_format in (
        (squeeze(NoCompression()), torch.channels_last), (hvd.Compression.none, torch.contiguous_format),
        (squeeze(NoCompression(), min_numel=10**6), torch.channels_last), (squeeze(TopK(0.1)), torch.channels_last),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 7))
        model = model.to(memory_format=memory_format)
        optimizer = distributed(model, compression)
        for step in range(3):
            generator = torch.Generator().manual_seed(100 * step + hvd.rank())
            x = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=memory_format)
            optimizer.zero_grad()
            cross_entropy(model(x), torch.randint(0, 7, (4,), generator=generator)).backward()
            assert any(not p.grad.is_contiguous() for p in model.parameters()) == (memory_format == torch.channels_last)
            optimizer.step()
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2], results[1], rtol=1e-5, atol=1e-6)


@check
def stock_compressions_are_as_before():
    for compression in (hvd.Compression.none, hvd.Compression.fp16):
        model = small_model()
        optimizer = distributed(model, compression)
        assert not hasattr(optimizer, "double_squeeze") and optimizer._compression is compression
        x, y = batch(0)
        cross_entropy(model(x), y).backward()
        optimizer.synchronize()
        own = small_model()
        cross_entropy(own(x), y).backward()
        for (name, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
            expected = hvd.allreduce(q.grad, name=f"expected.{name}", compression=compression)
            exact = compression is hvd.Compression.none  # Horovod fuses by timing, which decides the order of sums
            torch.testing.assert_close(p.grad, expected, rtol=1e-5 if exact else 2e-3, atol=1e-7 if exact else 1e-5)


@check
def every_optimizer_class():
    o = torch.optim
    kinds = [
        o.SGD, o.Adam, o.AdamW, o.Adagrad, o.Adadelta, o.RMSprop, o.ASGD, o.Adamax, o.NAdam, o.RAdam, o.Rprop, o.Adafactor,
    ]  # fmt: skip
    for kind in kinds:
        results = []
        for compression in (squeeze(NoCompression()), hvd.Compression.none):
            model = small_model()
            optimizer = distributed(model, compression, kind=kind, options={"lr": 1e-3})
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            for step in range(3):
                train_step(model, optimizer, step)
            assert isinstance(optimizer, kind)
            results.append(flat(model.parameters()))
        # Signs of tiny gradients decide some of these steps, so that rounding may show: it must not in the mean.
        assert (results[0] - results[1]).abs().mean() < 1e-5, kind.__name__


@check
def groups_are_buckets():
    """However parameters are grouped, an uncompressed exchange gives what stock Horovod does."""
    results = []
    for compression, groups in (
        (hvd.Compression.none, None), (squeeze(NoCompression()), 1), (squeeze(NoCompression()), 2),
        (squeeze(NoCompression()), []),
    ):  # fmt: skip
        model = small_model()
        if groups == []:  # the outer matrices together
            groups = [[model[4].weight, model[0].weight, model[0].bias]]
        optimizer = distributed(model, compression, groups=groups)
        for step in range(3):
            train_step(model, optimizer, step)
            assert_identical(model)
        results.append(flat(model.parameters()))
        if compression is not hvd.Compression.none:
            found = sorted(sorted(bucket.names) for bucket in optimizer.double_squeeze._reducer.session.buckets)
            first, second, third = "0.weight", "2.weight", "4.weight"
            expected = {1: [[first, second, third]], 2: [[first, second], [third]]}  # of 3 parameters each, with biases
            assert found == (expected[groups] if isinstance(groups, int) else [[first, third], [second]]), found
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)), groups=1 + (hvd.rank() == hvd.size() - 1))
    with raises(ValueError, "do not agree", "groups"):
        train_step(model, optimizer, 0)


@check
def sparse_gradients_made_dense_are_compressed():
    """Rows without a gradient stay exact zeros, and the optimizer gets what it gets from Horovod: a sparse gradient."""
    results = []
    for compression in (hvd.Compression.none, squeeze(NoCompression()), squeeze(TopK(0.5))):
        torch.manual_seed(0)
        model = nn.Embedding(60, 40, sparse=True)
        start = model.weight.detach().clone()
        optimizer = distributed(model, compression, torch.optim.SparseAdam, {"lr": 0.01}, sparse_as_dense=True)
        for step in range(3):
            rows = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
            optimizer.zero_grad()
            model(rows).square().sum().backward()
            optimizer.synchronize()
            assert model.weight.grad.is_sparse and model.weight.grad.shape == model.weight.shape
            with optimizer.skip_synchronize():
                optimizer.step()
            assert_identical(model)
        assert torch.equal(model.weight[20:], start[20:]) and not torch.equal(model.weight[:20], start[:20])
        if compression is not hvd.Compression.none:
            assert optimizer.double_squeeze.stats()["compressed_bytes_sent"] > 0
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@check
def sparse_gradients_stay_with_horovod():
    results = []
    for compression, as_dense in (
        (squeeze(NoCompression()), False), (hvd.Compression.none, False), (squeeze(OneBit(64)), False),
        (squeeze(OneBit(64)), True),
    ):  # fmt: skip
        torch.manual_seed(0)
        embedding, head = nn.Embedding(50, 40, sparse=True), nn.Linear(40, 7)
        model = nn.ModuleList([embedding, head])
        optimizer = distributed(model, compression, sparse_as_dense=as_dense)
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + hvd.rank())
            rows = torch.randint(0, 50, (16,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(head(embedding(rows)), torch.randint(0, 7, (16,), generator=generator)).backward()
            optimizer.step()
            assert_identical(model)
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@check
def half_and_bfloat16_models():
    for dtype in (torch.float16, torch.bfloat16):
        for make in (lambda: squeeze(OneBit(64)), lambda: squeeze(TopK(0.1)), lambda: squeeze(NoCompression())):
            model = small_model(dtype=dtype)
            optimizer = distributed(model, make())
            for step in range(3):
                train_step(model, optimizer, step, dtype)
                assert all(p.grad.dtype == dtype for p in model.parameters())
                assert_identical(model)


@check
def only_small_parameters():
    model = nn.Linear(33, 7)
    optimizer = distributed(model, DoubleSqueeze)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for step in range(2):
        train_step(model, optimizer, step)
        assert_identical(model)
    assert optimizer.double_squeeze.stats()["compression_ratio"] == 1.0


@check
def gradient_predivide_factor():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)), gradient_predivide_factor=2.0)
    train_step(model, optimizer, 0)
    assert_identical(model)


@check
def uncompressed_parameters_have_momentum_too():
    """What is not compressed trains as it does with the optimizer's own momentum, and goes on where a checkpoint was."""
    stock, ours = small_model(), small_model()
    theirs = distributed(stock, hvd.Compression.none, options={"lr": 0.1, "momentum": 0.9})
    own = distributed(ours, DoubleSqueeze(TopK(), momentum=0.9, min_numel=10**6))
    for step in range(6):
        if step == 3:
            weights, state = ours.state_dict(), own.double_squeeze.state_dict()
            assert sorted(state["velocities"]) == sorted(weights)
            ours = small_model(seed=1)
            ours.load_state_dict(weights)
            own = distributed(ours, DoubleSqueeze(TopK(), momentum=0.9, min_numel=10**6))
            own.double_squeeze.load_state_dict(state)
        train_step(stock, theirs, step)
        train_step(ours, own, step)
        assert_identical(ours)
        torch.testing.assert_close(flat(ours.parameters()), flat(stock.parameters()))
    model = small_model()
    optimizer = distributed(model, squeeze(TopK(0.1), momentum=0.9))
    train_step(model, optimizer, 0)
    assert sorted(optimizer.double_squeeze.state_dict()["velocities"]) == ["0.bias", "2.bias", "4.bias"]


@check
def overflow_leaves_the_velocities_of_uncompressed_parameters():
    model = small_model()
    optimizer = distributed(model, DoubleSqueeze(TopK(), momentum=0.9, min_numel=10**6))
    train_step(model, optimizer, 0)
    before = {k: v.clone() for k, v in optimizer.double_squeeze.state_dict()["velocities"].items()}
    optimizer.zero_grad()
    accumulate(model, 1, 1)
    for p in model.parameters():
        p.grad.fill_(math.inf if hvd.rank() == 0 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.synchronize()
    for name, p in model.named_parameters():
        assert not p.grad.isfinite().any()
        assert torch.equal(optimizer.double_squeeze.state_dict()["velocities"][name], before[name])


@check
def step_after_synchronize_sends_nothing_twice():
    results = []
    for skip in (True, False):
        model = small_model()
        optimizer = distributed(model, squeeze(TopK(0.1), momentum=0.9))
        for step in range(3):
            optimizer.zero_grad()
            accumulate(model, step, 1)
            optimizer.synchronize()
            if skip:
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    optimizer.step()
                assert any("skip_synchronize" in str(w.message) for w in caught)
        results.append(flat([p.detach() for p in model.parameters() if p.dim() > 1]))
    torch.testing.assert_close(*results)


@check
def a_rank_without_gradients_takes_part_after_a_skipped_step():
    """As GradScaler skips one: synchronize() without step()."""
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(3):
        optimizer.zero_grad()
        if step != 2 or hvd.rank() == 0:
            accumulate(model, step, 1)
        if step == 1:
            optimizer.synchronize()
        else:
            optimizer.step()
        assert_identical(model)


@check
def load_state_dict_in_mid_step():
    for passes in 1, 2:
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64)), backward_passes_per_step=passes)
        for step in range(4):
            accumulate(model, step, passes)
            if step == 2:  # in flight, and then forgotten; on one rank alone it is known by then that all take part
                session = optimizer.double_squeeze._reducer.session
                while hvd.rank() == 0 and session.waits_for_ranks:
                    session.poll()
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.zero_grad()
                accumulate(model, step, passes)
            optimizer.step()
            optimizer.zero_grad()
            assert_identical(model)


@check
def checkpoints_resume_exactly():
    def matrices():  # no biases: those are summed by Horovod, in an order that varies with its timing
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(33, 65, bias=False), nn.Tanh(), nn.Linear(65, 7, bias=False))

    for make in (lambda: squeeze(OneBit(64)), lambda: squeeze(TopK(0.1), server=0)):
        model = matrices()
        optimizer = distributed(model, make())
        for step in range(3):
            train_step(model, optimizer, step)
        with tempfile.TemporaryFile() as file:
            torch.save((model.state_dict(), optimizer.double_squeeze.state_dict()), file)
            for step in range(3, 6):
                train_step(model, optimizer, step)
            file.seek(0)
            weights, errors = torch.load(file, weights_only=True)
        again = matrices()
        again.load_state_dict(weights)
        resumed = distributed(again, make())
        resumed.double_squeeze.load_state_dict(errors)
        for step in range(3, 6):
            train_step(again, resumed, step)
        assert torch.equal(flat(model.parameters()), flat(again.parameters()))


# ---- allreduce outside an optimizer


@check
def eager_allreduce_compensates_by_name():
    generator = torch.Generator().manual_seed(hvd.rank())
    value = torch.randn(5, 31, generator=generator)
    mean = hvd.allreduce(value, name="uncompressed")
    for op, factor in ((hvd.Average, 1), (hvd.Sum, hvd.size())):
        own = DoubleSqueeze(TopK(0.1))
        total = torch.zeros_like(value)
        for _ in range(200):
            result = ds_horovod.allreduce(value, name=f"value.{factor}", op=op, compression=own)
            assert result.shape == value.shape
            total += result
        assert_identical(nn.ParameterList([nn.Parameter(total)]))
        torch.testing.assert_close(total / 200, mean * factor, rtol=0.0, atol=0.15 * factor)
        assert own.stats()["steps"] == 200
    with raises(ValueError, "'value.1'", "(5, 31)", "(7,)"):
        ds_horovod.allreduce(torch.zeros(7), name="value.1", compression=_used("value.1"))
    with raises(ValueError, "name"):
        ds_horovod.allreduce(value, name="")
    with raises(ValueError, "int64"):
        ds_horovod.allreduce(torch.arange(3), name="integers")
    with raises(ValueError, "op", "Average"):
        ds_horovod.allreduce(value, name="op", op=hvd.Min)


def _used(name):
    instance = DoubleSqueeze(TopK(0.1))
    ds_horovod.allreduce(torch.zeros(5, 31), name=name, compression=instance)
    return instance


@check
def eager_state_survives_a_restart():
    value = torch.randn(100, generator=torch.Generator().manual_seed(hvd.rank()))
    first = DoubleSqueeze(OneBit(32))
    for _ in range(3):
        ds_horovod.allreduce(value, name="restart", compression=first)
    state = {**first.state_dict(), "buckets": [{**b, "worker_error": b["worker_error"].clone(),
             "server_error": b["server_error"].clone()} for b in first.state_dict()["buckets"]]}  # fmt: skip
    expected = ds_horovod.allreduce(value, name="restart", compression=first)
    second = DoubleSqueeze(OneBit(32))
    second.load_state_dict(state)
    assert torch.equal(ds_horovod.allreduce(value, name="restart", compression=second), expected)


@check
def horovods_allreduce_names_the_right_call():
    for compression in (DoubleSqueeze, DoubleSqueeze()):
        with raises(TypeError, "ds_horovod.allreduce"):
            hvd.allreduce(torch.zeros(3), name="wrong", compression=compression)


# ---- bad input


@check
def refusals_at_bind():
    model = small_model()
    weight = model[0].weight
    for groups in (-1, 2.0, "ab", [weight], [[weight, weight]], [[weight], [weight]], [[torch.zeros(3)]]):
        with raises(ValueError, "groups"):
            distributed(model, DoubleSqueeze, groups=groups)
    with raises(ValueError, "got [[0.weight], [a tensor of shape (3, 2)], 7]"):
        distributed(model, DoubleSqueeze, groups=[[weight], [torch.zeros(3, 2)], 7])
    with raises(ValueError, "Adasum"):
        distributed(model, DoubleSqueeze, op=hvd.Adasum)
    with raises(ValueError, "server must be one of the ranks 0, 1", "got 99"):
        distributed(model, DoubleSqueeze(server=99))
    with raises(ValueError, "complex64"):
        distributed(nn.Linear(33, 7, dtype=torch.complex64), DoubleSqueeze)
    shared = DoubleSqueeze()
    distributed(model, shared)
    with raises(ValueError, "in use already"):
        distributed(model, shared)
    with raises(ValueError, "belongs to an optimizer"):
        ds_horovod.allreduce(torch.zeros(3), name="shared", compression=shared)


@check
def ranks_that_disagree_are_told_what_differs():
    last = hvd.rank() == hvd.size() - 1
    rank = f"rank {hvd.size() - 1}"
    for ours, theirs, parts in (
        (squeeze(OneBit(64)), squeeze(TopK(0.1)), ["compressor", "OneBit", "TopK(ratio=0.1", rank]),
        (squeeze(OneBit(64)), squeeze(OneBit(96)), ["compressor", "block=64", "block=96", rank]),
        (squeeze(), squeeze(server=0), ["server: None on rank 0, 0 on", rank]),
        (squeeze(), squeeze(worker_error=False), ["worker_error: True on rank 0, False on", rank]),
        (squeeze(), squeeze(min_numel=65), ["min_numel: 64 on rank 0, 65 on", rank]),
    ):
        model = small_model()
        optimizer = distributed(model, theirs if last else ours)
        with raises(ValueError, "do not agree", *parts):
            train_step(model, optimizer, 0)
    model = nn.Sequential(nn.Linear(33, 64 + last), nn.Linear(64 + last, 7))
    optimizer = distributed(model, squeeze())
    with raises(ValueError, "parameters[0]", "(64, 33)", "(65, 33)", rank):
        train_step(model, optimizer, 0)


@check
def a_gradient_that_is_not_finite():
    for make in (lambda: squeeze(OneBit(64)), lambda: squeeze(TopK(0.1)), lambda: squeeze(NoCompression())):
        for bad in (math.nan, math.inf):
            model = small_model()
            optimizer = distributed(model, make())
            for step in range(2):
                train_step(model, optimizer, step)
            optimizer.zero_grad()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            if hvd.rank() == hvd.size() - 1:
                model[0].weight.grad[3, 5] = bad
            optimizer.synchronize()
            assert not model[0].weight.grad[3, 5].isfinite()
            assert all(p.grad.isfinite().all() for p in model[2].parameters())
            for name, (worker, server) in errors_in_gradient_order(optimizer).items():
                assert worker.isfinite().all() and server.isfinite().all(), name
            optimizer.zero_grad()
            train_step(model, optimizer, 3)
            assert all(p.isfinite().all() for p in model.parameters())
            assert_identical(model)


@check
def sparse_after_dense_is_refused():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(50, 40))
    model = nn.ParameterList([table])
    optimizer = distributed(model, squeeze(OneBit(64)))
    (table * table).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with raises(ValueError, "has become sparse"):
        torch.nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()


if __name__ == "__main__":
    main()
