"""Run folders and studies as plain values for the page. Whatever is damaged is left out, and said so."""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifarlab import compare
from cifarlab.errors import NotARunError, printable
from cifarlab.rundir import RunFolder, find_runs
from cifarlab.study import Study, find_studies

if TYPE_CHECKING:
    import numpy as np

PAGE = "report.html"
DETAILED = 60  # runs that have details on the page, the most accurate ones
PICTURED = 12  # of those, the ones that have pictures there too
MOST_EPOCHS = 400  # points of a curve
MOST_CLASSES = 1_000
COLUMNS = 8  # pictures side by side in a sheet
EXAMPLES = ("most_wrong", "least_sure", "augmented")
CURVES = ("train_loss", "val_loss", "ema_val_loss", "train_accuracy", "val_accuracy", "ema_val_accuracy", "lr")


@dataclass
class Run:
    """One run as the page shows it.

    accuracy, val_accuracy, tta_accuracy, ece, gap: fractions of 1; train_time: seconds. None is unknown. `problem` says
    what is damaged. arm: the name of the study's arm that it is a run of. `train`, `test` and `environment` are its
    records, unchecked and empty where they can't be read; `detail` is what the charts of its section are drawn from,
    None where it has no section.
    """

    number: int
    folder: RunFolder
    experiment: str
    dataset: str
    seed: str
    status: str
    accuracy: float | None
    val_accuracy: float | None
    train_time: float | None
    gap: float | None
    ece: float | None
    tta_accuracy: float | None
    parameters: float | None
    epochs: int | None
    train: dict[str, Any]
    test: dict[str, Any]
    environment: dict[str, Any]
    entry: compare.Entry | None
    problem: str | None = None
    changes: str = ""
    arm: str = ""
    page: Path | None = None
    detail: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """What it shares with the runs that differ by their seed, or by a field or two."""
        return self.arm or self.experiment

    @property
    def label(self) -> str:
        changes = f" ({self.changes})" if self.changes and not self.arm else ""
        return f"{self.name}{changes}" + (f", seed {self.seed}" if self.seed else "")


@dataclass
class Report:
    """All that a page shows. problems: a sentence each. pictured: how many of the runs have pictures on it."""

    runs: list[Run] = field(default_factory=list)
    rows: list[compare.Row] = field(default_factory=list)
    studies: list[tuple[Path, Study]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_report(places: Sequence[Path], *, detailed: int = DETAILED, pictured: int = PICTURED) -> Report:
    """The runs and studies among `places` and below them. detailed, pictured: how many runs at most have that.

    Raises NotARunError where a place does not exist or holds neither.
    """
    report = Report()
    for folder in find_studies(places):
        try:
            report.studies.append((folder.path, folder.read()))
        except NotARunError as error:
            report.problems.append(printable(str(error)))
    found = {run.path.resolve(): run for place in places for run in _runs(place)}
    resolved = sorted(found)
    report.runs = [_read(number, found[key]) for number, key in enumerate(resolved)]
    studied = [(path.resolve() / "runs", study) for path, study in report.studies]
    for run, own in zip(report.runs, resolved, strict=True):
        run.arm = _arm(own, studied)
    report.rows = compare.fold([run.entry for run in report.runs if run.entry is not None])
    changes = {path: row.changes for row in report.rows for path in row.runs}
    for run in report.runs:
        run.changes = changes.get(str(run.folder.path), "")
        if run.problem is not None:
            report.problems.append(run.problem)
    arms = {str(run.folder.path): run.arm for run in report.runs}
    # A study's runs are many recipes that differ by a field each, which its arms are named by.
    report.rows = [replace(row, changes=arms.get(row.runs[0]) or row.changes) for row in report.rows]
    best = sorted(report.runs, key=lambda run: (-_first(run.accuracy, run.val_accuracy, -1.0), run.number))
    for place, run in enumerate(best[:detailed]):
        run.detail = _detail(run, pictures=place < pictured, problems=report.problems)
    return report


def _arm(place: Path, studies: Sequence[tuple[Path, Study]]) -> str:
    """The arm that a run belongs to, by where it lies; with the study's name where there are several.

    studies: the folder of each one's runs. It and `place` are resolved.
    """
    for runs, study in studies:
        if runs in place.parents:
            ident = place.relative_to(runs).parts[0]
            name = next((arm.name for arm in study.arms if arm.id == ident), ident)
            return printable(f"{study.name}: {name}" if len(studies) > 1 else name)[:300]
    return ""


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the (cost, worth) points that no other one beats, by ascending cost.

    One beats another where it costs no more and is worth no less, and isn't equal to it.
    """
    front: list[int] = []
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    for place in order:
        if not front or points[place][1] > points[front[-1]][1] or points[place] == points[front[-1]]:
            front.append(place)
    return front


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def at(record: Any, *keys: str) -> Any:
    """What a nested record has there; None where it hasn't."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


# --- reading --------------------------------------------------------------------------------------


def _runs(place: Path) -> list[RunFolder]:
    try:
        return find_runs([place])
    except NotARunError:
        if not find_studies([place]):
            raise
        return []  # a study that has not begun


def _read(place: int, folder: RunFolder) -> Run:
    problem, entry = None, None
    try:
        entry = compare.read(folder)
    except NotARunError as error:
        problem = printable(str(error))
    train, test, environment = map(_record, (folder.train_log, folder.test_log, folder.environment))
    recipe = {} if entry is not None else _record(folder.recipe_values)
    epochs = train.get("epochs")
    page = folder.path / PAGE
    return Run(
        number=place,
        folder=folder,
        experiment=entry.experiment if entry is not None else _text(recipe.get("name", folder.path.parent.parent.name)),
        dataset=_text(train.get("dataset", folder.path.parent.name)),
        seed=printable(entry.seed) if entry is not None else _text(recipe.get("seed", "")),
        status=_text(train.get("status", "unreadable")),
        accuracy=number(test.get("accuracy")),
        val_accuracy=number(train.get("best_val_accuracy")),
        train_time=number(train.get("train_time")),
        gap=number(train.get("overfitting_gap")),
        ece=number(test.get("ece")),
        tta_accuracy=number(at(test, "tta", "accuracy")),
        parameters=number(train.get("parameters")),
        epochs=len(epochs) if isinstance(epochs, list) else None,
        train=train,
        test=test,
        environment=environment,
        entry=entry,
        problem=problem,
        page=page if page.is_file() else None,
    )


def _record(read: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    try:
        return read() or {}
    except NotARunError:
        return {}


def _text(value: Any) -> str:
    return printable(str(value))[:500]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


# --- details --------------------------------------------------------------------------------------


def _detail(run: Run, *, pictures: bool, problems: list[str]) -> dict[str, Any]:
    """What the charts of a run are drawn from, JSON-ready; each part is None where the run hasn't got it.

    `confusion` is the non-zero cells of the matrix, row after row: how many cells further each stands, and its count.
    """
    matrix = _matrix(run.test.get("confusion_matrix"))
    detail: dict[str, Any] = {
        "classes": None,
        "confusion": None if matrix is None else _sparse(matrix),
        "reliability": None,
        "without_twins": None,
        "pictures": None,
        "curves": _curves(run.train.get("epochs")),
        "best_epoch": number(run.train.get("best_epoch")),
    }
    predictions = None
    if run.test and (run.folder.path / "predictions.npz").exists():
        try:
            predictions = _predictions(run.folder)
            detail |= _reliability(predictions, at(run.environment, "data", "leaks", "test_twins_in_train"))
        except NotARunError as error:
            problems.append(printable(str(error)))
    count = len(matrix) if matrix is not None else predictions.logits.shape[1] if predictions is not None else 0
    detail["classes"] = _classes(run.test.get("classes"), count)
    if pictures and (run.folder.path / "examples.npz").exists():
        try:
            detail["pictures"] = _pictures(run.folder, predictions)
        except NotARunError as error:
            problems.append(printable(str(error)))
    return detail


def _matrix(value: Any) -> list[list[int]] | None:
    """A confusion matrix, where that is what it is."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_CLASSES:
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != len(value):
            return None
        if not all(type(cell) is int and 0 <= cell < 2**40 for cell in row):
            return None
    return value


def _sparse(matrix: list[list[int]]) -> list[int]:
    flat: list[int] = []
    last = 0
    for place, count in enumerate(cell for row in matrix for cell in row):
        if count:
            flat += (place - last, count)
            last = place
    return flat


def _classes(value: Any, count: int) -> list[str]:
    if isinstance(value, list) and len(value) >= count and all(isinstance(name, str) for name in value):
        return [printable(name)[:100] for name in value]
    return [str(place) for place in range(count)]


def _curves(epochs: Any) -> dict[str, list[float | None]] | None:
    """The columns of train.json's epochs that have any number, five digits each; every k-th epoch of very many."""
    if not isinstance(epochs, list) or not epochs:
        return None
    step = -(-len(epochs) // MOST_EPOCHS)
    kept = epochs[step - 1 :: step]
    columns = {name: [_rounded(at(entry, name)) for entry in kept] for name in ("epoch", *CURVES)}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _rounded(value: Any) -> float | None:
    known = number(value)
    return None if known is None else float(f"{known:.5g}")


@dataclass(frozen=True)
class _Predictions:
    """logits (N, K) of any float type, log_probabilities the same in float64; labels and index int64 (N,)."""

    logits: np.ndarray[Any, Any]
    log_probabilities: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any]


def _predictions(folder: RunFolder) -> _Predictions:
    """Raises NotARunError where predictions.npz is damaged."""
    import numpy as np

    from cifarlab.metrics import log_softmax

    arrays = folder.read_arrays("predictions.npz")
    logits, labels, index = (arrays.get(name) for name in ("logits", "labels", "index"))
    if logits is None or labels is None or index is None:
        raise NotARunError(f"{folder.path / 'predictions.npz'} is damaged: an array is missing")
    whole = all(array.dtype.kind == "i" and array.shape == logits.shape[:1] for array in (labels, index))
    if not whole or logits.ndim != 2 or logits.dtype.kind != "f" or not logits.size or not np.isfinite(logits).all():
        raise NotARunError(f"{folder.path / 'predictions.npz'} is damaged: its arrays don't fit each other")
    if not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise NotARunError(f"{folder.path / 'predictions.npz'} is damaged: a label is no class")
    return _Predictions(logits, log_softmax(logits), labels, index)


def _reliability(found: _Predictions, twins: Any) -> dict[str, Any]:
    """The bins of the reliability diagram; accuracy without the test images that stand in training too, at `twins`."""
    import numpy as np

    from cifarlab.metrics import calibration

    right = found.logits.argmax(axis=1) == found.labels
    detail: dict[str, Any] = {"reliability": calibration(np.exp(found.log_probabilities.max(axis=1)), right)}
    if isinstance(twins, list) and all(type(place) is int and 0 <= place < len(right) for place in twins):
        rest = np.delete(right, sorted(set(twins)))
        if len(rest) and twins:
            detail["without_twins"] = {"accuracy": float(rest.mean()), "images": len(rest), "left_out": len(set(twins))}
    return detail


def _pictures(folder: RunFolder, predictions: _Predictions | None) -> dict[str, Any]:
    """The lists of examples.npz, each as a sheet and what is known of its pictures. Raises NotARunError."""
    import numpy as np

    arrays = folder.read_arrays("examples.npz")
    lists = {}
    rows = {int(index): row for row, index in enumerate(predictions.index)} if predictions is not None else {}
    for name in EXAMPLES:
        images, index, labels = (arrays.get(f"{name}{of}") for of in ("", "_index", "_labels"))
        if images is None or index is None or labels is None:
            continue
        fits = images.ndim == 4 and images.dtype == np.uint8 and images.shape[1] == 3 and len(images) <= 100
        whole = all(array.dtype.kind == "i" and array.shape == images.shape[:1] for array in (index, labels))
        if not fits or not whole or max(images.shape[2:]) > 256 or min(images.shape[2:]) < 1:
            raise NotARunError(f"{folder.path / 'examples.npz'} is damaged: its arrays don't fit each other")
        if len(images):
            items = [{"index": int(place), "label": int(label)} for place, label in zip(index, labels, strict=True)]
            if name != "augmented" and predictions is not None:
                for item in items:
                    item |= _guess(predictions, rows.get(item["index"]), item["label"])
            lists[name] = {"sheet": _sheet(images), "size": images.shape[2:], "columns": COLUMNS, "items": items}
    return lists


def _guess(found: _Predictions, row: int | None, label: int) -> dict[str, Any]:
    """The two likeliest classes of an image with their probabilities, and its own class's."""
    import numpy as np

    if row is None:
        return {}
    probabilities = np.exp(found.log_probabilities[row])
    likeliest = np.argsort(-probabilities, kind="stable")[:2]
    own = float(f"{probabilities[label]:.3g}") if 0 <= label < len(probabilities) else None
    return {"guesses": [[int(place), float(f"{probabilities[place]:.3g}")] for place in likeliest], "own": own}


def _sheet(images: np.ndarray[Any, Any]) -> str:
    """uint8 (n, 3, h, w) as one picture, COLUMNS a row, in a data URI: without loss where that takes less."""
    import numpy as np
    from PIL import Image

    count, _, height, width = images.shape
    rows = -(-count // COLUMNS)
    filled = np.zeros((rows * COLUMNS, 3, height, width), np.uint8)
    filled[:count] = images
    grid = filled.reshape(rows, COLUMNS, 3, height, width).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(np.ascontiguousarray(grid).reshape(rows * height, COLUMNS * width, 3))
    forms = []
    for kind, options in (("png", {}), ("jpeg", {"quality": 82, "subsampling": 0})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        forms.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(forms, key=len)


# --- what the script draws from -------------------------------------------------------------------


def script_data(report: Report, folder: Path) -> dict[str, Any]:
    """The page's one block of JSON. folder: where the page will be, which links count from."""
    return {
        "runs": [_for_script(run, folder) for run in report.runs],
        "fronts": _fronts(report.runs),
        "recipes": _recipes(report.runs),
        "references": references(),
        "studies": [_study_for_script(study) for _, study in report.studies],
        "details": {str(run.number): run.detail for run in report.runs if run.detail is not None},
    }


def references() -> dict[str, Any]:
    """The experiments that cifarlab began with: `machine`, and for each dataset their name, accuracy and seconds."""
    from importlib import resources

    text = resources.files("cifarlab.report").joinpath("references.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def link(path: Path, folder: Path) -> str:
    """A file's address, relative to the page's folder, that no name can turn into anything but a path."""
    from urllib.parse import quote

    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        return path.resolve().as_uri()
    return "./" + quote(os.fsencode(relative).replace(os.sep.encode(), b"/"), safe="/")


def _for_script(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "label": run.label,
        "name": run.name,
        "folder": printable(run.folder.path.name),
        "dataset": run.dataset,
        "accuracy": run.accuracy,
        "val_accuracy": run.val_accuracy,
        "time": run.train_time,
        "gap": run.gap,
        "page": None if run.page is None else link(run.page, folder),
    }


def _fronts(runs: Sequence[Run]) -> dict[str, dict[str, list[int]]]:
    """For each dataset the numbers of the runs on the Pareto front of training time and either accuracy."""
    fronts: dict[str, dict[str, list[int]]] = {}
    for dataset in dict.fromkeys(run.dataset for run in runs):
        fronts[dataset] = {}
        for which in ("accuracy", "val_accuracy"):
            points = [
                (run.number, (run.train_time, worth))
                for run in runs
                if run.dataset == dataset
                and run.status == "finished"
                and run.train_time is not None
                and run.train_time > 0
                and (worth := getattr(run, which)) is not None
            ]
            fronts[dataset][which] = [points[place][0] for place in pareto([point for _, point in points])]
    return fronts


def _recipes(runs: Sequence[Run]) -> dict[str, Any]:
    """The fields of all recipes: each one's commonest value, and for each run the values that are others.

    A thousand recipes have a hundred fields each, nearly all of them equal. None where a run has no such field.
    """
    recipes = {run.number: {"seed": run.seed, **run.entry.fields} for run in runs if run.entry is not None}
    names = sorted({name for fields in recipes.values() for name in fields})
    common = {name: Counter(fields.get(name) for fields in recipes.values()).most_common(1)[0][0] for name in names}
    return {
        "fields": [printable(name) for name in names],
        "common": [_shown(common[name]) for name in names],
        "others": {
            str(run): [
                [place, _shown(fields.get(name))]
                for place, name in enumerate(names)
                if fields.get(name) != common[name]
            ]
            for run, fields in recipes.items()
        },
    }


def _shown(value: str | None) -> str | None:
    return None if value is None else printable(value)[:300]


def _study_for_script(study: Study) -> dict[str, Any]:
    """What the charts of a study are drawn from; a search also has its trials."""
    results = {result.arm: result for result in study.results}
    searched = study.design == "search"
    accuracies: dict[str, list[float]] = {}
    for run in study.runs:
        if run.val_accuracy is not None:
            accuracies.setdefault(run.arm, []).append(run.val_accuracy)
    arms = []
    for arm in study.arms:
        result, found = results.get(arm.id), accuracies.get(arm.id, [])
        mean = result.mean if result is not None and result.mean is not None else None
        arms.append(
            {
                "name": printable(arm.name)[:300],
                "difference": result and result.difference,
                "low": result and result.low,
                "high": result and result.high,
                "verdict": result and result.verdict and printable(result.verdict),
                "accuracy": mean if mean is not None else sum(found) / len(found) if found else None,
                "changes": {printable(str(k)): _plain(v) for k, v in arm.changes.items()} if searched else {},
            }
        )
    return {"name": printable(study.name), "design": study.design, "resolve": study.resolve, "arms": arms}


def _plain(value: Any) -> float | str:
    known = number(value)
    return known if known is not None else printable(json.dumps(value) if not isinstance(value, str) else value)[:100]
