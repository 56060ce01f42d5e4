"""The native kernels equal the oracle in plain torch bit for bit, whatever the instruction set and the threads."""

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from support import assert_same_bits, generator, spread

from ds_horovod import Cast, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK, _cpu, kernels
from ds_horovod.feedback import FeedbackState
from ds_horovod.kernels import cpu
from ds_horovod.layout import pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE_BIT = [OneBit(*o) for o in itertools.product((32, 96, 2048), ("l1", "l2"), ("block", "parameter", "bucket"))]
VALUES = ("fp32", "fp16", "sign")
TOP_K = [TopK(ratio, values=values) for ratio in (0.001, 0.01, 0.3, 1.0) for values in VALUES]
TOP_K += [TopK(k=k, values=values) for k in (1, 3) for values in VALUES]
QUANTIZE = [Ternary(), Ternary(96), Quantize(2, 32), Quantize(3, 96), Quantize(3, 2048), Quantize(4), Quantize(8, 64)]
QUANTIZE += [Ternary(64, "stochastic", seed=3), Ternary(32, "stochastic", "l2"), Quantize(3, 96, "stochastic")]
QUANTIZE += [Quantize(8, 2048, "stochastic", "l2", seed=2**64 - 1)]
ELEMENTS = [NoCompression(), Cast("fp16"), Cast("bf16")]
ELEMENTS += [RandomK(1e-5), RandomK(0.01), RandomK(0.3, values="fp16", seed=2**64 - 1), RandomK(1.0)]
CODECS = ONE_BIT + TOP_K + QUANTIZE + ELEMENTS

SIZES = [[1], [7], [8], [9], [31], [2047], [2048], [2049], [65535], [65537], [5, 100, 3000], [70000, 1, 33, 200000]]
MILLION = 1_100_003  # more than a thread's share, and large enough to be written past the caches


def mostly_zeros(numel, dtype, g):
    values = torch.zeros(numel)
    values[:: max(1, numel // 5)] = 3.0
    return values


def not_finite(numel, dtype, g):
    values = torch.randn(numel, generator=g)
    values[numel // 2] = torch.inf
    values[-1] = -torch.inf
    values[0] = torch.nan
    return values


CONTENTS = {
    "normal": lambda numel, dtype, g: torch.randn(numel, generator=g),
    "zeros": lambda numel, dtype, g: torch.zeros(numel),
    "mostly zeros": mostly_zeros,
    "all equal": lambda numel, dtype, g: torch.full((numel,), -0.5),
    "ties": lambda numel, dtype, g: torch.randint(-2, 3, (numel,), generator=g).float(),
    "denormals": lambda numel, dtype, g: torch.randn(numel, generator=g) * torch.finfo(dtype).tiny,
    "negative zeros": lambda numel, dtype, g: torch.randn(numel, generator=g).clamp_min(0) * -1.0,
    "heavy tails": lambda numel, dtype, g: torch.randn(numel, generator=g) ** 7,
    "beyond half": lambda numel, dtype, g: torch.randn(numel, generator=g) * 60000,
    "sums overflow": lambda numel, dtype, g: (torch.rand(numel, generator=g) * 2 - 1) * torch.finfo(dtype).max,
    "largest floats": lambda numel, dtype, g: torch.randint(-1, 2, (numel,), generator=g) * torch.finfo(dtype).max,
    "not finite": not_finite,
}


@contextlib.contextmanager
def on(name):
    """Inside, kernels run on an instruction set."""
    _cpu.use_instruction_set(name)
    try:
        yield
    finally:
        _cpu.use_instruction_set(_cpu.instruction_sets()[0])


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request):
    with on(request.param):
        yield


@pytest.fixture
def use_threads(monkeypatch):
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def oracle():
    """Inside, compressors run on the reference kernels."""
    return mock.patch.object(kernels, "for_device", lambda device: reference)


def passes(codec, layout, gradients, error, dtype):
    """Encodes, decodes and accumulates, and returns all results. With a velocity too, where the compressor can have one."""
    state = FeedbackState(None if error is None else error.clone(), step=5, bucket=2, sender=3, first_shard=1)
    if codec.sparse and gradients is not None and error is not None:
        state.velocity, state.momentum = error.roll(1) * 0.5, 0.9
    payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, gradients, state, payload)
    decoded = [torch.full((numel,), 7, dtype=dtype) for numel in layout.numels]
    codec.decode(layout, payload, decoded)
    totals = torch.randn(layout.shards, layout.shard_numel, generator=generator(1))
    for shard, total in enumerate(totals):
        codec.accumulate(layout.shard(shard), payload[shard], 0.3, total)
    results = {"payload": payload, "decoded": torch.cat(decoded), "totals": totals}
    return results | {name: kept for name, kept in (("error", state.error), ("velocity", state.velocity)) if kept is not None}


def check_passes(codec, layout, gradients, error, dtype, what):
    with oracle():
        expected = passes(codec, layout, gradients, error, dtype)
    for instruction_set in _cpu.instruction_sets():
        with on(instruction_set):
            native = passes(codec, layout, gradients, error, dtype)
        for name, values in expected.items():
            assert_same_bits(native[name], values, f"{name} ({what}, {instruction_set}):")


def make(content, sizes, dtype, seed=0):
    g = generator(seed)
    return [CONTENTS[content](numel, dtype, g).to(dtype) for numel in sizes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_sizes(codec, sizes):
    small = sum(sizes) < 10000
    cases = itertools.product(DTYPES, (1, 3)) if small else [(torch.float32, 3), (torch.bfloat16, 1)]
    for dtype, shards in cases:  # a small tensor leaves two of three shards without elements
        layout = pack(sizes, codec.block, shards)
        error = spread(layout, make("normal", sizes, torch.float32, seed=1))
        check_passes(codec, layout, make("normal", sizes, dtype), error, dtype, f"{dtype}, {shards} shards")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_contents(codec, content):
    sizes = [5, 100, 3000]
    for dtype, shards in itertools.product(DTYPES, (1, 3)):
        layout = pack(sizes, codec.block, shards)
        gradients = make(content, sizes, dtype)
        error = spread(layout, make(content, sizes, torch.float32, seed=1))
        check_passes(codec, layout, gradients, error, dtype, f"{dtype}, {shards} shards, both")
        check_passes(codec, layout, gradients, None, dtype, f"{dtype}, {shards} shards, no error")
        check_passes(codec, layout, None, error, dtype, f"{dtype}, {shards} shards, error alone")


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_million(codec):
    layout = pack([MILLION], codec.block, 1)
    error = spread(layout, make("normal", [MILLION], torch.float32, seed=1))
    check_passes(codec, layout, make("heavy tails", [MILLION], torch.float32), error, torch.float32, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [OneBit(), OneBit(32, granularity="bucket"), TopK(0.01), Cast(), RandomK()], ids=str)
def test_memory_that_is_not_aligned(codec, dtype, instruction_set):
    layout = pack([MILLION], codec.block, 1)
    gradient = make("normal", [MILLION], dtype)[0]
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [gradient], FeedbackState(), payload)
    decoded = torch.empty_like(gradient)
    codec.decode(layout, payload, [decoded])

    shifted, into = torch.empty(MILLION + 1, dtype=dtype)[1:], torch.empty(MILLION + 1, dtype=dtype)[1:]
    shifted.copy_(gradient)
    again = torch.zeros_like(payload)
    codec.encode(layout, [shifted], FeedbackState(), again)
    codec.decode(layout, again, [into])
    assert_same_bits(again, payload)
    assert_same_bits(into, decoded)


def at_the_samples(numel):
    """Where top-k takes the samples of its first guess: lines of 16 elements, 8192 apart (a little less for less)."""
    lines = numel // 16
    step = 16 * (lines // (numel // 512 // 16))
    return (torch.arange(0, numel - 16, step)[:, None] + torch.arange(16)).view(-1)


def guess_too_high(v):
    here = at_the_samples(len(v))
    v[here] *= 1000.0


def guess_too_low(v):
    here = at_the_samples(len(v))
    v[here] *= 1e-6


def few_heavy_in_clusters(v):
    for start in (0, len(v) // 2 - 5000, len(v) - 10000):
        v[start : start + 10000 : 2] *= 1e4
    v[at_the_samples(len(v))[: 8 * 16]] *= 1e6


def few_not_zero(v):
    v[torch.arange(len(v)) % 1000 != 0] = 0.0


def all_alike(v):
    v[:] = 0.25


@pytest.mark.parametrize(
    "codec", [TopK(0.01), TopK(0.01, values="fp16"), TopK(0.05, values="sign"), TopK(0.3), TopK(k=3)], ids=str
)
@pytest.mark.parametrize("spoil", [guess_too_high, guess_too_low, few_heavy_in_clusters, few_not_zero, all_alike])
def test_top_k_when_the_guessed_threshold_fails(codec, spoil, use_threads):
    numel = 1 << 20
    v = torch.randn(numel, generator=generator(0))
    spoil(v)
    error = torch.zeros(numel)
    error[::3], v[::3] = v[::3], 0.0
    layout = pack([numel], codec.block, 1)
    use_threads(2)
    check_passes(codec, layout, [v], error, torch.float32, "with error")
    check_passes(codec, layout, [v + error], None, torch.float32, "no error")


@pytest.mark.parametrize("error_kept", [True, False], ids=["error", "no error"])
@pytest.mark.parametrize("content", ["normal", "ties", "not finite"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_serve(codec, content, error_kept):
    sizes = [5, 100, 3000]
    layout = pack(sizes, codec.block, 2)
    for workers, weight in ((1, 1.0), (3, 1 / 3), (5, 1.0)):
        pushed = torch.zeros(workers, 2, codec.chunk_nbytes(layout), dtype=torch.uint8)
        for worker, payload in enumerate(pushed):
            contents = content if worker == 0 else "normal"
            codec.encode(layout, make(contents, sizes, torch.float32, seed=worker), FeedbackState(), payload)
        for shard in (0, 1):
            arrived, alone = pushed[:, shard].contiguous(), layout.shard(shard)
            rests = [torch.randn(numel, generator=generator(9)) for numel in alone.numels]
            results = []
            for context in (oracle(), *map(on, _cpu.instruction_sets())):
                error = spread(alone, rests) if error_kept else None
                reply = torch.zeros(codec.chunk_nbytes(alone), dtype=torch.uint8)
                with context:
                    codec.serve(alone, arrived, codec, weight, FeedbackState(error), reply)
                results.append((reply, error))
            for reply, error in results[1:]:
                assert_same_bits(reply, results[0][0], f"reply ({workers} workers, shard {shard}):")
                if error_kept:
                    assert_same_bits(error, results[0][1], f"error ({workers} workers, shard {shard}):")


@pytest.mark.parametrize("error_kept", [True, False], ids=["error", "no error"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_sum_beside_the_error(codec, error_kept):
    """What is encoded is the sum; the error is replaced where the reply is finite, and stays elsewhere."""
    layout = pack([5, 100, 3000], codec.block, 2)
    for content in ("normal", "sums overflow", "not finite"):
        results = []
        for context in (oracle(), *map(on, _cpu.instruction_sets())):
            total, error = (spread(layout, make(c, layout.numels, torch.float32, 1)) for c in (content, "normal"))
            state = FeedbackState(error if error_kept else None, total=total, step=5, bucket=2, sender=3)
            payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
            with context:
                codec.encode(layout, None, state, payload)
            results.append((payload, error))
        for other in results[1:]:
            for own, expected in zip(other, results[0], strict=True):
                assert_same_bits(own, expected, content)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_rollback(codec):
    """Only where the mask says so, and as the oracle does it."""
    layout = pack([5, 100, 3000], codec.block, 2)
    gradients = make("normal", layout.numels, torch.bfloat16)
    results = []
    for context in (oracle(), *map(on, _cpu.instruction_sets())):
        error, velocity = (spread(layout, make("normal", layout.numels, torch.float32, seed)) for seed in (1, 2))
        state = FeedbackState(error, velocity if codec.sparse else None, momentum=0.9)
        replies, payload = (torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8) for _ in range(2))
        with context:
            codec.encode(layout, make("not finite", layout.numels, torch.float32), FeedbackState(), replies)
            codec.encode(layout, gradients, state, payload)
            mask = codec.nonfinite_mask(layout, replies)
            codec.rollback(layout, payload, mask, gradients, state)
            assert codec.nonfinite_mask(layout, payload) is None
        results.append((mask, error, velocity))
    before = spread(layout, make("normal", layout.numels, torch.float32, 1))
    undone = (results[0][0][:, None] >> torch.arange(32) & 1).bool().view(-1) & (before != 0)
    assert undone.any()
    if not codec.sparse:
        torch.testing.assert_close(results[0][1][undone], before[undone], rtol=0, atol=1e-5)
    for other in results[1:]:
        for own, expected in zip(other, results[0], strict=True):
            assert_same_bits(own, expected)


@pytest.mark.parametrize(
    "codec", [*ONE_BIT, *QUANTIZE, *ELEMENTS, TopK(0.01), TopK(0.3, values="fp16"), TopK(0.05, values="sign")], ids=str
)
@pytest.mark.parametrize("content", ["normal", "ties", "not finite"])
def test_threads_make_no_difference(codec, content, instruction_set, use_threads):
    sizes = [70000, 1, 33, 200000]
    layout = pack(sizes, codec.block, 1)
    gradients = make(content, sizes, torch.float32)
    error = spread(layout, make("normal", sizes, torch.float32, seed=1))
    results = []
    for threads in (1, 2, 3):
        use_threads(threads)
        assert cpu._threads(layout) == threads
        results.append(passes(codec, layout, gradients, error, torch.float32))
    for other in results[1:]:
        for name, values in results[0].items():
            assert_same_bits(other[name], values, f"{name}:")


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 4095, 4096, 4097, 10000])
def test_all_within(numel, instruction_set):
    values = torch.rand(numel, generator=generator(0)) * 3e38
    assert cpu.all_within(values) and reference.all_within(values)
    for at in {0, numel // 2, numel - 1} if numel else ():
        for odd in (torch.nan, torch.inf, -torch.inf):
            spoiled = values.clone()
            spoiled[at] = odd
            assert not cpu.all_within(spoiled) and not reference.all_within(spoiled)


# ---- random numbers

KNOWN_ANSWERS = [  # key, counter and words of Philox4x32-10 in Random123's kat_vectors
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_random_words_are_those_published(key, counter, words, instruction_set):
    (low, high), counter, words = ([int(word, 16) for word in text.split()] for text in (key, counter, words))
    seed, (row, *others) = high << 32 | low, counter
    assert reference.random_words(seed, torch.tensor([counter])).tolist() == [words]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for lane in (0, 3, 7):  # of eight rows that are drawn at once
        rows = np.reshape(_cpu.uniforms_of_rows(seed, *others, row - lane & 0xFFFFFFFF, 8), (8, 8))
        assert (rows[lane] * 65536).tolist() == halves
    assert (np.array(_cpu.uniforms_of_rows(seed, *others, row, 1)) * 65536).tolist() == halves


def test_uniforms(instruction_set):
    state, rows = FeedbackState(step=7, bucket=2, sender=5), 10_003
    for first in (0, 12345, (1 << 32) - 100):  # the row's lowest 32 bits count
        positions = torch.arange(8 * first, 8 * (first + rows))
        expected = reference.uniforms(1 << 40 | 3, state, positions)
        assert_same_bits(torch.tensor(_cpu.uniforms_of_rows(1 << 40 | 3, 7, 2, 5, first, rows)), expected)
        assert expected.min() >= 0.0 and expected.max() < 1.0
        assert abs(expected.mean() - 0.5) < 0.005 and abs(expected.var() - 1 / 12) < 0.002
        assert abs(torch.stack([expected[:-1], expected[1:]]).corrcoef()[0, 1]) < 0.02


def test_other_counters_draw_others():
    positions = torch.arange(1000)
    drawn = [
        reference.uniforms(0, state, positions)
        for state in (FeedbackState(), FeedbackState(step=1), FeedbackState(bucket=1), FeedbackState(sender=1))
    ]
    drawn += [reference.uniforms(seed, FeedbackState(), positions) for seed in (1, 1 << 32)]
    for first, second in itertools.combinations(drawn, 2):
        assert (first == second).sum() < 5


# ---- against what is neither of the two


@pytest.mark.parametrize("numel", [1, 9, 2049, MILLION])
@pytest.mark.parametrize("codec", [TopK(0.01), TopK(0.3), TopK(k=3), TopK(1.0)], ids=str)
def test_top_k_is_that_of_torch(codec, numel, instruction_set):
    g = generator(0)
    v = (torch.randperm(numel, generator=g) + 1.0) * (torch.randint(0, 2, (numel,), generator=g) * 2 - 1)  # no ties
    layout = pack([numel], codec.block, 1)
    error, decoded = torch.zeros(layout.numel), torch.empty(numel)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [v], FeedbackState(error), payload)
    codec.decode(layout, payload, [decoded])
    k = min(numel, codec.k or int(np.ceil(codec.ratio * numel)))
    chosen = v.abs().topk(k).indices
    expected = torch.zeros(numel)
    expected[chosen] = v[chosen]
    assert torch.equal(decoded, expected)
    assert torch.equal(error[:numel], v - expected)


@pytest.mark.parametrize("numel", [1, 9, 2049, 65537])
@pytest.mark.parametrize("codec", ONE_BIT, ids=str)
def test_one_bit_is_that_of_numpy(codec, numel, instruction_set):
    v = torch.randn(numel, generator=generator(0))
    layout = pack([numel], codec.block, 1)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [v], FeedbackState(), payload)
    signs = np.packbits(np.signbit(v.numpy()), bitorder="little")
    scales = layout.numel // codec.block if codec.granularity == "block" else 1
    at = -(-4 * scales // 16) * 16
    written = payload[0].numpy()
    assert np.array_equal(written[at : at + len(signs)], signs)
    assert not written[at + len(signs) :].any()
    length = codec.block if codec.granularity == "block" else numel
    regions = [region.double() for region in v.split(length)]
    means = [float(r.abs().mean() if codec.scale == "l1" else r.square().mean().sqrt()) for r in regions]
    assert written[: 4 * scales].view(np.float32) == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize("codec", [q for q in QUANTIZE if q.rounding == "nearest"], ids=str)
def test_levels_are_the_nearest(codec, instruction_set):
    v = torch.randn(5000, generator=generator(0))
    levels = 2 ** (codec.bits - 1) - 1 if isinstance(codec, Quantize) else 1
    values = codec.decompress(codec.compress(v), len(v))
    for block, sent in zip(v.split(codec.block), values.split(codec.block), strict=True):
        step = block.abs().max() / levels
        torch.testing.assert_close(sent, (block / step).round() * step)
        assert (block - sent).abs().max() <= step / 2 * 1.0001


@pytest.mark.parametrize("codec", [q for q in QUANTIZE if q.rounding == "stochastic"], ids=str)
def test_stochastic_levels_are_right_on_average(codec, instruction_set):
    """Every draw is one of the two levels around a value, and the mean of many comes near it."""
    layout, draws = pack([512], codec.block, 1), 4000
    v = torch.randn(512, generator=generator(0))
    levels = 2 ** (codec.bits - 1) - 1 if isinstance(codec, Quantize) else 1
    scales = [b.norm() if codec.scale == "l2" else b.abs().max() for b in v.split(codec.block)]
    step = torch.cat([(s / levels).expand(len(b)) for s, b in zip(scales, v.split(codec.block), strict=True)])
    total, decoded = torch.zeros(512, dtype=torch.float64), torch.empty(512)
    for draw in range(draws):
        payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
        codec.encode(layout, [v], FeedbackState(step=draw, sender=2 * (draw % 3)), payload)
        codec.decode(layout, payload, [decoded])
        assert ((decoded - v).abs() <= step * 1.0001).all()
        total += decoded
    deviation = (total / draws - v).abs() / (step / 2 / draws**0.5)  # a draw is off by half a step at most, on average
    assert deviation.max() < 5 and deviation.mean() < 1


@pytest.mark.parametrize("values", VALUES)
def test_more_values_that_are_not_finite_than_can_be_sent(values, instruction_set):
    """The whole shard becomes NaN, the errors of such values stay, and finite values wait in the error."""
    codec, layout = TopK(k=3, values=values), pack([100, 70], 32, 2)
    gradients = [torch.ones(100), torch.ones(70)]
    gradients[0][10:14] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    results = []
    for context in (contextlib.nullcontext(), oracle()):
        error = torch.arange(float(layout.numel))
        payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
        with context:
            codec.encode(layout, gradients, FeedbackState(error), payload)
        decoded = [torch.zeros(100), torch.zeros(70)]
        with context:
            codec.decode(layout, payload, decoded)
        assert not codec.is_within(layout, payload)
        results.append((payload, error, *decoded))
    for native, expected in zip(*results, strict=True):
        assert_same_bits(native, expected)
    _, error, first, second = results[0]
    assert first[: layout.shard_numel].isnan().all()
    assert (second != 0).sum() + (first[layout.shard_numel :] != 0).sum() == 3
    assert torch.equal(error[10:14], torch.arange(10.0, 14.0))
    assert torch.equal(error[:10], torch.arange(1.0, 11.0))


@pytest.mark.parametrize("numel", [1, 9, 2049, 65537])
@pytest.mark.parametrize("codec, dtype", [(Cast("fp16"), torch.float16), (Cast("bf16"), torch.bfloat16)], ids=str)
def test_cast_is_that_of_torch(codec, dtype, numel, instruction_set):
    v = torch.randn(numel, generator=generator(0)) ** 5
    v[0], v[-1] = -3e38, 3.4e38  # beyond fp16; the latter rounds up to infinity as bf16 too
    layout = pack([numel], codec.block, 1)
    error, decoded = torch.zeros(layout.numel), torch.empty(numel)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [v], FeedbackState(error), payload)
    codec.decode(layout, payload, [decoded])
    largest = torch.finfo(dtype).max
    assert torch.equal(decoded, v.to(dtype).float().clamp(-largest, largest))
    assert torch.equal(error[:numel], v - decoded)
    assert codec.is_within(layout, payload)
    assert codec.is_within(layout, payload, 2.0**50) == (dtype == torch.float16)


def test_what_is_not_finite_is_cast_to_nan(instruction_set):
    v = torch.randn(100, generator=generator(0))
    v[7], v[40], v[99] = torch.nan, torch.inf, -torch.inf
    for codec, nan in ((Cast("fp16"), 0x7E00), (Cast("bf16"), 0x7FC0), (NoCompression(), 0x7FC00000)):
        layout = pack([100], codec.block, 1)
        error = torch.full((layout.numel,), 0.25)
        payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
        codec.encode(layout, [v], FeedbackState(error), payload)
        sent_as_nan = payload.view(torch.int16 if nan < 2**16 else torch.int32)[0, :100] == nan
        assert torch.equal(sent_as_nan, ~v.isfinite()) and not codec.is_within(layout, payload)
        assert (error[:100] == 0.25).nonzero().view(-1).tolist() == [7, 40, 99]


@pytest.mark.parametrize("codec", [Cast("fp16"), Cast("bf16"), NoCompression()], ids=str)
def test_cast_keeps_a_velocity(codec, instruction_set):
    layout = pack([5, 700], 32, 2)
    gradients = make("not finite", [5, 700], torch.float32)
    results = []
    for context in (oracle(), contextlib.nullcontext()):
        error, velocity = (spread(layout, make("normal", [5, 700], torch.float32, seed)) for seed in (1, 2))
        payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
        with context:
            codec.encode(layout, gradients, FeedbackState(error, velocity, momentum=0.9), payload)
        results.append((payload, error, velocity))
    for own, other in zip(*results, strict=True):
        assert_same_bits(own, other)
    finite = gradients[1].isfinite()
    expected = 0.9 * make("normal", [5, 700], torch.float32, 2)[1] + gradients[1]
    assert torch.equal(results[0][2][32:732][finite], expected[finite])


def drawn(codec, numel, **state):
    layout = pack([numel], codec.block, 1)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [torch.ones(numel)], FeedbackState(**state), payload)
    decoded = torch.empty(numel)
    codec.decode(layout, payload, [decoded])
    return decoded.nonzero().view(-1)


def test_random_k_draws_one_position_of_each_stratum(instruction_set):
    for numel, k in ((3200, 7), (3200, 32), (3200, 3199), (3200, 3200), (70016, 101)):
        positions = drawn(RandomK(k / numel), numel, step=3)
        starts = torch.arange(k + 1) * numel // k
        assert torch.equal(torch.searchsorted(starts, positions, right=True), torch.arange(1, k + 1))


def test_random_k_draws_alike_on_all_ranks_and_anew_in_each_step():
    q = RandomK(0.01)
    first = drawn(q, 32000, sender=0)
    assert torch.equal(first, drawn(q, 32000, sender=7))
    for other in ({"step": 1}, {"bucket": 1}, {"first_shard": 1}):
        assert (first == drawn(q, 32000, **other)).sum() < 20
    assert (first == drawn(RandomK(0.01, seed=1), 32000)).sum() < 20


def test_random_k_draws_every_element_as_often():
    times = torch.zeros(64)
    for step in range(3200):
        times[drawn(RandomK(1 / 16), 64, step=step)] += 1
    assert times.sum() == 3200 * 4
    assert ((times - 200).square() / 200).sum() < 150  # of 60 degrees of freedom: 60 +- 11
