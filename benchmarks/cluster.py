"""A cluster on one machine: runs a command on N hosts, one Horovod rank or more on each, over a network of a chosen speed.

    python benchmarks/cluster.py --hosts 4 --rate 1gbit -- python benchmarks/synthetic.py --compression onebit

Each host is a network namespace with an address, a hostname and a process tree of its own; a virtual cable with a token
bucket in each direction leads to a switch. Nothing has a name outside: the switch too lives in a namespace of its own.
So clusters run side by side, and the kernel takes everything down when the processes are gone, even if this one is
killed. It needs root, for the namespaces, and iproute2.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from horovod.runner.common.util.hosts import SlotInfo, get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

UNSHAPED = "unshaped"
INTERFACE = "eth0"
MAX_HOSTS = 200
_NETWORK = "10.77.0"
_SWITCH = f"{_NETWORK}.254"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_QUEUE_BYTES = 2**28  # a short queue drops packets, and TCP may wait 200 ms before it sends them again
_GRACE_SECONDS = 15.0  # for the other hosts to notice that one has failed, and to say so
_OWN_PROCESSES = ("--pid", "--fork", "--kill-child", "--mount-proc")
_MARK = "DS_HOROVOD_CLUSTER"  # in the environment of what runs on a host
_CLONE_NEWUTS, _CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x04000000, 0x40000000, 1  # linux/sched.h, linux/prctl.h


class ClusterError(Exception):
    """The cluster cannot be built."""


def bits_per_second(rate: str) -> float | None:
    """What a rate such as ``1gbit`` means; None for `UNSHAPED`.

    Raises
    ------
    ValueError
        It means nothing.
    """
    if rate == UNSHAPED:
        return None
    try:
        bits = float(rate[:-4]) * _UNITS[rate[-4:]]
    except (ValueError, KeyError):
        bits = 0.0
    if not 1e5 <= bits <= 1e12:
        raise ValueError(f"must be {UNSHAPED}, or from 100kbit to 1000gbit, such as 1gbit or 500mbit; got {rate!r}")
    return bits


def interface_bytes(interface: str) -> tuple[int, int]:
    """Bytes that an interface has sent and received so far.

    With headers; but the kernel counts those of a large segment once, before it cuts the segment into packets.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return int(fields[8]), int(fields[0])
    raise LookupError(f"there is no interface {interface}")


def bytes_on_the_wire() -> int | None:
    """Bytes that this host of a cluster has sent so far. None where this process does not run in a cluster."""
    return interface_bytes(INTERFACE)[0] if _MARK in os.environ else None


def require_privileges() -> None:
    """Finds out early what is missing for a cluster.

    Raises
    ------
    ClusterError
        It says what is needed.
    """
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"cannot find {', '.join(missing)}: install iproute2 and util-linux")
    probe = ["unshare", "--net", "--uts", *_OWN_PROCESSES, "ip", "link", "add", "probe", "type", "bridge"]
    result = subprocess.run(probe, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(
            "network namespaces need root: use sudo, or a container with the capabilities SYS_ADMIN and NET_ADMIN that may "
            f"mount /proc ({result.stderr.strip()})"
        )


def die_with_parent(signum: int) -> None:
    """This process gets the signal when the thread that started it ends."""
    _libc("prctl", _PR_SET_PDEATHSIG, signum)


def _libc(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(f"{' '.join(command)}: {result.stderr.strip() or f'exit status {result.returncode}'}")


def _shape(rate: str, device: str, *prefix: str) -> None:
    bits = bits_per_second(rate)
    if bits is not None:
        burst = max(2**17, int(bits / 8 / 1000))  # 1 ms, and more than the largest segment that is handed down in one piece
        bucket = ("tbf", "rate", f"{bits:.0f}bit", "burst", str(burst), "limit", str(_QUEUE_BYTES))
        _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", *bucket)


@dataclass
class Host:
    """One host of a cluster."""

    index: int
    process: subprocess.Popen[bytes]
    namespace: int
    """A file descriptor that keeps the network of the host, and so its counters, when its processes are gone."""

    @property
    def address(self) -> str:
        """IPv4, also the hostname: Horovod dials what the hostname says."""
        return _address(self.index)

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far, headers included, as the switch counts them."""
        from_switch, to_switch = interface_bytes(_port(self.index))
        return to_switch, from_switch


def _address(index: int) -> str:
    return f"{_NETWORK}.{index + 1}"


def _port(index: int) -> str:
    return f"port{index}"


def _start(index: int, command: Sequence[str], environment: Mapping[str, str]) -> Host:
    """A host whose first process waits for a line before it starts the command."""

    def enter() -> None:
        die_with_parent(signal.SIGKILL)
        _libc("unshare", _CLONE_NEWNET | _CLONE_NEWUTS)
        socket.sethostname(_address(index))

    # A process namespace ends with its first process: nothing that the command starts can outlive the host.
    slots = range(int(environment["HOROVOD_LOCAL_SIZE"]))
    begin = " ".join(
        f'HOROVOD_RANK=$((HOROVOD_RANK + {slot})) HOROVOD_LOCAL_RANK={slot} "$@" </dev/null & pids="$pids $!";'
        for slot in slots
    )
    script = f"read -r _; pids=; {begin} status=0; for pid in $pids; do wait $pid || status=$?; done; exit $status"
    process = subprocess.Popen(
        ["unshare", *_OWN_PROCESSES, "--", "sh", "-c", script, "sh", *command],
        stdin=subprocess.PIPE,
        env=environment,
        preexec_fn=enter,
    )
    return Host(index, process, os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY))


def _connect(host: Host, rate: str) -> None:
    port, inside = _port(host.index), ["nsenter", f"--net=/proc/{host.process.pid}/ns/net"]
    _run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(host.process.pid))
    _run("ip", "link", "set", port, "master", "switch", "up")
    _run(*inside, "ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
    for device in ("lo", INTERFACE):
        _run(*inside, "ip", "link", "set", device, "up")
    _shape(rate, INTERFACE, *inside)
    _shape(rate, port)


@contextmanager
def cluster(hosts: int, rate: str, command: Sequence[str], slots: int = 1) -> Iterator[list[Host]]:
    """Hosts that run a command, each as so many Horovod ranks. When the context is left, they end.

    This process moves into the network of the switch, and stays there.

    Parameters
    ----------
    hosts
        2 to `MAX_HOSTS`.
    rate
        Of each host, in each direction, as `bits_per_second` reads it.
    command
        A program and its arguments.
    slots
        Ranks on each host, which follow each other. They reach each other without the network.

    Raises
    ------
    ClusterError
        Something is missing, or a step fails.
    """
    require_privileges()
    _libc("unshare", _CLONE_NEWNET)
    _run("ip", "link", "add", "switch", "type", "bridge")
    _run("ip", "address", "add", f"{_SWITCH}/24", "dev", "switch")
    for device in ("lo", "switch"):
        _run("ip", "link", "set", device, "up")

    running: list[Host] = []
    server = RendezvousServer(0)
    port = server.start()
    try:
        try:
            of_hosts = parse_hosts(",".join(f"{_address(i)}:{slots}" for i in range(hosts)))
            ranks = get_host_assignments(of_hosts, hosts * slots)
            server.init(ranks)
            _build(running, ranks, port, rate, command)
        except (OSError, subprocess.SubprocessError) as error:
            raise ClusterError(f"a host has ended before all were ready: {error}") from error
        yield running
    finally:
        for host in running:
            host.process.kill()
        for host in running:
            host.process.wait()
            os.close(host.namespace)
        server.stop()


def _build(running: list[Host], ranks: Sequence[SlotInfo], port: int, rate: str, command: Sequence[str]) -> None:
    """Adds hosts to those that are running, then lets all start the command."""
    for slot in (slot for slot in ranks if slot.local_rank == 0):
        job = {
            "RANK": slot.rank, "SIZE": slot.size, "LOCAL_RANK": slot.local_rank, "LOCAL_SIZE": slot.local_size,
            "CROSS_RANK": slot.cross_rank, "CROSS_SIZE": slot.cross_size, "HOSTNAME": slot.hostname,
            "GLOO_RENDEZVOUS_ADDR": _SWITCH, "GLOO_RENDEZVOUS_PORT": port, "GLOO_IFACE": INTERFACE,
            "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo",
        }  # fmt: skip
        environment = {
            # The hosts share the cores of this machine.
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // len(ranks))),
            "GLOO_SOCKET_IFNAME": INTERFACE,  # for torch.distributed
            _MARK: "1",
            **os.environ,
            **{f"HOROVOD_{key}": str(value) for key, value in job.items()},
        }
        running.append(_start(slot.cross_rank, command, environment))
        _connect(running[-1], rate)
    for host in running:
        assert host.process.stdin is not None
        host.process.stdin.write(b"\n")
        host.process.stdin.close()


def wait(hosts: Sequence[Host]) -> Host | None:
    """Waits until all hosts have ended, or one has failed and the others have had time to notice. Returns the one."""
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        states = [host.process.poll() for host in hosts]
        if failed is None:
            failed = next((host for host, state in zip(hosts, states, strict=True) if state), None)
            deadline = time.monotonic() + _GRACE_SECONDS if failed else deadline
        if None not in states:
            break
        time.sleep(0.05)
    return failed


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description="Run a command on N hosts over a network of a chosen speed, on one machine.")
    add = parser.add_argument
    add("--hosts", type=int, required=True, help=f"how many: 2 to {MAX_HOSTS}")
    add("--slots", type=int, default=1, help="Horovod ranks on each host (default: 1)")
    add("--rate", default=UNSHAPED, help="of each host in each direction: 1gbit, 500mbit, ... (default: unshaped)")
    add("command", nargs="+", metavar="-- COMMAND", help="what to run on every host")
    args = parser.parse_args()
    if not 2 <= args.hosts <= MAX_HOSTS:
        parser.error(f"argument --hosts: must be from 2 to {MAX_HOSTS}, got {args.hosts}")
    if args.slots < 1:
        parser.error(f"argument --slots: must be 1 or more, got {args.slots}")
    try:
        bits_per_second(args.rate)
    except ValueError as error:
        parser.error(f"argument --rate: {error}")
    if shutil.which(args.command[0]) is None:
        parser.error(f"argument COMMAND: cannot find {args.command[0]!r}")

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    try:
        with cluster(args.hosts, args.rate, args.command, args.slots) as hosts:
            failed = wait(hosts)
            print(f"{'host':<12}{'bytes sent':>16}{'bytes received':>16}   on the wire, headers included", file=sys.stderr)
            for host in hosts:
                sent, received = host.wire_bytes()
                print(f"{host.address:<12}{sent:>16,}{received:>16,}", file=sys.stderr)
            if failed:
                sys.exit(f"cluster: host {failed.index} ({failed.address}) failed with exit status {failed.process.returncode}")
    except ClusterError as error:
        sys.exit(f"cluster: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
