"""On a GPU: the same run as on the CPU, in bf16, at every stage. Skipped where there is no CUDA device."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import clean_environment, metrics, run_command, torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpu_trains_what_the_cpu_does(run_file, tmp_path, stage):
    engine = {"zero_optimization": {"stage": stage}, "optimizer": TORCH_ADAM}
    config = run_file("gpu", train={"precision": "bf16"}, deepspeed=engine)
    environment = clean_environment()
    cpu = run_command(
        torchrun(
            1,
            "--standalone",
            "-m",
            "ds_trainer",
            "train",
            "--config",
            str(config),
            "train.precision=fp32",
            f"checkpoint.folder={tmp_path}/cpu",
        ),
        cwd=tmp_path,
        env=environment,
    )
    assert cpu.code == 0, cpu.text
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    gpu = run_command(
        torchrun(1, "--standalone", "-m", "ds_trainer", "train", "--config", str(config)), cwd=tmp_path, env=environment
    )
    assert gpu.code == 0, gpu.text
    assert "x cuda" in gpu.out
    ours, theirs = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("gpu", "cpu"))
    # The initial weights differ between devices: both start from ln(vocabulary) and fall.
    assert ours[0] == pytest.approx(theirs[0], abs=0.1)
    assert ours[-1] < ours[0]
