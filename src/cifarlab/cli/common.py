"""What the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder that holds cifar-10-batches-py and its like. [default: CIFARLAB_DATA, or the cache]"
    ),
]


def printable(text: str) -> str:
    """Text from outside, without what would move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(printable(text) + "\n")
