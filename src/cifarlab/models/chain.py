"""A network as a chain of stages: what can be frozen, computed once, or given a learning rate of its own.

Stages are numbered from the input on; the last one holds the head, the layer that gives the logits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab.errors import RecipeError

# The order in which a network's forward calls its modules, by its class, for classes that call one after the other.
# "x.*" is every child of x; what is in brackets has no module of its own there, as the forward calls a function.
_FORWARDS: dict[str, tuple[str, ...]] = {
    "torchvision.models.efficientnet.EfficientNet": ("features.*", "avgpool", "(flatten)", "classifier.*"),
    "torchvision.models.mobilenetv2.MobileNetV2": ("features.*", "(pool)", "(flatten)", "classifier.*"),
    "torchvision.models.mobilenetv3.MobileNetV3": ("features.*", "avgpool", "(flatten)", "classifier.*"),
    "torchvision.models.convnext.ConvNeXt": ("features.*", "avgpool", "classifier.*"),
    "torchvision.models.vgg.VGG": ("features.*", "avgpool", "(flatten)", "classifier.*"),
    "torchvision.models.resnet.ResNet": (
        *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "(flatten)", "fc"),
    ),
    "timm.models.efficientnet.EfficientNet": (
        *("conv_stem", "bn1", "blocks.*", "conv_head", "bn2", "global_pool", "(dropout)", "classifier"),
    ),
    "timm.models.mobilenetv3.MobileNetV3": (
        *("conv_stem", "bn1", "blocks.*", "global_pool", "conv_head", "norm_head", "act2", "flatten"),
        *("(dropout)", "classifier"),
    ),
    "timm.models.resnet.ResNet": (
        *("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        *("global_pool", "(dropout)", "fc"),
    ),
    "timm.models.convnext.ConvNeXt": (
        *("stem", "stages.*", "norm_pre", "head.global_pool", "head.norm", "head.flatten", "head.pre_logits"),
        *("head.drop", "head.fc"),
    ),
}

_Part = tuple[str, nn.Module]


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a network; `name` is that of the module in the network that it begins with, normalisation aside."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Chain:
    """A network's stages: one after the other they are its forward, to the bit.

    Parts share their modules with the network, and so its weights, statistics and modes: set modes on the network.
    """

    stages: tuple[Stage, ...]

    def front(self, count: int) -> nn.Module:
        """The first `count` stages: images (B, 3, H, W) -> features, of any shape that begins with B."""
        return nn.Sequential(*(stage.module for stage in self.stages[:count]))

    def rest(self, count: int) -> nn.Module:
        """All stages but the first `count`: what `front(count)` gives -> logits (B, classes)."""
        return nn.Sequential(*(stage.module for stage in self.stages[count:]))


class _Dropout(nn.Module):
    """The dropout that a timm network's forward does by function: at the network's own rate, and in its mode."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple, as this must not become a part of it

    def forward(self, features: Tensor) -> Tensor:
        (network,) = self._network
        return F.dropout(features, float(network.drop_rate), network.training)


# --- the head ---------------------------------------------------------------------------------


def head_name(model: nn.Module) -> str:
    """The qualified name of the head; of several (a distilled network's), the first.

    timm's networks say it. Of others it is the last linear layer, or else the last 1x1 convolution (SqueezeNet's).
    Raises RecipeError where a network has neither.
    """
    return _head_names(model)[0]


def head_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of the head, or of all heads of a distilled network."""
    return frozenset(
        f"{head}.{name}" for head in _head_names(model) for name, _ in model.get_submodule(head).named_parameters()
    )


def _head_names(model: nn.Module) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    said = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = tuple(name for name in ((said,) if isinstance(said, str) else said) if name in modules)
    if names:
        return names
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    pointwise = [n for n, m in modules.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    if not linear and not pointwise:
        raise RecipeError(f"model.name: {type(model).__name__} has no linear layer or 1x1 convolution as its last")
    return ((linear or pointwise)[-1],)


# --- stages -----------------------------------------------------------------------------------


def chain(model: nn.Module) -> Chain | None:
    """The network's stages, or None for a network that isn't known to be a chain.

    Known are nn.Sequential, and some of torchvision's and timm's. A stage begins with each module, among those that
    the forward calls, that has a matrix or a convolution; normalisation, activation and pooling belong to the stage
    before them, dropout to the one after.
    """
    groups = _grouped(_parts(model))
    stages = tuple(
        Stage(next(name for name, module in parts if _has_matrix(module)), _in_a_row(parts)) for parts in groups
    )
    if not stages:
        return None
    known = {parameter for stage in stages for parameter in stage.module.parameters()}
    heads = {model.get_submodule(name) for name in _head_names(model)}
    complete = known == set(model.parameters()) and heads <= set(stages[-1].module.modules())
    return Chain(stages) if complete else None


def verified_chain(model: nn.Module, size: int) -> Chain | None:
    """The network's stages, or None also where they don't compute what the network does.

    A random batch (2, 3, size, size) goes through both, in evaluation mode; logits and what reaches the head must be
    equal to the bit. Modes and the global random state are as before afterwards.
    """
    stages = chain(model)
    if stages is None:
        return None
    weight = next(model.parameters())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(weight)
    # The head's input is compared as well: logits of a head that begins with zeros would be equal in any case.
    reached: list[Tensor] = []
    hook = model.get_submodule(head_name(model)).register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), torch.no_grad(), hook:
        model.eval()
        logits = model(images)
        try:
            same = torch.equal(logits, stages.rest(0)(images))
        except RuntimeError:  # shapes that don't fit
            same = False
    for module, training in modes.items():
        module.training = training
    return stages if same and len(reached) == 2 and torch.equal(*reached) else None


def stage_ids(model: nn.Module) -> dict[str, int] | None:
    """The number of the stage of every parameter and buffer by its name; None where the stages are not known.

    The chain's stages; or else timm's, whose head must come last.
    """
    stages = chain(model)
    if stages is not None:
        return _owners(model, [stage.module for stage in stages.stages])
    network: Any = model
    if not hasattr(network, "group_matcher"):
        return None
    from timm.models import group_parameters

    ids: dict[str, int] = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    last = max(ids.values())
    if last == 0 or any(ids[name] != last for name in head_parameters(network)):
        return None
    of_module = {name.rpartition(".")[0]: number for name, number in ids.items()}
    # A buffer in a module without parameters is a constant, such as a table of positions.
    return ids | {name: of_module.get(name.rpartition(".")[0], last) for name, _ in network.named_buffers()}


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter by its name: 0 is nearest the input, the head's the highest, none is left out.

    A block of a stage is a layer. timm's networks are numbered as in timm's `param_groups_layer_decay`. Raises
    RecipeError for a network whose layers are not known.
    """
    network: Any = model
    if hasattr(network, "group_matcher"):
        from timm.models import group_parameters

        ids: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
        return ids
    if chain(model) is None:
        raise RecipeError(
            "optimizer.layer_decay needs a network whose layers are known, which those of "
            f"{type(model).__name__} are not; set it to 1, or choose one of timm's networks"
        )
    layers: list[nn.Module] = []
    for parts in _grouped(_parts(model)):
        blocks = itertools.chain.from_iterable(_blocks(name, module) for name, module in parts)
        layers += map(_in_a_row, _grouped(blocks))
    owners = _owners(model, layers)
    return {name: owners[name] for name, _ in model.named_parameters()}


def _parts(model: nn.Module) -> list[_Part]:
    """Names and modules, one after the other, that a network's forward calls; none where that is not known."""
    if type(model).forward is nn.Sequential.forward:
        return list(model.named_children())
    names = _FORWARDS.get(f"{type(model).__module__}.{type(model).__name__}", ())
    try:
        return [part for name in names for part in _called(model, name)]
    except AttributeError:  # a variant of the class that is put together in another way
        return []


def _called(model: nn.Module, name: str) -> list[_Part]:
    """What an entry of _FORWARDS stands for. Raises AttributeError where the network has no such module."""
    match name:
        case "(flatten)":
            return [(name, nn.Flatten())]
        case "(pool)":
            return [(name, nn.AdaptiveAvgPool2d(1))]
        case "(dropout)":
            return [(name, _Dropout(model))]
    parent = name.removesuffix(".*")
    module = model.get_submodule(parent)
    if parent == name:
        return [(name, module)]
    return [(f"{parent}.{child}", part) for child, part in module.named_children()]


def _blocks(name: str, module: nn.Module) -> list[_Part]:
    """A part's children where they are called one after the other, and else itself."""
    if type(module).forward is nn.Sequential.forward:
        return [(f"{name}.{child}", block) for child, block in module.named_children()]
    return [(name, module)]


def _grouped(parts: Iterable[_Part]) -> list[list[_Part]]:
    """Parts in groups, in their order: one for each matrix or convolution, with what belongs to it."""
    groups: list[list[_Part]] = []
    waiting: list[_Part] = []  # for the next matrix or convolution
    for name, module in parts:
        if _has_matrix(module):
            groups.append([*waiting, (name, module)])
            waiting = []
        elif groups and not waiting and not isinstance(module, nn.Dropout | nn.Dropout2d | _Dropout):
            groups[-1].append((name, module))
        else:
            waiting.append((name, module))
    if groups:
        groups[-1] += waiting
    return groups


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _in_a_row(parts: list[_Part]) -> nn.Module:
    return parts[0][1] if len(parts) == 1 else nn.Sequential(*(module for _, module in parts))


def _owners(model: nn.Module, modules: list[nn.Module]) -> dict[str, int]:
    """Which of the modules has a parameter or buffer, by its name in the model."""
    owners = {
        id(tensor): number
        for number, module in enumerate(modules)
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: owners[id(tensor)] for name, tensor in tensors}


# --- freezing ---------------------------------------------------------------------------------


def freeze(model: nn.Module, stages: int, field: str = "model.freeze_stages") -> None:
    """Let the parameters of the first `stages` stages train no more, for good.

    Raises RecipeError, naming `field`, where the network has not that many, or none that are known.
    """
    frozen = _names_in_front(model, stages, field)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def freeze_backbone(model: nn.Module, stages: int, frozen: bool) -> None:
    """Let only the head train (frozen), or all again that did before, which the first `stages` stages never do.

    What a network keeps fixed from the beginning stays so.
    """
    if frozen:
        head = head_parameters(model)
        paused = {name for name, p in model.named_parameters() if p.requires_grad and name not in head}
        # Kept with the network, as fixed parameters look the same as paused ones.
        vars(model)["_paused"] = vars(model).get("_paused", set()) | paused
    else:
        paused = vars(model).pop("_paused", set()) - _names_in_front(model, stages)
    for name in paused:
        model.get_parameter(name).requires_grad_(not frozen)


def set_mode(model: nn.Module, stages: int, backbone: bool) -> None:
    """Training mode, but evaluation mode for the first `stages` stages, and with `backbone` for all but the last.

    So frozen parts keep their BatchNorm statistics and drop nothing. Where a network is no chain, that concerns the
    modules all of whose parameters are frozen; the last stage is the head alone there.
    """
    model.train()
    if not stages and not backbone:
        return
    found = chain(model)
    if found is not None:
        for stage in found.stages[: len(found.stages) - 1 if backbone else stages]:
            stage.module.eval()
        return
    every = {name for name, _ in model.named_parameters()}
    frozen = every - head_parameters(model) if backbone else _names_in_front(model, stages)
    for name, module in model.named_modules():
        inside = {f"{name}.{parameter}" if name else parameter for parameter, _ in module.named_parameters()}
        if inside and inside <= frozen:
            module.eval()


def _names_in_front(model: nn.Module, stages: int, field: str = "model.freeze_stages") -> set[str]:
    """The names of parameters and buffers of the first `stages` stages. Raises RecipeError, as `freeze` does."""
    if not stages:
        return set()
    ids = stage_ids(model)
    if ids is None:
        raise RecipeError(
            f"{field} needs a network whose stages are known, which those of {type(model).__name__} are "
            "not; leave it out; model.freeze_backbone works with any network"
        )
    last = max(ids.values())
    if stages > last:
        raise RecipeError(
            f"{field} is {stages}, but this network has {last + 1} stages, and its head can't be frozen: "
            f"{', '.join(_stage_names(model, ids))}; set it to {last} or less"
        )
    return {name for name, number in ids.items() if number < stages}


def _stage_names(model: nn.Module, ids: dict[str, int]) -> list[str]:
    """A name for each stage; where the network is no chain, of what it begins with: "blocks.3", for example."""
    found = chain(model)
    if found is not None:
        return [stage.name for stage in found.stages]
    first = {number: name for name, number in reversed(ids.items())}
    return [re.sub(r"([^.]+(\.\d+)?).*", r"\1", first[number]) for number in sorted(first)]
