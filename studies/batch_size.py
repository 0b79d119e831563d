"""Which batch size gets the most accuracy out of a minute?

    python studies/batch_size.py --data DIR

Each size first trains for an epoch, which says how many images a second this machine does with it. Then
`cifarlab ablate` gives each as many epochs as fit into the same time. The learning rate goes with the square root of
the batch size, as Adam's should (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms",
arXiv 2205.10287). Nothing else should run on the machine meanwhile. The same command goes on with what was stopped.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from study import Plan, Study, add_arguments

RECIPE, DATASET, BASE = "ex1", "cifar10", 128
SIZES = (32, 64, 128, 256, 512, 1024)
SETTINGS = ("schedule={name: cosine}", "train.numerics=auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "runs/batch-size")
    parser.add_argument("--studies", type=Path, default=Path("studies"), help="where the study's folder goes")
    parser.add_argument("--seconds", type=float, default=40, help="of training that each run gets")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    epochs = {size: arguments.seconds / seconds for size, seconds in epoch_times(arguments).items()}
    others = [size for size in SIZES if size != BASE]
    factor: dict[str, list[float]] = {
        "train.batch_size": [*others],
        "optimizer.lr": [rate(size) for size in others],
        "train.epochs": [round(epochs[size], 2) for size in others],
    }
    command = [sys.executable, "-m", "cifarlab", "ablate", RECIPE, "--dataset", DATASET, "--name", "batch-size"]
    command += ["--design", "one-at-a-time", "--seeds", str(arguments.seeds), "--studies", str(arguments.studies)]
    command += ["--data", str(arguments.data), "--device", arguments.device]
    command += ["--vary", ";".join(f"{field}={','.join(map(str, values))}" for field, values in factor.items())]
    for setting in (*SETTINGS, f"train.epochs={epochs[BASE]:.2f}"):
        command += ["--set", setting]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def rate(size: int) -> float:
    return round(1e-3 * math.sqrt(size / BASE), 6)


def epoch_times(arguments: argparse.Namespace) -> dict[int, float]:
    """Seconds of training that an epoch takes with each batch size, after one that warms up."""
    study = Study(arguments.data, arguments.runs, 1, arguments.device)
    times = {}
    for size in SIZES:
        settings = (*SETTINGS, f"train.batch_size={size}", f"optimizer.lr={rate(size)}", "train.epochs=2")
        folder = study.run(Plan(f"{RECIPE}/{size}", RECIPE, DATASET, 0, settings))
        times[size] = folder.train_log()["epochs"][-1]["seconds"]
        print(f"batch size {size}: {times[size]:.1f} s an epoch", flush=True)
    return times


if __name__ == "__main__":
    main()
