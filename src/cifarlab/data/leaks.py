"""The leak check: the same picture in training and in validation or test, exact or nearly so.

Exact duplicates have equal pixels and are found by hash, on every run. Near duplicates (`cifarlab data check`) come
from the same picture by another crop, scale or compression, and are found by the cosine of two normalised thumbnails.
B. Barz and J. Denzler, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", J. Imaging 6(6), 2020, compared
features of a network and looked at the pairs: 286 of CIFAR-10's test images (2.9 %) and 891 of CIFAR-100's (8.9 %)
have a duplicate in training (3.3 % and 10 % with those inside the test set).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarlab import files
from cifarlab.data.dataset import Images, Int64Array, UInt8Array, let_go

Hashes = NDArray[np.uint64]
Float32Array = NDArray[np.float32]

# Images read at a time, so that a memory map larger than memory can be checked.
SLICE = 4096

# Calibrated on CIFAR-10 (see near_duplicates).
THRESHOLD = 0.8
THUMBNAIL = 16
# Root mean square, in grey levels, of what remains of a thumbnail once its local mean is taken away.
FLAT = 2.0


class Hashed(NamedTuple):
    """What the leak check needs of one part of a dataset: `pixel_hashes` of its images, and their labels."""

    hashes: Hashes
    labels: Int64Array


class Pair(NamedTuple):
    """Positions of two images that look the same, and the cosine of their thumbnails."""

    a: int
    b: int
    similarity: float


def pixel_hashes(pixels: UInt8Array) -> Hashes:
    """A 128-bit BLAKE2b digest of each image: uint64, (N, 2). `pixels`: uint8, (N, 3, H, W), a memory map as well."""
    digests = bytearray()
    for start in range(0, len(pixels), SLICE):
        block = np.ascontiguousarray(pixels[start : start + SLICE])
        for image in block.reshape(len(block), -1):
            digests += hashlib.blake2b(image.data, digest_size=16).digest()
        let_go(pixels)
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64).reshape(-1, 2)


def duplicate_groups(hashes: Hashes) -> Int64Array:
    """Group ids, int64, (N,): images with equal hashes share one, the position of the first of them."""
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)].astype(np.int64)


def twins(hashes: Hashes, others: Hashes) -> Int64Array:
    """Positions in `hashes` of the images that have an exact duplicate in `others`: int64, sorted."""
    groups = duplicate_groups(np.concatenate([hashes, others]))
    return np.flatnonzero(np.isin(groups[: len(hashes)], groups[len(hashes) :]))


def leak_report(train: Hashed, validation: Hashed | None, test: Hashed | None) -> dict[str, Any]:
    """Exact duplicates within training and between the parts, ready for JSON.

    `within_train` counts the training images that equal another training image; `train_validation`, `train_test` and
    `validation_test` count the images of the second part that equal one of the first. Each is `images`, and how many of
    those have a twin of another label, `conflicting_labels`; null where a part is missing. `test_twins_in_train` lists
    the positions in the test set of the images with a twin in training.
    """
    parts = {
        name: part for name, part in (("train", train), ("validation", validation), ("test", test)) if part is not None
    }
    groups = duplicate_groups(np.concatenate([part.hashes for part in parts.values()]))
    ends = np.cumsum([len(part.labels) for part in parts.values()])
    ids = dict(zip(parts, np.split(groups, ends[:-1]), strict=True))

    def label_range(name: str) -> tuple[Int64Array, Int64Array]:
        """The lowest and highest label that each group has in a part; -1 as the highest where it has none."""
        lowest, highest = np.full(len(groups), np.iinfo(np.int64).max), np.full(len(groups), -1)
        np.minimum.at(lowest, ids[name], parts[name].labels)
        np.maximum.at(highest, ids[name], parts[name].labels)
        return lowest, highest

    def between(first: str, second: str) -> dict[str, int] | None:
        if first not in parts or second not in parts:
            return None
        lowest, highest = (limit[ids[second]] for limit in label_range(first))
        labels = parts[second].labels
        found = highest >= 0
        return {
            "images": int(found.sum()),
            "conflicting_labels": int((found & ((lowest != labels) | (highest != labels))).sum()),
        }

    repeated = np.bincount(ids["train"], minlength=len(groups))[ids["train"]] > 1
    lowest, highest = (limit[ids["train"]] for limit in label_range("train"))
    return {
        "within_train": {"images": int(repeated.sum()), "conflicting_labels": int((lowest != highest).sum())},
        "train_validation": between("train", "validation"),
        "train_test": between("train", "test"),
        "validation_test": between("validation", "test"),
        "test_twins_in_train": None if test is None else twins(test.hashes, train.hashes).tolist(),
    }


def near_duplicates(a: UInt8Array, b: UInt8Array, threshold: float = THRESHOLD, chunk: int = 1000) -> list[Pair]:
    """For each image of `a`, its most similar image in `b`, where the similarity reaches `threshold`; best first.

    a, b: uint8, (N, 3, H, W) and (M, 3, H', W'). The similarity is the cosine of two 16x16 RGB thumbnails (area means)
    from which the mean of the surrounding 7x7 was subtracted, channel by channel: with the overall mean instead, any
    two pictures of a sky above a plain are alike, and at equal counts fewer pairs are true ones. `chunk` images of `a`
    are compared at a time: chunk * M * 4 bytes of memory; 10,000 x 50,000 CIFAR images take 8 s on one core.

    An image too flat to compare (what is left of its thumbnail is below 2 grey levels, root mean square) is in no pair,
    for its cosine would be that of noise; exact copies of it are found by hash. No CIFAR image is that flat.
    Mirrored, strongly shifted or recoloured copies are missed.

    The default threshold flags 3.1 % of CIFAR-10's test images against training, where Barz and Denzler found 2.9 %,
    and 5.1 % of CIFAR-100's (split again at random), where they found 8.9 %. It is a list to look at: of the 40 pairs
    nearest above it, about 23 were one picture on CIFAR-10 and 10 on CIFAR-100, where many products are photographed
    alike; of the pairs above 0.9, 151 of 151 and 176 of 188 had the same label.
    """
    thumbnails_a, thumbnails_b = _thumbnails(a), _thumbnails(b)
    pairs: list[Pair] = []
    for start in range(0, len(a) if len(b) else 0, chunk):
        similarity = thumbnails_a[start : start + chunk] @ thumbnails_b.T
        best = similarity.argmax(axis=1)
        value = similarity[np.arange(len(best)), best]
        # Rounded, so that the order doesn't hang on the last bit of a product, which threads and chunks change.
        found = np.flatnonzero(value >= threshold)
        pairs += [Pair(start + int(i), int(best[i]), round(float(value[i]), 4)) for i in found]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.a))


def _thumbnails(pixels: UInt8Array) -> Float32Array:
    """Unit rows, float32, (N, 768): 16x16 area means less their local mean; zeros where that is too flat to compare."""
    shrink = [_area_mean(side, THUMBNAIL) for side in pixels.shape[2:]]
    offset = np.abs(np.subtract.outer(np.arange(THUMBNAIL), np.arange(THUMBNAIL)))
    blur = (offset <= 3).astype(np.float32)
    blur /= blur.sum(axis=1, keepdims=True)

    rows = np.empty((len(pixels), 3 * THUMBNAIL * THUMBNAIL), np.float32)
    for start in range(0, len(pixels), SLICE):
        block = pixels[start : start + SLICE].astype(np.float32)
        small = shrink[0] @ block @ shrink[1].T
        detail = (small - blur @ small @ blur.T).reshape(len(block), -1)
        norm = np.linalg.norm(detail, axis=1, keepdims=True)
        flat = norm < FLAT * np.sqrt(detail.shape[1])
        rows[start : start + SLICE] = np.where(flat, 0, detail / np.where(flat, 1, norm))
        let_go(pixels)
    return rows


def _area_mean(side: int, cells: int) -> Float32Array:
    """The matrix (cells, side) that averages `side` pixels into equal cells, pixels cut by an edge counted in part."""
    edges = np.arange(cells + 1) * (side / cells)
    pixel = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights: Float32Array = np.maximum(overlap, 0).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def pair_sheet(a: Images, b: Images, pairs: Sequence[Pair], classes: Sequence[str], path: Path) -> None:
    """Write a PNG that shows pairs side by side, each under its similarity and its two labels.

    `a` and `b` are what `near_duplicates` compared; `classes` names the labels. At most 5 pairs a row; the caller
    chooses how many are worth looking at. Raises StorageError, and ValueError where there are no pairs.
    """
    from PIL import Image, ImageDraw

    if not pairs:
        raise ValueError("there are no pairs to show")
    side, text, gap, columns = 96, 26, 8, min(5, len(pairs))
    width, height = 2 * side + gap, side + text + gap
    sheet = Image.new("RGB", (columns * width + gap, -(-len(pairs) // columns) * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        left, top = gap + number % columns * width, gap + number // columns * height
        name_a, name_b = (classes[part.labels[i]] for part, i in ((a, pair.a), (b, pair.b)))
        draw.text((left, top), f"{pair.similarity:.3f}  {pair.a} : {pair.b}"[:32], fill="black")
        draw.text((left, top + 12), name_a[:14], fill="black")
        draw.text((left + side, top + 12), name_b[:14], fill="black" if name_a == name_b else "red")
        for x, image in ((left, a.pixels[pair.a]), (left + side, b.pixels[pair.b])):
            picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            sheet.paste(picture.resize((side - 1, side), Image.Resampling.NEAREST), (x, top + text))
    with files.replacing(path) as file:
        sheet.save(file, "PNG")
