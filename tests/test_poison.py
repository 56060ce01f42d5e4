"""Nothing that is finite leaves an error, a velocity or a server error that is not: it would never go away."""

import itertools
import math

import pytest
import torch
from support import COMPRESSORS, Int8, generator

from ds_horovod import Compressor, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.in_process import Simulation, Workers
from ds_horovod.layout import pack
from ds_horovod.options import Options
from ds_horovod.uncompressed import Velocities, clip
from ds_horovod.units import rescaled

LARGEST = torch.finfo(torch.float32).max
SIZES = [5, 700, 63, 1]


class Flipped(Int8):
    """The worst that Q can do: of the largest value the other sign."""

    def decompress(self, payload, numel):
        return -super().decompress(payload, numel)


class Doubled(Int8):
    """Values in float64, beyond those of float32."""

    def decompress(self, payload, numel):
        return super().decompress(payload, numel).double() * 1e300


class NotANumber(Int8):
    """Zeros and large values end as NaN, as they do where a user divides by a scale of zero."""

    def compress(self, values):
        values = torch.where(values.abs().max() > 1e30, torch.nan, values)
        return super().compress(values / values.abs().max().clamp_min(1e-30))

    def decompress(self, payload, numel):
        return super().decompress(payload, numel).log()


OF_USERS: list[Compressor] = [Int8(), Flipped(), Doubled(), NotANumber()]
CONTENTS = {
    "all": lambda numel, g: torch.randint(-1, 2, (numel,), generator=g) * LARGEST,
    "one": lambda numel, g: torch.randn(numel, generator=g).index_fill(0, torch.tensor([numel // 2]), LARGEST),
    "one negative": lambda numel, g: torch.randn(numel, generator=g).index_fill(0, torch.tensor([0]), -LARGEST),
    "any": lambda numel, g: (torch.rand(numel, generator=g) * 2 - 1) * LARGEST,
}


def kept(exchanges):
    arrays = [(e.worker_error, e.velocity, e.server_error) for e in exchanges]
    return [array for array in itertools.chain(*arrays) if array is not None]


def assert_finite(arrays, what):
    for array in arrays:
        assert array.isfinite().all(), f"{what}: {int((~array.isfinite()).sum())} of {array.numel()} are not finite"


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("compressor", [*COMPRESSORS, *OF_USERS], ids=lambda c: repr(c))
def test_the_largest_gradients_leave_finite_errors(compressor, content):
    for average, reply, server, dtype in (
        (True, None, None, torch.float32),
        (False, OneBit(64), 1, torch.float32),
        (True, NoCompression(), 0, torch.float16),
    ):
        g = generator(0)
        block = math.lcm(compressor.block, 64)
        options = Options(compressor, server_compressor=reply, momentum=0.9 * compressor.sparse)
        simulation = Simulation(pack(SIZES, block, 1 if server is not None else 2), options, 2, server, average=average)
        for step in range(8):
            large = step in (1, 2, 4)
            own = [[(CONTENTS[content](n, g) if large else torch.randn(n, generator=g)) for n in SIZES] for _ in range(2)]
            cast = torch.finfo(dtype).max
            gradients = [[x.clamp(-cast, cast).to(dtype) for x in worker] for worker in own]
            simulation.step(gradients)
            assert_finite(kept(simulation.exchanges), f"step {step}, average={average}, replies {reply}, {dtype}")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_level_of_the_largest_float_arrives_as_a_finite_value(bits):
    compressor, largest = Quantize(bits, 32), torch.full((32,), LARGEST)
    arrived = compressor.decompress(compressor.compress(largest), 32)
    torch.testing.assert_close(arrived, largest)
    assert arrived.isfinite().all()


def test_a_compressor_that_makes_nan_of_finite_values_says_so_to_all():
    """The error stays as it was, and no part of it is sent twice."""
    compressor, layout = NotANumber(), pack([64], 32, 1)
    state = FeedbackState(torch.ones(64))
    payload = torch.zeros(1, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    compressor.encode(layout, [torch.full((64,), 1e31)], state, payload)
    assert not compressor.is_within(layout, payload) and compressor.nonfinite_mask(layout, payload).all()
    assert torch.equal(state.error, torch.ones(64))


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


OF_RATES = [TopK(0.05), Quantize(4, 64), OneBit(64), RandomK(0.1), Int8()]


def workers_of(compressor, **options):
    parameters = [("a", torch.zeros(30, 40, requires_grad=True))]
    return Workers(lambda: DoubleSqueeze(compressor, min_numel=1, **options), parameters, 2)


def kept_by(workers):
    return kept(bucket.exchange for session in workers.sessions for bucket in session.buckets)


@pytest.mark.parametrize("compressor", OF_RATES, ids=repr)
def test_a_learning_rate_of_next_to_nothing(compressor):
    """What arrives is finite as well: nobody skips a step here."""
    workers, g = workers_of(compressor, lr_aware=True), generator(1)
    for rate in [0.1] * 5 + [1e-38, 1e-42, 1e-45, 5e-324] + [0.1] * 5:
        workers.begin_step(rate)
        (arrived,) = workers.exchange([[torch.randn(30, 40, generator=g)] for _ in range(2)])
        assert_finite([arrived, *kept_by(workers)], f"rate {rate}")
    assert arrived.abs().max() < 1e4 or not compressor.sparse


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("compressor", OF_RATES, ids=repr)
def test_a_loss_scale_that_grows_until_gradients_overflow(compressor, momentum):
    scaler = Scaler(2.0**100)
    workers, g = workers_of(compressor, grad_scaler=scaler, momentum=momentum * compressor.sparse), generator(2)
    taken = 0
    for step in range(120):
        workers.begin_step(0.1)
        (arrived,) = workers.exchange([[torch.randn(30, 40, generator=g) * scaler.scale] for _ in range(2)])
        assert_finite(kept_by(workers), f"step {step}, scale {scaler.scale:g}")
        finite = bool(arrived.isfinite().all())
        taken += finite
        if not finite:
            scaler.scale /= 2
        elif step % 2 and scaler.scale < 2.0**127:
            scaler.scale *= 2
    assert taken > 60


def test_rescaling_by_what_no_float_holds():
    for factor in (1e41, 1e308, math.inf):
        array = rescaled(torch.tensor([0.0, 1.0, -1e30, LARGEST]), factor, LARGEST / 8)
        assert array[0] == 0 and array.isfinite().all() and array[2] < -1e37
    assert torch.equal(rescaled(torch.tensor([4.0, LARGEST]), 0.5), torch.tensor([2.0, LARGEST / 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_velocities_of_what_is_not_compressed(dtype):
    velocities, largest = Velocities(0.9), torch.finfo(dtype).max
    for value in (largest, largest, -largest, 1.0):
        gradient = torch.full((3,), value, dtype=dtype)
        velocities.add("p", gradient)
        assert gradient.isfinite().all() and velocities.state_dict()["p"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clipping_where_a_square_overflows(dtype):
    gradient = torch.full((1000,), 1e30 if dtype != torch.float16 else 60000.0).to(dtype)
    clip([("p", gradient), ("q", torch.ones(3))], 2.0)
    assert 1.9 < gradient.double().norm() < 2.1
