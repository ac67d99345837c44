"""The process whose terminal shows the progress builds the cache; the others wait for it, but not for ever."""

import multiprocessing
import time

import pytest

from ds_trainer.data.cache import build_once, head_start_of
from ds_trainer.errors import DataError

FORK = multiprocessing.get_context("fork")


def ask(name, folder, head_start, log, fails):
    def build(target, lease):
        log.put(f"{name} builds")
        time.sleep(0.5)
        if fails:
            raise DataError("a.jsonl:3: bad")
        return {}

    try:
        build_once(folder, build, what="tokens", report=lambda line: log.put(f"{name}: {line}"), head_start=head_start)
        log.put(f"{name} has it")
    except DataError as error:
        log.put(f"{name} failed: {error}")


@pytest.fixture
def race(tmp_path):
    """Starts rank 1, which shall wait, half a second before rank 0, which shall build; gives their lines and the time."""

    def run(*, fails=False, head_start=60.0, builder=True):
        log = FORK.SimpleQueue()
        begun = time.monotonic()
        processes = []
        for name, seconds in [("rank 1", head_start), ("rank 0", 0.0)][: 1 + builder]:
            processes.append(FORK.Process(target=ask, args=(name, tmp_path / "tokens", seconds, log, fails)))
            processes[-1].start()
            time.sleep(0.5)
        for process in processes:
            process.join(timeout=30)
            assert process.exitcode == 0
        lines = []
        while not log.empty():
            lines.append(log.get())
        return lines, time.monotonic() - begun

    return run


def test_who_comes_first_leaves_the_building_to_rank_zero(race):
    lines, seconds = race()
    assert [line for line in lines if line.endswith("builds")] == ["rank 0 builds"]
    assert {"rank 0 has it", "rank 1 has it"} < set(lines)
    [waiting] = [line for line in lines if "waiting" in line]
    assert waiting.startswith("rank 1: waiting for another process that builds the tokens: process ")
    assert seconds < 10


def test_who_waits_fails_with_the_builder_and_the_next_start_does_not(race, monkeypatch):
    lines, seconds = race(fails=True)
    assert [line for line in lines if line.endswith("builds")] == ["rank 0 builds"]
    assert {"rank 0 failed: a.jsonl:3: bad", "rank 1 failed: a.jsonl:3: bad"} < set(lines)
    assert seconds < 10
    monkeypatch.setattr("ds_trainer.data.lease._STARTED", time.time())  # a new process, a mended file
    lines, _ = race()
    assert {"rank 0 has it", "rank 1 has it"} < set(lines)


def test_a_builder_that_never_comes_is_waited_for_as_long_as_its_head_start(race):
    lines, seconds = race(builder=False, head_start=1.0)
    assert lines == ["rank 1 builds", "rank 1 has it"]
    assert 1.0 < seconds < 10


def test_rank_zero_begins_at_once_and_the_first_rank_of_each_host_before_its_others():
    assert head_start_of(0, 0) == 0
    assert 0 < head_start_of(8, 0) < head_start_of(1, 1) == head_start_of(9, 1)
