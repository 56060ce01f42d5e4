"""The whole exchange over emulated CUDA kernels ends with the bits that it has on the CPU."""

import math
from unittest import mock

import pytest
import torch
from emulator import EmulatedDevice
from support import Int8, assert_same_bits, generator

from ds_horovod import Cast, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK, kernels
from ds_horovod.in_process import Simulation, Workers
from ds_horovod.kernels import cuda, launch
from ds_horovod.layout import pack
from ds_horovod.options import Options

SIZES = [5, 3000, 700]
WORKERS = 3
PAIRS = {
    "one bit": (OneBit(96), OneBit(96)),
    "one bit of parameters": (OneBit(96, granularity="parameter"),) * 2,
    "the paper's": (OneBit(2048, "l2", "bucket"),) * 2,
    "4 bits": (Quantize(4), Quantize(4)),
    "ternary": (Ternary(96), Ternary(96)),
    "stochastic": (Quantize(4, rounding="stochastic"),) * 2,
    "fp16": (Cast(), Cast()),
    "random-k": (RandomK(0.1), RandomK(0.1)),
    "top-k": (TopK(0.05), TopK(0.05)),
    "top-k in signs": (TopK(0.05, values="sign"), TopK(0.1, values="fp16")),
    "1 bit, 4 bits back": (OneBit(96), Quantize(4, 64)),
    "random-k, bf16 back": (RandomK(0.1), Cast("bf16")),
    "ternary, 1 bit of buckets back": (Ternary(), OneBit(96, granularity="bucket")),
    "a user's": (Int8(), Int8()),
    "a user's, 4 bits back": (Int8(), Quantize(4)),
    "4 bits, a user's back": (Quantize(4), Int8()),
}


def options(pusher, server, **more):
    return Options(pusher, server_compressor=server, **more)


def simulated(pusher, server, one_server, dtype, bad, magnitude=1, average=True, **more):
    """Three steps, in the second of which worker 1 has gradients that are not finite; all that is left."""
    layout = pack(SIZES, math.lcm(pusher.block, server.block), 1 if one_server else WORKERS)
    one = 0 if one_server else None
    simulation = Simulation(layout, options(pusher, server, **more), WORKERS, one, average=average)
    results = {}
    for step in range(3):
        g = generator(step)
        gradients = [[(torch.randn(n, generator=g) * magnitude).to(dtype) for n in SIZES] for _ in range(WORKERS)]
        if bad and step == 1:
            gradients[1][1][7], gradients[1][2][-1] = torch.nan, torch.inf
        simulation.step(gradients)
        for worker, own in enumerate(gradients):
            results[f"gradients of worker {worker} in step {step}"] = torch.cat(own)
    for worker, exchange in enumerate(simulation.exchanges):
        for name in ("worker_error", "server_error", "velocity"):
            kept = getattr(exchange, name)
            if kept is not None:
                results[f"{name} of worker {worker}"] = kept
    return results


@pytest.fixture
def emulated():
    device = EmulatedDevice()
    with mock.patch.object(launch, "device_of", lambda where: device):
        yield device


def compare(run):
    expected = run()
    with mock.patch.object(kernels, "for_device", lambda device: cuda):
        actual = run()
    for name, values in expected.items():
        assert_same_bits(actual[name], values, name)


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("pair", PAIRS)
def test_exchange(pair, bad, emulated):
    pusher, server = PAIRS[pair]
    for one_server, dtype in ((False, torch.float32), (True, torch.float16)):
        compare(lambda: simulated(pusher, server, one_server, dtype, bad))  # noqa: B023
    assert emulated.launches or pair == "a user's"


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("pusher", [Ternary(96), Quantize(2, 64), RandomK(0.1), TopK(0.05)], ids=str)
def test_exchange_with_momentum(pusher, bad, emulated):
    compare(lambda: simulated(pusher, Quantize(4), False, torch.bfloat16, bad, momentum=0.9))


def test_warm_up(emulated):
    compare(lambda: simulated(OneBit(96), OneBit(96), False, torch.float32, False, warmup_steps=1))
    assert any("cast_serve" in launched for launched in emulated.launches)


ONE_OF_EACH = [OneBit(96), Quantize(4), Ternary(96), Cast("bf16"), RandomK(0.5), TopK(0.05), Int8()]


@pytest.mark.parametrize("pusher", ONE_OF_EACH, ids=str)
def test_the_residual_keeps_what_float16_cannot_hold(pusher, emulated):
    run = lambda: simulated(pusher, pusher, True, torch.float16, False, 15000, average=False)  # noqa: E731
    assert max(output.max() for name, output in run().items() if "gradients" in name) == 65504 or isinstance(pusher, OneBit)
    compare(run)


def test_no_compression_of_the_reply(emulated):
    compare(lambda: simulated(OneBit(96), NoCompression(), False, torch.float32, False))


def test_a_model_of_several_buckets(emulated):
    """By way of sessions: buckets, the first step, clipping, what is not compressed."""

    def run():
        g = generator(0)
        shapes = [(80, 70), (70,), (60, 80), (3, 4)]
        parameters = [(f"p{i}", torch.nn.Parameter(torch.randn(shape, generator=g))) for i, shape in enumerate(shapes)]
        make = lambda: DoubleSqueeze(Ternary(), bucket_cap_mb=0.02, momentum=0.9, max_norm=5.0, min_numel=100)  # noqa: E731
        workers = Workers(make, parameters, WORKERS)
        results = {}
        for step in range(3):
            gradients = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(WORKERS)]
            for i, aggregated in enumerate(workers.exchange(gradients)):
                results[f"p{i} in step {step}"] = aggregated.clone()
        return results

    compare(run)
    assert len(set(emulated.launches)) > 3
