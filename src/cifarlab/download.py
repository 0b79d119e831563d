"""Downloads of files that are known before they are fetched: by their SHA-256, or its beginning.

Sources are tried in order, and one that crawls is left for the next; where all of them crawl, the fastest is used to
the end. A partial file (`.part`) is resumed. No file has its name before its size and digests are right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifarlab import __version__, files
from cifarlab.errors import DownloadError

# Prints a line for the user.
Report = Callable[[str], None]

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_ENOUGH_PROGRESS = 2**20  # a connection that brought this many bytes was not a failed try
_REPORT_EVERY = 5.0  # seconds
_SIZE = re.compile(r"[0-9]{1,15}")  # Python reads no number of more than 4,300 digits
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file that is known before it is fetched. `filename` is relative to the folder that it is stored in.

    sha256: the digest, or the hexadecimal digits that it begins with.
    """

    url: str
    filename: str
    size: int
    sha256: str
    md5: str | None = None


@dataclass(frozen=True)
class AnnouncedFile:
    """A file that its server is asked about before it is fetched: its size, and its SHA-256 where that is None.

    The Hugging Face Hub announces both, as X-Linked-Size and X-Linked-Etag.
    """

    url: str
    filename: str
    sha256: str | None


@dataclass(frozen=True)
class Source:
    """Files that belong together, from one place."""

    name: str
    files: tuple[RemoteFile | AnnouncedFile, ...]


@dataclass(frozen=True)
class Patience:
    """When to leave a source: below `minimum_speed` (bytes/s) over `window` seconds, or after `tries` failed tries.

    Nothing heard for `timeout` seconds is a failed try; between tries there are `backoff`, 2 `backoff`, … seconds.
    """

    minimum_speed: float = 200_000.0
    window: float = 15.0
    timeout: float = 30.0
    tries: int = 3
    backoff: float = 1.0


@dataclass(frozen=True)
class Wanted:
    """What is to be fetched, as messages call it.

    by_hand: how to do without a download, a clause.
    elsewhere: how to choose another folder, a clause.
    room: bytes that unpacking takes beside the files.
    """

    title: str
    by_hand: str
    elsewhere: str = "choose another folder with CIFARLAB_DATA"
    room: int = 0


class _FailedError(Exception):
    """This source cannot deliver; the text says why."""


class _InterruptedError(Exception):
    """This try failed, another may not; the text says why."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _CrawlsError(Exception):
    def __init__(self, speed: float) -> None:
        super().__init__(f"only {speed / 1000:.0f} kB/s")
        self.speed = speed


def cache_folder() -> Path:
    """Where downloads are looked for and put: `CIFARLAB_DATA`, or else the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("CIFARLAB_DATA")
    return files.expand(chosen) if chosen else platformdirs.user_cache_path("cifarlab")


def hub_endpoint() -> str:
    """The Hugging Face Hub, or the mirror of it that `HF_ENDPOINT` names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids to ask anybody."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def refuse_offline(wanted: Wanted) -> None:
    """Raise DownloadError where nobody may be asked."""
    if is_offline():
        raise DownloadError(
            f"{wanted.title} can't be downloaded because HF_HUB_OFFLINE is set; unset it, or {wanted.by_hand}"
        )


def deliver(wanted: Wanted, sources: tuple[Source, ...], folder: Path, courier: Courier) -> tuple[Source, Path]:
    """Download from the first source that is whole and fast, or the fastest. Returns it and the folder of its files.

    Partial files of an interrupted download are kept in `folder` and resumed by the next call. Raises DownloadError
    where no source can deliver or the space is too little, StorageError where the folder can't be written.
    """
    failures: dict[str, str] = {}
    crawling: list[tuple[float, Source, Path]] = []
    for number, source in enumerate(sources):
        # A folder each: what another source has left there, perhaps damaged, must not be taken for this one's.
        place = folder / str(number)
        try:
            courier.bring(source, place, courier.patience.minimum_speed, wanted)
            return source, place
        except _CrawlsError as error:
            crawling.append((error.speed, source, place))
            failures[source.name] = str(error)
        except _FailedError as error:
            failures[source.name] = str(error)
        courier.report(f"leaving {source.name}: {failures[source.name]}")
    for speed, source, place in sorted(crawling, key=lambda item: -item[0]):
        courier.report(f"no source is faster; going on with {source.name} at {speed / 1000:.0f} kB/s")
        try:
            courier.bring(source, place, 0.0, wanted)
            return source, place
        except _FailedError as error:
            failures[source.name] = str(error)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    raise DownloadError(
        f"could not download {wanted.title} ({reasons}); check the network and try again, or {wanted.by_hand}"
    )


@dataclass(frozen=True)
class Courier:
    """Brings the files of one source into a folder."""

    report: Report
    patience: Patience = Patience()
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def bring(self, source: Source, folder: Path, minimum_speed: float, wanted: Wanted) -> None:
        import httpx

        files.make_folder(folder)
        headers = {"User-Agent": f"cifarlab/{__version__}", "Accept-Encoding": "identity"}
        try:
            client = httpx.Client(follow_redirects=True, timeout=self.patience.timeout, headers=headers)
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # a SOCKS proxy without its package, say
            raise DownloadError(f"the proxy that is set in the environment cannot be used: {error}") from error
        with client:
            known = [self.ask(client, file) if isinstance(file, AnnouncedFile) else file for file in source.files]
            _check_space(known, folder, wanted)
            for file in known:
                self.bring_file(client, file, folder / file.filename, source.name, minimum_speed)

    def ask(self, client: Any, file: AnnouncedFile) -> RemoteFile:
        """What the server says of a file without sending it."""
        reason, wait = "", 0.0
        for failed in range(self.patience.tries):
            if failed:
                self.sleep(max(wait, self.patience.backoff * 2 ** (failed - 1)))
            try:
                with _explained(self.patience):
                    return _announced(client.head(file.url), file)
            except _InterruptedError as error:
                reason, wait = str(error), error.wait
                self.report(f"{file.filename}: {reason}")
        raise _FailedError(f"{reason} ({self.patience.tries} tries)")

    def bring_file(self, client: Any, file: RemoteFile, target: Path, source: str, minimum_speed: float) -> None:
        """Download to `target`, which appears when its digests are right."""
        if target.is_file() and _mismatch(target, file) is None:
            return
        part = target.with_name(target.name + ".part")
        files.make_folder(target.parent)
        reason, failed, wait = "", 0, 0.0
        while failed < self.patience.tries:
            if failed:
                self.sleep(max(wait, self.patience.backoff * 2 ** (failed - 1)))
            wait = 0.0
            start = _size(part)
            try:
                if start < file.size:
                    self.receive(client, file, part, start, source, minimum_speed)
                if _size(part) < file.size:
                    raise _InterruptedError(f"the connection ended after {_size(part):,} of {file.size:,} bytes")
            except _InterruptedError as error:
                reason, wait = str(error), error.wait
                failed = 1 if _size(part) - start >= _ENOUGH_PROGRESS else failed + 1
                self.report(f"{file.filename}: {reason}")
                continue
            reason = _mismatch(part, file) or ""
            if not reason:
                files.rename(part, target)
                return
            files.remove(part)
            if start == 0:
                raise _FailedError(reason)
            # The first bytes may have come from elsewhere, or be damaged: once more, from the beginning.
            failed += 1
        raise _FailedError(f"{reason} ({self.patience.tries} tries)")

    def receive(self, client: Any, file: RemoteFile, part: Path, start: int, source: str, minimum_speed: float) -> None:
        """Append to `part` what the server sends from byte `start` on."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with _explained(self.patience), client.stream("GET", file.url, headers=headers) as response:
            start = _start_of(response, file, start)
            with files.continuing(part, start) as out:
                self.copy(response.iter_raw(), out, file, start, source, minimum_speed)

    def copy(
        self, chunks: Iterator[bytes], out: Any, file: RemoteFile, done: int, source: str, minimum_speed: float
    ) -> None:
        self.report(f"downloading {file.filename} from {source}, {_progress(done, file)}")
        window_start, window_done = self.clock(), done
        reported = window_start
        for chunk in chunks:
            done += len(chunk)
            if done > file.size:
                raise _FailedError(f"sent more than the {file.size:,} bytes of {file.filename}")
            out.write(chunk)
            now = self.clock()
            if now - reported >= _REPORT_EVERY:
                self.report(f"{file.filename}: {_progress(done, file)}")
                reported = now
            if now - window_start >= self.patience.window and done < file.size:
                speed = (done - window_done) / (now - window_start)
                if speed < minimum_speed:
                    raise _CrawlsError(speed)
                window_start, window_done = now, done


@contextlib.contextmanager
def _explained(patience: Patience) -> Iterator[None]:
    """The errors of httpx as ours: those after which another try may help, and the others."""
    import httpx

    try:
        yield
    except httpx.TimeoutException:
        raise _InterruptedError(f"no answer within {patience.timeout:g} s") from None
    except httpx.TransportError as error:
        raise _InterruptedError(str(error) or type(error).__name__) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _FailedError(str(error) or type(error).__name__) from error


def _check_space(wanted_files: list[RemoteFile], folder: Path, wanted: Wanted) -> None:
    there = sum(_size(path) for path in folder.rglob("*") if path.is_file())
    needed = sum(file.size for file in wanted_files) - there + wanted.room
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder} has {free / 1e6:,.0f} MB of free space, and the download needs {needed / 1e6:,.0f} MB; "
            f"free some, or {wanted.elsewhere}"
        )


def _check_status(response: Any, allowed: tuple[int, ...]) -> None:
    status = response.status_code
    if status in _TRANSIENT:
        wait = response.headers.get("Retry-After", "")
        raise _InterruptedError(f"HTTP {status}", min(float(wait), 30.0) if wait.isdecimal() else 0.0)
    if status not in allowed:
        raise _FailedError(f"HTTP {status}")


def _announced(response: Any, file: AnnouncedFile) -> RemoteFile:
    """A file as the answer to a HEAD request describes it."""
    # The Hub describes the file where it redirects to the store, and the store need not answer HEAD.
    for hop in (*response.history, response):
        if "X-Linked-Size" in hop.headers or hop is response:
            break
    if hop is response:
        _check_status(response, (200,))
    size = hop.headers.get("X-Linked-Size") or hop.headers.get("Content-Length", "")
    digest = file.sha256 or hop.headers.get("X-Linked-Etag", "").strip('"')
    if not _SIZE.fullmatch(size):
        raise _FailedError(f"does not say how large {file.filename} is")
    if file.sha256 is None and not _SHA256.fullmatch(digest):
        raise _FailedError(f"announces no SHA-256 of {file.filename}")
    return RemoteFile(file.url, file.filename, int(size), digest)


def _start_of(response: Any, file: RemoteFile, start: int) -> int:
    """The position of the first byte that the server is about to send, once its status and headers are right."""
    if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise _FailedError("sent another part of the file than was asked for")
    _check_status(response, (200, 206))
    if response.status_code == 200:
        start = 0  # no resuming there
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _FailedError(f"sent {file.filename} with an encoding that was not asked for")
    length = response.headers.get("Content-Length", "")
    if _SIZE.fullmatch(length) and int(length) != file.size - start:
        raise _FailedError(f"has another file than the pinned one: {int(length):,} bytes, not {file.size - start:,}")
    return start


def _mismatch(path: Path, file: RemoteFile) -> str | None:
    """How `path` differs from the pinned file, as a clause; None where it does not."""
    if _size(path) != file.size:
        return f"{file.filename} has {_size(path):,} bytes instead of {file.size:,}"
    expected = {"sha256": file.sha256} | ({"md5": file.md5} if file.md5 is not None else {})
    found = _digests(path, *expected)
    for kind, digits in expected.items():
        if not found[kind].startswith(digits):
            name = {"sha256": "SHA-256", "md5": "MD5"}[kind]
            return f"{file.filename} has {name} {found[kind]} instead of {digits}"
    return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises StorageError where it can't be read."""
    return _digests(path, "sha256")["sha256"]


def _digests(path: Path, *kinds: str) -> dict[str, str]:
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    try:
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                for digest in digests.values():
                    digest.update(block)
    except OSError as error:
        raise files.explain("read", path, error) from error
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _progress(done: int, file: RemoteFile) -> str:
    return f"{done / 1e6:,.1f} of {file.size / 1e6:,.1f} MB"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
