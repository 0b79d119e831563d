"""What a recipe leaves to the machine that it runs on, decided by measuring a few of its own steps, or by rule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cifarlab import distributed, machine, numerics, remembered
from cifarlab.build import make_task
from cifarlab.convolutions import fourier_suits
from cifarlab.data.batches import epoch_order
from cifarlab.data.prepare import Part, Prepared
from cifarlab.download import Report
from cifarlab.errors import RunError
from cifarlab.feed import TrainingBatch, make_batch
from cifarlab.models import outline
from cifarlab.models.chain import set_mode
from cifarlab.models.weights import Weights
from cifarlab.pace import BySteps
from cifarlab.recipe import Recipe, make_recipe
from cifarlab.recipe_sections import NumericsChoice
from cifarlab.training_step import TrainingStep

# Batch sizes are tried from the smallest on; learning rates are meant for the one of reference.
SMALLEST_BATCH, REFERENCE_BATCH = 32, 128
# A batch size must be so much faster to be worth its fewer steps; and an epoch has at least so many.
GAIN, STEPS_AT_LEAST = 1.05, 20
# On a CPU a step on so many images a thread tells as much as one on thousands, which would take seconds.
PROBE_IMAGES = 64
# So often may fp16's loss scale be halved before a step counts, from 65,536 on.
SCALES = 24
# A batch size is tried only where this share of the free memory suffices for what it needs more.
HEADROOM = 0.8
# An evaluation batch has so many pixels: 1,024 images of 32x32, 64 of 128x128. On two cores EX-1, EX-2 and
# EfficientNet-Lite0 come within a tenth of their fastest there, and gain nothing with more.
EVALUATION_PIXELS = 2**20
# A GPU is kept busy by more of them: one for so many bytes of its memory, of which networks take up to half, and at
# most so many.
GPU_BYTES_PER_PIXEL, MOST_EVALUATION_PIXELS = 4096, 2**23


class Decided(NamedTuple):
    """A recipe in which nothing is left to the machine, and the measurements that decided it, JSON-ready.

    numerics: None where they were known, from the recipe or from an earlier run here; batch_sizes likewise.
    """

    recipe: Recipe
    numerics: list[dict[str, Any]] | None
    batch_sizes: list[dict[str, Any]] | None


def decide(
    recipe: Recipe, prepared: Prepared, device: torch.device, weights: Weights | None, report: Report
) -> Decided:
    """Decide `train.numerics: auto` and `train.batch_size: auto` by measuring, or by what was measured here before.

    `evaluate.batch_size: auto` is a rule, so that logits depend on no clock, not even by their rounding.
    The batch size is found under the numerics that are best for a batch of 128, and the numerics are then those for the
    size. Raises RecipeError where the result is no valid recipe, RunError where not even the smallest batch fits.
    Several processes do as the first one finds, which measures its share of a batch.
    """
    processes = distributed.place().size
    if processes == 1:
        return _decide(recipe, prepared, device, weights, report)

    def measured() -> tuple[dict[str, Any], Any, Any]:
        with distributed.alone():
            found = _decide(recipe, prepared, device, weights, report, processes)
        return found.recipe.to_dict(), found.numerics, found.batch_sizes

    values, tried, sizes = distributed.from_first(measured)
    return Decided(make_recipe(values, origin=f"recipe {recipe.name}"), tried, sizes)


def _decide(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    weights: Weights | None,
    report: Report,
    processes: int = 1,
) -> Decided:
    """processes: how many will divide a batch among them."""
    recipe = with_evaluation_batch(recipe, prepared, device)
    if processes == 1 and "auto" not in (recipe.train.numerics, recipe.train.batch_size):
        return Decided(recipe, None, None)
    sizes = tried = None
    if recipe.train.batch_size == "auto":
        probe = recipe.with_train(batch_size=max(REFERENCE_BATCH, recipe.train.accumulate))
        probe, _ = _choose_numerics(probe, prepared, device, weights, report)
        found = probe.train.numerics
        if isinstance(found, NumericsChoice):  # each size would be compiled anew
            found = found.model_copy(update={"compile": False})
        probe = recipe.with_train(numerics=found)
        chosen, sizes = _choose_batch_size(probe, prepared, device, weights, report, processes)
        recipe = chosen.with_train(numerics=recipe.train.numerics)
    if recipe.train.numerics == "auto":
        share = recipe.with_train(batch_size=max(recipe.train.batch // processes, recipe.train.accumulate))
        share, tried = _choose_numerics(share, prepared, device, weights, report, together=processes > 1)
        recipe = recipe.with_train(numerics=share.train.numerics)
    choice = recipe.train.numerics
    if processes > 1 and isinstance(choice, NumericsChoice) and (choice.compile or choice.graphs):
        report("several processes exchange sums within a step, so nothing of it is compiled or captured")
        recipe = recipe.with_train(numerics=choice.model_copy(update={"compile": False, "graphs": False}))
    machine.give_back_memory(device)
    return Decided(make_recipe(recipe.to_dict(), origin=f"recipe {recipe.name}"), tried, sizes)


def with_evaluation_batch(recipe: Recipe, prepared: Prepared, device: torch.device) -> Recipe:
    """The recipe with `evaluate.batch_size: auto` decided; as it is where it states a number."""
    if recipe.evaluate.batch_size != "auto":
        return recipe
    side = recipe.evaluation_side
    pixels = side * side if side is not None else math.prod(prepared.train.images.pixels.shape[2:])
    most = EVALUATION_PIXELS
    if device.type == "cuda":
        most = min(max(most, machine.total_memory(device) // GPU_BYTES_PER_PIXEL), MOST_EVALUATION_PIXELS)
    evaluate = recipe.evaluate.model_copy(update={"batch_size": max(1, most // pixels)})
    return recipe.model_copy(update={"evaluate": evaluate})


def _choose_numerics(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    weights: Weights | None,
    report: Report,
    *,
    together: bool = False,
) -> tuple[Recipe, list[dict[str, Any]] | None]:
    """The recipe with its numerics decided, and the ways that were tried now."""
    if recipe.train.numerics != "auto":
        return recipe, None
    steps = max(1, round(recipe.train.epochs * math.ceil(len(prepared.train) / recipe.train.batch)))
    key = _key(recipe, prepared, device) | {
        "batch_size": recipe.train.batch,
        "steps": round(math.log2(steps)),  # compilation pays for long runs only
        "compiler": numerics.can_compile(device),
        "pruned": recipe.train.prune is not None,
        "fourier": device.type == "cpu",  # an entry from before there was this way is asked for no more
        "tolerances": [numerics.LOSS_TOLERANCE, numerics.LEAST_COSINE],
    }
    if together:
        key["together"] = True
    found = None
    with contextlib.suppress(ValueError):  # an entry of another version
        found = NumericsChoice.model_validate(remembered.recall(key))
    if found is not None and numerics.impossible(device, found) is None:
        report(f"numerics: {found} (measured here before)")
        return recipe.with_train(numerics=found), None
    probe = _probe(recipe, device)
    report(f"choosing numerics: timing a few steps of {probe.train.batch:,} images in each sensible way")
    choice, trials = numerics.measure(
        device,
        lambda choice: measured_step(probe.with_train(numerics=choice), prepared, device, weights),
        steps=math.ceil(steps * recipe.train.batch / probe.train.batch),
        compilations=len(recipe.train.resolutions) + len(recipe.model.freeze_late or ()),
        frozen=recipe.model.freeze_stages > 0 and not recipe.caches,
        one_size=recipe.train.prune is None,
        fourier=device.type == "cpu" and _has_small_maps(recipe, prepared),
        together=together,
    )
    for trial in trials:
        report(f"  {trial}")
    report(f"numerics: {choice}")
    if trials[0].refused is None:  # else nothing was measured, and the run will say why
        remembered.remember(key, choice.model_dump())
    return recipe.with_train(numerics=choice), [trial.record() for trial in trials]


def _has_small_maps(recipe: Recipe, prepared: Prepared) -> bool:
    """Whether convolutions by frequencies are worth a trial, in the steps that are measured: those of the end."""
    side = recipe.train.resolutions[-1][1]
    size: tuple[int, int] = (side, side) if side is not None else prepared.train.images.pixels.shape[2:]
    try:
        return fourier_suits(outline(recipe.model, classes=len(prepared.classes), size=size), (2, 3, *size))
    except Exception:  # it is any network of timm's or torchvision's, and a run doesn't end for a trial
        return False


def _probe(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with a smaller batch, where that is enough to tell which way of computing is the fastest."""
    enough = PROBE_IMAGES * torch.get_num_threads()
    if device.type != "cpu" or math.ceil(recipe.train.batch / recipe.train.accumulate) <= enough:
        return recipe
    return recipe.with_train(batch_size=enough, accumulate=1)


def _key(recipe: Recipe, prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """What a step's speed depends on, besides its batch size; the learning rate is nothing to it."""
    images = prepared.train.images.pixels.shape
    return {
        **machine.identity(device),
        "model": recipe.model.model_dump(mode="json"),
        "loss": recipe.loss.model_dump(mode="json"),
        "augment": recipe.augment.model_dump(mode="json"),
        "optimizer": recipe.optimizer.name,
        "classes": len(prepared.classes),
        "images": list(images[2:]),
        "sides": recipe.sides,
        "accumulate": recipe.train.accumulate,
        "ema": recipe.train.ema is not None,
    }


@dataclass(frozen=True)
class Size:
    """A batch size that was tried. rate: images per second; None where memory ran out."""

    batch_size: int
    rate: float | None


def _choose_batch_size(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    weights: Weights | None,
    report: Report,
    processes: int = 1,
) -> tuple[Recipe, list[dict[str, Any]] | None]:
    """The recipe with its batch size decided and its learning rates scaled, and the sizes that were tried now.

    From 32 on the size is doubled, for as long as a step fits, leaves some memory free, and the epoch still has
    STEPS_AT_LEAST steps. The smallest is taken whose images per second are within a twentieth of the best: a larger one
    would only learn less from each image. `optimizer.lr`, which is for a batch of 128, is scaled with the batch for SGD
    (Goyal, arXiv 1706.02677), with its square root for the others (Malladi, arXiv 2205.10287), and not at all for Muon,
    most of whose steps don't depend on the size of the gradient. Where several processes divide a batch, sizes are
    tried in one, and the batch is so many times as large.
    """
    key = _key(recipe, prepared, device) | {
        "numerics": str(recipe.train.numerics),
        "training_images": len(prepared.train),
        "memory": round(math.log2(machine.total_memory(device)), 1),
        "batch_size": "auto" if processes == 1 else f"auto of {processes}",
    }
    found = remembered.recall(key)
    if isinstance(found, int) and found >= recipe.train.accumulate:
        size = found * processes
        return _with_batch_size(recipe, size, lambda text: report(f"{text} (measured here before)")), None
    tried: list[Size] = []
    size = smallest = max(SMALLEST_BATCH, recipe.train.accumulate)
    held = machine.peak_memory(device) or 0
    while size == smallest or len(prepared.train) / (size * processes) >= STEPS_AT_LEAST:
        rate = _rate_of_size(recipe.with_train(batch_size=size), prepared, device, weights)
        tried.append(Size(size, rate))
        report(f"  batch size {size}: " + (f"{rate:,.0f} images/s" if rate is not None else "memory ran out"))
        rates = [other.rate or 0.0 for other in tried]
        # Two doublings without a gain, and there is none to come.
        if rate is None or (len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2])):
            break
        # Linux lets a process have what isn't there, and kills it once it is used.
        held, before = machine.peak_memory(device) or 0, held
        if 2 * (held - before) > HEADROOM * machine.free_memory(device):
            report(f"  batch size {size * 2}: would take nearly all the memory that is left")
            break
        size *= 2
    best = max(one.rate or 0.0 for one in tried)
    if best == 0.0:
        raise RunError(
            f"not even {smallest} images of a step fit into memory; give train.batch_size a number, and "
            "train.accumulate parts"
        )
    chosen = next(one.batch_size for one in tried if (one.rate or 0.0) * GAIN >= best)
    remembered.remember(key, chosen)
    record = [{"batch_size": one.batch_size, "images_per_second": one.rate} for one in tried]
    return _with_batch_size(recipe, chosen * processes, report), record


def _with_batch_size(recipe: Recipe, size: int, report: Report) -> Recipe:
    """The recipe with that batch size, its learning rates scaled to it."""
    factor = size / REFERENCE_BATCH
    if recipe.optimizer.name != "sgd":
        factor = 1.0 if recipe.optimizer.name == "muon" else factor**0.5
    rates_of = {name: getattr(recipe.optimizer, name) for name in ("lr", "head_lr", "bias_lr")}
    update = {name: value * factor for name, value in rates_of.items() if value is not None}
    optimizer = recipe.optimizer.model_copy(update=update)
    report(f"batch size: {size}, learning rate {optimizer.lr:g}")
    return recipe.with_train(batch_size=size).model_copy(update={"optimizer": optimizer})


def _rate_of_size(recipe: Recipe, prepared: Prepared, device: torch.device, weights: Weights | None) -> float | None:
    """Images per second of a step; None where memory runs out."""
    try:
        step = measured_step(recipe, prepared, device, weights)
        step.run()
        times = []
        for _ in range(3):
            machine.synchronize(device)
            began = time.perf_counter()
            step.run()
            machine.synchronize(device)
            times.append(time.perf_counter() - began)
        if step.whole():
            return recipe.train.batch / statistics.median(times)
    except (MemoryError, RuntimeError) as error:
        if not machine.is_out_of_memory(error):
            raise
    machine.give_back_memory(device)
    return None


def measured_step(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    weights: Weights | None,
    *,
    frozen_batch: bool = False,
) -> numerics.Step:
    """A step of the run on its first batch, at its last resolution, that can be done again and again.

    frozen_batch: what the network takes is made once; else it is augmented anew for each step.
    """
    order = epoch_order(torch.from_numpy(prepared.train.index), recipe.seed, 0)[: recipe.train.batch]
    task = make_task(recipe.with_train(ema=None), _only(prepared, order), device, weights, lambda _: None)
    task = dataclasses.replace(task, pipelines=((0.0, task.pipelines[-1][1]),))
    if task.network.numerics.compiled and task.network.compiled is None:
        raise RuntimeError("there is nothing in this network that could be compiled")
    _wake(task.network.model)
    take_step = TrainingStep(recipe, task, lambda _: None)
    optimizer, scaler = take_step.optimizer, take_step.scaler
    set_mode(task.network.model, recipe.model.freeze_stages, backbone=False)
    found = next(iter(task.store.batches(task.train, recipe.train.batch)))
    draws = task.pipeline.draw(recipe.seed, 0, len(task.store))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    # What is cached is computed once a version in training, and so is not a part of most steps.
    kept = make_batch(recipe, task, found, draws, 0, BySteps(1), 1) if frozen_batch or recipe.caches else None

    def next_batch() -> TrainingBatch:
        task.network.numerics.activate(device)
        return kept if kept is not None else make_batch(recipe, task, found, draws, 0, BySteps(1), 1)

    def run() -> Tensor:
        loss, _ = take_step(next_batch(), 0)
        if take_step.graphs_failed:  # training would go on without
            raise RuntimeError("a step of it can't be captured")
        return loss

    def gradients() -> list[Tensor]:
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    if scaler is not None:
        # The scale begins too high, and is halved at each overflow, at which nothing else is done.
        for _ in range(SCALES):
            take_step.set_gradients(next_batch(), 0)
            if all(torch.isfinite(gradient).all() for gradient in gradients()):
                break
            scaler.step(optimizer)
            scaler.update()

    return numerics.Step(run, gradients, lambda: take_step.accumulate == recipe.train.accumulate)


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Give matrices of zeros small random values, the same each time.

    A new head on pretrained weights begins at zero. With it, the first step's loss is the same whatever comes before,
    and so are the gradients there: zero. Neither would tell whether a way of computing is exact enough.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
            parameter.copy_(values)


def _only(prepared: Prepared, order: Tensor) -> Prepared:
    """A few of the training images and nothing else: several steps are made ready at a time, each with its images."""
    images = prepared.train.images.take(order.numpy())
    part = Part(images, np.arange(len(images), dtype=np.int64))
    return dataclasses.replace(prepared, train=part, validation=None)
