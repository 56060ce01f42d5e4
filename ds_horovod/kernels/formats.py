"""What a chunk looks like on the wire: the one statement of it that all kernels are written to.

A payload is a row of equal chunks, one a shard. Chunks and the parts of a chunk start at multiples of 16 bytes, unused
bytes are zero. Numbers are little-endian.
"""

from __future__ import annotations

from typing import NamedTuple

RUN = 65536
"""Elements whose top-k entries share a count, so that an offset fits 16 bits."""

ALL_NOT_FINITE = 0xFFFFFFFF
"""As the first count of a chunk: the whole shard is NaN, and so is the first value."""


def align(nbytes: int) -> int:
    """The next multiple of 16."""
    return -(-nbytes // 16) * 16


class OneBitFormat(NamedTuple):
    """Scales as float32, then one bit an element of the shard: 1 for negative, the first element in the lowest bit.

    A block without a finite scale has the scale NaN and zero bits.
    """

    block: int
    scale: str
    granularity: str
    scales: int
    """float32 scales in a chunk."""
    bits_at: int
    """Byte at which the signs begin."""
    nbytes: int


class TopKFormat(NamedTuple):
    """A uint32 count for each run of 65536 elements, then the entries' uint16 offsets in their runs, then their values.

    Entries stand in ascending order. Values are float32, or float16 where `half`. There may be fewer than k entries: a
    shard with fewer elements sends all of them, a shard with values that are not finite sends only those, as NaN, or,
    where there are more than k of them, travels as NaN altogether.
    """

    k: int
    half: bool
    offsets_at: int
    values_at: int
    nbytes: int
