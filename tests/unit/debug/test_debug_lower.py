"""A run for a cluster is made to fit the machine that debugs it, and each change is said with its reason."""

from __future__ import annotations

import json

import pytest

from ds_trainer.arguments.merge import resolve
from ds_trainer.debug import lower
from ds_trainer.errors import ModelError

NVME = {"device": "nvme", "nvme_path": "/not/on/this/machine"}


@pytest.fixture
def changes(run_file, tmp_path, monkeypatch):
    """What is lowered of a run with these blocks of DeepSpeed's, by what takes its place."""
    monkeypatch.setattr(lower, "why_not", lambda name: None)

    def lowered(zero, optimizer=None, **sections):
        engine = {"zero_optimization": zero} | ({"optimizer": optimizer} if optimizer else {})
        (tmp_path / "ds.json").write_text(json.dumps(engine))
        config = run_file("run", deepspeed={"config": str(tmp_path / "ds.json"), "zero_optimization": {}}, **sections)
        resolved = resolve(config)
        found = lower.lowered(resolved, "cpu")
        resolve(config, overrides=[setting for each in found for setting in each.settings])  # is no contradiction
        return {" ".join(each.settings): each.why for each in found}

    return lowered


def test_what_this_machine_can_do_is_kept(changes):
    assert changes({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}) == {}


def test_a_disk_that_is_not_here_becomes_host_memory(changes, tmp_path):
    found = changes({"stage": 3, "offload_optimizer": NVME, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}})
    assert list(found) == ["deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    [why] = found.values()
    assert why == f"/not/on/this/machine ({tmp_path}/ds.json:1) is not here"


def test_ops_that_cannot_be_built_are_done_without(changes, monkeypatch):
    monkeypatch.setattr(lower, "why_not", lambda name: f"{name} needs a compiler")
    there = {"device": "nvme", "nvme_path": "/tmp"}
    assert changes({"stage": 3, "offload_optimizer": there}) == {
        "deepspeed.zero_optimization.offload_optimizer.device=cpu": "async_io needs a compiler",
        "deepspeed.optimizer.type=AdamW deepspeed.optimizer.params.torch_adam=true": "cpu_adam needs a compiler",
    }
    torch_adam = {"type": "AdamW", "params": {"torch_adam": True}}
    assert changes({"stage": 2, "offload_optimizer": {"device": "cpu"}}, torch_adam) == {}


def test_what_only_many_ranks_have_is_left_out(changes):
    found = changes(
        {"stage": 3, "zero_hpz_partition_size": 8, "zero_quantized_gradients": True, "zero_quantized_weights": False}
    )
    assert list(found) == [
        "deepspeed.zero_optimization.zero_hpz_partition_size=1",
        "deepspeed.zero_optimization.zero_quantized_gradients=false",
    ]


def test_attention_of_a_gpu_becomes_one_of_the_cpu(changes):
    model = {"path": "some/model", "attention": "flash_attention_2"}
    assert changes({"stage": 2}, model=model, train={"precision": "bf16"}) == {
        "model.attention=auto": "flash_attention_2 needs a GPU and the package flash-attn"
    }


def test_a_precision_this_device_lacks_becomes_fp32(changes, monkeypatch):
    def lacks(precision):
        if precision != "fp32":
            raise ModelError("no")

    monkeypatch.setattr(lower, "require_precision", lacks)
    model = {"path": "some/model", "dtype": "float16"}
    found = changes({"stage": 2}, model=model, train={"precision": "fp16"})
    assert list(found) == ["train.precision=fp32 model.dtype=float32"]
