"""The loop and the run folder: against a loop written out by hand, and against itself."""

from __future__ import annotations

import gzip
import io
import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cifarlab import build, experiment, files, machine, plots
from cifarlab.data.batches import epoch_order
from cifarlab.data.dataset import Dataset, Images
from cifarlab.data.prepare import prepare
from cifarlab.data.split import balanced_limit
from cifarlab.errors import DivergedError, NotARunError, RunError, StorageError
from cifarlab.feed import TrainingBatch
from cifarlab.models import build_model
from cifarlab.recipe import load_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import PROFILE_STEPS, EpochSums, Progress, StopRequest
from short_runs import CPU, Quiet, make_dataset, normalised, recipe, run, without_times


@pytest.mark.parametrize(
    ("schedule", "class_weights"), [("constant", "null"), ("cosine", "null"), ("constant", "balanced")]
)
def test_the_loop_equals_one_written_out_by_hand(
    schedule: str, class_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of EX-1 with torch's own Adam, schedule and cross-entropy, a short last batch, and sums by hand."""
    overrides = [
        "train.epochs=2", "train.batch_size=48", "data.validation=0.2", "loss.label_smoothing=0.1",
        f"schedule.name={schedule}", f"loss.class_weights={class_weights}",
    ]  # fmt: skip
    folder = run(tmp_path, *overrides, dataset=make_dataset(noise=0.3), monkeypatch=monkeypatch)
    plan, log, state = folder.recipe(), folder.train_log(), folder.load_checkpoint("best.pth")

    dataset = make_dataset(noise=0.3)
    assert dataset.test is not None
    data = prepare(dataset, plan.data, seed=0)
    assert data.validation is not None
    images, labels = normalised(dataset.train.pixels, data), torch.from_numpy(dataset.train.labels)
    torch.testing.assert_close(images[data.train.index].mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images[data.train.index].std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)

    model = build_model(plan.model, classes=4, size=(32, 32), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)  # two epochs of four batches
    of_class = torch.ones(4)
    if class_weights == "balanced":
        of_class = len(data.train) / (4 * torch.bincount(labels[data.train.index], minlength=4))
    weights = []
    for epoch, entry in enumerate(log["epochs"]):
        model.train()
        total, weight, correct = 0.0, 0.0, 0
        order = epoch_order(torch.from_numpy(data.train.index), 0, epoch)
        batches = torch.split(order, 48)
        assert [len(batch) for batch in batches] == [48, 48, 48, 16]
        for batch in batches:
            logits = model(images[batch])
            loss = F.cross_entropy(logits, labels[batch], weight=of_class, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            total += loss.item() * of_class[labels[batch]].sum().item()
            weight += of_class[labels[batch]].sum().item()
            correct += int((logits.argmax(1) == labels[batch]).sum())
        assert entry["lr"] == pytest.approx(rate, rel=1e-9)
        assert entry["train_loss"] == pytest.approx(total / weight, rel=1e-4)
        assert entry["train_accuracy"] == pytest.approx(correct / len(order), abs=1.5 / len(order))
        model.eval()
        with torch.no_grad():
            held = model(images[data.validation.index])
        assert entry["val_loss"] == pytest.approx(F.cross_entropy(held, labels[data.validation.index]).item(), rel=1e-3)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in state["model"].items():
        if name.startswith("conv") and name.endswith("bias"):
            continue  # BatchNorm takes it away again: its gradient is rounding, which Adam makes as large as any
        expected = weights[log["best_epoch"] - 1][name].double()
        # In the mean, as Adam makes a full step of 1e-3 of a gradient that is nearly 0, whatever its sign.
        assert (value - expected).abs().mean() < 1e-4 + 2e-3 * expected.abs().mean(), name

    # What was scored is the best checkpoint, on the test images as they are.
    model.load_state_dict(state["model"])
    with torch.no_grad():
        logits = model.eval()(normalised(dataset.test.pixels, data))
    saved = np.load(folder.path / "predictions.npz")
    torch.testing.assert_close(torch.from_numpy(saved["logits"]), logits, atol=1e-4, rtol=1e-4)
    assert saved["index"].tolist() == list(range(50))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmented = ["augment={crop_padding: 2, flip: random}", "schedule.name=one_cycle"]
    first, second = (run(tmp_path / name, *augmented, monkeypatch=monkeypatch) for name in ("a", "b"))
    assert without_times(first.train_log()) == without_times(second.train_log())
    assert without_times(first.test_log() or {}) == without_times(second.test_log() or {})
    one, other = (folder.load_checkpoint("best.pth")["model"] for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_resident_run_s_bits(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, validation and test parts are slices of one map on disk, as those of a large image folder are."""
    settings = ["augment={crop_padding: 2, flip: random}", "train.epochs=2"]
    dataset = make_dataset(train=400)
    assert dataset.test is not None
    pixels = np.concatenate([dataset.train.pixels, dataset.test.pixels])
    pixels.tofile(tmp_path / "pixels")
    stored = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=pixels.shape)
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    parts = [Images(stored[a:b], labels[a:b]) for a, b in ((0, 320), (320, 400), (400, 450))]
    mapped = Dataset("digits", dataset.classes, parts[0], parts[1], parts[2], "made here")
    resident = run(tmp_path / "a", *settings, dataset=mapped, monkeypatch=monkeypatch)
    monkeypatch.setattr(machine, "free_memory", lambda _: 20_000)
    workers_setting = f"data.workers={workers}"
    streamed = run(tmp_path / "b", *settings, workers_setting, dataset=mapped, monkeypatch=monkeypatch)
    assert resident.environment()["data"]["resident"] and not streamed.environment()["data"]["resident"]
    assert without_times(resident.train_log()) == without_times(streamed.train_log())
    assert without_times(resident.test_log() or {}) == without_times(streamed.test_log() or {})
    one, other = (folder.load_checkpoint("best.pth")["model"] for folder in (resident, streamed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_running_the_written_recipe_again_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["augment.flip=random", "schedule.name=cosine", "optimizer.lr=0.00123456789"]
    first = run(tmp_path / "a", *settings, monkeypatch=monkeypatch)
    again = load_recipe(str(first.path / "recipe.yaml"))
    assert again == recipe(*settings, "evaluate.batch_size=1024")
    second = experiment.run_experiment(
        again.resolved(dataset=again.datasets[0], seed=again.seed), make_dataset(), runs=tmp_path / "b", device=CPU,
        display=Quiet(), stop=StopRequest(), process_started=0.0, report=lambda _: None,
    )  # fmt: skip
    one, other = (folder.load_checkpoint("best.pth")["model"] for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_checkpoint_is_the_best_epoch_and_the_gap_is_measured_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = make_dataset(noise=0.4)
    folder = run(tmp_path, "train.epochs=12", "data.validation=0.3", dataset=noisy, monkeypatch=monkeypatch)
    log, state = folder.train_log(), folder.load_checkpoint("best.pth")
    order = [(entry["val_accuracy"], -entry["val_loss"]) for entry in log["epochs"]]
    assert log["best_epoch"] == 1 + order.index(max(order)) == state["epoch"]
    assert log["best_val_accuracy"] == max(order)[0]
    validation = np.load(folder.path / "validation_predictions.npz")
    assert (validation["logits"].argmax(1) == validation["labels"]).mean() == pytest.approx(log["best_val_accuracy"])

    # The gap by hand: evaluation mode, no augmentation, a class-balanced sample as large as the validation set.
    plan, dataset = folder.recipe(), make_dataset(noise=0.4)
    data = prepare(dataset, plan.data, seed=0)
    assert data.validation is not None
    sample = balanced_limit(dataset.train.labels, data.train.index, len(data.validation), 0)
    assert len(np.intersect1d(sample, data.validation.index)) == 0
    assert len(sample) == len(data.validation) and np.ptp(np.bincount(dataset.train.labels[sample])) <= 1
    model = build_model(plan.model, classes=4, size=(32, 32), seed=0)
    model.load_state_dict(state["model"])
    model.eval()
    accuracy = (
        model(normalised(dataset.train.pixels[sample], data)).argmax(1).numpy() == dataset.train.labels[sample]
    ).mean()
    assert log["overfitting_gap"] == pytest.approx(accuracy - log["best_val_accuracy"], abs=1e-6)


def test_the_test_set_is_scored_once_on_the_best_checkpoint_and_later_looks_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, monkeypatch=monkeypatch)
    first = folder.test_log()
    assert first is not None and first["test_looks"] == 1
    again = experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None)
    assert again["test_looks"] == 2
    assert without_times(again) | {"test_looks": 1} == without_times(first)
    assert again["total_time"] == first["total_time"]


def test_only_a_finished_run_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "evaluate.test=false", monkeypatch=monkeypatch)
    log = folder.train_log()
    for status in ("running", "stopped", "failed"):
        folder.write_train_log({**log, "status": status})
        with pytest.raises(NotARunError, match=f"is not finished .its status is '{status}'"):
            experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None)
        assert folder.test_log() is None


def test_a_look_counts_even_if_its_picture_can_t_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("cannot write: the disk is full")

    monkeypatch.setattr("short_runs.without_pictures", lambda patch: patch.setattr(plots, "confusion_matrix", fail))
    with pytest.raises(StorageError):
        run(tmp_path, monkeypatch=monkeypatch)
    folder = RunFolder(next(tmp_path.rglob("train.json")).parent)
    test_log = folder.test_log()
    assert test_log is not None and test_log["test_looks"] == 1
    assert folder.train_log()["status"] == "finished" and "disk is full" in folder.train_log()["error"]


def test_weights_that_overflow_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last step is finite, and its gradient spoils the weights; without validation nobody looks."""
    backward, calls = torch.Tensor.backward, []

    def spoiled(loss: torch.Tensor) -> None:
        calls.append(1)
        backward(loss * (math.inf if len(calls) == 21 else 1))  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    with pytest.raises(DivergedError, match="the weights became NaN or infinite by step 21"):
        run(tmp_path, "data.validation=0", monkeypatch=monkeypatch)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("best.pth"))


@pytest.mark.parametrize("sizes", [[1, 30, 30], [8, 8], [1, 1, 1, 20]])
def test_a_class_with_hardly_any_images_does_not_stop_a_run(
    sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    dataset = Dataset("digits", tuple("abcd"[: len(sizes)]), Images(pixels, labels), None, None, "made here")
    folder = run(tmp_path, "train.epochs=1", dataset=dataset, monkeypatch=monkeypatch)
    assert folder.train_log()["status"] == "finished" and folder.train_log()["overfitting_gap"] is not None


def test_training_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test images and labels change nothing in training; and `evaluate.test: false` leaves no score."""
    dataset = make_dataset()
    assert dataset.test is not None
    changed = Images(255 - dataset.test.pixels, dataset.test.labels[::-1].copy())
    other = Dataset(dataset.name, dataset.classes, dataset.train, None, changed, dataset.source)
    first = run(tmp_path / "a", monkeypatch=monkeypatch)
    second = run(tmp_path / "b", "evaluate.test=false", dataset=other, monkeypatch=monkeypatch)
    assert without_times(first.train_log()) == without_times(second.train_log())
    assert second.test_log() is None


def test_without_validation_the_best_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "data.validation=0", monkeypatch=monkeypatch)
    log = folder.train_log()
    assert log["best_epoch"] == 3 and folder.load_checkpoint("best.pth")["step"] == 21
    assert log["best_val_accuracy"] is None and log["overfitting_gap"] is None
    assert [entry["val_loss"] for entry in log["epochs"]] == [None] * 3


def test_part_of_an_epoch_is_counted_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display = Quiet()
    folder = run(tmp_path, "train.epochs=1.5", "data.validation=0", display=display, monkeypatch=monkeypatch)
    assert display.seen[-1].step == display.seen[-1].total_steps == 10  # 7 steps an epoch: round(10.5) is 10
    first, second = folder.train_log()["epochs"]
    # 7 steps of 32 images (the last of 8), then 3: the last progress of each epoch had seen all of its images.
    for entry, seen in ((first, display.seen[6]), (second, display.seen[9])):
        assert entry["train_loss"] == pytest.approx(seen.loss) and entry["train_accuracy"] == seen.accuracy
    assert display.seen[-1].epoch == 2 and 0 < second["train_accuracy"] <= 1
    assert (second["train_accuracy"] * 96) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("every", "names"),
    [
        ("{epochs: 1}", ["epoch-2.pth", "epoch-3.pth"]),
        ("{steps: 4}", ["step-12.pth", "step-16.pth"]),
        ("{share: 0.5}", ["step-9.pth", "epoch-3.pth"]),
        ("null", []),
    ],
)
def test_checkpoints_come_when_asked_for_and_the_latest_stay(
    every: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, f"train.checkpoint_every={every}", monkeypatch=monkeypatch)
    assert [path.name for path in folder.checkpoints()] == names
    for name in names:
        state = folder.load_checkpoint(name)
        assert state["step"] == (int(name[5:-4]) if name.startswith("step") else 6 * int(name[6:-4]))
        assert {"model", "optimizer", "epochs", "best", "train_time", "sums"} <= state.keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_names_the_step_and_keeps_what_was_saved(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cross_entropy, calls = F.cross_entropy, []

    def spoiled(logits: torch.Tensor, labels: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(logits, labels, **settings) * (bad if len(calls) == 9 else 1)

    monkeypatch.setattr(F, "cross_entropy", spoiled)
    with pytest.raises(DivergedError, match=r"the loss became NaN or infinite at step 8 \(epoch 2\)"):
        run(tmp_path, "train.checkpoint_every.epochs=1", monkeypatch=monkeypatch)
    monkeypatch.undo()
    folder = RunFolder(next(tmp_path.rglob("train.json")).parent)
    log = folder.train_log()
    assert log["status"] == "failed" and "step 8" in log["error"]
    assert len(log["epochs"]) == 1 and all(math.isfinite(v) for v in log["epochs"][0].values() if v is not None)
    for name in ("best.pth", "epoch-1.pth"):
        assert all(torch.isfinite(value).all() for value in folder.load_checkpoint(name)["model"].values())
    assert not list(folder.path.glob("step-*"))
    assert folder.test_log() is None


def test_a_stop_finishes_the_step_saves_and_leaves_the_test_set_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()

    def at_step_8(progress: Progress) -> None:
        if progress.step == 8:
            stop.signal = signal.SIGINT

    folder = run(tmp_path, display=Quiet(at_step_8), stop=stop, monkeypatch=monkeypatch)
    log = folder.train_log()
    assert log["status"] == "stopped" and log["finished"] is not None and len(log["epochs"]) == 1
    assert folder.load_checkpoint("step-8.pth")["step"] == 8
    assert folder.test_log() is None
    assert not stop.listening


@pytest.mark.parametrize(("name", "nth"), [("epoch-1.pth", 1), ("best.pth", 2), ("train.json", 3)])
def test_a_disk_that_fills_up_is_one_sentence_and_what_was_there_stays_and_agrees(
    name: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it happens to, train.json speaks of the best.pth that is there."""
    opened: list[Path] = []

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(memoryview(data)[:10])
            raise OSError(28, "No space left on device")

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if mode == "xb" and path.name.startswith(f".{name}."):
            opened.append(path)
            if len(opened) == nth:
                return FullDisk(path, "x")
        return open_before(path, mode, *rest, **named)

    open_before = Path.open
    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(StorageError, match=rf"cannot write .*{name}: the disk is full"):
        run(tmp_path, "train.checkpoint_every.epochs=1", "data.validation=0.3", monkeypatch=monkeypatch)
    folder = RunFolder(next(tmp_path.rglob("train.json")).parent)
    log = folder.train_log()
    assert log["status"] == "failed" and "the disk is full" in log["error"]
    assert not list(folder.path.glob(".*.tmp")) and not list(folder.path.glob("epoch-3.pth"))
    if log["best_epoch"] is not None:
        assert folder.load_checkpoint("best.pth")["epoch"] == log["best_epoch"] == 1


def test_training_goes_on_while_the_disk_is_busy_and_what_it_writes_then_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing more from the first best.pth on until the second epoch is over."""
    settings = ["train.checkpoint_every.epochs=1", "train.keep=5", "train.ema=0.9"]
    expected = run(tmp_path / "a", *settings, monkeypatch=monkeypatch).load_checkpoint("epoch-1.pth")
    write, further = files.write_bytes, threading.Event()
    logs: list[dict[str, Any]] = []

    def slow_disk(path: Path, data: Any) -> None:
        assert path.name != "best.pth" or further.wait(60)
        if path.name == "train.json":
            logs.append(json.loads(data))
        write(path, data)

    class Ahead(Quiet):
        def epoch(self, entry: dict[str, Any], epochs: float) -> None:
            if entry["epoch"] == 2:
                assert not list(tmp_path.glob("b/**/*.pth"))
                further.set()

    monkeypatch.setattr(files, "write_bytes", slow_disk)
    found = run(tmp_path / "b", *settings, display=Ahead(), monkeypatch=monkeypatch)
    state = found.load_checkpoint("epoch-1.pth")
    for tensors in ("model", "average", "optimizer"):
        torch.testing.assert_close(state[tensors], expected[tensors], rtol=0, atol=0)
    assert without_times({"epochs": state["epochs"]}) == without_times({"epochs": expected["epochs"]})
    assert all(state[name] == expected[name] for name in ("step", "best", "sums", "images"))
    assert state["step"] == 6 and len(state["epochs"]) == 1
    assert [len(log["epochs"]) for log in logs] == [0, 0, 1, 2, 3, 3]
    assert logs[2]["best_epoch"] == 1 and [log["status"] for log in logs] == ["running"] * 5 + ["finished"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), DivergedError("mine")])
def test_however_a_run_ends_what_was_to_be_written_is_and_its_status_comes_last(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, ending = files.write_bytes, threading.Event()

    def slow_disk(path: Path, data: Any) -> None:
        assert threading.current_thread() is threading.main_thread() or ending.wait(60)
        write(path, data)

    def end(progress: Progress) -> None:
        if progress.step == 8:
            ending.set()
            raise error

    monkeypatch.setattr(files, "write_bytes", slow_disk)
    with pytest.raises(type(error)):
        run(tmp_path, "train.checkpoint_every.epochs=1", display=Quiet(end), monkeypatch=monkeypatch)
    folder = RunFolder(next(tmp_path.rglob("train.json")).parent)
    log = folder.train_log()
    assert log["status"] == ("failed" if isinstance(error, DivergedError) else "stopped")
    assert len(log["epochs"]) == log["best_epoch"] == 1
    assert folder.load_checkpoint("epoch-1.pth")["step"] == folder.load_checkpoint("best.pth")["step"] == 6
    assert not list(folder.path.glob(".*.tmp"))


def test_memory_that_runs_out_is_one_sentence_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(progress: Progress) -> None:
        torch.empty(2**60)

    with pytest.raises(RunError, match=r"out of memory \(.*\); try --set train.batch_size=16"):
        run(tmp_path, display=Quiet(hungry), monkeypatch=monkeypatch)


def test_tensorboard_has_the_log_s_curves_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def look(progress: Progress) -> None:
        live = 0
        while progress.step == 13 and live < 2:  # in the third epoch of three; written beside it
            events = EventAccumulator(str(next(tmp_path.rglob("train.json")).parent))
            events.Reload()
            live = len(events.Scalars("loss/train")) if events.Tags()["scalars"] else 0

    folder = run(tmp_path, display=Quiet(look), monkeypatch=monkeypatch)
    events = EventAccumulator(str(folder.path))
    events.Reload()
    epochs = folder.train_log()["epochs"]
    for tag, key in [("loss/train", "train_loss"), ("accuracy/validation", "val_accuracy"), ("lr", "lr")]:
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [6, 12, 18]
        assert [s.value for s in scalars] == pytest.approx([entry[key] for entry in epochs], rel=1e-6)


def test_the_weighted_loss_of_an_epoch_is_a_weighted_mean_over_its_images() -> None:
    logits, weights = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 1.0, 3.0])
    labels = torch.arange(50) % 3
    sums = EpochSums(CPU)
    for part in (slice(0, 40), slice(40, 50)):
        loss = F.cross_entropy(logits[part], labels[part], weight=weights)
        sums.add(0, loss, logits[part], TrainingBatch(logits[part], labels[part]), weights)
    expected = F.cross_entropy(logits, labels, weight=weights).item()
    assert sums.means()[0] == pytest.approx(expected, rel=1e-6)


def test_rare_classes_weigh_more_when_asked() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 60 + [1] * 30 + [3] * 10)
    images = Images(np.zeros((100, 3, 32, 32), np.uint8), labels)
    images.pixels[:, 0, 0, 0] = np.arange(100)  # no duplicates
    dataset = Dataset("digits", tuple("abcd"), images, None, make_dataset().test, "made here")
    plan = recipe("loss.class_weights=balanced", "data.validation=0")
    weights = build._class_weights(plan, prepare(dataset, plan.data, 0), CPU)
    assert weights is not None
    # scikit-learn counts only the classes that are there.
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels) * 3 / 4
    assert weights[[0, 1, 3]].numpy() == pytest.approx(expected)
    assert weights[2] == 0
    assert json.dumps(weights.tolist())


def test_a_profile_says_where_ten_steps_spent_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "evaluate.test=false", profile=True, monkeypatch=monkeypatch)
    rows = (folder.path / "profile.txt").read_text().splitlines()
    convolutions = next(row for row in rows if row.lstrip().startswith("aten::convolution_backward "))
    assert int(convolutions.split()[-1]) == 4 * PROFILE_STEPS  # EX-1 has four of them
    with gzip.open(folder.path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("ProfilerStep#")]
    assert len({event["name"] for event in steps}) == PROFILE_STEPS


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display = Quiet()
    folder = run(
        tmp_path, "train.epochs=0.5", "evaluate.test=false", display=display, profile=True, monkeypatch=monkeypatch
    )
    assert not (folder.path / "profile.txt").exists()
    assert display.said == ["no profile: the run has fewer than 7 steps"]
