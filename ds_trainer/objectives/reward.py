"""A reward model: a value for a whole answer, larger for the chosen one of a pair.

    loss of a step = sum over all pairs of the global batch of -log s(r(chosen) - r(rejected) - m) / number of pairs

m is the pair's margin, 0 where its record has none: pairs that differ more are to be further apart.
The value is what the head makes of the state at the last token of prompt and answer that is no padding, as transformers'
classes for sequence classification have it, so that an export is one of those. Each answer has one target: that token.
Sources: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 1; Touvron et al. 2023,
"Llama 2", eq. 2 (the margin).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ds_trainer.errors import ModelError
from ds_trainer.objectives.pairs import chosen_and_rejected, num_pairs, reward_metrics
from ds_trainer.protocols import LossSums, ModelBatch, Objective


def attach(model: Any) -> str:
    """Make the model's forward return the value at each target: a token's own state, not that of the token before it.

    Args:
        model: a transformers model for sequence classification with one label, without adapters around it; its head may be
            in peft's hands.

    Returns:
        What was attached, for the log.

    Raises:
        ModelError: the model has no head or body that can be called by itself.
    """
    body = model.base_model
    if not hasattr(model, "score") or body is model:
        raise ModelError(f"{type(model).__name__} keeps its value head in another place than `score`; it cannot be trained.")
    values_of = model.forward

    def forward(
        self: Any,
        *args: Any,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        states_only: bool = False,
        **inputs: Any,
    ) -> Any:
        if states_only:
            return body(**inputs)[0]
        if target_positions is None:
            return values_of(*args, **inputs)
        # A target is predicted at the position before it, and the value of an answer is read at its last token.
        return self.score(body(**inputs)[0].flatten(0, 1)[target_positions + 1])[:, 0].float()

    model.forward = types.MethodType(forward, model)
    return "a value head on the last token of each answer"


def pair_losses(values: Tensor, margins: Tensor | None = None) -> Tensor:
    """The loss of each pair, (num_pairs,), from the values (num_sequences,) and the margins (num_pairs,)."""
    chosen, rejected = chosen_and_rejected(values)
    return -nn.functional.logsigmoid(chosen - rejected if margins is None else chosen - rejected - margins)


def _sums(engine: Callable[..., Tensor], batch: ModelBatch) -> LossSums:
    values = engine(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets)
    margins = batch.numbers.get("margin")
    losses = pair_losses(values, None if margins is None else margins[0::2].to(values.dtype))
    return LossSums(losses.sum().reshape(1), reward_metrics(*chosen_and_rejected(values.detach())))


BRADLEY_TERRY = Objective(sums=_sums, units=lambda batch: (num_pairs(batch),))
"""The mean over all pairs."""
