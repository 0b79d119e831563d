"""Model and images to logits: sums and counts, every sample once; test-time augmentation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab import distributed, machine
from cifarlab.data.augment import Draws, Pipeline
from cifarlab.data.batches import Batch, ImageStore, in_batches
from cifarlab.features import CacheKey, FrozenStages
from cifarlab.numerics import Numerics
from cifarlab.recipe import Recipe
from cifarlab.seeds import derive_seed

# The share of images that are unsure enough for a second look, where that is asked for; roughly.
UNSURE = 0.35
# `evaluate.tta`: none, mirrored as well, five places mirrored and not, three of them, or so many augmented versions.
Tta = Literal["flip", "crops", "diagonal"] | int | None


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


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model as it is run: its frozen stages apart where they are, and how many of its outputs are classes.

    model: all of it. rest: what comes after `frozen`; the model itself where nothing is apart. compiled: `rest` as
    training runs it, where some of it is compiled.
    """

    model: nn.Module
    rest: nn.Module
    frozen: FrozenStages | None
    classes: int
    numerics: Numerics
    compiled: Callable[[Tensor], Tensor] | None = None

    def logits(self, inputs: Tensor) -> Tensor:
        """What `rest` makes of its inputs, (B, …): float32 (B, outputs)."""
        with self.numerics.evaluating(inputs.device):
            output: Tensor = self.rest(inputs)
        return output.float()

    def training_logits(self, inputs: Tensor, *, compiled: bool) -> Tensor:
        """The same with a graph, as training computes it; compiled: where it is compiled, and not eager in any case."""
        if compiled and self.compiled is not None:
            with self.numerics.evaluating(inputs.device):
                return self.compiled(inputs).float()
        with self.numerics.training(inputs.device):
            output: Tensor = self.rest(inputs)
        return output.float()


def predict(
    network: Classifier,
    store: ImageStore,
    samples: Tensor,
    pipeline: Pipeline,
    batch_size: int,
    *,
    tta: Tta = None,
    seed: int = 0,
    remember: str | None = None,
) -> Predictions:
    """Logits of the images at `samples` (int64 (N,), on the CPU), in evaluation mode.

    tta: with test-time augmentation, logits are the logarithm of the views' mean probabilities; augmented versions are
    drawn from `seed`. remember: a name for these images, which will be asked for again: what frozen stages make
    of them is kept. Leaves every part of the model in the mode it was in. What is returned is on the CPU.
    Several processes divide the images, and each is given all logits. Where memory runs out, the batches are halved.
    """
    place = distributed.place()
    # Whole batches, so that an image's company, and so its logits to the last bit, are those of one process; smaller
    # ones only where there are too few for all.
    batch_size = min(batch_size, max(1, math.ceil(len(samples) / place.size)))
    batches = in_batches(samples, batch_size)
    dealt = [list(part) for part in np.array_split(np.arange(len(batches)), place.size)]
    shares = [torch.cat([batches[number] for number in numbers]) if numbers else samples[:0] for numbers in dealt]
    own = partial(_predict, network, store, shares[place.rank], pipeline, tta=tta, seed=seed, remember=remember)
    logits = _in_memory(own, batch_size, store.device)
    logits = distributed.gather_rows(logits, [len(share) for share in shares])
    labels = store.labels[machine.upload(samples, store.labels.device)].cpu()
    return Predictions(logits, labels, samples)


def _in_memory(work: Callable[[int], Tensor], batch_size: int, device: torch.device) -> Tensor:
    """What `work` gives in batches of that size; in smaller ones where memory runs out."""
    while True:
        try:
            return work(batch_size)
        except (MemoryError, RuntimeError) as error:
            if not machine.is_out_of_memory(error) or batch_size == 1:
                raise
        # Not in the `except`: the exception holds the frames that hold the memory.
        batch_size = math.ceil(batch_size / 2)
        machine.give_back_memory(device)


@torch.inference_mode()
def _predict(
    network: Classifier,
    store: ImageStore,
    samples: Tensor,
    pipeline: Pipeline,
    batch_size: int,
    tta: Tta,
    seed: int,
    remember: str | None,
) -> Tensor:
    """Logits (N, K), on the CPU."""
    views = _views(pipeline, tta, seed, len(store))
    key = CacheKey(remember, pipeline.output_size[0], 0) if remember is not None and tta is None else None
    logits = [torch.empty(0, network.classes)]
    with _evaluating(network.model):
        for batch in store.batches(samples, batch_size):
            outputs: list[Tensor] = []
            for view in views:
                if network.frozen is None:
                    inputs = view.of(pipeline, batch)
                else:
                    make = partial(view.of, pipeline, batch)
                    inputs = network.frozen(make, batch.samples, key, keep=True, images=len(store), rows=len(samples))
                outputs.append(network.logits(inputs)[:, : network.classes])
            logits.append(outputs[0] if tta is None else _log_mean_probability(outputs, [v.weight for v in views]))
    return torch.cat([part.cpu() for part in logits])


def views_of(tta: Tta | Literal["auto"], below: float | None) -> float:
    """How many views of an image test-time augmentation looks at, in the mean, where it is chosen and where it is used.

    below: only of images whose most likely class has less than this probability, which is a guess at how many.
    """
    if tta is None:
        return 0.0
    views = tta if isinstance(tta, int) else {"flip": 2, "crops": 10, "diagonal": 6, "auto": 12}[tta]
    return views * (1.0 if below is None else UNSURE)


def looks_on_validation(recipe: Recipe, images: int, sample: int) -> int:
    """How many images the end of training evaluates, each view of one counted; of so many for validation.

    sample: how many training images there are, which overfitting is measured on.
    """
    networks = 1 if recipe.train.ema is None else 2
    views = views_of(recipe.evaluate.tta, recipe.evaluate.tta_below)
    return round(images * (networks + 1 + views)) + sample  # the last epoch's, and again those of the best


def looks_on_test(recipe: Recipe, images: int) -> int:
    """How many test images are evaluated, each view of one counted; of so many."""
    if not recipe.evaluate.test:
        return 0
    return round(images * (1 + views_of(recipe.evaluate.tta, recipe.evaluate.tta_below)))


class _View(NamedTuple):
    """One way to look at images: as they are, mirrored, shifted by (rows, columns), or augmented by draws."""

    flip: bool = False
    shift: tuple[int, int] = (0, 0)
    draws: Draws | None = None
    weight: float = 1.0

    def of(self, pipeline: Pipeline, batch: Batch) -> Tensor:
        """float32 (B, 3, H, W): what the network takes."""
        if self.draws is not None:
            return pipeline.train(batch.pixels, batch.samples, self.draws)
        return pipeline.evaluate(batch.pixels, flip=self.flip, shift=self.shift)


def _views(pipeline: Pipeline, tta: Tta, seed: int, images: int) -> list[_View]:
    if tta is None:
        return [_View()]
    if tta == "flip":
        return [_View(), _View(flip=True)]
    if tta == "crops":
        by = pipeline.tta_shift
        shifts = [(0, 0), (-by, -by), (-by, by), (by, -by), (by, by)]
        return [_View(flip, shift) for shift in shifts for flip in (False, True)]
    if tta == "diagonal":
        # The six views of Jordan's speedruns (arXiv 2404.00498, section 3.5): the middle counts as much as both others.
        by = pipeline.tta_shift_least
        weights = {(0, 0): 2.0, (-by, -by): 1.0, (by, by): 1.0}
        return [_View(flip, shift, weight=weight) for shift, weight in weights.items() for flip in (False, True)]
    return [_View(draws=pipeline.draw(derive_seed(seed, "tta", number), 0, images)) for number in range(tta)]


def _log_mean_probability(outputs: list[Tensor], weights: list[float]) -> Tensor:
    """Logits (B, K) of each view to the logarithm of their weighted mean probability, float32 (B, K)."""
    log_probabilities = F.log_softmax(torch.stack(outputs), -1)
    if len(set(weights)) > 1:
        shares = machine.upload(torch.tensor(weights).log(), outputs[0].device)
        log_probabilities = log_probabilities + shares[:, None, None]
    return torch.logsumexp(log_probabilities, 0) - math.log(sum(weights))


def with_tta(
    plain: Predictions, mode: Tta, below: float | None, look: Callable[[Tensor, Tta], Predictions]
) -> Predictions:
    """Predictions with test-time augmentation, where it is asked for, from those without.

    below: only of images whose most likely class has less than this probability; None: of all. look: of the images at
    some samples, with a mode. Logits are logarithms of probabilities.
    """
    if mode is None:
        return plain
    if below is None:
        return look(plain.samples, mode)
    log_probabilities = F.log_softmax(plain.logits, 1)
    unsure = log_probabilities.amax(1) < math.log(below)
    if unsure.any():
        log_probabilities[unsure] = look(plain.samples[unsure], mode).logits
    return Predictions(log_probabilities, plain.labels, plain.samples)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all of a model, then for each part the mode it had: frozen parts stay in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def choose_tta(
    asked: Literal["flip", "crops", "diagonal", "auto"] | int,
    plain: Predictions,
    again: Callable[[Tta], Predictions],
) -> dict[str, Any]:
    """Which test-time augmentation to use, by validation accuracy alone, JSON-ready.

    plain: predictions of the validation images without it; `again(mode)`: with it. `auto` takes the best of none, flip
    and crops, the cheaper at a tie; anything else is tried and taken.
    """
    candidates: list[Tta] = ["flip", "crops"] if asked == "auto" else [asked]
    tried = {mode: again(mode) for mode in candidates}
    mode = max(candidates, key=lambda candidate: tried[candidate].accuracy())
    if asked == "auto" and tried[mode].accuracy() <= plain.accuracy():
        mode = None
    chosen = plain if mode is None else tried[mode]
    return {
        "mode": mode,
        "val_accuracy": chosen.accuracy(),
        "val_loss": chosen.loss(),
        "val_gain": chosen.accuracy() - plain.accuracy(),
        "tried": {str(mode): predictions.accuracy() for mode, predictions in tried.items()},
    }
