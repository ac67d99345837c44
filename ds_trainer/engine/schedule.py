"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    *,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int,
    max_steps: int,
    min_fraction: float = 0.0,
) -> float:
    """What the highest learning rate is multiplied by in the update after `step` complete steps.

    The warm-up rises linearly and its first update already moves the weights (factor 1 / (warmup_steps + 1)); after
    it the factor falls from 1 to `min_fraction`, which the update after the last one would have.

    Args:
        step: optimizer steps that are complete, from 0.
        schedule: what happens after the warm-up.
        warmup_steps: updates of the warm-up.
        max_steps: updates of the whole run.
        min_fraction: the lowest learning rate as a fraction of the highest.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    fall = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_fraction + (1.0 - min_fraction) * fall
