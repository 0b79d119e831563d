"""A training step: gradients of a batch's loss, in parts where need be, and the optimizer's step."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab import distributed, machine
from cifarlab.batchnorm import SyncBatchNorm, running_statistics
from cifarlab.data.batches import in_batches
from cifarlab.download import Report
from cifarlab.feed import TrainingBatch, part_size, total_weight
from cifarlab.graphs import StepGraphs, Tensors
from cifarlab.optim import ByGroups, build_optimizer
from cifarlab.recipe import Recipe
from cifarlab.recipe_schedule import OneCycleSchedule
from cifarlab.seeds import derive_seed
from cifarlab.task import Task


def make_scaler(task: Task) -> torch.amp.GradScaler | None:
    """For fp16, where gradients would round to zero: the loss is scaled up for them, None for other dtypes."""
    return torch.amp.GradScaler(task.device.type) if task.network.numerics.dtype == torch.float16 else None


def apply_gradients(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """Clip the gradients, and take the optimizer's step; with a scaler the step is left out where they overflowed.

    Then it is torch that waits for the device, to know whether they did; not with Adam and AdamW, which look there.
    """
    if scaler is not None and recipe.train.clip_grad_norm is not None:
        scaler.unscale_(optimizer)
    if recipe.train.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip_grad_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


class TrainingStep:
    """What a step does once its batch is there: gradients, and the optimizer's step.

    On a GPU both are replayed as a CUDA graph where `numerics.graphs` says so; the optimizer's step only if it is one
    of ours, whose learning rates can be read by a graph, and no other of its settings moves.
    """

    def __init__(self, recipe: Recipe, task: Task, report: Report) -> None:
        self.scaler = make_scaler(task)
        self.optimizer = build_optimizer(recipe.optimizer, task.network.model, scaled=self.scaler is not None)
        self._recipe, self._task, self._report = recipe, task, report
        self._backward = Backward(recipe, task, self.scaler)
        self._graphs: StepGraphs | None = None
        moves_momentum = isinstance(recipe.schedule, OneCycleSchedule) and recipe.schedule.cycle_momentum
        self._whole = isinstance(self.optimizer, ByGroups) and self.scaler is None and not moves_momentum
        if task.network.numerics.graphs:
            self._graphs = StepGraphs(task.network.model, self.optimizer, self._work, report)

    @property
    def accumulate(self) -> int:
        """In how many parts a batch is computed."""
        return self._backward.accumulate

    @accumulate.setter
    def accumulate(self, parts: int) -> None:
        self._backward.accumulate = parts

    @property
    def graphs_failed(self) -> bool:
        """Whether steps were to be replayed as CUDA graphs, and can't be."""
        return self._graphs is not None and self._graphs.given_up

    def __call__(self, batch: TrainingBatch, step: int) -> tuple[Tensor, Tensor]:
        """Loss and logits, as `backward` returns them; they may be overwritten by the next step."""
        if self._graphs is not None:
            torch.manual_seed(derive_seed(self._recipe.seed, "step", step))  # as `Backward` does: dropout draws from it
            tensors = (batch.inputs, batch.labels, batch.partners, batch.share, batch.weights)
            replayed = self._graphs(tensors, self.accumulate, self._whole)
            if replayed is not None:
                if not self._whole:
                    self._apply()
                return replayed
        parts = self.accumulate
        result = self.set_gradients(batch, step)
        if self.accumulate > parts:
            self._report(f"memory ran out: from here on a batch is computed in {self.accumulate} parts")
        self._exchange(result[0])
        # On other devices a look would be a wait; there, the steps since the last one are lost with this one.
        if result[0].device.type != "cpu" or math.isfinite(result[0].item()):
            self._apply()
        return result

    def set_gradients(self, batch: TrainingBatch, step: int) -> tuple[Tensor, Tensor]:
        """The first half of a step. Loss and logits."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._backward(batch, step)

    def _exchange(self, loss: Tensor) -> None:
        """Make of each process's gradients and loss, which are shares of the whole batch's, those of the whole."""
        size = distributed.place().size
        if size == 1:
            return
        model = self._task.network.model
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        statistics = [] if self._recipe.train.sync_batchnorm else running_statistics(model)
        for statistic in statistics:  # to be those of all: their mean
            statistic /= size
        distributed.sum_in_place([*gradients, loss, *statistics])

    def _apply(self) -> None:
        apply_gradients(self._recipe, self._task.network.model, self.optimizer, self.scaler)

    def _work(self, tensors: Tensors, parts: int, whole: bool) -> tuple[Tensor, Tensor]:
        inputs, labels, partners, share, weights = tensors
        assert inputs is not None
        assert labels is not None
        batch = TrainingBatch(inputs, labels, partners, share, weights=weights)
        result = backward(self._recipe, self._task, batch, self.scaler, parts)
        if whole:
            self._apply()
        return result


class Backward:
    """`backward` in `accumulate` parts, or in twice as many for as long as memory runs out, which is then how it stays.

    Not where several processes train together: they would have to agree on it.

    The same step is done again: with the same dropout; and, where inputs of its shape never fitted before, with the
    buffers (BatchNorm's statistics) that were there.
    """

    def __init__(self, recipe: Recipe, task: Task, scaler: torch.amp.GradScaler | None) -> None:
        self.accumulate = recipe.train.accumulate
        self._recipe, self._task, self._scaler = recipe, task, scaler
        self._fits: set[tuple[int, ...]] = set()  # shapes of inputs

    def __call__(self, batch: TrainingBatch, step: int) -> tuple[Tensor, Tensor]:
        """Loss and logits, as `backward` returns them; the gradients must be none before.

        Raises what `backward` raises where parts of one image don't fit either.
        """
        model, shape = self._task.network.model, tuple(batch.inputs.shape)
        before = None if shape in self._fits else [(buffer, buffer.clone()) for buffer in model.buffers()]
        while True:
            torch.manual_seed(_seed_of(self._recipe, batch, step))  # what dropout draws from
            try:
                result = backward(self._recipe, self._task, batch, self._scaler, self.accumulate)
                self._fits.add(shape)
                return result
            except (MemoryError, RuntimeError) as error:
                # Several processes would have to agree on it, and some of them may be waiting for this one's sums.
                together = distributed.place().size > 1
                if not machine.is_out_of_memory(error) or self.accumulate >= len(batch.labels) or together:
                    raise
            # Not in the `except`: the exception holds the frames that hold the memory.
            self.accumulate *= 2
            for parameter in model.parameters():
                parameter.grad = None
            for buffer, value in before or ():
                buffer.copy_(value)
            machine.give_back_memory(self._task.device)


def _seed_of(recipe: Recipe, batch: TrainingBatch, step: int) -> int:
    """What dropout draws from; other numbers in each process, for its own rows."""
    divided = batch.whole is not None and batch.whole.parts is not None
    return derive_seed(recipe.seed, "step", step, *([distributed.place().rank] if divided else []))


def backward(
    recipe: Recipe,
    task: Task,
    batch: TrainingBatch,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's mean loss, in parts; scaled, where there is a `scaler`.

    accumulate: how many parts; None: `train.accumulate`. Where several processes train together, gradients and loss are
    what this one's rows give to those of the whole batch, and BatchNorm may wait for the others.

    Returns the loss, a scalar, and the logits of the classes, float32 (B, K), both without a graph.
    """
    in_a_part = part_size(recipe, accumulate or recipe.train.accumulate)
    of_all = batch.whole
    whole = of_all.weight if of_all is not None else total_weight(batch, task.class_weights)
    total = torch.zeros((), device=batch.labels.device)
    outputs = []
    places, sizes = torch.arange(len(batch.labels)), of_all.parts if of_all is not None else None
    parts = in_batches(places, in_a_part) if sizes is None else torch.split(places, list(sizes))
    divided = sizes is not None
    normalising = SyncBatchNorm() if divided and recipe.train.sync_batchnorm else contextlib.nullcontext()
    for rows in parts:
        part = batch if len(parts) == 1 else _rows(batch, int(rows[0]), int(rows[-1]) + 1)
        # What is compiled is compiled for whole parts; the odd last one runs as it is.
        with normalising:
            logits = task.network.training_logits(part.inputs, compiled=len(part.labels) == in_a_part)
        loss = _loss(logits, part, task.class_weights, recipe.loss.label_smoothing)
        if part is not batch or of_all is not None:
            loss = loss * (total_weight(part, task.class_weights) / whole)
        if of_all is not None and not of_all.counts:
            loss = loss * 0
        (scaler.scale(loss) if scaler is not None else loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        outputs.append(logits.detach()[:, : task.network.classes])
    return total, torch.cat(outputs)


def _rows(batch: TrainingBatch, begin: int, end: int) -> TrainingBatch:
    return TrainingBatch(
        batch.inputs[begin:end],
        batch.labels[begin:end],
        batch.partners[begin:end] if batch.partners is not None else None,
        batch.share[begin:end] if batch.share is not None else None,
        weights=batch.weights[begin:end] if batch.weights is not None else None,
    )


def _loss(logits: Tensor, batch: TrainingBatch, class_weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Mean cross-entropy over the batch, weighted by class and by what images count for; a mixed image's is the mixture
    of its two labels'."""
    if batch.partners is None and batch.weights is None:
        return F.cross_entropy(logits, batch.labels, weight=class_weights, label_smoothing=label_smoothing)

    def losses(labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=class_weights, label_smoothing=label_smoothing, reduction="none")

    each = losses(batch.labels)
    if batch.partners is not None and batch.share is not None:
        each = batch.share * each + (1 - batch.share) * losses(batch.partners)
    if batch.weights is not None:
        each = each * batch.weights
    return each.sum() / total_weight(batch, class_weights)
