"""The decoder layers of a model: where they are, and which of them ZeRO-3 may gather whole."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_trainer.arguments.schema import AdapterSection, Recompute
from ds_trainer.errors import ModelError
from ds_trainer.model import load, quantize
from ds_trainer.model.adapter import add_adapter, base_of
from ds_trainer.model.stack import decoder_layers
from ds_trainer.model.tokenizer import first_line

LARGEST_WHOLE_LAYER = 2**26
"""Parameters of a decoder layer that is gathered whole, at most: 128 MiB in bf16, a little more than a layer of a 1B Llama.

Gathering whole saves the host about 0.3 ms a weight and micro-step, which counts while the device is done sooner than the host.
A larger layer keeps a GPU busy for longer than that, and would only take its memory at once instead of matrix by matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeLayers:
    """Which decoder layers may be gathered with all they contain at once."""

    indices: tuple[int, ...]
    """Positions in the model's list of layers."""
    numel: int
    """Parameters of the largest of them, packed ones as they are held; 0 when there is none."""
    why: str
    """Why the others may not, for the log; empty when there are none."""


def meta_model(
    config: Any,
    *,
    precision: str,
    attention: str,
    trust_remote_code: bool,
    gradient_checkpointing: Recompute,
    adapter: AdapterSection | None,
    value_head: bool = False,
    quantized: bool = False,
) -> Any:
    """The model as a run builds it, on the meta device: its real code and shapes, without memory for its weights.

    Weights that the run holds in 4 bits have their full shape here, and `quantize.held_numel` tells what they take.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = load.build_model(
            copy.deepcopy(config),  # building changes it
            precision=precision,
            attention=attention,
            trust_remote_code=trust_remote_code,
            value_head=value_head,
        )
        load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=gradient_checkpointing, seed=0)
        if quantized:
            quantize.mark(model)
            quantize.multiply_here(model)
        return add_adapter(model, adapter, 0, value_head=value_head) if adapter else model


def expert_blocks(model: Any, *, sharded: bool, ranks: int, all_trained: bool) -> list[nn.Module]:
    """The mixtures of experts that ZeRO-3 has to gather whole: those whose experts are modules of their own.

    Which of these a rank calls depends on its tokens. Under ZeRO-3 all ranks gather the same weights in the same order, or wait
    for one another for ever; below it, DeepSpeed 0.19.8 adds gradients up in the order in which they come (runtime/zero/
    stage_1_and_2.py, `reduce_ipg_grads`), and would add those of one expert to those of another. A block that is gathered whole
    has neither trouble. (transformers 5 keeps the experts of its own models in one weight, which every rank uses.)

    Args:
        model: a transformers model without adapters around it, but with what is trained decided.
        sharded: under ZeRO-3.
        ranks: all of them.
        all_trained: whether there is no adapter. A block's gradients are taken together once that of its input is there, and
            only then is it sure to have one.

    Raises:
        ModelError: there are such blocks, and this run would hang or add up the wrong gradients.
    """
    found: dict[str, nn.Module] = {}
    for path, child in model.named_modules():
        block, _, name = path.rpartition(".")
        if "expert" in name and isinstance(child, nn.ModuleList) and len(child) > 1:
            found[block] = model.get_submodule(block)
    if not found:
        return []
    if sharded and all_trained:
        return list(found.values())
    first = f"{next(iter(found))} keeps its experts as modules of their own, and each rank's tokens choose others of them"
    if sharded:
        raise ModelError(
            f"{first}: under ZeRO-3 ranks would wait for one another. Such blocks are gathered whole where all weights are "
            "trained, and here a part is. Use --deepspeed ds_configs/zero2.json, or adapter=null."
        )
    if ranks > 1 and any(each.requires_grad for block in found.values() for each in block.parameters()):
        raise ModelError(
            f"{first}: below ZeRO-3 the gradients of one expert would be added to those of another. Use --deepspeed "
            "ds_configs/zero3.json where all weights are trained, or leave the experts out of adapter.lora.target_modules."
        )
    return []


def whole_layers(model: Any) -> WholeLayers:
    """Find the decoder layers whose gradients DeepSpeed may take all together when the layer's backward pass has ended.

    It takes them in a backward hook of the layer (deepspeed/runtime/zero/stage3.py, `reduce_leaf_module_grads`). torch calls
    such a hook when the gradients of the layer's positional inputs are there; without one that requires a gradient, as in the
    first trained layer above frozen embeddings, it calls it before the layer's own gradients exist, and DeepSpeed would
    reduce zeros. So a forward and backward pass of the model's real code is watched: a layer may be gathered whole if it is
    called once, is handed a positional tensor that requires a gradient, gives a gradient to each of its trained weights, and
    shares none with another module.

    Args:
        model: as `meta_model` builds it.
    """
    found = decoder_layers(base_of(model))
    if found is None:
        return WholeLayers(indices=(), numel=0, why="no list of decoder layers was found in the model")
    layers = list(found[2])
    calls: dict[int, list[bool]] = {index: [] for index in range(len(layers))}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, index=index: calls[index].append(  # type: ignore[misc]
                any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
            )
        )
        for index, layer in enumerate(layers)
    ]
    dtype = next(model.parameters()).dtype
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        # A mask of four dimensions is taken as it is; without one, transformers looks at the values of the positions.
        mask = torch.zeros(1, 1, 1, 1, dtype=dtype, device="meta")
        output = model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
        output.logits.sum().backward()
    except Exception as error:  # whatever the model's own code raises, as when it decides by the values of its tensors
        return WholeLayers(indices=(), numel=0, why=f"the model cannot be traced without its weights ({first_line(error)})")
    finally:
        for hook in hooks:
            hook.remove()
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for each in module.parameters(recurse=False):
            owners.setdefault(id(each), set()).add(id(module))
    fit: list[int] = []
    reasons: dict[str, int] = {}
    for index, layer in enumerate(layers):
        weights = list(layer.parameters())
        trained = [each for each in weights if each.requires_grad]
        reason = None
        if sum(each.numel() for each in weights) > LARGEST_WHOLE_LAYER:
            reason = f"has more than {LARGEST_WHOLE_LAYER:,} parameters, which keep the device busy for longer than the host"
        elif any(len(owners[id(each)]) > 1 for each in weights):
            reason = "shares weights with another module"
        elif len(calls[index]) != 1:
            reason = f"is called {len(calls[index])} times in a forward pass"
        elif trained and not calls[index][0]:
            reason = "is the first that is trained, so that its input has no gradient"
        elif any(each.grad is None for each in trained):
            reason = "has weights that a step may not use"
        if reason is None:
            fit.append(index)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    model.zero_grad(set_to_none=True)
    return WholeLayers(
        indices=tuple(fit),
        numel=max((sum(map(quantize.held_numel, layers[index].parameters())) for index in fit), default=0),
        why="; ".join(
            f"{'each' if count == len(layers) else 'one' if count == 1 else count} {reason}"
            for reason, count in reasons.items()
        ),
    )
