"""Writes tiny CIFAR-10 and CIFAR-100 datasets in every form that the readers know, independently of the readers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [f"class_{i}" for i in range(100)]
COARSE_NAMES = [f"group_{i}" for i in range(20)]

PYTHON_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
BINARY_FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PARQUET_FOLDER = {"cifar10": "plain_text", "cifar100": "cifar100"}


@dataclass(frozen=True, eq=False)
class Part:
    """pixels: uint8 (N, 3072); labels and coarse: int64 (N,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    coarse: NDArray[np.int64]

    def __getitem__(self, index: Any) -> Part:
        return Part(self.pixels[index], self.labels[index], self.coarse[index])


@dataclass(frozen=True, eq=False)
class Tiny:
    name: str
    classes: list[str]
    train: Part
    test: Part


def tiny(name: str, train: int = 40, test: int = 20, seed: int = 0) -> Tiny:
    """Random pixels; the classes take turns, so that a multiple of their number is balanced."""
    rng = np.random.default_rng(seed)
    classes = CIFAR10_NAMES if name == "cifar10" else CIFAR100_NAMES

    def part(count: int) -> Part:
        labels = rng.permutation(np.arange(count) % len(classes))
        return Part(rng.integers(0, 256, (count, 3072), np.uint8), labels, labels % 20)

    return Tiny(name, classes, part(train), part(test))


# --- The python form --------------------------------------------------------------------------------------------------


def python_batches(data: Tiny) -> dict[str, dict[str, Any]]:
    """What each file of the python form holds."""
    if data.name == "cifar10":
        chunks = np.array_split(np.arange(len(data.train.labels)), 5)
        parts = {f"data_batch_{i}": data.train[chunk] for i, chunk in enumerate(chunks, 1)} | {"test_batch": data.test}
        return {
            name: {
                "batch_label": f"batch {name}",
                "labels": part.labels.tolist(),
                "data": part.pixels,
                "filenames": [f"image_s_{i:06}.png" for i in range(len(part.labels))],
            }
            for name, part in parts.items()
        } | {"batches.meta": {"num_cases_per_batch": 10000, "label_names": data.classes, "num_vis": 3072}}
    return {
        name: {
            "filenames": [f"image_s_{i:06}.png" for i in range(len(part.labels))],
            "batch_label": f"batch {name}",
            "fine_labels": part.labels.tolist(),
            "coarse_labels": part.coarse.tolist(),
            "data": part.pixels,
        }
        for name, part in {"train": data.train, "test": data.test}.items()
    } | {"meta": {"fine_label_names": data.classes, "coarse_label_names": COARSE_NAMES}}


def python2_pickle(value: dict[str, Any]) -> bytes:
    """Protocol 2 as Python 2's cPickle wrote the official batches, opcode by opcode, with its memo."""
    memo = 0

    def put() -> bytes:
        nonlocal memo
        memo += 1
        return b"q" + bytes([memo]) if memo < 256 else b"r" + struct.pack("<I", memo)

    def text(item: bytes) -> bytes:
        head = b"U" + bytes([len(item)]) if len(item) < 256 else b"T" + struct.pack("<i", len(item))
        return head + item

    def number(item: int) -> bytes:
        if 0 <= item < 256:
            return b"K" + bytes([item])
        return b"M" + struct.pack("<H", item) if 0 <= item < 65536 else b"J" + struct.pack("<i", item)

    def encode(item: Any) -> bytes:
        if isinstance(item, str):
            return text(item.encode()) + put()
        if isinstance(item, int):
            return number(item)
        if isinstance(item, list):
            return b"]" + put() + b"(" + b"".join(map(encode, item)) + b"e"
        shape = b"".join(map(number, item.shape)) + b"\x86"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put() + b"K\x00\x85U\x01b\x87R"
            b"" + put() + b"(K\x01" + shape + b"cnumpy\ndtype\n" + put() + b"U\x02u1K\x00K\x01\x87R" + put() + b"(K\x03"
            b"U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(item.tobytes()) + b"tb"
        )

    return b"\x80\x02}" + put() + b"(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u."


def python2_text_pickle(value: dict[str, Any]) -> bytes:
    """Protocol 0 as Python 2 wrote small files: text, with escapes-free strings."""
    memo = 0

    def put() -> bytes:
        nonlocal memo
        memo += 1
        return b"p%d\n" % memo

    def encode(item: Any) -> bytes:
        if isinstance(item, str):
            return b"S'%s'\n" % item.encode() + put()
        if isinstance(item, int):
            return b"I%d\n" % item
        return b"(l" + put() + b"".join(encode(x) + b"a" for x in item)

    return b"(d" + put() + b"".join(encode(k) + encode(v) + b"s" for k, v in value.items()) + b"."


def pickled(batch: dict[str, Any], protocol: int | str = "official") -> bytes:
    """`official`: as the official files are. An integer: as Python 3 writes that protocol."""
    if protocol != "official":
        return pickle.dumps(batch, protocol=int(protocol))
    return python2_pickle(batch) if "data" in batch else python2_text_pickle(batch)


def write_python(data: Tiny, root: Path, protocol: int | str = "official") -> Path:
    folder = root / PYTHON_FOLDER[data.name]
    folder.mkdir(parents=True)
    for name, batch in python_batches(data).items():
        (folder / name).write_bytes(pickled(batch, protocol))
    return folder


# --- The binary form, and archives ------------------------------------------------------------------------------------


def write_binary(data: Tiny, root: Path) -> Path:
    folder = root / BINARY_FOLDER[data.name]
    folder.mkdir(parents=True)
    for name, batch in python_batches(data).items():
        if "data" not in batch:
            continue
        columns = [batch["labels"]] if data.name == "cifar10" else [batch["coarse_labels"], batch["fine_labels"]]
        rows = np.column_stack([*columns, batch["data"]]).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    if data.name == "cifar10":
        (folder / "batches.meta.txt").write_text("\n".join(data.classes) + "\n\n")
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(data.classes) + "\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(COARSE_NAMES) + "\n")
    return folder


def write_archive(data: Tiny, root: Path, form: str = "python") -> Path:
    """The official .tar.gz beside where its folder would be. `form`: python or binary."""
    root.mkdir(parents=True, exist_ok=True)
    folder = (write_python if form == "python" else write_binary)(data, root / "unpacked")
    path = root / f"{data.name.replace('cifar', 'cifar-')}-{form}.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(folder, arcname=folder.name)
        add_member(archive, f"{folder.name}/readme.html", b"<html>")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.parent.rmdir()
    return path


def add_member(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """Add a member with any header fields; a `size` is written as it is, whatever `data` holds."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    if data:
        archive.addfile(member, io.BytesIO(data))
    else:  # the header alone: `addfile` refuses one that promises bytes, from Python 3.13 on
        header = member.tobuf(archive.format, "utf-8", "surrogateescape")
        assert archive.fileobj is not None
        archive.fileobj.write(header)
        archive.offset += len(header)


# --- The Hub's parquet form -------------------------------------------------------------------------------------------


def png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 (3072,), RGB planes, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_columns(data: Tiny, part: Part) -> dict[str, list[Any]]:
    images = [{"bytes": png(pixels), "path": None} for pixels in part.pixels]
    if data.name == "cifar10":
        return {"img": images, "label": part.labels.tolist()}
    return {"img": images, "fine_label": part.labels.tolist(), "coarse_label": part.coarse.tolist()}


def write_parquet_file(path: Path, columns: dict[str, list[Any]], classes: list[str] | None = None) -> None:
    """`classes`: also write the schema's metadata as the `datasets` library does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if classes is not None:
        label = "label" if "label" in columns else "fine_label"
        features = {"img": {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=16)


def write_parquet(data: Tiny, root: Path, train_parts: int = 1) -> Path:
    folder = root / PARQUET_FOLDER[data.name]
    chunks = np.array_split(np.arange(len(data.train.labels)), train_parts)
    for i, chunk in enumerate(chunks):
        columns = parquet_columns(data, data.train[chunk])
        write_parquet_file(folder / f"train-{i:05}-of-{train_parts:05}.parquet", columns, data.classes)
    write_parquet_file(folder / "test-00000-of-00001.parquet", parquet_columns(data, data.test), data.classes)
    return folder
