"""Short runs of EX-1 on images made here, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifarlab import experiment, files, flops, plots
from cifarlab.data.dataset import Dataset, Images, UInt8Array
from cifarlab.data.prepare import Prepared
from cifarlab.recipe import Recipe, load_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Progress, StopRequest

CPU = torch.device("cpu")
SMALL = ["model.name=ex1", "train.batch_size=32", "train.epochs=3", "train.checkpoint_every=null"]


class Quiet:
    """A display that looks after every step, and can do something then."""

    def __init__(self, action: Any = None) -> None:
        self.seen: list[Progress] = []
        self.said: list[str] = []
        self.action = action

    def due(self) -> bool:
        return True

    def progress(self, progress: Progress) -> None:
        self.seen.append(progress)
        if self.action:
            self.action(progress)

    def epoch(self, entry: dict[str, Any], epochs: float) -> None:
        pass

    def report(self, text: str) -> None:
        self.said.append(text)


def make_dataset(noise: float = 0.0, train: int = 200) -> Dataset:
    """Four classes that differ by where a bright patch is; a share `noise` of the labels is drawn at random."""
    generator = np.random.default_rng(0)

    def part(count: int) -> Images:
        labels = np.arange(count) % 4
        pixels = generator.integers(0, 120, (count, 3, 32, 32), dtype=np.uint8)
        for place, label in enumerate(labels):
            row, column = divmod(int(label), 2)
            pixels[place, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 60
        labels = np.where(generator.random(count) < noise, generator.integers(0, 4, count), labels)
        return Images(pixels, labels.astype(np.int64))

    return Dataset("digits", tuple("abcd"), part(train), None, part(50), "made here")


def normalised(pixels: UInt8Array, data: Prepared) -> torch.Tensor:
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Has runs draw nothing: that takes longer than a short run trains. What is drawn is in test_plots.py."""

    def draw(path: Path, *_: Any, **__: Any) -> None:
        files.write_bytes(path, b"a picture")

    for name in ("loss_curve", "accuracy_curve", "confusion_matrix"):
        patch.setattr(plots, name, draw)


# FLOPs of what was counted before, by what it is printed as, its input and what of it trains.
COUNTED: dict[tuple[str, tuple[int, ...], tuple[bool, ...]], int] = {}
_count = flops.per_image


def _counted_once(module: nn.Module, shape: Sequence[int], trained: Sequence[bool] | None = None) -> int:
    flags = trained if trained is not None else [parameter.requires_grad for parameter in module.parameters()]
    kind = (repr(module), tuple(shape), tuple(flags))
    if kind not in COUNTED:
        COUNTED[kind] = _count(module, shape, trained)
    return COUNTED[kind]


def run(
    tmp_path: Path,
    *overrides: str,
    display: Quiet | None = None,
    stop: StopRequest | None = None,
    dataset: Dataset | None = None,
    profile: bool = False,
    histograms: bool = False,
    pictures: bool = False,
    monkeypatch: pytest.MonkeyPatch,
) -> RunFolder:
    if not pictures:
        without_pictures(monkeypatch)
    monkeypatch.setattr(flops, "per_image", _counted_once)  # counting takes longer than three steps
    found = dataset or make_dataset()
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: found)
    return experiment.run_experiment(
        recipe(*overrides),
        found,
        runs=tmp_path,
        device=CPU,
        display=display or Quiet(),
        stop=stop or StopRequest(),
        process_started=0.0,
        report=lambda _: None,
        profile=profile,
        histograms=histograms,
    )


def recipe(*overrides: str) -> Recipe:
    return load_recipe("ex1", [*SMALL, *overrides]).resolved(dataset="digits", seed=0)


def without_times(log: dict[str, Any]) -> dict[str, Any]:
    times = {
        "started",
        "finished",
        "train_time",
        "wall_time",
        "images_per_second",
        "flops_per_second",
        "peak_memory",
        "frozen_stages",  # how often they ran
        "flops",  # of that as well
        "test_time",
        "total_time",
    }
    kept = {key: value for key, value in log.items() if key not in times}
    if "epochs" in kept:
        kept["epochs"] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in kept["epochs"]]
    return kept
