"""Layouts and buckets: pure functions whose properties the exchange relies on."""

import itertools
import math

import pytest
import torch
from support import generator

from ds_horovod.layout import Layout, Piece, fill_buckets, pack

SIZES = [[1], [31, 1, 33], [64, 64], [5, 700, 63, 1], [2049, 1, 1, 1, 5000]]


@pytest.fixture(params=[(s, b, n) for s in SIZES for b in (32, 96, 2048) for n in (1, 2, 3, 8)], ids=str)
def packed(request):
    sizes, block, shards = request.param
    return sizes, block, shards, pack(sizes, block, shards)


def test_every_tensor_starts_on_a_block_of_its_own(packed):
    sizes, block, _, layout = packed
    assert layout.numels == tuple(sizes)
    assert all(offset % block == 0 for offset in layout.offsets)
    ends = [offset + numel for offset, numel in zip(layout.offsets, sizes, strict=True)]
    assert all(end <= offset for end, offset in zip(ends, layout.offsets[1:], strict=False))
    assert ends[-1] <= layout.numel


def test_shards_are_equal_and_no_longer_than_needed(packed):
    sizes, block, shards, layout = packed
    assert layout.shards == shards and layout.numel == shards * layout.shard_numel
    blocks = sum(math.ceil(size / block) for size in sizes)
    assert layout.shard_numel == math.ceil(blocks / shards) * block


def test_pieces_hold_every_element_once(packed):
    sizes, _, _, layout = packed
    owners = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    taken = torch.zeros(layout.numel, dtype=torch.int64)
    for shard, pieces in enumerate(layout.pieces):
        assert [p.offset for p in pieces] == sorted(p.offset for p in pieces)
        for piece in pieces:
            assert piece.offset >= 0 and piece.numel > 0 and piece.offset + piece.numel <= layout.shard_numel
            at = shard * layout.shard_numel + piece.offset
            assert at == layout.offsets[piece.tensor] + piece.first
            owners[piece.tensor][piece.first : piece.first + piece.numel] += 1
            taken[at : at + piece.numel] += 1
    assert all((owner == 1).all() for owner in owners)
    assert taken.max() == 1 and taken.sum() == sum(sizes)


def test_a_shard_alone_is_the_shard(packed):
    *_, layout = packed
    for index, pieces in enumerate(layout.pieces):
        shard = layout.shard(index)
        assert (shard.shards, shard.shard_numel) == (1, layout.shard_numel)
        assert shard.pieces == (tuple(Piece(i, 0, p.offset, p.numel) for i, p in enumerate(pieces)),)
        # What a chunk's size depends on is that of all shards, not of this one.
        assert (shard.most_elements, shard.most_pieces) == (layout.most_elements, layout.most_pieces)
    assert layout.most_elements == max(sum(p.numel for p in pieces) for pieces in layout.pieces)
    assert layout.most_pieces == max(len(pieces) for pieces in layout.pieces)


def test_a_layout_written_out():
    layout = pack([40, 5, 64], block=32, shards=2)
    assert layout == Layout(offsets=(0, 64, 96), numels=(40, 5, 64), shards=2, shard_numel=96)
    assert layout.pieces == (
        (Piece(tensor=0, first=0, offset=0, numel=40), Piece(tensor=1, first=0, offset=64, numel=5)),
        (Piece(tensor=2, first=0, offset=0, numel=64),),
    )


def test_a_tensor_over_three_shards():
    assert pack([80], block=32, shards=3).pieces == ((Piece(0, 0, 0, 32),), (Piece(0, 32, 0, 32),), (Piece(0, 64, 0, 16),))


def test_equal_layouts_hash_alike():
    assert hash(pack([40, 5], 32, 2)) == hash(pack([40, 5], 32, 2))


# ---- buckets


@pytest.mark.parametrize("cap", [1, 100, 1000, 10000, None])
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_buckets(cap, kinds):
    g = generator(kinds)
    nbytes = torch.randint(1, 400, (60,), generator=g).tolist()
    kind = torch.randint(0, kinds, (60,), generator=g).tolist()
    buckets = fill_buckets(nbytes, kind, cap)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(60))
    assert [bucket[0] for bucket in buckets] == sorted((bucket[0] for bucket in buckets), reverse=True)
    for bucket in buckets:
        assert bucket == sorted(bucket, reverse=True)
        assert len({kind[i] for i in bucket}) == 1
        assert cap is None or len(bucket) == 1 or sum(nbytes[i] for i in bucket) <= cap
    for k in set(kind):
        own = [bucket for bucket in buckets if kind[bucket[0]] == k]
        assert [i for bucket in own for i in bucket] == [i for i in reversed(range(60)) if kind[i] == k]
        for bucket, following in itertools.pairwise(own):  # a bucket is left only when the next one does not fit
            assert cap is not None and sum(nbytes[i] for i in bucket) + nbytes[following[0]] > cap
    assert cap is not None or len(buckets) == len(set(kind))


def test_a_tensor_over_the_cap_travels_alone():
    assert fill_buckets([1, 100, 1, 1], "ffff", cap=10) == [[3, 2], [1], [0]]


def test_a_full_bucket_may_be_exactly_full():
    assert fill_buckets([5, 5, 5], "fff", cap=10) == [[2, 1], [0]]


def test_no_tensors_no_buckets():
    assert fill_buckets([], [], 10) == []


def test_a_group_is_a_bucket_whatever_its_size():
    groups = [0, None, 0, None, 1, 1]
    assert fill_buckets([9, 5, 9, 5, 1, 1], "ffffff", 6, groups) == [[5, 4], [3], [2, 0], [1]]
    assert fill_buckets([9, 5, 9, 5, 1, 1], "fffffg", 6, groups) == [[5], [4], [3], [2, 0], [1]]
