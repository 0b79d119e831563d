"""How far a run is by the clock: it ends on time, whatever steps take, and its position comes to the end with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from cifarlab.budget import Budget, tolerance
from cifarlab.pace import ByClock, BySteps


class Clock:
    """A clock that is moved on by what is simulated."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def steps(
    pace: ByClock, clock: Clock, takes: Callable[[float, float], float], *, at_a_time: int = 1
) -> Iterator[tuple[int, float]]:
    """Steps until it is over: their number and share. takes: seconds, from the share and the time."""
    step, spent = 0, 0.0
    while not pace.over(step):
        share = pace.position(step) / pace.total_steps
        yield step, share
        seconds = takes(share, clock.time)
        clock.time += seconds
        spent += seconds
        step += 1
        if step % at_a_time == 0:
            pace.took(spent, at_a_time)
            spent = 0.0


def test_by_steps_the_position_is_the_step() -> None:
    pace = BySteps(10)
    pace.took(1e9)
    pace.renew()
    assert [pace.position(step) for step in (0, 3, 10)] == [0, 3, 10]
    assert not pace.over(9) and pace.over(10)


@pytest.mark.parametrize("planned", [10, 100, 3000])
def test_as_many_steps_are_taken_as_the_time_allows_however_many_were_planned(planned: int) -> None:
    clock = Clock()
    pace = ByClock(planned, lambda: 60 - clock.time)
    found = list(steps(pace, clock, lambda share, now: 0.2))
    assert abs(clock.time - 60) <= 0.2
    assert len(found) == pytest.approx(300, abs=1)
    shares = [share for _, share in found]
    assert shares[0] == 0 and shares[-1] == pytest.approx(1 - 1 / 300, abs=0.01)
    # Once steps were timed they are evenly spread.
    strides = [after - before for before, after in itertools.pairwise(shares[1:])]
    assert max(strides) == pytest.approx(min(strides), rel=1e-6)


@pytest.mark.parametrize("slower", [0.5, 2.0, 5.0])
def test_a_machine_that_changes_its_speed_midway_still_ends_on_time_with_the_schedule_at_its_end(slower: float) -> None:
    clock = Clock()
    pace = ByClock(500, lambda: 100 - clock.time)
    found = list(steps(pace, clock, lambda share, now: 0.2 if now < 50 else 0.2 * slower))
    assert abs(clock.time - 100) <= 0.2 * slower
    shares = [share for _, share in found]
    assert shares == sorted(shares) and shares[-1] > 0.97
    assert shares[250] == pytest.approx(0.5, abs=0.01)  # half of the time, before it changed


def test_resolutions_come_at_their_share_of_the_steps_although_their_steps_take_longer() -> None:
    clock = Clock()
    sides = ((0.0, 20 * 20), (0.5, 24 * 24), (0.75, 32 * 32))
    pace = ByClock(100, lambda: 100 - clock.time, sides)

    def takes(share: float, now: float) -> float:
        return next(pixels for begins, pixels in reversed(sides) if share >= begins) / 10_000

    shares = [share for _, share in steps(pace, clock, takes)]
    assert abs(clock.time - 100) <= 0.11
    # As a fixed number of steps would have had it: half of them small, a quarter large.
    assert sum(share < 0.5 for share in shares) / len(shares) == pytest.approx(0.5, abs=0.01)
    assert sum(share >= 0.75 for share in shares) / len(shares) == pytest.approx(0.25, abs=0.01)


def test_what_large_images_take_is_guessed_by_their_pixels_until_it_is_known() -> None:
    pace = ByClock(100, lambda: 10.0, ((0.0, 100), (0.5, 400)))
    pace.took(0.1)
    assert pace.seconds_of_step(400) == pytest.approx(0.4)
    assert pace.seconds_of_step(100) == pytest.approx(0.1)
    # 10 s at 0.1 s for the next 0.49 and 0.4 s for the last half of the run
    mean = (0.49 * 0.1 + 0.5 * 0.4) / 0.99
    assert pace.position(2) / 100 - pace.position(1) / 100 == pytest.approx(0.99 / (10 / mean))


def test_one_step_that_waits_for_something_changes_little() -> None:
    clock = Clock()
    pace = ByClock(100, lambda: 60 - clock.time)
    found = list(steps(pace, clock, lambda share, now: 5.0 if 30.1 <= now < 30.3 else 0.2))
    assert len(found) == pytest.approx(300 - 24, abs=1)  # it did wait
    shares = [share for _, share in found]
    strides = [after - before for before, after in itertools.pairwise(shares[1:])]
    assert max(strides) < 1.3 * min(strides)
    assert abs(clock.time - 60) <= 0.2


@pytest.mark.parametrize("at_a_time", [1, 16])
def test_steps_that_are_timed_together_count_as_so_many(at_a_time: int) -> None:
    clock = Clock()
    pace = ByClock(1000, lambda: 30 - clock.time)
    found = list(steps(pace, clock, lambda share, now: 0.01, at_a_time=at_a_time))
    assert len(found) == pytest.approx(3000, abs=at_a_time)
    shares = [share for _, share in found]
    assert shares == sorted(shares)


def test_something_else_that_takes_time_shortens_what_is_left() -> None:
    clock = Clock()
    pace = ByClock(100, lambda: 60 - clock.time)
    taken = 0
    for step, _ in steps(pace, clock, lambda share, now: 0.2):
        taken += 1
        if step == 100:
            clock.time += 20  # a validation
            pace.renew()
    assert taken == pytest.approx(200, abs=2) and abs(clock.time - 60) <= 0.2


def test_at_least_one_step_is_taken_and_no_more_where_there_is_no_time() -> None:
    clock = Clock()
    assert len(list(steps(ByClock(100, lambda: -5.0), clock, lambda share, now: 0.2))) == 1


def test_a_run_that_goes_on_begins_where_it_was() -> None:
    clock = Clock()
    pace = ByClock(100, lambda: 10 - clock.time, first_step=40, share=0.4)
    assert pace.position(40) == 40 and not pace.over(40)
    pace.took(0.1)
    assert pace.position(41) == pytest.approx(41)
    assert pace.position(42) - pace.position(41) == pytest.approx(0.59 / 100 * 100, rel=0.02)


# --- the budget -------------------------------------------------------------------------------------


def test_what_comes_after_the_steps_is_taken_off() -> None:
    clock = Clock()
    budget = Budget(60, 0.0, finishing=5, now=clock)
    budget.looks_after = 10_000
    assert budget.for_steps() == 55  # nothing is known of evaluation yet
    budget.looked(1000, 0.5)
    clock.time = 20
    assert budget.after() == 10_000 * 0.0005 + 5
    assert budget.for_steps() == 60 - 20 - 10
    assert budget.left() == 40 and budget.spent() == 20


def test_validation_in_the_course_of_a_run_takes_a_tenth_of_its_time_at_most() -> None:
    budget = Budget(60, 0.0, now=Clock())
    assert budget.allows_look(5000, 0.1)  # the first: what it takes is not known
    budget.looked(5000, 1.0)
    assert not budget.allows_look(5000, 9.9) and budget.allows_look(5000, 10.0)


def test_what_can_be_spared_is_left_out_where_time_is_short() -> None:
    clock = Clock()
    budget = Budget(60, 0.0, finishing=5, now=clock)
    budget.looked(1000, 1.0)
    clock.time = 40
    assert budget.allows(5000, 10_000)  # 15 s of images and 5 s of writing
    assert budget.allows(5999, 10_000) and not budget.allows(6001, 10_000)  # half of what it may be missed by


def test_a_budget_may_be_missed_by_two_seconds_or_three_percent() -> None:
    assert [tolerance(seconds) for seconds in (30, 60, 100, 7200)] == [2, 2, 3, 216]
