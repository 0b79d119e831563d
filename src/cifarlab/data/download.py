"""Downloads CIFAR-10 and CIFAR-100 when the user has them nowhere.

The official host has served some 60 to 85 kB/s since June 2026, which is 40 minutes for 170 MB; the Hugging Face Hub
has the same images as parquet, at tens of MB/s. So sources are tried in order, and one that crawls is left for the
next; where all of them crawl, the fastest is used to the end. A partial file (`.part`) is resumed. Nothing is opened
before its size and digests are those pinned below.

What stays in the folder is the dataset in the official binary form, whichever source it came from. Decoding 60,000 PNGs
takes 3 s and unpacking an archive 1 s, each time; reading the binary form takes 0.1 s, needs no parquet, no PNG and no
pickle, and is read by every other tool too. It appears at once, by the rename of a complete folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifarlab import __version__, files
from cifarlab.data.cifar import CIFAR10, CIFAR100, PIXELS, Cifar, expected_files, lookup, read_contents, write_binary
from cifarlab.errors import DownloadError, StorageError

# Prints a line for the user.
Report = Callable[[str], None]

OFFICIAL_HOST = "https://www.cs.toronto.edu/~kriz"
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_ENOUGH_PROGRESS = 2**20  # a connection that brought this many bytes was not a failed try
_REPORT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file that is known before it is fetched. `filename` is relative to the folder that it is stored in."""

    url: str
    filename: str
    size: int
    sha256: str
    md5: str | None = None


@dataclass(frozen=True)
class Source:
    """Files that together are one dataset, in a form that `read_contents` reads."""

    name: str
    files: tuple[RemoteFile, ...]


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
class _Hub:
    revision: str
    train: tuple[int, str]  # size, SHA-256
    test: tuple[int, str]


# The last revision of each repository, and the sizes and SHA-256 (the LFS object ids) of its files. They were read in
# public repositories that pin the same revision and digests, several of them independent of each other. For CIFAR-10
# the sizes add up to the `download_size` 143646105 in the README of that revision.
_HUB = {
    CIFAR10.name: _Hub(
        "0b2714987fa478483af9968de7c934580d0bb9a2",
        (119_705_255, "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883"),
        (23_940_850, "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de"),
    ),
    CIFAR100.name: _Hub(
        "aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        (118_518_617, "694865d6b990e234804f01268586c41e88bcbbb75e20858432c05ad4081aca23"),
        (23_772_751, "98776c529bb146a9c791229df74a5cf076be9b43d82dbbd334b6a7788d73dc68"),
    ),
}

# Size, SHA-256 and MD5. MD5: torchvision's `datasets/cifar.py`. SHA-256: `file_hash` in Keras's `datasets/cifar10.py`
# and `cifar100.py`. Sizes: what the host announces, as the progress bars of both print it.
_OFFICIAL = {
    CIFAR10.name: (
        170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "c58f30108f718f92721af3b95e74349a",
    ),
    CIFAR100.name: (
        169_001_437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
}


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
    """Where datasets are looked for and downloaded to: `CIFARLAB_DATA`, or else the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("CIFARLAB_DATA")
    return files.expand(chosen) if chosen else platformdirs.user_cache_path("cifarlab")


def default_sources(name: str) -> tuple[Source, ...]:
    """The Hub (or the mirror of it that `HF_ENDPOINT` names), then the official host."""
    cifar = lookup(name)
    hub = _HUB[name]
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    paths = [f"{cifar.parquet_folder}/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    parquet = tuple(
        RemoteFile(f"{endpoint}/datasets/{cifar.hub}/resolve/{hub.revision}/{path}", path, size, sha256)
        for path, (size, sha256) in zip(paths, (hub.train, hub.test), strict=True)
    )
    archive = cifar.archives[0]
    return (
        Source(f"{endpoint}/datasets/{cifar.hub} at revision {hub.revision}", parquet),
        Source(OFFICIAL_HOST, (RemoteFile(f"{OFFICIAL_HOST}/{archive}", archive, *_OFFICIAL[name]),)),
    )


def fetch(
    name: str,
    folder: Path,
    *,
    sources: tuple[Source, ...] | None = None,
    report: Report = lambda line: None,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Download `cifar10` or `cifar100` into `folder`, and return `folder`, in which `read_cifar` then finds it.

    Two runs that want the same dataset download it once: the second waits. Partial files of an interrupted download
    are kept in `folder` and resumed by the next call.

    Raises DownloadError where no source can deliver, where `HF_HUB_OFFLINE` forbids to ask one, or where `folder`
    cannot be written or has too little space; what was in `folder` before is whole.
    """
    cifar = lookup(name)
    sources = default_sources(name) if sources is None else sources
    patience = patience or Patience()
    by_hand = f"put {expected_files(name)} into {folder} by hand, or name the folder that has it with --data"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(f"{cifar.title} is not downloaded because HF_HUB_OFFLINE is set; unset it, or {by_hand}")
    downloads = folder / ".downloads" / name
    try:
        files.make_folder(folder)
        waiting = f"another run is downloading {cifar.title}; waiting for it"
        with files.locked(folder / f".{name}.lock", lambda: report(waiting)):
            if (folder / cifar.binary_folder).is_dir():
                return folder  # another run was first
            courier = _Courier(report, patience, clock, sleep)
            source, place = _first_that_delivers(sources, downloads, courier, cifar, by_hand)
            report(f"unpacking {cifar.title}")
            _install(cifar, place, folder, source)
            shutil.rmtree(downloads, ignore_errors=True)
    except StorageError as error:
        raise DownloadError(str(error)) from error
    return folder


def _first_that_delivers(
    sources: tuple[Source, ...], downloads: Path, courier: _Courier, cifar: Cifar, by_hand: str
) -> tuple[Source, Path]:
    """Download from the first source that is whole and fast, or the fastest. Returns it and the folder of its files."""
    failures: dict[str, str] = {}
    crawling: list[tuple[float, Source, Path]] = []
    for number, source in enumerate(sources):
        # A folder each: what another source has left there, perhaps damaged, must not be taken for this one's.
        place = downloads / str(number)
        try:
            courier.bring(source, place, courier.patience.minimum_speed)
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
            courier.bring(source, place, 0.0)
            return source, place
        except _FailedError as error:
            failures[source.name] = str(error)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    raise DownloadError(f"could not download {cifar.title} ({reasons}); check the network and try again, or {by_hand}")


@dataclass(frozen=True)
class _Courier:
    """Brings the files of one source into a folder."""

    report: Report
    patience: Patience
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def bring(self, source: Source, folder: Path, minimum_speed: float) -> None:
        import httpx

        files.make_folder(folder)
        _check_space(source, folder)
        headers = {"User-Agent": f"cifarlab/{__version__}", "Accept-Encoding": "identity"}
        try:
            client = httpx.Client(follow_redirects=True, timeout=self.patience.timeout, headers=headers)
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # a SOCKS proxy without its package, say
            raise DownloadError(f"the proxy that is set in the environment cannot be used: {error}") from error
        with client:
            for file in source.files:
                self.bring_file(client, file, folder / file.filename, source.name, minimum_speed)

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
        import httpx

        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with client.stream("GET", file.url, headers=headers) as response:
                start = _start_of(response, file, start)
                with files.continuing(part, start) as out:
                    self.copy(response.iter_raw(), out, file, start, source, minimum_speed)
        except httpx.TimeoutException:
            raise _InterruptedError(f"no answer within {self.patience.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _InterruptedError(str(error) or type(error).__name__) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _FailedError(str(error) or type(error).__name__) from error

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


def _check_space(source: Source, folder: Path) -> None:
    there = sum(_size(path) for path in folder.rglob("*") if path.is_file())
    needed = sum(file.size for file in source.files) - there + 60_000 * (PIXELS + 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder} has {free / 1e6:,.0f} MB of free space, and the download needs {needed / 1e6:,.0f} MB; "
            "free some, or choose another folder with CIFARLAB_DATA or --data"
        )


def _start_of(response: Any, file: RemoteFile, start: int) -> int:
    """The position of the first byte that the server is about to send, once its status and headers are right."""
    status = response.status_code
    if status in _TRANSIENT:
        wait = response.headers.get("Retry-After", "")
        raise _InterruptedError(f"HTTP {status}", min(float(wait), 30.0) if wait.isdecimal() else 0.0)
    if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise _FailedError("sent another part of the file than was asked for")
    if status not in (200, 206):
        raise _FailedError(f"HTTP {status}")
    if status == 200:
        start = 0  # no resuming there
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _FailedError(f"sent {file.filename} with an encoding that was not asked for")
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != file.size - start:
        raise _FailedError(f"has another file than the pinned one: {int(length):,} bytes, not {file.size - start:,}")
    return start


def _mismatch(path: Path, file: RemoteFile) -> str | None:
    """How `path` differs from the pinned file, as a clause; None where it does not."""
    if _size(path) != file.size:
        return f"{file.filename} has {_size(path):,} bytes instead of {file.size:,}"
    digests = [("SHA-256", hashlib.sha256(), file.sha256)]
    if file.md5 is not None:
        digests.append(("MD5", hashlib.md5(usedforsecurity=False), file.md5))
    try:
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                for _, digest, _ in digests:
                    digest.update(block)
    except OSError as error:
        raise files.explain("read", path, error) from error
    for kind, digest, expected in digests:
        if digest.hexdigest() != expected:
            return f"{file.filename} has {kind} {digest.hexdigest()} instead of {expected}"
    return None


def _install(cifar: Cifar, downloads: Path, folder: Path, source: Source) -> None:
    contents = read_contents(cifar, downloads)
    if contents is None:
        raise DownloadError(f"{source.name} has no file that holds {cifar.title}")
    origin = "; ".join((source.name, *(f"{file.filename} with SHA-256 {file.sha256}" for file in source.files)))
    unfinished = folder / f".{cifar.binary_folder}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    files.make_folder(unfinished)
    try:
        write_binary(cifar, contents, unfinished, origin)
        files.rename(unfinished, folder / cifar.binary_folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _progress(done: int, file: RemoteFile) -> str:
    return f"{done / 1e6:,.1f} of {file.size / 1e6:,.1f} MB"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
