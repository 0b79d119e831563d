"""Whatever goes wrong with the disk, and wherever a run is killed: nothing is lost, and going on gives what would have
come. `make torture` tries all of it; here every operation goes wrong once, in one of the ways."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import faults

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, and kills by a POSIX signal")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What an undisturbed run does to the disk, and what it leaves."""
    runs = tmp_path_factory.mktemp("straight")
    ended = faults.run(runs)
    assert ended.code == 0, ended.said
    return ended.operations, faults.outcome(runs)


def test_every_kind_of_operation_is_counted(straight: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
    operations, left = straight
    kinds = {operation for operation, _ in operations}
    assert kinds == {"mkdir", "open", "write", "fsync", "close", "replace", "unlink"}
    written = {name.split(".")[1] for operation, name in operations if operation == "open" and name.startswith(".")}
    assert {"recipe", "environment", "train", "test", "best", "step-2", "step-4", "predictions", "loss"} <= written
    assert set(left["files"]) >= {"best.pth", "step-4.pth", "step-6.pth", "test.json", "loss.png"}


@pytest.mark.parametrize("shift", range(len(faults.HOWS)))
def test_the_nth_operation_goes_wrong(
    shift: int, tmp_path: Path, straight: tuple[list[tuple[str, str]], dict[str, Any]]
) -> None:
    """Every second operation, the ways in turn. `make torture` takes every operation, each in several ways."""
    operations, left = straight
    cases = [
        (tmp_path / str(nth), nth, faults.HOWS[(nth // len(faults.HOWS)) % len(faults.HOWS)], left)
        for nth in range(1 + shift, len(operations) + 1, 2 * len(faults.HOWS))
    ]
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda case: disturbed(*case), cases))
    assert any(one.happened for one in ended)


def disturbed(runs: Path, nth: int, how: str, left: dict[str, Any]) -> faults.Ended:
    """Run with that fault, look at what is there, and go on without."""
    ended = faults.run(runs, nth, how)
    place = f"{how} at operation {nth}, {ended._replace(operations=ended.operations[-3:])}"
    killed = how.startswith("kill")
    faults.check_whole(runs, killed=killed)
    if killed:
        assert ended.code == -9 and ended.happened, place
    elif ended.code:
        assert ended.happened and ended.code == 4 and "\n" not in ended.said, place
        assert how == "memory" or "cannot " in ended.said, place
    again = faults.run(runs)
    assert again.code == 0, f"{place}: {again.said}"
    faults.check_whole(runs, killed=False)
    assert differences(faults.outcome(runs), left) == [], place
    return ended


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs, shortly."""
    return [
        f"{key}: {str(one.get(key))[:300]} | {str(other.get(key))[:300]}"
        for key in sorted(one | other)
        if one.get(key) != other.get(key)
    ]


def killed_at_random(runs: Path, generator: random.Random) -> int:
    """Killed again and again, at moments that no operation of the disk decides, until the run is done; how often."""
    kills = 0
    for attempt in itertools.count():
        process, pipe = faults.begin(runs)
        time.sleep(generator.uniform(0.0, 1.5 + attempt))  # a slow machine must come to its next checkpoint
        process.kill()
        ended = faults.end(process, pipe)
        kills += ended.code == -9
        faults.check_whole(runs, killed=ended.code == -9)
        if ended.code == 0:
            return kills
    raise AssertionError


def test_a_kill_at_any_moment(tmp_path: Path, straight: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
    generator = random.Random(0)
    kills = runs = 0
    while kills < 6:
        runs += 1
        kills += killed_at_random(tmp_path / str(runs), generator)
        assert differences(faults.outcome(tmp_path / str(runs)), straight[1]) == []


# --- whole file systems -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of its own, and what mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")

    mount("size=64k")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_and_then_is_not(
    small_disk: tuple[Path, Callable[[str], None]], straight: tuple[list[tuple[str, str]], dict[str, Any]]
) -> None:
    """A little more room each time: each time one sentence, all that was there whole, and the run a little further."""
    place, mount = small_disk
    refusals = []
    for room in range(64, 2048, 40):
        mount(f"size={room}k")
        ended = faults.run(place)
        faults.check_whole(place, killed=False)
        if ended.code == 0:
            break
        assert ended.code == 4 and "the disk is full; free some space" in ended.said, ended
        refusals.append(ended.said)
    assert len(refusals) >= 3
    assert differences(faults.outcome(place), straight[1]) == []


def test_a_disk_that_turns_read_only(
    small_disk: tuple[Path, Callable[[str], None]], straight: tuple[list[tuple[str, str]], dict[str, Any]]
) -> None:
    place, mount = small_disk
    mount("size=1m")
    process, pipe = faults.begin(place)
    while not list(place.rglob("step-2.pth")):
        time.sleep(0.01)
    process.kill()
    faults.end(process, pipe)
    mount("ro,size=1m")
    ended = faults.run(place)
    assert ended.code == 4 and "the file system is read-only; choose another folder" in ended.said
    faults.check_whole(place, killed=True)
    mount("rw,size=2m")
    assert faults.run(place).code == 0
    assert differences(faults.outcome(place), straight[1]) == []
