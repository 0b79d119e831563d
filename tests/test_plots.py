"""Pictures: what they draw, what they look like on disk, and names that would break a careless plot."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cifarlab import plots
from cifarlab.errors import StorageError

BEST_RGB = (0x00, 0x9E, 0x73)


def a_log(count: int, *, validation: bool = True) -> list[dict[str, Any]]:
    """A training log as `train.json` has it."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2.3 * math.exp(-epoch / 15),
            "train_accuracy": 1 - 0.9 * math.exp(-epoch / 10),
            "val_loss": 0.5 + 1.8 * math.exp(-epoch / 8) + 0.005 * epoch if validation else None,
            "val_accuracy": 0.8 - 0.6 * math.exp(-epoch / 9) if validation else None,
            "lr": 0.1,
            "seconds": 3.0,
        }
        for epoch in range(1, count + 1)
    ]


def a_matrix(classes: int, *, images: int = 100, accuracy: float = 0.7) -> list[list[int]]:
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(classes, 0.2), size=classes) * (1 - accuracy) + accuracy * np.eye(classes)
    return [generator.multinomial(images, row / row.sum()).tolist() for row in shares]


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Every labelled line, as its points."""
    return {
        str(line.get_label()): (list(np.asarray(line.get_xdata())), list(np.asarray(line.get_ydata())))
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# --- curves -----------------------------------------------------------------------------------


def test_the_loss_curve_draws_both_losses_and_names_the_best_epoch(tmp_path: Path, figures: list[Figure]) -> None:
    log = a_log(50)
    plots.loss_curve(tmp_path / "loss.png", log, 31)
    (axes,) = figures[0].axes
    numbers = [float(entry["epoch"]) for entry in log]
    drawn, best = lines(axes), f"best epoch 31: {log[30]['val_loss']:.4f}"
    assert drawn["training"] == (numbers, [entry["train_loss"] for entry in log])
    assert drawn["validation"] == (numbers, [entry["val_loss"] for entry in log])
    assert drawn[best] == ([31.0], [log[30]["val_loss"]])
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "validation", best]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylim()[0] == 0.0


def test_the_accuracy_curve_draws_both_accuracies_and_names_the_best_epoch(
    tmp_path: Path, figures: list[Figure]
) -> None:
    log = a_log(50)
    plots.accuracy_curve(tmp_path / "accuracy.png", log, 44, title="ex1 on cifar10")
    (axes,) = figures[0].axes
    drawn = lines(axes)
    assert drawn["training"][1] == [entry["train_accuracy"] for entry in log]
    assert drawn["validation"][1] == [entry["val_accuracy"] for entry in log]
    assert drawn[f"best epoch 44: {log[43]['val_accuracy']:.2%}"] == ([44.0], [log[43]["val_accuracy"]])
    assert axes.get_title(loc="left") == "ex1 on cifar10"
    assert axes.get_ylim()[1] <= 1.0


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_averaged_weights_have_a_curve_and_those_that_were_best_are_marked(
    tmp_path: Path, figures: list[Figure], weights: str
) -> None:
    log = a_log(3)
    for entry in log:
        entry |= {"val_accuracy": 0.8, "val_loss": 0.5, "ema_val_accuracy": 0.9, "ema_val_loss": 0.6}
    plots.loss_curve(tmp_path / "loss.png", log, 2, weights)
    plots.accuracy_curve(tmp_path / "accuracy.png", log, 2, weights)
    best = {"raw": (0.5, 0.8), "ema": (0.6, 0.9)}[weights]
    for figure, averaged, value, text in zip(figures, (0.6, 0.9), best, ("{:.4f}", "{:.2%}"), strict=True):
        drawn = lines(figure.axes[0])
        assert drawn["averaged weights"][1] == [averaged] * 3
        assert drawn[f"best epoch 2: {text.format(value)}"] == ([2.0], [value])
        # Four names stand in one row, under the title.
        legend = figure.axes[0].get_legend()
        (title,) = (child for child in figure.axes[0].findobj(Text) if child.get_text() in ("Loss", "Accuracy"))
        assert legend is not None and legend.get_window_extent().y1 <= title.get_window_extent().y0


@pytest.mark.parametrize("best", [1, 20, 40])
def test_the_best_epoch_is_marked_where_it_is(tmp_path: Path, best: int) -> None:
    plots.accuracy_curve(tmp_path / "a.png", a_log(40), best)
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 800
    # The dashed line is the column with the most pixels of its colour, and between the ends it is in proportion.
    columns = (np.abs(picture - BEST_RGB).sum(axis=2) < 60).sum(axis=0)
    inside = np.flatnonzero((picture < 80).all(axis=2).sum(axis=0) > 200)[0]  # the y axis
    place = (int(columns.argmax()) - inside) / (picture.shape[1] - inside)
    assert place == pytest.approx((best - 1 + 0.78) / (39 + 2 * 0.78), abs=0.03)


@pytest.mark.parametrize("count", [1, 2, 50, 300])
@pytest.mark.parametrize("validation", [True, False])
def test_curves_of_any_length_fit_their_frame(
    tmp_path: Path, figures: list[Figure], count: int, validation: bool
) -> None:
    log = a_log(count, validation=validation)
    plots.loss_curve(tmp_path / "loss.png", log, count)
    plots.accuracy_curve(tmp_path / "accuracy.png", log, count)
    for figure, file in zip(figures, ("loss.png", "accuracy.png"), strict=True):
        (axes,) = figure.axes
        drawn = lines(axes)
        assert ("validation" in drawn) is validation
        (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
        assert high - low >= 0.0999
        for xs, ys in drawn.values():
            assert left < min(xs) <= max(xs) < right
            assert low <= min(ys) <= max(ys) <= high
        # A lone epoch makes no line, so it needs a mark of its own.
        markers = {line.get_marker() for line in axes.get_lines() if line.get_label() in ("training", "validation")}
        assert markers == ({"o"} if count <= 30 else {"None"})
        ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
        assert (tmp_path / file).stat().st_size < 200_000


def test_without_validation_the_training_figure_is_named(tmp_path: Path, figures: list[Figure]) -> None:
    log = a_log(5, validation=False)
    plots.accuracy_curve(tmp_path / "a.png", log, 5)
    assert f"best epoch 5: {log[4]['train_accuracy']:.2%}" in lines(figures[0].axes[0])


def test_without_a_best_epoch_none_is_marked(tmp_path: Path, figures: list[Figure]) -> None:
    plots.loss_curve(tmp_path / "loss.png", a_log(5), None)
    assert set(lines(figures[0].axes[0])) == {"training", "validation"}
    assert not (np.abs(pixels(tmp_path / "loss.png") - BEST_RGB).sum(axis=2) < 60).any()


def test_a_missing_loss_is_a_gap_and_not_a_zero(tmp_path: Path, figures: list[Figure]) -> None:
    log = a_log(6)
    log[2]["val_loss"] = None
    plots.loss_curve(tmp_path / "loss.png", log, 6)
    _, heights = lines(figures[0].axes[0])["validation"]
    assert math.isnan(heights[2])
    assert np.isfinite([height for place, height in enumerate(heights) if place != 2]).all()


def test_one_wild_loss_does_not_flatten_the_others(tmp_path: Path, figures: list[Figure]) -> None:
    log = a_log(50)
    log[0]["train_loss"] = 500.0
    plots.loss_curve(tmp_path / "loss.png", log, 50)
    assert 2.3 < figures[0].axes[0].get_ylim()[1] < 10


def test_no_epochs_still_make_a_picture(tmp_path: Path) -> None:
    plots.loss_curve(tmp_path / "loss.png", [], None)
    assert pixels(tmp_path / "loss.png").shape[0] > 500


# --- the confusion matrix ---------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
def test_few_classes_have_count_and_share_in_each_cell(tmp_path: Path, figures: list[Figure], classes: int) -> None:
    matrix = a_matrix(classes, images=2000)
    names = [f"class {index}" for index in range(classes)]
    plots.confusion_matrix(tmp_path / "c.png", matrix, names, "a title")
    axes = figures[0].axes[0]
    want = {
        (column, row): f"{number:,}\n{number / 2000:.1%}"
        for row, numbers in enumerate(matrix)
        for column, number in enumerate(numbers)
        if number
    }
    assert {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts} == want
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert axes.get_title(loc="left") == "a title"


def test_colour_is_the_share_of_the_true_class(tmp_path: Path, figures: list[Figure]) -> None:
    plots.confusion_matrix(tmp_path / "c.png", [[30, 10], [0, 0]], ["a", "b"], "t")
    shown = figures[0].axes[0].get_images()[0].get_array()
    assert np.asarray(shown).tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_a_hundred_classes_are_all_named_and_the_commonest_confusions_listed(
    tmp_path: Path, figures: list[Figure]
) -> None:
    matrix = a_matrix(100)
    matrix[17][42] = 77  # so this row has more than a hundred images, and the column many more
    matrix[3][99] = 66
    names = [f"class_{index}" for index in range(100)]
    plots.confusion_matrix(tmp_path / "c.png", matrix, names, "t")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert texts(axes) == []
    (beside,) = figures[0].texts
    first, second = beside.get_text().splitlines()[3:5]
    assert first.split() == ["77", f"{77 / sum(matrix[17]):.0%}", "class_17", "→", "class_42"]
    assert second.split() == ["66", f"{66 / sum(matrix[3]):.0%}", "class_3", "→", "class_99"]
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 1200
    assert (tmp_path / "c.png").stat().st_size < 1_000_000


@pytest.mark.parametrize("classes", [2, 20, 100])
def test_names_neither_overlap_nor_leave_the_picture(tmp_path: Path, figures: list[Figure], classes: int) -> None:
    plots.confusion_matrix(
        tmp_path / "c.png", a_matrix(classes), [f"a long name of class {index}" for index in range(classes)], "t"
    )
    axes = figures[0].axes[0]
    labels = axes.get_yticklabels()
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert all(float(label.get_fontsize()) >= 6 for label in labels)
    picture = pixels(tmp_path / "c.png")
    for edge in (picture[:5], picture[-5:], picture[:, :5], picture[:, -5:]):
        assert (edge == 255).all(), "something reaches the edge of the picture"


def test_a_perfect_matrix_lists_no_confusions(tmp_path: Path, figures: list[Figure]) -> None:
    plots.confusion_matrix(tmp_path / "c.png", (np.eye(30, dtype=int) * 5).tolist(), ["x"] * 30, "t")
    assert "→" not in figures[0].texts[0].get_text().splitlines()[-1].replace("true → predicted", "")


def test_hundreds_of_classes_make_a_picture_of_bounded_size(tmp_path: Path) -> None:
    plots.confusion_matrix(tmp_path / "c.png", a_matrix(300), [f"c{index}" for index in range(300)], "t")
    assert max(pixels(tmp_path / "c.png").shape) < 4000
    assert (tmp_path / "c.png").stat().st_size < 1_000_000


# --- names from outside -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("$x$", "$x$"),
        ("two\nlines\tand  spaces ", "two lines and spaces"[:9] + "…" + "nd spaces"[-8:]),
        ("bell\x07", "bell\N{REPLACEMENT CHARACTER}"),
        ("byte\udcff", "byte\N{REPLACEMENT CHARACTER}"),
        ("\u202eright to left", "\N{REPLACEMENT CHARACTER}right to left"),
        ("exactly_18_letters", "exactly_18_letters"),
        ("class_with_a_long_name_1", "class_wit…g_name_1"),
        ("", "(no name)"),
        (" \n", "(no name)"),
    ],
)
def test_a_name_becomes_one_short_printable_line(name: str, shown: str) -> None:
    assert plots.display_name(name) == shown
    assert len(shown) <= 18


@pytest.mark.parametrize("classes", [12, 25])
def test_any_name_is_drawn_as_it_is(tmp_path: Path, figures: list[Figure], classes: int) -> None:
    names = ["$x$", r"$\frac{1}{2$", "a$b", "$", "100%", "\udcff", "\x00", "{x}", "猫", "🐱", "_private", r"a\$b"]
    names += [f"c{index}" for index in range(classes - len(names))]
    plots.confusion_matrix(tmp_path / "c.png", a_matrix(classes), names, "title of " + " ".join(names))
    labels = figures[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [plots.display_name(name) for name in names]
    assert not any(text.get_parse_math() for text in [*labels, *figures[0].texts, figures[0].axes[0].title])
    plots.loss_curve(tmp_path / "l.png", a_log(3), 2, title="folder:" + " ".join(names))


def test_dollar_signs_are_drawn_and_not_read_as_a_formula(tmp_path: Path, figures: list[Figure]) -> None:
    plots.confusion_matrix(tmp_path / "c.png", a_matrix(2), ["$xxxx$", "b"], "t")
    plots.confusion_matrix(tmp_path / "d.png", a_matrix(2), ["xxxx", "b"], "t")
    plain, bare = (figure.axes[0].get_yticklabels()[0].get_window_extent().width for figure in figures)
    assert plain > 1.2 * bare


# --- files ------------------------------------------------------------------------------------


def test_a_users_matplotlibrc_does_not_reach_the_pictures(tmp_path: Path) -> None:
    plots.loss_curve(tmp_path / "a.png", a_log(5), 3)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": True}):
        plots.loss_curve(tmp_path / "b.png", a_log(5), 3)
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"old")
    plots.loss_curve(tmp_path / "loss.png", a_log(5), 3)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_failed_drawing_leaves_the_picture_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(figure: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "loss.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", no_space)
    with pytest.raises(StorageError, match="disk is full"):
        plots.loss_curve(tmp_path / "loss.png", a_log(5), 3)
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_importing_and_drawing_needs_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from cifarlab import plots; from pathlib import Path\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.loss_curve(Path({str(tmp_path / 'l.png')!r}), [], None)\n"
        "assert not {'torch', 'matplotlib.pyplot', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
