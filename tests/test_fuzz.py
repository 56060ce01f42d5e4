"""Whatever hypothesis thinks of: layouts, options, orders of arrival and polls obey the law; no bytes lead a decoder astray.

DS_HOROVOD_FUZZ=100 python -m pytest tests/test_fuzz.py      # a hundred times as many examples, and other ones each time
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from emulator import sanitized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import COMPRESSORS, Int8, generator

from ds_horovod import DoubleSqueeze, NoCompression
from ds_horovod.in_process import InProcessTransport
from ds_horovod.layout import pack
from ds_horovod.memory import Memory
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


class Late(InProcessTransport):
    """Says "not yet" whenever it is told to."""

    answers: "list[bool]"

    def poll(self, handle):
        return super().poll(handle) and (not self.answers or self.answers.pop())

    def waiting(self, seconds, names):
        raise AssertionError(f"{names} never came")


@st.composite
def runs(draw):
    workers = draw(st.integers(2, 5))
    compressor = draw(st.sampled_from(COMPRESSORS))
    options = {
        "compressor": compressor,
        "server_compressor": draw(st.none() | st.sampled_from(COMPRESSORS)),
        "momentum": draw(st.sampled_from([0.0, 0.0, 0.5, 0.9])) if compressor.sparse else 0.0,
        "warmup_steps": draw(st.sampled_from([0, 0, 1, 2])),
        "max_norm": draw(st.sampled_from([None, None, 0.5, 100.0])),
        "server": draw(st.none() | st.integers(0, workers - 1)),
        "bucket_cap_mb": draw(st.sampled_from([None, 1e-4, 1e-3, 1e-2])),
        "min_numel": draw(st.sampled_from([1, 1, 1, 30])),
    }
    shapes = draw(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=6))
    dtypes = draw(st.lists(st.sampled_from(list(DTYPES)), min_size=len(shapes), max_size=len(shapes)))
    return workers, options, shapes, dtypes, draw(st.randoms(use_true_random=False)), draw(st.booleans())


def waits(sessions):
    """By parameter mean_i(e_i) + E, and the mean velocity."""
    found = {}
    for session in sessions:
        for name, (error, velocity) in session.owed().items():
            e, u = found.get(name, (0.0, 0.0))
            found[name] = e + error.double(), u + (0.0 if velocity is None else velocity.double())
    return found


@examples(150)
@given(runs())
def test_the_law_whatever_comes(run):
    workers, options, shapes, dtypes, draw, spoil = run
    names = [f"p{i}" for i in range(len(shapes))]
    sessions, g = [], generator(draw.randrange(2**32))
    for transport in Late.group(workers, options["server"]):
        transport.answers = [draw.random() < 0.5 for _ in range(200)]
        parameters = [(n, torch.zeros(s, dtype=d, requires_grad=True)) for n, s, d in zip(names, shapes, dtypes, strict=True)]
        sessions.append(DoubleSqueeze(**options).bind("fuzz", parameters, True, transport))
    for step in range(4):
        before, given_ = waits(sessions), dict.fromkeys(names, 0.0)
        bad = (draw.randrange(workers), draw.randrange(len(shapes))) if spoil and step == 2 else None
        for worker, session in enumerate(sessions):
            magnitude = 10.0 ** draw.choice([-3, 0, 0, 0, 1])
            gradients = [(name, (torch.randn(p.shape, generator=g) * magnitude).to(p.dtype)) for name, p in session.parameters]
            if bad is not None and bad[0] == worker:
                flat = gradients[bad[1]][1].view(-1)
                flat[draw.randrange(len(flat))] = draw.choice([math.nan, math.inf, -math.inf])
            clipped = [(name, gradient.clone()) for name, gradient in gradients]
            if options["max_norm"] is not None:
                clip(clipped, options["max_norm"])
            for name, gradient in clipped:
                given_[name] = given_[name] + gradient.double() / workers
            order = list(range(len(shapes)))
            draw.shuffle(order)
            for i in order:
                p = session.parameters[i][1]
                p.grad = gradients[i][1]
                if session.meet(p):
                    session.ready(p)
        for session in sessions:
            session.depart()
        for _ in range(10_000):
            if not any(session._journeys for session in sessions):
                break
            for session in sessions:
                session.poll()
        after = waits(sessions)
        for i, (name, first) in enumerate(sessions[0].parameters):
            if not sessions[0].covers(first):
                continue
            outputs = [session.finish(session.parameters[i][1]) for session in sessions]
            for output in outputs[1:]:
                assert torch.equal(output.view(-1).view(torch.uint8), outputs[0].view(-1).view(torch.uint8)), "replicas differ"
            assert after[name][0].isfinite().all()
            out = outputs[0].double()
            owed, velocity = before[name]
            left = given_[name] + options["momentum"] * velocity + owed
            right = out + after[name][0]
            where = out.isfinite() & left.isfinite()
            assert bad is not None or where.all()
            if where.any():
                largest = max(1e-3, *(float(x[where].abs().max()) for x in (left, out, after[name][0])))
                assert (left - right)[where].abs().max() <= DTYPES[dtypes[i]] * largest, f"{name} in step {step}"


# ---- decoders


FUSED = [compressor for compressor in COMPRESSORS if not isinstance(compressor, Int8)]
CANARY = 8  # elements before and after each tensor that is written to


def guarded(numel, dtype):
    whole = torch.full((numel + 2 * CANARY,), 7.0, dtype=dtype)
    return whole, whole[CANARY : CANARY + numel]


@st.composite
def payloads(draw):
    """Bytes of the right size: what an encoder wrote with some of them changed, or any."""
    codec = draw(st.sampled_from(FUSED))
    layout = pack(draw(st.lists(st.integers(1, 3000), min_size=1, max_size=5)), codec.block, draw(st.integers(1, 3)))
    payload = torch.zeros(layout.shards, codec.chunk_nbytes(layout), dtype=torch.uint8)
    seed = draw(st.integers(0, 2**32 - 1))
    values = [torch.randn(numel, generator=generator(seed)) for numel in layout.numels]
    codec.encode(layout, values, Memory(), payload)
    flat = payload.view(-1)
    if draw(st.booleans()):
        size = draw(st.sampled_from([16, 64, len(flat)]))
        flat[:size] = torch.randint(0, 256, (len(flat[:size]),), dtype=torch.uint8, generator=generator(seed))
    else:
        for _ in range(draw(st.integers(1, 8))):
            flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    return codec, layout, payload, draw(st.sampled_from(list(DTYPES)))


@examples(300)
@given(payloads())
def test_no_bytes_lead_a_decoder_astray(case):
    """It decodes to something or raises ValueError, and nothing outside of what it was given is written."""
    codec, layout, payload, dtype = case
    for what in ("decode", "accumulate", "serve", "lost"):
        targets = [guarded(numel, dtype) for numel in layout.numels]
        totals = [guarded(layout.shard_numel, torch.float32) for _ in range(layout.shards)]
        try:
            if what == "decode":
                codec.decode(layout, payload, [inside for _, inside in targets])
            elif what == "lost":
                codec.lost(layout, payload)
            for shard, (_, total) in enumerate(totals):
                one = layout.shard(shard)
                if what == "accumulate":
                    codec.accumulate(one, payload[shard], 0.5, total)
                elif what == "serve" and one.numels:
                    for server in (codec, NoCompression()):
                        if math.lcm(server.block, codec.block) == codec.block:
                            reply = torch.zeros(server.chunk_nbytes(one), dtype=torch.uint8)
                            server.serve(one, torch.stack([payload[shard]] * 2), codec, 0.5, Memory(total), reply)
        except ValueError:
            pass
        for whole, _ in targets + totals:
            for edge in (whole[:CANARY], whole[-CANARY:]):
                assert (edge == 7).all(), f"{what} of {codec!r} writes past its end"


def _sanitized_kernels(folder):
    """The CPU kernels as they are, with AddressSanitizer and UBSan in them."""
    import pybind11

    target = folder / "_cpu.so"
    sources = [str(ROOT / "csrc" / "cpu" / f"{name}.cpp") for name in ("module", "avx2", "portable")]
    includes = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-pthread", "-fvisibility=hidden",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{includes}", f"-I{pybind11.get_include()}",
         *sources, "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


def test_no_bytes_lead_a_decoder_astray_under_sanitizers(tmp_path):
    library = _sanitized_kernels(tmp_path)
    script = tmp_path / "run.py"
    script.write_text(f"""
import importlib.util, sys
sys.path[:0] = [{str(ROOT)!r}]
spec = importlib.util.spec_from_file_location("ds_horovod._cpu", {str(library)!r})
sys.modules["ds_horovod._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ds_horovod._cpu"])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--capture=no", {str(__file__)!r}, "-k", "astray and not sanitizers"]))
""")
    result = sanitized([sys.executable, str(script)])
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-2000:] + result.stderr[-6000:]
