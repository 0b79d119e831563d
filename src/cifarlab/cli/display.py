"""What a run shows: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from cifarlab.errors import printable
from cifarlab.train import Progress


class RunDisplay:
    """Shows a run's progress. `report` prints a line above the live one."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = console.is_terminal
        self._pause = 0.2 if self._live else 30.0
        self._next = time.monotonic() + self._pause
        self._validated = ""
        self._bar = ProgressBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            auto_refresh=False,  # a refreshing thread would take turns with the training one
            disable=not self._live,
        )
        self._task = self._bar.add_task(printable(title), total=None, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def progress(self, progress: Progress) -> None:
        self._next = time.monotonic() + self._pause
        status = (
            f"epoch {progress.epoch}/{progress.epochs:g}  loss {progress.loss:.4f}  "
            f"accuracy {progress.accuracy:.2%}  {progress.images_per_second:,.0f} images/s  "
            f"{_clock(progress.seconds_left)} left{self._validated}"
        )
        if self._live:
            self._bar.update(self._task, completed=progress.step, total=progress.total_steps, status=status)
            self._bar.refresh()
        else:
            self.report(f"{self._title}  {status}")

    def epoch(self, entry: dict[str, Any], epochs: float) -> None:
        if entry["val_accuracy"] is not None:
            self._validated = f"  validation {entry['val_accuracy']:.2%}"
            if entry["ema_val_accuracy"] is not None:
                self._validated += f", average {entry['ema_val_accuracy']:.2%}"
        if not self._live:
            self._next = time.monotonic() + self._pause
            loss = "" if entry["val_loss"] is None else f" (loss {entry['val_loss']:.4f})"
            self.report(
                f"{self._title}  epoch {entry['epoch']}/{epochs:g}  loss {entry['train_loss']:.4f}  "
                f"accuracy {entry['train_accuracy']:.2%}{self._validated}{loss}  {entry['seconds']:.1f} s"
            )


class NoDisplay:
    """What the processes show that train along with the first one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, text: str) -> None:
        pass

    def due(self) -> bool:
        return False

    def progress(self, progress: Progress) -> None:
        pass

    def epoch(self, entry: dict[str, Any], epochs: float) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
