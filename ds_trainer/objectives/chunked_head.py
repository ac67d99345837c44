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

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 32 Mi numbers, 128 MiB in fp32. Fewer make the matrix products small, more cost memory."""


def chunk_rows(vocabulary_size: int) -> int:
    """Targets in a chunk, so that a chunk holds about CHUNK_ELEMENTS logits."""
    return max(64, CHUNK_ELEMENTS // vocabulary_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods; computes the gradients in the forward pass, scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # Sums over many chunks: in bf16 they would lose what single chunks add.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if want_bias else None
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = nn.functional.linear(part, weight, bias).to(wide)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            total += (normalizer - logits.gather(-1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            logits.sub_(normalizer).exp_()
            logits.scatter_add_(-1, target, torch.full_like(normalizer, -1.0))
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                if part.dtype == wide:
                    grad_weight.addmm_(grad_logits.T, part)
                else:
                    grad_weight += grad_logits.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * scale,
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
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
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, rows or chunk_rows(weight.shape[0]))
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
        normalizers = torch.empty(len(targets), 1, dtype=wide, device=hidden.device)
        result = torch.empty(len(targets), dtype=wide, device=hidden.device)
        entropies = torch.empty(len(targets) if entropy else 0, dtype=wide, device=hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = nn.functional.linear(hidden[part], weight, bias).to(wide)
            normalizers[part] = logits.logsumexp(dim=-1, keepdim=True)
            result[part] = (logits.gather(-1, targets[part, None]) - normalizers[part])[:, 0]
            if entropy:
                mean_logits = (logits - normalizers[part]).exp_().mul_(logits).sum(dim=-1)
                entropies[part] = normalizers[part, 0] - mean_logits
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.rows = rows
        ctx.mark_non_differentiable(entropies)
        return result, entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scales = grad_outputs[0]
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        wide = normalizers.dtype
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if want_bias else None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = nn.functional.linear(hidden[part], weight, bias).to(wide)
            logits.sub_(normalizers[part]).exp_().neg_()
            logits.scatter_add_(-1, targets[part, None], torch.ones_like(normalizers[part]))
            logits.mul_(scales[part, None])
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if hidden.dtype == wide:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
                else:
                    grad_weight += grad_logits.T @ hidden[part]
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
        hidden, weight, bias, targets, rows or chunk_rows(weight.shape[0]), entropy
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
