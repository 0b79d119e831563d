"""What the page is made of: figures that are the records', names that can't break out, runs that are damaged."""

from __future__ import annotations

import functools
import html.parser
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarlab import cli, examples, metrics
from cifarlab.build import make_task
from cifarlab.data.prepare import Part, Prepared, prepare
from cifarlab.errors import CifarlabError, NotARunError
from cifarlab.feed import make_batches
from cifarlab.pace import BySteps
from cifarlab.recipe import flatten, load_recipe, parse_yaml
from cifarlab.report import page
from cifarlab.report.data import PAGE, link, pareto, read_report, references, script_data
from cifarlab.report.facts import duration
from cifarlab.rundir import RunFolder
from cifarlab.study import StudyFolder
from command import call
from made_up_runs import HOSTILE, a_thousand, make_many, make_run, make_study
from short_runs import CPU, SMALL, make_dataset

NOW = datetime(2026, 11, 28, 15)


class Seen(html.parser.HTMLParser):
    """What a browser would find in a page: its tags with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def seen(*places: Path, folder: Path | None = None) -> Seen:
    return Seen(page.page(read_report(places), folder or places[0], NOW))


# --- figures ----------------------------------------------------------------------------------------


def test_a_page_says_what_the_records_say(tmp_path: Path) -> None:
    one = make_run(tmp_path / "ex1" / "cifar10" / "a", seed=3, accuracy=0.7, seconds=1119.4, epochs=5)
    make_run(tmp_path / "ex1" / "cifar10" / "b", "optimizer.lr=0.01", seed=4, epochs=5)
    found = seen(tmp_path)
    data, log, test = found.data, one.train_log(), one.test_log()
    assert test is not None
    assert data["runs"][0]["accuracy"] == test["accuracy"] and data["runs"][0]["time"] == 1119.4
    assert data["runs"][0]["label"] == "ex1 (optimizer.lr=0.001), seed 3"
    for text in (
        f"{test['accuracy']:.2%}",
        f"{log['best_val_accuracy']:.2%}",
        "18 min 39 s",
        "545,098",
        "e07991bf403d",
    ):
        assert text in found.text
    curves = data["details"]["0"]["curves"]
    assert curves["epoch"] == [1, 2, 3, 4, 5] and "ema_val_loss" not in curves
    assert curves["val_loss"] == pytest.approx([entry["val_loss"] for entry in log["epochs"]], rel=1e-4)


def test_confusions_come_back_from_their_sparse_form(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", classes=7, count=300)
    cells = seen(tmp_path).data["details"]["0"]["confusion"]
    matrix, place = np.zeros(49, int), 0
    for gap, count in zip(cells[::2], cells[1::2], strict=True):
        place += gap
        matrix[place] = count
    test = run.test_log()
    assert test is not None and matrix.reshape(7, 7).tolist() == test["confusion_matrix"]


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_the_bins_of_the_reliability_diagram_give_the_recorded_ece(count: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (count, classes))
    labels = generator.integers(0, classes, count)
    confidence = np.exp(metrics.log_softmax(logits)).max(axis=1, initial=0)
    bins = metrics.calibration(confidence, logits.argmax(axis=1) == labels)
    assert sum(one["count"] for one in bins) == count and len(bins) == metrics.ECE_BINS
    for one, low in zip(bins, np.arange(15) / 15, strict=True):
        assert (one["accuracy"] is None) == (one["count"] == 0)
        assert one["count"] == 0 or low - 1e-12 <= one["confidence"] <= low + 1 / 15 + 1e-12
    if count:
        ece = sum(one["count"] / count * abs((one["accuracy"] or 0) - (one["confidence"] or 0)) for one in bins)
        assert ece == pytest.approx(metrics.scores(logits, labels)["ece"], abs=1e-12)


def test_accuracy_without_the_test_images_that_stand_in_training_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", count=50)
    environment = run.environment()
    with np.load(run.path / "predictions.npz") as arrays:
        right = arrays["logits"].argmax(1) == arrays["labels"]
    twins = np.flatnonzero(right)[:10].tolist()
    environment["data"]["leaks"]["test_twins_in_train"] = twins
    (run.path / "environment.json").write_text(json.dumps(environment))
    found = seen(tmp_path)
    expected = (right.sum() - 10) / 40
    assert found.data["details"]["0"]["without_twins"] == {"accuracy": expected, "images": 40, "left_out": 10}
    assert f"{expected:.2%} of 40 images; 10 left out" in found.text


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_the_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = pareto(points)
    assert sorted(front) == [i for i, b in enumerate(points) if not any(beats(a, b) for a in points)]
    assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)


def test_only_finished_runs_of_one_dataset_make_a_front(tmp_path: Path) -> None:
    make_run(tmp_path / "a", accuracy=0.6, seconds=10, pictures=False)
    make_run(tmp_path / "b", accuracy=0.9, seconds=5, status="stopped", pictures=False)
    make_run(tmp_path / "c", accuracy=0.95, seconds=1, dataset="cifar100", pictures=False)
    assert {name: front["accuracy"] for name, front in seen(tmp_path).data["fronts"].items()} == {
        "cifar10": [0],
        "cifar100": [2],
    }


def test_recipes_differ_where_their_fields_do(tmp_path: Path) -> None:
    changes: list[list[str]] = [["optimizer.name=sgd"], [], ["train.epochs=7", "augment.flip=random"]]
    runs = [make_run(tmp_path / str(i), *change, seed=i, pictures=False) for i, change in enumerate(changes)]
    recipes = seen(tmp_path).data["recipes"]
    for number, run in enumerate(runs):
        values = list(recipes["common"])
        for place, value in recipes["others"][str(number)]:
            values[place] = value
        fields = dict(zip(recipes["fields"], values, strict=True))
        own = {name: json.loads(fields[name]) for name in fields if name not in ("content", "machine") and fields[name]}
        assert own == flatten(run.recipe_values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (99.96, "1 min 40 s"), (3599.4, "59 min 59 s"), (3600, "1 h 00 min"),
     (5846, "1 h 37 min"), (-1, ""), (None, ""), ("5", ""), (float("nan"), ""), (True, "")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds: Any, text: str) -> None:
    assert duration(seconds) == text


def test_reference_experiments() -> None:
    datasets = references()["datasets"]
    assert {name: len(found) for name, found in datasets.items()} == {"cifar10": 7, "cifar100": 7}
    assert datasets["cifar10"][5] == {"name": "EX-4", "accuracy": 0.9624, "seconds": 2906}
    assert datasets["cifar100"][0] == {"name": "EX-1", "accuracy": 0.3465, "seconds": 127}


# --- pictures ---------------------------------------------------------------------------------------


def of_recipe(*overrides: str, seed: int = 0) -> tuple[Any, Prepared]:
    recipe = load_recipe("ex1", [*SMALL, *overrides]).resolved(dataset="digits", seed=seed)
    return recipe, prepare(make_dataset(), recipe.data, seed)


def test_the_most_wrong_and_the_least_sure(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(0, 4, (200, 5)), generator.integers(0, 5, 200)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = [-np.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    margins = [sorted(row)[-1] - sorted(row)[-2] for row in probabilities]
    assert examples.most_wrong(logits, labels).tolist() == sorted(range(200), key=lambda i: -losses[i])[:24]
    assert examples.least_sure(logits).tolist() == sorted(range(200), key=lambda i: margins[i])[:24]
    assert len(examples.least_sure(np.zeros((3, 1)))) == 3


def test_pictures_are_those_of_the_test_set_as_stored() -> None:
    recipe, prepared = of_recipe()
    logits = np.random.default_rng(0).normal(0, 1, (50, 4))
    arrays = examples.of_run(recipe, prepared, logits, prepared.test.labels, prepared.mean, prepared.std)
    for name in ("most_wrong", "least_sure"):
        index = arrays[f"{name}_index"]
        assert (arrays[name] == prepared.test.images.pixels[index]).all()
        assert (arrays[f"{name}_labels"] == prepared.test.images.labels[index]).all()


@pytest.mark.parametrize(
    "overrides",
    [["augment={flip: random, crop_padding: 4, cutout: 8}"], ["augment={policy: rand_augment}"],
     ["train.resolution=48", "augment.translate=3"]],
)  # fmt: skip
def test_augmented_pictures_are_what_training_sees_first(overrides: list[str]) -> None:
    recipe, prepared = of_recipe(*overrides, seed=5)
    task = make_task(recipe, prepared, CPU, None, lambda _: None)
    first = next(make_batches(recipe, task, 0, BySteps(100)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    seen = ((first.inputs[:24] * std + mean) * 255).round().clamp(0, 255).byte().numpy()
    arrays = examples.of_run(recipe, prepared, np.eye(50, 4), prepared.test.labels, prepared.mean, prepared.std)
    assert np.abs(arrays["augmented"].astype(int) - seen).max() <= 1  # batches of another size may round differently
    assert (arrays["augmented_labels"] == first.labels[:24].numpy()).all()


def test_large_pictures_are_shrunk_and_keep_their_shape() -> None:
    recipe, prepared = of_recipe("train.resolution=96", "data.memory=1")
    images = np.zeros((2, 3, 100, 200), np.uint8)
    images[:, 0, :, 100:] = 240
    part = Part(type(prepared.test.images)(images, np.zeros(2, np.int64)), np.arange(2))
    small = examples._small(examples._stored(part, np.arange(2)))
    assert small.shape == (2, 3, 32, 64) and small[0, 0, 5, 10] == 0 and small[0, 0, 5, 50] == 240
    arrays = examples.of_run(recipe, prepared, np.eye(50, 4), prepared.test.labels, prepared.mean, prepared.std)
    assert arrays["augmented"].shape == (24, 3, 64, 64)


def test_the_same_arrays_are_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    arrays = run.read_arrays("examples.npz")
    for name in ("one.npz", "two.npz"):
        run.write_arrays(name, arrays)
    assert (run.path / "one.npz").read_bytes() == (run.path / "two.npz").read_bytes()
    for name, array in run.read_arrays("one.npz").items():
        assert (array == arrays[name]).all() and array.dtype == arrays[name].dtype


def npz(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def npy(array: Any, **replaced: str) -> bytes:
    """What numpy's `save` writes of an array, with other words in its header of the same length."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    content = file.getvalue()
    for old, new in replaced.items():
        assert len(old) == len(new) and old.encode() in content
        content = content.replace(old.encode(), new.encode(), 1)
    return content


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a zip file",
        npz(("logits.npy", npy(np.zeros((1111, 2)), **{"1111": "9999"}))),
        npz(("logits.npy", npy(np.zeros((1, 2)))[:-3])),
        npz(("logits.npy", npy(np.array([{}], object)))),
        npz(("logits.npy", npy(np.zeros((3, 2), order="F")))),
        npz(("logits.npy", b"\x93NUMPY\x03\x00 what")),
        npz(("logits.npy", b"")), npz(("logits.npy", npy(np.array(["text"])))),
        npz(("logits.npy", npy(np.zeros(2))))[:60],
    ],
    ids=["empty", "not zipped", "few", "cut off", "objects", "order", "no header", "no array", "text", "cut zip"],
)  # fmt: skip
def test_arrays_of_any_kind_are_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", pictures=False)
    (run.path / "predictions.npz").write_bytes(content)
    with pytest.raises(NotARunError, match="is damaged"):
        run.read_arrays("predictions.npz")
    assert "predictions.npz is damaged" in seen(tmp_path).text


def test_arrays_that_unpack_to_any_size_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.plain.MAX_ARRAY_BYTES", 100_000)
    run = make_run(tmp_path / "a", pictures=False)
    (run.path / "predictions.npz").write_bytes(npz(("logits.npy", npy(np.zeros(50_000)))))
    with pytest.raises(NotARunError, match="claim more than 100,000 bytes"):
        run.read_arrays("predictions.npz")


# --- what is damaged, unfinished, hostile -----------------------------------------------------------


def damage(name: str, content: str | None) -> Callable[[RunFolder], None]:
    def do(run: RunFolder) -> None:
        if content is None:
            (run.path / name).unlink()
        else:
            (run.path / name).write_text(content)

    return do


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.json", "{", "train.json is damaged"),
        ("train.json", '{"status": "running", "dataset": "cifar10", "epochs": []}', "running"),
        ("train.json", '{"status": ["x"], "dataset": {}, "epochs": [1, null, {"epoch": "x"}]}', "['x']"),
        ("test.json", None, "finished"),
        ("test.json", '{"accuracy": "much"}', "'accuracy' is not a number"),
        ("test.json", '{"accuracy": 0.5, "confusion_matrix": [[1, 2], [3]], "classes": 5, "tta": null}', "50.00%"),
        ("test.json", '{"accuracy": 0.5, "confusion_matrix": [[1, -2], ["x", 4]], "classes": [1, 2]}', "50.00%"),
        ("environment.json", None, "finished"),
        ("environment.json", '{"data": {"leaks": {"test_twins_in_train": [-1, "x"]}, "images": 3}}', "finished"),
        ("recipe.yaml", "- a list", "recipe.yaml is damaged"),
        ("recipe.yaml", "name: 2026-01-01\nseed: 2026-01-01", "recipe.yaml is damaged"),
        ("examples.npz", "", "examples.npz is damaged"),
        ("predictions.npz", None, "finished"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_there_with_what_it_has(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    make_run(tmp_path / "whole", count=60, epochs=2)
    other = make_run(tmp_path / "other", count=60, epochs=2)
    damage(name, content)(other)
    found = seen(tmp_path)
    assert len(found.data["runs"]) == 2 and said in found.text
    assert "whole" in found.text and found.data["details"]["1"]["confusion"]


def test_arrays_that_do_not_fit_each_other_are_said(tmp_path: Path) -> None:
    logits, labels = np.zeros((4, 3), np.float32), np.arange(4)
    wrong: list[dict[str, Any]] = [
        {"logits": logits, "labels": labels},
        {"logits": logits, "labels": labels, "index": labels},  # label 3 is no class
        {"logits": logits * np.nan, "labels": labels % 3, "index": labels},
        {"logits": logits, "labels": labels[:3] % 3, "index": labels},
        {"logits": labels, "labels": labels % 3, "index": labels},
    ]
    for number, arrays in enumerate(wrong):
        make_run(tmp_path / str(number), pictures=False).write_arrays("predictions.npz", arrays)
    found = read_report([tmp_path])
    assert len([sentence for sentence in found.problems if "predictions.npz is damaged" in sentence]) == len(wrong)
    pictures = make_run(tmp_path / "pictures")
    arrays = pictures.read_arrays("examples.npz")
    pictures.write_arrays("examples.npz", arrays | {"most_wrong": np.zeros((24, 3, 9999, 1), np.uint8)})
    assert any("examples.npz is damaged" in sentence for sentence in read_report([pictures.path]).problems)


def test_nothing_in_a_record_or_a_path_breaks_out(tmp_path: Path) -> None:
    place = tmp_path / "<img src=x onerror=alert(1)>&\x1b[31m"
    names = [HOSTILE, "</style><b>", "\x00\x9b31m", '" onload="alert(1)']
    for number in range(2):
        run = make_run(
            place / f"javascript:alert({number})", f"name={'x'}", classes=names, count=80, epochs=2, seed=number
        )
        record = {"status": HOSTILE, "dataset": HOSTILE, "error": HOSTILE, "started": HOSTILE}
        (run.path / "train.json").write_text(json.dumps(run.train_log() | record))
        (run.path / "recipe.yaml").write_text(
            f"name: {json.dumps(HOSTILE[:-1])}\nseed: {number}\nmodel: {{'<b>': '</script>'}}"
        )
        (run.path / "environment.json").write_text(json.dumps(run.environment() | {"cpu": HOSTILE, "command": HOSTILE}))
        (run.path / PAGE).write_text("its own")
    arms = [{"id": "a", "name": HOSTILE, "changes": {HOSTILE: HOSTILE}}]
    text = json.dumps({"name": HOSTILE, "arms": arms, "command": HOSTILE, "created": HOSTILE}).replace("\\ud800", "")
    make_study(place / "study", design="search", changes=json.loads(text))
    report = read_report([place])
    report.problems.append(HOSTILE)
    written = page.page(report, tmp_path, NOW)
    written.encode()
    found = Seen(written)
    assert len(report.studies) == 1
    assert [tag for tag, _ in found.tags].count("script") == 2 == written.count("</script")
    assert "b" not in {tag for tag, _ in found.tags} and "img" not in {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes
        if tag == "a":
            assert re.match(r"#[a-z]+(-\d+)?$|\./[\w%./-]+/report\.html$", attributes["href"] or ""), attributes
    assert "\x1b" not in written and "\x9b" not in written
    assert found.data["details"]["0"]["classes"][1] == "</style><b>"  # the script sets it as text
    assert "</script><script>alert(1)" in found.text


def test_links_are_relative_and_nothing_but_paths(tmp_path: Path) -> None:
    assert link(tmp_path / "javascript:x" / "report.html", tmp_path) == "./javascript%3Ax/report.html"
    assert link(tmp_path / "a b%20" / "ü?#.html", tmp_path / "out") == "./../a%20b%2520/%C3%BC%3F%23.html"


def test_the_policy_allows_this_script_and_this_style_alone(tmp_path: Path) -> None:
    import base64
    import hashlib

    make_run(tmp_path / "a", pictures=False)
    text = page.page(read_report([tmp_path]), tmp_path, NOW)
    (policy,) = [
        tag["content"] or "" for name, tag in Seen(text).tags if tag.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy.replace("http-equiv", "")
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        inside = text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


# --- many -------------------------------------------------------------------------------------------


def test_of_many_runs_the_most_accurate_have_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.rundir.parse_yaml", functools.cache(parse_yaml))  # 13 ms each, else
    make_many(tmp_path, 80)
    report = read_report([tmp_path])
    assert len(report.runs) == sum(row.n for row in report.rows) == 80
    accuracies = sorted((run.accuracy or 0 for run in report.runs), reverse=True)
    assert sorted((run.accuracy or 0 for run in report.runs if run.detail), reverse=True) == accuracies[:60]


def test_a_page_of_a_thousand_runs(tmp_path: Path) -> None:
    text = page.page(a_thousand(tmp_path), tmp_path, NOW)
    found = Seen(text)
    assert len(text) < 2_000_000
    assert [tag for tag, _ in found.tags].count("tr") == 1000 + 1 + len(read_report([tmp_path]).rows) + 1
    assert len(found.data["details"]) == 60 and "The 60 most accurate runs have a section" in found.text


def test_ten_runs_with_pictures_are_less_than_two_megabytes(tmp_path: Path) -> None:
    first = make_run(tmp_path / "0", classes=100, dataset="cifar100", epochs=100, count=500, side=64)
    for number in range(1, 10):
        shutil.copytree(first.path, tmp_path / str(number))
    text = page.page(read_report([tmp_path]), tmp_path, NOW)
    assert all(len(detail["pictures"]) == 3 for detail in Seen(text).data["details"].values())
    assert len(text) < 2_000_000


def test_pictures_beyond_the_first_are_on_the_runs_own_pages(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / str(number), accuracy=0.5 + number / 10, count=200)
    (tmp_path / "0" / PAGE).write_text("its own")
    report = read_report([tmp_path], detailed=2, pictured=1)
    assert [run.detail is not None and run.detail["pictures"] is not None for run in report.runs] == [
        False,
        False,
        True,
    ]
    assert [run.detail is not None for run in report.runs] == [False, True, True]
    written = page.page(report, tmp_path, NOW)
    assert '<a href="./0/report.html">' in written and '<a href="#run-1">' in written


# --- studies ----------------------------------------------------------------------------------------


def test_a_study_is_on_the_page_with_its_verdicts(tmp_path: Path) -> None:
    path = make_study(tmp_path / "study", arms=4)
    found = seen(tmp_path)
    results = json.loads(path.read_text())["results"]
    for result in results[1:]:
        low, high = (f"{100 * result[end]:+.2f}".replace("-", "−") for end in ("low", "high"))
        assert f"[{low}, {high}]" in found.text and result["verdict"] in found.text
    assert [arm["difference"] for arm in found.data["studies"][0]["arms"]] == [one["difference"] for one in results]
    assert "what augmentation is worth" in found.text and "to resolve 0.2 points" in found.text


def test_runs_of_a_study_are_called_by_their_arms(tmp_path: Path) -> None:
    make_study(tmp_path / "study", arms=2)
    fields = ("schedule.name=cosine", "augment.flip=random", "augment.crop_padding=4")
    make_run(tmp_path / "study" / "runs" / "00-baseline" / "0" / "x", count=10, epochs=2, pictures=False)
    for seed in range(2):
        place = tmp_path / "study" / "runs" / "01-arm" / str(seed) / "x"
        make_run(place, *fields, seed=seed, count=10, epochs=2, pictures=False)
    make_run(tmp_path / "another", *fields, seed=5, count=10, epochs=2, pictures=False)
    report = read_report([tmp_path])
    arm = report.studies[0][1].arms[1].name
    assert arm.startswith("optimizer.lr=")
    labels = [run.label for run in report.runs]
    assert labels[1:] == ["baseline, seed 0", f"{arm}, seed 0", f"{arm}, seed 1"]
    assert labels[0].startswith("ex1 (augment.flip=") and labels[0].endswith("), seed 5")
    assert [run["name"] for run in script_data(report, tmp_path)["runs"]] == ["ex1", "baseline", arm, arm]
    rows = {row.n: row.changes for row in report.rows}
    assert rows[1] == "baseline" and rows[3].startswith("augment.flip=")  # the same recipe, in no arm, is among them
    make_study(tmp_path / "later", arms=2, changes={"name": "another"})
    assert read_report([tmp_path]).runs[1].label == "what augmentation is worth: baseline, seed 0"


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "damaged"), ("[]", "damaged"), ('{"format": 1}', "damaged: name"), ("\udcff", "damaged")],
)
def test_a_damaged_study_is_a_sentence(content: str, said: str, tmp_path: Path) -> None:
    path = make_study(tmp_path / "study")
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(NotARunError, match=rf"study\.json is {said}"):
        StudyFolder(path.parent).read()
    assert said in seen(tmp_path).text


def test_a_study_of_a_later_format_or_with_wrong_figures_is_a_sentence(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"format": 2}, {"resolve": "much"}, {"arms": [{"id": 1}]}, {"runs": [{"arm": "x"}]},
        {"results": [{"arm": "x", "p": "x"}]},
    ]  # fmt: skip
    for number, changes in enumerate(wrong):
        with pytest.raises(NotARunError, match=r"study\.json is damaged: \w+"):
            StudyFolder(make_study(tmp_path / str(number), changes=changes).parent).read()


# --- commands ---------------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs" / "a", count=60)
    make_study(tmp_path / "runs" / "study")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, monkeypatch, "report")
    assert (code, err) == (0, "") and re.fullmatch(r"report\.html: 1 run, 1 study, 0\.\d MB\n", out)
    assert Seen((tmp_path / "report.html").read_text()).data["runs"][0]["name"] == "ex1"
    for arguments, said in (
        (["nowhere"], "nowhere does not exist"),
        (["--out", "gone/x.html"], "cannot write gone/x.html"),
    ):
        code, out, err = call(capsys, monkeypatch, "report", *arguments)
        assert (code, out) == (4, "") and said in err and err.count("\n") == 1


def test_a_page_that_cannot_be_drawn_is_a_sentence_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a", count=60)
    assert cli._page(run) == [run.path / "report.html"]
    monkeypatch.setattr(page, "page", lambda *_: 1 // 0)
    with pytest.raises(CifarlabError, match=r"cannot draw .*ZeroDivisionError"):
        page.write_run_page(run)
    assert cli._page(run) == [] and capsys.readouterr().out.startswith("no page: cannot draw ")
    shutil.rmtree(run.path)
    assert cli._page(run) == [] and "no page: " in capsys.readouterr().out


def test_a_runs_own_page_is_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", count=1000, epochs=50)
    assert page.write_run_page(run).stat().st_size < 250_000
    assert script_data(read_report([run.path]), run.path)["runs"][0]["page"] == "./report.html"
