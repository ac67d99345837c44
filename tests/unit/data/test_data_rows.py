import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_trainer.data import rows as rows_module
from ds_trainer.data.chunks import TokenizedChunk
from ds_trainer.data.pack import one_row_each, pack
from ds_trainer.data.rows import Batch, Block, Pool, TokenRows, fingerprint_of, write_rows
from ds_trainer.data.store import StoreWriter, TokenStore
from ds_trainer.errors import DataError
from ds_trainer.protocols import IGNORED


def make_chunk(documents, spans):
    """A chunk from lists of ids, and lists of trained spans; None trains everything."""
    return TokenizedChunk(
        tokens=np.array(list(chain(*documents)), np.uint16),
        lengths=np.array([len(ids) for ids in documents], np.int32),
        spans=None if spans is None else np.array(list(chain(*spans)), np.int32).reshape(-1, 2),
        span_counts=None if spans is None else np.array([len(each) for each in spans], np.int32),
        lines=np.arange(len(documents), dtype=np.int64),
        read=len(documents),
        bad=(),
    )


def make_store(folder, documents, spans=None):
    folder.mkdir(parents=True)
    writer = StoreWriter(folder)
    writer.append(make_chunk(documents, spans))
    writer.finish("uint16")
    (folder / "meta.json").write_text('{"path": "a.jsonl"}')
    return TokenStore(folder)


def make_pool(folder, sources, seq_len, *, packing=True, overlong="split"):
    """A pool over sources: pairs of documents and their trained spans, each a store."""
    stores = [make_store(folder / f"store{n}", *source) for n, source in enumerate(sources)]
    (folder / "rows").mkdir()
    counts = {"tokens": 0, "targets": 0} | write_rows(
        folder / "rows", stores, seq_len=seq_len, packing=packing, overlong=overlong
    )
    (folder / "rows" / "meta.json").write_text(json.dumps(counts))
    return Pool(stores, folder / "rows")


def make_rows(folder, pools, seq_len, **options):
    made = tuple(make_pool(folder / f"pool{n}", sources, seq_len, **options) for n, sources in enumerate(pools))
    return TokenRows(
        pools=made,
        weights=(1.0,) * len(made) if len(made) > 1 else (),
        seq_len=seq_len,
        num_tokens=sum(pool.meta["tokens"] for pool in made),
        num_targets=sum(pool.meta["targets"] for pool in made),
        max_token_id=0,
        fingerprint="",
    )


def pieces(documents, spans, seq_len, overlong):
    """Slow and obvious: the ids of each piece of each document, and whether each id is trained; only what has a target."""
    kept, counts = [], Counter()
    for ids, own in zip(documents, spans or [[(0, len(ids))] for ids in documents], strict=True):
        trained = [any(first <= at < last for first, last in own) for at in range(len(ids))]
        starts = range(0, len(ids), seq_len)
        if len(ids) > seq_len:
            counts["overlong_documents"] += 1
            starts = {"split": starts, "truncate": [0], "drop": []}[overlong]
        cut = [(ids[at : at + seq_len], trained[at : at + seq_len]) for at in starts]
        counts["lost_tokens"] += len(ids) - sum(len(piece) for piece, _ in cut)
        useful = [(piece, mask) for piece, mask in cut if any(mask[1:])]
        counts["documents"] += 1
        counts["untrained_pieces"] += len(cut) - len(useful)
        counts["untrained_documents"] += not useful and not (overlong == "drop" and len(ids) > seq_len)
        counts["tokens"] += sum(len(piece) for piece, _ in useful)
        counts["targets"] += sum(sum(mask[1:]) for _, mask in useful)
        kept += useful
    return kept, counts


def expected_row(segments, seq_len):
    """The arrays of a row that holds these pieces."""
    ids, labels, positions = [], [], []
    for piece, mask in segments:
        ids += piece
        positions += range(len(piece))
        labels += [piece[at] if mask[at] else IGNORED for at in range(1, len(piece))] + [IGNORED]
    tail = seq_len - len(ids)
    return ids + [0] * tail, labels + [IGNORED] * tail, positions + list(range(tail)), [True] * len(ids) + [False] * tail


def as_lists(batch, slot):
    return tuple(each[slot].tolist() for each in (batch.input_ids, batch.labels, batch.position_ids, batch.is_token))


@st.composite
def sources_strategy(draw, counter):
    """Documents whose ids count on through all of them, so that an id names the one place it comes from."""
    documents, spans = [], []
    for mask in draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=8)):
        documents.append(list(range(counter[0], counter[0] + len(mask))))
        counter[0] += len(mask)
        trained = [0, *map(int, mask), 0]
        borders = [at for at, (before, after) in enumerate(pairwise(trained)) if before != after]
        spans.append(list(zip(borders[::2], borders[1::2], strict=True)))
    return documents, draw(st.sampled_from([spans, None]))


@given(st.data(), st.integers(1, 16), st.booleans(), st.sampled_from(["split", "truncate", "drop"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_read_is_what_a_slow_and_obvious_reader_gives(data, seq_len, packing, overlong):
    counter = [1]
    pools = data.draw(
        st.lists(st.lists(st.deferred(lambda: sources_strategy(counter)), min_size=1, max_size=3), min_size=1, max_size=3)
    )
    with TemporaryDirectory() as folder:
        rows = make_rows(Path(folder), pools, seq_len, packing=packing, overlong=overlong)
        for pool, sources in zip(rows.pools, pools, strict=True):
            total = sum((pieces(*source, seq_len, overlong)[1] for source in sources), Counter())
            assert {name: pool.meta[name] for name in total} == total
            assert Counter({name: pool.meta[name] for name in pool.meta if name != "rows"}) - total == Counter()
        by_first = {
            piece[0]: (piece, mask) for sources in pools for s in sources for piece, mask in pieces(*s, seq_len, overlong)[0]
        }

        shuffled = data.draw(st.permutations([*range(rows.num_rows), None, None]))
        batch = rows.read(shuffled)
        seen = []
        for slot, row in enumerate(shuffled):
            ids, _, positions, is_token = found = as_lists(batch, slot)
            starts = [ids[at] for at in range(seq_len) if is_token[at] and positions[at] == 0]
            seen += starts
            assert found == expected_row([by_first[start] for start in starts], seq_len)
            assert bool(starts) == (row is not None)
            assert packing or len(starts) <= 1
        assert sorted(seen) == sorted(by_first)  # every piece once, none invented
        assert batch.num_tokens == rows.num_tokens
        assert int((batch.labels != IGNORED).sum()) == rows.num_targets


def test_labels_are_the_next_trained_token_of_the_same_document(tmp_path):
    rows = make_rows(tmp_path, [[([[10, 11, 12, 13, 14], [20, 21, 22]], [[(1, 2), (4, 5)], [(0, 3)]])]], seq_len=10)
    ids, labels, positions, is_token = as_lists(rows.read([0]), 0)
    assert ids == [10, 11, 12, 13, 14, 20, 21, 22, 0, 0]
    assert positions == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    # 20 is trained, but nothing of its document stands before it; 14 is followed by another document.
    no = IGNORED
    assert labels == [11, no, no, 14, no, 21, 22, no, no, no]
    assert is_token == [True] * 8 + [False] * 2


def test_the_parts_of_a_split_document_are_documents_of_their_own(tmp_path):
    rows = make_rows(tmp_path, [[([[1, 2, 3, 4, 5, 6, 7]], [[(2, 6)]])]], seq_len=4, packing=False)
    parts = sorted(as_lists(rows.read([index]), 0) for index in range(2))
    no = IGNORED
    assert [part[0] for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert [part[1] for part in parts] == [[no, 3, 4, no], [6, no, no, no]]
    assert [part[2] for part in parts] == [[0, 1, 2, 3], [0, 1, 2, 0]]


def test_an_empty_row_is_all_padding(tmp_path):
    batch = make_rows(tmp_path, [[([[7, 8]], None)]], seq_len=4).read([None, 0, None])
    for slot in (0, 2):
        assert as_lists(batch, slot) == ([0] * 4, [IGNORED] * 4, [0, 1, 2, 3], [False] * 4)
    assert batch.input_ids[1].tolist() == [7, 8, 0, 0]


def test_a_micro_batch_has_the_promised_shapes_and_types(tmp_path):
    batch = make_rows(tmp_path, [[([[7, 8]] * 3, None)]], seq_len=4).read([0, None])
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert (tensor.shape, tensor.dtype) == ((2, 4), torch.int64)
    assert (batch.is_token.shape, batch.is_token.dtype) == ((2, 4), torch.bool)


def test_a_row_knows_the_documents_it_holds(tmp_path):
    sources = [[([[n, n] for n in range(1, 9)], None), ([[n, n, n] for n in range(20, 25)], None)], [([[90] * 4], None)]]
    rows = make_rows(tmp_path, sources, seq_len=7)
    for row in range(rows.num_rows):
        ids, _, positions, is_token = as_lists(rows.read([row]), 0)
        starts = [ids[at] for at in range(7) if is_token[at] and positions[at] == 0]
        assert [store.sample(document)[0][0] for store, document in rows.samples(row)] == starts
    with pytest.raises(IndexError):
        rows.samples(rows.num_rows)


@pytest.mark.parametrize("packing", [True, False])
def test_documents_packed_in_several_windows_are_the_same_documents(tmp_path, monkeypatch, packing):
    documents = [list(range(10 * n, 10 * n + 1 + n % 9)) for n in range(1, 100)]
    spans = [[(0, len(ids))] for ids in documents]
    sources = [(documents[:37], spans[:37]), (documents[37:], spans[37:])]
    whole = make_pool(tmp_path / "whole", sources, 16, packing=packing)
    monkeypatch.setattr(rows_module, "PACKED_TOGETHER", 10)
    windowed = make_pool(tmp_path / "windowed", sources, 16, packing=packing)

    def segments(pool):
        return sorted(each for row in range(pool.num_rows) for each in pool.segments(row))

    assert segments(windowed) == segments(whole)
    assert len(segments(whole)) == sum(len(ids) > 1 for ids in documents)
    assert windowed.meta | {"rows": 0} == whole.meta | {"rows": 0}
    # A window's rows lie together, and hold its documents alone: 0 to 9, 10 to 19, ..., 37 to 46, ...
    windows = []
    for row in range(windowed.num_rows):
        of_row = windowed.segments(row)
        [window] = {(store, document // 10) for _, document, _, store in of_row}
        windows.append(window)
        assert sum(length for _, _, length, _ in of_row) <= 16
    assert windows == sorted(windows)


def test_the_progress_of_packing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "PACKED_TOGETHER", 2)
    store = make_store(tmp_path / "s", [[1, 2]] * 5)
    told = []
    write_rows(tmp_path, [store], seq_len=4, packing=True, overlong="split", progress=told.append)
    assert told == [f"packing: {n} of 5 samples" for n in (2, 4, 5)]


@pytest.mark.parametrize("packing", [True, False])
def test_a_block_in_memory_gives_the_same_rows_as_files(tmp_path, packing):
    documents = [list(range(10 * n, 10 * n + 1 + n % 9)) for n in range(1, 40)]
    spans = [[(n % 3, len(ids))] if n % 3 < len(ids) else [] for n, ids in enumerate(documents)]
    rows = make_rows(tmp_path, [[(documents, spans)]], 8, packing=packing, overlong="truncate")
    block = Block(
        [make_chunk(documents[:15], spans[:15]), make_chunk([], []), make_chunk(documents[15:], spans[15:])],
        seq_len=8,
        overlong="truncate",
        arrange=pack if packing else lambda segments, seq_len: one_row_each(segments),
    )
    assert block.num_rows == rows.num_rows
    batch = Batch(rows.num_rows, 8)
    everything = range(rows.num_rows)
    for row in everything:
        block.read(row, row, batch)
    found, expected = batch.finished(), rows.read(list(everything))
    for slot in everything:
        assert as_lists(found, slot) == as_lists(expected, slot)


def mapped_files():
    return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]


def test_what_is_read_is_not_mapped_and_so_is_not_held(tmp_path):
    rows = make_rows(tmp_path, [[([list(range(1, 1001))] * 60, None)]], 1000, packing=False)
    for row in range(rows.num_rows):
        assert rows.read([row]).num_tokens == 1000
    assert not [path for path in mapped_files() if path.endswith(("tokens.bin", "rows.bin", "segments.bin"))]


@pytest.mark.parametrize("name", ["store0/tokens.bin", "rows/segments.bin", "rows/spans.bin", "rows/rows.bin"])
def test_a_file_that_is_cut_while_it_is_used_is_an_error_with_its_path(tmp_path, name):
    rows = make_rows(tmp_path, [[([[1, 2, 3]] * 20, None)]], 4)
    path = tmp_path / "pool0" / name
    with path.open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match=rf"{path}: cannot be read at byte \d+ \(it ends after \d+ bytes\)"):
        rows.read(range(20))


def digest(folder, sources, seq_len=8, **options):
    return fingerprint_of([make_pool(folder, sources, seq_len, **options)], (), seq_len)


def test_a_fingerprint_tells_other_tokens_spans_and_rows_apart(tmp_path):
    documents = [[n, n + 1, n + 2] for n in range(1, 30)]
    spans = [[(1, 3)] for _ in documents]
    same = digest(tmp_path / "a", [(documents, spans)])
    assert digest(tmp_path / "b", [(documents, spans)]) == same
    others = [
        digest(tmp_path / "c", [([*documents[:-1], [29, 30, 32]], spans)]),
        digest(tmp_path / "d", [(documents, [*spans[:-1], [(2, 3)]])]),
        digest(tmp_path / "e", [(documents, spans)], packing=False),
        digest(tmp_path / "f", [(documents, spans)], seq_len=9),
        digest(tmp_path / "g", [(documents[:15], spans[:15]), (documents[15:], spans[15:])]),
    ]
    assert len({same, *others[:4]}) == 5
    pool = make_pool(tmp_path / "h", [(documents, spans)], 8)
    assert len({fingerprint_of([pool], weights, 8) for weights in ((), (1.0,), (2.0,))}) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65])
def test_the_spans_of_few_documents_all_count_in_the_fingerprint(tmp_path, count):
    documents = [[1, 2, 3]] * count
    spans = [[(1, 3)]] * count
    changed = [*spans[:-1], [(1, 2)]]
    assert digest(tmp_path / "a", [(documents, spans)]) != digest(tmp_path / "b", [(documents, changed)])
