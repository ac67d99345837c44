"""NEFTune's noise has the size of its paper, document by document, and is there in training only."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from ds_trainer.model import load
from ds_trainer.model.noise import add_noise, document_lengths
from ds_trainer.objectives import language_model

POSITIONS = torch.cat([torch.arange(6), torch.arange(30), torch.arange(28)])[None].repeat(2, 1)
FIELDS = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_positions_know_the_length_of_their_document():
    lengths = document_lengths(POSITIONS)
    assert lengths.tolist() == [[6.0] * 6 + [30.0] * 30 + [28.0] * 28] * 2


@pytest.mark.parametrize("chunked", [True, False])
def test_the_noise_is_uniform_and_as_large_as_the_paper_says(chunked):
    model = load.build_model(AutoConfig.for_model("llama", **FIELDS), precision="fp32", attention="sdpa")
    load.initialize_weights(model, 0)
    add_noise(model, 5.0)
    language_model.attach(model, chunked=chunked)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    inputs = {
        "input_ids": torch.ones_like(POSITIONS),
        "position_ids": POSITIONS,
        "target_positions": torch.tensor([0, 3]),
        "targets": torch.tensor([1, 2]),
    }
    torch.manual_seed(0)
    model.train()(**inputs)
    model.train()(**inputs)
    torch.manual_seed(0)
    model.train()(**inputs)
    model.eval()(**inputs)
    plain = model.model.embed_tokens.weight[1]
    assert torch.equal(seen[3], plain.expand_as(seen[3]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    noise = seen[0] - plain
    for first, last in ((0, 6), (6, 36), (36, 64)):
        bound = 5.0 / ((last - first) * 256) ** 0.5
        part = noise[:, first:last]
        assert part.abs().max() <= bound * 1.0001
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(part.mean().item()) < bound / 20
