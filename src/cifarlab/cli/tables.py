"""Tables on the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cifarlab.bench.measure import Pair
from cifarlab.compare import COLUMNS, Figure, Row, lines, percent, seconds
from cifarlab.errors import printable
from cifarlab.recipe import Recipe, load_recipe, recipe_names, recipe_text

if TYPE_CHECKING:
    from cifarlab.bench.hardware import Speed
    from cifarlab.study import Study


def print_comparison(console: Console, rows: Sequence[Row]) -> None:
    """One table per dataset."""
    for dataset in dict.fromkeys(row.dataset for row in rows):
        # Without frames it fits into the 80 columns of a plain terminal.
        table = Table(title=Text(dataset, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(COLUMNS):
            heading = column.replace(" ", "\n")
            if number:
                table.add_column(heading, justify="right", no_wrap=True)
            else:
                table.add_column(heading, min_width=len(column), overflow="fold")
        for row in rows:
            if row.dataset == dataset:
                for cells in lines(row):
                    table.add_row(*map(Text, cells))
        console.print(table)


def print_study(console: Console, study: Study) -> None:
    """What a study says of each arm: accuracy, difference to the baseline, verdict; and of the test set."""
    names = {arm.id: printable(arm.name) for arm in study.arms}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", overflow="fold", min_width=11)
    for heading in ("validation", "difference,\n95 % interval", "p\n(Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    table.add_column("train\ntime", justify="right", no_wrap=True)
    for result in study.results:
        cells = [
            names[result.arm] + (f" ×{result.n}" if result.n > 1 else ""),
            percent(Figure(result.mean, result.std)),
            "–" if result.difference is None else f"{100 * result.difference:+.2f}",
            "–" if result.p_holm is None else f"{result.p_holm:.3f}" if result.p_holm >= 0.001 else "< .001",
            result.verdict,
            seconds(Figure(result.seconds, None)),
        ]
        if result.low is not None and result.high is not None:
            cells[2] += f" ± {50 * (result.high - result.low):.2f}"
        table.add_row(*map(Text, cells))
    console.print(table)
    for result in study.results:
        if result.more_seeds and study.design != "search":  # which has no end of arms
            sentence = (
                f"about {result.more_seeds:,} more seeds would tell a difference of {100 * study.resolve:g} points"
            )
            console.print(Text(f"{names[result.arm]}: {sentence}"))
    looks = study.test.looks if study.test is not None else []
    for arm in dict.fromkeys(look.arm for look in looks):
        scores = [look.accuracy for look in looks if look.arm == arm]
        console.print(Text(f"test set, {names[arm]} ×{len(scores)}: {percent(Figure.of(scores))}"))
    if looks:
        console.print(Text(f"looks at the test set: {len(looks)}"))


def print_recipes(console: Console) -> None:
    table = Table("recipe", "what it is", "datasets", "epochs")
    for name in recipe_names():
        recipe = load_recipe(name)
        heading = recipe_text(name).splitlines()[0].removeprefix("#").strip()
        what = heading.partition(": ")[2] or heading
        table.add_row(name, what, ", ".join(recipe.datasets), f"{recipe.train.epochs:g}")
    console.print(table)


def print_recipe(console: Console, source: str, recipe: Recipe) -> None:
    if source in recipe_names():
        comments = [line for line in recipe_text(source).splitlines() if line.startswith("#")]
        console.print("\n".join(comments), markup=False)
    console.print(recipe.to_yaml(), markup=False)


def print_layers(console: Console, recipe: Recipe, classes: int, size: int) -> None:
    """The layer table for one image (counted by torchinfo): output shapes, parameters, totals, sizes in MB."""
    import torchinfo

    from cifarlab.models import build_model
    from cifarlab.models.chain import freeze

    side = recipe.evaluation_side or size
    model = build_model(recipe.model, classes=classes, size=(side, side), seed=recipe.seed)
    freeze(model, recipe.model.freeze_stages)
    summary = torchinfo.summary(model, input_size=(1, 3, side, side), device="cpu", verbose=0)
    table = Table(title=f"{recipe.model.name}: {classes} classes, one image of 3x{side}x{side}", title_justify="left")
    table.add_column("layer")
    table.add_column("kind")
    for column in ("output shape", "parameters", "multiply-adds"):
        table.add_column(column, justify="right")
    for layer in summary.summary_list:
        if layer.is_leaf_layer:
            shape = " x ".join(map(str, layer.output_size[1:]))
            table.add_row(layer.var_name, layer.class_name, shape, _count(layer.num_params), _count(layer.macs))
    console.print(table)
    console.print(
        f"parameters: {summary.total_params:,} ({summary.trainable_params:,} trainable); "
        f"multiply-adds: {summary.total_mult_adds / 1e6:,.1f} million\n"
        f"MB: {summary.total_input / 1e6:.2f} input, {summary.total_output_bytes / 1e6:.2f} activations, forward and "
        f"backward, {summary.total_param_bytes / 1e6:.2f} parameters"
    )


def print_flops(console: Console, recipe: Recipe, classes: int, size: int, images: int | None) -> None:
    """What training costs in FLOPs, an image and in all. images: that train; None where that is not known."""
    from cifarlab import flops
    from cifarlab.models import outline
    from cifarlab.models.chain import freeze

    side = recipe.evaluation_side or size
    model = outline(recipe.model, classes=classes, size=(side, side))
    freeze(model, recipe.model.freeze_stages)
    seen = recipe.train.epochs * (images or 1)
    try:
        total = flops.of_recipe(recipe, model, size, images or 1)
    except Exception as error:  # any network of timm's or torchvision's
        console.print(Text(f"FLOPs: '{recipe.model.name}' can't be counted ({type(error).__name__})"))
        return
    run = ""
    if images is not None:
        most = "at most " if recipe.train.prune is not None else ""
        run = f"; {most}{_flops(total)} for {recipe.train.epochs:g} epochs of {images:,} images"
    console.print(f"training, forward and backward: {_flops(total / seen)} an image{run}")


def _flops(count: float) -> str:
    """With three digits and a prefix."""
    rounded = max(1.0, float(f"{count:.3g}"))
    thousands = min(5, int(math.log10(rounded)) // 3)
    return f"{rounded / 1000**thousands:.3g} {('', 'k', 'M', 'G', 'T', 'P')[thousands]}FLOP"


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def print_scores(console: Console, log: dict[str, Any]) -> None:
    """The figures of a test.json."""
    table = Table("figure", "value")
    with_tta = {f"tta: {key}": value for key, value in (log["tta"] or {}).items()}
    for key, value in {**log, **with_tta}.items():
        if key != "tta" and isinstance(value, int | float | str | None):
            shown = "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(Text(printable(key)), Text(printable(shown)))
    console.print(table)


def print_pairs(console: Console, recipe: Recipe, pairs: Sequence[Pair]) -> None:
    """Images per second of cifarlab's loop beside others: medians, lowest and highest round, and their ratio."""
    table = _figures("beside", "images/s, cifarlab", "images/s, the other", "cifarlab / the other")
    for pair in pairs:
        if pair.ratio is None:
            table.add_row(Text(pair.contender), "", Text(f"failed: {pair.failed}"), "")
        else:
            ratio = f"{pair.ratio:.1%}" if pair.contender == "ceiling" else f"{pair.ratio:.2f}"
            table.add_row(pair.contender, _spread(pair.ours), _spread(pair.theirs), ratio)
    batch = recipe.train.batch
    title = f"{recipe.name} on {recipe.datasets[0]}, batch {batch}, numerics {recipe.train.numerics}"
    console.print(Text(printable(title)))
    console.print(table)


def print_machine(console: Console, described: dict[str, Any]) -> None:
    """The CPU, its memory, and the device, in two lines."""
    memory = f"{described['memory'] / 1e9:.1f} GB"
    counts = f"cores: {described['cores']}, threads: {described['threads']}, memory: {memory}"
    gpu = f" ({described['gpu']})" if described["gpu"] else ""
    console.print(Text(printable(f"{described['cpu']} ({described['cpu_capability']}), {counts}")))
    console.print(Text(printable(f"device {described['device']}{gpu}, torch {described['torch']}")))


def print_speeds(console: Console, speeds: Sequence[Speed], bandwidth: float, denormals: float | None) -> None:
    """GFLOP/s of each thing in each kind of numbers, and why some are missing; memory; denormal numbers."""
    by_place = {(speed.what, speed.numbers): speed for speed in speeds}
    numbers = list(dict.fromkeys(speed.numbers for speed in speeds))
    table = _figures("GFLOP/s", *numbers)
    for what in dict.fromkeys(speed.what for speed in speeds):
        rates = [by_place[what, kind].rate for kind in numbers]
        table.add_row(what, *("–" if rate is None else f"{rate / 1e9:,.{0 if rate >= 1e10 else 1}f}" for rate in rates))
    console.print(table)
    missing = dict.fromkeys(f"{speed.numbers}: {speed.left_out}" for speed in speeds if speed.left_out is not None)
    cost = "unknown, as this CPU can't flush them" if denormals is None else f"{denormals:.2f} times what others do"
    notes = [
        *missing,
        "convolutions are forward and backward",
        f"memory copied: {bandwidth / 1e9:,.1f} GB/s, read and written",
        f"time that denormal numbers take on the CPU where they aren't flushed: {cost}",
    ]
    console.print(Text("\n".join(notes) + "\n"))


def print_settings(console: Console, recipe: Recipe, pairs: dict[str, Pair]) -> None:
    """What each setting of the process is worth on a recipe's step: medians, lowest and highest round, the ratio."""
    table = _figures("setting", "images/s with all", "images/s without it", "ratio")
    notes = ["without memory kept there are no huge pages either"]
    for setting, pair in pairs.items():
        name = setting.replace("_", " ")
        if pair.ratio is None:
            table.add_row(name, "–", "–", "–")
            notes.append(f"{name}: {pair.failed}")
        else:
            table.add_row(name, _spread(pair.ours), _spread(pair.theirs), f"{pair.ratio:.2f}")
    step = f"a training step of {recipe.name}, batch {recipe.train.batch}, numerics {recipe.train.numerics}"
    console.print(Text(step))
    console.print(table)
    console.print(Text("\n".join(notes) + "\n"))


def _figures(first: str, *others: str) -> Table:
    """A table with a column of names and others of figures."""
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
