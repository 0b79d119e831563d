"""What all tests share: the same examples on every run, and no time limits, as tests time nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from matplotlib.figure import Figure

settings.register_profile("cifarlab", derandomize=True, deadline=None)
settings.load_profile("cifarlab")


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
