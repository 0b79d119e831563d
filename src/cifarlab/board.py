"""A run's file for TensorBoard: its recipe, a grid of training images, each epoch's figures, and what came out."""

from __future__ import annotations

import io
import math
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab import files
from cifarlab.errors import printable
from cifarlab.recipe import Recipe, flatten
from cifarlab.rundir import MAX_RECORD_BYTES, dataset_folder_name

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

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
IMAGES, WEIGHTS, RESULTS = "images/train", "weights/", "result/"
_BUCKETS = 30  # of a histogram, as TensorBoard's own have
# A grid has so many images a side, and no more than fit into so many pixels: TensorBoard's checksum takes 0.2 s for it.
_ACROSS, _SIDE = 8, 512
# What a record has around its event: the length, its checksum, and at the end the event's.
_HEAD, _TAIL = 12, 4


class Board:
    """Writes `events.out.tfevents.…` into a run folder, in the place of any that is there.

    Not with torch's SummaryWriter, which opens files of its own and could only add to what a run that goes on from a
    checkpoint must take back. The records are TensorBoard's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"{_PREFIX}{time.time_ns() // 1_000_000_000}.{socket.gethostname()[:100]}"

    def begin(
        self,
        entries: Sequence[tuple[dict[str, Any], int]],
        *,
        recipe: Recipe | None = None,
        images: NDArray[np.uint8] | None = None,
        histograms: bool = False,
    ) -> None:
        """The file with the epochs so far, each with its step. Raises StorageError, as `add` and `end` do.

        images: uint8 (N, 3, H, W), training images as they come first, not more than `grid_size`. histograms: keep
        those of the epochs so far that are in the file there was, as nothing else has them; what is damaged is left
        out.
        """
        kept = self._histograms() if histograms else {}
        now = time.time()
        left = sum(entry["seconds"] for entry, _ in entries)
        records = [_version(now - left)]
        if recipe is not None:
            records.append(_session(recipe, now - left))
        if images is not None:
            records.append(_pictures(images, now - left))
        for entry, step in entries:
            left -= entry["seconds"]
            records.append(_scalars(entry, step, now - left))
            if step in kept:
                records.append(kept[step])
        before = self._files()
        files.write_bytes(self._path, b"".join(records))
        for path in before:  # not earlier: a kill in between must lose nothing
            if path != self._path:
                files.remove(path)

    def add(self, entry: dict[str, Any], step: int, weights: Mapping[str, NDArray[Any]] | None = None) -> None:
        """One more epoch. weights: the parameters at its end, of which histograms are made; floating point, any shape.

        Values that are not finite are not in the histograms.
        """
        if not self._path.exists():  # somebody has tidied up
            files.write_bytes(self._path, _version(time.time()))
        records = _scalars(entry, step, time.time())
        if weights:
            records += _weights(weights, step, time.time())
        with files.continuing(self._path, self._path.stat().st_size) as file:
            file.write(records)

    def end(self, results: Mapping[str, float | None]) -> None:
        """What came out, and that the run has come to its end; does nothing where the file says that already.

        None is left out. The step is the last epoch's. Half a record at the end, as a kill leaves it, is overwritten.
        """
        from tensorboard.plugins.hparams import metadata

        found = [path for path in self._files() if path.is_file() and not path.is_symlink()]
        path = found[-1] if found else self._path
        data, step, whole = _read(path) if found else b"", 0, 0
        if data is None:  # too large to have been written here
            return
        for end, content in _records(data):
            whole, event = end, _parsed(content)
            if event is None:
                continue
            if any(value.tag == metadata.SESSION_END_INFO_TAG for value in event.summary.value):
                return
            step = max(step, event.step)
        if not whole:
            files.write_bytes(path, _version(time.time()) + _results(results, step))
            return
        with files.continuing(path, whole) as file:
            file.write(_results(results, step))

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*"))

    def _histograms(self) -> dict[int, bytes]:
        """The whole records of histograms in the files there are, by their steps."""
        kept = {}
        for path in self._files():
            for _, content in _records(_read(path) or b"", checked=True):
                event = _parsed(content)
                values = event.summary.value if event is not None else ()
                if values and all(value.HasField("histo") and value.tag.startswith(WEIGHTS) for value in values):
                    kept[event.step] = _framed(content)
        return kept


def grid_size(height: int, width: int) -> int:
    """How many images of that size a grid has."""
    return _across(height, width) ** 2


def _across(height: int, width: int) -> int:
    return min(_ACROSS, max(1, _SIDE // max(height, width)))


def _pictures(images: NDArray[np.uint8], wall_time: float) -> bytes:
    """A grid of images, uint8 (N, 3, H, W), row by row, with white lines between them."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    count, channels, height, width = images.shape
    across = min(_across(height, width), count)
    down = math.ceil(count / across)
    cells = np.full((down * across, channels, height + 2, width + 2), 255, np.uint8)
    cells[:count, :, 1:-1, 1:-1] = images
    cells = cells.reshape(down, across, channels, height + 2, width + 2).transpose(0, 3, 1, 4, 2)
    sheet = cells.reshape(down * (height + 2), across * (width + 2), channels)
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    image = Summary.Image(
        height=sheet.shape[0], width=sheet.shape[1], colorspace=channels, encoded_image_string=png.getvalue()
    )
    return _record(wall_time, step=0, summary=Summary(value=[Summary.Value(tag=IMAGES, image=image)]))


def _session(recipe: Recipe, start: float) -> bytes:
    """What the HPARAMS tab tells runs apart by: the recipe's fields that are one number, text, or yes or no."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    fields = {
        name: printable(value) if isinstance(value, str) else value  # protocol buffers take no lone surrogates
        for name, value in {**flatten(recipe.to_dict()), "dataset": recipe.datasets[0]}.items()
        if isinstance(value, bool | int | float | str)
    }
    # What is run again with the same seed is one trial.
    trial = f"{recipe.name} {dataset_folder_name(recipe.datasets[0])} seed {recipe.seed} {recipe.fingerprint()[:8]}"
    return _record(start, step=0, summary=hparams_pb(fields, trial_id=printable(trial), start_time_secs=start))


def _results(results: Mapping[str, float | None], step: int) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    now = time.time()
    values = [
        Summary.Value(tag=f"{RESULTS}{name}", simple_value=value)
        for name, value in results.items()
        if value is not None
    ]
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=now)
    values.append(
        Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(HParamsPluginData(session_end_info=end)),
            tensor=metadata.NULL_TENSOR,
        )
    )
    return _record(now, step=step, summary=Summary(value=values))


def _scalars(entry: dict[str, Any], step: int, wall_time: float) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=tag, simple_value=entry[name]) for name, tag in SCALARS.items() if entry[name] is not None
    ]
    return _record(wall_time, step=step, summary=Summary(value=values))


def _weights(weights: Mapping[str, NDArray[Any]], step: int, wall_time: float) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=f"{WEIGHTS}{name}", histo=histogram)
        for name, tensor in weights.items()
        if (histogram := _histogram(tensor)) is not None
    ]
    return _record(wall_time, step=step, summary=Summary(value=values)) if values else b""


def _histogram(tensor: NDArray[Any]) -> HistogramProto | None:
    """Buckets of one width from the least value to the largest; None where no value is finite."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    # In float64 there are enough numbers between any two of float32's for the edges.
    values = tensor[np.isfinite(tensor)].astype(np.float64)
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    limits, counts = np.array([high]), np.array([values.size])
    if low < high:
        counts, edges = np.histogram(values, _BUCKETS, (low, high))
        limits = edges[1:]
    return HistogramProto(
        min=low,
        max=high,
        num=values.size,
        sum=float(values.sum()),
        sum_squares=float(np.square(values).sum()),
        bucket_limit=limits.tolist(),
        bucket=counts.tolist(),
    )


def _version(wall_time: float) -> bytes:
    """What a file begins with."""
    return _record(wall_time, file_version="brain.Event:2")


def _record(wall_time: float, **content: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event  # half a second

    return _framed(Event(wall_time=wall_time, **content).SerializeToString())


def _framed(event: bytes) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event)
    return buffer.getvalue()


def _parsed(event: bytes) -> Any:
    """An `Event`; None where the bytes are none."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        return Event.FromString(event)
    except DecodeError:
        return None


def _records(data: bytes, *, checked: bool = False) -> Iterator[tuple[int, bytes]]:
    """Where each record of a file ends, and its event, up to the first record that is not whole.

    Not by TensorBoard's reader, which doesn't say where it is, and takes any length for true. checked: leave out events
    whose checksum, which takes half a second for a megabyte, is another.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    place = 0
    while len(head := data[place : place + _HEAD]) == _HEAD:
        length, checksum = struct.unpack("<QI", head)
        end = place + _HEAD + length + _TAIL
        if checksum != masked_crc32c(head[:8]) or end > len(data):
            return
        content = data[place + _HEAD : end - _TAIL]
        if not checked or struct.unpack("<I", data[end - _TAIL : end]) == (masked_crc32c(content),):
            yield end, content
        place = end


def _read(path: Path) -> bytes | None:
    """A file's bytes; none where it is missing or can't be read. None where it is too large to be one of ours."""
    try:
        return path.read_bytes() if files.regular_size(path) <= MAX_RECORD_BYTES else None
    except OSError:
        return b""
