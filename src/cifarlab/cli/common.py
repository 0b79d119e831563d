"""What the commands share."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cifarlab.errors import UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        readable=False,  # what can't be read is a matter of data, with that exit code, not of usage
        help="Folder that holds cifar-10-batches-py and its like. [default: CIFARLAB_DATA, or the cache]",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set train.epochs=2.")
]

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m)?\s*(?:(\d+(?:\.\d+)?)s)?")


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(printable(text) + "\n")


def parse_time(text: str, option: str) -> float:
    """`2h`, `90m`, `1h30m`, `45s` as seconds. Raises UsageError."""
    found = _TIME.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total < 1e9:
        raise UsageError(f"{option} {text}: expected a time such as 30s, 10m, 2h or 1h30m")
    return total


def make_console() -> Console:
    """Where tables and the live line go; wide where no terminal says how wide it is, so that files keep whole lines."""
    from rich.console import Console

    class Patient(Console):
        """A console whose reader may leave (`cifarlab run … | head`): the run goes on, unheard."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # What is printed has names from outside in it, where `:cat:` is no picture of a cat.
    console = Patient(highlight=False, soft_wrap=True, emoji=False)
    return console if console.is_terminal else Patient(highlight=False, soft_wrap=True, emoji=False, width=160)
