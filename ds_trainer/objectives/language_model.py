"""Next-token prediction: the objective of `pretrain` and `sft`, and the log-probabilities that others are made of.

The model's forward is replaced, so that one call of the engine (which its ZeRO hooks need) ends in the loss and not in logits:

    loss of a step = sum over all targets of the global batch of -log p(target) / number of targets

The function here gives the sum; the engine divides by the number over all ranks. See docs/design/exact-loss.md.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_trainer.errors import ModelError
from ds_trainer.objectives.chunked_head import (
    chunk_rows,
    chunked_log_probs,
    chunked_nll_sum,
    plain_entropies,
    plain_log_probs,
    plain_nll_sum,
)
from ds_trainer.objectives.router import balance_sum, experts_per_token
from ds_trainer.protocols import LossSums, ModelBatch, Objective


def attach(model: Any, *, chunked: bool, router: bool = False, as_on: str | None = None) -> str:
    """Make the model's forward return the loss of given targets, or the log-probability of each.

    The head computes loss and logits in one call of one module: under ZeRO-3 its weight is gathered once a call, and the
    number of chunks may differ between ranks.

    Args:
        model: a transformers causal language model, without adapters around it.
        chunked: keep the logits out of memory; False computes them whole.
        router: its routers are balanced too, see `balanced`.
        as_on: take the chunks of this type of device; by default of the one that the weights are on.

    Returns:
        What was attached, for the log.

    Raises:
        ModelError: the model has no head or body that can be called by itself; or no routers.
    """
    chosen = experts_per_token(model) if router else 0
    head, body = model.get_output_embeddings(), model.base_model
    if hasattr(head, "modules_to_save"):  # an adapter trains a copy of the head: peft 0.21, utils/other.py
        head = head.modules_to_save["default"]
    if head is None or body is model:
        raise ModelError(f"{type(model).__name__} has no separate head; only causal language models can be trained.")
    text = model.config.get_text_config()
    scaled = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
        if getattr(text, name, None) not in (None, 1, 1.0)
    ]
    if chunked and (type(head) is not nn.Linear or scaled):
        found = f"logits changed by {', '.join(scaled)}" if scaled else f"a head of type {type(head).__name__}"
        raise ModelError(
            f"{type(model).__name__} has {found}, which the chunked loss does not compute. Set model.chunked_loss: false."
        )
    logits_of = model.forward  # the class's own: it knows what this architecture does to its logits

    def head_forward(
        self: nn.Linear, hidden: Tensor, targets: Tensor | None = None, each: bool = False, entropy: bool = False
    ) -> Any:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        rows = chunk_rows(self.weight.shape[0], as_on or self.weight.device.type)
        if not each:
            return chunked_nll_sum(hidden, self.weight, self.bias, targets, rows)
        found = chunked_log_probs(hidden, self.weight, self.bias, targets, rows, entropy=entropy)
        return found if entropy else found[0]

    def forward(
        self: Any,
        *args: Any,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        log_probs: bool = False,
        entropy: bool = False,
        states_only: bool = False,
        balanced: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if states_only:
            return body(**inputs)[0]
        if target_positions is None or targets is None:
            return logits_of(*args, **inputs)
        if not chunked:
            logits = logits_of(**inputs).logits.flatten(0, 1)[target_positions]
            if entropy:
                return plain_log_probs(logits, targets), plain_entropies(logits)
            return (plain_log_probs if log_probs else plain_nll_sum)(logits, targets)
        if balanced is None:
            return head(body(**inputs)[0].flatten(0, 1)[target_positions], targets, log_probs or entropy, entropy)
        output = body(**inputs, output_router_logits=True)
        nll = head(output[0].flatten(0, 1)[target_positions], targets)
        return nll, balance_sum(output.router_logits, chosen, inputs["position_ids"], target_positions, balanced)

    if chunked:
        head.forward = types.MethodType(head_forward, head)
    model.forward = types.MethodType(forward, model)
    return "head and loss in chunks of targets" if chunked else "logits whole in memory"


def nll_sum(engine: Callable[..., Tensor], batch: ModelBatch) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's targets: a scalar with a gradient.

    Args:
        engine: the engine, or any module that `attach` was applied to.
        batch: on the engine's device.
    """
    return engine(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets)


def log_probs(engine: Callable[..., Tensor], batch: ModelBatch) -> Tensor:
    """The log-probability of each of a batch's targets: (num_targets,) with a gradient.

    Args:
        engine: the engine, or any module that `attach` was applied to.
        batch: on the engine's device.
    """
    return engine(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets, log_probs=True)


def log_probs_and_entropies(engine: Callable[..., Any], batch: ModelBatch) -> tuple[Tensor, Tensor]:
    """The same, and the entropy at each target in nats: twice (num_targets,), the latter without a gradient.

    Args:
        engine: the engine, or any module that `attach` was applied to.
        batch: on the engine's device.
    """
    found: tuple[Tensor, Tensor] = engine(
        **batch.inputs, target_positions=batch.target_positions, targets=batch.targets, entropy=True
    )
    return found


def balanced(router_weight: float) -> Objective:
    """Next-token prediction with the balance of a mixture of experts beside it, a mean over documents.

    Held-out losses are without it. Args: `router_weight`, what the balance is multiplied with.
    """

    def sums(engine: Any, batch: ModelBatch) -> LossSums:
        if not engine.module.training:
            nll = nll_sum(engine, batch)
            return LossSums(torch.stack([nll, torch.zeros_like(nll)]), {})
        nll, balance = engine(
            **batch.inputs,
            target_positions=batch.target_positions,
            targets=batch.targets,
            balanced=batch.sequence_lengths,
        )
        metrics = {"router_balance": (balance.detach(), batch.num_sequences)}
        return LossSums(torch.stack([nll, router_weight * balance]), metrics)

    return Objective(sums=sums, units=lambda batch: (batch.num_targets, batch.num_sequences))


NEXT_TOKEN = Objective(
    sums=lambda engine, batch: LossSums(nll_sum(engine, batch).reshape(1), {}),
    units=lambda batch: (batch.num_targets,),
)
"""The mean over all targets."""


def last_states(engine: Callable[..., Tensor], batch: ModelBatch) -> Tensor:
    """The states (rows, positions, hidden_size) below the head, without gradients: for the isolation probe."""
    with torch.no_grad():
        return engine(**batch.inputs, states_only=True)
