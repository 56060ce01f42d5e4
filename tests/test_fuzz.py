"""Whatever hypothesis thinks of: layouts, options, orders of arrival and polls obey the law; no bytes lead a decoder astray.

DS_HOROVOD_FUZZ=100 python -m pytest tests/test_fuzz.py      # a hundred times as many examples, and other ones each time
"""

import math
import os
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from random import Random
from unittest import mock

import pybind11
import pytest
import torch
from emulator import SANITIZED, compiled, sanitized
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import COMPRESSORS, Int8, assert_same_bits, generator
from test_kernels import on, oracle

from ds_horovod import DoubleSqueeze, NoCompression, OneBit, Ternary, TopK, _cpu
from ds_horovod.double_squeeze import bind
from ds_horovod.feedback import FeedbackState
from ds_horovod.in_process import InProcessTransport
from ds_horovod.kernels import cpu
from ds_horovod.layout import pack
from ds_horovod.uncompressed import clip

ROOT = Path(__file__).parent.parent
MANY = int(os.environ.get("DS_HOROVOD_FUZZ", "0"))
DTYPES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""And how far apart both sides of the law may be, relative to the largest value: outputs are rounded to the dtype."""


def examples(count):
    return settings(
        max_examples=count * max(1, MANY), derandomize=not MANY, deadline=None, print_blob=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# ---- the law


STEPS = 5
SPOILT = 2  # the step in which something is not finite
FROZEN = (3, 4)  # steps in which a parameter is


class Late(InProcessTransport):
    """Says "not yet" whenever it is told to."""

    answers: "list[bool]"

    def poll(self, handle):
        return super().poll(handle) and (not self.answers or self.answers.pop())

    def waiting(self, seconds, names):
        raise AssertionError(f"{names} never came")


def a_run(workers, shapes, dtypes=None, *, average=True, spoils=None, frozen=None, random=0, **options):
    """What runs may differ in; what is not named is plain."""
    plain = {"worker_error": True, "server_error": True, "momentum": 0.0, "max_norm": None, "server": None, "min_numel": 1}
    dtypes = [torch.float32] * len(shapes) if dtypes is None else dtypes
    random = Random(random) if isinstance(random, int) else random
    return workers, shapes, dtypes, average, spoils, frozen, random, plain | options


@st.composite
def runs(draw):
    workers, compressor = draw(st.integers(2, 5)), draw(st.sampled_from(COMPRESSORS))
    momentum = draw(st.sampled_from([0.0, 0.0, 0.5, 0.9])) if compressor.sparse else 0.0
    compensates = draw(st.sampled_from([(True, True)] * 5 + [(True, False), (False, True), (False, False)]))
    choices = st.booleans() | st.sampled_from([q for q in COMPRESSORS if q.sparse or not momentum])
    shapes = draw(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=6))
    return a_run(
        workers,
        shapes,
        draw(st.lists(st.sampled_from(list(DTYPES)), min_size=len(shapes), max_size=len(shapes))),
        average=draw(st.sampled_from([True, True, False])),
        spoils=draw(st.sampled_from([None, None, math.nan, math.inf, -math.inf, 3e38])),
        frozen=draw(st.none() | st.integers(0, len(shapes) - 1)),
        random=draw(st.randoms(use_true_random=False)),
        compressor=compressor,
        server_compressor=draw(st.none() | st.sampled_from(COMPRESSORS)),
        worker_error=bool(momentum) or compensates[0],
        server_error=compensates[1],
        momentum=momentum,
        warmup_steps=draw(st.sampled_from([0, 0, 1, 2])),
        max_norm=draw(st.sampled_from([None, None, 0.5, 100.0])),
        server=draw(st.none() | st.integers(0, workers - 1)),
        bucket_cap_mb=draw(st.sampled_from([None, 1e-4, 1e-3, 1e-2])),
        min_numel=draw(st.sampled_from([1, 1, 1, 30])),
        choose=draw(st.none() | st.fixed_dictionaries({"p0": choices})),
    )


def training(session, gradients, orders, frozen, history):
    """A worker's loop, which yields wherever others may go on. Records its residual before each step, and the results of it."""
    for step, (own, order) in enumerate(zip(gradients, orders, strict=True)):
        history.append((session.export_residual(), {}))
        for i, (_, p) in enumerate(session.parameters):
            p.requires_grad_(i != frozen or step not in FROZEN)
        for i in order:
            p = session.parameters[i][1]
            p.grad = own[i]
            if session.admit(p):
                session.ready(p)
            yield
        session.flush()
        while session.pipeline.in_flight:
            session.poll()
            yield
        history[-1][1].update((name, session.finish(p)) for name, p in session.parameters if session.covers(p))
    history.append((session.export_residual(), {}))


def residuals(histories, step):
    """By parameter mean_i(e_i) + E, and the mean velocity."""
    found = defaultdict(lambda: (0.0, 0.0))
    for history in histories:
        for name, (error, velocity) in history[step][0].items():
            e, u = found[name]
            found[name] = e + error.double(), u + (0.0 if velocity is None else velocity.double())
    return found


@examples(150)
@given(runs())
@example(a_run(2, [(40, 7)] * 3, frozen=1, server=0, compressor=OneBit(64, granularity="bucket")))  # a frozen one moved
@example(  # whose workers roll back elements that were sent, whose velocity has become zero
    a_run(3, [(40, 7)] * 3, spoils=math.inf, compressor=TopK(0.05), server_compressor=OneBit(64), momentum=0.9)
)
def test_the_law_whatever_comes(run):
    workers, shapes, dtypes, average, spoils, frozen, random, options = run
    names, weight, g = [f"p{i}" for i in range(len(shapes))], 1 / workers if average else 1, generator(random.randrange(2**32))
    gradients = [[[] for _ in range(STEPS)] for _ in range(workers)]
    given_ = [dict.fromkeys(names, 0.0) for _ in range(STEPS)]
    spoilt = random.randrange(workers), random.randrange(len(shapes))
    for worker, own in enumerate(gradients):
        for step in range(STEPS):
            magnitude = random.choice([1e-3, 1, 1, 1, 10, 5e4])  # the last: as large as float16 holds
            drawn = [(torch.randn(shape, generator=g) * magnitude).clamp(-65504, 65504) for shape in shapes]
            own[step] = [values.to(dtype) for values, dtype in zip(drawn, dtypes, strict=True)]
            if frozen is not None and step in FROZEN:
                own[step][frozen].zero_()
            if spoils is not None and step == SPOILT and worker == spoilt[0]:
                flat = own[step][spoilt[1]].view(-1)
                flat[random.randrange(len(flat))] = spoils
            clipped = [(name, gradient.clone()) for name, gradient in zip(names, own[step], strict=True)]
            if options["max_norm"] is not None:
                clip(clipped, options["max_norm"])
            for name, gradient in clipped:
                given_[step][name] = given_[step][name] + gradient.double() * weight

    histories, loops = [], []
    for transport, own in zip(Late.group(workers, options["server"]), gradients, strict=True):
        transport.answers = [random.random() < 0.5 for _ in range(200)]
        parameters = [(n, torch.zeros(s, dtype=d, requires_grad=True)) for n, s, d in zip(names, shapes, dtypes, strict=True)]
        session = bind(DoubleSqueeze(**options), "fuzz", parameters, average, transport).session
        orders = [random.sample(range(len(shapes)), len(shapes)) for _ in range(STEPS)]
        histories.append([])
        loops.append(training(session, own, orders, frozen, histories[-1]))
    for _ in range(300):  # some run ahead of others
        next(loops[random.randrange(workers)], None)
    for _ in range(10_000):
        loops = [loop for loop in loops if next(loop, loops) is not loops]
    assert not loops, "a worker waits for ever"

    for step, given_here in enumerate(given_):
        before, after = residuals(histories, step), residuals(histories, step + 1)
        for i, name in enumerate(names):
            if name not in histories[0][step][1]:
                continue  # not compressed
            outputs = [history[step][1][name] for history in histories]
            for output in outputs[1:]:
                assert torch.equal(output.view(-1).view(torch.uint8), outputs[0].view(-1).view(torch.uint8)), "replicas differ"
            out, (residual, velocity), (e, u) = outputs[0].double(), before[name], after[name]
            assert e.isfinite().all()
            assert out.isfinite().all() or (spoils is not None and step >= SPOILT)
            if i == frozen and step in FROZEN:
                assert not out.any() and torch.equal(e, residual) and torch.equal(torch.as_tensor(u), torch.as_tensor(velocity))
                continue
            if not (options["worker_error"] and options["server_error"]):
                continue
            left = torch.where(out.isfinite(), given_here[name], 0.0) + options["momentum"] * velocity + residual
            # Elements that do not arrive change nothing.
            right = torch.where(out.isfinite(), out + e, e + options["momentum"] * u)
            largest = max(1e-3, *(float(x.nan_to_num(0, 0, 0).abs().max()) for x in (left, out, e, given_here[name])))
            assert (left - right).abs().max() <= DTYPES[dtypes[i]] * largest, f"{name} in step {step}"


# ---- decoders


FUSED = [compressor for compressor in COMPRESSORS if not isinstance(compressor, Int8)]
CANARY = 0 if SANITIZED in os.environ else 16
"""Elements before and after each tensor that is written to. AddressSanitizer sees the ends of tensors itself."""
PASSES = ("decode", "accumulate", "serve", "nonfinite_mask")


class Guarded:
    """A tensor full of sevens between canaries."""

    def __init__(self, numel, dtype):
        self._whole = torch.full((numel + 2 * CANARY,), 7, dtype=dtype)
        self.tensor = self._whole[CANARY : CANARY + numel]

    def holds(self):
        return bool((self._whole[:CANARY] == 7).all() and (self._whole[CANARY + len(self.tensor) :] == 7).all())

    def is_untouched(self):
        return self.holds() and bool((self.tensor == 7).all())


@st.composite
def payloads(draw):
    """Bytes of the right size: what an encoder wrote with some of them changed, or any."""
    codec = draw(st.sampled_from(FUSED))
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=5))
    if draw(st.integers(0, 5)) == 5:
        sizes.append(draw(st.integers(60_000, 200_000)))  # several runs of top-k entries
    layout = pack(sizes, codec.block, draw(st.integers(1, 3)))
    payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
    g = generator(draw(st.integers(0, 2**32 - 1)))
    codec.encode(layout, [torch.randn(numel, generator=g) for numel in layout.numels], FeedbackState(), payload)
    chunk = payload[draw(st.integers(0, layout.shards - 1))]
    if draw(st.booleans()):
        size = draw(st.sampled_from([16, 64, len(chunk)]))
        chunk[:size] = torch.randint(0, 256, (len(chunk[:size]),), dtype=torch.uint8, generator=g)
    else:
        places = st.integers(0, min(63, len(chunk) - 1)) | st.integers(0, len(chunk) - 1)
        for _ in range(draw(st.integers(1, 8))):
            chunk[draw(places)] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    return codec, layout, payload, draw(st.sampled_from(list(DTYPES))), draw(st.integers(1, 3))


def with_byte(codec, numel, place, byte):
    """A payload of ones with one byte changed."""
    layout = pack([numel], codec.block, 1)
    payload = torch.zeros(1, codec.chunk_nbytes(layout), dtype=torch.uint8)
    codec.encode(layout, [torch.ones(numel)], FeedbackState(), payload)
    payload[0, place] = byte
    return codec, layout, payload, torch.float32, 1


def outcome(what, codec, layout, payload, dtype):
    """What a pass makes of a payload; None: it is refused. It must not touch what it was not given."""
    targets = [Guarded(numel, dtype) for numel in layout.numels] if what == "decode" else []
    totals = [Guarded(layout.shard_numel, torch.float32) for _ in range(layout.shards)] if what != "decode" else []
    replies, mask = [], None
    try:
        if what == "decode":
            codec.decode(layout, payload, [guarded.tensor for guarded in targets])
        elif what == "nonfinite_mask":
            mask = codec.nonfinite_mask(layout, payload)
        for shard, total in enumerate(totals):
            one = layout.shard(shard)
            if what == "accumulate":
                codec.accumulate(one, payload[shard], 0.5, total.tensor)
            elif what == "serve" and one.numels:
                for server in (codec, NoCompression()):
                    replies.append(Guarded(server.chunk_nbytes(one), torch.uint8))
                    pushed = torch.stack([payload[shard]] * 2)
                    server.serve(one, pushed, codec, 0.5, FeedbackState(total.tensor), replies[-1].tensor.zero_())
    except ValueError:
        assert what != "decode" or all(guarded.is_untouched() for guarded in targets), f"{codec!r} writes before it refuses"
        refused = True
    else:
        refused = False
    assert all(guarded.holds() for guarded in targets + totals + replies), f"{what} of {codec!r} writes past its end"
    if refused:
        return None
    # Every second reply is of floats, in which all NaNs are alike.
    sent = [reply.tensor.view(torch.float32) if i % 2 else reply.tensor for i, reply in enumerate(replies)]
    return [guarded.tensor for guarded in targets + totals] + sent + ([] if mask is None else [mask])


@examples(200)
@given(payloads())
@example(with_byte(Ternary(64), 64, 28, 242))  # a reply repeated the digit that no element has
def test_no_bytes_lead_a_decoder_astray(case):
    """On every instruction set and any number of threads it makes of them what the oracle does, or refuses them too."""
    codec, layout, payload, dtype, threads = case
    for what in PASSES:
        with oracle():
            expected = outcome(what, codec, layout, payload, dtype)
        for instruction_set in _cpu.instruction_sets():
            with on(instruction_set), mock.patch.object(cpu, "_threads", return_value=threads):
                native = outcome(what, codec, layout, payload, dtype)
            assert (native is None) == (expected is None), f"{what} of {codec!r} is refused by one alone"
            for own, other in zip(native or [], expected or [], strict=True):
                assert_same_bits(own, other, f"{what} of {codec!r} ({instruction_set}):")


def _sanitized_kernels():
    """The CPU kernels as they are, with AddressSanitizer and UBSan in them."""
    folder = ROOT / "csrc" / "cpu"
    sources = [str(folder / f"{name}.cpp") for name in ("module", "avx2", "portable")]
    return compiled(
        ["-std=c++17", "-O0", "-shared", "-fPIC", "-ffp-contract=off", "-pthread", "-fvisibility=hidden",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{sysconfig.get_path('include')}",
         f"-I{pybind11.get_include()}", *sources],
        "".join(path.read_text() for path in sorted(folder.iterdir())),
    )  # fmt: skip


@pytest.mark.jobs
def test_no_bytes_lead_a_decoder_astray_under_sanitizers(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(f"""
import importlib.util, sys
sys.path[:0] = [{str(ROOT)!r}]
spec = importlib.util.spec_from_file_location("ds_horovod._cpu", {str(_sanitized_kernels())!r})
sys.modules["ds_horovod._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ds_horovod._cpu"])
import pytest
options = ["-q", "-pno:cacheprovider", "-pno:xdist", "--capture=no", "-k", "astray and not sanitizers"]
sys.exit(pytest.main([*options, {str(__file__)!r}]))
""")
    result = sanitized([sys.executable, str(script)])
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-2000:] + result.stderr[-6000:]
