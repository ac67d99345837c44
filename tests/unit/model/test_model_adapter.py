"""Adapters begin where the base is, and one that took a part out of it is given back as one of the untouched base."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from ds_trainer import export
from ds_trainer.arguments.schema import AdapterSection, LoraSection, ModelSection
from ds_trainer.errors import ModelError
from ds_trainer.model import load
from ds_trainer.model.adapter import add_adapter, in_place_of, main_part

FIELDS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(12).reshape(2, 6)


def build(precision="fp32"):
    model = load.build_model(AutoConfig.for_model("llama", **FIELDS), precision=precision, attention="eager")
    load.initialize_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize(
    "adapter",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "init": "pissa"}},
        {"lora": {"rank": 4, "init": "olora", "rslora": True, "target_modules": ["q_proj", "down_proj"]}},
        {"ia3": {}},
        {"vera": {"rank": 8}},
        {"oft": {"block_size": 8}},
    ],
    ids=str,
)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_every_adapter_begins_as_the_base(adapter, precision, bound):
    with torch.no_grad():
        expected = build(precision)(input_ids=IDS).logits
        model = add_adapter(build(precision), AdapterSection.model_validate(adapter), 0).eval()
        assert {each.dtype for each in model.parameters()} == {expected.dtype}
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=bound)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_main_part_of_a_weight(init):
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first, second = main_part(weight, 6, init, 2.0)
    assert (first.shape, second.shape) == ((6, 24), (40, 6))
    if init == "olora":
        assert torch.allclose(second.T @ second, torch.eye(6), atol=1e-6)
    else:
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        best = left[:, :6] @ torch.diag(values[:6]) @ right[:6]
        assert torch.allclose(2.0 * (second @ first).double(), best, atol=1e-4)
        norms = torch.stack([first.norm(dim=1), second.norm(dim=0)])
        assert torch.allclose(norms[0], norms[1], rtol=1e-5), "half of each value on each side"


@pytest.mark.parametrize(
    "settings", [{"init": "pissa"}, {"init": "olora", "rslora": True, "modules_to_save": ["lm_head"]}], ids=str
)
def test_what_took_a_part_out_of_the_base_is_exported_as_lora_of_the_untouched_base(settings, monkeypatch):
    lora = LoraSection(rank=4, **settings)
    trained = add_adapter(build(), AdapterSection(lora=lora), 0).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    kept = {(name, "fp32"): each for name, each in trained.named_parameters() if each.requires_grad}
    kept |= {(name, "buffer"): each for name, each in trained.named_buffers() if "rotary" not in name}
    assert sum(".initial_" in name for name, _ in kept) == 2 * 14

    class Reader:
        def numel(self, name, kind):
            return kept[name, kind].numel() if (name, kind) in kept else None

        def read(self, name, kind, start, target):
            if (name, kind) in kept:
                target.copy_(kept[name, kind].detach().flatten())

    monkeypatch.setattr(load, "load_config", lambda section: None)
    monkeypatch.setattr(load, "load_pretrained", lambda *_, **__: build())
    monkeypatch.setattr(export, "grow_vocabulary", lambda *_: None)
    train = SimpleNamespace(seed=0, stage="sft")
    run = SimpleNamespace(adapter=AdapterSection(lora=lora), lora=lora, model=ModelSection(path="x"), train=train)
    plain = export.rebuild(SimpleNamespace(slices=Reader, path="x"), run, None)
    assert plain.peft_config["default"].r == 8
    with torch.no_grad():
        expected = trained(input_ids=IDS).logits
        assert torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-5)
        assert torch.allclose(plain.merge_and_unload()(input_ids=IDS).logits, expected, atol=1e-5)
        assert not torch.allclose(build()(input_ids=IDS).logits, expected, atol=1e-2)


def test_the_plain_lora_has_the_same_scale():
    for lora in (LoraSection(rank=4, alpha=8, init="pissa"), LoraSection(rank=4, alpha=8, init="pissa", rslora=True)):
        scales = [
            add_adapter(build(), AdapterSection(lora=each), 0)
            .base_model.model.model.layers[0]
            .self_attn.q_proj.scaling["default"]
            for each in (lora, in_place_of(lora))
        ]
        assert scales[0] == pytest.approx(scales[1])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"lora": {"rank": 40, "init": "pissa"}}, r"init = pissa: .*q_proj has a weight of \(32, 32\), .*rank to 32 or less"),
        (
            {"ia3": {"target_modules": ["k"], "feedforward_modules": []}},
            r"ia3\.target_modules: k matches no linear layer.*k_proj",
        ),
        ({"vera": {"target_modules": ["q"]}}, r"vera\.target_modules: q matches no linear layer"),
        ({"oft": {"block_size": 7}}, r"oft\.block_size = 7 does not divide the 32 inputs of .*q_proj\. Write 8"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, words):
    with pytest.raises(ModelError, match=words):
        add_adapter(build(), AdapterSection.model_validate(adapter), 0)


def test_an_existing_adapter_of_a_changed_base_is_refused(tmp_path):
    add_adapter(build(), AdapterSection(lora=LoraSection(rank=3)), 0).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ModelError, match="began with `pissa_niter_4`, which took a part out of its base"):
        add_adapter(build(), AdapterSection(lora=LoraSection(path=str(tmp_path))), 0)
