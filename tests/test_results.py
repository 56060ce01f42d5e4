"""The cost model, and the page of results: what it says is what the JSON holds."""

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import convergence
import figures
import learning
import model
import pytest
import report
import speedup
import torch
from horovod_jobs import ROOT

import ds_horovod

BENCHMARKS = ROOT / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
PRICES = {
    "collectives": 1e-3, "messages": 1e-4, "wire": 1.1, "traffic": 2e-10, "reduced": 3e-9, "encoded": 1e-9, "decoded": 5e-10,
}  # fmt: skip


def synthetic_points():
    """What clusters would measure whose prices were exactly those."""
    found = []
    for name, elements in (("large", 28e6), ("small", 3e6)):
        for hosts in (2, 4, 8):
            for bits in (None, 1e9, 1e8):
                for method, (topology, payload) in model.METHODS.items():
                    todo = model.work(topology, payload, elements, hosts, None if bits is None else bits / 8, max(1, hosts / 2))
                    measured = 0.3 + model.seconds(PRICES, todo)
                    found.append(model.Point(name, method, hosts, str(bits), 0.3, measured, todo))
    return found


def test_the_fit_finds_the_prices_that_made_the_times():
    known = synthetic_points()
    prices = model.fit([p for p in known if p.hosts in model.FIT_HOSTS])
    assert prices == pytest.approx(PRICES, rel=1e-6)
    assert max(abs(t["error"]) for t in model.test(prices, known)) < 1e-9


def test_an_error_of_the_prediction_is_seen():
    known = [replace(p, measured=1.5 * p.measured) for p in synthetic_points()]
    assert all(t["error"] == pytest.approx(-1 / 3) for t in model.test(PRICES, known))


@pytest.mark.parametrize("elements", [25e6, 7e9])
def test_traffic_of_two_passes_does_not_grow_with_the_hosts(elements):
    def wire(topology, hosts):
        return model.work(topology, 0.127, elements, hosts, 1.0, 1.0).wire

    for hosts in (2, 4, 64, 1024):
        assert wire("two passes", hosts) == pytest.approx(2 * (hosts - 1) / hosts * 0.127 * elements)
        assert wire("one pass", hosts) == pytest.approx((hosts - 1) * 0.127 * elements)
        assert wire("one server", hosts) >= wire("one pass", hosts)
        shared = model.work("one server", 0.127, elements, hosts, None, sharing=hosts / 2)
        assert shared.traffic == max(wire("one server", hosts), hosts / 2 * wire("two passes", hosts))
    assert wire("two passes", 2) == wire("one pass", 2)


@pytest.mark.parametrize("wire_only", [False, True])
def test_at_break_even_both_take_as_long(wire_only):
    prices = {**PRICES, "reduced": 1e-10, "traffic": 0.0}
    bits = model.break_even(prices, 25e6, 4, wire_only)
    ring, two = (model.work(t, p, 25e6, 4, bits / 8, 1.0) for t, p in (("ring", 4.0), model.METHODS["onebit"]))
    uncompressed = prices["wire"] * ring.wire if wire_only else model.seconds(prices, ring)
    assert model.seconds(prices, two) == pytest.approx(uncompressed)


def test_where_compression_always_pays_there_is_no_break_even():
    assert model.break_even({**PRICES, "reduced": 1e-7}, 25e6, 4, wire_only=False) is None


def test_a_model_needs_results_to_fit_and_to_test(tmp_path):
    file = tmp_path / "bandwidth.json"
    file.write_text('{"machine": {"cores": 2}, "date": "today", "cells": []}')
    command = [sys.executable, str(BENCHMARKS / "model.py"), str(file), "--json", str(tmp_path / "model.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "must hold clusters of (2, 4) and of (8,) hosts" in result.stderr
    file.write_text("{}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "holds no results of bandwidth.py" in result.stderr


def results():
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}


def test_the_page_and_the_readme_say_what_the_results_hold(tmp_path):
    """Both are as `make results` writes them: no number in them is anybody's memory."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    command = ["report.py", "benchmarks/results", "docs/results.md", "--readme", "README.md"]
    subprocess.run([sys.executable, str(BENCHMARKS / command[0]), *command[1:]], cwd=tmp_path, check=True)
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert {path.name for path in RESULTS.glob("*.svg")} == {
        path.name for path in (tmp_path / "benchmarks" / "results").glob("*.svg")
    }


def test_the_model_in_the_tree_is_that_of_the_measurements_in_the_tree():
    found, known = results()["model"], model.points(results()["bandwidth"])
    prices = model.fit([p for p in known if p.hosts in model.FIT_HOSTS])
    assert prices == pytest.approx(found["prices"])
    assert found["measured"] == results()["bandwidth"]["date"]


def test_the_design_says_what_the_soak_holds():
    jobs = results()["soak"]["jobs"]
    ended = sum(job["end"] == "HorovodInternalError" for job in jobs)
    text = " ".join((ROOT / "docs" / "design.md").read_text().split())
    assert f"Of {len(jobs)} jobs with a rank killed" in text
    assert f"In {ended} all others ended with HorovodInternalError; in {len(jobs) - ended} Gloo aborted one" in text
    assert not any(job["end"] == "hang" or job["checkpoint"] == "empty" for job in jobs)
    jobs = [job for job in results()["recoveries"]["jobs"] if job["end"] != "never began"]
    ours, stock = ([job["end"] == "recovered" for job in jobs if job["kind"] == kind] for kind in ("ours", "stock"))
    assert f"{sum(ours)} of {len(ours)} recoveries came to an end, beside {sum(stock)} of {len(stock)} without" in text


def test_a_target_that_is_missed_is_said_to_be():
    above = {
        "onebit": 0.5,
        "topk-1%": 0.3,
        "topk-0.1%": 0.3,
        "ddp-powersgd-4": 0.2,
        "ddp-powersgd-1": 0.4,
        "none": 15.0,
        "noop": 0.0,
    }
    entries = [{"method": m, "seconds_per_step": 1 + s, "seconds_above_noop": s} for m, s in above.items()]
    entries = [{**entry, "seconds_by_round": [entry["seconds_per_step"]]} for entry in entries]
    content = {"cells": [{"model": "mlp", "hosts": 4, "rate": "1gbit", "results": entries}]}
    rows = report.target_table(content).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["yes", "**no**", "yes", "yes"]
    assert "30.0 times" in rows[0] and math.isclose(float(rows[1].split("|")[4]), 1.25)


@pytest.mark.parametrize("name", [name for name, recipe in convergence.RECIPES.items() if recipe.squeeze])
def test_a_recipe_is_shown_as_what_one_would_write(name):
    recipe = convergence.RECIPES[name]
    text, _, rate = learning.constructor(name).partition(", learning rate x ")
    names = {**vars(ds_horovod), "model": torch.nn.Linear(1, 1)}
    shown = eval(text, names)
    shown = (shown() if isinstance(shown, type) else shown).options
    made = recipe.squeeze(momentum=recipe.momentum).options
    assert replace(shown, model=None) == made and (shown.model is not None) == recipe.tentative
    assert float(rate or 1) == recipe.lr


# ---- what a measurement adds to the repository


def test_the_results_in_the_tree_are_small():
    drawings = {path.name: path.read_text() for path in RESULTS.glob("*.svg")}
    assert drawings and {name: len(text) for name, text in drawings.items() if len(text) > 60_000} == {}
    for name, text in drawings.items():
        vertices = [len(path.split()) / 2 for path in re.findall(r' d="([^"]*)"', text)]
        assert max(vertices) <= 300, name
    sizes = {path.name: path.stat().st_size for path in RESULTS.glob("*.json")}
    assert {name: size for name, size in sizes.items() if size > 500_000} == {}


def test_a_run_in_the_tree_keeps_what_is_read():
    """Every step is there where the page says after how many a loss is reached, and nowhere else."""
    for name, content in results().items():
        for cell in content.get("cells", []):
            if name.startswith("convergence-"):
                task, every = content["settings"]["task"], content["settings"]["steps"]
                read = task in learning.TIMED_MODEL and cell["workers"] == learning.HOSTS
                assert len(cell["losses"]) == every if read else len(cell["losses"]) <= learning.MOST_LOSSES, (
                    name,
                    cell["recipe"],
                )
            if name == "speedup":
                assert len(cell["looks"]) <= speedup.MOST_LOOKS and cell["steps"] in (None, cell["looks"][-1]["step"])


def noisy_losses(steps, seed=0):
    numbers = random.Random(seed)
    return [float(f"{3 / (1 + step / 100) + numbers.random():.5g}") for step in range(steps)]


@pytest.mark.parametrize(
    ("steps", "span", "kept"), [(200, 1, 200), (400, 5, 80), (1003, 25, 41), (3600, 25, 144), (11700, 75, 156)]
)
def test_thinned_losses_are_the_same_curve(steps, span, kept):
    losses = [noisy_losses(steps, seed) for seed in range(2)]
    cells = [learning.thinned(own, "digits", workers=4) for own in losses]
    assert {cell.get("steps_per_loss", 1) for cell in cells} == {span} and {len(cell["losses"]) for cell in cells} == {kept}
    every, thin = (dict(learning.curve(own)) for own in ([{"losses": own} for own in losses], cells))
    shared = [step for step in thin if step in every]
    assert len(shared) >= len(thin) - 1
    if span <= learning.SMOOTHING:
        assert [thin[step] for step in shared] == pytest.approx([every[step] for step in shared], rel=1e-4)


def test_losses_of_timed_steps_stay_as_they_are():
    losses = noisy_losses(900)
    assert learning.thinned(losses, "gpt-sgd", learning.HOSTS) == {"losses": losses}
    assert len(learning.thinned(losses, "gpt-sgd", 8)["losses"]) == 180
    smoothed = learning.curve([{"losses": losses}])
    assert smoothed[0] == (25, pytest.approx(sum(losses[:25]) / 25)) and smoothed[-1][0] == 900
    assert learning.steps_to(smoothed, smoothed[500][1]) <= 525 and learning.steps_to(smoothed, 0.0) is None


def test_thinned_losses_of_a_run_that_diverged():
    losses = [*noisy_losses(398), None, None]
    assert learning.thinned(losses, "digits", 4)["losses"][-2:] == [pytest.approx(sum(losses[390:395]) / 5, rel=1e-4), None]


@pytest.mark.parametrize("count", [0, 1, 50, 51, 167])
def test_thinned_looks_end_with_the_last(count):
    looks = [{"step": step} for step in range(count)]
    kept = speedup.thinned(looks)
    assert len(kept) <= speedup.MOST_LOOKS and kept[-1:] == looks[-1:]
    assert kept == looks if count <= 50 else len({b["step"] - a["step"] for a, b in itertools.pairwise(kept)}) == 1


def test_the_same_results_give_the_same_figures(tmp_path):
    """Byte by byte: a figure changes where its results do, and with nothing else."""
    held = results()
    for again in ("a", "b"):
        figures.draw_fit(held["model"], tmp_path / f"fit-{again}.svg")
        figures.draw_learning(
            held["convergence-gpt-sgd-3600"], held["steps-gpt-small"], learning.HOSTS, tmp_path / f"learning-{again}.svg"
        )
    for name in ("fit", "learning"):
        assert (tmp_path / f"{name}-a.svg").read_bytes() == (tmp_path / f"{name}-b.svg").read_bytes()
        assert not re.search(r"dc:date|[Mm]atplotlib v", (tmp_path / f"{name}-a.svg").read_text())


def test_points_of_a_drawn_curve_are_evenly_spaced():
    points = [(step, 1 / step) for step in range(25, 901)]
    for logarithmic in (False, True):
        drawn = figures.spread(points, logarithmic)
        assert len(drawn) == figures.MOST_POINTS and (drawn[0], drawn[-1]) == (points[0], points[-1])
        at = [math.log(step) if logarithmic else step for step, _ in drawn]
        gaps = [b - a for a, b in itertools.pairwise(at)]
        assert max(gaps) < 1.5 * min(gaps)
    assert figures.spread(points[:3], True) == points[:3]


def test_a_compact_figure_is_the_same_picture():
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    line = '<path d="M 10.123456 2.345678 \nL -20 30.987654 \nL 1 2 \nz" style="stroke-width: 0.8"/>'
    rounded = '<path d="M 1 2 \nQ 3 4 5 6 \nL 7 8 \n"/>'
    tick = '<g id="tick_1"><g id="line_2"><use xlink:href="#m" x="0.60175"/></g></g>'
    said = figures.compact(f'<svg {names}><g clip-path="url(#p)">{line}{rounded}</g>{tick}<text x="1">0.123456</text></svg>')
    assert re.findall(r' d="([^"]*)"', said) == ["M 10.1 2.35 -20 31 1 2 z", "M 1 2 Q 3 4 5 6 L 7 8"]
    assert said.count("<g") == 1 and 'x="0.6"' in said and "stroke-width: 0.8" in said and ">0.123456<" in said
    assert figures.compact(said) == said
