"""Linear speed-up: the steps that n workers need to reach a loss, uncompressed and with DoubleSqueeze.

    python benchmarks/speedup.py --json FILE                           # 1 to 64 workers in one process
    horovodrun -np 4 python benchmarks/speedup.py --json FILE          # a rank for each worker

Tang et al. 2019 (arXiv 1905.05957, corollary 1) bound the mean squared gradient of n workers after T steps of plain SGD on
a non-convex loss by a constant times

    sigma / sqrt(n T)  +  (epsilon / T)^(2/3)  +  1 / T

for the learning rate 1 / (L + sigma sqrt(T / n) + epsilon^(2/3) T^(1/3)), where sigma is the noise of a gradient and
epsilon bounds the errors of compression. While the first term rules, n workers reach the same accuracy in T / n steps: that
is the linear speed-up. The learning rate, sqrt(n / T) / sigma, is then n times that of one worker, since T is n times
smaller: **the rule here is learning rate = n times that of one worker**, whose own is as large as noise allows (see
`LEARNING_RATE`). A step's other terms do not shrink with n, and they show once T is small.

So the task has noise that never ends: digits under fresh Gaussian noise, two a step and worker. The loss is not that of the
batches but of the whole training set under one fixed draw of the noise, smoothed over five looks.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from common import Cells, HelpFormatter, count, new_file, positive, progress_bar, provenance, table, use_threads
from convergence import RECIPES, InProcess, Rank, Team, rounded, together
from learning import efficiencies
from models import digits_classifier
from tasks import Task, digits_data, generator
from torch import Tensor, nn

NOISE = 0.7
"""Standard deviation, for pixels from 0 to 1."""
BATCH_SIZE = 2
TARGET = 1.1
"""The loss to reach: well below what small noise and large steps reach at once, so that noise rules the way there."""
LEARNING_RATE = 0.005
"""Of one worker. From 0.005 to 0.02 it needs as many steps, and with 0.04 half as many again: noise is the limit."""
SAMPLES_BETWEEN_LOOKS = 512
"""Of all workers together, so that the loss is looked at equally often on the way, whatever their number."""
SMOOTHING = 5
"""Looks, of which the mean must reach the target."""
MOST_LOOKS = 50
"""Of one run, in the file: enough for the figure."""
MOST_SAMPLES = 200_000
"""Of all workers together, before a run is given up."""
RECIPE_NAMES = ("none", "onebit", "topk-1%")
LATE_RECIPE_NAMES = (
    "quantize-4", "quantize-4-late", "quantize-4-tentative", "quantize-4-tentative-2", "quantize-4-tentative-4"
)  # fmt: skip


def noisy_digits(workers: int) -> Task:
    """Digits under noise, for plain SGD with a constant learning rate."""
    x, y, _, _ = digits_data()
    fixed = x + NOISE * torch.randn(x.shape, generator=generator(0))

    def batch(seed: int, worker: int, step: int) -> tuple[Tensor, Tensor]:
        numbers = generator(seed, worker, step)
        chosen = torch.randint(len(x), (BATCH_SIZE,), generator=numbers)
        return x[chosen] + NOISE * torch.randn(BATCH_SIZE, x.shape[1], generator=numbers), y[chosen]

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(fixed), y).item()

    return Task(
        name="noisy digits",
        build=digits_classifier,
        batch=batch,
        evaluate=loss,
        metric="training loss",
        optimizer=lambda parameters, momentum: torch.optim.SGD(parameters, lr=0.0),
        learning_rate=lambda step: workers * LEARNING_RATE,
        momentum=0.0,
        max_norm=None,
        steps=MOST_SAMPLES // (workers * BATCH_SIZE),
        facts={
            "data": f"digits of scikit-learn: {len(x)}, with Gaussian noise of deviation {NOISE}",
            "batch_size": BATCH_SIZE,
            "optimizer": "SGD, constant learning rate",
            "learning_rate_of_one": LEARNING_RATE,
            "target": TARGET,
            "smoothing": f"mean of {SMOOTHING} looks, one every {SAMPLES_BETWEEN_LOOKS} samples",
        },
    )


def train(recipe: str, workers: int, seed: int, ranks: bool, tick: Callable[[int], Any]) -> dict[str, Any]:
    """Trains until the smoothed loss reaches the target.

    Parameters
    ----------
    recipe, workers, seed
        The name of one of `convergence.RECIPES`; the rest as for `convergence.InProcess`.
    ranks
        Whether this is one rank of many, all of which call it.
    tick
        Called with samples that all workers together have seen since the last call.

    Returns
    -------
    dict
        ``steps`` to the target, None where it was not reached; ``learning_rate``; ``looks``: ``step``, ``loss``,
        ``worker_error_norm`` (mean of the workers), ``server_error_norm`` (of all shards together), along the way.
    """
    task = noisy_digits(workers)
    team: Team = Rank(task, RECIPES[recipe], seed) if ranks else InProcess(task, RECIPES[recipe], workers, seed)
    interval = max(1, SAMPLES_BETWEEN_LOOKS // (workers * BATCH_SIZE))
    recent: deque[float] = deque(maxlen=SMOOTHING)
    found, stats = [], []
    for step in range(task.steps):
        team.step(step)
        if (step + 1) % interval:
            continue
        recent.append(task.evaluate(team.model))  # the same on all ranks, so that all stop at once
        found.append({"step": step + 1, "loss": rounded(recent[-1])})
        stats.append(team.stats())
        tick(interval * workers * BATCH_SIZE)
        if (len(recent) == SMOOTHING and statistics.fmean(recent) <= TARGET) or not math.isfinite(recent[-1]):
            break
    if ranks:
        stats = [list(itertools.chain(*own)) for own in zip(*hvd.allgather_object(stats, name="benchmark.result"), strict=True)]
    norms = ("worker_error_norm", "server_error_norm")
    for look, own in zip(found, stats, strict=True):
        look.update({key: value for key, value in together(own).items() if key in norms})
    reached = len(recent) == SMOOTHING and statistics.fmean(recent) <= TARGET
    return {"steps": found[-1]["step"] if reached else None, "learning_rate": workers * LEARNING_RATE, "looks": found}


def thinned(looks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_LOOKS` of them, evenly spaced, the last one among them."""
    return list(looks)[:: -max(1, math.ceil(len(looks) / MOST_LOOKS))][::-1]


def summary(cells: Sequence[dict[str, Any]]) -> str:
    """`efficiencies` as a table."""
    rows = [["recipe", "workers", "steps", "efficiency", "of uncompressed SGD's"]]
    for e in efficiencies(cells):
        numbers = [(e["steps"], ".0f"), (e["efficiency"], ".2f"), (e["relative"], ".2f")]
        rows.append([e["recipe"], str(e["workers"]), *("-" if value is None else f"{value:{how}}" for value, how in numbers)])
    return table(rows)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked but for what depends on the ranks."""
    parser = argparse.ArgumentParser(description="Steps of n workers to a loss.", formatter_class=HelpFormatter)
    known = [name for name, recipe in RECIPES.items() if not recipe.momentum and not recipe.powersgd]
    add = parser.add_argument
    what = f"some of {', '.join(known)}; the rest is measured against none".replace("%", "%%")
    add("--recipes", nargs="+", choices=known, metavar="RECIPE", default=RECIPE_NAMES, help=what)
    add("--workers", nargs="+", type=positive(int), help="how many (default: 1 to 64 by powers of two; or as many as ranks)")
    add("--seeds", nargs="+", type=count, default=[0, 1, 2], help="of weights and data: a run for each")
    add("--json", type=new_file, required=True, metavar="FILE", help="the results; what it has already is not run again")
    add("--threads", type=positive(int), default=1, help="of each process; sums are not the same for another number")
    add("--staleness", action="store_true", help="with the recipes of gradients that come 1, 2 and 4 steps late")
    args = parser.parse_args()
    if args.staleness:
        args.recipes = list(dict.fromkeys([*args.recipes, *LATE_RECIPE_NAMES]))
    return args


def main() -> None:
    """Runs what is missing in the file."""
    args = parse_arguments()
    hvd.init()
    ranks, first = hvd.size() > 1, hvd.rank() == 0
    use_threads(args.threads)
    sizes = args.workers or ([hvd.size()] if ranks else [1, 2, 4, 8, 16, 32, 64])
    try:
        if ranks and sizes != [hvd.size()]:
            raise ValueError(f"argument --workers: must be the {hvd.size()} ranks, got {' '.join(map(str, sizes))}")
        settings = {**noisy_digits(1).settings(), "threads": args.threads}
        cells = Cells(args.json, settings, ("workers", "recipe", "seed", "transport")) if first else None
    except ValueError as error:
        sys.exit(f"speedup: {error}")
    transport = "horovod" if ranks else "in-process"
    keys = [
        {"workers": workers, "recipe": recipe, "seed": seed, "transport": transport}
        for workers, recipe, seed in itertools.product(sizes, args.recipes, args.seeds)
        if workers > 1 or recipe == "none"
    ]
    source = provenance(args)
    with progress_bar(unit="sample", disable=not first) as bar:  # nobody knows how many it will be
        for key in keys:
            there = cells is not None and cells.has(**key)
            if hvd.broadcast_object(there, name="benchmark.there") if ranks else there:
                continue
            bar.set_description("{recipe}, {workers} workers, seed {seed}".format(**key))
            result = train(key["recipe"], key["workers"], key["seed"], ranks, bar.update)
            if cells is not None:
                origin = {name: source[name] for name in ("date", "commit", "command", "machine", "versions")}
                cells.add(**key, **origin, **{**result, "looks": thinned(result["looks"])})
    if cells is not None:
        print(summary([cell for cell in cells.read() if cell["transport"] == transport]))


if __name__ == "__main__":
    main()
