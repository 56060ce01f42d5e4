"""Which element of which tensor lies where: blocks, shards, buckets. Pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Piece(NamedTuple):
    """The part of a tensor that lies in one shard."""

    tensor: int
    """Index of the tensor in the layout."""
    first: int
    """First element of the tensor that belongs to the piece."""
    offset: int
    """Where that element lies, counted from the start of the shard."""
    numel: int


@dataclass(frozen=True)
class Layout:
    """Where some tensors lie in a flat array of `shards` equal shards.

    Tensor i takes the elements ``offsets[i] .. offsets[i] + numels[i]``; offsets ascend, and what lies between two
    tensors is padding, which takes part in no norm, no count and no residual.
    """

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    shards: int
    shard_numel: int
    most: tuple[int, int] | None = None
    """For one shard out of several: `most_elements` and `most_pieces` of them all, since all have chunks of one size."""

    @property
    def numel(self) -> int:
        """Elements of the whole array, padding included."""
        return self.shards * self.shard_numel

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each shard, what lies in it, in order."""
        found: list[list[Piece]] = [[] for _ in range(self.shards)]
        for tensor, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            first = 0
            while first < numel:
                shard, inside = divmod(offset + first, self.shard_numel)
                size = min(numel - first, self.shard_numel - inside)
                found[shard].append(Piece(tensor, first, inside, size))
                first += size
        return tuple(tuple(shard) for shard in found)

    @cached_property
    def most_elements(self) -> int:
        """Elements in the shard that holds the most, padding not counted."""
        return self.most[0] if self.most else max(sum(piece.numel for piece in shard) for shard in self.pieces)

    @cached_property
    def most_pieces(self) -> int:
        """Pieces in the shard that holds the most."""
        return self.most[1] if self.most else max(len(shard) for shard in self.pieces)

    def shard(self, index: int) -> Layout:
        """The layout of one shard alone, whose tensors are the pieces that lie in it. Its chunk is the shard's."""
        return self.slice(index, 1)

    def slice(self, first: int, count: int) -> Layout:
        """The layout of `count` neighbouring shards alone, whose tensors are what lies in them; their chunks stay as they are.

        A bucket that is divided twice, first among the ranks of a host and then among hosts, is packed over all those
        shards, and each rank of a host holds a slice.
        """
        begin = first * self.shard_numel
        end = begin + count * self.shard_numel
        clipped = [(max(o, begin), min(o + n, end)) for o, n in zip(self.offsets, self.numels, strict=True)]
        parts = [(b - begin, e - b) for b, e in clipped if b < e]
        return Layout(
            tuple(offset for offset, _ in parts),
            tuple(numel for _, numel in parts),
            count,
            self.shard_numel,
            (self.most_elements, self.most_pieces),
        )


def pack(numels: Sequence[int], block: int, shards: int) -> Layout:
    """Lays tensors out one after the other, each from a block boundary on, over shards of whole blocks.

    Parameters
    ----------
    numels
        Elements of each tensor, all positive.
    block
        Elements in a block: no block holds elements of two tensors.
    shards
        Equal shards to divide the array into: as many as there are servers.

    Examples
    --------
    >>> pack([5, 64], block=32, shards=2)
    Layout(offsets=(0, 32), numels=(5, 64), shards=2, shard_numel=64)
    """
    offsets = []
    blocks = 0
    for numel in numels:
        offsets.append(blocks * block)
        blocks += -(-numel // block)
    return Layout(tuple(offsets), tuple(numels), shards, -(-blocks // shards) * block)


def fill_buckets(
    nbytes: Sequence[int], kinds: Sequence[Hashable], cap: float | None, groups: Sequence[int | None] | None = None
) -> list[list[int]]:
    """Groups tensors into buckets by their order alone, so that all ranks have the same ones by construction.

    Tensors are taken from the last to the first, which is about the order in which backward produces gradients.

    Parameters
    ----------
    nbytes
        Bytes of each tensor, in the order of registration.
    kinds
        Tensors of different kinds (dtype, device) never share a bucket.
    cap
        Bytes in a bucket, at most, but for a tensor that is larger by itself. None: no limit.
    groups
        Of each tensor, None for those in no group. Tensors of a group and kind are a bucket of their own, of any size.

    Returns
    -------
    list of list of int
        The tensors of each bucket, in the order in which the buckets begin.

    Examples
    --------
    >>> fill_buckets([4, 4, 4], ["f", "f", "f"], cap=8)
    [[2, 1], [0]]
    """
    buckets: list[list[int]] = []
    open_bucket: dict[Hashable, tuple[list[int], int]] = {}
    for i in reversed(range(len(nbytes))):
        group = None if groups is None else groups[i]
        bucket, size = open_bucket.get((kinds[i], group), ([], 0))
        if not bucket or (group is None and cap is not None and size + nbytes[i] > cap):
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(i)
        open_bucket[kinds[i], group] = (bucket, size + nbytes[i])
    return buckets
