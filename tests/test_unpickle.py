"""The restricted reader of pickles: what CIFAR's files hold is read as `pickle` reads it, and nothing else runs."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_files import pickled, python2_pickle, python2_text_pickle, python_batches, tiny
from cifarlab.data.unpickle import read_pickle
from cifarlab.errors import DataError

PIXELS = np.arange(6 * 3072, dtype=np.uint32).astype(np.uint8).reshape(6, 3072)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == np.uint8
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", ["official", 0, 1, 2, 3, 4, 5])
def test_batches_are_read_as_pickle_reads_them(name: str, protocol: int | str) -> None:
    for file, batch in python_batches(tiny(name)).items():
        data = pickled(batch, protocol)
        found = read_pickle(data, file)
        assert_same(found, batch)
        assert_same(found, pickle.loads(data, encoding="latin1"))


@pytest.mark.parametrize("protocol", range(6))
def test_keys_that_were_read_as_bytes_and_rewritten_are_text_again(protocol: int) -> None:
    # What `pickle.load(file, encoding="bytes")` and `pickle.dump` make of an official file.
    batch = {b"data": PIXELS, b"labels": [1, 2, 3, 4, 5, 300_000]}
    assert_same(read_pickle(pickle.dumps(batch, protocol), "f"), {"data": PIXELS, "labels": [1, 2, 3, 4, 5, 300_000]})


@pytest.mark.parametrize("protocol", range(6))
def test_an_array_in_fortran_order_keeps_its_shape_and_values(protocol: int) -> None:
    batch = {"data": np.asfortranarray(PIXELS)}
    assert_same(read_pickle(pickle.dumps(batch, protocol), "f"), batch)


@given(
    st.dictionaries(
        st.text("abc_", max_size=8),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.text(max_size=20),
            st.none() | st.booleans(),
            st.lists(st.integers(-70_000, 70_000) | st.text(max_size=5), max_size=6),
        ),
        max_size=5,
    ),
    st.integers(0, 5),
)
def test_any_plain_data_is_read_as_pickle_reads_it(value: dict[str, Any], protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert read_pickle(data, "f") == value == pickle.loads(data)


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_and_never_crash(data: bytes) -> None:
    for prefix in (b"", b"\x80\x02}q\x01(U\x01a"):
        try:
            assert isinstance(read_pickle(prefix + data, "f"), dict)
        except DataError as error:
            assert str(error).startswith("f ")


@pytest.mark.parametrize("protocol", ["official", 0, 4])
def test_a_file_that_is_cut_off_anywhere_is_refused(protocol: int | str) -> None:
    data = pickled(python_batches(tiny("cifar10", train=5))["data_batch_1"], protocol)
    cuts = [*range(200), *range(200, len(data), 101), len(data) - 1]
    for cut in cuts:
        with pytest.raises(DataError, match=r"^a/data_batch_1 "):
            read_pickle(data[:cut], "a/data_batch_1")


# --- What a hostile file would do -------------------------------------------------------------------------------------


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that create the folder `marker` when pickle reads them, and the name that the refusal must tell."""
    shell = f"mkdir {marker}"
    path = str(marker).encode()
    nested = Call(getattr, Call(__import__, "os"), "mkdir")
    return {
        "os.system": (pickle.dumps({"data": Call(os.system, shell)}), f"{os.name}.system"),
        "protocol 0": (pickle.dumps({"data": Call(os.mkdir, str(marker))}, 0), f"{os.name}.mkdir"),
        "eval": (pickle.dumps({"data": Call(eval, f"__import__('os').mkdir({str(marker)!r})")}), "builtins.eval"),
        "nested": (pickle.dumps({"data": Call(map, nested, [str(marker)])}), "builtins.map"),
        "instance": (b"(dS'data'\n(S'%s'\nios\nmkdir\ns." % path, "os.mkdir"),
        "object": (b"}U\x04data(cos\nmkdir\nU" + bytes([len(path)]) + path + b"os.", "os.mkdir"),
        "python 2 name": (b"}U\x04datacposix\nmkdir\nU" + bytes([len(path)]) + path + b"\x85Rs.", "posix.mkdir"),
        # An admitted module, an attribute of it that leads further.
        "through numpy": (
            b"\x80\x04}\x8c\x04data\x8c\x0anumpy.core\x8c\x13multiarray.os.mkdir\x93\x85Rs.",
            "numpy.core.multiarray.os.mkdir",
        ),
    }


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_a_pickle_that_would_run_something_is_refused_named_and_not_run(tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "was_run"
    data, wanted = attacks(marker)[attack]
    with pytest.raises(DataError, match=r"^bad\.pickle ") as caught:
        read_pickle(data, "bad.pickle")
    assert wanted in str(caught.value)
    assert "not run" in str(caught.value)
    assert not marker.exists()


def test_the_attacks_would_work_against_pickle_itself(tmp_path: Path) -> None:
    for number, attack in enumerate(["os.system", "protocol 0", "eval"]):
        marker = tmp_path / str(number)
        pickle.loads(attacks(marker)[attack][0])
        assert marker.is_dir()


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"


def array(shape: bytes, payload: bytes, dtype: bytes = DTYPE, version: bytes = b"K\x01") -> bytes:
    return b"}U\x04data" + RECONSTRUCT + b"(" + version + shape + dtype + b"\x89" + payload + b"tbs."


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (array(b"K\x02K\x03\x86", b"U\x06abcdef", DTYPE.replace(b"u1", b"O8")), "dtype 'O8'"),
        (array(b"K\x02K\x03\x86", b"]", DTYPE.replace(b"u1", b"O8")), "dtype 'O8'"),
        (array(b"K\x02K\x03\x86", b"U\x06abcdef", DTYPE.replace(b"u1", b"f8")), "dtype 'f8'"),
        (array(b"K\x02K\x03\x86", b"U\x05abcde"), "5 bytes instead of 6"),
        (array(b"K\x02K\x03\x86", b"U\x07abcdefg"), "7 bytes instead of 6"),
        (array(b"K\x01K\x02K\x03\x87", b"U\x06abcdef"), "one or two dimensions"),
        (array(b")", b"U\x01a"), "one or two dimensions"),
        (array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", b"U\x01a"), "one or two dimensions"),
        (array(b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x02\x86", b"U\x01a"), "1 bytes instead of"),
        (array(b"K\x02\x88\x86", b"U\x02ab"), "one or two dimensions"),
        (array(b"K\x06\x85", b"](K\x01K\x02K\x03K\x04K\x05K\x06e"), "not bytes"),
        (array(b"K\x06\x85", b"U\x06abcdef", b"N"), "not uint8"),
        (b"}U\x04data" + RECONSTRUCT + b"s.", "without contents"),
        (b"}U\x04datacnumpy\nndarray\ns.", "a type as a value"),
        (b"}U\x04data" + DTYPE + b"s.", "a type as a value"),
        # Setting state: of a function, a type, a dictionary, a finished array.
        (b"}U\x04datacnumpy\ndtype\n}U\x07__doc__U\x01xsbs.", "sets the state"),
        (b"}U\x04data}}U\x01aK\x01sbs.", "sets the state"),
        (array(b"K\x01\x85", b"U\x01a")[:-2] + b"(K\x01K\x01\x85" + DTYPE + b"\x89U\x01btbs.", "sets the state"),
        # Calling what is admitted with something else.
        (b"}U\x04datacnumpy\ndtype\nU\x02u1\x85\x85Rs.", "calls something"),
        (b"}U\x04datacnumpy\nndarray\nK\x05\x85Rs.", "calls something"),
        (b"}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87Rs.", "calls something"),
        (b"}U\x04datac_codecs\nencode\nU\x01aU\x08punycode\x86Rs.", "calls something"),
        (b"}U\x04datac_codecs\nencode\n]U\x06latin1\x86Rs.", "calls something"),
        (b"}U\x04dataU\x01a)Rs.", "calls something"),
        (b"(dS'data'\n(inumpy\nndarray\ns.", "asks for 'numpy.ndarray'"),
        # Opcodes that no file needs.
        (b"}U\x04dataPpersistent\ns.", "PERSID"),
        (b"}U\x04dataU\x01aQs.", "BINPERSID"),
        (b"}U\x04data\x82\x01s.", "EXT1"),
        (b"}U\x04datacnumpy\nndarray\n)\x81s.", "NEWOBJ"),
        (b"}U\x04data\x97s.", "NEXT_BUFFER"),
        (b"}U\x04dataS'\\x41'\ns.", "a string in a form"),
        (b"}U\x04data\x8a\x09" + b"\x7f" * 9 + b"s.", "an integer of 9 bytes"),
        (b"\x80\x09}.", "protocol 9"),
        # Not a dictionary of texts.
        (b"].", "holds a list"),
        (b"}K\x01K\x02s.", "dictionary key of type int"),
        (b"}]K\x02s.", "dictionary key of type list"),
        (b"", "truncated"),
        (b"\xff", "not a pickle"),
        (b"<!DOCTYPE html>", "not a pickle"),
    ],
)
def test_what_no_file_of_cifar_holds_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=r"^f .*again") as caught:
        read_pickle(data, "f")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}U\x04dataT" + struct.pack("<i", 2**31 - 1) + b"abcs.",
        b"\x80\x02}U\x04dataT" + struct.pack("<i", -5) + b"abcs.",
        b"\x80\x04}\x8c\x04dataB" + struct.pack("<I", 2**32 - 1) + b"abcs.",
        b"\x80\x04}\x8c\x04data\x8e" + struct.pack("<Q", 2**62) + b"abcs.",
        b"\x80\x05}\x8c\x04data\x96" + struct.pack("<Q", 2**40) + b"abcs.",
        b"\x80\x04}\x8c\x04data\x8d" + struct.pack("<Q", 2**64 - 1) + b"abcs.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"}\x8c\x04dataK",
        # A memo index for which the C implementation of many Pythons allocates 64 GB. It is only a number here.
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"U\x01aK",
    ],
)
def test_a_length_that_the_file_does_not_have_takes_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^f is truncated"):
            read_pickle(data, "f")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_short_text_that_is_encoded_again_and_again_stops_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.data.unpickle.MAX_BYTES", 20_000)
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000
    once = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"
    bomb = b"\x80\x02}U\x04data](" + text + b"q\x01" + once * 100 + b"es."
    with pytest.raises(DataError, match="expands to more bytes"):
        read_pickle(bomb, "f")


def test_more_bytes_and_more_opcodes_than_any_file_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.data.unpickle.MAX_OPCODES", 100)
    assert read_pickle(b"}U\x01a](" + b"K\x01" * 90 + b"es.", "f") == {"a": [1] * 90}
    with pytest.raises(DataError, match="more than 100 pickle opcodes"):
        read_pickle(b"}U\x01a](" + b"K\x01" * 100 + b"es.", "f")
    monkeypatch.setattr("cifarlab.data.unpickle.MAX_BYTES", 10)
    with pytest.raises(DataError, match="has 11 bytes"):
        read_pickle(b"0" * 11, "f")


def test_deep_nesting_is_data_or_refused_but_no_recursion() -> None:
    deep = b"]" * 50_000 + b"a" * 49_999
    with pytest.raises(DataError, match="holds a list"):
        read_pickle(deep + b".", "f")
    tuples = b"N" + b"\x85" * 50_000
    with pytest.raises(DataError, match="one or two dimensions"):
        read_pickle(array(tuples, b"U\x01a"), "f")
    with pytest.raises(DataError, match="not a whole pickle"):
        read_pickle(b"}U\x01a" + tuples + b"U\x01b\x93s.", "f")


def test_the_pixels_are_views_of_the_file_and_not_copies() -> None:
    data = python2_pickle({"data": PIXELS})
    tracemalloc.start()
    try:
        found = read_pickle(data, "f")["data"]
        assert tracemalloc.get_traced_memory()[1] < PIXELS.nbytes / 2
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, PIXELS)
    assert not found.flags.writeable


def test_the_writers_of_these_tests_write_what_pickle_reads() -> None:
    batch = {"data": PIXELS, "labels": [0, 255, 256, 70_000], "batch_label": "x" * 300}
    assert_same(pickle.loads(python2_pickle(batch), encoding="latin1"), batch)
    meta = {"label_names": ["a", "b"], "num_vis": 3072}
    assert pickle.loads(python2_text_pickle(meta), encoding="latin1") == meta
