"""What studies share: runs as processes, several at a time if asked, none twice; and rows of tables of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cifarlab.compare import Figure, percent, seconds
from cifarlab.errors import NotARunError
from cifarlab.rundir import RunFolder, find_runs


class Plan(NamedTuple):
    """A run. name: of its place among the study's runs. test: whether the test set is scored at its end."""

    name: str
    recipe: str
    dataset: str
    seed: int
    overrides: tuple[str, ...] = ()
    test: bool = False


class Study(NamedTuple):
    """Where a study's data and runs are, and how many run at a time, the cores shared out among them.

    cold: each run begins with nothing measured or kept by an earlier one, as on a new machine.
    """

    data: Path
    runs: Path
    jobs: int
    device: str
    cold: bool = False

    def run_all(self, plans: Sequence[Plan]) -> list[RunFolder]:
        """The finished runs, in the order of the plans: those that are there already, and new ones."""
        pool = ThreadPoolExecutor(self.jobs)  # threads that wait for processes
        try:
            return list(pool.map(self.run, plans))
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self, plan: Plan) -> RunFolder:
        place = self._place(plan) / str(plan.seed)
        if (folder := _finished(place, plan.test)) is not None:
            return folder
        command = self._command(plan, place, "--seed", str(plan.seed))
        environment = dict(os.environ)
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with tempfile.TemporaryDirectory() as empty:
            if self.cold:
                environment |= dict.fromkeys(("CIFARLAB_DATA", "TORCHINDUCTOR_CACHE_DIR"), empty)
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL if self.jobs > 1 else None, check=False
            )
        if (folder := _finished(place, plan.test)) is None:
            raise SystemExit(done.returncode or f"stopped; the runs so far are in {self.runs}")
        return folder

    def run_together(self, plan: Plan, seeds: range) -> list[RunFolder]:
        """The finished runs of a plan with each of some seeds, from the recipe's own on, in one process."""
        place = self._place(plan) / "together"
        found = [folder for folder in _runs(place) if _is_finished(folder, plan.test)]
        if len(found) < len(seeds):
            done = subprocess.run(self._command(plan, place, "--seeds", str(len(seeds))), check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
            found = [folder for folder in _runs(place) if _is_finished(folder, plan.test)]
        by_seed = {folder.recipe().seed: folder for folder in found}
        return [by_seed[seed] for seed in seeds]

    def _place(self, plan: Plan) -> Path:
        """Of a plan's runs: what is finished with other settings is no run of it."""
        settings = hashlib.sha256("\n".join(plan.overrides).encode()).hexdigest()[:8]
        return self.runs / plan.dataset / f"{plan.name.replace(' ', '_')}-{settings}"

    def _command(self, plan: Plan, place: Path, *seeds: str) -> list[str]:
        command = [sys.executable, "-m", "cifarlab", "run", plan.recipe, "--dataset", plan.dataset, *seeds]
        command += ["--data", str(self.data), "--runs", str(place), "--device", self.device]
        for value in (*plan.overrides, f"evaluate.test={str(plan.test).lower()}"):
            command += ["--set", value]
        return command


def add_arguments(parser: argparse.ArgumentParser, runs: str) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-10 and CIFAR-100")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where the runs are, or go")
    parser.add_argument("--device", default="auto")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")


def score(folder: RunFolder) -> float:
    """The best validation accuracy; 0 of a run whose loss became NaN."""
    return 0.0 if _diverged(folder) else folder.train_log()["best_val_accuracy"]


def row(name: str, folders: Sequence[RunFolder]) -> str:
    """A line of a Markdown table: validation and test accuracy, training time, as mean ± std of some runs."""
    logs = [folder.train_log() for folder in folders]
    cells = [name, percent(Figure.of([score(folder) for folder in folders]))]
    tests = [log["accuracy"] for folder in folders if (log := folder.test_log()) is not None]
    if tests:
        cells.append(percent(Figure.of(tests)))
    return line(*cells, seconds(Figure.of([log["train_time"] for log in logs])))


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _finished(place: Path, test: bool) -> RunFolder | None:
    return next((folder for folder in _runs(place) if _is_finished(folder, test) or _diverged(folder)), None)


def _runs(place: Path) -> list[RunFolder]:
    with contextlib.suppress(NotARunError):  # there is none yet
        return find_runs([place])
    return []


def _is_finished(folder: RunFolder, test: bool) -> bool:
    return folder.train_log()["status"] == "finished" and (folder.test_log() is not None or not test)


def _diverged(folder: RunFolder) -> bool:
    log = folder.train_log()
    return log["status"] == "failed" and "NaN" in log["error"]
