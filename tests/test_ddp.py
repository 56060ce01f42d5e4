"""DistributedDataParallel with the hook, on 2 to 4 real ranks, without Horovod."""

import functools
import json
import re
import sys
from pathlib import Path

import pytest
from horovod_jobs import run_command, run_torch_ranks

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "workers" / "ddp.py"
NAMES = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank says of every check, and what went wrong otherwise."""
    folder = tmp_path_factory.mktemp("ddp")

    @functools.cache
    def of(ranks):
        size, nodes = (4, 2) if ranks == "2x2" else (ranks, 1)
        code, output = run_torch_ranks(size, str(SCRIPT), str(folder / f"checks{ranks}"), nodes=nodes)
        files = [folder / f"checks{ranks}.{rank}" for rank in range(size)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files], output[-4000:] if code else ""

    return of


@pytest.mark.jobs
@pytest.mark.parametrize(
    "ranks, check",
    [
        pytest.param(ranks, name, marks=pytest.mark.xdist_group(f"ddp on {ranks} ranks"))
        for ranks in (4, 3, 2, "2x2")
        for name in [*NAMES, "end"]
    ],
)
def test_check(results, ranks, check):
    of_ranks, failure = results(ranks)
    if check == "end":
        assert not failure
        return
    assert all(check in result for result in of_ranks), f"the job ended before this check did: {failure}"
    failures = [f"rank {rank}: {result[check]}" for rank, result in enumerate(of_ranks) if result[check]]
    assert not failures, "\n".join(failures)


@pytest.mark.jobs
def test_the_example_trains():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, output = run_command([*torchrun, "examples/ddp_digits.py", "--epochs", "4"], timeout=1200)
    assert code == 0, output
    assert float(re.search(r"accuracy ([\d.]+)", output)[1]) > 0.85, output
    assert "bucket 0: Quantize(bits=4" in output


@pytest.mark.jobs
@pytest.mark.parametrize("how", ["die", "stall"])
def test_a_rank_that_is_gone_surfaces_as_torchs_error(how):
    """At once where it has died, and after the timeout of the process group where it stalls."""
    code, output = run_torch_ranks(2, str(SCRIPT.with_name("ddp_leaving.py")), how, timeout=120)
    assert code != 0 and "left: ok" in output, output


@pytest.mark.jobs
def test_the_page_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "ddp.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    script = tmp_path / "page.py"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n" + "\n".join(blocks) + "\ndist.destroy_process_group()\n")
    code, output = run_torch_ranks(2, str(script))
    assert code == 0 and output.count("bucket 0: Quantize(bits=4") == 1, output
