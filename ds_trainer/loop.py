"""The training loop: one turn is one optimizer step, and every rank runs every line.

It imports none of the parts: what it trains with is handed to it. What only one rank does is hidden inside the recorder and
the checkpoints, so that nothing here can make one rank wait for another that does not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_trainer import comm, faults
from ds_trainer.errors import NonFiniteError
from ds_trainer.protocols import ModelBatch
from ds_trainer.state import TrainState, step_seed


class TrainEngine(Protocol):
    """What the loop needs of an engine; `engine.wrapper.Engine` is one."""

    device: torch.device

    def micro_step(self, batch: ModelBatch, num_targets: Tensor) -> Tensor: ...  # noqa: D102
    def end_step(self) -> Any: ...  # noqa: D102
    def evaluate(self, batch: ModelBatch) -> Tensor: ...  # noqa: D102
    def train_mode(self, on: bool) -> None: ...  # noqa: D102


class StepRecorder(Protocol):
    """What the loop needs of a recorder; `monitor.recorder.Recorder` is one."""

    def step(self, *, step: int, loss: Tensor, num_tokens: int, num_targets: Tensor, outcome: Any) -> None: ...  # noqa: D102
    def evaluation(self, *, step: int, loss: float, num_targets: int) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """When the loop does what; all in optimizer steps."""

    max_steps: int
    global_batch_size: int
    total_rows: int | None
    """Rows of the whole run when it ends with the data; None when it ends with max_steps."""
    seed: int
    max_skipped: int = 20
    """Steps in a row that may be skipped for non-finite gradients before the run ends."""


def train(
    engine: TrainEngine,
    windows: Iterator[list[ModelBatch]],
    state: TrainState,
    plan: Plan,
    recorder: StepRecorder,
    after_step: Callable[[TrainState], None],
    stop: Callable[[], int] = lambda: 0,
) -> int:
    """Train to the end of the plan or of the data, or until a rank wants to stop. Collective.

    Args:
        engine: runs forward, backward and update.
        windows: the micro-batches of one optimizer step on this rank, from `state.rows_consumed` on.
        state: how far the run has come; moved on in place.
        plan: when the run ends.
        recorder: takes every step in.
        after_step: evaluates and saves when that is due.
        stop: why this rank wants to stop, 0 when it does not; asked between two steps.

    Returns:
        Why the ranks stopped between two steps: the largest of what `stop` said on each; 0 at the end of the plan or the data.

    Raises:
        NonFiniteError: too many steps in a row had gradients that were not finite.
    """
    skipped = 0
    engine.train_mode(True)
    while state.step < plan.max_steps:
        if reason := comm.largest(stop()):
            return reason
        window = next(windows, None)
        if window is None:
            break
        faults.at_step(state.step + 1)
        faults.point("training")
        torch.manual_seed(step_seed(plan.seed, state.step, comm.rank()))
        num_tokens = sum(batch.num_tokens for batch in window)
        counts = torch.tensor([sum(batch.num_targets for batch in window), num_tokens], device=engine.device)
        counts = comm.sum_over_ranks(counts)
        num_targets = counts[0].clamp(min=1)
        loss = torch.zeros((), device=engine.device)
        for batch in window:
            loss += engine.micro_step(batch.to(engine.device), num_targets)
        outcome = engine.end_step()

        end = state.rows_consumed + plan.global_batch_size
        state.advance(rows_consumed=min(end, plan.total_rows or end), targets_and_tokens=counts)
        skipped = 0 if outcome.applied else skipped + 1
        recorder.step(step=state.step, loss=loss, num_tokens=num_tokens, num_targets=num_targets, outcome=outcome)
        if skipped > plan.max_skipped:
            raise NonFiniteError(
                f"the gradients of the last {skipped} steps were not finite, up to step {state.step}. "
                "Lower train.learning_rate, use bf16 instead of fp16, or look at the data of these steps."
            )
        after_step(state)
    return 0


def evaluate(engine: TrainEngine, batches: Iterable[ModelBatch]) -> tuple[float, int]:
    """Mean loss over the targets of held-out rows. Collective; every rank must have the same number of batches.

    Returns:
        The loss, and how many targets it is the mean of, over all ranks.
    """
    engine.train_mode(False)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches:
        faults.point("evaluating")
        sums[0] += engine.evaluate(batch.to(engine.device))
        sums[1] += batch.num_targets
    nll_sum, num_targets = comm.sum_over_ranks(sums).tolist()
    engine.train_mode(True)
    return nll_sum / max(1.0, num_targets), int(num_targets)
