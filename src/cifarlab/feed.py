"""What each step trains on: images in order, augmented and mixed, this process's share of them.

A function of the recipe, the images, the step, and how far the run is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifarlab import distributed, machine
from cifarlab.board import grid_size
from cifarlab.data.augment import Draws, Pipeline
from cifarlab.data.batches import Batch, epoch_order, in_batches
from cifarlab.data.mixing import MixingDraws, draw_mixing, mix, mix_pairs
from cifarlab.features import CacheKey
from cifarlab.pace import Pace
from cifarlab.pruning import Pruned, Pruning
from cifarlab.recipe import Recipe
from cifarlab.task import Task

# On a GPU so many pixels are augmented at a time, for several steps where their batches are small: 2,048 images of
# 32x32, which are 25 MB, and some times as much on the way.
AUGMENTED_PIXELS = 2**21


class Whole(NamedTuple):
    """The batch of all processes, where the rows at hand are this one's share of it.

    images: how many it has. weight: what it counts for in a mean. parts: how many of the rows at hand each part has
    that it is computed in; None: it was too small to be divided, and all processes compute all of it. counts: whether
    what this process makes of it counts, as of such a batch it does in the first one only.
    """

    images: int
    weight: Tensor | int
    parts: tuple[int, ...] | None
    counts: bool


class TrainingBatch(NamedTuple):
    """inputs: what the part of the network that trains takes, float32 (B, …). labels: int64 (B,).

    partners: int64 (B,), the labels of the images mixed in, and share: float32 (B,), the weight of the own label; None
    where nothing is mixed. computed: shape of the images that frozen stages ran on to make the inputs, (B, 3, H, W);
    None where nothing is frozen apart, or all was recalled. samples: int64 (B,), on the CPU; None without
    `train.prune`. weights: float32 (B,), what an image counts for; None where each counts as one. whole: what the rows
    are a share of, where several processes train together.
    """

    inputs: Tensor
    labels: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None
    computed: torch.Size | None = None
    samples: Tensor | None = None
    weights: Tensor | None = None
    whole: Whole | None = None

    @property
    def images(self) -> int:
        """How many images the step is on, in all processes."""
        return self.whole.images if self.whole is not None else len(self.labels)


def make_batches(
    recipe: Recipe, task: Task, step: int, pace: Pace, pruning: Pruning | None = None
) -> Iterator[TrainingBatch]:
    """What each step trains on, from `step` on, without end: images augmented and mixed, frozen stages behind them.

    pruning: asked at the beginning of each epoch, when the losses of all steps before must be known to it.
    """
    steps_per_epoch = len(in_batches(task.train, recipe.train.batch))
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        order = epoch_order(task.train, recipe.seed, epoch)
        share_done = pace.position(step) / pace.total_steps
        pruned = pruning.epoch(order, epoch, steps=steps_per_epoch, share=share_done) if pruning else None
        whole = in_batches(order, recipe.train.batch) if pruned is None else pruned.batches
        dealt = [deal(recipe, task, samples, number) for number, samples in enumerate(whole[done:], step)]
        parts = [share.wanted for share in dealt]
        draws = task.pipeline.draw(recipe.seed, epoch, len(task.store))
        groups = _augmented_together(task, parts, step, pace)
        of_step = iter(dealt)
        for group, together in zip(groups, task.store.in_parts([torch.cat(group) for group in groups]), strict=True):
            pixels: Sequence[Tensor | None] = [None]
            if len(group) > 1:
                pipeline = pipeline_at(task, step, pace)
                images = pipeline.train(together.pixels, together.samples, draws)
                pixels = torch.split(images, [len(part) for part in group])
            for found, augmented in zip(_apart(together, group), pixels, strict=True):
                share = next(of_step)
                batch = make_batch(recipe, task, found, draws, step, pace, steps_per_epoch, augmented, share)
                if pruning is not None:
                    own = found.samples[: len(batch.labels)]
                    weights = machine.upload(pruned.weights[own], task.device) if pruned else None
                    batch = batch._replace(samples=own, weights=weights)
                if distributed.place().size > 1:
                    size = pipeline_at(task, step, pace).output_size
                    batch = batch._replace(whole=_whole(recipe, task, share, size, step, pruned))
                yield batch
                step += 1


class Dealt(NamedTuple):
    """What a process is to do of a batch. samples: all of it, int64 (B,). wanted: the samples whose images it takes.

    rows: int64 (b,), its places in the batch, and parts: how many of them are in each part that the batch is computed
    in; None: all of it. Where images are mixed, the partners of its rows are wanted too, after them.
    """

    samples: Tensor
    wanted: Tensor
    rows: Tensor | None = None
    parts: tuple[int, ...] | None = None


def deal(recipe: Recipe, task: Task, samples: Tensor, step: int) -> Dealt:
    """This process's share of a batch, int64 (B,), such that all have about the same, and each part of it is whole.

    Which ones doesn't matter to what is computed. Where frozen stages are cached, an image always comes to the same
    process, which remembers it. A batch of which somebody would have less than two images of a part (BatchNorm takes no
    single one) is everybody's.
    """
    place = distributed.place()
    if place.size == 1:
        return Dealt(samples, samples)
    rows: list[Tensor] = []
    for part in in_batches(torch.arange(len(samples)), part_size(recipe, recipe.train.accumulate)):
        if task.network.frozen is not None:
            owners = samples[part] % place.size
            shares = [part[owners == rank] for rank in range(place.size)]
        else:
            shares = list(torch.tensor_split(part, place.size))
        if min(map(len, shares)) < 2:
            return Dealt(samples, samples)
        rows.append(shares[place.rank])
    wanted = own = torch.cat(rows)
    if recipe.loss.mixup or recipe.loss.cutmix:
        wanted = torch.cat([own, _mixing(recipe, len(samples), (1, 1), step).order[own]])
    return Dealt(samples, samples[wanted], own, tuple(map(len, rows)))


def _owned(task: Task) -> int:
    """How many of the training images come to this process, where each always comes to the same."""
    place = distributed.place()
    return len(task.train) if place.size == 1 else int((task.train % place.size == place.rank).sum())


def _mixing(recipe: Recipe, count: int, size: tuple[int, int], step: int) -> MixingDraws:
    section = recipe.loss
    return draw_mixing(count, size, mixup=section.mixup, cutmix=section.cutmix, seed=recipe.seed, step=step)


def _whole(recipe: Recipe, task: Task, share: Dealt, size: tuple[int, int], step: int, pruned: Pruned | None) -> Whole:
    """What the batch that a share is of counts for: known without asking, as each process has all labels."""
    counts = distributed.is_first() or share.rows is not None
    if task.class_weights is None and pruned is None:
        return Whole(len(share.samples), len(share.samples), share.parts, counts)
    labels = task.store.labels[machine.upload(share.samples, task.device)]
    weights = machine.upload(pruned.weights[share.samples], task.device) if pruned is not None else None
    batch = TrainingBatch(labels, labels, weights=weights)
    if task.class_weights is not None and (recipe.loss.mixup or recipe.loss.cutmix):
        drawn = _mixing(recipe, len(labels), size, step)
        order, own = (machine.upload(values, task.device) for values in (drawn.order, drawn.share))
        batch = batch._replace(partners=labels[order], share=own)
    return Whole(len(labels), total_weight(batch, task.class_weights), share.parts, counts)


def first_pictures(recipe: Recipe, task: Task) -> NDArray[np.uint8]:
    """The first images of the first step, augmented and mixed, as many as a grid has: uint8 (N, 3, H, W).

    Functions of the recipe and the images, so they are the same whenever the run goes on, in however many processes.
    """
    _, pipeline = task.pipelines[0]
    samples = in_batches(epoch_order(task.train, recipe.seed, 0), recipe.train.batch)[0]
    rows = torch.arange(min(len(samples), grid_size(*pipeline.output_size)))
    mixing = None
    wanted = rows
    if task.network.frozen is None and (recipe.loss.mixup or recipe.loss.cutmix):
        mixing = _mixing(recipe, len(samples), pipeline.output_size, 0)
        wanted = torch.cat([rows, mixing.order[rows]])
    found = task.store.take(samples[wanted])
    images = pipeline.train(found.pixels, found.samples, task.pipeline.draw(recipe.seed, 0, len(task.store)))
    if mixing is not None:
        own, others = images.chunk(2)
        images = mix_pairs(own, others, found.labels[len(rows) :], mixing.of(rows)).pixels
    return pipeline.shown(images).cpu().numpy()


def pipeline_at(task: Task, step: int, pace: Pace) -> Pipeline:
    position = pace.position(step)
    return next(pipeline for share, pipeline in reversed(task.pipelines) if position >= share * pace.total_steps)


def _augmented_together(task: Task, parts: Sequence[Tensor], step: int, pace: Pace) -> list[list[Tensor]]:
    """The parts of an epoch from `step` on, in groups whose images are augmented at a time.

    On a GPU a small batch's augmentation takes longer to launch than to compute, as often as it is launched. What
    becomes of an image does not depend on the others.
    """
    if task.device.type != "cuda" or task.network.frozen is not None or not task.store.resident:
        return [[part] for part in parts]
    groups: list[list[Tensor]] = []
    before, room = None, 0
    for number, part in enumerate(parts, step):
        pipeline = pipeline_at(task, number, pace)
        if pipeline is not before or len(part) > room:
            groups.append([])
            room = AUGMENTED_PIXELS // math.prod(pipeline.output_size)
        groups[-1].append(part)
        before, room = pipeline, room - len(part)
    return groups


def _apart(whole: Batch, group: Sequence[Tensor]) -> list[Batch]:
    """What was found of a group, part by part."""
    sizes = [len(part) for part in group]
    pixels, labels = torch.split(whole.pixels, sizes), torch.split(whole.labels, sizes)
    return [Batch(*found) for found in zip(pixels, labels, group, strict=True)]


def make_batch(
    recipe: Recipe,
    task: Task,
    found: Batch,
    draws: Draws,
    step: int,
    pace: Pace,
    steps_per_epoch: int,
    augmented: Tensor | None = None,
    share: Dealt | None = None,
) -> TrainingBatch:
    """What a step trains on, of the images that it found. draws: those of the step's epoch. augmented: those images, if
    that is done already. share: which of a batch's they are; None: all."""
    pipeline = pipeline_at(task, step, pace)
    if (frozen := task.network.frozen) is not None:
        cycle = recipe.augment.cycle
        assert cycle is not None  # else nothing comes again, and frozen stages are not apart
        again = step + cycle * steps_per_epoch
        computed_before = frozen.computed
        undivided = share is not None and share.rows is None and distributed.place().size > 1
        inputs = frozen(
            partial(pipeline.train, found.pixels, found.samples, draws),
            found.samples,
            None if undivided else CacheKey("train", pipeline.output_size[0], step // steps_per_epoch % cycle),
            keep=pace.position(again) < pace.total_steps and pipeline_at(task, again, pace) is pipeline,
            images=len(task.store),
            rows=_owned(task),
        )
        computed = torch.Size((len(found.labels), 3, *pipeline.output_size))
        return TrainingBatch(inputs, found.labels, computed=computed if frozen.computed > computed_before else None)
    pixels = augmented if augmented is not None else pipeline.train(found.pixels, found.samples, draws)
    if not (recipe.loss.mixup or recipe.loss.cutmix):
        return TrainingBatch(pixels, found.labels)
    labels = found.labels
    if share is None or share.rows is None:
        loss = recipe.loss
        mixed = mix(pixels, labels, mixup=loss.mixup, cutmix=loss.cutmix, seed=recipe.seed, step=step)
    else:
        (pixels, others), (labels, partners) = pixels.chunk(2), labels.chunk(2)
        drawn = _mixing(recipe, len(share.samples), pipeline.output_size, step)
        mixed = mix_pairs(pixels, others, partners, drawn.of(share.rows))
    return TrainingBatch(mixed.pixels, labels, mixed.partners, mixed.share)


def part_size(recipe: Recipe, accumulate: int) -> int:
    return math.ceil(recipe.train.batch / accumulate)


def total_weight(batch: TrainingBatch, class_weights: Tensor | None) -> Tensor | int:
    """What a batch counts for in a mean: its images, or the sum of their class weights, times their own weights."""
    if class_weights is None:
        return len(batch.labels) if batch.weights is None else batch.weights.sum()
    own = class_weights[batch.labels]
    if batch.partners is not None and batch.share is not None:
        own = batch.share * own + (1 - batch.share) * class_weights[batch.partners]
    return (own if batch.weights is None else own * batch.weights).sum()
