"""Elastic Horovod, really: ranks come, go, and are killed, and the law holds."""

import pytest
from horovod_jobs import ROOT, forked, run_job

pytestmark = pytest.mark.jobs
WORKERS = ROOT / "tests" / "workers"


def elastic(tmp_path, script, *arguments, timeout=600, first="localhost:2\n", ranks=("2", "1", "3")):
    """Runs a script of an elastic job, whose hosts stand in a file, ``hosts`` in `tmp_path`, that it may rewrite.

    Ranks: at first, at least, and at most.
    """
    hosts, discovery = tmp_path / "hosts", tmp_path / "discover.sh"
    hosts.write_text(first)
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    # One interface: of one host Horovod would look for those that hosts share, and wait for another host.
    options = ["-np", ranks[0], "--min-np", ranks[1], "--max-np", ranks[2], "--network-interfaces", "lo"]
    program = forked(str(script), *arguments)
    # A rank that waits for a killed one through another does so until Gloo's timeout; and forks start at once.
    return run_job([*options, "--host-discovery-script", str(discovery), *program], timeout, gloo_timeout=20)


@pytest.mark.parametrize("options", [(), ("momentum",)], ids=["plain", "momentum"])
def test_ranks_come_and_go(options, tmp_path):
    code, output = elastic(tmp_path, WORKERS / "elastic.py", str(tmp_path / "hosts"), *options)
    assert code == 0 and output.count("elastic: ok") == 2, output[-8000:]
    for stage, ranks in enumerate([2, 3, 2, 1, 2]):
        assert output.count(f"stage {stage}: rank 0 of {ranks}") == 1, output[-8000:]


def test_hosts_come_and_go(tmp_path):
    """In two levels, then in one on the host that is left, and in two again."""
    script, both = WORKERS / "elastic_hosts.py", "localhost:2\n127.0.0.1:2\n"
    code, output = elastic(tmp_path, script, str(tmp_path / "hosts"), first=both, ranks=("4", "2", "4"))
    assert code == 0 and output.count("elastic hosts: ok") == 4, output[-8000:]
    for step, levels in ((4, "two levels: 2 hosts with 2 ranks each"), (6, "one level: one host"), (12, "two levels: 2 hosts")):
        assert f"step {step}: {levels}" in output, output[-8000:]
