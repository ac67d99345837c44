"""Batch arithmetic: global_batch_size = micro_batch_size x gradient_accumulation_steps x data_parallel_size. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_trainer.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How the rows of one optimizer step are spread over forwards and ranks."""

    micro_batch_size: int
    """Rows per rank per forward."""
    gradient_accumulation_steps: int
    """Forwards per rank per optimizer step."""
    data_parallel_size: int
    """Ranks that see different rows."""

    @property
    def global_batch_size(self) -> int:
        """Rows per optimizer step over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data_parallel_size

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} rows a step = {self.micro_batch_size} micro_batch_size "
            f"x {self.gradient_accumulation_steps} gradient_accumulation_steps x {self.data_parallel_size} ranks"
        )


def solve_batch(
    *,
    micro: int | None,
    accumulation: int | None,
    total: int | None,
    data_parallel_size: int,
    where: Mapping[str, str] | None = None,
) -> BatchPlan | Problem:
    """Find the third of micro_batch_size, gradient_accumulation_steps and global_batch_size from the other two.

    What is not said is 1, except that a global batch size always holds: it is reached by accumulation.

    Args:
        micro: rows per rank per forward, if stated.
        accumulation: forwards per rank per optimizer step, if stated.
        total: rows per optimizer step over all ranks, if stated.
        data_parallel_size: ranks that see different rows.
        where: file and line of each statement, by the names `micro_batch_size`, `gradient_accumulation_steps`,
            `global_batch_size`.

    Returns:
        The plan, or the problem that shows the arithmetic and the nearest values that work.
    """
    where = where or {}
    if total is None:
        return BatchPlan(
            micro_batch_size=micro or 1,
            gradient_accumulation_steps=accumulation or 1,
            data_parallel_size=data_parallel_size,
        )
    ranks = data_parallel_size
    unit_names, unit = [f"{ranks} ranks"], ranks
    if accumulation is not None:
        unit_names.insert(0, f"gradient_accumulation_steps {accumulation}")
        unit *= accumulation
    if micro is not None or accumulation is None:
        unit_names.insert(0, f"micro_batch_size {micro or 1}")
        unit *= micro or 1
    both = micro is not None and accumulation is not None
    if total % unit == 0 and (not both or total == unit):
        rest = total // unit
        return BatchPlan(
            micro_batch_size=micro or (rest if accumulation is not None else 1),
            gradient_accumulation_steps=accumulation or rest,
            data_parallel_size=ranks,
        )
    product = " x ".join(unit_names) + (f" = {unit}" if len(unit_names) > 1 else "")
    if both:
        what = f"train.global_batch_size = {total} contradicts {product}. Write {unit}, or leave one of the three out"
        if total % (ranks * (micro or 1)) == 0:
            what += f" (gradient_accumulation_steps {total // (ranks * (micro or 1))} would fit)"
    else:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        what = f"train.global_batch_size = {total} is not a multiple of {product}. Use {nearest}"
    others = ", ".join(
        f"{name} from {where[name]}" for name in ("micro_batch_size", "gradient_accumulation_steps") if name in where
    )
    return Problem(where=where.get("global_batch_size", "settings"), what=what + (f" ({others})." if others else "."))
