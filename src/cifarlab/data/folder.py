"""Images from class folders: `PATH/<class>/…`, or `PATH/train/<class>/…` with `val/` and `test/` beside it.

Whatever a picture is, it becomes three planes of 8 bits, by fixed rules:

- the first frame of a GIF, TIFF, WebP or PNG that has several; turned upright by its EXIF orientation;
- 16-bit grey is divided by 256; 32-bit integers likewise, and must lie in 0..65535; floating point is a share of white
  where no value is above 1, else it must lie in 0..255;
- transparency is laid on black, which is what padding is; palettes, CMYK, YCbCr and Lab are converted; colour
  profiles are not applied;
- then it is fitted to size x size by an antialiased filter. A JPEG that is many times larger is decoded at a half,
  a quarter or an eighth, as long as at least twice `size` is left.

Decoding takes a millisecond an image, each time. So the pixels of larger folders are packed into a store in the cache
(`packed`), named by a hash of what they are made from: the files' labels and bytes, and the arguments. To read all of
them at each start would take minutes too, so that hash is remembered beside one of the folder's listing: names, sizes,
times of modification, and ctime, which no program sets at will, so that whatever is replaced is noticed. Files that
were touched or copied, or moved with their folder, are read once more, and not decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from cifarlab import files, remembered
from cifarlab.data.dataset import Dataset, Images, UInt8Array
from cifarlab.data.packed import Block, Store, Ticker, packed
from cifarlab.download import Report
from cifarlab.errors import DataError, StorageError

Fit = Literal["crop", "pad", "stretch"]
Interpolation = Literal["bilinear", "bicubic"]
BadFiles = Literal["refuse", "skip"]

# The only decoders that a file from outside may reach, whatever its name ends in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Files with any other ending are not taken for images.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
# What archives and file servers leave behind, besides names that start with a dot.
LITTER = frozenset(("__MACOSX", "@eaDir"))

# Images decoded between two writes: bounds the memory of a set that is larger than memory.
SLICE = 256
# Pixels that an image may have: Pillow's own limit, 9,459 x 9,459. Decoding takes up to 20 bytes for each of them.
MAX_PIXELS = 89_478_485
# Images of more pixels are decoded one at a time, whatever the number of threads.
LARGE = 2**24
# Folders of so many images are packed; fewer are decoded in a second or two, and need no place in the cache.
PACKED_FROM = 1000
# Part of the store's key: raise it when the rules above change.
STORE_VERSION = 2


class _File(NamedTuple):
    """`relative` to the root; a Path would take five times the memory, and there may be a million."""

    relative: str
    part: str
    label: int
    bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass
class _Scan:
    """What was found below `root`, before any file is opened. `bad` maps a relative path to what is wrong with it."""

    root: Path
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    files: list[_File] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    loose: int = 0
    notes: list[str] = field(default_factory=list)


def read_folder(
    root: Path,
    *,
    size: int,
    cache: Path,
    fit: Fit = "crop",
    interpolation: Interpolation = "bilinear",
    bad_files: BadFiles = "refuse",
    max_pixels: int = MAX_PIXELS,
    memory_limit: int | None = None,
    workers: int | None = None,
    report: Report = lambda line: None,
) -> Dataset:
    """Read a folder of class folders as a Dataset of uint8 (N, 3, size, size).

    Classes are the folder names, sorted; images are sorted by relative path, part by part, on every file system.
    Folders inside a class folder are walked, each once; a link is followed where it stays inside `root`.
    `fit`: "crop" resizes the short side to `size` and crops the centre, "pad" resizes the long side and pads with
    black, "stretch" resizes both. `bad_files`: what cannot be read, an image of more than `max_pixels`, a link that
    leads out of `root` and what is not a regular file are all listed, in one error or ("skip") the notes.
    From 1,000 images on, or above `memory_limit` (bytes), the pixels become a memory-mapped file in `cache`, which is
    found again as long as classes, images and these arguments stay the same, wherever the folder is. Below the limit
    they are read into memory instead, each time, where the cache cannot be written.
    `workers`: decoding threads, None for all cores.

    Raises DataError for a missing, empty or unreadable folder, fewer than two classes, a class without images, parts
    with different classes, bad files, and a file that changes meanwhile; StorageError where the cache cannot be
    written and the images are above the limit.
    """
    scan = _scan(root)
    decode = partial(_decode, size=size, fit=fit, interpolation=interpolation, large=threading.Lock())
    shape, threads = (3, size, size), workers or os.cpu_count() or 1
    blocks = partial(_blocks, scan, decode, shape, threads, max_pixels)
    too_large = memory_limit is not None and len(scan.files) * 3 * size * size > memory_limit
    store: Store | None = None
    if too_large or len(scan.files) >= PACKED_FROM:
        key = _key(_content(scan, threads, report), size, fit, interpolation, max_pixels)
        try:
            store = packed(cache / f"folder-{key}", len(scan.files), shape, blocks, report)
        except StorageError as error:
            if too_large:
                raise
            report(f"{error}; until then the images are decoded by every run, into memory")
    if store is not None:
        bad, damaged = store.record.bad, store.record.damaged
    else:
        pixels, bad, damaged = _in_memory(blocks(0), len(scan.files), shape, report)

    all_bad = scan.bad | {scan.files[position].relative: reason for position, reason in bad.items()}
    if all_bad and bad_files == "refuse":
        raise DataError(_complaint(root, all_bad))
    good = [file for position, file in enumerate(scan.files) if position not in bad]
    _refuse_empty_classes(scan, good)

    images: dict[str, Images] = {}
    start = 0
    for part in scan.parts:
        labels = np.array([file.label for file in good if file.part == part], np.int64)
        end = start + len(labels)
        images[part] = store.images(start, labels) if store is not None else Images(pixels[start:end], labels)
        start = end
    dataset = Dataset(
        name=Path(os.path.realpath(root)).name or "folder",
        classes=scan.classes,
        train=images["train"],
        validation=images.get("validation"),
        test=images.get("test"),
        source=f"image folder {root}" + (f", packed in {store.path}.pixels" if store is not None else ""),
        notes=(*scan.notes, *_notes(scan, all_bad, damaged)),
    )
    return dataset if store is None else store.with_content_hash(dataset)


def folder_classes(root: Path) -> tuple[str, ...]:
    """The class names of an image folder, without opening an image. Raises DataError as `read_folder` does."""
    return _scan(root).classes


# ----------------------------------------------------------------- what is there


def _scan(root: Path) -> _Scan:
    scan = _Scan(root)
    if not files.is_folder(root):
        raise DataError(f"there is no folder {root}; data from a folder needs {root}/<class>/<image>")
    names = _folders_in(scan, root)
    folders = _part_folders(scan, names)
    classes = {part: names if folder == root else _folders_in(scan, folder) for part, folder in folders.items()}
    _refuse_classes(root, folders, classes)
    scan.classes, scan.parts = tuple(classes["train"]), tuple(folders)
    for part, folder in folders.items():
        for label, name in enumerate(scan.classes):
            _walk(scan, folder / name, part, label)
    # By the parts of the path, so that a class's images stay together ("a/x" before "a-b/x").
    order = {part: position for position, part in enumerate(scan.parts)}
    scan.files.sort(key=lambda file: (order[file.part], file.relative.split("/")))
    return scan


def _part_folders(scan: _Scan, names: list[str]) -> dict[str, Path]:
    """The folders of train, validation and test, in that order; the root itself is train where it holds classes."""
    root = scan.root
    # A folder with images in it is a class, whatever it is called: CIFAR-100 has a class "train".
    found = [name for name in names if name.casefold() in PARTS and not _holds_images(root / name)]
    if "train" not in {name.casefold() for name in found}:
        if found and len(found) == len(names):
            raise DataError(f"{root} has {_listed(found)} but no folder train; name the training images' folder train")
        return {"train": root}
    parts: dict[str, Path] = {}
    for name in sorted(found, key=lambda name: list(PARTS).index(name.casefold())):
        part = PARTS[name.casefold()]
        if part in parts:
            raise DataError(f"{root} has two folders for {part}, {parts[part].name} and {name}; keep one of them")
        parts[part] = root / name
    beside = sorted(set(names) - set(found))
    if beside:
        scan.notes.append(f"left out the folders beside train: {_listed(beside)}")
    return parts


def _refuse_classes(root: Path, folders: dict[str, Path], classes: dict[str, list[str]]) -> None:
    """Raise DataError where the class folders cannot be those of a classification task."""
    names = classes["train"]
    where = folders["train"]
    if not names:
        raise DataError(
            f"{where} has no class folders; a dataset is {root}/<class>/<image> or {root}/train/<class>/<image>"
        )
    if len(names) == 1:
        hint = ""
        if any(_is_folder(Path(entry.path)) for entry in _entries(where / names[0])):
            hint = f"; are the classes inside it? then use {where / names[0]}"
        raise DataError(f"{where} has one class folder, {names[0]!r}, and at least two are needed{hint}")
    for name in names:
        if not name.isprintable():
            raise DataError(f"the class folder {name!r} in {where} has a name that cannot be printed; rename it")
    for part in folders.keys() - {"train"}:
        missing, extra = sorted(set(names) - set(classes[part])), sorted(set(classes[part]) - set(names))
        if missing or extra:
            differences = [f"{folders[part]} lacks {_listed(missing)}"] if missing else []
            differences += [f"{where} lacks {_listed(extra)}"] if extra else []
            raise DataError(f"the class folders differ: {', and '.join(differences)}; both need the same classes")


def _refuse_empty_classes(scan: _Scan, good: list[_File]) -> None:
    count = Counter((file.part, file.label) for file in good)
    for part in scan.parts:
        for label, name in enumerate(scan.classes):
            if not count[part, label]:
                raise DataError(
                    f"the class {name!r} has no images for {part} that can be read in {scan.root}; "
                    f"add some ({', '.join(FORMATS)}), or remove its folders"
                )


def _walk(scan: _Scan, folder: Path, part: str, label: int) -> None:
    """Collect the images of one class. A stack of our own, so that no depth of nesting is too deep for Python."""
    root = os.path.realpath(scan.root)
    seen: set[str] = set()
    stack = [(folder, os.path.realpath(folder))]
    while stack:
        here, real = stack.pop()
        if real in seen:
            continue
        seen.add(real)
        inner = []
        for entry in _entries(here):
            path = Path(entry.path)
            relative = path.relative_to(scan.root).as_posix()
            is_folder = _is_folder(path)
            if _is_litter(entry.name):
                scan.ignored["hidden"] += 1
            elif not is_folder and path.suffix.lower() not in EXTENSIONS:
                scan.ignored[repr(path.suffix.lower()) if path.suffix else "no ending"] += 1
            elif entry.is_symlink() and (wrong := _wrong_link(path, root, seen)):
                scan.bad[relative] = wrong
            elif is_folder:
                # Not realpath of every folder: its cost grows with the depth.
                inner.append((path, os.path.realpath(path) if entry.is_symlink() else real + os.sep + entry.name))
            elif (status := _status(path)) is None or not stat.S_ISREG(status.st_mode):
                # Opening a named pipe or a device would wait for its other end.
                scan.bad[relative] = "not a regular file"
            else:
                times = status.st_mtime_ns, status.st_ctime_ns
                scan.files.append(_File(relative, part, label, status.st_size, *times))
        stack += reversed(inner)


def _wrong_link(path: Path, root: str, seen: set[str]) -> str | None:
    """What is wrong with a link: it leads nowhere, out of `root`, or above a folder that was read, in a circle."""
    try:
        target = os.path.realpath(path, strict=True)
    except OSError:
        return "a link that leads nowhere"
    if not _is_within(target, root):
        return "a link that leads out of the folder"
    if any(folder != target and _is_within(folder, target) for folder in seen):
        return "a link to a folder around it"
    return None


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _status(path: Path) -> os.stat_result | None:
    """What a path, or the target of a link, is; None where that cannot be said."""
    try:
        return path.stat()
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    return (status := _status(path)) is not None and stat.S_ISDIR(status.st_mode)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read: {error.strerror or error}; check its permissions"
        ) from error


def _folders_in(scan: _Scan, folder: Path) -> list[str]:
    """Names of the folders in a folder that holds parts or classes, sorted; its loose files are counted."""
    names = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if _is_litter(entry.name):
            scan.ignored["hidden"] += 1
        elif not _is_folder(path):
            scan.loose += 1
        elif entry.is_symlink() and (wrong := _wrong_link(path, os.path.realpath(scan.root), set())):
            raise DataError(f"{path} is {wrong}; put the folder itself there")
        else:
            names.append(entry.name)
    return names


def _holds_images(folder: Path) -> bool:
    paths = [Path(entry.path) for entry in _entries(folder)]
    return any(path.suffix.lower() in EXTENSIONS and not _is_folder(path) for path in paths)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in LITTER


# ----------------------------------------------------------------- pixels


def _decode(
    path: Path, *, size: int, fit: Fit, interpolation: Interpolation, large: contextlib.AbstractContextManager[Any]
) -> UInt8Array | str:
    """One image as uint8 (3, size, size), or what is wrong with the file. large: held while a large one is decoded."""
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    try:
        with Image.open(path, formats=FORMATS) as opened:
            opened.draft(None, (2 * size, 2 * size))
            with large if opened.width * opened.height > LARGE else contextlib.nullcontext():
                image = _to_rgb(ImageOps.exif_transpose(opened))
        if fit == "crop":
            image = ImageOps.fit(image, (size, size), method)
        elif fit == "stretch":
            image = image.resize((size, size), method)
        elif max(image.size) > size * min(image.size):
            return f"too narrow to be padded ({image.width}x{image.height})"
        else:
            image = ImageOps.pad(image, (size, size), method)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return (
            f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, as decompression bombs have; make it smaller, or allow more "
            "with --set data.max_pixels"
        )
    except UnidentifiedImageError:
        status = _status(path)
        return "empty" if status is not None and status.st_size == 0 else f"not an image ({', '.join(FORMATS)})"
    except Exception as error:  # a damaged file can make a decoder raise anything, and every one must be listed
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return " ".join(reason.split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    """To 8-bit RGB by the rules at the top. Pillow's own conversion clips 16 bits to 255, which turns them white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, and 0..65535 is the range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):
            raise ValueError(
                f"floating-point values from {values.min()} to {values.max()}, and 0..1 or 0..255 is the range"
            )
        image = Image.fromarray(np.round(values * (255 if values.max() <= 1 else 1)).astype(np.uint8))
    elif image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB")


def _blocks(
    scan: _Scan,
    decode: Callable[[Path], UInt8Array | str],
    shape: tuple[int, int, int],
    threads: int,
    max_pixels: int,
    start: int,
) -> Iterator[Block]:
    """Decode the files from the one at `start` on. Raises DataError where one is no longer what was listed."""

    def unchanged(file: _File) -> UInt8Array | str:
        path = scan.root / file.relative
        image = decode(path)
        status = _status(path)
        if status is None or (status.st_size, status.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise DataError(
                f"{path} was changed or removed while {scan.root} was read; run again once nobody writes to it"
            )
        return image

    # Decoders register themselves on first use; warning filters and Pillow's limit, above which it warns, belong to the
    # process: not for threads to do.
    Image.init()
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(start, len(scan.files), SLICE):
            block = scan.files[begin : begin + SLICE]
            with _limited_to(max_pixels), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                results = list(pool.map(unchanged, block))
            good = [image for image in results if not isinstance(image, str)]
            yield Block(
                len(block),
                np.stack(good) if good else np.empty((0, *shape), np.uint8),
                {begin + position: reason for position, reason in enumerate(results) if isinstance(reason, str)},
                Counter(str(warning.message) for warning in caught),
            )


@contextlib.contextmanager
def _limited_to(max_pixels: int) -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _in_memory(
    blocks: Iterator[Block], count: int, shape: tuple[int, int, int], report: Report
) -> tuple[UInt8Array, dict[int, str], Counter[str]]:
    """The good images, uint8 (G, 3, H, W), what is wrong with the others, and warnings."""
    pixels = np.empty((count, *shape), np.uint8)
    bad: dict[int, str] = {}
    damaged: Counter[str] = Counter()
    good = done = 0
    tick = Ticker("decoded", count, report)
    for block in blocks:
        pixels[good : good + len(block.pixels)] = block.pixels
        good += len(block.pixels)
        bad.update(block.bad)
        damaged.update(block.damaged)
        tick(done := done + block.images)
    return pixels[:good], bad, damaged


# ----------------------------------------------------------------- the store's key


def _content(scan: _Scan, threads: int, report: Report) -> str:
    """A hash of all files' labels and bytes, in order; remembered for as long as nothing of the listing changes."""
    listing = hashlib.blake2b(repr(scan.classes).encode(), digest_size=16)
    for file in scan.files:
        listing.update(repr(file).encode())
    key = {"content of": os.path.realpath(scan.root)}
    known = remembered.recall(key)
    if isinstance(known, dict) and known.get("listing") == listing.hexdigest():
        return str(known["content"])
    content = hashlib.blake2b(repr(scan.classes).encode(), digest_size=16)
    all_readable = True
    tick = Ticker("hashed", len(scan.files), report)
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(scan.files), SLICE):
            block = scan.files[begin : begin + SLICE]
            digests = pool.map(_digest, [scan.root / file.relative for file in block])
            for file, digest in zip(block, digests, strict=True):
                content.update(repr((file.part, file.label, digest)).encode())
                all_readable = all_readable and digest is not None
            tick(begin + len(block))
    if all_readable:  # what could not be read may be another time, without a change
        remembered.remember(key, {"listing": listing.hexdigest(), "content": content.hexdigest()})
    return content.hexdigest()


def _digest(path: Path) -> str | None:
    """Of a file's bytes; None where they can't be read: such a file is listed later, with all that is bad."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


def _key(content: str, size: int, fit: Fit, interpolation: Interpolation, max_pixels: int) -> str:
    made_by: tuple[object, ...] = (STORE_VERSION, PIL.__version__, content, size, fit, interpolation)
    if max_pixels != MAX_PIXELS:  # so that what was packed before there was a choice is found
        made_by += (max_pixels,)
    return hashlib.blake2b(repr(made_by).encode(), digest_size=16).hexdigest()


# ----------------------------------------------------------------- sentences


def _complaint(root: Path, bad: dict[str, str], most: int = 3) -> str:
    shown = [f"{name!r} ({reason})" for name, reason in sorted(bad.items())[:most]]
    more = f" and {len(bad) - most:,} more" if len(bad) > most else ""
    return (
        f"{root} has {_counted(len(bad), 'bad file')}: {', '.join(shown)}{more}; "
        "repair or remove what is bad, or leave it out with --set data.bad_files=skip"
    )


def _notes(scan: _Scan, bad: dict[str, str], damaged: Counter[str]) -> list[str]:
    notes = []
    if scan.loose:
        notes.append(f"left out {_counted(scan.loose, 'file')} outside the class folders")
    if scan.ignored:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in scan.ignored.most_common(5))
        more = ", and others" if len(scan.ignored) > 5 else ""
        notes.append(f"left out what is no image by its name: {kinds}{more}")
    if damaged:
        notes.append(
            f"{_counted(damaged.total(), 'warning')} of damaged metadata in images that were read all the same, "
            f"perhaps without their orientation; one of them: {min(damaged)}"
        )
    if bad:
        notes.append(f"left out {_counted(len(bad), 'bad file')}:")
        notes += [f"  {name!r}: {reason}" for name, reason in sorted(bad.items())]
    return notes


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
