"""CIFAR as it was read from an archive or from parquet, kept in the cache folder so that it is unpacked once.

Decoding 60,000 PNGs takes 3 s and unpacking an archive 1 s; reading what was kept takes a fraction of a second. It goes
by the SHA-256 of the files that it came from, which are read for that at each start: what is replaced, even by a file
of the same size and date, is unpacked anew, and what is moved or copied is found again. Folders of plain files are as
quick to read as this would be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cifarlab import files
from cifarlab.data.cifar import Cifar, Contents, Found, Split, find, lookup, make_dataset
from cifarlab.data.dataset import Dataset
from cifarlab.download import Report
from cifarlab.errors import StorageError

# Part of the name: raise it when the readers come to read the same files differently.
VERSION = 1


def read_or_recall(name: str, folder: Path, cache: Path, report: Report) -> Dataset | None:
    """What `read_cifar` returns, to the bit; from `cache` where that was unpacked before, and kept there where not.

    What was kept and is damaged is made again. Where the cache can't be written, `report` says so, and nothing else
    changes. Two processes unpack once: the second waits. Raises DataError as `read_cifar` does.
    """
    cifar = lookup(name)
    found = find(cifar, folder)
    if found is None or not found.packed:
        return None if found is None else make_dataset(cifar, found.read(), found.source)
    try:
        path = cache / f"{name}-{_digest(found.packed)}.npz"
    except OSError:
        return make_dataset(cifar, found.read(), found.source)  # which says what is wrong with the files
    return _recall(path, cifar, found.source) or _unpack(path, cifar, found, report)


def _digest(packed: Iterable[Path]) -> str:
    """Of the contents of files, in that order, and of how they are read. Raises OSError."""
    whole = hashlib.sha256(str(VERSION).encode())
    for path in packed:
        files.regular_size(path)
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:32]


def _unpack(path: Path, cifar: Cifar, found: Found, report: Report) -> Dataset:
    """The dataset, read and kept at `path`, or found there where another process was first."""
    dataset = None
    try:
        files.make_folder(path.parent)
        waiting = f"another run is unpacking {cifar.title}; waiting for it"
        with files.locked(path.with_name(f".{path.stem}.lock"), lambda: report(waiting)):
            dataset = _recall(path, cifar, found.source)
            if dataset is None:
                dataset = make_dataset(cifar, found.read(), found.source)
                _keep(path, dataset)
    except StorageError as error:
        report(f"{cifar.title} is unpacked anew at each start: {error}")
    return make_dataset(cifar, found.read(), found.source) if dataset is None else dataset


def _keep(path: Path, dataset: Dataset) -> None:
    """Write what was read. Raises StorageError."""
    assert dataset.test is not None  # CIFAR has one
    record = {"classes": dataset.classes, "content_hash": dataset.content_hash()}
    with files.replacing(path) as file:
        np.savez(
            file,
            record=np.frombuffer(json.dumps(record).encode(), np.uint8),
            train_pixels=dataset.train.pixels,
            train_labels=dataset.train.labels,
            test_pixels=dataset.test.pixels,
            test_labels=dataset.test.labels,
        )


def _recall(path: Path, cifar: Cifar, source: str) -> Dataset | None:
    """What was kept; None where there is nothing, or something damaged."""
    try:
        files.regular_size(path)
        with path.open("rb") as file, np.load(file) as kept:
            record = json.loads(kept["record"].tobytes())
            train, test = (Split(kept[f"{part}_pixels"], kept[f"{part}_labels"], None) for part in ("train", "test"))
        dataset = make_dataset(cifar, Contents(tuple(record["classes"]), train, test), source)
        return dataset if dataset.content_hash() == record["content_hash"] else None
    except Exception:  # whatever comes to the minds of zipfile and numpy, of bytes changed at random
        return None
