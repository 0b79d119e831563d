"""What only a GPU can show: that no step waits for it, that it computes what the CPU does, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarlab import experiment, machine
from cifarlab.graphs import StepGraphs
from cifarlab.recipe import Recipe
from cifarlab.train import StopRequest
from short_runs import CPU, Quiet, make_dataset, recipe
from watched_steps import SETTINGS, losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What these tests set for the whole process is set back."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def gpu_run(plan: Recipe, folder: Path, said: Quiet) -> dict[str, Any]:
    """The train.json of a run."""
    run = experiment.run_experiment(
        plan,
        make_dataset(train=600),
        runs=folder,
        device=GPU,
        display=said,
        stop=StopRequest(),
        process_started=0.0,
        report=lambda _: None,
    )
    return run.train_log()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_device_and_all_give_the_cpu_s_losses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = losses(
        SETTINGS[name],
        tmp_path / "gpu",
        GPU,
        monkeypatch,
        begin=lambda: torch.cuda.set_sync_debug_mode("error"),
        end=lambda: torch.cuda.set_sync_debug_mode("default"),
    )
    on_cpu = losses(SETTINGS[name], tmp_path / "cpu", CPU, monkeypatch)
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-3)
    # Sums in another order are other roundings, and every step builds on those before.
    assert on_gpu == pytest.approx(on_cpu, rel=0.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_that_are_replayed_as_cuda_graphs_give_the_losses_of_those_that_are_launched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = losses(SETTINGS[name], tmp_path / "launched", GPU, monkeypatch)
    captured, capture = [], StepGraphs._capture

    def counted(*arguments: Any) -> Any:
        captured.append(capture(*arguments))
        return captured[-1]

    monkeypatch.setattr(StepGraphs, "_capture", counted)
    graphs = [*SETTINGS[name], "train.numerics={graphs: true}"]
    replayed = losses(
        graphs,
        tmp_path / "replayed",
        GPU,
        monkeypatch,
        begin=lambda: torch.cuda.set_sync_debug_mode("error"),
        end=lambda: torch.cuda.set_sync_debug_mode("default"),
    )
    assert captured and None not in captured
    assert replayed[:3] == pytest.approx(launched[:3], rel=1e-3)
    assert replayed == pytest.approx(launched, rel=0.1)


def test_an_upload_does_not_wait_and_a_plain_copy_does() -> None:
    values = torch.arange(1000)
    torch.cuda.set_sync_debug_mode("error")
    uploaded = machine.upload(values, GPU)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        values.to(GPU)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(uploaded.cpu(), values)


LARGE = [
    *("train.numerics=exact", "train.resolution=128", "train.batch_size=256", "train.epochs=1"),
    *("evaluate.test=false", "evaluate.batch_size=32"),
]


def test_peak_memory_is_that_of_the_steps(tmp_path: Path) -> None:
    small, large = (gpu_run(recipe(*LARGE, f"train.batch_size={size}"), tmp_path, Quiet()) for size in (64, 256))
    # The least that EX-1's backward needs: what its first convolution gives, and what BatchNorm makes of it.
    activations = 2 * 4 * 12 * 126 * 126
    assert large["peak_memory"] > 256 * activations
    assert large["peak_memory"] - small["peak_memory"] > 192 * activations
    assert large["peak_memory"] < machine.total_memory(GPU)


def test_where_memory_runs_out_a_batch_is_computed_in_parts(tmp_path: Path) -> None:
    whole = gpu_run(recipe(*LARGE), tmp_path / "whole", Quiet())
    machine.give_back_memory(GPU)
    torch.cuda.set_per_process_memory_fraction(0.6 * whole["peak_memory"] / machine.total_memory(GPU))
    said = Quiet()
    parts = gpu_run(recipe(*LARGE), tmp_path / "parts", said)
    assert parts["status"] == "finished" and parts["accumulate"] >= 2
    assert f"memory ran out: from here on a batch is computed in {parts['accumulate']} parts" in said.said
    assert parts["peak_memory"] < 0.6 * whole["peak_memory"]
