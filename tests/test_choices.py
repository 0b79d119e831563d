"""What a recipe leaves to the machine: batch sizes by a table of speeds, and that a run writes down what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cifarlab import choices, experiment, files, machine, numerics, remembered, training_step
from cifarlab.build import make_task
from cifarlab.data.prepare import prepare
from cifarlab.errors import RecipeError, RunError
from cifarlab.models import build_model
from cifarlab.models.chain import head_parameters
from cifarlab.models.weights import find_weights
from cifarlab.numerics import Step, Trial
from cifarlab.recipe import load_recipe, make_recipe
from cifarlab.recipe_sections import NumericsChoice
from short_runs import CPU, SMALL, make_dataset, run

SATURATES = {32: 100.0, 64: 180.0, 128: 250.0, 256: 258.0, 512: 260.0, 1024: 261.0}


def choose(
    monkeypatch: pytest.MonkeyPatch, rates: Mapping[int, float | None], *overrides: str, images: int = 50_000
) -> tuple[Any, list[int]]:
    """The recipe with its batch size decided by a table of images per second, and the sizes that were tried."""
    asked: list[int] = []

    def rate(recipe: Any, *_: Any) -> float | None:
        asked.append(recipe.train.batch)
        return rates[recipe.train.batch]

    monkeypatch.setattr(choices, "_rate_of_size", rate)
    prepared: Any = SimpleNamespace(train=range(images))
    recipe = load_recipe("ex1", ["train.batch_size=auto", *overrides])
    monkeypatch.setattr(choices, "_key", lambda *_: {})
    monkeypatch.setattr(remembered, "recall", lambda _: None)
    monkeypatch.setattr(remembered, "remember", lambda *_: None)
    chosen, tried = choices._choose_batch_size(recipe, prepared, CPU, None, lambda _: None)
    assert tried is not None and [size["batch_size"] for size in tried] == asked
    return chosen, asked


def test_the_smallest_batch_that_is_about_as_fast_as_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, asked = choose(monkeypatch, SATURATES)
    assert chosen.train.batch_size == 128
    assert asked == [32, 64, 128, 256, 512]  # two doublings without a gain end it


def test_where_memory_runs_out_what_fitted_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, asked = choose(monkeypatch, {32: 100.0, 64: 190.0, 128: None})
    assert chosen.train.batch_size == 64 and asked == [32, 64, 128]
    with pytest.raises(RunError, match="not even 32 images of a step fit into memory"):
        choose(monkeypatch, {32: None})


def test_an_epoch_keeps_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, asked = choose(monkeypatch, {size: float(size) for size in SATURATES}, images=2000)
    assert chosen.train.batch_size == 64 and asked == [32, 64]  # 31 steps; 128 would leave 15


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [("{name: sgd, lr: 0.1}", 4.0), ("{name: adamw, lr: 0.1, head_lr: 0.2}", 2.0), ("{name: muon, lr: 0.1}", 1.0)],
)
def test_learning_rates_go_with_the_batch(monkeypatch: pytest.MonkeyPatch, optimizer: str, factor: float) -> None:
    rates: dict[int, float | None] = {size: float(size) for size in (32, 64, 128, 256, 512)} | {1024: None}
    chosen, _ = choose(monkeypatch, rates, f"optimizer={optimizer}")
    assert chosen.train.batch_size == 512
    assert chosen.optimizer.lr == pytest.approx(0.1 * factor)
    if "head_lr" in optimizer:
        assert chosen.optimizer.head_lr == pytest.approx(0.2 * factor)
    assert make_recipe(chosen.to_dict()) == chosen


def test_a_step_that_does_not_fit_is_no_error_and_any_other_fault_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def measured_step(*_: Any) -> Any:
            raise error

        return measured_step

    recipe: Any = load_recipe("ex1")
    monkeypatch.setattr(choices, "measured_step", fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    assert choices._rate_of_size(recipe, recipe, CPU, None) is None
    monkeypatch.setattr(choices, "measured_step", fail(RuntimeError("shapes don't fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        choices._rate_of_size(recipe, recipe, CPU, None)


def test_a_step_that_only_fits_in_parts_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = [True]

    def measured_step(*_: Any) -> Any:
        return Step(lambda: torch.tensor(1.0), list, lambda: fits[0])

    monkeypatch.setattr(choices, "measured_step", measured_step)
    recipe: Any = load_recipe("ex1")
    assert choices._rate_of_size(recipe, recipe, CPU, None) is not None
    fits[0] = False
    assert choices._rate_of_size(recipe, recipe, CPU, None) is None


def test_a_measured_step_knows_whether_it_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_recipe("ex1", [*SMALL, "train.numerics=exact"]).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(), plan.data, 0)
    step = choices.measured_step(plan, prepared, CPU, None)
    step.run()
    assert step.whole()
    original = training_step.backward

    def small_memory(recipe: Any, task: Any, batch: Any, scaler: Any, accumulate: int) -> Any:
        if accumulate < 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return original(recipe, task, batch, scaler, accumulate)

    monkeypatch.setattr(training_step, "backward", small_memory)
    step = choices.measured_step(plan, prepared, CPU, None)
    step.run()
    assert not step.whole()


def test_a_new_head_hides_nothing_from_the_measurement(tmp_path: Path) -> None:
    """With a head of zeros neither the loss nor the backbone's gradients, all zero, would show how exact they are."""
    path = tmp_path / "ex1.pth"
    torch.save(build_model(load_recipe("ex1").model, classes=4, size=(32, 32), seed=5).state_dict(), path)
    settings = [*SMALL, "train.numerics=exact", f"model.pretrained={path}"]
    plan = load_recipe("ex1", settings).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(), plan.data, 0)
    weights = find_weights(plan.model, lambda _: None)
    runs = [choices.measured_step(plan, prepared, CPU, weights) for _ in range(2)]
    losses = [step.run().item() for step in runs]
    assert losses[0] == losses[1] and abs(losses[0] - math.log(4)) > 1e-3
    assert all(gradient.any() for gradient in runs[0].gradients())
    # The run itself begins at zero.
    task = make_task(plan, prepared, CPU, weights, lambda _: None)
    assert not any(task.network.model.get_parameter(name).any() for name in head_parameters(task.network.model))


def test_sizes_end_where_the_next_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([1000, 1300, 1600, 2200])  # bytes, before the first size and after each
    monkeypatch.setattr(machine, "peak_memory", lambda _: next(held))
    monkeypatch.setattr(machine, "free_memory", lambda _: 1400)
    chosen, asked = choose(monkeypatch, {size: float(size) for size in SATURATES})
    assert asked == [32, 64, 128]  # which took 600 more; 256 would take 1,200 more, and 80 % of 1,400 are 1,120
    assert chosen.train.batch_size == 128


def test_a_batch_size_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(recipe: Any, *_: Any) -> float:
        return SATURATES[recipe.train.batch]

    monkeypatch.setattr(choices, "_rate_of_size", rate)
    plan = load_recipe("ex1", ["train.batch_size=auto", "train.numerics=exact"]).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(train=8000), plan.data, 0)
    first = choices.decide(plan, prepared, CPU, None, lambda _: None)
    assert first.batch_sizes is not None and first.recipe.train.batch_size == 128
    monkeypatch.setattr(choices, "_rate_of_size", None)
    second = choices.decide(plan.resolved(dataset="digits", seed=1), prepared, CPU, None, lambda _: None)
    assert second.batch_sizes is None
    assert second.recipe.train == first.recipe.train and second.recipe.optimizer == first.recipe.optimizer


@pytest.mark.parametrize(
    ("device", "batch", "parts", "probed"),
    [("cpu", 2000, 1, (256, 1)), ("cpu", 1000, 2, (256, 1)), ("cpu", 500, 2, (500, 2)), ("cuda", 2000, 1, (2000, 1))],
)
def test_a_large_batch_is_measured_by_a_small_one_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, batch: int, parts: int, probed: tuple[int, int]
) -> None:
    """What is chosen is for as many images as the run has."""
    settings = [f"train={{batch_size: {batch}, accumulate: {parts}, epochs: 100}}"]
    plan = load_recipe("ex1", settings).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(), plan.data, 0)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def measure(device: torch.device, make_step: Any, *, steps: int, **_: Any) -> Any:
        make_step(NumericsChoice())
        seen["steps"] = steps
        return NumericsChoice(), [Trial(NumericsChoice())]

    def measured_step(recipe: Any, *_: Any) -> None:
        seen["probed"] = recipe.train.batch, recipe.train.accumulate

    monkeypatch.setattr(numerics, "measure", measure)
    monkeypatch.setattr(numerics, "can_compile", lambda _: False)
    monkeypatch.setattr(machine, "identity", lambda _: {})
    monkeypatch.setattr(choices, "measured_step", measured_step)
    chosen, _ = choices._choose_numerics(plan, prepared, torch.device(device), None, lambda _: None)
    assert chosen == plan.with_train(numerics=NumericsChoice())
    assert seen["probed"] == probed
    assert seen["steps"] * probed[0] == pytest.approx(100 * batch, rel=0.01)  # an epoch is one batch here


def test_out_of_memory_is_told_from_other_errors() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        RuntimeError("unable to mmap 4096 bytes: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.39 GB)"),
    ):
        assert machine.is_out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes"), ValueError("memory alloc"), KeyError("memory")):
        assert not machine.is_out_of_memory(other)


def test_a_run_writes_down_the_batch_that_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "train.batch_size=auto", "train.epochs=1", monkeypatch=monkeypatch)
    assert folder.recipe().train.batch_size == 32  # 200 images: twice that would leave too few steps
    tried = folder.environment()["batch_size"]["tried"]
    assert [size["batch_size"] for size in tried] == [32] and tried[0]["images_per_second"] > 0


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "many", "true"])
def test_other_batch_sizes_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size: expected a number of images from 1 on, or auto"):
        load_recipe("ex1", [f"train.batch_size={value}"])


# --- evaluation ---


@pytest.mark.parametrize(
    ("device", "memory", "overrides", "expected"),
    [
        ("cpu", 2**40, [], 1024),
        ("cpu", 2**40, ["train.resolution=128"], 64),
        ("cpu", 2**40, ["train.resolution=[[0, 16], [0.5, 64]]"], 256),
        ("cpu", 2**40, ["evaluate.resolution=256"], 16),
        ("cpu", 2**40, ["evaluate.resolution=2048"], 1),
        ("cpu", 2**40, ["evaluate.batch_size=7"], 7),
        ("cuda", 2 * 2**30, ["train.resolution=128"], 64),
        ("cuda", 8 * 2**30, ["train.resolution=128"], 128),
        ("cuda", 80 * 2**30, ["train.resolution=128"], 512),
        ("cuda", 80 * 2**30, [], 8192),
    ],
)
def test_an_evaluation_batch_goes_by_the_images_and_a_gpu_s_memory_and_by_no_clock(
    device: str, memory: int, overrides: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "total_memory", lambda _: memory)
    plan = load_recipe("ex1", overrides).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(), plan.data, 0)
    decided = choices.decide(plan, prepared, torch.device(device), None, lambda _: None)
    assert decided.recipe.evaluate.batch == expected
    assert decided == choices.Decided(decided.recipe, None, None)  # nothing was measured


def test_a_run_writes_its_evaluation_batch_down_and_repetitions_are_told_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, "train.epochs=1", monkeypatch=monkeypatch)
    assert folder.recipe().evaluate.batch_size == 1024
    plan = load_recipe("ex1", [*SMALL, "train.epochs=1"]).resolved(dataset="digits", seed=0)
    assert plan.evaluate.batch_size == "auto" and plan.fingerprint() == folder.recipe().fingerprint()
    with pytest.raises(RecipeError, match=r"evaluate\.batch_size: expected a number of images from 1 on, or auto"):
        load_recipe("ex1", ["evaluate.batch_size=0"])
    with pytest.raises(ValueError, match="has not been decided yet"):
        plan.evaluate.batch  # noqa: B018
    # A recipe that somebody has changed, or written by hand.
    files.write_text(folder.path / "recipe.yaml", plan.to_yaml())
    again = experiment.score_run(folder.path, data_folder=None, device=CPU, report=lambda _: None)
    assert again["test_looks"] == 2
