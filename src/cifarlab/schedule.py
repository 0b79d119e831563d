"""The learning rate as a pure function of the share of the run that is done.

Nothing here has state: the same arguments give the same values, so going on after a stop needs nothing but the step,
and under a time budget the share may come from the clock. A schedule gives a factor on the learning rate:

    factor = ramp × decay
    ramp   = warmup_factor + (1 - warmup_factor) × share / warmup_share    while share < warmup_share, then 1
    decay  = the schedule's own form, below

Cosine and polynomial decay over what the warm-up leaves: their progress is (share - warmup_share) / (1 - warmup_share),
and 0 before. Step, multistep, exponential and plateau count epochs from the start of the run, warm-up included. So the
end of the warm-up is continuous for all of them. One_cycle has a rise of its own, and no warm-up.

`share` is read before a step: of T steps the first has share 0 and the last has (T - 1) / T, as with PyTorch's
`CosineAnnealingLR(T_max=T)`. At share 1 a schedule has its final value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cifarlab.recipe_schedule import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    MultiStepSchedule,
    OneCycleSchedule,
    PlateauSchedule,
    PolynomialSchedule,
    Schedule,
    StepSchedule,
)


class Values(NamedTuple):
    """What a schedule says for one step: `lr` is a factor on `optimizer.lr`; `momentum` is None where it stays."""

    lr: float
    momentum: float | None


def values(
    schedule: Schedule,
    *,
    share: float,
    epoch: float,
    epochs: float,
    warmup_share: float,
    val_losses: Sequence[float],
) -> Values:
    """The learning rate's factor, and the momentum if the schedule moves it, for the step that comes next.

    share: of the run that is done, 0 to 1 (held to that range, as a clock may overrun).
    epoch: epochs that are done, `step / steps_per_epoch`; whole numbers at the start of an epoch.
    epochs: length of the run (planned length, under a time budget); read by `interval: epoch` alone.
    warmup_share: `schedule.warmup` as a share of the run, from `Duration.share_of`; 0 without a warm-up.
    val_losses: validation losses of the epochs that are done, in order; read by plateau alone.
    """
    share = min(max(share, 0.0), 1.0)
    if isinstance(schedule, OneCycleSchedule):
        return _one_cycle(schedule, share)
    ramp = 1.0
    if share < warmup_share:
        ramp = schedule.warmup_factor + (1 - schedule.warmup_factor) * share / warmup_share
    match schedule:
        case ConstantSchedule():
            decay = 1.0
        case StepSchedule():
            decay = schedule.gamma ** (math.floor(epoch) // schedule.step_size)
        case MultiStepSchedule():
            decay = schedule.gamma ** sum(milestone <= epoch for milestone in schedule.milestones)
        case ExponentialSchedule():
            decay = schedule.gamma ** (math.floor(epoch) if schedule.interval == "epoch" else epoch)
        case CosineSchedule():
            decay = _cosine(schedule, _progress(schedule, share, epoch, epochs, warmup_share))
        case PolynomialSchedule():
            left = 1 - _progress(schedule, share, epoch, epochs, warmup_share)
            decay = schedule.min_factor + (1 - schedule.min_factor) * left**schedule.power
        case PlateauSchedule():
            decay = _plateau(schedule, val_losses)
    return Values(ramp * decay, None)


def _progress(
    schedule: CosineSchedule | PolynomialSchedule, share: float, epoch: float, epochs: float, warmup_share: float
) -> float:
    """How far the decay is, 0 to 1, over what the warm-up leaves of the run."""
    if schedule.interval == "epoch":
        share = min(math.floor(epoch) / epochs, 1.0)
    return (share - warmup_share) / (1 - warmup_share) if share > warmup_share else 0.0


def _cosine(schedule: CosineSchedule, progress: float) -> float:
    """SGDR, arXiv 1608.03983, equation 5, with a peak that decays from cycle to cycle as timm's does."""
    lengths = [schedule.cycle_mul**cycle for cycle in range(schedule.cycles)]
    position = progress * sum(lengths)
    cycle = 0
    # A restart belongs to the new cycle, whatever rounding left of it: (1 / 49) * 49 is less than 1.
    while cycle < schedule.cycles - 1 and position > lengths[cycle] * (1 - 1e-9):
        position -= lengths[cycle]
        cycle += 1
    peak = max(schedule.cycle_decay**cycle, schedule.min_factor)
    return _between(peak, schedule.min_factor, position / lengths[cycle], "cos")


def _one_cycle(schedule: OneCycleSchedule, share: float) -> Values:
    """Smith's one-cycle policy, arXiv 1708.07120, in two phases as fastai and PyTorch have it."""
    first = 1 / schedule.div_factor
    high, low = schedule.max_momentum, schedule.base_momentum
    if share < schedule.pct_start:
        done = share / schedule.pct_start
        lr, momentum = _between(first, 1.0, done, schedule.anneal), _between(high, low, done, schedule.anneal)
    else:
        done = (share - schedule.pct_start) / (1 - schedule.pct_start)
        lr = _between(1.0, first / schedule.final_div_factor, done, schedule.anneal)
        momentum = _between(low, high, done, schedule.anneal)
    return Values(lr, momentum if schedule.cycle_momentum else None)


def _plateau(schedule: PlateauSchedule, val_losses: Sequence[float]) -> float:
    """The drops so far, replayed from the losses; PyTorch's `ReduceLROnPlateau(mode="min")` without its `eps`."""
    factor, best, bad, cooldown = 1.0, math.inf, 0, 0
    for loss in val_losses:
        if schedule.threshold_mode == "rel":
            better = loss < best * (1 - schedule.threshold)
        else:
            better = loss < best - schedule.threshold
        if better:
            best, bad = loss, 0
        else:
            bad += 1
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > schedule.patience:
            factor, cooldown, bad = max(factor * schedule.factor, schedule.min_factor), schedule.cooldown, 0
    return factor


def _between(start: float, end: float, done: float, form: str) -> float:
    """From `start` (done = 0) to `end` (done = 1) on a straight line, or on half a cosine."""
    left = 1 - done if form == "linear" else (1 + math.cos(math.pi * done)) / 2
    return end + (start - end) * left
