"""SimPO: prefer the chosen answer by its mean log-probability and a margin; there is no reference.

    h = beta log p(chosen) / |chosen| - beta log p(rejected) / |rejected| - gamma          |answer|: its targets
    loss of a step = sum over all pairs of the global batch of -log s(h) / number of pairs

Source: Meng et al. 2024, "SimPO: simple preference optimization with a reference-free reward", eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_trainer.objectives.language_model import log_probs_and_entropies
from ds_trainer.objectives.pairs import (
    chosen_and_rejected,
    entropy_metric,
    log_prob_metrics,
    means_of_sequences,
    num_pairs,
    reward_metrics,
    sums_of_sequences,
)
from ds_trainer.protocols import LossSums, ModelBatch, Objective


def pair_losses(mean_log_probs: Tensor, *, beta: float, gamma: float) -> Tensor:
    """The loss of each pair: (num_pairs,).

    Args:
        mean_log_probs: mean log-probability of a target of each answer: (num_sequences,).
        beta: scale of the rewards.
        gamma: the margin that is aimed at, in rewards.
    """
    chosen, rejected = chosen_and_rejected(beta * mean_log_probs)
    return -nn.functional.logsigmoid(chosen - rejected - gamma)


def objective(*, beta: float, gamma: float) -> Objective:
    """SimPO; the numbers are those of `pair_losses`. A reward is beta times the mean log-probability."""

    def sums(engine: Callable[..., Tensor], batch: ModelBatch) -> LossSums:
        of_policy, entropies = log_probs_and_entropies(engine, batch)
        of_sequences = sums_of_sequences(of_policy, batch)
        means = means_of_sequences(of_sequences, batch)
        metrics = {
            **reward_metrics(*chosen_and_rejected(beta * means.detach())),
            **log_prob_metrics(of_sequences),
            **entropy_metric(entropies),
        }
        return LossSums(pair_losses(means, beta=beta, gamma=gamma).sum().reshape(1), metrics)

    return Objective(sums=sums, units=lambda batch: (num_pairs(batch),))
