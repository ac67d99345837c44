import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from ds_trainer.data import lease as module
from ds_trainer.data.lease import lease, this_host, wait_for_a_builder
from ds_trainer.errors import DataError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "DEAD_SECONDS", 0.6)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)


def take(path, reports=None):
    """Take the lease and give it back; how long that took."""
    begun = time.monotonic()
    with lease(path, "numbers", (reports if reports is not None else []).append):
        return time.monotonic() - begun


def start(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def said(path):
    return json.loads(path.read_text())


def hold(path, ready, host=None, progress=""):
    if host:
        socket.gethostname = lambda: host
        fcntl.flock = lambda file, how: None  # the kernel's locks are kept to each host
    with lease(path, "numbers", print) as held:
        held.progress(progress)
        time.sleep(0.25)
        ready.set()
        time.sleep(60)


def end(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=10)


def test_a_free_lease_is_taken_at_once_and_names_its_holder(tmp_path):
    with lease(tmp_path / "lock", "numbers", print):
        assert said(tmp_path / "lock") | {"beat": 0} == {
            "process": os.getpid(),
            "host": this_host(),
            "beat": 0,
            "progress": "",
        }
    assert said(tmp_path / "lock")["ended"] is True
    assert take(tmp_path / "lock") < 0.5


def test_a_killed_holder_on_this_host_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEAD_SECONDS", 60.0)
    ready = FORK.Event()
    holder = start(hold, tmp_path / "lock", ready)
    assert ready.wait(10)
    end(holder)
    assert "ended" not in said(tmp_path / "lock")
    assert take(tmp_path / "lock") < 0.5


def test_a_beat_from_another_host_keeps_the_lease_and_its_end_gives_it_up(tmp_path, reports):
    ready = FORK.Event()
    holder = start(hold, tmp_path / "lock", ready, "other-host", "12% done")
    assert ready.wait(10)
    waiting = start(take, tmp_path / "lock")
    waiting.join(timeout=1.3)  # longer than DEAD_SECONDS, but the holder beats
    assert waiting.exitcode is None
    end(waiting)
    begun = time.monotonic()
    end(holder)
    seconds = take(tmp_path / "lock", reports)
    assert 0.6 <= time.monotonic() - begun < 4
    assert seconds >= 0.6
    [line] = reports
    assert line.startswith(f"waiting for another process that builds the numbers: process {holder.pid} on other-host-")
    assert ", 12% done" in line


def test_the_end_on_another_host_is_followed_at_once(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"process": 1, "host": "other", "beat": 7, "progress": "", "ended": True}))
    assert take(tmp_path / "lock") < 0.5


def test_those_who_wait_are_told_of_the_progress_again_and_again(tmp_path, monkeypatch, reports):
    monkeypatch.setattr(module, "TOLD_SECONDS", 0.2)
    ready, parent = FORK.Event(), os.getpid()

    def work():
        with lease(tmp_path / "lock", "numbers", print) as held:
            ready.set()
            for step in range(10):
                held.progress(f"step {step}")
                time.sleep(0.15)

    holder = start(work)
    assert ready.wait(10)
    take(tmp_path / "lock", reports)
    holder.join(10)
    steps = [int(line.partition("step ")[2].split()[0]) for line in reports if "step" in line]
    assert len(reports) >= 4
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    assert all(f"process {holder.pid} on {socket.gethostname()}" in line for line in reports)
    assert os.getpid() == parent


def test_those_who_wait_fail_with_the_holder_and_who_comes_later_does_not(tmp_path):
    ready = FORK.Event()

    def fail():
        with lease(tmp_path / "lock", "numbers", print):
            ready.set()
            time.sleep(0.3)
            raise DataError("a.jsonl:3: bad")

    holder = start(fail)
    assert ready.wait(10)
    with pytest.raises(DataError, match=r"a\.jsonl:3: bad"):
        take(tmp_path / "lock")
    holder.join(10)
    assert take(tmp_path / "lock") < 0.5


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\xff\xfe\x00", b"[1, 2]", b'{"beat": 3}', b'{"process": 7}', b"{" * 100_000, b"null"]
)
def test_garbage_in_the_lock_file_does_not_matter(tmp_path, content, reports):
    (tmp_path / "lock").write_bytes(content)
    assert take(tmp_path / "lock", reports) < 0.5
    assert said(tmp_path / "lock")["ended"] is True
    assert reports == []


def test_garbage_in_a_lock_that_is_held_is_waited_out(tmp_path, reports):
    ready = FORK.Event()

    def hold_garbage():
        with open(tmp_path / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write('{"beat": 3}')
            file.flush()
            ready.set()
            time.sleep(0.3)

    holder = start(hold_garbage)
    assert ready.wait(10)
    assert take(tmp_path / "lock", reports) > 0.1
    holder.join(10)
    assert "numbers: one just begun (" in reports[0]


def test_the_file_is_never_empty_while_the_lease_is_held(tmp_path, monkeypatch):
    """On another host, where the kernel's lock seems free, an empty file would look like a free lease."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.0005)
    with lease(tmp_path / "lock", "numbers", print) as held, open(tmp_path / "lock") as file:
        for number in range(3000):
            held.progress("x" * (number % 7 * 10))
            assert module._read(file)["process"] == os.getpid()


def test_a_head_start_ends_when_somebody_has_begun_or_when_the_time_is_up(tmp_path):
    begun = time.monotonic()
    wait_for_a_builder(tmp_path / "lock", 0.3, tmp_path / "done")
    assert 0.3 <= time.monotonic() - begun < 1
    with lease(tmp_path / "lock", "numbers", print):
        begun = time.monotonic()
        wait_for_a_builder(tmp_path / "lock", 60, tmp_path / "done")
        assert time.monotonic() - begun < 1
    os.utime(tmp_path / "lock", (1, 1))  # that of an earlier start
    begun = time.monotonic()
    wait_for_a_builder(tmp_path / "lock", 0.2, tmp_path / "done")
    assert time.monotonic() - begun >= 0.2
    (tmp_path / "done").mkdir()
    wait_for_a_builder(tmp_path / "lock", 60, tmp_path / "done")
