"""Starting clusters from tests, and looking for what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import ClusterError, require_privileges
from horovod_jobs import ROOT

BENCHMARKS = ROOT / "benchmarks"


def _unavailable():
    try:
        require_privileges()
    except ClusterError as error:
        return str(error)
    return ""


needs_root = pytest.mark.skipif(bool(_unavailable()), reason=_unavailable() or "-")


def _default_signals():
    """A shell that runs tests in the background may have had them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "cluster.py"), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"}, preexec_fn=_default_signals,
    )  # fmt: skip


def finish(process, timeout=300):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def processes(mark):
    """Processes with a mark in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def eventually(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
