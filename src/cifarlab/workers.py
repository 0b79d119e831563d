"""Runs as processes on this machine, several at a time, cores and GPUs dealt out among them."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from cifarlab.ablate import WATCH_SECONDS, Task, command_of
from cifarlab.errors import UsageError

# What a run that was asked to end has for its step and its checkpoint.
PATIENCE_SECONDS = 120.0


class LocalWorkers:
    """`slots` processes at a time. Each has its own cores where there are enough, and one of the GPUs.

    gpus: as CUDA_VISIBLE_DEVICES names them; empty: runs see what there is.
    """

    def __init__(self, slots: int = 1, gpus: list[str] | None = None) -> None:
        self.slots = slots
        self._gpus = gpus or []
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def run(self, task: Task, stop: Callable[[], bool]) -> int:
        slot = self._free.get()
        try:
            return self._run(task, stop, slot)
        finally:
            self._free.put(slot)

    def close(self) -> None:
        for process in list(self._processes):
            process.kill()

    def _run(self, task: Task, stop: Callable[[], bool], slot: int) -> int:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        if self.slots > 1 and self._cores:
            own = self._cores[slot % len(self._cores) :: self.slots]
            environment.setdefault("OMP_NUM_THREADS", str(len(own)))
            # Of this thread alone; the process that it starts has them from it.
            os.sched_setaffinity(0, own)
        with (task.place / "output.txt").open("ab") as output:
            # In a group of its own: Ctrl-C is passed on once, and not by the terminal as well.
            process = subprocess.Popen(  # noqa: S603
                command_of(task), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=sys.platform != "win32",
            )  # fmt: skip
            self._processes.add(process)
            try:
                return _ended(process, stop)
            finally:
                self._processes.discard(process)


def _ended(process: subprocess.Popen[bytes], stop: Callable[[], bool]) -> int:
    """Wait for a process; one that is to stop is asked to, and ended where it doesn't in two minutes."""
    asked: float | None = None
    while True:
        try:
            return process.wait(WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            if asked is None and stop():
                asked = time.monotonic()
                process.send_signal(signal.SIGTERM)
            elif asked is not None and time.monotonic() - asked > PATIENCE_SECONDS:
                process.kill()


def gpus_of(device: str) -> list[str]:
    """The GPUs that runs on a device are dealt out to; none where they run on the CPU."""
    if device not in ("auto", "cuda"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def parse_workers(text: str) -> tuple[str, str]:
    """`local:2` as `("local", "2")`, `ray://host:10001` as `("ray", "host:10001")`. Raises UsageError."""
    kind, _, rest = text.partition(":")
    if kind == "local" and (not rest or (rest.isdecimal() and 0 < int(rest) <= 1000)):
        return kind, rest or "1"
    if kind == "ray" and (not rest or (rest.startswith("//") and len(rest) > 2)):
        return kind, rest.removeprefix("//")
    raise UsageError(f"--on {text}: expected local, local:N, ray or ray://ADDRESS")
