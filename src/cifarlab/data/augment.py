"""Whole batches on the training device: uint8 images in, normalised float images out.

Resizing, cropping and flipping are all separable: each output row is a fixed mixture of input rows, and each output
column of input columns. So one image's whole transformation is two small matrices, `rows @ image @ columns.T`, and a
batch's is two batched products: ten times faster on two cores than resizing, padding and gathering one after the
other, exact for crops and flips (the matrices then hold only zeros and ones), and deterministic on every device.
What is not separable, or not linear, comes after it and is in `color`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab import machine
from cifarlab.data import color
from cifarlab.errors import RecipeError
from cifarlab.recipe_sections import Augment
from cifarlab.seeds import derive_seed


@dataclass(frozen=True)
class Draws:
    """The random draws of one epoch for every image of a dataset, float32 in [0, 1), looked up by sample index.

    They don't depend on the resolution. None: not drawn.
    crop, translate: (N, 2), where the crop begins, rows then columns. flip: (N,), mirrored where below 1/2.
    policy: (N, operations, 3), jitter: (N, 8), cutout: (N, 2), erasing: (N, 5), as the functions of `color` take them.
    Policy and jitter are on the CPU, as images that get the same operation are found there; the others on the device.
    """

    crop: Tensor | None = None
    flip: Tensor | None = None
    translate: Tensor | None = None
    policy: Tensor | None = None
    jitter: Tensor | None = None
    cutout: Tensor | None = None
    erasing: Tensor | None = None


class Pipeline:
    """From stored images to what the network sees.

    size: (H, W) of the stored images. resolution: side that they are resized to (antialiased), None to leave them.
    reference: side of the output that the lengths in `augment` are meant for, None for its own; at another side they
    are scaled with it and rounded. mean, std: per channel, for values in [0, 1].
    Equals torchvision v2's Resize, Pad, crop, horizontal_flip and Normalize on float32 images, and what `color` says.
    Raises RecipeError where a translation is as long as a side: there is nothing left to mirror.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        resolution: int | None,
        reference: int | None,
        interpolation: Literal["bilinear", "bicubic"],
        augment: Augment,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.size = size
        self.output_size = (resolution, resolution) if resolution else size
        self.device = device
        self.memory_format = memory_format
        self._augment = augment
        self._jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        self._side = min(self.output_size)
        scale = self._side / (reference or self._side)
        self._crop_padding, self._translate, self._cutout = (
            round(length * scale) for length in (augment.crop_padding, augment.translate, augment.cutout)
        )
        if self._translate >= self._side:
            raise RecipeError(
                f"augment.translate {augment.translate} moves images of side {self._side} by up to {self._translate} "
                "pixels; what comes in is mirrored, so it must be less than the side; set it lower"
            )
        self._rows, self._columns = (
            _resize_matrix(old, new, interpolation).to(device) for old, new in zip(size, self.output_size, strict=True)
        )
        # (x / 255 - mean) / std as one scale and one offset.
        deviation = torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * deviation)).float().to(device)
        self._offset = (-torch.tensor(mean, dtype=torch.float64) / deviation).float().to(device)
        # The same in two steps, with values in [0, 1] in between.
        self._unit, self._zero = torch.full((3,), 1 / 255, device=device), torch.zeros(3, device=device)
        self._unit_scale = (1 / deviation).float().to(device)
        if augment.policy is not None:
            self._strengths = color.magnitudes(augment.policy, self.output_size)

    @property
    def tta_shift(self) -> int:
        """How far test-time augmentation moves the picture, in pixels of the output."""
        return max(1, round(self._side / 16))

    @property
    def tta_shift_least(self) -> int:
        """The same for the smallest move that shows: a pixel of a stored image."""
        return max(1, round(self._side / min(self.size)))

    def draw(self, seed: int, epoch: int, count: int) -> Draws:
        """The draws of one epoch for a dataset of `count` images: a function of the arguments and the recipe alone."""
        augment = self._augment
        if augment.views is not None:
            epoch %= augment.views

        def host_table(purpose: str, *shape: int, epoch: int = epoch) -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(seed, purpose, epoch))
            return torch.rand(count, *shape, generator=generator)

        def table(purpose: str, *shape: int, epoch: int = epoch) -> Tensor:
            return machine.upload(host_table(purpose, *shape, epoch=epoch), self.device)

        flip = None
        if augment.flip == "random":
            flip = table("flip")
        elif augment.flip == "alternating":
            # Jordan 2024, arXiv 2404.00498, section 3.6: in two epochs a network sees each image both ways.
            flip = table("flip", epoch=0)
            if epoch % 2 == 1:
                flip = torch.where(flip < 0.5, flip + 0.5, flip - 0.5)
        operations = augment.rand_augment_ops if augment.policy == "rand_augment" else 1
        return Draws(
            crop=table("crop", 2) if augment.crop_padding else None,
            flip=flip,
            translate=table("translate", 2) if augment.translate else None,
            policy=host_table("policy", operations, 3) if augment.policy else None,
            jitter=host_table("jitter", 8) if any(self._jitter) else None,
            cutout=table("cutout", 2) if augment.cutout else None,
            erasing=table("erasing", 5) if augment.erasing else None,
        )

    def train(self, pixels: Tensor, samples: Tensor, draws: Draws) -> Tensor:
        """Augmented images, float32 (B, 3, *output_size), from uint8 (B, 3, H, W) and their sample indices (B,), which
        are on the CPU.

        In this order: resized, cropped or translated, mirrored, policy, colour jitter, normalised, cutout, erasing.
        The last two fill with 0, the mean.
        """
        rows = machine.upload(samples, self.device)
        placed = self._placed(rows, draws)
        if draws.policy is None and draws.jitter is None:
            images = self._sample(pixels, placed, self._scale, self._offset)
        else:
            # Bicubic resizing overshoots, and the operations are for [0, 1].
            images = self._sample(pixels, placed, self._unit, self._zero).clamp_(0, 1)
            if draws.policy is not None:
                level = self._augment.rand_augment_magnitude if self._augment.policy == "rand_augment" else None
                images = color.apply_policy(images, draws.policy[samples], self._strengths, level)
            if draws.jitter is not None:
                images = color.color_jitter(images, draws.jitter[samples], self._jitter)
            images = images * self._unit_scale[:, None, None] + self._offset[:, None, None]
        if draws.cutout is not None:
            images.masked_fill_(color.cutout(draws.cutout[rows], self._cutout, self.output_size), 0)
        if draws.erasing is not None:
            images.masked_fill_(color.erasing(draws.erasing[rows], self._augment.erasing, self.output_size), 0)
        return images

    def shown(self, images: Tensor) -> Tensor:
        """What the network sees as pictures: uint8 of the same shape, of normalised images, float32 (B, 3, H, W)."""
        pixels = (images - self._offset[:, None, None]) / self._scale[:, None, None]
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def evaluate(self, pixels: Tensor, *, flip: bool = False, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Resized and normalised images, float32 (B, 3, *output_size), from uint8 (B, 3, H, W).

        flip: mirror them all. shift: then move the picture by so many rows down and columns to the right, less than a
        side. What comes in is black (before normalisation) where training crops bring that in, else the mirror image.
        """
        if not flip and shift == (0, 0):
            return self._sample(pixels, None, self._scale, self._offset)
        columns = self._columns.flip(0) if flip else self._columns
        placed = []
        for matrix, by in zip((self._rows, columns), shift, strict=True):
            wanted = torch.arange(len(matrix), device=self.device) - by
            there = _mirrored(wanted, len(matrix))
            moved = matrix[there]
            if self._augment.crop_padding:
                moved = moved * (wanted == there)[:, None]
            placed.append(moved.expand(len(pixels), -1, -1))
        return self._sample(pixels, (placed[0], placed[1]), self._scale, self._offset)

    def _placed(self, samples: Tensor, draws: Draws) -> tuple[Tensor, Tensor] | None:
        """The matrices of each image, rows (B, h, H) and columns (B, w, W); None where all images are only resized."""
        if draws.crop is None and draws.translate is None and draws.flip is None:
            return None
        height, width = self.output_size
        row = torch.arange(height, device=self.device).expand(len(samples), height)
        column = torch.arange(width, device=self.device).expand(len(samples), width)
        if draws.flip is not None:
            column = torch.where(draws.flip[samples, None] < 0.5, width - 1 - column, column)
        rows, columns = self._rows, self._columns
        if draws.crop is not None:
            begin = (draws.crop[samples] * (2 * self._crop_padding + 1)).long()
            row, column = row + begin[:, :1], column + begin[:, 1:]
            padding = (0, 0, self._crop_padding, self._crop_padding)
            rows, columns = F.pad(rows, padding), F.pad(columns, padding)
        if draws.translate is not None:
            by = (draws.translate[samples] * (2 * self._translate + 1)).long() - self._translate
            row, column = _mirrored(row + by[:, :1], height), _mirrored(column + by[:, 1:], width)
        return rows[row], columns[column]

    def _sample(self, pixels: Tensor, placed: tuple[Tensor, Tensor] | None, scale: Tensor, offset: Tensor) -> Tensor:
        """`rows @ image @ columns.T` for each image, scaled and offset; placed: rows (B, h, H), columns (B, w, W), or
        None for resizing alone.

        The larger product comes last and writes each output value once, where it belongs in memory; the offset is one
        more term of its sums.
        """
        if placed is None and self.output_size == self.size:
            images = pixels * scale[:, None, None] + offset[:, None, None]
            return images.contiguous(memory_format=self.memory_format)
        batch, _, height, width = pixels.shape
        rows, columns = placed or (self._rows.expand(batch, -1, -1), self._columns.expand(batch, -1, -1))
        h, w = rows.shape[1], columns.shape[1]
        images = pixels * scale[:, None, None]
        if self.memory_format is torch.channels_last:
            by_column = images.permute(0, 3, 2, 1).reshape(batch, width, height * 3)
            narrow = (columns @ by_column).view(batch, w, height, 3).transpose(1, 2).reshape(batch, height, w * 3)
            offsets = offset.repeat(w).expand(batch, 1, w * 3)
            output = F.pad(rows, (0, 1), value=1.0) @ torch.cat([narrow, offsets], 1)
            return output.view(batch, h, w, 3).permute(0, 3, 1, 2)
        by_row = images.transpose(1, 2).reshape(batch, height, 3 * width)
        narrow = (rows @ by_row).view(batch, h, 3, width).transpose(1, 2).reshape(batch, 3 * h, width)
        offsets = offset.repeat_interleave(h)[:, None].expand(batch, 3 * h, 1)
        output = torch.cat([narrow, offsets], 2) @ F.pad(columns, (0, 1), value=1.0).mT
        return output.view(batch, 3, h, w)


def _resize_matrix(old: int, new: int, interpolation: str) -> Tensor:
    """(new, old) float32: resizing a line of `old` values to `new` ones, read off torch's own antialiased resize."""
    if old == new:
        return torch.eye(old)
    lines = torch.eye(old)[None, None]
    return F.interpolate(lines, size=(new, old), mode=interpolation, antialias=True, align_corners=False)[0, 0]


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Indices beyond 0 to length - 1 by up to length - 1, reflected there, the outermost one not repeated."""
    last = length - 1
    return last - (last - index.abs()).abs()
