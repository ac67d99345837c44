"""The stack of decoder layers: where it is, and which activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ds_trainer.arguments.schema import Recompute
from ds_trainer.errors import ModelError


def decoder_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Where the decoder layers of a transformers model are: their owner, its name for them, and the list."""
    count = model.config.get_text_config().num_hidden_layers
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name, child
    return None


def recompute_activations(model: Any, policy: Recompute, *, offload: bool) -> None:
    """Have the backward pass compute activations again instead of keeping them. The gradients are the same, bit for bit.

    Args:
        model: a transformers model.
        policy: `model.gradient_checkpointing`.
        offload: keep the inputs of layers that are computed again in host memory.

    Raises:
        ModelError: the policy needs a list of layers that can be told apart, and the model has none.
    """
    # Re-entrant checkpointing needs an input that requires gradients, which a frozen base does not have.
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if offload:
        run = partial(_inputs_on_host, options)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = run
    if policy is True or policy == "selective":
        return
    found = decoder_layers(model)
    if found is None or not all(hasattr(layer, "gradient_checkpointing") for layer in found[2]):
        raise ModelError(
            f"model.gradient_checkpointing = {policy}: the layers of {type(model).__name__} cannot be told apart. "
            "Write `true`, which computes all of them again."
        )
    if policy > len(found[2]):
        raise ModelError(
            f"model.gradient_checkpointing = {policy} computes every {policy}th layer again, and {type(model).__name__} has "
            f"{len(found[2])} layers. Write a number from 2 to {len(found[2])}, or `true` for all of them."
        )
    for index, layer in enumerate(found[2]):
        layer.gradient_checkpointing = index % policy == 0  # type: ignore[assignment]


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear: the results of linear layers and of attention kernels. Norms, rotations and activations are cheap.

    Scores of an attention that holds them (a batched product, `bmm`) are dear to keep, and computed again.
    """
    name = operation.name()
    dear = name in ("aten::mm", "aten::addmm") or "attention" in name or name == "torch_attn::_varlen_attn"
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _inputs_on_host(options: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    # What a checkpoint keeps are its inputs, and it keeps them as saved tensors (torch 2.13, utils/checkpoint.py,
    # _NoopSaveInputs), so that this hook reaches them and nothing else.
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return checkpoint(function, *args, **options)
