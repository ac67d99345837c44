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
    """So many with the lowest held-out loss."""
    max_bytes: int | None = None
    """What all may take together."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A complete checkpoint."""

    step: int
    held_out_loss: float | None
    """None when nothing was evaluated at its step."""
    num_bytes: int


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
    measured = [each for each in newest_first if each.held_out_loss is not None and math.isfinite(each.held_out_loss)]
    best = sorted(measured, key=lambda each: (each.held_out_loss, -each.step))[: keep.best]
    milestones = [each for each in newest_first if keep.every_steps and each.step % keep.every_steps == 0]
    wanted = list(dict.fromkeys([*newest_first[: max(1, keep.last)], *best, *milestones]))
    if keep.max_bytes is not None:
        while len(wanted) > 1 and sum(each.num_bytes for each in wanted) > keep.max_bytes:
            wanted.pop()
    return sorted({each.step for each in checkpoints} - {each.step for each in wanted})
