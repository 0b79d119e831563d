"""Schedules against PyTorch's and timm's, and the properties that resuming and time budgets stand on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim import lr_scheduler

from cifarlab.recipe_base import Duration
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
from cifarlab.schedule import Values, values

BASE_LR = 0.4
STEPS_PER_EPOCH = 7
EPOCHS = 12
STEPS = STEPS_PER_EPOCH * EPOCHS

EVERY_SCHEDULE: list[Schedule] = [
    ConstantSchedule(),
    StepSchedule(step_size=3),
    MultiStepSchedule(milestones=(2, 5), gamma=0.5),
    ExponentialSchedule(gamma=0.9),
    ExponentialSchedule(gamma=0.9, interval="step"),
    CosineSchedule(min_factor=0.1),
    CosineSchedule(interval="epoch"),
    CosineSchedule(cycles=3, cycle_mul=2.0, cycle_decay=0.5),
    OneCycleSchedule(),
    OneCycleSchedule(anneal="linear", cycle_momentum=False),
    PolynomialSchedule(power=2.0, min_factor=0.01),
    PolynomialSchedule(interval="epoch"),
    PlateauSchedule(patience=1, factor=0.5),
]


def ours(schedule: Schedule, *, steps: int = STEPS, warmup: int = 0, val_losses: Sequence[float] = ()) -> list[float]:
    """The learning rates of a run of `steps` steps, and the final one."""
    return [
        at(schedule, step, steps=steps, warmup=warmup, val_losses=val_losses).lr * BASE_LR for step in range(steps + 1)
    ]


def at(
    schedule: Schedule, step: int, *, steps: int = STEPS, warmup: int = 0, val_losses: Sequence[float] = ()
) -> Values:
    return values(
        schedule,
        share=step / steps,
        epoch=step / STEPS_PER_EPOCH,
        epochs=steps / STEPS_PER_EPOCH,
        warmup_share=warmup / steps,
        val_losses=val_losses,
    )


def an_optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE_LR, momentum=0.9)


def theirs(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[float]:
    """The first `count` learning rates of one of PyTorch's schedulers, stepped once each."""
    optimizer = an_optimizer()
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def per_epoch(rates: list[float]) -> list[float]:
    """One value an epoch as one value a step; the end of the run is the start of the epoch that doesn't come."""
    return [rate for rate in rates[:-1] for _ in range(STEPS_PER_EPOCH)] + rates[-1:]


# --- against PyTorch and timm -----------------------------------------------------------------


def test_step_is_pytorchs() -> None:
    want = theirs(lambda o: lr_scheduler.StepLR(o, step_size=5, gamma=0.3), EPOCHS + 1)
    assert ours(StepSchedule(step_size=5, gamma=0.3)) == pytest.approx(per_epoch(want), rel=1e-12)


def test_multistep_is_pytorchs() -> None:
    want = theirs(lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 6, 11], gamma=0.2), EPOCHS + 1)
    assert ours(MultiStepSchedule(milestones=(2, 6, 11), gamma=0.2)) == pytest.approx(per_epoch(want), rel=1e-12)


def test_exponential_is_pytorchs() -> None:
    want = theirs(lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8), EPOCHS + 1)
    assert ours(ExponentialSchedule(gamma=0.8)) == pytest.approx(per_epoch(want), rel=1e-12)


def test_exponential_by_step_is_pytorchs_with_the_root_of_gamma() -> None:
    want = theirs(lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8 ** (1 / STEPS_PER_EPOCH)), STEPS + 1)
    assert ours(ExponentialSchedule(gamma=0.8, interval="step")) == pytest.approx(want, rel=1e-12)


def test_cosine_is_pytorchs() -> None:
    want = theirs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1 * BASE_LR), STEPS + 1)
    # PyTorch computes each value from the one before, so its rounding adds up.
    assert ours(CosineSchedule(min_factor=0.1)) == pytest.approx(want, rel=1e-9)


def test_cosine_by_epoch_is_pytorchs_stepped_by_epoch() -> None:
    want = theirs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=EPOCHS), EPOCHS + 1)
    assert ours(CosineSchedule(interval="epoch")) == pytest.approx(per_epoch(want), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("t_mult", [1, 2, 3])
def test_cosine_with_restarts_is_pytorchs(t_mult: int) -> None:
    t_0 = 7
    steps = t_0 * sum(t_mult**cycle for cycle in range(4))
    want = theirs(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=t_0, T_mult=t_mult, eta_min=0.05 * BASE_LR), steps
    )
    got = ours(CosineSchedule(cycles=4, cycle_mul=t_mult, min_factor=0.05), steps=steps)
    assert got[:-1] == pytest.approx(want, rel=1e-9)
    assert got[-1] == pytest.approx(0.05 * BASE_LR)  # where PyTorch would start a fifth cycle


@pytest.mark.parametrize("cycle_mul", [1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 9])
def test_cosine_with_warmup_and_cycles_is_timms(warmup: int, cycle_mul: float) -> None:
    t_initial, cycles = 11, 3
    steps = warmup + round(t_initial * sum(cycle_mul**cycle for cycle in range(cycles)))
    optimizer = an_optimizer()
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=t_initial,
        lr_min=0.02 * BASE_LR,
        cycle_mul=cycle_mul,
        cycle_decay=0.6,
        cycle_limit=cycles,
        warmup_t=warmup,
        warmup_lr_init=0.1 * BASE_LR,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    want = []
    for step in range(steps):
        scheduler.step_update(step)
        want.append(optimizer.param_groups[0]["lr"])
    schedule = CosineSchedule(min_factor=0.02, cycles=cycles, cycle_mul=cycle_mul, cycle_decay=0.6, warmup_factor=0.1)
    assert ours(schedule, steps=steps, warmup=warmup)[:-1] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.9])
def test_polynomial_is_pytorchs(power: float) -> None:
    want = theirs(lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=power), STEPS + 1)
    # PyTorch computes each value from the one before, so its rounding adds up.
    assert ours(PolynomialSchedule(power=power)) == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_is_pytorchs_with_its_momentum(anneal: Literal["cos", "linear"]) -> None:
    optimizer = an_optimizer()
    # PyTorch's phases end a step before a share of its total, and its last step is the end. So T steps and the end are
    # a total of T + 1 there, and its `pct_start` puts the peak where ours is.
    scheduler = lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=BASE_LR,
        total_steps=STEPS + 1,
        pct_start=(0.25 * STEPS + 1) / (STEPS + 1),
        anneal_strategy=anneal,
        div_factor=20,
        final_div_factor=500,
    )
    schedule = OneCycleSchedule(pct_start=0.25, div_factor=20, final_div_factor=500, anneal=anneal)
    for step in range(STEPS + 1):
        got = at(schedule, step)
        assert got.lr * BASE_LR == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert got.momentum == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-9)
        optimizer.step()
        if step < STEPS:
            scheduler.step()


@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_pytorchs(patience: int, cooldown: int, threshold_mode: Literal["rel", "abs"]) -> None:
    noise = torch.randn(60, generator=torch.Generator().manual_seed(patience + 10 * cooldown))
    losses = [math.exp(-epoch / 12) + 0.05 * float(noise[epoch]) + 0.3 for epoch in range(60)]
    optimizer = an_optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=0.5,
        patience=patience,
        threshold=0.02,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        min_lr=0.01 * BASE_LR,
        eps=0.0,
    )
    schedule = PlateauSchedule(
        factor=0.5, patience=patience, threshold=0.02, threshold_mode=threshold_mode, cooldown=cooldown, min_factor=0.01
    )
    seen = set()
    for epoch in range(len(losses) + 1):
        got = at(schedule, epoch * STEPS_PER_EPOCH, steps=60 * STEPS_PER_EPOCH, val_losses=losses[:epoch]).lr
        assert got * BASE_LR == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        seen.add(got)
        if epoch < len(losses):
            scheduler.step(losses[epoch])
    assert len(seen) > 2, "the losses should make it drop more than once"


def test_warmup_is_pytorchs_linear_lr() -> None:
    want = theirs(lambda o: lr_scheduler.LinearLR(o, start_factor=0.01, total_iters=10), STEPS + 1)
    # PyTorch computes each value from the one before, so its rounding adds up.
    assert ours(ConstantSchedule(), warmup=10) == pytest.approx(want, rel=1e-9)


def test_warmup_then_cosine_is_pytorchs_in_sequence() -> None:
    def in_sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=10)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 10)
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])

    want = theirs(in_sequence, STEPS + 1)
    assert ours(CosineSchedule(warmup_factor=0.25), warmup=10) == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_warmup_multiplies_schedules_that_count_epochs() -> None:
    # As PyTorch's ChainedScheduler does; a drop inside the warm-up stays where it was asked for.
    schedule = MultiStepSchedule(milestones=(1, 4), gamma=0.1)
    plain, warm = ours(schedule), ours(schedule, warmup=14)
    for step, (without, with_warmup) in enumerate(zip(plain, warm, strict=True)):
        assert with_warmup == pytest.approx(without * (0.01 + 0.99 * min(step / 14, 1)))


# --- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: s.name)
def test_same_inputs_give_the_same_values_in_any_order(schedule: Schedule) -> None:
    # Going on from any step equals never having stopped: a value can't depend on what was asked before.
    losses = [1.0, 0.9, 0.9, 0.9, 0.9]
    forwards = [at(schedule, step, warmup=5, val_losses=losses) for step in range(STEPS)]
    backwards = [at(schedule, step, warmup=5, val_losses=losses) for step in reversed(range(STEPS))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(
    ("schedule", "final"),
    [
        (ConstantSchedule(), 1.0),
        (StepSchedule(step_size=5, gamma=0.1), 0.01),
        (MultiStepSchedule(milestones=(3, 12), gamma=0.1), 0.01),
        (ExponentialSchedule(gamma=0.9), 0.9**EPOCHS),
        (ExponentialSchedule(gamma=0.9, interval="step"), 0.9**EPOCHS),
        (CosineSchedule(min_factor=0.1), 0.1),
        (CosineSchedule(min_factor=0.1, cycles=3, cycle_decay=0.5), 0.1),
        (CosineSchedule(interval="epoch"), 0.0),
        (OneCycleSchedule(div_factor=25, final_div_factor=1e4), 1 / 25e4),
        (PolynomialSchedule(power=3.0, min_factor=0.2), 0.2),
        (PlateauSchedule(min_factor=0.25, patience=0), 0.25),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_a_schedule_ends_at_its_final_value(schedule: Schedule, final: float, warmup: int) -> None:
    end = at(schedule, STEPS, warmup=warmup, val_losses=[1.0] * EPOCHS)
    assert end.lr == pytest.approx(final, rel=1e-9, abs=1e-15)
    # A clock may overrun its budget by a step.
    late = values(
        schedule, share=1.01, epoch=EPOCHS, epochs=EPOCHS, warmup_share=warmup / STEPS, val_losses=[1.0] * EPOCHS
    )
    assert late.lr == end.lr


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: s.name)
def test_the_end_of_the_warmup_is_continuous(schedule: Schedule) -> None:
    def near(share: float) -> float:
        return values(schedule, share=share, epoch=1.5, epochs=12, warmup_share=0.125, val_losses=()).lr

    assert near(0.125 - 1e-9) == pytest.approx(near(0.125 + 1e-9), rel=1e-6)
    assert near(0.125) == pytest.approx(near(0.125 + 1e-9), rel=1e-6)


def test_warmup_rises_from_its_factor_batch_by_batch() -> None:
    rates = ours(CosineSchedule(warmup_factor=0.2, interval="epoch"), warmup=2 * STEPS_PER_EPOCH)
    rises = [after - before for before, after in itertools.pairwise(rates[: 2 * STEPS_PER_EPOCH + 1])]
    assert rates[0] == pytest.approx(0.2 * BASE_LR)
    assert rates[2 * STEPS_PER_EPOCH] == pytest.approx(BASE_LR)
    assert rises == pytest.approx([0.8 * BASE_LR / (2 * STEPS_PER_EPOCH)] * (2 * STEPS_PER_EPOCH))


@pytest.mark.parametrize("warmup_share", [1.0, 2.5])
def test_a_warmup_as_long_as_the_run_or_longer_only_rises(warmup_share: float) -> None:
    for schedule in (CosineSchedule(), PolynomialSchedule(), ConstantSchedule()):
        end = values(schedule, share=1.0, epoch=2, epochs=2, warmup_share=warmup_share, val_losses=())
        assert end.lr == pytest.approx(0.01 + 0.99 / warmup_share)


@settings(derandomize=True, deadline=None)
@given(
    cycles=st.integers(1, 100),
    cycle_mul=st.floats(1, 10),
    cycle=st.integers(0, 99),
    length=st.integers(1, 50),
)
def test_every_restart_begins_at_its_peak(cycles: int, cycle_mul: float, cycle: int, length: int) -> None:
    cycle %= cycles
    schedule = CosineSchedule(cycles=cycles, cycle_mul=cycle_mul)
    total = sum(length * cycle_mul**i for i in range(cycles))
    start = sum(length * cycle_mul**i for i in range(cycle))
    got = values(schedule, share=start / total, epoch=0, epochs=1, warmup_share=0, val_losses=()).lr
    assert got == pytest.approx(1.0, abs=1e-6)


@settings(derandomize=True, deadline=None)
@given(share=st.floats(0, 1), warmup_share=st.floats(0, 1.5), which=st.integers(0, len(EVERY_SCHEDULE) - 1))
def test_factors_stay_between_zero_and_one(share: float, warmup_share: float, which: int) -> None:
    got = values(
        EVERY_SCHEDULE[which],
        share=share,
        epoch=share * EPOCHS,
        epochs=EPOCHS,
        warmup_share=warmup_share,
        val_losses=[1.0, 2.0, 3.0],
    )
    assert 0.0 <= got.lr <= 1.0


def test_a_decayed_peak_never_falls_below_the_minimum() -> None:
    rates = ours(CosineSchedule(cycles=4, cycle_decay=0.1, min_factor=0.05))
    assert max(rates[STEPS // 2 :]) == pytest.approx(0.05 * BASE_LR)
    assert min(rates) == pytest.approx(0.05 * BASE_LR)


def test_only_one_cycle_moves_the_momentum() -> None:
    moved = {schedule.name for schedule in EVERY_SCHEDULE if at(schedule, 3).momentum is not None}
    assert moved == {"one_cycle"}
    assert at(OneCycleSchedule(cycle_momentum=False), 3).momentum is None


# --- the section, and durations ---------------------------------------------------------------


def test_a_schedule_is_told_by_its_name_and_reads_back_from_its_dump() -> None:
    adapter: TypeAdapter[Schedule] = TypeAdapter(Schedule)
    for schedule in EVERY_SCHEDULE:
        assert adapter.validate_python(schedule.model_dump(mode="json")) == schedule


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"name": "cosin"}, "cosine"),
        ({"name": "step"}, "step_size"),
        ({"name": "cosine", "t_max": 3}, "t_max"),
        ({"name": "cosine", "min_factor": -0.1}, "min_factor"),
        ({"name": "cosine", "min_factor": True}, "min_factor"),
        ({"name": "cosine", "min_factor": math.nan}, "min_factor"),
        ({"name": "multistep", "milestones": [60, 30]}, "must rise"),
        ({"name": "multistep", "milestones": []}, "milestones"),
        ({"name": "one_cycle", "warmup": {"epochs": 1}}, "pct_start"),
        ({"name": "one_cycle", "base_momentum": 0.99}, "max_momentum"),
        ({"name": "plateau", "factor": 1.0}, "factor"),
        ({"name": "cosine", "warmup": {}}, "exactly one"),
        ({"name": "cosine", "warmup": {"epochs": 1, "steps": 5}}, "given: epochs, steps"),
        ({"name": "cosine", "warmup": {"share": 1.5}}, "share"),
        ({"name": "cosine", "warmup": {"steps": 1.5}}, "steps"),
    ],
)
def test_a_wrong_schedule_is_refused_by_the_field(section: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        TypeAdapter(Schedule).validate_python(section)


@pytest.mark.parametrize(
    ("duration", "share", "steps"),
    [
        (Duration(epochs=3), 0.25, 21),
        (Duration(epochs=0.5), 0.5 / EPOCHS, 4),  # 3.5 steps, rounded to even
        (Duration(epochs=0.001), 0.001 / EPOCHS, 1),
        (Duration(epochs=0), 0.0, 0),
        (Duration(epochs=24), 2.0, 168),
        (Duration(steps=21), 0.25, 21),
        (Duration(steps=0), 0.0, 0),
        (Duration(share=0.25), 0.25, 21),
        (Duration(minutes=2), 0.2, 60),
    ],
)
def test_a_duration_is_a_share_of_the_run_and_whole_steps(duration: Duration, share: float, steps: int) -> None:
    assert duration.share_of(STEPS, STEPS_PER_EPOCH, seconds=600.0) == pytest.approx(share)
    assert duration.in_steps(STEPS, STEPS_PER_EPOCH, seconds_per_step=2.0) == steps


def test_minutes_need_a_rate() -> None:
    with pytest.raises(ValueError, match="seconds"):
        Duration(minutes=1).share_of(STEPS, STEPS_PER_EPOCH)
    with pytest.raises(ValueError, match="seconds"):
        Duration(minutes=1).in_steps(STEPS, STEPS_PER_EPOCH)


def test_a_duration_dumps_the_one_unit_it_has() -> None:
    assert Duration(steps=7).model_dump(mode="json") == {"steps": 7}
    assert CosineSchedule(warmup=Duration(epochs=1)).model_dump(mode="json")["warmup"] == {"epochs": 1.0}
