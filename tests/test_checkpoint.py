"""Errors survive a checkpoint exactly, and never end up where they do not belong."""

import copy
import gc
import io
import weakref

import pytest
import torch
from support import assert_same_bits, generator

from ds_horovod import DoubleSqueeze, OneBit, TopK
from ds_horovod.double_squeeze import bind, tensor_reducer
from ds_horovod.in_process import InProcessTransport

MIXED = (OneBit(32), TopK(0.1))
SHAPES = {"first": (8, 40), "middle": (7, 11), "bias": (9,), "last": (64, 5)}


class Run:
    """Some ranks that exchange gradients, step after step."""

    def __init__(self, size=2, shapes=SHAPES, server=None, compressors=MIXED, states=None, **options):
        compressor, server_compressor = compressors
        options = {"min_numel": 1, "bucket_cap_mb": 0.002, **options}
        self.squeezes, self.parameters, self.sessions = [], [], []
        for rank, transport in enumerate(InProcessTransport.group(size, server)):
            parameters = [(name, torch.zeros(shape, requires_grad=True)) for name, shape in shapes.items()]
            squeeze = DoubleSqueeze(compressor, server_compressor=server_compressor, server=server, **options)
            if states is not None:
                squeeze.load_state_dict(states[rank])
            self.sessions.append(bind(squeeze, "run", parameters, True, transport).session)
            self.squeezes.append(squeeze)
            self.parameters.append([p for _, p in parameters])

    def step(self, g):
        """One exchange of new gradients. Returns what the first rank has got."""
        for session, parameters in zip(self.sessions, self.parameters, strict=True):
            for p in reversed(parameters):
                p.grad = torch.randn(p.shape, generator=g)
                if session.admit(p):
                    session.ready(p)
        for session in self.sessions:
            session.flush()
        for _ in ("push", "pull"):  # in one process nobody else would do the other rank's part
            for session in self.sessions:
                session.poll()
        for session, parameters in zip(self.sessions, self.parameters, strict=True):
            for p in parameters:
                if session.covers(p):
                    session.finish(p)
        results = [torch.cat([p.grad.view(-1) for p in parameters if p.dim() > 1]) for parameters in self.parameters]
        assert all(torch.equal(result, results[0]) for result in results)
        return results[0]

    def states(self):
        return [squeeze.state_dict() for squeeze in self.squeezes]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_states(state, other):
    assert state.keys() == other.keys()
    assert {k: v for k, v in state.items() if k != "buckets"} == {k: v for k, v in other.items() if k != "buckets"}
    for bucket, same in zip(state["buckets"], other["buckets"], strict=True):
        assert bucket.keys() == same.keys()
        for key, value in bucket.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(value, same[key], key)
            else:
                assert value == same[key]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"server": 1},
        {"bucket_cap_mb": None},
        {"worker_error": False},
        {"server_error": False},
        {"compressors": (TopK(k=3), TopK(k=3))},
        {"compressors": (OneBit(32, "l2", "bucket"), OneBit(32, "l2", "bucket")), "server": 0},
        {"size": 3},
        {"size": 3, "server": 2},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(options):
    run, g = Run(**options), generator(0)
    for _ in range(3):
        run.step(g)
    saved = [through_a_file(state) for state in run.states()]
    at = g.get_state()
    uninterrupted = [run.step(g) for _ in range(3)]

    resumed = Run(**options)
    for squeeze, state in zip(resumed.squeezes, saved, strict=True):
        squeeze.load_state_dict(state)
        assert_equal_states(squeeze.state_dict(), state)
    g.set_state(at)
    for expected in uninterrupted:
        assert_same_bits(resumed.step(g), expected)
    for state, expected in zip(resumed.states(), run.states(), strict=True):
        assert_equal_states(state, expected)


def test_a_state_may_be_loaded_before_the_optimizer_is_made():
    run, g = Run(), generator(0)
    run.step(g)
    saved = [through_a_file(state) for state in run.states()]
    at = g.get_state()
    expected = run.step(g)
    resumed = Run(states=saved)
    for squeeze, state in zip(resumed.squeezes, saved, strict=True):
        assert_equal_states(squeeze.state_dict(), state)
    g.set_state(at)
    assert_same_bits(resumed.step(g), expected)


def test_a_wrong_state_loaded_before_the_optimizer_is_made():
    states = Run().states()
    with pytest.raises(ValueError, match="of rank 1, this is rank 0"):
        Run(states=states[::-1])
    with pytest.raises(ValueError, match="another layout: 2 buckets, here 1"):
        Run(states=states, bucket_cap_mb=None)


def test_errors_are_what_makes_the_difference():
    run, g = Run(), generator(0)
    run.step(g)
    at = g.get_state()
    expected = run.step(g)
    g.set_state(at)
    assert not torch.equal(Run().step(g), expected)


def test_going_back_in_a_running_session():
    run, g = Run(), generator(1)
    run.step(g)
    saved = [through_a_file(state) for state in run.states()]
    at = g.get_state()
    expected = [run.step(g) for _ in range(2)]
    for squeeze, state in zip(run.squeezes, saved, strict=True):
        squeeze.load_state_dict(state)
    g.set_state(at)
    for result in expected:
        assert_same_bits(run.step(g), result)


@pytest.mark.parametrize("steps", [1, 4])
def test_momentum_and_warm_up_resume(steps):
    """Also in the middle of the warm-up, of which a fresh start would take all steps again."""
    options = {"compressors": (TopK(0.1, values="sign"), TopK(0.2)), "momentum": 0.9, "warmup_steps": 2}
    run, g = Run(**options), generator(2)
    for _ in range(steps):
        run.step(g)
    saved, at = [through_a_file(state) for state in run.states()], g.get_state()
    assert all(bucket["step"] == steps and bucket["velocity"].abs().max() > 0 for bucket in saved[0]["buckets"])
    expected = [run.step(g) for _ in range(3)]
    again = Run(states=saved, **options)
    g.set_state(at)
    for result in expected:
        assert_same_bits(again.step(g), result)
    for squeeze, other in zip(run.squeezes, again.squeezes, strict=True):
        assert_equal_states(squeeze.state_dict(), other.state_dict())
    without = {**options, "momentum": 0.0}
    with pytest.raises(ValueError, match=r"bucket 0 has a velocity of shape .*, here None"):
        Run(states=saved, **without)


def test_what_a_state_says():
    run = Run()
    run.step(generator(0))
    for rank, state in enumerate(run.states()):
        assert (state["size"], state["rank"], state["server"], state["sparse"]) == (2, rank, None, [])
        assert [bucket["parameters"] for bucket in state["buckets"]] == [["last", "middle"], ["first"]]
        assert all(bucket["worker_error"].abs().max() > 0 for bucket in state["buckets"])
        assert all(bucket["server_error"].abs().max() > 0 for bucket in state["buckets"])


# ---- states that do not belong here


def changed(state, **values):
    return {**state, **values}


def changed_bucket(state, **values):
    first, *rest = state["buckets"]
    return {**state, "buckets": [{**first, **values}, *rest]}


WRONG = {
    "format": (lambda s: changed(s, format=99), "of format 99, this is format 4"),
    "world size": (lambda s: changed(s, size=3), "of world size 3, this is world size 2"),
    "rank": (lambda s: changed(s, rank=1), "of rank 1, this is rank 0"),
    "server": (lambda s: changed(s, server=0), "of server 0, this is server None"),
    "fewer buckets": (lambda s: changed(s, buckets=s["buckets"][:1]), "another layout: 1 buckets, here 2"),
    "parameters": (
        lambda s: changed_bucket(s, parameters=["lost"]),
        r"bucket 0 has parameters \['lost'\], here \['last', 'middle'\]",
    ),
    "numels": (lambda s: changed_bucket(s, numels=[319, 77]), r"bucket 0 has numels \[319, 77\], here \[320, 77\]"),
    "offsets": (lambda s: changed_bucket(s, offsets=[0, 352]), r"bucket 0 has offsets \[0, 352\], here \[0, 320\]"),
    "no worker error": (lambda s: changed_bucket(s, worker_error=None), "bucket 0 has a worker_error of shape None, here"),
    "shape": (lambda s: changed_bucket(s, server_error=torch.ones(3)), r"bucket 0 has a server_error of shape \(3,\), here"),
    "a later bucket": (
        lambda s: changed(s, buckets=[s["buckets"][0]] * 2),
        r"bucket 1 has parameters \['last', 'middle'\], here \['first'\]",
    ),
    "sparse": (lambda s: changed(s, sparse=["last"]), "another layout: 2 buckets, here 1"),
}


@pytest.mark.parametrize("started", [True, False], ids=["started", "fresh"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_of_something_else_changes_nothing(wrong, started):
    change, message = WRONG[wrong]
    run, g = Run(), generator(2)
    run.step(g)
    good = through_a_file(run.states()[0])
    if not started:
        run = Run()
        run.squeezes[0].load_state_dict(good)
    bad = change(copy.deepcopy(good))
    for bucket in bad["buckets"]:
        if bucket["worker_error"] is not None:
            bucket["worker_error"] += 1.0
    if wrong == "sparse" and started:  # then it is the buckets that differ
        bad["buckets"] = bad["buckets"][1:]
        message = "another layout: 1 buckets, here 2"
    with pytest.raises(ValueError, match=message):
        run.squeezes[0].load_state_dict(bad)
    assert_equal_states(run.squeezes[0].state_dict(), good)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"size": 3}, "world size"),
        ({"server": 0}, "server"),
        ({"bucket_cap_mb": None}, "1 buckets, here 2"),
        ({"compressors": (OneBit(2048), OneBit(2048))}, "offsets|shape"),
        ({"worker_error": False}, "worker_error of shape None"),
        ({"shapes": {**SHAPES, "last": (64, 6)}}, "numels"),
        ({"shapes": {**SHAPES, "extra": (64, 6)}}, "3 buckets, here 2"),
    ],
    ids=str,
)
def test_a_state_of_another_run(other, message):
    with pytest.raises(ValueError, match=message):
        Run().squeezes[0].load_state_dict(through_a_file(Run(**other).states()[0]))


def test_a_state_of_another_rank():
    here, there = Run().squeezes
    with pytest.raises(ValueError, match="of rank 1, this is rank 0"):
        here.load_state_dict(there.state_dict())


# ---- tensors outside an optimizer


def use(squeezes, transports, tensors):
    """One exchange of each named tensor."""
    for name, tensor in tensors.items():
        sessions = [tensor_reducer(s).session("t", name, tensor, True, t) for s, t in zip(squeezes, transports, strict=True)]
        stand_ins = [session.parameters[0][1] for session in sessions]
        for session, p in zip(sessions, stand_ins, strict=True):
            p.grad = tensor.clone()
            session.admit(p)
            session.ready(p)
        for session in sessions:
            session.flush()
        for session, p in zip(sessions, stand_ins, strict=True):
            session.finish(p)
    return {s.parameters[0][0]: s.parameters[0][1].grad for s in squeezes[0]._reducer.sessions}


def named_tensors(seed):
    g = generator(seed)
    return {"a": torch.randn(100, generator=g), "b": torch.randn(3, 70, generator=g)}


@pytest.fixture
def used():
    squeezes = [DoubleSqueeze(OneBit(32)) for _ in range(2)]
    transports = InProcessTransport.group(2)
    use(squeezes, transports, named_tensors(0))
    return squeezes, transports


def test_tensors_resume(used):
    saved = [through_a_file(squeeze.state_dict()) for squeeze in used[0]]
    expected = use(*used, named_tensors(1))
    fresh = [DoubleSqueeze(OneBit(32)) for _ in range(2)]
    for squeeze, state in zip(fresh, saved, strict=True):
        squeeze.load_state_dict(state)  # before the tensors are known
    results = use(fresh, InProcessTransport.group(2), named_tensors(1))
    for name, result in results.items():
        assert_same_bits(result, expected[name])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("options", [{}, {"compressors": (TopK(0.1), TopK(0.1)), "momentum": 0.5}], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_a_state_that_was_taken_over_leaves_memory(full, options, before):
    run = Run(**options)
    run.step(generator(0))
    states = [through_a_file(s.full_state_dict() if full else s.state_dict()) for s in run.squeezes]
    there = [weakref.ref(t) for s in states for part in (s.get("buckets") or [s["errors"], s["velocities"]])
             for t in part.values() if isinstance(t, torch.Tensor)]  # fmt: skip
    again = Run(states=states if before else None, **options)
    if not before:
        for squeeze, state in zip(again.squeezes, states, strict=True):
            squeeze.load_state_dict(state)
        del state
    del states
    gc.collect()
    assert there and [ref() for ref in there] == [None] * len(there)


@pytest.mark.parametrize("full", [True, False])
def test_a_state_of_tensors_leaves_memory_tensor_by_tensor(full, used):
    squeeze = used[0][0]
    state = through_a_file(squeeze.full_state_dict() if full else squeeze.state_dict())
    errors = list(state["errors"].values()) if full else [b["worker_error"] for b in state["buckets"]]
    there = [weakref.ref(error) for error in errors]
    fresh = DoubleSqueeze(OneBit(32))
    fresh.load_state_dict(state)
    del state, errors
    (name, tensor), *_ = named_tensors(0).items()
    tensor_reducer(fresh).session("t", name, tensor, True, InProcessTransport.group(2)[0])
    gc.collect()
    assert [ref() is None for ref in there] == [True, False]  # the other is still to come


def test_a_bad_state_of_one_tensor_changes_no_other(used):
    (squeeze, _), _ = used
    good = through_a_file(squeeze.state_dict())
    bad = copy.deepcopy(good)
    bad["buckets"][0]["worker_error"] += 1.0
    bad["buckets"][1]["numels"] = [1]
    with pytest.raises(ValueError, match="numels"):
        squeeze.load_state_dict(bad)
    assert_equal_states(squeeze.state_dict(), good)


def test_tensors_of_another_rank(used):
    """Loaded before the first use, when the rank is not known yet, and refused once it is."""
    squeezes, _ = used
    swapped = [DoubleSqueeze(OneBit(32)) for _ in range(2)]
    with pytest.raises(ValueError, match="of rank 1, this is rank 0"):
        swapped[0].load_state_dict(through_a_file(squeezes[1].state_dict()))
        swapped[1].load_state_dict(through_a_file(squeezes[0].state_dict()))
        use(swapped, InProcessTransport.group(2), named_tensors(1))


def test_a_state_of_an_optimizer_is_not_one_of_tensors(used):
    state = Run(bucket_cap_mb=None).states()[0]
    with pytest.raises(ValueError, match="DoubleSqueeze"):
        used[0][0].load_state_dict(through_a_file(state))


def malformed(state, path, value):
    """A copy with another value at a place; None of these: without the key."""
    state = copy.deepcopy(state)
    *way, last = path
    at = state
    for key in way:
        at = at[key]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return state


OF_ANY = [
    (("format",), 3, "of format 3"),
    (("sparse",), "a", r"sparse must be a list of names, got 'a'"),
    (("sparse",), KeyError, "sparse is missing"),
    (("units",), KeyError, "units is missing"),
    (("units", "scale"), "1", r"units\.scale must be positive and finite, got '1'"),
    (("units", "scale"), float("nan"), r"units\.scale must be"),
    (("units", "learning_rates"), {"first": "fast"}, r"units\.learning_rates must be numbers by name"),
    (("velocities",), KeyError, "velocities is missing"),
    (("velocities",), [1], "velocities must be floating-point tensors by name, got list"),
    (("velocities", "bias"), torch.full((9,), torch.nan), "velocities of bias that are not finite"),
    (("velocities", "bias"), torch.zeros(8), r"velocities of bias of shape \(8,\), here \(9,\)"),
    (("velocities", "other"), torch.zeros(8), "velocities of other, which is not a parameter here"),
]
OF_ONE_RANK = [
    (("buckets",), {}, "buckets must be a list of dicts"),
    (("buckets", 1), None, "buckets must be a list of dicts"),
    (("buckets", 0, "step"), KeyError, r"buckets\[0\]\.step is missing"),
    (("buckets", 0, "step"), "3", r"buckets\[0\]\.step must be a whole number, 0 or more, got '3'"),
    (("buckets", 1, "worker_error"), [0.0], r"buckets\[1\]\.worker_error must be a floating-point tensor, or None, got list"),
    (("buckets", 1, "server_error"), torch.zeros(3, dtype=torch.int64), r"buckets\[1\]\.server_error must be"),
    (("buckets", 1, "velocity"), torch.zeros(3), r"bucket 1 has a velocity of shape \(3,\)"),
]
OF_ALL = [
    (("step",), KeyError, "step is missing"),
    (("step",), -1, "step must be a whole number, 0 or more, got -1"),
    (("errors",), None, "errors must be floating-point tensors by name, got None"),
    (("errors", "first"), torch.zeros(8, 40).index_fill(0, torch.tensor(1), torch.inf), "errors of first that are not finite"),
    (("errors", "first"), torch.zeros(3), r"errors of first of shape \(3,\)"),
]


@pytest.mark.parametrize("before_the_optimizer", [False, True])
@pytest.mark.parametrize("kind, path, value, message", [
    *(("state_dict", *case) for case in OF_ANY + OF_ONE_RANK), *(("full_state_dict", *case) for case in OF_ANY + OF_ALL),
])  # fmt: skip
def test_a_malformed_state_changes_nothing(kind, path, value, message, before_the_optimizer):
    options = {"compressors": (TopK(0.1), TopK(0.1)), "momentum": 0.5}
    run, g = Run(**options), generator(0)
    for _ in range(2):
        run.step(g)
    squeeze = run.squeezes[0]
    good = through_a_file(getattr(squeeze, kind)())
    good["velocities"].setdefault("bias", torch.zeros(9))
    state = malformed(good, path, value)
    if before_the_optimizer:
        with pytest.raises(ValueError, match=message):
            Run(states=[state] * 2, **options)
        return
    run.step(g)
    before = through_a_file(squeeze.state_dict())
    with pytest.raises(ValueError, match=message):
        squeeze.load_state_dict(state)
    assert_equal_states(squeeze.state_dict(), before)


def test_errors_that_are_not_finite_are_refused_by_name():
    run = Run()
    state = copy.deepcopy(run.states()[0])
    state["buckets"][0]["worker_error"][3] = torch.nan
    name = state["buckets"][0]["parameters"][0]
    with pytest.raises(ValueError, match=f"worker_error of bucket 0, of {name} and others, that are not finite"):
        run.squeezes[0].load_state_dict(state)


@pytest.mark.parametrize("state", [None, 3, [1]], ids=repr)
def test_what_is_no_state(state):
    for squeeze in (DoubleSqueeze(), Run().squeezes[0]):
        with pytest.raises(ValueError, match="a state must be what state_dict"):
            squeeze.load_state_dict(state)


def test_a_state_in_mid_step_is_refused():
    run, g = Run(), generator(0)
    run.step(g)
    squeeze, session, (p, *_) = run.squeezes[0], run.sessions[0], run.parameters[0]
    state = squeeze.state_dict()
    p.grad = torch.zeros_like(p)
    session.admit(p)
    session.ready(p)
    for call in (squeeze.state_dict, squeeze.full_state_dict, lambda: squeeze.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="gradients are under way"):
            call()
