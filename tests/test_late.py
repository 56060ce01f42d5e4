"""Gradients that come some steps late: the law with what is under way, for n workers in one process."""

import pytest
import torch
from support import COMPRESSORS

from ds_horovod import DoubleSqueeze, OneBit, Quantize, TopK
from ds_horovod.in_process import InProcessTransport, Workers

SHAPES = {"a": (33, 65), "b": (65,), "c": (47, 65), "d": (7, 47)}


def make(n, compressor, **options):
    parameters = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    return Workers(lambda: DoubleSqueeze(compressor, **{"min_numel": 64, "bucket_cap_mb": 0.01, **options}), parameters, n)


def draw(n, step):
    generator = torch.Generator().manual_seed(step)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES.values()] for _ in range(n)]


def waits(workers):
    """What all workers hold together, with what is under way, by name."""
    held = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for reducer in workers.reducers:
        for name, residual in reducer.residuals().items():
            held[name] += residual.error.double()
    for name, average in workers.reducers[0].late().items():
        held[name] += average.double()
    return held


def mean(gradients, i):
    return sum(own[i].double() for own in gradients) / len(gradients)


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.contracts], ids=repr)
@pytest.mark.parametrize("n, staleness", [(2, 1), (3, 2), (2, 4)])
def test_nothing_is_lost(compressor, n, staleness):
    """Element by element, in every step, across a flush; and the first steps, and those after it, get nothing."""
    for options in ({}, {"server": 0}, {"sync_steps": 3}, {"warmup_steps": 2}, {"server_compressor": Quantize(8)}):
        workers = make(n, compressor, staleness=staleness, **options)
        total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
        not_due = []
        for step in range(10):
            if step == 6:
                for reducer in workers.reducers:
                    reducer.flush()
            gradients = draw(n, step)
            for i, name in enumerate(total):
                total[name] += mean(gradients, i)
            workers.begin_step(0.1)
            arrived = workers.exchange(gradients)
            if arrived is None:
                not_due.append(step)
            for name, gradient in zip(total, arrived or (), strict=arrived is not None):
                total[name] -= gradient.double()
            for name, held in waits(workers).items():
                assert (total[name] - held).abs().max() < 2e-4 * (1 + held.abs().max()), (options, step, name)
        first = options.get("sync_steps", 0)
        assert not_due == [*range(first, min(6, first + staleness)), *range(6, min(10, 6 + staleness))]


@pytest.mark.parametrize("compressor", [OneBit(64), Quantize(4, 64), TopK(0.1)], ids=repr)
def test_a_late_step_is_what_it_would_have_been(compressor):
    """Bit for bit: the replies are those of the synchronous exchange, some steps later."""
    late, on_time = make(3, compressor, staleness=2), make(3, compressor)
    expected = []
    for step in range(8):
        expected.append([gradient.clone() for gradient in on_time.exchange(draw(3, step))])
        arrived = late.exchange(draw(3, step))
        if step < 2:
            assert arrived is None
        else:
            assert all(torch.equal(a, b) for a, b in zip(arrived, expected[step - 2], strict=True))


@pytest.mark.parametrize("compressor", [OneBit(64), Quantize(4, 64), TopK(0.1), TopK(0.1, values="sign")], ids=repr)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_is_not_finite_loses_nothing_of_the_rest(compressor, momentum):
    """Elements that one worker spoils do not arrive, and what the others have sent of them stays in their errors."""
    if momentum and not compressor.sparse:
        pytest.skip("momentum correction is for compressors that leave elements out")
    workers = make(3, compressor, staleness=1, momentum=momentum)
    for step in range(6):
        gradients = draw(3, step)
        if step == 2:
            gradients[0][0][5, 7] = float("nan")
        before = waits(workers)
        arrived = workers.exchange(gradients)
        after = waits(workers)
        assert all(held.isfinite().all() for held in after.values()), step
        if step == 3:  # what comes now is of step 2
            assert not arrived[0].isfinite().all()
            spoiled = ~arrived[0].isfinite()
            if not momentum:  # all that waits there is what has waited and the new gradient
                missing = before["a"] + mean(draw(3, step), 0) - after["a"]
                assert missing[spoiled].abs().max() < 1e-5
        elif arrived is not None:
            assert all(gradient.isfinite().all() for gradient in arrived)


def test_what_comes_late_is_worth_what_it_was_when_the_learning_rate_changes():
    workers = make(2, OneBit(64), staleness=1, lr_aware=True)
    workers.begin_step(0.1)
    assert workers.exchange(draw(2, 0)) is None
    before = waits(workers)
    workers.begin_step(0.05)
    for name, held in waits(workers).items():
        assert torch.allclose(held, 2 * before[name], rtol=1e-5, atol=1e-6), name


class Slow:
    """A network on which nothing that a step has sent arrives before the next one begins."""

    def __init__(self, monkeypatch, staleness=1):
        self.step, self._staleness = 0, staleness
        arrived = InProcessTransport.poll
        monkeypatch.setattr(InProcessTransport, "poll", lambda t, handle: self.passes(handle.key) and arrived(t, handle))

    def passes(self, name):
        return self.step is None or f".{self.step % (self._staleness + 1)}.pu" not in name


def all_that_waits(workers, slow):
    """As `waits`, once all has arrived."""
    slow.step, step = None, slow.step
    for _ in "push", "pull":
        for session in workers.sessions:
            session.poll()
    held, slow.step = waits(workers), step
    return held


@pytest.mark.parametrize("server_compressor", [None, OneBit(64)], ids=repr)
def test_a_server_that_is_slow_knows_in_which_units_a_push_is(monkeypatch, server_compressor):
    """The loss scale and the learning rates change between a push and its server pass."""
    slow = Slow(monkeypatch)
    workers = make(3, TopK(0.2), staleness=1, lr_aware=True, server_compressor=server_compressor)
    total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    rates = [0.1, 0.1, 0.05, 0.2, 0.2, 0.1]
    for step, (rate, scale) in enumerate(zip(rates, [1.0, 1.0, 2.0, 2.0, 1.0, 4.0], strict=True)):
        slow.step = step
        before = (rates[step - 1], workers.reducers[0].units.scale) if step else (rate, scale)
        for reducer in workers.reducers:
            reducer.begin_step({name: rate for name, _ in reducer.parameters}, lambda own, scale=scale: scale)
        gradients = draw(3, step)
        for i, name in enumerate(total):
            total[name] *= scale / before[1] * before[0] / rate
            total[name] += mean(gradients, i)
        for name, gradient in zip(total, workers.exchange(gradients) or [], strict=step > 0):
            total[name] -= gradient.double()
    for name, held in all_that_waits(workers, slow).items():
        if name != "b":  # no exchange takes it, so that only its scale follows
            assert (total[name] - held).abs().max() < 1e-4 * (1 + held.abs().max()), name


def test_estimates_are_own_gradients_and_with_momentum_own_pushes():
    """By name; a push and what it has left in the error make up the gradient of the first step."""
    gradients = draw(2, 0)
    plain, momentum = make(2, TopK(0.2), staleness=1), make(2, TopK(0.2), staleness=1, momentum=0.5)
    for workers in plain, momentum:
        workers.exchange([[tensor.clone() for tensor in own] for own in gradients])
    for worker, own in enumerate(gradients):
        (estimate,), (pushed,) = plain.estimates(worker), momentum.estimates(worker)
        for name, gradient in zip(SHAPES, own, strict=True):
            assert torch.equal(estimate[name], gradient)
            if name == "b":  # no exchange takes it
                assert torch.equal(pushed[name], gradient)
                continue
            (bucket,) = [bucket for bucket in momentum.sessions[worker].buckets if name in bucket.names]
            offset = bucket.exchange.whole.offsets[bucket.names.index(name)]
            left = bucket.exchange.worker_error[offset : offset + gradient.numel()].view(gradient.shape)
            assert 0 < (pushed[name] != 0).sum() < gradient.numel()
            torch.testing.assert_close(pushed[name] + left, gradient)
