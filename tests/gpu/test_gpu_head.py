"""On a GPU: the chunked head's gradients are as near to the true ones as those from whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_trainer.objectives.chunked_head import chunked_log_probs, chunked_nll_sum, plain_log_probs, plain_nll_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("each", [False, True], ids=["sum", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients(each, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 128, device="cuda"), torch.randn(512, 128, device="cuda") / 4
    inputs = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    targets = torch.randint(0, 512, (700,), device="cuda")
    truth = -nn.functional.linear(*exact).log_softmax(-1).gather(-1, targets[:, None]).sum()
    if each:
        ours = -chunked_log_probs(*inputs, None, targets, 256)[0].sum()
        plain = -plain_log_probs(nn.functional.linear(*inputs), targets).sum()
    else:
        ours = chunked_nll_sum(*inputs, None, targets, 256)
        plain = plain_nll_sum(nn.functional.linear(*inputs), targets)
    assert abs(ours - truth) <= 1.5 * abs(plain - truth) + 1e-6 * truth
    true = torch.autograd.grad(truth, exact)
    for our, their, right in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), true, strict=True):
        assert our.dtype == dtype
        assert (our - right).norm() <= 1.5 * (their - right).norm() + 1e-6 * right.norm()
