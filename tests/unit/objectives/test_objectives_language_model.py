"""The objective attached to real models: the loss is transformers' own, per document, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.errors import ModelError
from ds_trainer.model import attention
from ds_trainer.objectives import language_model
from ds_trainer.protocols import IGNORED, MicroBatch

SHAPES = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
    },
}


def build(kind: str, implementation: str):
    attention.register_document_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, **SHAPES[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23, 24, 25], [30, 31]]


def packed() -> MicroBatch:
    """Two rows of 12 positions, two documents in each."""
    rows = []
    for pair in (DOCUMENTS[:2], DOCUMENTS[2:]):
        ids, labels, positions = [], [], []
        for document in pair:
            ids += document
            labels += [*document[1:], IGNORED]
            positions += range(len(document))
        tail = 12 - len(ids)
        rows.append(
            (ids + [0] * tail, labels + [IGNORED] * tail, positions + list(range(tail)), [True] * len(ids) + [False] * tail)
        )
    ids, labels, positions, kept = (torch.tensor(part) for part in zip(*rows, strict=True))
    return MicroBatch(input_ids=ids, labels=labels, position_ids=positions, is_token=kept)


def one_by_one(kind: str, implementation: str) -> float:
    model = build(kind, implementation)
    total = 0.0
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return total


@pytest.mark.parametrize(
    ("kind", "implementation", "chunked"),
    [
        ("llama", "documents", True),
        ("llama", "documents", False),
        ("llama", "sdpa", True),
        ("llama", "eager", True),
        ("qwen3", "documents", True),
        ("gpt2", "documents", True),
        ("gpt2", "sdpa", False),
        ("gemma2", "eager", False),
    ],
)
def test_packed_loss_equals_that_of_each_document_alone(kind, implementation, chunked):
    expected = one_by_one(kind, "sdpa" if implementation == "documents" else implementation)
    model = build(kind, implementation)
    language_model.attach(model, chunked=chunked)
    batch = attention.arrange(packed(), implementation)
    assert batch.num_targets == sum(len(document) - 1 for document in DOCUMENTS)
    loss = language_model.nll_sum(model, batch)
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_chunked_loss_is_refused_for_a_head_that_caps_its_logits():
    with pytest.raises(ModelError, match=r"final_logit_softcapping.*model.chunked_loss: false"):
        language_model.attach(build("gemma2", "eager"), chunked=True)


def test_an_attached_model_still_computes_logits_for_others():
    model = build("llama", "sdpa")
    ids = torch.tensor([DOCUMENTS[0]])
    before = model(input_ids=ids).logits
    language_model.attach(model, chunked=True)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 7)
