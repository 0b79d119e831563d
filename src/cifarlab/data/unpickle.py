"""Reads the pickles of CIFAR without running anything that they name.

A pickle is a program, and `pickle.Unpickler` its machine. Even with `find_class` restricted, that machine sets
attributes on whatever was admitted (BUILD), and allocates as much as a file claims: twelve bytes are enough for
gigabytes of memory (CPython issue 115952; the fix is not in every Python that this project runs on). So the opcodes are
walked here, all of those that hold plain data, and those that call something only in the exact forms that a numpy array
of bytes takes. Nothing is imported, nothing called, no attribute set, and memory is bounded by the size of the file.

Read are pickles of Python 2 in protocols 0 and 2, as the official files are, and the same rewritten by Python 3 in any
protocol from 0 to 5, by numpy 1 or 2.
"""

from __future__ import annotations

import pickletools
import struct
from typing import Any

import numpy as np

from cifarlab.data.dataset import UInt8Array
from cifarlab.errors import DataError

# The largest official file (train, CIFAR-100) has 155 MB, and a few opcodes for each of its 50,000 images.
MAX_BYTES = 2**28
MAX_OPCODES = 4_000_000

# Strings longer than this stay views of the file's bytes: the pixels of a batch are not copied.
_SHORT = 4096

# Strings in text form have no escapes in any file of CIFAR, so a backslash is refused rather than interpreted.
_QUOTES = (b"'", b'"')


class _RefusedError(Exception):
    """What the file is or does, as the end of a sentence that starts with its name."""


class _Name:
    """One of the five names that a file may mention. It is compared by identity and never called."""

    __slots__ = ()


_RECONSTRUCT, _FROMBUFFER, _NDARRAY, _DTYPE, _ENCODE = (_Name() for _ in range(5))

_NAMES = {
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,  # numpy 2
    "numpy.core.numeric._frombuffer": _FROMBUFFER,  # protocol 5
    "numpy._core.numeric._frombuffer": _FROMBUFFER,
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _DTYPE,
    "_codecs.encode": _ENCODE,  # how Python 3 writes bytes in protocols 0 to 2
}


class _Uint8:
    """Stands for the one dtype that is admitted."""

    __slots__ = ()


class _Array:
    """Stands for an array, which a pickle names first (`_reconstruct`) and fills later (BUILD)."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: UInt8Array | None = None


def read_pickle(data: bytes, name: str) -> dict[str, Any]:
    """The dictionary that a pickle of CIFAR holds; `name` is the file's name, for messages.

    Arrays are uint8 with one or two dimensions, and read-only views of `data`. Python 2 strings come as `str`
    (latin-1), or as a `memoryview` from 4 KiB on. Other values are int, bool, None, bytes, and lists, tuples and
    dictionaries of these.

    Raises DataError where the file is damaged, is too large, or asks for anything else; nothing of it has run.
    """
    try:
        if len(data) > MAX_BYTES:
            raise _RefusedError(f"has {len(data):,} bytes, more than any file of CIFAR")
        result = _Machine(data).run()
        if type(result) is not dict:
            raise _RefusedError(f"holds a {type(result).__name__.lstrip('_')}, where a dictionary was expected")
        return {key: _finished(value) for key, value in result.items()}
    except _RefusedError as refused:
        raise DataError(f"{name} {refused}; get the file again from a source that you trust") from None
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
        # The stack ran empty, a memo entry is missing, a text is no number: whatever it is, it is no whole pickle.
        raise DataError(f"{name} is truncated or is not a pickle; get the file again") from error


def _finished(value: Any) -> Any:
    if type(value) is _Array:
        if value.value is None:
            raise _RefusedError("has an array without contents")
        return value.value
    if type(value) in (_Name, _Uint8):
        raise _RefusedError("has a type as a value, where CIFAR has data")
    return value


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.view = memoryview(data)
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        data, stack, memo = self.data, self.stack, self.memo
        for _ in range(MAX_OPCODES):
            if self.at >= len(data):
                raise _RefusedError("is truncated")
            code = data[self.at : self.at + 1]
            self.at += 1
            # In the order of how often they occur.
            if code == b"K":  # BININT1
                stack.append(self.number("<B"))
            elif code == b"q":  # BINPUT
                memo[self.number("<B")] = stack[-1]
            elif code == b"r":  # LONG_BINPUT
                memo[self.number("<I")] = stack[-1]
            elif code == b"\x94":  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif code == b"U":  # SHORT_BINSTRING
                stack.append(self.old_string(self.number("<B")))
            elif code == b"T":  # BINSTRING
                stack.append(self.old_string(self.number("<i")))
            elif code == b"h":  # BINGET
                stack.append(memo[self.number("<B")])
            elif code == b"j":  # LONG_BINGET
                stack.append(memo[self.number("<I")])
            elif code == b"M":  # BININT2
                stack.append(self.number("<H"))
            elif code == b"J":  # BININT
                stack.append(self.number("<i"))
            elif code == b"\x8a":  # LONG1
                length = self.number("<B")
                if length > 8:
                    raise _RefusedError(f"has an integer of {length} bytes")
                stack.append(int.from_bytes(self.take(length), "little", signed=True))
            elif code == b"\x8c":  # SHORT_BINUNICODE
                stack.append(str(self.take(self.number("<B")), "utf-8"))
            elif code == b"X":  # BINUNICODE
                stack.append(str(self.take(self.number("<I")), "utf-8"))
            elif code == b"\x8d":  # BINUNICODE8
                stack.append(str(self.take(self.number("<Q")), "utf-8"))
            elif code == b"C":  # SHORT_BINBYTES
                stack.append(self.bytes_of(self.number("<B")))
            elif code == b"B":  # BINBYTES
                stack.append(self.bytes_of(self.number("<I")))
            elif code in (b"\x8e", b"\x96"):  # BINBYTES8, BYTEARRAY8
                stack.append(self.bytes_of(self.number("<Q")))
            elif code == b"(":  # MARK
                self.marks.append(len(stack))
            elif code == b"e":  # APPENDS
                items = self.since_mark()
                self.top(list).extend(items)
            elif code == b"a":  # APPEND
                item = stack.pop()
                self.top(list).append(item)
            elif code == b"u":  # SETITEMS
                items = self.since_mark()
                self.fill(self.top(dict), items)
            elif code == b"s":  # SETITEM
                items = [stack.pop(-2), stack.pop()]
                self.fill(self.top(dict), items)
            elif code == b"}":  # EMPTY_DICT
                stack.append({})
            elif code == b"]":  # EMPTY_LIST
                stack.append([])
            elif code == b")":  # EMPTY_TUPLE
                stack.append(())
            elif code == b"d":  # DICT
                items = self.since_mark()
                stack.append({})
                self.fill(stack[-1], items)
            elif code == b"l":  # LIST
                stack.append(self.since_mark())
            elif code == b"t":  # TUPLE
                stack.append(tuple(self.since_mark()))
            elif code in (b"\x85", b"\x86", b"\x87"):  # TUPLE1, TUPLE2, TUPLE3
                size = code[0] - 0x84
                if len(stack) < size:
                    raise _RefusedError("is not a whole pickle")
                stack[-size:] = [tuple(stack[-size:])]
            elif code == b"N":  # NONE
                stack.append(None)
            elif code in (b"\x88", b"\x89"):  # NEWTRUE, NEWFALSE
                stack.append(code == b"\x88")
            elif code == b"\x80":  # PROTO
                if (protocol := self.number("<B")) > 5:
                    raise _RefusedError(f"has pickle protocol {protocol}, and 5 is the newest known")
            elif code == b"\x95":  # FRAME: a hint for buffered reading
                self.number("<Q")
            elif code == b"I":  # INT
                line = self.line()
                stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))
            elif code == b"L":  # LONG
                stack.append(int(self.line().removesuffix(b"L")))
            elif code == b"S":  # STRING
                line = self.line()
                if len(line) < 2 or line[:1] not in _QUOTES or line[-1:] != line[:1] or b"\\" in line:
                    raise _RefusedError("has a string in a form that CIFAR does not use")
                stack.append(str(line[1:-1], "latin-1"))
            elif code == b"V":  # UNICODE
                stack.append(str(self.line(), "raw-unicode-escape"))
            elif code == b"p":  # PUT
                memo[int(self.line())] = stack[-1]
            elif code == b"g":  # GET
                stack.append(memo[int(self.line())])
            elif code in (b"c", b"i"):  # GLOBAL, INST: the second also calls, which `mention` never lets it reach
                module, attribute = str(self.line(), "utf-8"), str(self.line(), "utf-8")
                self.mention(module, attribute, call=code == b"i")
            elif code == b"\x93":  # STACK_GLOBAL
                attribute, module = stack.pop(), stack.pop()
                self.mention(module, attribute, call=False)
            elif code == b"R":  # REDUCE
                arguments, callee = stack.pop(), stack.pop()
                stack.append(self.reduce(callee, arguments))
            elif code == b"b":  # BUILD
                state = stack.pop()
                self.build(stack[-1], state)
            elif code == b".":  # STOP
                return stack.pop()
            else:
                name = next((op.name for op in pickletools.opcodes if op.code == str(code, "latin-1")), None)
                if name is None:
                    raise _RefusedError("is not a pickle")
                raise _RefusedError(f"uses the pickle opcode {name}, which no file of CIFAR does, and was not run")
        raise _RefusedError(f"has more than {MAX_OPCODES:,} pickle opcodes, more than any file of CIFAR")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes. Checked before anything is allocated."""
        start, end = self.at, self.at + count
        if count < 0 or end > len(self.data):
            raise _RefusedError("is truncated")
        self.at = end
        return self.view[start:end]

    def number(self, form: str) -> int:
        try:
            value: int = struct.unpack_from(form, self.data, self.at)[0]
        except struct.error:
            raise _RefusedError("is truncated") from None
        self.at += struct.calcsize(form)
        return value

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise _RefusedError("is truncated")
        line = self.data[self.at : end]
        self.at = end + 1
        return line

    def old_string(self, length: int) -> str | memoryview:
        view = self.take(length)
        return str(view, "latin-1") if length < _SHORT else view

    def bytes_of(self, length: int) -> bytes | memoryview:
        view = self.take(length)
        return bytes(view) if length < _SHORT else view

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def top(self, kind: type) -> Any:
        # By type and not by isinstance: nothing but what this machine itself has made is ever changed.
        if type(self.stack[-1]) is not kind:
            raise _RefusedError("is not a whole pickle")
        return self.stack[-1]

    def fill(self, target: dict[str, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is bytes:  # what a Python 2 file read with encoding="bytes" becomes
                key = key.decode("latin-1")
            if type(key) is not str:
                raise _RefusedError(f"has a dictionary key of type {type(key).__name__.lstrip('_')}")
            target[key] = value

    def mention(self, module: Any, attribute: Any, *, call: bool) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise _RefusedError("is not a whole pickle")
        wanted = f"{module}.{attribute}"
        if wanted not in _NAMES or call:
            raise _RefusedError(f"asks for {wanted[:80]!r}, which no file of CIFAR needs, and was not run")
        self.stack.append(_NAMES[wanted])

    def reduce(self, callee: Any, arguments: Any) -> Any:
        """What `callee(*arguments)` would give, for the calls that an array of bytes is made of."""
        match arguments:
            case (first, _, _) if callee is _RECONSTRUCT and first is _NDARRAY:
                return _Array()
            case (str(kind) | bytes(kind), *_) if callee is _DTYPE:
                if kind not in ("u1", "|u1", "uint8", b"u1"):
                    raise _RefusedError(f"has an array of dtype {kind[:20]!r}, where CIFAR has 'u1' (uint8)")
                return _Uint8()
            case (str(text), "latin1" | "latin-1") if callee is _ENCODE:
                return self.encode(text)
            case (payload, dtype, shape, "C" | "F" as order) if callee is _FROMBUFFER:
                return self.array(payload, dtype, shape, order)
            case (payload, dtype, shape, "C" | "F" as order, None) if callee is _FROMBUFFER:  # numpy 2.3: axis order
                return self.array(payload, dtype, shape, order)
        raise _RefusedError("calls something in a way that no file of CIFAR does, and was not run")

    def build(self, target: Any, state: Any) -> None:
        if type(target) is _Uint8 and type(state) is tuple:
            return  # byte order and alignment: a byte has neither
        if type(target) is not _Array or target.value is not None or type(state) is not tuple or len(state) != 5:
            raise _RefusedError("sets the state of something that is not an array, and was not run")
        _, shape, dtype, fortran, payload = state
        target.value = self.array(payload, dtype, shape, "F" if fortran else "C")

    def encode(self, text: str) -> bytes:
        # A long text in the memo could be encoded again and again, which would take more memory than the file has.
        self.copied += len(text)
        if self.copied > MAX_BYTES:
            raise _RefusedError("expands to more bytes than any file of CIFAR")
        return text.encode("latin-1")

    def array(self, payload: Any, dtype: Any, shape: Any, order: Any) -> UInt8Array:
        if type(dtype) is not _Uint8:
            raise _RefusedError("has an array whose dtype is not uint8")
        if type(shape) is not tuple or len(shape) not in (1, 2) or not all(type(n) is int and n >= 0 for n in shape):
            raise _RefusedError("has an array that has not one or two dimensions")
        if type(payload) is str:
            payload = self.encode(payload)
        if type(payload) not in (bytes, memoryview):
            raise _RefusedError("has an array whose contents are not bytes")
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        if size != len(payload):
            raise _RefusedError(f"has an array of shape {shape} with {len(payload):,} bytes instead of {size:,}")
        return np.frombuffer(payload, np.uint8).reshape(shape, order=order)
