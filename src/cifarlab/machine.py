"""The machine: device, threads, memory kept in the process, when the process started, how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cifarlab.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
# What `prepare` sees to.
SETTINGS = ("memory_kept", "huge_pages", "threads_pinned", "waits_bounded", "denormals_flushed")

# glibc's numbers for mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1
# How often a thread of GNU's OpenMP looks whether the others are done before it sleeps: about a tenth of a millisecond,
# longer than from one parallel loop of a training step to the next.
_SPINS = 10_000
# Linux's, for madvise(2).
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20


def processes_here() -> int:
    """How many processes on this machine train together, by what torchrun says; 1 without."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(count) if "TORCHELASTIC_RUN_ID" in os.environ and count.isdecimal() else 1


def process_age() -> float:
    """Seconds since this process started, imports included."""
    if sys.platform == "linux":
        # psutil adds to the time of the boot, which the kernel gives in whole seconds: up to a second off.
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # see proc(5): starttime
            return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return max(0.0, time.time() - psutil.Process().create_time())


def prepare(*, without: Collection[str] = ()) -> dict[str, bool]:
    """Make this process ready for training on the CPU; call before torch is imported. Returns what took effect.

    Memory stays in the process, and in pages of 2 MB; torch's worker threads stay on their cores, and soon sleep where
    they wait for others; numbers too small for full precision become zero, as CPUs are slow with them. `without` leaves
    out some of SETTINGS, and with the memory kept its huge pages. Once a process is ready, another call does nothing.
    """
    assert set(without) <= set(SETTINGS), without
    if not _prepared:
        kept = "memory_kept" not in without and keep_memory()
        asked = kept and "huge_pages" not in without and ask_for_huge_pages(_huge_pages())
        pin = "threads_pinned" not in without and processes_here() == 1  # else all would sit on the same cores
        with _openmp(pin=pin, bound="waits_bounded" not in without) as (pinned, bounded):
            import torch

            # Threads inherit this from the one that starts them: all do the same arithmetic only if it comes first.
            flushed = "denormals_flushed" not in without and torch.set_flush_denormal(True)
            torch.ones(1_000_000).add_(1)  # the threads start with the first parallel loop
        found = (kept, asked, pinned, bounded, flushed)
        _prepared.update(zip(SETTINGS, found, strict=True))
    return dict(_prepared)


# Where Linux says what a container may have (cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")
# What `prepare` did, for the record.
_prepared: dict[str, bool] = {}


@contextlib.contextmanager
def _openmp(*, pin: bool, bound: bool) -> Iterator[tuple[bool, bool]]:
    """Inside, torch is to be imported, and starts its OpenMP threads. Gives whether they are pinned and bounded.

    pin: each stays on a core. Not where the user has a say in it already, or wants fewer threads than there are cores:
    two processes with a thread each would sit on the same core. The main thread is let go again, and the request taken
    back: threads and processes that it starts, to read images or to compile, would all inherit its one core.

    bound: a thread that waits for others soon sleeps. By default it goes on looking for milliseconds, and where another
    program wants the cores as well, it keeps them from the very thread that it waits for: EX-1 took six times as long
    beside two busy processes on two cores.
    """
    request: dict[str, str] = {}
    if sys.platform == "linux" and "torch" not in sys.modules:
        spoken = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
        if pin and not any(name in os.environ for name in spoken):
            request |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
        if bound and not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
            request["GOMP_SPINCOUNT"] = str(_SPINS)
    pinned, bounded = "OMP_PROC_BIND" in request, "GOMP_SPINCOUNT" in request
    cores = os.sched_getaffinity(0) if pinned else set[int]()
    os.environ.update(request)
    try:
        yield pinned, bounded
    finally:
        for name in request:
            del os.environ[name]
        if pinned:
            os.sched_setaffinity(0, cores)


def keep_memory() -> bool:
    """Make glibc keep freed memory in the process; call before the first tensor. Returns whether it took effect.

    By default glibc gets every large buffer from the kernel and hands it back, so a training step on the CPU spends
    its time in page faults: millions in a few steps of a network with large activations. The price is that memory,
    once used, stays with the process until it ends.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def ask_for_huge_pages(size: int) -> bool:
    """Let the next `size` bytes of the heap be backed by pages of 2 MB where the kernel has some; after `keep_memory`.

    A step goes through gigabytes; with pages of 4 KB the CPU looks up a new address every few hundred values. Returns
    whether the kernel was asked. Nothing is taken before it is used: the heap only gets its addresses now.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError):
        # Where the kernel keeps accounts, addresses alone would count as memory.
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return False
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    length = (block + size - first) // _HUGE_PAGE * _HUGE_PAGE
    asked = length > 0 and bool(libc.madvise(first, length, _MADV_HUGEPAGE) == 0)
    libc.free(block)  # back to the heap, which keeps it
    return asked


def _huge_pages() -> int:
    """Bytes of addresses to ask for."""
    return available_memory() // (2 * processes_here())


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


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it is emulated, it can be 25 times slower than float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked, so that a clock can be read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in main memory as one on the device, without waiting for what the device is still at.

    That takes pinned memory: from any other, CUDA waits until the copy is done, and so for all that was asked before.
    On the CPU it is the tensor itself.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the device or of the machine.

    "not enough memory" (CPU), "Cannot allocate memory" (shared memory), "CUDA out of memory", "CUDA error: out of
    memory", "MPS backend out of memory", and what cuBLAS and cuDNN say where they can't have their workspace.
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    signs = (
        *("out of memory", "not enough memory", "status_alloc_failed", "bad_alloc"),
        *("can't allocate memory", "cannot allocate memory"),
    )
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


def give_back_memory(device: torch.device) -> None:
    """Let go of what the allocator keeps for later; call outside of the `except`, whose exception holds tensors."""
    import gc

    import torch

    gc.collect()
    if device.type == "cpu" and _prepared.get("memory_kept"):
        ctypes.CDLL(None).malloc_trim(0)
        if _prepared.get("huge_pages"):
            ask_for_huge_pages(_huge_pages())
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take on the device; main memory is shared with others that train along."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory() // processes_here()


def available_memory() -> int:
    """Bytes of main memory that may be taken without pushing anything out; what a container leaves, in one."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = _container_limit()
        used = int((_CGROUP / "memory.current").read_text())
        # Files that were read count as used, and go when memory is wanted.
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        reclaimable = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
        available = min(available, max(0, limit - used + reclaimable))
    return available


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has; of main memory what a container may have, in one."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        total = min(total, _container_limit())
    return total


def _container_limit() -> int:
    """Bytes. Raises OSError without cgroups (v2), ValueError without a limit ("max")."""
    return int((_CGROUP / "memory.max").read_text())


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


def identity(device: torch.device) -> dict[str, Any]:
    """What decides which way of computing is the fastest, JSON-ready: device, CPU capability, threads, torch."""
    import torch

    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a plain one, which `weights_only` reads
    }


def describe(device: torch.device) -> dict[str, Any]:
    """What decides speed and bits here, JSON-ready: device, CPU capability, threads, versions."""
    import importlib.metadata

    import numpy
    import torch

    return {
        **identity(device),
        "device": str(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "prepared": dict(_prepared),
        "memory": int(psutil.virtual_memory().total),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torchvision": importlib.metadata.version("torchvision"),  # a run may not need it, and it is slow to import
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
