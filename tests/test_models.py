"""Networks by name: the report's, with parameter counts and shapes as printed there, and those of the libraries."""

from __future__ import annotations

import io
import re
from typing import Any, Literal

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn

from cifarlab.cli.models import print_networks
from cifarlab.errors import RecipeError
from cifarlab.models import build_model, catalog, channels_last_on_cpu, check_size, outputs, parameter_count
from cifarlab.models.catalog import SMALL
from cifarlab.recipe_sections import Model
from cifarlab.seeds import derive_seed
from command import call


def output_shapes(model: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
        for name, layer in model.named_children()
    ]
    model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return shapes


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same tensors, by name and to the bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# --- the report's -----------------------------------------------------------------------------


def test_ex1_has_the_reports_parameters_and_shapes() -> None:
    model = build_model(Model(name="ex1"), classes=100, size=(32, 32), seed=0)
    assert parameter_count(model) == 266_416
    expected: dict[str, tuple[int, ...]] = {}
    for number, shape in enumerate([(12, 30, 30), (12, 28, 28), (24, 12, 12), (24, 10, 10)], 1):
        expected |= {f"{layer}{number}": shape for layer in ("conv", "bn", "relu")}
    expected |= {"pool": (12, 14, 14), "flatten": (2400,), "head": (100,)}
    assert output_shapes(model, 32) == expected


def test_ex2_has_the_reports_parameters_and_shapes() -> None:
    model = build_model(Model(name="ex2"), classes=100, size=(128, 128), seed=0)
    assert parameter_count(model) == 16_904_548
    expected: dict[str, tuple[int, ...]] = {}
    for number, (channels, side) in enumerate([(16, 128), (32, 64), (64, 32)], 1):
        expected |= {f"{layer}{number}": (channels, side, side) for layer in ("conv", "bn", "relu")}
        expected[f"pool{number}"] = (channels, side // 2, side // 2)
    expected |= {"flatten": (16_384,), "hidden": (1024,), "relu": (1024,), "head": (100,)}
    assert output_shapes(model, 128) == expected


def test_efficientnet_v2_s_with_its_own_head_has_the_reports_parameters() -> None:
    model = build_model(Model(name="efficientnet_v2_s", head="keep"), classes=100, size=(128, 128), seed=0)
    assert parameter_count(model) == 21_458_488
    assert catalog.find("efficientnet_v2_s").parameters == 21_458_488


@pytest.mark.parametrize("name", sorted(SMALL))
def test_other_sizes_work_down_to_the_smallest_and_are_refused_below(name: str) -> None:
    smallest = SMALL[name].minimum_size
    for size in (smallest, smallest + 7, 64):
        model = build_model(Model(name=name), classes=3, size=(size, size), seed=0).eval()
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    for shape in ((smallest - 1, smallest - 1), (64, 32)):
        with pytest.raises(RecipeError, match=f"'{name}' takes square images of at least {smallest} pixels"):
            build_model(Model(name=name), classes=3, size=shape, seed=0)


# --- the libraries' ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ex1", "torchvision:squeezenet1_1", "timm:test_efficientnet"])
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    def build(seed: int) -> nn.Module:
        return build_model(Model(name=name), classes=10, size=(64, 64), seed=seed)

    first = build(1)
    torch.rand(10)  # what was drawn in between must not matter
    assert same(first, build(1))
    assert not same(first, build(2))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("torchvision:mobilenet_v3_small", "new"),
        ("torchvision:squeezenet1_1", "keep"),
        ("timm:test_efficientnet", "new"),
        ("timm:test_resnet", "keep"),
    ],
)
def test_networks_are_initialised_as_their_libraries_do(name: str, head: Literal["new", "keep"]) -> None:
    model = build_model(Model(name=name, head=head), classes=7, size=(64, 64), seed=3)
    library, _, architecture = name.partition(":")
    classes: dict[str, Any] = {"num_classes": 7} if head == "new" else {}
    torch.manual_seed(derive_seed(3, "init"))
    if library == "timm":
        reference = timm.create_model(architecture, **classes)
    else:
        reference = torchvision.models.get_model(architecture, weights=None, **classes)
    assert same(model, reference)
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7 if head == "new" else 1000)


def test_a_head_to_keep_has_enough_outputs() -> None:
    keep = Model(name="timm:test_efficientnet", head="keep")
    assert outputs(keep, 1000) == outputs(keep, 10) == 1000
    assert outputs(Model(name="timm:test_efficientnet"), 1001) == 1001
    with pytest.raises(RecipeError, match=r"'timm:test_efficientnet' has 1,000 outputs, too few for 1,001 classes"):
        build_model(keep, classes=1001, size=(64, 64), seed=0)


@pytest.mark.parametrize("name", ["ex1", "ex2", "timm:vit_small_patch14_dinov2"])
def test_a_network_without_a_head_of_its_own_has_none_to_keep(name: str) -> None:
    with pytest.raises(RecipeError, match=f"model.head: '{name}' has no head of its own to keep; set it to new"):
        outputs(Model(name=name, head="keep"), 10)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:test_vit", (64, 64)),  # at home with 160x160
        ("timm:deit_tiny_patch16_224", (64, 64)),  # made for one size, which can be chosen
        ("timm:test_vit", (96, 64)),
        ("timm:test_efficientnet", (40, 56)),
        ("torchvision:mobilenet_v3_small", (32, 48)),
        ("torchvision:googlenet", (64, 64)),  # gives more than logits where it has auxiliary heads
    ],
)
def test_networks_take_other_sizes_where_they_can(name: str, size: tuple[int, int]) -> None:
    section = Model(name=name)
    check_size(section, size)
    model = build_model(section, classes=5, size=size, seed=0)
    assert model.train()(torch.rand(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("torchvision:alexnet", (32, 32), r"can't take images of 32x32 \(.+\); 64x64 works: set train.resolution=64"),
        ("torchvision:vit_b_32", (50, 50), r"can't take images of 50x50 \(.+\); 64x64 works"),
        ("torchvision:vit_b_32", (64, 32), r"can't take images of 64x32 \(.+\); 32x32 works"),
        ("timm:test_vit", (50, 50), r"can't take images of 50x50 \(.+\); 64x64 works"),
        ("torchvision:maxvit_t", (96, 96), r"can't take images of 96x96 \(.+\); 224x224 works"),
        ("timm:samvit_base_patch16", (8, 8), r"can't take images of 8x8 \(.+\); "),
    ],
)
def test_sizes_that_a_network_cannot_take_are_refused_with_one_that_it_can(
    name: str, size: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=f"model.name '{name}' {sentence}"):
        check_size(Model(name=name), size)


def test_what_gives_no_logits_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'timm:qwen3_vit_88m_enc' is no classifier: it gives something else than"):
        check_size(Model(name="timm:qwen3_vit_88m_enc"), (32, 32))


def test_a_network_made_for_one_size_is_made_for_the_asked_one() -> None:
    for name, side in (("torchvision:maxvit_t", 448), ("torchvision:vit_b_32", 96), ("timm:maxvit_tiny_tf_384", 128)):
        check_size(Model(name=name), (side, side))


@pytest.mark.parametrize(
    ("name", "sides", "sentence"),
    [
        ("ex2", (128, 96), "it can't see 96x96 and 128x128; give train.resolution and evaluate.resolution one side"),
        ("torchvision:vit_b_32", (64, 64, 96), "it can't see 96x96 and 64x64"),
        ("timm:vit_tiny_patch16_224", (64, 96), "it can't see 96x96 and 64x64"),
    ],
)
def test_a_network_made_for_one_size_is_refused_for_several(name: str, sides: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' is made for one size of images: {sentence}"):
        check_size(Model(name=name), *((side, side) for side in sides))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_v2_s", "timm:test_vit"])
def test_a_network_for_any_size_is_taken_for_several(name: str) -> None:
    check_size(Model(name=name), (128, 128), (64, 64), (96, 96))


def test_the_smallest_of_several_sizes_is_looked_at_too() -> None:
    with pytest.raises(RecipeError, match=r"can't take images of 32x32 \(.+\); 64x64 works"):
        check_size(Model(name="torchvision:alexnet"), (128, 128), (32, 32))


def test_looking_at_sizes_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    catalog._refusal.cache_clear()
    for name in ("torchvision:regnet_y_400mf", "timm:test_vit"):  # the first one can't be built without memory
        check_size(Model(name=name), (64, 64))
    assert torch.equal(torch.get_rng_state(), before)


def test_all_but_ex1_are_faster_with_channels_last() -> None:
    names = ("ex1", "ex2", "efficientnet_lite0", "timm:test_resnet", "torchvision:squeezenet1_1")
    assert [channels_last_on_cpu(Model(name=name)) for name in names] == [False, True, True, True, True]


# --- names ------------------------------------------------------------------------------------


def test_our_names_are_the_libraries_networks() -> None:
    assert catalog.find("efficientnet_v2_s").architecture == "efficientnet_v2_s"  # type: ignore[attr-defined]
    assert catalog.find("efficientnet_lite0").architecture == "tf_efficientnet_lite0"  # type: ignore[attr-defined]


def test_every_classifier_of_the_libraries_has_a_name() -> None:
    theirs = torchvision.models.list_models(module=torchvision.models)
    assert [catalog.find(name).name for name in catalog.torchvision_names()] == [f"torchvision:{n}" for n in theirs]
    assert len(theirs) > 70 and "torchvision:fcn_resnet50" not in catalog.torchvision_names()
    assert len(catalog.timm_names()) == len(timm.list_models()) > 1000


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("ex3", r"did you mean 'ex[12]'\?"),
        ("efficientnet-lite0", r"did you mean 'efficientnet_lite0'\?"),
        ("resnet18", r"did you mean 'torchvision:resnet18'\?"),
        ("test_vit9", r"did you mean 'timm:test_vit\d?'\?"),
        ("torchvision:ResNet18", r"did you mean 'torchvision:resnet18'\?"),
        ("timm:resnet50.a1_in2k", r"did you mean 'timm:resnet50.a1_in1k'\?"),
        ("timm:vit_small_patch16_224_in21k", r"did you mean 'timm:vit_small_patch16_224'\?"),  # a name of old
        ("hf-hub:timm/resnet18.a1_in1k", r"did you mean 'timm:resnet18.a1_in1k'\?"),
        ("timm:", "'cifarlab models' lists them"),
        ("", "'cifarlab models' lists them"),
        ("torchvision:fcn_resnet50", "did you mean"),
    ],
)
def test_an_unknown_network_is_named_with_the_nearest(name: str, advice: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown model.name '{re.escape(name)}'; {advice}"):
        build_model(Model(name=name), classes=10, size=(32, 32), seed=0)


# --- cifarlab models --------------------------------------------------------------------------


def listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Run `cifarlab models`: its exit code and what it prints."""
    code, out, err = call(capsys, monkeypatch, "models", *arguments)
    return code, out + err


def rows(text: str) -> dict[str, list[str]]:
    """The table's rows by name; the weights' cell is the last."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 4 and line[0] != "name"}


def test_the_list_has_our_names_and_torchvisions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = listed(capsys, monkeypatch)
    table = rows(text)
    assert code == 0
    assert list(table) == [*catalog.OWN_NAMES, *catalog.torchvision_names()]
    assert table["ex1"] == ["50,326", "any", "none"]  # 266,416 - 90 x (2400 + 1)
    assert table["efficientnet_lite0"] == ["4,652,008", "224", "installed package"]
    assert table["torchvision:vit_h_14"][:2] == ["633,470,440", "518"]
    assert f"and {len(timm.list_models()):,} networks of timm: 'cifarlab models timm:' lists them" in text


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("Squeezenet", {"torchvision:squeezenet1_0", "torchvision:squeezenet1_1"}),
        ("timm:test_vit?", {f"timm:test_vit{number}" for number in (2, 3, 4)}),
        ("*:test_vit", {"timm:test_vit"}),
        ("timm:test_resnet", {"timm:test_resnet"}),
        ("timm:test_resnet.*", {"timm:test_resnet.r160_in1k"}),
        ("ex[12]", {"ex1", "ex2"}),
    ],
)
def test_a_pattern_chooses_among_all_names(
    pattern: str, names: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = listed(capsys, monkeypatch, pattern)
    assert code == 0 and set(rows(text)) == names


def test_parameters_and_images_are_the_networks_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = listed(capsys, monkeypatch, "timm:test_vit")
    reference = sum(parameter.numel() for parameter in timm.create_model("test_vit").parameters())
    assert rows(text)["timm:test_vit"][:2] == [f"{reference:,}", "160"]


def test_no_match_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = listed(capsys, monkeypatch, "resnet5x")
    assert (code, text) == (
        2,
        "cifarlab: no network's name matches 'resnet5x'; did you mean 'torchvision:resnet50'?\n",
    )


def test_the_table_fits_a_plain_terminal() -> None:
    def lines(width: int) -> list[str]:
        output = io.StringIO()
        console = Console(file=output, width=width, highlight=False, soft_wrap=True)
        print_networks(console, ["torchvision:vit_h_14", "timm:vit_small_patch16_rope_mixed_ape_224.naver_in1k"])
        return output.getvalue().splitlines()

    narrow = lines(80)
    assert max(map(len, narrow)) <= 80
    assert any("633,470,440" in line and "download" in line for line in narrow)
    assert any("Hub: timm/vit_small" in line for line in lines(160))
