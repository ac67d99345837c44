"""A step of many ranks in one process: each micro-batch with the random numbers that its rank would have.

One process accumulates over all micro-batches of all ranks. In the order of the data (`data.order.positions_of_window`) these
are micro-batch 1 of every rank, then micro-batch 2 of every rank. In a stream, a rank's lie together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.debug.culprit import Looks, Place, watched
from ds_trainer.engine.wrapper import Engine, StepOutcome
from ds_trainer.protocols import LossSums, ModelBatch
from ds_trainer.state import TrainState, seed_step


def accumulated(batch: BatchPlan) -> BatchPlan:
    """The batch of many ranks as one process reaches it: the same micro-batches, one after the other."""
    steps = batch.gradient_accumulation_steps * batch.data_parallel_size
    return dataclasses.replace(batch, gradient_accumulation_steps=steps, data_parallel_size=1)


def place_of(index: int, batch: BatchPlan, streamed: bool) -> tuple[int, int]:
    """Whose micro-batch it is.

    Args:
        index: of a micro-batch among all of a step, from 0.
        batch: that of the many ranks.
        streamed: the data is a stream.

    Returns:
        The rank, and which of the rank's micro-batches it is; both from 0.
    """
    if streamed:
        return divmod(index, batch.gradient_accumulation_steps)
    micro_batch, rank = divmod(index, batch.data_parallel_size)
    return rank, micro_batch


class AsRanks:
    """Stands for the engine of every rank, one micro-batch after the other; what the loop needs of an engine."""

    def __init__(
        self,
        engine: Engine,
        state: TrainState,
        batch: BatchPlan,
        *,
        seed: int,
        streamed: bool,
        samples_of: Callable[[int, int], list[list[str]]],
        report: Callable[[str], None],
        looks: Looks,
    ) -> None:
        """Take what is run.

        Args:
            engine: accumulates over the micro-batches of all ranks.
            state: how far the run has come; the loop moves it.
            batch: that of the many ranks.
            seed: `train.seed`.
            streamed: the data is a stream.
            samples_of: (rows consumed before a step, micro-batch among all of it) -> the samples of each of its rows.
            report: takes a line for the user.
            looks: for numbers that are not finite.
        """
        self.engine, self.state, self.batch, self.device = engine, state, batch, engine.device
        self._seed, self.streamed, self.samples_of, self._report = seed, streamed, samples_of, report
        self._looks = looks
        self._index = 0
        self._random: dict[int, Any] = {}

    def units(self, batch: ModelBatch) -> tuple[int, ...]:
        """As the engine does."""
        return self.engine.units(batch)

    def micro_step(self, batch: ModelBatch, units: Tensor) -> Tensor:
        """As the next micro-batch of the step."""
        loss = self.run(self._index, batch, units)
        self._index += 1
        return loss

    def run(self, index: int, batch: ModelBatch, units: Tensor) -> Tensor:
        """As a micro-batch of the step, from 0 among all of it; those of one rank in their order.

        Raises:
            NonFiniteError: at the first number that is not finite, with the module or line that makes it, rank and samples.
        """
        rank, micro_batch = place_of(index, self.batch, self.streamed)
        place = Place(
            f"step {self.state.step + 1}, rank {rank}, micro-batch {micro_batch + 1}",
            batch.inputs["position_ids"],
            self.samples_of(self.state.rows_consumed, index),
        )
        watch = (
            watched(self.engine.model, place, self._looks) if self.state.step + 1 >= self._looks.from_step else nullcontext()
        )
        with self._numbers_of(rank, first=micro_batch == 0), watch:
            loss = self.engine.micro_step(batch, units)
        if not torch.isfinite(loss):
            self._report(f"{place.words}: the loss is not finite.{place.in_words()}")
        return loss

    @contextmanager
    def _numbers_of(self, rank: int, *, first: bool) -> Iterator[None]:
        """Inside, random numbers are those of a rank: they go on where its last micro-batch has left them."""
        gpus = [self.device] if self.device.type == "cuda" else []
        if first:
            seed_step(self._seed, self.state.step, rank, self.device)
        else:
            host, *devices = self._random[rank]
            torch.set_rng_state(host)
            for gpu, numbers in zip(gpus, devices, strict=True):
                torch.cuda.set_rng_state(numbers, gpu)
        yield
        self._random[rank] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]

    def end_step(self) -> StepOutcome:
        """The update from the micro-batches of all ranks."""
        self._index = 0
        return self.engine.end_step()

    def look_ahead(self, batches: Iterable[ModelBatch]) -> Iterable[ModelBatch]:
        """As the engine does: the batches are those of all ranks."""
        return self.engine.look_ahead(batches)

    def evaluate(self, batch: ModelBatch) -> LossSums:
        """As the engine does."""
        return self.engine.evaluate(batch)

    def train_mode(self, on: bool) -> None:
        """As the engine does."""
        self.engine.train_mode(on)
