"""Which checkpoints stay when a new one is complete: a decision over a few numbers, without looking at a disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """What the run file wants kept."""

    last: int
    """So many of the newest."""
    every_steps: int | None = None
    """Those of steps that are a multiple of this."""
    best: int = 0
    """So many of those that were judged best."""
    max_bytes: int | None = None
    """What all may take together."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A complete checkpoint."""

    step: int
    badness: float | None
    """How bad it was judged to be; None when nothing was evaluated at its step, or by another metric."""
    num_bytes: int


def from_best_on(checkpoints: Sequence[Kept]) -> list[Kept]:
    """Those that were judged, the best first; of equal ones the newest."""
    judged = [each for each in checkpoints if each.badness is not None and math.isfinite(each.badness)]
    return sorted(judged, key=lambda each: (each.badness, -each.step))


def to_remove(checkpoints: Sequence[Kept], keep: Keep) -> list[int]:
    """The steps whose checkpoints go, oldest first; the newest checkpoint never does.

    The budget takes first what is kept for its step alone, then the worse of the best, then the older of the newest.

    Args:
        checkpoints: all that are complete, in any order.
        keep: what is wanted.
    """
    newest_first = sorted(checkpoints, key=lambda each: -each.step)
    if not newest_first:
        return []
    best = from_best_on(newest_first)[: keep.best]
    milestones = [each for each in newest_first if keep.every_steps and each.step % keep.every_steps == 0]
    wanted = list(dict.fromkeys([*newest_first[: max(1, keep.last)], *best, *milestones]))
    if keep.max_bytes is not None:
        while len(wanted) > 1 and sum(each.num_bytes for each in wanted) > keep.max_bytes:
            wanted.pop()
    return sorted({each.step for each in checkpoints} - {each.step for each in wanted})
