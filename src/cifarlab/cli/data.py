"""`cifarlab data`: download, check and describe datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cifarlab.cli.common import DataOption, SetOption, say
from cifarlab.errors import UsageError

if TYPE_CHECKING:
    from cifarlab.data.dataset import Dataset

data_app = typer.Typer(no_args_is_help=True, help="Download, check and describe datasets.")

MOST_PICTURES = 60
DOWNLOADED = ("cifar10", "cifar100")


@data_app.command()
def fetch(
    dataset: Annotated[list[str] | None, typer.Argument(help="cifar10, cifar100. [default: both]")] = None,
    data: DataOption = None,
) -> None:
    """Download datasets into the cache folder, or into --data.

    Example: cifarlab data fetch cifar10 --data ~/datasets
    """
    from cifarlab.data import cifar_download
    from cifarlab.data.cifar import read_cifar
    from cifarlab.download import cache_folder
    from cifarlab.errors import nearest

    names = dataset or DOWNLOADED
    for name in names:
        if name not in DOWNLOADED:
            raise UsageError(f"'{name}' can't be downloaded; {nearest(name, DOWNLOADED)}")
    folder = data or cache_folder()
    for name in names:
        found = read_cifar(name, folder)
        if found is None:
            cifar_download.fetch(name, folder, report=say)
            found = read_cifar(name, folder)
        if found is not None:
            say(f"{name}: {found.source}")


@data_app.command()
def info(
    dataset: Annotated[list[str] | None, typer.Argument(help="Datasets. [default: the named ones]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
) -> None:
    """Say what datasets hold and where they are; downloads nothing.

    Example: cifarlab data info folder:~/pictures --set data.bad_files=skip
    """
    from cifarlab.data.cifar import expected_files, read_cifar
    from cifarlab.download import cache_folder
    from cifarlab.recipe import NAMED_DATASETS

    folder = data or cache_folder()
    for name in dataset or NAMED_DATASETS:
        found = read_cifar(name, folder) if name in DOWNLOADED else _load(name, data, set_)
        if found is None:
            by_hand = f"put {expected_files(name)} there"
            say(f"{name}: not in {folder}; 'cifarlab data fetch {name}' downloads it, or {by_hand}")
            continue
        say(f"{name}: {found.source}")
        height, width = found.train.pixels.shape[2:]
        for part, images in (("train", found.train), ("validation", found.validation), ("test", found.test)):
            if images is None:
                say(f"  {part}: none" + (", 20 % are held out" if part == "test" else ", a share is held out"))
            else:
                say(f"  {part}: {len(images):,} images of {height}x{width}")
        shown = ", ".join(found.classes[:10]) + (", …" if len(found.classes) > 10 else "")
        say(f"  {len(found.classes)} classes: {shown}")
        say(f"  content hash: {found.content_hash()}")
        for note in found.notes:
            say(f"  {note}")


@data_app.command()
def check(
    dataset: Annotated[list[str] | None, typer.Argument(help="Datasets. [default: cifar10 and cifar100]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Similarity from which two images are near duplicates.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the near duplicates, the most alike first.")
    ] = None,
) -> None:
    """Find test images that stand in training too: exact copies, and near duplicates.

    Example: cifarlab data check cifar100 --pictures twins.png
    """
    names = dataset or DOWNLOADED
    if pictures is not None and (pictures.suffix.lower() != ".png" or len(names) > 1):
        raise UsageError(f"--pictures {pictures}: expected a name that ends in .png, and one dataset")
    for name in names:
        _check(name, _load(name, data, set_), threshold, pictures)


def _check(name: str, found: Dataset, threshold: float | None, pictures: Path | None) -> None:
    from cifarlab.data.leaks import THRESHOLD, near_duplicates, pair_sheet, pixel_hashes, twins
    from cifarlab.data.prepare import prepare
    from cifarlab.recipe_sections import Data

    # No validation set is split off: it will come out of the training images, whichever they are.
    sides = prepare(found, Data(validation=0), seed=0)
    say(f"{name}: {sides.record['source']}")
    for note in sides.record["notes"]:
        say(f"  {note}")
    within, across = sides.record["leaks"]["within_train"], sides.record["leaks"]["train_test"]
    say(
        f"  exact: {within['images']:,} of {len(sides.train):,} training images stand there more than once "
        f"({within['conflicting_labels']:,} under more than one label)"
    )
    say(
        f"  exact: {across['images']:,} of {len(sides.test):,} test images stand in training too "
        f"({across['conflicting_labels']:,} under another label)"
    )
    test = sides.test.images.take(sides.test.index)
    train = sides.train.images.take(sides.train.index)
    if found.validation is not None:
        repeated = twins(pixel_hashes(found.validation.pixels), pixel_hashes(train.pixels))
        say(f"  exact: {len(repeated):,} of {len(found.validation):,} validation images stand in training too")
    limit = THRESHOLD if threshold is None else threshold
    pairs = near_duplicates(test.pixels, train.pixels, limit)
    differing = sum(test.labels[pair.a] != train.labels[pair.b] for pair in pairs)
    say(
        f"  near: {len(pairs):,} test images ({len(pairs) / len(test):.1%}) look like a training image "
        f"(similarity at least {limit}; {differing:,} under another label)"
    )
    for pair in pairs[:10]:
        labels = found.classes[test.labels[pair.a]], found.classes[train.labels[pair.b]]
        say(f"    {pair.similarity:.3f}  test {pair.a} ({labels[0]})  training {pair.b} ({labels[1]})")
    if pictures is not None and not pairs:
        say("  nothing to draw")
    elif pictures is not None:
        pair_sheet(test, train, pairs[:MOST_PICTURES], found.classes, pictures)
        say(f"  the {min(len(pairs), MOST_PICTURES)} most alike: {pictures}")


def _load(name: str, folder: Path | None, overrides: list[str] | None) -> Dataset:
    """The dataset as a run with these overrides would read it (`data.…` and `train.resolution` matter)."""
    from cifarlab.data.sources import load_dataset
    from cifarlab.recipe import load_recipe

    recipe = load_recipe("ex1", overrides or [])
    return load_dataset(name, recipe.data, recipe.largest_side, folder, say)
