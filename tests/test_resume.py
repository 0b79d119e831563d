"""Going on with a run that was stopped or killed: the same bits as without, nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarlab import experiment, numerics, train, training_step
from cifarlab.data.dataset import Dataset
from cifarlab.errors import DivergedError, NotARunError, RunError, StorageError
from cifarlab.rundir import RunFolder, find_run_of, serialized
from cifarlab.train import Progress, StopRequest
from cifarlab.training_step import TrainingStep
from command import call
from short_runs import CPU, Quiet, make_dataset, recipe, run, without_times
from watched_steps import SETTINGS

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS_PER_EPOCH = 6  # 3 epochs of 360 images
FAMILIES = SETTINGS | {
    "ex2 with schedule": [
        "model.name=ex2",
        "augment={crop_padding: 4, flip: random}",
        "schedule={name: cosine, warmup: {epochs: 1}}",
    ],
    "plateau": ["schedule={name: plateau, factor: 0.5, patience: 0, threshold: 0.5}"],
    "pruned": ["train={prune: {share: 0.5}, batch_size: 64, epochs: 3}", "optimizer={name: adamw, lr: 1e-2}"],
    "no validation": ["data.validation=0", "evaluate.tta=flip", "train={ema: 0.9, batch_size: 64, epochs: 2.5}"],
    "lite0": [
        "model={name: efficientnet_lite0, pretrained: false}",
        "train={ema: 0.9, batch_size: 64, epochs: 2.5}",
        "loss.mixup=0.2",
        "optimizer={name: lion, lr: 1e-4}",
        "data.limit=200",
    ],
    "stops early": ["train={early_stopping: 1, batch_size: 64, epochs: 3}", "optimizer.lr=1e-6"],
}
PLAIN = ["optimizer.lr=1e-3", "evaluate.tta=flip"]
EXACT = ["train.numerics=exact", "train.batch_size=64"]


def a_dataset() -> Dataset:
    return make_dataset(noise=0.3, train=400)


def stop_after(step: int) -> tuple[Quiet, StopRequest]:
    stop = StopRequest()

    def look(progress: Progress) -> None:
        if progress.step == step:
            stop.signal = 2

    return Quiet(look), stop


def resume(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, *, dataset: Dataset | None = None, stop_at: int = -1
) -> list[str]:
    """Go on; what was said."""
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: dataset or a_dataset())
    display, stop = stop_after(stop_at)
    experiment.resume_experiment(
        folder.path,
        data_folder=None,
        device=CPU,
        display=display,
        stop=stop,
        process_started=0.0,
        report=display.report,
    )
    return display.said


def result(folder: RunFolder) -> dict[str, Any]:
    """What a run leaves, but for times: weights, logs, predictions."""
    import numpy as np

    arrays: dict[str, bytes] = {}
    for name in ("predictions.npz", "validation_predictions.npz", "examples.npz"):
        if (folder.path / name).exists():
            with np.load(folder.path / name) as found:
                arrays |= {f"{name} {key}": found[key].tobytes() for key in found.files}
    test = folder.test_log()
    assert test is not None
    best = folder.load_checkpoint("best.pth")
    times = {"test_time", "cost"}
    test["tta"] = {key: value for key, value in (test["tta"] or {}).items() if key not in times}
    log = without_times(folder.train_log())
    if log["tta"]:
        log["tta"] = {key: value for key, value in log["tta"].items() if "time" not in key and key != "cost"}
    return {
        "train": log | {"flops": folder.train_log()["flops"]},
        "test": without_times(test),
        "step": best["step"],
        "weights": {name: value.numpy().tobytes() for name, value in best["model"].items()},
        **arrays,
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of a family's run that never stopped."""
    found: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in found:
            with pytest.MonkeyPatch.context() as patch:
                place = tmp_path_factory.mktemp("straight")
                found[family] = result(
                    run(place, *PLAIN, *FAMILIES[family], *EXACT, dataset=a_dataset(), monkeypatch=patch)
                )
        return found[family]

    return of


def begin(tmp_path: Path, family: str, step: int, monkeypatch: pytest.MonkeyPatch, *more: str) -> RunFolder:
    display, stop = stop_after(step)
    settings = [*PLAIN, *FAMILIES[family], *EXACT, *more]
    return run(tmp_path, *settings, display=display, stop=stop, dataset=a_dataset(), monkeypatch=monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Callable[[str], dict[str, Any]]
) -> None:
    """Stopped after the first step, at the end of an epoch, in the middle of one, and shortly before the end."""
    folder, *stops = begin(tmp_path, family, 1, monkeypatch), STEPS_PER_EPOCH, 9, 14, -1
    for step, stop_at in zip((1, *stops), stops, strict=False):
        assert folder.status == "stopped" and folder.test_log() is None
        said = resume(folder, monkeypatch, stop_at=stop_at)
        assert f"going on from step {step}, bit for bit as if it had never stopped" in said
        if folder.status == "finished":
            break
    assert result(folder) == straight(family)


def test_the_families_differ_and_end_as_is_meant(straight: Callable[[str], dict[str, Any]]) -> None:
    assert straight("stops early")["train"]["stopped_early"]
    lrs = [entry["lr"] for entry in straight("plateau")["train"]["epochs"]]
    assert len(set(lrs)) > 1
    assert len({str(straight(family)["weights"]) for family in FAMILIES}) == len(FAMILIES)


# --- what is found ------------------------------------------------------------------------------

EVERY = ["train.checkpoint_every={steps: 4}", "train.keep=2"]


class Killed(BaseException):
    """Nothing of the process's own runs any more, as far as can be had in one process."""


def run_until_killed(place: Path, step: int, *more: str) -> RunFolder:
    """A run that leaves what a SIGKILL after that step leaves: it still says that it is running."""

    def look(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "mark", lambda *_: None)
        with pytest.raises(Killed):
            run(place, *PLAIN, *EXACT, *more, display=Quiet(look), dataset=a_dataset(), monkeypatch=patch)
    (log,) = place.rglob("train.json")
    return RunFolder(log.parent)


@pytest.fixture(scope="module")
def killed_before(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], RunFolder]:
    return {}


@pytest.fixture
def killed(
    killed_before: dict[tuple[object, ...], RunFolder], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Callable[..., RunFolder]:
    """`run_until_killed`, which is done once: each test has a copy of what it left."""

    def copy(step: int, *more: str) -> RunFolder:
        if (step, *more) not in killed_before:
            killed_before[step, *more] = run_until_killed(tmp_path_factory.mktemp("killed"), step, *more)
        return RunFolder(Path(shutil.copytree(killed_before[step, *more].path, tmp_path / "killed" / "run")))

    return copy


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The recipe that the tests below kill, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("plain"), *PLAIN, *EXACT, dataset=a_dataset(), monkeypatch=patch)


@pytest.fixture(scope="module")
def plain(plain_run: RunFolder) -> dict[str, Any]:
    return result(plain_run)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    assert folder.status == "running"
    assert [path.name for path in folder.checkpoints()] == ["step-8.pth", "step-12.pth"]
    # The log says more than the checkpoint knows: two epochs are over either way.
    assert "going on from step 12, bit for bit as if it had never stopped" in resume(folder, monkeypatch)
    assert result(folder) == plain
    assert [path.name for path in folder.checkpoints()] == ["step-12.pth", "step-16.pth"]


def test_what_came_after_the_checkpoint_is_taken_back(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    """Epochs 1 and 2 are in the log, and best.pth may be of the second; the checkpoint is of the first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = killed(14, "train.checkpoint_every={steps: 4}", "train.keep=9")
    for name in ("step-8.pth", "step-12.pth"):
        (folder.path / name).unlink()
    assert len(folder.train_log()["epochs"]) == 2
    resume(folder, monkeypatch)
    assert result(folder) == plain
    events = EventAccumulator(str(folder.path))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/train")]
    epochs = folder.train_log()["epochs"]
    assert [step for step, _ in losses] == [6, 12, 18]
    assert [value for _, value in losses] == pytest.approx([entry["train_loss"] for entry in epochs])
    assert len(list(folder.path.glob("events.out.tfevents.*"))) == 1


def test_a_run_without_a_checkpoint_begins_again_in_its_folder(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(8)
    (folder.path / ".best.pth.0123456789abcdef.tmp").write_bytes(b"half of a checkpoint")
    assert f"{folder.path} has no checkpoint yet: it begins again" in resume(folder, monkeypatch)
    assert result(folder) == plain
    assert not list(folder.path.glob(".*.tmp"))
    assert [entry["from_step"] for entry in folder.environment()["resumed"]] == [0]


@pytest.mark.parametrize("record", ["train.json", "environment.json"])
def test_a_run_goes_on_without_the_records_that_a_kill_can_lose(
    record: str, killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    if record == "train.json":
        (folder.path / record).write_bytes(b"")
    else:
        (folder.path / record).unlink()
    resume(folder, monkeypatch)
    assert result(folder) == plain


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "a bit":
        data[len(data) // 2] ^= 1
    elif how == "cut":
        del data[-1000:]
    elif how == "empty":
        data.clear()
    elif how == "seal":
        data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["a bit", "cut", "empty", "seal"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_used(
    how: str, killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    newest = folder.path / "step-12.pth"
    damage(newest, how)
    said = resume(folder, monkeypatch)
    assert any(str(newest) in line and "damaged" in line and "step-12.pth.damaged" in line for line in said)
    assert "going on from step 8, bit for bit as if it had never stopped" in said
    assert (folder.path / "step-12.pth.damaged").exists()
    assert result(folder) == plain


def test_a_whole_file_that_is_no_checkpoint_to_go_on_from_is_set_aside(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    best = folder.load_checkpoint("best.pth")
    folder.save_checkpoint("step-99.pth", serialized(best | {"step": 99}))
    (line,) = [line for line in resume(folder, monkeypatch) if "step-99" in line]
    assert "no checkpoint to go on from: it has no" in line and "optimizer" in line
    assert result(folder) == plain


def test_a_best_checkpoint_that_is_damaged_is_replaced(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    every = ["train.checkpoint_every={epochs: 1}"]
    folder = killed(8, *every)
    damage(folder.path / "best.pth", "a bit")
    assert any("the checkpoint's weights, which are the best, take its place" in s for s in resume(folder, monkeypatch))
    assert result(folder) == plain


def test_a_run_that_is_done_is_left_alone_and_one_that_was_not_scored_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_run: RunFolder, plain: dict[str, Any]
) -> None:
    folder = RunFolder(Path(shutil.copytree(plain_run.path, tmp_path / "run")))
    before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    assert resume(folder, monkeypatch) == [f"{folder.path} is finished: there is nothing to go on with"]
    assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    for name in ("test.json", "loss.png", "predictions.npz"):
        (folder.path / name).unlink()
    monkeypatch.setattr(experiment, "train", None)  # that is over
    assert f"{folder.path} is trained: what comes after that is done now" in resume(folder, monkeypatch)
    assert result(folder) == plain
    (folder.path / "accuracy.png").unlink()
    monkeypatch.setattr(experiment, "_score", None)  # so is that
    resume(folder, monkeypatch)
    assert (folder.path / "accuracy.png").exists()
    assert (folder.path / "loss.png").exists()


def test_a_checkpoint_that_can_not_be_read_now_is_not_given_up(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "step-12.pth":
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(NotARunError, match=r"cannot read .*step-12\.pth: Permission denied; put that right"):
            resume(folder, patch)
    assert not list(folder.path.glob("*.damaged"))
    resume(folder, monkeypatch)
    assert result(folder) == plain


def test_where_no_checkpoint_is_whole_the_user_decides(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    for path in folder.checkpoints():
        damage(path, "a bit")
    with pytest.raises(NotARunError, match=r"no checkpoint of .* is whole; they are set aside; go on once more"):
        resume(folder, monkeypatch)
    assert len(folder.train_log()["epochs"]) == 2
    resume(folder, monkeypatch)
    assert result(folder) == plain


def test_whatever_a_checkpoint_lacks_or_has_wrong_it_is_set_aside(killed: Callable[..., RunFolder]) -> None:
    folder = killed(13, *EVERY)
    whole = folder.load_checkpoint("step-12.pth")
    for name in whole.keys() - {"cifarlab", "step"}:
        for changed in ({key: value for key, value in whole.items() if key != name}, whole | {name: b"7"}):
            folder.save_checkpoint("step-13.pth", serialized(changed))
            said: list[str] = []
            state = folder.newest_checkpoint(said.append)
            assert state is not None and state["step"] == 12, name
            assert f"it has no {name}; it is set aside as step-13.pth.damaged" in said[0]


def test_a_checkpoint_of_before_a_field_was_there_counts_its_default(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    state = folder.load_checkpoint("step-12.pth")
    del state["recipe"]["train"]["retries"], state["recipe"]["loss"]["mixup"]
    folder.save_checkpoint("step-12.pth", serialized(state))
    resume(folder, monkeypatch)
    assert result(folder) == plain
    state["recipe"]["loss"]["mixup"] = "much"
    folder.save_checkpoint("step-99.pth", serialized(state | {"step": 99}))
    folder.write_train_log({"status": "running"})
    with pytest.raises(NotARunError, match=r"the recipe in a checkpoint of .*: loss\.mixup: "):
        resume(folder, monkeypatch)


@pytest.mark.parametrize("values", ["", "[1]", '{"data": null}', '{"data": {}, "resumed": 7}'])
def test_a_damaged_environment_is_written_anew(
    values: str, killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    folder = killed(13, *EVERY)
    before = folder.environment()
    (folder.path / "environment.json").write_text(values)
    (line,) = [line for line in resume(folder, monkeypatch) if "environment.json is damaged" in line]
    assert line.endswith("; it is written anew")
    assert folder.environment()["data"] == before["data"]
    assert result(folder) == plain


def test_numerics_that_are_not_to_be_had_give_way_more_than_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, stop = stop_after(3)
    settings = [*PLAIN, *EXACT, "train.numerics={dtype: float32, compile: true}"]
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    folder = run(tmp_path, *settings, display=display, stop=stop, dataset=a_dataset(), monkeypatch=monkeypatch)
    monkeypatch.setattr(numerics, "can_compile", lambda _: False)
    for step, stop_at in ((3, 8), (8, -1)):
        said = resume(folder, monkeypatch, stop_at=stop_at)
        assert any("are not to be had here" in line for line in said)
        assert any(line.startswith(f"going on from step {step}; not bit for bit") for line in said) is (step == 3)
    assert folder.status == "finished"


def test_the_best_weights_of_a_way_that_was_given_up_are_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of the first epoch, best.pth of the second, whose steps come again with lower rates."""
    diverging(monkeypatch, 0.0006, step=13)
    monkeypatch.setattr(train, "_is_better", lambda candidate, best: best is None or best["epoch"] < 3)
    settings = [*PLAIN, *EXACT, "train.checkpoint_every={steps: 8}", "train.retries=1"]
    folder = run(tmp_path, *settings, dataset=a_dataset(), monkeypatch=monkeypatch)
    log = folder.train_log()
    assert [setback["from_step"] for setback in log["setbacks"]] == [8]
    entry = log["epochs"][log["best_epoch"] - 1]
    assert log["best_val_accuracy"] in (entry["val_accuracy"], entry["ema_val_accuracy"])
    assert folder.load_checkpoint("best.pth")["val_accuracy"] == log["best_val_accuracy"]


# --- runs that diverge --------------------------------------------------------------------------


def diverging(monkeypatch: pytest.MonkeyPatch, rate: float, step: int = 9) -> None:
    """The loss of that step, from 0 on, is NaN for as long as the learning rate is that high."""
    bad = step
    gradients = TrainingStep.set_gradients

    def spoiled(self: TrainingStep, batch: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = gradients(self, batch, step)
        return loss * (torch.nan if step == bad and self.optimizer.param_groups[0]["lr"] > rate else 1), logits

    monkeypatch.setattr(TrainingStep, "set_gradients", spoiled)


def test_a_loss_that_is_no_number_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, Any]] = []
    apply = training_step.apply_gradients

    def applied(recipe: Any, model: torch.nn.Module, *rest: Any) -> None:
        apply(recipe, model, *rest)
        steps.append({name: value.clone() for name, value in model.named_parameters()})

    monkeypatch.setattr(training_step, "apply_gradients", applied)
    diverging(monkeypatch, 0)
    with pytest.raises(DivergedError, match="step 10"):
        run(tmp_path, *PLAIN, *EXACT, dataset=a_dataset(), monkeypatch=monkeypatch)
    assert len(steps) == 9


def test_a_run_that_diverges_goes_back_and_on_with_lower_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, 0.0003)  # the recipe's is 0.001: two halves are needed
    settings = [*PLAIN, *EXACT, *EVERY, "train.retries=3"]
    folder = run(tmp_path / "whole", *settings, dataset=a_dataset(), monkeypatch=monkeypatch)
    log = folder.train_log()
    assert [setback["from_step"] for setback in log["setbacks"]] == [8, 8]
    assert all("NaN or infinite at step 10" in setback["reason"] for setback in log["setbacks"])
    assert [entry["lr"] for entry in log["epochs"]] == pytest.approx([0.001, 0.00025, 0.00025])
    assert log["status"] == "finished" and folder.test_log() is not None
    # A run that is stopped after its setbacks, and goes on, remembers them.
    display, stop = stop_after(14)
    again = run(tmp_path / "again", *settings, dataset=a_dataset(), display=display, stop=stop, monkeypatch=monkeypatch)
    assert again.status == "stopped"
    resume(again, monkeypatch)
    assert without_places(result(again)) == without_places(result(folder))

    with pytest.raises(DivergedError, match="step 10"):
        run(tmp_path / "one", *settings, "train.retries=1", dataset=a_dataset(), monkeypatch=monkeypatch)
    (failed,) = (tmp_path / "one").rglob("train.json")
    assert len(json.loads(failed.read_text())["setbacks"]) == 1


def without_places(found: dict[str, Any]) -> dict[str, Any]:
    for setback in found["train"]["setbacks"]:
        setback["reason"] = setback["reason"].partition(" of ")[0]
    return found


# --- what is refused ----------------------------------------------------------------------------


def refusal(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, dataset: Dataset | None = None) -> str:
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(NotARunError) as refused:
        resume(folder, monkeypatch, dataset=dataset)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    return str(refused.value)


def test_a_changed_recipe_is_refused_with_the_difference(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(13, *EVERY)
    recipe_file = folder.path / "recipe.yaml"
    text = recipe_file.read_text()
    assert "lr: 0.001" in text
    recipe_file.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    assert "the recipe of" in (said := refusal(folder, monkeypatch)) and "optimizer.lr was 0.001, is 0.002" in said
    recipe_file.write_text("")
    assert "recipe.yaml" in refusal(folder, monkeypatch)


def test_changed_images_classes_or_labels_are_refused(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(13, *EVERY)
    other = a_dataset()
    other.train.pixels[0, 0, 0, 0] ^= 1
    assert "content_hash was" in refusal(folder, monkeypatch, other)
    whole = a_dataset()
    renamed = Dataset(whole.name, tuple("abce"), whole.train, None, whole.test, whole.source)
    assert "classes was ['a', 'b', 'c', 'd']" in refusal(folder, monkeypatch, renamed)


def test_a_change_before_the_first_checkpoint_is_refused_too(
    killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(8)
    other = a_dataset()
    other.train.labels[0] = (other.train.labels[0] + 1) % 4
    assert "content_hash was" in refusal(folder, monkeypatch, other)


def test_a_changed_machine_is_a_warning(killed: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed(13, *EVERY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    (line,) = [line for line in resume(folder, monkeypatch) if line.startswith("going on")]
    assert line.startswith("going on from step 12; not bit for bit as if it had never stopped: threads was ")
    assert line.endswith("is 99") and folder.status == "finished"


def test_a_second_process_is_refused_and_the_first_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def look(progress: Progress) -> None:
        if progress.step == 2:
            (log,) = tmp_path.rglob("train.json")
            with pytest.raises(RunError) as error:
                experiment.resume_experiment(
                    log.parent, data_folder=None, device=CPU, display=Quiet(), stop=StopRequest(), process_started=0.0,
                    report=lambda _: None,
                )  # fmt: skip
            refused.append(str(error.value))

    folder = run(tmp_path, display=Quiet(look), dataset=a_dataset(), monkeypatch=monkeypatch)
    process = folder.environment()["process"]
    assert refused == [
        f"process {process['pid']} on {process['host']}, begun {process['began']}, is at work in {folder.path} (it "
        "holds .lock there); wait until it is done, or stop it"
    ]
    assert folder.status == "finished"


def test_a_run_folder_that_is_removed_midway_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(progress: Progress) -> None:
        if progress.step == 3:
            shutil.rmtree(tmp_path)

    with pytest.raises(StorageError, match=r"cannot write .*: the folder is gone; was it moved or removed\?"):
        run(tmp_path, *EVERY, display=Quiet(look), dataset=a_dataset(), monkeypatch=monkeypatch)


def test_a_clock_that_is_set_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    now = iter(range(2_000_000_000, 0, -5000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    folder = run_until_killed(tmp_path, 13, *EVERY)
    newest = folder.path / "step-12.pth"
    os.utime(newest, (1000, 1000))
    assert "going on from step 12, bit for bit as if it had never stopped" in resume(folder, monkeypatch)
    assert result(folder) == plain
    assert folder.train_log()["wall_time"] >= folder.train_log()["train_time"] > 0


# --- which run is meant -------------------------------------------------------------------------


def test_the_run_to_go_on_with_is_that_of_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*overrides: str) -> RunFolder | None:
        return find_run_of(tmp_path, recipe(*overrides))

    auto = ["train.numerics=auto", "train.batch_size=auto", "evaluate.batch_size=auto"]
    assert find(*auto) is None
    done = run(tmp_path, *auto, "train.epochs=1", dataset=a_dataset(), monkeypatch=monkeypatch)
    assert done.recipe().train.batch_size != "auto"
    assert find(*auto, "train.epochs=1") == done
    assert find(*auto) is None and find(*auto, "train.epochs=1", "optimizer.lr=0.5") is None
    display, stop = stop_after(2)
    begun = run(
        tmp_path, *auto, "train.epochs=1", display=display, stop=stop, dataset=a_dataset(), monkeypatch=monkeypatch
    )
    again = run(tmp_path, *auto, "train.epochs=1", dataset=a_dataset(), monkeypatch=monkeypatch)
    assert again.done and begun.status == "stopped"
    assert find(*auto, "train.epochs=1") == begun  # though another is newer
    assert json.loads((begun.path / "train.json").read_text())["epochs"] == []


# --- the commands -------------------------------------------------------------------------------


def test_a_machine_shows_that_it_resumes_exactly_or_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ["--dataset", "digits", "--set", "train.numerics=exact"]
    frozen = ["--set", "model.freeze_stages=2", "--set", "data.limit=100"]
    code, out, err = call(capsys, monkeypatch, "verify-resume", "ex1", *exact, *frozen)
    assert (code, err) == (0, "") and "equal, bit for bit" in out
    command = ["verify-resume", "fast90", *exact, "--set", "model.widths=[16, 16, 16]"]
    code, out, err = call(capsys, monkeypatch, *command)
    assert (code, err) == (0, "")
    assert "interrupted after step 1, 4 and 6" in out
    assert "equal, bit for bit: " in out.splitlines()[-1] and " tensors of weights and optimizer" in out

    restore = train._restore

    def forgetful(saved: dict[str, Any], *rest: Any) -> None:
        for state in saved["optimizer"]["state"].values():
            state["momentum_buffer"].zero_()
        restore(saved, *rest)

    monkeypatch.setattr(train, "_restore", forgetful)
    code, out, err = call(capsys, monkeypatch, *command)
    assert code == 4 and err.startswith("cifarlab: not equal: model.") and "differs by up to" in err


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a POSIX signal")
def test_a_process_that_was_killed_is_gone_on_with_by_the_same_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def command(runs: Path) -> list[str]:
        every = ["--set", "train.checkpoint_every.steps=2", "--set", "train.epochs=2", "--set", "data.limit=300"]
        return ["run", "ex1", "--dataset", "digits", "--runs", str(runs), "--resume", *every]

    process = subprocess.Popen([sys.executable, "-m", "cifarlab", *command(tmp_path / "killed")])
    for _ in range(1200):
        if list((tmp_path / "killed").rglob("step-*.pth")):
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    (folder,) = [RunFolder(log.parent) for log in (tmp_path / "killed").rglob("train.json")]
    assert folder.status == "running"
    code, out, err = call(capsys, monkeypatch, *command(tmp_path / "killed"))
    assert (code, err) == (0, "") and "bit for bit as if it had never stopped" in out
    call(capsys, monkeypatch, *command(tmp_path / "whole"))
    (whole,) = [RunFolder(log.parent) for log in (tmp_path / "whole").rglob("train.json")]
    assert result(folder) == result(whole)
    for again in (command(tmp_path / "killed"), ["resume", str(folder.path)]):
        code, out, err = call(capsys, monkeypatch, *again)
        assert code == 0 and "is finished: there is nothing to go on with" in out
    assert len(list((tmp_path / "killed").rglob("train.json"))) == 1
    code, _, err = call(capsys, monkeypatch, "resume", tmp_path)
    assert code == 4 and "is not a run folder" in err


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_leaves_a_whole_checkpoint(
    number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second comes in the middle of the step that the first lets finish."""
    gradients, sent = TrainingStep.set_gradients, list[int]()

    def disturbed(self: TrainingStep, batch: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step >= 5 and not sent:
            for _ in range(2):
                sent.append(step)
                os.kill(os.getpid(), number)
        return gradients(self, batch, step)

    monkeypatch.setattr(TrainingStep, "set_gradients", disturbed)
    small = ["--set", "data.limit=1000", "--set", "train.checkpoint_every.steps=2", "--set", "train.epochs=1"]
    code_of, _, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", "digits", "--runs", tmp_path, *small)
    assert code_of == code and "once more to leave at once" in err and len(sent) == 2
    (folder,) = [RunFolder(log.parent) for log in tmp_path.rglob("train.json")]
    assert folder.status == "stopped"
    assert [path.name for path in folder.checkpoints()] == ["step-2.pth", "step-4.pth"]
    assert folder.load_checkpoint("step-4.pth")["step"] == 4
    monkeypatch.setattr(TrainingStep, "set_gradients", gradients)
    code_of, out, _ = call(capsys, monkeypatch, "resume", folder.path)
    assert code_of == 0 and "going on from step 4, bit for bit" in out


@pytest.mark.parametrize("name", ["two words", "-dash", 'it\'s "so"', "наука 数据", "line\nbreak", "$HOME;ls", "*"])
def test_a_run_is_gone_on_with_wherever_it_is_by_the_command_that_was_said(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "train.epochs=1", "--set", "data.limit=300", "--set", "model={name: racing, widths: [8, 8, 8]}"]
    sums, killed = train.EpochSums.add, list[int]()

    def add(self: train.EpochSums, step: int, *rest: Any) -> None:
        sums(self, step, *rest)
        if not killed:
            killed.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.EpochSums, "add", add)
    code, _, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", "digits", f"--runs={name}", *small)
    assert code == 143 and len(err.splitlines()) == 3
    said = err.splitlines()[-1].partition("go on with: ")[2]
    if "\n" in name:  # that is shown as one line, and not to be pasted
        assert "?" in said
        return
    arguments = shlex.split(said)
    assert arguments[:2] == ["cifarlab", "resume"]
    code, out, err = call(capsys, monkeypatch, *arguments[1:])
    assert (code, err) == (0, "") and "bit for bit" in out
    assert not (tmp_path / "runs").exists()
    (folder,) = Path(name).rglob("test.json")
    assert folder.is_relative_to(name)
