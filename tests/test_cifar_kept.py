"""CIFAR that was unpacked once: the same bits again, and never those of another file or of a damaged one."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_files import tiny, write_archive, write_binary, write_parquet, write_python
from cifarlab import files
from cifarlab.data import cifar_kept
from cifarlab.data.cifar import Cifar, Contents, Found, find, read_cifar
from cifarlab.data.cifar_kept import read_or_recall
from cifarlab.data.dataset import Dataset
from cifarlab.errors import DataError

PACKED: dict[str, Callable[..., Path]] = {
    "archive of python files": write_archive,
    "archive of binary files": lambda data, root: write_archive(data, root, "binary"),
    "parquet": write_parquet,
    "parquet in parts": lambda data, root: write_parquet(data, root, train_parts=3),
}


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read from its source, in words, each time that it was."""
    sources: list[str] = []

    def spy(cifar: Cifar, folder: Path) -> Found | None:
        found = find(cifar, folder)
        if found is None:
            return None

        def read() -> Contents:
            sources.append(found.source)
            return found.read()

        return dataclasses.replace(found, read=read)

    monkeypatch.setattr(cifar_kept, "find", spy)
    return sources


class World:
    """An archive of CIFAR-10 in a folder of its own, and a cache."""

    def __init__(self, root: Path) -> None:
        self.folder, self.cache = root / "data", root / "cache"
        self.archive = write_archive(tiny("cifar10"), self.folder)
        self.said: list[str] = []

    def read(self) -> Dataset:
        dataset = read_or_recall("cifar10", self.folder, self.cache, self.said.append)
        assert dataset is not None
        return dataset

    def expected(self) -> Dataset:
        dataset = read_cifar("cifar10", self.folder)
        assert dataset is not None
        return dataset

    def kept(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if path.suffix != ".lock"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def same(one: Dataset, other: Dataset) -> bool:
    fields = ("name", "classes", "source", "notes", "folder")
    return one.content_hash() == other.content_hash() and all(getattr(one, f) == getattr(other, f) for f in fields)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", PACKED)
def test_what_was_kept_is_what_the_reader_gives_and_nothing_is_unpacked_again(
    form: str, name: str, tmp_path: Path, unpacked: list[str]
) -> None:
    PACKED[form](tiny(name), tmp_path / "data")
    expected = read_cifar(name, tmp_path / "data")
    assert expected is not None and expected.test is not None
    for _ in range(3):
        found = read_or_recall(name, tmp_path / "data", tmp_path / "cache", pytest.fail)
        assert found is not None and found.test is not None
        assert same(found, expected)
        for one, other in ((found.train, expected.train), (found.test, expected.test)):
            np.testing.assert_array_equal(one.pixels, other.pixels)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert one.pixels.flags.writeable and one.pixels.flags.c_contiguous  # torch can share the memory
    assert unpacked == [expected.source]


@pytest.mark.parametrize("write", [write_python, write_binary])
def test_folders_of_plain_files_and_folders_without_cifar_leave_nothing(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    assert read_or_recall("cifar10", tmp_path / "data", tmp_path / "cache", pytest.fail) is None
    write(tiny("cifar10"), tmp_path / "data")
    found = read_or_recall("cifar10", tmp_path / "data", tmp_path / "cache", pytest.fail)
    expected = read_cifar("cifar10", tmp_path / "data")
    assert found is not None and expected is not None and same(found, expected)
    assert not (tmp_path / "cache").exists()


def test_a_source_replaced_by_one_of_the_same_size_and_date_is_read_anew(world: World, tmp_path: Path) -> None:
    before = world.read()
    other = write_archive(tiny("cifar10", seed=1), tmp_path / "other")
    old, new = world.archive.read_bytes(), other.read_bytes()
    size = max(len(old), len(new))
    status = world.archive.stat()
    for data in (old, new):
        world.archive.write_bytes(data.ljust(size, b"\0"))  # gzip allows zeros at the end
        os.utime(world.archive, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert same(world.read(), world.expected())
    assert world.read().content_hash() != before.content_hash()


def test_a_source_that_was_moved_is_found_again_and_tells_its_new_place(world: World, unpacked: list[str]) -> None:
    world.read()
    world.folder = world.folder.rename(world.folder.with_name("moved"))
    assert world.read().source == f"python files in {world.folder / world.archive.name}"
    assert len(unpacked) == 1


def test_whatever_byte_of_it_is_damaged_it_is_made_again_without_a_word(world: World, unpacked: list[str]) -> None:
    expected = world.read()
    (path,) = world.kept()
    whole = path.read_bytes()
    # Many of the headers, which say shapes and types, and some of the pixels.
    headers = [at for at in range(len(whole)) if b"NUMPY" in whole[max(0, at - 128) : at]]
    places = [*headers[::17], *range(0, len(whole), 9001), *range(len(whole) - 300, len(whole), 17)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert same(world.read(), expected), place
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert same(world.read(), expected), size
    assert path.read_bytes() == whole and not world.said
    assert len(unpacked) > 50


def test_fewer_images_than_were_kept_are_noticed(world: World) -> None:
    """A damaged shape makes numpy read less of an array, and zip's checksum is compared at its end only."""
    expected = world.read()
    (path,) = world.kept()
    with np.load(path) as kept:
        fewer: dict[str, Any] = {name: kept[name][:20] for name in kept if name != "record"}
        record = kept["record"]
    np.savez(path, record=record, **fewer)
    assert same(world.read(), expected)


@pytest.mark.parametrize("readable", [True, False])
def test_a_cache_that_can_t_be_written_is_no_error(readable: bool, world: World) -> None:
    """Here a file stands where the folder is needed. What was kept in a cache that can only be read is taken."""
    if readable:
        world.read()
        world.cache.chmod(0o500)
    else:
        world.cache.write_bytes(b"")
    for _ in range(2):
        assert same(world.read(), world.expected())
    sentence = (
        f"CIFAR-10 is unpacked anew at each start: cannot create the folder {world.cache}: "
        "a file stands where a folder is needed; choose another folder"
    )
    assert world.said == ([] if readable else [sentence] * 2)


def test_a_disk_that_fills_up_is_told_and_leaves_nothing_half_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 50_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path, "x") if "x" in mode else opened(path, mode))
        assert same(world.read(), world.expected())
    (said,) = world.said
    assert said.startswith("CIFAR-10 is unpacked anew at each start: cannot write ") and "the disk is full" in said
    assert not world.kept()
    assert same(world.read(), world.expected())
    assert len(world.kept()) == 1


def test_an_interrupt_leaves_nothing_half_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.read()
    assert not world.kept()
    assert same(world.read(), world.expected())


def test_of_two_at_once_the_second_waits_and_takes_what_the_first_kept(world: World, unpacked: list[str]) -> None:
    together = threading.Barrier(2)
    results: list[Dataset] = []

    def read() -> None:
        together.wait()
        results.append(world.read())

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and all(same(result, world.expected()) for result in results)
    assert len(unpacked) == 1


def test_the_second_says_that_it_waits(world: World) -> None:
    world.read()
    (path,) = world.kept()
    path.unlink()
    reader = threading.Thread(target=world.read)
    waiting = threading.Event()
    world.said = Heard(waiting)
    with files.locked(path.with_name(f".{path.stem}.lock"), lambda: None):
        reader.start()
        assert waiting.wait(60)
    reader.join()
    assert world.said == ["another run is unpacking CIFAR-10; waiting for it"]
    assert len(world.kept()) == 1


class Heard(list[str]):
    """Lines, and an event that is set by the first."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self.event = event

    def append(self, line: str) -> None:
        super().append(line)
        self.event.set()


def test_what_is_wrong_with_the_source_is_said_as_ever_and_nothing_is_kept(world: World) -> None:
    whole = world.archive.read_bytes()
    world.archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is truncated or damaged"):
        world.read()
    assert not world.kept()
    world.archive.unlink()
    world.archive.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*tar\.gz: Is a directory"):
        world.read()
