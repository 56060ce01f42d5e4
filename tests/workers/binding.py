"""What an optimizer begins with, on a real Horovod: see checking.py."""

import gc
import os
import warnings
import weakref

import horovod.torch as hvd
import torch
from checking import (
    accumulate,
    assert_identical,
    batch,
    distributed,
    everyones,
    flat,
    main,
    small_model,
    squeeze,
    train_step,
)
from registry import check, raises
from torch import nn
from torch.nn.functional import cross_entropy

import ds_horovod
from ds_horovod import Compressor, DoubleSqueeze, NoCompression, OneBit, TopK
from ds_horovod.horovod.transport import HorovodTransport

LAST = f"on rank {int(os.environ['HOROVOD_SIZE']) - 1}"


def is_last():
    return hvd.rank() == hvd.size() - 1


def step_by_hand(model, optimizer):
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    optimizer.step()


# ---- replicas


@check
def replicas_that_start_unequal_are_told():
    """Whatever the parameter, and however little it differs; and once they are equal, training goes on."""
    frozen = nn.ParameterList([nn.Parameter(torch.arange(5), requires_grad=False)])
    for name, model in {
        "0.weight": small_model(),
        "2.bias": small_model(),
        "4.weight": small_model(dtype=torch.bfloat16),
        "1.0": nn.Sequential(small_model(), frozen),
    }.items():
        with torch.no_grad():
            element = model.get_parameter(name).view(-1)[3:4]
            if is_last():
                element += 1 if name == "1.0" else element.abs() * 2**-6
        start = flat(model.parameters())
        optimizer = distributed(model, squeeze(OneBit(64)))
        with raises(ValueError, "the ranks do not agree", f"\n  weights of {name}: ", "on rank 0, ", LAST, "broadcast_param"):
            step_by_hand(model, optimizer)
        assert torch.equal(flat(model.parameters()), start)
        with torch.no_grad():  # hvd.broadcast_parameters knows no bfloat16
            element.copy_(hvd.broadcast(element.double(), root_rank=0, name="element"))
        step_by_hand(model, distributed(model, squeeze(OneBit(64))))
        assert_identical(model)


@check
def parameters_broadcast_before_an_optimizer_with_weight_decay():
    """hvd.broadcast_optimizer_state takes a step where there is no state yet, and so on no rank but the one that has loaded."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    trained = distributed(small_model(), squeeze(), options=options)
    hvd.broadcast_optimizer_state(trained, root_rank=0)
    for parameters_first in (True, False):
        model = small_model()
        optimizer = distributed(model, squeeze(), options=options)
        if hvd.rank() == 0:
            optimizer.load_state_dict(trained.state_dict())
        if parameters_first:
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        if parameters_first:
            with raises(
                ValueError, "weights of 0.weight", "as the last thing before training: hvd.broadcast_optimizer_state may"
            ):
                train_step(model, optimizer, 0)
        else:
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            train_step(model, optimizer, 0)
            assert_identical(model)


# ---- states

OPTIONS = {
    "1-bit": lambda: squeeze(OneBit(64)),
    "top-k, momentum": lambda: squeeze(TopK(0.1), momentum=0.5),
    "warm-up": lambda: squeeze(TopK(0.1), warmup_steps=2),
    "one server": lambda: squeeze(TopK(0.1), server=hvd.size() - 1),
    "servers alone": lambda: squeeze(OneBit(64), worker_error=False),
    "workers alone": lambda: squeeze(OneBit(64), server_error=False),
}


def trained(make, steps=3):
    model = small_model()
    optimizer = distributed(model, make())
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def resumed(make, weights):
    model = small_model()
    model.load_state_dict(weights)
    return model, distributed(model, make())


@check
def a_state_that_one_rank_has_loaded_is_told():
    for make in (OPTIONS["top-k, momentum"], OPTIONS["warm-up"], OPTIONS["1-bit"]):
        model, optimizer = trained(make)
        states = {
            "the full_state_dict() of step 3": optimizer.double_squeeze.full_state_dict(),
            "a state_dict()": optimizer.double_squeeze.state_dict(),
        }
        for what, state in states.items():
            again, optimizer = resumed(make, model.state_dict())
            if is_last():
                optimizer.double_squeeze.load_state_dict(state)
            with raises(
                ValueError, "loaded state: none on rank 0, ", what, LAST, "call optimizer.double_squeeze.broadcast_state("
            ):
                train_step(again, optimizer, 3)


@check
def files_of_different_states_are_told():
    """Each rank has loaded one, of the same step: all the same, or all its own."""
    model, optimizer = trained(OPTIONS["top-k, momentum"])
    state = optimizer.double_squeeze.full_state_dict()
    own = {**state, "errors": {name: error + (name == "0.weight") * hvd.rank() for name, error in state["errors"].items()}}
    again, optimizer = resumed(OPTIONS["top-k, momentum"], model.state_dict())
    optimizer.double_squeeze.load_state_dict(own)
    with raises(ValueError, "loaded state: the full_state_dict() of step 3 with checksum", LAST):
        train_step(again, optimizer, 3)
    own = {**state, "velocities": {name: v + (name == "0.bias") * hvd.rank() for name, v in state["velocities"].items()}}
    again, optimizer = resumed(OPTIONS["top-k, momentum"], model.state_dict())
    optimizer.double_squeeze.load_state_dict(own)
    with raises(ValueError, "velocities of 0.bias: ", LAST):
        train_step(again, optimizer, 3)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=1e-5, atol=1e-7)


@check
def the_state_of_one_rank_for_all():
    """As Horovod's examples resume: a rank loads, then all broadcast. All is as if all ranks had loaded."""
    for make in OPTIONS.values():
        model, optimizer = trained(make)
        state = optimizer.double_squeeze.full_state_dict()
        everyone = resumed(make, model.state_dict())[1]
        everyone.double_squeeze.load_state_dict(state)
        expected = everyone.double_squeeze.full_state_dict()
        for root, before in ((0, False), (hvd.size() - 1, False), (0, True)):
            again = small_model()
            compression = make()
            optimizer = None if before else distributed(again, compression)
            if hvd.rank() == root:
                again.load_state_dict(model.state_dict())
                compression.load_state_dict(state)
            compression.broadcast_state(root_rank=root)
            optimizer = optimizer or distributed(again, compression)
            hvd.broadcast_parameters(again.state_dict(), root_rank=root)
            found = compression.full_state_dict()
            assert found["step"] == 3 and found["units"] == state["units"]
            for kind in ("errors", "velocities"):
                assert_close(found[kind], expected[kind])
            for step in range(3, 5):
                train_step(again, optimizer, step)
                assert_identical(again)


@check
def the_own_state_of_a_rank_for_all():
    """Its residual is divided, and counted once; those of the others are replaced."""
    for make in OPTIONS.values():
        model, optimizer = trained(make)
        root = hvd.size() - 1
        own = {name: r.error.clone() for name, r in optimizer.double_squeeze._reducer.residuals().items()}
        expected = {name: everyones(error)[root] for name, error in own.items()}
        for again, other in (resumed(make, model.state_dict()), (model, optimizer)):
            if hvd.rank() == root:
                other.double_squeeze.load_state_dict(optimizer.double_squeeze.state_dict())
            other.double_squeeze.broadcast_state(root)
            assert_close(other.double_squeeze.full_state_dict()["errors"], expected)
            assert other.double_squeeze.full_state_dict()["step"] == 3
            if again is not model:
                train_step(again, other, 3)
                assert_identical(again)


@check
def what_was_loaded_before_the_last_step_is_no_longer_that_of_all():
    """From then on the root's own state is but its own."""
    model, optimizer = trained(OPTIONS["1-bit"])
    optimizer.double_squeeze.load_state_dict(optimizer.double_squeeze.full_state_dict())
    train_step(model, optimizer, 3)
    own = {name: r.error.clone() for name, r in optimizer.double_squeeze._reducer.residuals().items()}
    expected = {name: everyones(error)[0] for name, error in own.items()}
    optimizer.double_squeeze.broadcast_state()
    assert_close(optimizer.double_squeeze.full_state_dict()["errors"], expected)
    train_step(model, optimizer, 4)
    assert_identical(model)


@check
def a_state_cannot_be_broadcast():
    """The same error on all ranks, whichever of them is the reason."""
    model, optimizer = trained(OPTIONS["1-bit"])
    with raises(ValueError, "root_rank: 0 on rank 0, ", LAST):
        optimizer.double_squeeze.broadcast_state(hvd.rank())
    for wrong in (hvd.size(), -1, "0", None):
        with raises(ValueError, "root_rank must be one of the ranks 0, 1", f"got {wrong!r}"):
            optimizer.double_squeeze.broadcast_state(wrong)
    if is_last():
        accumulate(model, 3, 1)
    with raises(RuntimeError, "gradients are under way", f"({LAST})"):
        optimizer.double_squeeze.broadcast_state()
    if not is_last():
        accumulate(model, 3, 1)
    optimizer.step()
    assert_identical(model)
    compression = DoubleSqueeze(OneBit(64))
    ds_horovod.allreduce(torch.ones(3), name="no optimizer", compression=compression)
    with raises(ValueError, "broadcast_state is for optimizers"):
        compression.broadcast_state()
    compression = DoubleSqueeze()
    compression.broadcast_state()
    with raises(ValueError, "broadcast_state is for optimizers"):
        ds_horovod.allreduce(torch.ones(3), name="no optimizer", compression=compression)


@check
def an_elastic_state_takes_over_what_rank_0_has_loaded():
    model, optimizer = trained(OPTIONS["1-bit"])
    saved = optimizer.double_squeeze.full_state_dict()
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        again, optimizer = resumed(OPTIONS["1-bit"], model.state_dict())
        if hvd.rank() == 0:
            optimizer.double_squeeze.load_state_dict(saved)
        state = hvd.elastic.TorchState(model=again, optimizer=optimizer, compression=optimizer.double_squeeze)
        state.sync()
        assert_close(optimizer.double_squeeze.full_state_dict()["errors"], saved["errors"])
        train_step(again, optimizer, 3)
        assert_identical(again)
    finally:
        del os.environ["HOROVOD_ELASTIC"]


# ---- what is taken for a compression


@check
def a_compressor_is_a_compression():
    results = []
    for compression in (OneBit(64), DoubleSqueeze(OneBit(64))):
        torch.manual_seed(0)
        model = nn.Linear(80, 80)
        optimizer = distributed(model, compression)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.full((2, 80), 1.0 + hvd.rank())).square().mean()).backward()
            optimizer.step()
        assert optimizer.double_squeeze.options.compressor == OneBit(64)
        assert optimizer.double_squeeze.stats()["compression_ratio"] > 10
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


@check
def what_is_no_compression_is_refused_at_once():
    for wrong, parts in (
        (OneBit, ["OneBit'>", "write OneBit(...)"]),
        (Compressor, ["write Compressor(...)"]),
        ("onebit", ["'onebit'", "DoubleSqueeze, DoubleSqueeze(...), a compressor such as OneBit(), or one of hvd.Compression"]),
        (DoubleSqueeze.paper, ["write DoubleSqueeze.paper()"]),
        (ds_horovod, ["module 'ds_horovod'", "DoubleSqueeze(...)"]),
        (lambda: DoubleSqueeze(), ["lambda", "DoubleSqueeze(...)"]),
        (4, ["got 4"]),
    ):
        for op in (hvd.Average, hvd.Adasum):
            with raises(TypeError, "compression must be", *parts):
                distributed(small_model(), wrong, op=op)


@check
def other_compressions_stay_horovods():
    class Own:
        """As a user may write for stock Horovod, with static methods or without."""

        @staticmethod
        def compress(tensor):
            return tensor, None

        @staticmethod
        def decompress(tensor, ctx):
            return tensor

    for compression in (Own, Own(), hvd.Compression.none, hvd.Compression.fp16):
        model = small_model()
        optimizer = distributed(model, compression)
        assert not hasattr(optimizer, "double_squeeze") and optimizer._compression is compression
        train_step(model, optimizer, 0)
        assert_identical(model)


# ---- optimizers that come and go


@check
def a_new_optimizer_for_the_same_model():
    """While the old one is there, once it is gone, with gradients in flight, and in place of one that has no compression."""
    for case in ("there", "gone", "in flight", "stock", "stock, in flight", "same options"):
        results = []
        for replaced in (True, False):
            model = small_model()
            if replaced:
                old = distributed(model, hvd.Compression.none if "stock" in case else squeeze(OneBit(64)))
                train_step(model, old, 9)
                if "in flight" in case:
                    accumulate(model, 10, 1)
                model.load_state_dict(small_model().state_dict())
            if case == "gone" and replaced:
                del old
                gc.collect()
            kind, options = (torch.optim.SGD, {"lr": 0.1}) if case == "same options" else (torch.optim.Adam, {"lr": 1e-3})
            new = distributed(model, squeeze(NoCompression()), kind, options)
            for step in range(3):
                train_step(model, new, step)
                assert_identical(model)
            results.append(flat(model.parameters()))
            if replaced and case != "gone":
                with raises(RuntimeError, "has been switched off, since a later one trains its parameter 0.weight"):
                    old.step()
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@check
def after_the_error_that_advises_a_new_optimizer():
    model, late = small_model(), nn.Linear(7, 7)
    old = distributed(model, squeeze(OneBit(64)))
    train_step(model, old, 0)
    torch.manual_seed(0)
    late = nn.Linear(7, 7)
    old.add_param_group({"params": list(late.parameters())})
    old.zero_grad()
    x, y = batch(1)
    cross_entropy(late(model(x)), y).backward()
    with raises(RuntimeError, "added or unfrozen after", "or make a new one"):
        old.step()
    with raises(RuntimeError, "gradients are under way"):  # of the step that failed
        old.double_squeeze.full_state_dict()
    both = nn.Sequential(*model, late)
    new = distributed(both, squeeze(OneBit(64)))
    for step in range(2, 5):
        train_step(both, new, step)
        assert_identical(both)


@check
def errors_move_to_a_new_optimizer():
    model, old = trained(OPTIONS["1-bit"])
    errors = old.double_squeeze.full_state_dict()
    new = distributed(model, squeeze(TopK(0.1)), torch.optim.Adam, {"lr": 1e-3})
    new.double_squeeze.load_state_dict(old.double_squeeze.full_state_dict())  # the old one holds them until then
    assert_close(new.double_squeeze.full_state_dict()["errors"], errors["errors"])
    for step in (3, 4):
        train_step(model, new, step)
        assert_identical(model)


@check
def an_optimizer_that_was_replaced_leaves_memory():
    model = small_model()
    old = distributed(model, squeeze(OneBit(64)))
    train_step(model, old, 0)
    there = [weakref.ref(old), weakref.ref(old.double_squeeze._reducer.session.buckets[0].exchange.worker_error)]
    del old
    gc.collect()
    new = distributed(model, squeeze(OneBit(64)))
    gc.collect()
    assert [ref() for ref in there] == [None, None]
    train_step(model, new, 1)


@check
def an_optimizer_that_could_not_be_made_leaves_no_hooks():
    model = small_model()
    kept = []
    for wrong in (squeeze(server=99), "in use"):
        compression = wrong
        if wrong == "in use":
            compression = squeeze()
            distributed(small_model(), compression)
        try:
            distributed(model, compression)
        except ValueError as error:
            kept.append(error)  # with its frames, and so with what was half made
    optimizer = distributed(model, squeeze(OneBit(64)))
    for step in range(2):
        train_step(model, optimizer, step)
        assert_identical(model)
    assert len(kept) == 2


@check
def an_optimizer_on_some_ranks_only():
    """Ranks count differently from then on, and their collectives have the same names nevertheless."""
    for more in range(3):
        others = [distributed(small_model(), squeeze(OneBit(64))) for _ in range(hvd.rank() * more)]
        model = small_model()
        first, second = distributed(model, squeeze(OneBit(64))), distributed(small_model(), squeeze(TopK(0.1)))
        second.double_squeeze.full_state_dict()  # before the first step
        for step in range(2):
            train_step(model, first, step)
            assert_identical(model)
        names = [optimizer.double_squeeze._reducer.name for optimizer in (first, second)]
        assert names[0] != names[1] and hvd.allgather_object(names, name="names") == [names] * hvd.size()
        del others


@check
def process_sets_that_come_and_go():
    """Horovod gives the number of one that has gone to the next."""
    for _ in range(2):
        alone = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
        for _ in range(1 + hvd.rank()):
            model = small_model(seed=hvd.rank())
            train_step(model, distributed(model, squeeze(OneBit(64)), process_set=alone[hvd.rank()]), 0)
        hvd.barrier()
        for process_set in alone:
            hvd.remove_process_set(process_set)
        if hvd.size() > 2:
            pair = hvd.add_process_set([0, hvd.size() - 1])
            if pair.included():
                model = small_model()
                optimizer = distributed(model, squeeze(OneBit(64)), process_set=pair)
                for step in range(2):
                    train_step(model, optimizer, step)
                own = flat(model.parameters())
                rows = hvd.allgather(own.unsqueeze(0), name="rows", process_set=pair)
                assert torch.equal(rows[0], rows[1])
            hvd.barrier()
            hvd.remove_process_set(pair)
        model = small_model()
        train_step(model, distributed(model, squeeze(OneBit(64))), 0)
        assert_identical(model)


# ---- parameters


@check
def frozen_parameters_may_be_of_any_kind():
    """As Horovod's own test_broadcast_state_no_grad has it: nobody trains them."""
    for frozen in (
        torch.ones(7, 7, dtype=torch.int8),
        torch.ones(7, 7, dtype=torch.complex64),
        torch.ones(9, dtype=torch.bool),
    ):
        model = nn.Sequential(small_model(), nn.ParameterList([nn.Parameter(frozen, requires_grad=False)]))
        optimizer = distributed(model, squeeze(OneBit(64)))
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        for step in range(2):
            train_step(model[0], optimizer, step)
            assert_identical(model[0])
    with raises(ValueError, "parameter weight is torch.complex64; only floating-point ones can be trained"):
        distributed(nn.Linear(33, 7, dtype=torch.complex64), DoubleSqueeze)


@check
def a_model_of_another_dtype_than_it_had():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    for convert, what in ((model.double, "torch.float64"), (model[0].half, "torch.float16"), (model.half, None)):
        convert()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if what is None:
            optimizer.step()
            assert_identical(model)
        else:
            with raises(ValueError, f"weight is {what}", "model.double()", "before making the optimizer"):
                optimizer.step()
            model.float()
            optimizer = distributed(model, squeeze(OneBit(64), bucket_cap_mb=None))


@check
def parameters_without_elements_are_not_compressed():
    for choose in ({"*": True}, {"1.*": OneBit(64)}, None):
        model = nn.Sequential(small_model(), nn.ParameterList([nn.Parameter(torch.zeros(0, 5))]))
        optimizer = distributed(model, squeeze(OneBit(64), choose=choose))
        for step in range(2):
            train_step(model[0], optimizer, step)
            assert_identical(model)
        assert "1.0 (0, 5): no elements" in optimizer.double_squeeze.explain()


@check
def nothing_to_compress_is_warned_of_once():
    for model, options, expected in (
        (nn.Linear(33, 7), {}, 1),
        (nn.Linear(90, 90), {}, 0),
        (nn.Linear(90, 90), {"choose": {"*": False}}, 1),
        (nn.Linear(90, 90, dtype=torch.float64), {}, 1),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = distributed(model, DoubleSqueeze(**options))
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            for _ in range(2):
                step_by_hand(model, optimizer)
        found = [w for w in caught if "none of the 2 parameters is compressed" in str(w.message)]
        assert len(found) == expected, caught
        assert all(
            w.filename == distributed.__code__.co_filename and "4096 elements (min_numel)" in str(w.message) for w in found
        )


@check
def ranks_exchange_plain_values():
    transport = HorovodTransport()
    value = {"a": [1, None, "ä", 0.1, True], "rank": hvd.rank()}
    assert transport.gather_objects(value, "plain") == [{**value, "rank": rank} for rank in range(hvd.size())]
    with raises(TypeError, "OneBit is not JSON serializable"):
        transport.gather_objects(OneBit(), "not plain")


if __name__ == "__main__":
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    main()
