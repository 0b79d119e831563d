"""The door to every dataset: a name and a folder to look in; the dataset as it was found, or downloaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cifarlab import files, machine
from cifarlab.data.cifar import DATASETS
from cifarlab.data.cifar_download import fetch
from cifarlab.data.cifar_kept import read_or_recall
from cifarlab.data.dataset import Dataset
from cifarlab.data.digits import read_digits
from cifarlab.data.folder import folder_classes, read_folder
from cifarlab.download import Report, cache_folder
from cifarlab.errors import DataError
from cifarlab.recipe import FOLDER_PREFIX, check_dataset_name
from cifarlab.recipe_sections import Data

DEFAULT_FOLDER_SIZE = 32


def load_dataset(name: str, section: Data, resolution: int | None, folder: Path | None, report: Report) -> Dataset:
    """Read `cifar10`, `cifar100`, `digits` or `folder:PATH`.

    folder: where CIFAR's files are, or are to be put; None: `CIFARLAB_DATA`, or the user's cache folder.
    resolution: the side that an image folder's pictures are stored at; None: 32 pixels.
    Raises RecipeError for an unknown name, DataError for data that is missing, damaged or not to be had.
    """
    check_dataset_name(name)
    if name == "digits":
        return read_digits()
    if name.startswith(FOLDER_PREFIX):
        return read_folder(
            files.expand(name.removeprefix(FOLDER_PREFIX)),
            size=resolution or DEFAULT_FOLDER_SIZE,
            fit=section.fit,
            interpolation=section.interpolation,
            bad_files=section.bad_files,
            max_pixels=section.max_pixels,
            memory_limit=machine.available_memory() // 2 if section.memory is None else section.memory * 1_000_000,
            cache=cache_folder(),
            report=report,
        )
    if folder is not None and not files.is_folder(folder):
        raise DataError(
            f"{folder} is not a folder; --data names the folder that holds cifar-10-batches-py and its like "
            f"('cifarlab data fetch {name} --data {folder}' makes it)"
        )
    place = folder or cache_folder()
    dataset = read_or_recall(name, place, cache_folder(), report)
    if dataset is None:
        fetch(name, place, report=report)
        dataset = read_or_recall(name, place, cache_folder(), report)
    if dataset is None:
        raise DataError(f"{name} was downloaded to {place}, and isn't there; was it removed?")
    return dataclasses.replace(dataset, folder=place.resolve())


def training_images(name: str, section: Data) -> int | None:
    """About how many images of a dataset of a known size train, without reading it; None for a folder."""
    if name.startswith(FOLDER_PREFIX):
        return None
    images = 50_000 if name in DATASETS else 1_438  # a fifth of the 1,797 digits is held out as the test set
    return min(round(images * (1 - section.validation)), section.limit or images)


def dataset_shape(name: str) -> tuple[int, int]:
    """How many classes a dataset has, and the side of its images in pixels, without reading or downloading it.

    Raises RecipeError for an unknown name, DataError for a folder that holds no class folders.
    """
    check_dataset_name(name)
    if name.startswith(FOLDER_PREFIX):
        return len(folder_classes(files.expand(name.removeprefix(FOLDER_PREFIX)))), DEFAULT_FOLDER_SIZE
    return len(DATASETS[name].classes) if name in DATASETS else 10, 32
