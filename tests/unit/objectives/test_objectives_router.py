"""The balance of experts is that of its formula, document by document, whatever else is in the row."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.errors import ModelError
from ds_trainer.model import attention
from ds_trainer.objectives import language_model
from ds_trainer.objectives.router import balance_sum
from ds_trainer.protocols import IGNORED, MicroBatch

LENGTHS = (5, 9, 3)
MOE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}


def by_the_formula(logits, lengths, chosen):
    total = 0.0
    for layer in logits:
        for part in layer.double().split(lengths):
            probabilities = part.softmax(-1)
            counts = torch.zeros(part.shape[-1], dtype=torch.float64)
            for row in probabilities:
                for expert in row.topk(chosen).indices:
                    counts[expert] += 1
            total += part.shape[-1] * float((counts / len(part) * probabilities.mean(0)).sum())
    return total / len(logits)


def test_the_sum_is_that_of_the_formula_and_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(20, 6, generator=generator, requires_grad=True) for _ in range(3)]
    positions = torch.cat([torch.arange(each) for each in (*LENGTHS, 3)])[None]  # the last three are padding
    targets = torch.tensor([1, 2, 3, 6, 7, 12, 14, 15])
    found = balance_sum(logits, 2, positions, targets, torch.tensor([3, 3, 2]))
    assert found.item() == pytest.approx(by_the_formula([each[:17] for each in logits], LENGTHS, 2), rel=1e-6)
    found.backward()
    assert all(each.grad[:17].abs().sum() > 0 and each.grad[17:].abs().sum() == 0 for each in logits)


def test_experts_that_are_used_alike_have_the_balance_of_their_number():
    logits = torch.eye(4).repeat(2, 1) * 50
    found = balance_sum([logits], 1, torch.arange(8)[None], torch.tensor([0]), torch.tensor([1]))
    assert found.item() == pytest.approx(1.0)


class Engine:
    """What an objective knows of DeepSpeed's."""

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)


def batch_of(documents):
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([each[1:], torch.tensor([IGNORED])]) for each in documents])[None]
    positions = torch.cat([torch.arange(len(each)) for each in documents])[None]
    return attention.arrange(MicroBatch(ids, labels, positions, torch.ones_like(ids, dtype=torch.bool)), "documents")


def test_a_packed_row_is_worth_its_documents_alone():
    attention.register_document_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MOE), attn_implementation="documents")
    assert language_model.attach(model, chunked=True, router=True)
    engine = Engine(model)
    documents = [torch.randint(0, 64, (each,)) for each in LENGTHS]
    objective = language_model.balanced(0.5)

    def terms(batch):
        sums = objective.sums(engine, batch)
        if model.training:
            assert sums.terms[1].item() == pytest.approx(0.5 * sums.metrics["router_balance"][0].item())
        return sums.terms, torch.tensor(objective.units(batch))

    packed, units = terms(batch_of(documents))
    alone = [terms(batch_of([each])) for each in documents]
    assert torch.allclose(packed, sum(each for each, _ in alone), rtol=1e-5)
    assert units.tolist() == sum(each for _, each in alone).tolist() == [14, 3]
    packed.sum().backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    model.eval()
    held_out, _ = terms(batch_of(documents))
    assert held_out[1] == 0
    assert held_out[0].item() == pytest.approx(packed[0].item())


def test_a_model_without_routers_is_refused():
    small = {name: MOE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small, num_hidden_layers=1))
    with pytest.raises(ModelError, match="LlamaForCausalLM is no mixture of experts"):
        language_model.attach(model, chunked=True, router=True)
