"""Which checkpoints stay: the newest always, then what the run file asks for, within the budget."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.checkpoint.keep import Keep, Kept, to_remove


def of(*steps: int, losses: dict[int, float] | None = None, size: int = 10) -> list[Kept]:
    return [Kept(step, (losses or {}).get(step), size) for step in steps]


def left(checkpoints: list[Kept], keep: Keep) -> list[int]:
    gone = to_remove(checkpoints, keep)
    return [each.step for each in checkpoints if each.step not in gone]


def test_the_newest_are_kept():
    assert left(of(1, 2, 3, 4), Keep(last=2)) == [3, 4]
    assert to_remove([], Keep(last=2)) == []


def test_milestones_and_the_best_are_kept_too():
    losses = {100: 3.0, 200: 2.0, 300: 2.5, 400: 2.6, 500: math.nan}
    checkpoints = of(100, 200, 300, 400, 500, losses=losses)
    assert left(checkpoints, Keep(last=1, best=2)) == [200, 300, 500]
    assert left(checkpoints, Keep(last=1, every_steps=200)) == [200, 400, 500]
    assert left(checkpoints, Keep(last=1, every_steps=300, best=1)) == [200, 300, 500]


def test_of_two_equally_good_ones_the_newer_is_kept():
    assert left(of(1, 2, 3, losses={1: 2.0, 2: 2.0}), Keep(last=1, best=1)) == [2, 3]


def test_the_budget_takes_milestones_first_then_the_best_and_never_the_newest():
    checkpoints = of(100, 200, 300, 400, losses={200: 1.0})
    keep = {"last": 2, "every_steps": 100, "best": 1}
    assert left(checkpoints, Keep(**keep, max_bytes=40)) == [100, 200, 300, 400]
    assert left(checkpoints, Keep(**keep, max_bytes=39)) == [200, 300, 400]
    assert left(checkpoints, Keep(**keep, max_bytes=29)) == [300, 400]
    assert left(checkpoints, Keep(**keep, max_bytes=1)) == [400]


@given(
    steps=st.sets(st.integers(1, 50), min_size=1, max_size=12),
    last=st.integers(0, 4),
    every=st.none() | st.integers(1, 10),
    best=st.integers(0, 3),
    budget=st.none() | st.integers(1, 100),
    data=st.data(),
)
def test_the_newest_always_stays_and_the_budget_holds(steps, last, every, best, budget, data):
    losses = {step: data.draw(st.none() | st.floats(allow_nan=True)) for step in steps}
    checkpoints = of(*sorted(steps), losses=losses)
    stay = left(checkpoints, Keep(last=last, every_steps=every, best=best, max_bytes=budget))
    assert max(steps) in stay
    assert budget is None or len(stay) == 1 or 10 * len(stay) <= budget
    if budget is None:
        assert set(sorted(steps)[-max(1, last) :]) <= set(stay)
