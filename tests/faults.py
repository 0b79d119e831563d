"""A short run in a process of its own whose disk goes wrong at one operation, or that is killed there.

As SQLite tests itself: operations that change the disk are counted, and the n-th is made to fail. All of a run's go
through `cifarlab.files`, and so through what is replaced here. Processes are forked from one that has imported
everything and computed nothing.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifarlab.errors import CifarlabError, NotARunError
from cifarlab.rundir import RunFolder

OVERRIDES = [
    "model={name: racing, widths: [8, 8, 8]}",
    "optimizer={name: muon, rest: sgd, lr: 0.1, momentum: 0.6, head_lr: 10, bias_lr: 1}",
    "augment={flip: random, translate: 2}",
    "train={epochs: 2, batch_size: 32, ema: 0.9, checkpoint_every: {steps: 2}, keep: 2, numerics: exact}",
]
STEPS = 6
EXAMPLES = ("most_wrong", "least_sure", "augmented")
# What can happen to an operation. "full" is a disk that stays full; "short" writes a part and says so, which is no
# failure; "kill" is a SIGKILL just before it, "kill within" one after a part of a write.
HOWS = ("ENOSPC", "EIO", "memory", "full", "short", "kill", "kill within")


class Ended(NamedTuple):
    """How a child ended. code: its exit status, negative for a signal. said: its last sentence. operations: what it did
    to the disk, each as its kind and the file's name. happened: whether the fault did, if there was to be one."""

    code: int
    said: str
    operations: list[tuple[str, str]]
    happened: bool


class Disk:
    """Counts what changes the disk, and does something at the n-th operation, from 1 on."""

    def __init__(self, nth: int, how: str, tell: Callable[[Any], None]) -> None:
        self._nth, self._how, self._tell = nth, how, tell
        self.operations: list[tuple[str, str]] = []

    def do(self, operation: str, path: Path | str) -> int | None:
        """None: go on. A number: write only so many bytes of what there is to write."""
        self.operations.append((operation, Path(path).name))
        number = len(self.operations)
        if number != self._nth and not (self._how == "full" and 0 < self._nth < number):
            return None
        if self._how in ("full", "ENOSPC") and operation in ("unlink", "replace"):
            return None  # they take no room
        self._tell(("happened", self.operations[-1]))
        if self._how.startswith("kill") and (self._how == "kill" or operation != "write"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._how in ("kill within", "short"):
            return 1 if operation == "write" else None
        if self._how == "memory":
            raise MemoryError
        code = errno.EIO if self._how == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code))

    def killed_within(self) -> bool:
        return self._how == "kill within" and len(self.operations) == self._nth

    def install(self) -> None:
        """Replace what `cifarlab.files` changes the disk with, in this process."""
        disk, open_, sync = self, Path.open, os.fsync

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                most = disk.do("write", str(self.name))
                written = super().write(view[:most] if most is not None else view) or 0
                if disk.killed_within():
                    os.kill(os.getpid(), signal.SIGKILL)
                return written

            def close(self) -> None:
                if not self.closed:
                    try:
                        disk.do("close", str(self.name))
                    finally:
                        super().close()

        def opened(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if "b" not in mode or mode == "rb":  # /proc/self/clear_refs is written as text
                return open_(path, mode, *rest, **named)
            disk.do("open", path)
            raw = Raw(path, mode.replace("b", ""))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        def fsync(descriptor: Any) -> None:
            disk.do("fsync", Path(f"/proc/self/fd/{descriptor}").resolve())
            sync(descriptor)

        Path.open = opened  # type: ignore[method-assign,assignment]
        setattr(os, "fsync", fsync)  # noqa: B010
        for name in ("replace", "unlink", "mkdir"):
            setattr(Path, name, self._counted(name, getattr(Path, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def counted(path: Path, *rest: Any, **named: Any) -> Any:
            if name != "unlink" or path.exists():
                self.do(name, path)
            return method(path, *rest, **named)

        return counted


def _child(runs: str, nth: int, how: str, pipe: Connection) -> None:
    """Begin the run, or go on with it where it was begun; exits with the status that the command line would."""
    import pytest
    import torch

    from cifarlab import experiment, flops
    from cifarlab.recipe import load_recipe
    from cifarlab.train import StopRequest
    from short_runs import CPU, Quiet, make_dataset, without_pictures

    torch.set_num_threads(1)
    without_pictures(pytest.MonkeyPatch())
    flops.per_image = lambda *_: 1000  # half of the run's time
    experiment._git_state = lambda: None
    dataset = make_dataset(noise=0.3, train=100)
    experiment.load = lambda *_: dataset
    disk = Disk(nth, how, pipe.send)
    code, said = 0, ""
    display = Quiet()
    common: dict[str, Any] = {
        "device": CPU, "display": display, "stop": StopRequest(), "process_started": time.time(),
        "report": display.report,
    }  # fmt: skip
    recipe = load_recipe("ex1", OVERRIDES).resolved(dataset="digits", seed=0)
    found = begun(Path(runs))
    disk.install()
    try:
        if found is not None:
            experiment.resume_experiment(found.path, data_folder=None, **common)
        else:
            experiment.run_experiment(recipe, dataset, runs=Path(runs), histograms=True, **common)
    except CifarlabError as error:
        code, said = error.exit_code, str(error)
    except BaseException as error:
        code, said = 99, repr(error)
    pipe.send(("ended", code, said, disk.operations))
    pipe.close()
    os._exit(code)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cifarlab.experiment", "timm.utils.model_ema", "sklearn.metrics", "pytest", "filelock",
         "tensorboard.summary.writer.record_writer", "tensorboard.compat.proto.event_pb2"]
    )  # fmt: skip
    return context


def begin(runs: Path, nth: int = 0, how: str = "") -> tuple[BaseProcess, Connection]:
    """Start a child; see `_child`."""
    runs.mkdir(parents=True, exist_ok=True)
    context = _context()
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(str(runs), nth, how, its))
    process.start()
    its.close()
    return process, mine


def end(process: BaseProcess, pipe: Connection) -> Ended:
    """Wait for a child. Raises TimeoutError where it hangs."""
    code, said, operations, happened = None, "", [], False
    try:
        while pipe.poll(120):
            kind, *values = pipe.recv()
            if kind == "happened":
                happened = True
            else:
                code, said, operations = values
        if process.is_alive():
            process.kill()
            raise TimeoutError("a child hangs")
    except (EOFError, ConnectionError):
        pass
    process.join(120)
    assert process.exitcode is not None
    return Ended(process.exitcode if code is None else code, said, operations, happened)


def run(runs: Path, nth: int = 0, how: str = "") -> Ended:
    """Begin the run, or go on with it, in a child; the n-th operation goes wrong."""
    return end(*begin(runs, nth, how))


def begun(runs: Path) -> RunFolder | None:
    found = sorted(runs.rglob("train.json"))
    return RunFolder(found[0].parent) if found else None


def check_whole(runs: Path, *, killed: bool) -> None:
    """Every file of the run is readable, and, unless it was killed, nothing half-written lies about."""
    folder = begun(runs)
    for path in sorted(runs.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        if path.name.endswith(".tmp"):
            # A folder that was being made when the process was killed never became a run, and nobody goes on with it.
            assert path.name.startswith(".") and (killed or not (path.parent / "train.json").exists()), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pth":
            RunFolder(path.parent).load_checkpoint(path.name)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                names = {"logits", "labels", "index"}
                if path.name == "examples.npz":
                    names = {f"{name}{of}" for name in EXAMPLES for of in ("", "_index", "_labels")}
                assert set(arrays.files) == names
        elif path.suffix == ".png":
            assert path.read_bytes() == b"a picture"
        elif path.name == "recipe.yaml":
            RunFolder(path.parent).recipe()
        else:
            assert path.name.startswith("events.out.tfevents."), path
    if folder is not None and (folder.path / "best.pth").exists() and folder.status != "running":
        best = folder.train_log()["best_epoch"]
        assert best is None or folder.load_checkpoint("best.pth")["epoch"] >= best


def outcome(runs: Path) -> dict[str, Any]:
    """What a run that is done leaves, but for times; raises NotARunError where it is not done."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from short_runs import without_times

    folder = begun(runs)
    if folder is None or not folder.done:
        raise NotARunError(f"{runs} holds no run that is done")
    arrays: dict[str, bytes] = {}
    for name in ("predictions.npz", "validation_predictions.npz", "examples.npz"):
        with np.load(folder.path / name) as found:
            arrays |= {f"{name} {key}": found[key].tobytes() for key in found.files}
    events = EventAccumulator(str(folder.path), size_guidance={"histograms": 0, "images": 0})  # all of them
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/train")]
    histograms = {tag: [event.step for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    test = folder.test_log()
    assert test is not None
    return {
        "files": sorted(path.name for path in folder.path.iterdir() if "tfevents" not in path.name),
        "train": without_times(folder.train_log()) | {"flops": folder.train_log()["flops"]},
        "test": without_times(test),
        "weights": {
            (name, key): value.numpy().tobytes()
            for name in ["best.pth", *(path.name for path in folder.checkpoints())]
            for key, value in folder.load_checkpoint(name)["model"].items()
        },
        "events": [(event.step, event.value) for event in events.Scalars("loss/train")],
        "pictures": [event.encoded_image_string for event in events.Images("images/train")],
        "accuracy": [(event.step, event.value) for event in events.Scalars("result/test_accuracy")],
        # Those of all epochs; none, where it was killed before it had written down that they were wanted.
        "histograms": all(found == steps for found in histograms.values()),
        **arrays,
    }
