from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.data.cache import Tokens
from ds_trainer.data.loader import TokenRows, evaluation_batches, windows
from ds_trainer.data.order import row_at, steps_for, total_rows
from ds_trainer.data.pack import Rows, cut_documents, one_row_each, pack
from ds_trainer.protocols import IGNORED


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def make_rows(documents, spans, seq_len, *, packing=True):
    """Rows over documents in memory: lists of ids, and lists of trained spans."""
    tokens = Tokens(
        tokens=np.array(list(chain(*documents)), np.uint16),
        offsets=offsets_of([len(ids) for ids in documents]),
        spans=np.array(list(chain(*spans)), np.int64).reshape(-1, 2),
        span_offsets=offsets_of([len(of_one) for of_one in spans]),
    )
    segments = cut_documents(np.diff(tokens.offsets), seq_len, "split").segments
    plan: Rows = pack(segments, seq_len) if packing else one_row_each(segments)
    return TokenRows(tokens=tokens, plan=plan, seq_len=seq_len, num_tokens=0, num_targets=0, max_token_id=0)


def single_rows(count):
    """Row r of the order holds one document; its first token names the row."""
    rows = make_rows([[n, n, n] for n in range(1, count + 1)], [[(0, 3)]] * count, 4, packing=False)
    return rows, [int(rows.row(index).input_ids[0]) for index in range(count)]


def test_labels_are_the_next_trained_token_of_the_same_document():
    rows = make_rows([[10, 11, 12, 13, 14], [20, 21, 22]], [[(1, 2), (4, 5)], [(0, 3)]], seq_len=10)
    row = rows.row(0)
    assert row.input_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    # 20 is trained, but nothing of its document stands before it; 14 is followed by another document.
    no = IGNORED
    assert row.labels.tolist() == [11, no, no, 14, no, 21, 22, no, no, no]
    assert row.num_tokens == 8


def test_the_parts_of_a_split_document_are_documents_of_their_own():
    rows = make_rows([[1, 2, 3, 4, 5, 6, 7]], [[(2, 6)]], seq_len=4, packing=False)
    parts = sorted((rows.row(index) for index in range(2)), key=lambda row: row.input_ids[0])
    no = IGNORED
    assert [part.input_ids.tolist() for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert [part.labels.tolist() for part in parts] == [[no, 3, 4, no], [6, no, no, no]]
    assert [part.position_ids.tolist() for part in parts] == [[0, 1, 2, 3], [0, 1, 2, 0]]


def test_an_empty_row_is_all_padding():
    row = single_rows(1)[0].row(None)
    assert row.input_ids.tolist() == [0] * 4
    assert row.labels.tolist() == [IGNORED] * 4
    assert row.position_ids.tolist() == [0, 1, 2, 3]
    assert row.num_tokens == 0


@given(st.data())
def test_no_label_ever_crosses_a_document(data):
    masks = data.draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=8))
    seq_len = data.draw(st.integers(1, 16))
    # Ids count on through all documents, so that a label names the one position it may come from.
    offsets = offsets_of([len(mask) for mask in masks])
    documents = [list(range(start + 1, end + 1)) for start, end in pairwise(offsets)]
    spans = [[(i, i + 1) for i, trained in enumerate(mask) if trained] for mask in masks]
    trained_ids = {ids[i] for ids, mask in zip(documents, masks, strict=True) for i, yes in enumerate(mask) if yes}
    rows = make_rows(documents, spans, seq_len)
    for index in range(rows.num_rows):
        row = rows.row(index)
        for at, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
            follows = at + 1 < row.num_tokens and row.position_ids[at + 1] == row.position_ids[at] + 1
            expected = token + 1 if follows and token + 1 in trained_ids else IGNORED
            assert label == expected


def layout(ranks, micro, accumulation, **more):
    return [
        {"rank": rank, "data_parallel_size": ranks, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        | more
        for rank in range(ranks)
    ]


def rows_fed(micro_batches, names):
    """The rows of micro-batches, empty ones left out."""
    return [
        names.index(int(ids[0]))
        for batch in micro_batches
        for ids, is_token in zip(batch.input_ids, batch.is_token, strict=True)
        if is_token.any()
    ]


def test_a_micro_batch_has_the_promised_shapes_and_types():
    rows, _ = single_rows(5)
    [options] = layout(1, 2, 3, first_position=0, total_rows=5, seed=0)
    [window] = windows(rows, **options)
    assert len(window) == 3
    for batch in window:
        for tensor in (batch.input_ids, batch.labels, batch.position_ids):
            assert (tensor.shape, tensor.dtype) == ((2, 4), torch.int64)
        assert (batch.is_token.shape, batch.is_token.dtype) == ((2, 4), torch.bool)
    assert [batch.num_tokens for batch in window] == [6, 6, 3]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 12])
@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 4, 1), (2, 1, 2), (4, 1, 1), (3, 2, 2), (2, 5, 3)])
@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_a_run_feeds_its_rows_once_and_ends_on_all_ranks_at_once(num_rows, ranks, micro, accumulation, epochs):
    rows, names = single_rows(num_rows)
    end = total_rows(num_rows, epochs)
    options = layout(ranks, micro, accumulation, first_position=0, total_rows=end, seed=3)
    per_rank = [list(windows(rows, **each)) for each in options]
    assert {len(of_rank) for of_rank in per_rank} == {steps_for(end, ranks * micro * accumulation)}
    fed = [row for of_rank in per_rank for window in of_rank for row in rows_fed(window, names)]
    assert sorted(fed) == sorted(row_at(position, num_rows, 3) for position in range(end))


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4])
def test_a_run_resumed_on_other_ranks_goes_on_with_the_next_row(stop_after):
    rows, names = single_rows(10)

    def steps(ranks, micro, accumulation, first_position):
        options = layout(ranks, micro, accumulation, first_position=first_position, total_rows=25, seed=1)
        for of_ranks in zip(*(windows(rows, **each) for each in options), strict=True):
            yield sorted(row for window in of_ranks for row in rows_fed(window, names))

    whole = list(steps(1, 4, 1, 0))
    before = list(islice(steps(2, 1, 2, 0), stop_after))
    after = list(steps(4, 1, 1, stop_after * 4))
    assert before + after == whole
    assert len(whole) == 7


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9])
@pytest.mark.parametrize("max_rows", [1, 5, 100])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 2), (3, 2), (4, 1)])
def test_every_held_out_row_is_evaluated_once_in_as_many_batches_on_each_rank(num_rows, max_rows, ranks, micro):
    rows, names = single_rows(num_rows)
    per_rank = [
        list(evaluation_batches(rows, micro_batch_size=micro, rank=rank, data_parallel_size=ranks, max_rows=max_rows))
        for rank in range(ranks)
    ]
    count = min(num_rows, max_rows)
    assert {len(batches) for batches in per_rank} == {-(-count // (ranks * micro))}
    assert sorted(row for batches in per_rank for row in rows_fed(batches, names)) == list(range(count))
