"""What page and README say of learning: JSON of `convergence.py` and `speedup.py`, and steps timed by `bandwidth.py`."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
SMOOTHING = 25
"""Steps over which training losses are averaged."""
MOST_LOSSES = 200
"""Of one run, in a file: means over several steps, where nothing reads every step."""
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
    """What `methods.py` calls a recipe: momentum and compensation change nothing that takes time."""
    for how in ("late", "tentative"):
        if recipe.endswith(f"-{how}"):
            return f"{how}-{timed_method(recipe.removesuffix(f'-{how}'))}"
    return re.sub(r"-(momentum(-0[\d.]+)?|lr-[\d.]+|lr-aware|uncompensated|warm)(?=-|$)", "", recipe)


def constructor(recipe: str) -> str:
    """What a user writes for a recipe; the name itself where there is no such way."""
    plain = {"none": "uncompressed", "none, fp16": "hvd.Compression.fp16", "fp16": "hvd.Compression.fp16",
             "paper": "DoubleSqueeze.paper()", "paper-topk": "DoubleSqueeze.paper(TopK(k=300_000))"}  # fmt: skip
    if recipe in plain:
        return plain[recipe]
    if recipe.startswith("ddp-powersgd-"):
        return f"DDP PowerSGD, rank {recipe.removeprefix('ddp-powersgd-')}"
    name, *options = re.split(r"-(?=momentum|lr-|uncompensated|warm|late|tentative|reply)", recipe)
    kind, _, number = name.partition("-")
    if kind in ("none", "onebit", "ternary") and number:
        return recipe
    share = float(number.rstrip("%")) / 100 if number.endswith("%") else 0.0
    kinds = {
        "none": [], "onebit": ["OneBit()"], "topk": [f"TopK({share or 0.01:.4g})"],
        "sign": [f'TopK({share:.4g}, values="sign")'],
        "quantize": [] if number == "4" else [f"Quantize(bits={number})"], "ternary": ["Ternary()"],
        "randomk": [f"RandomK({share:.4g})"], "cast": [f'Cast("{number}")'],
        "mem": ["TopK(0.01)", "server_compressor=NoCompression()"],
        "qsgd": ['Quantize(rounding="stochastic", scale="l2")', "worker_error=False", "server_error=False"],
    }  # fmt: skip
    if kind not in kinds:
        return recipe
    arguments = kinds[kind]
    rate = ""
    for option in options:
        what, _, value = option.partition("-")
        if what == "lr" and value != "aware":
            rate = f", learning rate x {value}"
        elif what == "momentum":
            arguments.append(f"momentum={value or 0.9}")
        elif what == "tentative":
            arguments += [f"staleness={value or 1}", "model=model"]
        elif what == "reply":
            arguments.append(f'server_compressor=TopK({float(value.rstrip("%")) / 100:.4g}, values="sign")')
        else:
            arguments += {
                "lr": ["lr_aware=True"], "warm": ["warmup_steps=60"], "late": ["staleness=1"],
                "uncompensated": ["worker_error=False", "server_error=False"],
            }[what]  # fmt: skip
    if kind == "none" and not arguments:
        return "uncompressed" + rate
    if kind == "none":
        arguments.insert(0, "NoCompression()")
    return (f"DoubleSqueeze({', '.join(arguments)})" if arguments else "DoubleSqueeze") + rate


def code(recipe: str) -> str:
    """The same for Markdown."""
    text, comma, rate = constructor(recipe).partition(", learning rate")
    return (f"`{text}`" if text.startswith(("DoubleSqueeze", "hvd")) else text) + comma + rate


def groups(content: Json) -> dict[tuple[int, str], list[Json]]:
    """Cells by workers and recipe, one for each seed: of real ranks where there are both."""
    found: dict[tuple[int, str], dict[int, Json]] = {}
    for cell in sorted(content["cells"], key=lambda cell: cell["transport"], reverse=True):
        found.setdefault((cell["workers"], cell["recipe"]), {})[cell["seed"]] = cell
    return {key: [seeds[seed] for seed in sorted(seeds)] for key, seeds in found.items()}


def is_accuracy(content: Json) -> bool:
    """Whether more of the metric is better."""
    return "accuracy" in content["settings"]["metric"]


def thinned(losses: Sequence[float | None], task: str, workers: int) -> dict[str, Any]:
    """What a file keeps of the losses of each step: ``losses``, and ``steps_per_loss`` where each is the mean of several.

    The page says after how many steps a loss is reached where those steps are timed, and every step is kept there. Elsewhere
    at most `MOST_LOSSES` means are kept, which are enough for a figure. A mean is None if one of its losses is.
    """
    spans = itertools.chain((1, 5), itertools.count(SMOOTHING, SMOOTHING))  # those below SMOOTHING divide it
    span = next(n for n in spans if len(losses) <= n * MOST_LOSSES)
    if span == 1 or (task in TIMED_MODEL and workers == HOSTS):
        return {"losses": list(losses)}
    blocks = [losses[i : i + span] for i in range(0, len(losses), span)]
    means = [None if None in block else float(f"{statistics.fmean(block):.5g}") for block in blocks]
    return {"steps_per_loss": span, "losses": means}


def curve(cells: Sequence[Json]) -> list[tuple[int, float]]:
    """Steps, and the training loss of the `SMOOTHING` steps before, mean of all seeds.

    None in the data, of a run that diverged, is left out.
    """
    (span,) = {cell.get("steps_per_loss", 1) for cell in cells}
    count = min(len(cell["losses"]) for cell in cells)
    mean = [
        statistics.fmean([x for x in (cell["losses"][i] for cell in cells) if x is not None] or [float("nan")])
        for i in range(count)
    ]
    window = min(max(1, SMOOTHING // span), count)
    return [(i * span, statistics.fmean(mean[i - window : i])) for i in range(window, count + 1)]


def step_seconds(steps: Json | None, task: str, recipe: str, rate: str) -> float | None:
    """Of a step of this recipe on a cluster, where it was timed."""
    for cell in (steps or {"cells": []})["cells"]:
        if (cell["model"], cell["hosts"], cell["rate"]) == (TIMED_MODEL.get(task), HOSTS, rate):
            for result in cell["results"]:
                if result["method"] == timed_method(recipe):
                    return float(result["seconds_per_step"])
    return None


def steps_to(points: Sequence[tuple[int, float]], target: float) -> int | None:
    """Steps until the smoothed loss is at the target; None if it never is."""
    return next((step for step, loss in points if loss <= target), None)


def rows(content: Json, steps: Json | None) -> Iterator[list[str]]:
    """The table of a task."""
    task, found = content["settings"]["task"], groups(content)
    for (workers, recipe), cells in sorted(found.items(), key=lambda item: (item[0][0], _order(item))):
        reference = found.get((workers, "none"))
        shown, beside = metric(content, cells, reference, spread=True)
        times = _times(task, recipe, cells, reference, steps)
        yield [str(workers), code(recipe), _bits(cells), str(len(cells)), shown, beside, *times]
        if recipe == "none" and any(times):
            yield [str(workers), code("fp16"), "16", "", "as none", "", *_times(task, "fp16", cells, reference, steps)]


def metric(content: Json, cells: Sequence[Json], reference: Sequence[Json] | None, spread: bool = False) -> tuple[str, str]:
    """The mean over the seeds, and how it compares with that of uncompressed training with the same seeds."""
    metrics = [cell["metric"] for cell in cells]
    if None in metrics:
        return "diverged", ""
    same = [c["metric"] for c in reference or [] if c["seed"] in {cell["seed"] for cell in cells}]
    base = statistics.fmean(same) if len(same) == len(cells) else None
    mean, half = statistics.fmean(metrics), (max(metrics) - min(metrics)) / 2
    if is_accuracy(content):
        shown, around = f"{mean:.2%}", f" (±{half:.2%})"
        beside = "" if base is None else f"{100 * (mean - base):+.2f} points"
    else:
        shown, around = f"{mean:.4f}", f" (±{half:.4f})"
        beside = "" if base is None else f"{mean / base - 1:+.1%}"
    return shown + around * (spread and len(cells) > 1), beside


def _order(item: tuple[tuple[int, str], Sequence[Json]]) -> float:
    return -float(item[1][0]["bits_per_compressed_element"] or 0)


def _bits(cells: Sequence[Json]) -> str:
    bits = cells[0]["bits_per_compressed_element"]
    return "" if bits is None else f"{bits:.3g}"


def _times(task: str, recipe: str, cells: Sequence[Json], reference: Sequence[Json] | None, steps: Json | None) -> list[str]:
    """Minutes to the training loss that uncompressed training ends with, give or take two per cent."""
    if not reference or steps is None or task not in TIMED_MODEL or cells[0]["workers"] != HOSTS:
        return ["" for _ in RATES]
    needed = steps_to(curve(cells), 1.02 * curve(reference)[-1][1])
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
        "beside uncompressed",
        *(f"minutes at {rate}" for rate in RATES),
    ]


def both_ways(content: Json) -> str:
    """How far apart the metrics of real ranks and of workers in one process are, for recipes and seeds that ran both ways."""
    found: dict[tuple[int, str, int], dict[str, float]] = {}
    for cell in content["cells"]:
        if cell["metric"] is not None:
            found.setdefault((cell["workers"], cell["recipe"], cell["seed"]), {})[cell["transport"]] = cell["metric"]
    pairs = {key: own for key, own in found.items() if len(own) == 2}
    alone = sorted({recipe for (_, recipe, _), own in found.items() if "horovod" in own and (len(own) == 1)})
    if not pairs:
        return ""
    differences = {key: abs(own["horovod"] - own["in-process"]) for key, own in pairs.items()}
    worst = max(differences, key=lambda key: differences[key])
    how = f"{100 * differences[worst]:.2f} points" if is_accuracy(content) else f"{differences[worst]:.4f}"
    recipes = sorted({recipe for _, recipe, _ in pairs})
    text = (
        f"On ranks of their own under `horovodrun` and in one process: {', '.join(map(code, recipes))}. The two differ by "
        f"{how} at most ({code(worst[1])}), for sums are taken in another order, which training amplifies."
    )
    return text + (f" On ranks only: {', '.join(map(code, alone))}." if alone else "")


# ---- linear speed-up


def efficiencies(cells: Sequence[Json]) -> list[dict[str, Any]]:
    """Of each recipe and number of workers: ``steps``, mean over the seeds; ``efficiency``: steps of one worker over n times
    those; ``relative``: efficiency over that of uncompressed SGD with as many workers; all with the same seeds.

    One worker compresses nothing, so that its steps are those of uncompressed SGD for every recipe. None is what cannot be
    said: a run has not reached the target, or is not there.
    """
    runs: dict[tuple[str, int], dict[int, int | None]] = {}
    for cell in cells:
        runs.setdefault((cell["recipe"], cell["workers"]), {})[cell["seed"]] = cell["steps"]
    found = []
    for (recipe, workers), own in sorted(runs.items()):
        compared = (recipe, workers), ("none", 1), ("none", workers)
        mean, one, uncompressed = (_mean_steps(runs.get(key, {}), own) for key in compared)
        found.append(
            {
                "recipe": recipe,
                "workers": workers,
                "steps": mean,
                "efficiency": one / (workers * mean) if one and mean else None,
                "relative": uncompressed / mean if uncompressed and mean else None,
            }
        )
    return found


def _mean_steps(runs: Mapping[int, int | None], seeds: Iterable[int]) -> float | None:
    """Over some seeds; None where one is not there, or has not reached the target."""
    steps = [runs.get(seed) for seed in seeds]
    return None if None in steps else statistics.fmean(steps)


# ---- advice


ADVICE: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("any network, any model: the default", "`DoubleSqueeze`", dict.fromkeys(TITLES, "quantize-4")),
    (
        "slow network, SGD: the optimizer's own momentum 0, and for transformers 5/3 of the learning rate",
        '`DoubleSqueeze(TopK(0.045, values="sign"), momentum=0.9)`',
        {"digits": "sign-4.5%-momentum", "gpt-sgd": "sign-4.5%-momentum-lr-1.67"},
    ),
    (
        "slow network, Adam: its beta1 0",
        '`DoubleSqueeze(TopK(0.045, values="sign"), momentum=0.6)`',
        {"gpt-adamw": "sign-4.5%-momentum-0.6"},
    ),
    (
        "Adam, its beta1 0, where 1 bit is few enough",
        '`DoubleSqueeze(TopK(0.18, values="sign"), momentum=0.9)`',
        {"gpt-adamw": "sign-18%-momentum"},
    ),
    ("convolutional and dense networks only", "`DoubleSqueeze(OneBit())`", dict.fromkeys(TITLES, "onebit")),
    ("for comparison", "DDP PowerSGD, rank 1", dict.fromkeys(TITLES, "ddp-powersgd-1")),
    ("for comparison", "DDP PowerSGD, rank 4", dict.fromkeys(TITLES, "ddp-powersgd-4")),
)
"""For what, what to write, and the recipe that was run of each task."""
ADVISED = {"digits": "CNN", "gpt-sgd": "transformer, SGD", "gpt-adamw": "transformer, AdamW"}
"""Tasks of the advice, and what they stand for. All with `HOSTS` workers."""


def speed_up(steps: Json | None, task: str, recipe: str, rate: str) -> float | None:
    """How many times faster a step is than Horovod's without compression, where both were timed."""
    own, uncompressed = (step_seconds(steps, task, name, rate) for name in (recipe, "none"))
    return uncompressed / own if own and uncompressed else None


def advice(results: Mapping[str, Json]) -> tuple[list[str], list[list[str]]]:
    """Which compression for which network and model: the header and rows of a table."""
    steps, lines = results.get("steps-gpt-small"), []
    for purpose, what, recipes in ADVICE:
        bits, columns, faster = "", [], dict.fromkeys(RATES, "")
        for task in ADVISED:
            content, recipe = results.get(f"convergence-{task}"), recipes.get(task, "")
            found = groups(content) if content else {}
            cells = found.get((HOSTS, recipe))
            if content is None or not cells:
                columns.append("")
                continue
            bits = _bits(cells)
            columns.append(metric(content, cells, found.get((HOSTS, "none")))[1])
            for rate in RATES:
                times = speed_up(steps, task, recipe, rate)
                faster[rate] = faster[rate] if times is None else f"{times:.1f} x"
        if any(columns):
            lines.append([purpose, what, bits, *(faster[rate] for rate in RATES), *columns])
    return ["for", "paste", "bits", *(f"speed at {rate}" for rate in RATES), *ADVISED.values()], lines


def quality(content: Json, workers: int = HOSTS) -> dict[str, tuple[float, float]]:
    """Bits for an element and the final metric, mean over the seeds, of each recipe on time and at its own learning rate."""
    found = {}
    for (n, recipe), cells in groups(content).items():
        metrics = [cell["metric"] for cell in cells]
        if n == workers and None not in metrics and not re.fullmatch("none-lr.*|.*-lr-aware|.*-(late|tentative).*", recipe):
            found[recipe] = float(cells[0]["bits_per_compressed_element"] or 32), statistics.fmean(metrics)
    return found
