"""Files of torch.save's that anybody may have written: nothing in them runs, and what comes out is plain.

Plain are tensors of numbers on the CPU, in whatever dictionaries, lists and tuples, and Python's own values.
"""

from __future__ import annotations

import io
import mmap
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_BEGINNING_OF_ZIP = b"PK\x03\x04"  # by which torch.load tells its two formats apart
# The one call that weights_only=True lets a file make which fills memory by a number alone; nothing of ours has one.
_BYTEARRAY = b"\nbytearray\n"


class NotPlainError(ValueError):
    """What a file holds or claims that is not plain, a clause."""


def read_plain(source: Path | io.BytesIO, content: bytes | mmap.mmap) -> Any:
    """What a file of torch.save's holds, read onto the CPU. content: the bytes of `source`.

    Raises NotPlainError, also for what claims more bytes than the file has, and whatever comes to torch's mind for what
    is damaged: ten kinds, of bytes changed at random.
    """
    import torch

    if content[: len(_BEGINNING_OF_ZIP)] == _BEGINNING_OF_ZIP:
        with zipfile.ZipFile(source) as archive:
            parts = archive.infolist()
        # torch.save compresses nothing, and no part of its files lies within another.
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > len(content):
            raise NotPlainError("its parts claim more bytes than it has")
        if isinstance(source, io.BytesIO):
            source.seek(0)
    if content.find(_BYTEARRAY) >= 0:
        raise NotPlainError("it makes bytes out of a number")
    with warnings.catch_warnings(action="ignore"):  # of formats that are refused, and kinds of tensors to come
        value = torch.load(source, map_location="cpu", weights_only=True)
    storages = {}
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > len(content):
        raise NotPlainError("its tensors claim more bytes than it has")
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what was read. Raises NotPlainError for any that is not plain, and for a dictionary that isn't."""
    import torch

    waiting, seen = [value], set()
    while waiting:  # no recursion: a dictionary may hold itself
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            # A file may give a tensor attributes, which stand in the way of its methods.
            if one.layout is not torch.strided or one.device.type != "cpu" or one.is_nested or vars(one):
                raise NotPlainError("it holds a tensor that is not plain numbers")
            yield one
        elif isinstance(one, dict):
            attributes: dict[str, Any] = getattr(one, "__dict__", {})  # an OrderedDict has some
            if attributes.keys() - {"_metadata"}:
                raise NotPlainError("it holds a dictionary that is not plain")
            waiting += [*attributes.values(), *one, *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one
