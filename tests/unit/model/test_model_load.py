"""Initial weights belong to the seed and the module; what does not fit is refused with both numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.arguments.schema import LoraSection, ModelSection
from ds_trainer.errors import ModelError
from ds_trainer.model import load
from ds_trainer.model.adapter import add_lora

FIELDS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(seed: int = 0, **fields):
    config = AutoConfig.for_model("llama", **{**FIELDS, **fields})
    model = load.build_model(config, precision="fp32", attention="sdpa")
    load.initialize_weights(model, seed)
    return model


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = build().state_dict()
    torch.manual_seed(2)
    second = build().state_dict()
    other = build(seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_module_keeps_its_weights_when_the_model_grows():
    small, large = build().state_dict(), build(num_hidden_layers=3).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_the_weights_have_the_law_that_transformers_gives_them():
    weights = build(hidden_size=256, intermediate_size=512).state_dict()
    assert weights["model.layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.norm.weight"].eq(1).all()


def test_tied_embeddings_stay_tied():
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"path": "./nothing/here"}, "no such folder"),
        ({"config": {"hidden_size": 3}}, "no model_type"),
        ({"config": {"model_type": "lama"}}, "no model config could be read"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(section, words):
    with pytest.raises(ModelError, match=words):
        load.load_config(ModelSection(**section))


def fit(**fields):
    config = AutoConfig.for_model("llama", **FIELDS, max_position_embeddings=32)
    load.check_fit(config, **{"seq_len": 32, "tokens": 64, "max_token_id": 63, "resize": False, **fields})


def test_what_fits_is_accepted():
    fit()
    fit(max_token_id=70, tokens=71, resize=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seq_len": 33}, "data.seq_len = 33 is above the model's max_position_embeddings = 32"),
        ({"max_token_id": 64, "tokens": 65}, "token id 64, and the model's vocabulary ends at 63"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(fields, words):
    with pytest.raises(ModelError, match=words):
        fit(**fields)


def test_missing_weights_are_refused_and_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FIELDS))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(path=str(tmp_path))
    with pytest.raises(ModelError, match=r"1 weights .* for example model.layers.1.mlp.up_proj.weight"):
        load.load_pretrained(section, load.load_config(section), precision="fp32", attention="sdpa")


def test_resizing_adds_rows_and_keeps_the_others():
    model = build()
    before = model.get_input_embeddings().weight.detach().clone()
    load.finish_model(model, tokens=70, resize=True, gradient_checkpointing=False, seed=0)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == 70
    assert torch.equal(after[:64], before)
    assert model.config.vocab_size == 70


def test_lora_targets_must_all_match():
    with pytest.raises(ModelError, match=r"qproj matches no linear layer.*q_proj"):
        add_lora(build(), LoraSection(target_modules=["v_proj", "qproj"]), 0)


def test_lora_trains_its_matrices_only():
    model = add_lora(build(), LoraSection(rank=4), 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_weight_files_follow_the_index(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FIELDS))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = load.weight_files(str(tmp_path))
    assert len(files) > 1
    assert all(file.is_file() for file in files)
    assert load.weight_files(str(SimpleNamespace)) == []
