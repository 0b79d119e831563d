from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from cifarlab.data.digits import read_digits


def test_digits_are_scaled_enlarged_and_repeated_in_three_channels() -> None:
    digits = read_digits()
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.validation is None
    assert digits.test is None
    pixels = digits.train.pixels
    assert pixels.shape == (1797, 3, 32, 32)
    assert (pixels == pixels[:, :1]).all()
    assert np.array_equal(digits.train.labels, load_digits().target)
    assert np.bincount(digits.train.labels).min() == 174

    # Another library's bilinear enlargement of the original values, within the rounding to 8 bits.
    values = torch.from_numpy(load_digits().images)[:, None] * (255 / 16)
    expected = torch.nn.functional.interpolate(values, (32, 32), mode="bilinear", antialias=True)[:, 0].numpy()
    assert np.abs(pixels[:, 0] - expected).max() <= 1.5
    assert pixels.max() == 255


def test_digits_are_the_same_bytes_every_time() -> None:
    assert read_digits().content_hash() == read_digits().content_hash()
