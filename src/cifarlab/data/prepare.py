"""From a dataset as it was found to what one run trains on, validates on and is tested on, with the leak check."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifarlab.data.dataset import Dataset, Images, Int64Array, let_go
from cifarlab.data.facts import Facts, image_facts
from cifarlab.data.leaks import Hashed, duplicate_groups, leak_report, twins
from cifarlab.data.split import balanced_limit, stratified_split
from cifarlab.errors import DataError
from cifarlab.recipe_sections import Data

TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a dataset's images: int64 (K,) indices, sorted, into images as they were found."""

    images: Images
    index: Int64Array

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Int64Array:
        """int64 (K,)"""
        return self.images.labels[self.index]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The three sides of a run. `record` is what the run folder keeps of them, JSON-ready."""

    classes: tuple[str, ...]
    train: Part
    validation: Part | None
    test: Part
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict[str, Any]


def prepare(dataset: Dataset, section: Data, seed: int) -> Prepared:
    """Split, check for leaks, limit, and measure the training images' mean and standard deviation.

    A dataset without a test set has 20 % of its images held out, the same ones whatever the seed, so that runs that
    differ by seed are scored on the same images. The validation set is a function of the seed; `data.limit` cuts the
    training side only, so runs with different limits are validated on the same images. Exact duplicates never stand on
    both sides of a split of ours; where a dataset brings its own validation images, those stay and their twins leave
    the training side.
    """
    images = dataset.train
    with ThreadPoolExecutor(1) as beside:
        content_hash = beside.submit(dataset.content_hash)
        facts = _facts(images)
        hashes = facts["hash"]
    groups = duplicate_groups(hashes)
    index = np.arange(len(images), dtype=np.int64)
    notes = list(dataset.notes)

    if dataset.test is not None:
        test = _whole(dataset.test)
        test_hashes = _facts(dataset.test)["hash"]
    else:
        index, held_out = stratified_split(images.labels, groups, TEST_SHARE, seed=0, purpose="test-split")
        test, test_hashes = Part(images, held_out), hashes[held_out]
        notes.append(f"the source has no test set: {len(held_out):,} images ({TEST_SHARE:.0%}) are held out as one")

    validation: Part | None = None
    if section.validation == 0 and dataset.validation is not None:
        notes.append(f"data.validation is 0: the source's {len(dataset.validation):,} validation images are not used")
    if section.validation > 0 and dataset.validation is not None:
        validation = _whole(dataset.validation)
        validation_hashes = _facts(dataset.validation)["hash"]
        repeated = twins(hashes[index], validation_hashes)
        if len(repeated):
            notes.append(f"{len(repeated):,} training images left out: they stand in the validation set too")
            index = np.delete(index, repeated)
        if not len(index):
            raise DataError(
                f"no image is left to train on: each one of {dataset.source} stands in its validation set too; "
                "keep it in one of the two"
            )
    elif section.validation > 0:
        kept, held_out = stratified_split(
            images.labels[index], groups[index], section.validation, seed=seed, purpose="validation-split"
        )
        validation, validation_hashes = Part(images, index[held_out]), hashes[index[held_out]]
        index = index[kept]

    if section.limit is not None:
        index = balanced_limit(images.labels, index, section.limit, seed)
    train = Part(images, index)
    mean, std = _mean_and_std(facts, index, values=images.pixels[0, 0].size)
    let_go(facts)
    leaks = leak_report(
        Hashed(hashes[index], train.labels),
        Hashed(validation_hashes, validation.labels) if validation is not None else None,
        Hashed(test_hashes, test.labels),
    )
    parts = {"train": train, "validation": validation, "test": test}
    record = {
        "dataset": dataset.name,
        "source": dataset.source,
        "content_hash": content_hash.result(),
        "notes": notes,
        "images": {name: 0 if part is None else len(part) for name, part in parts.items()},
        "index_hashes": {name: None if part is None else _index_hash(part) for name, part in parts.items()},
        "leaks": leaks,
        "mean": list(mean),
        "std": list(std),
    }
    return Prepared(dataset.classes, train, validation, test, mean, std, record)


def _whole(images: Images) -> Part:
    return Part(images, np.arange(len(images), dtype=np.int64))


def _index_hash(part: Part) -> str:
    """SHA-256 of the indices, little-endian int64."""
    return hashlib.sha256(part.index.astype("<i8").tobytes()).hexdigest()


def _facts(images: Images) -> Facts:
    return images.facts if images.facts is not None else image_facts(images.pixels)


def _mean_and_std(facts: Facts, index: Int64Array, values: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, for pixels in [0, 1]; from integer sums, so the same to the last bit on every machine.

    values: how many a channel of an image has.
    """
    count = len(index) * values
    total, squares = (facts[name][index].sum(0).tolist() for name in ("sums", "squares"))
    mean, std = [], []
    for t, s in zip(total, squares, strict=True):
        mean.append(t / count / 255)
        # Python's integers: exactly 0 for a channel that never changes, which is divided by 1 rather than by 0.
        std.append(math.sqrt(count * s - t * t) / count / 255 or 1.0)
    return tuple(mean), tuple(std)
