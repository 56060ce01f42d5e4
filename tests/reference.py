"""The kernels in plain torch: slow, easy to check by eye, and the oracle that every other kernel equals bit for bit.

A backend like those of `ds_horovod.kernels`, whose contract explains the passes.

Denormals count as zero, before and after each operation, as they do in CuPy's kernels, where that cannot be changed.
Sums are taken in the fixed order that csrc/cpu/one_bit.inl states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ds_horovod.feedback import FeedbackState
from ds_horovod.kernels.formats import (
    ALL_NOT_FINITE,
    ENTRIES,
    RANDOM_K_HEADER,
    RUN,
    CastFormat,
    OneBitFormat,
    QuantizeFormat,
    RandomKFormat,
    TopKFormat,
)
from ds_horovod.layout import Layout, Piece

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_HALF = torch.finfo(torch.float16).max
_LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
_NAN_BFLOAT16 = torch.tensor(0x7FC0, dtype=torch.int16).view(torch.bfloat16)


def flush(x: Tensor) -> Tensor:
    """Denormals to zeros of the same sign."""
    return torch.where(x.abs() < _SMALLEST_NORMAL, torch.zeros_like(x).copysign(x), x)


def corrected(
    layout: Layout, shard: int, piece: Piece, gradients: Sequence[Tensor] | None, state: FeedbackState
) -> tuple[Tensor, Tensor | None]:
    """v = error + velocity of a piece, float32, and the velocity, None and the gradient where there is no momentum.

    Gradients or the error may be missing. The state is not changed.
    """
    error = of_piece(layout, shard, piece, state.error)
    if gradients is None:
        assert error is not None
        return error.clone(), None
    gradient = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel].float()
    velocity = of_piece(layout, shard, piece, state.velocity)
    if velocity is not None:
        gradient = velocity = flush(flush(flush(velocity) * torch.tensor(state.momentum)) + flush(gradient))
    if error is None:
        return gradient.clone(), velocity
    return flush(flush(gradient) + flush(error)), velocity


def of_piece(layout: Layout, shard: int, piece: Piece, flat: Tensor | None) -> Tensor | None:
    """The part of a bucket's flat array that belongs to a piece."""
    return None if flat is None else flat[shard * layout.shard_numel + piece.offset :][: piece.numel]


def put(gradients: Sequence[Tensor], piece: Piece, values: Tensor) -> None:
    """Writes float32 values where a piece lies, rounded to the gradients' dtype; in float16 what is finite stays so."""
    target = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
    if target.dtype == torch.float16:
        values = torch.where(values.isfinite(), values.clamp(-_LARGEST_HALF, _LARGEST_HALF), values)
    target.copy_(values)


# ---- random numbers


def random_words(seed: int, counters: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four random words for each counter of four.

    Parameters
    ----------
    seed
        The key, 64 bits.
    counters
        int64 ``(n, 4)``, each of 32 bits.

    Returns
    -------
    Tensor
        int64 ``(n, 4)``, each of 32 bits.
    """
    mask = 0xFFFFFFFF
    x0, x1, x2, x3 = counters.numpy().astype(np.uint64).T & mask  # of which torch could not hold the products
    low_key, high_key = seed & mask, seed >> 32
    for _ in range(10):
        product0, product2 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1 = product2 >> 32 ^ x1 ^ low_key, product2 & mask
        x2, x3 = product0 >> 32 ^ x3 ^ high_key, product0 & mask
        low_key, high_key = low_key + 0x9E3779B9 & mask, high_key + 0xBB67AE85 & mask
    return torch.from_numpy(np.stack([x0, x1, x2, x3], 1).astype(np.int64))


def uniforms(seed: int, state: FeedbackState, positions: Tensor) -> Tensor:
    """A number of 16 bits over 2**16, in [0, 1), for the elements at some positions of what a pass encodes.

    Eight elements draw from one counter, each half a word, low half first: row ``position // 8``, step, bucket, sender.
    """
    rows = torch.arange(int(positions.min()) >> 3, (int(positions.max()) >> 3) + 1)
    counters = torch.stack([rows, *(torch.full_like(rows, x) for x in (state.step, state.bucket, state.sender))], 1)
    word = random_words(seed, counters)[(positions >> 3) - rows[0], positions >> 1 & 3]
    return (word >> 16 * (positions & 1) & 0xFFFF).float() / 65536


# ---- one bit


def one_bit_encode(
    format: OneBitFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
) -> None:
    """payload = Q[v], error = v - Q[v], where v = gradient + error. There is no velocity.

    Parameters
    ----------
    format
        How a chunk is written.
    layout
        Where the gradients lie in the error and in the shards.
    gradients
        One contiguous tensor for each of the layout's, float32, float16 or bfloat16. None: v is the error alone.
    state
        What is kept, each float32, ``(layout.numel,)``, replaced.
    chunks
        uint8, ``(layout.shards, format.nbytes)``, all zero, receives the payload.
    """
    error = state.error
    for shard, pieces in enumerate(layout.pieces):
        chunk = chunks[shard]
        values = [corrected(layout, shard, piece, gradients, state)[0] for piece in pieces]
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
            put(gradients, piece, values)


def one_bit_accumulate(format: OneBitFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; total is float32, ``(layout.shard_numel,)``."""
    (pieces,) = layout.pieces
    for piece, values in zip(pieces, _one_bit_values(format, pieces, chunk, weight), strict=True):
        here = total[piece.offset : piece.offset + piece.numel]
        here.copy_(flush(flush(here) + values))


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
    return ordered_sums(flush(blocks * blocks) if format.scale == "l2" else blocks.abs())


def ordered_sums(terms: Tensor) -> Tensor:
    """Sums over the rows of a matrix whose width is a multiple of 32, in the fixed order."""
    rows = terms.shape[1] // 32
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


# ---- levels


def widest_step(levels: int) -> float:
    """The widest step of which so many fit a float32."""
    step = torch.tensor(_LARGEST) / levels
    return float(step if (step * levels).isfinite() else torch.nextafter(step, torch.zeros(())))


def quantize_encode(
    format: QuantizeFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
) -> None:
    """payload = each element of v to a level of its block, error = v - Q[v], and zero velocity where it is not zero.

    The arguments are those of `one_bit_encode`.
    """
    for shard, pieces in enumerate(layout.pieces):
        for piece in pieces:
            v, u = corrected(layout, shard, piece, gradients, state)
            blocks = flush(torch.nn.functional.pad(v, (0, -len(v) % format.block)).view(-1, format.block))
            scale = ordered_sums(flush(blocks * blocks)).double().sqrt().float() if format.l2 else blocks.abs().amax(1)
            finite = scale <= torch.finfo(torch.float32).max
            step = flush(scale / format.levels).clamp_max(widest_step(format.levels))
            start = shard * layout.shard_numel + piece.offset
            draw = torch.tensor(0.5)
            if format.stochastic:
                draw = uniforms(format.seed, state, start + torch.arange(blocks.numel())).view(blocks.shape)
            shrink = torch.where(scale > 2.0**100, 2.0**-30, 1.0)
            inverse = (torch.full_like(scale, format.levels) / (scale * shrink)).clamp_max(torch.finfo(torch.float32).max)
            small = flush(blocks.abs() * shrink[:, None])
            level = (flush(small * flush(inverse)[:, None]) + draw).clamp_max(format.levels).trunc()
            level = torch.where(finite[:, None], level, 0.0).copysign(blocks)
            first = piece.offset // format.block
            chunk = chunks[shard]
            chunk[4 * first : 4 * (first + len(blocks))].view(torch.float32).copy_(torch.where(finite, step, torch.nan))
            codes = torch.where(finite[:, None], level + format.levels, 0.0).to(torch.uint8)
            packed = _pack_codes(format, codes)
            at = format.codes_at + first * format.block_nbytes
            chunk[at : at + packed.numel()] = torch.where(finite[:, None], packed, 0).view(-1)
            keep = finite[:, None].expand_as(blocks).reshape(-1)[: piece.numel]
            error, velocity = (of_piece(layout, shard, piece, flat) for flat in (state.error, state.velocity))
            if error is not None:
                residual = flush(blocks - flush(level * step[:, None])).view(-1)[: piece.numel]
                error.copy_(torch.where(keep, residual, error))
            if velocity is not None and u is not None:
                masked = torch.where(level.view(-1)[: piece.numel] == 0, u, 0.0)
                velocity.copy_(torch.where(keep, masked, velocity))


def quantize_decode(format: QuantizeFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for."""
    for shard, pieces in enumerate(layout.pieces):
        for piece in pieces:
            values = _quantized_values(format, piece, chunks[shard])
            put(gradients, piece, values)


def quantize_accumulate(format: QuantizeFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; total is float32, ``(layout.shard_numel,)``."""
    (pieces,) = layout.pieces
    for piece in pieces:
        here = total[piece.offset : piece.offset + piece.numel]
        here.copy_(flush(flush(here) + _quantized_values(format, piece, chunk, weight)))


def _quantized_values(format: QuantizeFormat, piece: Piece, chunk: Tensor, weight: float | None = None) -> Tensor:
    first, blocks = piece.offset // format.block, -(-piece.numel // format.block)
    step = flush(chunk[4 * first : 4 * (first + blocks)].view(torch.float32))
    if weight is not None:
        step = flush(step * torch.tensor(weight))
    at = format.codes_at + first * format.block_nbytes
    codes = _unpack_codes(format, chunk[at : at + blocks * format.block_nbytes].view(blocks, -1))
    return flush((codes.float() - format.levels) * step[:, None]).reshape(-1)[: piece.numel]


def _pack_codes(format: QuantizeFormat, codes: Tensor) -> Tensor:
    """(blocks, block) codes to (blocks, block_nbytes) bytes."""
    if format.bits == 0:
        m = format.block_nbytes
        digits = torch.nn.functional.pad(codes, (0, 5 * m - format.block), value=0).view(-1, 5, m).int()
        return (digits * 3 ** torch.arange(5)[:, None]).sum(1).to(torch.uint8)
    together = 8 if format.bits == 3 else 8 // format.bits
    fields = codes.view(len(codes), together, -1).int()
    word = (fields << format.bits * torch.arange(together)[:, None]).sum(1)
    return torch.cat([word >> shift & 0xFF for shift in range(0, format.bits * together, 8)], 1).to(torch.uint8)


def _unpack_codes(format: QuantizeFormat, packed: Tensor) -> Tensor:
    packed = packed.int()
    if format.bits == 0:
        digits = packed[:, None] // 3 ** torch.arange(5)[:, None] % 3
        return digits.reshape(len(packed), -1)[:, : format.block]
    together = 8 if format.bits == 3 else 8 // format.bits
    parts = packed.view(len(packed), format.bits * together // 8, -1)
    word = (parts << 8 * torch.arange(parts.shape[1])[:, None]).sum(1)
    fields = word[:, None] >> format.bits * torch.arange(together)[:, None] & (1 << format.bits) - 1
    return fields.reshape(len(packed), -1)


# ---- element by element


def cast_encode(
    format: CastFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
) -> None:
    """payload = v to the nearest, error = v - Q[v], element by element. The velocity is kept.

    The arguments are those of `one_bit_encode`.
    """
    nan = torch.tensor({"fp32": 0x7FC00000, "fp16": 0x7E00, "bf16": 0x7FC0}[format.dtype])
    nan = nan.to(torch.int32 if format.dtype == "fp32" else torch.int16)
    for shard, pieces in enumerate(layout.pieces):
        values = _cast_view(format, chunks[shard])
        largest = torch.finfo(values.dtype).max
        for piece in pieces:
            v, u = corrected(layout, shard, piece, gradients, state)
            finite = v.isfinite()
            sent = torch.where(finite, v.clamp(-largest, largest).to(values.dtype), nan.view(values.dtype))
            values[piece.offset : piece.offset + piece.numel] = sent
            error, velocity = (of_piece(layout, shard, piece, flat) for flat in (state.error, state.velocity))
            if error is not None:
                error.copy_(torch.where(finite, flush(flush(v) - flush(sent.float())), error))
            if velocity is not None and u is not None:
                velocity.copy_(torch.where(finite, u, velocity))


def cast_decode(format: CastFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for."""
    for pieces, chunk in zip(layout.pieces, chunks, strict=True):
        values = _cast_view(format, chunk).float()
        for piece in pieces:
            own = values[piece.offset : piece.offset + piece.numel]
            put(gradients, piece, own)


def cast_accumulate(format: CastFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; total is float32, ``(layout.shard_numel,)``."""
    (pieces,) = layout.pieces
    for piece in pieces:
        here = slice(piece.offset, piece.offset + piece.numel)
        values = flush(_cast_view(format, chunk)[here].float())
        total[here] = flush(flush(total[here]) + flush(values * torch.tensor(weight)))


def _cast_view(format: CastFormat, chunk: Tensor) -> Tensor:
    return chunk.view({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format.dtype])


# ---- random-k

_DRAWING = 0x72616E64 << 32


def random_k_encode(
    format: RandomKFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
) -> None:
    """payload = v at the positions that are drawn for each shard; error = v without them, and no velocity there.

    Where v is not finite in a shard, nothing of it is sent but that: state stays as it was where v is not finite, and up to
    rounding elsewhere. The arguments are those of `one_bit_encode`.
    """
    for shard, pieces in enumerate(layout.pieces):
        v, u, g = torch.zeros(3, layout.shard_numel)
        real = _real(layout, shard)
        for piece in pieces:
            here = slice(piece.offset, piece.offset + piece.numel)
            v[here], velocity = corrected(layout, shard, piece, gradients, state)
            if gradients is not None:
                g[here] = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel].float()
                u[here] = g[here] if velocity is None else velocity
        finite, rest = v.isfinite(), v.clone()
        header = [state.step, state.bucket, state.first_shard + shard, format.k]
        values = _random_k_values(format, chunks[shard])
        if finite.all():
            where = _drawn(format, layout, header)
            values.copy_(v[where] if format.values == "fp32" else v[where].clamp(-_LARGEST_HALF, _LARGEST_HALF))
            entries = real[where]
            rest[where[entries]] = flush(flush(v[where]) - flush(values.float()))[entries]
            u[where[entries]] = 0.0
        else:
            header[3], values[0] = ALL_NOT_FINITE, torch.nan
            if gradients is not None:
                rest = flush(flush(v) - flush(u)).clamp(-_LARGEST, _LARGEST)
                u = flush(flush(u - flush(g)) / torch.tensor(state.momentum)).clamp(-_LARGEST, _LARGEST)
        chunks[shard, :RANDOM_K_HEADER].view(torch.int32).copy_(torch.tensor(header))
        for kept, new in ((state.error, rest), (state.velocity, u)):
            if kept is not None:
                own = kept[shard * layout.shard_numel :][: layout.shard_numel]
                own.copy_(torch.where(real & finite, new, own))


def _real(layout: Layout, shard: int) -> Tensor:
    """Which elements of a shard are no padding."""
    real = torch.zeros(layout.shard_numel, dtype=torch.bool)
    for piece in layout.pieces[shard]:
        real[piece.offset : piece.offset + piece.numel] = True
    return real


def _drawn(format: RandomKFormat, layout: Layout, header: Sequence[int]) -> Tensor:
    """The position that is drawn in each stratum of a shard."""
    starts = torch.arange(format.k + 1) * layout.shard_numel // max(1, format.k)
    rows = torch.arange(-(-format.k // 4))
    counters = torch.stack([rows, *(torch.full_like(rows, x) for x in header[:3])], 1)
    words = random_words(format.seed ^ _DRAWING, counters).view(-1)[: format.k]
    return starts[:-1] + (words * starts.diff() >> 32)


def _random_k_values(format: RandomKFormat, chunk: Tensor) -> Tensor:
    return chunk[RANDOM_K_HEADER:].view(torch.float32 if format.values == "fp32" else torch.float16)[: format.k]


def random_k_decode(format: RandomKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for, zero where nothing was sent.

    Raises
    ------
    ValueError
        A header that no encoder writes; then nothing is written.
    """
    dense = torch.zeros(layout.shards, layout.shard_numel)
    for shard, chunk in enumerate(chunks):
        where, values = _random_k_entries(format, layout, shard, chunk)
        dense[shard, where] = values
    for shard, pieces in enumerate(layout.pieces):
        for piece in pieces:
            own = dense[shard, piece.offset : piece.offset + piece.numel]
            put(gradients, piece, own)


def random_k_accumulate(format: RandomKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; raises as `random_k_decode` does."""
    where, values = _random_k_entries(format, layout, 0, chunk)
    total[where] = flush(flush(total[where]) + flush(flush(values) * torch.tensor(weight)))


def _random_k_entries(format: RandomKFormat, layout: Layout, shard: int, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the shard, padding left out, and values that arrive there."""
    header = (chunk[:RANDOM_K_HEADER].view(torch.int32).long() & 0xFFFFFFFF).tolist()
    values, real = _random_k_values(format, chunk).float(), _real(layout, shard)
    if header[3] == ALL_NOT_FINITE and values[0].isnan():
        where = real.nonzero().view(-1)
        return where, torch.full((len(where),), torch.nan)
    if header[3] != format.k:
        raise ValueError("corrupted random-k payload: another k than the layout's")
    where = _drawn(format, layout, header)
    return where[real[where]], values[real[where]]


# ---- top-k


def top_k_encode(
    format: TopKFormat, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
) -> None:
    """payload = the k largest magnitudes of v in each shard, zeros left out, ties to the lowest index; error = v without them.

    The velocity becomes zero where they are. The arguments are those of `one_bit_encode`.
    """
    error, velocity = state.error, state.velocity
    for shard, pieces in enumerate(layout.pieces):
        if not pieces:
            continue
        v, u = map(_joined, zip(*(corrected(layout, shard, piece, gradients, state) for piece in pieces), strict=True))
        assert v is not None
        if gradients is not None:  # the error alone is taken as it is
            v = flush(v) if error is not None else flush(v) + 0.0
        positions = torch.cat([torch.arange(piece.offset, piece.offset + piece.numel) for piece in pieces])
        finite = v.isfinite()
        if finite.all():
            magnitude = v.view(torch.int32) & 0x7FFFFFFF
            threshold = magnitude.topk(min(format.k, len(v))).values.min().clamp_min(1)  # a zero would not stay one as a sign
            larger, equal = magnitude > threshold, magnitude == threshold
            chosen = (larger | equal & (equal.cumsum(0) <= format.k - larger.sum())).nonzero().view(-1)
            sent = v[chosen]
        else:
            chosen = (~finite).nonzero().view(-1)
            sent = torch.full((len(chosen),), torch.nan)
        if len(chosen) > format.k:
            _write_entries(format, layout, chunks[shard], torch.tensor([0]), sent[:1])
            chunks[shard, :4] = 255
            arrives = sent
        else:
            arrives = _write_entries(format, layout, chunks[shard], positions[chosen], sent)
        here = shard * layout.shard_numel + positions
        if error is not None:
            residual = v.clone()
            residual[chosen] = flush(flush(sent) - flush(arrives))
            error[here] = torch.where(finite, residual, error[here])
        if velocity is not None:
            assert u is not None
            if finite.all():
                u[chosen] = 0.0
            velocity[here] = torch.where(finite, u, velocity[here])


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]


def _write_entries(format: TopKFormat, layout: Layout, chunk: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Writes entries at ascending positions of a shard into its chunk. Returns the values that arrive."""
    runs = -(-layout.shard_numel // RUN)
    counts = torch.bincount(where // RUN, minlength=runs)
    chunk[: 4 * runs].view(torch.int32).copy_(counts)
    arrives = values.clone()
    if format.values != "sign":
        if format.values == "fp16":
            values = values.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
            arrives = values.float()
        chunk[format.values_at : format.values_at + len(values) * values.element_size()] = values.view(torch.uint8)
    first = scale_at = upper_at = low_at = 0
    for run, count in enumerate(counts.tolist()):
        entries = slice(first, first + count)
        offsets = where[entries] - run * RUN
        upper = torch.zeros(format.upper_bits(min(RUN, layout.shard_numel - run * RUN), count), dtype=torch.bool)
        upper[(offsets >> format.low_bits) + (torch.arange(count) if format.low_bits else 0)] = True
        upper_at += _write_bits(chunk, format.upper_at + upper_at, upper)
        fields = offsets & (1 << format.low_bits) - 1
        if format.values == "sign":
            fields |= values[entries].signbit().long() << format.low_bits
            groups = torch.nn.functional.pad(flush(values[entries]).abs(), (0, -count % ENTRIES)).view(-1, ENTRIES)
            sizes = torch.full((len(groups),), ENTRIES)
            sizes[-1:] -= -count % ENTRIES
            scales = flush(ordered_sums(groups) / sizes) if count else groups.new_empty(0)
            scales = torch.where(scales.isnan(), _NAN_BFLOAT16, scales.clamp_max(_LARGEST_BFLOAT16).bfloat16())
            begin = format.scales_at + 2 * scale_at
            chunk[begin : begin + 2 * len(scales)] = scales.view(torch.uint8)
            scale_at += len(scales)
            arrives[entries] = scales.float().repeat_interleave(ENTRIES)[:count].copysign(values[entries])
        low_at += _write_bits(
            chunk, format.low_at + low_at, (fields[:, None] >> torch.arange(format.width) & 1).bool().view(-1)
        )
        first += count
    return arrives


def _write_bits(chunk: Tensor, at: int, bits: Tensor) -> int:
    """Writes bits from a byte on, the first in its lowest bit. Returns how many bytes they take."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = (padded * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])).sum(1).to(torch.uint8)
    chunk[at : at + len(packed)] = packed
    return len(packed)


def _read_bits(chunk: Tensor, at: int, nbytes: int) -> Tensor:
    return (chunk[at : at + nbytes, None].int() >> torch.arange(8) & 1).view(-1)


def top_k_decode(format: TopKFormat, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
    """gradients = the values that the chunks stand for, zero where nothing was sent.

    Raises
    ------
    ValueError
        Entries that no encoder writes; then nothing is written.
    """
    dense = torch.zeros(layout.shards, layout.shard_numel)
    for shard, chunk in enumerate(chunks):
        where, values = _top_k_entries(format, layout, shard, chunk)
        dense[shard, where] = values
    for shard, pieces in enumerate(layout.pieces):
        for piece in pieces:
            values = dense[shard, piece.offset : piece.offset + piece.numel]
            put(gradients, piece, values)


def top_k_accumulate(format: TopKFormat, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
    """total += weight * the values of one chunk; raises as `top_k_decode` does."""
    where, values = _top_k_entries(format, layout, 0, chunk)
    total[where] = flush(flush(total[where]) + flush(flush(values) * torch.tensor(weight)))


def _top_k_entries(format: TopKFormat, layout: Layout, shard: int, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the shard and values of a chunk's entries, checked."""
    runs = -(-layout.shard_numel // RUN)
    counts = chunk[: 4 * runs].view(torch.int32).long() & 0xFFFFFFFF
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "sign": torch.bfloat16}[format.values]
    values = chunk[format.scales_at if format.values == "sign" else format.values_at :].view(dtype).float()
    if runs and counts[0] == ALL_NOT_FINITE and values[0].isnan():
        where = torch.cat([torch.arange(p.offset, p.offset + p.numel) for p in layout.pieces[shard]] or [counts[:0]])
        return where, torch.full((len(where),), torch.nan)
    total = int(counts.sum())
    if total > format.k:
        raise ValueError("corrupted top-k payload: counts exceed k")
    real = torch.zeros(runs * RUN, dtype=torch.bool)
    for piece in layout.pieces[shard]:
        real[piece.offset : piece.offset + piece.numel] = True
    found, signed = [counts[:0]], [values[:0]]
    scale_at = upper_at = low_at = 0
    for run, count in enumerate(counts.tolist()):
        nbytes = -(-format.upper_bits(min(RUN, layout.shard_numel - run * RUN), count) // 8)
        upper = _read_bits(chunk, format.upper_at + upper_at, nbytes).nonzero().view(-1)
        upper_at += nbytes
        if len(upper) != count:
            raise ValueError("corrupted top-k payload: not as many entries as a count says")
        nbytes = -(-count * format.width // 8)
        fields = _read_bits(chunk, format.low_at + low_at, nbytes)[: count * format.width].view(count, format.width)
        low_at += nbytes
        low = (fields[:, : format.low_bits] << torch.arange(format.low_bits)).sum(1)
        offsets = ((upper - torch.arange(count) if format.low_bits else upper) << format.low_bits) | low
        if (offsets.diff() <= 0).any() or (offsets >= RUN).any() or not real[run * RUN + offsets].all():
            raise ValueError("corrupted top-k payload: offsets that do not ascend, or point into padding")
        found.append(run * RUN + offsets)
        if format.values == "sign":
            groups = -(-count // ENTRIES)
            magnitudes = values[scale_at : scale_at + groups].repeat_interleave(ENTRIES)[:count]
            signed.append(torch.where(fields[:, -1].bool(), -magnitudes, magnitudes))
            scale_at += groups
    return torch.cat(found), torch.cat(signed) if format.values == "sign" else values[:total]


# ---- the backend


def all_within(values: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    """Whether all float32 values are at most `limit` in magnitude; NaN is not."""
    return bool((values.abs() <= limit).all())


def _one_bit_bounds(format: OneBitFormat, layout: Layout, chunk: Tensor) -> Tensor:
    """What bounds the values of a chunk: here and below, all of which are looked at, of padding too."""
    return _scale_view(format, chunk)


def _quantize_bounds(format: QuantizeFormat, layout: Layout, chunk: Tensor) -> Tensor:
    return chunk[: 4 * (layout.shard_numel // format.block)].view(torch.float32)


def _cast_bounds(format: CastFormat, layout: Layout, chunk: Tensor) -> Tensor:
    return _cast_view(format, chunk)[: layout.shard_numel].float()


def _random_k_bounds(format: RandomKFormat, layout: Layout, chunk: Tensor) -> Tensor:
    return _random_k_values(format, chunk).float()


def _top_k_bounds(format: TopKFormat, layout: Layout, chunk: Tensor) -> Tensor:
    if format.values == "sign":
        count = -(-format.k // ENTRIES) + -(-layout.shard_numel // RUN)
        return chunk[format.scales_at :][: 2 * count].view(torch.bfloat16).float()
    dtype = torch.float32 if format.values == "fp32" else torch.float16
    return chunk[format.values_at :].view(dtype)[: format.k].float()


class Family:
    """The passes of a family, as `ds_horovod.kernels.backend.Passes` says, by the functions that begin with its name."""

    def __init__(self, name):
        self._encode, self._decode, self._accumulate = (globals()[f"{name}_{f}"] for f in ("encode", "decode", "accumulate"))
        self._bounds = globals()[f"_{name}_bounds"]

    def prepare(self, format, layout, device):
        pass

    def encode(self, format, layout, gradients, state, chunks):
        if state.total is None:
            return self._encode(format, layout, gradients, state, chunks)
        self._encode(format, layout, gradients, replace(state, error=state.total, total=None), chunks)
        if state.error is not None:
            sent, rest = self._flat(format, layout, chunks), state.total
            state.error.copy_(torch.where(sent.isfinite() & rest.isfinite(), rest, state.error))

    def decode(self, format, layout, chunks, gradients):
        self._decode(format, layout, chunks, gradients)

    def accumulate(self, format, layout, pushed, weight, total):
        for chunk in pushed.view(-1, pushed.shape[-1]):
            self._accumulate(format, layout, chunk, weight, total)

    def is_within(self, format, layout, chunks, limit):
        if isinstance(format, QuantizeFormat) and limit != torch.finfo(torch.float32).max:
            limit = limit / format.levels
        return all(all_within(self._bounds(format, layout, chunk), limit) for chunk in chunks)

    def serve(self, format, layout, pushed, weight, state, chunk):
        total = torch.zeros(layout.shard_numel) if state.error is None else state.error.clone()
        self.accumulate(format, layout, pushed, weight, total)
        self.encode(format, layout, None, replace(state, total=total), chunk.unsqueeze(0))
        return True

    def nonfinite_mask(self, format, layout, chunks):
        if self.is_within(format, layout, chunks, torch.finfo(torch.float32).max):
            return None
        bits = ~self._flat(format, layout, chunks).isfinite()
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little").view(np.int32))

    def rollback(self, format, layout, payload, mask, gradients, state, sparse):
        sent, g = self._flat(format, layout, payload), torch.zeros(layout.numel)
        for offset, gradient in zip(layout.offsets, gradients, strict=True):
            g[offset : offset + gradient.numel()] = gradient.view(-1)
        bits = torch.from_numpy(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")).bool()
        where, e, u = bits & sent.isfinite() & g.isfinite(), state.error, state.velocity
        if u is None:
            return e.copy_(torch.where(where, (e + sent - g).clamp(-_LARGEST, _LARGEST), e))
        cleared = sent != 0 if sparse else torch.zeros_like(where)
        e.copy_(torch.where(where, (e + sent - torch.where(cleared, g, u)).clamp(-_LARGEST, _LARGEST), e))
        u.copy_(torch.where(where & ~cleared, ((u - g) / state.momentum).clamp(-_LARGEST, _LARGEST), u))

    def _flat(self, format, layout, chunks):
        """The values of a payload in the flat array of the layout."""
        values, flat = [torch.empty(numel) for numel in layout.numels], torch.zeros(layout.numel)
        self._decode(format, layout, chunks, values)
        for offset, own in zip(layout.offsets, values, strict=True):
            flat[offset : offset + len(own)] = own
        return flat


FAMILIES = {name: Family(name) for name in ("one_bit", "top_k", "quantize", "cast", "random_k")}
