"""KTO's loss and gradients are those of its formula; the number of the whole step has no gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ds_trainer.objectives import kto
from ds_trainer.objectives.pairs import sums_of_sequences
from ds_trainer.protocols import ModelBatch

NUMBERS = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7}


def batch_of(lengths, wanted, ahead=None, known=None) -> ModelBatch:
    count = sum(lengths)
    return ModelBatch(
        inputs={},
        target_positions=torch.arange(count),
        targets=torch.zeros(count, dtype=torch.int64),
        num_tokens=count,
        attention_pairs=count,
        sequence_lengths=torch.tensor(lengths),
        wanted=torch.tensor(wanted),
        num_wanted=sum(wanted),
        ahead=ahead,
        known=known,
    )


@pytest.mark.parametrize("shift", [0.6, -0.6], ids=["away from the reference", "clamped"])
def test_loss_and_gradient_by_the_formula(monkeypatch, shift):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(10, generator=generator, dtype=torch.float64, requires_grad=True)
    others = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = {10: torch.randn(10, generator=generator, dtype=torch.float64), 7: others.detach() - shift}
    monkeypatch.setattr(kto, "log_probs_of_answers", lambda engine, batch: sums_of_sequences(others, batch))
    monkeypatch.setattr(kto, "log_probs_and_entropies", lambda engine, batch: (own, torch.full((10,), 2.5)))
    ahead = batch_of([3, 4], [True, True])
    batch = batch_of([2, 5, 3], [True, False, True], ahead)
    objective = kto.objective(lambda engine, batch: sums_of_sequences(reference[batch.num_targets], batch), **NUMBERS)
    known = objective.look_ahead(None, batch)
    assert known.tolist() == pytest.approx([7 * shift, 2])
    found = objective.sums(None, replace(batch, known=known.detach()))

    divergence = max(0.0, 3.5 * shift)
    ratios = [float((own - reference[10])[a:b].sum()) for a, b in ((0, 2), (2, 7), (7, 10))]
    expected, slopes = 0.0, []
    for ratio, wanted in zip(ratios, (True, False, True), strict=True):
        sign, weight = (1, 1.5) if wanted else (-1, 0.7)
        value = 1 / (1 + math.exp(-sign * 0.4 * (ratio - divergence)))
        expected += weight * (1 - value)
        slopes.append(-weight * sign * 0.4 * value * (1 - value))
    assert found.terms.tolist() == pytest.approx([expected], abs=1e-12)
    gradients = torch.autograd.grad(found.terms.sum(), own)[0]
    assert gradients.tolist() == pytest.approx([slopes[0]] * 2 + [slopes[1]] * 5 + [slopes[2]] * 3, abs=1e-12)
    means = {name: float(value) / count for name, (value, count) in found.metrics.items()}
    assert means["entropy"] == 2.5
    assert means["kl"] == pytest.approx(divergence)
    assert means["rewards/chosen"] == pytest.approx(0.4 * (ratios[0] + ratios[2]) / 2)
    assert means["rewards/rejected"] == pytest.approx(0.4 * ratios[1])
    right = [ratios[0] > divergence, ratios[1] <= divergence, ratios[2] > divergence]
    assert means["rewards/accuracies"] == pytest.approx(sum(right) / 3)
    assert objective.units(batch) == (3,)


def test_answers_without_another_do_not_count_and_a_rank_without_rows_takes_part(monkeypatch):
    each = torch.arange(5, dtype=torch.float64)
    monkeypatch.setattr(kto, "log_probs_of_answers", lambda engine, batch: sums_of_sequences(each[: batch.num_targets], batch))
    monkeypatch.setattr(kto, "log_probs_and_entropies", lambda engine, batch: (torch.zeros(0), torch.zeros(0)))
    objective = kto.objective(lambda engine, batch: torch.zeros(batch.num_sequences, dtype=torch.float64), **NUMBERS)
    ahead = batch_of([2, 3], [False, True])
    assert objective.look_ahead(None, batch_of([1, 1], [True, True], ahead)).tolist() == [9.0, 1.0]
    empty = replace(batch_of([], []), wanted=None)
    assert objective.look_ahead(None, empty).tolist() == [0.0, 0.0]
    found = objective.sums(None, replace(empty, known=torch.tensor([0.0, 0.0])))
    assert found.terms.tolist() == [0.0]
    assert {count for _, count in found.metrics.values()} == {0}
