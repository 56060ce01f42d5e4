"""Trains while ranks come and go: 2, then 3, one of which is killed, then 1, then 2 again. See test_elastic.py.

    horovodrun -np 2 --min-np 1 --max-np 3 --host-discovery-script SCRIPT python tests/workers/elastic.py HOSTS

SCRIPT prints the file HOSTS, which rank 0 rewrites. After every step each rank checks that replicas are identical and that
what has arrived and the residual add up to the gradients; after every change of ranks that those which remain have kept their
residuals.
"""

import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from checking import assert_identical, batch, flat, small_model, squeeze
from torch.nn.functional import cross_entropy

from ds_horovod import OneBit, TopK
from ds_horovod.snapshot import snapshot

HOSTS = Path(sys.argv[1])
OPTIONS = {"momentum": 0.5} if "momentum" in sys.argv else {}
# Ranks, and the hosts that are announced when they have taken some steps. None: one of them is killed.
STAGES = [(2, "localhost:2\n127.0.0.1:1\n"), (3, None), (2, "localhost:1\n"), (1, "localhost:2\n"), (2, "")]
STEPS = 4

hvd.init()
torch.set_num_threads(1)
model = small_model(seed=os.getpid())  # TorchState makes them alike
compression = squeeze(TopK(0.1), server_compressor=OneBit(64), **OPTIONS)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression
)  # fmt: skip
dying = False


def die(_):
    if dying:
        os.kill(os.getpid(), signal.SIGKILL)


model[2].weight.register_hook(die)
zeros = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters() if p.dim() > 1}
state = hvd.elastic.TorchState(
    model=model, optimizer=optimizer, compression=compression,
    step=0, stage=0, steps_of_stage=0, arrived=dict(zeros), total=dict(zeros),
)  # fmt: skip
names = set()
"""With which names of collectives have begun, here."""
committed = dict(zeros)
"""The residual of this rank at the last commit."""


def total_residual():
    return {name: error.double() for name, error in compression.full_state_dict()["errors"].items()}


def assert_close(actual, expected, what):
    for name in zeros:
        a, e = (values.get(name, zeros[name]) for values in (actual, expected))
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-5, msg=lambda m: f"{what}, {name}, {hvd.size()} ranks: {m}")  # noqa: B023


def look_after_a_change():
    """The ranks that remain have kept their residuals."""
    sums = {name: hvd.allreduce(committed[name], op=hvd.Sum, name=f"committed.{name}") for name in zeros}
    now = total_residual()
    assert_close(now, sums, "residual")
    lost = sum(float((state.total[name] - state.arrived[name] - now.get(name, 0.0)).abs().max()) for name in zeros)
    left = hvd.size() < [2, 2, 3, 2, 1, 2][state.stage]
    if not OPTIONS:
        assert lost > 1e-3 if left else lost < 1e-3, (lost, left)
    state.total = {name: state.arrived[name] + now.get(name, 0.0) for name in zeros}


def train_step():
    x, y = batch(state.step)
    copy = small_model()
    copy.load_state_dict(model.state_dict())
    cross_entropy(copy(x), y).backward()
    mean = {n: hvd.allreduce(p.grad, name=f"mean.{n}").double() for n, p in copy.named_parameters() if n in zeros}
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_identical(model)
    gradients = dict(model.named_parameters())
    state.arrived = {name: state.arrived[name] + gradients[name].grad.double() for name in zeros}
    state.total = {name: state.total[name] + mean[name] for name in zeros}
    if not OPTIONS:  # with momentum there is more to count
        errors = total_residual()
        assert_close({n: state.arrived[n] + errors.get(n, 0.0) for n in zeros}, state.total, "law")


@hvd.elastic.run
def train(state):
    global committed, dying
    ranks, hosts = STAGES[state.stage]
    if hvd.size() != ranks:
        state.stage += 1
        state.steps_of_stage = 0
        ranks, hosts = STAGES[state.stage]
    assert hvd.size() == ranks, (hvd.size(), ranks)
    print(f"stage {state.stage}: rank {hvd.rank()} of {hvd.size()}, step {state.step}", flush=True)
    look_after_a_change()
    while True:
        train_step()
        if state.steps_of_stage == 0:
            assert compression._reducer.name not in names, names  # Horovod may still have a tensor of that name
            names.add(compression._reducer.name)
        state.step += 1
        state.steps_of_stage += 1
        if state.steps_of_stage >= STEPS:
            if hosts == "":
                break
            if hosts is None:
                dying = os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1"
            elif state.steps_of_stage == STEPS and hvd.rank() == 0:
                HOSTS.write_text(hosts)
            time.sleep(0.05)
        own = {name: error.double() for name, (error, _) in snapshot(compression._reducer).residuals.items()}
        committed = {name: own.get(name, zeros[name]) for name in zeros}
        state.commit()
    print(f"elastic: ok, {state.step} steps, |x| = {float(flat(model.parameters()).norm()):.4f}", flush=True)


train(state)
