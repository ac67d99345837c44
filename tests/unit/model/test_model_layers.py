"""Which decoder layers ZeRO-3 may gather whole: found by watching the model's real code."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from ds_trainer.arguments.schema import AdapterSection, LoraSection
from ds_trainer.model import layers
from ds_trainer.model.layers import meta_model, whole_layers
from ds_trainer.model.stack import decoder_layers

FIELDS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
ONE_LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32


def traced(kind="llama", adapter=None, **fields):
    config = AutoConfig.for_model(kind, **{**FIELDS, "num_hidden_layers": 3, **fields})
    return meta_model(
        config, precision="fp32", attention="eager", trust_remote_code=False, gradient_checkpointing=False, adapter=adapter
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "gpt_neox", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_of_a_dense_model_are_gathered_whole(kind, tied):
    fields = {"head_dim": 8} if kind in ("qwen3", "gemma3_text") else {}
    found = whole_layers(traced(kind, tie_word_embeddings=tied, pad_token_id=0, **fields))
    assert (found.indices, found.why) == ((0, 1, 2), "")
    if kind == "llama":
        assert found.numel == ONE_LAYER


def test_the_first_trained_layer_above_frozen_embeddings_is_not():
    found = whole_layers(traced(adapter=AdapterSection(lora=LoraSection(rank=4))))
    assert found.indices == (1, 2)
    assert found.why == "one is the first that is trained, so that its input has no gradient"
    found = whole_layers(traced(adapter=AdapterSection(lora=LoraSection(rank=4, target_modules=["layers.1.self_attn.q_proj"]))))
    assert found.indices == (0, 2)


def test_a_layer_that_is_too_large_is_not(monkeypatch):
    monkeypatch.setattr(layers, "LARGEST_WHOLE_LAYER", ONE_LAYER - 1)
    found = whole_layers(traced())
    assert (found.indices, found.numel) == ((), 0)
    assert found.why.startswith(f"each has more than {ONE_LAYER - 1:,} parameters")


def spoiled(how):
    """A model with one layer whose gradients DeepSpeed's hook would get wrong."""
    model = traced()
    stack = decoder_layers(model)[2]
    if how == "unused weight":
        stack[1].spare = nn.Parameter(torch.empty(3, device="meta"))
    elif how == "shared weight":
        stack[1].mlp.up_proj.weight = stack[2].mlp.up_proj.weight
    elif how == "twice":
        model.model.layers[2] = stack[1]
    return model


@pytest.mark.parametrize(
    ("how", "whole", "said"),
    [
        ("unused weight", (0, 2), "one has weights that a step may not use"),
        ("shared weight", (0,), "2 shares weights with another module"),
        ("twice", (0,), "2 is called 2 times in a forward pass"),
    ],
)
def test_a_layer_whose_gradients_would_be_wrong_is_found(how, whole, said):
    found = whole_layers(spoiled(how))
    assert (found.indices, found.why) == (whole, said)
