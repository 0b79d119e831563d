"""Images per second of cifarlab's training step, beside its ceiling and the standard loop.

    python benchmarks/pipeline.py --data DIR [--json FILE] [--rounds 5] [--device cpu]

For EX-1 and EX-2, batch 128, fp32, four contenders, each in a process of its own, taking turns; medians of the rounds:

    ours        cifarlab's own loop, as `cifarlab run` calls it: batches, augmentation, schedule, sums, all of it
    ceiling     the same model, optimizer, layout and memory settings, stepping on one batch that never changes
    standard_0  torchvision transforms per image on PIL images, DataLoader without workers, torch's defaults
    standard_2  the same with two workers

DIR holds cifar-10-batches-py or its like. Takes under five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BATCH = 128
CONTENDERS = ("ours", "ceiling", "standard_0", "standard_2")
RECIPES = ("ex1", "ex2")

# (steps that are not timed, steps that are), of each round: caches warm, workers in step, a second or more measured.
STEPS = {
    "ex1": {"ours": (5, 60), "ceiling": (5, 60), "standard_0": (2, 20), "standard_2": (6, 30)},
    "ex2": {"ours": (3, 16), "ceiling": (3, 16), "standard_0": (1, 3), "standard_2": (1, 4)},
}

# Runs one round and returns images per second.
Round = Callable[[], float]


def ours(name: str, data: Path, device_name: str) -> Round:
    from cifarlab import machine

    machine.keep_memory()

    from datetime import datetime

    from cifarlab.build import make_task
    from cifarlab.data.prepare import prepare
    from cifarlab.experiment import load
    from cifarlab.recipe import load_recipe
    from cifarlab.rundir import RunFolder
    from cifarlab.train import StopRequest, train

    warm, timed = STEPS[name]["ours"]
    recipe = load_recipe(name, ["evaluate.test=false"]).resolved(dataset="cifar10", seed=0)
    device = machine.choose_device(device_name)
    prepared = prepare(load(recipe, data, print), recipe.data, 0)
    folder = tempfile.TemporaryDirectory()

    class Clock:
        """The loop asks a display after each step whether it wants to look: that is when a step is over."""

        def __init__(self, stop: StopRequest) -> None:
            self.stop, self.step, self.began, self.seconds = stop, 0, 0.0, 0.0

        def due(self) -> bool:
            self.step += 1
            if self.step in (warm, warm + timed):
                machine.synchronize(device)
                self.seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
            if self.step == warm + timed:
                self.stop.signal = 2
            return False

        def progress(self, progress: Any) -> None: ...

        def epoch(self, entry: dict[str, Any], epochs: float) -> None: ...

        def report(self, text: str) -> None: ...

    def one_round() -> float:
        stop = StopRequest()
        clock = Clock(stop)
        run = RunFolder.create(Path(folder.name), recipe, datetime.now())
        train(recipe, make_task(recipe, prepared, device, None, lambda _: None), run, clock, stop, time.time())
        return timed * BATCH / clock.seconds

    return one_round


def ceiling(name: str, data: Path, device_name: str) -> Round:
    from cifarlab import machine

    machine.keep_memory()

    import torch
    from torch.nn import functional as F

    from cifarlab import numerics
    from cifarlab.models import build_model, channels_last_on_cpu
    from cifarlab.optim import build_optimizer
    from cifarlab.recipe import load_recipe

    warm, timed = STEPS[name]["ceiling"]
    recipe, device = load_recipe(name), machine.choose_device(device_name)
    numbers = numerics.exact(device, channels_last_on_cpu=channels_last_on_cpu(recipe.model))
    side = recipe.evaluation_side or 32
    model = build_model(recipe.model, classes=10, size=(side, side), seed=0).to(device)
    model.to(memory_format=numbers.memory_format)
    optimizer = build_optimizer(recipe.optimizer, model)
    images = torch.randn(BATCH, 3, side, side, device=device).contiguous(memory_format=numbers.memory_format)
    labels = torch.randint(0, 10, (BATCH,), device=device)

    def steps(count: int) -> None:
        for _ in range(count):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        machine.synchronize(device)

    def one_round() -> float:
        steps(warm)
        began = time.perf_counter()
        steps(timed)
        return timed * BATCH / (time.perf_counter() - began)

    return one_round


def standard(name: str, data: Path, device_name: str, workers: int) -> Round:
    import torch
    from PIL import Image
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from cifarlab import machine
    from cifarlab.data.cifar import read_cifar
    from cifarlab.models import build_model
    from cifarlab.recipe import load_recipe

    warm, timed = STEPS[name][f"standard_{workers}"]
    recipe, device = load_recipe(name), machine.choose_device(device_name)
    found = read_cifar("cifar10", data)
    assert found is not None, f"no CIFAR-10 in {data}"
    pixels, targets = found.train.pixels.transpose(0, 2, 3, 1), found.train.labels
    side = recipe.evaluation_side or 32
    augment: list[Any] = []
    if recipe.train.resolution:
        augment += [v2.Resize(side, antialias=True)]
    if recipe.augment.crop_padding:
        augment += [v2.RandomCrop(side, padding=recipe.augment.crop_padding)]
    if recipe.augment.flip:
        augment += [v2.RandomHorizontalFlip()]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.49] * 3, [0.25] * 3)]
    transform = v2.Compose([*augment, *to_tensor])

    class Pictures(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(targets)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.fromarray(pixels[index])), int(targets[index])

    loader = DataLoader(
        Pictures(),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        # What a plain script has on Linux; a spawned process, as this is one, would spawn.
        multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
    )
    model = build_model(recipe.model, classes=10, size=(side, side), seed=0).to(device)
    kind = torch.optim.Adam if recipe.optimizer.name == "adam" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def steps(count: int) -> None:
        for _ in range(count):
            images, labels = next(batches)
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()

    def one_round() -> float:
        steps(warm)
        began = time.perf_counter()
        steps(timed)
        seconds = time.perf_counter() - began
        if workers:
            time.sleep(1.0)  # for the workers to fill their queue again: what it lends one round it owes to no other
        return timed * BATCH / seconds

    return one_round


def serve(connection: Connection, contender: str, name: str, data: Path, device: str) -> None:
    """A contender's process: a round for each message, until it is told to end."""
    if contender == "ours":
        one_round = ours(name, data, device)
    elif contender == "ceiling":
        one_round = ceiling(name, data, device)
    else:
        one_round = standard(name, data, device, int(contender[-1]))
    connection.send("ready")
    while connection.recv():
        connection.send(one_round())


def measure(name: str, data: Path, device: str, rounds: int) -> dict[str, list[float]]:
    """Images per second of each contender in each round."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    ends: dict[str, Connection] = {}
    processes = []
    try:
        for contender in CONTENDERS:
            ends[contender], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, contender, name, data, device)))
            processes[-1].start()
            theirs.close()
            ends[contender].recv()
        for number in range(rounds):
            for contender in random.Random(number).sample(CONTENDERS, len(CONTENDERS)):
                ends[contender].send(True)
                results[contender].append(ends[contender].recv())
        for end in ends.values():
            end.send(False)
    except EOFError:
        raise SystemExit(f"{name}: a contender ended early; its error is above") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py or its like")
    parser.add_argument("--json", type=Path, help="write the medians there: {recipe: {contender: images/s}}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    medians: dict[str, dict[str, float]] = {}
    print(f"images/s, batch {BATCH}, medians of {arguments.rounds} alternating rounds, {platform.machine()}")
    print(f"{'':6}" + "".join(f"{contender:>13}" for contender in CONTENDERS) + "   ours/ceiling  ours/best standard")
    for name in RECIPES:
        results = measure(name, arguments.data, arguments.device, arguments.rounds)
        medians[name] = row = {contender: statistics.median(values) for contender, values in results.items()}
        best = max(row["standard_0"], row["standard_2"])
        print(
            f"{name:6}" + "".join(f"{row[contender]:13,.0f}" for contender in CONTENDERS),
            f"{row['ours'] / row['ceiling']:13.1%} {row['ours'] / best:19.2f}",
        )
        for contender, values in results.items():
            print(f"       {contender}: {min(values):,.0f} to {max(values):,.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
