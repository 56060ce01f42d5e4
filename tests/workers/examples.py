"""Runs examples one after the other on the same ranks: ``examples.py FOLDER COMMANDS``, as JSON, an argument list for each."""

import json
import os
import runpy
import socket
import sys
from pathlib import Path

import horovod.torch as hvd

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
hvd.init()
os.chdir(sys.argv[1])
for command in json.loads(sys.argv[2]):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = hvd.broadcast_object(free.getsockname()[1], name="port")
    # What torchrun tells its ranks.
    os.environ.update(RANK=str(hvd.rank()), WORLD_SIZE=str(hvd.size()), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv[:] = command
    if hvd.rank() == 0:
        print(f"== {' '.join(command)}", flush=True)
    runpy.run_path(str(EXAMPLES / command[0]), run_name="__main__")
