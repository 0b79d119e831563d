"""What all tests share: the same examples on every run, and no time limits, as tests time nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# By default a thread of torch's that waits for others keeps them from its core for a while, where the tests' own
# processes or anybody else want it too: a short run took ten times as long. What is computed is the same. Read as torch
# is imported, in children as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("cifarlab", derandomize=True, deadline=None)
settings.load_profile("cifarlab")


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """What a command does for its own process is undone: tests of numbers count on the smallest ones."""
    yield
    if "torch" in sys.modules:
        import torch

        torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def nothing_was_measured_before(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured is remembered for one test only, and never where the user's is."""
    path = tmp_path_factory.getbasetemp() / f"measured-{uuid4().hex}.json"
    monkeypatch.setattr("cifarlab.remembered._path", lambda: path)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing; those of `short_runs.run` don't in any case."""
    from short_runs import without_pictures

    without_pictures(monkeypatch)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are saved, so that a test can ask for their artists."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    yield saved
