"""What a study varies: factors read from the command line, and the arms that a design makes of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cifarlab.errors import UsageError, printable
from cifarlab.recipe import Recipe, flatten, make_recipe, parse_yaml
from cifarlab.recipe_base import short
from cifarlab.study import Arm, Design, Factor

EXAMPLE = "--vary optimizer.lr=1e-3,3e-3"
# Fields by which arms could not be told apart or compared, and what to do instead.
_FIXED = {
    "seed": "give --seeds N",
    "name": "it names the study's runs",
    "datasets": "give --dataset NAME; a study has one",
    "data.validation": "accuracies on different validation images can't be compared",
    "evaluate.test": "the test set is scored once, at the end, for the winner and the baseline",
}
_RANGE = re.compile(r"\s*(\S+?)\s*\.\.\s*(\S+)\s*")


def parse_factor(text: str, *, ranges: bool = False) -> Factor:
    """`optimizer.lr=1e-3,3e-3` as a factor. Raises UsageError.

    Fields that vary together are divided by a semicolon: `train.batch_size=128,512;optimizer.lr=1e-3,2e-3`.
    Values are YAML: `augment.flip=random,null`, `train.resolution=32,[[0, 20], [0.5, 32]]`.
    ranges: `optimizer.lr=1e-4..1e-1` is one, of a search.
    """
    fields: list[str] = []
    columns: list[list[Any]] = []
    for part in text.split(";"):
        field, equals, listed = part.partition("=")
        field = field.strip()
        if not equals or not field or not listed.strip():
            raise UsageError(f"--vary {short(text)}: expected KEY=VALUE,VALUE…, for example {EXAMPLE}")
        if (why := _FIXED.get(field)) is not None or field.split(".")[0] in ("seed", "name", "datasets"):
            raise UsageError(f"--vary {short(field)}: it can't be varied: {why or 'it has no parts'}")
        if (found := _RANGE.fullmatch(listed)) is not None:
            if not ranges:
                raise UsageError(f"--vary {short(text)}: a range needs --search N; give values, as in {EXAMPLE}")
            return _range(field, found[1], found[2], text)
        values = parse_yaml(f"[{listed}]", f"--vary {field}")
        if not isinstance(values, list) or not values:
            raise UsageError(f"--vary {short(text)}: expected values, for example {EXAMPLE}")
        fields.append(field)
        columns.append(values)
    if len(set(fields)) < len(fields):
        raise UsageError(f"--vary {short(text)}: a field stands twice")
    if len({len(values) for values in columns}) > 1:
        counts = ", ".join(f"{field} has {len(values)}" for field, values in zip(fields, columns, strict=True))
        raise UsageError(f"--vary {short(text)}: fields that vary together need equally many values; {counts}")
    return Factor(fields=fields, values=[list(row) for row in zip(*columns, strict=True)])


def _range(field: str, low_text: str, high_text: str, text: str) -> Factor:
    low: int | float
    high: int | float
    try:
        low, high = (int(end) if end.isdecimal() else float(end) for end in (low_text, high_text))
    except ValueError:
        low = high = 0
    if not 0 < low < high < float("inf"):
        raise UsageError(
            f"--vary {short(text)}: expected LOW..HIGH, two numbers above 0, for example --vary optimizer.lr=1e-4..1e-1"
        )
    return Factor(fields=[field], low=low, high=high)


def make_arms(recipe: Recipe, factors: Sequence[Factor], design: Design) -> list[tuple[Arm, Recipe]]:
    """The arms of a design with their recipes, the baseline first. Raises UsageError, and RecipeError for a bad value.

    grid            every combination of values; the baseline is the recipe as it is, an arm of its own where it is no
                    combination
    one-at-a-time   the baseline is the recipe as it is; each value of each factor is an arm
    leave-one-out   a factor has one value, without it, or two: with it and without it (by default the recipe's own is
                    with it). The baseline has all factors, each arm lacks one, and the last lacks all

    search          the baseline alone: the others are found on the way. Every value, and both ends of a range, can be

    A combination that is the same recipe as another is left out.
    """
    if design == "search":
        for factor in factors:
            for row in factor.values or [[factor.low], [factor.high]]:
                varied(recipe, dict(zip(factor.fields, row, strict=True)))
        return [(Arm(id=arm_id(0, "baseline"), name="baseline"), recipe)]
    if design == "leave-one-out":
        with_all = [_settings(factor, 0) for factor in factors if len(factor.values) == 2]
        baseline: dict[str, Any] = {field: value for settings in with_all for field, value in settings.items()}
        for factor in factors:
            if len(factor.values) > 2:
                raise UsageError(
                    f"--vary {short(', '.join(factor.fields))}: leave-one-out takes the value without it, or two: "
                    "with it and without it"
                )
        changes = [{**baseline, **_settings(factor, -1)} for factor in factors]
        if len(factors) > 1:
            changes.append({**baseline, **{key: value for change in changes for key, value in _only(change, baseline)}})
    elif design == "grid":
        baseline = {}
        rows = itertools.product(*([_settings(factor, row) for row in range(len(factor.values))] for factor in factors))
        changes = [{field: value for settings in row for field, value in settings.items()} for row in rows]
    else:
        baseline = {}
        changes = [_settings(factor, row) for factor in factors for row in range(len(factor.values))]
    return _distinct(recipe, baseline, changes, factors if design == "leave-one-out" else ())


def _settings(factor: Factor, row: int) -> dict[str, Any]:
    return dict(zip(factor.fields, factor.values[row], strict=True))


def _only(change: dict[str, Any], baseline: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in change.items() if key not in baseline or baseline[key] != value)


def _distinct(
    recipe: Recipe, baseline: dict[str, Any], changes: Sequence[dict[str, Any]], left_out: Sequence[Factor]
) -> list[tuple[Arm, Recipe]]:
    first = varied(recipe, baseline)
    recipes, kept = [first], [baseline]
    for number, change in enumerate(changes):
        made = varied(recipe, change)
        if made not in recipes:
            recipes.append(made)
            kept.append(change)
        elif number < len(left_out):
            raise UsageError(
                f"--vary {short(', '.join(left_out[number].fields))}: without it the recipe is the same as with it"
            )
    if len(kept) == 1:
        raise UsageError(f"every value is the recipe's own, so there is nothing to compare; {EXAMPLE}")
    arms = []
    for number, change in enumerate(kept):
        named = dict(_only(change, baseline)) if left_out else change
        name = changes_in_words(named) if number else "baseline"
        arms.append(Arm(id=arm_id(number, "baseline" if not number else name), name=name, changes=change))
    return list(zip(arms, recipes, strict=True))


def varied(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A recipe with some fields changed, as `--set` changes them. Raises RecipeError."""
    overrides = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
    return make_recipe(recipe.to_dict(), overrides, origin=f"recipe {recipe.name}")


def changes_in_words(changes: dict[str, Any]) -> str:
    """`optimizer.lr=0.003, augment.flip=null`, for a table."""
    return printable(", ".join(f"{field}={_text(value)}" for field, value in flatten(changes).items()))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def arm_id(number: int, name: str) -> str:
    """A folder's name: `01-lr=0.003` for the first arm beside the baseline."""
    words = re.sub(r"\b\w+\.(?=[a-z_]+=)", "", name)
    safe = re.sub(r"[^A-Za-z0-9.+-]+", "-", words.replace("=", "-")).strip("-.")
    return f"{number:02d}-{safe[:60].strip('-.') or 'arm'}"
