"""The training loop: one turn is one optimizer step, and every rank runs every line.

It imports none of the parts: what it trains with is handed to it. What only one rank does is hidden inside the recorder and
the checkpoints, so that nothing here can make one rank wait for another that does not come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ds_trainer import comm, faults, nonfinite, whereabouts
from ds_trainer.errors import NonFiniteError
from ds_trainer.nonfinite import NonFinite, SamplesOf
from ds_trainer.protocols import LossSums, ModelBatch
from ds_trainer.state import TrainState, seed_step

logger = logging.getLogger("ds_trainer")


class TrainEngine(Protocol):
    """What the loop needs of an engine; `engine.wrapper.Engine` is one."""

    device: torch.device

    def units(self, batch: ModelBatch) -> tuple[int, ...]: ...  # noqa: D102
    def look_ahead(self, batches: Iterable[ModelBatch]) -> Iterable[ModelBatch]: ...  # noqa: D102
    def micro_step(self, batch: ModelBatch, units: Tensor) -> Tensor: ...  # noqa: D102
    def end_step(self) -> Any: ...  # noqa: D102
    def evaluate(self, batch: ModelBatch) -> LossSums: ...  # noqa: D102
    def train_mode(self, on: bool) -> None: ...  # noqa: D102


class StepRecorder(Protocol):
    """What the loop needs of a recorder; `monitor.recorder.Recorder` is one."""

    def step(  # noqa: D102
        self, *, step: int, loss: Tensor, window: list[ModelBatch], num_targets: Tensor, outcome: Any
    ) -> None: ...
    def skipped_step(self, text: str, fields: dict[str, Any]) -> None: ...  # noqa: D102
    def evaluation(self, *, step: int, result: Evaluation, name: str = "") -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What held-out rows gave, over all ranks."""

    loss: float
    num_targets: int
    metrics: dict[str, float]
    """The objective's own, each a mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """When the loop does what; all in optimizer steps."""

    max_steps: int
    global_batch_size: int
    total_rows: int | None
    """Rows of the whole run when it ends with the data; None when it ends with max_steps."""
    seed: int
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What follows a step whose losses or gradients were not finite; it never moves the weights."""
    max_skipped_steps: int = 20
    """Such steps in a row that `skip` lets pass."""
    patience: int | None = None
    """Evaluations in a row without a better one that end the run."""

    def is_over(self, state: TrainState) -> bool:
        """Whether the run has come to its end, other than that of its data."""
        return state.step >= self.max_steps or self.out_of_patience(state)

    def out_of_patience(self, state: TrainState) -> bool:
        """Whether the evaluations have not got better for too long."""
        return self.patience is not None and state.best.get("evaluations_since", 0) >= self.patience


def train(
    engine: TrainEngine,
    windows: Iterator[list[ModelBatch]],
    state: TrainState,
    plan: Plan,
    recorder: StepRecorder,
    after_step: Callable[[TrainState], None],
    stop: Callable[[], int] = lambda: 0,
    samples_of: SamplesOf = nonfinite.no_samples,
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
        samples_of: names what this rank's micro-batches are made of.

    Returns:
        Why the ranks stopped between two steps: the largest of what `stop` said on each; 0 at the end of the plan or the data.

    Raises:
        NonFiniteError: a loss or a gradient was not finite, and the plan does not let it pass.
    """
    engine.train_mode(True)
    while not plan.is_over(state):
        whereabouts.at("agreeing to go on", state.step + 1)
        if reason := comm.largest(stop()):
            return reason
        whereabouts.at("waiting for data")
        window = next(windows, None)
        if window is None:
            break
        whereabouts.at("counting targets")
        faults.at_step(state.step + 1)
        faults.point("training")
        seed_step(plan.seed, state.step, comm.rank(), engine.device)
        num_tokens = sum(batch.num_tokens for batch in window)
        own_units = [sum(each) for each in zip(*map(engine.units, window), strict=True)]
        counts = torch.tensor([sum(batch.num_targets for batch in window), num_tokens, *own_units], device=engine.device)
        counts = comm.sum_over_ranks(counts)
        num_targets, units = counts[0].clamp(min=1), counts[2:].clamp(min=1)
        engine.look_ahead(window)
        losses = []
        for batch in window:
            whereabouts.at("forward and backward")
            faults.point("forward")
            losses.append(engine.micro_step(batch.to(engine.device), units))
        whereabouts.at("updating")
        loss = sum(losses, torch.zeros((), device=engine.device))
        outcome = engine.end_step()

        begin = state.rows_consumed
        end = begin + plan.global_batch_size
        state.advance(rows_consumed=min(end, plan.total_rows or end), targets_and_tokens=counts[:2])
        whereabouts.at("logging")
        recorder.step(step=state.step, loss=loss, window=window, num_targets=num_targets, outcome=outcome)
        if outcome.applied:
            state.skipped_in_a_row = 0
        else:  # on every rank alike
            found = nonfinite.find(state.step, losses, partial(samples_of, begin))
            judge(found, outcome, state, plan, recorder)
        after_step(state)
    return 0


def judge(found: NonFinite, outcome: Any, state: TrainState, plan: Plan, recorder: StepRecorder) -> None:
    """Say what kept a step from moving the weights, and end the run when the plan says so.

    Raises:
        NonFiniteError: it does.
    """
    if outcome.seeks_loss_scale and not found.micro_batches:
        logger.info("step %d: the gradients overflow fp16, the loss scale is now %g", state.step, outcome.loss_scale)
        return
    state.skipped_in_a_row += 1
    recorder.skipped_step(str(found), found.as_fields())
    if plan.on_nonfinite == "stop":
        why = "train.on_nonfinite = stop ends the run here; skip would go on without this step."
    elif state.skipped_in_a_row > plan.max_skipped_steps:
        why = f"That is step {state.skipped_in_a_row} in a row, and train.max_skipped_steps = {plan.max_skipped_steps}."
    else:
        return
    advice = "Look at these samples, or lower" if found.samples else "Lower"
    half = " bf16 has the range that fp16 lacks." if outcome.loss_scale != 1 else ""
    raise NonFiniteError(f"{found}. The weights were left as they were. {why} {advice} train.learning_rate.{half}")


def evaluate(engine: TrainEngine, batches: Iterable[ModelBatch]) -> Evaluation:
    """The loss of held-out rows, as if they were one step, and what the objective measures of them.

    Collective; every rank must have the same number of batches, at least one.
    """
    engine.train_mode(False)
    terms: Tensor | float = 0.0
    units: Tensor | float = 0.0
    num_targets = 0
    metrics: dict[str, Tensor] = {}
    for batch in engine.look_ahead(batches):
        whereabouts.at("evaluating")
        faults.point("evaluating")
        found = engine.evaluate(batch.to(engine.device))
        terms = terms + found.terms.double()
        units = units + torch.tensor(engine.units(batch), dtype=torch.float64)
        num_targets += batch.num_targets
        for name, (value, count) in found.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + torch.stack([value.double(), torch.full_like(value, count).double()])
    assert isinstance(terms, Tensor), "no batch"
    assert isinstance(units, Tensor)
    others = torch.tensor([float(num_targets)], dtype=torch.float64)
    own = [terms, *(each.to(engine.device) for each in (units, others)), *metrics.values()]
    sums = comm.sum_over_ranks(torch.cat(own)).tolist()
    engine.train_mode(True)
    count = len(terms)
    loss = sum(term / max(1.0, unit) for term, unit in zip(sums[:count], sums[count : 2 * count], strict=True))
    pairs = zip(metrics, sums[2 * count + 1 :: 2], sums[2 * count + 2 :: 2], strict=True)
    return Evaluation(loss, int(sums[2 * count]), {name: value / of for name, value, of in pairs if of})
