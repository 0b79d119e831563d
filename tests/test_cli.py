"""The command line, as a person uses it: what it prints, where, and with which exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifarlab.rundir import RunFolder
from command import call

FAST = ["--set", "train.epochs=1", "--set", "train.batch_size=256"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder with two uneven classes that are told apart by brightness."""
    generator = np.random.default_rng(0)
    for name, count, level in (("dark", 40, 40), ("light", 24, 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(level - 30, level + 30, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run"], 2, "missing argument 'recipe'"),
        (["runn"], 2, "no such command 'runn'. Did you mean 'run'?"),
        (["run", "ex1", "--nope"], 2, "no such option: --nope"),
        (["run", "ex1", "--seed", "x"], 2, "invalid value for '--seed'"),
        (["run", "ex1", "--seed", "1", "--seeds", "2"], 2, "give --seed N"),
        (["run", "ex11"], 2, "unknown recipe 'ex11'; did you mean 'ex1'?"),
        (["run", "none.yaml"], 2, "cannot read the recipe none.yaml: No such file"),
        (["run", "ex1", "--set", "train.epocs=1"], 2, "unknown key 'train.epocs'"),
        (["run", "ex1", "--set", "optimizer.name=adamx"], 2, "unknown optimizer 'adamx'; did you mean 'adam'?"),
        (["run", "ex1", "--set", "train.epochs=many"], 2, "train.epochs: expected"),
        (["run", "ex1", "--set", "model.name=ex9", "--dataset", "digits"], 2, "unknown model.name 'ex9'"),
        (["run", "ex1", "--dataset", "cifar11"], 2, "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        (["run", "ex1", "--dataset", "digits", "--device", "cud"], 2, "unknown device 'cud'; did you mean 'cuda'?"),
        (["run", "ex1", "--dataset", "digits", "--set", "train.resolution=4"], 2, "at least 16 pixels a side, not 4x4"),
        (["run", "ex1", "--dataset", "digits", "--set", "data.limit=3"], 2, "data.limit"),
        (
            ["run", "ex1", "--dataset", "digits", "--set", "train.resolution=[[0, 24], [0.5, 32]]"],
            2,
            "'ex1' is made for one size of images: it can't see 24x24 and 32x32",
        ),
        (
            ["run", "ex2", "--dataset", "digits", "--set", "evaluate.resolution=64"],
            2,
            "can't see 128x128 and 64x64; give train.resolution and evaluate.resolution one side",
        ),
        (["run", "ex1", "--data", "/nowhere", "--set", "model.freeze_stages=9"], 2, "model.freeze_stages is 9"),
        (["run", "ex1", "--data", "/nowhere", "--set", "model.freeze_late=[[0.5, 9]]"], 2, "model.freeze_late is 9"),
        (["run", "ex1", "--data", "/nowhere", "--set", "augment.translate=32"], 2, "augment.translate 32 moves"),
        (
            [
                "run",
                "ex1",
                "--data",
                "/no",
                "--set",
                "model.name=torchvision:swin_t",
                "--set",
                "optimizer.layer_decay=0.9",
            ],
            2,
            "optimizer.layer_decay needs a network whose layers are known",
        ),
        (["run", "ex1", "--dataset", "digits", "--set", "model.head=keep"], 2, "'ex1' has no head of its own to keep"),
        (
            ["run", "ex3", "--data", "/nowhere", "--set", "model.pretrained=w.pth"],
            2,
            "w.pth; give a .safetensors or .pth file, true or false",
        ),
        (
            ["run", "ex1", "--dataset", "digits", "--tta", "mirror"],
            2,
            "evaluate.tta: expected flip, crops, diagonal, auto",
        ),
        (["lr-find", "ex11"], 2, "unknown recipe 'ex11'; did you mean 'ex1'?"),
        (["lr-find", "ex1", "--dataset", "digits", "--steps", "x"], 2, "invalid value for '--steps'"),
        (["run", "ex1", "--data", "/nowhere/at/all"], 3, "/nowhere/at/all is not a folder"),
        (["run", "ex1", "--dataset", "folder:/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["show", "ex1", "--dataset", "folder:/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["run", "ex1", "--dataset", "digits", "--dataset", "folder:/nowhere"], 3, "/nowhere"),
        (["run", "ex1", "--dataset", "digits", "--seed", "3000000000"], 2, "seed: expected less than 2147483648"),
        (["run", "ex1", "--dataset", "folder:~nobody-here/x"], 3, "write the whole path"),
        (["run", "ex1", "--dataset", "folder:/" + 300 * "x"], 3, "cannot read /xxx"),
        (["data", "info", "cifar11"], 2, "unknown dataset 'cifar11'"),
        (["data", "fetch", "digits"], 2, "'digits' can't be downloaded"),
        (
            ["data", "check", "digits", "--pictures", "x.jpg"],
            2,
            "--pictures x.jpg: expected a name that ends in .png, and one dataset",
        ),
        (["test", "/nowhere/at/all"], 4, "/nowhere/at/all is not a folder"),
        (["compare", "/nowhere/at/all"], 4, "/nowhere/at/all does not exist"),
        (["compare", "--format", "xml"], 2, "invalid value for '--format'"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_with_its_exit_code(
    arguments: list[str],
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, out, err = call(capsys, monkeypatch, *arguments)
    assert sentence in err
    assert err.startswith("cifarlab: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert ended == code
    assert not list(tmp_path.rglob("train.json")), "a run was begun"


def test_no_network_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", "cifar10", "--data", tmp_path)
    assert code == 3
    assert "HF_HUB_OFFLINE" in err and str(tmp_path) in err and err.count("\n") == 1


def test_a_run_folder_that_cannot_be_made_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", "digits", "--runs", tmp_path / "file", *FAST)
    assert code == 4
    assert "a file stands where a folder is needed" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_leaves_the_whole_record_and_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, err = call(
        capsys, monkeypatch, "run", "ex1", "--dataset", "digits", "--runs", tmp_path, "--seeds", 2, *FAST
    )
    assert (code, err) == (0, "")
    folders = [RunFolder(log.parent) for log in sorted(tmp_path.rglob("train.json"))]
    assert [folder.recipe().seed for folder in folders] == [0, 1]
    assert "digits seed 1  epoch 1/1" in out and "ex1 ×2" in out and "±" in out
    assert out.splitlines()[-1].startswith(f"page: {folders[1].path / 'report.html'} (and 1 more;")
    for folder in folders:
        names = {path.name for path in folder.path.iterdir()}
        expected = {
            "recipe.yaml", "environment.json", "train.json", "test.json", "best.pth", "loss.png", "accuracy.png",
            "confusion_matrix.png", "predictions.npz", "validation_predictions.npz", "examples.npz",
            "report.html",
        }  # fmt: skip
        assert expected <= names and any(name.startswith("events.out.tfevents") for name in names)
        assert str(folder.path) in out
        assert {
            "status", "started", "finished", "dataset", "classes", "parameters", "epochs", "best_epoch", "train_time",
            "best_val_accuracy", "overfitting_gap", "wall_time", "images_per_second", "peak_memory",
        } <= folder.train_log().keys()  # fmt: skip
        test_log = folder.test_log()
        assert test_log is not None and {
            "accuracy", "loss", "test_time", "precision_score", "recall_score", "f1_score", "auc_score", "ece", "tta",
            "auc_score_hard", "top5_accuracy", "per_class", "confusion_matrix", "test_looks", "total_time",
        } <= test_log.keys()  # fmt: skip
        saved = np.load(folder.path / "predictions.npz")
        assert (saved["logits"].argmax(1) == saved["labels"]).mean() == pytest.approx(test_log["accuracy"])
        environment = folder.environment()
        assert {"torch", "device", "threads", "git", "command", "data"} <= environment.keys()
        assert environment["command"].startswith("cifarlab run ex1 --dataset digits --runs ")
        assert environment["data"]["images"] == {"train": 1295, "validation": 143, "test": 359}
    splits = [folder.environment()["data"]["index_hashes"] for folder in folders]
    assert splits[0]["test"] == splits[1]["test"] and splits[0]["validation"] != splits[1]["validation"]

    code, out, _ = call(capsys, monkeypatch, "compare", tmp_path, "--format", "json")
    (row,) = json.loads(out)
    figures = [folder.test_log() or {} for folder in folders]
    assert row["n"] == 2 and row["accuracy"]["mean"] == pytest.approx(np.mean([f["accuracy"] for f in figures]))
    code, out, _ = call(capsys, monkeypatch, "compare", folders[0].path, "--format", "csv")
    (line,) = csv.DictReader(io.StringIO(out))
    assert float(line["accuracy"]) == figures[0]["accuracy"]

    code, out, err = call(capsys, monkeypatch, "test", folders[0].path)
    assert code == 0 and re.search(r"accuracy\W+" + f"{figures[0]['accuracy']:.4f}", out)
    again = folders[0].test_log()
    assert again is not None and again["test_looks"] == 2 and again["accuracy"] == figures[0]["accuracy"]


@pytest.mark.usefixtures("no_pictures")
def test_an_image_folder_trains_with_balanced_weights_and_is_refused_once_it_has_changed(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["run", "ex1", "--dataset", f"folder:{pictures}", "--runs", tmp_path / "runs", *FAST]
    code, _, _ = call(capsys, monkeypatch, *arguments, "--set", "loss.class_weights=balanced")
    assert code == 0
    folder = RunFolder(next((tmp_path / "runs").rglob("train.json")).parent)
    assert folder.path.parent.name == "folder-pictures"
    assert folder.train_log()["classes"] == 2
    (pictures / "dark" / "0.png").unlink()
    code, _, err = call(capsys, monkeypatch, "test", folder.path)
    assert code == 4 and "was trained on another version of" in err and err.count("\n") == 1
    test_log = folder.test_log()
    assert test_log is not None and test_log["test_looks"] == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_bad_image_is_named_and_skipped_only_by_choice(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (pictures / "dark" / "broken.png").write_bytes(b"not a picture")
    arguments = ["run", "ex1", "--dataset", f"folder:{pictures}", "--runs", tmp_path / "runs", *FAST]
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert code == 3 and "broken.png" in err and "data.bad_files=skip" in err and err.count("\n") == 1
    code, out, err = call(capsys, monkeypatch, *arguments, "--set", "data.bad_files=skip")
    assert code == 0 and "broken.png" in out
    info = ["data", "info", f"folder:{pictures}"]
    assert call(capsys, monkeypatch, *info)[0] == 3
    code, out, _ = call(capsys, monkeypatch, *info, "--set", "data.bad_files=skip", "--set", "train.resolution=24")
    assert code == 0 and "64 images of 24x24" in out


def test_show_gives_a_recipe_that_runs_again_and_the_layer_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifarlab.recipe import flatten, load_recipe, make_recipe, parse_yaml

    code, out, _ = call(capsys, monkeypatch, "show", "ex2", "--dataset", "cifar100", "--set", "train.epochs=7")
    assert code == 0
    text = out.partition("\nex2: 100 classes")[0]
    expected = load_recipe("ex2", ["train.epochs=7", "datasets=[cifar100]"])
    shown = parse_yaml(text, "shown")
    assert make_recipe(shown) == expected
    assert flatten(shown).keys() == flatten(expected.to_dict()).keys()  # what is left at its default as well
    assert "16,904,548" in out and "64 x 16 x 16" in out and "67.62 parameters" in out
    assert "356 MFLOP an image; 112 TFLOP for 7 epochs of 45,000 images" in out


def test_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab.recipe import recipe_names

    code, out, _ = call(capsys, monkeypatch, "recipes")
    assert code == 0 and all(name in out for name in recipe_names())


def test_data_info_says_what_is_there_and_downloads_nothing(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path / "empty"))
    code, out, _ = call(capsys, monkeypatch, "data", "info", "cifar10", "digits", f"folder:{pictures}")
    assert code == 0
    assert "cifar10: not in" in out and "1,797 images of 32x32" in out and "2 classes: dark, light" in out
    assert not (tmp_path / "empty").exists()


def test_data_check_finds_a_planted_twin_and_draws_it(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        for name in ("dark", "light"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
    for place, path in enumerate(sorted(pictures.rglob("*.png"))):
        path.rename(tmp_path / "set" / ("train" if place % 2 else "test") / path.parent.name / f"{place}.png")
    original = next((tmp_path / "set" / "train" / "light").iterdir())
    (tmp_path / "set" / "test" / "light" / "twin.png").write_bytes(original.read_bytes())
    sheet = tmp_path / "twins.png"
    code, out, _ = call(capsys, monkeypatch, "data", "check", f"folder:{tmp_path / 'set'}", "--pictures", sheet)
    assert code == 0
    assert re.search(r"exact: 1 of 33 test images stand in training too \(0 under another label\)", out)
    assert re.search(r"near: 1 test images .*\n    1\.000  test \d+ \(light\)  training \d+ \(light\)", out)
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pictures")
def test_test_time_augmentation_is_an_option_of_run_and_test(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["run", "ex1", "--dataset", "digits", "--runs", tmp_path, *FAST]
    code, out, _ = call(capsys, monkeypatch, *arguments, "--tta", "flip")
    assert code == 0 and "+ TTA: flip" in out
    folder = RunFolder(next(tmp_path.rglob("train.json")).parent)
    first = folder.test_log() or {}
    assert folder.recipe().evaluate.tta == "flip" and first["tta"]["mode"] == "flip"
    code, out, _ = call(capsys, monkeypatch, "test", folder.path, "--tta", "crops")
    again = folder.test_log() or {}
    assert code == 0 and again["tta"]["mode"] == "crops" and again["accuracy"] == first["accuracy"]
    assert re.search(rf"tta: accuracy\W+{again['tta']['accuracy']:.4f}", out)
    code, out, _ = call(capsys, monkeypatch, "test", folder.path, "--tta", "none")
    assert code == 0 and (folder.test_log() or {})["tta"] is None and "tta: " not in out
    code, _, err = call(capsys, monkeypatch, "test", folder.path, "--tta", "1")
    assert code == 2 and "from 2 to 1000" in err and (folder.test_log() or {})["test_looks"] == 3


def test_a_step_on_one_image_that_batchnorm_refuses_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["run", "ex1", "--dataset", "digits", "--runs", tmp_path, "--set", "data.limit=20"]
    network = ["--set", "model.name=efficientnet_lite0", "--set", "train.batch_size=4", "--set", "train.accumulate=4"]
    code, _, err = call(capsys, monkeypatch, *arguments, *network)
    assert code == 4 and err.count("\n") == 1
    assert "too little for the BatchNorm of 'efficientnet_lite0'" in err and "less train.accumulate" in err


def test_weights_are_asked_for_before_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither is there, and neither can be had: the sentence is about the weights, and their offline choice."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, _, err = call(capsys, monkeypatch, "run", "ex4", "--dataset", "cifar10")
    assert code == 3 and err.count("\n") == 1
    for part in ("efficientnet_v2_s", str(tmp_path / "weights"), "efficientnet_v2_s-dd5fe13b.pth", "cifarlab[offline]"):
        assert part in err


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_cleanly_and_says_where_the_run_is(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifarlab", "run", "ex1", "--dataset", "digits", "--runs", str(tmp_path)]
    command += ["--set", "data.limit=300", "--set", "train.epochs=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        logs = list(tmp_path.rglob("train.json"))
        if logs and json.loads(logs[0].read_text())["epochs"]:
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in out + err
    folder = RunFolder(logs[0].parent)
    assert f"stopped; the run so far is in {folder.path}; go on with: cifarlab resume {folder.path}\n" in err
    assert folder.train_log()["status"] == "stopped"
    assert len(folder.checkpoints()) >= 1 and folder.test_log() is None


def test_control_characters_from_outside_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", "folder:/nowhere/\x1b[31mred\x07")
    assert code == 3 and "\x1b" not in out + err and "\x07" not in out + err


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["only/a"], "has one class folder"),
        (["train/a", "train/b", "test/a", "test/c"], "the class folders differ"),
        ([], "has no class folders"),
    ],
)
def test_folders_that_are_no_dataset_are_refused_with_exit_code_3(
    folders: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / folder / "1.png")
    place = root / "only" if folders == ["only/a"] else root
    code, _, err = call(capsys, monkeypatch, "run", "ex1", "--dataset", f"folder:{place}", "--runs", tmp_path / "runs")
    assert code == 3 and sentence in err and err.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_loss_that_diverges_is_exit_code_4_and_what_finished_before_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cifarlab import experiment
    from cifarlab.errors import DivergedError
    from cifarlab.train import train

    def diverge(recipe: Any, *rest: Any, **settings: Any) -> None:
        if recipe.seed == 1:
            raise DivergedError("the loss became NaN")
        train(recipe, *rest, **settings)

    monkeypatch.setattr(experiment, "train", diverge)
    arguments = ["run", "ex1", "--dataset", "digits", "--runs", tmp_path, "--seeds", 3, *FAST]
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert (code, err) == (4, "cifarlab: the loss became NaN\n")
    assert re.search(r"^ *ex1 +\d+\.\d+% ", out, re.MULTILINE)
    statuses = {
        RunFolder(log.parent).recipe().seed: json.loads(log.read_text()) for log in tmp_path.rglob("train.json")
    }
    assert {seed: log["status"] for seed, log in statuses.items()} == {0: "finished", 1: "failed"}
    assert statuses[1]["error"] == "the loss became NaN"


@pytest.mark.skipif(os.name != "posix", reason="pipes as a shell makes them")
def test_a_reader_that_leaves_does_not_stop_a_run(tmp_path: Path) -> None:
    run = f"{sys.executable} -m cifarlab run ex1 --dataset digits --runs {tmp_path}"
    short = "--set train.epochs=1 --set data.limit=300"
    subprocess.run(f"{run} {short} | head -n 1", shell=True, check=True, timeout=120, stdout=subprocess.DEVNULL)
    (log,) = tmp_path.rglob("train.json")
    assert json.loads(log.read_text())["status"] == "finished"


def test_an_installed_wheel_has_the_recipes_and_its_types(tmp_path: Path) -> None:
    import zipfile

    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    sources = {path.relative_to(root / "src").as_posix() for path in (root / "src").rglob("*") if path.is_file()}
    expected = {name for name in sources if not name.endswith((".pyc", ".pyo"))}
    assert {"cifarlab/py.typed", "cifarlab/recipes/ex1.yaml", "cifarlab/__main__.py"} <= expected <= inside


@pytest.mark.skipif(
    not hasattr(os, "seteuid") or os.geteuid() != 0, reason="becomes another user, which root alone may"
)
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["data", "info", "cifar10", "--data"], 3),
        (["run", "ex1", "--dataset", "cifar10", "--data"], 3),
        (["compare"], 4),
        (["test"], 4),
        (["data", "info", "digits", "cifar100", "--data"], 3),
    ],
)
def test_a_folder_of_somebody_else_is_refused_in_one_sentence(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    call(capsys, monkeypatch, *arguments, tmp_path / "none")  # imports what the other user may not read
    os.seteuid(65534)
    try:
        ended, _, err = call(capsys, monkeypatch, *arguments, secret)
    finally:
        os.seteuid(0)
    assert ended == code and str(secret) in err and err.count("\n") == 1
    assert "permission denied" in err.lower()
