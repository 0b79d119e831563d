"""Run folders and studies made up of random figures, quickly: nothing is trained, and nothing flushed to a disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cifarlab import metrics
from cifarlab.recipe import load_recipe
from cifarlab.report.data import Report, read_report
from cifarlab.rundir import RunFolder

HOSTILE = "</script><script>alert(1)</script>=cmd|'/C calc'!A0 \x1b[31m \u2028 \"&\ud800"


def recipe_text(*overrides: str, recipe: str = "ex1", dataset: str = "cifar10", seed: int = 0) -> str:
    return load_recipe(recipe, overrides).resolved(dataset=dataset, seed=seed).to_yaml()


def make_logs(generator: np.random.Generator, accuracy: float, epochs: int, seconds: float) -> dict[str, Any]:
    """A train.json whose curves come near `accuracy`."""
    rise = 1 - np.exp(-4 * np.arange(1, epochs + 1) / epochs)
    val = accuracy * rise + generator.normal(0, 0.008, epochs)
    train = val + 0.06 * rise**3
    return {
        "status": "finished", "dataset": "cifar10", "classes": 10, "parameters": 545_098,
        "started": "2026-11-28T14:00:00", "best_epoch": int(val.argmax()) + 1, "best_weights": "raw",
        "best_val_accuracy": float(val.max()), "stopped_early": False, "train_time": seconds,
        "overfitting_gap": float((train - val)[-1]),
        "wall_time": seconds * 1.1, "images_per_second": 45_000 * epochs / seconds, "peak_memory": 1_200_000_000,
        "flops": 2e14, "flops_per_second": 2e14 / seconds,
        "epochs": [
            {
                "epoch": epoch + 1,
                "train_loss": 2.3 * (1 - train[epoch]) + 0.05, "train_accuracy": float(train[epoch]),
                "val_loss": 2.3 * (1 - val[epoch]) + 0.2 * rise[epoch] ** 4, "val_accuracy": float(val[epoch]),
                "ema_val_loss": None, "ema_val_accuracy": None, "seconds": seconds / epochs,
                "lr": 1e-3 * float(1 + np.cos(np.pi * epoch / epochs)) / 2 + 1e-6,
            }
            for epoch in range(epochs)
        ],
    }  # fmt: skip


def make_predictions(
    generator: np.random.Generator, count: int, classes: int, accuracy: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits, float32 (count, classes), and labels, int64: about that accurate, neighbouring classes confused."""
    labels = np.arange(count) % classes
    meant = np.where(generator.random(count) < accuracy, labels, (labels + generator.integers(1, 3, count)) % classes)
    logits = generator.normal(0, 1.0, (count, classes))
    logits[np.arange(count), meant] += generator.gamma(6.0, 1.0, count)
    logits[np.arange(count), labels] += 1.0
    return logits.astype(np.float32), labels.astype(np.int64)


def make_run(
    place: Path,
    *overrides: str,
    recipe: str = "ex1",
    dataset: str = "cifar10",
    seed: int = 0,
    accuracy: float = 0.7,
    seconds: float = 120.0,
    epochs: int = 12,
    classes: int | list[str] = 10,
    count: int = 1000,
    pictures: bool = True,
    text: str | None = None,
    side: int = 32,
    **changes: Any,
) -> RunFolder:
    """A whole run folder. text: its recipe.yaml, where that is at hand. changes: entries of train.json."""
    place.mkdir(parents=True)
    run = RunFolder(place)
    generator = np.random.default_rng(seed + 1000 * epochs)
    names = [f"class {number}" for number in range(classes)] if isinstance(classes, int) else classes
    (place / "recipe.yaml").write_text(text or recipe_text(*overrides, recipe=recipe, dataset=dataset, seed=seed))
    log = make_logs(generator, accuracy, epochs, seconds) | {"dataset": dataset, "classes": len(names)} | changes
    (place / "train.json").write_text(json.dumps(log))
    logits, labels = make_predictions(generator, count, len(names), accuracy)
    test = {**metrics.scores(logits, labels), "test_time": 1.5, "classes": names, "test_looks": 1, "tta": None}
    (place / "test.json").write_text(json.dumps(test))
    (place / "environment.json").write_text(json.dumps(environment(dataset, count)))
    if pictures:
        np.savez(place / "predictions.npz", logits=logits, labels=labels, index=np.arange(count))
        np.savez(place / "examples.npz", **examples(generator, labels, side))
    return run


def environment(dataset: str, count: int) -> dict[str, Any]:
    none = {"images": 0, "conflicting_labels": 0}
    return {
        "cifarlab": "0.1.0", "device": "cpu", "gpu": None, "cpu": "AMD EPYC", "threads": 2, "torch": "2.14.1",
        "numerics": {"name": "exact", "dtype": "float32", "memory_format": "contiguous_format", "compiled": False},
        "git": {"commit": "e07991bf403d15d821c2e17a0d06aad03dd10dcc", "dirty": True}, "command": "cifarlab run ex1",
        "data": {
            "source": f"files of {dataset}", "content_hash": "ab" * 32, "notes": ["a note"],
            "images": {"train": 45_000, "validation": 5_000, "test": count},
            "leaks": {
                "within_train": none, "train_validation": none, "train_test": {"images": 3, "conflicting_labels": 1},
                "validation_test": none, "test_twins_in_train": [1, 5, 7],
            },
        },
    }  # fmt: skip


def examples(generator: np.random.Generator, labels: np.ndarray[Any, Any], side: int) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, length in (("most_wrong", 32), ("least_sure", 32), ("augmented", side)):
        index = generator.permutation(len(labels))[:24].astype(np.int64)
        ramp = np.linspace(0, 1, length)
        colours = generator.uniform(0, 255, (len(index), 3, 2, 1, 1))
        images = colours[:, :, 0] * ramp[:, None] + colours[:, :, 1] * (1 - ramp) * generator.uniform(0.5, 1)
        noise = generator.normal(0, 12, images.shape)
        arrays |= {name: (images + noise).clip(0, 255).astype(np.uint8), f"{name}_index": index}
        arrays[f"{name}_labels"] = labels[index]
    return arrays


def make_study(place: Path, *, arms: int = 8, design: str = "grid", changes: dict[str, Any] | None = None) -> Path:
    """A study.json of made-up figures; returns its path. changes: other entries than those."""
    generator = np.random.default_rng(0)
    place.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = [{"id": "00-baseline", "name": "baseline", "changes": {}}]
    results: list[dict[str, Any]] = [
        {"arm": "00-baseline", "n": 3, "mean": 0.71, "std": 0.003, "pairs": 3, "difference": None, "low": None,
         "high": None, "p": None, "p_holm": None, "verdict": "baseline", "more_seeds": None, "seconds": 118.0}
    ]  # fmt: skip
    for number in range(1, arms):
        rate = float(f"{10 ** generator.uniform(-4, -1):.3g}")
        kind = ("adamw", "sgd", "muon")[number % 3]
        name = f"{number:02}-arm"
        fields = {"optimizer.lr": rate, "optimizer.name": kind, "augment.crop_padding": number % 5}
        made.append({"id": name, "name": ", ".join(f"{k}={v}" for k, v in fields.items()), "changes": fields})
        difference = float(generator.normal(0, 0.006))
        half = float(generator.uniform(0.001, 0.006))
        better, worse = difference - half > 0, difference + half < 0
        verdict = "better" if better else "worse" if worse else "within noise"
        results.append(
            {"arm": name, "n": 3, "mean": 0.71 + difference, "std": 0.003, "pairs": 3, "difference": difference,
             "low": difference - half, "high": difference + half, "p": 0.08, "p_holm": 0.16, "verdict": verdict,
             "more_seeds": None if better or worse else 12, "seconds": 120.1}
        )  # fmt: skip
    runs = [
        {"arm": arm["id"], "seed": seed, "folder": None, "status": "finished", "val_accuracy": result["mean"],
         "seconds": 120.0, "error": None}
        for arm, result in zip(made, results, strict=True)
        for seed in range(3)
    ]  # fmt: skip
    study = {
        "format": 1, "name": "what augmentation is worth", "created": "2026-11-28T14:00:00", "status": "finished",
        "design": design, "dataset": "cifar10", "seeds": [0, 1, 2], "resolve": 0.002, "arms": made, "runs": runs,
        "results": results, "cifarlab": "0.1.0", "command": "cifarlab ablate", "factors": [], "recipe": {},
        "test": {"looks": [{"when": "2026-11-28T15:00:00", "arm": "01-arm", "seed": 0, "accuracy": 0.7}]},
    }  # fmt: skip
    (place / "study.json").write_text(json.dumps(study | (changes or {})))
    return place / "study.json"


def a_thousand(place: Path) -> Report:
    """What is read of a thousand runs, from the records of four; the first 60 have sections."""
    make_many(place, 4)
    report = read_report([place])
    generator = np.random.default_rng(2)
    some = [replace(report.runs[number % 4], number=number) for number in range(1000)]
    report.runs = [
        replace(
            run,
            detail=run.detail if run.number < 60 else None,
            accuracy=float(generator.uniform(0.5, 0.9)),
            train_time=float(generator.uniform(60, 600)),
        )
        for run in some
    ]
    return report


def make_many(place: Path, count: int) -> None:
    """So many small runs without pictures, of five recipes."""
    generator = np.random.default_rng(1)
    texts = {
        (name, rate): recipe_text(f"optimizer.lr={rate}", recipe=name)
        for name in ("ex1", "ex2")
        for rate in (1e-3, 3e-3)
    }
    first = make_run(place / "ex1" / "cifar10" / "0", pictures=False, epochs=5, count=200)
    environment = (first.path / "environment.json").read_text()
    for number in range(1, count):
        name, rate = list(texts)[number % 4]
        run = place / name / "cifar10" / str(number)
        run.mkdir(parents=True)
        seconds = float(generator.uniform(60, 600))
        accuracy = min(0.97, 0.5 + 0.08 * float(np.log(seconds / 40)) + float(generator.normal(0, 0.03)))
        (run / "recipe.yaml").write_text(texts[name, rate].replace("seed: 0", f"seed: {number % 5}"))
        (run / "train.json").write_text(json.dumps(make_logs(generator, accuracy, 5, seconds)))
        (run / "test.json").write_text(json.dumps({"accuracy": accuracy, "test_time": 1.0, "ece": 0.04}))
        (run / "environment.json").write_text(environment)
