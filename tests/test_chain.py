"""Chains against the networks' own forward, to the bit; stages and layers by name; what freezing stops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock

from cifarlab.errors import RecipeError
from cifarlab.models import chain as module_of_chain
from cifarlab.models.chain import (
    chain,
    freeze,
    freeze_backbone,
    head_name,
    head_parameters,
    layer_ids,
    set_mode,
    stage_ids,
    verified_chain,
)
from cifarlab.models.small import ex1, ex2

CLASSES = 7
SIZE = 32


def of_timm(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options)


def of_torchvision(name: str) -> Any:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, num_classes=CLASSES)


def a_convnext() -> Any:
    """torchvision's, as its convnext_tiny but narrow."""
    torch.manual_seed(0)
    widths = [(8, 16, 3), (16, 24, 3), (24, 32, 9), (32, None, 3)]
    return ConvNeXt([CNBlockConfig(*width) for width in widths], stochastic_depth_prob=0.3, num_classes=CLASSES)


def with_dropout() -> nn.Module:
    """One of ours with dropout before matrices, as in VGG, with other layers between, and something after the head."""
    torch.manual_seed(0)
    front = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(8, 8, 3), nn.ReLU()]
    pooled = [nn.Dropout(0.5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*front, *pooled, nn.Linear(8 * 6 * 6, CLASSES), nn.Tanh(), nn.Dropout(0.5))


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{number}" for number in range(count)]


RESNET = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
# Where the stages of a network begin.
CHAINS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "ex1": (lambda: ex1(CLASSES, SIZE), ["conv1", "conv2", "conv3", "conv4", "head"]),
    "ex2": (lambda: ex2(CLASSES, SIZE), ["conv1", "conv2", "conv3", "hidden", "head"]),
    "ours with dropout": (with_dropout, ["0", "4", "9"]),
    "timm lite0": (
        lambda: of_timm("tf_efficientnet_lite0", drop_rate=0.3, drop_path_rate=0.3),
        ["conv_stem", *numbered("blocks", 7), "conv_head", "classifier"],
    ),
    "timm mobilenetv3": (
        lambda: of_timm("mobilenetv3_small_050", drop_rate=0.3),
        ["conv_stem", *numbered("blocks", 6), "conv_head", "classifier"],
    ),
    "timm resnet18": (lambda: of_timm("resnet18", drop_rate=0.3), RESNET),
    "timm convnext": (
        lambda: of_timm("convnext_atto", drop_rate=0.3, drop_path_rate=0.3),
        ["stem", *numbered("stages", 4), "head.fc"],
    ),
    "resnet18": (lambda: of_torchvision("resnet18"), RESNET),
    "efficientnet_v2_s": (lambda: of_torchvision("efficientnet_v2_s"), [*numbered("features", 8), "classifier.1"]),
    "mobilenet_v2": (lambda: of_torchvision("mobilenet_v2"), [*numbered("features", 19), "classifier.1"]),
    "mobilenet_v3_small": (
        lambda: of_torchvision("mobilenet_v3_small"),
        [*numbered("features", 13), "classifier.0", "classifier.3"],
    ),
    "convnext": (lambda: a_convnext(), [*numbered("features", 8), "classifier.2"]),
}


def a_vit() -> Any:
    return of_timm("vit_tiny_patch16_224", img_size=SIZE)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def drawn(forward: Callable[[Tensor], Tensor]) -> Tensor:
    """A forward's result under the same random state."""
    torch.manual_seed(5)
    return forward(images())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- the chain --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_the_stages_are_the_networks_forward_to_the_bit(name: str) -> None:
    build, begins = CHAINS[name]
    model = build()
    found = verified_chain(model, SIZE)
    assert found is not None
    assert [stage.name for stage in found.stages] == begins

    model.eval()
    logits = model(images())
    assert logits.std() > 0
    for count in (0, len(begins) // 2, len(begins) - 1):
        assert torch.equal(found.rest(count)(found.front(count)(images())), logits)

    # In training mode: the same draws, and afterwards the same statistics, in the network itself.
    count = len(begins) - 1
    reference = copy.deepcopy(model).train()
    expected = drawn(reference)
    model.train()
    assert torch.equal(drawn(lambda pixels: found.rest(count)(found.front(count)(pixels))), expected)
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())


def test_dropout_before_the_head_is_not_part_of_what_is_frozen() -> None:
    for name in ("timm lite0", "timm mobilenetv3", "timm resnet18", "timm convnext", "ours with dropout"):
        model = CHAINS[name][0]().train()
        found = chain(model)
        assert found is not None
        count = len(found.stages) - 1
        found.front(count).eval()
        features = found.front(count)(images())
        assert torch.equal(found.front(count)(images()), features), name
        assert not torch.equal(found.rest(count)(features), found.rest(count)(features)), name


def test_lite0s_fourth_stage_gives_40_channels() -> None:
    found = chain(of_timm("tf_efficientnet_lite0"))
    assert found is not None
    assert found.front(4)(images()).shape == (2, 40, 4, 4)
    assert found.front(9)(images()).shape == (2, 1280)  # pooled: what a cache keeps of an image is small


class OtherSequential(nn.Sequential):
    """nn.Sequential with a forward of its own, whatever that is."""

    forward = nn.Identity.forward


def test_a_network_that_is_not_known_has_no_chain() -> None:
    others = [
        a_vit(),
        of_torchvision("squeezenet1_1"),
        OtherSequential(nn.Flatten(), nn.Linear(3, 2)),
        type("OtherResNet", (type(of_torchvision("resnet18")),), {})(BasicBlock, [1, 1, 1, 1]),
        of_timm("convnext_zepto_rms", head_norm_first=True),  # the same class, put together in another way
        nn.Sequential(nn.Linear(3, 2), nn.Conv2d(2, 2, 1)),  # the last linear layer is not in its last stage
    ]
    for model in others:
        assert chain(model) is None, type(model).__name__
        assert verified_chain(model, SIZE) is None


@pytest.mark.parametrize("zero_head", [False, True])
def test_stages_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch, zero_head: bool) -> None:
    model = of_torchvision("resnet18")
    if zero_head:
        nn.init.zeros_(model.fc.weight)  # then the logits are the same whatever comes before
    key = "torchvision.models.resnet.ResNet"
    assert verified_chain(model, SIZE) is not None
    good = module_of_chain._FORWARDS[key]
    for wrong in (
        tuple(name for name in good if name != "maxpool"),
        tuple(name for name in good if name != "(flatten)"),
        tuple(name if name != "maxpool" else "layer2" for name in good),
        (*good, "relu"),
    ):
        monkeypatch.setitem(module_of_chain._FORWARDS, key, wrong)
        assert verified_chain(model, SIZE) is None


def test_a_table_that_leaves_out_weights_gives_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "torchvision.models.resnet.ResNet"
    without = tuple(name for name in module_of_chain._FORWARDS[key] if name != "bn1")
    monkeypatch.setitem(module_of_chain._FORWARDS, key, without)
    assert chain(of_torchvision("resnet18")) is None


def test_verifying_leaves_modes_statistics_and_the_random_state_as_they_were() -> None:
    model = of_timm("mobilenetv3_small_050", drop_rate=0.3)
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before, tensors = torch.get_rng_state(), state(model)
    assert verified_chain(model, SIZE) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the head ---------------------------------------------------------------------------------


def test_the_head_is_the_layer_that_gives_the_logits() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (ex1(CLASSES, SIZE), "head"),
        (ex2(CLASSES, SIZE), "head"),
        (of_timm("tf_efficientnet_lite0"), "classifier"),
        (of_timm("convnext_atto"), "head.fc"),
        (a_vit(), "head"),
        (of_torchvision("resnet18"), "fc"),
        (of_torchvision("mobilenet_v3_small"), "classifier.3"),
        (of_torchvision("squeezenet1_1"), "classifier.1"),
    ]
    for model, name in cases:
        assert head_name(model) == name
        assert head_parameters(model) == {f"{name}.weight", f"{name}.bias"}
        assert model.get_parameter(f"{name}.weight").shape[0] == CLASSES


def test_a_network_says_its_head_also_where_that_is_not_the_last_linear_layer() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Linear(3, CLASSES))
    model.add_module("auxiliary", nn.Linear(3, 2))
    assert head_name(model) == "auxiliary"
    model.pretrained_cfg = {"classifier": "head"}  # type: ignore[assignment]
    assert head_name(model) == "head"
    model.pretrained_cfg = {"classifier": "gone"}  # type: ignore[assignment]
    assert head_name(model) == "auxiliary"


def test_a_distilled_network_has_two_heads() -> None:
    model = of_timm("deit_tiny_distilled_patch16_224", img_size=SIZE)
    assert head_name(model) == "head"
    both = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert head_parameters(model) == both
    freeze_backbone(model, 0, frozen=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == both


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(RecipeError, match="has no linear layer"):
        head_name(nn.Sequential(nn.Conv2d(3, 3, 3)))


# --- numbers of stages and layers -------------------------------------------------------------


def test_every_parameter_and_buffer_of_a_chain_has_its_stage() -> None:
    model = of_timm("tf_efficientnet_lite0")
    ids = stage_ids(model)
    assert ids is not None
    assert set(ids) == set(model.state_dict())
    for name, stage in {
        "conv_stem.weight": 0,
        "bn1.running_mean": 0,
        "blocks.0.0.conv_dw.weight": 1,
        "blocks.2.1.bn3.num_batches_tracked": 3,
        "blocks.6.0.conv_pwl.weight": 7,
        "conv_head.weight": 8,
        "bn2.bias": 8,
        "classifier.bias": 9,
    }.items():
        assert ids[name] == stage, name

    ids = stage_ids(ex1(CLASSES, SIZE))
    assert ids is not None
    assert [ids[f"{name}.bias"] for name in ("conv1", "bn1", "conv2", "bn4", "head")] == [0, 0, 1, 3, 4]


def test_a_vits_stages_are_timms() -> None:
    model = a_vit()
    ids = stage_ids(model)
    assert ids is not None
    assert ids == group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    # Tokens and patches, twelve blocks, and the head.
    assert ids["cls_token"] == ids["pos_embed"] == ids["patch_embed.proj.weight"] == 0
    assert (ids["blocks.0.attn.qkv.weight"], ids["blocks.11.mlp.fc2.bias"], ids["head.weight"]) == (1, 12, 13)

    model = of_timm("swin_tiny_patch4_window7_224", depths=(1, 2, 1, 1), embed_dim=24)
    ids = stage_ids(model)
    assert ids is not None
    assert set(ids) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert ids["layers.1.blocks.0.attn.qkv.weight"] == ids["layers.1.blocks.1.attn.qkv.weight"] == 2
    index = "layers.2.blocks.0.attn.relative_position_index"
    assert ids[index] == ids["layers.2.blocks.0.attn.qkv.weight"] < ids["head.fc.weight"]


class Matched(nn.Module):
    """What a timm network with a group matcher that says little looks like; its head is the second layer."""

    def __init__(self, matcher: dict[str, str]) -> None:
        super().__init__()
        self.matcher = matcher
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def group_matcher(self, coarse: bool) -> dict[str, str]:
        return self.matcher


def test_the_stages_of_other_networks_are_not_known() -> None:
    assert stage_ids(of_torchvision("squeezenet1_1")) is None
    assert stage_ids(Matched({"stem": "first"})) is not None
    assert stage_ids(Matched({"all": ""})) is None
    assert stage_ids(Matched({"stem": "second"})) is None


def by_layer(model: nn.Module) -> list[set[str]]:
    """The names of parameters of each layer, the last dotted part left out; checks that no number is left out."""
    ids = layer_ids(model)
    assert set(ids) == {name for name, _ in model.named_parameters()}
    assert set(ids.values()) == set(range(max(ids.values()) + 1))
    assert {name for name, layer in ids.items() if layer == max(ids.values())} >= head_parameters(model)
    layers: list[set[str]] = [set() for _ in set(ids.values())]
    for name, layer in ids.items():
        layers[layer].add(name.rpartition(".")[0])
    return layers


def test_a_layer_of_a_chain_is_a_block_of_a_stage() -> None:
    assert by_layer(ex2(CLASSES, SIZE)) == [
        {"conv1", "bn1"},
        {"conv2", "bn2"},
        {"conv3", "bn3"},
        {"hidden"},
        {"head"},
    ]
    layers = by_layer(of_torchvision("resnet18"))
    assert len(layers) == 10
    assert layers[0] == {"conv1", "bn1"}
    assert layers[3] >= {"layer2.0.conv1", "layer2.0.downsample.0"}
    assert all(name.startswith("layer2.0.") for name in layers[3])
    # The stem, 2 + 4 + 4 + 6 + 9 + 15 blocks, the last convolution and the head (arXiv 2104.00298, table 4).
    with torch.device("meta"):  # there are only names to look at
        layers = by_layer(of_torchvision("efficientnet_v2_s"))
    assert len(layers) == 1 + 40 + 1 + 1
    assert layers[0] == {"features.0.0", "features.0.1"}
    assert layers[-2] == {"features.7.0", "features.7.1"}
    # A downsampling (norm, convolution) is a layer; the last norm belongs to the last block.
    layers = by_layer(a_convnext())
    assert len(layers) == 1 + 3 + 3 + 9 + 3 + 3 + 1
    assert {"features.2.0", "features.2.1"} in layers
    assert layers[-2] >= {"features.7.2.block.0", "classifier.0"}
    assert layers[-1] == {"classifier.2"}


def test_the_layers_of_timms_networks_are_timms() -> None:
    for name in ("tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"):
        model = of_timm(name)
        assert layer_ids(model) == group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        by_layer(model)


def test_layers_that_are_not_known_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"optimizer.layer_decay needs a network whose layers are known.* SqueezeNet"):
        layer_ids(of_torchvision("squeezenet1_1"))


# --- freezing ---------------------------------------------------------------------------------


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def begins_with(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def everything(model: nn.Module) -> set[str]:
    return begins_with(model, "")


def test_the_first_stages_are_frozen_and_no_others() -> None:
    model = of_timm("tf_efficientnet_lite0")
    freeze(model, 0)
    assert trainable(model) == everything(model)
    freeze(model, 4)
    front = begins_with(model, "conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")
    assert len(front) > 30
    assert trainable(model) == everything(model) - front
    freeze(model, 9)
    assert trainable(model) == {"classifier.weight", "classifier.bias"}

    model = ex1(CLASSES, SIZE)
    freeze(model, 2)
    assert trainable(model) == everything(model) - begins_with(model, "conv1.", "bn1.", "conv2.", "bn2.")

    model = a_vit()
    freeze(model, 2)
    assert trainable(model) == everything(model) - begins_with(
        model, "cls_token", "pos_embed", "patch_embed.", "blocks.0."
    )


def test_too_many_stages_are_refused_with_their_names() -> None:
    model = of_torchvision("resnet18")
    with pytest.raises(RecipeError, match=r"model.freeze_stages is 6, .* 6 stages.*: conv1, layer1, .*, fc; .* 5 or"):
        freeze(model, 6)
    assert trainable(model) == everything(model)
    with pytest.raises(RecipeError, match=r"is 14, .* 14 stages.*: cls_token, blocks.0, .*, blocks.11, head; .* 13 or"):
        freeze(a_vit(), 14)
    with pytest.raises(RecipeError, match=r"model.freeze_stages needs a network whose stages are known"):
        freeze(of_torchvision("squeezenet1_1"), 1)
    freeze(of_torchvision("squeezenet1_1"), 0)


@pytest.mark.parametrize("stages", [0, 2])
def test_the_backbone_is_frozen_and_thawed_without_what_never_trains(stages: int) -> None:
    model = ex1(CLASSES, SIZE)
    model.get_parameter("conv4.bias").requires_grad_(False)  # fixed by the network itself
    freeze(model, stages)
    before = trainable(model)
    freeze_backbone(model, stages, frozen=False)  # as a run does that has no frozen backbone, or goes on after it
    assert trainable(model) == before
    for _ in range(2):
        freeze_backbone(model, stages, frozen=True)
        assert trainable(model) == {"head.weight", "head.bias"}
    freeze_backbone(model, stages, frozen=False)
    assert trainable(model) == before


def test_stages_frozen_meanwhile_stay_frozen() -> None:
    model = ex1(CLASSES, SIZE)
    freeze_backbone(model, 2, frozen=True)
    freeze(model, 2)
    freeze_backbone(model, 2, frozen=False)
    assert trainable(model) == begins_with(model, "conv3.", "bn3.", "conv4.", "bn4.", "head.")


def test_a_backbone_freezes_in_any_network() -> None:
    model = of_torchvision("squeezenet1_1")
    freeze_backbone(model, 0, frozen=True)
    assert trainable(model) == {"classifier.1.weight", "classifier.1.bias"}
    freeze_backbone(model, 0, frozen=False)
    assert trainable(model) == everything(model)


def moved_statistics(model: nn.Module) -> set[str]:
    before = state(model)
    model(images())
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_statistics_of_frozen_stages_stay() -> None:
    model = of_timm("tf_efficientnet_lite0", drop_rate=0.5)
    every = {name for name, _ in model.named_buffers()}
    set_mode(model, 4, backbone=False)
    assert moved_statistics(model) == {
        name for name in every if not name.startswith(("bn1", "blocks.0.", "blocks.1.", "blocks.2."))
    }
    set_mode(model, 4, backbone=True)
    assert not moved_statistics(model)
    assert not torch.equal(model(images()), model(images()))  # the head's dropout is on
    set_mode(model, 0, backbone=True)
    assert not moved_statistics(model)
    model.eval()
    set_mode(model, 0, backbone=False)
    assert moved_statistics(model) == every
    assert all(module.training for module in model.modules())


def test_dropout_within_the_frozen_part_is_off() -> None:
    model = of_torchvision("mobilenet_v3_small")  # its dropout is between the last two linear layers
    found = chain(model)
    assert found is not None
    set_mode(model, 13, backbone=False)
    assert [model.classifier[number].training for number in (0, 2, 3)] == [True, True, True]
    model = with_dropout()
    set_mode(model, 1, backbone=False)
    assert [layer.training for layer in model.children()] == [False] * 3 + [True] * 9
    set_mode(model, 2, backbone=False)
    assert [layer.training for layer in model.children()] == [False] * 6 + [True] * 6
    set_mode(model, 1, backbone=True)
    assert [layer.training for layer in model.children()] == [False] * 6 + [True] * 6


def test_the_modes_of_a_network_that_is_no_chain() -> None:
    model = of_timm("vit_tiny_patch16_224", img_size=SIZE, drop_rate=0.5, drop_path_rate=0.5)
    set_mode(model, 2, backbone=False)
    assert not model.patch_embed.proj.training
    assert not any(module.training for module in model.blocks[0].modules())
    assert all(module.training for module in model.blocks[1].modules())
    assert (model.training, model.blocks.training, model.head.training) == (True, True, True)
    set_mode(model, 0, backbone=True)
    assert not any(module.training for module in model.blocks.modules())
    assert not model.norm.training
    assert (model.training, model.head_drop.training, model.head.training) == (True, True, True)

    model = of_torchvision("shufflenet_v2_x0_5")
    set_mode(model, 0, backbone=True)
    assert not moved_statistics(model)
    assert (model.training, model.fc.training) == (True, True)
    set_mode(model, 0, backbone=False)
    assert all(module.training for module in model.modules())
