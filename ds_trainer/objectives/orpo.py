"""ORPO: imitate the chosen answer, and make its odds larger than those of the rejected one; there is no reference.

    odds(answer) = P / (1 - P),  log P = log p(answer) / |answer|                           |answer|: its targets
    loss of a step =            sum over all targets of chosen answers of -log p(target) / number of those targets
                   + weight * sum over all pairs of -log s(log odds(chosen) - log odds(rejected)) / number of pairs

Both means are over the global batch: two terms, each with a number of its own. The prompt is no target of either.
Source: Hong et al. 2024, "ORPO: monolithic preference optimization without reference model", eq. 3 to 7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P < 0, without the cancellation of 1 - P where P is nearly 1."""
    # P = 1 to rounding has infinite odds; half the distance of the next number below 1 keeps them finite.
    bounded = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps / 2)
    return bounded - torch.log(-torch.expm1(bounded))


def pair_losses(mean_log_probs: Tensor) -> Tensor:
    """The odds-ratio loss of each pair, (num_pairs,), from the mean log-probability of a target of each answer."""
    chosen, rejected = chosen_and_rejected(log_odds(mean_log_probs))
    return -nn.functional.logsigmoid(chosen - rejected)


def objective(*, odds_weight: float) -> Objective:
    """ORPO. A reward is odds_weight times the mean log-probability."""

    def sums(engine: Callable[..., Tensor], batch: ModelBatch) -> LossSums:
        of_policy, entropies = log_probs_and_entropies(engine, batch)
        of_sequences = sums_of_sequences(of_policy, batch)
        means = means_of_sequences(of_sequences, batch)
        nll = -chosen_and_rejected(of_sequences)[0].sum()
        odds = odds_weight * pair_losses(means).sum()
        metrics = {
            **reward_metrics(*chosen_and_rejected(odds_weight * means.detach())),
            **log_prob_metrics(of_sequences),
            **entropy_metric(entropies),
        }
        return LossSums(torch.stack([nll, odds]), metrics)

    return Objective(sums=sums, units=lambda batch: (chosen_targets(batch), num_pairs(batch)))


def chosen_targets(batch: ModelBatch) -> int:
    """Targets of the chosen answers of a batch. Asked while the batch is on the CPU, so that nothing waits for a device."""
    assert batch.sequence_lengths is not None
    return int(chosen_and_rejected(batch.sequence_lengths)[0].sum())
