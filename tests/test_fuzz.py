"""A moment of `fuzz.py` for every parser of anything from outside, the same inputs each time; and recipes from nothing.

For longer: python tests/fuzz.py PARSER --minutes 10
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarlab.errors import DataError, RecipeError
from cifarlab.recipe import Recipe, fingerprint, load_recipe, make_recipe, parse_yaml
from fuzz import HOSTILE, TARGETS, NoEndError, Target, check

EXAMPLES = {"pickle": 400, "archive": 300, "recipe": 100, "record": 100, "checkpoint": 60}


@pytest.mark.parametrize("parser", list(TARGETS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_file_is_read_or_refused_in_a_sentence(parser: str, tmp_path: Path) -> None:
    target = TARGETS[parser](tmp_path)
    outcomes = set()

    @settings(max_examples=EXAMPLES.get(parser, 150))
    @given(st.integers(0, 2**64 - 1))
    def holds(seed: int) -> None:
        outcomes.add(check(target, target.draw(random.Random(seed))))

    holds()
    assert outcomes == ({True} if parser == "image" else {True, False})


@settings(max_examples=300)
@given(st.text(max_size=80) | st.text("[]{}:,-?!&*|>'\"#%@ \n\tab01.e", max_size=80))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    try:
        make_recipe(parse_yaml(text, "x"))
    except RecipeError as error:
        assert "\n" not in str(error)


SECTIONS = list(Recipe.model_fields)
FIELDS = sorted({f"{name}.{field}" for name, values in load_recipe("ex2").to_dict().items() if isinstance(values, dict)
                 for field in values})  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(FIELDS + SECTIONS), st.sampled_from(HOSTILE)), min_size=1, max_size=3))
def test_any_value_of_any_field_is_one_or_refused(changes: list[tuple[str, Any]]) -> None:
    values = load_recipe("ex2").to_dict()
    for path, value in changes:
        section, _, field = path.partition(".")
        if not field or not isinstance(values.get(section), dict):
            values[section] = value
        else:
            values[section] = {**values[section], field: value}
    try:
        recipe = make_recipe(values)
    except RecipeError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert recipe.fingerprint() == fingerprint(parse_yaml(recipe.to_yaml(), "written"))


def test_the_check_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, two lines, no end, memory."""

    def reads(data: bytes) -> None:
        match data:
            case b"sentence":
                raise DataError("the file is damaged")
            case b"lines":
                raise DataError("the file\nis damaged")
            case b"other":
                raise ValueError("a bug")
            case b"end":
                while True:
                    pass

    monkeypatch.setattr("fuzz.SECONDS", 0.2)
    monkeypatch.setattr("fuzz.MOST_MEMORY", 100_000_000)
    target = Target(lambda draw: b"", reads)
    assert check(target, b"") and not check(target, b"sentence")
    for data, kind in ((b"lines", AssertionError), (b"other", ValueError), (b"end", NoEndError)):
        with pytest.raises(kind):
            check(target, data)
    monkeypatch.setattr("fuzz.SECONDS", 20)
    peaks = iter([10, 200_000_000, 200_000_000])
    monkeypatch.setattr("fuzz._peak", lambda: next(peaks))
    with pytest.raises(AssertionError, match="199,999,990 bytes of memory"):
        check(target, b"")
