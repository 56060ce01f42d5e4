"""Writes the page of results, with its figures, from the JSON of the other benchmarks.

    python benchmarks/report.py benchmarks/results docs/results.md --readme README.md

It measures nothing. The same JSON gives the same text: tests compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import UNSHAPED, bits_per_second
from figures import (
    draw_bandwidth,
    draw_fit,
    draw_gains,
    draw_learning,
    draw_overview,
    draw_quality,
    draw_scaling,
    draw_speedup,
    label,
)  # fmt: skip
from learning import (
    ADVISED,
    HOSTS,
    RATES,
    TITLES,
    advice,
    both_ways,
    code,
    efficiencies,
    groups,
    header,
    metric,
    quality,
    rows,
    speed_up,
)

MODELS = {
    "mlp": "MLP, 28.3 million parameters",
    "preact_resnet18": "PreActResNet18, 11.2 million parameters",
    "gpt": "GPT, 3.3 million parameters",
}
Json = Mapping[str, Any]
END = "<!-- end -->"
LARGEST_MEASURED = 28.3e6
"""Parameters. The cost model is not asked for a break-even beyond."""
DRAWN = (25e6, 10)
"""Parameters and Gbit/s of the figure of scaling."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(method: str) -> str:
    """A method in a table: code where one would type it."""
    text = label(method)
    return f"`{text}`" if text.startswith("DoubleSqueeze") else text


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def where(content: Json) -> str:
    """Machine, versions and date in one line."""
    machine, versions = content["machine"], content["versions"]
    commands = sorted({cell["command"] for cell in content.get("cells", [content])})
    return (
        f"{machine['processor']}, {machine['cores']} cores; torch {versions['torch']}, Horovod {versions['horovod']}; "
        f"{content['date'][:10]}; `{'`, `'.join(commands)}`"
    )


def _rate_order(rate: str) -> float:
    return -(bits_per_second(rate) or float("inf"))


def _by_cell(content: Json) -> dict[tuple[str, int, str], dict[str, Json]]:
    return {(c["model"], c["hosts"], c["rate"]): {r["method"]: r for r in c["results"]} for c in content["cells"]}


def step_tables(content: Json) -> Iterator[str]:
    """Seconds of a step, for each model and number of hosts: a row for each method, a column for each rate."""
    cells = _by_cell(content)
    for model in dict.fromkeys(model for model, _, _ in cells):
        yield f"### {MODELS[model]}\n\n![Seconds of an iteration over 1/bandwidth](FIGURES/bandwidth-{model}.svg)"
        for hosts in sorted({n for m, n, _ in cells if m == model}):
            rates = sorted((r for m, n, r in cells if (m, n) == (model, hosts)), key=_rate_order)
            methods = dict.fromkeys(method for rate in rates for method in cells[model, hosts, rate])
            rows = []
            for method in methods:
                columns = (cells[model, hosts, rate].get(method) for rate in rates)
                rows.append([shown(method), *("" if r is None else number(r["seconds_per_step"]) for r in columns)])
            yield f"Seconds of an iteration, {hosts} hosts, batches of {content['batch_size'][model]}:\n\n" + table(
                ["method", *rates], rows
            )


# What the project asks of itself: rate, method, quantity, and the bound on it.
TARGETS = (
    ("1gbit", "onebit", "exchange", "none", 15.0), ("1gbit", "onebit", "step", "ddp-powersgd-4", 1.0),
    ("1gbit", "topk-1%", "step", "onebit", 1.0), ("1gbit", "topk-0.1%", "step", "ddp-powersgd-1", 1.0),
    ("100mbit", "onebit", "exchange", "none", 26.0), ("100mbit", "topk-1%", "exchange", "none", 40.0),
    ("100mbit", "topk-0.1%", "exchange", "none", 120.0), ("100mbit", "topk-0.1%", "step", "ddp-powersgd-1", 1.1),
    (UNSHAPED, "onebit", "step", "none", 1.0), (UNSHAPED, "topk-1%", "step", "none", 1.0),
    (UNSHAPED, "topk-0.1%", "step", "none", 1.0),
)  # fmt: skip


def target_table(content: Json) -> str:
    """What was asked for the MLP on 4 hosts, and what was measured."""
    cells, rows = _by_cell(content), []
    for rate, method, quantity, other, bound in TARGETS:
        cell = cells.get(("mlp", 4, rate), {})
        if method not in cell or other not in cell:
            continue
        if quantity == "exchange":
            took, others = cell[method]["seconds_above_noop"], cell[other]["seconds_above_noop"]
            reached = took * bound <= others  # also where it took no time that could be told from noop's noise
            asked = f"exchange >= {bound:g} times shorter than {shown(other)}'s"
            found = f"{others / took:.1f} times" if took > 0 else "no longer than noop"
            by_round = _factors_by_round(cell, method, other)
            found += f" ({', '.join(by_round)} by round)" if len(by_round) > 1 else ""
        else:
            factor = cell[method]["seconds_per_step"] / cell[other]["seconds_per_step"]
            reached, asked, found = factor <= bound, f"iteration <= {bound:g} of {shown(other)}'s", f"{factor:.2f}"
        rows.append([rate, shown(method), asked, found, "yes" if reached else "**no**"])
    return table(["rate", "method", "asked", "measured", "reached"], rows)


def _factors_by_round(cell: Mapping[str, Json], method: str, other: str) -> list[str]:
    rounds = zip(*(cell[name]["seconds_by_round"] for name in ("noop", method, other)), strict=True)
    return [f"{(theirs - noop) / (ours - noop):.1f}" if ours > noop else "-" for noop, ours, theirs in rounds]


def bytes_table(content: Json, rate: str) -> str:
    """Bytes on the wire beside what the exchange says it sends."""
    cells, rows = _by_cell(content), []
    for (model, hosts, at), cell in sorted(cells.items()):
        if at != rate:
            continue
        idle = cell["noop"]["wire_bytes_sent"] / cell["noop"]["wire_seconds"]
        for method in ("none", "onebit", "topk-1%", "topk-0.1%", "onebit-allgather"):
            if method not in cell:
                continue
            sent, wire = cell[method]["bytes_sent"], cell[method]["wire_bytes_sent"]
            coordination = idle * cell[method]["wire_seconds"]
            counts = (f"{count:,.0f}" for count in (sent, wire, coordination))
            rows.append([model, str(hosts), shown(method), *counts, f"{(wire - coordination) / sent - 1:+.1%}"])
    header = [
        "model",
        "hosts",
        "method",
        "counted by the method",
        "on the wire",
        "of it coordination",
        "the rest, over counted",
    ]
    return table(header, rows)


def wire_table(content: Json) -> str:
    """Seconds of the exchange beside what the rate says, and beside those of the network that is not limited."""
    cells, rows = _by_cell(content), []
    for (model, hosts, rate), cell in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1], _rate_order(item[0][2]))):
        bits, fast = bits_per_second(rate), cells.get((model, hosts, UNSHAPED))
        if bits is None or bits > 1e9 or fast is None:
            continue
        for method in ("none", "onebit", "topk-1%", "topk-0.1%"):
            if method in cell and method in fast:
                ideal = 8 * cell[method]["wire_bytes_sent"] / bits
                seconds = (ideal, cell[method]["seconds_above_noop"], fast[method]["seconds_above_noop"])
                rows.append([model, str(hosts), rate, shown(method), *(f"{max(0.0, value):.3f}" for value in seconds)])
    header = ["model", "hosts", "rate", "method", "bytes / rate", "exchange", "exchange, unshaped"]
    return table(header, rows)


def model_section(model: Json) -> Iterator[str]:
    """The cost model: prices, errors, figures, break-even."""
    units = {
        "collectives": "s each", "messages": "s each", "wire": "times bytes / rate", "traffic": "s a byte",
        "reduced": "s an element", "encoded": "s an element", "decoded": "s an element",
    }  # fmt: skip
    rows = [[name, f"{price:.3g}", units[name]] for name, price in model["prices"].items()]
    fitted, tested = (sorted({p["hosts"] for p in model[part]}) for part in ("fit", "test"))
    yield (
        f"`benchmarks/model.py` explains what an exchange does and fits a price for each part on clusters of "
        f"{' and '.join(map(str, fitted))} hosts. It then predicts iterations on {tested[0]} hosts, given what noop takes "
        f"there, with a median error of {model['median_error']:.0%}; {model['within_bound']} of {len(model['test'])} are "
        f"within {model['bound']:.0%}, which was asked of all, and the largest is {model['largest_error']:.0%}."
        + (
            ""
            if model["median_exchange_error"] is None
            else " Of the exchange alone, where it takes at least a quarter of noop's time, the median error is "
            f"{model['median_exchange_error']:.0%}."
        )
    )
    yield table(["part", "price", ""], rows) + "\n\n![Predicted over measured](FIGURES/model-fit.svg)"
    worst = sorted(model["test"], key=lambda t: -abs(t["error"]))[:5]
    yield "The largest errors:\n\n" + table(
        ["model", "method", "rate", "measured (s)", "predicted (s)", "error"],
        [
            [t["model"], shown(t["method"]), t["rate"], number(t["measured"]), number(t["predicted"]), f"{t['error']:+.0%}"]
            for t in worst
        ],
    )
    yield (
        "Drawn to a thousand hosts, one processor each, at most 32 buckets, "
        f"{1e6 * model['settings']['delay']:g} microseconds of delay in the network for each message:\n\n"
        "![Seconds of an exchange over hosts](FIGURES/model-scaling.svg)\n\n"
        "The other sizes and bandwidths are in `benchmarks/results/model.json`."
    )
    yield (
        "**Break-even**: the bandwidth above which 1-bit compression does not pay, by the model. Read it as an upper bound: on "
        "two cores the fit cannot tell some prices from noise"
        + (
            f", and gives {' and '.join(free)} the price 0"
            if (free := [n for n, p in model["prices"].items() if p == 0])
            else ""
        )
        + ". Smaller and larger models than those that were measured are left out. Small ones are bound by latency, as the "
        "digits at the end of this page are."
    )
    yield break_even_table(model)


def break_even_table(model: Json) -> str:
    """Bandwidths above which compression does not pay."""

    def rate(bits: float | None) -> str:
        return "none: it pays at any" if bits is None else f"{bits / 1e9:.2g} Gbit/s"

    rows = [
        [f"{b['elements'] / 1e6:,g} million", str(b["hosts"]), rate(b["bits_per_second"]), rate(b["bits_per_second_wire_only"])]
        for b in model["break_even"]
        if b["elements"] <= LARGEST_MEASURED
    ]
    return table(["parameters", "hosts", "beside Horovod on Gloo", "beside an allreduce that costs nothing but the wire"], rows)


def loopback_table(results: Mapping[str, Json]) -> str:
    """Several ranks on one machine."""
    rows = []
    for name in sorted(results):
        for r in results[name]["results"]:
            times = r["compression_ratio"]
            fewer = "-" if times is None else f"{times:.0f} times fewer"
            step, part = f"{r['seconds_per_step']:.4f}", f"{r['time_ratio']:.0%}"
            rows.append([str(results[name]["ranks"]), shown(r["method"]), step, part, fewer])
    return table(["ranks", "method", "seconds of an iteration", "of uncompressed", "bytes sent"], rows)


def kernel_table(kernels: Json) -> str:
    """Kernels beside the floor of the memory."""
    timed = [r for r in kernels["results"] if r["kind"] == "time"]
    passes = dict.fromkeys(p["name"] for r in timed for p in r["passes"] if p["name"] != "floor")
    rows = []
    for name in passes:
        found = [next((p for p in r["passes"] if p["name"] == name), None) for r in timed]
        rows.append([name, *("" if p is None else f"{p['ratio']:.2f}" for p in found)])
    header = [f"{r['elements'] / 1e6:g}M, {r['threads']} thread{'s' * (r['threads'] > 1)}" for r in timed]
    return table(["pass", *header], rows)


def memory_table(kernels: Json) -> str:
    """Memory that a whole exchange needs."""
    held = [r for r in kernels["results"] if r["kind"] == "memory"]
    rows = [[m["codec"], m["malloc"], f"{m['extra'] / 1e6:.0f}", f"{m['ratio']:.3f}"] for m in held]
    return table(["codec", "malloc", "MB at its peak", "over errors and payloads"], rows)


def training_table(training: Json) -> str:
    """Accuracy of the digits."""
    rows = [
        [
            code(r["method"]),
            f"{r['test_accuracy']:.2%}",
            f"{1e3 * r['seconds_per_step']:.2f}",
            "-" if r["reduction"] is None else f"{r['reduction']:.0f}x",
        ]
        for r in training["results"]
    ]
    return table(["method", "test accuracy", "milliseconds of an iteration", "fewer bytes"], rows)


def learning_parts(results: Mapping[str, Json]) -> Iterator[str]:
    """The section about learning."""
    held = sorted((name for name, content in results.items() if content.get("cells")), key=len)
    names = [name for task in TITLES for name in held if re.fullmatch(rf"convergence-{task}(-\d+)?", name)]
    if not names:
        return
    yield "## Learning"
    yield (
        "The same steps, data and learning rates for all recipes (a recipe is what one would type; *learning rate x* "
        "says what another rate does, to uncompressed training too); "
        "n workers, most of them in one process, with the exchange that they would run under Horovod. *Bits per compressed "
        "element* are those of what is compressed, mean of push and reply; biases and norms travel beside it as they are. "
        "Metrics are means over seeds, with half of the range between them, and compared with uncompressed training with the "
        "same seeds. *Minutes*: until the smoothed training loss is within 2 % "
        "of where uncompressed training ends, by the steps that a cluster of 4 hosts takes."
    )
    yield "![The metric that training ends with over bits](FIGURES/quality.svg)"
    for name in names:
        content = results[name]
        settings, cell = content["settings"], content["cells"][0]
        longer = name.removeprefix(f"convergence-{settings['task']}-").isdecimal()
        yield f"### {TITLES[settings['task']]}" + f", {settings['steps']} steps" * longer
        yield (
            f"{settings['parameters']:,} parameters; {settings['data']}; {settings['optimizer']}; batches of "
            f"{settings['batch_size']}; {settings['steps']} steps. {cell['machine']['processor']}, "
            f"torch {cell['versions']['torch']}; {cell['date'][:10]}; "
            f"`python benchmarks/convergence.py --task {settings['task']} --workers WORKERS --recipes RECIPE --seeds 0 .. "
            + f"--steps {settings['steps']} " * longer
            + "--json FILE` gives a row, and under `horovodrun -np WORKERS` one of DDP"
        )
        yield f"![Training loss over steps, bytes and time](FIGURES/{name}.svg)"
        yield table(header(content), list(rows(content, results.get("steps-gpt-small"))))
        if ranks := both_ways(content):
            yield ranks


def speedup_parts(content: Json) -> Iterator[str]:
    """The section about linear speed-up."""
    settings, cell = content["settings"], content["cells"][0]
    yield "## Linear speed-up"
    yield (
        f"Steps to a training loss of {settings['target']}: {settings['data']}; batches of {settings['batch_size']} for each "
        f"worker, plain SGD, learning rate {settings['learning_rate_of_one']} times the number of workers, "
        "which the paper's theory asks for (`benchmarks/speedup.py` says why). *Efficiency*: the steps of one worker over n "
        f"times those of n workers. Seeds: {', '.join(str(x) for x in sorted({c['seed'] for c in content['cells']}))}. "
        f"{cell['machine']['processor']}; {cell['date'][:10]}"
    )
    yield "![Steps of one worker over steps of n, and the norms of the errors](FIGURES/speedup.svg)"
    for transport, how in (("in-process", "Workers in one process"), ("horovod", "Ranks under `horovodrun`")):
        lines = []
        for e in efficiencies([c for c in content["cells"] if c["transport"] == transport or c["workers"] == 1]):
            numbers = [(e["steps"], ".0f"), (e["efficiency"], ".2f"), (e["relative"], ".2f")]
            texts = ["-" if value is None else f"{value:{how}}" for value, how in numbers]
            lines.append([shown(e["recipe"]) if e["recipe"] != "none" else "uncompressed", str(e["workers"]), *texts])
        if any(c["transport"] == transport for c in content["cells"]):
            yield how + ":"
            yield table(["recipe", "workers", "steps", "efficiency", "of uncompressed SGD's"], lines)


def readme_advice(results: Mapping[str, Json]) -> str:
    """Which compression for which network and model, for the README."""
    digits = results["convergence-digits"]
    accuracies = [cell["metric"] for cell in groups(digits)[HOSTS, "none"]]
    return "\n\n".join(
        [
            table(*advice(results)),
            "*bits*: for an element, each way; uncompressed training sends 32. *speed at*: times Horovod's uncompressed "
            f"steps, for a transformer of 0.67 million parameters on {HOSTS} hosts that share 2 cores "
            "(`benchmarks/results/steps-gpt-small.json`); the figure has a larger model. The other columns say how training "
            f"ends beside uncompressed training with the same seeds, {HOSTS} workers: for the CNN test accuracy (more is "
            f"better; uncompressed runs alone differ by {100 * (max(accuracies) - min(accuracies)):.1f} points from seed to "
            "seed), for the transformer validation bits per byte (fewer are better) "
            "(`benchmarks/results/convergence-*.json`).",
        ]
    )


def conclusions(results: Mapping[str, Json]) -> Iterator[str]:
    """What a reader should know who reads no further, each with its numbers."""
    if "bandwidth" in results:
        cells = _by_cell(results["bandwidth"])

        def faster(method: str, rate: str, model: str = "mlp") -> str:
            cell = cells[model, HOSTS, rate]
            return f"{cell['none']['seconds_per_step'] / cell[method]['seconds_per_step']:.1f}"

        if all(("mlp", HOSTS, rate) in cells for rate in (UNSHAPED, "1gbit", "100mbit")):
            for method in ("onebit", "topk-1%", "ddp-powersgd-1", "fp16"):
                if method in cells["mlp", HOSTS, "100mbit"]:
                    yield (
                        f"{shown(method)}: {faster(method, '100mbit')} times as fast as Horovod at 100 Mbit/s, "
                        f"{faster(method, '1gbit')} times at 1 Gbit/s, {faster(method, UNSHAPED)} times where nothing limits "
                        f"the network; 28.3 million parameters, {HOSTS} hosts on 2 cores."
                    )
            yield (
                f"Sending nothing at all would be {faster('noop', '100mbit')}, {faster('noop', '1gbit')} and "
                f"{faster('noop', UNSHAPED)} times as fast: no compression can gain more."
            )
    steps = results.get("steps-gpt-small")
    gains = {rate: speed_up(steps, "gpt-sgd", "quantize-4", rate) for rate in RATES}
    if all(gains.values()):
        said = " and ".join(f"{gain:.1f} times at {rate}" for rate, gain in gains.items())
        yield f"`DoubleSqueeze`, the default: {said} as fast as Horovod, for a transformer of 0.67 million parameters."
    for recipe in ("quantize-4", "onebit", "ddp-powersgd-4"):
        ends = []
        for task, name in ADVISED.items():
            content = results.get(f"convergence-{task}")
            found = groups(content) if content else {}
            if content and (HOSTS, recipe) in found and (HOSTS, "none") in found:
                ends.append(f"{_beside(content, recipe)} ({name})")
        if ends:
            yield f"{code(recipe)} ends beside uncompressed training at {', '.join(ends)}."
    if "speedup" in results:
        held = efficiencies([c for c in results["speedup"]["cells"] if c["transport"] == "in-process"])
        most = max((e for e in held if e["recipe"] == "onebit" and e["efficiency"]), key=lambda e: e["workers"], default=None)
        if most:
            yield (
                f"Linear speed-up: {most['workers']} workers with {code('onebit')} need "
                f"{1 / most['efficiency'] / most['workers']:.2%} of the steps that one worker needs to a loss."
            )
    larger = any(
        r["method"] == "quantize-4" for cell in results.get("bandwidth", {"cells": []})["cells"] for r in cell["results"]
    )
    yield "Not measured: any GPU; a network that is not simulated on one machine; " + (
        "how models of more than 0.67 million parameters learn."
        if larger
        else "the time of the default and of signs, and learning at all, for models of more than 0.67 million parameters."
    )


def _beside(content: Json, recipe: str) -> str:
    found = groups(content)
    return metric(content, found[HOSTS, recipe], found[HOSTS, "none"])[1]


def page(results: Mapping[str, Json]) -> str:
    """The page; figures are where FIGURES says."""
    parts = [
        "# Results",
        "Generated by `make results` from the JSON in `benchmarks/results`; do not edit. Seconds are those of the machine "
        "named with each section: compare methods with each other, not with another machine.",
    ]
    parts += ["## Conclusions", "\n".join(f"* {line}" for line in conclusions(results))]
    if "bandwidth" in results:
        content = results["bandwidth"]
        parts += (
            ["![Times faster than Horovod over Mbit/s](FIGURES/gains.svg)"]
            if {"mlp"} & {c["model"] for c in content["cells"]}
            else []
        )
        parts += [
            "## Time of an iteration over limited bandwidth",
            f"{where(content)}; TCP: {content['network']['tcp_congestion_control']}.",
            "Hosts are network namespaces on one machine, each behind a token bucket in both directions "
            "(`benchmarks/cluster.py`). **They share its cores**: arithmetic, kernels and Horovod's own threads of n hosts "
            "take turns on them, so what processors do is n / cores times as expensive as on real hosts, and what the wire "
            "does is not. Synthetic data; medians over the steps of all hosts, then over rounds. "
            "*unshaped* is as fast as the kernel copies.",
        ]
        targets = target_table(content)
        if targets.count("\n") > 1:
            parts += ["### What was asked, for the MLP on 4 hosts", "*Exchange*: time above noop, in the same run.", targets]
        parts += step_tables(content)
        rates = {cell["rate"] for cell in content["cells"]}
        if "1gbit" in rates:
            parts += [
                "### Bytes on the wire",
                "Per host and iteration at 1gbit, mean of all hosts, as the interfaces count them: with headers, but once for "
                "each segment of up to 64 KiB. Horovod's own coordination goes on every millisecond whether there is anything "
                "to do or not; its part is what noop sends in the same time. Two passes send 2 (n-1)/n payloads, one pass n-1. "
                "What the smallest payloads have over that are the messages with which Gloo announces messages: some for each "
                "collective, whatever its size.",
                bytes_table(content, "1gbit"),
            ]
        if UNSHAPED in rates:
            parts += [
                "### Time on the wire",
                "Seconds: bytes on the wire divided by the rate; the exchange, which is the time above noop (0 where it could "
                "not be told from noop's noise); and the exchange of the unshaped network, which is the processors' part.",
                wire_table(content),
            ]
    if "model" in results:
        parts += ["## Beyond one machine", *model_section(results["model"])]
    parts += learning_parts(results)
    if "speedup" in results:
        parts += speedup_parts(results["speedup"])
    loopback = {name: content for name, content in results.items() if name.startswith("loopback")}
    if loopback:
        some = next(iter(loopback.values()))
        parts += ["## One machine, loopback", f"28.3 million parameters. {where(some)}", loopback_table(loopback)]
    if "kernels-cpu" in results:
        kernels = results["kernels-cpu"]
        parts += [
            "## Kernels",
            f"Time over an in-place add of the same arrays, scaled by bytes: 1 is what the memory allows. {where(kernels)}",
            kernel_table(kernels),
            "Memory of a whole exchange of several workers in one process, beyond the gradients:",
            memory_table(kernels),
        ]
    if "train-2" in results:
        parts += ["## Digits", where(results["train-2"]), training_table(results["train-2"])]
    return "\n\n".join(parts) + "\n"


def draw_across(results: Mapping[str, Json], folder: Path) -> None:
    """The figures that compare: speed, quality, and both."""
    timed = [
        (results[name]["cells"], model, title)
        for name, model, title in (("bandwidth", *item) for item in MODELS.items())
        if name in results and any((c["model"], c["hosts"]) == (model, HOSTS) for c in results[name]["cells"])
    ]
    if "steps-gpt-small" in results and results["steps-gpt-small"]["cells"]:
        timed.append((results["steps-gpt-small"]["cells"], "gpt-small", "GPT, 0.67 million parameters"))
    if timed:
        draw_gains(timed, folder / "gains.svg")
    learned = [
        (results[f"convergence-{task}"], f"{TITLES[task]}\n{HOSTS} workers")
        for task in ADVISED
        if f"convergence-{task}" in results and quality(results[f"convergence-{task}"])
    ]
    if learned:
        draw_quality(learned, folder / "quality.svg")
    if timed and timed[0][1] == "mlp" and any(content["settings"]["task"] == "gpt-adamw" for content, _ in learned):
        draw_overview(results, folder / "overview.svg")


def main() -> None:
    """Writes page, figures, and the parts of the README between the marks."""
    parser = argparse.ArgumentParser(description="Write the page of results.")
    parser.add_argument("results", type=Path, help="folder with the JSON; figures go there too")
    parser.add_argument("page", type=Path, help="Markdown to write")
    parser.add_argument("--readme", type=Path, help="file that has a part to keep up to date")
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    if not results:
        parser.error(f"argument results: there is no JSON in {args.results}")
    if "bandwidth" in results:
        for model in {cell["model"] for cell in results["bandwidth"]["cells"]}:
            draw_bandwidth(results["bandwidth"]["cells"], model, args.results / f"bandwidth-{model}.svg")
    for name, content in results.items():
        if name.startswith("convergence-") and content["cells"]:
            workers = max((cell["workers"] for cell in content["cells"]), key=lambda n: (n == HOSTS, n))
            draw_learning(content, results.get("steps-gpt-small"), workers, args.results / f"{name}.svg")
    if "speedup" in results:
        simulated = [cell for cell in results["speedup"]["cells"] if cell["transport"] == "in-process"]
        draw_speedup(simulated, efficiencies(simulated), args.results / "speedup.svg")
    if "model" in results:
        draw_fit(results["model"], args.results / "model-fit.svg")
        draw_scaling(results["model"], *DRAWN, args.results / "model-scaling.svg")
    draw_across(results, args.results)
    figures = os.path.relpath(args.results, args.page.parent)
    args.page.write_text(page(results).replace("FIGURES/", f"{figures}/"))
    if args.readme:
        text = args.readme.read_text()
        for name, part in (("advice", readme_advice),):
            begin = f"<!-- {name} from benchmarks/results: make results -->"
            if text.count(begin) != 1 or END not in text.split(begin)[1]:
                parser.error(f"argument --readme: {args.readme} must hold {begin} once, and {END} after it")
            before, after = text.split(begin)
            text = f"{before}{begin}\n\n{part(results)}\n\n{END}{after.split(END, 1)[1]}"
        args.readme.write_text(text)


if __name__ == "__main__":
    main()
