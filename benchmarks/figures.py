"""The figures of docs/results.md.

The same results give the same bytes, and a figure stays small, so that the history of the repository stays small too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cluster import bits_per_second
from learning import ADVICE, HOSTS, RATES, TIMED_MODEL, constructor, curve, groups, quality, step_seconds, timed_method
from matplotlib.ticker import LogLocator, StrMethodFormatter

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "ds_horovod",  # ids that do not change from run to run
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],  # each text names all fonts of this list
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
)
MOST_POINTS = 32
"""Of one curve of training loss: one for each six points of a panel's width."""

LABELS = {
    "none": "Horovod", "fp16": "Horovod, hvd.Compression.fp16", "onebit": "DoubleSqueeze(OneBit())",
    "onebit-server": "DoubleSqueeze(OneBit(), server=0)", "onebit-allgather": "1-bit, one pass", "ddp": "DDP",
    "ddp-fp16": "DDP fp16",
    "noop": "noop (nothing sent)",
}  # fmt: skip
_STYLES = {
    "none": ("tab:gray", "-"), "fp16": ("tab:gray", "--"), "quantize-4": ("tab:red", "-"), "sign-4.5%": ("tab:green", "-"),
    "sign-18%": ("tab:green", "--"), "onebit": ("tab:blue", "-"), "topk-1%": ("tab:purple", "-"),
    "topk-0.1%": ("tab:purple", "--"),
    "ddp": ("tab:brown", "-"), "ddp-fp16": ("tab:brown", "--"),
    "ddp-powersgd-1": ("tab:orange", "-"), "ddp-powersgd-4": ("tab:orange", "--"), "noop": ("black", ":"),
}  # fmt: skip
"""One color for a method, in all figures."""
_LEARNING = ("none", "quantize-4", "sign-", "onebit", "ddp-powersgd-4")
"""What figures of learning show of all recipes: one line for each beginning."""
_COMPARED = (
    "fp16", "quantize-4", "sign-4.5%", "onebit", "topk-1%", "topk-0.1%", "ddp-powersgd-1", "ddp-powersgd-4", "noop",
)  # fmt: skip
_SVG = "http://www.w3.org/2000/svg"
_TOPOLOGY_STYLES = {
    "ring": ("tab:gray", "-"),
    "one pass": ("tab:orange", "-"),
    "two passes": ("tab:blue", "-"),
    "one server": ("tab:blue", ":"),
}


def label(method: str) -> str:
    """What a reader is told that a method is."""
    return LABELS.get(method) or constructor(method)


def style(recipe: str) -> tuple[str, str]:
    """Color and line of a method or recipe."""
    return _STYLES.get(timed_method(recipe), ("tab:pink", "-"))


def _save(figure: Any, path: Path) -> None:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    path.write_text(compact(written.getvalue()))


def compact(svg: str) -> str:
    """The same picture in half of the bytes.

    Matplotlib writes six digits after the decimal point, a line for each vertex, and a numbered group around each tick, so
    that one more tick changes all lines after it. Here a tenth of a point is exact enough, a path is one line, and groups
    that do nothing are gone.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, re.sub(r"-?\d+\.\d{3,}", _short, _on_one_line(value) if name == "d" else value))
    _dissolve(root)
    ElementTree.indent(root, space="")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _on_one_line(path: str) -> str:
    """A path without the line breaks, and without the letter of straight lines where no curve can be meant."""
    text = " ".join(path.split())
    return text.replace(" L ", " ") if set(re.findall("[A-Za-z]", text)) <= set("MLz") else text


def _short(number: re.Match[str]) -> str:
    value = float(number[0])
    return f"{value:.{1 if abs(value) >= 10 else 2}f}".rstrip("0").rstrip(".")  # the small ones are the shapes of markers


def _dissolve(parent: ElementTree.Element) -> None:
    """Puts the contents of groups that only carry an id into their place."""
    children = []
    for child in parent:
        _dissolve(child)
        only_a_name = child.tag == f"{{{_SVG}}}g" and set(child.attrib) <= {"id"}
        children += list(child) if only_a_name else [child]
    parent[:] = children


def draw_bandwidth(cells: Sequence[Mapping[str, Any]], model: str, path: Path) -> None:
    """Seconds of a step over 1 / bandwidth, as in the paper: one panel for each number of hosts."""
    of_model = [cell for cell in cells if cell["model"] == model and bits_per_second(cell["rate"])]
    hosts = sorted({cell["hosts"] for cell in of_model})
    if not hosts:
        return
    figure, panels = plt.subplots(1, len(hosts), figsize=(4 * len(hosts), 4), sharey=True, squeeze=False)
    for n, panel in zip(hosts, panels[0], strict=True):
        here = sorted((cell for cell in of_model if cell["hosts"] == n), key=lambda cell: -(bits_per_second(cell["rate"]) or 0))
        for method, (color, line) in _STYLES.items():
            curve = [
                (1e9 / (bits_per_second(cell["rate"]) or 0), r["seconds_per_step"])
                for cell in here
                for r in cell["results"]
                if r["method"] == method
            ]
            if curve:
                panel.plot(*zip(*curve, strict=True), line, color=color, marker=".", label=label(method))
        panel.set(title=f"{n} hosts", xlabel="1 / bandwidth (seconds for a gigabit)", yscale="log")
    panels[0][0].set_ylabel("seconds for an iteration")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def spread(points: Sequence[tuple[int, float]], logarithmic: bool) -> list[tuple[int, float]]:
    """At most `MOST_POINTS` of a curve, with its ends, evenly spaced on the axis of steps."""
    steps = np.array([step for step, _ in points])
    between = np.geomspace if logarithmic else np.linspace
    wanted = between(steps[0], steps[-1], MOST_POINTS)
    return [points[i] for i in np.unique(np.abs(steps[:, None] - wanted).argmin(axis=0))]


def draw_learning(content: Mapping[str, Any], steps: Mapping[str, Any] | None, workers: int, path: Path) -> None:
    """Training loss over steps, over bytes, and over time at each rate where steps were timed."""
    task, found = content["settings"]["task"], groups(content)
    timed = steps is not None and task in TIMED_MODEL and workers == HOSTS
    count = 2 + (len(RATES) if timed else 0)
    figure, panels = plt.subplots(1, count, figsize=(4 * count, 4), sharey=True)
    for recipe in shown_recipes([recipe for n, recipe in found if n == workers], task):
        points, sent = curve(found[workers, recipe]), found[workers, recipe][0]["bytes_sent"]
        seconds = [1.0, sent / 1e6, *(step_seconds(steps, task, recipe, rate) for rate in RATES)][:count]
        color, line = style(recipe)
        for panel, each in zip(panels, seconds, strict=True):
            if each is not None:
                drawn = spread(points, logarithmic=panel is not panels[0])
                x, y = [step * each for step, _ in drawn], [loss for _, loss in drawn]
                panel.plot(x, y, line, color=color, linewidth=1, label=constructor(recipe))
    for panel, what in zip(panels, ["steps", "megabytes sent", *(f"seconds at {rate}" for rate in RATES)], strict=False):
        panel.set(xlabel=what, yscale="log", xscale="linear" if what == "steps" else "log")
        panel.minorticks_off()
    panels[0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter=StrMethodFormatter("{x:g}"))
    panels[0].set_ylabel("training loss")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def shown_recipes(recipes: Sequence[str], task: str) -> list[str]:
    """Those of a task that a figure of learning shows; of signs, the one that is advised for it."""
    advised = {runs[task] for _, _, runs in ADVICE if task in runs}
    found = []
    for beginning in _LEARNING:
        of_kind = [
            r for r in recipes if r == beginning or (beginning.endswith("-") and r.startswith(beginning) and r in advised)
        ]
        found += sorted(of_kind, key=len)[-1:]
    return found


def _draw_gains(panel: Any, cells: Sequence[Mapping[str, Any]], model: str, hosts: int) -> None:
    """How many times faster a step is than Horovod's, over the bandwidth."""
    here = [cell for cell in cells if (cell["model"], cell["hosts"]) == (model, hosts)]
    here.sort(key=lambda cell: bits_per_second(cell["rate"]) or float("inf"))
    limited = [cell for cell in here if bits_per_second(cell["rate"])]
    fastest = max((bits_per_second(cell["rate"]) or 0) / 1e6 for cell in limited)
    x = [(bits_per_second(cell["rate"]) or 4e6 * fastest) / 1e6 for cell in here]  # unshaped: beyond the others
    seconds = [{r["method"]: r["seconds_per_step"] for r in cell["results"]} for cell in here]
    for method in _COMPARED:
        points = [(at, s["none"] / s[method]) for at, s in zip(x, seconds, strict=True) if method in s]
        if points:
            color, line = _STYLES[method]
            panel.plot(*zip(*points, strict=True), line, color=color, marker=".", linewidth=1, label=label(method))
    panel.axhline(1, color="tab:gray", linewidth=1)
    panel.set(xscale="log", yscale="log", xlabel="Mbit/s of each host", ylabel="times faster than Horovod")
    names = [f"{at:g}" if bits_per_second(cell["rate"]) else "unshaped" for at, cell in zip(x, here, strict=True)]
    panel.set_xticks(x, names, minor=False, rotation=45)
    panel.minorticks_off()
    panel.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"))


def _draw_quality(panel: Any, content: Mapping[str, Any], compared_only: bool = False) -> None:
    """The metric that training ends with over bits, a dot for each recipe, its name beside the panel.

    `compared_only` leaves out what the README neither advises nor compares with.
    """
    compared = {"none", *(runs.get(content["settings"]["task"]) for _, _, runs in ADVICE)}
    found = sorted(quality(content).items(), key=lambda item: item[1][1])
    found = [item for item in found if not compared_only or item[0] in compared]
    advised = {runs.get(content["settings"]["task"]) for _, what, runs in ADVICE if what.startswith("`")} | {"none"}
    least, most = found[0][1][1], found[-1][1][1]
    for i, (recipe, (bits, metric)) in enumerate(found):
        color, _ = style(recipe)
        panel.plot([bits], [metric], "o", color=color, markersize=5 if recipe in advised else 3)
        panel.annotate(
            constructor(recipe),
            (bits, metric),
            xytext=(1.06, least + (most - least) * i / max(1, len(found) - 1)),
            textcoords=panel.get_yaxis_transform(),
            fontsize=7,
            va="center",
            weight="bold" if recipe in advised else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "relpos": (0, 0.5)},
        )
    panel.set(xscale="log", xlabel="bits for an element, each way", ylabel=content["settings"]["metric"])
    panel.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"], minor=False)
    panel.minorticks_off()


def draw_overview(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Speed and quality side by side, for the README."""
    figure, (speed, learned) = plt.subplots(1, 2, figsize=(9, 4))
    _draw_gains(speed, results["bandwidth"]["cells"], "mlp", HOSTS)
    speed.legend(frameon=False, fontsize=7)
    speed.set_title("28.3 million parameters, 4 hosts on 2 cores", fontsize=9)
    _draw_quality(learned, results["convergence-gpt-adamw"], compared_only=True)
    learned.set_title("a small transformer, AdamW, 4 workers: lower is better", fontsize=9)
    _save(figure, path)


def draw_gains(panels: Sequence[tuple[Sequence[Mapping[str, Any]], str, str]], path: Path) -> None:
    """Speed-up over Horovod, a panel for each cells, model and title."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for panel, (cells, model, title) in zip(axes[0], panels, strict=True):
        _draw_gains(panel, cells, model, HOSTS)
        panel.set_title(title, fontsize=9)
    named = {text: line for panel in axes[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(named.values(), named, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    _save(figure, path)


def draw_quality(contents: Sequence[tuple[Mapping[str, Any], str]], path: Path) -> None:
    """Final quality over bits, a panel for each task."""
    figure, panels = plt.subplots(len(contents), 1, figsize=(5, 4.2 * len(contents)), squeeze=False)
    figure.subplots_adjust(hspace=0.35)
    for panel, (content, title) in zip(panels[:, 0], contents, strict=True):
        _draw_quality(panel, content)
        panel.set_title(title, fontsize=9)
    _save(figure, path)


def draw_speedup(cells: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How many times fewer steps n workers need than one, beside n; and the norms of the errors on the way.

    Parameters
    ----------
    cells
        Of `speedup.py`, in one process. The errors are those of the first seed.
    steps
        What `speedup.efficiencies` makes of them.
    path
        Of the figure.
    """
    figure, (panel, *norms) = plt.subplots(1, 3, figsize=(12, 4))
    reached = [e for e in steps if e["efficiency"]]
    sizes = sorted({e["workers"] for e in reached})
    for recipe in dict.fromkeys(e["recipe"] for e in reached):
        color, line = style(recipe)
        points = [(e["workers"], e["workers"] * e["efficiency"]) for e in reached if e["recipe"] == recipe]
        what = "uncompressed" if recipe == "none" else label(recipe)
        panel.plot(*zip(*points, strict=True), line, color=color, marker=".", label=what)
    panel.plot(sizes, sizes, "k:", linewidth=0.7, label="ideal")
    panel.set(xscale="log", yscale="log", xlabel="workers", ylabel="steps of one worker / steps")
    panel.set_xticks(sizes, map(str, sizes), minor=False)
    panel.legend(frameon=False)
    first = min(cell["seed"] for cell in cells)
    squeezed = [c for c in cells if c["seed"] == first and c["looks"] and c["looks"][-1]["worker_error_norm"]]
    ends = {min(c["workers"] for c in squeezed), max(c["workers"] for c in squeezed)} if squeezed else set()
    for norms_panel, key in zip(norms, ("worker_error_norm", "server_error_norm"), strict=True):
        for cell in sorted((c for c in squeezed if c["workers"] in ends), key=lambda c: (c["recipe"], c["workers"])):
            color, _ = style(cell["recipe"])
            line = "-" if cell["workers"] == max(ends) else "--"
            x = [look["step"] / cell["looks"][-1]["step"] for look in cell["looks"]]
            what = f"{label(cell['recipe'])}, {cell['workers']} workers"
            norms_panel.plot(x, [look[key] for look in cell["looks"]], line, color=color, linewidth=1, label=what)
        norms_panel.set(xlabel="part of the way", ylabel=key.replace("_", " "), ylim=(0, None))
    norms[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def draw_fit(model: Mapping[str, Any], path: Path) -> None:
    """Predicted over measured steps, for the clusters that were fitted and for those that were not."""
    figure, panel = plt.subplots(figsize=(4.5, 4))
    for part, color in (("fit", "tab:gray"), ("test", "tab:blue")):
        points = model[part]
        what = "fitted: " if part == "fit" else "predicted: "
        what += " and ".join(str(n) for n in sorted({p["hosts"] for p in points})) + " hosts"
        panel.scatter([p["measured"] for p in points], [p["predicted"] for p in points], s=10, color=color, label=what)
    ends = [min(p["measured"] for p in model["fit"]), max(p["measured"] for p in model["test"])]
    for factor in (0.75, 1, 1.25):
        panel.plot(ends, [factor * end for end in ends], "k-" if factor == 1 else "k:", linewidth=0.7)
    panel.set(xscale="log", yscale="log", xlabel="measured seconds for an iteration", ylabel="by the model")
    panel.legend(frameon=False)
    _save(figure, path)


def draw_scaling(model: Mapping[str, Any], elements: float, gigabits: float, path: Path) -> None:
    """Seconds that the exchange takes, over the number of hosts, for one size and one bandwidth."""
    figure, panel = plt.subplots(figsize=(4.5, 4))
    for d in model["drawn"]:
        if (d["elements"], d["gigabits"]) == (elements, gigabits):
            color, line = _TOPOLOGY_STYLES[d["topology"]]
            what = {"ring": "uncompressed ring", "one pass": "1-bit, one pass", "two passes": "1-bit, two passes, sharded",
                    "one server": "1-bit, two passes, one server"}[d["topology"]]  # fmt: skip
            panel.plot(model["hosts"], d["seconds"], line, color=color, label=what)
    panel.set(xscale="log", yscale="log", xlabel="hosts", ylabel="seconds of an exchange")
    panel.set_title(f"{elements / 1e6:,.0f} million parameters, {gigabits:g} Gbit/s", fontsize=9)
    panel.minorticks_off()
    panel.legend(frameon=False)
    _save(figure, path)
