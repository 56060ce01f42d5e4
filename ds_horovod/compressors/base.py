"""What a compressor is, and the passes of the exchange derived from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..feedback import FeedbackState
from ..kernels.formats import align
from ..kernels.reference import put
from ..layout import Layout, pack

_HEADER = 16  # bytes before the payload of a derived chunk, the first of which says what its values are:
_TAME, _NOT_FINITE, _LARGE = range(3)

_ROW = 32  # elements whose bits share a word

TAME = 2.0**50
"""Sums of values up to this, and of their squares, cannot overflow."""
LARGEST = torch.finfo(torch.float32).max


class Compressor(ABC):
    """Q in ``v -> Q[v]``: any map from float32 values to a payload of fixed size and back, biased or not.

    Write your own with three methods: `payload_nbytes`, `compress` and `decompress`. The passes over a bucket
    (`encode`, `decode`, `accumulate`, `serve`) are derived from them, correctly if not fast; a compressor with fused
    kernels overrides the passes instead. All ranks must hold equal compressors: ``repr`` is what they compare.
    """

    block: int = 32
    """Elements: every parameter starts at a multiple of it within its bucket. A multiple of 32."""

    sparse: bool = False
    """Whether Q sends some elements and leaves the others out, as zeros: what momentum correction needs, which makes the
    velocity zero where something was sent."""

    @abstractmethod
    def payload_nbytes(self, numel: int) -> int:
        """Bytes that `compress` makes of `numel` values: a pure function, not falling as `numel` grows."""

    @abstractmethod
    def compress(self, values: Tensor) -> Tensor:
        """Compresses finite values, float32 ``(numel,)``, to uint8 ``(payload_nbytes(numel),)``."""

    @abstractmethod
    def decompress(self, payload: Tensor, numel: int) -> Tensor:
        """The values, float32 ``(numel,)``, that a payload stands for."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__qualname__}({options})"

    # ---- the passes, derived

    def chunk_nbytes(self, layout: Layout) -> int:
        """Bytes in each of the payload's chunks, one a shard; a multiple of 16."""
        return align(_HEADER + self.payload_nbytes(layout.most_elements))

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, memory: FeedbackState, chunks: Tensor) -> None:
        """v = gradient + error; payload = Q[v]; error = v - Q[v]. With momentum correction, as `FeedbackState` says.

        Where v is not finite the payload says so, and the memory stays as it was.

        Parameters
        ----------
        layout
            Where the gradients lie.
        gradients
            A contiguous tensor for each of the layout's. None: v is the error alone.
        memory
            What is kept from step to step, replaced.
        chunks
            uint8, ``(layout.shards, chunk_nbytes(layout))``, all zero, receives the payload.
        """
        for shard, pieces in enumerate(layout.pieces):
            if not pieces:
                continue
            starts = [shard * layout.shard_numel + piece.offset for piece in pieces]
            terms, velocities = [], []
            for piece, start in zip(pieces, starts, strict=True):
                here = slice(start, start + piece.numel)
                value = torch.zeros(piece.numel, device=chunks.device) if memory.error is None else memory.error[here].clone()
                if gradients is not None:
                    gradient = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
                    if memory.velocity is not None:
                        velocities.append(memory.velocity[here] * memory.momentum + gradient)
                        gradient = velocities[-1]
                    value += gradient
                terms.append(value)
            v = torch.cat(terms)
            all_within = kernels.for_device(v.device).all_within
            if not all_within(v, LARGEST):
                chunks[shard, 0] = _NOT_FINITE
                continue
            chunks[shard, 0] = _TAME if all_within(v, TAME) else _LARGE
            payload = self._checked_payload(v)
            chunks[shard, _HEADER : _HEADER + len(payload)] = payload
            if memory.error is None:
                continue
            sent = self._checked_values(payload, len(v))
            numels = [p.numel for p in pieces]
            for start, rest in zip(starts, (v - sent).split(numels), strict=True):
                memory.error[start : start + len(rest)] = rest
            if velocities and memory.velocity is not None:
                for start, u, own in zip(starts, velocities, sent.split(numels), strict=True):
                    memory.velocity[start : start + len(u)] = u.masked_fill_(own != 0, 0.0) if self.sparse else u

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        """gradients = the values that the chunks stand for.

        Raises
        ------
        ValueError
            A payload that no encoder writes.
        """
        self._require_size(layout, chunks)
        for pieces, chunk in zip(layout.pieces, chunks, strict=True):
            values = self._chunk_values(chunk, sum(p.numel for p in pieces))
            for piece, part in zip(pieces, values.split([p.numel for p in pieces]), strict=True):
                put(gradients, piece, part)

    def accumulate(self, layout: Layout, chunk: Tensor, weight: float, total: Tensor) -> None:
        """total += weight * the values of one chunk; total is float32, ``(layout.shard_numel,)``."""
        self._require_size(layout, chunk.unsqueeze(0))
        (pieces,) = layout.pieces
        values = self._chunk_values(chunk, sum(p.numel for p in pieces))
        for piece, part in zip(pieces, values.split([p.numel for p in pieces]), strict=True):
            total[piece.offset : piece.offset + piece.numel].add_(part, alpha=weight)

    def accumulate_all(self, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        """`accumulate` for each of some workers, uint8 ``(workers, chunk_nbytes)``, one after the other."""
        for chunk in pushed:
            self.accumulate(layout, chunk, weight, total)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        """Whether all values that the chunks stand for are finite and no larger than a limit. False too if nobody knows.

        The host asks: on a GPU it waits for the answer.
        """
        known = {_TAME: TAME, _LARGE: LARGEST}
        return all(known.get(flag, math.inf) <= limit for flag in chunks[:, 0].tolist())

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, memory: FeedbackState, chunk: Tensor
    ) -> None:
        """The server pass: v = error + weight * sum_i Q_i; payload = Q[v]; error = v - Q[v].

        Parameters
        ----------
        layout
            Of the one shard that is served.
        pushed
            uint8, ``(workers, pusher.chunk_nbytes)``: the workers' chunks for this shard, by rank.
        pusher
            The compressor that made them.
        weight
            1 / workers for an average, 1 for a sum.
        memory
            The server's, whose error is float32 ``(layout.shard_numel,)``, replaced. It has no velocity.
        chunk
            uint8, ``(chunk_nbytes(layout),)``, all zero, receives the reply.
        """
        before, error = None, memory.error
        if error is not None and not (kernels.for_device(pushed.device).HOST and pusher.is_within(layout, pushed, TAME)):
            before = error.clone()  # on CPUs rare: something may not be finite, or overflow
        total = torch.zeros(layout.shard_numel, device=pushed.device) if error is None else error
        pusher.accumulate_all(layout, pushed, weight, total)
        self.encode(layout, None, replace(memory, error=total), chunk.unsqueeze(0))
        if before is not None:
            replied = [torch.empty(numel, device=chunk.device) for numel in layout.numels]
            self.decode(layout, chunk.unsqueeze(0), replied)
            for offset, values in zip(layout.offsets, replied, strict=True):
                here = slice(offset, offset + len(values))
                kept = total[here]
                kept.copy_(torch.where(values.isfinite() & kept.isfinite(), kept, before[here]))

    def keep_overflow(self, layout: Layout, chunk: Tensor, memory: FeedbackState, limit: float) -> None:
        """error += what of the reply is over a limit, and will not arrive, since the gradients' dtype ends there."""
        if memory.error is None or (kernels.for_device(chunk.device).HOST and self.is_within(layout, chunk[None], limit)):
            return
        replied = [torch.empty(numel, device=chunk.device) for numel in layout.numels]
        self.decode(layout, chunk[None], replied)
        for offset, values in zip(layout.offsets, replied, strict=True):
            over = values - values.clamp(-limit, limit)
            memory.error[offset : offset + len(values)] += over.masked_fill_(~values.isfinite(), 0.0)

    def prepare(self, layout: Layout, device: torch.device) -> None:  # noqa: B027 - nothing is a fine default
        """Makes ready what takes long, before the first pass over a layout."""

    def nonfinite_mask(self, layout: Layout, chunks: Tensor) -> Tensor | None:
        """Where the values that the chunks stand for are not finite.

        Returns
        -------
        Tensor or None
            int32, ``(layout.numel / 32,)``: a bit for each element of the bucket, the first in the lowest bit. None:
            nowhere.
        """
        if self.is_within(layout, chunks):
            return None
        values = [torch.empty(numel, device=chunks.device) for numel in layout.numels]
        self.decode(layout, chunks, values)
        flat = torch.zeros(layout.numel, dtype=torch.bool, device=chunks.device)
        for offset, arrived in zip(layout.offsets, values, strict=True):
            flat[offset : offset + len(arrived)] = ~arrived.isfinite()
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=chunks.device)
        return (flat.view(-1, 8) * powers).sum(1).to(torch.uint8).view(torch.int32)

    def rollback(
        self, layout: Layout, payload: Tensor, lost: Tensor, gradients: Sequence[Tensor], memory: FeedbackState
    ) -> None:
        """Takes a pass back from the memory where the reply is not finite: e = e' + Q[v] - g, up to rounding.

        What was sent there is lost through no fault of the worker's, and an overflow step, which a GradScaler skips, must
        not leave a trace. Of a velocity that was sent, and is forgotten, the error keeps what waits: e + m u. Elements
        whose v was not finite have not been taken in the first place.

        Parameters
        ----------
        payload
            What `encode` made of the gradients.
        lost
            Where, as `nonfinite_mask` says.
        """
        assert memory.error is not None
        sent = [torch.empty(n, device=payload.device) for n in layout.numels]
        self.decode(layout, payload, sent)
        bits = (lost[:, None] >> torch.arange(_ROW, device=lost.device) & 1).bool().view(-1)
        for offset, gradient, own in zip(layout.offsets, gradients, sent, strict=True):
            here = slice(offset, offset + len(own))
            g = gradient.view(-1).float()
            where = bits[here] & own.isfinite() & g.isfinite()
            e = memory.error[here]
            if memory.velocity is None:
                e[where] = e[where] + own[where] - g[where]
                continue
            u = memory.velocity[here]
            forgotten = (own != 0) if self.sparse else torch.zeros_like(where)
            kept = where & ~forgotten
            e[kept] = e[kept] + own[kept] - u[kept]
            u[kept] = (u[kept] - g[kept]) / memory.momentum
            gone = where & forgotten
            e[gone] = e[gone] + own[gone] - g[gone]

    def _require_size(self, layout: Layout, chunks: Tensor) -> None:
        expected = layout.shards, self.chunk_nbytes(layout)
        if chunks.shape != expected:
            raise ValueError(f"a payload of {tuple(chunks.shape)} bytes where {self!r} writes {expected}: truncated?")

    def _checked_payload(self, values: Tensor) -> Tensor:
        payload = self.compress(values.clone())
        payload = payload.contiguous().view(-1).view(torch.uint8)
        expected = self.payload_nbytes(len(values))
        if len(payload) != expected:
            raise ValueError(
                f"{self!r}.compress made {len(payload)} bytes of {len(values)} values, but payload_nbytes says {expected}"
            )
        return payload

    def _checked_values(self, payload: Tensor, numel: int) -> Tensor:
        values = self.decompress(payload, numel)
        if values.shape != (numel,) or not values.is_floating_point():
            raise ValueError(
                f"{self!r}.decompress must return {numel} floating-point values, got {values.dtype} {tuple(values.shape)}"
            )
        return values.float()

    def _chunk_values(self, chunk: Tensor, numel: int) -> Tensor:
        flag = int(chunk[0])
        if flag not in (_TAME, _NOT_FINITE, _LARGE):
            raise ValueError(f"corrupted payload of {self!r}: a chunk begins with {flag}")
        if flag == _NOT_FINITE or not numel:
            return torch.full((numel,), torch.nan, device=chunk.device)
        return self._checked_values(chunk[_HEADER : _HEADER + self.payload_nbytes(numel)], numel)


class FusedCompressor(Compressor):
    """A compressor with passes of its own, from which `compress` and `decompress` are derived."""

    @abstractmethod
    def format(self, layout: Layout) -> Any:
        """How its chunks are written, as a `kernels.formats` says."""

    def prepare(self, layout: Layout, device: torch.device) -> None:
        kernels.for_device(device).prepare(self.format(layout), layout, device)

    def accumulate_all(self, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        if kernels.for_device(pushed.device).HOST:
            return super().accumulate_all(layout, pushed, weight, total)
        self.accumulate(layout, pushed, weight, total)

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, memory: FeedbackState, chunk: Tensor
    ) -> None:
        if kernels.for_device(chunk.device).HOST:
            return super().serve(layout, pushed, pusher, weight, memory, chunk)
        # The sum lies beside the error, which stays where the reply is not finite: nobody could say in time whether it may.
        error = memory.error
        total = torch.zeros(layout.numel, device=chunk.device) if error is None else error.clone()
        pusher.accumulate_all(layout, pushed, weight, total)
        self.encode(layout, None, replace(memory, total=total), chunk.unsqueeze(0))

    def nonfinite_mask(self, layout: Layout, chunks: Tensor) -> Tensor | None:
        device = kernels.for_device(chunks.device)
        if device.HOST:
            return super().nonfinite_mask(layout, chunks)
        return device.nonfinite_mask(self.format(layout), layout, chunks)  # type: ignore[no-any-return]

    def rollback(
        self, layout: Layout, payload: Tensor, lost: Tensor, gradients: Sequence[Tensor], memory: FeedbackState
    ) -> None:
        device = kernels.for_device(payload.device)
        if device.HOST:
            return super().rollback(layout, payload, lost, gradients, memory)
        device.rollback(self.format(layout), layout, payload, lost, gradients, memory, self.sparse)

    def payload_nbytes(self, numel: int) -> int:
        return self.chunk_nbytes(self._alone(numel))

    def compress(self, values: Tensor) -> Tensor:
        payload = torch.zeros(self.payload_nbytes(len(values)), dtype=torch.uint8, device=values.device)
        self.encode(self._alone(len(values)), [values.contiguous()], FeedbackState(), payload.unsqueeze(0))
        return payload

    def decompress(self, payload: Tensor, numel: int) -> Tensor:
        values = torch.empty(numel, device=payload.device)
        self.decode(self._alone(numel), payload.unsqueeze(0), [values])
        return values

    def _alone(self, numel: int) -> Layout:
        return pack([numel], self.block, 1)
