"""The pictures of a run folder: loss, accuracy, confusion matrix. PNG, without a display and without pyplot."""

from __future__ import annotations

import contextlib
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Int64Array = NDArray[np.int64]

# Okabe and Ito's colours, told apart with any colour vision.
TRAINING, VALIDATION, AVERAGED, BEST = "#0072B2", "#D55E00", "#CC79A7", "#009E73"
DPI = 120
ANNOTATED_CLASSES = 20  # up to here a cell has room for its count and its share
NAMED_CLASSES = 200  # up to here a row has room for its class's name
TOP_CONFUSIONS = 25
NAME_LENGTH = 18


def loss_curve(
    path: Path,
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int | None,
    best_weights: str | None = "raw",
    *,
    title: str = "Loss",
) -> None:
    """Write training and validation loss by epoch as a PNG, with the best epoch marked.

    epochs: the entries of `train.json` (`epoch`, `train_loss`, `val_loss` …); None or NaN is a gap. best_epoch: counted
    from 1; None marks nothing. best_weights: `ema` where the moving average was the best. Raises StorageError.
    """
    with _plain_style():
        _write(path, _curves(epochs, best_epoch, best_weights, "loss", title=title, label="loss (cross-entropy)"))


def accuracy_curve(
    path: Path,
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int | None,
    best_weights: str | None = "raw",
    *,
    title: str = "Accuracy",
) -> None:
    """The same as `loss_curve`, of `train_accuracy` and `val_accuracy`."""
    with _plain_style():
        _write(path, _curves(epochs, best_epoch, best_weights, "accuracy", title=title, label="accuracy"))


def learning_rate_curve(
    path: Path, rates: Sequence[float], losses: Sequence[float], steepest: float | None, *, title: str
) -> None:
    """Write the smoothed loss over a rising learning rate as a PNG; `steepest` is marked. Raises StorageError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with _plain_style():
        figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.semilogx(rates, losses, color=TRAINING, linewidth=1.8)
        if steepest is not None:
            loss = losses[list(rates).index(steepest)]
            axes.plot([steepest], [loss], "o", color=BEST, markersize=9, label=f"falls fastest: {steepest:.1e}")
            axes.legend(frameon=False)
        lowest, highest = min(losses), max(losses[: max(1, len(losses) // 2)])
        axes.set_ylim(lowest - 0.1 * (highest - lowest) - 1e-3, highest + 0.3 * (highest - lowest) + 1e-3)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss, smoothed")
        # The usual labels are formulas, and text is drawn as it is.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _finish(axes, f"Learning-rate test: {title}", pad=8)
        _write(path, figure)


def confusion_matrix(path: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> None:
    """Write a confusion matrix as a PNG: rows are true classes, columns predicted ones, colour is the share of a row.

    Up to 20 classes have count and share in each cell; more have the commonest confusions listed beside. Class names
    may be any text; long ones are shortened. Raises StorageError.
    """
    with _plain_style():
        _write(path, _matrix(np.asarray(matrix, dtype=np.int64), [display_name(name) for name in classes], title))


def display_name(name: str) -> str:
    """A class name as a picture can show it: one line, no control characters, at most 18 characters."""
    clean = _printable(name)
    if len(clean) > NAME_LENGTH:
        # The middle goes, as names that begin alike often end in a number.
        half = (NAME_LENGTH - 1) // 2
        clean = f"{clean[: NAME_LENGTH - 1 - half]}…{clean[-half:]}"
    return clean or "(no name)"


def _printable(text: str) -> str:
    """One line, with a mark for control characters, surrogates (of undecodable file names) and the like."""
    line = " ".join(text.split())
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c).startswith("C") else c for c in line)


def _best(
    epochs: Sequence[Mapping[str, Any]], best_epoch: int | None, best_weights: str | None, quantity: str
) -> tuple[int, float] | None:
    """The best epoch and its validation figure (training, without validation); None where there is none to mark."""
    for entry in epochs:
        if entry["epoch"] == best_epoch:
            parts = ("ema_val" if best_weights == "ema" else "val", "train")
            heights = (_height(entry.get(f"{part}_{quantity}")) for part in parts)
            return next(((entry["epoch"], height) for height in heights if math.isfinite(height)), None)
    return None


def _curves(
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int | None,
    best_weights: str | None,
    quantity: str,
    *,
    title: str,
    label: str,
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    numbers = [int(entry["epoch"]) for entry in epochs]
    marker = "o" if len(epochs) <= 30 else None
    drawn: list[float] = []
    lines = (
        ("train", "training", TRAINING),
        ("val", "validation", VALIDATION),
        ("ema_val", "averaged weights", AVERAGED),
    )
    for part, name, colour in lines:
        heights = [_height(entry.get(f"{part}_{quantity}")) for entry in epochs]
        finite = [height for height in heights if math.isfinite(height)]
        if finite:
            axes.plot(numbers, heights, color=colour, label=name, marker=marker, markersize=4, linewidth=1.8)
            drawn += finite
    if (best := _best(epochs, best_epoch, best_weights, quantity)) is not None:
        _mark_best(axes, *best, quantity)

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if numbers:
        pad = max(0.5, 0.02 * (numbers[-1] - numbers[0]))
        axes.set_xlim(numbers[0] - pad, numbers[-1] + pad)
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if drawn:
        axes.set_ylim(*(_accuracy_range(drawn) if quantity == "accuracy" else _loss_range(drawn)))
    _finish(axes, title, pad=26)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            frameon=False,
            borderpad=0,
            borderaxespad=0.5,
            columnspacing=1.5,
        )
    return figure


def _finish(axes: Axes, title: str, pad: float) -> None:
    """A grid behind the curves, no frame, and the title, so many points above the picture."""
    axes.grid(color="0.88")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(textwrap.fill(_printable(title), 80), loc="left", fontweight="bold", pad=pad)


def _mark_best(axes: Axes, epoch: int, height: float, quantity: str) -> None:
    """A line and a diamond at the best epoch, and its figure in the legend."""
    words = f"{height:.2%}" if quantity == "accuracy" else f"{height:.4f}"
    axes.axvline(epoch, color=BEST, linestyle="--", linewidth=1.2, zorder=1)
    axes.plot(
        [epoch],
        [height],
        color=BEST,
        marker="D",
        markersize=9,
        markerfacecolor="none",  # what it marks stays visible
        markeredgewidth=2,
        linestyle="none",
        clip_on=False,
        zorder=4,
        label=f"best epoch {epoch}: {words}",
    )


def _loss_range(losses: list[float]) -> tuple[float, float]:
    """From 0 to a little above the highest loss; a few wild ones, as at the start, may leave the picture."""
    top = max(losses)
    if len(losses) >= 20:
        top = min(top, 3 * float(np.percentile(losses, 95)))
    return 0.0, 1.08 * top or 1.0


def _accuracy_range(accuracies: list[float]) -> tuple[float, float]:
    """A little around the accuracies, at least ten points, within 0 to 1."""
    low, high = min(accuracies), max(accuracies)
    pad = max(0.05 * (high - low), (0.1 - (high - low)) / 2)
    return max(low - pad, 0.0), min(high + pad, 1.0)


def _matrix(matrix: Int64Array, names: list[str], title: str) -> Figure:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(names)
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros(matrix.shape), where=support > 0)
    few = count <= ANNOTATED_CLASSES

    # In inches. The figure is the cells alone; names, colour bar and list lie outside, and saving takes them in.
    grid = max(0.62 * count, 3.2) if few else min(max(0.115 * count, 5.2), 18.0)
    font = min(9.0, 0.8 * 72 * grid / count)
    figure = Figure(figsize=(grid, grid), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    bar_axes = figure.add_axes((1 + 0.15 / grid, 0, 0.18 / grid, 1))
    if not few:
        place, words = (1 + 1.2 / grid, 1), _confusions(matrix, names)
        figure.text(*place, words, va="top", fontsize=9, family="monospace", linespacing=1.4)

    # The root brings out confusions of a few per cent; beside the diagonal they would be white otherwise.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=1.0), interpolation="nearest")
    if count <= NAMED_CLASSES:
        axes.set_yticks(range(count), names, fontsize=font)
        flat = few and max(map(len, names)) <= 7
        if flat or not few:
            axes.set_xticks(range(count), names, fontsize=font, rotation=0 if flat else 90)
        else:
            axes.set_xticks(range(count), names, fontsize=font, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.8 if few else 0.3)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(textwrap.fill(_printable(title), int(11 * grid)), loc="left", fontweight="bold", fontsize=11)
    bar = figure.colorbar(image, cax=bar_axes, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    bar.ax.tick_params(labelsize=9)
    bar.set_label("share of the true class")
    if few:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                share = shares[row, column]
                colour = "white" if share > 0.35 else "black"
                axes.text(column, row, f"{number:,}\n{share:.1%}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def _confusions(matrix: Int64Array, names: list[str]) -> str:
    """The commonest confusions as lines of text, the most frequent first."""
    errors = matrix - np.diag(np.diagonal(matrix))
    lines = ["commonest confusions", "", "count  share  true → predicted"]
    for place in np.argsort(-errors, axis=None, kind="stable")[:TOP_CONFUSIONS]:
        row, column = divmod(int(place), len(names))
        number = int(errors[row, column])
        if number:
            lines.append(f"{number:>5,}  {number / int(matrix[row].sum()):>5.0%}  {names[row]} → {names[column]}")
    return "\n".join(lines)


def _height(value: float | None) -> float:
    return math.nan if value is None else float(value)


@contextlib.contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib's own defaults, whatever a user's matplotlibrc says, and text as it is: `$x$` is no formula."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        # A name in a script that the font lacks is drawn as boxes, which is no reason to alarm anyone.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _write(path: Path, figure: Figure) -> None:
    with files.replacing(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
