"""What frozen stages compute, once for each image and version of it, and not again.

Stages that do not train give the same output for the same input: an image without augmentation, or one of the
`augment.views` versions of it. Their outputs are kept, as bf16 in half the memory, and the training step begins where
training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifarlab import machine
from cifarlab.download import Report
from cifarlab.numerics import Numerics


class CacheKey(NamedTuple):
    """Which inputs these are: the images of a store, at a resolution, in one of their versions."""

    store: str
    resolution: int
    version: int


class _Shelf:
    """The outputs for one key. rows: (M, …); place: int64 (N,), on the CPU, an image's row, -1 where it has none."""

    def __init__(self, images: int, rows: Tensor) -> None:
        self.rows = rows
        self.place = torch.full((images,), -1, dtype=torch.int64)
        self.used = 0

    @property
    def bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def add(self, samples: Tensor, computed: Tensor) -> None:
        """Keep the outputs of those images that have no row yet."""
        new = torch.nonzero(self.place[samples] < 0)[:, 0]
        end = self.used + len(new)
        self.rows[self.used : end] = computed[machine.upload(new, computed.device)]
        self.place[samples[new]] = torch.arange(self.used, end)
        self.used = end


class FrozenStages:
    """The front of a network, in evaluation mode and without gradients, with a memory of what it has computed.

    front: from (B, 3, H, W) float32 to float32 (B, …). dtype: what outputs are rounded to, cached or not, so that the
    numbers do not depend on how much fits into `memory` (bytes). Of a store's images those of one resolution are kept:
    what was kept of others goes when a new one comes, as resolutions of training do not come again. report: told, once,
    when something does not fit.
    """

    def __init__(self, front: nn.Module, dtype: torch.dtype, memory: int, numerics: Numerics, report: Report) -> None:
        self.front = front
        self.dtype = dtype
        self.memory_left = memory
        self.computed = self.recalled = 0  # images
        self._memory = memory
        self._peak = 0
        self._numerics = numerics
        self._report: Report | None = report
        self._shelves: dict[CacheKey, _Shelf | None] = {}  # None: there was no room

    @torch.no_grad()
    def __call__(
        self,
        pixels: Callable[[], Tensor],
        samples: Tensor,
        key: CacheKey | None,
        *,
        keep: bool,
        images: int,
        rows: int,
    ) -> Tensor:
        """Outputs for the images at `samples` (int64 (B,), on the CPU), float32 (B, …).

        pixels: makes their (B, 3, H, W), if they are needed. key: None where the inputs have none. keep: whether the
        same ones will be asked for again. images: how many the store has. rows: how many different ones will come.
        """
        shelf = self._shelves.get(key) if key is not None else None
        if shelf is not None:
            place = shelf.place[samples]
            if shelf.used == len(shelf.rows) or not bool((place < 0).any()):
                self.recalled += len(samples)
                return self._restored(shelf.rows[machine.upload(place, shelf.rows.device)])
        computed = self._compute(pixels())
        if keep and key is not None:
            if key not in self._shelves:
                self._shelves[key] = shelf = self._make_room(key, computed, images, rows)
            if shelf is not None:
                shelf.add(samples, computed)
        return self._restored(computed)

    def record(self) -> dict[str, int]:
        """How many images went through the front, how many were recalled, and the bytes that this took at most."""
        return {"computed": self.computed, "recalled": self.recalled, "bytes": self._peak}

    def _compute(self, pixels: Tensor) -> Tensor:
        """(B, h, w, C), channels last, as most layers like them and as rows are copied fastest; or (B, C)."""
        self.computed += len(pixels)
        with self._numerics.evaluating(pixels.device):
            output: Tensor = self.front(pixels)
        return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).to(self.dtype)

    def _restored(self, rows: Tensor) -> Tensor:
        if rows.ndim != 4:
            return rows.float()
        return rows.float().permute(0, 3, 1, 2).contiguous(memory_format=self._numerics.memory_format)

    def _make_room(self, key: CacheKey, computed: Tensor, images: int, rows: int) -> _Shelf | None:
        """A shelf for all rows of a key; None where that is more than the memory that is left."""
        for other in [other for other in self._shelves if other.store == key.store]:
            if other.resolution != key.resolution and (past := self._shelves.pop(other)) is not None:
                self.memory_left += past.bytes
        needed = rows * computed[0].numel() * computed.element_size()
        if needed > self.memory_left:
            if self._report is not None:
                self._report(
                    f"what the frozen stages make of {rows:,} images takes {needed / 1e6:,.0f} MB, more than the "
                    f"{self.memory_left / 1e6:,.0f} MB left for it (model.cache_memory): it is computed at every step"
                )
                self._report = None
            return None
        self.memory_left -= needed
        self._peak = max(self._peak, self._memory - self.memory_left)
        return _Shelf(images, computed.new_empty((rows, *computed.shape[1:])))
