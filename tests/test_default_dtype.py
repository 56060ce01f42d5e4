"""torch.set_default_dtype changes nothing: all that is kept is float32, and every bit is what it would be."""

import pytest
import torch
from support import COMPRESSORS, assert_same_bits, generator

from ds_horovod import DoubleSqueeze, NoCompression
from ds_horovod.in_process import Workers

SHAPES = {"a": (30, 40), "b": (7, 11), "bias": (9,)}


class Scaler:
    def __init__(self):
        self.scale = 64.0

    def get_scale(self):
        return self.scale


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from tensors_in(value)


def run(compressor, dtype, **options):
    """Some steps, one of which is skipped, with other units, a state that is loaded, and a change of compressors."""
    scaler, g = Scaler(), generator(0)
    parameters = [(name, torch.zeros(shape, dtype=dtype, requires_grad=True)) for name, shape in SHAPES.items()]
    workers = Workers(
        lambda: DoubleSqueeze(
            compressor, momentum=0.5 * compressor.sparse, grad_scaler=scaler, lr_aware=True, min_numel=1, bucket_cap_mb=0.003,
            **options,
        ),
        parameters, 2,
    )  # fmt: skip
    result = []
    for step in range(7):
        workers.begin_step(0.1 / (1 + step))
        gradients = [
            [(torch.randn(shape, generator=g, dtype=torch.float32) * scaler.scale).to(dtype) for shape in SHAPES.values()]
            for _ in range(2)
        ]
        if step == 3:
            gradients[1][0][3, 4] = torch.inf
        result += workers.exchange(gradients)
        if step == 3:
            scaler.scale /= 2
        states = [squeeze.state_dict() for squeeze in workers.squeezes]
        kept = list(tensors_in(states))
        assert all(tensor.dtype == torch.float32 for tensor in kept)
        result += [tensor.clone() for tensor in kept]
        if step == 4:
            full = workers.squeezes[0].full_state_dict()
            result += list(tensors_in(full))
            for squeeze in workers.squeezes:
                squeeze.load_state_dict(full)
        if step == 5:
            for squeeze in workers.squeezes:
                squeeze.load_state_dict(squeeze.state_dict())
                squeeze.change_compressor(compressor, NoCompression())
    return result


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_nothing_depends_on_the_default_dtype(compressor, default, default_dtype):
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"max_norm": 5.0, "warmup_steps": 1})):
        expected = run(compressor, dtype, **options)
        default_dtype(default)
        actual = run(compressor, dtype, **options)
        default_dtype(torch.float32)
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(one, other, f"{dtype}, tensor {i}")
