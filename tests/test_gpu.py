"""On a GPU: the CUDA kernels have the bits of the CPU's. ``python -m pytest -m gpu tests/test_gpu.py``.

Under NVIDIA's checkers, without the largest tests::

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m gpu tests/test_gpu.py -k "sizes or steps"
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest -m gpu tests/test_gpu.py -k "sizes or steps"
"""

import math

import pytest
import torch
from support import assert_same_bits, generator, spread
from test_cuda_emulated import CODECS, DTYPES
from test_kernels import CONTENTS, make

from ds_horovod import Cast, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.in_process import Simulation
from ds_horovod.layout import pack
from ds_horovod.options import Options

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BILLION = 1_000_000_000
BYTES_OF_A_BILLION = 24 * BILLION  # gradients, error, what is decoded, and what they are compared with


def compare(what, run):
    """Runs on the CPU and on the GPU, and compares all results."""
    expected, actual = run(CPU), run(GPU)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert_same_bits(actual[name].cpu(), values, f"{name} ({what})")


def passes(device, codec, layout, gradients, error, dtype, steps=1):
    """Encodes step after step, decodes, adds up two workers, serves, and returns all results."""
    gradients = [g.to(device) for g in gradients]
    state = FeedbackState(None if error is None else error.to(device, copy=True), bucket=2, sender=3, first_shard=1)
    if codec.sparse and error is not None:
        state.velocity, state.momentum = state.error.roll(1) * 0.5, 0.9
    results = {}
    for step in range(steps):
        payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8, device=device)
        state.step = step
        codec.encode(layout, [g * (0.5 if step == 2 else 1) for g in gradients], state, payload)
        results[f"payload {step}"] = payload
    decoded = [torch.full((numel,), 7, dtype=dtype, device=device) for numel in layout.numels]
    codec.decode(layout, payload, decoded)
    total = torch.ones(layout.shard_numel, device=device)
    codec.accumulate(layout.shard(0), payload[:1].repeat(2, 1), 0.3, total)
    server = FeedbackState(torch.ones(layout.shard_numel, device=device), step=steps - 1, bucket=2, sender=5, first_shard=1)
    real = torch.zeros(layout.shard_numel, device=device)
    for piece in layout.pieces[0]:
        real[piece.offset : piece.offset + piece.numel] = 1
    server.error *= real
    reply = torch.zeros(codec.chunk_nbytes(layout), dtype=torch.uint8, device=device)
    codec.serve(layout.shard(0), payload[:1].repeat(3, 1), codec, 1 / 3, server, reply)
    results |= {"decoded": torch.cat(decoded), "total": total, "reply": reply, "server error": server.error}
    return results | {name: x for name in ("error", "velocity") if (x := getattr(state, name)) is not None}


@pytest.mark.parametrize("sizes", [[1], [31], [33], [2049], [7000, 1, 33, 2048], [65537], [70_000, 1, 33, 200_000]], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_sizes(codec, sizes):
    for dtype, shards in zip(DTYPES, (1, 3, 2), strict=True):
        layout = pack(sizes, codec.block, shards)
        gradients, error = make("normal", sizes, dtype), spread(layout, make("normal", sizes, torch.float32, seed=1))
        for e in (error, None):
            compare(f"{dtype}, {shards} shards", lambda device: passes(device, codec, layout, gradients, e, dtype))  # noqa: B023


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_contents(codec, content):
    sizes = [5, 100, 3000]
    for dtype in DTYPES:
        layout = pack(sizes, codec.block, 2)
        gradients, error = make(content, sizes, dtype), spread(layout, make(content, sizes, torch.float32, seed=1))
        compare(f"{dtype}", lambda device: passes(device, codec, layout, gradients, error, dtype))  # noqa: B023


@pytest.mark.parametrize("codec", [TopK(0.01), TopK(0.045, values="sign"), TopK(0.001, values="fp16"), Quantize(4)], ids=str)
def test_steps(codec):
    sizes = [1_000_003, 70_000]
    layout = pack(sizes, codec.block, 2)
    gradients, error = make("heavy tails", sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))
    compare("steps", lambda device: passes(device, codec, layout, gradients, error, torch.float32, steps=4))


@pytest.mark.parametrize("codec", [OneBit(), Quantize(4), TopK(0.01)], ids=str)
def test_a_billion_elements(codec):
    """64-bit indices. On the CPU it takes some seconds, and 16 GB."""
    if torch.cuda.mem_get_info()[0] < BYTES_OF_A_BILLION:
        pytest.skip(f"needs {BYTES_OF_A_BILLION / 1e9:g} GB of GPU memory")
    layout = pack([BILLION], codec.block, 1)
    gradient = torch.randn(BILLION, device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    results = []
    for device in (GPU, CPU):
        here = gradient.to(device)
        state = FeedbackState(torch.zeros(layout.numel, device=device))
        payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8, device=device)
        codec.encode(layout, [here], state, payload)
        error = state.error.cpu()
        del state
        codec.decode(layout, payload, [here])
        results.append((payload.cpu(), error, here.cpu()))
        del here
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("codec", [OneBit(), TopK(0.01), Quantize(4), RandomK(0.1), Cast()], ids=str)
def test_side_streams(codec):
    """Kernels start on the stream that is current, after what it still has to do."""
    sizes = [300_000]
    layout, stream = pack(sizes, codec.block, 2), torch.cuda.Stream()
    gradients, error = make("normal", sizes, torch.float32), spread(layout, make("normal", sizes, torch.float32, seed=1))

    def run(device):
        if device == CPU:
            return passes(device, codec, layout, gradients, error, torch.float32)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            late = [torch.zeros_like(g, device=device) for g in gradients]
            there = [g.to(device) for g in gradients]
            torch.cuda._sleep(50_000_000)  # tens of milliseconds
            for to, g in zip(late, there, strict=True):
                to.copy_(g)
            results = passes(device, codec, layout, late, error, torch.float32)
        stream.synchronize()
        return results

    compare("side stream", run)


@pytest.mark.parametrize(
    "codec", [OneBit(), OneBit(96, granularity="bucket"), TopK(0.01), Quantize(4), Ternary(), RandomK(0.1)], ids=str
)
def test_nothing_waits_for_the_device(codec):
    sizes = [5, 100_000]
    layout = pack(sizes, codec.block, 2)
    gradients = [g.to(GPU) for g in make("normal", sizes, torch.float32)]
    state, server = (
        FeedbackState(torch.zeros(layout.numel, device=GPU)),
        FeedbackState(torch.zeros(layout.shard_numel, device=GPU)),
    )
    payload = torch.zeros(2, codec.chunk_nbytes(layout), dtype=torch.uint8, device=GPU)
    reply = torch.zeros(codec.chunk_nbytes(layout), dtype=torch.uint8, device=GPU)

    def step():
        codec.encode(layout, gradients, state, payload.zero_())
        codec.serve(layout.shard(0), payload[:1].repeat(2, 1), codec, 0.5, server, reply.zero_())
        codec.rollback(layout, payload, codec.nonfinite_mask(layout, payload), gradients, state)
        codec.decode(layout, payload, gradients)

    step()  # which compiles, and copies the layouts
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


PAIRS = [(OneBit(96), OneBit(96)), (Quantize(4), Quantize(4)), (TopK(0.05), TopK(0.05)), (RandomK(0.1), Cast("bf16"))]
PAIRS += [(TopK(0.05, values="sign"), TopK(0.1, values="fp16")), (OneBit(96, granularity="bucket"), Ternary(96))]


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("pusher, server", PAIRS, ids=str)
def test_exchange_of_several_steps(pusher, server, bad):
    sizes, workers = [5, 3000, 70_000], 3
    layout = pack(sizes, math.lcm(pusher.block, server.block), workers)

    def run(device):
        options = Options(pusher, server_compressor=server)
        simulation, results = Simulation(layout, options, workers, device=device), {}
        for step in range(4):
            g = generator(step)
            gradients = [[torch.randn(n, generator=g) for n in sizes] for _ in range(workers)]
            if bad and step == 1:
                gradients[1][1][7] = torch.nan
            there = [[x.to(device) for x in own] for own in gradients]
            simulation.step(there)
            results[f"gradients in step {step}"] = torch.cat(there[0])
        for worker, exchange in enumerate(simulation.exchanges):
            results |= {f"error {worker}": exchange.worker_error, f"server error {worker}": exchange.server_error}
        return results

    compare(f"{pusher}, {server}", run)


@pytest.mark.jobs
def test_two_processes_on_one_gpu():
    """Through Horovod's operations on the CPU."""
    from horovod_jobs import ROOT, horovodrun

    if not pytest.importorskip("horovod.torch").cuda_built():
        pytest.skip("this Horovod was built without CUDA")
    assert horovodrun(2, str(ROOT / "tests" / "workers" / "one_gpu.py")).count("one gpu: ok") == 2
