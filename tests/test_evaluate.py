"""Predictions where memory runs out: in smaller batches, and the same."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from cifarlab import experiment, machine
from cifarlab.build import make_task
from cifarlab.data.prepare import prepare
from cifarlab.errors import RunError
from cifarlab.evaluate import Predictions, Tta, predict
from cifarlab.recipe import Recipe
from cifarlab.task import Task
from short_runs import CPU, make_dataset, recipe

IMAGES = 23  # none of the batches divides it


@pytest.fixture
def gave_back(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Each time that memory is given back: whether nothing is being handled then that would hold it."""
    times: list[bool] = []
    monkeypatch.setattr(machine, "give_back_memory", lambda _: times.append(sys.exc_info() == (None, None, None)))
    return times


def made(*overrides: str) -> tuple[Recipe, Task]:
    plan = recipe("model={name: racing, widths: [4, 4, 4]}", *overrides)
    return plan, make_task(plan, prepare(make_dataset(train=60), plan.data, 0), CPU, None, lambda _: None)


def tried(model: nn.Module, most: int) -> list[int]:
    """Let a model run out of memory with more images than `most`; the sizes of the batches that it is given."""
    sizes: list[int] = []

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        assert len(sizes) < 100, "it tries for ever"
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.register_forward_pre_hook(refuse)
    return sizes


def predicted(task: Task, batch_size: int, tta: Tta = None) -> Predictions:
    samples = task.train[torch.arange(IMAGES).flip(0)]
    return predict(task.network, task.store, samples, task.pipeline, batch_size, tta=tta, seed=3, remember="some")


@pytest.mark.parametrize("tta", [None, "flip", 2])
def test_where_memory_runs_out_batches_are_halved_and_logits_are_those_of_small_ones(
    tta: Tta, gave_back: list[bool]
) -> None:
    _, task = made("augment={crop_padding: 4, flip: random}")
    small = predicted(task, 3, tta)
    task.network.model.train()
    views = 1 if tta is None else 2
    sizes = tried(task.network.rest, 4)
    found = predicted(task, 12, tta)
    assert sizes == [12, 6, *[3] * 7 * views, *[2] * views]
    for field in ("logits", "labels", "samples"):
        assert torch.equal(getattr(found, field), getattr(small, field))
    assert gave_back == [True, True]
    assert task.network.model.training


def test_what_frozen_stages_kept_before_memory_ran_out_is_of_use() -> None:
    """It runs out in the second batch, behind them: what they have of the first one is recalled."""
    _, task = made("model={name: racing, widths: [4, 4, 4], freeze_stages: 1, cache: float32}")
    frozen = task.network.frozen
    assert frozen is not None
    calls: list[int] = []

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(len(inputs[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    task.network.rest.register_forward_pre_hook(refuse)
    found = predicted(task, 8)
    assert calls == [8, 8, 4, 4, 4, 4, 4, 3]
    assert (frozen.computed, frozen.recalled) == (IMAGES, 16)
    assert torch.equal(found.logits, predicted(task, 4).logits)


def test_where_not_one_image_fits_it_is_said_and_any_other_error_is_not_tried_again(gave_back: list[bool]) -> None:
    plan, task = made()
    sizes = tried(task.network.rest, 0)
    with pytest.raises(RunError, match=r"^out of memory \(CUDA out of memory\. Tried"), experiment.explained(plan):
        predicted(task, 12)
    assert sizes == [12, 6, 3, 2, 1] and gave_back == [True] * 4

    def broken(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    task.network.rest._forward_pre_hooks.clear()
    task.network.rest.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes"):
        predicted(task, 12)
    assert len(gave_back) == 4
