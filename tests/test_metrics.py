"""Scores against scikit-learn's on the same arrays, against figures by hand, and where they are undefined."""

from __future__ import annotations

import json
import math
import time
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from cifarlab.errors import DivergedError
from cifarlab.metrics import rising_since, scores

AVERAGES = (
    "accuracy",
    "loss",
    "precision_score",
    "recall_score",
    "f1_score",
    "auc_score",
    "auc_score_hard",
    "top5_accuracy",
    "ece",
)


def an_answer(
    count: int, classes: int, *, skill: float = 2.0, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that favour the right class by `skill` standard deviations; every class has an image if they suffice."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % classes).astype(np.int64)
    logits = generator.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += skill
    return logits, labels


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


# --- against scikit-learn ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "classes", "skill"), [(400, 2, 1.0), (700, 10, 2.0), (900, 10, 9.0), (2000, 100, 2.0)]
)
def test_every_score_is_scikit_learns(count: int, classes: int, skill: float) -> None:
    logits, labels = an_answer(count, classes, skill=skill)
    probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    names = np.arange(classes)
    got = scores(logits, labels)

    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    want = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "loss": sklearn.metrics.log_loss(labels, probabilities, labels=names),
        "precision_score": sklearn.metrics.precision_score(labels, predicted, **macro),
        "recall_score": sklearn.metrics.recall_score(labels, predicted, **macro),
        "f1_score": sklearn.metrics.f1_score(labels, predicted, **macro),
    }
    if classes == 2:
        want["auc_score"] = sklearn.metrics.roc_auc_score(labels, probabilities[:, 1])
        want["auc_score_hard"] = sklearn.metrics.balanced_accuracy_score(labels, predicted)
    else:
        want["auc_score"] = sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
        want["auc_score_hard"] = sklearn.metrics.roc_auc_score(labels, np.eye(classes)[predicted], multi_class="ovr")
        want["top5_accuracy"] = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name

    assert got["confusion_matrix"] == sklearn.metrics.confusion_matrix(labels, predicted, labels=names).tolist()
    each = sklearn.metrics.precision_recall_fscore_support(labels, predicted, labels=names, zero_division=np.nan)
    for index, entry in enumerate(got["per_class"]):
        assert entry["index"] == index
        assert entry["accuracy"] == entry["recall"]
        for key, column in zip(("precision", "recall", "f1", "support"), each, strict=True):
            assert entry[key] == (None if math.isnan(column[index]) else pytest.approx(column[index], abs=1e-9))


def test_a_model_that_always_says_one_class_scores_as_scikit_learn_says() -> None:
    labels = np.arange(30, dtype=np.int64) % 3
    logits = np.tile(np.array([0.0, 1.0, 0.0], dtype=np.float32), (30, 1))
    got, macro = scores(logits, labels), {"average": "macro", "zero_division": 0}
    assert got["precision_score"] == pytest.approx(sklearn.metrics.precision_score(labels, np.ones(30), **macro))
    assert got["recall_score"] == pytest.approx(1 / 3)
    assert got["f1_score"] == pytest.approx(sklearn.metrics.f1_score(labels, np.ones(30), **macro))
    assert got["auc_score"] == 0.5  # all scores are ties
    assert got["auc_score_hard"] == 0.5
    assert [entry["precision"] for entry in got["per_class"]] == [None, pytest.approx(1 / 3), None]
    assert [entry["f1"] for entry in got["per_class"]] == [0.0, pytest.approx(0.5), 0.0]


def test_tied_and_saturated_probabilities_score_as_scikit_learns() -> None:
    logits, labels = an_answer(300, 4)
    logits = np.round(logits) * 60  # softmax gives exactly 0 and 1 in places, and many equal values
    want = sklearn.metrics.roc_auc_score(labels, softmax(logits), multi_class="ovr")
    assert scores(logits, labels)["auc_score"] == pytest.approx(want, abs=1e-9)


# --- by hand ----------------------------------------------------------------------------------


def test_the_hard_auc_is_half_the_sum_of_both_rates() -> None:
    logits, labels = an_answer(200, 5, skill=1.0)
    predicted = logits.argmax(axis=1)
    areas = []
    for index in range(5):
        own, said = labels == index, predicted == index
        areas.append(((said & own).sum() / own.sum() + (~said & ~own).sum() / (~own).sum()) / 2)
    assert scores(logits, labels)["auc_score_hard"] == pytest.approx(np.mean(areas), abs=1e-12)


def test_the_calibration_error_is_guos_by_hand() -> None:
    # Two classes: confidences 0.95, 0.95, 0.95, 0.7 and 0.55, of which the first two and the last are right.
    confidence, right = np.array([0.95, 0.95, 0.95, 0.7, 0.55]), np.array([True, True, False, False, True])
    labels = np.where(right, 1, 0).astype(np.int64)
    logits = np.stack([np.zeros(5), np.log(confidence / (1 - confidence))], axis=1)
    by_hand = (3 * abs(2 / 3 - 0.95) + 1 * abs(0 - 0.7) + 1 * abs(1 - 0.55)) / 5
    assert scores(logits, labels)["ece"] == pytest.approx(by_hand, abs=1e-9)


def test_the_calibration_error_is_the_loop_over_fifteen_bins() -> None:
    # Right six times in ten however certain: too modest in the low bins, too certain in the high ones.
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(500, 10))
    labels = np.where(generator.random(500) < 0.6, logits.argmax(axis=1), logits.argmin(axis=1)).astype(np.int64)
    confidence, right = softmax(logits).max(axis=1), logits.argmax(axis=1) == labels
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert scores(logits, labels)["ece"] == pytest.approx(total, abs=1e-9)


def test_a_bin_of_the_calibration_error_holds_its_upper_edge() -> None:
    # Confidence 1/5 is the edge of bins 3 and 4. The second, a little more certain and wrong, belongs to bin 4.
    logits = np.log(np.array([[0.2, 0.2, 0.2, 0.2, 0.2], [0.24, 0.19, 0.19, 0.19, 0.19]]))
    logits[0] = 0.0
    got = scores(logits, np.array([0, 1], dtype=np.int64))
    assert got["ece"] == pytest.approx((0.8 + 0.24) / 2)


def test_a_certain_and_right_model_is_perfect() -> None:
    labels = np.arange(12, dtype=np.int64) % 6
    got = scores(np.eye(6, dtype=np.float32)[labels] * 1e4, labels)
    assert {name: got[name] for name in AVERAGES} == {
        name: 0.0 if name in ("loss", "ece") else 1.0 for name in AVERAGES
    }


def test_the_loss_of_huge_logits_neither_overflows_nor_vanishes() -> None:
    logits = np.array([[1e30, 0.0], [-1e30, 0.0], [3e38, -3e38]], dtype=np.float32)
    got = scores(logits, np.array([0, 0, 0], dtype=np.int64))
    assert got["loss"] == pytest.approx(1e30 / 3, rel=1e-6)


def test_the_first_of_equal_logits_is_the_prediction() -> None:
    got = scores(np.zeros((8, 8)), np.arange(8, dtype=np.int64))
    assert got["accuracy"] == 1 / 8
    assert got["top5_accuracy"] == 5 / 8
    assert [row[0] for row in got["confusion_matrix"]] == [1] * 8


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    logits = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    got = scores(logits, np.array([0, 1, 2], dtype=np.int64))
    assert got["confusion_matrix"] == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]


# --- what is undefined ------------------------------------------------------------------------


def test_a_class_without_images_leaves_auc_undefined_and_the_others_as_scikit_learn_has_them() -> None:
    logits, labels = an_answer(60, 6)
    logits, labels = logits[labels != 2], labels[labels != 2]
    logits[:, 2] -= 100  # nor is it ever predicted: scikit-learn doesn't count it
    got, predicted = scores(logits, labels), logits.argmax(axis=1)
    assert got["auc_score"] is None
    assert got["auc_score_hard"] is None
    for name in ("precision_score", "recall_score", "f1_score"):
        want = getattr(sklearn.metrics, name)(labels, predicted, average="macro", zero_division=0)
        assert got[name] == pytest.approx(want, abs=1e-9), name
    assert got["per_class"][2] == {
        "index": 2,
        "support": 0,
        "precision": None,
        "recall": None,
        "f1": None,
        "accuracy": None,
    }


def test_five_classes_have_no_top_five() -> None:
    assert scores(*an_answer(50, 5))["top5_accuracy"] is None
    assert scores(*an_answer(50, 6))["top5_accuracy"] is not None


def test_no_images_give_no_scores() -> None:
    got = scores(np.zeros((0, 10), dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert {got[name] for name in AVERAGES} == {None}
    assert got["confusion_matrix"] == [[0] * 10] * 10


@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 1), (40, 2), (60, 7)])
def test_scores_are_plain_json_without_nan_and_without_warnings(shape: tuple[int, int]) -> None:
    logits, labels = an_answer(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = scores(logits, labels)
    assert json.loads(json.dumps(got, allow_nan=False)) == got


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_refused(value: float) -> None:
    logits, labels = an_answer(20, 3)
    logits[7, 1] = value
    with pytest.raises(DivergedError, match="NaN or infinite"):
        scores(logits, labels)


def test_arrays_that_do_not_fit_are_refused() -> None:
    logits, labels = an_answer(20, 3)
    with pytest.raises(ValueError, match="fit each other"):
        scores(logits, labels[:-1])
    with pytest.raises(ValueError, match="from 0 to 2, not 0 to 3"):
        scores(logits, np.where(labels == 1, 3, labels))


def test_ten_thousand_images_of_a_hundred_classes_are_scored_in_a_second() -> None:
    logits, labels = an_answer(10_000, 100)
    scores(*an_answer(10, 2))  # imports
    start = time.process_time()
    scores(logits, labels)
    assert time.process_time() - start < 1.0


# --- rising_since -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("val_losses", "epoch"),
    [
        ([], None),
        ([1.0], None),
        ([None, None], None),
        ([2.0, 1.5, 1.2, 1.0], None),  # still falling
        ([2.0, 1.5, 1.0, 1.2, 1.4, 1.6], 3),  # overfitting
        ([2.0, 1.0, 1.0, 1.2, 1.4, 1.6], 2),  # the first of equals
        ([1.0, 1.2, 1.4, 1.6], 1),
        ([2.0, 1.5, 1.0, 1.2, 1.4], None),  # two epochs after the lowest are too few
        ([2.0, 1.0, 1.01, 1.02, 1.01, 1.03, 1.02], None),  # noise of a few per cent
        ([2.0, 1.0, 1.04, 1.05, 1.06], None),  # exactly 5 %
        ([2.0, 1.0, 1.05, 1.06, 1.07], 2),  # a little more
        ([1.0, 4.0, 2.5, 1.8, 1.4, 1.2], None),  # a spike that is being recovered from
        ([2.0, None, 1.0, None, 1.2, None, 1.4, 1.6], 3),  # epochs without validation keep their numbers
        ([2.0, 1.0, math.nan, 1.2, math.inf, 1.4, 1.6], 2),
    ],
)
def test_the_epoch_since_which_validation_loss_rises(val_losses: list[float | None], epoch: int | None) -> None:
    assert rising_since(val_losses) == epoch
