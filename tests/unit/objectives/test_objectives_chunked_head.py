"""The chunked head is the plain head: same loss, same gradients, without the logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from ds_trainer.objectives.chunked_head import chunk_rows, chunked_nll_sum, plain_nll_sum


def case(dtype: torch.dtype, targets: int = 50, bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(targets, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(40, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, 40, (targets,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_equal_the_plain_ones_in_float64(rows, bias):
    hidden, weight, offset, targets = case(torch.float64, bias=bias)
    parameters = [each for each in (hidden, weight, offset) if each is not None]
    chunked = chunked_nll_sum(hidden, weight, offset, targets, rows)
    ours = torch.autograd.grad(chunked * 0.37, parameters)
    logits = nn.functional.linear(hidden, weight, offset)
    plain = nn.functional.cross_entropy(logits, targets, reduction="sum")
    theirs = torch.autograd.grad(plain * 0.37, parameters)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-12)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_near_to_the_true_ones_as_the_plain_ones_are(dtype):
    hidden, weight, offset, targets = case(dtype, targets=400)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight, offset)]
    truth = torch.autograd.grad(nn.functional.cross_entropy(nn.functional.linear(*exact), targets, reduction="sum"), exact)
    ours = torch.autograd.grad(chunked_nll_sum(hidden, weight, offset, targets, 16), (hidden, weight, offset))
    plain = plain_nll_sum(nn.functional.linear(hidden, weight, offset), targets)
    theirs = torch.autograd.grad(plain, (hidden, weight, offset))
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == dtype
        assert (our - true).norm() <= 1.5 * (their - true).norm() + 1e-6 * true.norm()


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, _, targets = case(torch.float32)
    weight = weight.detach()
    (gradient,) = torch.autograd.grad(chunked_nll_sum(hidden, weight, None, targets, 8), hidden)
    assert gradient.shape == hidden.shape
    assert gradient.abs().sum() > 0


def test_no_targets_give_zero_with_zero_gradients():
    hidden, weight, offset, targets = case(torch.float32, targets=0)
    loss = chunked_nll_sum(hidden, weight, offset, targets)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().sum() == 0


def test_chunks_hold_about_the_same_number_of_logits():
    assert chunk_rows(128_000, "cpu") * 128_000 <= 1 << 25
    assert 1 << 26 < chunk_rows(128_000, "cuda") * 128_000 <= 1 << 27
    assert chunk_rows(1 << 30, "cuda") == 64


PEAK = """
import re, sys, torch
from torch import nn
from ds_trainer.objectives.chunked_head import chunked_nll_sum, plain_nll_sum
def peak():  # ru_maxrss would begin with the resident memory of whoever started this process
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
hidden = torch.randn(4096, 64, requires_grad=True)
weight = torch.randn(32768, 64, requires_grad=True)
targets = torch.randint(0, 32768, (4096,))
before = peak()
if sys.argv[1] == "chunked":
    loss = chunked_nll_sum(hidden, weight, None, targets)
else:
    loss = plain_nll_sum(nn.functional.linear(hidden, weight), targets)
loss.backward()
print((peak() - before) / 1024)
"""


def test_memory_is_a_fraction_of_the_logits():
    """4096 targets x 32768 tokens in fp32 are 512 MiB; the plain loss holds them, their softmax and their gradient."""

    def peak_mib(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout)

    chunked, plain = peak_mib("chunked"), peak_mib("plain")
    assert plain > 900
    assert chunked < plain / 2.5
