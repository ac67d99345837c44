"""Asked to end in any phase, by any way, a run saves what it has, says how it goes on, and leaves nobody behind.

The cases are a sample of `scripts/bench/signals.py`, which runs all of them.
"""

from __future__ import annotations

import json
import signal
import time

import pytest
from helpers import clean_environment, metrics, run_command
from live import LiveRun, launched, send
from signal_cases import Case, run_case

pytestmark = pytest.mark.launch

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
CASES = [
    Case("torchrun", "tokenising", "all", TERM),
    Case("torchrun", "loading", "rank 0", USR1),
    Case("torchrun", "evaluating", "rank 1", INT),
    Case("torchrun", "saving", "launcher", TERM),
    Case("deepspeed", "tokenising", "rank 0", INT),
    Case("deepspeed", "loading", "launcher", TERM),
    Case("deepspeed", "evaluating", "all", INT),
    Case("deepspeed", "saving", "rank 1", USR1),
]


@pytest.fixture
def config(run_file, corpus):
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "every_steps": 4, "max_rows": 8}
    return run_file("run", train={"max_steps": 6}, checkpoint={"every_steps": 4}, evaluate=held_out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_signal_ends_the_run_with_what_it_has(config, tmp_path, case):
    found = run_case(case, config, tmp_path)
    assert not found["wrong"], found["wrong"] + [found["text"]]
    assert found["seconds"] < 30


@pytest.fixture(scope="module")
def straight() -> dict[str, list[float]]:
    """The losses of a run that nobody disturbs, kept from the first test that needs them."""
    return {}


SLOW = "training::3=sleep=1.5,saving:1=sleep=2.2,leaving:0=sleep=2"
"""Rank 1 would be gone long before rank 0, and the launcher would send that one a second signal."""


@pytest.mark.parametrize(("launcher", "target", "number"), [("torchrun", "rank 1", USR1), ("deepspeed", "launcher", TERM)])
def test_a_stopped_run_goes_on_bit_for_bit(run_file, tmp_path, straight, launcher, target, number):
    config = run_file("run", train={"max_steps": 6}, monitor={"log_every_steps": 2})
    arguments = ["train", "--config", str(config)]
    if not straight:
        whole = [*arguments, f"checkpoint.folder={tmp_path / 'straight'}", "monitor.log_every_steps=1"]
        done = run_command(launched("torchrun", *whole), cwd=tmp_path)
        assert done.code == 0, done.text
        straight["losses"] = [line["loss"] for line in metrics(tmp_path / "straight")]
    with LiveRun(launched(launcher, *arguments), cwd=tmp_path, folder=tmp_path / "run", fault=SLOW) as run:
        run.wait_for_fault("training")
        time.sleep(0.2)
        send(run.targets()[target], number)
        run.end()
        assert run.events() == ["started_anew", "started", "saved", "ended"]
        assert (run.ended()["code"], run.ended()["step"]) == (75, 3)
        assert f"The run goes on from step 3 with: {launcher}" in run.text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3], "the last step is written though no log step"
    done = run_command([*launched(launcher, *arguments), "monitor.log_every_steps=1"], cwd=tmp_path)
    assert done.code == 0, done.text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in metrics(tmp_path / "run")] == straight["losses"]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_the_time_of_rank_zero_is_up_for_all_like_after_a_signal(run_file, tmp_path):
    config = run_file("run", train={"max_steps": 100_000, "max_seconds": 1})
    torchrun, *command = launched("torchrun", "train", "--config", str(config))
    done = run_command([torchrun, "--max-restarts", "2", *command], cwd=tmp_path)
    assert done.code == 0, "torchrun would start again what leaves with another code"
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ended["code"], ended["reason"], ended["step"]) == (75, "train.max_seconds = 1 is over", None)
    assert done.text.count("train.max_seconds = 1 is over. There is no checkpoint yet: the run starts anew with") == 1
    assert ended["continue"] == f"torchrun --max-restarts 2 --nproc-per-node 2 -m ds_trainer train --config {config}"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_at_once_and_says_so(run_file, tmp_path):
    config = run_file("run", train={"max_steps": 20})
    command = launched("torchrun", "train", "--config", str(config))
    with LiveRun(command, cwd=tmp_path, folder=tmp_path / "run", fault="training::3=sleep=60") as run:
        run.wait_for_fault("training")
        send(run.targets()["rank 1"], TERM)
        time.sleep(2.2)
        assert run.process.poll() is None
        send(run.targets()["rank 1"], TERM)
        assert run.end() < 10
        assert (run.ended()["code"], run.ended()["reason"]) == (143, "stopped by SIGTERM, at once")
        assert run.text.count("ds_trainer: stopped by SIGTERM, at once. There is no checkpoint yet") == 1
    where = (tmp_path / "run" / "errors" / "rank_00001.txt").read_text()
    assert "most recent call first" in where
    assert "loop.py" in where


@pytest.mark.parametrize(
    ("launcher", "target"), [("torchrun", "launcher"), ("deepspeed", "launcher"), ("deepspeed", "launch.py")]
)
def test_no_worker_outlives_a_launcher_that_was_killed(run_file, tmp_path, launcher, target):
    config = run_file("run", train={"max_steps": 100_000})
    command = launched(launcher, "train", "--config", str(config))
    with LiveRun(command, cwd=tmp_path, folder=tmp_path / "run", fault="training::3=sleep=1.5") as run:
        run.wait_for_fault("training")
        send(run.targets()[target], signal.SIGKILL)
        assert run.end() < 15
        assert run.ended()["reason"] == "stopped by the end of its launcher"
        assert (run.ended()["code"], run.ended()["step"]) == (75, 3)


def test_a_shell_above_the_launcher_may_leave(run_file, tmp_path):
    config = run_file("run", train={"max_steps": 5})
    inner = " ".join(launched("torchrun", "train", "--config", str(config)))
    until_training = f"until grep -qs 'fault: training' {tmp_path}/run/logs/rank_00000.log; do sleep 0.1; done"
    shell = ["bash", "-c", f"nohup {inner} & {until_training}"]
    with LiveRun(shell, cwd=tmp_path, folder=tmp_path / "run", fault="training::3=sleep=2.5") as run:
        run.wait_for_fault("training")
        assert run.process.wait(timeout=2) == 0
        run.end()
        assert (run.ended()["code"], run.ended()["reason"]) == (0, "done")


def test_out_of_memory_says_what_is_held_and_what_to_change(run_file, tmp_path):
    train = {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 4}
    config = run_file("run", train=train)
    done = run_command(
        launched("torchrun", "train", "--config", str(config)),
        cwd=tmp_path,
        env=clean_environment(DS_TRAINER_FAULT="training:1:2=memory"),
    )
    assert done.code == 1
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ended["code"] == 8
    assert "out of memory on cpu of " in ended["reason"]
    assert "micro_batch_size x seq_len = 2 x 48 positions a forward at ZeRO stage 2 on 2 ranks" in ended["reason"]
    assert "of that by count weights 0.00 GiB, gradients 0.00 GiB, optimizer states 0.00 GiB" in ended["reason"]
    assert "  train.micro_batch_size=1 train.gradient_accumulation_steps=2\n" in ended["reason"]
    assert done.text.count("rank 1 of 2 on ") == 1
