"""The interface of a compressor, and the passes of the exchange that follow from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..feedback import FeedbackState
from ..kernels.fallback import decoded, nonfinite_mask, put, rollback
from ..kernels.formats import align
from ..layout import Layout, pack

_HEADER = 16  # bytes before the payload of a derived chunk, the first of which says what its values are:
_BOUNDED, _NOT_FINITE, _LARGE = range(3)

BOUNDED = 2.0**50
"""Sums of values up to this, and of their squares, cannot overflow."""
LARGEST = torch.finfo(torch.float32).max


class Compressor(ABC):
    """Q in ``v -> Q[v]``: any map from float32 values to a payload of fixed size and back, biased or not.

    Write your own with three methods: `payload_nbytes`, `compress` and `decompress`. The passes over a bucket (`encode`,
    `decode`, `accumulate`, `serve`) are derived from them, and are correct, but not fast. A compressor with fused kernels
    overrides the passes instead. All ranks must use equal compressors; they compare them by ``repr``.
    """

    block: int = 32
    """Every parameter starts at a multiple of so many elements within its bucket. A multiple of 32."""

    sparse: bool = False
    """Whether Q sends some elements and makes the others zero. Momentum correction requires it, since it clears the velocity
    of the elements that were sent."""

    contracts: bool = True
    """Whether v - Q[v] is, on average, smaller than v, so that the errors of error feedback stay bounded. Where it is not,
    options that keep an error refuse the compressor."""

    @abstractmethod
    def payload_nbytes(self, numel: int) -> int:
        """Bytes that `compress` makes of `numel` values: a pure function that never decreases as `numel` grows."""

    @abstractmethod
    def compress(self, values: Tensor) -> Tensor:
        """Compresses finite values, float32 ``(numel,)``, to uint8 ``(payload_nbytes(numel),)``."""

    @abstractmethod
    def decompress(self, payload: Tensor, numel: int) -> Tensor:
        """The values, float32 ``(numel,)``, that a payload stands for. Infinity stands for the largest float32."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__qualname__}({options})"

    # ---- the passes, derived

    def chunk_nbytes(self, layout: Layout) -> int:
        """Bytes in each of the payload's chunks, one a shard; a multiple of 16."""
        return align(_HEADER + self.payload_nbytes(layout.most_elements))

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor) -> None:
        """v = gradient + error; payload = Q[v]; error = v - Q[v]. With momentum correction, as `FeedbackState` says.

        Where v is not finite, or Q[v] is NaN, the payload says so, and error and velocity stay as they were.

        Parameters
        ----------
        layout
            Where the gradients lie.
        gradients
            A contiguous tensor for each of the layout's. None: v is ``state.total`` or, if there is none, the error alone.
        state
            What is kept from step to step, replaced.
        chunks
            uint8, ``(layout.shards, chunk_nbytes(layout))``, all zero, receives the payload.
        """
        start_from, all_within = (
            state.error if state.total is None else state.total,
            kernels.for_device(chunks.device).all_within,
        )
        for shard, pieces in enumerate(layout.pieces):
            if not pieces:
                continue
            places = [slice(start, start + p.numel) for p in pieces for start in [shard * layout.shard_numel + p.offset]]
            terms, velocities = [], []
            for piece, here in zip(pieces, places, strict=True):
                if start_from is None:
                    value = torch.zeros(piece.numel, dtype=torch.float32, device=chunks.device)
                else:
                    value = start_from[here].clone()
                if gradients is not None:
                    gradient = gradients[piece.tensor].view(-1)[piece.first : piece.first + piece.numel]
                    if state.velocity is not None:
                        velocities.append(state.velocity[here] * state.momentum + gradient)
                        gradient = velocities[-1]
                    value += gradient
                terms.append(value)
            v = torch.cat(terms)
            if not all_within(v, LARGEST):
                chunks[shard, 0] = _NOT_FINITE
                continue
            payload = self._checked_payload(v)
            sent = self._checked_values(payload, len(v))
            if not all_within(sent, LARGEST):  # the compressor has made NaN of finite values
                chunks[shard, 0] = _NOT_FINITE
                continue
            chunks[shard, 0] = _BOUNDED if all_within(v, BOUNDED) and all_within(sent, BOUNDED) else _LARGE
            chunks[shard, _HEADER : _HEADER + len(payload)] = payload
            if state.error is None:
                continue
            numels = [p.numel for p in pieces]
            rests = (v - sent).clamp_(-LARGEST, LARGEST).split(numels)  # of opposite signs they may be too far apart
            for here, rest in zip(places, rests, strict=True):
                state.error[here] = rest
            if velocities and state.velocity is not None:
                for here, u, own in zip(places, velocities, sent.split(numels), strict=True):
                    state.velocity[here] = u.masked_fill_(own != 0, 0.0) if self.sparse else u

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

    def accumulate(self, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        """total += weight * the values of each chunk, one worker after the other.

        Parameters
        ----------
        layout
            Of the one shard that is served.
        pushed
            uint8, one chunk or a row of them: ``(chunk_nbytes(layout),)`` or ``(workers, chunk_nbytes(layout))``.
        weight
            1 / workers for an average, 1 for a sum.
        total
            float32, ``(layout.shard_numel,)``.
        """
        (pieces,) = layout.pieces
        for chunk in pushed if pushed.dim() == 2 else (pushed,):
            self._require_size(layout, chunk.unsqueeze(0))
            values = self._chunk_values(chunk, sum(p.numel for p in pieces))
            for piece, part in zip(pieces, values.split([p.numel for p in pieces]), strict=True):
                total[piece.offset : piece.offset + piece.numel].add_(part, alpha=weight)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        """Whether all values that the chunks stand for are finite and no larger than a limit. False too if nobody knows.

        Raises
        ------
        ValueError
            Chunks of another size than the layout's.
        """
        self._require_width(layout, chunks)
        known = {_BOUNDED: BOUNDED, _LARGE: LARGEST}
        return all(known.get(flag, math.inf) <= limit for flag in chunks[:, 0].tolist())

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> None:
        """The server pass: v = error + weight * sum_i Q_i; payload = Q[v]; error = v - Q[v].

        The error stays as it was where the reply is not finite.

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
        state
            The server's, whose error is float32 ``(layout.shard_numel,)``, replaced. It has no velocity.
        chunk
            uint8, ``(chunk_nbytes(layout),)``, all zero, receives the reply.
        """
        if state.error is not None and pusher.is_within(layout, pushed, BOUNDED):
            total = state.error  # neither the sum nor the reply can overflow: no copy is needed
        else:
            if state.error is None:
                total = torch.zeros(layout.shard_numel, dtype=torch.float32, device=pushed.device)
            else:
                total = state.error.clone()
            state = replace(state, total=total)
        pusher.accumulate(layout, pushed, weight, total)
        self.encode(layout, None, state, chunk.unsqueeze(0))

    def keep_overflow(self, layout: Layout, chunk: Tensor, state: FeedbackState, limit: float) -> None:
        """error += what of the reply is over a limit, and will not arrive, since the gradients' dtype ends there."""
        if state.error is None or self.is_within(layout, chunk[None], limit):
            return
        replied = decoded(layout, chunk[None], partial(self.decode, layout))
        for offset, values in zip(layout.offsets, replied, strict=True):
            over = values - values.clamp(-limit, limit)
            error = state.error[offset : offset + len(values)]
            error.add_(over.masked_fill_(~values.isfinite(), 0.0)).clamp_(-LARGEST, LARGEST)

    def prepare(self, layout: Layout, device: torch.device) -> None:  # noqa: B027 - nothing is a fine default
        """Does in advance what takes long, before the first pass over a layout."""

    def nonfinite_mask(self, layout: Layout, chunks: Tensor) -> Tensor | None:
        """Where the values that the chunks stand for are not finite.

        Returns
        -------
        Tensor or None
            int32, ``(layout.numel / 32,)``: a bit for each element of the bucket, the first in the lowest bit. None:
            nowhere.
        """
        self._require_size(layout, chunks)
        if self.is_within(layout, chunks):
            return None
        return nonfinite_mask(layout, decoded(layout, chunks, partial(self.decode, layout)))

    def rollback(
        self, layout: Layout, payload: Tensor, mask: Tensor, gradients: Sequence[Tensor], state: FeedbackState
    ) -> None:
        """Undoes an `encode` where the reply is not finite: e = e' + Q[v] - g, up to rounding.

        What a worker sent there does not arrive, through no fault of its own, and an overflow step, which a GradScaler skips,
        must not leave a trace. Where a velocity was sent, and has become zero, the error keeps its part: e + m u. Elements
        whose v was not finite have not been encoded in the first place.

        Parameters
        ----------
        payload
            What `encode` made of the gradients.
        mask
            Where, as `nonfinite_mask` says.
        """
        rollback(layout, decoded(layout, payload, partial(self.decode, layout)), mask, gradients, state, self.sparse)

    def _require_size(self, layout: Layout, chunks: Tensor) -> None:
        expected = layout.shards, self.chunk_nbytes(layout)
        if chunks.shape != expected:
            raise ValueError(f"a payload of {tuple(chunks.shape)} bytes where {self!r} writes {expected}: truncated?")

    def _require_width(self, layout: Layout, chunks: Tensor) -> None:
        expected = self.chunk_nbytes(layout)
        if chunks.dim() != 2 or chunks.shape[1] != expected:
            raise ValueError(f"chunks of {tuple(chunks.shape)} bytes where {self!r} writes {expected} in each: truncated?")

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
        return values.float().clamp(-LARGEST, LARGEST)  # a scale times a level may overflow; NaN stays

    def _chunk_values(self, chunk: Tensor, numel: int) -> Tensor:
        flag = int(chunk[0])
        if flag not in (_BOUNDED, _NOT_FINITE, _LARGE):
            raise ValueError(f"corrupted payload of {self!r}: a chunk begins with {flag}")
        if flag == _NOT_FINITE or not numel:
            return torch.full((numel,), torch.nan, dtype=torch.float32, device=chunk.device)
        return self._checked_values(chunk[_HEADER : _HEADER + self.payload_nbytes(numel)], numel)


class FusedCompressor(Compressor):
    """A compressor whose passes are kernels: a subclass states its options, and how its chunks are written.

    `compress` and `decompress` are derived from the passes.
    """

    family: ClassVar[str]
    """The name of its kernels, in `kernels.passes`."""

    @abstractmethod
    def format(self, layout: Layout) -> Any:
        """How its chunks are written: one of `kernels.formats`."""

    def chunk_nbytes(self, layout: Layout) -> int:
        return self.format(layout).nbytes  # type: ignore[no-any-return]

    def prepare(self, layout: Layout, device: torch.device) -> None:
        self._passes(device).prepare(self.format(layout), layout, device)

    def encode(self, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor) -> None:
        self._passes(chunks.device).encode(self.format(layout), layout, gradients, state, chunks)

    def decode(self, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        self._passes(chunks.device).decode(self.format(layout), layout, chunks, gradients)

    def accumulate(self, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        self._passes(pushed.device).accumulate(self.format(layout), layout, pushed, weight, total)

    def is_within(self, layout: Layout, chunks: Tensor, limit: float = LARGEST) -> bool:
        """As `Compressor.is_within`. On a GPU nobody knows without waiting."""
        return self._passes(chunks.device).is_within(self.format(layout), layout, chunks, limit)

    def serve(
        self, layout: Layout, pushed: Tensor, pusher: Compressor, weight: float, state: FeedbackState, chunk: Tensor
    ) -> None:
        passes = self._passes(chunk.device)
        if pusher != self or not passes.serve(self.format(layout), layout, pushed, weight, state, chunk):
            super().serve(layout, pushed, pusher, weight, state, chunk)

    def nonfinite_mask(self, layout: Layout, chunks: Tensor) -> Tensor | None:
        return self._passes(chunks.device).nonfinite_mask(self.format(layout), layout, chunks)

    def rollback(
        self, layout: Layout, payload: Tensor, mask: Tensor, gradients: Sequence[Tensor], state: FeedbackState
    ) -> None:
        passes = self._passes(payload.device)
        passes.rollback(self.format(layout), layout, payload, mask, gradients, state, self.sparse)

    def _passes(self, device: torch.device) -> kernels.Passes:
        return kernels.passes(self.family, device)

    def payload_nbytes(self, numel: int) -> int:
        return self.chunk_nbytes(self._alone(numel))

    def compress(self, values: Tensor) -> Tensor:
        payload = torch.zeros(self.payload_nbytes(len(values)), dtype=torch.uint8, device=values.device)
        self.encode(self._alone(len(values)), [values.contiguous()], FeedbackState(), payload.unsqueeze(0))
        return payload

    def decompress(self, payload: Tensor, numel: int) -> Tensor:
        values = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.decode(self._alone(numel), payload.unsqueeze(0), [values])
        return values

    def _alone(self, numel: int) -> Layout:
        return pack([numel], self.block, 1)
