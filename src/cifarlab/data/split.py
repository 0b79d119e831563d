"""Which images are held out, and which are kept when fewer are asked for: fixed functions of labels and seed."""

from __future__ import annotations

import numpy as np

from cifarlab.data.dataset import Int64Array
from cifarlab.errors import DataError, RecipeError
from cifarlab.seeds import derive_seed


def stratified_split(
    labels: Int64Array, groups: Int64Array, fraction: float, seed: int, purpose: str
) -> tuple[Int64Array, Int64Array]:
    """Split images in two: (kept, held), sorted int64 positions that together are 0..N-1.

    labels, groups: int64, (N,). Images of one group (exact duplicates, `leaks.duplicate_groups`) stay on one side.
    Of a class of n images, round(fraction * n) are held out, and at least 1, as near as whole groups allow without
    going above it; where even the smallest group is larger than that, one such group. No class is ever held out
    whole, so a class with a single group is kept. A `fraction` of 0 holds out nothing.

    A group with several labels counts in each of its classes, and is held out where it fits in all of them.
    The result depends on the arguments only: each class is shuffled by (seed, purpose, class).
    Raises RecipeError for a fraction outside 0 <= fraction < 1, DataError where nothing can be held out.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"the held-out share must be at least 0 and below 1, not {fraction}; 0.1 is usual")
    if fraction == 0:
        return np.arange(len(labels)), np.empty(0, np.int64)

    classes, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    unique_groups, group_of = np.unique(groups, return_inverse=True)
    # One row per (class, group) that occurs, by class and then group, and how many images it stands for.
    rows, counts = np.unique(class_of * len(unique_groups) + group_of, return_counts=True)
    row_class, row_group = np.divmod(rows, len(unique_groups))
    shared = np.bincount(row_group, minlength=len(unique_groups)) > 1
    target = np.maximum(1, np.round(fraction * sizes).astype(np.int64))

    held_group = np.zeros(len(unique_groups), bool)
    held = np.zeros(len(classes), np.int64)

    def hold_if_it_fits(row: np.int64, limit: Int64Array) -> None:
        group = row_group[row]
        own = np.flatnonzero(row_group == group) if shared[group] else np.array([row])
        if not held_group[group] and (held[row_class[own]] + counts[own] <= limit[row_class[own]]).all():
            held_group[group] = True
            held[row_class[own]] += counts[own]

    starts = np.searchsorted(row_class, np.arange(len(classes) + 1))
    for k, label in enumerate(classes):
        generator = np.random.default_rng(derive_seed(seed, purpose, int(label)))
        order = starts[k] + generator.permutation(starts[k + 1] - starts[k])
        for row in order:
            if held[k] >= target[k]:
                break
            hold_if_it_fits(row, np.minimum(target, sizes - 1))
        for row in order[np.argsort(counts[order], kind="stable")]:
            if held[k] > 0:
                break
            hold_if_it_fits(row, sizes - 1)

    if not held_group.any():
        raise DataError(f"nothing can be held out for the {purpose}: no class has two different images; add some")
    is_held = held_group[group_of]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def balanced_limit(labels: Int64Array, index: Int64Array, limit: int, seed: int) -> Int64Array:
    """A class-balanced choice of exactly `limit` of the images at `index`: int64, (limit,), sorted.

    labels: int64, (N,), of all images; index: int64, (K,), positions in it to choose from. Counts differ by at most one
    between classes that have enough images; a class that has fewer gives all it has, and the others share the rest.
    Nested: with the same seed, a smaller choice is a subset of a larger one.
    Raises RecipeError where `limit` is below the number of classes or above the number of images.
    """
    classes = np.unique(labels[index])
    if limit < len(classes):
        raise RecipeError(
            f"data.limit is {limit}, but there are {len(classes)} classes; give at least one image a class"
        )
    if limit > len(index):
        raise RecipeError(
            f"data.limit is {limit}, but there are {len(index)} training images; lower it, or use null for all"
        )

    return balanced_choice(labels, index, limit, seed)


def balanced_choice(labels: Int64Array, index: Int64Array, count: int, seed: int) -> Int64Array:
    """`balanced_limit` for any `count` from 0 to len(index): as balanced as so many images can be."""
    classes = np.unique(labels[index])
    # Every image gets a turn, its place in its class's shuffled queue; the choice is a prefix of one order of all
    # images, by turn, so it is nested. Within a turn the classes come in shuffled order: names should not favour any.
    turn = np.empty(len(index), np.int64)
    place = np.empty(len(index), np.int64)
    class_order = np.random.default_rng(derive_seed(seed, "limit")).permutation(len(classes))
    for k, label in enumerate(classes):
        members = np.flatnonzero(labels[index] == label)
        generator = np.random.default_rng(derive_seed(seed, "limit", int(label)))
        turn[generator.permutation(members)] = np.arange(len(members))
        place[members] = class_order[k]
    return np.sort(index[np.lexsort((place, turn))[:count]])
