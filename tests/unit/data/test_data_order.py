from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.data.order import positions_of_window, row_at, rows_of_window, steps_for, total_rows


@pytest.mark.parametrize("num_rows", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_epoch_feeds_every_row_once(num_rows):
    for epoch in range(3):
        fed = [row_at(epoch * num_rows + index, num_rows, seed=5) for index in range(num_rows)]
        assert sorted(fed) == list(range(num_rows))


def test_the_order_never_changes():
    """A resumed run would see other rows if these numbers changed: then raise the number in the key of the order."""
    assert [row_at(position, 10, 0) for position in range(20)] == GOLDEN_TEN
    assert [row_at(position, 1_000_003, 1234) for position in (0, 1, 2, 1_000_002, 1_000_003)] == GOLDEN_MILLION
    assert [row_at(position, 10**12 + 39, 2**70) for position in (0, 10**15)] == GOLDEN_LARGE


GOLDEN_TEN = [6, 8, 2, 0, 3, 4, 7, 1, 9, 5, 3, 7, 5, 4, 2, 0, 6, 9, 8, 1]
GOLDEN_MILLION = [799437, 899342, 811146, 42260, 141612]
GOLDEN_LARGE = [345292453701, 111368527505]


def test_epochs_and_seeds_give_different_orders():
    orders = {
        tuple(row_at(epoch * 100 + index, 100, seed) for index in range(100)) for epoch in range(10) for seed in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("num_rows", [2, 5, 12, 100])
def test_every_row_is_as_likely_at_every_place(num_rows):
    seeds = 4000
    expected = seeds / num_rows
    for index in (0, num_rows // 2, num_rows - 1):
        counts = [0] * num_rows
        for seed in range(seeds):
            counts[row_at(index, num_rows, seed)] += 1
        chi_square = sum((count - expected) ** 2 / expected for count in counts)
        assert chi_square < num_rows + 5 * (2 * num_rows) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    num_rows = 10_000
    fed = [row_at(position, num_rows, 0) for position in range(num_rows)]
    steps = [abs(after - before) for before, after in pairwise(fed)]
    assert sum(steps) / len(steps) == pytest.approx(num_rows / 3, rel=0.03)  # that of independent draws
    assert sum(step == 1 for step in steps) < 10


@pytest.mark.parametrize(
    ("num_rows", "epochs", "expected"),
    [(10, 1.0, 10), (10, 2.5, 25), (3, 0.5, 2), (30, 0.1, 3), (1, 0.001, 1), (1000, 1e-05, 1), (7, 3, 21)],
)
def test_a_part_of_a_row_counts_as_one(num_rows, epochs, expected):
    assert total_rows(num_rows, epochs) == expected


@pytest.mark.parametrize(("rows", "batch", "steps"), [(10, 5, 2), (11, 5, 3), (1, 64, 1), (64, 64, 1)])
def test_the_last_step_may_be_partial(rows, batch, steps):
    assert steps_for(rows, batch) == steps


def layouts(global_batch_size):
    """Every way to divide a global batch over up to 4 ranks."""
    for ranks in range(1, 5):
        for micro in range(1, global_batch_size + 1):
            if global_batch_size % (ranks * micro) == 0:
                yield ranks, micro, global_batch_size // (ranks * micro)


@given(
    num_rows=st.integers(1, 50),
    batch=st.sampled_from([1, 4, 12, 24]),
    step=st.integers(0, 10),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64),
)
def test_the_rows_of_a_step_do_not_depend_on_the_layout(num_rows, batch, step, epochs, seed):
    end = num_rows * epochs
    positions = range(step * batch, (step + 1) * batch)
    expected = [row_at(position, num_rows, seed) if position < end else -1 for position in positions]
    for ranks, micro, accumulation in layouts(batch):
        fed = [
            rows_of_window(
                step * batch,
                num_rows=num_rows,
                seed=seed,
                total_rows=end,
                micro_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                rank=rank,
                data_parallel_size=ranks,
            )
            for rank in range(ranks)
        ]
        assert all([len(rows) for rows in window] == [micro] * accumulation for window in fed)
        # Micro-step by micro-step and rank by rank, the rows come in the order of their positions.
        in_order = [row for m in range(accumulation) for window in fed for row in window[m]]
        assert [-1 if row is None else row for row in in_order] == expected


def test_positions_are_dealt_out_micro_step_by_micro_step():
    deal = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "data_parallel_size": 3}
    assert positions_of_window(120, rank=0, **deal) == [[120, 121], [126, 127]]
    assert positions_of_window(120, rank=2, **deal) == [[124, 125], [130, 131]]


def test_a_run_without_an_end_goes_on_into_the_next_epochs():
    [[first], [second]] = rows_of_window(
        9,
        num_rows=10,
        seed=0,
        total_rows=None,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        rank=0,
        data_parallel_size=1,
    )
    assert (first, second) == (row_at(9, 10, 0), row_at(10, 10, 0))
