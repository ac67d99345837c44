"""The model that a policy is compared with: what it was before the run, in one of three forms that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_trainer.objectives.language_model import log_probs
from ds_trainer.objectives.pairs import sums_of_sequences
from ds_trainer.protocols import ModelBatch

Reference = Callable[[Any, ModelBatch], Tensor]
"""(engine of the policy, batch) -> the reference's log-probability of each answer, (num_sequences,) float64 without a
gradient."""
SUMS = "reference"
"""What those are called among the numbers of a batch, where they were computed before the run."""


def adapter_off(engine: Any, batch: ModelBatch) -> Tensor:
    """The base of an adapter, which is the policy with the adapter switched off: nothing is held twice.

    Args:
        engine: its `module` is a peft model.
        batch: on the engine's device.
    """
    with torch.no_grad(), _evaluating(engine), engine.module.disable_adapter():
        return log_probs_of_answers(engine, batch)


def copy(model: Callable[..., Tensor]) -> Reference:
    """A frozen copy of the model, in evaluation mode."""

    def of_copy(engine: Any, batch: ModelBatch) -> Tensor:
        with torch.no_grad():
            return log_probs_of_answers(model, batch)

    return of_copy


def precomputed(engine: Any, batch: ModelBatch) -> Tensor:
    """What was computed with the weights that the run began with; nothing is computed here."""
    return batch.numbers[SUMS]


def log_probs_of_answers(model: Callable[..., Tensor], batch: ModelBatch) -> Tensor:
    """The log-probability of each answer, (num_sequences,) float64: two such sums may cancel."""
    return sums_of_sequences(log_probs(model, batch).double(), batch)


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    """Inside, no dropout: it would make the reference another one at every call, and take random numbers from the policy."""
    was_training = engine.module.training
    engine.train(False)
    try:
        yield
    finally:
        engine.train(was_training)
