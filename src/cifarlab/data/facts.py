"""What is known of each image once its pixels were read: its hash for the leak check, its sums for mean and std."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.data.dataset import UInt8Array, let_go
from cifarlab.data.leaks import pixel_hashes

# hash: as `leaks.pixel_hashes`. sums, squares: of the values of each channel and of their squares.
FACTS = np.dtype([("hash", "<u8", 2), ("sums", "<u8", 3), ("squares", "<u8", 3)])
Facts = NDArray[Any]

# Pixels read at a time, so that a memory map larger than memory can be measured; large images count as well.
SLICE_BYTES = 4_000_000
# So many squares of 8 bits fit into a sum of 32 bits, which is four times faster than one of 64.
VALUES = 2**16


def image_facts(pixels: UInt8Array) -> Facts:
    """FACTS, (N,), of images uint8 (N, 3, H, W), a memory map as well."""
    facts = np.zeros(len(pixels), FACTS)
    step = max(1, SLICE_BYTES // max(1, pixels[:1].nbytes))
    for start in range(0, len(pixels), step):
        block = np.ascontiguousarray(pixels[start : start + step])
        channels = block.reshape(len(block), 3, -1)
        found = facts[start : start + step]
        found["hash"] = pixel_hashes(block)
        for begin in range(0, channels.shape[2], VALUES):
            values = channels[:, :, begin : begin + VALUES]
            found["sums"] += values.sum(2, dtype=np.uint32)
            found["squares"] += np.square(values, dtype=np.uint32).sum(2, dtype=np.uint32)
        let_go(pixels)
    return facts
