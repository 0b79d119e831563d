"""Every fault, everywhere: `make torture`. Prints how often each was tried, and what came of it.

python tests/torture.py [--kills 50] [--jobs 2] [--every 2]

By default each way takes every second operation, beginning with the first or the second in turn: 20 minutes on two
cores. `--every 1` takes all.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
from test_faults import differences, disturbed, killed_at_random

WORDS = {
    "ENOSPC": "the disk is full at that moment",
    "full": "the disk is full from then on",
    "EIO": "the disk reports an error",
    "memory": "memory runs out",
    "short": "a write writes a part and says so",
    "kill": "SIGKILL just before",
    "kill within": "SIGKILL after a part of a write",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=2, help="1: each operation; 5: each fifth")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        straight = faults.run(folder / "straight")
        left = faults.outcome(folder / "straight")
        count = len(straight.operations)
        sys.stdout.write(f"a run of {faults.STEPS} steps: {count} operations on the disk\n\n")
        sys.stdout.write(
            "| fault | times | ended with a sentence | killed | went on | lost |\n|---|---:|---:|---:|---:|---|\n"
        )
        for turn, how in enumerate(faults.HOWS):
            numbers = range(1 + turn % arguments.every, count + 1, arguments.every)
            cases = [(folder / f"{how} {nth}", nth, how, left) for nth in numbers]
            with ThreadPoolExecutor(arguments.jobs) as pool:
                ended = [one for one in pool.map(lambda case: disturbed(*case), cases) if one.happened]
            codes = collections.Counter("killed" if one.code < 0 else "said" if one.code else "on" for one in ended)
            row = (WORDS[how], len(ended), codes["said"], codes["killed"], codes["on"], "nothing")
            sys.stdout.write("| " + " | ".join(map(str, row)) + " |\n")
            sys.stdout.flush()
        generator = random.Random()
        kills = runs = 0
        while kills < arguments.kills:
            runs += 1
            kills += killed_at_random(folder / f"random {runs}", generator)
            assert differences(faults.outcome(folder / f"random {runs}"), left) == []
        row = (f"SIGKILL at a random moment, {runs} runs to their ends", kills, 0, kills, 0, "nothing")
        sys.stdout.write("| " + " | ".join(map(str, row)) + " |\n")
    sys.stdout.write(
        f"\n{(time.monotonic() - began) / 60:.0f} minutes; whatever fails ends this with an AssertionError\n"
    )


if __name__ == "__main__":
    main()
