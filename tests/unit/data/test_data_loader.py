import json
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.data import loader
from ds_trainer.data.chunks import TokenizedChunk
from ds_trainer.data.loader import Windows, evaluation_batches, windows
from ds_trainer.data.order import Order, row_at, steps_for, total_rows
from ds_trainer.data.rows import Pool, TokenRows, write_rows
from ds_trainer.data.store import StoreWriter, TokenStore
from ds_trainer.errors import TrainingError
from ds_trainer.loop import Plan
from ds_trainer.run_data import RunData, samples_of_micro_batch

SEQ_LEN = 4


def make_pool(folder, first_id, count, *, packing):
    """`count` documents of two tokens, which name them; with packing two of them lie in a row."""
    (folder / "rows").mkdir(parents=True)
    writer = StoreWriter(folder)
    writer.append(
        TokenizedChunk(
            tokens=np.repeat(np.arange(first_id, first_id + count), 2).astype(np.uint16),
            lengths=np.full(count, 2, np.int32),
            spans=None,
            span_counts=None,
            lines=np.arange(count, dtype=np.int64),
            read=count,
            bad=(),
        )
    )
    writer.finish("uint16")
    (folder / "meta.json").write_text("{}")
    counts = write_rows(folder / "rows", [TokenStore(folder)], seq_len=SEQ_LEN, packing=packing, overlong="split")
    (folder / "rows" / "meta.json").write_text(json.dumps(counts))
    return Pool([TokenStore(folder)], folder / "rows")


@pytest.fixture(scope="session")
def make_rows(tmp_path_factory):
    """Rows over pools of so many documents; the ids count on through all pools, from 1."""
    made = {}

    def make(*counts, packing=False):
        if (counts, packing) not in made:
            folder, first_id, pools = tmp_path_factory.mktemp("rows"), 1, []
            for number, count in enumerate(counts):
                pools.append(make_pool(folder / str(number), first_id, count, packing=packing))
                first_id += count
            made[counts, packing] = TokenRows(
                pools=tuple(pools),
                weights=tuple(1.0 + number for number in range(len(counts))) if len(counts) > 1 else (),
                seq_len=SEQ_LEN,
                num_tokens=0,
                num_targets=0,
                max_token_id=0,
                fingerprint="",
            )
        return made[counts, packing]

    return make


def order_of(rows, end, seed=3):
    return Order(num_rows=tuple(pool.num_rows for pool in rows.pools), weights=rows.weights, seed=seed, total_rows=end)


def samples(batch):
    """The documents of each row of a micro-batch that holds any, in order."""
    return [
        tuple(ids[is_token & (positions == 0)].tolist())
        for ids, positions, is_token in zip(batch.input_ids, batch.position_ids, batch.is_token, strict=True)
        if is_token.any()
    ]


def windows_of(rows, order, layout, first_position=0, workers=0, **options):
    """The windows of each rank, each micro-batch as its samples."""
    ranks, micro, accumulation = layout
    return [
        windows(
            rows,
            order,
            first_position=first_position,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            data_parallel_size=ranks,
            convert=samples,
            workers=workers,
            **options,
        )
        for rank in range(ranks)
    ]


def steps_of(rows, order, layout, first_position=0, workers=0):
    """For each step the samples of its rows, in the order of their positions. All ranks must end at the same step."""
    per_rank = windows_of(rows, order, layout, first_position, workers)
    try:
        for of_ranks in zip(*per_rank, strict=True):
            assert all(len(window) == layout[2] for window in of_ranks)
            yield [sample for micro_step in range(layout[2]) for window in of_ranks for sample in window[micro_step]]
    finally:
        for each in per_rank:
            each.close()


@given(
    st.integers(1, 50),
    st.sampled_from([(1, 1, 1), (1, 4, 1), (2, 1, 2), (4, 1, 1), (3, 2, 2), (2, 5, 3), (4, 3, 1)]),
    st.sampled_from([0.5, 1, 2, 3]),
    st.sampled_from([0, 0, 0, 2]),
)
@settings(max_examples=40, deadline=None)
def test_a_run_feeds_its_rows_once_an_epoch_and_ends_on_all_ranks_at_once(make_rows, count, layout, epochs, workers):
    rows = make_rows(count)
    end = total_rows(count, epochs)
    steps = list(steps_of(rows, order_of(rows, end), layout, workers=workers))
    batch = layout[0] * layout[1] * layout[2]
    assert len(steps) == steps_for(end, batch)
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    fed = [sample for step in steps for sample in step]
    for epoch in range(int(epochs)):
        of_epoch = fed[epoch * count : (epoch + 1) * count]
        assert sorted(of_epoch) == [(number,) for number in range(1, count + 1)]
    assert len(fed) == end
    name_of = [samples(rows.read([row]))[0] for row in range(count)]
    assert fed == [name_of[row_at(position, count, 3)] for position in range(end)]


@pytest.mark.parametrize("counts", [(21,), (9, 14)], ids=["one source", "mixture"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_killed_at_any_step_goes_on_with_the_very_next_sample(make_rows, counts, workers, epochs):
    rows = make_rows(*counts, packing=True)
    order = order_of(rows, epochs * rows.num_rows)
    whole = list(steps_of(rows, order, (1, 4, 1)))
    assert len(whole) == -(-epochs * rows.num_rows // 4)
    assert sum(len(row) for step in whole for row in step) >= epochs * 21 or len(counts) > 1
    for stop in range(len(whole) + 1):
        before = list(islice(steps_of(rows, order, [(1, 2, 2), (2, 1, 2)][stop % 2], workers=workers), stop))
        for layout in ((1, 1, 4), (2, 2, 1), (4, 1, 1)):
            assert before + list(steps_of(rows, order, layout, stop * 4, workers)) == whole


def test_windows_read_ahead_are_the_same_as_windows_read_when_asked(make_rows):
    rows = make_rows(30, packing=True)
    order = order_of(rows, None)
    endless = [list(islice(windows_of(rows, order, (1, 2, 2), workers=workers)[0], 40)) for workers in (0, 1, 3)]
    assert endless[0] == endless[1] == endless[2]


@pytest.mark.parametrize("count", [1, 3, 8, 9])
@pytest.mark.parametrize("max_rows", [1, 5, 100])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 2), (3, 2), (4, 1)])
def test_every_held_out_row_is_evaluated_once_in_as_many_batches_on_each_rank(make_rows, count, max_rows, ranks, micro):
    rows = make_rows(count)
    per_rank = [
        list(evaluation_batches(rows, micro_batch_size=micro, rank=rank, data_parallel_size=ranks, max_rows=max_rows))
        for rank in range(ranks)
    ]
    evaluated = min(count, max_rows)
    assert {len(batches) for batches in per_rank} == {-(-evaluated // (ranks * micro))}
    fed = sorted(sample for batches in per_rank for batch in batches for sample in samples(batch))
    assert fed == sorted(samples(rows.read([row]))[0] for row in range(evaluated))


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_a_reader_that_hangs_is_an_error_that_says_what_it_was_reading(make_rows, monkeypatch):
    rows, never = make_rows(20), threading.Event()
    monkeypatch.setattr(loader, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(TokenRows, "read", lambda self, wanted: never.wait())
    [hanging] = windows_of(rows, order_of(rows, 20), (1, 2, 1), first_position=4, workers=2, timeout_seconds=1)
    begun = time.monotonic()
    what = rf"no data for 1 s \(data\.timeout_seconds\): .* the rows at position 4 from {rows.pools[0].stores[0].folder}\."
    with pytest.raises(TrainingError, match=what):
        next(hanging)
    assert 1 <= time.monotonic() - begun < 2.5
    hanging.close()
    assert time.monotonic() - begun < 3
    never.set()
    assert hanging.waited_seconds >= 1


def test_a_reader_that_hangs_does_not_keep_the_process_from_ending():
    program = """
import threading
from ds_trainer.data.loader import Windows
windows = Windows(iter([("a row", threading.Event().wait)]), workers=1, timeout_seconds=0.1)
try:
    next(windows)
finally:
    windows.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "TrainingError: no data for 0 s" in done.stderr


def test_an_error_of_a_reader_reaches_the_loop_at_its_window():
    def fail():
        raise OSError("the disk is gone")

    reading = Windows(iter([("a", lambda: [1]), ("b", fail), ("c", lambda: [3])]), workers=2, timeout_seconds=10)
    assert next(reading) == [1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(reading)
    assert next(reading) == [3]
    with pytest.raises(StopIteration):
        next(reading)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_time_spent_waiting_is_counted_and_reading_ahead_saves_it(workers):
    def slow():
        time.sleep(0.05)
        return [0]

    reading = Windows(iter([("a row", slow)] * 6), workers=workers, timeout_seconds=10)
    next(reading)
    first = reading.waited_seconds
    assert first >= 0.045
    for _ in range(5):
        time.sleep(0.1)  # a step
        next(reading)
    more = reading.waited_seconds - first
    assert more >= 0.24 if workers == 0 else more < 0.12
    reading.close()


def test_no_more_is_read_ahead_than_two_windows_for_each_worker():
    taken = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield str(number), lambda number=number: [number]

    reading = Windows(jobs(), workers=2, timeout_seconds=10)
    assert next(reading) == [0]
    time.sleep(0.05)
    assert len(taken) == 5
    reading.close()


def test_closing_leaves_no_thread(make_rows):
    rows, before = make_rows(20), data_threads()
    [some] = windows_of(rows, order_of(rows, None), (1, 2, 1), workers=3)
    next(some)
    assert len(data_threads()) == len(before) + 3
    some.close()
    assert data_threads() == before
    [all_of_them] = windows_of(rows, order_of(rows, 20), (1, 2, 1), workers=3)
    assert len(list(all_of_them)) == 10
    assert data_threads() == before


@pytest.mark.parametrize("packing", [False, True])
def test_the_samples_of_a_micro_batch_are_those_that_are_fed(make_rows, packing):
    rows = make_rows(5, packing=packing)
    plan = Plan(max_steps=9, global_batch_size=4, total_rows=2 * rows.num_rows, seed=3)
    batch = BatchPlan(micro_batch_size=1, gradient_accumulation_steps=2, data_parallel_size=2)
    store = rows.pools[0].stores[0]
    store.meta["files_read"] = [{"path": "corpus.jsonl", "first_document": 0}]
    data = RunData(tokenizer=None, rows=rows, stream=None, held_out=None)
    share = {"rank": 1, "data_parallel_size": 2}
    fed = windows(
        rows,
        order_of(rows, plan.total_rows),
        first_position=4,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        convert=lambda each: each,
        **share,
    )
    for window, position in zip(fed, range(4, plan.total_rows, 4), strict=True):
        for micro_batch, found in enumerate(window):
            ids = [each for each in dict.fromkeys(found.input_ids.flatten().tolist()) if each]  # ids name documents, from 1
            named = samples_of_micro_batch(position, micro_batch, data, batch, plan, **share)
            assert named == [f"corpus.jsonl:{each - 1}" for each in ids]


@given(num_rows=st.integers(1, 7), global_batch=st.sampled_from([2, 4, 6]), accumulation=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_two_ranks_get_as_many_windows_whatever_the_number_of_rows(make_rows, num_rows, global_batch, accumulation):
    rows = make_rows(num_rows)
    order = Order(num_rows=(num_rows,), seed=0, total_rows=total_rows(num_rows, 1.5))
    micro = max(1, global_batch // 2 // accumulation)
    share = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "data_parallel_size": 2}
    counts = [
        [len(window) for window in windows(rows, order, first_position=0, rank=rank, convert=lambda each: each, **share)]
        for rank in range(2)
    ]
    assert counts[0] == counts[1] == [accumulation] * steps_for(order.total_rows, 2 * micro * accumulation)
    evaluated = [
        sum(1 for _ in evaluation_batches(rows, micro_batch_size=micro, rank=rank, data_parallel_size=2, max_rows=5))
        for rank in range(2)
    ]
    assert evaluated[0] == evaluated[1]
