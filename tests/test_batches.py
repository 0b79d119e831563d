"""Batches: every image once an epoch, in an order that is a function of (seed, epoch), resident or streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cifarlab.data.batches import ImageStore, epoch_order
from cifarlab.data.dataset import Images
from cifarlab.errors import DataError

CPU = torch.device("cpu")


def some_images(count: int = 53) -> Images:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return Images(pixels, generator.integers(0, 5, count))


def on_disk(images: Images, path: Path) -> Images:
    images.pixels.tofile(path)
    return Images(np.memmap(path, np.uint8, "r", shape=images.pixels.shape), images.labels)


def test_an_epoch_has_every_sample_once_in_a_fresh_order() -> None:
    samples = torch.arange(3, 103)
    orders = [epoch_order(samples, seed=1, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, samples)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], epoch_order(samples, seed=2, epoch=0))
    torch.manual_seed(99)
    assert torch.equal(orders[2], epoch_order(samples, seed=1, epoch=2))


@pytest.mark.parametrize("batch_size", [1, 8, 53, 100])
def test_batches_hold_the_images_asked_for_in_order_with_a_short_last_one(batch_size: int) -> None:
    images = some_images()
    store = ImageStore.of(images, CPU, memory=None, workers=0)
    order = epoch_order(torch.arange(53), 0, 0)
    batches = list(store.batches(order, batch_size))
    assert [len(batch.labels) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat([batch.samples for batch in batches]), order)
    assert np.array_equal(torch.cat([batch.pixels for batch in batches]).numpy(), images.pixels[order.numpy()])
    assert np.array_equal(torch.cat([batch.labels for batch in batches]).numpy(), images.labels[order.numpy()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mapped", [False, True])
def test_streaming_gives_the_resident_batches(workers: int, mapped: bool, tmp_path: Path) -> None:
    images = some_images()
    stored = on_disk(images, tmp_path / "pixels") if mapped else images
    resident = ImageStore.of(images, CPU, memory=None, workers=0)
    streamed = ImageStore.of(stored, CPU, memory=10, workers=workers)
    assert resident.resident and not streamed.resident
    order = epoch_order(torch.arange(53), 0, 0)
    pairs = list(zip(resident.batches(order, 8), streamed.batches(order, 8), strict=True))
    assert len(pairs) == 7
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_read_only_map_that_fits_becomes_resident_without_touching_the_file(tmp_path: Path) -> None:
    images = on_disk(some_images(), tmp_path / "pixels")
    store = ImageStore.of(images, CPU, memory=None, workers=0)
    assert isinstance(store.pixels, torch.Tensor)
    store.pixels.zero_()
    assert np.array_equal(images.pixels, some_images().pixels)


def test_a_map_is_read_from_its_file_in_a_worker_rather_than_copied_to_it(tmp_path: Path) -> None:
    import pickle

    from cifarlab.data.batches import _rows

    images = on_disk(some_images(2000), tmp_path / "pixels")
    sent = pickle.dumps(_rows(images.pixels))
    assert len(sent) < 1000
    index = np.array([5, 1999, 0])
    assert np.array_equal(pickle.loads(sent)[index].numpy(), images.pixels[index])
    offset = 1500 * 3 * 8 * 8
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", offset, (500, 3, 8, 8))
    assert np.array_equal(pickle.loads(pickle.dumps(_rows(mapped)))[index % 500].numpy(), mapped[index % 500])
    part = images.pixels[1500:]  # says the same offset as the whole
    assert np.array_equal(pickle.loads(pickle.dumps(_rows(part)))[index[::2] % 500].numpy(), part[index[::2] % 500])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_file_that_is_lost_while_it_is_streamed_is_one_sentence(tmp_path: Path, workers: int, fault: str) -> None:
    path = tmp_path / "pixels"
    store = ImageStore.of(on_disk(some_images(), path), CPU, memory=10, workers=workers)
    if fault == "cut":
        with path.open("r+b") as file:
            file.truncate(52 * 3 * 8 * 8 + 1)
    else:
        path.unlink()
    with pytest.raises(DataError) as raised:
        list(store.batches(torch.arange(53), 8))
    reason = "it has been cut short" if fault == "cut" else "No such file or directory"
    assert str(raised.value) == (
        f"{path}, from which the images are streamed, can't be read any more: {reason}; run again, and they are "
        "decoded again"
    )


KILL_A_WORKER = """
import multiprocessing, os, signal, sys
import numpy as np, torch
from cifarlab.data.batches import ImageStore, reader_died
from cifarlab.data.dataset import Images
from cifarlab.errors import DataError
images = Images(np.zeros((4000, 3, 8, 8), np.uint8), np.zeros(4000, np.int64))
batches = ImageStore.of(images, torch.device("cpu"), memory=10, workers=1).batches(torch.arange(4000), 1)
next(batches)
try:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    list(batches)
except Exception as error:  # torch raises it wherever the main thread is
    print(error if type(error).__name__ == "RunError" else reader_died(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a worker by a POSIX signal")
def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    """In a process of its own: from then on torch may raise anywhere, in pytest too."""
    command = [sys.executable, "-c", KILL_A_WORKER]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.startswith("a process that reads images died") and "data.workers=0" in output
