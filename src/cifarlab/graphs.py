"""Training steps as CUDA graphs: all kernels of a step are launched at once, so that none waits for the processor.

A small network's kernels take less time than their launching: a step of airbench94 has 350 of them, which an H100 was
done with in half the time that they were launched in.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cifarlab import machine
from cifarlab.download import Report

# A kind of step is launched kernel by kernel so many times before it is captured: libraries have then made ready what
# must not be made within a graph, and the optimizer has its state.
WARM_UP = 1
# So many kinds are kept at a time. Most runs have one, and another for the last batch of an epoch.
KINDS = 4

Tensors = Sequence[Tensor | None]
Work = Callable[[Tensors, int, bool], tuple[Tensor, Tensor]]


class _Captured(NamedTuple):
    """inputs: what the graph reads. results: what it writes. gradients: of the parameters, as it leaves them."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    results: tuple[Tensor, Tensor]
    gradients: list[Tensor | None]


class StepGraphs:
    """Does a step's work by replaying it, where it is of a kind that was captured.

    work: given a batch's tensors, in how many parts it is to be computed and whether the optimizer's step belongs to
    it, computes loss and logits and sets the gradients, which were none; it must not wait for the device. A kind is all
    of that, by shape, and which parameters train. Loss and logits are overwritten by the next replay.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, work: Work, report: Report) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = optimizer
        self._work = work
        self._report = report
        self._device = self._parameters[0].device
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self.given_up = False
        # Graphs share their memory: one is replayed at a time, and nothing is read from one after another's replay.
        self._pool = torch.cuda.graph_pool_handle()
        # The learning rates that are in force, read by what is captured.
        self._rates = torch.zeros(len(optimizer.param_groups), device=self._device)

    def __call__(self, tensors: Tensors, parts: int, whole: bool) -> tuple[Tensor, Tensor] | None:
        """Loss and logits; None where the caller has to do the work, as this kind of step is new.

        whole: whether the optimizer's step is part of the work. Where it isn't, the gradients are there afterwards.
        """
        if self.given_up:
            return None
        shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors)
        kind = (shapes, parts, whole, tuple(parameter.requires_grad for parameter in self._parameters))
        captured = self._captured.get(kind)
        if captured is None:
            self._seen[kind] += 1
            if self._seen[kind] <= WARM_UP:
                return None
            captured = self._capture(tensors, parts, whole)
            if captured is None:
                return None
            self._captured[kind] = captured
            if len(self._captured) > KINDS:
                self._captured.popitem(last=False)
        for kept, tensor in zip(captured.inputs, tensors, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor, non_blocking=True)
        if whole:
            rates = torch.tensor([group["lr"] for group in self._optimizer.param_groups])
            self._rates.copy_(machine.upload(rates, self._device))
        captured.graph.replay()
        if not whole:
            for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
                parameter.grad = gradient
        return captured.results

    def _capture(self, tensors: Tensors, parts: int, whole: bool) -> _Captured | None:
        """The work on such tensors, not yet done; None where it can't be captured, and never will be."""
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        self._optimizer.zero_grad(set_to_none=True)
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        graph = torch.cuda.CUDAGraph()
        try:
            if whole:
                for group, rate in zip(groups, self._rates, strict=True):
                    group["lr"] = rate
            # Other threads go on with what a capture forbids this one, such as pinning the memory of the next batches.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = self._work(inputs, parts, whole)
        except RuntimeError as error:
            self.given_up = True
            reason = " ".join(str(error).split())[:200]
        finally:
            for group, value in zip(groups, rates, strict=True):
                group["lr"] = value
        if self.given_up:
            # Not in the `except`: the exception holds the frames that hold the memory.
            self._captured.clear()
            machine.give_back_memory(self._device)
            self._report(f"steps can't be replayed as CUDA graphs ({reason}): their kernels are launched one by one")
            return None
        return _Captured(graph, inputs, results, [parameter.grad for parameter in self._parameters])
