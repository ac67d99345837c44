"""A rank that stands still is named within the limit, and no process of the run is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from pathlib import Path

import pytest
from helpers import Done, clean_environment, run_command, torchrun
from live import processes_with

pytestmark = pytest.mark.launch

LIMIT = 6
BUSY_SECONDS = 20
"""What a busy machine may add."""
TRAIN = {"max_steps": 1000, "hang_timeout_seconds": LIMIT, "collective_timeout_seconds": 120}


def hang(run_file, tmp_path: Path, fault: str, **sections) -> tuple[Done, Path, float]:
    """Run on two ranks until a fault ends it; also the seconds from the fault to the last process's end."""
    config = run_file("run", train=TRAIN, **sections)
    mark = uuid.uuid4().hex
    done = run_command(
        torchrun(2, "-m", "ds_trainer", "train", "--config", config.name),
        cwd=tmp_path,
        env=clean_environment(MARK=mark, DS_TRAINER_FAULT=fault),
        timeout=150,
    )
    ended = time.time()
    left = processes_with(mark)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []
    run = tmp_path / "run"
    last_line = max((run / "metrics.jsonl").stat().st_mtime, 0)
    return done, run, ended - last_line


def block(done: Done) -> list[str]:
    text = done.text.replace("\r", "")
    assert text.count("found that the run hangs:") == 1, text
    return [line.strip() for line in text[text.index("ds_trainer: rank") :].splitlines()[:14]]


def table(lines: list[str]) -> dict[str, str]:
    begin = next(index for index, line in enumerate(lines) if line.startswith("rank "))
    return {line.split()[0]: line for line in lines[begin + 1 : begin + 3]}


def ended(run: Path) -> dict:
    return json.loads((run / "exit.json").read_text())


# From the last step to the end of the last process: the limit, 5 s for answers that do not come, and what torchrun waits before
# it kills (30 s). A process that holds the lock ends itself before those are up, and leaves its stacks.
@pytest.mark.parametrize("action", ["stop", "freeze"])
def test_a_rank_that_cannot_answer_is_named_and_ended(run_file, tmp_path, action):
    done, run, seconds = hang(run_file, tmp_path, f"forward:1:40={action}")
    rows = table(block(done))
    assert rows["0"].startswith("0     40    forward and backward  in all_reduce, torch/distributed/distributed_c10d.py:")
    assert rows["0"].endswith(" micro_step")
    assert "did not answer: stopped, dead, or holding the interpreter's lock" in rows["1"]
    assert any(line.startswith("The others wait for rank 1 on ") for line in block(done))
    assert seconds < LIMIT + 5 + 30 + BUSY_SECONDS
    account = ended(run)
    assert (account["code"], account["step"]) == (7, None)
    assert account["reason"].startswith(f"no progress for {LIMIT} s.")
    assert sorted(path.name for path in (run / "errors").glob("rank_*")) == ["rank_00000.txt"]
    assert "faults.py" in (run / "logs" / "rank_00001.log").read_text() or action == "stop", "its stacks"


def test_a_rank_that_is_busy_elsewhere_is_named_with_the_line(run_file, tmp_path):
    stage = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    done, run, seconds = hang(run_file, tmp_path, "forward:1:3=sleep=100", deepspeed=stage)
    rows = table(block(done))
    assert rows["0"].startswith("0     3     forward and backward  in ")
    assert rows["1"].startswith("1     3     forward and backward  ds_trainer/faults.py:")
    assert any(line.startswith("The others wait for rank 1 on ") for line in block(done))
    assert seconds < LIMIT + BUSY_SECONDS, "both have answered: nobody is waited for"
    assert ended(run)["code"] == 7
    stacks = (run / "errors" / "rank_00001.txt").read_text()
    assert "in _act" in stacks
    assert "in micro_step" in (run / "errors" / "rank_00000.txt").read_text()
    assert (run / "errors" / "first_failure.txt").read_text() == "rank_00000.txt\n"


def test_a_slow_run_that_moves_is_left_alone(run_file, tmp_path):
    config = run_file("run", train={**TRAIN, "max_steps": 1})
    done = run_command(
        torchrun(2, "-m", "ds_trainer", "train", "--config", config.name),
        cwd=tmp_path,
        env=clean_environment(DS_TRAINER_FAULT="forward:1=sleep=4"),  # two micro-steps a step: together longer than the limit
    )
    assert done.code == 0, done.text
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    assert list((tmp_path / "run" / "errors").iterdir()) == []


@pytest.mark.parametrize(
    ("what", "zero", "one"),
    [
        ("data", "data = ", "data = "),
        (
            "environment",
            "settings.train.learning_rate = 0.01, environment.NCCL_ALGO = None",
            "settings.train.learning_rate = 0.02, environment.NCCL_ALGO = Tree",
        ),
    ],
    ids=["data", "environment"],
)
def test_ranks_that_would_train_different_runs_are_refused_in_seconds(run_file, corpus, tmp_path, what, zero, one):
    texts = (corpus / "texts.jsonl").read_text().splitlines(keepends=True)
    for host, lines in (("host0", texts), ("host1", texts[:-1])):
        (tmp_path / host).mkdir()
        (tmp_path / host / "texts.jsonl").write_text("".join(lines))
    path = "texts.jsonl" if what == "data" else str(corpus / "texts.jsonl")
    config = run_file("run", data={"sources": [{"path": path, "format": "text"}]})
    worker = str(Path(__file__).parent / "workers" / "differing.py")
    begun = time.monotonic()
    done = run_command(torchrun(2, worker, what, "train", "--config", str(config)), cwd=tmp_path, timeout=90)
    seconds = time.monotonic() - begun
    assert done.text.count("the ranks would train different runs; nothing was started.") == 1, done.text
    lines = done.text[done.text.index("ds_trainer: the ranks") :].splitlines()
    assert lines[1].startswith("  rank 0 on ")
    assert zero in lines[1]
    assert lines[2].startswith("  rank 1 on ")
    assert one in lines[2]
    assert lines[1].partition(": ")[2] != lines[2].partition(": ")[2]
    assert ended(tmp_path / "run")["code"] == 4
    assert ended(tmp_path / "run")["continue"] is None
    assert seconds < 60, "the start itself takes most of it"
