"""Adapters: train small matrices beside a frozen base."""

from __future__ import annotations

from typing import Any

import torch

from ds_trainer.arguments.schema import LoraSection
from ds_trainer.errors import ModelError


def add_lora(model: Any, lora: LoraSection, seed: int, *, value_head: bool = False) -> Any:
    """Freeze the model and put LoRA matrices beside its linear layers.

    Args:
        model: a transformers model; under ZeRO-3 already sharded.
        lora: rank, scale and targets.
        seed: the matrices are drawn from it, alike on every rank.
        value_head: the model has one, which is trained whole and kept with the adapter.

    Returns:
        The peft model.

    Raises:
        ModelError: a target matches no layer.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = lora.target_modules
    if isinstance(targets, list):
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        unmatched = [each for each in targets if not any(name == each or name.endswith(f".{each}") for name in names)]
        if unmatched:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ModelError(
                f"adapter.lora.target_modules: {', '.join(unmatched)} matches no linear layer of this model. "
                f"It has {', '.join(known)}; or write all-linear."
            )
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS if value_head else TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=targets,
        ),
        # The engine holds one type for all weights and fp32 masters beside them.
        autocast_adapter_dtype=False,
    )


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
