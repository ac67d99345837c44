"""On a GPU: resumes are exact, the optimizer can stay on the host, and what goes wrong is explained."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from helpers import ROOT, TINY_LLAMA, clean_environment, metrics, run_command, torchrun, write_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROGRAM = [sys.executable, "-m", "ds_trainer"]


def on_gpu(*arguments: str, cwd, timeout=300, **variables):
    """Run a command that sees one GPU."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = clean_environment(CUDA_VISIBLE_DEVICES=gpu, **variables)
    return run_command(list(arguments), cwd=cwd, env=environment, timeout=timeout)


def require_exact_resume(run, folder) -> None:
    launch = "torchrun --standalone --nproc-per-node 1 -m"
    done = on_gpu(*PROGRAM, "verify", "--resume", "--config", str(run), "--steps", "3", "--launch", launch, cwd=folder)
    log = folder / "run" / "verify.log"
    assert done.code == 0, done.text + (log.read_text()[-3000:] if log.exists() else "")
    assert "PROVED" in done.out


@pytest.mark.parametrize("config", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_a_resume_is_exact(run_file, corpus, tmp_path, config):
    block = json.loads((ROOT / "ds_configs" / f"{config}.json").read_text())
    model = {"config": {**TINY_LLAMA, "max_position_embeddings": 1024}, "tokenizer": str(corpus / "tokenizer")}
    train = {"precision": "bf16", "max_steps": 50, "warmup_steps": 2}
    require_exact_resume(run_file("run", model=model, train=train, data={"seq_len": 512}, deepspeed=block), tmp_path)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_resume_beside_a_base_in_4_bits_is_exact(run_file, corpus, tmp_path, config):
    pytest.importorskip("bitsandbytes")
    model = {"path": str(write_base(corpus, tmp_path / "base")), "quantize": "nf4"}
    train = {"precision": "bf16", "max_steps": 50, "warmup_steps": 2}
    block = json.loads((ROOT / "ds_configs" / f"{config}.json").read_text())
    require_exact_resume(run_file("run", model=model, adapter={"lora": {"rank": 4}}, train=train, deepspeed=block), tmp_path)


def test_activations_kept_on_the_host_change_nothing(run_file, tmp_path):
    run = run_file("run", train={"precision": "bf16", "deterministic": True})
    losses = []
    for where in ("false", "true"):
        options = [
            f"model.offload_activations={where}",
            "model.gradient_checkpointing=true",
            f"checkpoint.folder={tmp_path}/{where}",
        ]
        command = torchrun(1, "--standalone", "-m", "ds_trainer", "train", "--config", str(run), *options)
        done = on_gpu(*command, cwd=tmp_path)
        assert done.code == 0, done.text
        losses.append([line["loss"] for line in metrics(tmp_path / where)])
    assert losses[0] == losses[1]


def test_debug_trains_on_the_gpu(run_file, tmp_path):
    done = on_gpu(*PROGRAM, "debug", "--config", str(run_file("run", train={"precision": "bf16"})), cwd=tmp_path)
    assert done.code == 0, done.text
    assert "1 x cuda started by debug" in done.text


def test_too_little_memory_is_explained(run_file, tmp_path):
    run = run_file("run", train={"precision": "bf16", "micro_batch_size": 4})
    command = torchrun(1, "--standalone", "-m", "ds_trainer", "train", "--config", str(run))
    done = on_gpu(*command, cwd=tmp_path, PYTORCH_ALLOC_CONF="per_process_memory_fraction:0.0002")
    reason = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert reason["code"] == 8, done.text
    assert "out of memory on cuda:0" in reason["reason"]
    assert "micro_batch_size=2" in done.text
    assert "Traceback (most recent call last)" not in done.out


def test_doctor_examines_the_gpu(tmp_path):
    done = on_gpu(*PROGRAM, "doctor", "--json", cwd=tmp_path)
    assert done.code in (0, 1), done.text
    assert torch.cuda.get_device_name(0) in done.out
