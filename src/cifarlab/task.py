"""What there is to train, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore
from cifarlab.evaluate import Classifier


@dataclass(frozen=True, eq=False)
class Average:
    """An exponential moving average of a network's weights and buffers, and the network that has them.

    At step t, from 0 on, it keeps the share min(decay, 1 - (1 + t)^(-2/3)), so that a short run forgets its beginning.
    """

    ema: Any  # timm.utils.ModelEmaV3
    network: Classifier


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to train: a network on its device, the images, and which of them are for what.

    average: where the recipe asks for one. pipelines: from
    which share of the run on images come in which way; the resolution may grow. pipeline: how they come in evaluation.
    train, validation, train_sample: int64 (K,) on the CPU, sample indices into their stores. `train_sample` is the
    class-balanced part of the training images, as large as the validation set, that overfitting is measured on.
    class_weights: float32 (outputs,) on the device. `description` is what a checkpoint carries besides the loop's
    state, so that it can be used on its own.
    """

    network: Classifier
    average: Average | None
    pipelines: tuple[tuple[float, Pipeline], ...]
    pipeline: Pipeline
    store: ImageStore
    train: Tensor
    validation_store: ImageStore | None
    validation: Tensor | None
    train_sample: Tensor | None
    class_weights: Tensor | None
    device: torch.device
    description: dict[str, Any]
