"""Data and recipes made to do harm: nothing runs, waits for ever, takes all memory or is written outside; one sentence.

What is wrong in the ordinary way (cut off, incomplete, of another shape) is in the tests of the readers.
"""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import re
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from cifar_files import (
    CIFAR10_NAMES,
    add_member,
    parquet_columns,
    pickled,
    python_batches,
    tiny,
    write_archive,
    write_binary,
    write_parquet,
    write_parquet_file,
    write_python,
)
from cifarlab.data import folder as image_folder
from cifarlab.data.cifar import read_cifar
from cifarlab.data.cifar_kept import read_or_recall
from cifarlab.data.dataset import Dataset
from cifarlab.data.folder import read_folder
from cifarlab.download import AnnouncedFile, Courier, Patience, Source, Wanted, deliver
from cifarlab.errors import CifarlabError, DataError, DownloadError, RecipeError
from cifarlab.recipe import load_recipe, make_recipe, parse_yaml
from command import call
from fuzz import ended_after
from local_server import Server, forget_settings, serving, status


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What waits, or takes 4 GB more than there is, fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 4_000_000_000, limits[1]))
    try:
        with ended_after(10):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refusal(action: Callable[[], object], kind: type[CifarlabError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


def everything(place: Path) -> list[Path]:
    return sorted(place.rglob("*"))


# --- What is no file --------------------------------------------------------------------------------------------------


def put_special(path: Path, kind: str) -> None:
    """A pipe that nobody writes to, a link to a device without end, a folder, a link to itself."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)


SPECIAL = ["pipe", "device", "folder", "loop"]
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_python, "data_batch_1"),
        (write_python, "batches.meta"),
        (write_binary, "test_batch.bin"),
        (write_binary, "batches.meta.txt"),
        (write_parquet, "train-00000-of-00001.parquet"),
        (write_parquet, "test-00000-of-00001.parquet"),
    ],
)
def test_what_is_no_file_in_place_of_one_of_cifar_is_named(
    tmp_path: Path, write: Callable[[Any, Path], Path], name: str, kind: str
) -> None:
    folder = write(tiny("cifar10", train=10, test=10), tmp_path / "in")
    put_special(folder / name, kind)
    for read in (read_cifar, functools.partial(read_or_recall, cache=tmp_path / "cache", report=print)):
        message = refusal(functools.partial(read, "cifar10", tmp_path / "in"))
        assert name in message and str(folder) in message
    assert not list((tmp_path / "cache").glob("*.npz"))


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_in_place_of_an_archive_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    put_special(tmp_path / "in" / "cifar-10-python.tar.gz", kind)
    for read in (read_cifar, functools.partial(read_or_recall, cache=tmp_path / "cache", report=print)):
        message = refusal(functools.partial(read, "cifar10", tmp_path / "in"))
        assert message.startswith(f"cannot read {tmp_path / 'in' / 'cifar-10-python.tar.gz'}: ")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_in_place_of_a_note_on_the_source_is_passed_over(tmp_path: Path, kind: str) -> None:
    folder = write_binary(tiny("cifar10", train=10, test=10), tmp_path)
    put_special(folder / "cifarlab-source.txt", kind)
    dataset = read_cifar("cifar10", tmp_path)
    assert dataset is not None and dataset.source == f"binary files in {folder}"


def test_a_note_on_the_source_is_one_short_line_whatever_it_holds(tmp_path: Path) -> None:
    folder = write_binary(tiny("cifar10", train=10, test=10), tmp_path)
    with (folder / "cifarlab-source.txt").open("wb") as file:
        file.write(b"a mirror\nand more")
        file.truncate(2**36)
    dataset = read_cifar("cifar10", tmp_path)
    assert dataset is not None and "downloaded from a mirror and more" in dataset.source
    assert "\n" not in dataset.source and len(dataset.source) < 1000
    (folder / "cifarlab-source.txt").write_bytes(b"\xff is not UTF-8")
    dataset = read_cifar("cifar10", tmp_path)
    assert dataset is not None and dataset.source == f"binary files in {folder}"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_in_place_of_what_was_kept_is_replaced(tmp_path: Path, kind: str) -> None:
    write_archive(tiny("cifar10", train=10, test=10), tmp_path / "in")
    first = read_or_recall("cifar10", tmp_path / "in", tmp_path / "cache", print)
    (kept,) = (tmp_path / "cache").glob("*.npz")
    put_special(kept, kind)
    again = read_or_recall("cifar10", tmp_path / "in", tmp_path / "cache", print)
    assert first is not None and again is not None and again.content_hash() == first.content_hash()
    assert kept.is_file() and not kept.is_symlink()


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_no_recipe(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.yaml"
    put_special(path, kind)
    assert refusal(lambda: load_recipe(str(path)), RecipeError).startswith(f"cannot read the recipe {path}: ")


# --- Class names ------------------------------------------------------------------------------------------------------

UNPRINTABLE = ["\x1b[31mred\x1b[0m", "two\nlines", "\ud800", "\udcff", "\0", "right\u202eleft", "\x9b2J", "x" * 10_000]
ODD = ["<script>alert(1)</script>", "=cmd()", "[red]", "[/]", "../x", "a|b", "Größe", "%s{0}", "..x", "#"]


def written_names(form: str, place: Path, names: list[str]) -> None:
    data = tiny("cifar10", train=10, test=10)
    match form:
        case "python":
            folder = write_python(data, place)
            (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 0))
        case "binary":
            folder = write_binary(data, place)
            text = "\n".join(name.replace("\n", "") for name in names)
            (folder / "batches.meta.txt").write_bytes(text.encode(errors="surrogatepass"))
        case "parquet":
            folder = write_parquet(data, place)
            columns = parquet_columns(data, data.train)
            write_parquet_file(folder / "train-00000-of-00001.parquet", columns, names)


@pytest.mark.parametrize("name", UNPRINTABLE)
@pytest.mark.parametrize("form", ["python", "parquet"])
def test_a_class_name_that_cannot_be_printed_or_is_endless_is_refused(tmp_path: Path, form: str, name: str) -> None:
    written_names(form, tmp_path, [*CIFAR10_NAMES[:9], name])
    message = refusal(lambda: read_cifar("cifar10", tmp_path))
    assert "has the class name" in message and "can be printed" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["\x1b[31mred", "\ud800", "\x00", "x" * 10_000])
def test_nor_is_one_read_from_a_text_file(tmp_path: Path, name: str) -> None:
    written_names("binary", tmp_path, [*CIFAR10_NAMES[:9], name])
    assert refusal(lambda: read_cifar("cifar10", tmp_path)).isprintable()


def test_a_text_file_of_millions_of_names_is_not_split(tmp_path: Path) -> None:
    folder = write_binary(tiny("cifar10", train=10, test=10), tmp_path)
    (folder / "batches.meta.txt").write_bytes(b"a\n" * 100_000_000)
    assert "has 200,000,000 bytes, where some names were expected" in refusal(lambda: read_cifar("cifar10", tmp_path))


@pytest.mark.parametrize("form", ["python", "binary", "parquet"])
def test_odd_names_are_names(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written_names(form, tmp_path, ODD)
    dataset = read_cifar("cifar10", tmp_path)
    assert dataset is not None and dataset.classes == tuple(ODD)
    code, output, error = call(capsys, monkeypatch, "data", "info", "cifar10", "--data", tmp_path)
    assert (code, error) == (0, "")
    assert f"10 classes: {', '.join(ODD)}" in output


# --- Archives ---------------------------------------------------------------------------------------------------------


def archive_of(place: Path, *before: dict[str, Any], instead: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """A CIFAR-10 archive with members before the first batch, and others instead of some files."""
    place.mkdir()
    path = place / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for fields in before:
            add_member(archive, **fields)
        for name, batch in python_batches(tiny("cifar10", train=10, test=10)).items():
            if instead and name in instead:
                for fields in instead[name]:
                    add_member(archive, **fields)
            else:
                add_member(archive, f"cifar-10-batches-py/{name}", pickled(batch))
    return path


BATCH = "cifar-10-batches-py/data_batch_3"
# A hard link to a symbolic link passes tar's own `data` filter on Python 3.11 to 3.13 (CVE-2025-4330), and leads out.
LINKS: list[list[dict[str, Any]]] = [
    [{"name": BATCH, "type": tarfile.SYMTYPE, "linkname": "../../../outside"}],
    [{"name": BATCH, "type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}],
    [
        {"name": "cifar-10-batches-py/soft", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"name": BATCH, "type": tarfile.LNKTYPE, "linkname": "cifar-10-batches-py/soft"},
    ],
    [
        {"name": "cifar-10-batches-py/d/" * 20 + "soft", "type": tarfile.SYMTYPE, "linkname": "../" * 30 + "outside"},
        {"name": BATCH, "type": tarfile.LNKTYPE, "linkname": "cifar-10-batches-py/d/" * 20 + "soft"},
    ],
    [{"name": BATCH, "type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0}],
    [{"name": BATCH, "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}],
    [{"name": BATCH, "type": tarfile.FIFOTYPE}],
    [{"name": BATCH, "type": tarfile.CONTTYPE}],
]


@pytest.mark.parametrize("members", LINKS)
def test_a_batch_that_is_a_link_or_a_device_is_refused_and_nothing_is_written(
    tmp_path: Path, members: list[dict[str, Any]]
) -> None:
    archive_of(tmp_path / "in", instead={"data_batch_3": members})
    (tmp_path / "outside").write_bytes(b"as it was")
    before = everything(tmp_path)
    message = refusal(lambda: read_cifar("cifar10", tmp_path / "in"))
    assert message.endswith(f"{BATCH} is not a regular file; get the archive again")
    assert everything(tmp_path) == before and (tmp_path / "outside").read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "name",
    [
        "../data_batch_3", "/cifar-10-batches-py/data_batch_3", "cifar-10-batches-py/../data_batch_3",
        "cifar-10-batches-py/./data_batch_3", "cifar-10-batches-py//data_batch_3", "CIFAR-10-batches-py/data_batch_3",
        "cifar-10-batches-py/DATA_BATCH_3", "cifar-10-batches-py\\data_batch_3", "C:cifar-10-batches-py/data_batch_3",
        "cifar-10-batches-py/data_batch_3\0x",
    ],
)  # fmt: skip
def test_only_the_official_name_is_taken_for_a_batch(tmp_path: Path, name: str) -> None:
    batch = pickled(python_batches(tiny("cifar10", train=10, test=10))["data_batch_3"])
    other = {"name": name, "data": batch}
    archive_of(tmp_path / "a", instead={"data_batch_3": [other]})
    before = everything(tmp_path)
    if "\0" in name:  # which ends a name
        assert read_cifar("cifar10", tmp_path / "a") is not None
    else:
        assert "data_batch_3 missing" in refusal(lambda: read_cifar("cifar10", tmp_path / "a"))
        # Beside the right one it is no second one either.
        archive_of(tmp_path / "b", {"name": name, "data": b"not a pickle"})
        before = everything(tmp_path)
        dataset = read_cifar("cifar10", tmp_path / "b")
        assert dataset is not None and len(dataset.train) == 10
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**62)},
        {"GNU.sparse.map": "-512,1024,0,512", "GNU.sparse.size": "512"},
        {"GNU.sparse.map": f"0,{2**62},{2**62},1", "GNU.sparse.size": str(2**63)},
        {"GNU.sparse.offset": "-1", "GNU.sparse.numbytes": "-1", "GNU.sparse.size": "9"},
        {"size": str(2**62)},
        {"size": "-1"},
        {"size": "nan"},
        {"path": "/cifar-10-batches-py/data_batch_3"},
        {"linkpath": "/etc/passwd", "hdrcharset": "BINARY"},
        {"mtime": "1" * 5000},
    ],
)
def test_what_pax_headers_say_neither_loops_nor_leads_out(tmp_path: Path, records: dict[str, str]) -> None:
    batch = pickled(python_batches(tiny("cifar10", train=10, test=10))["data_batch_3"])
    archive_of(tmp_path / "in", instead={"data_batch_3": [{"name": BATCH, "data": batch, "pax_headers": records}]})
    before = everything(tmp_path)
    try:
        read_cifar("cifar10", tmp_path / "in")
    except DataError as error:
        assert "cifar-10-python.tar.gz" in str(error) and "again" in str(error)
    assert everything(tmp_path) == before


LONG = [
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
]


@pytest.mark.parametrize("kind", LONG)
def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    # A megabyte of digits takes tarfile half an hour before Python 3.11.10 and 3.12.6 (CVE-2024-6232).
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 2**20
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(
        gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + b"1" * 2**20, 1)
    )
    assert "truncated or damaged (a header of 1,048,576 bytes)" in refusal(lambda: read_cifar("cifar10", tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"pax_headers": {"size": "9" * 30}},
        {"size": 2**70},
        {"size": 2**70, "type": tarfile.GNUTYPE_SPARSE},
        {"type": b"Z", "size": 2**60},
        {"pax_headers": {"size": "9" * 30, "GNU.sparse.size": "1"}},
    ],
)
def test_a_member_that_ends_nowhere_is_not_looked_for(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = archive_of(tmp_path / "in", {"name": "readme", **fields})
    message = refusal(lambda: read_cifar("cifar10", tmp_path / "in"))
    assert str(path) in message and "again" in message


def test_many_headers_before_one_member_end(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1000
    chain = (header.tobuf(tarfile.USTAR_FORMAT) + (b"1" * 1000).ljust(1024, b"\0")) * 30
    # One that tarfile passes over, and the member.
    chain += tarfile.TarInfo("y").tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(chain * 900, 1))
    assert "truncated or damaged" in refusal(lambda: read_cifar("cifar10", tmp_path))


def test_headers_are_counted_for_each_archive(tmp_path: Path) -> None:
    others = [{"name": f"readme-{number}", "pax_headers": {"comment": "x"}} for number in range(150)]
    archive_of(tmp_path / "in", *others)
    for _ in range(2):
        assert read_cifar("cifar10", tmp_path / "in") is not None
    archive_of(tmp_path / "more", *others, *others)
    assert "more than 200 headers" in refusal(lambda: read_cifar("cifar10", tmp_path / "more"))


@pytest.mark.parametrize("size", [2**28 + 1, 2**40, -1])
def test_a_batch_that_is_larger_than_any_of_cifar_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    archive_of(tmp_path / "in", instead={"data_batch_3": [{"name": BATCH, "size": size}]})
    message = refusal(lambda: read_cifar("cifar10", tmp_path / "in"))
    assert f"{BATCH} has {size:,} bytes, which no file of CIFAR has" in message


def test_a_bomb_of_a_gigabyte_is_stopped_at_a_limit_that_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = {"name": "zeros", "data": bytes(3_000_000)}
    path = archive_of(tmp_path / "in", zeros)
    monkeypatch.setenv("CIFARLAB_MAX_MB", "2")
    assert refusal(lambda: read_cifar("cifar10", tmp_path / "in")) == (
        f"{path} unpacks to more than 2,000,000 bytes, and the whole of CIFAR has 184,000,000; get it again, or allow "
        "more (MB) with CIFARLAB_MAX_MB"
    )
    monkeypatch.setenv("CIFARLAB_MAX_MB", "20")
    assert read_cifar("cifar10", tmp_path / "in") is not None
    monkeypatch.delenv("CIFARLAB_MAX_MB")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole, 1) + gzip.compress(bytes(10_000_000), 1) * 100)
    assert "unpacks to more than 536,870,912 bytes" in refusal(lambda: read_cifar("cifar10", tmp_path / "in"))


@pytest.mark.parametrize("value", ["0", "-5", "1e9", "many", "\x1b[31m", "9" * 5000])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    archive_of(tmp_path / "in")
    monkeypatch.setenv("CIFARLAB_MAX_MB", value)
    message = refusal(lambda: read_cifar("cifar10", tmp_path / "in"))
    assert message.startswith("CIFARLAB_MAX_MB is ") and "expected a whole number of MB" in message


# --- Parquet ----------------------------------------------------------------------------------------------------------


def write_bomb(place: Path, column: str, encoding: str) -> Path:
    """A train file of some kB in which one column is one value of 8 MB, 4,000 times: 34 GB once unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tiny("cifar10", train=10, test=10)
    path = write_parquet(data, place) / "train-00000-of-00001.parquet"
    rows = 4000
    value = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([bytes(2**23)], pa.binary()))
    plain = pa.array([b"x"] * rows, pa.binary())
    columns: dict[str, Any] = {
        "img": pa.StructArray.from_arrays(
            [value if column == name else plain for name in ("bytes", "path")], ["bytes", "path"]
        ),
        "label": value if column == "label" else [0] * rows,
    }
    if encoding != "dictionary":
        text = pa.array([bytes(2**20)] * 200, pa.binary())
        columns = {"img": pa.StructArray.from_arrays([text], ["bytes"]), "label": [0] * 200}
    options: dict[str, Any] = {"use_dictionary": True}
    if encoding != "dictionary":
        options = {"use_dictionary": False, "column_encoding": {"img.bytes": encoding, "label": "PLAIN"}}
    # Without the schema that pyarrow adds, which would say that it is a dictionary.
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False, **options)
    assert path.stat().st_size < 1_000_000
    return path


@pytest.mark.parametrize(
    ("column", "encoding", "reason"),
    [
        ("bytes", "dictionary", "image 0 is not a PNG of at most 65,536 bytes"),
        ("path", "dictionary", "image 0 is not a PNG that can be read"),
        ("label", "dictionary", "no INT32 or INT64 in its column 'label'"),
        ("bytes", "DELTA_BYTE_ARRAY", "is damaged"),
        ("bytes", "DELTA_LENGTH_BYTE_ARRAY", "is damaged"),
    ],
)
def test_a_value_that_is_there_a_thousand_times_takes_its_room_once(
    tmp_path: Path, column: str, encoding: str, reason: str
) -> None:
    import pyarrow as pa

    path = write_bomb(tmp_path, column, encoding)
    before = pa.default_memory_pool().max_memory()
    message = refusal(lambda: read_cifar("cifar10", tmp_path))
    assert str(path) in message and reason in message
    if encoding == "dictionary":
        assert pa.default_memory_pool().max_memory() <= max(before, 300_000_000)


def test_a_parquet_file_that_says_to_unpack_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_parquet(tiny("cifar10", train=400, test=10), tmp_path)
    monkeypatch.setenv("CIFARLAB_MAX_MB", "1")
    message = refusal(lambda: read_cifar("cifar10", tmp_path))
    assert message.startswith(f"{folder / 'train-00000-of-00001.parquet'} unpacks to more than 1,000,000 bytes")
    monkeypatch.setenv("CIFARLAB_MAX_MB", "2")
    assert read_cifar("cifar10", tmp_path) is not None


# --- Recipes ----------------------------------------------------------------------------------------------------------

GOOD = load_recipe("ex1").to_yaml()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "line 2, column 8: not valid YAML: aliases"),
        ("a: &a {b: *a}", "aliases (*name) are not used in recipes"),
        ("<<: {name: x}\nname: y\nname: z", "the key 'name' stands twice"),
        (f"{'k' * 1000}: 1\n{'k' * 1000}: 2", "kkk...' stands twice"),
        ("a: !!python/object/apply:os.mkdir [marker]", "could not determine a constructor"),
        ("a: !!python/object/new:os.mkdir [marker]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("!!python/object/apply:builtins.eval ['__import__(\"os\").mkdir(\"marker\")']", "could not determine"),
        ("[" * 3000, "nested too deeply"),
        ("{a: " * 3000, "nested too deeply"),
        ("- " * 3000, "nested too deeply"),
        ("a: 0x" + "f" * 10_000, "line 1, column 4: not valid YAML: an integer of more than 64 bits"),
        ("a: 0b" + "1" * 65, "an integer of more than 64 bits"),
        ("a: " + "9" * 5000, "an integer of more than 64 bits"),
        ("a: " + "1:" * 40_000 + "0", "an integer of more than 64 bits"),
        ("a: -9223372036854775809", "an integer of more than 64 bits"),
        ("a: !!int '0x" + "f" * 99 + "'", "an integer of more than 64 bits"),
        ("a\0b: 1", "special characters are not allowed"),
        ("# " + "x" * 100_000, "is larger than 100,000 bytes"),
        (GOOD.replace("name: ex1", 'name: "a\\0b"', 1), "name: must be letters"),
        (GOOD.replace("name: ex1", f"name: {'x' * 5000}", 1), "name: string should have at most 100 characters"),
        (GOOD + "\x1b[31m: 1", "special characters are not allowed"),
        (GOOD + '"\\e[31m\\n": 1', "unknown key '?[31m?'"),
        (GOOD + '"\\ud800": 1', "mine.yaml: expected a valid string, unable to parse raw data as a unicode string"),
        (GOOD + f"{'y' * 1000}: 1", "unknown key 'yyyy"),
        (GOOD + "1: 2", "key"),
        (GOOD.replace("datasets: [cifar10", 'datasets: ["folder:\\0"', 1), "a character that no path can have"),
        (GOOD.replace("datasets: [cifar10", 'datasets: ["folder:\\ud800"', 1), "a character that no path can have"),
        (GOOD.replace("datasets: [cifar10", f"datasets: [{'x' * 5000}", 1), "unknown dataset 'xxx"),
        (re.sub("pretrained: false", 'pretrained: "a\\\\0.pth"', GOOD), "expected true, false or the path"),
        (re.sub("epochs: [0-9]+", "epochs: 1e999", GOOD, count=1), "train.epochs: expected a"),
        (re.sub("lr: [0-9.e-]+", "lr: .inf", GOOD, count=1), "optimizer.lr: expected"),
    ],
)  # fmt: skip
def test_a_recipe_made_to_do_harm_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    before = everything(tmp_path)
    message = refusal(lambda: load_recipe(str(path)), RecipeError)
    assert sentence in message and message.isprintable()
    assert everything(tmp_path) == before


def test_a_recipe_in_another_encoding_or_of_100_mb_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(GOOD.encode("utf-16"))
    assert "is not a UTF-8 text file" in refusal(lambda: load_recipe(str(path)), RecipeError)
    path.write_bytes(GOOD.encode("utf-16-le"))
    assert "not valid YAML" in refusal(lambda: load_recipe(str(path)), RecipeError)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(str(path)) == load_recipe("ex1")
    os.truncate(path, 10**8)
    assert "larger than 100,000 bytes" in refusal(lambda: load_recipe(str(path)), RecipeError)


def test_a_recipe_that_is_as_long_as_allowed_is_read_in_seconds() -> None:
    for text in ("[" + "1," * 10_000 + "1]", "? " * 40_000, "[" * 100_000, "'" + "\n" * 99_000, "# \n" * 30_000):
        refusal(lambda text=text: make_recipe(parse_yaml(text, "x")), RecipeError)  # type: ignore[misc]


def test_a_longer_one_is_not_parsed_wherever_it_stands() -> None:
    for text in ("x" * 100_001, "- " * 500_000):
        message = refusal(lambda text=text: parse_yaml(text, "a run's"), RecipeError)  # type: ignore[misc]
        assert message == "a run's: more than 100,000 characters; a recipe is a small YAML file"


def test_integers_of_64_bits_are_read() -> None:
    text = "{a: 9223372036854775807, b: -9223372036854775808, c: 0x7fffffffffffffff, d: 1_000, e: 1:30}"
    assert parse_yaml(text, "x") == {"a": 2**63 - 1, "b": -(2**63), "c": 2**63 - 1, "d": 1000, "e": 90}


# --- Images -----------------------------------------------------------------------------------------------------------

SIZE = 16


def picture(width: int = SIZE, height: int = SIZE, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colours: int = 0, data: bytes | None = None) -> bytes:
    """A PNG that says to be of that size, whatever its data (None: all zeros)."""
    packed = (
        zlib.compress(data, 9) if data is not None else zlib.compress(bytes(height * (1 + (width * depth + 7) // 8)), 9)
    )
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        picture().save(tmp_path / "set" / label / "whole.png")
    return tmp_path / "set"


Read = Callable[..., Dataset]


@pytest.fixture
def read(root: Path, tmp_path: Path) -> Read:
    return functools.partial(read_folder, root, size=SIZE, cache=tmp_path / "cache", workers=2)


BAD: dict[str, tuple[str, bytes, str]] = {
    "zero bytes": ("x.jpg", b"", "empty"),
    "a truncated JPEG": ("x.jpg", saved(picture(64, 64), "JPEG")[:-200], "truncated"),
    "a JPEG cut in its header": ("x.jpg", saved(picture(), "JPEG")[:100], ""),
    "a truncated GIF": ("x.gif", saved(picture(64, 64), "GIF")[:900], ""),
    "a truncated TIFF": ("x.tif", saved(picture(64, 64), "TIFF")[:5000], ""),
    "a PNG of 30,000 x 30,000": ("x.png", png(30_000, 30_000, 1, 0, b""), "more than 89,478,485 pixels"),
    "a PNG of 2^31 - 1 squared": ("x.png", png(2**31 - 1, 2**31 - 1, 1, 0, b""), "more than 89,478,485 pixels"),
    "a PNG without pixels": ("x.png", png(9000, 9000, 1, 0, b""), ""),
    "a BMP of negative size": (
        "x.bmp", b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, -9, 9, 1, 24, *[0] * 6), "",
    ),
    "a PPM of no size": ("x.ppm", b"P6 0 0 255\n", ""),
    "a PPM of 10^9 squared": ("x.ppm", b"P6 1000000000 1000000000 255\n", "more than 89,478,485 pixels"),
    "a PPM of 5,000 digits": ("x.ppm", b"P6 " + b"9" * 5000 + b" 1 255\n", ""),
    "an SVG": ("x.png", b"<svg><image href='file:///etc/passwd'/></svg>", "not an image"),
    "an EPS": ("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file\n", "not an image"),
    "a PDF": ("x.tif", b"%PDF-1.4\n", "not an image"),
    "a text chunk that unpacks to 100 MB": (
        "x.png",
        png(16, 16)[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9)) + png(16, 16)[33:],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_image_is_listed_with_its_reason(root: Path, read: Read, case: str) -> None:
    name, data, reason = BAD[case]
    (root / "cat" / name).write_bytes(data)
    before = everything(root)
    message = refusal(read)
    assert f"1 bad file: 'cat/{name}' ({reason}" in message or (f"'cat/{name}' (" in message and reason in message)
    assert "--set data.bad_files=skip" in message
    assert len(read(bad_files="skip").train) == 2
    assert everything(root) == before


def deep_png(values: tuple[int, int, int]) -> bytes:
    row = b"\0" + struct.pack(">HHH", *values) * SIZE
    return png(SIZE, SIZE, 16, 2, row * SIZE)


def frames(kind: str, **options: Any) -> bytes:
    one, two = Image.new("RGB", (SIZE, SIZE), (10, 20, 30)), Image.new("RGB", (SIZE, SIZE), (200, 100, 50))
    return saved(one, kind, save_all=True, append_images=[two], **options)


ODD_IMAGES: dict[str, tuple[str, bytes, tuple[int, int, int]]] = {
    "an animated PNG": ("x.png", frames("PNG"), (10, 20, 30)),
    "a TIFF of several pages": ("x.tif", frames("TIFF"), (10, 20, 30)),
    "a JPEG that says PNG": ("x.png", saved(Image.new("RGB", (9, 9), (90, 90, 90)), "JPEG"), (90, 90, 90)),
    "a CMYK JPEG": ("x.jpg", saved(Image.new("CMYK", (SIZE, SIZE), (0, 0, 0, 128)), "JPEG"), (127, 127, 127)),
    "16-bit RGB": ("x.png", deep_png((0x1234, 0x80FF, 0xFF00)), (0x12, 0x80, 0xFF)),
    "one pixel wide": ("x.png", saved(Image.new("RGB", (1, 3000), (1, 2, 3)), "PNG"), (1, 2, 3)),
    "one pixel high": ("x.png", saved(Image.new("RGB", (3000, 1), (1, 2, 3)), "PNG"), (1, 2, 3)),
    "one pixel": ("x.png", saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), (1, 2, 3)),
    "a side of 30,000": ("x.png", png(30_000, 3), (0, 0, 0)),
    "a JPEG with a side of 30,000": ("x.jpg", saved(Image.new("L", (2, 30_000), 50), "JPEG"), (50, 50, 50)),
}
if features.check("webp"):
    ODD_IMAGES["an animated WebP"] = ("x.webp", frames("WEBP", lossless=True), (10, 20, 30))


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("case", list(ODD_IMAGES))
def test_an_odd_image_is_an_image(root: Path, read: Read, case: str, fit: str) -> None:
    name, data, colour = ODD_IMAGES[case]
    (root / "ant").mkdir()
    (root / "ant" / name).write_bytes(data)
    pixels = read(fit=fit).train.pixels[0].astype(int)
    assert np.abs(pixels - np.array(colour)[:, None, None]).max() <= 1


def test_the_limit_on_pixels_can_be_raised_and_lowered(
    root: Path, read: Read, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "cat" / "x.png").write_bytes(png(10_000, 9000, 1))
    sentence = (
        "'cat/x.png' (more than 89,478,485 pixels, as decompression bombs have; make it smaller, or allow more with "
    )
    assert sentence + "--set data.max_pixels)" in refusal(read)
    asked = ("data", "info", f"folder:{root}", "--set")
    code, _, error = call(capsys, monkeypatch, *asked, "data.max_pixels=89999999")
    assert code == 3 and "more than 89,999,999 pixels" in error
    code, output, _ = call(capsys, monkeypatch, *asked, "data.max_pixels=90000000")
    assert code == 0 and "train: 3 images" in output
    code, _, error = call(capsys, monkeypatch, *asked, "data.max_pixels=200")
    assert code == 3 and "3 bad files" in error
    assert Image.MAX_IMAGE_PIXELS == image_folder.MAX_PIXELS


def test_another_limit_is_another_store(root: Path, read: Read) -> None:
    picture(40, 40).save(root / "cat" / "x.png")
    assert len(read(memory_limit=0, bad_files="skip", max_pixels=1000).train) == 2
    assert len(read(memory_limit=0, bad_files="skip").train) == 3


def test_large_images_are_decoded_one_at_a_time(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    to_rgb = image_folder._to_rgb

    def counted(image: Image.Image) -> Image.Image:
        at_once.append(1)
        try:
            assert len(at_once) == 1
            return to_rgb(image.resize((400, 400)))
        finally:
            at_once.pop()

    for number in range(20):
        picture(40, 40).save(root / "cat" / f"{number}.png")
        (root / "cat" / "whole.png").unlink(missing_ok=True)
        (root / "dog" / "whole.png").unlink(missing_ok=True)
    picture(40, 40).save(root / "dog" / "x.png")
    monkeypatch.setattr(image_folder, "_to_rgb", counted)
    monkeypatch.setattr(image_folder, "LARGE", 1000)
    assert len(read(workers=8).train) == 21


# --- Names of files and folders ---------------------------------------------------------------------------------------


def made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        pytest.skip("this file system takes no such name")
    for number in range(5):
        Image.new("RGB", (SIZE, SIZE), (number, len(path.name), ord(path.name[-1]) % 256)).save(path / f"{number}.png")
    return path


@pytest.mark.parametrize("name", [b"caf\xe9", b"red\x1b[31m", b"two\nlines", b"right\xe2\x80\xaeleft", b"\xc2\x9b2J"])
def test_a_class_folder_whose_name_cannot_be_printed_is_refused(
    root: Path, name: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(root / os.fsdecode(name))
    for command in ("info", "check"):
        code, output, error = call(capsys, monkeypatch, "data", command, f"folder:{root}")
        assert code == 3 and "has a name that cannot be printed; rename it" in error
        assert error.strip().isprintable() and error.count("\n") == 1 and output == ""


def test_class_folders_of_odd_names_are_classes_and_are_printed_as_they_are(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["<script>", "=cmd()", "[red]", "[", "%2e%2e%2fx", "x..\\y", "-rf", "a|b", "Cat", "{0}"]
    for name in [*names, "cat", "dog"]:
        made(root / name)
    if len(list(root.iterdir())) < 12:
        pytest.skip("this file system does not tell cat from Cat")
    code, output, error = call(capsys, monkeypatch, "data", "info", f"folder:{root}", "--set", "data.validation=0")
    assert (code, error) == (0, "")
    assert f"12 classes: {', '.join(sorted([*names, 'cat', 'dog'])[:10])}, …" in output
    code, output, error = call(capsys, monkeypatch, "data", "check", f"folder:{root}")
    assert (code, error) == (0, "") and "training images stand there more than once" in output


def test_parts_that_differ_in_case_only_are_refused(root: Path, tmp_path: Path) -> None:
    for part in ("train", "Train", "test"):
        for label in ("cat", "dog"):
            made(tmp_path / "parts" / part / label)
    if len(list((tmp_path / "parts").iterdir())) < 3:
        pytest.skip("this file system does not tell train from Train")
    read = functools.partial(read_folder, tmp_path / "parts", size=SIZE, cache=tmp_path / "cache")
    assert "has two folders for train" in refusal(read)


def test_what_files_and_folders_are_called_moves_no_cursor(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = tmp_path / "\x1b]0;owned\x07\n\x1b[2J"
    try:
        root.rename(hostile)
    except OSError:
        pytest.skip("this file system takes no such name")
    (hostile / "cat" / "\x1b[31m\n.png").write_text("not an image")
    (hostile / "cat" / "x.\x1b[31m").write_text("of another ending")
    made(hostile / "cat" / "\x1b[1m")
    asked = ("data", "info", f"folder:{hostile}")
    code, output, error = call(capsys, monkeypatch, *asked)
    assert code == 3 and "1 bad file" in error
    assert error.count("\n") == 1 and error.strip().isprintable()
    code, output, error = call(capsys, monkeypatch, *asked, "--set", "data.bad_files=skip")
    assert code == 0 and "train: 7 images" in output
    assert all(line.isprintable() for line in output.split("\n"))


def test_pipes_devices_and_links_among_images_are_never_opened(root: Path, read: Read, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(saved(picture(), "PNG"))
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "zero.png").symlink_to("/dev/zero")
    (root / "cat" / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "cat" / "up.png").symlink_to("../../secret.png")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "round").symlink_to(root)
    (root / "cat" / "folder.png").mkdir()
    dataset = read(bad_files="skip")
    assert len(dataset.train) == 2
    assert dataset.notes[0] == "left out 6 bad files:"
    assert [note.partition("': ")[2] for note in dataset.notes[1:]] == [
        "a link that leads out of the folder",
        "not a regular file",
        "a link to a folder around it",
        "a link that leads nowhere",
        "a link that leads out of the folder",
        "a link that leads out of the folder",
    ]


# --- Downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 400, "-1", "1e3", "²", "0x10"])
def test_a_size_that_is_none_is_not_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    forget_settings(monkeypatch)
    server.routes = {"/model": status(302, Location=f"{server.url}/store", X_Linked_Size=size, X_Linked_Etag="0" * 64)}
    source = Source("the hub", (AnnouncedFile(f"{server.url}/model", "model.bin", None),))
    with pytest.raises(DownloadError, match=r"the hub: does not say how large model\.bin is"):
        deliver(Wanted("it", by_hand="x"), (source,), tmp_path, Courier(lambda line: None, Patience(timeout=5)))
    assert everything(tmp_path) == [tmp_path / "0"] and server.requests == []
