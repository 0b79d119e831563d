"""The learning-rate test: the curve is that of the training it stands for, and what is read off it is where it says."""

from __future__ import annotations

import copy
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from cifarlab import choices
from cifarlab.build import make_task
from cifarlab.data.prepare import prepare
from cifarlab.errors import DivergedError, UsageError
from cifarlab.feed import make_batches
from cifarlab.lr_find import learning_rate_test, read_curve
from cifarlab.models.chain import stage_ids
from cifarlab.pace import BySteps
from cifarlab.plots import learning_rate_curve
from cifarlab.recipe import load_recipe
from cifarlab.task import Task
from command import call
from short_runs import CPU, make_dataset, recipe

SGD = ("optimizer.name=sgd", "optimizer.lr=0.5", "optimizer.momentum=0", "optimizer.weight_decay=0")


def a_task(*overrides: str) -> tuple[Any, Task]:
    plan = recipe(*overrides)
    return plan, make_task(plan, prepare(make_dataset(), plan.data, 0), CPU, None, lambda _: None)


def quiet(step: int, rate: float, loss: float) -> None:
    pass


@pytest.mark.parametrize("norm", [math.inf, 0.5])
def test_the_curve_is_that_of_training_with_a_rate_that_rises_by_the_same_factor(norm: float) -> None:
    """Against a loop written out: SGD's update and clipping by hand, fastai's smoothing by its formula."""
    plan, task = a_task(*SGD, *([f"train.clip_grad_norm={norm}"] if norm < math.inf else []))
    model = copy.deepcopy(task.network.model).train()
    told: list[tuple[int, float, float]] = []
    test = learning_rate_test(plan, task, low=1e-4, high=1e-1, steps=12, progress=lambda *all: told.append(all))
    rates = np.geomspace(1e-4, 1e-1, 12)
    losses, average = [], 0.0
    batches = make_batches(plan, task, 0, BySteps(12))
    for step, rate in enumerate(rates):
        batch = next(batches)
        loss = F.cross_entropy(model(batch.inputs), batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        scale = min(1.0, norm / math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(float(rate) * scale * gradient)
        average = 0.9 * average + 0.1 * loss.item()
        losses.append(average / (1 - 0.9 ** (step + 1)))
    np.testing.assert_allclose(test.rates, rates, rtol=1e-9)
    np.testing.assert_allclose(test.losses, losses, rtol=1e-4)
    assert told == list(zip(range(1, 13), test.rates, test.losses, strict=True))


def test_it_ends_where_the_loss_explodes_and_keeps_only_what_came_before() -> None:
    plan, task = a_task(*SGD)
    test = learning_rate_test(plan, task, low=1e-3, high=1e9, steps=30, progress=quiet)
    assert 2 < len(test.rates) < 30
    assert all(map(math.isfinite, test.losses)) and max(test.losses) <= 4 * min(test.losses)


def test_the_steepest_fall_and_a_tenth_of_the_lowest_are_found() -> None:
    """A loss that falls as a logistic curve over the rate's logarithm, steepest at 1e-3, and rises from 1e-1 on."""
    rates = np.logspace(-6, 0, 121)
    places = np.log10(rates)
    losses = 2 - 1 / (1 + np.exp(-4 * (places + 3))) + np.where(places > -1, (places + 1) * 3, 0)
    steepest, tenth = read_curve(rates.tolist(), losses.tolist())
    assert steepest == pytest.approx(1e-3) and tenth == pytest.approx(1e-2)


def test_a_rise_after_the_lowest_loss_is_not_read() -> None:
    """Behind the lowest loss it may jump up and fall again, more steeply than ever before."""
    rates = np.logspace(-4, 0, 9).tolist()
    losses = [2.0, 1.9, 1.7, 1.6, 1.55, 9.0, 2.0, 8.0, 9.0]
    assert read_curve(rates, losses) == pytest.approx((rates[1], rates[4] / 10))


def test_where_the_loss_never_falls_nothing_is_read() -> None:
    assert read_curve([1e-3, 1e-2, 1e-1], [1.0, 1.1, 1.2]) == (None, None)


@pytest.mark.parametrize(
    ("low", "high", "steps", "sentence"),
    [
        (0, 1, 20, "--from 0 --to 1"),
        (0.1, math.inf, 20, "--to inf"),
        (0.1, 0.1, 20, "must rise"),
        (1e-3, 1, 9, "--steps 9 is too few"),
    ],
)
def test_a_range_that_cannot_be_is_refused(low: float, high: float, steps: int, sentence: str) -> None:
    plan, task = a_task()
    with pytest.raises(UsageError, match=sentence):
        learning_rate_test(plan, task, low=low, high=high, steps=steps, progress=quiet)


def test_a_loss_that_is_not_finite_from_the_start_is_refused() -> None:
    plan, task = a_task()
    torch.nn.init.constant_(task.network.model.get_parameter("head.bias"), math.nan)
    with pytest.raises(DivergedError, match=r"at the first step, with a learning rate of 0\.001"):
        learning_rate_test(plan, task, low=1e-3, high=1, steps=20, progress=quiet)


def test_it_tests_what_trains_in_the_end() -> None:
    """A backbone that pauses first is part of it, frozen stages are not, and there is one resolution, the last."""
    settings = ["model={name: timm:test_efficientnet, freeze_stages: 2, freeze_backbone: {epochs: 1}}"]
    plan, task = a_task(*settings, "train.resolution=[[0, 32], [0.5, 48]]")
    before = copy.deepcopy(task.network.model.state_dict())
    sides: set[int] = set()
    task.network.model.register_forward_pre_hook(lambda module, inputs: sides.add(inputs[0].shape[2]))
    frozen = task.network.frozen
    assert frozen is not None
    frozen.front.register_forward_pre_hook(lambda module, inputs: sides.add(inputs[0].shape[2]))
    learning_rate_test(plan, task, low=1e-3, high=1e-1, steps=10, progress=quiet)
    assert sides == {48}
    after = task.network.model.state_dict()
    stages = stage_ids(task.network.model)
    assert stages is not None
    changed = {stages[name] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == set(range(2, max(stages.values()) + 1))  # statistics of BatchNorm too


def test_the_picture_has_the_curve_and_the_steepest_place(tmp_path: Path, figures: list[Figure]) -> None:
    rates, losses = [1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.5, 1.0, 1.2]
    learning_rate_curve(tmp_path / "a.png", rates, losses, 1e-3, title="ex1 on digits")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert {"1e-04", "1e-03", "1e-02", "1e-01"} <= {label.get_text() for label in axes.get_xticklabels()}
    curve, mark = axes.get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == (rates, losses)  # type: ignore[arg-type]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1e-3], [1.5])  # type: ignore[arg-type]
    assert "1.0e-03" in axes.get_legend().get_texts()[0].get_text()  # type: ignore[union-attr]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_names_a_rate_and_draws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "curve.png"
    arguments: list[object] = ["lr-find", "ex1", "--dataset", "digits", "--set", "train.batch_size=64"]
    arguments += ["--set", "optimizer.head_lr=0.01", "--steps", 20, "--out", out, "--data", tmp_path, "--device", "cpu"]
    code, text, err = call(capsys, monkeypatch, *arguments)
    assert (code, err) == (0, "")
    assert "the loss falls fastest at a learning rate of " in text and f"picture: {out}" in text
    command = shlex.split(text.partition("to use it: ")[2].partition("\n")[0])
    assert command[:5] == ["cifarlab", "run", "ex1", "--dataset", "digits"]
    assert command[5:11] == ["--data", str(tmp_path), "--device", "cpu", "--set", "train.batch_size=64"]
    rates = dict(word.split("=") for word in command[12::2])
    assert 1e-6 < float(rates["optimizer.lr"]) < 1
    # EX-1's rate is 1e-3, and the head's rises with it.
    assert float(rates["optimizer.head_lr"]) == pytest.approx(10 * float(rates["optimizer.lr"]), rel=0.1)
    assert out.read_bytes().startswith(b"\x89PNG")
    code, _, err = call(capsys, monkeypatch, *arguments, "--from", 1)
    assert code == 2 and "--from 1 --to 1" in err and err.count("\n") == 1


def test_a_batch_size_that_was_found_goes_with_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choices, "_rate_of_size", lambda recipe, *_: float(min(recipe.train.batch, 64)))
    arguments: list[object] = ["lr-find", "ex1", "--dataset", "digits", "--set", "train.batch_size=auto"]
    code, text, err = call(capsys, monkeypatch, *arguments, "--steps", 10, "--out", tmp_path / "curve.png", "--to", 0.1)
    assert (code, err) == (0, "")
    command = shlex.split(text.partition("to use it: ")[2].partition("\n")[0])
    assert command[-1] == "train.batch_size=64"
    assert "--data" not in command and "--device" not in command  # which weren't given
    # A run with it neither looks for a size again nor scales the rate.
    plan = load_recipe("ex1", command[6::2])
    assert plan.train.batch_size == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--from", 2], "--from 2 --to 1"), (["--steps", 3], "--steps 3"), (["--out", "."], "--out . is a folder")],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[object], said: str
) -> None:
    code, _, err = call(capsys, monkeypatch, "lr-find", "ex1", "--data", "nowhere", *options)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_step_that_batchnorm_refuses_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments: list[object] = ["lr-find", "ex1", "--dataset", "digits", "--out", tmp_path / "curve.png"]
    for setting in ("data.limit=20", "model.name=efficientnet_lite0", "train.batch_size=4", "train.accumulate=4"):
        arguments += ["--set", setting]
    code, _, err = call(capsys, monkeypatch, *arguments)
    assert code == 4 and "too little for the BatchNorm of 'efficientnet_lite0'" in err and err.count("\n") == 1
