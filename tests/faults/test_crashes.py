"""Killed at any point of a save, on any rank, a run goes on from a complete checkpoint and computes the same.

A third of the points here, in turn at each stage; all of them: scripts/bench/crash_points.py.
"""

from __future__ import annotations

import pytest
from crash_points import CASES, ZERO2, ZERO3, crash


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("zero", "background", "first"), [(ZERO2, True, 0), (ZERO3, False, 1)], ids=["zero2", "zero3_blocking"]
)
def test_a_run_that_is_killed_in_its_saves_is_the_undisturbed_run(tmp_path, zero, background, first):
    cases = CASES[first::3]
    assert len(cases) == 12
    outcome = crash(tmp_path, cases, zero, background=background)
    assert outcome.failed == [], outcome.resumed
    assert outcome.different == []
    assert outcome.steps_done_twice >= len(cases) // 3, "the kills came too late to prove anything"
