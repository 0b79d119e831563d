"""A study carried out: by workers that only pretend to train, and once by real processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cifarlab.ablate import Conduct, Conductor, Task, merged, open_or_create, plan_study
from cifarlab.cli.ablate import check_name
from cifarlab.cli.common import parse_time
from cifarlab.errors import DataError, RunError, UsageError
from cifarlab.factors import parse_factor
from cifarlab.recipe import load_recipe, make_recipe
from cifarlab.rundir import RunFolder
from cifarlab.study import Study, StudyFolder, as_recorded
from cifarlab.workers import LocalWorkers, parse_workers


class Pretended:
    """Workers whose runs have accuracies out of a table, by learning rate and seed. They note what they are asked."""

    def __init__(self, outcome: Callable[[float, int], float | str], slots: int = 1) -> None:
        self.slots, self.outcome = slots, outcome
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def run(self, task: Task, stop: Callable[[], bool]) -> int:
        what, path = task.arguments[0], Path(task.arguments[1])
        with self._lock:
            if what == "run":
                recipe = load_recipe(str(path)).resolved(dataset="digits", seed=int(task.arguments[5]))
                if recipe.train.numerics == "auto":
                    recipe = make_recipe({**recipe.to_dict(), "train": recipe.to_dict()["train"] | {"numerics": FOUND}})
                folder = RunFolder.create(Path(task.arguments[7]), recipe, datetime.now())
            else:
                folder = RunFolder(path)
            recipe = folder.recipe()
            rate = recipe.optimizer.lr
            self.asked.append(f"{what} {rate:g} {recipe.seed}")
            if what == "test":
                folder.write_test_log({"accuracy": rate})
                return 0
            outcome = self.outcome(rate, recipe.seed)
            if isinstance(outcome, str) and outcome.startswith("gone"):
                shutil.rmtree(folder.path)
                return int(outcome.removeprefix("gone"))
            folder.write_environment({"data": {"images": {"validation": 1_000}}})
            folder.write_train_log(log(outcome))
            if not isinstance(outcome, str):
                for name in ("loss.png", "accuracy.png"):
                    (folder.path / name).write_bytes(b"")
        return 0 if not isinstance(outcome, str) else 4

    def close(self) -> None:
        pass


FOUND = {"dtype": "float32", "channels_last": True}


def log(outcome: float | str) -> dict[str, Any]:
    common = {"dataset": "digits", "epochs": [], "train_time": 7.0}
    if isinstance(outcome, str):
        return {**common, "status": outcome.partition(":")[0], "error": outcome.partition(":")[2] or None}
    entry: dict[str, Any] = {"epoch": 1, "lr": 0.1, "seconds": 1.0, "train_loss": outcome, "train_accuracy": outcome}
    entry |= {"val_loss": 1.0, "val_accuracy": outcome, "ema_val_loss": None, "ema_val_accuracy": None}
    figures = {"best_epoch": 1, "best_weights": "raw", "best_val_accuracy": outcome, "overfitting_gap": None}
    return {**common, **figures, "epochs": [entry], "status": "finished", "stopped_early": False}


def plan(*, seeds: int = 2, overrides: Sequence[str] = (), values: str = "1e-3,2e-3,3e-3", **others: Any) -> Study:
    return plan_study(
        "s", load_recipe("ex1", overrides), [parse_factor(f"optimizer.lr={values}")], "grid",
        dataset="digits", seeds=range(seeds), resolve=0.002, command=["cifarlab", "ablate"], **others,
    )  # fmt: skip


def carry_out(place: Path, study: Study, workers: Any, **conduct: Any) -> tuple[Study, list[str]]:
    folder, there = open_or_create(place, study)
    study = merged(folder.read(), study) if there else study
    folder.write(study)
    said: list[str] = []
    return Conductor(folder, study, workers, Conduct(**conduct), said.append).carry_out(), said


def accuracy(rate: float, seed: int) -> float:
    return round(0.5 + 100 * rate + 0.01 * seed + 0.001 * ((7919 * seed * round(1e4 * rate)) % 5), 3)


def test_a_study_runs_every_arm_with_every_seed_and_looks_at_the_test_set_once(tmp_path: Path) -> None:
    workers = Pretended(accuracy)
    study, said = carry_out(tmp_path / "s", plan(), workers)
    arms = ("0.001", "0.002", "0.003")
    # Seed by seed; then the winner and the baseline, and nobody else.
    assert workers.asked[:6] == [f"run {rate} {seed}" for seed in (0, 1) for rate in arms]
    assert sorted(workers.asked[6:]) == ["test 0.001 0", "test 0.001 1", "test 0.003 0", "test 0.003 1"]
    assert study.status == "finished" and study.test is not None
    assert [(look.arm[:2], look.seed, look.accuracy) for look in study.test.looks] == [
        ("00", 0, 0.001), ("02", 0, 0.003), ("00", 1, 0.001), ("02", 1, 0.003),
    ]  # fmt: skip
    for run in study.runs:
        assert run.val_accuracy == accuracy(make_recipe(study.recipe).optimizer.lr * (1 + int(run.arm[:2])), run.seed)
        assert run.folder is not None and (tmp_path / "s" / run.folder / "train.json").exists()
    assert [result.n for result in study.results] == [2, 2, 2]
    assert any(line.startswith("[6/6] optimizer.lr=0.003 seed 1: 81") for line in said)
    # Once more: nothing is left to be done, and the test set is not looked at again.
    again = Pretended(accuracy)
    assert carry_out(tmp_path / "s", plan(), again)[0].results == study.results
    assert again.asked == []


def test_arms_train_without_the_test_set_whatever_the_recipe_says(tmp_path: Path) -> None:
    carry_out(tmp_path / "s", plan(seeds=1), Pretended(accuracy))
    for file in (tmp_path / "s" / "recipes").iterdir():
        assert load_recipe(str(file)).evaluate.test is False
    untested = Pretended(accuracy)
    assert carry_out(tmp_path / "t", plan(overrides=["evaluate.test=false"]), untested)[0].test is None
    assert not [asked for asked in untested.asked if asked.startswith("test")]


def test_what_was_interrupted_goes_on_and_what_was_done_stays(tmp_path: Path) -> None:
    calls = 0

    def outcome(rate: float, seed: int) -> float | str:
        nonlocal calls
        calls += 1
        if calls == 3:
            conduct["stopped"].set()
            return "stopped"
        return accuracy(rate, seed)

    conduct = {"stopped": threading.Event()}
    first = Pretended(outcome)
    study, _ = carry_out(tmp_path / "s", plan(), first, **conduct)
    assert study.status == "stopped" and study.test is None
    assert [run.status for run in study.runs] == ["finished", "finished", "stopped", "waiting", "waiting", "waiting"]
    # Moved, it still knows its runs.
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    second = Pretended(accuracy)
    study, _ = carry_out(tmp_path / "elsewhere", plan(), second)
    assert second.asked[:4] == ["resume 0.003 0", "run 0.001 1", "run 0.002 1", "run 0.003 1"]
    whole, _ = carry_out(tmp_path / "whole", plan(), Pretended(accuracy))
    assert study.results == whole.results and study.status == "finished"


def test_a_killed_study_believes_its_run_folders_and_not_what_it_had_written(tmp_path: Path) -> None:
    study, _ = carry_out(tmp_path / "s", plan(), Pretended(accuracy))
    folder = StudyFolder(tmp_path / "s")
    lies = [run.model_copy(update={"status": "running", "val_accuracy": None, "folder": None}) for run in study.runs]
    folder.write(study.model_copy(update={"runs": lies, "status": "running"}))
    workers = Pretended(accuracy)
    assert carry_out(tmp_path / "s", plan(), workers)[0] == study
    assert workers.asked == []


def test_more_seeds_go_on_with_a_study_and_another_plan_does_not(tmp_path: Path) -> None:
    carry_out(tmp_path / "s", plan(), Pretended(accuracy))
    workers = Pretended(accuracy)
    study, _ = carry_out(tmp_path / "s", plan(seeds=3), workers)
    assert workers.asked[:3] == ["run 0.001 2", "run 0.002 2", "run 0.003 2"]
    assert [result.n for result in study.results] == [3, 3, 3]
    before = (tmp_path / "s" / "study.json").read_bytes()
    for other, what in ((plan(values="1e-3,5e-3"), "factors"), (plan(overrides=["train.epochs=3"]), "recipe")):
        with pytest.raises(UsageError, match=f"another study of that name .*{what}"):
            open_or_create(tmp_path / "s", other)
    with pytest.raises(UsageError, match="seeds"):
        open_or_create(tmp_path / "s", plan(seeds=2))
    assert (tmp_path / "s" / "study.json").read_bytes() == before
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    with pytest.raises(UsageError, match="is no study"):
        open_or_create(tmp_path / "pictures", plan())


def test_a_run_that_diverges_or_fails_does_not_end_the_study(tmp_path: Path) -> None:
    outcomes: dict[float, str] = {0.002: "failed:the loss became NaN at step 3", 0.003: "failed:out of memory"}
    workers = Pretended(lambda rate, seed: outcomes.get(rate, accuracy(rate, seed)))
    study, said = carry_out(tmp_path / "s", plan(), workers)
    assert [run.status for run in study.runs] == ["finished", "diverged", "failed"] * 2
    assert study.results[1].verdict == "diverged in 2 of 2"
    assert study.status == "stopped" and study.test is None
    assert any("failed: out of memory" in line for line in said)
    # What failed is tried again, what diverged is not.
    del outcomes[0.003]
    workers = Pretended(accuracy)
    study, _ = carry_out(tmp_path / "s", plan(), workers)
    assert workers.asked[:2] == ["resume 0.003 0", "resume 0.003 1"]
    assert study.status == "finished"


@pytest.mark.parametrize("damage", ["{", '{"status": "finished", "dataset": "digits", "epochs": []}', '"x"'])
def test_a_run_whose_record_is_damaged_counts_as_failed(tmp_path: Path, damage: str) -> None:
    study, _ = carry_out(tmp_path / "s", plan(), Pretended(accuracy))
    (tmp_path / "s" / str(study.runs[0].folder) / "train.json").write_text(damage)
    folder = StudyFolder(tmp_path / "s")
    found = as_recorded(study.runs[0], folder, folder.folder(study.runs[0]))
    assert (found.status, found.val_accuracy) == ("failed", None)
    assert "damaged" in str(found.error)


def test_a_run_that_was_killed_before_its_pictures_is_not_over(tmp_path: Path) -> None:
    study, _ = carry_out(tmp_path / "s", plan(), Pretended(accuracy))
    (tmp_path / "s" / str(study.runs[1].folder) / "loss.png").unlink()
    workers = Pretended(accuracy)
    carry_out(tmp_path / "s", plan(), workers)
    assert workers.asked[0] == "resume 0.002 0"


def test_all_arms_have_the_numerics_that_the_first_run_found(tmp_path: Path) -> None:
    workers = Pretended(accuracy, slots=2)
    study, _ = carry_out(tmp_path / "s", plan(overrides=["train.numerics=auto"], seeds=1), workers)
    chosen = study.numerics
    assert isinstance(chosen, dict) and chosen["channels_last"] is True
    for run in study.runs:
        assert run.folder is not None
        assert RunFolder(tmp_path / "s" / run.folder).recipe_values()["train"]["numerics"] == chosen
    files = [load_recipe(str(path)) for path in sorted((tmp_path / "s" / "recipes").iterdir())]
    assert {str(recipe.train.numerics) for recipe in files} == {str(files[0].train.numerics)}
    assert files[0].train.numerics != "auto"


def test_a_first_run_that_comes_to_nothing_ends_the_study_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="first run did not get as far as training: it ended with exit code 4"):
        carry_out(tmp_path / "s", plan(overrides=["train.numerics=auto"]), Pretended(lambda rate, seed: "gone 4"))


def test_data_that_cannot_be_read_ends_the_study(tmp_path: Path) -> None:
    workers = Pretended(lambda rate, seed: "gone 3")
    with pytest.raises(DataError, match="it ended with exit code 3"):
        carry_out(tmp_path / "s", plan(), workers)
    assert len(workers.asked) == 1


def test_a_budget_ends_a_study_that_the_same_command_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("cifarlab.ablate.time.monotonic", lambda: clock[0])

    def outcome(rate: float, seed: int) -> float:
        clock[0] += 10
        return accuracy(rate, seed)

    study, _ = carry_out(tmp_path / "s", plan(), Pretended(outcome), budget=35)
    assert [run.status for run in study.runs] == ["finished"] * 4 + ["waiting"] * 2
    assert study.status == "stopped" and study.test is None
    assert carry_out(tmp_path / "s", plan(), Pretended(outcome), budget=100)[0].status == "finished"


def test_two_processes_do_not_carry_out_one_study(tmp_path: Path) -> None:
    folder, _ = open_or_create(tmp_path / "s", plan())
    with folder.locked(), pytest.raises(RunError, match="another process is at work"), folder.locked():
        pass


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5m", 90)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "0s", "10 parsecs", "2h;", "999999999h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_time(text, "--budget")


def test_names_and_places_are_checked() -> None:
    assert check_name("ex1-lr") == "ex1-lr"
    for name in ("../x", "", ".hidden", "a/b", "x" * 101, "end."):
        with pytest.raises(UsageError, match="--name"):
            check_name(name)
    assert parse_workers("local") == ("local", "1")
    assert parse_workers("local:4") == ("local", "4")
    assert parse_workers("ray") == ("ray", "")
    assert parse_workers("ray://host:10001") == ("ray", "host:10001")
    for where in ("local:0", "local:x", "cloud", "ray:host", "ray://"):
        with pytest.raises(UsageError, match="--on"):
            parse_workers(where)


# --- search -----------------------------------------------------------------------------------------


def search(place: Path, workers: Any, trials: int, *, pruning: Any = "none", **conduct: Any) -> tuple[Study, list[str]]:
    from cifarlab.search import Search

    factors = [parse_factor("optimizer.lr=1e-4..1e-1", ranges=True), parse_factor("augment.flip=random,null")]
    plan = plan_study(
        "s", load_recipe("ex1"), factors, "search", dataset="digits", seeds=[0], resolve=0.002, command=[]
    )  # fmt: skip
    folder, there = open_or_create(place, plan)
    plan = merged(folder.read(), plan) if there else plan
    folder.write(plan)
    said: list[str] = []
    conductor = Search(folder, plan, workers, Conduct(**conduct), said.append, trials=trials, pruning=pruning)
    return conductor.carry_out(), said


def peak(rate: float, seed: int) -> float:
    """Best at a rate of 0.01: half a point less for each factor of 10 away from it, squared."""
    return round(0.9 - 0.1 * (math.log10(rate) + 2) ** 2, 4)


def test_a_search_draws_from_ranges_and_values_and_finds_the_best(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    study, _ = search(tmp_path / "s", Pretended(peak), 25)
    tried = study.arms[1:]
    assert len(tried) == 25 and study.status == "finished"
    rates = [arm.changes["optimizer.lr"] for arm in tried]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert {arm.changes["augment.flip"] for arm in tried} == {"random", None}
    # Log-uniform at first: as many below the middle of the logarithms as above; then near the best.
    assert 2 <= sum(rate < 10**-2.5 for rate in rates[:10]) <= 8
    assert min(abs(math.log10(rate) + 2) for rate in rates) < 0.1
    best = max(study.results, key=lambda result: result.mean or 0)
    assert study.test is not None and {look.arm for look in study.test.looks} == {best.arm, "00-baseline"}


def test_a_search_goes_on_with_what_it_knows_and_with_more_trials(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    stopped = threading.Event()
    count = 0

    def outcome(rate: float, seed: int) -> float | str:
        nonlocal count
        count += 1
        if count == 6:
            stopped.set()
            return "stopped"
        return peak(rate, seed)

    study, _ = search(tmp_path / "s", Pretended(outcome), 8, stopped=stopped)
    assert study.status == "stopped" and len(study.arms) == 6
    workers = Pretended(peak)
    study, _ = search(tmp_path / "s", workers, 8)
    assert workers.asked[0].startswith("resume") and len(study.arms) == 9
    before = study.runs
    study, _ = search(tmp_path / "s", Pretended(peak), 12)
    assert len(study.arms) == 13 and study.runs[:9] == before
    assert len({arm.name for arm in study.arms}) == 13  # none is tried twice
    # What it was told of earlier trials counts: it looks where they were good. By chance it would be 0.75 away.
    study, _ = search(tmp_path / "s", Pretended(peak), 24)
    away = [abs(math.log10(arm.changes["optimizer.lr"]) + 2) for arm in study.arms[13:]]
    assert statistics.fmean(away) < 0.5


def test_a_trial_that_fails_does_not_end_a_search_and_is_tried_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    count = 0

    def outcome(rate: float, seed: int) -> float | str:
        nonlocal count
        count += 1
        return "failed:out of memory" if count == 3 else peak(rate, seed)

    study, _ = search(tmp_path / "s", Pretended(outcome), 5)
    assert [run.status for run in study.runs] == ["finished", "finished", "failed", "finished", "finished", "finished"]
    assert study.status == "stopped"
    workers = Pretended(peak)
    study, _ = search(tmp_path / "s", workers, 5)
    assert study.status == "finished" and len(study.arms) == 6
    assert [asked[:4] for asked in workers.asked] == ["resu", "test", "test"]


def test_a_run_with_little_hope_is_given_up_and_counts_as_pruned(tmp_path: Path) -> None:
    pytest.importorskip("optuna")

    class Slow(Pretended):
        """Each run shows three epochs before it ends, unless it is stopped."""

        def run(self, task: Task, stop: Callable[[], bool]) -> int:
            code = super().run(task, stop)
            if task.arguments[0] != "run":
                return code
            folder = next(iter(task.place.rglob("train.json"))).parent
            whole = RunFolder(folder).train_log()
            for epochs in (1, 2, 3):
                entries = [{**whole["epochs"][0], "epoch": number + 1} for number in range(epochs)]
                RunFolder(folder).write_train_log({**whole, "status": "running", "epochs": entries})
                if stop():
                    RunFolder(folder).write_train_log({**whole, "status": "stopped", "epochs": entries})
                    return 143
            RunFolder(folder).write_train_log(whole)
            return 0

    study, said = search(tmp_path / "s", Slow(peak), 20, pruning="median")
    status = {run.arm: run.status for run in study.runs}
    pruned = [arm for arm in study.arms if status[arm.id] == "pruned"]
    assert 3 <= len(pruned) <= 15 and study.status == "finished"
    assert any(": pruned" in line for line in said)
    kept = [peak(arm.changes["optimizer.lr"], 0) for arm in study.arms[1:] if status[arm.id] == "finished"]
    given_up = [peak(arm.changes["optimizer.lr"], 0) for arm in pruned]
    assert max(given_up) < max(kept)
    assert statistics.median(given_up) < statistics.median(kept)
    assert study.results[study.arms.index(pruned[0])].n == 0
    again = Slow(peak)
    assert search(tmp_path / "s", again, 20, pruning="median")[0].runs == study.runs
    assert again.asked == []


def test_ends_of_ranges_are_checked_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="label_smoothing"):
        plan_study(
            "s", load_recipe("ex1"), [parse_factor("loss.label_smoothing=0.1..2", ranges=True)], "search",
            dataset="digits", seeds=[0], resolve=0.002, command=[],
        )  # fmt: skip
    whole = parse_factor("train.batch_size=32..512", ranges=True)
    assert isinstance(whole.low, int)
    assert isinstance(parse_factor("train.batch_size=32.0..512", ranges=True).low, float)


# --- processes --------------------------------------------------------------------------------------


def test_workers_have_cores_of_their_own_and_end_what_is_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, sys, time; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], flush=True)\n"
    )
    monkeypatch.setattr("cifarlab.workers.command_of", lambda task: [sys.executable, "-c", *task.arguments])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workers = LocalWorkers(2)
    cores = sorted(os.sched_getaffinity(0))
    codes = {}

    def work(name: str, ending: str) -> None:
        place = tmp_path / name
        place.mkdir()
        began = time.monotonic()
        # The first ends when it has seen the other's output, so that both run at once.
        codes[name] = workers.run(Task(name, (program + ending,), place), lambda: time.monotonic() > began + 1)

    wait = f"\nwhile not os.path.exists({str(tmp_path / 'b' / 'output.txt')!r}): time.sleep(0.01)\nsys.exit(3)"
    threads = [
        threading.Thread(target=work, args=("a", wait)),
        threading.Thread(target=work, args=("b", "time.sleep(60)")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {"a": 3, "b": -signal.SIGTERM}
    said = [(tmp_path / name / "output.txt").read_text().strip() for name in ("a", "b")]
    shares = [cores[slot % len(cores) :: 2] for slot in range(2)]
    assert sorted(said) == sorted(f"{share} {len(share)}" for share in shares)


def test_a_study_by_the_command_line_is_paired_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """Real runs: the same seed has the same split, order and first weights; Ctrl-C leaves what was done."""
    command = [sys.executable, "-m", "cifarlab", "ablate", "ex1", "--dataset", "digits", "--seeds", "1", "--name", "s"]
    command += ["--vary", "optimizer.weight_decay=0,0.5", "--set", "train.epochs=1", "--set", "data.limit=200"]
    command += ["--device", "cpu"]
    lines = []
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("[1/3]"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, lines
    assert "runs are left; the same command goes on with them" in "".join(lines)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    study = StudyFolder(tmp_path / "studies" / "s").read()
    assert study.status == "finished" and [run.status for run in study.runs] == ["finished"] * 3
    folders = [RunFolder(tmp_path / "studies" / "s" / str(run.folder)) for run in study.runs]
    records = [folder.environment()["data"] for folder in folders]
    assert records[0]["index_hashes"] == records[1]["index_hashes"]
    assert study.runs[0].losses != study.runs[1].losses
    looked = [folder for folder in folders if folder.test_log() is not None]
    assert study.test is not None and len(looked) == len(study.test.looks)
    assert "within noise" not in done.stdout and "one pair: no telling" in done.stdout
    assert json.loads((tmp_path / "studies" / "s" / "study.json").read_text())["command"].startswith("cifarlab ablate")
