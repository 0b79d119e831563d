"""Images per second and memory while images stream from a folder's store, against their number.

    python benchmarks/folders.py [--sizes 10000 30000 100000 300000 1000000] [--out folders.png] [--seconds 30]

For each size, 64x64 images of noise are made on the spot, and packed as `cifarlab run` packs a folder that it sees for
the first time, except that nobody decodes a million JPEGs for it: the blocks of pixels go straight to
`data.packed.packed`. The store is 12.3 kB an image, 12.3 GB for a million, and is removed before the next is made.

Then, in a process for each number of workers, set up as a run is: open the store, prepare the dataset (split, leak
check, mean and standard deviation, from the store's record), and stream the training images, 72 % of all, in batches of
128, through `ImageStore` and `Pipeline.train` with random crops and flips, epoch after epoch for --seconds (1,000 gets
through the million once at a thousand images/s). Nothing is trained.

Memory is the most that training process and workers held together while they streamed, looked at twice a second: on
Linux PSS, which counts each page that processes share once in all; elsewhere RSS, which counts it for each of them. The
kernel's own cache of the file is nobody's and is not counted. Two things change memory at any size: in the first
hundred batches the process grows, as it keeps what it has freed (`machine.keep_memory`); and workers that are started
for a second epoch hold on to what the process had in memory then, while it writes it anew. What grows with the number
of images is the labels, the order, the facts and the draws of an epoch: some 150 bytes an image.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from cifarlab.data.packed import Block, Store, packed

if TYPE_CHECKING:
    from torch import Tensor

SIDE, BATCH, CLASSES = 64, 128, 100
SHAPE = (3, SIDE, SIDE)
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
WORKERS = (0, 2)
BLOCK = 1000
# Batches before the clock starts: workers are up by then, and memory is warm.
WARM = 20
EVERY = 0.5  # seconds between two looks at the memory


@dataclass(frozen=True)
class Row:
    """start: seconds from opening the store to the first epoch. epochs: how many were streamed. memory: bytes."""

    images: int
    workers: int
    start: float
    epochs: float
    images_per_second: float
    memory: int
    measured: str


def noise(count: int, start: int) -> Iterator[Block]:
    """Images of noise from the one at `start` on, as blocks of what was decoded."""
    for begin in range(start, count, BLOCK):
        pixels = np.random.default_rng(begin).integers(0, 256, (min(BLOCK, count - begin), *SHAPE), np.uint8)
        yield Block(len(pixels), pixels, {}, Counter())


def open_store(folder: Path, count: int) -> Store:
    return packed(folder / f"noise-{count}", count, SHAPE, lambda start: noise(count, start), print)


def resident() -> tuple[int, str]:
    """Bytes that this process and its workers hold, and what that is called."""
    me = psutil.Process()
    total, name = 0, "RSS"
    for process in (me, *me.children()):
        try:
            if psutil.LINUX:
                total, name = total + process.memory_full_info().pss, "PSS"
            else:
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # a worker that is done
    return total, name


def stream(connection: Connection, folder: Path, count: int, workers: int, seconds: float) -> None:
    """Measure one row, in a process of its own."""
    multiprocessing.set_start_method(None, force=True)  # the system's for workers, as in a run: "spawn" is passed on
    from cifarlab import machine

    machine.prepare()

    import torch

    from cifarlab.data.augment import Pipeline
    from cifarlab.data.batches import ImageStore, epoch_order
    from cifarlab.data.dataset import Dataset
    from cifarlab.data.prepare import prepare
    from cifarlab.recipe_sections import Augment, Data

    began = time.perf_counter()
    store = open_store(folder, count)
    images = store.images(0, np.arange(count, dtype=np.int64) % CLASSES)
    names = tuple(f"{number:03}" for number in range(CLASSES))
    dataset = store.with_content_hash(Dataset("noise", names, images, None, None, "noise"))
    prepared = prepare(dataset, Data(), seed=0)
    device = torch.device("cpu")
    pipeline = Pipeline(
        size=(SIDE, SIDE),
        resolution=SIDE,
        reference=None,
        interpolation="bilinear",
        augment=Augment(crop_padding=8, flip="random"),
        mean=prepared.mean,
        std=prepared.std,
        device=device,
    )
    source = ImageStore.of(prepared.train.images, device, memory=0, workers=workers)  # 0: none of them resident
    samples = torch.from_numpy(prepared.train.index)
    start = time.perf_counter() - began

    def batches() -> Iterator[Tensor]:
        for epoch in itertools.count():
            draws = pipeline.draw(0, epoch, len(source))
            for batch in source.batches(epoch_order(samples, 0, epoch), BATCH):
                yield pipeline.train(batch.pixels, batch.samples, draws)

    memory, measured = resident()
    seen = timed = 0
    clock = looked = time.perf_counter()
    for number, batch in enumerate(batches()):
        seen += len(batch)
        now = time.perf_counter()
        if number < WARM:
            clock = now
        else:
            timed += len(batch)
        if now - looked >= EVERY:
            memory = max(memory, resident()[0])
            looked = time.perf_counter()
            clock += looked - now  # the look is not on the clock
        if now - clock >= seconds:
            break
    speed = timed / (time.perf_counter() - clock)
    connection.send(Row(count, workers, start, seen / len(samples), speed, memory, measured))


def measure(folder: Path, count: int, workers: int, seconds: float) -> Row:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=stream, args=(theirs, folder, count, workers, seconds))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv()
        return row
    except EOFError:
        raise SystemExit(f"{count:,} images: the process that measures ended early; its error is above") from None
    finally:
        process.join()


def draw(rows: list[Row], path: Path) -> None:
    """Two panels against the number of images: images per second, and memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    speed, memory = figure.subplots(1, 2)
    colours = dict(zip(WORKERS, ("#0072B2", "#D55E00"), strict=True))
    for workers, colour in colours.items():
        mine = [row for row in rows if row.workers == workers]
        sizes, label = [row.images for row in mine], "no workers" if not workers else f"{workers} workers"
        speed.plot(sizes, [row.images_per_second for row in mine], "o-", color=colour, label=label)
        memory.plot(sizes, [row.memory / 1e6 for row in mine], "o-", color=colour, label=label)
    sizes = sorted({row.images for row in rows})
    line = np.geomspace(sizes[0], sizes[-1])
    memory.plot(line, line * SIDE * SIDE * 3 / 1e6, ":", color="grey", label="the images themselves")
    speed.set_ylabel("images/s, augmented")
    memory.set_ylabel(f"MB in memory ({rows[0].measured}), with the workers")
    speed.set_ylim(0, 1.15 * max(row.images_per_second for row in rows))
    memory.set_ylim(0, 1.6 * max(row.memory for row in rows) / 1e6)
    for axes in (speed, memory):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda size, _: f"{size / 1e6:g} M" if size >= 1e6 else f"{size / 1e3:g} k")
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(f"images of {SIDE}x{SIDE}")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of images")
    parser.add_argument("--out", type=Path, default=Path("folders.png"), help="where the plot goes")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to stream for each row of the table")
    parser.add_argument("--folder", type=Path, help="where the stores are made; default: the system's for such files")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()

    rows: list[Row] = []
    print(f"{'images':>10} {'workers':>8} {'start, s':>9} {'epochs':>7} {'images/s':>9} {'MB':>6}")
    for count in sorted(arguments.sizes):
        # A folder for each: it goes with the store in it, also where the program is interrupted.
        with tempfile.TemporaryDirectory(prefix="cifarlab-", dir=arguments.folder) as name:
            needed, free = 1.1 * count * SIDE * SIDE * 3, shutil.disk_usage(name).free
            if free < needed:
                raise SystemExit(f"{name} has {free / 1e9:.1f} GB free; {count:,} images need {needed / 1e9:.1f} GB")
            open_store(Path(name), count)
            for workers in WORKERS:
                row = measure(Path(name), count, workers, arguments.seconds)
                rows.append(row)
                print(
                    f"{count:10,} {workers:8} {row.start:9.1f} {row.epochs:7.2f} {row.images_per_second:9,.0f} "
                    f"{row.memory / 1e6:6,.0f} {row.measured}",
                    flush=True,
                )
    draw(rows, arguments.out)
    print(arguments.out)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
