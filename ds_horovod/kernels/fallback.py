"""Parts of passes in plain torch: for compressors without kernels, and for what is too rare to need one on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout, Piece

_ROW = 32  # elements whose bits share a word
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_HALF = torch.finfo(torch.float16).max


def put(gradients: Sequence[Tensor], piece: Piece, values: Tensor) -> None:
    """Writes float32 values where a piece lies, rounded to the gradients' dtype. Finite values stay finite in float16."""
    target = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
    if target.dtype == torch.float16:
        values = torch.where(values.isfinite(), values.clamp(-_LARGEST_HALF, _LARGEST_HALF), values)
    target.copy_(values)


def decoded(layout: Layout, chunks: Tensor, decode: Callable[[Tensor, Sequence[Tensor]], None]) -> list[Tensor]:
    """The values of some chunks in new float32 tensors, by ``decode(chunks, tensors)``."""
    values = [torch.empty(numel, dtype=torch.float32, device=chunks.device) for numel in layout.numels]
    decode(chunks, values)
    return values


def replace_where_finite(layout: Layout, replied: Sequence[Tensor], rest: Tensor, error: Tensor) -> None:
    """error = rest, where both the reply and the rest are finite."""
    for offset, values in zip(layout.offsets, replied, strict=True):
        here = slice(offset, offset + len(values))
        error[here] = torch.where(values.isfinite() & rest[here].isfinite(), rest[here], error[here])


def nonfinite_mask(layout: Layout, values: Sequence[Tensor]) -> Tensor:
    """As `Passes.nonfinite_mask`, of values that have been decoded."""
    flat = torch.zeros(layout.numel, dtype=torch.bool, device=values[0].device if values else None)
    for offset, arrived in zip(layout.offsets, values, strict=True):
        flat[offset : offset + len(arrived)] = ~arrived.isfinite()
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int64, device=flat.device)
    return (flat.view(-1, 8) * powers).sum(1).to(torch.uint8).view(torch.int32)


def rollback(
    layout: Layout, sent: Sequence[Tensor], mask: Tensor, gradients: Sequence[Tensor], state: FeedbackState, sparse: bool
) -> None:
    """As `Passes.rollback`, where the payload has been decoded to what was sent.

    What rounding takes past the largest float stays there: an infinite error would never go away.
    """
    assert state.error is not None
    bits = _unpacked(mask)
    for offset, gradient, own in zip(layout.offsets, gradients, sent, strict=True):
        here = slice(offset, offset + len(own))
        g = gradient.view(-1).float()
        where = bits[here] & own.isfinite() & g.isfinite()
        e = state.error[here]
        if state.velocity is None:
            e[where] = (e[where] + own[where] - g[where]).clamp_(-_LARGEST, _LARGEST)
            continue
        u = state.velocity[here]
        cleared = (own != 0) if sparse else torch.zeros_like(where)
        kept = where & ~cleared
        e[kept] = (e[kept] + own[kept] - u[kept]).clamp_(-_LARGEST, _LARGEST)
        u[kept] = ((u[kept] - g[kept]) / state.momentum).clamp_(-_LARGEST, _LARGEST)
        gone = where & cleared
        e[gone] = (e[gone] + own[gone] - g[gone]).clamp_(-_LARGEST, _LARGEST)


def restore_sent(layout: Layout, sent: Sequence[Tensor], mask: Tensor, factors: Sequence[float], error: Tensor) -> None:
    """error += factor * what was sent, where the mask says that it has not arrived."""
    bits = _unpacked(mask)
    for offset, own, factor in zip(layout.offsets, sent, factors, strict=True):
        here = slice(offset, offset + len(own))
        back = torch.where(bits[here] & own.isfinite(), own * factor, 0.0)
        error[here] = (error[here] + back).clamp_(-_LARGEST, _LARGEST)


def _unpacked(mask: Tensor) -> Tensor:
    """A bool for each element of a bucket."""
    return (mask[:, None] >> torch.arange(_ROW, dtype=torch.int32, device=mask.device) & 1).bool().view(-1)
