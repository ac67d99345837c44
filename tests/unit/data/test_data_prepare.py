import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import time

import pytest

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data import cache, prepare, readers, store
from ds_trainer.data import rows as rows_module
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.errors import DataError
from ds_trainer.protocols import IGNORED

FORK = multiprocessing.get_context("fork")
CHATS = [
    {"prompt": "two plus two?", "response": "four"},
    {"prompt": "Repeat after me: the answer is four", "response": "the answer is four"},
    {"messages": None, "prompt": "hello", "response": "hello, how are you?"},
]
TEXTS = [{"text": "The answer is four. " * n} for n in range(1, 30)]
BAD = "{not json"


@pytest.fixture
def cache_folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def prepare_text(tokenizer, cache_folder, reports):
    """Prepare sources, given as paths or as Source; settings of `data` and of the call may be replaced."""

    def call(*given, stage="pretrain", seq_len=64, tokenizer=tokenizer, cache_folder=cache_folder, more=None, **settings):
        given = [each if isinstance(each, Source) else Source(path=str(each)) for each in given]
        data = DataSection(sources=given, seq_len=seq_len, **settings)
        reports.clear()
        options = {"seq_len": seq_len, "cache_folder": cache_folder, "report": reports.append, "workers": 0} | (more or {})
        return prepare_rows(data, given, stage, tokenizer, **options)

    return call


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few records, so that a small file has many."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 150)
    monkeypatch.setattr(readers, "CHUNK_RECORDS", 3)


def names(cache_folder, kind):
    return sorted(path.name for path in cache_folder.iterdir() if path.name.startswith(kind) and path.is_dir())


def as_rows(rows):
    """ids, labels and positions of each row, without the tail."""
    batch = rows.read(range(rows.num_rows))
    return [
        tuple(each[row][batch.is_token[row]].tolist() for each in (batch.input_ids, batch.labels, batch.position_ids))
        for row in range(rows.num_rows)
    ]


def texts_of(rows, tokenizer):
    """The documents of all rows, decoded, sorted."""
    found = []
    for ids, _, positions in as_rows(rows):
        starts = [at for at, position in enumerate(positions) if position == 0]
        found += [tokenizer.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return sorted(found)


def test_texts_become_full_rows_of_all_their_tokens(write, prepare_text, tokenizer, reports):
    rows = prepare_text(write("a.jsonl", *TEXTS))
    expected = sum(len(tokenizer(record["text"])["input_ids"]) + 1 for record in TEXTS)
    assert rows.num_tokens == expected
    assert sum(len(ids) for ids, _, _ in as_rows(rows)) == expected
    assert sum(label != IGNORED for _, labels, _ in as_rows(rows) for label in labels) == rows.num_targets
    assert rows.max_token_id == max(token for ids, _, _ in as_rows(rows) for token in ids)
    [store] = rows.pools[0].stores
    assert store.dtype == "uint16"
    assert f"29 samples of {expected:,} tokens: {rows.num_rows} rows of 64" in reports[-1]
    assert "overlong split" in reports[-1]
    assert store.meta["read"] == store.meta["documents"] == 29
    assert sum(store.meta["lengths"]) == 29


def test_conversations_train_the_answers_only(write, prepare_text, tokenizer):
    rows = prepare_text(write("a.jsonl", *CHATS), stage="sft", packing=False, seq_len=128)
    answers = []
    for _, labels, _ in as_rows(rows):
        answers.append(tokenizer.decode([label for label in labels if label != IGNORED]))
    assert sorted(answers) == sorted(f"{record['response']}</s>" for record in CHATS)
    assert rows.num_rows == 3


def test_a_second_start_opens_what_the_first_has_written(write, prepare_text, cache_folder, monkeypatch, reports):
    path = write("a.jsonl", *TEXTS)
    first = prepare_text(path)
    summary = reports[-1]

    def fail(*arguments, **named):
        raise AssertionError("nothing is to be built")

    for name in ("StoreWriter", "write_rows", "read_chunks"):
        monkeypatch.setattr(prepare, name, fail)
    again = prepare_text(path)
    assert as_rows(again) == as_rows(first)
    assert again.fingerprint == first.fingerprint
    assert (again.num_tokens, again.num_targets) == (first.num_tokens, first.num_targets)
    assert reports[-1] == summary


def test_a_copy_of_the_data_elsewhere_is_the_same_data(write, prepare_text, cache_folder):
    prepare_text(write("a.jsonl", *TEXTS))
    prepare_text(write("moved/b.jsonl", *TEXTS))
    assert len(names(cache_folder, "tokens_")) == 1


def test_whatever_changes_tokens_makes_a_new_cache_and_what_does_not_does_not(
    write, prepare_text, make_tokenizer, tmp_path, cache_folder
):
    path = write("a.jsonl", *CHATS)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role + '\n' + m.content + '</s>\n' }}{% endfor %}")

    def count_after(**settings):
        source = {name: settings.pop(name) for name in ("weight", "max_samples", "format") if name in settings}
        prepare_text(Source(path=str(path), **source), stage="sft", **settings)
        return len(names(cache_folder, "tokens_"))

    assert count_after() == 1
    assert count_after(seq_len=32) == 1  # only the rows change
    assert count_after(packing=False) == 1
    assert count_after(overlong="drop") == 1
    assert len(names(cache_folder, "rows_")) == 4
    assert count_after(weight=2.0) == 1
    assert count_after(on_bad_record="skip", max_bad_fraction=0.5) == 1
    assert count_after(format="prompt_response") == 1  # what `auto` found
    assert count_after(more={"workers": 1}) == 1
    assert len(names(cache_folder, "rows_")) == 4
    assert count_after(chat_template=str(template)) == 2
    template.write_text(template.read_text().replace("</s>", "</s></s>"))
    assert count_after(chat_template=str(template)) == 3
    assert count_after(tokenizer=make_tokenizer(eos_token="<|im_end|>")) == 4
    assert count_after(train_on="all") == 5
    assert count_after(max_samples=2) == 6
    write("a.jsonl", *CHATS, CHATS[0])
    assert count_after() == 7


def test_the_same_bytes_as_text_and_as_records_are_not_the_same_data(write, prepare_text, cache_folder):
    line = json.dumps(TEXTS[0])
    prepare_text(write("a.jsonl", line))
    prepare_text(write("a.txt", line))
    assert len(names(cache_folder, "tokens_")) == 2


def test_bad_records_of_reading_rendering_and_masking_are_listed_together(write, prepare_text, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% if messages[0].content == 'boom' %}{{ raise_exception('boom') }}{% endif %}{% for m in messages %}"
        "{{ m.role + ': ' }}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    path = write(
        "a.jsonl",
        {"prompt": "(a)", "response": "(b)"},
        {"prompt": "(a)"},
        {"prompt": "boom", "response": "(b)"},
        {"prompt": "(a)", "response": "four"},  # ` four` is one token, whose space belongs to the header
    )
    with pytest.raises(DataError) as caught:
        prepare_text(path, stage="sft", chat_template=str(template))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}: 3 bad records. Mend them, or leave them out with data.on_bad_record=skip")
    assert lines[1].startswith(f"  {path}:2: the key `response` is missing")
    assert lines[2].startswith(f"  {path}:3: the chat template refuses the conversation")
    assert lines[3].startswith(f"  {path}:4: ambiguous mask")


def test_an_answer_beyond_seq_len_is_dropped_and_counted(write, prepare_text, reports):
    long = {"prompt": "two plus two? " * 30, "response": "four"}
    path = write("a.jsonl", *CHATS, long)
    rows = prepare_text(path, stage="sft", seq_len=50, max_untrained_fraction=0.25)
    assert "1 overlong truncated" in reports[-1]
    assert "1 dropped without a target" in reports[-1]
    assert sum(position == 0 for _, _, positions in as_rows(rows) for position in positions) == 3
    with pytest.raises(DataError, match=r"1 of 4 samples \(25\.0%\) have no token left .* allows 24\.0%"):
        prepare_text(path, stage="sft", seq_len=50, max_untrained_fraction=0.24)


def test_no_row_left_is_refused_with_the_counts(write, prepare_text):
    path = write("a.jsonl", {"text": "four " * 50}, {"text": ""})
    with pytest.raises(DataError, match=r"no row is left .* of 1 samples 1 are longer than seq_len 8 \(overlong: drop\)"):
        prepare_text(path, seq_len=8, overlong="drop")
    with pytest.raises(DataError, match=r"no row is left .* pieces have no token to predict"):
        prepare_text(path, seq_len=1)
    with pytest.raises(DataError, match=r"b\.jsonl: no record is left to train on, of 2 \(2 empty texts\)"):
        prepare_text(write("b.jsonl", {"text": ""}, {"text": ""}))


def test_a_file_that_changes_while_it_is_read_is_refused(write, prepare_text, cache_folder, monkeypatch):
    path = write("a.jsonl", *TEXTS)

    def read_while_it_grows(source):
        for chunk in readers.read_chunks(source):
            with open(path, "a") as file:
                file.write(" ")
            yield chunk

    monkeypatch.setattr(prepare, "read_chunks", read_while_it_grows)
    with pytest.raises(DataError, match=f"{path}: changed while it was read"):
        prepare_text(path)
    assert names(cache_folder, "tokens_") == []


def test_a_file_that_vanishes_while_it_is_read_is_refused_by_its_name(write, prepare_text, monkeypatch, small_chunks):
    path = write("a.jsonl", *TEXTS)

    def read_and_remove(source):
        for chunk in readers.read_chunks(source):
            path.unlink(missing_ok=True)
            yield chunk

    monkeypatch.setattr(prepare, "read_chunks", read_and_remove)
    with pytest.raises(DataError, match=f"{path}: changed while it was read"):
        prepare_text(path)


def test_a_file_that_vanishes_before_it_is_read_is_refused_by_its_name(write, prepare_text, monkeypatch):
    first, second = write("a.jsonl", *TEXTS), write("b.jsonl", *TEXTS)
    describe = prepare.describe_files

    def describe_and_remove(paths, memory):
        described = describe(paths, memory)
        second.unlink()
        return described

    monkeypatch.setattr(prepare, "describe_files", describe_and_remove)
    with pytest.raises(DataError, match=rf"{second}: .*No such file"):
        prepare_text(first.parent / "*.jsonl")


def test_a_large_vocabulary_takes_four_bytes_a_token(write, prepare_text, tokenizer):
    path, small = write("a.jsonl", {"text": "four <extra>"}), len(tokenizer)
    for size, dtype in ((65_500, "uint16"), (65_501, "int32")):
        tokenizer.add_tokens([f"<extra {n}>" for n in range(len(tokenizer), size - 1)] + [f"<extra{size}>"])
        assert len(tokenizer) == size
        write("a.jsonl", {"text": f"four <extra{size}>"})
        rows = prepare_text(path, tokenizer=tokenizer)
        assert rows.pools[0].stores[0].dtype == dtype
        assert rows.max_token_id == size - 1 > small


def refused(call, *arguments, **settings):
    with pytest.raises(DataError) as caught:
        call(*arguments, **settings)
    return str(caught.value).splitlines()


def test_the_first_bad_records_are_shown_together_with_their_lines(write, prepare_text):
    path = write("a.jsonl", *(BAD if n % 2 else TEXTS[0] for n in range(16)))
    lines = refused(prepare_text, path)
    assert lines[0].startswith(f"{path}: 8 bad records (8 invalid JSON); the first 5. Mend them, or leave them out with ")
    assert [line.partition(": not valid JSON")[0] for line in lines[1:]] == [f"  {path}:{n}" for n in (2, 4, 6, 8, 10)]


def test_a_source_is_refused_before_it_is_read_to_its_end_unless_all_problems_are_asked_for(write, prepare_text, small_chunks):
    path = write("a.jsonl", *(BAD if n % 2 else TEXTS[0] for n in range(400)))
    early = refused(prepare_text, path)[0]
    assert 5 <= int(early.split(": ")[1].split()[0]) < 20
    store = prepare_text(path, more={"all_problems": True}).pools[0].stores[0]
    assert [each["line"] for each in store.meta["bad_records"]] == list(range(2, 401, 2))
    assert f"{path}: 200 bad records (200 invalid JSON); the first 5." in refused(prepare_text, path)[0]


def test_bad_records_are_left_out_up_to_the_limit_and_listed(write, prepare_text, tokenizer, reports):
    good = [f"number {n}" for n in range(99)]
    path = write("a.jsonl", *({"text": text} for text in good[:40]), BAD, *({"text": text} for text in good[40:]))
    rows = prepare_text(Source(path=str(path), format="text"), on_bad_record="skip", max_bad_fraction=0.01)
    assert texts_of(rows, tokenizer) == sorted(f"{text}</s>" for text in good)
    assert "; 1 bad record left out" in reports[-1]
    meta = rows.pools[0].stores[0].meta
    assert (meta["read"], meta["bad"], meta["bad_by_reason"]) == (100, 1, {"invalid JSON": 1})
    assert [(each["path"], each["line"]) for each in meta["bad_records"]] == [(str(path), 41)]
    assert rows.pools[0].stores[0].line(40) == 42

    lines = refused(prepare_text, path, on_bad_record="skip", max_bad_fraction=0.0099)
    assert "1 bad record. That is 1.00% of the 100 records, and data.max_bad_fraction allows 0.99%" in lines[0]
    assert lines[1].startswith(f"  {path}:41: not valid JSON")


def test_a_cache_built_with_skip_is_refused_where_bad_records_are_errors_and_the_other_way_round(
    write, prepare_text, cache_folder
):
    path = write("a.jsonl", *TEXTS, BAD)
    skip = {"on_bad_record": "skip", "max_bad_fraction": 0.1}
    prepare_text(path, **skip)
    lines = refused(prepare_text, path)
    assert lines[0].startswith(f"{path}: 1 bad record. Mend it")
    assert lines[1].startswith(f"  {path}:30: not valid JSON")
    assert refused(prepare_text, path, on_bad_record="skip", max_bad_fraction=0.01)
    assert prepare_text(path, **skip).num_rows > 0
    assert len(names(cache_folder, "tokens_")) == 1

    other = write("b.jsonl", *TEXTS[:20], BAD)
    assert refused(prepare_text, other)
    assert prepare_text(other, **skip).pools[0].stores[0].meta["documents"] == 20


@pytest.mark.parametrize("bad", [0, 5])
def test_a_large_source_of_bad_records_is_refused_early_with_its_share(write, prepare_text, monkeypatch, small_chunks, bad):
    monkeypatch.setattr(prepare, "_EARLY_VERDICT_RECORDS", 50)
    path = write("a.jsonl", *([BAD] * bad + [TEXTS[0]] * (10 - bad)) * 100)
    if bad:
        verdict = refused(prepare_text, path, on_bad_record="skip", max_bad_fraction=0.3)[0]
        assert "records read so far, and data.max_bad_fraction allows 30.00%" in verdict
        assert int(verdict.split(" records read so far")[0].split()[-1]) < 70
    else:
        assert prepare_text(path, on_bad_record="skip", max_bad_fraction=0.3).num_rows > 0


@pytest.mark.parametrize("wanted", [1, 3, 4, 10, 28, 29, 1000])
def test_only_the_first_samples_are_taken(write, prepare_text, tokenizer, small_chunks, wanted):
    records = [{"text": f"number {n}"} for n in range(29)]
    rows = prepare_text(Source(path=str(write("a.jsonl", *records)), max_samples=wanted))
    assert texts_of(rows, tokenizer) == sorted(f"number {n}</s>" for n in range(min(wanted, 29)))
    assert rows.pools[0].stores[0].meta["read"] == min(wanted, 29)


def test_weights_make_a_pool_of_each_source_and_none_makes_one_of_all(write, prepare_text, tokenizer):
    paths = [write("a.jsonl", *({"text": f"a {n}"} for n in range(9))), write("b.jsonl", {"text": "b 0"}, {"text": "b 1"})]
    together = prepare_text(*paths)
    assert [len(pool.stores) for pool in together.pools] == [2]
    assert together.weights == ()
    apart = prepare_text(*(Source(path=str(path), weight=weight) for path, weight in zip(paths, (0.7, 0.3), strict=True)))
    assert [pool.stores[0].meta["path"] for pool in apart.pools] == [str(path) for path in paths]
    assert apart.weights == (0.7, 0.3)
    assert texts_of(apart, tokenizer) == texts_of(together, tokenizer)
    first = apart.pools[0].num_rows
    a_rows = apart.read(range(first))
    assert all("b" not in tokenizer.decode(ids) for ids in a_rows.input_ids)
    assert len({together.fingerprint, apart.fingerprint}) == 2


def test_sources_of_different_formats_and_files_train_together(write, prepare_text, tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from json lines"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"content": ["from parquet", "more of it"]}), tmp_path / "b.parquet")
    rows = prepare_text(
        tmp_path / "a.jsonl.gz",
        Source(path=str(tmp_path / "b.parquet"), fields={"text": "content"}),
        write("c.csv", "id,text", '1,"from, csv"'),
        write("d.txt", "from a text file"),
        write("e.json", '[{"text": "from a list"}]'),
    )
    expected = ["from a list", "from a text file\n", "from json lines", "from parquet", "from, csv", "more of it"]
    assert texts_of(rows, tokenizer) == sorted(f"{text}</s>" for text in expected)
    assert [store.meta["format"] for store in rows.pools[0].stores] == ["text"] * 5


def test_conversations_of_different_formats_train_together(write, prepare_text, tokenizer):
    rows = prepare_text(
        write("a.jsonl", CHATS[0]),
        write("b.jsonl", {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}),
        Source(path=str(write("c.jsonl", {"q": "more?", "a": "yes"})), fields={"prompt": "q", "response": "a"}),
        stage="sft",
        packing=False,
    )
    answers = sorted(tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels, _ in as_rows(rows))
    assert answers == ["four</s>", "hello</s>", "yes</s>"]


def test_several_processes_write_the_very_same_files(write, prepare_text, tmp_path, monkeypatch, small_chunks):
    path = write("a.jsonl", *TEXTS * 2)
    for folder, workers in (("one", 0), ("two", 2)):
        prepare_text(path, cache_folder=tmp_path / folder, more={"workers": workers})
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() and path.suffix not in (".lock", ".json")) or path.name == "meta.json"
    }


def _prepare_until(call, path, after, started):
    """Prepare, and stop for ever before chunk number `after` is written."""
    written, append = [], prepare.StoreWriter.append

    def append_until(writer, chunk):
        if len(written) == after:
            started.set()
            time.sleep(60)
        written.append(chunk)
        append(writer, chunk)

    prepare.StoreWriter.append = append_until
    prepare._KEEP_SECONDS = 0.0
    call(path, stage="sft")


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_work_that_was_killed_goes_on_from_the_last_point_kept_and_ends_the_same(
    write, prepare_text, tmp_path, reports, monkeypatch, small_chunks, after
):
    records = [CHATS[n % 3] | {"prompt": f"question {n}"} for n in range(28)]
    records[12] = CHATS[0] | {"response": None}
    path = write("a.jsonl", *records)
    skip = {"on_bad_record": "skip", "max_bad_fraction": 0.1}
    clean = prepare_text(path, stage="sft", cache_folder=tmp_path / "clean", **skip)
    chunks = clean.pools[0].stores[0].meta["chunks"]
    assert chunks >= 10

    def call(path, **settings):
        return prepare_text(path, **skip, **settings)

    killed_after = 0
    for stop in [after] if after < 9 else [2, 3, 4]:  # the last one is killed again and again
        killed_after += stop
        started = FORK.Event()
        builder = FORK.Process(target=_prepare_until, args=(call, path, stop, started))
        builder.start()
        assert started.wait(30)
        os.kill(builder.pid, signal.SIGKILL)
        builder.join(10)
        assert names(tmp_path / "cache", "tokens_") == []

    written, append = [], prepare.StoreWriter.append
    monkeypatch.setattr(prepare.StoreWriter, "append", lambda self, chunk: (written.append(chunk), append(self, chunk)))
    rows = call(path, stage="sft")
    assert len(written) == chunks - killed_after
    taken_up = [line for line in reports if line.startswith("taken up after ")]
    assert len(taken_up) == (killed_after > 0)
    assert as_rows(rows) == as_rows(clean)
    assert rows.fingerprint == clean.fingerprint
    assert digests(tmp_path / "cache") == digests(tmp_path / "clean")
    assert not list((tmp_path / "cache").glob(".*"))


def _prepare_until_call(call, path, owner, name, number, started):
    calls, original = [], getattr(owner, name)

    def hang_at_last(*arguments, **named):
        calls.append(name)
        if len(calls) == number:
            started.set()
            time.sleep(60)
        return original(*arguments, **named)

    setattr(owner, name, hang_at_last)
    call(path, stage="sft")


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (store, "write_index", 1),  # of the tokens: before the index,
        (cache, "_sync", 1),  # whole but not yet on the disk,
        (cache, "_sync", 8),  # published, and the name not yet on the disk
        (prepare, "write_rows", 1),
        (rows_module, "pack", 1),
        (cache, "_sync", 13),
    ],
    ids=str,
)
def test_a_build_killed_at_any_other_point_ends_the_same_after_another_start(
    write, prepare_text, tmp_path, owner, name, number
):
    path = write("a.jsonl", *CHATS * 9)
    prepare_text(path, stage="sft", cache_folder=tmp_path / "clean")
    started = FORK.Event()
    builder = FORK.Process(target=_prepare_until_call, args=(prepare_text, path, owner, name, number, started))
    builder.start()
    assert started.wait(30)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(10)
    prepare_text(path, stage="sft")
    assert digests(tmp_path / "cache") == digests(tmp_path / "clean")
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("damage", ["progress", "short file", "missing file"])
def test_what_a_killed_builder_left_is_not_trusted_when_it_is_damaged(
    write, prepare_text, tmp_path, reports, small_chunks, damage
):
    path = write("a.jsonl", *CHATS * 9)
    prepare_text(path, stage="sft", cache_folder=tmp_path / "clean")
    started = FORK.Event()
    builder = FORK.Process(target=_prepare_until, args=(prepare_text, path, 4, started))
    builder.start()
    assert started.wait(30)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(10)
    [left] = (tmp_path / "cache").glob(".tokens_*")
    if damage == "progress":
        (left / "progress.json").write_text("{")
    elif damage == "short file":
        os.truncate(left / "spans.bin", 3)
    else:
        (left / "lines.bin").unlink()
    prepare_text(path, stage="sft")
    assert not [line for line in reports if line.startswith("taken up")]
    assert digests(tmp_path / "cache") == digests(tmp_path / "clean")


def test_the_progress_tells_how_much_is_done_and_reaches_the_end(write, prepare_text, small_chunks):
    shown = []
    paths = [write("a.jsonl", *TEXTS), write("b.jsonl", *TEXTS[:9])]
    prepare_text(paths[0].parent / "*.jsonl", more={"show": lambda share, text: shown.append((share, text))})
    shares = [share for share, _ in shown]
    assert shares == sorted(shares)
    assert (len(shares) > 5, shares[0] < 0.5, shares[-1]) == (True, True, 1.0)
    assert "38 records, " in shown[-1][1]
    assert all(word in shown[3][1] for word in ("records/s", "tokens/s", " s left"))


def _prepare_and_send(call, path, queue):
    queue.put(as_rows(call(path)))


def test_four_processes_get_the_same_rows_from_one_cache(write, prepare_text, cache_folder):
    path, queue = write("a.jsonl", *TEXTS), FORK.Queue()
    processes = [FORK.Process(target=_prepare_and_send, args=(prepare_text, path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert results.count(results[0]) == 4
    assert len(names(cache_folder, "tokens_")) == len(names(cache_folder, "rows_")) == 1


def test_starts_at_once_with_different_settings_do_not_disturb_one_another(write, prepare_text, cache_folder):
    path, results = write("a.jsonl", *TEXTS), FORK.Queue()
    layouts = [(seq_len, packing) for seq_len in (16, 64) for packing in (True, False)]

    def start(seq_len, packing):
        results.put(((seq_len, packing), as_rows(prepare_text(path, seq_len=seq_len, packing=packing))))

    processes = [FORK.Process(target=start, args=layout) for layout in layouts]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert len(names(cache_folder, "tokens_")) == 1
    for layout in layouts:
        again = prepare_text(path, seq_len=layout[0], packing=layout[1], cache_folder=cache_folder.with_name("again"))
        assert found[layout] == as_rows(again)


def test_a_cache_on_a_full_disk_is_an_error_with_the_setting_to_change(write, prepare_text, cache_folder):
    path, refusals = write("a.jsonl", *TEXTS * 10), FORK.Queue()

    def start():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        refusals.put(refused(prepare_text, path))

    process = FORK.Process(target=start)
    process.start()
    [line] = refusals.get(timeout=30)
    process.join(10)
    assert "the cache of tokens cannot be written: File too large. Set data.cache_folder to a folder with room" in line
    assert [name for name in os.listdir(cache_folder) if not name.endswith(".lock")] == []
    assert prepare_text(path).num_rows > 0


def test_a_single_record_and_single_tokens_are_data_too(write, prepare_text):
    rows = prepare_text(write("a.jsonl", {"text": "four"}))
    assert (rows.num_rows, rows.num_targets) == (1, rows.num_tokens - 1)
    rows = prepare_text(write("b.jsonl", *({"text": "x"} for _ in range(50))), seq_len=2)
    assert (rows.num_rows, rows.num_tokens) == (50, 100)


def test_documents_of_one_token_have_nothing_to_predict(write, prepare_text, make_tokenizer):
    path = write("a.jsonl", {"text": "x"}, {"text": "four times four"})
    lines = refused(prepare_text, path, tokenizer=make_tokenizer())
    assert "1 of 2 samples (50.0%) have no token left to train on" in lines[0]


def test_very_many_very_short_documents_are_fast(write, prepare_text):
    path = write("a.jsonl", raw=b'{"text": "four"}\n' * 100_000)
    begun = time.monotonic()
    rows = prepare_text(path, seq_len=2048)
    assert rows.pools[0].stores[0].num_documents == 100_000
    assert rows.num_tokens / (rows.num_rows * 2048) > 0.99
    assert time.monotonic() - begun < 20


def test_an_empty_file_among_others_is_a_bad_record(write, prepare_text):
    write("d/a.jsonl", *TEXTS)
    empty = write("d/b.jsonl", raw=b"")
    write("d/c.jsonl", *TEXTS)
    lines = refused(prepare_text, empty.parent / "*.jsonl")
    assert lines[1].startswith(f"  {empty}: the file is empty")
    rows = prepare_text(empty.parent / "*.jsonl", on_bad_record="skip", max_bad_fraction=0.1)
    meta = rows.pools[0].stores[0].meta
    assert (meta["documents"], meta["bad"], meta["read"]) == (58, 1, 58)


def test_paths_may_hold_any_letters(write, prepare_text, tmp_path):
    path = write("données [1] 数据/a b*.jsonl", *TEXTS)
    assert prepare_text(path, cache_folder=tmp_path / "größe 缓存").num_rows > 0


PLANTED = {
    "invalid JSON": b'{"text": "a",}',
    "NUL byte": b'{"text": "a\x00b"}',
    "invalid UTF-8": b'{"text": "caf\xe9"}',
    "not a finite number": b'{"text": "a", "score": NaN}',
    "number too long": b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    "duplicate key": b'{"text": "a", "text": "b"}',
    "not an object": b'["text"]',
    "nested too deeply": b"[" * 100_000,
    "line too long": b'{"text": "' + b"x" * (3 << 20) + b'"}',
    "missing key": b'{"body": "a"}',
    "wrong type": b'{"text": ["a"]}',
    "null content": b'{"text": null}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
}


def test_fourteen_kinds_of_defects_in_a_hundred_thousand_lines_are_all_found_and_none_invented(
    write, prepare_text, monkeypatch
):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2 << 20)
    lines = [b'{"text": "four"}'] * 100_000
    places = {}
    for number, (reason, line) in enumerate(PLANTED.items()):
        for place in (number, 7_000 * number + 777, 99_900 + number):  # at the start, in between, near the end
            lines[place] = line
            places[place + 1] = reason
    path = write("planted.jsonl", raw=b"\n".join(lines) + b'\n{"text": "cut')
    places[100_001] = "truncated last line"
    rows = prepare_text(Source(path=str(path), format="text"), on_bad_record="skip", max_bad_fraction=0.01)
    meta = rows.pools[0].stores[0].meta
    assert {each["line"]: each["reason"] for each in meta["bad_records"]} == places
    assert len(set(places.values())) == 14
    assert (meta["read"], meta["documents"], meta["bad"]) == (100_001, 100_001 - len(places), len(places))
