"""Starts Python programs in no time: they are forks of a process that has imported torch and Horovod already.

    python tests/forking.py serve SOCKET
    python -I -S tests/forking.py SOCKET PROGRAM arguments

The second runs a program with its own environment and standard output, and ends as it does.
"""

import functools
import json
import os
import select
import signal
import socket
import sys
import time


def serve(path: str, ready) -> None:
    """Waits for calls, for ever; calls `ready` when it does."""
    import horovod.runner.launch
    import horovod.torch  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    ready("ready")
    while True:
        caller, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(caller)
        caller.close()


def _attend(caller: socket.socket) -> None:
    size, descriptors, _, _ = socket.recv_fds(caller, 8, 2)
    arguments, environment, folder = json.loads(caller.recv(int(size, 16), socket.MSG_WAITALL))
    process = os.fork()
    if process == 0:
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _run(arguments)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            caller.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
            os._exit(0)
        if select.select([caller], [], [], 0.05)[0] and not caller.recv(1):
            # The caller is gone. What horovodrun ends has five seconds, too.
            os.kill(process, signal.SIGTERM)
            for _ in range(100):
                if os.waitpid(process, os.WNOHANG)[0]:
                    os._exit(0)
                time.sleep(0.05)
            os.kill(process, signal.SIGKILL)
            os._exit(0)


def _run(arguments: list[str]) -> None:
    import atexit
    import runpy
    import traceback

    import torch

    status = 1
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # it has been read already
    try:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # Horovod's is among them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def call(path: str, arguments: list[str]) -> int:
    """Runs a program. Returns its exit status."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    message = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [b"%08x" % len(message)], [1, 2])
    server.sendall(message)
    status = server.recv(1)
    return status[0] if status else 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], functools.partial(print, flush=True))
    sys.exit(call(sys.argv[1], sys.argv[2:]))
