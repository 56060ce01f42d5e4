"""The kernels in plain torch: slow, easy to check by eye, and the oracle that every other kernel equals bit for bit.

Denormals count as zero, before and after each operation, as they do in CuPy's kernels, where that cannot be changed.
Sums are taken in the fixed order that csrc/cpu/one_bit.inl states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Layout, Piece
from .formats import ALL_NOT_FINITE, RUN, OneBitFormat, TopKFormat

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_LARGEST_HALF = torch.finfo(torch.float16).max


def flush(x: Tensor) -> Tensor:
    """Denormals to zeros of the same sign."""
    return torch.where(x.abs() < _SMALLEST_NORMAL, torch.zeros_like(x).copysign(x), x)


def corrected(layout: Layout, shard: int, piece: Piece, gradients: Sequence[Tensor] | None, error: Tensor | None) -> Tensor:
    """v = gradient + error of a piece, float32; either may be missing."""
    if error is not None:
        start = shard * layout.shard_numel + piece.offset
        error = error[start : start + piece.numel]
    if gradients is None:
        assert error is not None
        return error.clone()
    gradient = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel].float()
    return gradient.clone() if error is None else flush(flush(gradient) + flush(error))


# ---- one bit


def one_bit_encode(
    format: OneBitFormat, layout: Layout, gradients: Sequence[Tensor] | None, error: Tensor | None, chunks: Tensor
) -> None:
    """payload = Q[v], error = v - Q[v], where v = gradient + error.

    Parameters
    ----------
    format
        How a chunk is written.
    layout
        Where the gradients lie in the error and in the shards.
    gradients
        One contiguous tensor for each of the layout's, float32, float16 or bfloat16. None: v is the error alone.
    error
        float32, ``(layout.numel,)``, replaced. None: nothing is compensated.
    chunks
        uint8, ``(layout.shards, format.nbytes)``, all zero, receives the payload.
    """
    for shard, pieces in enumerate(layout.pieces):
        chunk = chunks[shard]
        values = [corrected(layout, shard, piece, gradients, error) for piece in pieces]
        sums = [_block_sums(format, v) for v in values]
        scales = _scales(format, pieces, sums)
        for piece, v, scale, slots in zip(pieces, values, scales, _slots(format, pieces), strict=True):
            finite = scale <= torch.finfo(torch.float32).max
            _scale_view(format, chunk)[slots] = torch.where(finite, scale, torch.nan)
            blocks = _blocks(format, v)
            bits = blocks.signbit() & finite[:, None]
            packed = (bits.view(-1, 8) * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])).sum(1).to(torch.uint8)
            at = format.bits_at + piece.offset // 8
            chunk[at : at + len(packed)] = packed
            if error is not None:
                start = shard * layout.shard_numel + piece.offset
                residual = flush(flush(blocks) - scale[:, None].copysign(blocks)).view(-1)[: piece.numel]
                keep = finite[:, None].expand_as(blocks).reshape(-1)[: piece.numel]
                kept = error[start : start + piece.numel]
                kept.copy_(torch.where(keep, residual, kept))


def one_bit_decode(format: OneBitFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for."""
    for shard, pieces in enumerate(layout.pieces):
        for piece, values in zip(pieces, _one_bit_values(format, pieces, chunks[shard]), strict=True):
            gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel] = values


def one_bit_accumulate(format: OneBitFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; total is float32, ``(layout.shard_numel,)``."""
    (pieces,) = layout.pieces
    for piece, values in zip(pieces, _one_bit_values(format, pieces, chunk, weight), strict=True):
        here = total[piece.offset : piece.offset + piece.numel]
        here.copy_(flush(flush(here) + values))


def one_bit_serve(
    format: OneBitFormat, layout: Layout, pushed: Tensor, weight: float, error: Tensor | None, chunk: Tensor
) -> None:
    """The server pass: v = error + weight * sum of the workers' values; chunk = Q[v]; error = v - Q[v]."""
    total = torch.zeros(layout.shard_numel) if error is None else error.clone()
    before = total.clone()
    for worker in pushed:
        one_bit_accumulate(format, layout, worker, weight, total)
    one_bit_encode(format, layout, None, total, chunk.unsqueeze(0))
    if error is not None:
        (pieces,) = layout.pieces
        for piece, slots in zip(pieces, _slots(format, pieces), strict=True):
            sent = _scale_view(format, chunk)[slots].isfinite()
            here = slice(piece.offset, piece.offset + piece.numel)
            keep = sent.repeat_interleave(format.block)[: piece.numel]
            error[here] = torch.where(keep, total[here], before[here])


def _blocks(format: OneBitFormat, values: Tensor) -> Tensor:
    """(blocks, block), padded with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % format.block)).view(-1, format.block)


def _counts(format: OneBitFormat, numel: int) -> Tensor:
    """Elements of each block."""
    counts = torch.full((-(-numel // format.block),), format.block)
    counts[-1] -= -numel % format.block
    return counts


def _block_sums(format: OneBitFormat, values: Tensor) -> Tensor:
    """Sum of |v|, or of v * v, over each block, in the fixed order."""
    blocks = flush(_blocks(format, values))
    terms = flush(blocks * blocks) if format.scale == "l2" else blocks.abs()
    rows = format.block // 32
    terms = torch.nn.functional.pad(terms.view(-1, rows, 32), (0, 0, 0, -rows % 8)).view(len(terms), -1, 8, 32)
    group = torch.zeros_like(terms[:, :, 0])
    for row in range(8):
        group = group + terms[:, :, row]
    total = torch.zeros_like(group[:, 0])
    for g in range(group.shape[1]):
        total = total + group[:, g]
    a, b, c, d = total.view(-1, 4, 8).unbind(1)
    x = ((a + b) + (c + d)).unbind(1)
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


def _scales(format: OneBitFormat, pieces: Sequence[Piece], sums: Sequence[Tensor]) -> list[Tensor]:
    """The scale of each block of each piece."""
    if format.granularity == "block":
        means = [flush(s / _counts(format, piece.numel)) for piece, s in zip(pieces, sums, strict=True)]
        return [m.double().sqrt().float() if format.scale == "l2" else m for m in means]  # torch rounds float roots amiss
    regions = [[i] for i in range(len(pieces))] if format.granularity == "parameter" else [list(range(len(pieces)))]
    result: list[Tensor] = [torch.empty(0)] * len(pieces)
    for region in regions:
        if not region:
            continue
        terms = torch.cat([sums[i] for i in region]).double()
        lanes = torch.zeros(256, dtype=torch.float64)
        for row in torch.nn.functional.pad(terms, (0, -len(terms) % 256)).view(-1, 256):
            lanes = lanes + row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        mean = lanes[0] / sum(pieces[i].numel for i in region)
        scale = flush((mean.sqrt() if format.scale == "l2" else mean).float())
        for i in region:
            result[i] = scale.expand(len(sums[i]))
    return result


def _slots(format: OneBitFormat, pieces: Sequence[Piece]) -> list[Tensor]:
    """For each piece, which scale of the chunk belongs to each of its blocks."""
    result = []
    for i, piece in enumerate(pieces):
        blocks = torch.arange(-(-piece.numel // format.block))
        if format.granularity == "block":
            result.append(blocks + piece.offset // format.block)
        else:
            result.append(torch.full_like(blocks, i if format.granularity == "parameter" else 0))
    return result


def _scale_view(format: OneBitFormat, chunk: Tensor) -> Tensor:
    return chunk[: 4 * format.scales].view(torch.float32)


def _one_bit_values(format: OneBitFormat, pieces: Sequence[Piece], chunk: Tensor, weight: float | None = None) -> list[Tensor]:
    result = []
    for piece, slots in zip(pieces, _slots(format, pieces), strict=True):
        at = format.bits_at + piece.offset // 8
        packed = chunk[at : at + len(slots) * format.block // 8].int()
        negative = (packed[:, None] >> torch.arange(8) & 1).bool().view(-1, format.block)
        scale = _scale_view(format, chunk)[slots]
        if weight is not None:
            scale = flush(scale * torch.tensor(weight))
        values = torch.where(negative, -scale[:, None], scale[:, None])
        result.append(values.reshape(-1)[: piece.numel])
    return result


# ---- top-k


def top_k_encode(
    format: TopKFormat, layout: Layout, gradients: Sequence[Tensor] | None, error: Tensor | None, chunks: Tensor
) -> None:
    """payload = the k largest magnitudes of v in each shard, ties to the lowest index; error = v without them.

    The arguments are those of `one_bit_encode`.
    """
    for shard, pieces in enumerate(layout.pieces):
        if not pieces:
            continue
        v = torch.cat([corrected(layout, shard, piece, gradients, error) for piece in pieces])
        if gradients is not None:  # the error alone is taken as it is
            v = flush(v) if error is not None else flush(v) + 0.0
        positions = torch.cat([torch.arange(piece.offset, piece.offset + piece.numel) for piece in pieces])
        finite = v.isfinite()
        if finite.all():
            magnitude = v.view(torch.int32) & 0x7FFFFFFF
            chosen = magnitude.sort(descending=True, stable=True).indices[: format.k].sort().values
            sent = v[chosen]
        else:
            chosen = (~finite).nonzero().view(-1)
            all_not_finite = len(chosen) > format.k
            sent = torch.full((len(chosen),), torch.nan)
        wire = sent.clamp(-_LARGEST_HALF, _LARGEST_HALF).half() if format.half else sent
        if error is not None:
            residual = v.clone()
            residual[chosen] = flush(flush(sent) - flush(wire.float()))
            kept = error[shard * layout.shard_numel + positions]
            error[shard * layout.shard_numel + positions] = torch.where(finite, residual, kept)
        where = positions[chosen]
        chunk = chunks[shard]
        runs = -(-layout.shard_numel // RUN)
        if not finite.all() and all_not_finite:
            chunk[:4] = 255
            chunk[format.values_at : format.values_at + (2 if format.half else 4)] = wire[:1].view(torch.uint8)
            continue
        chunk[: 4 * runs].view(torch.int32).copy_(torch.bincount(where // RUN, minlength=runs))
        offsets = chunk[format.offsets_at : format.offsets_at + 2 * len(where)].view(torch.int16)
        offsets.copy_(where % RUN)  # wraps: the bits are those of a uint16
        values = chunk[format.values_at : format.values_at + len(where) * (2 if format.half else 4)]
        values.copy_(wire.view(torch.uint8))


def top_k_decode(format: TopKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for, zero where nothing was sent.

    Raises
    ------
    ValueError
        A count or an offset that no encoder writes; then nothing is written.
    """
    dense = torch.zeros(layout.shards, layout.shard_numel)
    for shard, chunk in enumerate(chunks):
        where, values = _top_k_entries(format, layout, shard, chunk)
        dense[shard, where] = values
    for shard, pieces in enumerate(layout.pieces):
        for piece in pieces:
            values = dense[shard, piece.offset : piece.offset + piece.numel]
            gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel] = values


def top_k_accumulate(format: TopKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; raises as `top_k_decode` does."""
    where, values = _top_k_entries(format, layout, 0, chunk)
    total[where] = flush(flush(total[where]) + flush(flush(values) * torch.tensor(weight)))


def _top_k_entries(format: TopKFormat, layout: Layout, shard: int, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the shard and values of a chunk's entries, checked."""
    runs = -(-layout.shard_numel // RUN)
    counts = chunk[: 4 * runs].view(torch.int32).long() & 0xFFFFFFFF
    values = chunk[format.values_at :].view(torch.float16 if format.half else torch.float32).float()
    if runs and counts[0] == ALL_NOT_FINITE and values[0].isnan():
        where = torch.cat([torch.arange(p.offset, p.offset + p.numel) for p in layout.pieces[shard]] or [counts[:0]])
        return where, torch.full((len(where),), torch.nan)
    total = int(counts.sum())
    if total > format.k:
        raise ValueError("corrupted top-k payload: counts exceed k")
    offsets = chunk[format.offsets_at : format.offsets_at + 2 * total].view(torch.int16).long() & 0xFFFF
    where = offsets + RUN * torch.arange(runs).repeat_interleave(counts)
    real = torch.zeros(runs * RUN, dtype=torch.bool)
    for piece in layout.pieces[shard]:
        real[piece.offset : piece.offset + piece.numel] = True
    if (where.diff() <= 0).any() or not real[where].all():
        raise ValueError("corrupted top-k payload: offsets that do not ascend, or point into padding")
    return where, values[:total]


def all_within(values: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    """Whether all float32 values are at most `limit` in magnitude; NaN is not."""
    return bool((values.abs() <= limit).all())
