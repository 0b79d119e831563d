"""What every section of a recipe is made of: the rules of a section, and the one vocabulary for durations."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cifarlab.errors import printable


def _of_64_bits(value: int) -> int:
    # As in recipe files. Not `lt`, which would replace a field's own.
    if value >= 2**63:
        raise ValueError("an integer of more than 64 bits")
    return value


# Strict: pydantic would otherwise take `true` for 1, "50" for 50 and "yes" for true.
Integer = Annotated[int, Field(strict=True), AfterValidator(_of_64_bits)]
Real = Annotated[float, Field(strict=True)]
Boolean = Annotated[bool, Field(strict=True)]


def is_path(text: str) -> bool:
    """Whether the operating system could have a path of these characters: YAML's escapes can write any."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def shown(value: Any) -> str:
    """A value that was found, for a message."""
    return short(repr(value))


def short(text: str) -> str:
    """Text from outside, for a message."""
    return printable(text if len(text) <= 60 else text[:57] + "...")


class Section(BaseModel):
    """A section of a recipe: frozen, without unknown fields, NaN or infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Duration(Section):
    """A length of training, in exactly one unit: `{epochs: 1}`, `{steps: 500}`, `{minutes: 10}` or `{share: 0.08}`."""

    epochs: Real | None = Field(default=None, ge=0, description="passes over the training set")
    steps: Integer | None = Field(default=None, ge=0, description="optimizer steps, that is batches")
    minutes: Real | None = Field(default=None, ge=0, description="minutes of training time")
    share: Real | None = Field(default=None, ge=0, le=1, description="share of the whole run, from 0 to 1")

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if not isinstance(value, dict | Duration):
            raise ValueError(
                f"expected a length such as {{epochs: 1}}, {{steps: 500}} or {{share: 0.1}}, not {shown(value)}"
            )
        return value

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> Duration:
        given = [unit for unit in type(self).model_fields if getattr(self, unit) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"a duration has exactly one of epochs, steps, minutes and share; given: {found}")
        return self

    @model_serializer(mode="wrap")
    def _only_the_unit_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {unit: value for unit, value in handler(self).items() if value is not None}

    def share_of(self, total_steps: int, steps_per_epoch: int, seconds: float | None = None) -> float:
        """The duration as a share of a run of `total_steps` steps, or of `seconds` seconds under a time budget.

        More than 1 where the duration is longer than the run. Raises ValueError for minutes without `seconds`.
        """
        if self.share is not None:
            return self.share
        if self.minutes is not None:
            if seconds is None:
                raise ValueError("a duration in minutes needs the length of the run in seconds")
            return self.minutes * 60 / seconds
        steps = self.steps if self.steps is not None else (self.epochs or 0.0) * steps_per_epoch
        return steps / total_steps

    def in_steps(self, total_steps: int, steps_per_epoch: int, seconds_per_step: float | None = None) -> int:
        """The duration in whole steps, rounded; at least 1 unless the duration is 0.

        Raises ValueError for minutes without `seconds_per_step`.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            exact = self.epochs * steps_per_epoch
        elif self.share is not None:
            exact = self.share * total_steps
        else:
            if seconds_per_step is None:
                raise ValueError("a duration in minutes needs the seconds that a step takes")
            exact = (self.minutes or 0.0) * 60 / seconds_per_step
        return max(1, round(exact)) if exact > 0 else 0
