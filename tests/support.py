"""What several test files share: compressors to go through, and ways to look at a bucket."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_horovod import Cast, Compressor, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.layout import Layout


class Int8(Compressor):
    """What a user may write: the largest magnitude, and 255 levels."""

    def payload_nbytes(self, numel):
        return 4 + numel

    def compress(self, values):
        scale = values.abs().max().clamp_min(1e-30) / 127
        levels = (values / scale).round().to(torch.int8)
        return torch.cat([scale.view(1).view(torch.uint8), levels.view(torch.uint8)])

    def decompress(self, payload, numel):
        return payload[:4].view(torch.float32) * payload[4:].view(torch.int8)


COMPRESSORS: list[Compressor] = [
    *(OneBit(64, scale, granularity) for scale in ("l1", "l2") for granularity in ("block", "parameter", "bucket")),
    TopK(0.05),
    TopK(0.05, values="fp16"),
    TopK(0.05, values="sign"),
    TopK(k=3),
    Ternary(64),
    Ternary(96, rounding="stochastic"),
    Quantize(3, 32, rounding="stochastic", scale="l2"),
    *(Quantize(bits, 64) for bits in (2, 3, 4, 8)),
    Quantize(4, 32, rounding="stochastic", seed=1 << 40),
    Cast("fp16"),
    Cast("bf16"),
    RandomK(0.1),
    RandomK(0.05, values="fp16"),
    NoCompression(),
    Int8(),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """Tensors in the flat array of a layout, float32, with zeros between them."""
    flat = torch.zeros(layout.numel)
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        flat[offset : offset + tensor.numel()] = tensor.view(-1)
    return flat


def gathered(layout: Layout, flat: Tensor) -> Tensor:
    """The elements of a layout's flat array, without the padding."""
    return torch.cat([flat[offset : offset + numel] for offset, numel in zip(layout.offsets, layout.numels, strict=True)])


def bits(x: Tensor) -> Tensor:
    """As integers, so that zeros of either sign differ; all NaNs alike."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    different = (bits(actual) != bits(expected)).nonzero()
    if len(different):
        first = tuple(different[0].tolist())
        raise AssertionError(f"{what} {len(different)} differ, first at {first}: {actual[first]}, expected {expected[first]}")
