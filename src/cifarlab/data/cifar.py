"""Reads CIFAR-10 and CIFAR-100 from whatever form the user has them in; all forms give the same arrays.

| form           | CIFAR-10                                | CIFAR-100                             |
|----------------|-----------------------------------------|---------------------------------------|
| python folder  | `cifar-10-batches-py/`                  | `cifar-100-python/`                   |
| binary folder  | `cifar-10-batches-bin/`                 | `cifar-100-binary/`                   |
| archive        | `cifar-10-python.tar.gz`, `…-binary…`   | `cifar-100-python.tar.gz`, `…-binary…`|
| the Hub's      | `plain_text/train-*.parquet`, `test-*`  | `cifar100/train-*.parquet`, `test-*`  |

The first that is there is read. The number of images comes from the files, so that small cuts in the same form are read
too; everything else must be as the official files have it, and what is not is refused by name. Nothing in a file is
executed, and nothing of an archive is extracted: see `unpickle` and `_Archive`.

The formats are described at https://www.cs.toronto.edu/~kriz/cifar.html (A. Krizhevsky, 2009).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from cifarlab import files
from cifarlab.data.dataset import Dataset, Images, Int64Array, UInt8Array
from cifarlab.data.unpickle import read_pickle
from cifarlab.errors import DataError, nearest

PIXELS = 3 * 32 * 32

# Caps on what is read, well above the official sizes (155 MB, 186 MB, some ten members, 3 KB): a damaged or hostile
# file must not take the machine's memory.
_MAX_FILE = 2**28
_MAX_ARCHIVE = 2**29
_MAX_MEMBERS = 1000
_MAX_PNG = 2**16
_MAX_NAMES = 2**16
_MAX_NAME = 200  # characters of a class's name

# One line of text beside files that `download` wrote: where their bytes came from.
_ORIGIN_FILE = "cifarlab-source.txt"

_FINE = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
_COARSE = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
    "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
    "vehicles_1 vehicles_2"
)


@dataclass(frozen=True)
class Cifar:
    """What is fixed about one of the two datasets: names of classes, files and columns, in the official order."""

    name: str
    title: str
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]  # CIFAR-10 has none
    python_folder: str
    binary_folder: str
    archives: tuple[str, str]  # python, binary
    train_files: tuple[str, ...]  # python; the binary ones end in .bin
    test_files: tuple[str, ...]
    meta: str
    names_key: str
    label_key: str
    binary_names: tuple[str, ...]  # text files: classes, then superclasses
    parquet_folder: str
    parquet_label: str
    hub: str  # the dataset's repository on the Hugging Face Hub


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    superclasses=(),
    python_folder="cifar-10-batches-py",
    binary_folder="cifar-10-batches-bin",
    archives=("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
    train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test_files=("test_batch",),
    meta="batches.meta",
    names_key="label_names",
    label_key="labels",
    binary_names=("batches.meta.txt",),
    parquet_folder="plain_text",
    parquet_label="label",
    hub="uoft-cs/cifar10",
)
CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    classes=tuple(_FINE.split()),
    superclasses=tuple(_COARSE.split()),
    python_folder="cifar-100-python",
    binary_folder="cifar-100-binary",
    archives=("cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
    train_files=("train",),
    test_files=("test",),
    meta="meta",
    names_key="fine_label_names",
    label_key="fine_labels",
    binary_names=("fine_label_names.txt", "coarse_label_names.txt"),
    parquet_folder="cifar100",
    parquet_label="fine_label",
    hub="uoft-cs/cifar100",
)
DATASETS = {cifar.name: cifar for cifar in (CIFAR10, CIFAR100)}


@dataclass(frozen=True, eq=False)
class Split:
    """pixels: uint8 (N, 3072), RGB planes; labels: int64 (N,); coarse: int64 (N,), the superclasses of CIFAR-100."""

    pixels: UInt8Array
    labels: Int64Array
    coarse: Int64Array | None


@dataclass(frozen=True, eq=False)
class Contents:
    """All that the files hold, the superclasses that a `Dataset` leaves out included."""

    classes: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True, eq=False)
class Found:
    """A dataset that is there in one of the forms, not read yet.

    source: says in words what was found. packed: the files that have to be unpacked, an archive or the Hub's parquet;
    none where a folder holds plain files. read: raises DataError, as `read_cifar` does.
    """

    source: str
    packed: tuple[Path, ...]
    read: Callable[[], Contents]


def lookup(name: str) -> Cifar:
    """The dataset called `name`. Raises DataError for any other name than `cifar10` and `cifar100`."""
    if name not in DATASETS:
        raise DataError(f"there is no CIFAR dataset '{name}': {nearest(name, DATASETS)}")
    return DATASETS[name]


def expected_files(name: str) -> str:
    """A clause for a message: the names that `read_cifar` looks for in a folder."""
    cifar = lookup(name)
    return (
        f"{cifar.python_folder}/, {cifar.binary_folder}/, {cifar.archives[0]}, {cifar.archives[1]} or "
        f"{cifar.parquet_folder}/train-00000-of-00001.parquet and test-00000-of-00001.parquet"
    )


def read_cifar(name: str, folder: Path) -> Dataset | None:
    """Read `cifar10` or `cifar100` from `folder`, in whichever form it is there.

    `folder` holds one of the forms of the table above, or is itself the python, binary or parquet folder.
    Returns None where it does not exist or has nothing of that dataset.
    Raises DataError where something is there but is damaged, incomplete or unreadable.
    """
    cifar = lookup(name)
    found = find(cifar, folder)
    return None if found is None else make_dataset(cifar, found.read(), found.source)


def make_dataset(cifar: Cifar, contents: Contents, source: str) -> Dataset:
    """The dataset without superclasses; a note says where it is not as large as the official one."""
    train, test = (
        Images(split.pixels.reshape(-1, 3, 32, 32), split.labels) for split in (contents.train, contents.test)
    )
    notes = []
    if (len(train), len(test)) != (50_000, 10_000):
        notes.append(
            f"this {cifar.title} has {len(train):,} training and {len(test):,} test images; "
            "the official one has 50,000 and 10,000"
        )
    return Dataset(cifar.name, contents.classes, train, None, test, source, tuple(notes))


def read_contents(cifar: Cifar, folder: Path) -> Contents | None:
    """Like `read_cifar`, with the superclasses."""
    found = find(cifar, folder)
    return None if found is None else found.read()


def find(cifar: Cifar, folder: Path) -> Found | None:
    """What `read_cifar` would read. Raises DataError for what can't be read, or has parts missing."""
    try:
        present = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file; give the folder that holds it") from None
    except OSError as error:
        raise _unreadable(folder, error) from error

    forms = (("python", cifar.python_folder, _read_python), ("binary", cifar.binary_folder, _read_binary))
    for form, name, read in forms:
        # A cached download of an earlier run is complete or not there at all, so what is incomplete is the user's.
        is_inside = name in present and files.is_folder(folder / name)
        if is_inside or folder.absolute().name == name:
            plain = _Folder(folder / name if is_inside else folder)
            return Found(f"{form} files in {plain.path}{plain.origin()}", (), partial(read, cifar, plain))
    for archive, (form, name, read) in zip(cifar.archives, forms, strict=True):
        if archive in present:
            path = folder / archive
            return Found(f"{form} files in {path}", (path,), partial(read, cifar, _Archive(path, name)))
    return _find_parquet(cifar, folder)


# --- Where bytes come from: a folder or an archive --------------------------------------------------------------------


class _Folder:
    """The files of a folder, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The sizes in bytes of the files called `names`. Raises DataError where one is missing or too large."""
        sizes = {}
        missing = []
        for name in names:
            path = self.path / name
            try:
                if path.is_file():
                    sizes[name] = path.stat().st_size
                else:
                    missing.append(name)
            except OSError as error:
                raise _unreadable(path, error) from error
        if missing:
            raise DataError(f"{self.path} is incomplete: {', '.join(missing)} missing; put the whole dataset there")
        for name, size in sizes.items():
            if size > _MAX_FILE:
                raise DataError(f"{self.where(name)} has {size:,} bytes, more than any file of CIFAR")
        return sizes

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise _unreadable(self.path / name, error) from error

    def origin(self) -> str:
        """Where a download came from, if `write_binary` wrote this folder."""
        path = self.path / _ORIGIN_FILE
        try:
            files.regular_size(path)
            with path.open(encoding="utf-8") as file:
                text = file.read(500)
        except (OSError, UnicodeError):
            return ""
        return ", downloaded from " + " ".join(text.split())


class _Archive:
    """The files of an official .tar.gz, read into memory.

    Never extracted: `tarfile`'s extraction filters were bypassed several times (CVE-2024-12718, CVE-2025-4138,
    CVE-2025-4330, CVE-2025-4517). Only regular files with exactly the official names are looked at, and no path of the
    archive reaches the file system.
    """

    def __init__(self, path: Path, folder: str) -> None:
        self.path = path
        self.folder = folder
        self.contents: dict[str, bytes] = {}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        names = tuple(names)
        try:
            files.regular_size(self.path)
            with gzip.open(self.path) as stream:
                self.read_members(_Limited(stream, self.path), frozenset(names))
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is truncated or damaged ({_brief(error)}); get the archive again") from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        missing = [name for name in names if name not in self.contents]
        if missing:
            raise DataError(f"{self.path} is incomplete: {self.folder}/{', '.join(missing)} missing; get it again")
        return {name: len(data) for name, data in self.contents.items()}

    def read_members(self, stream: _Limited, names: frozenset[str]) -> None:
        # A tar stream ("r|") can only go forward, so a member with a negative size (CVE-2025-8194) cannot loop.
        class Header(_Header):
            seen = 0

        with tarfile.open(fileobj=stream, mode="r|", bufsize=2**20, tarinfo=Header) as archive:
            for count, member in enumerate(archive):
                if count >= _MAX_MEMBERS:
                    raise DataError(f"{self.path} has more than {_MAX_MEMBERS} members, which no archive of CIFAR has")
                folder, _, name = member.name.removeprefix("./").partition("/")
                if folder != self.folder or name not in names:
                    # `tarfile` goes to its end in steps, and counts on when the stream has ended.
                    if archive.offset > stream.most:
                        raise _too_much(self.path, stream.most)
                    continue
                if name in self.contents:
                    raise DataError(f"{self.where(name)} is there twice; get the archive again")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise DataError(f"{self.where(name)} is not a regular file; get the archive again")
                if not 0 <= member.size <= _MAX_FILE:
                    raise DataError(
                        f"{self.where(name)} has {member.size:,} bytes, which no file of CIFAR has; get it again"
                    )
                file = archive.extractfile(member)
                data = b"" if file is None else file.read()
                if len(data) != member.size:
                    raise DataError(f"{self.where(name)} is truncated; get the archive again")
                self.contents[name] = data
        # To the end, where gzip's own checksum is.
        while stream.read(2**20):
            pass

    def where(self, name: str) -> str:
        return f"{self.path}: {self.folder}/{name}"

    def read(self, name: str) -> bytes:
        return self.contents.pop(name)  # each file is parsed once; its memory is free afterwards


class _Header(tarfile.TarInfo):
    """A header that says nothing long of the member after it: `tarfile` reads that whole, and searches it.

    A pax header of 1 MB of digits takes half an hour in Python before 3.11.10 and 3.12.6 (CVE-2024-6232), and many of
    them may stand before one member. Counted by a class for each archive.
    """

    seen = 0
    _LONG = b"LKxgX"  # GNU's long names and links, and pax headers

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in cls._LONG:
            cls.seen += 1
            if header.size > 2**10:
                raise tarfile.ReadError(f"a header of {header.size:,} bytes")
            if cls.seen > 200:
                raise tarfile.ReadError("more than 200 headers that go before others")
        return header


def _most_bytes() -> int:
    """What an archive, or a parquet file, may unpack to: `CIFARLAB_MAX_MB`, or else 537 MB. Raises DataError."""
    chosen = os.environ.get("CIFARLAB_MAX_MB")
    if not chosen:
        return _MAX_ARCHIVE
    if not re.fullmatch(r"[1-9][0-9]{0,8}", chosen):
        raise DataError(f"CIFARLAB_MAX_MB is {chosen[:40]!r}; expected a whole number of MB, such as 2000")
    return int(chosen) * 1_000_000


def _too_much(path: Path, most: int) -> DataError:
    return DataError(
        f"{path} unpacks to more than {most:,} bytes, and the whole of CIFAR has 184,000,000; get it again, "
        "or allow more (MB) with CIFARLAB_MAX_MB"
    )


class _Limited(io.RawIOBase):
    """A stream that ends in an error after `_most_bytes`: 1 MB of gzip can hold 1 GB of zeros."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.most = self.left = _most_bytes()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _too_much(self.path, self.most)
        return data


# --- The python and the binary form -----------------------------------------------------------------------------------

Parsed = tuple[UInt8Array, Int64Array, "Int64Array | None"]


def _read_python(cifar: Cifar, source: _Folder | _Archive) -> Contents:
    def parse(name: str) -> Parsed:
        where = source.where(name)
        batch = read_pickle(source.read(name), where)
        pixels = batch.get("data")
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
            shape = pixels.shape if isinstance(pixels, np.ndarray) else "no array"
            raise DataError(f"{where} has {shape} under 'data', where CIFAR has uint8 of shape (N, {PIXELS})")
        labels = _listed_labels(batch, cifar.label_key, len(pixels), len(cifar.classes), where)
        coarse = None
        if cifar.superclasses:
            coarse = _listed_labels(batch, "coarse_labels", len(pixels), len(cifar.superclasses), where)
        return pixels, labels, coarse

    sizes = source.sizes((*cifar.train_files, *cifar.test_files, cifar.meta))
    meta = read_pickle(source.read(cifar.meta), source.where(cifar.meta))
    classes = _checked_names(meta.get(cifar.names_key), len(cifar.classes), source.where(cifar.meta))
    train = _joined(cifar.train_files, sizes, parse, source)
    test = _joined(cifar.test_files, sizes, parse, source)
    return Contents(classes, train, test)


def _read_binary(cifar: Cifar, source: _Folder | _Archive) -> Contents:
    labels_per_image = 2 if cifar.superclasses else 1
    width = labels_per_image + PIXELS

    def parse(name: str) -> Parsed:
        where = source.where(name)
        data = source.read(name)
        if len(data) % width:
            raise DataError(f"{where} has {len(data):,} bytes, which is not a multiple of {width}: it is truncated")
        rows = np.frombuffer(data, np.uint8).reshape(-1, width)
        # CIFAR-100 has the superclass first, then the class.
        labels = _checked_labels(rows[:, labels_per_image - 1], len(cifar.classes), where)
        coarse = _checked_labels(rows[:, 0], len(cifar.superclasses), where) if cifar.superclasses else None
        return rows[:, labels_per_image:], labels, coarse

    train_files, test_files = (tuple(f"{n}.bin" for n in names) for names in (cifar.train_files, cifar.test_files))
    classes_file = cifar.binary_names[0]
    sizes = source.sizes((*train_files, *test_files, classes_file))
    text = source.read(classes_file)
    if len(text) > _MAX_NAMES:
        raise DataError(f"{source.where(classes_file)} has {len(text):,} bytes, where some names were expected")
    try:
        lines = str(text, "utf-8").splitlines()
    except UnicodeError:
        raise DataError(f"{source.where(classes_file)} is not text; get the file again") from None
    names = [line.strip() for line in lines if line.strip()]
    classes = _checked_names(names, len(cifar.classes), source.where(classes_file))
    train = _joined(train_files, sizes, parse, source)
    test = _joined(test_files, sizes, parse, source)
    return Contents(classes, train, test)


def _joined(
    names: tuple[str, ...], sizes: dict[str, int], parse: Callable[[str], Parsed], source: _Folder | _Archive
) -> Split:
    """The files called `names`, one after the other, in one array that is allocated once."""
    # A file holds no more images than this. What is too much (under 1 %) is never touched, so it takes no memory.
    room = sum(sizes[name] for name in names) // PIXELS
    pixels = np.empty((room, PIXELS), np.uint8)
    labels: list[Int64Array] = []
    coarse: list[Int64Array] = []
    count = 0
    for name in names:
        rows, fine, superclass = parse(name)
        if not len(rows):
            raise DataError(f"{source.where(name)} has no images; get the file again")
        pixels[count : count + len(rows)] = rows
        count += len(rows)
        labels.append(fine)
        if superclass is not None:
            coarse.append(superclass)
    return Split(pixels[:count], np.concatenate(labels), np.concatenate(coarse) if coarse else None)


def _listed_labels(batch: dict[str, Any], key: str, count: int, classes: int, where: str) -> Int64Array:
    values = batch.get(key)
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if type(values) is not list or not all(type(value) is int for value in values):
        raise DataError(f"{where} has no list of integers under '{key}'; get the file again")
    if len(values) != count:
        raise DataError(f"{where} has {count:,} images but {len(values):,} entries under '{key}'; get the file again")
    return _checked_labels(values, classes, where)


def _checked_labels(values: list[int] | UInt8Array, classes: int, where: str) -> Int64Array:
    try:
        labels = np.array(values, np.int64)
    except OverflowError:
        raise DataError(f"{where} has a label of more than 64 bits; get the file again") from None
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"{where} has the label {wrong[0]}, where labels go from 0 to {classes - 1}; get the file again"
        )
    return labels


def _checked_names(names: Any, count: int, where: str) -> tuple[str, ...]:
    if type(names) is not list or not all(type(name) is str and name for name in names):
        raise DataError(f"{where} has no list of class names; get the file again")
    if len(names) != count or len(set(names)) != count:
        raise DataError(f"{where} has {len(set(names))} different class names, where {count} were expected")
    for name in names:
        # They are printed, drawn, and written as UTF-8.
        if len(name) > _MAX_NAME or not name.isprintable():
            raise DataError(
                f"{where} has the class name {name[:40]!r}, which is not one of up to {_MAX_NAME} characters that can "
                "be printed; get the file again"
            )
    return tuple(names)


# --- The Hub's parquet form -------------------------------------------------------------------------------------------

_PARQUET_BYTES = "img.bytes"
_PARQUET_NAME = re.compile(r"(train|test)-(\d{5})-of-(\d{5})\.parquet")


def _find_parquet(cifar: Cifar, folder: Path) -> Found | None:
    snapshots = f"datasets--{cifar.hub.replace('/', '--')}/snapshots/*/{cifar.parquet_folder}"  # the Hub's own cache
    candidates = (
        folder / cifar.parquet_folder,
        folder / cifar.name,
        folder / cifar.name / cifar.parquet_folder,
        folder,
        *sorted(folder.glob(snapshots)),
    )
    for candidate in candidates:
        shards = _parquet_shards(cifar, candidate)
        if shards:
            break
    else:
        return None
    for split in ("train", "test"):
        found = shards.get(split, [])
        if not found:
            raise DataError(f"{candidate} is incomplete: {split}-*.parquet missing; put the whole dataset there")
        total = int(found[0].name[-13:-8])
        if [path.name for path in found] != [f"{split}-{i:05}-of-{total:05}.parquet" for i in range(total)]:
            raise DataError(f"{candidate} is incomplete: it has {len(found)} of {total} parts of {split}-*.parquet")
    packed = (*shards["train"], *shards["test"])
    return Found(f"parquet files in {candidate}", packed, partial(_read_parquet, cifar, shards))


def _read_parquet(cifar: Cifar, shards: dict[str, list[Path]]) -> Contents:
    train, test = (_decoded(cifar, shards[split]) for split in ("train", "test"))
    return Contents(_parquet_classes(cifar, shards["train"][0]), train, test)


def _parquet_shards(cifar: Cifar, folder: Path) -> dict[str, list[Path]]:
    """The parts of train and test in `folder`, in order; nothing where they are another dataset's."""
    shards: dict[str, list[Path]] = {}
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(folder, error) from error
    for name in names:
        if match := _PARQUET_NAME.fullmatch(name):
            shards.setdefault(match[1], []).append(folder / name)
    if not shards:
        return {}
    first = next(iter(shards.values()))[0]
    with _parquet(first) as file:
        columns = set(file.schema_arrow.names)
    return shards if {"img", cifar.parquet_label} <= columns else {}


@contextlib.contextmanager
def _parquet(path: Path, dictionaries: tuple[str, ...] = ()) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`. Whatever goes wrong with it becomes a DataError that names the file.

    dictionaries: columns that are read as such.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        files.regular_size(path)
        with pq.ParquetFile(path, read_dictionary=dictionaries) as file:
            yield file
    except OSError as error:
        if error.errno is not None:
            raise _unreadable(path, error) from error
        raise DataError(f"{path} is damaged ({_brief(error)}); get the file again") from error
    except (pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{path} is truncated or is not a parquet file ({_brief(error)}); get it again") from error


def _decoded(cifar: Cifar, paths: list[Path]) -> Split:
    columns = [_PARQUET_BYTES, cifar.parquet_label] + (["coarse_label"] if cifar.superclasses else [])
    most, count = _most_bytes(), 0
    for path in paths:
        with _parquet(path) as file:
            _check_columns(file, columns, path)
            unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            count += file.metadata.num_rows
            if max(unpacked, count * PIXELS) > most:
                raise _too_much(path, most)
    if count < 1:
        raise DataError(f"{paths[0]} has {count:,} images; get the file again")
    pixels = np.empty((count, PIXELS), np.uint8)
    labels: dict[str, list[int]] = {column: [] for column in columns[1:]}
    at = 0
    for path in paths:
        # As a dictionary, for 8 kB can hold one value of 8 MB a thousand times. Encodings by differences can as well,
        # and pyarrow refuses those then.
        with _parquet(path, (_PARQUET_BYTES,)) as file:
            # A group at a time: nested dictionaries of several can't be put together.
            groups = (file.iter_batches(100, [i], columns) for i in range(file.metadata.num_row_groups))
            for batch in itertools.chain.from_iterable(groups):
                if at + len(batch) > count:
                    raise DataError(f"{path} has more images than it says; get the file again")
                for column, values in labels.items():
                    values.extend(batch.column(column).to_pylist())
                for image in batch.column("img").field("bytes"):
                    pixels[at] = _png_planes(image.as_py(), f"{path}, image {at}")
                    at += 1
    where = str(paths[0])
    if at != count:
        raise DataError(f"{where} has fewer images than it says; get the file again")
    fine = _listed_labels(labels, cifar.parquet_label, count, len(cifar.classes), where)
    coarse = None
    if cifar.superclasses:
        coarse = _listed_labels(labels, "coarse_label", count, len(cifar.superclasses), where)
    return Split(pixels, fine, coarse)


def _check_columns(file: Any, columns: list[str], path: Path) -> None:
    """Raise DataError where what would be read is not what it is called: text in place of labels can be a bomb too."""
    there = {column.path: column for column in map(file.schema.column, range(len(file.schema)))}
    for name in columns:
        kinds = ("BYTE_ARRAY",) if name == _PARQUET_BYTES else ("INT32", "INT64")
        if name not in there:
            raise DataError(f"{path} has no column '{name}'; get the file again")
        if there[name].physical_type not in kinds or there[name].max_repetition_level:
            raise DataError(f"{path} has no {' or '.join(kinds)} in its column '{name}'; get the file again")


def _png_planes(data: Any, where: str) -> UInt8Array:
    """uint8 (3072,), RGB planes, of a 32x32 RGB PNG."""
    from PIL import Image

    if type(data) is not bytes or len(data) > _MAX_PNG:
        raise DataError(f"{where} is not a PNG of at most {_MAX_PNG:,} bytes; get the file again")
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (32, 32) or image.mode != "RGB":
                raise DataError(f"{where} is {image.size[0]}x{image.size[1]} {image.mode}, where CIFAR has 32x32 RGB")
            pixels = np.frombuffer(image.tobytes(), np.uint8)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, *bombs) as error:
        raise DataError(f"{where} is not a PNG that can be read ({_brief(error)}); get the file again") from error
    return pixels.reshape(PIXELS // 3, 3).T.reshape(PIXELS)


def _parquet_classes(cifar: Cifar, path: Path) -> tuple[str, ...]:
    """The class names that the `datasets` library writes into the schema's metadata, or else the official ones."""
    with _parquet(path) as file:
        text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(text)["info"]["features"][cifar.parquet_label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return cifar.classes
    # The Hub's CIFAR-100 spells class 26 "cra". The same dataset must have the same names wherever it was read.
    if type(names) is list and cifar is CIFAR100:
        names = ["crab" if name == "cra" else name for name in names]
    return _checked_names(names, len(cifar.classes), str(path))


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_binary(cifar: Cifar, contents: Contents, folder: Path, origin: str) -> None:
    """Write `contents` into the existing `folder` in the official binary form, which any other tool reads too.

    `origin` says where the bytes came from; readers add it to `Dataset.source`. Raises StorageError.
    """
    for names, split in ((cifar.train_files, contents.train), (cifar.test_files, contents.test)):
        for name, part in zip(names, np.array_split(np.arange(len(split.labels)), len(names)), strict=True):
            labels = [split.labels] if split.coarse is None else [split.coarse, split.labels]
            rows = np.column_stack([*(column[part].astype(np.uint8) for column in labels), split.pixels[part]])
            with files.replacing(folder / f"{name}.bin") as file:
                file.write(rows.data)
    for name, classes in zip(cifar.binary_names, (contents.classes, cifar.superclasses), strict=False):
        files.write_text(folder / name, "\n".join(classes) + "\n")
    files.write_text(folder / _ORIGIN_FILE, origin + "\n")


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions")
