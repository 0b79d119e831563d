"""Images on their way to a training step: resident on the device, or streamed by workers; the same either way."""

from __future__ import annotations

import math
import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cifarlab import machine
from cifarlab.data.dataset import Images, Int64Array, UInt8Array, let_go
from cifarlab.errors import DataError, RunError
from cifarlab.seeds import derive_seed


class Batch(NamedTuple):
    """pixels: uint8 (B, 3, H, W) and labels: int64 (B,), on the training device; samples: int64 (B,), indices into the
    images as they were found, on the CPU, where what is looked up by them costs no wait for the device."""

    pixels: Tensor
    labels: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class ImageStore:
    """Images that batches are taken from, by sample index.

    pixels: uint8 (N, 3, H, W): a tensor on the device (resident) or an array in memory or on disk (streamed).
    """

    pixels: Tensor | UInt8Array
    labels: Tensor
    device: torch.device
    workers: int

    @classmethod
    def of(cls, images: Images, device: torch.device, *, memory: int | None, workers: int) -> ImageStore:
        """Resident where the pixels fit into `memory` bytes.

        None: half of what is free on the device; on the CPU also whatever is in main memory already.
        """
        in_place = device.type == "cpu" and not isinstance(images.pixels, np.memmap)
        limit = memory if memory is not None else machine.free_memory(device) // 2
        pixels: Tensor | UInt8Array = images.pixels
        if images.pixels.nbytes <= limit or (in_place and memory is None):
            # A copy where torch could not share the memory: read-only arrays and maps.
            pixels = torch.from_numpy(np.require(images.pixels, requirements=["C", "W"])).to(device)
            let_go(images.pixels)
        return cls(pixels, torch.from_numpy(images.labels.copy()).to(device), device, workers)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def resident(self) -> bool:
        return isinstance(self.pixels, Tensor)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.pixels.shape[2], self.pixels.shape[3]

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        """The images at `order` (int64 (K,), on the CPU), in that order, as `in_batches` divides it.

        Raises what `in_parts` raises.
        """
        return self.in_parts(in_batches(order, batch_size))

    def take(self, samples: Tensor) -> Batch:
        """A few images at once, at `samples` (int64 (B,), on the CPU), read in this process.

        Raises DataError where their file can't be read any more.
        """
        rows = machine.upload(samples, self.device)
        if isinstance(self.pixels, Tensor):
            return Batch(self.pixels[rows], self.labels[rows], samples)
        pixels = _rows(self.pixels)[samples.numpy()]
        return Batch(machine.upload(pixels, self.device), self.labels[rows], samples)

    def in_parts(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """The images at each part (int64 (B,), on the CPU), part by part.

        Raises RunError where a process that reads images dies, DataError where their file can't be read any more.
        """
        if isinstance(self.pixels, Tensor):
            yield from map(self.take, parts)
            return
        loader = DataLoader(
            _rows(self.pixels),
            sampler=[part.numpy() for part in parts],
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
        try:
            for samples, pixels in zip(parts, loader, strict=True):
                labels = self.labels[machine.upload(samples, self.device)]
                yield Batch(machine.upload(pixels, self.device), labels, samples)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if (died := reader_died(error)) is None:
                raise
            raise died from error
        except DataError as error:  # a worker's comes with its traceback
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error


def in_batches(order: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """`order` (K,) in batches. The last may be short; a last one of a single image joins the batch before.

    BatchNorm in training needs more than one value of a channel, and deep networks end at 1x1 on small images.
    """
    parts = torch.split(order, batch_size)
    if len(parts) > 1 and len(parts[-1]) == 1 < batch_size:
        parts = (*parts[:-2], torch.cat(parts[-2:]))
    return parts


def epoch_order(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """`samples` (int64 (K,)) in the order of an epoch: every one once; a function of the arguments alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return samples[torch.randperm(len(samples), generator=generator)]


def reader_died(error: Exception) -> RunError | None:
    """The sentence for a worker process that was killed, if that is what `error` says.

    Torch raises it from a signal handler, so it can come up anywhere in the main thread, not just at the next batch.
    """
    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
        return None
    if hasattr(signal, "SIGCHLD"):
        # Told once is enough: torch's handler would raise again, in the middle of what is done about it. A worker that
        # dies later is still found out, when its next batch doesn't come.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return RunError(
        f"a process that reads images died ({' '.join(str(error).split()) or type(error).__name__}); "
        "is memory or /dev/shm full? --set data.workers=0 reads without such processes"
    )


def _rows(pixels: UInt8Array) -> _Rows | _FileRows:
    """Rows of an array, for worker processes; those of a whole memory map by reading its file."""
    # A part of a map says the offset of the whole.
    base: object = pixels.base
    if isinstance(pixels, np.memmap) and isinstance(base, mmap.mmap):
        return _FileRows(Path(str(pixels.filename)), pixels.offset, pixels.shape[1:])
    return _Rows(pixels)


class _Rows(TorchDataset[Tensor]):
    def __init__(self, pixels: UInt8Array) -> None:
        self._pixels = pixels

    def __getitem__(self, index: Int64Array) -> Tensor:
        return torch.from_numpy(self._pixels[index])  # indexing by an array copies


class _FileRows(TorchDataset[Tensor]):
    """Read by calls, not through the map: a page that is looked at brings along up to some hundred others, and they all
    count as this process's memory. It is no slower."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]) -> None:
        self._path, self._offset, self._shape = path, offset, shape

    def __getitem__(self, index: Int64Array) -> Tensor:
        rows = np.empty((len(index), *self._shape), np.uint8)
        size = math.prod(self._shape)
        try:
            # Opened for each batch: processes that share an open file would share its position.
            with self._path.open("rb", buffering=0) as file:
                for row, position in zip(rows.reshape(len(rows), size), index.tolist(), strict=True):
                    file.seek(self._offset + position * size)
                    if file.readinto(row.data) != size:
                        raise OSError(0, "it has been cut short")
        except OSError as error:
            raise DataError(
                f"{self._path}, from which the images are streamed, can't be read any more: "
                f"{error.strerror or error}; run again, and they are decoded again"
            ) from error
        return torch.from_numpy(rows)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal, and torchrun's signals a whole group of processes; the training one
    finishes its step, and needs images for it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
