"""A run's file for TensorBoard: an epoch's figures as one record, appended when the epoch is over."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifarlab import files

_PREFIX = "events.out.tfevents."
SCALARS = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/validation",
    "ema_val_loss": "loss/validation of the moving average",
    "ema_val_accuracy": "accuracy/validation of the moving average",
    "lr": "lr",
    "seconds": "seconds",
}


class Board:
    """Writes `events.out.tfevents.…` into a run folder, in the place of any that is there.

    Not with torch's SummaryWriter, which opens files of its own and could only add to what a run that goes on from a
    checkpoint must take back. The records are TensorBoard's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"{_PREFIX}{time.time_ns() // 1_000_000_000}.{socket.gethostname()[:100]}"

    def begin(self, entries: Sequence[tuple[dict[str, Any], int]]) -> None:
        """The file with the epochs so far, each with its step. Raises StorageError, as `add` does."""
        for path in self._folder.glob(f"{_PREFIX}*"):
            files.remove(path)
        now = time.time()
        left = sum(entry["seconds"] for entry, _ in entries)
        records = [_record(now - left, file_version="brain.Event:2")]
        for entry, step in entries:
            left -= entry["seconds"]
            records.append(_scalars(entry, step, now - left))
        files.write_bytes(self._path, b"".join(records))

    def add(self, entry: dict[str, Any], step: int) -> None:
        """One more epoch."""
        if not self._path.exists():  # somebody has tidied up
            files.write_bytes(self._path, _record(time.time(), file_version="brain.Event:2"))
        with files.continuing(self._path, self._path.stat().st_size) as file:
            file.write(_scalars(entry, step, time.time()))


def _scalars(entry: dict[str, Any], step: int, wall_time: float) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=tag, simple_value=entry[name]) for name, tag in SCALARS.items() if entry[name] is not None
    ]
    return _record(wall_time, step=step, summary=Summary(value=values))


def _record(wall_time: float, **content: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event  # half a second
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=wall_time, **content).SerializeToString())
    return buffer.getvalue()
