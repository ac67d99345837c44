"""Direct preference optimisation: prefer the chosen answer more than the reference does.

    h = (log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))       p: the policy, q: the reference
    loss of a step = sum over all pairs of the global batch of f(h) / number of pairs

    sigmoid  f = -(1 - e) log s(beta h) - e log s(-beta h)       s: the logistic function, e: label_smoothing
    robust   f = (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)
    hinge    f = max(0, 1 - beta h)
    ipo      f = (h' - 1 / (2 beta))^2                           h': with each log-probability divided by the answer's targets

Log-probabilities are sums over the targets of an answer. Sources: Rafailov et al. 2023, "Direct preference optimization",
eq. 7; Mitchell 2023, "A note on DPO with noisy preferences" (sigmoid with e > 0); Chowdhury et al. 2024, "Provably robust
DPO", eq. 12; Liu et al. 2023, "Statistical rejection sampling improves preference optimization" (hinge); Azar et al. 2023,
"A general theoretical paradigm to understand learning from human preferences", eq. 17 (ipo; per target, as TRL 1.16 has it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ds_trainer.objectives.language_model import log_probs_and_entropies
from ds_trainer.objectives.pairs import (
    chosen_and_rejected,
    entropy_metric,
    log_prob_metrics,
    num_pairs,
    reward_metrics,
    sums_of_sequences,
)
from ds_trainer.objectives.reference import Reference
from ds_trainer.protocols import LossSums, ModelBatch, Objective

Loss = Literal["sigmoid", "robust", "hinge", "ipo"]


def pair_losses(log_ratios: Tensor, lengths: Tensor, *, loss: Loss, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair: (num_pairs,).

    Args:
        log_ratios: log p - log q of each answer: (num_sequences,).
        lengths: targets of each answer: (num_sequences,).
        loss: which of the four.
        beta: how much the policy is held to the reference.
        label_smoothing: how many of the preferences are expected to be wrong.
    """
    chosen, rejected = chosen_and_rejected(log_ratios / lengths if loss == "ipo" else log_ratios)
    difference = chosen - rejected
    if loss == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return (1 - beta * difference).relu()
    right = -(1 - label_smoothing) * nn.functional.logsigmoid(beta * difference)
    wrong = -label_smoothing * nn.functional.logsigmoid(-beta * difference)
    return (right - wrong) / (1 - 2 * label_smoothing) if loss == "robust" else right + wrong


def objective(reference: Reference, *, loss: Loss, beta: float, label_smoothing: float) -> Objective:
    """DPO against a reference; the numbers are those of `pair_losses`. A reward is beta (log p - log q)."""

    def sums(engine: Callable[..., Tensor], batch: ModelBatch) -> LossSums:
        of_reference = reference(engine, batch)
        of_policy, entropies = log_probs_and_entropies(engine, batch)
        log_probs = sums_of_sequences(of_policy.double(), batch)
        log_ratios = (log_probs - of_reference).to(of_policy.dtype)
        assert batch.sequence_lengths is not None
        losses = pair_losses(log_ratios, batch.sequence_lengths, loss=loss, beta=beta, label_smoothing=label_smoothing)
        metrics = {
            **reward_metrics(*chosen_and_rejected(beta * log_ratios.detach())),
            **log_prob_metrics(log_probs.detach().to(of_policy.dtype)),
            **entropy_metric(entropies),
        }
        return LossSums(losses.sum().reshape(1), metrics)

    return Objective(sums=sums, units=lambda batch: (num_pairs(batch),))
