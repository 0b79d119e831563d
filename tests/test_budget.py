"""Runs that may take so long and no longer: on a clock that simulated steps and evaluations move on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarlab import budget as budgets
from cifarlab import experiment, fit, numerics, plots, train
from cifarlab.budget import Budget, finishing_here, fit_to_be_timed, remember_finishing, tolerance
from cifarlab.errors import RunError, UsageError
from cifarlab.evaluate import predict, views_of
from cifarlab.recipe import load_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import StopRequest
from cifarlab.training_step import TrainingStep
from short_runs import CPU, Quiet, make_dataset, recipe, without_pictures


@dataclasses.dataclass
class Machine:
    """A machine on which a step, an image in evaluation, and the end of a run take so many seconds."""

    step: float = 1.0
    look: float = 0.001
    end: float = 3.0
    start: float = 4.0
    # From this time on steps take so many times as long.
    slower_from: float = float("inf")
    slower: float = 1.0
    time: float = 0.0
    # Views of images that were evaluated since the last step.
    looks: int = 0
    given: Budget | None = None

    def now(self) -> float:
        return self.time

    def take_step(self) -> None:
        self.looks = 0
        self.time += self.step * (self.slower if self.time >= self.slower_from else 1.0)

    def timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have everything that a run does take its time on this clock, and no other."""
        take_step = TrainingStep.__call__

        def slow_step(self_: Any, *arguments: Any) -> Any:
            self.take_step()
            return take_step(self_, *arguments)

        def slow_predict(network: Any, store: Any, samples: torch.Tensor, *rest: Any, **more: Any) -> Any:
            looks = round(len(samples) * (views_of(more.get("tta"), None) or 1))
            self.time += self.look * looks
            self.looks += looks
            return predict(network, store, samples, *rest, **more)

        def measured(*_: Any) -> numerics.Step:
            def run() -> torch.Tensor:
                self.take_step()
                return torch.zeros(())

            return numerics.Step(run, list)

        def end(*_: Any, **__: Any) -> None:
            self.time += self.end

        monkeypatch.setattr(TrainingStep, "__call__", slow_step)
        for module in (train, experiment):
            monkeypatch.setattr(module, "predict", slow_predict)
        monkeypatch.setattr(fit, "measured_step", measured)
        without_pictures(monkeypatch)
        monkeypatch.setattr(plots, "confusion_matrix", end)

    def budget(self, seconds: float | None, *_: Any) -> Budget | None:
        self.given = None if seconds is None else Budget(seconds, 0.0, finishing=self.end, now=self.now)
        return self.given


def run(
    here: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    *overrides: str,
    display: Quiet | None = None,
    stop: StopRequest | None = None,
) -> RunFolder:
    with monkeypatch.context() as patched:
        here.timed(patched)
        patched.setattr(experiment, "_budget", here.budget)
        here.time = here.start
        # 128 training images in 8 batches, 32 validation images
        plan = recipe("train.batch_size=16", "data.validation=0.2", "schedule={name: cosine}", *overrides)
        return experiment.run_experiment(
            plan, make_dataset(train=160), runs=tmp_path, device=CPU,
            display=display or Quiet(), stop=stop or StopRequest(), process_started=0.0, report=lambda _: None,
            budget=seconds,
        )  # fmt: skip


@pytest.mark.parametrize("seconds", [30, 60, 180, 600])
def test_a_run_ends_when_its_budget_does_with_the_rate_at_its_end(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(step=seconds / 50)
    folder = run(here, tmp_path, monkeypatch, seconds)
    assert abs(here.time - seconds) <= tolerance(seconds)
    log = folder.train_log()
    assert log["status"] == "finished" and folder.test_log() is not None
    rates = [entry["lr"] for entry in log["epochs"]]
    assert rates[0] > 0.9e-3 and rates[-1] < 1e-5
    assert log["budget"]["seconds"] == seconds and log["budget"]["spent"] < seconds
    planned = log["budget"]["planned"]
    assert planned["steps"] == pytest.approx(log["budget"]["steps"], rel=0.15)
    assert folder.recipe().train.epochs == pytest.approx(planned["epochs"], abs=1e-4)


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_machine_that_changes_its_speed_midway_keeps_the_budget(
    slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(slower_from=50, slower=slower)
    folder = run(here, tmp_path, monkeypatch, 100)
    assert abs(here.time - 100) <= 3
    log = folder.train_log()
    assert log["epochs"][-1]["lr"] < 1e-5
    assert (log["budget"]["steps"] < log["budget"]["steps_planned"]) == (slower > 1)


def test_evaluation_that_turns_out_slow_keeps_the_budget_and_is_done_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A validation takes 6.4 s, an epoch 8: planned was a forward at 0.4 of a step, which is 0.8 s for 32 images.
    here = Machine(look=0.2)
    folder = run(here, tmp_path, monkeypatch, 120)
    assert abs(here.time - 120) <= 3.6
    epochs = folder.train_log()["epochs"]
    looks = [entry["epoch"] for entry in epochs if entry["val_accuracy"] is not None]
    assert looks[-1] == len(epochs)  # the last is always looked at
    assert 1 < len(looks) <= 3 < len(epochs)
    assert folder.train_log()["best_epoch"] in looks


def test_without_time_for_it_the_gap_is_left_out_and_the_test_set_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine()
    looked = train.validate

    def late(*arguments: Any) -> Any:  # something else holds the machine up once training is over
        if here.time > 50:
            here.time += 5
        return looked(*arguments)

    monkeypatch.setattr(train, "validate", late)
    folder = run(here, tmp_path, monkeypatch, 60)
    assert folder.train_log()["overfitting_gap"] is None and folder.test_log() is not None


def test_a_budget_with_no_time_for_a_step_is_refused_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=r"^8 s are not enough for 'ex1' here: start, evaluation and writing take about"):
        run(Machine(), tmp_path, monkeypatch, 8)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_has_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, stop = Machine(), StopRequest()

    class Stopping(Quiet):
        def epoch(self, entry: dict[str, Any], epochs: float) -> None:
            if entry["epoch"] == 3:
                stop.signal = 15

    folder = run(here, tmp_path, monkeypatch, 100, display=Stopping(), stop=stop)
    stopped_at, log = here.time, folder.train_log()
    assert log["status"] == "stopped" and stopped_at < 40
    said: list[str] = []
    with monkeypatch.context() as patched:
        here.timed(patched)
        patched.setattr(experiment, "_budget", here.budget)
        # The wall time so far is taken off where it goes on; here the clock just was not moved meanwhile.
        experiment.resume_experiment(
            folder.path, data_folder=None, device=CPU, display=Quiet(), stop=StopRequest(), process_started=0.0,
            report=said.append, dataset=make_dataset(train=160),
        )  # fmt: skip
    assert abs(here.time - 100) <= 3
    assert folder.train_log()["status"] == "finished" and folder.train_log()["epochs"][-1]["lr"] < 1e-5
    assert any("of its 100 s are left" in text for text in said)
    rates = [entry["lr"] for entry in folder.train_log()["epochs"]]
    assert rates == sorted(rates, reverse=True)  # on from where it was


def test_epochs_of_warm_up_are_a_tenth_of_a_run_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(Machine(), tmp_path, monkeypatch, 60, "schedule={name: cosine, warmup: {epochs: 5}}")  # of about six
    warmup = folder.recipe().schedule.warmup
    assert warmup is not None and warmup.share == 0.1
    assert folder.train_log()["epochs"][3]["lr"] < 1e-3


def test_what_a_budget_changes_in_a_recipe() -> None:
    plain = load_recipe("ex1", [])
    timed = fit_to_be_timed(plain, [])
    assert (timed.schedule.name, timed.train.numerics) == ("cosine", "auto")
    assert timed.model == plain.model and timed.optimizer == plain.optimizer
    overrides = ["schedule.name=constant", "train.numerics=exact"]
    said = load_recipe("ex1", overrides)
    assert fit_to_be_timed(said, overrides) == said
    racing = load_recipe("fast90", [])
    assert fit_to_be_timed(racing, []).schedule == racing.schedule
    with pytest.raises(UsageError, match=r"train\.epochs and --budget both say"):
        fit_to_be_timed(plain, ["train.epochs=3"])


def test_what_the_end_of_a_run_took_is_remembered() -> None:
    key = {"device": "cpu"}
    assert finishing_here(key) == budgets.FINISHING + budgets.LEAVING
    remember_finishing(key, 9.0)
    assert finishing_here(key) == 9.0 + budgets.LEAVING
    remember_finishing(key, 5.0)
    assert finishing_here(key) == 7.0 + budgets.LEAVING
    assert finishing_here({"device": "cuda"}) == budgets.FINISHING + budgets.LEAVING


def test_a_validation_that_takes_all_the_time_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine(look=0.2)
    watched = train._validate

    def held_up(*arguments: Any) -> Any:
        found = watched(*arguments)
        if arguments[0] is not None and here.time > 60:
            here.time = 110
        return found

    monkeypatch.setattr(train, "_validate", held_up)
    folder = run(here, tmp_path, monkeypatch, 120)
    epochs = folder.train_log()["epochs"]
    assert sum(entry["val_accuracy"] is not None for entry in epochs) == 2 and epochs[-1]["val_accuracy"] is not None
    assert folder.test_log() is not None


@pytest.mark.parametrize(
    "overrides",
    [(), ("train.ema=0.9", "evaluate.tta=flip"), ("evaluate.tta=auto",), ("data.validation=0", "evaluate.test=false")],
)
def test_what_is_evaluated_after_the_last_step_was_foreseen(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine()
    folder = run(here, tmp_path, monkeypatch, 60, *overrides)
    assert here.given is not None
    spared = 0.0
    if overrides == ("evaluate.tta=auto",):  # what it tries on validation is not all used on the test images
        mode, images = folder.train_log()["tta"]["mode"], folder.environment()["data"]["images"]["test"]
        spared = (views_of("auto", None) - views_of(mode, None)) * images
    assert here.looks == here.given.looks_after - spared
