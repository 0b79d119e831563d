"""Training whose steps are watched for waits, on any device: what the tests with and without a GPU share."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from cifarlab import machine
from cifarlab.build import make_task
from cifarlab.data.prepare import prepare
from cifarlab.recipe import make_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Progress, StopRequest, Stopwatch, train
from short_runs import Quiet, make_dataset, recipe

# By what they exercise: settings of a recipe.
SETTINGS = {
    "ex1": ["augment={crop_padding: 4, flip: random}", "schedule.name=one_cycle"],
    "airbench94": [
        "model={name: racing, widths: [16, 16, 16], whitening_bias: {epochs: 1}}",
        "optimizer={name: muon, rest: sgd, lr: 0.24, momentum: 0.6, ns_steps: 3, bias_lr: 2, head_lr: 20}",
        "augment={flip: alternating, translate: 2}",
        "loss.label_smoothing=0.2",
        "train.resolution=[[0, 24], [0.5, 32]]",
        "model.freeze_late=[[0.7, 2]]",
    ],
    "mixing": [
        "loss={mixup: 0.2, cutmix: 1.0, class_weights: balanced}",
        "optimizer={name: sgd, lr: 0.05, momentum: 0.9}",
    ],
    "streamed": ["data={memory: 1, workers: 0}", "augment.flip=random"],
    "frozen stages": ["model.freeze_stages=2", "augment={flip: random, views: 2}", "optimizer.name=adamw"],
    "policy": ["augment={policy: trivial_augment, brightness: 0.4, hue: 0.1, cutout: 8, erasing: 0.5}"],
    "tricks": [
        "train={accumulate: 2, clip_grad_norm: 1.0, ema: 0.9, batch_size: 64, epochs: 3}",
        "optimizer={name: lion, lr: 1e-3}",
        "model.freeze_backbone.epochs=1",
    ],
}


# Fields that a run would decide.
PLAIN = ["train.numerics={dtype: float32}", "train.batch_size=64", "evaluate.batch_size=500"]


def losses(
    settings: list[str],
    folder: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    *,
    begin: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> list[float]:
    """The loss of the epoch so far after each step, in fp32 and eager. begin, end: called around each step.

    The run is stopped before its end, and its checkpoints are not written. Muon's bf16 does not depend on the device.
    """
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    dataset = make_dataset(noise=0.3, train=400)  # 1.2 MB: streamed where `data.memory` is 1
    plan = make_recipe(recipe().to_dict(), [*PLAIN, *settings])
    steps = 15  # of 18
    stop = StopRequest()
    start = Stopwatch.start

    class Watching(Quiet):
        def due(self) -> bool:
            end()
            return True

        def progress(self, progress: Progress) -> None:
            super().progress(progress)
            if progress.step == steps:
                stop.signal = 2

    def started(self: Stopwatch) -> None:
        start(self)
        begin()

    monkeypatch.setattr(Stopwatch, "start", started)
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *_: None)
    display = Watching()
    task = make_task(plan, prepare(dataset, plan.data, plan.seed), device, None, lambda _: None)
    train(plan, task, RunFolder.create(folder, plan, datetime.now()), display, stop, time.time())
    monkeypatch.undo()
    assert [progress.step for progress in display.seen] == list(range(1, steps + 1))
    return [progress.loss for progress in display.seen]
