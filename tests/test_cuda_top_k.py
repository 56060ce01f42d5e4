"""Top-k on emulated CUDA kernels: thresholds guessed from the last step, rightly and wrongly, over several runs."""

import itertools

import pytest
import torch
from emulator import SCHEDULES
from support import assert_same_bits, generator, spread
from test_cuda_emulated import arrays_of, compare, emulated, on_cuda, passes  # noqa: F401
from test_kernels import CONTENTS, make

from ds_horovod import TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.layout import pack

VALUES = ("fp32", "fp16", "sign")
NOTHING, CANDIDATES, ALL, NOT_FINITE, EVERY_NOT_FINITE = range(5)  # enum Source in csrc/cuda/top_k.cu
SHARD_WORDS = 9


def sources(state, shards):
    """Among what each shard's last pass has looked for its entries, and how many candidates there were to come."""
    ((words, _),) = (work.arrays for work in state.scratch.values())
    return words[: SHARD_WORDS * shards].view(shards, SHARD_WORDS)[:, 5].tolist()


def steps(codec, layout, values, looked=None, momentum=False):
    """Encodes step after step with one feedback state, and returns all results. `looked` receives the sources."""
    state = FeedbackState(torch.zeros(layout.numel))
    if momentum:
        state.velocity, state.momentum = torch.zeros(layout.numel), 0.5
    results = {}
    for step, gradients in enumerate(values):
        payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
        codec.encode(layout, gradients, state, payload)
        results[f"payload {step}"] = payload
        results |= {f"{name} {step}": x.clone() for name, x in arrays_of(state).items()}
        if looked is not None and state.scratch:
            looked.append(sources(state, layout.shards))
    return results


def gradients_of(sizes, step, factor=1.0):
    g = generator(step)
    return [torch.randn(n, generator=g) * factor for n in sizes]


@pytest.mark.parametrize("numel", [65535, 65536, 65537, 200_001])
@pytest.mark.parametrize("ratio", [0.001, 0.045, 0.25])
def test_runs(ratio, numel, emulated):  # noqa: F811
    for values, shards in zip(VALUES, (1, 2, 4), strict=True):
        codec = TopK(ratio, values=values)
        layout = pack([numel], codec.block, shards)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "sign": torch.bfloat16}[values]
        error = spread(layout, make("normal", [numel], torch.float32, seed=1))
        compare(f"{values}, {shards} shards", lambda: passes(codec, layout, make("normal", [numel], dtype), error, dtype))  # noqa: B023


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("values", VALUES)
def test_steps_of_very_different_magnitude(values, schedule, emulated):  # noqa: F811
    """The guess is right, then far too high, then far too low, and right again."""
    emulated.schedule = SCHEDULES[schedule]
    sizes, looked = [7, 66_000, 3001], []
    codec = TopK(0.02, values=values)
    layout = pack(sizes, codec.block, 2)
    factors = (1, 1, 1, 1e-6, 1e-6, 1e4, 1e4, 1e4)
    values_of = [gradients_of(sizes, step, f) for step, f in enumerate(factors)]
    values_of[3][2][5] = 50.0
    compare(schedule, lambda: steps(codec, layout, values_of, looked, momentum=values == "fp16"))
    assert looked[0] == [ALL] * 2 and [CANDIDATES] * 2 in looked[1:3] and ALL in looked[5] and [CANDIDATES] * 2 in looked[6:]


@pytest.mark.parametrize("values", VALUES)
def test_a_guess_that_was_too_high(values, emulated):  # noqa: F811
    codec, sizes, looked = TopK(0.02, values=values), [20_000], []
    layout = pack(sizes, codec.block, 1)
    expected = lambda: [gradients_of(sizes, 0), gradients_of(sizes, 1, 0.3), gradients_of(sizes, 2, 0.3)]  # noqa: E731

    def run():
        results = {}
        state = FeedbackState()
        for step, gradients in enumerate(expected()):
            payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
            codec.encode(layout, gradients, state, payload)  # without an error, so that nothing is left to be a candidate
            results[f"payload {step}"] = payload
            if state.scratch:
                looked.append(sources(state, 1))
        return results

    compare("no error", run)
    assert looked == [[ALL], [ALL], [CANDIDATES]]


def test_a_threshold_octaves_over_the_guess(emulated):  # noqa: F811
    """Candidates that fit, the k-th of which is in none of the bins that the dense pass has counted."""
    codec, sizes, looked = TopK(k=200), [20_000], []
    layout = pack(sizes, codec.block, 1)
    gradients = [gradients_of(sizes, step) for step in range(3)]
    gradients[2] = [g.clone() for g in gradients[1]]
    gradients[2][0][100:9000:30] *= 1e6
    compare("octaves", lambda: steps(codec, layout, gradients, looked))
    assert looked == [[ALL], [CANDIDATES], [CANDIDATES]]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("values", VALUES)
def test_contents_after_a_step(values, content, emulated):  # noqa: F811
    """Whatever comes when there is a guess, and what comes after it."""
    sizes, codec = [5, 100, 12_000], TopK(0.03, values=values)
    layout = pack(sizes, codec.block, 3)
    normal = [gradients_of(sizes, step) for step in range(3)]
    gradients = [normal[0], normal[1], make(content, sizes, torch.float32), normal[2]]
    compare(content, lambda: steps(codec, layout, gradients, momentum=True))


def adversarial(name, numel):
    x = torch.arange(numel, dtype=torch.float32) + 1
    return {
        "ascending": x,
        "descending": -x.flip(0),
        "one run holds everything": torch.where(x < 4000, x, 0),
        "the last element": torch.where(x == numel, 1.0, 0.0),
        "two magnitudes": torch.where(x.int() % 3 == 0, 1.0, -2.0),
    }[name]


@pytest.mark.parametrize("name", ["ascending", "descending", "one run holds everything", "the last element", "two magnitudes"])
def test_adversarial_values(name, emulated):  # noqa: F811
    numel = 140_000
    for values, shards in (("fp32", 1), ("sign", 3)):
        codec = TopK(0.02, values=values)
        layout = pack([numel], codec.block, shards)
        g = [adversarial(name, numel)]
        compare(f"{name}, {values}", lambda: steps(codec, layout, [g, g, [2.5 * g[0]]]))  # noqa: B023


@pytest.mark.parametrize("k", [3, 4, 5])
def test_as_many_not_finite_as_may_be_sent(k, emulated):  # noqa: F811
    """One more, and the whole shard is NaN."""
    sizes, looked, codec = [7000], [], TopK(k=4, values="sign")
    layout = pack(sizes, codec.block, 1)
    gradients = [gradients_of(sizes, step) for step in range(3)]
    gradients[1][0][torch.arange(k) * 1500 + 3] = torch.inf
    compare(str(k), lambda: steps(codec, layout, gradients, looked, momentum=True))
    assert looked[1] == [NOT_FINITE if k <= 4 else EVERY_NOT_FINITE] and looked[2] == [CANDIDATES]


def test_several_workers_are_added_in_order(emulated):  # noqa: F811
    """In one launch, with the sums that one after the other has."""
    codec, layout = TopK(0.3), pack([70_000], 32, 1)
    pushed = torch.zeros(4, 1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    for worker, payload in enumerate(pushed):
        codec.encode(layout, make("heavy tails", [70_000], torch.float32, seed=worker), FeedbackState(), payload)
    expected, actual = torch.ones(2, layout.numel)
    codec.accumulate(layout, pushed[:, 0], 1 / 3, expected)
    with on_cuda():
        codec.accumulate(layout, pushed[:, 0], 1 / 3, actual)
    assert_same_bits(actual, expected)
    assert emulated.launches == ["top_k_accumulate"]


def test_launches(emulated):  # noqa: F811
    """Two of the six of an encoder return at once where the guess was right."""
    codec, layout = TopK(0.05), pack([5, 100, 3000], 32, 2)
    payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
    gradients = make("normal", layout.numels, torch.float32)
    with on_cuda():
        codec.encode(layout, gradients, FeedbackState(), payload)
        codec.decode(layout, payload, gradients)
    names = ["gather", *["narrow"] * 3, "place", "emit", "decode"]
    assert emulated.launches == [f"top_k_{name}" for name in names]


@pytest.mark.parametrize("values", VALUES)
def test_corrupt_chunks_are_nan(values, emulated):  # noqa: F811
    """Counts that do not add up make all of a shard NaN, entries that are not those of a run the run; the others arrive."""
    codec, layout = TopK(0.01, values=values), pack([140_000], 32, 2)
    payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8)
    gradients = make("normal", layout.numels, torch.float32)
    codec.encode(layout, gradients, FeedbackState(), payload)
    good = [torch.empty(140_000)]
    codec.decode(layout, payload, good)
    counts = payload[:, :8].view(torch.int32).clone()

    def decoded(at, change):
        bad, into = payload.clone(), [torch.zeros(140_000)]
        bad[0, at : at + len(change)] = change
        with on_cuda():
            codec.decode(layout, bad, into)
            mask = codec.nonfinite_mask(layout, bad)
        assert torch.equal((mask[:, None] >> torch.arange(32) & 1).view(-1)[:140_000].bool(), ~into[0].isfinite())
        assert_same_bits(into[0][70_016:], good[0][70_016:])  # the other shard
        return into[0][:70_016]

    too_many = counts[0] + torch.tensor([1, 0], dtype=torch.int32)
    for change in (too_many, torch.tensor([-1, 5], dtype=torch.int32), torch.tensor([2**31 - 1, 7], dtype=torch.int32)):
        assert decoded(0, change.view(torch.uint8)).isnan().all()
    one_bit_less = payload[0, codec.format(layout).upper_at :][:1] & (payload[0, codec.format(layout).upper_at :][:1] - 1)
    assert one_bit_less != payload[0, codec.format(layout).upper_at]
    run = decoded(codec.format(layout).upper_at, one_bit_less)
    assert run[:65536].isnan().all()
    assert_same_bits(run[65536:], good[0][65536:70_016])


def test_ties_go_to_the_lowest_index_across_runs(emulated):  # noqa: F811
    codec, layout = TopK(k=70_000), pack([200_000], 32, 1)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    with on_cuda():
        codec.encode(layout, [torch.full((200_000,), 2.0)], FeedbackState(), payload)
    assert payload[0, :16].view(torch.int32).tolist() == [65536, 70_000 - 65536, 0, 0]


def test_a_feedback_state_may_change_codec_and_layout(emulated):  # noqa: F811
    """What is guessed for one says nothing of another."""

    def run():
        state, results = FeedbackState(torch.zeros(6016)), {}
        for i, (sizes, k) in enumerate(itertools.product(([6000], [3000, 2950]), (20, 40, 20))):
            codec, layout = TopK(k=k), pack(sizes, 32, 1)
            state.error = torch.zeros(layout.numel)
            payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
            codec.encode(layout, make("normal", sizes, torch.float32, seed=i), state, payload)
            results |= {f"payload {i}": payload, f"error {i}": state.error}
        return results

    compare("changes", run)
