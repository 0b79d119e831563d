"""One run from beginning to end: data, model, training, pictures, the one look at the test set."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cifarlab import __version__, distributed, examples, files, machine, metrics, numerics, plots
from cifarlab.board import Board
from cifarlab.budget import Budget, finishing_here
from cifarlab.build import make_model, make_pipeline, make_store, make_task, numerics_of
from cifarlab.choices import Decided, decide, with_evaluation_batch
from cifarlab.data.batches import ImageStore, reader_died
from cifarlab.data.cifar import DATASETS, find
from cifarlab.data.dataset import Dataset
from cifarlab.data.prepare import Prepared, prepare
from cifarlab.data.sources import dataset_shape, load_dataset
from cifarlab.download import Report
from cifarlab.errors import DivergedError, NotARunError, RecipeError, RunError, UsageError
from cifarlab.evaluate import Classifier, Predictions, Tta, choose_tta, looks_on_test, predict, with_tta
from cifarlab.fit import fitted
from cifarlab.models import outline
from cifarlab.models.chain import freeze
from cifarlab.models.weights import Weights, find_weights, normalisation, put_back
from cifarlab.optim import parameter_groups
from cifarlab.recipe import Recipe, flatten, make_recipe
from cifarlab.recipe_sections import NumericsChoice, check_tta
from cifarlab.rundir import RunFolder
from cifarlab.task import Task
from cifarlab.train import SETBACK, Display, StopRequest, mark, now, train


def check_plans(plans: Sequence[Recipe], runs: Path, device: torch.device, report: Report) -> None:
    """Refuse what can be known to fail before images are read or downloaded; pretrained weights are fetched.

    Raises RecipeError for an unknown network, for what it can't do, for numerics that the device can't and for a file
    of weights that isn't there;
    DataError for a folder that is not there, DownloadError for weights that are not to be had, StorageError where the
    run folders can't be made.
    """
    # Seeds make no difference to what is looked at here.
    distinct = {(plan.datasets, plan.fingerprint()): plan for plan in plans}.values()
    for plan in distinct:
        choice = plan.train.numerics
        if isinstance(choice, NumericsChoice) and (reason := numerics.impossible(device, choice)) is not None:
            raise RecipeError(f"train.numerics ({choice}): {reason}; set it to auto")
        classes, own_side = dataset_shape(plan.datasets[0])
        size, *more = ((side or own_side, side or own_side) for side in (plan.evaluation_side, *plan.sides))
        model = outline(plan.model, classes=classes, size=size, more=more)
        freeze(model, plan.model.freeze_stages)
        for _, stages in plan.model.freeze_late or ():
            freeze(model, stages, "model.freeze_late")
        parameter_groups(plan.optimizer, model)
        for side in plan.sides:
            make_pipeline(plan, side, (own_side, own_side), (0, 0, 0), (1, 1, 1), torch.device("cpu"))
    distributed.from_first(lambda: files.make_folder(runs))
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
    profile: bool = False,
    histograms: bool = False,
    budget: float | None = None,
) -> RunFolder:
    """Run a resolved recipe (one dataset, one seed) and return its run folder.

    Where several processes train together, each of them calls this, and the first one writes.
    process_started: the `time.time()` that wall and total time count from. Where the run is stopped, train.json says
    so and the test set is left alone. profile, histograms: as `train` takes them. budget: seconds that all of it may
    take, which `train.epochs` is made to fit. Raises what preparing, training and
    writing raise; once there is a run folder, its train.json then says "failed", or holds the `error` if training had
    finished.
    """
    asked = recipe.fingerprint()
    if budget is not None and distributed.place().size > 1:
        raise UsageError("--budget is for one process: give the recipe's train.epochs under torchrun")
    prepared, weights, decided = get_ready(recipe, dataset, device, report)
    recipe = decided.recipe
    limit = _budget(budget, device, process_started)
    with explained(recipe):
        if limit is not None:
            recipe = fitted(recipe, prepared, device, weights, limit, report)
        task = _make_task(recipe, prepared, device, weights, report)
        path = distributed.from_first(lambda: str(RunFolder.create(runs, recipe, datetime.now()).path))
        run = RunFolder(Path(path))
        with _locked(run):
            report(f"run folder: {run.path}")
            with _ending_said(run, report):
                environment = _environment(dataset, prepared, device, task, weights, decided, asked)
                environment |= {"histograms": histograms, "budget": budget}  # for who goes on with it
                distributed.from_first(lambda: run.write_environment(environment))
                tasks = [task]
                del task
                _train(
                    *(recipe, prepared, weights, tasks, run, display, stop, process_started, report),
                    profile=profile,
                    histograms=histograms,
                    budget=limit,
                )
                _finish(run, recipe, prepared, device, process_started)
    return run


def resume_experiment(
    path: Path,
    *,
    data_folder: Path | None,
    device: torch.device,
    display: Display,
    stop: StopRequest,
    process_started: float,
    report: Report,
    dataset: Dataset | None = None,
) -> RunFolder:
    """Go on with a run from its newest whole checkpoint, or from its beginning where it has none, to its end.

    data_folder: where CIFAR's files are; None: where they were when the run was made, if they are still there.
    dataset: the recipe's, where it is loaded already.
    Raises RunError where another process is at work on it; NotARunError where its recipe, images, classes or split are
    not those that it was begun with; and what running raises. A run that is done is left as it is.
    """
    run = RunFolder(path)
    with _locked(run):
        begun = distributed.from_first(lambda: _begun(run, report))
        if begun is None:
            report(f"{run.path} is finished: there is nothing to go on with")
            return run
        recipe = make_recipe(begun["recipe"], origin=str(run.path / "recipe.yaml"))
        saved, trained, started = begun["saved"], begun["trained"], begun["started"]
        recipe = _with_possible_numerics(recipe, device, report, "going on")
        with explained(recipe):
            if dataset is None:
                dataset = load(recipe, _folder_of(started, recipe, data_folder), report)
            prepared, weights, decided = get_ready(recipe, dataset, device, report)
            recipe = decided.recipe
            if saved is not None:
                _refuse_change(run, "classes", {"classes": saved["classes"]}, {"classes": list(prepared.classes)})
            recorded = saved["data"] if saved is not None else started.get("data", {})
            found = {name: recorded[name] for name in ("content_hash", "index_hashes") if name in recorded}
            _refuse_change(run, "data", flatten(found), flatten({name: prepared.record[name] for name in found}))
            task = _make_task(recipe, prepared, device, weights, report)
            if saved is not None:
                for name in ("mean", "std"):  # of the weights that it began with, where it did with any
                    _refuse_change(run, name, {name: saved[name]}, {name: task.description[name]})
                process_started -= saved["wall_time"]
                report(_said_of_bits(saved, task, recipe))
            elif trained:
                process_started -= begun["wall_time"]
                report(f"{run.path} is trained: what comes after that is done now")
            else:
                report(f"{run.path} has no checkpoint yet: it begins again")
            with _ending_said(run, report):
                environment = _environment(dataset, prepared, device, task, weights, decided, recipe.fingerprint())
                if started:
                    environment = {**started, "resumed": [*started.get("resumed", []), _again(environment, saved)]}
                distributed.from_first(lambda: run.write_environment(environment))
                if not trained:
                    tasks = [task]
                    del task
                    limit = _budget(_seconds_of(started), device, process_started)
                    if limit is not None:
                        limit.looks_on_test = looks_on_test(recipe, len(prepared.test))
                        report(f"{max(0.0, limit.left()):.0f} of its {limit.seconds:.0f} s are left; not bit for bit")
                    _train(
                        *(recipe, prepared, weights, tasks, run, display, stop, process_started, report),
                        saved=saved,
                        histograms=started.get("histograms") is True,
                        budget=limit,
                    )
                else:  # what came after training was interrupted; its reason is past
                    distributed.from_first(lambda: _forget_error(run))
                _finish(run, recipe, prepared, device, process_started)
    return run


@contextlib.contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """The run's lock, held by the first process for all. Raises NotARunError where it is no run."""
    with contextlib.ExitStack() as stack:
        distributed.from_first(lambda: stack.enter_context(RunFolder.open(run.path).locked()))
        yield


def _begun(run: RunFolder, report: Report) -> dict[str, Any] | None:
    """What there is of a run to go on with; None where nothing is left to be done."""
    if run.done:
        return None
    run.remove_leftovers()
    recipe, trained = run.recipe(), run.status == "finished"
    saved = None if trained else run.newest_checkpoint(report)
    if saved is not None:
        _refuse_change(run, "recipe", _fields(saved["recipe"], run), _fields(recipe.to_dict(), run))
    return {
        "recipe": recipe.to_dict(),
        "trained": trained,
        "saved": saved,
        "started": _environment_of(run, report),
        "wall_time": (run.train_log().get("wall_time") or 0.0) if trained else 0.0,
    }


def _forget_error(run: RunFolder) -> None:
    run.write_train_log({name: value for name, value in run.train_log().items() if name != "error"})


def _make_task(
    recipe: Recipe, prepared: Prepared, device: torch.device, weights: Weights | None, report: Report
) -> Task:
    task = make_task(recipe, prepared, device, weights, report)
    # They are the same already, but for what different processors round differently.
    for network in (task.network, *([task.average.network] if task.average is not None else [])):
        distributed.copy_from_first(list(network.model.state_dict().values()))
    if recipe.caches and task.network.frozen is None:
        report(f"the frozen stages of '{recipe.model.name}' can't be run apart: they are computed at every step")
    if task.network.numerics.compiled and task.network.compiled is None:
        report(f"train.numerics.compile: there is nothing to compile in '{recipe.model.name}' as it is trained")
    return task


def _train(
    recipe: Recipe,
    prepared: Prepared,
    weights: Weights | None,
    tasks: list[Task],
    run: RunFolder,
    display: Display,
    stop: StopRequest,
    process_started: float,
    report: Report,
    *,
    saved: dict[str, Any] | None = None,
    profile: bool = False,
    histograms: bool = False,
    budget: Budget | None = None,
) -> None:
    """`train`, and where that diverges again from the last checkpoint with lower rates, as often as the recipe says.

    tasks: the one to begin with, which nobody else holds: its memory is given back before there is another.
    """
    setbacks = list(saved["setbacks"]) if saved is not None else []
    device = tasks[0].device
    while True:
        reason = None
        try:
            train(
                *(recipe, tasks[0], run, display, stop, process_started),
                saved=saved,
                setbacks=setbacks,
                profile=profile,
                histograms=histograms,
                budget=budget,
            )
        except DivergedError as error:
            if len(setbacks) >= recipe.train.retries:
                raise
            reason = str(error).partition(";")[0]
        if reason is None:
            return
        # Not in the `except`: the exception holds the frames that hold the memory.
        tasks.clear()
        machine.give_back_memory(device)
        saved = distributed.from_first(partial(_go_back, run, report))
        step = saved["step"] if saved is not None else 0
        setbacks.append({"from_step": step, "reason": reason})
        factor = SETBACK ** len(setbacks)
        report(f"{reason}: going on from step {step} with {factor:g} of the learning rates")
        tasks.append(_make_task(recipe, prepared, device, weights, report))


def _budget(seconds: float | None, device: torch.device, began: float) -> Budget | None:
    if seconds is None:
        return None
    # The end of a run needs them: what importing them takes is known before training then.
    for name in ("sklearn.metrics", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    return Budget(seconds, began, finishing=finishing_here(machine.identity(device)))


def _seconds_of(environment: dict[str, Any]) -> float | None:
    """The budget that a run was begun with."""
    found = environment.get("budget")
    return float(found) if isinstance(found, int | float) and 0 < found < 1e9 else None


def _go_back(run: RunFolder, report: Report) -> dict[str, Any] | None:
    """The newest checkpoint; where there is none, nothing is left of what came after the beginning."""
    saved = run.newest_checkpoint(report)
    if saved is None:
        files.remove(run.path / "best.pth")  # of epochs that come anew
    return saved


@contextlib.contextmanager
def _ending_said(run: RunFolder, report: Report) -> Iterator[None]:
    """Has train.json say how the run ended, where it doesn't come to its end."""
    try:
        with distributed.last_words(partial(mark, run, "failed")):
            yield
    except (KeyboardInterrupt, SystemExit):
        if distributed.is_first():
            mark(run, "stopped", None)
        report(f"interrupted; the run so far is in {run.path}")
        raise
    except Exception as error:
        if distributed.is_first():
            mark(run, "failed", " ".join(str(error).split()))
        raise


def _finish(run: RunFolder, recipe: Recipe, prepared: Prepared, device: torch.device, process_started: float) -> None:
    """What comes after training: pictures and, where that has come to its end, the one look at the test set."""
    if distributed.from_first(lambda: _drawn(run, recipe.evaluate.test)) and recipe.evaluate.test:
        _score(run, recipe, prepared, device, process_started, recipe.evaluate.tta)


def _drawn(run: RunFolder, test: bool) -> bool:
    """Draws the curves. Returns whether the test set is to be looked at, if the recipe wants that (test)."""
    log = run.trained_log()
    if log["status"] == "finished" and not test:
        _end_board(run, log, None)  # before what says that all is done
    best = log["best_epoch"], log["best_weights"]
    plots.loss_curve(run.path / "loss.png", log["epochs"], *best)
    plots.accuracy_curve(run.path / "accuracy.png", log["epochs"], *best)
    return log["status"] == "finished" and not run.scored


def _environment_of(run: RunFolder, report: Report) -> dict[str, Any]:
    """A run's environment; empty where it was killed before that was written, and where it is damaged."""
    if not (run.path / "environment.json").exists():
        return {}
    try:
        found = run.environment()
        for name, kind in (("data", dict), ("resumed", list)):
            if not isinstance(found.get(name, kind()), kind):
                raise NotARunError(f"{run.path / 'environment.json'} is damaged: {name!r} is not a {kind.__name__}")
    except NotARunError as error:
        report(f"{error}; it is written anew")
        return {}
    return found


def _folder_of(environment: dict[str, Any], recipe: Recipe, asked: Path | None) -> Path | None:
    """Where CIFAR's files are: as asked, or where they were when the run was made, if they are still there.

    If they aren't, they are downloaded to where they always are, and not into a folder that a record names.
    """
    recorded, name = environment.get("data", {}).get("folder"), recipe.datasets[0]
    if asked is not None or not recorded or name not in DATASETS:
        return asked
    folder = Path(str(recorded))
    return folder if folder.is_dir() and find(DATASETS[name], folder) is not None else None


def _refuse_change(run: RunFolder, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises NotARunError, with the differences, where a run is to go on with something else than it began with."""
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r:.200}, is {now.get(name)!r:.200}" for name in names[:10])
        raise NotARunError(
            f"the {what} of {run.path} is not what it began with, so it can't go on: {changes}; put that right, or "
            "begin a new run"
        )


def _fields(values: dict[str, Any], run: RunFolder) -> dict[str, Any]:
    """A recipe's fields by their names, defaults where it is older than a field; without numerics, which may have to
    change. Raises NotARunError for what is no recipe."""
    try:
        recipe = make_recipe(values, origin=f"the recipe in a checkpoint of {run.path}")
    except RecipeError as error:
        raise NotARunError(str(error)) from None
    return flatten(recipe.with_train(numerics="exact").to_dict())


def _with_possible_numerics(recipe: Recipe, device: torch.device, report: Report, doing: str) -> Recipe:
    """The recipe with the exact numerics, where its own can't be had on this device."""
    choice = recipe.train.numerics
    if isinstance(choice, NumericsChoice) and (reason := numerics.impossible(device, choice)) is not None:
        report(f"the run's numerics ({choice}) are not to be had here: {reason}; {doing} in float32")
        return recipe.with_train(numerics="exact")
    return recipe


def _said_of_bits(saved: dict[str, Any], task: Task, recipe: Recipe) -> str:
    """What may be claimed of a run that goes on, by what decides rounding."""
    step, before, now = saved["step"], saved["made_on"], task.description["made_on"]
    changed = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if saved["recipe"]["train"].get("numerics") != recipe.to_dict()["train"]["numerics"]:
        changed.append("numerics")
    if changed:
        return f"going on from step {step}; not bit for bit as if it had never stopped: {', '.join(changed)}"
    if recipe.caches and recipe.train.prune is not None:
        return f"going on from step {step}; frozen stages whose images are pruned may round differently"
    if not task.network.numerics.deterministic and task.device.type != "cpu":
        return f"going on from step {step}; with these numerics a GPU is not deterministic to the last bit"
    return f"going on from step {step}, bit for bit as if it had never stopped"


def _again(environment: dict[str, Any], saved: dict[str, Any] | None) -> dict[str, Any]:
    """What environment.json keeps of each time that a run goes on."""
    kept = {
        name: value for name, value in environment.items() if name not in ("asked", "data", "weights", "batch_size")
    }
    return {**kept, "from_step": saved["step"] if saved is not None else 0}


def get_ready(
    recipe: Recipe, dataset: Dataset, device: torch.device, report: Report
) -> tuple[Prepared, Weights | None, Decided]:
    """What training a resolved recipe takes: data, pretrained weights, and what was left to the machine decided."""
    with explained(recipe):
        _check_processes(recipe)
        prepared = prepare(dataset, recipe.data, recipe.seed)
        same = {"recipe": recipe.fingerprint(), "cifarlab": __version__, "torch": str(torch.__version__)}
        found = {name: prepared.record[name] for name in ("content_hash", "index_hashes")}
        distributed.check_same("recipe, version or dataset", same | flatten(found))
        for finding in _findings(prepared):
            report(finding)
        weights = find_weights(recipe.model, report)
        distributed.check_same("file of weights", {"SHA-256": weights.sha256 if weights is not None else None})
        decided = decide(recipe, prepared, device, weights, report)
        _check_processes(decided.recipe)
        return prepared, weights, decided


def _check_processes(recipe: Recipe) -> None:
    """Raises RecipeError where the parts of a batch are too small to be divided among the processes."""
    size, train = distributed.place().size, recipe.train
    if size > 1 and train.batch_size != "auto" and train.batch_size // train.accumulate < 2 * size:
        raise RecipeError(
            f"train.batch_size ({train.batch_size}) in train.accumulate ({train.accumulate}) parts is too little for "
            f"{size} processes, each of which computes two images of a part or more; raise the first, lower the other, "
            "or start fewer"
        )


@contextlib.contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
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
        if machine.is_out_of_memory(error):
            size = recipe.train.batch_size
            advice = (
                "a number for train.batch_size" if size == "auto" else f"--set train.batch_size={max(1, size // 2)}"
            )
            raise RunError(
                f"out of memory ({' '.join(str(error).split())[:100]}); try {advice}, or a smaller train.resolution"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise RunError(
                f"torch.compile failed here ({' '.join(str(error).split())[:200]}); set "
                "train.numerics.compile=false, or train.numerics=exact"
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
    run = RunFolder(path)
    values, data = distributed.from_first(lambda: _scorable(path))
    recipe = make_recipe(values, origin=str(run.path / "recipe.yaml"))
    asked = make_recipe(values, override, origin=f"recipe {recipe.name}").evaluate.tta
    data_folder = _folder_of({"data": data}, recipe, data_folder)
    choice = recipe.train.numerics
    if isinstance(choice, NumericsChoice):
        # Nothing is compiled or captured in evaluation.
        recipe = recipe.with_train(numerics=choice.model_copy(update={"compile": False, "graphs": False}))
        recipe = _with_possible_numerics(recipe, device, report, "scoring")
    with explained(recipe):
        dataset = load(recipe, data_folder, report)
        prepared = prepare(dataset, recipe.data, recipe.seed)
        if prepared.record["content_hash"] != data.get("content_hash"):
            raise NotARunError(
                f"{run.path} was trained on another version of {recipe.datasets[0]} "
                f"(content hash {str(data.get('content_hash'))[:12]}…) than the one found, "
                f"{dataset.source} ({prepared.record['content_hash'][:12]}…); give the folder of the first with --data"
            )
        recipe = with_evaluation_batch(recipe, prepared, device)
        return _score(run, recipe, prepared, device, process_started=None, tta=asked)


def _scorable(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of a finished run, and what its environment.json says of its data."""
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
    return recipe.to_dict(), data


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
    as_recorded = tta == recipe.evaluate.tta
    state, before, chosen = distributed.from_first(
        lambda: (run.load_checkpoint("best.pth"), run.test_log() or {}, _recorded_tta(run) if as_recorded else None)
    )
    looks = before.get("test_looks", 0)
    store = make_store(prepared.test, recipe, device)
    numbers = numerics_of(recipe, device)
    if state.get("classes") != list(prepared.classes):
        raise NotARunError(f"{run.path / 'best.pth'} was trained on other classes than {recipe.datasets[0]} has")
    try:
        mean, std = normalisation(state)
        pipeline = make_pipeline(
            recipe, recipe.evaluation_side, store.image_size, mean, std, device, numbers.memory_format
        )
        model = make_model(recipe, len(prepared.classes), pipeline.output_size, None, device, numbers)
        put_back(model, state.get("model"))
        network = Classifier(model, model, None, len(prepared.classes), numbers)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotARunError(f"{run.path / 'best.pth'} does not fit the recipe's network: {reason}") from error
    if not isinstance(looks, int):
        raise NotARunError(f"{run.path / 'test.json'} is damaged: 'test_looks' is not a number")

    def look(images: ImageStore, samples: Tensor, mode: Tta) -> Predictions:
        return predict(network, images, samples, pipeline, recipe.evaluate.batch, tta=mode, seed=recipe.seed)

    def look_again(images: ImageStore, plain: Predictions, mode: Tta) -> Predictions:
        return with_tta(plain, mode, recipe.evaluate.tta_below, partial(look, images))

    if chosen is None and tta is not None:
        if (part := prepared.validation) is not None:
            images = store if part.images is prepared.test.images else make_store(part, recipe, device)
            plain = look(images, torch.from_numpy(part.index), None)
            chosen = choose_tta(tta, plain, partial(look_again, images, plain))
        else:
            chosen = {"mode": tta}  # not "auto", which recipes without validation images refuse

    clock = time.perf_counter()
    predictions = look(store, torch.from_numpy(prepared.test.index), None)
    machine.synchronize(device)
    test_time = time.perf_counter() - clock
    arrays = predictions.arrays()
    log = {
        **metrics.scores(arrays["logits"], arrays["labels"]),
        "test_time": test_time,
        "tta": None,
        "classes": list(prepared.classes),
        # A first look that was interrupted once its figures were known is one with the next.
        "test_looks": looks if looks and process_started is not None else looks + 1,
        "total_time": before.get("total_time") if process_started is None else time.time() - process_started,
    }
    if chosen is not None:
        augmented, seconds = predictions, test_time
        if chosen.get("mode") is not None:
            clock = time.perf_counter()
            augmented = look_again(store, predictions, chosen["mode"])
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
    distributed.from_first(lambda: _keep_scores(run, recipe, log, arrays, prepared, mean, std))
    return log


def _end_board(run: RunFolder, train_log: dict[str, Any], test_accuracy: float | None) -> None:
    results = {name: train_log.get(name) for name in ("best_val_accuracy", "overfitting_gap", "train_time")}
    Board(run.path).end({**results, "test_accuracy": test_accuracy})


def _keep_scores(
    run: RunFolder,
    recipe: Recipe,
    log: dict[str, Any],
    arrays: dict[str, Any],
    prepared: Prepared,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    run.write_test_log(log)  # first: once the figures are known, the look must be counted
    run.write_predictions("predictions.npz", **arrays)
    _end_board(run, run.train_log(), log["accuracy"])
    pictures = examples.of_run(recipe, prepared, arrays["logits"], arrays["labels"], mean, std)
    run.write_arrays("examples.npz", pictures)
    # Last: where it is, all of them are (`RunFolder.scored`).
    plots.confusion_matrix(
        run.path / "confusion_matrix.png",
        log["confusion_matrix"],
        log["classes"],
        title=f"{recipe.name} on {recipe.datasets[0]}: test accuracy {log['accuracy']:.2%}",
    )


def _recorded_tta(run: RunFolder) -> dict[str, Any] | None:
    """What a run's test-time augmentation was worth on validation, as training found. Raises NotARunError."""
    found = run.train_log().get("tta")
    if found is None:
        return None
    try:
        if check_tta(found["mode"]) == "auto":
            raise ValueError("'auto' is no decision")
    except (ValueError, TypeError, KeyError) as error:
        raise NotARunError(f"{run.path / 'train.json'} is damaged: 'tta': {error}") from None
    return dict(found)


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
    dataset: Dataset,
    prepared: Prepared,
    device: torch.device,
    task: Task,
    weights: Weights | None,
    decided: Decided,
    asked: str,
) -> dict[str, Any]:
    """asked: the fingerprint of the recipe before anything of it was decided here."""
    numbers = task.network.numerics
    return {
        "cifarlab": __version__,
        "asked": asked,
        **machine.describe(device),
        "numerics": {
            "name": numbers.name,
            "dtype": str(numbers.dtype).removeprefix("torch."),
            "memory_format": str(numbers.memory_format).removeprefix("torch."),
            "compiled": numbers.compiled if task.network.compiled is not None else False,
            "deterministic": numbers.deterministic,
            "tried": decided.numerics,
        },
        "batch_size": {
            "tried": decided.batch_sizes,
        },
        "weights": None
        if weights is None
        else {"source": weights.source, "path": str(weights.path), "sha256": weights.sha256},
        "git": _git_state(),
        "command": _command(),
        "process": {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began": now(),
        },
        "processes": distributed.everyones({"host": socket.gethostname(), "device": str(device)}),
        "data": {
            **prepared.record,
            "folder": str(dataset.folder) if dataset.folder is not None else None,
            "resident": task.store.resident,
        },
    }


def _command() -> str:
    """As it was typed, and not where Python found the program."""
    program = sys.argv[0]
    return shlex.join(["cifarlab" if Path(program).name in ("cifarlab", "__main__.py") else program, *sys.argv[1:]])


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
