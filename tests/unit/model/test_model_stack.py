"""Activations that are computed again: the same gradients, and less that is kept."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoConfig

from ds_trainer.arguments.schema import AdapterSection, LoraSection
from ds_trainer.errors import ModelError
from ds_trainer.model import load, stack
from ds_trainer.model.adapter import add_adapter

FIELDS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
POLICIES = [True, 2, 3, "selective"]


def gradients(policy, *, offload=False, lora=None, attention="sdpa"):
    """Gradients of one batch."""
    config = AutoConfig.for_model("llama", **FIELDS, num_hidden_layers=5)
    model = load.build_model(config, precision="fp32", attention=attention)
    load.initialize_weights(model, 0)
    load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=policy, seed=0, offload_activations=offload)
    if lora:
        model = add_adapter(model, AdapterSection(lora=lora), 0)
        torch.manual_seed(1)
        for name, each in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(each)
    ids = torch.arange(40).reshape(2, 20) % 64
    torch.manual_seed(7)
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_the_same_to_the_last_bit(policy, attention):
    expected, found = (gradients(each, attention=attention) for each in (False, policy))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = gradients(policy, offload=True, attention=attention)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_also_above_a_frozen_base_and_with_dropout():
    lora = LoraSection(rank=4, dropout=0.3)
    expected = gradients(False, lora=lora)
    for policy in POLICIES:
        found = gradients(policy, lora=lora)
        assert found.keys() == expected.keys() != set()
        assert all(torch.equal(found[name], expected[name]) for name in expected), policy


def test_only_every_second_layer_is_computed_again():
    model = load.build_model(AutoConfig.for_model("llama", **FIELDS, num_hidden_layers=5), precision="fp32", attention="sdpa")
    load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=2, seed=0)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False, True]
    with pytest.raises(ModelError, match="= 6 computes every 6th layer again, and LlamaForCausalLM has 5 layers"):
        load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=6, seed=0)


def test_layers_that_cannot_be_told_apart_are_refused_in_words(monkeypatch):
    model = load.build_model(AutoConfig.for_model("llama", **FIELDS, num_hidden_layers=5), precision="fp32", attention="sdpa")
    monkeypatch.setattr("ds_trainer.model.stack.decoder_layers", lambda model: None)
    with pytest.raises(ModelError, match=r"cannot be told apart\. Write `true`"):
        load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=2, seed=0)


def test_selective_keeps_the_attention_kernels_of_a_gpu():
    from torch.nn.attention import varlen  # registers its operation

    assert varlen.varlen_attn
    aten = torch.ops.aten
    kept = (
        torch.ops.torch_attn._varlen_attn,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_efficient_attention,
        aten.mm,
    )
    for operation in kept:
        assert stack._keep_products(None, operation.default) == CheckpointPolicy.MUST_SAVE, operation
    assert stack._keep_products(None, aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE
