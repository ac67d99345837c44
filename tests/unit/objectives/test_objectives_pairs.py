"""The objectives on pairs: losses and gradients against formulas written out in float64, over models of every layout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import TINY_LLAMA

from ds_trainer.model import attention, load
from ds_trainer.objectives import dpo, language_model, orpo, pairs, reference, reward, simpo
from ds_trainer.objectives.chunked_head import chunked_log_probs, plain_entropies, plain_log_probs
from ds_trainer.protocols import IGNORED, MicroBatch, ModelBatch

LENGTHS = torch.tensor([3, 5, 2, 2, 7, 1])


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def written_out(loss: str, chosen: float, rejected: float, sizes: tuple[int, int], beta: float, e: float) -> float:
    difference = chosen - rejected
    if loss == "sigmoid":
        return -(1 - e) * math.log(sigma(beta * difference)) - e * math.log(sigma(-beta * difference))
    if loss == "robust":
        right, wrong = -math.log(sigma(beta * difference)), -math.log(sigma(-beta * difference))
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if loss == "hinge":
        return max(0.0, 1 - beta * difference)
    return (chosen / sizes[0] - rejected / sizes[1] - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize(
    ("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_dpo_is_its_formula_in_float64(loss, smoothing):
    ratios = torch.tensor([1.5, -2.0, 0.3, 0.7, -4.0, 9.0], dtype=torch.float64)
    found = dpo.pair_losses(ratios, LENGTHS, loss=loss, beta=0.3, label_smoothing=smoothing)
    each = zip(ratios.view(-1, 2).tolist(), LENGTHS.view(-1, 2).tolist(), strict=True)
    expected = [written_out(loss, *ratio, sizes, 0.3, smoothing) for ratio, sizes in each]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_simpo_orpo_and_reward_are_their_formulas_in_float64():
    means = torch.tensor([-0.2, -1.5, -3.0, -0.01, -0.7, -0.7], dtype=torch.float64)
    couples = means.view(-1, 2).tolist()
    found = simpo.pair_losses(means, beta=2.5, gamma=0.8)
    assert found.tolist() == pytest.approx([-math.log(sigma(2.5 * (c - r) - 0.8)) for c, r in couples], abs=1e-12)

    def odds(mean):
        return math.exp(mean) / (1 - math.exp(mean))

    found = orpo.pair_losses(means)
    assert found.tolist() == pytest.approx([-math.log(sigma(math.log(odds(c) / odds(r)))) for c, r in couples], abs=1e-12)
    assert reward.pair_losses(means).tolist() == pytest.approx([-math.log(sigma(c - r)) for c, r in couples], abs=1e-12)
    further = [-math.log(sigma(c - r - 0.7)) for c, r in couples]
    assert reward.pair_losses(means, torch.full((len(couples),), 0.7)).tolist() == pytest.approx(further, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_stay_finite_with_a_gradient_where_an_answer_is_certain(dtype):
    means = torch.tensor([0.0, -1e-30, -1e-3, -90.0], dtype=dtype, requires_grad=True)
    odds = orpo.log_odds(means)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(means.grad).all()
    assert float(odds[2]) == pytest.approx(math.log(math.exp(-1e-3) / -math.expm1(-1e-3)), rel=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_log_probabilities_in_chunks_have_the_values_and_gradients_of_plain_ones(bias, rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    offset = torch.randn(17, dtype=torch.float64) if bias else None
    targets, scales = torch.randint(0, 17, (11,)), torch.randn(11, dtype=torch.float64)
    given = [each.requires_grad_() for each in (hidden, weight, offset) if each is not None]
    ours, entropies = chunked_log_probs(hidden, weight, offset, targets, rows, entropy=True)
    plain = torch.nn.functional.linear(hidden, weight, offset).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(ours, plain, atol=1e-12)
    gradients = (torch.autograd.grad(each @ scales, given) for each in (ours, plain))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    assert torch.allclose(plain_log_probs(logits, targets), plain.float(), atol=1e-5)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert not entropies.requires_grad
    assert torch.allclose(entropies, expected, atol=1e-12)
    assert torch.allclose(plain_entropies(logits), expected.float(), atol=1e-5)
    assert chunked_log_probs(hidden, weight, offset, targets, rows)[1].numel() == 0
    nothing, _ = chunked_log_probs(hidden[:0], weight, offset, targets[:0], rows, entropy=True)
    assert [float(each.abs().sum()) for each in torch.autograd.grad(nothing.sum(), given)] == [0.0] * len(given)


def test_the_backward_pass_holds_no_logits_of_all_targets():
    seen = []
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: seen.append(each.numel()) or each, lambda each: each):
        chunked_log_probs(hidden, weight, None, torch.zeros(64, dtype=torch.int64), 8, entropy=True)[0].sum().backward()
    assert max(seen) == weight.numel()


def micro_batch(documents: list[tuple[list[int], int]], seq_len: int) -> MicroBatch:
    """One row of documents: their ids, and how many of the last are targets."""
    ids, labels, positions = (torch.zeros(1, seq_len, dtype=torch.int64) for _ in range(3))
    labels.fill_(IGNORED)
    at = 0
    for tokens, trained in documents:
        end = at + len(tokens)
        ids[0, at:end] = torch.tensor(tokens)
        labels[0, end - 1 - trained : end - 1] = torch.tensor(tokens[-trained:])
        positions[0, at:end] = torch.arange(len(tokens))
        at = end
    positions[0, at:] = torch.arange(seq_len - at)
    return MicroBatch(input_ids=ids, labels=labels, position_ids=positions, is_token=torch.arange(seq_len)[None] < at)


DOCUMENTS = [([5, 9, 3, 7, 2], 3), ([5, 9, 8], 1), ([1, 4, 4, 6], 2), ([1, 4, 2, 2, 2, 9, 3], 5)]


def build(value_head: bool = False, seed: int = 0, **changes):
    from transformers import AutoConfig

    attention.register_document_attention()
    config = AutoConfig.for_model(**{**TINY_LLAMA, **changes})
    model = load.build_model(config, precision="fp32", attention="documents", value_head=value_head)
    load.initialize_weights(model, seed)
    return model.double()


def log_probs_alone(model, tokens: list[int], trained: int) -> torch.Tensor:
    """Of each trained token of one document by itself, through the model's ordinary logits."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    targets = torch.tensor(tokens[-trained:])
    return logits[-1 - trained : -1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("stage", ["dpo", "simpo", "orpo"])
def test_a_packed_row_gives_the_loss_and_the_gradients_of_its_answers_alone(stage, chunked):
    model, other = build(), build(seed=1)
    each = [log_probs_alone(model, *document) for document in DOCUMENTS]
    with torch.no_grad():
        of_other = [log_probs_alone(other, *document) for document in DOCUMENTS]
    sizes = torch.tensor([trained for _, trained in DOCUMENTS])
    sums = torch.stack([each.sum() for each in each])
    if stage == "dpo":
        ratios = sums - torch.stack([each.sum() for each in of_other])
        h = (ratios[0::2] - ratios[1::2]) * 0.4
        plain = [-torch.nn.functional.logsigmoid(h).sum()]
    elif stage == "simpo":
        h = 2.0 * (sums / sizes)
        plain = [-torch.nn.functional.logsigmoid(h[0::2] - h[1::2] - 0.5).sum()]
    else:
        p = (sums / sizes).exp()
        odds = p / (1 - p)
        plain = [-sums[0::2].sum(), -0.3 * torch.nn.functional.logsigmoid((odds[0::2] / odds[1::2]).log()).sum()]
    plain_gradients = torch.autograd.grad(sum(plain), list(model.parameters()))

    for each in (model, other):
        language_model.attach(each, chunked=chunked)
    objective = {
        "dpo": dpo.objective(reference.copy(other), loss="sigmoid", beta=0.4, label_smoothing=0.0),
        "simpo": simpo.objective(beta=2.0, gamma=0.5),
        "orpo": orpo.objective(odds_weight=0.3),
    }[stage]
    batch = attention.arrange(micro_batch(DOCUMENTS, 24), "documents")
    found = objective.sums(model, batch)
    tolerance = 1e-10 if chunked else 1e-5  # logits whole are made in fp32
    assert found.terms.tolist() == pytest.approx([float(each) for each in plain], abs=tolerance)
    assert objective.units(batch) == ((5, 2) if stage == "orpo" else (2,))
    for ours, expected in zip(torch.autograd.grad(found.terms.sum(), list(model.parameters())), plain_gradients, strict=True):
        assert torch.allclose(ours, expected, atol=tolerance)
    means = {name: float(value) / count for name, (value, count) in found.metrics.items()}
    assert means["entropy"] > 0
    assert means["logps/chosen"] == pytest.approx(float(sums[0::2].mean()), abs=tolerance)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], abs=tolerance)
    if stage == "dpo":
        assert means["rewards/margins"] == pytest.approx(float(h.mean()), abs=tolerance)
        assert means["rewards/accuracies"] == float((h > 0).double().mean())


def test_a_value_is_that_of_transformers_own_class_on_each_answer_alone():
    model = build(value_head=True, pad_token_id=7)
    model.config.pad_token_id = 7
    documents = [(tokens, 1) for tokens, _ in DOCUMENTS]
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, 0]) for tokens, _ in documents]
    reward.attach(model)
    batch = attention.arrange(micro_batch(documents, 24), "documents")
    found = reward.BRADLEY_TERRY.sums(model, batch)
    expected = sum(-math.log(sigma(alone[at] - alone[at + 1])) for at in (0, 2))
    assert float(found.terms) == pytest.approx(expected, abs=1e-6)
    assert float(found.metrics["rewards/chosen"][0]) == pytest.approx(alone[0] + alone[2], abs=1e-6)
    assert reward.BRADLEY_TERRY.units(batch) == (2,)
    apart = replace(batch, numbers={"margin": torch.tensor([0.5, 0.0, 2.0, 0.0], dtype=torch.float64)})
    expected = -sum(math.log(1 / (1 + math.exp(-(alone[i] - alone[i + 1] - m)))) for i, m in ((0, 0.5), (2, 2.0)))
    assert float(reward.BRADLEY_TERRY.sums(model, apart).terms) == pytest.approx(expected, abs=1e-6)


def test_a_rank_without_rows_gives_zero_with_a_gradient_and_the_same_names():
    model = build()
    language_model.attach(model, chunked=True)
    empty = attention.arrange(micro_batch([], 24), "documents")
    full = attention.arrange(micro_batch(DOCUMENTS, 24), "documents")
    for objective in (
        dpo.objective(reference.copy(model), loss="ipo", beta=0.1, label_smoothing=0.0),
        simpo.objective(beta=2.0, gamma=0.5),
        orpo.objective(odds_weight=0.3),
    ):
        found = objective.sums(model, empty)
        assert float(found.terms.sum()) == 0
        assert not any(objective.units(empty))
        assert all(float(each.abs().sum()) == 0 for each in torch.autograd.grad(found.terms.sum(), list(model.parameters())))
        assert list(found.metrics) == list(objective.sums(model, full).metrics)
    head = build(value_head=True)
    reward.attach(head)
    assert float(reward.BRADLEY_TERRY.sums(head, empty).terms) == 0


def test_sums_of_sequences_are_exact_where_fp32_would_lose_them():
    lengths = torch.tensor([3, 1])
    batch = ModelBatch({}, torch.arange(4), torch.zeros(4, dtype=torch.int64), 4, 0, lengths)
    values = torch.tensor([1e8, 1.0, -1e8, 2.0], requires_grad=True)
    sums = pairs.sums_of_sequences(values, batch)
    assert sums.tolist() == [1.0, 2.0]
    (sums * torch.tensor([2.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 2.0, 3.0]


def test_the_three_kinds_of_reference_are_one_and_dropout_leaves_them_alone():
    from ds_trainer.arguments.schema import AdapterSection, LoraSection
    from ds_trainer.model.adapter import add_adapter, base_of

    class Engine(torch.nn.Module):
        """What an objective sees of an engine."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    adapted, copied, third = (add_adapter(build().float(), AdapterSection(lora=LoraSection(dropout=0.5)), 0) for _ in range(3))
    for each in (adapted, copied, third):
        with torch.no_grad():
            for name, value in each.named_parameters():
                if "lora_B" in name:
                    value.normal_(generator=torch.Generator().manual_seed(1))
        language_model.attach(base_of(each), chunked=True)
    frozen = build().float().eval()
    language_model.attach(frozen, chunked=True)
    batch = attention.arrange(micro_batch(DOCUMENTS, 24), "documents")
    losses = []
    known = replace(batch, numbers={reference.SUMS: reference.log_probs_of_answers(frozen, batch).detach()})
    kinds = ((adapted, reference.adapter_off), (copied, reference.copy(frozen)), (third, reference.precomputed))
    for model, kind in kinds:
        model.train()
        torch.manual_seed(3)
        objective = dpo.objective(kind, loss="sigmoid", beta=0.5, label_smoothing=0.0)
        found = objective.sums(Engine(model), known)
        found.terms.sum().backward()
        losses.append([float(found.terms), *(float(each.grad.norm()) for each in model.parameters() if each.grad is not None)])
        assert model.training
    assert losses[0] == losses[1] == losses[2]
    assert abs(losses[0][0] - 2 * math.log(2)) > 1e-2, "the adapter must matter, or the test says nothing"
