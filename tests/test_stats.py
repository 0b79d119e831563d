"""Statistics of paired runs: against scipy, formulas by hand, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from cifarlab.stats import holm, paired_difference, power, seeds_needed


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_difference_interval_and_p_are_those_of_scipys_paired_test(n: int) -> None:
    generator = np.random.default_rng(n)
    baseline = generator.normal(0.7, 0.01, n)
    arm = baseline + generator.normal(0.004, 0.003, n)
    found = paired_difference(list(arm - baseline))
    expected = reference.ttest_rel(arm, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.n == n
    assert found.mean == pytest.approx((arm - baseline).mean())
    assert found.std == pytest.approx((arm - baseline).std(ddof=1))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_pair_has_a_difference_and_no_interval_and_none_has_nothing() -> None:
    one = paired_difference([0.01])
    assert (one.n, one.mean, one.std, one.low, one.p) == (1, 0.01, None, None, None)
    assert paired_difference([]).mean is None


def test_pairs_that_differ_by_equally_many_images_are_no_proof() -> None:
    """Two pairs, each one image of 5,000 better: a t-test of the bare numbers would be sure of it."""
    found = paired_difference([2e-4, 2e-4], quantum=2e-4)
    assert found.std == pytest.approx(2e-4 / math.sqrt(6))
    assert found.p is not None and found.p > 0.05
    assert found.low is not None and found.low < 0 < (found.high or 0)
    assert paired_difference([0.0, 0.0, 0.0]).p == 1.0
    # Where the spread is larger than that, it counts as it is.
    assert paired_difference([0.0, 0.02], quantum=2e-4).std == pytest.approx(0.02 / math.sqrt(2))


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    """5,000 studies of five pairs, accuracies rounded to 5,000 images; four standard errors are 1.2 points."""
    generator = np.random.default_rng(0)
    truth, held = 0.003, 0
    for differences in generator.normal(truth, 0.004, (5_000, 5)):
        found = paired_difference(list(np.round(differences * 5_000) / 5_000), quantum=2e-4)
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    assert held / 5_000 == pytest.approx(0.95, abs=0.0125)


def test_holm_by_hand_and_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    generator = np.random.default_rng(1)
    for _ in range(50):
        p_values = list(generator.uniform(0, 0.1, 4))
        # Rejecting step by step at alpha / (what is left) is the same as comparing adjusted values with alpha.
        for alpha in (0.02, 0.05, 0.1):
            rejected = set()
            for rank, place in enumerate(sorted(range(4), key=p_values.__getitem__)):
                if p_values[place] > alpha / (4 - rank):
                    break
                rejected.add(place)
            assert rejected == {place for place, value in enumerate(holm(p_values)) if value <= alpha}


def test_holm_keeps_false_finds_below_five_per_cent_where_nothing_differs() -> None:
    generator = np.random.default_rng(2)
    p_values = generator.uniform(size=(4_000, 6))
    assert np.mean([min(holm(list(row))) <= 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.014)
    assert np.mean(p_values.min(axis=1) <= 0.05) > 0.2  # what it is there for


def test_power_is_the_share_of_studies_that_find_the_difference() -> None:
    generator = np.random.default_rng(3)
    samples = generator.normal(0.002, 0.003, (5_000, 8))
    found = np.mean([(paired_difference(list(row)).p or 1) <= 0.05 for row in samples])
    assert power(8, 0.002, 0.003) == pytest.approx(found, abs=0.025)


@pytest.mark.parametrize(("difference", "std", "tests"), [(0.002, 0.003, 1), (0.002, 0.003, 6), (0.01, 0.001, 1)])
def test_seeds_needed_are_the_fewest_with_enough_power(difference: float, std: float, tests: int) -> None:
    n = seeds_needed(difference, std, tests)
    assert n is not None
    assert power(n, difference, std, 0.05 / tests) >= 0.8
    assert n == 2 or power(n - 1, difference, std, 0.05 / tests) < 0.8


def test_textbook_sample_size_and_what_cannot_be_resolved() -> None:
    # Cohen's d of 0.5, two-sided 5 %, power 80 %: 34 pairs (G*Power's manual).
    assert seeds_needed(0.5, 1.0) == 34
    assert power(20, 0.5, 1.0) == pytest.approx(
        reference.nct.sf(reference.t.ppf(0.975, 19), 19, 0.5 * math.sqrt(20)), abs=1e-4
    )
    assert seeds_needed(1e-9, 1.0) is None
