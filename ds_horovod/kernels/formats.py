"""What a chunk looks like on the wire: the one statement of it that all kernels are written to.

A payload is a row of equal chunks, one a shard. Chunks and the parts of a chunk start at multiples of 16 bytes, unused
bytes are zero. Numbers are little-endian.
"""

from __future__ import annotations

from typing import NamedTuple

RUN = 65536
"""Elements whose top-k entries share a count, so that an offset fits 16 bits."""

ENTRIES = 64
"""Top-k entries that share a magnitude, where only their signs travel."""

READ_AHEAD = 8
"""Unused bytes after the lower bits of top-k entries, which readers may read, but for what they are."""

ALL_NOT_FINITE = 0xFFFFFFFF
"""As the first count of a chunk, or as its k: the whole shard is NaN, and so is the first value, or magnitude."""

RANDOM_K_HEADER = 16
"""Bytes before the values of a random-k chunk."""


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


class QuantizeFormat(NamedTuple):
    """For each block the width of a level as float32, then the blocks' codes: ``level + levels``, from 0 to 2 * levels.

    A block's codes are whole bytes, in which m elements that lie far apart stand together, element ``i * m + j`` of the
    block in byte j (lowest bits first), so that neighbours are packed alike:

    * 8 bits: m is the block; 4 bits: a half; 2 bits: a quarter of it;
    * 3 bits: m is an eighth; the 24 bits of 8 elements are bytes j, m + j and 2 * m + j;
    * 0 bits: base 3, m is a fifth, rounded up; byte j is the sum of ``3**i * code``.

    A block that is not finite has the width NaN and codes of zero.
    """

    block: int
    bits: int
    levels: int
    """On either side of zero."""
    stochastic: bool
    l2: bool
    codes_at: int
    nbytes: int
    seed: int

    @property
    def block_nbytes(self) -> int:
        """Of a block's codes."""
        return self.block * self.bits // 8 if self.bits else -(-self.block // 5)


class CastFormat(NamedTuple):
    """A float for each element of the shard: "fp16" or "bf16", or "fp32", which is no compression.

    What is not finite is NaN: 0x7e00 as fp16, 0x7fc0 as bf16, 0x7fc00000 as fp32.
    """

    dtype: str
    nbytes: int


class RandomKFormat(NamedTuple):
    """A header, from which the positions are drawn again: step, bucket, index of the shard and k, each uint32; then k values.

    Stratum i of the shard's numel elements, padding included, begins at element ``i * numel // k``. Value i belongs to its
    element ``word * length >> 32``, length being the stratum's, and `word` the i-th of all words of the counters (row, step,
    bucket, shard), four for each row from 0 on, under the key ``seed ^ 0x72616e64 << 32`` (``csrc/shared/philox.h``).
    Values that fall into padding are zero.
    """

    k: int
    values: str
    seed: int
    nbytes: int


class TopKFormat(NamedTuple):
    """Where the entries are, and their values, for runs of 65536 elements. In a chunk, one after the other:

    * a uint32 count of entries for each run;
    * sign only: for each 64 entries of a run their magnitude, as bfloat16;
    * upper bits: entry i of a run, at offset x, sets bit ``(x >> low_bits) + i``; with `low_bits` 0, bit ``x``, which is a
      bitmap. A run takes whole bytes, ``ceil((ceil(65536 / 2**low_bits) + entries) / 8)`` of them;
    * lower bits: for each entry the `low_bits` lowest bits of its offset and, sign only, one bit more, 1 for negative,
      one after the other from the lowest bit of a byte on. A run takes whole bytes;
    * fp32 and fp16: values.

    Upper and lower bits are the quasi-succinct code of Elias (1974) and Fano (1971): 2 + log2(elements / k) bits an entry,
    within half a bit of what no code can beat. Entries stand in ascending order. There may be fewer than k: a shard with
    fewer elements sends all of them, a shard with values that are not finite sends only those, as NaN, or, where there are
    more than k of them, travels as NaN altogether.
    """

    k: int
    values: str
    low_bits: int
    scales_at: int
    upper_at: int
    low_at: int
    values_at: int
    nbytes: int

    @property
    def width(self) -> int:
        """Bits of an entry among the lower bits."""
        return self.low_bits + (self.values == "sign")

    def upper_bits(self, run_numel: int, entries: int) -> int:
        """Upper bits of a run of so many elements with so many entries."""
        return -(-run_numel >> self.low_bits) + (entries if self.low_bits else 0)
