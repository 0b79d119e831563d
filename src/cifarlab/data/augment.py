"""Whole batches on the training device: uint8 images in, normalised float images out.

Resizing, cropping and flipping are all separable: each output row is a fixed mixture of input rows, and each output
column of input columns. So one image's whole transformation is two small matrices, `rows @ image @ columns.T`, and a
batch's is two batched products: ten times faster on two cores than resizing, padding and gathering one after the
other, exact for crops and flips (the matrices then hold only zeros and ones), and deterministic on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab.seeds import derive_seed


@dataclass(frozen=True)
class Draws:
    """The random draws of one epoch for every image of a dataset, float32 in [0, 1), looked up by sample index.

    crop: (N, 2), where the crop begins, rows then columns. flip: (N,), mirrored where below 1/2. None: not drawn.
    """

    crop: Tensor | None
    flip: Tensor | None


class Pipeline:
    """From stored images to what the network sees.

    size: (H, W) of the stored images. resolution: side that they are resized to (antialiased), None to leave them.
    crop_padding: pixels of the output added on each side, black, before a random crop of the output's size.
    mean, std: per channel, for values in [0, 1].
    Equals torchvision v2's Resize, Pad, crop, horizontal_flip and Normalize on float32 images.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        resolution: int | None,
        interpolation: Literal["bilinear", "bicubic"],
        crop_padding: int,
        flip: Literal["random"] | None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.size = size
        self.output_size = (resolution, resolution) if resolution else size
        self.crop_padding = crop_padding
        self.flip = flip
        self.device = device
        self.memory_format = memory_format
        self._rows, self._columns = (
            _resize_matrix(old, new, interpolation).to(device) for old, new in zip(size, self.output_size, strict=True)
        )
        # (x / 255 - mean) / std as one scale and one offset.
        deviation = torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * deviation)).float().to(device)
        self._offset = (-torch.tensor(mean, dtype=torch.float64) / deviation).float().to(device)

    def draw(self, seed: int, epoch: int, count: int) -> Draws:
        """The draws of one epoch for a dataset of `count` images: a function of the arguments alone."""

        def table(purpose: str, *shape: int) -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(seed, purpose, epoch))
            return torch.rand(shape, generator=generator).to(self.device)

        return Draws(
            crop=table("crop", count, 2) if self.crop_padding else None,
            flip=table("flip", count) if self.flip else None,
        )

    def train(self, pixels: Tensor, samples: Tensor, draws: Draws) -> Tensor:
        """Augmented images, float32 (B, 3, *output_size), from uint8 (B, 3, H, W) and their sample indices (B,)."""
        if draws.crop is None and draws.flip is None:
            return self.evaluate(pixels)
        height, width = self.output_size
        row = torch.arange(height, device=self.device).expand(len(pixels), height)
        column = torch.arange(width, device=self.device).expand(len(pixels), width)
        if draws.flip is not None:
            column = torch.where(draws.flip[samples, None] < 0.5, width - 1 - column, column)
        rows, columns = self._rows, self._columns
        if draws.crop is not None:
            begin = (draws.crop[samples] * (2 * self.crop_padding + 1)).long()
            row, column = row + begin[:, :1], column + begin[:, 1:]
            padding = (0, 0, self.crop_padding, self.crop_padding)
            rows, columns = F.pad(rows, padding), F.pad(columns, padding)
        return self._sample(pixels, rows[row], columns[column])

    def evaluate(self, pixels: Tensor) -> Tensor:
        """Resized and normalised images, float32 (B, 3, *output_size), from uint8 (B, 3, H, W)."""
        if self.output_size == self.size:
            images = pixels * self._scale[:, None, None] + self._offset[:, None, None]
            return images.contiguous(memory_format=self.memory_format)
        count = len(pixels)
        return self._sample(pixels, self._rows.expand(count, -1, -1), self._columns.expand(count, -1, -1))

    def _sample(self, pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`rows @ image @ columns.T` for each image, scaled and offset; rows (B, h, H), columns (B, w, W).

        The larger product comes last and writes each output value once, where it belongs in memory; the offset is one
        more term of its sums.
        """
        batch, _, height, width = pixels.shape
        h, w = rows.shape[1], columns.shape[1]
        images = pixels * self._scale[:, None, None]
        if self.memory_format is torch.channels_last:
            by_column = images.permute(0, 3, 2, 1).reshape(batch, width, height * 3)
            narrow = (columns @ by_column).view(batch, w, height, 3).transpose(1, 2).reshape(batch, height, w * 3)
            offset = self._offset.repeat(w).expand(batch, 1, w * 3)
            output = F.pad(rows, (0, 1), value=1.0) @ torch.cat([narrow, offset], 1)
            return output.view(batch, h, w, 3).permute(0, 3, 1, 2)
        by_row = images.transpose(1, 2).reshape(batch, height, 3 * width)
        narrow = (rows @ by_row).view(batch, h, 3, width).transpose(1, 2).reshape(batch, 3 * h, width)
        offset = self._offset.repeat_interleave(h)[:, None].expand(batch, 3 * h, 1)
        output = torch.cat([narrow, offset], 2) @ F.pad(columns, (0, 1), value=1.0).mT
        return output.view(batch, 3, h, w)


def _resize_matrix(old: int, new: int, interpolation: str) -> Tensor:
    """(new, old) float32: resizing a line of `old` values to `new` ones, read off torch's own antialiased resize."""
    if old == new:
        return torch.eye(old)
    lines = torch.eye(old)[None, None]
    return F.interpolate(lines, size=(new, old), mode=interpolation, antialias=True, align_corners=False)[0, 0]
