"""The `schedule` section of a recipe: one model a schedule, told apart by `name`. What they do: `schedule.py`.

Learning rates are factors of `optimizer.lr`, so that a schedule fits any optimizer; `min_factor` is the final learning
rate over `optimizer.lr`. Defaults are PyTorch's where it has the schedule.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cifarlab.recipe_base import Boolean, Duration, Integer, Real, Section

Warmup = Annotated[
    Duration | None,
    Field(description="the learning rate rises linearly for this long, batch by batch; null: it doesn't"),
]
WarmupFactor = Annotated[
    Real, Field(ge=0, le=1, description="where the warm-up starts, as a factor on the learning rate")
]
Gamma = Annotated[Real, Field(gt=0, le=1, description="the learning rate is multiplied by this at each drop")]
MinFactor = Annotated[Real, Field(ge=0, le=1, description="the final (lowest) learning rate over `optimizer.lr`")]
Interval = Literal["step", "epoch"]
INTERVAL = "the learning rate changes with every step, or only at the start of an epoch"


class ConstantSchedule(Section):
    """The same learning rate throughout."""

    name: Literal["constant"] = Field(default="constant", description="constant learning rate")
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


class StepSchedule(Section):
    """A drop every `step_size` epochs."""

    name: Literal["step"] = Field(default="step", description="a drop every few epochs")
    step_size: Integer = Field(ge=1, description="epochs from drop to drop, counted from the start of the run")
    gamma: Gamma = 0.1
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


class MultiStepSchedule(Section):
    """A drop at each of some epochs."""

    name: Literal["multistep"] = Field(default="multistep", description="a drop at given epochs")
    milestones: tuple[Annotated[Integer, Field(ge=1)], ...] = Field(
        min_length=1, description="epochs done at each drop, rising, counted from the start of the run"
    )
    gamma: Gamma = 0.1
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01

    @field_validator("milestones")
    @classmethod
    def _milestones_rise(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("milestones must rise from one to the next, as in [30, 60, 80]")
        return milestones


class ExponentialSchedule(Section):
    """The learning rate is multiplied by `gamma` every epoch."""

    name: Literal["exponential"] = Field(default="exponential", description="the same factor every epoch")
    gamma: Real = Field(gt=0, le=1, description="the learning rate is multiplied by this every epoch")
    interval: Interval = Field(default="epoch", description=INTERVAL)
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


class CosineSchedule(Section):
    """Half a cosine from the learning rate down to its minimum, once or with restarts (SGDR, arXiv 1608.03983).

    PyTorch's `CosineAnnealingWarmRestarts(T_0, T_mult)` is `cycles` and `cycle_mul` here: the first cycle is as long as
    makes all of them fill what the warm-up leaves of the run. `cycle_mul` and `cycle_decay` are timm's names.
    """

    name: Literal["cosine"] = Field(default="cosine", description="half a cosine, once or with restarts")
    min_factor: MinFactor = 0.0
    cycles: Integer = Field(default=1, ge=1, le=100, description="times that the cosine is run through")
    cycle_mul: Real = Field(default=1.0, ge=1, le=10, description="length of a cycle over that of the one before")
    cycle_decay: Real = Field(default=1.0, gt=0, le=1, description="peak of a cycle over that of the one before")
    interval: Interval = Field(default="step", description=INTERVAL)
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


class OneCycleSchedule(Section):
    """Up to the learning rate, then down far below where it began, momentum the other way (arXiv 1708.07120)."""

    name: Literal["one_cycle"] = Field(default="one_cycle", description="one rise and one fall")
    pct_start: Real = Field(default=0.3, gt=0, lt=1, description="share of the run that the rise takes")
    div_factor: Real = Field(default=25.0, ge=1, description="peak learning rate over the first one")
    final_div_factor: Real = Field(default=1e4, ge=1, description="first learning rate over the last one")
    anneal: Literal["cos", "linear"] = Field(default="cos", description="form of the rise and the fall")
    cycle_momentum: Boolean = Field(default=True, description="momentum (or Adam's first beta) runs the other way")
    max_momentum: Real = Field(default=0.95, ge=0, lt=1, description="momentum at the start and at the end")
    base_momentum: Real = Field(default=0.85, ge=0, lt=1, description="momentum at the peak learning rate")
    # Declared so that every schedule has the field, and so that giving it gets an answer.
    warmup: None = Field(default=None, description="always null: `pct_start` is the warm-up")

    @field_validator("warmup", mode="before")
    @classmethod
    def _it_warms_up_by_itself(cls, warmup: object) -> None:
        if warmup is not None:
            raise ValueError("one_cycle warms up by itself: set pct_start, and warmup to null")

    @model_validator(mode="after")
    def _momentum_falls_to_its_base(self) -> OneCycleSchedule:
        if self.base_momentum > self.max_momentum:
            raise ValueError(
                f"base_momentum ({self.base_momentum}) must not be more than max_momentum ({self.max_momentum})"
            )
        return self


class PolynomialSchedule(Section):
    """A power of the share that is left; with `power: 1` a straight line."""

    name: Literal["polynomial"] = Field(default="polynomial", description="a power of the share that is left")
    power: Real = Field(default=1.0, gt=0, description="1: a straight line; more: a faster fall at first")
    min_factor: MinFactor = 0.0
    interval: Interval = Field(default="step", description=INTERVAL)
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


class PlateauSchedule(Section):
    """A drop when the validation loss has stopped falling; needs validation images."""

    name: Literal["plateau"] = Field(default="plateau", description="a drop when validation loss stops falling")
    factor: Real = Field(default=0.1, gt=0, lt=1, description="the learning rate is multiplied by this at each drop")
    patience: Integer = Field(default=10, ge=0, description="epochs in a row without a better loss that are let pass")
    threshold: Real = Field(default=1e-4, ge=0, description="how much lower a loss must be to count as better")
    threshold_mode: Literal["rel", "abs"] = Field(
        default="rel", description="whether `threshold` is a share of the best loss, or a difference from it"
    )
    cooldown: Integer = Field(default=0, ge=0, description="epochs after a drop that aren't counted as bad")
    min_factor: MinFactor = 0.0
    warmup: Warmup = None
    warmup_factor: WarmupFactor = 0.01


Schedule = Annotated[
    ConstantSchedule
    | StepSchedule
    | MultiStepSchedule
    | ExponentialSchedule
    | CosineSchedule
    | OneCycleSchedule
    | PolynomialSchedule
    | PlateauSchedule,
    Field(discriminator="name"),
]
