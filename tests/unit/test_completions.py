"""How a token is chosen, and that what is drawn belongs to the prompt and not to the rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_trainer import completions
from ds_trainer.arguments.schema import GenerateSection


class CountingEngine:
    """Says that the next token is the last one and one more; 9 ends."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def forward(self, *, input_ids, past_key_values, use_cache):
        self.fed.append(input_ids[0].tolist())
        logits = torch.zeros(1, input_ids.shape[1], 12)
        logits[0, -1, (input_ids[0, -1] + 1) % 12] = 5.0
        return SimpleNamespace(logits=logits, past_key_values="kept")


def complete(ids, **wanted):
    engine = CountingEngine()
    section = GenerateSection(prompts="p", **wanted)
    return completions.complete(engine, ids, section, frozenset([9]), 1), engine.fed


def test_greedy_goes_on_to_the_end_token_or_the_limit():
    assert complete([3, 5]) == ([6, 7, 8, 9], [[3, 5], [6], [7], [8]])
    assert complete([3, 5], max_new_tokens=2) == ([6, 7], [[3, 5], [6]])


def test_a_rank_without_a_prompt_takes_part_as_long_as_another_writes(monkeypatch):
    others = iter([1, 1, 1, 0])
    monkeypatch.setattr(completions.comm, "largest", lambda own: max(own, next(others)))
    assert complete([]) == ([], [[0]] * 3)


def test_what_is_drawn_follows_the_probabilities_and_the_seed():
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.tensor([completions.choose(logits, 0.5, torch.Generator().manual_seed(n)) for n in range(2000)])
    shares = drawn.bincount(minlength=3) / 2000
    assert shares.tolist() == pytest.approx((logits / 0.5).softmax(-1).tolist(), abs=0.03)
    assert completions.choose(logits, 0.0, torch.Generator()) == 2
    seeds = {completions.seed_of(0, step, number) for step in range(3) for number in range(5)}
    assert len(seeds) == 15
