"""The arithmetic of training: floating-point operations of the network's convolutions and matrix products.

A multiply-add counts as two. Counted is what a step has to do: the forward, and of the backward the gradients that
something needs; so none for frozen stages, and none for the input of the first layer that trains. Padding counts as
pixels do. Normalisation, activations, augmentation and the optimizer are left out, as is usual.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab.evaluate import Classifier
from cifarlab.models.chain import chain, freeze, freeze_backbone
from cifarlab.models.racing import whitening_biases
from cifarlab.recipe import Recipe
from cifarlab.recipe_base import Duration

# Shape of an input without the batch; whether it is for the frozen stages that run apart; which parameters train.
_Kind = tuple[torch.Size, bool, tuple[bool, ...]]


def per_image(module: nn.Module, shape: Sequence[int], trained: Sequence[bool] | None = None) -> int:
    """FLOPs of a forward and backward of `module` for one of its inputs, `shape` without the batch.

    trained: whether each of its parameters, in their order, is to get a gradient; None: those that require one now.
    Runs on the meta device: nothing is computed, and the module, its buffers and the random state stay as they are.
    Raises whatever a network raises that can't be run there.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parameters = dict(module.named_parameters())
    flags = [parameter.requires_grad for parameter in parameters.values()] if trained is None else trained
    stand_ins = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in itertools.chain(parameters.items(), module.named_buffers())
    }
    for name, flag in zip(parameters, flags, strict=True):
        stand_ins[name].requires_grad_(flag)
    images = 2  # BatchNorm takes no single value of a channel
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), counter:
        output: Tensor = torch.func.functional_call(module, stand_ins, torch.empty(images, *shape, device="meta"))
        if output.requires_grad:
            torch.autograd.backward(output.sum())
    return counter.get_total_flops() // images


def _convolution_backward(
    gradient: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Of shapes: the gradients of images and weight take what the forward took, each.

    torch's own formula for the weight's leaves the groups out: 1,280 times too much for 1,280 depthwise filters.
    """
    places = (images if transposed else gradient)[2:]
    return 2 * images[0] * math.prod(places) * math.prod(weight) * sum(wanted[:2])


class TrainingFlops:
    """Adds up the FLOPs of a network's training steps. Counting waits until it is asked for the total.

    before: those of the steps that were taken before; None where they couldn't be counted.
    """

    def __init__(self, network: Classifier, before: int | None = 0) -> None:
        self._network = network
        self._parameters = list(network.rest.parameters())
        self._images: Counter[_Kind] = Counter()
        self._per_image: dict[_Kind, int] = {}
        self._countable = before is not None
        self._before = before or 0

    def add(self, inputs: torch.Size, computed: torch.Size | None) -> None:
        """A step with inputs of that shape, (B, …), as the network is at the moment.

        computed: the shape of the images that frozen stages ran on for it; None where they ran on none.
        """
        trained = tuple(parameter.requires_grad for parameter in self._parameters)
        self._images[inputs[1:], False, trained] += inputs[0]
        if computed is not None:
            self._images[computed[1:], True, ()] += computed[0]

    def total(self) -> int | None:
        """FLOPs of all steps so far; None where the network can't be counted."""
        try:
            for kind in self._images.keys() - self._per_image.keys() if self._countable else ():
                self._per_image[kind] = self._count(kind)
        except Exception:  # it is any network of timm's or torchvision's, and a run doesn't end for a figure
            self._countable = False
        if not self._countable:
            return None
        return self._before + sum(images * self._per_image[kind] for kind, images in self._images.items())

    def _count(self, kind: _Kind) -> int:
        shape, front, trained = kind
        if not front:
            return per_image(self._network.rest, shape, trained)
        assert self._network.frozen is not None
        return per_image(self._network.frozen.front, shape)


def of_recipe(recipe: Recipe, model: nn.Module, side: int, images: int) -> int:
    """FLOPs of a whole run on so many training images, unless it stops early or prunes; the cache has room for all.

    model: the recipe's, `freeze_stages` frozen; it is used up. side: of images as they are, in pixels.
    Raises whatever a network raises that can't be counted.
    """
    section, train = recipe.model, recipe.train
    # Only lengths in steps depend on what `auto` will choose.
    steps_per_epoch = math.ceil(images / (128 if train.batch_size == "auto" else train.batch_size))
    total_steps = max(1, round(train.epochs * steps_per_epoch))

    def end_of(duration: Duration | None, otherwise: float) -> float:
        return min(1.0, duration.share_of(total_steps, steps_per_epoch)) if duration is not None else otherwise

    thaw, faded = end_of(section.freeze_backbone, 0.0), end_of(section.whitening_bias, 1.0)
    changes = {0.0, thaw, faded, 1.0, *(since for since, _ in (*train.resolutions, *(section.freeze_late or ())))}
    parts = chain(model) if recipe.caches else None
    freeze_backbone(model, section.freeze_stages, frozen=thaw > 0)
    total = 0.0
    for begin, end in itertools.pairwise(sorted(changes)):
        stages = section.frozen_stages(begin)
        freeze(model, stages)
        if begin >= thaw:
            freeze_backbone(model, stages, frozen=False)
        if begin >= faded:
            for bias in whitening_biases(model).values():
                bias.requires_grad_(False)
        own = next(resolution for since, resolution in reversed(train.resolutions) if begin >= since) or side
        epochs = train.epochs * (end - begin)
        total += epochs * images * per_image(model, (3, own, own))
        if parts is not None and recipe.augment.cycle is not None:
            recalled = max(0.0, epochs - recipe.augment.cycle) * images
            total -= recalled * per_image(parts.front(section.freeze_stages), (3, own, own))
    return round(total)
