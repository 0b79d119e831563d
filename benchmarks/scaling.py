"""Images per second of one process and of several, side by side: what dividing a batch among processes costs and gains.

    python benchmarks/scaling.py --recipe ex2 --processes 2 --rounds 3

Each process has one thread, so on two cores two of them have twice of what one has; one process with as many threads is
measured as well, which is what a single run does by default. Rounds alternate between the arrangements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="ex2")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1920)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    ways = {
        "one process, one thread": (1, 1),
        f"one process, {options.processes} threads": (1, options.processes),
        f"{options.processes} processes, one thread each": (options.processes, 1),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for way, (processes, threads) in ways.items():
            rates[way].append(measure(options, processes, threads))
            print(f"round {number + 1}: {way}: {rates[way][-1]:.1f} images/s", flush=True)
    first = statistics.median(rates["one process, one thread"])
    for way, found in rates.items():
        middle = statistics.median(found)
        print(f"{way}: {middle:.1f} images/s, {middle / first:.2f} times the first")


def measure(options: argparse.Namespace, processes: int, threads: int) -> float:
    """Images per second of a short run's training, by its train.json."""
    settings = [
        "train.epochs=2", f"data.limit={options.images}", "train.numerics=exact", "evaluate.test=false",
        "data.validation=0", *options.set,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "cifarlab", "run", options.recipe, "--dataset", options.dataset, "--device", "cpu"]
        command += ["--runs", runs, *(part for value in settings for part in ("--set", value))]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        log = json.loads(next(Path(runs).rglob("train.json")).read_text())
    # The first epoch has the first steps in it, which make all things ready.
    entry = log["epochs"][-1]
    return float(options.images / entry["seconds"])


if __name__ == "__main__":
    main()
