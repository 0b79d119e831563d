"""From a recipe and prepared data to what the loop takes: pipelines, the network on its device, its frozen stages."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab import __version__, distributed, machine, numerics
from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore
from cifarlab.data.prepare import Part, Prepared
from cifarlab.data.split import balanced_choice
from cifarlab.download import Report
from cifarlab.evaluate import Classifier
from cifarlab.features import FrozenStages
from cifarlab.models import build_model, channels_last_on_cpu, outputs
from cifarlab.models.chain import Chain, chain, freeze, verified_chain
from cifarlab.models.racing import WHITENING_IMAGES, fit_whitening
from cifarlab.models.weights import Weights, load_weights
from cifarlab.recipe import Recipe
from cifarlab.recipe_sections import NumericsChoice
from cifarlab.task import Average, Task


def make_task(
    recipe: Recipe, prepared: Prepared, device: torch.device, weights: Weights | None, report: Report
) -> Task:
    """The network, the images and the pipelines of a run, on the device. Raises RecipeError where they do not fit."""
    store = make_store(prepared.train, recipe, device)
    mean, std = prepared.mean, prepared.std
    if weights is not None and weights.mean is not None and weights.std is not None:
        mean, std = weights.mean, weights.std
    numbers = numerics_of(recipe, device)
    pipeline = make_pipeline(recipe, recipe.evaluation_side, store.image_size, mean, std, device, numbers.memory_format)
    pipelines = tuple(
        (share, make_pipeline(recipe, side, store.image_size, mean, std, device, numbers.memory_format))
        for share, side in recipe.train.resolutions
    )
    model = make_model(recipe, len(prepared.classes), pipeline.output_size, weights, device, numbers)
    if weights is None:
        order = torch.from_numpy(prepared.train.index)[:WHITENING_IMAGES]
        fit_whitening(model, lambda: pipeline.evaluate(next(iter(store.batches(order, WHITENING_IMAGES))).pixels))
    network = _network(recipe, model, len(prepared.classes), pipeline.output_size, device, numbers, report)
    average = None
    if recipe.train.ema is not None:
        from timm.utils.model_ema import ModelEmaV3  # half a second

        ema = ModelEmaV3(model, decay=recipe.train.ema, use_warmup=True)
        rest = ema.module
        if network.frozen is not None and (parts := chain(rest)) is not None:
            rest = parts.rest(recipe.model.freeze_stages)
        average = Average(ema, dataclasses.replace(network, model=ema.module, rest=rest, compiled=None))
    validation_store = sample = None
    if prepared.validation is not None:
        shared = prepared.validation.images is prepared.train.images
        validation_store = store if shared else make_store(prepared.validation, recipe, device)
        count = min(len(prepared.validation), len(prepared.train))
        sample = balanced_choice(prepared.train.images.labels, prepared.train.index, count, recipe.seed)
    return Task(
        network=network,
        average=average,
        pipelines=pipelines,
        pipeline=pipeline,
        store=store,
        train=torch.from_numpy(prepared.train.index),
        validation_store=validation_store,
        validation=torch.from_numpy(prepared.validation.index) if prepared.validation is not None else None,
        train_sample=torch.from_numpy(sample) if sample is not None else None,
        class_weights=_class_weights(recipe, prepared, device),
        device=device,
        description={
            "cifarlab": __version__,
            "recipe": recipe.to_dict(),
            "classes": list(prepared.classes),
            "mean": list(mean),
            "std": list(std),
            "data": {name: prepared.record[name] for name in ("content_hash", "index_hashes")},
            "made_on": made_on(device),
        },
    )


def made_on(device: torch.device) -> dict[str, Any]:
    """What rounding depends on, besides the recipe: with all of it the same, so are the bits."""
    versions = {name: importlib.metadata.version(name) for name in ("timm", "torchvision", "numpy")}
    cuda = torch.version.cuda if device.type == "cuda" else None
    found = {**machine.identity(device), "cuda": cuda, "cifarlab": __version__, **versions}
    size = distributed.place().size
    return found | {"processes": size} if size > 1 else found


def numerics_of(recipe: Recipe, device: torch.device) -> numerics.Numerics:
    """Sets torch's switches. `auto` that nobody has decided is exact."""
    choice = recipe.train.numerics
    if isinstance(choice, NumericsChoice):
        return numerics.chosen(device, choice)
    return numerics.exact(device, channels_last_on_cpu=channels_last_on_cpu(recipe.model))


def make_pipeline(
    recipe: Recipe,
    side: int | None,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Pipeline:
    return Pipeline(
        size=size,
        resolution=side,
        reference=recipe.train.last_resolution,
        interpolation=recipe.data.interpolation,
        augment=recipe.augment,
        mean=mean,
        std=std,
        device=device,
        memory_format=memory_format,
    )


def make_model(
    recipe: Recipe,
    classes: int,
    size: tuple[int, int],
    weights: Weights | None,
    device: torch.device,
    numbers: numerics.Numerics,
) -> nn.Module:
    """The recipe's model on the device: freshly initialised, then with its pretrained weights, some of it frozen."""
    model = build_model(recipe.model, classes=classes, size=size, seed=recipe.seed)
    if weights is not None:
        load_weights(model, recipe.model, weights)
    freeze(model, recipe.model.freeze_stages)
    return model.to(device).to(memory_format=numbers.memory_format)


def _network(
    recipe: Recipe,
    model: nn.Module,
    classes: int,
    size: tuple[int, int],
    device: torch.device,
    numbers: numerics.Numerics,
    report: Report,
) -> Classifier:
    """The model with its frozen stages apart, where they are to be cached or compiled and it can be taken apart."""
    section = recipe.model
    stages = section.freeze_stages
    apart = recipe.caches or (numbers.compiled == "frozen" and stages > 0)
    parts = verified_chain(model, size[0]) if apart else None
    rest, frozen = model, None
    if parts is not None and recipe.caches:
        memory = _cache_memory(device) if section.cache_memory is None else section.cache_memory * 1_000_000
        dtype = torch.bfloat16 if section.cache == "bfloat16" else torch.float32
        frozen = FrozenStages(parts.front(stages), dtype, memory, numbers, report)
        rest = parts.rest(stages)
    compiled: Callable[[Tensor], Tensor] | None = None
    if numbers.compiled is True:
        compiled = torch.compile(rest, dynamic=False)
    elif numbers.compiled == "frozen" and parts is not None and frozen is None:
        compiled = _with_compiled_front(parts, stages, device, numbers)
    return Classifier(model, rest, frozen, classes, numbers, compiled)


def _with_compiled_front(
    parts: Chain, stages: int, device: torch.device, numbers: numerics.Numerics
) -> Callable[[Tensor], Tensor]:
    """A network as training runs it whose first stages, which don't train, are compiled, without their gradients."""
    front, rest = torch.compile(parts.front(stages), dynamic=False), parts.rest(stages)

    def run(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            features = front(pixels)
        with numbers.training(device):
            logits: Tensor = rest(features)
        return logits

    return run


@functools.cache
def _cache_memory(device: torch.device) -> int:
    """Half of the memory that was free at first: what a run gives back to the process, the next one finds taken."""
    return machine.free_memory(device) // 2


def make_store(part: Part, recipe: Recipe, device: torch.device) -> ImageStore:
    memory = recipe.data.memory * 1_000_000 if recipe.data.memory is not None else None
    return ImageStore.of(part.images, device, memory=memory, workers=recipe.data.workers)


def _class_weights(recipe: Recipe, prepared: Prepared, device: torch.device) -> Tensor | None:
    """float32 (classes,): images / (classes × images of the class), scikit-learn's `balanced`; a class without: 0."""
    if recipe.loss.class_weights is None:
        return None
    counts = torch.from_numpy(prepared.train.labels).bincount(minlength=len(prepared.classes)).double()
    weights = torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
    # Outputs that are no class (model.head: keep) are nobody's label.
    weights = torch.cat([weights, weights.new_ones(outputs(recipe.model, len(counts)) - len(counts))])
    return weights.float().to(device)
