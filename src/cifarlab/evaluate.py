"""Model and images to logits: sums and counts, every sample once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore


@dataclass(frozen=True)
class Predictions:
    """logits: float32 (N, K); labels: int64 (N,); samples: int64 (N,), the images' places in the dataset as found."""

    logits: Tensor
    labels: Tensor
    samples: Tensor

    def loss(self) -> float:
        """Mean cross-entropy, in float64."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    def accuracy(self) -> float:
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {"logits": self.logits.numpy(), "labels": self.labels.numpy(), "index": self.samples.numpy()}


@torch.inference_mode()
def predict(model: nn.Module, store: ImageStore, samples: Tensor, pipeline: Pipeline, batch_size: int) -> Predictions:
    """Logits of the images at `samples` (int64 (N,), on the CPU), in evaluation mode and without augmentation.

    Leaves the model in the mode it was in. What is returned is on the CPU.
    """
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch in store.batches(samples, batch_size):
        logits.append(model(pipeline.evaluate(batch.pixels)).float())
        labels.append(batch.labels)
    model.train(was_training)
    return Predictions(torch.cat(logits).cpu(), torch.cat(labels).cpu(), samples)
