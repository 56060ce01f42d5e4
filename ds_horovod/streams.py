"""The order of work on a GPU: backward and the worker pass on one stream, servers and decoders beside it on another."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of high priority on which servers and decoders work while backward goes on, one for each GPU."""
    return torch.cuda.Stream(device, priority=-1)


class Streams:
    """Who waits for whom, for one bucket. On a CPU nothing waits, and every method does nothing.

    Parameters
    ----------
    device
        The device of the bucket.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side_stream(device) if device.type == "cuda" else None
        self._producers: set[torch.cuda.Stream] = set()

    def mark_ready(self) -> None:
        """A gradient of the bucket has been made on the current stream."""
        if self._side is not None:
            self._producers.add(torch.cuda.current_stream(self._device))

    def wait_for_producers(self, gradients: Sequence[Tensor]) -> None:
        """The current stream, which is about to read the gradients, waits for the streams that made them."""
        if self._side is None:
            return
        current = torch.cuda.current_stream(self._device)
        for stream in self._producers - {current}:
            current.wait_stream(stream)
            for gradient in gradients:  # made by one of them, and read by this one
                gradient.record_stream(current)
        self._producers.clear()

    def side(self) -> contextlib.AbstractContextManager[object]:
        """Inside, everything is queued on the side stream."""
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def record_stream(self, tensor: Tensor, after_default: bool = False) -> Tensor:
        """Marks a tensor allocated on another stream as used by the side stream, so that the allocator does not reuse it early.

        Parameters
        ----------
        tensor
            Returned as it is.
        after_default
            Whether its contents are there only once the device's default stream has come so far.
        """
        if self._side is not None:
            if after_default:
                self._side.wait_stream(torch.cuda.default_stream(self._device))
            tensor.record_stream(self._side)
        return tensor

    def wait_for_side(self) -> None:
        """The current stream waits for what the side stream has been given."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def publish(self) -> None:
        """Feedback states have been changed on the current stream: passes on other streams wait for it."""
        self.mark_ready()
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
