"""Decoded images in the cache folder: decoded once, and mapped into memory by every run that wants them so.

A store is three files beside each other. `NAME.pixels` is uint8 (N, 3, H, W) and nothing else; `NAME.facts.npy` is what
`facts.image_facts` found out about them; `NAME.json` is the record of what the pixels are, and of how far they got:
each few thousand images the pixels are flushed to the disk, and then the record says so. A run that is stopped, by
whatever, leaves a store whose record is not whole, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifarlab import files
from cifarlab.data.dataset import Dataset, Images, Int64Array, UInt8Array
from cifarlab.data.facts import FACTS, Facts, image_facts
from cifarlab.download import Report
from cifarlab.errors import StorageError

# Blocks that are packed between two flushes: what a run that is stopped loses.
BLOCKS = 32
REPORT_EVERY = 10.0  # seconds


class Block(NamedTuple):
    """The next `images` of a folder. pixels: uint8 (G, 3, H, W), the good ones among them.

    bad: what is wrong with the others, by position. damaged: warnings of damaged metadata, and how often they came.
    """

    images: int
    pixels: UInt8Array
    bad: dict[int, str]
    damaged: Counter[str]


@dataclass(frozen=True)
class Record:
    """done: images that are packed, bad ones included. modified: the time of the pixels' file in ns, once all is whole.

    bad, damaged: as in `Block`. content_hash: that of the dataset, once it was asked for.
    """

    done: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    damaged: Counter[str] = field(default_factory=Counter)
    modified: int | None = None
    content_hash: str | None = None


@dataclass(frozen=True, eq=False)
class Store:
    """A whole store. shape: (3, H, W), of an image. facts: FACTS, (N,), a memory map as well."""

    path: Path
    shape: tuple[int, int, int]
    record: Record
    facts: Facts

    def images(self, start: int, labels: Int64Array) -> Images:
        """The good images from the one at `start` on, as many as there are labels (int64, (K,))."""
        # A map of its own, not a part of a larger one: what reads from its file can be told where it begins.
        pixels = _map(self.path, start * math.prod(self.shape), (len(labels), *self.shape))
        return Images(pixels, labels, self.facts[start : start + len(labels)])

    def with_content_hash(self, dataset: Dataset) -> Dataset:
        """The dataset that was made of these images, with its content hash from the record: it is computed once."""
        recorded = self.record.content_hash
        if recorded is None:
            recorded = dataset.content_hash()
            with contextlib.suppress(StorageError):  # the next run may
                _write(self.path, replace(self.record, content_hash=recorded))
        return replace(dataset, recorded_hash=recorded)


def packed(
    path: Path, count: int, shape: tuple[int, int, int], decode: Callable[[int], Iterator[Block]], report: Report
) -> Store:
    """The store of `count` images at `path`, to which the files' endings are added; packed first unless it is whole.

    decode: the images from a position on. One run packs, and others that want the same wait for it.
    Raises StorageError where the folder can't be written or has too little space, and what `decode` raises.
    """
    if (store := _whole(path, count, shape)) is not None:
        return store
    files.make_folder(path.parent)
    waiting = f"another run is packing these images into {_pixels(path)}; waiting for it"
    with files.locked(path.with_name(f".{path.name}.lock"), lambda: report(waiting)):
        if (store := _whole(path, count, shape)) is None:
            store = _pack(path, count, shape, decode, report)
        return store


class Ticker:
    """Says now and then how far a long task is."""

    def __init__(self, task: str, total: int, report: Report, done: int = 0) -> None:
        self._task, self._total, self._report = task, total, report
        self._first, self._began = done, time.monotonic()
        self._told = self._began

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told >= REPORT_EVERY:
            speed = (done - self._first) / (now - self._began)
            self._report(f"{self._task} {done:,} of {self._total:,} images, {speed:,.0f} a second")
            self._told = now


def _pack(
    path: Path, count: int, shape: tuple[int, int, int], decode: Callable[[int], Iterator[Block]], report: Report
) -> Store:
    """Go on where an interrupted run stopped, or begin; the caller holds the lock."""
    size = math.prod(shape)
    record = _read(path, count, size)
    if record.modified not in (None, _modified(path)):
        record = Record()  # not what was packed, as `_whole` has found
    done, bad, damaged = record.done, dict(record.bad), Counter(record.damaged)
    if done < count:
        _check_space(path.parent, (count - done) * size)
        begin = f"going on after {done:,} of" if done else "packing"
        report(f"{begin} {count:,} images into {_pixels(path)}, {count * size / 1e6:,.0f} MB")
    tick = Ticker("packed", count, report, done)
    blocks = decode(done)
    while done < count:
        with files.continuing(_pixels(path), (done - len(bad)) * size) as out:
            for block in itertools.islice(blocks, BLOCKS):
                out.write(block.pixels.data)
                bad.update(block.bad)
                damaged.update(block.damaged)
                done += block.images
                tick(done)
        _write(path, Record(done, bad, damaged))
    facts = image_facts(_map(path, 0, (count - len(bad), *shape)))
    with files.replacing(_facts(path)) as file:
        np.save(file, facts)
    # Last: what has no time is no store.
    record = Record(done, bad, damaged, _modified(path), record.content_hash)
    _write(path, record)
    return Store(path, shape, record, facts)


def _whole(path: Path, count: int, shape: tuple[int, int, int]) -> Store | None:
    """The store where it is whole: its pixels have the size and time that they had then, or at least the hashes."""
    record = _read(path, count, math.prod(shape))
    if record.modified is None:
        return None
    try:
        facts = np.load(_facts(path), mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if facts.dtype != FACTS or facts.shape != (count - len(record.bad),):
        return None
    if record.modified != (modified := _modified(path)):
        # The cache was copied, or somebody wrote to it.
        if not np.array_equal(image_facts(_map(path, 0, (len(facts), *shape)))["hash"], facts["hash"]):
            return None
        record = replace(record, modified=modified)
        with contextlib.suppress(StorageError):  # the next run may
            _write(path, record)
    return Store(path, shape, record, facts)


def _read(path: Path, count: int, size: int) -> Record:
    """How far a store is: nowhere, where its record or its pixels are missing or don't belong together."""
    try:
        saved = json.loads(_json(path).read_bytes())
        bad = {int(position): str(reason) for position, reason in saved["bad"].items()}
        record = Record(**(saved | {"bad": bad, "damaged": Counter(saved["damaged"])}))
        expected, there = (record.done - len(bad)) * size, _pixels(path).stat().st_size
        whole = record.modified is not None
        fits = record.done == count and there == expected if whole else record.done <= count and there >= expected
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Record()
    return record if fits else Record()


def _write(path: Path, record: Record) -> None:
    files.write_json(_json(path), vars(record))


def _map(path: Path, offset: int, shape: tuple[int, ...]) -> UInt8Array:
    if not shape[0]:
        return np.empty(shape, np.uint8)  # the system maps no empty file
    return np.memmap(_pixels(path), np.uint8, "r", offset, shape)


def _modified(path: Path) -> int | None:
    try:
        return _pixels(path).stat().st_mtime_ns
    except OSError:
        return None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e6:,.0f} MB of free space, and the decoded images need {needed / 1e6:,.0f} MB; "
            "free some, or choose another folder with CIFARLAB_DATA"
        )


def _pixels(path: Path) -> Path:
    return path.with_name(path.name + ".pixels")


def _facts(path: Path) -> Path:
    return path.with_name(path.name + ".facts.npy")


def _json(path: Path) -> Path:
    return path.with_name(path.name + ".json")
