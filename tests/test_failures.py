"""A rank that dies, gives up or stalls surfaces as Horovod's own error: nobody hangs, nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from horovod_jobs import PATIENT, ROOT, forked, run_job, separate_ranks

pytestmark = pytest.mark.jobs
SCRIPT = str(ROOT / "tests" / "workers" / "training.py")
BEGUN = re.compile(r"rank \d+: process (\d+)")
PHASES = ["push", "serve", "decode", "dense", "agreement", "sum"]


def assert_loads(file):
    """A checkpoint that is whole, whenever its writer was interrupted."""
    state = torch.load(file, weights_only=True)
    assert state["errors"]["buckets"] and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_surfaces_as_horovods_error(phase, ranks, tmp_path):
    file = tmp_path / "state.pt"
    with separate_ranks(ranks, SCRIPT, "1000", "--at", phase, "--checkpoint", str(file)) as started:
        *others, killed = [rank.wait(120) for rank in started]
        assert killed == -signal.SIGKILL
        for code, output in zip(others, [rank.output for rank in started[:-1]], strict=True):
            assert code == 7 and "HorovodInternalError" in output, output
            step = 0 if phase == "agreement" else 2
            assert f"at step {step}" in output or f"at step {step + 1}" in output, output
    assert_loads(file)


@pytest.mark.parametrize("server, phase", [(2, "push"), (2, "serve"), (2, "decode"), (0, "push"), (0, "decode")])
def test_a_killed_server_or_worker_of_one_server_surfaces_too(server, phase):
    """The last rank dies, which is the server or not: alltoall and broadcast fail like alltoall and allgather."""
    with separate_ranks(3, SCRIPT, "1000", "--at", phase, "--server", str(server)) as started:
        *others, killed = [rank.wait(120) for rank in started]
        assert killed == -signal.SIGKILL
        for code, output in zip(others, [rank.output for rank in started[:-1]], strict=True):
            assert code == 7 and "HorovodInternalError" in output, output
            assert "at step 2" in output or "at step 3" in output, output


@pytest.mark.parametrize("kind", ["push", "pull", "broadcast", "dense"])
def test_horovods_thread_ends_while_python_begins_another_collective(kind):
    """It needs no GIL for the tensors that it has, so it comes to an end, and the other collective is told so."""
    script = ROOT / "tests" / "workers" / "leaving.py"
    with separate_ranks(2, str(script), kind) as (rank, other):
        while "begun" not in rank.output and rank.exitcode is None:
            time.sleep(0.01)
        time.sleep(1)  # until Python has the GIL again
        other.kill()
        rank.wait(60)
        output = rank.output
    assert "told: Horovod has been shut down" in output, output
    assert "DoubleSqueeze: Horovod has been shut down before another could begin" in output, output


def left_over(output):
    """Processes of a job that are still there."""
    processes = [int(number) for number in BEGUN.findall(output)]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_runs(p) for p in processes):
        time.sleep(0.1)
    return [p for p in processes if _runs(p)]


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("phase, in_forks", [("push", False), ("decode", True)])
def test_a_rank_that_raises_ends_the_job(phase, in_forks):
    program = forked(SCRIPT) if in_forks else [sys.executable, SCRIPT]
    code, output = run_job(["-np", "3", *program, "1000", "--at", phase, "--how", "raise"], timeout=300)
    assert code != 0 and "RuntimeError: the last rank gives up" in output
    assert len(BEGUN.findall(output)) == 3 and not left_over(output)


def assert_it_is_noticed(output, collective):
    for rank in (0, 1):
        waits = rf"DoubleSqueeze: rank {rank} of 3 has waited \d+ seconds for doublesqueeze\.(0\.)?{collective}"
        assert re.search(waits, output), output[-4000:]
    assert re.search(r"HorovodInternalError: DoubleSqueeze: rank [01] of 3 has waited \d+ seconds for", output), output[-4000:]


@pytest.mark.parametrize(
    "phase, collective",
    [
        ("push", r"bucket\d\.push"),
        ("serve", r"bucket\d\.pull"),
        ("agreement", r"name \(the optimizer's first step"),
        ("sum", r"bucket0\.residual \(full_state_dict\(\)\)"),
    ],
)
def test_a_rank_that_stalls_is_noticed(phase, collective, monkeypatch):
    """Horovod's variables say when; its own stall inspector is silent with Gloo."""
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "1")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "6")
    with separate_ranks(3, SCRIPT, "1000", "--at", phase, "--how", "stall", gloo_timeout=PATIENT) as started:
        codes = [rank.wait(120) for rank in started[:2]]
        output = "".join(rank.output for rank in started)
    assert codes == [7, 7], output
    assert_it_is_noticed(output, collective)


def test_a_rank_that_stalls_ends_the_job(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "2")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "12")
    code, output = run_job(["-np", "3", *forked(SCRIPT), "1000", "--at", "push", "--how", "stall"], timeout=300)
    assert code != 0 and not left_over(output)
    assert_it_is_noticed(output, r"bucket\d\.push")


def test_an_interrupted_job_leaves_nothing_behind(tmp_path):
    file, log = tmp_path / "state.pt", tmp_path / "log"
    launcher = Path(sys.executable).parent / "horovodrun"
    with log.open("w") as stream:
        job = subprocess.Popen(
            [launcher, "--gloo", "-np", "2", sys.executable, SCRIPT, "1000000", "--checkpoint", str(file)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (file.exists() and len(BEGUN.findall(log.read_text())) == 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        job.wait(timeout=300)
    output = log.read_text()
    assert file.exists() and len(BEGUN.findall(output)) == 2, output
    assert not left_over(output), output
    left = [f for f in file.parent.iterdir() if f not in (file, log)]
    assert torch.load(file, weights_only=True)["errors"]["buckets"] and len(left) <= 1, left  # a temporary one at most
