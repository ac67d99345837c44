"""The language-model head and its loss in chunks of targets, so that the logits are never whole in memory.

For every chunk of targets the logits are made, turned into the loss and into their own gradient, and dropped. Nothing of size
(targets, vocabulary) outlives its chunk, in the forward pass or the backward pass.

Source: the gradient of cross entropy, softmax(logits) - onehot(target), needs nothing but the chunk itself, so that it can be
taken while the logits exist (Hsu et al. 2024, "Liger Kernel", section 3.2: fused linear cross entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Logits held at once, by the type of the device: in fp32 128 and 512 MiB. Fewer make the matrix products small, more cost
memory. On a GPU they must be larger: each chunk reads and writes the whole gradient of the head's weights once."""


def chunk_rows(vocabulary_size: int, device_type: str) -> int:
    """Targets in a chunk, so that a chunk holds about CHUNK_ELEMENTS logits."""
    return max(64, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]) // vocabulary_size)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which may be wider than they are: its sums over many chunks keep what single chunks add."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # no product in bf16, which would be written and read again
    else:
        total += a @ b


def _exp_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponential of values that are not needed any more, as another type."""
    return values.exp_() if values.dtype == dtype else torch.exp(values, out=torch.empty_like(values, dtype=dtype))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods; computes the gradients in the forward pass, scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if want_bias else None
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            log_probs = nn.functional.linear(part, weight, bias).log_softmax(dim=-1, dtype=wide)
            picked = log_probs.gather(-1, target)
            total -= picked.sum()
            if grad_hidden is None and grad_weight is None:
                del log_probs  # or it would lie beside the next chunk's
                continue
            grad_logits = _exp_as(log_probs, hidden.dtype)
            del log_probs
            grad_logits.scatter_(-1, target, picked.expm1().to(hidden.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=wide)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, part)
            del grad_logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes

        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if gradient is None else torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))

        return (
            None if grad_hidden is None else grad_hidden * scale,
            scaled(grad_weight, weight_dtype),
            scaled(grad_bias, bias_dtype),
            None,
            None,
        )


def chunked_nll_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int | None = None) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T + bias)[target] over all targets.

    Args:
        hidden: (num_targets, hidden_size), the states at the positions of the targets.
        weight: (vocabulary_size, hidden_size).
        bias: (vocabulary_size,) or None.
        targets: (num_targets,) int64.
        rows: targets in a chunk; by default as many as `chunk_rows` says.

    Returns:
        A scalar in fp32 (fp64 for fp64 input); 0 when there is no target.
    """
    rows = rows or chunk_rows(weight.shape[0], weight.device.type)
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, rows)
    return total


class _ChunkedLogProbs(torch.autograd.Function):
    """The log-probability of each target; the backward pass makes each chunk's logits a second time.

    Here every target has an incoming gradient of its own, which is known in the backward pass only. Beside it the entropy at
    each target, without a gradient, where it is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(len(targets), dtype=wide, device=hidden.device)
        entropies = torch.empty(len(targets) if entropy else 0, dtype=wide, device=hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            log_probs = nn.functional.linear(hidden[part], weight, bias).log_softmax(dim=-1, dtype=wide)
            result[part] = log_probs.gather(-1, targets[part, None])[:, 0]
            if entropy:
                entropies[part] = -log_probs.exp().mul_(log_probs).sum(dim=-1)
            del log_probs
        ctx.save_for_backward(hidden, weight, bias, targets, result)
        ctx.rows = rows
        ctx.mark_non_differentiable(entropies)
        return result, entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scales = grad_outputs[0]
        hidden, weight, bias, targets, result = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        wide = result.dtype
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if want_bias else None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            probs = nn.functional.linear(hidden[part], weight, bias).softmax(dim=-1, dtype=wide)
            probs.scatter_(-1, targets[part, None], result[part, None].expm1())
            grad_logits = torch.mul(probs, -scales[part, None], out=torch.empty_like(probs, dtype=hidden.dtype))
            del probs
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=wide)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[part])
            del grad_logits
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def chunked_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int | None = None, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log softmax(hidden @ weight.T + bias)[target] of each target, and with `entropy` the entropy of that distribution.

    The other arguments are those of `chunked_nll_sum`.

    Returns:
        (num_targets,) in fp32 (fp64 for fp64 input), with a gradient; and the entropies in nats, without one: (num_targets,),
        or (0,) where they are not asked for.
    """
    found: tuple[Tensor, Tensor] = _ChunkedLogProbs.apply(
        hidden, weight, bias, targets, rows or chunk_rows(weight.shape[0], weight.device.type), entropy
    )
    return found


def plain_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities from logits (num_targets, vocabulary_size) that are whole in memory."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def plain_entropies(logits: Tensor) -> Tensor:
    """Entropies (num_targets,) from logits (num_targets, vocabulary_size) that are whole in memory."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def plain_nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from logits (num_targets, vocabulary_size) that are whole in memory."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
