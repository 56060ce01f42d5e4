"""The emulator says so when a kernel does what CUDA does not allow, and one of its schedules shows what only may go wrong."""

import ctypes

import numpy as np
import pytest
import torch
from emulator import SCHEDULES, EmulatedDevice, EmulatedKernel, EmulationError, compile_shared

SOURCE = """
extern "C" __global__ void some_wait(float* x) {
    if (threadIdx.x < 16) __syncthreads();
}
extern "C" __global__ void two_barriers(float* x) {
    if (threadIdx.x < 32) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void divergent_ballot(float* x) {
    if (threadIdx.x % 2) x[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
}
extern "C" __global__ void other_mask(float* x) {
    __ballot_sync(threadIdx.x ? 0xffffffffu : 1u, 1);
}
extern "C" __global__ void shuffle_meets_ballot(float* x) {
    if (threadIdx.x % 2) __ballot_sync(0xffffffffu, 1);
    else x[0] = __shfl_sync(0xffffffffu, 1.f, 0);
}
extern "C" __global__ void not_in_mask(float* x) { __ballot_sync(1u, 1); }
extern "C" __global__ void warps_hand_on(float* x) {  // without the barrier between writing and reading
    __shared__ float values[64];
    values[threadIdx.x] = 1.f + threadIdx.x;
    x[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}
extern "C" __global__ void shared_is_garbage(float* x) {
    __shared__ float value;
    if (x[0] != 0.f) value = 0.f;
    x[1] = value;
}
extern "C" __global__ void flushes(float* x) { x[1] = x[0] * 0.5f; }
"""


@pytest.fixture(scope="module")
def library():
    return ctypes.CDLL(str(compile_shared(SOURCE)))


def run(library, name, x, threads=64, blocks=(1,), schedule="in turns"):
    kernel = EmulatedKernel(EmulatedDevice(schedule), name, getattr(library, f"emulated_{name}"))
    kernel(blocks, (threads,), (np.uint64(x.data_ptr()),))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "name, message",
    [
        ("some_wait", "deadlock: 16 threads wait at a barrier, 0 in a warp, 48 have ended"),
        ("two_barriers", "barriers of lines .* meet"),
        ("divergent_ballot", "a mask with a lane that is not there|deadlock"),
        ("other_mask", "different masks|not there|deadlock"),
        ("shuffle_meets_ballot", "different operations"),
        ("not_in_mask", "a lane outside of its own mask"),
    ],
)
def test_what_cuda_does_not_allow(library, name, message, schedule):
    with pytest.raises(EmulationError, match=message):
        run(library, name, torch.zeros(64), schedule=schedule)


def test_a_missing_barrier_shows_in_some_schedule(library):
    expected = (torch.arange(64) + 32) % 64 + 1.0
    results = []
    for schedule in SCHEDULES:
        x = torch.zeros(64)
        run(library, "warps_hand_on", x, schedule=schedule)
        results.append(torch.equal(x, expected))
    assert not all(results)


def test_shared_memory_begins_as_garbage(library):
    x = torch.zeros(2)
    run(library, "shared_is_garbage", x, threads=1)
    assert x[1] != 0


def test_denormals_are_zero_only_inside(library):
    x = torch.tensor([torch.finfo(torch.float32).tiny, 1.0])
    run(library, "flushes", x, threads=1)
    assert x[1] == 0 and x[0] * 0.5 > 0


@pytest.mark.parametrize("threads, blocks", [(0, (1,)), (1025, (1,)), (32, (0,)), (32, (1, 65536))])
def test_launch_limits(library, threads, blocks):
    with pytest.raises(EmulationError, match=r"out of range|without blocks|too many blocks"):
        run(library, "flushes", torch.zeros(2), threads, blocks)
