"""Weights in 4 bits: which, how many, and that they compute the same wherever they are multiplied."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from ds_trainer.arguments.schema import AdapterSection, ModelSection
from ds_trainer.assemble import require_unchanged
from ds_trainer.errors import ModelError
from ds_trainer.model import load, quantize
from ds_trainer.model.adapter import add_adapter, refuse_dora
from ds_trainer.model.layers import meta_model, whole_layers
from ds_trainer.model.stack import recompute_activations

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IDS = torch.arange(24).view(2, 12) * 7 % 64
LORA = AdapterSection.model_validate({"lora": {"rank": 4}})


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **FIELDS, tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelSection(path=str(folder), quantize="nf4")


def loaded(section: ModelSection, precision: str = "fp32"):
    return load.load_pretrained(section, load.load_config(section), precision=precision, attention="sdpa")


def plain(section: ModelSection):
    return loaded(section.model_copy(update={"quantize": None}))


def packed_names(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if quantize.is_held_in_4_bits(weight)}


def on_meta(section: ModelSection, *, value_head: bool = False, quantized: bool = True):
    return meta_model(
        load.load_config(section),
        precision="fp32",
        attention="eager",
        trust_remote_code=False,
        gradient_checkpointing=False,
        adapter=LORA,
        value_head=value_head,
        quantized=quantized,
    )


def test_the_linear_layers_but_the_head_are_packed_in_the_real_model_and_in_that_of_a_plan(base):
    real, planned = add_adapter(loaded(base), LORA, 0), on_meta(base)
    assert packed_names(real) == packed_names(planned)
    assert len(packed_names(real)) == 2 * 7
    for name, weight in real.named_parameters():
        there = planned.get_parameter(name)
        assert quantize.numel(weight) == quantize.numel(there) == there.numel(), name
        assert weight.numel() == quantize.held_numel(there), name
        assert weight.requires_grad is there.requires_grad, name


def test_the_head_of_values_is_not_packed(tmp_path):
    config = AutoConfig.for_model("llama", **FIELDS, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), quantize="nf4")
    real = load.load_pretrained(section, load.load_config(section), precision="fp32", attention="sdpa", new_head=lambda _: None)
    real = add_adapter(real, LORA, 0, value_head=True)
    assert packed_names(real) == packed_names(on_meta(section, value_head=True))
    assert not any("score" in name for name in packed_names(real))


def test_the_scales_take_what_is_counted(base):
    for weight in loaded(base).parameters():
        if quantize.is_held_in_4_bits(weight):
            scales = weight.quant_state
            found = scales.absmax.nbytes + scales.state2.absmax.nbytes
            assert found == pytest.approx(quantize.SCALE_BYTES * quantize.numel(weight), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rounded_plain_model_has_the_values_of_the_packed_one(base, precision):
    real, rounded = loaded(base, precision), plain(base)
    quantize.mark(rounded)
    off = quantize.round_to_4_bits(rounded, precision)
    assert 0.05 < off < 0.15  # of normal numbers, about 0.09
    for name, weight in real.named_parameters():
        if quantize.is_held_in_4_bits(weight):
            assert torch.equal(quantize.unpacked(weight).float(), rounded.get_parameter(name)), name


def gradients_of(model, *, train: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train(train)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def stir(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    return model


@pytest.mark.parametrize("policy", [True, "selective"])
def test_loss_and_gradients_are_those_of_the_values_whatever_is_recomputed(base, policy):
    rounded = plain(base)
    quantize.mark(rounded)
    quantize.round_to_4_bits(rounded, "fp32")
    expected_loss, expected = gradients_of(stir(add_adapter(rounded, LORA, 0)))
    model = loaded(base)
    found_loss, found = gradients_of(stir(add_adapter(model, LORA, 0)))
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7 * 2
    assert float(found_loss) == pytest.approx(float(expected_loss), abs=1e-6)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-7), name
    again = loaded(base)
    recompute_activations(again, policy, offload=False)
    loss, gradients = gradients_of(stir(add_adapter(again, LORA, 0)))
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(gradients[name], value) for name, value in found.items())


def test_training_after_an_evaluation_gives_every_gradient(base):
    """The layers of bitsandbytes repack their weights in evaluation on some CPUs, and then give their input no gradient."""
    model = stir(add_adapter(loaded(base), LORA, 0))
    loss, before = gradients_of(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, loss)
    assert torch.equal(gradients_of(model)[0], loss)
    assert all(torch.equal(value, before[name]) for name, value in gradients_of(model)[1].items())


def test_decoder_layers_are_gathered_whole_at_the_size_they_are_held_in(base):
    found, full = whole_layers(on_meta(base)), whole_layers(on_meta(base, quantized=False))
    assert found.indices == full.indices
    linear = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 192
    assert full.numel - found.numel == linear - linear // 8  # eight to an element of fp32


def test_a_module_that_is_packed_is_not_trained_whole(base):
    adapter = AdapterSection.model_validate({"lora": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}})
    with pytest.raises(ModelError, match=r"modules_to_save: model\.layers\.0\.mlp\.down_proj is held in 4 bits"):
        add_adapter(loaded(base), adapter, 0)


@pytest.mark.parametrize("dora", [True, False])
def test_an_existing_adapter_with_dora_is_refused_where_it_cannot_train(base, tmp_path, dora):
    adapter = AdapterSection.model_validate({"lora": {"rank": 2, "dora": dora}})
    add_adapter(plain(base), adapter, 0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"adapter with DoRA, which does not train at ZeRO-3") if dora else nullcontext():
        refuse_dora(tmp_path)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the layers of a gpt2 model are no torch\.nn\.Linear"):
        loaded(ModelSection(path=str(tmp_path), quantize="nf4"))


def test_a_quantized_checkpoint_is_refused_with_what_to_give_instead(base, tmp_path):
    loaded(base).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its weights are quantized \(bitsandbytes\).* with model\.quantize: nf4"):
        load.load_config(ModelSection(path=str(tmp_path), quantize="nf4"))


def test_an_engine_that_computes_something_else_is_refused_in_either_pass():
    states = torch.linspace(-1, 1, 64)
    require_unchanged(states, [states, states * (1 + 1e-5)])
    for wrong in ([states * 1.01, states], [states, states * 1.01], [states, states * torch.nan]):
        with pytest.raises(ModelError, match=r"the weights in 4 bits compute something else than before.*zero2\.json"):
            require_unchanged(states, wrong)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'ds-trainer\[qlora\]'"):
        quantize.require_library()
