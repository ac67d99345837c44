"""NEFTune: noise on the embeddings while training, so that answers are learnt less by heart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def add_noise(model: Any, alpha: float) -> None:
    """Let the embeddings of a model be noisy in training mode: uniform in +-alpha / sqrt(L d) for each of their components.

    L is the number of tokens of the document that a position belongs to, d the size of an embedding; so a document in a packed
    row is as noisy as alone. Evaluation is left alone. The noise comes from the device's generator, like dropout.
    Source: Jain et al. 2023, "NEFTune: noisy embeddings improve instruction finetuning", algorithm 1.

    Args:
        model: a transformers model without adapters around it, which is handed `position_ids`.
        alpha: scale of the noise; the paper uses 5 to 15.
    """
    lengths: list[Tensor] = []

    def measure(body: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        lengths[:] = [document_lengths(inputs["position_ids"])] if body.training else []

    def disturb(embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not embedding.training:
            return output
        bound = alpha / (lengths[0] * output.shape[-1]).sqrt()
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * bound[..., None]).to(output.dtype)

    model.base_model.register_forward_pre_hook(measure, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(disturb)


def document_lengths(position_ids: Tensor) -> Tensor:
    """How long the document of each position is, without waiting for the device.

    Args:
        position_ids: (rows, positions); restart at 0 with each document, and each row begins with one.

    Returns:
        (rows, positions), float32.
    """
    document = (position_ids.flatten() == 0).cumsum(0) - 1
    ones = torch.ones_like(document, dtype=torch.float32)
    return torch.zeros_like(ones).scatter_add_(0, document, ones)[document].reshape(position_ids.shape)
