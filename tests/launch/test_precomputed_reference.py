"""A reference that is computed before the run is the one that is held: the same losses, in real runs, whatever the layout."""

from __future__ import annotations

import json

import pytest
from forks import Command, run_all
from helpers import metrics, write_base


def test_every_kind_of_reference_gives_the_same_losses(run_file, corpus, tmp_path):
    sources = {"dpo": str(corpus / "pairs.jsonl"), "kto": str(corpus / "labelled.jsonl")}
    base = str(write_base(corpus, tmp_path / "base"))
    lora = {"adapter": {"lora": {"rank": 2, "alpha": 4.0, "target_modules": "all-linear"}}}
    lora["model"] = {"path": base}
    commands = {}
    for name, stage, ranks, zero, extra in (
        ("dpo", "dpo", 2, 3, {}),
        ("lora", "dpo", 1, 2, lora),
        ("kto", "kto", 2, 2, {}),
    ):
        data = {"sources": [{"path": sources[stage]}], "seq_len": 96}
        held_out = {"sources": [{"path": sources[stage]}], "every_steps": 2, "max_rows": 4}
        for reference in ("held", "precomputed"):
            run = run_file(
                f"{name}_{reference}",
                data=data,
                train={"stage": stage, "max_steps": 4},
                evaluate=held_out,
                objective={"reference": reference},
                deepspeed={"zero_optimization": {"stage": zero}},
                **extra,
            )
            commands[f"{name}_{reference}"] = Command(["train", "--config", str(run)], ranks=ranks)
    again = ["train", "--config", str(tmp_path / "dpo_precomputed.yaml"), "train.max_steps=6"]
    commands["goes on"] = Command([*again, "deepspeed.zero_optimization.stage=2"])
    changed = [*again[:2], str(tmp_path / "dpo_held.yaml"), *again[3:], "objective.reference=precomputed"]
    commands["held before"] = Command(changed, ranks=2)
    commands["other weights"] = Command([*again, "train.seed=1", f"checkpoint.folder={tmp_path}/other"])
    done = run_all(commands, tmp_path)
    for name, shown in done.items():
        assert shown.codes == [0] * commands[name].ranks, shown.text
    for name in ("dpo", "lora", "kto"):
        ours, theirs = (metrics(tmp_path / f"{name}_{each}") for each in ("precomputed", "held"))
        assert len(ours) == len(theirs) >= 4
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
            found, expected = ([line[key] for line in lines if key in line] for lines in (ours, theirs))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        files = [
            [json.loads(line) for line in (tmp_path / f"{name}_{each}" / "metrics.jsonl").read_text().splitlines()]
            for each in ("precomputed", "held")
        ]
        judged, expected = ([line["evaluate_loss"] for line in lines if "evaluate_loss" in line] for lines in files)
        assert judged == pytest.approx(expected, rel=1e-5)
        text = done[f"{name}_precomputed"].text
        assert text.count("computing its log-probabilities of the training data") == 1
        assert "frozen copy" not in text
    for name in ("goes on", "held before"):
        assert "RESUMING from" in done[name].text
        assert "computing its log-probabilities" not in done[name].text
    for path in (tmp_path / "data_cache").glob("reference_*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    refused = run_all({"changed": Command(again, ranks=2)}, tmp_path)["changed"]
    assert refused.codes == [3, 3], refused.text
    assert "are not those of this model (off by" in refused.text
    assert "computing its log-probabilities" in done["other weights"].text
