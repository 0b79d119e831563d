"""The study folder: many runs of one recipe that differ by what was varied, and what they say.

    studies/ex1-lr/
        study.json            the plan, written before anything starts, and what has become of it
        recipes/01-….yaml     one for each arm
        runs/01-…/SEED/…      run folders; what a run printed is in output.txt beside them
        report.html           the page

All paths in it are relative: a study that is moved is still one. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cifarlab import files, stats
from cifarlab.errors import NotARunError, RunError
from cifarlab.rundir import MAX_RECORD_BYTES, RunFolder, find_runs

Design = Literal["grid", "one-at-a-time", "leave-one-out", "search"]
Status = Literal["waiting", "running", "finished", "stopped", "failed", "diverged", "pruned"]
# What is over, and isn't tried again.
ENDED: frozenset[Status] = frozenset({"finished", "diverged", "pruned"})


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Factor(_Record):
    """What is varied: fields, and the values that they take, those of one entry of `values` together.

    Ranges, which a search draws from, have `low` and `high` instead, and are log-uniform. Where both are integers, so
    is what is drawn.
    """

    fields: list[str] = Field(min_length=1)
    values: list[list[Any]] = []
    low: int | float | None = None
    high: int | float | None = None


class Arm(_Record):
    """A recipe of the study. changes: the fields in which it is another than the recipe that was named."""

    id: str = Field(pattern=r"^[\w.+-]{1,120}$")
    name: str
    changes: dict[str, Any] = {}


class Run(_Record):
    """A run of an arm with a seed.

    folder: within the study's; None: there is none yet. val_accuracy: the best, a fraction of 1. seconds: of training.
    images: validated on. losses: a hash of all losses, the same where two runs did the same to the last bit.
    """

    arm: str
    seed: int
    folder: str | None = None
    status: Status = "waiting"
    val_accuracy: float | None = None
    seconds: float | None = None
    images: int | None = None
    losses: str | None = None
    error: str | None = None

    @field_validator("folder")
    @classmethod
    def _within(cls, folder: str | None) -> str | None:
        if folder is not None and (PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts):
            raise ValueError("expected a path within the study's folder")
        return folder


class Look(_Record):
    """A look at the test set. accuracy: a fraction of 1, without test-time augmentation."""

    when: str
    arm: str
    seed: int
    accuracy: float


class Scored(_Record):
    """The looks at the test set so far."""

    looks: list[Look] = []


class Result(_Record):
    """What an arm's runs say. Accuracies and differences are fractions of 1, on validation images; seconds of training.

    n: runs with an accuracy; pairs: seeds for which the baseline has one too. difference: to the baseline, with its
    95 % interval from `low` to `high`; p of the paired t-test, p_holm adjusted for the number of arms that are tested.
    more_seeds: how many would find a difference of the study's `resolve`, where the arm is within noise.
    """

    arm: str
    n: int
    mean: float | None
    std: float | None
    pairs: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str
    more_seeds: int | None = None
    seconds: float | None


class Study(_Record):
    """study.json. The first arm is the baseline. resolve: a difference worth knowing, a fraction of 1."""

    format: Literal[1] = 1
    name: str
    created: str
    cifarlab: str
    command: str
    status: Literal["running", "stopped", "finished"] = "running"
    dataset: str
    design: Design
    factors: list[Factor]
    seeds: list[int] = Field(min_length=1)
    resolve: float = Field(gt=0, lt=1)
    recipe: dict[str, Any]
    # What the first run found to be the fastest here; all arms use it, for which nothing else was said.
    numerics: Any = None
    arms: list[Arm] = Field(min_length=1)
    runs: list[Run]
    results: list[Result] = []
    test: Scored | None = None

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    def runs_of(self, arm: Arm) -> list[Run]:
        return [run for run in self.runs if run.arm == arm.id]


@dataclass(frozen=True)
class StudyFolder:
    path: Path

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """Raises NotARunError where `path` is no study folder."""
        if not (path / "study.json").is_file():
            raise NotARunError(f"{path} is not a study folder: it has no study.json; 'cifarlab ablate' makes one")
        return cls(path)

    def read(self) -> Study:
        """Raises NotARunError."""
        path = self.path / "study.json"
        try:
            if files.regular_size(path) > MAX_RECORD_BYTES:
                raise NotARunError(f"{path} is larger than {MAX_RECORD_BYTES:,} bytes; it was not written by cifarlab")
            return Study.model_validate_json(path.read_bytes())
        except OSError as error:
            raise NotARunError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise NotARunError(f"{path} is damaged: {f'{where}: ' if where else ''}{first['msg'].lower()}") from None

    def write(self, study: Study) -> None:
        """Raises StorageError."""
        files.write_json(self.path / "study.json", study.model_dump(mode="json"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from carrying out the same study. Raises RunError where somebody does."""
        with files.locked(self.path / ".lock", self._refuse_second, required=False):
            yield

    def _refuse_second(self) -> NoReturn:
        raise RunError(f"another process is at work on {self.path} (it holds .lock there); wait until it is done")

    def recipe_file(self, arm: Arm) -> Path:
        return self.path / "recipes" / f"{arm.id}.yaml"

    def place(self, run: Run) -> Path:
        """Where a run's folder is, or goes."""
        return self.path / "runs" / run.arm / str(run.seed)

    def folder(self, run: Run) -> RunFolder | None:
        """A run's folder; None: there is none yet. One that is done counts before others, then the newest."""
        with contextlib.suppress(NotARunError):
            found = find_runs([self.place(run)])
            return max(found, key=lambda folder: (folder.status == "finished", folder.path))
        return None

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def find_studies(places: Sequence[Path]) -> list[StudyFolder]:
    """The study folders among `places` and below them, by path."""
    found = {
        path.parent.resolve(): StudyFolder(path.parent)
        for place in places
        for path in place.rglob("study.json")
        if path.is_file()
    }
    return [found[key] for key in sorted(found)]


def as_recorded(run: Run, study: StudyFolder, folder: RunFolder | None) -> Run:
    """A run's record from what its folder says; what is damaged counts as failed."""
    nothing = {"folder": None, "status": "waiting", "val_accuracy": None, "losses": None, "error": None}
    if folder is None:
        return run.model_copy(update=nothing)
    place = {**nothing, "folder": study.relative(folder.path)}
    try:
        log, done = folder.train_log(), folder.done
        if done:
            log = folder.trained_log()
    except NotARunError as error:
        return run.model_copy(update={**place, "status": "failed", "error": str(error)})
    reason, seconds, images = log.get("error"), log.get("train_time"), None
    with contextlib.suppress(NotARunError, KeyError, TypeError, ValueError):
        images = int(folder.environment()["data"]["images"]["validation"])
    if done:
        figures = [[entry[name] for name in ("train_loss", "val_loss", "val_accuracy")] for entry in log["epochs"]]
        found = {
            "status": "finished",
            "val_accuracy": log["best_val_accuracy"],
            "losses": hashlib.sha256(json.dumps(figures).encode()).hexdigest(),
        }
    elif log.get("status") == "failed":
        found = {"status": "diverged" if "NaN" in str(reason) else "failed"}
    else:
        found = {"status": "pruned" if run.status == "pruned" else "stopped"}
    measured = {"seconds": seconds if isinstance(seconds, int | float) else None, "images": images}
    said = {"error": None if reason is None else str(reason)}
    return run.model_copy(update={**place, **measured, **said, **found})


# --- results --------------------------------------------------------------------------------------


def results(study: Study) -> list[Result]:
    """What the finished runs say of each arm, in the order of the arms. The first, the baseline, is compared with none.

    An arm is tested where it has two pairs or more, all of its runs came to an end, and it isn't identical to the
    baseline; it is better or worse where p, adjusted for the number of tests by Holm's way, is 5 % or less.
    """
    baseline = {run.seed: run for run in study.runs_of(study.baseline) if run.val_accuracy is not None}
    found: list[tuple[Result, stats.Difference | None]] = []
    for arm in study.arms:
        runs = study.runs_of(arm)
        scored = [run for run in runs if run.val_accuracy is not None]
        accuracies = [run.val_accuracy for run in scored if run.val_accuracy is not None]
        seconds = [run.seconds for run in scored if run.seconds is not None]
        result = Result(
            arm=arm.id,
            n=len(scored),
            mean=statistics.fmean(accuracies) if accuracies else None,
            std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            seconds=statistics.fmean(seconds) if seconds else None,
            verdict="baseline" if arm is study.baseline else "no pair yet",
        )
        if arm is study.baseline:
            found.append((result, None))
            continue
        pairs = [(run, baseline[run.seed]) for run in scored if run.seed in baseline]
        images = [run.images for run in scored if run.images]
        differences = [(run.val_accuracy or 0.0) - (other.val_accuracy or 0.0) for run, other in pairs]
        difference = stats.paired_difference(differences, 1 / min(images) if images else 0.0)
        diverged = sum(run.status == "diverged" for run in runs)
        result.pairs, result.difference = difference.n, difference.mean
        identical = bool(pairs) and all(run.losses is not None and run.losses == other.losses for run, other in pairs)
        tested = difference
        if diverged:
            result.verdict = f"diverged in {diverged} of {len(runs)}"
        elif identical:
            result.verdict = "identical"
        elif len(pairs) == 1:
            result.verdict = "one pair: no telling"
        elif pairs:
            result.low, result.high, result.p = tested.low, tested.high, tested.p
        found.append((result, tested))
    _judge(found, study.resolve)
    return [result for result, _ in found]


def _judge(found: list[tuple[Result, stats.Difference | None]], resolve: float) -> None:
    """Give those that have a p their adjusted one, and a verdict."""
    tested = [(result, difference) for result, difference in found if result.p is not None and difference is not None]
    adjusted = stats.holm([result.p for result, _ in tested if result.p is not None])
    for (result, difference), p_holm in zip(tested, adjusted, strict=True):
        result.p_holm = p_holm
        if p_holm <= stats.ALPHA:
            result.verdict = "better" if (result.difference or 0) > 0 else "worse"
            continue
        result.verdict = "within noise"
        needed = stats.seeds_needed(resolve, difference.std or 0.0, len(tested))
        result.more_seeds = None if needed is None else max(0, needed - result.pairs)


def winner(study: Study) -> Arm:
    """The arm with the highest mean validation accuracy of those whose runs all finished; the baseline, of equals."""
    best, highest = study.baseline, -1.0
    for arm in study.arms:
        accuracies = [run.val_accuracy for run in study.runs_of(arm)]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if known and len(known) == len(accuracies) and statistics.fmean(known) > highest:
            best, highest = arm, statistics.fmean(known)
    return best
