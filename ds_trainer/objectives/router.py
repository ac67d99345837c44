"""The balance of a mixture of experts: a small loss that keeps the router from sending all tokens to a few experts.

    balance of a document = mean over layers of E * sum over experts e of f_e * P_e

f_e: how often the document's tokens choose expert e, divided by their number; P_e: the mean of the router's probability of e
over them; E: the number of experts. Where all are used alike it is k, the number of experts a token chooses. The gradient flows
through P_e. Source: Fedus et al. 2021, "Switch transformers", eq. 4 to 6, taken over each document as in
DeepSeek-AI 2024, "DeepSeek-V3", eq. 17 to 20: over a batch it would depend on what lies beside a document, so on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_trainer.errors import ModelError


def experts_per_token(model: Any) -> int:
    """How many experts a token of the model chooses.

    Args:
        model: a transformers model without adapters around it.

    Raises:
        ModelError: it is no mixture of experts, or does not hand out what its routers say.
    """
    recorded = getattr(model.base_model, "_can_record_outputs", None) or {}
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if "router_logits" not in recorded or not isinstance(chosen, int):
        raise ModelError(
            f"objective.router_weight: {type(model).__name__} is no mixture of experts whose routers transformers can read. "
            "Remove it."
        )
    return chosen


def balance_sum(
    router_logits: Sequence[Tensor],
    experts_per_token: int,
    position_ids: Tensor,
    target_positions: Tensor,
    sequence_lengths: Tensor,
) -> Tensor:
    """The balance, added up over the documents that have a target: a scalar with a gradient. Waits for no device.

    Args:
        router_logits: of each layer, (positions, experts) or (rows, positions, experts).
        experts_per_token: how many a token chooses.
        position_ids: (rows, positions); restart with each document.
        target_positions: (num_targets,) into the positions of all rows laid end to end.
        sequence_lengths: targets of each of those documents, (num_sequences,).
    """
    document = (position_ids.flatten() == 0).cumsum(0) - 1
    count = len(sequence_lengths)
    # Documents without a target, such as the padding of a row, are counted in a last place that is left out.
    place = torch.full_like(document, count)
    numbers = torch.arange(count, device=document.device)
    place[document[target_positions]] = torch.repeat_interleave(numbers, sequence_lengths, output_size=len(target_positions))
    place = place[document]
    tokens = torch.zeros(count + 1, device=document.device).index_add_(0, place, torch.ones_like(place, dtype=torch.float32))
    tokens = tokens.clamp(min=1)[:, None]
    total = torch.zeros((), device=document.device)
    for logits in router_logits:
        probabilities = logits.flatten(0, -2).float().softmax(-1)
        experts = probabilities.shape[-1]
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(experts_per_token).indices, 1.0)
        empty = torch.zeros(count + 1, experts, device=document.device)
        of_choices, of_probabilities = (empty.index_add(0, place, each) / tokens for each in (chosen, probabilities))
        total = total + experts * (of_choices * of_probabilities)[:count].sum()
    return total / len(router_logits)
