"""The cost model, and the page of results: what it says is what the JSON holds."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import model
import pytest
import report
from horovod_jobs import ROOT

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
