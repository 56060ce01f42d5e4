"""Starting real Horovod jobs from tests. Importing this needs no Horovod."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def _environment(gloo_timeout: int) -> dict[str, str]:
    seconds = {"HOROVOD_GLOO_TIMEOUT_SECONDS": str(gloo_timeout)}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **seconds}


# Gloo's timeout is that of ranks which wait for one that starts, too: on a busy machine a new interpreter takes a minute to
# import torch, and then all the others abort.
PATIENT = 300


def run_command(command: list[str], timeout: float, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Returns the exit status and the output of a command; if it hangs, ends all its processes and fails."""
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        raise AssertionError(f"{' '.join(command)} hangs:\n{output[-4000:]}") from None
    return job.returncode, output


def run_job(arguments: list[str], timeout: float) -> tuple[int, str]:
    """Runs ``horovodrun arguments``. Returns its exit status and output; fails if it hangs."""
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", *arguments]
    return run_command(command, timeout, _environment(PATIENT))


def horovodrun(ranks: int, *command: str, timeout: float = 600) -> str:
    """Runs ``horovodrun -np ranks python command`` and returns its output; fails if it fails or hangs."""
    code, output = run_job(["-np", str(ranks), sys.executable, *command], timeout)
    assert code == 0, output[-8000:]
    return output


class Rank:
    """A rank of a job, as a process that nobody watches over."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
        self._output = output
        # Forked from a process that has imported torch and Horovod already: that takes a new interpreter seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ds_horovod", "torch._dynamo"])
        self._process = context.Process(target=_run, args=(command, environment, output), daemon=True)
        self._process.start()

    @property
    def output(self) -> str:
        """All that it has said so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def exitcode(self) -> int | None:
        """None: it has not ended. Negative: the signal that has ended it."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status; fails if it hangs."""
        self._process.join(timeout)
        assert self.exitcode is not None, f"a rank hangs:\n{self.output[-4000:]}"
        return self.exitcode

    def kill(self) -> None:
        self._process.kill()


def _run(command: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
    """What such a process does: the same as ``python command``, up to the end of what is registered with `atexit`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS has been read already
    script = ROOT / command[0]
    sys.argv[:] = command
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out, and Horovod's is among them


@contextmanager
def separate_ranks(ranks: int, *command: str, gloo_timeout: int = 20, hosts: int = 1):
    """The ranks of a job as processes that nobody watches over: horovodrun would end them all when one ends.

    After the timeout a rank that waits for a dead one through another gives up. All hosts are this machine.
    """
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer(0)
    port = server.start()
    slots = get_host_assignments(parse_hosts(",".join(f"host{i}:{ranks // hosts}" for i in range(hosts))), ranks)
    server.init(slots)
    with tempfile.TemporaryDirectory() as folder:
        started = []
        try:
            for slot in slots:
                job = {
                    "RANK": slot.rank, "SIZE": slot.size, "LOCAL_RANK": slot.local_rank, "LOCAL_SIZE": slot.local_size,
                    "CROSS_RANK": slot.cross_rank, "CROSS_SIZE": slot.cross_size, "HOSTNAME": slot.hostname,
                    "GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": port,
                    "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo", "GLOO_IFACE": "lo",
                }  # fmt: skip
                environment = {**_environment(gloo_timeout), **{f"HOROVOD_{key}": str(value) for key, value in job.items()}}
                started.append(Rank(command, environment, Path(folder) / str(slot.rank)))
            yield started
        finally:
            for rank in started:
                rank.kill()
                rank.wait(60)
            server.stop()


def run_ranks(ranks: int, *command: str, timeout: float = 300, hosts: int = 1) -> str:
    """As `horovodrun`, in a fraction of the time: what of a test is about the plugin and not about how ranks are started."""
    with separate_ranks(ranks, *command, gloo_timeout=PATIENT, hosts=hosts) as started:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [rank.exitcode for rank in started]
            if any(codes) or None not in codes:
                break
            time.sleep(0.02)
        output = "".join(rank.output for rank in started)
        assert not any(codes), f"{codes}: {output[-8000:]}"
        assert None not in codes, f"{' '.join(command)} hangs: {output[-8000:]}"
    return output
