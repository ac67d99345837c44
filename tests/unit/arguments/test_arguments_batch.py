"""global_batch_size = micro_batch_size x gradient_accumulation_steps x ranks: any two give the third."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.arguments.batch import BatchPlan, solve_batch
from ds_trainer.arguments.engine_config import solve_run_batch
from ds_trainer.errors import ArgumentsError, Problem

SIZES = st.integers(1, 64)


def solve(micro, accumulation, total, ranks, where=None):
    return solve_batch(micro=micro, accumulation=accumulation, total=total, data_parallel_size=ranks, where=where)


@pytest.mark.parametrize(
    ("micro", "accumulation", "total", "ranks", "expected"),
    [
        (4, 2, None, 8, (4, 2, 64)),
        (4, None, 64, 8, (4, 2, 64)),
        (None, 2, 64, 8, (4, 2, 64)),
        (4, 2, 64, 8, (4, 2, 64)),
        (None, None, None, 8, (1, 1, 8)),
        (4, None, None, 8, (4, 1, 32)),
        (None, 2, None, 8, (1, 2, 16)),
        (None, None, 64, 8, (1, 8, 64)),
        (1, 1, 1, 1, (1, 1, 1)),
    ],
)
def test_what_is_said_decides_the_rest(micro, accumulation, total, ranks, expected):
    plan = solve(micro, accumulation, total, ranks)
    assert isinstance(plan, BatchPlan)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.global_batch_size) == expected


@given(SIZES, SIZES, SIZES, st.sets(st.sampled_from(["micro", "accumulation", "total"]), min_size=2))
def test_any_two_of_a_true_equation_give_the_third(micro, accumulation, ranks, said):
    total = micro * accumulation * ranks
    values = {"micro": micro, "accumulation": accumulation, "total": total}
    plan = solve(*(values[name] if name in said else None for name in ("micro", "accumulation", "total")), ranks)
    assert plan == BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=accumulation, data_parallel_size=ranks)


@given(st.none() | SIZES, st.none() | SIZES, st.integers(1, 5000), SIZES)
def test_a_plan_keeps_every_word_and_a_refusal_proposes_what_works(micro, accumulation, total, ranks):
    outcome = solve(micro, accumulation, total, ranks)
    if isinstance(outcome, BatchPlan):
        assert outcome.global_batch_size == total
        assert micro in (None, outcome.micro_batch_size)
        assert accumulation in (None, outcome.gradient_accumulation_steps)
        return
    proposals = re.search(r"(?:Use|Write) (\d+)(?: or (\d+))?", outcome.what)
    numbers = [int(number) for number in proposals.groups() if number]
    assert numbers
    for number in numbers:
        assert isinstance(solve(micro, accumulation, number, ranks), BatchPlan), f"{number} does not work either"
    if micro is None or accumulation is None:
        between = [each for each in range(min(total, *numbers) + 1, max(total, *numbers)) if each not in (total, *numbers)]
        assert not any(isinstance(solve(micro, accumulation, each, ranks), BatchPlan) for each in between), "a nearer one works"
    if other := re.search(r"gradient_accumulation_steps (\d+) would fit", outcome.what):
        assert isinstance(solve(micro, int(other.group(1)), total, ranks), BatchPlan)


def test_a_contradiction_shows_the_arithmetic_and_every_line():
    where = {name: f"run.yaml:{line}" for line, name in enumerate(("global_batch_size", "micro_batch_size"), 14)}
    assert solve(4, None, 65, 8, where) == Problem(
        where="run.yaml:14",
        what="train.global_batch_size = 65 is not a multiple of micro_batch_size 4 x 8 ranks = 32. Use 64 or 96 "
        "(micro_batch_size from run.yaml:15).",
    )
    assert solve(4, 3, 64, 8).what == (
        "train.global_batch_size = 64 contradicts micro_batch_size 4 x gradient_accumulation_steps 3 x 8 ranks = 96. "
        "Write 96, or leave one of the three out (gradient_accumulation_steps 2 would fit)."
    )
    assert solve(None, 3, 2, 8).what.endswith("Use 24.")


def test_a_run_is_solved_with_the_lines_of_both_files(files):
    resolved = files.run(train=["micro_batch_size: 4"]).json({"train_batch_size": 65}).resolve()
    with pytest.raises(ArgumentsError) as caught:
        solve_run_batch(resolved, 8)
    [problem] = caught.value.problems
    assert problem.where == "ds.json:2"
    assert "(micro_batch_size from run.yaml:9)" in problem.what


def test_debug_keeps_the_global_batch_of_many_ranks_in_one_process(files):
    files.run(train=["micro_batch_size: 4", "gradient_accumulation_steps: 2", "global_batch_size: 64"])
    resolved = files.resolve()
    assert solve_run_batch(resolved, 8).gradient_accumulation_steps == 2
    with pytest.raises(ArgumentsError):
        solve_run_batch(resolved, 1)
    plan = solve_run_batch(resolved, 1, keep_global=True)
    assert (plan.global_batch_size, plan.gradient_accumulation_steps) == (64, 16)
