"""The run folder: a name of its own for each run, records that come back, and a sentence for each way to be damaged."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarlab import files
from cifarlab.errors import NotARunError, RunError, StorageError
from cifarlab.recipe import Recipe, load_recipe
from cifarlab.rundir import RunFolder, dataset_folder_name, find_runs, serialized

NOW = datetime(2026, 11, 23, 21, 25, 0)


def recipe(dataset: str = "cifar10", seed: int = 0) -> Recipe:
    return load_recipe("ex1").resolved(dataset=dataset, seed=seed)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "runs", recipe(), NOW)
    folder.write_train_log({"status": "running", "dataset": "cifar10", "epochs": []})
    return folder


def refusal(call: Callable[[], Any]) -> str:
    """The sentence that a call refuses with."""
    with pytest.raises(NotARunError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


# --- names ------------------------------------------------------------------------------------------


def test_a_run_folder_is_named_for_recipe_dataset_and_time_and_numbered_on_a_clash(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path / "runs", recipe(), NOW) for _ in range(3)]
    parent = tmp_path / "runs" / "ex1" / "cifar10"
    assert [run.path for run in runs] == [parent / f"20261123-212500{suffix}" for suffix in ("", "-2", "-3")]
    assert all(run.recipe() == recipe() for run in runs)
    later = RunFolder.create(tmp_path / "runs", recipe(), NOW.replace(second=1))
    assert later.path.name == "20261123-212501"


def test_threads_that_create_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    made: list[Path] = []

    def create(seed: int) -> None:
        together.wait()
        run = RunFolder.create(tmp_path / "runs", recipe(seed=seed), NOW)
        assert run.recipe().seed == seed
        made.append(run.path)

    threads = [threading.Thread(target=create, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_processes_that_create_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from datetime import datetime\n"
        "from pathlib import Path\n"
        "from cifarlab.recipe import load_recipe\n"
        "from cifarlab.rundir import RunFolder\n"
        "recipe = load_recipe('ex1').resolved(dataset='cifar10', seed=0)\n"
        "sys.stdin.read()\n"
        "for _ in range(20): print(RunFolder.create(Path(sys.argv[1]), recipe, datetime(2026, 11, 23)).path)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # the start signal
        process.stdin = None
    made = [line for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
    assert len(made) == len(set(made)) == 40


def test_what_stands_in_the_way_of_a_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for runs in (tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(StorageError, match="a file stands where a folder is needed; choose another folder"):
            RunFolder.create(runs, recipe(), NOW)
    with pytest.raises(StorageError, match="the name is too long; choose a shorter one"):
        RunFolder.create(tmp_path / ("x" * 300), recipe(), NOW)


def test_when_every_number_is_taken_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(path: Path, *, exist_ok: bool = True) -> None:
        if not exist_ok:
            raise FileExistsError

    monkeypatch.setattr(files, "make_folder", taken)
    with pytest.raises(RunError, match="20261123-212500 and its numbered siblings are all taken"):
        RunFolder.create(tmp_path, recipe(), NOW)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10", "cifar10"),
        ("folder:/pictures/My cats", "folder-My-cats"),
        ("folder:/pictures/My cats/", "folder-My-cats"),
        ("folder:/x/y/..", "folder-x"),
        ("folder:/x/../..", "folder-images"),
        ("folder:/", "folder-images"),
        ("folder:/x/...", "folder-images"),
        ("folder:/x/ ", "folder-images"),
        ("folder:/x/two\nlines", "folder-two-lines"),
        ("folder:/x/\x1b[31mred", "folder-31mred"),
        ("folder:/x/a|b<c>d:e*f?g\\h", "folder-a-b-c-d-e-f-g-h"),
        ("folder:/x/Größe", "folder-Größe"),
        ("folder:/x/-rf", "folder-rf"),
        ("folder:/x/.hidden", "folder-hidden"),
        ("folder:/x/" + os.fsdecode(b"\xff"), "folder-images"),
    ],
)
def test_a_dataset_folder_has_a_plain_name(dataset: str, expected: str) -> None:
    assert dataset_folder_name(dataset) == expected


def test_a_relative_dataset_folder_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats" / "inner").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "cats")
    assert dataset_folder_name("folder:.") == "folder-cats"
    assert dataset_folder_name("folder:inner/..") == "folder-cats"
    assert dataset_folder_name("folder:../loop") == "folder-loop"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300))
def test_whatever_a_dataset_folder_is_called_its_runs_stay_in_one_folder_of_a_legal_name(text: str) -> None:
    name = dataset_folder_name(f"folder:/{text}")
    assert re.fullmatch(r"folder-[\w.-]+", name)
    assert len(os.fsencode(name)) <= 255


@pytest.mark.parametrize("name", ["𠀀" * 200, "é" * 200, "two\nlines", "../../x", "x" * 200])
def test_a_run_on_a_folder_of_any_name_can_be_made_and_read(name: str, tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path / "runs", recipe(f"folder:/pictures/{name}"), NOW)
    assert made.path.parent.parent == tmp_path / "runs" / "ex1"
    assert made.recipe().datasets == (f"folder:/pictures/{name}",)


# --- records ----------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_written(run: RunFolder) -> None:
    opened = RunFolder.open(run.path)
    assert opened.test_log() is None
    run.write_train_log({"status": "finished", "epochs": [{"train_loss": 0.1 + 0.2, "val_loss": None}]})
    run.write_test_log({"accuracy": 1 / 3, "classes": ["Größe"]})
    run.write_environment({"device": "cpu"})
    assert opened.train_log() == {"status": "finished", "epochs": [{"train_loss": 0.1 + 0.2, "val_loss": None}]}
    assert opened.test_log() == {"accuracy": 1 / 3, "classes": ["Größe"]}
    assert opened.environment() == {"device": "cpu"}
    assert opened.recipe_values() == recipe().to_dict()


def test_predictions_come_back_as_they_were_written(run: RunFolder) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels, index = np.arange(5) % 3, np.array([9, 7, 5, 3, 1])
    run.write_predictions("predictions.npz", logits=logits, labels=labels, index=index)
    with np.load(run.path / "predictions.npz", allow_pickle=False) as read:
        assert set(read) == {"logits", "labels", "index"}
        for name, expected in (("logits", logits), ("labels", labels), ("index", index)):
            assert read[name].dtype == expected.dtype
            np.testing.assert_array_equal(read[name], expected)


def test_what_is_no_run_folder_is_refused_with_what_it_lacks(run: RunFolder, tmp_path: Path) -> None:
    example = "; give a run folder, such as runs/ex1/cifar10/20261123-212500"
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "missing", run.path / "train.json", tmp_path / "loop"):
        assert refusal(partial(RunFolder.open, path)) == f"{path} is not a folder{example}"
    no_run = f"{empty} is not a run folder: it has no recipe.yaml and no train.json"
    assert refusal(lambda: RunFolder.open(empty)) == no_run + example
    long = tmp_path / ("x" * 300)
    assert refusal(lambda: RunFolder.open(long)) == f"cannot read {long}: File name too long"
    (run.path / "train.json").unlink()
    assert "it has no train.json; give" in refusal(lambda: RunFolder.open(run.path))
    (run.path / "train.json").mkdir()
    assert "it has no train.json; give" in refusal(lambda: RunFolder.open(run.path))


DAMAGED_JSON = {
    "truncated": b'{"status": "finished", "epo',
    "zero bytes": b"",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "list": b"[1, 2]",
    "string": b'"finished"',
    "null": b"null",
    "two values": b"{} {}",
    "nested": b'{"a":' * 100_000,
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "NaN": b'{"accuracy": NaN}',
    "infinity": b'{"accuracy": -Infinity}',
    "a number of 5,000 digits": b'{"accuracy": ' + b"1" * 5000 + b"}",
    "UTF-16": '{"status": "finished"}'.encode("utf-16"),
}


@pytest.mark.parametrize("data", DAMAGED_JSON.values(), ids=DAMAGED_JSON.keys())
@pytest.mark.parametrize("name", ["train.json", "test.json", "environment.json"])
def test_a_damaged_json_record_is_refused_in_a_sentence_that_names_it(name: str, data: bytes, run: RunFolder) -> None:
    (run.path / name).write_bytes(data)
    read = {"train.json": run.train_log, "test.json": run.test_log, "environment.json": run.environment}[name]
    assert refusal(read).startswith(f"{run.path / name} is damaged: ")


DAMAGED_YAML = {
    "zero bytes": b"",
    "truncated": b"name: ex1\ndatasets: [cifar10",
    "binary": bytes(range(256)),
    "a control character": b"name: \x07",
    "list": b"- 1\n- 2\n",
    "text": b"hello",
    "nested": b"[" * 5_000,
    "aliases": b"a: &a [1]\nb: [*a, *a]",
    "twice": b"name: a\nname: b",
    "a tag that would run code": b"name: !!python/object/apply:os.system ['exit 1']",
    "an impossible date": b"name: 2026-99-99",
}


@pytest.mark.parametrize("data", DAMAGED_YAML.values(), ids=DAMAGED_YAML.keys())
def test_a_damaged_recipe_is_refused_in_a_sentence_that_names_it(data: bytes, run: RunFolder) -> None:
    (run.path / "recipe.yaml").write_bytes(data)
    for read in (run.recipe_values, run.recipe):
        assert refusal(read).startswith(f"{run.path / 'recipe.yaml'}")


def test_a_recipe_that_is_no_longer_valid_is_a_damaged_run_rather_than_a_wrong_command(run: RunFolder) -> None:
    text = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(text.replace("epochs: 50", "epochs: -1"))
    assert run.recipe_values()["train"]["epochs"] == -1  # tables still show it
    assert "train.epochs: expected greater than 0" in refusal(run.recipe)


def test_a_record_that_is_missing_or_far_too_large_is_refused(run: RunFolder, tmp_path: Path) -> None:
    assert refusal(run.environment) == (
        f"{run.path / 'environment.json'} is missing; is {run.path} a whole run folder?"
    )
    with (run.path / "train.json").open("wb") as file:
        file.truncate(100_000_001)
    assert "is larger than 100,000,000 bytes; it was not written by cifarlab" in refusal(run.train_log)
    (run.path / "test.json").mkdir()
    assert refusal(run.test_log) == f"cannot read {run.path / 'test.json'}: Is a directory"


# --- checkpoints ------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    import torch

    return {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 3, "epochs": [{"val_loss": None}], "mean": [0.5]}


def test_a_checkpoint_comes_back_as_it_was_saved(run: RunFolder) -> None:
    import torch

    run.save_checkpoint("best.pth", serialized(state()))
    read = run.load_checkpoint("best.pth")
    assert torch.equal(read.pop("model")["w"], state()["model"]["w"])
    assert read == {"step": 3, "epochs": [{"val_loss": None}], "mean": [0.5]}


class Hostile:
    """A pickle that would make a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["torch", "torch, old format", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(
    form: str, run: RunFolder, tmp_path: Path
) -> None:
    import torch

    mark, path = tmp_path / "ran", run.path / "best.pth"
    hostile = {**state(), "extra": Hostile(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "torch")
    sentence = refusal(lambda: run.load_checkpoint("best.pth"))
    assert not mark.exists()
    # torch's own words would have the user switch the check off.
    assert "weights_only" not in sentence
    assert sentence == (
        f"{path} is damaged, or holds more than tensors and plain values; cifarlab reads checkpoints of its own"
    )
    if form == "torch":
        torch.load(path, weights_only=False)
        assert mark.exists()  # it would have run


def checkpoint_bytes(run: RunFolder, old_format: bool) -> bytes:
    import torch

    path = run.path / "whole.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=not old_format)
    return path.read_bytes()


@pytest.mark.parametrize("old_format", [False, True])
def test_a_truncated_checkpoint_is_refused(run: RunFolder, old_format: bool) -> None:
    whole = checkpoint_bytes(run, old_format)
    for length in (*range(0, 64, 9), *range(64, len(whole), 61), len(whole) - 1):
        (run.path / "best.pth").write_bytes(whole[:length])
        assert "best.pth is damaged, or holds more than tensors" in refusal(lambda: run.load_checkpoint("best.pth"))


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_with_changed_bytes_is_read_or_refused_and_nothing_else(run: RunFolder, old_format: bool) -> None:
    whole = np.frombuffer(checkpoint_bytes(run, old_format), np.uint8)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = whole.copy()
        places = generator.integers(0, len(whole), 8)
        changed[places] = generator.integers(0, 256, 8)
        (run.path / "best.pth").write_bytes(changed.tobytes())
        try:
            run.load_checkpoint("best.pth")
        except NotARunError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "data",
    [b"", b"hello world\n", bytes(1000), pickle.dumps({"a": 1}), pickle.dumps({"a": 1}, protocol=2), b"PK\3\4"],
)
def test_a_file_that_is_no_checkpoint_is_refused(data: bytes, run: RunFolder) -> None:
    (run.path / "best.pth").write_bytes(data)
    refusal(lambda: run.load_checkpoint("best.pth"))


def test_a_checkpoint_in_the_old_format_is_read(run: RunFolder) -> None:
    import torch

    torch.save(state(), run.path / "best.pth", _use_new_zipfile_serialization=False)
    assert run.load_checkpoint("best.pth")["step"] == 3


def test_a_missing_checkpoint_a_folder_and_another_value_are_told_apart(run: RunFolder) -> None:
    import torch

    path = run.path / "best.pth"
    missing = f"{path} is missing; this run has saved no such checkpoint"
    assert refusal(lambda: run.load_checkpoint("best.pth")) == missing
    path.mkdir()
    assert refusal(lambda: run.load_checkpoint("best.pth")) == f"cannot read {path}: Is a directory"
    path.rmdir()
    torch.save([1, 2], path)
    assert refusal(lambda: run.load_checkpoint("best.pth")).endswith("expected a dictionary")


@pytest.mark.parametrize("after", [0, 100, 3000])
def test_a_disk_that_fills_up_during_a_checkpoint_is_named_and_the_old_one_stays(
    after: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class FullDisk(io.FileIO):
        room = after

        def write(self, data: Any) -> int:
            self.room -= len(memoryview(data).cast("B"))
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    run.save_checkpoint("best.pth", serialized(state()))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(FullDisk(path, "x"), 64))
        with pytest.raises(StorageError, match=r"cannot write .*best\.pth: the disk is full; free some space"):
            run.save_checkpoint("best.pth", serialized({"step": 4, "model": torch.zeros(100_000)}))
    assert run.load_checkpoint("best.pth")["step"] == 3
    assert not list(run.path.glob(".*"))


def test_an_error_of_torch_that_is_not_the_disks_passes_through(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def save(*args: Any) -> None:
        raise RuntimeError("mine")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="mine"):
        run.save_checkpoint("best.pth", serialized({}))
    assert not (run.path / "best.pth").exists()


def touch(run: RunFolder, names: list[str], began: int = 1_000) -> None:
    """Files made in this order, a second apart."""
    for number, name in enumerate(names, began):
        (run.path / name).write_bytes(b"")
        os.utime(run.path / name, (number, number))


def test_keep_latest_keeps_those_of_the_latest_steps_and_the_best(run: RunFolder) -> None:
    """Whatever the clock said when they were written; an epoch's name doesn't say its step, but the file does."""
    steps = {"epoch-10.pth": 710, "step-90.pth": 90, "best.pth": 1, "step-700.pth": 700, "epoch-9.pth": 639}
    for name, step in steps.items():
        run.save_checkpoint(name, serialized({"step": step}))
    touch(run, ["my-step-1.pth", "step-x.pth", "step-640.pth"])  # the last is no file of ours: its name counts
    by_step = ["step-90.pth", "epoch-9.pth", "step-640.pth", "step-700.pth", "epoch-10.pth"]
    assert [path.name for path in run.checkpoints()] == by_step
    run.keep_latest(2)
    run.keep_latest(2)
    run.keep_latest(5)
    assert [path.name for path in run.checkpoints()] == by_step[-2:]
    for name in ("best.pth", "my-step-1.pth", "step-x.pth", "recipe.yaml", "train.json"):
        assert (run.path / name).exists()


@pytest.mark.parametrize("name", ["torch's", "ours"])
def test_every_changed_bit_of_a_checkpoint_of_ours_is_noticed(name: str, run: RunFolder) -> None:
    """torch's own files are read with other numbers in them."""
    import torch

    path = run.path / "best.pth"
    values = {"step": 3, "w": torch.arange(1000.0)}
    if name == "ours":
        run.save_checkpoint("best.pth", serialized(values))
    else:
        torch.save(values, path)
    whole, noticed = path.read_bytes(), 0
    places = range(5, len(whole), 37)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            run.load_checkpoint("best.pth")
        except NotARunError:
            noticed += 1
    assert noticed == len(places) if name == "ours" else noticed < len(places) / 2


def test_a_checkpoint_that_cannot_be_removed_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    touch(run, ["epoch-1.pth", "epoch-2.pth"])
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StorageError, match=r"cannot remove .*epoch-1\.pth: not permitted"):
        run.keep_latest(1)


# --- finding runs -----------------------------------------------------------------------------------


def put(path: Path) -> Path:
    """A folder that looks like a run."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: x\n")
    (path / "train.json").write_text("{}")
    return path


def test_runs_are_found_at_any_depth_sorted_and_each_once(tmp_path: Path) -> None:
    paths = [put(tmp_path / place) for place in ("b/cifar10/2", "b/cifar10/1", "a", "a/inside/another", "c d/é\n")]
    (tmp_path / "no-log").mkdir()
    (tmp_path / "no-log" / "recipe.yaml").write_text("")
    (tmp_path / "no-recipe").mkdir()
    (tmp_path / "no-recipe" / "train.json").write_text("")
    (tmp_path / "log-is-a-folder" / "train.json").mkdir(parents=True)
    (tmp_path / "log-is-a-folder" / "recipe.yaml").write_text("")
    assert [run.path for run in find_runs([tmp_path])] == sorted(paths)
    overlapping = [tmp_path / "b", tmp_path, tmp_path / "a", tmp_path / "b" / ".." / "a"]
    assert [run.path.resolve() for run in find_runs(overlapping)] == sorted(paths)
    assert [run.path for run in find_runs([paths[0]])] == [paths[0]]


def test_a_relative_place_keeps_its_short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert [str(run.path) for run in find_runs([Path("runs")])] == ["runs/a"]


def test_links_to_folders_are_not_followed_so_a_loop_ends(tmp_path: Path) -> None:
    run = put(tmp_path / "runs" / "a")
    (run / "back").symlink_to(tmp_path / "runs", target_is_directory=True)
    (tmp_path / "runs" / "self").symlink_to("self")
    (tmp_path / "runs" / "twin").symlink_to(run, target_is_directory=True)
    assert [found.path for found in find_runs([tmp_path / "runs"])] == [run]
    # A place that is itself a link is looked into.
    (tmp_path / "place").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert [found.path for found in find_runs([tmp_path / "place"])] == [tmp_path / "place" / "a"]


def test_a_place_without_runs_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    expected = {
        "empty": f"{tmp_path / 'empty'} holds no run; 'cifarlab run RECIPE' makes one",
        "missing": f"{tmp_path / 'missing'} does not exist; give run folders, or a folder that holds some, "
        "such as runs",
        "file": f"cannot read {tmp_path / 'file'}: Not a directory; give a folder that holds runs",
        "loop": f"cannot read {tmp_path / 'loop'}: Too many levels of symbolic links; give a folder that holds runs",
        "x" * 300: f"cannot read {tmp_path / ('x' * 300)}: File name too long; give a folder that holds runs",
    }
    for place, sentence in expected.items():
        assert refusal(partial(find_runs, [tmp_path / "runs", tmp_path / place])) == sentence


def test_records_are_read_without_torch(run: RunFolder) -> None:
    run.write_test_log({"accuracy": 0.5})
    code = (
        "import sys\nfrom pathlib import Path\nfrom cifarlab.rundir import find_runs\n"
        "run, = find_runs([Path(sys.argv[1])])\n"
        "print(run.recipe().name, run.train_log()['status'], run.test_log())\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "ex1 running {'accuracy': 0.5}\n"


def test_what_cannot_be_json_never_reaches_a_record(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        run.write_train_log({"status": "finished", "train_time": float("nan")})
    assert json.loads((run.path / "train.json").read_text())["status"] == "running"
