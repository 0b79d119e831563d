"""The network of the CIFAR-10 speedruns: a whitening convolution, groups of 3x3 convolutions, one matrix.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), and the work that it builds on (Page's
DAWNBench entry; Balsam's hlb-CIFAR10).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 256, 256)
DEPTH = 2
# Images that the whitening convolution is fitted to: 5,000 x 31 x 31 patches, for a covariance of 12 x 12.
WHITENING_IMAGES = 5000


class WhiteningConv(nn.Conv2d):
    """A 2x2 convolution whose fixed filters turn patches of the training images into uncorrelated values.

    Each direction comes with both signs, as what follows is a rectifier of a kind: 24 filters. Only the bias trains.
    """

    def __init__(self, kernel_size: int = 2) -> None:
        super().__init__(3, 2 * 3 * kernel_size**2, kernel_size)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the filters: the eigenvectors of the patches' second moments over the root of (eigenvalue + eps).

        images: float32 (N, 3, H, W), as the network sees them in evaluation. Section 3.2 of the paper.
        """
        side = self.kernel_size[0]
        moments = torch.zeros(3 * side**2, 3 * side**2, dtype=torch.float64)
        count = 0
        for part in torch.split(images, 500):  # on the CPU and in parts: the patches of all are gigabytes at 128x128
            patches = F.unfold(part.float().cpu(), side).transpose(1, 2).reshape(-1, 3 * side**2).double()
            moments += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(moments / count)
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, 3, side, side)
        self.weight.copy_(torch.cat([filters, -filters]))


class _BatchNorm(nn.BatchNorm2d):
    """Without a scale, as what follows it is made independent of it; statistics that forget quickly."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class _Head(nn.Linear):
    """Logits over the number of features, from weights of standard deviation 1; no bias."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight /= self.weight.std()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.in_features


class _Maximum(nn.Module):
    """The maximum of each channel: (B, C, H, W) to (B, C)."""

    def forward(self, features: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # The backward of `amax` looks for the values that equal the maximum. Compiled in bf16 it finds none, as
            # what was rounded when the maximum was taken is computed anew, unrounded: 0 / 0. This remembers the place.
            return features.flatten(2).max(2).values
        return features.amax((2, 3))


def racing(classes: int, size: int, widths: Sequence[int] = WIDTHS, depths: Sequence[int] | None = None) -> nn.Module:
    """Whitening, groups of 3x3 convolutions with a max-pool after their first, the maximum of each channel, one matrix.

    Input (B, 3, size, size), output: logits (B, classes). At 32x32 the sides are 31, 15, 7, 3. 3x3 convolutions begin
    as the identity on their first channels (dirac). `fit_whitening` must see the training images first.
    depths: convolutions of each group, 2 (all of them where None) or 3. Of three, the last two are a residual block,
    as in airbench95 and airbench96 of the same author.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["whiten"] = whiten = WhiteningConv()
    layers["gelu"] = nn.GELU()
    channels = whiten.out_channels
    for number, (width, depth) in enumerate(zip(widths, depths or [DEPTH] * len(widths), strict=True), 1):
        layers[f"group{number}"] = _group(channels, width, depth)
        channels = width
    layers["maximum"] = _Maximum()
    layers["head"] = _Head(channels, classes)
    return nn.Sequential(layers)


def _group(inputs: int, width: int, depth: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = _convolution(inputs, width)
    layers["pool"] = nn.MaxPool2d(2)
    layers["norm1"] = _BatchNorm(width)
    layers["gelu1"] = nn.GELU()
    if depth > DEPTH:
        layers["residual"] = _Residual(width)
    else:
        layers["conv2"] = _convolution(width, width)
        layers["norm2"] = _BatchNorm(width)
    layers["gelu2"] = nn.GELU()
    return nn.Sequential(layers)


class _Residual(nn.Module):
    """x + norm(conv(gelu(norm(conv(x))))): (B, width, H, W) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv2 = _convolution(width, width)
        self.norm2 = _BatchNorm(width)
        self.gelu = nn.GELU()
        self.conv3 = _convolution(width, width)
        self.norm3 = _BatchNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.gelu(self.norm2(self.conv2(features)))
        outer: Tensor = features + self.norm3(self.conv3(inner))
        return outer


class _Convolution(nn.Conv2d):
    """3x3, as large as its input; on the CPU the tiny maps that small images end in are one matrix product.

    On maps of 2x2 each output sees each input: a matrix of (4 outputs, 4 inputs) blocks of the kernel. oneDNN takes
    several times as long for these as for that matrix (docs/speed.md), most of it for padding.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        images, _, height, width = input.shape
        if input.device.type != "cpu" or max(height, width) > 2:
            return super().forward(input)
        kernel = self.weight
        if torch.is_autocast_enabled("cpu"):  # before the copies, which are half as large for it
            kernel = kernel.to(torch.get_autocast_dtype("cpu"))
        kernel = kernel.permute(0, 2, 3, 1)
        rows = [
            kernel[:, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
            for row in range(height)
            for column in range(width)
        ]
        matrix = torch.stack(rows).flatten(0, 1).flatten(1)
        output = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix)
        return output.view(images, height, width, -1).permute(0, 3, 1, 2)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = _Convolution(inputs, outputs)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def fit_whitening(model: nn.Module, images: Callable[[], Tensor]) -> None:
    """Fit the network's whitening convolutions, if it has any, to images as they are in evaluation."""
    for module in model.modules():
        if isinstance(module, WhiteningConv):
            module.fit(images())


def whitening_biases(model: nn.Module) -> dict[str, Tensor]:
    """By their names."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, WhiteningConv))
    return {f"{name}.bias": module.bias for name, module in found if module.bias is not None}
