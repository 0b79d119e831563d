"""What paired runs say: differences with intervals, tests that allow for their number, and how many seeds it takes.

Two arms of a study that share a seed share split, initialisation and order, so what is compared is the difference of a
pair. Accuracies and differences are fractions of 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Difference:
    """Of n pairs: mean and sample standard deviation (n - 1), 95 % interval of the mean, p of the paired t-test.

    Where there is one pair, spread, interval and p are None; with none, the mean too.
    """

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    p: float | None


def paired_difference(differences: Sequence[float], quantum: float = 0.0) -> Difference:
    """Student's paired t-test of differences whose mean is 0 if nothing was changed, and its 95 % interval.

    quantum: the step in which accuracies come, one over the number of images. Few pairs may differ by equally many
    images, and are no surer for that: the spread counts as at least that of the difference of two numbers that are
    rounded to the quantum, √(2 · quantum² / 12).
    """
    from scipy import special

    n = len(differences)
    if n < 2:
        return Difference(n, differences[0] if n else None, None, None, None, None)
    mean = statistics.fmean(differences)
    std = max(statistics.stdev(differences), quantum / math.sqrt(6))
    if std == 0:
        return Difference(n, mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    error = std / math.sqrt(n)
    # Student's t from scipy.special: scipy.stats has it too, and takes a second to import.
    reach = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(mean) / error))
    return Difference(n, mean, std, mean - reach, mean + reach, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that the chance of any false find stays below alpha (Holm 1979).

    The smallest is multiplied by their number m, the next by m - 1 …; none is below one before it, or above 1.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def power(n: int, difference: float, std: float, alpha: float = ALPHA) -> float:
    """The chance that a two-sided paired t-test of n ≥ 2 pairs finds a true difference, by the noncentral t."""
    from scipy import special

    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    shift = abs(difference) / std * math.sqrt(n)
    return float(1 - special.nctdtr(n - 1, shift, critical) + special.nctdtr(n - 1, shift, -critical))


def seeds_needed(difference: float, std: float, tests: int = 1) -> int | None:
    """How many pairs find a true difference with a chance of 80 %, at the strictest of Holm's levels for so many tests.

    std: of the differences of pairs. None: more than 100,000.
    """
    if std == 0:
        return 2
    alpha = ALPHA / max(1, tests)
    low, high = 1, 2  # power(low) is too little, as one pair has none
    while power(high, difference, std, alpha) < POWER:
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, std, alpha) >= POWER else (middle, high)
    return high
