"""A run's seconds: how many are left for its steps, once what comes after them is taken off.

After the last step the network is evaluated, on validation, training and test images, and the record is written: what
that takes is foreseen from what evaluation took so far, and from what writing took in earlier runs on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cifarlab import remembered

# Of the time for training, what validation in its course may take.
LOOKS = 0.1
# Seconds that pictures, page and the end of the process take where no run has ended yet.
FINISHING = 8.0
# A run is taken to have kept to its budget within this share of it, or so many seconds.
TOLERANCE_SHARE, TOLERANCE_SECONDS = 0.03, 2.0


class Budget:
    """seconds: of the whole run, from `began` on, a `time.time()`.

    looks_after: how many images are evaluated once the last step is taken, each view of one counted; looks_on_test:
    those of them that are test images.
    planned: what was expected of the run, for its record.
    """

    def __init__(
        self,
        seconds: float,
        began: float,
        *,
        planned: dict[str, Any] | None = None,
        finishing: float = FINISHING,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.seconds = seconds
        self.planned = planned or {}
        self.looks_after = self.looks_on_test = 0
        self.finishing = finishing
        self.per_look: float | None = None
        self._began, self._now = began, now

    def spent(self) -> float:
        return self._now() - self._began

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
        """Whether to validate in the course of a run. since: seconds of training since that was last done."""
        return self.per_look is None or images * self.per_look <= LOOKS * since

    def allows(self, images: int, needed: int) -> bool:
        """Whether there is time to evaluate so many more, besides those that are needed."""
        return (images + needed) * (self.per_look or 0.0) + self.finishing <= self.left()

    def record(self) -> dict[str, Any]:
        """For train.json: what was planned, and the seconds that are spent."""
        return {"seconds": self.seconds, "planned": self.planned, "spent": self.spent()}


def tolerance(seconds: float) -> float:
    """Seconds by which a budget may be missed."""
    return max(TOLERANCE_SHARE * seconds, TOLERANCE_SECONDS)


def finishing_here(key: dict[str, Any]) -> float:
    """Seconds that the end of a run takes here, from earlier ones."""
    found = remembered.recall({**key, "what": "finishing"})
    return float(found) if isinstance(found, int | float) and 0 <= found < 600 else FINISHING


def remember_finishing(key: dict[str, Any], seconds: float) -> None:
    """Half of what is remembered is the newest."""
    before = remembered.recall({**key, "what": "finishing"})
    if isinstance(before, int | float) and 0 <= before < 600:
        seconds = (before + seconds) / 2
    remembered.remember({**key, "what": "finishing"}, seconds)
