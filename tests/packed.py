"""Packed documents, and what a small model makes of them: for the tests on the CPU and on a GPU."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.model import attention
from ds_trainer.protocols import IGNORED, MicroBatch

PACKED = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
"""Documents of one row; the same tokens at the same places would hide a leak, so they differ."""


def rows_of(documents, seq_len=18):
    """Documents end to end in one row with a padded tail, every token but the first of each a target."""
    ids = [token for document in documents for token in document]
    labels = [label for document in documents for label in [*document[1:], IGNORED]]
    positions = [place for document in documents for place in range(len(document))]
    pad = seq_len - len(ids)
    return MicroBatch(
        input_ids=torch.tensor([ids + [0] * pad]),
        labels=torch.tensor([labels + [IGNORED] * pad]),
        position_ids=torch.tensor([positions + list(range(pad))]),
        is_token=torch.tensor([[True] * len(ids) + [False] * pad]),
    )


def logits_and_gradients(documents_of_each_row, implementation, device="cpu", dtype=torch.float32):
    """Logits of all targets, end to end, and the gradient of the sum of their losses."""
    torch.manual_seed(0)
    attention.register_document_attention()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=64,  # 16 a head: flex_attention takes no fewer on a GPU
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype).to(device)
    logits, losses = [], []
    for documents in documents_of_each_row:
        batch = attention.arrange(rows_of(documents), implementation).to(torch.device(device))
        found = model(**batch.inputs).logits.flatten(0, 1)[batch.target_positions].float()
        logits.append(found)
        losses.append(torch.nn.functional.cross_entropy(found, batch.targets, reduction="sum"))
    torch.stack(losses).sum().backward()
    return torch.cat(logits), torch.cat([each.grad.flatten().float() for each in model.parameters()])
