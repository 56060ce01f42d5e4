"""Exchanges in flight: several at once, in any order, with more stages than two."""

import math

import pytest
import torch
from support import COMPRESSORS, assert_same_bits, gathered, generator

from ds_horovod import DoubleSqueeze, NoCompression, OneBit, TopK
from ds_horovod.double_squeeze import bind
from ds_horovod.in_process import InProcessTransport, Simulation, Workers
from ds_horovod.layout import pack
from ds_horovod.options import Options

SIZES = [5, 700, 63, 1]


@pytest.mark.parametrize("compressor", [OneBit(64), TopK(0.1), TopK(0.1, values="sign"), NoCompression()], ids=repr)
def test_two_steps_of_one_bucket_at_once_keep_the_law(compressor):
    workers, g = 3, generator(0)
    layout = pack(SIZES, compressor.block, workers)
    exchanges = Simulation(layout, Options(compressor), workers).exchanges
    own = [[[torch.randn(n, generator=g) for n in SIZES] for _ in range(2)] for _ in range(workers)]
    results = [[[torch.full((n,), torch.nan) for n in SIZES] for _ in range(2)] for _ in range(workers)]
    before = [[[x.clone() for x in step] for step in steps] for steps in own]
    first = [exchange.begin(steps[0], into[0]) for exchange, steps, into in zip(exchanges, own, results, strict=True)]
    second = [exchange.begin(steps[1], into[1]) for exchange, steps, into in zip(exchanges, own, results, strict=True)]
    assert not any(work.poll(1) for work in first + second)
    for work in first + second:
        assert work.poll(2)
    given = sum(torch.cat(step).double() for steps in before for step in steps) / workers
    got = sum(torch.cat(step).double() for step in results[0])
    errors = sum(gathered(layout, e.worker_error).double() for e in exchanges) / workers
    kept = errors + gathered(layout, torch.cat([e.server_error for e in exchanges])).double()
    torch.testing.assert_close(got + kept, given, rtol=0, atol=1e-5)
    for steps, unchanged in zip(own, before, strict=True):  # the source is read only
        for step, same in zip(steps, unchanged, strict=True):
            assert_same_bits(torch.cat(step), torch.cat(same))
    for into in results[1:]:
        assert_same_bits(torch.cat([torch.cat(step) for step in into]), torch.cat([torch.cat(step) for step in results[0]]))


class Failing(InProcessTransport):
    """A transport whose collectives fail from some moment on, as Horovod's do when a rank is gone."""

    failed = False
    begun = 0

    def push(self, *arguments):
        self.begun += 1
        return super().push(*arguments)

    def poll(self, handle):
        return self.failed or super().poll(handle)

    def wait(self, handle):
        if self.failed:
            raise ConnectionError("a rank is gone")
        return super().wait(handle)


def test_nothing_else_begins_in_a_step_in_which_something_has_failed():
    transport = Failing.group(2)[0]
    parameters = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    squeeze = DoubleSqueeze(OneBit(32), min_numel=1, bucket_cap_mb=1e-6)
    session = bind(squeeze, "failing", [(f"p{i}", p) for i, p in enumerate(parameters)], True, transport).session
    session.started = True
    for p in parameters:
        p.grad = torch.ones(p.shape)
        session.admit(p)
    session.ready(parameters[0])
    assert transport.begun == 1
    transport.failed = True
    for p in parameters[1:]:
        with pytest.raises(ConnectionError):
            session.ready(p)
    for p in parameters:  # not the gradient that has not been averaged
        with pytest.raises(ConnectionError):
            session.finish(p)
    assert transport.begun == 1
    session.cancel()  # the next step
    assert not session.pipeline.in_flight


# ---- transports that match collectives by their order


SHAPES = [(8, 40), (7, 11), (64, 5), (3, 33), (20, 20)]


def train(in_order, orders, steps=3):
    """Workers whose gradients are ready in orders of their own, a bucket each. Returns what the first worker gets."""
    workers, sessions = len(orders), []
    for transport in InProcessTransport.group(workers, in_order=in_order):
        named = [(f"p{i}", torch.zeros(shape, requires_grad=True)) for i, shape in enumerate(SHAPES)]
        squeeze = DoubleSqueeze(OneBit(32), server_compressor=TopK(0.3), min_numel=1, bucket_cap_mb=1e-6)
        sessions.append(bind(squeeze, "ordered", named, True, transport).session)
    results, g = [], generator(1)
    for _ in range(steps):
        for rank, (session, order) in enumerate(zip(sessions, orders, strict=True)):
            gradients = [torch.randn(shape, generator=g) for shape in SHAPES]
            for i in order:
                p = session.parameters[i][1]
                p.grad = gradients[i]
                assert session.admit(p)
                session.ready(p)
                sessions[rank - 1].poll()  # others go on meanwhile, as far as they can
            session.flush()
        for _ in range(2 * len(SHAPES)):
            for session in sessions:
                session.poll()
        finished = [[session.finish(p) for _, p in session.parameters] for session in sessions]
        for other in finished[1:]:
            for ours, theirs in zip(finished[0], other, strict=True):
                assert_same_bits(theirs, ours)
        results += finished[0]
    return results


@pytest.mark.parametrize("orders", [[(4, 3, 2, 1, 0)] * 2, [(0, 1, 2, 3, 4), (4, 2, 0, 1, 3), (3, 4, 0, 2, 1)]], ids=len)
def test_collectives_matched_by_order_give_what_those_matched_by_name_do(orders):
    """The chunks of the buckets differ in size, so that one in the place of another would not fit."""
    for ordered, named in zip(train(True, orders), train(False, orders), strict=True):
        assert_same_bits(ordered, named)


def test_a_pull_waits_for_the_pulls_before_it():
    """The second bucket's push is done first on one worker, and last on the other."""
    begun = []

    class Transport(InProcessTransport):
        blocked = ()

        def push(self, payload, name):
            begun.append((self.rank, name))
            return super().push(payload, name)

        def pull(self, reply, nbytes, name, device):
            begun.append((self.rank, name))
            return super().pull(reply, nbytes, name, device)

        def poll(self, handle):
            return (handle.kind, handle.round) not in self.blocked and super().poll(handle)

    sessions = []
    for transport in Transport.group(2, in_order=True):
        named = [(f"p{i}", torch.zeros(32, 2, requires_grad=True)) for i in range(2)]
        squeeze = DoubleSqueeze(OneBit(32), min_numel=1, bucket_cap_mb=1e-6)
        sessions.append(bind(squeeze, "ordered", named, True, transport).session)
    for session in sessions:
        for _, p in session.parameters:
            p.grad = torch.ones(32, 2)
            session.admit(p)
            session.ready(p)
        session.flush()
    sessions[0].transport.blocked = [("push", 0)]
    for _ in range(2):
        for session in sessions:
            session.poll()
    sessions[0].transport.blocked = ()
    for _ in range(4):
        for session in sessions:
            session.poll()
    for rank in range(2):
        for kind in ("push", "pull"):
            names = [name for r, name in begun if r == rank and name.endswith(kind)]
            assert names == [f"ordered.bucket{b}.{kind}" for b in range(2)]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_chunks_of_a_slice_are_as_large_as_those_of_the_whole(compressor):
    block = math.lcm(compressor.block, 32)
    layout = pack(SIZES, block, 6)
    assert {compressor.chunk_nbytes(layout.slice(first, 2)) for first in (0, 2, 4)} == {compressor.chunk_nbytes(layout)}
    for first in (0, 2, 4):
        for shard in range(2):
            assert layout.slice(first, 2).shard(shard) == layout.shard(first + shard)


# ---- steps that a scaler of the loss skips


class Scaler:
    def get_scale(self):
        return 1.0


SPOILED = {"an element": [3], "a row": range(40), "all": slice(None), "none": []}


@pytest.mark.parametrize("where", SPOILED)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_a_skipped_step_leaves_what_was_there(compressor, where):
    """Errors, and what momentum makes of velocities, on each rank, whatever overflowed on one of them."""
    for options in ({}, {"server": 1}, *([{"momentum": 0.5}] if compressor.sparse else [])):
        named = [(n, torch.zeros(s, requires_grad=True)) for n, s in (("a", (30, 40)), ("b", (7, 40)), ("bias", (9,)))]
        group = Workers(lambda o=options: DoubleSqueeze(compressor, min_numel=64, grad_scaler=Scaler(), **o), named, 3)
        g = generator(3)

        momentum = options.get("momentum", 0.0)

        def held(group=group, momentum=momentum):
            exchanges = [bucket.exchange for session in group.sessions for bucket in session.buckets]
            errors = [e.worker_error.double() + (momentum * e.velocity.double() if momentum else 0.0) for e in exchanges]
            return torch.cat(errors + [e.server_error.double() for e in exchanges if e.server_error is not None])

        for step in range(5):
            gradients = [[torch.randn(p.shape, generator=g) for _, p in named] for _ in range(3)]
            before, velocity = held(), dict(group.reducers[0].velocities.state_dict())
            velocity = {name: u.clone() for name, u in velocity.items()}
            skipped = step in (0, 3)
            if skipped:
                gradients[1][0].view(-1)[SPOILED[where]] = math.inf
                if where == "none":  # of what is compressed
                    gradients[2][2][4] = math.nan
            group.exchange(gradients)
            assert group.sessions[0].skipped == skipped
            if skipped:
                assert (held() - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
                for name, u in group.reducers[0].velocities.state_dict().items():
                    assert_same_bits(u, velocity[name])
            elif compressor != NoCompression():
                assert not torch.equal(held(), before)


@pytest.mark.parametrize("compressor", [OneBit(64), TopK(0.1), NoCompression()], ids=repr)
def test_a_finite_step_is_not_skipped_where_the_host_cannot_look(compressor, monkeypatch):
    """On a GPU `is_within` knows nothing, and says False."""
    named = [("a", torch.zeros(30, 40, requires_grad=True))]
    group = Workers(lambda: DoubleSqueeze(compressor, min_numel=64, grad_scaler=Scaler()), named, 2)
    monkeypatch.setattr(type(compressor), "is_within", lambda *args: False)
    for bad in (False, True):
        gradients = [[torch.ones(30, 40)] for _ in range(2)]
        if bad:
            gradients[1][0][3, 4] = math.nan
        group.exchange(gradients)
        assert [session.skipped for session in group.sessions] == [bad] * 2
