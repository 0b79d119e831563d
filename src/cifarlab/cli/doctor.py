"""`cifarlab doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cifarlab.cli.common import DataOption, say


def doctor(
    runs: Annotated[Path, typer.Option(readable=False, help="Folder that the run folders go into.")] = Path("runs"),
    data: DataOption = None,
) -> None:
    """Look at what runs need of this machine, and say what to do where something is missing. Changes nothing.

    Ends with 1 where a run could not work.
    """
    from cifarlab import machine

    machine.prepare()
    from cifarlab.doctor import examine

    bad = 0
    for finding in examine(runs, data):
        bad += finding.level == "bad"
        mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.level]
        say(f"{mark}  {finding.what}: {finding.found}")
        if finding.mend:
            say(f"      -> {finding.mend}")
    say(f"{bad} problem{'s' * (bad > 1)} to mend" if bad else "runs can work here")
    raise typer.Exit(1 if bad else 0)
