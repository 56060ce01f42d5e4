"""A cost model of the exchanges: fitted on small clusters, tested on a larger one, then drawn to a thousand hosts.

    python benchmarks/model.py benchmarks/results/bandwidth.json --json benchmarks/results/model.json

The time that an exchange adds to a step is a sum of what it has to do, each with a price in seconds:

    collectives     operations that Horovod negotiates, each for a cycle or more
    messages        that a host sends one after the other
    wire            bytes through the busiest link, over its rate
    traffic         bytes that a host copies into and out of its sockets
    reduced         elements that an uncompressed allreduce adds and copies
    encoded         elements through an encoder, decoded: through a decoder

with n hosts, N elements, a payload of P bytes for all of them, in K buckets:

    ================  ===========  ===============  ======================  ==========  ============
    topology          collectives  messages         wire                    encoded     decoded
    ================  ===========  ===============  ======================  ==========  ============
    ring              K            2 (n-1) K        2 (n-1)/n 4N
    one pass          K            (n-1) K          (n-1) P                 N           n N
    two passes        2 K          2 (n-1) K        2 (n-1)/n P             N + N/n     2 N
    one server        2 K          (n-1 + log n) K  (n-1 + log n) P         2 N         (n+1) N
    ================  ===========  ===============  ======================  ==========  ============

Hosts of a cluster on one machine share its cores: whatever waits for a processor, which is all but the wire, takes longer
by hosts / cores there. A network of one machine has no delay of its own; ``--delay`` adds one to what is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cluster import bits_per_second
from common import new_file, provenance
from models import make
from scipy.optimize import nnls

TOPOLOGIES = ("ring", "one pass", "two passes", "one server")
METHODS = {
    "none": ("ring", 4.0),
    "onebit": ("two passes", 1 / 8 + 4 / 2048),
    "onebit-server": ("one server", 1 / 8 + 4 / 2048),
    "onebit-allgather": ("one pass", 1 / 8 + 4 / 2048),
    "topk-1%": ("two passes", 0.01 * 6),
    "topk-0.1%": ("two passes", 0.001 * 6),
}
"""Topology, and bytes of payload for each element."""
FIT_HOSTS, TEST_HOSTS = (2, 4), (8,)
BOUND = 0.25
"""Asked of the relative error of a step."""
PRICES = ("collectives", "messages", "wire", "traffic", "reduced", "encoded", "decoded")
SIZES = (25e6, 350e6, 7e9)
GIGABITS = (1, 10, 25, 100)
HOSTS = tuple(2**i for i in range(1, 11))
BUCKET_BYTES = 25 * 2**20
MAX_BUCKETS = 32
"""For larger models the drawing assumes larger buckets: bucket_cap_mb is the user's to raise."""


@dataclass(frozen=True)
class Work:
    """What one exchange has to do, in units of `PRICES`."""

    collectives: float
    messages: float
    wire: float
    traffic: float
    reduced: float
    encoded: float
    decoded: float


def work(topology: str, payload: float, elements: float, hosts: int, rate: float | None, sharing: float) -> Work:
    """The table above.

    Parameters
    ----------
    topology
        One of `TOPOLOGIES`.
    payload
        Bytes for each element.
    elements
        Of all gradients.
    hosts
        Two or more.
    rate
        Bytes per second of each host, in each direction; None: no limit.
    sharing
        By how much longer processors take, because hosts share them.
    """
    n, total, log = hosts, payload * elements, math.ceil(math.log2(hosts))
    buckets = min(max(1, round(4 * elements / BUCKET_BYTES)), MAX_BUCKETS)
    each = 2 * (n - 1) / n * total  # what a host sends on average, but for one pass
    if topology == "ring":
        wire, traffic, messages, encoded, decoded = each, sharing * each, 2 * (n - 1), 0.0, 0.0
    elif topology == "one pass":
        wire, messages, encoded, decoded = (n - 1) * total, n - 1, elements, n * elements
        traffic = sharing * wire
    elif topology == "two passes":
        wire, traffic, messages = each, sharing * each, 2 * (n - 1)
        encoded, decoded = (1 + 1 / n) * elements, 2 * elements
    else:
        # The server works while the others wait, and so shares no processor: its part counts once.
        wire, messages = (n - 1 + log) * total, n - 1 + log
        traffic = max(wire, sharing * each)
        encoded, decoded = (1 + 1 / sharing) * elements, (1 + n / sharing) * elements
    # Horovod's fusion puts what waits into one operation, of which there are about as many as buckets.
    operations = buckets * (2 if topology in ("two passes", "one server") else 1)
    return Work(
        collectives=sharing * operations,
        messages=sharing * buckets * messages,
        wire=0.0 if rate is None else wire / rate,
        traffic=traffic,
        reduced=sharing * elements if topology == "ring" else 0.0,
        encoded=sharing * encoded,
        decoded=sharing * decoded,
    )


def seconds(prices: Mapping[str, float], todo: Work) -> float:
    """What an exchange adds to a step."""
    return sum(prices[name] * amount for name, amount in asdict(todo).items())


@dataclass(frozen=True)
class Point:
    """A measurement, and the work behind it."""

    model: str
    method: str
    hosts: int
    rate: str
    noop: float
    measured: float
    """Seconds of a step."""
    todo: Work


def points(measured: Mapping[str, Any]) -> list[Point]:
    """What `bandwidth.py` has measured, as far as the model speaks of it."""
    cores = measured["machine"]["cores"]
    elements = {name: sum(p.numel() for p in make(name)[0].parameters()) for name in {c["model"] for c in measured["cells"]}}
    found = []
    for cell in measured["cells"]:
        steps = {r["method"]: r["seconds_per_step"] for r in cell["results"]}
        bits = bits_per_second(cell["rate"])
        for method, (topology, payload) in METHODS.items():
            if method in steps:
                rate = None if bits is None else bits / 8
                sharing = max(1.0, cell["hosts"] / cores)
                todo = work(topology, payload, elements[cell["model"]], cell["hosts"], rate, sharing)
                where = (cell["model"], method, cell["hosts"], cell["rate"])
                found.append(Point(*where, steps["noop"], steps[method], todo))
    return found


def fit(measured: Sequence[Point]) -> dict[str, float]:
    """Prices, none below zero, for which steps of the measured times come out with the least relative error."""
    rows = np.array([[*asdict(p.todo).values()] for p in measured])
    weights = np.array([1 / p.measured for p in measured])
    scale = rows.max(axis=0)  # so that bytes, elements and seconds count alike
    scale[scale == 0] = 1
    above = np.array([p.measured - p.noop for p in measured])
    prices, _ = nnls(rows / scale * weights[:, None], above * weights)
    return dict(zip(PRICES, (float(price) for price in prices / scale), strict=True))


def test(prices: Mapping[str, float], measured: Sequence[Point]) -> list[dict[str, Any]]:
    """Predicted beside measured steps: what noop takes there, and the exchange.

    Returns
    -------
    list of dict
        ``error`` is relative to the measured step; ``exchange_error`` to the measured time above noop, None where that is
        not a quarter of noop, and so no more than its noise.
    """
    found = []
    for p in measured:
        exchange, above = seconds(prices, p.todo), p.measured - p.noop
        found.append(
            {
                "model": p.model,
                "method": p.method,
                "hosts": p.hosts,
                "rate": p.rate,
                "measured": p.measured,
                "predicted": p.noop + exchange,
                "error": (p.noop + exchange) / p.measured - 1,
                "exchange_error": exchange / above - 1 if above > p.noop / 4 else None,
            }
        )
    return found


def draw(prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """Seconds of the exchange of `SIZES` gradients between `HOSTS` hosts with a processor each, with 1-bit payloads."""
    found = []
    for elements in SIZES:
        for gigabits in GIGABITS:
            for topology in TOPOLOGIES:
                payload = METHODS["none" if topology == "ring" else "onebit"][1]
                took = [seconds(prices, work(topology, payload, elements, n, gigabits * 1e9 / 8, 1.0)) for n in HOSTS]
                found.append({"elements": elements, "gigabits": gigabits, "topology": topology, "seconds": took})
    return found


def break_even(prices: Mapping[str, float], elements: float, hosts: int, wire_only: bool) -> float | None:
    """Bits per second above which 1-bit gradients in two passes take longer than an uncompressed ring allreduce.

    Parameters
    ----------
    prices
        Of `fit`.
    elements, hosts
        As for `work`.
    wire_only
        Whether the allreduce shall cost nothing but its time on the wire, as where other hardware does the rest.

    Returns
    -------
    float or None
        None: it pays at every rate.
    """
    ring = work("ring", METHODS["none"][1], elements, hosts, 1.0, 1.0)
    squeezed = work("two passes", METHODS["onebit"][1], elements, hosts, 1.0, 1.0)
    saved = prices["wire"] * (ring.wire - squeezed.wire)
    of_ring = 0.0 if wire_only else seconds({**prices, "wire": 0.0}, ring)
    lost = seconds({**prices, "wire": 0.0}, squeezed) - of_ring
    return 8 * saved / lost if lost > 0 else None


def main() -> None:
    """Fits, tests and draws."""
    parser = argparse.ArgumentParser(description="A cost model of the exchanges, fitted on measurements.")
    parser.add_argument("results", type=Path, help="what bandwidth.py has written")
    parser.add_argument("--json", type=new_file, required=True, metavar="FILE", help="prices, errors and predictions")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the network adds to each message, where drawn")
    args = parser.parse_args()
    try:
        measured = json.loads(args.results.read_text())
        known = points(measured)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"argument results: {args.results} holds no results of bandwidth.py: {error!r}")
    fitted, held_out = ([p for p in known if p.hosts in hosts] for hosts in (FIT_HOSTS, TEST_HOSTS))
    if not fitted or not held_out:
        parser.error(f"argument results: {args.results} must hold clusters of {FIT_HOSTS} and of {TEST_HOSTS} hosts")
    prices = fit(fitted)
    tested = test(prices, held_out)
    drawn = {**prices, "messages": prices["messages"] + args.delay}
    exchange_errors = [abs(t["exchange_error"]) for t in tested if t["exchange_error"] is not None]
    content = {
        **provenance(args),
        "measured": measured["date"],
        "prices": prices,
        "fit": test(prices, fitted),
        "test": tested,
        "median_error": statistics.median(abs(t["error"]) for t in tested),
        "largest_error": max(abs(t["error"]) for t in tested),
        "bound": BOUND,
        "within_bound": sum(abs(t["error"]) <= BOUND for t in tested),
        "median_exchange_error": statistics.median(exchange_errors) if exchange_errors else None,
        "hosts": HOSTS,
        "drawn": draw(drawn),
        "break_even": [
            {
                "elements": elements,
                "hosts": hosts,
                "bits_per_second": break_even(drawn, elements, hosts, wire_only=False),
                "bits_per_second_wire_only": break_even(drawn, elements, hosts, wire_only=True),
            }
            for elements in (10e6, *SIZES)
            for hosts in (4, 64)
        ],
    }
    args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"steps on {TEST_HOSTS[0]} hosts: median error {content['median_error']:.0%}, largest {content['largest_error']:.0%}")


if __name__ == "__main__":
    main()
