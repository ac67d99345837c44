"""Under ZeRO-3 no rank ever holds the whole model, neither while it is constructed nor while its weights are loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun

WORKER = Path(__file__).parent / "workers" / "load_memory.py"
MIB = 2**20


def save_model(folder: Path) -> None:
    """A model of 376 MiB, its largest tensor 8 MiB, in several files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100MB")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def digests_of(folder: Path) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("how", ["sharded", "scratch"])
def test_no_rank_holds_the_whole_model(pretrained, tmp_path, how):
    done = run_command(torchrun(2, str(WORKER), how, str(pretrained), str(tmp_path)), cwd=tmp_path)
    assert done.code == 0, done.text[-3000:]
    whole = sum(path.stat().st_size for path in pretrained.glob("*.safetensors"))
    assert len(list(pretrained.glob("*.safetensors"))) > 2
    for rank in (0, 1):
        fields = json.loads((tmp_path / f"{how}_rank{rank}.json").read_text())
        assert fields["held_bytes"] == pytest.approx(whole / 2, rel=0.01)
        # Its half, and what a few tensors in flight and the allocator take.
        assert fields["private_bytes"] < whole / 2 + 64 * MIB, f"rank {rank}: {fields['private_bytes'] / MIB:.0f} MiB"
        if how == "sharded":
            assert fields["digests"] == digests_of(pretrained), "the weights are not those of the file"
