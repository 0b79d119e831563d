"""The page's HTML. Tables are here, so that they can be read without script; the script draws the charts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Container, Iterable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from cifarlab import __version__, files
from cifarlab.compare import Figure, Row
from cifarlab.errors import CifarlabError, printable
from cifarlab.report.data import DETAILED, PAGE, PICTURED, Report, Run, link, read_report, script_data
from cifarlab.report.facts import count, duration, facts, percent, points
from cifarlab.rundir import RunFolder
from cifarlab.study import Study


class Cell(NamedTuple):
    """A cell of a table. text: plain, or HTML where `ready`. value: what it is sorted by, the text where None."""

    text: str
    value: float | None = None
    figure: bool = False
    ready: bool = False


def write_page(places: Sequence[Path], out: Path) -> Report:
    """Write a page about the runs and studies among `places` and below them; returns what is on it.

    Raises NotARunError where a place does not exist or holds neither, StorageError where the page can't be written.
    """
    report = read_report(places)
    files.write_text(out, page(report, out.resolve().parent, datetime.now()))
    return report


def write_run_page(run: RunFolder) -> Path:
    """Write a run's own page into its folder. Raises RunError, whatever keeps it from being drawn or written."""
    try:
        out = run.path / PAGE
        write_page([run.path], out)
    except CifarlabError:
        raise
    except Exception as error:  # a page is worth no run
        reason = " ".join(str(error).split())[:200]
        raise CifarlabError(f"cannot draw {run.path / PAGE}: {type(error).__name__}: {reason}") from error
    return out


def page(report: Report, folder: Path, now: datetime) -> str:
    """The page as text. folder: where it will be, which its links count from."""
    style, script = _packaged("page.css"), _packaged("page.js")
    alone = len(report.runs) == 1 and not report.studies
    title = report.runs[0].label if alone else "cifarlab report"
    body = [
        _problems(report),
        *(_study(number, path, study) for number, (path, study) in enumerate(report.studies)),
        "" if alone or not report.runs else _tables(report, folder),
        _charts(report, alone=alone),
        "" if len(report.runs) < 2 else _difference(),
        _sections(report, folder, alone=alone),
    ]
    return Template(_packaged("page.html")).substitute(
        policy=_policy(style, script),
        title=escape(title),
        subtitle=escape(_subtitle(report, now, alone=alone)),
        menu=_menu(report, alone=alone),
        style=style,
        script=script,
        body="\n".join(filter(None, body)),
        data=_json(script_data(report, folder)),
    )


def _packaged(name: str) -> str:
    return resources.files("cifarlab.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing is loaded, and nothing runs but this style and this script."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """JSON that is safe inside of a script element, which ends at `</script` and knows no escapes but JSON's own."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def escape(text: str) -> str:
    """Text from anywhere as HTML, in an element or an attribute."""
    return html.escape(printable(text))


# --- frame ----------------------------------------------------------------------------------------


def _subtitle(report: Report, now: datetime, *, alone: bool) -> str:
    if alone:
        run = report.runs[0]
        parts = [run.dataset, run.status, run.folder.path.name]
    else:
        parts = [_plural(len(report.runs), "run")] if report.runs else []
        if report.studies:
            parts.append(_plural(len(report.studies), "study", "studies"))
        datasets = dict.fromkeys(run.dataset for run in report.runs)
        parts.append(", ".join(datasets) if len(datasets) <= 6 else f"{len(datasets)} datasets")
    return printable(" · ".join([*filter(None, parts), f"{now:%Y-%m-%d %H:%M}", f"cifarlab {__version__}"]))


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _menu(report: Report, *, alone: bool) -> str:
    if alone or not report.runs:
        return ""
    items = [("study-0", "Study" if len(report.studies) == 1 else "Studies")] if report.studies else []
    items += [("recipes", "Recipes"), ("runs", "Runs"), ("accuracy", "Accuracy and time"), ("curves", "Curves")]
    items += [("difference", "Two recipes")] if len(report.runs) > 1 else []
    items += [("sections", "Each run")]
    return "".join(f'<a href="#{name}">{text}</a>' for name, text in items)


def _problems(report: Report) -> str:
    if not report.problems:
        return ""
    shown = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.problems[:50])
    more = f"<li>and {len(report.problems) - 50:,} more</li>" if len(report.problems) > 50 else ""
    return f'<section class="problems"><h2>What could not be read</h2><ul>{shown}{more}</ul></section>'


def _table(
    name: str, caption: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]], words: Container[int]
) -> str:
    """A table whose headings are buttons that sort it. words: the places of the columns that are no figures."""
    head = "".join(
        f'<th scope="col" class="{"text" if place in words else "figure"}"><button type="button">{escape(text)}'
        "</button></th>"
        if text
        else '<th scope="col"><span class="hidden">in the curves</span></th>'
        for place, text in enumerate(headings)
    )
    body = "".join(f"<tr>{''.join(map(_td, row))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table id="{name}" '
        f'class="sortable"><caption class="hidden">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _td(cell: Cell) -> str:
    text = cell.text if cell.ready else escape(cell.text)
    value = f' data-value="{cell.value:.12g}"' if cell.value is not None else ""
    return f"<td{' class=figure' if cell.figure else ''}{value}>{text or '–' if cell.figure else text}</td>"


def _figure(value: float | None, text: str) -> Cell:
    return Cell(text, value, figure=True)


# --- tables ---------------------------------------------------------------------------------------


def _tables(report: Report, folder: Path) -> str:
    rows, runs = report.rows, report.runs
    folded = _table(
        "recipe-table",
        "Recipes: mean and standard deviation over seeds",
        ("recipe", "dataset", "runs", "test accuracy, %", "validation, %", "training time", "epochs", "gap, points"),
        (_folded(row) for row in rows),
        words=range(2),
    )
    headings = (
        *("", "run", "dataset", "status", "test, %", "with TTA, %", "validation, %", "training time"),
        *("epochs", "parameters", "gap, points", "ECE, %"),
    )
    table = _table("run-table", "Runs", headings, (_run_cells(run, folder) for run in runs), words=range(4))
    some = ""
    if len(runs) > DETAILED:
        some = (
            f'<p class="note">The {DETAILED} most accurate runs have a section on this page, '
            f"{PICTURED} of them with pictures; others link to their own page where there is one.</p>"
        )
    return (
        f'<section id="recipes"><h2>Recipes</h2><p class="note">Runs that differ by nothing but their seed, as mean ± '
        f"standard deviation (n − 1).</p>{folded}</section>\n"
        f'<section id="runs"><h2>Runs</h2>{some}<p class="controls"><label>Filter <input id="filter" type="search" '
        f'placeholder="words that a row must have" autocomplete="off"></label> <span id="filtered" role="status">'
        f"{len(runs):,} runs</span></p>{table}</section>"
    )


def _folded(row: Row) -> list[Cell]:
    name = row.experiment + (f" ({row.changes})" if row.changes else "")
    if row.status != "finished":
        name += f" [{row.status}]"
    gap = row.overfitting_gap
    return [
        Cell(name),
        Cell(row.dataset),
        _figure(row.n, count(row.n)),
        _spread(row.accuracy, 100),
        _spread(row.val_accuracy, 100),
        _figure(row.train_time.mean, _time(row.train_time)),
        _figure(row.epochs, count(row.epochs)),
        _figure(gap.mean, points(gap.mean) + ("" if gap.std is None else f" ± {100 * gap.std:.2f}")),
    ]


def _spread(figure: Figure, scale: float) -> Cell:
    if figure.mean is None:
        return _figure(None, "")
    spread = "" if figure.std is None else f" ± {scale * figure.std:.2f}"
    return _figure(figure.mean, f"{scale * figure.mean:.2f}{spread}")


def _time(figure: Figure) -> str:
    spread = "" if figure.mean is None or figure.std is None else f" ± {figure.std:.1f} s"
    return duration(figure.mean) + spread


def _run_cells(run: Run, folder: Path) -> list[Cell]:
    name = escape(run.label)
    own = "" if run.page is None else escape(link(run.page, folder))
    if run.detail is not None:
        name = f'<a href="#run-{run.number}">{name}</a>'
        own = own and f' <a class="own" href="{own}" title="the run\'s own page" aria-label="the run\'s own page">↗</a>'
    elif own:
        name, own = f'<a href="{own}">{name}</a>', ""
    shown = run.detail is not None and run.detail["curves"] is not None
    label = escape(f"{run.label} in the curves")
    mark = f'<input type="checkbox" value="{run.number}" aria-label="{label}" disabled>' if shown else ""
    status = escape(run.status + (", damaged" if run.problem is not None else ""))
    return [
        Cell(mark, ready=True),
        Cell(f'{name}{own} <span class="muted stamp">{escape(run.folder.path.name)}</span>', ready=True),
        Cell(run.dataset),
        Cell(f'<span class="status {"fine" if status == "finished" else "other"}">{status}</span>', ready=True),
        _figure(run.accuracy, _hundredths(run.accuracy)),
        _figure(run.tta_accuracy, _hundredths(run.tta_accuracy)),
        _figure(run.val_accuracy, _hundredths(run.val_accuracy)),
        _figure(run.train_time, duration(run.train_time)),
        _figure(run.epochs, count(run.epochs)),
        _figure(run.parameters, count(run.parameters)),
        _figure(run.gap, points(run.gap)),
        _figure(run.ece, _hundredths(run.ece)),
    ]


def _hundredths(value: float | None) -> str:
    return percent(value).removesuffix("%")


# --- charts and sections --------------------------------------------------------------------------


def _charts(report: Report, *, alone: bool) -> str:
    parts = []
    if report.runs and not alone:
        parts.append(
            '<section id="accuracy"><h2>Accuracy and training time</h2><p class="note">The line is the Pareto front of '
            "the finished runs: none is both faster and more accurate.</p>"
            '<div id="fronts"></div></section>'
        )
    if any(run.detail is not None and run.detail["curves"] is not None for run in report.runs):
        parts.append(
            '<section id="curves"><h2>Curves</h2><p class="note">Solid: validation; dashed: training; dotted: averaged '
            "weights. Drag over a chart to zoom in; double-click or Escape to zoom out. "
            f'{"" if alone else "Runs are chosen by the boxes in the table."}</p><div id="legend"></div>'
            '<p class="controls" id="zoom"></p><div class="panels" id="panels"></div></section>'
        )
    return "\n".join(parts)


def _difference() -> str:
    return (
        '<section id="difference"><h2>Two recipes</h2><p class="controls"><label>One <select id="one"></select></label>'
        '<label>The other <select id="other"></select></label></p><div id="differences" role="status"></div></section>'
    )


def _sections(report: Report, folder: Path, *, alone: bool) -> str:
    shown = [run for run in report.runs if run.detail is not None]
    if not shown:
        return ""
    sections = "\n".join(_section(run, folder, opened=alone) for run in shown)
    heading = "" if alone else "<h2>Each run</h2>"
    return (
        f'<section id="sections">{heading}<noscript><p class="note">Charts and pictures are drawn by a script, which '
        f"is switched off.</p></noscript>{sections}</section>"
    )


def _section(run: Run, folder: Path, *, opened: bool) -> str:
    groups = "".join(
        f'<div class="facts"><h4>{escape(title)}</h4><dl>'
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in known)
        + "</dl></div>"
        for title, known in facts(run)
    )
    damaged = "" if run.problem is None else f'<p class="note">{escape(run.problem)}</p>'
    figures = " · ".join(filter(None, (run.dataset, percent(run.accuracy), duration(run.train_time), run.status)))
    own = ""
    if run.page is not None and run.detail is not None and run.detail["pictures"] is None:
        own = f'<p class="note"><a href="{escape(link(run.page, folder))}">Its own page</a> has its pictures.</p>'
    return (
        f'<details class="run" id="run-{run.number}"{" open" if opened else ""}><summary><span class="name">'
        f'{escape(run.label)}</span> <span class="muted">{escape(figures)}</span></summary>{damaged}{own}'
        f'<div class="drawn"></div><div class="columns">{groups}</div></details>'
    )


# --- studies --------------------------------------------------------------------------------------


def _study(number: int, path: Path, study: Study) -> str:
    results = {result.arm: result for result in study.results}
    statuses: dict[str, dict[str, int]] = {}
    for run in study.runs:
        found = statuses.setdefault(run.arm, {})
        found[run.status] = found.get(run.status, 0) + 1

    def cells(place: int) -> list[Cell]:
        arm = study.arms[place]
        result = results.get(arm.id)
        ended = ", ".join(f"{amount} {status}" for status, amount in sorted(statuses.get(arm.id, {}).items()))
        name = printable(arm.name)[:300] + (" (baseline)" if place == 0 and "baseline" not in arm.name else "")
        if result is None:
            return [Cell(name), Cell(printable(ended)), *[_figure(None, "")] * 6, Cell("")]
        interval = ""
        if result.low is not None and result.high is not None:
            interval = f" [{points(result.low)}, {points(result.high)}]"
        verdict = printable(result.verdict)
        if result.more_seeds:
            verdict += f" ({_plural(result.more_seeds, 'more seed')} would tell)"
        return [
            Cell(name),
            Cell(printable(ended)),
            _figure(result.n, count(result.n)),
            _spread(Figure(result.mean, result.std), 100),
            _figure(result.difference, points(result.difference) + (interval if result.difference is not None else "")),
            _figure(result.p, "" if result.p is None else f"{result.p:.3g}"),
            _figure(result.p_holm, "" if result.p_holm is None else f"{result.p_holm:.3g}"),
            _figure(result.seconds, duration(result.seconds)),
            Cell(verdict),
        ]

    headings = ("arm", "runs", "n", "validation, %", "difference, points", "p", "p (Holm)", "time a run", "verdict")
    table = _table(f"study-table-{number}", "Arms", headings, map(cells, range(len(study.arms))), words=(0, 1, 8))
    said = [study.status, study.design, study.dataset, study.created, _plural(len(study.seeds), "seed")]
    said.append(f"to resolve {100 * study.resolve:.2g} points")
    looks = ""
    if study.test is not None:
        entries = [
            f"{printable(look.arm)}, seed {look.seed}: {percent(look.accuracy)} ({printable(look.when)})"
            for look in study.test.looks
        ]
        shown = "; ".join(entries[:30]) + ("; …" if len(entries) > 30 else "")
        looks = f'<p class="note">{_plural(len(entries), "look")} at the test set. {escape(shown)}</p>'
    note = printable(" · ".join(filter(None, [*said, str(path)])))
    return (
        f'<section id="study-{number}" class="study"><h2>Study: {escape(study.name)}</h2>'
        f'<p class="note">{escape(note)}</p><div class="study-charts" data-study="{number}"></div>'
        f"{table}{looks}</section>"
    )
