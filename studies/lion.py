"""Is Lion worth it? Adam, AdamW and Lion on EfficientNet-Lite0: a grid, then fresh seeds of the best. For docs/lion.md.

    python studies/lion.py --data DIR --runs FOLDER --jobs 2

The grid (seed 0) is decided by validation accuracy, its test images left alone; what is far behind on CIFAR-10 is not
tried on CIFAR-100. The two best settings, the best of each optimizer, and Lion as the report had it run again with the
seeds 1, 2 and 3, which had no say in the choice; these are tested.
A run whose loss became NaN counts as 0 %. What is finished is not run again, so the study can be interrupted. About two
hours on two cores, with a job on each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cifarlab.compare import Figure, percent, seconds
from cifarlab.errors import NotARunError
from cifarlab.rundir import RunFolder, find_runs

DATASETS = ("cifar10", "cifar100")
SEEDS = (1, 2, 3)
COMMON = (
    "data.limit=10000",
    "train.resolution=64",
    "augment.crop_padding=8",
    "train.epochs=4",
    "train.checkpoint_every=null",
)
# A setting that was so far behind the best of its optimizer on one dataset is not tried on the next.
FAR = 0.08


class Setting(NamedTuple):
    optimizer: str
    lr: float
    weight_decay: float

    def overrides(self) -> list[str]:
        return [f"optimizer.{name}={value}" for name, value in zip(("name", "lr", "weight_decay"), self, strict=True)]

    def __str__(self) -> str:
        return f"{self.optimizer} {self.lr:g} {self.weight_decay:g}"


REPORTED = Setting("lion", 1e-4, 1e-4)
GRID = (
    # Adam's decay is part of the gradient, and hardly matters at this size: EX-4's, with higher rates.
    *(Setting("adam", lr, 1e-4) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    # AdamW's and Lion's shrinks the weights by lr x decay a step.
    *(
        Setting("adamw", lr, decay)
        for lr, decay in ((3e-4, 1e-2), (1e-3, 1e-2), (1e-3, 1e-1), (3e-3, 1e-2), (1e-2, 1e-2), (3e-2, 1e-2))
    ),
    REPORTED,
    # From a third to a tenth of EX-4's rate, with as much more decay, and with AdamW's; then higher rates.
    *(
        Setting("lion", lr, decay)
        for lr, decay in (
            *((1e-5, 1e-3), (3e-5, 3e-4), (1e-5, 1e-1), (3e-5, 3e-2), (3e-5, 3e-1), (1e-4, 1e-1)),
            *((2e-4, 3e-2), (3e-4, 1e-2), (3e-4, 1e-1), (1e-3, 1e-2)),
        )
    ),
)


def run(setting: Setting, dataset: str, seed: int, test: bool, arguments: argparse.Namespace) -> RunFolder:
    """A finished run's folder: the one that is there, or a new one."""
    place = arguments.runs / dataset / str(setting).replace(" ", "_") / str(seed)
    if (folder := finished(place, test)) is not None:
        return folder
    overrides = [*COMMON, *setting.overrides(), f"evaluate.test={str(test).lower()}"]
    command = [sys.executable, "-m", "cifarlab", "run", "ex4-lite0", "--dataset", dataset, "--seed", str(seed)]
    command += ["--data", str(arguments.data), "--runs", str(place), "--device", arguments.device]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // arguments.jobs))} if arguments.jobs > 1 else {}
    command += [part for value in overrides for part in ("--set", value)]
    output = subprocess.DEVNULL if threads else None
    done = subprocess.run(command, env=os.environ | threads, stdout=output, check=False)
    folder = finished(place, test)
    if folder is None:
        raise SystemExit(done.returncode or f"stopped; the runs so far are in {arguments.runs}")
    return folder


def finished(place: Path, test: bool) -> RunFolder | None:
    with contextlib.suppress(NotARunError):  # there is none yet
        for folder in find_runs([place]):
            tested = folder.train_log()["status"] == "finished" and (folder.test_log() is not None or not test)
            if tested or diverged(folder):
                return folder
    return None


def diverged(folder: RunFolder) -> bool:
    log = folder.train_log()
    return log["status"] == "failed" and "NaN" in log["error"]


def score(folder: RunFolder) -> float:
    return 0.0 if diverged(folder) else folder.train_log()["best_val_accuracy"]


def row(name: str, folders: list[RunFolder]) -> str:
    """A line of a Markdown table: validation and test accuracy, training time, as mean ± std of some runs."""
    logs = [folder.train_log() for folder in folders]
    cells = [name, percent(Figure.of([score(folder) for folder in folders]))]
    tests = [log["accuracy"] for folder in folders if (log := folder.test_log()) is not None]
    if tests:
        cells.append(percent(Figure.of(tests)))
    return "| " + " | ".join([*cells, seconds(Figure.of([log["train_time"] for log in logs]))]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-10 and CIFAR-100")
    parser.add_argument("--runs", type=Path, default=Path("runs/lion"), help="where the runs are, or go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    pool = ThreadPoolExecutor(arguments.jobs)  # threads that wait for processes
    try:
        settings = list(GRID)
        for dataset in DATASETS:
            settings = study(dataset, settings, pool, arguments)
    finally:
        pool.shutdown(cancel_futures=True)


def study(
    dataset: str, settings: list[Setting], pool: ThreadPoolExecutor, arguments: argparse.Namespace
) -> list[Setting]:
    """The grid and the fresh seeds of one dataset, and their tables. Returns the settings that are not far behind."""

    def run_all(pairs: list[tuple[Setting, int]], test: bool) -> dict[tuple[Setting, int], RunFolder]:
        folders = pool.map(lambda pair: run(pair[0], dataset, pair[1], test, arguments), pairs)
        return dict(zip(pairs, folders, strict=True))

    grid = {setting: folder for (setting, _), folder in run_all([(setting, 0) for setting in settings], False).items()}
    print(f"\n{dataset}, seed 0\n")
    for setting, folder in grid.items():
        print(row(str(setting), [folder]), flush=True)
    scores = {setting: score(grid[setting]) for setting in settings}
    ranked = sorted(settings, key=lambda setting: scores[setting], reverse=True)
    best_of_each = {setting.optimizer: setting for setting in reversed(ranked)}
    chosen = list(dict.fromkeys([*ranked[:2], *best_of_each.values(), REPORTED]))
    finals = run_all([(setting, seed) for setting in chosen for seed in SEEDS], True)
    print(f"\n{dataset}, seeds {SEEDS}\n")
    for setting in chosen:
        print(row(str(setting), [finals[setting, seed] for seed in SEEDS]), flush=True)
    return [one for one in settings if one == REPORTED or scores[one] >= scores[best_of_each[one.optimizer]] - FAR]


if __name__ == "__main__":
    main()
