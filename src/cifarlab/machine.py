"""The machine: device, threads, memory kept in the process, when the process started, how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cifarlab.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")

# glibc's numbers for mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_INT_MAX = 2**31 - 1


def process_age() -> float:
    """Seconds since this process started, imports included."""
    if sys.platform == "linux":
        # psutil adds to the time of the boot, which the kernel gives in whole seconds: up to a second off.
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # see proc(5): starttime
            return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return max(0.0, time.time() - psutil.Process().create_time())


def keep_memory() -> bool:
    """Make glibc keep freed memory in the process; call before the first tensor. Returns whether it took effect.

    By default glibc gets every large buffer from the kernel and hands it back, so a training step on the CPU spends
    its time in page faults: millions in a few steps of a network with large activations. The price is that memory,
    once used, stays with the process until it ends.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX))


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda:1` the second. Raises UsageError for an unknown or absent device."""
    import torch

    kind, colon, index = name.partition(":")
    if kind not in DEVICES:
        raise UsageError(f"unknown device '{name}'; {nearest(kind, DEVICES)}")
    if colon and (kind != "cuda" or re.fullmatch("[0-9]{1,4}", index) is None):
        raise UsageError(f"unknown device '{name}'; only cuda takes a number, as in cuda:0")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return torch.device(next((k for k in ("cuda", "mps") if available[k]), "cpu"))
    if not available[kind]:
        present = ", ".join(k for k, there in available.items() if there)
        raise UsageError(f"device '{name}' is not available here; this machine and this torch have: {present}")
    if not index:
        return torch.device(kind)
    if int(index) >= torch.cuda.device_count():
        raise UsageError(f"device '{name}' is not there; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(kind, int(index))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked, so that a clock can be read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take on the device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def available_memory() -> int:
    """Bytes of main memory that may be taken without pushing anything out."""
    return int(psutil.virtual_memory().available)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of `peak_memory` (on the CPU where the kernel allows it: Linux)."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held since `reset_peak_memory`: allocated on the GPU, or resident on the CPU; None if unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> dict[str, Any]:
    """What decides speed and bits here, JSON-ready: device, CPU capability, threads, versions."""
    import numpy
    import torch
    import torchvision

    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": int(psutil.virtual_memory().total),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
