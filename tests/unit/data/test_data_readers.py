import gzip
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_trainer.arguments.schema import Source
from ds_trainer.data import readers
from ds_trainer.data.chunks import BadRecord, BadRecordError
from ds_trainer.data.formats import FORMATS
from ds_trainer.data.readers import BLOCK_BYTES, MAX_LINE_BYTES, check_magic, json_kind, parse_chunk, read_chunks
from ds_trainer.data.sources import FoundSource
from ds_trainer.errors import DataError

GOOD = b'{"text": "fine"}'


def found(*paths, kind="json_lines", format="text"):
    return FoundSource(Source(path=str(paths[0])), paths, kind, format)


def read(*paths, kind="json_lines", counts=None):
    """(line, record) of every good record, (line, reason) of every bad one, in the order of the file."""
    each = [item for chunk in read_chunks(found(*paths, kind=kind)) for item in parse_chunk(chunk, counts)]
    return [(item.line, item.reason) if isinstance(item, BadRecord) else item for item in each]


def bad_records(path, kind="json_lines"):
    return [item for c in read_chunks(found(path, kind=kind)) for item in parse_chunk(c) if isinstance(item, BadRecord)]


def compressed(raw, suffix):
    if suffix == ".gz":
        return gzip.compress(raw, 1)
    return pa.compress(raw, codec="zstd", asbytes=True) if suffix == ".zst" else raw


# --- JSON lines


def test_records_come_with_their_lines_and_only_a_newline_ends_a_line(write):
    path = write("a.jsonl", {"text": "one"}, '{"text": "zwei\u2028drei\u0085vier"}')
    assert read(path) == [(1, {"text": "one"}), (2, {"text": "zwei\u2028drei\u0085vier"})]


def test_a_mark_at_the_start_and_crlf_are_fine_and_blank_lines_are_counted(write):
    path = write("a.jsonl", raw=b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n\r\n  \n')
    counts = Counter()
    assert read(path, counts=counts) == [(1, {"text": "one"}), (3, {"text": "two"})]
    assert counts == {"blank lines": 3}


BAD_LINES = {
    b'{"text": "a",}': ("invalid JSON", r"not valid JSON \(.*, column 1[34]\)"),
    b'{"text": "a"': ("invalid JSON", r"not valid JSON \(Expecting ',' delimiter, column 13\)"),
    b'{"text": "a"}{"text": "b"}': ("invalid JSON", r"not valid JSON \(Extra data, column 14\)"),
    b"{'text': 'a'}": ("invalid JSON", r"it begins with \"\{'text': 'a'\}\""),
    b'{"text": "a"} // no': ("invalid JSON", "column 15"),
    b"[": ("invalid JSON", r"if the file is one list, name it \.json"),
    b'\xef\xbb\xbf{"text": "a"}': ("invalid JSON", "byte order mark inside the file"),
    b'{"text": "a\tb"}': ("invalid JSON", "Invalid control character"),
    b'{"text": "a\x00b"}': ("NUL byte", "byte 12 is NUL.*a\\\\x00b"),
    b'{"text": "caf\xe9"}': ("invalid UTF-8", r"byte 14 \(0xe9\) is not UTF-8.*caf\\xe9"),
    '{"text": "a"}'.encode("utf-16-le"): ("NUL byte", "UTF-16"),
    b'{"text": "a", "score": NaN}': ("not a finite number", "NaN is no JSON value"),
    b'{"text": "a", "score": -Infinity}': ("not a finite number", "-Infinity is no JSON value"),
    b'{"text": "a", "score": 1e999}': ("not a finite number", "1e999 is too large"),
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": ("number too long", "a number that cannot be read"),
    b'{"text": "a", "text": "b"}': ("duplicate key", "the key `text` stands twice"),
    b'{"text": "a", "meta": {"k": 1, "k": 2}}': ("duplicate key", "the key `k` stands twice"),
    b'["text"]': ("not an object", "the record is a list"),
    b'"text"': ("not an object", "the record is a single value"),
    b"[" * 100_000: ("nested too deeply", "is this the right file"),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[what[:24] for _, what in BAD_LINES.values()])
@pytest.mark.parametrize("number", [2, 3])
def test_a_bad_line_is_named_with_its_number_and_reason(write, line, number):
    lines = [GOOD] * 4
    lines.insert(number - 1, line)
    [bad] = bad_records(write("bad.jsonl", raw=b"\n".join(lines) + b"\n"))
    reason, what = BAD_LINES[line]
    assert (bad.line, bad.reason) == (number, reason)
    with pytest.raises(BadRecordError, match=what):
        raise BadRecordError(bad.reason, bad.what)
    assert len(bad.what) < 400
    assert bad.what.isprintable()


def test_a_cut_off_last_line_has_its_own_reason_but_only_without_a_newline(write):
    for tail in (b'{"tex', '{"text": "é'.encode()[:-1]):
        [bad] = bad_records(write("bad.jsonl", raw=GOOD + b"\n" + tail))
        assert (bad.line, bad.reason) == (2, "truncated last line")
    [bad] = bad_records(write("bad.jsonl", raw=GOOD + b'\n{"tex\n'))
    assert (bad.line, bad.reason) == (2, "invalid JSON")
    assert read(write("good.jsonl", raw=GOOD)) == [(1, {"text": "fine"})]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("e.jsonl", "json_lines"),
        ("e.jsonl.gz", "json_lines"),
        ("e.jsonl.zst", "json_lines"),
        ("e.txt", "text"),
        ("e.csv", "csv"),
    ],
)
@pytest.mark.parametrize("raw", [b"", b"\n \n", b"\xef\xbb\xbf", b" \n" * BLOCK_BYTES])
def test_an_empty_file_gives_one_chunk_that_says_so(write, name, kind, raw):
    if kind == "csv":
        raw = b"text\n"
    path = write(name, raw=compressed(raw, name[7:]) if raw else b"")
    [chunk] = read_chunks(found(path, kind=kind))
    assert chunk.is_last
    assert list(parse_chunk(chunk)) == list(chunk.bad)
    assert [str(bad) for bad in chunk.bad] == [f"{path}: the file is empty; fill it or leave it out of the source"]


def test_chunks_are_whole_lines_of_about_a_mebibyte_with_borders_of_the_file_alone(write):
    raw = b"".join(b'{"text": "%d %s"}\n' % (number, b"x" * (number % 700)) for number in range(9000))
    plain = list(read_chunks(found(write("a.jsonl", raw=raw))))
    assert b"".join(chunk.content for chunk in plain) == raw
    assert [chunk.is_last for chunk in plain] == [False] * (len(plain) - 1) + [True]
    assert all(abs(len(chunk.content) - BLOCK_BYTES) < 1000 for chunk in plain[:-1])
    assert [chunk.first for chunk in plain[1:]] == [1 + raw.count(b"\n", 0, raw.index(c.content)) for c in plain[1:]]
    for suffix in (".gz", ".zst"):
        packed = list(read_chunks(found(write("a.jsonl" + suffix, raw=compressed(raw, suffix)))))
        assert [(c.first, c.content, c.is_last) for c in packed] == [(c.first, c.content, c.is_last) for c in plain]


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_nothing_is_lost_where_a_block_or_the_file_ends(write, extra, end):
    for blocks in (1, 2):
        long = b'{"text": "%s"}' % (b"x" * (blocks * BLOCK_BYTES + extra - len(GOOD) - 13 - len(end)))
        path = write("a.jsonl", raw=GOOD + b"\n" + long + end)
        assert path.stat().st_size == blocks * BLOCK_BYTES + extra
        assert [(line, len(record["text"])) for line, record in read(path)] == [(1, 4), (2, len(long) - 12)]


def test_two_files_are_never_in_one_chunk_and_each_has_a_last(write):
    paths = [write("a.jsonl", GOOD.decode()), write("b.jsonl", GOOD.decode(), GOOD.decode())]
    chunks = list(read_chunks(found(*paths)))
    assert [(chunk.path, chunk.first, chunk.is_last) for chunk in chunks] == [(str(path), 1, True) for path in paths]


PLANTED = {
    b'{"text": "a",}': "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
    b"\xef\xbb\xbf" + GOOD: "invalid JSON",
    b'{"text": "a", "score": NaN}': "not a finite number",
    b'{"text": "a", "score": 1e999}': "not a finite number",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "number too long",
    b'{"text": "a", "text": "b"}': "duplicate key",
    b'["text"]': "not an object",
    b"[" * 10_000: "nested too deeply",
    b'{"text": "a\x00b"}': "NUL byte",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "' + b"x" * 3_000_000 + b'"}': "line too long",
    b'{"text": "\\ud83d"}': "half a surrogate pair",
    b'{"body": "a"}': "missing key",
    b'{"text": 3}': "wrong type",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_defects_found_in_a_hundred_thousand_lines_are_those_that_were_planted(write, monkeypatch, suffix):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2_500_000)
    lines = [b'{"text": "number %06d"}' % number for number in range(100_000)]
    defects = list(PLANTED)
    places = [0, 1, 2, 50_000, 50_001, 99_998]
    # Where a block ends, the line before the border, the one across it, and the one after.
    for border in range(1, 3):
        places += [border * BLOCK_BYTES // (len(lines[0]) + 1) + shift for shift in (-1, 0, 1)]
    places += [70_000 + index for index in range(len(defects) - len(places) + 3)]
    for index, place in enumerate(places):
        lines[place] = defects[index % len(defects)]
    planted = {(place + 1, PLANTED[lines[place]]) for place in places} | {(100_001, "truncated last line")}
    path = write("a.jsonl" + suffix, raw=compressed(b"\n".join([*lines, b'{"text": "b']), suffix))

    seen, good = set(), 0
    for chunk in read_chunks(found(path)):
        for each in parse_chunk(pickle.loads(pickle.dumps(chunk))):
            if isinstance(each, BadRecord):
                seen.add((each.line, each.reason))
                continue
            try:
                FORMATS["text"].convert(each[1])
                good += 1
            except BadRecordError as error:
                seen.add((each[0], str(error.reason)))
    assert seen == planted
    assert len({reason for _, reason in planted}) == 13
    assert good == 100_001 - len(planted)


def test_a_line_of_200_mb_is_named_and_never_held(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'\n{"text": "')
        file.seek(200_000_000, os.SEEK_CUR)
        file.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    assert read(path) == [(1, {"text": "fine"}), (2, "line too long"), (3, {"text": "fine"})]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20


def test_a_line_is_too_long_from_one_byte_on(write, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2 * BLOCK_BYTES)
    line = b'{"text": "%s"}'
    longest = line % (b"x" * (2 * BLOCK_BYTES - 12))
    for lead in (b"", GOOD + b"\n"):
        assert len(read(write("a.jsonl", raw=lead + longest + b"\n" + GOOD))) == 2 + bool(lead)
        path = write("a.jsonl", raw=lead + longest + b" \n" + GOOD)
        assert read(path)[-2:] == [(1 + bool(lead), "line too long"), (2 + bool(lead), {"text": "fine"})]
        path = write("a.jsonl", raw=lead + longest + b" ")  # and at the end of the file
        assert read(path)[-1:] == [(1 + bool(lead), "line too long")]


def test_a_key_that_is_missing_in_row_200_000_only_has_that_number(write, tmp_path):
    raw = GOOD + b"\n"
    path = write("a.jsonl", raw=raw * 199_999 + b'{"body": "x"}\n' + raw)
    records = read(path)
    assert [(line, record) for line, record in records if "text" not in record] == [(200_000, {"body": "x"})]
    assert records[-1][0] == 200_001

    pq.write_table(pa.table({"text": ["fine"] * 199_999 + [None, "fine"]}), tmp_path / "a.parquet", row_group_size=7_777)
    records = read(tmp_path / "a.parquet", kind="parquet")
    assert [(row, record) for row, record in records if record["text"] is None] == [(200_000, {"text": None})]
    assert [row for row, _ in records] == list(range(1, 200_002))


# --- Damage, and files that are not what their names say


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_named_with_the_line_that_was_reached(write, suffix):
    raw = b"".join(b'{"text": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(3000))
    packed = compressed(raw, suffix)
    chunks = read_chunks(found(write("cut.jsonl" + suffix, raw=packed[: len(packed) * 9 // 10])))
    assert next(chunks).first == 1
    with pytest.raises(DataError, match=rf"cut\.jsonl\{suffix}: damaged or cut short after line \d{{3,4}} \("):
        list(chunks)
    with pytest.raises(DataError, match="damaged or cut short"):
        read(write("tail.jsonl" + suffix, raw=packed + b"more"))
    with pytest.raises(DataError, match="damaged or cut short after line 0"):
        read(write("head.jsonl" + suffix, raw=packed[:7]))


def test_several_members_of_a_compressed_file_are_read_as_one(write):
    for suffix in (".gz", ".zst"):
        path = write("a.jsonl" + suffix, raw=compressed(GOOD + b"\n", suffix) * 2)
        assert [line for line, _ in read(path)] == [1, 2]


def test_bytes_of_another_kind_are_named_with_the_name_to_give(write, tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a", "b")
    contents = {
        gzip.compress(GOOD): r"looks like gzip data.*rename it to a\.jsonl\.gz",
        compressed(GOOD, ".zst"): r"looks like zstd data.*rename it to a\.jsonl\.zst",
        (tmp_path / "p").read_bytes(): r"looks like Parquet.*rename it to a\.parquet",
        (tmp_path / "z").read_bytes(): "looks like a zip archive.*unpack it",
        GOOD.decode().encode("utf-16"): "looks like UTF-16.*iconv -f UTF-16",
        GOOD.decode().encode("utf-16-le"): "looks like UTF-16",
        GOOD.decode().encode("utf-16-be"): "looks like UTF-16",
        b"ARROW1\0\0": r"looks like Arrow data.*rename it to a\.arrow",
    }
    for raw, what in contents.items():
        with pytest.raises(DataError, match=what):
            list(read_chunks(found(write("a.jsonl", raw=raw))))
    with pytest.raises(DataError, match=r"a\.txt: looks like gzip"):
        list(read_chunks(found(write("a.txt", raw=gzip.compress(GOOD)), kind="text")))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: is not gzip data, as its name says; if it is text, remove that ending"):
        list(read_chunks(found(write("a.jsonl.gz", raw=GOOD))))
    with pytest.raises(DataError, match=r"looks like zstd data.*rename it to a\.jsonl\.zst"):
        list(read_chunks(found(write("a.jsonl.gz", raw=compressed(GOOD, ".zst")))))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: looks like gzip data"):  # packed twice
        list(read_chunks(found(write("a.jsonl.gz", raw=gzip.compress(gzip.compress(GOOD))))))
    for kind, name in (("parquet", "Parquet"), ("arrow", "Arrow data"), ("tokens", "a Megatron index")):
        with pytest.raises(DataError, match=f"is not {name}, as its name says"):
            check_magic(write(f"a.{kind}", raw=GOOD), kind)
        check_magic(write(f"a.{kind}", raw=b""), kind)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_columnar_file_is_named_and_no_error_of_the_library_escapes(write, tmp_path, kind):
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]})
    path = tmp_path / f"a.{kind}"
    write_columns(table, path, kind, rows=1000)
    raw = path.read_bytes()
    with pytest.raises(DataError, match=r"damaged or cut short after row \d+ \("):
        read(write(path.name, raw=raw[: len(raw) * 6 // 10]), kind=kind)
    if kind == "parquet":
        with pytest.raises(DataError, match=r"damaged or cut short after row \d+ \("):
            read(write(path.name, raw=raw[:100_000] + b"\xff" * 200 + raw[100_200:]), kind=kind)


def test_a_folder_or_a_file_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        list(read_chunks(found(tmp_path / "gone.jsonl")))


# --- Columns


def write_columns(table, path, kind, rows=1000, stream=True):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
        return
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize(("kind", "stream"), [("parquet", True), ("arrow", True), ("arrow", False)])
def test_columns_come_back_as_they_were_with_row_numbers(tmp_path, kind, stream):
    rows = [{"messages": [{"role": "user", "content": f"é{n}"}], "n": n, "none": None} for n in range(3500)]
    path = tmp_path / f"a.{kind}"
    write_columns(pa.Table.from_pylist(rows), path, kind, rows=1700, stream=stream)
    chunks = list(read_chunks(found(path, kind=kind)))
    assert [item for chunk in chunks for item in parse_chunk(pickle.loads(pickle.dumps(chunk)))] == list(enumerate(rows, 1))
    assert all(chunk.content.num_rows <= 1000 for chunk in chunks)
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_chunk_of_rows_is_small_and_takes_nothing_else_along(tmp_path):
    table = pa.table({"text": ["x" * 100_000] * 100})
    for kind in ("parquet", "arrow"):
        write_columns(table, tmp_path / "a", kind)
        chunks = list(read_chunks(found(tmp_path / "a", kind=kind)))
        assert [chunk.first for chunk in chunks] == list(range(1, 101, 10))
        assert max(len(pickle.dumps(chunk)) for chunk in chunks) < 1.1 * BLOCK_BYTES


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_large_group_of_rows_is_never_held_whole(tmp_path, kind):
    write_columns(pa.table({"text": [os.urandom(1000).hex() for _ in range(25_000)]}), tmp_path / "a", kind, rows=25_000)
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_chunks(found(tmp_path / "a", kind=kind)):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20 * 2**20 < (tmp_path / "a").stat().st_size * 0.5


def test_chunks_say_how_much_of_their_file_is_read(write, tmp_path):
    raw = b'{"text": "%s"}\n' % (b"x" * 1000) * 5000
    for suffix in ("", ".gz", ".zst"):
        done = [chunk.done for chunk in read_chunks(found(write("a.jsonl" + suffix, raw=compressed(raw, suffix))))]
        assert 0 < done[0] <= 1 == done[-1]
        assert done == sorted(done)
        assert suffix or abs(done[1] - 0.42) < 0.01
    table = pa.table({"text": ["x" * 1000] * 5000})
    for kind, stream in (("parquet", True), ("arrow", True), ("arrow", False)):
        write_columns(table, tmp_path / "a", kind, stream=stream)
        assert [round(chunk.done, 1) for chunk in read_chunks(found(tmp_path / "a", kind=kind))] == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_without_rows_or_with_a_double_name_are_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_columns(pa.table({"text": pa.array([], pa.string())}), path, kind)
    assert read(path, kind=kind) == [(0, "empty file")]
    path.write_bytes(b"")
    assert read(path, kind=kind) == [(0, "empty file")]
    write_columns(pa.table([["a"], ["b"]], names=["text", "text"]), path, kind)
    with pytest.raises(DataError, match="has two columns `text`"):
        read(path, kind=kind)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_value_that_cannot_be_read_costs_its_row_only(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    raw = pa.array([b"a", b"\xff\xfe", "é".encode()])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    write_columns(pa.table({"text": text}), path, kind)
    assert read(path, kind=kind) == [(1, {"text": "a"}), (2, "invalid UTF-8"), (3, {"text": "é"})]

    write_columns(pa.table({"at": pa.array([0, 2**61, 0], pa.timestamp("ms"))}), path, kind)
    assert [item[1] for item in read(path, kind=kind)][1] == "unreadable value"
    assert [item[0] for item in read(path, kind=kind)] == [1, 2, 3]


# --- CSV, JSON lists, texts


def test_csv_records_are_strings_with_the_line_they_start_on(write):
    path = write("a.csv", raw='\ufeffprompt,response\r\na,"b\r\nc ""d"""\r\n\r\n"é, f",\r\n'.encode())
    assert read(path, kind="csv") == [
        (2, {"prompt": "a", "response": 'b\r\nc "d"'}),
        (5, {"prompt": "é, f", "response": ""}),
    ]
    long = "x" * 200_000
    assert read(write("a.csv", raw=f"text\n{long}\n".encode()), kind="csv") == [(2, {"text": long})]


def test_a_bad_csv_record_is_named_and_reading_goes_on(write):
    path = write("a.csv", raw=b'a,b\n1\n1,2,3\n"x"y,2\n\xff,"\n2"\n1,\x00\n1,2\n')
    assert read(path, kind="csv") == [
        (2, "wrong number of cells"),
        (3, "wrong number of cells"),
        (4, "invalid CSV"),
        (5, "invalid UTF-8"),
        (7, "NUL byte"),
        (8, {"a": "1", "b": "2"}),
    ]


def test_a_csv_header_must_name_each_column_once_and_a_quote_must_end(write):
    cases = {
        b"a,,b\n": r"a\.csv:1: column 2 of the header has no name",
        b"a,b,a\n": r"a\.csv:1: has two columns `a`",
        b"prompt;response\n1;2\n": "separated by semicolons",
        b"a\xff,b\n": r"a\.csv:1: byte 2 \(0xff\)",
        b'a,b\n1,2\n3,"4\n5,6\n': r"a\.csv:3: a quote is opened and never closed",
    }
    for raw, what in cases.items():
        with pytest.raises(DataError, match=what):
            read(write("a.csv", raw=raw), kind="csv")


def test_records_of_a_csv_file_come_in_chunks_of_a_thousand(write):
    path = write("a.csv", raw=b"text\n" + b"abc\n" * 2500)
    chunks = list(read_chunks(found(path, kind="csv")))
    assert [(chunk.first, len(chunk.content)) for chunk in chunks] == [(2, 1000), (1002, 1000), (2002, 500)]


def test_a_json_list_is_read_element_by_element(write):
    path = write(
        "a.json",
        raw='\ufeff\n[\n  {"text": "é\\n"},\n\n  {\n "text": 2},{"a":[1]}\n , NaN, ["x"], {"a":1,"a":2}, {} ]\n '.encode(),
    )
    assert json_kind(path) == "json"
    assert read(path, kind="json") == [
        (3, {"text": "é\n"}),
        (5, {"text": 2}),
        (6, {"a": [1]}),
        (7, "not a finite number"),
        (7, "not an object"),
        (7, "duplicate key"),
        (7, {}),
    ]
    assert read(write("a.json", raw=b"[ ]"), kind="json") == [(0, "empty file")]
    assert json_kind(write("a.json", raw=b'\n\n{"text": "a"}')) == "json_lines"


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b'[{"a": 1},\n {"a": 1,}]', r":2: .*column (9|10)\)"),
        (b'[{"a": 1}\n {"a": 1}]', r":2: .*expecting ',' or '\]', column 2\)"),
        (b'[{"a": 1},\n]', r":2: .*column 1\)"),
        (b'[{"a": 1}', r":1: .*is the file cut short"),
        (b"[]\n\n[]", r":3: .*more text after the list"),
        (b'[{"a": "\n\xff"}]', r":2: .*0xff"),
        (b"[" * 100_000, r":1: .*nested too deeply"),
    ],
)
def test_a_broken_json_list_is_named_with_line_and_column(write, raw, where):
    with pytest.raises(DataError, match=where):
        read(write("a.json", raw=raw), kind="json")


def test_a_text_file_is_one_document(write):
    assert read(write("a.txt", raw="\ufeffone\nzwei\n".encode()), kind="text") == [(1, {"text": "one\nzwei\n"})]
    assert read(write("a.txt.gz", raw=gzip.compress(b"one")), kind="text") == [(1, {"text": "one"})]
    assert read(write("a.txt", raw=b"one\ntwo\n\xe9t\xe9"), kind="text") == [(3, "invalid UTF-8")]
    assert read(write("a.txt", raw=b"one\ntwo\0"), kind="text") == [(2, "NUL byte")]


def test_what_is_read_whole_has_a_limit(write, monkeypatch):
    assert MAX_LINE_BYTES == 64 * 2**20
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_LIST_BYTES", 100)
    with pytest.raises(DataError, match=r"one document.*\.jsonl"):
        read(write("a.txt", raw=b"x" * 101), kind="text")
    with pytest.raises(DataError, match=r"a list is read whole.*name it a\.jsonl"):
        read(write("a.json", raw=b"[" + b" " * 100 + b"]"), kind="json")
    with pytest.raises(DataError, match=r"a\.csv:2: a line of more than"):
        read(write("a.csv", raw=b"a\n" + b"x" * 101 + b"\n"), kind="csv")


# --- Cost


def test_plain_lines_are_read_at_hundreds_of_megabytes_a_second(write):
    path = write("a.jsonl", raw=(json.dumps({"text": "some words " * 100}) + "\n").encode() * 50_000)
    start = time.perf_counter()
    assert sum(len(chunk.content) for chunk in read_chunks(found(path))) == path.stat().st_size
    assert path.stat().st_size / (time.perf_counter() - start) > 100e6


def test_importing_the_readers_loads_no_heavy_library():
    heavy = {"torch", "pyarrow", "transformers", "pydantic", "datasets"}
    code = f"import sys, ds_trainer.data.readers; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
