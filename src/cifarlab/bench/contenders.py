"""The loops that are compared. Each is made in a process of its own, and then asked for one round after the other.

ours                        cifarlab's loop, as `cifarlab run` calls it: batches, augmentation, schedule, all of it
ceiling                     the same model, optimizer, numerics and memory settings, on one batch that never changes
standard 0, 2, 4 workers    torchvision's transforms per image on PIL images, a DataLoader, torch's own defaults
fastai, lightning           the same images and transforms in their own training loops, with their own defaults

"ours without huge_pages" and "ceiling without huge_pages" are the first two in a process that is made ready without one
of machine.SETTINGS.

What the peers are given is the model, the kind of optimizer with its learning rate and decay, and the transforms that
resize, crop and flip; what else a recipe asks for (mixing, moving averages, frozen stages) they go without.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

# Takes (steps that are not timed, steps that are) and returns the seconds that the latter took.
Round = Callable[[tuple[int, int]], float]

PEERS = ("standard 0", "standard 2", "standard 4", "fastai", "lightning")


class Job(NamedTuple):
    """What is measured. recipe: decided, as YAML. data: where CIFAR's files are. device: as `--device` has it.

    seconds: about how long a round is to take; of it the first quarter is not timed.
    """

    recipe: str
    data: Path | None
    device: str
    batch_size: int
    seconds: float = 3.0


def available() -> list[str]:
    """The contenders that are installed."""
    installed = {name: importlib.util.find_spec(name) is not None for name in ("fastai", "lightning")}
    return ["ours", "ceiling", *(name for name in PEERS if installed.get(name, True))]


def make(name: str, job: Job) -> Round:
    name, _, setting = name.partition(" without ")
    without = [setting] if setting else []
    match name:
        case "ours":
            return _ours(job, without)
        case "ceiling":
            return _ceiling(job, without)
        case "fastai":
            return _fastai(job)
        case "lightning":
            return _lightning(job)
    return _standard(job, workers=int(name.removeprefix("standard ")))


class _Clock:
    """Told after each step; knows when those that count began, and when they are over."""

    def __init__(self, steps: tuple[int, int], synchronize: Callable[[], None]) -> None:
        self._warm, self._timed = steps
        self._synchronize = synchronize
        self._step = 0
        self._began = 0.0
        self.seconds: float | None = None

    def tick(self) -> bool:
        """One more step is done; returns whether that was the last."""
        self._step += 1
        if self._step == self._warm:
            self._synchronize()
            self._began = time.perf_counter()
        if self._step == self._warm + self._timed:
            self._synchronize()
            self.seconds = time.perf_counter() - self._began
        return self.seconds is not None

    def time(self) -> float:
        """Seconds that the steps took which count."""
        assert self.seconds is not None, "the loop ended before all steps were done"
        return self.seconds


# --- ours ---------------------------------------------------------------------------------------


def _ready(job: Job, without: list[str]) -> tuple[Any, Any, Any, Any]:
    """Recipe, device, prepared data and weights, in a process that is made ready as a run's is, but for `without`."""
    from cifarlab import machine

    machine.prepare(without=without)
    from cifarlab.models.weights import find_weights

    recipe, device, prepared = _loaded(job)
    return recipe, device, prepared, find_weights(recipe.model, _quiet)


def _loaded(job: Job) -> tuple[Any, Any, Any]:
    """Recipe, device and prepared data."""
    from cifarlab import machine
    from cifarlab.data.prepare import prepare
    from cifarlab.experiment import load
    from cifarlab.recipe import make_recipe, parse_yaml

    recipe = make_recipe(parse_yaml(job.recipe, "recipe"))
    return recipe, machine.choose_device(job.device), prepare(load(recipe, job.data, _quiet), recipe.data, recipe.seed)


def _quiet(text: str) -> None:
    pass


def _ours(job: Job, without: list[str]) -> Round:
    from cifarlab import machine
    from cifarlab.build import make_task
    from cifarlab.rundir import RunFolder
    from cifarlab.train import StopRequest, train

    recipe, device, prepared, weights = _ready(job, without)

    class Display:
        """The loop asks it after each step whether it wants to look: that is when a step is over."""

        def __init__(self, clock: _Clock, stop: StopRequest) -> None:
            self.clock, self.stop = clock, stop

        def due(self) -> bool:
            if self.clock.tick():
                self.stop.signal = 2
            return False

        def progress(self, progress: Any) -> None: ...

        def epoch(self, entry: dict[str, Any], epochs: float) -> None: ...

        def report(self, text: str) -> None: ...

    def one_round(steps: tuple[int, int]) -> float:
        stop = StopRequest()
        clock = _Clock(steps, lambda: machine.synchronize(device))
        task = make_task(recipe, prepared, device, weights, _quiet)
        with tempfile.TemporaryDirectory(prefix="cifarlab-bench-") as folder:
            run = RunFolder.create(Path(folder), recipe, datetime.now())
            train(recipe, task, run, Display(clock, stop), stop, time.time())
        return clock.time()

    return one_round


def _ceiling(job: Job, without: list[str]) -> Round:
    from cifarlab import machine
    from cifarlab.choices import measured_step

    recipe, device, prepared, weights = _ready(job, without)
    step = measured_step(recipe, prepared, device, weights, frozen_batch=True)

    def one_round(steps: tuple[int, int]) -> float:
        clock = _Clock(steps, lambda: machine.synchronize(device))
        while not clock.tick():
            step.run()
        return clock.time()

    return one_round


# --- peers --------------------------------------------------------------------------------------


class _Pictures:
    """A map-style dataset of (transformed PIL image, label); of this module, so that worker processes can have it."""

    def __init__(self, pixels: Any, labels: Any, index: Any, transform: Any) -> None:
        self.pixels, self.labels, self.index, self.transform = pixels, labels, index, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        from PIL import Image

        at = self.index[place]
        return self.transform(Image.fromarray(self.pixels[at].transpose(1, 2, 0))), int(self.labels[at])


class _Peer:
    """What the peers have in common: the images as PIL, the transforms, the model, the optimizer. torch's defaults."""

    def __init__(self, job: Job) -> None:
        import torch
        from torchvision.transforms import v2

        from cifarlab.models import build_model

        self.recipe, self.device, prepared = _loaded(job)
        self.pixels, self.labels = prepared.train.images.pixels, prepared.train.images.labels
        self.index = prepared.train.index
        self.classes = prepared.classes
        self.side = self.recipe.train.last_resolution or self.pixels.shape[2]
        transforms: list[Any] = []
        if self.recipe.train.last_resolution:
            transforms.append(v2.Resize((self.side, self.side), antialias=True))
        if padding := self.recipe.augment.crop_padding or self.recipe.augment.translate:
            transforms.append(v2.RandomCrop(self.side, padding=padding))
        if self.recipe.augment.flip:
            transforms.append(v2.RandomHorizontalFlip())
        transforms += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(prepared.mean, prepared.std)]
        self.transform = v2.Compose(transforms)
        self.model = build_model(self.recipe.model, classes=len(self.classes), size=(self.side, self.side), seed=0)

    def optimizer(self, parameters: Any) -> Any:
        """Of the recipe's kind, with torch's defaults; AdamW for the kinds that torch has not."""
        import torch

        section = self.recipe.optimizer
        decay = section.weight_decay
        if section.name == "sgd":
            return torch.optim.SGD(
                parameters, section.lr, momentum=section.momentum, nesterov=section.nesterov, weight_decay=decay
            )
        kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}.get(section.name, torch.optim.AdamW)
        return kind(parameters, section.lr, weight_decay=decay)

    def images(self, transform: Any) -> Any:
        """A map-style dataset of (image, label)."""
        return _Pictures(self.pixels, self.labels, self.index, transform)

    def loader(self, workers: int) -> Any:
        from torch.utils.data import DataLoader

        # What a plain script has on Linux; a spawned process, as this is one, would spawn.
        fork = workers and sys.platform == "linux"
        return DataLoader(
            self.images(self.transform),
            self.recipe.train.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            multiprocessing_context="fork" if fork else None,
        )

    def clock(self, steps: tuple[int, int]) -> _Clock:
        from cifarlab import machine

        return _Clock(steps, lambda: machine.synchronize(self.device))


def _standard(job: Job, workers: int) -> Round:
    from torch.nn import functional as F

    peer = _Peer(job)
    model = peer.model.to(peer.device)
    optimizer = peer.optimizer(model.parameters())

    def endless() -> Iterator[Any]:
        loader = peer.loader(workers)
        while True:
            yield from loader

    batches = endless()

    def one_round(steps: tuple[int, int]) -> float:
        clock = peer.clock(steps)
        done = False
        while not done:
            images, labels = next(batches)
            loss = F.cross_entropy(model(images.to(peer.device)), labels.to(peer.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()
            done = clock.tick()
        if workers:
            time.sleep(1.0)  # for the workers to fill their queue again: what it lends one round it owes to no other
        return clock.time()

    return one_round


def _fastai(job: Job) -> Round:
    import fastai.callback.progress  # noqa: F401 (it gives learners their `no_bar`)
    from fastai.callback.core import Callback, CancelFitException
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from torch.nn import functional as F

    peer = _Peer(job)
    loaders = DataLoaders(peer.loader(2), peer.loader(2), device=peer.device)

    def one_round(steps: tuple[int, int]) -> float:
        clock = peer.clock(steps)

        class Timer(Callback):  # type: ignore[misc]
            def after_batch(self) -> None:
                if clock.tick():
                    raise CancelFitException

        learner = Learner(loaders, peer.model, loss_func=F.cross_entropy, cbs=[Timer()])
        with contextlib.redirect_stdout(io.StringIO()), learner.no_bar():
            learner.fit(1000, peer.recipe.optimizer.lr)
        return clock.time()

    return one_round


def _lightning(job: Job) -> Round:
    import logging
    import warnings

    import lightning
    from torch.nn import functional as F

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    peer = _Peer(job)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = peer.model

        def training_step(self, batch: Any, number: int) -> Any:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return peer.optimizer(self.parameters())

    module = Module()

    def one_round(steps: tuple[int, int]) -> float:
        clock = peer.clock(steps)

        class Timer(lightning.Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if clock.tick():
                    trainer.should_stop = True

        trainer = lightning.Trainer(
            accelerator="cpu" if peer.device.type == "cpu" else "gpu",
            devices=1 if peer.device.type == "cpu" else [int(str(peer.device).partition(":")[2] or 0)],
            max_epochs=1000,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Timer()],
        )
        trainer.fit(module, peer.loader(2))
        return clock.time()

    return one_round
