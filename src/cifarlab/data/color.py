"""Colour jitter, TrivialAugment, RandAugment, erasing and cutout: for a whole batch, each image with its own draws.

The operations take images float32 (n, 3, H, W) in [0, 1] and an amount for each, float32 (n,), and return new images:
what torchvision.transforms.v2.functional gives for each image alone, in float32. torchvision's policies are written for
uint8; on floats its posterize has no rounding to 1/255 (8 bits, too, lower white to 255/256), and its equalize rounds
down to 256 levels first. Its v2 transforms draw once for a batch, these once for each image.

None of it loops over images: those that drew the same operation go through it together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from cifarlab import machine

BINS = 31


# --- photometric ------------------------------------------------------------------------------------


def _each(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    return images[:, :1] * 0.2989 + images[:, 1:2] * 0.587 + images[:, 2:] * 0.114


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    """0: the others, 1: the images, more than 1: away from the others."""
    return torch.lerp(others, images, _each(factor)).clamp_(0, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _each(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turned around the colour circle, by -1/2 to 1/2 of it; value and saturation (HSV) stay."""
    value, spread = images.amax(1), images.amax(1) - images.amin(1)
    red, green, blue = ((value[:, None] - images) / torch.where(spread > 0, spread, 1)[:, None]).unbind(1)
    # Where two channels are the largest, the first one counts; in grey, spread is 0 and the hue has no effect.
    sector = torch.where(
        value == images[:, 0], blue - green, torch.where(value == images[:, 1], 2 + red - blue, 4 + green - red)
    )
    sector = (sector + 6 * turn[:, None, None]) % 6
    # A third of the circle each, a channel stays at the value; then it falls by the spread, and rises again.
    kept = torch.stack([(sector - 3).abs() - 1, 2 - (sector - 2).abs(), 2 - (sector - 4).abs()], 1).clamp_(0, 1)
    return (value[:, None] - spread[:, None] * (1 - kept)).clamp_(0, 1)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards a blurred image; the outermost pixels stay, and images with a side below 3 altogether."""
    if min(images.shape[2:]) < 3:
        return images.clone()
    # A weight of 5 for the pixel and of 1 for each of its eight neighbours; four times as fast as a pooling layer.
    lines = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    squares = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
    blurred = images.clone()
    blurred[..., 1:-1, 1:-1] = (squares + 4 * images[..., 1:-1, 1:-1]) / 13
    return _blend(images, blurred, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    levels = _each(1 << bits.long()).float()
    return (images * levels).floor_().minimum(levels - 1) / levels


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= _each(threshold), 1 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    stretched: Tensor = V.autocontrast(images)
    return stretched


def equalize(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    equalized: Tensor = V.equalize(images)
    return equalized


# --- geometric --------------------------------------------------------------------------------------

# Nearest pixel and black outside, as torchvision's policies have it by default, and the papers (by way of PIL).


def shear_x(images: Tensor, slope: Tensor) -> Tensor:
    """Rows move to the left, each by `slope` pixels more than the one above; the image's upper edge stays."""
    x, y = _positions(images)
    return _nearest(images, x + slope[:, None, None] * (y + images.shape[2] / 2), y)


def shear_y(images: Tensor, slope: Tensor) -> Tensor:
    """Columns move up, each by `slope` pixels more than the one before; the image's left edge stays."""
    x, y = _positions(images)
    return _nearest(images, x, y + slope[:, None, None] * (x + images.shape[3] / 2))


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """To the right by whole pixels; fractions are cut off."""
    x, y = _positions(images)
    return _nearest(images, x - pixels.trunc()[:, None, None], y)


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Down by whole pixels; fractions are cut off."""
    x, y = _positions(images)
    return _nearest(images, x, y - pixels.trunc()[:, None, None])


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise around the middle."""
    x, y = _positions(images)
    angle = torch.deg2rad(degrees)[:, None, None]
    return _nearest(images, angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)


def _positions(images: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of the pixels, from the middle of the image."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    return x[None, None], y[None, :, None]


def _nearest(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The pixels nearest to positions that broadcast to (n, H, W), from the middle of the image; black outside.

    Positions half-way between two pixels, up to rounding errors, take the left or upper one. torchvision leaves these
    to the rounding errors (the diagonal of an image turned by 45 degrees, every fifth row of one sheared by 0.2).
    """
    count, channels, height, width = images.shape
    column = torch.ceil(x + ((width - 1) / 2 - 0.5001)).expand(count, height, width)
    row = torch.ceil(y + ((height - 1) / 2 - 0.5001)).expand(count, height, width)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row * width + column).where(inside, 0).long()
    taken = images.flatten(2).gather(2, index.view(count, 1, -1).expand(-1, channels, -1)).view(images.shape)
    return taken * inside[:, None]


# --- policies ---------------------------------------------------------------------------------------

Operation = Callable[[Tensor, Tensor], Tensor]

# In torchvision's order. TrivialAugmentWide and RandAugment choose from the same ones; they differ in the strengths.
OPERATIONS: dict[str, Operation | None] = {
    "Identity": None,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": lambda images, change: brightness(images, 1 + change),
    "Color": lambda images, change: saturation(images, 1 + change),
    "Contrast": lambda images, change: contrast(images, 1 + change),
    "Sharpness": lambda images, change: sharpness(images, 1 + change),
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
}


def magnitudes(policy: Literal["trivial_augment", "rand_augment"], size: tuple[int, int]) -> Tensor:
    """torchvision's strengths, float32 (2, 14, 31): of each operation in each bin, without and with the sign drawn
    negative (the same where an operation has no sign; 0 where it has no strength). size: (H, W) of the images.

    TrivialAugmentWide: Müller & Hutter 2021, arXiv 2103.10158. RandAugment: Cubuk et al. 2019, arXiv 1909.13719.
    """
    if policy == "trivial_augment":
        shear, across, down, angle, change, lost_bits = 0.99, 32.0, 32.0, 135.0, 0.99, 6
    else:
        across, down = (150.0 / 331.0 * side for side in reversed(size))
        shear, angle, change, lost_bits = 0.3, 30.0, 0.9, 4
    highest = {"ShearX": shear, "ShearY": shear, "TranslateX": across, "TranslateY": down, "Rotate": angle}
    highest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), change)
    signed = {name: torch.linspace(0.0, most, BINS) for name, most in highest.items()}
    unsigned = dict.fromkeys(OPERATIONS, torch.zeros(BINS)) | {
        "Posterize": (8 - torch.arange(BINS) / ((BINS - 1) / lost_bits)).round(),
        "Solarize": torch.linspace(1.0, 0.0, BINS),
    }
    negative = {name: -strength for name, strength in signed.items()}
    rows = [(unsigned | drawn)[name] for drawn in (signed, negative) for name in OPERATIONS]
    return torch.stack(rows).view(2, len(OPERATIONS), BINS)


def apply_policy(images: Tensor, draws: Tensor, strengths: Tensor, level: int | None) -> Tensor:
    """Images (B, 3, H, W) after one operation for each of the K rows of their draws, one after the other.

    draws: (B, K, 3) in [0, 1), on the CPU: operation, bin, sign (negative below 1/2). strengths: what `magnitudes`
    gives. level: the bin that is taken for all instead of the drawn one.
    """
    images = images.clone()
    for which, bin_, sign in (step.unbind(1) for step in draws.unbind(1)):
        operation = (which * len(OPERATIONS)).long()
        column = (bin_ * BINS).long() if level is None else torch.full_like(operation, level)
        _apply(images, list(OPERATIONS.values()), operation, strengths[(sign < 0.5).long(), operation, column])
    return images


JITTER: tuple[tuple[Operation, float], ...] = ((brightness, 1.0), (contrast, 1.0), (saturation, 1.0), (hue, 0.0))


def color_jitter(images: Tensor, draws: Tensor, spans: Sequence[float]) -> Tensor:
    """torchvision's ColorJitter for images (B, 3, H, W), with a random order of its four operations for each.

    spans: x for brightness, contrast and saturation, with factors from 1 - x to 1 + x, and for hue, with turns from -x
    to x. draws: (B, 8) in [0, 1), on the CPU: an amount for each of the four, and a key for each that they are ordered
    by.
    """
    used = [number for number, span in enumerate(spans) if span]
    operations = [JITTER[number][0] for number in used]
    amounts = torch.stack([JITTER[n][1] - spans[n] + 2 * spans[n] * draws[:, n] for n in used], 1)
    order = draws[:, [4 + number for number in used]].argsort(1)
    images = images.clone()
    for step in order.unbind(1):
        _apply(images, operations, step, amounts.gather(1, step[:, None])[:, 0])
    return images


def _apply(images: Tensor, operations: Sequence[Operation | None], chosen: Tensor, amount: Tensor) -> None:
    """Put each image (B, 3, H, W) through the operation with the number `chosen`, int64 (B,), in place.

    chosen, amount: on the CPU, where images are grouped: how many share an operation is known without a wait for the
    device.
    """
    counts = chosen.bincount(minlength=len(operations)).tolist()
    groups = machine.upload(chosen.argsort(stable=True), images.device)
    amount = machine.upload(amount, images.device)
    for operation, index in zip(operations, torch.split(groups, counts), strict=True):
        if operation is not None and len(index):
            images[index] = operation(images[index], amount[index])


# --- blanked rectangles -----------------------------------------------------------------------------


def rectangles(size: tuple[int, int], top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """bool (B, 1, H, W): rows from `top` to before `bottom`, columns from `left` to before `right`, all int64 (B,).

    What lies beyond the image is cut off.
    """
    row = torch.arange(size[0], device=top.device)[:, None]
    column = torch.arange(size[1], device=top.device)
    rows = (row >= _each(top)) & (row < _each(bottom))
    return rows & (column >= _each(left)) & (column < _each(right))


def cutout(draws: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Where a square of this side lies, bool (B, 1, H, W): its centre is any pixel, what lies beyond the image is cut
    off (DeVries & Taylor 2017, arXiv 1708.04552). draws: (B, 2) in [0, 1): row and column of the centre."""
    top = (draws[:, 0] * size[0]).long() - side // 2
    left = (draws[:, 1] * size[1]).long() - side // 2
    return rectangles(size, top, left, top + side, left + side)


def erasing(draws: Tensor, probability: float, size: tuple[int, int]) -> Tensor:
    """Where a random rectangle lies, bool (B, 1, H, W), nowhere in an image that is spared (Zhong et al. 2017, arXiv
    1708.04896): 2 to 33 % of the area, height / width from 0.3 to 3.3 (uniform in its logarithm), anywhere within.

    draws: (B, 5) in [0, 1): whether, area, ratio, top, left. torchvision's RandomErasing draws up to ten times until
    the rectangle is smaller than the image both ways. Here each side is cut to one pixel less than the image's, which
    happens to 6 rectangles in 1,000 at 32 pixels a side and to 4 at 128, the largest and longest ones.
    """
    whether, area, ratio, top, left = draws.unbind(1)
    height, width = size
    area = (0.02 + 0.31 * area) * (height * width)
    ratio = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * ratio)
    rows = (area * ratio).sqrt().round().clamp(max=height - 1)
    columns = (area / ratio).sqrt().round().clamp(max=width - 1)
    first_row = (top * (height - rows + 1)).long()
    first_column = (left * (width - columns + 1)).long()
    mask = rectangles(size, first_row, first_column, first_row + rows.long(), first_column + columns.long())
    return mask & (_each(whether) < probability)
