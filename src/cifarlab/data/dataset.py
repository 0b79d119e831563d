"""What every reader returns: images and labels at rest, as numpy arrays, and where they came from."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.errors import DataError

UInt8Array = NDArray[np.uint8]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images.

    pixels: uint8, (N, 3, H, W), RGB planes; an ordinary array, or a read-only memory map.
    labels: int64, (N,), class indices.
    facts: what `facts.image_facts` finds out about the pixels, where that is on record; None where it isn't.
    """

    pixels: UInt8Array
    labels: Int64Array
    facts: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or self.pixels.dtype != np.uint8:
            raise DataError(f"images must be uint8 of shape (N, 3, H, W), not {self.pixels.dtype} {self.pixels.shape}")
        if self.labels.shape != self.pixels.shape[:1] or self.labels.dtype != np.int64:
            raise DataError(
                f"labels must be int64 of shape ({len(self.pixels)},), not {self.labels.dtype} {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int64Array) -> Images:
        """The images at `index` (int64, (K,)), copied."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset as it was found, before any split of ours.

    `validation` and `test` are None where the source has none. `source` says in words where the bytes came from
    ("python files in /data/cifar-10-batches-py"); `notes` are findings that the user should see (skipped files);
    `folder` is where CIFAR's files were looked for; `recorded_hash` is the content hash, where that is on record.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images | None
    source: str
    notes: tuple[str, ...] = field(default=())
    folder: Path | None = field(default=None)
    recorded_hash: str | None = field(default=None)

    def content_hash(self) -> str:
        """SHA-256 over class names, pixels and labels of all parts: equal data, equal hash, wherever it was read."""
        if self.recorded_hash is not None:
            return self.recorded_hash
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in (self.train, self.validation, self.test):
            digest.update(b"\0part" if part is None else repr(part.pixels.shape).encode())
            if part is not None:
                # In slices, so that a memory map larger than memory can be hashed.
                for start in range(0, len(part), 4096):
                    digest.update(np.ascontiguousarray(part.pixels[start : start + 4096]).data)
                    let_go(part.pixels)
                digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()


def let_go(pixels: NDArray[Any]) -> None:
    """Take what was read of a read-only memory map out of this process's memory; it stays in the system's file cache.

    Else all that was ever read would count as resident. Other arrays are left as they are.
    """
    owner: object = pixels
    while isinstance(owner, np.ndarray):
        owner = owner.base
    # A map that may be written to could lose what was written. Windows has no such call.
    if isinstance(owner, mmap.mmap) and not pixels.flags.writeable and hasattr(owner, "madvise"):
        owner.madvise(mmap.MADV_DONTNEED)
