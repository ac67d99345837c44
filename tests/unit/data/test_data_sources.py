import gzip
import json
import os
import pickle
import sys
import time
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_trainer.arguments.schema import Source
from ds_trainer.data.chunks import BadRecord
from ds_trainer.data.readers import parse_chunk, read_chunks
from ds_trainer.data.sources import find_sources, rename
from ds_trainer.errors import DataError

GOOD = {"text": "fine"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
INDEX = b"MMIDIDX\0\0" + bytes(20)


def find(path, stage="pretrain", report=lambda line: None, **settings):
    [found] = find_sources([Source(path=str(path), **settings)], stage, report)
    return found


def texts(found):
    return [item[1]["text"] for chunk in read_chunks(found) for item in parse_chunk(chunk) if not isinstance(item, BadRecord)]


# --- Files


def test_globs_are_expanded_in_order_and_the_format_is_reported(write, reports, tmp_path):
    for name in ("c/2.jsonl", "c/10.ndjson", "c/1.jsonl.gz"):
        write(name, raw=gzip.compress(json.dumps(GOOD).encode()) if name.endswith("gz") else b'{"text": "a", "url": "b"}')
    pattern = str(tmp_path / "c" / "*")
    found = find(pattern, report=reports.append)
    assert [file.name for file in found.files] == ["1.jsonl.gz", "10.ndjson", "2.jsonl"]
    assert reports == [f"{pattern}: 3 files, format text (by the keys of its first record)"]
    assert (found.kind, found.format, found.source.path) == ("json_lines", "text", pattern)
    assert pickle.loads(pickle.dumps(found)) == found
    find(tmp_path / "c" / "2.jsonl", report=reports.append, format="text")
    assert reports[1].endswith("2.jsonl: 1 file, format text (as stated); not used: url")


def test_relative_paths_stay_relative_and_names_with_brackets_are_taken_literally(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("part[1].jsonl", GOOD)
    assert [str(file) for file in find("part[1].jsonl").files] == ["part[1].jsonl"]


def test_a_path_that_matches_nothing_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for pattern in ("nothing.jsonl", "nothing/*.jsonl", "a/b/c", "a/b.jsonl.gz", "here/b", "./b", "../b", "a"):
        with pytest.raises(DataError, match=r"matches no file \(/.*correct the path"):
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


def test_every_kind_of_file_is_found_and_read(write, tmp_path):
    table = pa.table({"text": ["fine"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    line = json.dumps(GOOD).encode()
    write("a.jsonl.zst", raw=pa.compress(line, codec="zstd", asbytes=True))
    for name, raw in {
        "a.JSONL": line,
        "a.json": b"[" + line + b"]",
        "b.json": line,
        "c.json.gz": gzip.compress(b"\n[" + line + b"]"),
        "a.csv": b"text\nfine\n",
        "a.txt": b"fine",
        "a.txt.gz": gzip.compress(b"fine"),
    }.items():
        write(name, raw=raw)
    kinds = {path.name: find(path).kind for path in sorted(tmp_path.iterdir())}
    assert kinds == {
        "a.JSONL": "json_lines",
        "a.arrow": "arrow",
        "a.csv": "csv",
        "a.json": "json",
        "a.jsonl.zst": "json_lines",
        "a.parquet": "parquet",
        "a.txt": "text",
        "a.txt.gz": "text",
        "b.json": "json_lines",
        "c.json.gz": "json",
    }
    assert [texts(find(tmp_path / name)) for name in kinds] == [["fine"]] * len(kinds)


def test_files_of_two_kinds_in_one_source_are_named(write, tmp_path):
    write("a.jsonl", GOOD)
    write("b.csv", raw=b"text\nfine\n")
    with pytest.raises(DataError, match=r"a\.jsonl is read as json_lines and .*b\.csv as csv.*two sources"):
        find(tmp_path / "*")


def test_files_of_other_kinds_need_a_stated_format(write):
    path = write("readme.md", raw=b"# Title\n")
    with pytest.raises(DataError, match="`format: text`"):
        find(path)
    assert find(path, format="text").kind == "text"
    with pytest.raises(DataError, match=r"format messages is read from JSON lines"):
        find(path, stage="sft", format="messages")
    with pytest.raises(DataError, match=r"a\.txt: format messages is read from .*a\.jsonl"):
        find(write("a.txt", raw=b"a"), stage="sft", format="messages")
    with pytest.raises(DataError, match="the name does not tell"):
        find(write("a.parquet.gz", raw=b"a"))


def test_any_file_that_is_not_what_its_name_says_is_refused_at_once(write, tmp_path):
    write("a.jsonl", GOOD)
    write("b.jsonl", raw=gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"b\.jsonl: looks like gzip data.*b\.jsonl\.gz"):
        find(tmp_path / "*.jsonl")


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv", "e.txt", "e.parquet", "e.arrow", "e.jsonl.gz", "e.jsonl.zst"])
def test_an_empty_file_is_refused_by_name(write, name):
    with pytest.raises(DataError, match=rf"{name}: the file is empty; fill it"):
        find(write(name, raw=b""))


def test_split_and_subset_are_refused_for_a_file(write):
    for key in ("split", "subset"):
        with pytest.raises(DataError, match=f"`{key}: test` is for a folder of `datasets` or a hub id"):
            find(write("a.jsonl", GOOD), **{key: "test"})


# --- Formats and fields


def test_bad_records_at_the_start_do_not_hide_the_format(write, tmp_path):
    assert find(write("a.jsonl", "{", "[", GOOD)).format == "text"
    with pytest.raises(DataError, match=r"2 bad records and no good one; nothing was started\.\n  .*a.jsonl:1: not valid JSON"):
        find(write("a.jsonl", "{", "{"))
    write("b.jsonl", GOOD)
    assert find(tmp_path / "?.jsonl").format == "text"
    with pytest.raises(DataError, match=r"100 bad records and no good one"):
        find(write("a.jsonl", *["{"] * 500, GOOD))


def test_keys_of_no_format_or_of_several_are_refused(write):
    with pytest.raises(DataError, match=r"\(`question`\) are those of no format.*`fields"):
        find(write("a.jsonl", {"question": "a"}))
    with pytest.raises(DataError, match=r"fits 2 formats, text and alpaca.*`format: alpaca`"):
        find(write("a.jsonl", {"instruction": "a", "output": "b", "text": "c"}))


def test_a_format_that_the_stage_cannot_train_on_is_refused_with_the_other_stage(write):
    with pytest.raises(DataError, match=r"format messages .* train.stage=sft"):
        find(write("a.jsonl", CHAT), stage="pretrain")
    with pytest.raises(DataError, match=r"format text .* train.stage=pretrain"):
        find(write("a.jsonl", GOOD), stage="sft")
    with pytest.raises(DataError, match=r"format preference holds pairs .* train.stage = sft. Write train.stage=dpo"):
        find(write("a.jsonl", {"chosen": "a", "rejected": "b"}), stage="sft")
    with pytest.raises(DataError, match=r"format kto holds labelled answers, .* Write train.stage=kto"):
        find(write("a.jsonl", {"prompt": "a", "completion": "b", "label": True}), stage="sft")
    with pytest.raises(DataError, match=r"format preference holds no labelled answers, and train.stage = kto needs them"):
        find(write("a.jsonl", {"chosen": "a", "rejected": "b"}), stage="kto")
    with pytest.raises(DataError, match=r"format messages holds no pairs of answers, and train.stage = reward compares"):
        find(write("a.jsonl", CHAT), stage="reward")


def test_fields_are_renamed_before_the_format_is_decided(write, reports):
    path = write("a.jsonl", {"content": "a", "text": "b", "id": 1})
    found = find(path, fields={"text": "content"}, report=reports.append)
    assert found.format == "text"
    assert reports == [f"{path}: 1 file, format text (by the keys of its first record); not used: id, text"]
    swapped = write("b.jsonl", {"response": "question", "prompt": "answer"})
    assert find(swapped, "sft", fields={"prompt": "response", "response": "prompt"}).format == "prompt_response"


def test_fields_that_fit_no_record_or_no_format_are_refused_with_those_that_do(write):
    path = write("a.jsonl", {"contents": "a", "id": 1})
    with pytest.raises(DataError, match=r"takes `text` from `content`, which the first record lacks.*is `contents` meant"):
        find(path, fields={"text": "content"})
    with pytest.raises(DataError, match=r"maps to `txt`, which no format reads; they read .*text"):
        find(path, fields={"txt": "contents"})
    with pytest.raises(DataError, match=r"maps to `prompt`, which format text does not read; it reads text"):
        find(path, format="text", fields={"prompt": "contents"})


def test_rename_moves_keys_and_guesses_nothing():
    record = {"a": 1, "text": 2, "b": 3}
    assert rename(record, {}) is record
    assert rename(record, {"text": "a"}) == {"text": 1, "b": 3}
    assert rename(record, {"text": "absent"}) == {"a": 1, "b": 3}
    assert rename(record, {"a": "b", "b": "a"}) == {"a": 3, "b": 1, "text": 2}
    assert record == {"a": 1, "text": 2, "b": 3}


# --- Tokens


@pytest.mark.parametrize("name", ["c_text.idx", "c_text.bin", "c_text", "c_*"])
def test_a_corpus_of_tokens_is_found_by_either_file_or_its_stem(write, tmp_path, reports, name):
    write("c_text.bin", raw=b"\0\0")
    index = write("c_text.idx", raw=INDEX)
    found = find(tmp_path / name, report=reports.append)
    assert (found.files, found.kind, found.format) == ((index,), "tokens", "tokens")
    assert reports == [f"{tmp_path / name}: 1 file, format tokens (by its name)"]
    assert find(tmp_path / name, format="tokens").files == (index,)


def test_a_corpus_of_tokens_that_cannot_be_used_is_refused(write):
    path = write("a.idx", raw=INDEX)
    with pytest.raises(DataError, match=r"a\.bin: is missing.*Copy both"):
        find(path)
    write("a.bin", raw=b"")
    with pytest.raises(DataError, match=r"no assistant turns.*train.stage=pretrain"):
        find(path, stage="sft")
    with pytest.raises(DataError, match="not records of format text"):
        find(path, format="text")
    with pytest.raises(DataError, match=r"no keys. Remove `fields`"):
        find(path, fields={"text": "a"})
    with pytest.raises(DataError, match="is not a Megatron index"):
        find(write("a.idx", raw=b"other"))
    for other in (write("a.jsonl", GOOD), write("noname", raw=b"x")):
        with pytest.raises(DataError, match=r"format tokens is read from the \.idx and \.bin"):
            find(other, format="tokens")


# --- Folders of `datasets`


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": [f"number {n}" for n in range(25)]})
    data.save_to_disk(str(folder / "one"), num_shards=12)
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(folder / "two"))
    return folder


def test_a_saved_folder_is_read_in_the_order_of_its_rows(saved):
    found = find(saved / "one")
    assert (found.kind, len(found.files)) == ("arrow", 12)
    assert texts(found) == [f"number {n}" for n in range(25)]


def test_a_saved_folder_with_splits_needs_one_of_them(saved):
    assert texts(find(saved / "two", split="test")) == ["number 0", "number 1", "number 2"]
    with pytest.raises(DataError, match=r"without `split`, but the folder holds the splits train, test. Write `split: train`"):
        find(saved / "two")
    with pytest.raises(DataError, match="`split: dev`, but"):
        find(saved / "two", split="dev")
    with pytest.raises(DataError, match=r"holds a single data set. Remove `split`"):
        find(saved / "one", split="train")
    with pytest.raises(DataError, match="`subset: x` is for a hub id"):
        find(saved / "one", subset="x")


def test_a_saved_folder_that_is_no_plain_table_is_refused(write, tmp_path):
    write("d/state.json", raw=b'{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(DataError, match="flatten_indices"):
        find(tmp_path / "d")
    write("d/state.json", raw=b'{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(DataError, match=r"a\.arrow is missing; copy the whole folder"):
        find(tmp_path / "d")
    for raw in (b"{", b"[]"):
        write("d/state.json", raw=raw)
        with pytest.raises(DataError, match=r"state\.json: .*save_to_disk"):
            find(tmp_path / "d")


# --- The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers, without one."""
    monkeypatch.chdir(tmp_path)
    calls = []
    session = SimpleNamespace(head=lambda url, timeout: calls.append((url, timeout)))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_a_hub_id_is_read_from_the_files_that_datasets_caches(hub, saved, monkeypatch):
    cached = [{"filename": str(file)} for file in find(saved / "one").files]

    def load_dataset(path, name, split):
        hub.append((path, name, split))
        return SimpleNamespace(cache_files=cached)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = find("owner/some-name_v1.1", subset="en")
    assert texts(found) == [f"number {n}" for n in range(25)]
    assert hub == [(huggingface_hub.constants.ENDPOINT, 5), ("owner/some-name_v1.1", "en", "train")]
    find("owner/name", split="test")
    assert hub[-1] == ("owner/name", None, "test")
    with pytest.raises(DataError, match=r"`split: train\[:10%\]` is an expression.*`max_samples`"):
        find("owner/name", split="train[:10%]")


def test_what_the_hub_refuses_is_told(hub, monkeypatch):
    def refuse(error):
        def load_dataset(*args, **settings):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    refuse(datasets.exceptions.DatasetNotFoundError("x"))
    with pytest.raises(DataError, match=r"owner/name: no file here, and no data set on the hub.*hf auth login"):
        find("owner/name")
    refuse(ValueError("Unknown split 'dev'.\n Should be one of ['train']"))
    with pytest.raises(
        DataError, match=r"split dev\): ValueError: Unknown split 'dev'. Should be one of \['train'\]\. Correct"
    ):
        find("owner/name", split="dev")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package `datasets`.*pip install datasets"):
        find("owner/name")


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no such file \(/.*127\.0\.0\.1:9 does not answer \(.*Correct the path.*save_to_disk"):
        find("owner/name")
    assert time.monotonic() - start < 10


def test_offline_only_the_cache_counts_and_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(DataError, match="ds-trainer-tests/none"):
        find("ds-trainer-tests/none")
    assert hub == []
    assert time.monotonic() - start < 10
