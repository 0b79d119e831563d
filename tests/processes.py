"""Several processes that train together, as torchrun would start them, for the tests of what they exchange."""

from __future__ import annotations

import io
import os
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

from cifarlab import distributed, experiment
from cifarlab.batchnorm import SyncBatchNorm
from cifarlab.errors import RecipeError, RunError
from cifarlab.pruning import Pruning
from cifarlab.recipe import load_recipe
from cifarlab.recipe_sections import Prune
from cifarlab.train import EpochSums, StopRequest, TrainingBatch, Whole
from faults import _context
from short_runs import CPU, Quiet, make_dataset

# --- what each of them does --------------------------------------------------------------------


def a_run(runs: Path, overrides: list[str], stop_at: int | None = None, images: int = 430) -> str:
    """Begin a run, or go on with the one in the folder; returns where it is. In each of the processes."""
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


def normalise(dtype: torch.dtype, affine: bool) -> dict[str, Any]:
    """BatchNorm of three processes' 1, 2 and 3 rows, and its gradients."""
    rank = distributed.place().rank
    torch.manual_seed(0)
    rows, upstream = torch.randn(6, 5, 4, 4) * 3 + 50, torch.randn(6, 5, 4, 4)
    begin = (0, 1, 3)[rank]
    own = slice(begin, begin + rank + 1)
    layer = nn.BatchNorm2d(5, affine=affine)
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
                fine, sent = False, "it was killed"
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
