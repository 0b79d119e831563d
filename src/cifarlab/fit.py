"""A recipe fitted to a budget: as long as this machine can train it in the time, its schedule over that length.

The network, its batches and its augmentation stay.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cifarlab import machine
from cifarlab.budget import BEGINNING, Budget
from cifarlab.choices import measured_step
from cifarlab.data.prepare import Prepared
from cifarlab.download import Report
from cifarlab.errors import RunError
from cifarlab.evaluate import looks_on_test, looks_on_validation
from cifarlab.models.weights import Weights
from cifarlab.recipe import Recipe, make_recipe
from cifarlab.recipe_base import Duration

# A forward without a backward, as a share of a step.
FORWARD = 0.4
# So many steps are timed, after one that warms up.
TIMED = 2


def fitted(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    weights: Weights | None,
    budget: Budget,
    report: Report,
) -> Recipe:
    """The recipe with as many epochs as the budget has time for; in `budget.planned` stands what was expected.

    recipe: with nothing left to the machine to decide. Raises RunError where there is no time for a step.
    """
    batch = recipe.train.batch
    step = measured_step(recipe, prepared, device, weights)
    step.run()
    machine.synchronize(device)
    began = budget.now()
    for _ in range(TIMED):
        step.run()
    machine.synchronize(device)
    seconds = (budget.now() - began) / TIMED * _mean_pixels(recipe, prepared)
    del step
    machine.give_back_memory(device)
    budget.looks_on_test = looks = looks_on_test(recipe, len(prepared.test))
    if prepared.validation is not None:
        images = len(prepared.validation)
        looks += looks_on_validation(recipe, images, min(images, len(prepared.train)))
    evaluation = looks * FORWARD * seconds / batch
    training = budget.left() - budget.finishing - evaluation
    steps = math.floor(training / seconds)
    if steps < 1:
        least = budget.spent() + budget.finishing + evaluation + seconds
        raise RunError(
            f"{budget.seconds:.0f} s are not enough for '{recipe.name}' here: start, evaluation and writing take about "
            f"{least - seconds:.0f} s, and a step {seconds:.1f} s; give it more time, or take a smaller network"
        )
    steps_per_epoch = math.ceil(len(prepared.train) / batch)
    epochs = steps / steps_per_epoch
    budget.planned = {
        "epochs": epochs,
        "steps": steps,
        "seconds_per_step": seconds,
        "training": training,
        "evaluation": evaluation,
        "finishing": budget.finishing,
    }
    report(
        f"budget: {budget.seconds:.0f} s, of which {budget.spent():.0f} are spent and about {training:.0f} are for "
        f"training: {epochs:.2f} epochs"
    )
    return _shortened(recipe.with_train(epochs=round(epochs, 4)), steps_per_epoch, steps)


def _mean_pixels(recipe: Recipe, prepared: Prepared) -> float:
    """The mean of the images' pixels in the course of a run, over those at its end."""
    own: tuple[int, ...] = prepared.train.images.pixels.shape[2:]
    shares = recipe.train.resolutions
    ends = [*(share for share, _ in shares[1:]), 1.0]
    pixels = [side * side if side is not None else math.prod(own) for _, side in shares]
    parts = [(end - begin) * size for (begin, _), end, size in zip(shares, ends, pixels, strict=True)]
    return sum(parts) / pixels[-1]


def _shortened(recipe: Recipe, steps_per_epoch: int, steps: int) -> Recipe:
    """What is counted in epochs or steps and would take up the run is held to a share of it."""
    update: dict[str, Any] = {}
    warmup = recipe.schedule.warmup
    if warmup is not None and warmup.share_of(steps, steps_per_epoch) > BEGINNING:
        update["schedule"] = recipe.schedule.model_copy(update={"warmup": Duration(share=BEGINNING)})
    alone = recipe.model.freeze_backbone
    if alone is not None and alone.share_of(steps, steps_per_epoch) > BEGINNING:
        update["model"] = recipe.model.model_copy(update={"freeze_backbone": Duration(share=BEGINNING)})
    return make_recipe(recipe.model_copy(update=update).to_dict(), origin=f"recipe {recipe.name}")
