"""The pipeline gives the same pixels as torchvision's v2 transforms for the same random draws."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from cifarlab.data import color
from cifarlab.data.augment import Draws, Pipeline
from cifarlab.data.color import OPERATIONS
from cifarlab.errors import RecipeError
from cifarlab.recipe_sections import Augment
from cifarlab.seeds import derive_seed

CPU = torch.device("cpu")
MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
INTERPOLATION: dict[str, Any] = {"bilinear": V.InterpolationMode.BILINEAR, "bicubic": V.InterpolationMode.BICUBIC}


def pipeline(**changes: Any) -> Pipeline:
    """A pipeline for 32 x 32 images; fields of the recipe's section `augment` are given by their own names."""
    augment = Augment(**{name: changes.pop(name) for name in list(changes) if name in Augment.model_fields})
    settings: dict[str, Any] = {
        "size": (32, 32),
        "resolution": None,
        "reference": None,
        "interpolation": "bilinear",
        "augment": augment,
        "mean": MEAN,
        "std": STD,
        "device": CPU,
    }
    return Pipeline(**(settings | changes))


def images(count: int = 5, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def torchvision_reference(
    image: Tensor, *, resolution: int | None, interpolation: str, padding: int, crop: tuple[int, int], mirrored: bool
) -> Tensor:
    """Resize, pad, crop, flip and normalise one image on float32, as v2.Compose would."""
    picture = V.to_dtype(image, torch.float32, scale=True)
    if resolution:
        picture = V.resize(
            picture, [resolution, resolution], interpolation=INTERPOLATION[interpolation], antialias=True
        )
    height, width = picture.shape[-2:]
    picture = V.crop(V.pad(picture, [padding] * 4), *crop, height, width)
    if mirrored:
        picture = V.horizontal_flip(picture)
    normalised: Tensor = V.normalize(picture, list(MEAN), list(STD))
    return normalised


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resolution", [None, 128, 24, 47])
@pytest.mark.parametrize("padding", [0, 4, 16])
def test_training_images_equal_torchvision_v2(
    memory_format: torch.memory_format,
    interpolation: Literal["bilinear", "bicubic"],
    resolution: int | None,
    padding: int,
) -> None:
    pixels, samples = images(), torch.tensor([3, 0, 4, 1, 2])
    ours = pipeline(
        resolution=resolution,
        interpolation=interpolation,
        crop_padding=padding,
        flip="random",
        memory_format=memory_format,
    )
    draws = ours.draw(seed=7, epoch=2, count=5)
    output = ours.train(pixels, samples, draws)
    assert draws.flip is not None
    for place, sample in enumerate(samples):
        begin = (0, 0)
        if draws.crop is not None:
            row, column = draws.crop[sample].tolist()
            begin = int(row * (2 * padding + 1)), int(column * (2 * padding + 1))
        expected = torchvision_reference(
            pixels[place],
            resolution=resolution,
            interpolation=interpolation,
            padding=padding,
            crop=begin,
            mirrored=bool(draws.flip[sample] < 0.5),
        )
        torch.testing.assert_close(output[place], expected, atol=1e-5, rtol=0)
    assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("resolution", [None, 64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation_only_resizes_and_normalises(resolution: int | None, memory_format: torch.memory_format) -> None:
    pixels = images()
    ours = pipeline(resolution=resolution, crop_padding=4, flip="random", memory_format=memory_format)
    expected = V.to_dtype(pixels, torch.float32, scale=True)
    if resolution:
        expected = V.resize(expected, [resolution, resolution], antialias=True)
    expected = V.normalize(expected, list(MEAN), list(STD))
    torch.testing.assert_close(ours.evaluate(pixels), expected, atol=1e-5, rtol=0)


def test_images_need_not_be_square() -> None:
    pixels = images(2, 20, 30)
    ours = pipeline(size=(20, 30), crop_padding=3, flip="random")
    draws = Draws(crop=torch.tensor([[0.0, 0.0], [0.99, 0.99]]), flip=torch.tensor([0.9, 0.1]))
    output = ours.train(pixels, torch.tensor([0, 1]), draws)
    for place, (begin, mirrored) in enumerate([((0, 0), False), ((6, 6), True)]):
        expected = torchvision_reference(
            pixels[place], resolution=None, interpolation="bilinear", padding=3, crop=begin, mirrored=mirrored
        )
        torch.testing.assert_close(output[place], expected, atol=1e-5, rtol=0)


def test_draws_are_a_function_of_seed_epoch_and_sample() -> None:
    ours = pipeline(crop_padding=4, flip="random")
    pixels = images(6)
    draws = ours.draw(seed=3, epoch=1, count=100)
    samples = torch.tensor([90, 5, 17, 60, 2, 33])
    together = ours.train(pixels, samples, draws)
    alone = torch.cat([ours.train(pixels[i : i + 1], samples[i : i + 1], draws) for i in reversed(range(6))]).flip(0)
    assert torch.equal(together, alone), "an image's draws depend on the batch that it is in"
    again = ours.draw(seed=3, epoch=1, count=100)
    assert draws.crop is not None and again.crop is not None and torch.equal(draws.crop, again.crop)
    for seed, epoch in [(4, 1), (3, 2)]:
        other = ours.draw(seed=seed, epoch=epoch, count=100)
        assert other.crop is not None and not torch.equal(draws.crop, other.crop)


def test_every_crop_is_equally_likely_and_half_the_images_are_mirrored() -> None:
    draws = pipeline(crop_padding=2, flip="random").draw(seed=0, epoch=0, count=20_000)
    assert draws.crop is not None and draws.flip is not None
    counts = (draws.crop[:, 0] * 5).long().bincount(minlength=5)
    assert len(counts) == 5
    # 4,000 expected, standard deviation 57: five of them are 285.
    assert ((counts - 4000).abs() < 285).all()
    assert abs((draws.flip < 0.5).float().mean().item() - 0.5) < 5 * 0.5 / 20_000**0.5


def test_without_augmentation_training_images_are_the_evaluated_ones() -> None:
    ours = pipeline(resolution=40)
    pixels = images()
    assert torch.equal(ours.train(pixels, torch.arange(5), ours.draw(0, 0, 5)), ours.evaluate(pixels))


# --- shifts and flips -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("resolution", "by"), [(None, 2), (None, 31), (24, 5)])
def test_a_translation_brings_in_the_mirror_image(
    resolution: int | None, by: int, memory_format: torch.memory_format
) -> None:
    pixels, samples = images(6), torch.tensor([3, 0, 4, 1, 5, 2])
    ours = pipeline(resolution=resolution, translate=by, flip="random", memory_format=memory_format)
    draws = ours.draw(seed=7, epoch=2, count=6)
    output = ours.train(pixels, samples, draws)
    assert draws.translate is not None and draws.flip is not None and draws.crop is None
    plain = pipeline(resolution=resolution).evaluate(pixels)
    side = plain.shape[-1]
    for image, sample, found in zip(plain, samples, output, strict=True):
        top, left = (int(part * (2 * by + 1)) for part in draws.translate[sample].tolist())
        expected = F.pad(image[None], (by, by, by, by), mode="reflect")[0, :, top : top + side, left : left + side]
        if draws.flip[sample] < 0.5:
            expected = expected.flip(-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_translation_reaches_both_ends() -> None:
    draws = Draws(translate=torch.tensor([[0.0, 0.5], [1 - 2**-24, 0.5]]))
    pixels = images(1).expand(2, -1, -1, -1)
    ours = pipeline(translate=3)
    output, plain = ours.train(pixels, torch.arange(2), draws), ours.evaluate(pixels)
    torch.testing.assert_close(output[0, :, 3:], plain[0, :, :-3])
    torch.testing.assert_close(output[1, :, :-3], plain[1, :, 3:])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"translate": 32}, "augment.translate 32 moves images of side 32 by up to 32 pixels"),
        ({"translate": 20, "size": (20, 30)}, "of side 20 by up to 20 pixels; .* must be less than the side; set it"),
        ({"translate": 15, "resolution": 8, "reference": 16}, "translate 15 moves images of side 8 by up to 8 pixels"),
    ],
)
def test_a_translation_as_long_as_the_side_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        pipeline(**settings)


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    ours = pipeline(flip="alternating")
    flips = [ours.draw(seed=4, epoch=epoch, count=10_000).flip for epoch in range(4)]
    mirrored = [flip < 0.5 for flip in flips if flip is not None]
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2]) and torch.equal(mirrored[1], mirrored[3])
    random = pipeline(flip="random").draw(seed=4, epoch=0, count=10_000).flip
    assert random is not None and flips[0] is not None and torch.equal(flips[0], random)
    assert abs(mirrored[0].float().mean().item() - 0.5) < 5 * 0.5 / 10_000**0.5


# --- draws ------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "crop_padding": 4, "flip": "random", "policy": "trivial_augment", "brightness": 0.4, "contrast": 0.3,
    "saturation": 0.2, "hue": 0.1, "cutout": 5, "erasing": 0.5,
}  # fmt: skip


def tables(draws: Draws) -> dict[str, Tensor]:
    return {name: table for name, table in vars(draws).items() if table is not None}


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({}, {}),
        ({"crop_padding": 1}, {"crop": (9, 2)}),
        ({"flip": "random"}, {"flip": (9,)}),
        ({"translate": 1}, {"translate": (9, 2)}),
        ({"policy": "trivial_augment"}, {"policy": (9, 1, 3)}),
        ({"policy": "rand_augment", "rand_augment_ops": 4}, {"policy": (9, 4, 3)}),
        ({"saturation": 0.1}, {"jitter": (9, 8)}),
        ({"hue": 0.1}, {"jitter": (9, 8)}),
        ({"cutout": 3}, {"cutout": (9, 2)}),
        ({"erasing": 0.1}, {"erasing": (9, 5)}),
        (
            EVERYTHING,
            {"crop": (9, 2), "flip": (9,), "policy": (9, 1, 3), "jitter": (9, 8), "cutout": (9, 2), "erasing": (9, 5)},
        ),
    ],
)
def test_what_the_recipe_asks_for_is_drawn_each_from_a_seed_of_its_own(
    settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    drawn = tables(pipeline(**settings).draw(seed=3, epoch=6, count=9))
    assert drawn.keys() == shapes.keys()
    for purpose, table in drawn.items():
        generator = torch.Generator().manual_seed(derive_seed(3, purpose, 6))
        assert torch.equal(table, torch.rand(shapes[purpose], generator=generator)), purpose


def test_views_are_drawn_again_in_turn() -> None:
    ours, always_new = pipeline(**EVERYTHING, views=3), pipeline(**EVERYTHING)
    for epoch in range(7):
        found, expected = tables(ours.draw(1, epoch, 20)), tables(always_new.draw(1, epoch % 3, 20))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    one = pipeline(flip="random", views=1)
    assert torch.equal(tables(one.draw(1, 0, 20))["flip"], tables(one.draw(1, 1, 20))["flip"])


# --- another resolution -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crop_padding", "translate", "cutout"])
@pytest.mark.parametrize(
    ("reference", "resolution", "scaled"),
    [(32, 64, 12), (32, 32, 6), (32, 21, 4), (32, 5, 1), (32, 2, 0), (None, 64, 6)],
)
def test_lengths_follow_the_resolution(name: str, reference: int | None, resolution: int, scaled: int) -> None:
    ours = pipeline(resolution=resolution, reference=reference, **{name: 6})
    expected = pipeline(resolution=resolution, **{name: scaled})
    draws = pipeline(**{name: 6}).draw(0, 0, 20)
    pixels, samples = images(20), torch.arange(20)
    assert torch.equal(ours.train(pixels, samples, draws), expected.train(pixels, samples, draws))


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, {"translate": 3, "policy": "rand_augment", "flip": "alternating"}, {"crop_padding": 1, "cutout": 1}],
)
def test_draws_do_not_depend_on_the_resolution(settings: dict[str, Any]) -> None:
    small, large = (pipeline(resolution=side, reference=48, **settings) for side in (12, 48))
    first, second = tables(small.draw(1, 2, 30)), tables(large.draw(1, 2, 30))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- all together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resolution", [None, 48])
def test_the_whole_order_replayed_with_torchvision(resolution: int | None, memory_format: torch.memory_format) -> None:
    """Resize, crop, flip, policy, jitter, normalise, cutout, erasing."""
    ours = pipeline(
        resolution=resolution, crop_padding=5, flip="random", policy="rand_augment", rand_augment_ops=1,
        rand_augment_magnitude=15, brightness=0.8, cutout=9, erasing=1.0, memory_format=memory_format,
    )  # fmt: skip
    pixels, samples, draws = images(8), torch.arange(8).flip(0), ours.draw(0, 0, 8)
    assert draws.crop is not None and draws.flip is not None and draws.jitter is not None
    assert draws.policy is not None and draws.cutout is not None and draws.erasing is not None
    # Both depend on what the crop brought in, and neither commutes with a factor on brightness.
    chosen = [list(OPERATIONS).index(name) for name in ("Contrast", "AutoContrast")] * 4
    draws.policy[:, 0, 0] = (torch.tensor(chosen) + 0.5) / len(OPERATIONS)
    output = ours.train(pixels, samples, draws)
    assert output.is_contiguous(memory_format=memory_format)
    side = resolution or 32
    for image, sample, found in zip(pixels, samples.tolist(), output, strict=True):
        picture = V.to_dtype(image, torch.float32, scale=True)
        if resolution:
            picture = V.resize(picture, [side, side], antialias=True)
        top, left = (int(part * 11) for part in draws.crop[sample].tolist())
        picture = V.crop(V.pad(picture, [5] * 4), top, left, side, side)
        if draws.flip[sample] < 0.5:
            picture = V.horizontal_flip(picture)
        if chosen[sample] == chosen[0]:
            picture = V.adjust_contrast(picture, 1 + 0.45 * (-1 if draws.policy[sample, 0, 2] < 0.5 else 1))
        else:
            picture = V.autocontrast(picture)
        picture = V.adjust_brightness(picture, 0.2 + 1.6 * draws.jitter[sample, 0].item())
        picture = V.normalize(picture, list(MEAN), list(STD))
        blank = color.cutout(draws.cutout[sample, None], 9, (side, side))[0]
        blank = blank | color.erasing(draws.erasing[sample, None], 1.0, (side, side))[0]
        assert 0.02 < blank.float().mean() < 0.5
        torch.testing.assert_close(found, picture.masked_fill(blank, 0), atol=2e-5, rtol=0)


def test_what_resizing_overshoots_is_cut_off_before_the_policy() -> None:
    pixels = (images(4) > 127).to(torch.uint8) * 255
    ours = pipeline(resolution=80, interpolation="bicubic", policy="trivial_augment")
    output = ours.train(pixels, torch.arange(4), Draws(policy=torch.zeros(4, 1, 3)))
    expected = V.resize(pixels.float() / 255, [80, 80], interpolation=INTERPOLATION["bicubic"], antialias=True)
    assert expected.amin() < -0.01 and expected.amax() > 1.01
    torch.testing.assert_close(output, V.normalize(expected.clamp(0, 1), list(MEAN), list(STD)), atol=1e-5, rtol=0)


def test_with_everything_an_image_does_not_depend_on_its_batch() -> None:
    ours, pixels, samples = pipeline(**EVERYTHING), images(12), torch.arange(12)
    draws = ours.draw(0, 0, 12)
    together = ours.train(pixels, samples, draws)
    alone = torch.cat([ours.train(pixels[i : i + 1], samples[i : i + 1], draws) for i in range(12)])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


# --- test-time augmentation -------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resolution", [None, 48])
@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (0, -3), (-1, 4)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("black", [False, True])
def test_evaluation_can_mirror_and_move(
    black: bool, flip: bool, shift: tuple[int, int], resolution: int | None, memory_format: torch.memory_format
) -> None:
    ours = pipeline(resolution=resolution, crop_padding=1 if black else 0, memory_format=memory_format)
    pixels = images(3)
    expected = V.to_dtype(pixels, torch.float32, scale=True)
    if resolution:
        expected = V.resize(expected, [resolution, resolution], antialias=True)
    if flip:
        expected = expected.flip(-1)
    side, margin = expected.shape[-1], 4
    expected = F.pad(expected, (margin,) * 4, mode="constant" if black else "reflect")
    top, left = margin - shift[0], margin - shift[1]
    expected = V.normalize(expected[..., top : top + side, left : left + side], list(MEAN), list(STD))
    output = ours.evaluate(pixels, flip=flip, shift=shift)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("side", "shift"), [(8, 1), (32, 2), (96, 6), (128, 8), (224, 14)])
def test_test_time_augmentation_moves_by_a_sixteenth(side: int, shift: int) -> None:
    assert pipeline(resolution=side).tta_shift == shift
