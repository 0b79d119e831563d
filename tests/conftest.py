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

# As commands have it: by default a thread that waits for another keeps it from its core where somebody else wants one
# too, as the tests' own processes do, and a step takes five times as long. Read as torch is imported, in children too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are saved, so that a test can ask for their artists."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    yield saved
