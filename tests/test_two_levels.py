"""Several ranks a host: dense inside, compressed between. The law, replicas and what a rank holds, in one process."""

import math

import pytest
import torch
from support import COMPRESSORS, assert_same_bits, gathered, generator

from ds_horovod import DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, TopK
from ds_horovod.in_process import InProcessTransport, Simulation, Workers
from ds_horovod.layout import pack
from ds_horovod.options import Options
from ds_horovod.residual import export_residual

SIZES = [5, 700, 63, 1]
HOSTS = [(2, 2), (3, 2), (2, 3), (4, 4), (2, 8), (8, 8)]
SHAPES = {"a": (33, 65), "b": (65,), "c": (47, 65), "d": (7, 47)}


class Group:
    """hosts x local workers that exchange one bucket."""

    def __init__(self, hosts, local, *pair, average=True, dtype=torch.float32, **options):
        self.n, self.dtype = hosts * local, dtype
        self.weight = 1 / self.n if average else 1.0
        compressor, server_compressor = pair if len(pair) == 2 else pair * 2
        self.layout = pack(SIZES, math.lcm(compressor.block, server_compressor.block), self.n)
        options = Options(compressor, server_compressor=server_compressor, **options)
        self.simulation = Simulation(self.layout, options, self.n, average=average, local_size=local)

    def gradients(self, g):
        return [[torch.randn(size, generator=g).to(self.dtype) for size in SIZES] for _ in range(self.n)]

    def held(self):
        return gathered(self.layout, sum(export_residual(e)[0].double() for e in self.simulation.exchanges))

    def step(self, gradients):
        """Returns both sides of the law."""
        given = self.held() + self.weight * sum(torch.cat(own).double() for own in gradients)
        self.simulation.step(gradients)
        for own in gradients[1:]:
            assert_same_bits(torch.cat(own), torch.cat(gradients[0]))
        return given, torch.cat(gradients[0]).double() + self.held()


@pytest.mark.parametrize("hosts, local", HOSTS)
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.contracts], ids=repr)
def test_each_step_keeps_the_law(compressor, hosts, local):
    group, g = Group(hosts, local, compressor), generator(0)
    for _ in range(3):
        given, got = group.step(group.gradients(g))
        torch.testing.assert_close(got, given, rtol=0, atol=1e-5 * max(1.0, float(given.abs().max())))
    if not isinstance(compressor, NoCompression):
        assert group.held().any()
    for exchange in group.simulation.exchanges:
        assert exchange.worker_error.numel() == group.layout.numel // local
        assert exchange.server_error.numel() == group.layout.shard_numel


@pytest.mark.parametrize(
    "options", [{"average": False}, {"warmup_steps": 1}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str
)
@pytest.mark.parametrize(
    "pair", [(OneBit(32), Quantize(4, 96)), (TopK(0.1), NoCompression()), (RandomK(0.2), OneBit(64))], ids=str
)
def test_options_and_dtypes_keep_the_law(pair, options):
    group, g = Group(3, 2, *pair, **options), generator(1)
    precision = 1e-5 if "dtype" not in options else 4 * torch.finfo(options["dtype"]).eps  # of what is written to gradients
    for _ in range(3):
        given, got = group.step(group.gradients(g))
        torch.testing.assert_close(got, given, rtol=0, atol=precision * max(1.0, float(given.abs().max())))


@pytest.mark.parametrize("compressor", [OneBit(64), Quantize(4, 64), TopK(0.1), TopK(0.1, values="sign")], ids=repr)
def test_a_host_sends_what_one_worker_with_its_sum_would(compressor):
    """Bit for bit: two hosts whose first ranks have all the gradient are two workers that have it."""
    two = Simulation(pack(SIZES, 64, 4), Options(compressor), 4, average=False, local_size=2)
    g = generator(3)
    layouts = [two.exchanges[rank].layout for rank in range(2)]
    slices = [Simulation(layout, Options(compressor), 2, average=False) for layout in layouts]
    for _ in range(3):
        of_host = [[torch.randn(size, generator=g) for size in SIZES] for _ in range(2)]
        flat = [torch.zeros(two.exchanges[0].whole.numel) for _ in range(2)]
        for own, tensors in zip(flat, of_host, strict=True):
            for offset, tensor in zip(two.exchanges[0].whole.offsets, tensors, strict=True):
                own[offset : offset + len(tensor)] = tensor
        gradients = [[(t.clone() if rank % 2 == 0 else torch.zeros_like(t)) for t in of_host[rank // 2]] for rank in range(4)]
        two.step(gradients)
        expected = []
        for rank, simulation in enumerate(slices):
            half = [own[two.exchanges[rank].span] for own in flat]
            parts = [
                [h[o : o + n].clone() for o, n in zip(layouts[rank].offsets, layouts[rank].numels, strict=True)] for h in half
            ]
            simulation.step(parts)
            expected += [torch.cat(parts[0])]
        assert_same_bits(torch.cat(gradients[0]), torch.cat(expected))


@pytest.mark.parametrize("compressor", [OneBit(64), Quantize(4, 64), TopK(0.1), NoCompression()], ids=repr)
def test_what_is_not_finite_on_one_rank_stays_where_it_is(compressor):
    """Replicas are alike, no error is spoiled, and elements that are not near keep the law."""
    group, g = Group(3, 2, compressor), generator(4)
    group.step(group.gradients(g))
    gradients = group.gradients(g)
    gradients[3][1][123] = float("nan")
    given, got = group.step(gradients)
    finite = got.isfinite()
    assert not finite[5 + 123] and finite.sum() >= len(finite) - 2 * 64
    torch.testing.assert_close(got[finite], given[finite], rtol=0, atol=1e-5)
    assert group.held().isfinite().all()
    given, got = group.step(group.gradients(g))
    torch.testing.assert_close(got, given, rtol=0, atol=1e-5 * max(1.0, float(given.abs().max())))


# ---- a whole optimizer


def workers(hosts, local, compressor, **options):
    parameters = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    defaults = {"min_numel": 64, "bucket_cap_mb": 0.01}
    return Workers(lambda: DoubleSqueeze(compressor, **{**defaults, **options}), parameters, hosts * local, local)


def draw(n, step):
    g = generator(step)
    return [[torch.randn(shape, generator=g) for shape in SHAPES.values()] for _ in range(n)]


def waits(group):
    held = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for reducer in group.reducers:
        for name, residual in reducer.residuals().items():
            held[name] += residual.error.double()
    for name, average in group.reducers[0].late().items():
        held[name] += average.double()
    return held


@pytest.mark.parametrize(
    "options", [{}, {"staleness": 1}, {"staleness": 2, "sync_steps": 2}, {"max_norm": 1e9}, {"warmup_steps": 2}], ids=str
)
@pytest.mark.parametrize("compressor", [OneBit(64), Quantize(4, 64), TopK(0.1)], ids=repr)
def test_nothing_is_lost_in_training(compressor, options):
    group = workers(2, 3, compressor, **options)
    total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for step in range(7):
        gradients = draw(6, step)
        for i, name in enumerate(total):
            total[name] += sum(own[i].double() for own in gradients) / 6
        group.begin_step(0.1)
        arrived = group.exchange(gradients)
        for name, gradient in zip(total, arrived or (), strict=arrived is not None):
            total[name] -= gradient.double()
        for name, held in waits(group).items():
            assert (total[name] - held).abs().max() < 2e-4, (step, name)


def test_momentum_adds_up_on_a_host():
    """The velocity of a host is that of its sum: all that was sent, and waits, is what the gradients have brought."""
    group = workers(2, 2, TopK(0.2), momentum=0.5)
    velocity = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    first = draw(4, 0)
    expected = {name: sum(own[i].double() for own in first) / 4 for i, name in enumerate(SHAPES)}
    got = dict(zip(SHAPES, group.exchange(first), strict=True))
    held = waits(group)
    for name in ("a", "c", "d"):
        torch.testing.assert_close(got[name].double() + held[name], expected[name], rtol=0, atol=1e-5)
        assert velocity[name].shape == held[name].shape
    for reducer in group.reducers:
        for bucket in reducer.session.buckets:
            assert bucket.exchange.velocity.numel() == bucket.exchange.whole.numel // 2


@pytest.mark.parametrize("compressor", [OneBit(64), TopK(0.1), RandomK(0.1)], ids=repr)
def test_a_rank_goes_on_from_its_own_state(compressor):
    first, second = workers(3, 2, compressor), workers(3, 2, compressor)
    for step in range(3):
        first.exchange(draw(6, step))
    for a, b in zip(first.squeezes, second.squeezes, strict=True):
        b.load_state_dict(a.state_dict())
    for step in range(3, 5):
        for a, b in zip(first.exchange(draw(6, step)), second.exchange(draw(6, step)), strict=True):
            assert_same_bits(a, b)
    other = workers(2, 3, compressor)
    with pytest.raises(ValueError, match="of another layout: bucket 0 has slice"):
        other.squeezes[0].load_state_dict(first.squeezes[0].state_dict())


def test_one_file_for_any_number_of_hosts_and_ranks():
    """What all hold together is divided among the ranks of other hosts, or of one level, and back."""
    first = workers(2, 2, TopK(0.1))
    for step in range(3):
        first.exchange(draw(4, step))
    before, total = waits(first), {}
    for squeeze in first.squeezes:
        for name, error in squeeze.full_state_dict()["errors"].items():  # in one process each rank's own
            total[name] = total.get(name, 0) + error
    state = {**first.squeezes[0].full_state_dict(), "errors": total}
    for hosts, local in ((3, 2), (4, 1), (2, 4), (2, 2)):
        other = workers(hosts, local, TopK(0.1))
        for squeeze in other.squeezes:
            squeeze.load_state_dict(state)
        for name, held in waits(other).items():
            torch.testing.assert_close(held, before[name], rtol=1e-5, atol=1e-6)


def test_bytes_between_hosts_are_those_of_the_flat_exchange_over_the_ranks_of_a_host():
    two, flat = workers(4, 2, OneBit(64)), workers(8, 1, OneBit(64))
    for group in two, flat:
        group.exchange(draw(8, 0))
    sent = [sum(squeeze.stats()["compressed_bytes_sent"] for squeeze in group.squeezes) for group in (two, flat)]
    # Each of 8 ranks sends its payload and reply to 7 others, or a half of it to 3: 2 (n-1)/n |payload| for n of 8 and of 4.
    assert sent[0] / sent[1] == pytest.approx((3 / 4 / 2) / (7 / 8), rel=1e-3)


def test_what_cannot_be():
    for size, server, local in ((5, None, 2), (4, 0, 2)):
        with pytest.raises(ValueError, match="cannot be on hosts of 2"):
            InProcessTransport.group(size, server, local_size=local)
