"""What one sees of an exchange in a profiler, in Horovod's timeline and in TensorBoard."""

import json

import pytest
import torch
from horovod_jobs import ROOT, run_ranks
from support import generator

from ds_horovod import DoubleSqueeze, OneBit
from ds_horovod.in_process import Workers


def exchanged(steps=1):
    workers = Workers(lambda: DoubleSqueeze(OneBit(64)), [("a", torch.zeros(100, 100, requires_grad=True))], 2)
    g = generator(0)
    for _ in range(steps):
        workers.exchange([[torch.randn(100, 100, generator=g)] for _ in range(2)])
    return workers


def test_a_profiler_shows_the_passes_of_each_bucket():
    with torch.profiler.profile() as profile:
        exchanged()
    names = [event.name for event in profile.events()]
    for what in ("worker_pass", "server_pass", "decode"):
        assert names.count(f"workers.bucket0.{what}") == 2


def test_a_range_closes_when_a_pass_fails(monkeypatch):
    def fail(*args):
        raise RuntimeError("no")

    workers = exchanged()
    with torch.profiler.profile() as profile:
        monkeypatch.setattr(OneBit, "encode", fail)
        with pytest.raises(RuntimeError, match="no"):
            workers.exchange([[torch.zeros(100, 100)] for _ in range(2)])
    assert [event.name for event in profile.events()].count("workers.bucket0.worker_pass") == 1


def test_stats_go_to_tensorboard(tmp_path):
    """In two lines, as docs/guide.md says."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    squeeze = exchanged(steps=3).squeezes[0]
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for key, value in squeeze.stats().items():
            writer.add_scalar(f"double_squeeze/{key}", value, 3)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for key, value in squeeze.stats().items():
        (scalar,) = events.Scalars(f"double_squeeze/{key}")
        assert scalar.step == 3 and scalar.value == pytest.approx(value)


@pytest.mark.jobs
def test_horovods_timeline_has_the_names_of_our_collectives(tmp_path, monkeypatch):
    file = tmp_path / "timeline.json"
    monkeypatch.setenv("HOROVOD_TIMELINE", str(file))
    run_ranks(2, str(ROOT / "tests" / "workers" / "training.py"), "3")
    text = file.read_text().rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    names = {event["args"].get("name") for event in events if event and event.get("name") == "process_name"}
    assert {"alltoall.doublesqueeze.0.bucket0.push", "allgather.doublesqueeze.0.bucket0.pull"} <= names, names
    began = [event["name"] for event in events if event and event.get("ph") == "B"]
    assert began.count("ALLTOALL") >= 6  # 3 steps of 2 buckets
