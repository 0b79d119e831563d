from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarlab.data.dataset import Int64Array
from cifarlab.data.split import balanced_limit, stratified_split
from cifarlab.errors import DataError, RecipeError

fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31)


@st.composite
def labelled_groups(draw: st.DrawFn, mixed: bool = False) -> tuple[Int64Array, Int64Array]:
    """Labels, and duplicate groups that hold a single label each unless `mixed`."""
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=2, max_size=60)), np.int64)
    groups = np.array(draw(st.lists(st.integers(0, 30), min_size=len(labels), max_size=len(labels))), np.int64)
    return labels, groups if mixed else groups * 5 + labels


def group_sizes(groups: Int64Array) -> Int64Array:
    return np.unique(groups, return_counts=True)[1]


def split_or_skip(
    labels: Int64Array, groups: Int64Array, fraction: float, seed: int
) -> tuple[Int64Array, Int64Array] | None:
    try:
        return stratified_split(labels, groups, fraction, seed, "validation")
    except DataError:
        return None


@given(st.lists(st.integers(0, 9), min_size=30, max_size=300), fractions, seeds)
def test_without_duplicates_every_class_gives_exactly_its_rounded_share(
    drawn: list[int], fraction: float, seed: int
) -> None:
    labels = np.array(drawn, np.int64)
    kept, held = stratified_split(labels, np.arange(len(labels)), fraction, seed, "validation")
    for label in np.unique(labels):
        n = int((labels == label).sum())
        expected = min(max(1, round(fraction * n)), n - 1)
        assert (labels[held] == label).sum() == expected
    assert kept.dtype == held.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()


@given(labelled_groups(mixed=True), fractions, seeds)
def test_duplicates_stay_on_one_side_and_no_class_loses_all_its_training_images(
    data: tuple[Int64Array, Int64Array], fraction: float, seed: int
) -> None:
    labels, groups = data
    if (split := split_or_skip(labels, groups, fraction, seed)) is None:
        return
    kept, held = split
    assert not set(groups[kept]) & set(groups[held])
    assert set(labels[kept]) == set(labels)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))


@given(labelled_groups(), fractions, seeds)
def test_with_duplicates_the_share_is_as_near_as_whole_groups_allow(
    data: tuple[Int64Array, Int64Array], fraction: float, seed: int
) -> None:
    labels, groups = data
    split = split_or_skip(labels, groups, fraction, seed)
    splittable = [c for c in np.unique(labels) if len(group_sizes(groups[labels == c])) >= 2]
    assert (split is None) == (not splittable)
    if split is None:
        return
    held = split[1]
    for label in np.unique(labels):
        sizes = group_sizes(groups[labels == label])
        got = int((labels[held] == label).sum())
        if label not in splittable:
            assert got == 0
            continue
        target = min(max(1, round(fraction * sizes.sum())), sizes.sum() - 1)
        assert got >= 1
        # Above the target only where even the smallest group is larger; below it only where no group left would fit.
        assert got <= target or got == sizes.min()
        left = group_sizes(groups[(labels == label) & ~np.isin(groups, groups[held])])
        assert got >= target or (got + left > target).all()


def test_where_every_group_is_larger_than_the_share_the_smallest_is_held_out() -> None:
    groups = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2], np.int64)
    for seed in range(10):
        held = stratified_split(np.zeros(11, np.int64), groups, 0.1, seed, "validation")[1]
        assert held.tolist() == [5, 6]


@given(labelled_groups(mixed=True), fractions, seeds)
def test_the_split_does_not_depend_on_how_groups_are_numbered(
    data: tuple[Int64Array, Int64Array], fraction: float, seed: int
) -> None:
    labels, groups = data
    first = split_or_skip(labels, groups, fraction, seed)
    again = split_or_skip(labels.copy(), groups * 7 + 3, fraction, seed)
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        assert np.array_equal(first[1], again[1])


def test_seed_and_purpose_change_the_split_and_the_classes_are_drawn_independently() -> None:
    labels = np.repeat(np.arange(4), 100)
    groups = np.arange(400)
    splits = [
        tuple(stratified_split(labels, groups, 0.1, seed, purpose)[1])
        for seed in (0, 1)
        for purpose in ("validation", "test")
    ]
    assert len(set(splits)) == 4
    held = np.array(splits[0])
    assert len({tuple(held[labels[held] == c] - 100 * c) for c in range(4)}) == 4


def test_the_split_of_a_seed_is_frozen() -> None:
    # A new version that draws otherwise would silently move images between training and validation.
    labels = np.repeat(np.arange(2), 20)
    held = stratified_split(labels, np.arange(40), 0.1, 0, "validation")[1]
    assert held.tolist() == [11, 12, 25, 29]


def test_nothing_is_held_out_of_a_fraction_of_zero() -> None:
    kept, held = stratified_split(np.zeros(5, np.int64), np.arange(5), 0.0, 0, "validation")
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert held.tolist() == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(RecipeError, match="held-out share"):
        stratified_split(np.zeros(5, np.int64), np.arange(5), fraction, 0, "validation")


def test_classes_of_one_picture_each_cannot_be_split() -> None:
    labels = np.array([0, 0, 1, 1], np.int64)
    with pytest.raises(DataError, match="nothing can be held out for the test"):
        stratified_split(labels, labels, 0.2, 0, "test")


@given(st.lists(st.integers(0, 5), min_size=10, max_size=200), seeds, st.data())
def test_a_limit_is_exact_nested_and_as_balanced_as_the_classes_allow(
    drawn: list[int], seed: int, data: st.DataObject
) -> None:
    labels = np.array(drawn, np.int64)
    index = np.flatnonzero(np.random.default_rng(seed).random(len(labels)) < 0.8)
    classes, available = np.unique(labels[index], return_counts=True)
    if not len(index):
        return
    large = data.draw(st.integers(len(classes), len(index)))
    small = data.draw(st.integers(len(classes), large))
    chosen = balanced_limit(labels, index, large, seed)
    assert chosen.dtype == np.int64
    assert len(chosen) == large == len(set(chosen))
    assert set(chosen) <= set(index)
    assert (np.diff(chosen) > 0).all()
    assert set(balanced_limit(labels, index, small, seed)) <= set(chosen)
    counts = np.array([(labels[chosen] == c).sum() for c in classes])
    # Whoever gives less than the largest share by more than one has nothing left to give.
    assert ((counts >= counts.max() - 1) | (counts == available)).all()


def test_a_limit_favours_no_class_by_its_name() -> None:
    labels = np.repeat(np.arange(10), 50)
    extra = [
        frozenset(np.flatnonzero(np.bincount(labels[balanced_limit(labels, np.arange(500), 13, seed)]) == 2))
        for seed in range(20)
    ]
    assert len(set(extra)) > 10


def test_a_limit_below_the_number_of_classes_or_above_the_images_is_refused() -> None:
    labels = np.repeat(np.arange(10), 5)
    with pytest.raises(RecipeError, match=r"data\.limit is 9, but there are 10 classes"):
        balanced_limit(labels, np.arange(50), 9, 0)
    with pytest.raises(RecipeError, match=r"data\.limit is 41, but there are 40 training images"):
        balanced_limit(labels, np.arange(40), 41, 0)
