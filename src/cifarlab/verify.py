"""Whether going on with an interrupted run gives what would have come: tried on the machine at hand, with a recipe."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifarlab.data.dataset import Dataset
from cifarlab.download import Report
from cifarlab.errors import RunError
from cifarlab.experiment import resume_experiment, run_experiment
from cifarlab.recipe import Recipe, make_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Progress, StopRequest

# So many epochs of so many steps: a stop after the first step, at an epoch's end and within one.
EPOCHS, STEPS = 2, 4
STOPS = (1, STEPS, STEPS + 2)
# Times; and how often frozen stages ran, which is more where what they remembered was lost.
_NOT_COMPARED = frozenset({"train_time", "wall_time", "epoch_began", "started", "seconds", "frozen"})


class _StopAt:
    """A display that shows nothing, and asks for the stop of the loop after a step."""

    def __init__(self, step: int | None) -> None:
        self._step = step
        self.stop = StopRequest()

    def due(self) -> bool:
        return True

    def progress(self, progress: Progress) -> None:
        if progress.step == self._step:
            self.stop.signal = 0

    def epoch(self, entry: dict[str, Any], epochs: float) -> None:
        pass

    def report(self, text: str) -> None:
        pass


def verify_resume(recipe: Recipe, dataset: Dataset, device: torch.device, report: Report) -> int:
    """Train a resolved recipe for a few steps straight, and again with interruptions; returns how many tensors agree.

    On a few images, and without the test set. Raises RunError, naming the first tensor or figure that differs, and what
    running raises.
    """
    with tempfile.TemporaryDirectory() as place:
        straight = _train(_shortened(recipe, dataset), dataset, Path(place) / "straight", device, ())
        report(f"numerics: {straight.recipe().train.numerics}")
        report(f"trained {EPOCHS * STEPS} steps")
        interrupted = _train(straight.recipe(), dataset, Path(place) / "interrupted", device, STOPS)
        report(f"trained them again, interrupted after step {', '.join(map(str, STOPS[:-1]))} and {STOPS[-1]}")
        states = [run.checkpoints()[-1] for run in (straight, interrupted)]
        one, other = (RunFolder(path.parent).load_checkpoint(path.name) for path in states)
        tensors = 0
        for name, value, again in _pairs("", one, other):
            if isinstance(value, Tensor) and isinstance(again, Tensor) and value.shape == again.shape:
                tensors += 1
                if not _same_bits(value, again):
                    apart = (value.double() - again.double()).abs().nan_to_num().max().item()
                    raise RunError(f"not equal: {name} differs by up to {apart:.3g} after {EPOCHS * STEPS} steps")
            elif value != again:
                raise RunError(f"not equal: {name} is {value!r} without interruption, {again!r} with")
    return tensors


def _shortened(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe on so few images that an epoch has STEPS steps, the last one smaller."""
    size = 64 if recipe.train.batch_size == "auto" else recipe.train.batch_size
    size = min(size, max(2, len(dataset.train) // (2 * STEPS)))
    values = [
        f"train.batch_size={size}", f"train.epochs={EPOCHS}", "train.checkpoint_every={epochs: 1}",
        f"train.accumulate={min(recipe.train.accumulate, size)}", "evaluate.test=false",
        f"data.limit={max(len(dataset.classes), STEPS * size - size // 2)}",
    ]  # fmt: skip
    return make_recipe(recipe.to_dict(), values, origin=f"recipe {recipe.name}")


def _train(recipe: Recipe, dataset: Dataset, runs: Path, device: torch.device, stops: tuple[int, ...]) -> RunFolder:
    run: RunFolder | None = None
    for step in (*stops, None):
        display = _StopAt(step)
        common: dict[str, Any] = {
            "device": device, "display": display, "stop": display.stop, "process_started": time.time(),
            "report": display.report,
        }  # fmt: skip
        if run is None:
            run = run_experiment(recipe, dataset, runs=runs, **common)
        else:
            run = resume_experiment(run.path, data_folder=None, dataset=dataset, **common)
    assert run is not None
    return run


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN, which a loss that is not known yet is, equals NaN."""
    first, second = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and torch.equal(first, second)


def _pairs(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two nested values side by side, by their names, but for times."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if key not in _NOT_COMPARED:
                yield from _pairs(f"{name}.{key}".removeprefix("."), one.get(key), other.get(key))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (mine, its) in enumerate(zip(one, other, strict=True)):
            yield from _pairs(f"{name}[{number}]", mine, its)
    else:
        yield name, one, other
