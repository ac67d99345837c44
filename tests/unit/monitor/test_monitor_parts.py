"""Formulas, the run folder's small files, and a terminal that stays quiet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_trainer.errors import RefusedError
from ds_trainer.monitor.metrics import clock, perplexity, quantity
from ds_trainer.monitor.run_folder import RunFolder


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (130, "2 min"), (5940, "99 min"), (11100, "3 h 05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(812, "812"), (4100, "4.1k"), (13_200_000, "13.2M"), (1.02e9, "1.02B")])
def test_quantity(number, text):
    assert quantity(number) == text


def test_perplexity_of_a_hopeless_loss_is_infinite():
    assert perplexity(0) == 1
    assert perplexity(1e6) == float("inf")


def test_a_folder_that_cannot_be_made_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match=r"checkpoint\.folder = .*file/run: cannot be written"):
        RunFolder(tmp_path / "file" / "run", 0).create()


def test_the_first_failing_rank_is_marked_once(tmp_path):
    first, second = RunFolder(tmp_path, 3), RunFolder(tmp_path, 1)
    first.create()
    assert first.record_error(ValueError("bad")) is True
    assert second.record_error(ConnectionError("because of it")) is False
    assert (tmp_path / "errors/first_failure.txt").read_text() == "rank_00003.txt\n"
    assert "ValueError: bad" in (tmp_path / "errors/rank_00003.txt").read_text()
    assert (tmp_path / "errors/rank_00001.txt").exists()
    second.forget_last_end()
    assert list((tmp_path / "errors").iterdir()) == []


def test_lines_are_appended_and_files_replaced(tmp_path):
    folder = RunFolder(tmp_path, 0)
    folder.metric({"step": 1})
    folder.metric({"step": 2})
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]
    folder.write_json("exit.json", {"code": 1})
    folder.write_json("exit.json", {"code": 0})
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 0}
    assert not list(tmp_path.glob(".*"))


def test_a_second_start_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    first, second = RunFolder(tmp_path, 0), RunFolder(tmp_path, 0)
    first.lock()
    with pytest.raises(RefusedError, match=rf"another start is training in it \(process {os.getpid()} on .*-2"):
        second.lock()
    first._lock.close()  # what the kernel does when the process ends
    second.lock()


NOISY = """
import logging, os, sys, warnings
from pathlib import Path
from ds_trainer.monitor import logs
console = logs.terminal()
logs.to_log_file(Path(sys.argv[1]))
print("printed"); warnings.warn("warned"); logging.getLogger("deepspeed").info("logged")
os.system("echo from a child"); sys.stderr.write("to stderr\\n")
console.print("for the user")
"""


def test_only_our_own_console_reaches_the_terminal(tmp_path):
    log = tmp_path / "logs" / "rank_00000.log"
    done = subprocess.run(
        [sys.executable, "-c", NOISY, str(log)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == "for the user\n"
    assert done.stderr == ""
    text = log.read_text()
    assert all(words in text for words in ("printed", "warned", "logged", "from a child", "to stderr"))
