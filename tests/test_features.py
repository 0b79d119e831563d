"""Frozen stages: computed once an image and version, and never anything else than if they had been computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifarlab.features import FrozenStages, Source

IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Front(nn.Module):
    """Counts the images that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU()).eval()
        self.images = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        output: Tensor = self.layers(pixels)
        return output


def stages(front: Front, dtype: torch.dtype = torch.float32, memory: int = 10**9) -> FrozenStages:
    return FrozenStages(front, dtype, memory, torch.contiguous_format)


def ask(frozen: FrozenStages, samples: list[int], version: int | None, rows: int = 20) -> Tensor:
    """The outputs for some images of a version, which adds its number to every pixel."""
    index = torch.tensor(samples)
    source = None if version is None else Source("train", 8, version)
    return frozen(lambda: IMAGES[index] + (version or 0), index, source, len(IMAGES), rows)


def expected(front: Front, samples: list[int], version: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        output: Tensor = front.layers(IMAGES[samples] + version).to(dtype).float()
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_of_each_version_is_computed_once_and_comes_back_in_any_order(dtype: torch.dtype) -> None:
    front = Front()
    frozen = stages(front, dtype)
    for version in (0, 1):
        for half in (range(0, 20, 2), range(1, 20, 2)):
            first = ask(frozen, list(half), version)
            torch.testing.assert_close(first, expected(front, list(half), version, dtype), atol=0, rtol=0)
    assert front.images == 40
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    for version in (1, 0):
        again = ask(frozen, shuffled, version)
        torch.testing.assert_close(again, expected(front, shuffled, version, dtype), atol=0, rtol=0)
        assert again.dtype == torch.float32 and not again.requires_grad
    assert front.images == 40


def test_a_batch_of_known_and_new_images_is_right_and_adds_the_new_ones() -> None:
    front = Front()
    frozen = stages(front)
    ask(frozen, [3, 5], 0, rows=6)
    torch.testing.assert_close(ask(frozen, [5, 1, 3, 2], 0, rows=6), expected(front, [5, 1, 3, 2]), atol=0, rtol=0)
    ask(frozen, [0, 4], 0, rows=6)
    computed = front.images
    everything = [4, 1, 0, 3, 5, 2]
    torch.testing.assert_close(ask(frozen, everything, 0, rows=6), expected(front, everything), atol=0, rtol=0)
    assert front.images == computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_into_memory_is_computed_anew_with_the_same_bits(dtype: torch.dtype) -> None:
    """Room for one version: 20 images of 5 x 4 x 4 outputs."""
    front = Front()
    frozen = stages(front, dtype, memory=20 * 80 * (4 if dtype == torch.float32 else 2))
    samples = list(range(20))
    for _ in range(3):
        for version in (0, 1):
            got = ask(frozen, samples, version)
            torch.testing.assert_close(got, expected(front, samples, version, dtype), atol=0, rtol=0)
    assert front.images == 20 + 3 * 20
    assert frozen.memory_left == 0
    size = 20 * 80 * (4 if dtype == torch.float32 else 2)
    assert frozen.record() == {"computed": front.images, "recalled": 2 * 20, "bytes": size}


def test_what_will_not_come_again_is_not_kept() -> None:
    front = Front()
    frozen = stages(front)
    before = frozen.memory_left
    for _ in range(2):
        ask(frozen, [1, 2], None)
    assert front.images == 4 and frozen.memory_left == before


def test_images_of_another_store_or_resolution_are_others() -> None:
    front = Front()
    frozen = stages(front)
    index = torch.arange(4)
    for number, source in enumerate([Source("train", 8, 0), Source("validation", 8, 0), Source("train", 16, 0)]):
        got = frozen(lambda number=number: IMAGES[index] * (1 + number), index, source, 4, 4)  # type: ignore[misc]
        with torch.no_grad():
            wanted: Any = front.layers(IMAGES[index] * (1 + number))
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)
