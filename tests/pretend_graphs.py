"""CUDA graphs that are none: what runs while one is captured is written down, undone, and done again at each replay.

As with a real one, a replay reads and writes the very tensors of the capture; numbers that were no tensors then, such
as a learning rate, are those of the capture for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._written(func, args, kwargs or {}):
            self._before.append((tensor, tensor.detach().clone()))
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.calls.append((func, args, kwargs or {}, [output for output in outputs if id(output) not in given]))
        return result

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """What a call writes to, of what it is given."""
        given = [(argument, args[number]) for number, argument in enumerate(func._schema.arguments[: len(args)])]
        given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        written = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        if func.overloadpacket is torch.ops.aten.native_batch_norm:  # does not say that it updates its statistics
            written += args[3:5]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]

    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.detach().copy_(value)


class PretendedGraph:
    """In place of torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self) -> None:
        self.recorder = _Recorder()

    def replay(self) -> None:
        type(self).replays += 1
        with torch.no_grad():
            for func, args, kwargs, outputs in self.recorder.calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for output, value in zip(outputs, again, strict=False):
                    if output.data_ptr() != value.data_ptr():
                        output.copy_(value)


@contextlib.contextmanager
def _capturing(graph: PretendedGraph, pool: Any, capture_error_mode: str) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    with graph.recorder:
        yield
    graph.recorder.undo()


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA graphs be had on the CPU, for as long as the test runs."""
    monkeypatch.setattr(PretendedGraph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
