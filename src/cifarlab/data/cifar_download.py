"""Downloads CIFAR-10 and CIFAR-100 when the user has them nowhere.

The official host has served some 60 to 85 kB/s since June 2026, which is 40 minutes for 170 MB; the Hugging Face Hub
has the same images as parquet, at tens of MB/s. So the Hub comes first. Nothing is opened before its size and digests
are those pinned below.

What stays in the folder is the dataset in the official binary form, whichever source it came from. Decoding 60,000 PNGs
takes 3 s and unpacking an archive 1 s, each time; reading the binary form takes 0.1 s, needs no parquet, no PNG and no
pickle, and is read by every other tool too. It appears at once, by the rename of a complete folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cifarlab import files
from cifarlab.data.cifar import CIFAR10, CIFAR100, PIXELS, Cifar, expected_files, lookup, read_contents, write_binary
from cifarlab.download import (
    Courier,
    Patience,
    RemoteFile,
    Report,
    Source,
    Wanted,
    deliver,
    hub_endpoint,
    refuse_offline,
)
from cifarlab.errors import DownloadError, StorageError

OFFICIAL_HOST = "https://www.cs.toronto.edu/~kriz"


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


def default_sources(name: str) -> tuple[Source, ...]:
    """The Hub, then the official host."""
    cifar = lookup(name)
    hub = _HUB[name]
    endpoint = hub_endpoint()
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
    wanted = Wanted(
        cifar.title,
        by_hand=f"put {expected_files(name)} into {folder} by hand, or name the folder that has it with --data",
        elsewhere="choose another folder with CIFARLAB_DATA or --data",
        room=60_000 * (PIXELS + 2),
    )
    refuse_offline(wanted)
    downloads = folder / ".downloads" / name
    try:
        files.make_folder(folder)
        waiting = f"another run is downloading {cifar.title}; waiting for it"
        with files.locked(folder / f".{name}.lock", lambda: report(waiting)):
            if (folder / cifar.binary_folder).is_dir():
                return folder  # another run was first
            courier = Courier(report, patience or Patience(), clock, sleep)
            source, place = deliver(wanted, sources, downloads, courier)
            report(f"unpacking {cifar.title}")
            _install(cifar, place, folder, source)
            shutil.rmtree(downloads, ignore_errors=True)
    except StorageError as error:
        raise DownloadError(str(error)) from error
    return folder


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
