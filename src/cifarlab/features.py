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


class Source(NamedTuple):
    """Which inputs these are: the images of a store, at a resolution, in one of their versions."""

    store: str
    resolution: int
    version: int


class _Shelf:
    """The outputs for one source. rows: (M, h, w, C); place: int64 (N,), an image's row, -1 where it has none."""

    def __init__(self, images: int, rows: int, device: torch.device) -> None:
        self.place = torch.full((images,), -1, dtype=torch.int64, device=device)
        self.capacity = rows
        self.used = 0
        self.rows: Tensor | None = None

    def add(self, samples: Tensor, computed: Tensor) -> None:
        """Keep the outputs of those images that have no row yet."""
        assert self.rows is not None
        new = self.place[samples] < 0
        rows = torch.arange(self.used, self.used + int(new.sum()), device=samples.device)
        self.rows[rows] = computed[new]
        self.place[samples[new]] = rows
        self.used += len(rows)


class FrozenStages:
    """The front of a network, in evaluation mode and without gradients, with a memory of what it has computed.

    front: from (B, 3, H, W) float32 to (B, C, h, w) float32. dtype: what outputs are rounded to, cached or not, so that
    the numbers do not depend on how much fits into `memory` (bytes).
    """

    def __init__(self, front: nn.Module, dtype: torch.dtype, memory: int, memory_format: torch.memory_format) -> None:
        self.front = front
        self.dtype = dtype
        self.memory_left = memory
        self.computed = self.recalled = 0  # images
        self._memory = memory
        self._memory_format = memory_format
        self._shelves: dict[Source | None, _Shelf | None] = {}

    @torch.no_grad()
    def __call__(
        self, pixels: Callable[[], Tensor], samples: Tensor, source: Source | None, images: int, rows: int
    ) -> Tensor:
        """Outputs for the images at `samples` (int64 (B,), on the device), float32 (B, C, h, w).

        pixels: makes their (B, 3, H, W), if they are needed. source: None where the same inputs will not come again.
        images: how many the store has. rows: how many different ones will be asked for.
        """
        if source not in self._shelves:
            self._shelves[source] = _Shelf(images, rows, samples.device) if source is not None else None
        shelf = self._shelves[source]
        if shelf is None:
            return self._restored(self._compute(pixels()))
        place = shelf.place[samples]
        if shelf.used < shelf.capacity and bool((place < 0).any()):
            computed = self._compute(pixels())
            if shelf.rows is None and not self._reserve(shelf, computed):
                self._shelves[source] = None
            else:
                shelf.add(samples, computed)
            return self._restored(computed)
        assert shelf.rows is not None
        self.recalled += len(samples)
        return self._restored(shelf.rows[place])

    def record(self) -> dict[str, int]:
        """How often images went through the front and how often they were recalled, and the bytes that it took."""
        return {"computed": self.computed, "recalled": self.recalled, "bytes": self._memory - self.memory_left}

    def _compute(self, pixels: Tensor) -> Tensor:
        """(B, h, w, C): channels last, as most layers like them and as rows are copied fastest."""
        self.computed += len(pixels)
        output: Tensor = self.front(pixels)
        return output.permute(0, 2, 3, 1).to(self.dtype)

    def _restored(self, rows: Tensor) -> Tensor:
        return rows.float().permute(0, 3, 1, 2).contiguous(memory_format=self._memory_format)

    def _reserve(self, shelf: _Shelf, computed: Tensor) -> bool:
        """Make room for all rows of a shelf; False where that is more than the memory that is left."""
        needed = shelf.capacity * computed[0].numel() * computed.element_size()
        if needed > self.memory_left:
            return False
        self.memory_left -= needed
        shelf.rows = computed.new_empty((shelf.capacity, *computed.shape[1:]))
        return True
