import struct
from itertools import accumulate, chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data.chunks import TokenizedChunk
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.data.store import StoreWriter, TokenStore, bring_corpus, ranges, read_index, where
from ds_trainer.errors import DataError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def make_chunk(documents, spans=None, dtype="uint16", first_line=1):
    """A chunk from lists of ids, and lists of trained spans; None trains everything."""
    return TokenizedChunk(
        tokens=np.array(list(chain(*documents)), dtype),
        lengths=np.array([len(ids) for ids in documents], np.int32),
        spans=None if spans is None else np.array(list(chain(*spans)), np.int32).reshape(-1, 2),
        span_counts=None if spans is None else np.array([len(each) for each in spans], np.int32),
        lines=np.arange(first_line, first_line + len(documents), dtype=np.int64),
        read=len(documents),
        bad=(),
    )


def write_store(folder, chunks, dtype="uint16"):
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder)
    for chunk in chunks:
        writer.append(chunk)
    writer.finish(dtype)
    (folder / "meta.json").write_text('{"path": "a.jsonl"}')
    return TokenStore(folder)


def documents_of(store):
    return [store.sample(document)[0] for document in range(store.num_documents)]


def spans_of(store, documents):
    spans, counts = store.spans_of(np.array(documents, np.int64))
    ends = list(accumulate(counts.tolist(), initial=0))
    return [spans[start:end].tolist() for start, end in pairwise(ends)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_as_megatron(stem):
    """Megatron's layout as documented, read without our code: the sequences, and the document marks."""
    raw = stem.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0"
    (version,), (code,) = struct.unpack("<Q", raw[9:17]), struct.unpack("<B", raw[17:18])
    sequences, marks = struct.unpack("<QQ", raw[18:34])
    lengths_end, positions_end = 34 + 4 * sequences, 34 + 12 * sequences
    assert version == 1
    assert len(raw) == positions_end + 8 * marks
    lengths = struct.unpack(f"<{sequences}i", raw[34:lengths_end])
    positions = struct.unpack(f"<{sequences}q", raw[lengths_end:positions_end])
    letter, size = {4: ("i", 4), 8: ("H", 2)}[code]
    tokens = stem.with_suffix(".bin").read_bytes()
    read = [list(struct.unpack(f"<{n}{letter}", tokens[at : at + n * size])) for at, n in zip(positions, lengths, strict=True)]
    return read, list(struct.unpack(f"<{marks}q", raw[positions_end:]))


def write_as_megatron(stem, sequences, dtype, *, order=None):
    """The layout written without our code; `order` is how the sequences lie in the .bin."""
    data, positions = b"", [0] * len(sequences)
    for index in order or range(len(sequences)):
        positions[index] = len(data)
        data += np.array(sequences[index], dtype).tobytes()
    stem.with_suffix(".bin").write_bytes(data)
    stem.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(sequences) + 1)
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *positions)
        + struct.pack(f"<{len(sequences) + 1}q", *range(len(sequences) + 1))
    )
    return stem.with_suffix(".idx")


def brought(index, dtype="uint16"):
    documents = []
    for chunk, _ in bring_corpus(index, dtype):
        ends = list(accumulate(chunk.lengths.tolist(), initial=0))
        documents += [chunk.tokens[start:end].tolist() for start, end in pairwise(ends)]
    return documents


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_documents_and_spans_come_back_as_they_were_written(tmp_path, dtype):
    first = make_chunk([[5, 6, 7], [8]], [[(1, 2), (2, 3)], []], dtype)
    second = make_chunk([[65535, 1]], [[(0, 2)]], dtype, first_line=40)
    store = write_store(tmp_path / "s", [first, second], dtype)
    assert store.dtype == dtype
    assert documents_of(store) == [[5, 6, 7], [8], [65535, 1]]
    assert spans_of(store, [2, 0, 1]) == [[[0, 2]], [[1, 2], [2, 3]], []]
    assert [store.line(document) for document in range(3)] == [1, 2, 40]
    names = {"tokens.bin", "tokens.idx", "spans.bin", "span_offsets.bin", "lines.bin", "meta.json"}
    assert set(contents(tmp_path / "s")) == names
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 6 * np.dtype(dtype).itemsize


def test_without_spans_every_token_is_trained_and_no_span_file_is_kept(tmp_path):
    store = write_store(tmp_path, [make_chunk([[5, 6, 7]]), make_chunk([[8]])])
    assert spans_of(store, [1, 0]) == [[[0, 1]], [[0, 3]]]
    assert not {"spans.bin", "span_offsets.bin"} & set(contents(tmp_path))


def test_documents_without_a_single_trained_token_have_no_spans(tmp_path):
    store = write_store(tmp_path, [make_chunk([[5, 6], [7]], [[], []])])
    assert spans_of(store, [0, 1]) == [[], []]


def test_an_empty_store_can_be_written_and_read(tmp_path):
    store = write_store(tmp_path, [make_chunk([])], "int32")
    assert (store.num_documents, store.file.size, store.dtype) == (0, 0, "int32")
    assert read_as_megatron(tmp_path / "tokens") == ([], [0])


def test_reading_goes_on_after_memory_was_given_back(tmp_path):
    store = write_store(tmp_path, [make_chunk([[5, 6, 7], [8]], [[(1, 2)], [(0, 1)]])])
    before = documents_of(store), spans_of(store, [0, 1])
    store.forget()
    assert (documents_of(store), spans_of(store, [0, 1])) == before


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@given(documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=30))
@settings(max_examples=20, deadline=None)
def test_a_store_is_a_corpus_as_megatron_reads_it(tmp_path_factory, dtype, documents):
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, [make_chunk(documents[:7], dtype=dtype), make_chunk(documents[7:], dtype=dtype)], dtype)
    assert read_as_megatron(folder / "tokens") == (documents, list(range(len(documents) + 1)))


def test_an_index_of_many_blocks_is_the_same_as_of_one(tmp_path, monkeypatch):
    documents = [[n % 100] * (1 + n % 5) for n in range(50)]
    spans = [[(0, 1)] * (n % 3 > 0) for n in range(50)]
    write_store(tmp_path / "one", [make_chunk(documents, spans)])
    monkeypatch.setattr("ds_trainer.data.store._BLOCK", 7)
    write_store(tmp_path / "many", [make_chunk(documents, spans)])
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_writing_goes_on_from_the_sizes_of_a_sync_as_if_nothing_had_happened(tmp_path):
    chunks = [make_chunk([[n, n + 1], [n]], [[(0, 1)], []], first_line=2 * n) for n in range(6)]
    nothing = make_chunk([], [])
    write_store(tmp_path / "whole", [*chunks[:4], nothing, *chunks[4:]])

    folder = tmp_path / "again"
    folder.mkdir()
    killed = StoreWriter(folder)
    for chunk in chunks[:3]:
        killed.append(chunk)
    sizes = killed.sync()
    for chunk in chunks[3:]:  # never counted
        killed.append(chunk)
    killed.close()
    second = StoreWriter(folder, sizes)
    assert second.sync() == sizes
    second.append(chunks[3])
    second.append(nothing)
    sizes = second.sync()
    second.append(chunks[0])
    second.close()
    bytes_a_chunk = {
        "tokens.bin": 6,
        "lengths.bin": 8,
        "spans.bin": 8,
        "span_counts.bin": 8,
        "lines.bin": 16,
        "kinds.bin": 0,
        "margins.bin": 0,
    }
    assert sizes == {name: 4 * size for name, size in bytes_a_chunk.items()}
    last = StoreWriter(folder, sizes)
    for chunk in chunks[4:]:
        last.append(chunk)
    last.finish("uint16")
    (folder / "meta.json").write_text('{"path": "a.jsonl"}')
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_a_corpus_made_elsewhere_is_brought_in_with_its_own_type(tmp_path, dtype):
    sequences = [[5, 6, 7], [8], [], [100, 1]]
    index = write_as_megatron(tmp_path / "corpus", sequences, dtype)
    assert brought(index) == [[5, 6, 7], [8], [100, 1]]
    [(chunk, done)] = bring_corpus(index, "int32")
    assert (chunk.tokens.dtype, chunk.read, done) == ("int32", 4, 1.0)
    assert chunk.lines.tolist() == [1, 2, 4]
    assert chunk.counts == {"empty texts": 1}
    assert chunk.spans is None


def test_sequences_that_lie_in_another_order_are_brought_by_the_index(tmp_path):
    index = write_as_megatron(tmp_path / "corpus", [[5, 6, 7], [8], [9, 10]], "uint16", order=[2, 0, 1])
    assert brought(index) == [[5, 6, 7], [8], [9, 10]]


def test_a_large_corpus_comes_in_several_chunks_with_nothing_lost(tmp_path):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 60_000, n).tolist() for n in rng.integers(0, 4, 70_000)]
    chunks = list(bring_corpus(write_as_megatron(tmp_path / "corpus", sequences, "uint16"), "uint16"))
    assert len(chunks) == 2
    assert chunks[0][1] == 65536 / 70_000
    assert np.concatenate([chunk.tokens for chunk, _ in chunks]).tolist() == list(chain(*sequences))
    assert np.concatenate([chunk.lines for chunk, _ in chunks]).tolist() == [n for n, s in enumerate(sequences, 1) if s]


def tokens_of(rows):
    return {tuple(each.input_ids[0][each.is_token[0]].tolist()) for each in (rows.read([row]) for row in range(rows.num_rows))}


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("stated", ["tokens", "auto"])
def test_a_brought_corpus_trains_the_same_tokens(tmp_path, tokenizer, dtype, stated):
    sequences = [[n, n + 1, n + 2] for n in range(1, 200)]
    index = write_as_megatron(tmp_path / "corpus", sequences, dtype)
    given = [Source(path=str(index.with_suffix(".bin")), format=stated)]
    data = DataSection(sources=given, seq_len=8, packing=False)
    options = {"seq_len": 8, "cache_folder": tmp_path / "cache", "report": lambda line: None}
    rows = prepare_rows(data, given, "pretrain", tokenizer, **options)
    assert tokens_of(rows) == {tuple(each) for each in sequences}
    assert (rows.num_targets, rows.max_token_id) == (2 * 199, 201)

    # Other tokens under the same index are other data.
    fresh = np.array(list(chain(*sequences)), dtype) + 1
    index.with_suffix(".bin").write_bytes(fresh.astype(dtype).tobytes())
    changed = prepare_rows(data, given, "pretrain", tokenizer, **options)
    assert tokens_of(changed) == {tuple(token + 1 for token in each) for each in sequences}
    assert changed.fingerprint != rows.fingerprint


def no_magic(index):
    index.write_bytes(b"x" * 200)


def other_version(index):
    raw = bytearray(index.read_bytes())
    raw[9] = 2
    index.write_bytes(raw)


def float_tokens(index):
    raw = bytearray(index.read_bytes())
    raw[17] = 6
    index.write_bytes(raw)


def short_index(index):
    index.write_bytes(index.read_bytes()[:-1])


def header_only(index):
    index.write_bytes(index.read_bytes()[:20])


def short_tokens(index):
    tokens = index.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])


def half_a_token(index):
    tokens = index.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes() + b"x")


def no_tokens(index):
    index.with_suffix(".bin").unlink()


def no_index(index):
    index.unlink()


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (no_magic, "idx", "no Megatron index"),
        (header_only, "idx", "no Megatron index"),
        (other_version, "idx", "version 2 with tokens of type 8"),
        (float_tokens, "idx", "version 1 with tokens of type 6"),
        (short_index, "idx", r"too few for the 3 sequences"),
        (no_index, "idx", "cannot be read: No such file"),
        (short_tokens, "bin", "has 10 bytes of the 12 the index needs"),
        (half_a_token, "bin", "has 13 bytes of the 12 the index needs"),
        (no_tokens, "bin", "is missing"),
    ],
)
def test_a_damaged_corpus_is_refused_with_the_file_that_is_to_blame(tmp_path, damage, file, what):
    index = write_as_megatron(tmp_path / "corpus", [[1, 2, 3], [4], [5, 6]], "uint16")
    damage(index)
    with pytest.raises(DataError, match=rf"corpus\.{file}: .*{what}"):
        read_index(index)


@pytest.mark.parametrize(("at", "value"), [(0, 1), (0, 100), (1, 3), (1, -2)])
def test_sequences_outside_of_the_tokens_are_refused(tmp_path, at, value):
    index = write_as_megatron(tmp_path / "corpus", [[1, 2, 3], [4], [5, 6]], "uint16")
    raw = bytearray(index.read_bytes())
    struct.pack_into("<q", raw, 34 + 12 + 8 * at, value)  # a byte position beyond the end, before it, or inside of a token
    index.write_bytes(raw)
    with pytest.raises(DataError, match=r"corpus\.idx: a sequence after number 0 lies outside of the tokens"):
        list(bring_corpus(index, "uint16"))


def test_a_negative_length_is_refused(tmp_path):
    index = write_as_megatron(tmp_path / "corpus", [[1, 2, 3], [4], [5, 6]], "uint16")
    raw = bytearray(index.read_bytes())
    struct.pack_into("<i", raw, 34, -1)
    index.write_bytes(raw)
    with pytest.raises(DataError, match=r"corpus\.idx: a sequence"):
        list(bring_corpus(index, "uint16"))


@pytest.mark.parametrize(("token", "dtype"), [(65536, "uint16"), (-1, "uint16"), (2**31, "int32"), (-5, "int32")])
def test_a_token_that_does_not_fit_is_named_and_never_wrapped(tmp_path, token, dtype):
    index = write_as_megatron(tmp_path / "corpus", [[1, 2], [token]], "int64")
    with pytest.raises(DataError, match=rf"corpus\.idx: holds the token {token}, beyond the vocabulary"):
        list(bring_corpus(index, dtype))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=20))
def test_ranges_are_the_numbers_from_each_start_on(pairs):
    starts, counts = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    assert ranges(starts, counts).tolist() == [start + k for start, count in pairs for k in range(count)]


def test_a_document_is_found_in_its_file():
    files = [{"path": "a", "first_document": 0}, {"path": "empty", "first_document": 3}, {"path": "b", "first_document": 3}]
    assert [where(files, document) for document in (0, 2, 3, 9)] == ["a", "a", "b", "b"]
