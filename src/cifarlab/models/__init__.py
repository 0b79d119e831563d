"""Networks by name: our small ones; later a door to timm's and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cifarlab.errors import RecipeError, nearest
from cifarlab.models.small import ex1, ex2
from cifarlab.recipe import Model
from cifarlab.seeds import derive_seed


@dataclass(frozen=True)
class Network:
    """How a network is made: `build(classes, size)` for square images of `size` pixels a side.

    channels_last_on_cpu: whether the network steps faster on a CPU with channels last (measured: EX-2 does, 3.5 times;
    EX-1, with its 12 and 24 channels, does not).
    """

    build: Callable[[int, int], nn.Module]
    minimum_size: int
    channels_last_on_cpu: bool


NETWORKS: dict[str, Network] = {
    # Down to 2x2 before the last layer: BatchNorm needs more than one value of a channel, in a batch of one image too.
    "ex1": Network(ex1, minimum_size=16, channels_last_on_cpu=False),
    "ex2": Network(ex2, minimum_size=8, channels_last_on_cpu=True),
}


def network(model: Model) -> Network:
    """The network that a recipe names. Raises RecipeError for an unknown name."""
    if model.name not in NETWORKS:
        raise RecipeError(f"unknown model.name '{model.name}'; {nearest(model.name, NETWORKS)}")
    return NETWORKS[model.name]


def build_model(model: Model, *, classes: int, size: tuple[int, int], seed: int) -> nn.Module:
    """A freshly initialised network on the CPU: the same weights for the same seed, whatever the device later.

    size: (H, W) of the images that it will see. Raises RecipeError where they are too small or not square.
    """
    check_size(model, size)
    torch.manual_seed(derive_seed(seed, "init"))
    return network(model).build(classes, size[0])


def check_size(model: Model, size: tuple[int, int]) -> None:
    """Raise RecipeError where a network can't take images of (H, W)."""
    spec = network(model)
    height, width = size
    if height != width or height < spec.minimum_size:
        raise RecipeError(
            f"model.name '{model.name}' takes square images of at least {spec.minimum_size} pixels a side, "
            f"not {height}x{width}; set train.resolution"
        )


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
