"""`cifarlab bench`: what is compared, that a contender's failure is told and ends nothing, and the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cifarlab.bench import measure as measuring
from cifarlab.bench.contenders import Job, _Clock, available, make
from cifarlab.bench.measure import Pair, measure
from cifarlab.recipe import load_recipe
from command import call

OVERRIDES = [
    "train.batch_size=32", "train.numerics=exact", "train.checkpoint_every=null", "evaluate.test=false",
    "evaluate.batch_size=500",
]  # fmt: skip


def job() -> Job:
    return Job(load_recipe("ex1", OVERRIDES).resolved(dataset="digits", seed=0).to_yaml(), None, "cpu", 32)


def test_a_clock_counts_the_steps_after_the_first_ones_and_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cifarlab.bench.contenders.time.perf_counter", lambda: now[0])
    clock = _Clock((2, 4), lambda: None)
    ends = []
    for seconds in (9.0, 9.0, 0.5, 0.5, 0.25, 0.75):
        now[0] += seconds
        ends.append(clock.tick())
    assert ends == [False] * 5 + [True]
    assert clock.time() == pytest.approx(2.0)


def test_a_round_is_made_about_as_long_as_it_should_be() -> None:
    def one_round(steps: tuple[int, int]) -> float:
        return 0.02 * steps[1]

    warm, timed = measuring._steps(one_round, 3.0)
    assert 0.6 * 3.0 < 0.02 * timed < 3.0
    assert warm == timed // 3

    def slow(steps: tuple[int, int]) -> float:
        return 20.0 * steps[1]

    assert measuring._steps(slow, 3.0) == (1, measuring.STEPS_AT_LEAST)


def test_ratios_are_of_medians() -> None:
    pair = Pair("standard 0", ours=(100.0, 300.0, 200.0), theirs=(50.0, 40.0, 1000.0))
    assert pair.ratio == pytest.approx(200 / 50)
    assert Pair("fastai", failed="no").ratio is None


def test_every_contender_steps_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the ceiling, the standard loop and ours all give a rate, with as many images as they should."""
    monkeypatch.setattr("cifarlab.machine.prepare", dict)
    for name in ("ours", "ceiling", "standard 0"):
        seconds = make(name, job())((1, 3))
        assert 0 < seconds < 60, name


@pytest.mark.parametrize(
    ("name", "without"), [("ours", []), ("ceiling", []), ("ceiling without huge_pages", ["huge_pages"])]
)
def test_a_process_is_made_ready_without_what_its_contender_names(
    name: str, without: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("cifarlab.machine.prepare", lambda **given: asked.append(given))
    make(name, job())
    assert asked == [{"without": without}]


def test_what_the_others_stand_beside_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Contender:
        failed = None

        def __init__(self, name: str, job: Job) -> None:
            self.name = name

        def __enter__(self) -> Contender:
            return self

        def __exit__(self, *_: object) -> None: ...

        def round(self) -> float:
            order.append(self.name)
            return 2.0 if self.name == "ceiling" else 1.0

    monkeypatch.setattr(measuring, "_Contender", Contender)
    (pair,) = measure(["ceiling without huge_pages"], job(), 2, lambda _: None, beside="ceiling")
    assert pair == Pair("ceiling without huge_pages", (2.0, 2.0), (1.0, 1.0))
    assert order == ["ceiling without huge_pages", "ceiling", "ceiling", "ceiling without huge_pages"]


def test_a_contender_that_fails_is_told_and_the_others_go_on() -> None:
    pairs = measure(["standard x", "ceiling"], job(), 1, lambda _: None)
    assert [pair.contender for pair in pairs] == ["standard x", "ceiling"]
    assert pairs[0].failed is not None and "invalid literal" in pairs[0].failed and pairs[0].ratio is None
    assert pairs[1].failed is None and len(pairs[1].ours) == len(pairs[1].theirs) == 1


def test_the_command_prints_the_pairs_and_writes_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(contenders: Any, job: Job, rounds: int, progress: Any) -> list[Pair]:
        asked.append((list(contenders), rounds))
        return [Pair("ceiling", (99.0, 97.0, 98.0), (100.0, 100.0, 101.0)), Pair("fastai", failed="it broke")]

    monkeypatch.setattr(measuring, "measure", measured)
    file = tmp_path / "bench.json"
    command = ["bench", "ex1", "--dataset", "digits", "--against", "ceiling", "--rounds", "3", "--json", file]
    code, out, _ = call(capsys, monkeypatch, *command)
    assert code == 0 and asked == [(["ceiling"], 3)]
    assert "98.0%" in out and "failed: it broke" in out
    record = json.loads(file.read_text())
    assert record["pairs"][0] == {
        "contender": "ceiling",
        "ours": [99, 97, 98],
        "theirs": [100, 100, 101],
        "failed": None,
    }
    assert record["recipe"]["name"] == "ex1" and record["machine"]["device"] == "cpu"
    assert record["recipe"]["data"]["limit"] == 1408  # 11 whole batches of 128


def test_a_batch_of_more_than_all_images_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "ex1", "--dataset", "digits", "--set", "train.batch_size=5000"]
    code, _, err = call(capsys, monkeypatch, *command)
    assert code == 2 and "are no whole batch of 5000; --set train.batch_size=" in err and err.count("\n") == 1


def test_an_unknown_contender_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, monkeypatch, "bench", "ex1", "--against", "keras")
    assert code == 2 and "--against keras" in err and "cifarlab[bench]" in err
    assert {"ours", "ceiling", "standard 0", "standard 2", "standard 4"} <= set(available())
