"""Files of torch.save's and numpy's that anybody may have written: nothing in them runs, and what comes out is plain.

Plain are tensors of numbers on the CPU, in whatever dictionaries, lists and tuples, and Python's own values.
"""

from __future__ import annotations

import io
import math
import mmap
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifarlab import files

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_BEGINNING_OF_ZIP = b"PK\x03\x04"  # by which torch.load tells its two formats apart
# The one call that weights_only=True lets a file make which fills memory by a number alone; nothing of ours has one.
_BYTEARRAY = b"\nbytearray\n"

MAX_ARRAY_BYTES = 1_000_000_000  # of all arrays of a file: the logits of 250,000 images and 1,000 classes


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


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of numbers of a file of numpy's `savez`, read-only, by name.

    Raises NotPlainError where it is damaged, holds anything else, or claims more than it has or than MAX_ARRAY_BYTES;
    OSError where it can't be read.
    """
    if files.regular_size(path) > MAX_ARRAY_BYTES:
        raise NotPlainError(f"it has more than {MAX_ARRAY_BYTES:,} bytes")
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > MAX_ARRAY_BYTES:
                raise NotPlainError(f"its arrays claim more than {MAX_ARRAY_BYTES:,} bytes")
            for part in parts:
                # No more is unpacked than the size that was added up.
                found[part.filename.removesuffix(".npy")] = _array(archive.read(part))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, NotPlainError):
            raise
        raise NotPlainError(" ".join(str(error).split())[:200] or "it is cut short") from error
    return found


def _array(content: bytes) -> np.ndarray[Any, Any]:
    """What a file of numpy's `save` holds. Its header may claim anything: nothing is made that the bytes don't fill."""
    import numpy as np
    from numpy.lib import format as npy

    file = io.BytesIO(content)
    if npy.read_magic(file) != (1, 0):
        raise NotPlainError("it is of a version of numpy's format that cifarlab doesn't write")
    shape, by_columns, dtype = npy.read_array_header_1_0(file)
    if by_columns or dtype.kind not in "biuf" or min(shape, default=0) < 0:
        raise NotPlainError(f"it holds {dtype} {shape}, which cifarlab doesn't write")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise NotPlainError("an array is not as long as it claims")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


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
