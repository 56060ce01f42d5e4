"""Residuals are kept when the ranks, the compressor or the layout change."""

import pytest
import torch
from support import generator

import ds_horovod
from ds_horovod import Cast, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.in_process import InProcessTransport, Workers
from ds_horovod.snapshot import rebind, snapshot

SHAPES = {"embedding": (30, 40), "matrix": (50, 21), "bias": (50,)}


def named():
    return [(name, torch.zeros(shape, requires_grad=True)) for name, shape in SHAPES.items()]


def workers(n, **options):
    compressor = options.pop("compressor", TopK(0.1))
    return Workers(lambda: DoubleSqueeze(compressor, **{"min_numel": 64, "bucket_cap_mb": 0.004, **options}), named(), n)


def train(group, g, steps=3):
    """Some steps. Returns the sum of what has arrived, and of mean gradients, by parameter."""
    arrived = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    total = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    for _ in range(steps):
        gradients = [[torch.randn(shape, generator=g) for shape in SHAPES.values()] for _ in group.squeezes]
        for i, name in enumerate(SHAPES):
            total[name] += torch.stack([own[i] for own in gradients]).double().mean(0)
        for name, result in zip(SHAPES, group.exchange(gradients), strict=True):
            arrived[name] += result
    return arrived, total


def total_residual(group):
    """The residual of all workers together, mean_i(e_i) + E, and the mean of the velocities."""
    result = {}
    for squeeze in group.squeezes:
        for name, (error, velocity) in squeeze._reducer.session.export_residual().items():
            before = result.get(name, (0.0, 0.0))
            result[name] = before[0] + error.double(), before[1] + (0.0 if velocity is None else velocity.double())
    return result


def resized(group, n, **options):
    """As an elastic job does it: the first ranks are still there, more may have come."""
    new = workers(n, **options)
    snapshots = [snapshot(squeeze._reducer) for squeeze in group.squeezes]
    for i, squeeze in enumerate(new.squeezes):
        own = snapshots[i] if i < len(snapshots) else snapshot(squeeze._reducer)
        rebind(squeeze._reducer, squeeze._reducer.session.transport, own._replace(shared=snapshots[0].shared))
    return new


def assert_residuals_equal(actual, expected):
    assert actual.keys() == expected.keys() == {"embedding", "matrix"}
    for name in expected:
        for a, e in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


CODECS = [
    OneBit(64),
    OneBit(32, "l2", "bucket"),
    TopK(0.1),
    TopK(0.1, values="sign"),
    Ternary(64),
    Quantize(2, 96),
    Cast("fp16"),
    RandomK(0.2),
    NoCompression(),
]


def test_the_residual_is_what_the_law_counts():
    for options in ({}, {"server": 1}, {"server_error": False}, {"worker_error": False}, {"server_compressor": OneBit(96)}):
        group = workers(3, **options)
        arrived, total = train(group, generator(0))
        for name, (error, _) in total_residual(group).items():
            assert error.abs().max() > 0.01
            if not {"server_error", "worker_error"} & options.keys():
                torch.testing.assert_close(arrived[name] + error, total[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compressor", CODECS, ids=repr)
def test_more_ranks_have_the_total_residual_of_fewer(compressor):
    options = {"compressor": compressor, **({"momentum": 0.5} if compressor.sparse else {})}
    group, g = workers(2, **options), generator(1)
    arrived, total = train(group, g)
    before = total_residual(group)
    group = resized(group, 3, **options)
    assert_residuals_equal(total_residual(group), before)
    if not compressor.sparse:  # with momentum there is more to count
        more, later = train(group, g)
        for name, (error, _) in total_residual(group).items():
            moved = arrived[name] + more[name] + error
            torch.testing.assert_close(moved, total[name] + later[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"server": 0}], ids=str)
def test_ranks_that_stay_keep_their_residuals(options):
    """Of three ranks one leaves, with its residual."""
    group, g = workers(3, **options), generator(2)
    train(group, g)
    group.squeezes = group.squeezes[:2]
    before = total_residual(group)
    group = resized(group, 2, **options)
    assert_residuals_equal(total_residual(group), before)
    train(group, g)


def test_steps_units_and_compressors_are_those_of_the_first_rank():
    group = workers(2, compressor=TopK(0.1), lr_aware=True, momentum=0.5, warmup_steps=5)
    for squeeze in group.squeezes:
        squeeze._reducer.begin_step({"embedding": 0.5})
        squeeze.change_compressor(TopK(0.2), TopK(0.3))
    train(group, generator(3), steps=4)
    velocity = group.squeezes[0]._reducer.velocities.state_dict()["bias"]
    group = resized(group, 3, compressor=TopK(0.1), lr_aware=True, momentum=0.5, warmup_steps=5)
    for squeeze in group.squeezes:
        assert (squeeze.options.compressor, squeeze.options.server_compressor) == (TopK(0.2), TopK(0.3))
        assert squeeze._reducer.units.state_dict() == {"scale": 1.0, "learning_rates": {"embedding": 0.5}}
        assert all(b.exchange.worker.step == b.exchange.server.step == 4 for b in squeeze._reducer.session.buckets)
        assert torch.equal(squeeze._reducer.velocities.state_dict()["bias"], velocity)
        assert not squeeze._reducer.session.started


def test_one_rank_adds_the_residual_of_several_and_several_continue_with_its_velocities():
    options = {"momentum": 0.5}
    group = workers(2, **options)
    train(group, generator(4))
    own = group.squeezes[0]._reducer.session.export_residual()
    alone = workers(2, **options).squeezes[0]
    rebind(alone._reducer, InProcessTransport.group(1)[0], snapshot(group.squeezes[0]._reducer))
    assert alone._reducer.session is None
    assert torch.equal(alone.full_state_dict()["errors"]["matrix"], own["matrix"].error)
    velocities = alone._reducer.velocities.state_dict()
    assert torch.equal(velocities["matrix"], own["matrix"].velocity) and "bias" in velocities
    saved = snapshot(alone._reducer)
    gradients = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    alone._reducer.add_carried_over(gradients.items())
    assert torch.equal(gradients["matrix"], 1 + own["matrix"].error) and torch.equal(gradients["bias"], torch.ones(50))
    alone._reducer.add_carried_over(gradients.items())  # once
    assert torch.equal(gradients["matrix"], 1 + own["matrix"].error)
    new = workers(3, **options)
    for i, squeeze in enumerate(new.squeezes):
        kept = saved if i == 0 else snapshot(squeeze._reducer)._replace(shared=saved.shared)
        rebind(squeeze._reducer, squeeze._reducer.session.transport, kept)
    for name, (error, velocity) in total_residual(new).items():
        torch.testing.assert_close(error, own[name].error.double())
        torch.testing.assert_close(velocity, own[name].velocity.double())


# ---- another compressor


@pytest.mark.parametrize("after", CODECS, ids=repr)
@pytest.mark.parametrize("before", [OneBit(64), TopK(0.1, values="sign")], ids=repr)
def test_the_law_across_a_change_of_compressor(before, after):
    group, g = workers(3, compressor=before), generator(5)
    arrived, total = train(group, g)
    kept = total_residual(group)
    for squeeze in group.squeezes:
        squeeze.change_compressor(after, OneBit(32))
    assert_residuals_equal(total_residual(group), kept)
    assert not any(session.started for session in group.sessions)  # the ranks compare again in the next step
    more, later = train(group, g)
    for name, (error, _) in total_residual(group).items():
        torch.testing.assert_close(arrived[name] + more[name] + error, total[name] + later[name], rtol=1e-4, atol=1e-5)
    assert {b.exchange.compressors() for s in group.sessions for b in s.buckets} == {(after, OneBit(32))}
    assert all(".change1." in b.exchange.name for s in group.sessions for b in s.buckets)


def test_a_change_before_the_optimizer_is_made():
    squeeze = DoubleSqueeze()
    squeeze.change_compressor(OneBit(64))
    assert repr(squeeze) == repr(DoubleSqueeze(OneBit(64)))


def test_a_change_in_mid_step():
    group = workers(2)
    session = group.sessions[0]
    p = session.parameters[0][1]
    p.grad = torch.zeros(30, 40)
    session.admit(p)
    session.ready(p)
    with pytest.raises(RuntimeError, match=r"under way; .* between optimizer\.step\(\) and backward\(\)"):
        group.squeezes[0].change_compressor(OneBit())


def test_a_change_to_what_momentum_cannot_do():
    with pytest.raises(ValueError, match=r"momentum=0\.5 needs a compressor"):
        workers(2, momentum=0.5).squeezes[0].change_compressor(OneBit())
    with pytest.raises(TypeError, match=r"server_compressor must be .*; write OneBit\(\.\.\.\)"):
        workers(2).squeezes[0].change_compressor(OneBit(), OneBit)


# ---- one file for any number of ranks


def full_state(group):
    """`full_state_dict` of all workers: in one process each knows its own alone."""
    states = [squeeze.full_state_dict() for squeeze in group.squeezes]
    for name in states[0]["errors"]:
        states[0]["errors"][name] = sum(state["errors"][name] for state in states)
        if group.squeezes[0].options.momentum:
            states[0]["velocities"][name] = sum(state["velocities"][name] for state in states)
    return states[0]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"server": 0}, {"worker_error": False}], ids=str)
@pytest.mark.parametrize("loaded_first", [False, True])
def test_any_number_of_ranks_loads_the_file(options, loaded_first, tmp_path):
    group = workers(2, **options)
    train(group, generator(6))
    ds_horovod.save(full_state(group), tmp_path / "errors.pt")
    state = torch.load(tmp_path / "errors.pt", weights_only=True)
    for name, tensor in state["errors"].items():
        assert tensor.shape == SHAPES[name] and tensor.abs().max() > 0.01
    for n in (2, 3, 5):
        if loaded_first:

            def make():
                squeeze = DoubleSqueeze(OneBit(96) if not options.get("momentum") else TopK(0.3), min_numel=64, **options)
                squeeze.load_state_dict(state)
                return squeeze

            new = Workers(make, named(), n)
        else:
            new = workers(n, **options)
            for squeeze in new.squeezes:
                squeeze.load_state_dict(state)
        assert_residuals_equal(total_residual(new), total_residual(group))
        train(new, generator(7), steps=1)


def test_a_file_without_a_place():
    group = workers(2, momentum=0.5)
    train(group, generator(8))
    state = full_state(group)
    for n, change, message in (
        (2, {"momentum": 0.0}, "holds velocities, of .* first, but momentum is 0"),
        (2, {"min_numel": 1100}, "holds errors of matrix, which is not compressed here"),
        (3, {"choose": {"matrix": False}}, "holds errors of matrix, which is not compressed here"),
    ):
        new = workers(n, **{"momentum": 0.5, **change})
        before = total_residual(new)
        with pytest.raises(ValueError, match=message):
            new.squeezes[0].load_state_dict(state)
        for name, (error, velocity) in total_residual(new).items():
            assert torch.equal(error, before[name][0]) and torch.equal(
                torch.as_tensor(velocity), torch.as_tensor(before[name][1])
            )
    squeeze = workers(2, momentum=0.5).squeezes[0]
    for key, value, message in (
        ("errors", {"lost": torch.zeros(3)}, "holds errors of lost, which is not a parameter here"),
        ("velocities", {"bias": torch.zeros(3)}, r"holds velocities of bias of shape \(3,\), here \(50,\)"),
        ("format", 3, "of format 3, this is format 4"),
    ):
        with pytest.raises(ValueError, match=message):
            squeeze.load_state_dict({**state, key: value})
    without = workers(2, worker_error=False, server_error=False).squeezes[0]
    with pytest.raises(ValueError, match="holds errors, but neither worker_error nor server_error is on"):
        without.load_state_dict({**state, "velocities": {}})


def test_names_of_collectives_are_new_where_a_rank_has_failed():
    reducer = workers(2).squeezes[0]._reducer
    names = []
    for era in ("", "1f", "2e", ""):
        rebind(reducer, InProcessTransport.group(2)[0], snapshot(reducer), era)
        names.append([reducer.name, *(bucket.exchange.name for bucket in reducer.session.buckets)])
    first, second, third, fourth = names
    assert not set(first) & set(second) and not set(second) & set(third) and fourth == third
    assert all(name.startswith(f"{first[0]}.1f") for name in second) and all(
        name.startswith(f"{first[0]}.2e") for name in third
    )
