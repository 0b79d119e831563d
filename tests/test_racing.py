"""The speedruns' network and optimizer: against formulas by hand, and the properties that they are built for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab.errors import RecipeError
from cifarlab.models import build_model
from cifarlab.models.racing import WhiteningConv, _Maximum, fit_whitening, racing
from cifarlab.numerics import can_compile
from cifarlab.optim import build_optimizer, set_learning_rate
from cifarlab.recipe import load_recipe, make_recipe
from cifarlab.recipe_optimizer import MuonOptimizer
from cifarlab.recipe_sections import Model
from cifarlab.schedule import Values
from short_runs import make_dataset, run
from test_tricks import states
from test_tta import by_hand

SECTION = MuonOptimizer(
    lr=0.1, momentum=0.6, ns_steps=3, rest="sgd", rest_momentum=0.85, rest_decay=0.01, bias_lr=5.0, head_lr=20.0
)


def correlated_images(count: int = 64) -> Tensor:
    """Images whose neighbouring pixels and channels have much in common, as in photographs."""
    noise = torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("nchw,cd->ndhw", noise, torch.tensor([[1.0, 0.8, 0.7], [0.0, 0.4, 0.3], [0.0, 0.0, 0.2]]))
    return F.avg_pool2d(mixed, 3, stride=1)


def network(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    model = racing(classes, 32)
    assert isinstance(model, nn.Sequential)
    return model


def test_whitened_patches_are_uncorrelated_and_of_unit_variance() -> None:
    images = correlated_images()
    convolution = WhiteningConv()
    convolution.fit(images, eps=0.0)
    with torch.no_grad():
        values = F.conv2d(images, convolution.weight).permute(0, 2, 3, 1).reshape(-1, 24)
    moments = values[:, :12].T @ values[:, :12] / len(values)
    torch.testing.assert_close(moments, torch.eye(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(values[:, 12:], -values[:, :12])
    before = convolution.weight.clone()
    convolution.fit(images, eps=1.0)  # keeps directions that hardly vary from being blown up
    assert convolution.weight.abs().max() < before.abs().max()


def test_the_network_is_the_published_one() -> None:
    """Its forward, written down once more, and its parameters counted by hand."""
    model = network()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    assert trained == 24 + convolutions + 2 * (64 + 256 + 256) + 256 * 10
    fit_whitening(model, correlated_images)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    parts = dict(model.named_modules())
    with torch.no_grad():
        model.train()
        x = F.gelu(F.conv2d(images, parts["whiten"].weight, parts["whiten"].bias))
        for number in (1, 2, 3):
            for place in (1, 2):
                x = F.conv2d(x, parts[f"group{number}.conv{place}"].weight, padding=1)
                if place == 1:
                    x = F.max_pool2d(x, 2)
                mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
                x = F.gelu((x - mean) / (variance + 1e-12).sqrt())
        assert x.shape == (3, 256, 3, 3)
        expected = F.max_pool2d(x, 3).flatten(1) @ parts["head"].weight.T / 256
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert parts["head"].weight.std().item() == pytest.approx(1)
    assert parts["group1.norm1"].momentum == pytest.approx(0.4)


def test_a_group_of_three_convolutions_ends_in_a_residual_block() -> None:
    """Its forward, written down once more: airbench96's group. The other group is as it is without."""
    section = Model(name="racing", widths=(16, 8), depths=(3, 2))
    model = build_model(section, classes=7, size=(32, 32), seed=0).train()
    assert model.get_submodule("group2.conv2").weight.shape == (8, 8, 3, 3)
    parts = dict(model.named_modules())
    features = torch.randn(3, 24, 9, 9, generator=torch.Generator().manual_seed(0))

    def normalised(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True, eps=1e-12)

    def convolved(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, parts[f"group1.{name}"].weight, padding=1)

    with torch.no_grad():
        x = F.gelu(normalised(F.max_pool2d(convolved(features, "conv1"), 2)))
        inner = F.gelu(normalised(convolved(x, "residual.conv2")))
        expected = F.gelu(x + normalised(convolved(inner, "residual.conv3")))
        torch.testing.assert_close(parts["group1"](features), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_begin_as_the_identity_on_their_first_channels() -> None:
    convolution = network().get_submodule("group1.conv1")
    features = torch.randn(2, 24, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(convolution(features)[:, :24], features)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_convolutions_of_tiny_maps_are_torchs(shape: tuple[int, int]) -> None:
    """Their values and gradients; a map of 3x2 is torch's own, as a check of the check."""
    convolution = network().get_submodule("group1.conv1").double()
    weight = next(convolution.parameters())
    images = torch.randn(5, 24, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    nn.init.normal_(weight)
    ours, theirs = convolution(images), F.conv2d(images, weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    above = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = (images, weight)
    found, expected = torch.autograd.grad(ours, inputs, above), torch.autograd.grad(theirs, inputs, above)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sizes_and_widths() -> None:
    for side in (20, 24, 28, 32, 40):
        assert network()(torch.randn(2, 3, side, side)).shape == (2, 10)
    wide = build_model(Model(name="racing", widths=(32, 64)), classes=7, size=(32, 32), seed=0)
    assert wide(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert wide.get_submodule("group2.conv2").weight.shape == (64, 64, 3, 3)
    with pytest.raises(RecipeError, match=r"at least 18 pixels a side, not 16x16; set train\.resolution"):
        build_model(Model(name="racing"), classes=7, size=(16, 16), seed=0)
    with pytest.raises(RecipeError, match=r"model\.widths: 'ex1' has fixed widths"):
        build_model(Model(name="ex1", widths=(8, 8)), classes=7, size=(32, 32), seed=0)
    with pytest.raises(RecipeError, match=r"model\.depths: 'ex1' has fixed depths"):
        build_model(Model(name="ex1", depths=(2, 2)), classes=7, size=(32, 32), seed=0)
    with pytest.raises(RecipeError, match=r"model\.depths: 2 numbers for 3 groups \(model\.widths: \[64, 256, 256\]\)"):
        build_model(Model(name="racing", depths=(2, 3)), classes=7, size=(32, 32), seed=0)
    # At the least size two values of a channel are left, which is what BatchNorm needs for one image.
    network().train()(torch.randn(1, 3, 18, 18))


# --- its optimizer -----------------------------------------------------------------------------


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(images), labels))
    optimizer.step()


def test_a_matrix_steps_from_its_fixed_norm_by_an_orthogonal_update_of_the_momentum() -> None:
    model = network()
    optimizer = build_optimizer(SECTION, model)
    weight = model.get_parameter("group2.conv2.weight")
    momentum = torch.zeros_like(weight)
    for step in range(3):
        before = weight.detach().clone()
        one_step(model, optimizer, step)
        assert weight.grad is not None
        momentum = 0.6 * momentum + weight.grad
        wanted = (weight.grad + 0.6 * momentum).flatten(1).double()
        update = -(weight.detach() - before * (16 / before.norm())).flatten(1).double() / 0.1  # √256 = 16
        left, values, right = torch.linalg.svd(wanted, full_matrices=False)
        # In the wanted update's own directions, all of them with about the same strength, whatever it was before.
        strengths = ((left.T @ update) * right).sum(1)
        large = values > 0.1 * values[0]
        assert ((strengths > 0.4) & (strengths < 1.4))[large].all()
        torch.testing.assert_close(update, (left * strengths) @ right, atol=0.02, rtol=0)


def test_the_rest_is_pytorchs_sgd_with_nesterovs_momentum() -> None:
    model, reference = network(), network()
    optimizer = build_optimizer(SECTION, model)
    names = ("whiten.bias", "group1.norm1.bias", "head.weight")
    groups = [
        {"params": [reference.get_parameter(name)], "lr": lr, "weight_decay": 0.01 / lr}
        for name, lr in zip(names, (5.0, 5.0, 20.0), strict=True)
    ]
    plain = torch.optim.SGD(groups, lr=1.0, momentum=0.85, nesterov=True)
    for step in range(3):
        one_step(model, optimizer, step)
        plain.zero_grad()
        for name in names:
            reference.get_parameter(name).grad = model.get_parameter(name).grad
        plain.step()
        for name in names:
            torch.testing.assert_close(model.get_parameter(name), reference.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_airbench94_has_the_published_rates_and_decays() -> None:
    """Its losses are sums over 2,000 images: a rate is 2,000 times as high here, and what decays a step is the same."""
    recipe = load_recipe("airbench94")
    model = build_model(recipe.model, classes=10, size=(32, 32), seed=0)
    optimizer = build_optimizer(recipe.optimizer, model)
    named = {parameter: name for name, parameter in model.named_parameters()}
    found = {named[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert {name: found[name]["lr"] for name in ("whiten.bias", "group3.norm2.bias", "head.weight")} == {
        "whiten.bias": pytest.approx(0.053 * 2000),
        "group3.norm2.bias": pytest.approx(0.053 * 2000),
        "head.weight": pytest.approx(0.67 * 2000),
    }
    for name, group in found.items():
        if not group["use_muon"]:
            assert group["lr"] * group["weight_decay"] == pytest.approx(2e-6 * 2000), name
            assert group["momentum"] == 0.85
    matrices = {name for name, group in found.items() if group["use_muon"]}
    assert matrices == {f"group{g}.conv{c}.weight" for g in (1, 2, 3) for c in (1, 2)}
    assert found["group1.conv1.weight"]["lr"] == 0.24 and found["group1.conv1.weight"]["momentum"] == 0.6
    assert "whiten.weight" not in found and "group1.norm1.weight" not in found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.weight_decay=0.1"], "weight_decay has no effect with rest 'sgd'"),
        (["optimizer.rest=adamw"], "rest_decay is for rest 'sgd'"),
    ],
)
def test_fields_of_the_other_rest_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("airbench94", overrides)


# --- in a run ----------------------------------------------------------------------------------


RACE = [
    "model={name: racing, widths: [16, 16], whitening_bias: {epochs: 1}}",
    "optimizer={name: muon, rest: sgd, lr: 0.24, momentum: 0.6, ns_steps: 3, bias_lr: 2, head_lr: 20}",
    "schedule={name: polynomial, power: 1}",
]


def test_the_whitening_bias_trains_for_its_time_and_then_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_step = ["train.checkpoint_every.steps=1", "train.keep=1000"]
    folder = run(tmp_path, *RACE, *every_step, monkeypatch=monkeypatch)
    found = states(folder)
    per_epoch = len(found) // 3
    biases = [state["model"]["whiten.bias"] for state in found]
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(biases)]
    assert moved == [step < per_epoch - 1 for step in range(len(moved))]
    rates = [next(g["lr"] for g in state["optimizer"]["param_groups"] if g.get("fades")) for state in found]
    assert rates == pytest.approx([2 * max(0.0, 1 - step / per_epoch) for step in range(len(found))])
    filters = [state["model"]["whiten.weight"] for state in found]
    assert all(torch.equal(filters[0], other) for other in filters)
    # They are fitted to the run's own training images.
    images = folder.recipe()
    assert images.train.epochs == 3
    assert folder.train_log()["best_val_accuracy"] > 0.9


def test_without_a_limit_the_whitening_bias_follows_the_schedule() -> None:
    model = network()
    optimizer = build_optimizer(SECTION, model)
    set_learning_rate(optimizer, Values(0.5, None))
    assert {group["lr"] / group["base_lr"] for group in optimizer.param_groups} == {0.5}
    set_learning_rate(optimizer, Values(0.5, None), fading=0.25)
    assert {(group.get("fades", False), group["lr"] / group["base_lr"]) for group in optimizer.param_groups} == {
        (True, 0.25),
        (False, 0.5),
    }


def test_diagonal_is_three_places_mirrored_and_not_of_which_the_middle_counts_as_much_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = make_dataset(noise=0.3)
    folder = run(
        tmp_path,
        "augment={translate: 2, flip: random}",
        "evaluate.tta=diagonal",
        dataset=noisy,
        monkeypatch=monkeypatch,
    )
    log = folder.test_log()
    assert log is not None

    def moved(pixels: Tensor, by: int) -> Tensor:
        """By a pixel down and to the right, or back; mirror images come in."""
        padded = torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect"))
        return padded[:, :, 1 - by : 33 - by, 1 - by : 33 - by]

    views: list[Any] = []
    for by in (0, 0, -1, 1):  # the middle twice
        views.append(lambda pixels, by=by: moved(pixels, by))
        views.append(lambda pixels, by=by: moved(pixels.flip(3), by))
    accuracy, loss, _ = by_hand(folder, views)
    assert log["tta"]["accuracy"] == pytest.approx(accuracy)
    assert log["tta"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_airbench94_is_valid_for_its_dataset() -> None:
    recipe = load_recipe("airbench94").resolved(dataset="cifar10", seed=3)
    again = make_recipe(recipe.to_dict())
    assert again == recipe and again.optimizer == recipe.optimizer


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no compiler here")
def test_the_maximum_s_gradient_is_finite_where_it_is_compiled_in_bf16() -> None:
    tail = nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), _Maximum())
    images = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = []
    for forward in (tail, torch.compile(tail, dynamic=False)):
        features = images.clone().requires_grad_()
        torch.autograd.backward(forward(features).float().square().sum())
        assert features.grad is not None
        gradients.append(features.grad)
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0.05)
