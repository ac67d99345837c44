"""KTO: make answers that are wanted more likely than the reference does, and unwanted ones less; no pairs are needed.

    r(answer) = log p(answer) - log q(answer)                                       p: the policy, q: the reference
    z = max(0, mean of r over all prompts of the global batch, each with the answer of another record), without a gradient
    loss of a step = sum over all answers of the global batch of f / number of answers
    f = desirable_weight * (1 - s(beta (r - z)))     of a wanted answer             s: the logistic function
        undesirable_weight * (1 - s(beta (z - r)))   of an unwanted one

z stands for the divergence of the policy from the reference. Every answer's loss depends on it, so it is computed first, over
the whole step. Source: Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", eq. 7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_trainer.objectives.language_model import log_probs_and_entropies
from ds_trainer.objectives.pairs import entropy_metric, sums_of_sequences
from ds_trainer.objectives.reference import Reference, log_probs_of_answers
from ds_trainer.protocols import LossSums, MetricSums, ModelBatch, Objective


def answer_losses(
    log_ratios: Tensor, wanted: Tensor, divergence: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """The loss of each answer: (num_sequences,).

    Args:
        log_ratios: log p - log q of each answer: (num_sequences,).
        wanted: whether it is, (num_sequences,) bool.
        divergence: z, a scalar, at least 0.
        beta: how much the policy is held to the reference.
        desirable_weight: of wanted answers.
        undesirable_weight: of the others.
    """
    difference = beta * (log_ratios - divergence)
    gains = desirable_weight * torch.sigmoid(-difference), undesirable_weight * torch.sigmoid(difference)
    return torch.where(wanted, *gains)


def objective(reference: Reference, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Objective:
    """KTO against a reference; the numbers are those of `answer_losses`. A reward is beta (log p - log q)."""

    def look_ahead(engine: Callable[..., Tensor], batch: ModelBatch) -> Tensor:
        others = batch.ahead or batch  # a rank without rows still calls the model
        log_ratios = log_probs_of_answers(engine, others) - reference(engine, others)
        if others.wanted is None:
            return log_ratios.new_zeros(2)
        return torch.stack([(log_ratios * others.wanted).sum(), others.wanted.sum().to(log_ratios.dtype)])

    def sums(engine: Callable[..., Tensor], batch: ModelBatch) -> LossSums:
        assert batch.known is not None
        divergence = (batch.known[0] / batch.known[1].clamp(min=1)).clamp(min=0)
        of_reference = reference(engine, batch)
        of_policy, entropies = log_probs_and_entropies(engine, batch)
        log_probs = sums_of_sequences(of_policy.double(), batch)
        log_ratios = (log_probs - of_reference).to(of_policy.dtype)
        wanted = torch.zeros_like(log_ratios, dtype=torch.bool) if batch.wanted is None else batch.wanted
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        losses = answer_losses(log_ratios, wanted, divergence, beta=beta, **weights)
        metrics = {
            **by_kind("rewards", beta * log_ratios.detach(), wanted, batch.num_wanted),
            **by_kind("logps", log_probs.detach().to(of_policy.dtype), wanted, batch.num_wanted),
            "rewards/accuracies": (((log_ratios.detach() > divergence) == wanted).sum().double(), len(log_ratios)),
            **entropy_metric(entropies),
            "kl": (divergence * len(log_ratios), len(log_ratios)),
        }
        return LossSums(losses.sum().reshape(1), metrics)

    return Objective(sums=sums, units=lambda batch: (batch.num_sequences,), look_ahead=look_ahead)


def by_kind(name: str, values: Tensor, wanted: Tensor, num_wanted: int) -> MetricSums:
    """The mean over wanted and over unwanted answers, of (num_sequences,), under the names that pairs have."""
    return {
        f"{name}/chosen": ((values * wanted).sum(), num_wanted),
        f"{name}/rejected": ((values * ~wanted).sum(), len(values) - num_wanted),
    }
