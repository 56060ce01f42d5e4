"""Starting real Horovod jobs from tests."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

ROOT = Path(__file__).parent.parent


def _environment() -> dict[str, str]:
    # After the timeout a rank that waits for a dead one through another gives up.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HOROVOD_GLOO_TIMEOUT_SECONDS": "20"}


def run_job(arguments: list[str], timeout: float) -> tuple[int, str]:
    """Runs ``horovodrun arguments``. Returns its exit status and output; fails if it hangs."""
    job = subprocess.Popen(
        [Path(sys.executable).parent / "horovodrun", "--gloo", *arguments],
        cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        raise AssertionError(f"horovodrun {' '.join(arguments)} hangs:\n{output[-4000:]}") from None
    return job.returncode, output


def horovodrun(ranks: int, *command: str, timeout: float = 600) -> str:
    """Runs ``horovodrun -np ranks python command`` and returns its output; fails if it fails or hangs."""
    code, output = run_job(["-np", str(ranks), sys.executable, *command], timeout)
    assert code == 0, output[-8000:]
    return output


@contextmanager
def separate_ranks(ranks: int, *command: str):
    """The ranks of a job as processes that nobody watches over: horovodrun would end them all when one ends."""
    server = RendezvousServer(0)
    port = server.start()
    slots = get_host_assignments(parse_hosts(f"localhost:{ranks}"), ranks)
    server.init(slots)
    processes = []
    for slot in slots:
        job = {
            "RANK": slot.rank, "SIZE": slot.size, "LOCAL_RANK": slot.local_rank, "LOCAL_SIZE": slot.local_size,
            "CROSS_RANK": slot.cross_rank, "CROSS_SIZE": slot.cross_size, "HOSTNAME": slot.hostname,
            "GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": port,
            "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo", "GLOO_IFACE": "lo",
        }  # fmt: skip
        environment = {**_environment(), **{f"HOROVOD_{key}": str(value) for key, value in job.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        server.stop()
