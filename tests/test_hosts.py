"""Several ranks on each of several hosts, on a real Horovod. All hosts are this machine."""

import functools
import json
import re

import pytest
from horovod_jobs import ROOT, run_ranks

SCRIPT = ROOT / "tests" / "workers" / "hosts.py"
NAMES = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank says of every check. Each job runs once."""
    folder = tmp_path_factory.mktemp("hosts")

    @functools.cache
    def of(hosts):
        ranks = 2 * hosts
        run_ranks(ranks, str(SCRIPT), str(folder / str(hosts)), hosts=hosts, timeout=900)
        return [json.loads((folder / f"{hosts}.{rank}").read_text()) for rank in range(ranks)]

    return of


@pytest.mark.jobs
@pytest.mark.parametrize(
    "hosts, check",
    [pytest.param(h, name, marks=pytest.mark.xdist_group(f"{h} hosts"), id=f"{h}x2-{name}") for h in (2, 3) for name in NAMES],
)
def test_check(results, hosts, check):
    failures = [f"rank {rank}: {result[check]}" for rank, result in enumerate(results(hosts)) if result[check]]
    assert not failures, "\n".join(failures)
