"""Mixup and CutMix: training images blended with, or pasted into, one another, and the labels with them.

Each image has its own share and box, where timm and torchvision draw one for the whole batch (timm: unless its mode is
`elem`), and so do the papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifarlab import machine
from cifarlab.data.color import rectangles
from cifarlab.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Mixed:
    """pixels: float32 (B, 3, H, W). partners: int64 (B,), the labels of the images that were mixed in. share: float32
    (B,), the weight of an image's own label; its partner's has the rest."""

    pixels: Tensor
    partners: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class MixingDraws:
    """How each image of a batch is mixed, on the CPU. order: int64 (B,), its partner's place in the batch. share:
    float32 (B,), its own weight. blended: bool (B,), whether it is blended; else a box of its partner is pasted.
    edges: int64 (4, B), that box: top, left, bottom, right."""

    order: Tensor
    share: Tensor
    blended: Tensor
    edges: Tensor

    def of(self, rows: Tensor) -> MixingDraws:
        """Those of some of the images, int64 (b,)."""
        return MixingDraws(self.order[rows], self.share[rows], self.blended[rows], self.edges[:, rows])


def draw_mixing(count: int, size: tuple[int, int], *, mixup: float, cutmix: float, seed: int, step: int) -> MixingDraws:
    """The draws for a batch of `count` images of `size` (H, W): a function of the arguments.

    mixup: alpha of Zhang et al. 2017 (arXiv 1710.09412): images are blended, with shares from Beta(alpha, alpha).
    cutmix: alpha of Yun et al. 2019 (arXiv 1905.04899): a box of the partner is pasted over the image, its centre any
    pixel and its sides sqrt(1 - share) of the image's; what lies beyond the image is cut off, and the share is that of
    the pixels that remain. At least one alpha is above 0; where both are, each image takes either with probability 1/2
    (timm's choice is the whole batch's, unless its mode is `elem`).
    """
    assert mixup > 0 or cutmix > 0
    sides = np.array(size)
    generator = np.random.default_rng(derive_seed(seed, "mixing", step))
    order = generator.permutation(count)
    blended = generator.random(count) < (0.5 if mixup and cutmix else 1.0 if mixup else 0.0)
    shares = [generator.beta(alpha, alpha, count) if alpha else np.ones(count) for alpha in (mixup, cutmix)]
    # As in the paper's own code: half a side, rounded down, each way from the centre.
    half = (sides * np.sqrt(1 - shares[1])[:, None]).astype(np.int64) // 2
    centre = (generator.random((count, 2)) * sides).astype(np.int64)
    begin, end = (centre - half).clip(0), (centre + half).clip(max=sides)
    share = np.where(blended, shares[0], 1 - (end - begin).prod(1) / sides.prod()).astype(np.float32)
    edges = np.concatenate([begin.T, end.T])
    return MixingDraws(*map(torch.from_numpy, (order, share, blended, edges)))


def mix(pixels: Tensor, labels: Tensor, *, mixup: float, cutmix: float, seed: int, step: int) -> Mixed:
    """A batch mixed with a permutation of itself: pixels float32 (B, 3, H, W), labels int64 (B,); see `draw_mixing`."""
    height, width = pixels.shape[2:]
    draws = draw_mixing(len(pixels), (height, width), mixup=mixup, cutmix=cutmix, seed=seed, step=step)
    order = machine.upload(draws.order, pixels.device)
    return mix_pairs(pixels, pixels[order], labels[order], draws)


def mix_pairs(pixels: Tensor, others: Tensor, partners: Tensor, draws: MixingDraws) -> Mixed:
    """Images mixed with others, float32 (B, 3, H, W) both, whose labels are `partners`, int64 (B,)."""
    # Drawn on the CPU, so the same for every device.
    own, blend, *edges = (machine.upload(drawn, pixels.device) for drawn in (draws.share, draws.blended, *draws.edges))
    height, width = pixels.shape[2:]
    boxes = rectangles((height, width), *edges)
    weight = torch.where(blend[:, None, None, None], own[:, None, None, None], (~boxes).float())
    return Mixed(torch.lerp(others, pixels, weight), partners, own)
