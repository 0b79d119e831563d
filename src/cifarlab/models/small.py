"""The report's own networks. Layer names are what checkpoints and the layer table show."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def ex1(classes: int, size: int) -> nn.Module:
    """EX-1's small CNN: four 5x5 convolutions with padding 1, each with BN and ReLU, one max-pool between the pairs.

    Input (B, 3, size, size); for size 32 the sides are 30, 28, 14, 12, 10, and the features 24 x 10 x 10 = 2400.
    266,416 parameters for 100 classes at 32x32. Output: logits (B, classes).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate((12, 12, 24, 24), 1):
        layers |= _block(number, channels, width, kernel=5)
        channels = width
        if number == 2:
            layers["pool"] = nn.MaxPool2d(2)
    side = (size - 4) // 2 - 4
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels * side * side, classes)
    return nn.Sequential(layers)


def ex2(classes: int, size: int) -> nn.Module:
    """EX-2's wider CNN: three times 3x3 convolution, BN, ReLU, max-pool 2 (16, 32, 64 channels); two linear layers.

    Input (B, 3, size, size); at 128x128 the features are 64 x 16 x 16 = 16,384. 16,904,548 parameters for 100 classes
    at 128x128. Output: logits (B, classes).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate((16, 32, 64), 1):
        layers |= _block(number, channels, width, kernel=3)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = width
    side = size // 8
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels * side * side, 1024)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["head"] = nn.Linear(1024, classes)
    return nn.Sequential(layers)


def _block(number: int, inputs: int, outputs: int, kernel: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        [
            (f"conv{number}", nn.Conv2d(inputs, outputs, kernel, padding=1)),
            (f"bn{number}", nn.BatchNorm2d(outputs)),
            (f"relu{number}", nn.ReLU(inplace=True)),
        ]
    )
