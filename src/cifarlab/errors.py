"""Everything that cifarlab refuses, as one tree. Each class carries the exit code of the command line.

    CifarlabError                 1   anything below; caught once, in `cli`, and printed as one sentence
    ├── UsageError                2   the command line is wrong
    │   └── RecipeError           2   a recipe, or a field of one, is wrong
    ├── DataError                 3   a dataset is missing, damaged or not what it should be
    │   └── DownloadError         3   no source could deliver a file
    └── RunError                  4   a run could not start, go on or be read
        ├── StorageError          4   a file could not be written; what was there before is whole
        ├── NotARunError          4   a folder is not a run folder, or is damaged
        └── DivergedError         4   the loss became NaN or infinite

A message is one sentence that names the field, file or value, says what was expected, and what to do.
An interrupt (Ctrl-C) is not an error: it ends with 130, a SIGTERM with 143.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CifarlabError(Exception):
    """Base of the tree. `exit_code` is what the process exits with."""

    exit_code = 1


class UsageError(CifarlabError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class DataError(CifarlabError):
    exit_code = 3


class DownloadError(DataError):
    pass


class RunError(CifarlabError):
    exit_code = 4


class StorageError(RunError):
    pass


class NotARunError(RunError):
    pass


class DivergedError(RunError):
    pass


def printable(text: str) -> str:
    """Text from outside as one line, without what would end it, move a terminal's cursor or not be UTF-8."""
    return "".join(character if character.isprintable() else "?" for character in text)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A clause for a message: the choice that `name` was probably meant to be, or all of them.

    Returns for example `did you mean 'cosine'?` or `choose from adam, sgd`.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "choose from " + ", ".join(names)
