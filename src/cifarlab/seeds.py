"""No hidden random state: every draw comes from a generator made on the spot from integers.

The order of an epoch is a function of (seed, "order", epoch). The draws of each augmentation, for all images, are one
table from (seed, "crop", epoch) and its like, looked up by sample index. Dropout is a function of (seed, "step", step),
and of the process where several divide a batch.
So going on after a stop needs integers only, and neither batch size, workers nor processes change what an image gets.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that is a fixed function of its arguments, and independent for different ones (BLAKE2b)."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
