"""What makes a short run good, and how fast the recipes that race are. For RESULTS.md.

    python studies/racing.py try airbench94 --data DIR --seeds 3 --jobs 2
    python studies/racing.py race airbench94 --data DIR --seeds 3
    python studies/racing.py race airbench94 --data DIR --seeds 10 --together --package --set 'train.numerics={…}'

`try` leaves out (or puts in) one ingredient of a recipe at a time and looks at validation images alone: 5,000 of the
training images, drawn by the seed; accuracy with the recipe's test-time augmentation; differences paired by seed. Times
are comparable with one job only. `race` trains on all 50,000 and scores the test set: the recipes take turns, seed by
seed, nothing beside them, and each run begins cold, as on a new machine, so that `total_time` counts start, probing,
compilation and test-time augmentation. With `--together` the seeds of a recipe run one after the other in one process;
one more comes first, warms up (libraries, compilation) and is left out of the times. So does the PyPI package
`airbench` count on a GPU, which `--package` runs beside them.
What is finished is not run again, so both can be interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from cifarlab.compare import Figure, percent, seconds
from cifarlab.data.sources import load_dataset
from cifarlab.recipe import load_recipe
from cifarlab.rundir import RunFolder
from study import Plan, Study, add_arguments, add_jobs, line

# Leave-one-out, recipe by recipe: what each ingredient is replaced by.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "airbench94": {
        "random flip": ("augment.flip=random",),
        "no translation": ("augment.translate=0",),
        "label smoothing 0.1": ("loss.label_smoothing=0.1",),
        "no label smoothing": ("loss.label_smoothing=0",),
        "whitening bias to the end": ("model.whitening_bias=null",),
        "24, 28, then 32 pixels": ("train.resolution=[[0, 24], [0.3, 28], [0.6, 32]]",),
        "first group frozen late": ("model.freeze_late=[[0.8, 2]]",),
    },
    "fast90": {
        "no pruning": ("train.prune=null",),
        "32 pixels throughout": ("train.resolution=32",),
        "24, then 32 pixels": ("train.resolution=[[0, 24], [0.75, 32]]",),
        "two convolutions in each group": ("model.depths=null",),
        "three convolutions in each group": ("model.depths=[3, 3, 3]",),
        "random flip": ("augment.flip=random",),
        "no translation": ("augment.translate=0",),
        "translation by up to 4": ("augment.translate=4",),
        "label smoothing 0.2": ("loss.label_smoothing=0.2",),
        "no label smoothing": ("loss.label_smoothing=0",),
        "whitening bias to the end": ("model.whitening_bias=null",),
        "first group frozen late": ("model.freeze_late=[[0.8, 2]]",),
        "Muon at 0.24": ("optimizer.lr=0.24",),
        "five Newton-Schulz steps": ("optimizer.ns_steps=5",),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    trying = modes.add_parser("try", help="variants of a recipe, on validation images")
    trying.add_argument("recipe", choices=sorted(VARIANTS))
    trying.add_argument("--only", nargs="*", default=[], help="of the variants; the recipe itself is always run")
    trying.add_argument(
        "--set", dest="overrides", nargs="*", default=[], help="for all of them, such as train.epochs=4"
    )
    add_jobs(trying)
    racing = modes.add_parser("race", help="recipes beside each other, on the test images")
    racing.add_argument("recipes", nargs="+")
    racing.add_argument("--warm", action="store_true", help="keep what was measured and compiled by earlier runs")
    racing.add_argument("--together", action="store_true", help="all seeds in one process, after one to warm up")
    racing.add_argument("--package", action="store_true", help="run the package airbench as well, which needs a GPU")
    racing.add_argument("--set", dest="overrides", nargs="*", default=[], help="for all of them")
    for each in (trying, racing):
        add_arguments(each, f"runs/racing-{each.prog.split()[-1]}")
        each.add_argument("--seeds", type=int, default=3, help="so many, from 0 on")
    arguments = parser.parse_args()
    if arguments.mode == "race" and arguments.package and importlib.util.find_spec("airbench") is None:
        racing.error("--package needs the package airbench: pip install airbench")
    seeds = range(arguments.seeds)
    if arguments.mode == "try":
        study = Study(arguments.data, arguments.runs, arguments.jobs, arguments.device)
        variants = VARIANTS[arguments.recipe]
        names = [name for name in variants if not arguments.only or name in arguments.only]
        try_variants(arguments.recipe, {name: variants[name] for name in names}, arguments.overrides, seeds, study)
    else:
        study = Study(arguments.data, arguments.runs, 1, arguments.device, not arguments.warm)
        race(arguments.recipes, seeds, study, arguments.overrides, together=arguments.together)
        if arguments.package:
            race_package(arguments.data, len(seeds))


def try_variants(
    recipe: str, variants: dict[str, tuple[str, ...]], overrides: list[str], seeds: range, study: Study
) -> None:
    dataset = load_recipe(recipe).datasets[0]
    common = ("data.validation=0.1", *overrides)
    every = {"as it is": (), **variants}
    plans = [
        Plan(f"{recipe}/{name}", recipe, dataset, seed, (*common, *changes), False)
        for seed in seeds
        for name, changes in every.items()
    ]
    folders = study.run_all(plans)
    found = {name: folders[number :: len(every)] for number, name in enumerate(every)}
    base = [_validation(folder) for folder in found["as it is"]]
    print(line("variant", "validation accuracy", "difference", "PFLOP", "training time"))
    for name, runs in found.items():
        accuracies = [_validation(folder) for folder in runs]
        paired = [(one - other) * 100 for one, other in zip(accuracies, base, strict=True)]
        spread = f" ± {statistics.stdev(paired):.2f}" if len(paired) > 1 else ""
        difference = "" if name == "as it is" else f"{statistics.fmean(paired):+.2f}{spread}"
        logs = [folder.train_log() for folder in runs]
        work = logs[0].get("flops")
        times = seconds(Figure.of([log["train_time"] for log in logs]))
        print(line(name, percent(Figure.of(accuracies)), difference, f"{work / 1e15:.3f}" if work else "", times))


def race(recipes: list[str], seeds: range, study: Study, overrides: list[str], *, together: bool) -> None:
    common = ("data.validation=0", *overrides)

    def plan(recipe: str, seed: int) -> Plan:
        return Plan(recipe, recipe, load_recipe(recipe).datasets[0], seed, common, True)

    if together:
        more = range(len(seeds) + 1)
        each = [study.run_together(plan(recipe, 0), more) for recipe in recipes]
        for recipe, runs in zip(recipes, each, strict=True):
            print(f"{recipe}: {runs[0].train_log()['train_time']:.1f} s of training where it warmed up (seed 0)")
        folders = [runs[number] for number in more[1:] for runs in each]
    else:
        folders = study.run_all([plan(recipe, seed) for seed in seeds for recipe in recipes])
    print(
        line(
            "recipe", "test accuracy", "n", "total time", "training time", "images/s", "GFLOP/s", "total time / first's"
        )
    )
    first = [_total(folder) for folder in folders[:: len(recipes)]]
    for number, recipe in enumerate(recipes):
        runs = folders[number :: len(recipes)]
        logs = [folder.train_log() for folder in runs]
        ratios = [_total(folder) / other for folder, other in zip(runs, first, strict=True)]
        rates = [log.get("flops_per_second") for log in logs]
        print(
            line(
                recipe,
                percent(Figure.of([_test(folder) for folder in runs])),
                str(len(runs)),
                seconds(Figure.of([_total(folder) for folder in runs])),
                _short([log["train_time"] for log in logs]),
                f"{statistics.fmean(log['images_per_second'] for log in logs):,.0f}",
                f"{statistics.fmean(rate / 1e9 for rate in rates if rate):,.0f}" if all(rates) else "",
                f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )


def race_package(data: Path, runs: int) -> None:
    """airbench's `train94` on CIFAR-10, as it comes; it counts training and six-view evaluation, after a warm-up."""
    airbench = importlib.import_module("airbench")
    found = load_dataset("cifar10", load_recipe("airbench94").data, None, data, print)
    assert found.test is not None  # CIFAR has one
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        place = Path("cifar10")  # where it looks, and would download into
        place.mkdir()
        for name, part in (("train", found.train), ("test", found.test)):
            images = torch.from_numpy(np.ascontiguousarray(part.pixels.transpose(0, 2, 3, 1)))
            labels = torch.from_numpy(part.labels)
            torch.save({"images": images, "labels": labels, "classes": list(found.classes)}, place / f"{name}.pt")
        with contextlib.redirect_stdout(io.StringIO()):
            airbench.warmup94()
        tables = []
        for run in range(runs):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                airbench.train94(run=run)
            tables.append(said.getvalue())
    # Its last row has the accuracy with six views, and the seconds, in its last columns.
    ends = [[cell.strip() for cell in table.splitlines()[-2].split("|")] for table in tables]
    accuracies, times = ([float(cells[number]) for cells in ends] for number in (-3, -2))
    rate = f"{statistics.fmean(9.9 * 50_000 / taken for taken in times):,.0f}"
    print(line("package airbench", percent(Figure.of(accuracies)), str(runs), "", _short(times), rate, "", ""))


def _short(times: list[float]) -> str:
    """Seconds, as mean ± std, to the hundredth where they are few."""
    if max(times) >= 60:
        return seconds(Figure.of(times))
    spread = f" ± {statistics.stdev(times):.2f}" if len(times) > 1 else ""
    return f"{statistics.fmean(times):.2f}{spread} s"


def _validation(folder: RunFolder) -> float:
    """Accuracy with the recipe's test-time augmentation, where it has one."""
    log = folder.train_log()
    return float(log["tta"]["val_accuracy"] if log["tta"] else log["best_val_accuracy"])


def _test(folder: RunFolder) -> float:
    log = folder.test_log()
    assert log is not None
    return float(log["tta"]["accuracy"] if log["tta"] else log["accuracy"])


def _total(folder: RunFolder) -> float:
    log = folder.test_log()
    assert log is not None
    return float(log["total_time"])


if __name__ == "__main__":
    main()
