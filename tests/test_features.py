"""Frozen stages: computed once an image and version, and never anything else than if they had been computed anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cifarlab.features import CacheKey, FrozenStages
from cifarlab.numerics import exact

EXACT = exact(torch.device("cpu"), channels_last_on_cpu=False)
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


def stages(
    front: nn.Module, dtype: torch.dtype = torch.float32, memory: int = 10**9, said: list[str] | None = None
) -> FrozenStages:
    return FrozenStages(front, dtype, memory, EXACT, (said if said is not None else []).append)


def ask(
    frozen: FrozenStages,
    samples: list[int],
    version: int | None,
    rows: int = 20,
    keep: bool = True,
    store: str = "train",
    side: int = 8,
) -> Tensor:
    """The outputs for some images of a version, which adds its number to every pixel."""
    index = torch.tensor(samples)
    key = None if version is None else CacheKey(store, side, version)
    return frozen(lambda: IMAGES[index] + (version or 0), index, key, keep=keep, images=len(IMAGES), rows=rows)


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


def test_what_is_not_to_be_kept_is_not_but_what_was_is_recalled() -> None:
    front = Front()
    frozen = stages(front)
    before = frozen.memory_left
    ask(frozen, [1, 2], 0, keep=False)
    assert frozen.memory_left == before
    ask(frozen, [1, 2], 0, rows=2)
    assert front.images == 4
    torch.testing.assert_close(ask(frozen, [2, 1], 0, rows=2, keep=False), expected(front, [2, 1]), atol=0, rtol=0)
    assert front.images == 4 and frozen.record()["recalled"] == 2


def test_images_of_another_store_or_resolution_are_others() -> None:
    """A key tells them apart, whatever comes from `pixels`: here the version, as it is added to them."""
    front = Front()
    frozen = stages(front)
    ask(frozen, [0, 1, 2], 0)
    for store, side in (("validation", 8), ("train", 16)):
        computed = front.images
        torch.testing.assert_close(
            ask(frozen, [0, 1, 2], 0, store=store, side=side), expected(front, [0, 1, 2]), atol=0, rtol=0
        )
        assert front.images == computed + 3


def test_a_new_resolution_takes_the_place_of_the_one_before() -> None:
    """There is memory for the validation images and one version of those for training."""
    front, said = Front(), list[str]()
    frozen = stages(front, memory=2 * 20 * 80 * 4, said=said)
    everything = list(range(20))
    ask(frozen, everything, 0, store="validation")
    for side in (8, 16, 24):
        ask(frozen, everything, 0, side=side)
        computed = front.images
        ask(frozen, everything, 0, side=side)
        ask(frozen, everything, 0, store="validation")
        assert front.images == computed
    assert not said and frozen.record()["bytes"] == 2 * 20 * 80 * 4


def test_what_does_not_fit_is_told_once() -> None:
    front, said = Front(), list[str]()
    frozen = stages(front, memory=20 * 80 * 4 - 1, said=said)
    for version in (0, 1):
        ask(frozen, [0, 1], version)
    (sentence,) = said
    assert "20 images takes 0 MB, more than the 0 MB left for it (model.cache_memory)" in sentence


def test_a_front_that_gives_vectors_is_kept_as_well() -> None:
    """All but the head frozen: a linear probe."""
    front = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    frozen = stages(front, torch.bfloat16)
    with torch.no_grad():
        wanted = front(IMAGES[:4]).bfloat16().float()
    for _ in range(2):
        torch.testing.assert_close(ask(frozen, [0, 1, 2, 3], 0), wanted, atol=0, rtol=0)
    assert frozen.record() == {"computed": 4, "recalled": 4, "bytes": 20 * 5 * 2}
