"""TensorBoard's file, read back by TensorBoard; and the command that opens it."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from cifarlab import experiment
from cifarlab.board import SCALARS, Board, grid_size
from cifarlab.build import make_task
from cifarlab.data.batches import epoch_order
from cifarlab.data.dataset import Dataset
from cifarlab.data.prepare import prepare
from cifarlab.feed import first_pictures, make_batches
from cifarlab.pace import BySteps
from cifarlab.recipe import Recipe, flatten
from cifarlab.rundir import RunFolder
from cifarlab.task import Task
from cifarlab.train import StopRequest
from command import call
from short_runs import CPU, Quiet, make_dataset, recipe, run

AUGMENTED = "augment={crop_padding: 4, flip: random}"
EACH_EPOCH = ["train.checkpoint_every.epochs=1", "train.keep=9", "train.numerics=exact"]


def events_of(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def whole(folder: Path) -> dict[str, Any]:
    """All that TensorBoard finds, but for times."""
    events = events_of(folder)
    tags = events.Tags()
    return {
        "scalars": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in tags["scalars"]
            if tag not in ("seconds", "result/train_time")
        },
        "histograms": {
            tag: [(event.step, event.histogram_value) for event in events.Histograms(tag)] for tag in tags["histograms"]
        },
        "images": {tag: [dataclasses.astuple(event)[1:] for event in events.Images(tag)] for tag in tags["images"]},
        "hparams": dict(events.PluginTagToContent("hparams")).keys(),
    }


def cells(png: bytes, side: int = 32, across: int = 8) -> NDArray[np.uint8]:
    """The images of a grid: uint8 (rows * across, 3, side, side)."""
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    step = side + 2
    assert sheet.dtype == np.uint8 and sheet.shape[1:] == (across * step, 3) and sheet.shape[0] % step == 0
    places = [(row, column) for row in range(0, len(sheet), step) for column in range(0, across * step, step)]
    return np.stack([sheet[r + 1 : r + 1 + side, c + 1 : c + 1 + side].transpose(2, 0, 1) for r, c in places])


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, file, **__: file.write(b"a picture"))
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of three epochs with histograms, and all of its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("ran"), *EACH_EPOCH, AUGMENTED, histograms=True, monkeypatch=patch)


def test_all_curves_are_the_log_s(ran: RunFolder) -> None:
    events, log = events_of(ran.path), ran.train_log()
    for name, tag in SCALARS.items():
        logged = [entry[name] for entry in log["epochs"]]
        if logged == [None] * 3:
            assert tag not in events.Tags()["scalars"]
        else:
            assert [(event.step, event.value) for event in events.Scalars(tag)] == [
                (step, pytest.approx(value)) for step, value in zip((6, 12, 18), logged, strict=True)
            ]


def test_runs_are_told_apart_by_their_recipes_and_what_came_out(ran: RunFolder) -> None:
    events, log, test = events_of(ran.path), ran.train_log(), ran.test_log()
    assert test is not None
    contents = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    fields = flatten(ran.recipe().to_dict())
    plain = {name: value for name, value in fields.items() if isinstance(value, bool | int | float | str)}
    assert found == plain | {"dataset": "digits"}
    assert found["optimizer.lr"] == fields["optimizer.lr"] and found["train.epochs"] == 3
    assert start.group_name.startswith("ex1 digits seed 0 ")
    end = metadata.parse_session_end_info_plugin_data(contents[metadata.SESSION_END_INFO_TAG])
    assert end.status == 1 and end.end_time_secs > start.start_time_secs  # success
    results = {
        "best_val_accuracy": log["best_val_accuracy"],
        "overfitting_gap": log["overfitting_gap"],
        "train_time": log["train_time"],
        "test_accuracy": test["accuracy"],
    }
    for name, value in results.items():
        (event,) = events.Scalars(f"result/{name}")
        assert (event.step, event.value) == (18, pytest.approx(value))


def test_a_run_that_is_not_scored_has_no_test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "train.epochs=1", "evaluate.test=false", monkeypatch=monkeypatch)
    events = events_of(folder.path)
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("result/")} == {
        "result/best_val_accuracy", "result/overfitting_gap", "result/train_time",
    }  # fmt: skip
    assert not events.Tags()["histograms"]
    assert len(events.PluginTagToContent("hparams")) == 2


def test_histograms_are_those_of_the_checkpoints_weights(ran: RunFolder) -> None:
    events = events_of(ran.path)
    for number in range(3):
        model = ran.load_checkpoint(f"epoch-{number + 1}.pth")["model"]
        weights = {name: value.double() for name, value in model.items() if not re.search("running|tracked", name)}
        assert {f"weights/{name}" for name in weights} == set(events.Tags()["histograms"])
        for name, value in weights.items():
            event = events.Histograms(f"weights/{name}")[number]
            found = event.histogram_value
            assert event.step == 6 * (number + 1)
            assert (found.min, found.max) == (value.min().item(), value.max().item())
            assert sum(found.bucket) == found.num == value.numel()
            assert found.sum == pytest.approx(value.sum().item(), abs=1e-9)
            assert found.sum_squares == pytest.approx(value.square().sum().item())
            # TensorBoard counts up to each limit.
            below = [int((value <= limit).sum()) for limit in found.bucket_limit]
            assert np.cumsum(found.bucket) == pytest.approx(below, abs=1)  # a value on an edge may be on either side


def task_of(plan: Recipe, dataset: Dataset | None = None) -> Task:
    return make_task(plan, prepare(dataset or make_dataset(), plan.data, 0), CPU, None, lambda _: None)


def test_the_first_images_are_those_of_the_dataset_in_the_first_epoch_s_order() -> None:
    plan, dataset = recipe("train.numerics=exact"), make_dataset()
    index = torch.from_numpy(prepare(dataset, plan.data, 0).train.index)
    order = epoch_order(index, 0, 0)[:32].numpy()  # a batch
    assert (first_pictures(plan, task_of(plan, dataset)) == dataset.train.pixels[order]).all()


def test_they_are_in_the_file_once(ran: RunFolder) -> None:
    plan = ran.recipe()
    (event,) = events_of(ran.path).Images("images/train")
    assert event.step == 0 and (event.height, event.width) == (4 * 34, 8 * 34)
    assert (cells(event.encoded_image_string) == first_pictures(plan, task_of(plan))).all()


@pytest.mark.parametrize(
    "overrides",
    [
        [AUGMENTED],
        ["augment={cutout: 8, brightness: 0.4}", "loss={mixup: 0.5, cutmix: 1.0}", "train.batch_size=80"],
        [AUGMENTED, "loss.mixup=1.0", "data={memory: 1, workers: 0}"],
        ["train.resolution=[[0, 96], [0.5, 128]]", "model.name=ex2", AUGMENTED],
    ],
    ids=["augmented", "mixed", "streamed", "larger"],
)
def test_they_are_what_the_first_step_trains_on(overrides: list[str]) -> None:
    plan = recipe("train.numerics=exact", *overrides)
    task = task_of(plan, make_dataset(train=500))
    assert task.store.resident == ("memory" not in str(overrides))
    found = first_pictures(plan, task)
    inputs = next(make_batches(plan, task, 0, BySteps(10))).inputs
    mean, std = (torch.tensor(task.description[name])[:, None, None] for name in ("mean", "std"))
    expected = ((inputs * std + mean) * 255)[: grid_size(*inputs.shape[2:])].clamp(0, 255)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() <= 0.51  # half of what is between two of them, and rounding


@pytest.mark.parametrize(
    ("side", "images", "across"), [(8, 64, 8), (62, 64, 8), (128, 16, 4), (224, 4, 2), (300, 1, 1)]
)
def test_a_grid_has_64_images_or_fewer_where_they_are_large(
    side: int, images: int, across: int, tmp_path: Path
) -> None:
    assert grid_size(side, side) == images
    drawn = np.random.default_rng(0).integers(0, 2, (max(1, images - 1), 3, side, side), dtype=np.uint8) * 100
    Board(tmp_path).begin([], images=drawn)
    (event,) = events_of(tmp_path).Images("images/train")
    found = cells(event.encoded_image_string, side, across)
    assert (found[: len(drawn)] == drawn).all() and (found[len(drawn) :] == 255).all()


# --- going on ---------------------------------------------------------------------------------------


def go_on(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, dataset: Dataset | None = None) -> None:
    monkeypatch.setattr(experiment, "load_dataset", lambda *_: dataset or make_dataset())
    display = Quiet()
    experiment.resume_experiment(
        folder.path, data_folder=None, device=CPU, display=display, stop=StopRequest(), process_started=0.0,
        report=display.report,
    )  # fmt: skip


def cut_back(ran: RunFolder, place: Path) -> tuple[RunFolder, Path]:
    """A finished run as if it had been killed in its last epoch, with the checkpoint of the first as its newest."""
    shutil.copytree(ran.path, place)
    folder = RunFolder(place)
    for name in ("epoch-2.pth", "epoch-3.pth", "test.json"):
        (place / name).unlink()
    folder.write_train_log({**folder.train_log(), "status": "running"})
    (board,) = place.glob("events.out.tfevents.*")
    return folder, board


@pytest.mark.parametrize("left", ["half a record", "two files and a link"])
def test_a_run_that_goes_on_has_all_of_it_once(
    left: str, ran: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, board = cut_back(ran, tmp_path / "run")
    data = board.read_bytes()
    if left == "half a record":
        board.write_bytes(data[: len(data) * 9 // 10])
    else:
        shutil.copy(board, board.with_name("events.out.tfevents.1.elsewhere"))
        board.rename(tmp_path / "outside")
        board.symlink_to(tmp_path / "outside")
    go_on(folder, monkeypatch)
    (now,) = folder.path.glob("events.out.tfevents.*")
    assert whole(folder.path) == whole(ran.path)
    assert not now.is_symlink()
    if left != "half a record":
        assert (tmp_path / "outside").read_bytes() == data


def test_a_damaged_histogram_is_left_out(ran: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, board = cut_back(ran, tmp_path / "run")
    data = bytearray(board.read_bytes())
    data[data.index(b"weights/conv1.weight") + 40] ^= 1  # of the first epoch
    board.write_bytes(data)
    go_on(folder, monkeypatch)
    found, expected = whole(folder.path), whole(ran.path)
    assert found | {"histograms": None} == expected | {"histograms": None}
    assert found["histograms"] == {tag: entries[1:] for tag, entries in expected["histograms"].items()}


@pytest.mark.parametrize("junk", [b"", b"no record", bytes(100), b"\xff" * 100])
def test_a_file_that_is_none_is_replaced(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.here").write_bytes(junk)
    Board(tmp_path).end({"test_accuracy": 0.5})
    assert [event.value for event in events_of(tmp_path).Scalars("result/test_accuracy")] == [0.5]
    Board(tmp_path).begin([], histograms=True)
    assert len(list(tmp_path.iterdir())) == 1 and not events_of(tmp_path).Tags()["scalars"]


def test_what_came_out_is_said_once_whatever_a_kill_left_of_it(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.begin([])
    entry: dict[str, Any] = dict.fromkeys(SCALARS, 0.5)
    board.add(entry, 7)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    board.end({"test_accuracy": 0.25, "best_val_accuracy": None})
    after = path.read_bytes()
    assert after.startswith(before)
    for size in (len(before), len(before) + 1, len(before) + 12, len(after) - 1, len(after)):
        path.write_bytes(after[:size])
        Board(tmp_path).end({"test_accuracy": 0.25})
        events = events_of(tmp_path)
        assert [(event.step, event.value) for event in events.Scalars("result/test_accuracy")] == [(7, 0.25)]
        assert [event.value for event in events.Scalars("loss/train")] == [0.5]
        assert "result/best_val_accuracy" not in events.Tags()["scalars"]
        assert len(path.read_bytes()) == len(after)


def test_weights_that_have_no_spread_or_no_end_have_histograms_too(tmp_path: Path) -> None:
    odd = {
        "one": np.ones((3, 4), np.float32),
        "close": np.nextafter(np.float32(1), np.float32(2)) * np.array([1, 1, 1 - 1e-7], np.float32),
        "tiny": np.array([0, 1e-45], np.float32),
        "wide": np.array([-3e38, 3e38, 0], np.float32),
        "infinite": np.array([np.nan, -np.inf, 2, 1], np.float32),
        "none": np.full(3, np.nan, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(5, np.float32),
    }
    board = Board(tmp_path)
    board.begin([])
    board.add(dict.fromkeys(SCALARS, 0.0), 1, odd)
    events = events_of(tmp_path)
    found = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
    assert {tag.removeprefix("weights/"): sum(value.bucket) for tag, value in found.items()} == {
        "one": 12, "close": 3, "tiny": 2, "wide": 3, "infinite": 2, "scalar": 1,
    }  # fmt: skip
    assert (found["weights/infinite"].min, found["weights/infinite"].max) == (1, 2)
    assert found["weights/one"].bucket_limit == [1] and found["weights/one"].min == 1


def test_names_from_outside_are_plain_text(tmp_path: Path) -> None:
    name = "folder:/pictures/\udcff\x1b[31m<b>cats</b>"
    Board(tmp_path).begin([], recipe=recipe().model_copy(update={"datasets": (name,)}))
    content = events_of(tmp_path).PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.hparams["dataset"].string_value == "folder:/pictures/??[31m<b>cats</b>"
    assert re.fullmatch(r"ex1 folder-[\w.-]+ seed 0 [0-9a-f]{8}", start.group_name)


# --- the command ------------------------------------------------------------------------------------


def test_the_board_is_open_to_this_machine_only_until_ctrl_c(ran: RunFolder, tmp_path: Path) -> None:
    for name in ("one", "two/three", "<img src=x>"):
        shutil.copytree(ran.path, tmp_path / name)
    command = [sys.executable, "-m", "cifarlab", "board", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r" 3 runs in .* at (http://127\.0\.0\.1:(\d+)/) .*Ctrl-C ends it", line)
            assert found is not None, line
            server = psutil.Process(process.pid)
            listening = {
                connection.laddr
                for one in (server, *server.children(recursive=True))
                for connection in one.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
            assert {address.ip for address in listening} == {"127.0.0.1"}
            assert int(found[2]) in {address.port for address in listening}
            names: list[str] = []
            while len(names) < 3:  # it reads them one after the other
                with urllib.request.urlopen(f"{found[1]}data/runs") as answer:
                    names = json.load(answer)
            assert names == ["<img src=x>", "one", "two/three"]
            again = subprocess.run([*command[:-1], found[2]], capture_output=True, text=True)
            assert again.returncode == 2 and again.stderr == (
                f"cifarlab: port {found[2]} is in use; give another, or no --port to take the next free one\n"
            )
        finally:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and said == "cifarlab: interrupted\n"


def test_a_board_that_can_t_be_had_is_one_sentence(
    ran: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = partial(call, capsys, monkeypatch, "board")
    code, _, said = board(tmp_path)
    assert code == 4 and said == f"cifarlab: {tmp_path} holds no run; 'cifarlab run RECIPE' makes one\n"
    code, _, said = board(tmp_path / "none")
    assert code == 4 and "does not exist" in said and said.count("\n") == 1
    code, _, said = board(ran.path, "--port", 70000)
    assert code == 2 and "less than or equal to 65535" in said and said.count("\n") == 1
