"""A base in 4 bits in real runs: alike at each ZeRO stage with evaluations in between, resumed at another, exported, merged."""

from __future__ import annotations

import json

import pytest
from forks import Command, run_all
from helpers import metrics, write_base


def lines_of(folder, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_base_in_4_bits_trains_alike_at_each_stage_goes_on_and_is_merged(run_file, corpus, tmp_path):
    base = str(write_base(corpus, tmp_path / "base"))
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl")}], "every_steps": 1, "max_rows": 4}
    commands = {}
    for stage in (2, 3):
        run = run_file(
            f"zero{stage}",
            model={"path": base, "quantize": "nf4"},
            adapter={"lora": {"rank": 2, "alpha": 4.0}},
            train={"max_steps": 4, "precision": "fp32"},
            evaluate=held_out,
            deepspeed={"zero_optimization": {"stage": stage}},
        )
        commands[f"zero{stage}"] = Command(["train", "--config", str(run)], ranks=2)
    again = ["train", "--config", str(tmp_path / "zero2.yaml"), "train.max_steps=6"]
    commands["goes on"] = Command([*again, "deepspeed.zero_optimization.stage=3"], ranks=2)
    commands["other base"] = Command([*again, "train.max_steps=8", "model.quantize=null"])
    export = ["export", "--run", str(tmp_path / "zero2"), "--to"]
    commands["adapter"] = Command([*export, str(tmp_path / "adapter")], ranks=1)
    commands["merged"] = Command([*export, str(tmp_path / "merged"), "--merge"], ranks=1)
    done = run_all(commands, tmp_path)
    refused = done.pop("other base")
    for name, shown in done.items():
        assert shown.codes == [0] * commands[name].ranks, shown.text
    assert refused.codes == [4]
    assert "it has quantize = nf4, this run has None" in refused.text

    for key in ("loss", "grad_norm"):
        ours, theirs = ([line[key] for line in metrics(tmp_path / f"zero{stage}")[:4] if key in line] for stage in (3, 2))
        assert len(ours) == 4
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (lines_of(tmp_path / f"zero{stage}", "evaluate_loss")[:4] for stage in (3, 2))
    assert len(set(ours)) == 4
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert "% held in 4 bits" in done["zero3"].text
    assert "RESUMING from" in done["goes on"].text

    for name in ("adapter", "merged"):
        assert "base: in nf4 its linear layers are" in done[name].text
    assert "Load the adapter beside the base in nf4" in done["adapter"].text
    assert "keeps the values of nf4" in done["merged"].text
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
