"""Kills a random rank of a job at a random moment, again and again: do all others end, and how?

    python tests/soak.py --kills 200 --json FILE

Ranks are processes that nobody watches over (`horovod_jobs.separate_ranks`), so that only Horovod's own errors end them. A job
that has not ended a minute after the kill hangs. Now and then Gloo aborts a rank by itself: "another error". The checkpoint,
which rank 0 writes before each step, must be whole.
"""

import argparse
import json
import random
import sys
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="jobs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.at_once) as pool:
        jobs = list(pool.map(kill, range(arguments.first_seed, arguments.first_seed + arguments.kills)))
    ends = Counter(job["end"] for job in jobs)
    seconds = sorted(job["until_all_ended_s"] for job in jobs)
    print(dict(ends), f"median {seconds[len(seconds) // 2]} s, longest {seconds[-1]} s until all others had ended")
    if arguments.json:
        lines = ",\n".join(json.dumps(job) for job in jobs)
        head = json.dumps({**provenance(arguments), "ends": ends}, indent=1, default=str)
        arguments.json.write_text(f'{head[:-2]},\n "jobs": [\n{lines}\n]}}\n')
    sys.exit("hang" in ends or any(job["checkpoint"] == "empty" for job in jobs))


if __name__ == "__main__":
    main()
