"""Rank by rank: how long each took, and which one holds the others up. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

LISTED_RANKS = 64
"""Up to so many ranks, each one's numbers are written; of more only the extremes, so that a line stays short."""
SLOWER = 1.25
"""A straggler takes more than so many times what the others take,"""
LEAST_SECONDS = 0.02
"""and so much more: what else runs on a host makes differences of some milliseconds,"""
STEP_FRACTION = 0.05
"""and, where it waits for data, this part of a step more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPace:
    """What one rank tells at a log step. Seconds are per step."""

    host: str
    step_seconds: float
    """From one step to the next; nearly equal on all ranks, which wait for one another."""
    data_wait_seconds: float
    """Of that, standing still for data."""
    usual_data_wait_seconds: float
    """The median over the last steps."""
    usual_forward_seconds: float
    """The median of what this rank itself computes in a forward; see `engine.pace`."""
    peak_memory_gib: float
    """The most it has held since it started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank the others wait for in more than half of the steps."""

    rank: int
    host: str
    what: str
    """In what it is slow: "forward" or "data"."""
    seconds: float
    """What it takes for that, per step."""
    others_seconds: float
    """What the others take: their median."""

    def __str__(self) -> str:
        what = "waits for data" if self.what == "data" else "computes its forward in"
        return f"rank {self.rank} on {self.host} {what} {self.seconds:.2f} s, the others {self.others_seconds:.2f} s"

    def as_fields(self) -> dict[str, Any]:
        """For metrics.jsonl and events.jsonl."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def find_stragglers(ranks: Sequence[RankPace]) -> list[Straggler]:
    """The ranks that take clearly longer than the others, and in what. What all ranks are slow in names nobody.

    Args:
        ranks: of all ranks, by rank.
    """
    if len(ranks) == 1:
        return []
    step_seconds = median(each.step_seconds for each in ranks)
    found = []
    for what, values, margin in (
        ("forward", [each.usual_forward_seconds for each in ranks], LEAST_SECONDS),
        ("data", [each.usual_data_wait_seconds for each in ranks], max(LEAST_SECONDS, STEP_FRACTION * step_seconds)),
    ):
        ordered = sorted(values)
        for rank, own in enumerate(values):
            if own == ordered[0]:
                continue
            place = bisect_left(ordered, own)
            others = median(ordered[:place] + ordered[place + 1 :])
            if own > SLOWER * others and own > others + margin:
                found.append(
                    Straggler(rank=rank, host=ranks[rank].host, what=what, seconds=own, others_seconds=others),
                )
    return found


def by_rank(ranks: Sequence[RankPace]) -> dict[str, Any]:
    """The ranks' numbers for metrics.jsonl: a list each, or where there are many, the extremes with their rank and the median.

    Args:
        ranks: of all ranks, by rank.
    """
    columns = {
        "step_seconds": [each.step_seconds for each in ranks],
        "data_wait_seconds": [each.data_wait_seconds for each in ranks],
        "forward_seconds": [each.usual_forward_seconds for each in ranks],
        "peak_memory_gib": [each.peak_memory_gib for each in ranks],
    }
    return {name: _shown([round(value, 4) for value in values]) for name, values in columns.items()}


def _shown(values: list[float]) -> Any:
    if len(values) <= LISTED_RANKS:
        return values
    least, most = min(values), max(values)
    return {
        "min": least,
        "min_rank": values.index(least),
        "median": median(values),
        "max": most,
        "max_rank": values.index(most),
    }
