"""The comparison: what folds, figures that are the records', and forms that nothing in a record breaks."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cifarlab.cli.tables import print_comparison
from cifarlab.compare import COLUMNS, Figure, Row, compare, lines, to_csv, to_json, to_markdown
from cifarlab.errors import NotARunError
from cifarlab.recipe import flatten, load_recipe
from cifarlab.rundir import RunFolder, find_runs

HASH = "ab" * 32
HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "a|b",
    "a\\|b",
    "<script>alert(1)</script>",
    "&lt;",
    "[red]x[/red]",
    "[/]",
    "two\nlines",
    "cr\rlf\r\n",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "\x9b31m",
    "right\u202eleft",
    "\u2028",
    "\x00",
    'say "hi", please; now',
    "\udcff",
    "Größe 日本",
]


def make_run(
    place: Path,
    *overrides: str,
    recipe: str = "ex1",
    dataset: str = "cifar10",
    seed: int = 0,
    content_hash: str | None = HASH,
    train: dict[str, Any] | None = None,
    test: dict[str, Any] | None = None,
) -> RunFolder:
    """A finished run's folder. train, test: entries that differ from the usual ones; `test={}` leaves test.json out."""
    place.mkdir(parents=True)
    run = RunFolder(place)
    resolved = load_recipe(recipe, overrides).resolved(dataset=dataset, seed=seed)
    (place / "recipe.yaml").write_text(resolved.to_yaml())
    log: dict[str, Any] = {
        "status": "finished",
        "dataset": dataset,
        "classes": 10,
        "parameters": 545_098,
        "epochs": [{"epoch": 1, "val_loss": 1.5}, {"epoch": 2, "val_loss": 1.25}],
        "best_val_accuracy": 0.7,
        "overfitting_gap": 0.05,
        "train_time": 100.0,
        "flops": 79_200_000_000_000,
        "flops_per_second": 7.92e11,
    }
    run.write_train_log(log | (train or {}))
    if test is None or test:
        run.write_test_log({"accuracy": 0.72, "test_time": 1.5, **(test or {})})
    if content_hash is not None:
        run.write_environment({"data": {"content_hash": content_hash}})
    return run


# --- what folds -------------------------------------------------------------------------------------


def test_seeds_fold_into_the_mean_and_the_sample_standard_deviation(tmp_path: Path) -> None:
    accuracies, times, gaps = [0.71, 0.7234, 0.7301], [124.5, 99.0, 101.25], [0.02, -0.01, 0.005]
    runs = [
        make_run(
            tmp_path / str(seed),
            seed=seed,
            train={"train_time": times[seed], "overfitting_gap": gaps[seed]},
            test={"accuracy": accuracies[seed]},
        )
        for seed in range(3)
    ]
    (row,) = compare(runs)
    assert row.n == 3
    assert row.runs == tuple(str(run.path) for run in runs)
    for figure, values in ((row.accuracy, accuracies), (row.train_time, times), (row.overfitting_gap, gaps)):
        assert figure.mean == pytest.approx(np.mean(values), rel=1e-12)
        assert figure.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert row.test_time == Figure(1.5, 0.0)
    assert (row.dataset, row.experiment, row.changes, row.status) == ("cifar10", "ex1", "", "finished")
    assert (row.epochs, row.parameters) == (2, 545_098)
    assert lines(row) == [["ex1 ×3", "72.12 ± 1.02 %", "108 ± 14 s", "1.5 ± 0.0 s", "2", "545,098", "+0.50 ± 1.50"]]


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    (row,) = compare([make_run(tmp_path / "a")])
    assert row.accuracy == Figure(0.72, None)
    assert lines(row) == [["ex1", "72.00%", "100 s", "1.5 s", "2", "545,098", "+5.00"]]


def test_test_time_augmentation_has_a_line_of_its_own(tmp_path: Path) -> None:
    figures: list[dict[str, Any]] = [
        {"accuracy": 0.74, "tta": {"mode": "flip", "accuracy": 0.75, "test_time": 3.0}},
        {"accuracy": 0.72, "tta": {"mode": None, "accuracy": 0.72, "test_time": 1.5}},
    ]
    runs = [make_run(tmp_path / str(seed), seed=seed, test=test) for seed, test in enumerate(figures)]
    (row,) = compare(runs)
    assert row.tta == "flip, none"
    assert (row.tta_accuracy.mean, row.tta_accuracy.std) == pytest.approx((0.735, 0.0212132), rel=1e-6)
    assert (row.accuracy.mean, row.tta_test_time.mean) == pytest.approx((0.73, 2.25))
    assert lines(row)[0][0] == "ex1 ×2"
    assert lines(row)[1] == ["  + TTA: flip, none", "73.50 ± 2.12 %", "", "2.2 ± 1.1 s", "", "", ""]
    (without,) = compare([*runs[:1], make_run(tmp_path / "2", seed=2)])
    assert (without.tta, without.tta_accuracy, len(lines(without))) == (None, Figure(None, None), 1)


def test_a_seed_that_was_run_again_is_no_new_sample(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{seed}{again}", seed=seed) for again in "ab" for seed in (0, 1)]
    runs.append(make_run(tmp_path / "0c", seed=0))
    rows = compare(runs)
    assert sorted(Path(path).name for row in rows for path in row.runs) == ["0a", "0b", "0c", "1a", "1b"]
    assert [[Path(path).name for path in row.runs] for row in rows] == [["0a", "1a"], ["0b", "1b"], ["0c"]]
    assert {row.changes for row in rows} == {""}


def test_another_recipe_dataset_or_content_does_not_fold_and_is_named(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "plain", seed=0),
        make_run(tmp_path / "seed", seed=1),
        make_run(tmp_path / "epochs", "train.epochs=2", seed=2),
        make_run(tmp_path / "two", "train.epochs=2", "optimizer.lr=1e-5", seed=3),
        make_run(tmp_path / "content", seed=4, content_hash="cd" * 32),
        make_run(tmp_path / "dataset", dataset="cifar100", seed=5),
        make_run(tmp_path / "recipe", recipe="ex2", seed=6),
    ]
    rows = {Path(row.runs[0]).name: row for row in compare(runs)}
    assert {name: row.n for name, row in rows.items()} == {
        "plain": 2,
        "epochs": 1,
        "two": 1,
        "content": 1,
        "dataset": 1,
        "recipe": 1,
    }
    assert {name: row.changes for name, row in rows.items()} == {
        "plain": "optimizer.lr=0.001, train.epochs=50, content=abababab",
        "epochs": "optimizer.lr=0.001, train.epochs=2, content=abababab",
        "two": "optimizer.lr=1e-05, train.epochs=2, content=abababab",
        "content": "optimizer.lr=0.001, train.epochs=50, content=cdcdcdcd",
        "dataset": "",
        "recipe": "",
    }
    assert lines(rows["two"])[0][0] == "ex1 (optimizer.lr=1e-05, train.epochs=2, content=abababab)"


def test_fields_that_only_one_of_two_recipes_has_are_named_by_the_one_that_has_them(tmp_path: Path) -> None:
    adam = make_run(tmp_path / "adam", "train.checkpoint_every=null")
    sgd = make_run(tmp_path / "sgd", "optimizer.name=sgd", "optimizer.lr=0.001", "train.checkpoint_every.steps=7")
    changes = {row.runs[0]: row.changes for row in compare([adam, sgd])}
    own = {path: set(re.findall(r"[\w.]+(?==)", text)) for path, text in changes.items()}
    fields = {path: set(RunFolder(Path(path)).recipe_values()["optimizer"]) for path in own}
    only_adam = {f"optimizer.{name}" for name in fields[str(adam.path)] - fields[str(sgd.path)]}
    only_sgd = {f"optimizer.{name}" for name in fields[str(sgd.path)] - fields[str(adam.path)]}
    assert only_adam
    assert only_sgd
    assert own[str(adam.path)] == {"optimizer.name", "train.checkpoint_every"} | only_adam
    assert own[str(sgd.path)] == {"optimizer.name", "train.checkpoint_every.steps"} | only_sgd
    assert 'optimizer.name="sgd"' in changes[str(sgd.path)]
    assert "train.checkpoint_every.steps=7" in changes[str(sgd.path)]


def test_runs_of_an_unknown_content_fold_among_themselves_only(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"u{seed}", seed=seed, content_hash=None) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "known", seed=2))
    assert sorted(row.n for row in compare(runs)) == [1, 2]


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_a_run_that_is_not_finished_has_a_row_of_its_own_that_says_so(status: str, tmp_path: Path) -> None:
    unfinished = {"status": status, "best_val_accuracy": None, "overfitting_gap": None}
    runs = [make_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    runs += [make_run(tmp_path / f"u{seed}", seed=seed, train=unfinished, test={}) for seed in (2, 3)]
    rows = compare(runs)
    assert [(row.n, row.status) for row in rows] == [(2, "finished"), (1, status), (1, status)]
    assert lines(rows[1])[0][:2] == [f"ex1 [{status}]", "–"]


def test_a_finished_run_without_a_test_score_does_not_hide_the_scores_of_its_siblings(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "untested", seed=2, test={}))
    rows = compare(runs)
    assert [(row.n, row.accuracy) for row in rows] == [(2, Figure(0.72, 0.0)), (1, Figure(None, None))]


def test_what_is_missing_is_none_and_a_dash_never_zero(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "epochs": [],
        "best_val_accuracy": None,
        "overfitting_gap": None,
        "train_time": None,
        "parameters": None,
        "flops": None,
        "flops_per_second": None,
    }
    run = make_run(tmp_path / "a", train={"status": "failed", **nothing}, test={})
    log = run.train_log()
    del log["overfitting_gap"], log["parameters"]
    run.write_train_log(log)
    rows = compare([run])
    unknown = Figure(None, None)
    (row,) = rows
    assert row.accuracy == row.val_accuracy == row.train_time == row.test_time == row.overfitting_gap == unknown
    assert row.parameters is None
    assert lines(row) == [["ex1 [failed]", "–", "–", "–", "0", "–", "–"]]
    assert "0.0" not in to_csv(rows) + to_json(rows) + to_markdown(rows)
    (line,) = csv.DictReader(io.StringIO(to_csv(rows)))
    assert line["accuracy"] == line["accuracy_std"] == line["train_time"] == line["parameters"] == ""
    (value,) = json.loads(to_json(rows))
    assert value["accuracy"] == {"mean": None, "std": None}
    assert value["parameters"] is None


def test_a_mean_is_given_only_where_every_run_has_the_figure(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b", seed=1, train={"overfitting_gap": None})]
    (row,) = compare(runs)
    assert row.overfitting_gap == Figure(None, None)
    assert row.accuracy.mean == 0.72


def test_a_true_zero_is_a_figure(tmp_path: Path) -> None:
    (row,) = compare([make_run(tmp_path / "a", train={"overfitting_gap": 0.0}, test={"accuracy": 0.0})])
    assert lines(row)[0][1] == "0.00%"
    assert lines(row)[0][-1] == "+0.00"


def test_rows_are_sorted_whatever_the_order_of_the_folders(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "1", recipe="ex2", dataset="cifar100"),
        make_run(tmp_path / "2", recipe="ex2"),
        make_run(tmp_path / "3", "train.epochs=9"),
        make_run(tmp_path / "4", "train.epochs=10"),
    ]
    rows = compare(runs)
    names = [(row.dataset, row.experiment, row.changes) for row in rows]
    assert names == sorted(names)
    assert [row.dataset for row in rows] == ["cifar10", "cifar10", "cifar10", "cifar100"]
    assert compare(runs[::-1]) == rows


def test_many_runs_fold_without_being_validated_or_compared_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_run(tmp_path / "0")
    for number in range(1, 120):
        place = tmp_path / str(number)
        place.mkdir()
        for file in first.path.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        text = (first.path / "recipe.yaml").read_text()
        text = text.replace("seed: 0", f"seed: {number}").replace("epochs: 50", f"epochs: {number % 40}")
        (place / "recipe.yaml").write_text(text)
    calls = 0
    real = flatten

    def counted(values: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return real(values)

    monkeypatch.setattr("cifarlab.compare.flatten", counted)
    monkeypatch.setattr("cifarlab.rundir.make_recipe", lambda *args, **options: pytest.fail("validated"))
    rows = compare(find_runs([tmp_path]))
    assert sum(row.n for row in rows) == 120
    assert len(rows) == 41
    assert calls == 120


# --- damaged records --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("train.json", "{", "is damaged"),
        ("train.json", "[]", "is damaged: expected a JSON object"),
        ("train.json", '{"status": "finished", "dataset": "cifar10"}', "its records have no 'epochs'"),
        ("train.json", '{"dataset": "cifar10", "epochs": []}', "its records have no 'status'"),
        ("train.json", '{"status": "finished", "dataset": "a", "epochs": 3}', "'epochs' is not a list"),
        (
            "train.json",
            '{"status": "finished", "dataset": "a", "epochs": [], "train_time": "1"}',
            "'train_time' is not a number",
        ),
        (
            "train.json",
            '{"status": "finished", "dataset": "a", "epochs": [], "parameters": [1]}',
            "'parameters' is not a number",
        ),
        ("test.json", '{"accuracy": true}', "'accuracy' is not a number"),
        ("test.json", '{"accuracy": NaN}', "NaN is not JSON"),
        ("test.json", '{"accuracy": 1e999}', "'accuracy' is not a number"),
        ("test.json", '{"accuracy": 1' + "0" * 400 + "}", "'accuracy' is not a number"),
        ("environment.json", "", "is damaged"),
        ("test.json", '{"accuracy": 0.5, "tta": [1]}', "'tta' is not a mapping"),
        ("test.json", '{"accuracy": 0.5, "tta": {"mode": "flip", "accuracy": "x"}}', "'accuracy' is not a number"),
        ("recipe.yaml", "a: 1", "its records have no 'name'"),
        ("recipe.yaml", "name: [", "not valid YAML"),
        ("recipe.yaml", "{name: a, seed: 1, data: {limit: 2026-01-01}}", "date is not JSON serializable"),
        ("recipe.yaml", "{name: a, seed: 2026-01-01}", "date is not JSON serializable"),
    ],
)
def test_a_damaged_record_is_refused_in_a_sentence(file: str, text: str, sentence: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run.path / file).write_text(text)
    with pytest.raises(NotARunError, match=re.escape(sentence)) as caught:
        compare([run])
    assert str(run.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", '{"data": null}', '{"data": [1]}', '{"data": {}}'])
def test_an_environment_without_a_content_hash_is_no_obstacle(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run.path / "environment.json").write_text(text)
    assert compare([run])[0].n == 1


# --- forms ------------------------------------------------------------------------------------------


def markdown_cells(line: str) -> list[str]:
    """The cells of a table's line as GitHub's Markdown divides them: at every | that has no backslash before it."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    runs = [make_run(tmp_path / f"{s}", seed=s, test={"accuracy": 0.1 + 0.2 * s}) for s in (0, 1, 2)]
    with_tta = {"accuracy": 1 / 3, "tta": {"mode": "flip", "accuracy": 0.35, "test_time": 3.0}}
    runs.append(make_run(tmp_path / "my runs" / "b", dataset="cifar100", test=with_tta))
    runs.append(make_run(tmp_path / "u", train={"status": "failed", "best_val_accuracy": None}, test={}))
    return compare(runs)


def test_csv_reads_back_as_the_same_figures(rows: list[Row]) -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(read) == len(rows) == 3
    for line, row in zip(read, rows, strict=True):
        figures = ("accuracy", "val_accuracy", "train_time", "test_time", "overfitting_gap", "tta_accuracy")
        for name in (*figures, "flops", "flops_per_second"):
            figure = getattr(row, name)
            assert (float(line[name]) if line[name] else None) == figure.mean
            assert (float(line[f"{name}_std"]) if line[f"{name}_std"] else None) == figure.std
        assert (int(line["n"]), int(line["parameters"]), int(line["epochs"])) == (row.n, row.parameters, row.epochs)
        assert tuple(line["runs"].split(";")) == row.runs
        assert (line["dataset"], line["experiment"], line["status"]) == (row.dataset, row.experiment, row.status)
        assert line["tta"] == (row.tta or "")


def test_json_reads_back_as_the_same_rows(rows: list[Row]) -> None:
    for value, row in zip(json.loads(to_json(rows)), rows, strict=True):
        assert value == {**asdict(row), "runs": list(row.runs)}


def test_markdown_has_a_table_a_dataset_with_the_cells_of_its_rows(rows: list[Row]) -> None:
    blocks = to_markdown(rows).split("### ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["cifar10", "cifar100"]
    for block in blocks:
        name, empty, head, rule, *body = block.rstrip("\n").split("\n")
        assert empty == ""
        assert markdown_cells(head) == list(COLUMNS)
        assert all(re.fullmatch("-+:?", cell) for cell in markdown_cells(rule))
        expected = [list(map(str.strip, cells)) for row in rows if row.dataset == name for cells in lines(row)]
        assert [markdown_cells(line) for line in body if line] == expected


@pytest.fixture(params=HOSTILE, ids=ascii)
def hostile_rows(request: pytest.FixtureRequest, tmp_path: Path) -> list[Row]:
    """Rows of runs whose records hold a hostile text wherever they can hold one."""
    text = request.param
    run = make_run(tmp_path / "a", train={"status": text, "dataset": text})
    other = make_run(tmp_path / "b", train={"dataset": text})
    values = run.recipe_values()
    # JSON is YAML, and takes any text.
    for folder, change in ((run, {"name": text, text + " ": text, "data": text}), (other, {"name": text})):
        (folder.path / "recipe.yaml").write_text(json.dumps({**values, **change}))
    return compare([run, other])


def test_hostile_names_are_harmless_in_markdown(hostile_rows: list[Row]) -> None:
    text = to_markdown(hostile_rows)
    heading, empty, head, rule, *lines = text.rstrip("\n").split("\n")
    assert heading.startswith("### ")
    assert empty == ""
    assert len(lines) == 2
    for line in (head, rule, *lines):
        assert len(markdown_cells(line)) == len(COLUMNS)
        assert line.startswith("|")
    assert "<" not in text
    assert ">" not in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(text.splitlines()) == len(text.rstrip("\n").split("\n"))
    text.encode()


def test_hostile_names_are_harmless_in_csv(hostile_rows: list[Row]) -> None:
    text = to_csv(hostile_rows)
    lines = list(csv.reader(io.StringIO(text)))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines) == 3
    texts = [
        value for line in csv.DictReader(io.StringIO(text)) for key, value in line.items() if not key.endswith("gap")
    ]
    assert not [value for value in texts if value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")]
    assert all(character.isprintable() or character == "\n" for character in text)
    text.encode()


def test_hostile_names_are_harmless_in_json(hostile_rows: list[Row]) -> None:
    text = to_json(hostile_rows)
    assert json.loads(text) == [{**asdict(row), "runs": list(row.runs)} for row in hostile_rows]
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.isascii()


def test_hostile_names_are_harmless_on_the_terminal(hostile_rows: list[Row]) -> None:
    out = io.StringIO()
    print_comparison(Console(file=out, width=500, force_terminal=False), hostile_rows)
    text = out.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert hostile_rows[0].experiment.strip() in text  # brackets are text, not colours
    text.encode()


def test_a_run_folder_of_any_name_is_listed(tmp_path: Path) -> None:
    for name in ("=1", "two\nlines", "a b", "x;y"):
        run = make_run(tmp_path / name)
        rows = compare([run])
        assert rows[0].runs == (str(run.path),)
        assert json.loads(to_json(rows))[0]["runs"] == [str(run.path)]
        assert len(to_csv(rows).splitlines()) == 2


def test_comparing_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cifarlab import compare, rundir\n"
        "rows = compare.compare(rundir.find_runs([Path(sys.argv[1])]))\n"
        "print(compare.to_markdown(rows), compare.to_csv(rows), compare.to_json(rows))\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "72.00%" in done.stdout
