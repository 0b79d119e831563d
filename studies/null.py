"""How often does a study find something where there is nothing? It should: in one of twenty.

    python studies/null.py --data DIR

One small recipe runs with 40 seeds. Then, 1,000 times, two arms of five seeds are drawn from these runs, and judged as
`cifarlab ablate` judges them. All are the same recipe, so whatever is not "within noise" is a false find.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter

from cifarlab.compare import Figure, percent
from cifarlab.rundir import find_runs
from cifarlab.study import Arm, Run, Study, results
from study import add_arguments

SEEDS, DRAWS, PAIRS = 40, 1_000, 5
SETTINGS = ("train.epochs=3", "data.limit=5000", "evaluate.test=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "runs/null")
    arguments = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "cifarlab",
        "run",
        "ex1",
        "--dataset",
        "cifar10",
        "--seeds",
        str(SEEDS),
        "--resume",
    ]
    command += ["--data", str(arguments.data), "--runs", str(arguments.runs), "--device", arguments.device]
    for setting in SETTINGS:
        command += ["--set", setting]
    subprocess.run(command, check=True)
    logs = [run.trained_log() for run in find_runs([arguments.runs])]
    accuracies = [log["best_val_accuracy"] for log in logs]
    images = find_runs([arguments.runs])[0].environment()["data"]["images"]["validation"]
    print(f"{len(accuracies)} runs: validation accuracy {percent(Figure.of(accuracies))}")
    generator = random.Random(0)
    verdicts = Counter(judged(generator.sample(accuracies, 2 * PAIRS), images) for _ in range(DRAWS))
    print(f"{DRAWS:,} draws of two arms of {PAIRS}: " + ", ".join(f"{word} {n}" for word, n in verdicts.most_common()))


def judged(accuracies: list[float], images: int) -> str:
    """The verdict on the second half of some accuracies, beside the first."""
    runs = [
        Run(
            arm=("first", "second")[number // PAIRS],
            seed=number % PAIRS,
            status="finished",
            val_accuracy=accuracy,
            images=images,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    study = Study(
        name="null", created="", cifarlab="", command="", dataset="cifar10", design="grid", factors=[],
        seeds=list(range(PAIRS)), resolve=0.002, recipe={}, runs=runs,
        arms=[Arm(id="first", name="first"), Arm(id="second", name="second")],
    )  # fmt: skip
    return results(study)[1].verdict


if __name__ == "__main__":
    main()
