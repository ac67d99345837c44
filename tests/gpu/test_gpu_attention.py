"""On a GPU: packed documents are computed as if each were alone, with every attention implementation there is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from packed import PACKED, logits_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("implementation", ["documents", "sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_packed_documents_have_the_logits_and_gradients_they_have_alone(implementation):
    if implementation == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is not installed")
    packed = logits_and_gradients([PACKED], implementation, "cuda")
    alone = logits_and_gradients([[document] for document in PACKED], implementation, "cuda")
    tolerance = 2e-2 if implementation.startswith("flash") else 1e-4
    for found, expected in zip(packed, alone, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
