"""From a dataset to the three sides of a run: who is where, what is measured, and what the record says of it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifarlab.data.dataset import Dataset, Images, Int64Array
from cifarlab.data.prepare import Part, Prepared, prepare
from cifarlab.errors import DataError, RecipeError
from cifarlab.recipe_sections import Data

CLASSES = ("cat", "dog", "emu")


def images(count: int, seed: int, side: int = 4, classes: int = 3) -> Images:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 3, side, side), np.uint8)
    return Images(pixels, np.arange(count, dtype=np.int64) % classes)


def dataset(
    train: Images | None = None, validation: Images | None = None, test: Images | None = None, **values: Any
) -> Dataset:
    values = {"name": "made", "classes": CLASSES, "source": "a test", **values}
    return Dataset(train=images(300, 1) if train is None else train, validation=validation, test=test, **values)


def joined(*parts: Images) -> Images:
    return Images(np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]))


def pictures(part: Part) -> set[bytes]:
    return {part.images.pixels[i].tobytes() for i in part.index}


def sides(prepared: Prepared) -> list[Part]:
    return [part for part in (prepared.train, prepared.validation, prepared.test) if part is not None]


def assert_no_picture_on_two_sides(prepared: Prepared) -> None:
    found = [pictures(part) for part in sides(prepared)]
    assert sum(map(len, found)) == len(set().union(*found))


# --- who is where -----------------------------------------------------------------------------------


def test_with_a_test_set_only_the_training_images_are_split() -> None:
    data = dataset(test=images(60, 2))
    prepared = prepare(data, Data(validation=0.1), seed=0)
    assert prepared.test.images is data.test
    np.testing.assert_array_equal(prepared.test.index, np.arange(60))
    assert prepared.validation is not None
    assert prepared.train.images is prepared.validation.images is data.train
    together = np.concatenate([prepared.train.index, prepared.validation.index])
    np.testing.assert_array_equal(np.sort(together), np.arange(300))
    np.testing.assert_array_equal(np.bincount(prepared.validation.labels), [10, 10, 10])
    for part in sides(prepared):
        assert part.index.dtype == np.int64
        assert (np.diff(part.index) > 0).all()
    assert_no_picture_on_two_sides(prepared)


def test_without_a_test_set_a_fifth_is_held_out_the_same_whatever_the_seed() -> None:
    first, second = (prepare(dataset(), Data(validation=0.1), seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.test.index, second.test.index)
    np.testing.assert_array_equal(np.bincount(first.test.labels), [20, 20, 20])
    for prepared in (first, second):
        together = np.concatenate([part.index for part in sides(prepared)])
        np.testing.assert_array_equal(np.sort(together), np.arange(300))
        assert prepared.record["images"] == {"train": 216, "validation": 24, "test": 60}
        assert prepared.record["notes"] == ["the source has no test set: 60 images (20%) are held out as one"]
    # Neither does it hang on any other choice of the recipe.
    for section in (Data(validation=0.5), Data(validation=0), Data(validation=0.1, limit=30)):
        np.testing.assert_array_equal(prepare(dataset(), section, 7).test.index, first.test.index)


def test_the_validation_set_is_a_function_of_the_seed() -> None:
    parts = [prepare(dataset(test=images(60, 2)), Data(validation=0.1), seed).validation for seed in (0, 1, 0)]
    first, second, again = (part.index for part in parts if part is not None)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_without_validation_all_the_rest_is_for_training() -> None:
    prepared = prepare(dataset(), Data(validation=0), seed=0)
    assert prepared.validation is None
    assert len(prepared.train) == 240
    assert prepared.record["images"]["validation"] == 0
    assert prepared.record["index_hashes"]["validation"] is None
    assert prepared.record["leaks"]["train_validation"] is None
    # Validation images of the source's own are not touched either.
    own = prepare(dataset(validation=images(30, 3), test=images(60, 2)), Data(validation=0), seed=0)
    assert own.validation is None
    assert len(own.train) == 300


def test_a_limit_cuts_the_training_side_only() -> None:
    whole = prepare(dataset(), Data(validation=0.1), seed=3)
    for limit in (3, 31, 216):
        cut = prepare(dataset(), Data(validation=0.1, limit=limit), seed=3)
        assert cut.validation is not None
        assert whole.validation is not None
        np.testing.assert_array_equal(cut.validation.index, whole.validation.index)
        np.testing.assert_array_equal(cut.test.index, whole.test.index)
        assert np.isin(cut.train.index, whole.train.index).all()
        assert len(cut.train) == limit
        assert np.ptp(np.bincount(cut.train.labels, minlength=3)) <= 1
    with pytest.raises(RecipeError, match=r"data\.limit is 217, but there are 216 training images"):
        prepare(dataset(), Data(validation=0.1, limit=217), seed=3)


def test_validation_images_of_the_source_stay_and_their_twins_leave_training() -> None:
    fresh, repeated = images(20, 3), images(300, 1).take(np.array([5, 50, 250]))
    own = joined(fresh, repeated)
    data = dataset(validation=own, test=images(60, 2))
    for seed in (0, 1):
        prepared = prepare(data, Data(validation=0.5), seed)
        assert prepared.validation is not None
        assert prepared.validation.images is own
        np.testing.assert_array_equal(prepared.validation.index, np.arange(23))
        np.testing.assert_array_equal(prepared.train.index, np.delete(np.arange(300), [5, 50, 250]))
        assert prepared.record["notes"] == ["3 training images left out: they stand in the validation set too"]
        assert prepared.record["leaks"]["train_validation"] == {"images": 0, "conflicting_labels": 0}
        assert_no_picture_on_two_sides(prepared)


def test_own_validation_images_and_a_held_out_test_set_go_together() -> None:
    prepared = prepare(dataset(validation=images(30, 3)), Data(validation=0.1), seed=0)
    assert prepared.record["images"] == {"train": 240, "validation": 30, "test": 60}
    assert_no_picture_on_two_sides(prepared)


def test_where_every_training_image_is_a_validation_image_nothing_is_left_and_a_sentence_says_so() -> None:
    copied = dataset(validation=images(300, 1), test=images(60, 2))
    with pytest.raises(DataError, match="no image is left to train on: each one of a test stand"):
        prepare(copied, Data(validation=0.1), seed=0)
    assert len(prepare(copied, Data(validation=0), seed=0).train) == 300


@pytest.mark.parametrize("seed", range(5))
def test_exact_duplicates_never_stand_on_two_sides_of_a_split(seed: int) -> None:
    base = images(90, 1)
    generator = np.random.default_rng(seed)
    copies = base.take(generator.integers(0, 90, 120))
    order = generator.permutation(210)
    train = joined(base, copies).take(order)
    for section in (Data(validation=0.2), Data(validation=0.2, limit=50), Data(validation=0)):
        prepared = prepare(dataset(train), section, seed)
        assert_no_picture_on_two_sides(prepared)
        for leak in ("train_validation", "train_test", "validation_test"):
            found = prepared.record["leaks"][leak]
            assert found is None or found["images"] == 0


def test_duplicates_that_a_source_brings_are_kept_and_counted() -> None:
    train = images(300, 1)
    test = joined(images(50, 2), train.take(np.array([0, 1, 2, 3])))
    test.labels[-1] += 1  # the fourth under another label
    prepared = prepare(dataset(train, test=test), Data(validation=0.1), seed=0)
    leaks = prepared.record["leaks"]
    assert prepared.validation is not None
    in_validation = int(np.isin([0, 1, 2, 3], prepared.validation.index).sum())
    assert leaks["validation_test"]["images"] == in_validation
    assert leaks["train_test"]["images"] == 4 - in_validation
    assert leaks["train_test"]["conflicting_labels"] + leaks["validation_test"]["conflicting_labels"] == 1
    assert len(prepared.test) == 54


def test_a_part_takes_labels_from_its_images_by_index() -> None:
    part = Part(images(9, 1), np.array([0, 4, 8]))
    assert len(part) == 3
    np.testing.assert_array_equal(part.labels, [0, 1, 2])


# --- mean and standard deviation --------------------------------------------------------------------


def reference(part: Part) -> tuple[Any, Any]:
    pixels = part.images.pixels[part.index].astype(np.float64) / 255
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))


@pytest.mark.parametrize("section", [Data(validation=0.1), Data(validation=0.3, limit=30), Data(validation=0)])
def test_mean_and_standard_deviation_are_those_of_the_training_side_alone(section: Data) -> None:
    train = images(300, 1, side=5)
    train.pixels[:, 1] //= 3  # channels that differ
    train.pixels[:, 2] //= 60
    train.pixels[np.arange(0, 300, 7)] = 0
    train.pixels[np.arange(0, 300, 7), 0, 0, 0] = np.arange(43)  # still no two alike
    prepared = prepare(dataset(train), section, seed=0)
    mean, std = reference(prepared.train)
    np.testing.assert_allclose(prepared.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(prepared.std, std, rtol=1e-12)
    assert prepared.record["mean"] == list(prepared.mean)
    assert prepared.record["std"] == list(prepared.std)


def test_large_images_are_measured_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    train = images(40, 1, side=30)
    whole = prepare(dataset(train), Data(), seed=0)
    for slice_bytes in (1, 3 * 30 * 30 * 7, 10**9):
        monkeypatch.setattr("cifarlab.data.facts.SLICE_BYTES", slice_bytes)
        prepared = prepare(dataset(train), Data(), seed=0)
        assert (prepared.mean, prepared.std) == (whole.mean, whole.std)  # to the last bit
    np.testing.assert_allclose(whole.std, reference(whole.train)[1], rtol=1e-12)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_channel_that_never_changes_is_divided_by_one(value: int) -> None:
    train = images(300, 1)
    train.pixels[:, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(dataset(train), Data(), seed=0)
    assert prepared.mean[1] == pytest.approx(value / 255, rel=1e-15)
    assert prepared.std[1] == 1.0
    assert prepared.std[0] == pytest.approx(reference(prepared.train)[1][0], rel=1e-12)


def test_a_channel_that_hardly_changes_has_its_own_small_deviation() -> None:
    train = images(300, 1)
    train.pixels[:, 1] = 200
    train.pixels[::2, 1, 0, 0] = 201
    prepared = prepare(dataset(train), Data(), seed=0)
    np.testing.assert_allclose(prepared.std, reference(prepared.train)[1], rtol=1e-9)


# --- the record -------------------------------------------------------------------------------------


def hash_by_hand(index: Int64Array) -> str:
    return hashlib.sha256(b"".join(int(i).to_bytes(8, "little", signed=True) for i in index)).hexdigest()


@pytest.mark.parametrize("validation", [0.1, 0])
def test_the_record_is_json_and_its_figures_can_be_checked_by_hand(validation: float) -> None:
    data = dataset(notes=("3 files left out",))
    prepared = prepare(data, Data(validation=validation), seed=0)
    record = prepared.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    parts = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    assert record["images"] == {name: 0 if part is None else len(part) for name, part in parts.items()}
    assert record["index_hashes"] == {
        name: None if part is None else hash_by_hand(part.index) for name, part in parts.items()
    }
    assert record["content_hash"] == data.content_hash()
    assert record["notes"][0] == "3 files left out"
    assert (record["dataset"], record["source"]) == ("made", "a test")
    assert prepared.classes == CLASSES


def test_the_record_hashes_tell_the_same_split_from_another() -> None:
    hashes = [prepare(dataset(), Data(validation=0.1), seed).record["index_hashes"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1]
    assert hashes[0]["test"] == hashes[2]["test"]
    assert hashes[0]["validation"] != hashes[2]["validation"]


# --- content hash -----------------------------------------------------------------------------------


def test_equal_data_has_an_equal_hash_wherever_and_however_it_is_stored(tmp_path: Path) -> None:
    plain = dataset(validation=images(30, 3), test=images(60, 2))
    expected = plain.content_hash()
    other = dataset(validation=images(30, 3), test=images(60, 2), name="other", source="elsewhere", notes=("a note",))
    assert other.content_hash() == expected
    (tmp_path / "pixels").write_bytes(plain.train.pixels.tobytes())
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=plain.train.pixels.shape)
    strided = np.asarray(plain.train.pixels.transpose(2, 3, 1, 0), order="C").transpose(3, 2, 0, 1)
    for pixels in (mapped, strided):
        again = dataset(Images(pixels, plain.train.labels), plain.validation, plain.test)
        assert again.content_hash() == expected


CHANGES: dict[str, Callable[[Dataset], Dataset]] = {
    "a pixel": lambda data: dataset(changed(data.train, pixel=(299, 2, 3, 3)), data.validation, data.test),
    "a label": lambda data: dataset(changed(data.train, label=299), data.validation, data.test),
    "a pixel of validation": lambda data: dataset(data.train, changed(data.validation, pixel=(0, 0, 0, 0)), data.test),
    "a label of the test set": lambda data: dataset(data.train, data.validation, changed(data.test, label=0)),
    "a class name": lambda data: dataset(data.train, data.validation, data.test, classes=("cat", "dog", "emus")),
    "the order of classes": lambda data: dataset(data.train, data.validation, data.test, classes=("dog", "cat", "emu")),
    "no validation": lambda data: dataset(data.train, None, data.test),
    "no test set": lambda data: dataset(data.train, data.validation, None),
    "parts that changed places": lambda data: dataset(data.train, data.test, data.validation),
    "one image less": lambda data: dataset(data.train.take(np.arange(299)), data.validation, data.test),
    "the order of images": lambda data: dataset(data.train.take(np.arange(300)[::-1]), data.validation, data.test),
}


def changed(part: Images | None, pixel: tuple[int, ...] | None = None, label: int | None = None) -> Images:
    assert part is not None
    pixels, labels = part.pixels.copy(), part.labels.copy()
    if pixel is not None:
        pixels[pixel] ^= 1
    if label is not None:
        labels[label] = (labels[label] + 1) % 3
    return Images(pixels, labels)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_any_change_of_the_data_changes_the_hash(change: Callable[[Dataset], Dataset]) -> None:
    data = dataset(validation=images(30, 3), test=images(60, 2))
    assert change(data).content_hash() != data.content_hash()


# --- the real thing ---------------------------------------------------------------------------------


def test_real_cifar10_is_split_as_everybody_expects() -> None:
    from cifarlab.data.cifar import read_cifar

    folder = os.environ.get("CIFARLAB_DATA")
    if not folder:
        pytest.skip("CIFARLAB_DATA does not name a folder with the real CIFAR")
    data = read_cifar("cifar10", Path(folder))
    if data is None:
        pytest.skip("no whole cifar10 in CIFARLAB_DATA")
    prepared = prepare(data, Data(validation=0.1), seed=0)
    assert prepared.record["images"] == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert prepared.validation is not None
    np.testing.assert_array_equal(np.bincount(prepared.validation.labels), [500] * 10)
    np.testing.assert_array_equal(np.bincount(prepared.train.labels), [4500] * 10)
    # What the field writes for all 50,000 images: (0.4914, 0.4822, 0.4465) and (0.2470, 0.2435, 0.2616).
    np.testing.assert_allclose(prepared.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(prepared.std, (0.2470, 0.2435, 0.2616), atol=1e-3)
    assert prepared.record["leaks"]["train_validation"]["images"] == 0
