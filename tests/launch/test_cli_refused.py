"""Who starts a run the wrong way is told the right one at once: exit 2, the command to copy, said once."""

import json
import shutil
import sys
import time

import pytest
from forks import Command, run_all
from helpers import clean_environment, run_command, torchrun

QUICK = 2.0
"""Seconds; the target is one, on a machine that does nothing else."""

PLAIN = ["-m", "ds_trainer", "train", "--config", "my runs/first.yaml", "train.max_steps=2", "--deepspeed", "ds.json"]


def refused(arguments, tmp_path, **variables):
    """The refusal of a plain `python ...`, and the seconds it took, the better of two."""
    seconds = []
    for _ in range(2):
        begun = time.monotonic()
        done = run_command([sys.executable, *arguments], cwd=tmp_path, timeout=30, env=clean_environment(**variables))
        seconds.append(time.monotonic() - begun)
    assert done.code == 2, done.text
    assert "Traceback" not in done.text
    assert done.out == ""
    assert min(seconds) < QUICK
    return done.err


def test_plain_python_is_shown_its_own_arguments_under_each_launcher(tmp_path):
    said = refused(PLAIN, tmp_path)
    assert "started by plain python, without a launcher" in said
    own = "train --config 'my runs/first.yaml' train.max_steps=2 --deepspeed ds.json"
    for command in (
        f"torchrun --nproc-per-node 2 -m ds_trainer {own}",
        f"deepspeed --num_gpus 2 --module ds_trainer {own}",
        f"ds_trainer debug {own.removeprefix('train ')}",
    ):
        assert f"  {command}\n" in said


def test_the_devices_of_the_machine_are_counted(tmp_path):
    assert "torchrun --nproc-per-node 4 -m" in refused(PLAIN, tmp_path, CUDA_VISIBLE_DEVICES="0,1,2,3")


def test_variables_left_over_in_a_shell_are_named_with_the_way_to_drop_them(tmp_path):
    said = refused(PLAIN, tmp_path, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert "Found: RANK=1, LOCAL_RANK=1, WORLD_SIZE=2" in said
    assert "  unset RANK LOCAL_RANK WORLD_SIZE\n" in said
    assert "MASTER_ADDR, MASTER_PORT missing" in said


def test_a_local_rank_that_the_launcher_did_not_write_is_refused(tmp_path):
    environment = {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "CROSS_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"), "1"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    said = refused(["-m", "ds_trainer", "--local_rank=1", *PLAIN[2:]], tmp_path, **environment)
    assert "--local_rank=1 on the command line contradicts LOCAL_RANK=0" in said
    # accepted in both spellings, so that the run file is what is looked at next
    for spelling in (["--local_rank=0"], ["--local-rank", "0"]):
        assert "first.yaml" in refused(["-m", "ds_trainer", *spelling, *PLAIN[2:]], tmp_path, **environment)


def test_a_run_file_that_is_not_there_or_wrong_is_refused_as_fast(tmp_path):
    (tmp_path / "run.yaml").write_text("train:\n  stage: pretrain\n  max_step: 5\n")
    said = refused(["-m", "ds_trainer", "debug", "--config", "run.yaml"], tmp_path)
    assert "run.yaml:3" in said
    assert "max_steps" in said
    said = refused(["-m", "ds_trainer", "debug", "--config", "nowhere.yaml"], tmp_path)
    assert "nowhere.yaml" in said


@pytest.mark.launch
def test_two_ranks_of_accelerate_are_refused_once(tmp_path):
    if not shutil.which("accelerate", path=clean_environment()["PATH"]):
        pytest.skip("accelerate is not installed")
    command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    done = run_command([*command, *PLAIN], cwd=tmp_path, timeout=60)
    assert done.code != 0
    assert done.text.count("started by `accelerate launch`") == 1
    assert "  torchrun --nproc-per-node 2 -m ds_trainer train --config 'my runs/first.yaml'" in done.text


@pytest.mark.launch
def test_ranks_of_torchrun_are_refused_once_by_debug_and_by_bad_settings(tmp_path):
    debug = run_command(torchrun(2, "-m", "ds_trainer", "debug", "--config", "run.yaml"), cwd=tmp_path, timeout=60)
    (tmp_path / "run.yaml").write_text("train: {stage: pretrain}\n")
    settings = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", "run.yaml"), cwd=tmp_path, timeout=60)
    for done in (debug, settings):
        assert done.code != 0
        assert done.text.count("ds_trainer: ") == 1, done.text
    assert "`debug` is one process" in debug.text
    assert "run.yaml" in settings.text


def test_debug_ignores_what_another_job_left_in_the_shell(run_file, tmp_path):
    stale = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "1"}
    commands = {
        "stale": Command(["debug", "--config", str(run_file("stale")), "--steps", "1"], environment=stale),
        "ranks": Command(["debug", "--config", str(run_file("ranks"))], ranks=2),
        "rows": Command(["debug", "--config", str(run_file("rows")), "--steps", "2", "--rows", "0"]),
    }
    shown = run_all(commands, tmp_path)
    assert shown["stale"].codes == [0], shown["stale"].text
    assert "step 1/1  loss 5." in shown["stale"].text
    assert "row 0: 48 tokens, 47 trained" in shown["stale"].text
    assert "row 0" not in shown["rows"].text
    assert not (tmp_path / "rows" / "checkpoints").exists()
    assert shown["ranks"].codes[0] == 2  # the other one waits for the launcher to end it, so that this one speaks
    assert shown["ranks"].text.count("`debug` is one process, but this one was started by `torchrun` with 2 processes") == 1
    assert json.loads((tmp_path / "rows" / "debug" / "metrics.jsonl").read_text().splitlines()[1])["step"] == 2
