from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from ds_trainer.data.pack import best_fit_decreasing, cut_documents, one_row_each, pack

lengths_strategy = stn.arrays(np.int64, st.integers(0, 60), elements=st.integers(0, 50))


def as_tuples(segments):
    return list(zip(segments.document.tolist(), segments.start.tolist(), segments.length.tolist(), strict=True))


def rows_as_lists(rows):
    segments = as_tuples(rows.segments)
    return [segments[start:end] for start, end in pairwise(rows.offsets)]


@pytest.mark.parametrize(
    ("overlong", "expected", "lost"),
    [
        ("truncate", [(0, 0, 3), (2, 0, 4), (3, 0, 4)], 5),
        ("split", [(0, 0, 3), (2, 0, 4), (3, 0, 4), (3, 4, 4), (3, 8, 1)], 0),
        ("drop", [(0, 0, 3), (2, 0, 4)], 9),
    ],
)
def test_long_documents_are_cut_as_asked_and_counted(overlong, expected, lost):
    cut = cut_documents(np.array([3, 0, 4, 9]), 4, overlong)
    assert as_tuples(cut.segments) == expected
    assert (cut.overlong_documents, cut.lost_tokens) == (1, lost)


@given(lengths_strategy, st.integers(1, 40))
def test_split_keeps_every_token_once(lengths, seq_len):
    rows = pack(cut_documents(lengths, seq_len, "split").segments, seq_len)
    seen = [(d, t) for row in rows_as_lists(rows) for d, start, n in row for t in range(start, start + n)]
    assert sorted(seen) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]


@given(lengths_strategy, st.integers(1, 40), st.sampled_from(["truncate", "split", "drop"]))
def test_rows_hold_every_segment_once_and_are_never_too_long(lengths, seq_len, overlong):
    segments = cut_documents(lengths, seq_len, overlong).segments
    rows = pack(segments, seq_len)
    packed = rows_as_lists(rows)
    assert sorted(chain(*packed)) == as_tuples(segments)
    assert all(0 < sum(n for _, _, n in row) <= seq_len for row in packed)
    assert all(row == sorted(row) for row in packed)


def simple_best_fit_decreasing(lengths, capacity):
    """The textbook's version, one item at a time: sorted remaining capacities of the rows."""
    remaining = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(remaining) if left >= length]
        if fitting:
            remaining[min(fitting, key=lambda index: remaining[index])] -= length
        else:
            remaining.append(capacity - length)
    return sorted(remaining)


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 70))
def test_packing_is_best_fit_decreasing(lengths, capacity):
    row_of = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    used = np.bincount(row_of, weights=lengths, minlength=0) if lengths else np.zeros(0)
    assert sorted((capacity - used).astype(int).tolist()) == simple_best_fit_decreasing(lengths, capacity)


@given(stn.arrays(np.int64, st.integers(0, 200), elements=st.integers(1, 3000)), st.sampled_from([3000, 70_000]))
@settings(max_examples=15, deadline=None)
def test_no_row_holds_too_much_and_no_row_is_left_out(lengths, capacity):
    row_of = best_fit_decreasing(lengths, capacity)
    assert row_of.shape == lengths.shape
    assert sorted(set(row_of.tolist())) == list(range(int(row_of.max(initial=-1)) + 1))
    used = np.bincount(row_of, weights=lengths)
    assert (used <= capacity).all()
    half_empty = np.sort(used)[:2]
    assert len(half_empty) < 2 or half_empty.sum() > capacity  # or the two could have been one


@pytest.mark.parametrize(("mean", "seq_len", "fill"), [(4.4, 2048, 0.998), (6.6, 2048, 0.985)])
def test_rows_are_full(mean, seq_len, fill):
    lengths = np.clip(np.random.default_rng(0).lognormal(mean, 0.8, 50_000).astype(np.int64), 2, seq_len)
    rows = pack(cut_documents(lengths, seq_len, "drop").segments, seq_len)
    assert lengths.sum() / (rows.num_rows * seq_len) >= fill


def test_the_order_of_rows_tells_nothing_about_lengths():
    lengths = np.sort(np.random.default_rng(0).integers(2, 1000, 20_000))
    segments = cut_documents(lengths, 1024, "truncate").segments
    for rows in (pack(segments, 1024), one_row_each(segments)):
        longest = np.maximum.reduceat(rows.segments.length, rows.offsets[:-1])
        assert abs(np.corrcoef(np.arange(rows.num_rows), longest)[0, 1]) < 0.05


def test_the_same_lengths_give_the_same_rows():
    lengths = np.random.default_rng(0).integers(2, 100, 500)
    once, again = (rows_as_lists(pack(cut_documents(lengths, 128, "split").segments, 128)) for _ in range(2))
    assert once == again
    assert rows_as_lists(pack(cut_documents(np.array([5, 3, 4, 2, 5]), 7, "split").segments, 7)) == GOLDEN


GOLDEN = [[(1, 0, 3), (2, 0, 4)], [(4, 0, 5)], [(0, 0, 5), (3, 0, 2)]]


def test_without_packing_a_row_holds_one_segment():
    rows = one_row_each(cut_documents(np.array([3, 9, 1]), 4, "split").segments)
    assert [len(row) for row in rows_as_lists(rows)] == [1] * 5
    assert sorted(chain(*rows_as_lists(rows))) == [(0, 0, 3), (1, 0, 4), (1, 4, 4), (1, 8, 1), (2, 0, 1)]
