"""Formulas of what is reported. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def perplexity(loss: float) -> float:
    """exp(loss); infinite instead of an error where it does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def remaining_seconds(steps_left: int, seconds_per_step: float) -> float:
    """Time to the end at the present pace, evaluations and saves not counted."""
    return steps_left * seconds_per_step


def clock(seconds: float) -> str:
    """A duration as people read it: 45 s, 12 min, 3 h 05."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d}"


def quantity(number: float) -> str:
    """A count with three digits and a letter: 812, 4.1k, 13.2M, 1.02B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.0f}"


def as_ranges(ranks: Iterable[int]) -> str:
    """Ranks in short, as `0-3, 5`; at most eight runs of them, the rest is counted."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def in_words(metrics: Mapping[str, float]) -> str:
    """The two numbers of a preference run that one looks at first; empty for other runs."""
    names = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    return ", ".join(f"{word} {metrics[name]:.3f}" for name, word in names.items() if name in metrics)
