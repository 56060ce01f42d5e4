"""Who waits for whom on a GPU's streams, with streams that only write down what they are told."""

import contextlib
from unittest import mock

import pytest
import torch

from ds_horovod import DoubleSqueeze, OneBit, streams
from ds_horovod.double_squeeze import bind
from ds_horovod.in_process import InProcessTransport

WORKERS = 2


class Stream:
    def __init__(self, name, log):
        self.name, self._log = name, log

    def wait_stream(self, other):
        self._log.append(f"{self.name} waits for {other.name}")


class Gpu:
    """torch's streams of a device that is not there."""

    def __init__(self):
        self.log = []
        self.default, self.side, self.other = (Stream(name, self.log) for name in ("default", "side", "other"))
        self.current = self.default

    @contextlib.contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def gpu():
    gpu = Gpu()
    passes = {
        name: mock.patch.object(OneBit, name, logged(gpu, name, getattr(OneBit, name)))
        for name in ("encode", "serve", "decode")
    }
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: gpu.current),
        mock.patch.object(torch.cuda, "default_stream", lambda device=None: gpu.default),
        mock.patch.object(torch.cuda, "stream", gpu.use),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: gpu.log.append(f"recorded on {stream.name}")),
        passes["encode"],
        passes["serve"],
        passes["decode"],
    ):
        yield gpu


def logged(gpu, name, original):
    inside = []  # a server encodes too

    def run(*args):
        if not inside:
            gpu.log.append(f"{name} on {gpu.current.name}")
        inside.append(name)
        original(*args)
        inside.pop()

    return run


def sessions(gpu, stream_ordered=False):
    parameters = [("w", torch.nn.Parameter(torch.zeros(4, 64))), ("v", torch.nn.Parameter(torch.zeros(4, 64)))]
    made = []
    for transport in InProcessTransport.group(WORKERS):
        transport.stream_ordered = stream_ordered
        own = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in parameters]
        session = bind(DoubleSqueeze(OneBit(32), min_numel=1), "streams", own, True, transport).session
        for bucket in session.buckets:
            bucket.exchange.streams._side = gpu.side
        made.append(session)
    return made


def step(gpu, made, producers):
    for session in made:
        for (_, p), stream in zip(session.parameters, producers, strict=True):
            p.grad = torch.randn(p.shape)
            with gpu.use(stream):
                session.admit(p)
                session.ready(p)
    for session in made:
        session.flush()
    for _ in ("push", "pull"):
        for session in made:
            session.poll()
    for session in made:
        gpu.log.append("drain")
        session.drain()


def test_server_and_decoder_work_beside_backward(gpu):
    step(gpu, sessions(gpu), [gpu.default, gpu.default])
    passes = [line for line in gpu.log if " on " in line and "recorded" not in line]
    assert passes == ["encode on default"] * 2 + ["serve on side"] * 2 + ["decode on side"] * 2
    assert gpu.log.count("default waits for side") == WORKERS  # at the end, and only there
    assert gpu.log.index("default waits for side") > gpu.log.index("drain")
    assert gpu.log.count("recorded on side") == 3 * WORKERS  # payload, what a server gets, replies
    assert "side waits for default" not in gpu.log


def test_the_worker_pass_waits_for_gradients_of_other_streams(gpu):
    made = sessions(gpu)
    step(gpu, made, [gpu.default, gpu.default])
    gpu.log.clear()
    step(gpu, made, [gpu.other, gpu.default])  # from the second step on, a bucket leaves in the hook
    assert gpu.log.index("default waits for other") < gpu.log.index("encode on default")
    assert gpu.log.count("recorded on default") == 2 * WORKERS


def test_what_is_only_ordered_by_the_default_stream_is_waited_for(gpu):
    step(gpu, sessions(gpu, stream_ordered=True), [gpu.default, gpu.default])
    first = gpu.log.index("side waits for default")
    assert first < gpu.log.index("serve on side")
    assert gpu.log.count("side waits for default") == 2 * WORKERS


@pytest.mark.parametrize(
    "value, expected", [("1", True), ("2x", True), ("0", False), ("", False), ("yes", False), (None, False)]
)
def test_async_completion_is_read_as_horovod_reads_it(value, expected, monkeypatch):
    pytest.importorskip("horovod")
    from ds_horovod.horovod.transport import _number

    monkeypatch.delenv("HOROVOD_ENABLE_ASYNC_COMPLETION", raising=False)
    if value is not None:
        monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", value)
    assert (_number("HOROVOD_ENABLE_ASYNC_COMPLETION", 0) > 0) is expected


def test_cuda_tensors_need_a_horovod_that_takes_them():
    pytest.importorskip("horovod")
    from ds_horovod.horovod.transport import require_horovod_for

    require_horovod_for([torch.device("cpu")])
    with pytest.raises(ValueError, match="built without CUDA"):
        require_horovod_for([torch.device("cpu"), torch.device("cuda:0")])


def test_one_side_stream_for_each_gpu():
    with mock.patch.object(torch.cuda, "Stream") as stream:
        streams._side_stream.cache_clear()
        streams._side_stream(torch.device("cuda:0"))
        streams._side_stream(torch.device("cuda:0"))
        stream.assert_called_once_with(torch.device("cuda:0"), priority=-1)
        streams._side_stream.cache_clear()
