"""What the ranks hold back between two steps, and how it moves to other buckets, ranks and files.

A rank's **residual** is ``weight * e``, plus ``E`` for the shard it serves. Summed over ranks it equals
``mean(e_i) + E``, whatever the layout, compressor or world size. Every state change is therefore: export the residual,
build new buckets, import it. With momentum correction the velocity moves along, as ``weight * u``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compressors.base import BOUNDED
from .exchange import Exchange
from .step import Bucket
from .units import LARGEST, rescaled


class Residual(NamedTuple):
    """What a rank holds back of the gradient of a parameter; both float32, of its shape."""

    error: Tensor
    velocity: Tensor | None


def split(residuals: Mapping[str, Residual], ranks: int) -> dict[str, Residual]:
    """The equal part of each of some ranks in what all of them hold together."""
    return {n: Residual(r.error / ranks, None if r.velocity is None else r.velocity / ranks) for n, r in residuals.items()}


def export_residual(exchange: Exchange[Any]) -> tuple[Tensor, Tensor | None]:
    """The residual of this rank in one bucket.

    Returns
    -------
    error, velocity
        ``weight * e + E`` and ``weight * u``, the latter None without momentum correction; float32 ``(whole.numel,)``, new.
    """
    exchange.streams.wait_for_side()
    worker, server = exchange.worker, exchange.server
    error = _spread(exchange, worker.error)
    if server.error is not None:
        error[_served(exchange)] += server.error
        error.clamp_(-LARGEST, LARGEST)
    return error, None if worker.velocity is None else _spread(exchange, worker.velocity)


def _spread(exchange: Exchange[Any], array: Tensor | None) -> Tensor:
    """``weight * array`` of the slice, in an array of the whole that is zero elsewhere; all zero without one."""
    whole = torch.zeros(exchange.whole.numel, dtype=torch.float32, device=exchange.device)
    if array is not None:
        torch.mul(array, exchange.weight, out=whole[exchange.span])
    return whole


def import_residual(exchange: Exchange[Any], error: Tensor, velocity: Tensor | None, step: int) -> None:
    """Replaces what one bucket holds.

    Parameters
    ----------
    error, velocity
        As `export_residual` gives them; outside of the slice nothing is read. Where workers do not compensate, the error must
        be the same on all ranks, each of which holds its equal part.
    step
        How many have been taken.
    """
    worker, server = exchange.worker, exchange.server
    if worker.error is not None:
        torch.div(error[exchange.span], exchange.weight, out=worker.error).clamp_(-LARGEST, LARGEST)
    if server.error is not None:
        server.error.zero_()
        if worker.error is None:
            server.error.add_(error[_served(exchange)], alpha=exchange.workers).clamp_(-LARGEST, LARGEST)
    if worker.velocity is not None:
        if velocity is None:
            worker.velocity.zero_()
        else:
            torch.div(velocity[exchange.span], exchange.weight, out=worker.velocity).clamp_(-LARGEST, LARGEST)
    exchange.steps = worker.step = server.step = step
    exchange.streams.publish()


def _served(exchange: Exchange[Any]) -> slice:
    start = exchange.server.first_shard * exchange.whole.shard_numel
    return slice(start, start + exchange.whole.shard_numel)


def _in_slice(exchange: Exchange[Any], offset: int, numel: int) -> slice:
    """Where a part of the whole lies in the arrays of the slice, as far as it does."""
    start, stop = exchange.span.start, exchange.span.stop
    first = min(max(offset, start), stop) - start
    return slice(first, max(first, min(offset + numel, stop) - start))


def by_parameter(bucket: Bucket[Any], error: Tensor, velocity: Tensor | None) -> dict[str, Residual]:
    """Views of a bucket's arrays, by name of parameter."""
    result = {}
    for name, p, offset in zip(bucket.names, bucket.parameters, bucket.exchange.whole.offsets, strict=True):
        here = slice(offset, offset + p.numel())
        result[name] = Residual(error[here].view(p.shape), None if velocity is None else velocity[here].view(p.shape))
    return result


def by_bucket(bucket: Bucket[Any], residuals: Mapping[str, Residual]) -> tuple[Tensor, Tensor | None]:
    """The arrays of a bucket; zeros where a parameter has no residual."""
    layout, device = bucket.exchange.whole, bucket.exchange.device
    error = torch.zeros(layout.numel, dtype=torch.float32, device=device)
    velocity = None if bucket.exchange.velocity is None else torch.zeros_like(error)
    for name, offset, numel in zip(bucket.names, layout.offsets, layout.numels, strict=True):
        if name in residuals:
            error[offset : offset + numel] = residuals[name].error.to(device).view(-1)
            u = residuals[name].velocity
            if velocity is not None and u is not None:
                velocity[offset : offset + numel] = u.to(device).view(-1)
    return error, velocity


def state_of(bucket: Bucket[Any], p: Tensor) -> list[Tensor]:
    """Views of what this rank holds of one parameter: of both errors, then of the velocity. To change between two steps."""
    exchange, tensor = bucket.exchange, next(i for i, q in enumerate(bucket.parameters) if q is p)
    exchange.streams.wait_for_side()
    layout, worker, server = exchange.whole, exchange.worker, exchange.server
    flat = _in_slice(exchange, layout.offsets[tensor], layout.numels[tensor])
    parts = [] if worker.error is None else [worker.error[flat]]
    if server.error is not None:  # at most one piece of a tensor lies in a shard
        pieces = layout.pieces[server.first_shard]
        at = bisect_left(pieces, tensor, key=lambda piece: piece.tensor)
        if at < len(pieces) and pieces[at].tensor == tensor:
            parts.append(server.error[pieces[at].offset : pieces[at].offset + pieces[at].numel])
    return parts if worker.velocity is None else [*parts, worker.velocity[flat]]


def keep(bucket: Bucket[Any], p: Tensor, aggregated: Tensor) -> None:
    """Adds an aggregated gradient of a parameter, the same on all ranks, to the errors, where it is finite.

    Each rank adds it to its worker error, so that the mean of all is larger by just that.
    """
    exchange, values = bucket.exchange, aggregated.detach().reshape(-1).float()
    layout, values = exchange.whole, values.where(values.isfinite(), 0.0)
    start = layout.offsets[next(i for i, q in enumerate(bucket.parameters) if q is p)]
    if exchange.worker_error is not None:
        here = _in_slice(exchange, start, values.numel())
        first = max(0, exchange.span.start - start)
        exchange.worker_error[here] += values[first : first + here.stop - here.start] / (exchange.weight * exchange.workers)
    elif exchange.server_error is not None:
        at = exchange.server.first_shard * layout.shard_numel - start  # of the shard, in the parameter
        first, last = max(at, 0), min(at + layout.shard_numel, values.numel())
        if first < last:
            exchange.server_error[first - at : last - at] += values[first:last]
    exchange.streams.publish()


def rescale(bucket: Bucket[Any], factor: float, of_parameters: Sequence[float], loss_scale: float) -> None:
    """Multiplies errors and velocity by a factor, and the errors of each parameter by another one; between two steps.

    They end where all ranks' sum does not overflow, at a high loss scale; at a low learning rate where no block's does, since
    nobody would skip that step.
    """
    exchange = bucket.exchange
    largest = LARGEST / (4 * exchange.workers)
    exchange.streams.wait_for_side()
    if factor != 1.0:
        for array in (exchange.worker.error, exchange.server.error, exchange.worker.velocity):
            if array is not None:
                rescaled(array, factor, largest)
    for p, more in zip(bucket.parameters, of_parameters, strict=True):
        if more != 1.0:
            parts = state_of(bucket, p)
            for error in parts if exchange.worker.velocity is None else parts[:-1]:
                rescaled(error, more, min(BOUNDED * loss_scale, largest))
    exchange.streams.publish()


class Frozen:
    """The state of parameters that are frozen for a while, and must not move, apart from all the rest."""

    def __init__(self) -> None:
        self._stashed: dict[Tensor, tuple[Bucket[Any], list[Tensor]]] = {}

    def __contains__(self, p: object) -> bool:
        return p in self._stashed

    def __len__(self) -> int:
        return len(self._stashed)

    def update(self, p: Tensor, bucket: Bucket[Any]) -> None:
        """Stashes the state of a parameter that is frozen now, and restores that of one that is trained again."""
        if not p.requires_grad and p not in self._stashed:
            state = state_of(bucket, p)
            self._stashed[p] = bucket, [part.clone() for part in state]
            for part in state:
                part.zero_()
            bucket.exchange.streams.publish()
        elif p.requires_grad and p in self._stashed:
            self.restore(p)

    def restore(self, p: Tensor) -> None:
        """Puts the state of a parameter back where it was."""
        bucket, stashed = self._stashed.pop(p)
        for part, was in zip(state_of(bucket, p), stashed, strict=True):
            part.copy_(was)
        bucket.exchange.streams.publish()

    def restore_all(self) -> None:
        """Puts all states back, until the next step."""
        for p in list(self._stashed):
            self.restore(p)

    def forget(self) -> None:
        """Drops all states: what the buckets hold is to be replaced."""
        self._stashed.clear()
