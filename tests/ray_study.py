"""A study on a Ray cluster of two nodes on this machine, one of which is killed midway. test_ray.py starts it.

    python ray_study.py FOLDER

Ray's own processes listen on the machine's address, so it is best run where that is the loopback one alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6390
LEAST = ("--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000", "--block")


def main(folder: Path) -> int:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (so it is called); else whatever else this machine does comes first
    # A lost node is noticed in two seconds instead of half a minute.
    os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
    nodes = []
    try:
        nodes.append(start("--head", f"--port={PORT}", "--include-dashboard=false", folder=folder))
        nodes.append(start(f"--address=127.0.0.1:{PORT}", folder=folder))
        return study(folder, nodes[1])
    finally:
        for node in nodes:
            kill(node)


def start(*arguments: str, folder: Path) -> psutil.Popen:
    """A node, once it is there."""
    output = folder / f"ray{len(list(folder.glob('ray*')))}.txt"
    with output.open("wb") as file:
        node = psutil.Popen([RAY, "start", *arguments, *LEAST], stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in output.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"Ray did not start: {output.read_text()}")
        time.sleep(0.1)
    return node


def kill(node: psutil.Popen) -> None:
    """As a machine goes that loses its power: all at once, and nothing is said."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = node.children(recursive=True)
    for process in [node, *children]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def study(folder: Path, victim: psutil.Popen) -> int:
    command = [sys.executable, "-m", "cifarlab", "ablate", "ex1", "--dataset", "digits", "--device", "cpu"]
    command += ["--vary", "optimizer.weight_decay=0.5", "--seeds", "1", "--name", "s", "--on", "ray"]
    for setting in ("train.epochs=15", "data.limit=300", "train.checkpoint_every.steps=5", "evaluate.test=false"):
        command += ["--set", setting]
    with subprocess.Popen(command, cwd=folder) as process:
        while process.poll() is None:
            if victim.is_running() and (run := run_of(victim)) is not None:
                begun = list(run.rglob("step-*.pth"))
                if begun:
                    kill(victim)
                    (folder / "killed.txt").write_text(str(begun[0].parent.relative_to(folder)))
            time.sleep(0.05)
    return process.returncode


def run_of(node: psutil.Popen) -> Path | None:
    """Where the run that a node is at work on goes; None: there is none."""
    for process in node.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "cifarlab" in words and "--runs" in words:
            return Path(words[words.index("--runs") + 1])
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
