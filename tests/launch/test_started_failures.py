"""A run that ends before its time says who failed first and why, and nobody is left behind."""

import fcntl
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from helpers import clean_environment, free_port, run_command, torchrun

pytestmark = pytest.mark.launch

WORKER = str(Path(__file__).parent / "workers" / "failing.py")


def processes_with(mark: str) -> list[str]:
    """Processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def nothing_left(mark: str, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.1)
    return not processes_with(mark)


def ended(run: Path) -> dict:
    return json.loads((run / "exit.json").read_text())


@pytest.mark.parametrize("fault", ["raise", "killed"])
def test_a_failing_rank_is_named_with_its_cause_and_the_others_end(run_file, tmp_path, fault):
    config = run_file("run", checkpoint={"every_steps": 2, "background": False}, train={"max_steps": 50})
    mark = uuid.uuid4().hex
    command = torchrun(2, WORKER, fault, "train", "--config", config.name, "--resume", "never")
    done = run_command(command, cwd=tmp_path, env=clean_environment(MARK=mark))
    assert done.code == 1
    assert nothing_left(mark)
    run = tmp_path / "run"
    text = done.text.replace("\r", "")
    assert text.count("failed first:" if fault == "raise" else "was left alone:") == 1, text
    block = text[text.index("ds_trainer: rank") :].splitlines()[:7]
    assert "Traceback (most" not in "\n".join(block)
    if fault == "raise":
        assert block[0].startswith("ds_trainer: rank 1 of 2 on ")
        assert block[1] == "  ValueError: the tensors of rank one caught fire"
        assert "failing.py:" in block[2]
        assert block[3] == f"Traceback: {run / 'errors' / 'rank_00001.txt'}"
        assert (run / "errors" / "first_failure.txt").read_text() == "rank_00001.txt\n"
        assert "caught fire" in (run / "errors" / "rank_00001.txt").read_text()
        assert ended(run)["reason"].startswith("ValueError: the tensors of rank one caught fire")
    else:
        assert block[0].startswith("ds_trainer: rank 0 of 2 on ")
        assert "lost the connection to another rank, which ended without a word" in block[1]
    assert "The run goes on from step 2, when the cause is mended, with" in block
    assert (ended(run)["code"], ended(run)["step"]) == (1, 2)
    again = "torchrun --nproc-per-node 2 -m ds_trainer train --config run.yaml --resume auto"
    assert ended(run)["continue"] == again, "with `--resume never` it would start anew"
    last_event = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert last_event["event"] == "ended"
    failed = (run / "errors" / "rank_00000.txt").stat().st_mtime, (run / "exit.json").stat().st_mtime
    assert abs(failed[0] - failed[1]) < 5, "the other rank must end within seconds"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_at_a_terminal_saves_and_ends_all_ranks_with_one_line(run_file, tmp_path, launcher):
    config = run_file("run", train={"max_steps": 100_000})
    arguments = ["ds_trainer", "train", "--config", config.name]
    command = torchrun(2, "-m", *arguments)
    if launcher == "deepspeed":
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", *arguments]
    mark = uuid.uuid4().hex
    with (tmp_path / "terminal.txt").open("w+") as terminal:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=clean_environment(MARK=mark),
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 90
            while "3/100000  loss" not in (tmp_path / "terminal.txt").read_text():
                assert process.poll() is None, (tmp_path / "terminal.txt").read_text()
                assert time.monotonic() < end, (tmp_path / "terminal.txt").read_text()
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            begun = time.monotonic()
            process.wait(timeout=30)
            assert nothing_left(mark)
            assert time.monotonic() - begun < 15
        finally:
            if process.poll() is None or processes_with(mark):
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "terminal.txt").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("ds_trainer: ")]
    step = ended(tmp_path / "run")["step"]
    assert step >= 3
    assert line.startswith(f"ds_trainer: stopped by SIGINT (Ctrl-C). The run goes on from step {step} with: {launcher} ")
    assert text.count("then ending; a second signal ends at once") == 1
    assert f"step {step:>6}/100000  loss" in text, "the last step is shown"
    assert "/ds_trainer/cli.py" not in text, "a traceback of ours says nothing to whoever pressed Ctrl-C"
    assert ended(tmp_path / "run")["code"] == 75
    assert not list((tmp_path / "run" / "errors").iterdir())


@pytest.mark.launch
def test_a_start_in_the_folder_of_a_live_run_leaves_no_account_of_itself_there(run_file, tmp_path):
    config = run_file("live")
    folder = tmp_path / "live"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on here")
        lock.flush()
        done = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", str(config)), cwd=tmp_path, timeout=60)
    assert done.code != 0
    assert done.text.count("another start is training in it (process 1 on here)") == 1
    assert {path.name for path in folder.iterdir()} <= {".lock", "logs", "errors", "checkpoints"}
    assert not list(folder.glob("errors/*"))
