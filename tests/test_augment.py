"""The pipeline gives the same pixels as torchvision's v2 transforms for the same random draws."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from cifarlab.data.augment import Draws, Pipeline

CPU = torch.device("cpu")
MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
INTERPOLATION: dict[str, Any] = {"bilinear": V.InterpolationMode.BILINEAR, "bicubic": V.InterpolationMode.BICUBIC}


def pipeline(**changes: Any) -> Pipeline:
    settings: dict[str, Any] = {
        "size": (32, 32),
        "resolution": None,
        "interpolation": "bilinear",
        "crop_padding": 0,
        "flip": None,
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
