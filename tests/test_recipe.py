"""Recipes: what is read is what was meant, and what is wrong is named before any work starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cifarlab import experiment
from cifarlab.errors import RecipeError
from cifarlab.recipe import (
    Recipe,
    fingerprint,
    flatten,
    load_recipe,
    make_recipe,
    parse_yaml,
    recipe_names,
    recipe_text,
)


def field(recipe: Recipe, path: str) -> Any:
    value: Any = recipe.to_dict()
    for key in path.split("."):
        value = value[key]
    return value


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_says_what_it_is_and_survives_being_written(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert make_recipe(parse_yaml(recipe.to_yaml(), "written")) == recipe
    # Any YAML reader gets the same numbers, not just ours.
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()
    heading = recipe_text(name)
    for word in (": ", "# Source:", "# Expected:", "# Cost:", f"# Command: cifarlab run {name}"):
        assert word in heading


REPORTED: dict[str, dict[str, Any]] = {
    "ex3": {"train.epochs": 40, "train.resolution": None, "augment.flip": None, "schedule.name": "constant"},
    "ex4": {"train.epochs": 15, "train.resolution": 128, "augment.crop_padding": 16, "augment.flip": "random"},
    "ex5": {"train.epochs": 30, "train.resolution": 128, "augment.crop_padding": 16, "optimizer.name": "lion"},
}


@pytest.mark.parametrize("network", ["efficientnet_v2_s", "efficientnet_lite0"])
@pytest.mark.parametrize("name", REPORTED)
def test_the_transfer_experiments_are_those_of_the_report(name: str, network: str) -> None:
    expected: dict[str, Any] = {"model.name": network, "model.pretrained": True, "model.head": "keep"}
    expected |= {"optimizer.name": "adam", "optimizer.lr": 1e-4, "optimizer.weight_decay": 1e-4}
    expected |= {"train.batch_size": 64, "train.numerics": "exact", "data.validation": 0.1, **REPORTED[name]}
    found = flatten(load_recipe(name + ("-lite0" if network == "efficientnet_lite0" else "")).to_dict())
    assert {key: found[key] for key in expected} == expected
    if name != "ex3":  # EX-2's schedule
        assert found["schedule.name"] == load_recipe("ex2-schedule").schedule.name == "cosine"
    scratch = flatten(load_recipe("ex4-scratch").to_dict())
    assert not scratch["model.pretrained"] and scratch["model.name"] == "efficientnet_v2_s"


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_fits_its_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, sides, stages to freeze, groups of parameters: all that is looked at before images are."""
    monkeypatch.setattr(experiment, "find_weights", lambda *_: None)  # no download
    recipe = load_recipe(name)
    plans = [recipe.resolved(dataset=dataset, seed=0) for dataset in recipe.datasets]
    experiment.check_plans(plans, tmp_path, torch.device("cpu"), print)


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.epochs=2", "train.epochs", 2),
        ("train.epochs=2.5", "train.epochs", 2.5),
        ("train.epochs=2.0", "train.epochs", 2),
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=5E-4", "optimizer.lr", 0.0005),
        ("optimizer.lr=.1", "optimizer.lr", 0.1),
        ("augment.flip=null", "augment.flip", None),
        ("augment={crop_padding: 4}", "augment.crop_padding", 4),
        ("datasets=[digits]", "datasets", ["digits"]),
        ("train.checkpoint_every.steps=7", "train.checkpoint_every", {"steps": 7}),
        ("train.checkpoint_every={minutes: 10}", "train.checkpoint_every", {"minutes": 10}),
        ("schedule.warmup.share=0.1", "schedule.warmup", {"share": 0.1}),
        ("name=mine", "name", "mine"),
        ("evaluate.test=false", "evaluate.test", False),
        ("train.numerics=auto", "train.numerics", "auto"),
    ],
)
def test_an_override_arrives_as_what_it_is(override: str, path: str, expected: object) -> None:
    value = field(load_recipe("ex2", [override]), path)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.validation=0", "train.early_stopping=3"], "train.early_stopping goes by validation accuracy"),
        (["data.validation=0", "evaluate.tta=auto"], "evaluate.tta 'auto' goes by validation accuracy"),
        (["augment={views: 3}", "evaluate.tta=5"], "evaluate.tta 5 averages augmented views"),
        (["model.freeze_stages=2", "model.freeze_late=[[0.5, 2]]"], "freeze_late begins with 2 stages"),
        (["model.freeze_stages=2", "loss.mixup=0.2"], "set model.cache to null, or mixup and cutmix to 0"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        load_recipe("ex1", overrides)
    load_recipe("ex1", overrides[:1])
    load_recipe("ex1", overrides[1:] if "augment" not in overrides[0] else ["augment.cutout=3", overrides[1]])


def test_a_progression_of_resolutions_says_what_is_seen_and_stored() -> None:
    recipe = load_recipe("ex2", ["train.resolution=[[0, 64], [0.3, 96]]", "evaluate.resolution=80"])
    assert recipe.train.resolutions == ((0.0, 64), (0.3, 96))
    assert (recipe.evaluation_side, recipe.sides, recipe.largest_side) == (80, (64, 96, 80), 96)
    assert make_recipe(parse_yaml(recipe.to_yaml(), "written")) == recipe
    plain = load_recipe("ex1")
    assert (plain.evaluation_side, plain.sides, plain.largest_side) == (None, (None,), None)


def test_a_weights_file_is_an_absolute_path_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("ex1", ["model.pretrained=mine.pth"]).resolved(dataset="digits", seed=0)
    assert recipe.model.pretrained == str(tmp_path / "mine.pth")


def test_a_new_optimizer_or_schedule_keeps_what_it_knows_and_drops_the_rest() -> None:
    recipe = load_recipe("ex2", ["optimizer.betas=[0.8, 0.9]", "schedule.name=cosine", "schedule.min_factor=0.1"])
    assert field(recipe, "optimizer.betas") == [0.8, 0.9]
    values = recipe.to_dict()
    changed = make_recipe(
        values, ["optimizer.name=sgd", "optimizer.momentum=0.9", "schedule.name=step", "schedule.step_size=3"]
    )
    assert field(changed, "optimizer.lr") == 1e-3
    assert field(changed, "optimizer.momentum") == 0.9
    assert "betas" not in changed.to_dict()["optimizer"]
    assert field(changed, "schedule.step_size") == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epocs=2", "unknown key 'train.epocs'; train has no 'epocs': did you mean 'epochs'?"),
        ("trian.epochs=2", "unknown key 'trian'; a recipe has no 'trian': did you mean 'train'?"),
        ("optimizer.name=adamx", "unknown optimizer 'adamx'; did you mean 'adam'?"),
        ("schedule.name=cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("optimizer.momentum=0.9", "unknown key 'optimizer.momentum'; adam has no 'momentum'"),
        (
            "train.checkpoint_every.stepz=1",
            "unknown key 'train.checkpoint_every.stepz'; checkpoint_every has no 'stepz'",
        ),
        ("datasets=[cifar11]", "datasets: unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        ("datasets=['folder:']", "dataset 'folder:' names no path"),
        ("train.epochs=abc", "train.epochs: expected a valid integer, not 'abc'"),
        ("train.epochs=0", "train.epochs: expected greater than 0, not 0"),
        ("train.epochs=true", "train.epochs: expected"),
        ("train.batch_size=1.5", "train.batch_size: expected a number of images from 1 on, or auto, not 1.5"),
        ("train.batch_size='64'", "train.batch_size: expected a number of images from 1 on, or auto, not '64'"),
        ("optimizer.lr=.nan", "optimizer.lr: expected"),
        ("optimizer.lr=1e999", "optimizer.lr: expected"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than 0, not -1"),
        ("data.validation=1", "data.validation: expected less than 1, not 1"),
        ("augment.flip=true", "augment.flip: expected 'random' or 'alternating', not True"),
        (
            "train.checkpoint_every={epochs: 1, steps: 2}",
            "a duration has exactly one of epochs, steps, minutes and share",
        ),
        ("train.checkpoint_every.steps=0", "train.checkpoint_every: expected more than 0; null keeps no checkpoints"),
        ("schedule.warmup.minutes=1", "schedule.warmup: minutes need a time budget; give epochs, steps or share"),
        ("train.epochs", "--set train.epochs: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("train.epochs.x=3", "--set train.epochs.x: 'epochs' is 50, which has no field 'x'"),
        ("data=3", "data: expected"),
        ("model.name=[a]", "model.name: expected a valid string"),
        ("optimizer.name=[adam]", "unknown optimizer"),
        ("train.resolution=100000", "train.resolution: expected pixels from 1 to 2048, or [[share of the run, pixels]"),
        ("train.resolution=true", "train.resolution: expected pixels from 1 to 2048"),
        ("train.resolution=[[0.1, 64]]", "train.resolution: the shares must begin with 0 and rise"),
        (
            "train.resolution=[[0, 64], [0.5, 96], [0.5, 128]]",
            "train.resolution: the shares must begin with 0 and rise",
        ),
        ("train.resolution=[[0, 64], [1, 96]]", "train.resolution: expected pairs of a share of the run"),
        ("train.resolution=[[0, 64, 3]]", "train.resolution: expected pairs of a share of the run"),
        ("train.accumulate=1000", "train: accumulate (1000) must not be more than batch_size (128)"),
        ("train.early_stopping=0", "train.early_stopping: expected greater than or equal to 1, not 0"),
        (
            "evaluate.tta=mirror",
            "evaluate.tta: expected flip, crops, diagonal, auto (the better on validation), a number",
        ),
        ("evaluate.tta=1", "evaluate.tta: expected flip, crops, diagonal, auto"),
        ("augment={translate: 2, crop_padding: 4}", "augment: crop_padding and translate both shift the image"),
        ("augment={flip: alternating, views: 3}", "augment: views 3 is odd"),
        ("model.freeze_late=3", "model.freeze_late: expected pairs of a share of the run (more than 0, less than 1)"),
        ("model.freeze_late=[[0.8, 0]]", "model.freeze_late: expected pairs of a share"),
        ("model.freeze_late=[[0.8, 1], [0.9, 1]]", "model.freeze_late: shares and stages must rise from pair to pair"),
        ("model.freeze_late=[[0.8, 2], [0.7, 3]]", "model.freeze_late: shares and stages must rise from pair to pair"),
        ("model.freeze_backbone=1", "model.freeze_backbone: expected a length such as {epochs: 1}"),
        ("model.pretrained=1", "model.pretrained: expected true, false or the path of a .safetensors"),
        ("loss.mixup=1e9", "loss.mixup: expected less than or equal to 100"),
        ("model.freeze_backbone.minutes=1", "model.freeze_backbone: minutes need a time budget"),
        ("name=../x", "name: must be letters, digits"),
        ("seed=-1", "seed: expected greater than or equal to 0, not -1"),
        ("train.epochs=[1", "--set train.epochs: line 1, column 3: not valid YAML"),
        (
            "model.pretrained=weights.onnx",
            "pretrained: expected true, false or the path of a .safetensors or .pth file",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("ex1", [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plateau_needs_validation_images() -> None:
    with pytest.raises(RecipeError, match=r"'plateau' reads the validation loss, and data.validation is 0"):
        load_recipe("ex1", ["schedule.name=plateau", "data.validation=0"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  epochs: [1\nmodel: x", "line 3, column 6: not valid YAML"),
        ("a: 1\na: 2", "line 2, column 1: not valid YAML: the key 'a' stands twice"),
        ("a: &x 1\nb: *x", "line 2, column 4: not valid YAML: aliases"),
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4: not valid YAML: could not determine"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!map [1]", "not valid YAML"),
        ("a: " + "1:" * 200 + "0.0", "not valid YAML"),
        ("[1, 2]", "expected sections such as 'model:' and 'train:', found [1, 2]"),
        ("", "expected sections such as 'model:' and 'train:', found None"),
        ("[" * 5000, "nested too deeply"),
        ("\x00", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("model: {name: ex1}", "'name' is missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\xff")
    with pytest.raises(RecipeError, match="not a UTF-8 text file"):
        load_recipe(str(tmp_path / "latin.yaml"))
    (tmp_path / "huge.yaml").write_bytes(b"#" * 100_001)
    with pytest.raises(RecipeError, match="larger than 100,000 bytes"):
        load_recipe(str(tmp_path / "huge.yaml"))
    with pytest.raises(RecipeError, match=r"unknown recipe 'ex11'; did you mean 'ex1'\?"):
        load_recipe("ex11")


def test_runs_that_differ_by_seed_name_or_dataset_share_a_fingerprint_and_others_do_not() -> None:
    recipe = load_recipe("ex1")
    same = make_recipe(recipe.to_dict(), ["seed=5", "name=other", "datasets=[digits]"])
    assert same.fingerprint() == recipe.fingerprint() == fingerprint(yaml.safe_load(recipe.to_yaml()))
    assert load_recipe("ex1", ["optimizer.lr=2e-3"]).fingerprint() != recipe.fingerprint()


def test_how_a_run_is_carried_out_is_no_part_of_its_fingerprint_and_defaults_are() -> None:
    recipe = load_recipe("ex2")
    elsewhere = ["data.workers=0", "data.memory=5", "train.checkpoint_every.minutes=3", "evaluate.test=false"]
    assert load_recipe("ex2", elsewhere).fingerprint() == recipe.fingerprint()
    bare = parse_yaml(recipe_text("ex2"), "ex2")  # the file, without the fields that it leaves at their defaults
    assert fingerprint(bare) == recipe.fingerprint()
    assert fingerprint({**bare, "loss": {"label_smoothing": 0.1}}) != recipe.fingerprint()


def test_a_resolved_recipe_names_its_folder_from_anywhere_and_refuses_a_seed_out_of_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = load_recipe("ex1").resolved(dataset="folder:pictures", seed=1)
    assert resolved.datasets == (f"folder:{tmp_path / 'pictures'}",)
    with pytest.raises(RecipeError, match="seed: expected less than 2147483648, not 3000000000"):
        load_recipe("ex1").resolved(dataset="digits", seed=3_000_000_000)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("ex1")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]
