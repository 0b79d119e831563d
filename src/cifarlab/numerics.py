"""Dtype, layout, compilation. For now one choice, `exact`: fp32, eager, deterministic."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numerics:
    """How a model's arithmetic is done.

    memory_format: how images and convolution weights lie in memory. deterministic: whether the same bits are promised.
    """

    name: str
    dtype: torch.dtype
    memory_format: torch.memory_format
    deterministic: bool


def exact(device: torch.device, *, channels_last_on_cpu: bool) -> Numerics:
    """fp32, eager, deterministic: same seed, machine and thread count, same bits (on the CPU).

    Layout does not change what is computed, only how fast: `channels_last_on_cpu` is the network's own preference.
    Sets torch's process-wide switches.
    """
    # cuBLAS is deterministic only with a fixed workspace, and reads this when the first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On the CPU everything that is used here is deterministic. On a GPU the odd operation is not: torch then warns.
    deterministic = device.type == "cpu"
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    # A debugging aid of the deterministic mode that writes NaN over all new memory: an eighth of EX-2's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    channels_last = channels_last_on_cpu and device.type == "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Numerics("exact", torch.float32, layout, deterministic)
