"""Pairs of answers, from the record to the row."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data import rows as rows_module
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.errors import DataError
from ds_trainer.model.attention import arrange

PAIRS = [
    {"prompt": f"question {n}?", "chosen": "four " * (1 + n % 4) + str(n), "rejected": "five" + " five" * (n % 3)}
    for n in range(23)
]


@pytest.fixture
def prepare_pairs(tokenizer, tmp_path, reports):
    def call(path, *, stage="dpo", seq_len=64, tokenizer=tokenizer, max_samples=None, **settings):
        sources = [Source(path=str(path), max_samples=max_samples)]
        data = DataSection(sources=sources, seq_len=seq_len, **settings)
        options = {"seq_len": seq_len, "cache_folder": tmp_path / "cache", "report": reports.append, "workers": 0}
        return prepare_rows(data, sources, stage, tokenizer, **options)

    return call


def documents(rows, tokenizer):
    """The documents of each row: text, and text of the targets."""
    found = []
    for row in range(rows.num_rows):
        batch = rows.read([row])
        length = int(batch.is_token.sum())
        ids, labels, places = (each[0, :length].tolist() for each in (batch.input_ids, batch.labels, batch.position_ids))
        starts = [at for at, place in enumerate(places) if place == 0] + [length]
        found.append(
            [
                (
                    tokenizer.decode(ids[begin:end]),
                    tokenizer.decode([label for label in labels[begin:end] if label >= 0]),
                )
                for begin, end in pairwise(starts)
            ]
        )
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_pair_is_two_documents_of_one_row_in_their_order_with_the_answers_as_targets(
    write, prepare_pairs, tokenizer, packing, reports, monkeypatch
):
    monkeypatch.setattr(rows_module, "PACKED_TOGETHER", 8)  # the border of a block splits no pair either
    rows = prepare_pairs(write("a.jsonl", *PAIRS), packing=packing, seq_len=160)
    seen = []
    for row in documents(rows, tokenizer):
        assert len(row) % 2 == 0
        for (chosen, good), (rejected, bad) in zip(row[::2], row[1::2], strict=True):
            number = int(chosen.split("question ")[1].split("?")[0])
            assert f"question {number}?" in rejected
            assert (good, bad) == (PAIRS[number]["chosen"] + "</s>", PAIRS[number]["rejected"] + "</s>")
            seen.append(number)
    assert sorted(seen) == list(range(23))
    assert (rows.num_rows < 15) == packing
    assert "23 samples of" in reports[-1]
    arranged = arrange(rows.read(range(rows.num_rows)), "documents")
    assert arranged.num_sequences == 46
    assert int(arranged.sequence_lengths.sum()) == arranged.num_targets


def test_the_sequences_of_a_batch_are_counted_alike_with_and_without_padding(write, prepare_pairs):
    rows = prepare_pairs(write("a.jsonl", *PAIRS))
    batch = rows.read([*range(rows.num_rows), None])
    flat, padded = arrange(batch, "documents"), arrange(batch, "sdpa")
    assert flat.sequence_lengths.tolist() == padded.sequence_lengths.tolist()
    assert flat.targets.tolist() == padded.targets.tolist()
    assert arrange(rows.read([None]), "documents").num_sequences == 0


@pytest.mark.parametrize(("pad", "last"), [("</s>", -2), ("<|im_end|>", -1), (None, -1)])
def test_a_value_is_read_at_the_last_token_that_is_no_padding(write, prepare_pairs, make_tokenizer, tmp_path, pad, last):
    tokenizer = make_tokenizer(eos_token="</s>", **({"pad_token": pad} if pad else {}))
    template = tmp_path / "ends.jinja"  # with the end-of-text token, not with a line break after it
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    path = write("a.jsonl", *PAIRS[:2])
    rows = prepare_pairs(path, stage="reward", tokenizer=tokenizer, chat_template=str(template))
    for row in range(rows.num_rows):
        batch = arrange(rows.read([row]), "documents")
        assert batch.sequence_lengths.tolist() == [1] * batch.num_sequences
        ids, positions = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0].tolist()
        starts = [at for at, place in enumerate(positions) if place == 0] + [len(positions)]
        assert (batch.target_positions + 1).tolist() == [end + last for end in starts[1:]]
        assert batch.targets.tolist() == ids[batch.target_positions + 1].tolist()


def test_dpo_and_orpo_share_their_tokens_and_reward_has_its_own(write, prepare_pairs, tmp_path):
    path = write("a.jsonl", *PAIRS)
    prints = {stage: prepare_pairs(path, stage=stage).fingerprint for stage in ("dpo", "orpo", "simpo", "reward")}
    assert prints["dpo"] == prints["orpo"] == prints["simpo"] != prints["reward"]
    assert len([each for each in (tmp_path / "cache").iterdir() if each.name.startswith("tokens_") and each.is_dir()]) == 2


def test_max_samples_counts_pairs(write, prepare_pairs, tokenizer):
    rows = prepare_pairs(write("a.jsonl", *PAIRS), max_samples=5)
    assert sum(len(row) for row in documents(rows, tokenizer)) == 10


LONG = "the question is " * 40
BAD = {
    "chosen alone": ({"prompt": "a", "chosen": "b"}, "the key `rejected` is missing"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are equal"),
    "empty prompt": ({"prompt": " ", "chosen": "b", "rejected": "c"}, "`prompt` is empty"),
    "empty answer": ({"prompt": "a", "chosen": "b", "rejected": " "}, "the assistant's, is empty"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "c"}, "`chosen` is null"),
    "long prompt": ({"prompt": LONG, "chosen": "b", "rejected": "c"}, "and a row has 64 .data.seq_len., so no answer has room"),
    "equal tokens": (
        {"prompt": "a", "chosen": "b", "rejected": "b "},
        "become the same tokens, so there is nothing to prefer",
    ),
}


@pytest.mark.parametrize(("record", "why"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_bad_pair_is_refused_with_its_line_and_the_reason(write, prepare_pairs, tmp_path, record, why, stage):
    template = tmp_path / "strips.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}")
    path = write("a.jsonl", PAIRS[0], record)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{why}"):
        prepare_pairs(path, stage=stage, chat_template=str(template))


def test_a_pair_longer_than_a_row_is_dropped_whole_and_many_are_refused(write, prepare_pairs, tokenizer, reports):
    both = {"prompt": "a?", "chosen": "four " * 12, "rejected": "five " * 12}  # either fits, both do not
    path = write("a.jsonl", *PAIRS, both)
    rows = prepare_pairs(path)
    assert sum(len(row) for row in documents(rows, tokenizer)) == 46
    assert "1 overlong dropped" in reports[-1]
    some = write("b.jsonl", *PAIRS[:4], both)
    with pytest.raises(DataError, match=r"1 of 5 records are longer than a row of 64.*write data.overlong=drop"):
        prepare_pairs(some)
    assert sum(len(row) for row in documents(prepare_pairs(some, overlong="drop"), tokenizer)) == 8


def test_messages_are_pairs_too_and_only_what_differs_is_a_target(write, prepare_pairs, tokenizer):
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello world"},
        {"role": "user", "content": "how are you?"},
    ]
    answers = ({"role": "assistant", "content": text} for text in ("Rome", "Paris"))
    chosen, rejected = ([*talk, answer] for answer in answers)
    rows = prepare_pairs(write("a.jsonl", {"chosen": chosen, "rejected": rejected}), seq_len=128)
    assert [target for _, target in documents(rows, tokenizer)[0]] == ["Rome</s>", "Paris</s>"]
