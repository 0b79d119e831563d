"""Runs as tasks of a Ray cluster: Ray says where and when; a run's state is its folder, a restart is our own resume.

The study's folder is on a disk that all nodes share, found out at the start, or each run is carried out in a temporary
folder of its node and fetched back when it ends. A run whose node is lost is tried again on another: from its newest
checkpoint where that is reachable, on a shared disk, else from its beginning.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifarlab import __version__, files
from cifarlab.ablate import WATCH_SECONDS, Task
from cifarlab.errors import NotARunError, RunError, UsageError
from cifarlab.rundir import find_runs
from cifarlab.workers import PATIENCE_SECONDS

# How often a run may lose its node.
RETRIES = 10


@dataclass(frozen=True)
class Parcel:
    """A task for a node. study: the study's folder as the arguments name it; content: what of it is needed, as a tar
    file, where the node doesn't see it; None: it does. place: within the study's folder."""

    arguments: tuple[str, ...]
    study: str
    place: str
    threads: int
    content: bytes | None


@dataclass(frozen=True)
class Node:
    """What a node found: its name, its cifarlab, and whether it sees the study's folder."""

    name: str
    cifarlab: str
    shares: bool


class RayWorkers:
    """As many runs at a time as the cluster has room for. Made while the cluster is there; `close` leaves it.

    address: as ray.init takes it. study: the study's folder. cpus: of a run; None: those of the smallest node, or, for
    runs on GPUs, of which each has one, an equal share.
    Raises UsageError where Ray isn't installed, RunError where the cluster can't be reached or its nodes can't work.
    """

    def __init__(self, address: str, study: Path, device: str, cpus: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--on ray: Ray is not installed; pip install 'cifarlab[ray]'") from None
        if os.environ.get("RAY_AUTH_MODE") != "token":
            raise UsageError(
                "--on ray: anybody who reaches a Ray cluster without tokens can run programs on it; set "
                "RAY_AUTH_MODE=token on all of its nodes and here (docs/ablations.md has the commands)"
            )
        self._ray: Any = ray  # whose types are about half there
        self._study = study.absolute()
        self._marker = self._study / f".here-{secrets.token_hex(8)}"
        try:
            ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR, namespace="cifarlab")
        except Exception as error:  # ConnectionError, RuntimeError, AuthenticationError …
            raise RunError(f"--on ray: no cluster at {address or 'this machine'}: {_short(error)}") from error
        files.write_bytes(self._marker, b"")
        try:
            self._shared = self._look_at_nodes()
            self._options, self.slots, self._threads = self._room(device, cpus)
        except BaseException:
            self.close()
            raise

    def run(self, task: Task, stop: Callable[[], bool]) -> int:
        place = task.place.absolute().relative_to(self._study)
        content = None if self._shared else self._packed(task, place)
        arguments = tuple(self._absolute(argument) for argument in task.arguments)
        parcel = Parcel(arguments, str(self._study), str(place), self._threads, content)
        carry_out = self._ray.remote(max_retries=RETRIES, retry_exceptions=False, **self._options)(_carry_out)
        reference = carry_out.remote(parcel)
        asked: float | None = None
        while not self._ray.wait([reference], timeout=WATCH_SECONDS)[0]:
            if asked is None and stop():
                asked = time.monotonic()
                self._ray.cancel(reference)  # a KeyboardInterrupt there
            elif asked is not None and time.monotonic() - asked > PATIENCE_SECONDS:
                return -int(signal.SIGTERM)
        try:
            code, content = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            with (task.place / "output.txt").open("a", encoding="utf-8") as output:
                output.write(f"{_short(error)}\n")
            return 1
        if content is not None:
            _unpack(content, self._study / place)
        return int(code)

    def close(self) -> None:
        files.remove(self._marker)
        self._ray.shutdown()

    def _look_at_nodes(self) -> bool:
        """Whether all nodes see the study's folder. Raises RunError where one can't work."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self._ray.remote(num_cpus=0)(_look)
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        waiting = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(self._marker)
            ): node["NodeManagerHostname"]
            for node in alive
        }
        found: list[Node] = []
        for reference, host in waiting.items():
            try:
                found.append(self._ray.get(reference, timeout=120))
            except Exception as error:
                raise RunError(
                    f"--on ray: node {host} can't run cifarlab: {_short(error)}; install the same version on all nodes"
                ) from error
        for node in found:
            if node.cifarlab != __version__:
                raise RunError(
                    f"--on ray: node {node.name} has cifarlab {node.cifarlab}, this machine {__version__}; "
                    "install the same version on all nodes"
                )
        return all(node.shares for node in found)

    def _room(self, device: str, cpus: int | None) -> tuple[dict[str, float], int, int]:
        """What a run asks of Ray, how many fit at a time, and how many threads each has."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
        if not nodes:
            raise RunError("--on ray: the cluster has no node with a CPU to give")
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if device == "cuda" and not gpus:
            raise RunError("--on ray: the cluster has no GPU to give, and --device is cuda")
        if device in ("auto", "cuda") and gpus:
            each = cpus or max(1, min(int(node["CPU"] // node["GPU"]) for node in nodes if node.get("GPU", 0)))
            slots = sum(min(int(node.get("GPU", 0)), int(node["CPU"] // each)) for node in nodes)
            return {"num_cpus": each, "num_gpus": 1}, max(1, slots), each
        each = cpus or max(1, int(min(node["CPU"] for node in nodes)))
        slots = sum(int(node["CPU"] // each) for node in nodes)
        if not slots:
            raise RunError(f"--on ray: no node has {each} CPUs to give; ask for fewer with --cpus")
        return {"num_cpus": each}, slots, each

    def _absolute(self, argument: str) -> str:
        """Paths into the study's folder, by whatever way they were given, as the nodes know them."""
        path = Path(argument).absolute()
        return str(path) if path.is_relative_to(self._study) else argument

    def _packed(self, task: Task, place: Path) -> bytes:
        """The recipes and, of a run that is there already, its folder."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(self._study / "recipes", "recipes")
            if task.arguments[0] != "run":
                archive.add(self._study / place, str(place))
        return buffer.getvalue()


# --- on a node ------------------------------------------------------------------------------------


def _look(marker: str) -> Node:
    return Node(socket.gethostname(), __version__, Path(marker).exists())


def _carry_out(parcel: Parcel) -> tuple[int, bytes | None]:
    """Run a parcel here; its exit code, and the run's place as a tar file where the study's folder isn't shared."""
    if parcel.content is None:
        return _run(list(parcel.arguments), Path(parcel.study) / parcel.place, parcel.threads), None
    with tempfile.TemporaryDirectory(prefix="cifarlab-") as folder:
        study = Path(folder)
        _unpack(parcel.content, study)
        arguments = [
            str(study / Path(argument).relative_to(parcel.study)) if _is_within(argument, parcel.study) else argument
            for argument in parcel.arguments
        ]
        place = study / parcel.place
        place.mkdir(parents=True, exist_ok=True)
        code = _run(arguments, place, parcel.threads)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(place, ".")
        return code, buffer.getvalue()


def _run(arguments: list[str], place: Path, threads: int) -> int:
    """`cifarlab …` in a process. A run that an earlier try began is gone on with."""
    if arguments[0] == "run" and (begun := _begun(place)) is not None:
        arguments = ["resume", str(begun), *arguments[arguments.index("--runs") + 2 :]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (place / "output.txt").open("ab") as output:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "cifarlab", *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        asked = False
        while process.poll() is None:
            try:
                time.sleep(WATCH_SECONDS)
            except KeyboardInterrupt:  # Ray's way to cancel
                if asked:
                    process.kill()
                asked = True
                process.send_signal(signal.SIGTERM)
        return process.returncode


def _begun(place: Path) -> Path | None:
    """The run that an earlier try left, once nobody is at work on it: its node may be lost to the cluster alone."""
    with contextlib.suppress(NotARunError):
        run = find_runs([place])[-1]
        while True:
            try:
                with run.locked():
                    return run.path
            except RunError:
                time.sleep(WATCH_SECONDS)
    return None


def _is_within(argument: str, study: str) -> bool:
    return Path(argument).is_absolute() and Path(argument).is_relative_to(study)


def _unpack(content: bytes, folder: Path) -> None:
    """A tar file that this program made, with the care for one that somebody else did."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
