"""Mixtures of experts: ranks whose tokens choose other experts neither hang nor add up other experts' gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_command, torchrun
from torch import nn

from ds_trainer.errors import ModelError
from ds_trainer.model.layers import expert_blocks

TOY = Path(__file__).parent / "workers" / "toy_experts"
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize("config", [str(TOY), QWEN], ids=["modules", "one weight"])
def test_the_update_is_that_of_one_process(run_file, corpus, tmp_path, config):
    """Rows of four tokens, so that most experts get none of a rank's."""
    sections = {
        "model": {"config": config, "tokenizer": str(corpus / "tokenizer"), "trust_remote_code": True},
        "data": {"seq_len": 4},
        "train": {"global_batch_size": 2, "max_steps": 3},
        **({"objective": {"router_weight": 0.1}} if config is QWEN else {}),
    }
    run_file("alone", **sections)
    run_file("two", **sections, deepspeed={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    alone = run_command(torchrun(1, "-m", "ds_trainer", "train", "--config", "alone.yaml"), cwd=tmp_path)
    assert alone.code == 0, alone.text[-3000:]
    two = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", "two.yaml"), cwd=tmp_path)
    assert two.code == 0, two.text[-3000:]
    assert len(losses(tmp_path / "alone")) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=2e-6)
    assert two.text.count("router balance 2.") == (3 if config is QWEN else 0)
    assert ("2 mixtures of experts whole" in two.text) == (config == str(TOY))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def test_what_would_hang_or_add_up_the_wrong_gradients_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), Block())
    blocks = [model[1]]
    assert expert_blocks(model, sharded=True, ranks=8, all_trained=True) == blocks
    assert expert_blocks(model, sharded=False, ranks=1, all_trained=True) == []
    assert expert_blocks(nn.Sequential(nn.Linear(2, 2)), sharded=True, ranks=8, all_trained=False) == []
    with pytest.raises(ModelError, match=r"1 keeps its experts as modules of their own.* below ZeRO-3 the gradients of one"):
        expert_blocks(model, sharded=False, ranks=2, all_trained=True)
    with pytest.raises(ModelError, match="under ZeRO-3 ranks would wait for one another"):
        expert_blocks(model, sharded=True, ranks=2, all_trained=False)
    model[1].requires_grad_(False)
    assert expert_blocks(model, sharded=False, ranks=2, all_trained=False) == []
