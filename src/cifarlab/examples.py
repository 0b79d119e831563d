"""Pictures that a run keeps: test images that it is most wrong about and least sure of, training images as it saw them.

They are a function of the recipe, the images and the logits alone, so a run that was resumed keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab.build import make_pipeline
from cifarlab.data.batches import ImageStore, epoch_order
from cifarlab.data.dataset import Int64Array, UInt8Array
from cifarlab.data.prepare import Part, Prepared
from cifarlab.metrics import FloatArray, log_softmax
from cifarlab.recipe import Recipe

COUNT = 24
SIDE = 64  # of the longer side, in pixels


def most_wrong(logits: FloatArray, labels: Int64Array) -> Int64Array:
    """The rows of the highest losses, the highest first: int64, at most COUNT. logits (N, K), labels int64 (N,)."""
    losses = -log_softmax(logits)[np.arange(len(labels)), labels]
    return np.argsort(-losses, kind="stable")[:COUNT]


def least_sure(logits: FloatArray) -> Int64Array:
    """The rows whose two most likely classes lie closest together in probability, the closest first: int64."""
    probabilities = np.sort(np.exp(log_softmax(logits)), axis=1)
    margin = probabilities[:, -1] - (probabilities[:, -2] if logits.shape[1] > 1 else 0.0)
    return np.argsort(margin, kind="stable")[:COUNT]


def of_run(
    recipe: Recipe,
    prepared: Prepared,
    logits: FloatArray,
    labels: Int64Array,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of `examples.npz`, which `rundir` describes.

    logits, labels: of the test set, in its order. mean, std: what training normalised with.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, rows in (("most_wrong", most_wrong(logits, labels)), ("least_sure", least_sure(logits))):
        index = prepared.test.index[rows]
        arrays |= {name: _small(_stored(prepared.test, index)), f"{name}_index": index, f"{name}_labels": labels[rows]}
    index = epoch_order(torch.from_numpy(prepared.train.index), recipe.seed, 0)[:COUNT].numpy()
    return arrays | {
        "augmented": augmented(recipe, prepared.train, index, mean, std),
        "augmented_index": index,
        "augmented_labels": prepared.train.images.labels[index],
    }


def augmented(recipe: Recipe, part: Part, index: Int64Array, mean: Sequence[float], std: Sequence[float]) -> UInt8Array:
    """Training images of the first epoch, before they are mixed: uint8 (n, 3, h, w), at most SIDE a side."""
    pixels, side = _stored(part, index), recipe.train.resolutions[0][1]
    size = pixels.shape[2], pixels.shape[3]
    pipeline = make_pipeline(recipe, side, size, mean, std, torch.device("cpu"))
    draws = pipeline.draw(recipe.seed, 0, len(part.images))
    return _small(pipeline.shown(pipeline.train(pixels, torch.from_numpy(index), draws)))


def _stored(part: Part, index: Int64Array) -> Tensor:
    """uint8 (n, 3, H, W): a few images as they are stored, read from the disk where they are streamed."""
    return ImageStore.of(part.images, torch.device("cpu"), memory=0, workers=0).take(torch.from_numpy(index)).pixels


def _small(pixels: Tensor) -> UInt8Array:
    """uint8 (n, 3, h, w), no side longer than SIDE, of values from 0 to 255."""
    pixels = pixels.float()
    longest = max(pixels.shape[2:])
    if longest > SIDE and len(pixels):
        height, width = (max(1, round(side * SIDE / longest)) for side in pixels.shape[2:])
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    small: UInt8Array = pixels.round().clamp(0, 255).byte().numpy()
    return small
