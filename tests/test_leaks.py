from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cifarlab.data.dataset import Images, Int64Array, UInt8Array
from cifarlab.data.leaks import (
    Hashed,
    Pair,
    duplicate_groups,
    leak_report,
    near_duplicates,
    pair_sheet,
    pixel_hashes,
    twins,
)


def textures(count: int, seed: int = 0, side: int = 32) -> UInt8Array:
    """Smooth random pictures: noise of 6x6 enlarged, so that a thumbnail keeps what is in them."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)
    large = [np.asarray(Image.fromarray(n).resize((side, side), Image.Resampling.BICUBIC)) for n in noise]
    return np.stack(large).transpose(0, 3, 1, 2)


def hashed(ids: list[int], labels: list[int]) -> Hashed:
    """Hashes as if image `i` had the pixels of picture `ids[i]`."""
    pictures = np.array(ids, np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    return Hashed(pixel_hashes(pictures), np.array(labels, np.int64))


# ----------------------------------------------------------------- exact duplicates


def test_a_hash_is_the_blake2b_digest_of_the_images_bytes() -> None:
    pixels = textures(3)
    hashes = pixel_hashes(pixels)
    assert hashes.shape == (3, 2)
    assert hashes.dtype == np.uint64
    expected = hashlib.blake2b(pixels[1].tobytes(), digest_size=16).digest()
    assert hashes[1].astype("<u8").tobytes() == expected


def test_a_memory_map_longer_than_a_slice_hashes_as_the_array_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 3, 2, 2), np.uint8)
    pixels.tofile(tmp_path / "pixels")
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=pixels.shape)
    assert np.array_equal(pixel_hashes(mapped), pixel_hashes(pixels))
    assert len(np.unique(pixel_hashes(pixels), axis=0)) == 5000


def test_one_grey_level_in_one_pixel_is_another_image() -> None:
    pixels = np.repeat(textures(1), 2, axis=0)
    pixels[1, 2, 31, 31] ^= 1
    assert duplicate_groups(pixel_hashes(pixels)).tolist() == [0, 1]


def test_a_group_is_named_by_the_position_of_its_first_image() -> None:
    groups = duplicate_groups(hashed([5, 3, 5, 7, 3, 5], [0] * 6).hashes)
    assert groups.tolist() == [0, 1, 0, 3, 1, 0]
    assert groups.dtype == np.int64
    assert duplicate_groups(np.empty((0, 2), np.uint64)).tolist() == []


def test_twins_are_the_images_of_the_first_that_are_in_the_second() -> None:
    assert twins(hashed([1, 2, 3, 2], [0] * 4).hashes, hashed([2, 9], [0, 0]).hashes).tolist() == [1, 3]


def test_the_report_counts_by_part_and_by_conflict_of_labels() -> None:
    report = leak_report(
        train=hashed([1, 1, 2, 3, 3, 4], [0, 0, 1, 2, 3, 4]),
        validation=hashed([1, 9, 3], [0, 0, 2]),
        test=hashed([8, 2, 9, 4, 1], [0, 0, 0, 4, 5]),
    )
    assert report == {
        "within_train": {"images": 4, "conflicting_labels": 2},
        "train_validation": {"images": 2, "conflicting_labels": 1},
        "train_test": {"images": 3, "conflicting_labels": 2},
        "validation_test": {"images": 2, "conflicting_labels": 1},
        "test_twins_in_train": [1, 3, 4],
    }
    assert json.loads(json.dumps(report)) == report


def test_a_missing_part_is_null_and_not_zero() -> None:
    report = leak_report(hashed([1, 2], [0, 1]), None, None)
    assert report["within_train"] == {"images": 0, "conflicting_labels": 0}
    assert report["train_validation"] is report["train_test"] is report["validation_test"] is None
    assert report["test_twins_in_train"] is None


images = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=15)


@given(images, images, images)
def test_the_report_agrees_with_counting_pair_by_pair(
    a: list[tuple[int, int]], b: list[tuple[int, int]], c: list[tuple[int, int]]
) -> None:
    report = leak_report(*(hashed([i for i, _ in part], [label for _, label in part]) for part in (a, b, c)))

    def count(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> dict[str, int]:
        found = [[twin for i, twin in first if i == picture] for picture, _ in second]
        conflicts = [any(twin != label for twin in labels) for labels, (_, label) in zip(found, second, strict=True)]
        return {"images": sum(map(bool, found)), "conflicting_labels": sum(conflicts)}

    assert report["train_validation"] == count(a, b)
    assert report["train_test"] == count(a, c)
    assert report["validation_test"] == count(b, c)
    others = [[twin for j, (i, twin) in enumerate(a) if i == picture and j != k] for k, (picture, _) in enumerate(a)]
    assert report["within_train"] == {
        "images": sum(map(bool, others)),
        "conflicting_labels": sum(any(t != label for t in o) for o, (_, label) in zip(others, a, strict=True)),
    }


# ----------------------------------------------------------------- near duplicates


def changed(pixels: UInt8Array, kind: str) -> UInt8Array:
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if kind == "scaled":
        image = image.resize((24, 24), Image.Resampling.BILINEAR).resize((32, 32), Image.Resampling.BILINEAR)
    elif kind == "cropped":
        image = image.resize((32, 32), Image.Resampling.BICUBIC, box=(1, 0, 32, 31))
    elif kind == "darker":
        image = image.point(lambda value: value * 0.6 + 5)
    elif kind == "noisy":
        noise = np.random.default_rng(0).normal(0, 8, (32, 32, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", ["equal", "scaled", "cropped", "darker", "noisy"])
def test_a_changed_copy_is_found_and_nothing_else(kind: str) -> None:
    b = textures(300)
    a = textures(20, seed=1)
    a[[3, 11]] = changed(b[250], kind), changed(b[7], kind)
    assert {(pair.a, pair.b) for pair in near_duplicates(a, b)} == {(3, 250), (11, 7)}


def test_the_similarity_is_the_cosine_of_thumbnails_less_their_local_mean() -> None:
    a, b = textures(2), textures(3, seed=1)

    def thumbnail(image: UInt8Array) -> NDArray[np.float64]:
        small = image.reshape(3, 16, 2, 16, 2).mean((2, 4))
        detail = np.empty_like(small)
        for y in range(16):
            for x in range(16):
                around = small[:, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4]
                detail[:, y, x] = small[:, y, x] - around.mean((1, 2))
        row: NDArray[np.float64] = detail.ravel() / np.linalg.norm(detail)
        return row

    expected = np.array([[thumbnail(x) @ thumbnail(y) for y in b] for x in a])
    pairs = near_duplicates(a, b, threshold=-1.0)
    assert sorted((p.a, p.b) for p in pairs) == list(enumerate(expected.argmax(axis=1).tolist()))
    for pair in pairs:
        assert pair.similarity == pytest.approx(expected[pair.a, pair.b], abs=1e-4)


def test_chunks_do_not_change_the_pairs_and_the_best_come_first() -> None:
    b = textures(50)
    a = b[::-1][:23].copy()
    a[::2] = np.stack([changed(image, "scaled") for image in a[::2]])
    whole = near_duplicates(a, b)
    assert [(p.a, p.b) for p in near_duplicates(a, b, chunk=5)] == [(p.a, p.b) for p in whole]
    assert len(whole) == 23
    similarity = [pair.similarity for pair in whole]
    assert similarity == sorted(similarity, reverse=True)


def test_images_too_flat_to_compare_are_in_no_pair() -> None:
    flat = np.full((4, 3, 32, 32), 200, np.uint8)
    flat[1] += np.random.default_rng(0).integers(0, 3, flat[1].shape, np.uint8)
    flat[2] = np.arange(32, dtype=np.uint8)[:, None]
    assert near_duplicates(flat[:3], flat, threshold=0.1) == []
    flat[3] = textures(1)[0]
    assert [(p.a, p.b) for p in near_duplicates(flat, flat)] == [(3, 3)]


@pytest.mark.parametrize(("side", "other"), [(32, 50), (28, 32), (8, 32), (96, 33)])
def test_the_same_picture_at_another_size_is_found(side: int, other: int) -> None:
    small = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)

    def at(size: int) -> UInt8Array:
        large = [np.asarray(Image.fromarray(n).resize((size, size), Image.Resampling.BICUBIC)) for n in small]
        return np.stack(large).transpose(0, 3, 1, 2)

    pairs = near_duplicates(at(side), at(other))
    assert {(p.a, p.b) for p in pairs} == {(i, i) for i in range(40)}


def test_nothing_is_near_an_empty_set() -> None:
    empty = np.empty((0, 3, 32, 32), np.uint8)
    assert near_duplicates(textures(2), empty) == near_duplicates(empty, textures(2)) == []


def test_the_sheet_shows_both_pictures_of_every_pair(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
    a = Images(np.tile(colours[:2, :, None, None], (1, 1, 32, 32)), np.array([0, 1]))
    b = Images(np.tile(colours[2:, :, None, None], (1, 1, 32, 32)), np.array([0, 0]))
    path = tmp_path / "pairs.png"
    pair_sheet(a, b, [Pair(0, 1, 0.99), Pair(1, 0, 0.9), *[Pair(0, 0, 0.85)] * 4], ["cat", "dög"], path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.png"]
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        drawn = np.asarray(sheet).astype(int)
    assert drawn.shape == (8 + 2 * 130, 8 + 5 * 200, 3)
    for cell, (first, second) in enumerate([(0, 3), (1, 2), (0, 2)]):
        assert drawn[80, 8 + 200 * cell + 48].tolist() == colours[first].tolist()
        assert drawn[80, 8 + 200 * cell + 96 + 48].tolist() == colours[second].tolist()
    # The second label is red where it differs from the first, as in the second pair only.
    names = drawn[20:34]
    red = (names[..., 0] > names[..., 1] + 100).reshape(14, -1)[:, 8:].reshape(14, 5, 200).any(axis=(0, 2))
    assert red.tolist() == [False, True, False, False, False]


def test_a_sheet_of_no_pairs_is_refused(tmp_path: Path) -> None:
    part = Images(textures(1), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="no pairs"):
        pair_sheet(part, part, [], ["cat"], tmp_path / "pairs.png")


# ----------------------------------------------------------------- the real thing


def read_cifar10(folder: Path, names: list[str]) -> tuple[UInt8Array, Int64Array]:
    batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
    pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return pixels, np.concatenate([batch[b"labels"] for batch in batches]).astype(np.int64)


def test_on_cifar10_the_default_threshold_flags_about_as_many_as_were_found_by_eye() -> None:
    folder = Path(os.environ.get("CIFARLAB_DATA", "")) / "cifar-10-batches-py"
    if not folder.is_dir():
        pytest.skip("needs the real CIFAR-10: CIFARLAB_DATA names the folder that holds cifar-10-batches-py")
    train, _ = read_cifar10(folder, [f"data_batch_{i}" for i in range(1, 6)])
    test, _ = read_cifar10(folder, ["test_batch"])
    # A fifth of the test set, to be quick: 286 of 10,000 have a duplicate in training (Barz and Denzler, 2020).
    share = len(near_duplicates(test[::5], train)) / len(test[::5])
    assert 0.02 < share < 0.04
    # CIFAR-10 has near duplicates but no exact ones.
    assert len(twins(pixel_hashes(test), pixel_hashes(train))) == 0
