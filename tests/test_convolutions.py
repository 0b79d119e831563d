"""Convolutions that are computed in other ways than torch's are what torch's are, and so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab import convolutions, numerics
from cifarlab.convolutions import ConvolutionMode, fourier_suits, products, suits, transforms
from cifarlab.models.racing import racing
from cifarlab.recipe_sections import NumericsChoice

CPU = torch.device("cpu")
BF16 = NumericsChoice(dtype="bfloat16", channels_last=True)
FOURIER = ConvolutionMode(depthwise=False, fourier=True)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- 3x3 of small maps ---------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is convolved by way of frequencies from now on."""
    taken: list[Tensor] = []
    apply = convolutions._Fourier.apply

    def watching(images: Tensor, weight: Tensor) -> Tensor:
        taken.append(images)
        output: Tensor = apply(images, weight)
        return output

    monkeypatch.setattr(convolutions._Fourier, "apply", watching)
    return taken


def with_gradients(images: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor) -> list[Tensor]:
    """Of `F.conv2d` with padding 1, in whatever mode it is called."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (images, weight, bias) if tensor is not None]
    output = F.conv2d(leaves[0], leaves[1], leaves[2] if bias is not None else None, padding=1)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (4, 7), (6, 3)])
def test_products_of_frequencies_are_the_convolution_and_its_gradients(
    size: tuple[int, int], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watched(monkeypatch)
    images, weight, bias = random(3, 80, *size), random(90, 80, 3, 3, seed=1), random(90, seed=2)
    if channels_last:
        images, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (images, weight))
    upstream = random(3, 90, *size, seed=3)
    expected = with_gradients(images, weight, bias, upstream)
    assert not taken
    with FOURIER:
        found = with_gradients(images, weight, bias, upstream)
    assert [tensor.shape for tensor in taken] == [images.shape]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    images, weight = random(3, 60, 4, 4), random(70, 60, 3, 3, seed=1).requires_grad_()
    with FOURIER:
        output = F.conv2d(images, weight, padding=1)
    (gradient,) = torch.autograd.grad(output.sum(), [weight])
    (expected,) = torch.autograd.grad(F.conv2d(images, weight, padding=1).sum(), [weight])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_rounding_to_bf16_is_small_in_outputs_and_gradients(size: int) -> None:
    images, weight = random(20, 64, size, size).relu(), random(96, 64, 3, 3, seed=1) / 24
    images, weight = images.bfloat16().double(), weight.bfloat16().double()
    upstream = random(20, 96, size, size, seed=2).bfloat16().double()
    expected = with_gradients(images, weight, None, upstream)
    with FOURIER:
        found = with_gradients(images.bfloat16(), weight.bfloat16(), None, upstream.bfloat16())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # bf16 rounds to 8 bits, by up to 0.4 %; here values are rounded three times, two of them as frequencies.
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_a_map_of_7x7_takes_94_products_and_one_of_3x3_takes_22() -> None:
    # 8 x 8 frequencies: 4 that are real, 30 pairs of three; 4 x 4: 4 and 6; 5 x 5: only the mean is real, and 12 pairs.
    assert (products(7, 7), products(3, 3), products(4, 4)) == (4 + 90, 4 + 18, 1 + 36)
    # Periods of 5 and 8: real are the frequencies 0 and 0, and 0 and 4.
    assert products(4, 7) == 2 + 3 * 19
    for height, width in ((7, 7), (3, 3), (4, 4), (4, 7), (2, 2)):
        rows, places = products(height, width), height * width
        shapes = [tuple(matrix.shape) for matrix in transforms(height, width, torch.float32)]
        assert shapes == [(rows, places), (rows, 9), (places, rows)]


def test_transforms_that_were_first_needed_for_inference_serve_training_too() -> None:
    transforms.cache_clear()
    layer = nn.Conv2d(60, 60, 3, padding=1)
    with torch.inference_mode(), FOURIER:
        layer(random(2, 60, 4, 4, dtype=torch.float32))
    with FOURIER:
        output = layer(random(2, 60, 4, 4, dtype=torch.float32).requires_grad_())
    torch.autograd.backward(output.sum())
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "gains"),
    [
        (7, 128, 128, True),
        (3, 64, 64, True),
        (9, 128, 128, True),
        (9, 32, 128, False),  # measured: 33 instead of 28 ms
        (15, 32, 128, False),  # 172 instead of 63 ms
        (7, 3, 64, False),
        (1, 512, 512, False),
    ],
)
def test_the_products_that_are_spared_decide(size: int, inputs: int, outputs: int, gains: bool) -> None:
    assert suits(torch.Size([2, inputs, size, size]), torch.Size([outputs, inputs, 3, 3])) is gains


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=0),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 1, padding=1),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.Conv2d(64, 64, (3, 1), padding=1),
    ],
)
def test_other_convolutions_are_torchs_own(layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions._Fourier, "apply", None)
    images = random(2, 64, 5, 5, dtype=torch.float32)
    with FOURIER:
        assert torch.equal(layer(images), F.conv2d(images, layer.weight, layer.bias, *places(layer), layer.groups))
        assert layer(images[0]).ndim == 3


def places(layer: nn.Conv2d) -> tuple[Any, Any, Any]:
    return layer.stride, layer.padding, layer.dilation


def test_whether_a_network_has_such_convolutions_is_found_without_computing_and_leaves_it_as_it_is() -> None:
    model = racing(10, 32, (32, 64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    without = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    state = torch.random.get_rng_state()
    assert fourier_suits(model, (2, 3, 32, 32))
    assert not fourier_suits(model, (2, 3, 200, 200))
    assert not fourier_suits(without, (2, 3, 2, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_choice_of_it_is_in_force_in_training_and_evaluation_alike(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = numerics.chosen(CPU, NumericsChoice(dtype=dtype, channels_last=True, fourier=True))
    taken = watched(monkeypatch)
    layer, images = nn.Conv2d(60, 60, 3, padding=1), random(2, 60, 7, 7, dtype=torch.float32)
    for context in (way.training, way.evaluating):
        with context(CPU):
            output = layer(images)
        torch.testing.assert_close(output.float(), layer(images), atol=0.02, rtol=0.02)
    assert [tensor.dtype for tensor in taken] == [getattr(torch, dtype)] * 2
    with numerics.chosen(CPU, BF16).training(CPU):
        layer(images)
    assert len(taken) == 2


# --- depthwise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        ((3, 3), {}),
        ((3, 3), {"padding": 1}),
        ((3, 3), {"stride": 2, "padding": 1}),
        ((3, 3), {"padding": (2, 1), "dilation": 2}),
        ((5, 5), {"padding": 2}),
        ((5, 5), {"stride": 2, "padding": 2}),
        ((5, 5), {"stride": 3}),
        ((5, 5), {"padding": 4, "dilation": 2}),
        ((2, 4), {"padding": (0, 3)}),
        ((7, 7), {"stride": (1, 2), "padding": 3}),
        ((1, 8), {"stride": (3, 1), "padding": (0, 1)}),
    ],
)
def test_a_depthwise_convolution_in_bf16_has_the_gradients_of_fp32_at_the_rounded_images(
    kernel: tuple[int, int], settings: dict[str, Any], channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.randn(3, 6, 13, 11, generator=generator), torch.randn(6, 1, *kernel, generator=generator)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    way = numerics.chosen(CPU, BF16)
    ours, own = images.clone().requires_grad_(), weight.clone().requires_grad_()
    with way.training(CPU):
        output = F.conv2d(ours, own, groups=6, **settings)
    assert output.dtype == torch.bfloat16
    with way.evaluating(CPU):
        assert torch.equal(output, F.conv2d(images, weight, groups=6, **settings))
    upstream = torch.randn(output.shape, generator=generator).bfloat16()
    torch.autograd.backward(output, upstream)
    rounded, wide = images.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    torch.autograd.backward(F.conv2d(rounded, wide, groups=6, **settings), upstream.double())
    for gradient, reference in ((ours.grad, rounded.grad), (own.grad, wide.grad)):
        assert gradient is not None and reference is not None
        # bf16 rounds to 8 bits: by up to 0.4 %; where it is emulated, wide kernels' parts are rounded before their sum.
        assert (gradient.double() - reference).norm() < 0.008 * reference.norm()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_other_convolutions_are_left_as_they_are(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(6, 6, 3, padding="same" if groups == 6 else 1, groups=groups)
    images = torch.randn(2, 6, 8, 8, generator=generator)
    way = numerics.chosen(CPU, BF16)
    results = []
    for context in (way.training, way.evaluating):
        layer.zero_grad()
        with context(CPU):
            output = layer(images)
        torch.autograd.backward(output.float().square().sum())
        gradients = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
        results.append([output.detach(), *gradients])
        assert len(gradients) == 2
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_depthwise_layer_keeps_its_bias_and_an_unbatched_image_its_shape() -> None:
    layer = torch.nn.Conv2d(6, 6, 3, groups=6)
    images = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    with numerics.chosen(CPU, BF16).training(CPU):
        output, one = layer(images), layer(images[0])
    assert one.shape == output.shape[1:]
    torch.testing.assert_close(output.float(), layer(images), atol=0.05, rtol=0.02)
    torch.autograd.backward(output.float().sum())
    assert layer.bias is not None and layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((6,), 2.0 * 6 * 6))
