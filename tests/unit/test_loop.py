"""The loop with an engine that only counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from ds_trainer import loop
from ds_trainer.errors import NonFiniteError
from ds_trainer.protocols import LossSums, ModelBatch
from ds_trainer.state import TrainState, step_seed


def batch(targets: int, tokens: int = 10) -> ModelBatch:
    return ModelBatch(
        inputs={},
        target_positions=torch.arange(targets),
        targets=torch.zeros(targets, dtype=torch.int64),
        num_tokens=tokens,
        attention_pairs=tokens,
    )


@dataclass
class CountingEngine:
    """Its loss of a batch is its number of targets, so that a step's loss must come out as 1."""

    applied: bool | list[bool] = True
    seeks_loss_scale: bool = False
    spoiled: set[int] = field(default_factory=set)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random: list[float] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)

    def units(self, batch: ModelBatch) -> tuple[int, ...]:
        return (batch.num_targets,)

    def look_ahead(self, batches):
        return batches

    def micro_step(self, batch: ModelBatch, units: torch.Tensor) -> torch.Tensor:
        self.random.append(torch.rand(()).item())
        return batch.num_targets / units[0] * (float("nan") if len(self.random) in self.spoiled else 1)

    def end_step(self):
        applied = self.applied.pop(0) if isinstance(self.applied, list) else self.applied
        return SimpleNamespace(applied=applied, seeks_loss_scale=self.seeks_loss_scale, loss_scale=2.0)

    def evaluate(self, batch: ModelBatch) -> LossSums:
        return LossSums(torch.tensor([2.0 * batch.num_targets]), {"size": (torch.tensor(float(batch.num_targets)), 1)})

    def train_mode(self, on: bool) -> None:
        self.modes.append(on)


class Recorder:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.skipped: list[dict] = []

    def step(self, *, step, loss, window, num_targets, outcome) -> None:
        self.losses.append(float(loss))

    def skipped_step(self, text, fields) -> None:
        self.skipped.append(fields)

    def evaluation(self, **fields) -> None: ...


def samples_of(rows_consumed, micro_batch):
    return [f"corpus.jsonl:{rows_consumed + each}" for each in (micro_batch, micro_batch, 90)]


def run(engine, windows, *, max_steps=5, total_rows=None, state=None, seed=0, **policy):
    state, recorder, seen = state or TrainState(), Recorder(), []
    policy = {"max_skipped_steps": 2, **policy}
    plan = loop.Plan(max_steps=max_steps, global_batch_size=4, total_rows=total_rows, seed=seed, **policy)
    loop.train(engine, iter(windows), state, plan, recorder, lambda now: seen.append(now.step), samples_of=samples_of)
    return state, recorder, seen


def test_it_runs_to_max_steps_and_counts_in_the_right_units():
    state, recorder, seen = run(CountingEngine(), [[batch(3), batch(5)]] * 9)
    counts = {"step": 5, "rows_consumed": 20, "tokens_seen": 100, "targets_seen": 40}
    assert state.to_json() == {**counts, "skipped_in_a_row": 0}
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


def test_it_ends_when_evaluations_have_not_got_better_for_too_long():
    values = iter([5.0, 4.0, 4.2, 3.95, 4.1, 3.0])
    state = TrainState()
    plan = loop.Plan(max_steps=9, global_batch_size=4, total_rows=None, seed=0, patience=3)

    def after_step(now):
        now.judge("loss", "lowest", next(values), 0.1)

    assert loop.train(CountingEngine(), iter([[batch(3)]] * 9), state, plan, Recorder(), after_step) == 0
    assert state.step == 5, "3.95 is better by less than asked for"
    assert state.best == {"metric": "loss", "value": 4.0, "step": 2, "evaluations_since": 3}
    again = TrainState.from_json(state.to_json())
    assert loop.train(CountingEngine(), iter([[batch(3)]] * 9), again, plan, Recorder(), after_step) == 0
    assert again.step == 5
    again.judge("rewards/accuracies", "highest", 0.5, 0.0)
    again.judge("rewards/accuracies", "highest", 0.6, 0.0)
    assert (again.best["value"], again.best["evaluations_since"]) == (0.6, 0), "another metric begins anew"


def test_it_ends_with_the_data_and_does_not_count_rows_that_are_not_there():
    state, _, _ = run(CountingEngine(), [[batch(3)]] * 3, max_steps=9, total_rows=10)
    assert state.step == 3
    assert state.rows_consumed == 10


def test_a_resumed_state_goes_on_counting():
    before = TrainState.from_json({"step": 2, "rows_consumed": 8, "tokens_seen": 20, "targets_seen": 6})
    state, _, seen = run(CountingEngine(), [[batch(3)]] * 9, state=before)
    counts = {"step": 5, "rows_consumed": 20, "tokens_seen": 50, "targets_seen": 15}
    assert state.to_json() == {**counts, "skipped_in_a_row": 0}
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


def test_too_many_skipped_steps_in_a_row_end_the_run():
    with pytest.raises(NonFiniteError, match=r"^step 3: every loss is finite, .* step 3 in a row, .*max_skipped_steps = 2\."):
        run(CountingEngine(applied=False), [[batch(1)]] * 9)
    state, recorder, seen = run(CountingEngine(applied=[False, False, True, False, False]), [[batch(1)]] * 9)
    assert seen == [1, 2, 3, 4, 5]
    assert [each["step"] for each in recorder.skipped] == [1, 2, 4, 5]
    assert state.skipped_in_a_row == 2


def test_a_resumed_run_ends_where_the_uninterrupted_one_would():
    before = TrainState.from_json({"step": 2, "rows_consumed": 8, "tokens_seen": 1, "targets_seen": 1, "skipped_in_a_row": 2})
    with pytest.raises(NonFiniteError, match=r"^step 3: "):
        run(CountingEngine(applied=False), [[batch(1)]] * 9, state=before)


def test_the_policy_stop_ends_the_run_at_the_first_such_step_and_names_rank_micro_batch_and_samples():
    engine = CountingEngine(applied=[True, False], spoiled={4})
    with pytest.raises(NonFiniteError) as caught:
        run(engine, [[batch(1), batch(1)]] * 9, on_nonfinite="stop")
    assert str(caught.value).startswith(
        "step 2: the loss is not finite on rank 0 (micro-batch 2), computed from corpus.jsonl:5, corpus.jsonl:94. "
        "The weights were left as they were. train.on_nonfinite = stop ends"
    )


def test_the_search_for_a_loss_scale_raises_no_alarm_but_a_loss_that_is_not_finite_does(caplog):
    caplog.set_level("INFO", "ds_trainer")
    engine = CountingEngine(applied=False, seeks_loss_scale=True)
    state, recorder, _ = run(engine, [[batch(1)]] * 9, on_nonfinite="stop")
    assert (state.step, state.skipped_in_a_row, recorder.skipped) == (5, 0, [])
    assert [each.levelname for each in caplog.records] == ["INFO"] * 5
    assert "step 1: the gradients overflow fp16, the loss scale is now 2" in caplog.text
    with pytest.raises(NonFiniteError, match="on rank 0"):
        run(CountingEngine(applied=False, seeks_loss_scale=True, spoiled={1}), [[batch(1)]] * 9, on_nonfinite="stop")


def test_evaluation_is_a_mean_over_targets_and_restores_training():
    engine = CountingEngine()
    assert loop.evaluate(engine, [batch(3), batch(5)]) == loop.Evaluation(2.0, 8, {"size": 4.0})
    assert engine.modes == [False, True]
