"""How far a run has come, and when it is over: by its steps, or by the clock.

What changes in the course of a run (learning rate, resolution, what is frozen, what is pruned) follows from its
*position*, which goes from 0 to `total_steps`. By its steps, the position is the step. By the clock, it moves on such
that it comes to the end when the time has: a position of a half has half of the planned steps behind it, however many
were really taken, so recipes mean the same under both.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

# The cost of a step is the median of so many, as one in a while waits for something else.
RECENT = 15


class Pace(Protocol):
    """total_steps: how many there are to be, or were planned."""

    total_steps: int

    def position(self, step: int) -> float:
        """Of the step that is to be taken next, or of one after it."""
        ...

    def over(self, step: int) -> bool:
        """Whether that step is not to be taken any more."""
        ...

    def took(self, seconds: float, steps: int = 1) -> None:
        """So many steps have been taken since it was last said, in so many seconds."""
        ...

    def renew(self) -> None:
        """Something else took time."""
        ...


class BySteps:
    """So many steps."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def position(self, step: int) -> float:
        return step

    def over(self, step: int) -> bool:
        return step >= self.total_steps

    def took(self, seconds: float, steps: int = 1) -> None:
        pass

    def renew(self) -> None:
        pass


class ByClock:
    """As many steps as the time allows.

    Of a run at share s, T(u) the seconds of a step at share u and R the seconds that are left, n more steps can be
    taken, spread evenly over what is left of the run, where

        n = R / mean of T(u) over u from s to 1

    so each moves on by (1 - s) / n. That is worked out anew after each step: a machine that becomes slower shortens the
    rest of the run as a whole, and the learning rate still comes to its end.

    T(u) is what steps at that resolution took lately; before there were any, that of the others, by pixels.
    """

    def __init__(
        self,
        total_steps: int,
        time_left: Callable[[], float],
        pixels: Sequence[tuple[float, int]] = ((0.0, 1),),
        *,
        first_step: int = 0,
        share: float = 0.0,
    ) -> None:
        """time_left: seconds until training is to end. pixels: from which share of the run on images have how many, in
        rising order, from 0 on. first_step, share: where a run goes on."""
        self.total_steps = total_steps
        self._time_left = time_left
        self._pixels = tuple(pixels)
        self._taken: dict[int, deque[float]] = {}
        self._step, self.share = first_step, share
        self._stride = 1 / total_steps

    def position(self, step: int) -> float:
        # What is made ready ahead of its turn is where it would be at the present pace.
        return min(1.0, self.share + (step - self._step) * self._stride) * self.total_steps

    def over(self, step: int) -> bool:
        return self.share >= 1.0

    def took(self, seconds: float, steps: int = 1) -> None:
        pixels = self._pixels_at(self.share)
        self._taken.setdefault(pixels, deque(maxlen=RECENT)).append(seconds / steps)
        self._step += steps
        self.share = min(1.0, self.share + steps * self._stride)
        self.renew()

    def renew(self) -> None:
        if not self._taken or self.share >= 1.0:
            return
        left = 1 - self.share
        steps = self._time_left() / self._mean_of_rest()
        if steps < 0.5:  # to stop now is nearer to the time than to take another
            self.share = 1.0
        else:
            self._stride = left / max(1.0, steps)

    def seconds_of_step(self, pixels: int) -> float:
        """What a step on images of so many pixels takes; some step must have been taken."""
        if pixels in self._taken:
            return statistics.median(self._taken[pixels])
        nearest = min(self._taken, key=lambda other: abs(other - pixels))
        return statistics.median(self._taken[nearest]) * pixels / nearest

    def _pixels_at(self, share: float) -> int:
        return next(pixels for begins, pixels in reversed(self._pixels) if share >= begins)

    def _mean_of_rest(self) -> float:
        """Seconds of a step, over what is left of the run."""
        ends = [*(begins for begins, _ in self._pixels[1:]), 1.0]
        total = 0.0
        for (begins, pixels), ends_at in zip(self._pixels, ends, strict=True):
            part = ends_at - max(begins, self.share)
            if part > 0:
                total += part * self.seconds_of_step(pixels)
        return total / (1 - self.share)
