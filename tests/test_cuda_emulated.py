"""The CUDA kernels' sources, emulated, equal the CPU kernels bit for bit: see tests/cuda/emulator.py."""

import itertools
from unittest import mock

import pytest
import torch
from emulator import SCHEDULES, EmulatedDevice
from support import assert_same_bits, generator, spread
from test_kernels import CONTENTS, make

from ds_horovod import Cast, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK, kernels
from ds_horovod.feedback import FeedbackState
from ds_horovod.kernels import cuda, launch
from ds_horovod.layout import Layout, pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRANULARITIES = ("block", "parameter", "bucket")
# Blocks of part of a row of 256, of one and of several warps, of one and of several tiles.
ONE_BIT = [OneBit(block, "l1") for block in (32, 96, 256, 544, 2048, 4096 + 64)]
ONE_BIT += [OneBit(96, "l2"), OneBit(2048, "l2"), *(OneBit(96, s, g) for s in ("l1", "l2") for g in GRANULARITIES[1:])]
QUANTIZE = [Ternary(), Ternary(96), Quantize(2, 32), Quantize(3, 96), Quantize(3, 4096), Quantize(4), Quantize(4, 800)]
QUANTIZE += [Quantize(8, 64), Quantize(8, 2048 + 32), Ternary(2048 + 64, "stochastic", seed=3), Ternary(32, "stochastic", "l2")]
QUANTIZE += [Quantize(3, 96, "stochastic"), Quantize(8, 2048, "stochastic", "l2", seed=2**64 - 1)]
ELEMENTS = [
    NoCompression(),
    Cast("fp16"),
    Cast("bf16"),
    RandomK(1e-5),
    RandomK(0.01),
    RandomK(0.3, values="fp16", seed=2**64 - 1),
    RandomK(1.0),
]
TOP_K = [TopK(0.01), TopK(0.3), TopK(1.0), TopK(k=3, values="fp16"), TopK(0.06, values="sign"), TopK(0.7, values="sign")]
CODECS = ONE_BIT + QUANTIZE + ELEMENTS + TOP_K
FEW_CODECS = [OneBit(), OneBit(32, "l2"), OneBit(96, granularity="bucket"), Quantize(4), Ternary(), Cast("fp16"), RandomK(0.1)]
FEW_CODECS += [TopK(0.05, values="sign")]
SIZES = [[1], [31], [33], [2047], [2049], [5, 100, 3000], [7000, 1, 33, 2048]]


@pytest.fixture
def emulated():
    """Inside `on_cuda`, compressors run on emulated kernels."""
    device = EmulatedDevice()
    with mock.patch.object(launch, "device_of", lambda where: device):
        yield device


def on_cuda():
    return mock.patch.object(kernels, "for_device", lambda device: cuda)


def compare(what, run):
    """Runs on the CPU and on emulated kernels, and compares all results."""
    expected = run()
    with on_cuda():
        actual = run()
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert_same_bits(actual[name], values, f"{name} ({what})")


def arrays_of(state):
    return {name: x for name, x in (("error", state.error), ("velocity", state.velocity)) if x is not None}


def state_with(codec, error, **more):
    """With a velocity too, where the compressor can have one."""
    state = FeedbackState(None if error is None else error.clone(), step=5, bucket=2, sender=3, first_shard=1, **more)
    if codec.sparse and error is not None:
        state.velocity, state.momentum = error.roll(1) * 0.5, 0.9
    return state


def passes(codec, layout, gradients, error, dtype):
    """Encodes, decodes and accumulates, and returns all results."""
    state = state_with(codec, error)
    if gradients is None:
        state.velocity = None
    payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, gradients, state, payload)
    decoded = [torch.full((numel,), 7, dtype=dtype) for numel in layout.numels]
    codec.decode(layout, payload, decoded)
    totals = torch.randn(layout.shards, layout.shard_numel, generator=generator(1))
    for shard, total in enumerate(totals):
        codec.accumulate(layout.shard(shard), payload[shard].repeat(2, 1), 0.3, total)
    return {"payload": payload, "decoded": torch.cat(decoded), "totals": totals, **arrays_of(state)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_sizes(codec, sizes, emulated):
    for dtype, shards in zip(DTYPES, (1, 3, 2), strict=True):  # a small tensor leaves two of three shards without elements
        layout = pack(sizes, codec.block, shards)
        gradients, error = make("normal", sizes, dtype), spread(layout, make("normal", sizes, torch.float32, seed=1))
        compare(f"{dtype}, {shards} shards", lambda: passes(codec, layout, gradients, error, dtype))  # noqa: B023


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_contents(codec, content, emulated):
    sizes = [5, 100, 3000]
    for dtype, shards in zip(DTYPES, (3, 1, 2), strict=True):
        layout = pack(sizes, codec.block, shards)
        gradients, error = make(content, sizes, dtype), spread(layout, make(content, sizes, torch.float32, seed=1))
        for g, e in ((gradients, error), (gradients, None), (None, error)):
            what = f"{dtype}, {shards} shards, {'no ' * (g is None)}gradients, {'no ' * (e is None)}error"
            compare(what, lambda: passes(codec, layout, g, e, dtype))  # noqa: B023


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_schedules(codec, schedule, emulated):
    emulated.schedule = SCHEDULES[schedule]
    sizes = [5, 2100, 300]
    layout = pack(sizes, codec.block, 2)
    gradients, error = make("normal", sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))
    compare(schedule, lambda: passes(codec, layout, gradients, error, torch.float32))
    compare(schedule, lambda: served(codec, codec, layout.shard(0), error[: layout.shard_numel], "normal", 0.5))


def served(codec, pusher, layout, error, content, weight, workers=3):
    pushed = torch.zeros(workers, 1, pusher.chunk_nbytes(layout), dtype=torch.uint8)
    for worker, payload in enumerate(pushed):
        contents = content if worker == 1 else "normal"
        pusher.encode(
            layout, make(contents, layout.numels, torch.float32, seed=worker), FeedbackState(step=5, bucket=2), payload
        )
    state = FeedbackState(None if error is None else error.clone(), step=5, bucket=2, sender=3)
    reply = torch.zeros(codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.serve(layout, pushed[:, 0], pusher, weight, state, reply)
    return {"reply": reply, **arrays_of(state)}


@pytest.mark.parametrize("content", ["normal", "zeros", "denormals", "sums overflow", "not finite"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_server_pass(codec, content, emulated):
    sizes = [5, 100, 3000]
    layout = pack(sizes, codec.block, 2).shard(0)
    error = spread(layout, make(content, layout.numels, torch.float32, seed=7))
    if content == "not finite":
        error = spread(layout, make("normal", layout.numels, torch.float32, seed=7))
    for kept_error, weight in ((error, 1.0), (error, 1 / 3), (None, 1 / 3)):
        compare(f"weight {weight}", lambda: served(codec, codec, layout, kept_error, content, weight))  # noqa: B023


@pytest.mark.parametrize("content", ["normal", "sums overflow", "not finite"])
@pytest.mark.parametrize("pusher, codec", [p for p in itertools.product(FEW_CODECS, FEW_CODECS) if p[0] != p[1]], ids=str)
def test_server_of_another_compressor(pusher, codec, content, emulated):
    """The server error is kept bit for bit where the reply is not finite: on the CPU too."""
    layout = pack([5, 100, 3000], 2048 * 3, 1)
    error = spread(layout, make("normal", layout.numels, torch.float32, seed=7))
    compare("mixed", lambda: served(codec, pusher, layout, error, content, 1 / 3))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_rollback_where_the_reply_is_not_finite(codec, emulated):
    sizes = [5, 100, 3000]
    layout = pack(sizes, codec.block, 2)
    error = spread(layout, make("normal", sizes, torch.float32, seed=1))

    def run(server=codec, own="normal"):
        gradients, bad = make(own, sizes, torch.float16), make("not finite", sizes, torch.float32)
        replies, payload = (torch.zeros(2, c.chunk_nbytes(layout), dtype=torch.uint8) for c in (server, codec))
        server.encode(layout, bad, FeedbackState(), replies)
        state = state_with(codec, error)
        codec.encode(layout, gradients, state, payload)
        mask = server.nonfinite_mask(layout, replies)
        assert mask is not None
        codec.rollback(layout, payload, mask, gradients, state)
        real = spread(layout, [torch.ones(n) for n in sizes]).bool()
        bits = (mask[:, None] >> torch.arange(32) & 1).bool().view(-1)
        return {"mask": bits & real, **arrays_of(state)}

    compare("own reply", run)
    compare("element by element", lambda: run(Cast()))
    compare("own gradients that are not finite", lambda: run(own="not finite"))


@pytest.mark.parametrize("codec", [*FEW_CODECS, NoCompression()], ids=str)
def test_the_mask_of_a_finite_reply_is_empty(codec, emulated):
    layout = pack([5, 100, 3000], codec.block, 2)
    payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, make("heavy tails", layout.numels, torch.float32), FeedbackState(), payload)
    with on_cuda():
        assert not codec.nonfinite_mask(layout, payload).any()


@pytest.mark.parametrize("codec", FEW_CODECS, ids=str)
def test_more_tensors_than_fit_the_arguments(codec, emulated):
    sizes = [1 + 7 * i % 90 for i in range(launch.FEW + 5)]
    layout = pack(sizes, codec.block, 2)
    gradients, error = make("normal", sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))
    compare("many", lambda: passes(codec, layout, gradients, error, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", FEW_CODECS, ids=str)
def test_gradients_at_any_address_of_their_type(codec, dtype, emulated):
    sizes = [3001, 70]
    layout = pack(sizes, codec.block, 1)
    shifted = [torch.cat([g[:1], g])[1:] for g in make("normal", sizes, dtype)]
    compare("shifted", lambda: passes(codec, layout, shifted, None, dtype))
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, shifted, FeedbackState(), payload)
    into = [torch.full((n + 2,), 7, dtype=dtype) for n in sizes]
    with on_cuda():
        codec.decode(layout, payload, [x[1:-1] for x in into])
    assert all(x[0] == 7 and x[-1] == 7 for x in into)


@pytest.mark.parametrize("codec", FEW_CODECS, ids=str)
def test_padding_that_the_layout_has_of_another_compressor(codec, emulated):
    """A server's blocks may be smaller than the layout's, and then whole ones are padding."""
    sizes = [5, 100, 3000, 7]
    layout = pack(sizes, 2048 * 3, 2)
    gradients, error = make("normal", sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))
    compare("padding", lambda: passes(codec, layout, gradients, error, torch.float32))


@pytest.mark.parametrize("codec", [*FEW_CODECS, *QUANTIZE, *TOP_K, OneBit(96, granularity="parameter")], ids=str)
def test_corrupt_payloads_stay_inside(codec, emulated):
    """No payload reads or writes out of bounds; a header that no encoder writes makes its shard NaN."""
    sizes = [5, 100, 3000]
    layout = pack(sizes, codec.block, 2)
    noise = torch.randint(0, 256, (2, codec.chunk_nbytes(layout)), generator=generator(3), dtype=torch.uint8)
    with on_cuda():
        decoded = [torch.zeros(n) for n in sizes]
        codec.decode(layout, noise, decoded)
        codec.accumulate(layout.shard(0), noise[0], 0.5, torch.zeros(layout.shard_numel))
        codec.serve(
            layout.shard(0), noise, codec, 0.5, FeedbackState(torch.zeros(layout.shard_numel)), torch.zeros_like(noise[0])
        )
        codec.rollback(
            layout, noise, codec.nonfinite_mask(layout, noise), decoded, state_with(codec, torch.zeros(layout.numel))
        )  # fmt: skip
        if isinstance(codec, RandomK | TopK):
            assert all(values.isnan().all() for values in decoded)


@pytest.mark.parametrize("codec", ONE_BIT + QUANTIZE + ELEMENTS, ids=str)
def test_at_most_three_launches_a_pass(codec, emulated):
    layout = pack([5, 100, 3000], codec.block, 1)
    gradients, state = make("normal", layout.numels, torch.float32), state_with(codec, torch.zeros(layout.numel))
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    runs = [
        lambda: codec.encode(layout, gradients, state, payload),
        lambda: codec.serve(
            layout, payload, codec, 1.0, FeedbackState(torch.zeros(layout.numel)), torch.zeros_like(payload[0])
        ),
        lambda: codec.decode(layout, payload, gradients),
    ]
    for run in runs:
        emulated.launches.clear()
        with on_cuda():
            run()
        assert 1 <= len(emulated.launches) <= 3, emulated.launches


def cast_pass(**changes):
    layout = changes.pop("layout", pack([100], 32, 1))
    arguments = {"gradients": [torch.zeros(100)], "state": FeedbackState(torch.zeros(layout.numel))}
    arguments["chunks"] = torch.zeros(1, Cast().chunk_nbytes(layout), dtype=torch.uint8)
    arguments |= changes
    Cast().encode(layout, *arguments.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gradients": [torch.zeros(10, 20)[:, ::2]]}, "contiguous"),
        ({"gradients": [torch.zeros(100, dtype=torch.float64)]}, "float64"),
        ({"gradients": [torch.zeros(100, device="meta")]}, "on cpu only, got one on meta"),
        ({"gradients": [torch.zeros(99)]}, "100 elements"),
        ({"state": FeedbackState(torch.zeros(256 + 1)[1:129])}, "aligned to 16 bytes"),
        ({"state": FeedbackState(torch.zeros(128).half())}, "float32"),
        ({"gradients": None, "state": FeedbackState()}, "nothing to encode"),
        ({"chunks": torch.zeros(1, 16, dtype=torch.uint8)}, "truncated"),
        ({"layout": Layout((0, 16), (10, 100), 1, 128)}, "start on blocks"),
    ],
)
def test_bad_input_is_refused_before_a_launch(changes, message, emulated):
    with on_cuda(), pytest.raises(ValueError, match=message):
        cast_pass(**changes)
    assert not emulated.launches
    with on_cuda():
        cast_pass()
    assert emulated.launches


def test_a_cuda_tensor_without_cupy_says_what_to_install():
    with mock.patch.object(torch.version, "cuda", "13.0"), pytest.raises(ImportError, match=r"ds-horovod\[cuda13\]"):
        launch._import_cupy()


def test_cupy_of_another_cuda_says_what_to_install():
    other = mock.Mock()
    other.cuda.runtime.runtimeGetVersion.return_value = 12090
    with (
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.dict("sys.modules", cupy=other),
        pytest.raises(ImportError, match=r"CuPy is for CUDA 12.*ds-horovod\[cuda13\]"),
    ):
        launch._import_cupy()
