"""Initial weights belong to the seed and the module; what does not fit is refused with both numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ds_trainer.arguments.schema import AdapterSection, FreezeSection, LoraSection, ModelSection
from ds_trainer.errors import ModelError
from ds_trainer.model import load
from ds_trainer.model.adapter import add_adapter, base_of
from ds_trainer.objectives.language_model import attach

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
        add_adapter(build(), AdapterSection(lora=LoraSection(target_modules=["v_proj", "qproj"])), 0)


def test_lora_trains_its_matrices_only():
    model = add_adapter(build(), AdapterSection(lora=LoraSection(rank=4)), 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_part_of_the_weights_is_trained():
    model = add_adapter(build(), AdapterSection(freeze=FreezeSection(last_layers=1, train=["model.norm.*"])), 0)
    trained = trained_names(model)
    assert trained[-1] == "model.norm.weight"
    assert len(trained) == 10
    assert all(name.startswith("model.layers.1.") for name in trained[:-1])


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        (
            {"train": ["model.layer.*"]},
            r"freeze\.train: model\.layer\.\* matches no weight .* model\.embed_tokens\.weight",
        ),
        ({"last_layers": 3}, r"last_layers = 3: this model has 2 layers"),
    ],
)
def test_what_shall_be_trained_must_be_there(freeze, words):
    with pytest.raises(ModelError, match=words):
        add_adapter(build(), AdapterSection(freeze=FreezeSection(**freeze)), 0)


def test_an_adapter_goes_on_from_what_was_saved(tmp_path):
    wanted = LoraSection(rank=3, rslora=True, dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    first = add_adapter(build(), AdapterSection(lora=wanted), 0)
    for parameter in first.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    first.save_pretrained(tmp_path)
    second = add_adapter(build(), AdapterSection(lora=LoraSection(path=str(tmp_path))), 1)
    assert second.peft_config["default"].use_rslora
    saved = {name: each for name, each in first.named_parameters() if each.requires_grad}
    assert saved.keys() == set(trained_names(second))
    assert all(torch.equal(dict(second.named_parameters())[name], each) for name, each in saved.items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of type IA3, not LoRA"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors cannot be read"),
        (lambda folder: rewrite(folder, lambda name, value: value[:2]), r"is \(2, 32\), and this model needs \(3, 32\)"),
        (lambda folder: rewrite(folder, lambda name, value: None if "layers.0" in name else value), "does not hold .*layers.0"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, spoil, words):
    add_adapter(build(), AdapterSection(lora=LoraSection(rank=3, target_modules=["q_proj"])), 0).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=words):
        add_adapter(build(), AdapterSection(lora=LoraSection(path=str(tmp_path))), 0)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    changed = {name: change(name, value) for name, value in load_file(file).items()}
    save_file({name: value.contiguous() for name, value in changed.items() if value is not None}, file)


def test_a_whole_module_beside_the_adapter_must_be_there_and_untied():
    with pytest.raises(ModelError, match=r"modules_to_save: head matches no module .* lm_head"):
        add_adapter(build(), AdapterSection(lora=LoraSection(modules_to_save=["head"])), 0)
    with pytest.raises(ModelError, match=r"embed_tokens shares its weight .*tie_word_embeddings"):
        add_adapter(build(tie_word_embeddings=True), AdapterSection(lora=LoraSection(modules_to_save=["embed_tokens"])), 0)
    model = add_adapter(build(), AdapterSection(lora=LoraSection(modules_to_save=["embed_tokens", "lm_head"])), 0)
    whole = [name for name in trained_names(model) if "lora_" not in name]
    assert whole == [f"base_model.model.{each}.modules_to_save.default.weight" for each in ("model.embed_tokens", "lm_head")]
    assert attach(base_of(model), chunked=True) == "head and loss in chunks of targets"


def test_weight_files_follow_the_index(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FIELDS))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = load.weight_files(str(tmp_path))
    assert len(files) > 1
    assert all(file.is_file() for file in files)
    assert load.weight_files(str(SimpleNamespace)) == []
