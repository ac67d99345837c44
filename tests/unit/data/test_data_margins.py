"""The margin of a pair, from the record to the batch."""

from __future__ import annotations

import pytest
import torch

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.model.attention import arrange


@pytest.fixture
def prepare_pairs(tokenizer, tmp_path, reports):
    def call(path, stage, **source):
        data = DataSection(sources=[Source(path=str(path), **source)], seq_len=64)
        options = {"seq_len": 64, "cache_folder": tmp_path / "cache", "report": reports.append, "workers": 0}
        return prepare_rows(data, data.sources, stage, tokenizer, **options)

    return call


def record(number, **more):
    return {"prompt": f"question {number}?", "chosen": f"answer {number} " * (1 + number % 3), "rejected": "no", **more}


@pytest.mark.parametrize("key", ["margin", "gap"])
def test_a_margin_stays_with_its_pair(write, prepare_pairs, tokenizer, reports, key):
    margins = [0.25 * (1 + number) if number % 3 != 1 else None for number in range(9)]
    records = [record(number, **({} if margin is None else {key: margin})) for number, margin in enumerate(margins)]
    rows = prepare_pairs(write("a.jsonl", *records), "reward", fields={} if key == "margin" else {"margin": key})
    assert any("6 records with a margin" in line for line in reports)
    seen = {}
    for row in range(rows.num_rows):
        batch = rows.read([None, row])
        texts = tokenizer.decode(batch.input_ids[1][batch.is_token[1]].tolist()).split("question ")[1:]
        given = batch.numbers["margin"]
        assert given.dtype == torch.float64
        assert len(given) == len(texts)
        assert arrange(batch, "documents").numbers["margin"].tolist() == given.tolist()
        for text, chosen, rejected in zip(texts[::2], given[::2].tolist(), given[1::2].tolist(), strict=True):
            seen[int(text.split("?")[0])] = chosen
            assert rejected == 0.0
    assert seen == {number: margin or 0.0 for number, margin in enumerate(margins)}
    assert rows.read([None]).numbers["margin"].tolist() == []


def test_no_other_stage_reads_it(write, prepare_pairs, reports):
    rows = prepare_pairs(write("a.jsonl", *(record(number, margin=1.0) for number in range(9))), "dpo")
    assert rows.read([0]).numbers == {}
    assert not any("margin" in line for line in reports)
