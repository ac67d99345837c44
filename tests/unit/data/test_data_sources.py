import json
import os

import pytest

from ds_trainer.arguments.schema import Source
from ds_trainer.data.sources import FoundSource, Problems, find_sources, read_samples
from ds_trainer.errors import DataError

GOOD = {"text": "fine"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def read(path, format="text"):
    problems = Problems()
    samples = list(read_samples(FoundSource(files=(path,), format=format), problems))
    problems.raise_if_any()
    return samples


def find(path, stage="pretrain", format="auto", report=lambda line: None):
    return find_sources([Source(path=str(path), format=format)], stage, report)


def test_records_are_read_with_path_and_line(write):
    path = write("a.jsonl", {"text": "one"}, {"text": "zwei\u2028drei"})
    assert read(path) == [(f"{path}:1", "one"), (f"{path}:2", "zwei\u2028drei")]


def test_a_mark_at_the_start_crlf_and_blank_lines_at_the_end_are_fine(write):
    path = write("a.jsonl", raw=b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n\r\n  \n')
    assert [sample.content for sample in read(path)] == ["one", "two"]


def test_a_text_file_is_one_document(write):
    path = write("a.txt", raw="\ufeffline one\nline two\n".encode())
    assert read(path) == [(f"{path}:1", "line one\nline two\n")]


BAD_LINES = {
    b'{"text": "a",}': r"not valid JSON \(.*, column 1[34]\)",
    b'{"text": "a"': "not valid JSON",
    b'{"text": "a"}{"text": "b"}': r"not valid JSON \(Extra data, column 14\)",
    b"{'text': 'a'}": "not valid JSON",
    b'{"text": "a\x00b"}': "not valid JSON",
    b'{"text": "a", "score": NaN}': "NaN is no JSON value",
    b'{"text": "a", "score": -Infinity}': "-Infinity is no JSON value",
    b'{"text": "a", "score": 1e999}': "1e999 is too large",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "a number that cannot be read",
    b'{"text": "a", "text": "b"}': "the key `text` stands twice",
    b'{"text": "a", "meta": {"k": 1, "k": 2}}': "the key `k` stands twice",
    b'["text"]': "the line is a list",
    b'"text"': "the line is a single value",
    b"[" * 100_000: "nested too deeply",
    b"": "a blank line between records",
    b'{"text": null}': "`text` is null",
    b'{"body": "a"}': r"`text` is missing \(found: `body`\)",
    b'{"text": "\\ud83d"}': "half a surrogate pair",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[reason[:24] for reason in BAD_LINES.values()])
@pytest.mark.parametrize("number", [1, 3])
def test_a_bad_line_is_named_with_its_number_and_reason(write, line, number):
    lines = [json.dumps(GOOD).encode()] * 4
    lines.insert(number - 1, line)
    path = write("bad.jsonl", raw=b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match=f"1 problem in the data.*\n  {path}:{number}: .*{BAD_LINES[line]}"):
        read(path)


def test_a_cut_off_last_line_is_named(write):
    path = write("bad.jsonl", raw=b'{"text": "a"}\n{"text": "b"}\n{"tex')
    with pytest.raises(DataError, match=f"{path}:3: not valid JSON"):
        read(path)


def test_bytes_that_are_not_utf8_are_named_by_their_place_in_the_file(write):
    path = write("bad.jsonl", raw=b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=rf"{path}:2: byte 27 of the file \(0xff\) is not UTF-8"):
        read(path)
    assert path.read_bytes()[27] == 0xFF

    path = write("bad.txt", raw=b"\xef\xbb\xbfone\ntwo\n\xe9t\xe9")
    with pytest.raises(DataError, match=rf"{path}:3: byte 11 of the file \(0xe9\)"):
        read(path)
    assert path.read_bytes()[11] == 0xE9


def test_utf16_and_binary_files_are_refused(write):
    for raw in ("text".encode("utf-16"), "text".encode("utf-16-le"), b"\x1f\x8b\x08\x00"):
        path = write("bad.txt", raw=raw)
        with pytest.raises(DataError, match=f"{path}:1: .*(UTF-8|UTF-16)"):
            read(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
@pytest.mark.parametrize("raw", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write, name, raw):
    path = write(name, raw=raw)
    with pytest.raises(DataError, match=f"{path}: the file is empty"):
        read(path)


def test_the_first_five_problems_are_shown_together_and_reading_stops(write):
    path = write("bad.jsonl", *([GOOD, "{"] * 10))
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith("the first 5 problems in the data")
    assert [f"{path}:{line}:" in text for line in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]


def test_globs_are_expanded_in_order_and_a_format_is_stated(write, reports, tmp_path):
    for name in ("c/2.jsonl", "c/10.jsonl", "c/1.jsonl"):
        write(name, {"text": "a", "url": "b"})
    pattern = str(tmp_path / "c" / "*.jsonl")
    [found] = find(pattern, report=reports.append)
    assert [file.name for file in found.files] == ["1.jsonl", "10.jsonl", "2.jsonl"]
    assert reports == [f"{pattern}: 3 files, format text (by the keys of its first record); not used: url"]


def test_a_name_with_brackets_is_taken_literally(write):
    path = write("part[1].jsonl", GOOD)
    assert find(path)[0].files == (path,)


def test_a_path_that_matches_nothing_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pattern in ("nothing.jsonl", "nothing/*.jsonl"):
        with pytest.raises(DataError, match=rf"matches no file \({tmp_path}/nothing"):
            find(pattern)


def test_a_folder_is_refused_with_the_glob_to_write(tmp_path):
    with pytest.raises(DataError, match=r"is a folder.*\*\.jsonl"):
        find(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(write):
    path = write("secret.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match=f"{path}: cannot be read: Permission denied"):
        find(path)


def test_a_bad_first_record_does_not_hide_the_format(write):
    assert find(write("a.jsonl", "{", GOOD))[0].format == "text"
    with pytest.raises(DataError, match=r"a.jsonl:1: not valid JSON"):
        find(write("a.jsonl", "{"))


def test_keys_of_no_format_or_of_several_are_refused(write):
    with pytest.raises(DataError, match=r"\(`question`\) are those of no format"):
        find(write("a.jsonl", {"question": "a"}))
    with pytest.raises(DataError, match=r"fits 2 formats, text and alpaca.*`format: alpaca`"):
        find(write("a.jsonl", {"instruction": "a", "output": "b", "text": "c"}))


def test_a_format_that_the_stage_cannot_train_on_is_refused_with_the_other_stage(write):
    with pytest.raises(DataError, match=r"format messages .* train.stage=sft"):
        find(write("a.jsonl", CHAT), stage="pretrain")
    with pytest.raises(DataError, match=r"format text .* train.stage=pretrain"):
        find(write("a.jsonl", GOOD), stage="sft")
    with pytest.raises(DataError, match=r"format alpaca .* train.stage=sft"):
        find(write("a.jsonl", GOOD), stage="pretrain", format="alpaca")


def test_files_of_other_kinds_need_a_stated_format(write):
    path = write("readme.md", raw=b"# Title\n")
    with pytest.raises(DataError, match="`format: text`"):
        find(path)
    assert find(path, format="text")[0].format == "text"
    with pytest.raises(DataError, match=r"read from JSON lines.*readme\.jsonl"):
        find(path, stage="sft", format="messages")


def test_every_record_is_held_to_the_format(write):
    path = write("a.jsonl", *([CHAT] * 3), {"prompt": "a", "response": "b"})
    with pytest.raises(DataError, match=rf"{path}:4: the key `messages` is missing \(found: `prompt`, `response`\)"):
        read(path, "messages")
