"""Many runs in one table: read from run folders alone, without the training code and without torch."""

from __future__ import annotations

import csv
import html
import io
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cifarlab.errors import NotARunError, printable
from cifarlab.recipe import fingerprint, flatten
from cifarlab.rundir import RunFolder

TRAIN_FIGURES = ("best_val_accuracy", "train_time", "parameters", "overfitting_gap", "flops", "flops_per_second")
TEST_FIGURES = ("accuracy", "test_time")


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation (n - 1) of n runs; `std` is None for one run, both where a run has none."""

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Figure:
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, None)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Row:
    """Runs of one recipe on one dataset and one kind of machine that differ by nothing but their seed.

    accuracy, overfitting_gap: fractions of 1; train_time, test_time: seconds; flops: of all training steps.
    `changes` are the fields in which the recipe differs from others of its name in the table, and the dataset's content
    and the machine where they differ.
    tta: the test-time augmentations that validation chose, with a comma where it chose not the same for each run; None,
    as its figures, where not all runs have them.
    """

    dataset: str
    experiment: str
    changes: str
    n: int
    status: str
    accuracy: Figure
    val_accuracy: Figure
    train_time: Figure
    test_time: Figure
    epochs: float | None
    parameters: int | None
    overfitting_gap: Figure
    flops: Figure
    flops_per_second: Figure
    tta: str | None
    tta_accuracy: Figure
    tta_test_time: Figure
    runs: tuple[str, ...]


def compare(runs: Sequence[RunFolder]) -> list[Row]:
    """A row for each recipe, dataset, content of it and machine, in the order of their names; seeds are folded.

    A run that is not finished has a row of its own, which says so. So have finished runs that were not tested, and a
    seed that was run again: it is no new sample, and would make the spread look smaller than it is. Raises
    NotARunError for a damaged record.
    """
    return fold([read(run) for run in runs])


def fold(runs: Sequence[Entry]) -> list[Row]:
    """`compare` of what `read` has read."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    times_seen: Counter[tuple[Any, ...]] = Counter()
    for run in runs:
        own = "" if run.status == "finished" else run.path
        key = (run.dataset, run.experiment, run.fingerprint, run.content_hash, run.machine, run.tested, own)
        groups.setdefault((*key, times_seen[*key, run.seed]), []).append(run)
        times_seen[*key, run.seed] += 1
    members = list(groups.values())
    changes = _changes([group[0] for group in members])
    rows = [_row(group, text) for group, text in zip(members, changes, strict=True)]
    return sorted(rows, key=lambda row: (row.dataset, row.experiment, row.changes, row.runs))


@dataclass(frozen=True)
class Entry:
    """What a row needs of a run; `fields` are those of its recipe as JSON texts, `figures` the numbers of its logs."""

    path: str
    dataset: str
    experiment: str
    status: str
    seed: str
    fingerprint: str
    content_hash: str
    machine: str
    tested: bool
    epochs: int
    fields: dict[str, str]
    figures: dict[str, float | None]
    tta: str | None


def read(folder: RunFolder) -> Entry:
    """What there is to compare of a run. Raises NotARunError for a damaged record."""
    recipe, log, test = folder.recipe_values(), folder.train_log(), folder.test_log()
    environment = folder.environment() if (folder.path / "environment.json").exists() else {}
    missing = [key for key in ("status", "dataset", "epochs") if key not in log] + ["name"] * ("name" not in recipe)
    if missing:
        raise NotARunError(f"{folder.path} is damaged: its records have no '{missing[0]}'")
    if not isinstance(log["epochs"], list):
        raise NotARunError(f"{folder.path / 'train.json'} is damaged: 'epochs' is not a list")
    try:
        key = fingerprint(recipe)
        fields = {name: json.dumps(value) for name, value in flatten(recipe).items()}
    except TypeError as error:  # YAML has values that JSON has not, such as dates
        raise NotARunError(f"{folder.path / 'recipe.yaml'} is damaged: {error}") from None
    seed = fields.pop("seed", "")
    data = environment.get("data")
    content_hash = str(data.get("content_hash")) if isinstance(data, dict) else ""
    machine = f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('threads')} threads"
    figures = {
        name: _number(record, name, folder.path / file)
        for file, record, names in (("train.json", log, TRAIN_FIGURES), ("test.json", test or {}, TEST_FIGURES))
        for name in names
    }
    tta = (test or {}).get("tta")
    if not isinstance(tta, dict | None):
        raise NotARunError(f"{folder.path / 'test.json'} is damaged: 'tta' is not a mapping")
    figures |= {f"tta_{name}": _number(tta or {}, name, folder.path / "test.json") for name in TEST_FIGURES}
    return Entry(
        path=str(folder.path),
        dataset=printable(str(log["dataset"])),
        experiment=printable(str(recipe["name"])),
        status=printable(str(log["status"])),
        seed=seed,
        fingerprint=key,
        content_hash=content_hash,
        machine=machine,
        tested=test is not None,
        epochs=len(log["epochs"]),
        fields=fields | {"content": content_hash[:8], "machine": machine},
        figures=figures,
        tta=None if tta is None else printable(str(tta.get("mode") or "none")),
    )


def _number(record: dict[str, Any], name: str, path: Path) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise NotARunError(f"{path} is damaged: '{name}' is not a number")
    return value


def _row(group: list[Entry], changes: str) -> Row:
    first = group[0]

    def figure(name: str) -> Figure:
        return Figure.of([run.figures[name] for run in group])

    parameters = first.figures["parameters"]
    modes = [run.tta for run in group if run.tta is not None]
    return Row(
        dataset=first.dataset,
        experiment=first.experiment,
        changes=changes,
        n=len(group),
        status=first.status,
        accuracy=figure("accuracy"),
        val_accuracy=figure("best_val_accuracy"),
        train_time=figure("train_time"),
        test_time=figure("test_time"),
        epochs=first.epochs,
        parameters=None if parameters is None else int(parameters),
        overfitting_gap=figure("overfitting_gap"),
        flops=figure("flops"),
        flops_per_second=figure("flops_per_second"),
        tta=", ".join(dict.fromkeys(modes)) if len(modes) == len(group) else None,
        tta_accuracy=figure("tta_accuracy"),
        tta_test_time=figure("tta_test_time"),
        runs=tuple(run.path for run in group),
    )


def _changes(runs: list[Entry]) -> list[str]:
    """For each run the fields in which it differs from namesakes on the same dataset: `train.epochs=2`.

    Counted rather than compared in pairs: a thousand runs have half a million pairs.
    """
    namesakes = Counter((run.dataset, run.experiment) for run in runs)
    alike = Counter((run.dataset, run.experiment, *field) for run in runs for field in run.fields.items())
    return [
        ", ".join(
            printable(f"{name}={value}")
            for name, value in run.fields.items()
            if alike[run.dataset, run.experiment, name, value] < namesakes[run.dataset, run.experiment]
        )
        for run in runs
    ]


# --- forms of the table ---------------------------------------------------------------------------

COLUMNS = ("experiment", "accuracy", "train time", "test time", "epochs", "parameters", "overfitting gap")


def lines(row: Row) -> list[list[str]]:
    """A row as one-line texts, in the order of COLUMNS; a missing figure is a dash.

    Test-time augmentation, which trains nothing, has a second line of what it changes.
    """
    name = row.experiment + (f" ({row.changes})" if row.changes else "") + (f" ×{row.n}" if row.n > 1 else "")
    if row.status != "finished":
        name += f" [{row.status}]"
    plain = [
        name,
        percent(row.accuracy),
        seconds(row.train_time),
        seconds(row.test_time),
        "–" if row.epochs is None else f"{row.epochs:g}",
        "–" if row.parameters is None else f"{row.parameters:,}",
        _points(row.overfitting_gap),
    ]
    if row.tta is None:
        return [plain]
    return [plain, [f"  + TTA: {row.tta}", percent(row.tta_accuracy), "", seconds(row.tta_test_time), "", "", ""]]


def to_markdown(rows: Sequence[Row]) -> str:
    blocks = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        block = [f"### {_markdown(dataset)}", ""]
        block.append("| " + " | ".join(COLUMNS) + " |")
        block.append("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        for row in rows:
            if row.dataset == dataset:
                block += ["| " + " | ".join(map(_markdown, cells)) + " |" for cells in lines(row)]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks) + "\n"


def to_json(rows: Sequence[Row]) -> str:
    """A list of the rows as objects; in ASCII, so that any terminal and any pipe takes it."""
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row; figures as `accuracy` and `accuracy_std`, empty where unknown; `runs` divided by `;`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        flat: dict[str, Any] = {}
        for key, value in asdict(row).items():
            if isinstance(value, dict):
                flat |= {key: value["mean"], f"{key}_std": value["std"]}
            else:
                flat[key] = ";".join(value) if isinstance(value, tuple) else value
        if number == 0:
            writer.writerow(flat)
        writer.writerow(_harmless(value) for value in flat.values())
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """Spreadsheets run a cell that begins like a formula; a leading quote makes it text."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _markdown(text: str) -> str:
    """Text as a cell: no HTML, no link or picture, no code, and no end of the cell."""
    cell = html.escape(text, quote=False)
    return cell.replace("|", "&#124;").replace("`", "&#96;").replace("](", "]&#40;")


def percent(figure: Figure) -> str:
    """A fraction of 1, with its spread where it has one."""
    if figure.mean is None:
        return "–"
    return f"{figure.mean:.2%}" if figure.std is None else f"{100 * figure.mean:.2f} ± {100 * figure.std:.2f} %"


def _points(figure: Figure) -> str:
    if figure.mean is None:
        return "–"
    spread = "" if figure.std is None else f" ± {100 * figure.std:.2f}"
    return f"{100 * figure.mean:+.2f}{spread}"


def seconds(figure: Figure) -> str:
    """A time, with its spread where it has one."""
    if figure.mean is None:
        return "–"
    digits = 0 if figure.mean >= 100 else 1
    spread = "" if figure.std is None else f" ± {figure.std:.{digits}f}"
    return f"{figure.mean:.{digits}f}{spread} s"
