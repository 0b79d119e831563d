"""Reads damaged and hostile files made from whole ones, for as long as it is told; `test_fuzz` does so for a moment.

python tests/fuzz.py PARSER [--minutes 10] [--seed 0] [--into findings]

Whatever a file holds, its reader returns something valid or raises a CifarlabError of one line, soon, and in little
memory. An input that breaks that is written into the folder `findings`, with the traceback beside it. What is being
read is always there as PARSER.current: after a crash of the whole process, that is the input.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from cifar_files import pickled, python_batches, tiny, write_archive, write_binary, write_parquet, write_python
from cifarlab.compare import compare, to_csv, to_json, to_markdown
from cifarlab.data.cifar import read_cifar
from cifarlab.data.folder import read_folder
from cifarlab.errors import CifarlabError
from cifarlab.recipe import load_recipe, make_recipe, parse_yaml, recipe_names, recipe_text
from cifarlab.rundir import RunFolder, find_runs, serialized

SECONDS = 20
MOST_MEMORY = 1_500_000_000


class Target(NamedTuple):
    """draw: an input. read: reads it, and looks at what came out; raises CifarlabErrors only."""

    draw: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]


class NoEndError(BaseException):
    """Reading took too long. No reader catches it."""


def check(target: Target, data: bytes) -> bool:
    """Whether the input was read; False: refused. Raises whatever else comes of it."""
    before = _peak()
    with ended_after(SECONDS):
        try:
            target.read(data)
            was_read = True
        except CifarlabError as error:
            was_read = False
            assert "\n" not in str(error) and 10 < len(str(error)) < 2000, str(error)[:3000]
    assert _peak() - before < MOST_MEMORY, f"{_peak() - before:,} bytes of memory"
    return was_read


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise NoEndError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- Changes ------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -1e308, 5e-324, float("inf"), float("nan"), "",
    " ", "a" * 10_000, "\0", "\x1b[31m", "\n", "\ud800", "\udcff", "../x", "/dev/zero", "~nobody/x", "=cmd()", "[red]",
    "<script>", "auto", "exact", "folder:\0", "folder:\ud800", "folder:" + "x" * 5000, "x\0.pth", "2e-3", "1e999", [],
    {}, [[]], [None], [0.5, "x"], [[0, 64], [0.5, 10**30]], {"": None}, {"epochs": 1e308}, {"steps": 2**62},
    {"share": -0.0},
    {"name": []}, {"name": {"name": 1}}, {"a": {"b": {"c": {}}}},
]  # fmt: skip
WORDS = [
    b"!!python/object/apply:os.system ['true']", b"0x" + b"f" * 6000, b"0b" + b"1" * 300, b"1" * 5000, b"1e999",
    b".nan",
    b"1:" * 3000 + b"0", b"1:1.5", b"&a ", b"*a", b"<<: ", b"<<: [{a: 1}]", b'"\\0"', b'"\\ud800"', b'"\\x1b[31m"',
    b"\xef\xbb\xbf", b"? ", b"- " * 2000, b"[" * 3000, b"{" * 3000, b"{a: " * 2000, b"!!binary x", b"!!binary aGk=",
    b"!!set {a, b}", b"!!timestamp 2001-01-01", b"2001-01-01 00:00:00", b"!!omap [a: 1]", b"!!pairs [a: 1]", b"=", b"~",
    b"--- ", b"\n...\n", b"%YAML 3.0\n---\n", b"!!float x", b"!!int ''", b"!!null x", b"!!map [1]", b"!!str {}", b"|\n",
    b">-\n", b"\t", b"\r", b"\x85", b"\xe2\x80\xa8", b": ", b"#", b"'", b'"', b"\\", b"\0", b"\xff\xfe", b"NaN",
    b"null",
    b"[" * 100_000, b'{"a":' * 100_000, b"-Infinity", b"1E400", b"9" * 400, b'"\\udc80"',
]  # fmt: skip

PAX_KEYS = ["size", "path", "mtime", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major"]
PAX = ["-1", "0", "1", "x", "", "1.5", "nan", "1,2,3", "-5,9", "0," + "9" * 20, "../x", "/etc/passwd", "9" * 30]


def changed(data: bytes, draw: random.Random, others: list[bytes], words: list[bytes] | None = None) -> bytes:
    """The bytes with one to eight changes."""
    for _ in range(draw.choice([1, 1, 1, 2, 3, 5, 8])):
        at = draw.randrange(len(data) + 1)
        length = draw.choice([1, 2, 4, 16, 300, 5000])
        match draw.randrange(9 if words is None else 16):
            case 0 | 1 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            case 2 | 3:
                form = draw.choice(["B", "<H", ">H", "<I", ">I", "<Q", ">Q"])
                number = struct.pack(form, draw.choice(NUMBERS) & (1 << 8 * struct.calcsize(form)) - 1)
                data = data[:at] + number + data[at + len(number) :]
            case 4:
                data = data[:at] + draw.randbytes(min(length, 16)) + data[at + draw.choice([0, min(length, 16)]) :]
            case 5:
                data = data[:at] + data[at + length :]
            case 6:
                data = data[:at] + data[at : at + length] * draw.choice([2, 3, 100]) + data[at + length :]
            case 7:
                other = draw.choice(others)
                start = draw.randrange(len(other) + 1)
                data = data[:at] + other[start : start + length] + data[at + draw.choice([0, length]) :]
            case 8:
                data = data[:at] if draw.random() < 0.3 else data
            case _ if words is not None:
                data = data[:at] + draw.choice(words) + data[at + draw.choice([0, 0, length]) :]
    return data[:2_000_000]


def changed_value(value: Any, draw: random.Random) -> Any:
    """A value of JSON's types with something hostile somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        match draw.randrange(10):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                return value | {draw.choice(["", "name", "x" * 5000, "\ud800", "\x1b", "a\nb"]): draw.choice(HOSTILE)}
        return value | {key: changed_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], changed_value(value[at], draw), *value[at + 1 :]]
    return draw.choice(HOSTILE)


def _of(corpus: list[bytes], read: Callable[[bytes], object], words: list[bytes] | None = None) -> Target:
    return Target(lambda draw: changed(draw.choice(corpus), draw, corpus, words), read)


def _named(corpus: dict[str, bytes], read: Callable[[str, bytes], object]) -> Target:
    """Of several files one is changed; an input is its name, a zero byte and what it holds."""
    others = list(corpus.values())

    def draw_one(draw: random.Random) -> bytes:
        name = draw.choice(list(corpus))
        return name.encode() + b"\0" + changed(corpus[name], draw, others)

    return Target(draw_one, lambda data: read(data.partition(b"\0")[0].decode(), data.partition(b"\0")[2]))


# --- Datasets -----------------------------------------------------------------------------------------------------


def _look_at(folder: Path, name: str = "cifar10") -> None:
    dataset = read_cifar(name, folder)
    if dataset is not None:
        assert len(dataset.classes) == len(set(dataset.classes)) == (10 if name == "cifar10" else 100)
        assert all(0 <= label < len(dataset.classes) for label in dataset.train.labels)
        assert len(dataset.content_hash()) == 64
        dataset.source.encode(errors="surrogateescape")


def _files_of(folder: Path) -> Target:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def read(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        try:
            _look_at(folder.parent)
        finally:
            (folder / name).write_bytes(whole[name])

    return _named(whole, read)


def pickles(place: Path) -> Target:
    data = tiny("cifar10", train=5, test=1)
    folder = write_python(data, place)
    target = _files_of(folder)
    batches = python_batches(data)
    corpus = [pickled(batch, protocol) for batch in batches.values() for protocol in ("official", 0, 2, 3, 4, 5)]
    # Mostly without pixels, of which most changes would change one only.
    small = {**batches["test_batch"], "data": np.zeros((1, 4), np.uint8)}
    bare = [pickled(value, protocol) for value in (small, batches["batches.meta"]) for protocol in range(6)]
    bare += [pickle.dumps(value) for value in ({"data": [1, 2**70, None, b"x"]}, ["x"], {"a": {"b": ("c", 1.5)}})]

    def draw_one(draw: random.Random) -> bytes:
        start = draw.choice(draw.choice([corpus, bare, bare]))
        return draw.choice([b"test_batch", b"batches.meta"]) + b"\0" + changed(start, draw, bare)

    return Target(draw_one, target.read)


def binaries(place: Path) -> Target:
    return _files_of(write_binary(tiny("cifar10", train=5, test=1), place))


def archives(place: Path) -> Target:
    """What is changed is now and then the compressed stream, and mostly the tar inside."""
    whole = write_archive(tiny("cifar10", train=5, test=1), place)
    packed = whole.read_bytes()
    inside = gzip.decompress(packed)
    headers = [at for at in range(0, len(inside), 512) if inside[at + 257 : at + 262] == b"ustar"]

    def draw_one(draw: random.Random) -> bytes:
        if draw.random() < 0.1:
            return changed(packed, draw, [packed])
        data = inside
        if draw.random() < 0.2:  # a pax header, of a record that contradicts what comes after it
            member = tarfile.TarInfo("x")
            key = draw.choice(PAX_KEYS)
            text = f" {key}={draw.choice(PAX)}\n".encode()
            text = b"%d" % draw.choice([len(text) + 2, len(text) + 2, 0, 5, 10**9]) + text
            member.type, member.size = tarfile.XHDTYPE, len(text)
            at = draw.choice(headers)
            data = data[:at] + member.tobuf(tarfile.USTAR_FORMAT) + text.ljust(512, b"\0") + data[at:]
        elif draw.random() < 0.8:  # in a header, whose checksum is then put right
            at = draw.choice(headers)
            header = bytearray(changed(data[at : at + 512], draw, [data[at : at + 512]])[:512].ljust(512, b"\0"))
            if draw.random() < 0.5:
                header[156] = draw.choice(b"01234567LKxgSX\0")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            data = data[:at] + header + data[at + 512 :]
        else:
            data = changed(data, draw, [data])
        return gzip.compress(data, 1)

    def read(data: bytes) -> None:
        whole.write_bytes(data)
        _look_at(place)

    return Target(draw_one, read)


def parquets(place: Path) -> Target:
    folder = write_parquet(tiny("cifar10", train=10, test=10), place)
    return _files_of(folder)


IMAGES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "png": [("RGB", {}), ("P", {}), ("RGBA", {}), ("I;16", {}), ("1", {}), ("LA", {})],
    "jpg": [("RGB", {}), ("CMYK", {}), ("L", {"progressive": True})],
    "gif": [("P", {})],
    "webp": [("RGB", {"lossless": True}), ("RGBA", {})],
    "bmp": [("RGB", {}), ("P", {})],
    "tif": [("RGB", {}), ("RGB", {"compression": "tiff_lzw"}), ("I;16", {}), ("F", {}), ("CMYK", {})],
    "ppm": [("RGB", {}), ("L", {})],
}


def images(place: Path) -> Target:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    corpus = {}
    for ending, kinds in IMAGES.items():
        for number, (mode, options) in enumerate(kinds):
            image = Image.fromarray(noise)
            buffer = io.BytesIO()
            extra = {"exif": exif} if ending in ("png", "jpg", "webp", "tif") else {}
            (image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).save(
                buffer, Image.registered_extensions()[f".{ending}"], **options, **extra
            )
            corpus[f"{number}.{ending}"] = buffer.getvalue()
    for label in ("cat", "dog"):
        (place / "set" / label).mkdir(parents=True)
        Image.fromarray(noise).save(place / "set" / label / "whole.png")

    def read(name: str, data: bytes) -> None:
        path = place / "set" / "cat" / name
        path.write_bytes(data)
        try:
            dataset = read_folder(
                place / "set", size=8, cache=place / "cache", bad_files="skip", workers=1, max_pixels=2**22
            )
            bad = sum(note.startswith("  ") for note in dataset.notes)
            assert len(dataset.train) + bad == 3
        finally:
            path.unlink()

    return _named(corpus, read)


# --- Recipes and runs ---------------------------------------------------------------------------------------------


def recipes(place: Path) -> Target:
    corpus = [recipe_text(name).encode() for name in recipe_names()]
    values = [load_recipe(name).to_dict() for name in recipe_names()]
    path = place / "mine.yaml"

    def draw_one(draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return changed(draw.choice(corpus), draw, corpus, WORDS)
        value = draw.choice(values)
        for _ in range(draw.choice([1, 1, 2, 4])):
            value = changed_value(value, draw)
        return yaml.safe_dump(value).encode(errors="surrogatepass")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        recipe = load_recipe(str(path))
        written = recipe.to_yaml()
        assert make_recipe(parse_yaml(written, "written")) == recipe
        assert len(recipe.fingerprint()) == 64
        json.dumps(recipe.to_dict(), allow_nan=False)
        recipe.resolved(dataset=recipe.datasets[0], seed=1)

    return Target(draw_one, read)


def records(place: Path) -> Target:
    run = RunFolder(place / "run")
    run.path.mkdir()
    (run.path / "recipe.yaml").write_text(load_recipe("ex1").resolved(dataset="cifar10", seed=3).to_yaml())
    figures = {"best_val_accuracy": 0.7, "overfitting_gap": 0.05, "train_time": 100.0, "flops": 79_200_000_000_000}
    epochs = [{"epoch": 1, "val_loss": 1.5, "val_accuracy": 0.4, "seconds": 2.5}]
    log = {"status": "finished", "dataset": "cifar10", "classes": 10, "parameters": 545_098, "epochs": epochs}
    run.write_train_log(log | figures | {"flops_per_second": 7.92e11, "wall_time": 110.0, "started": "2026-11-28"})
    tta = {"mode": "flip", "accuracy": 0.73, "test_time": 3.0}
    run.write_test_log({"accuracy": 0.72, "test_time": 1.5, "tta": tta, "looks": 1})
    process = {"pid": 1, "host": "here", "began": "2026-11-28"}
    run.write_environment(
        {"data": {"content_hash": "0" * 64}, "cpu": "one", "threads": 2, "gpu": None, "process": process}
    )
    whole = {path.name: path.read_bytes() for path in run.path.iterdir()}

    def draw_one(draw: random.Random) -> bytes:
        name = draw.choice(list(whole))
        if draw.random() < 0.4:
            data = changed(whole[name], draw, list(whole.values()), WORDS)
            data = draw.choice(WORDS) if draw.random() < 0.2 else data
        elif name == "recipe.yaml":
            data = yaml.safe_dump(changed_value(yaml.safe_load(whole[name]), draw)).encode(errors="surrogatepass")
        else:
            data = json.dumps(changed_value(json.loads(whole[name]), draw)).encode()
        return name.encode() + b"\0" + data

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\0")
        path = run.path / name.decode()
        path.write_bytes(content)
        try:
            (found,) = find_runs([place])
            rows = compare([found])
            (to_markdown(rows) + to_csv(rows) + to_json(rows)).encode(errors="surrogateescape")
            str(found.status), found.done, found.environment(), found.test_log()
            found.recipe()
        finally:
            path.write_bytes(whole[name.decode()])

    return Target(draw_one, read)


def checkpoints(place: Path) -> Target:
    """Sealed or not, changed before or after the seal, or inside the members of the zip file."""
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 3, 4, 6)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "epochs": [{"val_loss": None}],
        "classes": ["a", "b"], "mean": [0.5], "wall_time": 1.5, "best": None,
        "half": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    sealed = serialized(state)
    plain, old = io.BytesIO(), io.BytesIO()
    torch.save(state, plain)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    run = RunFolder(place)

    def seal(data: bytes) -> bytes:
        end = b"cifarlab step=%012d sha256=%s" % (7, hashlib.sha256(data).hexdigest().encode())
        return data.removesuffix(b"\0\0") + struct.pack("<H", len(end)) + end

    def inside(data: bytes, draw: random.Random) -> bytes:
        rewritten = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(rewritten, "w") as after:
            names = before.namelist()
            pickle_name = next(name for name in names if name.endswith("data.pkl"))
            target = pickle_name if draw.random() < 0.7 else draw.choice(names)
            for name in names:
                content = before.read(name)
                if name == target:
                    content = changed(content, draw, [content])
                    if draw.random() < 0.05:
                        continue
                after.writestr(name, content)
        return rewritten.getvalue()

    def draw_one(draw: random.Random) -> bytes:
        corpus = [sealed, plain.getvalue(), old.getvalue()]
        match draw.randrange(4):
            case 0:
                return changed(draw.choice(corpus), draw, corpus)
            case 1:
                return seal(changed(plain.getvalue(), draw, corpus))
            case 2:
                return inside(plain.getvalue(), draw)
        return seal(inside(plain.getvalue(), draw))

    def read(data: bytes) -> None:
        for path in place.iterdir():
            path.unlink()
        (place / "epoch-1.pth").write_bytes(data)
        with contextlib.suppress(CifarlabError):
            run.newest_checkpoint(lambda line: None)
        (place / "best.pth").write_bytes(data)
        assert isinstance(run.load_checkpoint("best.pth"), dict)

    return Target(draw_one, read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "pickle": pickles, "binary": binaries, "archive": archives, "parquet": parquets, "image": images, "recipe": recipes,
    "record": records, "checkpoint": checkpoints,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parser", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of the draws; none: others each time")
    parser.add_argument("--into", type=Path, default=Path("findings"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    draw = random.Random(arguments.seed)
    arguments.into.mkdir(parents=True, exist_ok=True)
    current = arguments.into / f"{arguments.parser}.current"
    findings: set[str] = set()
    times = read = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        target = TARGETS[arguments.parser](Path(place))
        while time.monotonic() - began < 60 * arguments.minutes:
            data = target.draw(draw)
            current.write_bytes(data)
            times += 1
            try:
                read += check(target, data)
            except (Exception, NoEndError) as error:
                frames = traceback.extract_tb(error.__traceback__)
                own = next((frame for frame in reversed(frames) if "cifarlab" in frame.filename), frames[-1])
                where = f"{type(error).__name__} at {Path(own.filename).name}:{own.lineno}"
                if where not in findings:
                    findings.add(where)
                    name = f"{arguments.parser}-{hashlib.sha256(data).hexdigest()[:12]}"
                    (arguments.into / name).write_bytes(data)
                    (arguments.into / f"{name}.txt").write_text("".join(traceback.format_exception(error)))
                    sys.stdout.write(f"{name}: {where}: {str(error)[:200]!r}\n")
                    sys.stdout.flush()
    current.unlink()
    sys.stdout.write(
        f"{arguments.parser}: {times:,} inputs in {(time.monotonic() - began) / 60:.1f} minutes, "
        f"{read:,} read, {times - read - len(findings):,} refused, {len(findings)} kinds of findings\n"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
