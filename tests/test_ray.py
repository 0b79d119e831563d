"""Studies on a Ray cluster: a real one of two nodes, one of them killed; and what goes to and from a node."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifarlab import ray_workers
from cifarlab.ablate import Task
from cifarlab.errors import UsageError
from cifarlab.ray_workers import Parcel, RayWorkers
from cifarlab.rundir import RunFolder, find_runs
from cifarlab.study import StudyFolder

HERE = Path(__file__).parent


def alone() -> list[str]:
    """A prefix for a command that then has no network but the loopback interface, where that is to be had."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--net", "true"], capture_output=True).returncode:
        return []
    return [unshare, "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def test_a_study_survives_the_loss_of_a_node_and_runs_each_run_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = subprocess.run(
        [*alone(), sys.executable, HERE / "ray_study.py", tmp_path], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = RunFolder(tmp_path / (tmp_path / "killed.txt").read_text())
    folder = StudyFolder(tmp_path / "studies" / "s")
    study = folder.read()
    assert study.status == "finished"
    assert [run.status for run in study.runs] == ["finished"] * 2
    assert [len(find_runs([folder.place(run)])) for run in study.runs] == [1, 1]
    assert all(run.done for run in find_runs([folder.path]))
    # The run of the lost node went on from where it had come to, on the other.
    resumed = killed.environment()["resumed"]
    assert len(resumed) == 1 and resumed[0]["from_step"] > 0
    assert not list(folder.path.glob(".here-*"))


def test_without_tokens_no_cluster_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=token"):
        RayWorkers("", tmp_path, "cpu")


def test_a_node_that_shares_no_disk_gets_what_a_run_needs_and_sends_back_what_it_left(tmp_path: Path) -> None:
    study = tmp_path / "study"
    (study / "recipes").mkdir(parents=True)
    shutil.copy(Path(ray_workers.__file__).parent / "recipes" / "ex1.yaml", study / "recipes" / "00-x.yaml")
    place = study / "runs" / "00-x" / "0"
    place.mkdir(parents=True)
    (place / "step-1.pth").write_bytes(b"a checkpoint")
    workers = object.__new__(RayWorkers)
    workers._study = study
    task = Task("", ("show", str(study / "recipes" / "00-x.yaml"), "--dataset", "digits"), place)
    content = workers._packed(task, place.relative_to(study))
    for path in (study / "recipes").iterdir():
        path.unlink()  # the node doesn't see them
    parcel = Parcel(task.arguments, str(study), "runs/00-x/0", 1, content)
    code, back = ray_workers._carry_out(parcel)
    assert code == 0 and back is not None
    ray_workers._unpack(back, tmp_path / "fetched")
    assert (tmp_path / "fetched" / "step-1.pth").read_bytes() == b"a checkpoint"
    assert "name: ex1\n" in (tmp_path / "fetched" / "output.txt").read_text()
    assert not (place / "output.txt").exists()


def test_a_task_that_is_tried_again_goes_on_with_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "ex1" / "digits" / "20261128-120000"
    begun.mkdir(parents=True)
    for name in ("recipe.yaml", "train.json"):
        (begun / name).write_text("{}")
    commands: list[list[str]] = []

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command[3:])

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("cifarlab.ray_workers.subprocess.Popen", Process)
    first = ["run", "x.yaml", "--dataset", "digits", "--seed", "0", "--runs", str(tmp_path), "--device", "cpu"]
    ray_workers._run(first, tmp_path, 1)
    assert commands == [["resume", str(begun), "--device", "cpu"]]
