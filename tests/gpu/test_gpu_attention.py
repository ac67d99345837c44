"""On a GPU: packed documents are computed as if each were alone, with every attention implementation there is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from packed import PACKED, logits_and_gradients

from ds_trainer.model import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("documents", torch.float32),
        ("documents", torch.bfloat16),
        ("sdpa", torch.float32),
        ("eager", torch.float32),
        ("flex_attention", torch.float32),
        ("flash_attention_2", torch.bfloat16),
    ],
)
def test_packed_documents_have_the_logits_and_gradients_they_have_alone(implementation, dtype):
    if implementation == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is not installed")
    packed = logits_and_gradients([PACKED], implementation, "cuda", dtype)
    alone = logits_and_gradients([[document] for document in PACKED], implementation, "cuda", dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for found, expected in zip(packed, alone, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_the_documents_of_a_row_are_one_call(monkeypatch):
    calls = []
    real = attention._varlen(torch.device("cuda", 0))
    if real is None:
        pytest.skip("this torch or this GPU has no attention for packed documents")
    monkeypatch.setattr(attention, "_varlen", lambda _: lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    one = logits_and_gradients([PACKED], "documents", "cuda", torch.bfloat16)
    assert len(calls) == 2  # layers
    monkeypatch.setattr(attention, "_varlen", lambda _: None)
    each = logits_and_gradients([PACKED], "documents", "cuda", torch.bfloat16)
    assert len(calls) == 2
    exact = logits_and_gradients([PACKED], "documents", "cuda")
    for ours, theirs, reference in zip(one, each, exact, strict=True):
        assert (ours - reference).norm() <= 1.2 * (theirs - reference).norm()
