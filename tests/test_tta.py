"""Test-time augmentation: averaged probabilities by hand, chosen on validation, gain and cost on record."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab import build, experiment
from cifarlab.data.prepare import Prepared, prepare
from cifarlab.errors import NotARunError, RecipeError
from cifarlab.evaluate import UNSURE, Predictions, Tta, _views, choose_tta, predict, views_of, with_tta
from cifarlab.models import build_model
from cifarlab.rundir import RunFolder
from cifarlab.seeds import derive_seed
from short_runs import CPU, make_dataset, normalised, recipe, run

AUGMENT = "augment={crop_padding: 4, flip: random}"


def trained(folder: RunFolder) -> tuple[torch.nn.Module, Prepared]:
    data = prepare(make_dataset(noise=0.3), folder.recipe().data, 0)
    model = build_model(folder.recipe().model, classes=4, size=(32, 32), seed=0)
    model.load_state_dict(folder.load_checkpoint("best.pth")["model"])
    return model.eval(), data


def by_hand(folder: RunFolder, views: list[Any]) -> tuple[float, float, float]:
    """Accuracy and loss of the mean probability over views of the test images, and accuracy without."""
    model, data = trained(folder)
    pixels = torch.from_numpy(data.test.images.pixels)
    labels = torch.from_numpy(data.test.labels)
    with torch.no_grad():
        probabilities = torch.stack(
            [F.softmax(model(normalised(view(pixels).numpy(), data)), 1) for view in views]
        ).mean(0)
        plain = model(normalised(pixels.numpy(), data))
    accuracy = (probabilities.argmax(1) == labels).float().mean().item()
    return accuracy, F.nll_loss(probabilities.log(), labels).item(), (plain.argmax(1) == labels).float().mean().item()


def shifted(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """The picture moved down by `rows` and right by `columns`; black comes in, as the recipe's crops have it."""
    padded = F.pad(pixels, (4, 4, 4, 4))
    return padded[:, :, 4 - rows : 36 - rows, 4 - columns : 36 - columns]


def test_flip_averages_the_probabilities_of_two_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = make_dataset(noise=0.3)
    folder = run(tmp_path, AUGMENT, "evaluate.tta=flip", dataset=noisy, monkeypatch=monkeypatch)
    log, train_log = folder.test_log(), folder.train_log()
    assert log is not None
    accuracy, loss, plain = by_hand(folder, [lambda pixels: pixels, lambda pixels: pixels.flip(3)])
    assert log["accuracy"] == pytest.approx(plain)
    tta = log["tta"]
    assert (tta["mode"], tta["accuracy"]) == ("flip", pytest.approx(accuracy))
    assert tta["loss"] == pytest.approx(loss, rel=1e-4)
    assert tta["gain"] == pytest.approx(accuracy - plain, abs=1e-6) and tta["cost"] > 0
    assert train_log["tta"]["val_gain"] == pytest.approx(
        train_log["tta"]["val_accuracy"] - train_log["best_val_accuracy"], abs=1e-9
    )


def test_crops_are_five_places_mirrored_and_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = make_dataset(noise=0.3)
    folder = run(tmp_path, AUGMENT, "evaluate.tta=crops", dataset=noisy, monkeypatch=monkeypatch)
    log = folder.test_log()
    assert log is not None
    places = [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)]  # a sixteenth of the side
    views: list[Any] = []
    for rows, columns in places:
        views.append(lambda pixels, r=rows, c=columns: shifted(pixels, r, c))
        views.append(lambda pixels, r=rows, c=columns: shifted(pixels.flip(3), r, c))
    accuracy, loss, _ = by_hand(folder, views)
    assert log["tta"]["accuracy"] == pytest.approx(accuracy)
    assert log["tta"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_number_averages_augmented_views_the_same_ones_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = make_dataset(noise=0.3)
    folder = run(tmp_path, AUGMENT, "evaluate.tta=4", dataset=noisy, monkeypatch=monkeypatch)
    first = folder.test_log()
    again = experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None)
    assert first is not None and first["tta"]["loss"] == again["tta"]["loss"]
    assert first["tta"]["loss"] != first["loss"]
    flip = experiment.score_run(
        folder.path, data_folder=None, device=CPU, report=lambda _: None, override=["evaluate.tta=flip"]
    )
    assert flip["tta"]["mode"] == "flip" and flip["loss"] == first["loss"] and flip["test_looks"] == 3
    none = experiment.score_run(
        folder.path, data_folder=None, device=CPU, report=lambda _: None, override=["evaluate.tta=null"]
    )
    assert none["tta"] is None
    with pytest.raises(RecipeError, match="expected flip, crops, diagonal, auto"):
        experiment.score_run(
            folder.path, data_folder=None, device=CPU, report=lambda _: None, override=["evaluate.tta=mirror"]
        )


def test_augmented_views_are_drawn_one_by_one_and_their_probabilities_averaged() -> None:
    """Against the pipeline's own training images of as many draws; what comes back are logarithms of probabilities."""
    plan = recipe(AUGMENT)
    task = build.make_task(plan, prepare(make_dataset(), plan.data, 0), CPU, None, lambda _: None)
    assert task.validation is not None
    got = predict(task.network, task.store, task.validation, task.pipeline, 500, tta=3, seed=7)
    pixels = next(iter(task.store.batches(task.validation, 500))).pixels
    views = []
    for number in range(3):
        draws = task.pipeline.draw(derive_seed(7, "tta", number), 0, len(task.store))
        with torch.no_grad():
            views.append(task.network.model.eval()(task.pipeline.train(pixels, task.validation, draws)).softmax(1))
    assert not torch.allclose(views[0], views[1])
    torch.testing.assert_close(got.logits.exp(), torch.stack(views).mean(0), rtol=1e-5, atol=1e-6)


def test_only_unsure_images_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those below the bound get what all would get, the others stay; as a run does it."""
    noisy = make_dataset(noise=0.3)
    folder = run(tmp_path, AUGMENT, "evaluate.tta=flip", dataset=noisy, monkeypatch=monkeypatch)
    log = folder.test_log()
    assert log is not None
    model, data = trained(folder)
    pixels = normalised(data.test.images.pixels, data)
    with torch.no_grad():
        views = torch.stack([model(pixels), model(pixels.flip(3))]).softmax(2)
    sure = views[0].amax(1)
    below = sure.median().item() + 1e-6
    expected = torch.where((sure < below)[:, None], views.mean(0), views[0])
    assert not torch.allclose(expected, views[0]) and not torch.allclose(expected, views.mean(0))
    loss = F.nll_loss(expected.log(), torch.from_numpy(data.test.labels)).item()
    settings = [AUGMENT, "evaluate.tta=flip", f"evaluate.tta_below={below}"]
    found = run(tmp_path / "unsure", *settings, dataset=noisy, monkeypatch=monkeypatch).test_log()
    assert found is not None
    assert found["tta"]["loss"] == pytest.approx(loss, rel=1e-4) != log["tta"]["loss"]


def test_where_all_are_sure_nothing_is_looked_at_again() -> None:
    plain = Predictions(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]), torch.tensor([4, 2]))

    def nobody(samples: Tensor, mode: Tta) -> Predictions:
        raise AssertionError(samples)

    got = with_tta(plain, "flip", 0.9, nobody)
    torch.testing.assert_close(got.logits, F.log_softmax(plain.logits, 1))
    assert with_tta(plain, None, 0.99, nobody) is plain


def test_frozen_stages_see_each_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have kept of the images as they are must not stand in for those that are mirrored or moved."""
    settings = ["model.freeze_stages=2", "train.epochs=1", "evaluate.tta=crops"]
    noisy = make_dataset(noise=0.3)
    kept, anew = (
        run(tmp_path / cache, *settings, f"model.cache={cache}", dataset=noisy, monkeypatch=monkeypatch)
        for cache in ("float32", "null")
    )
    assert kept.train_log()["tta"] == anew.train_log()["tta"]
    assert (kept.test_log() or {})["tta"]["loss"] == (anew.test_log() or {})["tta"]["loss"]


def predictions(right: int) -> Predictions:
    """Of ten images so many are right."""
    labels = torch.arange(10) % 2
    said = torch.where(torch.arange(10) < right, labels, 1 - labels)
    return Predictions(F.one_hot(said, 2).float(), labels, torch.arange(10))


@pytest.mark.parametrize(
    ("plain", "flip", "crops", "mode"), [(5, 7, 6, "flip"), (5, 6, 7, "crops"), (5, 7, 7, "flip"), (7, 7, 6, None)]
)
def test_auto_takes_the_best_on_validation_and_the_cheaper_at_a_tie(
    plain: int, flip: int, crops: int, mode: str | None
) -> None:
    scores: dict[Tta, int] = {"flip": flip, "crops": crops}
    chosen = choose_tta("auto", predictions(plain), lambda mode: predictions(scores[mode]))
    best = max(plain, flip, crops) / 10
    assert chosen["mode"] == mode and chosen["val_accuracy"] == pytest.approx(best)
    assert chosen["val_gain"] == pytest.approx(best - plain / 10)
    assert chosen["tried"] == {"flip": flip / 10, "crops": crops / 10}


def test_where_auto_chooses_none_the_record_says_so_with_the_plain_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"mode": None, "val_accuracy": 0.5, "val_loss": 1.0, "val_gain": 0.0, "tried": {"flip": 0.4, "crops": 0.3}}
    monkeypatch.setattr("cifarlab.train.choose_tta", lambda *_: chosen)
    folder = run(tmp_path, "evaluate.tta=auto", "train.epochs=1", monkeypatch=monkeypatch)
    log = folder.test_log()
    assert log is not None
    plain = {"accuracy": log["accuracy"], "loss": pytest.approx(log["loss"]), "test_time": log["test_time"]}
    assert log["tta"] == {**chosen, **plain, "gain": 0, "cost": 1}


def test_what_is_asked_for_is_taken_even_if_it_costs_accuracy() -> None:
    chosen = choose_tta("flip", predictions(7), lambda _: predictions(6))
    assert chosen["mode"] == "flip" and chosen["val_gain"] == pytest.approx(-0.1)


def test_auto_needs_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "data.validation=0", "train.epochs=1", monkeypatch=monkeypatch)
    for override, error in ((["evaluate.tta=auto"], RecipeError), (["evaluate.tta=3"], RecipeError)):
        with pytest.raises((error, NotARunError)):
            experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None, override=override)
    assert (folder.test_log() or {})["test_looks"] == 1
    flip = experiment.score_run(
        folder.path, data_folder=None, device=CPU, report=lambda _: None, override=["evaluate.tta=flip"]
    )
    assert flip["tta"]["mode"] == "flip"
    assert np.isfinite(flip["tta"]["loss"])


@pytest.mark.parametrize("record", [{"mode": "mirror"}, {"mode": "auto"}, {}, ["flip"], "flip"])
def test_a_damaged_record_in_train_json_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: object
) -> None:
    folder = run(tmp_path, AUGMENT, "evaluate.tta=flip", "train.epochs=1", monkeypatch=monkeypatch)
    folder.write_train_log({**folder.train_log(), "tta": record})
    with pytest.raises(NotARunError, match=r"train\.json is damaged: 'tta'"):
        experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None)
    assert (folder.test_log() or {})["test_looks"] == 1


@pytest.mark.parametrize("tta", ["flip", "crops", "diagonal", 7])
def test_what_is_foreseen_of_views_is_how_many_there_are(tta: Tta) -> None:
    pipeline: Any = SimpleNamespace(tta_shift=2, tta_shift_least=1, draw=lambda *_: None)
    assert views_of(tta, None) == len(_views(pipeline, tta, 0, 10))
    assert views_of(tta, 0.7) == UNSURE * views_of(tta, None)
    assert views_of("auto", None) == views_of("flip", None) + views_of("crops", None)
    assert views_of(None, None) == 0
