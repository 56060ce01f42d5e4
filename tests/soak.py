"""Kills a random rank of a job at a random moment, again and again: do all others end, and how?

    python tests/soak.py --kills 200 --json FILE
    python tests/soak.py --elastic --minutes 60 --json FILE

Ranks are processes that nobody watches over (`horovod_jobs.separate_ranks`), so that only Horovod's own errors end them. A job
that has not ended a minute after the kill hangs. Now and then Gloo aborts a rank by itself: "another error". The checkpoint,
which rank 0 writes before each step, must be whole.

With --elastic jobs go on instead, among the ranks that are left, with ds_horovod and without it in turn, so that both see the
same load. A recovery that takes longer than a minute hangs; then the stacks of all ranks are printed.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from horovod_jobs import ROOT, separate_ranks

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import provenance

SCRIPT = str(ROOT / "tests" / "workers" / "training.py")
PATIENCE = 60.0  # seconds
PATIENCE_TO_RECOVER = 60.0  # Gloo may take 5 seconds to notice
PATIENCE_TO_BEGIN = 180.0
HOSTS = ["localhost", "127.0.0.1", "127.1"]  # all of them this one, but a host that fails is used no more
TRAINS = re.compile(r"rank (\d+) of (\d+): process (\d+)")


def kill(seed: int) -> dict:
    """One job, and what became of it."""
    draw = random.Random(seed)
    ranks, victim_of, moment = draw.choice([2, 3, 4]), draw.random(), draw.uniform(0.0, 4.0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        with separate_ranks(ranks, SCRIPT, "1000000", "--checkpoint", str(file)) as started:
            while not all(rank.output for rank in started):  # each says that it has begun
                time.sleep(0.05)
            time.sleep(moment)
            victim = int(victim_of * ranks)
            started[victim].kill()
            start = time.monotonic()
            others = [rank for rank in started if rank is not started[victim]]
            while time.monotonic() - start < PATIENCE and any(rank.exitcode is None for rank in others):
                time.sleep(0.05)
            seconds = time.monotonic() - start
            hang = any(rank.exitcode is None for rank in others)
            ends = [rank.exitcode for rank in others]
            outputs = [] if hang else [rank.output for rank in others]
        checkpoint = "none yet"
        if file.exists():
            checkpoint = "whole" if torch.load(file, weights_only=True)["errors"]["buckets"] else "empty"
    surfaced = not hang and all(code == 7 and "HorovodInternalError" in text for code, text in zip(ends, outputs, strict=True))
    end = "hang" if hang else "HorovodInternalError" if surfaced else "another error"
    if end != "HorovodInternalError":
        print(f"seed {seed}: {end}, {ends}", *(text[-1500:] for text in outputs), sep="\n", file=sys.stderr)
    return {"seed": seed, "ranks": ranks, "killed": victim, "after_s": round(moment, 2), "end": end,
            "until_all_ended_s": round(seconds, 2), "checkpoint": checkpoint}  # fmt: skip


class Job:
    """An elastic job of a rank on each host, and what it has said."""

    def __init__(self, seed: int, kind: str, forks: Path, folder: Path) -> None:
        script = folder / f"discover-{seed}.sh"
        script.write_text("#!/bin/sh\nprintf '%s:1\\n' " + " ".join(HOSTS) + "\n")
        script.chmod(0o755)
        fork = [sys.executable, "-I", "-S", str(ROOT / "tests" / "forking.py"), str(forks)]
        ranks = ["-np", str(len(HOSTS)), "--min-np", "1", "--max-np", str(len(HOSTS))]
        options = ["--gloo", *ranks, "--network-interfaces", "lo", "--host-discovery-script", str(script)]
        worker = [*fork, str(ROOT / "tests" / "workers" / "recovering.py"), kind]
        self.process = subprocess.Popen(
            [*fork, str(Path(sys.executable).parent / "horovodrun"), *options, *worker],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_GLOO_TIMEOUT_SECONDS": "5"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.processes: dict[int, set[int]] = {}
        """Of the ranks that train, by how many they are."""
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put(None)

    def listen(self, seconds: float, most: int = 0) -> int:
        """Takes in what it says until ranks train that are so many at most, or it ends, or time is over.

        Returns how many train; 0 for none. They are fewer than asked for where Gloo has aborted another one by itself.
        """
        deadline = time.monotonic() + seconds
        while True:
            for ranks in range(most, 0, -1):
                if len(self.processes.get(ranks, ())) == ranks:
                    return ranks
            try:
                line = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return 0
            if line is None:
                return 0
            self.lines.append(line)
            for _, ranks, process in TRAINS.findall(line):
                self.processes.setdefault(int(ranks), set()).add(int(process))

    def send(self, number: int) -> None:
        for process in set().union(*self.processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def recover(seed: int, forks: Path, folder: Path) -> list[dict]:
    """One job, and what became of each recovery."""
    draw, kind = random.Random(seed // 2), ["ours", "stock"][seed % 2]
    job, results = Job(seed, kind, forks, folder), []
    ranks = job.listen(PATIENCE_TO_BEGIN, most=len(HOSTS))
    if not ranks:
        results.append({"seed": seed, "kind": kind, "end": "never began"})
    while ranks > 1:
        moment = draw.uniform(0.0, 0.5)
        time.sleep(moment)
        os.kill(draw.choice(sorted(job.processes[ranks])), signal.SIGKILL)
        start, said = time.monotonic(), len(job.lines)
        left = job.listen(PATIENCE_TO_RECOVER, most=ranks - 1)
        seconds = time.monotonic() - start
        end = "recovered" if left else "hang" if seconds >= PATIENCE_TO_RECOVER else "another error"
        results.append({"seed": seed, "kind": kind, "ranks": ranks, "left": left, "after_s": round(moment, 2), "end": end,
                        "seconds": round(seconds, 2)})  # fmt: skip
        ranks = left
    if not ranks:
        job.send(signal.SIGUSR1)
        job.listen(3.0)
        said = job.lines[-200:] if len(results) == 1 else job.lines[said:]
        print(f"seed {seed}, {kind}: {results[-1]['end']}", *(line[:300].rstrip() for line in said), sep="\n", flush=True)
    job.listen(20.0)
    job.send(signal.SIGKILL)
    job.process.kill()
    return results


def soak_elastic(arguments: argparse.Namespace) -> Counter:
    """As many recoveries as there is time for."""
    end = time.monotonic() + 60 * arguments.minutes
    about = provenance(arguments)
    seeds, results, lock = iter(range(arguments.first_seed, 10**9)), [], threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        forks = Path(folder) / "forks"
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forking.py"), "serve", str(forks)], stdout=subprocess.PIPE, text=True
        )
        server.stdout.readline()

        def work() -> None:
            while time.monotonic() < end:
                with lock:
                    seed = next(seeds)
                of_job = recover(seed, forks, Path(folder))
                with lock:
                    results.extend(of_job)
                    write(arguments.json, about, Counter(f"{r['kind']}: {r['end']}" for r in results), results)

        with ThreadPoolExecutor(arguments.at_once) as pool:
            for done in [pool.submit(work) for _ in range(arguments.at_once)]:
                done.result()
        server.kill()
    ends = Counter(f"{result['kind']}: {result['end']}" for result in results)
    print(dict(ends))
    return ends


def write(file: Path | None, about: dict, ends: Counter, jobs: list[dict]) -> None:
    if file:
        lines = ",\n".join(json.dumps(job) for job in jobs)
        head = json.dumps({**about, "ends": ends}, indent=1, default=str)
        file.write_text(f'{head[:-2]},\n "jobs": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="jobs")
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="with --elastic")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.elastic:
        sys.exit("ours: hang" in soak_elastic(arguments))
    with ThreadPoolExecutor(arguments.at_once) as pool:
        jobs = list(pool.map(kill, range(arguments.first_seed, arguments.first_seed + arguments.kills)))
    ends = Counter(job["end"] for job in jobs)
    seconds = sorted(job["until_all_ended_s"] for job in jobs)
    print(dict(ends), f"median {seconds[len(seconds) // 2]} s, longest {seconds[-1]} s until all others had ended")
    write(arguments.json, provenance(arguments), ends, jobs)
    sys.exit("hang" in ends or any(job["checkpoint"] == "empty" for job in jobs))


if __name__ == "__main__":
    main()
