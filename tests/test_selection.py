"""What is compressed, with what, and what `explain` says of it."""

import re

import pytest
import torch
from support import generator
from torch import nn

from ds_horovod import Cast, DoubleSqueeze, OneBit, Quantize, TopK, double_squeeze
from ds_horovod.in_process import InProcessTransport, Workers

SHAPES = {"embedding.weight": (100, 64), "body.weight": (80, 80), "body.bias": (80,), "head.weight": (10, 10)}


def named(dtypes=()):
    dtypes = dict(dtypes)
    return [
        (name, torch.zeros(shape, dtype=dtypes.get(name, torch.float32), requires_grad=True)) for name, shape in SHAPES.items()
    ]


def bind(choose, parameters=None, **options):
    squeeze = DoubleSqueeze(OneBit(64), choose=choose, **options)
    return double_squeeze.bind(
        squeeze, "test", named() if parameters is None else parameters, True, InProcessTransport.group(2)[0]
    ).session


def chosen(session):
    return {
        name: bucket.exchange.compressors() for bucket in session.buckets for name in bucket.names
    }  # fmt: skip


@pytest.mark.parametrize("as_function", [False, True])
def test_choices(as_function):
    table = {"embedding.*": False, "head.*": True, "body.bias": True, "*.weight": TopK(0.5)}

    def function(name, p):
        assert p.shape == SHAPES[name]
        return next((v for k, v in table.items() if re.fullmatch(k.replace("*", ".*"), name)), None)

    assert chosen(bind(function if as_function else table)) == {
        "head.weight": (OneBit(64), OneBit(64)),
        "body.bias": (OneBit(64), OneBit(64)),
        "body.weight": (TopK(0.5), TopK(0.5)),
    }


def test_a_compressor_leaves_the_rule_of_sizes_alone():
    assert chosen(bind({"*": TopK(0.5)})) == dict.fromkeys(["embedding.weight", "body.weight"], (TopK(0.5), TopK(0.5)))


def test_an_explicit_server_compressor_is_that_of_all():
    session = bind({"body.*": TopK(0.5)}, server_compressor=Cast("fp16"))
    assert chosen(session) == {"embedding.weight": (OneBit(64), Cast("fp16")), "body.weight": (TopK(0.5), Cast("fp16"))}


def test_parameters_of_another_compressor_never_share_a_bucket():
    session = bind({"body.weight": OneBit(64), "head.*": True})
    assert [bucket.names for bucket in session.buckets] == [["head.weight", "body.weight", "embedding.weight"]]
    session = bind({"body.weight": OneBit(32), "head.*": True})
    assert [bucket.names for bucket in session.buckets] == [["head.weight", "embedding.weight"], ["body.weight"]]


def test_the_law_with_choices():
    """mean_i(g_i + e_i) + E is what arrives and what stays, for each parameter with its own compressor."""
    g = generator(0)
    workers = Workers(
        lambda: DoubleSqueeze(OneBit(64), choose={"head.*": TopK(0.1), "body.bias": True}, min_numel=64), named(), 3
    )
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    arrived = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for _ in range(4):
        gradients = [[torch.randn(shape, generator=g) for shape in SHAPES.values()] for _ in range(3)]
        for i, name in enumerate(SHAPES):
            total[name] += torch.stack([own[i] for own in gradients]).double().mean(0)
        for name, result in zip(SHAPES, workers.exchange(gradients), strict=True):
            arrived[name] += result
    sessions = workers.sessions
    for b, bucket in enumerate(sessions[0].buckets):
        worker = torch.stack([s.buckets[b].exchange.worker_error for s in sessions]).double().mean(0)
        server = torch.cat([s.buckets[b].exchange.server_error for s in sessions])
        layout = bucket.exchange.layout
        for name, offset, numel in zip(bucket.names, layout.offsets, layout.numels, strict=True):
            kept = (worker + server)[offset : offset + numel].view(SHAPES[name])
            torch.testing.assert_close(arrived[name] + kept, total[name], rtol=1e-4, atol=1e-5)
            assert kept.abs().max() > 0.01


# ---- bad input


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"choose has the pattern 'heads\.\*', which matches no parameter; they are embedding"):
        bind({"heads.*": True})


def test_what_cannot_be_compressed():
    with pytest.raises(ValueError, match=r"choose says True for body\.weight, but torch\.float64 cannot be compressed"):
        bind({"body.*": True}, named({"body.weight": torch.float64, "body.bias": torch.float64}))
    parameters = named({"body.weight": torch.float64})
    assert "body.weight" not in chosen(bind({"*.weight": TopK(0.5)}, parameters))


@pytest.mark.parametrize(
    "choose, message",
    [
        ("body", "choose must map patterns to choices, or be a function; got 'body'"),
        ({"body.*": "onebit"}, r"choose\['body\.\*'\] must be a ds_horovod Compressor, got 'onebit'"),
        ({"body.*": OneBit}, r"choose\['body\.\*'\] must be .*; write OneBit\(\.\.\.\)"),
        ({3: True}, "choose must have patterns of names, got 3"),
    ],
)
def test_choices_that_are_none(choose, message):
    with pytest.raises(TypeError, match=message):
        DoubleSqueeze(choose=choose)


def test_a_function_that_gives_something_else():
    with pytest.raises(TypeError, match=r"choose must give True, False, a Compressor or None; got .no. for embedding\.weight"):
        bind(lambda name, p: "no")


@pytest.mark.parametrize("choose", [{"body.*": OneBit()}, lambda name, p: OneBit()], ids=["patterns", "function"])
def test_momentum_needs_chosen_compressors_that_leave_elements_out(choose):
    with pytest.raises(ValueError, match=r"momentum=0\.9 needs a compressor that leaves elements out"):
        squeeze = DoubleSqueeze(TopK(), momentum=0.9, choose=choose)
        double_squeeze.bind(squeeze, "test", named(), True, InProcessTransport.group(2)[0])


def test_errors_need_chosen_compressors_that_contract():
    with pytest.raises(ValueError, match=r"choose\('embedding\.weight'\) must be a contraction where an error is kept"):
        bind(lambda name, p: Quantize(2, 256, "stochastic", "l2"))


# ---- explain


def test_explain():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
    model[1].weight.requires_grad_(False)
    text = DoubleSqueeze(OneBit(64), server_compressor=Cast("fp16")).explain(model, workers=4)
    assert text.splitlines() == [
        "bucket 0: OneBit(block=64, scale='l1', granularity='block'), replies Cast(dtype='fp16')",
        "  39.1 KiB of gradients, pushes 1.9 KiB, pulls 20.0 KiB",
        "    0.weight (100, 100)",
        "not compressed: 440 B of gradients, by an ordinary allreduce",
        "    0.bias (100,): one dimension",
        "    1.bias (10,): one dimension",
        "each of 4 ranks sends 17.1 KiB a step in place of 59.2 KiB, 3.5 times less",
    ]


def test_explain_says_why():
    parameters = named({"embedding.weight": torch.float64})
    text = DoubleSqueeze(choose={"body.weight": False}).explain(parameters)
    assert "embedding.weight (100, 64): float64\n" in text
    assert "body.weight (80, 80): choose\n" in text
    assert "head.weight (10, 10): under 4096 elements\n" in text
    assert text.endswith("1.0 times less")


def test_explain_of_an_optimizer_is_what_is_sent():
    """The bytes that it announces are those that stats() counts."""
    workers = Workers(lambda: DoubleSqueeze(OneBit(64), choose={"body.*": TopK(0.1)}), named(), 3)
    workers.exchange([[torch.ones(shape) for shape in SHAPES.values()] for _ in range(3)])
    squeeze, session = workers.squeezes[0], workers.sessions[0]
    plans = session.plan(frozenset())
    sent = sum(2 / 3 * (plan.push_nbytes + plan.reply_nbytes) for plan in plans)
    stats = squeeze.stats()
    assert sent == pytest.approx(stats["compressed_bytes_sent"])
    assert squeeze.explain() == DoubleSqueeze(OneBit(64), choose={"body.*": TopK(0.1)}).explain(named(), workers=3)
    assert f"{stats['compression_ratio']:.1f} times less" in squeeze.explain()


def test_explain_on_one_rank():
    squeeze = DoubleSqueeze(OneBit(64), choose={"body.*": TopK(0.1)})
    double_squeeze.bind(squeeze, "alone", named(), True, InProcessTransport.group(1)[0])
    alone = "one rank: nothing is exchanged, and so nothing compressed"
    with_four = DoubleSqueeze(OneBit(64), choose={"body.*": TopK(0.1)}).explain(named(), workers=4)
    assert squeeze.explain(workers=4) == f"{alone}; with workers=4:\n{with_four}"
    assert squeeze.explain().startswith(f"{alone}; with workers=2:\nbucket 0: ")
    assert squeeze.explain(workers=1) == squeeze.explain(named(), workers=1) == alone
    for wrong in (0, 2.0, True, "2"):
        with pytest.raises(ValueError, match=f"workers must be a whole number of ranks, 1 or more; got {wrong!r}"):
            squeeze.explain(workers=wrong)


def test_explain_without_a_model():
    with pytest.raises(ValueError, match="explain needs a model"):
        DoubleSqueeze().explain()
