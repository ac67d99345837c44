"""Requests to end a process: what the first one does, what the second, and who is listened to when."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from ds_trainer.monitor import signals
from ds_trainer.monitor.parents import Parents, is_runner

BEGIN = """
import os, signal, sys, time
from pathlib import Path
from ds_trainer.monitor import signals
from ds_trainer.monitor.parents import Parents
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may have been started without, by nohup
signals.SAME_SECONDS, signals.LEAVING_SECONDS, signals.ORPHAN_SECONDS, signals._POLL_SECONDS = 0.5, 0.5, 0.5, 0.1
requests = signals.StopRequests(
    end=lambda reason: (print("ended for", reason, flush=True), os._exit(9)),
    say=lambda line: print(line, flush=True),
    a_rank_failed=Path("failed").exists,
    parents=Parents.now(),
)
requests.watch()

def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)

def end(): sys.stdout.flush(); os._exit(0)
"""


def told(script: str, folder) -> tuple[int, list[str]]:
    """Exit code and lines of a process that is asked to end."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script + "\nend()"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_before_training_a_signal_ends_the_process_at_once(tmp_path, number):
    assert told(f"send({int(number)})", tmp_path) == (9, [f"ended for {int(number)}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_while_training_the_first_signal_waits_and_the_second_ends(tmp_path, number):
    script = f"""
requests.begin()
print(requests.asked())
send({int(number)})
send(signal.SIGINT)  # the same key press, by another way
print(requests.asked(), flush=True)
time.sleep(0.5)
send(signal.SIGINT)
print("still here")
"""
    code, lines = told(script, tmp_path)
    first = f"{number.name}: saving after this step, then ending; a second signal ends at once"
    assert lines == ["0", first, str(int(number)), "ended for 2"]
    assert code == 9


def test_another_rank_s_wish_is_said_once_and_counts_as_no_signal_of_this_one(tmp_path):
    script = """
requests.begin()
requests.agreed(signal.SIGUSR1)
send(signal.SIGTERM)
print(requests.asked(), flush=True)
time.sleep(0.5)
send(signal.SIGTERM)
print(requests.asked(), flush=True)
time.sleep(0.5)
send(signal.SIGTERM)
"""
    own = "SIGTERM: saving after this step, then ending; a second signal ends at once"
    assert told(script, tmp_path) == (9, ["SIGUSR1: ending after this step", "10", own, "10", "ended for 15"])


def test_when_the_run_is_over_the_launcher_s_signals_are_passed_over(tmp_path):
    script = """
requests.begin()
send(signal.SIGTERM)
time.sleep(0.5)
requests.over()
send(signal.SIGTERM)
print("leaving", flush=True)
time.sleep(0.5)
send(signal.SIGTERM)
"""
    said = ["SIGTERM: saving after this step, then ending; a second signal ends at once", "leaving", "ended for 15"]
    assert told(script, tmp_path) == (9, said)


def test_a_signal_after_another_rank_failed_ends_at_once_since_no_step_will_end(tmp_path):
    assert told("Path('failed').touch(); requests.begin(); send(signal.SIGTERM)", tmp_path) == (9, ["ended for 15"])
    code, lines = told("Path('failed').unlink(); requests.begin(); send(15); Path('failed').touch(); time.sleep(2)", tmp_path)
    assert (code, lines[1:]) == (9, ["ended for 15"])


def test_a_signal_after_a_rank_of_this_host_was_killed_says_so(tmp_path):
    script = """
child = os.fork()
if not child: os._exit(0)
os.waitpid(child, 0)
requests.begin(peers=[os.getpid(), child])
send(signal.SIGTERM)
"""
    assert told(script, tmp_path) == (9, [f"ended for {signals.RANK_GONE}"])


def test_a_process_forked_from_it_dies_of_signals_as_usual(tmp_path):
    script = """
requests.begin()
child = os.fork()
if not child:
    time.sleep(5)
    os._exit(0)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(child, 0)[1]), requests.asked())
"""
    assert told(script, tmp_path) == (0, ["15 0"])


def test_the_time_is_up_without_a_signal_and_a_signal_counts_more():
    requests = signals.StopRequests(
        end=lambda reason: None,
        say=lambda line: None,
        a_rank_failed=lambda: False,
        parents=Parents.now(),
        deadline=time.monotonic() + 0.1,
    )
    assert requests.asked() == 0
    time.sleep(0.15)
    assert requests.asked() == signals.TIME_IS_UP
    requests.agreed(signal.SIGTERM)
    assert requests.asked() == signal.SIGTERM


@pytest.mark.parametrize("training", [True, False])
def test_a_process_whose_launcher_is_gone_ends_at_a_step_or_after_a_grace(tmp_path, training):
    script = (
        BEGIN
        + ("requests.begin()\n" if training else "")
        + "time.sleep(0.5)\nprint(requests.asked(), flush=True)\ntime.sleep(5)"
    )
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {script!r}]); time.sleep(0.4)"
    done = subprocess.run(
        [sys.executable, "-c", launcher],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    lines = done.stdout.splitlines()
    if training:
        assert lines[0].startswith("its launcher (process ")
        assert "is gone: saving after this step" in lines[0]
    assert lines[-1] == f"ended for {signals.LAUNCHER_GONE}"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/python3 /opt/venv/bin/deepspeed --num_gpus 2", True),
        ("python /opt/venv/bin/ds --num_gpus 2", True),
        ("python -m deepspeed.launcher.runner --num_gpus 2", True),
        ("python /site-packages/deepspeed/launcher/runner.py", True),
        ("bash run.sh", False),
        ("sshd: user", False),
        ("bash", False),
        ("python -u -m deepspeed.launcher.launch", False),
        ("pytest -k x tests/deepspeed", False),
    ],
)
def test_only_deepspeed_s_runner_is_followed_beyond_the_parent(command, expected):
    assert is_runner(command.split()) is expected
