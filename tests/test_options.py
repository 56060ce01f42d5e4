"""Bad input fails at once, with a message that names the option, the value and what is allowed."""

import inspect
import math
import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from support import COMPRESSORS, Int8

from ds_horovod import Cast, Compressor, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK, double_squeeze
from ds_horovod.agreement import require_agreement
from ds_horovod.checksum import checksums
from ds_horovod.feedback import FeedbackState
from ds_horovod.first_step import describe
from ds_horovod.in_process import InProcessTransport
from ds_horovod.layout import pack
from ds_horovod.options import Options
from ds_horovod.selection import Selection
from ds_horovod.session import Session


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, math.nan, math.inf])
def test_ratio(ratio):
    with pytest.raises(ValueError, match=f"TopK: ratio must be over 0 and at most 1, got {re.escape(repr(ratio))}"):
        TopK(ratio)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_k(k):
    with pytest.raises(ValueError, match=f"TopK: k must be a positive whole number, got {k}"):
        TopK(k=k)


def test_ratio_or_k():
    with pytest.raises(ValueError, match=r"TopK: give ratio or k, not both; got ratio=0\.1 and k=3"):
        TopK(0.1, k=3)


def test_values():
    with pytest.raises(ValueError, match="TopK: values must be one of fp32, fp16, sign, got 'bf16'"):
        TopK(values="bf16")


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4"])
def test_bits(bits):
    with pytest.raises(ValueError, match=f"Quantize: bits must be one of 2, 3, 4, 8, got {bits!r}"):
        Quantize(bits)


def test_random_k():
    for ratio in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"RandomK: ratio must be over 0 and at most 1, got {ratio}"):
            RandomK(ratio)
    with pytest.raises(ValueError, match="RandomK: values must be one of fp32, fp16, got 'sign'"):
        RandomK(values="sign")
    for seed in (-1, 2**64, 0.5):
        with pytest.raises(ValueError, match=f"RandomK: seed must be a whole number .*, got {seed}"):
            RandomK(seed=seed)


def test_cast():
    with pytest.raises(ValueError, match="Cast: dtype must be one of fp16, bf16, got 'fp32'"):
        Cast("fp32")


@pytest.mark.parametrize("kind", [Quantize, Ternary])
def test_levels(kind):
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: block must be a positive multiple of 32, got 100"):
        kind(block=100)
    with pytest.raises(ValueError, match=f"{name}: rounding must be one of nearest, stochastic, got 'up'"):
        kind(rounding="up")
    with pytest.raises(ValueError, match=f"{name}: scale must be one of absmax, l2, got 'l1'"):
        kind(scale="l1")
    with pytest.raises(ValueError, match=f'{name}: scale="l2" needs rounding="stochastic"'):
        kind(scale="l2")
    for seed in (-1, 2**64, 0.5):
        with pytest.raises(ValueError, match=f"{name}: seed must be a whole number from 0 to 2.*, got {seed}"):
            kind(seed=seed)


@pytest.mark.parametrize("block", [0, -32, 31, 33, 2047, 64.0])
def test_block(block):
    with pytest.raises(ValueError, match=f"OneBit: block must be a positive multiple of 32, got {block}"):
        OneBit(block)


def test_scale():
    with pytest.raises(ValueError, match="OneBit: scale must be one of l1, l2, got 'l3'"):
        OneBit(scale="l3")


def test_granularity():
    with pytest.raises(ValueError, match="OneBit: granularity must be one of block, parameter, bucket, got 'layer'"):
        OneBit(granularity="layer")


def test_cast_dtype():
    with pytest.raises(ValueError, match="Cast: dtype must be one of fp16, bf16, got 'int8'"):
        Cast("int8")


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, math.nan, math.inf])
def test_ratio_of_random_k(ratio):
    with pytest.raises(ValueError, match=f"RandomK: ratio must be over 0 and at most 1, got {re.escape(repr(ratio))}"):
        RandomK(ratio)


def test_values_of_random_k():
    with pytest.raises(ValueError, match="RandomK: values must be one of fp32, fp16, got 'sign'"):
        RandomK(values="sign")


@pytest.mark.parametrize("seed", [-1, 1.0, 2**64, "0", None])
def test_seed_of_random_k(seed):
    with pytest.raises(ValueError, match=rf"RandomK: seed must be a whole number from 0 to 2\*\*64 - 1, got {seed!r}"):
        RandomK(seed=seed)


@pytest.mark.parametrize("server", [-1, 1.0, "0"])
def test_server(server):
    with pytest.raises(ValueError, match=f"server must be a rank, or None for all ranks; got {server!r}"):
        DoubleSqueeze(server=server)


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, math.nan])
def test_momentum(momentum):
    with pytest.raises(ValueError, match=f"momentum must be at least 0 and under 1, got {momentum}"):
        DoubleSqueeze(TopK(), momentum=momentum)


@pytest.mark.parametrize("compressor", [OneBit(), NoCompression()])
def test_momentum_needs_a_compressor_that_leaves_elements_out(compressor):
    with pytest.raises(ValueError, match=r"momentum=0.9 needs a compressor that leaves elements out, as TopK does; (One|No)"):
        DoubleSqueeze(compressor, momentum=0.9)


GROWING = Quantize(2, 256, "stochastic", "l2")
"""What it leaves is more than it was given: no contraction."""


@pytest.mark.parametrize(
    "make, option, error",
    [
        (lambda: DoubleSqueeze(GROWING), "compressor", "worker_error"),
        (lambda: DoubleSqueeze(GROWING, server_compressor=OneBit()), "compressor", "worker_error"),
        (lambda: DoubleSqueeze(GROWING, worker_error=False), "compressor", "server_error"),
        (lambda: DoubleSqueeze(server_compressor=GROWING), "server_compressor", "server_error"),
        (lambda: DoubleSqueeze(choose={"*": GROWING}), r"choose\['\*'\]", "worker_error"),
        (lambda: DoubleSqueeze(choose={"*": GROWING}, worker_error=False), r"choose\['\*'\]", "server_error"),
        (lambda: DoubleSqueeze().change_compressor(GROWING), "compressor", "worker_error"),
        (lambda: DoubleSqueeze().change_compressor(OneBit(), GROWING), "server_compressor", "server_error"),
    ],
)
def test_an_error_needs_a_contraction(make, option, error):
    with pytest.raises(ValueError, match=rf"^DoubleSqueeze: {option} must be a contraction .* Pass {error}=False, or use"):
        make()


def test_without_errors_no_contraction_is_needed():
    off = {"worker_error": False, "server_error": False}
    DoubleSqueeze(GROWING, **off)
    DoubleSqueeze(choose={"*": GROWING}, **off)
    DoubleSqueeze(GROWING, server_compressor=OneBit(), worker_error=False)
    DoubleSqueeze(server_compressor=GROWING, server_error=False)
    DoubleSqueeze(OneBit(), **off).change_compressor(GROWING)
    DoubleSqueeze(Quantize(8, 256, "stochastic", "l2"))


def test_momentum_needs_an_error():
    with pytest.raises(ValueError, match=r"momentum=0\.9 needs worker_error=True, got False"):
        DoubleSqueeze(TopK(), momentum=0.9, worker_error=False)


@pytest.mark.parametrize("staleness", [-1, 5, 1.0, True, "1", None])
def test_staleness(staleness):
    with pytest.raises(ValueError, match=f"staleness must be a whole number from 0 to 4, got {staleness!r}"):
        DoubleSqueeze(staleness=staleness)


def test_what_staleness_needs():
    assert DoubleSqueeze(staleness=np.int64(2), sync_steps=10).options.staleness == 2
    with pytest.raises(ValueError, match="staleness=1 needs worker_error=True, got False"):
        DoubleSqueeze(staleness=1, worker_error=False)
    with pytest.raises(ValueError, match="sync_steps=3 needs staleness, from 1 to 4; got 0"):
        DoubleSqueeze(sync_steps=3)
    with pytest.raises(ValueError, match="sync_steps must be a whole number, 0 or more; got -1"):
        DoubleSqueeze(staleness=1, sync_steps=-1)


@pytest.mark.parametrize("steps", [-1, 1.5, None])
def test_warmup_steps(steps):
    with pytest.raises(ValueError, match=f"warmup_steps must be a whole number, 0 or more; got {steps}"):
        DoubleSqueeze(warmup_steps=steps)


@pytest.mark.parametrize("norm", [0, -1.0, math.nan, math.inf])
def test_max_norm(norm):
    with pytest.raises(ValueError, match=f"max_norm must be positive and finite, or None; got {norm}"):
        DoubleSqueeze(max_norm=norm)


def test_the_papers_recipe():
    paper = DoubleSqueeze.paper(server=1)
    options = paper.options
    assert options.compressor == options.reply_compressor == OneBit(scale="l2", granularity="bucket")
    assert (options.server, options.bucket_cap_mb, options.worker_error, options.server_error) == (1, None, True, True)
    assert DoubleSqueeze.paper(TopK(k=300_000)).options.compressor == TopK(k=300_000)


@pytest.mark.parametrize("cap", [0, -1.0, math.nan])
def test_bucket_cap(cap):
    with pytest.raises(ValueError, match=f"bucket_cap_mb must be positive, or None for one bucket; got {cap}"):
        DoubleSqueeze(bucket_cap_mb=cap)


@pytest.mark.parametrize("numel", [0, -1, 0.5])
def test_min_numel(numel):
    with pytest.raises(ValueError, match=f"min_numel must be a positive whole number, got {numel}"):
        DoubleSqueeze(min_numel=numel)


@pytest.mark.parametrize("name", ["compressor", "server_compressor"])
def test_compressor_type(name):
    with pytest.raises(TypeError, match=rf"{name} must be a ds_horovod Compressor, got .*OneBit.*; write OneBit\(\.\.\.\)"):
        DoubleSqueeze(**{name: OneBit})
    with pytest.raises(TypeError, match=f"{name} must be a ds_horovod Compressor, got 'onebit'$"):
        DoubleSqueeze(**{name: "onebit"})


def test_block_of_a_users_compressor():
    compressor = Int8()
    compressor.block = 48
    with pytest.raises(ValueError, match=r"compressor\.block must be a positive multiple of 32, got 48"):
        DoubleSqueeze(compressor)


def test_a_compressor_needs_its_three_methods():
    class Incomplete(Compressor):
        def compress(self, values):
            return values

    with pytest.raises(TypeError, match=r"decompress.*payload_nbytes"):
        Incomplete()


# ---- at bind


def bind(squeeze, *parameters, size=2):
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    transport = InProcessTransport.group(size, squeeze.options.server)[0]
    return double_squeeze.bind(squeeze, "test", named, True, transport).session


@pytest.mark.parametrize("server, size", [(2, 2), (7, 3), (1, 1)])
def test_a_server_out_of_range(server, size):
    with pytest.raises(ValueError, match=f"server must be None or from 0 to {size - 1}, got {server}"):
        bind(DoubleSqueeze(server=server), torch.zeros(64, 64), size=size)


def trained(*shape, **options):
    return torch.zeros(*shape, requires_grad=True, **options)


def test_parameters_that_are_not_floating_point():
    with pytest.raises(ValueError, match=r"parameter p1 is torch\.complex64; only floating-point ones can be trained"):
        bind(DoubleSqueeze(), trained(64, 64), trained(64, 64, dtype=torch.complex64))


def test_parameters_on_another_device():
    with pytest.raises(ValueError, match="parameter p0 is on meta; only cpu and cuda are supported"):
        bind(DoubleSqueeze(), trained(64, 64, device="meta"))


def test_frozen_parameters_may_be_of_any_dtype_and_anywhere():
    frozen = [torch.zeros(64, 64, dtype=dtype) for dtype in (torch.int8, torch.bool, torch.complex64)]
    frozen += [torch.zeros(64, 64, device="meta"), torch.eye(3).to_sparse()]
    session = bind(DoubleSqueeze(), *frozen, p := trained(64, 64))
    p.grad = torch.zeros(64, 64)
    assert session.admit(p)
    session.ready(p)
    session.flush()


@pytest.mark.parametrize("size", [1, 2])
def test_an_instance_belongs_to_one_optimizer(size):
    squeeze = DoubleSqueeze()
    bind(squeeze, torch.zeros(64, 64), size=size)
    with pytest.raises(ValueError, match="this instance is in use already; make one for each optimizer"):
        bind(squeeze, torch.zeros(64, 64), size=size)


def test_a_failed_bind_leaves_the_instance_free():
    squeeze = DoubleSqueeze()
    with pytest.raises(ValueError, match="p0"):
        bind(squeeze, trained(64, 64, dtype=torch.complex64))
    assert bind(squeeze, torch.zeros(64, 64, requires_grad=True)).buckets


def test_one_rank_has_nobody_to_exchange_with():
    assert bind(DoubleSqueeze(), torch.zeros(64, 64), size=1) is None


@pytest.mark.parametrize("method", ["compress", "decompress"])
def test_not_how_horovod_calls_a_compression(method):
    for compression in (DoubleSqueeze, DoubleSqueeze()):
        for arguments in [(torch.zeros(3),), (torch.zeros(3), None)]:
            with pytest.raises(TypeError, match=r"call ds_horovod\.allreduce\(tensor, name=\.\.\.\)"):
                getattr(compression, method)(*arguments)


def test_selection():
    shapes = [(64, 64), (64, 63), (4096,), (2, 2, 1024)]
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    parameters += [torch.zeros(64, 64, dtype=dtype, requires_grad=True) for dtype in (torch.float64, torch.float16)]
    parameters += [torch.zeros(64, 64)]
    session = bind(DoubleSqueeze(), *parameters)
    assert [bucket.names for bucket in session.buckets] == [["p5"], ["p3", "p0"]]


# ---- agreement


def test_repr_tells_compressors_apart():
    different = [*COMPRESSORS, OneBit(), TopK()]
    assert len(set(map(repr, different))) == len(different)


def test_repr_of_equals():
    assert repr(OneBit(2048, "l1")) == repr(OneBit())
    assert repr(TopK(0.01)) == repr(TopK()) == "TopK(ratio=0.01, k=None, values='fp32')"
    first, second, third = Int8(), Int8(), Int8()
    first.levels = second.levels = 3
    assert repr(first) == repr(second) != repr(third)


def test_repr_of_double_squeeze_shows_what_differs_from_the_default():
    assert repr(DoubleSqueeze()) == repr(DoubleSqueeze(Quantize(4), momentum=0)) == "DoubleSqueeze()"
    text = repr(DoubleSqueeze(TopK(0.5), server_compressor=OneBit(64), worker_error=False, server=3, bucket_cap_mb=None))
    assert text == (
        "DoubleSqueeze(TopK(ratio=0.5, k=None, values='fp32'), server_compressor=OneBit(block=64, scale='l1', "
        "granularity='block'), worker_error=False, server=3, bucket_cap_mb=None)"
    )


def test_the_signature_is_that_of_the_options():
    """For help() and for editors, without a second list of the options."""
    shown, expected = inspect.signature(DoubleSqueeze).parameters, inspect.signature(Options).parameters
    assert list(shown.values()) == list(expected.values()) and "momentum" in shown
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        DoubleSqueeze(momentun=0.9)


def test_tab_completion_shows_what_a_user_calls():
    names = {name for name in dir(DoubleSqueeze()) if not name.startswith("_")}
    assert names == {
        "attach", "broadcast_state", "change_compressor", "compress", "decompress", "explain", "flush", "full_state_dict",
        "load_state_dict", "options", "paper", "reset_errors", "reset_stats", "state_dict", "stats", "tentative",
    }  # fmt: skip


@pytest.mark.parametrize(
    "option, value",
    [
        ("worker_error", "off"),
        ("server_error", 0),
        ("lr_aware", "yes"),
        ("warmup_steps", True),
        ("server", True),
        ("momentum", "0.9"),
        ("max_norm", "1"),
        ("min_numel", False),
        ("bucket_cap_mb", "25"),
    ],
)
def test_nothing_of_another_type_is_taken_for_truth_or_a_number(option, value):
    with pytest.raises(ValueError, match=f"DoubleSqueeze: {option} must be .* got {value!r}"):
        DoubleSqueeze(TopK(), **{option: value})


def test_numbers_of_numpy_are_numbers():
    options = DoubleSqueeze(TopK(), server=np.int64(1), momentum=np.float32(0.5), worker_error=np.bool_(True)).options
    assert options == Options(TopK(), server=1, momentum=0.5)
    assert {type(value) for value in (options.server, options.momentum, options.worker_error)} == {int, float, bool}


def test_agreement():
    require_agreement([{"a": 1, "b": [1, 2]}] * 3)


@pytest.mark.parametrize(
    "there, message",
    [
        ({"a": 2, "b": [1, 2]}, "a: 1 on rank 0, 2 on rank 2"),
        ({"a": 1, "b": [1, 3]}, r"b\[1\]: 2 on rank 0, 3 on rank 2"),
        ({"a": 1, "b": [1]}, "b: 2 on rank 0, 1 on rank 2"),
        ({"b": [1, 2]}, "a: 1 on rank 0, None on rank 2"),
        ({"a": 1, "b": [1, 2], "c": 5}, "c: None on rank 0, 5 on rank 2"),
    ],
)
def test_disagreement_is_named(there, message):
    here = {"a": 1, "b": [1, 2]}
    with pytest.raises(ValueError, match=rf"do not agree, so nothing was exchanged:\n  {message}$"):
        require_agreement([here, here, there])


def test_ranks_that_differ_alike_stand_together_and_a_way_out_at_the_end():
    own = [{"weights": {"a": value, "b": 1}, "c": rank // 3} for rank, value in enumerate([1, 2, 3, 2])]
    with pytest.raises(ValueError) as error:
        require_agreement(own, {"weights": "Broadcast them.", "d": "Not this."})
    lines = "weights of a: 1 on rank 0, 2 on ranks 1, 3, 3 on rank 2\n  c: 0 on rank 0, 1 on rank 3\nBroadcast them."
    assert str(error.value).endswith(f"so nothing was exchanged:\n  {lines}")


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_checksums_tell_single_elements_and_places_whatever_the_strides(dtype, monkeypatch):
    monkeypatch.setattr("ds_horovod.checksum._CHUNK", 5)
    x = torch.tensor([[1, 0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0]]).to(dtype)
    tensors = {"x": x, "moved": x.flatten().roll(1).view(3, 7)}
    for i in range(21):
        tensors[f"another at {i}"] = x.clone()
        tensors[f"another at {i}"].view(-1)[i] = 0 if x.view(-1)[i] else 1
    found = checksums(tensors.items())
    assert len(set(found.values())) == len(tensors)
    assert checksums([("empty", x[:0]), ("scalar", x[0, 0])]).keys() == {"empty", "scalar"}
    assert checksums([("x", x.t().contiguous().t())]) == {"x": found["x"]}
    assert checksums([("sparse", torch.eye(3).to_sparse()), ("meta", torch.zeros(3, device="meta"))]) == {}


def test_a_checksum_depends_on_the_sign_of_zero():
    zero = torch.zeros(3)
    assert checksums([("zero", zero)])["zero"] != checksums([("zero", -zero)])["zero"]


def test_many_disagreements_are_counted():
    with pytest.raises(ValueError, match=r"b\[4\]: 4 on rank 0, -1 on rank 1\n  and 95 more$"):
        require_agreement([{"b": list(range(100))}, {"b": [-1] * 100}])


@pytest.mark.parametrize(
    "key, options, weight, shape",
    [
        ("compressor", {"compressor": TopK(0.02)}, 0.5, (64, 64)),
        ("server_compressor", {"server_compressor": TopK(0.02)}, 0.5, (64, 64)),
        ("worker_error", {"worker_error": False}, 0.5, (64, 64)),
        ("server_error", {"server_error": False}, 0.5, (64, 64)),
        ("warmup_steps", {"warmup_steps": 3}, 0.5, (64, 64)),
        ("max_norm", {"max_norm": 3.0}, 0.5, (64, 64)),
        ("lr_aware", {"lr_aware": True}, 0.5, (64, 64)),
        ("weight", {}, 1.0, (64, 64)),
        ("min_numel", {"min_numel": 7}, 0.5, (64, 64)),
        ("bucket_cap_mb", {"bucket_cap_mb": None}, 0.5, (64, 64)),
        (r"parameters\[0\]", {}, 0.5, (32, 128)),
    ],
)
def test_sessions_compare_everything_that_matters(key, options, weight, shape):
    class Transport(InProcessTransport):
        def gather_objects(self, value, name):
            return [{**value, **expected}, dict(value)]

    def step(options, weight, shape):
        defaults = {"compressor": OneBit(), "server_compressor": OneBit(), "min_numel": 1}
        selection, p = Selection(Options(**{**defaults, **options})), torch.zeros(shape, requires_grad=True)
        session = Session("test", [("p0", p)], selection, weight, Transport.group(2)[0])
        p.grad = torch.zeros(shape)
        if session.admit(p):
            session.ready(p)
        return session

    expected = describe(step({}, 0.5, (64, 64)))
    step({}, 0.5, (64, 64)).flush()
    with pytest.raises(ValueError, match=rf"nothing was exchanged:\n  {key}: .* on rank 0, .* on rank 1$"):
        step(options, weight, shape).flush()


# ---- a user's own compressor


class Wrong(Int8):
    def __init__(self, payload=None, values=None):
        self.payload, self.values = payload, values

    def compress(self, values):
        return super().compress(values) if self.payload is None else self.payload

    def decompress(self, payload, numel):
        return super().decompress(payload, numel) if self.values is None else self.values


def exchange_with(compressor):
    layout, error = pack([100], 32, 1), torch.zeros(128)
    payload = torch.zeros(1, compressor.chunk_nbytes(layout), dtype=torch.uint8)
    compressor.encode(layout, [torch.ones(100)], FeedbackState(error), payload)
    compressor.decode(layout, payload, [torch.empty(100)])


@pytest.mark.parametrize("nbytes", [0, 103, 105])
def test_compress_of_another_size(nbytes):
    with pytest.raises(ValueError, match=f"compress made {nbytes} bytes of 100 values, but payload_nbytes says 104"):
        exchange_with(Wrong(payload=torch.zeros(nbytes, dtype=torch.uint8)))


@pytest.mark.parametrize("values", [torch.zeros(99), torch.zeros(1), torch.zeros(10, 10), torch.zeros(100).int()])
def test_decompress_of_another_shape_or_dtype(values):
    message = f"decompress must return 100 floating-point values, got {values.dtype} {tuple(values.shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        exchange_with(Wrong(values=values))


@pytest.mark.parametrize("kind", [TopK, RandomK])
@pytest.mark.parametrize("ratio", [1, 10, np.int64(1), True, 10.0, "0.1", math.nan], ids=repr)
def test_a_ratio_is_a_share(kind, ratio):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: ratio must be .* got {re.escape(repr(ratio))}: a share, 0\.01 for 1 %"
    ):
        kind(ratio)
    assert kind(1.0).ratio == 1.0 and kind(np.float64(0.5)) == kind(0.5)


@pytest.mark.parametrize(
    "make, plain",
    [
        (lambda n: TopK(k=n(3)), TopK(k=3)),
        (lambda n: Quantize(n(2), n(64), seed=n(7)), Quantize(2, 64, seed=7)),
        (lambda n: Ternary(n(64), seed=n(7)), Ternary(64, seed=7)),
        (lambda n: OneBit(n(64)), OneBit(64)),
        (lambda n: RandomK(0.1, seed=n(7)), RandomK(0.1, seed=7)),
    ],
)
def test_integers_of_numpy_are_integers_and_bools_are_not(make, plain):
    assert make(np.int64) == plain and repr(make(np.int32)) == repr(plain)
    for other in (bool, np.bool_, float):
        with pytest.raises(ValueError, match=f"{type(plain).__name__}: .* must be"):
            make(other)


def test_names_are_literals():
    for kind, option, names in (
        (TopK, "values", ("fp32", "fp16", "sign")),
        (RandomK, "values", ("fp32", "fp16")),
        (Quantize, "rounding", ("nearest", "stochastic")),
        (Ternary, "scale", ("absmax", "l2")),
        (OneBit, "granularity", ("block", "parameter", "bucket")),
        (OneBit, "scale", ("l1", "l2")),
        (Cast, "dtype", ("fp16", "bf16")),
    ):
        assert get_args(get_type_hints(kind)[option]) == names
        with pytest.raises(ValueError, match=f"{option} must be one of .* got 1"):
            kind(**{option: 1})
