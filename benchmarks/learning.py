"""What the page of results says of learning: from the JSON of `convergence.py`, and steps timed by `bandwidth.py`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
SMOOTHING = 25
"""Steps over which training losses are averaged."""
HOSTS, RATES = 4, ("1gbit", "100mbit")
"""Where time is looked at."""
TIMED_MODEL = {"gpt-sgd": "gpt-small", "gpt-adamw": "gpt-small"}
"""The model of `bandwidth.py` that a task trains."""
TITLES = {
    "digits": "Handwritten digits, a small CNN with BatchNorm",
    "gpt-sgd": "A small transformer on the Python standard library, SGD with momentum",
    "gpt-adamw": "A small transformer on the Python standard library, AdamW",
    "cifar10": "CIFAR-10, PreActResNet18",
}


def timed_method(recipe: str) -> str:
    """What `methods.py` calls a recipe: momentum, decay and compensation change nothing that takes time."""
    return re.sub(r"-(momentum|(decay|lr)-[\d.]+|uncompensated|warm)(?=-|$)", "", recipe)


def groups(content: Json) -> dict[tuple[int, str], list[Json]]:
    """Cells by workers and recipe, one for each seed: of real ranks where there are both."""
    found: dict[tuple[int, str], dict[int, Json]] = {}
    for cell in sorted(content["cells"], key=lambda cell: cell["transport"], reverse=True):
        found.setdefault((cell["workers"], cell["recipe"]), {})[cell["seed"]] = cell
    return {key: [seeds[seed] for seed in sorted(seeds)] for key, seeds in found.items()}


def is_accuracy(content: Json) -> bool:
    """Whether more of the metric is better."""
    return "accuracy" in content["settings"]["metric"]


def curve(cells: Sequence[Json]) -> list[float]:
    """Training loss of the mean of all seeds, smoothed; None in the data, of a run that diverged, is left out."""
    steps = min(len(cell["losses"]) for cell in cells)
    mean = [
        statistics.fmean([x for x in (cell["losses"][step] for cell in cells) if x is not None] or [float("nan")])
        for step in range(steps)
    ]
    window = min(SMOOTHING, steps)
    return [statistics.fmean(mean[i - window : i]) for i in range(window, steps + 1)]


def step_seconds(steps: Json | None, task: str, recipe: str, rate: str) -> float | None:
    """Of a step of this recipe on a cluster, where it was timed."""
    for cell in (steps or {"cells": []})["cells"]:
        if (cell["model"], cell["hosts"], cell["rate"]) == (TIMED_MODEL.get(task), HOSTS, rate):
            for result in cell["results"]:
                if result["method"] == timed_method(recipe):
                    return float(result["seconds_per_step"])
    return None


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """Steps until the smoothed loss is at the target; None if it never is."""
    first = next((i for i, loss in enumerate(losses) if loss <= target), None)
    return None if first is None else first + SMOOTHING


def rows(content: Json, steps: Json | None) -> Iterator[list[str]]:
    """The table of a task."""
    task, found = content["settings"]["task"], groups(content)
    for (workers, recipe), cells in sorted(found.items(), key=lambda item: (item[0][0], _order(item))):
        metrics = [cell["metric"] for cell in cells]
        reference = found.get((workers, "none"))
        same = [c["metric"] for c in reference or [] if c["seed"] in {cell["seed"] for cell in cells}]
        base = statistics.fmean(same) if len(same) == len(cells) else None
        if None in metrics:
            yield [str(workers), recipe, _bits(cells), str(len(cells)), "diverged", "", *("" for _ in RATES)]
            continue
        mean = statistics.fmean(metrics)
        if is_accuracy(content):
            shown = f"{mean:.2%} (±{(max(metrics) - min(metrics)) / 2:.2%})"
            beside = "" if base is None else f"{100 * (mean - base):+.2f} points"
        else:
            shown = f"{mean:.4f} (±{(max(metrics) - min(metrics)) / 2:.4f})"
            beside = "" if base is None else f"{mean / base - 1:+.1%}"
        yield [
            str(workers),
            recipe,
            _bits(cells),
            str(len(cells)),
            shown,
            beside,
            *_times(task, recipe, cells, reference, steps),
        ]


def _order(item: tuple[tuple[int, str], Sequence[Json]]) -> float:
    return -float(item[1][0]["bits_per_compressed_element"] or 0)


def _bits(cells: Sequence[Json]) -> str:
    bits = cells[0]["bits_per_compressed_element"]
    return "" if bits is None else f"{bits:.3g}"


def _times(task: str, recipe: str, cells: Sequence[Json], reference: Sequence[Json] | None, steps: Json | None) -> list[str]:
    """Minutes to the training loss that uncompressed training ends with, give or take two per cent."""
    if not reference or steps is None or task not in TIMED_MODEL or cells[0]["workers"] != HOSTS:
        return ["" for _ in RATES]
    needed = steps_to(curve(cells), 1.02 * curve(reference)[-1])
    result = []
    for rate in RATES:
        seconds = step_seconds(steps, task, recipe, rate)
        result.append("" if seconds is None else "never" if needed is None else f"{needed * seconds / 60:.1f}")
    return result


def header(content: Json) -> list[str]:
    """Of the table of a task."""
    return [
        "workers",
        "recipe",
        "bits per compressed element",
        "seeds",
        content["settings"]["metric"],
        "beside none",
        *(f"minutes at {rate}" for rate in RATES),
    ]
