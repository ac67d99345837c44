"""Where this rank is in its work. The story and the loop say it; the watchdog asks when nothing moves any more."""

from __future__ import annotations

import time
from typing import NamedTuple


class Place(NamedTuple):
    """What a rank was last seen doing."""

    phase: str
    step: int | None
    """The step that is worked on, from 1; None before the first."""
    marks: int
    """How often a place was said. All ranks say the same places in the same order: who has said fewest is furthest behind."""
    since: float
    """When it was said, by the monotonic clock, in seconds."""


now = Place("starting", None, 0, time.monotonic())


def at(phase: str, step: int | None = None) -> None:
    """Say where this rank is; that counts as progress. Every rank, at the same places; takes less than a microsecond.

    Args:
        phase: in words, such as "saving".
        step: the step that is worked on, from 1; None leaves it as it was.
    """
    global now
    now = Place(phase, now.step if step is None else step, now.marks + 1, time.monotonic())


def alive() -> None:
    """Say that what this rank was last seen doing moves on, though it takes long. Any rank, at any time."""
    global now
    now = now._replace(since=time.monotonic())
