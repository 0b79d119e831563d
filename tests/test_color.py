"""Each operation gives what torchvision's function gives for each image alone, with the image's own draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from cifarlab.data import color
from cifarlab.data.color import BINS, JITTER, OPERATIONS, apply_policy, color_jitter, cutout, erasing, magnitudes

POLICIES: dict[Literal["trivial_augment", "rand_augment"], Any] = {
    "trivial_augment": v2.TrivialAugmentWide(),
    "rand_augment": v2.RandAugment(),
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def hard_images() -> Tensor:
    """(9, 3, 6, 8): noise, and where operations may divide by 0 or draw lines: greys, primaries, ties, few levels."""
    images = uniform(9, 3, 6, 8)
    images[1] = 0.0
    images[2] = 1.0
    images[3] = images[3, :1]
    images[4] = images[4].round()
    images[5, 1] = images[5, 0]
    images[6, 2] = images[6, 1]
    images[7] = (images[7] * 255).round() / 255
    images[8, 0] = 0.25
    return images


# --- single operations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (color.brightness, V.adjust_brightness, [0.0, 0.3, 1.0, 1.7, 2.0]),
        (color.contrast, V.adjust_contrast, [0.0, 0.3, 1.0, 1.7, 2.0]),
        (color.saturation, V.adjust_saturation, [0.0, 0.3, 1.0, 1.7, 2.0]),
        (color.sharpness, V.adjust_sharpness, [0.0, 0.3, 1.0, 1.7, 2.0]),
        (color.hue, V.adjust_hue, [-0.5, -0.31, 0.0, 1 / 3, 0.5]),
        (color.posterize, V.posterize, [1, 2, 4, 7, 8]),
        (color.solarize, V.solarize, [0.0, 0.2, 14 / 15, 0.99, 1.0]),
        (color.autocontrast, lambda image, _: V.autocontrast(image), [0.0]),
        (color.equalize, lambda image, _: V.equalize(image), [0.0]),
    ],
)
def test_photometric_operations_equal_torchvision(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], amounts: list[float]
) -> None:
    images, amount = hard_images().repeat(len(amounts), 1, 1, 1), [each for each in amounts for _ in range(9)]
    before = images.clone()
    output = ours(images, torch.tensor(amount))
    expected = torch.stack([theirs(image, each) for image, each in zip(images, amount, strict=True)])
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
    assert torch.equal(images, before), "the images that came in were changed"


def test_sharpness_leaves_images_without_an_inside() -> None:
    images = uniform(2, 3, 2, 5)
    assert torch.equal(color.sharpness(images, torch.tensor([0.0, 2.0])), images)


# --- policies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(32, 32), (20, 30)])
def test_strengths_are_torchvisions(policy: Literal["trivial_augment", "rand_augment"], size: tuple[int, int]) -> None:
    table = magnitudes(policy, size)
    space = POLICIES[policy]._AUGMENTATION_SPACE
    assert list(OPERATIONS) == list(space)
    for number, (strengths, signed) in enumerate(space.values()):
        expected = strengths(BINS, *size)
        expected = torch.zeros(BINS) if expected is None else expected.float()
        assert torch.equal(table[0, number], expected)
        assert torch.equal(table[1, number], -expected if signed else expected)


def torchvision_operation(image: Tensor, name: str, magnitude: float) -> Tensor:
    """What torchvision's policies do with one image, nearest and with black outside, their defaults."""
    policy = v2.TrivialAugmentWide()
    output: Tensor = policy._apply_image_or_video_transform(
        image, name, magnitude, interpolation=policy.interpolation, fill=policy._fill
    )
    return output


def nudged(image: Tensor, name: str, magnitude: float, pixels: tuple[float, ...]) -> Tensor:
    """Sheared or rotated as by torchvision's policies, and then moved by a fraction of a pixel."""
    slope = math.degrees(math.atan(magnitude))
    shear = {"ShearX": [slope, 0.0], "ShearY": [0.0, slope], "Rotate": [0.0, 0.0]}[name]
    angle, center = (-magnitude, None) if name == "Rotate" else (0.0, [0, 0])
    output: Tensor = V.affine(image, angle, list(pixels), 1.0, shear, center=center)
    return output


def cells(operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """Draws (..., 3) in the middle of what stands for an operation, bin and sign."""
    return torch.stack([(operation + 0.5) / 14, (level + 0.5) / 31, 0.75 - 0.5 * negative], -1)


@pytest.mark.parametrize(
    ("policy", "size"), [("trivial_augment", (32, 32)), ("trivial_augment", (10, 15)), ("rand_augment", (14, 14))]
)
def test_every_operation_at_every_strength_equals_torchvision(
    policy: Literal["trivial_augment", "rand_augment"], size: tuple[int, int]
) -> None:
    operation, level, negative = torch.cartesian_prod(torch.arange(14), torch.arange(31), torch.arange(2)).unbind(1)
    images = uniform(len(operation), 3, *size)
    table = magnitudes(policy, size)
    output = apply_policy(images, cells(operation, level, negative)[:, None], table, None)
    names = list(OPERATIONS)
    for number, image in enumerate(images):
        name, magnitude = names[operation[number]], table[negative[number], operation[number], level[number]].item()
        expected = torchvision_operation(image, name, magnitude)
        same = (output[number] - expected).abs() < 2e-6
        if name in ("ShearX", "ShearY", "Rotate"):
            # Half-way between two pixels torchvision takes either, by its rounding errors; nudged, it takes each.
            for nudge in itertools.product((-1e-3, 1e-3), repeat=2):
                same |= output[number] == nudged(image, name, magnitude, nudge)
        assert same.all(), f"{name} {magnitude}"


def test_half_way_positions_take_the_left_or_upper_pixel() -> None:
    images = uniform(1, 3, 8, 8)
    turned = color.rotate(images, torch.tensor([45.0]))
    # The pixels of one diagonal come from the middle column, 3.5; those of the other from the middle row.
    for step, place in enumerate([-0.5, 0.5]):
        row = math.floor(3.5 + math.sqrt(2) * place + 0.5)
        assert torch.equal(turned[0, :, 3 + step, 3 + step], images[0, :, row, 3])
        assert torch.equal(turned[0, :, 4 - step, 3 + step], images[0, :, 3, row])


def test_rand_augment_replayed_with_torchvision() -> None:
    images, draws, table = uniform(60, 3, 16, 16), uniform(60, 3, 3, seed=1), magnitudes("rand_augment", (16, 16))
    before = images.clone()
    output = apply_policy(images, draws, table, 9)
    names, space = list(OPERATIONS), v2.RandAugment()._AUGMENTATION_SPACE
    for image, own, found in zip(images, draws, output, strict=True):
        for which, _, sign in own.tolist():
            name = names[int(which * 14)]
            strengths, signed = space[name]
            of_bins = strengths(31, 16, 16)
            magnitude = 0.0 if of_bins is None else float(of_bins[9])
            image = torchvision_operation(image, name, -magnitude if signed and sign < 0.5 else magnitude)
        torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    assert torch.equal(images, before), "the images that came in were changed"


def test_the_ends_of_the_draws_are_the_first_and_last_operation_and_strength() -> None:
    images, table = uniform(3, 3, 8, 8), magnitudes("trivial_augment", (8, 8))
    most = 1 - 2**-24
    solarize = (list(OPERATIONS).index("Solarize") + 0.5) / 14
    draws = torch.tensor([[[0.0, most, 0.0]], [[most, 0.0, 0.0]], [[solarize, most, 0.0]]])
    output = apply_policy(images, draws, table, None)
    assert torch.equal(output[0], images[0])
    assert torch.equal(output[1], V.equalize(images[1]))
    torch.testing.assert_close(output[2], 1 - images[2])


# --- colour jitter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans", [(0.4, 0.5, 0.6, 0.2), (1.0, 1.0, 1.0, 0.5), (0.0, 0.7, 0.0, 0.1), (0.0, 0.0, 0.8, 0.0)]
)
def test_color_jitter_replayed_with_torchvision(spans: tuple[float, float, float, float]) -> None:
    images, draws = uniform(40, 3, 9, 7), uniform(40, 8, seed=1)
    before = images.clone()
    output = color_jitter(images, draws, spans)
    functions = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    orders = set()
    for image, own, found in zip(images, draws.tolist(), output, strict=True):
        order = sorted((n for n in range(4) if spans[n]), key=lambda n: own[4 + n])
        orders.add(tuple(order))
        for number in order:
            low, high = (-spans[3], spans[3]) if number == 3 else (max(0, 1 - spans[number]), 1 + spans[number])
            image = functions[number](image, low + (high - low) * own[number])
        torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    assert len(orders) > math.factorial(sum(span > 0 for span in spans)) / 2
    assert torch.equal(images, before), "the images that came in were changed"


def test_the_jitters_operations_are_torchvisions_in_name_and_order() -> None:
    assert [operation.__name__ for operation, _ in JITTER] == ["brightness", "contrast", "saturation", "hue"]


# --- an image alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_image_does_not_depend_on_its_batch(memory_format: torch.memory_format) -> None:
    images, draws = uniform(40, 3, 16, 16).contiguous(memory_format=memory_format), uniform(40, 4, 3, seed=2)
    amounts, table = uniform(40, 8, seed=3), magnitudes("trivial_augment", (16, 16))

    def augmented(chosen: slice) -> Tensor:
        output = apply_policy(images[chosen], draws[chosen], table, None)
        assert output.is_contiguous(memory_format=memory_format)
        return color_jitter(output, amounts[chosen], (0.4, 0.4, 0.4, 0.1))

    together = augmented(slice(None))
    alone = torch.cat([augmented(slice(number, number + 1)) for number in range(40)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together[11:30], augmented(slice(11, 30)), atol=1e-6, rtol=0)


# --- blanked rectangles -----------------------------------------------------------------------------

draw = st.floats(0, 1, exclude_max=True, width=32)


@given(draws=st.tuples(draw, draw), side=st.integers(1, 30), height=st.integers(1, 20), width=st.integers(1, 20))
def test_cutout_blanks_a_square_around_a_pixel(draws: tuple[float, float], side: int, height: int, width: int) -> None:
    (found,) = cutout(torch.tensor([draws]), side, (height, width))[0]
    # In float32, as the draws are: 0.9 of 10 is 9 there.
    row, column = (int(np.float32(draw) * np.float32(size)) for draw, size in zip(draws, (height, width), strict=True))
    expected = torch.zeros(height, width, dtype=torch.bool)
    for i in range(row - side // 2, row - side // 2 + side):
        for j in range(column - side // 2, column - side // 2 + side):
            if 0 <= i < height and 0 <= j < width:
                expected[i, j] = True
    assert torch.equal(found, expected)


@given(draws=st.tuples(draw, draw, draw, draw, draw), height=st.integers(1, 40), width=st.integers(1, 40))
def test_erasing_blanks_a_rectangle_smaller_than_the_image(draws: tuple[float, ...], height: int, width: int) -> None:
    (found,) = erasing(torch.tensor([draws]), 0.5, (height, width))[0]
    rows, columns = found.any(1), found.any(0)
    assert torch.equal(found, rows[:, None] & columns), "not a rectangle"
    for line in (rows, columns):
        assert line.sum() < len(line) and line.diff().sum() <= 2, "all of a side, or in pieces"
    if draws[0] >= 0.5:
        assert not found.any()


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32)])
def test_erasing_by_hand(height: int, width: int) -> None:
    draws = uniform(300, 5)
    # The largest and longest ones, cut to the image.
    draws[:2] = torch.tensor([[0.0, 0.999, 0.0, 0.5, 0.5], [0.0, 0.999, 0.999, 0.5, 0.5]])
    found = erasing(draws, 0.7, (height, width))
    for own, mask in zip(draws.double().tolist(), found, strict=True):
        image = torch.ones(1, height, width)
        area = (0.02 + (0.33 - 0.02) * own[1]) * height * width
        ratio = math.exp(math.log(0.3) + own[2] * (math.log(3.3) - math.log(0.3)))
        rows, columns = min(height - 1, round(math.sqrt(area * ratio))), min(width - 1, round(math.sqrt(area / ratio)))
        if own[0] < 0.7:
            top, left = int(own[3] * (height - rows + 1)), int(own[4] * (width - columns + 1))
            image = V.erase(image, top, left, rows, columns, torch.zeros(1, 1, 1))
        assert torch.equal(mask, image == 0)


def test_erasing_areas_and_how_often_a_side_is_cut() -> None:
    side, draws = 32, uniform(50_000, 5)
    shares = erasing(draws[:5000], 1.0, (side, side)).float().mean((1, 2, 3))
    # Uniform from 2 to 33 %: mean 17.5 %, deviation 8.9 %; five deviations of the mean are 0.63 %.
    assert abs(shares.mean().item() - 0.175) < 0.0063
    area, ratio = 0.02 + 0.31 * draws[:, 1], (math.log(0.3) + math.log(11) * draws[:, 2]).exp()
    cut = (torch.maximum(area * ratio, area / ratio).sqrt() * side).round() >= side
    # 6 in 1,000, with a deviation of 0.35.
    assert abs(cut.float().mean().item() - 0.006) < 0.0015
