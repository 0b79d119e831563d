"""Writing: the new file whole, or the old one as it was, and one sentence that says why."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from cifarlab import files
from cifarlab.errors import StorageError

FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def inject(monkeypatch: pytest.MonkeyPatch, operation: str, code: int) -> None:
    """Make one operation of a write fail: open, write, flush, fsync, close or rename."""

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Faulty(io.BufferedWriter):
        def close(self) -> None:
            was_closed = self.closed
            super().close()
            if operation == "close" and not was_closed:
                fail()

    if operation in ("write", "flush"):
        setattr(Faulty, operation, fail)
    if operation == "open":
        monkeypatch.setattr(Path, "open", fail)
    elif operation == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif operation == "rename":
        monkeypatch.setattr(os, "rename", fail)
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "open", lambda path, mode: Faulty(io.FileIO(path, mode.replace("b", ""))))


@pytest.mark.parametrize("code", FAULTS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("operation", ["open", "write", "flush", "fsync", "close", "rename"])
def test_a_fault_at_any_operation_leaves_the_old_file_whole(
    operation: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.json"
    files.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        inject(patch, operation, code)
        with pytest.raises(StorageError) as caught:
            files.write_bytes(path, b"new" * 10_000)
    sentence = str(caught.value)
    assert sentence.startswith(f"cannot write {path}: ")
    assert "\n" not in sentence
    assert "Errno" not in sentence
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["train.json"]


def test_an_unknown_error_is_told_in_the_words_of_the_operating_system(tmp_path: Path) -> None:
    error = files.explain("write", tmp_path / "a", OSError(errno.EMFILE, "Too many open files"))
    assert str(error) == f"cannot write {tmp_path / 'a'}: Too many open files"
    assert "OSError" in str(files.explain("write", tmp_path / "a", OSError()))


def test_where_even_the_temporary_file_cannot_be_removed_the_first_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    inject(monkeypatch, "fsync", errno.ENOSPC)
    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        files.write_bytes(tmp_path / "a", b"1")


def test_a_folder_that_cannot_be_synced_does_not_fail_a_write_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, replace = os.fsync, os.replace

    def logged_sync(descriptor: int) -> None:
        happened.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        assert happened[-1] == "sync folder" or os.fstat(descriptor).st_size == 7  # nothing is left in a buffer
        sync(descriptor)

    def logged_replace(source: Any, target: Any) -> None:
        happened.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "replace", logged_replace)
    files.write_bytes(tmp_path / "a", b"7 bytes")
    assert happened == ["sync file", "rename", "sync folder"]


def test_an_exception_of_the_block_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(143)):
        with pytest.raises(type(error)) as caught, files.replacing(path) as file:
            file.write(b"half")
            raise error
        assert caught.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    code = f"""
import os, signal
from pathlib import Path
from cifarlab import files
with files.replacing(Path({str(path)!r})) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    # What it had begun is hidden, and no name that anything of ours looks for.
    assert [name for name in names(tmp_path) if not (name.startswith(".") and name.endswith(".tmp"))] == ["a"]


def test_a_reader_sees_one_whole_file_or_another_never_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is read here, and it is slow
    path = tmp_path / "a"
    sizes = [100_003, 17, 300_007]
    files.write_bytes(path, b"0" * sizes[0])
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(1, 400):
                files.write_bytes(path, b"%d" % (number % 10) * sizes[number % 3])
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    try:
        while not done.is_set():
            data = path.read_bytes()
            assert len(data) in sizes
            assert data.count(data[:1]) == len(data)
            reads += 1
    finally:
        writer.join()
    assert not failures
    assert reads > 10


def test_several_writers_of_one_file_leave_one_of_their_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [str(number) * 10_000 for number in range(8)]
    writers = [threading.Thread(target=files.write_text, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["a"]


# --- real disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of 64 kB in memory, with the given options; called again, it changes the options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        try:
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
            subprocess.run(command, check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            pytest.skip("mounting a small disk needs root and mount(8)")
        return place

    yield mount
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=10)


def test_a_full_disk_keeps_the_old_file(small_disk: Callable[[str], Path]) -> None:
    path = small_disk("size=64k") / "train.json"
    files.write_bytes(path, b"old" * 1000)
    for size in (62_000, 10_000_000):
        with pytest.raises(StorageError, match="the disk is full; free some space and try again"):
            files.write_bytes(path, bytes(size))
        assert path.read_bytes() == b"old" * 1000
        assert names(path.parent) == ["train.json"]
    with pytest.raises(StorageError, match="the disk is full"):
        for number in range(1000):
            files.make_folder(path.parent / str(number))
            files.write_bytes(path.parent / str(number) / "a", bytes(4096))


def test_a_read_only_disk_keeps_the_old_file(small_disk: Callable[[str], Path]) -> None:
    path = small_disk("size=64k") / "train.json"
    files.write_bytes(path, b"old")
    small_disk("remount,ro")
    sentence = "the file system is read-only; choose another folder"
    with pytest.raises(StorageError, match=f"cannot write .*train.json: {sentence}"):
        files.write_bytes(path, b"new")
    with pytest.raises(StorageError, match=f"cannot create the folder .*runs: {sentence}"):
        files.make_folder(path.parent / "runs")
    with pytest.raises(StorageError, match=f"cannot remove .*train.json: {sentence}"):
        files.remove(path)
    assert path.read_bytes() == b"old"


# --- names, links, permissions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Größe 日本.json",
        "two\nlines",
        "-rf",
        "~",
        " ",
        "$(touch x); 'a' \"b\"",
        "x" * 250,
        "日" * 85,
        "🐈" * 63,
        pytest.param(
            os.fsdecode(b"not-utf8-\xff"),
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes UTF-8 names only"),
        ),
    ],
)
def test_any_name_that_a_file_system_takes_is_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for text in ("one", "two"):
        files.write_text(path, text)
        assert path.read_text() == text
        assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the name is too long; choose a shorter one"):
        files.write_text(tmp_path / ("x" * 256), "1")
    with pytest.raises(StorageError, match="the name is too long; choose a shorter one"):
        files.make_folder(tmp_path / ("x" * 256))
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_and_a_file_in_place_of_one_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="gone/a: the folder is gone; was it moved or removed"):
        files.write_text(tmp_path / "gone" / "a", "1")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(StorageError, match="a file stands where a folder is needed; choose another folder"):
            files.make_folder(path)
    with pytest.raises(StorageError, match="a file stands where a folder is needed; choose another folder"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match=r"cannot write .*: Is a directory"):
        files.write_text(tmp_path, "1")


def test_make_folder_makes_parents_and_refuses_a_second_time_only_if_told(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    files.make_folder(path)
    files.make_folder(path)
    assert path.is_dir()
    with pytest.raises(FileExistsError):
        files.make_folder(path, exist_ok=False)


def test_a_link_is_replaced_by_the_file_and_its_target_stays(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text("target")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (link, dangling):
        files.write_text(path, "new")
        assert not path.is_symlink()
        assert path.read_text() == "new"
    assert target.read_text() == "target"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_is_as_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a", "1")
        files.write_text(tmp_path / "a", "2")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_the_umask_which_all_threads_share_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed for every thread"))
    files.write_text(tmp_path / "a", "1")


def test_remove_takes_a_file_that_has_gone_for_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    files.remove(tmp_path / "a")
    files.remove(tmp_path / "a")
    assert names(tmp_path) == []


# --- JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"a": -float("inf")}]])
def test_what_is_not_json_is_refused_and_the_old_file_stays(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    files.write_json(path, {"accuracy": None})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"accuracy": value})
    with pytest.raises(TypeError):
        files.write_json(path, {"accuracy": {1, 2}})
    assert json.loads(path.read_text()) == {"accuracy": None}
    assert names(tmp_path) == ["test.json"]


def test_json_comes_back_as_it_went_and_stays_legible(tmp_path: Path) -> None:
    value = {"größe": 0.1 + 0.2, "folder": os.fsdecode(b"/bilder/\xff\xe4"), "none": None, "list": [1, "日本\n\0"]}
    files.write_json(tmp_path / "a", value)
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == value
    assert "größe" in (tmp_path / "a").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_a_file_system_without_locks_keeps_nobody_out_where_none_is_required(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    path, done = tmp_path / ".lock", list[int]()
    with files.locked(path, done.clear, required=False):
        done.append(1)
    assert done == [1]
    with pytest.raises(StorageError, match=r"cannot lock .*\.lock"), files.locked(path, done.clear):
        done.append(2)
    assert done == [1]
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(StorageError, match="permission denied"), files.locked(path, done.clear, required=False):
        done.append(3)
    assert done == [1]
