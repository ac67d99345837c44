"""A resumed run is the uninterrupted run, bit for bit, at the same number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import metrics, run_command, torchrun

from ds_trainer.checkpoint.slices import SliceReader
from ds_trainer.export import export

SETTINGS = {
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2",
    "vocab_size": 320,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


def hex_losses(folder: Path, last: int) -> list[str]:
    """The losses of the last steps, as bits; the dropout in the models would show a generator that was not restored."""
    return [line["loss"].hex() for line in metrics(folder)][-last:]


def states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter's weights and optimizer states, whole, whatever ranks and stage they were saved at."""
    reader = SliceReader(sorted(checkpoint.glob("*.safetensors")))
    found = {}
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        for name in reader.names(kind):
            numel = reader.numel(name, kind)
            assert numel is not None
            found[f"{name}/{kind}"] = torch.full((numel,), torch.nan)
            reader.read(name, kind, 0, found[f"{name}/{kind}"])
    return found


@pytest.mark.parametrize(
    ("stage", "trains"),
    [("zero2", "pretrain"), ("zero3", "pretrain"), ("zero2", "dpo"), ("zero3", "reward"), ("zero2", "kto")],
)
def test_resume_equals_the_uninterrupted_run(run_file, corpus, tmp_path, stage, trains):
    file = corpus / ("labelled.jsonl" if trains == "kto" else "pairs.jsonl")
    pairs = {"data": {"sources": [{"path": str(file)}], "seq_len": 64}} if trains != "pretrain" else {}
    config = run_file(
        "whole",
        train={"stage": trains, "max_steps": 6, "schedule": "cosine", "warmup_steps": 2},
        checkpoint={"every_steps": 3, "keep_last": 5},
        model={"config": GPT2_WITH_DROPOUT, "tokenizer": str(corpus / "tokenizer")},
        **SETTINGS[stage],
        **pairs,
    )
    command = torchrun(2, "-m", "ds_trainer", "train", "--config", str(config))
    whole = run_command(command, cwd=tmp_path)
    assert whole.code == 0, whole.text
    first = tmp_path / "whole"

    again = tmp_path / "again"
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "step_00000006")
    resumed = run_command([*command, f"checkpoint.folder={again}"], cwd=tmp_path)
    assert resumed.code == 0, resumed.text
    assert "RESUMING from" in resumed.out
    assert "step 3, 12 rows consumed" in resumed.out

    assert hex_losses(again, 3) == hex_losses(first, 3)
    assert len(metrics(again)) == 6 + 3, "a resume must not truncate metrics.jsonl"
    ours, theirs = (states(each / "checkpoints" / "step_00000006") for each in (again, first))
    assert len(theirs) > 10
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    manifests = [json.loads((each / "checkpoints/step_00000006/manifest.json").read_text()) for each in (again, first)]
    assert manifests[0]["state"] == manifests[1]["state"]
    assert manifests[0]["probe"] == manifests[1]["probe"]
    if trains in ("dpo", "reward"):
        for line in metrics(first):  # one pair a row here: four a step
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
            assert line["rewards/accuracies"] in (0, 0.25, 0.5, 0.75, 1)
        assert [line["rewards/margins"] for line in metrics(again)][-3:] == [
            line["rewards/margins"] for line in metrics(first)
        ][-3:]
        told: list[str] = []
        export(first, tmp_path / "model", checkpoint=None, merge=False, precision=None, report=told.append)
        assert "what it makes of the answers on 4 rows agrees with the training engine's" in told[-1]
        compared = [line.split(" on ")[0] for line in told[1:3]]
        assert compared == [f"{'rewards' if trains == 'reward' else 'logps'}/{which}" for which in ("chosen", "rejected")]
        written = json.loads((tmp_path / "model" / "config.json").read_text())
        assert written["architectures"] == ["GPT2ForSequenceClassification" if trains == "reward" else "GPT2LMHeadModel"]
