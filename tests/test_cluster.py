"""Clusters on one machine: real hosts, real ranks, nothing left behind. They need root, and are skipped without."""

import json
import os
import signal
import subprocess
import sys
import uuid

import pytest
from cluster import bits_per_second
from cluster_jobs import BENCHMARKS, eventually, finish, needs_root, processes, start


def links():
    return sorted(os.listdir("/sys/class/net"))


@pytest.mark.parametrize(
    ("rate", "bits"), [("1gbit", 1e9), ("500mbit", 5e8), ("2.5gbit", 2.5e9), ("100kbit", 1e5), ("unshaped", None)]
)
def test_rate(rate, bits):
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "gbit", "1", "1gb", "fast", "-1gbit", "0mbit", "nangbit", "infgbit", "1kbit", "1e9gbit"])
def test_other_rates_are_refused(rate):
    with pytest.raises(ValueError, match="must be unshaped, or from 100kbit to 1000gbit"):
        bits_per_second(rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "1", "--", "true"], "argument --hosts: must be from 2 to 200, got 1"),
        (["--hosts", "201", "--", "true"], "argument --hosts: must be from 2 to 200, got 201"),
        (["--hosts", "2", "--rate", "warp", "--", "true"], "argument --rate: must be unshaped"),
        (["--hosts", "2", "--", "no-such-program"], "cannot find 'no-such-program'"),
        (["--hosts", "2"], "COMMAND"),
    ],
)
def test_bad_arguments(arguments, message):
    status, _, errors = finish(start(*arguments))
    assert status == 2 and message in errors


@needs_root
@pytest.mark.jobs
def test_without_privileges_it_says_what_it_needs():
    command = [sys.executable, str(BENCHMARKS / "cluster.py"), "--hosts", "2", "--", "true"]
    result = subprocess.run(["setpriv", "--bounding-set=-sys_admin", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cluster: network namespaces need root: use sudo" in result.stderr and "Traceback" not in result.stderr


@needs_root
@pytest.mark.jobs
def test_each_host_is_a_machine_of_its_own():
    script = "hostname; tc qdisc show dev eth0; echo rank=$HOROVOD_RANK of $HOROVOD_SIZE local=$HOROVOD_LOCAL_SIZE"
    before = links()
    status, output, errors = finish(start("--hosts", "3", "--rate", "200mbit", "--", "sh", "-c", script))
    assert status == 0, errors
    for rank in range(3):
        assert f"10.77.0.{rank + 1}\n" in output and f"rank={rank} of 3 local=1" in output
        assert f"\n10.77.0.{rank + 1} " in errors  # its counters
    assert output.count("tbf") == 3 and output.count("rate 200Mbit") == 3
    assert links() == before


@needs_root
@pytest.mark.jobs
def test_bytes_on_the_wire_are_those_that_are_sent():
    arguments = ["noop", "none", "topk-1%", "onebit-allgather", "--model", "gpt", "--batch-size", "1", "--max-steps", "3"]
    command = ["--hosts", "3", "--", sys.executable, str(BENCHMARKS / "step_times.py"), *arguments]
    status, output, errors = finish(start(*command), timeout=300)
    assert status == 0, errors
    results = {r["method"]: r for r in map(json.loads, output.splitlines())}
    # Horovod's coordination sends all the time, and more where the ranks agree on every step: six times what it sends
    # beside noop is ample.
    coordination = 6 * results["noop"]["wire_bytes_sent"] / results["noop"]["wire_seconds"]
    for method in ("none", "topk-1%", "onebit-allgather"):
        sent, wire = results[method]["bytes_sent"], results[method]["wire_bytes_sent"]
        assert sent <= wire <= 1.05 * sent + coordination * results[method]["wire_seconds"], method


@needs_root
@pytest.mark.jobs
def test_two_clusters_at_once():
    script = 'sleep 1; ping_count=$(grep -c eth0 /proc/net/dev); echo "$ping_count $(hostname)"'
    both = [start("--hosts", "2", "--rate", rate, "--", "sh", "-c", script) for rate in ("1gbit", "100mbit")]
    for process in both:
        status, output, errors = finish(process)
        assert status == 0, errors
        assert sorted(output.splitlines()) == ["1 10.77.0.1", "1 10.77.0.2"]


@needs_root
@pytest.mark.jobs
@pytest.mark.parametrize("death", ["exit 3", "kill -9 $$"])
def test_a_host_that_dies_is_named_and_takes_nobody_along_in_silence(death):
    mark = f"mark-{uuid.uuid4()}"
    script = f'if [ "$HOROVOD_RANK" = 1 ]; then sh -c "{death}"; exit $?; else sleep 1; echo "rank $HOROVOD_RANK ends"; fi'
    status, output, errors = finish(start("--hosts", "3", "--", "sh", "-c", script.replace("$$", "\\$\\$"), mark))
    assert status == 1
    expected = 3 if death == "exit 3" else 137
    assert f"cluster: host 1 (10.77.0.2) failed with exit status {expected}" in errors
    assert "rank 0 ends" in output and "rank 2 ends" in output
    assert "10.77.0.2 " in errors  # counted all the same
    assert eventually(lambda: not processes(mark))


@needs_root
@pytest.mark.jobs
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(number):
    mark, before = f"mark-{uuid.uuid4()}", links()
    # A grandchild that ignores signals: the host is gone only when that is too.
    script = "trap '' TERM INT HUP; sh -c 'while :; do sleep 1; done' \"$0\" & wait"
    process = start("--hosts", "2", "--", "sh", "-c", script, mark)
    # On each host: its first two processes, the script, and its child.
    assert eventually(lambda: len(processes(mark)) >= 1 + 2 * 4)
    process.send_signal(number)
    process.wait(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: not processes(mark))
    assert links() == before
