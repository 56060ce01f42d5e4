"""Gradients that come some steps late: the law with what is under way, for n workers in one process."""

import pytest
import torch
from support import COMPRESSORS

from ds_horovod import DoubleSqueeze, OneBit, Quantize, TopK
from ds_horovod.in_process import Workers

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
