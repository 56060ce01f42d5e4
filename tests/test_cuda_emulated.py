"""The CUDA kernels' sources, emulated, equal the CPU kernels bit for bit: see tests/cuda/emulator.py."""

import itertools
from unittest import mock

import pytest
import torch
from emulator import SCHEDULES, EmulatedDevice
from support import assert_same_bits, generator, spread

from ds_horovod import Cast, kernels
from ds_horovod.kernels import cuda, launch
from ds_horovod.layout import pack
from ds_horovod.memory import Memory


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODECS = [Cast("fp16"), Cast("bf16")]
SIZES = [[1], [31], [33], [5, 100, 3000], [7000, 1, 33, 2048]]


@pytest.fixture
def emulated():
    """Inside, compressors run on emulated kernels."""
    device = EmulatedDevice()
    with mock.patch.object(launch, "device_of", return_value=device):
        yield device


def on(device):
    return mock.patch.object(kernels, "for_device", return_value=cuda)


def passes(codec, layout, gradients, error, dtype):
    memory = Memory(None if error is None else error.clone(), decay=0.9, step=5, bucket=2, sender=3, first_shard=1)
    payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, gradients, memory, payload)
    decoded = [torch.full((numel,), 7, dtype=dtype) for numel in layout.numels]
    codec.decode(layout, payload, decoded)
    totals = torch.randn(layout.shards, layout.shard_numel, generator=generator(1))
    for shard, total in enumerate(totals):
        codec.accumulate(layout.shard(shard), payload[shard], 0.3, total)
    results = {"payload": payload, "decoded": torch.cat(decoded), "totals": totals}
    return results if error is None else {**results, "error": memory.error}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_passes(codec, sizes, schedule, emulated):
    emulated.schedule = SCHEDULES[schedule]
    for dtype, shards in itertools.product(DTYPES, (1, 3)):
        layout = pack(sizes, codec.block, shards)
        g = generator(0)
        gradients = [torch.randn(n, generator=g).to(dtype) for n in sizes]
        error = spread(layout, [torch.randn(n, generator=g) for n in sizes])
        expected = passes(codec, layout, gradients, error, dtype)
        with on(emulated):
            actual = passes(codec, layout, gradients, error, dtype)
        for name, values in expected.items():
            assert_same_bits(actual[name], values, f"{name} ({dtype}, {shards} shards)")
