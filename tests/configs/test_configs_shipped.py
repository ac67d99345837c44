"""Every shipped DeepSpeed JSON with every shipped run file: DeepSpeed takes what comes out, and no "auto" is left in it."""

import copy
import json
import os
from pathlib import Path

import pytest

from ds_trainer.arguments.deepspeed_keys import validate_blocks
from ds_trainer.arguments.engine_config import build_engine_config, offload_device, solve_run_batch, zero_stage
from ds_trainer.arguments.merge import resolve
from ds_trainer.cli import main

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
EXPECTED = {
    # name -> stage, offload of the optimizer, offload of the parameters
    "zero1": (1, "none", "none"),
    "zero2": (2, "none", "none"),
    "zero2_offload": (2, "cpu", "none"),
    "zero3": (3, "none", "none"),
    "zero3_offload": (3, "cpu", "cpu"),
    "zero3_nvme": (3, "nvme", "nvme"),
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in leaves(child)]
    return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]


def test_the_shipped_set_is_the_promised_one():
    assert EXPECTED.keys() <= {path.stem for path in CONFIGS}
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_run_file_is_whole_without_any_option(example):
    resolved = resolve(example)
    assert resolved.deepspeed_path is not None
    assert validate_blocks(resolved.deepspeed) == []


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("json_file", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_deepspeed_takes_every_combination(example, json_file, precision, device_type, monkeypatch):
    config = pytest.importorskip("deepspeed.runtime.config")
    monkeypatch.setattr(config.dist, "get_rank", lambda *_: (_ for _ in ()).throw(RuntimeError))  # a world of one

    resolved = resolve(example, deepspeed=json_file, overrides=[f"train.precision={precision}"])
    assert validate_blocks(resolved.deepspeed) == []
    if json_file.stem in EXPECTED:
        found = (zero_stage(resolved), *(offload_device(resolved, each) for each in ("offload_optimizer", "offload_param")))
        assert found == EXPECTED[json_file.stem]

    batch = solve_run_batch(resolved, 1)
    handed = build_engine_config(resolved, batch, hidden_size=192, whole_layer=0, device_type=device_type).config
    assert "auto" not in leaves(handed)
    assert json.loads(json.dumps(handed)) == handed

    taken = config.DeepSpeedConfig(copy.deepcopy(handed))
    assert taken.world_size == 1
    assert taken.train_batch_size == batch.global_batch_size
    assert taken.train_micro_batch_size_per_gpu == resolved.settings.train.micro_batch_size
    assert taken.gradient_clipping == resolved.settings.train.max_grad_norm
    assert (taken.bfloat16_config.enabled, taken.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    zero = taken.zero_config
    assert zero.stage == zero_stage(resolved)
    assert zero.reduce_bucket_size == 4096 * 4096  # the least
    if zero.stage == 3:
        assert (zero.prefetch_bucket_size, zero.param_persistence_threshold) == (int(0.9 * 192 * 192), 10 * 192)
    written = json.loads(json_file.read_text())
    assert taken.zero_config.model_fields_set >= {key for key in written["zero_optimization"] if not key.startswith("stage3_")}


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "memory"),
    [("qlora", 1, 1, "24GiB"), ("lora", 1, 1, "80GiB"), ("sft", 1, 8, "80GiB"), ("dpo", 8, 8, "80GiB")],
)
def test_the_examples_of_an_8b_model_fit_the_gpus_they_are_for(name, nodes, gpus, memory, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    words = ["plan", "--config", f"examples/llama_8b_{name}.yaml", "--nodes", str(nodes), "--gpus", str(gpus)]
    with pytest.raises(SystemExit) as left:
        main([*words, "--gpu-memory", memory, "--json", f"model.path={tmp_path}"])
    assert left.value.code == 0, "8 when it does not fit"
    assert json.loads(capsys.readouterr().out)["model"]["parameters"] >= 8_030_261_248
