"""A run's seconds: how many are left for its steps, once what comes after them is taken off.

After the last step the network is evaluated, on validation, training and test images, and the record is written: what
that takes is foreseen from what evaluation took so far, and from what writing took in earlier runs on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cifarlab import remembered
from cifarlab.errors import UsageError
from cifarlab.recipe import Recipe
from cifarlab.recipe_base import Duration
from cifarlab.recipe_schedule import CosineSchedule

# A warm-up, or a head that trains alone, is at most such a share of a run.
BEGINNING = 0.1
# Schedules whose rate doesn't come to its end with the run.
ENDLESS = frozenset({"constant", "step", "multistep", "exponential", "plateau"})
# Of the time for training, what validation in its course may take.
LOOKS = 0.1
# Seconds that pictures, page and table take where no run has ended yet; and that the end of the process takes.
FINISHING, LEAVING = 5.0, 0.7
# A run is taken to have kept to its budget within this share of it, or so many seconds.
TOLERANCE_SHARE, TOLERANCE_SECONDS = 0.03, 2.0


class Budget:
    """seconds: of the whole run, from `began` on, a `time.time()`. now: the clock that all of it goes by.

    looks_after: how many images are evaluated once the last step is taken, each view of one counted; looks_on_test:
    those of them that are test images.
    planned: what was expected of the run, for its record.
    """

    def __init__(
        self,
        seconds: float,
        began: float,
        *,
        finishing: float = FINISHING,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.seconds = seconds
        self.planned: dict[str, Any] = {}
        self.looks_after = self.looks_on_test = 0
        self.finishing = finishing
        self.per_look: float | None = None
        self._began, self.now = began, now

    def spent(self) -> float:
        return self.now() - self._began

    def left(self) -> float:
        return self.seconds - self.spent()

    def after(self) -> float:
        """Seconds that what comes after the steps is going to take."""
        return self.looks_after * (self.per_look or 0.0) + self.finishing

    def for_steps(self) -> float:
        return self.left() - self.after()

    def looked(self, images: int, seconds: float) -> None:
        """So many images were evaluated, in so many seconds."""
        if images:
            self.per_look = seconds / images

    def allows_look(self, images: int, since: float) -> bool:
        """Whether to validate in the course of a run. since: seconds since that was last done."""
        return self.per_look is None or images * self.per_look <= LOOKS * since

    def allows(self, images: int, needed: int) -> bool:
        """Whether there is time to evaluate so many more, besides those that are needed."""
        needed_seconds = (images + needed) * (self.per_look or 0.0) + self.finishing
        return needed_seconds <= self.left() + tolerance(self.seconds) / 2

    def record(self) -> dict[str, Any]:
        """For train.json: what was planned, and the seconds that are spent."""
        return {"seconds": self.seconds, "planned": self.planned, "spent": self.spent()}


def fit_to_be_timed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with what a budget changes, but its length: numerics by measurement, and a schedule that ends with it.

    overrides: `--set`'s, which stay as they are. Raises UsageError where they say how long it is.
    """
    said = {override.partition("=")[0].strip() for override in overrides}
    if "train.epochs" in said:
        raise UsageError("--set train.epochs and --budget both say how long a run is: give one of them")
    if not any(key == "train.numerics" or key.startswith("train.numerics.") for key in said):
        recipe = recipe.with_train(numerics="auto")
    if not any(key.split(".")[0] == "schedule" for key in said) and recipe.schedule.name in ENDLESS:
        cosine = CosineSchedule(name="cosine", warmup=Duration(share=BEGINNING / 2))
        recipe = recipe.model_copy(update={"schedule": cosine})
    return recipe


def tolerance(seconds: float) -> float:
    """Seconds by which a budget may be missed."""
    return max(TOLERANCE_SHARE * seconds, TOLERANCE_SECONDS)


def finishing_here(key: dict[str, Any]) -> float:
    """Seconds that the end of a run takes here, from earlier ones."""
    found = _remembered(key)
    return (FINISHING if found is None else found) + LEAVING


def remember_finishing(key: dict[str, Any], seconds: float) -> None:
    """Half of what is remembered is the newest."""
    before = _remembered(key)
    remembered.remember(_end_of(key), seconds if before is None else (before + seconds) / 2)


def _remembered(key: dict[str, Any]) -> float | None:
    found = remembered.recall(_end_of(key))
    return float(found) if isinstance(found, int | float) and 0 <= found < 600 else None


def _end_of(key: dict[str, Any]) -> dict[str, Any]:
    return {**key, "what": "finishing"}
