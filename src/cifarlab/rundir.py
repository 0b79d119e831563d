"""The run folder: the only interface between training and everything that looks at results.

    runs/ex1/cifar10/20261123-212500/
        recipe.yaml  environment.json  train.json  test.json
        loss.png  accuracy.png  confusion_matrix.png
        best.pth  epoch-10.pth  step-700.pth  predictions.npz  validation_predictions.npz  events.out.tfevents…
        examples.npz  report.html

examples.npz: uint8 (n, 3, h, w), n ≤ 24, no side above 64, of `most_wrong` (the highest losses) and `least_sure` test
images (the smallest margin between the two most likely classes), as stored, and of `augmented` training images as the
network saw them in the first epoch, not normalised; each with `<name>_index` and `<name>_labels`, int64 (n,). Files of
arrays are read by `read_arrays`, which trusts none of their numbers.

Nothing here imports torch until a checkpoint is read or written, so that tables are quick to make.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn

from cifarlab import files, machine, plain
from cifarlab.errors import NotARunError, RecipeError, RunError
from cifarlab.recipe import FOLDER_PREFIX, MAX_RECIPE_BYTES, Recipe, make_recipe, parse_yaml

if TYPE_CHECKING:
    import numpy as np

_CHECKPOINT = re.compile(r"(?:epoch|step)-(\d+)\.pth")
# What a checkpoint ends with. A file of torch.save is a zip file, at whose end a comment may stand: zip files are read
# as if it weren't there. torch checks no checksums: it reads tensors whose bits have changed.
_SEAL = re.compile(rb"cifarlab step=(\d{12}) sha256=([0-9a-f]{64})")
_SEAL_BYTES = len("cifarlab step= sha256=") + 12 + 64
_NO_COMMENT = struct.pack("<H", 0)
# What a run leaves once it has trained, and once it has scored the test set.
_CURVES = ("loss.png", "accuracy.png")
_OF_TEST = ("test.json", "predictions.npz", "confusion_matrix.png")
# What a checkpoint must have to be gone on from.
_TO_GO_ON: dict[str, type | tuple[type, ...]] = {
    "recipe": dict, "classes": list, "mean": list, "std": list, "data": dict, "made_on": dict, "step": int,
    "model": dict, "average": (dict, NoneType), "optimizer": dict, "scaler": (dict, NoneType), "epochs": list,
    "best": (dict, NoneType), "started": str, "setbacks": list, "train_time": float, "wall_time": float,
    "epoch_began": float, "sums": dict, "images": int, "flops": (int, NoneType), "accumulate": int,
    "pruning": (dict, NoneType), "frozen": (dict, NoneType), "share": float,
}  # fmt: skip
# What of that is JSON, in train.json or to be compared.
_IN_JSON = ("recipe", "classes", "mean", "std", "data", "made_on", "epochs", "best", "started", "setbacks")
_Kind = type | UnionType
_NUMBER: _Kind = int | float
_FIGURE: _Kind = int | float | None
# What must be in an entry of its `epochs`, in its `best` and in its `sums`.
_OF_EPOCH: dict[str, _Kind] = {"epoch": int, "lr": _NUMBER, "seconds": _NUMBER} | dict.fromkeys(
    ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss", "ema_val_accuracy"), _FIGURE
)
OF_BEST: dict[str, _Kind] = {"epoch": int, "val_loss": _FIGURE, "val_accuracy": _FIGURE, "weights": str}
_OF_SUMS = dict.fromkeys(("loss", "weight", "correct", "answers", "images"), _NUMBER)
# What train.json has of a run that has trained, but for its epochs.
_OF_LOG: dict[str, _Kind] = {
    "status": str, "epochs": list, "best_epoch": int | None, "best_weights": str | None, "best_val_accuracy": _FIGURE,
    "overfitting_gap": _FIGURE, "stopped_early": bool,
}  # fmt: skip
MAX_RECORD_BYTES = 100_000_000
EXAMPLE = "give a run folder, such as runs/ex1/cifar10/20261123-212500"


def dataset_folder_name(dataset: str) -> str:
    """A dataset's name as a folder's: `folder:/pictures/My cats` becomes `folder-My-cats`."""
    if dataset.startswith(FOLDER_PREFIX):
        base = Path(os.path.realpath(dataset.removeprefix(FOLDER_PREFIX))).name
        # 60 characters of UTF-8 always fit into a folder's name.
        return "folder-" + (re.sub(r"[^\w.-]+", "-", base)[:60].strip("-.") or "images")
    return dataset


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Make a new one with `create`, or open one that is there with `open`."""

    path: Path

    @classmethod
    def create(cls, runs: Path, recipe: Recipe, now: datetime) -> RunFolder:
        """`runs/<recipe>/<dataset>/<time>`, with `-2`, `-3` … on a clash. Raises StorageError."""
        parent = runs / recipe.name / dataset_folder_name(recipe.datasets[0])
        files.make_folder(parent)
        stamp = now.strftime("%Y%m%d-%H%M%S")
        for number in range(1, 10_000):
            path = parent / (stamp if number == 1 else f"{stamp}-{number}")
            with contextlib.suppress(FileExistsError):
                files.make_folder(path, exist_ok=False)
                run = cls(path)
                files.write_text(run.path / "recipe.yaml", recipe.to_yaml())
                # From the first moment on a run folder is one, and says that it is not finished.
                run.write_train_log({"status": "running", "dataset": recipe.datasets[0], "epochs": []})
                return run
        raise RunError(f"cannot make a new run folder in {parent}: {stamp} and its numbered siblings are all taken")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Raises NotARunError where `path` is no run folder."""
        try:
            is_folder = path.is_dir()
            missing = [name for name in ("recipe.yaml", "train.json") if not (path / name).is_file()]
        except OSError as error:
            raise NotARunError(f"cannot read {path}: {error.strerror}") from error
        if not is_folder:
            raise NotARunError(f"{path} is not a folder; {EXAMPLE}")
        if missing:
            raise NotARunError(f"{path} is not a run folder: it has no {' and no '.join(missing)}; {EXAMPLE}")
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder. The lock dies with its owner.

        Raises RunError, naming the owner, where there is one; StorageError where the lock can't be made.
        """
        with files.locked(self.path / ".lock", self._refuse_second, required=False):
            yield

    def _refuse_second(self) -> NoReturn:
        owner = "another process"
        with contextlib.suppress(NotARunError, KeyError, TypeError, IndexError):
            started = self.environment()
            last = [started, *started.get("resumed", [])][-1]["process"]
            owner = f"process {last['pid']} on {last['host']}, begun {last['began']},"
        raise RunError(f"{owner} is at work in {self.path} (it holds .lock there); wait until it is done, or stop it")

    def remove_leftovers(self) -> None:
        """Remove what a killed process had only begun to write. Raises StorageError."""
        for path in self.path.glob(f".*{files.TEMPORARY_SUFFIX}"):
            files.remove(path)

    @property
    def status(self) -> str | None:
        """What train.json says; None where it is damaged."""
        with contextlib.suppress(NotARunError):
            return str(self.train_log().get("status"))
        return None

    @property
    def done(self) -> bool:
        """Whether nothing is left to be done: trained to the end, and scored if that was asked for."""
        if self.status != "finished" or not all((self.path / name).exists() for name in _CURVES):
            return False
        return not self.recipe().evaluate.test or self.scored

    @property
    def scored(self) -> bool:
        """Whether all is there that a look at the test set leaves."""
        return all((self.path / name).exists() for name in _OF_TEST)

    # --- records ---

    def recipe_values(self) -> dict[str, Any]:
        """The recipe as plain values, not validated: what tables need. Raises NotARunError, as all readers here."""
        try:
            values = parse_yaml(self._text("recipe.yaml", MAX_RECIPE_BYTES), str(self.path / "recipe.yaml"))
        except RecipeError as error:
            raise NotARunError(str(error)) from None
        if not isinstance(values, dict):
            raise NotARunError(f"{self.path / 'recipe.yaml'} is damaged: it is not a recipe")
        return values

    def recipe(self) -> Recipe:
        try:
            return make_recipe(self.recipe_values(), origin=str(self.path / "recipe.yaml"))
        except RecipeError as error:
            raise NotARunError(str(error)) from None

    def train_log(self) -> dict[str, Any]:
        return self._json("train.json")

    def trained_log(self) -> dict[str, Any]:
        """`train_log` of a run that has trained, with all that such a one has."""
        log = self.train_log()
        if not has(log, _OF_LOG) or not all(has(entry, _OF_EPOCH) for entry in log["epochs"]):
            raise NotARunError(
                f"{self.path / 'train.json'} is damaged: it lacks what a run that has trained says of itself"
            )
        return log

    def test_log(self) -> dict[str, Any] | None:
        return self._json("test.json") if (self.path / "test.json").exists() else None

    def environment(self) -> dict[str, Any]:
        return self._json("environment.json")

    def write_train_log(self, values: dict[str, Any]) -> None:
        files.write_json(self.path / "train.json", values)

    def write_test_log(self, values: dict[str, Any]) -> None:
        files.write_json(self.path / "test.json", values)

    def write_environment(self, values: dict[str, Any]) -> None:
        files.write_json(self.path / "environment.json", values)

    def write_predictions(self, name: str, logits: np.ndarray, labels: np.ndarray, index: np.ndarray) -> None:
        """logits float32 (N, K), labels int64 (N,), index int64 (N,): the images' places in the dataset as found."""
        self.write_arrays(name, {"logits": logits, "labels": labels, "index": index})

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """The same arrays are the same bytes. Raises StorageError."""
        import numpy as np

        with files.replacing(self.path / name) as file:
            # numpy types its second parameter as it types none of the arrays.
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def read_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The numbers of a file of `write_arrays`, whatever it claims of itself. Raises NotARunError."""
        path = self.path / name
        try:
            return plain.read_arrays(path)
        except FileNotFoundError:
            raise NotARunError(f"{path} is missing") from None
        except OSError as error:
            raise NotARunError(f"cannot read {path}: {error.strerror}") from error
        except plain.NotPlainError as error:
            raise NotARunError(f"{path} is damaged: {error}") from error

    # --- checkpoints ---

    def save_checkpoint(self, name: str, state: bytes) -> None:
        """Write a checkpoint, given as `serialized`. Raises StorageError."""
        files.write_bytes(self.path / name, state)

    def load_checkpoint(self, name: str) -> dict[str, Any]:
        """Read a checkpoint onto the CPU with `weights_only=True`: nothing in it is executed. Raises NotARunError.

        One whose bytes are not those that were written is refused. Files of torch.save's without our checksum are read.
        """
        path = self.path / name
        try:
            data = _bytes(path)
        except FileNotFoundError:
            raise NotARunError(f"{path} is missing; this run has saved no such checkpoint") from None
        except OSError as error:
            raise NotARunError(f"cannot read {path}: {error.strerror}") from error
        return self._parsed(data, path)

    def _parsed(self, data: bytes, path: Path) -> dict[str, Any]:
        sealed = False
        try:
            data, sealed = _verified(data)
            state = plain.read_plain(io.BytesIO(data), data)
        except Exception as error:  # whatever comes to torch's mind: ten kinds, of bytes changed at random
            if sealed and machine.is_out_of_memory(error):
                raise  # the file is whole
            raise NotARunError(
                f"{path} is damaged, or holds more than tensors and plain values; cifarlab reads checkpoints of its own"
            ) from error
        if not isinstance(state, dict):
            raise NotARunError(f"{path} is not a checkpoint of cifarlab: expected a dictionary")
        return state

    def checkpoints(self) -> list[Path]:
        """The checkpoints to go on from (not best.pth), by their steps, whatever the clock said."""
        found = [path for path in self.path.iterdir() if _CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_step_of(path), path.name))

    def newest_checkpoint(self, report: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint to go on from that is whole; None where there is none at all.

        Damaged ones are set aside, under another name, and reported. Raises StorageError where that can't be done,
        NotARunError where all are damaged, and where one can't be read at the moment.
        """
        found = self.checkpoints()
        for path in reversed(found):
            try:
                data = _bytes(path)
            except OSError as error:  # it may be whole all the same
                raise NotARunError(f"cannot read {path}: {error.strerror}; put that right and go on") from error
            try:
                state = self._parsed(data, path)
                if wrong := _lacking(state):
                    raise NotARunError(f"{path} is no checkpoint to go on from: it has no {' and no '.join(wrong)}")
            except NotARunError as error:
                aside = path.with_name(f"{path.name}.damaged")
                files.rename(path, aside)
                report(f"{error}; it is set aside as {aside.name}")
            else:
                return state
        if found:
            raise NotARunError(
                f"no checkpoint of {self.path} is whole; they are set aside; go on once more, and it begins again"
            )
        return None

    def keep_latest(self, count: int) -> None:
        """Remove all but the `count` newest checkpoints to go on from."""
        for path in self.checkpoints()[:-count]:
            files.remove(path)

    # --- reading what may be damaged ---

    def _text(self, name: str, most: int) -> str:
        path = self.path / name
        try:
            if files.regular_size(path) > most:
                raise NotARunError(f"{path} is larger than {most:,} bytes; it was not written by cifarlab")
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotARunError(f"{path} is missing; is {self.path} a whole run folder?") from None
        except OSError as error:
            raise NotARunError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise NotARunError(f"{path} is damaged: it is not text") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._text(name, MAX_RECORD_BYTES), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise NotARunError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise NotARunError(f"{self.path / name} is damaged: expected a JSON object")
        return values


def _lacking(state: dict[str, Any]) -> list[str]:
    """What a checkpoint to go on from doesn't have, or has as something else."""
    wrong = [name for name, kind in _TO_GO_ON.items() if not isinstance(state.get(name, ...), kind)]
    if wrong:
        return wrong
    best = [] if state["best"] is None else [state["best"]]
    parts = (("epochs", state["epochs"], _OF_EPOCH), ("best", best, OF_BEST), ("sums", [state["sums"]], _OF_SUMS))
    wrong = [name for name, entries, kinds in parts if not all(has(entry, kinds) for entry in entries)]
    for name in _IN_JSON:
        try:
            json.dumps(state[name], allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            wrong.append(name)
    return wrong + ["step"] * (state["step"] < 0)


def has(entry: Any, kinds: dict[str, _Kind]) -> bool:
    """Whether an entry is a dictionary with all these names and kinds."""
    return isinstance(entry, dict) and all(isinstance(entry.get(name, ...), kind) for name, kind in kinds.items())


def serialized(state: dict[str, Any]) -> bytes:
    """A checkpoint as the bytes of a file, as torch.save makes it, with its step and a checksum at the end.

    state: has its `step`. What becomes of the tensors afterwards is nothing to the bytes.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    seal = b"cifarlab step=%012d sha256=%s" % (state["step"], hashlib.sha256(data).hexdigest().encode())
    return data.removesuffix(_NO_COMMENT) + struct.pack("<H", len(seal)) + seal


def _verified(data: bytes) -> tuple[bytes, bool]:
    """A checkpoint's bytes as torch.save wrote them, and whether that is sealed.

    Raises ValueError where they are others than were sealed.
    """
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None:
        if data[-_SEAL_BYTES - len(_NO_COMMENT) : -_SEAL_BYTES] == struct.pack("<H", _SEAL_BYTES):
            raise ValueError("its checksum is damaged")
        return data, False  # not of ours
    data = data[: -_SEAL_BYTES - len(_NO_COMMENT)] + _NO_COMMENT
    if hashlib.sha256(data).hexdigest().encode() != seal[2]:
        raise ValueError("its checksum is another")
    return data, True


def _bytes(path: Path) -> bytes:
    """A checkpoint's file. Raises OSError, also for what is no regular file or does not fit into memory."""
    if files.regular_size(path) > machine.available_memory():  # a sparse file may claim any size
        raise OSError(errno.ENOMEM, "it is larger than the memory that is free")
    return path.read_bytes()


def _step_of(path: Path) -> int:
    """The step of a checkpoint, by its end or, where that is not ours, by its name; -1 where neither says it.

    One that can't be read counts as the newest, so that it is not taken for an old one and removed.
    """
    try:
        size = files.regular_size(path)
        with path.open("rb") as file:
            file.seek(-min(_SEAL_BYTES, size), os.SEEK_END)
            if (seal := _SEAL.fullmatch(file.read())) is not None:
                return int(seal[1])
    except OSError:
        return sys.maxsize
    return int(path.stem.removeprefix("step-")) if path.name.startswith("step-") else -1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def find_runs(places: Iterable[Path]) -> list[RunFolder]:
    """The run folders among `places` and below them, sorted by path, each once. Links to folders are not followed.

    Raises NotARunError where a place does not exist or holds none.
    """
    found: dict[Path, RunFolder] = {}
    for place in places:
        try:
            os.scandir(place).close()  # rglob passes over what it may not read
        except FileNotFoundError:
            raise NotARunError(
                f"{place} does not exist; give run folders, or a folder that holds some, such as runs"
            ) from None
        except OSError as error:
            raise NotARunError(f"cannot read {place}: {error.strerror}; give a folder that holds runs") from error
        inside = [
            RunFolder(log.parent)
            for log in place.rglob("train.json")
            if log.is_file() and (log.parent / "recipe.yaml").is_file()
        ]
        if not inside:
            raise NotARunError(f"{place} holds no run; 'cifarlab run RECIPE' makes one")
        found |= {run.path.resolve(): run for run in inside}
    return [found[key] for key in sorted(found)]


def find_run_of(runs: Path, plan: Recipe, since: float = 0.0) -> RunFolder | None:
    """The newest run in `runs` of a resolved recipe, one that is not done before one that is; None: there is none.

    since: the `time.time()` from which on it was begun.

    A recipe counts as it was asked for, before a run decided what it leaves to the machine.
    """
    found = []
    for recipe in (runs / plan.name / dataset_folder_name(plan.datasets[0])).glob("*/recipe.yaml"):
        run = RunFolder(recipe.parent)
        with contextlib.suppress(NotARunError):
            if recipe.stat().st_mtime < since:
                continue
            own = run.recipe()
            mine = own.datasets, own.seed, own.evaluate.test, run.environment().get("asked")
            if mine == (plan.datasets, plan.seed, plan.evaluate.test, plan.fingerprint()):
                found.append((not run.done, recipe.stat().st_mtime_ns, run))
    return max(found, key=lambda entry: entry[:2])[2] if found else None
