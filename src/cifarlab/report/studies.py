"""A study's `study.json` as the page reads it: checked field by field, since anybody may have written it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from cifarlab import files
from cifarlab.errors import NotARunError, printable

MAX_BYTES = 50_000_000
MOST = 20_000  # arms, or runs, that a page can still show

Text = Annotated[str, StringConstraints(max_length=10_000)]
Figure = FiniteFloat | None


class _Part(BaseModel):
    # A newer cifarlab may say more than this one shows.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Arm(_Part):
    """What is tried: `changes` are recipe fields as `--set` names them. The first arm is the baseline."""

    id: Text
    name: Text
    changes: dict[str, Any] = {}


class StudyRun(_Part):
    """folder: below the study's own, None where there is none yet. val_accuracy: a fraction of 1."""

    arm: Text
    seed: int
    folder: Text | None = None
    status: Text
    val_accuracy: Figure = None
    seconds: Figure = None
    error: Text | None = None


class Result(_Part):
    """An arm beside the baseline. Accuracies and their differences are fractions of 1; low, high: a 95 % interval."""

    arm: Text
    n: int | None = None
    mean: Figure = None
    std: Figure = None
    pairs: int | None = None
    difference: Figure = None
    low: Figure = None
    high: Figure = None
    p: Figure = None
    p_holm: Figure = None
    verdict: Text | None = None
    more_seeds: int | None = None
    seconds: Figure = None


class Look(_Part):
    when: Text | None = None
    arm: Text | None = None
    seed: int | None = None
    accuracy: Figure = None


class Test(_Part):
    looks: Annotated[list[Look], Field(max_length=MOST)] = []


class Study(_Part):
    """The whole of `study.json`. resolve: the difference that is worth finding, a fraction of 1."""

    format: int
    name: Text
    created: Text | None = None
    status: Text
    design: Text
    dataset: Text
    seeds: Annotated[list[int], Field(max_length=MOST)] = []
    resolve: Figure = None
    arms: Annotated[list[Arm], Field(max_length=MOST)]
    runs: Annotated[list[StudyRun], Field(max_length=MOST)] = []
    results: Annotated[list[Result], Field(max_length=MOST)] = []
    test: Test | None = None


def read_study(path: Path) -> Study:
    """Read a `study.json`. Raises NotARunError where it is damaged, or of a format that is not known here."""
    try:
        if files.regular_size(path) > MAX_BYTES:
            raise NotARunError(f"{path} is larger than {MAX_BYTES:,} bytes; it was not written by cifarlab")
        study = Study.model_validate_json(path.read_bytes())
    except OSError as error:
        raise NotARunError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise NotARunError(printable(f"{path} is damaged: {field + ': ' if field else ''}{first['msg']}")) from None
    if study.format != 1:
        raise NotARunError(f"{path} is of format {study.format}; this cifarlab reads format 1; update it")
    return study
