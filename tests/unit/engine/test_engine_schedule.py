"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from ds_trainer.engine.schedule import learning_rate_factor


def factors(schedule: str, warmup: int = 4, steps: int = 12, minimum: float = 0.1) -> list[float]:
    return [
        learning_rate_factor(step, schedule=schedule, warmup_steps=warmup, max_steps=steps, min_fraction=minimum)
        for step in range(steps + 1)
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_moves_the_weights_from_the_first_update_and_reaches_the_peak(schedule):
    assert factors(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_constant_stays():
    assert set(factors("constant")[4:]) == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_others_fall_to_the_minimum_and_not_below(schedule):
    values = factors(schedule)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[12] == pytest.approx(0.1)
    assert learning_rate_factor(99, schedule=schedule, warmup_steps=4, max_steps=12, min_fraction=0.1) == pytest.approx(0.1)


def test_halfway_is_half_for_both():
    for schedule in ("linear", "cosine"):
        assert learning_rate_factor(5, schedule=schedule, warmup_steps=0, max_steps=10) == pytest.approx(0.5)
