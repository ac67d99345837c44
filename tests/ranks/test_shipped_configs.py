"""Every shipped DeepSpeed JSON trains the same: same losses for the same global batch, on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, metrics, run_command, torchrun

NAMES = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"]
COMPILED = {"zero2_offload", "zero3_offload", "zero3_nvme"}
_losses: dict[str, list[float]] = {}


def losses_of(name: str, run_file, tmp_path) -> list[float]:
    if name not in _losses:
        # Everything is partitioned, gathered and swapped even in a tiny model, and swap files stay in the test's folder.
        engine = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        zero = engine["zero_optimization"]
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 0
        for part in ("offload_optimizer", "offload_param"):
            if "nvme_path" in zero.get(part, {}):
                zero[part]["nvme_path"] = str(tmp_path / "nvme")
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(engine))
        config = run_file(name, deepspeed={"config": str(path), "zero_optimization": {}})
        # The first run with offload compiles an op, which takes minutes on two cores.
        done = run_command(
            torchrun(2, "-m", "ds_trainer", "train", "--config", str(config)),
            cwd=tmp_path,
            timeout=900 if name in COMPILED else 120,
        )
        assert done.code == 0, done.text
        assert f"ZeRO-{zero['stage']}" in done.out
        _losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    return _losses[name]


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.builds) if name in COMPILED else name for name in NAMES])
def test_shipped_config_trains_the_same(name, run_file, tmp_path):
    if name in COMPILED and not shutil.which("g++"):
        pytest.skip("no C++ compiler: apt-get install g++")
    if name == "zero3_nvme" and not Path("/usr/include/libaio.h").exists():
        pytest.skip("no libaio: apt-get install libaio-dev")
    expected = losses_of("zero2", run_file, tmp_path)
    assert losses_of(name, run_file, tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]
