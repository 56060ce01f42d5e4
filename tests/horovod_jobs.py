"""Starting real jobs from tests, of Horovod and of torch. Importing this needs no Horovod."""

import atexit
import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import forking
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


def run_job(arguments: list[str], timeout: float, gloo_timeout: int = PATIENT) -> tuple[int, str]:
    """Runs ``horovodrun arguments``. Returns its exit status and output; fails if it hangs."""
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", *arguments]
    return run_command(command, timeout, _environment(gloo_timeout))


def forks() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has imported torch: with what its optimizers need, that takes others 4 seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_horovod", "torch._dynamo"])
    return context


@functools.cache
def _fork_server() -> str:
    """The socket of a server of forking.py, itself a fork."""
    socket = f"{tempfile.mkdtemp()}/forks"
    atexit.register(shutil.rmtree, Path(socket).parent, ignore_errors=True)
    ready, says = forks().Pipe(duplex=False)
    forks().Process(target=forking.serve, args=(socket, says.send), daemon=True).start()
    assert ready.poll(120)
    return socket


def forked(script: str, *arguments: str) -> list[str]:
    """A command that does what ``python script arguments`` does, in a fork: for jobs that horovodrun itself must start."""
    return [sys.executable, "-I", "-S", str(ROOT / "tests" / "forking.py"), _fork_server(), script, *arguments]


def horovodrun(ranks: int, *command: str, timeout: float = 600) -> str:
    """Runs ``horovodrun -np ranks python command`` and returns its output; fails if it fails or hangs."""
    code, output = run_job(["-np", str(ranks), sys.executable, *command], timeout)
    assert code == 0, output[-8000:]
    return output


class Rank:
    """A rank of a job, as a process that nobody watches over."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
        self._output = output
        self._process = forks().Process(target=_run, args=(command, environment, output), daemon=True)
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
    names = ["localhost"] if hosts == 1 else [f"127.0.0.{i + 1}" for i in range(hosts)]
    slots = get_host_assignments(parse_hosts(",".join(f"{name}:{ranks // hosts}" for name in names)), ranks)
    server.init(slots)
    own = [
        {
            "HOROVOD_RANK": slot.rank, "HOROVOD_SIZE": slot.size,
            "HOROVOD_LOCAL_RANK": slot.local_rank, "HOROVOD_LOCAL_SIZE": slot.local_size,
            "HOROVOD_CROSS_RANK": slot.cross_rank, "HOROVOD_CROSS_SIZE": slot.cross_size, "HOROVOD_HOSTNAME": slot.hostname,
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
            "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": "lo",
        }
        for slot in slots
    ]  # fmt: skip
    try:
        with _started(command, own, gloo_timeout) as processes:
            yield processes
    finally:
        server.stop()


@contextmanager
def _started(command: tuple[str, ...], own: list[dict[str, object]], gloo_timeout: int = PATIENT):
    """A rank for each of some variables, until the end of the context."""
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, variables in enumerate(own):
                environment = _environment(gloo_timeout) | {name: str(value) for name, value in variables.items()}
                started.append(Rank(command, environment, Path(folder) / str(rank)))
            yield started
        finally:
            for rank in started:
                rank.kill()
                rank.wait(60)


def _end(started: list[Rank], timeout: float) -> tuple[int, str]:
    """The exit status of the first rank that fails, or 0 when all have ended, and what they have said; fails if they hang."""
    deadline = time.monotonic() + timeout
    codes: list[int | None] = [None]
    while not any(codes) and None in codes and time.monotonic() < deadline:
        time.sleep(0.02)
        codes = [rank.exitcode for rank in started]
    output = "".join(rank.output for rank in started)
    assert any(codes) or None not in codes, f"a job hangs: {output[-8000:]}"
    return next(filter(None, codes), 0), output


def run_ranks(ranks: int, *command: str, timeout: float = 300, hosts: int = 1) -> str:
    """As `horovodrun`, in a fraction of the time: what of a test is about the plugin and not about how ranks are started."""
    with separate_ranks(ranks, *command, gloo_timeout=PATIENT, hosts=hosts) as started:
        code, output = _end(started, timeout)
    assert code == 0, f"{code}: {output[-8000:]}"
    return output


def run_torch_ranks(ranks: int, *command: str, timeout: float = 1200, nodes: int = 1) -> tuple[int, str]:
    """As ``torchrun --nnodes NODES --nproc-per-node RANKS/NODES command``: the first exit status but 0, and all output.
    All nodes are this machine."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    local = ranks // nodes
    shared = {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "GROUP_WORLD_SIZE": nodes,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    own = [{"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local, **shared} for rank in range(ranks)]
    with _started(command, own) as started:
        return _end(started, timeout)
