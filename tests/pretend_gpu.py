"""A GPU that is none: tensors that say they are on one, with values on the CPU; it knows what a real one waits for.

What would make the host wait for a CUDA device is an error while it is watched: reading a value (`item`, `bool`,
`tolist`, `cpu`), shapes that depend on values (`nonzero`, boolean masks as indices), and copies to it from memory that
isn't pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cifarlab import evaluate, machine

GPU = torch.device("cuda", 0)
# Torch refuses to make CUDA tensors where there is no such device; to it ours are on one without memory.
META = torch.device("meta")
aten = torch.ops.aten

READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
SHAPES = {aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten.repeat_interleave}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class WaitError(AssertionError):
    """The host would have waited for the device."""


class OnGpu(Tensor):
    """A tensor on the pretended device. value: the same on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=META
        )
        made.value = value
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("a tensor of the pretended device outside of it")


class _Names(TorchFunctionMode):
    """To torch the pretended device goes by another name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.device.__get__:
            return func(*args)
        args, kwargs = tree_map(self._renamed, (args, kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            return func(*args, **{**kwargs, "device": "cpu"}).to(META)  # as torch does it
        return func(*args, **kwargs)

    @staticmethod
    def _renamed(arg: Any) -> Any:
        return META if isinstance(arg, torch.device) and arg.type == "cuda" else arg


class _Generator(torch.Generator):
    """One on the CPU, wherever it was asked for."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class PretendGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does on the CPU what it is asked. watched: whether a wait is an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = False
        self._pinned = False

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        """In the place of `machine.upload`: there is no pinned memory without a GPU."""
        self._pinned = True
        try:
            return tensor.to(device)
        finally:
            self._pinned = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wrappers: dict[int, OnGpu] = {}
        host: list[Tensor] = []

        def unwrap(arg: Any) -> Any:
            if isinstance(arg, OnGpu):
                wrappers[id(arg.value)] = arg
                return arg.value
            if isinstance(arg, Tensor):
                host.append(arg)
            return arg

        target = kwargs.get("device")
        plain_args, plain_kwargs = tree_map(unwrap, (args, kwargs))
        if target is not None and torch.device(target) == META:
            plain_kwargs["device"] = torch.device("cpu")
        elif target is None and not wrappers:
            return func(*args, **kwargs)
        to_host = target is not None and torch.device(target).type == "cpu"
        if self.watched and (wrappers or host):
            self._look(func, args, bool(wrappers), host, to_host)

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or to_host:
                return value
            # What is changed in place stays the tensor that it is.
            return wrappers[id(value)] if id(value) in wrappers else OnGpu(value)

        return tree_map(wrap, func(*plain_args, **plain_kwargs))

    def _look(self, func: Any, args: Any, on_gpu: bool, host: list[Tensor], to_host: bool) -> None:
        operation = func.overloadpacket
        if operation in COPIES:
            if on_gpu and to_host:
                raise WaitError(f"{func} reads values back")
            if host and not to_host and not self._pinned:
                raise WaitError("a copy to the device from memory that isn't pinned")
            return
        if not on_gpu:
            return
        if operation in READS:
            raise WaitError(f"{func} reads values back")
        if operation in SHAPES or (operation in INDEXING and self._by_mask(operation, args)):
            raise WaitError(f"{func}: a shape depends on values")
        if any(tensor.ndim for tensor in host):  # a number goes along with the call
            raise WaitError(f"{func} takes a tensor from the host")

    @staticmethod
    def _by_mask(operation: Any, args: Any) -> bool:
        if operation is not aten.index and args[2].numel() == 1:
            return False  # this is `masked_fill` by another name
        return any(index is not None and index.dtype == torch.bool for index in args[1])


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """Inside, GPU is a device that tensors can be made on and moved to, and `machine` takes it for one."""
    gpu = PretendGpu()
    monkeypatch.setattr(machine, "upload", gpu.upload)
    monkeypatch.setattr(machine, "synchronize", lambda _: None)
    monkeypatch.setattr(machine, "free_memory", lambda _: 2**30)
    monkeypatch.setattr(machine, "reset_peak_memory", lambda _: None)
    monkeypatch.setattr(machine, "peak_memory", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "pretended")
    monkeypatch.setattr(torch, "Generator", _Generator)
    # Inference mode is not for tensors that are made in Python.
    predict: Any = evaluate._predict
    monkeypatch.setattr(evaluate, "_predict", torch.no_grad()(predict.__wrapped__))
    with _Names(), gpu:
        yield gpu
