"""Steps that are replayed as CUDA graphs: on pretended ones, as most machines that run these tests have no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifarlab import graphs, optim
from cifarlab.graphs import StepGraphs
from pretend_graphs import PretendedGraph, pretend_graphs
from short_runs import CPU, Quiet
from watched_steps import SETTINGS, losses

REPLAYED = ["train.numerics={dtype: float32, graphs: true}"]
MORE = SETTINGS | {
    "pruned": ["train={prune: {share: 0.5}, batch_size: 48, epochs: 3}", "optimizer={name: adamw, lr: 1e-3}"],
    "momentum that moves": ["schedule.name=one_cycle", "optimizer={name: lion, lr: 1e-3}"],
}


@pytest.mark.parametrize("name", MORE)
def test_replayed_steps_give_the_losses_of_launched_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Newton-Schulz steps in bf16 make of the last bit of a gradient a hundredth of an update.
    monkeypatch.setattr(optim, "_orthogonal", lambda update, _: update / update.norm())
    launched = losses(MORE[name], tmp_path / "launched", CPU, pytest.MonkeyPatch())
    pretend_graphs(monkeypatch)
    replayed = losses([*MORE[name], *REPLAYED], tmp_path / "replayed", CPU, pytest.MonkeyPatch())
    assert PretendedGraph.replays >= 5
    # A learning rate that is a tensor rounds lr × update by itself.
    assert replayed == pytest.approx(launched, rel=1e-5)


def test_what_a_capture_refuses_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    launched = losses(SETTINGS["airbench94"], tmp_path / "launched", CPU, pytest.MonkeyPatch())
    said: list[str] = []
    pretend_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(Quiet, "report", lambda _, text: said.append(text))
    replayed = losses([*SETTINGS["airbench94"], *REPLAYED], tmp_path / "replayed", CPU, pytest.MonkeyPatch())
    assert replayed == launched
    assert said == [
        "steps can't be replayed as CUDA graphs (operation not permitted when stream is capturing): their kernels are "
        "launched one by one"
    ]


class Counting:
    """StepGraphs for a line through the origin, and how often its work was done rather than replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lr: float = 0.5) -> None:
        pretend_graphs(monkeypatch)
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(1.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.works = 0
        self.steps = StepGraphs(self.model, self.optimizer, self.work, lambda _: None)

    def work(self, tensors: graphs.Tensors, parts: int, whole: bool) -> tuple[Tensor, Tensor]:
        self.works += 1
        inputs, labels = tensors
        assert inputs is not None and labels is not None
        outputs = self.model(inputs)
        loss = ((outputs - labels) ** 2).mean() / parts
        loss.backward()
        if whole:
            with torch.no_grad():
                self.model.weight -= self.optimizer.param_groups[0]["lr"] * self.model.weight.grad
        return loss.detach(), outputs.detach()

    def take(self, inputs: float, label: float, *, rows: int = 1, parts: int = 1, whole: bool = False) -> Any:
        return self.steps((torch.full((rows, 1), float(inputs)), torch.full((rows, 1), float(label))), parts, whole)


def test_a_kind_of_step_is_left_to_the_caller_once_then_captured_once_then_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Counting(monkeypatch)
    assert line.take(1, 3) is None and line.works == 0
    loss, outputs = line.take(1, 3)
    assert (loss.item(), outputs.item(), line.works) == (4.0, 1.0, 1)
    assert line.model.weight.grad is not None and line.model.weight.grad.item() == -4.0
    line.model.weight.data.fill_(2.0)
    loss, outputs = line.take(2, 3)
    assert (loss.item(), outputs.item(), line.works) == (1.0, 4.0, 1)
    assert line.model.weight.grad.item() == 4.0
    # Other kinds: by rows, parts, what the work includes, and what trains.
    for kind in ({"rows": 2}, {"parts": 2}, {"whole": True}):
        assert line.take(1, 3, **kind) is None
    line.model.weight.requires_grad_(False)
    assert line.take(1, 3) is None


def test_a_whole_step_follows_the_learning_rate_and_leaves_it_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Counting(monkeypatch, lr=0.5)
    line.take(1, 3, whole=True)
    for lr, weight in ((0.5, 3.0), (0.25, 3.0), (0.0, 3.0)):
        line.optimizer.param_groups[0]["lr"] = lr
        line.take(1, 3, whole=True)
        assert line.model.weight.item() == weight and line.optimizer.param_groups[0]["lr"] == lr
    line.optimizer.param_groups[0]["lr"] = 0.25
    line.take(1, 5, whole=True)  # the gradient is -4
    assert line.model.weight.item() == 4.0 and line.works == 1


def test_gradients_are_those_of_the_kind_that_was_replayed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Counting(monkeypatch)
    for _ in range(2):
        for rows in (1, 2):
            line.take(1, 3, rows=rows)
    line.take(1, 4, rows=1)
    assert line.model.weight.grad is not None and line.model.weight.grad.item() == -6.0
    line.take(1, 2, rows=2)
    assert line.model.weight.grad.item() == -2.0


def test_only_the_last_few_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Counting(monkeypatch)
    for rows in range(1, graphs.KINDS + 2):
        for _ in range(2):
            line.take(1, 3, rows=rows)
    assert line.works == graphs.KINDS + 1
    line.take(1, 3, rows=2)
    assert line.works == graphs.KINDS + 1  # still there
    line.take(1, 3, rows=1)
    assert line.works == graphs.KINDS + 2  # captured anew
