import json
import multiprocessing

import pytest

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data import prepare, sources
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.errors import DataError
from ds_trainer.protocols import IGNORED

CHATS = [
    {"prompt": "two plus two?", "response": "four"},
    {"prompt": "Repeat after me: the answer is four", "response": "the answer is four"},
    {"messages": None, "prompt": "hello", "response": "hello, how are you?"},
]
TEXTS = [{"text": "The answer is four. " * n} for n in range(1, 30)]


@pytest.fixture
def cache_folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def prepare_text(tokenizer, cache_folder, reports):
    """Prepare a source; settings of `data` and of the call may be replaced."""

    def call(path, *, stage="pretrain", seq_len=64, tokenizer=tokenizer, **settings):
        given = [Source(path=str(path))]
        data = DataSection(sources=given, seq_len=seq_len, **settings)
        reports.clear()
        return prepare_rows(data, given, stage, tokenizer, seq_len=seq_len, cache_folder=cache_folder, report=reports.append)

    return call


def names(cache_folder, kind):
    return sorted(path.name for path in cache_folder.iterdir() if path.name.startswith(kind) and path.is_dir())


def all_rows(rows):
    return [rows.row(index) for index in range(rows.num_rows)]


def test_texts_become_full_rows_of_all_their_tokens(write, prepare_text, tokenizer, reports):
    rows = prepare_text(write("a.jsonl", *TEXTS))
    expected = sum(len(tokenizer(record["text"])["input_ids"]) + 1 for record in TEXTS)
    assert rows.num_tokens == expected
    assert sum(row.num_tokens for row in all_rows(rows)) == expected
    assert sum((row.labels != IGNORED).sum() for row in all_rows(rows)) == rows.num_targets
    assert rows.max_token_id == max(row.input_ids.max() for row in all_rows(rows))
    assert rows.tokens.tokens.dtype == "uint16"
    assert f"29 documents of {expected:,} tokens: {rows.num_rows} rows of 64" in reports[-1]
    assert "overlong split" in reports[-1]


def test_conversations_train_the_answers_only(write, prepare_text, tokenizer):
    rows = prepare_text(write("a.jsonl", *CHATS), stage="sft", packing=False, seq_len=128)
    answers = []
    for row in all_rows(rows):
        answers.append(tokenizer.decode(row.labels[row.labels != IGNORED]))
    assert sorted(answers) == sorted(f"{record['response']}</s>" for record in CHATS)
    assert rows.num_rows == 3


def test_a_second_start_opens_what_the_first_has_written(write, prepare_text, cache_folder, monkeypatch, reports):
    path = write("a.jsonl", *TEXTS)
    first = prepare_text(path)
    summary = reports[-1]

    def fail(*arguments, **named):
        raise AssertionError("nothing is to be built")

    for name in ("write_tokens", "write_rows"):
        monkeypatch.setattr(prepare, name, fail)
    again = prepare_text(path)
    assert [row.input_ids.tolist() for row in all_rows(again)] == [row.input_ids.tolist() for row in all_rows(first)]
    assert (again.num_tokens, again.num_targets) == (first.num_tokens, first.num_targets)
    assert reports[-1] == summary


def test_a_copy_of_the_data_elsewhere_is_the_same_data(write, prepare_text, cache_folder):
    prepare_text(write("a.jsonl", *TEXTS))
    prepare_text(write("moved/b.jsonl", *TEXTS))
    assert len(names(cache_folder, "tokens_")) == 1


def test_whatever_changes_tokens_makes_a_new_cache(write, prepare_text, make_tokenizer, tmp_path, cache_folder):
    path = write("a.jsonl", *CHATS)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role + '\n' + m.content + '</s>\n' }}{% endfor %}")

    def count_after(**settings):
        prepare_text(path, stage="sft", **settings)
        return len(names(cache_folder, "tokens_"))

    assert count_after() == 1
    assert count_after(seq_len=32) == 1  # only the rows change
    assert count_after(packing=False) == 1
    assert len(names(cache_folder, "rows_")) == 3
    assert count_after(chat_template=str(template)) == 2
    template.write_text(template.read_text().replace("</s>", "</s></s>"))
    assert count_after(chat_template=str(template)) == 3
    assert count_after(tokenizer=make_tokenizer(eos_token="<|im_end|>")) == 4
    write("a.jsonl", *CHATS, CHATS[0])
    assert count_after() == 5


def test_the_same_bytes_as_text_and_as_records_are_not_the_same_data(write, prepare_text, cache_folder):
    line = json.dumps(TEXTS[0])
    prepare_text(write("a.jsonl", line))
    prepare_text(write("a.txt", line))
    assert len(names(cache_folder, "tokens_")) == 2


def test_bad_records_of_reading_rendering_and_masking_are_listed_together(write, prepare_text, tmp_path, cache_folder):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% if messages[0].content == 'boom' %}{{ raise_exception('boom') }}{% endif %}{% for m in messages %}"
        "{{ m.role + ': ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
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
    assert lines[0] == "3 problems in the data; nothing was started."
    assert lines[1].startswith(f"  {path}:2: the key `response` is missing")
    assert lines[2].startswith(f"  {path}:3: the chat template refuses the conversation")
    assert lines[3].startswith(f"  {path}:4: ambiguous mask")
    assert names(cache_folder, "tokens_") == []


def test_an_answer_beyond_seq_len_is_dropped_and_counted(write, prepare_text, reports):
    long = {"prompt": "two plus two? " * 30, "response": "four"}
    rows = prepare_text(write("a.jsonl", *CHATS, long), stage="sft", seq_len=50)
    assert "1 overlong truncated" in reports[-1]
    assert "1 dropped without a target" in reports[-1]
    assert sum((row.position_ids[: row.num_tokens] == 0).sum() for row in all_rows(rows)) == 3


def test_no_row_left_is_refused_with_the_counts(write, prepare_text):
    path = write("a.jsonl", {"text": "four " * 50}, {"text": ""})
    with pytest.raises(DataError, match=r"no row is left .* of 2 documents 1 are longer than seq_len 8 \(overlong: drop\)"):
        prepare_text(path, seq_len=8, overlong="drop")
    with pytest.raises(DataError, match=r"no row is left .* pieces have no token to predict"):
        prepare_text(path, seq_len=1)
    with pytest.raises(DataError, match="no row is left"):
        prepare_text(write("b.jsonl", {"text": ""}))


def test_a_file_that_changes_while_it_is_read_is_refused(write, prepare_text, cache_folder, monkeypatch):
    path = write("a.jsonl", *TEXTS)

    def read_while_it_grows(source, problems):
        for sample in sources.read_samples(source, problems):
            with open(path, "a") as file:
                file.write(" ")
            yield sample

    monkeypatch.setattr(prepare, "read_samples", read_while_it_grows)
    with pytest.raises(DataError, match=f"{path}: changed while it was read"):
        prepare_text(path)
    assert names(cache_folder, "tokens_") == []


def test_a_large_vocabulary_takes_four_bytes_a_token(write, prepare_text, tokenizer):
    tokenizer.add_tokens([f"<extra {n}>" for n in range(1 << 16)])
    rows = prepare_text(write("a.jsonl", {"text": "four <extra 65535>"}), tokenizer=tokenizer)
    assert rows.tokens.tokens.dtype == "uint32"
    assert rows.max_token_id == tokenizer.convert_tokens_to_ids("<extra 65535>") > 1 << 16


def _prepare_and_send(call, path, queue):
    rows = call(path)
    queue.put([row.input_ids.tolist() for row in all_rows(rows)])


def test_four_processes_get_the_same_rows_from_one_cache(write, prepare_text, cache_folder):
    fork = multiprocessing.get_context("fork")
    path, queue = write("a.jsonl", *TEXTS), fork.Queue()
    processes = [fork.Process(target=_prepare_and_send, args=(prepare_text, path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert results.count(results[0]) == 4
    assert len(names(cache_folder, "tokens_")) == len(names(cache_folder, "rows_")) == 1
