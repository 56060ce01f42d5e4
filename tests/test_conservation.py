"""The law of the exchange: what compression removes stays in a residual, element by element.

mean_i(g_i + e_i) + E == out + mean_i(e_i') + E'
"""

import itertools
import math

import pytest
import torch
from support import COMPRESSORS, Int8, assert_same_bits, gathered, generator

from ds_horovod import Cast, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.in_process import Simulation, Workers
from ds_horovod.layout import pack
from ds_horovod.options import Options

SIZES = [5, 700, 63, 1]
TOLERANCE = 1e-5  # of the largest term: float32 rounds each of a step's few operations by 6e-8 of its result
GROUPS = [(n, server) for n in (1, 2, 3, 4, 7, 8) for server in dict.fromkeys((None, 0, n - 1))]
MIXED = [
    (OneBit(64), NoCompression()),
    (OneBit(32), OneBit(96, "l2")),
    (OneBit(64), OneBit(64, granularity="bucket")),
    (TopK(0.1), OneBit(32)),
    (OneBit(64), TopK(0.1)),
    (NoCompression(), OneBit(64, "l2")),
    (TopK(0.1, values="fp16"), Int8()),
]
PAIRS = [(compressor, compressor) for compressor in COMPRESSORS] + MIXED


def pair_id(pair):
    return " then ".join(map(repr, dict.fromkeys(pair)))


every_pair = pytest.mark.parametrize("pair", PAIRS, ids=pair_id)


class Group:
    """n workers, and the terms of the law in float64, padding left out."""

    def __init__(self, pair, workers, server=None, average=True, worker_error=True, server_error=True, sizes=SIZES, **more):
        self.sizes, self.workers, self.weight = sizes, workers, 1 / workers if average else 1.0
        self.layout = pack(sizes, math.lcm(*(q.block for q in pair)), workers if server is None else 1)
        compressor, server_compressor = pair
        errors = {"worker_error": worker_error, "server_error": server_error}
        options = Options(compressor, server_compressor=server_compressor, **errors, **more)
        self.simulation = Simulation(self.layout, options, workers, server, average=average)

    def gradients(self, g):
        return [[torch.randn(size, generator=g) for size in self.sizes] for _ in range(self.workers)]

    def step(self, gradients):
        """One exchange of a copy of the gradients. Returns what all workers have got, which must be the same."""
        copies = [[tensor.clone() for tensor in worker] for worker in gradients]
        self.simulation.step(copies)
        outputs = [torch.cat(worker) for worker in copies]
        for output in outputs[1:]:
            assert_same_bits(output, outputs[0], "the workers' results:")
        return outputs[0]

    def worker_errors(self):
        return [gathered(self.layout, exchange.worker_error) for exchange in self.simulation.exchanges]

    def server_error(self):
        errors = [e.server_error for e in self.simulation.exchanges if e.server_error is not None]
        return gathered(self.layout, torch.cat(errors))

    def residual(self):
        """mean_i(e_i) + E, or the sum."""
        return self.weight * sum(e.double() for e in self.worker_errors()) + self.server_error().double()

    def velocities(self):
        return [gathered(self.layout, exchange.velocity) for exchange in self.simulation.exchanges]

    def given(self, gradients):
        """What the workers are about to add: gradients, or what momentum makes of them."""
        gradients = [torch.cat(worker).double() for worker in gradients]
        momentum = self.simulation.exchanges[0].options.momentum
        if momentum:
            gradients = [momentum * u.double() + g for u, g in zip(self.velocities(), gradients, strict=True)]
        return self.weight * sum(gradients)


def check_law(group, gradients, where=slice(None)):
    """Takes a step and compares both sides of the law. Returns what the workers have got."""
    before = group.given(gradients) + group.residual()
    output = group.step(gradients)
    after = output.double() + group.residual()
    largest = max([1.0, *(float(x[where].abs().max()) for x in (before, output, group.residual()))])
    assert (before - after)[where].abs().max() <= TOLERANCE * largest
    return output


@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("workers, server", GROUPS)
@every_pair
def test_each_step_keeps_the_law(pair, workers, server, average):
    g = generator(0)
    group = Group(pair, workers, server, average)
    for _ in range(3):
        check_law(group, group.gradients(g))


@pytest.mark.parametrize("workers, server", [(2, None), (3, 2), (7, None)])
@every_pair
def test_fifty_steps_keep_the_law(pair, workers, server):
    g = generator(1)
    group = Group(pair, workers, server)
    given, got = 0.0, 0.0
    for _ in range(50):
        gradients = group.gradients(g)
        given += group.given(gradients)
        got += group.step(gradients).double()
    kept = group.residual()
    largest = max(float(given.abs().max()), float(kept.abs().max()))
    assert (given - got - kept).abs().max() <= TOLERANCE * largest


@pytest.mark.parametrize("server", [None, 63])
def test_sixty_four_workers(server):
    g = generator(2)
    group = Group((OneBit(32), TopK(0.1)), 64, server)
    for _ in range(3):
        check_law(group, group.gradients(g))


ADVERTISED = [
    *(OneBit(block, scale, granularity) for block, granularity in ((256, "block"), (2048, "bucket")) for scale in ("l1", "l2")),
    *(TopK(0.01, values=values) for values in ("fp32", "fp16", "sign")),
    TopK(0.045, values="sign"),
    *(kind(*bits, 256, rounding) for kind, *bits in ((Quantize, 2), (Quantize, 3), (Quantize, 4), (Quantize, 8), (Ternary,))
      for rounding in ("nearest", "stochastic")),
    *(Quantize(bits, block, "stochastic", "l2") for bits, block in ((3, 32), (4, 192), (8, 2048))),
    RandomK(0.05),
    Cast("fp16"),
    Cast("bf16"),
    NoCompression(),
]  # fmt: skip


@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("compressor", ADVERTISED, ids=repr)
def test_errors_stay_bounded(compressor, tails):
    """Over 2000 steps of error feedback: at its end the error is no larger than what the first steps had already."""
    numel, steps, g = 512, 2000, generator(0)
    layout = pack([numel], compressor.block, 1)
    payload = torch.zeros(1, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    state = FeedbackState(torch.zeros(layout.numel))
    gradients = torch.randn(steps, numel, generator=g)
    if tails == "heavy":
        gradients /= torch.empty(steps, numel).exponential_(generator=g).sqrt()  # Student's t with 2 degrees of freedom
    norms = []
    for state.step, gradient in enumerate(gradients):
        compressor.encode(layout, [gradient], state, payload.zero_())
        norms.append(state.error.norm())
    norms = torch.stack(norms) / gradients.norm(dim=1).median()
    half = steps // 2
    assert compressor.contracts and norms[half:].median() <= 1.5 * norms[:half].median()
    assert norms.median() < 40  # of a gradient's: what RandomK leaves out for 1 / 0.05 steps, and some more


@pytest.mark.parametrize("compressor", [Ternary(256, "stochastic", "l2"), Quantize(4, 512, "stochastic", "l2")], ids=repr)
def test_errors_that_grow_are_refused(compressor):
    layout = pack([512], compressor.block, 1)
    payload = torch.zeros(1, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    state = FeedbackState(torch.zeros(layout.numel))
    for state.step in range(500):
        compressor.encode(layout, [torch.randn(512, generator=generator(state.step))], state, payload.zero_())
    assert state.error.norm() > 1e6
    with pytest.raises(ValueError, match=r"grow without bound\. Pass worker_error=False"):
        Options(compressor)


@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("server", [None, 1])
@every_pair
def test_the_residual_keeps_what_float16_cannot_hold(pair, server, average):
    """Errors make replies larger than any gradient; all gradients are as large as float16 holds, so that every code does."""
    g = generator(4)
    group = Group(pair, 2, server, average)
    cut = False
    for step in range(6):
        own = [(torch.randn(size, generator=g) * 65504 * (step < 3)).clamp(-65504, 65504).half() for size in SIZES]
        gradients = [own, [-x if step % 2 else x for x in own]]
        before = group.given(gradients) + group.residual()
        output = group.step(gradients)
        assert output.dtype == torch.float16 and output.isfinite().all()
        cut = cut or bool((output.abs() == 65504).any())
        difference = (before - output.double() - group.residual()).abs()
        assert (difference <= 2**-11 * output.double().abs() + TOLERANCE * before.abs().max()).all()
    assert cut or any(isinstance(q, OneBit) for q in pair)  # whose values are means


# ---- against the algorithm as the paper writes it


def replied(compressor, layout, tensors, step, server):
    """Q'[v], by the servers of each shard, with their random numbers."""
    values = [torch.empty_like(t) for t in tensors]
    for shard, pieces in enumerate(layout.pieces):
        alone = layout.shard(shard)
        parts = [tensors[p.tensor][p.first : p.first + p.numel].clone() for p in pieces]
        state = FeedbackState(step=step, sender=2 * (shard if server is None else server) + 1, first_shard=shard)
        payload = torch.zeros(1, compressor.chunk_nbytes(alone), dtype=torch.uint8)
        compressor.encode(alone, parts, state, payload)
        compressor.decode(alone, payload, parts)
        for piece, part in zip(pieces, parts, strict=True):
            values[piece.tensor][piece.first : piece.first + piece.numel] = part
    return values


def through(compressor, layout, tensors, step=0, rank=0):
    """Q[v], by the compressor's own passes, as a worker draws its random numbers."""
    payload = torch.zeros(layout.shards, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    compressor.encode(layout, [t.clone() for t in tensors], FeedbackState(step=step, sender=2 * rank), payload)
    values = [torch.empty_like(t) for t in tensors]
    compressor.decode(layout, payload, values)
    return values


@pytest.mark.parametrize("worker_error, server_error", [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("server", [None, 1])
@every_pair
def test_the_algorithm_line_by_line(pair, server, average, worker_error, server_error):
    workers, g = 4, generator(3)  # 1/4 rounds nothing, so that every order of operations gives the same bits
    group = Group(pair, workers, server, average, worker_error, server_error)
    zeros = [torch.zeros(size) for size in SIZES]
    e, server_e = [zeros] * workers, zeros
    for step in range(3):
        gradients = group.gradients(g)
        v = [[a + b for a, b in zip(*worker, strict=True)] for worker in zip(gradients, e, strict=True)]
        sent = [through(pair[0], group.layout, worker, step, rank) for rank, worker in enumerate(v)]
        total = server_e
        for worker in sent:
            total = [t + group.weight * x for t, x in zip(total, worker, strict=True)]
        output = replied(pair[1], group.layout, total, step, server)
        if worker_error:
            e = [[a - b for a, b in zip(*worker, strict=True)] for worker in zip(v, sent, strict=True)]
        if server_error:
            server_e = [a - b for a, b in zip(total, output, strict=True)]
        assert_same_bits(group.step(gradients), torch.cat(output))
    exchanges = group.simulation.exchanges
    if worker_error:
        for own, expected in zip(group.worker_errors(), e, strict=True):
            assert torch.equal(own, torch.cat(expected))
    else:
        assert all(exchange.worker_error is None for exchange in exchanges)
    if server_error:
        assert torch.equal(group.server_error(), torch.cat(server_e))
    else:
        assert all(exchange.server_error is None for exchange in exchanges)


# ---- what is not finite


def check_law_where_finite(group, gradients):
    """As `check_law`, where the result is finite, and the errors must be finite everywhere."""
    before = group.given(gradients) + group.residual()
    output = group.step(gradients)
    after = output.double() + group.residual()
    assert group.residual().isfinite().all()
    finite = output.isfinite()
    assert ((before - after)[finite].abs() <= 1e-4).all()
    return output


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("workers, server", [(1, None), (3, None), (3, 2)])
@every_pair
def test_one_worker_is_not_finite(pair, workers, server, value):
    g = generator(4)
    group = Group(pair, workers, server)
    for _ in range(2):
        check_law(group, group.gradients(g))
    *others_before, own_before = group.worker_errors()
    server_before = group.server_error()
    gradients = group.gradients(g)
    gradients[-1][1][333] = value
    place = SIZES[0] + 333

    nonfinite = ~check_law_where_finite(group, gradients).isfinite()
    assert nonfinite[place]
    *others, own = group.worker_errors()
    assert_same_bits(own[place], own_before[place], "the worker's error:")
    if isinstance(pair[0], OneBit):
        start = 333 // pair[0].block * pair[0].block
        block = slice(SIZES[0] + start, SIZES[0] + min(start + pair[0].block, SIZES[1]))
        assert_same_bits(own[block], own_before[block], "the worker's error in the block:")
    for after, before in zip([own, *others], [own_before, *others_before], strict=True):
        torch.testing.assert_close(after[nonfinite], before[nonfinite], rtol=0, atol=1e-5)
    assert_same_bits(group.server_error()[nonfinite], server_before[nonfinite], "server error:")
    assert check_law(group, group.gradients(g)).isfinite().all()


@every_pair
def test_a_whole_gradient_is_not_finite(pair):
    g = generator(5)
    group = Group(pair, 3)
    check_law(group, group.gradients(g))
    gradients = group.gradients(g)
    gradients[0][1][:] = math.nan
    assert not group.step(gradients).isfinite().all()
    assert check_law(group, group.gradients(g)).isfinite().all()


ONE_BIT = [q for q in COMPRESSORS if isinstance(q, OneBit)]
OVERFLOWS = [((q, q), 4e36 if q.scale == "l1" else 2e18, slice(None)) for q in ONE_BIT]  # norms overflow, or their sum
OVERFLOWS += [((q, q), 3e38, 333) for q in (TopK(0.05), TopK(k=3), NoCompression(), Int8())]
OVERFLOWS += [(pair, 3e38, 333) for pair in MIXED if isinstance(pair[1], OneBit)]


@pytest.mark.parametrize("server", [None, 0])
@pytest.mark.parametrize("pair, huge, where", OVERFLOWS, ids=lambda x: pair_id(x) if isinstance(x, tuple) else str(x))
def test_a_sum_of_finite_values_overflows(pair, huge, where, server):
    g = generator(6)
    group = Group(pair, 4, server, average=False)
    check_law(group, group.gradients(g))
    gradients = group.gradients(g)
    for worker in gradients:
        worker[1][where] = huge
    nonfinite = ~group.step(gradients).isfinite()
    assert nonfinite.any()
    for error in (*group.worker_errors(), group.server_error()):
        assert error.isfinite().all() and error[nonfinite].abs().max() < 100
    for _ in range(3):
        assert check_law(group, group.gradients(g)).isfinite().all()


# ---- momentum correction, in which a velocity takes the place of the gradient


SPARSE = [pair for pair in PAIRS if pair[0].sparse]
every_sparse_pair = pytest.mark.parametrize("pair", SPARSE, ids=pair_id)


@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("workers, server", GROUPS)
@every_sparse_pair
def test_momentum_keeps_the_law(pair, workers, server, average):
    g = generator(7)
    group = Group(pair, workers, server, average, momentum=0.9)
    for _ in range(5):
        check_law(group, group.gradients(g))


@every_sparse_pair
def test_the_velocity_of_what_was_sent_is_forgotten(pair):
    g = generator(8)
    group = Group(pair, 3, momentum=0.75)
    u, e = [torch.zeros(sum(SIZES))] * 3, [torch.zeros(sum(SIZES))] * 3
    for step in range(4):
        gradients = group.gradients(g)
        u = [0.75 * own + torch.cat(gradient) for own, gradient in zip(u, gradients, strict=True)]
        v = [own + rest for own, rest in zip(u, e, strict=True)]
        sent = [torch.cat(through(pair[0], group.layout, list(own.split(SIZES)), step, rank)) for rank, own in enumerate(v)]
        u = [own.masked_fill(away != 0, 0.0) for own, away in zip(u, sent, strict=True)]
        e = [own - away for own, away in zip(v, sent, strict=True)]
        group.step(gradients)
        assert any((away == 0).any() for away in sent) and all((away != 0).any() for away in sent)
        for own, expected in zip(group.velocities() + group.worker_errors(), u + e, strict=True):
            assert torch.equal(own, expected)


@pytest.mark.parametrize("server", [None, 2])
@every_sparse_pair
def test_what_is_not_finite_leaves_the_velocity_alone(pair, server):
    g = generator(9)
    group = Group(pair, 3, server, momentum=0.9)
    for _ in range(3):
        check_law(group, group.gradients(g))

    def starts():  # of each worker: what its next step starts from
        return [e.double() + 0.9 * u.double() for e, u in zip(group.worker_errors(), group.velocities(), strict=True)]

    before, own_velocity, own_error = starts(), group.velocities()[-1], group.worker_errors()[-1]
    gradients = group.gradients(g)
    gradients[-1][1][333] = math.nan
    place = SIZES[0] + 333
    nonfinite = ~group.step(gradients).isfinite()
    assert nonfinite[place]
    assert_same_bits(group.velocities()[-1][place], own_velocity[place])
    assert_same_bits(group.worker_errors()[-1][place], own_error[place])
    for after, was in zip(starts(), before, strict=True):
        torch.testing.assert_close(after[nonfinite], was[nonfinite], rtol=0, atol=1e-5)
    assert check_law(group, group.gradients(g)).isfinite().all()


# ---- the first steps uncompressed


@pytest.mark.parametrize("server", [None, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_warm_up_is_uncompressed(momentum, server):
    g = generator(10)
    group = Group((TopK(0.05), TopK(0.1)), 2, server, warmup_steps=3, momentum=momentum)
    velocity = 0.0
    for step in range(6):
        gradients = group.gradients(g)
        if step == 3:
            assert group.residual().abs().max() == 0
        output = check_law(group, gradients)
        velocity = momentum * velocity + 0.5 * (torch.cat(gradients[0]) + torch.cat(gradients[1]))
        if step < 3:
            torch.testing.assert_close(output, velocity)
        else:
            assert (output != 0).sum() < 0.25 * len(output)


# ---- rows of an embedding that no worker has a gradient for


@pytest.mark.parametrize(
    "compressor", [*COMPRESSORS, TopK(0.9, values="sign"), Quantize(8, 64, rounding="stochastic")], ids=repr
)
def test_rows_without_gradients_stay_where_they_are(compressor):
    """Exact zeros, whatever the errors hold; but with OneBit, which has no zero, in scales that they share with others."""
    g = generator(13)
    group = Workers(lambda: DoubleSqueeze(compressor, min_numel=1), [("table", torch.zeros(64, 40, requires_grad=True))], 3)
    moved = 0.0
    for _ in range(5):
        gradients = [torch.zeros(64, 40) for _ in range(3)]
        for own in gradients:
            own[:7] = torch.randn(7, 40, generator=g)
        moved = max(moved, float(group.exchange([[own] for own in gradients])[0][7:].abs().max()))
    assert (moved > 0) == isinstance(compressor, OneBit)
