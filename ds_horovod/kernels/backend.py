"""What a family of compressors needs of a device: the contract between `compressors` and the modules of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..feedback import FeedbackState
from ..layout import Layout


class Passes(Protocol):
    """The passes of one family on one kind of device.

    The same arguments give the same bits on every device. A pass raises ValueError, and changes nothing, if an argument has
    another size, dtype or device than its layout and format ask for.

    `format` is one of `formats`, and says how a chunk is written. `layout` says where the gradients lie in the flat arrays of
    a bucket and in its shards.
    """

    def prepare(self, format: Any, layout: Layout, device: torch.device) -> None:
        """Does in advance what takes long, before the first pass over a layout."""

    def encode(
        self, format: Any, layout: Layout, gradients: Sequence[Tensor] | None, state: FeedbackState, chunks: Tensor
    ) -> None:
        """The worker pass: payload = Q[v]; error = v - Q[v]. `FeedbackState` states v, and what becomes of the velocity.

        Error and velocity stay as they were where v is not finite.

        Parameters
        ----------
        gradients
            A contiguous tensor for each of the layout's, all float32, float16 or bfloat16. None: v is ``state.total`` or, if
            there is none, ``state.error``.
        state
            Its arrays are float32, ``(layout.numel,)``. Error and velocity are replaced. With a total, which is overwritten,
            the error is replaced only where the reply is finite.
        chunks
            uint8, ``(layout.shards, format.nbytes)``, all zero. Receives the payload.
        """

    def decode(self, format: Any, layout: Layout, chunks: Tensor, gradients: Sequence[Tensor]) -> None:
        """gradients = the values that the chunks stand for, rounded to the gradients' dtype. Finite values stay finite.

        Raises
        ------
        ValueError
            The payload is corrupted in a way that could misplace elements. A GPU decodes it to NaN instead.
        """

    def accumulate(self, format: Any, layout: Layout, pushed: Tensor, weight: float, total: Tensor) -> None:
        """total += weight * the values of each chunk, one worker after the other. Raises as `decode` does.

        Parameters
        ----------
        pushed
            uint8, ``(format.nbytes,)`` or ``(workers, format.nbytes)``, for a layout of one shard.
        total
            float32, ``(layout.shard_numel,)``.
        """

    def is_within(self, format: Any, layout: Layout, chunks: Tensor, limit: float) -> bool:
        """Whether all values of some chunks are finite and, as far as a look at scales tells, at most `limit` in magnitude.

        False where the host would have to wait for the answer.
        """

    def serve(self, format: Any, layout: Layout, pushed: Tensor, weight: float, state: FeedbackState, chunk: Tensor) -> bool:
        """The server pass in one go: v = error + weight * sum_i Q_i; chunk = Q[v]; error = v - Q[v] where Q[v] is finite.

        Returns
        -------
        bool
            False: there is no kernel for this format that does all of it, and nothing has been done. `accumulate` and
            `encode` give the same result.
        """

    def nonfinite_mask(self, format: Any, layout: Layout, chunks: Tensor) -> Tensor | None:
        """Where the values of some chunks are not finite.

        Returns
        -------
        Tensor or None
            int32, ``(layout.numel / 32,)``, one bit for each element, the first one in the lowest bit. None: nowhere, which
            only devices say whose answer the host need not wait for.
        """

    def rollback(
        self,
        format: Any,
        layout: Layout,
        payload: Tensor,
        mask: Tensor,
        gradients: Sequence[Tensor],
        state: FeedbackState,
        sparse: bool,
    ) -> None:
        """Undoes an `encode` where the mask says so: e = e' + Q[v] - g, as `Compressor.rollback` explains.

        Parameters
        ----------
        sparse
            Whether the velocity became zero where an element was sent.
        """


class Backend(Protocol):
    """A module of kernels for one kind of device."""

    @property
    def FAMILIES(self) -> Mapping[str, Passes]:
        """By the name of the family, as `FusedCompressor.family` says."""

    def all_within(self, values: Tensor, limit: float = ...) -> bool:
        """Whether all float32 values are at most `limit` in magnitude. NaN is not. Waits for the device."""
