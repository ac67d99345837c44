"""`verify` reads every byte of a run's checkpoints; `verify --resume` proves a resume by killing one."""

import json
import sys

import pytest
from forks import Command, run_all
from helpers import run_command

from ds_trainer import verify
from ds_trainer.errors import TrainingError

PROGRAM = [sys.executable, "-m", "ds_trainer"]


def test_checkpoints_are_read_and_the_one_a_start_would_take_is_named(run_file, tmp_path):
    config = run_file("run", train={"max_steps": 3}, checkpoint={"every_steps": 1, "keep_last": 5})
    done = run_all({"train": Command(["train", "--config", str(config)], ranks=2)}, tmp_path)["train"]
    assert done.codes == [0, 0], done.text
    run = tmp_path / "run"
    whole = run_command([*PROGRAM, "verify", str(run)], cwd=tmp_path)
    assert whole.code == 0, whole.text
    assert whole.out.count("  whole  ") == 3
    assert "of 2 ranks" in whole.out
    assert "a start would take step_00000003" in whole.out

    file = run / "checkpoints" / "step_00000003" / "rank_00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (run / "checkpoints" / ".partial-step_00000004").mkdir()
    damaged = run_command([*PROGRAM, "verify", str(run)], cwd=tmp_path)
    assert damaged.code == 5, damaged.text
    assert "step_00000003  DAMAGED  it rank_00001.safetensors does not have the content that was written" in damaged.out
    assert ".partial-step_00000004  left behind" in damaged.out
    assert "a start would take step_00000002" in damaged.out
    assert "1 of 3 checkpoints" in damaged.err
    assert "Traceback" not in damaged.text

    nothing = run_command([*PROGRAM, "verify", str(tmp_path)], cwd=tmp_path)
    assert nothing.code == 2
    assert "holds no complete checkpoint" in nothing.err


def test_a_resume_is_proved_by_killing_a_run(run_file, corpus, tmp_path):
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl")}], "every_steps": 10, "max_rows": 4}
    best = {"every_steps": 10, "keep_best": 1}  # the proof saves at other steps, and evaluates there too
    config = run_file("run", train={"max_steps": 50, "warmup_steps": 2}, evaluate=held_out, checkpoint=best)
    asked = ["--set", f"checkpoint.folder={tmp_path / 'run'}", "--set", "checkpoint.every_steps=20", "--set", "train.seed=1"]
    command = [*PROGRAM, "verify", "--resume", "--config", str(config), "--steps", "2", *asked]
    done = run_command(command, cwd=tmp_path, timeout=170)
    assert done.code == 0, done.text
    assert "step_00000002" in done.out
    assert "PROVED: a run that was killed and resumed from step 2 computed loss and gradient norm of steps 3 to 4" in done.out
    assert list((tmp_path / "run").iterdir()) == [], "nothing of the proof is left, and nothing was trained beside it"

    short = run_command([*PROGRAM, "verify", "--resume", "--config", str(config), "--steps", "30"], cwd=tmp_path)
    assert short.code == 2
    assert "Write --steps 24" in short.err


def test_a_run_that_ends_too_soon_says_why(run_file, tmp_path):
    config = run_file("run", train={"max_steps": 50})
    launch = "torchrun --nproc-per-node 3 -m"  # the global batch of 4 is not divisible by 3
    done = run_command([*PROGRAM, "verify", "--resume", "--config", str(config), "--launch", launch], cwd=tmp_path)
    assert done.code == 1, done.text
    assert "the training ended before step 6" in done.err
    assert "verify.log" in done.err
    assert "ds_trainer: 1 problem" in (tmp_path / "run" / "verify.log").read_text()


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_resume_that_computes_something_else_is_not_proved(name):
    whole = [{"step": step, "loss": 2.0, "grad_norm": 1.0} for step in (1, 2, 3, 4)]
    again = json.loads(json.dumps(whole[2:]))
    verify.compare(whole, again, first=3, last=4)
    again[1][name] += 1e-12
    with pytest.raises(TrainingError, match=rf"{name} of step 4 was .* and is "):
        verify.compare(whole, again, first=3, last=4)
    with pytest.raises(TrainingError, match="did not do step 2 again"):
        verify.compare(whole, again, first=2, last=4)
