"""What a study varies, what its results are, and what becomes of its record: without training anything."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cifarlab.errors import NotARunError, RecipeError, UsageError
from cifarlab.factors import changes_in_words, make_arms, parse_factor
from cifarlab.recipe import Recipe, load_recipe
from cifarlab.stats import holm, paired_difference, seeds_needed
from cifarlab.study import Arm, Run, Study, StudyFolder, results, winner


def factors_of(*texts: str) -> list[Any]:
    return [parse_factor(text) for text in texts]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("ex1").resolved(dataset="digits", seed=0)


# --- factors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields", "values"),
    [
        ("optimizer.lr=1e-3,3e-3", ["optimizer.lr"], [[0.001], [0.003]]),
        ("augment.flip=random,null", ["augment.flip"], [["random"], [None]]),
        (
            "train.resolution=32,[[0, 20], [0.5, 32]]",
            ["train.resolution"],
            [[32], [[[0, 20], [0.5, 32]]]],
        ),
        (
            "train.batch_size=64,256; optimizer.lr=1e-3,2e-3",
            ["train.batch_size", "optimizer.lr"],
            [[64, 0.001], [256, 0.002]],
        ),
        ("schedule={name: cosine},{name: constant}", ["schedule"], [[{"name": "cosine"}], [{"name": "constant"}]]),
    ],
)
def test_a_factor_is_read(text: str, fields: list[str], values: list[list[Any]]) -> None:
    found = parse_factor(text)
    assert (found.fields, found.values) == (fields, values)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optimizer.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("optimizer.lr=", "expected KEY=VALUE"),
        ("optimizer.lr=[1,2", "not valid YAML"),
        ("seed=1,2", "give --seeds N"),
        ("datasets=cifar10,cifar100", "give --dataset NAME"),
        ("datasets.0=cifar10", "can't be varied"),
        ("data.validation=0.1,0.2", "different validation images"),
        ("evaluate.test=true,false", "scored once"),
        ("train.batch_size=64,128;optimizer.lr=1e-3", "train.batch_size has 2, optimizer.lr has 1"),
        ("optimizer.lr=1e-3;optimizer.lr=1e-2", "stands twice"),
        ("optimizer.lr=1e-4..1e-1", "needs --search"),
    ],
)
def test_a_factor_that_is_none_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_factor(text)


def test_a_range_is_for_a_search() -> None:
    found = parse_factor("optimizer.lr=1e-4 .. 1e-1", ranges=True)
    assert (found.low, found.high, found.values) == (1e-4, 0.1, [])
    for text in ("optimizer.lr=0..1", "optimizer.lr=1..0.1", "optimizer.lr=a..b", "optimizer.lr=1..inf"):
        with pytest.raises(UsageError, match=r"LOW\.\.HIGH"):
            parse_factor(text, ranges=True)


def arms(recipe: Recipe, design: Any, *texts: str) -> list[dict[str, Any]]:
    found = make_arms(recipe, factors_of(*texts), design)
    assert found[0][0].name == "baseline"
    assert len({arm.id for arm, _ in found}) == len(found)
    return [arm.changes for arm, _ in found]


def test_a_grid_has_every_combination_and_the_recipe_as_it_is(recipe: Recipe) -> None:
    two = ("optimizer.lr=1e-3,3e-3", "optimizer.weight_decay=0,1e-4")
    found = arms(recipe, "grid", *two)  # the recipe's own are 1e-3 and 1e-4
    assert found[0] == {}
    assert found[1:] == [
        {"optimizer.lr": 0.001, "optimizer.weight_decay": 0},
        {"optimizer.lr": 0.003, "optimizer.weight_decay": 0},
        {"optimizer.lr": 0.003, "optimizer.weight_decay": 0.0001},
    ]
    assert len(arms(recipe, "grid", "optimizer.lr=2e-3,3e-3", "optimizer.weight_decay=0,1e-5")) == 5


def test_one_at_a_time_changes_one_thing(recipe: Recipe) -> None:
    assert arms(recipe, "one-at-a-time", "optimizer.lr=1e-3,3e-3", "augment.flip=random") == [
        {},
        {"optimizer.lr": 0.003},
        {"augment.flip": "random"},
    ]


def test_leave_one_out_begins_with_all_and_ends_with_none(recipe: Recipe) -> None:
    found = make_arms(
        recipe,
        factors_of("augment.flip=random,null", "model.name=ex2,ex1", "optimizer.weight_decay=0"),
        "leave-one-out",
    )
    full = {"augment.flip": "random", "model.name": "ex2"}
    assert [arm.changes for arm, _ in found] == [
        full,
        {**full, "augment.flip": None},
        {**full, "model.name": "ex1"},
        {**full, "optimizer.weight_decay": 0},
        {"augment.flip": None, "model.name": "ex1", "optimizer.weight_decay": 0},
    ]
    assert [arm.name for arm, _ in found] == [
        "baseline",
        "augment.flip=null",
        "model.name=ex1",
        "optimizer.weight_decay=0",
        "augment.flip=null, model.name=ex1, optimizer.weight_decay=0",
    ]
    assert found[0][1].model.name == "ex2"


@pytest.mark.parametrize(
    ("design", "texts", "sentence"),
    [
        ("grid", ["optimizer.lr=1e-3"], "nothing to compare"),
        ("leave-one-out", ["optimizer.lr=1e-3"], "the same as with it"),
        ("leave-one-out", ["optimizer.lr=1,2,3"], "leave-one-out takes"),
        ("grid", ["optimizer.lr=-1,1"], "optimizer.lr"),
        ("grid", ["optimizer.speed=1,2"], "unknown key 'optimizer.speed'"),
    ],
)
def test_arms_that_cannot_be_are_refused_before_anything_starts(
    recipe: Recipe, design: Any, texts: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        make_arms(recipe, factors_of(*texts), design)


def test_a_network_of_another_optimizer_keeps_the_recipe_valid(recipe: Recipe) -> None:
    ((_, _), (_, other)) = make_arms(recipe, factors_of("optimizer.name=sgd;optimizer.lr=0.1"), "one-at-a-time")
    assert (other.optimizer.name, other.optimizer.lr) == ("sgd", 0.1)


def test_changes_from_outside_are_one_printable_line() -> None:
    assert changes_in_words({"a.b": "x\n\x1b[31m", "c": {"d": 1}}) == "a.b=x??[31m, c.d=1"


# --- results ----------------------------------------------------------------------------------------


def study(accuracies: Mapping[str, Sequence[float | None]], **values: Any) -> Study:
    """A study by the validation accuracies of its arms; None where a run isn't finished."""
    names = list(accuracies)
    runs = [
        Run(
            arm=name, seed=seed, val_accuracy=accuracy, status="waiting" if accuracy is None else "finished",
            images=5_000, losses=f"{accuracy}", seconds=10.0,
        )
        for name, column in accuracies.items()
        for seed, accuracy in enumerate(column)
    ]  # fmt: skip
    return Study(
        name="s", created="", cifarlab="", command="", dataset="digits", design="grid", factors=[], recipe={},
        seeds=list(range(len(accuracies[names[0]]))), arms=[Arm(id=name, name=name) for name in names], runs=runs,
        **{"resolve": 0.002, **values},
    )  # fmt: skip


def test_results_are_paired_corrected_and_in_words() -> None:
    base = [0.700, 0.710, 0.705, 0.702, 0.712]
    better = [value + delta for value, delta in zip(base, [0.020, 0.022, 0.018, 0.021, 0.019], strict=True)]
    worse = [value - delta for value, delta in zip(base, [0.010, 0.012, 0.009, 0.011, 0.010], strict=True)]
    noise = [value + delta for value, delta in zip(base, [0.004, -0.003, 0.002, -0.004, 0.003], strict=True)]
    found = results(study({"base": base, "better": better, "worse": worse, "noise": noise, "same": base}))
    assert [result.verdict for result in found] == ["baseline", "better", "worse", "within noise", "identical"]
    tests = [
        paired_difference([a - b for a, b in zip(arm, base, strict=True)], 1 / 5_000) for arm in (better, worse, noise)
    ]
    adjusted = holm([test.p or 0 for test in tests])
    for result, test, p_holm in zip(found[1:4], tests, adjusted, strict=True):
        assert (result.difference, result.low, result.high, result.p) == (test.mean, test.low, test.high, test.p)
        assert result.p_holm == p_holm
    assert found[3].more_seeds == (seeds_needed(0.002, tests[2].std or 0, 3) or 0) - 5
    assert found[4].p is None and found[4].low is None  # identical runs are no sample
    assert found[1].more_seeds is None and found[0].seconds == 10.0


def test_equal_accuracies_of_runs_that_did_not_do_the_same_are_not_identical() -> None:
    made = study({"base": [0.5, 0.6, 0.7], "arm": [0.5, 0.6, 0.7]})
    made.runs[4].losses = "another"
    found = results(made)[1]
    assert (found.verdict, found.difference, found.p) == ("within noise", 0.0, 1.0)
    assert found.low is not None and found.low < 0


def test_only_seeds_that_both_have_are_compared() -> None:
    found = results(study({"base": [0.5, 0.6, None, 0.7], "arm": [0.51, None, 0.9, 0.72]}))[1]
    assert (found.n, found.pairs) == (3, 2)
    assert found.difference == pytest.approx(0.015)
    assert results(study({"base": [0.5, None], "arm": [0.51, 0.9]}))[1].verdict == "one pair: no telling"
    assert results(study({"base": [None], "arm": [0.51]}))[1].verdict == "no pair yet"


def test_an_arm_that_diverged_is_said_to_have_and_not_tested() -> None:
    made = study({"base": [0.5, 0.6, 0.7], "arm": [0.9, 0.9, None]})
    made.runs[5].status = "diverged"
    found = results(made)[1]
    assert found.verdict == "diverged in 1 of 3"
    assert found.p_holm is None


def test_the_winner_has_the_best_mean_of_whole_arms() -> None:
    assert winner(study({"base": [0.5, 0.5], "a": [0.6, 0.5], "b": [0.9, None]})).id == "a"
    assert winner(study({"base": [0.5, 0.5], "a": [0.5, 0.5]})).id == "base"


def test_arms_of_one_population_are_within_noise_19_times_of_20() -> None:
    """1,000 studies of two arms with five seeds each; three standard errors are 2 points."""
    generator = random.Random(5)
    within = 0
    for _ in range(1_000):
        drawn = [[round(generator.gauss(0.7, 0.004) * 5_000) / 5_000 for _ in range(5)] for _ in range(2)]
        within += results(study({"base": drawn[0], "arm": drawn[1]}))[1].verdict in ("within noise", "identical")
    assert 930 <= within <= 970


# --- the record -------------------------------------------------------------------------------------


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = study({"base": [0.5, 0.6], "arm": [0.51, 0.62]})
    made.results = results(made)
    folder = StudyFolder(tmp_path)
    folder.write(made)
    assert folder.read() == made
    assert StudyFolder.open(tmp_path).read().results[1].pairs == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"runs": [{"arm": "a", "seed": 0, "folder": "../../etc"}]}, "runs.0.folder"),
        ({"runs": [{"arm": "a", "seed": 0, "folder": "/etc"}]}, "runs.0.folder"),
        ({"arms": [{"id": "../x", "name": "x"}]}, "arms.0.id"),
        ({"arms": []}, "arms"),
        ({"format": 2}, "format"),
        ({"resolve": "much"}, "resolve"),
    ],
)
def test_a_damaged_study_is_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    values = json.loads(study({"base": [0.5], "arm": [0.6]}).model_dump_json()) | change
    (tmp_path / "study.json").write_text(json.dumps(values))
    with pytest.raises(NotARunError, match=rf"study.json is damaged: {sentence}"):
        StudyFolder(tmp_path).read()


def test_what_is_no_study_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match="is not a study folder"):
        StudyFolder.open(tmp_path)
    (tmp_path / "study.json").write_bytes(b"\xff{")
    with pytest.raises(NotARunError, match="damaged"):
        StudyFolder(tmp_path).read()


def test_a_recipe_without_validation_images_has_nothing_to_decide_by() -> None:
    from cifarlab.ablate import plan_study

    common: dict[str, Any] = {"dataset": "digits", "seeds": [0], "resolve": 0.002, "command": []}
    with pytest.raises(RecipeError, match=r"data\.validation is 0"):
        plan_study("s", load_recipe("fast90"), factors_of("train.epochs=1"), "grid", **common)
    with pytest.raises(RecipeError, match=r"train\.batch_size is auto"):
        plan_study("s", load_recipe("ex1"), factors_of("train.batch_size=64,auto"), "grid", **common)
