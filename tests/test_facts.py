"""What is known of images once their pixels were read: hashes, sums, and sums of squares, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from cifarlab.data import facts
from cifarlab.data.dataset import Dataset, Images
from cifarlab.data.facts import image_facts
from cifarlab.data.leaks import pixel_hashes
from cifarlab.data.prepare import prepare
from cifarlab.recipe_sections import Data


@pytest.mark.parametrize(("slice_bytes", "values"), [(4_000_000, 2**16), (1, 7), (1000, 63), (5000, 64)])
def test_facts_are_the_hashes_and_the_sums_however_much_is_read_at_a_time(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int, values: int
) -> None:
    monkeypatch.setattr(facts, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(facts, "VALUES", values)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
    found = image_facts(pixels)
    assert np.array_equal(found["hash"], pixel_hashes(pixels))
    assert np.array_equal(found["sums"], pixels.astype(np.int64).sum((2, 3)))
    assert np.array_equal(found["squares"], (pixels.astype(np.int64) ** 2).sum((2, 3)))


def test_large_white_images_overflow_nothing() -> None:
    # 257 * 257 squares of 255 are more than 32 bits hold.
    (found,) = image_facts(np.full((1, 3, 300, 257), 255, np.uint8))
    assert found["squares"].tolist() == [255 * 255 * 300 * 257] * 3
    assert found["sums"].tolist() == [255 * 300 * 257] * 3


def test_there_may_be_no_images() -> None:
    assert image_facts(np.empty((0, 3, 8, 8), np.uint8)).shape == (0,)


def test_what_is_on_record_is_not_read_again() -> None:
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 256, (60, 3, 8, 8), np.uint8), np.arange(60) % 3
    pixels[7] = pixels[4]  # twins: the hashes decide who is on which side
    whole = Dataset("made", ("a", "b", "c"), Images(pixels, labels), None, None, "a test")
    blank = Images(np.zeros_like(pixels), labels, image_facts(pixels))
    recorded = Dataset("made", ("a", "b", "c"), blank, None, None, "a test", recorded_hash=whole.content_hash())
    assert prepare(recorded, Data(), 0).record == prepare(whole, Data(), 0).record
