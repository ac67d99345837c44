import time
from collections import Counter
from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_trainer.data.order import MAX_PERIOD, Order, passes, positions_of_window, row_at, steps_for, total_rows, turn_at


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


def rows_of_step(order, first_position, ranks, micro, accumulation):
    """The rows of each rank's window, and all of them in the order of their positions."""
    fed = [
        positions_of_window(
            first_position,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]
    assert all([len(positions) for positions in window] == [micro] * accumulation for window in fed)
    # Micro-step by micro-step and rank by rank, the rows come in the order of their positions.
    return [order.row_at(position) for m in range(accumulation) for window in fed for position in window[m]]


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
    expected = [row_at(position, num_rows, seed) if position < end else None for position in positions]
    order = Order(num_rows=(num_rows,), seed=seed, total_rows=end)
    for layout in layouts(batch):
        assert rows_of_step(order, step * batch, *layout) == expected


@settings(max_examples=20)
@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=4), step=st.integers(0, 50), seed=st.integers(0, 2**64))
def test_the_rows_of_a_mixed_step_do_not_depend_on_the_layout(weights, step, seed):
    order = Order(num_rows=(5, 1, 30, 7)[: len(weights)], weights=tuple(map(float, weights)), seed=seed, total_rows=500)
    expected = [order.row_at(position) for position in range(step * 12, step * 12 + 12)]
    for layout in layouts(12):
        assert rows_of_step(order, step * 12, *layout) == expected


def test_positions_are_dealt_out_micro_step_by_micro_step():
    deal = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "data_parallel_size": 3}
    assert positions_of_window(120, rank=0, **deal) == [[120, 121], [126, 127]]
    assert positions_of_window(120, rank=2, **deal) == [[124, 125], [130, 131]]


def test_a_run_without_an_end_goes_on_into_the_next_epochs_and_one_with_an_end_into_empty_rows():
    endless = Order(num_rows=(10,), seed=0, total_rows=None)
    assert [endless.row_at(position) for position in (9, 10, 10**12)] == [row_at(at, 10, 0) for at in (9, 10, 10**12)]
    ending = Order(num_rows=(10,), seed=0, total_rows=10)
    assert [ending.row_at(position) for position in (9, 10, 11)] == [row_at(9, 10, 0), None, None]


weights_strategy = st.lists(st.decimals("0.01", "10", places=2).map(float), min_size=2, max_size=8).map(tuple)


@given(weights_strategy)
@example((99.991, 0.003, 37.77))
@settings(max_examples=10, deadline=None)
def test_in_any_prefix_every_source_is_within_one_row_of_its_share(weights):
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts = [0] * len(weights)
    # Weights whose period is too long are rounded, by less than 1e-5 of the rows each.
    bounds = [1 - 1 / (2 * len(weights) - 2) + 1e-9, 1 + 1e-5 * 3000]
    rounded = False
    for position in range(3000):
        source, index = turn_at(position, weights)
        assert index == counts[source]
        counts[source] += 1
        off = max(abs(float(count - share * (position + 1))) for count, share in zip(counts, shares, strict=True))
        rounded = rounded or off > bounds[0]
        assert off < bounds[1]
    assert not rounded or max(share.denominator for share in shares) > MAX_PERIOD / len(weights)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (3.0, 1.0, 1.0), (0.5, 0.25, 0.125, 0.125), (5.0,) * 8])
def test_short_periods_keep_the_exact_bound_far_into_a_run(weights):
    total = sum(map(Fraction, map(repr, weights)))
    before = 10**9 // 80 * 80  # a whole number of periods
    counts = [0] * len(weights)
    for position in range(before, before + 1000):
        source, index = turn_at(position, weights)
        share = Fraction(repr(weights[source])) / total
        assert index == before * share + counts[source]
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            off = abs(count - Fraction(repr(weight)) / total * (position + 1 - before))
            assert off <= 1 - Fraction(1, 2 * len(weights) - 2)


@given(weights_strategy, st.lists(st.integers(1, 60), min_size=8, max_size=8), st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_every_source_of_a_mixture_goes_through_its_rows_in_epochs_of_its_own(weights, sizes, seed):
    sizes = sizes[: len(weights)]
    bases = list(accumulate(sizes, initial=0))
    order = Order(num_rows=tuple(sizes), weights=weights, seed=seed, total_rows=None)
    fed = [[] for _ in sizes]
    for position in range(1000):
        source, _ = turn_at(position, weights)
        row = order.row_at(position)
        assert bases[source] <= row < bases[source + 1]
        fed[source].append(row - bases[source])
    for rows, size in zip(fed, sizes, strict=True):
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))
        assert max(Counter(rows[len(rows) // size * size :]).values(), default=0) <= 1
    assert passes(1000, sizes, weights) == [len(rows) / size for rows, size in zip(fed, sizes, strict=True)]


def test_sources_of_one_size_go_through_their_rows_in_different_orders():
    order = Order(num_rows=(50, 50), weights=(1.0, 1.0), seed=0, total_rows=None)
    fed = [order.row_at(position) for position in range(100)]
    assert [row for row in fed if row < 50] != [row - 50 for row in fed if row >= 50]


def test_a_mixture_never_changes():
    """A resumed run would see other rows if these numbers changed: then raise the number in the key of the order."""
    weights = (0.5, 0.3, 0.2)
    assert [turn_at(position, weights)[0] for position in range(10)] == GOLDEN_TURNS
    order = Order(num_rows=(5, 100, 7), weights=weights, seed=3, total_rows=30)
    assert [order.row_at(position) for position in range(20)] == GOLDEN_MIXTURE


GOLDEN_TURNS = [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
GOLDEN_MIXTURE = [3, 84, 4, 109, 2, 32, 0, 105, 63, 1, 2, 52, 0, 106, 1, 81, 4, 111, 76, 3]


def test_two_weights_alternate_by_their_ratio():
    assert [turn_at(position, (3.0, 1.0)) for position in range(8)] == GOLDEN_THREE_TO_ONE


GOLDEN_THREE_TO_ONE = [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


def test_a_single_weight_is_a_single_source():
    assert [turn_at(position, (0.3,)) for position in (0, 1, 10**9)] == [(0, 0), (0, 1), (0, 10**9)]


def test_no_source_vanishes_however_small_its_weight():
    weights = (1e9, 1e-9, 123.456789)
    counts = Counter(turn_at(position, weights)[0] for position in range(2 * MAX_PERIOD))
    assert set(counts) == {0, 1, 2}
    assert counts[1] <= 4


def test_any_place_of_a_long_run_is_found_at_once():
    order = Order(num_rows=(10**9, 10**7), weights=(0.9, 0.1), seed=0, total_rows=None)
    order.row_at(0)
    begun = time.perf_counter()
    rows = [order.row_at(position) for position in range(10**15, 10**15 + 100)]
    assert time.perf_counter() - begun < 0.1
    assert all(0 <= row < 10**9 + 10**7 for row in rows)
