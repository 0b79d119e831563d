"""The arithmetic of training: against formulas by hand, and without a trace in the run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifarlab import flops
from cifarlab.flops import of_recipe, per_image
from cifarlab.models import build_model
from cifarlab.models.chain import chain, freeze
from cifarlab.models.racing import WhiteningConv, racing
from cifarlab.recipe import Recipe
from cifarlab.recipe_sections import Model
from short_runs import COUNTED, make_dataset, run, without_times


@pytest.fixture(autouse=True)
def nothing_was_counted_before() -> None:
    COUNTED.clear()


TRAIN = 160  # of the 200 images of `make_dataset`, with 0.2 for validation


def convolution(side: int, inputs: int, outputs: int, kernel: int, groups: int = 1) -> int:
    """Multiply-adds count as two; side: of the output."""
    return 2 * side * side * outputs * (inputs // groups) * kernel * kernel


def ex1_layers(classes: int, size: int = 32) -> list[int]:
    """The forward of EX-1's five layers: 5x5 convolutions with padding 1, a pool after the second, the head."""
    sides = [size - 2, size - 4, (size - 4) // 2 - 2, (size - 4) // 2 - 4]
    widths = [3, 12, 12, 24, 24]
    convolutions = [convolution(side, widths[n], widths[n + 1], kernel=5) for n, side in enumerate(sides)]
    return [*convolutions, 2 * 24 * sides[-1] ** 2 * classes]


def trained(layers: list[int], frozen: int = 0) -> int:
    """Forward, gradient of the weight, gradient of the input; not the last for the first layer that trains."""
    return sum(layers[:frozen]) + 2 * layers[frozen] + 3 * sum(layers[frozen + 1 :])


def racing_layers(side: int = 32) -> list[int]:
    """The forward of the speedruns' network: whitening, six 3x3 convolutions (pools after the first of two), head."""
    side -= 1
    layers = [convolution(side, 3, 24, kernel=2)]
    channels = 24
    for width in (64, 256, 256):
        layers.append(convolution(side, channels, width, kernel=3))
        side //= 2
        layers.append(convolution(side, width, width, kernel=3))
        channels = width
    return [*layers, 2 * 256 * 10]


def test_ex1() -> None:
    for size in (32, 24):
        model = build_model(Model(name="ex1"), classes=100, size=(size, size), seed=0)
        assert per_image(model, (3, size, size)) == trained(ex1_layers(100, size))


def test_the_racing_network_with_and_without_its_whitening_bias() -> None:
    layers = racing_layers()
    model = racing(10, 32)
    # The filters never train. But their bias does, so the layer after them needs the gradient of its input.
    assert per_image(model, (3, 32, 32)) == layers[0] + 3 * sum(layers[1:])
    for module in model.modules():
        if isinstance(module, WhiteningConv) and module.bias is not None:
            module.bias.requires_grad_(False)
    assert per_image(model, (3, 32, 32)) == trained(layers, frozen=1)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (16, 1), (16, 2)])
def test_grouped_convolutions_are_not_counted_as_dense_ones(groups: int, stride: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, stride, padding=1, groups=groups), nn.Flatten(), nn.LazyLinear(7)
    )
    model(torch.zeros(1, 3, 8, 8))
    side = 8 // stride
    layers = [convolution(8, 3, 16, kernel=1), convolution(side, 16, 16, 3, groups), 2 * 16 * side * side * 7]
    assert per_image(model, (3, 8, 8)) == trained(layers)


def test_transposed_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2))
    # Each value of the input goes to 2x2 places of the 3 channels of its group.
    layers = [convolution(8, 3, 4, kernel=1), 2 * 8 * 8 * 4 * 3 * 2 * 2]
    assert per_image(model, (3, 8, 8)) == trained(layers)


@pytest.mark.parametrize("stages", range(5))
def test_frozen_stages_have_a_forward_alone(stages: int) -> None:
    model = build_model(Model(name="ex1"), classes=4, size=(32, 32), seed=0)
    freeze(model, stages)
    assert per_image(model, (3, 32, 32)) == trained(ex1_layers(4), frozen=stages)
    parts = chain(model)
    assert parts is not None
    assert per_image(parts.front(stages), (3, 32, 32)) == sum(ex1_layers(4)[:stages])


def test_counting_leaves_the_network_and_the_random_state_as_they_were() -> None:
    model = nn.Sequential(build_model(Model(name="ex1"), classes=10, size=(32, 32), seed=0), nn.Dropout(0.5))
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    parameters, generator = list(model.parameters()), torch.get_rng_state()
    per_image(model, (3, 32, 32))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(one is other and one.grad is None for one, other in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())


# --- in a run -----------------------------------------------------------------------------------------


def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[dict[str, Any], Recipe]:
    folder = run(tmp_path, "data.validation=0.2", "evaluate.test=false", *overrides, monkeypatch=monkeypatch)
    return folder.train_log(), folder.recipe()


def planned(recipe: Recipe) -> int:
    """What `cifarlab show` says before the run."""
    model = build_model(recipe.model, classes=4, size=(32, 32), seed=0)
    freeze(model, recipe.model.freeze_stages)
    return of_recipe(recipe, model, 32, TRAIN)


def test_a_run_counts_every_image_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, recipe = counted(tmp_path, monkeypatch, "train.batch_size=48", "train.accumulate=2")
    assert log["flops"] == 3 * TRAIN * trained(ex1_layers(4)) == planned(recipe)
    assert log["flops_per_second"] == pytest.approx(log["flops"] / log["train_time"])


def test_each_resolution_counts_for_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race = ["model={name: racing, widths: [64, 256, 256], whitening_bias: {epochs: 1}}", "train.batch_size=80"]
    log, recipe = counted(tmp_path, monkeypatch, *race, "train.resolution=[[0, 20], [0.5, 24], [0.75, 32]]")
    # Six steps: three at 20, of which two with the bias, two at 24 (0.5 and 0.67 of the run), one at 32.
    small, middle, large = racing_layers(20), racing_layers(24), racing_layers(32)
    head = 2 * 256 * 4 - 2 * 256 * 10
    for layers in (small, middle, large):
        layers[-1] += head
    first = small[0] + 3 * sum(small[1:])
    steps = [first, first, trained(small, 1), trained(middle, 1), trained(middle, 1), trained(large, 1)]
    assert log["flops"] == 80 * sum(steps)
    assert planned(recipe) == pytest.approx(log["flops"], rel=0.1)  # it has half a step more at 24


def test_what_is_frozen_for_a_while_counts_as_it_is_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["model.freeze_backbone.steps=3", "model.freeze_late=[[0.5, 2], [0.9, 3]]", "train.epochs=10"]
    log, recipe = counted(tmp_path, monkeypatch, *settings)
    layers = ex1_layers(4)
    head, whole = 3 * 32, 5 * TRAIN - 3 * 32  # images
    done = head * trained(layers, 4) + whole * trained(layers)
    done += TRAIN * (4 * trained(layers, 2) + trained(layers, 3))
    assert log["flops"] == done == planned(recipe)


@pytest.mark.parametrize("cache", ["float32", "null"])
def test_what_frozen_stages_make_counts_when_it_is_made(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model.freeze_stages=2", f"model.cache={cache}", "augment={flip: random, views: 2}", "train.epochs=5"]
    log, recipe = counted(tmp_path, monkeypatch, *settings)
    layers = ex1_layers(4)
    front = sum(layers[:2])
    made = 5 if cache == "null" else 2  # an epoch for each version
    assert log["flops"] == TRAIN * (5 * (trained(layers, 2) - front) + made * front) == planned(recipe)


def test_counting_changes_no_bit_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = run(tmp_path / "a", "augment.flip=random", monkeypatch=monkeypatch)
    monkeypatch.setattr(flops.TrainingFlops, "total", lambda _: None)
    without = run(tmp_path / "b", "augment.flip=random", monkeypatch=monkeypatch)
    assert counting.train_log()["flops"] and without.train_log()["flops"] is None
    assert without_times(counting.train_log()) == without_times(without.train_log())
    one, other = (folder.load_checkpoint("best.pth")["model"] for folder in (counting, without))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_network_that_can_t_be_counted_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Flatten.forward

    def data_dependent(self: nn.Flatten, features: torch.Tensor) -> torch.Tensor:
        return forward(self, features) if features.sum().item() < 1e9 else features

    monkeypatch.setattr(nn.Flatten, "forward", data_dependent)
    log = run(tmp_path, dataset=make_dataset(), monkeypatch=monkeypatch).train_log()
    assert log["status"] == "finished" and log["flops"] is None and log["flops_per_second"] is None
