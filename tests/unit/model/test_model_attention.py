"""What isolates packed documents, what is chosen, and that the probe notices when it fails."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packed import PACKED, logits_and_gradients
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.errors import ModelError
from ds_trainer.model import attention
from ds_trainer.objectives import language_model
from ds_trainer.protocols import IGNORED, MicroBatch


def llama(implementation: str, **fields):
    attention.register_document_attention()
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **fields
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    language_model.attach(model, chunked=True)
    return model


@pytest.mark.parametrize("implementation", ["documents", "sdpa", "eager"])
def test_the_probe_accepts_what_isolates(implementation):
    states = partial(language_model.last_states, llama(implementation))
    attention.probe_isolation(states, implementation, 64, torch.device("cpu"))


@pytest.mark.parametrize("implementation", ["documents", "sdpa", "eager"])
def test_packed_documents_have_the_logits_and_gradients_they_have_alone(implementation):
    packed = logits_and_gradients([PACKED], implementation)
    alone = logits_and_gradients([[document] for document in PACKED], implementation)
    plain = logits_and_gradients([[document] for document in PACKED], "eager")
    for found, expected, reference in zip(packed, alone, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


def test_flex_attention_is_refused_on_the_cpu_where_it_has_no_gradients():
    with pytest.raises(ModelError, match=r"computes no gradients on the CPU\. Write `auto`"):
        attention.choose_attention("flex_attention", AutoConfig.for_model("llama"), "cpu", "fp32")
    assert attention.choose_attention("flex_attention", AutoConfig.for_model("llama"), "cuda", "bf16") == "flex_attention"


def test_the_probe_refuses_a_model_whose_documents_see_one_another():
    model = llama("sdpa")

    def leaking(batch):
        # An all-ones mask is what the default collators pass; transformers then no longer looks for documents.
        inputs = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["input_ids"])}
        with torch.no_grad():
            return model(**inputs, states_only=True)

    with pytest.raises(ModelError, match="lets packed documents of this model see one another"):
        attention.probe_isolation(leaking, "sdpa", 64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "kind", "fields", "expected"),
    [
        ("auto", "llama", {}, "documents"),
        ("eager", "llama", {}, "eager"),
        ("auto", "mistral", {"sliding_window": 128}, "sdpa"),
        ("auto", "mistral", {"sliding_window": None}, "documents"),
        ("auto", "gemma2", {}, "eager"),
    ],
)
def test_choice(asked, kind, fields, expected):
    config = AutoConfig.for_model(kind, **fields)
    assert attention.choose_attention(asked, config, "cpu", "fp32") == expected


def test_document_attention_refuses_what_it_does_not_compute():
    tensor = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match="sliding_window"):
        attention._document_attention(torch.nn.Linear(1, 1), tensor, tensor, tensor, None, sliding_window=4)


def test_padding_is_not_fed_to_document_attention():
    rows = MicroBatch(
        input_ids=torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]),
        labels=torch.tensor([[2, 3, IGNORED, IGNORED], [5, IGNORED, IGNORED, IGNORED]]),
        position_ids=torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]),
        is_token=torch.tensor([[True, True, True, False], [True, True, False, False]]),
    )
    batch = attention.arrange(rows, "documents")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch.inputs["document_lengths"] == (3, 2)
    assert batch.targets.tolist() == [2, 3, 5]
    assert batch.target_positions.tolist() == [0, 1, 3]
    kept = attention.arrange(rows, "sdpa")
    assert kept.inputs["input_ids"].shape == (2, 4)
    assert kept.target_positions.tolist() == [0, 1, 4]


def test_flash_attention_is_told_where_documents_start():
    rows = MicroBatch(
        input_ids=torch.tensor([[1, 2, 3, 4]]),
        labels=torch.full((1, 4), IGNORED),
        position_ids=torch.tensor([[0, 1, 0, 1]]),
        is_token=torch.ones(1, 4, dtype=torch.bool),
    )
    inputs = attention.arrange(rows, "flash_attention_2").inputs
    assert inputs["cu_seq_lens_q"].tolist() == [0, 2, 4]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_k"] == 2


def test_a_row_without_tokens_still_makes_a_batch():
    rows = MicroBatch(
        input_ids=torch.zeros(1, 4, dtype=torch.int64),
        labels=torch.full((1, 4), IGNORED),
        position_ids=torch.arange(4)[None],
        is_token=torch.zeros(1, 4, dtype=torch.bool),
    )
    batch = attention.arrange(rows, "documents")
    assert batch.num_targets == 0
    model = llama("documents")
    loss = language_model.nll_sum(model, batch)
    loss.backward()
    assert loss.item() == 0
