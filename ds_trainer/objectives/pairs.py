"""What the objectives on pairs of answers have in common: sums over sequences, and the numbers people look at.

The sequences of a micro-batch are chosen, rejected, chosen, rejected, ...; see docs/design/preference.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_trainer.protocols import MetricSums, ModelBatch


def sums_of_sequences(values: Tensor, batch: ModelBatch) -> Tensor:
    """Add up the values at the targets of each sequence, in fp64 and always in the same order.

    Args:
        values: (num_targets,) in the order of the batch's targets.
        batch: on the device of the values.

    Returns:
        (num_sequences,) in the type of the values, with their gradient.
    """
    assert batch.sequence_lengths is not None
    if not batch.num_sequences:  # a rank without rows: still a part of the graph
        return values[:0]
    # `unsafe` only leaves out a check that would wait for the device.
    sums = torch.segment_reduce(values.double(), "sum", lengths=batch.sequence_lengths, unsafe=True)
    return sums.to(values.dtype)


def means_of_sequences(sums: Tensor, batch: ModelBatch) -> Tensor:
    """From the sum of each sequence to the mean over its targets: (num_sequences,)."""
    assert batch.sequence_lengths is not None
    return sums / batch.sequence_lengths


def num_pairs(batch: ModelBatch) -> int:
    """The pairs of a batch."""
    assert batch.num_sequences % 2 == 0, "a pair is never split"
    return batch.num_sequences // 2


def chosen_and_rejected(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the two answers of each pair apart: (num_sequences,) -> twice (num_pairs,)."""
    return sequences[0::2], sequences[1::2]


@torch.no_grad()
def reward_metrics(chosen: Tensor, rejected: Tensor) -> MetricSums:
    """Means over pairs of what each answer is worth, of the margin between them, and how often the chosen one is worth more.

    Args:
        chosen: rewards (num_pairs,).
        rejected: the same of the rejected answers.
    """
    count = len(chosen)
    sums = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
    return {name: (value.detach().sum(), count) for name, value in sums.items()}


def entropy_metric(entropies: Tensor) -> MetricSums:
    """The mean over targets of the policy's entropy, in nats: of (num_targets,)."""
    return {"entropy": (entropies.sum(), len(entropies))}


@torch.no_grad()
def log_prob_metrics(log_probs: Tensor) -> MetricSums:
    """Means over pairs of the log-probability of each answer: of (num_sequences,)."""
    chosen, rejected = chosen_and_rejected(log_probs.detach())
    return {"logps/chosen": (chosen.sum(), len(chosen)), "logps/rejected": (rejected.sum(), len(rejected))}
