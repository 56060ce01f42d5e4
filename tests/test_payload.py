"""What travels: its size, its format, and that no payload, however corrupted, writes where it must not."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from support import COMPRESSORS, Int8, assert_same_bits, generator
from test_kernels import oracle

from ds_horovod import Cast, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.feedback import FeedbackState
from ds_horovod.kernels import cpu
from ds_horovod.layout import pack

SIZES = [[1], [40], [5, 700, 63, 1], [70000, 33, 1]]
EVERY = [
    *COMPRESSORS,
    OneBit(),
    OneBit(32, "l2"),
    OneBit(96, granularity="parameter"),
    TopK(),
    TopK(1.0, values="fp16"),
    TopK(0.2, values="sign"),
    RandomK(),
    RandomK(1.0, seed=2**64 - 1),
]
TOP_K = [TopK(0.05), TopK(0.05, values="fp16"), TopK(0.05, values="sign"), TopK(k=3), TopK(1.0), TopK(1.0, values="sign")]
GUARD = 64  # elements before and after what may be written
MARK = 77

every_compressor = pytest.mark.parametrize("compressor", EVERY, ids=repr)
every_top_k = pytest.mark.parametrize("compressor", TOP_K, ids=repr)


class Guarded:
    """A tensor within a larger buffer, which nobody may touch."""

    def __init__(self, *shape, dtype=torch.float32, fill=5):
        self.buffer = torch.full((math.prod(shape) + 2 * GUARD,), MARK, dtype=dtype)
        self.tensor = self.buffer[GUARD:-GUARD].view(shape).fill_(fill)
        self.fill = fill

    def guard_holds(self):
        return bool((self.buffer[:GUARD] == MARK).all() and (self.buffer[-GUARD:] == MARK).all())

    def is_untouched(self):
        return self.guard_holds() and bool((self.tensor == self.fill).all())


def encoded(compressor, layout, seed=0):
    g = generator(seed)
    gradients = [torch.randn(numel, generator=g) for numel in layout.numels]
    payload = Guarded(layout.shards, compressor.chunk_nbytes(layout), dtype=torch.uint8, fill=0)
    error = Guarded(layout.numel, fill=0)
    compressor.encode(layout, gradients, FeedbackState(error.tensor), payload.tensor)
    assert payload.guard_holds() and error.guard_holds()
    return payload.tensor


# ---- sizes and formats, written out independently


def up16(nbytes):
    return (nbytes + 15) // 16 * 16


def top_k_parts(compressor, layout):
    """Where the parts of a chunk begin, and how many lower bits an entry has."""
    numel, runs = layout.shard_numel, math.ceil(layout.shard_numel / 65536)
    most = max(sum(piece.numel for piece in pieces) for pieces in layout.pieces) if layout.most is None else layout.most[0]
    k = min(compressor.k or math.ceil(round(compressor.ratio * most, 6)), most)
    sign = compressor.values == "sign"
    found = []
    for b in range(16):
        scales = up16(4 * runs)
        upper = up16(scales + 2 * (math.ceil(k / 64) + runs) * sign)
        low = up16(upper + (math.ceil(numel / 2**b) + (k if b else 0) + 7 * runs) // 8)
        values = up16(low + (k * (b + sign) + 7 * runs) // 8 + 8)
        end = up16(values + {"fp32": 4, "fp16": 2, "sign": 0}[compressor.values] * k)
        found.append({"k": k, "low_bits": b, "scales": scales, "upper": upper, "low": low, "values": values, "end": end})
    return min(found, key=lambda parts: parts["end"])


def code_nbytes(compressor):
    """Of one block."""
    return math.ceil(compressor.block / 5) if isinstance(compressor, Ternary) else compressor.block * compressor.bits // 8


def random_k(compressor, shard_numel):
    return max(1, math.ceil(round(compressor.ratio * shard_numel, 6)))


def expected_nbytes(compressor, layout):
    numels = [sum(piece.numel for piece in pieces) for pieces in layout.pieces]
    if isinstance(compressor, OneBit):
        scales = {"block": layout.shard_numel // compressor.block, "bucket": 1}.get(compressor.granularity)
        scales = max(map(len, layout.pieces)) if scales is None else scales
        return up16(4 * scales) + up16(layout.shard_numel // 8)
    if isinstance(compressor, TopK):
        return top_k_parts(compressor, layout)["end"]
    if isinstance(compressor, (Quantize, Ternary)):
        blocks = layout.shard_numel // compressor.block
        return up16(4 * blocks) + up16(blocks * code_nbytes(compressor))
    if isinstance(compressor, Cast):
        return up16(2 * layout.shard_numel)
    if isinstance(compressor, RandomK):
        return 16 + up16((4 if compressor.values == "fp32" else 2) * random_k(compressor, layout.shard_numel))
    if isinstance(compressor, NoCompression):
        return up16(4 * layout.shard_numel)
    return up16(16 + compressor.payload_nbytes(max(numels)))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@every_compressor
def test_size(compressor, sizes, shards):
    layout = pack(sizes, compressor.block, shards)
    nbytes = compressor.chunk_nbytes(layout)
    assert nbytes == expected_nbytes(compressor, layout)
    assert nbytes == compressor.chunk_nbytes(pack(sizes, compressor.block, shards))
    assert nbytes % 16 == 0
    # A server knows one shard only, and must come to the same size.
    assert {compressor.chunk_nbytes(layout.shard(shard)) for shard in range(shards)} == {nbytes}


@pytest.mark.parametrize("numel", [1, 33, 70000])
@every_compressor
def test_what_is_written_is_as_long_as_declared(compressor, numel):
    values = torch.randn(numel, generator=generator(0))
    payload = compressor.compress(values)
    assert payload.dtype == torch.uint8 and payload.shape == (compressor.payload_nbytes(numel),)
    assert compressor.decompress(payload, numel).shape == (numel,)


def test_sizes_do_not_fall():
    for compressor in EVERY:
        sizes = [compressor.payload_nbytes(numel) for numel in range(1, 3000)]
        assert sizes == sorted(sizes)


def one_bit_values(compressor, layout, shard, chunk):
    """As the format says: scales, then signs."""
    scales = {"block": layout.shard_numel // compressor.block, "parameter": layout.most_pieces, "bucket": 1}
    count = scales[compressor.granularity]
    scale = chunk[: 4 * count].view(np.float32)
    signs = 1 - 2.0 * np.unpackbits(chunk[up16(4 * count) :], bitorder="little")
    result = np.zeros(layout.shard_numel, np.float32)
    for slot, piece in enumerate(layout.pieces[shard]):
        at = np.arange(piece.offset, piece.offset + piece.numel)
        which = {"block": at // compressor.block, "parameter": slot, "bucket": 0}[compressor.granularity]
        result[at] = scale[which] * signs[at]
    return result


def quantized_values(compressor, layout, shard, chunk):
    """As the format says, element by element."""
    blocks, nbytes = layout.shard_numel // compressor.block, code_nbytes(compressor)
    step = chunk[: 4 * blocks].view(np.float32)
    codes = chunk[up16(4 * blocks) :][: blocks * nbytes].reshape(blocks, nbytes)
    bits = 0 if isinstance(compressor, Ternary) else compressor.bits
    levels = 2 ** (bits - 1) - 1 if bits else 1
    result = np.zeros((blocks, compressor.block), np.float32)
    for element in range(compressor.block):
        if not bits:
            code = codes[:, element % nbytes] // 3 ** (element // nbytes) % 3
        elif bits == 3:
            m = compressor.block // 8
            word = sum(codes[:, part * m + element % m].astype(int) << 8 * part for part in range(3))
            code = word >> 3 * (element // m) & 7
        else:
            code = codes[:, element % nbytes] >> bits * (element // nbytes) & (1 << bits) - 1
        result[:, element] = (code.astype(np.float32) - levels) * step
    return result.reshape(-1)


def top_k_values(compressor, layout, shard, chunk):
    """As the format says, entry by entry."""
    at = top_k_parts(compressor, layout)
    sign, b = compressor.values == "sign", at["low_bits"]
    every_bit = np.unpackbits(chunk, bitorder="little")
    upper, low, scale, entry = 8 * at["upper"], 8 * at["low"], at["scales"], 0
    result = np.zeros(layout.shard_numel, np.float32)
    runs = math.ceil(layout.shard_numel / 65536)
    for run, count in enumerate(chunk[: 4 * runs].view(np.uint32)):
        rows = math.ceil(min(65536, layout.shard_numel - run * 65536) / 2**b)
        length = rows + (int(count) if b else 0)
        ones = np.flatnonzero(every_bit[upper : upper + length])
        assert len(ones) == count
        for i, one in enumerate(ones):
            field = every_bit[low + i * (b + sign) :][: b + sign]
            offset = (int(one) - (i if b else 0)) * 2**b + int(field[:b] @ 2 ** np.arange(b))
            if sign:
                mean = (chunk[scale + i // 64 * 2 :][:2].view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0]
                value = -mean if field[b] else mean
            else:
                dtype = np.dtype(np.float16 if compressor.values == "fp16" else np.float32)
                value = chunk[at["values"] + dtype.itemsize * entry :][: dtype.itemsize].view(dtype)[0]
            result[run * 65536 + offset] = value
            entry += 1
        upper += 8 * math.ceil(length / 8)
        low += 8 * math.ceil(count * (b + sign) / 8)
        scale += 2 * math.ceil(count / 64)
    return result


def cast_values(compressor, layout, shard, chunk):
    words = chunk[: 2 * layout.shard_numel].view(np.uint16)
    if compressor.dtype == "fp16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def philox(x, key):
    """The four words of a counter, as Salmon et al. (2011) define them."""
    for i in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        low, high = (k + i * weyl & 2**32 - 1 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        x = b >> 32 ^ x[1] ^ low, b & 2**32 - 1, a >> 32 ^ x[3] ^ high, a & 2**32 - 1
    return x


def random_k_values(compressor, layout, shard, chunk):
    """As the format says, stratum by stratum."""
    numel, k = layout.shard_numel, random_k(compressor, layout.shard_numel)
    header = list(map(int, chunk[:16].view(np.uint32)))
    assert header == [0, 0, shard, k]
    values = chunk[16:].view(np.float32 if compressor.values == "fp32" else np.float16)
    key = compressor.seed % 2**32, compressor.seed >> 32 ^ 0x72616E64
    result = np.zeros(numel, np.float32)
    for i in range(k):
        if i % 4 == 0:
            words = philox((i // 4, *header[:3]), key)
        begin, end = i * numel // k, (i + 1) * numel // k
        result[begin + (words[i % 4] * (end - begin) >> 32)] = values[i]
    return result


READERS = {
    OneBit: one_bit_values,
    TopK: top_k_values,
    Quantize: quantized_values,
    Ternary: quantized_values,
    Cast: cast_values,
    NoCompression: lambda compressor, layout, shard, chunk: chunk.view(np.float32),
    RandomK: random_k_values,
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("compressor", [q for q in EVERY if isinstance(q, tuple(READERS))], ids=repr)
def test_the_format_is_as_documented(compressor, sizes, shards):
    layout = pack(sizes, compressor.block, shards)
    payload = encoded(compressor, layout)
    decoded = [torch.empty(numel) for numel in sizes]
    compressor.decode(layout, payload, decoded)
    read = READERS[type(compressor)]
    for shard, pieces in enumerate(layout.pieces):
        values = torch.from_numpy(read(compressor, layout, shard, payload[shard].numpy()))
        for p in pieces:
            own = decoded[p.tensor][p.first : p.first + p.numel]
            assert torch.equal(own, values[p.offset : p.offset + p.numel])


# ---- payloads that no encoder writes


def decode_and_watch(compressor, layout, payload):
    """Decodes into guarded tensors. Returns them, or None if the payload was refused, and then nothing was written."""
    outputs = [Guarded(numel) for numel in layout.numels]
    try:
        compressor.decode(layout, payload, [output.tensor for output in outputs])
    except ValueError:
        assert all(output.is_untouched() for output in outputs)
        return None
    assert all(output.guard_holds() for output in outputs)
    return torch.cat([output.tensor for output in outputs])


def accumulate_and_watch(compressor, layout, chunk):
    """As `decode_and_watch`, for one shard of a layout."""
    total = Guarded(layout.shard_numel)
    try:
        compressor.accumulate(layout, chunk, 0.5, total.tensor)
    except ValueError:
        assert total.is_untouched()
        return None
    assert total.guard_holds()
    return total.tensor


@pytest.mark.parametrize("compressor", [q for q in EVERY if not isinstance(q, Int8)], ids=repr)
def test_another_size(compressor):
    layout = pack([5, 700, 63, 1], compressor.block, 2)
    payload = encoded(compressor, layout)
    longer = torch.cat([payload, torch.zeros(2, 16, dtype=torch.uint8)], 1)
    for wrong in (payload[:, :-16], longer, payload[:1], torch.cat([payload, payload[:1]]), payload[:, :0]):
        assert decode_and_watch(compressor, layout, wrong.contiguous()) is None
    for wrong in (payload[0, :-16], longer[0], payload[0, :0]):
        assert accumulate_and_watch(compressor, layout.shard(0), wrong.contiguous()) is None
    alone = compressor.compress(torch.ones(1000))
    with pytest.raises(ValueError):
        compressor.decompress(alone[:-16], 1000)


@pytest.mark.parametrize("compressor", [q for q in EVERY if not isinstance(q, Int8)], ids=repr)
def test_pushes_of_another_size(compressor):
    """Neither more nor fewer bytes a worker, even where they add up to a whole number of chunks."""
    layout = pack([5, 700, 63, 1], compressor.block, 1)
    pushed = encoded(compressor, layout).repeat(4, 1)
    reply = torch.zeros_like(pushed[0])
    for wrong in (pushed.view(2, -1), pushed.view(-1), torch.cat([pushed, pushed[:, :16]], 1), pushed[:, :-16].contiguous()):
        error, total = Guarded(layout.numel), Guarded(layout.numel)
        with pytest.raises(ValueError):
            compressor.serve(layout, wrong, compressor, 0.25, FeedbackState(error.tensor), reply)
        with pytest.raises(ValueError):
            compressor.accumulate(layout, wrong, 0.25, total.tensor)
        with pytest.raises(ValueError):
            compressor.is_within(layout, wrong)
        with pytest.raises(ValueError):
            compressor.nonfinite_mask(layout, wrong)
        assert error.is_untouched() and total.is_untouched() and not reply.any()
    compressor.serve(layout, pushed, compressor, 0.25, FeedbackState(torch.zeros(layout.numel)), reply)


@pytest.mark.parametrize("compressor", [q for q in EVERY if not isinstance(q, Int8)], ids=repr)
def test_as_many_bytes_in_other_rows(compressor):
    """Their total says nothing: pushes of half as many workers must not be taken for those of all."""
    layout = pack([5, 700, 63, 1], compressor.block, 2)
    payload = encoded(compressor, layout)
    shard, flat = layout.shard(0), payload.view(-1)
    error = Guarded(shard.numel)
    for wrong in (flat, flat.view(1, -1), flat.view(4, -1), flat.view(2, 1, -1)[:, :, :-16], payload[:1], payload.T):
        with pytest.raises(ValueError):
            compressor.nonfinite_mask(layout, wrong)
        with pytest.raises(ValueError):
            compressor.encode(layout, None, FeedbackState(torch.zeros(layout.numel)), torch.zeros_like(wrong))
    for wrong in (flat, flat.view(1, -1), flat.view(4, -1), payload.T):
        with pytest.raises(ValueError):
            compressor.is_within(layout, wrong)
        for pusher in (compressor, Int8()):
            with pytest.raises(ValueError):
                reply = torch.zeros(compressor.chunk_nbytes(shard), dtype=torch.uint8)
                compressor.serve(shard, wrong, pusher, 0.5, FeedbackState(error.tensor), reply)
    for wrong in (flat, payload.clone()):  # replies of two shards
        with pytest.raises(ValueError):
            compressor.serve(shard, payload, compressor, 0.5, FeedbackState(error.tensor), wrong.zero_())
    assert error.is_untouched()


@every_top_k
def test_a_payload_that_is_not_zero_at_first(compressor):
    """Whatever it holds, every thread writes its entries at their places, and nothing outside."""
    layout = pack([300_000, 33, 1], compressor.block, 1)
    gradients = [torch.randn(numel, generator=generator(0)) for numel in layout.numels]
    payloads = []
    for threads in (1, 3):
        payload = Guarded(1, compressor.chunk_nbytes(layout), dtype=torch.uint8, fill=255)
        with mock.patch.object(cpu, "_threads", return_value=threads):
            compressor.encode(layout, gradients, FeedbackState(), payload.tensor)
        assert payload.guard_holds()
        payloads.append(payload.tensor)
    assert torch.equal(*payloads)


def with_entries(compressor, layout, entries, counts=None, stray_bits=()):
    """A chunk that says there are entries at these offsets of its first run, and perhaps another count."""
    at, chunk = top_k_parts(compressor, layout), np.zeros(compressor.chunk_nbytes(layout), np.uint8)
    counts = [len(entries)] if counts is None else counts
    chunk[: 4 * len(counts)].view(np.uint32)[:] = counts
    b, width = at["low_bits"], at["low_bits"] + (compressor.values == "sign")
    ones = [(offset >> b) + (i if b else 0) for i, offset in enumerate(entries)] + list(stray_bits)
    for one in ones:
        chunk[at["upper"] + one // 8] |= 1 << one % 8
    for i, offset in enumerate(entries):
        for j in range(b):
            bit = i * width + j
            chunk[at["low"] + bit // 8] |= (offset >> j & 1) << bit % 8
    return torch.from_numpy(chunk).view(1, -1)


def is_refused(compressor, layout, payload):
    decoded = decode_and_watch(compressor, layout, payload), accumulate_and_watch(compressor, layout, payload[0])
    assert (decoded[0] is None) == (decoded[1] is None)
    return decoded[0] is None


@pytest.mark.parametrize("sizes", [[2000], [70000, 33, 1]], ids=str)
@every_top_k
def test_corrupted_top_k(compressor, sizes):
    layout = pack(sizes, compressor.block, 1)
    assert not is_refused(compressor, layout, with_entries(compressor, layout, [7]))
    assert not is_refused(compressor, layout, with_entries(compressor, layout, [6, 7]))
    for counts in ([2**32 - 1], [2**31], [65537], [0], [2], [top_k_parts(compressor, layout)["k"] + 1]):
        payload = with_entries(compressor, layout, [7], counts)
        assert is_refused(compressor, layout, payload)
        with pytest.raises(ValueError, match="corrupted top-k payload"):
            compressor.decode(layout, payload, [torch.empty(numel) for numel in sizes])
    # more entries than are counted; two at one place; one before the other in a row of the lower bits
    assert is_refused(compressor, layout, with_entries(compressor, layout, [7], [1], stray_bits=[6]))
    if top_k_parts(compressor, layout)["low_bits"]:
        assert is_refused(compressor, layout, with_entries(compressor, layout, [7, 7]))
        assert is_refused(compressor, layout, with_entries(compressor, layout, [7, 6]))


@every_top_k
def test_counts_over_k(compressor):
    layout = pack([70000, 33, 1], compressor.block, 1)
    payload = encoded(compressor, layout)
    counts = payload[0, :8].numpy().view(np.uint32)
    assert counts.sum() == min(compressor.k or math.ceil(compressor.ratio * 70034), 70034)
    counts[1] += 1
    assert is_refused(compressor, layout, payload)


@pytest.mark.parametrize(
    "sizes, offset", [([40], 40), ([40], 63), ([5, 33], 5), ([5, 33], 31), ([5, 33], 65), ([5, 33], 95)], ids=str
)
@every_top_k
def test_offsets_where_no_element_is(compressor, sizes, offset):
    layout = pack(sizes, compressor.block, 1)
    for good in (0, sizes[0] - 1, layout.offsets[-1] + sizes[-1] - 1):
        assert not is_refused(compressor, layout, with_entries(compressor, layout, [good]))
    assert is_refused(compressor, layout, with_entries(compressor, layout, [offset]))


def test_one_corrupted_chunk_refuses_the_payload():
    compressor, layout = TopK(0.05), pack([2000], 32, 3)
    payload = encoded(compressor, layout)
    payload[2, 0] = 255
    assert decode_and_watch(compressor, layout, payload) is None


def random_corruptions(payload, tries):
    """Random bytes at a few places, then everywhere."""
    for seed in range(tries):
        g = generator(seed)
        noise = torch.randint(0, 256, payload.shape, generator=g, dtype=torch.uint8)
        touched = torch.rand(payload.shape, generator=g) < (2 / payload.shape[1] if seed % 5 else 1.0)
        yield torch.where(touched, noise, payload)


@pytest.mark.parametrize(
    "compressor",
    [TopK(0.05), TopK(0.2, values="sign"), TopK(k=3), TopK(1.0, values="fp16"), RandomK(0.1), OneBit(64)],
    ids=repr,
)
def test_random_bytes(compressor):
    """Refused, or decoded to what the oracle makes of them."""
    layout = pack([5, 700, 63, 1], compressor.block, 2)
    refused = 0
    for payload in random_corruptions(encoded(compressor, layout), 500):
        native = decode_and_watch(compressor, layout, payload), accumulate_and_watch(compressor, layout.shard(0), payload[0])
        with oracle():
            expected = (
                decode_and_watch(compressor, layout, payload),
                accumulate_and_watch(compressor, layout.shard(0), payload[0]),
            )
        refused += native[0] is None
        for own, other in zip(native, expected, strict=True):
            assert (own is None) == (other is None)
            if own is not None:
                assert_same_bits(own, other)
    assert refused == 0 if isinstance(compressor, OneBit) else 100 <= refused < 500


@pytest.mark.parametrize(
    "compressor", [q for q in EVERY if isinstance(q, (OneBit, Quantize, Ternary, Cast, NoCompression))], ids=repr
)
def test_blocks_take_any_bytes(compressor):
    """As the oracle does: there is nothing in them that could point anywhere."""
    layout = pack([5, 700, 63, 1], compressor.block, 2)
    for seed in range(20):
        g = generator(seed)
        payload = torch.randint(0, 256, (2, compressor.chunk_nbytes(layout)), generator=g, dtype=torch.uint8)
        native = decode_and_watch(compressor, layout, payload), accumulate_and_watch(compressor, layout.shard(0), payload[0])
        with oracle():
            expected = (
                decode_and_watch(compressor, layout, payload),
                accumulate_and_watch(compressor, layout.shard(0), payload[0]),
            )
        for own, other in zip(native, expected, strict=True):
            assert_same_bits(own, other)


@pytest.mark.parametrize("flag", [3, 128, 255])
def test_a_corrupted_flag_of_a_users_compressor(flag):
    compressor, layout = Int8(), pack([40, 5], 32, 2)
    payload = encoded(compressor, layout)
    payload[0, 0] = flag
    assert decode_and_watch(compressor, layout, payload) is None
    assert accumulate_and_watch(compressor, layout.shard(0), payload[0]) is None
    with pytest.raises(ValueError, match=rf"corrupted payload of Int8\(\): a chunk begins with {flag}"):
        compressor.decode(layout, payload, [torch.empty(40), torch.empty(5)])


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_corrupted_random_k(values):
    compressor, layout = RandomK(0.1, values=values), pack([5, 700, 63, 1], 32, 2)
    payload = encoded(compressor, layout)
    k = random_k(compressor, layout.shard_numel)
    for wrong in (0, k - 1, k + 1, 2**31, 2**32 - 1):  # the last says that all is NaN, which the first value must be
        spoiled = payload.clone()
        spoiled[1].numpy()[12:16].view(np.uint32)[0] = wrong
        assert decode_and_watch(compressor, layout, spoiled) is None
        assert accumulate_and_watch(compressor, layout.shard(1), spoiled[1]) is None
        with pytest.raises(ValueError, match="corrupted random-k payload: another k than the layout's"):
            compressor.decode(layout, spoiled, [torch.empty(numel) for numel in layout.numels])


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_random_k_of_what_is_not_finite(values):
    """The shard travels as NaN and keeps its error, and another shard knows nothing of it."""
    compressor, layout = RandomK(0.1, values=values), pack([5, 700, 63, 1], 32, 2)
    gradients = [torch.ones(numel) for numel in layout.numels]
    gradients[1][3] = math.inf
    error = torch.full((layout.numel,), 0.5)
    payload = torch.zeros(2, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    compressor.encode(layout, gradients, FeedbackState(error), payload)
    decoded = decode_and_watch(compressor, layout, payload)
    in_first = 5 + layout.shard_numel - layout.offsets[1]
    assert decoded[:in_first].isnan().all() and decoded[in_first:].isfinite().all()
    assert (error[: layout.shard_numel] == 0.5).all() and (error[layout.shard_numel :] != 0.5).any()
    assert not compressor.is_within(layout, payload)
    assert compressor.is_within(layout.shard(1), payload[1:])
    total = accumulate_and_watch(compressor, layout.shard(0), payload[0])
    assert total[:5].isnan().all() and (total[5:32] == 5).all()  # padding


def test_payloads_of_another_dtype_or_layout_in_memory():
    compressor, layout = OneBit(64), pack([1000], 64, 1)
    payload = encoded(compressor, layout)
    with pytest.raises(ValueError, match="contiguous uint8 payload"):
        compressor.decode(layout, payload.int(), [torch.empty(1000)])
    with pytest.raises(ValueError, match="contiguous uint8 payload"):
        compressor.decode(layout, torch.cat([payload, payload], 1)[:, ::2], [torch.empty(1000)])
    with pytest.raises(ValueError, match="aligned"):
        compressor.decode(layout, torch.cat([payload[0, :1], payload[0]])[1:].view(1, -1), [torch.empty(1000)])


def test_gradients_of_another_layout():
    compressor, layout = OneBit(64), pack([1000, 40], 64, 1)
    payload = encoded(compressor, layout)
    bad = [
        [torch.empty(1000)],
        [torch.empty(999), torch.empty(40)],
        [torch.empty(1000), torch.empty(40).half()],
        [torch.empty(2000)[::2], torch.empty(40)],
    ]
    for gradients in bad:
        with pytest.raises(ValueError):
            compressor.decode(layout, payload, gradients)
        with pytest.raises(ValueError):
            compressor.encode(layout, gradients, FeedbackState(), payload)
    with pytest.raises(ValueError, match="expected 1088 contiguous float32 values"):
        compressor.encode(layout, [torch.zeros(1000), torch.zeros(40)], FeedbackState(torch.zeros(1040)), payload)
