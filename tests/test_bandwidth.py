"""The sweep over bandwidths: what it refuses, what it keeps, and the methods that it compares."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import bandwidth
import common
import pytest
from cluster_jobs import BENCHMARKS, eventually, needs_root, processes
from horovod_jobs import ROOT, run_ranks
from methods import NAMES, is_known


@pytest.mark.parametrize("method", [*bandwidth.METHODS, "topk", "topk-100%", "ddp-powersgd-16"])
def test_known_methods(method):
    assert is_known(method)
    family = method if method in NAMES else "topk-P%" if method.startswith("topk") else "ddp-powersgd-R"
    assert family in NAMES


@pytest.mark.parametrize("method", ["ddp-onebit", "ddp-topk-1%", "ddp-sign-4.5%", "ddp-quantize-4"])
def test_methods_of_ddp(method):
    assert is_known(method)


@pytest.mark.parametrize("method", ["", "NONE", "topk-P%", "topk-0%", "topk-101%", "topk-1", "topk-x%", "topk-nan%",
                                    "ddp-powersgd-R", "ddp-powersgd-0", "ddp-powersgd", "onebit-4", "ddp-topk",
                                    "ddp-quantize-5", "ddp-quantize-B", "ddp-sign", "ddp-none"])  # fmt: skip
def test_unknown_methods(method):
    assert not is_known(method)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "noop", "gzip"], "argument --methods: must name some of none, fp16, onebit"),
        (["--methods", "none"], "argument --methods: noop must be among them"),
        (["--rates", "1gbit", "56k"], "argument --rates: must be unshaped, or from 100kbit"),
        (["--hosts", "2", "1"], "argument --hosts: must be from 2 to 200, got 1"),
        (["--models", "vgg"], "argument --models: invalid choice: 'vgg'"),
        (["--rounds", "0"], "argument --rounds: must be over 0"),
        (["--json", "/no/such/folder/x.json"], "argument --json: cannot be written"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bandwidth.py", "--json", str(tmp_path / "x.json"), *arguments])
    with pytest.raises(SystemExit) as stop:
        bandwidth.parse_arguments()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"results": []}')
    with pytest.raises(ValueError, match="holds no results of this benchmark"):
        bandwidth.Results(file, {})
    assert file.read_text() == '{"results": []}'


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    file = tmp_path / "x.json"
    bandwidth.Results(file, {"machine": {"cores": 2}}).add(("mlp", 2, "1gbit"), results=[])
    with pytest.raises(ValueError, match=r"cannot be continued: machine \{'cores': 2\} there, \{'cores': 4\} here"):
        bandwidth.Results(file, {"machine": {"cores": 4}})


def test_results_are_kept_and_not_measured_again(tmp_path):
    file = tmp_path / "x.json"
    cells = [("mlp", 2, "1gbit"), ("mlp", 4, "1gbit")]
    settings = {"rounds": 2, "seconds": 2.0, "max_steps": 20}
    first = bandwidth.Results(file, {"date": "first"})
    assert first.missing(cells, ["noop"], settings) == {cell: ["noop"] for cell in cells}
    first.add(cells[0], **settings, results=[{"method": "noop", "seconds_per_step": 1.0}])

    second = bandwidth.Results(file, {"date": "second"})
    assert second.missing(cells, ["noop"], settings) == {cells[1]: ["noop"]}
    assert second.missing(cells, ["noop"], {**settings, "rounds": 1}) == {cells[1]: ["noop"]}
    for other in ({"rounds": 3}, {"seconds": 0.1}, {"max_steps": 3}):
        assert set(second.missing(cells, ["noop"], {**settings, **other})) == set(cells)
    # Measured again, a cell keeps the methods that it had: those of one cell come from one run.
    assert second.missing(cells, ["none"], settings) == {cells[0]: ["none", "noop"], cells[1]: ["none"]}
    second.add(cells[1], **settings, results=[{"method": "noop", "seconds_per_step": 2.0}])
    second.add(cells[0], **settings, results=[{"method": "noop", "seconds_per_step": 3.0}])

    content = json.loads(file.read_text())
    assert content["date"] == "second"
    assert {c["hosts"]: c["results"][0]["seconds_per_step"] for c in content["cells"]} == {2: 3.0, 4: 2.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_rounds_become_medians_and_times_above_noop():
    def measurement(i, method, seconds, sent):
        wire = {"bytes_sent": sent, "wire_bytes_sent": sent + 1, "wire_seconds": seconds}
        return {"round": i, "method": method, "seconds_per_step": seconds, "steps": 2, **wire}

    rounds = [measurement(i, "noop", s, 0) for i, s in enumerate((1.0, 5.0, 2.0))]
    rounds += [measurement(i, "none", s, 8) for i, s in enumerate((4.0, 9.0, 3.0))]
    noop, none = bandwidth.combine(rounds, ["noop", "none"])
    assert (noop["seconds_per_step"], noop["seconds_above_noop"]) == (2.0, 0.0)
    assert (none["seconds_per_step"], none["seconds_above_noop"]) == (4.0, 3.0)  # of 3, 4 and 1
    assert none["seconds_by_round"] == [4.0, 9.0, 3.0] and none["steps"] == 6
    assert (none["bytes_sent"], none["wire_bytes_sent"]) == (8, 9)


def test_a_sweep_that_hangs_ends():
    process = subprocess.Popen(["sh", "-c", "echo one; echo two; exec sleep 600"], stdout=subprocess.PIPE, text=True)
    lines = bandwidth.lines_of(process, 1.0)
    assert [next(lines), next(lines)] == ["one\n", "two\n"]
    with pytest.raises(TimeoutError, match="nothing was measured for 1 seconds"):
        next(lines)
    assert process.wait(timeout=120) == -signal.SIGTERM

    process = subprocess.Popen(["sh", "-c", "echo one; exit 3"], stdout=subprocess.PIPE, text=True)
    assert list(bandwidth.lines_of(process, 60.0)) == ["one\n"] and process.wait() == 3


def ranks_of(mark):
    """Processes of a sweep that are ranks: neither the sweep nor its cluster, nor what its hosts begin with."""
    found = []
    for process in processes(mark):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            if words[1:2] == [str(BENCHMARKS / "step_times.py")]:
                found.append(process)
    return found


@needs_root
@pytest.mark.jobs
def test_when_a_host_dies_the_results_so_far_are_kept(tmp_path):
    file, mark = tmp_path / "x.json", "0.123456789"  # its seconds, which no other sweep has
    arguments = ["--models", "gpt", "--hosts", "2", "--rates", "1gbit", "200kbit", "--methods", "noop", "none"]
    sweep = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "bandwidth.py"), "--json", str(file), "--seconds", mark, *arguments],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert eventually(file.exists, 180)
        kept = file.read_text()
        # Ranks of the second cluster cannot be done at 200kbit before they are found.
        assert eventually(lambda: len(ranks_of(mark)) == 2 and "200kbit" in clusters_of(mark))
        os.kill(ranks_of(mark)[0], signal.SIGKILL)
        _, errors = sweep.communicate(timeout=300)
    finally:
        sweep.kill()
    assert sweep.returncode == 1
    assert "bandwidth: gpt on 2 hosts at 200kbit has failed" in errors and "failed with exit status 137" in errors
    assert file.read_text() == kept and len(json.loads(kept)["cells"]) == 1
    assert eventually(lambda: not ranks_of(mark))


def clusters_of(mark):
    """The command lines of a sweep's clusters."""
    lines = []
    for process in processes(mark):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            if words[1:2] == [str(BENCHMARKS / "cluster.py")]:
                lines += words
    return lines


@pytest.mark.jobs
def test_all_methods_train_the_same_replicas():
    """Under horovodrun, where no interface is a host's own. `step_times.py` fails where replicas differ."""
    methods = [*(method for method in bandwidth.METHODS if method != "noop"), "ddp-quantize-4", "ddp-sign-4.5%"]
    output = run_ranks(2, "benchmarks/step_times.py", *methods, "--model", "gpt", "--batch-size", "1", "--max-steps", "2")
    results = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '"method"' in line]
    assert [r["method"] for r in results] == methods
    assert all(r["wire_bytes_sent"] is None and r["bytes_sent"] > 0 and r["seconds_per_step"] > 0 for r in results)


def test_progress_is_whole_lines_where_no_terminal_is(capsys):
    """horovodrun puts the rank before each piece that it reads, and carriage returns would shred it."""
    for _ in common.progress_bar(range(1000), desc="steps"):
        pass
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 3 and lines[2] == "" and not any("\r" in line for line in lines)
    assert lines[0].startswith("steps:   0%") and lines[1].startswith("steps: 100%")
