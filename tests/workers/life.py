"""State that lasts longer than a step, on a real Horovod: see checking.py."""

import os
import tempfile

import horovod.torch as hvd
import torch
from checking import (
    accumulate,
    assert_identical,
    distributed,
    errors_in_gradient_order,
    main,
    small_model,
    squeeze,
    train_step,
)
from registry import check, raises

import ds_horovod
from ds_horovod import Cast, DoubleSqueeze, OneBit, Quantize, TopK

PAIR = hvd.ProcessSet([0, 1])


def total_residual(optimizer):
    """mean_i(e_i) + E, added up by hand."""
    return {name: worker + server for name, (worker, server) in errors_in_gradient_order(optimizer).items()}


def assert_equal(actual, expected, shapes=None):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double().view(-1), value.double().view(-1), rtol=1e-5, atol=1e-7)


OPTIONS = {
    "1-bit": lambda: squeeze(OneBit(64)),
    "top-k, momentum": lambda: squeeze(TopK(0.1), momentum=0.5),
    "one server": lambda: squeeze(TopK(0.1), server=hvd.size() - 1),
    "servers alone": lambda: squeeze(OneBit(64), worker_error=False),
    "workers alone": lambda: squeeze(OneBit(64), server_error=False),
}


@check
def one_file_for_any_number_of_ranks():
    """Written by all, loaded by the first two, and by all again."""
    two = PAIR if hvd.size() > 2 else hvd.global_process_set
    for case, make in OPTIONS.items():
        model = small_model()
        optimizer = distributed(model, make())
        for step in range(3):
            train_step(model, optimizer, step)
        state = optimizer.double_squeeze.full_state_dict()
        expected = total_residual(optimizer)
        assert_equal(state["errors"], expected)
        assert all(error.abs().max() > 0 for error in state["errors"].values())
        folder = hvd.broadcast_object(tempfile.mkdtemp(), name="folder")
        file = os.path.join(folder, "errors.pt")
        if hvd.rank() == 0:
            ds_horovod.save(state, file)
        hvd.barrier()
        state = torch.load(file, weights_only=True)
        again = small_model()
        again.load_state_dict(model.state_dict())
        resumed = distributed(again, make())
        resumed.double_squeeze.load_state_dict(state)
        assert_equal(total_residual(resumed), expected)
        assert_equal(resumed.double_squeeze.full_state_dict()["velocities"], state["velocities"])
        for step in range(3, 5):
            train_step(again, resumed, step)
            assert_identical(again)
        if two.included() and case != "one server":
            few = small_model()
            few.load_state_dict(model.state_dict())
            compression = make()
            compression.load_state_dict(state)  # before the optimizer is made
            optimizer = distributed(few, compression, process_set=two)
            assert_equal(compression.full_state_dict()["errors"], expected)
            for step in range(3, 5):
                train_step(few, optimizer, step)
            own = torch.cat([p.detach().view(-1) for p in few.parameters()])
            rows = hvd.allgather(own.unsqueeze(0), name=f"rows.{case}", process_set=two)
            assert torch.equal(rows[0], rows[1])
        hvd.barrier()


@check
def another_compressor_in_mid_training():
    for case, make in OPTIONS.items():
        model = small_model()
        optimizer = distributed(model, make())
        for after in (TopK(0.3), Quantize(2), TopK(0.05, values="sign")):
            for step in range(2):
                train_step(model, optimizer, step)
                assert_identical(model)
            before = total_residual(optimizer)
            optimizer.double_squeeze.change_compressor(after, None if case == "1-bit" else Cast("fp16"))
            assert_equal(total_residual(optimizer), before)
        for step in range(2):
            train_step(model, optimizer, step)
            assert_identical(model)
        assert optimizer.double_squeeze.options.compressor == TopK(0.05, values="sign")
        assert optimizer.double_squeeze.stats()["steps"] == 8


@check
def ranks_that_change_to_different_compressors_are_told():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    optimizer.double_squeeze.change_compressor(TopK(0.1 if hvd.rank() else 0.2))
    with raises(ValueError, "do not agree", "compressor: TopK(ratio=0.2", "TopK(ratio=0.1"):
        train_step(model, optimizer, 1)


@check
def a_change_or_a_file_in_mid_step_is_refused():
    model = small_model()
    optimizer = distributed(model, squeeze(OneBit(64)))
    train_step(model, optimizer, 0)
    accumulate(model, 1, 1)
    for call in (lambda: optimizer.double_squeeze.change_compressor(TopK()), optimizer.double_squeeze.full_state_dict):
        with raises(RuntimeError, "under way", "between optimizer.step() and backward()"):
            call()
    optimizer.step()
    assert_identical(model)


@check
def tensors_outside_an_optimizer_in_one_file():
    value = torch.randn(5, 31, generator=torch.Generator().manual_seed(hvd.rank()))
    first = DoubleSqueeze(OneBit(32))
    for _ in range(3):
        result = ds_horovod.allreduce(value, name="in one file", compression=first)
    mean = hvd.allreduce(value, name="mean of value")
    state = first.full_state_dict()
    second = DoubleSqueeze(OneBit(64))
    second.load_state_dict(state)
    total = result * 0
    for _ in range(200):
        total += ds_horovod.allreduce(value, name="in one file", compression=second)
    kept = second.full_state_dict()["errors"]["in one file"]
    torch.testing.assert_close(total + kept, 200 * mean + state["errors"]["in one file"], rtol=1e-4, atol=1e-3)
    with raises(ValueError, "change_compressor is for optimizers"):
        second.change_compressor(TopK())


@check
def an_elastic_job_must_know_of_the_errors():
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        model = small_model()
        optimizer = distributed(model, squeeze(OneBit(64)))
        with raises(RuntimeError, "pass compression=optimizer.double_squeeze to hvd.elastic.TorchState"):
            train_step(model, optimizer, 0)
        hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=optimizer.double_squeeze)
        optimizer.load_state_dict(optimizer.state_dict())  # forgets the step that failed
        train_step(model, optimizer, 0)
        assert_identical(model)
        with raises(ValueError, "allreduce: its errors do not follow ranks that come and go"):
            ds_horovod.allreduce(torch.zeros(3), name="elastic")
    finally:
        del os.environ["HOROVOD_ELASTIC"]


if __name__ == "__main__":
    # Of two ranks it would be a duplicate of the set of all.
    main([PAIR] if int(os.environ["HOROVOD_SIZE"]) > 2 else None)
