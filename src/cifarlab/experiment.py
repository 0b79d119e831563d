"""One run from beginning to end: data, model, training, pictures, the one look at the test set."""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cifarlab import __version__, files, machine, metrics, numerics, plots
from cifarlab.data.augment import Pipeline
from cifarlab.data.batches import ImageStore, reader_died
from cifarlab.data.dataset import Dataset
from cifarlab.data.prepare import Part, Prepared, prepare
from cifarlab.data.sources import dataset_shape, load_dataset
from cifarlab.data.split import balanced_choice
from cifarlab.download import Report
from cifarlab.errors import NotARunError, RunError
from cifarlab.evaluate import Classifier, Predictions, Tta, choose_tta, predict
from cifarlab.features import FrozenStages
from cifarlab.models import build_model, channels_last_on_cpu, outline, outputs
from cifarlab.models.chain import chain, freeze, verified_chain
from cifarlab.models.weights import Weights, find_weights, load_weights
from cifarlab.optim import parameter_groups
from cifarlab.recipe import Recipe, make_recipe
from cifarlab.rundir import RunFolder
from cifarlab.train import Average, Display, StopRequest, Task, mark, train


def check_plans(plans: Sequence[Recipe], runs: Path, report: Report) -> None:
    """Refuse what can be known to fail before images are read or downloaded; pretrained weights are fetched.

    Raises RecipeError for an unknown network, for what it can't do and for a file of weights that isn't there;
    DataError for a folder that is not there, DownloadError for weights that are not to be had, StorageError where the
    run folders can't be made.
    """
    # Seeds make no difference to what is looked at here.
    distinct = {(plan.datasets, plan.fingerprint()): plan for plan in plans}.values()
    for plan in distinct:
        classes, own_side = dataset_shape(plan.datasets[0])
        size, *more = ((side or own_side, side or own_side) for side in (plan.evaluation_side, *plan.sides))
        model = outline(plan.model, classes=classes, size=size, more=more)
        freeze(model, plan.model.freeze_stages)
        parameter_groups(plan.optimizer, model)
        for side in plan.sides:
            _pipeline(plan, side, (own_side, own_side), (0, 0, 0), (1, 1, 1), torch.device("cpu"))
    files.make_folder(runs)
    for plan in distinct:
        find_weights(plan.model, report)


def load(recipe: Recipe, folder: Path | None, report: Report) -> Dataset:
    """The dataset of a resolved recipe. Raises DataError; `folder` is where CIFAR's files are, or are to be put."""
    return load_dataset(recipe.datasets[0], recipe.data, recipe.largest_side, folder, report)


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
        weights = find_weights(recipe.model, report)
        task = make_task(recipe, prepared, device, weights, report)
        if recipe.caches and task.network.frozen is None:
            report(f"the frozen stages of '{recipe.model.name}' can't be run apart: they are computed at every step")
        run = RunFolder.create(runs, recipe, datetime.now())
        report(f"run folder: {run.path}")
        try:
            run.write_environment(_environment(dataset, prepared, device, task, weights))
            train(recipe, task, run, display, stop, process_started)
            log = run.train_log()
            best = log["best_epoch"], log["best_weights"]
            plots.loss_curve(run.path / "loss.png", log["epochs"], *best)
            plots.accuracy_curve(run.path / "accuracy.png", log["epochs"], *best)
            if log["status"] == "finished" and recipe.evaluate.test:
                _score(run, recipe, prepared, device, process_started, recipe.evaluate.tta)
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
    """What torch says as a plain RuntimeError or ValueError, as RunError.

    Memory that runs out, worker processes that die, and BatchNorm's refusal of a batch of one image whose feature maps
    have shrunk to a pixel, which leaves it one value to take the variance of.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        parts = " or less train.accumulate" if recipe.train.accumulate > 1 else ""
        raise RunError(
            f"a step on one image is too little for the BatchNorm of '{recipe.model.name}', whose last feature maps "
            f"are one pixel at this size of images; set a larger train.batch_size{parts}, or a larger train.resolution"
        ) from error
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


def score_run(
    path: Path,
    *,
    data_folder: Path | None,
    device: torch.device,
    report: Report,
    override: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a run's best checkpoint on its test set again; the look is counted. Returns test.json's values.

    override: another test-time augmentation than the run's, as `["evaluate.tta=flip"]`. data_folder: where CIFAR's
    files are; None: where they were when the run was made, if they are still there.
    Raises NotARunError where the run is not finished (its best checkpoint is not final) or damaged, or the dataset is
    not the one that it was trained on.
    """
    run = RunFolder.open(path)
    recipe, status = run.recipe(), run.train_log().get("status")
    asked = make_recipe(recipe.to_dict(), override, origin=f"recipe {recipe.name}").evaluate.tta
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
        return _score(run, recipe, prepared, device, process_started=None, tta=asked)


def _score(
    run: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    process_started: float | None,
    tta: Tta | Literal["auto"],
) -> dict[str, Any]:
    """The test set's figures on the frozen best checkpoint, written to test.json with one more look counted.

    process_started: the `time.time()` that `total_time` counts from; None for a later look, which keeps the first's.
    tta: test-time augmentation; where it is not the run's, what it is worth on validation is found out first.
    """
    state = run.load_checkpoint("best.pth")
    before = run.test_log() or {}
    looks = before.get("test_looks", 0)
    store = _store(prepared.test, recipe, device)
    numbers = numerics.exact(device, channels_last_on_cpu=channels_last_on_cpu(recipe.model))
    try:
        mean, std = state["mean"], state["std"]
        pipeline = _pipeline(recipe, recipe.evaluation_side, store.image_size, mean, std, device, numbers.memory_format)
        model = _model(recipe, len(prepared.classes), pipeline.output_size, None, device, numbers)
        model.load_state_dict(state["model"])
        network = Classifier(model, model, None, len(prepared.classes))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotARunError(f"{run.path / 'best.pth'} does not fit the recipe's network: {reason}") from error
    if not isinstance(looks, int):
        raise NotARunError(f"{run.path / 'test.json'} is damaged: 'test_looks' is not a number")

    def look(part: Part, images: ImageStore, mode: Tta) -> Predictions:
        samples = torch.from_numpy(part.index)
        return predict(network, images, samples, pipeline, recipe.evaluate.batch_size, tta=mode, seed=recipe.seed)

    chosen = run.train_log().get("tta") if tta == recipe.evaluate.tta else None
    if chosen is None and tta is not None:
        if (part := prepared.validation) is not None:
            images = store if part.images is prepared.test.images else _store(part, recipe, device)
            chosen = choose_tta(tta, look(part, images, None), lambda mode: look(part, images, mode))
        else:
            chosen = {"mode": tta}  # not "auto", which recipes without validation images refuse

    clock = time.perf_counter()
    predictions = look(prepared.test, store, None)
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
    if isinstance(chosen, dict):
        augmented, seconds = predictions, test_time
        if chosen.get("mode") is not None:
            clock = time.perf_counter()
            augmented = look(prepared.test, store, chosen["mode"])
            machine.synchronize(device)
            seconds = time.perf_counter() - clock
        log["tta"] = {
            **chosen,
            "accuracy": augmented.accuracy(),
            "loss": augmented.loss(),
            "test_time": seconds,
            "gain": augmented.accuracy() - predictions.accuracy(),
            "cost": seconds / test_time,
        }
        if process_started is not None:
            log["total_time"] = time.time() - process_started
    run.write_test_log(log)  # first: once the figures are known, the look must be counted
    run.write_predictions("predictions.npz", **arrays)
    plots.confusion_matrix(
        run.path / "confusion_matrix.png",
        log["confusion_matrix"],
        list(prepared.classes),
        title=f"{recipe.name} on {recipe.datasets[0]}: test accuracy {log['accuracy']:.2%}",
    )
    return log


def make_task(
    recipe: Recipe, prepared: Prepared, device: torch.device, weights: Weights | None, report: Report
) -> Task:
    """The network, the images and the pipelines of a run, on the device. Raises RecipeError where they do not fit."""
    store = _store(prepared.train, recipe, device)
    mean, std = prepared.mean, prepared.std
    if weights is not None and weights.mean is not None and weights.std is not None:
        mean, std = weights.mean, weights.std
    numbers = numerics.exact(device, channels_last_on_cpu=channels_last_on_cpu(recipe.model))
    pipeline = _pipeline(recipe, recipe.evaluation_side, store.image_size, mean, std, device, numbers.memory_format)
    pipelines = tuple(
        (share, _pipeline(recipe, side, store.image_size, mean, std, device, numbers.memory_format))
        for share, side in recipe.train.resolutions
    )
    model = _model(recipe, len(prepared.classes), pipeline.output_size, weights, device, numbers)
    network = _network(recipe, model, len(prepared.classes), pipeline.output_size, device, numbers, report)
    average = None
    if recipe.train.ema is not None:
        from timm.utils.model_ema import ModelEmaV3  # half a second

        ema = ModelEmaV3(model, decay=recipe.train.ema, use_warmup=True)
        rest = ema.module
        if network.frozen is not None and (parts := chain(rest)) is not None:
            rest = parts.rest(recipe.model.freeze_stages)
        average = Average(ema, Classifier(ema.module, rest, network.frozen, network.classes))
    validation_store = sample = None
    if prepared.validation is not None:
        shared = prepared.validation.images is prepared.train.images
        validation_store = store if shared else _store(prepared.validation, recipe, device)
        count = min(len(prepared.validation), len(prepared.train))
        sample = balanced_choice(prepared.train.images.labels, prepared.train.index, count, recipe.seed)
    return Task(
        network=network,
        average=average,
        pipelines=pipelines,
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
            "mean": list(mean),
            "std": list(std),
        },
    )


def _pipeline(
    recipe: Recipe,
    side: int | None,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Pipeline:
    return Pipeline(
        size=size,
        resolution=side,
        reference=recipe.train.last_resolution,
        interpolation=recipe.data.interpolation,
        augment=recipe.augment,
        mean=mean,
        std=std,
        device=device,
        memory_format=memory_format,
    )


def _model(
    recipe: Recipe,
    classes: int,
    size: tuple[int, int],
    weights: Weights | None,
    device: torch.device,
    numbers: numerics.Numerics,
) -> nn.Module:
    """The recipe's model on the device: freshly initialised, then with its pretrained weights, some of it frozen."""
    model = build_model(recipe.model, classes=classes, size=size, seed=recipe.seed)
    if weights is not None:
        load_weights(model, recipe.model, weights)
    freeze(model, recipe.model.freeze_stages)
    return model.to(device).to(memory_format=numbers.memory_format)


def _network(
    recipe: Recipe,
    model: nn.Module,
    classes: int,
    size: tuple[int, int],
    device: torch.device,
    numbers: numerics.Numerics,
    report: Report,
) -> Classifier:
    """The model with its frozen stages apart, where they are to be cached and it can be taken apart."""
    section = recipe.model
    parts = verified_chain(model, size[0]) if recipe.caches else None
    if parts is None:
        return Classifier(model, model, None, classes)
    memory = _cache_memory(device) if section.cache_memory is None else section.cache_memory * 1_000_000
    dtype = torch.bfloat16 if section.cache == "bfloat16" else torch.float32
    frozen = FrozenStages(parts.front(section.freeze_stages), dtype, memory, numbers.memory_format, report)
    return Classifier(model, parts.rest(section.freeze_stages), frozen, classes)


@functools.cache
def _cache_memory(device: torch.device) -> int:
    """Half of the memory that was free at first: what a run gives back to the process, the next one finds taken."""
    return machine.free_memory(device) // 2


def _store(part: Part, recipe: Recipe, device: torch.device) -> ImageStore:
    memory = recipe.data.memory * 1_000_000 if recipe.data.memory is not None else None
    return ImageStore.of(part.images, device, memory=memory, workers=recipe.data.workers)


def _class_weights(recipe: Recipe, prepared: Prepared, device: torch.device) -> Tensor | None:
    """float32 (classes,): images / (classes × images of the class), scikit-learn's `balanced`; a class without: 0."""
    if recipe.loss.class_weights is None:
        return None
    counts = torch.from_numpy(prepared.train.labels).bincount(minlength=len(prepared.classes)).double()
    weights = torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
    # Outputs that are no class (model.head: keep) are nobody's label.
    weights = torch.cat([weights, weights.new_ones(outputs(recipe.model, len(counts)) - len(counts))])
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


def _environment(
    dataset: Dataset, prepared: Prepared, device: torch.device, task: Task, weights: Weights | None
) -> dict[str, Any]:
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
        "weights": None
        if weights is None
        else {"source": weights.source, "path": str(weights.path), "sha256": weights.sha256},
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
