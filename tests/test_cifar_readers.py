"""CIFAR-10 and CIFAR-100 in every form: all readers give the same arrays, and what is damaged is refused by name."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_files import (
    BINARY_FOLDER,
    PARQUET_FOLDER,
    PYTHON_FOLDER,
    Tiny,
    add_member,
    parquet_columns,
    pickled,
    python_batches,
    tiny,
    write_archive,
    write_binary,
    write_parquet,
    write_parquet_file,
    write_python,
)
from cifarlab.data import cifar
from cifarlab.data.cifar import Contents, read_cifar, read_contents
from cifarlab.data.dataset import Dataset
from cifarlab.errors import DataError

NAMES = ["cifar10", "cifar100"]
FORMS: dict[str, Callable[[Tiny, Path], Path]] = {
    "python": write_python,
    "binary": write_binary,
    "python archive": lambda data, root: write_archive(data, root, "python"),
    "binary archive": lambda data, root: write_archive(data, root, "binary"),
    "parquet": write_parquet,
    "parquet in three parts": lambda data, root: write_parquet(data, root, train_parts=3),
    "rewritten pickles": lambda data, root: write_python(data, root, protocol=5),
}


def read(name: str, folder: Path) -> Dataset:
    dataset = read_cifar(name, folder)
    assert dataset is not None
    return dataset


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_cifar(name, folder)
    assert caught.value.exit_code == 3
    return str(caught.value)


# --- All forms are the same dataset -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_arrays_that_were_written(tmp_path: Path, name: str, form: str) -> None:
    data = tiny(name)
    FORMS[form](data, tmp_path)
    dataset = read(name, tmp_path)
    assert dataset.name == name
    assert dataset.classes == tuple(data.classes)
    assert dataset.validation is None and dataset.test is not None
    for found, expected in ((dataset.train, data.train), (dataset.test, data.test)):
        # Row by row, the red plane, the green one, the blue one.
        np.testing.assert_array_equal(found.pixels, expected.pixels.reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert found.pixels.dtype == np.uint8 and found.labels.dtype == np.int64
        assert found.pixels.flags.c_contiguous and found.pixels.flags.writeable
    assert dataset.notes == (
        f"this {name.upper().replace('R', 'R-')} has 40 training and 20 test images; "
        "the official one has 50,000 and 10,000",
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_form_has_the_same_content_hash(tmp_path: Path, name: str) -> None:
    hashes = set()
    for form, write in FORMS.items():
        write(tiny(name), tmp_path / form)
        hashes.add(read(name, tmp_path / form).content_hash())
    write_python(tiny(name, seed=1), tmp_path / "other")
    assert len(hashes) == 1
    assert read(name, tmp_path / "other").content_hash() not in hashes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_superclasses_too(tmp_path: Path, form: str) -> None:
    data = tiny("cifar100")
    FORMS[form](data, tmp_path)
    contents = read_contents(cifar.CIFAR100, tmp_path)
    assert contents is not None and contents.train.coarse is not None and contents.test.coarse is not None
    np.testing.assert_array_equal(contents.train.coarse, data.train.coarse)
    np.testing.assert_array_equal(contents.test.coarse, data.test.coarse)


@pytest.mark.parametrize("name", NAMES)
def test_the_source_says_which_form_was_read_and_where_in_the_order_of_preference(tmp_path: Path, name: str) -> None:
    data = tiny(name)
    parquet = write_parquet(data, tmp_path)
    binary_archive = write_archive(data, tmp_path, "binary")
    python_archive = write_archive(data, tmp_path, "python")
    binary = write_binary(data, tmp_path)
    python = write_python(data, tmp_path)
    for kind, path in [
        ("python", python),
        ("binary", binary),
        ("python", python_archive),
        ("binary", binary_archive),
        ("parquet", parquet),
    ]:
        assert read(name, tmp_path).source == f"{kind} files in {path}"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read_cifar(name, tmp_path) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_the_files_may_be_given_itself(tmp_path: Path, name: str) -> None:
    for write in (write_python, write_binary, write_parquet):
        folder = write(tiny(name), tmp_path)
        assert len(read(name, folder).train) == 40


def test_the_hub_s_own_cache_folder_may_be_given(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--uoft-cs--cifar10" / "snapshots" / "0b2714987fa478483af9968de7c934580d0bb9a2"
    write_parquet(tiny("cifar10"), snapshot)
    assert read("cifar10", tmp_path).source == f"parquet files in {snapshot / 'plain_text'}"


def test_both_datasets_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for form, write in FORMS.items():
        for name in NAMES:
            write(tiny(name), tmp_path / form)
        assert [len(read(name, tmp_path / form).classes) for name in NAMES] == [10, 100]
    folder = write_parquet(tiny("cifar100"), tmp_path / "only 100")
    assert read_cifar("cifar10", folder) is None  # the same file names, other columns


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_is_read_again_and_tells_its_origin(tmp_path: Path, name: str) -> None:
    write_parquet(tiny(name), tmp_path)
    known = cifar.lookup(name)
    before = read_contents(known, tmp_path)
    assert isinstance(before, Contents)
    folder = tmp_path / BINARY_FOLDER[name]
    folder.mkdir()
    cifar.write_binary(known, before, folder, "https://example.org at revision 1")
    after = read(name, tmp_path)
    assert after.source == f"binary files in {folder}, downloaded from https://example.org at revision 1"
    shutil.rmtree(folder)
    assert after.content_hash() == read(name, tmp_path).content_hash()


def test_the_binary_form_that_we_write_is_the_official_one_byte_for_byte(tmp_path: Path) -> None:
    for name in NAMES:
        data = tiny(name, train=45)  # not a multiple of the five batches either
        expected = write_binary(data, tmp_path / "expected")
        contents = read_contents(cifar.lookup(name), tmp_path / "expected")
        assert contents is not None
        found = tmp_path / name
        found.mkdir()
        cifar.write_binary(cifar.lookup(name), contents, found, "somewhere")
        for file in expected.glob("*.bin"):
            assert (found / file.name).read_bytes() == file.read_bytes()


def test_the_built_in_names_are_the_official_ones() -> None:
    assert len(set(cifar.CIFAR100.classes)) == 100 and list(cifar.CIFAR100.classes) == sorted(cifar.CIFAR100.classes)
    assert len(set(cifar.CIFAR100.superclasses)) == 20
    assert list(cifar.CIFAR100.superclasses) == sorted(cifar.CIFAR100.superclasses)
    assert [cifar.CIFAR100.classes[i] for i in (0, 26, 65, 99)] == ["apple", "crab", "rabbit", "worm"]
    assert cifar.CIFAR10.classes[6] == "frog" and len(cifar.CIFAR10.classes) == 10


# --- Nothing there, or not readable -----------------------------------------------------------------------------------


def test_nothing_is_found_in_a_folder_that_is_missing_empty_or_about_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "train").mkdir()
    for name in NAMES:
        assert read_cifar(name, tmp_path / "missing") is None
        assert read_cifar(name, tmp_path) is None


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = write_archive(tiny("cifar10"), tmp_path)
    assert refusal("cifar10", path) == f"{path} is a file; give the folder that holds it"


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)  # tests may run as root, whom no permission stops
    assert f"cannot read {tmp_path}: Permission denied" in refusal("cifar10", tmp_path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    folder = write_python(tiny("cifar10"), tmp_path)
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert f"cannot read {folder / 'batches.meta'}: Permission denied" in refusal("cifar10", tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        read_cifar("cifar-10", Path())


@pytest.mark.parametrize("write", [write_python, write_binary])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(tmp_path: Path, name: str, write: Callable[[Tiny, Path], Path]) -> None:
    folder = write(tiny(name), tmp_path)
    needed = [path for path in sorted(folder.iterdir()) if "coarse" not in path.name]
    for path in needed:
        hidden = path.rename(tmp_path / "hidden")
        message = refusal(name, tmp_path)
        assert str(folder) in message and f"{path.name} missing" in message
        hidden.rename(path)
    assert len(read(name, tmp_path).train) == 40


# --- Damaged python and binary files ----------------------------------------------------------------------------------


def damaged_batch(tmp_path: Path, name: str, **changes: Any) -> str:
    """The refusal of a python folder in whose first batch (or meta) something is replaced, or removed (None)."""
    batches = python_batches(tiny(name))
    folder = tmp_path / PYTHON_FOLDER[name]
    folder.mkdir()
    first = "data_batch_1" if name == "cifar10" else "train"
    meta = "batches.meta" if name == "cifar10" else "meta"
    file = ""
    for key, value in changes.items():
        file = meta if key in batches[meta] else first
        if value is None:
            del batches[file][key]
        else:
            batches[file][key] = value
    for other, batch in batches.items():
        (folder / other).write_bytes(pickled(batch, protocol=4))
    message = refusal(name, tmp_path)
    assert message.startswith(f"{folder / file} ")
    return message


EIGHT = np.zeros((8, 3072), np.uint8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": EIGHT[:7]}, "7 images but 8 entries"),
        ({"data": EIGHT[:, :3071]}, "(8, 3071)"),
        ({"data": EIGHT[0]}, "(3072,)"),
        ({"data": EIGHT.astype(np.int64)}, "dtype 'i8'"),
        ({"data": EIGHT.tolist()}, "no array"),
        ({"data": None}, "no array"),
        ({"data": EIGHT[:0], "labels": []}, "no images"),
        ({"labels": [0] * 7}, "8 images but 7 entries"),
        ({"labels": [0] * 7 + [10]}, "label 10"),
        ({"labels": [0] * 7 + [-1]}, "label -1"),
        ({"labels": [0] * 7 + [2**63 - 1]}, "label 9223372036854775807"),
        ({"labels": [0] * 7 + ["1"]}, "no list of integers under 'labels'"),
        ({"labels": [0] * 7 + [True]}, "no list of integers under 'labels'"),
        ({"labels": [0] * 7 + [[1]]}, "no list of integers under 'labels'"),
        ({"labels": "01234567"}, "no list of integers under 'labels'"),
        ({"labels": None}, "no list of integers under 'labels'"),
        ({"label_names": ["a"] * 10}, "1 different class names, where 10"),
        ({"label_names": [str(i) for i in range(11)]}, "11 different class names, where 10"),
        ({"label_names": list(range(10))}, "no list of class names"),
        ({"label_names": None}, "no list of class names"),
    ],
)
def test_a_damaged_python_batch_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in damaged_batch(tmp_path, "cifar10", **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fine_labels": [0] * 39 + [100]}, "label 100, where labels go from 0 to 99"),
        ({"coarse_labels": [0] * 39 + [20]}, "label 20, where labels go from 0 to 19"),
        ({"coarse_labels": [0] * 39}, "40 images but 39 entries under 'coarse_labels'"),
        ({"fine_label_names": [str(i) for i in range(99)]}, "99 different class names, where 100"),
    ],
)
def test_a_damaged_python_file_of_cifar100_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in damaged_batch(tmp_path, "cifar100", **changes)


def test_labels_in_a_uint8_array_are_read_like_a_list(tmp_path: Path) -> None:
    data = tiny("cifar10")
    folder = write_python(data, tmp_path)
    batch = python_batches(data)["test_batch"]
    (folder / "test_batch").write_bytes(pickled({**batch, "labels": data.test.labels.astype(np.uint8)}, 4))
    assert read("cifar10", tmp_path).test.labels.tolist() == data.test.labels.tolist()  # type: ignore[union-attr]


def test_a_python_batch_with_code_in_it_is_refused_in_a_folder_and_in_an_archive(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    code = b"cposix\nsystem\n(S'mkdir %s'\ntR." % str(marker).encode()
    folder = write_python(tiny("cifar10"), tmp_path / "a")
    (folder / "test_batch").write_bytes(code)
    assert "test_batch asks for 'posix.system'" in refusal("cifar10", tmp_path / "a")
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    assert "test_batch asks for 'posix.system'" in refusal("cifar10", tmp_path / "b")
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_refused_in_either_form(tmp_path: Path, name: str) -> None:
    for write in (write_python, write_binary):
        folder = write(tiny(name), tmp_path)
        for path in sorted(folder.iterdir()):
            if path.name.endswith(".txt"):
                continue
            whole = path.read_bytes()
            for size in (0, 1, len(whole) // 2 - 1, len(whole) - 1):
                path.write_bytes(whole[:size])
                assert str(path) in refusal(name, tmp_path)
            path.write_bytes(whole)
        assert len(read(name, tmp_path).train) == 40
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "file", "offset", "label"),
    [("cifar10", "test_batch.bin", 0, 10), ("cifar100", "train.bin", 0, 20), ("cifar100", "train.bin", 1, 100)],
)
def test_a_wrong_label_in_a_binary_file_is_refused(
    tmp_path: Path, name: str, file: str, offset: int, label: int
) -> None:
    path = write_binary(tiny(name), tmp_path) / file
    data = bytearray(path.read_bytes())
    data[offset] = label
    path.write_bytes(data)
    assert f"{path} has the label {label}" in refusal(name, tmp_path)


@pytest.mark.parametrize("text", [b"", b"a\n" * 10, b"\n".join(b"%d" % i for i in range(9)), b"\xff\xfe" * 20])
def test_wrong_class_names_in_a_binary_folder_are_refused(tmp_path: Path, text: bytes) -> None:
    folder = write_binary(tiny("cifar10"), tmp_path)
    (folder / "batches.meta.txt").write_bytes(text)
    assert refusal("cifar10", tmp_path).startswith(str(folder / "batches.meta.txt"))


def test_a_file_larger_than_any_of_cifar_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_python(tiny("cifar10"), tmp_path)
    os.truncate(folder / "test_batch", 2**40)  # sparse
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert "test_batch has 1,099,511,627,776 bytes" in refusal("cifar10", tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    folder = write_python(tiny("cifar10"), tmp_path)
    (folder / "test_batch").unlink()
    os.mkfifo(folder / "test_batch")
    assert "test_batch missing" in refusal("cifar10", tmp_path)


# --- Archives ---------------------------------------------------------------------------------------------------------


def archive_with(tmp_path: Path, change: Callable[[tarfile.TarFile, str, bytes], bool]) -> Path:
    """An archive to whose members `change(archive, name, data)` is applied; True: it has dealt with this one."""
    data = tiny("cifar10")
    path = tmp_path / "in" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for file, batch in python_batches(data).items():
            name = f"cifar-10-batches-py/{file}"
            content = pickled(batch)
            if not change(archive, name, content):
                add_member(archive, name, content)
    return path.parent


HARMLESS: list[dict[str, Any]] = [
    {"name": "../escaped"},
    {"name": "/tmp/escaped-absolute"},
    {"name": "cifar-10-batches-py/../../escaped"},
    {"name": "cifar-10-batches-py/sub/data_batch_1"},
    {"name": "other/data_batch_1"},
    {"name": "cifar-10-batches-py", "type": tarfile.SYMTYPE, "linkname": "/tmp"},
    {"name": "cifar-10-batches-py/link", "type": tarfile.SYMTYPE, "linkname": "../../../etc/passwd"},
    {"name": "cifar-10-batches-py/link/escaped"},
    {"name": "cifar-10-batches-py/hard", "type": tarfile.LNKTYPE, "linkname": "../../escaped"},
    {"name": "cifar-10-batches-py/device", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    {"name": "cifar-10-batches-py/pipe", "type": tarfile.FIFOTYPE},
]


def test_members_that_are_not_the_dataset_s_are_never_written_anywhere(tmp_path: Path) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        if name.endswith("data_batch_1"):
            for fields in HARMLESS:
                add_member(archive, data=b"" if "type" in fields else b"bad", **fields)
        return False

    folder = archive_with(tmp_path, change)
    before = sorted(tmp_path.rglob("*"))
    assert len(read("cifar10", folder).train) == 40
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped-absolute").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "not a regular file"),
        ({"type": tarfile.SYMTYPE, "linkname": "data_batch_2"}, "not a regular file"),
        ({"type": tarfile.LNKTYPE, "linkname": "cifar-10-batches-py/data_batch_2"}, "not a regular file"),
        ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "not a regular file"),
        ({"type": tarfile.FIFOTYPE}, "not a regular file"),
        ({"type": tarfile.DIRTYPE}, "not a regular file"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "not a regular file"),
        ({"size": 2**33}, "8,589,934,592 bytes"),
        ({"size": 2**28}, "truncated or damaged"),
    ],
)
def test_a_member_of_the_dataset_that_is_no_plain_file_of_its_size_is_refused(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        if not name.endswith("data_batch_3"):
            return False
        add_member(archive, name, **fields)
        return True

    message = refusal("cifar10", archive_with(tmp_path, change))
    assert reason in message and "cifar-10-python.tar.gz" in message
    if "damaged" not in reason:
        assert "data_batch_3" in message


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        add_member(archive, name, data)
        return not name.endswith("data_batch_3")

    assert "data_batch_3 is there twice" in refusal("cifar10", archive_with(tmp_path, change))


def test_a_member_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = archive_with(tmp_path, lambda archive, name, data: name.endswith("data_batch_3"))
    assert "cifar-10-batches-py/data_batch_3 missing" in refusal("cifar10", folder)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_member_with_a_negative_size_neither_loops_nor_passes(tmp_path: Path, size: int) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        if name.endswith("data_batch_3"):
            add_member(archive, name, size=size)
            # The same through a pax header, which is CVE-2025-8194.
            add_member(archive, "x", pax_headers={"size": str(size)})
            return True
        return False

    archive_with(tmp_path, change)
    assert "cifar-10-python.tar.gz" in refusal("cifar10", tmp_path / "in")


def test_an_archive_whose_members_start_with_a_dot_is_read(tmp_path: Path) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        add_member(archive, "./" + name, data)
        return True

    assert len(read("cifar10", archive_with(tmp_path, change)).train) == 40


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        if name.endswith("data_batch_1"):
            add_member(archive, "zeros", bytes(3_000_000))
        return False

    folder = archive_with(tmp_path, change)
    assert (folder / "cifar-10-python.tar.gz").stat().st_size < 1_000_000
    monkeypatch.setattr(cifar, "_MAX_ARCHIVE", 2_000_000)
    assert "unpacks to more than 2,000,000 bytes" in refusal("cifar10", folder)


def test_an_archive_with_too_many_members_is_refused(tmp_path: Path) -> None:
    def change(archive: tarfile.TarFile, name: str, data: bytes) -> bool:
        for i in range(300):
            add_member(archive, f"{name}-{i}")
        return False

    assert "more than 1000 members" in refusal("cifar10", archive_with(tmp_path, change))


def test_a_chain_of_long_names_does_not_overflow_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    header = tarfile.TarInfo("x")
    header.type = tarfile.GNUTYPE_LONGNAME
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) * 5000))
    assert f"{path} is truncated or damaged" in refusal("cifar10", tmp_path)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_or_altered_archive_is_refused(tmp_path: Path, name: str, form: str) -> None:
    path = write_archive(tiny(name), tmp_path, form)
    whole = path.read_bytes()
    # The last eight bytes are gzip's checksum and length, after everything that a reader of members needs.
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(name, tmp_path)
    for position in (0, len(whole) // 2, len(whole) - 6, len(whole) - 2):
        altered = bytearray(whole)
        altered[position] ^= 0x55
        path.write_bytes(altered)
        assert str(path) in refusal(name, tmp_path)
    path.write_bytes(b"<html>moved</html>")
    assert f"{path} is truncated or damaged" in refusal(name, tmp_path)


def test_an_altered_checksum_far_behind_the_last_member_is_seen(tmp_path: Path) -> None:
    path = write_archive(tiny("cifar10"), tmp_path)
    data = bytearray(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(3_000_000)))
    path.write_bytes(data)
    assert len(read("cifar10", tmp_path).train) == 40
    data[-6] ^= 1
    path.write_bytes(data)
    assert "CRC check failed" in refusal("cifar10", tmp_path)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def parquet_with(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A parquet folder in whose train file columns are replaced (or removed, None)."""
    data = tiny(name)
    folder = write_parquet(data, tmp_path)
    columns = {**parquet_columns(data, data.train), **changes}
    path = folder / "train-00000-of-00001.parquet"
    write_parquet_file(path, {key: value for key, value in columns.items() if value is not None}, data.classes)
    return path


def images(size: tuple[int, int] = (32, 32), mode: str = "RGB", kind: str = "PNG") -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return [{"bytes": buffer.getvalue(), "path": None}] * 40


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"img": images(size=(32, 31))}, "image 0 is 32x31 RGB"),
        ({"img": images(size=(20_000, 20_000), mode="1")}, "image 0 "),
        ({"img": images(mode="L")}, "image 0 is 32x32 L"),
        ({"img": images(mode="P")}, "image 0 is 32x32 P"),
        ({"img": images(mode="RGBA")}, "image 0 is 32x32 RGBA"),
        ({"img": images(kind="BMP")}, "image 0 is not a PNG"),
        ({"img": images(kind="JPEG")}, "image 0 is not a PNG"),
        ({"img": [*images()[:39], {"bytes": images()[0]["bytes"][:60], "path": None}]}, "image 39 is not a PNG"),
        ({"img": [*images()[:39], {"bytes": None, "path": "/etc/passwd"}]}, "image 39 is not a PNG"),
        ({"img": [*images()[:39], None]}, "image 39 is not a PNG"),
        ({"img": [*images()[:39], {"bytes": bytes(70000), "path": None}]}, "image 39 is not a PNG of at most 65,536"),
        ({"img": [b"x"] * 40}, "no column 'img.bytes'"),
        ({"img": [{"path": "x"}] * 40}, "no column 'img.bytes'"),
        ({"img": [{"bytes": 1}] * 40}, "no BYTE_ARRAY in its column 'img.bytes'"),
        ({"label": [0] * 39 + [10]}, "label 10"),
        ({"label": [0] * 39 + [-1]}, "label -1"),
        ({"label": [0] * 39 + [None]}, "no list of integers under 'label'"),
        ({"label": ["0"] * 40}, "no INT32 or INT64 in its column 'label'"),
        ({"label": [0.5] * 40}, "no INT32 or INT64 in its column 'label'"),
        ({"label": [True] * 40}, "no INT32 or INT64 in its column 'label'"),
    ],
)
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = parquet_with(tmp_path, "cifar10", **changes)
    message = refusal("cifar10", tmp_path)
    assert message.startswith(str(path)) and reason in message


def test_a_parquet_file_of_cifar100_without_superclasses_is_refused(tmp_path: Path) -> None:
    path = parquet_with(tmp_path, "cifar100", coarse_label=None)
    assert refusal("cifar100", tmp_path) == f"{path} has no column 'coarse_label'; get the file again"


@pytest.mark.parametrize("columns", [{"image": [b"x"], "label": [1]}, {"text": ["x"], "label": [1]}])
def test_a_parquet_file_of_something_else_is_not_taken_for_cifar(tmp_path: Path, columns: dict[str, Any]) -> None:
    write_parquet_file(tmp_path / "train-00000-of-00001.parquet", columns)
    assert read_cifar("cifar10", tmp_path) is None


def test_a_truncated_or_altered_parquet_file_is_refused(tmp_path: Path) -> None:
    folder = write_parquet(tiny("cifar10"), tmp_path)
    for file in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        path = folder / file
        whole = path.read_bytes()
        for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert str(path) in refusal("cifar10", tmp_path)
        for position in (0, 2000, len(whole) - 300):
            altered = bytearray(whole)
            altered[position : position + 40] = b"\xa5" * 40
            path.write_bytes(altered)
            assert str(path) in refusal("cifar10", tmp_path)
        path.write_bytes(whole)
    assert len(read("cifar10", tmp_path).train) == 40


def test_missing_parts_of_a_parquet_dataset_are_refused(tmp_path: Path) -> None:
    folder = write_parquet(tiny("cifar10"), tmp_path, train_parts=3)
    (folder / "train-00001-of-00003.parquet").unlink()
    assert f"{folder} is incomplete: it has 2 of 3 parts of train-*.parquet" in refusal("cifar10", tmp_path)
    (folder / "test-00000-of-00001.parquet").unlink()
    for path in folder.glob("train*"):
        path.unlink()
    write_parquet_file(folder / "train-00000-of-00001.parquet", parquet_columns(tiny("cifar10"), tiny("cifar10").train))
    assert f"{folder} is incomplete: test-*.parquet missing" in refusal("cifar10", tmp_path)


def test_class_names_come_from_the_schema_or_else_are_the_official_ones(tmp_path: Path) -> None:
    data = tiny("cifar10")
    columns = {split: parquet_columns(data, part) for split, part in (("train", data.train), ("test", data.test))}
    for classes, expected in [(None, cifar.CIFAR10.classes), (list("abcdefghij"), tuple("abcdefghij"))]:
        for split, values in columns.items():
            write_parquet_file(tmp_path / f"{split}-00000-of-00001.parquet", values, classes)
        assert read("cifar10", tmp_path).classes == expected
    write_parquet_file(tmp_path / "train-00000-of-00001.parquet", columns["train"], list("abcdefghi"))
    assert "9 different class names, where 10" in refusal("cifar10", tmp_path)


def test_the_hub_s_misspelt_crab_is_put_right(tmp_path: Path) -> None:
    data = tiny("cifar100")
    names = ["cra" if name == "crab" else name for name in cifar.CIFAR100.classes]
    for split, part in (("train", data.train), ("test", data.test)):
        path = tmp_path / PARQUET_FOLDER["cifar100"] / f"{split}-00000-of-00001.parquet"
        write_parquet_file(path, parquet_columns(data, part), names)
    assert read("cifar100", tmp_path).classes == cifar.CIFAR100.classes


# --- The real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_real_dataset_has_as_many_images_of_each_class(name: str) -> None:
    folder = os.environ.get("CIFARLAB_DATA")
    if not folder:
        pytest.skip("CIFARLAB_DATA does not name a folder with the real CIFAR")
    dataset = read_cifar(name, Path(folder))
    if dataset is None or len(dataset.train) != 50_000:
        pytest.skip(f"no whole {name} in CIFARLAB_DATA")
    assert dataset.test is not None
    classes = len(dataset.classes)
    assert np.bincount(dataset.train.labels, minlength=classes).tolist() == [50_000 // classes] * classes
    assert np.bincount(dataset.test.labels, minlength=classes).tolist() == [10_000 // classes] * classes
    assert dataset.classes == cifar.lookup(name).classes
    # The means that everyone normalises with: 0.4914, 0.4822, 0.4465 and 0.5071, 0.4865, 0.4409.
    means = dataset.train.pixels.mean(axis=(0, 2, 3)) / 255
    expected = [0.4914, 0.4822, 0.4465] if name == "cifar10" else [0.5071, 0.4865, 0.4409]
    np.testing.assert_allclose(means, expected, atol=0.002)
    assert dataset.notes == ()
