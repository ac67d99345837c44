"""Fault points do what a test asks for, where it asks for it, and nothing else."""

import errno
import os
import subprocess
import sys
import time

import pytest

from ds_trainer import faults
from ds_trainer.errors import RefusedError
from ds_trainer.faults import Fault


def test_the_variable_names_points_ranks_steps_and_actions():
    text = "saving:1:4=kill,saving=sleep=0.5,loading::2=stop,training:0=exit=9"
    assert faults.faults_of(text) == {
        "saving": [Fault(1, 4, "kill"), Fault(None, None, "sleep", 0.5)],
        "loading": [Fault(None, 2, "stop")],
        "training": [Fault(0, None, "exit", 9)],
    }


@pytest.mark.parametrize("text", ["saving", "saving=burn", "saving:x=kill", "=kill", "saving:1:2:3=kill", "saving=sleep=long"])
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(RefusedError, match="is not name"):
        faults.faults_of(text)


def test_a_process_keeps_what_its_rank_is_asked_for():
    environ = {"RANK": "1", "DS_TRAINER_FAULT": "a:0=kill,b:1=kill,c=kill"}
    assert faults.ours(environ) == {"b": [Fault(1, None, "kill")], "c": [Fault(None, None, "kill")]}


def test_without_the_variable_a_point_does_nothing():
    assert faults._faults is None
    faults.point("saving")


@pytest.fixture
def ask(monkeypatch):
    def asked(text):
        monkeypatch.setattr(faults, "_faults", faults.faults_of(text))
        monkeypatch.setattr(faults, "_step", None)

    return asked


def test_a_point_with_a_step_acts_at_that_step_only(ask):
    ask("saving::4=raise")
    for step in (3, 5):
        faults.at_step(step)
        faults.point("saving")
    faults.at_step(4)
    faults.point("loading")
    with pytest.raises(ValueError, match="asked for this failure at saving"):
        faults.point("saving")


def test_a_full_disk_too_little_memory_and_a_pause(ask, capfd):
    ask("saving=enospc,loading=sleep=0.2,training=memory")
    with pytest.raises(MemoryError):
        faults.point("training")
    with pytest.raises(OSError, match="No space left") as caught:
        faults.point("saving")
    assert caught.value.errno == errno.ENOSPC
    begun = time.monotonic()
    faults.point("loading")
    assert time.monotonic() - begun >= 0.2
    assert "fault: loading at step None: sleep 0.2" in capfd.readouterr().err


@pytest.mark.parametrize(("action", "code"), [("kill", -9), ("exit=7", 7)])
def test_a_process_ends_at_the_point(action, code):
    script = "from ds_trainer import faults; faults.point('other'); faults.point('here'); print('alive')"
    environment = {**os.environ, "DS_TRAINER_FAULT": f"here={action}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (code, "")
