"""`cifarlab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cifarlab.cli.common import say


def report(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN, STUDY OR FOLDER]...",
            readable=False,
            help="Run folders, studies, or folders that hold some. [default: runs]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(readable=False, help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about runs and studies: tables, curves, confusions, pictures.

    It opens from the disk, in any browser, and loads nothing from anywhere.
    """
    from cifarlab.report.page import write_page

    written = write_page(places or [Path("runs")], out)
    runs, studies = len(written.runs), len(written.studies)
    some = f", {studies} {'study' if studies == 1 else 'studies'}" if studies else ""
    unread = f"; {len(written.problems)} could not be read whole" if written.problems else ""
    say(f"{out}: {runs:,} {'run' if runs == 1 else 'runs'}{some}, {out.stat().st_size / 1e6:.1f} MB{unread}")
