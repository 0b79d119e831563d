"""The loop. Read it from top to bottom: evaluate, save, step, log.

There is one loop for every recipe: recipes vary, the loop doesn't. Its position is one integer, the step; the order of
images, their random draws and the learning rate follow from it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cifarlab import distributed, files, machine
from cifarlab.background import Writer
from cifarlab.board import Board
from cifarlab.budget import Budget
from cifarlab.data.batches import in_batches
from cifarlab.download import Report
from cifarlab.errors import DivergedError, NotARunError, RunError
from cifarlab.evaluate import Classifier, Predictions, Tta, choose_tta, looks_on_validation, predict, with_tta
from cifarlab.feed import TrainingBatch, first_pictures, make_batches, pipeline_at, total_weight
from cifarlab.flops import TrainingFlops
from cifarlab.models import parameter_count
from cifarlab.models.chain import freeze, freeze_backbone, set_mode
from cifarlab.models.racing import whitening_biases
from cifarlab.models.weights import put_back
from cifarlab.optim import set_learning_rate
from cifarlab.pace import ByClock, BySteps, Pace
from cifarlab.pruning import Pruning
from cifarlab.recipe import Recipe
from cifarlab.rundir import OF_BEST, RunFolder, has, serialized
from cifarlab.schedule import values as schedule_values
from cifarlab.task import Task
from cifarlab.training_step import TrainingStep

# `--profile` looks at so many steps, after so many others.
PROFILE_STEPS, PROFILE_AFTER = 10, 5
# The factor of all learning rates where a run went back because it diverged (`train.retries`).
SETBACK = 0.5
# Under a budget a device is waited for after so many steps, as it takes them later than it is told to; and after so
# many the first evaluation is timed.
WAIT_EVERY, TRIAL_LOOK_AFTER = 16, 16


@dataclass(frozen=True)
class Progress:
    """Where the loop is; loss and accuracy are those of the epoch so far, the latter in the first process."""

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

    def report(self, text: str) -> None: ...


class Stopwatch:
    """Adds up the seconds between `start` and `stop`, the device's work included, on top of `seconds`."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._seconds = seconds
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

    The loss is weighted as in training: a batch counts by its images, or by the sum of their class weights. Where
    images are pruned, each counts for those that it stands for, in both. Where several processes train together, each
    knows the loss of all, and adds up its own answers.
    """

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.weight = torch.zeros((), dtype=wide, device=device)
        self.correct = torch.zeros((), dtype=wide, device=device)
        self.answers = torch.zeros((), dtype=wide, device=device)
        self.images = 0
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, loss: Tensor, logits: Tensor, batch: TrainingBatch, class_weights: Tensor | None) -> None:
        """loss: the whole batch's (weighted) mean; logits (B, K). A mixed image's label is the one with more weight."""
        loss = loss.detach()
        labels = batch.labels
        if batch.partners is not None and batch.share is not None:
            labels = torch.where(batch.share >= 0.5, labels, batch.partners)
        weight = batch.whole.weight if batch.whole is not None else total_weight(batch, class_weights)
        self.loss += loss * weight
        self.weight += weight
        if batch.whole is None or batch.whole.counts:
            correct = logits.detach().argmax(1) == labels
            self.correct += (correct if batch.weights is None else correct * batch.weights).sum()
            self.answers += total_weight(batch, None)
        self.images += batch.images
        self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(loss), step, self.bad_step)

    def means(self) -> tuple[float, float]:
        """Loss, and accuracy in this process. Waits for the device."""
        return self.loss.item() / self.weight.item(), self.correct.item() / self.answers.item()

    def of_all(self) -> EpochSums:
        """The same with all processes' answers; to be called in each. Itself where there is one."""
        if distributed.place().size == 1:
            return self
        whole = copy.deepcopy(self)
        distributed.sum_in_place([whole.correct, whole.answers])
        return whole

    def state(self) -> dict[str, float | int]:
        """What a checkpoint in the middle of an epoch keeps, of all processes; to be called in each."""
        whole = self.of_all()
        return {
            "loss": whole.loss.item(),
            "weight": whole.weight.item(),
            "correct": whole.correct.item(),
            "answers": whole.answers.item(),
            "images": whole.images,
        }

    def load_state(self, state: dict[str, float | int]) -> None:
        """Go on from a `state`."""
        for name in ("loss", "weight", "correct", "answers"):
            getattr(self, name).fill_(state[name])
        if not distributed.is_first():  # they stand for all
            self.correct.zero_()
            self.answers.zero_()
        self.images = int(state["images"])


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
    recipe: Recipe,
    task: Task,
    run: RunFolder,
    display: Display,
    stop: StopRequest,
    process_started: float,
    *,
    saved: dict[str, Any] | None = None,
    setbacks: Sequence[dict[str, Any]] = (),
    profile: bool = False,
    histograms: bool = False,
    budget: Budget | None = None,
) -> None:
    """Train to the end, or until `stop`; all that is worth knowing goes into the run folder.

    process_started: the `time.time()` that `wall_time` counts from. saved: the checkpoint to go on from; then logs go
    on from its step too, and what came after it in them is gone. setbacks: how often it went back because it diverged;
    each halves the learning rates. profile: also write down where a few steps spend
    their time. histograms: also write those of the weights at the end of each epoch, for TensorBoard. budget: what is
    left of it, and not `train.epochs`, which is what was planned, says when it ends.
    The model ends with the weights of best.pth.
    Raises DivergedError where the loss is no longer finite, StorageError where the run folder can't be written,
    NotARunError where `saved` does not fit the network or the optimizer.
    """
    network, section, schedule = task.network, recipe.train, recipe.schedule
    model = network.model
    stages = recipe.model.freeze_stages  # that train no more
    average = task.average
    take_step = TrainingStep(recipe, task, display.report)
    optimizer, scaler = take_step.optimizer, take_step.scaler
    pruning = Pruning(section.prune, recipe.seed, len(task.store), task.device) if section.prune is not None else None
    steps_per_epoch = len(in_batches(task.train, section.batch))
    total_steps = max(1, round(section.epochs * steps_per_epoch))
    warmup_share = schedule.warmup.share_of(total_steps, steps_per_epoch) if schedule.warmup else 0.0
    thaw = recipe.model.freeze_backbone
    thaw_step = thaw.in_steps(total_steps, steps_per_epoch) if thaw else 0
    fade = recipe.model.whitening_bias
    fade_steps = fade.in_steps(total_steps, steps_per_epoch) if fade else None
    biases = list(whitening_biases(model).values())

    step = images = saved_step = 0
    flops = TrainingFlops(network)
    lr = 0.0
    epoch_began = saved_at = 0.0  # seconds of training time
    sums = EpochSums(task.device)
    epochs: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    clock = Stopwatch(task.device)
    started = now()
    if saved is not None:
        _restore(saved, task, take_step, pruning, run)
        step = saved_step = saved["step"]
        if step > total_steps and budget is None:
            raise NotARunError(
                f"the checkpoint of step {step} of {run.path} does not fit: it trains {total_steps} steps"
            )
        images, epochs, started = saved["images"], list(saved["epochs"]), saved["started"]
        before = saved["flops"]  # of all processes
        flops = TrainingFlops(network, before if before is None or distributed.is_first() else 0)
        sums.load_state(saved["sums"])
        clock = Stopwatch(task.device, saved["train_time"])
        saved_at, epoch_began = saved["train_time"], saved["epoch_began"]
        same = len(setbacks) == len(saved["setbacks"]) and saved["made_on"] == task.description["made_on"]
        best = distributed.from_first(partial(_best_so_far, saved, task, run, display.report, same=same))
    first_step = step
    pace: Pace = BySteps(total_steps)
    if budget is not None:
        pixels = [(share, math.prod(pipeline.output_size)) for share, pipeline in task.pipelines]
        share = saved["share"] if saved is not None else 0.0
        pace = ByClock(total_steps, budget.for_steps, pixels, first_step=step, share=share)
        budget.looks_after = budget.looks_on_test
        if task.validation is not None and task.train_sample is not None:
            budget.looks_after += looks_on_validation(recipe, len(task.validation), len(task.train_sample))
    looked_at = budget.now() if budget is not None else 0.0
    counted, counted_at = step, 0.0  # by the pace
    machine.reset_peak_memory(task.device)
    log: dict[str, Any] = {
        "status": "running",
        "started": started,
        "finished": None,
        "dataset": recipe.datasets[0],
        "classes": len(task.description["classes"]),
        "parameters": parameter_count(model),
        "epochs": epochs,
        "best_epoch": None,
        "best_val_accuracy": None,
        "best_weights": None,
        "stopped_early": False,
        "overfitting_gap": None,
        "accumulate": take_step.accumulate,
        "setbacks": list(setbacks),
        "tta": None,
    }

    def log_so_far(status: str) -> dict[str, Any]:
        log["status"] = status
        log["finished"] = None if status == "running" else now()
        log["best_epoch"] = best["epoch"] if best else None
        log["best_val_accuracy"] = best["val_accuracy"] if best else None
        log["best_weights"] = best["weights"] if best else None
        log["train_time"] = clock.seconds
        log["wall_time"] = max(clock.seconds, time.time() - process_started)  # a clock may be set back
        log["images_per_second"] = images / clock.seconds if clock.seconds else None
        # Counting takes a moment, and has no place among the steps that a profile looks at.
        log["flops"] = done = _of_all(flops) if status != "running" else None
        log["flops_per_second"] = done / clock.seconds if done is not None and clock.seconds else None
        log["peak_memory"] = machine.peak_memory(task.device)
        log["frozen_stages"] = _of_all_frozen(network)
        if budget is not None:
            log["budget"] = budget.record() | {"steps": step, "steps_planned": total_steps}
        return copy.deepcopy(log)

    def save(name: str, module: nn.Module, **state: Any) -> None:
        # A gradient can overflow while the loss it came from is finite.
        if not all(torch.isfinite(value).all() for value in module.state_dict().values()):
            raise DivergedError(_diverged(f"the weights became NaN or infinite by step {step}", run))
        if not distributed.is_first():
            return
        whole = serialized({**task.description, "step": step, "model": module.state_dict(), **state})
        on_disk(partial(run.save_checkpoint, name, whole))

    def save_to_go_on(name: str) -> None:
        nonlocal saved_step, saved_at
        clock.stop()
        _refuse_bad_loss(sums, steps_per_epoch, run)
        saved_step, saved_at = step, clock.seconds
        save(
            name,
            model,
            average=average.network.model.state_dict() if average is not None else None,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            epochs=epochs,
            best=best,
            started=started,
            setbacks=list(setbacks),
            train_time=clock.seconds,
            wall_time=time.time() - process_started,
            epoch_began=epoch_began,
            sums=sums.state(),
            images=images,
            flops=_of_all(flops),
            accumulate=take_step.accumulate,
            pruning=pruning.state() if pruning is not None else None,
            frozen=_of_all_frozen(network),
            share=pace.position(step) / total_steps,
        )
        on_disk(partial(run.keep_latest, section.keep))

    def count_steps() -> None:
        """Tell the pace what the steps since the last time took."""
        nonlocal counted
        if budget is not None and step > counted:
            machine.synchronize(task.device)
            pace.took(budget.now() - counted_at, step - counted)
            counted = step

    def on_disk(work: Callable[[], object]) -> None:
        if distributed.is_first():
            writer.do(work)

    def weights() -> dict[str, Any] | None:
        """A copy, to be written beside training."""
        if not (histograms and distributed.is_first()):
            return None
        copies = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in model.named_parameters()}
        return {name: copied.numpy() for name, copied in copies.items()}

    board = Board(run.path)
    pictures = first_pictures(recipe, task) if distributed.is_first() else None
    votes = distributed.Votes()
    thawed = pace.position(step) >= thaw_step
    freeze_backbone(model, stages, frozen=not thawed)
    set_mode(model, stages, backbone=not thawed)
    # (Under a budget what was remembered is computed again as it is wanted: bits aren't promised, and time is short.)
    if saved is not None and network.frozen is not None and saved["frozen"] is not None and budget is None:
        _recall(recipe, task, step, pace, saved["frozen"])
    batches = make_batches(recipe, task, step, pace, pruning)
    began = time.perf_counter()
    with (
        Writer() as writer,
        stop.listen(),
        _profiler(run, task.device, profile and distributed.is_first(), display) as profiled,
    ):
        on_disk(
            partial(
                board.begin,
                [(entry, min(entry["epoch"] * steps_per_epoch, step)) for entry in epochs],
                recipe=recipe,
                images=pictures,
                histograms=histograms,
            )
        )
        on_disk(partial(run.write_train_log, log_so_far("running")))
        on_disk(partial(run.keep_latest, section.keep))  # a kill may have come before that
        while True:
            # Evaluate, at the end of an epoch and of the run.
            if step % steps_per_epoch == 0:
                count_steps()
            over = pace.over(step)
            if sums.images and (step % steps_per_epoch == 0 or over):
                clock.stop()
                _refuse_bad_loss(sums, steps_per_epoch, run)
                train_loss, train_accuracy = sums.of_all().means()
                val_loss = val_accuracy = ema_val_loss = ema_val_accuracy = None
                looks = len(task.validation) * (1 if average is None else 2) if task.validation is not None else 0
                began_look = budget.now() if budget is not None else 0.0
                since = began_look - looked_at
                if budget is None or over or section.early_stopping or budget.allows_look(looks, since):
                    val_loss, val_accuracy = _validate(network, task, recipe)
                    ema_val_loss, ema_val_accuracy = _validate(average.network if average else None, task, recipe)
                    if budget is not None:
                        looked_at = budget.now()
                        budget.looked(looks, looked_at - began_look)
                entry = {
                    "epoch": len(epochs) + 1,
                    "train_loss": train_loss,
                    "train_accuracy": train_accuracy,
                    "val_loss": val_loss,
                    "val_accuracy": val_accuracy,
                    "ema_val_loss": ema_val_loss,
                    "ema_val_accuracy": ema_val_accuracy,
                    "lr": lr,
                    "seconds": clock.seconds - epoch_began,
                }
                # What is decided by it, all must decide alike, to the last bit.
                entry = distributed.from_first(partial(copy.copy, entry))
                epochs.append(entry)
                candidate = _candidate(entry, last=over, averaged=average is not None)
                if candidate is not None and (task.validation is None or _is_better(candidate, best)):
                    best = candidate
                    save("best.pth", average.network.model if average and best["weights"] == "ema" else model, **best)
                on_disk(partial(board.add, entry, step, weights()))
                on_disk(partial(run.write_train_log, log_so_far("running")))
                display.epoch(entry, section.epochs)
                epoch_began = clock.seconds
                sums = EpochSums(task.device)
                pace.renew()
                over = over or (best is not None and pace.over(step))  # that took all the time that was left

            # Save.
            late = _is_late(recipe, clock.seconds - saved_at)
            signal, late = votes.cast(stop.signal, late)
            name = _checkpoint_due(recipe, step, saved_step, total_steps, steps_per_epoch, late=late)
            if name:
                save_to_go_on(name)
                pace.renew()
            if over:
                break
            if best and section.early_stopping and len(epochs) - best["epoch"] >= section.early_stopping:
                log["stopped_early"] = True
                break
            if signal is not None:
                stop.signal = signal
                if step > saved_step:
                    save_to_go_on(f"step-{step}.pth")
                clock.stop()
                on_disk(partial(run.write_train_log, log_so_far("stopped")))
                votes.result()
                return

            # Step.
            clock.start()
            if budget is not None and counted == step:
                counted_at = budget.now()
            position = pace.position(step)
            if not thawed and position >= thaw_step:
                thawed = True
                freeze_backbone(model, stages, frozen=False)
                set_mode(model, stages, backbone=False)
            if (more := recipe.model.frozen_stages(position / total_steps)) > stages:
                stages = more
                freeze(model, stages)
                set_mode(model, stages, backbone=not thawed)
            batch = next(batches)
            values = schedule_values(
                schedule,
                share=position / total_steps,
                epoch=step / steps_per_epoch,
                epochs=section.epochs,
                warmup_share=warmup_share,
                val_losses=[math.nan if e["val_loss"] is None else e["val_loss"] for e in epochs],
            )
            values = values._replace(lr=values.lr * SETBACK ** len(setbacks))
            fading = None
            if fade_steps is not None:
                fading = (1 - position / fade_steps) * SETBACK ** len(setbacks) if position < fade_steps else 0.0
            if fading == 0.0:
                for bias in biases:  # nothing is left to be computed for the first layer
                    bias.requires_grad_(False)
            set_learning_rate(optimizer, values, fading)
            lr = recipe.optimizer.lr * values.lr
            loss, logits = take_step(batch, step)
            log["accumulate"] = take_step.accumulate
            step += 1
            if average is not None:
                average.ema.update(model, step)
            sums.add(step - 1, loss, logits, batch, task.class_weights)
            if task.device.type == "cpu":  # elsewhere that would wait for the device
                _refuse_bad_loss(sums, steps_per_epoch, run)
            if pruning is not None and batch.samples is not None:
                pruning.record(batch.samples, logits, batch.labels, recipe.loss.label_smoothing)
            images += batch.images
            if batch.whole is None or batch.whole.counts:
                flops.add(batch.inputs.shape, batch.computed)
            profiled()

            if budget is not None and (task.device.type == "cpu" or step % WAIT_EVERY == 0):
                count_steps()
                if budget.per_look is None and step - first_step >= TRIAL_LOOK_AFTER:
                    clock.stop()
                    budget.looked(*_trial_look(network, task, recipe, budget.now))
                    pace.renew()
                    clock.start()

            # Log.
            if display.due():
                if distributed.place().size == 1:  # the others don't look now, and all must stop at the same step
                    _refuse_bad_loss(sums, steps_per_epoch, run)
                mean_loss, accuracy = sums.means()
                display.progress(
                    Progress(
                        step=round(pace.position(step)),
                        total_steps=total_steps,
                        epoch=len(epochs) + 1,
                        epochs=section.epochs,
                        loss=mean_loss,
                        accuracy=accuracy,
                        images_per_second=sums.images / (clock.seconds - epoch_began),
                        seconds_left=(
                            budget.left()
                            if budget is not None
                            else (time.perf_counter() - began) / (step - first_step) * (total_steps - step)
                        ),
                    )
                )
    votes.result()

    if best is None and saved is not None and saved["best"] is not None:
        raise NotARunError(
            f"{run.path / 'best.pth'} is damaged, and no later epoch is better: run it again from recipe.yaml"
        )
    if best is None:
        raise DivergedError(f"the validation loss was never finite, in {run.path}; try a lower optimizer.lr")
    try:
        put_back(model, distributed.from_first(lambda: run.load_checkpoint("best.pth").get("model")))
    except ValueError as error:
        raise NotARunError(f"{run.path / 'best.pth'} does not fit the recipe's network: {error}") from error
    if task.validation is not None and task.train_sample is not None:
        validation = validate(network, task, recipe)
        if distributed.is_first():
            run.write_predictions("validation_predictions.npz", **validation.arrays())
        if budget is None or budget.allows(len(task.train_sample), budget.looks_on_test):
            sample = predict(network, task.store, task.train_sample, task.pipeline, recipe.evaluate.batch)
            log["overfitting_gap"] = sample.accuracy() - validation.accuracy()
        if recipe.evaluate.tta is not None:
            log["tta"] = choose_tta(
                recipe.evaluate.tta,
                validation,
                lambda mode: with_tta(
                    validation,
                    mode,
                    recipe.evaluate.tta_below,
                    lambda samples, mode: validate(network, task, recipe, samples, mode),
                ),
            )
    whole_log = log_so_far("finished")
    if distributed.is_first():
        run.write_train_log(whole_log)


def _trial_look(network: Classifier, task: Task, recipe: Recipe, now: Callable[[], float]) -> tuple[int, float]:
    """How many images were evaluated for the time it takes, and the seconds: one batch's."""
    samples = task.train[: recipe.evaluate.batch]
    began = now()
    predict(network, task.store, samples, task.pipeline, recipe.evaluate.batch)
    machine.synchronize(task.device)
    return len(samples), now() - began


def _of_all_frozen(network: Classifier) -> dict[str, int] | None:
    """What the frozen stages of all processes have done; to be called in each."""
    if network.frozen is None:
        return None
    records = distributed.everyones(network.frozen.record())
    return {name: sum(record[name] for record in records) for name in records[0]}


def _of_all(flops: TrainingFlops) -> int | None:
    """Those of all processes; to be called in each."""
    counts = distributed.everyones(flops.total())
    return None if None in counts else sum(counts)


def _restore(
    saved: dict[str, Any], task: Task, take_step: TrainingStep, pruning: Pruning | None, run: RunFolder
) -> None:
    """Put a checkpoint's state where it came from. Raises NotARunError where it does not fit."""
    try:
        put_back(task.network.model, saved["model"])
        if task.average is not None:
            put_back(task.average.network.model, saved["average"])
        take_step.optimizer.load_state_dict(saved["optimizer"])
        if take_step.scaler is not None and saved["scaler"] is not None:
            take_step.scaler.load_state_dict(saved["scaler"])
        if distributed.place().size == 1:  # what memory one process had is nothing to the shares of several
            take_step.accumulate = saved["accumulate"]
        if pruning is not None:
            pruning.load_state(saved["pruning"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotARunError(f"the checkpoint of step {saved['step']} of {run.path} does not fit: {reason}") from error


def _best_so_far(
    saved: dict[str, Any], task: Task, run: RunFolder, report: Report, *, same: bool
) -> dict[str, Any] | None:
    """What best.pth says of itself: it may be of an epoch after the checkpoint, which then comes again.

    same: whether that epoch will be the same. Where it will not, and where best.pth is damaged, the checkpoint's own
    weights take its place, if they are the best; or else those of an epoch to come do.
    """
    best = saved["best"]
    if best is None and not (run.path / "best.pth").exists():
        return None
    try:
        state = run.load_checkpoint("best.pth")
        if not has(state, OF_BEST):
            raise NotARunError(f"{run.path / 'best.pth'} is damaged: it doesn't say of which epoch it is")
        found = {name: state[name] for name in OF_BEST}
        if not same and found["epoch"] > len(saved["epochs"]):
            raise NotARunError(f"{run.path / 'best.pth'} is of epoch {found['epoch']}, which comes anew")
        return found
    except NotARunError as error:
        if best is not None and best["epoch"] == len(saved["epochs"]) and not saved["sums"]["images"]:
            report(f"{error}; the checkpoint's weights, which are the best, take its place")
            weights = saved["average" if best["weights"] == "ema" else "model"]
            whole = serialized({**task.description, "step": saved["step"], "model": weights, **best})
            run.save_checkpoint("best.pth", whole)
            return dict(best)
        report(f"{error}; the best of the epochs to come takes its place")
        return None


def _recall(recipe: Recipe, task: Task, step: int, pace: Pace, record: dict[str, int]) -> None:
    """Have the frozen stages compute again what a run that goes on at `step` would remember, in the same batches.

    So that it is the same to the last bit, whatever a processor makes of images in other company.
    """
    frozen, cycle = task.network.frozen, recipe.augment.cycle
    assert frozen is not None
    assert cycle is not None  # else nothing would be remembered
    steps_per_epoch = len(in_batches(task.train, recipe.train.batch))
    pipeline = pipeline_at(task, step, pace)
    first = next(number for number in range(step + 1) if pipeline_at(task, number, pace) is pipeline)
    batches = make_batches(recipe, task, first, pace)
    all_seen = (math.ceil(first / steps_per_epoch) + cycle) * steps_per_epoch  # each version of each image has come
    for _ in range(first, min(step, all_seen)):
        next(batches)
    frozen.computed = frozen.recalled = 0
    if distributed.is_first():  # it stands for all
        frozen.computed, frozen.recalled = record["computed"], record["recalled"]


def mark(run: RunFolder, status: Literal["stopped", "failed"], reason: str | None) -> None:
    """Say in train.json how a run ended: its status, if training was not over, and the reason.

    Where even that can't be written, the reason is what matters, and it is on its way already.
    """
    with contextlib.suppress(RunError):
        log = run.train_log()
        if log["status"] == "running":
            log |= {"status": status, "finished": now()}
        run.write_train_log({**log, "error": reason} if reason else log)


def validate(
    network: Classifier, task: Task, recipe: Recipe, samples: Tensor | None = None, tta: Tta = None
) -> Predictions:
    """Predictions of the validation images, of which there are some; or of those among them at `samples`."""
    assert task.validation_store is not None
    assert task.validation is not None
    return predict(
        network,
        task.validation_store,
        samples if samples is not None else task.validation,
        task.pipeline,
        recipe.evaluate.batch,
        tta=tta,
        seed=recipe.seed,
        remember="validation",
    )


def _validate(network: Classifier | None, task: Task, recipe: Recipe) -> tuple[float | None, float | None]:
    """Loss and accuracy on the validation images; None where there are none, and for a loss that is not finite."""
    if network is None or task.validation is None:
        return None, None
    predictions = validate(network, task, recipe)
    loss = predictions.loss()
    return (loss if math.isfinite(loss) else None), predictions.accuracy()


def _candidate(entry: dict[str, Any], *, last: bool, averaged: bool) -> dict[str, Any] | None:
    """What an epoch offers for best.pth: the weights or their moving average, whichever validates better.

    Without validation images only the end of the run offers something: the average, where there is one.
    """
    epoch = entry["epoch"]
    if entry["val_accuracy"] is None:
        weights = "ema" if averaged else "raw"
        return {"epoch": epoch, "val_loss": None, "val_accuracy": None, "weights": weights} if last else None
    candidates = [
        {"epoch": epoch, "val_loss": entry[f"{prefix}val_loss"], "val_accuracy": accuracy, "weights": weights}
        for prefix, weights in (("", "raw"), ("ema_", "ema"))
        if (accuracy := entry[f"{prefix}val_accuracy"]) is not None
    ]
    best = None
    for candidate in candidates:
        if _is_better(candidate, best):
            best = candidate
    return best


def _is_better(candidate: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Higher validation accuracy; at a tie, lower loss. A score whose loss is not finite is never the best."""
    if candidate["val_loss"] is None:
        return False
    return best is None or (candidate["val_accuracy"], -candidate["val_loss"]) > (
        best["val_accuracy"],
        -best["val_loss"],
    )


def _is_late(recipe: Recipe, seconds: float) -> bool:
    """Whether a checkpoint is due by the clock; seconds: since the last one."""
    every = recipe.train.checkpoint_every
    return every is not None and every.minutes is not None and seconds >= every.minutes * 60


def _checkpoint_due(
    recipe: Recipe, step: int, saved_step: int, total_steps: int, steps_per_epoch: int, *, late: bool
) -> str | None:
    """The name of the checkpoint that `train.checkpoint_every` asks for now, if any; late: it does by the clock."""
    every = recipe.train.checkpoint_every
    if every is None or step == saved_step:
        return None
    if every.minutes is not None:
        return f"step-{step}.pth" if late else None
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
def _profiler(run: RunFolder, device: torch.device, asked: bool, display: Display) -> Iterator[Callable[[], None]]:
    """torch's profiler over ten steps, once the first ones are over; what it gives is to be called after each step.

    Leaves `trace.json.gz` (for chrome://tracing or Perfetto) and `profile.txt`, the table of what took longest.
    """
    if not asked:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        files.write_text(run.path / "profile.txt", profiler.key_averages().table(sort_by=order, row_limit=30) + "\n")
        try:
            profiler.export_chrome_trace(str(run.path / "trace.json.gz"))
        except OSError as error:
            raise files.explain("write the trace into", run.path, error) from error

    plan = schedule(wait=PROFILE_AFTER, warmup=1, active=PROFILE_STEPS, repeat=1)
    with profile(schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if not (run.path / "profile.txt").exists():
        display.report(f"no profile: the run has fewer than {PROFILE_AFTER + 2} steps")


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
