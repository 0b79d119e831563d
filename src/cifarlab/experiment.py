"""One run from beginning to end: data, model, training, pictures, the one look at the test set."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifarlab import __version__, machine, metrics, numerics, plots
from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore, reader_died
from cifarlab.data.dataset import Dataset
from cifarlab.data.prepare import Part, Prepared, prepare
from cifarlab.data.sources import Report, load_dataset
from cifarlab.data.split import balanced_limit
from cifarlab.errors import NotARunError, RunError
from cifarlab.evaluate import predict
from cifarlab.models import build_model, network
from cifarlab.recipe import Recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Display, StopRequest, Task, mark, train


def run_experiment(
    recipe: Recipe,
    *,
    data_folder: Path | None,
    runs: Path,
    device: torch.device,
    display: Display,
    stop: StopRequest,
    process_started: float,
    report: Report,
) -> RunFolder:
    """Run a resolved recipe (one dataset, one seed) and return its run folder.

    process_started: the `time.time()` that wall and total time count from. Where the run is stopped, train.json says
    so and the test set is left alone. Raises what loading, training and writing raise; train.json then says "failed".
    """
    network(recipe.model)  # an unknown name is refused before any data is touched
    prepared = prepare(_load(recipe, data_folder, report), recipe.data, recipe.seed)
    for finding in _findings(prepared):
        report(finding)
    task = make_task(recipe, prepared, device)
    run = RunFolder.create(runs, recipe, datetime.now())
    report(f"run folder: {run.path}")
    run.write_environment(_environment(prepared, device, task))
    try:
        train(recipe, task, run, display, stop, process_started)
        log = run.train_log()
        plots.loss_curve(run.path / "loss.png", log["epochs"], log["best_epoch"])
        plots.accuracy_curve(run.path / "accuracy.png", log["epochs"], log["best_epoch"])
        if log["status"] == "finished" and recipe.evaluate.test:
            _score(run, recipe, prepared, device, process_started)
    except (KeyboardInterrupt, SystemExit):
        mark(run, "stopped", None)
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(run, recipe) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # what torch's CPU allocator says
            raise _out_of_memory(run, recipe) from error
        mark(run, "failed", str(error))
        if (died := reader_died(error)) is None:
            raise
        raise died from error
    except Exception as error:
        mark(run, "failed", str(error))
        raise
    return run


def _load(recipe: Recipe, folder: Path | None, report: Report) -> Dataset:
    return load_dataset(recipe.datasets[0], recipe.data, recipe.train.resolution, folder, report)


def _out_of_memory(run: RunFolder, recipe: Recipe) -> RunError:
    message = f"out of memory in {run.path}; try --set train.batch_size={max(1, recipe.train.batch_size // 2)}"
    mark(run, "failed", message)
    return RunError(message)


def score_run(path: Path, *, data_folder: Path | None, device: torch.device, report: Report) -> dict[str, Any]:
    """Score a run's best checkpoint on its test set again; the look is counted. Returns test.json's values.

    Raises NotARunError where the run has no best checkpoint, or the dataset is not the one that it was trained on.
    """
    run = RunFolder.open(path)
    recipe = run.recipe()
    trained_on = run.environment().get("data", {}).get("content_hash")
    prepared = prepare(_load(recipe, data_folder, report), recipe.data, recipe.seed)
    if prepared.record["content_hash"] != trained_on:
        raise NotARunError(
            f"{run.path} was trained on another version of {recipe.datasets[0]} (content hash {str(trained_on)[:12]}…) "
            f"than the one found in {prepared.record['source']} ({prepared.record['content_hash'][:12]}…); "
            "give the folder of the first with --data"
        )
    return _score(run, recipe, prepared, device, process_started=None)


def _score(
    run: RunFolder, recipe: Recipe, prepared: Prepared, device: torch.device, process_started: float | None
) -> dict[str, Any]:
    """The test set's figures on the frozen best checkpoint, written to test.json with one more look counted.

    process_started: the `time.time()` that `total_time` counts from; None for a later look, which keeps the first's.
    """
    state = run.load_checkpoint("best.pth")
    before = run.test_log() or {}
    numbers = numerics.exact(device, channels_last_on_cpu=network(recipe.model).channels_last_on_cpu)
    store = _store(prepared.test, recipe, device)
    pipeline = _pipeline(recipe, store, state["mean"], state["std"], device, numbers.memory_format)
    model = build_model(recipe.model, classes=len(prepared.classes), size=pipeline.output_size, seed=recipe.seed)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        raise NotARunError(f"{run.path / 'best.pth'} does not fit the recipe's network: {error}") from error
    model.to(device).to(memory_format=numbers.memory_format)

    clock = time.perf_counter()
    predictions = predict(model, store, torch.from_numpy(prepared.test.index), pipeline, recipe.evaluate.batch_size)
    machine.synchronize(device)
    test_time = time.perf_counter() - clock
    arrays = predictions.arrays()
    log = {
        **metrics.scores(arrays["logits"], arrays["labels"]),
        "test_time": test_time,
        "tta": None,
        "classes": list(prepared.classes),
        "test_looks": int(before.get("test_looks", 0)) + 1,
        "total_time": before.get("total_time") if process_started is None else time.time() - process_started,
    }
    run.write_predictions("predictions.npz", **arrays)
    plots.confusion_matrix(
        run.path / "confusion_matrix.png",
        log["confusion_matrix"],
        list(prepared.classes),
        title=f"{recipe.name} on {recipe.datasets[0]}: test accuracy {log['accuracy']:.2%}",
    )
    run.write_test_log(log)
    return log


def make_task(recipe: Recipe, prepared: Prepared, device: torch.device) -> Task:
    """The model, the images and the pipeline of a run, on the device. Raises RecipeError where they do not fit."""
    numbers = numerics.exact(device, channels_last_on_cpu=network(recipe.model).channels_last_on_cpu)
    store = _store(prepared.train, recipe, device)
    pipeline = _pipeline(recipe, store, prepared.mean, prepared.std, device, numbers.memory_format)
    model = build_model(recipe.model, classes=len(prepared.classes), size=pipeline.output_size, seed=recipe.seed)
    validation_store = sample = None
    if prepared.validation is not None:
        shared = prepared.validation.images is prepared.train.images
        validation_store = store if shared else _store(prepared.validation, recipe, device)
        count = min(len(prepared.validation), len(prepared.train))
        sample = balanced_limit(prepared.train.images.labels, prepared.train.index, count, recipe.seed)
    return Task(
        model=model.to(device).to(memory_format=numbers.memory_format),
        pipeline=pipeline,
        store=store,
        train=torch.from_numpy(prepared.train.index),
        validation_store=validation_store,
        validation=torch.from_numpy(prepared.validation.index) if prepared.validation is not None else None,
        train_sample=torch.from_numpy(sample) if sample is not None else None,
        class_weights=_class_weights(recipe, prepared, device),
        device=device,
        description={
            "cifarlab": __version__,
            "recipe": recipe.to_dict(),
            "classes": list(prepared.classes),
            "mean": list(prepared.mean),
            "std": list(prepared.std),
        },
    )


def _store(part: Part, recipe: Recipe, device: torch.device) -> ImageStore:
    memory = recipe.data.memory * 1_000_000 if recipe.data.memory is not None else None
    return ImageStore.of(part.images, device, memory=memory, workers=recipe.data.workers)


def _pipeline(
    recipe: Recipe,
    store: ImageStore,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    memory_format: torch.memory_format,
) -> Pipeline:
    return Pipeline(
        size=store.image_size,
        resolution=recipe.train.resolution,
        interpolation=recipe.data.interpolation,
        crop_padding=recipe.augment.crop_padding,
        flip=recipe.augment.flip,
        mean=mean,
        std=std,
        device=device,
        memory_format=memory_format,
    )


def _class_weights(recipe: Recipe, prepared: Prepared, device: torch.device) -> Tensor | None:
    """float32 (classes,): images / (classes × images of the class), scikit-learn's `balanced`; a class without: 0."""
    if recipe.loss.class_weights is None:
        return None
    counts = torch.from_numpy(prepared.train.labels).bincount(minlength=len(prepared.classes)).double()
    weights = torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
    return weights.float().to(device)


def _findings(prepared: Prepared) -> list[str]:
    """What the user should know of the data, a line each."""
    record = prepared.record
    sizes = ", ".join(f"{count:,} {name}" for name, count in record["images"].items() if count)
    findings = [f"{record['dataset']}: {sizes} images, {len(prepared.classes)} classes, from {record['source']}"]
    for sides, leak in record["leaks"].items():
        if sides in ("train_validation", "train_test", "validation_test") and leak and leak["images"]:
            first, second = sides.split("_")
            findings.append(f"leak check: {leak['images']:,} {second} images equal one in {first}")
    return [*findings, *record["notes"]]


def _environment(prepared: Prepared, device: torch.device, task: Task) -> dict[str, Any]:
    return {
        "cifarlab": __version__,
        **machine.describe(device),
        "numerics": {
            "dtype": "float32",
            "memory_format": str(task.pipeline.memory_format).removeprefix("torch."),
            "compiled": False,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "git": _git_state(),
        "command": shlex.join(sys.argv),
        "data": {**prepared.record, "resident": task.store.resident},
    }


def _git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree that runs; None where it is installed, or git is not there."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        git("ls-files", "--error-unmatch", str(here))  # else a repository that only surrounds the environment
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
