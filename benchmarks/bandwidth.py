"""Seconds of a training step over networks of every speed: all methods, on clusters of several sizes, for several models.

    python benchmarks/bandwidth.py --json benchmarks/results/bandwidth.json

Each combination of model, hosts and rate is a run of `cluster.py`, in which all methods are measured one after the
other by `step_times.py`. The file is written after each of them, and a later call goes on where the file ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import MAX_HOSTS, ClusterError, bits_per_second, die_with_parent, require_privileges
from common import new_file, positive, progress_bar, provenance
from methods import method_list
from models import MODELS

METHODS = (
    "noop", "none", "fp16", "onebit", "topk-1%", "topk-0.1%", "onebit-server", "onebit-allgather",
    "ddp", "ddp-fp16", "ddp-powersgd-1", "ddp-powersgd-4",
)  # fmt: skip
FULL = {"models": ["mlp", "preact_resnet18"], "hosts": [2, 4, 8], "seconds": 2.0, "max_steps": 20}
FULL["rates"] = ["unshaped", "10gbit", "1gbit", "500mbit", "200mbit", "100mbit"]
QUICK = {"models": ["gpt"], "hosts": [2, 4, 8], "rates": ["1gbit", "100mbit"], "seconds": 0.3, "max_steps": 3}
BATCH_SIZE = {"mlp": 32, "preact_resnet18": 4, "gpt": 2, "gpt-small": 8}
"""Of each host. Small, since all hosts share the cores of one machine: compute must not hide what is measured."""

COMPARABLE = ("machine", "versions", "environment", "network", "batch_size", "slots")
"""What must be the same for all results of a file."""
SETTINGS = ("seconds", "max_steps")
"""What must be the same for a cell that is not measured again; it may have more rounds."""
PATIENCE_SECONDS = 900.0
"""How long one measurement may take. An exchange that hangs would stop the sweep."""

Cell = tuple[str, int, str]
"""Model, hosts, rate."""


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Seconds of a step over networks of every speed.")
    add = parser.add_argument
    add("--json", type=new_file, required=True, metavar="FILE", help="the results; what it has already is not measured again")
    add("--quick", action="store_true", help="a small model and few steps: whether it works, not how fast")
    add("--models", nargs="+", choices=MODELS, help=f"what to train (default: {' '.join(FULL['models'])})")
    add("--hosts", nargs="+", type=int, help="sizes of the cluster (default: 2 4 8)")
    add("--slots", type=positive(int), default=1, help="ranks on each host (default: 1)")
    add("--rates", nargs="+", help=f"of each host in each direction (default: {' '.join(FULL['rates'])})")
    add("--methods", nargs="+", default=METHODS, help=f"noop among them (default: {' '.join(METHODS)})".replace("%", "%%"))
    add("--rounds", type=positive(int), default=1, help="measure every method so often in each run (default: 1)")
    add("--seconds", type=positive(float), help="how long to measure each method in each round, roughly (default: 2)")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.methods = method_list(parser, "--methods", args.methods)
    if "noop" not in args.methods:
        parser.error("argument --methods: noop must be among them; the time of an exchange is the time above noop")
    for rate in args.rates:
        try:
            bits_per_second(rate)
        except ValueError as error:
            parser.error(f"argument --rates: {error}")
    for hosts in args.hosts:
        if not 2 <= hosts <= MAX_HOSTS:
            parser.error(f"argument --hosts: must be from 2 to {MAX_HOSTS}, got {hosts}")
    return args


class Results:
    """The file of results: one entry for each cell, written at once and as a whole.

    Raises
    ------
    ValueError
        The file is something else, or what it holds was measured elsewhere or otherwise: times of one file are compared.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {**origin, "cells": []}
        if path.exists() and path.stat().st_size:
            try:
                before = json.loads(path.read_text())
                before.setdefault("slots", 1)
                self._content["cells"] = before["cells"]
                different = [key for key in COMPARABLE if key in origin and not _agree(before[key], origin[key])]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} holds no results of this benchmark: {error!r}; name another file") from error
            if different:
                found = ", ".join(f"{key} {before[key]} there, {origin[key]} here" for key in different)
                raise ValueError(f"{path} cannot be continued: {found}; name another file")

    def missing(self, cells: Sequence[Cell], methods: Sequence[str], settings: Mapping[str, float]) -> dict[Cell, list[str]]:
        """The cells to measure, each with its methods: what is asked for, and what the cell has and would lose."""
        todo = {}
        for cell in cells:
            held = next((c for c in self._content["cells"] if _key(c) == cell), None)
            has = [r["method"] for r in held["results"]] if held else []
            as_asked = held and held["rounds"] >= settings["rounds"] and all(held[s] == settings[s] for s in SETTINGS)
            if not as_asked or not set(methods) <= set(has):
                todo[cell] = [*methods, *(method for method in has if method not in methods)]
        return todo

    def add(self, cell: Cell, **entry: Any) -> None:
        """Writes a cell, in place of an older one."""
        model, hosts, rate = cell
        others = [c for c in self._content["cells"] if _key(c) != cell]
        self._content["cells"] = [*others, {"model": model, "hosts": hosts, "rate": rate, **entry}]
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, prefix=self._path.name, delete=False) as file:
            file.write(json.dumps(self._content, indent=1) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, self._path)


def _agree(before: Any, now: Any) -> bool:
    """Whether two settings say the same of what both speak of: a model may have been added since."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return all(before[key] == now[key] for key in before.keys() & now.keys())
    return bool(before == now)


def _key(entry: Mapping[str, Any]) -> Cell:
    return entry["model"], entry["hosts"], entry["rate"]


def measure(cell: Cell, methods: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs a cluster and yields its measurements as they come.

    Raises
    ------
    ClusterError
        It has failed, and the end of what it has said is in the message; or it hangs.
    """
    model, hosts, rate = cell
    here = Path(__file__).parent
    command = [sys.executable, str(here / "cluster.py"), "--hosts", str(hosts), "--slots", str(args.slots)]
    command += ["--rate", rate, "--"]
    command += [sys.executable, str(here / "step_times.py"), *methods, "--model", model]
    command += ["--batch-size", str(BATCH_SIZE[model]), "--rounds", str(args.rounds)]
    command += ["--seconds", str(args.seconds), "--max-steps", str(args.max_steps)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, preexec_fn=lambda: die_with_parent(signal.SIGTERM)
        )
        try:
            for line in lines_of(process, PATIENCE_SECONDS):
                if line.startswith("{"):
                    yield json.loads(line)
            if process.wait():
                said.seek(0)
                raise ClusterError(f"{model} on {hosts} hosts at {rate} has failed:\n{said.read()[-3000:].strip()}")
        except TimeoutError as error:
            raise ClusterError(f"{model} on {hosts} hosts at {rate} hangs: {error}") from error
        finally:
            process.terminate()
            process.wait()


def lines_of(process: subprocess.Popen[str], patience: float) -> Iterator[str]:
    """What a process says, line by line.

    Raises
    ------
    TimeoutError
        It has said nothing for `patience` seconds, and has been told to end.
    """
    silent = threading.Event()

    def give_up() -> None:
        silent.set()
        process.terminate()

    assert process.stdout is not None
    while True:
        timer = threading.Timer(patience, give_up)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if silent.is_set():
            raise TimeoutError(f"nothing was measured for {patience:g} seconds")
        if not line:
            return
        yield line


def combine(measurements: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each method: medians of its rounds, and its time above noop of the same round."""
    results: list[dict[str, Any]] = []
    noop = {m["round"]: m["seconds_per_step"] for m in measurements if m["method"] == "noop"}
    for method in methods:
        rounds = [m for m in measurements if m["method"] == method]
        results.append(
            {
                "method": method,
                "seconds_per_step": statistics.median(m["seconds_per_step"] for m in rounds),
                "seconds_by_round": [m["seconds_per_step"] for m in rounds],
                "seconds_above_noop": statistics.median(m["seconds_per_step"] - noop[m["round"]] for m in rounds),
                "steps": sum(m["steps"] for m in rounds),
                "bytes_sent": rounds[-1]["bytes_sent"],
                "wire_seconds": statistics.median(m["wire_seconds"] for m in rounds),
                "wire_bytes_sent": statistics.median(m["wire_bytes_sent"] for m in rounds),
            }
        )
    return results


def network_settings() -> dict[str, str]:
    """What TCP does on a host: a new network namespace takes it from the machine, not from this process's namespace."""
    names = ("tcp_congestion_control", "tcp_slow_start_after_idle", "tcp_rmem", "tcp_wmem")
    command = ["unshare", "--net", "cat", *(f"/proc/sys/net/ipv4/{name}" for name in names)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: " ".join(line.split()) for name, line in zip(names, lines, strict=True)}


def main() -> None:
    """Measures what is missing in the file."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    environment = {name: value for name, value in os.environ.items() if name.startswith("HOROVOD_")}
    try:
        require_privileges()
        origin = {**provenance(args), "environment": environment, "network": network_settings(), "batch_size": BATCH_SIZE}
        origin["slots"] = args.slots
        results = Results(args.json, origin)
        settings = {name: getattr(args, name) for name in ("rounds", *SETTINGS)}
        cells = results.missing(list(itertools.product(args.models, args.hosts, args.rates)), args.methods, settings)
        with progress_bar(total=sum(map(len, cells.values())) * args.rounds, unit="measurement") as bar:
            for cell, methods in cells.items():
                measurements = []
                for measurement in measure(cell, methods, args):
                    measurements.append(measurement)
                    bar.set_description("{} on {} hosts at {}".format(*cell))
                    bar.update()
                source = {key: origin[key] for key in ("date", "commit", "command")}
                results.add(cell, **source, **settings, results=combine(measurements, methods))
    except (ClusterError, ValueError) as error:
        sys.exit(f"bandwidth: {error}")


if __name__ == "__main__":
    main()
