"""What a run file asks of every host: its paths, its checkpoints, the ops that are compiled for it."""

from __future__ import annotations

import pytest
from helpers import TINY_LLAMA

from ds_trainer.arguments.engine_config import needed_ops
from ds_trainer.arguments.merge import resolve
from ds_trainer.doctor.needs import checkpoint_bytes, needs_of

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/nvme"}


def test_paths_are_told_from_hub_ids_and_the_files_with_settings_belong_to_them(run_file, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    config = run_file(
        data={"sources": [{"path": str(corpus / "*.jsonl"), "format": "text"}, {"path": "owner/name", "format": "text"}]},
        deepspeed={"config": "ds.json"},
    )
    needs = needs_of(resolve(config))
    assert needs.paths == {
        str(config): "--config",
        "ds.json": "deepspeed.config",
        str(corpus / "tokenizer"): "model.tokenizer",
        str(corpus / "*.jsonl"): "data.sources",
    }
    assert needs.hub_ids == {"owner/name": "data.sources"}
    assert needs.run_folder == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("checkpoint", "keep", "max_bytes"),
    [
        ({}, 3, None),
        ({"keep_last": 1, "max_gib": 2.0}, 2, 2 << 30),
        ({"keep_last": 1, "every_steps": 10, "keep_every_steps": 10}, 12, None),
    ],
)
def test_checkpoints_are_counted_with_the_one_that_is_being_written(run_file, checkpoint, keep, max_bytes):
    needs = needs_of(resolve(run_file(train={"max_steps": 100}, checkpoint=checkpoint)))
    assert (needs.keep, needs.max_bytes) == (keep, max_bytes)


def test_a_checkpoint_has_twelve_bytes_for_each_trained_parameter(run_file):
    size, how = checkpoint_bytes(resolve(run_file()))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention + 3 * 32 * 64 + 2 * 32
    parameters = TINY_LLAMA["vocab_size"] * 32 + 2 * layer + 32
    assert size == 12 * parameters
    assert how == f"{parameters:,} trained parameters x 12 bytes"


@pytest.mark.parametrize(
    ("engine", "on_gpu", "on_cpu"),
    [
        ({}, (), ()),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, ("cpu_adam",), ("cpu_adam",)),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, ("async_io",), ("async_io",)),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}, ("fused_adam",), ()),
        ({"optimizer": {"type": "Lion", "params": {"lr": 0.01}}}, ("fused_lion",), ("fused_lion",)),
    ],
)
def test_the_ops_that_a_run_compiles_follow_from_optimizer_and_offload(run_file, engine, on_gpu, on_cpu):
    resolved = resolve(run_file(deepspeed=engine))
    assert (needed_ops(resolved, "cuda"), needed_ops(resolved, "cpu")) == (on_gpu, on_cpu)
    assert needs_of(resolved).nvme == ("async_io" in on_cpu)
