"""What a run's section says in words: its figures, and where, how and on what it was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from cifarlab.errors import printable
from cifarlab.report.data import Run, at, number

Facts = list[tuple[str, str]]


def facts(run: Run) -> list[tuple[str, Facts]]:
    """Titles, each with names and texts; what is unknown is left out, and so is a title with nothing below it."""
    groups = (
        ("Test set", _test(run)),
        ("Training", _training(run)),
        ("Data and leak check", _data(run)),
        ("Numerics", _numerics(run)),
        ("Environment", _environment(run)),
    )
    return [(title, known) for title, found in groups if (known := [(name, text) for name, text in found if text])]


def percent(value: Any, digits: int = 2) -> str:
    """A fraction of 1; empty where it is unknown, as in all of these."""
    known = number(value)
    return "" if known is None else f"{known:.{digits}%}"


def points(value: Any) -> str:
    """A difference of two fractions of 1, in points."""
    known = number(value)
    return "" if known is None else f"{100 * known:+.2f}".replace("-", "−")


def duration(value: Any) -> str:
    """Seconds as people say them: `47.3 s`, `18 min 39 s`, `1 h 37 min`."""
    known = number(value)
    if known is None or known < 0:
        return ""
    if known < 99.95:
        return f"{known:.1f} s"
    minutes, seconds = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(round(known / 60), 60)
    return f"{hours:,} h {minutes:02} min"


def count(value: Any) -> str:
    known = number(value)
    return "" if known is None else f"{known:,.0f}"


def size(value: Any) -> str:
    """Bytes."""
    known = number(value)
    return "" if known is None else f"{known / 1e9:.2f} GB" if known >= 1e9 else f"{known / 1e6:.0f} MB"


def _text(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))[:500]


def _decimal(value: Any) -> str:
    known = number(value)
    return "" if known is None else f"{known:.4f}"


def _flops(value: Any) -> str:
    known = number(value)
    if known is None or known < 1:
        return ""
    power = min(6, int(math.log10(known)) // 3)
    return f"{known / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _test(run: Run) -> Iterable[tuple[str, str]]:
    test, twins = run.test, at(run.detail, "without_twins")
    yield "accuracy", percent(test.get("accuracy"))
    if twins is not None:
        without = f"{percent(twins['accuracy'])} of {count(twins['images'])} images"
        yield "without duplicates of training images", f"{without}; {count(twins['left_out'])} left out"
    if isinstance(tta := test.get("tta"), dict):
        augmented = f"{percent(tta.get('accuracy'))} ({_text(tta.get('mode')) or 'none'})"
        yield "with test-time augmentation", augmented
    yield "top-5 accuracy", percent(test.get("top5_accuracy"))
    yield "loss", _decimal(test.get("loss"))
    for name, key in (("precision, macro", "precision_score"), ("recall, macro", "recall_score"), ("F1", "f1_score")):
        yield name, percent(test.get(key))
    yield "AUC, one-vs-rest", _decimal(test.get("auc_score"))
    yield "ECE, 15 bins", percent(test.get("ece"))
    yield "test time", duration(test.get("test_time"))
    yield "looks at the test set", count(test.get("test_looks"))


def _training(run: Run) -> Iterable[tuple[str, str]]:
    log = run.train
    yield "status", run.status
    yield "error", _text(log.get("error"))
    yield "began", _text(log.get("started"))
    yield "epochs", count(run.epochs)
    averaged = ", averaged weights" if log.get("best_weights") == "ema" else ""
    best = count(log.get("best_epoch"))
    yield "best epoch", best and best + averaged
    yield "validation accuracy", percent(log.get("best_val_accuracy"))
    gap = points(log.get("overfitting_gap"))
    yield "overfitting gap", gap and f"{gap} points"
    yield "training time", duration(log.get("train_time"))
    yield "wall time", duration(log.get("wall_time"))
    yield "images per second", count(log.get("images_per_second"))
    yield "peak memory", size(log.get("peak_memory"))
    yield "parameters", count(log.get("parameters"))
    yield "training FLOPs", _flops(log.get("flops"))
    setbacks = log.get("setbacks")
    yield "setbacks", count(len(setbacks)) if isinstance(setbacks, list) and setbacks else ""
    yield "stopped early", "yes" if log.get("stopped_early") is True else ""


def _data(run: Run) -> Iterable[tuple[str, str]]:
    data = at(run.environment, "data")
    yield "dataset", run.dataset
    yield "source", _text(at(data, "source"))
    yield "content hash", _text(at(data, "content_hash"))[:16]
    sizes = ((name, count(at(data, "images", name))) for name in ("train", "validation", "test"))
    yield "images", ", ".join(f"{images} {name}" for name, images in sizes if images)
    pairs = {
        "within_train": "twice in training",
        "train_validation": "of validation in training",
        "train_test": "of test in training",
        "validation_test": "of test in validation",
    }
    for key, name in pairs.items():
        images, conflicting = (at(data, "leaks", key, what) for what in ("images", "conflicting_labels"))
        if number(images) is not None:
            others = f", {count(conflicting)} with another label" if number(conflicting) else ""
            yield f"exact duplicates {name}", f"{count(images)}{others}"
    notes = at(data, "notes")
    yield "notes", "; ".join(map(_text, notes[:20])) if isinstance(notes, list) else ""
    for name in ("mean", "std"):
        values = at(data, name)
        yield name, ", ".join(filter(None, map(_decimal, values[:3]))) if isinstance(values, list) else ""


def _numerics(run: Run) -> Iterable[tuple[str, str]]:
    numerics = at(run.environment, "numerics")
    for key in ("name", "dtype", "memory_format", "compiled", "deterministic"):
        yield key.replace("_", " "), _text(at(numerics, key))
    tried = at(numerics, "tried")
    yield "tried", _text(tried) if tried else ""


def _environment(run: Run) -> Iterable[tuple[str, str]]:
    environment = run.environment
    yield "device", _text(environment.get("gpu")) or _text(environment.get("device"))
    yield "CPU", _text(environment.get("cpu"))
    yield "threads", count(environment.get("threads"))
    yield "memory", size(environment.get("memory"))
    processes = environment.get("processes")
    yield "processes", count(len(processes)) if isinstance(processes, list) and len(processes) > 1 else ""
    for name in ("cifarlab", "torch", "torchvision", "numpy", "cuda", "python", "platform"):
        yield name, _text(environment.get(name))
    commit = _text(at(environment, "git", "commit"))[:12]
    yield "git commit", commit and commit + (" and uncommitted changes" if at(environment, "git", "dirty") else "")
    yield "weights", _text(at(environment, "weights", "source"))
    resumed = environment.get("resumed")
    yield "resumed", f"{len(resumed)} times" if isinstance(resumed, list) and resumed else ""
    yield "command", _text(environment.get("command"))
    yield "folder", printable(str(run.folder.path))
