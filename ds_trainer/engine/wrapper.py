"""One optimizer step of a DeepSpeed engine, in the words of this project.

What is DeepSpeed's way of doing things ends here: its scaling by accumulation steps, its boundaries, its checkpoint calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_trainer import comm
from ds_trainer.engine import state
from ds_trainer.engine.pace import Pace
from ds_trainer.protocols import LossSums, MetricSums, ModelBatch, Objective


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step did."""

    applied: bool
    """False when the gradients were not finite and DeepSpeed left the weights alone."""
    grad_norm: float | Tensor | None
    """Norm of the whole gradient before clipping."""
    learning_rate: float
    """Of this update."""
    loss_scale: float
    """1 unless fp16."""
    seeks_loss_scale: bool = False
    """fp16: the loss scale could still be lowered before this step, so gradients that overflow are the search for one."""


class Engine:
    """Owns the DeepSpeed engine. Every method is collective: every rank must call it."""

    def __init__(self, deepspeed_engine: Any, objective: Objective) -> None:
        self._engine = deepspeed_engine
        self._objective = objective
        self._boundary = False
        self._begins = True
        self._trains = False
        self._pace = Pace(deepspeed_engine.module, deepspeed_engine.device)
        self._copies: dict[tuple[int, str], Tensor] = {}
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._known: Tensor | None = None
        self.data_parallel_size: int = deepspeed_engine.dp_world_size
        self.device: torch.device = deepspeed_engine.device

    @property
    def model(self) -> nn.Module:
        """The bare module; under ZeRO-3 its parameters are shards."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, **inputs: Any) -> Any:
        """Call the model between two steps, without gradients; after `train_mode(False)` where dropout must not be."""
        output = self._engine(**inputs)
        self._forget_passes()
        return output

    def _forget_passes(self) -> None:
        """After a forward without a backward that came before the first step: ZeRO-3 must not take it for a step.

        DeepSpeed 0.19.8 learns from a whole pass in what order modules run and which weights to release after each of them.
        The latter it never learns anew (`lru_cache` of `__params_to_release`, runtime/zero/partitioned_param_coordinator.py):
        from a forward alone it learns to release what every backward would then have to gather again.
        """
        offload = None if self._trains else getattr(self._engine.optimizer, "parameter_offload", None)
        if offload is not None:
            coordinator = offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def units(self, batch: ModelBatch) -> tuple[int, ...]:
        """What the terms of the loss are means over, in this batch. Not collective."""
        return self._objective.units(batch)

    def look_ahead(self, batches: Iterable[ModelBatch]) -> Iterable[ModelBatch]:
        """Find out what the objective has to know of all batches before the first of them; most have nothing to ask.

        Args:
            batches: of the step that comes next, or of an evaluation; as many on every rank.

        Returns:
            The same batches, to be computed; not read yet where there is nothing to ask.
        """
        ahead = self._objective.look_ahead
        if ahead is None:
            return batches
        batches = list(batches)
        self._known = comm.sum_over_ranks(torch.stack([self.look_at(ahead, batch) for batch in batches]).sum(0))
        return batches

    def look_at(self, compute: Callable[[Any, ModelBatch], Tensor], batch: ModelBatch) -> Tensor:
        """What a function makes of this engine and a batch, in evaluation mode and without gradients.

        Args:
            compute: calls the engine equally often on every rank.
            batch: on the CPU or the engine's device.
        """
        was_training = self.model.training
        self.train_mode(False)
        with torch.no_grad():
            found = compute(self._engine, batch.to(self.device))
        self.train_mode(was_training)
        self._forget_passes()
        return found

    def micro_step(self, batch: ModelBatch, units: Tensor) -> Tensor:
        """One forward and backward.

        DeepSpeed averages gradients over ranks, so the sums are scaled by their number; its division by the accumulation
        steps is switched off. The gradient is then exactly that of (sum over all of the step) / units, term by term.

        Args:
            batch: a micro-batch on the engine's device.
            units: those of the whole step, over all ranks and micro-batches, at least 1: (num_terms,) on the device.

        Returns:
            This micro-batch's share of the loss of the step: a scalar on the device. Nothing waits for the device.
        """
        with self._pace.measured() if self._begins else nullcontext():
            sums = self._objective.sums(self._engine, replace(batch, known=self._known))
        self._begins, self._trains = False, True
        # 0 for a finite loss, NaN for any other: then all gradients are NaN, and DeepSpeed's own check before the update covers
        # the loss too, on all ranks and without another wait for the device.
        spoiled = 0.0 * sums.terms.detach().sum()
        self._engine.backward((sums.terms * (self.data_parallel_size / units + spoiled)).sum(), scale_wrt_gas=False)
        self._boundary = self._engine.is_gradient_accumulation_boundary()
        if not self._boundary:
            self._engine.step()  # counts the micro-step; the update waits for `end_step`
        for name, (value, count) in sums.metrics.items():
            before, count_before = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = before + value, count_before + count
        return (sums.terms.detach() / units).sum()

    def take_metrics(self) -> MetricSums:
        """What the objective has measured on this rank in the micro-steps since the last call. Not collective."""
        taken, self._metrics = self._metrics, {}
        return taken

    def end_step(self) -> StepOutcome:
        """Update the weights after the last micro-step of a window, unless a loss or a gradient is not finite on any rank.

        Relies on DeepSpeed 0.19.8: `step` of runtime/zero/stage_1_and_2.py and stage3.py all-reduces the norm (and in fp16 and
        bf16 an overflow flag) and returns before the optimizer when it is not finite. tests/faults/test_nonfinite.py proves it
        at each stage.
        """
        assert self._boundary, "a window must have gradient_accumulation_steps micro-batches"
        self._begins = True
        learning_rate = float(self._engine.get_lr()[0])
        scaler = getattr(self._engine.optimizer, "loss_scaler", None) if self._engine.fp16_enabled() else None
        seeks = scaler is not None and scaler.dynamic and scaler.cur_scale > scaler.min_scale
        if scaler is not None and scaler.dynamic:
            scaler.raise_error_at_min_scale = False  # the loop counts such steps, and says more (runtime/fp16/loss_scaler.py)
        self._engine.step()
        scale = getattr(self._engine.optimizer, "cur_scale", 1.0) if self._engine.fp16_enabled() else 1.0
        return StepOutcome(
            applied=bool(self._engine.was_step_applied()),
            grad_norm=self._engine.get_global_grad_norm(),
            learning_rate=learning_rate,
            loss_scale=float(scale),
            seeks_loss_scale=seeks,
        )

    def evaluate(self, batch: ModelBatch) -> LossSums:
        """The sums of a batch, without gradients; call it after `train_mode(False)`."""
        with torch.no_grad():
            sums = self._objective.sums(self._engine, replace(batch, known=self._known))
        self._forget_passes()
        return sums

    def train_mode(self, on: bool) -> None:
        """Switch dropout and the like on for training, off for evaluation."""
        self._engine.train(on)

    def own_seconds(self) -> list[float]:
        """What this rank itself computed in the forward of each step since the last call; see `engine.pace`."""
        return self._pace.lap()

    def snapshot(self, *, copy: bool) -> tuple[dict[tuple[str, str, int], Tensor], dict[str, Any]]:
        """This rank's part of the training state, between two steps; see `engine.state`.

        Args:
            copy: training goes on while the slices are used. They last until the next call.
        """
        return state.snapshot(self._engine, self._copies if copy else None)

    def restore(self, read: state.ReadSlice, rest: dict[str, Any]) -> None:
        """Take over a saved state, whatever the stage, ranks and offload it was saved at; before the first step."""
        state.restore(self._engine, read, rest)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Hand (name, value, step) to DeepSpeed's monitors: TensorBoard, W&B, CSV, Comet, as configured."""
        monitor = getattr(self._engine, "monitor", None)
        if monitor is not None and monitor.enabled:
            monitor.write_events(events)

    def close(self) -> None:
        """Release hooks and buffers; files that offload to nvme left are removed by DeepSpeed."""
        self._engine.destroy()
