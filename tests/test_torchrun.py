"""Runs as torchrun starts them: on one machine and on two, with processes that die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cifarlab.rundir import RunFolder
from processes import free_port

# Others must have noticed by then.
LIMIT = 30
COMMAND = [
    "-m", "cifarlab", "run", "ex1", "--dataset", "digits", "--device", "cpu", "--set", "train.numerics=exact",
    "--set", "train.batch_size=64", "--set", "train.checkpoint_every.steps=5",
]  # fmt: skip


class Launched:
    """torchrun with two processes. Its output goes to a file, so that nobody has to read it."""

    def __init__(
        self,
        place: Path,
        *options: str,
        epochs: int,
        before: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        place.mkdir(exist_ok=True)
        self.place, self._log = place, place / "output.txt"
        torchrun = [*before, sys.executable, "-m", "torch.distributed.run", *options]
        command = [*torchrun, *COMMAND, "--set", f"train.epochs={epochs}", *more]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=place,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, what: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        return found

    def run(self) -> RunFolder | None:
        return next((RunFolder(path.parent) for path in self.place.rglob("train.json")), None)

    def checkpoint(self) -> Path | None:
        return next(self.place.rglob("step-*.pth"), None)

    def worker(self, rank: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                return child
        raise AssertionError(f"no process {rank}")

    def end(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait(LIMIT)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(*arguments: Any, **named: Any) -> Launched:
        launched.append(Launched(*arguments, **named))
        return launched[-1]

    yield start
    for one in launched:
        one.end()


def test_others_stop_where_one_is_killed_and_torchrun_goes_on(launch: Callable[..., Launched], tmp_path: Path) -> None:
    job = launch(tmp_path, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", epochs=1)
    job.wait_for(job.checkpoint, 120)
    killed = job.worker(1)
    killed.kill()
    job.wait_for(
        lambda: f"cifarlab: process 1 of 2 (on {os.uname().nodename}, pid {killed.pid}) is gone" in job.said, LIMIT
    )
    assert job.process.wait(180) == 0, job.said
    run = job.run()
    assert run is not None
    assert "going on from step" in job.said
    assert len(list(tmp_path.rglob("train.json"))) == 1
    assert run.done
    log = run.train_log()
    assert [entry["epoch"] for entry in log["epochs"]] == [1]
    assert "error" not in log
    assert run.environment()["resumed"][0]["from_step"] % 5 == 0


def test_a_signal_to_torchrun_saves_once_for_all(launch: Callable[..., Launched], tmp_path: Path) -> None:
    job = launch(tmp_path, "--standalone", "--nproc-per-node", "2", epochs=50)
    job.wait_for(job.checkpoint, 120)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(LIMIT) != 0
    run = job.run()
    assert run is not None
    assert run.status == "stopped"
    assert job.said.count("go on with: cifarlab resume") == 1
    saved = run.newest_checkpoint(lambda _: None)
    assert saved is not None
    assert f"step-{saved['step']}.pth" == run.checkpoints()[-1].name


# --- two machines -----------------------------------------------------------------------------

HOSTS = ("10.77.13.1", "10.77.13.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux, iproute2 and root")
    names = tuple(f"cifarlab-{os.getpid()}-{number}" for number in (0, 1))
    ends = tuple(f"cl{os.getpid() % 100_000}{letter}" for letter in "ab")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", end, "name", "cable")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_machines_and_a_cable_that_is_cut(
    launch: Callable[..., Launched], hosts: tuple[str, str], tmp_path: Path
) -> None:
    """They have no files in common; only the first writes. Without their cable both end, saying why."""
    port = str(free_port())
    jobs = [
        launch(
            tmp_path / name,
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)),
            *("--master-addr", HOSTS[0], "--master-port", port),
            epochs=50,
            before=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME="cable",
        )
        for rank, name in enumerate(hosts)
    ]
    first, second = jobs
    first.wait_for(first.checkpoint, 120)
    assert {path.name for path in second.place.iterdir()} == {"output.txt"}
    run = first.run()
    assert run is not None
    assert len(json.loads((run.path / "environment.json").read_text())["processes"]) == 2
    _ip("-n", hosts[0], "link", "set", "cable", "down")
    cut = time.monotonic()
    first.wait_for(lambda: "cifarlab: process 1 of 2" in first.said, LIMIT)
    second.wait_for(lambda: "cifarlab: " in second.said, LIMIT)
    assert time.monotonic() - cut < LIMIT
    assert "is lost" in second.said or "process 0 of 2" in second.said
