"""The watchdog notices that nothing moves, and says whom the others wait for."""

from __future__ import annotations

import threading
import time

import pytest

from ds_trainer import whereabouts
from ds_trainer.errors import HangError
from ds_trainer.monitor import watchdog
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.monitor.watchdog import Answer, Watchdog, answer_of, explain, read_answers, waited_for, write_answer


def answer(rank, *, marks=10, waits_in="all_reduce", step=3, ours="ds_trainer/loop.py:80 train"):
    return Answer(
        rank=rank,
        step=step,
        phase="forward and backward",
        seconds=6.0,
        marks=marks,
        ours=ours,
        innermost="torch/distributed/distributed_c10d.py:3252 all_reduce",
        waits_in=waits_in,
    )


@pytest.mark.parametrize(
    ("answers", "ranks"),
    [
        ([answer(0), answer(2)], [1, 3]),  # who does not answer, whatever the others do
        ([answer(0), answer(1, waits_in=None), answer(2), answer(3)], [1]),  # busy while the others wait for it
        ([answer(0), answer(1, waits_in=None), answer(2, waits_in=None, marks=9), answer(3)], [2]),  # 1 reads a number
        ([answer(0), answer(1), answer(2), answer(3, marks=9)], [3]),  # in an earlier collective
        ([answer(rank, waits_in=None, marks=9 + (rank > 1)) for rank in range(4)], [0, 1]),
        ([answer(rank) for rank in range(4)], []),
    ],
)
def test_whom_the_others_wait_for(answers, ranks):
    assert waited_for({each.rank: each for each in answers}, 4) == ranks


def test_the_table_has_a_line_for_each_place_and_names_hosts():
    answers = {rank: answer(rank) for rank in range(1000) if rank not in (7, 500, 501)}
    lines = explain(answers, [f"node{rank // 8}" for rank in range(1000)], 600)
    assert lines[0] == "no progress for 600 s."
    assert lines[1].split() == ["rank", "step", "phase", "where"]
    assert lines[2].startswith("7, 500-501 ")
    assert "did not answer" in lines[2]
    assert lines[3].startswith("0-6, 8-499, 502-999  3     forward and backward  in all_reduce, torch/distributed/")
    assert lines[3].endswith(" all_reduce, from ds_trainer/loop.py:80 train")
    assert lines[4] == "The others wait for rank 7, 500-501 on node0, node62."
    assert lines[5] == "If that was only slow, raise train.hang_timeout_seconds."
    assert len(lines) == 6


def test_a_table_of_many_places_is_cut():
    answers = {rank: answer(rank, marks=rank, ours=f"ds_trainer/loop.py:{rank} train") for rank in range(50)}
    lines = explain(answers, ["here"] * 50, 600)
    assert len(lines) == 1 + 1 + 8 + 3
    assert lines[10] == "and 42 more places: see errors/"


def test_answers_survive_the_file_and_other_files_are_passed_over(tmp_path):
    folder = tmp_path / "errors"
    for rank in (0, 12):
        write_answer(folder / f"rank_{rank:05d}.txt", answer(rank, step=None))
    (folder / "rank_00003.txt").write_text("today on here\nValueError: bad\n")
    (folder / "rank_00004.txt").write_text("")
    assert read_answers(folder) == {rank: answer(rank, step=None) for rank in (0, 12)}
    assert "most recent call first" in (folder / "rank_00012.txt").read_text()


def test_the_answer_is_about_the_main_thread_whoever_asks():
    whereabouts.at("saving", 4)
    found = []
    asks = threading.Thread(target=lambda: found.append(answer_of(5, 1.5)))
    asks.start()
    asks.join()
    assert (found[0].rank, found[0].step, found[0].phase, found[0].seconds) == (5, 4, "saving", 1.5)
    assert found[0].innermost.startswith("threading.py:") or "threading.py" in found[0].innermost
    assert found[0].waits_in is None


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Start a watchdog of a world of one with a limit of a second; returns what it ended with."""
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.1)
    ends: list[BaseException] = []
    whereabouts.at("building", 1)
    folder = RunFolder(tmp_path, 0)
    folder.create()
    dog = Watchdog(
        folder, ["here"], timeout_seconds=1.0, start_seconds=30.0, end=lambda error: ends.append(error) or dog._stop.set()
    )
    with dog:
        yield ends


def test_it_ends_a_process_that_stands_still_and_leaves_one_alone_that_moves(watched, tmp_path):
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        whereabouts.at("forward and backward", 7)
        time.sleep(0.1)
    assert watched == []
    time.sleep(1.5)
    [error] = watched
    assert isinstance(error, HangError)
    assert str(error).startswith(
        "no progress for 1 s.\nrank  step  phase                 where\n0     7     forward and backward  "
    )
    assert "wait for" not in str(error)
    assert (tmp_path / "errors" / "rank_00000.txt").exists()


def test_before_the_first_step_the_longer_limit_holds(watched, monkeypatch):
    monkeypatch.setattr(whereabouts, "now", whereabouts.Place("building the engine", None, 1, time.monotonic()))
    time.sleep(1.8)
    assert watched == []


def test_a_rank_answers_when_another_has_noticed(watched, tmp_path):
    begun = time.monotonic()
    (tmp_path / "errors" / watchdog.MARKER).touch()
    while not watched:
        assert time.monotonic() < begun + 0.9, "long before its own limit"
        time.sleep(0.02)


def test_saying_where_one_is_costs_next_to_nothing():
    begun = time.perf_counter()
    for _ in range(10_000):
        whereabouts.at("forward and backward", 3)
    assert (time.perf_counter() - begun) / 10_000 < 20e-6
