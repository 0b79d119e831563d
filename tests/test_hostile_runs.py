"""Run folders, checkpoints, weights and names of somebody who means harm: one sentence, and nothing else happens."""

from __future__ import annotations

import builtins
import collections
import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from cifarlab import experiment, files, machine
from cifarlab.board import Board
from cifarlab.compare import compare, to_csv, to_json, to_markdown
from cifarlab.data.dataset import Dataset
from cifarlab.errors import CifarlabError, DataError, NotARunError, RecipeError, StorageError
from cifarlab.models import build_model
from cifarlab.models.weights import find_weights, load_weights
from cifarlab.recipe import load_recipe
from cifarlab.recipe_sections import Model
from cifarlab.rundir import RunFolder, find_runs, serialized
from cifarlab.train import StopRequest
from command import call
from short_runs import Quiet, make_dataset, run
from test_compare import make_run

posix = pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links of POSIX")


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """What would wait for ever for a pipe fails instead."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it waited")

    if os.name == "nt":
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path that what is executed would make; files are read in a folder in which nothing is made either."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()
    assert not list(work.iterdir())


def sentence_of(call: Callable[[], Any], kind: type[CifarlabError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and "Traceback" not in said
    return said


# --- files of torch.save's ----------------------------------------------------------------------


class Calls:
    """What a pickle calls when it is read: a function, its arguments, and what is put into the result."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def saved(value: Any, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def weights_with(odd: Any) -> dict[str, Any]:
    return {"model": {"layer.weight": torch.arange(6.0), "odd": odd}}


def repacked(*, compression: int = zipfile.ZIP_STORED, more: int = 0, overlapping: bool = False) -> bytes:
    """A whole file whose parts are stored otherwise: compressed, with one more of so many zeros, or as one another."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(weights_with(torch.zeros(20_000))))) as whole,
        zipfile.ZipFile(buffer, "w", compression) as made,
    ):
        for part in whole.infolist():
            made.writestr(part.filename, whole.read(part))
        if more:
            made.writestr("archive/data/999", bytes(more))
        if overlapping:
            largest = max(made.filelist, key=lambda part: part.file_size)
            for number in range(50):
                twin = zipfile.ZipInfo(f"archive/data/{100 + number}")
                for name in ("header_offset", "CRC", "compress_size", "file_size"):
                    setattr(twin, name, getattr(largest, name))
                made.filelist.append(twin)
    return buffer.getvalue()


def old_with(numel: int) -> bytes:
    """A file of torch's old format whose last storage claims so many numbers."""
    whole = saved({"model": {"layer.weight": torch.arange(7.0)}}, old=True)
    place = whole.rindex(struct.pack("<q", 7))
    return whole[:place] + struct.pack("<q", numel) + whole[place + 8 :]


def a_tar() -> bytes:
    """The format of before: read by unpacking it into a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "../executed", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
    return buffer.getvalue()


def with_attributes(value: Any) -> Any:
    value.numel = value.float = value.isfinite = 3
    return value


def past_its_end() -> Any:
    """A tensor of a thousand million numbers on a storage of three."""
    storage = torch.zeros(3).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)  # type: ignore[no-untyped-call]
    return Calls(torch._utils._rebuild_tensor, (typed, 0, (10**9,), (1,)))


def runs_something(name: str, old: bool) -> Callable[[Path], bytes]:
    def made(marker: Path) -> bytes:
        call = {
            "os.system": Calls(os.system, (f"touch {marker}",)),
            "eval": Calls(builtins.eval, (f"open({str(marker)!r}, 'w')",)),
            "exec": Calls(builtins.exec, (f"open({str(marker)!r}, 'w')",)),
            "nested": Calls(getattr, (Calls(__import__, ("os",)), "system")),
            "within a tensor's call": Calls(torch.Size, ((Calls(os.mkdir, (str(marker),)),),)),
        }[name]
        return saved(weights_with(call), old=old)

    return made


HOSTILE_FILES: dict[str, Callable[[Path], bytes]] = {
    **{
        f"{name}, {'old' if old else 'zip'}": runs_something(name, old)
        for name in ("os.system", "eval", "exec", "nested", "within a tensor's call")
        for old in (False, True)
    },
    "a bare pickle": lambda marker: pickle.dumps(Calls(os.mkdir, (str(marker),)), 2),
    "a pickle of protocol 0": lambda marker: f"cos\nmkdir\n(S'{marker}'\ntR.".encode(),
    "a bomb": lambda _: repacked(compression=zipfile.ZIP_DEFLATED, more=50_000_000),
    "compressed": lambda _: repacked(compression=zipfile.ZIP_DEFLATED),
    "overlapping parts": lambda _: repacked(overlapping=True),
    "a bomb with an end of its own": lambda _: repacked(compression=zipfile.ZIP_DEFLATED, more=50_000_000) + b"x" * 99,
    "a tar": lambda _: a_tar(),
    **{f"old, {numel} numbers": lambda _, n=numel: old_with(n) for numel in (-1, 10**6, 10**9, 10**12, 2**62)},  # type: ignore[misc]
    "ten GB of numbers": lambda _: saved(weights_with(Calls(torch.FloatTensor, (25 * 10**8,)))),
    "two GB of bytes": lambda _: saved(weights_with(Calls(bytearray, (2 * 10**9,)))),
    "two GB of bytes, old": lambda _: saved(weights_with(Calls(bytearray, (2 * 10**9,))), old=True),
    "past its end": lambda _: saved(weights_with(past_its_end())),
    "nested": lambda _: saved(weights_with(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))),
    "meta": lambda _: saved(weights_with(torch.zeros(3, device="meta"))),
    "sparse": lambda _: saved(weights_with(torch.zeros(3).to_sparse())),
    "sparse rows": lambda _: saved(weights_with(torch.zeros(3, 3).to_sparse_csr())),
    "a tensor with attributes": lambda _: saved(weights_with(with_attributes(torch.zeros(3)))),
    "a dictionary with attributes": lambda _: saved(
        {"model": Calls(collections.OrderedDict, (), {"items": 3}, None, iter([("w", torch.zeros(1))]))}
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of kinds of tensors that are going or coming
@pytest.mark.parametrize("reader", ["checkpoint", "weights"])
@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_file_is_a_sentence_and_nothing_runs(
    name: str, reader: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where this variable is set, torch.load takes it for weights_only=False unless it is told.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "best.pth"
    path.write_bytes(HOSTILE_FILES[name](marker))
    if reader == "checkpoint":
        said = sentence_of(lambda: RunFolder(tmp_path).load_checkpoint("best.pth"), NotARunError)
        assert said == (
            f"{path} is damaged, or holds more than tensors and plain values; cifarlab reads checkpoints of its own"
        )
    else:
        section = Model(name="ex1", pretrained=str(path))
        assert sentence_of(lambda: find_weights(section, print), DataError).startswith(f"{path} is damaged")


def test_what_is_plain_is_read_all_the_same(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"step": 1, "rest": [(), {2.5}, 1j, b"b", None, torch.float32, torch.Size([2])]}
    itself["self"] = itself
    itself["model"] = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(2, 2)).state_dict()
    itself["views"] = [itself["model"]["1.weight"].t(), nn.Parameter(torch.zeros(2))]
    for old in (False, True):
        (tmp_path / "best.pth").write_bytes(saved(itself, old=old))
        read = RunFolder(tmp_path).load_checkpoint("best.pth")
        assert read["rest"] == itself["rest"] and read["self"] is read
        assert torch.equal(read["views"][0], itself["views"][0])


# --- what is no file ----------------------------------------------------------------------------


def stand_in(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


WAYS_TO_READ: dict[str, Callable[[RunFolder], Any]] = {
    "best.pth": lambda folder: folder.load_checkpoint("best.pth"),
    "step-7.pth": lambda folder: folder.newest_checkpoint(print),
    "train.json": lambda folder: folder.train_log(),
    "test.json": lambda folder: folder.test_log(),
    "environment.json": lambda folder: folder.environment(),
    "recipe.yaml": lambda folder: folder.recipe(),
}


@posix
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", WAYS_TO_READ)
def test_what_is_no_file_is_not_waited_for(name: str, kind: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    stand_in(folder.path / name, kind)
    said = sentence_of(lambda: WAYS_TO_READ[name](folder), NotARunError)
    reason = "Is a directory" if kind == "folder" else "it is not a regular file"
    assert said.startswith(f"cannot read {folder.path / name}: {reason}")
    assert (folder.path / name).exists(), "it was set aside"


@posix
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_run_without_files_is_no_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    stand_in(folder.path / "train.json", kind)
    for command, said in (("compare", "holds no run"), ("test", "it has no train.json"), ("resume", "no train.json")):
        code, out, err = call(capsys, monkeypatch, command, folder.path)
        assert code == 4 and said in err and err.count("\n") == 1 and not out
    weights = tmp_path / "w.pth"
    stand_in(weights, kind)
    section = Model(name="ex1", pretrained=str(weights))
    assert "there is no file" in sentence_of(lambda: find_weights(section, print), RecipeError)


def test_records_and_checkpoints_of_any_size_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run")
    for name, size in (("recipe.yaml", 100_001), ("recipe.yaml", 10**8), ("train.json", 10**8 + 1)):
        with (folder.path / name).open("r+b") as file:
            file.truncate(size)  # takes no room on the disk
        said = sentence_of(lambda name=name: WAYS_TO_READ[name](folder), NotARunError)  # type: ignore[misc]
        limit = 10**5 if name == "recipe.yaml" else 10**8
        assert said == f"{folder.path / name} is larger than {limit:,} bytes; it was not written by cifarlab"
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    for name in ("best.pth", "step-7.pth"):
        (folder.path / name).write_bytes(bytes(1001))
        said = sentence_of(lambda name=name: WAYS_TO_READ[name](folder), NotARunError)  # type: ignore[misc]
        assert said.startswith(f"cannot read {folder.path / name}: it is larger than the memory that is free")


# --- checkpoints of a run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        return run(
            tmp_path_factory.mktemp("finished"),
            "train.epochs=1",
            "train.numerics=exact",
            dataset=make_dataset(),
            monkeypatch=patch,
        )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was stopped in its second epoch."""
    stop = StopRequest()

    def look(progress: Any) -> None:
        if progress.step == 7:
            stop.signal = 2

    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("stopped")
        folder = run(
            place,
            "train.epochs=2",
            "train.numerics=exact",
            display=Quiet(look),
            stop=stop,
            dataset=make_dataset(),
            monkeypatch=patch,
        )
    assert folder.status == "stopped" and [path.name for path in folder.checkpoints()] == ["step-7.pth"]
    return folder


def copied(folder: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(folder.path, tmp_path / "copy")))


def changed(state: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A state with what `change` returns in the place of its weights, or as it has changed it."""
    model = change(state)
    return state if model is None else {**state, "model": model}


def each(what: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name: what(tensor) for name, tensor in state["model"].items()}


def renamed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {prefix + name: tensor for name, tensor in state["model"].items()}


def other(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update(values)


ODD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "NaN": (each(lambda t: t * float("nan") if t.is_floating_point() else t), "holds NaN or infinite values"),
    "infinite": (each(lambda t: t / 0 if t.is_floating_point() else t), "holds NaN or infinite values"),
    "shapes": (each(lambda t: t[None]), "size mismatch for"),
    "complex": (each(lambda t: t.to(torch.complex64)), "is torch.complex64, torch.strided, not plain numbers"),
    "integers": (each(lambda t: t.to(torch.int32)), "is torch.int32 instead of torch.float32"),
    "doubles": (each(lambda t: t.double()), "is torch.float64 instead of torch.float32"),
    "quantised": (
        each(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)),
        "is torch.quint8, torch.strided, not plain numbers",
    ),
    "sparse": (each(lambda t: t.to_sparse()), "holds more than tensors and plain values"),
    "meta": (each(lambda t: t.to("meta")), "holds more than tensors and plain values"),
    "nested": (each(lambda t: torch.nested.nested_tensor([t])), "holds more than tensors and plain values"),
    "expanded": (each(lambda t: torch.zeros(1, dtype=t.dtype).expand(10**12)), "claims more numbers than there are"),
    "missing": (lambda state: dict(list(state["model"].items())[1:]), "Missing key(s) in state_dict"),
    "one more": (lambda state: state["model"] | {"more": torch.zeros(1)}, "Unexpected key(s) in state_dict"),
    "no tensors": (each(lambda t: "x"), "expected torch.Tensor or Tensor-like object"),
    "numbers for names": (lambda state: state["model"] | {7: torch.zeros(1)}, ""),
    "of DistributedDataParallel": (renamed("module."), "Missing key(s) in state_dict"),
    "of torch.compile": (renamed("_orig_mod."), "Missing key(s) in state_dict"),
    "a list": (lambda state: [1, 2], "expected tensors by name, not list"),
    "none": (lambda state: state.update(model=None), "expected tensors by name, not NoneType"),
    "lines and colours": (
        lambda state: state["model"] | {"\x1b[31m\nsecond": torch.zeros(1)},
        "Unexpected key(s) in state_dict",
    ),
}
ODD_FIELDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "mean, a text": (other(mean="0.5"), "expected a mean and a std of three channels"),
    "mean, two": (other(mean=[0.5, 0.5]), "expected a mean and a std of three channels"),
    "mean, NaN": (other(mean=[0.5, float("nan"), 0.5]), "expected a mean and a std of three channels"),
    "mean, 400 digits": (other(mean=[10**400] * 3), "expected a mean and a std of three channels"),
    "mean, tensors": (other(mean=[torch.zeros(3)] * 3), "expected a mean and a std of three channels"),
    "std, zero": (other(std=[0.0, 0.0, 0.0]), "its std is (0.0, 0.0, 0.0)"),
    "std, none": (lambda state: state.pop("std") and None, "expected a mean and a std of three channels"),
    "classes, fewer": (other(classes=["a", "b"]), "was trained on other classes than digits has"),
    "classes, in another order": (other(classes=["b", "a", "c", "d"]), "was trained on other classes than digits has"),
    "classes, tensors": (other(classes=[torch.zeros(2)] * 4), "was trained on other classes than digits has"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD_WEIGHTS | ODD_FIELDS)
def test_a_best_checkpoint_that_is_not_the_runs_is_not_scored(
    name: str,
    finished: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(finished, tmp_path)
    change, sentence = (ODD_WEIGHTS | ODD_FIELDS)[name]
    state = changed(folder.load_checkpoint("best.pth"), change)
    (folder.path / "best.pth").write_bytes(serialized(state))
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: make_dataset())
    code, out, err = call(capsys, monkeypatch, "test", folder.path)
    assert code == 4, err
    assert err.startswith(f"cifarlab: {folder.path / 'best.pth'} ") and sentence in err
    assert err.count("\n") == 1 and len(err) < 500 and "Traceback" not in out and "\x1b" not in out + err
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.parametrize("name", ["NaN", "shapes", "a list"])
def test_a_run_does_not_end_with_a_best_checkpoint_that_is_not_its_own(
    name: str,
    stopped: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(stopped, tmp_path)
    change, sentence = ODD_WEIGHTS[name]
    best = folder.load_checkpoint("best.pth") | {"val_accuracy": 1.0, "val_loss": 0.0}  # no epoch is better
    folder.save_checkpoint("best.pth", serialized(changed(best, change)))
    code, out, err = resumed(folder, capsys, monkeypatch)
    assert code == 4 and str(folder.path / "best.pth") in out + err and "Traceback" not in out + err
    assert err.count("\n") == 1 and sentence in err
    assert folder.status == "failed"


def resumed(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: make_dataset())
    return call(capsys, monkeypatch, "resume", folder.path)


def entry_with(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["epochs"][0].update(values)


ODD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{name: ODD_WEIGHTS[name] for name in ("NaN", "shapes", "complex", "missing", "of torch.compile")},
    "a step before the first": (other(step=-1), "has no step"),
    "a step after the last": (other(step=10**6), "does not fit: it trains 12 steps"),
    "epochs, numbers": (other(epochs=[1]), "it has no epochs"),
    "epochs, without a loss": (lambda state: state["epochs"][0].pop("val_loss") and None, "it has no epochs"),
    "epochs, a loss of NaN": (entry_with(val_loss=float("nan")), "it has no epochs"),
    "epochs, tensors": (entry_with(more=torch.zeros(3)), "it has no epochs"),
    "best, empty": (other(best={}), "it has no best"),
    "best, a text": (lambda state: state["best"].update(epoch="1"), "it has no best"),
    "sums, empty": (other(sums={}), "it has no sums"),
    "setbacks, tensors": (other(setbacks=[torch.zeros(3)]), "it has no setbacks"),
    "classes, tensors": (other(classes=[torch.zeros(3)] * 4), "it has no classes"),
    "classes, long": (other(classes=["x" * 100_000]), "is not what it began with, so it can't go on: classes was"),
    "recipe, empty": (other(recipe={}), "is missing"),
    "optimizer, empty": (other(optimizer={}), "does not fit"),
    "mean, others": (other(mean=[0.0, 0.0, 0.0]), "is not what it began with"),
}


@pytest.mark.parametrize("name", ODD_STATES)
def test_a_checkpoint_that_is_not_the_runs_is_not_gone_on_from(
    name: str,
    stopped: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(stopped, tmp_path)
    change, sentence = ODD_STATES[name]
    state = changed(folder.load_checkpoint("step-7.pth"), change)
    (folder.path / "step-7.pth").write_bytes(saved(state))
    code, out, err = resumed(folder, capsys, monkeypatch)
    assert code == 4 and sentence in out + err, out + err
    assert err.startswith("cifarlab: ") and err.count("\n") == 1 and len(err) < 1200 and "Traceback" not in out + err


@pytest.mark.parametrize(
    "log",
    [
        {"status": "finished"},
        {"status": "finished", "epochs": [1]},
        {"status": "finished", "epochs": [{}]},
    ],
)
def test_a_log_that_lacks_everything_is_a_sentence(
    log: dict[str, Any],
    finished: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(finished, tmp_path)
    folder.write_train_log(log)
    for left in ((), ("loss.png", "test.json")):
        for name in left:
            (folder.path / name).unlink()
        code, out, err = resumed(folder, capsys, monkeypatch)
        assert code == 4 and err.count("\n") == 1 and "Traceback" not in out + err, out + err


@posix
def test_links_in_a_run_folder_are_not_written_through(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    names = ("test.json", "loss.png", "accuracy.png", "predictions.npz", "confusion_matrix.png")
    for name in names:
        (folder.path / name).unlink()
        (folder.path / name).symlink_to(outside / name)
    (folder.path / "environment.json").rename(outside / "environment.json")
    (folder.path / "environment.json").symlink_to(outside / "environment.json")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: make_dataset())
    display = Quiet()
    experiment.resume_experiment(
        folder.path,
        data_folder=None,
        device=torch.device("cpu"),
        display=display,
        stop=StopRequest(),
        process_started=0.0,
        report=display.report,
    )
    assert folder.scored and not any((folder.path / name).is_symlink() for name in names)
    (board,) = folder.path.glob("events.out.tfevents.*")
    board.rename(outside / "events")
    before["events"] = (outside / "events").read_bytes()
    board.symlink_to(outside / "events")
    Board(folder.path).end({"test_accuracy": 0.5})
    Board(folder.path).begin([])
    assert [path.is_symlink() for path in folder.path.glob("events.out.tfevents.*")] == [False]
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").symlink_to(outside / "kept")
    with pytest.raises(StorageError, match=r"cannot lock .*\.lock"), folder.locked():
        pass
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").symlink_to(outside / "made")
    with pytest.raises(StorageError, match=r"cannot lock .*\.lock"), folder.locked():
        pass
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_nothing_is_downloaded_into_a_folder_that_a_record_names(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    text = (folder.path / "recipe.yaml").read_text().replace("digits", "cifar10")
    (folder.path / "recipe.yaml").write_text(text)
    outside = tmp_path / "outside"
    outside.mkdir()
    environment = folder.environment()
    environment["data"]["folder"] = str(outside)
    folder.write_environment(environment)
    asked: list[Path | None] = []

    def load(name: str, section: Any, side: Any, place: Path | None, report: Any) -> Dataset:
        asked.append(place)
        return make_dataset()

    monkeypatch.setattr(experiment, "load_dataset", load)
    for command in ("test", "resume"):
        (folder.path / "test.json").unlink(missing_ok=True)
        code, _, err = call(capsys, monkeypatch, command, folder.path)
        assert code in (0, 4) and "Traceback" not in err
    assert asked == [None, None]


# --- safetensors --------------------------------------------------------------------------------


def header(**tensors: Any) -> bytes:
    entries = {
        name: {"dtype": kind, "shape": shape, "data_offsets": offsets}
        for name, (kind, shape, offsets) in tensors.items()
    }
    return json.dumps(entries).encode()


def safetensors(head: bytes, body: int = 8, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(head) if size is None else size) + head + bytes(body)


TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
ODD_SAFETENSORS = {
    "a header of 2**63 bytes": (safetensors(b"{}", size=2**63), "is damaged"),
    "a header of 1 TB": (safetensors(b"{}", size=10**12), "is damaged"),
    "a header of 200 MB": (safetensors(b"{" + bytes(10), size=200_000_000), "is damaged"),
    "a deep header": (safetensors(b'{"w":' + b"[" * 100_000), "is damaged"),
    "overlapping": (safetensors(header(w=("F32", [2], [0, 8]), v=("F32", [2], [4, 12])), 12), "is damaged"),
    "a gap": (safetensors(header(w=("F32", [1], [0, 4]), v=("F32", [1], [8, 12])), 12), "is damaged"),
    "a name twice": (safetensors(TWICE), "is damaged"),
    "beyond the end": (safetensors(header(w=("F32", [20], [0, 80]))), "is damaged"),
    "shapes that overflow": (safetensors(header(w=("F32", [2**33, 2**33], [0, 8]))), "is damaged"),
    "shapes that overflow to nothing": (safetensors(header(w=("F32", [2**62, 4], [0, 0])), 0), "is damaged"),
    "before the beginning": (safetensors(header(w=("F32", [2], [-8, 0]))), "is damaged"),
    "backwards": (safetensors(header(w=("F32", [2], [8, 0]))), "is damaged"),
    "truncated": (safetensors(header(w=("F32", [2], [0, 8])), 4), "is damaged"),
    "more than said": (safetensors(header(w=("F32", [2], [0, 8])), 40), "is damaged"),
    "eight bits": (safetensors(header(w=("F8_E4M3", [8], [0, 8]))), "is torch.float8_e4m3fn, torch.strided, not plain"),
    "complex": (safetensors(header(w=("C64", [1], [0, 8]))), "is torch.complex64, torch.strided, not plain numbers"),
    "1,000 dimensions": (safetensors(header(w=("F32", [1] * 1000, [0, 4])), 4), "w has 1000 dimensions"),
    "a pickle": (pickle.dumps(Calls(os.mkdir, ("executed",))), "is damaged"),
    "lines and colours": (
        safetensors(header(**{"\x1b[31m\nsecond": ("C64", [1], [0, 8])})),
        "can't be used: ?[31m?second is torch.complex64",
    ),
}


@pytest.mark.parametrize("name", ODD_SAFETENSORS)
def test_hostile_safetensors_are_a_sentence(name: str, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "w.safetensors"
    data, sentence = ODD_SAFETENSORS[name]
    path.write_bytes(data)
    section = Model(name="ex1", pretrained=str(path))

    def load() -> None:
        found = find_weights(section, print)
        assert found is not None
        load_weights(build_model(Model(name="ex1"), classes=10, size=(32, 32), seed=0), section, found)

    said = sentence_of(load, DataError)
    assert sentence in said and str(path) in said


@pytest.mark.parametrize("name", ["\x1b[31m\nsecond", "x" * 10_000])
def test_names_of_weights_are_said_on_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(header(**{name: ("F32", [2], [0, 8])})))
    section = Model(name="ex1", pretrained=str(path))
    model = build_model(Model(name="ex1"), classes=10, size=(32, 32), seed=0)
    found = find_weights(section, print)
    assert found is not None
    said = sentence_of(lambda: load_weights(model, section, found), RecipeError)
    assert "it lacks" in said and said.isprintable()


# --- names of classes and runs ------------------------------------------------------------------

NAMES = [
    "<script>alert(1)<script>",
    "=cmd()",
    "-2+3",
    "[red]x[red]",
    "[link=http:x]y",
    ":cat:",
    "$\\frac{1$",
    "`code` ![x](y)|z",
    "x" * 255,
]
# What no class folder may be called; another's file may say it all the same.
ODD_NAMES = ["\x1b[31mred", "two\nlines", "lone\udcff", "\0", "../x", "[/red]", "x" * 300]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder, str]:
    """A folder of images whose classes have such names, a run on it in a folder of such a name, and what that said."""
    place = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        (place / "data" / name).mkdir(parents=True)
        for count in range(4):
            Image.new("RGB", (32, 32), (number * 20, count * 60, 90)).save(place / "data" / name / f"{count}.png")
    data = place / "data"
    runs = place / ":cat: [red]runs[red]"
    arguments = ["run", "ex1", "--dataset", f"folder:{data}", "--runs", runs, "--set", "train.epochs=1"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "argv", ["cifarlab", *map(str, arguments), "--set", "train.numerics=exact"])
        from cifarlab import cli

        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    (folder,) = find_runs([runs])
    assert sorted(path.name for path in place.iterdir()) == sorted(["data", runs.name])
    return data, folder, out.getvalue()


def harmless(text: str) -> bool:
    """Text that a terminal shows as it is, and that is UTF-8."""
    return all(character.isprintable() or character == "\n" for character in text) and bool(text.encode())


needs_names = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names of any bytes")


@needs_names
def test_a_run_on_classes_of_any_name_says_nothing_that_a_terminal_obeys(ran: tuple[Path, RunFolder, str]) -> None:
    _, folder, out = ran
    assert harmless(out)
    assert f"record and pictures: {folder.path}" in out  # `:cat:` and brackets as they are


@needs_names
def test_records_hold_the_classes_names_as_they_are(ran: tuple[Path, RunFolder, str]) -> None:
    _, folder, _ = ran
    log = folder.test_log()
    assert log is not None
    assert sorted(log["classes"]) == sorted(folder.load_checkpoint("best.pth")["classes"]) == sorted(NAMES)
    for name in ("loss.png", "accuracy.png", "confusion_matrix.png"):
        assert (folder.path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_takes_classes_that_no_folder_could_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in ODD_NAMES if name.isascii()][:4]
    dataset = dataclasses.replace(make_dataset(), classes=tuple(names))
    settings = ["train.epochs=1", "train.numerics=exact"]
    folder = run(tmp_path / "runs", *settings, dataset=dataset, pictures=True, monkeypatch=monkeypatch)
    text = (folder.path / "test.json").read_bytes()
    assert b"\x1b" not in text and b"\0" not in text and b"two\\nlines" in text
    log = folder.test_log()
    assert log is not None and log["classes"] == folder.load_checkpoint("best.pth")["classes"] == names
    assert (folder.path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@needs_names
def test_tensorboards_records_have_figures_and_no_names(ran: tuple[Path, RunFolder, str]) -> None:
    _, folder, _ = ran
    (events,) = folder.path.glob("events.out.tfevents.*")
    data = events.read_bytes()
    assert b"loss/train" in data
    assert not [name for name in NAMES if os.fsencode(name) in data]


@needs_names
@pytest.mark.parametrize("command", ["data info", "data check", "show", "test", "compare"])
def test_commands_say_names_on_one_line(
    command: str,
    ran: tuple[Path, RunFolder, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, folder, _ = ran
    commands: dict[str, list[object]] = {
        "data info": ["data", "info", f"folder:{data}"],
        "data check": ["data", "check", f"folder:{data}"],
        "show": ["show", "ex1", "--dataset", f"folder:{data}"],
        "test": ["test", folder.path],
        "compare": ["compare", folder.path],
    }
    code, out, err = call(capsys, monkeypatch, *commands[command])
    assert code == 0 and harmless(out) and not err
    if command == "data info":
        assert ", :cat:, " in out and "=cmd()" in out and "<script>" in out and "[red]x[red]" in out


def test_what_a_log_says_of_augmented_views_is_shown_as_text(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    recipe = folder.recipe_values()
    recipe["evaluate"]["tta"] = "flip"
    files.write_text(folder.path / "recipe.yaml", json.dumps(recipe))
    odd = {"[red]x[/red]": "[blink]y\x1b[31m", ":cat:": ":dog:", "line\nbreak": "a\nb"}
    folder.write_train_log(folder.train_log() | {"tta": {"mode": "flip", **odd}})
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: make_dataset())
    code, out, err = call(capsys, monkeypatch, "test", folder.path)
    assert code == 0 and not err and harmless(out)
    for shown in ("tta: [red]x[/red]", "[blink]y?[31m", "tta: :cat:", ":dog:", "line?break"):
        assert shown in out


@pytest.mark.parametrize(
    "name", ["![x](http://y/z.png)", "[x](javascript:alert(1))", "`a|b`", "a`", "<b>", "$x$", ":cat:"]
)
def test_a_cell_of_markdown_is_text(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", train={"dataset": name, "status": name})
    (folder.path / "recipe.yaml").write_text(json.dumps({**folder.recipe_values(), "name": name}))
    text = to_markdown(compare([folder]))
    assert "](" not in text and "`" not in text and "<" not in text
    assert text.splitlines()[-1].count("|") == 8


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1+2", "@x", "=1,2", '="x"'])
def test_a_spreadsheet_sees_text_and_numbers(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", train={"dataset": name, "status": name, "overfitting_gap": -0.5})
    (folder.path / "recipe.yaml").write_text(json.dumps({**folder.recipe_values(), "name": name}))
    (read,) = csv.DictReader(io.StringIO(to_csv(compare([folder]))))
    assert read["experiment"] == read["dataset"] == read["status"] == f"'{name}"
    assert read["overfitting_gap"] == "-0.5"


@pytest.mark.parametrize("name", [":cat:", "[link=http:x]y", *ODD_NAMES], ids=ascii)  # the others: test_compare.py
def test_compares_forms_take_any_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "a", train={"dataset": name})
    (folder.path / "recipe.yaml").write_text(json.dumps({**folder.recipe_values(), "name": name}))
    for form in ("table", "markdown", "csv", "json"):
        code, out, err = call(capsys, monkeypatch, "compare", folder.path, "--format", form)
        assert code == 0 and harmless(out) and not err
        if form == "table" and name == ":cat:":
            assert out.count(":cat:") == 2
    assert json.loads(to_json(compare([folder])))[0]["accuracy"]["mean"] == 0.72


# --- names that are folders ---------------------------------------------------------------------

BAD_NAMES = [
    "../x", "..", ".", "/etc/x", "a/b", "a\\b", "C:x", "-rf", ".hidden", "a\nb", "", " ", "a ", "x" * 101, "x" * 300,
    "con", "NUL", "com1.txt", "Lpt9", "aux.", "a.", "é", "\x1b[31m", "a\0b", "$HOME", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_recipe_cannot_be_called_what_is_no_folders_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**load_recipe("ex1").to_dict(), "name": name}
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for arguments in (["run", tmp_path / "r.yaml"], ["run", "ex1", "--set", f"name={json.dumps(name)}"]):
        code, out, err = call(capsys, monkeypatch, *arguments, "--dataset", "digits", "--runs", work / "runs")
        assert code == 2 and err.count("\n") == 1 and ": name: " in err and harmless(err) and not out
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["r.yaml", "work"]


@pytest.mark.parametrize("name", ["console", "nul_1", "a.b", "x" * 100, "com10", "1e3+x"])
def test_names_that_only_look_reserved_are_fine(name: str, tmp_path: Path) -> None:
    recipe = load_recipe("ex1", [f"name='{name}'"]).resolved(dataset="digits", seed=0)
    made = RunFolder.create(tmp_path / "runs", recipe, datetime(2026, 11, 23))
    assert made.path.parent == tmp_path / "runs" / name / "digits"
