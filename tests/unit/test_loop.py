"""The loop with an engine that only counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from ds_trainer import loop
from ds_trainer.errors import NonFiniteError
from ds_trainer.protocols import ModelBatch
from ds_trainer.state import TrainState, step_seed


def batch(targets: int, tokens: int = 10) -> ModelBatch:
    return ModelBatch(
        inputs={}, target_positions=torch.arange(targets), targets=torch.zeros(targets, dtype=torch.int64), num_tokens=tokens
    )


@dataclass
class CountingEngine:
    """Its loss of a batch is its number of targets, so that a step's loss must come out as 1."""

    applied: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random: list[float] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)

    def micro_step(self, batch: ModelBatch, num_targets: torch.Tensor) -> torch.Tensor:
        self.random.append(torch.rand(()).item())
        return batch.num_targets / num_targets

    def end_step(self):
        return SimpleNamespace(applied=self.applied)

    def evaluate(self, batch: ModelBatch) -> torch.Tensor:
        return torch.tensor(2.0 * batch.num_targets)

    def train_mode(self, on: bool) -> None:
        self.modes.append(on)


class Recorder:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, *, step, loss, num_tokens, num_targets, outcome) -> None:
        self.losses.append(float(loss))

    def evaluation(self, **fields) -> None: ...


def run(engine, windows, *, max_steps=5, total_rows=None, state=None, seed=0):
    state, recorder, seen = state or TrainState(), Recorder(), []
    plan = loop.Plan(max_steps=max_steps, global_batch_size=4, total_rows=total_rows, seed=seed, max_skipped=2)
    loop.train(engine, iter(windows), state, plan, recorder, lambda now: seen.append(now.step))
    return state, recorder, seen


def test_it_runs_to_max_steps_and_counts_in_the_right_units():
    state, recorder, seen = run(CountingEngine(), [[batch(3), batch(5)]] * 9)
    assert state.to_json() == {"step": 5, "rows_consumed": 20, "tokens_seen": 100, "targets_seen": 40}
    assert recorder.losses == pytest.approx([1.0] * 5)
    assert seen == [1, 2, 3, 4, 5]


def test_a_wish_to_stop_is_heard_between_two_steps_and_handed_back():
    state, recorder, seen = TrainState(), Recorder(), []
    plan = loop.Plan(max_steps=5, global_batch_size=4, total_rows=None, seed=0)

    def after_step(now):
        seen.append(now.step)

    def stop():
        return 15 if state.step == 2 else 0

    windows = iter([[batch(3)]] * 9)
    assert loop.train(CountingEngine(), windows, state, plan, recorder, after_step, stop) == 15
    assert (state.step, seen, len(recorder.losses)) == (2, [1, 2], 2)
    assert len(list(windows)) == 7, "no window is taken that is not trained"
    assert loop.train(CountingEngine(), iter([[batch(3)]] * 9), state, plan, recorder, after_step) == 0
    assert state.step == 5


def test_it_ends_with_the_data_and_does_not_count_rows_that_are_not_there():
    state, _, _ = run(CountingEngine(), [[batch(3)]] * 3, max_steps=9, total_rows=10)
    assert state.step == 3
    assert state.rows_consumed == 10


def test_a_resumed_state_goes_on_counting():
    before = TrainState.from_json({"step": 2, "rows_consumed": 8, "tokens_seen": 20, "targets_seen": 6})
    state, _, seen = run(CountingEngine(), [[batch(3)]] * 9, state=before)
    assert state.to_json() == {"step": 5, "rows_consumed": 20, "tokens_seen": 50, "targets_seen": 15}
    assert seen == [3, 4, 5]


def test_a_window_without_any_target_gives_zero_and_not_nan():
    _, recorder, _ = run(CountingEngine(), [[batch(0)]] * 2, max_steps=2)
    assert recorder.losses == [0.0, 0.0]


def test_randomness_belongs_to_the_step_and_not_to_what_ran_before():
    whole, late = CountingEngine(), CountingEngine()
    run(whole, [[batch(1)]] * 5)
    run(late, [[batch(1)]] * 2, state=TrainState(step=3, rows_consumed=12))
    assert late.random == whole.random[3:]
    assert len(set(whole.random)) == 5


def test_seeds_differ_by_seed_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)}
    assert len(seeds) == 64


def test_too_many_skipped_steps_end_the_run():
    with pytest.raises(NonFiniteError, match="the last 3 steps were not finite, up to step 3"):
        run(CountingEngine(applied=False), [[batch(1)]] * 9)


def test_evaluation_is_a_mean_over_targets_and_restores_training():
    engine = CountingEngine()
    assert loop.evaluate(engine, [batch(3), batch(5)]) == (2.0, 8)
    assert engine.modes == [False, True]
