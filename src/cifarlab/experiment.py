"""One run from beginning to end: data, model, training, pictures, the one look at the test set."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab import __version__, files, machine, metrics, numerics, plots
from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore, reader_died
from cifarlab.data.dataset import Dataset
from cifarlab.data.download import Report
from cifarlab.data.prepare import Part, Prepared, prepare
from cifarlab.data.sources import dataset_shape, load_dataset
from cifarlab.data.split import balanced_choice
from cifarlab.errors import NotARunError, RunError
from cifarlab.evaluate import predict
from cifarlab.models import build_model, check_size, network
from cifarlab.recipe import Recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Display, StopRequest, Task, mark, train


def check_plans(plans: Sequence[Recipe], runs: Path) -> None:
    """Refuse what can be known to fail before anything is downloaded or trained.

    Raises RecipeError for an unknown network or images too small for it, DataError for a folder that is not there,
    StorageError where the run folders can't be made.
    """
    for plan in plans:
        _, side = dataset_shape(plan.datasets[0])
        side = plan.train.resolution or side
        check_size(plan.model, (side, side))
    files.make_folder(runs)


def load(recipe: Recipe, folder: Path | None, report: Report) -> Dataset:
    """The dataset of a resolved recipe. Raises DataError; `folder` is where CIFAR's files are, or are to be put."""
    return load_dataset(recipe.datasets[0], recipe.data, recipe.train.resolution, folder, report)


def run_experiment(
    recipe: Recipe,
    dataset: Dataset,
    *,
    runs: Path,
    device: torch.device,
    display: Display,
    stop: StopRequest,
    process_started: float,
    report: Report,
) -> RunFolder:
    """Run a resolved recipe (one dataset, one seed) and return its run folder.

    process_started: the `time.time()` that wall and total time count from. Where the run is stopped, train.json says
    so and the test set is left alone. Raises what preparing, training and writing raise; once there is a run folder,
    its train.json then says "failed", or holds the `error` if training had finished.
    """
    with _explained(recipe):
        prepared = prepare(dataset, recipe.data, recipe.seed)
        for finding in _findings(prepared):
            report(finding)
        task = make_task(recipe, prepared, device)
        run = RunFolder.create(runs, recipe, datetime.now())
        report(f"run folder: {run.path}")
        try:
            run.write_environment(_environment(dataset, prepared, device, task))
            train(recipe, task, run, display, stop, process_started)
            log = run.train_log()
            plots.loss_curve(run.path / "loss.png", log["epochs"], log["best_epoch"])
            plots.accuracy_curve(run.path / "accuracy.png", log["epochs"], log["best_epoch"])
            if log["status"] == "finished" and recipe.evaluate.test:
                _score(run, recipe, prepared, device, process_started)
        except (KeyboardInterrupt, SystemExit):
            mark(run, "stopped", None)
            report(f"interrupted; the run so far is in {run.path}")
            raise
        except Exception as error:
            mark(run, "failed", " ".join(str(error).split()))
            raise
    return run


@contextlib.contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """Memory that runs out and worker processes that die, as RunError; torch says both as a plain RuntimeError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # "not enough memory" (CPU), "CUDA out of memory", "MPS backend out of memory"
        if isinstance(error, MemoryError) or ("memory" in str(error) and "alloc" in str(error)):
            smaller = max(1, recipe.train.batch_size // 2)
            raise RunError(
                f"out of memory ({' '.join(str(error).split())[:100]}); "
                f"try --set train.batch_size={smaller}, or a smaller train.resolution"
            ) from error
        if (died := reader_died(error)) is None:
            raise
        raise died from error


def score_run(path: Path, *, data_folder: Path | None, device: torch.device, report: Report) -> dict[str, Any]:
    """Score a run's best checkpoint on its test set again; the look is counted. Returns test.json's values.

    data_folder: where CIFAR's files are; None: where they were when the run was made, if they are still there.
    Raises NotARunError where the run is not finished (its best checkpoint is not final) or damaged, or the dataset is
    not the one that it was trained on.
    """
    run = RunFolder.open(path)
    recipe, status = run.recipe(), run.train_log().get("status")
    if status != "finished":
        raise NotARunError(
            f"{run.path} is not finished (its status is {status!r}), so its best checkpoint is not final; "
            "the test set is scored on finished runs only"
        )
    data = run.environment().get("data")
    if not isinstance(data, dict):
        raise NotARunError(f"{run.path / 'environment.json'} is damaged: it has no 'data'")
    recorded = Path(str(data.get("folder")))
    if data_folder is None and data.get("folder") and recorded.is_dir():
        data_folder = recorded
    with _explained(recipe):
        dataset = load(recipe, data_folder, report)
        prepared = prepare(dataset, recipe.data, recipe.seed)
        if prepared.record["content_hash"] != data.get("content_hash"):
            raise NotARunError(
                f"{run.path} was trained on another version of {recipe.datasets[0]} "
                f"(content hash {str(data.get('content_hash'))[:12]}…) than the one found, "
                f"{dataset.source} ({prepared.record['content_hash'][:12]}…); give the folder of the first with --data"
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
    looks = before.get("test_looks", 0)
    store = _store(prepared.test, recipe, device)
    try:
        model, pipeline, _ = _network(recipe, prepared.classes, store, state["mean"], state["std"], device)
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotARunError(f"{run.path / 'best.pth'} does not fit the recipe's network: {reason}") from error
    if not isinstance(looks, int):
        raise NotARunError(f"{run.path / 'test.json'} is damaged: 'test_looks' is not a number")

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
        "test_looks": looks + 1,
        "total_time": before.get("total_time") if process_started is None else time.time() - process_started,
    }
    run.write_test_log(log)  # first: once the figures are known, the look must be counted
    run.write_predictions("predictions.npz", **arrays)
    plots.confusion_matrix(
        run.path / "confusion_matrix.png",
        log["confusion_matrix"],
        list(prepared.classes),
        title=f"{recipe.name} on {recipe.datasets[0]}: test accuracy {log['accuracy']:.2%}",
    )
    return log


def make_task(recipe: Recipe, prepared: Prepared, device: torch.device) -> Task:
    """The model, the images and the pipeline of a run, on the device. Raises RecipeError where they do not fit."""
    store = _store(prepared.train, recipe, device)
    model, pipeline, numbers = _network(recipe, prepared.classes, store, prepared.mean, prepared.std, device)
    validation_store = sample = None
    if prepared.validation is not None:
        shared = prepared.validation.images is prepared.train.images
        validation_store = store if shared else _store(prepared.validation, recipe, device)
        count = min(len(prepared.validation), len(prepared.train))
        sample = balanced_choice(prepared.train.images.labels, prepared.train.index, count, recipe.seed)
    return Task(
        model=model,
        pipeline=pipeline,
        numerics=numbers,
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


def _network(
    recipe: Recipe,
    classes: Sequence[str],
    store: ImageStore,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> tuple[nn.Module, Pipeline, numerics.Numerics]:
    """A freshly initialised model on the device, the pipeline that feeds it, and their numerics."""
    numbers = numerics.exact(device, channels_last_on_cpu=network(recipe.model).channels_last_on_cpu)
    pipeline = Pipeline(
        size=store.image_size,
        resolution=recipe.train.resolution,
        interpolation=recipe.data.interpolation,
        crop_padding=recipe.augment.crop_padding,
        flip=recipe.augment.flip,
        mean=mean,
        std=std,
        device=device,
        memory_format=numbers.memory_format,
    )
    model = build_model(recipe.model, classes=len(classes), size=pipeline.output_size, seed=recipe.seed)
    return model.to(device).to(memory_format=numbers.memory_format), pipeline, numbers


def _store(part: Part, recipe: Recipe, device: torch.device) -> ImageStore:
    memory = recipe.data.memory * 1_000_000 if recipe.data.memory is not None else None
    return ImageStore.of(part.images, device, memory=memory, workers=recipe.data.workers)


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
    across = [
        f"{leak['images']:,} {second} images equal one in {first}"
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test"))
        if (leak := record["leaks"][f"{first}_{second}"]) and leak["images"]
    ]
    return [
        f"{record['dataset']}: {sizes} images, {len(prepared.classes)} classes, from {record['source']}",
        "leak check: " + ("; ".join(across) or "no image stands on two sides of the split"),
        *record["notes"],
    ]


def _environment(dataset: Dataset, prepared: Prepared, device: torch.device, task: Task) -> dict[str, Any]:
    return {
        "cifarlab": __version__,
        **machine.describe(device),
        "numerics": {
            "name": task.numerics.name,
            "dtype": str(task.numerics.dtype).removeprefix("torch."),
            "memory_format": str(task.numerics.memory_format).removeprefix("torch."),
            "compiled": False,
            "deterministic": task.numerics.deterministic,
        },
        "git": _git_state(),
        "command": shlex.join(sys.argv),
        "data": {
            **prepared.record,
            "folder": str(dataset.folder) if dataset.folder is not None else None,
            "resident": task.store.resident,
        },
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
