"""Images per second of cifarlab's training step, beside its ceiling and the standard loop.

    python benchmarks/pipeline.py --data DIR [--json FILE] [--rounds 5] [--device cpu]

For EX-1 and EX-2, batch 128, fp32, four contenders, each in a process of its own, taking turns; medians of the rounds:

    ours        cifarlab's own loop, as `cifarlab run` calls it: batches, augmentation, schedule, sums, all of it
    ceiling     the same step in the same settings, on one batch that never changes
    standard_0  torchvision transforms per image on PIL images, DataLoader without workers, torch's defaults
    standard_2  the same with two workers

They are those of `cifarlab bench`, which compares any recipe with one of them at a time.

DIR holds cifar-10-batches-py or its like. Takes under five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
from multiprocessing.connection import Connection
from pathlib import Path

BATCH = 128
CONTENDERS = ("ours", "ceiling", "standard_0", "standard_2")
RECIPES = ("ex1", "ex2")

# (steps that are not timed, steps that are), of each round: caches warm, workers in step, a second or more measured.
STEPS = {
    "ex1": {"ours": (5, 60), "ceiling": (5, 60), "standard_0": (2, 20), "standard_2": (6, 30)},
    "ex2": {"ours": (3, 16), "ceiling": (3, 16), "standard_0": (1, 3), "standard_2": (1, 4)},
}


def serve(connection: Connection, contender: str, name: str, data: Path, device: str) -> None:
    """A contender's process: a round for each message, until it is told to end."""
    from cifarlab.bench.contenders import Job, make
    from cifarlab.recipe import load_recipe

    recipe = load_recipe(name, ["evaluate.test=false"]).resolved(dataset="cifar10", seed=0)
    one_round = make(contender.replace("_", " "), Job(recipe.to_yaml(), data, device, BATCH))
    warm, timed = STEPS[name][contender]
    connection.send("ready")
    while connection.recv():
        connection.send(timed * BATCH / one_round((warm, timed)))


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
