"""Labelled answers, from the record to the batch: each beside its prompt with the answer of another record."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_data_pairs import documents

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.errors import DataError
from ds_trainer.model.attention import arrange
from ds_trainer.protocols import OTHERS, UNUSED, UNWANTED, WANTED

RECORDS = [
    {"prompt": f"question {n}?", "completion": ("four " * (1 + n % 4) + str(n)) if n % 5 else "yes", "label": n % 3 == 0}
    for n in range(23)
]


@pytest.fixture
def prepare_labelled(tokenizer, tmp_path, reports):
    def call(path, *, seq_len=96, **settings):
        data = DataSection(sources=[Source(path=str(path))], seq_len=seq_len, **settings)
        options = {"seq_len": seq_len, "cache_folder": tmp_path / "cache", "report": reports.append, "workers": 0}
        return prepare_rows(data, data.sources, "kto", tokenizer, **options)

    return call


@pytest.mark.parametrize("packing", [True, False])
def test_a_record_is_its_answer_and_its_prompt_with_the_next_other_answer(write, prepare_labelled, tokenizer, packing):
    rows = prepare_labelled(write("a.jsonl", *RECORDS), packing=packing)
    seen = {}
    for row, found in enumerate(documents(rows, tokenizer)):
        kinds = rows.read([row]).kinds.tolist()
        assert len(found) == len(kinds)
        for (own, own_answer), (other, other_answer), kind, other_kind in zip(
            found[::2], found[1::2], kinds[::2], kinds[1::2], strict=True
        ):
            number = int(own.split("question ")[1].split("?")[0])
            assert f"question {number}?" in other
            following = [RECORDS[(number + step) % 23]["completion"] for step in range(1, 23)]
            expected = next(each for each in following if each != RECORDS[number]["completion"])
            assert expected in other_answer
            assert RECORDS[number]["completion"] in own_answer
            assert kind == (WANTED if RECORDS[number]["label"] else UNWANTED)
            assert other_kind == OTHERS
            seen[number] = kind
    assert seen.keys() == set(range(23))


@pytest.mark.parametrize("implementation", ["documents", "sdpa"])
def test_a_batch_trains_the_answers_and_looks_ahead_at_the_others(write, prepare_labelled, implementation):
    rows = prepare_labelled(write("a.jsonl", *RECORDS))
    micro_batch = rows.read([0, 1])
    batch = arrange(micro_batch, implementation)
    kinds = micro_batch.kinds
    assert batch.wanted.tolist() == (kinds[0::2] == WANTED).tolist()
    assert batch.num_wanted == int(batch.wanted.sum())
    assert batch.num_sequences == batch.ahead.num_sequences == len(kinds) // 2
    assert batch.ahead.wanted.all()
    assert batch.num_tokens + batch.ahead.num_tokens == micro_batch.num_tokens
    assert batch.num_targets + batch.ahead.num_targets == int((micro_batch.labels >= 0).sum())
    if implementation == "documents":
        assert batch.num_positions == batch.num_tokens
        lengths = batch.inputs["document_lengths"]
        starts = (batch.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        assert [end - begin for begin, end in pairwise([*starts, batch.num_positions])] == list(lengths)
    moved = batch.to(torch.device("cpu"))
    assert moved.wanted is not None
    assert moved.ahead.num_wanted == batch.ahead.num_wanted
    empty = rows.read([None])
    assert empty.kinds is None
    assert arrange(empty, implementation).ahead is None


def test_without_another_answer_a_record_does_not_count_for_the_divergence(write, prepare_labelled):
    path = write("a.jsonl", *({**record, "completion": "yes"} for record in RECORDS[:3]))
    micro_batch = prepare_labelled(path).read([0])
    assert set(micro_batch.kinds[1::2].tolist()) == {UNUSED}
    assert not arrange(micro_batch, "documents").ahead.wanted.any()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "a", "completion": "b", "label": "yes"}, "`label` is text; it must be true"),
        ({"prompt": "a", "completion": "b", "label": 1}, "`label` is"),
        ({"prompt": "a", "completion": "b"}, "`label`"),
        ({"prompt": "", "completion": "b", "label": True}, "`prompt`"),
        ({"prompt": "a", "completion": "", "label": True}, "the assistant's, is empty"),
        ({"prompt": "word " * 200, "completion": "b", "label": True}, "the prompt takes"),
    ],
    ids=["text", "number", "no label", "no prompt", "no answer", "long prompt"],
)
def test_a_bad_record_is_refused_with_its_line(write, prepare_labelled, record, why):
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as error:
        prepare_labelled(write("a.jsonl", RECORDS[0], record, RECORDS[1]))
    assert why in str(error.value)
