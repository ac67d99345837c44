"""`ds_trainer doctor` without a hostfile examines this machine alone; it refuses what it cannot read before anything else."""

from __future__ import annotations

import json
import sys

import pytest
from helpers import clean_environment, run_command

DOCTOR = [sys.executable, "-m", "ds_trainer", "doctor"]


def test_this_machine_is_examined_without_ssh(tmp_path):
    done = run_command([*DOCTOR, "--json"], cwd=tmp_path, env=clean_environment(RANK="0"))
    assert done.code == 0, done.text
    answer = json.loads(done.out)
    assert answer["verdict"].startswith("FIT: this machine, ")
    verdicts = {each["check"]: each["verdict"] for each in answer["findings"]}
    assert verdicts["leftovers"] == "warn"
    assert {verdicts[name] for name in ("python", "versions", "torch", "code")} == {"ok"}
    assert verdicts["collectives"] == "skip"
    assert not {"ssh", "pdsh", "deepspeed_env", "network", "name", "clock"} & verdicts.keys()
    assert answer["hosts"]["here"]["facts"]["executable"] == sys.executable


@pytest.mark.parametrize("arguments", [["--hostfile", "missing"], ["--config", "missing.yaml"]])
def test_a_missing_file_is_no_reason_to_examine_something_else(tmp_path, arguments):
    done = run_command([*DOCTOR, *arguments], cwd=tmp_path)
    assert done.code == 2
    assert "missing" in done.err
    assert done.out == ""
