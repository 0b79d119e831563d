"""`cifarlab bench --machine`: operations are counted as by hand, what can't be measured says why, all of it is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarlab import machine, numerics
from cifarlab.bench import hardware
from cifarlab.bench.contenders import Job
from cifarlab.bench.hardware import Convolution, Speed
from cifarlab.bench.measure import Pair
from cifarlab.errors import RunError
from cifarlab.recipe_sections import NumericsChoice
from command import call

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hardware, "SIDE", 32)
    monkeypatch.setattr(hardware, "DENSE", (Convolution(4, 6, 2), Convolution(8, 4, 2)))
    monkeypatch.setattr(hardware, "DEPTHWISE", Convolution(4, 6, 2, depthwise=True))
    monkeypatch.setattr(hardware, "COPIED", 10_000)
    monkeypatch.setattr(hardware, "SECONDS", 0.001)
    yield
    torch.use_deterministic_algorithms(False)


def settings(*present: str) -> Callable[..., dict[str, bool]]:
    return lambda **_: {name: name in present for name in machine.SETTINGS}


# --- what the hardware can do -----------------------------------------------------------------------


def test_the_operations_of_a_convolution_are_those_counted_by_hand() -> None:
    # Each output pixel of each of 64 channels is 9 x 64 products and as many sums; three times, with both gradients.
    assert Convolution(64, 32, 128).flops == 3 * 128 * 32 * 32 * 64 * (9 * 64 * 2)
    assert Convolution(144, 32, 128, depthwise=True).flops == 3 * 128 * 32 * 32 * 144 * (9 * 2)


def test_what_is_timed_is_the_convolution_and_both_its_gradients(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        results.append(run())
        return 2.0

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(numerics, "impossible", lambda *_: None)
    found = list(hardware.speeds(CPU, lambda _: None))
    assert [(speed.numbers, speed.rate) for speed in found[:2]] == [
        ("fp32", 32**3),
        ("fp32", 3 * 6 * 6 * 4 * 9 * 4 * 2),
    ]
    for start, dtype in ((0, torch.float32), (4, torch.bfloat16)):
        product, dense, _, depthwise = results[start : start + 4]
        assert product.dtype == dtype and product.shape == (32, 32)
        for (of_images, of_weight), inputs in ((dense, 4), (depthwise, 1)):
            assert of_images.shape == (2, 4, 6, 6) and of_weight.shape == (4, inputs, 3, 3)
            assert of_images.dtype == of_weight.dtype == dtype
            assert of_images.is_contiguous(memory_format=torch.channels_last)
    assert len(found) == len(results) == 8


def test_numbers_that_a_cpu_only_emulates_are_left_out_and_never_computed(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    timed: list[Any] = []

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        timed.append(run)
        return 1.0

    monkeypatch.setattr(hardware, "_seconds", seconds)
    found = list(hardware.speeds(CPU, lambda _: None))
    assert [(speed.numbers, speed.rate is None) for speed in found] == [("fp32", False)] * 4 + [("bf16", True)] * 4
    assert len(timed) == 4
    assert {speed.left_out for speed in found[4:]} == {
        "this CPU only emulates bfloat16, which can be 25 times slower than float32"
    }
    with pytest.raises(RunError, match=r"in bfloat16, .*: this CPU only emulates bfloat16"):
        hardware.convolution_ceiling(CPU, NumericsChoice(dtype="bfloat16"))


def test_what_fails_says_why_and_the_others_go_on(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        if isinstance(run(), tuple):
            raise RuntimeError("no\n  memory")
        return 1.0

    monkeypatch.setattr(hardware, "_seconds", seconds)
    found = list(hardware.speeds(CPU, lambda _: None))[:4]
    assert [speed.left_out for speed in found] == [None, *["no memory"] * 3]


def test_the_ceiling_of_convolutions_is_the_best_dense_one_in_those_numbers(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([4.0, 1.0])
    monkeypatch.setattr(hardware, "_seconds", lambda run, _: next(times))
    assert hardware.convolution_ceiling(CPU, NumericsChoice(compile=True)) == Convolution(8, 4, 2).flops / 1.0


def test_a_gpu_is_asked_for_its_own_kinds_of_numbers() -> None:
    found = hardware.ways(torch.device("cuda"))
    assert set(found) == {"fp32", "tf32", "bf16", "fp16"}
    assert found["tf32"] == NumericsChoice(tf32=True, channels_last=True, benchmark=True)
    assert not found["fp32"].tf32
    assert set(hardware.ways(torch.device("mps"))) == {"fp32"}
    assert not hardware.ways(torch.device("mps"))["fp32"].channels_last


def test_a_copy_counts_what_is_read_and_what_is_written(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_seconds", lambda *_: 4.0)
    assert hardware.bandwidth(CPU) == 2 * 10_000 / 4.0
    monkeypatch.setattr(machine, "free_memory", lambda _: 4_000)
    assert hardware.bandwidth(CPU) == 2 * 500 / 4.0


def test_denormal_numbers_are_timed_as_they_are_and_flushed_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU can't flush them")

    def seconds(run: Callable[[], torch.Tensor], *_: object) -> float:
        value = run()[0].item()
        assert value > 0
        return 3.0 if value < 1e-38 else 2.0

    monkeypatch.setattr(hardware, "_seconds", seconds)
    assert hardware.cost_of_denormals() == 1.5
    assert (torch.tensor(1e-39) * 0.5).item() == 0
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: False)
    assert hardware.cost_of_denormals() is None


# --- what settings are worth ------------------------------------------------------------------------


def test_settings_that_could_not_be_had_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(contenders: list[str], job: Job, rounds: int, progress: Any, beside: str) -> list[Pair]:
        asked.append((contenders, rounds, beside, job.batch_size, job.seconds))
        return [Pair(contender, (3.0,), (2.0,)) for contender in contenders]

    monkeypatch.setattr(hardware, "measure", measured)
    monkeypatch.setattr(machine, "prepare", settings("memory_kept", "denormals_flushed"))
    pairs = hardware.worth(hardware.step_recipe("ex2", CPU), CPU, 3, lambda _: None)
    without = ["ceiling without memory_kept", "ceiling without denormals_flushed"]
    assert asked == [(without, 3, "ceiling", 32, hardware.SECONDS_A_ROUND)]
    assert list(pairs) == list(machine.SETTINGS)
    assert [pair.ratio for pair in pairs.values()] == [1.5, None, None, None, 1.5]
    assert "OMP_" in (pairs["threads_pinned"].failed or "") and "GOMP_" in (pairs["waits_bounded"].failed or "")
    monkeypatch.setattr(machine, "prepare", settings())
    assert [pair.ratio for pair in hardware.worth(hardware.step_recipe("ex1", CPU), CPU, 3, print).values()] == [
        None
    ] * 5
    assert len(asked) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_steps_are_of_the_recipes_and_need_no_download(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: fast)
    ex1, ex2 = (hardware.step_recipe(name, CPU) for name in ("ex1", "ex2"))
    assert ex1.datasets == ex2.datasets == ("digits",)
    assert ex1.train.numerics == "exact"
    assert ex2.train.numerics == (NumericsChoice(dtype="bfloat16", channels_last=True) if fast else "exact")
    assert (ex2.train.batch, ex2.train.last_resolution) == (32, 128)


# --- the command ------------------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_the_command_prints_and_writes_every_figure_or_why_it_is_missing(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(contenders: list[str], *_: Any, beside: str) -> list[Pair]:
        return [Pair(contenders[0], (30.0, 31.0, 29.0), (20.0, 20.0, 21.0)), Pair(contenders[1], failed="it broke")]

    monkeypatch.setattr(hardware, "measure", measured)
    monkeypatch.setattr(machine, "prepare", settings("memory_kept", "huge_pages"))
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    file = tmp_path / "machine.json"
    code, out, err = call(capsys, monkeypatch, "bench", "--machine", "--device", "cpu", "--rounds", "3", "--json", file)
    assert (code, err) == (0, "")
    for text in (machine.describe(CPU)["cpu"], "bf16: this CPU only emulates", "1.50", "it broke", "OMP_", "GB/s"):
        assert text in out
    record = json.loads(file.read_text())
    assert len(record["speeds"]) == 8
    for speed in record["speeds"]:
        assert (speed["seconds"] is None) == (speed["flops_per_second"] is None) == (speed["left_out"] is not None)
        assert speed["flops"] > 0
    kept, huge, *others = record["steps"][0]["settings"]
    assert kept == {
        "setting": "memory_kept",
        "with_all": [30, 31, 29],
        "without_it": [20, 20, 21],
        "ratio": 1.5,
        "left_out": None,
    }
    for setting in (huge, *others):
        assert setting["ratio"] is None and setting["left_out"]
    assert [step["recipe"]["name"] for step in record["steps"]] == ["ex2", "ex1"]
    assert (record["denormals"]["cost"] is None) == (record["denormals"]["left_out"] is not None)
    measurements = [record["speeds"], record["copied_bytes_per_second"], record["denormals"]]
    measurements += [step["settings"] for step in record["steps"]]
    found = list(numbers(measurements))
    assert len(found) > 20 and all(math.isfinite(number) and number > 0 for number in found)


def test_a_speed_is_operations_over_seconds() -> None:
    assert Speed("a product", "fp32", 12, 3.0).record()["flops_per_second"] == 4.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a RECIPE to measure ('cifarlab recipes' lists them), or --machine to measure the hardware"),
        (["ex1", "--machine"], "--machine measures no recipe and takes no RECIPE"),
        (["--machine", "--dataset", "digits"], "--machine measures no recipe and takes no --dataset"),
        (["--machine", "--set", "train.epochs=2"], "--machine measures no recipe and takes no --set"),
        (["--machine", "--against", "ceiling"], "--machine measures no recipe and takes no --against"),
        (["--machine", "--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "speeds", lambda *_: pytest.fail("nothing is to be measured"))
    code, out, err = call(capsys, monkeypatch, "bench", *arguments)
    assert code == 2 and not out
    assert sentence in err and err.count("\n") == 1
