"""Every figure of `test.json` that follows from logits and labels, and what a validation curve says.

Plain Python numbers come out, ready for JSON; what is undefined is None, never NaN and never 0.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.errors import DivergedError

ECE_BINS = 15
TOP = 5

FloatArray = NDArray[np.floating[Any]]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def scores(logits: FloatArray, labels: Int64Array) -> dict[str, Any]:
    """All figures of one pass over labelled images.

    logits: any float type, (N, K); labels: int64, (N,), each in 0 … K - 1. The prediction is the class with the highest
    logit, the first of equals. Everything is computed in float64.

    accuracy              share of images that are predicted right
    loss                  mean cross-entropy, without label smoothing or class weights
    precision_score, recall_score, f1_score
                          macro averages as scikit-learn's with `zero_division=0`: over the classes that occur among
                          labels or predictions (all K in an ordinary test set), an undefined class counting as 0
    auc_score             area under the ROC curve, one-vs-rest from softmax probabilities, macro;
                          None unless every class has an image and lacks one
    auc_score_hard        the same from predicted labels alone: (TPR + TNR) / 2, averaged over classes
    top5_accuracy         share of images whose class is among the 5 highest logits; None where K ≤ 5
    ece                   expected calibration error, 15 bins of equal width (Guo et al., arXiv 1706.04599)
    per_class             for each class in order: index, support, precision, recall, f1, accuracy (of its own images,
                          which is its recall); None where there is nothing to divide by
    confusion_matrix      K lists of K counts: rows are true classes, columns are predicted ones

    With no images (N = 0) every average is None. Raises DivergedError where a logit is NaN or infinite, and
    ValueError where the arrays don't fit each other.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, K) and labels (N,) must fit each other, not {logits.shape} and {labels.shape}")
    count, classes = logits.shape
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, not {labels.min()} to {labels.max()}")
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs are NaN or infinite; train with a lower learning rate")

    logits = logits.astype(np.float64)
    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    predictions = logits.argmax(axis=1)
    right = predictions == labels

    matrix = np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
    true_positives, support, predicted = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    precision = _divide(true_positives, predicted)
    recall = _divide(true_positives, support)
    f1 = _divide(2 * true_positives, support + predicted)
    occurs = support + predicted > 0

    return {
        "accuracy": _mean(right),
        "loss": _mean(-log_probabilities[np.arange(count), labels]),
        "precision_score": _mean(np.nan_to_num(precision[occurs])),
        "recall_score": _mean(np.nan_to_num(recall[occurs])),
        "f1_score": _mean(f1[occurs]),
        "auc_score": _auc(probabilities, labels),
        "auc_score_hard": _auc(_one_hot(predictions, classes), labels),
        "top5_accuracy": _mean(_rank(logits, labels) < TOP) if classes > TOP else None,
        "ece": _ece(probabilities.max(axis=1, initial=0), right),
        "per_class": [
            {
                "index": index,
                "support": int(support[index]),
                "precision": _number(precision[index]),
                "recall": _number(recall[index]),
                "f1": _number(f1[index]),
                "accuracy": _number(recall[index]),
            }
            for index in range(classes)
        ],
        "confusion_matrix": matrix.tolist(),
    }


def log_softmax(logits: FloatArray) -> Float64Array:
    """Logarithms of the probabilities, in float64, (N, K)."""
    values = logits.astype(np.float64)
    shifted = values - values.max(axis=1, keepdims=True) if len(values) else values
    log_probabilities: Float64Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probabilities


def calibration(confidence: Float64Array, right: BoolArray) -> list[dict[str, Any]]:
    """What the bins of `ece` hold, from the lowest confidence on: `count`, mean `confidence` and `accuracy` of each.

    confidence: float64 (N,), the probability of the predicted class; right: bool (N,). Both means are None in an empty
    bin.
    """
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=ECE_BINS)
    means = (_divide(np.bincount(bins, weights=values, minlength=ECE_BINS), counts) for values in (confidence, right))
    return [
        {"count": int(count), "confidence": _number(mean), "accuracy": _number(share)}
        for count, mean, share in zip(counts, *means, strict=True)
    ]


def rising_since(val_losses: Sequence[float | None]) -> int | None:
    """The epoch (counted from 1) since which validation loss has been rising; None if it hasn't.

    That is the epoch of the lowest loss (the first of equals) if, of the epochs with a loss,

    - at least 3 came after it,
    - the mean of the last 3 is more than 5 % above it, and
    - the least-squares line through it and all that came after goes up.

    So neither noise of a few per cent nor one spike that is being recovered from counts. None and values that aren't
    finite are epochs without a loss.
    """
    losses = [(epoch, loss) for epoch, loss in enumerate(val_losses, 1) if loss is not None and math.isfinite(loss)]
    if not losses:
        return None
    best_epoch, best = min(losses, key=lambda entry: entry[1])
    tail = [entry for entry in losses if entry[0] >= best_epoch]
    if len(tail) < 4 or sum(loss for _, loss in tail[-3:]) / 3 <= best + 0.05 * abs(best):
        return None
    epochs, values = np.array(tail).T
    return best_epoch if ((epochs - epochs.mean()) * values).sum() > 0 else None


def _auc(class_scores: Float64Array, labels: Int64Array) -> float | None:
    """Macro one-vs-rest AUC of scores (N, K); None unless every class has an image and lacks one."""
    from sklearn.metrics import roc_auc_score

    count, classes = class_scores.shape
    support = np.bincount(labels, minlength=classes)
    if not ((support > 0) & (support < count)).all():
        return None
    # As indicators, because scikit-learn's own one-vs-rest has another form for two classes.
    return float(roc_auc_score(_one_hot(labels, classes), class_scores, average="macro"))


def _rank(logits: FloatArray, labels: Int64Array) -> Int64Array:
    """How many classes come before an image's own, (N,): those with a higher logit, and of equals the earlier ones."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    before: Int64Array = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return before


def _ece(confidence: Float64Array, right: BoolArray) -> float | None:
    """Σ over bins (share of images × |accuracy - mean confidence|); a bin holds its upper edge, not its lower."""
    if not len(right):
        return None
    gaps = np.bincount(_bins(confidence), weights=right - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(right))


def _bins(confidence: Float64Array) -> Int64Array:
    """The bin of each confidence, (N,)."""
    bins: Int64Array = np.digitize(confidence, np.linspace(0, 1, ECE_BINS + 1)[1:-1], right=True)
    return bins


def _one_hot(labels: Int64Array, classes: int) -> Float64Array:
    one_hot: Float64Array = np.eye(classes)[labels]
    return one_hot


def _divide(numerator: Int64Array | Float64Array, denominator: Int64Array) -> Float64Array:
    """The quotient, NaN where the denominator is 0."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean(values: Float64Array | BoolArray) -> float | None:
    return float(values.mean()) if len(values) else None


def _number(value: float | np.float64) -> float | None:
    return None if math.isnan(value) else float(value)
