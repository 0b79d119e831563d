"""Networks by name, built: our small ones, and a door to timm's and torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cifarlab.errors import RecipeError
from cifarlab.models import catalog
from cifarlab.recipe_sections import Model
from cifarlab.seeds import derive_seed


def build_model(section: Model, *, classes: int, size: tuple[int, int], seed: int) -> nn.Module:
    """A freshly initialised network on the CPU: the same weights for the same seed, whatever the device later.

    No pretrained weights are loaded (`weights.load_weights` does that), so that a checkpoint can be loaded without a
    download. size: (H, W) of the images that it will see. Takes float32 (B, 3, H, W), gives logits (B, outputs).
    Raises RecipeError for an unknown name, images that it can't take, and a head to keep that has too few outputs.
    """
    network, head = _checked(section, classes, size)
    torch.manual_seed(derive_seed(seed, "init"))
    return network.build(head, size)


def outline(section: Model, *, classes: int, size: tuple[int, int], more: Sequence[tuple[int, int]] = ()) -> nn.Module:
    """What `build_model` builds, and raises, without memory for its weights: on the meta device.

    more: other sizes that the network is to take as well.
    """
    network, head = _checked(section, classes, size, *more)
    return catalog.on_meta(network, head, size)


def _checked(
    section: Model, classes: int, size: tuple[int, int], *more: tuple[int, int]
) -> tuple[catalog.Network, int | None]:
    """The network and the classes of its new head (None: its own stays), once it is known that they can be."""
    check_size(section, size, *more)
    outputs(section, classes)
    return _network(section), None if section.head == "keep" else classes


def _network(section: Model) -> catalog.Network:
    return catalog.find(section.name).shaped(section.widths, section.depths)


def check_size(section: Model, size: tuple[int, int], *more: tuple[int, int]) -> None:
    """Raise RecipeError where the network is unknown, or can't take images of (H, W).

    more: other sizes that the same network, made for the first, is to take as well.
    """
    _network(section).check(size, *more)


def outputs(section: Model, classes: int) -> int:
    """How many logits the network gives for a dataset of so many classes; with a head to keep there may be more.

    Raises RecipeError where it has no head to keep, or one with fewer outputs than classes.
    """
    if section.head == "new":
        return classes
    own = _network(section).outputs
    if own == 0:
        raise RecipeError(f"model.head: '{section.name}' has no head of its own to keep; set it to new")
    if own < classes:
        raise RecipeError(
            f"model.head: that of '{section.name}' has {own:,} outputs, too few for {classes:,} classes; set it to new"
        )
    return own


def channels_last_on_cpu(section: Model) -> bool:
    """Whether the network steps faster on a CPU with channels last."""
    return _network(section).channels_last_on_cpu


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
