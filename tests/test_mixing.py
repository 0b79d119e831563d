"""Mixup and CutMix: pixels, partners and shares agree, and shares are distributed as the papers have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cifarlab.data.mixing import Mixed, mix


def numbered(count: int, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose every value is their number, which is also their label: what was mixed can be read off."""
    labels = torch.arange(count)
    return labels.float()[:, None, None, None].expand(count, 3, height, width).clone(), labels


def mixed(count: int = 64, height: int = 8, width: int = 8, *, mixup: float, cutmix: float, step: int = 3) -> Mixed:
    return mix(*numbered(count, height, width), mixup=mixup, cutmix=cutmix, seed=5, step=step)


def pasted(found: Mixed) -> Tensor:
    """Where the partner's pixels are, bool (B, H, W), for images of their own numbers; fixed points are dropped."""
    own = torch.arange(len(found.partners))
    different = found.partners != own
    images = found.pixels[different]
    assert torch.equal(images[:, :1].expand_as(images), images), "channels differ"
    of_partner = images[:, 0] == found.partners[different, None, None]
    assert (of_partner | (images[:, 0] == own[different, None, None])).all(), "neither one's nor the other's pixel"
    return of_partner


def test_partners_are_a_permutation_and_few_keep_their_own() -> None:
    partners = mixed(1000, mixup=1.0, cutmix=0.0).partners
    assert partners.dtype == torch.int64 and torch.equal(partners.sort().values, torch.arange(1000))
    # One fixed point is expected, whatever the size.
    assert (partners == torch.arange(1000)).sum() < 7


def test_partners_are_labels_not_places() -> None:
    pixels, places = numbered(32)
    labels = places % 5 + 10
    found = mix(pixels, labels, mixup=1.0, cutmix=0.0, seed=5, step=3)
    assert torch.equal(found.partners, labels[mix(pixels, places, mixup=1.0, cutmix=0.0, seed=5, step=3).partners])


def test_mixup_blends_by_the_share() -> None:
    pixels = torch.rand(16, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    before = pixels.clone()
    found = mix(pixels, torch.arange(16), mixup=0.4, cutmix=0.0, seed=1, step=2)
    share = found.share[:, None, None, None]
    torch.testing.assert_close(found.pixels, share * pixels + (1 - share) * pixels[found.partners], atol=1e-6, rtol=0)
    assert len(set(found.share.tolist())) == 16, "a share for each image"
    assert found.share.dtype == torch.float32 and torch.equal(pixels, before)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_shares_are_from_the_beta_distribution(alpha: float) -> None:
    share = mixed(20_000, 1, 1, mixup=alpha, cutmix=0.0).share.double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert share.amin() >= 0 and share.amax() <= 1
    assert abs(share.mean().item() - 0.5) < 5 * (variance / 20_000) ** 0.5
    # The fourth moment is at most a quarter of the variance, so five deviations of the variance are at most:
    assert abs(share.var().item() - variance) < 5 * (variance / 4 / 20_000) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (9, 20)])
def test_cutmix_pastes_one_box_and_the_share_is_what_remains(height: int, width: int) -> None:
    found = mixed(200, height, width, mixup=0.0, cutmix=1.0)
    boxes = pasted(found)
    rows, columns = boxes.any(2), boxes.any(1)
    assert torch.equal(boxes, rows[:, :, None] & columns[:, None, :]), "not a rectangle"
    for lines in (rows, columns):
        starts = (lines.int().diff(dim=1) > 0).sum(1) + lines[:, 0]
        assert (starts <= 1).all(), "a rectangle in pieces"
    remaining = 1 - boxes.float().mean((1, 2))
    different = found.partners != torch.arange(200)
    torch.testing.assert_close(found.share[different], remaining, atol=1e-6, rtol=0)
    assert len({box.numpy().tobytes() for box in boxes}) > 50, "a box for each image"


def test_cutmix_boxes_are_as_in_the_paper() -> None:
    height, width, count = 24, 40, 4000
    found = mixed(count, height, width, mixup=0.0, cutmix=0.5)
    # The paper's rand_bbox, one image at a time, from draws of its own.
    generator = np.random.default_rng(0)
    shares, tops = [], []
    for _ in range(count):
        cut = np.sqrt(1 - generator.beta(0.5, 0.5))
        cut_h, cut_w = int(height * cut), int(width * cut)
        cy, cx = generator.integers(height), generator.integers(width)
        y1, y2 = np.clip(cy - cut_h // 2, 0, height), np.clip(cy + cut_h // 2, 0, height)
        x1, x2 = np.clip(cx - cut_w // 2, 0, width), np.clip(cx + cut_w // 2, 0, width)
        shares.append(1 - (x2 - x1) * (y2 - y1) / (width * height))
        tops.append([y1, x1, y2, x2] if y2 > y1 and x2 > x1 else [np.nan] * 4)
    ours, theirs = np.sort(found.share.numpy()), np.sort(shares)
    # The largest gap between two samples' distributions (Kolmogorov & Smirnov): 1.63 sqrt(2 / n) in one case of 100.
    places = np.unique(np.concatenate([ours, theirs.astype(np.float32)]))
    steps = [np.searchsorted(values.astype(np.float32), places, side="right") / count for values in (ours, theirs)]
    assert np.abs(steps[0] - steps[1]).max() < 1.63 * (2 / count) ** 0.5
    boxes = pasted(found)
    boxes = boxes[boxes.any(2).any(1)]
    rows, columns = boxes.any(2).int(), boxes.any(1).int()
    edges = [rows.argmax(1), columns.argmax(1), height - rows.flip(1).argmax(1), width - columns.flip(1).argmax(1)]
    for number, edge in enumerate(edges):
        expected = np.array(tops)[:, number]
        deviation = np.nanstd(expected) * (2 / len(edge)) ** 0.5
        assert abs(edge.double().mean().item() - np.nanmean(expected)) < 5 * deviation


def test_with_both_each_image_takes_one_of_them() -> None:
    count = 4000
    found = mixed(count, 16, 16, mixup=1.0, cutmix=1.0)
    own = torch.arange(count)
    first, flat = found.pixels[:, 0, 0, 0], found.pixels.flatten(1)
    blended = (flat == first[:, None]).all(1) & (first != own) & (first != found.partners)
    assert abs(blended.float().mean().item() - 0.5) < 5 * 0.5 / count**0.5
    expected = found.share * own + (1 - found.share) * found.partners
    torch.testing.assert_close(found.pixels.mean((1, 2, 3)), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(memory_format: torch.memory_format, mixup: float, cutmix: float) -> None:
    pixels, labels = numbered(6, 4, 5)
    found = mix(pixels.contiguous(memory_format=memory_format), labels, mixup=mixup, cutmix=cutmix, seed=0, step=0)
    assert found.pixels.is_contiguous(memory_format=memory_format)
    assert torch.equal(found.pixels, mix(pixels, labels, mixup=mixup, cutmix=cutmix, seed=0, step=0).pixels)


def test_mixing_is_a_function_of_seed_and_step() -> None:
    pixels, labels = numbered(32)

    def shares(seed: int, step: int) -> Tensor:
        return mix(pixels, labels, mixup=0.5, cutmix=0.5, seed=seed, step=step).share

    torch.rand(1)  # the global generator has no part in it
    assert torch.equal(shares(1, 2), shares(1, 2))
    assert not torch.equal(shares(1, 2), shares(1, 3)) and not torch.equal(shares(1, 2), shares(2, 2))
