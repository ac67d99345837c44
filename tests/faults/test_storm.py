"""Killed at random while one disk is slower than the other, a run goes on each time, and is the undisturbed run."""

from __future__ import annotations

import pytest
from crash_points import ZERO2
from storms import blows, our_losses, ours, storm


@pytest.mark.timeout(200)
def test_a_run_that_is_killed_at_random_loses_nothing(tmp_path):
    dealt = blows(4, seed=3, in_start_every=4)
    assert {each.target for each in dealt} == {"all ranks", "rank 0", "rank 1"}
    outcome = storm(tmp_path, ours(tmp_path, ZERO2), our_losses, dealt)
    assert outcome.lost == []
    assert outcome.kills == 4
    assert outcome.goes_on >= 3
    assert outcome.steps_done_twice > 0, "the kills came too early to prove anything"
    assert outcome.different == 0
