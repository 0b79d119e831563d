"""No training step waits for the device: seen on a pretended GPU, as most machines that run these tests have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cifarlab import feed, flops, train
from cifarlab.data.augment import Draws, Pipeline
from cifarlab.models import racing
from pretend_gpu import GPU, WaitError, pretended_gpu
from short_runs import CPU
from watched_steps import SETTINGS, losses


def watched(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(flops.TrainingFlops, "total", lambda _: None)
    with pretended_gpu(monkeypatch) as gpu:
        return losses(
            SETTINGS[name],
            folder,
            GPU,
            monkeypatch,
            begin=lambda: setattr(gpu, "watched", True),
            end=lambda: setattr(gpu, "watched", False),
        )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_device_and_all_give_the_cpu_s_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = watched(name, tmp_path / "gpu", monkeypatch)
    # On the CPU it computes maps of 2x2 in a way of its own, whose rounding is another.
    monkeypatch.setattr(racing._Convolution, "forward", nn.Conv2d.forward)
    assert on_gpu == losses(SETTINGS[name], tmp_path / "cpu", CPU, monkeypatch)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.parametrize(
    ("name", "pixels", "images"),
    [
        # 360 training images in batches of 64; from step 9 on they are larger. The run is stopped in its third epoch.
        ("airbench94", 2**21, [360, 192, 168, 360]),
        ("airbench94", 130 * 32**2, [192, 168, 192, 128, 40, 128, 128]),
        ("airbench94", 1, [64] * 5 + [40] + [64] * 5 + [40] + [64] * 3),
        ("mixing", 2**21, [360, 360, 360]),
        ("streamed", 2**21, [64] * 5 + [40] + [64] * 5 + [40] + [64] * 3),
    ],
)
def test_small_batches_are_augmented_several_at_a_time(
    name: str, pixels: int, images: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    augment = Pipeline.train

    def counted(self: Pipeline, pixels: Tensor, samples: Tensor, draws: Draws) -> Tensor:
        asked.append(len(samples))
        return augment(self, pixels, samples, draws)

    with monkeypatch.context() as changed:
        changed.setattr(Pipeline, "train", counted)
        changed.setattr(feed, "AUGMENTED_PIXELS", pixels)
        changed.setattr(train, "first_pictures", lambda *_: None)
        watched(name, tmp_path, pytest.MonkeyPatch())
    assert asked == images


def test_a_step_that_reads_its_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total_weight = feed.total_weight

    def reading(batch: feed.TrainingBatch, class_weights: Tensor | None) -> Tensor | int:
        batch.labels.max().item()
        return total_weight(batch, class_weights)

    monkeypatch.setattr(train, "total_weight", reading)
    with pytest.raises(WaitError, match="reads values back"):
        watched("ex1", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lambda values: values.sum().item(), "reads values back"),
        (lambda values: bool((values > 0).any()), "reads values back"),
        (lambda values: values.cpu(), "reads values back"),
        (lambda values: torch.zeros(3).copy_(values), "isn't pinned"),
        (lambda values: torch.zeros(3).to(values.device), "isn't pinned"),
        (lambda values: values.copy_(torch.zeros(3)), "isn't pinned"),
        (lambda values: torch.tensor(1.0, device=values.device), "isn't pinned"),
        (lambda values: values.nonzero(), "a shape depends on values"),
        (lambda values: values[values > 0], "a shape depends on values"),
        (lambda values: values + torch.zeros(3), "takes a tensor from the host"),
        (lambda values: values[torch.tensor([0, 2])], "takes a tensor from the host"),
    ],
)
def test_the_pretended_gpu_knows_what_waits(
    wait: Callable[[Tensor], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        values = torch.arange(3.0, device=GPU)
        wait(values)
        gpu.watched = True
        with pytest.raises(WaitError, match=said):
            wait(values)


def test_the_pretended_gpu_computes_and_keeps_apart_what_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        host = torch.arange(3.0)
        values = gpu.upload(host, GPU)
        gpu.watched = True
        values.add_(1)
        values[values > 2] = 7.0  # a single value has no shape to wait for
        made = torch.where(values > 5, 0.5, values) * torch.tensor(2.0)
        assert values.device == made.device == GPU
        gpu.watched = False
        assert made.cpu().tolist() == [2.0, 4.0, 1.0]
        assert host.tolist() == [0.0, 1.0, 2.0]
