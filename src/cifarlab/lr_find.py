"""The learning-rate range test: train a little while the learning rate rises, and see where the loss falls fastest.

Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186), section 3.3; the reading of the curve
is fastai's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cifarlab.errors import DivergedError, UsageError
from cifarlab.feed import make_batches
from cifarlab.models.chain import set_mode
from cifarlab.optim import set_learning_rate
from cifarlab.pace import BySteps
from cifarlab.recipe import Recipe
from cifarlab.schedule import Values
from cifarlab.task import Task
from cifarlab.training_step import TrainingStep

SMOOTHING = 0.9  # of the loss, as an exponential moving average without its bias
TOO_HIGH = 4.0  # the test ends where the smoothed loss is so many times its lowest


@dataclass(frozen=True)
class LearningRateTest:
    """The curve, by rising learning rate, and what may be read off it.

    losses: smoothed training losses. steepest: where the loss falls fastest over the logarithm of the learning rate, a
    rate to begin with. tenth: a tenth of the rate with the lowest loss, the other common choice. None where the loss
    never fell.
    """

    rates: list[float]
    losses: list[float]
    steepest: float | None
    tenth: float | None


def check_range(low: float, high: float, steps: int) -> None:
    """Raises UsageError for a range or a number of steps that can't be."""
    if not 0 < low < high < math.inf:
        raise UsageError(f"the learning rate must rise from more than 0: --from {low:g} --to {high:g} does not")
    if steps < 10:
        raise UsageError(f"--steps {steps} is too few to see a curve; give at least 10")


def learning_rate_test(
    recipe: Recipe, task: Task, *, low: float, high: float, steps: int, progress: Callable[[int, float, float], None]
) -> LearningRateTest:
    """Take `steps` training steps with learning rates from `low` to `high`, evenly on a logarithmic scale.

    All else is the recipe's own, as it is at its end: the last resolution, and nothing paused by `freeze_backbone`.
    Learning rates of groups keep their proportions. The task's model is used up.
    progress: called with each step's number, rate and smoothed loss. Raises UsageError for a range or a number of steps
    that can't be, DivergedError where the loss is not finite from the start.
    """
    check_range(low, high, steps)
    model = task.network.model
    take_step = TrainingStep(recipe, task, lambda _: None)
    set_mode(model, recipe.model.freeze_stages, backbone=False)
    at_its_end = dataclasses.replace(task, pipelines=((0.0, task.pipelines[-1][1]),))
    batches = make_batches(recipe, at_its_end, 0, BySteps(steps))
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step in range(steps):
        rate = low * (high / low) ** (step / (steps - 1))
        set_learning_rate(take_step.optimizer, Values(rate / recipe.optimizer.lr, None))
        loss, _ = take_step(next(batches), step)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss.item()
        smoothed = average / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > TOO_HIGH * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
        progress(step + 1, rate, smoothed)
    if not losses:
        raise DivergedError(f"the loss is not finite at the first step, with a learning rate of {low:g}")
    return LearningRateTest(rates, losses, *read_curve(rates, losses))


def read_curve(rates: list[float], losses: list[float]) -> tuple[float | None, float | None]:
    """The rate where the losses fall fastest, and a tenth of the one where they are lowest; None where none falls."""
    lowest = int(np.argmin(losses))
    if lowest == 0:
        return None, None
    slopes = np.gradient(np.array(losses[: lowest + 1]), np.log(rates[: lowest + 1]))
    return rates[int(np.argmin(slopes))], rates[lowest] / 10
