"""Faults that are planted into the CUDA kernels are found by the emulator, or by comparison with the CPU.

What keeps the kernels honest without a GPU is only worth something if it would see them go wrong. Each fault is a change of
the source; should its place be gone, the test says so.
"""

import multiprocessing
from unittest import mock

import pytest
import torch
from emulator import EmulatedDevice, EmulationError
from support import spread
from test_cuda_emulated import compare, passes, served
from test_cuda_top_k import gradients_of, steps
from test_kernels import make

from ds_horovod import Cast, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.kernels import launch
from ds_horovod.layout import pack

pytestmark = pytest.mark.jobs
BARRIER = "__syncthreads();"
BY_COMPARISON, BY_EMULATOR = 10, 11  # exit statuses
FAULTS = {
    "sums of rows: no barrier": ("one_bit", f"[lane_of_thread()] = group;\n        {BARRIER}", "[lane_of_thread()] = group;"),
    "sums of tiles: no barrier": ("one_bit", f"if (tile) {BARRIER}", ""),
    "tree of lanes: no barrier": ("one_bit", f"half /= 2) {{\n        {BARRIER}", "half /= 2) {"),
    "signs: a ballot under divergence": (
        "one_bit", "= __ballot_sync(kAllLanes, finite && bits_of(v[k]) >> 31);",
        "= kRow * k < left ? __ballot_sync(kAllLanes, finite && bits_of(v[k]) >> 31) : 0;",
    ),
    "sum of lanes: half a mask": ("one_bit", "__shfl_xor_sync(kAllLanes, sum, d)", "__shfl_xor_sync(0xffffu, sum, d)"),
    "columns: wrong stride": ("one_bit", "tile + kRow * kRows * warp()", "tile + kRow * warp()"),
    "signs: the residual is not taken": ("one_bit", "= v[k] - with_sign_of(scale, v[k]);", "= v[k];"),
    "mean: the last element is not counted": ("one_bit", "/ float(at.count)", "/ float(at.count - 1)"),
    "largest of a block: no barrier": (
        "quantize", f"scratch.largest[warp_of_thread()] = largest;\n    {BARRIER}",
        "scratch.largest[warp_of_thread()] = largest;",
    ),
    "norm of tiles: no barrier": ("quantize", f"if (from) {BARRIER}", ""),
    "levels: the velocity is not cleared": ("quantize", "zeros >> q & 1 ? values.velocity(i) : 0.f", "values.velocity(i)"),
    "four elements: one too few at the tail": (
        "elements", "count = int(min(place.count, i64(kNumel)));", "count = int(min(place.count - 1, i64(kNumel)));",
    ),
    "tensors: the next begins one later": ("elements", "offset[tensor + 1] <= position", "offset[tensor + 1] < position"),
    "sums of workers: all but the last": (
        "elements", "for (i64 w = 0; w < workers; w++) v = v + sent", "for (i64 w = 0; w + 1 < workers; w++) v = v + sent",
    ),
    "scan: no first barrier": ("top_k", f"totals[warp_of_thread()] = sum;\n    {BARRIER}", "totals[warp_of_thread()] = sum;"),
    "scan: no second barrier": ("top_k", f"    }}\n    {BARRIER}\n    return before;", "    }\n    return before;"),
    "candidates: no barrier before their places are read": ("top_k", f"if (!all) return;\n    {BARRIER}", "if (!all) return;"),
    "candidates: too few are taken for enough": ("top_k", "search.found < need || search.found > work", "search.found > work"),
    "bins: no barrier after they are cleared": ("top_k", f"bins[bin] = 0;\n    {BARRIER}", "bins[bin] = 0;"),
    "bins: no barrier before they are added up": ("top_k", f"    }}\n    {BARRIER}\n    u32* fine", "    }\n    u32* fine"),
    "bins: of the last pass": ("top_k", "work.coarse[shard * kCoarseBins + bin] = 0;", ";"),
    "last block: the one before": ("top_k", "totals[0] + 1 < gridDim.x", "totals[0] + 2 < gridDim.x"),
    "ties: the highest first": (
        "top_k", "bits &= bits - 1, before++)\n            chosen_words[w] |= bits & (0u - bits);",
        "bits &= ~(kSignBit >> __clz(int(bits))), before++)\n            chosen_words[w] |= kSignBit >> __clz(int(bits));",
    ),
    "bitmaps: no barrier after they are cleared": ("top_k", f"equal.clear();\n    {BARRIER}", "equal.clear();"),
    "bitmaps: no barrier before ties are counted": ("top_k", f"{BARRIER}\n    const int first_word", "const int first_word"),
    "ranks: no barrier": ("top_k", f"        }}\n        {BARRIER}\n        return all;", "        }\n        return all;"),
    "entries: no barrier before they are sent": ("top_k", f"{BARRIER}\n\n    u8* chunk = chunks", "u8* chunk = chunks"),
    "entries: the residual is not written": ("top_k", "= values[i] - arrives;", "= values[i];"),
    "entries: the velocity is not cleared": ("top_k", "state.velocity[start + offsets[i]] = 0.f;", ";"),
    "upper bits: as if runs began at words": ("top_k", "bit = skipped + (offsets[i] >> b)", "bit = (offsets[i] >> b)"),
    "not finite: one too many is sent": ("top_k", "search.not_finite > format.k ?", "search.not_finite > format.k + 1 ?"),
    "runs: no barrier before bits are counted": ("top_k", f"{BARRIER}\n        sound = ranks", "sound = ranks"),
}  # fmt: skip


def mutated(fault):
    """What becomes of a family's source."""
    family, old, new = FAULTS[fault]

    def mutate(of, source):
        if of != family:
            return source
        assert source.count(old) == 1, f"{fault}: its place is there {source.count(old)} times, once was expected"
        return source.replace(old, new)

    return mutate


def whole_passes(codec, sizes, shards=2, content="normal"):
    layout = pack(sizes, codec.block, shards)
    gradients, error = make(content, sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))
    compare(f"{codec}", lambda: passes(codec, layout, gradients, error, torch.float32))


def run_one_bit():
    for codec in (OneBit(96), OneBit(2048), OneBit(4096 + 64, "l2"), OneBit(96, "l2", "bucket")):
        whole_passes(codec, [5, 100, 4100])


def run_quantize():
    for codec in (Quantize(4, 2048), Ternary(96), Quantize(8, 2048 + 32, "stochastic", "l2")):
        whole_passes(codec, [5, 100, 3000])


def run_elements():
    for codec in (Cast(), RandomK(0.1)):
        layout = pack([5, 32, 3000], codec.block, 2)
        whole_passes(codec, [5, 32, 3000])
        compare(f"{codec}", lambda: served(codec, codec, layout.shard(0), None, "normal", 0.5))  # noqa: B023


def run_top_k():
    for codec in (TopK(k=2), TopK(k=3), TopK(k=100, values="sign")):
        whole_passes(codec, [3000], 1, content="not finite")
    for codec, sizes in ((TopK(k=100, values="sign"), [3000]), (TopK(0.01, values="fp16"), [66_000, 5, 2100])):
        layout = pack(sizes, codec.block, 1)
        ties = make("ties", sizes, torch.float32)
        compare(f"{codec}, ties", lambda: passes(codec, layout, ties, None, torch.float32))  # noqa: B023
        gradients = [gradients_of(sizes, step, factor) for step, factor in enumerate((1, 1, 1, 1e-3))]
        compare(f"{codec}", lambda: steps(codec, layout, gradients, momentum=True))  # noqa: B023


RUNS = {"one_bit": run_one_bit, "quantize": run_quantize, "elements": run_elements, "top_k": run_top_k}


def attempt(family, mutate):
    """Goes through a family's kernels under several schedules."""
    for schedule in ("greedy", "greedy, backwards", "in turns"):
        with mock.patch.object(launch, "device_of", return_value=EmulatedDevice(schedule, flags=("-O0",), mutate=mutate)):
            RUNS[family]()


def attempt_alone(fault):
    """In a process that may crash; says by its exit status how the fault was found."""
    torch.set_num_threads(1)
    mutate = mutated(fault)
    mutate(FAULTS[fault][0], launch.sources(FAULTS[fault][0]))
    try:
        attempt(FAULTS[fault][0], mutate)
    except EmulationError as error:
        assert "error:" not in str(error), error  # a compiler's
        raise SystemExit(BY_EMULATOR) from error
    except AssertionError as error:
        raise SystemExit(BY_COMPARISON) from error


@pytest.mark.parametrize("family", RUNS)
def test_nothing_is_found_where_nothing_is_wrong(family):
    attempt(family, lambda family, source: source)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ds_horovod"])
    return context


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, processes):
    mutated(fault)(FAULTS[fault][0], launch.sources(FAULTS[fault][0]))
    process = processes.Process(target=attempt_alone, args=(fault,))
    process.start()
    process.join(120)
    if process.is_alive():  # for ever: that is seen too
        process.kill()
        process.join()
    # Negative: killed by a signal, as by memory that is not there.
    found = process.exitcode in (BY_COMPARISON, BY_EMULATOR) or process.exitcode < 0
    assert found, f"{fault} was not found: {process.exitcode}"
