"""The loop. Read it from top to bottom: evaluate, save, step, log.

There is one loop for every recipe: recipes vary, the loop doesn't. Its position is one integer, the step; the order of
images, their random draws and the learning rate follow from it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab import files, machine
from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore, epoch_order
from cifarlab.errors import DivergedError, RunError
from cifarlab.evaluate import predict
from cifarlab.models import parameter_count
from cifarlab.numerics import Numerics
from cifarlab.optim import build_optimizer, set_learning_rate
from cifarlab.recipe import Recipe
from cifarlab.rundir import RunFolder
from cifarlab.schedule import values as schedule_values
from cifarlab.seeds import derive_seed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to train: a model on its device, the images, and which of them are for what.

    train, validation, train_sample: int64 (K,) on the CPU, sample indices into their stores. `train_sample` is the
    class-balanced part of the training images, as large as the validation set, that overfitting is measured on.
    class_weights: float32 (classes,) on the device. `description` is what a checkpoint carries besides the loop's
    state, so that it can be used on its own.
    """

    model: nn.Module
    pipeline: Pipeline
    numerics: Numerics
    store: ImageStore
    train: Tensor
    validation_store: ImageStore | None
    validation: Tensor | None
    train_sample: Tensor | None
    class_weights: Tensor | None
    device: torch.device
    description: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where the loop is; loss and accuracy are those of the epoch so far."""

    step: int
    total_steps: int
    epoch: int
    epochs: float
    loss: float
    accuracy: float
    images_per_second: float
    seconds_left: float


class Display(Protocol):
    """What the loop tells while it runs. `due` keeps it from reading the device more often than anybody looks."""

    def due(self) -> bool: ...

    def progress(self, progress: Progress) -> None: ...

    def epoch(self, entry: dict[str, Any], epochs: float) -> None: ...


class Stopwatch:
    """Adds up the seconds between `start` and `stop`, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Go on counting; does nothing where it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        machine.synchronize(self._device)
        self._seconds, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


class EpochSums:
    """Loss, correct answers and images of the epoch so far, added up on the device so that no step waits for it.

    The loss is weighted as in training: a batch counts by its images, or by the sum of their class weights.
    """

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.weight = torch.zeros((), dtype=wide, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        """loss: the batch's (weighted) mean; logits (B, K); labels int64 (B,)."""
        loss = loss.detach()
        weight = len(labels) if class_weights is None else class_weights[labels].sum()
        self.loss += loss * weight
        self.weight += weight
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)
        self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(loss), step, self.bad_step)

    def means(self) -> tuple[float, float]:
        """Loss and accuracy. Waits for the device."""
        return self.loss.item() / self.weight.item(), self.correct.item() / self.images

    def state(self) -> dict[str, float | int]:
        """What a checkpoint in the middle of an epoch keeps."""
        return {
            "loss": self.loss.item(),
            "weight": self.weight.item(),
            "correct": int(self.correct.item()),
            "images": self.images,
        }


class StopRequest:
    """Set by a signal handler: the loop, while it listens, finishes its step, saves, and ends."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.listening = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        self.listening = True
        try:
            yield
        finally:
            self.listening = False


def train(
    recipe: Recipe, task: Task, run: RunFolder, display: Display, stop: StopRequest, process_started: float
) -> None:
    """Train to the end, or until `stop`; all that is worth knowing goes into the run folder.

    process_started: the `time.time()` that `wall_time` counts from. The model ends with the weights of best.pth.
    Raises DivergedError where the loss is no longer finite, StorageError where the run folder can't be written.
    """
    model, section, schedule = task.model, recipe.train, recipe.schedule
    optimizer = build_optimizer(recipe.optimizer, model)
    steps_per_epoch = math.ceil(len(task.train) / section.batch_size)
    total_steps = max(1, round(section.epochs * steps_per_epoch))
    warmup_share = schedule.warmup.share_of(total_steps, steps_per_epoch) if schedule.warmup else 0.0

    step = images = saved_step = 0
    epoch_began = saved_at = 0.0  # seconds of training time
    sums = EpochSums(task.device)
    epochs: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    clock = Stopwatch(task.device)
    machine.reset_peak_memory(task.device)
    log: dict[str, Any] = {
        "status": "running",
        "started": _now(),
        "finished": None,
        "dataset": recipe.datasets[0],
        "classes": len(task.description["classes"]),
        "parameters": parameter_count(model),
        "epochs": epochs,
        "best_epoch": None,
        "best_val_accuracy": None,
        "overfitting_gap": None,
    }

    def write_log(status: str) -> None:
        log["status"] = status
        log["finished"] = None if status == "running" else _now()
        log["best_epoch"] = best["epoch"] if best else None
        log["best_val_accuracy"] = best["val_accuracy"] if best else None
        log["train_time"] = clock.seconds
        log["wall_time"] = time.time() - process_started
        log["images_per_second"] = images / clock.seconds if clock.seconds else None
        log["peak_memory"] = machine.peak_memory(task.device)
        run.write_train_log(log)

    def save(name: str, **state: Any) -> None:
        # A gradient can overflow while the loss it came from is finite.
        if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
            raise DivergedError(_diverged(f"the weights became NaN or infinite by step {step}", run))
        run.save_checkpoint(name, {**task.description, "step": step, "model": model.state_dict(), **state})

    def save_to_go_on(name: str) -> None:
        nonlocal saved_step, saved_at
        clock.stop()
        _refuse_bad_loss(sums, steps_per_epoch, run)
        saved_step, saved_at = step, clock.seconds
        save(
            name,
            optimizer=optimizer.state_dict(),
            epochs=epochs,
            best=best,
            train_time=clock.seconds,
            epoch_began=epoch_began,
            sums=sums.state(),
            images=images,
        )
        run.keep_latest(section.keep)

    model.train()
    batches = _batches(recipe, task, step)
    began = time.perf_counter()
    write_log("running")
    with _board(run) as board, stop.listen():
        while True:
            # Evaluate, at the end of an epoch and of the run.
            if sums.images and (step % steps_per_epoch == 0 or step == total_steps):
                clock.stop()
                _refuse_bad_loss(sums, steps_per_epoch, run)
                train_loss, train_accuracy = sums.means()
                val_loss, val_accuracy = _validate(task, recipe)
                entry = {
                    "epoch": len(epochs) + 1,
                    "train_loss": train_loss,
                    "train_accuracy": train_accuracy,
                    "val_loss": val_loss,
                    "val_accuracy": val_accuracy,
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": clock.seconds - epoch_began,
                }
                epochs.append(entry)
                if _is_better(entry, best) if task.validation is not None else step == total_steps:
                    best = entry
                    save("best.pth", epoch=entry["epoch"], val_loss=val_loss, val_accuracy=val_accuracy)
                _write_scalars(board, entry, step)
                write_log("running")
                display.epoch(entry, section.epochs)
                epoch_began = clock.seconds
                sums = EpochSums(task.device)

            # Save.
            name = _checkpoint_due(recipe, step, saved_step, clock.seconds - saved_at, total_steps, steps_per_epoch)
            if name:
                save_to_go_on(name)
            if step == total_steps:
                break
            if stop.signal is not None:
                if step > saved_step:
                    save_to_go_on(f"step-{step}.pth")
                clock.stop()
                write_log("stopped")
                return

            # Step.
            clock.start()
            pixels, labels = next(batches)
            values = schedule_values(
                schedule,
                share=step / total_steps,
                epoch=step / steps_per_epoch,
                epochs=section.epochs,
                warmup_share=warmup_share,
                val_losses=[math.nan if e["val_loss"] is None else e["val_loss"] for e in epochs],
            )
            set_learning_rate(optimizer, values)
            torch.manual_seed(derive_seed(recipe.seed, "step", step))  # what dropout draws from
            logits = model(pixels)
            loss = F.cross_entropy(
                logits, labels, weight=task.class_weights, label_smoothing=recipe.loss.label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sums.add(step, loss, logits, labels, task.class_weights)
            step += 1
            images += len(labels)

            # Log.
            if display.due():
                _refuse_bad_loss(sums, steps_per_epoch, run)
                mean_loss, accuracy = sums.means()
                display.progress(
                    Progress(
                        step=step,
                        total_steps=total_steps,
                        epoch=len(epochs) + 1,
                        epochs=section.epochs,
                        loss=mean_loss,
                        accuracy=accuracy,
                        images_per_second=sums.images / (clock.seconds - epoch_began),
                        seconds_left=(time.perf_counter() - began) / step * (total_steps - step),
                    )
                )

    if best is None:
        raise DivergedError(f"the validation loss was never finite, in {run.path}; try a lower optimizer.lr")
    model.load_state_dict(run.load_checkpoint("best.pth")["model"])
    if task.validation_store and task.validation is not None and task.train_sample is not None:
        batch_size = recipe.evaluate.batch_size
        validation = predict(model, task.validation_store, task.validation, task.pipeline, batch_size)
        sample = predict(model, task.store, task.train_sample, task.pipeline, batch_size)
        run.write_predictions("validation_predictions.npz", **validation.arrays())
        log["overfitting_gap"] = sample.accuracy() - validation.accuracy()
    write_log("finished")


def mark(run: RunFolder, status: Literal["stopped", "failed"], reason: str | None) -> None:
    """Say in train.json how a run ended: its status, if training was not over, and the reason.

    Where even that can't be written, the reason is what matters, and it is on its way already.
    """
    with contextlib.suppress(RunError):
        log = run.train_log()
        if log["status"] == "running":
            log |= {"status": status, "finished": _now()}
        run.write_train_log({**log, "error": reason} if reason else log)


def _batches(recipe: Recipe, task: Task, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images, float32 (B, 3, H, W), and labels, int64 (B,), from `step` on, without end."""
    batch_size = recipe.train.batch_size
    steps_per_epoch = math.ceil(len(task.train) / batch_size)
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        order = epoch_order(task.train, recipe.seed, epoch)[done * batch_size :]
        draws = task.pipeline.draw(recipe.seed, epoch, len(task.store))
        for batch in task.store.batches(order, batch_size):
            yield task.pipeline.train(batch.pixels, batch.samples, draws), batch.labels
            step += 1


def _validate(task: Task, recipe: Recipe) -> tuple[float | None, float | None]:
    """Loss and accuracy on the validation images; None where there are none, and for a loss that is not finite."""
    if task.validation_store is None or task.validation is None:
        return None, None
    predictions = predict(task.model, task.validation_store, task.validation, task.pipeline, recipe.evaluate.batch_size)
    loss = predictions.loss()
    return (loss if math.isfinite(loss) else None), predictions.accuracy()


def _is_better(entry: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Higher validation accuracy; at a tie, lower loss. A score whose loss is not finite is never the best."""
    if entry["val_loss"] is None:
        return False
    return best is None or (entry["val_accuracy"], -entry["val_loss"]) > (best["val_accuracy"], -best["val_loss"])


def _checkpoint_due(
    recipe: Recipe, step: int, saved_step: int, seconds: float, total_steps: int, steps_per_epoch: int
) -> str | None:
    """The name of the checkpoint that `train.checkpoint_every` asks for now, if any; seconds: since the last one."""
    every = recipe.train.checkpoint_every
    if every is None or step == saved_step:
        return None
    if every.minutes is not None:
        return f"step-{step}.pth" if seconds >= every.minutes * 60 else None
    if step % max(1, every.in_steps(total_steps, steps_per_epoch)):
        return None
    at_epoch_end = every.steps is None and step % steps_per_epoch == 0
    return f"epoch-{step // steps_per_epoch}.pth" if at_epoch_end else f"step-{step}.pth"


def _refuse_bad_loss(sums: EpochSums, steps_per_epoch: int, run: RunFolder) -> None:
    bad = int(sums.bad_step.item())
    if bad >= 0:
        raise DivergedError(
            _diverged(f"the loss became NaN or infinite at step {bad + 1} (epoch {bad // steps_per_epoch + 1})", run)
        )


def _diverged(what: str, run: RunFolder) -> str:
    return f"{what} of {run.path}; what was saved before stays; try a lower optimizer.lr, or a schedule with a warm-up"


@contextlib.contextmanager
def _board(run: RunFolder) -> Iterator[SummaryWriter]:
    """TensorBoard's writer into the run folder, its errors as StorageError."""
    from torch.utils.tensorboard import SummaryWriter  # a second to import

    try:
        with SummaryWriter(log_dir=str(run.path)) as board:
            yield board
    except OSError as error:
        raise files.explain("write TensorBoard's events into", run.path, error) from error


def _write_scalars(board: SummaryWriter, entry: dict[str, Any], step: int) -> None:
    scalars = {
        "loss/train": entry["train_loss"],
        "loss/validation": entry["val_loss"],
        "accuracy/train": entry["train_accuracy"],
        "accuracy/validation": entry["val_accuracy"],
        "lr": entry["lr"],
        "seconds": entry["seconds"],
    }
    for name, value in scalars.items():
        if value is not None:
            board.add_scalar(name, value, step)
    board.flush()


def _now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
