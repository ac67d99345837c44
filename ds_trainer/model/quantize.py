"""A frozen base whose linear layers are held in 4 bits (QLoRA), so that an adapter can be trained beside a large model.

Source: Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs": NF4 in blocks of 64 weights, whose scales are
quantized once more in blocks of 256. bitsandbytes packs and unpacks them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ds_trainer.arguments.constraints import DTYPES
from ds_trainer.errors import ModelError

SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of each weight, beside its 4 bits: a scale of one byte for a block, and one of fp32 for a block of these."""


def require_library() -> None:
    """Refuse to begin where bitsandbytes is not installed.

    Raises:
        ModelError: it is not, with the command that installs it.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            "model.quantize needs bitsandbytes, which is not installed. Run: pip install 'ds-trainer[qlora]' "
            "(or pip install bitsandbytes)."
        ) from None


def how_to_hold(precision: str) -> Any:
    """What transformers is told, for weights that compute in a precision.

    The packed bytes are kept in tensors of that type too: DeepSpeed holds all weights in one (0.19.8, runtime/engine.py).
    """
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, DTYPES[precision])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def multiply_here(model: Any) -> None:
    """Have the layers that are held in 4 bits, or marked, multiply by `_Product` instead of by bitsandbytes' own function.

    That one (0.50, autograd/_functions.py, MatMul4Bit) keeps a weight that ZeRO-3 has gathered until the backward pass, with
    activations recomputed or not, so that at its end every rank holds the whole base. And on a CPU that multiplies bf16,
    its layer packs the weights anew when it first computes in evaluation mode (nn/modules.py, Linear4bit.forward): from then
    on it gives no gradient to its input, and what ZeRO-3 gathers is still the old packing.

    Raises:
        ModelError: the model keeps its matrices in another way than in linear layers.
    """
    layers = [module for module in model.modules() if is_held_in_4_bits(getattr(module, "weight", None))]
    if not layers or any(getattr(layer, "source_cls", nn.Linear) is not nn.Linear for layer in layers):
        raise ModelError(
            f"model.quantize: the layers of a {model.config.model_type} model are no torch.nn.Linear, whose weights are what "
            "is held in 4 bits. Remove model.quantize."
        )
    for layer in layers:
        layer.forward = partial(_multiply, layer)


def _multiply(layer: Any, states: Tensor) -> Tensor:
    product: Tensor = _Product.apply(states, layer.weight, layer.bias)
    return product


class _Product(torch.autograd.Function):
    """x W' + b with a frozen W that is unpacked for the moment, forward and backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # itself, and not what it holds: ZeRO-3 releases that and gathers it again
        return functional.linear(states, unpacked(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ unpacked(weight), None, None


def unpacked(weight: Any) -> Tensor:
    """The values (out, in) of a weight that is held in 4 bits, in the type it was packed from."""
    if weight.is_meta:  # marked, and of full shape: only the room it takes counts
        return torch.empty_like(weight)
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values


def is_held_in_4_bits(weight: Any) -> bool:
    """Whether a parameter holds packed weights, sharded or not; or would, in a plain model that is marked."""
    return getattr(weight, "quant_state", None) is not None or hasattr(weight, "held_numel")


def numel(parameter: Any) -> int:
    """How many weights a parameter stands for, sharded or packed."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@torch.no_grad()
def round_to_4_bits(model: Any, precision: str) -> float:
    """Give the marked weights of a model in fp32 the values that a run computed with which held them in 4 bits.

    Args:
        model: whole and on one device.
        precision: the run's, in which each weight was read before it was packed.

    Returns:
        How far the weights were from these values, as a share of their size (root mean square of all).
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    off = size = 0.0
    for weight in model.parameters():
        if is_held_in_4_bits(weight):
            read = weight.to(getattr(torch, DTYPES[precision]))
            values = dequantize_4bit(*quantize_4bit(read, quant_type="nf4", compress_statistics=True)).float()
            off += float((values - weight).double().square().sum())
            size += float(weight.double().square().sum())
            weight.copy_(values)
    return math.sqrt(off / size)


def elements(packed: int, width: int) -> int:
    """How many elements of so many bytes hold so many weights in 4 bits."""
    return math.ceil(packed / (2 * width))


def mark(model: Any) -> None:
    """Say of the weights of a plain model which of them a run holds in 4 bits, and in how many elements: `held_numel`.

    They are those that transformers would pack: of linear layers, but not of the head. Before any adapter.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    others = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, others):
            weight: Any = module.weight
            weight.held_numel = elements(weight.numel(), weight.element_size())


def held_numel(parameter: Tensor) -> int:
    """How many elements a weight of a plain model takes in a run."""
    return int(getattr(parameter, "held_numel", parameter.numel()))
