"""Several processes that train together, as torchrun would start them, for the tests of what they exchange."""

from __future__ import annotations

import copy
import io
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from cifarlab import distributed, experiment, files, flops
from cifarlab.batchnorm import SyncBatchNorm, running_statistics
from cifarlab.board import Board
from cifarlab.build import make_task
from cifarlab.errors import RecipeError, RunError
from cifarlab.feed import TrainingBatch, Whole
from cifarlab.pruning import Pruning
from cifarlab.recipe import load_recipe
from cifarlab.recipe_sections import Prune
from cifarlab.task import Task
from cifarlab.train import EpochSums, StopRequest
from cifarlab.training_step import TrainingStep
from faults import _context
from short_runs import CPU, Quiet, make_dataset, recipe, without_pictures

# --- what each of them does --------------------------------------------------------------------


def only_reads() -> None:
    """From here on this process may not write, if it is not the first."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("only the first process writes")

    if not distributed.is_first():
        for name in ("make_folder", "replacing", "continuing", "rename", "locked", "remove"):
            setattr(files, name, refuse)
        Board.begin = Board.add = refuse  # type: ignore[method-assign]


def a_run(runs: Path, overrides: list[str], stop_at: int | None = None, images: int = 430) -> str:
    """Begin a run, or go on with the one in the folder; returns where it is. In each of the processes."""
    only_reads()
    without_pictures(pytest.MonkeyPatch())
    vars(flops)["per_image"] = lambda module, shape, trained=(): math.prod(shape) + sum(trained)  # which takes no time
    dataset = make_dataset(noise=0.3, train=images)
    experiment.load = lambda *_: dataset
    experiment._git_state = lambda: None
    stop = StopRequest()

    class Looking(Quiet):
        def progress(self, progress: Any) -> None:
            if progress.step == stop_at:
                stop.signal = 15

    display = Looking()
    common: dict[str, Any] = {
        "device": CPU, "display": display, "stop": stop, "process_started": time.time(), "report": display.report,
    }  # fmt: skip
    begun = sorted(runs.rglob("train.json"))
    if begun:
        run = experiment.resume_experiment(begun[0].parent, data_folder=None, **common)
    else:
        plan = load_recipe("ex1", overrides).resolved(dataset="digits", seed=0)
        run = experiment.run_experiment(plan, dataset, runs=runs, **common)
    return str(run.path)


def exchange() -> dict[str, Any]:
    """All of it, in each of three processes."""
    rank = distributed.place().rank
    found: dict[str, Any] = {
        "from first": distributed.from_first(lambda: {"rank": rank, "tensor": torch.tensor([rank]), "text": "ä\n"}),
        "everyones": distributed.everyones({"rank": rank, "text": "x" * rank}),
        "gathered": distributed.gather_rows(torch.full((rank, 2), float(rank)), [0, 1, 2]),
    }
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(rank + 0.5)]
    distributed.sum_in_place(tensors)
    found["sums"] = tensors
    copied = [torch.full((3, 2), rank).T, torch.tensor(rank)]
    distributed.copy_from_first(copied)
    found["copied"] = copied
    with pytest.raises(RecipeError) as refused:
        distributed.from_first(_refuse)
    with pytest.raises(RunError) as different:
        distributed.check_same("recipe", {"lr": rank})
    found["error"], found["same"] = str(refused.value), str(different.value)
    with distributed.alone():
        found["alone"] = (distributed.place().size, distributed.everyones(rank))
    votes = distributed.Votes()
    asked = [
        (None, False),
        (15 if rank == 2 else None, rank == 1),
        (None, rank == 0),
        (None, rank == 0),
        (None, False),
        (None, False),
    ]
    found["votes"] = [votes.cast(*mine) for mine in asked] + [votes.result()]
    pruning = Pruning(Prune(share=0.5), 0, 6, CPU)
    pruning.record(torch.tensor([rank, 3]), torch.tensor([[0.0, rank], [0.0, 1.0]]), torch.tensor([0, 0]), 0.0)
    found["losses"] = pruning.state()["losses"]
    sums = EpochSums(CPU)
    logits, labels = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0] * rank + [1] * (4 - rank))
    sums.add(0, torch.tensor(2.0), logits, TrainingBatch(logits, labels, whole=Whole(12, 12, (4,), True)), None)
    sums.add(1, torch.tensor(1.0), logits, TrainingBatch(logits, labels, whole=Whole(4, 4, None, rank == 0)), None)
    found["means"] = sums.of_all().means()
    found["state"] = sums.state()
    again = EpochSums(CPU)
    again.load_state(found["state"])
    found["again"] = again.state()
    return found


def _refuse() -> NoReturn:
    raise RecipeError("no such field")


def made_ready() -> dict[str, Any]:
    """What a run begins with, and the first exchange of a step, in each of three processes that are not quite alike."""
    rank = distributed.place().rank
    dataset = make_dataset(train=60)
    overrides = ["model={name: racing, widths: [4, 4, 4]}", "train.batch_size=16", "train.sync_batchnorm=false"]
    plan, other = (recipe(*overrides, "train.ema=0.9", *more) for more in ([], ["optimizer.lr=0.5"]))
    with pytest.raises(RunError) as refused:
        experiment.get_ready(other if rank == 2 else plan, dataset, CPU, lambda _: None)
    prepared, weights, decided = experiment.get_ready(plan, dataset, CPU, lambda _: None)

    def rounded_otherwise(*arguments: Any) -> Task:
        task = make_task(*arguments)
        assert task.average is not None
        for network in (task.network, task.average.network):
            for value in network.model.state_dict().values():
                value += rank
        return task

    vars(experiment)["make_task"] = rounded_otherwise
    task = experiment._make_task(decided.recipe, prepared, CPU, weights, lambda _: None)
    assert task.average is not None
    model = task.network.model
    begun = [copy.deepcopy(network.model.state_dict()) for network in (task.network, task.average.network)]
    take_step = TrainingStep(decided.recipe, task, lambda _: None)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, rank + 1.0) if parameter.requires_grad else None
    for statistic in running_statistics(model):
        statistic.fill_(rank)
    loss = torch.tensor(rank + 0.25)
    take_step._exchange(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {
        "refused": str(refused.value), "begun": begun, "loss": loss.item(),
        "gradients": [sorted({*gradient.flatten().tolist()}) for gradient in gradients],
        "statistics": [sorted({*statistic.tolist()}) for statistic in running_statistics(model)],
    }  # fmt: skip


def say_goodbye(complaints: list[str]) -> bool:
    """Leave with a complaint of one's own; returns whether it is to be said."""
    said = distributed.leave(complaints[distributed.place().rank])
    distributed.everyones(None)  # the first one has what they find one another by
    return said


def wait_for_one_that_is_stopped(note: Path) -> None:
    """The second process stops, and is not dead: what the first one waits for comes to no end."""
    distributed.SILENCE, distributed.GRACE = 3.0, 0.1
    distributed.everyones(None)
    if not distributed.is_first():
        os.kill(os.getpid(), signal.SIGSTOP)
    with distributed.last_words(note.write_text):
        distributed.everyones(None)


def batch_norm(affine: bool) -> nn.BatchNorm2d:
    """A layer that has nothing of what a new one has by itself."""
    layer = nn.BatchNorm2d(5, eps=0.5, momentum=0.3, affine=affine)
    for place, value in enumerate(layer.parameters()):
        value.data = torch.linspace(0.5, 2, 5).roll(place)
    return layer


def rows_and_gradients(mean: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes through a layer forwards and backwards, (6, 5, 4, 4) each."""
    torch.manual_seed(0)
    return torch.randn(6, 5, 4, 4) * 3 + mean, torch.randn(6, 5, 4, 4)


def normalise(dtype: torch.dtype, affine: bool, mean: float) -> dict[str, Any]:
    """BatchNorm of three processes' 1, 2 and 3 rows, and its gradients."""
    rank = distributed.place().rank
    rows, upstream = rows_and_gradients(mean)
    begin = (0, 1, 3)[rank]
    own = slice(begin, begin + rank + 1)
    layer = batch_norm(affine)
    images = rows[own].to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with SyncBatchNorm():
        output = layer(images)
        layer.eval()
        evaluated = layer(rows)
    torch.autograd.backward(output, upstream[own].to(dtype))
    return {
        "output": output.detach(), "gradient": images.grad, "evaluated": evaluated.detach(),
        "parameters": [parameter.grad for parameter in layer.parameters()], "buffers": list(layer.buffers()),
    }  # fmt: skip


def scored(path: str) -> dict[str, Any]:
    only_reads()
    without_pictures(pytest.MonkeyPatch())
    dataset = make_dataset(noise=0.3, train=430)
    experiment.load = lambda *_: dataset
    return experiment.score_run(Path(path), data_folder=None, device=CPU, report=lambda _: None)


# --- how they are started ----------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives in each of `count` processes that have joined, in the order of their ranks.

    work: a function of a module. Raises AssertionError, with its traceback, where one of them fails.
    """
    context, port, children = _context(), free_port(), []
    for rank in range(count):
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(rank, count, port, its, work, arguments))
        process.start()
        its.close()
        children.append((process, mine))
    results = []
    try:
        for rank, (process, pipe) in enumerate(children):
            try:
                assert pipe.poll(120), f"process {rank} hangs"
                fine, sent = pipe.recv()  # as bytes: tensors would be shared with a process that ends
            except EOFError:
                process.join(30)
                fine, sent = False, f"it ended with {process.exitcode}"
            assert fine, f"process {rank}: {sent}"
            results.append(torch.load(io.BytesIO(sent), weights_only=True))
            process.join(30)
    finally:
        for process, _ in children:
            process.kill()
    return results


def _child(
    rank: int, count: int, port: int, pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        assert distributed.join("cpu") == torch.device("cpu")
        result = work(*arguments)
        distributed.leave()
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send((True, buffer.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)
