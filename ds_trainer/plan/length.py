"""How long a run is: rows, tokens, steps, epochs, warm-up; and time and price at a given speed. Pure but for one report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.merge import Resolved
from ds_trainer.data.order import steps_for, total_rows
from ds_trainer.plan.shape import Shape
from ds_trainer.prepare import REPORT


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """Of the run and of its steps."""

    num_rows: int | None
    """Rows of the data, where `ds_trainer prepare` has counted them."""
    fill: float
    """Share of the positions that hold a token; 1 where the data has not been counted."""
    max_steps: int | None
    """None: the run ends with the data, and that has not been counted."""
    positions_per_step: int
    warmup_steps: int

    @property
    def tokens_per_step(self) -> float:
        """Without padding."""
        return self.positions_per_step * self.fill


def length_of(resolved: Resolved, batch: BatchPlan) -> Length:
    """Count steps and tokens; of the data only what `ds_trainer prepare` wrote down is looked at."""
    train, data = resolved.settings.train, resolved.settings.data
    counted = _counted_rows(resolved)
    max_steps = train.max_steps
    if max_steps is None and counted is not None:
        max_steps = steps_for(total_rows(counted[0], train.epochs or 1.0), batch.global_batch_size)
    return Length(
        num_rows=counted[0] if counted else None,
        fill=counted[1] if counted else 1.0,
        max_steps=max_steps,
        positions_per_step=batch.global_batch_size * data.seq_len,
        warmup_steps=train.warmup_steps,
    )


def _counted_rows(resolved: Resolved) -> tuple[int, float] | None:
    """Rows and fill as the report of `prepare` in the run folder says, if it is about this data."""
    data = resolved.settings.data
    try:
        report = json.loads((Path(resolved.settings.checkpoint.folder) / REPORT).read_text(encoding="utf-8"))["data"]
        same = report["seq_len"] == data.seq_len and [each["path"] for each in report["sources"]] == [
            source.path for source in data.sources
        ]
        return (int(report["num_rows"]), float(report["fill"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def flops_per_step(shape: Shape, *, positions: float, seq_len: int) -> float:
    """Floating-point operations of the model for one step, as `monitor.metrics.model_flops` counts them.

    Args:
        shape: the model.
        positions: of one step, over all ranks.
        seq_len: of a row; each is taken for one document. Packed ones are shorter, so that their attention takes less.
    """
    return shape.flops.of(positions, positions * seq_len / 2)
