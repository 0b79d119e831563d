from __future__ import annotations

import functools
import io
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifarlab.data import folder, packed
from cifarlab.data.batches import ImageStore
from cifarlab.data.dataset import Dataset, UInt8Array, let_go
from cifarlab.data.facts import image_facts
from cifarlab.data.folder import read_folder
from cifarlab.errors import DataError, StorageError

SIZE = 16


def picture(seed: int = 0, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def planes(image: Image.Image) -> UInt8Array:
    pixels: UInt8Array = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return pixels


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two classes with one picture each, to which a test adds what it is about."""
    save(picture(1), tmp_path / "set" / "cat" / "1.png")
    save(picture(2), tmp_path / "set" / "dog" / "1.png")
    return tmp_path / "set"


Read = Callable[..., Dataset]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return functools.partial(read_folder, size=SIZE, cache=tmp_path / "cache", workers=2)


def only(dataset: Dataset, label: int) -> UInt8Array:
    """The single training image of a class."""
    chosen = dataset.train.pixels[dataset.train.labels == label]
    assert len(chosen) == 1
    image: UInt8Array = chosen[0]
    return image


# ----------------------------------------------------------------- formats and modes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("1.png", {}),
        ("1.BMP", {}),
        ("1.ppm", {}),
        ("1.tif", {}),
        ("1.tiff", {"compression": "tiff_lzw"}),
        ("1.webp", {"lossless": True}),
        ("wrong-ending.jpg", {"format": "PNG"}),
    ],
)
def test_a_lossless_format_keeps_every_pixel(root: Path, read: Read, name: str, options: dict[str, Any]) -> None:
    (root / "cat" / "1.png").unlink()
    save(picture(3), root / "cat" / name, **options)
    dataset = read(root)
    assert np.array_equal(only(dataset, 0), planes(picture(3)))
    assert dataset.classes == ("cat", "dog")
    assert dataset.name == "set"


def test_a_jpeg_is_read_as_pillow_decodes_it(root: Path, read: Read) -> None:
    path = save(picture(3), root / "ant" / "1.jpeg", quality=90)
    with Image.open(path) as image:
        assert np.array_equal(only(read(root), 0), planes(image))


def test_only_the_first_frame_of_an_animation_is_read(root: Path, read: Read) -> None:
    frames = [Image.new("P", (SIZE, SIZE), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 200, 100, 50])
    save(frames[0], root / "ant" / "1.gif", save_all=True, append_images=frames[1:])
    assert (only(read(root), 0) == np.array([10, 20, 30])[:, None, None]).all()


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((SIZE, SIZE), value, np.uint16))


def filled(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (SIZE, SIZE), colour)


def palette(transparent: bool) -> Image.Image:
    image = filled("P", 1)
    image.putpalette([0, 0, 0, 40, 80, 120])
    if transparent:
        image.info["transparency"] = bytes([255, 128])
    return image


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (filled("1", 1), "1.png", (255, 255, 255)),
        (filled("L", 77), "1.png", (77, 77, 77)),
        (filled("LA", (200, 51)), "1.png", (40, 40, 40)),
        (filled("RGBA", (200, 100, 50, 51)), "1.png", (40, 20, 10)),
        (filled("RGBA", (200, 100, 50, 0)), "1.tif", (0, 0, 0)),
        (palette(transparent=False), "1.png", (40, 80, 120)),
        (palette(transparent=True), "1.png", (20, 40, 60)),
        (filled("CMYK", (0, 255, 255, 0)), "1.tif", (255, 0, 0)),
        (filled("YCbCr", (128, 128, 128)), "1.tif", (128, 128, 128)),
        (grey16(0x7FFF), "1.png", (127, 127, 127)),
        (grey16(0x00FF), "1.tif", (0, 0, 0)),
        (grey16(0xFF00), "1.pgm", (255, 255, 255)),
        (Image.fromarray(np.full((SIZE, SIZE), 0x4000, np.int32)), "1.tif", (64, 64, 64)),
        (Image.fromarray(np.full((SIZE, SIZE), 0.2, np.float32)), "1.tif", (51, 51, 51)),
        (Image.fromarray(np.full((SIZE, SIZE), 200.4, np.float32)), "1.tif", (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb_by_the_stated_rule(
    root: Path, read: Read, image: Image.Image, name: str, expected: tuple[int, int, int]
) -> None:
    save(image, root / "ant" / name)
    pixels = only(read(root), 0).astype(int)
    assert np.abs(pixels - np.array(expected)[:, None, None]).max() <= 1


@pytest.mark.parametrize(("mode", "transparent"), [("1", 255), ("L", 90), ("RGB", (10, 20, 30))])
def test_a_colour_that_a_png_declares_transparent_becomes_black(
    root: Path, read: Read, mode: str, transparent: Any
) -> None:
    image = filled(mode, transparent)
    save(image, root / "ant" / "1.png", transparency=transparent)
    assert (only(read(root), 0) == 0).all()


@pytest.mark.parametrize("value", [np.float32(300), np.float32(-1), np.float32("nan"), np.int32(70000), np.int32(-5)])
def test_values_without_a_known_range_are_refused_rather_than_clipped(
    root: Path, read: Read, value: np.generic
) -> None:
    save(Image.fromarray(np.full((SIZE, SIZE), value)), root / "cat" / "2.tif")
    with pytest.raises(DataError, match=r"'cat/2\.tif' \(.*range\)"):
        read(root)


@pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.tif", "1.webp"])
@pytest.mark.parametrize(("orientation", "turned"), [(3, 180), (6, 270), (8, 90)])
def test_a_picture_is_turned_upright_by_its_exif_orientation(
    root: Path, read: Read, name: str, orientation: int, turned: int
) -> None:
    upright = Image.new("RGB", (SIZE, SIZE), "white")
    upright.paste("red", (0, 0, SIZE // 2, SIZE // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(upright.rotate(-turned), root / "ant" / name, exif=exif, quality=95)
    assert np.abs(only(read(root), 0).astype(int) - planes(upright)).mean() < 4


# ----------------------------------------------------------------- another shape


def smooth(width: int, height: int) -> Image.Image:
    return picture(5, 6, 6).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (100, 40), (24, 16), (8, 12)])
def test_crop_resizes_the_short_side_and_takes_the_centre(root: Path, read: Read, width: int, height: int) -> None:
    image = smooth(width, height)
    save(image, root / "ant" / "1.png")
    scale = SIZE / min(width, height)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    expected = planes(resized.crop((left, top, left + SIZE, top + SIZE))).astype(int)
    # The filter sees nothing beyond the crop, so the outermost pixels differ a little.
    assert np.abs(only(read(root), 0).astype(int) - expected)[:, 2:-2, 2:-2].max() <= 3


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64)])
def test_pad_resizes_the_long_side_and_pads_with_black(root: Path, read: Read, width: int, height: int) -> None:
    image = smooth(width, height)
    save(image, root / "ant" / "1.png")
    expected = np.zeros((3, SIZE, SIZE), np.uint8)
    inner = planes(image.resize((width // 4, height // 4), Image.Resampling.BICUBIC))
    if width > height:
        expected[:, 4:12] = inner
    else:
        expected[:, :, 4:12] = inner
    assert np.array_equal(only(read(root, fit="pad", interpolation="bicubic"), 0), expected)


def test_stretch_resizes_both_sides(root: Path, read: Read) -> None:
    image = smooth(50, 30)
    save(image, root / "ant" / "1.png")
    expected = planes(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.array_equal(only(read(root, fit="stretch"), 0), expected)


def test_a_picture_that_padding_would_make_all_black_is_refused(root: Path, read: Read) -> None:
    save(Image.new("RGB", (1000, 2), "white"), root / "cat" / "2.png")
    with pytest.raises(DataError, match="too narrow to be padded"):
        read(root, fit="pad")
    assert (read(root, fit="crop").train.pixels[1] == 255).all()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(root: Path, read: Read) -> None:
    image = smooth(640, 480)
    path = save(image, root / "ant" / "1.jpg", quality=95)
    expected = planes(Image.open(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(80, 0, 560, 480)))
    assert np.abs(only(read(root), 0).astype(int) - expected).max() <= 6


# ----------------------------------------------------------------- order and layout


scandir = os.scandir


class Backwards:
    """os.scandir as a file system might order it."""

    def __init__(self, path: Any) -> None:
        with scandir(path) as entries:
            self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self.entries)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def test_images_come_in_the_order_of_their_paths_on_every_file_system(
    root: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b/2.png", "a.png", "b-b.png", "b/1.png", "a/z/1.png"]
    for seed, name in enumerate(names):
        save(picture(10 + seed), root / "cat" / name)
    forwards = read(root)
    monkeypatch.setattr(os, "scandir", Backwards)
    backwards = read(root)
    assert forwards.content_hash() == backwards.content_hash()
    # By the parts of the path, with "/" before any other character.
    expected = [picture(1), picture(14), picture(11), picture(13), picture(10), picture(12), picture(2)]
    assert np.array_equal(forwards.train.pixels, np.stack([planes(image) for image in expected]))
    assert forwards.train.labels.tolist() == [0] * 6 + [1]


def test_the_parts_come_from_their_folders(tmp_path: Path, read: Read) -> None:
    for seed, part in enumerate(["train", "valid", "test"]):
        for label, name in enumerate(["cat", "dog"]):
            save(picture(10 * seed + label), tmp_path / "set" / part / name / "1.png")
    save(picture(), tmp_path / "set" / "extra" / "1.png")
    (tmp_path / "set" / "README.txt").write_text("hello")
    dataset = read(tmp_path / "set")
    assert dataset.validation is not None
    assert dataset.test is not None
    for seed, images in enumerate([dataset.train, dataset.validation, dataset.test]):
        assert np.array_equal(images.pixels, np.stack([planes(picture(10 * seed)), planes(picture(10 * seed + 1))]))
        assert images.labels.tolist() == [0, 1]
    assert dataset.notes == (
        "left out the folders beside train: 'extra'",
        "left out 1 file outside the class folders",
    )


@pytest.mark.parametrize("name", ["val", "validation", "Valid"])
def test_the_validation_folder_has_several_names(tmp_path: Path, read: Read, name: str) -> None:
    for part in ("Train", name):
        for label in ("cat", "dog"):
            save(picture(), tmp_path / "set" / part / label / "1.png")
    dataset = read(tmp_path / "set")
    assert dataset.validation is not None
    assert dataset.test is None


def test_a_class_may_be_called_train(root: Path, read: Read) -> None:
    save(picture(3), root / "train" / "1.png")
    assert read(root).classes == ("cat", "dog", "train")


def refusal(read: Read, path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_two_folders_for_one_part_are_refused(tmp_path: Path, read: Read) -> None:
    for part in ("train", "val", "validation"):
        save(picture(), tmp_path / "set" / part / "cat" / "1.png")
    assert "two folders for validation, val and validation" in refusal(read, tmp_path / "set")


def test_a_test_set_without_training_images_is_refused(tmp_path: Path, read: Read) -> None:
    save(picture(), tmp_path / "set" / "test" / "cat" / "1.png")
    save(picture(), tmp_path / "set" / "val" / "cat" / "1.png")
    assert "has 'test', 'val' but no folder train" in refusal(read, tmp_path / "set")


@pytest.mark.parametrize("part", ["val", "test"])
def test_class_folders_that_differ_between_the_parts_are_refused(tmp_path: Path, read: Read, part: str) -> None:
    for name in ("cat", "dog"):
        save(picture(), tmp_path / "set" / "train" / name / "1.png")
    for name in ("cat", "dgo"):
        save(picture(), tmp_path / "set" / part / name / "1.png")
    message = refusal(read, tmp_path / "set")
    assert f"{part} lacks 'dog'" in message
    assert "train lacks 'dgo'" in message
    (tmp_path / "set" / part / "dgo").rename(tmp_path / "set" / part / "dog")
    assert len(read(tmp_path / "set").train) == 2
    save(picture(), tmp_path / "set" / part / "eel" / "1.png")
    assert "train lacks 'eel'" in refusal(read, tmp_path / "set")


def test_folders_that_hold_no_dataset_are_refused_in_a_sentence(tmp_path: Path, read: Read) -> None:
    assert "there is no folder" in refusal(read, tmp_path / "missing")
    file = save(picture(), tmp_path / "file.png")
    assert "there is no folder" in refusal(read, file)
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in refusal(read, tmp_path / "empty")
    save(picture(), tmp_path / "loose" / "1.png")
    assert "has no class folders" in refusal(read, tmp_path / "loose")
    save(picture(), tmp_path / "one" / "cat" / "1.png")
    assert "one class folder, 'cat', and at least two are needed" in refusal(read, tmp_path / "one")
    save(picture(), tmp_path / "wrapped" / "pets" / "cat" / "1.png")
    assert f"then use {tmp_path / 'wrapped' / 'pets'}" in refusal(read, tmp_path / "wrapped")


def test_a_class_without_images_is_refused(root: Path, read: Read) -> None:
    (root / "eel").mkdir()
    (root / "eel" / "1.heic").write_bytes(b"x")
    assert "the class 'eel' has no images for train" in refusal(read, root)


def test_a_folder_that_may_not_be_listed_is_refused(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "cat" / "locked").mkdir()

    def deny(path: Path) -> Any:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert "locked cannot be read: Permission denied" in refusal(read, root, bad_files="skip")


def test_a_class_name_that_cannot_be_printed_is_refused(root: Path, read: Read) -> None:
    save(picture(), root / "eel\n" / "1.png")
    assert r"'eel\n'" in refusal(read, root)


# ----------------------------------------------------------------- bad files


def damaged_png() -> bytes:
    buffer = io.BytesIO()
    picture(7, 64, 64).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


def test_what_is_not_an_image_by_its_name_is_ignored_and_counted(root: Path, read: Read) -> None:
    for name in ("notes.txt", "more.TXT", "Thumbs.db", ".DS_Store", "._1.png", "LICENSE"):
        (root / "cat" / name).write_bytes(b"x")
    save(picture(), root / "cat" / ".cache" / "1.png")
    save(picture(), root / "__MACOSX" / "cat" / "1.png")
    dataset = read(root)
    assert len(dataset.train) == 2
    (root / "dog.png").write_bytes(b"x")
    assert read(root).notes == (
        "left out 1 file outside the class folders",
        "left out what is no image by its name: 4 hidden, 2 '.txt', 1 no ending, 1 '.db'",
    )


def test_all_bad_files_are_found_before_any_is_refused(root: Path, read: Read) -> None:
    (root / "cat" / "cut.png").write_bytes(damaged_png())
    (root / "cat" / "empty.jpg").write_bytes(b"")
    (root / "dog" / "text.png").write_text("not an image")
    (root / "dog" / "svg.gif").write_text("<svg/>")
    message = refusal(read, root)
    assert message.startswith(f"{root} has 4 bad files: 'cat/cut.png' (")
    assert "'cat/empty.jpg' (empty)" in message
    assert "and 1 more" in message
    assert "--set data.bad_files=skip" in message


def test_skipped_files_are_listed_one_by_one(root: Path, read: Read) -> None:
    (root / "cat" / "0.png").write_bytes(damaged_png())
    (root / "cat" / "2.png").write_text("not an image")
    save(picture(3), root / "cat" / "3.png")
    dataset = read(root, bad_files="skip")
    expected = np.stack([planes(picture(seed)) for seed in (1, 3, 2)])
    assert np.array_equal(dataset.train.pixels, expected)
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert dataset.notes[0] == "left out 2 bad files:"
    assert dataset.notes[1].startswith("  'cat/0.png': ")
    assert dataset.notes[2].startswith("  'cat/2.png': not an image (JPEG, PNG")


def test_a_class_whose_files_are_all_skipped_is_refused(root: Path, read: Read) -> None:
    (root / "dog" / "1.png").write_text("not an image")
    assert "the class 'dog' has no images for train" in refusal(read, root, bad_files="skip")


# Pillow's warning is an error because the reader says so, not because these tests turn every warning into one.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [30, 60])
def test_a_decompression_bomb_is_a_bad_file(root: Path, read: Read, side: int) -> None:
    # Pillow warns above its limit and raises above twice the limit.
    save(picture(3, side, side), root / "cat" / "2.png")
    assert "'cat/2.png' (more than 600 pixels" in refusal(read, root, max_pixels=600)
    assert len(read(root, bad_files="skip", max_pixels=600).train) == 2
    assert len(read(root, max_pixels=3600).train) == 3


def test_a_format_outside_the_list_is_refused_whatever_its_name(root: Path, read: Read) -> None:
    save(picture(3), root / "cat" / "2.png", format="TGA")
    save(picture(3), root / "cat" / "3.jpg", format="JPEG2000")
    assert "has 2 bad files: 'cat/2.png' (not an image" in refusal(read, root)


def test_damaged_metadata_is_noted_and_the_pixels_are_read(root: Path, read: Read) -> None:
    # One entry that points beyond the end of the data.
    entry = b"\x0f\x01\x02\x00\x40\x00\x00\x00\xff\x00\x00\x00"
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + entry
    path = save(picture(3), root / "ant" / "1.jpg", exif=exif, quality=95)
    dataset = read(root)
    with pytest.warns(UserWarning), Image.open(path) as image:
        image.getexif()
        assert np.array_equal(only(dataset, 0), planes(image))
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("2 warnings of damaged metadata")


@pytest.mark.parametrize("seed", range(30))
def test_a_file_with_flipped_bytes_is_read_or_listed(root: Path, read: Read, seed: int) -> None:
    generator = np.random.default_rng(seed)
    name = ["1.png", "1.jpg", "1.gif", "1.tif", "1.webp", "1.bmp"][seed % 6]
    path = save(picture(3), root / "ant" / name)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    where = generator.integers(0, len(data), 8)
    data[where] = generator.integers(0, 256, 8)
    path.write_bytes(data.tobytes())
    save(picture(4), root / "ant" / "2.png")
    dataset = read(root, bad_files="skip")
    listed = sum(note.startswith(f"  'ant/{name}'") for note in dataset.notes)
    assert len(dataset.train) + listed == 4


# ----------------------------------------------------------------- links and special files


def test_a_link_inside_the_folder_is_followed(root: Path, read: Read) -> None:
    (root / "cat" / "2.png").symlink_to("../dog/1.png")
    save(picture(3), root / "more" / "deep" / "1.png")
    (root / "cat" / "3").symlink_to("../more/deep")
    dataset = read(root)
    expected = [planes(picture(seed)) for seed in (1, 2, 3)]
    assert np.array_equal(dataset.train.pixels[dataset.train.labels == 0], np.stack(expected))


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_a_link_that_leads_out_of_the_folder_is_a_bad_file(root: Path, read: Read, tmp_path: Path, target: str) -> None:
    save(picture(9), tmp_path / "set-outside" / "secret.png")
    path = {"file": "set-outside/secret.png", "folder": "set-outside", "nowhere": "missing.png"}[target]
    (root / "cat" / "2.png").symlink_to(tmp_path / path)
    reason = "leads nowhere" if target == "nowhere" else "leads out of the folder"
    assert f"'cat/2.png' (a link that {reason})" in refusal(read, root)
    dataset = read(root, bad_files="skip")
    assert len(dataset.train) == 2
    assert len(dataset.notes) == 2


def test_a_class_folder_that_leads_out_of_the_folder_is_refused(root: Path, read: Read, tmp_path: Path) -> None:
    save(picture(9), tmp_path / "outside" / "1.png")
    (root / "eel").symlink_to(tmp_path / "outside")
    assert "eel is a link that leads out of the folder" in refusal(read, root, bad_files="skip")


def test_links_in_a_circle_end(root: Path, read: Read) -> None:
    (root / "cat" / "self").symlink_to(".")
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "dogs").symlink_to("../dog")
    (root / "dog" / "cats").symlink_to("../cat")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    dataset = read(root, bad_files="skip")
    # cat/dogs/1.png is the only image that links add to cat; in dog, cat/1.png through dog/cats.
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.notes == (
        "left out 4 bad files:",
        "  'cat/loop.png': a link that leads nowhere",
        "  'cat/up': a link to a folder around it",
        "  'dog/cats/loop.png': a link that leads nowhere",
        "  'dog/cats/up': a link to a folder around it",
    )


def test_deep_nesting_is_no_trouble(root: Path, read: Read) -> None:
    deep = root / "cat" / "/".join(["d"] * 250)
    deep.mkdir(parents=True)
    picture(3).save(deep / "1.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        assert len(read(root).train) == 3
    finally:
        sys.setrecursionlimit(limit)


def test_a_named_pipe_is_never_opened(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    open_image = Image.open

    def open_regular(path: Path, **options: Any) -> Image.Image:
        assert path.is_file(), "opening this would wait forever"
        return open_image(path, **options)

    monkeypatch.setattr(Image, "open", open_regular)
    os.mkfifo(root / "cat" / "2.png")
    assert "'cat/2.png' (not a regular file)" in refusal(read, root)


def test_a_name_that_is_not_utf8_is_no_trouble(root: Path, read: Read) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (root / "cat" / name).write_text("not an image")
    except OSError:
        pytest.skip("this file system takes no such name")
    note = read(root, bad_files="skip", memory_limit=0).notes[-1]
    assert note.encode().startswith(rb"  'cat/caf\udce9.png'")


# ----------------------------------------------------------------- the store


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded, as they are."""
    names: list[str] = []
    decode = folder._decode

    def listed(path: Path, **options: Any) -> UInt8Array | str:
        names.append(path.name)
        return decode(path, **options)

    monkeypatch.setattr(folder, "_decode", listed)
    return names


@pytest.fixture
def ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten files, one of them bad, in slices of two; the store's record is written after each."""
    monkeypatch.setattr(folder, "SLICE", 2)
    monkeypatch.setattr(packed, "BLOCKS", 1)
    for seed in range(10):
        save(picture(seed), tmp_path / "set" / ("cat" if seed < 5 else "dog") / f"{seed}.bmp")
    (tmp_path / "set" / "cat" / "2.bmp").write_text("not an image")
    return tmp_path / "set"


EXPECTED = [0, 1, 3, 4, 5, 6, 7, 8, 9]


def stored(tmp_path: Path, ending: str) -> Path:
    (path,) = (tmp_path / "cache").glob(f"folder-*{ending}")
    return path


def test_a_set_above_the_limit_becomes_a_read_only_memory_map_of_the_same_pixels(
    root: Path, read: Read, tmp_path: Path
) -> None:
    (root / "cat" / "0.png").write_text("not an image")
    for seed in range(5):
        save(picture(seed), root / "dog" / f"{seed + 2}.png")
    inside = read(root, bad_files="skip", memory_limit=8 * 3 * SIZE * SIZE)
    assert not isinstance(inside.train.pixels, np.memmap)
    assert not (tmp_path / "cache").exists()
    mapped = read(root, bad_files="skip", memory_limit=8 * 3 * SIZE * SIZE - 1)
    assert isinstance(mapped.train.pixels, np.memmap)
    assert mapped.content_hash() == inside.content_hash()
    assert mapped.notes == inside.notes
    assert mapped.source == f"image folder {root}, packed in {stored(tmp_path, '.pixels')}"
    with pytest.raises(ValueError, match="read-only"):
        mapped.train.pixels[0] = 0


def test_a_set_of_many_images_is_packed_whatever_the_limit(
    ten: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PACKED_FROM", 11)
    assert not isinstance(read(ten, bad_files="skip").train.pixels, np.memmap)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(folder, "PACKED_FROM", 10)
    assert isinstance(read(ten, bad_files="skip").train.pixels, np.memmap)


def test_images_come_out_in_order_packed_or_not(ten: Path, read: Read) -> None:
    expected = np.stack([planes(picture(seed)) for seed in EXPECTED])
    for limit in (None, 0):
        dataset = read(ten, bad_files="skip", memory_limit=limit)
        assert np.array_equal(dataset.train.pixels, expected)


def test_the_parts_of_a_store_are_those_of_the_folder(root: Path, read: Read, tmp_path: Path) -> None:
    for number, part in enumerate(("train", "val", "test")):
        for seed in range(3):
            save(picture(10 * number + seed), tmp_path / "parts" / part / ("cat" if seed else "dog") / f"{seed}.png")
    inside, mapped = (read(tmp_path / "parts", memory_limit=limit) for limit in (None, 0))
    assert mapped.recorded_hash == inside.content_hash()
    pairs = ((inside.train, mapped.train), (inside.validation, mapped.validation), (inside.test, mapped.test))
    for one, other in pairs:
        assert one is not None and other is not None and other.facts is not None
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(image_facts(one.pixels), other.facts)


def test_the_store_is_used_again_until_something_changes(root: Path, read: Read, decoded: list[str]) -> None:
    (root / "cat" / "0.png").write_text("not an image")
    first = read(root, memory_limit=0, bad_files="skip")
    assert len(decoded) == 3
    again = read(root, memory_limit=0, bad_files="skip")
    assert len(decoded) == 3
    assert again.content_hash() == first.content_hash()
    assert again.notes == first.notes
    with pytest.raises(DataError, match="1 bad file"):
        read(root, memory_limit=0)
    assert len(decoded) == 3

    read(root, memory_limit=0, bad_files="skip", fit="pad")
    read(root, memory_limit=0, bad_files="skip", interpolation="bicubic")
    read(root, memory_limit=0, bad_files="skip", size=8)
    assert len(decoded) == 12
    save(picture(5), root / "dog" / "5.png")
    assert len(read(root, memory_limit=0, bad_files="skip").train) == 3
    assert len(decoded) == 16
    (root / "cat" / "0.png").unlink()
    assert len(read(root, memory_limit=0, bad_files="skip").train) == 3
    assert len(decoded) == 19
    (root / "dog" / "5.png").rename(root / "cat" / "5.png")
    assert read(root, memory_limit=0).train.labels.tolist() == [0, 0, 1]


def test_an_image_that_is_replaced_by_one_of_the_same_size_and_time_is_noticed(root: Path, read: Read) -> None:
    for seed in (3, 4):
        os.utime(save(picture(seed), root / "ant" / f"{seed}.bmp"), ns=(0, 0))
    first = read(root, memory_limit=0)
    (root / "ant" / "3.bmp").rename(root / "ant" / "5.bmp")
    (root / "ant" / "4.bmp").rename(root / "ant" / "3.bmp")
    (root / "ant" / "5.bmp").rename(root / "ant" / "4.bmp")
    second = read(root, memory_limit=0)
    assert np.array_equal(second.train.pixels[:2], first.train.pixels[:2][::-1])


def test_what_is_touched_or_copied_elsewhere_is_not_decoded_again(
    root: Path, read: Read, tmp_path: Path, decoded: list[str]
) -> None:
    first = read(root, memory_limit=0)
    os.utime(root / "cat" / "1.png", ns=(0, 0))
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    for place in (root, tmp_path / "elsewhere" / "copy"):
        assert read(place, memory_limit=0).content_hash() == first.content_hash()
    assert len(decoded) == 2


def test_the_same_bytes_under_another_label_are_another_dataset(root: Path, read: Read) -> None:
    save(picture(3), root / "dog" / "2.png")
    read(root, memory_limit=0)
    (root / "dog" / "1.png").rename(root / "cat" / "2.png")
    assert read(root, memory_limit=0).content_hash() == read(root).content_hash()
    (root / "dog").rename(root / "eel")
    assert read(root, memory_limit=0).content_hash() == read(root).content_hash()


def test_files_are_read_again_only_where_their_listing_has_changed(
    root: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, memory_limit=0)

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(folder, "_digest", refuse)
    assert read(root, memory_limit=0).content_hash() == first.content_hash()
    os.utime(root / "cat" / "1.png", ns=(0, 0))
    with pytest.raises(AssertionError, match="is read again"):
        read(root, memory_limit=0)


def test_a_file_that_could_not_be_read_is_tried_again(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, digest = folder._decode, folder._digest
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_digest", lambda path: digest(path) if "cat" in str(path) else None)
        patch.setattr(folder, "_decode", lambda path, **to: decode(path, **to) if "cat" in str(path) else "refused")
        assert "'dog/1.png' (refused)" in refusal(read, root, memory_limit=0)
    assert read(root, memory_limit=0).content_hash() == read(root).content_hash()


def test_two_folders_with_the_same_names_and_times_share_no_store(root: Path, read: Read, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        for label in ("cat", "dog"):
            path = save(picture(seed), tmp_path / name / label / "1.bmp")
            os.utime(path, ns=(0, 0))
    one, two = (read(tmp_path / name, memory_limit=0) for name in ("one", "two"))
    assert one.content_hash() != two.content_hash()


def test_a_file_that_changes_while_it_is_read_is_refused(
    ten: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = folder._decode

    def write(path: Path, **options: Any) -> UInt8Array | str:
        if path.name == "7.bmp":
            save(picture(0, 5, 5), path)
        return decode(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_decode", write)
        assert "7.bmp was changed or removed while" in refusal(read, ten, memory_limit=0, bad_files="skip")
    assert read(ten, memory_limit=0, bad_files="skip").content_hash() == read(ten, bad_files="skip").content_hash()


# ----------------------------------------------------------------- the store, when things go wrong


class Killed(BaseException):
    """What ends the process at once."""


@pytest.mark.parametrize("after", range(0, 10, 3))
def test_after_a_crash_midway_the_next_run_goes_on_from_the_last_flush(
    ten: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str], after: int
) -> None:
    decode = folder._decode

    def die(path: Path, **options: Any) -> UInt8Array | str:
        if path.name == f"{after}.bmp":
            raise Killed
        return decode(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_decode", die)
        with pytest.raises(Killed):
            read(ten, memory_limit=0, bad_files="skip")
    with stored(tmp_path, ".pixels").open("ab") as file:
        file.write(b"what was not flushed is anything")
    decoded.clear()
    lines: list[str] = []
    dataset = read(ten, memory_limit=0, bad_files="skip", report=lines.append)
    flushed = after - after % 2
    assert sorted(decoded) == [f"{seed}.bmp" for seed in range(flushed, 10)]
    assert lines[0].startswith(f"going on after {flushed} of 10 images" if flushed else "packing 10 images into")
    assert np.array_equal(dataset.train.pixels, np.stack([planes(picture(seed)) for seed in EXPECTED]))
    assert dataset.content_hash() == read(ten, bad_files="skip").content_hash()


@pytest.mark.parametrize("write", range(9))
def test_wherever_writing_fails_no_half_store_is_taken_for_whole(
    ten: Path, read: Read, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    fsync = os.fsync
    count = 0

    def fail(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > write:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="the disk is full"):
            read(ten, memory_limit=0, bad_files="skip")
    assert read(ten, memory_limit=0, bad_files="skip").content_hash() == read(ten, bad_files="skip").content_hash()


@pytest.mark.parametrize("ending", [".pixels", ".json", ".facts.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "nonsense"])
def test_a_damaged_store_is_mended(root: Path, read: Read, tmp_path: Path, ending: str, damage: str) -> None:
    read(root, memory_limit=0)
    path = stored(tmp_path, ending)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(b"[7]".ljust(path.stat().st_size))
    mended = read(root, memory_limit=0)
    assert np.array_equal(mended.train.pixels, read(root).train.pixels)
    assert mended.train.facts is not None
    assert np.array_equal(mended.train.facts, image_facts(mended.train.pixels))
    assert mended.content_hash() == read(root).content_hash()


def test_a_store_that_was_copied_is_checked_and_used(
    root: Path, read: Read, tmp_path: Path, decoded: list[str]
) -> None:
    first = read(root, memory_limit=0)
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, ns=(0, 0))
    assert read(root, memory_limit=0).content_hash() == first.content_hash()
    assert len(decoded) == 2


def test_the_limit_decides_what_happens_where_the_cache_cannot_be_written(
    ten: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PACKED_FROM", 10)
    (tmp_path / "cache").write_text("a file stands where the folder would be")
    lines: list[str] = []
    dataset = read(ten, bad_files="skip", report=lines.append)
    assert np.array_equal(dataset.train.pixels, np.stack([planes(picture(seed)) for seed in EXPECTED]))
    assert lines[0].startswith(f"cannot create the folder {tmp_path / 'cache'}: a file stands where")
    assert lines[0].endswith("the images are decoded by every run, into memory")
    with pytest.raises(StorageError, match="a file stands where"):
        read(ten, bad_files="skip", memory_limit=0)


def test_nothing_is_packed_where_it_would_not_fit(
    ten: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 3 * SIZE * SIZE - 1))
    with pytest.raises(StorageError, match="0 MB of free space, and the decoded images need 0 MB"):
        read(ten, memory_limit=0)
    assert not decoded


def test_of_two_runs_one_packs_and_the_other_waits_and_says_so(
    ten: Path, read: Read, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    packing, waiting = threading.Event(), threading.Event()
    decode = folder._decode

    def slowly(path: Path, **options: Any) -> UInt8Array | str:
        packing.set()
        assert waiting.wait(60)
        return decode(path, **options)

    def tell(line: str) -> None:
        assert line.startswith("another run is packing these images into ")
        waiting.set()

    monkeypatch.setattr(folder, "_decode", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read, ten, memory_limit=0, bad_files="skip")
        assert packing.wait(60)
        second = read(ten, memory_limit=0, bad_files="skip", report=tell)
        assert second.content_hash() == first.result().content_hash()
    assert len(decoded) == 10


def test_progress_is_told_now_and_then(ten: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(step=4.0)  # seconds: a look at the clock at the beginning of a task and for each slice
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    lines: list[str] = []
    with pytest.raises(DataError, match="1 bad file"):
        read(ten, memory_limit=0, report=lines.append)
    path = stored(ten.parent, ".pixels")
    assert lines == [
        "hashed 6 of 10 images, 0 a second",
        f"packing 10 images into {path}, 0 MB",
        "packed 6 of 10 images, 0 a second",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much of a file is in memory")
def test_no_more_of_a_store_stays_in_memory_than_is_being_looked_at(root: Path, read: Read, tmp_path: Path) -> None:
    for seed in range(40):
        save(picture(seed, 256, 256), root / "eel" / f"{seed}.bmp")
    dataset = read(root, memory_limit=0, size=256)
    path = stored(tmp_path, ".pixels")

    def resident() -> int:
        """Bytes of the store that count as this process's memory."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = [next(line for line in lines if line.startswith("Rss:")) for line in lines if line.endswith(str(path))]
        assert found
        return sum(int(line.split()[1]) * 1024 for line in found)

    assert resident() == 0  # packed, looked through for the record, hashed
    assert dataset.train.pixels.nbytes == 42 * 3 * 256 * 256 and dataset.train.pixels.max() == 255
    assert resident() > 40 * 3 * 256 * 256
    replace(dataset, recorded_hash=None).content_hash()
    assert resident() == 0
    for workers in (0, 1):
        streamed = ImageStore.of(dataset.train, torch.device("cpu"), memory=10, workers=workers)
        pixels = torch.cat([batch.pixels for batch in streamed.batches(torch.arange(42), 8)])
        assert resident() == 0
        assert np.array_equal(pixels, dataset.train.pixels)
        let_go(dataset.train.pixels)


def test_the_folder_may_be_the_current_one(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    here = read(Path())
    assert here.name == "set"
    assert here.content_hash() == read(root).content_hash()
