"""Every write to disk goes through here: whole or not at all, flushed, renamed, locked. And what users' paths need.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over the final name.
So a reader sees the old bytes or the new ones, never half of either, whatever stops the process or fills the disk.
All writes in one module also means that faults can be injected in one place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cifarlab.errors import DataError, StorageError

TEMPORARY_SUFFIX = ".tmp"
# What a file system says that has no locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


def explain(action: str, path: Path, error: OSError) -> StorageError:
    """The sentence for an operating-system error: what failed, where, why, and what to do."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space and try again",
        errno.EDQUOT: "the disk quota is used up; free some space and try again",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "permission denied; choose a folder that you may write to",
        errno.EPERM: "not permitted; choose a folder that you may write to",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
        errno.EEXIST: "a file stands where a folder is needed; choose another folder",
        errno.ENOENT: "the folder is gone; was it moved or removed?",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
        errno.EIO: "the disk reports an error; check it, or choose another",
    }.get(error.errno or 0, error.strerror or type(error).__name__)
    return StorageError(f"cannot {action} {path}: {advice}")


def expand(path: str | Path) -> Path:
    """A path as the user meant it: `~` is their home folder. Raises DataError for a home folder that nobody has."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path} begins with the home folder of somebody unknown here; write the whole path") from None


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises DataError where that can't be found out: no permission, a name too long."""
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; is it the right folder, and may you read it?"
        ) from error


def regular_size(path: Path) -> int:
    """The size in bytes of a file that can be read to its end. Raises OSError, also where it is no regular file.

    To open a pipe would be to wait for its other end, and a device such as /dev/zero has no end.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return status.st_size


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """Create a folder and its parents. Raises StorageError, or FileExistsError where `exist_ok` is False."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        if not exist_ok:
            raise
        raise explain("create the folder", path, OSError(errno.EEXIST, "exists")) from None
    except OSError as error:
        raise explain("create the folder", path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing so that it appears whole, or stays as it was if anything goes wrong in the block.

    Where `path` is a symbolic link, the file takes the link's place, and what it pointed to stays as it was.
    Raises StorageError where the operating system refuses; any other exception of the block passes through.
    """
    # Not tempfile's: its files are private, and a run folder is as readable as the user's umask says, which can be
    # asked for only by changing it, for all threads at once. 50 characters of UTF-8 always fit into a name.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise explain("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it has gone where all went well


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file, or leave what was there. Raises StorageError."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file, or leave what was there. Raises StorageError."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON. NaN and infinities are not JSON and raise ValueError: undefined is null."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # File names that are not UTF-8 hold lone surrogates; a backslash escape is how JSON writes them.
    write_bytes(path, text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def continuing(path: Path, start: int) -> Iterator[IO[bytes]]:
    """Open a partial file to go on after its first `start` bytes; any others are dropped, so 0 begins it anew.

    What was written is flushed to the disk at the end. Raises StorageError where the operating system refuses.
    """
    try:
        with path.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain("write", path, error) from error


def rename(old: Path, new: Path) -> None:
    """Give a file or folder its final name, for good. Raises StorageError."""
    try:
        old.replace(new)
    except OSError as error:
        raise explain("write", new, error) from error
    _flush_folder(new.parent)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None], *, required: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; calls `waiting` once where somebody else holds it, which may raise instead of waiting.

    The lock dies with its owner. Where the file system has no locks, as some network disks have none, and they are not
    `required`, nobody is kept out. Raises StorageError where the file can't be made.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            waiting()
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        refused = error if isinstance(error, OSError) else OSError(errno.ENOSYS, str(error))
        if required or refused.errno not in _NO_LOCKS:
            raise explain("lock", path, refused) from error
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Remove a file; one that has gone already is no error. Raises StorageError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise explain("remove", path, error) from error


def _flush_folder(path: Path) -> None:
    """Make a rename durable. Some file systems and Windows refuse to sync a folder; the rename itself still holds."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
