"""A study carried out: its plan written down, runs started as processes, statistics, and one look at the test set.

Nothing here trains. A run is `cifarlab run` or `cifarlab resume` in another process, here or on a cluster; what it
leaves is its folder, and what is known of it is read from there. So a study that was interrupted goes on by the same
command: finished runs stay, those that were begun are resumed.
"""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from cifarlab import __version__, files
from cifarlab.errors import DataError, NotARunError, RecipeError, RunError, UsageError
from cifarlab.factors import make_arms, varied
from cifarlab.recipe import Recipe, make_recipe
from cifarlab.rundir import RunFolder
from cifarlab.study import (
    ENDED,
    Arm,
    Design,
    Factor,
    Look,
    Run,
    Scored,
    Study,
    StudyFolder,
    as_recorded,
    results,
    winner,
)

Report = Callable[[str], None]
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One run to be carried out. arguments: of `cifarlab`; place: the folder that it writes into."""

    title: str
    arguments: tuple[str, ...]
    place: Path


class Workers(Protocol):
    """Where runs are carried out, `slots` at a time."""

    slots: int

    def run(self, task: Task, stop: Callable[[], bool]) -> int:
        """Carry a task out and return its exit code. Once `stop` says so, it is asked to save and end.

        Called from as many threads as there are slots.
        """

    def close(self) -> None:
        """End what runs at once."""


@dataclass
class Conduct:
    """How a study is carried out, which changes nothing that it finds.

    budget: seconds after which nothing is started and what runs is stopped; None: as long as it takes.
    """

    data: Path | None = None
    device: str = "auto"
    budget: float | None = None
    stopped: threading.Event = field(default_factory=threading.Event)


def plan_study(
    name: str,
    recipe: Recipe,
    factors: Sequence[Factor],
    design: Design,
    *,
    dataset: str,
    seeds: Sequence[int],
    resolve: float,
    command: Sequence[str],
) -> Study:
    """The plan of a study, every arm's recipe checked. resolve: a fraction of 1.

    Raises RecipeError and UsageError for what can't be varied or compared.
    """
    recipe = recipe.resolved(dataset=dataset, seed=seeds[0])
    if recipe.data.validation == 0:
        raise RecipeError(
            f"{recipe.name}: data.validation is 0, and a study decides by validation accuracy; "
            "add --set data.validation=0.1"
        )
    arms = make_arms(recipe, factors, design)
    for arm, made in arms:
        if made.train.batch_size == "auto":
            raise RecipeError(f"train.batch_size is auto ({arm.name}): arms need the same one; set a number")
    return Study(
        name=name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        cifarlab=__version__,
        command=shlex.join(command),
        dataset=recipe.datasets[0],
        design=design,
        factors=list(factors),
        seeds=list(seeds),
        resolve=resolve,
        recipe=recipe.to_dict(),
        arms=[arm for arm, _ in arms],
        # Seed by seed, so that a study which is stopped has whole pairs.
        runs=[Run(arm=arm.id, seed=seed) for seed in seeds for arm, _ in arms],
    )


def open_or_create(place: Path, plan: Study) -> tuple[StudyFolder, bool]:
    """The study's folder, and whether it was there: with the same plan it goes on, also with more seeds.

    Raises UsageError where there is another study of that name, StorageError.
    """
    folder = StudyFolder(place)
    if not (place / "study.json").exists():
        with suppress(OSError):
            if any(entry.name != ".lock" for entry in place.iterdir()):
                raise UsageError(f"{place} is there already and is no study; give another --name")
        files.make_folder(place)
        return folder, False
    there = folder.read()
    changed = [
        name
        for name in ("recipe", "dataset", "design", "factors", "resolve")
        if there.model_dump()[name] != plan.model_dump()[name]
    ]
    if there.seeds != plan.seeds[: len(there.seeds)]:
        changed.append("seeds")
    if changed:
        raise UsageError(
            f"{place} is another study of that name ({', '.join(changed)} differ); its command was: {there.command}; "
            "give another --name"
        )
    return folder, True


def merged(there: Study, plan: Study) -> Study:
    """The study that is there, with the seeds that the plan has more."""
    known = {(run.arm, run.seed) for run in there.runs}
    more = [Run(arm=arm.id, seed=seed) for seed in plan.seeds for arm in there.arms if (arm.id, seed) not in known]
    return there.model_copy(update={"seeds": plan.seeds, "runs": [*there.runs, *more]})


class Conductor:
    """Carries a study out. All that it knows is in the study's folder."""

    def __init__(self, folder: StudyFolder, study: Study, workers: Workers, conduct: Conduct, report: Report) -> None:
        self.folder, self.study = folder, study
        self.workers, self.conduct, self.report = workers, conduct, report
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._took: dict[tuple[str, int], float] = {}

    def carry_out(self) -> Study:
        """Run what is left, and look at the test set once all is done. Returns the study as it is then.

        Raises DataError where a run can't read its data, RunError where the first comes to nothing, as the others would
        too; what else fails is left for the same command to try again.
        """
        self._look_again()
        files.make_folder(self.folder.path / "recipes")
        self._write_recipes()
        self._update(status="running")
        waiting = [run for run in self.study.runs if run.status not in ENDED]
        if waiting:
            self._carry_out_all(waiting)
        self._go_further()
        if any(run.status not in ENDED for run in self.study.runs):
            self._update(status="stopped")
        else:
            self._score()
            self._update(status="finished")
        return self.study

    def _go_further(self) -> None:
        """What is found to be done on the way: nothing, where the plan has all."""

    # --- runs ---

    def _carry_out_all(self, waiting: list[Run]) -> None:
        with self._pool() as pool:
            first = pool.submit(self._carry_out, waiting[0])
            self._wait_for_numerics(first, waiting[0])
            wait_for([first, *(pool.submit(self._carry_out, run) for run in waiting[1:])])

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        """A thread for each run at a time. Where something goes wrong, all that run are ended."""
        pool = ThreadPoolExecutor(self.workers.slots)
        try:
            yield pool
        except BaseException:
            self.conduct.stopped.set()
            self.workers.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _wait_for_numerics(self, first: Future[Run], run: Run) -> None:
        """Once the first run has found the fastest numerics, all arms have them: timed apart, they might differ."""
        if make_recipe(self.study.recipe).train.numerics != "auto" or self.study.numerics is not None:
            return
        while True:
            ended = first.done()
            folder = self.folder.folder(run)
            if folder is not None:
                with suppress(NotARunError):
                    chosen = folder.recipe_values()["train"]["numerics"]
                    self._update(numerics=chosen)
                    self._write_recipes()
                    return
            if ended:
                first.result()
                raise RunError(self._failed(run))
            wait([first], timeout=WATCH_SECONDS)

    def _carry_out(self, run: Run, hopeless: Callable[[], bool] = lambda: False) -> Run:
        """Carry a run out, or on, and return its record. One that is `hopeless` is given up, and counts as pruned."""
        if self._over():
            return run
        arm = next(arm for arm in self.study.arms if arm.id == run.arm)
        before = self.folder.folder(run)
        self._record(run.model_copy(update={"status": "running", "error": None}))
        place = self.folder.place(run)
        files.make_folder(place)
        if before is None:
            arguments = ["run", str(self.folder.recipe_file(arm)), "--dataset", self.study.dataset]
            arguments += ["--seed", str(run.seed), "--runs", str(place)]
        else:
            self._wait_for_another(before)
            arguments = ["resume", str(before.path)]
        began = time.monotonic()
        title = f"{arm.name} seed {run.seed}"
        given_up = False

        def stop() -> bool:
            nonlocal given_up
            given_up = given_up or hopeless()
            return given_up or self._over()

        code = self.workers.run(Task(title, (*arguments, *self._common()), place), stop)
        found = as_recorded(run, self.folder, self.folder.folder(run))
        if given_up and found.status == "stopped":
            found = found.model_copy(update={"status": "pruned"})
        if found.status == "waiting" or (code and found.status == "finished"):
            reason = last_line(place / "output.txt")
            found = found.model_copy(update={"status": "failed", "error": reason or f"it ended with exit code {code}"})
            if code == DataError.exit_code:  # for the others too
                self._record(found)
                self.conduct.stopped.set()
                raise DataError(found.error or f"{title}: its data could not be read")
        if before is None and found.status == "finished":
            self._took[run.arm, run.seed] = time.monotonic() - began
        self._record(found)
        self._tell(arm, found, time.monotonic() - began)
        return found

    def _common(self) -> list[str]:
        """What every command gets."""
        data = ["--data", str(self.conduct.data)] if self.conduct.data is not None else []
        return [*data, "--device", self.conduct.device]

    def _wait_for_another(self, folder: RunFolder) -> None:
        """A run that a killed study left behind may still be at work."""
        told = False
        while not self._over():
            try:
                with folder.locked():
                    return
            except RunError as error:
                if not told:
                    self.report(f"waiting: {error}")
                told = True
                time.sleep(WATCH_SECONDS)

    def _over(self) -> bool:
        """Whether nothing more is to be done: stopped by a signal, or the budget is spent."""
        left = self._left()
        return self.conduct.stopped.is_set() or (left is not None and left <= 0)

    def _left(self) -> float | None:
        return None if self.conduct.budget is None else self.conduct.budget - (time.monotonic() - self._began)

    # --- the test set ---

    def _score(self) -> None:
        """Look at the test set for the runs of the winner and of the baseline, each once, if the recipe wants that."""
        if not make_recipe(self.study.recipe).evaluate.test:
            return
        scored = self.study.test or Scored()
        looked = {(look.arm, look.seed) for look in scored.looks}
        arms = dict.fromkeys([winner(self.study).id, self.study.baseline.id])
        for run in self.study.runs:
            if run.arm not in arms or run.status != "finished" or (run.arm, run.seed) in looked or self._over():
                continue
            folder = self.folder.folder(run)
            if folder is None:
                continue
            log = folder.test_log()
            if log is None:
                self.report(f"test set: {run.arm} seed {run.seed}")
                arguments = ("test", str(folder.path), *self._common())
                self.workers.run(
                    Task(f"test of {run.arm} seed {run.seed}", arguments, self.folder.place(run)), self._over
                )
                log = folder.test_log()
            if log is None:
                raise RunError(f"{folder.path} could not be scored: {last_line(self.folder.place(run) / 'output.txt')}")
            when = datetime.now().astimezone().isoformat(timespec="seconds")
            look = Look(when=when, arm=run.arm, seed=run.seed, accuracy=log["accuracy"])
            scored = Scored(looks=[*scored.looks, look])
            self._update(test=scored)

    # --- the record ---

    def _look_again(self) -> None:
        """What the run folders say, whatever was written down before."""
        runs = [as_recorded(run, self.folder, self.folder.folder(run)) for run in self.study.runs]
        self.study = self.study.model_copy(update={"runs": runs})

    def _write_recipes(self) -> None:
        base = make_recipe(self.study.recipe)
        changes: dict[str, Any] = {"evaluate.test": False}
        if self.study.numerics is not None:
            changes["train.numerics"] = self.study.numerics
        for arm in self.study.arms:
            text = varied(base, changes | arm.changes).to_yaml()
            path = self.folder.recipe_file(arm)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                files.write_text(path, text)

    def _record(self, run: Run) -> None:
        with self._lock:
            runs = [run if (old.arm, old.seed) == (run.arm, run.seed) else old for old in self.study.runs]
            self._update(runs=runs)

    def _update(self, **values: Any) -> None:
        with self._lock:
            study = self.study.model_copy(update=values)
            self.study = study.model_copy(update={"results": results(study)})
            self.folder.write(self.study)

    def _tell(self, arm: Arm, run: Run, seconds: float) -> None:
        """A line for a run that is over."""
        ended = sum(run.status in ENDED for run in self.study.runs)
        what = {
            "finished": f"{run.val_accuracy or 0:.2%} in {seconds:.0f} s",
            "diverged": "its loss became NaN or infinite",
            "failed": f"failed: {run.error}",
        }.get(run.status, run.status)
        left = self._time_left()
        about = f"; about {in_words(left)} left" if left else ""
        self.report(f"[{ended}/{len(self.study.runs)}] {arm.name} seed {run.seed}: {what}{about}")

    def _failed(self, run: Run) -> str:
        found = next(each for each in self.study.runs if (each.arm, each.seed) == (run.arm, run.seed))
        return f"the study's first run did not get as far as training: {found.error or found.status}"

    def _time_left(self) -> float | None:
        """Seconds until all is done, by the runs of each arm so far, and by all for arms without any; None: unknown."""
        if not self._took:
            return None
        mean = sum(self._took.values()) / len(self._took)
        total = 0.0
        for run in self.study.runs:
            if run.status not in ENDED:
                own = [took for (arm, _), took in self._took.items() if arm == run.arm]
                total += sum(own) / len(own) if own else mean
        seconds = total / self.workers.slots
        left = self._left()
        return seconds if left is None else min(seconds, left)


def wait_for(futures: Sequence[Future[Any]]) -> None:
    """Wait until all are done, or one fails. In short waits, as a signal is handled between them."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=WATCH_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()


def last_line(path: Path) -> str | None:
    """The last line of what a run printed, without the program's name: its error, where it failed."""
    with suppress(OSError):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("cifarlab: ") if lines else None
    return None


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def command_of(task: Task) -> list[str]:
    return [sys.executable, "-m", "cifarlab", *task.arguments]


def unfinished(study: Study) -> Iterator[Run]:
    """The runs that the same command would try again."""
    return (run for run in study.runs if run.status not in ENDED)
