"""Every adapter trains alike at each ZeRO stage and offload, and goes on from a saved state: the table of docs/adapters.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

WORKER = Path(__file__).parent / "workers" / "layouts.py"
ADAPTERS = (
    "rslora",
    "dora",
    "loraplus",
    "pissa",
    "olora",
    "whole",
    "further",
    "ia3",
    "vera",
    "oft",
    "last",
)  # plain LoRA: test_layouts.py
QUANTIZED = tuple(f"nf4_{name}" for name in ("lora", "rslora", "dora", "loraplus", "whole", "further", "ia3", "vera", "oft"))
LAYOUTS = ("zero2", "zero1", "zero3", "zero2_offload", "zero3_offload")


def trains(adapter: str, layout: str) -> bool:
    """The settings refuse the others: DoRA beside 4 bits that are sharded."""
    return adapter != "nf4_dora" or "zero3" not in layout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_an_adapter(folder / "adapter")
    write_a_base(folder / "base")
    pairs = [(adapter, layout) for adapter in (*ADAPTERS, *QUANTIZED) for layout in LAYOUTS if trains(adapter, layout)]
    tasks = [f"save:{layout}_{adapter}" for adapter, layout in pairs]
    tasks += [f"resume:zero2_{adapter}_of_2:{layout}_{adapter}" for adapter, layout in pairs if layout in ("zero2", "zero3")]
    tasks.append("held:zero3_nf4_lora")
    done = run_command(torchrun(2, str(WORKER), str(folder), *tasks), cwd=folder, timeout=480)
    assert done.code == 0, done.text[-3000:]
    return folder


def config_of_the_worker():
    fields = re.search(r"LLAMA = (\{.*?\n\})", WORKER.read_text(), re.DOTALL)
    assert fields
    return AutoConfig.for_model("llama", **eval(fields[1], {"VOCABULARY": 64, "HIDDEN": 256}), tie_word_embeddings=False)


def write_a_base(folder: Path) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config_of_the_worker()).save_pretrained(folder)


def write_an_adapter(folder: Path) -> None:
    config = config_of_the_worker()
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


def result(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt")


def numbers(losses: list[str]) -> list[float]:
    return [float.fromhex(each) for each in losses]


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [(adapter, layout) for adapter in (*ADAPTERS, *QUANTIZED) for layout in LAYOUTS[1:] if trains(adapter, layout)],
)
def test_the_update_is_the_same_at_each_stage_and_offload(seen, adapter, layout):
    plain, other = result(seen, f"zero2_{adapter}_of_2"), result(seen, f"{layout}_{adapter}_of_2")
    assert numbers(other["losses"]) == pytest.approx(numbers(plain["losses"]), abs=1e-6)
    assert plain["weights"].keys() == other["weights"].keys()
    for name, value in plain["weights"].items():
        assert torch.allclose(other["weights"][name], value, atol=2e-6, rtol=0), name


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [(adapter, layout) for adapter in (*ADAPTERS, *QUANTIZED) for layout in ("zero2", "zero3") if trains(adapter, layout)],
)
def test_a_saved_adapter_goes_on(seen, adapter, layout):
    whole, resumed = result(seen, f"zero2_{adapter}_of_2"), result(seen, f"zero2_{adapter}_of_2__{layout}_{adapter}_of_2")
    if layout == "zero2":
        assert resumed["losses"] == whole["losses"][3:]
    assert numbers(resumed["losses"]) == pytest.approx(numbers(whole["losses"][3:]), abs=1e-6)
    for name, value in whole["weights"].items():
        assert torch.allclose(resumed["weights"][name], value, atol=0 if layout == "zero2" else 2e-6, rtol=0), name


def test_the_adapters_differ(seen):
    losses = {adapter: numbers(result(seen, f"zero2_{adapter}_of_2")["losses"]) for adapter in (*ADAPTERS, *QUANTIZED)}
    assert len({tuple(each) for each in losses.values()}) == len(losses)


def test_no_weight_in_4_bits_stays_whole_until_the_backward_pass(seen):
    """As with the product of bitsandbytes, which leaves all of the base on every rank at ZeRO-3."""
    for rank in range(2):
        found = json.loads((seen / f"held_zero3_nf4_lora_{rank}.json").read_text())
        assert found["of"]
        assert found["held"] == []


def test_each_moves_what_it_shall_and_nothing_else(seen):
    last = result(seen, "zero2_last_of_2")["weights"]
    dora = result(seen, "zero2_dora_of_2")["weights"]
    frozen = [name for name in last if not name.startswith(("model.layers.0.", "lm_head."))]
    assert frozen == ["model.embed_tokens.weight", "model.norm.weight"]
    for name in frozen:
        assert torch.equal(last[name], dora[f"base_model.model.{name}"]), name
    assert not torch.equal(last["lm_head.weight"], dora["base_model.model.lm_head.weight"])
    assert sum("lora_magnitude_vector" in name for name in dora) == 7
    whole = result(seen, "zero2_whole_of_2")["weights"]
    trained, kept = (
        whole[f"base_model.model.lm_head.{part}.weight"] for part in ("modules_to_save.default", "original_module")
    )
    assert not torch.equal(trained, kept)
    assert torch.equal(kept, dora["base_model.model.lm_head.weight"])
