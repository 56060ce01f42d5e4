"""An elastic job that loses one of its two hosts, and gets it back: HOSTS is the file that says which there are."""

import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from checking import assert_identical, batch, distributed, small_model, squeeze
from torch.nn.functional import cross_entropy

from ds_horovod import OneBit

hvd.init()
torch.set_num_threads(1)
hosts = Path(sys.argv[1])
model = small_model()
optimizer = distributed(model, squeeze(OneBit(64)))
state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=optimizer.double_squeeze, step=0)
THEN = {4: "localhost:2\n", 9: "localhost:2\n127.0.0.1:2\n"}


def held():
    """What all ranks hold together of all parameters."""
    return sum(error.double().abs().sum() for error in optimizer.double_squeeze.full_state_dict()["errors"].values())


@hvd.elastic.run
def train(state):
    while state.step < 13:
        if state.step in (5, 10):  # the ranks that are still there have theirs
            assert held() > 0
        x, y = batch(state.step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        assert_identical(model)
        if hvd.rank() == 0:
            print(f"step {state.step}: {optimizer.double_squeeze.explain().splitlines()[0]}", flush=True)
        if state.step in THEN and hvd.rank() == 0:
            hosts.write_text(THEN[state.step])
        state.step += 1
        state.commit()
        while state.step - 1 in THEN:  # until Horovod tells
            time.sleep(0.1)
            state.check_host_updates()


train(state)
print("elastic hosts: ok", flush=True)
