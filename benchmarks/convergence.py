"""How well a task is learned with each way to exchange gradients: losses, validation, bytes and errors, step by step.

    python benchmarks/convergence.py --task gpt-sgd --json FILE                            # workers in one process
    horovodrun -np 4 python benchmarks/convergence.py --task gpt-sgd --json FILE           # a rank for each worker

In one process the workers take turns on one model, and exchange gradients by the code that they would run under
Horovod; batch statistics are each worker's own. Both ways give the same losses up to rounding. The file is written after
each run, and a later call goes on where it ends. It holds means of several losses where nothing reads those of every step
(see `learning.thinned`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import horovod.torch as hvd
import methods
import tasks
import torch
import torch.nn.functional as F
from common import Cells, HelpFormatter, count, new_file, positive, progress_bar, provenance, table, use_threads
from learning import thinned
from tasks import Task
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ds_horovod import Cast, DoubleSqueeze, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from ds_horovod.in_process import Workers
from ds_horovod.tentative import Tentative

POWERSGD_START = 10
"""Steps before PowerSGD, in which DDP sends gradients as they are."""
LOOKS = 10
"""How often in a run the metric and the errors are looked at."""


@dataclass(frozen=True)
class Recipe:
    """A way to exchange gradients. With neither of the two, their average is taken."""

    squeeze: Callable[..., DoubleSqueeze] | None = None
    momentum: float = 0.0
    """Of DoubleSqueeze, which takes the optimizer's over: momentum correction. 0: it does not."""
    powersgd: int | None = None
    """Rank of DDP's PowerSGD, under horovodrun only."""
    tentative: bool = False
    """With staleness: whether tentative steps are taken."""
    lr: float = 1.0
    """Times the task's learning rate: masking forgets velocity, so that momentum correction takes smaller steps."""

    def make_squeeze(self, task: Task) -> DoubleSqueeze:
        """A DoubleSqueeze for one worker of a task."""
        assert self.squeeze is not None
        return self.squeeze(max_norm=task.max_norm, momentum=self.momentum)

    def optimizer(self, task: Task, model: nn.Module) -> torch.optim.Optimizer:
        """The task's, without momentum where DoubleSqueeze takes it over."""
        return task.optimizer(model.parameters(), 0.0 if self.momentum else task.momentum)

    def describe(self, task: Task) -> str:
        """What one would write to repeat it."""
        rate = "" if self.lr == 1 else f", learning rate x {self.lr}"
        if self.squeeze:
            return repr(self.make_squeeze(task)) + (", tentative steps" if self.tentative else "") + rate
        return (f"DDP PowerSGD, rank {self.powersgd}, from step {POWERSGD_START}" if self.powersgd else "average") + rate


def _squeeze(*compressor: Any, momentum: float = 0.0, tentative: bool = False, lr: float = 1.0, **options: Any) -> Recipe:
    return Recipe(functools.partial(DoubleSqueeze, *compressor, **options), momentum, tentative=tentative, lr=lr)


RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    "none-lr-0.67": Recipe(lr=0.67),
    "none-lr-1.67": Recipe(lr=1.67),
    "onebit": _squeeze(OneBit()),
    "paper": _squeeze(OneBit(scale="l2", granularity="bucket"), server=0, bucket_cap_mb=None),
    "paper-topk": _squeeze(TopK(k=300_000), server=0, bucket_cap_mb=None),  # of 11171146: for cifar10
    "onebit-warm": _squeeze(OneBit(), warmup_steps=60),
    "onebit-uncompensated": _squeeze(OneBit(), worker_error=False, server_error=False),
    "topk-1%": _squeeze(TopK(0.01)),
    "topk-1%-uncompensated": _squeeze(TopK(0.01), worker_error=False, server_error=False),
    "mem-sgd": _squeeze(TopK(0.01), server_compressor=NoCompression()),
    "qsgd": _squeeze(Quantize(bits=4, block=256, rounding="stochastic", scale="l2"), worker_error=False, server_error=False),
    "ternary": _squeeze(Ternary()),
    "ternary-momentum": _squeeze(Ternary(), momentum=0.9),
    "quantize-3": _squeeze(Quantize(bits=3)),
    "quantize-4": _squeeze(Quantize(bits=4)),
    "quantize-4-late": _squeeze(Quantize(bits=4), staleness=1),
    "quantize-4-tentative": _squeeze(Quantize(bits=4), staleness=1, tentative=True),
    "quantize-4-tentative-2": _squeeze(Quantize(bits=4), staleness=2, tentative=True),
    "quantize-4-tentative-4": _squeeze(Quantize(bits=4), staleness=4, tentative=True),
    "none-late": _squeeze(NoCompression(), staleness=1),
    "none-tentative": _squeeze(NoCompression(), staleness=1, tentative=True),
    "sign-4.5%-momentum-tentative": _squeeze(TopK(0.045, values="sign"), momentum=0.9, staleness=1, tentative=True),
    "sign-4.5%-momentum-0.6-tentative": _squeeze(TopK(0.045, values="sign"), momentum=0.6, staleness=1, tentative=True),
    "quantize-8": _squeeze(Quantize(bits=8)),
    "randomk-1%": _squeeze(RandomK(0.01)),
    "topk-1%-momentum": _squeeze(TopK(0.01), momentum=0.9),
    "topk-5%-momentum": _squeeze(TopK(0.05), momentum=0.9),
    "sign-4.5%-momentum": _squeeze(TopK(0.045, values="sign"), momentum=0.9),
    "sign-4.5%-momentum-lr-1.67": _squeeze(TopK(0.045, values="sign"), momentum=0.9, lr=1.67),
    "sign-4.5%-momentum-0.6": _squeeze(TopK(0.045, values="sign"), momentum=0.6),
    "sign-4.5%-momentum-0.6-lr-1.67": _squeeze(TopK(0.045, values="sign"), momentum=0.6, lr=1.67),
    "sign-6%-reply-3%-momentum-0.6": _squeeze(
        TopK(0.06, values="sign"), server_compressor=TopK(0.03, values="sign"), momentum=0.6
    ),
    "sign-3%-reply-6%-momentum": _squeeze(TopK(0.03, values="sign"), server_compressor=TopK(0.06, values="sign"), momentum=0.9),
    "sign-18%-momentum-0.6": _squeeze(TopK(0.18, values="sign"), momentum=0.6),
    "onebit-lr-aware": _squeeze(OneBit(), lr_aware=True),
    "quantize-4-lr-aware": _squeeze(Quantize(bits=4), lr_aware=True),
    "sign-4.5%-momentum-lr-aware": _squeeze(TopK(0.045, values="sign"), momentum=0.9, lr_aware=True),
    "sign-18%-momentum-lr-3": _squeeze(TopK(0.18, values="sign"), momentum=0.9, lr=3.0),
    "sign-18%-momentum": _squeeze(TopK(0.18, values="sign"), momentum=0.9),
    "cast-bf16": _squeeze(Cast("bf16")),
    "ddp-powersgd-1": Recipe(powersgd=1),
    "ddp-powersgd-4": Recipe(powersgd=4),
}


def recipe_problem(name: str, task: Task, workers: int, ranks: bool) -> str | None:
    """Why a recipe cannot train a task; None where it can."""
    recipe = RECIPES[name]
    if recipe.powersgd and not ranks:
        return f"{name} needs ranks of its own: start this with horovodrun"
    if recipe.momentum and not task.momentum:
        return f"{name} needs a task with momentum, which {task.name} has not"
    if recipe.squeeze and workers < 2:
        return f"{name} needs 2 workers or more"
    return None


def ring_bytes(model: nn.Module, workers: int) -> float:
    """Bytes that each worker sends in one step for an uncompressed ring allreduce."""
    return 2 * (workers - 1) / workers * sum(p.numel() * p.element_size() for p in model.parameters())


def clip(gradients: Sequence[Tensor], max_norm: float | None) -> None:
    """Scales gradients so that their norm, over all of them, is `max_norm` at most."""
    if max_norm is not None:
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / norm)


# ---- the workers


class Team(Protocol):
    """The workers that learn a task. Lists are by worker, of those in this process."""

    model: nn.Module
    """A replica, with the batch statistics of worker 0 where that is in this process."""

    def step(self, step: int) -> list[float]:
        """One step of training. Returns losses."""

    def stats(self) -> list[dict[str, float]]:
        """``bytes_sent`` since the start, ``dense_bytes_sent`` of them, which the recipe leaves as they are,
        ``worker_error_norm``, ``server_error_norm``."""


def _stats(squeeze: DoubleSqueeze) -> dict[str, float]:
    stats = squeeze.stats()
    dense = stats["steps"] * stats["dense_bytes_sent"]
    sent = stats["steps"] * stats["compressed_bytes_sent"] + dense
    norms = {key: stats[key] for key in ("worker_error_norm", "server_error_norm")}
    return {"bytes_sent": sent, "dense_bytes_sent": dense, **norms}


def _stats_of(bytes_sent: float, dense: float) -> dict[str, float]:
    return {"bytes_sent": bytes_sent, "dense_bytes_sent": dense, "worker_error_norm": 0.0, "server_error_norm": 0.0}


class InProcess:
    """All workers in this process, taking turns on one model.

    Parameters
    ----------
    task, recipe
        What they learn, and how they exchange gradients.
    workers
        How many. One has nobody to exchange with: whatever the recipe, nothing is compressed.
    seed
        Of weights and data.
    """

    def __init__(self, task: Task, recipe: Recipe, workers: int, seed: int) -> None:
        self.model = task.model(seed)
        self._task, self._recipe, self._workers, self._seed = task, recipe, workers, seed
        self._parameters = list(self.model.parameters())
        self._optimizer = recipe.optimizer(task, self.model)
        # The model's own are worker 0's.
        buffers = dict(self.model.named_buffers())
        self._buffers = [buffers, *({name: b.clone() for name, b in buffers.items()} for _ in range(1, workers))]
        self._exchange = None
        if recipe.squeeze and workers > 1:
            self._exchange = Workers(functools.partial(recipe.make_squeeze, task), list(self.model.named_parameters()), workers)
        self._tentative = Tentative(self._optimizer) if recipe.tentative and self._exchange else None
        self._steps = 0

    def step(self, step: int) -> list[float]:
        losses, gradients = [], []
        rate = self._recipe.lr * self._task.learning_rate(step)
        self._optimizer.param_groups[0]["lr"] = rate
        if self._exchange:
            self._exchange.begin_step(rate)
        for worker in range(self._workers):
            x, y = self._task.batch(self._seed, worker, step)
            self._optimizer.zero_grad()
            with self._led(worker):
                loss = F.cross_entropy(torch.func.functional_call(self.model, self._buffers[worker], (x,)), y)
                loss.backward()
            losses.append(loss.item())
            gradients.append([p.grad for p in self._parameters])
            if not self._exchange:
                clip(gradients[-1], self._task.max_norm)
        aggregated = self._aggregate(gradients)
        if aggregated is not None:  # otherwise nothing is due yet
            for p, gradient in zip(self._parameters, aggregated, strict=True):
                p.grad = gradient
            self._optimizer.step()
        self._steps += 1
        return losses

    @contextlib.contextmanager
    def _led(self, worker: int) -> Iterator[None]:
        """The model as a worker sees it, where it takes tentative steps."""
        if self._tentative is None or self._exchange is None:
            yield
            return
        own = dict(self.model.named_parameters())
        self._tentative.lead([{own[n]: g for n, g in estimate.items()} for estimate in self._exchange.estimates(worker)])
        self._tentative.toggle()
        yield
        self._tentative.toggle()

    def _aggregate(self, gradients: list[list[Tensor]]) -> list[Tensor] | None:
        if self._exchange:
            return self._exchange.exchange(gradients)
        return [torch.stack(of_one).mean(0) for of_one in zip(*gradients, strict=True)]

    def stats(self) -> list[dict[str, float]]:
        if self._exchange:
            return [_stats(squeeze) for squeeze in self._exchange.squeezes]
        return [_stats_of(self._steps * ring_bytes(self.model, self._workers), 0.0)] * self._workers


class Rank:
    """One worker, which is this process; Horovod's other ranks are the others. See `InProcess`."""

    def __init__(self, task: Task, recipe: Recipe, seed: int) -> None:
        self.model = task.model(seed)
        self._forward = self.model
        self._task, self._recipe, self._seed = task, recipe, seed
        self._optimizer = recipe.optimizer(task, self.model)
        if recipe.squeeze:
            self._optimizer = hvd.DistributedOptimizer(
                self._optimizer, named_parameters=self.model.named_parameters(), compression=recipe.make_squeeze(task)
            )
            if recipe.tentative:
                self._optimizer.double_squeeze.attach(self.model)
        elif recipe.powersgd:
            self._forward, self._powersgd = _ddp(self.model, recipe.powersgd, task.max_norm, seed)
        self._steps = 0

    def step(self, step: int) -> list[float]:
        x, y = self._task.batch(self._seed, hvd.rank(), step)
        self._optimizer.param_groups[0]["lr"] = self._recipe.lr * self._task.learning_rate(step)
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._forward(x), y)
        loss.backward()
        if not self._recipe.squeeze and not self._recipe.powersgd:
            gradients = [p.grad for p in self.model.parameters()]
            clip(gradients, self._task.max_norm)
            hvd.grouped_allreduce_(gradients, name="gradients")
        self._optimizer.step()
        self._steps += 1
        return [loss.item()]

    def stats(self) -> list[dict[str, float]]:
        if self._recipe.squeeze:
            return [_stats(self._optimizer.double_squeeze)]
        uncompressed = ring_bytes(self.model, hvd.size())
        if not self._recipe.powersgd:
            return [_stats_of(self._steps * uncompressed, 0.0)]
        _, _, numel = self._powersgd.compression_stats()
        everything = sum(p.numel() for p in self.model.parameters())
        vectors = sum(p.numel() for p in self.model.parameters() if p.dim() < 2) / everything
        steps = min(self._steps, POWERSGD_START) + numel / everything
        return [_stats_of(steps * uncompressed, self._steps * vectors * uncompressed)]


def _ddp(model: nn.Module, rank: int, max_norm: float | None, seed: int) -> tuple[nn.Module, powerSGD_hook.PowerSGDState]:
    """A model whose gradients are averaged by PowerSGD, and the state of that."""
    methods._join_torch()
    everything = 1 + sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20  # see methods.py
    ddp = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, bucket_cap_mb=everything)
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=POWERSGD_START, random_seed=seed
    )

    def hook(state, bucket):  # DDP looks at annotations, and does not understand those of postponed evaluation
        if bucket.index() or not bucket.is_last():
            raise RuntimeError("PowerSGD: expected all gradients in one bucket, to be clipped together")
        clip([bucket.buffer()], max_norm)
        return powerSGD_hook.powerSGD_hook(state, bucket)

    ddp.register_comm_hook(state, hook)
    return ddp, state


# ---- a run


def looks(steps: int) -> list[int]:
    """After how many steps to look: ten times, the last one at the end."""
    return sorted({math.ceil(steps * i / LOOKS) for i in range(1, LOOKS + 1)})


def rounded(value: float) -> float | None:
    """Five digits. None for what JSON does not know, as of a run that diverges."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def together(stats: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Of all workers: bytes and worker error are means, the server's error is the norm of all shards' together."""
    mean = {key: statistics.fmean(s[key] for s in stats) for key in ("bytes_sent", "worker_error_norm")}
    server = math.hypot(*(s["server_error_norm"] for s in stats))
    return {key: rounded(value) for key, value in {**mean, "server_error_norm": server}.items()}


def train(task: Task, recipe: Recipe, workers: int, seed: int, ranks: bool, tick: Callable[[], Any]) -> dict[str, Any]:
    """Learns a task.

    Parameters
    ----------
    task, recipe, workers, seed
        As for `InProcess`.
    ranks
        Whether this is one rank of many, all of which call it.
    tick
        Called after each step.

    Returns
    -------
    dict
        ``losses``: of each step, mean over the workers; ``metric`` at the end; ``points``: ``step``, ``metric``,
        ``bytes_sent`` since the start, ``worker_error_norm``, ``server_error_norm``, ten times in the run; per step and
        worker: ``bytes_sent`` and ``bits_per_element``, which is 32 for a ring allreduce of float32, and
        ``bits_per_compressed_element``, which leaves out what the recipe does: biases and norms; ``seconds`` without
        validation.
    """
    team: Team = Rank(task, recipe, seed) if ranks else InProcess(task, recipe, workers, seed)
    losses, stats, points = [], [], []
    start, spent = time.perf_counter(), 0.0
    for step in range(task.steps):
        losses.append(team.step(step))
        if step + 1 in looks(task.steps):
            spent += time.perf_counter() - start
            metric = task.evaluate(team.model) if not ranks or hvd.rank() == 0 else math.nan
            points.append({"step": step + 1, "metric": rounded(metric)})
            stats.append(team.stats())
            start = time.perf_counter()
        tick()
    if ranks:
        everyone = hvd.allgather_object((losses, stats), name="benchmark.result")
        losses = [list(itertools.chain(*own)) for own in zip(*(their for their, _ in everyone), strict=True)]
        stats = [list(itertools.chain(*own)) for own in zip(*(their for _, their in everyone), strict=True)]
    for point, own in zip(points, stats, strict=True):
        point.update(together(own))
    sent, dense = (statistics.fmean(s[key] for s in stats[-1]) / task.steps for key in ("bytes_sent", "dense_bytes_sent"))
    ring = ring_bytes(team.model, workers)
    return {
        "metric": points[-1]["metric"],
        "bytes_sent": round(sent),
        "bits_per_element": rounded(32 * sent / ring) if workers > 1 else None,
        "bits_per_compressed_element": rounded(32 * (sent - dense) / (ring - dense)) if workers > 1 else None,
        "seconds": rounded(spent),
        "points": points,
        "losses": [rounded(statistics.fmean(of_step)) for of_step in losses],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line, checked but for what depends on ranks and data."""
    parser = argparse.ArgumentParser(
        description="How well a task is learned with each way to exchange gradients.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=tasks.TASKS, required=True, help="what to learn")
    known = ", ".join(RECIPES).replace("%", "%%")
    add("--recipes", nargs="+", metavar="RECIPE", help=f"some of {known} (default: all that can run)")
    add("--workers", nargs="+", type=positive(int), help="how many in one process (default: 4); with horovodrun, its ranks")
    add("--seeds", nargs="+", type=count, default=[0], help="of weights and data: a run for each")
    add("--steps", type=positive(int), help="of training (default: the task's)")
    add("--json", type=new_file, required=True, metavar="FILE", help="the results; what it has already is not run again")
    add("--data", type=Path, metavar="DIR", help="for cifar10: its folder cifar-10-batches-py")
    add("--threads", type=positive(int), default=1, help="of each process; sums are not the same for another number")
    args = parser.parse_args()
    unknown = [name for name in args.recipes or [] if name not in RECIPES]
    if unknown:
        parser.error(f"argument --recipes: must name some of {', '.join(RECIPES)}; got {', '.join(unknown)}")
    return args


def summary(cells: Sequence[dict[str, Any]], task: Task) -> str:
    """A table: the metric's mean over the seeds, and how far they lie apart."""
    rows = [["recipe", "workers", "seeds", task.metric, "spread", "bits per element"]]
    for name, workers in dict.fromkeys((cell["recipe"], cell["workers"]) for cell in cells):
        group = [cell for cell in cells if (cell["recipe"], cell["workers"]) == (name, workers)]
        metrics = [math.nan if cell["metric"] is None else cell["metric"] for cell in group]
        spread = max(metrics) - min(metrics)
        bits = statistics.fmean(cell["bits_per_element"] for cell in group) if workers > 1 else math.nan
        rows.append([name, str(workers), str(len(group)), f"{statistics.fmean(metrics):.4f}", f"{spread:.4f}", f"{bits:.2f}"])
    return table(rows)


def main() -> None:
    """Runs what is missing in the file."""
    args = parse_arguments()
    hvd.init()
    ranks, first = hvd.size() > 1, hvd.rank() == 0
    use_threads(args.threads)
    sizes = args.workers or [hvd.size() if ranks else 4]
    try:
        if ranks and sizes != [hvd.size()]:
            raise ValueError(f"argument --workers: must be the {hvd.size()} ranks, got {' '.join(map(str, sizes))}")
        made = {workers: tasks.make(args.task, workers, args.steps, args.data) for workers in sizes}
        runs = list(itertools.product(sizes, args.recipes or RECIPES, args.seeds))
        problems = {(n, name): recipe_problem(name, made[n], n, ranks) for n, name, _ in runs}
        if args.recipes and any(problems.values()):
            raise ValueError("argument --recipes: " + "; ".join(dict.fromkeys(filter(None, problems.values()))))
        runs = [run for run in runs if not problems[run[:2]]]
        settings = {**made[sizes[0]].settings(), "threads": args.threads}
        if any(task.settings() != made[sizes[0]].settings() for task in made.values()):
            raise ValueError(f"argument --workers: {args.task} is another task for each number of them: give one, or --steps")
        cells = Cells(args.json, settings, ("workers", "recipe", "seed", "transport")) if first else None
    except (ValueError, OSError) as error:
        sys.exit(f"convergence: {error}")
    transport = "horovod" if ranks else "in-process"
    keys = [{"workers": n, "recipe": name, "seed": seed, "transport": transport} for n, name, seed in runs]
    source = provenance(args)
    with progress_bar(total=sum(made[n].steps for n, _, _ in runs), unit="step", disable=not first) as bar:
        for key in keys:
            task, recipe = made[key["workers"]], RECIPES[key["recipe"]]
            there = cells is not None and cells.has(**key)
            if hvd.broadcast_object(there, name="benchmark.there") if ranks else there:
                bar.total -= task.steps
                continue
            bar.set_description("{recipe}, {workers} workers, seed {seed}".format(**key))
            result = train(task, recipe, key["workers"], key["seed"], ranks, bar.update)
            if cells is not None:
                origin = {name: source[name] for name in ("date", "commit", "command", "machine", "versions")}
                result.update(thinned(result["losses"], task.name, key["workers"]))
                cells.add(**key, compression=recipe.describe(task), **origin, **result)
    if cells is not None:
        asked = [cell for cell in cells.read() if {name: cell[name] for name in keys[0]} in keys]
        print(summary(asked, made[sizes[0]]))


if __name__ == "__main__":
    main()
