"""scikit-learn's handwritten digits: 1,797 real images that need no download."""

from __future__ import annotations

import numpy as np

from cifarlab.data.dataset import Dataset, Images


def read_digits() -> Dataset:
    """The digits as a Dataset without a test set: uint8 (1797, 3, 32, 32), classes "0" to "9".

    They are 8x8 counts from 0 to 16, here scaled to 0 to 255, enlarged (bilinear) and repeated in three channels.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test set), https://doi.org/10.24432/C50P49.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in small]
    pixels = np.repeat(np.stack(large)[:, None], 3, axis=1)
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=Images(pixels, bunch.target.astype(np.int64)),
        validation=None,
        test=None,
        source="scikit-learn's digits (8x8, enlarged to 32x32)",
    )
